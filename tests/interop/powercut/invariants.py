"""What has to hold in a state folder after a power cut or a kill, looked at with the box's own code."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import sqlalchemy as sa

from appliance.intake.spool import Spool, path_of
from appliance.ledger.store import Ledger
from appliance.ledger.views import verify_events
from dicom_io.errors import ScansideError
from tests.interop.powercut.scanner import Image

LEDGER, SPOOL = "ledger.sqlite", "spool"

logging.getLogger("alembic").setLevel(logging.WARNING)

Row = tuple[str, str, bool]
"""SOP Instance UID, digest, whether it is the current one of its UID; of an instance that retention has not removed."""


def violations(
    ledger_path: Path, spool: Path, answered: Sequence[Image], *, start: bool = True, cut: bool = False
) -> list[str]:
    """What does not hold.

    - The ledger opens, SQLite finds nothing wrong with it, and its chain of events is whole.
    - A file under a final name is whole: its name is the SHA-256 of its bytes.
    - Every row's file is there, no row is there twice, and one row of every SOP Instance UID is the current one.
    - Every image that was answered with Success has one row whose file ends with the very data set that was sent.

    Args:
        start: then also does to the folder what a start of intake does before it listens, and looks again; nothing
            may lie in the spool then that no row speaks of.
        cut: first looks that no half file lies under a final name, then names again what a power cut took the name
            from, as every service does at its start. Otherwise, and without ``start``, nothing is changed in the spool.
    """
    try:
        ledger = Ledger(ledger_path)
    except ScansideError as error:
        return [f"the ledger does not open: {error}"]
    try:
        found = []
        if cut:
            found += [f"{path} lies under a final name and is not what it says" for path in _spooled(spool)[1]]
            Spool(spool).recover(ledger.digests())
        found += _held_against(ledger, spool, answered)
        if start and not found:
            ledger.abandon_associations()
            Spool(spool).sweep(ledger.digests(), ledger.removed_among)
            found = _held_against(ledger, spool, answered)
            final = {path_of(spool, digest) for _, digest, _ in _rows(ledger)}
            found += [f"{path} was left behind" for path in spool.rglob("*") if path.is_file() and path not in final]
        return found
    except sa.exc.SQLAlchemyError as error:
        return [f"the ledger cannot be read or written: {error}"]
    finally:
        ledger.close()


def _held_against(ledger: Ledger, spool: Path, answered: Iterable[Image]) -> list[str]:
    files, strange = _spooled(spool)
    found = [f"{path} lies under a final name and is not what it says" for path in strange]
    with ledger.read() as connection:
        for pragma, fine in (("integrity_check", [("ok",)]), ("foreign_key_check", [])):
            said = [tuple(row) for row in connection.exec_driver_sql(f"PRAGMA {pragma}")]
            if said != fine:
                found.append(f"{pragma}: {said[:3]}")
    if (event := verify_events(ledger)) is not None:
        found.append(f"the chain of events is broken at {event}")
    rows = _rows(ledger)
    for (uid, digest), count in Counter((uid, digest) for uid, digest, _ in rows).items():
        if digest not in files:
            found.append(f"the row of {uid} has no file {digest}")
        if count > 1:
            found.append(f"{uid} has {count} rows with the digest {digest}")
    kept, current = defaultdict(list), Counter[str]()
    for uid, digest, is_current in rows:
        kept[uid].append(files.get(digest, b""))
        current[uid] += is_current
    found += [f"{uid} has {current[uid]} current rows" for uid in kept if current[uid] != 1]
    for one in answered:
        count = sum(content.endswith(one.data_set) for content in kept[one.uid])
        if count == 0:
            found.append(f"{one.uid} was answered with Success and is lost ({len(kept[one.uid])} rows)")
        elif count > 1:
            found.append(f"{one.uid} is there {count} times")
    return found


def _rows(ledger: Ledger) -> list[Row]:
    with ledger.read() as connection:
        query = "SELECT sop_instance_uid, digest, is_current FROM instance WHERE removed_at IS NULL"
        return [(uid, digest, bool(current)) for uid, digest, current in connection.exec_driver_sql(query)]


def _spooled(spool: Path) -> tuple[dict[str, bytes], list[Path]]:
    """The files that are what their name says, by digest; and those that are not."""
    files, strange = {}, []
    # Without objects for each of the hundreds of folders, because this runs thousands of times.
    for folder in os.scandir(spool) if spool.is_dir() else ():
        for entry in os.scandir(folder) if len(folder.name) == 2 else ():
            path = Path(entry.path)
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            if path_of(spool, digest) == path:
                files[digest] = content
            else:
                strange.append(path)
    return files, strange
