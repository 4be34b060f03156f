"""What real heads hold that is bright, dark or of metal and is no haemorrhage."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from .anatomy import Head
from .fields import Volume, mix, noise, soft, tube
from .masses import Box, Mask, Point, bounds, box, coordinates, displace, seat, swell_scalp, voxel

_Link = tuple[float, float, float, float]
"""x, y, z and radius in mm of a vessel."""

_ARTERIES: tuple[tuple[_Link, ...], ...] = (  # of the left, and of the middle
    ((12, 0, -30, 2.0), (11, -6, -24, 2.0), (9, -4, -17, 1.7), (20, -4, -16, 1.5), (32, -1, -14, 1.4)),
    ((32, -1, -14, 1.3), (40, 2, -6, 1.1), (42, 12, 6, 1.0), (43, 24, 16, 0.9)),
    ((9, -4, -17, 1.3), (2, -11, -15, 1.2), (1.5, -30, -10, 1.1), (1.5, -38, 6, 1.0), (1.5, -24, 26, 0.9)),
    ((0, 24, -48, 1.6), (0, 12, -34, 1.7), (0, 12, -22, 1.7)),
    ((0, 12, -21, 1.4), (10, 16, -17, 1.3), (21, 29, -10, 1.2), (18, 48, 0, 1.0)),
)
_DEEP_VEINS: tuple[_Link, ...] = ((1.5, 8, 10, 0.9), (1.5, 34, 11, 1.1), (0, 42, 8, 2.2))
_FORKS: tuple[Point, ...] = (  # where aneurysms are
    (1, -11, -15),
    (9, -4, -17),
    (32, -1, -14),
    (0, 12, -22),
)
_LOBES: tuple[Point, ...] = ((34, -36, 26), (46, 10, -16), (34, 42, 38), (26, 76, 8), (24, 60, -36))
_AT_THE_FALX: tuple[Point, ...] = ((12, 60, 8), (12, 60, 8), (10, -36, 34))
"""Territories of the posterior and the anterior cerebral artery: where they are lost, falx and straight sinus look
bright beside them.
"""


def add(rng: np.random.Generator, head: Head, kind: str) -> None:
    """Give a head a look-alike, before it bleeds.

    Args:
        rng: everything is drawn from it.
        head: changed in place: ``hu``, ``bone`` where the skull was opened, and what a tumour or an infarct moves.
        kind: one of `KINDS`.

    Raises:
        ValueError: no such kind.
        NoRoom: the head has no place for it.
    """
    if kind not in _PAINTERS:
        raise ValueError(f"no look-alike {kind!r}; there are {', '.join(KINDS)}")
    _PAINTERS[kind](rng, head)


def draw_kinds(rng: np.random.Generator, age: int) -> tuple[str, ...]:
    """Which look-alikes a patient of some age in an emergency department has, whether or not they bleed."""
    late = float(np.clip((age - 40) / 45, 0, 1))
    chances = {
        "calcified falx": 0.05 + 0.25 * late,
        "choroid plexus": 0.55 + 0.35 * late,
        "pineal": 0.55 + 0.2 * late,
        "basal ganglia": 0.03 + 0.15 * late,
        "calcified artery": 0.05 + 0.6 * late,
        "old infarct": 0.03 + 0.22 * late,
        "fresh infarct": 0.02 + 0.06 * late,
        "tumour": 0.03 + 0.03 * late,
        "contrast": 0.05,
        "dense sinus": 0.05,
        "dense artery": 0.04,
        "clip": 0.012,
        "coil": 0.015,
        "drain": 0.025,
        "craniotomy": 0.035,
        "dental metal": 0.08 + 0.08 * late,
        "scalp haematoma": 0.12,
    }
    return tuple(kind for kind in KINDS if rng.random() < chances[kind])


def _blob(
    rng: np.random.Generator, head: Head, centre: Point, radius_mm: float, hu: float, stretch: Point = (1, 1, 1)
) -> None:
    """Something small and uneven, inside the skull."""
    where = box(head, centre, 1.6 * radius_mm * max(stretch) + 3)
    grain = noise(rng, where.shape, max(2.5, radius_mm))
    inside = radius_mm * (1 + 0.2 * grain) - where.away(centre, stretch)
    level = hu * np.clip(1 + 0.25 * noise(rng, where.shape, 3), 0.4, 1.6)
    mix(head.hu[where.at], level, soft(inside, 1.2) * (head.table_mm[where.at] > 0))


def _side(rng: np.random.Generator) -> float:
    return float(rng.choice((-1, 1)))


def _near(rng: np.random.Generator, point: Point, spread_mm: float) -> Point:
    x, y, z = (p + spread_mm * float(rng.normal()) for p in point)
    return x, y, z


def _level(rng: np.random.Generator, low: float, high: float) -> float:
    """HU, evenly over its logarithm."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _falx(rng: np.random.Generator, head: Head) -> None:
    """Plaques in the falx, and at times at the tentorium's edge."""
    for _ in range(int(rng.integers(1, 5))):
        tentorium = rng.random() < 0.2

        def fits(at: tuple[NDArray[np.intp], ...], tentorium: bool = tentorium) -> Mask:
            across, above = np.abs(head.midline_mm[at]), head.tentorium_mm[at]
            table = head.table_mm[at]
            _, y, z = coordinates(head, at)
            if tentorium:
                return np.asarray((np.abs(above) < 1) & (table > 3) & (table < 60) & (y > 22) & (across > 10))
            return np.asarray((across < 0.8) & (table > 2) & (table < 28) & (z > 8) & (above > 5))

        point = seat(rng, head, fits)
        radius = float(rng.uniform(2, 12))
        where = box(head, point, radius + 4)
        sheet = np.abs(head.tentorium_mm[where.at] if tentorium else head.midline_mm[where.at])
        thick = float(rng.uniform(0.7, 1.2 + 0.15 * radius))
        away = where.away(point) * (1 + 0.25 * noise(rng, where.shape, 6))
        covered = soft(np.minimum(thick * np.sqrt(np.clip(1 - away / radius, 0, 1)) - sheet, 1), 1.0)
        level = _level(rng, 80, 700) * np.clip(1 + 0.2 * noise(rng, where.shape, 4), 0.5, 1.5)
        mix(head.hu[where.at], level, covered * (away < radius) * (head.table_mm[where.at] > 0))


def _plexus(rng: np.random.Generator, head: Head) -> None:
    """The glomus on both sides, or on one."""
    radius, level = float(rng.uniform(1.2, 4.5)), _level(rng, 60, 350)
    for side in (-1.0, 1.0):
        if rng.random() < 0.1:
            continue
        point = seat(rng, head, lambda at: head.ventricle[at] > 0.6, (side * 22, 38, 10), 3)
        _blob(rng, head, point, radius * float(rng.uniform(0.7, 1.3)), level, (0.8, 1.3, 1.2))


def _pineal(rng: np.random.Generator, head: Head) -> None:
    _blob(rng, head, _near(rng, (0, 29, 2), 1.5), float(rng.uniform(1, 3.8)), _level(rng, 70, 400))


def _ganglia(rng: np.random.Generator, head: Head) -> None:
    """The globus pallidus of both sides, faint or dense, in specks; in few the dentate nuclei too."""
    level, radius = _level(rng, 45, 180), float(rng.uniform(2, 5))
    places: list[Point] = [(18, 3, 0)]
    if rng.random() < 0.15:
        places.append((16, 58, -34))
    for x, y, z in places:
        for side in (-1.0, 1.0):
            point = _near(rng, (side * x, y, z), 1.2)
            where = box(head, point, 2 * radius + 3)
            inside = radius * (1 + 0.3 * noise(rng, where.shape, 4)) - where.away(point, (0.8, 1.3, 1.0))
            specks = np.clip(0.55 + 0.5 * noise(rng, where.shape, 3), 0, 1)
            mix(head.hu[where.at], level, soft(inside, 2.0) * specks * head.brain[where.at])


def _wall(rng: np.random.Generator, head: Head) -> None:
    """Lime in the walls of carotid and basilar arteries."""
    for side in (-1.0, 1.0):
        for _ in range(int(rng.integers(0, 3)) + (side > 0)):
            point = _near(rng, (side * 11, float(rng.uniform(-8, 2)), -25), 1.5)
            _blob(rng, head, point, float(rng.uniform(0.8, 2.0)), _level(rng, 120, 700), (0.7, 1.4, 1.0))
    if rng.random() < 0.3:
        _blob(rng, head, _near(rng, (0, 13, -32), 1.5), float(rng.uniform(0.8, 1.6)), _level(rng, 100, 400))


def _in_brain(head: Head, least_mm: float) -> Callable[[tuple[NDArray[np.intp], ...]], Mask]:
    return lambda at: np.asarray((head.brain[at] > 0.8) & (head.table_mm[at] > least_mm))


def _lobe(rng: np.random.Generator, head: Head, least_mm: float) -> Point:
    return _near_one(rng, head, _LOBES, least_mm)


def _near_one(rng: np.random.Generator, head: Head, points: tuple[Point, ...], least_mm: float) -> Point:
    x, y, z = points[int(rng.integers(len(points)))]
    return seat(rng, head, _in_brain(head, least_mm), (_side(rng) * x, y, z), 9)


def _beside(head: Head, where: Box, point: Point) -> Mask:
    """Voxels that neither falx nor tentorium parts from a point."""
    at = voxel(head, point)
    same = (head.midline_mm[where.at] * head.midline_mm[at] > 0) & (head.table_mm[where.at] > 0)
    return np.asarray(same & (head.tentorium_mm[where.at] * head.tentorium_mm[at] > 0))


def _old_infarct(rng: np.random.Generator, head: Head) -> None:
    """Lacunes, or a lost territory that its ventricle and sulci widen into."""
    if rng.random() < 0.55:
        for _ in range(int(rng.integers(1, 4))):
            point = seat(rng, head, _in_brain(head, 12), (_side(rng) * 22, 4, 8), 9)
            where = box(head, point, 10)
            inside = float(rng.uniform(1.5, 5)) * (1 + 0.25 * noise(rng, where.shape, 4)) - where.away(point)
            gone = soft(inside, 2.0) * head.brain[where.at]
            mix(head.hu[where.at], head.fluid_hu + float(rng.uniform(2, 10)), gone)
        return
    point = _near_one(rng, head, _AT_THE_FALX if rng.random() < 0.5 else _LOBES, 4)
    radius = float(rng.uniform(10, 32))
    where = box(head, point, 1.9 * radius + 4)
    away = where.away(point, (1.0, 1.15, 0.9)) * np.exp(0.2 * noise(rng, where.shape, 14))
    lost = soft(radius - away, 6.0) * _beside(head, where, point)
    displace(head, None, where, np.float32(-rng.uniform(0.1, 0.4)) * lost)
    lost = lost * head.brain[where.at]
    lost *= np.clip(rng.uniform(0.6, 1.1) + 0.15 * noise(rng, where.shape, 8), 0, 1)
    if rng.random() < 0.6:  # some of the cortex is left, and looks bright for what surrounds it
        left = np.clip(rng.uniform(0, 0.8) + 0.5 * noise(rng, where.shape, 9), 0, 1)
        lost *= 1 - head.grey[where.at] * np.asarray(left, dtype=np.float32)
    mix(head.hu[where.at], head.fluid_hu + float(rng.uniform(2, 8)), lost)


def _fresh_infarct(rng: np.random.Generator, head: Head) -> None:
    """A swollen territory, somewhat darker than brain, its cortex no brighter than the rest."""
    point = _lobe(rng, head, 4)
    radius = float(rng.uniform(12, 38))
    where = box(head, point, 1.9 * radius + 4)
    away = where.away(point, (1.0, 1.15, 0.9)) * np.exp(0.18 * noise(rng, where.shape, 16))
    wet = soft(radius - away, 5.0) * _beside(head, where, point)
    displace(head, None, where, np.float32(rng.uniform(0, 0.12)) * wet)
    level = head.white_hu - float(rng.uniform(2, 9)) + 1.5 * noise(rng, where.shape, 9)
    mix(head.hu[where.at], level, wet * head.brain[where.at] * np.float32(rng.uniform(0.6, 1)))


def _tumour(rng: np.random.Generator, head: Head) -> None:
    """A meningioma on the dura; or a glioma or metastasis, with a rim, or dense throughout; oedema about either."""
    radius = float(rng.uniform(4, 20))
    meningioma = rng.random() < 0.45
    if meningioma:

        def fits(at: tuple[NDArray[np.intp], ...]) -> Mask:
            across, table = np.abs(head.midline_mm[at]), head.table_mm[at]
            _, _, z = coordinates(head, at)
            on_falx = (across > 1) & (across < 3) & (table < 25) & (z > 10)
            return np.asarray((table > 1) & (z > -30) & (on_falx | ((table < 3) & (across > 8))))

        point = seat(rng, head, fits)
    else:
        point = _lobe(rng, head, 6)
    where = box(head, point, 2.2 * radius + 14)
    rough = 0.06 if meningioma else 0.16
    away = where.away(point, (1.0, 1.0, 1.0)) * np.exp(rough * noise(rng, where.shape, max(5.0, 0.8 * radius)))
    inside = radius - away
    within = _beside(head, where, point) & (head.bone[where.at] < 0.5)
    displace(head, None, where, np.float32(0.75) * (within & (inside > 0)))
    wide = float(rng.uniform(0, 0.5 if meningioma else 1.1)) * radius + 1
    fingers = np.exp(-np.maximum(-inside, 0) / wide) * (1 + 0.3 * noise(rng, where.shape, 8))
    wet = np.clip(1.4 * fingers, 0, 1) * head.brain[where.at] * (1 - 0.75 * head.grey[where.at]) * within
    image = head.hu[where.at]
    mix(image, head.white_hu - float(rng.uniform(6, 14)), wet)
    level = np.full(where.shape, head.grey_hu + rng.uniform(2, 20 if meningioma else 14), dtype=np.float32)
    level += 1.5 * noise(rng, where.shape, 5)
    if not meningioma and radius > 7 and rng.random() < 0.6:  # dead within
        mix(level, head.fluid_hu + float(rng.uniform(4, 14)), soft(inside - rng.uniform(2.5, 6), 2.5))
    if rng.random() < 0.2:
        specks = np.clip(noise(rng, where.shape, 4) - 0.6, 0, 1)
        mix(level, _level(rng, 100, 400), specks)
    mix(image, level, soft(inside, 1.5) * within)


def _vessel(head: Head, links: tuple[_Link, ...], hu: float, wider: float = 1.0) -> None:
    chain = np.array(links)
    low, high = chain[:, :3].min(axis=0), chain[:, :3].max(axis=0)
    x, y, z = ((low + high) / 2).tolist()
    where = box(head, (x, y, z), float((high - low).max()) / 2 + 4)
    links = tuple((a, b, c, r * wider) for a, b, c, r in links)
    inside = tube(where.x, where.y, where.z, links)
    mix(head.hu[where.at], hu, soft(inside, 1.0) * (head.table_mm[where.at] > 0))


def _arteries(rng: np.random.Generator) -> list[tuple[_Link, ...]]:
    """Both sides' arteries, bent a little."""
    courses = []
    for side in (-1.0, 1.0):
        for course in _ARTERIES:
            dx, dy, dz = 1.2 * rng.standard_normal(3)
            courses.append(tuple((side * x + dx, y + dy, z + dz, r) for x, y, z, r in course))
    return courses


def _sinuses(rng: np.random.Generator, head: Head, hu: float) -> None:
    """The sagittal, straight and transverse sinuses, filled."""
    where = bounds(head, head.table_mm > 0)
    table, across, above = head.table_mm[where.at], head.midline_mm[where.at], head.tentorium_mm[where.at]
    inside = np.float32(rng.uniform(2.8, 4.2)) - np.hypot(across * 0.85, table - 2.5)
    inside = np.where((above > 3) & (where.z > 0), inside, np.float32(-9))
    straight = np.float32(rng.uniform(1.6, 2.6)) - np.hypot(across, above)
    inside = np.maximum(inside, np.where((where.y > 46) & (table > 2), straight, np.float32(-9)))
    fuller = np.float32(rng.normal(0, 0.7)) * np.sign(across)  # the right one is mostly the larger
    cross = np.float32(rng.uniform(2.4, 3.8)) + fuller - np.hypot(above, table - 3)
    inside = np.maximum(inside, np.where(where.y > 30, cross, np.float32(-9)))
    mix(head.hu[where.at], hu, soft(inside, 1.2) * (table > 0) * (1 - head.bone[where.at]))


def _contrast(rng: np.random.Generator, head: Head) -> None:
    """Iodine in arteries, veins and sinuses, in the plexus and, faintly, in all that has blood."""
    hu = _level(rng, 120, 300)
    head.hu += np.float32(0.02 * hu) * head.brain * (0.4 + 0.6 * head.grey)
    for course in _arteries(rng):
        _vessel(head, course, hu)
    _sinuses(rng, head, hu * float(rng.uniform(0.6, 1)))
    for side in (-1.0, 1.0):
        _vessel(head, tuple((side * x, y, z, r) for x, y, z, r in _DEEP_VEINS), 0.8 * hu)
        point = seat(rng, head, lambda at: head.ventricle[at] > 0.6, (side * 22, 38, 10), 3)
        _blob(rng, head, point, float(rng.uniform(2, 4.5)), 0.5 * hu, (0.7, 1.5, 1.2))


def _dense_sinus(rng: np.random.Generator, head: Head) -> None:
    """Thick blood, or a clot, in the sinuses."""
    _sinuses(rng, head, float(rng.uniform(60, 85)))


def _dense_artery(rng: np.random.Generator, head: Head) -> None:
    """A clot in one artery; or thick blood in all."""
    hu, courses = float(rng.uniform(50, 80)), _arteries(rng)
    chosen = courses if rng.random() < 0.3 else [courses[int(rng.choice((0, 1, 3, 5, 6)))]]
    for course in chosen:
        _vessel(head, course, hu, float(rng.uniform(0.9, 1.2)))


def _fork(rng: np.random.Generator) -> Point:
    x, y, z = _FORKS[int(rng.integers(len(_FORKS)))]
    return _near(rng, (_side(rng) * x, y, z), 1.5)


def _clip(rng: np.random.Generator, head: Head) -> None:
    """One clip or more at an aneurysm, with the way in at times."""
    x, y, z = _fork(rng)
    for _ in range(int(rng.integers(1, 4))):
        dx, dy, dz = 4 * rng.standard_normal(3)
        start = _near(rng, (x, y, z), 2.0)
        end = (start[0] + dx, start[1] + dy, start[2] + dz)
        radius = float(rng.uniform(0.8, 1.4))
        _vessel(head, ((*start, radius), (*end, radius)), float(rng.uniform(3500, 8000)))
    if rng.random() < 0.7:
        _craniotomy(rng, head)


def _coil(rng: np.random.Generator, head: Head) -> None:
    """A ball of platinum in an aneurysm."""
    _blob(rng, head, _fork(rng), float(rng.uniform(2, 5.5)), float(rng.uniform(6000, 15000)))


def _drain(rng: np.random.Generator, head: Head) -> None:
    """A catheter through a hole in the frontal bone into the ventricle."""
    side = _side(rng)
    tip = seat(rng, head, lambda at: head.ventricle[at] > 0.7, (side * 9, -16, 8), 4)
    hole = _surface_near(rng, head, (side * 30, -22, 62), 8)
    outward = [h + 0.22 * (h - t) for h, t in zip(hole, tip, strict=True)]
    middle = [(t + o) / 2 for t, o in zip(tip, outward, strict=True)]
    length = float(np.linalg.norm(np.subtract(outward, tip)))
    where = box(head, (middle[0], middle[1], middle[2]), length / 2 + 8)
    line = tube(where.x, where.y, where.z, ((*tip, 0.0), (outward[0], outward[1], outward[2], 0.0)))
    image = head.hu[where.at]
    _open(head, where, soft(rng.uniform(3, 6) + line, 1.0), 30.0)
    held = (image > -400) | (head.table_mm[where.at] > 0)
    mix(image, float(rng.uniform(110, 320)), soft(rng.uniform(1.0, 1.5) + line, 1.0) * held)


def _open(head: Head, where: Box, hole: Volume, hu: float) -> None:
    """Take the skull's bone away, in place, and leave something soft of some HU."""
    gone = hole * np.clip(2 * head.bone[where.at], 0, 1)
    mix(head.hu[where.at], hu, gone)
    head.bone[where.at] *= 1 - hole


def _surface_near(rng: np.random.Generator, head: Head, near: Point, spread_mm: float) -> Point:
    return seat(rng, head, lambda at: np.abs(head.table_mm[at]) < 1.0, near, spread_mm)


def _craniotomy(rng: np.random.Generator, head: Head) -> None:
    """A flap of the skull sawn out and put back with plates; at times it is left out."""
    x, y, z = ((52, -22, 12), (34, -52, 28), (48, 34, 40), (24, 84, -30))[int(rng.integers(4))]
    point = _surface_near(rng, head, (_side(rng) * x, y, z), 6)
    radius = float(rng.uniform(16, 36))
    where = box(head, point, radius + 22)
    along = np.sqrt(np.maximum(where.away(point) ** 2 - head.table_mm[where.at] ** 2, 0))
    along = along * (1 + 0.1 * noise(rng, where.shape, 40))
    rim = np.abs(along - radius)
    if rng.random() < 0.2:
        _open(head, where, soft(radius - along, 1.5), 28.0)
        return
    skull = head.bone[where.at] > 0.5
    _open(head, where, soft(rng.uniform(0.6, 1.3) - rim, 1.0), 25.0)
    image = head.hu[where.at]
    off = np.asarray(distance_transform_edt(~skull), dtype=np.float32)
    outer = (off > 0) & (off < 1.6) & (head.table_mm[where.at] < -2)
    spots = np.argwhere(outer & (rim < 1))
    for spot in spots[rng.integers(0, len(spots), 4)] if len(spots) else ():
        k, j, i = (int(v) for v in spot)
        at = (float(where.x[0, 0, i]), float(where.y[0, j, 0]), float(where.z[k, 0, 0]))
        near = where.away(at)
        if rng.random() < 0.6:
            _open(head, where, soft(rng.uniform(3, 6) - near, 1.0), 25.0)
        mix(image, float(rng.uniform(1800, 4000)), soft(rng.uniform(3, 7) - near, 1.0) * outer)


def _dental(rng: np.random.Generator, head: Head) -> None:
    """Fillings and crowns, at the foot of the head or below what is scanned."""
    z = max(head.origin_mm[0] + 3, -84.0)
    for _ in range(int(rng.integers(1, 6))):
        turn, arch = rng.uniform(-1.2, 1.2), rng.uniform(22, 27)
        point = (float(arch * np.sin(turn)), float(-56 - 26 * np.cos(turn)), z + float(rng.uniform(0, 6)))
        where = box(head, point, 8)
        inside = float(rng.uniform(1.5, 4)) - where.away(point, (1.0, 1.0, 1.3))
        mix(head.hu[where.at], float(rng.uniform(4000, 12000)), soft(inside, 1.0))


def _scalp(rng: np.random.Generator, head: Head) -> None:
    """Blood under the scalp: outside the skull, so no intracranial haemorrhage."""

    def fits(at: tuple[NDArray[np.intp], ...]) -> Mask:
        _, _, z = coordinates(head, at)
        return np.asarray((np.abs(head.table_mm[at]) < 1) & (z > -15))

    high, wide = float(rng.uniform(4, 15)), float(rng.uniform(14, 34))
    swell_scalp(rng, head, seat(rng, head, fits), high, wide, float(rng.uniform(35, 75)))


_PAINTERS: dict[str, Callable[[np.random.Generator, Head], None]] = {
    "old infarct": _old_infarct,
    "fresh infarct": _fresh_infarct,
    "tumour": _tumour,
    "calcified falx": _falx,
    "choroid plexus": _plexus,
    "pineal": _pineal,
    "basal ganglia": _ganglia,
    "calcified artery": _wall,
    "contrast": _contrast,
    "dense sinus": _dense_sinus,
    "dense artery": _dense_artery,
    "clip": _clip,
    "coil": _coil,
    "drain": _drain,
    "craniotomy": _craniotomy,
    "dental metal": _dental,
    "scalp haematoma": _scalp,
}
KINDS = tuple(_PAINTERS)
"""In the order that they are best added in: what moves tissue comes first."""
