"""One association that a peer asked for: its thread, from the TCP connection to its end.

The state table and the PDUs are in `_upper_layer`, the association request in `_negotiation`, the command sets in
`_dimse`. What is received for storage is
never parsed here and never held whole: it goes on in pieces of at most `BUFFER` bytes, as a Part 10 file.
"""

from __future__ import annotations

import logging
import mmap
import select
import socket
import ssl
import struct
import threading
import time
from typing import TYPE_CHECKING

from dicom_io import _dimse as dimse
from dicom_io._elements import is_uid
from dicom_io._negotiation import Negotiated, negotiate
from dicom_io._part10 import part10_head
from dicom_io._upper_layer import (
    EVENT_OF,
    LONGEST_PDU,
    RELEASE_RP,
    TABLE,
    AbortReason,
    Action,
    Event,
    PduType,
    Rejection,
    State,
    abort,
    p_data,
)
from dicom_io.commitment import (
    MAXIMUM_REQUEST_BYTES,
    PUSH_MODEL_INSTANCE,
    CommitmentError,
    decode_report,
    decode_request,
    encode_report,
)
from dicom_io.handlers import Answer, Outcome, Refusal, Session, Sink, StoreRequest
from dicom_io.performed import (
    PerformedError,
    Request,
    read_availability,
    read_new_step,
    read_step_change,
)
from dicom_io.sop_classes import AVAILABILITY, OTHER_CLASSES, PERFORMED_STEP, STORAGE_COMMITMENT
from dicom_io.tls import client_subject

if TYPE_CHECKING:
    from dicom_io.scp import ServerOptions, StorageServer

logger = logging.getLogger(__name__)

BUFFER = 1 << 20
"""Bytes of an instance that are gathered before they go on; a CT slice of 512 x 512 in one piece."""

LOOK = 96 << 10
"""So many bytes of them have come before the sink may look at them; a PDU of 128 KB is one look."""

SLOW_AFTER_SECONDS = 30.0
"""A message that has taken this long must have come at no less than ``minimum_bytes_per_second``."""

REPORT_POLL_SECONDS = 0.5
"""How often an association that asked for storage commitment is looked at while it is idle."""

NO_TLS = "TLS handshake failed"

SUCCESS = 0x0000
PROCESSING_FAILURE = 0x0110  # PS3.7 C.5.14
NO_SUCH_INSTANCE = 0x0112  # PS3.7 C.5.12
INVALID_INSTANCE = 0x0117  # PS3.7 C.5.10
CLASS_NOT_SUPPORTED = 0x0122  # PS3.7 C.5.18
NO_SUCH_ACTION = 0x0123  # PS3.7 C.5.13
UNRECOGNIZED_OPERATION = 0x0211  # PS3.7 C.5.21
CANNOT_UNDERSTAND = 0xC000  # PS3.4 B.2.3

_PDU = struct.Struct(">BxI")
_GATHERED = (
    dimse.Field.N_ACTION_RQ,
    dimse.Field.N_CREATE_RQ,
    dimse.Field.N_SET_RQ,
    dimse.Field.N_EVENT_REPORT_RQ,
)
_TWO = struct.Struct(">IBB")  # a fragment's item length, context ID and message control header (PS3.8 9.3.5.1)


class _Expired(Exception):
    """The peer did not send or take in time."""


class _Closed(Exception):
    """The connection is gone."""


class _Invalid(Exception):
    """What came breaks the protocol."""

    def __init__(self, what: str, reason: AbortReason = AbortReason.INVALID_PARAMETER) -> None:
        super().__init__(what)
        self.reason = reason


class _Message:
    """A DIMSE message that is coming in (PS3.8 Annex E)."""

    __slots__ = (
        "answer", "began", "came", "command", "command_bytes", "context_id", "data", "fill", "seen", "sink", "size"
    )  # fmt: skip

    def __init__(self, context_id: int) -> None:
        self.context_id = context_id
        self.began = time.monotonic()
        self.command_bytes = bytearray()
        self.command: dimse.Command | None = None
        self.sink: Sink | None = None
        self.answer: Answer | None = None  # known before the data came: a refusal
        self.came = 0  # bytes of its fragments
        self.fill = 0  # of the association's buffer
        self.seen = 0  # of that, what the sink has looked at
        self.size = 0  # of the data set, as far as it was announced
        self.data = bytearray()  # of a request that is no C-STORE


class Association(threading.Thread):
    """A connection and what becomes of it. The server makes it, `_serve` runs in its own thread.

    Args:
        connection: as accepted; TLS is spoken in the association's own thread, because a handshake can hang.
    """

    def __init__(
        self,
        server: StorageServer,
        number: int,
        connection: socket.socket,
        address: str,
        context: ssl.SSLContext | None,
    ) -> None:
        super().__init__(name=f"association-{number}", daemon=True)
        self.number = number
        self.address = address
        self.session: Session | None = None
        self.state = State.IDLE
        self._server = server
        self._options: ServerOptions = server.options
        self._socket = connection
        self._tls = context
        self._stopping = False
        self._outcome: Outcome = "broken"
        self._contexts: dict[int, tuple[str, str]] = {}
        self._peer_maximum = 0
        memory = memoryview(mmap.mmap(-1, BUFFER + _TWO.size))  # pages that nothing was written to cost nothing
        self._buffer, self._head = memory[:BUFFER], memory[BUFFER:]
        self._ahead = memoryview(bytearray(_PDU.size + _TWO.size))
        self._early = self._ahead[:0]  # what was read ahead and not asked for yet
        self._message: _Message | None = None
        self._message_id = 0
        self._stores = 0  # C-STORE requests that came whole
        self._commitment_context = 0  # presentation context in which storage commitment was asked for
        self._reporting = ""  # transaction whose N-EVENT-REPORT has no answer yet

    # --- life -------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Abort it: from another thread. An instance that is being made durable is answered first."""
        self._stopping = True
        try:
            # Wakes its read. Not SSLSocket's shutdown, which would forget the session that the A-ABORT needs.
            socket.socket.shutdown(self._socket, socket.SHUT_RD)
        except OSError:
            logger.debug("association %d was closed already", self.number)

    def run(self) -> None:
        try:
            self._serve()
        except Exception:
            logger.exception("association %d from %s ended in a way nobody foresaw", self.number, self.address)
        finally:
            self._discard()
            if self.session is not None:
                self._ended(self.session)
            if self._server.ended(self) and self.state is State.AWAITING_CLOSE:
                self._await_close()
            self._close()
            self._server.forget(self)

    def _serve(self) -> None:
        self._happen(Event.CONNECTED)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        deadline = time.monotonic() + self._options.artim_seconds
        try:
            if self._tls is not None:
                self._start_tls(self._tls)
                if self._stopping:
                    raise _Closed
            self._await_request(deadline)
            while self.state is State.ESTABLISHED:
                self._next_pdu()
        except _Expired:
            if self.state is State.AWAITING_REQUEST:
                self._happen(Event.ARTIM_EXPIRED)
            else:
                logger.warning("association %d from %s aborted: it fell silent", self.number, self.address)
                self._happen(Event.ABORT_REQUEST)
        except _Closed:
            self._happen(Event.ABORT_REQUEST if self._stopping and self.session else Event.CLOSED)
        except _Invalid as error:
            logger.warning("association %d from %s aborted: %s", self.number, self.address, error)
            self._happen(Event.INVALID, error.reason)

    def _happen(self, event: Event, reason: AbortReason = AbortReason.UNEXPECTED_PDU, pdu: bytes = b"") -> None:
        """Look the event up in the state table, and act.

        Args:
            reason: what an A-ABORT of the provider gives.
            pdu: the A-ASSOCIATE-AC or -RJ of those events.
        """
        action, self.state = TABLE[self.state, event]
        match action:
            case Action.SEND_ACCEPT | Action.SEND_REJECT:
                self._send(pdu)
            case Action.SEND_RELEASE:
                self._outcome = "released"
                self._send(RELEASE_RP)
            case Action.ABORT_AS_USER:
                self._outcome = "aborted"
                self._send(abort())
            case Action.ABORT_AS_PROVIDER | Action.ABORT_AGAIN:
                self._outcome = "aborted"
                self._send(abort(reason))
            case Action.TAKE_ABORT:
                self._outcome = "aborted"
            case _:
                # The rest changes the state only: its transport closes when the thread ends, its data is read by
                # the caller.
                return

    def _ended(self, session: Session) -> None:
        handlers = self._server.handlers
        if self._reporting:
            self._reported(None)
        try:
            handlers.closed(session, self._outcome, self._stores)
        except Exception:
            logger.exception("the end of association %d was not handled", self.number)

    # --- transport --------------------------------------------------------------------------------------

    def _start_tls(self, context: ssl.SSLContext) -> None:
        self._socket.settimeout(self._options.artim_seconds)
        try:
            self._socket = context.wrap_socket(self._socket, server_side=True)
        except OSError as error:
            logger.warning("no TLS with %s: %s", self.address, error)
            # One that went away or fell silent is told of as little as without TLS.
            if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
                self._server.rejected(self.address, "", NO_TLS)
            raise _Closed from error

    def _allow(self, seconds: float) -> None:
        """How long one read or write may wait."""
        if not self._tls:
            # Of the kernel, not of Python: a Python timeout costs a poll for every read.
            limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1_000_000) or (not int(seconds)))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        else:
            self._socket.settimeout(seconds)

    def _read(self, view: memoryview, deadline: float = 0.0) -> None:
        """Fill the view.

        Args:
            deadline: on the monotonic clock; 0 is ``idle_seconds`` from now.

        Raises:
            _Expired: it did not come in time. _Closed: it never will.
        """
        if self._early:
            count = min(len(view), len(self._early))
            view[:count] = self._early[:count]
            self._early = self._early[count:]
            view = view[count:]
            if not view:
                return
        given, wanted = deadline, len(view)
        if given:
            self._allow(max(given - time.monotonic(), 0.001))
        try:
            got = self._receive(view)
            if got == len(view):
                return
            if not deadline:
                # More for what is large: a slow line is not an idle one.
                least = max(self._options.minimum_bytes_per_second, 1)
                deadline = time.monotonic() + max(self._options.idle_seconds, len(view) / least)
            while got:
                view = view[got:]
                if not view:
                    return
                now = time.monotonic()
                if now > deadline:
                    raise _Expired
                self._keep_pace(now, wanted - len(view))
                if given:
                    self._allow(max(given - time.monotonic(), 0.001))
                if not self._tls:
                    self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
                got = self._receive(view)
        except (BlockingIOError, TimeoutError):
            raise _Expired from None
        except OSError as error:
            raise _Closed from error
        raise _Closed

    def _keep_pace(self, now: float, more: int = 0) -> None:
        """Give up on a message that comes too slowly, by what really came of it.

        Args:
            now: the monotonic clock.
            more: bytes of the read that is under way.
        """
        message = self._message
        if message is None:
            return
        elapsed = now - message.began
        if elapsed > SLOW_AFTER_SECONDS and message.came + more < self._options.minimum_bytes_per_second * elapsed:
            logger.warning("association %d sends too slowly", self.number)
            raise _Expired

    def _receive(self, view: memoryview) -> int:
        """Read into the view; how many bytes of it there are now. Of what follows, the two headers that stand between
        data and data are read ahead: every call less is a wait less for the interpreter's lock."""
        if self._tls:
            return self._socket.recv_into(view)
        got = self._socket.recvmsg_into([view, self._ahead])[0]
        if got > len(view):
            self._early = self._ahead[: got - len(view)]
            return len(view)
        return got

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:  # also a peer that does not take its answer in time
            logger.info("association %d from %s: an answer could not be sent (%s)", self.number, self.address, error)
            self._happen(Event.CLOSED)

    def _await_close(self) -> None:
        """Leave the close to the peer (PS3.8 9.1.4); one with unread data would reset the connection and take back what
        was sent last. Whatever comes meanwhile is dropped."""
        try:
            deadline = time.monotonic() + self._options.artim_seconds
            self._allow(min(self._options.artim_seconds, 1.0))
            while time.monotonic() < deadline:
                if not self._socket.recv_into(self._buffer):
                    break
        except (OSError, ValueError):
            return  # timed out, reset, or TLS that was cut off: there is nobody left to wait for

    def _close(self) -> None:
        try:
            self._socket.close()
        except OSError:
            logger.debug("association %d was closed already", self.number)

    # --- association (PS3.8 7.1, PS3.7 Annex D) -----------------------------------------------------------

    def _await_request(self, deadline: float) -> None:
        self._read(self._head, deadline)
        kind, length = _PDU.unpack(self._head)
        if kind != PduType.ASSOCIATE_RQ or not 0 < length <= LONGEST_PDU:
            event = EVENT_OF.get(kind, Event.INVALID) if kind != PduType.ASSOCIATE_RQ else Event.INVALID
            self._happen(event)
            return
        body = bytearray(length + 6)
        body[:6] = self._head
        self._read(memoryview(body)[6:], deadline)
        try:
            asked = negotiate(bytes(body), self._server.contexts)
        except Exception as error:  # pynetdicom raises whatever hostile bytes make it raise
            logger.warning("%s sent an association request that cannot be read (%s)", self.address, error)
            self._happen(Event.INVALID)
            return
        self._happen(Event.ASSOCIATE_RQ)
        rejection = None if asked.is_version_1 else Rejection.PROTOCOL_VERSION
        rejection = rejection or self._server.admit(self, asked.calling_ae, asked.called_ae, asked.application_context)
        rejection = rejection or self._open(asked)
        if rejection is not None:
            logger.warning("association of %s from %s rejected: %s", asked.calling_ae, self.address, rejection.words)
            self._server.rejected(self.address, asked.calling_ae, rejection.words)
            self._happen(Event.REJECT, pdu=rejection.pdu)

    def _open(self, asked: Negotiated) -> Rejection | None:
        subject = client_subject(self._socket) if isinstance(self._socket, ssl.SSLSocket) else ""
        session = Session(self.number, asked.calling_ae, asked.called_ae, self.address, self._tls is not None, subject)
        try:
            self._server.handlers.opened(session)
        except Exception:
            logger.exception("association %d from %s refused: its handler failed", self.number, self.address)
            return Rejection.NO_LEDGER
        self.session = session
        self._contexts, self._peer_maximum = asked.contexts, asked.peer_maximum
        self._allow(self._options.idle_seconds)
        self._happen(Event.ACCEPT, pdu=asked.acceptance)
        return None

    # --- PDUs -------------------------------------------------------------------------------------------

    def _next_pdu(self) -> None:
        if not self._tls:
            # DCMTK, and so Orthanc and many a device, leaves its PDUs to Nagle's algorithm: the second of two small
            # ones waits for this acknowledgement. Linux forgets the setting as it goes.
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        if self._commitment_context and self._message is None and not self._reporting:
            self._report_while_idle()
            if self.state is not State.ESTABLISHED:
                return
        self._read(self._head)
        kind, length = _PDU.unpack(self._head)
        if kind == PduType.P_DATA:
            if length > LONGEST_PDU:
                raise _Invalid(f"a P-DATA PDU of {length} bytes was announced")
            self._happen(Event.P_DATA)
            self._take(length)
            return
        event = EVENT_OF.get(kind)
        if event is None:
            raise _Invalid(f"there is no PDU of type {kind}", AbortReason.UNRECOGNIZED_PDU)
        if length != 4 and event in (Event.RELEASE_RQ, Event.RELEASE_RP, Event.ABORT):
            raise _Invalid(f"a PDU of type {kind} has {length} bytes")
        if length == 4:
            self._read(self._head[:4])
        self._happen(event)
        if self.state is State.AWAITING_RELEASE_ANSWER:
            self._happen(Event.RELEASE_ANSWER)

    def _take(self, length: int) -> None:
        """The fragments of one P-DATA PDU (PS3.8 9.3.5)."""
        while True:
            if length < 6:
                raise _Invalid("a P-DATA PDU ends amid a fragment's header")
            self._read(self._head)
            size, context_id, control = _TWO.unpack(self._head)
            if size < 2 or size > length - 4:
                raise _Invalid(f"a fragment of {size} bytes in a PDU with {length} left")
            length -= 4 + size
            self._fragment(context_id, control, size - 2)
            if not length or self.state is not State.ESTABLISHED:
                return

    def _fragment(self, context_id: int, control: int, size: int) -> None:
        message = self._message
        if message is None:
            if context_id not in self._contexts:
                raise _Invalid(f"a message in the presentation context {context_id}, which was not accepted")
            message = self._message = _Message(context_id)
        elif context_id != message.context_id:
            raise _Invalid("a message changes its presentation context")
        self._keep_pace(time.monotonic())
        if control & 1:
            if message.command is not None or len(message.command_bytes) + size > dimse.MAXIMUM_COMMAND:
                raise _Invalid("a command set that does not end")
            self._read_into(message.command_bytes, size)
            message.came += size
            if control & 2:
                self._begin(message)
        elif message.command is None:
            raise _Invalid("a data set without a command set")
        else:
            self._data(message, size)
            if control & 2:
                self._finish(message)

    def _read_into(self, target: bytearray, size: int) -> None:
        start = len(target)
        target += bytes(size)
        if size:
            with memoryview(target) as view:
                self._read(view[start:])

    def _data(self, message: _Message, size: int) -> None:
        """Read so much of a message's data set to where it belongs."""
        message.size += size
        if message.size > self._options.maximum_instance_bytes:
            raise _Invalid("a message is longer than any instance may be")
        if message.command is not None and message.command.field in _GATHERED:
            if message.size > MAXIMUM_REQUEST_BYTES:
                raise _Invalid("a request other than C-STORE that does not end")
            self._read_into(message.data, size)
            message.came += size
            return
        buffer = self._buffer
        while size:
            room = BUFFER - message.fill
            if not room:
                self._pass_on(message)
                continue
            part = min(size, room)
            self._read(buffer[message.fill : message.fill + part])
            message.fill += part
            message.came += part
            size -= part
        if message.fill - message.seen >= LOOK and message.sink is not None:
            try:
                message.sink.arrived(buffer[message.seen : message.fill])
            except Exception as error:
                self._discard()
                message.answer = self._failure(error)
            message.seen = message.fill

    def _pass_on(self, message: _Message) -> None:
        """Give what the buffer holds to the sink; a sink that fails refuses the instance, whose rest is dropped."""
        if message.sink is not None:
            try:
                message.sink.write(self._buffer[: message.fill])
            except Exception as error:
                self._discard()
                message.answer = self._failure(error)
        message.fill = message.seen = 0

    def _failure(self, error: Exception) -> Answer:
        if isinstance(error, Refusal):
            return error.answer
        logger.error("an instance of association %d was not stored", self.number, exc_info=error)
        return Answer(CANNOT_UNDERSTAND, type(error).__name__, "unforeseen")

    def _discard(self) -> None:
        """Tell the sink of a message that it will never be whole."""
        message = self._message
        if message is not None and message.sink is not None:
            sink, message.sink = message.sink, None
            try:
                sink.discard()
            except Exception:
                logger.exception("what is left of an instance of association %d was not removed", self.number)

    # --- messages (PS3.7 9.3, 10.3) -----------------------------------------------------------------------

    def _begin(self, message: _Message) -> None:
        """A command set is whole."""
        try:
            command = message.command = dimse.decode(message.command_bytes)
        except dimse.CommandError as error:
            raise _Invalid(str(error)) from error
        if command.field & 0x8000 and command.field != dimse.Field.N_EVENT_REPORT_RSP:
            raise _Invalid(f"a response (0x{command.field:04X}) to nothing that was asked")
        if command.field == dimse.Field.C_STORE_RQ:
            self._begin_store(message, command)
        if not command.has_data_set:
            self._finish(message)

    def _begin_store(self, message: _Message, command: dimse.Command) -> None:
        abstract_syntax, transfer_syntax = self._contexts[message.context_id]
        if command.affected_class != abstract_syntax or abstract_syntax in OTHER_CLASSES:
            said = "the SOP class is not that of its presentation context"
            message.answer = Answer(CLASS_NOT_SUPPORTED, said, "wrong class")
        elif not is_uid(command.affected_instance):
            message.answer = Answer(INVALID_INSTANCE, "Affected SOP Instance UID is no UID", "invalid UID")
        elif not command.has_data_set:
            message.answer = Answer(CANNOT_UNDERSTAND, "there is no data set", "no data set")
        else:
            assert self.session is not None
            request = StoreRequest(abstract_syntax, command.affected_instance, transfer_syntax)
            try:
                received = self._server.handlers.receive(self.session, request)
            except Exception as error:
                received = self._failure(error)
            if isinstance(received, Answer):
                message.answer = received
                return
            message.sink = received
            head = part10_head(abstract_syntax, command.affected_instance, transfer_syntax)
            self._buffer[: len(head)] = head
            message.fill = len(head)

    def _finish(self, message: _Message) -> None:
        """A message is whole: do what it asks, and answer."""
        command = message.command
        assert command is not None and self.session is not None
        match command.field:
            case dimse.Field.C_STORE_RQ:
                self._stores += 1
                self._answer(message, self._store(message))
            case dimse.Field.C_ECHO_RQ:
                self._answer(message, Answer(SUCCESS))
            case dimse.Field.N_ACTION_RQ:
                self._answer(message, self._commit(message, command))
            case dimse.Field.N_CREATE_RQ | dimse.Field.N_SET_RQ:
                self._answer(message, self._performed(message, command))
            case dimse.Field.N_EVENT_REPORT_RQ:
                self._answer(message, self._committed(message, command))
            case dimse.Field.N_EVENT_REPORT_RSP:
                if self._reporting and command.responded_to == self._message_id:
                    self._reported(command.status)
            case dimse.Field.C_CANCEL_RQ:
                logger.debug("association %d cancels what is not under way", self.number)
            case _:
                self._answer(message, Answer(UNRECOGNIZED_OPERATION))
        self._message = None

    def _answer(self, message: _Message, answer: Answer) -> None:
        assert message.command is not None
        encoded = dimse.response(message.command, answer.status, answer.comment, answer.error_id)
        self._happen(Event.SEND)
        self._send(p_data(message.context_id, encoded, command=True, maximum=self._peer_maximum))

    def _store(self, message: _Message) -> Answer:
        assert self.session is not None
        self._pass_on(message)
        if message.sink is not None:
            sink, message.sink = message.sink, None
            try:
                sink.commit()
            except Exception as error:
                message.answer = self._failure(error)
            else:
                return Answer(SUCCESS)
        assert message.answer is not None
        try:
            self._server.handlers.refused(self.session, message.answer, message.size)
        except Exception:
            logger.exception("a refusal of association %d could not be recorded", self.number)
        return message.answer

    def _commit(self, message: _Message, command: dimse.Command) -> Answer:
        """Storage Commitment (PS3.4 J.3.2): action 1 of the well-known instance."""
        assert self.session is not None
        abstract_syntax, transfer_syntax = self._contexts[message.context_id]
        if abstract_syntax != STORAGE_COMMITMENT or command.requested_class != STORAGE_COMMITMENT:
            return Answer(CLASS_NOT_SUPPORTED, "N-ACTION is for Storage Commitment Push Model only")
        if command.requested_instance != PUSH_MODEL_INSTANCE:
            return Answer(NO_SUCH_INSTANCE, "Requested SOP Instance UID is not the well-known one")
        if command.action_type != 1:
            return Answer(NO_SUCH_ACTION, "Action Type ID is not 1")
        try:
            request = decode_request(bytes(message.data), transfer_syntax)
        except CommitmentError as error:
            return Answer(error.status, error.what)
        try:
            status = self._server.handlers.commitment(self.session, request)
            self._commitment_context = message.context_id
            return Answer(status)
        except Exception as error:
            logger.exception("a commitment request of association %d was not recorded", self.number)
            return Answer(PROCESSING_FAILURE, type(error).__name__)

    def _committed(self, message: _Message, command: dimse.Command) -> Answer:
        """The report on a request for Storage Commitment that this box made (PS3.4 J.3.3)."""
        assert self.session is not None
        abstract_syntax, transfer_syntax = self._contexts[message.context_id]
        if abstract_syntax != STORAGE_COMMITMENT or command.affected_class != STORAGE_COMMITMENT:
            return Answer(CLASS_NOT_SUPPORTED, "N-EVENT-REPORT is for Storage Commitment Push Model only")
        if command.affected_instance != PUSH_MODEL_INSTANCE:
            return Answer(NO_SUCH_INSTANCE, "Affected SOP Instance UID is not the well-known one")
        try:
            report = decode_report(bytes(message.data), transfer_syntax)
            return self._server.handlers.committed(self.session, report)
        except CommitmentError as error:
            return Answer(error.status, error.what)
        except Exception as error:
            logger.exception("a commitment report to association %d was not recorded", self.number)
            return Answer(PROCESSING_FAILURE, type(error).__name__)

    def _performed(self, message: _Message, command: dimse.Command) -> Answer:
        """N-CREATE and N-SET of a performed procedure step, N-CREATE of an availability notification."""
        assert self.session is not None
        handlers = self._server.handlers
        try:
            request = self._read_performed(message, command)
            if not isinstance(request, Answer):
                return handlers.performed(self.session, request)
            handlers.performed_refused(self.session, request)
            return request
        except Exception as error:
            logger.exception("what association %d says was performed was not recorded", self.number)
            return Answer(PROCESSING_FAILURE, type(error).__name__)

    def _read_performed(self, message: _Message, command: dimse.Command) -> Request | Answer:
        abstract_syntax, transfer_syntax = self._contexts[message.context_id]
        creates = command.field == dimse.Field.N_CREATE_RQ
        sop_class = command.affected_class if creates else command.requested_class
        uid = command.affected_instance if creates else command.requested_instance
        if abstract_syntax not in (PERFORMED_STEP, AVAILABILITY) or sop_class != abstract_syntax:
            return Answer(CLASS_NOT_SUPPORTED, "the SOP class is not that of its presentation context")
        if not creates and abstract_syntax != PERFORMED_STEP:
            return Answer(UNRECOGNIZED_OPERATION, "an availability notification is not changed")
        if not is_uid(uid):
            return Answer(INVALID_INSTANCE, "SOP Instance UID is missing or no UID")
        read = read_availability if abstract_syntax == AVAILABILITY else read_new_step if creates else read_step_change
        try:
            return read(uid, bytes(message.data), transfer_syntax)
        except PerformedError as error:
            return Answer(error.status, error.what)

    def _reported(self, status: int | None) -> None:
        assert self.session is not None
        transaction, self._reporting = self._reporting, ""
        try:
            self._server.handlers.reported(self.session, transaction, status)
        except Exception:
            # It stays under way in the ledger, which takes it up again by itself.
            logger.exception("association %d: the answer to a commitment report was not recorded", self.number)

    def _report_while_idle(self) -> None:
        """Until the peer sends something, send it a result that is ready for it.

        Raises:
            _Expired: it fell silent, and there was nothing to send.
        """
        until = time.monotonic() + self._options.idle_seconds
        while not self._reporting and self.state is State.ESTABLISHED:
            self._report(self._commitment_context)
            left = until - time.monotonic()
            if self._has_data(max(0.0, min(REPORT_POLL_SECONDS, left))):
                return
            if left <= 0:
                raise _Expired

    def _has_data(self, seconds: float) -> bool:
        if self._early or (isinstance(self._socket, ssl.SSLSocket) and self._socket.pending()):
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def _report(self, context_id: int) -> None:
        """Send the next result of a commitment request over the same association (PS3.4 J.3.3)."""
        assert self.session is not None
        try:
            report = self._server.handlers.report(self.session)
        except Exception:
            logger.exception("association %d: what is to be reported could not be looked up", self.number)
            return
        if report is None:
            return
        self._message_id = self._message_id % 0xFFFF + 1
        self._reporting = report.transaction_uid
        command = dimse.encode(
            dimse.Command(
                field=dimse.Field.N_EVENT_REPORT_RQ,
                message_id=self._message_id,
                data_set_type=0x0001,
                affected_class=STORAGE_COMMITMENT,
                affected_instance=PUSH_MODEL_INSTANCE,
                event_type=report.event_type_id,
            )
        )
        data = encode_report(report, self._contexts[context_id][1])
        self._happen(Event.SEND)
        self._send(
            p_data(context_id, command, command=True, maximum=self._peer_maximum)
            + p_data(context_id, data, command=False, maximum=self._peer_maximum)
        )
