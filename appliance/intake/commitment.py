"""Storage commitment: a request is written down before it is answered, and its report sent until it is acknowledged.

The report goes out on the association that asked for it, if that stays open long enough to take it, and otherwise on
a new one to the peer's configured address. Whatever is sent is in the ledger before. Where an answer is lost, by the
network or by the end of this process, the report is sent again: to the peer it is the same transaction, which
PS3.4 J.3.3 lets it hear of twice. Each try looks anew at what is there, so a late report tells no old truth.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from appliance.events import Event
from appliance.intake.spool import is_intact, path_of
from appliance.ledger.commitments import Held, no_address, requested
from appliance.ledger.database import Row
from appliance.ledger.store import Ledger
from dicom_io.commitment import (
    CLASS_INSTANCE_CONFLICT,
    INVALID_ARGUMENT,
    NO_SUCH_INSTANCE,
    PROCESSING_FAILURE,
    RESOURCE_LIMITATION,
    CommitmentReport,
    CommitmentRequest,
    Failure,
    Reference,
    send_report,
)
from dicom_io.errors import PeerError
from dicom_io.handlers import Answer, Session
from dicom_io.scu import Peer

log = logging.getLogger(__name__)

SUCCESS = 0x0000

HOLD_SECONDS = 1.0
"""So long the association that asked is left alone before its report is sent on it.

A device that does not expect it there releases its association right after the answer to its request, and a report
that crosses that release would be lost: it would be sent twice."""

OWN_WAY_SECONDS = 15.0
"""After this time the report goes out on a new association, although the one that asked is still open: it is busy."""

JUDGE_SECONDS = 2.0
"""So long the association that asked waits for the files of its request to be read; then it goes on, and asks again."""

POLL_SECONDS = 1.0
"""How long a report that fell due may wait for its worker."""


@dataclass(slots=True)
class _Asked:
    """What one open association asked for and has not been told yet.

    Attributes:
        waiting: number of the request → when it may be sent on this association, by the monotonic clock.
        judging: what the try at hand began with, and the report that is being made.
        sent: Transaction UID → what the try began with, and the report that the peer has to answer.
    """

    waiting: dict[int, float] = field(default_factory=dict)
    judging: tuple[Row, Future[CommitmentReport]] | None = None
    sent: dict[str, tuple[Row, CommitmentReport]] = field(default_factory=dict)


class CommitmentProvider:
    """The provider's handlers of storage commitment, for `dicom_io.scp`. Called from many association threads at once.

    Args:
        spool: folder of received files.
        peers: AE title → where a device takes reports on associations of ours.
        shortage: why the disk should take no more, '' if it may; a request is a row, and rows fill disks.
        due: called when a report falls due on a new association.
        attempts: after that many tries a report is a dead letter.
        first_retry_seconds: wait after the first failed try; it doubles with each, up to ``longest_retry_seconds``.
    """

    def __init__(
        self,
        ledger: Ledger,
        spool: Path,
        peers: Mapping[str, Peer],
        *,
        attempts: int,
        first_retry_seconds: float,
        longest_retry_seconds: float,
        shortage: Callable[[], str] = lambda: "",
        due: Callable[[], None] = lambda: None,
        hold_seconds: float = HOLD_SECONDS,
    ) -> None:
        self._ledger = ledger
        self._spool = spool
        self._peers = peers
        self._attempts = attempts
        self._first = first_retry_seconds
        self._longest = longest_retry_seconds
        self._shortage = shortage
        self._due = due
        self._hold = hold_seconds
        self._asked: dict[int, _Asked] = {}
        self._judges = ThreadPoolExecutor(2, "judge")  # to read a long series anew takes its time
        self._lock = threading.Lock()

    @property
    def longest_pause(self) -> float:
        """No report waits longer for its next try, in seconds."""
        return max(self._longest, OWN_WAY_SECONDS)

    # --- on the association that asks ---------------------------------------------------------------------

    def commitment(self, session: Session, request: CommitmentRequest) -> int:
        """Write a request down; the DIMSE status to answer its N-ACTION with (PS3.7 10.1.4.1.10)."""
        try:
            if shortage := self._shortage():
                return self._refuse(session, RESOURCE_LIMITATION, shortage)
            key = self._ledger.request_commitment(
                request, session.calling_ae, session.called_ae, session.address, due_in=OWN_WAY_SECONDS
            )
        except (OSError, SQLAlchemyError):
            log.exception("a request for storage commitment could not be written down")
            return PROCESSING_FAILURE
        if key is None:
            log.warning("storage commitment refused: its Transaction UID was used for other instances")
            return INVALID_ARGUMENT
        with self._lock:
            asked = self._asked.setdefault(session.number, _Asked())
            asked.waiting[key] = time.monotonic() + self._hold
        return SUCCESS

    def _refuse(self, session: Session, status: int, reason: str) -> int:
        log.warning("storage commitment refused with 0x%04X: %s", status, reason)
        self._ledger.log(
            Event.COMMITMENT_REFUSED, calling_ae=session.calling_ae, status=f"0x{status:04X}", reason=reason
        )
        return status

    def report(self, session: Session) -> CommitmentReport | None:
        """The next report to send on this association, if one may be sent on it now; ask while it is idle."""
        with self._lock:
            asked = self._asked.get(session.number)
            if asked is None:
                return None
            at = time.monotonic()
            ready = [key for key, since in asked.waiting.items() if since <= at]
            judging = asked.judging
        if judging is None:
            row = next((row for key in ready if (row := self._take(asked, key)) is not None), None)
            if row is None:
                return None
            judging = row, self._judges.submit(self.judge, requested(row))
            with self._lock:
                asked.judging = judging
        row, job = judging
        if not wait([job], JUDGE_SECONDS).done:
            return None
        with self._lock:
            asked.judging = None
        try:
            report = job.result()
        except SQLAlchemyError as error:
            self.settle(row, _untold(requested(row)), None, f"it cannot be judged: {error}")
            return None
        with self._lock:
            asked.sent[report.transaction_uid] = (row, report)
        return report

    def _take(self, asked: _Asked, key: int) -> Row | None:
        """Start a try at a report; None if this is not the moment, or it needs none any more."""
        again = True
        try:
            row = self._ledger.take_commitment(key)
            # One that is under way on another association may yet be lost there.
            again = row is None and self._ledger.commitment_state(key) == "reporting"
            return row
        except (OSError, SQLAlchemyError):
            log.exception("commitment %d cannot be reported now", key)
            return None
        finally:
            with self._lock:
                if again:
                    asked.waiting[key] = time.monotonic() + POLL_SECONDS
                else:
                    asked.waiting.pop(key, None)

    def reported(self, session: Session, transaction_uid: str, status: int | None) -> None:
        """Write down the answer to a report on this association, None if none came."""
        with self._lock:
            asked = self._asked.get(session.number)
            sent = asked.sent.pop(transaction_uid, None) if asked else None
        if sent is not None:
            row, report = sent
            why = "no answer on its own association" if status is None else _answered(status)
            self.settle(row, report, status, why)

    def committed(self, session: Session, report: CommitmentReport) -> Answer:
        """Write down what a peer says of the findings that delivery asked it to keep."""
        try:
            if self._ledger.storage_committed(report, self._attempts, self._first):
                return Answer(SUCCESS)
        except (OSError, SQLAlchemyError):
            log.exception("a report on storage commitment could not be written down")
            return Answer(PROCESSING_FAILURE, "it cannot be written down now")
        log.warning("%s reports on a storage commitment that was not asked for", session.calling_ae)
        return Answer(INVALID_ARGUMENT, "its Transaction UID is none that was asked for")

    def closed(self, session: Session) -> None:
        """An association has ended: what it was not told goes another way, if there is one."""
        with self._lock:
            asked = self._asked.pop(session.number, None)
            elsewhere = {key for other in self._asked.values() for key in other.waiting}
        if asked is None:
            return
        untold = list(asked.sent.values())
        if asked.judging is not None:
            row, _ = asked.judging
            untold.append((row, _untold(requested(row))))
        for row, report in untold:
            self.settle(row, report, None, "its own association ended without an answer")
        left = [key for key in asked.waiting if key not in elsewhere]
        try:
            if left and self._ledger.leave_commitments(left, self._peers):
                self._due()
        except (OSError, SQLAlchemyError):
            log.exception("the end of association %d: its reports wait for their time", session.number)

    # --- on any ---------------------------------------------------------------------------------------------

    def judge(self, request: CommitmentRequest) -> CommitmentReport:
        """Which of the instances are in the ledger and whole in the spool at this moment (PS3.4 J.3.3)."""
        held = self._ledger.current_instances([one.sop_instance_uid for one in request.references])
        committed: list[Reference] = []
        failed: list[Failure] = []
        for reference in request.references:
            reason = self._missing(reference, held.get(reference.sop_instance_uid, ()))
            if reason:
                failed.append(Failure(reference, reason))
            else:
                committed.append(reference)
        return CommitmentReport(request.transaction_uid, tuple(committed), tuple(failed))

    def _missing(self, reference: Reference, held: Sequence[Held]) -> int:
        """The Failure Reason of an instance that cannot be committed to, 0 for one that can."""
        try:
            found = [(one, self._is_whole(one)) for one in held]
        except OSError:
            log.exception("storage commitment: the spool cannot be looked at")
            return PROCESSING_FAILURE
        there = [one for one, whole in found if whole]
        if not there:
            damaged = any(whole is False for _, whole in found)
            return PROCESSING_FAILURE if damaged else NO_SUCH_INSTANCE
        fits = any(one.sop_class_uid == reference.sop_class_uid for one in there)
        return 0 if fits else CLASS_INSTANCE_CONFLICT

    def _is_whole(self, held: Held) -> bool | None:
        """Whether its file is what was received, read anew; None where there is no file.

        Raises:
            OSError: the disk is broken.
        """
        path = path_of(self._spool, held.digest)
        try:
            whole = path.stat().st_size == held.size and is_intact(path, held.digest)
        except FileNotFoundError:
            return None
        if not whole:
            # Its sender is told so, and what comes again takes its place.
            log.error("storage commitment: %s is damaged", path)
        return whole

    def settle(self, row: Row, report: CommitmentReport, status: int | None, why: str) -> bool:
        """Write down what became of a try; after no success the next is due after a pause.

        Args:
            row: what the try began with.
            status: the peer's answer, None if there was none.
            why: it is no success.

        Returns:
            False if it cannot be written now.
        """
        key, calling_ae = row["id"], row["calling_ae"]
        attempt = row["attempts"] + 1
        wait = min(self._longest, self._first * 2.0 ** min(attempt - 1, 30))
        with self._lock:
            asked_again = any(key in other.waiting for other in self._asked.values())
        if calling_ae not in self._peers and not asked_again:
            why, attempt = f"{no_address(calling_ae)}; {why}", self._attempts
        try:
            if status == SUCCESS:
                settled = self._ledger.settle_commitment(row, "acknowledge", failed=report.failed)
                whole = len(report.committed) + len(report.failed)
                line = f"acknowledged, {len(report.committed)} of {whole} instances committed"
            elif attempt >= self._attempts:
                settled = self._ledger.settle_commitment(row, "give_up", why)
                line = f"a dead letter: {why}"
            else:
                settled = self._ledger.settle_commitment(row, "retry", why, wait_seconds=wait)
                line = f"try again in {wait:g} s ({why})"
        except (OSError, SQLAlchemyError):
            log.exception("commitment %d: its outcome cannot be written now", key)
            return False
        if settled:
            level = logging.ERROR if line.startswith("a dead letter") else logging.INFO
            log.log(level, "commitment %d: %s", key, line)
        return True


class Reporter(threading.Thread):
    """Sends the reports that are due to one peer over associations of ours, one after another, until it is stopped.

    Args:
        send: `dicom_io.commitment.send_report`, or what stands for it.
    """

    def __init__(
        self,
        ledger: Ledger,
        provider: CommitmentProvider,
        peer: Peer,
        send: Callable[[Peer, str, CommitmentReport], int] = send_report,
    ) -> None:
        super().__init__(name=f"commitment-{peer.ae_title}", daemon=True)
        self._ledger = ledger
        self._provider = provider
        self._peer = peer
        self._send = send
        self._wake = threading.Event()
        self._stopping = threading.Event()

    def wake(self) -> None:
        """Look for work now."""
        self._wake.set()

    def stop(self) -> None:
        """Begin no further report; `join` waits for the one at hand."""
        self._stopping.set()
        self._wake.set()

    def run(self) -> None:
        """The thread's loop."""
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                row = self._ledger.take_due_commitment(self._peer.ae_title, self._provider.longest_pause)
                if row is not None:
                    self._try(row)
                    continue
            except Exception:
                # A ledger that cannot be written now may be later; a worker that ends never reports again.
                log.exception("storage commitment to %s stumbled; it goes on", self._peer)
            self._wake.wait(POLL_SECONDS)

    def _try(self, row: Row) -> None:
        request = requested(row)
        report = _untold(request)
        status: int | None = None
        try:
            report = self._provider.judge(request)
            status = self._send(self._peer, row["called_ae"], report)
            why = _answered(status)
        except PeerError as error:
            why = str(error)
        except Exception as error:
            log.exception("commitment %d failed in a way nobody foresaw", row["id"])
            why = f"{type(error).__name__}: {error}"
        # An answer that is not written down would be a report that nobody sends any more, or that is sent again.
        while not self._provider.settle(row, report, status, why):
            if self._stopping.wait(POLL_SECONDS):
                return  # it is sent again, as the same transaction, after the next start


def _untold(request: CommitmentRequest) -> CommitmentReport:
    return CommitmentReport(request.transaction_uid, (), ())


def _answered(status: int) -> str:
    return "" if status == SUCCESS else f"the peer answered 0x{status:04X}"
