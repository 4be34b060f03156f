"""What the engine makes of orders: whose study goes first, and which must be asked about again."""

from __future__ import annotations

import logging

from appliance.ledger.store import Ledger
from appliance.study.arrival import Arrival

log = logging.getLogger(__name__)


class Heeded:
    """The orders that the engine has heard of.

    Args:
        hears: whether this box listens for orders at all.

    Attributes:
        urgent: studies that an order asks to go before all others.
    """

    def __init__(self, ledger: Ledger, hears: bool) -> None:
        self._ledger = ledger
        self._hears = hears
        self._heard = 0
        self._late: set[int] = set()  # asked about again, and nobody was told yet
        self.urgent: set[int] = set()

    def note(self, study_id: int, arrival: Arrival) -> None:
        """Take up what orders say of the urgency of a study."""
        if not arrival.ordered.urgent:
            self.urgent.discard(study_id)
        elif study_id not in self.urgent:
            self.urgent.add(study_id)
            log.info("study %d: its order is urgent; the study goes first", study_id)

    def decide(self, study_id: int, arrival: Arrival) -> None:
        """Write down which orders the gate heeds, before it decides: what is said later is then found to be late."""
        if self._hears:
            self.note(study_id, arrival)
            keys = [one.id for one in arrival.ordered.orders]
            self._ledger.identify_study(study_id, arrival.accessions, keys, arrival.heard)

    def late(self) -> set[int]:
        """Have the gate asked again about complete studies of which an order now says something else."""
        if not self._hears:
            return set()
        found, newest = self._ledger.late_orders(self._heard)
        for study_id, order in found:
            self._ledger.reconsider(study_id, order=order)
            self._late.add(study_id)
            log.info("study %d: order %d says something new; the gate is asked again", study_id, order)
        # Not before: of what a ledger that fails half way kept back, the next call must find all.
        self._heard = newest
        late, self._late = self._late, set()
        return late
