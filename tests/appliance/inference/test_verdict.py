"""From model outputs to a verdict."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from appliance.governance.label import Limitation
from appliance.governance.package import OperatingPoint, Package
from appliance.inference.preprocess import to_field
from appliance.inference.slabs import plan_slabs
from appliance.inference.triton import Output
from appliance.inference.verdict import aggregate, lesions
from appliance.ledger.records import Outline, Verdict
from dicom_io.header import FramePlane
from dicom_io.volume import Plane, Volume, assemble

SHAPE = (512, 512)
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def volume_of(heights: list[float], spacing: tuple[float, float] = (0.5, 0.5)) -> Volume:
    return assemble(
        [Plane(f"1.2.{n}", n % 2, FramePlane((0.0, 0.0, z), AXIAL, spacing, 5.0), n) for n, z in enumerate(heights)]
    )


@pytest.fixture(scope="module")
def package(reference: Package) -> Package:
    return replace(reference, operating_point=OperatingPoint(0.6, 0.5))


def verdict(
    package: Package, any_of_slab: list[float], maps: NDArray[np.float32] | None = None, volume: Volume | None = None
) -> Verdict:
    """The verdict where the slabs have these probabilities of "any"; the subtypes' are a tenth and less of it."""
    volume = volume or volume_of([5.0 * n for n in range(len(any_of_slab))])
    values = np.array([[p] + [p / 10 / n for n in range(1, 6)] for p in any_of_slab], np.float32)
    if maps is None:
        maps = np.zeros((len(any_of_slab), 64, 64), np.float32)
    return aggregate(
        package,
        volume,
        plan_slabs(volume, 5.0),
        Output(values, maps),
        study_uid="1.2.3",
        series_uid="1.2.3.4",
        shape=SHAPE,
        codecs=["raw", "imagecodecs.rle", "raw"],
        limitations=["Said before."],
    )


def area(outline: Outline) -> float:
    """Area of a polygon in its own units, by the shoelace formula."""
    x, y = np.array(outline).T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def blob(column: float, row: float, radius: float) -> NDArray[np.float32]:
    """A lesion map that falls through one half at ``radius`` map pixels from a point."""
    rows, columns = np.mgrid[:64, :64]
    values: NDArray[np.float32] = np.clip(0.5 + (radius - np.hypot(columns - column, rows - row)) / 4, 0, 1).astype(
        np.float32
    )
    return values


def test_the_study_is_as_suspicious_as_its_most_suspicious_slab(package: Package) -> None:
    said = verdict(package, [0.1, 0.7, 0.3])
    assert said.positive
    assert said.probability == pytest.approx(0.7)
    assert said.threshold == 0.6
    assert set(said.subtypes) == {"epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural"}
    assert said.subtypes["epidural"] == pytest.approx(0.07)
    assert said.subtypes["subdural"] == pytest.approx(0.014)
    assert said.codecs == ("imagecodecs.rle", "raw")
    assert (said.package, said.package_version, said.notice) == (
        package.name,
        package.version,
        f"Evaluation only, no basis for care. {package.notice}",
    )
    assert [(slab.sop_instance_uid, slab.frame) for slab in said.slabs] == [("1.2.0", 0), ("1.2.1", 1), ("1.2.2", 0)]
    assert Verdict.from_json(said.to_json() | {"of a later version": 1}) == said


@pytest.mark.parametrize(("probability", "positive"), [(0.6, True), (0.59, False)])
def test_the_threshold_itself_is_positive(package: Package, probability: float, positive: bool) -> None:
    at = replace(package, operating_point=OperatingPoint(float(np.float32(0.6)), 0.5))
    assert verdict(at, [probability]).positive is positive


def test_a_negative_study_shows_nothing(package: Package) -> None:
    said = verdict(package, [0.5, 0.59], np.stack([blob(30, 30, 8)] * 2))
    assert not said.positive
    assert said.key_slabs == ()
    assert said.volume_ml == 0
    assert all(slab.outlines == () and slab.volume_ml == 0 for slab in said.slabs)


def test_only_positive_slabs_are_drawn_on(package: Package) -> None:
    said = verdict(package, [0.5, 0.9], np.stack([blob(30, 30, 8)] * 2))
    assert [len(slab.outlines) for slab in said.slabs] == [0, 1]
    assert said.key_slabs == (1,)
    assert said.volume_ml == said.slabs[1].volume_ml > 0


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        ([0.9, 0.1, 0.1], (0,)),
        ([0.7, 0.9, 0.8, 0.1], (1, 2, 0)),  # nothing else is left
        ([0.8, 0.9, 0.85, 0.7, 0.1, 0.65], (1, 3, 5)),
        ([0.61, 0.62, 0.63, 0.64, 0.65, 0.66, 0.67], (6, 4, 2)),
        ([0.9] * 7, (0, 2, 4)),
    ],
)
def test_key_slabs_are_the_highest_and_lie_apart(
    package: Package, probabilities: list[float], expected: tuple[int, ...]
) -> None:
    assert verdict(package, probabilities).key_slabs == expected


@given(
    column=st.floats(12, 51),
    row=st.floats(12, 51),
    radius=st.floats(2, 10),
    spacing=st.tuples(st.floats(0.35, 0.6), st.floats(0.35, 0.6)),
    rows=st.integers(500, 560),
)
@settings(max_examples=40, deadline=None)
def test_an_outline_lies_where_the_lesion_does(
    package: Package, column: float, row: float, radius: float, spacing: tuple[float, float], rows: int
) -> None:
    """Independent of the inverse mapping: the outline is filled on the source image, and that image is sent forward."""
    shape = (rows, 512)
    outlines, area_mm2 = lesions(package, blob(column, row, radius), shape, spacing)
    painted = np.zeros(shape, np.float32)
    for outline in outlines:
        cv2.fillPoly(painted, [np.rint(np.array(outline)).astype(np.int32)], 1.0)
    field = to_field(painted, spacing, fill=0)
    within = to_field(np.ones(shape, np.float32), spacing, fill=0) > 0.5
    map_rows, map_columns = (np.mgrid[:256, :256] + 0.5) / 4 - 0.5
    expected = (np.hypot(map_columns - column, map_rows - row) <= radius) & within
    if expected.sum() < 100:  # mostly outside the image
        return
    overlap = 2 * (expected & (field > 0.5)).sum() / (expected.sum() + (field > 0.5).sum())
    assert overlap > 0.9
    assert area_mm2 == pytest.approx(expected.sum(), rel=0.12)


@given(st.integers(0, 2**32 - 1), st.floats(0.3, 0.99), st.tuples(st.integers(64, 700), st.integers(64, 700)))
@settings(max_examples=40, deadline=None)
def test_any_map_gives_closed_outlines_within_the_image(
    package: Package, seed: int, threshold: float, shape: tuple[int, int]
) -> None:
    noise = np.random.default_rng(seed).random((64, 64)).astype(np.float32)
    sharp = replace(package, operating_point=OperatingPoint(0.5, threshold))
    outlines, area_mm2 = lesions(sharp, noise, shape, (0.5, 0.5))
    assert bool(outlines) == (area_mm2 > 0)
    for outline in outlines:
        points = np.array(outline)
        assert len(points) >= 3
        assert points.min() >= 0
        assert (points <= (shape[1] - 1, shape[0] - 1)).all()
    areas = [area(outline) for outline in outlines]
    assert area_mm2 <= shape[0] * shape[1] * 0.25 * 1.02
    assert sum(areas) > 0 or not areas


def test_volume_is_area_times_thickness(package: Package) -> None:
    radius = 6.0  # map pixels of 4 mm
    said = verdict(package, [0.9, 0.9], np.stack([blob(30, 30, radius)] * 2))
    disc_ml = np.pi * (radius * 4) ** 2 * 5.0 / 1000
    assert [slab.volume_ml for slab in said.slabs] == pytest.approx([disc_ml] * 2, rel=0.03)
    assert said.volume_ml == pytest.approx(2 * disc_ml, rel=0.03)
    # Half a millimetre pixels: an outline's area in the image is four times that in mm².
    assert area(said.slabs[0].outlines[0]) == pytest.approx(4 * np.pi * (radius * 4) ** 2, rel=0.05)


def test_a_hole_is_not_measured_and_the_largest_comes_first(package: Package) -> None:
    ring = np.minimum(blob(20, 20, 10), 1 - blob(20, 20, 5)) + blob(50, 50, 3)
    outlines, area_mm2 = lesions(package, ring, SHAPE, (0.5, 0.5))
    assert len(outlines) == 2
    assert area(outlines[0]) > area(outlines[1])
    assert area_mm2 == pytest.approx(np.pi * 16 * (10**2 - 5**2 + 3**2), rel=0.05)


def test_a_speck_is_not_drawn(package: Package) -> None:
    speck = np.zeros((64, 64), np.float32)
    speck[20, 20] = 0.52
    assert lesions(package, speck, SHAPE, (0.5, 0.5)) == ((), 0.0)


def test_what_the_map_says_of_the_padding_is_no_finding(package: Package) -> None:
    everywhere = np.ones((64, 64), np.float32)
    outlines, area_mm2 = lesions(package, everywhere, (256, 200), (0.5, 0.5))
    assert area_mm2 == pytest.approx(128 * 100, rel=0.03)
    assert len(outlines) == 1
    assert area(outlines[0]) == pytest.approx(255 * 199, rel=0.03)


def test_what_a_label_rules_out_and_no_header_shows_is_said_with_each_verdict(package: Package) -> None:
    text = "not for isolated subarachnoid haemorrhage"
    label = replace(package.indication, limitations=(Limitation(text, "Indications for Use"),))
    for likely in (0.1, 0.9):
        said = verdict(replace(package, indication=label), [likely] * 4).limitations
        assert said == (f"The label says: {text}.", "Said before.")


def test_gaps_and_duplicates_are_limitations(package: Package) -> None:
    planes = [
        Plane(f"1.2.{n}", 0, FramePlane((0.0, 0.0, z), AXIAL, (0.5, 0.5), 5.0), n)
        for n, z in enumerate([0.0, 5.0, 5.0, 20.0, 35.0])
    ]
    said = verdict(package, [0.1] * 4, volume=assemble(planes))
    assert said.limitations == (
        "Said before.",
        "Slices are missing in 2 places, 20.0 mm in all; nothing is known of what lies there.",
        "One slice in the place of another was left out.",
    )
    assert verdict(package, [0.1] * 4).limitations == ("Said before.",)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_every_slab_has_an_answer(package: Package, count: int) -> None:
    volume = volume_of([0.0, 5.0])
    answers = Output(np.zeros((count, 6), np.float32), np.zeros((count, 64, 64), np.float32))
    with pytest.raises(ValueError, match="2 slabs"):
        aggregate(
            package,
            volume,
            plan_slabs(volume, 5.0),
            answers,
            study_uid="1",
            series_uid="1",
            shape=SHAPE,
            codecs=(),
        )
