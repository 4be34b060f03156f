"""The chain of events: whether every event is there, and is what was written.

Each hash covers its event and the hash before it, so a changed or removed event shows at the one after it. That the end
was cut off, or all hashes made anew, shows only to somebody who noted an earlier head elsewhere (`Head`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from appliance.ledger import schema as t
from appliance.ledger.database import Database, Row, event_hash

CHUNK = 1000
"""Events that are checked at a time; some 20 ms."""

_LEAST = -(2**63)
"""The least number that SQLite can give a row."""
_SELECT = "SELECT id, at, monotonic_ns, boot, name, study_id, detail, hash FROM event "


@dataclass(frozen=True, slots=True)
class Head:
    """An event by its number, and its hash; number 0 stands before the first."""

    event: int = 0
    hash: str = ""


@dataclass(frozen=True, slots=True)
class Fault:
    """The first event that is wrong: its number, its name (empty where it is gone), and what differs."""

    event: int
    name: str
    what: str

    def __str__(self) -> str:
        return f"event {self.event}{f' ({self.name})' if self.name else ''}: {self.what}"


class Walk:
    """A way along the chain from its beginning, a piece at a time; what came since is the next piece.

    Args:
        noted: heads that were noted elsewhere.
    """

    def __init__(self, ledger: Database, noted: Collection[Head] = ()) -> None:
        self._ledger = ledger
        self._noted: dict[int, set[str]] = {}
        for head in noted:
            self._noted.setdefault(head.event, set()).add(head.hash)
        self.head = Head()

    def advance(self, limit: int = CHUNK) -> tuple[int, Fault | None]:
        """Check the next events; how many there were (fewer than `limit`: it is the end), and the first that is wrong.

        Where it stood, it looks again, so that it sees an end that was cut off behind it.
        """
        first = self.head.event or _LEAST
        with self._ledger.read() as connection:
            rows = connection.exec_driver_sql(f"{_SELECT} WHERE id >= ? ORDER BY id LIMIT ?", (first, limit + 1)).all()
        if self.head.event:
            if not rows or rows[0].id != self.head.event:
                return 0, Fault(self.head.event, "", "it was here, and is gone")
            if rows[0].hash != self.head.hash:
                return 0, Fault(rows[0].id, rows[0].name, "it is another than the one that was here")
            rows = rows[1:]
        rows = rows[:limit]
        for place, row in enumerate(rows):
            if fault := self._check(row, rows[place + 1 : place + 2]):
                return place, fault
            self.head = Head(row.id, row.hash)
        if len(rows) < limit and (last := max(self._noted, default=0)) > self.head.event:
            gone = f"it and all up to event {last}, which was noted elsewhere, are gone: the end was cut off"
            return len(rows), Fault(self.head.event + 1, "", gone)
        return len(rows), None

    def _check(self, row: Any, following: Sequence[Any]) -> Fault | None:
        if row.id != self.head.event + 1:
            gone = f"it is gone; event {row.id} is the next" if row.id > 1 else "there cannot be such an event"
            return Fault(self.head.event + 1, "", gone)
        found = _hash(self.head.hash, row)
        if found is None:
            return Fault(row.id, row.name, "what it says cannot be read")
        if found != row.hash:
            if following and following[0].hash == _hash(found, following[0]):
                return Fault(row.id, row.name, f"its hash was changed: it is {row.hash}, and was {found}")
            if following and following[0].hash == _hash(row.hash, following[0]):
                return Fault(row.id, row.name, f"what it says was changed: that gives {found}, its hash is {row.hash}")
            said = f"it does not follow from event {self.head.event}: that gives {found}, its hash is {row.hash}"
            return Fault(row.id, row.name, f"{said}; one of the two was changed")
        for other in sorted(self._noted.get(row.id, {row.hash}) - {row.hash}):
            said = f"its hash is {row.hash}, and {other} was noted elsewhere: from here, or from an earlier event, on"
            return Fault(row.id, row.name, f"{said}, all hashes were made anew")
        return None


def _hash(previous: str, row: Any) -> str | None:
    """The hash that a row must have; None if it holds what cannot be read."""
    try:
        body = {
            "at": row.at,
            "monotonic_ns": row.monotonic_ns,
            "boot": row.boot,
            "name": row.name,
            "study_id": row.study_id,
            "detail": json.loads(row.detail),
        }
        return event_hash(previous, body)
    except (TypeError, ValueError, RecursionError):
        return None


def walk_all(ledger: Database, noted: Collection[Head] = ()) -> tuple[Head, Fault | None]:
    """Check the whole chain: the last event that is right, and the first that is wrong."""
    walk = Walk(ledger, noted)
    while True:
        count, fault = walk.advance()
        if fault or count < CHUNK:
            return walk.head, fault


def named(ledger: Database, names: Collection[str]) -> tuple[dict[int, str], Fault | None]:
    """Check the events of these names: their hashes by their numbers, and the first that is not what was written."""
    places = ", ".join("?" * len(names))
    with ledger.read() as connection:
        rows = connection.exec_driver_sql(
            "SELECT e.id, e.at, e.monotonic_ns, e.boot, e.name, e.study_id, e.detail, e.hash, p.hash AS previous "
            f"FROM event e LEFT JOIN event p ON p.id = e.id - 1 WHERE e.name IN ({places}) ORDER BY e.id",
            tuple(map(str, names)),
        ).all()
    for row in rows:
        found = _hash(row.previous or "", row)
        if found != row.hash:
            said = f"it, or the event before it, was changed: together they give {found}, its hash is {row.hash}"
            return {}, Fault(row.id, row.name, said)
    return {row.id: row.hash for row in rows}, None


def glance(ledger: Database, noted: Collection[Head] = ()) -> Fault | None:
    """Check in milliseconds that no event is missing, and that the noted heads are there."""
    c = t.event.c
    with ledger.read() as connection:
        count, first, last = connection.execute(
            sa.select(sa.func.count(), sa.func.min(c.id), sa.func.max(c.id)).select_from(t.event)
        ).one()
        for head in noted:
            row = connection.execute(sa.select(c.name, c.hash).where(c.id == head.event)).first()
            if row is None:
                return Fault(head.event, "", f"it was noted elsewhere, and is gone; the last event is {last or 0}")
            if row.hash != head.hash:
                return Fault(head.event, row.name, f"its hash is {row.hash}, and {head.hash} was noted elsewhere")
        if not count or (first == 1 and last == count):
            return None
        gap = 1
        if first == 1:
            gap = connection.exec_driver_sql(
                "SELECT min(id) + 1 FROM event e WHERE NOT EXISTS (SELECT 1 FROM event n WHERE n.id = e.id + 1)"
            ).scalar_one()
    return Fault(gap, "", f"there are {count} events, numbered from {first} to {last}, but not this one")


def newest(ledger: Database, names: Collection[str]) -> tuple[Row | None, int]:
    """The newest event of these names, and how many events there are of any."""
    c = t.event.c
    query = sa.select(t.event).where(c.name.in_(names)).order_by(c.id.desc()).limit(1)
    with ledger.read() as connection:
        found = connection.execute(query).mappings().first()
        return found, int(connection.scalar(sa.select(sa.func.max(c.id))) or 0)
