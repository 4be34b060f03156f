"""Storage and verification provider (PS3.4 Annexes B and A) on pynetdicom.

It receives, and hands on the bytes as they were sent: it neither parses a data set nor keeps anything.
"""

from __future__ import annotations

import itertools
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from pynetdicom import AE, _config, evt
from pynetdicom import sop_class as sop
from pynetdicom.pdu import A_ABORT_RQ, P_DATA_TF

from dicom_io._elements import is_uid
from dicom_io._part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME, part10
from dicom_io._transport import acknowledge_at_once, send_at_once
from dicom_io.errors import ScansideError

logger = logging.getLogger(__name__)

# pynetdicom's own handlers format every message for its log, whether or not anyone reads it.
_config.LOG_HANDLER_LEVEL = "none"

STORAGE_CLASSES: tuple[str, ...] = (
    sop.CTImageStorage,
    sop.EnhancedCTImageStorage,
    sop.LegacyConvertedEnhancedCTImageStorage,
    sop.SecondaryCaptureImageStorage,
    sop.MultiFrameSingleBitSecondaryCaptureImageStorage,
    sop.MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    sop.MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    sop.MultiFrameTrueColorSecondaryCaptureImageStorage,
    sop.XRayRadiationDoseSRStorage,
    sop.EnhancedXRayRadiationDoseSRStorage,
    sop.BasicTextSRStorage,
    sop.EnhancedSRStorage,
    sop.ComprehensiveSRStorage,
    sop.KeyObjectSelectionDocumentStorage,
    sop.GrayscaleSoftcopyPresentationStateStorage,
    sop.ColorSoftcopyPresentationStateStorage,
    sop.EncapsulatedPDFStorage,
    sop.RawDataStorage,
)
"""What is accepted for storage: CT, and what else a CT scanner puts into a study."""

IMAGE_CLASSES: tuple[str, ...] = STORAGE_CLASSES[:8]
"""Those of `STORAGE_CLASSES` that hold pixels and so may come compressed."""

PLAIN_SYNTAXES: tuple[str, ...] = (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
)
COMPRESSED_SYNTAXES: tuple[str, ...] = (
    RLELossless,
    HTJ2KLosslessRPCL,
    HTJ2KLossless,
    JPEGLosslessSV1,
    JPEGLossless,
    JPEGLSLossless,
    JPEG2000Lossless,
)
"""In order of preference, by how fast they decode. Where one presentation context proposes several syntaxes the
first of ``PLAIN_SYNTAXES + COMPRESSED_SYNTAXES`` is chosen: what a peer proposes uncompressed it can send so."""

MAXIMUM_PDU = 131_072
_LONGEST_PDU = 1 << 20  # accepted from peers that exceed what was negotiated
MAXIMUM_INSTANCE_BYTES = 2 << 30
"""The association of a sender that exceeds this in one message is aborted, because it is held in memory."""

SUCCESS = 0x0000
INVALID_INSTANCE = 0x0117  # PS3.7 C.4.3 (Invalid SOP Instance)
CLASS_NOT_SUPPORTED = 0x0122
PROCESSING_FAILURE = 0xC000  # PS3.4 B.2.3 (Error: Cannot understand)


@dataclass(frozen=True, slots=True)
class Received:
    """One instance of a C-STORE request.

    The UIDs are those of the command, and are UIDs (PS3.5 9.1); that the data set agrees is for the handler to see.

    Attributes:
        association: key of the association in this process.
        part10: a whole Part 10 file (PS3.10 7.1). Its data set is exactly what was sent, and its File Meta
            Information depends on nothing else, so the same instance sent again makes the same bytes.
    """

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    calling_ae: str
    called_ae: str
    address: str
    association: int
    part10: bytes


@dataclass(frozen=True, slots=True)
class AssociationClosed:
    """The end of an association.

    Attributes:
        outcome: "released" by the peer; "aborted" with an A-ABORT from either side (also this side's, after a
            silent peer or at a stop); "broken" where the connection went away without either.
    """

    association: int
    calling_ae: str
    called_ae: str
    address: str
    outcome: Literal["released", "aborted", "broken"]


class Handlers(Protocol):
    """What the owner of the server does. All four may be called from several threads at once.

    For each association: ``opened`` once, then ``stored`` or ``refused`` one after another, then ``closed`` once.
    An association for which ``opened`` raised is aborted and has no ``closed``.
    """

    def opened(self, association: int, calling_ae: str, called_ae: str, address: str) -> None:
        """An association was accepted."""

    def stored(self, received: Received) -> int:
        """Keep an instance, and say so by the DIMSE status that is returned and sent (0x0000 is Success)."""

    def refused(self, association: int, status: int, reason: str, size: int) -> None:
        """An instance of so many bytes was answered with that failure status, without or in spite of ``stored``."""

    def closed(self, closed: AssociationClosed) -> None:
        """An association has ended; no ``stored`` of it is running or will come."""


class _Session:
    """An accepted association, from `Handlers.opened` to `Handlers.closed`."""

    def __init__(self, number: int, association: Any) -> None:
        request = association.requestor.primitive
        self.number = number
        self.calling_ae = str(request.calling_ae_title).strip()
        self.called_ae = str(request.called_ae_title).strip()
        self.address = str(association.requestor.address_info.address)
        self.abort_seen = False
        self.message_bytes = 0


class StorageServer:
    """A running server; made by `start_server`."""

    def __init__(self, handlers: Handlers) -> None:
        self._handlers = handlers
        self._numbers = itertools.count(1)
        self._sessions: dict[Any, _Session] = {}  # by pynetdicom's Association
        self._lock = threading.Lock()
        self._watchers: set[threading.Thread] = set()
        self._stopping = False
        self._server: Any = None

    @property
    def port(self) -> int:
        """The TCP port that is listened on."""
        return int(self._server.server_address[1])

    def _start(self, ae: Any, host: str, port: int) -> None:
        self._server = ae.start_server(
            (host, port),
            block=False,
            evt_handlers=[
                (evt.EVT_CONN_OPEN, send_at_once),
                (evt.EVT_CONN_OPEN, self._on_connection),
                (evt.EVT_CONN_CLOSE, self._on_disconnection),
                (evt.EVT_ESTABLISHED, self._on_established),
                (evt.EVT_PDU_RECV, acknowledge_at_once),
                (evt.EVT_PDU_RECV, self._on_pdu_received),
                (evt.EVT_PDU_SENT, acknowledge_at_once),
                (evt.EVT_PDU_SENT, self._on_pdu_sent),
                (evt.EVT_DIMSE_RECV, self._on_message),
                (evt.EVT_C_STORE, self._on_store),
            ],
        )

    def stop(self, grace: float = 5.0) -> None:
        """Accept no more associations, let the present ones end within ``grace`` seconds, then abort them.

        When it returns every `Handlers.closed` has been called, unless a handler itself does not return within
        some seconds more. A second call does nothing.
        """
        deadline = time.monotonic() + grace
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
        self._server.shutdown()
        while self._server.active_associations and time.monotonic() < deadline:
            time.sleep(0.02)
        remaining = self._server.active_associations
        for association in remaining:
            association.abort(block=False)
        _join(remaining, seconds=1.0)
        for association in self._server.active_associations:
            # Its thread waits in a read from a peer that stopped amid a PDU; the abort is queued behind that read.
            connection = association.dul.socket.socket
            if connection is not None:
                _shut_down(connection)
        with self._lock:
            watchers = list(self._watchers)
        _join([*remaining, *watchers], seconds=5.0)

    def _on_connection(self, event: Any) -> None:
        connection = event.assoc.dul.socket
        # Without a timeout a peer that vanishes amid a PDU holds this association for ever.
        connection.socket.settimeout(event.assoc.network_timeout)
        # A PDU is read into memory before it is looked at, and its header may announce 4 GiB.
        connection.recv = _bounded(connection.recv)

    def _on_disconnection(self, event: Any) -> None:
        if event.assoc not in self._sessions:
            # Wakes a thread that still waits for the association request, and counts as an association.
            event.assoc.dul.to_user_queue.put(None)

    def _on_established(self, event: Any) -> None:
        association = event.assoc
        session = _Session(next(self._numbers), association)
        with self._lock:
            self._sessions[association] = session  # first, because its abort may come at any moment
        try:
            self._handlers.opened(session.number, session.calling_ae, session.called_ae, session.address)
        except Exception:
            logger.exception("association %d from %s refused: its handler failed", session.number, session.address)
            with self._lock:
                del self._sessions[association]
            association.abort()
            return
        watcher = threading.Thread(
            target=self._watch, args=(association, session), name=f"association-{session.number}", daemon=True
        )
        with self._lock:
            self._watchers.add(watcher)
        watcher.start()

    def _watch(self, association: Any, session: _Session) -> None:
        """Report the end when the association's thread, in which ``stored`` runs, has ended: whatever ended it."""
        association.join()
        outcome: Literal["released", "aborted", "broken"] = "broken"
        if association.is_released:
            outcome = "released"
        elif session.abort_seen:
            outcome = "aborted"
        try:
            self._handlers.closed(
                AssociationClosed(session.number, session.calling_ae, session.called_ae, session.address, outcome)
            )
        except Exception:
            logger.exception("the end of association %d was not handled", session.number)
        finally:
            with self._lock:
                self._sessions.pop(association, None)
                self._watchers.discard(threading.current_thread())

    def _on_pdu_received(self, event: Any) -> None:
        session = self._sessions.get(event.assoc)
        if session is None:
            return
        if isinstance(event.pdu, A_ABORT_RQ):
            session.abort_seen = True
        elif isinstance(event.pdu, P_DATA_TF):
            session.message_bytes += event.pdu.pdu_length
            if session.message_bytes > MAXIMUM_INSTANCE_BYTES:
                logger.error("association %d aborted: it sent too much for one instance", session.number)
                event.assoc.abort()

    def _on_pdu_sent(self, event: Any) -> None:
        session = self._sessions.get(event.assoc)
        if session is not None and isinstance(event.pdu, A_ABORT_RQ):
            session.abort_seen = True

    def _on_message(self, event: Any) -> None:
        session = self._sessions.get(event.assoc)
        if session is not None:
            session.message_bytes = 0

    def _on_store(self, event: Any) -> int:
        session = self._sessions[event.assoc]
        sop_class_uid = str(event.request.AffectedSOPClassUID)
        sop_instance_uid = str(event.request.AffectedSOPInstanceUID)
        transfer_syntax_uid = str(event.context.transfer_syntax)
        size = len(event.request.DataSet.getbuffer()) if event.request.DataSet else 0
        if sop_class_uid != event.context.abstract_syntax:
            reason = "the command names another SOP class than its presentation context"
            return self._refuse(session, CLASS_NOT_SUPPORTED, reason, size)
        if not is_uid(sop_instance_uid):
            return self._refuse(session, INVALID_INSTANCE, "Affected SOP Instance UID is no UID", size)
        received = Received(
            sop_class_uid=sop_class_uid,
            sop_instance_uid=sop_instance_uid,
            transfer_syntax_uid=transfer_syntax_uid,
            calling_ae=session.calling_ae,
            called_ae=session.called_ae,
            address=session.address,
            association=session.number,
            part10=part10(sop_class_uid, sop_instance_uid, transfer_syntax_uid, event.request.DataSet.getbuffer()),
        )
        try:
            return self._handlers.stored(received)
        except Exception as error:
            logger.exception("an instance of association %d was not stored", session.number)
            return self._refuse(session, PROCESSING_FAILURE, f"{type(error).__name__}: {error}", size)

    def _refuse(self, session: _Session, status: int, reason: str, size: int) -> int:
        try:
            self._handlers.refused(session.number, status, reason, size)
        except Exception:
            logger.exception("a refusal of association %d could not be recorded", session.number)
        return status


def start_server(
    ae_title: str,
    host: str,
    port: int,
    handlers: Handlers,
    *,
    maximum_associations: int = 20,
    accepted_calling: Sequence[str] = (),
    require_called: bool = False,
    idle_timeout: float = 60.0,
) -> StorageServer:
    """Listen for associations and serve C-ECHO and C-STORE, each association in its own thread.

    Args:
        host: address to bind; "" is every address.
        port: 0 chooses a free one, see `StorageServer.port`.
        maximum_associations: one more is rejected (transient, local limit exceeded).
        accepted_calling: AE titles that may call; none means any.
        require_called: whether a peer must call us by our AE title.
        idle_timeout: seconds without a byte from the peer after which its association is aborted.

    Raises:
        ScansideError: the address cannot be bound, or an AE title is not one (PS3.5 6.2: 1 to 16 characters).
    """
    try:
        ae = AE(ae_title=ae_title)
        ae.require_calling_aet = list(accepted_calling)
    except (TypeError, ValueError) as error:
        raise ScansideError(str(error), f"AE title {ae_title!r}", "use 1 to 16 plain characters") from error
    ae.require_called_aet = require_called
    ae.maximum_associations = maximum_associations
    ae.maximum_pdu_size = MAXIMUM_PDU
    ae.implementation_class_uid = IMPLEMENTATION_CLASS_UID
    ae.implementation_version_name = IMPLEMENTATION_VERSION_NAME
    ae.acse_timeout = 10
    ae.network_timeout = idle_timeout
    ae.add_supported_context(sop.Verification, list(PLAIN_SYNTAXES[:3]))
    for uid in STORAGE_CLASSES:
        syntaxes = PLAIN_SYNTAXES + (COMPRESSED_SYNTAXES if uid in IMAGE_CLASSES else ())
        ae.add_supported_context(uid, list(syntaxes))
    server = StorageServer(handlers)
    try:
        server._start(ae, host, port)
    except OSError as error:
        raise ScansideError(
            f"cannot listen ({error.strerror or error})", f"{host or '*'}:{port}", "choose another address or port"
        ) from error
    return server


def _bounded(receive: Callable[[int], bytearray]) -> Callable[[int], bytearray]:
    """pynetdicom's ``AssociationSocket.recv`` for PDUs of a sane length only."""

    def bounded(count: int) -> bytearray:
        if count > _LONGEST_PDU:
            raise OSError(f"a PDU of {count} bytes was announced")  # which closes the connection
        return receive(count)

    return bounded


def _shut_down(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        logger.debug("the connection was closed already")


def _join(threads: Sequence[Any], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
