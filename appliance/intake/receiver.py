"""What intake does with each instance: read what it says it is, make it durable, and only then answer."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from appliance.events import Event
from appliance.intake.commitment import CommitmentProvider
from appliance.intake.committer import Committer
from appliance.intake.performed import PerformedProvider
from appliance.intake.spool import Incoming, Lane, Spool
from appliance.ledger.ingest import NewInstance
from appliance.ledger.store import Ledger
from appliance.operations.metrics import IntakeMetrics
from dicom_io.commitment import CommitmentReport, CommitmentRequest
from dicom_io.errors import HeaderCutOff, HeaderError
from dicom_io.handlers import Answer, Outcome, Refusal, Session, StoreRequest
from dicom_io.header import Header, read_header
from dicom_io.performed import Request

log = logging.getLogger(__name__)

# PS3.4 B.2.3, table B.2-1.
OUT_OF_RESOURCES = 0xA700
DOES_NOT_MATCH_SOP_CLASS = 0xA900
CANNOT_UNDERSTAND = 0xC000

REPEAT_SECONDS = 60.0
"""A peer that is turned away again for the same reason is written down once in so long, with how often it came."""

_FLOODS = 1000  # addresses and reasons that are remembered


class Receiver:
    """The storage provider's handlers. Their methods are called from many association threads at once.

    Args:
        ring: wakes the stage behind; called after each closed association, and whatever else may decide something.
        more: tells it of instances; called after each transaction.
        shortage: why the disk should take no more, see `Spool.shortage`; '' if it may.
        metrics: where everything is counted.
    """

    def __init__(
        self,
        ledger: Ledger,
        spool: Spool,
        ring: Callable[[], None],
        more: Callable[[], None],
        commitments: CommitmentProvider,
        shortage: Callable[[], str] = lambda: "",
        metrics: IntakeMetrics | None = None,
    ) -> None:
        self._ledger = ledger
        self._spool = spool
        self._ring = ring
        self._commitments = commitments
        self._shortage = shortage
        self._metrics = metrics or IntakeMetrics()
        self._performed = PerformedProvider(ledger, ring, shortage)
        self.committer = Committer(ledger, spool, more, self._metrics)
        self._associations: dict[int, tuple[int, Lane]] = {}  # number in the ledger, and lane in the spool
        # (address, reason) → when that was last written down, and how often it happened since.
        self._turned_away: dict[tuple[str, str], tuple[float, int]] = {}
        self._lock = threading.Lock()

    def opened(self, session: Session) -> None:
        """Write the association down, as evidence for completeness."""
        lane = self._spool.take_lane()
        try:
            key = self._ledger.open_association(session.calling_ae, session.called_ae, session.address)
        except BaseException:
            self._spool.give_back(lane)
            raise
        with self._lock:
            self._associations[session.number] = key, lane
        self._metrics.opened()

    def rejected(self, address: str, calling_ae: str, reason: str) -> None:
        """Write down who was turned away; of a flood, a row a minute, so that it fills no disk and holds up nobody."""
        self._metrics.rejected(reason)
        with self._lock:
            if len(self._turned_away) > _FLOODS:
                self._turned_away.clear()
            written, times = self._turned_away.get((address, reason), (-REPEAT_SECONDS, 0))
            if time.monotonic() - written < REPEAT_SECONDS:
                self._turned_away[address, reason] = written, times + 1
                return
            self._turned_away[address, reason] = time.monotonic(), 0
        self._ledger.log(
            Event.ASSOCIATION_REJECTED, address=address, calling_ae=calling_ae, reason=reason, times=times + 1
        )

    def receive(self, session: Session, request: StoreRequest) -> _Instance | Answer:
        """A file for the instance, unless the disk is full."""
        try:
            if shortage := self._shortage():
                return Answer(OUT_OF_RESOURCES, shortage, "disk reserve")
            key, lane = self._associations[session.number]
            return _Instance(self.committer, self._spool.open(lane), request, key, self._metrics)
        except OSError as error:
            return _cannot_store(error).answer

    def refused(self, session: Session, answer: Answer, size: int) -> None:
        """Write down an instance that was not taken."""
        self._metrics.refused(answer.status, answer.reason, size)
        log.warning("instance refused with 0x%04X: %s", answer.status, answer.comment)
        self._ledger.record_refusal(self._associations[session.number][0], answer.status, answer.comment, size)

    def commitment(self, session: Session, request: CommitmentRequest) -> int:
        """Write a request for storage commitment down; the DIMSE status to answer with."""
        return self._commitments.commitment(session, request)

    def report(self, session: Session) -> CommitmentReport | None:
        """The next answer to such a request that this peer can have now."""
        return self._commitments.report(session)

    def reported(self, session: Session, transaction_uid: str, status: int | None) -> None:
        """Write down what became of that answer."""
        self._commitments.reported(session, transaction_uid, status)

    def committed(self, session: Session, report: CommitmentReport) -> Answer:
        """Write down what a peer has committed itself to keep."""
        return self._commitments.committed(session, report)

    def performed(self, session: Session, request: Request) -> Answer:
        """Write down what was performed or is available; what to answer."""
        return self._performed.performed(session, request)

    def performed_refused(self, session: Session, answer: Answer) -> None:
        """Write down that such a request could not be read."""
        self._performed.refused(session, answer)

    def closed(self, session: Session, outcome: Outcome, stores: int) -> None:
        """Write down how the association ended, and how much it brought by the network's own count."""
        self._commitments.closed(session)
        with self._lock:
            key, lane = self._associations.pop(session.number)
        self._metrics.closed(outcome)
        self._spool.give_back(lane)
        try:
            self._ledger.close_association(key, outcome, stores)
        finally:
            self._ring()


class _Instance:
    """The sink of one instance."""

    def __init__(
        self,
        committer: Committer,
        incoming: Incoming,
        request: StoreRequest,
        association: int,
        metrics: IntakeMetrics,
    ) -> None:
        self._metrics = metrics
        self._committer = committer
        self._incoming = incoming
        self._request = request
        self._association = association
        self._looked = False  # for the header
        self._header: Header | None = None
        self._last_write = 0.0  # of the monotonic clock: when the last bytes came
        self._answered = False  # or about to be: with a failure

    def arrived(self, data: memoryview) -> None:
        """Read the header, and hash, while the sender still sends: nobody waits for it then."""
        try:
            if not self._looked:
                self._look(data)
            self._incoming.hash_ahead(data)
        except Exception:
            self._answered = True
            raise

    def write(self, data: memoryview) -> None:
        """Append to the file, unless the header, which mostly ends in the first piece, is a reason to refuse it."""
        self._last_write = time.monotonic()
        try:
            if self._header is None and not self._incoming.size:
                self._look(data)
            self._incoming.write(data)
        except OSError as error:
            self._answered = True
            raise _cannot_store(error) from error
        except Exception:
            self._answered = True
            raise

    def _look(self, data: memoryview) -> None:
        """Read the header if it ends in these first bytes of the instance."""
        self._looked = True
        try:
            self._check(read_header(data, complete=False))
        except HeaderCutOff:
            log.debug("a header goes on after %d bytes", len(data))
        except HeaderError as error:
            raise Refusal(CANNOT_UNDERSTAND, str(error), "unreadable") from error

    def commit(self) -> None:
        """Make it durable: file, folder and the ledger's row are synced to disk on return."""
        try:
            digest = self._incoming.sync()
            if self._header is None:
                self._check(read_header(Path(self._incoming.path)))
            assert self._header is not None
            row = NewInstance(self._header, digest, self._incoming.size, self._association)
            self._committer.commit(self._incoming, row)
        except HeaderError as error:
            self._incoming.discard()
            raise Refusal(CANNOT_UNDERSTAND, str(error), "unreadable") from error
        except Refusal:
            self._incoming.discard()
            raise
        except (OSError, SQLAlchemyError) as error:
            self._incoming.discard()
            raise _cannot_store(error) from error
        finally:
            self._metrics.responded(time.monotonic() - self._last_write)

    def discard(self) -> None:
        """Remove what was written."""
        if not self._answered:
            self._metrics.incomplete(self._incoming.size)
        self._incoming.discard()

    def _check(self, header: Header) -> None:
        asked = (self._request.sop_class_uid, self._request.sop_instance_uid)
        if (header.sop_class_uid, header.sop_instance_uid) != asked:
            reason = "the command names another SOP class or instance than the data set"
            raise Refusal(DOES_NOT_MATCH_SOP_CLASS, reason, "mismatch")
        self._header = header


def _cannot_store(error: Exception) -> Refusal:
    log.error("an instance could not be stored", exc_info=error)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return Refusal(OUT_OF_RESOURCES, "the disk is full", "disk full")
    # The sender reads this: no path of ours.
    said = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
    return Refusal(OUT_OF_RESOURCES, f"cannot store: {said}", "not stored")
