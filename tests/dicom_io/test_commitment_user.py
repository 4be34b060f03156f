"""Asking for storage commitment: a peer that reports at once, later, not at all, or that offers none."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.dsutils import decode, encode
from pynetdicom.sop_class import Verification

from dicom_io.commitment import (
    PUSH_MODEL,
    PUSH_MODEL_INSTANCE,
    TRANSFER_SYNTAXES,
    CommitmentError,
    CommitmentReport,
    CommitmentRequest,
    Failure,
    Reference,
    decode_report,
    encode_report,
    send_report,
)
from dicom_io.commitment_user import ask
from dicom_io.errors import NotAccepted, PeerError
from dicom_io.scu import Peer
from tests.dicom_io.support import Recorder, serving

FIRST, SECOND = Reference("1.2.840.10008.5.1.4.1.1.7", "1.2.3.1"), Reference("1.2.840.10008.5.1.4.1.1.66.4", "1.2.3.2")
REQUEST = CommitmentRequest("2.25.77", (FIRST, SECOND))
ALL = CommitmentReport("2.25.77", (FIRST, SECOND), ())
SOME = CommitmentReport("2.25.77", (FIRST,), (Failure(SECOND, 0x0112),))


class Archive:
    """A PACS that offers storage commitment, on pynetdicom.

    Args:
        reports: told on the association that asks, one after another, that long after the answer.
    """

    def __init__(self, reports: tuple[bytes, ...] = (), *, status: int = 0x0000, seconds: float = 0.1) -> None:
        self.asked: list[tuple[int, str, Dataset]] = []
        self.answers: list[int | None] = []
        self._reports, self._status, self._seconds = reports, status, seconds
        ae = AE(ae_title="PACS")
        ae.add_supported_context(PUSH_MODEL, ExplicitVRLittleEndian, scu_role=True, scp_role=True)
        self._server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_N_ACTION, self._on_ask)])
        self.peer = Peer("PACS", "127.0.0.1", self._server.server_address[1])

    def _on_ask(self, event: Any) -> tuple[int, None]:
        self.asked.append((event.action_type, str(event.request.RequestedSOPInstanceUID), event.action_information))
        threading.Thread(target=self._report, args=(event.assoc,), daemon=True).start()
        return self._status, None

    def _report(self, association: Any) -> None:
        for content in self._reports:
            time.sleep(self._seconds)
            data_set = pydicom_of(content)
            answer, _ = association.send_n_event_report(data_set, 1, PUSH_MODEL, PUSH_MODEL_INSTANCE)
            self.answers.append(answer.get("Status"))

    def stop(self) -> None:
        for association in self._server.active_associations:
            association.abort(block=False)
        self._server.shutdown()


def pydicom_of(content: bytes) -> Dataset:
    return decode(BytesIO(content), False, True)


@contextmanager
def archive(*reports: CommitmentReport, **options: Any) -> Iterator[Archive]:
    one = Archive(tuple(encode_report(report, ExplicitVRLittleEndian) for report in reports), **options)
    try:
        yield one
    finally:
        one.stop()


@pytest.mark.parametrize("report", [ALL, SOME], ids=["all", "some"])
def test_a_report_on_the_same_association(report: CommitmentReport) -> None:
    with archive(report) as pacs:
        assert ask(pacs.peer, "SCANSIDE", REQUEST, timeout=10, wait_seconds=10) == report
    ((action, instance, information),) = pacs.asked
    assert (action, instance, information.TransactionUID) == (1, PUSH_MODEL_INSTANCE, "2.25.77")
    named = [(one.ReferencedSOPClassUID, one.ReferencedSOPInstanceUID) for one in information.ReferencedSOPSequence]
    assert named == [(one.sop_class_uid, one.sop_instance_uid) for one in REQUEST.references]


def test_a_report_of_another_transaction_is_refused_and_waited_past() -> None:
    with archive(CommitmentReport("2.25.78", (FIRST,), ()), ALL) as pacs:
        assert ask(pacs.peer, "SCANSIDE", REQUEST, timeout=10, wait_seconds=10) == ALL
        deadline = time.monotonic() + 5
        while len(pacs.answers) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
    assert pacs.answers[0] == 0x0115


def test_what_comes_later_is_not_waited_for() -> None:
    with archive() as pacs:
        assert ask(pacs.peer, "SCANSIDE", REQUEST, timeout=10, wait_seconds=0.2) is None


def test_what_came_another_way_is_not_waited_for() -> None:
    came = iter([False, True])
    with archive() as pacs:
        assert ask(pacs.peer, "SCANSIDE", REQUEST, timeout=10, wait_seconds=60, arrived=lambda: next(came)) is None


def test_a_refusal_is_an_error() -> None:
    with archive(status=0x0213) as pacs, pytest.raises(PeerError, match="refused storage commitment with 0x0213"):
        ask(pacs.peer, "SCANSIDE", REQUEST, timeout=10, wait_seconds=0.2)


def test_a_peer_that_offers_none_says_so() -> None:
    ae = AE(ae_title="PACS")
    ae.add_supported_context(Verification)
    server = ae.start_server(("127.0.0.1", 0), block=False)
    try:
        with pytest.raises(NotAccepted):
            ask(Peer("PACS", "127.0.0.1", server.server_address[1]), "SCANSIDE", REQUEST, timeout=10)
    finally:
        server.shutdown()


@pytest.mark.parametrize("report", [ALL, SOME], ids=["all", "some"])
def test_a_report_comes_to_our_provider(report: CommitmentReport) -> None:
    """On an association that the PACS opens, as most do."""
    recorder = Recorder()
    with serving(recorder) as server:
        assert send_report(Peer("SCANSIDE", "127.0.0.1", server.port), "PACS", report, timeout=10) == 0x0000
    assert recorder.committed_calls == [report]


def test_a_report_that_our_provider_does_not_know_is_answered_so() -> None:
    with serving(Recorder(status=0x0115)) as server:
        assert send_report(Peer("SCANSIDE", "127.0.0.1", server.port), "PACS", ALL, timeout=10) == 0x0115


@pytest.mark.parametrize("syntax", TRANSFER_SYNTAXES)
@pytest.mark.parametrize("report", [ALL, SOME, CommitmentReport("1.2", (), (Failure(FIRST, 0x0110),))])
def test_a_report_is_read_as_it_was_written(report: CommitmentReport, syntax: str) -> None:
    assert decode_report(encode_report(report, syntax), syntax) == report


@given(data=st.binary(max_size=300), syntax=st.sampled_from(TRANSFER_SYNTAXES))
def test_any_bytes_make_a_report_or_one_error(data: bytes, syntax: str) -> None:
    try:
        assert decode_report(data, syntax).transaction_uid
    except CommitmentError as error:
        assert error.what


@given(cut=st.integers(1, 400), syntax=st.sampled_from((ExplicitVRLittleEndian, ImplicitVRLittleEndian)))
def test_a_report_that_is_cut_off_commits_to_nothing_more(cut: int, syntax: str) -> None:
    whole = encode_report(SOME, syntax)
    try:
        found = decode_report(whole[: max(0, len(whole) - cut)], syntax)
    except CommitmentError:
        return
    assert set(found.committed) <= set(SOME.committed)


def test_a_failure_without_a_reason_is_an_error() -> None:
    data_set = pydicom_of(encode_report(SOME, ExplicitVRLittleEndian))
    del data_set.FailedSOPSequence[0].FailureReason
    with pytest.raises(CommitmentError, match="Failure Reason"):
        decode_report(encode(data_set, False, True) or b"", ExplicitVRLittleEndian)
