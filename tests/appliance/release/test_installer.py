"""The installer on a root folder: what it refuses, updates, ways back, and a kill at any moment.

Nothing is started in a folder; with systemd it is tried in tests/deploy.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from appliance.ledger import migration
from appliance.ledger.store import Ledger, NewInstance
from appliance.release import installer
from appliance.release.box import clean_environment
from appliance.release.errors import ReleaseError
from appliance.release.minisign import SUFFIX, SecretKey
from tests.builders import head_series
from tests.peers import program
from tests.release_support import ROOT, a_wheel, small_bundle, small_source

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("release"), pytest.mark.timeout(600)]
KEY, SECOND = SecretKey(b"release1", bytes(range(32))), SecretKey(b"release2", bytes(32))
OLD, NEW = "1.0.0", "1.1.0"
KILLS = int(os.environ.get("SCANSIDE_KILLS", "3"))
"""At how many moments of each command it is killed; 0: at every one."""

# Kills itself at the n-th change that it makes: files, folders, links, and programs that it starts.
_KILLED = """
import os, signal, sys
at, count = int(sys.argv[1]), 0
def look(event, _):
    global count
    if event in ("os.rename", "os.remove", "os.symlink", "os.mkdir", "os.rmdir", "shutil.copyfile", "subprocess.Popen",
                 "sqlite3.connect", "shutil.rmtree"):
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
from appliance.release.installer import main
sys.addaudithook(look)
code = main(sys.argv[2:])
print(count, file=sys.stderr)
sys.exit(code)
"""


@dataclass(frozen=True)
class Releases:
    """What was built once."""

    folder: Path
    bundles: dict[str, Path]
    public: Path
    root: Path  # with both versions installed, none active


class Box:
    """A root folder, and the installer that works on it."""

    def __init__(self, root: Path, releases: Releases) -> None:
        self.root = root
        self.releases = releases
        self.home = root / "opt/scanside"
        self.ledger = root / "var/lib/scanside/ledger.sqlite"
        config = root / "etc/scanside"
        config.mkdir(parents=True, exist_ok=True)
        (config / "scanside.toml").write_text(f'[box]\nstate_directory = "{self.ledger.parent}"\n')

    def run(self, *words: object, kill_at: int = 0) -> subprocess.CompletedProcess[str]:
        """The installer."""
        return subprocess.run(
            [sys.executable, "-c", _KILLED, str(kill_at), "--root", str(self.root), *map(str, words), "--json"],
            cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def does(self, *words: object) -> dict[str, Any]:
        """What it answers when it succeeds."""
        done = self.run(*words)
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def refuses(self, *words: object) -> dict[str, str]:
        """What it says when it does not."""
        done = self.run(*words)
        assert done.returncode == 1, done.stdout
        said: dict[str, str] = json.loads(done.stdout)["error"]
        assert all(said.values())
        assert f"{said['what']} ({said['where']}): {said['remedy']}" in done.stderr
        return said

    def install(self, version: str) -> tuple[object, ...]:
        return "install", self.releases.bundles[version], "--key", self.releases.public

    def boots(self) -> str:
        """What a start of the services comes to: the release that is current opens the ledger; its version."""
        command = [str(self.home / "venv/bin/scanside"), "--config", str(self.root / "etc/scanside/scanside.toml")]
        # As on a box: nothing but the release itself says where its code is.
        options: dict[str, Any] = {"capture_output": True, "text": True, "env": clean_environment(), "cwd": self.root}
        done = subprocess.run([*command, "ledger", "upgrade"], timeout=120, **options)
        assert done.returncode == 0, done.stderr
        return str(subprocess.run([command[0], "--version"], **options).stdout.split()[-1])

    def receives(self, name: str) -> None:
        """An image comes: a row in the ledger, in whatever schema that is."""
        with closing(sqlite3.connect(self.ledger)) as connection:
            connection.execute(
                "INSERT INTO association (calling_ae, called_ae, address, opened_at) VALUES (?, 'B', '1.2.3.4', '')",
                (name,),
            )
            connection.commit()

    def received(self) -> set[str]:
        """The names of what came."""
        with closing(sqlite3.connect(self.ledger)) as connection:
            return {row[0] for row in connection.execute("SELECT calling_ae FROM association")}


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Releases:
    program("systemd-sysusers")
    folder = tmp_path_factory.mktemp("releases")
    small_source(folder)
    bundles = {NEW: small_bundle(folder, folder / "out", KEY, NEW, minimum="1.0.0").bundle}
    newest = sorted((folder / "source/appliance/ledger/migrations/versions").glob("0*.py"))[-1]
    newest.unlink()  # the older release knows one schema less
    bundles[OLD] = small_bundle(folder, folder / "out", KEY, OLD).bundle
    public = folder / "release.pub"
    public.write_text(KEY.public.encode())
    (folder / "second.pub").write_text(SECOND.public.encode())
    found = Releases(folder, bundles, public, folder / "root")
    box = Box(found.root, found)
    for version in (OLD, NEW):
        assert box.does(*box.install(version))["changed"] is True
    return found


@pytest.fixture
def box(releases: Releases, tmp_path: Path) -> Box:
    """A box with both versions installed and none active."""
    shutil.copytree(releases.root, tmp_path / "root", symlinks=True)
    return Box(tmp_path / "root", releases)


@pytest.fixture
def running(box: Box) -> Box:
    """A box that runs the older version and has a ledger."""
    box.does("activate", OLD)
    box.boots()
    box.receives("BEFORE")
    return box


def test_installing_changes_nothing_that_runs_and_once_is_enough(box: Box) -> None:
    status = box.does("status")
    assert (status["current"], status["floor"], status["unfinished"]) == (None, None, None)
    assert [one["version"] for one in status["installed"]] == [NEW, OLD]
    assert box.does(*box.install(OLD))["changed"] is False
    assert not (box.home / "current").exists()
    assert not [one for one in (box.home / "releases").iterdir() if one.name.startswith(".")]
    release = box.home / "releases" / NEW
    assert {"venv", "venv-triton", "models", "systemd", "install", "docs"} <= {one.name for one in release.iterdir()}
    assert not (release / "wheels").exists()
    said = subprocess.run([release / "venv/bin/scanside", "--version"], capture_output=True, text=True).stdout
    assert said.split()[-1] == NEW


def test_a_box_with_a_gpu_gets_what_its_bundle_has_for_it(releases: Releases, tmp_path: Path) -> None:
    trt = a_wheel(tmp_path, "tensorrt", "10.0", {"tensorrt.py": "__version__ = '10.0'\n"})
    made = small_bundle(releases.folder, tmp_path / "out", KEY, "1.2.0", gpu=True, gpu_wheels=[trt])
    box = Box(tmp_path / "root", releases)
    assert box.does("verify", made.bundle, "--key", releases.public)["gpu"] is True
    box.does("install", made.bundle, "--key", releases.public)
    release = box.home / "releases/1.2.0"
    assert json.loads((release / "release.json").read_text())["gpu"] is True
    assert not (release / "wheels-gpu").exists()
    code = "import for_a_gpu, tensorrt; print(tensorrt.__version__)"
    python = {one: [release / one / "bin/python", "-c", code] for one in ("venv", "venv-triton")}
    assert subprocess.run(python["venv"], capture_output=True, text=True, cwd="/").stdout == "10.0\n"
    assert subprocess.run(python["venv-triton"], capture_output=True, cwd="/").returncode != 0


def test_an_update_and_the_way_back(running: Box) -> None:
    box = running
    before = migration.revision(box.ledger)
    answer = box.does("activate", NEW)
    assert (answer["changed"], answer["previous"], answer["current"]) == (True, OLD, NEW)
    assert migration.revision(box.ledger) == migration.head() != before
    with closing(sqlite3.connect(answer["backup"])) as backup:
        assert backup.execute("SELECT version_num FROM alembic_version").fetchone() == (before,)
        assert ("BEFORE",) in backup.execute("SELECT calling_ae FROM association").fetchall()
    assert Path(answer["backup"]).parent.stat().st_mode & 0o777 == 0o700
    assert box.boots() == NEW
    box.receives("AFTER")
    assert box.does("activate", NEW)["changed"] is False
    back = box.does("rollback", OLD)
    assert (back["changed"], back["version"], back["from"]) == (True, OLD, NEW)
    assert migration.revision(box.ledger) == before
    assert box.received() == {"BEFORE", "AFTER"}
    assert box.boots() == OLD
    assert box.does("rollback", OLD)["changed"] is False
    status = box.does("status")
    assert (status["current"], status["previous"], status["floor"]) == (OLD, None, NEW)
    assert "no release to go back to" in box.refuses("rollback")["what"]
    assert box.does("activate", NEW)["changed"] is True  # it is still there, and may run again
    assert box.does("rollback")["version"] == OLD


def test_what_was_received_after_the_update_keeps_its_files(running: Box) -> None:
    box = running
    box.does("activate", NEW)
    ledger = Ledger(box.ledger)
    association = ledger.open_association("SCANNER", "SCANSIDE", "10.0.0.1")
    ledger.record_instances([NewInstance(head_series(1)[0], "d" * 64, 10, association)])
    ledger.close()
    box.does("rollback")
    with closing(sqlite3.connect(box.ledger)) as connection:
        assert connection.execute("SELECT digest FROM instance").fetchall() == [("d" * 64,)]


def test_units_come_and_go_with_their_release_and_a_sites_own_stay(running: Box) -> None:
    box = running
    units = box.root / "etc/systemd/system"
    ours = {one.name for one in (ROOT / "systemd").glob("scanside*") if one.is_file()}
    assert {one.name for one in units.glob("scanside*") if one.is_file()} == ours
    assert (units / "scanside-.service.d/10-hardening.conf").exists()
    own = units / "scanside-intake.service.d/override.conf"
    own.parent.mkdir()
    own.write_text("[Service]\nNice=1\n")
    beside = units / "scanside-.service.d/20-site.conf"
    beside.write_text("[Service]\nNice=1\n")
    (box.home / f"releases/{NEW}/systemd/scanside-audit.timer").unlink()
    (box.home / f"releases/{NEW}/systemd/scanside-new.timer").write_text("[Timer]\nOnCalendar=daily\n")
    box.does("activate", NEW)
    assert {one.name for one in units.glob("scanside*") if one.is_file()} == (
        ours - {"scanside-audit.timer"} | {"scanside-new.timer"}
    )
    box.does("rollback")
    assert {one.name for one in units.glob("scanside*") if one.is_file()} == ours
    assert own.exists() and beside.exists()
    assert (box.root / "usr/lib/tmpfiles.d/scanside.conf").exists()


def test_a_release_whose_schema_cannot_be_made_leaves_the_old_one_running(running: Box) -> None:
    box = running
    (package,) = (box.home / f"releases/{NEW}/venv").glob(
        "lib/python*/site-packages/appliance/ledger/migrations/versions"
    )
    last = sorted(package.glob("0*.py"))[-1]
    last.write_text(
        last.read_text().replace("def upgrade() -> None:", "def upgrade() -> None:\n    raise OSError('no')\n")
    )
    before = migration.revision(box.ledger)
    said = box.refuses("activate", NEW)
    assert "scanside ledger upgrade" in said["where"]
    status = box.does("status")
    assert (status["current"], status["unfinished"], status["floor"]) == (OLD, None, OLD)
    assert migration.revision(box.ledger) == before
    assert box.boots() == OLD


@pytest.mark.parametrize("command", ["activate", "rollback"])
def test_a_release_that_cannot_read_the_settings_stops_nothing(running: Box, command: str) -> None:
    box = running
    if command == "rollback":
        box.does("activate", NEW)
    runs, to = (OLD, NEW) if command == "activate" else (NEW, OLD)
    settings = box.root / "etc/scanside/scanside.toml"
    before = settings.read_text()
    settings.write_text(before + "new_key = 1\n")
    schema, copies = migration.revision(box.ledger), sorted((box.root / "var/lib/scanside/backups").glob("*"))
    said = box.refuses(command, to)
    assert "new_key" in said["what"] and said["where"] == to and str(settings) in said["remedy"]
    (kept := settings.with_name(f"scanside-{to}.toml")).write_text(before)
    assert str(kept) in box.refuses(command, to)["remedy"]
    status = box.does("status")
    assert (status["current"], status["unfinished"]) == (runs, None)
    assert migration.revision(box.ledger) == schema
    assert sorted((box.root / "var/lib/scanside/backups").glob("*")) == copies, "it was not even stopped"
    shutil.copy(kept, settings)
    assert box.does(command, to)["current"] == to


def test_a_ledger_that_is_damaged_is_not_updated(running: Box) -> None:
    box = running
    box.ledger.write_bytes(box.ledger.read_bytes()[:5000] + b"\xff" * 3000)
    said = box.refuses("activate", NEW)
    assert said["where"] == str(box.ledger)
    assert box.does("status")["current"] == OLD


@pytest.mark.parametrize("command", ["activate", "rollback"])
@pytest.mark.parametrize("fails", ["ledger copy", "disk"])
def test_a_box_that_was_stopped_in_vain_runs_again(
    running: Box, monkeypatch: pytest.MonkeyPatch, command: str, fails: str
) -> None:
    """Nothing is started in a folder, so that the calls are looked at; the rest is real."""
    runs = OLD
    if command == "rollback":
        running.does("activate", NEW)
        runs = NEW
    schema = migration.revision(running.ledger)
    did: list[str] = []
    monkeypatch.setattr(installer.Box, "stop", lambda _: did.append("stop"))
    monkeypatch.setattr(installer.Box, "start", lambda _: did.append("start") or {})
    if fails == "disk":  # once: what puts things back finds room again
        place = installer.Box.place_units

        def full(box: installer.Box, version: str) -> None:
            monkeypatch.setattr(installer.Box, "place_units", place)
            raise OSError(28, "No space left on device", "/etc/systemd/system")

        monkeypatch.setattr(installer.Box, "place_units", full)
    else:
        monkeypatch.setattr("sqlite3.connect", broken_connection)
    box = installer.Box(running.root)
    with pytest.raises((ReleaseError, OSError)):
        if command == "activate":
            installer.activate(box, NEW, 3, lambda _: None)
        else:
            installer.rollback(box, None, 3, lambda _: None)
    monkeypatch.undo()
    assert did[0] == "stop"
    assert did[-1] == "start"
    assert not list((running.ledger.parent / "backups").glob(".*"))
    if fails == "disk" and command == "rollback":  # the way back is begun: the same command ends it
        assert running.does("rollback")["version"] == OLD
        assert running.boots() == OLD
        return
    status = running.does("status")
    assert (status["current"], status["unfinished"]) == (runs, None)
    assert migration.revision(running.ledger) == schema
    assert running.boots() == runs
    assert "BEFORE" in running.received()


def test_a_box_that_could_not_be_started_is_still_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With systemd it is tried in tests/deploy; here it refuses, and the calls are looked at."""
    told: list[tuple[str, ...]] = []

    def call(*command: str, check: bool = True) -> None:
        told.append(command)
        if command[:2] == ("systemctl", "start"):
            raise ReleaseError("job rejected", "systemctl", "see its own words")

    monkeypatch.setattr("appliance.release.box._run", call)
    monkeypatch.setattr("appliance.release.box._property", lambda *_: "inactive")
    monkeypatch.setattr("appliance.release.box.HOLD", tmp_path / "hold")
    monkeypatch.setattr("appliance.release.box._RESUME_SCRIPT", tmp_path / "resume.sh")
    monkeypatch.setattr(installer.Box, "live", property(lambda _: True))
    box = installer.Box(tmp_path)
    box.stop()
    with pytest.raises(ReleaseError):
        box.start()
    assert [one[0] for one in told[:1]] == ["systemd-run"], "it is watched before anything is stopped"
    assert ("systemctl", "stop", "resume-scanside.timer") not in told


def test_the_lock_is_held_as_long_as_the_ledger_is_being_changed(tmp_path: Path) -> None:
    """Whoever looks whether a killed installer lives must not start services beside a migration of its."""
    program = tmp_path / "opt/scanside/releases/1.0/venv/bin/scanside"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\nread _\necho '{}'\n")
    program.chmod(0o755)
    code = (
        "import sys; from pathlib import Path; from appliance.release.box import Box\n"
        "box = Box(Path(sys.argv[1]))\n"
        "with box.alone(): print('held', flush=True); box.scanside('1.0', 'ledger', 'downgrade')"
    )
    lock = ["flock", "--nonblock", str(tmp_path / "opt/scanside/.install.lock"), "true"]
    reads, writes = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdin=reads, stdout=subprocess.PIPE, text=True
    ) as process:
        os.close(reads)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not children.read_text():
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert subprocess.run(lock).returncode == 1
    os.close(writes)  # its program ends
    deadline = time.monotonic() + 30
    while subprocess.run(lock).returncode != 0:
        assert time.monotonic() < deadline, "the lock is never free again"
        time.sleep(0.05)


def broken_connection(*_: object, **__: object) -> sqlite3.Connection:
    raise sqlite3.OperationalError("disk I/O error")


def test_refusals_name_the_file_and_what_to_do(running: Box, tmp_path: Path) -> None:
    box = running
    bundle = tmp_path / "b.tar"
    shutil.copy(box.releases.bundles[NEW], bundle)
    shutil.rmtree(box.home / "releases" / NEW)
    key = ("--key", box.releases.public)

    unsigned = box.refuses("install", bundle, *key)
    assert "no signature" in unsigned["what"] and unsigned["where"] == f"{bundle}{SUFFIX}"
    shutil.copy(f"{box.releases.bundles[NEW]}{SUFFIX}", f"{bundle}{SUFFIX}")
    wrong = box.refuses("install", bundle, "--key", box.releases.folder / "second.pub")
    assert "not trusted" in wrong["what"] and wrong["where"] == f"{bundle}{SUFFIX}"
    content = bytearray(bundle.read_bytes())
    content[len(content) // 2] ^= 1
    bundle.write_bytes(content)
    changed = box.refuses("install", bundle, *key)
    assert "is not what key" in changed["what"] and changed["where"] == str(bundle)
    content[len(content) // 2] ^= 1
    bundle.write_bytes(content)
    assert "trusts no release key" in box.refuses("install", bundle)["what"]
    keys = box.root / "etc/scanside/release-keys"
    keys.mkdir()
    for name in ("release", "second"):
        shutil.copy(box.releases.folder / f"{name}.pub", keys)
    assert [one["version"] for one in box.does("status")["installed"]] == [OLD]
    assert box.does("install", bundle)["changed"] is True


def test_the_floor(running: Box) -> None:
    box = running
    box.does("activate", NEW)
    box.does("rollback")
    assert box.does("status")["floor"] == NEW
    # What is installed may run; an older bundle does not come in any more, though a key that is trusted signed it.
    assert box.does(*box.install(OLD))["changed"] is False
    shutil.rmtree(box.home / "releases" / OLD)
    said = box.refuses(*box.install(OLD))
    assert f"older than {NEW}" in said["what"] and said["where"] == str(box.releases.bundles[OLD])
    (box.home / "install.json").write_text("{")
    assert "damaged" in box.refuses(*box.install(OLD))["what"]


def test_below_the_minimum_and_the_same_version_twice(running: Box, tmp_path: Path) -> None:
    box = running
    further = small_bundle(box.releases.folder, tmp_path, KEY, "2.0.0", minimum="1.5").bundle
    said = box.refuses("install", further, "--key", box.releases.public)
    assert f"from 1.5 on, this one runs {OLD}" in said["what"]
    other = small_bundle(box.releases.folder, tmp_path, KEY, NEW, channel="other").bundle
    assert "another bundle" in box.refuses("install", other, "--key", box.releases.public)["what"]
    assert "not installed" in box.refuses("activate", "7.0")["what"]
    box.does("activate", NEW)
    assert "rollback 1.0.0" in box.refuses("activate", OLD)["remedy"]


def test_what_was_put_there_by_hand_is_not_overwritten(box: Box) -> None:
    (box.home / "venv").mkdir()
    said = box.refuses("activate", OLD)
    assert said["where"] == str(box.home / "venv")
    assert box.does("status")["current"] is None


def test_one_at_a_time(running: Box) -> None:
    import fcntl

    with (running.home / ".install.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another installer" in running.refuses("activate", NEW)["what"]


def moments(box: Box, *words: object) -> list[int]:
    """At which of the changes that a command makes it is to be killed; it is carried out once to count them."""
    done = box.run(*words)
    assert done.returncode == 0, done.stderr
    count = int(done.stderr.split()[-1])
    assert count > 10
    if not KILLS:
        return list(range(1, count + 1))
    return sorted({1 + (count - 1) * place // KILLS for place in range(1, KILLS + 1)})


def copied(box: Box, folder: Path) -> Box:
    """Another box like it."""
    shutil.copytree(box.root, folder, symlinks=True)
    return Box(folder, box.releases)


@pytest.mark.parametrize("command", ["activate", "rollback"])
def test_killed_at_any_moment_the_box_starts_and_the_same_command_ends_it(
    running: Box, tmp_path: Path, command: str
) -> None:
    origin, to = (OLD, NEW) if command == "activate" else (NEW, OLD)
    if command == "rollback":
        running.does("activate", NEW)
        running.receives("AFTER")
    came = running.received()
    for at in moments(copied(running, tmp_path / "counted"), command, to):
        box = copied(running, tmp_path / f"killed-{at}")
        assert box.run(command, to, kill_at=at).returncode == -signal.SIGKILL
        assert box.boots() in (origin, to), at
        assert box.received() == came, at
        box.does(command, to)
        status = box.does("status")
        assert (status["current"], status["unfinished"], status["floor"]) == (to, None, NEW), at
        assert box.boots() == to, at
        assert box.received() == came, at
        units = box.root / "etc/systemd/system"
        assert not list(units.rglob("*.part")), at
        shutil.rmtree(box.root)


def test_killed_while_it_installs_it_leaves_no_half_release(releases: Releases, tmp_path: Path) -> None:
    box = Box(tmp_path / "counted", releases)
    for at in moments(box, *box.install(OLD)):
        box = Box(tmp_path / f"killed-{at}", releases)
        assert box.run(*box.install(OLD), kill_at=at).returncode == -signal.SIGKILL
        there = [one["version"] for one in box.does("status")["installed"]]
        assert there in ([], [OLD]), at
        assert box.does(*box.install(OLD))["changed"] is (not there), at
        box.does("activate", OLD)
        assert box.boots() == OLD
        assert {one.name for one in (box.home / "releases").iterdir()} == {OLD}, at
        shutil.rmtree(box.root)


def test_only_the_newest_releases_are_kept(running: Box) -> None:
    box = running
    about = json.loads((box.home / f"releases/{NEW}/release.json").read_text())
    for version in ("1.0.1", "1.0.2", "1.0.3"):
        shutil.copytree(box.home / f"releases/{NEW}", box.home / f"releases/{version}", symlinks=True)
        (box.home / f"releases/{version}/release.json").write_text(json.dumps(about | {"version": version}))
    assert sorted(box.does("activate", NEW, "--keep", "2")["removed"]) == ["1.0.1", "1.0.2"]
    assert [one["version"] for one in box.does("status")["installed"]] == [NEW, "1.0.3", OLD]  # OLD: the way back


def test_a_box_without_the_library_takes_it_from_the_wheels_beside(tmp_path: Path) -> None:
    """Debian's own Python in isolation, with this environment's library packed as wheels would be."""
    import zipfile

    import cffi
    import cryptography

    folder = tmp_path / "install"
    (folder / "scanside_release").mkdir(parents=True)
    shutil.copy(ROOT / "appliance/release/scanside_install.py", folder)
    for name in ("__init__", "errors", "minisign", "bundle", "box", "installer"):
        shutil.copy(ROOT / f"appliance/release/{name}.py", folder / "scanside_release")
    command = [
        sys.executable,
        "-I",
        "-S",
        str(folder / "scanside_install.py"),
        "--root",
        str(tmp_path),
        "status",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "cryptography" in done.stderr and "copy the whole folder" in done.stderr
    (folder / "wheels").mkdir()
    site = Path(cryptography.__file__).parents[1]
    packed = [*Path(cryptography.__file__).parent.rglob("*"), *Path(cffi.__file__).parent.rglob("*")]
    with zipfile.ZipFile(folder / "wheels/all.whl", "w") as archive:
        for path in (*packed, *site.glob("_cffi_backend*")):
            if path.is_file():
                archive.write(path, path.relative_to(site))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["installed"] == []
