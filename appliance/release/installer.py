"""What puts releases onto a box: verify, install, activate, rollback, status.

Whatever is killed at whatever moment, the box that starts next runs one whole release: an unpacked release gets its
name last, `current` changes by one rename, and either release brings the ledger to the schema that it needs. The same
command again finishes what was begun.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import zipfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .box import RELEASE, Box, Unfinished, run, sync_folder
from .bundle import GPU_EXTRAS, GPU_REQUIREMENTS, GPU_WHEELS, Bundle, read_bundle, signed, version_key
from .errors import ReleaseError
from .minisign import PublicKey, read_public_key

KEEP = 3
_WHEELS = ("wheels", "wheels-triton", "wheels-install")

Say = Callable[[str], None]


def reached(box: Box, step: str) -> None:
    """Note that a step of an activation or rollback is done."""
    begun = box.notes().unfinished
    assert begun is not None
    box.note(unfinished=Unfinished(begun.command, begun.origin, begun.to, step))


def install(box: Box, path: Path, keys: Sequence[PublicKey], keep: int, say: Say) -> dict[str, Any]:
    """Verify a bundle and unpack it with its environments beside what runs; nothing that runs is touched.

    Raises:
        ReleaseError: it may not be installed here, or cannot be.
    """
    releases = box.home / "releases"
    releases.mkdir(parents=True, exist_ok=True)
    for left in (*releases.glob(".*.part"), *releases.glob(".*.work")):
        shutil.rmtree(left)
    say(f"checking {path.name}")
    bundle = signed(path, keys)
    if (box.release(bundle.version) / RELEASE).exists():
        if box.about(bundle.version)["bundle"] == bundle.digest:
            return {"changed": False, "version": bundle.version}
        raise ReleaseError(
            "another bundle with this version is installed", f"{path} ({bundle.version})",
            "give every build a version of its own",
        )  # fmt: skip
    _may_follow(bundle, path, box.current(), box.notes().floor)
    part, work = releases / ".new.part", releases / ".new.work"
    try:
        part.mkdir()
        work.mkdir()
        say(f"unpacking {bundle.version}")
        manifest = read_bundle(path, bundle, into=part)
        _may_run_here(manifest, path)
        gpu = bool(manifest.get("gpu"))
        for name in (*_WHEELS, *([GPU_WHEELS] if gpu else [])):
            (part / name).rename(work / name)
        _environments(part, work, bundle, gpu, say)
        about = {
            "version": bundle.version,
            "channel": bundle.channel,
            "minimum": bundle.minimum,
            "key": bundle.key,
            "bundle": bundle.digest,
            "schema": manifest["schema"],
            "gpu": gpu,
            "installed_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        (part / RELEASE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        os.sync()
        broken = box.release(bundle.version)
        if broken.exists():  # without its RELEASE: nobody finished it
            shutil.rmtree(broken)
        part.rename(box.release(bundle.version))
        sync_folder(releases)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)
    return {"changed": True, "version": bundle.version, "removed": _prune(box, keep)}


def _may_run_here(manifest: dict[str, Any], path: Path) -> None:
    wanted = (manifest["python"], manifest["platform"])
    have = (f"{sys.version_info.major}.{sys.version_info.minor}", f"linux_{platform.machine()}")
    if wanted != have:
        raise ReleaseError(
            f"it is for Python {wanted[0]} on {wanted[1]}, this is Python {have[0]} on {have[1]}", str(path),
            "fetch the bundle for this machine, or run the installer with that Python",
        )  # fmt: skip


def _may_follow(bundle: Bundle, path: Path, current: str | None, floor: str | None) -> None:
    if floor is not None and version_key(bundle.version) < version_key(floor):
        raise ReleaseError(
            f"version {bundle.version} is older than {floor}, which ran here already", str(path),
            "fetch a newer one; to go back to a release that is still installed, use rollback",
        )  # fmt: skip
    if current is not None and version_key(current) < version_key(bundle.minimum):
        raise ReleaseError(
            f"version {bundle.version} updates boxes from {bundle.minimum} on, this one runs {current}", str(path),
            f"install a version between the two first: {bundle.minimum} or newer",
        )  # fmt: skip


def _environments(part: Path, work: Path, bundle: Bundle, gpu: bool, say: Say) -> None:
    """Build both environments from the bundle's wheels, every one of which must have a hash of the requirements."""
    uv = _uv(work)
    python = getattr(sys, "_base_executable", None) or sys.executable
    lists = ["appliance.txt", "scanside.txt"]
    if gpu:  # its list has all of the appliance's too
        lists[0] = GPU_REQUIREMENTS
        lists += [GPU_EXTRAS] if (part / "requirements" / GPU_EXTRAS).exists() else []
    for name, folders, files in (
        ("venv", ["wheels", *([GPU_WHEELS] if gpu else [])], lists),
        ("venv-triton", ["wheels-triton"], ["triton.txt"]),
    ):
        say(f"building {name}")
        common = ["--offline", "--no-config", "--no-cache", "--quiet"]
        run([str(uv), "venv", *common, "--relocatable", "--python", python, str(part / name)], f"building {name}")
        requirements = [word for one in files for word in ("-r", str(part / "requirements" / one))]
        found = [word for one in folders for word in ("--find-links", str(work / one))]
        # --no-deps: the lists are complete, and Triton's must not bring in what its wheel asks for.
        run(
            [str(uv), "pip", "install", *common, "--python", str(part / name / "bin/python"), "--no-index",
             *found, "--no-deps", "--require-hashes", "--only-binary", ":all:",
             "--compile-bytecode", "--link-mode", "copy", *requirements],
            f"building {name}",
        )  # fmt: skip
    said = run([str(part / "venv/bin/scanside"), "--version"], "the new release does not run", cwd="/").split()
    if said[-1:] != [bundle.version]:
        raise ReleaseError(f"it says that it is {' '.join(said)}", bundle.version, "report this fault")


def _uv(work: Path) -> Path:
    """The program uv, out of its wheel."""
    (wheel,) = (work / "wheels-install").glob("uv-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [one for one in archive.namelist() if one.endswith(".data/scripts/uv")]
        (work / "uv").write_bytes(archive.read(name))
    (work / "uv").chmod(0o755)
    return work / "uv"


def _prune(box: Box, keep: int) -> list[str]:
    """Remove all but the newest releases, what runs, and what rollback goes back to."""
    notes = box.notes()
    kept = {box.current(), notes.previous}
    if notes.unfinished:
        kept |= {notes.unfinished.origin, notes.unfinished.to}
    old = [one["version"] for one in box.installed()[keep:] if one["version"] not in kept]
    for version in old:
        (box.release(version) / RELEASE).unlink()  # from here on it is no release, whatever happens
        sync_folder(box.release(version))
        shutil.rmtree(box.release(version))
    return old


def activate(box: Box, version: str, keep: int, say: Say) -> dict[str, Any]:
    """Let an installed release run: backup, flip, units, the ledger forward, start.

    Raises:
        ReleaseError: it cannot run, or cannot read these settings; whatever failed before its services were started,
            the release before runs again.
        OSError: the same, of a file.
    """
    box.about(version)
    current, notes = box.current(), box.notes()
    begun = notes.unfinished
    if current == version and begun is None:
        return {"changed": False, "version": version, "services": box.start()}
    if current is not None and version_key(version) < version_key(current):
        raise ReleaseError(
            f"{current} runs, which is newer", version, f"rollback {version}, which takes the ledger back with it"
        )
    box.require_links()
    origin = begun.origin if begun and begun.to == version and begun.command == "activate" else current
    if begun and begun.command == "rollback":
        raise ReleaseError(f"a rollback to {begun.to} has not ended", version, f"rollback {begun.to} first")
    # Where nothing runs nothing is lost, nor is there the user that looks; what was begun has stopped it already.
    if begun is None and current is not None:
        box.require_settings(version)
    box.note(unfinished=Unfinished("activate", origin, version))
    say("stopping the services; the ports stay open")
    backup = None
    try:
        box.stop()
        reached(box, "stopped")
        if origin != version and current != version:
            say("copying the ledger")
            backup = box.back_up(origin, version, keep)
        reached(box, "backed up")
        box.flip(version)
        reached(box, "flipped")
        box.place_units(version)
        reached(box, "units placed")
        box.stop()  # a scanner that came meanwhile may have started intake of the release before
        if box.live or box.has_ledger():
            say("bringing the ledger to this release's schema")
            box.scanside(version, "ledger", "upgrade", "--json")
    except (ReleaseError, OSError) as error:
        if origin is not None and origin != version:
            _run_again(box, origin, version, error, say)
        raise
    reached(box, "migrated")
    newest = max([version, *([notes.floor] if notes.floor else [])], key=version_key)
    box.note(floor=newest, previous=origin if origin != version else notes.previous)
    say("starting the services")
    services = box.start()
    box.note(unfinished=None)
    return {
        "changed": True,
        "version": version,
        "previous": origin,
        "backup": str(backup) if backup else None,
        "services": services,
        "removed": _prune(box, keep),
    }


def rollback(box: Box, version: str | None, keep: int, say: Say) -> dict[str, Any]:
    """Go back to an older installed release; the newer one takes the ledger back, with all that came since.

    Args:
        version: None: the release that ran before.

    Raises:
        ReleaseError: there is nothing to go back to, or it cannot read these settings, or the ledger cannot be copied
            or taken back; what ran then runs again.
        OSError: the same, of a file.
    """
    current, notes = box.current(), box.notes()
    begun = notes.unfinished
    if version is None and begun is not None:
        version = begun.to if begun.command == "rollback" else begun.origin
    to = version or notes.previous
    if to is None or current is None:
        raise ReleaseError("there is no release to go back to", current or "none runs", "install and activate one")
    target = box.about(to)
    if current == to and begun is None:
        return {"changed": False, "version": to, "services": box.start()}
    if version_key(to) > version_key(current):
        raise ReleaseError(f"{to} is newer than {current}, which runs", to, f"activate {to}")
    if begun is None:
        box.require_settings(to)
    # Whose schema the ledger may have: the newest that was begun with.
    newer = max({current, *([one for one in (begun.origin, begun.to) if one] if begun else [])}, key=version_key)
    box.note(unfinished=Unfinished("rollback", newer, to))
    say("stopping the services; the ports stay open")
    try:
        box.stop()
        reached(box, "stopped")
        say("copying the ledger")
        backup = box.back_up(newer, to, keep)
        reached(box, "backed up")
        _take_back(box, newer, target)
    except (ReleaseError, OSError) as error:
        # One that was begun before, and went as far as the flip, is still to be ended.
        _start_anyway(box, str(current), error, say, ended=current != to)
        raise
    try:
        reached(box, "taken back")
        box.flip(to)
        reached(box, "flipped")
        box.place_units(to)
        box.stop()
        # A scanner that came between may have started intake of the newer release, which takes the ledger forward.
        _take_back(box, newer, target)
        reached(box, "units placed")
    except (ReleaseError, OSError) as error:
        # Either release brings the ledger to its own schema; the same command again ends what was begun.
        _start_anyway(box, "what there is", error, say, ended=False)
        raise
    older = [one["version"] for one in box.installed() if version_key(one["version"]) < version_key(to)]
    box.note(previous=older[0] if older else None)
    say("starting the services")
    services = box.start()
    box.note(unfinished=None)
    return {
        "changed": True,
        "version": to,
        "from": newer,
        "backup": str(backup) if backup else None,
        "services": services,
    }


def _run_again(box: Box, origin: str, version: str, error: Exception, say: Say) -> None:
    """After an activation that failed: the release before, its units, and the schema it knows."""
    try:
        _take_back(box, version, box.about(origin))  # an earlier run of this command may have brought it forward
    except ReleaseError as worse:
        say(f"the ledger could not be taken back: {worse.what}")
    try:
        box.flip(origin)
        box.place_units(origin)
    except (ReleaseError, OSError) as worse:  # as on a full disk; most of it is as it was
        say(f"{origin} was not put back whole: {worse}")
    _start_anyway(box, origin, error, say)


def _start_anyway(box: Box, what: str, error: Exception, say: Say, *, ended: bool = True) -> None:
    """A box that was stopped for something that failed must not stay so: nobody would read the next study."""
    say(f"that failed ({error}); {what} runs again")
    try:
        if ended:
            box.note(unfinished=None)
    except OSError as worse:
        say(f"the notebook cannot be written: {worse}")
    try:
        box.start()
    except ReleaseError as worse:
        say(f"it does not come up: {worse.what} ({worse.where}): {worse.remedy}")


def _take_back(box: Box, newer: str, target: dict[str, Any]) -> None:
    if box.has_ledger() and box.about(newer)["schema"] != target["schema"]:
        box.scanside(newer, "ledger", "downgrade", target["schema"], "--json")


def status(box: Box) -> dict[str, Any]:
    """What is installed, what runs, the floor, and what was begun and has not ended."""
    notes = box.notes()
    begun = notes.unfinished
    return {
        "current": box.current(),
        "previous": notes.previous,
        "floor": notes.floor,
        "installed": box.installed(),
        "unfinished": begun and {"command": begun.command, "from": begun.origin, "to": begun.to, "step": begun.step},
    }


def verified(path: Path, keys: Sequence[PublicKey], say: Say) -> dict[str, Any]:
    """Check a bundle; what it is."""
    say(f"checking {path.name}")
    bundle = signed(path, keys)
    manifest = read_bundle(path, bundle)
    return {
        "changed": False,
        "version": bundle.version,
        "channel": bundle.channel,
        "minimum": bundle.minimum,
        "key": bundle.key,
        "gpu": bool(manifest.get("gpu")),
        "files": len(manifest["files"]),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    options = _options(arguments)
    box = Box(options.root.resolve())
    os.umask(0o022)

    def say(text: str) -> None:
        print(f"scanside-install: {text}", file=sys.stderr, flush=True)

    try:
        keys = [read_public_key(one) for one in getattr(options, "key", None) or []]
        if options.command in ("verify", "install"):
            keys = keys or box.keys()
        match options.command:
            case "verify":
                answer = verified(options.bundle, keys, say)
            case "status":
                answer = status(box)
            case _:
                with box.alone():
                    answer = _change(box, options, keys, say)
    except ReleaseError as error:
        said = {"what": error.what, "where": error.where, "remedy": error.remedy}
        _print_error(options.json, options.command, said)
        return 1
    except OSError as error:
        where = str(error.filename or box.home)
        said = {
            "what": error.strerror or str(error),
            "where": where,
            "remedy": "run it as root; see that there is room",
        }
        _print_error(options.json, options.command, said)
        return 1
    if options.json:
        print(json.dumps({"command": options.command, "current": box.current(), **answer}, indent=2))
    else:
        for key, value in answer.items():
            print(f"{key}: {value if isinstance(value, str) else json.dumps(value)}")
    return 0


def _change(box: Box, options: argparse.Namespace, keys: Sequence[PublicKey], say: Say) -> dict[str, Any]:
    match options.command:
        case "install":
            return install(box, options.bundle, keys, options.keep, say)
        case "activate":
            return activate(box, options.version, options.keep, say)
        case _:
            return rollback(box, options.version, options.keep, say)


def _print_error(as_json: bool, command: str, said: dict[str, str]) -> None:
    if as_json:
        print(json.dumps({"command": command, "changed": False, "error": said}, indent=2))
    print(f"scanside-install: {said['what']} ({said['where']}): {said['remedy']}", file=sys.stderr)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scanside_install.py", description="Install, update and roll back scanside.")
    parser.add_argument("--root", type=Path, default=Path("/"), help="folder of an image; nothing is started there")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("verify", "check a bundle"),
        ("install", "check and unpack a bundle beside what runs"),
        ("activate", "let an installed version run"),
        ("rollback", "go back to the version before, or to an older one"),
        ("status", "what is installed, what runs"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--json", action="store_true", help="print JSON for machines")
        if name in ("verify", "install"):
            command.add_argument("bundle", type=Path, help="the .tar file; its .minisig lies beside it")
            command.add_argument(
                "--key", type=Path, action="append", metavar="PUB",
                help="public key that is trusted, once for each; else all of /etc/scanside/release-keys",
            )  # fmt: skip
        if name in ("install", "activate", "rollback"):
            command.add_argument("--keep", type=_at_least_two, default=KEEP, help=f"releases to keep ({KEEP})")
        if name == "activate":
            command.add_argument("version")
        if name == "rollback":
            command.add_argument("version", nargs="?")
    return parser.parse_args(arguments)


def _at_least_two(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError("at least 2: what runs, and what it can go back to")
    return int(text)
