"""The decisions of the site's board in the ledger: events like any other, told apart by their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from appliance.events import Event
from appliance.ledger import schema as t
from appliance.ledger.database import Database, Row
from appliance.ledger.states import DELIVERY, step

DECISIONS = (
    Event.BOARD_APPROVED,
    Event.BOARD_SUSPENDED,
    Event.BOARD_RETIRED,
    Event.BOARD_EXCEPTED,
    Event.BOARD_REVOKED,
)
_STOPS = (Event.BOARD_SUSPENDED, Event.BOARD_RETIRED)


class BoardMoved(Exception):
    """The board decided something since it was last looked at."""


class BoardRecords(Database):
    """The part of the ledger that the board works with."""

    def record_decision(self, name: Event, package: str, **detail: Any) -> int:
        """Append a decision on a package; returns its number.

        With a suspension or retirement, what waits to be sent of the package is withdrawn in the same transaction.
        """
        with self._write() as connection:
            number = self._append(connection, name, None, package=package, **detail)
            if name in _STOPS:
                self._withdraw(connection, t.analysis.c.package == package, self._said(name, number, detail["who"]))
            return number

    def decisions(self) -> Sequence[Row]:
        """Every decision, oldest first: id, at, name, detail."""
        c = t.event.c
        query = sa.select(c.id, c.at, c.name, c.detail).where(c.name.in_(DECISIONS)).order_by(c.id)
        with self.read() as connection:
            return connection.execute(query).mappings().all()

    def last_decision(self) -> int:
        """The number of the newest decision; 0 if there is none."""
        with self.read() as connection:
            return self._last_decision(connection)

    @staticmethod
    def _last_decision(connection: sa.Connection) -> int:
        # The newest of each name: five looks into the index of names, however many events there are.
        c = t.event.c
        newest = (sa.select(sa.func.max(c.id).label("id")).where(c.name == name) for name in DECISIONS)
        return int(connection.scalar(sa.select(sa.func.max(sa.union_all(*newest).subquery().c.id))) or 0)

    def _stopped(self, connection: sa.Connection, package: str) -> str:
        """Why nothing of a package is sent: the decision that stopped it, if it is the newest on it; else ''."""
        c = t.event.c
        query = sa.select(c.id, c.name, c.detail).where(c.name.in_((Event.BOARD_APPROVED, *_STOPS)))
        for row in connection.execute(query.order_by(c.id.desc())):
            if row.detail.get("package") == package:
                return self._said(row.name, row.id, row.detail.get("who", "")) if row.name in _STOPS else ""
        return ""

    @staticmethod
    def _said(name: str, number: int, who: str) -> str:
        return f"the package was {name.removeprefix('board.')} by {who} (record {number})"

    def _withdraw(self, connection: sa.Connection, condition: sa.ColumnElement[bool], reason: str) -> int:
        """Take pending deliveries back; returns how many. What tells that an alert does not hold still goes."""
        d, f = t.delivery.c, t.finding.c
        query = (
            sa.select(d.id, d.destination, d.state, f.object, t.analysis.c.study_id)
            .select_from(t.delivery.join(t.finding).join(t.verdict).join(t.analysis))
            .where(condition, d.state == "pending", t.verdict.c.positive | ~f.object.startswith("alert."))
            .order_by(d.id)
        )
        rows = connection.execute(query).all()
        for row in rows:
            state = step(DELIVERY, row.state, "withdraw")
            connection.execute(t.delivery.update().where(d.id == row.id).values(state=state, reason=reason))
            self._append(
                connection,
                Event.DELIVERY_WITHDRAWN,
                row.study_id,
                delivery=row.id,
                object=row.object,
                destination=row.destination,
                reason=reason,
            )
        return len(rows)
