"""The box's figures, in the words of the ledger."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from appliance.events import Event
from appliance.ledger.store import Ledger
from appliance.ledger.views import events_since, state_counts


class LedgerMetrics(Collector):
    """Counters of events and gauges of states, read when they are asked for. For one thread."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        # Events are never changed: those that were counted once need not be read again, and a ledger holds millions.
        self._counted = Counter[str]({str(name): 0 for name in Event})
        self._last = 0

    def collect(self) -> Iterable[Metric]:
        """Two short read transactions.

        Raises:
            SQLAlchemyError: the ledger cannot be read.
        """
        counts, self._last = events_since(self._ledger, self._last)
        self._counted.update(counts)
        events = CounterMetricFamily("scanside_events", "Events in the ledger, by name.", labels=["event"])
        for name, count in self._counted.items():
            events.add_metric([name], count)
        yield events
        for table, states in state_counts(self._ledger).items():
            gauge = GaugeMetricFamily(f"scanside_{table}_state", "How many are in each state.", labels=["state"])
            for state, count in sorted(states.items()):
                gauge.add_metric([state], count)
            yield gauge


def metrics_text(ledger: Ledger) -> str:
    """What `LedgerMetrics` tells, in the Prometheus text exposition format 0.0.4."""
    return generate_latest(LedgerMetrics(ledger)).decode()
