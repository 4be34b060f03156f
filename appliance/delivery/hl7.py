"""HL7 v2 messages over MLLP: the acknowledgement, and a client with one connection.

Acknowledgements are HL7 v2.5.1 chapter 2, section 2.9.2 (original mode) and 2.9.3 (enhanced mode). Which of them a
message is sent in stands in the message itself: MSH-15 and MSH-16 empty is original mode; MSH-15 AL with MSH-16 NE asks
for the accept acknowledgement alone (CA, CE, CR); MSH-15 AL with MSH-16 AL also for the application's (AA, AE, AR),
and then only that one ends the delivery.

Delivery is at least once: a connection that breaks after the message left does not tell whether the peer kept
it, so the outbox sends the same message with the same MSH-10 again and the receiver deduplicates by MSH-10.
"""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self, get_args

from appliance.mllp import Deframer, FramingError, frame
from dicom_io.errors import PeerError

log = logging.getLogger(__name__)

ELSEWHERE_SECONDS = 0.2
"""So often it is looked for an answer that came elsewhere."""
MAXIMUM_ACKNOWLEDGEMENT = 256 * 1024
"""Bytes; an acknowledgement is some hundred bytes, so a larger block is a peer that speaks something else."""

Code = Literal["AA", "AE", "AR", "CA", "CE", "CR"]
Outcome = Literal["acknowledged", "retry", "rejected"]

OUTCOMES: dict[Code, Outcome] = {
    "AA": "acknowledged",
    "CA": "acknowledged",
    "AE": "retry",
    "CE": "retry",
    "AR": "rejected",
    "CR": "rejected",
}
"""What an acknowledgement code (HL7 v2.5.1 2.9.2, 2.9.3, table 0008) means for a delivery.

====  =============================================================================  ============
code  the peer says                                                                  delivery
====  =============================================================================  ============
AA    processed (2.9.2)                                                              acknowledged
CA    committed to safe storage, which releases the sender (2.9.3); where MSH-16 is  acknowledged
      AL, only the first of two answers
AE    the application met an error; interface engines send it for faults that pass   retry
CE    could not be committed for another reason (2.9.3)                              retry
AR    MSH-9, MSH-11 or MSH-12 is not acceptable, or the site refuses it (2.9.2)      rejected
CR    MSH-9, MSH-11 or MSH-12 is not acceptable (2.9.3)                              rejected
====  =============================================================================  ============

The standard lets AR also mean "system down, send again later" and leaves that choice to the site (2.9.2). Here a
refusal goes to the dead letters at once, where a person sees it, while an error is tried again with back-off first.
"""


class CodeError(ValueError):
    """An acknowledgement whose code is not in table 0008.

    Args:
        control_id: the message that it answers.
    """

    def __init__(self, code: str, control_id: str) -> None:
        super().__init__(f"acknowledgement code {code[:4]!r} is not one of {', '.join(get_args(Code))}")
        self.control_id = control_id


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """The peer's answer to one message.

    Attributes:
        code: MSA-1.
        text: what the peer says in words (MSA-3, else ERR-8, ERR-7 or ERR-3); "" where it says nothing.
        control_id: MSA-2, the MSH-10 of the message that it answers.
        raw: the whole answer, as received.
    """

    code: Code
    text: str
    control_id: str
    raw: str

    @property
    def accepts(self) -> bool:
        """It says that the message is in safe storage, not what became of it (CA)."""
        return self.code == "CA"


def outcome(acknowledgement: Acknowledgement) -> Outcome:
    """What the answer means for the delivery; see `OUTCOMES`."""
    return OUTCOMES[acknowledgement.code]


def control_id_of(message: str) -> str:
    """MSH-10 of a message.

    Raises:
        ValueError: it does not begin with an MSH segment, or MSH-10 is empty.
    """
    fields = _segments(re.split(r"[\r\n]", message, maxsplit=1)[0])[0]
    if fields[0] != "MSH" or len(fields) < 10 or not fields[9].strip():
        raise ValueError("the message has no MSH segment with a control id (MSH-10)")
    return fields[9].strip()


def wants_application_answer(message: str) -> bool:
    """Whether the sender asks for the application's own answer after the accept acknowledgement (MSH-16 AL, 2.9.3)."""
    fields = _segments(re.split(r"[\r\n]", message, maxsplit=1)[0])[0]
    return fields[0] == "MSH" and len(fields) > 15 and fields[15].strip() == "AL"


def accept_answer(acknowledgement: Acknowledgement, sent: str) -> str | None:
    """Our accept acknowledgement (CA) of an application acknowledgement that asks for one (2.9.3); else None.

    Args:
        sent: the message that was answered; sender and receiver of ours are its.
    """
    theirs, ours = _segments(acknowledgement.raw)[0], _segments(sent)[0]
    if len(theirs) < 15 or theirs[14].strip() not in ("AL", "SU") or not theirs[9].strip():
        return None
    header = [*ours[:7], "", "ACK", f"{ours[9]}C"[-20:], *ours[10:12]]
    separator = sent[3]
    return f"{separator.join(header)}\rMSA{separator}CA{separator}{theirs[9].strip()}\r"


def parse_acknowledgement(block: bytes) -> Acknowledgement | None:
    """Read the content of one MLLP block as an acknowledgement; None where it is none (no MSH, no MSA).

    Raises:
        CodeError: its MSA segment has a code that is not in table 0008.
    """
    raw = block.decode("utf-8", errors="replace")
    segments = _segments(raw)
    msa = next((fields for fields in segments if fields[0] == "MSA"), None)
    if segments[0][0] != "MSH" or msa is None:
        return None
    code, control_id, text = (field.strip() for field in (*msa[1:4], "", "", "")[:3])
    for fields in segments if not text else ():
        if fields[0] == "ERR":
            text = next((fields[n].strip() for n in (8, 7, 3) if n < len(fields) and fields[n].strip()), "")
            break
    if code not in get_args(Code):
        raise CodeError(code, control_id)
    return Acknowledgement(code, text, control_id, raw)  # type: ignore[arg-type]  # checked in the line above


def _segments(message: str) -> list[list[str]]:
    """Segments split into fields by the message's own separator; never empty, nor is any segment."""
    lines = [line for line in re.split(r"[\r\n]+", message.strip("\ufeff\r\n ")) if line]
    separator = lines[0][3] if lines and len(lines[0]) > 3 else "|"
    return [line.split(separator) for line in lines] or [[""]]


class MllpClient:
    """Sends messages to one MLLP listener over one connection, which it opens when it needs it.

    After any failure the connection is dropped, so that no late answer can be taken for that of a later message.
    For one sending thread; `close` alone may be called from another, and then ends a wait for an answer at once.

    Args:
        connect_timeout: seconds to reach the peer, and as many for the TLS handshake.
        ack_timeout: seconds from the first byte sent to the whole acknowledgement.
        application_timeout: seconds from the accept acknowledgement to the application's, for a message that asks for
            both.
        context: for a connection with TLS; None: without.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        connect_timeout: float,
        ack_timeout: float,
        application_timeout: float = 30.0,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.host = host
        self.port = port
        self.connect_timeout = connect_timeout
        self.ack_timeout = ack_timeout
        self.application_timeout = application_timeout
        self.context = context
        self.elsewhere: Callable[[str], bytes | None] | None = None
        """Of an MSH-10, the application's acknowledgement that came as a message of its own (2.9.3), once."""
        self._socket: socket.socket | None = None
        self._deframer = Deframer(MAXIMUM_ACKNOWLEDGEMENT)
        self._waiting: list[bytes] = []
        """Blocks that came with the last answer, behind it."""
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def where(self) -> str:
        """The peer, as errors and logs name it."""
        return f"{self.host}:{self.port}"

    def connect(self) -> None:
        """Open the connection unless it is open.

        Raises:
            PeerError: the peer cannot be reached.
        """
        with self._lock:
            self._open()

    def close(self) -> None:
        """Drop the connection; the next `send` opens a new one."""
        waiting = self._socket
        if waiting is not None:
            with contextlib.suppress(OSError):  # already closed by its owner, or never connected
                # The socket's own: that of an SSLSocket would let the waiting thread read what is still encrypted.
                socket.socket.shutdown(waiting, socket.SHUT_RDWR)
        with self._lock:
            self._drop()

    def send(self, message: str) -> Acknowledgement:
        """Send one message and wait for its acknowledgement, whatever it says; `outcome` tells what it means.

        In original mode the first answer is the answer, whatever its code. In enhanced mode a message that asks for the
        accept acknowledgement alone ends with that one; what comes later on the same connection is logged and ignored.
        One that asks for the application's, too, ends with that; a CE or CR, which say that there will be none, end it
        earlier, and a CA alone does not.

        Raises:
            ValueError: the message has no MSH-10 or cannot be framed.
            PeerError: no connection, no answer in time, or no usable answer. Whether the peer has the message is then
                unknown, or it has it (CA) and does not say what became of it; send the same message again, with the
                same MSH-10.
        """
        control_id = control_id_of(message)
        both = wants_application_answer(message)
        elsewhere = False
        block = frame(message)
        with self._lock:
            try:
                if not self._still_open():
                    self._drop()
                reused = self._socket is not None
                connection = self._open()
                deadline = time.monotonic() + self.ack_timeout
                if not self._write(connection, block, deadline, reused=reused):
                    self._drop()
                    connection = self._open()
                    self._write(connection, block, deadline, reused=False)
                answer = self._await(connection, control_id, deadline, f"{self.ack_timeout:g} s")
                if both and answer.accepts:
                    deadline = time.monotonic() + self.application_timeout
                    told = f"{self.application_timeout:g} s after the peer had committed it (CA)"
                    answer, elsewhere = self._application(connection, control_id, deadline, told)
                if both and not elsewhere and (thanks := accept_answer(answer, message)) is not None:
                    self._thank(connection, frame(thanks))
                return answer
            except BaseException:
                self._drop()
                raise

    def _open(self) -> socket.socket:
        if self._socket is not None:
            return self._socket
        try:
            connection = socket.create_connection((self.host, self.port), timeout=self.connect_timeout)
        except TimeoutError as error:
            raise PeerError(
                f"the HL7 listener did not take the connection within {self.connect_timeout:g} s",
                self.where,
                "check the address, the network and any firewall between",
            ) from error
        except OSError as error:
            raise PeerError(
                f"the HL7 listener cannot be reached ({error.strerror or error})",
                self.where,
                "check that it is running and listens on this address and port",
            ) from error
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if self.context is not None:
            connection = self._secured(connection, self.context)
        self._socket = connection
        self._deframer, self._waiting = Deframer(MAXIMUM_ACKNOWLEDGEMENT), []
        return connection

    def _secured(self, connection: socket.socket, context: ssl.SSLContext) -> ssl.SSLSocket:
        """The connection after the handshake; closed if that fails."""
        try:
            return context.wrap_socket(connection, server_hostname=self.host)
        except ssl.SSLCertVerificationError as error:
            what = f"the HL7 listener's certificate is not accepted: {error.verify_message}"
            remedy = "check its certificate, the name that we call it by, and tls.authorities"
            cause: OSError = error
        except OSError as error:
            reason = getattr(error, "reason", None) or error.strerror or error
            what = f"the TLS handshake with the HL7 listener failed ({reason})"
            remedy = "check that it speaks TLS at this port, and whether it asks for a certificate of ours"
            cause = error
        connection.close()
        raise PeerError(what, self.where, remedy) from cause

    def _thank(self, connection: socket.socket, block: bytes) -> None:
        """Say that we have the application's answer; the delivery is over whether or not the peer hears it."""
        try:
            connection.settimeout(self.connect_timeout)
            connection.sendall(block)
        except OSError as error:
            log.warning("hl7: %s did not take our acknowledgement of its answer (%s)", self.where, error)
            self._drop()

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _still_open(self) -> bool:
        """Whether an open connection can be used: reads what came while idle, which no message of ours asked for."""
        if self._socket is None:
            return False
        if self._waiting:
            log.warning("hl7: %s sent %d messages that nothing waited for; ignored", self.where, len(self._waiting))
            self._waiting = []
        self._socket.setblocking(False)
        # Bounded, so that a peer that never stops talking cannot hold the message back.
        for _ in range(16):
            try:
                data = self._socket.recv(65536)
                stale = self._deframer.feed(data)
            except (BlockingIOError, ssl.SSLWantReadError):
                return True
            except (OSError, FramingError):
                return False
            if not data:
                log.info("hl7: %s closed the idle connection", self.where)
                return False
            if stale:
                log.warning("hl7: %s sent %d messages that nothing waited for; ignored", self.where, len(stale))
        return False

    def _write(self, connection: socket.socket, block: bytes, deadline: float, *, reused: bool) -> bool:
        """Write the block; False if not one byte of it left and the connection was a used one, so that another try
        on a new connection cannot deliver it twice."""
        rest = memoryview(block)
        while rest:
            try:
                connection.settimeout(max(0.001, deadline - time.monotonic()))
                rest = rest[connection.send(rest) :]
            except TimeoutError as error:
                raise PeerError(
                    f"the HL7 listener did not take the message within {self.ack_timeout:g} s",
                    self.where,
                    "check whether it hangs",
                ) from error
            except OSError as error:
                if reused and len(rest) == len(block):
                    return False
                raise PeerError(
                    f"the connection broke while the message was sent ({error.strerror or error})",
                    self.where,
                    "the message will be sent again",
                ) from error
        return True

    def _application(
        self, connection: socket.socket, control_id: str, deadline: float, told: str
    ) -> tuple[Acknowledgement, bool]:
        """The application's answer, and whether it came elsewhere; then the peer may have closed this connection."""
        if self.elsewhere is None:
            return self._await(connection, control_id, deadline, told, application=True), False
        gone: PeerError | None = None
        while True:
            if (raw := self.elsewhere(control_id)) and (answer := parse_acknowledgement(raw)) is not None:
                if gone is not None:
                    self._drop()
                return answer, True
            at = time.monotonic()
            if gone is not None:
                if at >= deadline:
                    raise gone
                time.sleep(min(ELSEWHERE_SECONDS, deadline - at))
                continue
            until = min(deadline, at + ELSEWHERE_SECONDS)
            try:
                return self._await(connection, control_id, until, told, application=True), False
            except PeerError as error:
                if time.monotonic() >= deadline:
                    raise
                gone = error if time.monotonic() < until else None

    def _await(
        self, connection: socket.socket, control_id: str, deadline: float, told: str, *, application: bool = False
    ) -> Acknowledgement:
        """The next acknowledgement of that message; with ``application`` the next that is no CA.

        Args:
            told: how long that may take, for the error.
        """
        ignored = 0
        what = "application acknowledgement" if application else "acknowledgement"
        while True:
            blocks, self._waiting = self._waiting, []
            if not blocks:
                blocks = self._receive(connection, control_id, deadline, told, what, ignored)
            while blocks:
                block = blocks.pop(0)
                answered = "something that is no acknowledgement"
                try:
                    acknowledgement = parse_acknowledgement(block)
                    if acknowledgement is not None:
                        answered = acknowledgement.control_id
                        if answered == control_id and not (application and acknowledgement.accepts):
                            # Both answers may have come in one packet.
                            self._waiting = blocks
                            return acknowledgement
                except CodeError as error:
                    answered = error.control_id
                    if answered == control_id:
                        raise PeerError(
                            f"the answer to message {control_id} cannot be understood: {error}",
                            self.where,
                            "check how the HL7 listener is set up",
                        ) from error
                ignored += 1
                log.warning("hl7: %s answered %s while %s was waited for; ignored", self.where, answered, control_id)

    def _receive(
        self, connection: socket.socket, control_id: str, deadline: float, told: str, what: str, ignored: int
    ) -> list[bytes]:
        """Whole blocks of the peer: at least one."""
        while True:
            remaining = deadline - time.monotonic()
            try:
                if remaining <= 0:
                    raise TimeoutError
                connection.settimeout(remaining)
                data = connection.recv(65536)
                blocks = self._deframer.feed(data)
            except TimeoutError as error:
                others = f"; {ignored} answers were to other messages" if ignored else ""
                junk = f"; {self._deframer.skipped} bytes were no MLLP" if self._deframer.skipped else ""
                raise PeerError(
                    f"no {what} of message {control_id} within {told}{others}{junk}",
                    self.where,
                    "check the HL7 listener's log for this message",
                ) from error
            except FramingError as error:
                raise PeerError(
                    f"the answer to message {control_id} is no acknowledgement: {error}",
                    self.where,
                    "check that an HL7 listener is at this address",
                ) from error
            except OSError as error:
                raise PeerError(
                    f"the connection broke before message {control_id} was acknowledged ({error.strerror or error})",
                    self.where,
                    "the message will be sent again",
                ) from error
            if not data:
                raise PeerError(
                    f"the HL7 listener closed the connection before it acknowledged message {control_id}",
                    self.where,
                    "check the HL7 listener's log for this message",
                )
            if blocks:
                return blocks
