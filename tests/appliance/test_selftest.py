"""The ways of a self-test in and out: never a site's own destinations, and a port on every box."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.ledger.selftest import SELFTEST_AE, SELFTEST_DESTINATIONS, Selftest
from appliance.operations.health import Watchdog
from appliance.services.intake import _listeners, _server_options
from appliance.services.selftest import listens_on_loopback, port_of, selftest_settings, write_port
from appliance.settings import ObjectKind, Settings
from dicom_io.errors import ScansideError

SITE = [
    {"kind": "dicom", "name": "pacs", "ae_title": "PACS", "host": "10.0.0.1", "port": 104,
     "objects": ["segmentation", "report"]},
    {"kind": "hl7", "name": "er", "host": "10.0.0.2", "port": 2575, "refusals": True},
    {"kind": "hl7", "name": "chief", "host": "10.0.0.3", "port": 2575, "after_seconds": 60.0},
    {"kind": "mail", "name": "mail", "host": "10.0.0.4", "sender": "a@b", "recipients": ["c@d"], "after_seconds": 90.0},
]  # fmt: skip


def settings(tmp_path: Path, **intake: object) -> Settings:
    return Settings.model_validate(
        {"box": {"state_directory": tmp_path}, "destination": SITE, "intake": {"port": 11112, **intake}}
    )


def one(ended_at: str | None = None) -> Selftest:
    return Selftest("2.25.1", True, 4001, 4002, "2026-01-01T00:00:00+00:00", ended_at, None, None, "")


def test_it_has_its_own_destinations_and_no_other(tmp_path: Path) -> None:
    site = settings(tmp_path)
    ours = selftest_settings(site, one())
    assert [one.name for one in ours.destination] == list(SELFTEST_DESTINATIONS)
    assert {one.host for one in ours.destination} == {"127.0.0.1"}  # type: ignore[union-attr]
    assert {one.port for one in ours.destination} == {4001, 4002}  # type: ignore[union-attr]
    assert [one.name for one in ours.alert_destinations] == ["selftest"]
    assert ours.escalation == frozenset()
    assert ours.worklist_destinations == ()
    objects: list[ObjectKind] = ours.destination[1].objects  # type: ignore[union-attr]
    assert objects == ["report", "segmentation"]  # what some archive of the site takes is made for the test, too
    assert ours.model_copy(update={"destination": site.destination}) == site
    assert selftest_settings(site, one("2026-01-01T00:01:00+00:00")).destination == []


@pytest.mark.parametrize("name", ["selftest", "selftest-objects", "selftest2"])
def test_no_site_can_have_a_destination_of_that_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="the box's own tests"):
        Settings.model_validate({"destination": [{**SITE[1], "name": name}]})


@pytest.mark.parametrize(
    ("intake", "expected"),
    [({}, True), ({"host": "127.0.0.1"}, True), ({"host": "::"}, True), ({"host": "10.0.0.9"}, False)],
    ids=str,
)
def test_where_it_comes_in(tmp_path: Path, intake: dict[str, object], expected: bool) -> None:
    site = settings(tmp_path, **intake)
    site.run_directory.mkdir()
    listeners = _listeners(site, Watchdog(), {})
    assert listens_on_loopback(site) is expected
    assert [(one.host, one.port) for one in listeners[1:]] == ([] if expected else [("127.0.0.1", 0)])
    write_port(site, 50001)
    assert port_of(site) == (11112 if expected else 50001)


def test_intake_that_never_ran_says_so(tmp_path: Path) -> None:
    with pytest.raises(ScansideError, match="start intake"):
        port_of(settings(tmp_path, host="10.0.0.9"))


def test_a_list_of_who_may_send_lets_it_in_from_this_machine(tmp_path: Path) -> None:
    site = settings(tmp_path, accepted_calling_ae_titles=["CT01"], accepted_addresses=["10.1.0.0/16"])
    options = _server_options(site.intake)
    assert options.accepted_calling == ("CT01", SELFTEST_AE)
    assert "127.0.0.0/8" in map(str, options.accepted_addresses)
    everybody = _server_options(settings(tmp_path).intake)
    assert everybody.accepted_calling == everybody.accepted_addresses == ()
