"""Beside the engine: whether what runs is what was approved, and whether the records of that can be trusted."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial

from appliance.events import Event
from appliance.governance.board import integrity
from appliance.governance.indication import Criterion
from appliance.governance.integrity import Files, watched
from appliance.governance.package import Package
from appliance.inference.served import repository_problem, served_problem
from appliance.inference.triton import TritonClient, TritonError
from appliance.ledger.store import Ledger
from appliance.operations.audit import Auditor
from appliance.settings import Settings

log = logging.getLogger(__name__)

STEP_SECONDS = 1.0
SERVED_SECONDS = 10.0
"""So often Triton is asked what it serves."""
BREATHER = 4.0
"""While a large ledger is walked for the first time, so much longer than its piece took the walk pauses."""


class Guard:
    """Looks at the packages' files, at Triton, and at the chain of events; tells the engine what it found.

    One thread steps; any may ask.

    Args:
        broken: packages that could not be loaded, and why.
    """

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        packages: Sequence[Package],
        client: TritonClient,
        broken: Mapping[str, str] | None = None,
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._packages = packages
        self._client = client
        self._files = watched(settings, packages)
        home = settings.triton_directory
        ours = settings.triton.managed and settings.box.device == "cpu"
        self._repository = {
            one.name: Files(
                [home / "repository" / one.model.triton_name, home / "backends"],
                partial(repository_problem, home, one),
            )
            for one in packages
            if ours
        }
        self._served: dict[str, str] = {}
        self._ask_at = 0.0
        self._auditor: Auditor | None = None
        self._problems: dict[str, str] = {}
        for name, problem in (broken or {}).items():
            self._drifted(name, problem)

    @property
    def fault(self) -> str:
        """Why the records of the board are not to be trusted; '' if they are."""
        return self._auditor.fault if self._auditor else ""

    def problem(self, name: str) -> str:
        """Which file of a package is not what it must be, and how it differs; '' if all are."""
        return self._problems.get(name, "")

    def integrity(self, package: Package) -> Criterion:
        """The criterion of a package's admissions."""
        return integrity(package, self.problem(package.name))

    def run(self, stopping: threading.Event) -> None:
        """Step until told to stop."""
        while not stopping.is_set():
            began = time.monotonic()
            more = False
            try:
                more = self.step()
            except Exception:
                log.exception("the guard stumbled; it goes on")
            stopping.wait((time.monotonic() - began) * BREATHER if more else STEP_SECONDS)

    def step(self) -> bool:
        """Look once; True if there is more of the chain to look at soon."""
        for package in self._packages:
            if problem := self._look_at(package):
                self._drifted(package.name, problem)
            elif self._problems.pop(package.name, ""):
                log.warning("%s is again what was signed; it goes on", package.name)
                self._ledger.log(Event.PACKAGE_RESTORED, package=package.name, version=package.version)
        if time.monotonic() >= self._ask_at:
            self._ask_at = time.monotonic() + SERVED_SECONDS
        if self._auditor is None:
            self._auditor = Auditor(self._ledger, self._settings.head_path)
        return self._auditor.step()

    def _look_at(self, package: Package) -> str:
        """What is wrong with a package; also that it cannot be looked at, which holds up no other check."""
        try:
            return self._files[package.name].look() or self._look_at_triton(package)
        except Exception as error:
            log.exception("%s could not be looked at", package.name)
            return f"{package.folder}: it could not be looked at ({type(error).__name__}: {error})"

    def _look_at_triton(self, package: Package) -> str:
        """What Triton has of a package; what it had, while it does not run: it makes its files anew at its start."""
        files = self._repository.get(package.name)
        problem = files.look() if files else ""
        known = self._served.get(package.name, "")
        if not problem and not known and time.monotonic() < self._ask_at:
            return ""
        try:
            served = served_problem(self._client, package, self._settings.box.device)
        except TritonError:
            return known
        # Only now: it runs, so what is wrong with its files is not that they are just being written.
        problem = (files.look() if files else "") or served
        self._served[package.name] = problem
        return problem

    def _drifted(self, name: str, problem: str) -> None:
        if self._problems.get(name) == problem:
            return
        self._problems[name] = problem
        log.error("PACKAGE %s IS NOT WHAT WAS SIGNED AND APPROVED, and is refused: %s", name, problem)
        self._ledger.log(Event.PACKAGE_DRIFTED, package=name, problem=problem)
