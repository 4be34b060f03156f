"""What the owner of a storage provider supplies: where instances go, and what is told of associations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from dicom_io.commitment import CommitmentReport, CommitmentRequest
from dicom_io.performed import Request

Outcome = Literal["released", "aborted", "broken"]
"""How an association ended: released by the peer; aborted with an A-ABORT from either side (also ours, after a silent
peer or at a stop); broken where the connection went away without either."""


@dataclass(frozen=True, slots=True)
class Session:
    """An accepted association.

    Attributes:
        number: tells associations of this process apart.
        address: IP address of the peer.
        tls: whether it is encrypted.
        subject: of the client's certificate, '' without one.
    """

    number: int
    calling_ae: str
    called_ae: str
    address: str
    tls: bool = False
    subject: str = ""


@dataclass(frozen=True, slots=True)
class StoreRequest:
    """The command of a C-STORE request. Its UIDs are UIDs (PS3.5 9.1); whether the data set agrees, the sink sees."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A DIMSE status, and the Error Comment (0000,0902) that goes with a failure.

    Attributes:
        reason: the kind of failure, for counting: never what a peer sent. The provider's own are "wrong class",
            "invalid UID", "no data set" and "unforeseen".
        error_id: Error ID (0000,0903), where a service defines one.
    """

    status: int
    comment: str = ""
    reason: str = "other"
    error_id: int | None = None


class Refusal(Exception):
    """Raised by a sink to refuse its instance with that answer."""

    def __init__(self, status: int, comment: str, reason: str = "other") -> None:
        super().__init__(comment)
        self.answer = Answer(status, comment, reason)


class Sink(Protocol):
    """Where the bytes of one instance go: a whole Part 10 file (PS3.10 7.1), in order, in pieces of up to 1 MiB.

    Its data set is exactly what was sent, and its File Meta Information depends on nothing else, so the same instance
    sent again makes the same bytes. Whatever a method raises refuses the instance, with the answer of a `Refusal` or
    with 0xC000; a sink whose ``arrived`` or ``write`` raised is discarded.
    """

    def arrived(self, data: memoryview) -> None:
        """Look at bytes that the next ``write`` brings again, those behind the ones of earlier calls: for what can be
        done while the rest is on its way. The view is good during the call only. Some or all may not come this way."""

    def write(self, data: memoryview) -> None:
        """Take the next bytes; the view is good during the call only."""

    def commit(self) -> None:
        """All of it came: keep it. Success (0x0000) is answered when this returns."""

    def discard(self) -> None:
        """The rest will never come."""


class Handlers(Protocol):
    """All may be called from several threads at once.

    For each association: ``opened`` once, then the others one after another, then ``closed`` once. An association for
    which ``opened`` raised is rejected and has no ``closed``.
    """

    def opened(self, session: Session) -> None:
        """An association is about to be accepted."""

    def rejected(self, address: str, calling_ae: str, reason: str) -> None:
        """An association or a connection was not accepted. ``calling_ae`` is '' where it was not read.

        Args:
            reason: one of `dicom_io.scp.REJECTIONS`.
        """

    def receive(self, session: Session, request: StoreRequest) -> Sink | Answer:
        """Where this instance goes, or why it is not taken; its bytes are read and dropped then."""

    def refused(self, session: Session, answer: Answer, size: int) -> None:
        """An instance is answered with that failure, for its command, by `receive` or by its sink.

        Args:
            size: bytes of its data set.
        """

    def commitment(self, session: Session, request: CommitmentRequest) -> int:
        """Write down a Storage Commitment request, and return the DIMSE status."""

    def report(self, session: Session) -> CommitmentReport | None:
        """The next result for this peer, to be sent over this association."""

    def reported(self, session: Session, transaction_uid: str, status: int | None) -> None:
        """What the peer answered to a result; None if it did not."""

    def committed(self, session: Session, report: CommitmentReport) -> Answer:
        """Write down what a peer says of the instances that this box asked it to keep, and answer it."""

    def performed(self, session: Session, request: Request) -> Answer:
        """Write down what was performed or is available, and answer it."""

    def performed_refused(self, session: Session, answer: Answer) -> None:
        """Such a request that cannot be read is answered with that failure."""

    def closed(self, session: Session, outcome: Outcome, stores: int) -> None:
        """An association has ended; nothing else of it is running or will come.

        Args:
            stores: how many C-STORE requests came whole over it, with whatever answer.
        """
