"""The units on a real systemd: from the scanner to the alert, and what a kill, a hang and a failure come to."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.deploy.machine import ROOT, Machine, booted
from tests.dicom_io.certificates import Authority
from tests.interop.box import study, triton_environment

pytestmark = [pytest.mark.deploy, pytest.mark.xdist_group("machine"), pytest.mark.timeout(600)]

SERVICES = ("intake", "engine", "delivery", "triton")
PORT, HL7_PORT = 11112, 2575
SETTINGS = f"""
[intake]
port = {PORT}
reserve_percent = 0.0
reserve_bytes = 0
[study]
quiet_seconds = 5.0
settle_seconds = 0.5
[triton]
environment = "/opt/scanside/venv-triton"
[[destination]]
kind = "hl7"
name = "er"
host = "127.0.0.1"
port = {HL7_PORT}
acknowledge_seconds = 5.0
"""
CLI = "/opt/scanside/venv/bin/scanside"


class Hospital:
    """The machine's neighbours: a scanner, and a listener that keeps each alert once."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine = machine
        self.folder = folder
        self.alerts = folder / "alerts"
        self.alerts.mkdir()
        self.alerted: list[str] = []

    @contextmanager
    def scanning(self, name: str) -> Iterator[str]:
        """A study with a bleed of which the first half is sent; the second is on return. Yields its UID."""
        uid, files = study(self.folder, "intraparenchymal", name)
        command = self.machine.beside(
            sys.executable, "-m", "tests.deploy.scanner", files[0].parent, "127.0.0.1", str(PORT)
        )
        with subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as scanner:
            assert scanner.stdout is not None and scanner.stdin is not None
            assert scanner.stdout.readline() == "half\n"
            yield uid
            # It may have lost its association meanwhile and come past the middle once more.
            said, _ = scanner.communicate("\n" * 50, timeout=120)
        assert scanner.returncode == 0, said

    def heard(self, uid: str) -> list[Path]:
        """The distinct messages on a study."""
        return [one for one in self.alerts.glob("*.hl7") if uid in one.read_text(encoding="utf-8")]

    def hears_once(self, uid: str) -> None:
        """Wait for the alert on a study; the last test looks whether another followed."""
        self.machine.wait(lambda: bool(self.heard(uid)), 120, f"the alert on {uid}")
        (alert,) = self.heard(uid)
        assert "haemorrhage suspected" in alert.read_text(encoding="utf-8")
        self.alerted.append(uid)


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospital]:
    folder = tmp_path_factory.mktemp("machine")
    with booted(folder, SETTINGS, triton_environment()) as machine:
        one = Hospital(machine, folder)
        command = [sys.executable, "-m", "appliance.demo.listener", "--port", str(HL7_PORT), "--out", str(one.alerts)]
        with subprocess.Popen(machine.beside(*command), cwd=ROOT, stdout=subprocess.DEVNULL) as listener:
            try:
                for name in SERVICES:
                    machine.wait(
                        lambda name=name: machine.show(f"scanside-{name}.service", "ActiveState") == "active",  # type: ignore[misc]
                        120,
                        f"{name} after the boot",
                    )
                yield one
            finally:
                listener.terminate()


def test_a_booted_box_alerts(hospital: Hospital) -> None:
    with hospital.scanning("BOOTED") as uid:
        pass
    hospital.hears_once(uid)
    users = {hospital.machine.show(f"scanside-{name}.service", "User") for name in SERVICES}
    assert len(users) == len(SERVICES)
    assert "root" not in users


@pytest.mark.parametrize("name", SERVICES)
def test_killed_in_the_middle_of_a_study(hospital: Hospital, name: str) -> None:
    machine, unit = hospital.machine, f"scanside-{name}.service"
    before = machine.show(unit, "MainPID")
    with hospital.scanning(f"KILL{name.upper()}") as uid:
        machine.run("systemctl", "kill", "-s", "KILL", unit)
        machine.wait(lambda: machine.show(unit, "MainPID") not in ("0", before), 60, f"a new {name}")
    hospital.hears_once(uid)


@pytest.mark.parametrize("name", ["engine", "triton"])
def test_what_hangs_is_started_again_by_the_watchdog(hospital: Hospital, name: str) -> None:
    machine, unit = hospital.machine, f"scanside-{name}.service"
    machine.wait(lambda: machine.show(unit, "ActiveState") == "active", 120, f"{name} is up")
    before = machine.show(unit, "MainPID")
    with hospital.scanning(f"HANG{name.upper()}") as uid:
        machine.run("systemctl", "kill", "-s", "STOP", unit)
    machine.wait(lambda: machine.show(unit, "MainPID") not in ("0", before), 120, f"a new {name}")
    assert "Watchdog timeout" in machine.journal("-u", unit)
    hospital.hears_once(uid)


def test_a_restart_refuses_no_scanner_and_parks_what_was_under_way(hospital: Hospital) -> None:
    machine = hospital.machine
    with hospital.scanning("RESTART") as uid:
        machine.run("systemctl", "stop", *(f"scanside-{name}.service" for name in SERVICES))
        # Nobody but systemd listens; who connects wakes intake.
        said = subprocess.run(
            machine.beside(sys.executable, "-m", "appliance.cli", "echo", f"SCANSIDE@127.0.0.1:{PORT}"),
            cwd=ROOT, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert said.returncode == 0, said.stderr
        machine.run("systemctl", "start", "scanside.target")
    hospital.hears_once(uid)


def test_what_whoever_changes_the_release_stops_has_not_failed(hospital: Hospital) -> None:
    """A scanner that came meanwhile started intake, which waits; a check that was due waits for intake."""
    machine = hospital.machine
    before = machine.journal("-t", "scanside-alarm")
    machine.run("systemctl", "stop", "scanside-intake.service")
    machine.run("touch", "/run/scanside.hold")
    for name in ("intake", "check"):
        machine.run("systemctl", "start", "--no-block", f"scanside-{name}.service")
        machine.wait(
            lambda name=name: machine.show(f"scanside-{name}.service", "ActiveState") == "activating",  # type: ignore[misc]
            30, f"{name} at its start",
        )  # fmt: skip
    machine.run("sleep", "2")
    for name in ("intake", "check"):
        machine.run("systemctl", "stop", f"scanside-{name}.service")
        assert machine.show(f"scanside-{name}.service", "Result") == "success"
    machine.run("rm", "/run/scanside.hold")
    machine.run("systemctl", "start", "scanside-intake.service", "scanside.target")
    assert machine.journal("-t", "scanside-alarm") == before


def test_what_cannot_start_is_told_and_starts_once_it_can(hospital: Hospital) -> None:
    machine = hospital.machine
    settings = machine.root / "etc/scanside/scanside.toml"
    whole = settings.read_text(encoding="utf-8")
    settings.write_text(whole.replace("[intake]", "[intake]\nno_such_key = 1"), encoding="utf-8")
    machine.run("systemctl", "restart", "--no-block", "scanside-intake.service")
    machine.wait(
        lambda: "scanside-intake.service failed" in machine.journal("-p", "alert"), 180, "the alarm in the journal"
    )
    settings.write_text(whole, encoding="utf-8")
    machine.wait(lambda: machine.show("scanside-intake.service", "ActiveState") == "active", 120, "intake, once mended")
    with hospital.scanning("MENDED") as uid:
        pass
    hospital.hears_once(uid)


def test_a_renewed_key_of_tls_serves_without_a_restart(hospital: Hospital) -> None:
    """Its file is for root and intake; an association that is open goes on."""
    machine = hospital.machine
    authority = Authority(hospital.folder)
    folder = machine.root / "etc/scanside"

    def put(name: str) -> None:
        pair = authority.issue(name)
        shutil.copy(pair.certificate, folder / "tls.pem.new")
        shutil.copy(pair.key, folder / "tls-key.pem.new")
        for file, group, mode in (("tls.pem", "scanside", "644"), ("tls-key.pem", "scanside-intake", "640")):
            machine.run("chown", f"root:{group}", f"/etc/scanside/{file}.new")
            machine.run("chmod", mode, f"/etc/scanside/{file}.new")
            machine.run("mv", f"/etc/scanside/{file}.new", f"/etc/scanside/{file}")

    def shown() -> str:
        code = (
            "import socket, ssl, sys; context = ssl.create_default_context(cafile=sys.argv[1]); "
            "context.check_hostname = False; "
            "one = context.wrap_socket(socket.create_connection(('127.0.0.1', 2762), 60)); "
            "print(one.getpeercert()['serialNumber'])"
        )
        command = machine.beside(sys.executable, "-c", code, authority.certificate)
        said = subprocess.run(command, capture_output=True, text=True, timeout=90)
        assert said.returncode == 0, said.stderr + machine.journal("-n", "30", "-u", "scanside-intake.service")
        return said.stdout

    put("box")
    with (folder / "scanside.toml").open("a", encoding="utf-8") as settings:
        settings.write('[intake.tls]\ncertificate = "tls.pem"\nkey = "tls-key.pem"\n')
    machine.run("systemctl", "stop", "scanside-intake.service")
    machine.run("systemctl", "enable", "--now", "scanside-intake-tls.socket")
    first = shown()
    machine.wait(
        lambda: machine.show("scanside-intake.service", "ActiveState") == "active", 60, "intake with both ports"
    )
    before = machine.show("scanside-intake.service", "MainPID")
    with hospital.scanning("WITHTLS") as uid:
        put("box renewed")
        assert shown() != first
    hospital.hears_once(uid)
    assert machine.show("scanside-intake.service", "MainPID") == before


def test_delivery_reads_what_is_for_it_and_nobody_else_does(hospital: Hospital) -> None:
    machine = hospital.machine
    (machine.root / "etc/scanside/secret").write_text("a password")
    machine.run("chown", "root:scanside-delivery", "/etc/scanside/secret")
    machine.run("chmod", "640", "/etc/scanside/secret")
    for name in SERVICES:
        unit = [f"--property={key}={value}" for key, value in (("User", f"scanside-{name}"), ("Group", "scanside"))]
        said = machine.run("systemd-run", "--wait", "--pipe", "-q", *unit, "cat", "/etc/scanside/secret", check=False)
        assert ("a password" in said) == (name == "delivery"), said


def test_an_alarm_is_in_the_ledger(hospital: Hospital) -> None:
    machine = hospital.machine
    machine.run("systemctl", "start", "scanside-alarm@example.service.service")
    figures = machine.run("runuser", "-u", "scanside-check", "-g", "scanside", "--", CLI, "metrics")
    (line,) = [one for one in figures.splitlines() if one.startswith('scanside_events_total{event="service.failed"}')]
    assert float(line.split()[-1]) >= 1
    machine.run("systemctl", "start", "scanside-audit.service")


def test_in_the_end_each_study_had_one_alert(hospital: Hospital) -> None:
    assert hospital.alerted
    assert {uid: len(hospital.heard(uid)) for uid in hospital.alerted} == dict.fromkeys(hospital.alerted, 1)
