"""What a verdict says against an earlier one on the same study, and what of that one must not leave any more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from appliance.events import Event
from appliance.ledger import schema as t
from appliance.ledger.records import ALERT_STANDS, ANOTHER_PATIENT

_MESSAGES = ("alert.", "worklist.", "refusal.")
"""How the names of findings begin that are no objects: a message follows those before it, see `Ledger.told`."""
_WITHDRAWN = sa.func.coalesce(t.verdict.c.result["withdrawn"].as_string(), "").label("withdrawn")


def in_shadow(verdict: sa.FromClause) -> sa.ColumnElement[bool]:
    """That nobody was told of a verdict."""
    return sa.func.coalesce(verdict.c.result["mode"].as_string(), "") == "shadow"


def told_since(connection: sa.Connection, analysis_id: int, revision: int) -> Sequence[Any]:
    """The later verdicts of an analysis, but for those in shadow, which told nobody anything; newest first.

    Returns:
        Of each revision, positive, withdrawn and limitations.
    """
    v = t.verdict.c
    query = (
        sa.select(v.revision, v.positive, v.result["limitations"].label("limitations"), _WITHDRAWN)
        .where(v.analysis_id == analysis_id, v.revision > revision, ~in_shadow(t.verdict))
        .order_by(v.revision.desc())
    )
    return connection.execute(query).all()


def patient_since(connection: sa.Connection, analysis_id: int, before: int | None = None) -> int:
    """The last revision, below that one, with which ended what was told under another Patient ID; 0 if none did."""
    v = t.verdict.c
    query = sa.select(sa.func.max(v.revision)).where(
        v.analysis_id == analysis_id, v.result["withdrawn"].as_string() == ANOTHER_PATIENT
    )
    return int(connection.scalar(query if before is None else query.where(v.revision < before)) or 0)


def denied(connection: sa.Connection, finding_id: int) -> str:
    """Why an object must not leave any more; '' if it may.

    A picture of a bleed that was denied since would be shown without a word that it is: pictures do not follow one
    another as reports do. What was made of the images under another Patient ID is nobody's. What takes something back
    is never denied.
    """
    v = t.verdict.c
    query = sa.select(t.finding.c.object, v.analysis_id, v.revision, v.positive, _WITHDRAWN)
    row = connection.execute(query.join_from(t.finding, t.verdict).where(t.finding.c.id == finding_id)).one()
    if row.object.startswith(_MESSAGES) or row.withdrawn:
        return ""
    for newer in told_since(connection, row.analysis_id, row.revision):
        if newer.withdrawn == ANOTHER_PATIENT:
            return f"revision {newer.revision} withdrew it: {ANOTHER_PATIENT}"
        if not row.positive or newer.positive or _is_report(row.object) or ALERT_STANDS in (newer.limitations or ()):
            continue
        if newer.withdrawn:
            return f"revision {newer.revision} withdrew it: {newer.withdrawn}"
        return f"revision {newer.revision} is negative, which contradicts it"
    return ""


def takes_back(connection: sa.Connection, delivery_id: int) -> bool:
    """Whether an object tells its destination that one does not hold which it has, or may have, of an earlier verdict
    on the same patient."""
    d, f, v = t.delivery.c, t.finding.c, t.verdict.c
    joined = t.delivery.join(t.finding).join(t.verdict).join(t.analysis)
    query = sa.select(d.destination, f.object, v.analysis_id, v.revision, v.positive, _WITHDRAWN).select_from(joined)
    row = connection.execute(query.where(d.id == delivery_id)).one()
    if row.positive or row.object.startswith(_MESSAGES):
        return False
    earlier = (
        sa.select(d.state, f.object, v.positive, _WITHDRAWN)
        .select_from(joined)
        .where(d.destination == row.destination, v.analysis_id == row.analysis_id, v.revision < row.revision)
        .where(v.revision > patient_since(connection, row.analysis_id, row.revision))
        .where(d.sent_at.is_not(None), d.state.not_in(("rejected", "replaced")) | unanswered())
        .order_by(v.revision.desc(), d.id)
    )
    for one in connection.execute(earlier):
        if one.object.startswith(_MESSAGES):
            continue
        if one.positive or (row.withdrawn and not one.withdrawn):
            return True
        if one.state in ("acknowledged", "stored", "asked"):
            return False  # it has been told
    return False


def unanswered() -> sa.ColumnElement[bool]:
    """That some try of a delivery had no answer, so that nobody knows whether it arrived; for a query of deliveries and
    their analyses.

    Not by its attempts, which begin anew when somebody sends it again.
    """
    e = t.event.c

    def times(*names: Event) -> sa.ScalarSelect[int]:
        mine = (
            e.study_id == t.analysis.c.study_id,
            e.name.in_(names),
            e.detail["delivery"].as_integer() == t.delivery.c.id,
        )
        return sa.select(sa.func.count()).where(*mine).correlate(t.delivery, t.analysis).scalar_subquery()

    return times(Event.DELIVERY_SENDING) > times(Event.DELIVERY_REJECTED, Event.DELIVERY_REPLACED)


def _is_report(name: str) -> bool:
    return name.split(".")[0] == "report"
