"""The ledger's queries of work items: Unified Procedure Steps of PS3.4 Annex CC.

Whatever a peer asks for that cannot be is a `WorkitemError` with its status, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import sqlalchemy as sa

from appliance.events import Event
from appliance.ledger import schema as t
from appliance.ledger.database import Row, now
from appliance.ledger.subscriptions import Subscriptions
from dicom_io.matching import matches
from dicom_io.workitem import (
    ASSIGNED,
    ASSIGNMENT,
    CANCEL_REQUESTED,
    CANCELED,
    COMPLETED,
    FINAL,
    IN_PROGRESS,
    PRIORITIES,
    PROGRESS_REPORT,
    SCHEDULED,
    STATE_REPORT,
    TRANSITIONS,
    Step,
    WorkitemError,
    changed_step,
    code,
    is_uid,
    lacks_for_end,
    new_step,
    put,
    studies_of,
    tag,
    text,
    values,
)

MAXIMUM_OPEN = 20_000
"""Work items that are not at an end; one more is refused."""
BOX = "scanside"
"""Who made an item that the box itself made."""

_CHANGES = {
    IN_PROGRESS: ("claim", Event.WORKITEM_CLAIMED),
    COMPLETED: ("complete", Event.WORKITEM_COMPLETED),
    CANCELED: ("cancel", Event.WORKITEM_CANCELED),
    SCHEDULED: ("schedule", Event.WORKITEM_UPDATED),
}


def date_time() -> str:
    """Now, as a DICOM DT with its offset from UTC."""
    return datetime.now(UTC).strftime("%Y%m%d%H%M%S.%f+0000")


class Worklist(Subscriptions):
    """The part of the ledger that work items are in."""

    def create_workitem(self, uid: str, given: Mapping[str, Any], by: str, reading: Collection[str] = ()) -> int:
        """N-CREATE (PS3.4 CC.2.5): put a new item on the worklist.

        Args:
            given: its attributes in the DICOM JSON model.
            by: AE title, or whatever the peer is known by.
            reading: codes of work that is the reading of a study; see `Marks.mark_study`.

        Returns:
            0, or the warning that the item was made with modifications (0xB300).

        Raises:
            WorkitemError: an attribute is missing or wrong, there is one with this UID, or there are too many.
        """
        step, completed = new_step(given, uid)
        with self._write() as connection:
            c = t.workitem.c
            if connection.scalar(sa.select(c.id).where(c.uid == uid)) is not None:
                raise WorkitemError(0x0111)
            opened = connection.scalar(sa.select(sa.func.count()).where(c.state.not_in(FINAL))) or 0
            if opened >= MAXIMUM_OPEN:
                raise WorkitemError(0x0213)
            row = self._insert_workitem(connection, uid, step, by)
            marked = self._mark_new(connection, row, reading)
            self._subscribe_new(connection, uid, self._workitem(connection, uid)["step"])
            self._tell_subscribers(connection, uid, STATE_REPORT, self._workitem(connection, uid)["step"])
            return 0xB300 if completed or marked else 0

    def workitem(self, uid: str) -> Row:
        """One item: uid, state, priority, step (without the lock) and the rest of its row.

        Raises:
            WorkitemError: there is none (0xC307).
        """
        with self.read() as connection:
            return self._workitem(connection, uid)

    def update_workitem(
        self, uid: str, given: Mapping[str, Any], transaction_uid: str, by: str, reading: Collection[str] = ()
    ) -> int:
        """N-SET (PS3.4 CC.2.6): replace attributes. Whoever claimed the item must give the lock.

        Args:
            reading: as of `create_workitem`: an item may learn only now which study it is about.

        Raises:
            WorkitemError: there is no such item, it is at an end, the lock is wrong, or a value cannot be.
        """
        with self._write() as connection:
            row = self._workitem(connection, uid)
            right = bool(transaction_uid) and transaction_uid == row["transaction_uid"]
            _next(row["state"], "update" if right else "update without lock")
            step = changed_step(row["step"], given)
            same = {key for key, element in step.items() if row["step"].get(key) == element}
            # A priority that somebody sets is theirs, also if it is the one that the box had given it.
            own = {"raised_from": None} if tag("ScheduledProcedureStepPriority") in given else {}
            self._write_step(connection, row, step, **own)
            self._record(connection, Event.WORKITEM_UPDATED, row, by=by, attributes=len(step) - len(same))
            if self._note_studies(connection, row["id"], step) or _codes(step) != row["codes"]:
                self._mark_new(connection, self._workitem(connection, uid), reading)
                step = self._workitem(connection, uid)["step"]
            reported = (tag("ScheduledProcedureStepPriority"), tag("InputReadinessState"))
            # Of what stands in the end: the box itself may have raised it just now.
            if any(step.get(key) != row["step"].get(key) for key in reported):
                self._tell_subscribers(connection, uid, STATE_REPORT, step)
            if tag("ProcedureStepProgressInformationSequence") in set(given) - same:
                self._tell_subscribers(connection, uid, PROGRESS_REPORT, step)
            if {tag(keyword) for keyword in ASSIGNMENT} & set(given) - same:
                self._tell_subscribers(connection, uid, ASSIGNED, step)
            return 0

    def change_state(self, uid: str, state: str, transaction_uid: str, by: str) -> int:
        """N-ACTION Change UPS State (PS3.4 CC.2.1): claim, complete or cancel.

        A claim brings a lock of its own, any UID; for the others it must be the one that claimed.

        Returns:
            0, or the warning that it is in that state already (0xB304, 0xB306).

        Raises:
            WorkitemError: the table has another answer, or an end lacks what it requires (0xC304).
        """
        if state not in _CHANGES:
            raise WorkitemError(0x0115, f"there is no state {state[:32]!r}")
        action, name = _CHANGES[state]
        with self._write() as connection:
            row = self._workitem(connection, uid)
            right = is_uid(transaction_uid)
            if row["transaction_uid"] is not None and action in ("complete", "cancel"):
                right = transaction_uid == row["transaction_uid"]
            following = _next(row["state"], action if right or action == "schedule" else f"{action} without lock")
            if isinstance(following, int):
                return following
            if following in FINAL and (lacking := lacks_for_end(row["step"], following)):
                raise WorkitemError(0xC304, f"{lacking} is missing")
            lock = {"transaction_uid": transaction_uid} if following == IN_PROGRESS else {}
            self._move_workitem(connection, row, following, name, by, **lock)
            return 0

    def request_cancel(self, uid: str, given: Mapping[str, Any], by: str) -> int:
        """N-ACTION Request UPS Cancel (PS3.4 CC.2.2): cancel what nobody has claimed, or ask whoever has.

        Returns:
            0, or the warning that it is canceled already (0xB304).

        Raises:
            WorkitemError: there is no such item, it is completed, or nobody listens who could cancel it (0xC312).
        """
        wanted = ("ReasonForCancellation", "ProcedureStepDiscontinuationReasonCodeSequence", "ContactURI",
                  "ContactDisplayName")  # fmt: skip
        said = {tag(keyword): given[tag(keyword)] for keyword in wanted if tag(keyword) in given}
        with self._write() as connection:
            row = self._workitem(connection, uid)
            following = _next(row["state"], "request cancel")
            if isinstance(following, int):
                return following
            if following == CANCELED:
                self._cancel_scheduled(connection, row, said, by)
                return 0
            put(said, "RequestingAE", "AE", by[:16])
            if not self._tell_subscribers(connection, uid, CANCEL_REQUESTED, row["step"], said):
                raise WorkitemError(0xC312)
            self._record(connection, Event.WORKITEM_CANCEL_REQUESTED, row, by=by)
            return 0

    def find_workitems(self, keys: Mapping[str, Any], limit: int, offset: int = 0) -> list[Step]:
        """The items that match (PS3.4 CC.2.8), the most urgent first, then the oldest: at most ``limit`` after the
        first ``offset``.
        """
        c = t.workitem.c
        query = sa.select(c.step).order_by(c.rank.desc(), c.id)
        for keyword, column in (
            ("ProcedureStepState", c.state), ("ScheduledProcedureStepPriority", c.priority), ("SOPInstanceUID", c.uid),
        ):  # fmt: skip
            if asked := [one for one in values(keys, keyword) if isinstance(one, str) and one]:
                query = query.where(column.in_(asked))
        with self.read() as connection:
            steps = connection.execution_options(yield_per=200).execute(query).scalars()
            return list(islice((step for step in steps if matches(step, keys)), offset, offset + limit))

    def remove_ended(self, before: str) -> int:
        """Forget items that ended before that time and that nobody holds a deletion lock on; returns how many."""
        c, s = t.workitem.c, t.subscription.c
        locked = sa.select(s.uid).where(s.locked)
        query = sa.select(c.id, c.uid).where(c.state.in_(FINAL), c.changed_at < before, c.uid.not_in(locked)).limit(500)
        with self._write() as connection:
            rows = connection.execute(query).all()
            if rows:
                ids, uids = [row.id for row in rows], [row.uid for row in rows]
                connection.execute(t.workitem_study.delete().where(t.workitem_study.c.workitem_id.in_(ids)))
                connection.execute(t.workitem.delete().where(c.id.in_(ids)))
                connection.execute(t.subscription.delete().where(s.uid.in_(uids)))
                self._append(connection, Event.WORKITEM_REMOVED, None, workitems=len(rows))
            return len(rows)

    def refuse_workitem(self, by: str, what: str, answer: str, reason: str) -> None:
        """Write down that a request was refused."""
        self.log(Event.WORKLIST_REFUSED, by=by, request=what, status=answer, reason=reason)

    # --- within a transaction ---------------------------------------------------------------------------

    def _mark_new(self, connection: sa.Connection, row: Row, reading: Collection[str]) -> bool:
        """What stands against the study of a new item; `Marks` says more."""
        return False

    def _insert_workitem(self, connection: sa.Connection, uid: str, step: Step, by: str) -> Row:
        at = now()
        priority = text(step, "ScheduledProcedureStepPriority")
        result = connection.execute(
            t.workitem.insert().values(
                uid=uid,
                state=SCHEDULED,
                priority=priority,
                rank=PRIORITIES.index(priority),
                codes=_codes(step),
                step=step,
                created_by=by,
                created_at=at,
                changed_at=at,
            )
        )
        key = int(result.inserted_primary_key[0])  # type: ignore[index]
        self._note_studies(connection, key, step)
        row = self._workitem(connection, uid)
        self._record(connection, Event.WORKITEM_CREATED, row, by=by, priority=priority)
        return row

    @staticmethod
    def _note_studies(connection: sa.Connection, key: int, step: Step) -> bool:
        """Write down which studies an item is about; whether that is news."""
        c = t.workitem_study.c
        known = set(connection.scalars(sa.select(c.study_instance_uid).where(c.workitem_id == key)))
        studies = set(studies_of(step))
        connection.execute(
            t.workitem_study.delete().where(c.workitem_id == key, c.study_instance_uid.in_(known - studies))
        )
        for study in sorted(studies - known):
            connection.execute(t.workitem_study.insert().values(workitem_id=key, study_instance_uid=study))
        return bool(studies - known)

    def _write_step(self, connection: sa.Connection, row: Row, step: Step, **columns: Any) -> None:
        priority = text(step, "ScheduledProcedureStepPriority")
        connection.execute(
            t.workitem.update()
            .where(t.workitem.c.id == row["id"])
            .values(
                step=step,
                priority=priority,
                rank=PRIORITIES.index(priority),
                codes=_codes(step),
                changed_at=now(),
                state=text(step, "ProcedureStepState"),
                **columns,
            )
        )

    def _move_workitem(
        self, connection: sa.Connection, row: Row, state: str, name: Event, by: str, **columns: Any
    ) -> None:
        """Write down a state that the table allowed, and report it."""
        step: Step = {**row["step"]}
        put(step, "ProcedureStepState", "CS", state)
        self._write_step(connection, row, step, **columns)
        self._record(connection, name, row, by=by)
        self._tell_subscribers(connection, row["uid"], STATE_REPORT, step)

    def _cancel_scheduled(self, connection: sa.Connection, row: Row, said: Step, by: str) -> None:
        """An item that nobody has claimed goes through IN PROGRESS to CANCELED (PS3.4 CC.2.2.3)."""
        self._move_workitem(connection, row, IN_PROGRESS, Event.WORKITEM_CLAIMED, BOX)
        claimed = self._workitem(connection, row["uid"])
        progress: Step = {key: one for key, one in said.items() if not key.startswith("0074100A")}
        progress.pop(tag("ContactDisplayName"), None)
        put(progress, "ProcedureStepCancellationDateTime", "DT", date_time())
        if not values(progress, "ProcedureStepDiscontinuationReasonCodeSequence"):
            reason = code("110513", "DCM", "Discontinued for unspecified reason")
            put(progress, "ProcedureStepDiscontinuationReasonCodeSequence", "SQ", reason)
        step: Step = {**claimed["step"]}
        put(step, "ProcedureStepProgressInformationSequence", "SQ", progress)
        self._move_workitem(connection, {**claimed, "step": step}, CANCELED, Event.WORKITEM_CANCELED, by)  # type: ignore[arg-type]

    def _record(self, connection: sa.Connection, name: Event, row: Row, **detail: Any) -> None:
        s = t.study.c
        query = (
            sa.select(s.id)
            .join(t.workitem_study, t.workitem_study.c.study_instance_uid == s.study_instance_uid)
            .where(t.workitem_study.c.workitem_id == row["id"])
            .limit(1)
        )
        self._append(connection, name, connection.scalar(query), workitem=row["id"], **detail)


def _codes(step: Step) -> list[str]:
    items = values(step, "ScheduledWorkitemCodeSequence")
    return [f"{text(item, 'CodeValue')}^{text(item, 'CodingSchemeDesignator')}" for item in items]


def _next(state: str, event: str) -> str | int:
    """The state that follows, or a warning.

    Raises:
        WorkitemError: the table has a failure there.
    """
    cell = TRANSITIONS[state, event]
    if isinstance(cell, int) and cell & 0xF000 != 0xB000:
        raise WorkitemError(cell)
    return cell
