"""What bleeds and their look-alikes are made with: a block of a head, where a seat is found, and what a mass pushes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, label, map_coordinates, uniform_filter

from .anatomy import Head
from .fields import Array, Volume, enlarge, noise

Mask = NDArray[np.bool_]
Point = tuple[float, float, float]
"""x, y, z in mm, in the head's coordinates."""

_CELL = 5
"""Voxels to the edge of a cell of the grid that displacement is solved on."""
_GIVE_MM2 = 900.0
"""The pressure, as a potential whose slope is displacement, at which fluid has lost 63 % of its room."""


class NoRoom(ValueError):
    """This head has no place for what was asked for."""


@dataclass(frozen=True, slots=True)
class Box:
    """A block of a head's grid.

    Attributes:
        at: its slices of the grid (z, y, x).
        x, y, z: coordinates in mm of its voxels; each spans its own axis alone, so that they broadcast.
    """

    at: tuple[slice, slice, slice]
    x: Volume
    y: Volume
    z: Volume

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.z.size, self.y.size, self.x.size

    def away(self, point: Point, stretch: Point = (1.0, 1.0, 1.0)) -> Volume:
        """Distance in mm from a point, where each axis is divided by its stretch."""
        x, y, z = ((axis - p) / s for axis, p, s in zip((self.x, self.y, self.z), point, stretch, strict=True))
        return np.asarray(np.sqrt(x * x + y * y + z * z), dtype=np.float32)

    def near(self, point: Point) -> tuple[int, int, int]:
        """The index (z, y, x) in the block of the voxel next to a point."""
        x, y, z = point
        return round(z - self.z.flat[0]), round(y - self.y.flat[0]), round(x - self.x.flat[0])


def voxel(head: Head, point: Point) -> tuple[int, int, int]:
    """The index (z, y, x) in the head of the voxel next to a point."""
    x, y, z = point
    return round(z - head.origin_mm[0]), round(y - head.origin_mm[1]), round(x - head.origin_mm[2])


def box(head: Head, centre: Point, reach_mm: float) -> Box:
    """The block of the head's grid that reaches some way about a point to all sides."""
    ends = []
    for origin, length, middle in zip(head.origin_mm, head.hu.shape, reversed(centre), strict=True):
        low = int(np.clip(np.floor(middle - reach_mm - origin), 0, length - 2))
        ends.append((low, int(np.clip(np.ceil(middle + reach_mm - origin) + 1, low + 2, length))))
    return _box(head, ends)


def bounds(head: Head, inside: Mask) -> Box:
    """The smallest block about what is inside, which must not be empty."""
    ends = []
    for axis in range(3):
        there = np.flatnonzero(inside.any(axis=tuple(a for a in range(3) if a != axis)))
        ends.append((int(there[0]), int(there[-1]) + 1))
    return _box(head, ends)


def _box(head: Head, ends: list[tuple[int, int]]) -> Box:
    z, y, x = (
        (origin + np.arange(low, high)).astype(np.float32)
        for origin, (low, high) in zip(head.origin_mm, ends, strict=True)
    )
    at = (slice(*ends[0]), slice(*ends[1]), slice(*ends[2]))
    return Box(at, x[None, None, :], y[None, :, None], z[:, None, None])


def seat(
    rng: np.random.Generator,
    head: Head,
    fits: Callable[[tuple[NDArray[np.intp], ...]], Mask],
    near: Point | None = None,
    spread_mm: float = 0.0,
) -> Point:
    """A voxel, drawn evenly or about a point, of those that fit.

    Args:
        rng: draws the candidates.
        head: where they lie.
        fits: which of the voxels at these indices (z, y, x), to be used on the head's volumes, will do.
        near: about where, if that matters.
        spread_mm: how far from there; it grows until something fits.

    Raises:
        NoRoom: nothing fits in the whole head.
    """
    shape = np.array(head.hu.shape)
    for attempt in range(60):
        if near is None:
            drawn = rng.integers(0, shape, (20000, 3))
        else:
            spread = spread_mm * 1.1**attempt
            middle = np.array(near[::-1]) - head.origin_mm
            drawn = np.rint(middle + spread * rng.standard_normal((300, 3))).astype(np.int64)
            drawn = np.clip(drawn, 0, shape - 1)
        indices = tuple(drawn.T)
        good = np.flatnonzero(fits(indices))
        if good.size:
            z, y, x = (float(i) + o for i, o in zip(drawn[good[0]], head.origin_mm, strict=True))
            return x, y, z
    raise NoRoom("this head has no place for it")


def coordinates(head: Head, at: tuple[NDArray[np.intp], ...]) -> tuple[Array, Array, Array]:
    """x, y and z in mm of voxels by index (z, y, x)."""
    z, y, x = (index + origin for index, origin in zip(at, head.origin_mm, strict=True))
    return x, y, z


def lowest(priority: Volume, room: Mask, count: int) -> float:
    """The level under which a field holds ``count`` voxels of the room, or the whole room where that is less.

    Raises:
        NoRoom: there is none.
    """
    values = priority[room]
    if not values.size:
        raise NoRoom("no room at all")
    count = min(count, values.size)
    return float(np.partition(values, count - 1)[count - 1])


def displace(head: Head, truth: NDArray[np.uint8] | None, where: Box, growth: Volume) -> None:
    """Push aside, in place, what lies about something that grew; the skull stays where it is.

    Tissue yields as a fluid would that wells up where there is growth and seeps away in ventricles, sulci and cisterns,
    the more the higher the pressure: near ones close first, and none leaves through the skull.

    Args:
        head: its ``hu``, ``brain``, ``grey``, ``ventricle`` and ``subarachnoid`` move.
        truth: moves with them, if there is one.
        where: the block that ``growth`` fills.
        growth: new volume in each voxel, mL per mL; negative where tissue has shrunk.
    """
    cavity = bounds(head, head.table_mm > 0)
    first = [s.start for s in cavity.at]
    shape = tuple(-(-(n + _CELL) // _CELL) for n in cavity.shape)

    def coarse(volume: Volume, at: tuple[slice, ...]) -> Volume:
        """Means over cells; cells begin at the cavity's first voxel."""
        whole = np.zeros([n * _CELL for n in shape], dtype=np.float32)
        into, out = [], []
        for s, begin, n in zip(at, first, whole.shape, strict=True):
            low, high = max(s.start, begin), min(s.stop, begin + n)
            into.append(slice(low - begin, high - begin))
            out.append(slice(low - s.start, high - s.start))
        whole[tuple(into)] = volume[tuple(out)]
        cells = whole.reshape(shape[0], _CELL, shape[1], _CELL, shape[2], _CELL)
        return np.asarray(cells.mean(axis=(1, 3, 5)))

    table = head.table_mm[cavity.at]
    inside = coarse((table > 0).astype(np.float32), cavity.at)
    fluid = coarse(head.ventricle[cavity.at] + head.subarachnoid[cavity.at], cavity.at)
    flow = _flow(inside, fluid, coarse(growth, where.at))
    strong = np.maximum.reduce([np.abs(part) for part in flow]) > 0.35
    if not strong.any():
        return
    ends = [np.flatnonzero(strong.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    cells = tuple(slice(max(int(e[0]) - 1, 0), min(int(e[-1]) + 2, n)) for e, n in zip(ends, shape, strict=True))
    # From the middle of the first cell to the middle of the last, or to the grid's end.
    starts = [begin + c.start * _CELL + _CELL // 2 for begin, c in zip(first, cells, strict=True)]
    full = tuple((c.stop - c.start - 1) * _CELL + 1 for c in cells)
    block = tuple(slice(s, min(s + n, end)) for s, n, end in zip(starts, full, head.hu.shape, strict=True))
    size = tuple(s.stop - s.start for s in block)
    table = head.table_mm[block]
    moved = [enlarge(part[cells], (full[0], full[1], full[2]))[tuple(slice(0, n) for n in size)] for part in flow]
    clear = (table > 0) & (head.bone[block] < 0.05)
    held = np.clip(table / 3, 0, 1) * clear
    for part in moved:
        part *= held
    far = np.flatnonzero(moved[0] ** 2 + moved[1] ** 2 + moved[2] ** 2 > 0.3**2)
    source = np.empty((3, far.size), dtype=np.float32)
    for axis, (to, part) in enumerate(zip(np.unravel_index(far, size), moved, strict=True)):
        np.clip(to - part.ravel()[far], 0, size[axis] - 1, out=source[axis])
    nearest = np.ravel_multi_index(np.rint(source).astype(np.intp), size)
    hu = np.where(clear, head.hu[block], np.float32(head.fluid_hu))  # bone does not come along
    head.hu[block] = _replaced(head.hu[block], far, map_coordinates(hu, source, order=1))
    still: tuple[NDArray[Any], ...] = () if truth is None else (truth,)
    for volume in (head.brain, head.grey, head.ventricle, head.subarachnoid, *still):
        volume[block] = _replaced(volume[block], far, volume[block].ravel()[nearest])


def _replaced(part: NDArray[Any], at: NDArray[np.intp], values: NDArray[Any]) -> NDArray[Any]:
    """A copy, C-ordered, with other values at flat indices."""
    copy = part.copy()
    copy.ravel()[at] = values
    return copy


def _flow(inside: Volume, fluid: Volume, growth: Volume) -> tuple[Volume, Volume, Volume]:
    """Displacement in mm along z, y and x, from the pressure that growth makes (conjugate gradients)."""
    faces = []
    for axis in range(3):
        lower, upper = _halves(axis)
        faces.append(np.asarray(np.minimum(inside[lower], inside[upper]) / np.float32(_CELL**2), dtype=np.float32))
    pressure = np.zeros_like(inside)
    for _ in range(3):  # fluid that has gone gives no more: pressure then reaches farther
        spent = np.abs(pressure) / np.float32(_GIVE_MM2) + np.float32(1e-3)
        give = fluid * (1 - np.exp(-spent)) / (spent * np.float32(_GIVE_MM2)) + np.float32(1e-5) * (inside > 0)
        pressure = _pressure(faces, give, growth * (inside > 0), pressure)
    flow = []
    for axis, face in enumerate(faces):
        lower, upper = _halves(axis)
        slope = np.where(face > 0, (pressure[lower] - pressure[upper]) / np.float32(_CELL), np.float32(0))
        total = np.zeros_like(inside)
        total[lower] += slope / 2
        total[upper] += slope / 2
        flow.append(total)
    return flow[0], flow[1], flow[2]


def _pressure(faces: list[Volume], give: Volume, growth: Volume, guess: Volume) -> Volume:
    """What holds growth, what gives way and what flows on in balance (conjugate gradients, from a guess)."""
    diagonal = give.copy()
    for axis, face in enumerate(faces):
        lower, upper = _halves(axis)
        diagonal[lower] += face
        diagonal[upper] += face
    diagonal[diagonal == 0] = 1

    def apply(pressure: Volume) -> Volume:
        out = give * pressure
        for axis, face in enumerate(faces):
            lower, upper = _halves(axis)
            through = face * (pressure[lower] - pressure[upper])
            out[lower] += through
            out[upper] -= through
        return out

    pressure = guess.copy()
    rest = growth - apply(pressure)
    ahead = rest / diagonal
    size = float((rest * ahead).sum())
    enough = 1e-5 * float((growth * growth / diagonal).sum())
    for _ in range(150):
        if size <= enough:
            break
        pushed = apply(ahead)
        step = np.float32(size / float((ahead * pushed).sum()))
        pressure += step * ahead
        rest -= step * pushed
        toward = rest / diagonal
        size, last = float((rest * toward).sum()), size
        ahead = toward + np.float32(size / last) * ahead
    return pressure


def _halves(axis: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Every cell with a neighbour after it along an axis, and that neighbour."""
    lower, upper = [slice(None)] * 3, [slice(None)] * 3
    lower[axis], upper[axis] = slice(None, -1), slice(1, None)
    return tuple(lower), tuple(upper)


def swell_scalp(rng: np.random.Generator, head: Head, over: Point, high_mm: float, wide_mm: float, hu: float) -> None:
    """Raise the scalp over a point of the skull, in place, with blood or fluid under it.

    Args:
        rng: draws its unevenness.
        head: its ``hu`` changes outside the skull alone.
        over: on the skull or near it.
        high_mm: at its middle.
        wide_mm: its radius.
        hu: of what has gathered.
    """
    where = box(head, over, wide_mm + high_mm + 16)
    image, outside = head.hu[where.at], head.table_mm[where.at] < -0.5
    along = where.away(over) ** 2 - head.table_mm[where.at] ** 2
    bulge = (
        high_mm * np.clip(1 - along / wide_mm**2, 0, 1) ** 1.5 * np.clip(1 + 0.15 * noise(rng, where.shape, 16), 0, 2)
    )
    flesh = image > -300
    air, _ = label(~flesh)
    above = np.asarray(distance_transform_edt(~flesh), dtype=np.float32)
    # The air of the room, not that in the skull: it holds what lies farthest out.
    new = (above < bulge) & outside & (air == air.flat[np.argmin(np.where(flesh, 0, head.table_mm[where.at]))]) & ~flesh
    deep = uniform_filter((flesh | new).astype(np.float32), 7)  # a half at the skin, 1 under 3 mm of it
    swollen = (flesh | new) & outside & (bulge > 0.5)
    image[new] = np.where(deep[new] < 0.72, 15.0, -50.0)
    gathered = np.clip((deep - 0.85) / 0.12, 0, 1) * np.clip(bulge / 3, 0, 1) * swollen
    gathered *= np.clip(1 - 4 * head.bone[where.at], 0, 1)
    image += (np.float32(hu) + 4 * noise(rng, where.shape, 6) - image) * gathered
