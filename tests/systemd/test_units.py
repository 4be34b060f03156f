"""The unit files as systemd itself reads them, and held against what the services and their settings say."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import typer.main

from appliance.cli import app
from appliance.services.process import STOP_SECONDS
from appliance.settings import Hl7Intake, Hl7Tls, Settings
from dicom_io.tls import DEFAULT_PORT
from tests.deploy.machine import ROOT, UNITS, install
from tests.peers import program

FILES = sorted(one for one in UNITS.rglob("*.*") if one.is_file())
NAMES = sorted(one.name for one in UNITS.glob("scanside*.*") if one.is_file())
SERVICES = [name for name in NAMES if name.endswith(".service")]
DAEMONS = [f"scanside-{name}.service" for name in ("intake", "engine", "delivery", "triton", "worklist")]
OPTIONAL = ["scanside-worklist.service"]
"""Services that a site enables because its settings have the section."""
EXPOSURE = 1.5
ROOT_FOLDERS = ("/opt/scanside", "/etc/scanside", "/var/lib/scanside")


def read(path: Path) -> dict[str, dict[str, list[str]]]:
    """Section → key → its values, in their order."""
    sections: dict[str, dict[str, list[str]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = sections.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            section.setdefault(key, []).append(value)
    return sections


def an_instance(name: str) -> str:
    return name.replace("@.", "@scanside-engine.service.")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root folder with systemd's own units, ours, and the commands that they run."""
    program("systemd-analyze")
    folder = tmp_path_factory.mktemp("root")
    shutil.copytree("/usr/lib/systemd/system", folder / "usr/lib/systemd/system", symlinks=True)
    install(folder, "")
    for name in SERVICES:
        service = read(UNITS / name)["Service"]
        for command in service.get("ExecStartPre", []) + service["ExecStart"]:
            file = folder / command.lstrip("-").split()[0].lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("#!/bin/sh\n")
            file.chmod(0o755)
    return folder


def analyze(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program("systemd-analyze"), f"--root={root}", *arguments], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("name", NAMES)
def test_systemd_finds_nothing_wrong(root: Path, name: str) -> None:
    done = analyze(root, "verify", "--recursive-errors=yes", an_instance(name))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "wrong", [("WatchdogSec=30", "WatchDogSec=30"), ("/opt/scanside/venv/bin/scanside", "/opt/scanside/no")]
)
def test_systemd_would_find_it(root: Path, tmp_path: Path, wrong: tuple[str, str]) -> None:
    """The gate itself: a key that does not exist, and a command that does not."""
    copy = tmp_path / "root"
    shutil.copytree(root, copy, symlinks=True)
    unit = copy / "etc/systemd/system/scanside-engine.service"
    before = unit.read_text()
    unit.write_text(before.replace(*wrong))
    assert unit.read_text() != before
    assert analyze(copy, "verify", "--recursive-errors=yes", unit.name).returncode != 0


def test_on_a_gpu_box_the_engine_sees_the_gpu_and_no_other_device(root: Path, tmp_path: Path) -> None:
    """The drop-in that the fleet's role writes; no engine has run with it."""
    copy, name = tmp_path / "root", "scanside-engine.service"
    shutil.copytree(root, copy, symlinks=True)
    drop_in = copy / f"etc/systemd/system/{name}.d/50-gpu.conf"
    drop_in.parent.mkdir()
    shutil.copy(ROOT / "ansible/roles/appliance/templates/gpu.conf.j2", drop_in)
    done = analyze(copy, "verify", "--recursive-errors=yes", name)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert drop_in.name > "10-hardening.conf"  # what is read last counts, whichever folder it lies in
    assert read(drop_in)["Service"] == {
        "PrivateDevices": ["no"], "DevicePolicy": ["closed"], "DeviceAllow": ["char-nvidia* rw"],
    }  # fmt: skip
    done = analyze(copy, "security", "--offline=yes", f"--threshold={EXPOSURE * 10 + 4:.0f}", name)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", SERVICES)
def test_little_is_exposed(root: Path, name: str) -> None:
    done = analyze(root, "security", "--offline=yes", f"--threshold={EXPOSURE * 10:.0f}", an_instance(name))
    assert done.returncode == 0, done.stdout
    assert re.search(r"Overall exposure level for \S+: \d+\.\d ", done.stdout)


def test_every_service_has_a_user_of_its_own() -> None:
    users = [read(UNITS / name)["Service"]["User"][0] for name in DAEMONS]
    assert len(set(users)) == len(DAEMONS)
    made = re.findall(r"^u (\S+)", (UNITS / "sysusers.conf").read_text(), re.MULTILINE)
    others = {read(UNITS / name)["Service"]["User"][0] for name in SERVICES} - set(users)
    assert others == {"scanside-check", "root"}
    assert {*users, "scanside-check"} == set(made)
    assert [name for name in SERVICES if read(UNITS / name)["Service"]["User"] == ["root"]] == [
        "scanside-again@.service"
    ]


def test_who_may_read_the_files_of_a_service(tmp_path: Path) -> None:
    """A user is in the group of its own name only where it is listed, because its unit gives it another one."""
    install(tmp_path, "")
    subprocess.run([program("systemd-sysusers"), f"--root={tmp_path}"], check=True, capture_output=True)
    groups = [line.split(":") for line in (tmp_path / "etc/group").read_text().splitlines()]
    members = {group[0].removeprefix("scanside-"): set(group[3].split(",")) for group in groups}
    assert members["intake"] == {"scanside-intake", "scanside-check"}
    assert members["delivery"] == {"scanside-delivery", "scanside-check"}
    assert members["worklist"] == {"scanside-worklist"}


def test_only_the_folders_of_scanside_are_named() -> None:
    system = r"/(bin|run|usr/lib/(sysusers|tmpfiles)\.d|etc/systemd/system|nonexistent|proc)\b|/dev/null"
    for path in FILES:
        for line in path.read_text(encoding="utf-8").splitlines():
            for named in re.findall(r"(?<![\w.])/[\w./-]+", re.sub(r"\d/\d+|:/\d+", "", line)):
                assert named.startswith(ROOT_FOLDERS) or re.match(system, named), (path.name, line)


def test_the_commands_exist() -> None:
    group = typer.main.get_command(app)
    for name in SERVICES:
        for command in read(UNITS / name)["Service"]["ExecStart"]:
            words = command.lstrip("-").split()
            if words[0] == "/opt/scanside/venv/bin/scanside":
                node = group
                for word in words[1 : 3 if words[1] == "audit" else 2]:
                    assert word in node.commands, (name, command)  # type: ignore[attr-defined]
                    node = node.commands[word]  # type: ignore[attr-defined]


def test_the_ports_are_those_of_the_settings() -> None:
    ports = {
        "scanside-intake": Settings().intake.port,
        "scanside-intake-tls": DEFAULT_PORT,
        "scanside-hl7": Hl7Intake().port,
        "scanside-hl7-tls": Hl7Tls.model_fields["port"].default,
    }
    for name, port in ports.items():
        assert read(UNITS / f"{name}.socket")["Socket"]["ListenStream"] == [str(port)]


def test_the_port_without_tls_can_be_closed() -> None:
    """Intake does not start beside a socket that it does not serve; one whose condition fails keeps nothing back."""
    assert read(UNITS / "scanside-intake.socket")["Unit"]["ConditionPathExists"] == ["!/etc/scanside/no-plain-intake"]


@pytest.mark.parametrize("name", DAEMONS)
def test_what_fails_is_started_again_and_told(name: str) -> None:
    unit, service = read(UNITS / name)["Unit"], read(UNITS / name)["Service"]
    assert service["Type"] == ["notify"]
    assert service["Restart"] == ["always"]
    assert int(service["WatchdogSec"][0]) > 0
    assert int(service["TimeoutStopSec"][0]) > STOP_SECONDS
    assert unit["OnFailure"] == ["scanside-alarm@%n.service scanside-again@%n.service"]
    if name in OPTIONAL:
        assert read(UNITS / name)["Install"]["WantedBy"] == ["scanside.target"]
    else:
        assert name in read(UNITS / "scanside.target")["Unit"]["Wants"][0]


@pytest.mark.parametrize("name", ["scanside-check.service", "scanside-audit.service", "scanside-selftest.service"])
def test_a_check_that_fails_is_told(name: str) -> None:
    assert read(UNITS / name)["Unit"]["OnFailure"] == ["scanside-alarm@%n.service"]
    timer = name.replace(".service", ".timer")
    assert timer in " ".join(read(UNITS / "scanside.target")["Unit"]["Wants"])
