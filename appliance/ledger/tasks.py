"""The ledger's part in work that the box takes from somebody else's worklist: what it claims, and how that ends.

The Transaction UID of a claim is written here before anybody is asked, and a state before it is told. So whatever is
done again after a death is the same request, and the worklist's own answer says whether it was heard before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from appliance.events import Event
from appliance.ledger import schema as t
from appliance.ledger.database import Database, Row, now
from appliance.ledger.states import TASK, step
from dicom_io.workitem import Step

OPEN = ("claiming", "claimed", "finishing")


@dataclass(frozen=True, slots=True)
class Task:
    """One step of somebody else's worklist.

    Attributes:
        uid: its SOP Instance UID; transaction_uid: our lock.
        code: the Scheduled Workitem Code by which it is ours, an item of a code sequence.
        final: COMPLETED or CANCELED once that is decided, else "".
        changes: what is written into the step before it ends.
        reason: why it is canceled or lost, or the last thing that went wrong.
        claimed_at: when the claim was granted, "" before.
    """

    id: int
    uid: str
    study_id: int
    transaction_uid: str
    state: str
    code: Step
    final: str
    changes: Step
    reason: str
    claimed_at: str


class Tasks(Database):
    """The part of the ledger that tasks are in."""

    def begin_task(self, uid: str, study_id: int, transaction_uid: str, code: Step) -> Task | None:
        """Write down that a step is about to be claimed for a study; None if that was done before."""
        c = t.task.c
        with self._write() as connection:
            if connection.scalar(sa.select(c.id).where(c.uid == uid)) is not None:
                return None
            values: dict[str, Any] = {
                "uid": uid,
                "study_id": study_id,
                "transaction_uid": transaction_uid,
                "state": step(TASK, "", "begin"),
                "code": code,
                "final": "",
                "changes": {},
                "reason": "",
                "claimed_at": "",
                "changed_at": now(),
            }
            key = int(connection.execute(t.task.insert().values(**values)).inserted_primary_key[0])  # type: ignore[index]
            self._append(connection, Event.TASK_FOUND, study_id, task=key, uid=uid)
        return self.task(uid)

    def task(self, uid: str) -> Task | None:
        """The task of a step; None if it was never ours."""
        with self.read() as connection:
            row = connection.execute(sa.select(t.task).where(t.task.c.uid == uid)).mappings().first()
            return None if row is None else _task(row)

    def open_tasks(self) -> list[Task]:
        """What is claimed, or about to be, and has not ended; oldest first."""
        c = t.task.c
        query = sa.select(t.task).where(c.state.in_(OPEN)).order_by(c.id)
        with self.read() as connection:
            return [_task(row) for row in connection.execute(query).mappings()]

    def tasks_of(self, study_id: int) -> list[Task]:
        """The tasks of a study, oldest first."""
        query = sa.select(t.task).where(t.task.c.study_id == study_id).order_by(t.task.c.id)
        with self.read() as connection:
            return [_task(row) for row in connection.execute(query).mappings()]

    def task_claimed(self, task: Task) -> None:
        """The worklist says that it is ours."""
        self._move_task(task, "claim", Event.TASK_CLAIMED, claimed_at=now(), reason="")

    def finish_task(self, task: Task, final: str, changes: Step, reason: str) -> None:
        """Decide how a task ends, before the worklist is told.

        Args:
            changes: what is written into the step first; the same at every try.
        """
        self._move_task(task, "finish", Event.TASK_FINISHING, final=final, changes=changes, reason=reason)

    def task_ended(self, task: Task) -> None:
        """The worklist has it as COMPLETED or CANCELED."""
        done = task.final == "COMPLETED"
        name = Event.TASK_COMPLETED if done else Event.TASK_CANCELED
        self._move_task(task, "complete" if done else "cancel", name, **({"reason": ""} if done else {}))

    def lose_task(self, task: Task, reason: str) -> None:
        """It is somebody else's, or gone."""
        self._move_task(task, "lose", Event.TASK_LOST, reason=reason)

    def note_task(self, task: Task, reason: str) -> bool:
        """Note what went wrong with a task that is tried again; whether that is news."""
        c = t.task.c
        with self._write() as connection:
            noted = t.task.update().where(c.id == task.id, c.reason != reason).values(reason=reason)
            return bool(connection.execute(noted).rowcount)

    # --- what was raised there --------------------------------------------------------------------------

    def raised_step(self, destination: str, uid: str, package: str) -> tuple[str, str] | None:
        """The priority of a step before a package raised it, and the finding that did; None if it did not."""
        c = t.raised_step.c
        query = sa.select(c.before, c.mark).where(c.destination == destination, c.uid == uid, c.package == package)
        with self.read() as connection:
            row = connection.execute(query).first()
            return None if row is None else (str(row.before), str(row.mark))

    def raised_by_others(self, destination: str, uid: str, package: str) -> str:
        """The priority from which another package has raised a step; "" if none has."""
        c = t.raised_step.c
        query = sa.select(c.before).where(c.destination == destination, c.uid == uid, c.package != package).limit(1)
        with self.read() as connection:
            return str(connection.scalar(query) or "")

    def remember_raised(self, destination: str, uid: str, package: str, before: str, mark: str) -> None:
        """Write down that a step is about to be raised; what is known of it already stays."""
        if self.raised_step(destination, uid, package) is None:
            values = {"destination": destination, "uid": uid, "package": package, "before": before, "mark": mark}
            with self._write() as connection:
                connection.execute(t.raised_step.insert().values(**values))

    def forget_raised(self, destination: str, uid: str, package: str) -> None:
        """A step is raised no more."""
        c = t.raised_step.c
        with self._write() as connection:
            connection.execute(
                t.raised_step.delete().where(c.destination == destination, c.uid == uid, c.package == package)
            )

    def _move_task(self, task: Task, what: str, name: Event, **columns: Any) -> None:
        c = t.task.c
        with self._write() as connection:
            state = step(TASK, str(connection.scalar(sa.select(c.state).where(c.id == task.id))), what)
            connection.execute(t.task.update().where(c.id == task.id).values(state=state, changed_at=now(), **columns))
            detail = {key: columns[key] for key in ("final", "reason") if columns.get(key)}
            self._append(connection, name, task.study_id, task=task.id, **detail)


def _task(row: Row) -> Task:
    return Task(**{name: row[name] for name in Task.__slots__})
