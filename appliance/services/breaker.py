"""Beside the engine: whether Triton can be asked, known without waiting for a server that hangs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from appliance.events import Event
from appliance.governance.package import Package
from appliance.inference.triton import TritonClient
from appliance.ledger.store import Ledger

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""So often a server that answers is looked at."""
TRY_SECONDS = 0.25
"""So often one that does not is tried again."""


class Breaker:
    """A circuit breaker between engine and Triton, for each package.

    It is closed while the server answers. A request that failed opens it: no analysis is begun, so that none loses a
    try to a server that is gone. A slab of zeros that comes back closes it again.

    One thread steps, and may wait for the server; any may ask, and never waits.

    Args:
        on_change: called when it opened or closed.
    """

    def __init__(
        self,
        ledger: Ledger,
        packages: Sequence[Package],
        client: TritonClient,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._ledger = ledger
        self._packages = packages
        self._client = client
        self._on_change = on_change
        self._lock = threading.Lock()
        self._problems = {package.name: "it was not asked yet" for package in packages}
        self._lost: set[str] = set()
        self._doubted = threading.Event()

    def problem(self, name: str) -> str:
        """Why Triton cannot be asked for a package, as far as is known; '' if it can."""
        return self._problems[name]

    def failed(self, name: str, said: str) -> None:
        """A request failed: nothing more is begun for the package until the server has proven itself."""
        self._note(name, said)
        self._doubted.set()

    def run(self, stopping: threading.Event) -> None:
        """Step until told to stop."""
        while not stopping.is_set():
            try:
                self.step()
            except Exception:
                log.exception("the breaker stumbled; it goes on")
            self._doubted.wait(TRY_SECONDS if any(self._problems.values()) else LOOK_SECONDS)
            self._doubted.clear()

    def step(self) -> None:
        """Look at the server once."""
        for package in self._packages:
            self._note(package.name, self._client.problem(package))

    def _note(self, name: str, said: str) -> None:
        with self._lock:
            before, self._problems[name] = self._problems[name], said
            lost, found = bool(said) and not before, not said and name in self._lost
            if lost:
                self._lost.add(name)
            self._lost -= {name} if found else set()
        if said != before:
            log.log(logging.WARNING if said else logging.INFO, "Triton, for %s: %s", name, said or "ready")
        # A server that is still starting was never lost.
        if lost:
            self._ledger.log(Event.TRITON_LOST, package=name, problem=said)
        if found:
            self._ledger.log(Event.TRITON_RESTORED, package=name)
        if bool(said) != bool(before):
            self._on_change()
