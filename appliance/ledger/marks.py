"""What the box itself says on the worklist: it raises or marks the reading of a study, and takes back only its own.

A mark stands for one package's answer on one study. Every item that is the reading of that study shows it, also one
that comes later. With the mode `reprioritise` an item that nobody has claimed goes to HIGH. What was there before is
kept, and comes back when no mark raises the study any more, unless somebody has set a priority since.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from appliance.events import Event
from appliance.ledger import schema as t
from appliance.ledger.database import Row
from appliance.ledger.worklist import BOX, Worklist
from dicom_io.workitem import (
    CANCELED,
    FINAL,
    SCHEDULED,
    STATE_REPORT,
    Step,
    new_step,
    put,
    text,
)

Mode = Literal["reprioritise", "suggest"]
RAISED = "HIGH"
PREFIX = "[scanside] "
"""Begins the box's own lines in the comments of an item."""
LATE = "(late)"
"""Stands for a package in the mark that a study has no answer in time; no package is called so."""
MAXIMUM_COMMENT = 10_240  # of an LT, PS3.5 6.2


@dataclass(frozen=True, slots=True)
class Mark:
    """What a verdict says on the worklist.

    Attributes:
        uid: of the finding: the same at every try.
        standing: False takes back what this package said before.
        text: one line for the item's comments; "" for none.
        step: the item to make where the study has none, in the DICOM JSON model, with its SOPInstanceUID; {}: none is.
    """

    uid: str
    study_instance_uid: str
    package: str
    mode: Mode
    standing: bool
    text: str
    step: Mapping[str, Any]


class Marks(Worklist):
    """The part of the ledger that the box's own marks are in."""

    def mark_study(self, mark: Mark, reading: Collection[str]) -> str:
        """Carry a mark out; once more it changes nothing. Returns what was done, in words.

        Args:
            reading: codes, as "110005^DCM", of the work that is the reading of a study. An item without any code
                counts, too.
        """
        m = t.mark.c
        with self._write() as connection:
            here = (m.study_instance_uid == mark.study_instance_uid) & (m.package == mark.package)
            known = connection.execute(sa.select(t.mark).where(here)).mappings().first()
            if known is not None and known["uid"] == mark.uid:
                return str(known["done"])
            columns = {"uid": mark.uid, "mode": mark.mode, "standing": mark.standing, "text": mark.text, "done": ""}
            if known is None:
                key = {"study_instance_uid": mark.study_instance_uid, "package": mark.package}
                connection.execute(t.mark.insert().values(**key, **columns))
            else:
                connection.execute(t.mark.update().where(here).values(**columns))
            items = self._readings(connection, mark.study_instance_uid, reading)
            if not items and mark.standing and mark.step:
                items = [self._make(connection, mark)]
            # Who set a priority after this package had raised the study has the last word.
            moves = not (known is not None and known["standing"] and known["mode"] == "reprioritise")
            done = [self._show(connection, row, mark, moves=moves and mark.mode == "reprioritise") for row in items]
            said = "; ".join(done) or "the worklist has no item of this study"
            connection.execute(t.mark.update().where(here).values(done=said))
            return said

    def marked_late(self) -> set[str]:
        """The Study Instance UIDs of the studies that are marked as without an answer in time."""
        m = t.mark.c
        with self.read() as connection:
            return set(connection.scalars(sa.select(m.study_instance_uid).where(m.package == LATE, m.standing)))

    def _make(self, connection: sa.Connection, mark: Mark) -> Row:
        uid = text(mark.step, "SOPInstanceUID")
        step, _ = new_step({key: one for key, one in mark.step.items() if key not in ("00080016", "00080018")}, uid)
        self._insert_workitem(connection, uid, step, BOX)
        self._subscribe_new(connection, uid, step)
        return self._workitem(connection, uid)

    def _mark_new(self, connection: sa.Connection, row: Row, reading: Collection[str]) -> bool:
        """A new item shows what stands against its study; one that the box made for want of it goes."""
        studies = connection.scalars(
            sa.select(t.workitem_study.c.study_instance_uid).where(t.workitem_study.c.workitem_id == row["id"])
        ).all()
        if not _is_reading(row, reading):
            return False
        changed = False
        for study in studies:
            for other in self._readings(connection, study, reading):
                if other["created_by"] == BOX and other["state"] == SCHEDULED and other["id"] != row["id"]:
                    said: Step = {}
                    put(said, "ReasonForCancellation", "LT", "the hospital's own item has taken its place")
                    self._cancel_scheduled(connection, other, said, BOX)
            if any(one["standing"] for one in self._standing(connection, study)):
                changed = True
                self._show(connection, self._workitem(connection, row["uid"]), None, moves=True)
        return changed

    @staticmethod
    def _readings(connection: sa.Connection, study: str, reading: Collection[str]) -> list[Row]:
        """The items of a study that are its reading."""
        query = (
            sa.select(t.workitem)
            .join(t.workitem_study)
            .where(t.workitem_study.c.study_instance_uid == study)
            .order_by(t.workitem.c.id)
        )
        rows = connection.execute(query).mappings().all()
        return [row for row in rows if _is_reading(row, reading)]

    @staticmethod
    def _standing(connection: sa.Connection, study: str) -> Sequence[Row]:
        query = sa.select(t.mark).where(t.mark.c.study_instance_uid == study, t.mark.c.standing).order_by(t.mark.c.id)
        return connection.execute(query).mappings().all()

    def _show(self, connection: sa.Connection, row: Row, mark: Mark | None, *, moves: bool) -> str:
        """Bring one item to what stands against its studies; returns what was done to it.

        Args:
            mark: what has changed; None: the item is new.
            moves: whether it may be raised.
        """
        number = f"item {row['id']}"
        if row["state"] in FINAL:
            ended = "canceled" if row["state"] == CANCELED else "completed"
            return f"{number} is {ended} and stays as it is"
        studies = connection.scalars(
            sa.select(t.workitem_study.c.study_instance_uid).where(t.workitem_study.c.workitem_id == row["id"])
        ).all()
        standing = [one for study in studies for one in self._standing(connection, study)]
        step: Step = {**row["step"]}
        taken_back = [mark.text] if mark is not None and not mark.standing and mark.text else []
        _comment(step, [*(one["text"] for one in standing), *taken_back])
        before, raised_from, done = row["priority"], row["raised_from"], "marked"
        raises = [one for one in standing if one["mode"] == "reprioritise"]
        if row["state"] != SCHEDULED:
            done = "marked; somebody has claimed it"
        elif raises and moves and before != RAISED:
            put(step, "ScheduledProcedureStepPriority", "CS", RAISED)
            raised_from, done = before, f"raised from {before} to {RAISED}"
        elif not raises and raised_from is not None:
            put(step, "ScheduledProcedureStepPriority", "CS", raised_from)
            done, raised_from = f"back from {before} to {raised_from}", None
        elif raises:
            done = f"marked; it is {before} already" if before == RAISED else "marked"
        if step == row["step"]:
            return f"{number}: nothing to change"
        self._write_step(connection, row, step, raised_from=raised_from)
        after = text(step, "ScheduledProcedureStepPriority")
        self._record(connection, Event.WORKITEM_MARKED, row, priority=after, before=before, done=done)
        if mark is not None:
            self._tell_subscribers(connection, row["uid"], STATE_REPORT, step)
        return f"{number}: {done}"


def _is_reading(row: Row, reading: Collection[str]) -> bool:
    # What the box made is, whatever code a site's readings have.
    return row["created_by"] == BOX or not row["codes"] or any(one in reading for one in row["codes"])


def _comment(step: Step, lines: Sequence[str]) -> None:
    """Put the box's lines before what others wrote, in place of its earlier ones."""
    before = text(step, "CommentsOnTheScheduledProcedureStep").splitlines()
    theirs = [line for line in before if not line.startswith(PREFIX)]
    ours = [f"{PREFIX}{line}" for line in lines]
    said = "\r\n".join([*ours, *theirs])[:MAXIMUM_COMMENT]
    put(step, "CommentsOnTheScheduledProcedureStep", "LT", *([said] if said else []))
