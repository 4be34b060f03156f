"""What an update of the box asks the ledger: what is under way, what waits, and how it went of late."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime

import sqlalchemy as sa

from appliance.events import Event
from appliance.ledger import schema as t
from appliance.ledger.board import VERSION
from appliance.ledger.contradiction import denied
from appliance.ledger.retention import superseded
from appliance.ledger.selftest import SELFTEST_DESTINATIONS, of_patients
from appliance.ledger.store import Ledger
from appliance.ledger.views import study_report, timeline

ERRORS = (
    Event.ANALYSIS_FAILED,
    Event.ANALYSIS_QUARANTINED,
    Event.FINDING_FAILED,
    Event.DELIVERY_DEAD,
    Event.DELIVERY_REJECTED,
    Event.ALERT_UNDELIVERABLE,
    Event.ALERT_REDUCED,
    Event.ALERT_UNREACHED,
    Event.COMMITMENT_DEAD,
    Event.STUDY_LATE,
    Event.STAGE_OVERDUE,
    Event.PACKAGE_DRIFTED,
    Event.AUDIT_BROKEN,
    Event.SERVICE_FAILED,
)
"""Events that should not happen."""

NEWEST = 200
"""At most so many studies are looked at for their times."""


def in_flight(ledger: Ledger, packages: Collection[str]) -> dict[str, int]:
    """How much is under way of which somebody waits for the outcome, by kind; no self-tests.

    ``arriving``: studies that are not complete. ``undecided``: complete ones that no package was asked about since.
    ``analyses`` without an outcome. ``alerts`` that were not tried yet or are on their way; one that a destination does
    not take is not among them: it waits as well behind an update as before it.

    Args:
        packages: names of those that run; an analysis of another never comes to an end.
    """
    s, a, d, f = t.study.c, t.analysis.c, t.delivery.c, t.finding.c
    wanted = {
        "arriving": sa.select(sa.func.count()).where(
            s.state.in_(("receiving", "reopened")), s.removed_at.is_(None), ~s.selftest
        ),
        "undecided": sa.select(sa.func.count()).where(
            s.state == "complete",
            s.removed_at.is_(None),
            ~s.selftest,
            ~sa.exists().where(a.study_id == s.id, a.completion == s.completions),
        ),
        "analyses": sa.select(sa.func.count()).where(
            a.state.in_(("admitted", "running")), a.package.in_(packages), of_patients(a.study_id)
        ),
        "alerts": sa.select(sa.func.count())
        .select_from(t.delivery.join(t.finding))
        .where(
            f.object.startswith("alert."),
            d.destination.not_in(SELFTEST_DESTINATIONS),
            sa.or_(d.state == "sending", sa.and_(d.state == "pending", d.attempts == 0)),
        ),
    }
    with ledger.read() as connection:
        return {kind: int(connection.scalar(query) or 0) for kind, query in wanted.items()}


def waiting(ledger: Ledger) -> dict[str, int]:
    """Destination → deliveries to it that are pending or on their way."""
    c = t.delivery.c
    query = sa.select(c.destination, sa.func.count()).where(c.state.in_(("pending", "sending")))
    query = query.where(c.destination.not_in(SELFTEST_DESTINATIONS)).group_by(c.destination)
    with ledger.read() as connection:
        return {row[0]: int(row[1]) for row in connection.execute(query)}


def errors_since(ledger: Ledger, since: datetime) -> dict[str, int]:
    """How often each event of `ERRORS` happened from then on; those that did not are left out."""
    c = t.event.c
    query = sa.select(c.name, sa.func.count()).where(c.name.in_(ERRORS), c.at >= _stamp(since))
    query = query.where(of_patients(c.study_id)).group_by(c.name)
    with ledger.read() as connection:
        return {row[0]: int(row[1]) for row in connection.execute(query)}


def set_aside_since(ledger: Ledger, since: datetime) -> tuple[list[int], list[int]]:
    """What came to no good end from then on, and still lies there, oldest first.

    Returns:
        Studies whose analysis was set aside; deliveries that are dead or were rejected, and those that the board
        withdrew of a package that may send again, unless a newer revision answers for them or denied them. No
        self-tests, and nothing whose files retention has removed.
    """
    e, a, d, s = t.event.c, t.analysis.c, t.delivery.c, t.study.c
    f, v, newer = t.finding.c, t.verdict.c, t.verdict.alias().c

    def told(study: sa.ColumnElement[int], *names: Event) -> sa.ColumnElement[bool]:
        return sa.exists().where(e.study_id == study, e.name.in_(names), e.at >= _stamp(since))

    analyses = (
        sa.select(s.id)
        .join(t.analysis)
        .where(a.state == "failed", s.removed_at.is_(None), ~s.selftest)
        .where(told(s.id, Event.ANALYSIS_FAILED, Event.ANALYSIS_QUARANTINED))
        .distinct()
        .order_by(s.id)
    )
    deliveries = (
        sa.select(d.id)
        .select_from(t.delivery.join(t.finding).join(t.verdict).join(t.analysis))
        .where(d.state.in_(("dead", "rejected")), t.finding.c.removed_at.is_(None), of_patients(a.study_id))
        .where(told(a.study_id, Event.DELIVERY_DEAD, Event.DELIVERY_REJECTED))
        .order_by(d.id)
    )
    later_verdict = sa.exists().where(newer.analysis_id == v.analysis_id, newer.revision > v.revision)
    withdrawn = (
        sa.select(d.id, d.finding_id, a.package, VERSION)
        .select_from(t.delivery.join(t.finding).join(t.verdict).join(t.analysis))
        .where(d.state == "withdrawn", f.removed_at.is_(None), of_patients(a.study_id), ~superseded())
        # A notice that a study was not analysed is withdrawn as well when it was after all.
        .where(~(f.object.startswith("refusal.") & later_verdict))
        .where(told(a.study_id, Event.DELIVERY_WITHDRAWN))
    )
    with ledger.read() as connection:
        failed = list(connection.scalars(deliveries))
        rows = connection.execute(withdrawn).all()
        again = [
            row.id
            for row in rows
            if not ledger.stopped(connection, row.package, row.version) and not denied(connection, row.finding_id)
        ]
        return list(connection.scalars(analyses)), sorted(failed + again)


def decided_since(ledger: Ledger, since: datetime) -> list[int]:
    """Complete studies on which anything was decided from then on: admitted, refused or judged; oldest first.

    Without those whose analysis was set aside, self-tests, and what retention has removed files of.
    """
    e, a, s = t.event.c, t.analysis.c, t.study.c
    told = sa.exists().where(
        e.study_id == s.id,
        e.name.in_((Event.STUDY_ADMITTED, Event.STUDY_REFUSED, Event.VERDICT_ISSUED, Event.VERDICT_KEPT)),
        e.at >= _stamp(since),
    )
    query = (
        sa.select(s.id)
        .where(s.state == "complete", s.removed_at.is_(None), ~s.selftest, told)
        .where(~sa.exists().where(a.study_id == s.id, a.state == "failed"))
        .order_by(s.id)
    )
    with ledger.read() as connection:
        return list(connection.scalars(query))


def verdict_seconds(ledger: Ledger, since: datetime) -> list[float]:
    """Seconds from the last instance to the verdict, of the newest studies that were complete from then on."""
    s = t.study.c
    query = (
        sa.select(s.id)
        .where(s.completed_at >= _stamp(since), ~s.selftest)
        .order_by(s.completed_at.desc())
        .limit(NEWEST)
    )
    with ledger.read() as connection:
        keys = connection.scalars(query).all()
    steps = (timeline(study_report(ledger, key))["inferred"] for key in keys)
    return [float(step["seconds"]) for step in steps if step is not None]


def _stamp(at: datetime) -> str:
    """As the ledger writes a time, so that the two compare as text."""
    return at.astimezone(UTC).isoformat(timespec="microseconds")
