"""Retention: the files of finished studies go, the oldest first, so that the spool does not grow for ever.

A removal is marked in the ledger first, in one transaction that checks once more that nothing holds the study; then the
files are deleted, then their folders synced. Whatever ends the process in between, the next start of intake deletes
what is marked: the spool's sweep keeps only what a row names, and `Retention.resume` deletes the findings' files.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from appliance.events import Event
from appliance.intake.spool import path_of, sync_folder
from appliance.ledger.database import later, now, seconds_between
from appliance.ledger.retention import KeptStudy, Removal, Rules
from appliance.ledger.store import Ledger
from appliance.settings import Settings

log = logging.getLogger(__name__)

ROUND_SECONDS = 30.0
"""Between two looks at the disk."""

AHEAD_SECONDS = 3600.0
"""A clock that ran ahead of the time that passed by more than this says nothing of how old a study is."""

_FILES_A_PAUSE = 32
"""So many files are deleted while intake waits; with 32 it waits some milliseconds."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a file system has left.

    Attributes:
        free, total: bytes.
        inodes_percent: share of its inodes that is free; 100 where it does not count them.
    """

    free: int
    total: int
    inodes_percent: float = 100.0

    @classmethod
    def of(cls, directory: Path) -> Room:
        """The file system that a folder lies on."""
        disk = os.statvfs(directory)
        inodes = 100 * disk.f_favail / disk.f_files if disk.f_files else 100.0
        return cls(disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize, inodes)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the next round would do.

    Attributes:
        low: the disk has less free than `retention.start_percent`, or comes near intake's reserve.
        wanted: bytes that must become free until it is enough; 0 while the disk is not low.
        goes: studies whose files go now.
        may_go: those that nothing holds, and that stay because there is room.
        held: those that something holds.
    """

    room: Room
    low: bool
    wanted: int
    goes: tuple[KeptStudy, ...]
    may_go: tuple[KeptStudy, ...]
    held: tuple[KeptStudy, ...]


class Retention:
    """Deletes what the ledger lets go.

    Args:
        pause: intake makes no instance durable inside it; an instance that comes again at the very moment must not
            find its file going.
        room: what the disk has left.
    """

    def __init__(
        self,
        ledger: Ledger,
        settings: Settings,
        pause: Callable[[], AbstractContextManager[None]] = nullcontext,
        room: Callable[[], Room] | None = None,
    ) -> None:
        self._ledger = ledger
        self._settings = settings
        self._pause = pause
        self._room = room or (lambda: Room.of(settings.spool_directory))
        self._exhausted = False
        self._began = now(), _running()
        self._suspended = False
        day = 24 * 3600.0
        troubled = settings.retention.troubled_days
        self._rules = Rules(
            packages=settings.models.packages,
            attempts=settings.models.attempts,
            keep_seconds=settings.retention.keep_hours * 3600.0,
            troubled_seconds=None if troubled is None else troubled * day,
        )
        keep_days = settings.retention.keep_days
        self._keep_seconds = None if keep_days is None else keep_days * day

    def plan(self) -> Plan:
        """What the next round would do; changes nothing. Other files of the disk are taken as they are."""
        room = self._room()
        low = self._is_low(room)
        wanted = self._wanted(room) if low else 0
        rules, keep_seconds = self._ages()
        kept = self._ledger.kept_studies(rules)
        free = [one for one in kept if not one.holds]
        goes = []
        freed = 0
        for one in free:
            if _is_aged(one, keep_seconds) or freed < wanted or (low and not wanted):
                goes.append(one)
                freed += one.size
        return Plan(
            room=room,
            low=low,
            wanted=wanted,
            goes=tuple(goes),
            may_go=tuple(one for one in free if one not in goes),
            held=tuple(one for one in kept if one.holds),
        )

    def resume(self) -> int:
        """Delete the findings' files that an earlier process had marked and not deleted. Returns how many.

        Those of the spool are swept away at the start of intake, before it listens.
        """
        paths = self._ledger.removed_paths()
        folder = self._settings.findings_directory
        return self._delete_findings([path for path in paths if (folder / path).exists()])

    def step(self, stopping: threading.Event | None = None) -> int:
        """One round: remove what is too old, then the oldest until there is room. Returns how many studies went."""
        removed = 0
        low = self._is_low(self._room())
        self._tell_of_clock()
        rules, keep_seconds = self._ages()
        everything = low or keep_seconds is not None
        kept = self._ledger.kept_studies(rules, selftests=not everything)
        candidates = [one for one in kept if not one.holds]
        for one in candidates:
            if stopping is not None and stopping.is_set():
                return removed
            if not _is_aged(one, keep_seconds) and (not low or self._is_enough(self._room())):
                break
            removed += self._remove(one, rules)
        self._tell(low and not self._is_enough(self._room()))
        return removed

    def run(self, stopping: threading.Event) -> None:
        """Rounds until told to stop; for a thread of the intake service."""
        try:
            self.resume()
        except (OSError, SQLAlchemyError):
            log.exception("retention: files of an earlier removal could not be deleted; the next start tries again")
        while not stopping.is_set():
            try:
                self.step(stopping)
            except (OSError, SQLAlchemyError):
                log.exception("retention: a round failed; the next one tries again")
            stopping.wait(ROUND_SECONDS)

    def _is_low(self, room: Room) -> bool:
        # Well before intake refuses: half as much again as its reserve.
        least = max(room.total * self._settings.retention.start_percent / 100, 1.5 * self._reserve(room))
        return room.free < least or room.inodes_percent < self._settings.retention.start_percent

    def _is_enough(self, room: Room) -> bool:
        return not self._wanted(room) and room.inodes_percent >= self._settings.retention.stop_percent

    def _wanted(self, room: Room) -> int:
        enough = max(room.total * self._settings.retention.stop_percent / 100, 2 * self._reserve(room))
        return max(0, int(enough) - room.free)

    def _reserve(self, room: Room) -> float:
        intake = self._settings.intake
        return max(intake.reserve_bytes, room.total * intake.reserve_percent / 100)

    def _ahead(self) -> float:
        """By how many seconds the clock ran ahead since this process began."""
        wall, running = self._began
        return seconds_between(wall, now()) - (_running() - running)

    def _ages(self) -> tuple[Rules, float | None]:
        """The rules, and the age at which studies go although there is room; while the clock is ahead no age counts."""
        if self._ahead() > AHEAD_SECONDS:
            return replace(self._rules, troubled_seconds=None), None
        return self._rules, self._keep_seconds

    def _remove(self, one: KeptStudy, rules: Rules) -> int:
        removal = self._ledger.remove_study(one.study_id, rules)
        if removal is None:
            # Somebody took it up again since the round began.
            return 0
        self._delete_spooled(removal)
        self._delete_findings(removal.paths)
        log.info("study %d: retention removed its files, %.1f MB", removal.study_id, removal.size / 1e6)
        return 1

    def _delete_spooled(self, removal: Removal) -> None:
        spool = self._settings.spool_directory
        folders: set[Path] = set()
        for start in range(0, len(removal.digests), _FILES_A_PAUSE):
            some = removal.digests[start : start + _FILES_A_PAUSE]
            with self._pause():
                # Again, since one of them may have come again and been made durable meanwhile.
                paths = [path_of(spool, digest) for digest in self._ledger.unnamed_digests(some)]
                _unlink(paths)
            folders |= {path.parent for path in paths}
        _sync(folders)

    def _delete_findings(self, paths: Sequence[str]) -> int:
        folder = self._settings.findings_directory
        found = [folder / path for path in paths]
        gone = _unlink(found)
        for parent in {path.parent for path in found} - {folder}:
            with contextlib.suppress(OSError):
                parent.rmdir()
        _sync({path.parent for path in found} | {folder})
        return gone

    def _tell_of_clock(self) -> None:
        """Say once that nothing goes by its age, and once that it does again."""
        ahead = self._ahead()
        suspended = ahead > AHEAD_SECONDS and (self._rules.troubled_seconds, self._keep_seconds) != (None, None)
        if suspended == self._suspended:
            return
        self._suspended = suspended
        if not suspended:
            log.info("retention: the clock is right again; studies go by their age")
            return
        log.error(
            "retention: the clock was set ahead by %.1f hours; no study goes by its age until it is set right, or "
            "intake is started again because it is right now",
            ahead / 3600,
        )
        self._ledger.log(Event.RETENTION_SUSPENDED, ahead_seconds=round(ahead))

    def _tell(self, exhausted: bool) -> None:
        """Say once that the disk is low and nothing more may go, and once that it is over."""
        if exhausted == self._exhausted:
            return
        self._exhausted = exhausted
        if not exhausted:
            log.info("retention: there is room again")
            return
        room = self._room()
        held = sum(1 for one in self._ledger.kept_studies(self._ages()[0]) if one.holds)
        log.error(
            "retention: the disk runs low (%.1f GB free) and nothing more may go: %d studies are held; "
            "`scanside retention --dry-run` says why",
            room.free / 1e9,
            held,
        )
        self._ledger.log(Event.RETENTION_EXHAUSTED, free_bytes=room.free, held=held)


def _running() -> float:
    """Seconds that the machine has run, also those in which it slept; nobody sets this clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _is_aged(one: KeptStudy, keep_seconds: float | None) -> bool:
    return one.selftest or (
        keep_seconds is not None and one.completed_at is not None and one.completed_at <= later(-keep_seconds)
    )


def _unlink(paths: Iterable[Path]) -> int:
    """Delete files; one that cannot be deleted stays for the next start, and is told of. Returns how many went."""
    gone = 0
    for path in paths:
        try:
            path.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            log.error("retention: %s cannot be deleted: %s", path, error.strerror or error)
            continue
        gone += 1
    return gone


def _sync(folders: Iterable[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):
            sync_folder(folder)
