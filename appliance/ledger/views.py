"""What the ledger tells to people and machines: studies, counts, and whether its chain holds."""

from __future__ import annotations

from datetime import date, timedelta
from typing import Any

import sqlalchemy as sa

from appliance.events import Event
from appliance.ledger import schema as t
from appliance.ledger.chain import walk_all
from appliance.ledger.database import Row, now, seconds_between, waited
from appliance.ledger.escalation import unreached
from appliance.ledger.selftest import SELFTEST_DESTINATIONS, of_patients
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
        if key is None and uid_or_number.isdecimal() and len(uid_or_number) < 19:
            key = connection.scalar(sa.select(t.study.c.id).where(t.study.c.id == int(uid_or_number)))
        return key


def unconfirmed(ledger: Ledger) -> list[tuple[int, str, Row]]:
    """Provisional alerts of which nothing more will become by itself: the analysis of the whole study failed, or was
    refused.

    Returns:
        Of each the study, why, and its verdict's row.
    """
    a, v = t.analysis.c, t.verdict.c
    newer = t.verdict.alias()
    query = (
        sa.select(a.study_id, a.reason, t.verdict)
        .join(t.analysis)
        .where(
            a.state.in_(("failed", "refused")),
            v.positive,
            v.result["provisional"].as_boolean(),
            ~sa.exists().where(newer.c.analysis_id == v.analysis_id, newer.c.revision > v.revision),
        )
        .order_by(v.id)
    )
    with ledger.read() as connection:
        rows = connection.execute(query).mappings().all()
    return [(row["study_id"], row["reason"], row) for row in rows]


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


def decisions(ledger: Ledger, first: date, last: date) -> list[dict[str, Any]]:
    """What the gate decided on the studies that were complete within those days (UTC): package, state, admission.

    Those of self-tests are left out.
    """
    a, s = t.analysis.c, t.study.c
    query = (
        sa.select(a.study_id, a.package, a.state, a.admission)
        .join(t.study)
        .where(s.completed_at >= first.isoformat(), s.completed_at < (last + timedelta(1)).isoformat(), ~s.selftest)
        .order_by(a.id)
    )
    with ledger.read() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


def troubles(ledger: Ledger) -> dict[str, list[dict[str, Any]]]:
    """What needs somebody: ``deliveries`` that are dead or rejected, ``analyses`` that were set aside.

    What retention has removed needs nobody, nor does a self-test.
    """
    d, f, a = t.delivery.c, t.finding.c, t.analysis.c
    deliveries = (
        sa.select(d.id, a.study_id, f.object, d.destination, d.state, d.reason)
        .select_from(t.delivery.join(t.finding).join(t.verdict).join(t.analysis))
        .where(d.state.in_(("dead", "rejected")), f.removed_at.is_(None), of_patients(a.study_id))
        .order_by(d.id)
    )
    analyses = (
        sa.select(a.study_id, a.package, a.reason)
        .join(t.study)
        .where(a.state == "failed", t.study.c.removed_at.is_(None), ~t.study.c.selftest)
        .order_by(a.id)
    )
    with ledger.read() as connection:
        return {
            "deliveries": [dict(row) for row in connection.execute(deliveries).mappings()],
            "analyses": [dict(row) for row in connection.execute(analyses).mappings()],
        }


def unreached_alerts(ledger: Ledger) -> list[dict[str, Any]]:
    """Alerts that reached nobody, and still have not: study_id, at, reason."""
    with ledger.read() as connection:
        return [{key: row[key] for key in ("study_id", "at", "reason")} for row in unreached(connection)]


def waiting_destinations(ledger: Ledger) -> dict[str, int]:
    """Destination → how many deliveries to it are pending, under way, or steps of the escalation that wait."""
    c = t.delivery.c
    with ledger.read() as connection:
        rows = connection.execute(
            sa.select(c.destination, sa.func.count())
            .where(c.state.in_(("pending", "sending", "held", "stored", "asked")))
            .where(c.destination.not_in(SELFTEST_DESTINATIONS))
            .group_by(c.destination)
        ).all()
    return {row[0]: int(row[1]) for row in rows}


def event_counts(ledger: Ledger) -> dict[str, int]:
    """How often each event of the vocabulary happened."""
    counted, _ = events_since(ledger, 0)
    return {str(name): counted.get(str(name), 0) for name in Event}


def events_since(ledger: Ledger, last: int) -> tuple[dict[str, int], int]:
    """How often each event happened after that one, by its number (0: ever), and the number of the newest.

    Those of a self-test's studies do not count, but for how the test went.
    """
    c = t.event.c
    # All of them stand in the index of names; a few are found by their numbers, if that index is not offered.
    name = c.name + "" if last else c.name
    query = sa.select(name, sa.func.count(), sa.func.max(c.id)).where(c.id > last).group_by(name)
    tests = sa.select(c.name, sa.func.count()).where(c.id > last, ~of_patients(c.study_id)).group_by(c.name)
    tests = tests.where(c.name.not_like("selftest.%"))
    with ledger.read() as connection:
        rows = connection.execute(query).all()
        less = {row[0]: int(row[1]) for row in connection.execute(tests)}
    return {row[0]: int(row[1]) - less.get(row[0], 0) for row in rows}, max((int(row[2]) for row in rows), default=last)


def state_counts(ledger: Ledger) -> dict[str, dict[str, int]]:
    """How many studies, analyses, deliveries, commitments, performed steps and work items are in each state; no
    self-tests."""
    tests = sa.select(t.study.c.id).where(t.study.c.selftest)
    patients: dict[str, sa.ColumnElement[bool]] = {
        "study": t.study.c.id.not_in(tests),
        "analysis": t.analysis.c.study_id.not_in(tests),
        "delivery": t.delivery.c.destination.not_in(SELFTEST_DESTINATIONS),
    }
    with ledger.read() as connection:
        return {
            table.name: {
                row[0]: int(row[1])
                for row in connection.execute(
                    sa.select(table.c.state, sa.func.count())
                    .where(patients.get(table.name, sa.true()))
                    .group_by(table.c.state)
                )
            }
            for table in (t.study, t.analysis, t.delivery, t.commitment, t.performed, t.workitem)
        }


def verify_events(ledger: Ledger) -> int | None:
    """The number of the first event that is not what was written, or is gone; None if there is none."""
    _, fault = walk_all(ledger)
    return fault.event if fault else None


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

    ``seconds`` counts from the last instance that came before the study was complete, so that it is negative before
    and is held against the budget after. It comes from the monotonic clock if both events are of one boot. After a
    study was reopened each milestone is the newest of its kind.
    """
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    newest: dict[str, Any] | None = None
    start: dict[str, Any] | None = None
    stored = {one["id"] for one in report["deliveries"] if one["state"] == "acknowledged"}
    wanted = {
        one["id"]
        for one in report["deliveries"]
        if not one["object"].startswith(("alert.", "worklist.")) and one["state"] != "replaced"
    }
    for event in report["events"]:
        detail, name = event["detail"], event["name"]
        is_alert = str(detail.get("object", "")).startswith("alert.")
        if name in (Event.INSTANCE_STORED, Event.INSTANCE_CONFLICT):
            found.setdefault("first_instance", (event, event))
            newest = event
            if start is None:
                found["last_instance"] = (event, event)
        elif name == Event.STUDY_COMPLETED and newest is not None:
            start = newest
            found["last_instance"] = (start, start)
            found["complete"] = (event, start)
        if start is None:
            continue
        if name == Event.VERDICT_ISSUED:
            found["inferred"] = (event, start)
        elif name == Event.DELIVERY_SENDING and is_alert and detail.get("attempt") == 1:
            found["alert_sent"] = (event, start)
        elif name == Event.DELIVERY_ACKNOWLEDGED and is_alert:
            found["alert_acknowledged"] = (event, start)
        elif name == Event.DELIVERY_ACKNOWLEDGED and detail.get("delivery") in wanted and wanted <= stored:
            found["findings_stored"] = (event, start)
    if "first_instance" in found:
        found["first_instance"] = (found["first_instance"][0], found["last_instance"][0])
    return {
        step: {"at": found[step][0]["at"], "seconds": round(_seconds(found[step][1], found[step][0]), 3)}
        if step in found
        else None
        for step in STEPS
    }


def is_late(report: dict[str, Any], budget_seconds: float) -> bool:
    """Whether a study is past its budget: as its verdict says, or because what is due has not happened by now."""
    if any(one["late"] for one in report["verdicts"]):
        return True
    open_alert = any(
        one["object"].startswith("alert.") and one["state"] not in ("acknowledged", "withdrawn", "held", "spared")
        for one in report["deliveries"]
    )
    unfinished = any(one["state"] in ("admitted", "running", "failed") for one in report["analyses"])
    # Nobody may have come to decide on it.
    decided = any(one["completion"] == report["completions"] for one in report["analyses"])
    unfinished |= report["state"] == "complete" and report["removed_at"] is None and not decided
    overdue = waited(report["last_instance_at"], now()) > budget_seconds
    return overdue and (open_alert or unfinished)


def _seconds(earlier: dict[str, Any], after: dict[str, Any]) -> float:
    if earlier["boot"] == after["boot"]:
        return float(after["monotonic_ns"] - earlier["monotonic_ns"]) / 1e9
    return seconds_between(earlier["at"], after["at"])
