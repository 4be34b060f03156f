"""Every object of a verdict on whatever a scanner or archive sends: valid, and one study with its source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import highdicom as hd
import highdicom.sr as sr
import numpy as np
import pydicom
import pytest
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from pydicom.dataset import Dataset
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
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

pytestmark = pytest.mark.slow

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


def test_what_is_outlined_is_the_bleed(tmp_path: Path, record_property: Any) -> None:
    """In the report and in the presentation state, as other readers have their points."""
    series, verdict = simulated(tmp_path)
    places = {uid: number for number, uid in enumerate(series.uids)}
    outlines: dict[str, dict[str, list[np.ndarray]]] = {"report": {}, "presentation": {}}
    path = tmp_path / "report.object"
    path.write_bytes(part10(rendered(series, verdict, "report")))
    for group in sr.srread(path).content.get_planar_roi_measurement_groups():
        [image] = group.roi.ContentSequence
        uid = str(image.ReferencedSOPSequence[0].ReferencedSOPInstanceUID)
        outlines["report"].setdefault(uid, []).append(np.asarray(group.roi.value))
    for number in range(1, len(verdict.key_slabs) + 1):
        [annotation] = rendered(series, verdict, f"presentation.{number}").GraphicAnnotationSequence
        uid = str(annotation.ReferencedImageSequence[0].ReferencedSOPInstanceUID)
        lines = [np.reshape(one.GraphicData, (-1, 2)) for one in annotation.GraphicObjectSequence]
        outlines["presentation"][uid] = lines
    keys = {verdict.slabs[index].sop_instance_uid for index in verdict.key_slabs}
    for name, found in outlines.items():
        assert set(found) == keys
        marked = np.zeros(phantom().mask.shape, np.uint8)
        for uid, lines in found.items():
            for line in lines:  # one by one: together they would be filled in turns; the first pixel's centre is 0.5
                cv2.fillPoly(marked[places[uid]], [np.rint(line - 0.5).astype(np.int32)], 1)
        truth = np.zeros_like(marked)
        for uid in keys:
            truth[places[uid]] = phantom().mask[places[uid]] > 0
        overlap = float(2 * (marked & truth).sum() / (marked.sum() + truth.sum()))
        record_property(f"dice of the {name}", overlap)
        print(f"Dice of what the {name} outlines on its key slices against the simulator's truth: {overlap:.3f}")
        assert overlap > 0.85


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: UID(uid).keyword)
def test_every_encoding(syntax: str, tmp_path: Path) -> None:
    def convert(files: list[Path], folder: Path) -> list[Path]:
        return [encode(path, folder / path.name, syntax) for path in files]

    series, verdict = simulated(tmp_path, convert=convert)
    assert pydicom.dcmread(series.source(series.uids[0])).file_meta.TransferSyntaxUID == syntax
    paths = check(series, verdict, objects_for(verdict), tmp_path)
    assert dice(seen(paths["segmentation"], series.uids)) > 0.9


def legacy(files: list[Path], folder: Path) -> Path:
    """What an archive makes of a scanner's slices."""
    converted = LegacyConvertedEnhancedCTImage(
        [pydicom.dcmread(path) for path in files],
        series_instance_uid=pydicom.uid.generate_uid(),
        series_number=7,
        sop_instance_uid=pydicom.uid.generate_uid(),
        instance_number=1,
    )
    converted.save_as(folder / "enhanced.dcm")
    return folder / "enhanced.dcm"


def enhanced(files: list[Path], folder: Path) -> Path:
    """What a scanner makes that writes Enhanced CT (PS3.3 A.38): one image, each frame with its plane and rescale."""
    slices = [pydicom.dcmread(path) for path in files]
    made = pydicom.dcmread(files[0])
    made.SOPClassUID = made.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    made.SOPInstanceUID = made.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    made.SeriesInstanceUID = pydicom.uid.generate_uid()
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness",
                    "RescaleSlope", "RescaleIntercept", "RescaleType", "SliceLocation"):  # fmt: skip
        if keyword in made:
            delattr(made, keyword)
    made.NumberOfFrames = len(slices)
    shared, frames = Dataset(), []
    shared.PixelMeasuresSequence = [copied(slices[0], "PixelSpacing", "SliceThickness")]
    shared.PlaneOrientationSequence = [copied(slices[0], "ImageOrientationPatient")]
    for number, one in enumerate(slices, start=1):
        frame = Dataset()
        frame.PlanePositionSequence = [copied(one, "ImagePositionPatient")]
        frame.PixelValueTransformationSequence = [copied(one, "RescaleSlope", "RescaleIntercept")]
        frame.PixelValueTransformationSequence[0].RescaleType = "HU"
        frame.FrameContentSequence = [Dataset()]
        frame.FrameContentSequence[0].StackID, frame.FrameContentSequence[0].InStackPositionNumber = "1", number
        frames.append(frame)
    made.SharedFunctionalGroupsSequence, made.PerFrameFunctionalGroupsSequence = [shared], frames
    made.PixelData = b"".join(one.PixelData for one in slices)
    made.save_as(folder / "enhanced.dcm", enforce_file_format=True)
    return folder / "enhanced.dcm"


def copied(source: Dataset, *keywords: str) -> Dataset:
    made = Dataset()
    for keyword in keywords:
        made[keyword] = source[keyword]
    return made


@pytest.mark.parametrize(
    ("make", "syntax"),
    [
        (legacy, ""),
        (enhanced, ""),
        (enhanced, ImplicitVRLittleEndian),
        (enhanced, ExplicitVRBigEndian),
        (enhanced, RLELossless),
    ],
    ids=["legacy converted", "enhanced", "implicit", "big endian", "run lengths"],
)
def test_an_enhanced_multi_frame_image(make: Callable[[list[Path], Path], Path], syntax: str, tmp_path: Path) -> None:
    def convert(files: list[Path], folder: Path) -> list[Path]:
        made = make(files, folder)
        return [encode(made, folder / "encoded.dcm", syntax) if syntax else made]

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
    expected = LegacyConvertedEnhancedCTImageStorage if make is legacy else EnhancedCTImageStorage
    assert measured.ReferencedSOPClassUID == expected
    document = hd.ko.KeyObjectSelectionDocument.from_dataset(pydicom.dcmread(paths["selection"]))
    frames = [one.referenced_frame_numbers for one in document.content.get_references()]
    assert frames == [[verdict.slabs[index].frame + 1] for index in verdict.key_slabs]


def test_a_real_head_with_all_its_slices(ge_head: Path, tmp_path: Path) -> None:
    files = sorted(ge_head.glob("*.dcm"))
    headers = {path: pydicom.dcmread(path, stop_before_pixels=True) for path in files}
    files.sort(key=lambda path: float(headers[path].ImagePositionPatient[2]))
    first = headers[files[0]]
    series = Series(
        {str(headers[path].SOPInstanceUID): path for path in files},
        str(first.StudyInstanceUID),
        str(first.SeriesInstanceUID),
    )
    assert len(files) == 28
    for positive in (True, False):
        verdict = verdict_on(series, positive=positive)
        paths = []
        for name in objects_for(verdict):
            paths.append(tmp_path / f"{name}.object")
            paths[-1].write_bytes(part10(rendered(series, verdict, name)))
            assert dciodvfy_errors(paths[-1]) == [], name
        assert dcentvfy_errors([*files, *paths]) == []


def test_the_validator_sees_a_name_that_differs(tmp_path: Path) -> None:
    series = ct_series(tmp_path, count=3)
    made = rendered(series, verdict_on(series), "selection")
    made.PatientName = "Roe^Richard"
    path = tmp_path / "selection.object"
    path.write_bytes(part10(made))
    assert any("PatientName" in line for line in dcentvfy_errors([*series.files.values(), path]))
