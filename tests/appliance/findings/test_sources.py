"""Every object of a verdict on whatever a scanner or archive sends: valid, and one study with its source."""

from __future__ import annotations

from pathlib import Path

import highdicom as hd
import highdicom.sr as sr
import numpy as np
import pydicom
import pytest
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    LegacyConvertedEnhancedCTImageStorage,
    RLELossless,
)

from appliance.findings.render import objects_for
from appliance.ledger.records import Verdict
from dicom_io.objects.common import part10
from tests.findings_support import (
    Series,
    ct_series,
    dcentvfy_errors,
    dciodvfy_errors,
    phantom,
    rendered,
    simulated,
    verdict_on,
)
from tests.peers import encode
from triton_models.training.phantom import VENDORS

SYNTAXES = (
    ImplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEG2000Lossless,
)


def check(series: Series, verdict: Verdict, names: tuple[str, ...], folder: Path) -> dict[str, Path]:
    """Write the objects and hold them against both validators."""
    paths = {name: folder / f"{name}.object" for name in names}
    for name, path in paths.items():
        path.write_bytes(part10(rendered(series, verdict, name)))
        assert dciodvfy_errors(path) == [], name
    # The images before they were encoded: dcentvfy does not inflate.
    assert dcentvfy_errors([*(folder / "written").glob("*.dcm"), *paths.values()]) == []
    return paths


def seen(path: Path, uids: list[str]) -> np.ndarray:
    """Which pixels of which slices a segmentation marks, by another reader."""
    segmentation = hd.seg.segread(path)
    return np.asarray(
        segmentation.get_pixels_by_source_instance(
            uids, ignore_spatial_locations=True, assert_missing_frames_are_empty=True
        )
    ).any(axis=-1)


def dice(mask: np.ndarray) -> float:
    truth = phantom().mask > 0
    return float(2 * (mask & truth).sum() / (mask.sum() + truth.sum()))


@pytest.mark.parametrize("vendor", VENDORS)
def test_every_vendors_images(vendor: str, tmp_path: Path) -> None:
    series, verdict = simulated(tmp_path, vendor=vendor)
    names = objects_for(verdict)
    assert {name.split(".")[0] for name in names} == {
        "report",
        "capture",
        "segmentation",
        "presentation",
        "selection",
    }
    paths = check(series, verdict, names, tmp_path)
    assert dice(seen(paths["segmentation"], series.uids)) > 0.9


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: UID(uid).keyword)
def test_every_encoding(syntax: str, tmp_path: Path) -> None:
    def convert(files: list[Path], folder: Path) -> list[Path]:
        return [encode(path, folder / path.name, syntax) for path in files]

    series, verdict = simulated(tmp_path, convert=convert)
    assert pydicom.dcmread(series.source(series.uids[0])).file_meta.TransferSyntaxUID == syntax
    names = ("report", "capture.1", "segmentation", "presentation.1", "selection")
    paths = check(series, verdict, names, tmp_path)
    assert dice(seen(paths["segmentation"], series.uids)) > 0.9


def test_an_enhanced_multi_frame_image(tmp_path: Path) -> None:
    def convert(files: list[Path], folder: Path) -> list[Path]:
        converted = LegacyConvertedEnhancedCTImage(
            [pydicom.dcmread(path) for path in files],
            series_instance_uid=pydicom.uid.generate_uid(),
            series_number=7,
            sop_instance_uid=pydicom.uid.generate_uid(),
            instance_number=1,
        )
        converted.save_as(folder / "enhanced.dcm")
        return [folder / "enhanced.dcm"]

    series, verdict = simulated(tmp_path, convert=convert)
    names = objects_for(verdict)
    paths = check(series, verdict, names, tmp_path)
    [uid] = series.uids
    count = len(phantom().positions)
    segmentation = hd.seg.segread(paths["segmentation"])
    mask = segmentation.get_pixels_by_source_frame(
        uid, list(range(1, count + 1)), ignore_spatial_locations=True, assert_missing_frames_are_empty=True
    )
    # The conversion keeps the order of the files; `planes_of` and the truth count from the feet.
    assert dice(np.asarray(mask).any(axis=-1)) > 0.9
    key = verdict.slabs[verdict.key_slabs[0]]
    state = pydicom.dcmread(paths["presentation.1"])
    [shown] = state.GraphicAnnotationSequence[0].ReferencedImageSequence
    assert (shown.ReferencedSOPInstanceUID, shown.ReferencedFrameNumber) == (uid, key.frame + 1)
    region = sr.srread(paths["report"]).content.get_planar_roi_measurement_groups()[0].roi
    [measured] = region.ContentSequence[0].ReferencedSOPSequence
    assert (measured.ReferencedSOPInstanceUID, measured.ReferencedFrameNumber) == (uid, key.frame + 1)
    assert measured.ReferencedSOPClassUID == LegacyConvertedEnhancedCTImageStorage
    document = hd.ko.KeyObjectSelectionDocument.from_dataset(pydicom.dcmread(paths["selection"]))
    frames = [one.referenced_frame_numbers for one in document.content.get_references()]
    assert frames == [[verdict.slabs[index].frame + 1] for index in verdict.key_slabs]


def test_the_validator_sees_a_name_that_differs(tmp_path: Path) -> None:
    series = ct_series(tmp_path, count=3)
    made = rendered(series, verdict_on(series), "selection")
    made.PatientName = "Roe^Richard"
    path = tmp_path / "selection.object"
    path.write_bytes(part10(made))
    assert any("PatientName" in line for line in dcentvfy_errors([*series.files.values(), path]))
