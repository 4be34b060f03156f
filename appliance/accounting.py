"""The account of a day: whatever was received lies in the spool, belongs to a study, and has an outcome.

What came is counted twice: by the ledger's events, which are written as each instance is stored or refused, and where
the requests are read from the network, association by association. The two are held against each other.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

import sqlalchemy as sa

from appliance.events import Event
from appliance.intake.spool import is_intact, path_of
from appliance.ledger import schema as t
from appliance.ledger.selftest import of_patients
from appliance.ledger.store import Ledger

_MOMENT_SECONDS = 60.0
_NAMES = (Event.INSTANCE_STORED, Event.INSTANCE_CONFLICT, Event.INSTANCE_DUPLICATE, Event.INSTANCE_REFUSED)
_REMOVED = "removed by retention before its study came again without it"


@dataclass(frozen=True, slots=True)
class Account:
    """What became of every instance that was offered on one day (UTC), but for those of self-tests.

    Attributes:
        received: C-STORE requests that were answered, by the ledger's events.
        counted: those of associations that ended on this day, as they were counted from the network.
        uncounted: how many associations ended without a count: intake was killed while they were open.
        differences: of the others, those for which the ledger's events are not as many: (number, counted, events).
        refused: reason → how many of them got a failure status.
        duplicates: how many were there already, with the same bytes.
        kept: how many different instances the others are, by their digests.
        missing_rows: digests of those without a row in the ledger.
        removed: how many of those retention has removed since; their rows, and so their outcomes, stay.
        missing_files: digests of the others whose file is gone from the spool, or is no longer what was received.
        stray_files: digests of files that were written on this day and have no row in the ledger.
        outcomes: outcome → how many of them have it; each has exactly one.
    """

    day: date
    received: int
    counted: int
    uncounted: int
    differences: tuple[tuple[int, int, int], ...]
    refused: dict[str, int]
    duplicates: int
    kept: int
    missing_rows: tuple[str, ...]
    removed: int
    missing_files: tuple[str, ...]
    stray_files: tuple[str, ...]
    outcomes: dict[str, int]

    @property
    def balanced(self) -> bool:
        """What came is in the ledger, and every instance has its row, with its outcome, and its file unless retention
        removed it; no file is without a row."""
        return not (self.differences or self.missing_rows or self.missing_files or self.stray_files)


def account(
    ledger: Ledger, spool: Path, day: date, *, verify: bool = False, on_file: Callable[[int, int], None] | None = None
) -> Account:
    """Draw up the account of a day.

    Args:
        spool: the folder of received files.
        verify: also compare the content of each file with its digest.
        on_file: called with (done, all) after each file that was looked at.
    """
    e = t.event.c
    query = sa.select(e.name, e.detail).where(e.name.in_(_NAMES), e.at.startswith(day.isoformat()))
    query = query.where(of_patients(e.study_id))
    with ledger.read() as connection:
        events = connection.execute(query).all()
    kept = sorted({row.detail["digest"] for row in events if row.name in _NAMES[:2]})
    states = _outcomes(ledger, kept)
    # A digest that another row still names has its file.
    removed = set(ledger.unnamed_digests(states))
    missing = []
    for number, digest in enumerate(kept, 1):
        if digest in states and digest not in removed and not _is_there(path_of(spool, digest), digest, verify=verify):
            missing.append(digest)
        if on_file is not None:
            on_file(number, len(kept))
    counts = _counts(ledger, day)
    recorded = _recorded(ledger, day)
    refused = Counter(row.detail["reason"] for row in events if row.name == Event.INSTANCE_REFUSED)
    return Account(
        day=day,
        received=len(events),
        counted=sum(stores or 0 for stores in counts.values()),
        uncounted=sum(stores is None for stores in counts.values()),
        differences=tuple(
            (association, stores, recorded[association])
            for association, stores in counts.items()
            if stores is not None and stores != recorded[association]
        ),
        refused=dict(refused.most_common()),
        duplicates=sum(row.name == Event.INSTANCE_DUPLICATE for row in events),
        kept=len(kept),
        missing_rows=tuple(digest for digest in kept if digest not in states),
        removed=len(removed),
        missing_files=tuple(missing),
        stray_files=_stray(ledger, spool, day),
        outcomes=dict(Counter(states.values()).most_common()),
    )


def _counts(ledger: Ledger, day: date) -> dict[int, int | None]:
    """Association that ended on that day → how many C-STORE requests came over it, None where nobody counted."""
    e = t.event.c
    query = sa.select(e.detail).where(e.name == Event.ASSOCIATION_CLOSED, e.at.startswith(day.isoformat()))
    with ledger.read() as connection:
        return {one["association"]: one.get("stores") for one in connection.scalars(query.order_by(e.id))}


def _recorded(ledger: Ledger, day: date) -> Counter[int]:
    """Association → how many instances the ledger's events say that it brought; all of those that ended on that day."""
    e, a = t.event.c, t.association.c
    with ledger.read() as connection:
        first = connection.scalar(sa.select(sa.func.min(a.opened_at)).where(a.closed_at.startswith(day.isoformat())))
        if first is None:
            return Counter()
        query = sa.select(e.detail["association"].as_integer()).where(e.name.in_(_NAMES), e.at >= first)
        return Counter(connection.scalars(query))


def _stray(ledger: Ledger, spool: Path, day: date) -> tuple[str, ...]:
    """Files that were written on that day and have no row. One that is being stored has its row in a moment."""
    with ledger.read() as connection:
        named = set(connection.scalars(sa.select(t.instance.c.digest)))
    found = []
    for path in sorted(spool.glob("??/*.dcm")):
        if path.stem in named:
            continue
        with suppress(FileNotFoundError):
            written = path.stat().st_mtime
            if datetime.fromtimestamp(written, UTC).date() == day and time.time() - written > _MOMENT_SECONDS:
                found.append(path.stem)
    return tuple(found)


def _is_there(path: Path, digest: str, *, verify: bool) -> bool:
    return path.is_file() and (not verify or is_intact(path, digest))


def _outcomes(ledger: Ledger, digests: list[str]) -> dict[str, str]:
    """Digest → what became of that instance, for those that have a row."""
    i, a, v = t.instance.c, t.analysis.c, t.verdict.c
    found: dict[str, str] = {}
    with ledger.read() as connection:
        wanted = set(digests)
        rows = connection.execute(
            sa.select(i.digest, i.study_id, i.series_instance_uid, i.is_current, i.removed_at, t.study.c.state).join(
                t.study
            )
        )
        instances = [row for row in rows if row.digest in wanted]
        studies = {row.study_id for row in instances}
        analyses = connection.execute(sa.select(t.analysis).where(a.study_id.in_(studies))).mappings().all()
        verdicts = connection.execute(
            sa.select(v.inputs, a.study_id).join(t.analysis).where(a.study_id.in_(studies))
        ).all()
    analysed = {digest for row in verdicts for _, digest in row.inputs}
    for row in instances:
        mine = [one for one in analyses if one["study_id"] == row.study_id]
        if row.digest in analysed:
            found[row.digest] = "analysed"
        elif not row.is_current:
            found[row.digest] = "superseded by other bytes under the same UID"
        elif row.removed_at is not None and row.state != "complete":
            found[row.digest] = _REMOVED
        elif row.state != "complete":
            found[row.digest] = "waiting: its study is not complete"
        elif not mine:
            found[row.digest] = "waiting: its study is complete and nothing was decided on it"
        else:
            outcome = min(_outcome(one, row.series_instance_uid, row.digest) for one in mine)
            # Nobody waits for what was removed: its study came again without it.
            found[row.digest] = _REMOVED if row.removed_at is not None and outcome.startswith("waiting") else outcome
    return found


def _outcome(analysis: sa.RowMapping, series_instance_uid: str, digest: str) -> str:
    """What one package's analysis says of an instance that no verdict rests on."""
    if any(admitted == digest for _, admitted in analysis["inputs"]):
        state = analysis["state"]
        return f"{state}: {analysis['reason']}" if analysis["reason"] else f"waiting: its analysis is {state}"
    for one in analysis["selection"]:
        if one["series_instance_uid"] == series_instance_uid:
            said = "its place is taken by another image" if one["chosen"] else one["reason"]
            return f"set aside: {said}"
    return "waiting: its study was completed without it"
