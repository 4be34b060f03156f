"""The worklist over DIMSE: requests of `dicom_io.ups` on the ledger, and reports to subscribers that we can call."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from appliance.ledger.store import Ledger
from appliance.worklist.refusals import Refusals
from dicom_io.errors import ScansideError
from dicom_io.scu import Peer
from dicom_io.ups import send_events
from dicom_io.workitem import Step, WorkitemError

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 300.0
POLL_SECONDS = 1.0


class Provider:
    """What DICOM peers ask of the worklist; see `dicom_io.ups.Owner`.

    Args:
        known: Receiving AEs that we can call.
        changed: called when somebody may have something to hear.
    """

    def __init__(
        self,
        ledger: Ledger,
        refusals: Refusals,
        reading: frozenset[str],
        known: Mapping[str, Peer],
        changed: Callable[[], None],
    ) -> None:
        self._ledger = ledger
        self._refusals = refusals
        self._reading = reading
        self._known = known
        self._changed = changed

    def create(self, peer: str, uid: str, step: Step) -> int:
        """A new item."""
        return self._told(self._ledger.create_workitem(uid, step, peer, self._reading))

    def get(self, uid: str) -> Step:
        """One item."""
        step: Step = self._ledger.workitem(uid)["step"]
        return step

    def update(self, peer: str, uid: str, changes: Step, lock: str) -> int:
        """New values."""
        return self._told(self._ledger.update_workitem(uid, changes, lock, peer, self._reading))

    def change_state(self, peer: str, uid: str, state: str, lock: str) -> int:
        """Claim, complete or cancel."""
        return self._told(self._ledger.change_state(uid, state, lock, peer))

    def request_cancel(self, peer: str, uid: str, said: Step) -> int:
        """Ask whoever claimed it to cancel."""
        return self._told(self._ledger.request_cancel(uid, said, peer))

    def subscribe(self, ae_title: str, uid: str, locked: bool, keys: Step) -> int:
        """Reports to an AE that we can call.

        Raises:
            WorkitemError: we do not know its address (0xC308).
        """
        if ae_title not in self._known:
            raise WorkitemError(0xC308)
        self._ledger.subscribe(ae_title, uid, locked=locked, keys=keys)
        return self._told(0)

    def unsubscribe(self, ae_title: str, uid: str) -> int:
        """No more reports."""
        self._ledger.unsubscribe(ae_title, uid)
        return 0

    def suspend(self, ae_title: str, uid: str) -> int:
        """No reports of further items."""
        self._ledger.suspend(ae_title, uid)
        return 0

    def find(self, keys: Mapping[str, Any], limit: int) -> list[Step]:
        """What matches."""
        return self._ledger.find_workitems(keys, limit)

    def refused(self, peer: str, what: str, status: int, reason: str) -> None:
        """Written down."""
        self._refusals.note(f"UPS {peer}", what, f"0x{status:04X}", reason)

    def _told(self, status: int) -> int:
        self._changed()
        return status


class EventSender(threading.Thread):
    """Brings reports to one subscriber, in their order, until it is stopped; one that does not answer is asked again.

    Args:
        turn: called at every turn of the loop.
    """

    def __init__(self, ledger: Ledger, peer: Peer, calling_ae: str, turn: Callable[[], None] = lambda: None) -> None:
        super().__init__(name=f"ups-events-{peer.ae_title}", daemon=True)
        self._ledger = ledger
        self._peer = peer
        self._calling = calling_ae
        self._turn = turn
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._pause = FIRST_PAUSE

    def wake(self) -> None:
        """There may be something to tell."""
        self._wake.set()

    def stop(self) -> None:
        """Begin no further association."""
        self._stopping.set()
        self._wake.set()

    def run(self) -> None:
        """The thread's loop."""
        while not self._stopping.is_set():
            self._turn()
            self._wake.clear()
            try:
                rows = self._ledger.next_events(self._peer.ae_title, 50)
                if rows:
                    events = [(row["uid"], row["event_type"], row["information"]) for row in rows]
                    send_events(self._peer, self._calling, events, partial(self._heard, [row["id"] for row in rows]))
                    self._pause = FIRST_PAUSE
                    continue
            except ScansideError as error:
                log.warning("worklist: %s is not told of work items: %s", self._peer, error)
                # A subscriber that is away would be called at every event without this.
                self._stopping.wait(self._pause)
                self._pause = min(LONGEST_PAUSE, 2 * self._pause)
                continue
            except Exception:
                log.exception("worklist: reports to %s stumbled; they go on", self._peer)
                self._stopping.wait(self._pause)
            self._wake.wait(POLL_SECONDS)

    def _heard(self, ids: Sequence[int], place: int) -> None:
        self._ledger.heard(ids[place])
