"""The ledger's part in the escalation of alerts: who is told next, and that nobody was reached.

A delivery to a step of the escalation is *held* from the verdict on. It becomes pending when its time has come and
those before it have not acknowledged the alert, or at once when they never will; it is *spared* when they have.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from appliance.events import Event
from appliance.ledger import schema as t
from appliance.ledger.board import VERSION, BoardRecords
from appliance.ledger.contradiction import in_shadow
from appliance.ledger.database import LedgerError, Row, has_waited, later, now, waited
from appliance.ledger.states import DELIVERY, step

_OPEN = ("pending", "sending", "held")
_FAILED = ("rejected", "dead")
SELFTEST = "selftest"
"""Names of destinations that begin so are of the box's own tests."""


@dataclass(frozen=True, slots=True)
class Escalated:
    """What became of alerts just now: (study, destination, reason) of each step taken, and studies with nobody told."""

    steps: Sequence[tuple[int, str, str]]
    unreached: Sequence[int]


class Escalation(BoardRecords):
    """The part of the ledger that escalation works with."""

    def escalate(self, told: Collection[str], longest: float, alarm_seconds: float) -> Escalated:
        """Take the steps whose time has come, and note whose alert has reached nobody for so long.

        Args:
            told: names of the destinations of alerts.
            longest: no step waits longer than so many seconds, even if the clock was set back.
        """
        d, f, v, a = t.delivery.c, t.finding.c, t.verdict.c, t.analysis.c
        joined = t.delivery.join(t.finding).join(t.verdict).join(t.analysis)
        columns = (d.id, d.destination, d.due_at, f.object, f.verdict_id, a.study_id, a.package, VERSION)
        held = sa.select(*columns).select_from(joined).where(d.destination.in_(told), d.state == "held")
        held = held.order_by(f.verdict_id, d.due_at, d.id)
        overdue = (
            sa.select(v.id, v.analysis_id, v.revision, v.issued_at, a.study_id)
            .distinct()
            .select_from(joined)
            .where(d.destination.in_(told), d.state.in_(_OPEN), v.positive, f.object.startswith("alert."))
            .where(has_waited(v.issued_at, alarm_seconds))
        )
        with self.read() as connection:
            if not any(connection.execute(query.limit(1)).first() for query in (held, overdue)):
                return Escalated((), ())
        taken: list[tuple[int, str, str]] = []
        with self._write() as connection:
            rows = connection.execute(held).mappings().all()
            for _, group in itertools.groupby(rows, key=lambda row: row["verdict_id"]):
                for row in self._due(connection, list(group), longest):
                    stopped = self.stopped(connection, row["package"], row["version"])
                    if stopped and self._withdraw(connection, d.id == row["id"], stopped):
                        continue
                    reason = self._why(connection, row)
                    self._move(connection, row, "escalate", Event.DELIVERY_ESCALATED, reason, due_at=now())
                    taken.append((row["study_id"], row["destination"], reason))
            unreached = []
            for silent in connection.execute(overdue).all():
                known = math.isfinite(waited(silent.issued_at, now()))
                long = f"in {alarm_seconds:g} s" if known else "yet, and the clock was set back since"
                if self._note_unreached(connection, silent.id, f"nobody has acknowledged it {long}"):
                    unreached.append(silent.study_id)
        return Escalated(taken, unreached)

    def _due(self, connection: sa.Connection, group: list[Row], longest: float) -> list[Row]:
        """Of the steps of one verdict, those to take now."""
        before = {one.state for one in self._alerts_of(connection, group[0]["verdict_id"]) if one.state != "held"}
        # Whoever was asked will never answer: there is nothing to wait for.
        hopeless = bool(before) and before <= set(_FAILED)
        due = [row for row in group if row["due_at"] <= now() or row["due_at"] > later(longest)]
        return due or (group[:1] if hopeless else [])

    def _why(self, connection: sa.Connection, row: Row) -> str:
        others = self._alerts_of(connection, row["verdict_id"])
        said = (f"{one.destination} is {one.state}" for one in others if one.state in ("pending", "sending", *_FAILED))
        return ", ".join(said)

    def _spare_steps(self, connection: sa.Connection, row: Row, steps: Collection[str]) -> None:
        """After an acknowledgement: the steps that wait are not needed, if all that were told at once have answered or
        one of the steps has."""
        if not row["object"].startswith("alert."):
            return
        finding = sa.select(t.finding.c.verdict_id).where(t.finding.c.id == row["finding_id"])
        alerts = self._alerts_of(connection, int(connection.scalars(finding).one()))
        at_once = [one for one in alerts if one.destination not in steps]
        if row["destination"] in steps or all(one.state in ("acknowledged", "withdrawn") for one in at_once):
            for one in alerts:
                if one.state == "held":
                    about = {"id": one.id, "destination": one.destination, "object": one.object}
                    reason = f"{row['destination']} acknowledged it"
                    self._move(
                        connection, about | {"study_id": row["study_id"]}, "spare", Event.DELIVERY_SPARED, reason
                    )

    def _insert_delivery(
        self,
        connection: sa.Connection,
        about: dict[str, int],
        name: str,
        destination: str,
        urgency: int,
        at: str,
        *,
        held_seconds: float,
        positive: bool,
    ) -> None:
        """A delivery of a new finding.

        Where the same destination has still to be told of an earlier revision, because that step is held, this one
        takes its place and its time; what takes an alert back is then not needed either.

        Args:
            about: numbers of the ``finding``, ``analysis`` and ``study``.
            name: the finding's object.
            at: when the verdict was issued.
        """
        d, f, v = t.delivery.c, t.finding.c, t.verdict.c
        query = (
            sa.select(d.id, d.destination, d.due_at, f.object)
            .select_from(t.delivery.join(t.finding).join(t.verdict))
            .where(v.analysis_id == about["analysis"], f.object == name)
            .where(d.destination == destination, d.state == "held")
        )
        earlier = connection.execute(query).mappings().all() if name.startswith("alert.") else ()
        test = connection.scalar(sa.select(t.study.c.selftest).where(t.study.c.id == about["study"]))
        if bool(test) != destination.startswith(SELFTEST):
            # Whatever made it: the hospital never hears of a test, and nothing of a patient is sent into the void.
            raise LedgerError(f"{name} is not for {destination}", f"study {about['study']}", "report this fault")
        due = _after(at, held_seconds)
        for one in earlier:
            due = one["due_at"]
            row = {**one, "study_id": about["study"]}
            self._move(connection, row, "spare", Event.DELIVERY_SPARED, "a newer verdict takes its place")
        result = connection.execute(
            t.delivery.insert().values(
                finding_id=about["finding"],
                destination=destination,
                urgency=urgency,
                state=step(DELIVERY, "", "hold" if held_seconds or earlier else "create"),
                due_at=due,
            )
        )
        if earlier and not positive:
            key = int(result.inserted_primary_key[0])  # type: ignore[index]
            row = {"id": key, "destination": destination, "object": name, "study_id": about["study"]}
            self._move(connection, row, "spare", Event.DELIVERY_SPARED, "it was told nothing that this takes back")

    def _note_unreached(self, connection: sa.Connection, verdict_id: int, reason: str) -> bool:
        """Note, once for each verdict, that its alert reached nobody; False if it did, or that is known."""
        query = sa.select(t.verdict, t.analysis.c.study_id, t.study.c.selftest)
        query = query.select_from(t.verdict.join(t.analysis).join(t.study)).where(t.verdict.c.id == verdict_id)
        row = connection.execute(query).mappings().one()
        c = t.event.c
        noted = sa.select(c.id).where(c.name == Event.ALERT_UNREACHED, c.detail["verdict"].as_integer() == verdict_id)
        if (
            not row["positive"]
            or row["selftest"]
            or reached(connection, row)
            or connection.execute(noted.limit(1)).first()
        ):
            return False
        self._append(connection, Event.ALERT_UNREACHED, row["study_id"], verdict=verdict_id, reason=reason)
        return True

    def _failed_all(self, connection: sa.Connection, finding_id: int) -> bool:
        """After a delivery failed for good: note it if that was the last hope of an alert. Returns whether it was."""
        query = sa.select(t.finding.c.verdict_id, t.finding.c.object).where(t.finding.c.id == finding_id)
        verdict_id, name = connection.execute(query).one()
        states = {one.state for one in self._alerts_of(connection, verdict_id)}
        if not name.startswith("alert.") or states & {*_OPEN, "acknowledged"}:
            return False
        return self._note_unreached(connection, verdict_id, "every destination rejected it or is a dead letter")

    @staticmethod
    def _alerts_of(connection: sa.Connection, verdict_id: int) -> Sequence[Any]:
        d, f = t.delivery.c, t.finding.c
        query = (
            sa.select(d.id, d.destination, d.state, f.object)
            .join(t.finding)
            .where(f.verdict_id == verdict_id, f.object.startswith("alert."))
            .order_by(d.id)
        )
        return connection.execute(query).all()

    def _move(
        self,
        connection: sa.Connection,
        row: Row | dict[str, object],
        event: str,
        name: Event,
        reason: str,
        **values: str,
    ) -> None:
        """A change of state of one delivery, with its event."""
        key = row["id"]
        state = connection.scalars(sa.select(t.delivery.c.state).where(t.delivery.c.id == key)).one()
        following = step(DELIVERY, state, event)
        connection.execute(
            t.delivery.update().where(t.delivery.c.id == key).values(state=following, reason=reason, **values)
        )
        detail = {"delivery": key, "object": row["object"], "destination": row["destination"], "reason": reason}
        self._append(connection, name, row["study_id"], **detail)  # type: ignore[arg-type]


def reached(connection: sa.Connection, verdict: Row) -> bool:
    """Whether somebody has acknowledged that a study is positive since it last was not, by this verdict or another.

    Of a clinical verdict only by a clinical one: who had a test message was not alerted.
    """
    d, f, v = t.delivery.c, t.finding.c, t.verdict.c
    denial = t.verdict.alias("negative")
    earlier = denial.c
    negative = sa.select(sa.func.coalesce(sa.func.max(earlier.revision), 0)).where(
        earlier.analysis_id == verdict["analysis_id"],
        ~earlier.positive,
        ~in_shadow(denial),
        earlier.revision < verdict["revision"],
    )
    query = (
        sa.select(d.id)
        .select_from(t.delivery.join(t.finding).join(t.verdict))
        .where(v.analysis_id == verdict["analysis_id"], v.positive, v.revision > negative.scalar_subquery())
        .where(f.object.startswith("alert."), d.state == "acknowledged")
    )
    this = t.verdict.alias("this").c
    if connection.scalar(sa.select(this.result["mode"].as_string()).where(this.id == verdict["id"])) == "clinical":
        query = query.where(v.result["mode"].as_string() == "clinical")
    return connection.execute(query.limit(1)).first() is not None


def unreached(connection: sa.Connection) -> list[Row]:
    """Alerts that reached nobody, and still have not: id of the verdict, study_id, at, reason.

    One is over when somebody acknowledges it, when a newer verdict is negative that is not in shadow, when nothing of
    it is left to send because the board stopped its package, and when retention removes the study or a person has
    released it since: a release hides nothing that came after it, and a new completion takes it back.
    """
    e, v, s = t.event.c, t.verdict.c, t.study.c
    release = t.event.alias("release").c
    # By number: a clock that was set back since would have the release come after what it was given before.
    seen = sa.exists().where(release.study_id == s.id, release.name == Event.RETENTION_RELEASED, release.id > e.id)
    unseen = sa.or_(s.released_at.is_(None), s.released_at < s.completed_at, ~seen)
    query = (
        sa.select(v.id, v.analysis_id, v.revision, s.id.label("study_id"), e.at, e.detail["reason"].label("reason"))
        .select_from(
            t.event.join(t.verdict, v.id == e.detail["verdict"].as_integer())
            .join(t.analysis)
            .join(t.study, s.id == t.analysis.c.study_id)
        )
        .where(e.name == Event.ALERT_UNREACHED, unseen, s.removed_at.is_(None))
        .order_by(e.id)
    )
    denial = t.verdict.alias("newer")
    newer = denial.c
    negated = (
        sa.select(newer.id)
        .where(newer.analysis_id == v.analysis_id, newer.revision > v.revision, ~newer.positive, ~in_shadow(denial))
        .exists()
    )
    left = (
        sa.select(t.delivery.c.id)
        .select_from(t.delivery.join(t.finding))
        .correlate(t.verdict)
        .where(t.finding.c.verdict_id == v.id, t.delivery.c.state.in_((*_OPEN, *_FAILED)))
        .where(t.finding.c.object.startswith("alert."))
        .exists()
    )
    rows = connection.execute(query.where(~negated, left)).mappings().all()
    return [row for row in rows if not reached(connection, row)]


def _after(at: str, seconds: float) -> str:
    return (datetime.fromisoformat(at) + timedelta(seconds=seconds)).isoformat(timespec="microseconds")
