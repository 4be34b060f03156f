"""Asking a PACS to commit itself to keeping what was stored there; until it has, the delivery is not done."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from uuid import uuid4

from appliance.ledger.database import Row
from appliance.ledger.store import Ledger
from dicom_io.commitment import CommitmentReport, CommitmentRequest, Reference
from dicom_io.commitment_user import ask
from dicom_io.errors import NotAccepted, ScansideError
from dicom_io.scu import Peer, identity

log = logging.getLogger(__name__)

Policy = Literal["if_offered", "required", "no"]


@dataclass(frozen=True, slots=True)
class Asker:
    """Asks one destination for storage commitment of all that is stored there and due, in one transaction.

    Attributes:
        folder: of the findings' files.
        peer: makes the peer for each request, so that renewed certificates are read.
        report_seconds: how long a report may take before the request is made anew.
        attempts, first_retry_seconds, longest_retry_seconds: as the outbox has them; a try is a store or a request.
    """

    ledger: Ledger
    destination: str
    folder: Path
    peer: Callable[[], Peer]
    calling_ae: str
    policy: Policy
    report_seconds: float
    attempts: int
    first_retry_seconds: float
    longest_retry_seconds: float

    def __call__(self) -> bool:
        """Ask for what is due; whether anything was."""
        # PS3.5 B.2; by chance, so that nobody can report on a request that he has not seen.
        transaction = f"2.25.{uuid4().int}"
        rows = self.ledger.ask_for_commitment(self.destination, transaction, self.report_seconds)
        spent = [row for row in rows if row["attempts"] >= self.attempts]
        if spent:
            log.error("%d deliveries to %s are dead letters: never committed", len(spent), self.destination)
            said = "the peer never committed itself to keeping it"
            self.ledger.settle_asked(spent, transaction, "give_up", said)
        asked = [row for row in rows if row not in spent]
        if asked:
            self._ask(asked, transaction)
        return bool(rows)

    def _ask(self, rows: list[Row], transaction: str) -> None:
        names = f"{len(rows)} objects at {self.destination}"
        if self.policy == "no":
            self.ledger.settle_asked(rows, transaction, "acknowledge", "stored; commitment is no longer asked for")
            return
        named = {row["id"]: reference for row in rows if (reference := self._reference(row, transaction))}
        rows = [row for row in rows if row["id"] in named]
        if not rows:
            return
        try:
            request = CommitmentRequest(transaction, tuple(named.values()))
            report = ask(self.peer(), self.calling_ae, request, arrived=lambda: not self.ledger.is_asked(transaction))
        except NotAccepted as refusal:
            if self.policy == "if_offered":
                said = "stored; it offers no storage commitment"
                self.ledger.settle_asked(rows, transaction, "acknowledge", said)
                log.info("%s: %s", names, said)
            else:
                self._later(rows, transaction, str(refusal))
        except ScansideError as error:
            self._later(rows, transaction, str(error))
        except Exception as error:
            log.exception("storage commitment of %s could not be asked for in a way nobody foresaw", names)
            self._later(rows, transaction, f"{type(error).__name__}: {error}")
        else:
            log.info("storage commitment of %s: %s", names, "reported" if report else "asked for")
            if report is not None:
                self._reported(report)

    def _reference(self, row: Row, transaction: str) -> Reference | None:
        """What to ask for; None, and a dead letter, where its file is gone: it must not hold up the others."""
        try:
            return Reference(*identity(self.folder / row["path"]))
        except (OSError, ScansideError) as error:
            log.error("delivery %d to %s is a dead letter: %s", row["id"], self.destination, error)
            self.ledger.settle_asked([row], transaction, "give_up", f"its file cannot be read: {error}")
            return None

    def _reported(self, report: CommitmentReport) -> None:
        self.ledger.storage_committed(report, self.attempts, self.first_retry_seconds)

    def _later(self, rows: list[Row], transaction: str, reason: str) -> None:
        tries = max(row["attempts"] for row in rows)
        wait = min(self.longest_retry_seconds, self.first_retry_seconds * 2.0 ** min(tries, 30))
        log.warning("storage commitment at %s: try again in %g s (%s)", self.destination, wait, reason)
        self.ledger.settle_asked(rows, transaction, "unask", reason, wait)
