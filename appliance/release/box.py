"""The folders, the notebook and the services of one box, for the installer.

Everything can lie below another root folder, as for an image; then nothing is started or stopped.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .bundle import version_key
from .errors import ReleaseError
from .minisign import PublicKey, read_public_key

RELEASE = "release.json"
"""What an unpacked release says of itself; it is written last, so that a folder with it is whole."""
SERVICES = ("scanside-intake", "scanside-triton", "scanside-delivery", "scanside-engine")
HOLD = Path("/run/scanside.hold")
"""While it is there, and young, intake does not start; see scanside-intake.service."""
RESUME = "resume-scanside"
"""The timer that starts a stopped box where the installer died. Its name must not begin with scanside-: the drop-in of
that name keeps units from telling systemd anything."""
_RESUME_SECONDS, _RESUME_SCRIPT = 30, Path("/run/resume-scanside.sh")
_STOPPED = (".service", ".timer")
_LINKS = ("venv", "venv-triton", "docs")
_UNIT_FOLDER, _OWN_DROP_INS = "etc/systemd/system", "scanside-.service.d"
_USER, _GROUP = "scanside-check", "scanside"


@dataclass(frozen=True, slots=True)
class Unfinished:
    """An activation or rollback that was begun and has not ended.

    Attributes:
        origin: the version that ran before; None: there was none.
        step: the last step that was done.
    """

    command: str
    origin: str | None
    to: str
    step: str = "begun"


@dataclass(frozen=True, slots=True)
class Notebook:
    """What the box remembers of its releases.

    Attributes:
        floor: no bundle with a lower version is installed; the highest version that ever ran here.
        previous: what `rollback` without a version goes back to.
    """

    floor: str | None = None
    previous: str | None = None
    unfinished: Unfinished | None = None


@dataclass(frozen=True, slots=True)
class Box:
    """A box, or an image of one.

    Args:
        root: the folder that is, or will be, the machine's root.
    """

    root: Path

    @property
    def live(self) -> bool:
        """Whether this is the running machine."""
        return self.root == Path("/")

    @property
    def home(self) -> Path:
        """Where releases live."""
        return self.root / "opt/scanside"

    @property
    def state(self) -> Path:
        """The services' own folder; what the units name."""
        return self.root / "var/lib/scanside"

    @property
    def config(self) -> Path:
        """The settings' file."""
        return self.root / "etc/scanside/scanside.toml"

    def release(self, version: str) -> Path:
        """The folder of a release."""
        return self.home / "releases" / version

    def keys(self) -> list[PublicKey]:
        """The keys that this box trusts.

        Raises:
            ReleaseError: there is none, or one cannot be read.
        """
        folder = self.root / "etc/scanside/release-keys"
        found = [read_public_key(one) for one in sorted(folder.glob("*.pub"))]
        if not found:
            raise ReleaseError("this box trusts no release key yet", str(folder), "put the .pub file there, or --key")
        return found

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let one installer work at a time.

        Raises:
            ReleaseError: another one works.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        with self._lock.open("w") as lock:
            os.set_inheritable(lock.fileno(), True)  # what changes the ledger holds it too; see `scanside`
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ReleaseError("another installer is at work", str(self.home), "wait until it has ended") from None
            yield

    @property
    def _lock(self) -> Path:
        return self.home / ".install.lock"

    # --- what is there ----------------------------------------------------------------------------------

    def current(self) -> str | None:
        """The version that runs, or will at the next start."""
        link = self.home / "current"
        return link.readlink().name if link.is_symlink() else None

    def installed(self) -> list[dict[str, Any]]:
        """What each release that is there says of itself, the newest first."""
        found = []
        for path in (self.home / "releases").glob(f"*/{RELEASE}"):
            try:
                found.append(json.loads(path.read_text(encoding="utf-8")))
            except ValueError as error:
                raise ReleaseError(f"it is damaged: {error}", str(path), "remove its folder, install again") from error
        return sorted(found, key=lambda one: version_key(one["version"]), reverse=True)

    def about(self, version: str) -> dict[str, Any]:
        """What a release says of itself.

        Raises:
            ReleaseError: it is not installed.
        """
        for one in self.installed():
            if one["version"] == version:
                return one
        there = ", ".join(one["version"] for one in self.installed()) or "none"
        raise ReleaseError(f"this version is not installed ({there} is)", version, "install its bundle first")

    def notes(self) -> Notebook:
        """What the box remembers.

        Raises:
            ReleaseError: the notebook is damaged; without the floor nothing is installed.
        """
        path = self.home / "install.json"
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            begun = said["unfinished"]
            return Notebook(said["floor"], said["previous"], Unfinished(**begun) if begun else None)
        except FileNotFoundError:
            return Notebook()
        except (ValueError, KeyError, TypeError) as error:
            raise ReleaseError(
                f"it is damaged: {error}", str(path), "restore it; its floor is the highest version that ran here"
            ) from error

    def note(self, **changes: Any) -> None:
        """Change what the box remembers, durably."""
        self._durably(self.home / "install.json", json.dumps(asdict(replace(self.notes(), **changes)), indent=2) + "\n")

    def _durably(self, path: Path, text: str) -> None:
        part = path.with_name(f".{path.name}.part")
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)

    # --- changing it ------------------------------------------------------------------------------------

    def flip(self, version: str) -> None:
        """Let `current` be that release: one rename, so that there is no moment without one."""
        part = self.home / ".current.part"
        part.unlink(missing_ok=True)
        part.symlink_to(Path("releases") / version)
        part.replace(self.home / "current")
        for name in _LINKS:
            link = self.home / name
            if not link.is_symlink():
                link.symlink_to(Path("current") / name)
        sync_folder(self.home)

    def require_links(self) -> None:
        """Refuse where something else lies at the places of the links.

        Raises:
            ReleaseError: naming it.
        """
        for name in ("current", *_LINKS):
            link = self.home / name
            if link.exists() and not link.is_symlink():
                raise ReleaseError(
                    "something that was put there by hand is in the way", str(link), "stop scanside and move it away"
                )

    def place_units(self, version: str) -> None:
        """Put a release's units where systemd looks, take away those that it no longer has, and make users and folders.

        A site's own drop-ins stay.
        """
        source, target = self.release(version) / "systemd", self.root / _UNIT_FOLDER
        ours = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
        units = {one for one in ours if one.parts[0].startswith("scanside")}
        target.mkdir(parents=True, exist_ok=True)
        there = {one.relative_to(target) for one in target.glob("scanside*") if one.is_file()}
        there |= {one.relative_to(target) for one in (target / _OWN_DROP_INS).glob("10-hardening.conf")}
        for one in units:
            self._put(source / one, target / one)
        for one in there - units:
            (target / one).unlink()
        for kind in ("sysusers", "tmpfiles"):
            self._put(source / f"{kind}.conf", self.root / f"usr/lib/{kind}.d/scanside.conf")
        os.sync()
        root = [] if self.live else [f"--root={self.root}"]
        _run("systemd-sysusers", *root)
        if self.live:
            _run("systemd-tmpfiles", "--create", "scanside.conf")
            _run("systemctl", "daemon-reload")
        _run("systemctl", *root, "enable", "scanside.target")

    def _put(self, source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        shutil.copyfile(source, part)
        part.replace(target)

    def stop(self) -> None:
        """Stop the services and what opens the ledger now and then; the ports stay open, and scanners wait there.

        `HOLD` keeps intake from being started by one of them; it is gone after a reboot, and not heeded for long. An
        installer that died now would leave a box that takes images and reads none: until `start` a timer looks whether
        it lives.
        """
        if self.live:
            self._watch()
            HOLD.touch()
            known = sorted(one.name for one in (self.root / _UNIT_FOLDER).glob("scanside-*") if one.suffix in _STOPPED)
            names = [one.replace("@.", "@*.") for one in known]
            if names:
                _run("systemctl", "stop", *names)

    def _watch(self) -> None:
        """Have systemd start everything, and raise an alarm, once nobody holds the installer's lock any more."""
        if _property(f"{RESUME}.timer", "ActiveState") == "active":
            return
        # A file: systemd, when it reads its units again, reads a command's punctuation otherwise than it was given.
        _RESUME_SCRIPT.write_text(
            f"systemctl stop {RESUME}.timer\n"
            f"rm -f {HOLD}\n"
            "systemctl reset-failed 'scanside*'\n"
            f"systemctl start --no-block scanside.target {' '.join(f'{one}.service' for one in SERVICES)} "
            f"$(cd /{_UNIT_FOLDER} && ls -d scanside-*.timer)\n"
            "echo '<1>the installer died while scanside was stopped, and what there is was started: see its status'\n"
            "exit 1\n",
            encoding="utf-8",
        )
        _run(
            "systemd-run", "--quiet", "--collect", f"--unit={RESUME}", f"--on-active={_RESUME_SECONDS}",
            f"--on-unit-inactive={_RESUME_SECONDS}", "--timer-property=AccuracySec=1",
            f"--property=OnFailure=scanside-alarm@{RESUME}.service.service",
            # Whoever cannot have the lock at once ends well: the installer lives.
            "flock", "--nonblock", "--conflict-exit-code", "0", str(self._lock), "/bin/sh", str(_RESUME_SCRIPT),
        )  # fmt: skip

    def _unwatch(self) -> None:
        _run("systemctl", "stop", f"{RESUME}.timer", check=False)

    def start(self, seconds: float = 120.0) -> dict[str, str]:
        """Start everything; what each service is then.

        Raises:
            ReleaseError: one does not come up.
        """
        if not self.live:
            return {}
        HOLD.unlink(missing_ok=True)
        _run("systemctl", "reset-failed", "scanside*", check=False)
        wanted = [one for one in SERVICES if not self.config.with_name(f"no-{one.removeprefix('scanside-')}").exists()]
        timers = sorted(one.name for one in (self.root / _UNIT_FOLDER).glob("scanside-*.timer"))
        _run("systemctl", "start", "--no-block", "scanside.target", *(f"{one}.service" for one in wanted), *timers)
        self._unwatch()  # whatever ends before this, an error too, leaves the watch to start the box
        deadline = time.monotonic() + seconds
        while True:
            states = {one: _property(f"{one}.service", "ActiveState") for one in wanted}
            sick = [one for one, state in states.items() if state != "active"]
            if not sick:
                return states
            if time.monotonic() > deadline:
                said = f"{', '.join(f'{one} is {states[one]}' for one in sick)} after {seconds:g} s"
                raise ReleaseError(said, sick[0], f"look at journalctl -u {sick[0]}; rollback if it is the release")
            time.sleep(0.5)

    # --- the ledger -------------------------------------------------------------------------------------

    @property
    def ledger(self) -> Path:
        """The database file."""
        return self.state / "ledger.sqlite"

    def has_ledger(self) -> bool:
        """Whether there is anything in it; systemd-tmpfiles makes an empty one."""
        return self.ledger.exists() and self.ledger.stat().st_size > 0

    def back_up(self, origin: str | None, to: str, keep: int) -> Path | None:
        """Copy the ledger, whole and checked, while whoever uses it goes on; None if there is none yet.

        Raises:
            ReleaseError: it cannot be copied, or is damaged; nothing is changed then.
        """
        if not self.has_ledger():
            return None
        folder = self.state / "backups"
        folder.mkdir(mode=0o700, exist_ok=True)
        at = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        path = folder / f"ledger-{origin or 'none'}-to-{to}-{at}.sqlite"
        part = folder / f".{path.name}.part"
        part.unlink(missing_ok=True)
        try:
            try:
                with (
                    closing(sqlite3.connect(f"file:{self.ledger}?mode=ro", uri=True, timeout=30)) as source,
                    closing(sqlite3.connect(part)) as target,
                ):
                    source.backup(target, pages=1000)
                    (said,) = target.execute("PRAGMA quick_check").fetchone()
            except sqlite3.Error as error:
                raise ReleaseError(f"no backup can be made: {error}", str(self.ledger), "mend that first") from error
            if said != "ok":
                raise ReleaseError(f"the ledger is damaged: {said}", str(self.ledger), "restore a backup first")
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
        except (ReleaseError, OSError):
            part.unlink(missing_ok=True)  # on a full disk it would keep the services from writing
            raise
        sync_folder(folder)
        for old in sorted(folder.glob("ledger-*.sqlite"), key=lambda one: one.stat().st_mtime)[:-keep]:
            old.unlink()
        return path

    def scanside(self, version: str, *arguments: str) -> dict[str, Any]:
        """Run a command of a release that prints JSON, as the user that checks; its answer.

        Raises:
            ReleaseError: it failed; with its own words.
        """
        done = self._command(version, *arguments)
        try:
            answer: dict[str, Any] = json.loads(done)
        except ValueError as error:
            where = f"scanside {' '.join(arguments)} of {version}"
            raise ReleaseError(f"it printed no JSON: {error}", where, "install the release again") from error
        return answer

    def require_settings(self, version: str) -> None:
        """Look whether a release can read the settings, if there are any yet: none of its services starts otherwise.

        Raises:
            ReleaseError: it cannot; with its own words, and where those lie that it had.
        """
        if not self.config.exists():
            return
        try:
            self._command(version, "check", "--settings-only")
        except ReleaseError as error:
            kept = self.config.with_name(f"scanside-{version}.toml")
            remedy = f"change {self.config}, and see that {version} takes it: scanside check --settings-only"
            if kept.exists():
                remedy = f"copy what it had, {kept}, to {self.config}, or change that one"
            raise ReleaseError(f"it cannot read the settings: {error.what}", version, remedy) from error

    def _command(self, version: str, *arguments: str) -> str:
        """What a command of a release prints, run as the user that checks."""
        command = [str(self.release(version) / "venv/bin/scanside"), "--config", str(self.config), *arguments]
        as_user: dict[str, Any] = {"user": _USER, "group": _GROUP, "extra_groups": []} if self.live else {}
        try:
            # It inherits the lock: where the installer is killed, nothing starts beside a ledger that is being changed.
            done: subprocess.CompletedProcess[str] = subprocess.run(
                command, capture_output=True, text=True, cwd="/", umask=0o007, env=clean_environment(), close_fds=False,
                **as_user,
            )  # fmt: skip
        except (OSError, LookupError) as error:
            raise ReleaseError(str(error), command[0], "install the release again") from error
        if done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise ReleaseError(said, f"scanside {' '.join(arguments)} of {version}", "see its own words")
        return done.stdout


def clean_environment() -> dict[str, str]:
    """What commands get: nothing that a shell, pip or uv was told elsewhere."""
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "HOME": "/nonexistent",
        "ORT_DISABLE_TELEMETRY": "1",
    }


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def run(command: Sequence[str], what: str, **options: Any) -> str:
    """Run a command; what it printed.

    Raises:
        ReleaseError: it failed, with its last words.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), **options)
    except OSError as error:
        raise ReleaseError(error.strerror or str(error), command[0], "install what is missing") from error
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").replace("\n", "; ")
        raise ReleaseError(f"{what}: {said[-2000:]}", command[0], "see its own words")
    return str(done.stdout)


def _run(*command: str, check: bool = True) -> None:
    if check:
        run(command, "it failed")
    else:
        subprocess.run(command, capture_output=True, env=clean_environment())


def _property(unit: str, key: str) -> str:
    return run(["systemctl", "show", "--value", "-p", key, unit], "it failed").strip()
