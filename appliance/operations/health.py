"""The box's figures, in the words of the ledger."""

from __future__ import annotations

from appliance.ledger.store import Ledger
from appliance.ledger.views import event_counts, state_counts


def metrics_text(ledger: Ledger) -> str:
    """Counters of events and gauges of states, in the Prometheus text exposition format 0.0.4."""
    lines = [
        "# HELP scanside_events_total Events in the ledger, by name.",
        "# TYPE scanside_events_total counter",
        *(f'scanside_events_total{{event="{name}"}} {count}' for name, count in event_counts(ledger).items()),
    ]
    for table, states in state_counts(ledger).items():
        lines += [
            f"# HELP scanside_{table}_state How many are in each state.",
            f"# TYPE scanside_{table}_state gauge",
            *(f'scanside_{table}_state{{state="{state}"}} {count}' for state, count in sorted(states.items())),
        ]
    return "\n".join(lines) + "\n"
