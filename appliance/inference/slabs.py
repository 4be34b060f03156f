"""Which planes of a volume make up each slab, the unit of inference.

A model is trained on slabs of one thickness. Thin slices are averaged until they are about that thick; a slice that
is nearly as thick, or thicker, is a slab by itself. A slab never spans a gap.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dicom_io.errors import GeometryError
from dicom_io.volume import Volume

SINGLE_FRACTION = 0.6
"""A slice at least this part of a slab thick stands alone: two of them would be nearer to two slabs than to one."""

HOLE_FRACTION = 0.5
"""Slices with more than this part of a slice between them are not averaged."""


Context = tuple[tuple[int, ...], ...]
"""A slab's planes between its neighbours' planes, foot to head; its own are those in the middle."""


@dataclass(frozen=True, slots=True)
class SlabPlan:
    """One slab and the planes that it is averaged from.

    Attributes:
        index: position of the slab, 0 nearest the feet.
        members: indices into the volume's planes, rising; each plane belongs to exactly one slab.
        offset_mm: its centre along the volume's normal.
        thickness_mm: the extent along the normal that it answers for. Neighbouring slabs share out what both or
            neither cover, except across a gap, so that areas times thicknesses add up to a volume.
        representative: the member nearest to the centre; findings are drawn on it.
    """

    index: int
    members: tuple[int, ...]
    offset_mm: float
    thickness_mm: float
    representative: int


def plan_slabs(volume: Volume, slab_mm: float) -> tuple[SlabPlan, ...]:
    """Divide a volume into slabs of about ``slab_mm``.

    In the direction in which the instance numbers count (from the feet upwards where they do not tell), thin slices
    are joined as long as that brings their extent nearer to ``slab_mm``, but never across more than half a slice that
    neither of them covers. A remainder of less than half a slab (before such a hole, a thick slice or the end) is
    shared with the slab before it: joined to it where that makes it no more than one slice too thick, else the planes
    of both are divided as evenly as can be. So no slab of several slices is thicker than ``slab_mm`` plus one slice.

    Raises:
        ValueError: ``slab_mm`` is not positive.
    """
    if not slab_mm > 0:
        raise ValueError(f"slab_mm must be positive, not {slab_mm}")
    extents = _extents(volume)
    down = _counts_down(volume)
    groups = []
    for run in _runs(extents, slab_mm):
        divided = _divide(run[::-1] if down else run, extents, slab_mm)
        groups += [sorted(group) for group in (reversed(divided) if down else divided)]
    outer = [_span(group, extents) for group in groups]
    centres = [(low + high) / 2 for low, high in outer]
    gaps = {gap.after for gap in volume.gaps}
    lows, highs = [low for low, _ in outer], [high for _, high in outer]
    for index, below in enumerate(groups[:-1]):
        if below[-1] not in gaps:
            # Between the centres, because a thin slice can lie wholly within the extent of a thick one.
            ends = sorted(centres[index : index + 2])
            border = min(max((highs[index] + lows[index + 1]) / 2, ends[0]), ends[1])
            highs[index] = lows[index + 1] = border
    return tuple(
        SlabPlan(
            index=index,
            members=tuple(group),
            offset_mm=centre,
            thickness_mm=max(high - low, 0.0),
            representative=min(group, key=lambda plane: (abs(volume.offsets[plane] - centre), plane)),
        )
        for index, (group, centre, low, high) in enumerate(zip(groups, centres, lows, highs, strict=True))
    )


def foreseen_slabs(volume: Volume, slab_mm: float) -> list[tuple[int, ...]]:
    """The slabs of a volume that is still arriving which `plan_slabs` will most likely make of the whole.

    Most likely, because what is still missing can change the last slab before a hole or the end. Slices that come in
    the order of their numbers, or in several such streams at once, are foreseen right, except for that one.

    Returns:
        Members as in `SlabPlan`, in the order in which the scanner counts; only slabs that have all of theirs.

    Raises:
        ValueError: ``slab_mm`` is not positive.
    """
    if not slab_mm > 0:
        raise ValueError(f"slab_mm must be positive, not {slab_mm}")
    extents = _extents(volume)
    numbers = [plane.instance_number for plane in volume.planes]
    down = _counts_down(volume)
    runs = _runs(extents, slab_mm)
    first = min((number for number in numbers if number is not None), default=None)
    slabs: list[tuple[int, ...]] = []
    for place, run in enumerate([run[::-1] for run in reversed(runs)] if down else runs):
        if extents[run[0]][1] - extents[run[0]][0] >= SINGLE_FRACTION * slab_mm:
            slabs.append(tuple(run))
            continue
        full = _full_groups(run, extents, slab_mm)
        number = numbers[run[0]]
        if full and first is not None and number is not None:
            # What precedes a hole ends a slab in the whole volume where so many slices have been counted.
            full = _full_groups(run[-(number - first) % len(full[0]) :], extents, slab_mm)
        elif place:
            continue
        slabs += [tuple(sorted(group)) for group in full]
    return slabs


def in_context(volume: Volume, slabs: Sequence[tuple[int, ...]], neighbours: int, *, whole: bool) -> list[Context]:
    """Slabs of a volume between the neighbours that a model sees with them.

    Args:
        slabs: members as in `SlabPlan`, in any order.
        neighbours: 1, or 0 for a model that sees a slab alone.
        whole: nothing more comes: where there is no neighbour, at an end or beside a gap, the slab itself stands in for
            it. Else only at the end that has the slice number 1, and a slab that lacks a neighbour is left out.

    Returns:
        The slab below, the slab, and the one above, foot to head, for each slab in the order in which they were given;
        the slab alone where no neighbours are wanted.
    """
    if not neighbours:
        return [(members,) for members in slabs]
    gaps = {gap.after for gap in volume.gaps}
    ends = {members[-1]: members for members in slabs}
    starts = {members[0]: members for members in slabs}
    # Of one plane nobody knows which end it is.
    foot, head = (len(volume.planes) > 1 and volume.planes[end].instance_number == 1 for end in (0, -1))
    contexts: list[Context] = []
    for members in slabs:
        first, last = members[0], members[-1]
        below = ends.get(first - 1) if first - 1 not in gaps else None
        above = starts.get(last + 1) if last not in gaps else None
        if whole or (foot and first == 0):
            below = below or members
        if whole or (head and last == len(volume.planes) - 1):
            above = above or members
        if below and above:
            contexts.append((below, members, above))
    return contexts


def slab_hu(planes: Iterable[NDArray[Any]], where: str) -> NDArray[np.float32]:
    """The mean of a slab's planes: (rows, columns) HU.

    Args:
        planes: at least one, (rows, columns) HU each; added up in their order.
        where: the slab, for the error.

    Raises:
        GeometryError: the planes differ in their number of rows or columns.
    """
    total: NDArray[np.float32] | None = None
    count = 0
    for hu in planes:
        if total is None:
            total = np.array(hu, dtype=np.float32)
        elif hu.shape != total.shape:
            raise GeometryError(
                f"its slices have different sizes: {total.shape} and {hu.shape} rows and columns",
                where,
                "analyse them as separate series",
            )
        else:
            np.add(total, hu, out=total)
        count += 1
    assert total is not None
    return np.divide(total, np.float32(count), out=total)


def _extents(volume: Volume) -> list[tuple[float, float]]:
    """(low, high) in mm along the normal of each plane; a thickness not given is the usual distance."""
    distances = [above - below for below, above in pairwise(volume.offsets)]
    usual = median(distances) if distances else 1.0
    halves = [(plane.geometry.thickness or usual) / 2 for plane in volume.planes]
    return [(offset - half, offset + half) for offset, half in zip(volume.offsets, halves, strict=True)]


def _span(group: list[int], extents: list[tuple[float, float]]) -> tuple[float, float]:
    return min(extents[plane][0] for plane in group), max(extents[plane][1] for plane in group)


def _thickness(group: list[int], extents: list[tuple[float, float]]) -> float:
    low, high = _span(group, extents)
    return high - low


def _runs(extents: list[tuple[float, float]], slab_mm: float) -> list[list[int]]:
    """Stretches of planes that may be averaged with one another: a thick plane alone, thin ones up to a hole."""
    sizes = [high - low for low, high in extents]
    runs: list[list[int]] = [[0]]
    for plane in range(1, len(extents)):
        thin = max(sizes[plane - 1], sizes[plane]) < SINGLE_FRACTION * slab_mm
        hole = extents[plane][0] - extents[plane - 1][1]
        # The volume's own gaps are measured against its usual distance too, and let sparse slices pass.
        if thin and hole <= HOLE_FRACTION * (sizes[plane - 1] + sizes[plane]) / 2:
            runs[-1].append(plane)
        else:
            runs.append([plane])
    return runs


def _counts_down(volume: Volume) -> bool:
    """Whether the instance numbers fall from the feet upwards, as on a scanner that starts at the head."""
    numbers = [plane.instance_number for plane in volume.planes]
    return all(a is not None and b is not None and a > b for a, b in pairwise(numbers)) and len(numbers) > 1


def _full_groups(run: list[int], extents: list[tuple[float, float]], slab_mm: float) -> list[list[int]]:
    """The groups of a run that one more slice would bring no nearer to ``slab_mm``, whether it came or not."""
    if len(run) < 2:
        return []
    groups = _join(run, extents, slab_mm)
    before = _thickness(run[-2:], extents) - _thickness(run[-1:], extents)
    return groups if _thickness(groups[-1], extents) + before / 2 >= slab_mm else groups[:-1]


def _join(run: list[int], extents: list[tuple[float, float]], slab_mm: float) -> list[list[int]]:
    groups = [[run[0]]]
    for plane in run[1:]:
        apart = abs(_thickness(groups[-1], extents) - slab_mm)
        if abs(_thickness([*groups[-1], plane], extents) - slab_mm) < apart:
            groups[-1].append(plane)
        else:
            groups.append([plane])
    return groups


def _divide(run: list[int], extents: list[tuple[float, float]], slab_mm: float) -> list[list[int]]:
    """Cut one run into slabs, from its first plane on."""
    groups = _join(run, extents, slab_mm)
    if len(groups) > 1 and _thickness(groups[-1], extents) < slab_mm / 2:
        last = groups.pop()
        both = groups.pop() + last
        slice_mm = max(high - low for low, high in (extents[plane] for plane in both))
        if _thickness(both, extents) <= slab_mm + slice_mm:
            groups.append(both)
        else:
            halves = [(both[:middle], both[middle:]) for middle in range(1, len(both))]
            groups += min(halves, key=lambda pair: max(_thickness(half, extents) for half in pair))
    return groups
