"""Requests that are refused are written down, but a flood of them must not fill the disk."""

from __future__ import annotations

import logging
import threading
import time

from sqlalchemy.exc import SQLAlchemyError

from appliance.ledger.store import Ledger

log = logging.getLogger(__name__)

A_MINUTE = 30
"""Rows at most in a minute; how many more there were stands in the next."""


class Refusals:
    """Writes refusals down. Threads may share it."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._lock = threading.Lock()
        self._minute = 0
        self._rows = 0
        self._unwritten = 0

    def note(self, by: str, what: str, answer: str, reason: str) -> None:
        """Write one down, if there is room for it.

        Args:
            answer: the status, such as 0xC301 or HTTP 413.
        """
        with self._lock:
            minute = int(time.monotonic() // 60)
            if minute != self._minute:
                self._minute, self._rows = minute, 0
            self._rows += 1
            if self._rows > A_MINUTE:
                self._unwritten += 1
                return
            unwritten, self._unwritten = self._unwritten, 0
        more = f" ({unwritten} more were not written down)" if unwritten else ""
        log.warning("worklist: %s by %s refused with %s: %s%s", what, by, answer, reason, more)
        try:
            self._ledger.refuse_workitem(by, what, answer, reason + more)
        except SQLAlchemyError:
            log.exception("worklist: a refusal could not be written down")
