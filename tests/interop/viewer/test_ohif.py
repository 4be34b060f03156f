"""The findings in OHIF, a viewer that nobody here wrote: listed, drawn where the bleed is, opened on their slice.

The box stores them in Orthanc, pictures and segmentation compressed; the viewer reads them from its DICOMweb, in a
browser without a window. What is asked is
the page's own state and the pixels on its screen. Pictures are kept in the test's folder.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.uid import JPEG2000Lossless

from appliance.delivery.dicom import store
from appliance.demo.orthanc import DICOMWEB, Orthanc
from dicom_io.scu import Peer
from tests.interop.box import Box, head, study
from tests.peers import node_packages, npm_package, program

pytestmark = [pytest.mark.interop, pytest.mark.xdist_group("box"), pytest.mark.timeout(400)]

HERE = Path(__file__).resolve().parent
OHIF = "@ohif/app@3.13.2"
OHIF_INTEGRITY = "sha512-WZdxmpmG7rqFgW9ZJLcbgr3XCtLi1KDNPoMaeY5PPe6j4G4fjEjjkycZM6C6Zk2F87BKxFfpq+jd5xXZB9E8EA=="
BLEED = "intraparenchymal"


@dataclass(frozen=True)
class Seen:
    """What the viewer showed of a study.

    Attributes:
        page: what `look.cjs` tells.
        verdict: the newest, as the ledger has it.
        place: SOP Instance UID of an image → number of the simulator's slice.
    """

    page: dict[str, Any]
    verdict: dict[str, Any]
    place: dict[str, int]

    @property
    def key_slab(self) -> dict[str, Any]:
        one: dict[str, Any] = self.verdict["slabs"][self.verdict["key_slabs"][0]]
        return one


@pytest.fixture(scope="module")
def seen(box: Box, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("viewer")
    pacs = box.hospital.pacs
    assert isinstance(pacs, Orthanc)
    if not any(path.is_file() for path in DICOMWEB):
        pytest.skip("orthanc-dicomweb is not installed")
    browser, modules, ohif = program("chromium"), node_packages(HERE), npm_package(OHIF, OHIF_INTEGRITY)
    uid, files = study(folder, BLEED, "VIEWER1")
    scanner = [program("storescu"), "-aet", "SCANNER", "-aec", pacs.ae_title, pacs.host, str(pacs.port)]
    subprocess.run([*scanner, *map(str, files)], check=True, capture_output=True, timeout=60)
    box.send(files)
    report = box.settled(uid)
    compress(pacs, uid, folder / "again.dcm")
    command = ["node", HERE / "look.cjs", ohif / "dist", pacs.url, uid, browser, folder]
    done = subprocess.run([str(part) for part in command], cwd=modules, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    heights = np.array([position[2] for position in head(BLEED).positions])
    place = {}
    for path in files:
        source = pydicom.dcmread(path, stop_before_pixels=True)
        place[str(source.SOPInstanceUID)] = int(np.abs(heights - source.ImagePositionPatient[2]).argmin())
    return Seen(json.loads(done.stdout.splitlines()[-1]), report["verdicts"][-1]["result"], place)


def compress(pacs: Orthanc, study: str, path: Path) -> None:
    """Have pictures and segmentation in JPEG 2000, as a destination with such `transfer_syntaxes` gets them."""
    peer = Peer(pacs.ae_title, pacs.host, pacs.port)
    for one in pacs.instances(study):
        if one.modality in ("SEG", "OT"):
            path.write_bytes(pacs.file(one.orthanc_id))
            pacs._fetch(f"/instances/{one.orthanc_id}", method="DELETE")
            assert store(path, peer, "SCANSIDE", syntaxes=[JPEG2000Lossless]) == ("acknowledge", "")
            path.write_bytes(pacs.file(one.orthanc_id))
            assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == JPEG2000Lossless


def dice(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


def marked(seen: Seen) -> NDArray[np.bool_]:
    """The voxels that the viewer holds of the segmentation, on the simulator's grid."""
    mask = np.zeros(head(BLEED).mask.shape, bool)
    for uid, segments in seen.page["segmentation"]["slices"].items():
        for positions in segments.values():
            mask[seen.place[uid]].ravel()[positions] = True
    return mask


def test_the_viewer_lists_every_object_and_meets_no_error(seen: Seen) -> None:
    assert seen.page["errors"] == []
    listed = {one["modality"]: one for one in seen.page["series"]}
    assert set(listed) == {"CT", "SR", "SEG", "OT", "PR", "KO"}
    assert all(one["shown"] for one in listed.values())
    # What OHIF lists and does not open: presentation states and key objects.
    assert {name for name, one in listed.items() if one["unsupported"]} == {"PR", "KO"}
    assert listed["OT"]["images"] == 1 + len(seen.verdict["key_slabs"])
    assert "key images" in listed["OT"]["description"]


def test_the_segmentation_lies_on_the_bleed(seen: Seen, record_property: Any) -> None:
    truth = head(BLEED).mask > 0
    mask = marked(seen)
    found = dice(mask, truth)
    record_property("dice", found)
    print(f"Dice of the segmentation in the viewer against the simulator's truth: {found:.3f}")
    assert found > 0.6  # the reference model's, on this head; one slice or a few millimetres off costs more
    slices = {uid for slab in seen.verdict["slabs"] if slab["outlines"] for uid in [slab["sop_instance_uid"]]}
    assert set(seen.page["segmentation"]["slices"]) == slices
    for other in (np.roll(mask, 1, axis=0), mask[:, :, ::-1], mask[:, ::-1], mask.transpose(0, 2, 1)):
        assert dice(other, truth) < found - 0.05


def test_what_is_coloured_on_the_screen_is_what_is_marked(seen: Seen) -> None:
    told = seen.page["segmentation"]["coloured"]
    number = seen.place[told["instance"]]
    coloured = np.zeros(head(BLEED).mask.shape[1:], bool)
    coloured.ravel()[told["pixels"]] = True
    there = marked(seen)[number]
    assert dice(coloured, there) > 0.97, f"slice {number}: {coloured.sum()} pixels coloured, {there.sum()} marked"
    assert (coloured & (head(BLEED).mask[number] > 0)).any()


def test_the_report_opens_on_its_slice_with_its_region(seen: Seen) -> None:
    told = seen.page["report"]
    assert told["at"]["instance"] == seen.key_slab["sop_instance_uid"]
    assert told["lines"]
    outlines = [np.array(one) for one in seen.key_slab["outlines"]]
    for line in told["lines"]:
        # Drawn where an outline of this very slab runs, and none of another slab. (OHIF takes the centre of the first
        # pixel for 0, where the standard has 0.5: it draws half a pixel off in either direction.)
        points = np.array(line)
        far = [np.linalg.norm(points[:, None] - one, axis=2).min(axis=1).max() for one in outlines]
        assert min(far) < 1, f"{min(far)} pixels from any outline of the slab"
    assert all(one["loaded"] for one in told["measurements"])
    labels = {label["label"]: label["value"] for label in told["measurements"][0]["labels"]}
    assert labels["Volume"] == f"{seen.verdict['volume_ml']:.2f} mL"
    assert labels["Probability of intracranial hemorrhage"].startswith(f"{seen.verdict['probability']:.2f}")


def test_the_captures_open_with_their_summary(seen: Seen) -> None:
    assert seen.page["capture"]["index"] == 0
    assert seen.page["capture"]["instance"] not in seen.place
