"""The ledger's queries of storage commitment that this box asks for: of what it delivered to a PACS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import sqlalchemy as sa

from appliance.events import Event
from appliance.ledger import schema as t
from appliance.ledger.database import Row, later, now
from appliance.ledger.outbox import Outbox
from dicom_io.commitment import CommitmentReport

Outcome = Literal["acknowledge", "restore", "unask", "give_up"]
_EVENTS: dict[Outcome, Event] = {
    "acknowledge": Event.DELIVERY_ACKNOWLEDGED,
    "restore": Event.DELIVERY_UNKEPT,
    "unask": Event.DELIVERY_RETRIED,
    "give_up": Event.DELIVERY_DEAD,
}


class Keeping(Outbox):
    """The part of the ledger that holds a delivery open until its peer has committed itself to keeping it."""

    def ask_for_commitment(
        self, destination: str, transaction_uid: str, report_seconds: float, limit: int = 500
    ) -> list[Row]:
        """Write down that a destination is asked to keep what is stored there and due; what to ask for.

        Written before anything is sent, so that a report finds it, however soon that comes. What was asked for longer
        ago than ``report_seconds`` is due again, under the new transaction.

        Returns:
            rows of deliveries with the finding's uid, object and path and with study_id; none if nothing is due.
        """
        d, f, a = t.delivery.c, t.finding.c, t.analysis.c
        query = (
            sa.select(t.delivery, f.uid, f.object, f.path, a.study_id)
            .select_from(t.delivery.join(t.finding).join(t.verdict).join(t.analysis))
            .where(d.destination == destination, d.state.in_(("stored", "asked")))
            # Also if the clock was set back.
            .where((d.due_at <= now()) | (d.due_at > later(2 * report_seconds)))
            .order_by(d.id)
            .limit(limit)
        )
        with self.read() as connection:
            if connection.execute(query.limit(1)).first() is None:
                return []
        with self._write() as connection:
            rows = list(connection.execute(query).mappings().all())
            for row in rows:
                due, tries = later(report_seconds), row["attempts"] + 1
                values = {"attempts": tries, "due_at": due, "transaction_uid": transaction_uid}
                self._move_delivery(connection, row["id"], "ask", **values)
                self._note(connection, Event.DELIVERY_ASKED, row, "")
            return rows

    def is_asked(self, transaction_uid: str) -> bool:
        """Whether the report on that request is still to come."""
        d = t.delivery.c
        query = sa.select(d.id).where(d.transaction_uid == transaction_uid, d.state == "asked")
        with self.read() as connection:
            return connection.execute(query.limit(1)).first() is not None

    def settle_asked(
        self, rows: Sequence[Row], transaction_uid: str, outcome: Outcome, reason: str, wait_seconds: float = 0.0
    ) -> None:
        """Record what became of a request; what was settled meanwhile, or asked for anew, is left as it is."""
        with self._write() as connection:
            for row in rows:
                self._settle_asked(connection, row, transaction_uid, outcome, reason, wait_seconds)

    def storage_committed(self, report: CommitmentReport, attempts: int, wait_seconds: float) -> bool:
        """Record a peer's report on what it was asked to keep, which may come twice.

        What it has not kept is stored there again after ``wait_seconds``, or is a dead letter after ``attempts``.

        Returns:
            Whether there was such a request.
        """
        d, f, a = t.delivery.c, t.finding.c, t.analysis.c
        query = (
            sa.select(t.delivery, f.uid, f.object, a.study_id)
            .select_from(t.delivery.join(t.finding).join(t.verdict).join(t.analysis))
            .where(d.transaction_uid == report.transaction_uid)
        )
        kept = {one.sop_instance_uid for one in report.committed}
        failed = {one.reference.sop_instance_uid: one.reason for one in report.failed}
        with self._write() as connection:
            rows = connection.execute(query).mappings().all()
            for row in rows:
                if row["uid"] in failed:
                    reason = f"the peer has not kept it (0x{failed[row['uid']]:04X})"
                    outcome: Outcome = "give_up" if row["attempts"] >= attempts else "restore"
                    self._settle_asked(connection, row, report.transaction_uid, outcome, reason, wait_seconds)
                elif row["uid"] in kept:
                    self._settle_asked(connection, row, report.transaction_uid, "acknowledge", "storage committed")
            return bool(rows)

    def _settle_asked(
        self,
        connection: sa.Connection,
        row: Row,
        transaction_uid: str,
        outcome: Outcome,
        reason: str,
        wait_seconds: float = 0.0,
    ) -> None:
        d = t.delivery.c
        current = sa.select(d.id).where(d.id == row["id"], d.state == "asked", d.transaction_uid == transaction_uid)
        if connection.execute(current).first() is None:
            return
        values = {"reason": reason, "due_at": later(wait_seconds)}
        if outcome == "acknowledge":
            values["acknowledged_at"] = now()
        self._move_delivery(connection, row["id"], outcome, **values)
        self._note(connection, _EVENTS[outcome], row, reason)

    def _note(self, connection: sa.Connection, name: Event, row: Row, reason: str) -> None:
        about = {"delivery": row["id"], "object": row["object"], "destination": row["destination"]}
        self._append(connection, name, row["study_id"], **about, **({"reason": reason} if reason else {}))
