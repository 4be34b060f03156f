"""The part of `scanside deliver` that says on the worklist which studies have no answer in time."""

from __future__ import annotations

import logging

from appliance.ledger.marks import LATE, Mark
from appliance.ledger.store import Ledger
from appliance.settings import Settings, WorklistDestination

log = logging.getLogger(__name__)


def mark_late(settings: Settings, ledger: Ledger) -> bool:
    """Mark the readings of studies that are past the budget and have no answer, and take that back once they have one;
    whether anything changed.

    Nobody is moved by it: that an answer is late says nothing of the patient.
    """
    if settings.worklist is None or not any(isinstance(one, WorklistDestination) for one in settings.destination):
        return False
    late = ledger.late_studies(settings.models.packages, settings.budget.seconds)
    marked = ledger.marked_late()
    reading = frozenset(settings.worklist.reading_codes)
    for uid in late.keys() - marked:
        came = late[uid]
        said = f"LATE: there is no answer yet; the last image came at {came[11:19]} UTC. Do not wait for it."
        done = ledger.mark_study(Mark(f"late.{uid}.{came}", uid, LATE, "suggest", True, said, {}), reading)
        log.warning("worklist: a study past its budget is marked late (%s)", done)
    for uid in marked - late.keys():
        ledger.mark_study(Mark(f"answered.{uid}", uid, LATE, "suggest", False, "", {}), reading)
    return late.keys() != marked
