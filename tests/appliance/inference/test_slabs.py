"""Which planes make up a slab."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.inference.slabs import SlabPlan, foreseen_slabs, in_context, plan_slabs, slab_hu
from dicom_io.errors import GeometryError
from dicom_io.header import FramePlane, read_header
from dicom_io.volume import Plane, Volume, assemble, planes_of

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)

Slices = list[tuple[float, float | None]]
"""(offset, thickness) in mm of each slice."""


def volume_of(slices: Slices, order: int = 0) -> Volume:
    planes = [
        Plane(f"1.2.{index}", 0, FramePlane((0.0, 0.0, z), AXIAL, (0.5, 0.5), thickness), index)
        for index, (z, thickness) in enumerate(slices)
    ]
    Random(order).shuffle(planes)
    return assemble(planes)


def stack(count: int, step: float, thickness: float | None) -> Slices:
    return [(index * step, thickness) for index in range(count)]


def members(plans: tuple[SlabPlan, ...]) -> list[int]:
    return [len(plan.members) for plan in plans]


thicknesses = st.one_of(st.none(), st.floats(0.3, 12.0))


@st.composite
def any_slices(draw: st.DrawFn) -> Slices:
    """Slices in any spacing: overlapping, touching, with holes; in one thickness or in many."""
    count = draw(st.integers(1, 60))
    steps = draw(
        st.one_of(
            st.floats(0.1, 10.0).map(lambda step: [step] * count),
            st.lists(st.floats(0.1, 15.0), min_size=count, max_size=count),
        )
    )
    sizes = draw(
        st.one_of(thicknesses.map(lambda size: [size] * count), st.lists(thicknesses, min_size=count, max_size=count))
    )
    z, slices = 0.0, []
    for step, size in zip(steps, sizes, strict=True):
        slices.append((z, size))
        z += step
    return slices


def extents(volume: Volume, planes: tuple[int, ...]) -> tuple[float, float]:
    """The stretch that these planes cover; the usual distance stands for a thickness that is not given."""
    steps = [b - a for a, b in pairwise(volume.offsets)]
    usual = float(np.median(steps)) if steps else 1.0
    halves = [(volume.planes[plane].geometry.thickness or usual) / 2 for plane in planes]
    return (
        min(volume.offsets[plane] - half for plane, half in zip(planes, halves, strict=True)),
        max(volume.offsets[plane] + half for plane, half in zip(planes, halves, strict=True)),
    )


@settings(deadline=None)
@given(any_slices(), st.floats(1.0, 10.0), st.integers(0, 5))
def test_what_holds_for_any_volume(slices: Slices, slab_mm: float, order: int) -> None:
    volume = volume_of(slices, order)
    plans = plan_slabs(volume, slab_mm)
    assert plans == plan_slabs(volume_of(slices, order + 1), slab_mm)
    assert [plan.index for plan in plans] == list(range(len(plans)))
    assert [plane for plan in plans for plane in plan.members] == list(range(len(volume.planes)))
    gaps = {gap.after for gap in volume.gaps}
    for plan in plans:
        assert not gaps & set(plan.members[:-1])
        for below, above in pairwise(plan.members):
            (_, end), (start, _) = extents(volume, (below,)), extents(volume, (above,))
            thinner, thicker = sorted(b - a for a, b in (extents(volume, (below,)), extents(volume, (above,))))
            assert start - end <= (thinner + thicker) / 4 + 1e-9
        low, high = extents(volume, plan.members)
        assert plan.offset_mm == pytest.approx((low + high) / 2)
        if len(plan.members) > 1:
            thickest = max(b - a for a, b in (extents(volume, (plane,)) for plane in plan.members))
            assert thickest < 0.6 * slab_mm
            assert high - low <= slab_mm + thickest + 1e-9
        assert plan.thickness_mm >= 0
        distances = [abs(volume.offsets[plane] - plan.offset_mm) for plane in plan.members]
        assert distances[plan.members.index(plan.representative)] == min(distances)


@settings(deadline=None)
@given(st.integers(1, 80), st.floats(0.4, 8.0), st.floats(0.5, 1.4))
def test_thicknesses_add_up_to_what_the_volume_covers(count: int, thickness: float, ratio: float) -> None:
    volume = volume_of(stack(count, thickness * ratio, thickness))
    assert not volume.gaps
    low, high = extents(volume, tuple(range(len(volume.planes))))
    assert sum(plan.thickness_mm for plan in plan_slabs(volume, 5.0)) == pytest.approx(high - low)


@pytest.mark.parametrize(
    ("slices", "expected"),
    [
        (stack(140, 1.0, 1.0), [5] * 28),
        (stack(320, 0.5, 0.5), [10] * 32),
        (stack(128, 1.25, 1.25), [4] * 32),
        (stack(64, 2.5, 2.5), [2] * 32),
        (stack(63, 1.25, 2.5), [3] * 21),
        (stack(53, 3.0, 3.0), [1] * 53),
        (stack(28, 5.0, 5.0), [1] * 28),
        (stack(20, 10.0, 10.0), [1] * 20),
        (stack(30, 1.0, None), [5] * 6),
        ([(0.0, 1.0)], [1]),
        ([(0.0, None)], [1]),
        (stack(11, 1.0, 1.0), [5, 6]),  # one slice over: the last slab takes it
        (stack(12, 1.0, 1.0), [5, 3, 4]),  # two over: shared out
        (stack(13, 1.0, 1.0), [5, 5, 3]),
        (stack(3, 1.0, 1.0), [3]),
    ],
)
def test_even_series(slices: Slices, expected: list[int]) -> None:
    assert members(plan_slabs(volume_of(slices), 5.0)) == expected


def test_a_gap_is_never_bridged_nor_answered_for() -> None:
    thin = stack(8, 1.0, 1.0) + [(z + 20.0, thickness) for z, thickness in stack(8, 1.0, 1.0)]
    volume = volume_of(thin)
    assert [gap.after for gap in volume.gaps] == [7]
    plans = plan_slabs(volume, 5.0)
    assert members(plans) == [5, 3, 5, 3]
    assert sum(plan.thickness_mm for plan in plans) == pytest.approx(16.0)


def test_sparse_slices_stand_alone() -> None:
    """A volume of slices with wide spaces between them has no gaps of its own where one space is less wide."""
    volume = volume_of([(0.0, 2.0), (7.0, 2.0), (17.0, 2.0), (27.0, 2.0)])
    assert 0 not in {gap.after for gap in volume.gaps}
    assert members(plan_slabs(volume, 6.0)) == [1, 1, 1, 1]


def test_thin_slices_do_not_join_a_thick_one() -> None:
    mixed: Slices = [(0.0, 1.0), (1.0, 1.0), (4.0, 5.0), (7.0, 1.0), (8.0, 1.0)]
    assert members(plan_slabs(volume_of(mixed), 5.0)) == [2, 1, 2]


def test_a_thin_slice_within_a_thick_one_is_counted_once() -> None:
    plans = plan_slabs(volume_of([(0.0, 10.0), (1.0, 1.0), (2.0, 10.0)]), 5.0)
    assert sum(plan.thickness_mm for plan in plans) == pytest.approx(12.0)


def test_the_middle_plane_represents() -> None:
    assert [plan.representative for plan in plan_slabs(volume_of(stack(10, 1.0, 1.0)), 5.0)] == [2, 7]


def test_a_real_head_with_two_thicknesses(ge_head: Path) -> None:
    volume = assemble([plane for path in ge_head.glob("*.dcm") for plane in planes_of(read_header(path))])
    plans = plan_slabs(volume, 5.0)
    assert members(plans) == [1] * 28
    # 4 mm slices 4 mm apart, then 7 mm ones 7 mm apart, the first of them only 1.08 mm above the last thin one.
    assert sum(plan.thickness_mm for plan in plans) == pytest.approx(volume.offsets[-1] - volume.offsets[0] + 5.5)
    assert plans[13].thickness_mm + plans[14].thickness_mm == pytest.approx(2.0 + 1.08 + 3.5, abs=0.01)


@pytest.mark.parametrize("slab_mm", [0.0, -5.0, float("nan")])
def test_a_slab_has_a_thickness(slab_mm: float) -> None:
    with pytest.raises(ValueError, match="slab_mm"):
        plan_slabs(volume_of([(0.0, 1.0)]), slab_mm)


def test_a_slab_is_the_mean_of_its_planes_and_takes_each_once() -> None:
    planes = np.random.default_rng(1).integers(-1024, 3072, (5, 7, 9)).astype(np.int16)
    before = planes.copy()
    slab = slab_hu(iter(planes), "slab 0")
    assert slab.dtype == np.float32
    np.testing.assert_allclose(slab, planes.astype(np.float64).mean(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(planes, before)


def test_a_slab_of_one_plane_is_a_copy() -> None:
    plane = np.ones((3, 3), np.float32)
    slab_hu([plane], "slab 0")[:] = 9
    assert plane.max() == 1


def test_planes_of_one_slab_have_one_size() -> None:
    with pytest.raises(GeometryError, match="different sizes"):
        slab_hu([np.zeros((4, 4 + index % 2), np.float32) for index in range(5)], "slab 0")


# --- while the study arrives --------------------------------------------------------------------------------


def numbered(slices: Slices, *, down: bool) -> list[Plane]:
    """Planes in the order in which the scanner numbers them: from the feet, or from the head."""
    count = len(slices)
    planes = [
        Plane(
            f"1.2.{index}",
            0,
            FramePlane((0.0, 0.0, z), AXIAL, (0.5, 0.5), thickness),
            (count - index if down else index + 1),
        )
        for index, (z, thickness) in enumerate(slices)
    ]
    return planes[::-1] if down else planes


def names(volume: Volume, slabs: Iterable[tuple[int, ...]]) -> set[tuple[str, ...]]:
    return {tuple(volume.planes[member].sop_instance_uid for member in members) for members in slabs}


even = st.tuples(st.integers(2, 200), st.floats(0.4, 6.0)).map(lambda one: stack(one[0], one[1], one[1]))


@settings(deadline=None)
@given(even, st.booleans(), st.sampled_from([1, 2, 4]), st.data())
def test_what_is_foreseen_comes_true_but_for_the_last_slab(
    slices: Slices, down: bool, streams: int, data: st.DataObject
) -> None:
    """Slices in the order of their numbers, split over associations as a sender splits a list, at any moment."""
    planes = numbered(slices, down=down)
    plans = plan_slabs(assemble(planes), 5.0)
    final = names(assemble(planes), [plan.members for plan in plans])
    blocks = [planes[len(planes) * k // streams : len(planes) * (k + 1) // streams] for k in range(streams)]
    blocks = [block for block in blocks if block]
    arrived = [plane for block in blocks for plane in block[: data.draw(st.integers(1, len(block)))]]
    volume = assemble(arrived)
    foreseen = names(volume, foreseen_slabs(volume, 5.0))
    assert len(foreseen - final) <= streams  # the last slab before each hole, and before the end
    if streams == 1 and len(arrived) == len(planes):
        assert len(final - foreseen) <= 2


@settings(deadline=None)
@given(even, st.booleans(), st.data())
def test_neighbours_are_foreseen_but_for_those_of_the_last_slab(
    slices: Slices, down: bool, data: st.DataObject
) -> None:
    """Slices in the order of their numbers, at any moment: what is foreseen wrong borders on the last of them."""
    planes = numbered(slices, down=down)
    volume, here = assemble(planes), assemble(planes[: data.draw(st.integers(1, len(planes)))])

    def seen(volume: Volume, slabs: Sequence[tuple[int, ...]], *, whole: bool) -> set[tuple[tuple[str, ...], ...]]:
        contexts = in_context(volume, slabs, 1, whole=whole)
        return {tuple(tuple(volume.planes[n].sop_instance_uid for n in slab) for slab in one) for one in contexts}

    final = seen(volume, [plan.members for plan in plan_slabs(volume, 5.0)], whole=True)
    slabs = foreseen_slabs(here, 5.0)
    foreseen = seen(here, slabs, whole=False)
    assert len(foreseen) >= len(slabs) - 1
    assert len(foreseen - final) <= 2
    assert not foreseen - final or len(volume.planes) - len(here.planes) < 5 / slices[-1][1] + 1  # type: ignore[operator]


def test_of_one_slice_nobody_knows_which_end_it_is() -> None:
    volume = assemble(numbered(stack(1, 5.0, 5.0), down=False))
    assert in_context(volume, [(0,)], 1, whole=False) == []
    assert in_context(volume, [(0,)], 1, whole=True) == [((0,), (0,), (0,))]


@settings(deadline=None)
@given(any_slices(), st.floats(1.0, 10.0), st.integers(0, 5))
def test_neighbours_touch_and_a_slab_stands_in_for_one_that_is_not_there(
    slices: Slices, slab_mm: float, order: int
) -> None:
    volume = volume_of(slices, order)
    plans = plan_slabs(volume, slab_mm)
    slabs = [plan.members for plan in plans]
    assert in_context(volume, slabs, 0, whole=True) == [(one,) for one in slabs]
    contexts = in_context(volume, slabs, 1, whole=True)
    assert [own for _, own, _ in contexts] == slabs
    apart = {gap.after for gap in volume.gaps}
    for index, (below, own, above) in enumerate(contexts):
        assert below == (own if index == 0 or own[0] - 1 in apart else slabs[index - 1])
        assert above == (own if index == len(slabs) - 1 or own[-1] in apart else slabs[index + 1])


@settings(deadline=None)
@given(any_slices(), st.floats(1.0, 10.0), st.integers(0, 5))
def test_what_is_foreseen_has_the_planes_that_it_needs(slices: Slices, slab_mm: float, order: int) -> None:
    volume = volume_of(slices, order)
    foreseen = foreseen_slabs(volume, slab_mm)
    flat = [member for members in foreseen for member in members]
    assert len(flat) == len(set(flat))
    assert set(flat) <= set(range(len(volume.planes)))
    assert all(list(members) == sorted(members) for members in foreseen)


def test_a_head_that_is_scanned_downwards_is_divided_from_the_top() -> None:
    up = assemble(numbered(stack(13, 1.0, 1.0), down=False))
    down = assemble(numbered(stack(13, 1.0, 1.0), down=True))
    assert members(plan_slabs(up, 5.0)) == [5, 5, 3]
    assert members(plan_slabs(down, 5.0)) == [3, 5, 5]
    assert [plan.index for plan in plan_slabs(down, 5.0)] == [0, 1, 2]
