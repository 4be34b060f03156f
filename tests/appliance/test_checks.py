"""What `scanside check` says of the certificate that intake shows."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from appliance import init
from appliance.checks import Check, run_checks
from appliance.demo.orthanc import free_ports
from appliance.events import Event
from appliance.ledger.store import Ledger
from appliance.settings import load_settings
from tests.appliance.operations.test_audit import damage
from tests.dicom_io.certificates import Authority, Pair


@pytest.fixture
def port() -> Iterator[int]:
    """A port where somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


def checked(folder: Path, pair: Pair, port: int) -> Check:
    """The check of intake with TLS, on a box whose plain port is off."""
    ports = free_ports(3)
    tls = {"port": port, "certificate": str(pair.certificate), "key": str(pair.key)}
    path = init.write(
        folder / "box",
        {
            "intake": {"plain": False, "host": "127.0.0.1", "tls": tls},
            "triton": dict(zip(("grpc_port", "http_port", "metrics_port"), ports, strict=True)),
        },
    )
    found = {one.check: one for one in run_checks(load_settings(path))}
    assert "intake" not in found
    return found["intake TLS"]


def test_a_good_certificate_is_shown_with_its_last_day(tmp_path: Path, port: int) -> None:
    check = checked(tmp_path, Authority(tmp_path).issue("box"), port)
    assert (check.ok, "good until" in check.detail) == (True, True)


def test_an_expired_certificate_fails_the_check(tmp_path: Path, port: int) -> None:
    check = checked(tmp_path, Authority(tmp_path).issue("box", lifetime=timedelta(days=-1)), port)
    assert (check.ok, "expired on" in check.detail) == (False, True)


def test_a_certificate_that_cannot_be_read_fails_the_check(tmp_path: Path, port: int) -> None:
    check = checked(tmp_path, Pair(tmp_path / "absent.crt", tmp_path / "absent.key"), port)
    assert (check.ok, "absent.crt" in check.detail) == (False, True)


def test_nobody_listening_fails_the_check(tmp_path: Path) -> None:
    check = checked(tmp_path, Authority(tmp_path).issue("box"), free_ports(1)[0])
    assert (check.ok, "scanside intake" in check.detail) == (False, True)


def test_images_that_the_ledger_does_not_know_fail_the_check(tmp_path: Path) -> None:
    settings = load_settings(init.write(tmp_path / "box", {}))
    aside = settings.spool_directory / "unknown" / f"{64 * '0'}.dcm"
    for expected in (True, False):
        (check,) = (one for one in run_checks(settings) if one.check == "folders")
        assert (check.ok, "does not know" in check.detail) == (expected, not expected), check.detail
        aside.parent.mkdir(exist_ok=True)
        aside.write_bytes(b"image")


def test_a_damaged_ledger_fails_its_checks_and_hides_no_other(tmp_path: Path) -> None:
    settings = load_settings(init.write(tmp_path / "box", {}))
    sound = [one.check for one in run_checks(settings)]
    ledger = Ledger(settings.ledger_path)
    for number in range(40):
        ledger.log(Event.SERVICE_STARTED, number=f"word-{number}-", filler="x" * 1000)
    damage(ledger, settings.ledger_path, "word-39-")
    found = {one.check: one for one in run_checks(settings)}
    assert list(found) == sound
    assert (found["audit"].ok, "malformed" in found["audit"].detail) == (False, True)
    assert found["models"].ok
