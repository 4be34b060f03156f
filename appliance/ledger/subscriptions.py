"""The ledger's queries of who listens to work items, and what each has yet to hear (PS3.4 CC.2.3 and CC.2.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from appliance.events import Event
from appliance.ledger import schema as t
from appliance.ledger.database import Database, Row, now
from dicom_io.matching import matches
from dicom_io.workitem import (
    FILTERED,
    GLOBAL,
    SCP_STATUS,
    STATE_REPORT,
    WorkitemError,
    event_report,
)

WELL_KNOWN = (GLOBAL, FILTERED)
MAXIMUM_WAITING = 2000
"""More reports are not kept for a subscriber that does not listen; the oldest go."""
MAXIMUM_SUBSCRIBERS = 256
"""AE titles that may be subscribed at a time."""


class Subscriptions(Database):
    """The part of the ledger that subscriptions and reports of events are in."""

    def subscribe(self, ae_title: str, uid: str, *, locked: bool, keys: Mapping[str, Any] | None = None) -> None:
        """Subscribe to one work item, to all, or to those that match the keys (PS3.4 Table CC.2.3-2).

        Raises:
            WorkitemError: there is no such item (0xC307), or there are too many subscribers.
        """
        s = t.subscription.c
        with self._write() as connection:
            if uid not in WELL_KNOWN:
                self._workitem(connection, uid)
            titles = sa.select(sa.func.count(s.ae_title.distinct())).where(s.ae_title != ae_title)
            if (connection.scalar(titles) or 0) >= MAXIMUM_SUBSCRIBERS:
                raise WorkitemError(0x0213, "there are too many subscribers")
            self._put_subscription(connection, ae_title, uid, locked, dict(keys or {}))
            detail = {"ae_title": ae_title, "everything": uid in WELL_KNOWN, "locked": locked}
            self._append(connection, Event.WORKLIST_SUBSCRIBED, None, **detail)
            if uid not in WELL_KNOWN:
                self._report(connection, ae_title, uid, STATE_REPORT, self._workitem(connection, uid)["step"])
                return
            heard = set(connection.scalars(sa.select(s.uid).where(s.ae_title == ae_title)))
            for row in connection.execute(sa.select(t.workitem.c.uid, t.workitem.c.step).order_by(t.workitem.c.id)):
                if row.uid in heard or (uid == FILTERED and not matches(row.step, keys or {})):
                    continue
                self._put_subscription(connection, ae_title, row.uid, locked, {})
                if locked:
                    self._report(connection, ae_title, row.uid, STATE_REPORT, row.step)

    def unsubscribe(self, ae_title: str, uid: str) -> None:
        """End the subscription to one work item; by a well-known UID, every one.

        Raises:
            WorkitemError: there is no such item (0xC307).
        """
        s = t.subscription.c
        with self._write() as connection:
            condition = s.ae_title == ae_title
            if uid not in WELL_KNOWN:
                self._workitem(connection, uid)
                condition &= s.uid == uid
            gone = connection.execute(t.subscription.delete().where(condition)).rowcount
            if gone:
                self._append(connection, Event.WORKLIST_UNSUBSCRIBED, None, ae_title=ae_title, subscriptions=gone)

    def suspend(self, ae_title: str, uid: str) -> None:
        """Subscribe to no further items by themselves; those that are subscribed to stay so.

        Raises:
            WorkitemError: the UID is not well-known (0xC314).
        """
        if uid not in WELL_KNOWN:
            raise WorkitemError(0xC314)
        s = t.subscription.c
        with self._write() as connection:
            gone = connection.execute(t.subscription.delete().where(s.ae_title == ae_title, s.uid.in_(WELL_KNOWN)))
            if gone.rowcount:
                detail = {"ae_title": ae_title, "subscriptions": gone.rowcount}
                self._append(connection, Event.WORKLIST_UNSUBSCRIBED, None, **detail)

    def subscriptions(self, ae_title: str) -> Sequence[Row]:
        """What an AE title is subscribed to: uid, locked, keys."""
        query = sa.select(t.subscription).where(t.subscription.c.ae_title == ae_title).order_by(t.subscription.c.id)
        with self.read() as connection:
            return connection.execute(query).mappings().all()

    def announce_start(self) -> None:
        """Tell every subscriber that the worklist was started again, with all that it held (PS3.4 CC.2.4.3)."""
        with self._write() as connection:
            for ae_title in connection.scalars(sa.select(t.subscription.c.ae_title).distinct()).all():
                self._report(connection, ae_title, GLOBAL, SCP_STATUS, {})

    def next_events(self, ae_title: str, limit: int = 100) -> Sequence[Row]:
        """What a subscriber has yet to hear, oldest first: id, uid, event_type, information."""
        c = t.workitem_event.c
        with self.read() as connection:
            query = sa.select(t.workitem_event).where(c.ae_title == ae_title).order_by(c.id).limit(limit)
            return connection.execute(query).mappings().all()

    def heard(self, event_id: int) -> None:
        """A subscriber has that report."""
        with self._write() as connection:
            connection.execute(t.workitem_event.delete().where(t.workitem_event.c.id == event_id))

    def waiting_subscribers(self) -> set[str]:
        """AE titles for which reports wait."""
        with self.read() as connection:
            return set(connection.scalars(sa.select(t.workitem_event.c.ae_title).distinct()))

    # --- within a transaction ---------------------------------------------------------------------------

    @staticmethod
    def _workitem(connection: sa.Connection, uid: str) -> Row:
        row = connection.execute(sa.select(t.workitem).where(t.workitem.c.uid == uid)).mappings().first()
        if row is None:
            raise WorkitemError(0xC307)
        return row

    @staticmethod
    def _put_subscription(
        connection: sa.Connection, ae_title: str, uid: str, locked: bool, keys: dict[str, Any]
    ) -> None:
        s = t.subscription.c
        values = {"locked": locked, "keys": keys}
        there = t.subscription.update().where(s.ae_title == ae_title, s.uid == uid).values(**values)
        if not connection.execute(there).rowcount:
            connection.execute(t.subscription.insert().values(ae_title=ae_title, uid=uid, **values))

    def _subscribe_new(self, connection: sa.Connection, uid: str, step: Mapping[str, Any]) -> None:
        """Whoever subscribed to everything, or to what matches, is subscribed to a new item."""
        query = sa.select(t.subscription).where(t.subscription.c.uid.in_(WELL_KNOWN)).order_by(t.subscription.c.id)
        for row in connection.execute(query).mappings().all():
            if row["uid"] == GLOBAL or matches(step, row["keys"]):
                self._put_subscription(connection, row["ae_title"], uid, row["locked"], {})

    def _tell_subscribers(
        self,
        connection: sa.Connection,
        uid: str,
        event_type: int,
        step: Mapping[str, Any],
        given: Mapping[str, Any] | None = None,
    ) -> int:
        """Report an event to all that are subscribed to an item; returns how many."""
        titles = connection.scalars(sa.select(t.subscription.c.ae_title).where(t.subscription.c.uid == uid)).all()
        for ae_title in titles:
            self._report(connection, ae_title, uid, event_type, step, given)
        return len(titles)

    def _report(
        self,
        connection: sa.Connection,
        ae_title: str,
        uid: str,
        event_type: int,
        step: Mapping[str, Any],
        given: Mapping[str, Any] | None = None,
    ) -> None:
        c = t.workitem_event.c
        information = event_report(event_type, step, given)
        values = {"ae_title": ae_title, "uid": uid, "event_type": event_type, "information": information, "at": now()}
        connection.execute(t.workitem_event.insert().values(**values))
        mine = sa.select(c.id).where(c.ae_title == ae_title)
        surplus = connection.scalars(mine.order_by(c.id.desc()).offset(MAXIMUM_WAITING)).all()
        if surplus:
            connection.execute(t.workitem_event.delete().where(c.id.in_(surplus)))
            self._append(connection, Event.WORKLIST_FORGOTTEN, None, ae_title=ae_title, reports=len(surplus))
