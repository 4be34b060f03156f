"""The ledger's queries of findings and deliveries."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import sqlalchemy as sa

from appliance.events import Event
from appliance.ledger import schema as t
from appliance.ledger.board import VERSION
from appliance.ledger.contradiction import denied, in_shadow, told_since
from appliance.ledger.database import LedgerError, Row, later, now, seconds_between
from appliance.ledger.escalation import Escalation
from appliance.ledger.records import ALERT_STANDS
from appliance.ledger.states import DELIVERY, step


class Outbox(Escalation):
    """The part of the ledger that findings and delivery work with."""

    def unrendered_finding(self, attempts: int, but: Collection[int] = ()) -> Row | None:
        """The next finding without a file that was tried less often than that, with its verdict's and study's columns.

        Those of positive verdicts come first, then the oldest: whoever was alerted wants to see why.

        Args:
            but: findings that are left out.
        """
        f, v, a = t.finding.c, t.verdict.c, t.analysis.c
        columns = (f.id, f.object, f.uid, v.revision, v.result, v.inputs, v.issued_at, v.analysis_id, a.study_id)
        joined = t.finding.join(t.verdict).join(t.analysis)
        # Apart, so that no verdict is read but the one that is wanted.
        first = (
            sa.select(f.id)
            .select_from(joined)
            .where(f.path.is_(None), f.removed_at.is_(None), f.attempts < attempts, f.id.not_in(but))
            .order_by(v.positive.desc(), f.id)
            .limit(1)
            .correlate(None)
        )
        query = sa.select(*columns, a.package).select_from(joined).where(f.id == first.scalar_subquery())
        with self.read() as connection:
            return connection.execute(query).mappings().first()

    def start_rendering(self, finding_id: int) -> None:
        """Count a try before it is made, so that a finding that ends the engine is not tried for ever."""
        c = t.finding.c
        with self._write() as connection:
            connection.execute(t.finding.update().where(c.id == finding_id).values(attempts=c.attempts + 1))

    def rendered(self, finding_id: int, study_id: int, path: str) -> None:
        """Record that a finding's file is safe on disk; from now on it may be delivered."""
        with self._write() as connection:
            connection.execute(t.finding.update().where(t.finding.c.id == finding_id).values(path=path, reason=""))
            self._append(connection, Event.FINDING_RENDERED, study_id, finding=finding_id, path=path)

    def render_failed(self, finding_id: int, study_id: int, reason: str) -> None:
        """Record a try at rendering that failed."""
        with self._write() as connection:
            connection.execute(t.finding.update().where(t.finding.c.id == finding_id).values(reason=reason))
            self._append(connection, Event.FINDING_FAILED, study_id, finding=finding_id, reason=reason)

    def abandon_findings(self, attempts: int) -> int:
        """Make dead letters of the deliveries whose object could not be made in that many tries. Returns how many."""
        f = t.finding.c
        return self._give_up(
            (f.path.is_(None)) & (f.attempts >= attempts),
            lambda row: f"its object could not be made: {row['finding_reason'] or 'the engine ended each time'}",
        )

    def abandon_deliveries(self, destinations: Collection[str]) -> int:
        """Make dead letters of the deliveries to any destination that is not one of these. Returns how many."""
        return self._give_up(
            t.delivery.c.destination.not_in(destinations), lambda _: "its destination is no longer configured"
        )

    def _give_up(self, condition: sa.ColumnElement[bool], reason: Callable[[Row], str]) -> int:
        d, f, a = t.delivery.c, t.finding.c, t.analysis.c
        query = (
            sa.select(d.id, d.destination, d.finding_id, f.object, f.reason.label("finding_reason"), a.study_id)
            .select_from(t.delivery.join(t.finding).join(t.verdict).join(t.analysis))
            .where(condition, d.state.in_(("pending", "held", "stored", "asked")))
        )
        with self.read() as connection:
            if connection.execute(query.limit(1)).first() is None:
                return 0
        with self._write() as connection:
            rows = connection.execute(query).mappings().all()
            for row in rows:
                self._move_delivery(connection, row["id"], "give_up", reason=reason(row))
                self._append(
                    connection,
                    Event.DELIVERY_DEAD,
                    row["study_id"],
                    delivery=row["id"],
                    object=row["object"],
                    destination=row["destination"],
                    reason=reason(row),
                )
                self._failed_all(connection, row["finding_id"])
            return len(rows)

    # --- delivery ---------------------------------------------------------------------------------------

    def take_delivery(self, destination: str, longest_pause: float = 300.0, order_seconds: float = 0.0) -> Row | None:
        """Start the most urgent due delivery to a destination: its row with uid, object, path, study_id.

        What is due of a package that the board stopped is withdrawn instead: it was on its way when that happened. So
        is a notice that a study was not analysed, once it was: it would reach the destination after the alert; and so
        are pictures that a later verdict denied.

        Args:
            longest_pause: no delivery waits longer than so many seconds for its next try, even if the clock was
                set back.
            order_seconds: for so long after its first try an alert that failed is not overtaken by later ones.
        """
        d, f, v, a = t.delivery.c, t.finding.c, t.verdict.c, t.analysis.c
        due = (d.due_at <= now()) | (d.due_at > later(longest_pause))
        # What was sent in the future by a clock that was set back since would block the others for as long.
        sent_lately = (d.sent_at > later(-order_seconds)) & (d.sent_at <= now())
        in_order = f.object.startswith("alert.") & sent_lately
        query = (
            sa.select(
                *(t.delivery, f.uid, f.object, f.path, a.study_id, a.package, VERSION, v.revision, v.positive),
                v.analysis_id,
                due.label("due"),
            )
            .select_from(t.delivery.join(t.finding).join(t.verdict).join(t.analysis))
            .where(
                d.destination == destination,
                d.state == "pending",
                due | in_order,
                f.path.is_not(None),
                ~self._earlier_open(),
            )
            .order_by(d.urgency, d.id)
            .limit(1)
        )
        with self._write() as connection:
            while True:
                row = connection.execute(query).mappings().first()
                if row is None or not row["due"]:
                    return None
                stopped = self.stopped(connection, row["package"], row["version"])
                if stopped and self._withdraw(connection, d.id == row["id"], stopped):
                    continue
                refusal = row["object"].startswith("refusal.")
                untrue = self._analysed_since(connection, row["analysis_id"]) if refusal else ""
                untrue = untrue or denied(connection, row["finding_id"])
                if not untrue:
                    break
                self._take_away(connection, row, untrue)
            self._move_delivery(
                connection, row["id"], "take", attempts=row["attempts"] + 1, sent_at=row["sent_at"] or now()
            )
            self._append(
                connection,
                Event.DELIVERY_SENDING,
                row["study_id"],
                delivery=row["id"],
                object=row["object"],
                destination=destination,
                attempt=row["attempts"] + 1,
            )
            return row

    @staticmethod
    def _earlier_open() -> sa.Exists:
        """An older delivery of the same object of the same analysis to the same place is still under way.

        A correction must not overtake the alert that it corrects.
        """
        d, f, v = t.delivery.alias("earlier"), t.finding.alias("its"), t.verdict.alias("its_verdict")
        return (
            sa.select(d.c.id)
            .select_from(d.join(f, d.c.finding_id == f.c.id).join(v, f.c.verdict_id == v.c.id))
            .where(
                d.c.id < t.delivery.c.id,
                d.c.destination == t.delivery.c.destination,
                d.c.state.in_(("pending", "sending")),
                f.c.object == t.finding.c.object,
                v.c.analysis_id == t.analysis.c.id,
            )
            .exists()
        )

    def _move_delivery(self, connection: sa.Connection, key: int, event: str, **values: Any) -> None:
        state = connection.scalar(sa.select(t.delivery.c.state).where(t.delivery.c.id == key))
        connection.execute(
            t.delivery.update().where(t.delivery.c.id == key).values(state=step(DELIVERY, state or "", event), **values)
        )

    def settle_delivery(
        self,
        row: Row,
        outcome: Literal["acknowledge", "store", "retry", "reject", "decline", "give_up"],
        reason: str = "",
        *,
        wait_seconds: float = 0.0,
        budget_seconds: float | None = None,
        steps: Collection[str] = (),
        instead: Sequence[str] = (),
        condition: str | None = None,
    ) -> bool:
        """Record what became of a taken delivery; a retry is due after ``wait_seconds``.

        "decline" says that the destination takes no such objects: a rejection, unless another one can take its place.
        With ``budget_seconds``, an acknowledgement later than that after the study's last instance marks the verdict
        late.

        Args:
            steps: names of the destinations that are steps of the escalation.
            instead: objects of which the first that the verdict has is delivered in place of a declined one.
            condition: what the event says in place of a reason that has a peer's own words in it.

        Returns:
            Whether an alert has reached nobody now, because this was its last hope.
        """
        names = {
            "acknowledge": Event.DELIVERY_ACKNOWLEDGED,
            "store": Event.DELIVERY_STORED,
            "retry": Event.DELIVERY_RETRIED,
            "reject": Event.DELIVERY_REJECTED,
            "give_up": Event.DELIVERY_DEAD,
        }
        values: dict[str, Any] = {"reason": reason, "due_at": later(wait_seconds)}
        if outcome == "acknowledge":
            values["acknowledged_at"] = now()
        with self._write() as connection:
            if outcome == "decline":
                if self._replace(connection, row, instead, reason, condition):
                    return False
                outcome = "reject"
            self._move_delivery(connection, row["id"], outcome, **values)
            self._append(
                connection,
                names[outcome],
                row["study_id"],
                delivery=row["id"],
                object=row["object"],
                destination=row["destination"],
                reason=reason if condition is None else condition,
            )
            if outcome == "acknowledge" and budget_seconds is not None:
                self._mark_late(connection, row, budget_seconds)
            if outcome == "acknowledge":
                self._spare_steps(connection, row, steps)
            return outcome in ("reject", "give_up") and self._failed_all(connection, row["finding_id"])

    def _replace(
        self, connection: sa.Connection, row: Row, names: Sequence[str], reason: str, condition: str | None
    ) -> bool:
        """Deliver the first of other objects of the same verdict, once, to a destination that takes none of this kind.

        Returns:
            Whether the verdict has one of them.
        """
        d, f = t.delivery.c, t.finding.c
        verdict_id = sa.select(f.verdict_id).where(f.id == row["finding_id"]).scalar_subquery()
        query = sa.select(f.object, f.id).where(f.verdict_id == verdict_id, f.object.in_(names))
        found = {one.object: one.id for one in connection.execute(query)}
        name = next((one for one in names if one in found), None)
        if name is None:
            return False
        self._move_delivery(connection, row["id"], "replace", reason=reason)
        self._append(
            connection,
            Event.DELIVERY_REPLACED,
            row["study_id"],
            delivery=row["id"],
            object=row["object"],
            destination=row["destination"],
            instead=name,
            reason=reason if condition is None else condition,
        )
        there = sa.select(d.id).where(d.finding_id == found[name], d.destination == row["destination"])
        if connection.execute(there).first() is None:
            connection.execute(
                t.delivery.insert().values(
                    finding_id=found[name],
                    destination=row["destination"],
                    urgency=row["urgency"],
                    state=step(DELIVERY, "", "create"),
                    due_at=now(),
                    reason=f"in place of the {row['object']}",
                )
            )
        return True

    def _mark_late(self, connection: sa.Connection, row: Row, budget_seconds: float) -> None:
        last = connection.scalar(sa.select(t.study.c.last_instance_at).where(t.study.c.id == row["study_id"]))
        v = t.verdict.c
        verdict_id = sa.select(t.finding.c.verdict_id).where(t.finding.c.id == row["finding_id"])
        if last and seconds_between(last, now()) > budget_seconds:
            changed = connection.execute(
                t.verdict.update().where(v.id.in_(verdict_id), v.late.is_(False)).values(late=True)
            )
            if changed.rowcount:
                self._append(connection, Event.STUDY_LATE, row["study_id"], at="acknowledgement")

    def park_deliveries(self) -> int:
        """At the start of delivery: what was on its way is sent again, under its old name."""
        d = t.delivery.c
        query = (
            sa.select(d.id, d.destination, t.finding.c.object, t.analysis.c.study_id)
            .select_from(t.delivery.join(t.finding).join(t.verdict).join(t.analysis))
            .where(d.state == "sending")
        )
        with self._write() as connection:
            rows = connection.execute(query).all()
            for row in rows:
                self._move_delivery(connection, row.id, "park")
                self._append(
                    connection,
                    Event.DELIVERY_PARKED,
                    row.study_id,
                    delivery=row.id,
                    object=row.object,
                    destination=row.destination,
                )
            return len(rows)

    def take_answer(self, control_id: str, content: bytes, destinations: Collection[str]) -> bool:
        """Keep an application acknowledgement that came as a message of its own; False if nobody waits for it.

        Args:
            destinations: those whose answers may come so.
        """
        d, f, a = t.delivery.c, t.finding.c, t.application_answer.c
        waiting = (
            sa.select(d.id)
            .join(t.finding)
            .where(f.uid == control_id, d.destination.in_(destinations), d.state.in_(("pending", "sending")))
        )
        with self._write() as connection:
            key = connection.scalar(waiting)
            if key is None:
                return False
            connection.execute(t.application_answer.delete().where(a.control_id == control_id))
            values = {"control_id": control_id, "content": content, "received_at": now()}
            connection.execute(t.application_answer.insert().values(**values))
            self._append(connection, Event.MESSAGE_ANSWERED, None, delivery=key)
            return True

    def answer_to(self, control_id: str) -> bytes | None:
        """The application acknowledgement of that message that came as a message of its own, once; None if none did."""
        a = t.application_answer.c
        query = sa.select(a.content).where(a.control_id == control_id)
        with self.read() as connection:
            found: bytes | None = connection.scalar(query)
        if found is not None:
            with self._write() as connection:
                connection.execute(t.application_answer.delete().where(a.control_id == control_id))
        return found

    @staticmethod
    def _analysed_since(connection: sa.Connection, analysis_id: int) -> str:
        """Why it no longer holds that a study was not analysed; '' where it does, also since a verdict was withdrawn.

        Nobody who hears of refusals alone is told that a negative report was taken back.
        """
        v = t.verdict.c
        query = sa.select(v.revision, v.result["withdrawn"].as_string().label("withdrawn"))
        query = query.where(v.analysis_id == analysis_id, ~in_shadow(t.verdict)).order_by(v.revision.desc()).limit(1)
        newest = connection.execute(query).first()
        return (
            "" if newest is None or newest.withdrawn else f"the study was analysed since (revision {newest.revision})"
        )

    @staticmethod
    def _refuse_contradicted(connection: sa.Connection, row: Any, where: str) -> None:
        """Refuse to say once more what a newer verdict contradicts.

        That one may have told the destination nothing, as to who rejected an alert there is nothing to take back; so
        nothing would follow that puts it right.

        Raises:
            LedgerError: there is such a verdict.
        """
        for newer in told_since(connection, row.analysis_id, row.revision):
            if newer.positive == row.positive:
                continue
            if row.positive and ALERT_STANDS in (newer.limitations or ()):
                continue
            why = f"revision {newer.revision} is positive, which contradicts it"
            remedy = "leave it: what it would take back holds, or has been told anew"
            if row.positive and newer.withdrawn:
                why = f"revision {newer.revision} withdrew it: {newer.withdrawn}"
                remedy = "look at the study: no answer of the box would follow it"
            elif row.positive:
                why = f"revision {newer.revision} is negative, which contradicts it"
                remedy = "leave it: it would alert of what no longer holds, and nothing would follow"
            raise LedgerError(why, where, remedy)

    def requeue_delivery(self, delivery_id: int, destinations: Collection[str]) -> None:
        """Send a dead, rejected, replaced or withdrawn delivery once more, because somebody asked for it.

        Args:
            destinations: those that are configured.

        Raises:
            LedgerError: there is no such delivery, it is under way or acknowledged, its destination is not configured,
                retention removed its object, a newer revision of it went there since, which it would overtake, or a
                newer verdict that was told says the contrary of what it says.
        """
        d, f, v, a = t.delivery.c, t.finding.c, t.verdict.c, t.analysis.c
        columns = (
            *(d.state, d.destination, d.finding_id, f.object, f.removed_at),
            *(v.revision, v.positive, v.analysis_id, a.study_id),
        )
        joined = t.delivery.join(t.finding).join(t.verdict).join(t.analysis)
        with self._write() as connection:
            row = connection.execute(sa.select(*columns).select_from(joined).where(d.id == delivery_id)).first()
            where = f"delivery {delivery_id}"
            if row is None:
                raise LedgerError("there is no such delivery", where, "`scanside study UID` lists a study's deliveries")
            if (row.state, "requeue") not in DELIVERY:
                said = f"it is {row.state}, not dead, rejected, replaced or withdrawn"
                raise LedgerError(said, where, "there is nothing to send again")
            if row.destination not in destinations:
                raise LedgerError(f"{row.destination} is not configured", where, "configure it again under that name")
            if row.removed_at is not None:
                raise LedgerError(
                    f"retention removed its object on {row.removed_at[:10]}", where, "send the whole study again"
                )
            newer = sa.select(d.id).select_from(joined)
            newer = newer.where(
                d.destination == row.destination,
                f.object == row.object,
                v.analysis_id == row.analysis_id,
                v.revision > row.revision,
            )
            if connection.execute(newer.limit(1)).first() is not None:
                raise LedgerError(
                    f"a newer {row.object} went to {row.destination} since", where, "send that one again instead"
                )
            if row.object.startswith(("alert.", "worklist.")):
                self._refuse_contradicted(connection, row, where)
            if why := denied(connection, row.finding_id):
                raise LedgerError(why, where, "leave it: it would show what no longer holds, and nothing would follow")
            if row.object.startswith("refusal.") and (why := self._analysed_since(connection, row.analysis_id)):
                raise LedgerError(why, where, "leave it: it would say that nothing is said of haemorrhage")
            self._move_delivery(connection, delivery_id, "requeue", attempts=0, due_at=now())
            connection.execute(t.finding.update().where(t.finding.c.id == row.finding_id).values(attempts=0))
            # If it fails again somebody has to see it again.
            connection.execute(t.study.update().where(t.study.c.id == row.study_id).values(released_at=None))
            self._append(
                connection,
                Event.DELIVERY_REQUEUED,
                row.study_id,
                delivery=delivery_id,
                object=row.object,
                destination=row.destination,
            )
