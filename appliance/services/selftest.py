"""Where a self-test's studies go instead of where patients' go, and how it comes in."""

from __future__ import annotations

from appliance.ledger.selftest import SELFTEST_ALERTS, SELFTEST_OBJECTS, Selftest
from appliance.settings import DicomDestination, Hl7Destination, ImageDestination, Settings
from dicom_io.errors import ScansideError

LOOPBACK = "127.0.0.1"
_WILDCARDS = ("", "0.0.0.0", "::")
_PORT = "selftest.port"


def selftest_settings(settings: Settings, test: Selftest) -> Settings:
    """The settings with no other destinations than the test's own; after it has ended, with none at all.

    It takes every kind of object that a destination of the site takes.
    """
    if test.ended_at is not None:
        return settings.model_copy(update={"destination": []})
    objects = {kind: None for one in settings.destination if isinstance(one, ImageDestination) for kind in one.objects}
    return settings.model_copy(update={"destination": [alerts_of(test), objects_of(test, [*objects])]})


def alerts_of(test: Selftest) -> Hl7Destination:
    """Where the alert on a test's study goes."""
    return Hl7Destination(
        kind="hl7",
        name=SELFTEST_ALERTS,
        host=LOOPBACK,
        port=test.alert_port,
        processing_id="T",
        acknowledge_seconds=5.0,
    )


def objects_of(test: Selftest, kinds: list[str]) -> DicomDestination:
    """Where the objects on a test's study go."""
    return DicomDestination.model_validate(
        {
            "kind": "dicom",
            "name": SELFTEST_OBJECTS,
            "ae_title": "SELFTEST",
            "host": LOOPBACK,
            "port": test.object_port,
            "objects": [*dict.fromkeys(["report", *kinds])],
            "commitment": "no",
        }
    )


def write_port(settings: Settings, newest: int) -> None:
    """Leave word of the port that the self-test has to itself, if it has one.

    Args:
        newest: the port that intake listens on beside those of the settings.
    """
    path = settings.run_directory / _PORT
    if listens_on_loopback(settings):
        path.unlink(missing_ok=True)
    else:
        path.write_text(f"{newest}\n", encoding="ascii")


def port_of(settings: Settings) -> int:
    """The port of the loopback that takes a self-test.

    Raises:
        ScansideError: intake does not run, or never did with these settings.
    """
    if listens_on_loopback(settings):
        return settings.intake.port
    path = settings.run_directory / _PORT
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError) as error:
        raise ScansideError("intake does not say where it takes a self-test", str(path), "start intake") from error


def listens_on_loopback(settings: Settings) -> bool:
    """Whether the port for scanners takes unencrypted connections from this machine's loopback."""
    return settings.intake.plain and settings.intake.host in (*_WILDCARDS, LOOPBACK, "localhost")
