"""Assembly of planes: order, tilt, duplicates and gaps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicom_io.errors import GeometryError
from dicom_io.header import FramePlane, read_header
from dicom_io.volume import Gap, Plane, assemble, planes_of, uncovered

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def plane(
    z: float,
    number: int | None = None,
    *,
    thickness: float | None = 5.0,
    uid: str = "",
    xy: tuple[float, float] = (0, 0),
) -> Plane:
    geometry = FramePlane((xy[0], xy[1], z), AXIAL, (0.5, 0.4), thickness)
    return Plane(uid or f"1.2.{abs(hash((z, number))) % 10**6}", 0, geometry, number)


def row(heights: Sequence[float], thickness: float | None = 5.0) -> list[Plane]:
    return [plane(z, n, thickness=thickness, uid=f"1.2.{n}") for n, z in enumerate(heights, 1)]


def turned(one: Plane, rotation: np.ndarray) -> Plane:
    geometry = one.geometry
    position = rotation @ np.array(geometry.position)
    cosines = np.concatenate([rotation @ geometry.orientation[:3], rotation @ geometry.orientation[3:]])
    x, y, z = position.tolist()
    return replace(one, geometry=replace(geometry, position=(x, y, z), orientation=tuple(cosines.tolist())))


def about_x(degrees: float) -> np.ndarray:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


def test_the_real_head_is_one_tilted_volume_without_gaps(ge_head: Path) -> None:
    volume = assemble([p for path in ge_head.glob("*.dcm") for p in planes_of(read_header(path))])

    assert len(volume.planes) == 28
    assert volume.tilt_degrees == pytest.approx(18.5, abs=0.01)
    assert not volume.gaps and not volume.duplicates and not volume.uniform
    assert np.diff(volume.offsets).min() == pytest.approx(1.08, abs=0.01)
    assert np.diff(volume.offsets).max() == pytest.approx(7.0, abs=0.01)
    assert volume.normal[2] > 0.9


def test_the_phantom_has_a_thick_and_a_thin_series(philips_phantom: Path) -> None:
    for name, count, step in (("S2010", 28, 5.0), ("S2020", 140, 1.0)):
        planes = [p for path in (philips_phantom / name).glob("I*") for p in planes_of(read_header(path))]
        volume = assemble(planes)
        assert (len(volume.planes), volume.uniform, volume.tilt_degrees, volume.gaps) == (count, True, 0.0, ())
        assert np.allclose(np.diff(volume.offsets), step)
        assert volume.normal == (0.0, 0.0, 1.0)


@settings(max_examples=60)
@given(data=st.data(), heights=st.lists(st.integers(-300, 300), min_size=1, max_size=25))
def test_the_order_of_arrival_makes_no_difference(data: st.DataObject, heights: list[int]) -> None:
    planes = row(heights)  # equal heights are duplicates
    volume = assemble(data.draw(st.permutations(planes)))

    assert volume == assemble(planes)
    assert list(volume.offsets) == sorted(set(map(float, heights)))
    assert sorted(p.sop_instance_uid for p in volume.planes + volume.duplicates) == sorted(
        p.sop_instance_uid for p in planes
    )


@settings(max_examples=60)
@given(
    degrees=st.floats(-40, 40),
    start=st.floats(-200, 200),
    steps=st.lists(st.floats(0.5, 10), min_size=1, max_size=20),
)
def test_a_rotated_volume_keeps_its_offsets_and_shows_its_tilt(
    degrees: float, start: float, steps: list[float]
) -> None:
    heights = np.cumsum([start, *steps])
    straight = assemble(row(heights.tolist()))
    volume = assemble([turned(p, about_x(degrees)) for p in reversed(row(heights.tolist()))])

    assert volume.tilt_degrees == pytest.approx(abs(degrees), abs=1e-4)
    assert np.allclose(volume.normal, about_x(degrees) @ [0, 0, 1])
    assert np.allclose(volume.offsets, straight.offsets)
    assert [p.sop_instance_uid for p in volume.planes] == [p.sop_instance_uid for p in straight.planes]
    assert [g.after for g in volume.gaps] == [g.after for g in straight.gaps]


def test_a_table_that_moves_with_a_tilted_gantry() -> None:
    """Slices of a tilted gantry step along the table, so their distance along the normal is shorter."""
    planes = []
    for z in (0.0, 5.0, 10.0):
        tilted = turned(plane(0.0), about_x(20))
        planes.append(replace(tilted, sop_instance_uid=str(z), geometry=replace(tilted.geometry, position=(0, 0, z))))
    assert np.allclose(np.diff(assemble(planes).offsets), 5 * math.cos(math.radians(20)))


@pytest.mark.parametrize(
    ("orientation", "normal"),
    [((1, 0, 0, 0, 0, -1), (0, 1, 0)), ((0, 1, 0, 0, 0, -1), (1, 0, 0)), ((-1, 0, 0, 0, 1, 0), (0, 0, 1))],
)
def test_the_normal_points_along_its_largest_component(
    orientation: tuple[float, ...], normal: tuple[float, ...]
) -> None:
    base = plane(3.0)
    volume = assemble([replace(base, geometry=replace(base.geometry, orientation=tuple(map(float, orientation))))])
    assert volume.normal == normal
    assert volume.tilt_degrees == pytest.approx(0 if normal[2] else 90)


def test_a_missing_slice_is_a_gap() -> None:
    volume = assemble(row([0, 5, 10, 20, 25]))
    assert volume.gaps == (Gap(2, 5.0),)
    assert not volume.uniform


def test_gaps_are_missing_cover_not_distance() -> None:
    assert assemble(row([0, 7, 14, 21])).gaps == ()  # 2 mm are missing each time, less than half a slice
    assert assemble(row([0, 5, 10, 15], thickness=3.0)).gaps == ()  # thin slices far apart: half of the distance
    assert [g.mm for g in assemble(row([0, 8, 16, 24], thickness=3.0)).gaps] == [5.0, 5.0, 5.0]
    assert assemble(row([0, 1, 2, 3, 5, 6], thickness=2.0)).gaps == ()  # overlapping slices still cover
    assert [g.after for g in assemble(row([0, 1, 2, 3, 6, 7], thickness=1.5)).gaps] == [3]
    assert assemble(row([0, 5, 10, 20], thickness=None)).gaps == (Gap(2, 5.0),)


@given(missing=st.floats(0.01, 20))
def test_the_limit_of_a_gap_is_half_a_slice(missing: float) -> None:
    volume = assemble(row([0, 5, 10, 15, 20 + missing, 25 + missing]))
    assert bool(volume.gaps) == (20 + missing - 15 - 5 > 2.5)


def test_duplicates_are_left_out_and_reported() -> None:
    first = row([0, 5, 10])
    again = [plane(5.004, 9, uid="1.2.99"), plane(10, None, uid="1.2.98")]
    volume = assemble(first + again)

    assert [p.sop_instance_uid for p in volume.planes] == ["1.2.1", "1.2.99", "1.2.3"]
    assert {p.sop_instance_uid for p in volume.duplicates} == {"1.2.2", "1.2.98"}
    assert volume.gaps == ()


def test_frames_of_one_instance_are_planes_of_their_own() -> None:
    one = plane(0, 1, uid="1.2.3")
    frames = [replace(one, frame=n, geometry=replace(one.geometry, position=(0, 0, -5.0 * n))) for n in range(4)]
    assert [p.frame for p in assemble(frames).planes] == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("planes", "match"),
    [
        ([], "no slices"),
        ([plane(0), turned(plane(5), about_x(1))], "different orientations"),
        ([plane(0), replace(plane(5), geometry=replace(plane(5).geometry, spacing=(0.5, 0.5)))], "pixel spacings"),
        ([plane(0, 1, uid="1.2.7"), plane(0, 2, uid="1.2.8", xy=(30, 0))], "30.00 mm apart"),
    ],
)
def test_what_is_no_volume_says_why(planes: list[Plane], match: str) -> None:
    with pytest.raises(GeometryError, match=match) as caught:
        assemble(planes)
    assert caught.value.where and caught.value.remedy


def test_rounded_cosines_are_one_orientation() -> None:
    planes = [turned(p, about_x(18.5)) for p in row([0, 5])]
    cosines = planes[1].geometry.orientation
    planes[1] = replace(
        planes[1], geometry=replace(planes[1].geometry, orientation=tuple(round(c, 4) for c in cosines))
    )
    assert len(assemble(planes).planes) == 2


def scanned(heights: Sequence[float], acquisition: int, first: int = 1) -> list[Plane]:
    return [
        replace(plane(z, n, uid=f"1.2.{n}", thickness=1.25), acquisition=acquisition)
        for n, z in enumerate(heights, first)
    ]


@pytest.mark.parametrize(("aside", "alike"), [(0.5, True), (1.5, False), (20.0, False)])
def test_slices_that_do_not_lie_one_above_the_other_are_no_volume(aside: float, alike: bool) -> None:
    planes = [plane(5.0 * n, n, uid=f"1.2.{n}", xy=(0.0, aside * (n == 4))) for n in range(9)]
    for rotation in (np.eye(3), about_x(18)):
        moved = [turned(one, rotation) for one in planes]
        if alike:
            assert len(assemble(moved).planes) == 9
        else:
            with pytest.raises(GeometryError, match=f"{aside:.1f} mm beside the line"):
                assemble(moved)


def test_the_head_scanned_again_a_little_higher_is_not_sorted_in_between() -> None:
    first = [plane(1.25 * n, n + 1, uid=f"1.2.{n}") for n in range(60)]
    again = [plane(1.25 * n + 0.6, n + 201, uid=f"1.3.{n}", xy=(9.0, 14.0)) for n in range(60)]
    with pytest.raises(GeometryError, match="beside the line"):
        assemble(first + again)


def test_two_acquisitions_may_adjoin_and_not_cover_the_same() -> None:
    low = scanned([1.25 * n for n in range(40)], 1)
    adjoining = scanned([1.25 * n + 45.6 for n in range(40)], 2, 41)
    assert len(assemble(low + adjoining).planes) == 80
    again = scanned([1.25 * n + 0.6 for n in range(40)], 2, 41)
    with pytest.raises(GeometryError, match="acquisitions 1 and 2 cover the same 48 mm"):
        assemble(low + again)
    within = scanned([1.25 * n + 10.6 for n in range(12)], 3, 41)
    with pytest.raises(GeometryError, match="acquisitions 1 and 3 cover the same 14 mm"):
        assemble(low + within)
    # Of what reaches furthest, not of the one before: 2 lies within 1 and is short.
    short = scanned([30.6 + 1.25 * n for n in range(6)], 2, 41)
    onwards = scanned([35.9 + 1.25 * n for n in range(30)], 3, 61)
    with pytest.raises(GeometryError, match="acquisitions 1 and 3 cover the same 13 mm"):
        assemble(low + short + onwards)
    assert len(assemble(low + short).planes) == 46
    # Every slice an acquisition of its own, or none that says so, as scanners have it that go step by step.
    assert len(assemble([replace(one, acquisition=n) for n, one in enumerate(low)]).planes) == 40
    assert len(assemble([*low, *(replace(one, acquisition=None) for one in again)]).planes) == 80


def test_what_no_slice_covers() -> None:
    assert uncovered(assemble(row([0, 5, 10, 15]))) == 0
    assert uncovered(assemble(row([0, 10, 20, 30]))) == pytest.approx(0.5)
    assert uncovered(assemble(row([0, 7, 14, 21]))) == pytest.approx(2 / 7)
    assert uncovered(assemble(row([0, 3, 6, 9]))) == 0
    assert uncovered(assemble(row([0, 10, 20], thickness=None))) == 0
    assert uncovered(assemble(row([4]))) == 0
