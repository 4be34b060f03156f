"""A fleet in a lab: installed from a signed bundle without a network, updated in waves, and broken.

Each test looks at what came out at the other end: the messages that the listener kept, the objects that the PACS has.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.release.bundle import trusted_comment
from appliance.release.minisign import new_key, read_secret_key, sign
from tests.deploy.fleet import Site
from tests.deploy.lab import AS_CHECK, DICOM_PORT, SCANSIDE, Lab, lab
from tests.deploy.machine import ROOT
from tests.release_support import small_bundle, small_source

pytestmark = [pytest.mark.deploy, pytest.mark.xdist_group("lab"), pytest.mark.timeout(1800)]

CANARY, OTHER = "box1", "box2"
FIRST, SECOND, BAD, OLD = "1.0.0", "1.1.0", "1.2.0", "0.9.0"
MODEL = "ich_reference"


class Fleet:
    """The lab, its controller, and the studies that must have had one alert in the end."""

    def __init__(self, hospital: Lab) -> None:
        self.lab = hospital
        self.site = Site(hospital)
        self.alerted: list[str] = []

    def versions(self) -> dict[str, str]:
        """The release that each box runs."""
        return {box: self.lab.version(box) for box in self.lab.boxes}

    def one_alert(self, uid: str) -> None:
        """Wait for the alert on a study; the last test looks whether another followed."""
        self.lab.alerted(uid, 240)
        self.alerted.append(uid)

    def alerts(self, box: str, name: str) -> None:
        """Send a study with a bleed, and wait for its alert."""
        uid, files = self.lab.study("intraparenchymal", name)
        self.lab.send(box, files)
        self.one_alert(uid)

    def state(self, box: str) -> dict[str, Any]:
        """What a look must leave as it is: configuration, releases, what lies ready, and the services' processes."""
        root = self.lab.boxes[box].root
        looked_at = (
            "etc/**/*",
            "usr/lib/*.d/*",
            "opt/scanside/*",
            "opt/scanside/releases/*",
            "var/cache/scanside/**/*",
        )
        paths = [one for pattern in looked_at for one in root.glob(pattern)]
        found: dict[str, Any] = {
            str(one.relative_to(root)): (one.lstat().st_mtime_ns, one.lstat().st_mode) for one in paths
        }
        services = [f"scanside-{name}.service" for name in ("intake", "engine", "delivery", "triton")]
        found["processes"] = self.lab.boxes[box].run("systemctl", "show", "--property=MainPID", *services)
        return found

    def ended(self, box: str, *arguments: str) -> tuple[int, str]:
        """How a command of scanside ended on a box, and what it said."""
        command = self.lab.boxes[box].inside(*AS_CHECK, SCANSIDE, *arguments)
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    def installer(self, box: str, *arguments: str) -> tuple[int, dict[str, Any]]:
        """The box's own installer: how it ended, and what it said."""
        current = "/opt/scanside/current"
        done = subprocess.run(
            self.lab.boxes[box].inside(
                f"{current}/venv/bin/python", f"{current}/install/scanside_install.py", *arguments, "--json"
            ),
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        said: dict[str, Any] = json.loads(done.stdout)
        return done.returncode, said


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with lab(tmp_path_factory.mktemp("lab"), [CANARY, OTHER]) as hospital:
        one = Fleet(hospital)
        try:
            yield one
        finally:
            one.site.end()


@pytest.fixture(scope="module")
def first(fleet: Fleet) -> Path:
    """The bundle of the first release."""
    return fleet.site.release(FIRST)


@pytest.fixture(scope="module")
def second(fleet: Fleet) -> Path:
    """The bundle of the release after the first."""
    return fleet.site.release(SECOND)


@pytest.fixture(scope="module")
def bad(fleet: Fleet) -> Path:
    """The bundle of a release that starts, and whose alerts reach nobody: it calls where nobody listens."""
    tree = fleet.lab.folder / "bad"
    ignored = shutil.ignore_patterns("__pycache__", ".*")
    for name in ("appliance", "dicom_io", "triton_models", "systemd", "docs", "requirements"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    source = tree / "appliance/delivery/hl7.py"
    right, wrong = "socket.create_connection((self.host, self.port)", "socket.create_connection((self.host, 9)"
    text = source.read_text(encoding="utf-8")
    assert text.count(right) == 1
    source.write_text(text.replace(right, wrong), encoding="utf-8")
    return fleet.site.release(BAD, tree)


def recap(said: str) -> dict[str, dict[str, int]]:
    """What Ansible says at its end: host → changed, unreachable, failed and so on."""
    found = re.findall(r"^(\S+)\s+: (ok=.*)$", said, re.MULTILINE)
    return {host: {key: int(n) for key, n in re.findall(r"(\w+)=(\d+)", line)} for host, line in found}


def test_a_look_at_a_bare_machine_leaves_it_bare(fleet: Fleet, first: Path) -> None:
    before = {box: fleet.state(box) for box in fleet.lab.boxes}
    said = recap(fleet.site.play("install", "--check", "--diff", scanside_bundle=str(first)))
    assert all(said[box]["changed"] > 0 for box in fleet.lab.boxes)
    assert {box: fleet.state(box) for box in fleet.lab.boxes} == before


def test_a_bare_machine_becomes_a_box_that_alerts(fleet: Fleet, first: Path) -> None:
    fleet.site.play("install", scanside_bundle=str(first))
    assert fleet.versions() == {CANARY: FIRST, OTHER: FIRST}
    for box in fleet.lab.boxes:
        assert "triton" in fleet.lab.scanside(box, "check")
        # A restart of intake refuses nobody, by whichever port they come.
        for socket, port in (("intake", DICOM_PORT), ("intake-tls", 2762), ("hl7", 2577)):
            listens = fleet.lab.boxes[box].run(
                "systemctl", "show", "-p", "Listen,ActiveState", f"scanside-{socket}.socket"
            )
            assert f":{port} " in listens and "ActiveState=active" in listens, listens
        fleet.alerts(box, f"NEW{box.upper()}")
        uid = fleet.alerted[-1]
        fleet.lab.wait(lambda uid=uid: len(fleet.lab.archived(uid)) > 1, 60, "the findings in the PACS")  # type: ignore[misc]


def test_a_second_run_changes_nothing_and_a_drift_is_seen(fleet: Fleet, first: Path) -> None:
    said = recap(fleet.site.play("install", scanside_bundle=str(first), scanside_selftest=False))
    assert {box: said[box]["changed"] for box in fleet.lab.boxes} == {CANARY: 0, OTHER: 0}
    settings = fleet.lab.boxes[OTHER].root / "etc/scanside/scanside.toml"
    whole = settings.read_text(encoding="utf-8")
    settings.write_text(whole + "# by hand\n", encoding="utf-8")
    said = recap(fleet.site.play("install", "--check", "--diff", scanside_bundle=str(first)))
    assert said[CANARY]["changed"] == 0
    assert said[OTHER]["changed"] > 0
    assert settings.read_text(encoding="utf-8").endswith("# by hand\n"), "nothing may be changed by a look"
    report = fleet.site.folder / "fleet.json"
    fleet.site.play("inventory", scanside_report=str(report))
    told = {one["box"]: one for one in json.loads(report.read_text(encoding="utf-8"))}
    assert (told[CANARY]["drift"], told[OTHER]["drift"]) == ([], ["configuration"])
    assert {(one["release"], one["models"][0]["name"], one["models"][0]["runs"]) for one in told.values()} == {
        (FIRST, MODEL, True)
    }
    settings.write_text(whole, encoding="utf-8")


def test_a_reboot_and_a_power_cut_in_the_middle_of_a_study_end_with_one_alert_each(fleet: Fleet) -> None:
    """Their associations were broken off, so that only silence says that the studies are complete."""
    lab = fleet.lab
    rebooted, files = lab.study("intraparenchymal", "REBOOTED")
    cut, others = lab.study("intraparenchymal", "POWERCUT")
    with lab.scanning(CANARY, files), lab.scanning(OTHER, others):
        lab.boxes[OTHER].cut_power()
        lab.boxes[CANARY].reboot()
        lab.boxes[OTHER].start()
    fleet.one_alert(rebooted)
    fleet.one_alert(cut)


def test_a_cable_of_the_pacs_that_is_pulled_delays_what_it_gets_and_no_alert(fleet: Fleet) -> None:
    fleet.lab.pull("pacs")
    try:
        fleet.alerts(OTHER, "PULLED")
        fleet.lab.wait(lambda: fleet.lab.status(OTHER)["waiting"].get("pacs", 0) > 0, 60, "what waits for the PACS")
    finally:
        fleet.lab.plug("pacs")
    uid = fleet.alerted[-1]
    fleet.lab.wait(lambda: len(fleet.lab.archived(uid)) > 1, 120, "the findings in the PACS")
    fleet.lab.wait(lambda: not fleet.lab.status(OTHER)["waiting"], 120, "that nothing waits")


def test_a_disk_that_is_full_takes_nothing_and_loses_nothing(fleet: Fleet) -> None:
    uid, files = fleet.lab.study("intraparenchymal", "DISKFULL")
    machine = fleet.lab.boxes[OTHER]

    def turned_away() -> int:
        """Images that were refused, and associations that could not even be written down."""
        told = fleet.lab.figures(OTHER)
        counted = re.findall(r"^scanside_instances_refused_total\{.*0xA700.*\} (\d+)", told, re.MULTILINE)
        counted += re.findall(
            r'^scanside_associations_rejected_total\{.*"temporary congestion".*\} (\d+)', told, re.MULTILINE
        )
        return sum(map(int, counted))

    with fleet.lab.full(OTHER), fleet.lab.scan(OTHER, files) as scanner:
        try:
            fleet.lab.wait(lambda: turned_away() > 0, 120, "a scanner that is turned away")
            assert not fleet.lab.alerts(uid)
        finally:
            scanner.kill()
    fleet.lab.send(OTHER, files)
    fleet.one_alert(uid)
    assert machine.show("scanside-intake.service", "ActiveState") == "active"


@pytest.mark.parametrize("how", ["tampered", "stranger", "unsigned", "old"])
def test_a_bundle_that_may_not_be_installed_is_refused_by_the_box(
    fleet: Fleet, second: Path, tmp_path: Path, how: str
) -> None:
    offered = fleet.lab.boxes[CANARY].root / "var/cache/scanside/offered.tar"
    signature = offered.with_name(offered.name + ".minisig")
    if how == "old":
        small_source(tmp_path)
        made = small_bundle(tmp_path, tmp_path / "out", read_secret_key(fleet.site.key), OLD)
        shutil.copy(made.bundle, offered)
        shutil.copy(made.signature, signature)
    else:
        shutil.copy(second, offered)
        shutil.copy(second.with_name(second.name + ".minisig"), signature)
    if how == "tampered":
        with offered.open("r+b") as file:
            file.seek(offered.stat().st_size // 2)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1]))
    elif how == "stranger":
        signature.write_text(sign(offered, new_key(), trusted_comment(SECOND, "stable", "0.0")), encoding="utf-8")
    elif how == "unsigned":
        signature.unlink()
    code, said = fleet.installer(CANARY, "install", "/var/cache/scanside/offered.tar")
    assert (code, said["changed"]) == (1, False)
    why = {"tampered": "was changed", "stranger": "key", "unsigned": "no signature", "old": f"older than {FIRST}"}
    assert why[how] in said["error"]["what"]
    assert [one["version"] for one in fleet.installer(CANARY, "status")[1]["installed"]] == [FIRST]
    if how == "tampered":  # the controller does not even carry it there
        told = fleet.site.play("update", ok=False, scanside_bundle=str(offered))
        assert recap(told)[CANARY]["changed"] == 0
        assert "was changed" in told
    offered.unlink()
    signature.unlink(missing_ok=True)


def test_what_an_update_would_change_is_said_and_nothing_is_changed(fleet: Fleet, second: Path, tmp_path: Path) -> None:
    before = {box: fleet.state(box) for box in fleet.lab.boxes}
    said = fleet.site.play("update", "--check", scanside_bundle=str(second))
    for box in fleet.lab.boxes:
        assert f"{box} would go from {FIRST} to {SECOND}, which would be brought there" in said
        assert recap(said)[box]["changed"] == 1
    small_source(tmp_path)
    old = small_bundle(tmp_path, tmp_path / "out", read_secret_key(fleet.site.key), OLD).bundle
    said = fleet.site.play("update", "--check", ok=False, scanside_bundle=str(old))
    assert f"{CANARY} would refuse {OLD}" in said
    assert OTHER not in recap(said)
    said = fleet.site.play("inventory", "--check")
    for box in fleet.lab.boxes:
        assert f"{box}: release {FIRST}" in said
    assert {box: fleet.state(box) for box in fleet.lab.boxes} == before


def test_an_update_waits_for_a_study_stops_without_it_and_is_taken_up_again(fleet: Fleet, second: Path) -> None:
    # It is there already, so that the rollout comes to the waiting while the scanner still holds the study.
    folder = fleet.lab.boxes[CANARY].root / "var/cache/scanside"
    for name in (second.name, f"{second.name}.minisig"):
        shutil.copy(second.with_name(name), folder)
    assert fleet.installer(CANARY, "install", f"/var/cache/scanside/{second.name}")[0] == 0
    uid, files = fleet.lab.study("intraparenchymal", "INFLIGHT")
    options = {"scanside_bundle": str(second), "scanside_soak_seconds": 1}
    with fleet.lab.scanning(CANARY, files):
        said = fleet.site.play("update", ok=False, scanside_drain_seconds=6, scanside_selftest=False, **options)
        assert f"{CANARY}: Wait until no study is under way" in said
        assert fleet.versions() == {CANARY: FIRST, OTHER: FIRST}
    fleet.one_alert(uid)
    fleet.site.play("update", **options)
    assert fleet.versions() == {CANARY: SECOND, OTHER: SECOND}
    for box in fleet.lab.boxes:
        fleet.alerts(box, f"UPDATED{box.upper()}")


def test_a_box_whose_installer_dies_while_it_is_stopped_runs_again_by_itself(fleet: Fleet) -> None:
    machine = fleet.lab.boxes[OTHER]
    current = "/opt/scanside/current"
    command = machine.inside(
        f"{current}/venv/bin/python", f"{current}/install/scanside_install.py", "rollback", FIRST, "--json"
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        fleet.lab.wait(
            lambda: machine.show("scanside-engine.service", "ActiveState") == "inactive", 60, "a stopped box"
        )
        # The pattern does not fit itself.
        tell = "for p in /proc/[0-9]*; do grep -qa scanside_instal[l].py $p/cmdline && kill -{} ${{p#/proc/}}; done; :"
        machine.run("sh", "-c", tell.format("STOP"))
        fleet.lab.wait(
            lambda: machine.show("resume-scanside.timer", "LastTriggerUSec") not in ("", "n/a"), 60, "a look at it"
        )
        assert machine.show("scanside-engine.service", "ActiveState") == "inactive", "it lives, and takes its time"
        machine.run("sh", "-c", tell.format("KILL"))
        process.kill()  # nsenter, which stopped with it
        process.wait(30)
    assert fleet.installer(OTHER, "status")[1]["unfinished"]["command"] == "rollback"
    fleet.lab.wait(lambda: machine.show("scanside-engine.service", "ActiveState") == "active", 120, "a box that runs")
    uid, files = fleet.lab.study("intraparenchymal", "LEFTSTOPPED")
    fleet.lab.send(OTHER, files)
    fleet.one_alert(uid)
    assert "resume-scanside.service failed" in machine.journal("-t", "scanside-alarm")
    assert machine.show("resume-scanside.timer", "ActiveState") == "inactive"
    code, said = fleet.installer(OTHER, "rollback", FIRST)
    assert (code, said["version"]) == (0, FIRST)
    assert fleet.installer(OTHER, "activate", SECOND)[0] == 0
    assert machine.show("resume-scanside.timer", "ActiveState") == "inactive"
    fleet.lab.wait(lambda: fleet.versions() == {CANARY: SECOND, OTHER: SECOND}, 60, "both on the second release")


def test_a_release_that_reaches_nobody_is_stopped_at_the_canary_and_taken_back(fleet: Fleet, bad: Path) -> None:
    rollout = fleet.site.start("update", scanside_bundle=str(bad), scanside_soak_seconds=1)
    fleet.lab.wait(lambda: fleet.lab.version(CANARY) == BAD, 400, "the bad release on the canary")
    uid, files = fleet.lab.study("intraparenchymal", "UNDERBAD")
    fleet.lab.send(CANARY, files)
    assert rollout.wait(600) != 0
    said = fleet.site.said("update")
    assert fleet.versions() == {CANARY: SECOND, OTHER: SECOND}, said[-3000:]
    assert f"This wave went back to {SECOND}; later waves were not touched" in said
    assert "the positive head: no alert came out" in said
    assert not (fleet.lab.boxes[OTHER].root / f"opt/scanside/releases/{BAD}").exists()
    fleet.one_alert(uid)
    fleet.alerts(OTHER, "UNTOUCHED")


def test_a_canary_that_does_not_answer_stops_the_rollout(fleet: Fleet, bad: Path) -> None:
    fleet.lab.pull(CANARY)
    try:
        said = fleet.site.play("update", ok=False, scanside_bundle=str(bad))
    finally:
        fleet.lab.plug(CANARY)
    assert f"{CANARY} cannot be reached" in said
    assert OTHER not in recap(said)
    assert fleet.versions() == {CANARY: SECOND, OTHER: SECOND}


def test_all_boxes_go_back_in_one_command(fleet: Fleet) -> None:
    said = fleet.site.play("rollback", "--check")
    for box in fleet.lab.boxes:
        assert f"{box} would go from {SECOND} back to {FIRST}" in said
    assert fleet.versions() == {CANARY: SECOND, OTHER: SECOND}
    fleet.site.play("rollback")
    assert fleet.versions() == {CANARY: FIRST, OTHER: FIRST}
    for box in fleet.lab.boxes:
        fleet.alerts(box, f"BACK{box.upper()}")


def test_what_a_backup_has_is_there_again_after_a_restore(fleet: Fleet) -> None:
    backups = fleet.site.folder / "backups"
    known = fleet.alerted[-1]  # on OTHER
    fleet.site.play("backup", "--limit", OTHER, scanside_backups=str(backups))
    state = fleet.lab.boxes[OTHER].root / "var/lib/scanside"
    (state / "ledger.sqlite").write_bytes(b"a disk that went bad" * 1000)
    fleet.site.play("restore", "--limit", OTHER, scanside_backups=str(backups))
    assert known in fleet.lab.scanside(OTHER, "study", known)
    fleet.alerts(OTHER, "RESTORED")


def test_a_machine_that_replaces_a_box_goes_on_from_the_backup_of_another_name(fleet: Fleet, first: Path) -> None:
    backups = fleet.site.folder / "backups"
    known = fleet.alerted[-1]
    fleet.site.play("backup", "--limit", OTHER, scanside_backups=str(backups))
    (backups / f"{OTHER}.tar.gz").rename(backups / "gone.tar.gz")
    machine = fleet.lab.boxes[OTHER]
    machine.run("systemctl", "stop", "scanside*")
    # Tens of thousands of files: minutes, where the disk has other work.
    machine.run("rm", "-rf", "/opt/scanside", "/etc/scanside", "/var/cache/scanside", seconds=300)
    # The folder itself is the lab's disk.
    machine.run("sh", "-c", "find /var/lib/scanside -mindepth 1 -delete; rm -rf /etc/systemd/system/scanside*")
    machine.run("systemctl", "daemon-reload")
    fleet.site.play("install", "--limit", OTHER, scanside_bundle=str(first), scanside_selftest=False)
    assert "no such study" in fleet.ended(OTHER, "study", known)[1]
    fleet.site.play("restore", "--limit", OTHER, scanside_backups=str(backups), scanside_backup_of="gone")
    assert known in fleet.lab.scanside(OTHER, "study", known)
    fleet.alerts(OTHER, "REPLACED")


def test_a_recall_stops_the_model_on_every_box_in_one_command(fleet: Fleet) -> None:
    version = fleet.lab.status(CANARY)["models"][0]["version"]
    words = {"scanside_package": MODEL, "scanside_recall": version, "scanside_who": "Dr A", "scanside_why": "notice 7"}
    said = fleet.site.play("recall", ok=False, **{**words, "scanside_package": "ich_referense"})
    assert "no box that answered has a package ich_referense" in said
    said = fleet.site.play("recall", "--check", **words)
    for box in fleet.lab.boxes:
        assert f"{box}: would be suspended" in said
        assert fleet.lab.status(box)["models"][0]["runs"]
    said = fleet.site.play("recall", **words)
    assert f"{MODEL} {version} runs on no box" in said
    for box in fleet.lab.boxes:
        uid, files = fleet.lab.study("intraparenchymal", f"RECALL{box.upper()}")
        fleet.lab.send(box, files)
        fleet.lab.wait(
            lambda box=box, uid=uid: "refused" in fleet.lab.scanside(box, "study", uid, check=False),  # type: ignore[misc]
            120, "the refusal",
        )  # fmt: skip
        assert "notice 7" in fleet.lab.scanside(box, "study", uid)
        assert not fleet.lab.alerts(uid)
    for command in ("check", "selftest"):
        code, told = fleet.ended(CANARY, command, "--json")
        assert code == 1, told
        assert "notice 7" in told
    fleet.lab.pull(OTHER)
    try:
        said = fleet.site.play("recall", ok=False, **words)
    finally:
        fleet.lab.plug(OTHER)
    assert f"NOT recalled on {OTHER}:" in said
    # Whatever release the box goes to, its model stays recalled; who comes back to the one before finds it so, too.
    for way in (("activate", SECOND), ("rollback", FIRST)):
        assert fleet.installer(CANARY, *way)[0] == 0
        assert fleet.versions()[CANARY] == way[1]
        assert not fleet.lab.status(CANARY)["models"][0]["runs"]


def test_in_the_end_each_study_had_one_alert(fleet: Fleet) -> None:
    assert fleet.alerted
    assert {uid: len(fleet.lab.alerts(uid)) for uid in fleet.alerted} == dict.fromkeys(fleet.alerted, 1)
