"""The decisions of the site's board in the ledger: events like any other, told apart by their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from appliance.events import Event
from appliance.ledger import schema as t
from appliance.ledger.contradiction import takes_back
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

# The newest of each name: five looks into the index of names, however many events there are.
_NEWEST = (sa.select(sa.func.max(t.event.c.id).label("id")).where(t.event.c.name == name) for name in DECISIONS)
_LAST = sa.select(sa.func.max(sa.union_all(*_NEWEST).subquery().c.id))


VERSION = t.verdict.c.result["package_version"].as_string().label("version")
"""The version of the package that a verdict is of."""


def _stop(name: str, number: int, detail: Mapping[str, Any]) -> str:
    """Why nothing is sent after a decision; '' if it stops nothing."""
    if name in _STOPS:
        return f"the package was {name.removeprefix('board.')} by {detail.get('who', '')} (record {number})"
    if name == Event.BOARD_APPROVED and detail.get("mode") == "shadow":
        return f"the package was put in shadow by {detail.get('who', '')} (record {number})"
    return ""


def _whole(name: str, detail: Mapping[str, Any]) -> bool:
    """Whether a decision is of a package in every version: a suspension, but for one that names a version alone."""
    return name == Event.BOARD_SUSPENDED and bool(detail.get("digest") or not detail.get("version"))


class BoardMoved(Exception):
    """The board decided something since it was last looked at."""


class BoardRecords(Database):
    """The part of the ledger that the board works with."""

    def record_decision(self, name: Event, package: str, **detail: Any) -> int:
        """Append a decision on a package; returns its number.

        What waits to be sent of a package that is suspended, or of a version that is suspended alone, retired, or from
        now on in shadow, is withdrawn in the same transaction.
        """
        with self._write() as connection:
            number = self._append(connection, name, None, package=package, **detail)
            stopped = _stop(name, number, detail)
            if stopped:
                condition = t.analysis.c.package == package
                if not _whole(name, detail):
                    condition &= VERSION.element == detail["version"]
                self._withdraw(connection, condition, stopped)
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
        return int(connection.scalar(_LAST) or 0)

    @staticmethod
    def stopped(connection: sa.Connection, package: str, version: str) -> str:
        """Why nothing of a version is sent: the newest decision that concerns it, if that stopped it; else ''."""
        c = t.event.c
        query = sa.select(c.id, c.name, c.detail).where(c.name.in_((Event.BOARD_APPROVED, *_STOPS))).order_by(c.id)
        stopped, retired = "", set()
        for row in connection.execute(query):
            said = row.detail
            if said.get("package") != package:
                continue
            if not _whole(row.name, said) and said.get("version") != version:
                continue
            if row.name == Event.BOARD_RETIRED:
                retired.add(said.get("digest"))
            if row.name != Event.BOARD_APPROVED or said.get("digest") not in retired:
                stopped = _stop(row.name, row.id, said)
        return stopped

    def _withdraw(self, connection: sa.Connection, condition: sa.ColumnElement[bool], reason: str) -> int:
        """Take pending deliveries back, because their package was stopped; returns how many.

        What tells that an alert or an object does not hold which somebody has still goes.
        """
        d, f = t.delivery.c, t.finding.c
        query = (
            sa.select(d.id, d.destination, d.state, f.object, t.analysis.c.study_id)
            .select_from(t.delivery.join(t.finding).join(t.verdict).join(t.analysis))
            .where(condition, d.state.in_(("pending", "held")))
            .where(t.verdict.c.positive | ~(f.object.startswith("alert.") | f.object.startswith("worklist.")))
            .order_by(d.id)
        )
        rows = [row for row in connection.execute(query).mappings().all() if not takes_back(connection, row["id"])]
        for row in rows:
            self._take_away(connection, row, reason)
        return len(rows)

    def _take_away(self, connection: sa.Connection, row: Row, reason: str) -> None:
        """Withdraw a delivery that has not left.

        Args:
            row: its id, state, object, destination and study_id.
        """
        state = step(DELIVERY, row["state"], "withdraw")
        connection.execute(t.delivery.update().where(t.delivery.c.id == row["id"]).values(state=state, reason=reason))
        self._append(
            connection,
            Event.DELIVERY_WITHDRAWN,
            row["study_id"],
            delivery=row["id"],
            object=row["object"],
            destination=row["destination"],
            reason=reason,
        )
