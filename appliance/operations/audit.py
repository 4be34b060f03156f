"""Watches the chain of events while the box runs, and notes its head in a file beside the ledger.

The noted head shows what the chain alone cannot: that its end was cut off, that an older copy of the ledger was put
back, or that all hashes were made anew. It does not help against somebody who changes both files; against that the head
stands in the log, which a site keeps elsewhere, and `scanside audit verify --head` takes it from there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Collection
from pathlib import Path

from sqlalchemy.exc import DatabaseError

from appliance.events import Event
from appliance.governance.board import read_board
from appliance.ledger.board import DECISIONS
from appliance.ledger.chain import CHUNK, Fault, Head, Walk, glance, named, newest
from appliance.ledger.store import Ledger
from dicom_io.errors import ScansideError

log = logging.getLogger(__name__)

PATROL_SECONDS = 600.0
"""So long after the whole chain was walked it is walked again."""
NOTE_SECONDS = 10.0
"""The head is noted so often at most, but at once with a decision: it is a file that is synced."""
BROKEN_SECONDS = 60.0
"""A broken chain is walked again, and said again, this often: it may have been mended."""


class Auditor:
    """Checks what is new, again and again what is old, and keeps the head. For one thread, but `fault` is for all.

    Attributes:
        fault: the first event that is wrong, in words; '' as long as none is known.
    """

    def __init__(self, ledger: Ledger, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._ledger = ledger
        self._path = path
        self._clock = clock
        self.fault = ""
        self._noted, unreadable = _read(path)
        if not self._noted and not unreadable:
            log.warning("audit: no head of the chain of events is noted; it begins now (%s)", path)
            ledger.log(Event.AUDIT_BEGUN, path=path.name)
        self._new, self._old = Walk(ledger, self._noted), Walk(ledger, self._noted)
        self._whole = False
        self._due = self._note_at = clock()
        self._decisions: dict[int, str] = {}
        if found := unreadable or glance(ledger, self._noted) or self._look_at_decisions():
            self._break(found)

    def step(self) -> bool:
        """Check some events more; True if there are more that were not checked since the start."""
        try:
            return self._again() if self.fault else self._advance()
        except DatabaseError as error:
            if not _is_damage(error):  # it is locked, or the disk is full: that passes
                raise
            self._break(_unreadable(error))
            return False

    def _advance(self) -> bool:
        wrong = self._look_at_decisions()  # first, so that the head that is noted is not older than they are
        count, fault = self._new.advance()
        fault = fault or wrong
        if not fault and count < CHUNK:
            if not self._whole:
                self._whole, self._due = True, self._clock() + PATROL_SECONDS
                self._tell()
            self._note(self._new.head)
            fault = self._patrol()
        if fault:
            self._break(fault)
        return not fault and count == CHUNK

    def _look_at_decisions(self) -> Fault | None:
        """The decisions of the board are few, and most is at stake: they are looked at each time."""
        found, fault = named(self._ledger, DECISIONS)
        if fault:
            return fault
        for event, before in self._decisions.items():
            if found.get(event) != before:
                return Fault(event, "", "it is another than the decision of the board that was here, or is gone")
        if found != self._decisions:
            self._note_at = self._clock()  # the head is noted at once: nobody may cut off a suspension unseen
        self._decisions = found
        return None

    def _patrol(self) -> Fault | None:
        """A piece of the way from the beginning, if it is time."""
        if self._clock() < self._due:
            return None
        count, fault = self._old.advance()
        if not fault and count < CHUNK:
            self._old, self._due = Walk(self._ledger, self._noted), self._clock() + PATROL_SECONDS
            self._tell()
        return fault

    def _again(self) -> bool:
        """Walk a chain that was broken again from its beginning; trust it if it is whole."""
        if self._clock() < self._due:
            return False
        noted, fault = _read(self._path)
        if self._old.head == Head():
            self._old = Walk(self._ledger, noted)
        count = 0
        if not fault:
            count, fault = self._old.advance()
        if fault:
            self._break(fault)
        elif count < CHUNK:
            log.warning("audit: the chain of events is whole again; approvals are trusted again")
            self._ledger.log(Event.AUDIT_RESTORED, fault=self.fault)
            self._noted, self.fault = noted, ""
            self._new, self._old = self._old, Walk(self._ledger, noted)
            self._due = self._clock() + PATROL_SECONDS
        return bool(self.fault) and count == CHUNK

    def _break(self, fault: Fault) -> None:
        said, before = str(fault), self.fault
        self.fault = said
        log.error("audit: THE LEDGER WAS TAMPERED WITH OR DAMAGED, approvals are not trusted: %s", said)
        self._due = self._clock() + BROKEN_SECONDS
        self._old = Walk(self._ledger)
        if said != before:  # last, as a damaged ledger may not take it
            self._ledger.log(Event.AUDIT_BROKEN, event=fault.event, event_name=fault.name, what=fault.what)

    def _tell(self) -> None:
        log.info("audit: the chain of events is whole, head %d:%s", self._new.head.event, self._new.head.hash)

    def _note(self, head: Head) -> None:
        if head not in self._noted and self._clock() >= self._note_at:
            write_head(self._path, head)
            self._noted, self._note_at = (head,), self._clock() + NOTE_SECONDS


def standing(ledger: Ledger, path: Path) -> tuple[int, str]:
    """How many events there are, and what is known, within milliseconds, to be wrong with them; '' if nothing is.

    A running engine walks the whole chain; what it found is known here too.
    """
    noted, fault = _read(path)
    try:
        last, count = newest(ledger, (Event.AUDIT_BROKEN, Event.AUDIT_RESTORED))
        fault = fault or glance(ledger, noted) or named(ledger, DECISIONS)[1]
    except DatabaseError as error:
        return 0, str(_unreadable(error))
    if fault:
        return count, str(fault)
    if last is not None and last["name"] == Event.AUDIT_BROKEN:
        return count, f"event {last['detail']['event']}: {last['detail']['what']} (found at {last['at'][:19]})"
    return count, ""


def lost_evidence(ledger: Ledger, directory: Path) -> Fault | None:
    """The first decision of the board whose evidence is not what was kept with it."""
    for one in read_board(ledger).decisions:
        if not one.evidence_digest:
            continue
        path = directory / one.evidence_digest.removeprefix("sha256:")
        what = f"its evidence {one.evidence}, kept as {path},"
        try:
            found = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
        except OSError as error:
            return Fault(one.record, f"board.{one.what}", f"{what} cannot be read: {error.strerror or error}")
        if found != one.evidence_digest:
            return Fault(one.record, f"board.{one.what}", f"{what} was changed: its digest is {found}")
    return None


def read_head(path: Path) -> Head | None:
    """The head that was noted; None where none was.

    Raises:
        ScansideError: it cannot be read.
    """
    try:
        found = json.loads(path.read_bytes())
        return Head(int(found["event"]), str(found["hash"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = "see `scanside audit verify`; remove it only if you know why it is broken"
        raise ScansideError("the noted head of the chain of events cannot be read", str(path), remedy) from error


def write_head(path: Path, head: Head) -> None:
    """Note a head, so that the file is always whole, also after a power cut."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="ascii") as file:
        json.dump({"event": head.event, "hash": head.hash}, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _is_damage(error: DatabaseError) -> bool:
    """Whether SQLite says that a page is not what it wrote, or that the disk cannot read it."""
    code = getattr(error.orig, "sqlite_errorcode", 0)
    damaged = code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
    return damaged or code in (sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_IOERR_CORRUPTFS)  # EIO is the latter


def _unreadable(error: DatabaseError) -> Fault:
    """What is known of a ledger of which SQLite cannot read a page."""
    return Fault(0, "", f"the ledger cannot be read: {error.orig}")


def _read(path: Path) -> tuple[Collection[Head], Fault | None]:
    try:
        head = read_head(path)
    except ScansideError as error:
        return (), Fault(0, "", f"{error.where}: {error.what}")
    return ((head,) if head else ()), None
