"""Bleeds, each shaped by how it comes about, painted into a head and into what is true of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d, uniform_filter, uniform_filter1d
from scipy.special import ndtr, ndtri

from .anatomy import Head
from .fields import Volume, noise
from .masses import Box, Mask, NoRoom, Point, bounds, box, coordinates, displace, lowest, seat, swell_scalp, voxel

SUBTYPES = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")
"""In the order of the model's labels; a mask holds 1 + the position here."""


@dataclass(frozen=True, slots=True)
class Bleed:
    """One haemorrhage.

    Attributes:
        subtype: one of `SUBTYPES`.
        volume_ml: of its mask, which is what counts; at the skull more is painted.
        hu: mean attenuation over its mask, as a slab of 5 mm shows it.
        age: "hyperacute", "acute", "subacute" or "isodense" (near that of grey matter).
    """

    subtype: str
    volume_ml: float
    hu: float
    age: str


@dataclass(frozen=True, slots=True)
class Statistics:
    """Quantiles, at `LEVELS`, of the real lesions of one subtype.

    Attributes:
        volume_ml: of one lesion.
        hu: its mean.
        lesions: how many a study has that has any.
        brighter: correlation between HU and the logarithm of the volume.
    """

    volume_ml: tuple[float, ...]
    hu: tuple[float, ...]
    lesions: tuple[int, ...]
    brighter: float


LEVELS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)

# Made from the lesion table of the BHSD set (1873 lesions of 192 studies; CC0): numpy.quantile at LEVELS of its columns
# Volume_[mL] and Mean_HU by Type, and of the number of rows by Data_ID and Type where there are any; numpy.corrcoef of
# Mean_HU and the logarithm of Volume_[mL].
_STATISTICS = {
    "epidural": Statistics(
        (0.074, 0.1, 0.14, 0.38, 0.93, 2.3, 3.9, 5.3, 9.2, 15.0, 20.0, 37.0, 78.0),
        (38, 39, 42, 50, 52, 53, 57, 59, 62, 63, 66, 68, 73),
        (1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 3),
        0.27,
    ),
    "intraparenchymal": Statistics(
        (0.035, 0.046, 0.082, 0.16, 0.31, 0.67, 1.2, 2.3, 5.1, 9.8, 34.0, 56.0, 87.0),
        (30, 34, 38, 40, 43, 46, 48, 50, 53, 55, 58, 60, 63),
        (1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 4, 6, 8),
        0.32,
    ),
    "intraventricular": Statistics(
        (0.039, 0.051, 0.075, 0.13, 0.24, 0.33, 0.54, 0.83, 1.4, 2.9, 6.5, 13.0, 26.0),
        (24, 26, 30, 33, 35, 38, 40, 42, 44, 47, 52, 54, 59),
        (1, 1, 1, 2, 2, 2, 2, 3, 3, 4, 5, 6, 8),
        0.38,
    ),
    "subarachnoid": Statistics(
        (0.015, 0.024, 0.038, 0.065, 0.098, 0.13, 0.18, 0.25, 0.38, 0.6, 1.4, 2.6, 6.2),
        (28, 32, 34, 38, 40, 42, 43, 45, 47, 50, 54, 57, 62),
        (1, 1, 1, 2, 3, 4, 6, 8, 13, 17, 24, 29, 34),
        0.03,
    ),
    "subdural": Statistics(
        (0.018, 0.026, 0.062, 0.11, 0.2, 0.35, 0.54, 0.87, 1.7, 3.5, 14.0, 42.0, 68.0),
        (21, 29, 36, 42, 46, 49, 51, 54, 57, 61, 64, 68, 70),
        (1, 1, 1, 1, 1, 2, 2, 3, 4, 5, 7, 9, 10),
        0.06,
    ),
}
_TOGETHER = (  # how many of the 192 studies have just these subtypes (numbers into SUBTYPES)
    (11, (0,)), (11, (1,)), (9, (2,)), (9, (3,)), (10, (4,)),
    (27, (1, 2)), (14, (1, 3)), (4, (1, 4)), (8, (2, 3)), (1, (2, 4)), (3, (3, 4)), (3, (0, 3)), (2, (0, 4)),
    (28, (1, 2, 3)), (17, (1, 3, 4)), (9, (2, 3, 4)), (6, (1, 2, 4)), (2, (0, 1, 4)), (1, (0, 3, 4)),
    (13, (1, 2, 3, 4)), (2, (0, 1, 2, 3)), (1, (0, 1, 3, 4)), (1, (0, 1, 2, 3, 4)),
)  # fmt: skip
_MOST = {"epidural": 2, "intraparenchymal": 5, "intraventricular": 2, "subarachnoid": 3, "subdural": 3}
"""Bleeds that are painted for one study: the table counts pieces, and one bleed in sulci comes in many."""

_DEEP = (  # where bleeds in the brain sit: share, x (either side), y, z, spread in mm
    (0.26, 26.0, 0.0, 2.0, 3.5),  # putamen
    (0.16, 12.0, 18.0, 6.0, 2.5),  # thalamus
    (0.12, 34.0, -36.0, 26.0, 10.0),  # frontal lobe
    (0.12, 46.0, 10.0, -14.0, 8.0),  # temporal lobe
    (0.13, 34.0, 44.0, 38.0, 9.0),  # parietal lobe
    (0.07, 26.0, 76.0, 8.0, 7.0),  # occipital lobe
    (0.09, 22.0, 60.0, -36.0, 7.0),  # cerebellum
    (0.05, 0.0, 25.0, -32.0, 2.5),  # pons
)
_BRUISED = ((0.55, 22.0, -54.0, -12.0, 9.0), (0.45, 46.0, -4.0, -26.0, 9.0))  # frontal and temporal, near bone
_CISTERNS = (  # where blood from an aneurysm gathers
    (0.0, -4.0, -20.0),
    (0.0, -30.0, -10.0),
    (36.0, -2.0, -12.0),
    (-36.0, -2.0, -12.0),
    (0.0, 13.0, -26.0),
    (20.0, 28.0, -10.0),
    (-20.0, 28.0, -10.0),
)
_PUSHES_ML = 1.5
"""A smaller bleed moves nothing that a CT shows."""
_BLUR_MM = 0.8
"""Standard deviation of the point spread of a soft kernel on the model's field."""
_BONE_SHARE = 0.03
"""So much bone lends some 45 HU to what it shares a pixel with."""
_EDGE_MM = 1.5
"""How deep under the inner table that is, about."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """A bleed before it has a size: the voxels of the lowest priority fill first.

    Attributes:
        where: the block that holds it.
        priority: in about mm, over the block.
        room: where it may lie, in the head as it is when called; what of it counts, `_seen` says.
        cover: how much of a voxel blood may take, in the head as it is when called.
        edge_mm: how sharp it ends.
        pushes: how much it displaces, by what is painted; more than 1, as brain is stiffer than a fluid.
        oedema_mm: width of the dark rim.
        mottled: HU, spread within it.
        level: what the upper (front) part has less than the lower, where blood has settled; HU.
        over: a point of the skull where the scalp is swollen, with the height.
    """

    where: Box
    priority: Volume
    room: Callable[[], Mask]
    cover: Callable[[], Volume] | None = None
    edge_mm: float = 1.2
    pushes: float = 0.0
    oedema_mm: float = 0.0
    mottled: float = 3.0
    level: float = 0.0
    over: tuple[Point, float] | None = None


def statistics() -> dict[str, Statistics]:
    """What is drawn from by default, by subtype: quantiles of real lesions (the BHSD lesion table, CC0)."""
    return dict(_STATISTICS)


def bleed(
    rng: np.random.Generator,
    head: Head,
    truth: NDArray[np.uint8],
    subtype: str,
    volume_ml: float | None = None,
    hu: float | None = None,
) -> Bleed:
    """Let a head bleed.

    Args:
        rng: everything is drawn from it.
        head: changed in place: blood and oedema in ``hu``; what a large bleed pushes aside, in all its volumes.
        truth: uint8 (z, y, x), changed in place: 0 none, else 1 + the position in `SUBTYPES`. What bled before stays.
        subtype: one of `SUBTYPES`.
        volume_ml: of its mask; less comes where the anatomy has no room for more. Drawn from `statistics` by default.
        hu: mean over its mask, as a slab of 5 mm shows it; drawn from `statistics` by default.

    Raises:
        ValueError: no such subtype, or the volume is not positive.
        NoRoom: the head has no place for it; nothing has changed, unless the last of the room went when a large one
            pushed an earlier bleed there.
    """
    if subtype not in SUBTYPES or (volume_ml is not None and not volume_ml > 0):
        raise ValueError(f"no bleed of {volume_ml} mL of subtype {subtype!r}; subtypes are {', '.join(SUBTYPES)}")
    asked, clot = _draw(rng, subtype, volume_ml, hu)
    age = _age(rng, subtype, clot, head.grey_hu)
    plan = _PLANS[subtype](rng, head, truth, asked, age)
    count = max(1, round(1000 * asked))
    where, code = plan.where, SUBTYPES.index(subtype) + 1
    room, seen = plan.room(), _seen(head, where)
    reach = lowest(plan.priority, room & seen, count)
    if plan.pushes and asked > _PUSHES_ML:
        displace(head, truth, where, np.float32(plan.pushes) * (room & (plan.priority <= reach)))
        room = plan.room()
        reach = lowest(plan.priority, room & seen, count)
    mask = room & seen & (plan.priority <= reach)
    image = head.hu[where.at]
    if plan.oedema_mm:
        rim = np.clip((reach + plan.oedema_mm - plan.priority) / plan.oedema_mm, 0, 1)
        wet = rim * head.brain[where.at] * (1 - 0.6 * head.grey[where.at]) * (truth[where.at] == 0)
        image -= np.float32(rng.uniform(8, 15)) * np.minimum(wet * 1.5, 1)
    covered = np.clip((np.float32(reach) - plan.priority) / np.float32(plan.edge_mm) + 0.5, 0, 1) * room
    covered *= 1 - head.bone[where.at]
    if plan.cover is not None:
        covered *= plan.cover()
    _paint(rng, plan, image, covered, mask, clot)
    truth[where.at][mask] = code
    if plan.over is not None:
        point, high = plan.over
        swell_scalp(rng, head, point, high, float(rng.uniform(18, 32)), float(rng.uniform(45, 70)))
    return Bleed(subtype, float(mask.sum()) / 1000, clot, age)


def draw_study(rng: np.random.Generator, head: Head, truth: NDArray[np.uint8]) -> list[Bleed]:
    """Let a head bleed as real ones do: which subtypes come together, how many of each and how large.

    Those that push come first, and what finds no room is left out. Arguments as those of `bleed`; each `Bleed` has the
    volume that counts of it.

    Raises:
        NoRoom: nothing found any.
    """
    weights = np.array([times for times, _ in _TOGETHER], dtype=np.float64)
    _, subtypes = _TOGETHER[int(rng.choice(len(_TOGETHER), p=weights / weights.sum()))]
    wanted: list[tuple[float, str]] = []
    for subtype in (SUBTYPES[code] for code in subtypes):
        real = _STATISTICS[subtype]
        pieces = round(float(np.interp(rng.random(), LEVELS, real.lesions)))
        volumes = np.exp(np.interp(rng.uniform(LEVELS[0], LEVELS[-1], pieces), LEVELS, np.log(real.volume_ml)))
        volumes = np.sort(volumes)[::-1]
        groups = min(pieces, _MOST[subtype])
        wanted += [(float(volumes[start::groups].sum()), subtype) for start in range(groups)]
    last = ("intraventricular", "subarachnoid")
    wanted.sort(key=lambda each: (each[1] in last, -each[0]))
    bleeds = []
    for volume, subtype in wanted:
        try:
            bleeds.append(bleed(rng, head, truth, subtype, volume))
        except NoRoom:  # narrow ventricles that are full, say
            continue
    return bleeds or draw_study(rng, head, truth)


def _draw(rng: np.random.Generator, subtype: str, volume_ml: float | None, hu: float | None) -> tuple[float, float]:
    """Volume and HU; the larger a bleed, the brighter, as far as the real ones are."""
    real = _STATISTICS[subtype]
    large, bright = rng.standard_normal(2)
    if volume_ml is None:
        volume_ml = float(np.exp(np.interp(ndtr(large), LEVELS, np.log(real.volume_ml))))
    else:
        large = ndtri(np.interp(np.log(volume_ml), np.log(real.volume_ml), LEVELS))
    if hu is None:
        level = ndtr(real.brighter * large + np.sqrt(1 - real.brighter**2) * bright)
        hu = float(np.interp(level, LEVELS, real.hu))
    return volume_ml, hu


def _age(rng: np.random.Generator, subtype: str, hu: float, grey_hu: float) -> str:
    mixed = subtype in ("intraventricular", "subarachnoid")  # dark for the fluid in it
    if hu < grey_hu + 4 and not mixed:
        return "isodense" if hu > grey_hu - 4 else "subacute"
    if hu > 60:
        return "acute"
    return str(rng.choice(("hyperacute", "acute", "subacute"), p=(0.2, 0.55, 0.25)))


def _paint(rng: np.random.Generator, plan: _Plan, image: Volume, covered: Volume, mask: Mask, hu: float) -> None:
    """Paint blood so that its mean over the mask is what is asked for."""
    ends = [np.flatnonzero(covered.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    part = tuple(slice(max(int(e[0]) - 3, 0), int(e[-1]) + 4) for e in ends)
    image, covered, mask = image[part], covered[part], mask[part]
    clot = np.float32(plan.mottled) * noise(rng, image.shape, 7)
    if plan.level:
        back = np.broadcast_to(plan.where.y[:, part[1]], image.shape)
        surface = float(np.quantile(back[mask], rng.uniform(0.35, 0.7)))
        clot += np.float32(plan.level) * np.clip((back - surface) / 2.0, -0.5, 0.5)
    # As a slab of 5 mm shows it, for the real figures are of such slabs and their readers' outlines.
    share = uniform_filter(covered, (5, 3, 3))
    there = mask & (share > min(0.45, 0.9 * float(share[mask].max())))
    soft = np.where(np.abs(image - 50) < 100, image, np.float32(hu))  # bone beside it does not count
    short = hu - uniform_filter(soft * (1 - covered) + clot * covered, (5, 3, 3))[there].mean()
    clot += np.float32(np.clip(short / share[there].mean(), 0, 85))
    image += (clot - image) * covered


def _seen(head: Head, where: Box) -> Mask:
    """Where a reader can outline blood: not in what a slab of 5 mm across the head's axis shows of bone and its blur.

    Blood is there, too, but the real outlines that `statistics` were measured over leave it out: of those at the skull
    98 in 100 have a mean under 73 HU, and a film half within the edge of the bone would have 100 to 280.
    """
    bone = uniform_filter1d(head.bone[where.at], 5, axis=0)
    for axis in (1, 2):
        bone = gaussian_filter1d(bone, _BLUR_MM, axis=axis)
    return np.asarray(bone < _BONE_SHARE)


def _free(truth: NDArray[np.uint8], where: Box) -> Mask:
    return np.asarray(truth[where.at] == 0)


def _surface(rng: np.random.Generator, head: Head, low_mm: float, off_sutures_mm: float) -> Point:
    """A point under the inner table, away from the midline, the floor and, if asked, the sutures."""

    def fits(at: tuple[NDArray[np.intp], ...]) -> Mask:
        table = head.table_mm[at]
        good = (table > 0.5) & (table < 2.0) & (np.abs(head.midline_mm[at]) > 22)
        # Where the skull slopes, a slab shows bone and no blood; what is small and lies there is in no reader's count.
        below, above = (np.clip(at[0] + shift, 0, head.hu.shape[0] - 1) for shift in (-3, 3))
        good &= np.abs(head.table_mm[above, at[1], at[2]] - head.table_mm[below, at[1], at[2]]) < 2.0
        _, y, z = coordinates(head, at)
        return np.asarray(good & (z > low_mm - 0.4 * np.maximum(y - 20, 0)) & (head.sutures_mm[at] > off_sutures_mm))

    return seat(rng, head, fits)


def _same_side(head: Head, where: Box, point: Point, gap_mm: float) -> Mask:
    """Voxels on a point's side of the falx, and, behind, of the tentorium."""
    at = voxel(head, point)
    side = np.sign(head.midline_mm[at])
    above = np.sign(head.tentorium_mm[at])
    return np.asarray((side * head.midline_mm[where.at] > gap_mm) & (above * head.tentorium_mm[where.at] > 0.5))


def _epidural(rng: np.random.Generator, head: Head, truth: NDArray[np.uint8], volume_ml: float, age: str) -> _Plan:
    """A lens that has stripped the dura from the skull as far as a suture, where the dura holds."""
    point = _surface(rng, head, -24, 9)
    # A lens of any size, its depth a fixed share of its half-width: the priority is the least half-width that reaches.
    steep = rng.uniform(0.32, 0.6)
    wide = float(np.cbrt(2000 * volume_ml / (np.pi * steep)))
    where = box(head, point, 12 + 1.5 * wide)
    table = head.table_mm[where.at]
    along = np.sqrt(np.maximum(where.away(point) ** 2 - table**2, 0))
    along = along * (1 + 0.12 * noise(rng, where.shape, 18))
    held = np.sqrt(np.clip(head.sutures_mm[where.at] / 10, 0.04, 1))
    deep = np.maximum(table - _EDGE_MM, 0) / (np.float32(steep) * held)
    priority = (deep + np.sqrt(deep * deep + 4 * along * along)) / 2
    bounded = (table > 0) & (table < 45) & (priority < 1.6 * wide) & _same_side(head, where, point, 1.0)
    bounded[bounded] = _unparted(head.sutures_mm[where.at], where.near(point), np.argwhere(bounded))
    over = (point, float(rng.uniform(4, 14))) if rng.random() < 0.7 else None
    return _Plan(
        where,
        np.asarray(priority, dtype=np.float32),
        lambda: np.asarray(bounded & _free(truth, where)),
        edge_mm=2.0,  # half-widths: along the depth, the edge is steeper
        pushes=1.4,
        mottled=4.5 if age == "hyperacute" else 3.0,  # the swirl of blood that has not clotted
        over=over,
    )


def _unparted(sutures_mm: Volume, start: tuple[int, ...], ends: NDArray[np.intp]) -> Mask:
    """Whether no suture crosses the straight line from a voxel to each of others."""
    clear = np.ones(len(ends), dtype=np.bool_)
    for share in np.linspace(0, 1, 14)[1:]:  # steps shorter than the band about a suture, but for the largest lenses
        at = np.rint(start + share * (ends - start)).astype(np.intp)
        clear &= sutures_mm[at[:, 0], at[:, 1], at[:, 2]] > 2
    return clear


def _subdural(rng: np.random.Generator, head: Head, truth: NDArray[np.uint8], volume_ml: float, age: str) -> _Plan:
    """A crescent over one hemisphere; or a sheet along the falx or on the tentorium."""
    thick = (3.2 + float(np.sqrt(volume_ml))) * rng.uniform(0.75, 1.35)
    wide = float(np.sqrt(1000 * volume_ml / (0.67 * np.pi * thick)))
    place = str(rng.choice(("convexity", "falx", "tentorium"), p=(0.76, 0.16, 0.08)))
    if place != "convexity" and volume_ml > 15:
        place = "convexity"
    point = _surface(rng, head, -18, -1) if place == "convexity" else _dura(rng, head, place)
    where = box(head, point, 1.5 * wide + thick + 12)
    depth, edge_mm = head.table_mm[where.at], 0.0
    inside = depth > 0
    if place == "falx":
        side = float(np.sign(head.midline_mm[voxel(head, point)])) or 1.0
        depth = side * head.midline_mm[where.at] - 0.6
        inside &= (head.table_mm[where.at] < 30) & (where.z > -4) & (head.tentorium_mm[where.at] > 2)
        same = depth > 0
    elif place == "tentorium":
        depth = head.tentorium_mm[where.at] - 0.6
        inside &= (where.y > 4) & (head.table_mm[where.at] < 42)
        same = (depth > 0) & _same_side(head, where, point, 1.0)
    else:
        same, edge_mm = _same_side(head, where, point, 1.2), _EDGE_MM
    away = where.away(point, (1.0, 1.2, 0.9))
    along = np.sqrt(np.maximum(away * away - depth * depth, 0)) * (1 + 0.12 * noise(rng, where.shape, 22))
    profile = 1 - (along / np.float32(0.95 * wide + 1)) ** 4
    inside &= profile > 0.1  # beyond it there is not even a film
    profile = np.maximum(profile, 0.1) * np.clip(1 + 0.18 * noise(rng, where.shape, 14), 0.5, 1.5)
    priority = np.asarray(np.maximum(depth - np.float32(edge_mm), 0.0) / profile, dtype=np.float32)
    mixed = volume_ml > 3 and rng.random() < 0.3
    inside &= same
    return _Plan(
        where,
        priority,
        lambda: np.asarray(inside & _free(truth, where)),
        pushes=1.35,
        mottled=6.0 if mixed else 2.5,
        level=float(rng.uniform(8, 24)) if mixed else 0.0,
    )


def _dura(rng: np.random.Generator, head: Head, place: str) -> Point:
    """A point on the falx or the tentorium."""

    def fits(at: tuple[NDArray[np.intp], ...]) -> Mask:
        table, across, above = head.table_mm[at], np.abs(head.midline_mm[at]), head.tentorium_mm[at]
        _, y, z = coordinates(head, at)
        if place == "falx":
            return np.asarray((across < 2) & (table > 2) & (table < 22) & (z > 4) & (above > 8))
        return np.asarray((above > 0.6) & (above < 2) & (table > 2) & (table < 30) & (y > 22) & (across > 6))

    return seat(rng, head, fits)


def _intraparenchymal(
    rng: np.random.Generator, head: Head, truth: NDArray[np.uint8], volume_ml: float, age: str
) -> _Plan:
    """A clot in the brain with an uneven edge, or several bruises near the bone."""
    radius = float(np.cbrt(3000 * volume_ml / (4 * np.pi)))
    bruised = volume_ml < 20 and rng.random() < 0.35
    table = _BRUISED if bruised else _DEEP
    shares = np.array([row[0] for row in table])
    _, cx, cy, cz, spread = table[int(rng.choice(len(table), p=shares / shares.sum()))]
    side = float(rng.choice((-1, 1)))

    def fits(at: tuple[NDArray[np.intp], ...]) -> Mask:
        deep = head.table_mm[at]
        return np.asarray((head.brain[at] > 0.8) & (deep > 3) & ((deep < 12) | (not bruised)))

    points = [seat(rng, head, fits, (side * cx, cy, cz), spread)]
    if bruised:
        x, y, z = points[0]
        more = int(rng.integers(1, 5)) if volume_ml > 0.3 else 0
        points += [seat(rng, head, fits, (x, y, z), 12) for _ in range(more)]
    where = box(head, points[0], 2.5 * radius + (34 if len(points) > 1 else 8))
    stretch = np.exp(0.22 * np.clip(rng.standard_normal(3), -1.5, 1.5))
    stretch /= np.cbrt(stretch.prod())
    rough = 0.18 * noise(rng, where.shape, max(4.0, 0.9 * radius)) + 0.08 * noise(rng, where.shape, 5)
    a, b, c = (float(v) for v in stretch)
    away = np.minimum.reduce([where.away(p, (a, b, c)) / np.float32(rng.uniform(0.6, 1.4)) for p in points])
    priority = np.asarray(away * np.exp(rough), dtype=np.float32)
    beside = np.asarray(head.tentorium_mm[where.at] * head.tentorium_mm[voxel(head, points[0])] > 0)
    beside |= np.abs(head.tentorium_mm[where.at]) < 1.5
    lobe = beside & (head.table_mm[where.at] > 2)
    across = head.midline_mm[where.at] * np.sign(points[0][0]) > -3 if abs(points[0][0]) > 4 else True

    def room() -> Mask:
        tissue = (uniform_filter(head.brain[where.at], 5) > 0.55) | (priority < 0.7 * radius)
        return np.asarray(lobe & across & tissue & (head.ventricle[where.at] < 0.5) & _free(truth, where))

    rim = {"hyperacute": 0.0, "acute": rng.uniform(1, 4), "subacute": rng.uniform(3, 9), "isodense": rng.uniform(3, 9)}
    return _Plan(
        where,
        priority,
        room,
        edge_mm=2.5 if age in ("subacute", "isodense") else 1.2,
        pushes=0.7 if bruised else 1.2,
        oedema_mm=float(rim[age]) * min(1.0, 0.4 + radius / 12),
        mottled=6.0 if bruised else 2.5,
        level=float(rng.uniform(8, 20)) if volume_ml > 8 and rng.random() < 0.08 else 0.0,
    )


def _intraventricular(
    rng: np.random.Generator, head: Head, truth: NDArray[np.uint8], volume_ml: float, age: str
) -> _Plan:
    """Blood that has sunk to the back of the ventricles of a patient who lies on it; or a clot that casts one."""
    where = bounds(head, head.ventricle > 0.5)
    middle = head.midline_mm[where.at]
    if rng.random() < 0.25:

        def fits(at: tuple[NDArray[np.intp], ...]) -> Mask:
            return np.asarray(head.ventricle[at] > 0.8)

        point = seat(rng, head, fits)
        priority = where.away(point) * (1 + 0.1 * noise(rng, where.shape, 8))
        priority = priority + 40 * (middle * point[0] < -1)  # one side before the other
        surface = 2.0
    else:
        lean = rng.normal(0, 0.06)
        fuller = rng.normal(0, 6)  # one side of the two holds more
        priority = -where.y + lean * where.x + fuller * np.sign(middle) + 0.4 * noise(rng, where.shape, 9)
        surface = float(rng.uniform(1.2, 4))

    def room() -> Mask:
        return np.asarray((head.ventricle[where.at] >= 0.5) & _free(truth, where))

    return _Plan(
        where,
        np.asarray(priority, dtype=np.float32),
        room,
        cover=lambda: head.ventricle[where.at],
        edge_mm=surface,
    )


def _subarachnoid(rng: np.random.Generator, head: Head, truth: NDArray[np.uint8], volume_ml: float, age: str) -> _Plan:
    """Blood mixed with fluid: in the cisterns and fissures about an aneurysm, or in sulci under a blow."""
    if rng.random() < (0.65 if volume_ml > 4 else 0.3):
        points = [_CISTERNS[int(i)] for i in rng.permutation(len(_CISTERNS))[: 1 + int(rng.integers(0, 4))]]
        points = [seat(rng, head, lambda at: head.subarachnoid[at] > 0.7, p, 4) for p in points]
        if volume_ml < 1:
            points = points[:1]
    else:

        def fits(at: tuple[NDArray[np.intp], ...]) -> Mask:
            _, _, z = coordinates(head, at)
            return np.asarray((head.subarachnoid[at] > 0.6) & (np.abs(head.table_mm[at] - 14) < 10) & (z > -30))

        points = [seat(rng, head, fits)]
    reach = 8 + 1.8 * float(np.cbrt(3000 * volume_ml / (4 * np.pi * 0.07)))
    where = box(head, points[0], reach) if len(points) == 1 else bounds(head, head.table_mm > 0)
    away = np.minimum.reduce([where.away(p) * np.float32(rng.uniform(0.8, 1.3)) for p in points])
    patchy = rng.uniform(0.1, 0.45)
    priority = away * np.exp(patchy * noise(rng, where.shape, 9)) + rng.uniform(0, 6) * (
        1 - head.subarachnoid[where.at]
    )

    def room() -> Mask:
        return np.asarray((head.subarachnoid[where.at] >= 0.4) & (head.table_mm[where.at] > 1.2) & _free(truth, where))

    return _Plan(
        where,
        np.asarray(priority, dtype=np.float32),
        room,
        cover=lambda: np.minimum(1.5 * head.subarachnoid[where.at], 1),
        edge_mm=float(min(6.0, 1 + np.cbrt(1000 * volume_ml) / 3)),
        mottled=4.0,
    )


_PLANS: dict[str, Callable[[np.random.Generator, Head, NDArray[np.uint8], float, str], _Plan]] = {
    "epidural": _epidural,
    "intraparenchymal": _intraparenchymal,
    "intraventricular": _intraventricular,
    "subarachnoid": _subarachnoid,
    "subdural": _subdural,
}
