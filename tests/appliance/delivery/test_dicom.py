"""What a PACS answers to C-STORE, and what becomes of the delivery."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydicom.uid import SegmentationStorage

from appliance.delivery.dicom import store
from appliance.demo.orthanc import free_port
from dicom_io.errors import PeerError
from dicom_io.scu import Peer
from tests.dicom_io.support import Recorder, ct, head, save, serving


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (0x0000, "acknowledge"),
        (0xB000, "acknowledge"),
        (0x0111, "acknowledge"),
        (0xA700, "retry"),
        (0x0110, "retry"),
        (0x0213, "retry"),
        (0xA900, "reject"),
        (0xC000, "reject"),
        (0x0122, "reject"),
    ],
)
def test_each_status_has_its_outcome(tmp_path: Path, status: int, outcome: str) -> None:
    path = save(ct(head(12, False), 12), tmp_path / "finding.dcm")
    with serving(Recorder(status)) as server:
        found, said = store(path, Peer("SCANSIDE", "127.0.0.1", server.port), "SCANSIDE")
    assert found == outcome
    assert (said == "") == (status == 0)


def test_nobody_there_is_worth_another_try(tmp_path: Path) -> None:
    path = save(ct(head(12, False), 12), tmp_path / "finding.dcm")
    with pytest.raises(PeerError):
        store(path, Peer("SCANSIDE", "127.0.0.1", free_port()), "SCANSIDE")


def test_a_class_that_the_peer_does_not_take_is_final_and_says_so(tmp_path: Path) -> None:
    path = save(ct(head(12, False), 12, SOPClassUID=SegmentationStorage), tmp_path / "finding.dcm")
    with serving(Recorder()) as server:
        outcome, said = store(path, Peer("SCANSIDE", "127.0.0.1", server.port), "SCANSIDE")
    assert outcome == "reject"
    assert "accepts none of what was proposed (Segmentation Storage)" in said
