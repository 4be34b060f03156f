"""What the ledger tells to people and machines: studies, counts, and whether its chain holds."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from appliance.events import Event
from appliance.ledger import schema as t
from appliance.ledger.database import event_hash, seconds_between
from appliance.ledger.store import Ledger


def studies(ledger: Ledger, limit: int | None = None) -> list[dict[str, Any]]:
    """Every study, newest first, as `study_report` tells it."""
    with ledger.read() as connection:
        keys = connection.scalars(sa.select(t.study.c.id).order_by(t.study.c.id.desc()).limit(limit)).all()
    return [study_report(ledger, key) for key in keys]


def find_study(ledger: Ledger, uid_or_number: str) -> int | None:
    """A study's number, from its Study Instance UID or the number itself."""
    with ledger.read() as connection:
        key = connection.scalar(sa.select(t.study.c.id).where(t.study.c.study_instance_uid == uid_or_number))
        if key is None and uid_or_number.isdecimal():
            key = connection.scalar(sa.select(t.study.c.id).where(t.study.c.id == int(uid_or_number)))
        return key


def study_report(ledger: Ledger, study_id: int) -> dict[str, Any]:
    """All that the ledger knows of one study, JSON-ready: study, analyses, verdicts, deliveries, timeline."""
    a, v, f = t.analysis.c, t.verdict.c, t.finding.c
    with ledger.read() as connection:
        row = connection.execute(sa.select(t.study).where(t.study.c.id == study_id)).mappings().one()
        counts = connection.execute(
            sa.select(sa.func.count(), sa.func.count(t.instance.c.series_instance_uid.distinct())).where(
                t.instance.c.study_id == study_id, t.instance.c.is_current
            )
        ).one()
        analyses = (
            connection.execute(sa.select(t.analysis).where(a.study_id == study_id).order_by(a.id)).mappings().all()
        )
        verdicts = (
            connection.execute(sa.select(t.verdict).join(t.analysis).where(a.study_id == study_id).order_by(v.id))
            .mappings()
            .all()
        )
        findings = (
            connection.execute(
                sa.select(t.finding)
                .select_from(t.finding.join(t.verdict).join(t.analysis))
                .where(a.study_id == study_id)
                .order_by(f.id)
            )
            .mappings()
            .all()
        )
        deliveries = (
            connection.execute(
                sa.select(t.delivery, f.object, f.uid, f.verdict_id)
                .select_from(t.delivery.join(t.finding).join(t.verdict).join(t.analysis))
                .where(a.study_id == study_id)
                .order_by(t.delivery.c.urgency, t.delivery.c.id)
            )
            .mappings()
            .all()
        )
        events = (
            connection.execute(
                sa.select(t.event.c.at, t.event.c.monotonic_ns, t.event.c.boot, t.event.c.name, t.event.c.detail)
                .where(t.event.c.study_id == study_id)
                .order_by(t.event.c.id)
            )
            .mappings()
            .all()
        )
    return {
        **row,
        "instances": counts[0],
        "series": counts[1],
        "analyses": [dict(one) for one in analyses],
        "verdicts": [dict(one) for one in verdicts],
        "findings": [dict(one) for one in findings],
        "deliveries": [dict(one) for one in deliveries],
        "events": [dict(one) for one in events],
    }


def waiting_destinations(ledger: Ledger) -> dict[str, int]:
    """Destination → how many deliveries to it are pending or under way."""
    c = t.delivery.c
    with ledger.read() as connection:
        rows = connection.execute(
            sa.select(c.destination, sa.func.count()).where(c.state.in_(("pending", "sending"))).group_by(c.destination)
        ).all()
    return {row[0]: int(row[1]) for row in rows}


def event_counts(ledger: Ledger) -> dict[str, int]:
    """How often each event of the vocabulary happened."""
    with ledger.read() as connection:
        rows = connection.execute(sa.select(t.event.c.name, sa.func.count()).group_by(t.event.c.name)).all()
    counted = {row[0]: int(row[1]) for row in rows}
    return {str(name): counted.get(str(name), 0) for name in Event}


def state_counts(ledger: Ledger) -> dict[str, dict[str, int]]:
    """How many studies, analyses and deliveries are in each state."""
    with ledger.read() as connection:
        return {
            table.name: {
                row[0]: int(row[1])
                for row in connection.execute(sa.select(table.c.state, sa.func.count()).group_by(table.c.state))
            }
            for table in (t.study, t.analysis, t.delivery)
        }


def verify_events(ledger: Ledger) -> int | None:
    """The number of the first event whose hash does not follow from those before it; None if all do."""
    previous = ""
    with ledger.read() as connection:
        for row in connection.execute(sa.select(t.event).order_by(t.event.c.id)).mappings():
            body = {key: value for key, value in row.items() if key not in ("id", "hash")}
            if row["hash"] != event_hash(previous, body):
                return int(row["id"])
            previous = row["hash"]
    return None


STEPS = (
    "first_instance",
    "last_instance",
    "complete",
    "inferred",
    "alert_sent",
    "alert_acknowledged",
    "findings_stored",
)
"""The milestones of a study's timeline, in the order in which they are reached."""


def timeline(report: dict[str, Any]) -> dict[str, dict[str, Any] | None]:
    """The milestones of one `study_report`: step → ``{at, seconds}``, or None where it was not reached.

    ``seconds`` counts from the last instance, so that it is negative before and is held against the budget after.
    It comes from the monotonic clock if both events are of one boot. After a study was reopened each milestone is
    that of its newest revision.
    """
    found: dict[str, dict[str, Any]] = {}
    pending = any(
        delivery["state"] in ("pending", "sending") and not delivery["object"].startswith("alert.")
        for delivery in report["deliveries"]
    )
    for event in report["events"]:
        detail, name = event["detail"], event["name"]
        is_alert = str(detail.get("object", "")).startswith("alert.")
        if name in (Event.INSTANCE_STORED, Event.INSTANCE_CONFLICT):
            found.setdefault("first_instance", event)
            found["last_instance"] = event
        elif name == Event.STUDY_COMPLETED:
            found["complete"] = event
        elif name == Event.VERDICT_ISSUED:
            found["inferred"] = event
        elif name == Event.DELIVERY_SENDING and is_alert and detail.get("attempt") == 1:
            found["alert_sent"] = event
        elif name == Event.DELIVERY_ACKNOWLEDGED and is_alert:
            found["alert_acknowledged"] = event
        elif name == Event.DELIVERY_ACKNOWLEDGED and not pending:
            found["findings_stored"] = event
    last = found.get("last_instance")
    return {
        step: {"at": found[step]["at"], "seconds": round(_seconds(last, found[step]), 3)}
        if step in found and last
        else None
        for step in STEPS
    }


def _seconds(earlier: dict[str, Any], after: dict[str, Any]) -> float:
    if earlier["boot"] == after["boot"]:
        return float(after["monotonic_ns"] - earlier["monotonic_ns"]) / 1e9
    return seconds_between(earlier["at"], after["at"])
