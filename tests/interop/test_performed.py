"""A scanner that says what it performed (pynetdicom), and a box that takes its word, also after kill -9."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, generate_uid
from pynetdicom import AE

from appliance.demo.hospital import SCANNER_AE
from appliance.ledger.performed import Said
from appliance.ledger.views import find_study, verify_events
from dicom_io.header import Header, read_header
from dicom_io.scu import Peer, send
from dicom_io.sop_classes import AVAILABILITY, PERFORMED_STEP
from tests.interop.box import Box, study
from tests.interop.test_commitment import intake

pytestmark = [pytest.mark.interop, pytest.mark.xdist_group("box")]

SCANNER_SAID = "the scanner said that it is done, and all of it is here"


class Scanner:
    """A modality with one association for its images and its steps."""

    def __init__(self, association: Any) -> None:
        self._association = association

    def store(self, files: list[Path]) -> None:
        for path in files:
            assert self._association.send_c_store(pydicom.dcmread(path)).Status == 0x0000

    def begin(self, step: str, study_uid: str) -> int:
        data_set, scheduled = Dataset(), Dataset()
        scheduled.StudyInstanceUID, scheduled.AccessionNumber = study_uid, ""
        data_set.ScheduledStepAttributesSequence = [scheduled]
        data_set.PatientName, data_set.Modality, data_set.PerformedProcedureStepID = "Nobody", "CT", "1"
        data_set.PerformedProcedureStepStatus = "IN PROGRESS"
        data_set.PerformedSeriesSequence = []
        status, _ = self._association.send_n_create(data_set, PERFORMED_STEP, step)
        return int(status.Status)

    def end(self, step: str, headers: list[Header], status: str = "COMPLETED") -> Dataset:
        """The status that is answered, with what goes with it."""
        data_set, series = Dataset(), Dataset()
        series.SeriesInstanceUID = headers[0].series_instance_uid
        series.ReferencedImageSequence = [reference(one) for one in headers]
        series.ReferencedNonImageCompositeSOPInstanceSequence = []
        data_set.PerformedProcedureStepStatus = status
        data_set.PerformedSeriesSequence = [series]
        answer, _ = self._association.send_n_set(data_set, PERFORMED_STEP, step)
        assert isinstance(answer, Dataset)
        return answer

    def announce(self, uid: str, headers: list[Header]) -> int:
        data_set, series = Dataset(), Dataset()
        series.SeriesInstanceUID = headers[0].series_instance_uid
        series.ReferencedSOPSequence = [reference(one) for one in headers]
        for one in series.ReferencedSOPSequence:
            one.InstanceAvailability, one.RetrieveAETitle = "ONLINE", "PACS"
        data_set.StudyInstanceUID = headers[0].study_instance_uid
        data_set.ReferencedPerformedProcedureStepSequence = []
        data_set.ReferencedSeriesSequence = [series]
        status, _ = self._association.send_n_create(data_set, AVAILABILITY, uid)
        return int(status.Status)


def reference(header: Header) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = header.sop_class_uid, header.sop_instance_uid
    return item


@contextmanager
def scanner(peer: Peer) -> Iterator[Scanner]:
    """Connected to the box; released at the end."""
    ae = AE(ae_title=SCANNER_AE)
    for sop_class in (PERFORMED_STEP, AVAILABILITY, CTImageStorage):
        ae.add_requested_context(sop_class)
    association = ae.associate(peer.host, peer.port, ae_title=peer.ae_title)
    assert association.is_established
    try:
        yield Scanner(association)
    finally:
        association.release()


@pytest.mark.parametrize("order", ["images first", "word first"])
def test_a_study_is_analysed_while_its_association_stays_open(box: Box, tmp_path: Path, order: str) -> None:
    uid, files = study(tmp_path, "intraparenchymal", f"MPPS {order[:5]}".upper().strip())
    headers, step = [read_header(path) for path in files], generate_uid(None)
    with scanner(box.peer) as one:
        assert one.begin(step, uid) == 0x0000
        one.store(files[:-1] if order == "word first" else files)
        assert one.end(step, headers).Status == 0x0000
        if order == "word first":
            one.store(files[-1:])
        report = box.settled(uid)
        assert report["evidence"]["associations"] == ["open"]
    assert report["evidence"]["by"] == SCANNER_SAID
    assert report["evidence"]["performed"] == {"completed": 1, "named": len(files), "missing": 0}
    assert report["verdicts"][-1]["positive"]
    assert len(box.messages(uid)) == 1
    assert "step.completed" in [event["name"] for event in report["events"]]


def test_an_announcement_is_a_word_too(box: Box, tmp_path: Path) -> None:
    uid, files = study(tmp_path, None, "ANNOUNCED1")
    with scanner(box.peer) as one:
        assert one.announce(generate_uid(None), [read_header(path) for path in files]) == 0x0000
        one.store(files)
        report = box.settled(uid)
    assert report["evidence"]["by"] == "an archive announced the study, and all of it is here"


def test_an_image_that_was_named_and_is_missing_is_waited_for(box: Box, tmp_path: Path) -> None:
    uid, files = study(tmp_path, None, "MISSING1")
    headers, step = [read_header(path) for path in files], generate_uid(None)
    with scanner(box.peer) as one:
        assert one.begin(step, uid) == 0x0000
        assert one.end(step, headers).Status == 0x0000
        one.store(files[:-1])
    report = box.settled(uid)
    assert report["evidence"]["by"] == "nothing came for 5 s"
    assert report["evidence"]["performed"] == {"completed": 1, "named": len(files), "missing": 1}


def test_what_was_said_survives_kill_9(tmp_path: Path) -> None:
    _, files = study(tmp_path, None, "KILLED1")
    headers, steps = [read_header(path) for path in files], [generate_uid(None) for _ in range(2)]
    uid = headers[0].study_instance_uid
    named = {headers[0].series_instance_uid: frozenset(one.sop_instance_uid for one in headers)}
    with intake(tmp_path) as box:
        with scanner(box.peer) as one:
            assert [one.begin(step, uid) for step in steps] == [0x0000, 0x0000]
            assert one.end(steps[0], headers).Status == 0x0000
            box.kill()
        box.start()
        with scanner(box.peer) as one:
            assert one.begin(steps[0], uid) == 0x0111
            answer = one.end(steps[0], headers)
            assert (answer.Status, answer.ErrorID) == (0x0110, 0xA710)
            assert answer.ErrorComment == "Performed Procedure Step Object may no longer be updated"
            assert one.end(generate_uid(None), headers).Status == 0x0112
            assert one.end(steps[1], headers, "DISCONTINUED").Status == 0x0000
        assert not [one for one in send(files[:1], box.peer, SCANNER_AE) if one.error]
        key = find_study(box.ledger, uid)
        assert key is not None
        assert box.ledger.said_of(key) == Said({"completed": 1, "discontinued": 1}, named)
        assert verify_events(box.ledger) is None
