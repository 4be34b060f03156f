"""The outbox: one ordered worker a destination, each at its own pace, so that a dead peer delays nobody else."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Literal, Self

from sqlalchemy.exc import SQLAlchemyError

from appliance.ledger.database import Row
from appliance.ledger.store import Ledger
from dicom_io.errors import ScansideError

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""How long a lost ring of the doorbell can delay a delivery."""

_SAID = {
    "acknowledge": "acknowledged",
    "store": "stored, storage commitment is asked for",
    "retry": "try again in {wait:g} s",
    "reject": "rejected",
    "decline": "not taken there",
}


class Said(str):
    """What a peer answered, with its own words, which may name a patient: only the delivery's row has them.

    Attributes:
        condition: the same without these words, for log and events.
    """

    condition: str

    def __new__(cls, said: str, condition: str) -> Self:
        """The whole, and the condition alone."""
        made = super().__new__(cls, said)
        made.condition = condition
        return made


Result = tuple[Literal["acknowledge", "store", "retry", "reject", "decline"], str]
"""What became of one try, and what the peer said: a `Said` where words of the peer's own are in it. "store": it has it,
and is still to be asked to keep it; "decline": it takes no objects of this kind."""


class Worker(threading.Thread):
    """Delivers what is due for one destination, most urgent first, until it is stopped.

    Args:
        deliver: one try at one row of `Ledger.take_delivery`; a ScansideError, no peer or a file
            of the site that cannot be used, counts as "retry".
        attempts: after that many tries a delivery is a dead letter.
        budget_seconds: the latency budget that an acknowledged alert is held against.
        steps: names of the destinations that are steps of the escalation.
        order_seconds: see `Ledger.take_delivery`.
        turn: called at every turn of the loop, so between two tries, but after one that stumbled.
        instead: object → what is delivered in its place where the destination declines it: the first of them that the
            verdict has.
        ask: called when no delivery is due: asks for storage commitment of what is; whether anything was.
    """

    def __init__(
        self,
        ledger: Ledger,
        destination: str,
        deliver: Callable[[Row], Result],
        *,
        attempts: int,
        first_retry_seconds: float,
        longest_retry_seconds: float,
        budget_seconds: float,
        steps: Collection[str] = (),
        order_seconds: float = 0.0,
        turn: Callable[[], None] = lambda: None,
        instead: Callable[[str], Sequence[str]] = lambda _: (),
        ask: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(name=f"deliver-{destination}", daemon=True)
        self._ledger = ledger
        self._destination = destination
        self._deliver = deliver
        self._attempts = attempts
        self._first = first_retry_seconds
        self._longest = longest_retry_seconds
        self._budget = budget_seconds
        self._steps = steps
        self._order = order_seconds
        self._pause = POLL_SECONDS
        self._turn = turn
        self._instead = instead
        self._ask = ask
        self._wake = threading.Event()
        self._stopping = threading.Event()

    def wake(self) -> None:
        """Look for work now."""
        self._wake.set()

    def stop(self) -> None:
        """Take no further delivery; `join` waits for the one at hand."""
        self._stopping.set()
        self._wake.set()

    def run(self) -> None:
        """The thread's loop."""
        well = True
        while not self._stopping.is_set():
            if well:
                self._turn()
            self._wake.clear()
            try:
                worked = self._work()
                well = True
                if worked:
                    continue
            except Exception:
                # A ledger that cannot be written now may be later; a worker that ends never delivers again. It does not
                # pass for well meanwhile.
                log.exception("delivery to %s stumbled; it goes on", self._destination)
                well = False
            self._wake.wait(self._pause)
            self._pause = POLL_SECONDS

    def _work(self) -> bool:
        """One try, or one question; whether there was anything to do."""
        row = self._ledger.take_delivery(self._destination, self._longest, self._order)
        if row is None:
            return self._ask()
        self._try(row)
        return True

    def _try(self, row: Row) -> None:
        attempt = row["attempts"] + 1
        try:
            outcome, reason = self._deliver(row)
        except ScansideError as error:
            outcome, reason = "retry", str(error)
        except Exception as error:
            log.exception("delivery %d failed in a way nobody foresaw", row["id"])
            outcome, reason = "retry", f"{type(error).__name__}: {error}"
        if outcome == "retry" and attempt >= self._attempts:
            log.error("delivery %d to %s is a dead letter: %s", row["id"], self._destination, _condition(reason))
            self._settle(row, "give_up", reason)
            return
        wait = min(self._longest, self._first * 2.0 ** min(attempt - 1, 30)) if outcome == "retry" else 0.0
        self._pause = min(POLL_SECONDS, wait) if outcome == "retry" else POLL_SECONDS
        budget = self._budget if row["object"].startswith("alert.") else None
        self._settle(row, outcome, reason, wait_seconds=wait, budget_seconds=budget)
        instead = " or ".join(self._instead(row["object"])) if outcome == "decline" else ""
        log.log(
            logging.WARNING if outcome in ("reject", "decline") else logging.INFO,
            "study %d: %s to %s: %s%s%s",
            row["study_id"],
            row["object"],
            self._destination,
            _SAID[outcome].format(wait=wait),
            f", {instead} goes there instead" if instead else "",
            f" ({_condition(reason)})" if reason else "",
        )

    def _settle(
        self,
        row: Row,
        outcome: Literal["acknowledge", "store", "retry", "reject", "decline", "give_up"],
        reason: str,
        *,
        wait_seconds: float = 0.0,
        budget_seconds: float | None = None,
    ) -> None:
        """Write down what became of a delivery; again and again if the ledger cannot be written.

        An answer that was lost here would be a message sent twice, or one that nobody sends any more.
        """
        while True:
            self._turn()
            try:
                nobody = self._ledger.settle_delivery(
                    row,
                    outcome,
                    reason,
                    wait_seconds=wait_seconds,
                    budget_seconds=budget_seconds,
                    steps=self._steps,
                    instead=self._instead(row["object"]),
                    condition=_condition(reason),
                )
                if nobody:
                    log.error("study %d: NOBODY WAS REACHED by its alert", row["study_id"])
                return
            except (OSError, SQLAlchemyError):
                log.exception("delivery %d: its outcome cannot be written now", row["id"])
                if self._stopping.wait(POLL_SECONDS):
                    return  # it is sent again, under the same name, after the next start


def _condition(reason: str) -> str:
    return reason.condition if isinstance(reason, Said) else reason
