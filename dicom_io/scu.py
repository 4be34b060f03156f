"""Verification and storage user (PS3.4 Annexes A and B) on pynetdicom."""

from __future__ import annotations

import ssl
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydicom import dcmread
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian, MediaStorageDirectoryStorage
from pynetdicom import AE, _config, evt
from pynetdicom.pdu import A_ASSOCIATE_RJ
from pynetdicom.sop_class import Verification
from pynetdicom.status import code_to_category

from dicom_io._elements import parse, parse_meta, reading
from dicom_io._part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from dicom_io._transport import acknowledge_at_once, send_at_once
from dicom_io.errors import HeaderError, NotAccepted, PeerError
from dicom_io.transcode import fitting, transcoded

# Files are sent as they are: read in pieces and never parsed, so not changed by a parser either.
_config.STORE_SEND_CHUNKED_DATASET = True
_config.LOG_HANDLER_LEVEL = "none"

MAXIMUM_CONTEXTS = 128
"""Presentation contexts in one association: their IDs are the odd numbers of one byte (PS3.8 9.3.2.2)."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Another application entity.

    Attributes:
        tls: the context of connections to it; None: they are not encrypted. A peer's certificate must be for `host`,
            as the context has it checked.
    """

    ae_title: str
    host: str
    port: int
    tls: ssl.SSLContext | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.ae_title}@{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class SendResult:
    """What became of one file.

    Attributes:
        sop_instance_uid: '' where the file could not be read.
        status: the DIMSE status of the peer's answer (PS3.4 B.2.3), None where there was none.
        error: why it is not stored; '' if it is, that is on Success and on a warning (0xBxxx).
        note: in which transfer syntax it went out, where the peer did not accept the one that was wanted most.
    """

    path: Path
    sop_instance_uid: str
    status: int | None
    error: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class _Item:
    path: Path
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    unpadded: bool  # a deflated data set of odd length
    wanted: tuple[str, ...] = ()  # transfer syntaxes that it can be written in, the best first

    @property
    def contexts(self) -> tuple[tuple[str, str], ...]:
        """(class, syntax) to propose, the best first: as it is, and for what is not compressed also the default syntax.

        Where some are wanted: those, and the default syntax, which is always proposed (PS3.5 10.1).
        """
        if self.wanted:
            every = dict.fromkeys((*self.wanted, str(ImplicitVRLittleEndian)))
            return tuple((self.sop_class_uid, syntax) for syntax in every)
        own = (self.sop_class_uid, self.transfer_syntax_uid)
        syntax = UID(self.transfer_syntax_uid)
        if syntax.is_private or syntax.is_compressed or syntax == ImplicitVRLittleEndian:
            return (own,)
        return own, (self.sop_class_uid, ImplicitVRLittleEndian)


def echo(peer: Peer, calling_ae: str, *, timeout: float = 10.0) -> None:
    """Verify that the peer answers C-ECHO within ``timeout`` seconds for each step.

    Raises:
        PeerError: no association, no answer, or an answer other than Success.
    """
    with association_with(peer, calling_ae, {(Verification, ImplicitVRLittleEndian)}, timeout) as association:
        status = association.send_c_echo().get("Status")
        if status is None:
            raise PeerError(f"it did not answer C-ECHO within {timeout:g} s", str(peer), "see its log")
        if status != 0x0000:
            raise PeerError(f"it answered C-ECHO with status 0x{status:04X}", str(peer), "see its log")


def accepted(
    peer: Peer, calling_ae: str, contexts: Set[tuple[str, str]], *, timeout: float = 10.0
) -> frozenset[tuple[str, str]]:
    """Which (abstract syntax, transfer syntax) of some, at most `MAXIMUM_CONTEXTS`, the peer accepts; nothing is sent.

    Raises:
        PeerError: no association.
    """
    try:
        with association_with(peer, calling_ae, contexts, timeout) as association:
            taken = association.accepted_contexts
            return frozenset((str(one.abstract_syntax), str(one.transfer_syntax[0])) for one in taken)
    except NotAccepted:
        return frozenset()


def send(
    files: Iterable[Path],
    peer: Peer,
    calling_ae: str,
    *,
    on_sent: Callable[[SendResult], None] | None = None,
    timeout: float = 30.0,
    syntaxes: Sequence[str] = (),
) -> list[SendResult]:
    """Send Part 10 files by C-STORE, each in the transfer syntax that it has, or in the first of some that fits.

    A file without compression is converted to Implicit VR Little Endian if that is all the peer accepts; any
    other conversion is not tried, the result says which syntax the peer refused. An answer that does not come
    within ``timeout`` seconds, or an association that ends, is followed by one more try of that file on a new
    association. After a second answer that does not come the files that are left are not tried.

    Args:
        on_sent: called after each file, in this thread.
        syntaxes: of `dicom_io.transcode.SYNTAXES`, the best first: for files of ours, which are not compressed. Each
            goes in the first of them that it can be written in and the peer accepts, at last in Implicit VR Little
            Endian.

    Returns:
        a result for each file, in the order of ``files``.

    Raises:
        NotAccepted: the peer takes an association and none of the first files.
        PeerError: no association could be made at all.
    """
    paths = list(files)
    results: dict[int, SendResult] = {}

    def finish(index: int, item: _Item | None, status: int | None, error: str, note: str = "") -> None:
        result = SendResult(paths[index], item.sop_instance_uid if item else "", status, error, note)
        results[index] = result
        if on_sent is not None:
            on_sent(result)

    waiting: deque[tuple[int, _Item]] = deque()
    for index, path in enumerate(paths):
        try:
            waiting.append((index, _identify(path, syntaxes)))
        except HeaderError as problem:
            finish(index, None, None, str(problem))

    associated = False
    failed = 0  # tries of the file at the front
    error = f"no answer from {peer} within {timeout:g} s, twice"
    while waiting and failed < 2:
        try:
            proposed = _contexts(item for _, item in waiting)
            with association_with(peer, calling_ae, proposed, timeout) as association:
                associated = True
                while waiting and proposed >= set(waiting[0][1].contexts):
                    index, item = waiting[0]
                    started = time.monotonic()
                    status, refusal, note = _store(association, item)
                    if status is None and not refusal:
                        failed += 1
                        if failed < 2 or time.monotonic() - started >= timeout:
                            break
                        refusal = f"{peer} ended the association instead of an answer, twice"
                    waiting.popleft()
                    failed = 0
                    finish(index, item, status, refusal, note)
        except PeerError as problem:
            if not associated:
                raise
            error = str(problem)
            break
    for position, (index, item) in enumerate(waiting):
        finish(index, item, None, error if position == 0 else f"not tried: {error}")
    return [results[index] for index in range(len(paths))]


def instances_in(folder: Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Look for instances in a folder and the folders below it.

    Returns:
        the files that `send` can send, and the others each with the reason; both sorted by path.
    """
    found: list[Path] = []
    skipped: list[tuple[Path, str]] = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            _identify(path)
        except HeaderError as error:
            skipped.append((path, error.what))
        else:
            found.append(path)
    return found, skipped


def identity(path: Path) -> tuple[str, str]:
    """SOP Class and SOP Instance UID of a Part 10 file.

    Raises:
        HeaderError: it is no instance.
    """
    item = _identify(path)
    return item.sop_class_uid, item.sop_instance_uid


def _identify(path: Path, wanted: Sequence[str] = ()) -> _Item:
    """Raises HeaderError if the file is no instance, or its File Meta Information is another instance's."""
    with reading(str(path)), path.open("rb") as stream:
        meta = parse_meta(stream)
        stream.seek(0)
        syntax, elements, _ = parse(stream, ("SOPClassUID", "SOPInstanceUID"))
        odd = bool(path.stat().st_size % 2)
        item = _Item(path, elements.uid("SOPClassUID"), elements.uid("SOPInstanceUID"), syntax, odd)
        named = meta.uid("MediaStorageSOPClassUID"), meta.uid("MediaStorageSOPInstanceUID")
        if named[0] == MediaStorageDirectoryStorage:
            raise HeaderError("it is a DICOMDIR, the directory of a medium")
        if not (item.sop_class_uid and item.sop_instance_uid and syntax):
            raise HeaderError("SOP Class, SOP Instance or Transfer Syntax UID missing or no UID")
        if named != (item.sop_class_uid, item.sop_instance_uid):
            raise HeaderError("its File Meta Information names another instance than its data set")
        if odd and syntax != DeflatedExplicitVRLittleEndian:
            raise HeaderError("it has an odd number of bytes, so it is damaged")
    if wanted:
        try:
            item = replace(item, wanted=fitting(path, wanted) or (str(ImplicitVRLittleEndian),))
        except (InvalidDicomError, ValueError) as error:
            raise HeaderError(f"it cannot be written in another transfer syntax: {error}") from error
    return item


def _contexts(items: Iterable[_Item]) -> Set[tuple[str, str]]:
    """What to propose for as many of the first items as one association has room for."""
    contexts: dict[tuple[str, str], None] = {}
    for item in items:
        more = contexts | dict.fromkeys(item.contexts)
        if len(more) > MAXIMUM_CONTEXTS:
            break
        contexts = more
    return contexts.keys()


def _store(association: Any, item: _Item) -> tuple[int | None, str, str]:
    """The status, why the item was not stored, and in what it went out; the first two are None and '' if there was no
    answer."""
    accepted = {(cx.abstract_syntax, cx.transfer_syntax[0]) for cx in association.accepted_contexts}
    name = UID(item.transfer_syntax_uid).name
    if accepted.isdisjoint(item.contexts):
        wanted = ", ".join(UID(syntax).name for _, syntax in item.contexts) if item.wanted else name
        return None, f"the peer does not accept {UID(item.sop_class_uid).name} in {wanted}", ""
    chosen = next(syntax for cls, syntax in item.contexts if (cls, syntax) in accepted)
    note = ""
    if item.wanted and chosen != item.wanted[0]:
        note = f"in {UID(chosen).name}: it does not accept {UID(item.wanted[0]).name}"
    try:
        with TemporaryDirectory() as folder:
            # A path goes out as it is; of a data set pynetdicom may change the encoding.
            source: Path | Any = item.path
            if chosen != item.transfer_syntax_uid:
                if item.wanted:
                    source = Path(folder) / "transcoded.dcm"
                    transcoded(item.path, source, chosen)
                else:
                    source = dcmread(item.path)
            elif item.unpadded:
                source = Path(folder) / "padded.dcm"
                source.write_bytes(item.path.read_bytes() + b"\0")
            status = association.send_c_store(source).get("Status")
    except RuntimeError:
        return None, "", ""  # the association has ended
    except Exception as error:
        association.abort()  # part of a message may have gone out already
        return None, f"it cannot be sent ({type(error).__name__}: {error})", ""
    if status is None:
        return None, "", ""
    category = code_to_category(status)
    refusal = "" if category in ("Success", "Warning") else f"the peer answered 0x{status:04X} ({category})"
    return status, refusal, note


@contextmanager
def association_with(
    peer: Peer, calling_ae: str, contexts: Set[tuple[str, str]], timeout: float, *, roles: Sequence[Any] = ()
) -> Iterator[Any]:
    """An association, released at the end.

    Args:
        contexts: (abstract syntax, transfer syntax) of each presentation context to propose.
        timeout: seconds for each step.
        roles: SCP/SCU role selection items to propose (PS3.7 D.3.3.4).

    Raises:
        PeerError: there is none, with the reason.
    """
    ae = AE(ae_title=calling_ae)
    ae.implementation_class_uid = IMPLEMENTATION_CLASS_UID
    ae.implementation_version_name = IMPLEMENTATION_VERSION_NAME
    ae.connection_timeout = ae.acse_timeout = ae.dimse_timeout = timeout
    ae.network_timeout = max(timeout, 60.0)
    for class_uid, syntax in contexts:
        ae.add_requested_context(class_uid, syntax)
    connected: list[Any] = []
    rejections: list[str] = []

    def note(event: Any) -> None:
        # pynetdicom takes a peer that rejects at once for one that could not be reached.
        if isinstance(event.pdu, A_ASSOCIATE_RJ):
            rejections.append(event.pdu.reason_str)

    def limit(event: Any) -> None:
        # pynetdicom leaves a requestor's socket without a timeout: a peer that stops reading would hold it for ever.
        event.assoc.dul.socket.socket.settimeout(timeout)

    handlers = [
        (evt.EVT_CONN_OPEN, limit),
        (evt.EVT_CONN_OPEN, connected.append),
        (evt.EVT_CONN_OPEN, send_at_once),
        (evt.EVT_PDU_SENT, acknowledge_at_once),
        (evt.EVT_PDU_RECV, note),
    ]
    try:
        association = ae.associate(
            peer.host,
            peer.port,
            ae_title=peer.ae_title,
            ext_neg=list(roles),
            evt_handlers=handlers,
            tls_args=(peer.tls, peer.host) if peer.tls else None,
        )
    except (OSError, TypeError, ValueError) as error:
        raise PeerError(f"no association ({error})", str(peer), "check host, port and AE titles") from error
    if not association.is_established:
        raise _no_association(association, bool(connected), rejections, peer)
    # Its reactor thread looks for requests even while an answer is awaited, and would drop one that it takes.
    association._serve_request = lambda message, context: association.dimse.msg_queue.put((context, message))
    try:
        yield association
    finally:
        association.release()


def _no_association(association: Any, connected: bool, rejections: Sequence[str], peer: Peer) -> PeerError:
    if not connected:
        return PeerError("it cannot be reached", str(peer), "check that it runs, its host and port, and the network")
    if rejections:
        return PeerError(f"it rejected the association ({rejections[0]})", str(peer), "check both AE titles there")
    if association.rejected_contexts and not association.accepted_contexts:
        refused = sorted({UID(cx.abstract_syntax).name for cx in association.rejected_contexts})
        return NotAccepted(
            f"it accepts none of what was proposed ({', '.join(refused)})", str(peer), "see what it is set to accept"
        )
    return PeerError("it did not answer the association request", str(peer), "check that it is a DICOM service")
