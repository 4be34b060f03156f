"""How the box tells that it is well: its figures, in the words of the ledger, and signs of life to systemd."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import datetime

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from appliance.events import Event
from appliance.ledger.store import Ledger
from appliance.ledger.views import events_since, state_counts, unreached_alerts

log = logging.getLogger(__name__)


class LedgerMetrics(Collector):
    """Counters of events and gauges of states, read when they are asked for. For one thread."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        # Events are never changed: those that were counted once need not be read again, and a ledger holds millions.
        self._counted = Counter[str]({str(name): 0 for name in Event})
        self._last = 0

    def collect(self) -> Iterable[Metric]:
        """Short read transactions.

        Raises:
            SQLAlchemyError: the ledger cannot be read.
        """
        counts, self._last = events_since(self._ledger, self._last)
        self._counted.update(counts)
        events = CounterMetricFamily("scanside_events", "Events in the ledger, by name.", labels=["event"])
        for name, count in self._counted.items():
            events.add_metric([name], count)
        yield events
        nobody = "Alerts that nobody has acknowledged, and somebody has to look after."
        yield GaugeMetricFamily("scanside_alerts_unreached", nobody, float(len(unreached_alerts(self._ledger))))
        yield from _selftests(self._ledger)
        for table, states in state_counts(self._ledger).items():
            gauge = GaugeMetricFamily(f"scanside_{table}_state", "How many are in each state.", labels=["state"])
            for state, count in sorted(states.items()):
                gauge.add_metric([state], count)
            yield gauge


def _selftests(ledger: Ledger) -> Iterable[Metric]:
    """How the newest self-test went; no line where there was none."""
    labels = ["expected"]
    passed = GaugeMetricFamily("scanside_selftest_passed", "1 if the newest self-test came out right.", labels=labels)
    took = GaugeMetricFamily(
        "scanside_selftest_seconds", "From its last image to all that was expected.", labels=labels
    )
    ended = GaugeMetricFamily("scanside_selftest_end_time_seconds", "When it ended, since 1970.", labels=labels)
    for one in ledger.newest_selftests():
        expected = ["positive" if one.expected else "negative"]
        passed.add_metric(expected, float(bool(one.passed)))
        if one.seconds is not None:
            took.add_metric(expected, one.seconds)
        if one.ended_at is not None:
            ended.add_metric(expected, datetime.fromisoformat(one.ended_at).timestamp())
    yield from (passed, took, ended)


def metrics_text(ledger: Ledger) -> str:
    """What `LedgerMetrics` tells, in the Prometheus text exposition format 0.0.4."""
    return generate_latest(LedgerMetrics(ledger)).decode()


def notify(*fields: str) -> None:
    """Tell systemd about this service, by the protocol of sd_notify(3); nothing where systemd did not start it.

    Args:
        fields: such as READY=1, STOPPING=1, STATUS=one line for people.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
            manager.settimeout(1.0)
            manager.connect("\0" + address[1:] if address.startswith("@") else address)
            manager.send("\n".join(fields).encode())
    except OSError as error:
        # A service goes on without systemd's ear; where it waits for a sign of life, systemd acts by itself.
        log.warning("systemd does not hear: %s", error)


class Watchdog:
    """Signs of life to systemd, from the loops that do the work: there is no thread of its own that could outlive them.

    A loop signs each of its turns. With that systemd is pinged, unless another loop has not signed for longer than it
    may take; then nobody pings any more, and systemd ends the service after its WatchdogSec and starts it again.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        # WATCHDOG_PID: set for the service's own process; a child that inherits the rest is not asked.
        ours = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._period = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6 if ours else 0.0
        self._clock = clock
        self._lock = threading.Lock()
        self._signed: dict[str, tuple[float, float]] = {}  # loop → when it signed last, how long it may take
        self._pinged = float("-inf")
        self._silent = ""

    def loop(self, name: str, seconds: float) -> Callable[[], None]:
        """Have a loop watched from now on; returns what it calls at every turn.

        Args:
            seconds: longest that one of its turns may take.
        """

        def sign() -> None:
            self._sign(name, seconds)

        sign()
        return sign

    def _sign(self, name: str, seconds: float) -> None:
        if not self._period:
            return
        now = self._clock()
        with self._lock:
            self._signed[name] = now, seconds
            silent = next((one for one, (at, longest) in self._signed.items() if now - at > longest), "")
            if silent != self._silent:
                self._silent = silent
                if silent:
                    log.error("%s has not turned for too long; systemd will start this service again", silent)
            if silent or now - self._pinged < self._period / 4:
                return
            self._pinged = now
        notify("WATCHDOG=1")
