"""The account of a day: whatever was received lies in the spool, belongs to a study, and has an outcome."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import sqlalchemy as sa

from appliance.events import Event
from appliance.intake.spool import path_of
from appliance.ledger import schema as t
from appliance.ledger.selftest import of_patients
from appliance.ledger.store import Ledger

_REMOVED = "removed by retention before its study came again without it"


@dataclass(frozen=True, slots=True)
class Account:
    """What became of every instance that was offered on one day (UTC), but for those of self-tests.

    Attributes:
        received: C-STORE requests that were answered.
        refused: reason → how many of them got a failure status.
        duplicates: how many were there already, with the same bytes.
        kept: how many different instances the others are, by their digests.
        missing_rows: digests of those without a row in the ledger.
        removed: how many of those retention has removed since; their rows, and so their outcomes, stay.
        missing_files: digests of the others whose file is gone from the spool, or is no longer what was received.
        outcomes: outcome → how many of them have it; each has exactly one.
    """

    day: date
    received: int
    refused: dict[str, int]
    duplicates: int
    kept: int
    missing_rows: tuple[str, ...]
    removed: int
    missing_files: tuple[str, ...]
    outcomes: dict[str, int]

    @property
    def balanced(self) -> bool:
        """Every instance has its row, with its outcome, and its file unless retention removed it."""
        return not self.missing_rows and not self.missing_files


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
    names = (Event.INSTANCE_STORED, Event.INSTANCE_CONFLICT, Event.INSTANCE_DUPLICATE, Event.INSTANCE_REFUSED)
    query = sa.select(e.name, e.detail).where(e.name.in_(names), e.at.startswith(day.isoformat()))
    query = query.where(of_patients(e.study_id))
    with ledger.read() as connection:
        events = connection.execute(query).all()
    kept = sorted({row.detail["digest"] for row in events if row.name in names[:2]})
    states = _outcomes(ledger, kept)
    # A digest that another row still names has its file.
    removed = set(ledger.unnamed_digests(states))
    missing = []
    for number, digest in enumerate(kept, 1):
        if digest in states and digest not in removed and not _is_there(path_of(spool, digest), digest, verify=verify):
            missing.append(digest)
        if on_file is not None:
            on_file(number, len(kept))
    refused = Counter(row.detail["reason"] for row in events if row.name == Event.INSTANCE_REFUSED)
    return Account(
        day=day,
        received=len(events),
        refused=dict(refused.most_common()),
        duplicates=sum(row.name == Event.INSTANCE_DUPLICATE for row in events),
        kept=len(kept),
        missing_rows=tuple(digest for digest in kept if digest not in states),
        removed=len(removed),
        missing_files=tuple(missing),
        outcomes=dict(Counter(states.values()).most_common()),
    )


def _is_there(path: Path, digest: str, *, verify: bool) -> bool:
    if not path.is_file():
        return False
    if not verify:
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == digest


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
