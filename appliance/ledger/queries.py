"""The ledger's part in asking a modality worklist: which studies are to be asked about, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from appliance.events import Event
from appliance.ledger import schema as t
from appliance.ledger.database import later, now
from appliance.ledger.orders import NewMessage, Orders

WAITING, FOUND, NONE, FAILED = "waiting", "found", "none", "failed"
MOST_STUDIES = 20
"""So many are asked about on one association."""

LONGEST_PAUSE = 60.0
"""No question waits longer than so many seconds for its next try, even if the clock was set back."""


@dataclass(frozen=True, slots=True)
class Unasked:
    """A study whose order is not known from the worklist yet; reason: what came of asking so far."""

    study_id: int
    study_instance_uid: str
    reason: str = ""


class Queries(Orders):
    """The part of the ledger that questions to a modality worklist are in."""

    def unasked_studies(self, since: int, give_up_seconds: float) -> list[Unasked]:
        """Studies to ask about now, the newest first; those of self-tests are nobody's order.

        Args:
            since: of those after that one, which `too_old_to_ask` tells.
            give_up_seconds: of those whose first image is not older than that.
        """
        s, q = t.study.c, t.order_query.c
        due = (q.due_at <= now()) | (q.due_at > later(LONGEST_PAUSE))
        query = (
            sa.select(s.id, s.study_instance_uid, q.reason)
            .outerjoin(t.order_query, q.study_id == s.id)
            .where(
                s.id > since,
                s.first_instance_at > later(-give_up_seconds),
                sa.or_(q.state.is_(None), sa.and_(q.state == WAITING, due)),
                s.study_instance_uid.not_in(sa.select(t.selftest.c.study_instance_uid)),
            )
            .order_by(s.id.desc())
            .limit(MOST_STUDIES)
        )
        with self.read() as connection:
            return [Unasked(row.id, row.study_instance_uid, row.reason or "") for row in connection.execute(query)]

    def too_old_to_ask(self, since: int, give_up_seconds: float) -> int:
        """The newest study that is too old to be asked about: those before it need not be looked at again.

        Args:
            since: what this told before.
        """
        s = t.study.c
        query = sa.select(sa.func.max(s.id)).where(s.id > since, s.first_instance_at <= later(-give_up_seconds))
        with self.read() as connection:
            return int(connection.scalar(query) or since)

    def take_scheduled(self, study_id: int, new: NewMessage) -> None:
        """Write down what the worklist said of a study's order, with all that it changes, in one transaction."""
        with self._write() as connection:
            self._take(connection, new)
            self._note_query(connection, study_id, FOUND, "", 0.0)
            self._append(connection, Event.ORDER_FOUND, study_id)

    def asked_in_vain(
        self, studies: Sequence[int], reason: str, pause_seconds: float, *, answered: bool = False
    ) -> None:
        """Note that nothing came of asking about studies; each is asked about again after a pause.

        Args:
            answered: the worklist answered, and has nothing.
        """
        with self._write() as connection:
            for study_id in studies:
                self._note_query(connection, study_id, WAITING, reason, pause_seconds, answered=answered)

    def give_up_asking(self, give_up_seconds: float) -> list[Unasked]:
        """Ask no more about studies whose first image is older; each is an event, and returned with the reason."""
        q, s = t.order_query.c, t.study.c
        query = (
            sa.select(q.study_id, s.study_instance_uid, q.reason, q.answered)
            .join(t.study, s.id == q.study_id)
            .where(q.state == WAITING, s.first_instance_at <= later(-give_up_seconds))
        )
        with self.read() as connection:
            if connection.execute(query.limit(1)).first() is None:
                return []
        with self._write() as connection:
            rows = connection.execute(query).all()
            for row in rows:
                state = NONE if row.answered else FAILED
                connection.execute(t.order_query.update().where(q.study_id == row.study_id).values(state=state))
                name = Event.ORDER_NOT_FOUND if row.answered else Event.ORDER_UNANSWERED
                self._append(connection, name, row.study_id, reason=row.reason)
        return [Unasked(row.study_id, row.study_instance_uid, row.reason) for row in rows]

    def query_state(self, study_id: int) -> tuple[str, str] | None:
        """What came of asking a modality worklist about a study: waiting, found, none or failed; and the reason."""
        q = t.order_query.c
        with self.read() as connection:
            row = connection.execute(sa.select(q.state, q.reason).where(q.study_id == study_id)).first()
            return None if row is None else (str(row.state), str(row.reason))

    @staticmethod
    def _note_query(
        connection: sa.Connection,
        study_id: int,
        state: str,
        reason: str,
        pause_seconds: float,
        *,
        answered: bool = False,
    ) -> None:
        c = t.order_query.c
        values = {"state": state, "reason": reason, "answered": answered, "due_at": later(pause_seconds)}
        changed = connection.execute(t.order_query.update().where(c.study_id == study_id).values(**values))
        if not changed.rowcount:
            connection.execute(t.order_query.insert().values(study_id=study_id, **values))
