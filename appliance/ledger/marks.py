"""What the box itself says on the worklist: it raises or marks the reading of a study, and takes back only its own.

A mark stands for one package's answer on one study of one patient. Every item that is the reading of that study shows
it, also one that comes later, but none that names another patient. With the mode `reprioritise` an item that nobody has
claimed goes to HIGH. What was there before is kept, and comes back when no mark raises the study any more, unless
somebody has set a priority since.
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
    of_patient,
    put,
    text,
    values,
)

Mode = Literal["reprioritise", "suggest"]
RAISED = "HIGH"
PREFIX = "[scanside] "
"""Begins the box's own lines in the comments of an item."""
LATE = "(late)"
"""Stands for a package in the mark that a study has no answer in time; no package is called so."""
MAXIMUM_COMMENT = 10_240  # of an LT, PS3.5 6.2
_MOVED = "the images came again under another Patient ID"
"""Why an item was canceled that the box had made for the wrong patient."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What a verdict says on the worklist.

    Attributes:
        uid: of the finding: the same at every try.
        standing: False takes back what this package said before.
        text: one line for the item's comments; "" for none.
        step: the item to make where the study has none, in the DICOM JSON model, with its SOPInstanceUID; {}: none is.
            Whom it names, the images named.
        moved: it takes back what was said, as the images are another patient's.
    """

    uid: str
    study_instance_uid: str
    package: str
    mode: Mode
    standing: bool
    text: str
    step: Mapping[str, Any]
    moved: bool = False

    @property
    def patient(self) -> tuple[str, str]:
        """Patient ID and its issuer; "" for what is not known."""
        return _named(self.step)


class Marks(Worklist):
    """The part of the ledger that the box's own marks are in."""

    def mark_study(self, mark: Mark, reading: Collection[str]) -> str:
        """Carry a mark out; once more it changes nothing. Returns what was done, in words.

        An item that the box made for another patient, and nobody has claimed, is canceled.

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
            patient_id, issuer = mark.patient
            columns = {"uid": mark.uid, "mode": mark.mode, "standing": mark.standing, "text": mark.text, "done": ""}
            columns |= {"patient_id": patient_id, "issuer_of_patient_id": issuer}
            if known is None:
                key = {"study_instance_uid": mark.study_instance_uid, "package": mark.package}
                connection.execute(t.mark.insert().values(**key, **columns))
            else:
                connection.execute(t.mark.update().where(here).values(**columns))
            found = [row for row in self._readings(connection, mark.study_instance_uid, reading) if not _gone(row)]
            items = [row for row in found if of_patient(row["step"], patient_id, issuer)]
            if not items and mark.standing and mark.step:
                items = [self._make(connection, mark)]
            # Who set a priority after this package had raised the study has the last word.
            raised = known is not None and known["standing"] and known["mode"] == "reprioritise"
            before = (known["patient_id"], known["issuer_of_patient_id"]) if known is not None else mark.patient
            moves = mark.mode == "reprioritise" and not (raised and before in (mark.patient, ("", "")))
            done = [self._show(connection, row, mark, moves=moves) for row in items]
            theirs = {row["id"] for row in items}
            for row in items if mark.moved else [one for one in found if mark.standing and one["id"] not in theirs]:
                if row["created_by"] == BOX and row["state"] == SCHEDULED:
                    self._cancel_own(connection, self._workitem(connection, row["uid"]), _MOVED)
                    done.append(f"item {row['id']} is canceled: {_MOVED}")
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
                ours = other["created_by"] == BOX and other["state"] == SCHEDULED and other["id"] != row["id"]
                if ours and of_patient(row["step"], *_named(other["step"])):
                    self._cancel_own(connection, other, "the hospital's own item has taken its place")
            if self._standing(connection, study, row["step"]):
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

    def _cancel_own(self, connection: sa.Connection, row: Row, reason: str) -> None:
        """Cancel an item that the box made and nobody has claimed."""
        said: Step = {}
        put(said, "ReasonForCancellation", "LT", reason)
        self._cancel_scheduled(connection, row, said, BOX)

    @staticmethod
    def _standing(connection: sa.Connection, study: str, step: Step) -> Sequence[Row]:
        """The marks that stand against a study, of the patient whom an item names."""
        query = sa.select(t.mark).where(t.mark.c.study_instance_uid == study, t.mark.c.standing).order_by(t.mark.c.id)
        rows = connection.execute(query).mappings().all()
        return [one for one in rows if of_patient(step, one["patient_id"], one["issuer_of_patient_id"])]

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
        standing = [one for study in studies for one in self._standing(connection, study, row["step"])]
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


def _named(step: Mapping[str, Any]) -> tuple[str, str]:
    return text(step, "PatientID"), text(step, "IssuerOfPatientID")


def _gone(row: Row) -> bool:
    """The box canceled it, as it was for another patient: should the images be that one's again, it makes another."""
    progress = values(row["step"], "ProcedureStepProgressInformationSequence")
    return row["created_by"] == BOX and any(text(one, "ReasonForCancellation") == _MOVED for one in progress)


def _comment(step: Step, lines: Sequence[str]) -> None:
    """Put the box's lines before what others wrote, in place of its earlier ones."""
    before = text(step, "CommentsOnTheScheduledProcedureStep").splitlines()
    theirs = [line for line in before if not line.startswith(PREFIX)]
    ours = [f"{PREFIX}{line}" for line in lines]
    said = "\r\n".join([*ours, *theirs])[:MAXIMUM_COMMENT]
    put(step, "CommentsOnTheScheduledProcedureStep", "LT", *([said] if said else []))
