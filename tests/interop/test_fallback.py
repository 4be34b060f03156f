"""What becomes of findings at archives that do not take everything: DCMTK with a profile, and Orthanc.

The service is the real one; the archive refuses in the negotiation, and what is left there is read again.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

from appliance import init
from appliance.checks import run_checks
from appliance.delivery.dicom import store
from appliance.delivery.dicomweb import store_web
from appliance.demo import orthanc as peers
from appliance.ledger.views import event_counts, study_report
from appliance.operations.leash import Leashed
from appliance.settings import DicomDestination, Settings
from dicom_io.errors import PeerError
from dicom_io.scu import Peer, echo
from dicom_io.transcode import transcoded
from dicom_io.web import Archive
from tests.appliance.test_issuing import Issued, seen
from tests.findings_support import dciodvfy_errors, written_objects
from tests.interop.box import wait_for
from tests.peers import program

pytestmark = [pytest.mark.interop, pytest.mark.timeout(300)]

PICTURES = ("capture.summary", "capture.1", "capture.2")
PROFILE = """
[[TransferSyntaxes]]
[Plain]
TransferSyntax1 = LocalEndianExplicit
TransferSyntax2 = LittleEndianImplicit
[[PresentationContexts]]
[Taken]
{contexts}
[[Profiles]]
[Default]
PresentationContexts = Taken
"""


@contextmanager
def storescp(folder: Path, options: Sequence[str] = (), classes: Sequence[str] = ()) -> Iterator[tuple[Peer, Path]]:
    """DCMTK's archive, and the folder that it keeps files in.

    Args:
        classes: the only SOP classes that it accepts, as DCMTK names them.
    """
    kept, port = folder / "kept", peers.free_port()
    kept.mkdir()
    if classes:
        profile = folder / "profile.cfg"
        lines = [
            f"PresentationContext{n} = {one}\\Plain" for n, one in enumerate(("VerificationSOPClass", *classes), 1)
        ]
        profile.write_text(PROFILE.format(contexts="\n".join(lines)))
        options = ["-xf", str(profile), "Default"]
    process = Leashed([program("storescp"), *options, "-od", kept, str(port)], log=folder / "storescp.log", grace=2.0)
    peer = Peer("PACS", peers.LOOPBACK, port)

    def answers() -> bool | None:
        try:
            echo(peer, "SCANSIDE", timeout=5)
        except PeerError:
            return None
        return True

    try:
        wait_for(answers, 30.0, lambda: process.tail(10))
        yield peer, kept
    finally:
        process.stop()


def kept_of(folder: Path) -> list[pydicom.Dataset]:
    return [pydicom.dcmread(path) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize(
    ("classes", "states", "kept"),
    [
        (
            ["ComprehensiveSRStorage", "SecondaryCaptureImageStorage"],
            {"report": "replaced", "report.2d": "acknowledged", "segmentation": "rejected"},
            ["ComprehensiveSRStorage"],
        ),
        (
            ["SecondaryCaptureImageStorage"],
            {"report": "replaced", "report.2d": "replaced", "segmentation": "rejected"},
            [],
        ),
    ],
    ids=["no 3D SR", "captures only"],
)
def test_an_archive_that_refuses_classes_gets_what_it_can_show(
    classes: list[str], states: dict[str, str], kept: list[str], tmp_path: Path
) -> None:
    with storescp(tmp_path, classes=classes) as (peer, folder):
        destination = {"kind": "dicom", "name": "pacs", "ae_title": peer.ae_title, "host": peer.host,
                       "port": peer.port, "objects": ["report", "segmentation", "capture"]}  # fmt: skip
        sections = {"intake": {"reserve_percent": 0.0, "reserve_bytes": 0}}
        config = init.write(tmp_path / "box", sections, [destination])
        issued = Issued(tmp_path / "box", pacs=["report", "segmentation", "capture"])
        issued.issue(seen(issued))
        command = [sys.executable, "-m", "appliance.cli", "--config", config, "deliver"]
        deliver = Leashed(command, log=tmp_path / "deliver.log", grace=10.0)
        wanted = {**states, **dict.fromkeys(PICTURES, "acknowledged")}

        def settled() -> dict[str, tuple[str, str]] | None:
            found = issued.states("pacs")
            return found if {name: state for name, (state, _) in found.items()} == wanted else None

        try:
            found = wait_for(settled, 90.0, lambda: f"{issued.states('pacs')}\n{deliver.tail(30)}")
        finally:
            deliver.stop()
    assert "Comprehensive 3D SR Storage" in found["report"][1]
    assert "Segmentation Storage" in found["segmentation"][1]
    held = kept_of(folder)
    assert sorted(one.SOPClassUID.keyword for one in held) == sorted([*kept, *3 * ["SecondaryCaptureImageStorage"]])
    uids = {one["object"]: one["uid"] for one in study_report(issued.box.ledger, 1)["deliveries"]}
    expected = {uid for name, uid in uids.items() if wanted[name] == "acknowledged"}
    assert {str(one.SOPInstanceUID) for one in held} == expected
    counts = event_counts(issued.box.ledger)
    assert counts["delivery.replaced"] == list(states.values()).count("replaced")
    assert counts["delivery.rejected"] == 1
    said = (tmp_path / "deliver.log").read_text()
    assert "goes there instead" in said and "segmentation to pacs: not taken there" in said
    issued.box.ledger.close()


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ([], "takes report as Comprehensive 3D SR Storage, segmentation as Segmentation Storage"),
        (
            ["ComprehensiveSRStorage", "SecondaryCaptureImageStorage"],
            "takes report as Comprehensive SR Storage; it does NOT accept segmentation",
        ),
        (
            ["SecondaryCaptureImageStorage"],
            "takes report as Secondary Capture Image Storage; it does NOT accept segmentation",
        ),
        (["CTImageStorage"], "it accepts none of report, segmentation"),
    ],
    ids=["everything", "no 3D SR", "captures only", "nothing of ours"],
)
def test_the_check_says_beforehand_what_an_archive_takes(classes: list[str], said: str, tmp_path: Path) -> None:
    with storescp(tmp_path, classes=classes) as (peer, _):
        destination = DicomDestination(
            kind="dicom", name="pacs", ae_title=peer.ae_title, host=peer.host, port=peer.port,
            objects=["report", "segmentation"],
        )  # fmt: skip
        settings = Settings(box={"state_directory": tmp_path / "box"}, destination=[destination])  # type: ignore[arg-type]
        (check,) = [one for one in run_checks(settings) if one.check == "destination pacs"]
    assert check.ok == ("none" not in said)
    assert said in check.detail


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Object → its file, as it lies on the box."""
    return written_objects(tmp_path_factory.mktemp("objects"))


WANTED = tuple(map(str, (JPEG2000Lossless, RLELossless, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian)))


@pytest.mark.parametrize(
    ("option", "syntaxes"),
    [
        ("+xv", {"capture.1": JPEG2000Lossless, "segmentation": JPEG2000Lossless, "report": ExplicitVRLittleEndian}),
        ("+xr", {"capture.1": RLELossless, "segmentation": ExplicitVRLittleEndian, "report": ExplicitVRLittleEndian}),
        ("+xd", dict.fromkeys(("capture.1", "segmentation", "report"), DeflatedExplicitVRLittleEndian)),
        ("+xi", dict.fromkeys(("capture.1", "segmentation", "report"), ImplicitVRLittleEndian)),
        ("+xa", {"capture.1": JPEG2000Lossless, "report": DeflatedExplicitVRLittleEndian}),
    ],
)
def test_an_object_goes_in_the_first_syntax_that_it_can_have_and_that_is_accepted(
    option: str, syntaxes: dict[str, UID], objects: dict[str, Path], tmp_path: Path
) -> None:
    with storescp(tmp_path, [option]) as (peer, folder):
        for name, syntax in syntaxes.items():
            outcome, said = store(objects[name], peer, "SCANSIDE", syntaxes=WANTED)
            assert outcome == "acknowledge"
            assert (said == "") == (syntax == next(one for one in WANTED if possible(name, one)))
            assert not said or f"in {syntax.name}" in said
            (path,) = folder.iterdir()
            there, ours = pydicom.dcmread(path), pydicom.dcmread(objects[name])
            assert there.file_meta.TransferSyntaxUID == syntax
            assert there.SOPInstanceUID == ours.SOPInstanceUID
            if "PixelData" in ours:
                np.testing.assert_array_equal(there.pixel_array, ours.pixel_array)
                del there.PixelData, ours.PixelData
                if syntax == JPEG2000Lossless and name == "capture.1":
                    assert there.PhotometricInterpretation == "YBR_RCT"
                    there.PhotometricInterpretation = ours.PhotometricInterpretation
            assert there == ours
            path.unlink()


def possible(name: str, syntax: str) -> bool:
    if name.startswith("capture"):
        return True
    return syntax not in (RLELossless, JPEG2000Lossless) or (name == "segmentation" and syntax == JPEG2000Lossless)


def test_what_was_compressed_is_read_by_others(objects: dict[str, Path], tmp_path: Path) -> None:
    """DCMTK for run lengths, GDCM for JPEG 2000, highdicom for the segmentation's, the validator for all."""
    run_lengths, wavelets, marks = tmp_path / "rle.object", tmp_path / "j2k.object", tmp_path / "marks.object"
    transcoded(objects["capture.1"], run_lengths, RLELossless)
    transcoded(objects["capture.1"], wavelets, JPEG2000Lossless)
    transcoded(objects["segmentation"], marks, JPEG2000Lossless)
    for path in (run_lengths, wavelets, marks):
        assert dciodvfy_errors(path) == []
    raw = tmp_path / "raw"
    expected = pydicom.dcmread(objects["capture.1"]).pixel_array
    for command in (["dcmdrle", run_lengths, raw], ["gdcmconv", "--raw", wavelets, raw]):
        subprocess.run([program(str(command[0])), *map(str, command[1:])], check=True, capture_output=True, timeout=60)
        np.testing.assert_array_equal(pydicom.dcmread(raw).pixel_array, expected)
    seg, again = hd.seg.segread(objects["segmentation"]), hd.seg.segread(marks)
    np.testing.assert_array_equal(
        again.get_total_pixel_matrix() if seg.is_tiled else again.pixel_array, seg.pixel_array
    )
    subprocess.run([program("gdcmconv"), "--raw", str(marks), str(raw)], check=True, capture_output=True, timeout=60)
    np.testing.assert_array_equal(pydicom.dcmread(raw).pixel_array > 0, seg.pixel_array > 0)


def test_orthanc_takes_compressed_objects_or_only_what_it_is_set_to(
    objects: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = peers.find_orthanc()
    if found is None:
        pytest.skip("Orthanc is not installed")
    set_to: dict[str, Any] = {}
    plain = peers.configuration
    monkeypatch.setattr(peers, "configuration", lambda *a, **k: {**plain(*a, **k), **set_to})
    box = {"scanside": Peer("SCANSIDE", peers.LOOPBACK, 11112)}
    for accepted, expected in (
        (None, {"capture.1": JPEG2000Lossless, "segmentation": JPEG2000Lossless}),
        ([str(ImplicitVRLittleEndian)], {"capture.1": ImplicitVRLittleEndian, "segmentation": ImplicitVRLittleEndian}),
    ):
        set_to.update({"AcceptedTransferSyntaxes": accepted} if accepted else {})
        orthanc = peers.start_orthanc(found, tmp_path / f"orthanc{len(set_to)}", box)
        try:
            peer = Peer(orthanc.ae_title, orthanc.host, orthanc.port)
            for name in expected:
                outcome, said = store(objects[name], peer, "SCANSIDE", syntaxes=WANTED)
                assert outcome == "acknowledge"
                assert ("Implicit VR Little Endian" in said) == bool(accepted)
            for one in orthanc.instances(str(pydicom.dcmread(objects["report"]).StudyInstanceUID)):
                (tmp_path / "kept").write_bytes(orthanc.file(one.orthanc_id))
                there = pydicom.dcmread(tmp_path / "kept")
                name = "segmentation" if one.modality == "SEG" else "capture.1"
                assert there.file_meta.TransferSyntaxUID == expected[name]
                np.testing.assert_array_equal(there.pixel_array, pydicom.dcmread(objects[name]).pixel_array)
            if accepted is None and any(path.is_file() for path in peers.DICOMWEB):
                uid = str(pydicom.dcmread(objects["report"]).SOPInstanceUID)
                wanted = [str(DeflatedExplicitVRLittleEndian)]
                archive = Archive(f"{orthanc.url}/dicom-web")
                assert store_web(objects["report"], uid, archive, wanted)[0] == "acknowledge"
                assert uid in orthanc.instance_uids()
        finally:
            orthanc.stop()
