"""Requests and reports of storage commitment against pydicom, hostile bytes, and peers that take a report or do not."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
)
from pynetdicom import AE, evt
from pynetdicom.sop_class import Verification

from appliance.demo.orthanc import find_orthanc, start_orthanc
from dicom_io.commitment import (
    ALL_COMMITTED,
    FAILURES_EXIST,
    MAXIMUM_REFERENCES,
    MAXIMUM_REQUEST_BYTES,
    PUSH_MODEL,
    PUSH_MODEL_INSTANCE,
    TRANSFER_SYNTAXES,
    CommitmentError,
    CommitmentReport,
    CommitmentRequest,
    Failure,
    Reference,
    decode_request,
    encode_report,
    send_report,
)
from dicom_io.errors import PeerError
from dicom_io.scu import Peer, send

SYNTAXES = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian)
FIRST, SECOND = Reference(CTImageStorage, "1.2.3.1"), Reference(CTImageStorage, "1.2.3.2")

uids = st.lists(st.integers(0, 10**12), min_size=2, max_size=4).map(lambda parts: "1." + ".".join(map(str, parts)))
references = st.builds(Reference, uids, uids)


def encode(data_set: Dataset, syntax: str = ExplicitVRLittleEndian) -> bytes:
    stream = DicomBytesIO()
    stream.is_implicit_VR = syntax == ImplicitVRLittleEndian
    stream.is_little_endian = syntax != ExplicitVRBigEndian
    write_dataset(stream, data_set)
    return stream.getvalue()


def decode(data: bytes, syntax: str) -> Dataset:
    return read_dataset(BytesIO(data), syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian)


def asking(*items: Reference, transaction: str | None = "1.2.3.9") -> Dataset:
    data_set = Dataset()
    if transaction is not None:
        data_set.TransactionUID = transaction
    data_set.ReferencedSOPSequence = [named(item) for item in items]
    return data_set


def named(reference: Reference) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = reference.sop_class_uid, reference.sop_instance_uid
    return item


# --- requests -------------------------------------------------------------------------------------------------


@given(
    asked=st.lists(references, min_size=1, max_size=8, unique_by=lambda one: one.sop_instance_uid),
    transaction=uids,
    syntax=st.sampled_from(SYNTAXES),
    undefined=st.booleans(),
)
def test_a_request_is_what_pydicom_wrote(
    asked: list[Reference], transaction: str, syntax: str, undefined: bool
) -> None:
    data_set = asking(*asked, transaction=transaction)
    data_set["ReferencedSOPSequence"].is_undefined_length = undefined
    for item in data_set.ReferencedSOPSequence:
        item.is_undefined_length_sequence_item = undefined
    assert decode_request(encode(data_set, syntax), syntax) == CommitmentRequest(transaction, tuple(asked))


def test_what_else_a_request_holds_is_passed_over() -> None:
    data_set = asking(FIRST)
    data_set.StorageMediaFileSetUID, data_set.RetrieveAETitle = "1.2.3.5", "SOMEBODY"
    data_set.ReferencedSOPSequence[0].PurposeOfReferenceCodeSequence = [Dataset()]
    assert decode_request(encode(data_set), ExplicitVRLittleEndian).references == (FIRST,)


@pytest.mark.parametrize(
    ("data_set", "complaint"),
    [
        (asking(FIRST, transaction=None), "TransactionUID is missing"),
        (asking(FIRST, transaction=""), "TransactionUID is missing"),
        (asking(FIRST, transaction="hello"), "TransactionUID is no UID: 'hello'"),
        (asking(), "it names no instance"),
        (asking(FIRST, Reference(CTImageStorage, "")), "ReferencedSOPInstanceUID of item 2 is missing"),
        (asking(Reference("1.2.x", "1.2.3")), "ReferencedSOPClassUID of item 1 is no UID: '1.2.x'"),
        (asking(FIRST, SECOND, FIRST), "it names 1.2.3.1 more than once"),
        (asking(FIRST, SECOND, FIRST, SECOND), "it names 1.2.3.1 and 1 more more than once"),
        (Dataset(), "TransactionUID is missing"),
    ],
)
def test_what_is_wrong_with_a_request_is_named(data_set: Dataset, complaint: str) -> None:
    with pytest.raises(CommitmentError, match=complaint) as error:
        decode_request(encode(data_set), ExplicitVRLittleEndian)
    assert error.value.status == 0x0115
    assert error.value.where and error.value.remedy


def test_a_sequence_that_is_none_is_named() -> None:
    # (0008,1195) and then (0008,1199) with the VR of a number
    data = encode(asking(FIRST))[:16] + b"\x08\x00\x99\x11US\x02\x00\x07\x00"
    assert data[:8] == b"\x08\x00\x95\x11UI\x08\x00"
    with pytest.raises(CommitmentError, match="is no sequence"):
        decode_request(data, ExplicitVRLittleEndian)


@pytest.mark.slow
def test_no_more_is_read_than_is_bounded() -> None:
    with pytest.raises(CommitmentError, match="bytes") as error:
        decode_request(bytes(MAXIMUM_REQUEST_BYTES + 1), ExplicitVRLittleEndian)
    assert error.value.status == 0x0213
    many = [Reference("1.2", f"1.2.{number}") for number in range(MAXIMUM_REFERENCES + 1)]
    data = encode(asking(*many))
    assert len(data) < MAXIMUM_REQUEST_BYTES
    with pytest.raises(CommitmentError, match=f"{MAXIMUM_REFERENCES + 1} instances") as error:
        decode_request(data, ExplicitVRLittleEndian)
    assert error.value.status == 0x0213
    assert len(decode_request(encode(asking(*many[1:])), ExplicitVRLittleEndian).references) == MAXIMUM_REFERENCES


def test_a_request_in_another_encoding_is_not_guessed_at() -> None:
    with pytest.raises(CommitmentError, match="JPEG 2000"):
        decode_request(encode(asking(FIRST)), JPEG2000Lossless)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_request_that_is_cut_off_is_never_a_shorter_one(syntax: str) -> None:
    whole = encode(asking(FIRST, SECOND), syntax)
    for length in range(len(whole)):
        with pytest.raises(CommitmentError):
            decode_request(whole[:length], syntax)


@given(data=st.binary(max_size=400), syntax=st.sampled_from(SYNTAXES))
def test_any_bytes_make_a_request_or_one_error(data: bytes, syntax: str) -> None:
    try:
        found = decode_request(data, syntax)
    except CommitmentError:
        return
    assert found.transaction_uid and found.references


@settings(max_examples=400)
@given(
    changes=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 255)), min_size=1, max_size=6),
    syntax=st.sampled_from(SYNTAXES),
)
def test_a_damaged_request_makes_a_request_of_uids_or_one_error(changes: list[tuple[int, int]], syntax: str) -> None:
    data = bytearray(encode(asking(FIRST, SECOND), syntax))
    for place, value in changes:
        data[place % len(data)] = value
    try:
        found = decode_request(data, syntax)
    except CommitmentError as error:
        assert str(error)
        return
    for uid in (found.transaction_uid, *(one.sop_instance_uid for one in found.references)):
        assert set(uid) <= set("0123456789.")


@pytest.mark.parametrize("depth", [30, 20_000])
def test_sequences_without_end_are_an_error(depth: int) -> None:
    nested = b"\x08\x00\x99\x11SQ\x00\x00\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * depth
    with pytest.raises(CommitmentError, match="nested too deeply" if depth > 1000 else None) as error:
        decode_request(encode(asking(FIRST))[:16] + nested, ExplicitVRLittleEndian)
    assert error.value.remedy


# --- reports --------------------------------------------------------------------------------------------------


@given(
    committed=st.lists(references, max_size=5),
    failed=st.lists(st.builds(Failure, references, st.sampled_from([0x0110, 0x0112, 0x0119])), max_size=5),
    transaction=uids,
    syntax=st.sampled_from(SYNTAXES),
)
def test_pydicom_reads_a_report_as_it_was_meant(
    committed: list[Reference], failed: list[Failure], transaction: str, syntax: str
) -> None:
    report = CommitmentReport(transaction, tuple(committed), tuple(failed))
    data = encode_report(report, syntax)
    read = decode(data, syntax)
    assert len(data) % 2 == 0
    assert read.TransactionUID == transaction
    assert [named(one) for one in committed] == list(read.get("ReferencedSOPSequence", []))
    assert [
        (one.ReferencedSOPClassUID, one.ReferencedSOPInstanceUID, one.FailureReason)
        for one in read.get("FailedSOPSequence", [])
    ] == [(one.reference.sop_class_uid, one.reference.sop_instance_uid, one.reason) for one in failed]
    assert report.event_type_id == (FAILURES_EXIST if failed else ALL_COMMITTED)
    # Neither sequence is sent without an item: they are type 1C (PS3.4 table J.3-2).
    assert ("ReferencedSOPSequence" in read, "FailedSOPSequence" in read) == (bool(committed), bool(failed))


def test_a_report_is_written_in_no_other_encoding() -> None:
    with pytest.raises(CommitmentError):
        encode_report(CommitmentReport("1.2", (FIRST,), ()), JPEG2000Lossless)


# --- sending --------------------------------------------------------------------------------------------------

GOOD = CommitmentReport("1.2.3.9", (FIRST, SECOND), ())
MIXED = CommitmentReport("1.2.3.9", (FIRST,), (Failure(SECOND, 0x0112),))


class Listener:
    """A device that waits for reports, on pynetdicom."""

    def __init__(self, status: int = 0x0000, *, silent: bool = False, role: bool = True, syntax: str = "") -> None:
        self.heard: list[tuple[int, str, str, Dataset, str, tuple[Any, ...]]] = []
        self._status = status
        self._hang = threading.Event()
        self._silent = silent
        ae = AE(ae_title="SCANNER")
        roles = {"scu_role": False, "scp_role": True} if role else {}
        ae.add_supported_context(PUSH_MODEL, [syntax] if syntax else list(SYNTAXES), **roles)
        self._server = ae.start_server(
            ("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_N_EVENT_REPORT, self._on_report)]
        )
        self.peer = Peer("SCANNER", "127.0.0.1", self._server.server_address[1])

    def _on_report(self, event: Any) -> tuple[int, None]:
        proposed = tuple(
            (str(uid), item.scu_role, item.scp_role) for uid, item in event.assoc.requestor.role_selection.items()
        )
        self.heard.append(
            (
                event.event_type,
                str(event.request.AffectedSOPClassUID),
                str(event.request.AffectedSOPInstanceUID),
                event.event_information,
                str(event.assoc.requestor.ae_title).strip(),
                proposed,
            )
        )
        if self._silent:
            self._hang.wait(20)
        return self._status, None

    def stop(self) -> None:
        self._hang.set()
        for association in self._server.active_associations:
            association.abort(block=False)
        self._server.shutdown()


@contextmanager
def listening(status: int = 0x0000, **options: Any) -> Iterator[Listener]:
    one = Listener(status, **options)
    try:
        yield one
    finally:
        one.stop()


@pytest.mark.parametrize(("report", "event_type"), [(GOOD, 1), (MIXED, 2)])
def test_a_report_arrives_at_a_device(report: CommitmentReport, event_type: int) -> None:
    with listening() as device:
        assert send_report(device.peer, "SCANSIDE", report, timeout=10) == 0x0000
    ((heard_type, sop_class, sop_instance, data_set, calling, roles),) = device.heard
    assert (heard_type, sop_class, sop_instance, calling) == (event_type, PUSH_MODEL, PUSH_MODEL_INSTANCE, "SCANSIDE")
    assert roles == ((PUSH_MODEL, False, True),)
    assert data_set == decode(encode_report(report, ExplicitVRLittleEndian), ExplicitVRLittleEndian)


@pytest.mark.parametrize("syntax", TRANSFER_SYNTAXES[:2])
def test_a_device_may_choose_either_encoding(syntax: str) -> None:
    with listening(syntax=syntax) as device:
        assert send_report(device.peer, "SCANSIDE", MIXED, timeout=10) == 0x0000
    assert device.heard[0][3].FailedSOPSequence[0].FailureReason == 0x0112


def test_a_device_that_says_nothing_of_roles_is_told_all_the_same() -> None:
    with listening(role=False) as device:
        assert send_report(device.peer, "SCANSIDE", GOOD, timeout=10) == 0x0000
    assert len(device.heard) == 1


def test_a_device_that_refuses_the_report_says_so_by_its_status() -> None:
    with listening(0x0110) as device:
        assert send_report(device.peer, "SCANSIDE", GOOD, timeout=10) == 0x0110


def test_a_device_that_does_not_answer_is_not_waited_for_for_ever() -> None:
    with listening(silent=True) as device:
        began = time.monotonic()
        with pytest.raises(PeerError, match="did not answer N-EVENT-REPORT"):
            send_report(device.peer, "SCANSIDE", GOOD, timeout=1)
        assert len(device.heard) == 1
        assert time.monotonic() - began < 15  # and not the 20 s for which it hangs


def test_a_device_that_is_not_there_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = int(server.getsockname()[1])
    with pytest.raises(PeerError, match="cannot be reached"):
        send_report(Peer("SCANNER", "127.0.0.1", port), "SCANSIDE", GOOD, timeout=5)


def test_a_device_that_knows_no_storage_commitment_is_an_error() -> None:
    ae = AE(ae_title="SCANNER")
    ae.add_supported_context(Verification)
    server = ae.start_server(("127.0.0.1", 0), block=False)
    try:
        with pytest.raises(PeerError, match="accepts none of what was proposed"):
            send_report(Peer("SCANNER", "127.0.0.1", server.server_address[1]), "SCANSIDE", GOOD, timeout=5)
    finally:
        server.shutdown()


# --- Orthanc as the device ------------------------------------------------------------------------------------


class Provider:
    """Takes Orthanc's request and keeps it, on pynetdicom."""

    def __init__(self) -> None:
        self.asked: list[CommitmentRequest] = []
        ae = AE(ae_title="SCANSIDE")
        ae.add_supported_context(PUSH_MODEL)
        self._server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_N_ACTION, self._on_ask)])
        self.peer = Peer("SCANSIDE", "127.0.0.1", self._server.server_address[1])

    def _on_ask(self, event: Any) -> tuple[int, None]:
        syntax = str(event.context.transfer_syntax)
        self.asked.append(decode_request(event.request.ActionInformation.getvalue(), syntax))
        return 0x0000, None

    def stop(self) -> None:
        self._server.shutdown()


def ask(url: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
        urllib.request.Request(url, data=data), timeout=20
    ) as answer:
        return json.loads(answer.read())


@pytest.mark.interop
def test_orthanc_asks_and_believes_the_report(tmp_path: Path, ge_head: Path) -> None:
    program = find_orthanc()
    if program is None:
        pytest.skip("Orthanc is not installed")
    provider = Provider()
    sender = Peer("TEST", "127.0.0.1", 4)
    orthanc = start_orthanc(program, tmp_path / "orthanc", {"box": provider.peer, "test": sender})
    try:
        here = Peer(orthanc.ae_title, orthanc.host, orthanc.port)
        (sent,) = send([ge_head / "01.dcm"], here, "TEST")
        assert sent.status == 0
        kept = {"DicomInstances": [{"SOPClassUID": CTImageStorage, "SOPInstanceUID": sent.sop_instance_uid},
                                   {"SOPClassUID": CTImageStorage, "SOPInstanceUID": "1.2.3.4.5"}]}  # fmt: skip
        transaction = ask(f"{orthanc.url}/modalities/box/storage-commitment", kept)["ID"]
        (request,) = provider.asked
        assert request.transaction_uid == transaction
        there, absent = request.references
        assert there == Reference(CTImageStorage, sent.sop_instance_uid)
        report = CommitmentReport(transaction, (there,), (Failure(absent, 0x0112),))
        assert send_report(here, "SCANSIDE", report, timeout=10) == 0x0000
        known = ask(f"{orthanc.url}/storage-commitment/{transaction}")
        assert known["Status"] == "Failure"
        assert [one["SOPInstanceUID"] for one in known["Success"]] == [sent.sop_instance_uid]
        assert [(one["SOPInstanceUID"], one["FailureReason"]) for one in known["Failures"]] == [("1.2.3.4.5", 0x0112)]
        # and again, as after an answer that was lost: the same transaction, and Orthanc takes it
        assert send_report(here, "SCANSIDE", CommitmentReport(transaction, request.references, ()), timeout=10) == 0
        assert ask(f"{orthanc.url}/storage-commitment/{transaction}")["Status"] == "Success"
    finally:
        orthanc.stop()
        provider.stop()
