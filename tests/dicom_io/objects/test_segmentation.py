"""The segmentation read back by highdicom, and held against the simulator's truth and the verdict's own numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import highdicom as hd
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from appliance.findings import wording
from appliance.findings.render import RIM_MM, slices_of
from appliance.inference.verdict import FINE_MM
from appliance.ledger.records import Verdict
from dicom_io.header import FramePlane, read_header
from dicom_io.objects import codes
from dicom_io.objects.common import Algorithm, Device, ImageReference, Place, part10
from dicom_io.objects.segmentation import Marked, Segment, build_segmentation, filled
from dicom_io.volume import assemble, planes_of
from tests.findings_support import ISSUED, SQUARE, Series, ct_series, dciodvfy_errors, phantom, rendered, simulated

UNIT = (1.0, 1.0)
DEVICE = Device("1.2.9", "box", "m", "m", "1")
PLACE = Place("1.2.3", "1.2.4", 1, 1, "", ISSUED)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Series, Verdict, Path]:
    folder = tmp_path_factory.mktemp("head")
    series, verdict = simulated(folder)
    path = folder / "segmentation.object"
    path.write_bytes(part10(rendered(series, verdict, "segmentation")))
    return series, verdict, path


def masks(series: Series, path: Path) -> NDArray[np.bool_]:
    """(slices, rows, columns, segments) by another reader, slices as the series has them."""
    pixels = hd.seg.segread(path).get_pixels_by_source_instance(
        series.uids, ignore_spatial_locations=True, assert_missing_frames_are_empty=True
    )
    return np.asarray(pixels) > 0


def test_it_is_valid(made: tuple[Series, Verdict, Path]) -> None:
    assert dciodvfy_errors(made[2]) == []


def test_it_lies_where_the_bleeds_are(made: tuple[Series, Verdict, Path]) -> None:
    series, verdict, path = made
    seen, truth = masks(series, path).any(axis=-1), phantom().mask > 0
    dice = 2 * (seen & truth).sum() / (seen.sum() + truth.sum())
    assert dice > 0.9  # in the resolution of the lesion map, 4 mm, and of slabs of two slices
    pixel_ml = np.prod(phantom().spacing_mm) * phantom().step / 1000
    assert seen.sum() * pixel_ml == pytest.approx(verdict.volume_ml, rel=0.02)


def test_segments_share_the_slices_by_the_likeliest_type(made: tuple[Series, Verdict, Path]) -> None:
    series, verdict, path = made
    seg = hd.seg.segread(path)
    labels = [seg.get_segment_description(number).segment_label for number in seg.segment_numbers]
    assert sorted(labels) == ["Cerebral hemorrhage", "Subdural hemorrhage"]
    seen = masks(series, path).any(axis=(1, 2))  # slice, segment
    assert seen.sum(axis=1).max() == 1
    volume = assemble([plane for file in series.files.values() for plane in planes_of(read_header(file))])
    for slab, planes in zip(verdict.slabs, slices_of(verdict, volume), strict=True):
        expected = [False] * len(labels)
        if slab.outlines:
            (kind,) = wording.likely_subtypes(slab.probabilities)
            expected[labels.index(codes.SUBTYPES[kind].meaning)] = True
        assert len(planes) == 2  # thin slices: every one that the slab was averaged from is marked
        for plane in planes:
            assert seen[series.uids.index(plane.sop_instance_uid)].tolist() == expected


def test_every_frame_lies_in_the_plane_of_its_source(made: tuple[Series, Verdict, Path]) -> None:
    series, _, path = made
    ds = pydicom.dcmread(path)
    headers = {uid: read_header(file) for uid, file in series.files.items()}
    assert abs(headers[series.uids[0]].frames[0].orientation[5]) > 0.1  # the gantry is tilted
    shared = ds.SharedFunctionalGroupsSequence[0]
    positions = set()
    for frame in ds.PerFrameFunctionalGroupsSequence:
        [source] = frame.DerivationImageSequence[0].SourceImageSequence
        plane = headers[source.ReferencedSOPInstanceUID].frames[0]
        positions.add(plane.position)
        assert tuple(frame.PlanePositionSequence[0].ImagePositionPatient) == plane.position
        assert tuple(shared.PlaneOrientationSequence[0].ImageOrientationPatient) == plane.orientation
        assert tuple(shared.PixelMeasuresSequence[0].PixelSpacing) == plane.spacing
        assert shared.PixelMeasuresSequence[0].SliceThickness == plane.thickness
        assert (source.SpatialLocationsPreserved, "ReferencedFrameNumber" in source) == ("YES", False)
    assert ds.FrameOfReferenceUID == pydicom.dcmread(series.source(series.uids[0])).FrameOfReferenceUID
    # Frames are indexed by segment and by place, without a hole (PS3.3 C.7.6.17).
    indices = [tuple(f.FrameContentSequence[0].DimensionIndexValues) for f in ds.PerFrameFunctionalGroupsSequence]
    assert sorted(indices) == indices and len(set(indices)) == len(indices)
    assert {rank for _, rank in indices} == set(range(1, len(positions) + 1))


def test_it_says_who_found_what(made: tuple[Series, Verdict, Path]) -> None:
    series, verdict, path = made
    ds = pydicom.dcmread(path)
    seg = hd.seg.segread(path)
    for number in seg.segment_numbers:
        segment = seg.get_segment_description(number)
        [family] = segment.algorithm_identification
        assert (family.AlgorithmName, family.AlgorithmVersion) == (verdict.package, verdict.package_version)
        assert segment.algorithm_type == hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC
        assert segment.segmented_property_category.value == codes.MORPHOLOGICALLY_ABNORMAL.value
        description = ds.SegmentSequence[number - 1].SegmentDescription
        assert verdict.notice in description and "unverified" in description and "does not tell types" in description
    assert len({segment.TrackingUID for segment in ds.SegmentSequence}) == len(ds.SegmentSequence)
    assert {item.CodingSchemeDesignator for item in ds.CodingSchemeIdentificationSequence} == {"99SCANSIDE"}
    [referenced] = ds.ReferencedSeriesSequence
    marked = [uid for uid, seen in zip(series.uids, masks(series, path).any(axis=(1, 2, 3)), strict=True) if seen]
    assert referenced.SeriesInstanceUID == verdict.series_instance_uid
    assert sorted(i.ReferencedSOPInstanceUID for i in referenced.ReferencedInstanceSequence) == sorted(marked)
    assert ds.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.35, 0.5, 0.7, 1.0]))
def test_an_outline_of_half_millimetres_is_filled_to_the_area_that_it_was_drawn_around(seed: int, pixel: float) -> None:
    assert RIM_MM == FINE_MM / 2
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.random((200, 200)).astype(np.float32), (0, 0), 12)
    region = noise > np.quantile(noise, 0.8)
    contours, _ = cv2.findContours(region.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    outlines = [(line.reshape(-1, 2) + 0.5) * FINE_MM / pixel - 0.5 for line in contours if len(line) > 12]
    solid = cv2.drawContours(np.zeros((200, 200), np.uint8), [c for c in contours if len(c) > 12], -1, 1, cv2.FILLED)
    size = round(200 * FINE_MM / pixel)
    mask = filled(outlines, (size, size), (pixel, pixel), RIM_MM)
    assert mask.sum() * pixel**2 == pytest.approx(solid.sum() * FINE_MM**2, rel=0.1)


def test_what_is_within_an_outline_is_filled_and_nothing_else() -> None:
    mask = filled([SQUARE], (128, 128), UNIT, 0.25)
    expected = np.zeros((128, 128), bool)
    expected[50:81, 40:71] = True
    np.testing.assert_array_equal(mask, expected)
    assert not filled([], (16, 16), UNIT, 0.25).any()


@given(st.floats(0, 15), st.floats(0, 15))
def test_a_speck_between_pixels_is_not_lost(column: float, row: float) -> None:
    speck = ((column, row), (column + 0.1, row), (column, row + 0.1))
    mask = filled([speck], (16, 16), (4.0, 4.0), 0.25)
    rows, columns = np.nonzero(mask)
    assert len(rows) and (abs(rows - row) <= 1).all() and (abs(columns - column) <= 1).all()


def segment(size: int, count: int, **plane: Any) -> Segment:
    """A triangle that is another on every slice."""
    return Segment(
        "1.2.5",
        codes.INTRACRANIAL_HEMORRHAGE,
        "",
        tuple(
            Marked(
                ImageReference("1.2.840.10008.5.1.4.1.1.2", f"1.2.6.{n}"),
                FramePlane(
                    (0.0, 0.0, 5.0 * n), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), UNIT, plane.get("thickness", lambda n: 5.0)(n)
                ),
                (((1.0, 1.0), (2.0 + n % 5, 1.0), (1.0, 4.0)),),
            )
            for n in range(count)
        ),
    )


def built(segments: list[Segment], size: int, source: Dataset) -> Dataset:
    return build_segmentation(
        segments,
        source,
        (size, size),
        rim_mm=0.25,
        algorithm=Algorithm("a", "1", "m"),
        organization_uid="1.2.7",
        device=DEVICE,
        place=PLACE,
    )


@pytest.mark.parametrize("size", [8, 9, 11])
def test_frames_are_packed_without_gaps(size: int, tmp_path: Path) -> None:
    one = segment(size, 19)
    path = tmp_path / "segmentation.object"
    path.write_bytes(part10(built([one], size, ct_series(tmp_path, count=1).header())))
    pixels = pydicom.dcmread(path).pixel_array
    expected = [filled(marked.outlines, (size, size), UNIT, 0.25) for marked in one.slices]
    np.testing.assert_array_equal(pixels > 0, expected)
    assert dciodvfy_errors(path) == []


def test_slices_of_different_thickness_are_measured_each(tmp_path: Path) -> None:
    path = tmp_path / "segmentation.object"
    uneven = segment(8, 3, thickness=lambda n: (2.5, 5.0, None)[n])
    path.write_bytes(part10(built([uneven], 8, ct_series(tmp_path, count=1).header())))
    ds = pydicom.dcmread(path)
    frames = [frame.PixelMeasuresSequence[0] for frame in ds.PerFrameFunctionalGroupsSequence]
    assert [frame.get("SliceThickness") for frame in frames] == [2.5, 5.0, None]
    assert "PixelMeasuresSequence" not in ds.SharedFunctionalGroupsSequence[0]


def test_nothing_seen_is_no_segmentation(tmp_path: Path) -> None:
    source = ct_series(tmp_path, count=1).header()
    for segments in ([], [Segment("1.2.5", codes.INTRACRANIAL_HEMORRHAGE, "", ())]):
        with pytest.raises(ValueError, match="needs segments"):
            built(segments, 8, source)
