"""Storage Commitment Push Model (PS3.4 Annex J): the request and its result, and sending the result.

The request comes in an N-ACTION, the result goes out in an N-EVENT-REPORT, over the same association or a new one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom.presentation import build_role

from dicom_io._elements import is_uid
from dicom_io.errors import PeerError, ScansideError
from dicom_io.scu import Peer, association_with

PUSH_MODEL = "1.2.840.10008.1.20.1"
"""SOP Class UID of the Storage Commitment Push Model (PS3.4 J.3)."""
PUSH_MODEL_INSTANCE = "1.2.840.10008.1.20.1.1"
"""The one, well-known SOP Instance of that class (PS3.4 J.3.5)."""
REQUEST_ACTION = 1
"""Action Type ID of a request for storage commitment (PS3.4 J.3.2.1)."""
ALL_COMMITTED, FAILURES_EXIST = 1, 2
"""Event Type IDs of a result (PS3.4 J.3.3.1)."""

TRANSFER_SYNTAXES: tuple[str, ...] = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian)
"""What requests and reports are read and written in, in order of preference."""

# Failure Reason (0008,1197), PS3.3 C.14.1.1.
PROCESSING_FAILURE = 0x0110
NO_SUCH_INSTANCE = 0x0112
CLASS_INSTANCE_CONFLICT = 0x0119

# DIMSE status of a request that cannot be taken (PS3.7 10.1.4.1.10 and C.4, C.5).
INVALID_ARGUMENT = 0x0115
RESOURCE_LIMITATION = 0x0213

MAXIMUM_REQUEST_BYTES = 4 << 20
"""A longer request is not looked at; this is room for some 40,000 instances."""
MAXIMUM_REFERENCES = 20_000
"""More instances in one request are refused: they would hold up other senders for seconds while they are parsed."""

_WHERE = "storage commitment"
_SHOWN = 80  # characters of an unreadable value that an error quotes


class CommitmentError(ScansideError):
    """A request for storage commitment that cannot be taken.

    Attributes:
        status: the DIMSE status to answer the N-ACTION with.
    """

    def __init__(self, what: str, where: str = "", remedy: str = "", *, status: int = INVALID_ARGUMENT) -> None:
        super().__init__(what, where, remedy)
        self.status = status


@dataclass(frozen=True, slots=True)
class Reference:
    """An instance that is asked for."""

    sop_class_uid: str
    sop_instance_uid: str


@dataclass(frozen=True, slots=True)
class CommitmentRequest:
    """What an N-ACTION asks for (PS3.4 table J.3-1); at least one reference, each instance once."""

    transaction_uid: str
    references: tuple[Reference, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """An instance that is not committed to, with its Failure Reason (0008,1197; PS3.3 C.14.1.1)."""

    reference: Reference
    reason: int


@dataclass(frozen=True, slots=True)
class CommitmentReport:
    """What an N-EVENT-REPORT tells (PS3.4 table J.3-2)."""

    transaction_uid: str
    committed: tuple[Reference, ...]
    failed: tuple[Failure, ...]

    @property
    def event_type_id(self) -> int:
        """`ALL_COMMITTED` or `FAILURES_EXIST`."""
        return FAILURES_EXIST if self.failed else ALL_COMMITTED


def decode_request(data: bytes | bytearray | memoryview, transfer_syntax_uid: str) -> CommitmentRequest:
    """The Action Information of an N-ACTION (PS3.4 J.3.2.1), which anybody may have sent.

    Raises:
        CommitmentError: it is too long, no data set, or not a request: which attribute is missing, cut off, no UID
            or named twice.
    """
    if len(data) > MAXIMUM_REQUEST_BYTES:
        raise _too_much(f"{len(data)} bytes, and more than {MAXIMUM_REQUEST_BYTES} are not read")
    if transfer_syntax_uid not in TRANSFER_SYNTAXES:
        raise CommitmentError(
            f"it is encoded in {UID(transfer_syntax_uid).name}", _WHERE, "encode it in Explicit VR Little Endian"
        )
    with _reading():
        return _request(_read(data, transfer_syntax_uid))


def decode_report(data: bytes | bytearray | memoryview, transfer_syntax_uid: str) -> CommitmentReport:
    """The Event Information of an N-EVENT-REPORT (PS3.4 J.3.3.1), which anybody may have sent.

    Raises:
        CommitmentError: as `decode_request`; a failed instance without a reason is one.
    """
    if len(data) > MAXIMUM_REQUEST_BYTES:
        raise _too_much(f"{len(data)} bytes, and more than {MAXIMUM_REQUEST_BYTES} are not read")
    if transfer_syntax_uid not in TRANSFER_SYNTAXES:
        raise CommitmentError(
            f"it is encoded in {UID(transfer_syntax_uid).name}", _WHERE, "encode it in Explicit VR Little Endian"
        )
    with _reading():
        data_set = _read(data, transfer_syntax_uid)
        transaction_uid = _uid(data_set, "TransactionUID", "")
        committed = [reference for reference, _ in _references(data_set, "ReferencedSOPSequence")]
        failed = []
        for reference, item in _references(data_set, "FailedSOPSequence"):
            if not isinstance(item.get("FailureReason"), int):
                raise CommitmentError("an instance failed without a Failure Reason", _WHERE, "say why (PS3.4 J.3.3.1)")
            failed.append(Failure(reference, item.FailureReason))
        return CommitmentReport(transaction_uid, tuple(committed), tuple(failed))


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except CommitmentError:
        raise
    except RecursionError:
        raise CommitmentError("its sequences are nested too deeply", _WHERE, "send it as PS3.4 J.3 says") from None
    except Exception as error:  # pydicom raises whatever hostile bytes make it raise
        raise CommitmentError(
            f"it cannot be read as a data set ({type(error).__name__})", _WHERE, "send it as PS3.4 J.3 says"
        ) from error


def _too_much(what: str) -> CommitmentError:
    return CommitmentError(
        f"it has {what}", _WHERE, "ask for fewer instances in one request", status=RESOURCE_LIMITATION
    )


def _read(data: bytes | bytearray | memoryview, syntax: str) -> Dataset:
    return read_dataset(
        BytesIO(data), is_implicit_VR=syntax == ImplicitVRLittleEndian, is_little_endian=syntax != ExplicitVRBigEndian
    )


def _request(data_set: Dataset) -> CommitmentRequest:
    transaction_uid = _uid(data_set, "TransactionUID", "")
    references = tuple(reference for reference, _ in _references(data_set, "ReferencedSOPSequence"))
    if not references:
        raise CommitmentError("it names no instance (Referenced SOP Sequence)", _WHERE, "name at least one")
    counted = Counter(one.sop_instance_uid for one in references)
    twice = [uid for uid, count in counted.items() if count > 1]
    if twice:
        more = f" and {len(twice) - 1} more" if len(twice) > 1 else ""
        raise CommitmentError(f"it names {twice[0]}{more} more than once", _WHERE, "name each instance once")
    return CommitmentRequest(transaction_uid, references)


def _references(data_set: Dataset, keyword: str) -> list[tuple[Reference, Dataset]]:
    """The instances that a sequence names, each with its item."""
    _whole(data_set, keyword, "")
    items = data_set[keyword].value if keyword in data_set else ()
    if items and not isinstance(items, DicomSequence):
        raise CommitmentError(f"{keyword} is no sequence", _WHERE, "send the instances as its items")
    if len(items or ()) > MAXIMUM_REFERENCES:
        raise _too_much(f"{len(items)} instances, and more than {MAXIMUM_REFERENCES} are not looked up")
    return [
        (Reference(_uid(item, "ReferencedSOPClassUID", place), _uid(item, "ReferencedSOPInstanceUID", place)), item)
        for place, item in ((f" of item {number}", item) for number, item in enumerate(items or (), start=1))
    ]


def _whole(data_set: Dataset, keyword: str, place: str) -> Any:
    """The element as it was read, None if absent. pydicom hands out a value that is cut off without a word."""
    tag = tag_for_keyword(keyword)
    assert tag is not None
    element = data_set.get_item(tag) if tag in data_set else None
    if (
        isinstance(element, RawDataElement)
        and isinstance(element.value, bytes)
        and element.length not in (len(element.value), 0xFFFFFFFF)
    ):
        raise CommitmentError(f"{keyword}{place} is cut off", _WHERE, "send it whole")
    return element


def _uid(data_set: Dataset, keyword: str, place: str) -> str:
    element = _whole(data_set, keyword, place)
    value = None if element is None else element.value
    text = value.decode("ascii", errors="replace") if isinstance(value, bytes) else str(value or "")
    text = text.strip(" \0")
    if not text:
        raise CommitmentError(f"{keyword}{place} is missing", _WHERE, "send it as PS3.4 J.3.2.1 says")
    if not is_uid(text):
        shown = text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
        raise CommitmentError(f"{keyword}{place} is no UID: {shown!r}", _WHERE, "send a UID (PS3.5 9.1)")
    return text


def encode_report(report: CommitmentReport, transfer_syntax_uid: str) -> bytes:
    """The Event Information of an N-EVENT-REPORT (PS3.4 J.3.3.1), an even number of bytes.

    Raises:
        CommitmentError: a transfer syntax that is not one of `TRANSFER_SYNTAXES`.
    """
    if transfer_syntax_uid not in TRANSFER_SYNTAXES:
        raise CommitmentError(f"no report is written in {UID(transfer_syntax_uid).name}", "storage commitment report")
    stream = DicomBytesIO()
    stream.is_implicit_VR = transfer_syntax_uid == ImplicitVRLittleEndian
    stream.is_little_endian = transfer_syntax_uid != ExplicitVRBigEndian
    write_dataset(stream, _data_set(report))
    return stream.getvalue()


def _data_set(report: CommitmentReport) -> Dataset:
    data_set = Dataset()
    data_set.TransactionUID = report.transaction_uid
    if report.committed:
        data_set.ReferencedSOPSequence = reference_items(report.committed)
    if report.failed:
        items = reference_items(failure.reference for failure in report.failed)
        for item, failure in zip(items, report.failed, strict=True):
            item.FailureReason = failure.reason
        data_set.FailedSOPSequence = items
    return data_set


def reference_items(references: Iterable[Reference]) -> Sequence[Dataset]:
    """Items of a Referenced SOP Sequence (PS3.3 10.8)."""
    items = []
    for reference in references:
        item = Dataset()
        item.ReferencedSOPClassUID = reference.sop_class_uid
        item.ReferencedSOPInstanceUID = reference.sop_instance_uid
        items.append(item)
    return items


def send_report(peer: Peer, our_ae: str, report: CommitmentReport, *, timeout: float = 30.0) -> int:
    """Send a result over a new association that we request, as its SCP (PS3.4 J.3.3; PS3.7 D.3.3.4).

    We propose the SCP role for ourselves. A peer that accepts the presentation context and says nothing of roles gets
    the report all the same: many devices that expect it leave that item out.

    Args:
        timeout: seconds for each step: connection, association, answer.

    Returns:
        the DIMSE status of the peer's answer (PS3.7 10.1.1.1.8).

    Raises:
        PeerError: no association, or no answer.
    """
    contexts = {(PUSH_MODEL, syntax) for syntax in TRANSFER_SYNTAXES[:2]}
    roles = [build_role(PUSH_MODEL, scp_role=True)]
    with association_with(peer, our_ae, contexts, timeout, roles=roles) as association:
        try:
            answer, _ = association.send_n_event_report(
                _data_set(report), report.event_type_id, PUSH_MODEL, PUSH_MODEL_INSTANCE
            )
        except RuntimeError as error:  # the association has ended
            raise PeerError("it ended the association before the report was sent", str(peer), "see its log") from error
        except ValueError as error:
            raise PeerError(f"it cannot be told ({error})", str(peer), "see what it is set to accept") from error
        status = answer.get("Status")
        if status is None:
            raise PeerError(f"it did not answer N-EVENT-REPORT within {timeout:g} s", str(peer), "see its log")
        return int(status)
