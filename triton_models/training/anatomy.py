"""A head on a 1 mm grid: the average brain bent into one person's, in a skull, a scalp and a face made by hand.

Coordinates in the head are millimetres: x to the patient's left, y to the back, z to the crown. "Atlas mm" are the
same before the person's size and bends: the origin is the anterior commissure. The shapes of bone and face are coarse
and typical adult ones; nothing but the average brain is taken from people.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np
from scipy import ndimage

from . import atlas
from .fields import Link, Volume, bump, double, enlarge, mix, noise, soft, step, tube

ORIGIN_MM = (-86.0, -124.0, -98.0)
SHAPE = (189, 241, 197)
"""The grid, (z, y, x): every head has the same."""


@dataclass(slots=True)
class Head:
    """One person's head on a 1 mm grid (z, y, x), without haemorrhage, noise or artefact.

    Attributes:
        hu: float32 HU, air -1000.
        table_mm: depth under the inner table of the skull, negative outside.
        brain: 0..1 coverage of grey and white matter, cerebellum and brain stem.
        grey: 0..1, of which grey matter.
        ventricle: 0..1 coverage of the ventricles.
        subarachnoid: 0..1 coverage of sulci, fissures, cisterns and the space over the brain.
        bone: 0..1 coverage of bone.
        midline_mm: distance from the plane of the falx, positive to the left.
        tentorium_mm: height over the tentorium.
        sutures_mm: distance to the nearest of the coronal, lambdoid and sagittal sutures.
        origin_mm: (z, y, x) of the first voxel.
        age: years.
        sex: "F" or "M".
        fluid_hu, grey_hu, white_hu: this person's means.
    """

    hu: Volume
    table_mm: Volume
    brain: Volume
    grey: Volume
    ventricle: Volume
    subarachnoid: Volume
    bone: Volume
    midline_mm: Volume
    tentorium_mm: Volume
    sutures_mm: Volume
    origin_mm: tuple[float, float, float]
    age: int
    sex: str
    fluid_hu: float
    grey_hu: float
    white_hu: float

    def field(self, rng: np.random.Generator, cell_mm: float) -> Volume:
        """Unit-variance noise on the head's grid, correlated over about ``cell_mm``."""
        return noise(rng, SHAPE, cell_mm)


@dataclass(frozen=True, slots=True)
class _Person:
    """What is drawn of one person before any volume is: lengths in mm, and HU."""

    atrophy: float
    gap_mm: float
    leaning: float  # how much of the brain's surface touches the dura: about none at -2, all at 2
    cavity_ml: float
    fluid_hu: float
    grey_hu: float
    white_hu: float
    dura_hu: float
    blood_hu: float
    bone_hu: float
    diploe_hu: float
    skull_mm: float
    scalp_mm: float
    muscle_mm: float
    fat_hu: float
    muscle_hu: float
    falx_mm: float
    air: float
    frontal_sinus: float
    sinus_fluid: float  # how far back in the maxillary sinuses fluid stands, atlas mm
    dominant_mm: float  # how much wider the right transverse sinus is than the mean of the two
    wall_mm: float
    pallor: float


@dataclass(frozen=True, slots=True)
class _Space:
    """The grid bent into the atlas: places in atlas mm, distances in mm, and noise."""

    z: Volume
    y: Volume
    x: Volume
    table_mm: Volume
    hull_mm: Volume  # on every second mm
    texture: Volume
    grain: Volume
    stretch: tuple[float, float, float]

    def near(self, *ranges: tuple[float, float]) -> tuple[slice, ...]:
        """The part of the grid that holds all of a range of z, of y and, where it is given, of x in the atlas."""
        parts = []
        for (low, high), by, origin, count in zip(ranges, self.stretch, ORIGIN_MM, SHAPE, strict=False):
            first, last = (int(np.clip(at * by - origin, 0, count)) for at in (low - 8, high + 8))
            parts.append(slice(first, max(last, first + 1)))
        return tuple(parts)

    def cut(self, part: tuple[slice, ...]) -> tuple[Volume, Volume, Volume, Volume, Volume]:
        """There: z, y, the distance |x| from the middle, the depth under the inner table, and texture."""
        return self.z[part], self.y[part], np.abs(self.x[part]), self.table_mm[part], self.texture[part]


def draw(rng: np.random.Generator, age: int, sex: str) -> Head:
    """One person's head.

    Args:
        rng: everything is drawn from it.
        age: years, 18 or more; the older, the wider the spaces that hold fluid.
        sex: "F" or "M": women's heads are smaller.
    """
    person = _person(rng, age, sex)
    space, box, ventricle_mm, fluid, white = _bend(rng, person)

    cavity, brain, grey, ventricle, subarachnoid, inside = (np.zeros(SHAPE, dtype=np.float32) for _ in range(6))
    held, table_mm, texture = cavity[box], space.table_mm[box], space.texture[box]
    held[:] = soft(table_mm, 1.0)
    spaces = soft(fluid - (0.82 - 0.35 * person.atrophy) - np.float32(0.05) * texture, 0.25)
    spaces *= soft(-ventricle_mm - 2.0, 1.0)  # the ventricles' walls are brain
    np.maximum(spaces, soft(0.6 * person.gap_mm - table_mm, 1.0), out=spaces)
    # Gyri lean against the dura, more of them behind, for who lies sinks back; no seam of fluid runs all around.
    leaning = np.clip(2 * noise(rng, table_mm.shape, 22) + 2 * person.leaning + space.y[box] * np.float32(1 / 60), 0, 1)
    leaning *= soft(3.5 - table_mm, 2.0)
    spaces *= 1 - leaning
    np.multiply(soft(ventricle_mm + person.wall_mm, 1.2), held, out=ventricle[box])
    np.multiply(spaces, held - ventricle[box], out=subarachnoid[box])
    np.subtract(held, ventricle[box], out=brain[box])
    brain[box] -= subarachnoid[box]
    np.multiply(soft(np.float32(0.5) - white, 0.55), brain[box], out=grey[box])

    tissue = inside[box]
    tissue += np.float32(person.white_hu) * brain[box]
    tissue += np.float32(person.grey_hu - person.white_hu) * grey[box]
    tissue += np.float32(person.fluid_hu) * (held - brain[box])
    tissue += (0.8 * texture + 0.4 * space.grain[box]) * brain[box]
    pale = np.exp(np.minimum(ventricle_mm, 0) * np.float32(1 / 5))
    pale *= np.float32(0.5 + 6 * person.atrophy * person.pallor)
    tissue -= pale * (brain[box] - grey[box])
    tentorium_mm = space.z - _tent(space)
    _sheets(inside, space, person, cavity, tentorium_mm)

    bone = np.zeros(SHAPE, dtype=np.float32)
    sutures_mm = _sutures(space)
    hu = _flesh(space, person)
    _vault(hu, bone, space, person, sutures_mm, age)
    _base(hu, bone, space, person)
    _face(hu, bone, space, person)
    hu *= 1 - cavity
    hu += inside
    bone *= 1 - cavity
    return Head(
        hu=hu,
        table_mm=space.table_mm,
        brain=brain,
        grey=grey,
        ventricle=ventricle,
        subarachnoid=subarachnoid,
        bone=bone,
        midline_mm=space.x * np.float32(space.stretch[2]),
        tentorium_mm=tentorium_mm,
        sutures_mm=sutures_mm,
        origin_mm=ORIGIN_MM,
        age=age,
        sex=sex,
        fluid_hu=person.fluid_hu,
        grey_hu=person.grey_hu,
        white_hu=person.white_hu,
    )


def _person(rng: np.random.Generator, age: int, sex: str) -> _Person:
    uniform, normal = rng.uniform, rng.normal
    atrophy = float(np.clip((age - 35) / 50 + normal(0, 0.2), 0, 1.4))
    grey_hu = uniform(34, 42)
    return _Person(
        atrophy=atrophy,
        gap_mm=uniform(0.6, 1.3) + atrophy * uniform(0.4, 1.8),
        leaning=uniform(-0.8, 1.6) - 0.9 * atrophy,
        cavity_ml=float(np.clip(normal(1540 if sex == "M" else 1380, 105), 1130, 1850)),
        fluid_hu=uniform(3, 12),
        grey_hu=grey_hu,
        white_hu=grey_hu - uniform(5, 9),
        dura_hu=uniform(46, 66),
        blood_hu=uniform(44, 64),
        bone_hu=uniform(1300, 1900),
        diploe_hu=uniform(400, 1000),
        skull_mm=uniform(5, 9.5),
        scalp_mm=uniform(4, 8.5),
        muscle_mm=uniform(3, 10),
        fat_hu=uniform(-108, -80),
        muscle_hu=uniform(46, 62),
        falx_mm=uniform(0.5, 1.3),
        air=uniform(0.35, 1.0),
        frontal_sinus=uniform(0, 9),
        sinus_fluid=uniform(-60, -35) if rng.random() < 0.2 else 99.0,
        dominant_mm=normal(0.4, 0.5),
        wall_mm=1.4 * atrophy * uniform(0.3, 1.0) + normal(0, 0.35),
        pallor=uniform(0, 1),
    )


def _bend(rng: np.random.Generator, person: _Person) -> tuple[_Space, tuple[slice, ...], Volume, Volume, Volume]:
    """The grid in the atlas; the part of it that holds the cranial cavity, with a mm or two about it; and of that part
    the distance into the ventricles in mm, fluid and white matter 0..1."""
    maps = atlas.load()
    size = np.cbrt(person.cavity_ml / (maps.cavity_ml + 75 * (person.gap_mm - 2.0)))
    stretch = np.exp(np.array([-0.03, 0.01, 0.02]) + rng.normal(0, 0.028, 3))
    stretch *= size / np.cbrt(np.prod(stretch))
    half = [(n + 1) // 2 for n in SHAPE]

    def waves(cell_mm: float, high_mm: float) -> Volume:
        count = [int(np.ceil(n / cell_mm)) + 2 for n in SHAPE]
        return enlarge(rng.standard_normal(count, dtype=np.float32) * np.float32(high_mm), half)

    places = []
    for origin, n, by, axis in zip(ORIGIN_MM, half, stretch, range(3), strict=True):
        along = (np.arange(n, dtype=np.float32) * 2 + np.float32(origin)) * np.float32(1 / by)
        place = waves(65, 2.4)
        place += along.reshape([-1 if k == axis else 1 for k in range(3)])
        places.append(place)
    skull = np.stack([maps.table, maps.hull], axis=-1).astype(np.float32) * np.float32(size / atlas.QUARTERS)
    table, hull = _lookup(skull, places, atlas.LOW_MM, atlas.TABLE_STEP)
    for distance in (table, hull):
        distance += np.float32(person.gap_mm - 2.0)

    # Within the skull the brain is bent further, and drawn from nearer the ventricles' middle, which widens them.
    depth = ndimage.gaussian_filter(maps.ventricle[::3, ::3, ::3].astype(np.float32) / atlas.QUARTERS, 0.8)
    slopes = np.stack(np.gradient(depth, 3.0), axis=-1) * np.clip(1 + np.minimum(depth, 0) / 11, 0, 1)[..., None]
    widest = np.float32(rng.normal(0.2 + 2.8 * person.atrophy, 0.8))
    wide = widest * (1 + np.float32(rng.normal(0, 0.15)) * np.clip(places[2] / 8, -1, 1))
    deep = np.clip(table / 14, 0, 1)
    for place, pull in zip(places, _lookup(slopes, places, maps.origin_mm, 3), strict=True):
        place += deep * (waves(22, 1.1) + wide * pull)

    z, y, x = (double(place) for place in places)
    brain = np.stack([maps.fluid, maps.white, maps.ventricle], axis=-1).astype(np.float32)
    brain *= np.array([1 / atlas.LEVELS, 1 / atlas.LEVELS, 1 / atlas.QUARTERS], dtype=np.float32)
    inside = table > -2
    box = tuple(
        slice(2 * int(at.min()), 2 * int(at.max()) + 1)
        for at in (np.flatnonzero(inside.any(axis=(axis - 1, axis - 2))) for axis in range(3))
    )
    fluid, white, ventricle_mm = _lookup(brain, [a[box] for a in (z, y, x)], maps.origin_mm, 1)
    space = _Space(z, y, x, double(table), hull, noise(rng, SHAPE, 11), noise(rng, SHAPE, 2.5), tuple(stretch))

    # The average ends at the medulla; the cord goes on.
    low = tuple(slice(0, 30) if axis == 0 else slice(None) for axis in range(3))
    zs, ys, xs = (a[box][low] for a in (z, y, x))
    cord = soft(5.5 - np.hypot(xs, ys - 44), 3.0) * soft(-64 - zs, 6.0)
    mix(fluid[low], 0.0, cord)
    mix(white[low], 0.5, cord)
    return space, box, ventricle_mm, fluid, white


def _lookup(maps: Volume, places: list[Volume], low_mm: Iterable[float], step_mm: float) -> list[Volume]:
    """Maps (z, y, x, map) at places, by linear interpolation; beyond their edge they go on as they end.

    With the slices under one another as one picture, its colours the maps, `cv2.remap` looks them up in two slices
    at a time: some ten times as fast as `scipy.ndimage.map_coordinates`.
    """
    depth, height, width, count = maps.shape
    picture = maps.astype(np.float32, copy=False).reshape(depth * height, width, count)
    found = [np.empty(places[0].shape, dtype=np.float32) for _ in range(count)]
    for index in range(len(places[0])):
        level, rows, columns = (
            np.clip((place[index] - np.float32(low)) * np.float32(1 / step_mm), 0, n - 1)
            for place, low, n in zip(places, low_mm, (depth, height, width), strict=True)
        )
        lower = np.minimum(np.floor(level), depth - 2)
        level -= lower
        rows += lower * height
        near, far = (cv2.remap(picture, columns, rows + k * height, cv2.INTER_LINEAR) for k in (0, 1))
        far -= near
        far *= level[..., None]
        near += far
        for k, out in enumerate(found):
            out[index] = near[..., k]
    return found


def _tent(space: _Space) -> Volume:
    """The tentorium's height, atlas mm, over every place."""
    maps = atlas.load()
    columns, rows = (
        space.x[::2, ::2, ::2] - np.float32(maps.origin_mm[2]),
        space.y[::2, ::2, ::2] - np.float32(maps.origin_mm[1]),
    )
    planes = [
        cv2.remap(maps.tentorium_mm, *at, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        for at in zip(columns, rows, strict=True)
    ]
    return double(np.stack(planes))


def _sutures(space: _Space) -> Volume:
    """Distance to the nearest suture, mm; 60 below the vault."""
    out = np.full(SHAPE, 60.0, dtype=np.float32)
    part = space.near((-25, 130))
    z, y, x = space.z[part], space.y[part], space.x[part]
    wavy = space.grain[part] + space.texture[part]
    wavy *= np.float32(1.3)
    near = out[part]
    near[:] = y - np.float32(0.05) * z
    near += wavy
    near += np.float32(21)
    np.abs(near, out=near)
    lambdoid = y * np.float32(1 / 1.31) - z * np.float32(0.85 / 1.31)
    lambdoid += wavy
    lambdoid += np.float32(-65.25 / 1.31)
    np.minimum(near, np.abs(lambdoid), out=near)
    wavy += x
    np.abs(wavy, out=wavy)
    wavy[(y < -17) | (y > 95) | (z < 30)] = 60
    np.minimum(near, wavy, out=near)
    near[z < -25] = 60
    return out


def _flesh(space: _Space, person: _Person) -> Volume:
    """HU of all that the skin holds as fat and muscle, and of the air about it: scalp, temples, face, neck, ears."""
    z, y, x, texture = (a[::2, ::2, ::2] for a in (space.z, space.y, space.x, space.texture))
    side = np.abs(x)
    temple = bump(y, -18, 32) * step(side, 44, 6) * step(-z, -40, 8)
    vault = space.hull_mm + np.float32(person.skull_mm + person.scalp_mm)
    vault += np.float32(person.muscle_mm - 0.4 * person.skull_mm) * temple * step(z, -45, 8)
    # Below: cheeks, neck and what is between them, then nose and ears.
    face = 63 - np.sqrt(x**2 + ((y + 27) * np.float32(1.02)) ** 2 + np.maximum(z + 38, 0) ** 2 * 3)
    neck = 64 - np.sqrt(x**2 + ((y - 34) * np.float32(0.92)) ** 2) - np.float32(1.2) * np.maximum(z + 48, 0)
    jaw = 66 - np.sqrt(x**2 + ((y - 4) * np.float32(1.3)) ** 2) - np.float32(1.5) * np.maximum(z + 46, 0)
    np.maximum(face, neck, out=face)
    np.maximum(face, jaw, out=face)
    part = tuple(slice(p.start // 2, p.stop // 2 + 1) for p in space.near((-90, -20), (-112, -60), (-30, 30)))
    nose = tube(x[part], y[part], z[part], ((0, -76, -34, 7), (0, -94, -62, 11), (0, -80, -66, 14)))
    np.maximum(face[part], nose, out=face[part])
    ear = 21 - np.sqrt((y - 24) ** 2 + ((z + 42) * np.float32(0.75)) ** 2)
    leaf = 2.5 + 1.5 * texture - np.abs(side - 79 - np.float32(0.3) * (y - 24))
    np.maximum(face, np.minimum(ear, leaf), out=face)
    skin = np.maximum(vault, face)

    muscle = temple * soft(skin - 3, 2.0)  # fat lies under the skin
    deep = step(-z, 28, 5) * step(texture, -0.55, 0.25) * soft(skin - 5, 3.0)
    np.maximum(muscle, deep, out=muscle)
    galea = 0.5 * soft(0.8 - np.abs(space.hull_mm + np.float32(person.skull_mm + 1.2)), 1.0)
    np.maximum(muscle, galea, out=muscle)
    muscle *= 1.4
    np.minimum(muscle, 1, out=muscle)

    depth = double(skin)
    hu = double(np.asarray(person.fat_hu + (person.muscle_hu - person.fat_hu) * muscle, dtype=np.float32))
    mix(hu, 40.0, soft(1.6 - depth, 1.0))
    hu += 4 * space.grain
    hu += np.float32(1000)
    hu *= soft(depth, 1.0)
    hu -= np.float32(1000)
    return hu


def _vault(hu: Volume, bone: Volume, space: _Space, person: _Person, sutures_mm: Volume, age: int) -> None:
    """Two tables with the diploë between them, from the inner table to the hull, thinner at the temples."""
    z, y, x, texture, table = (a[::2, ::2, ::2] for a in (space.z, space.y, space.x, space.texture, space.table_mm))
    side = np.abs(x)
    thick = np.float32(person.skull_mm) * (1 + 0.05 * texture - 0.45 * bump(z, -5, 30) * bump(side, 76, 22))
    thick += 4.5 * bump(side, 0, 11) * bump(z, -22, 16) * step(y, 70, 6)
    frontal = bump(side, 6, 16) * bump(z, -10, 14) * step(-y, 62, 4)
    thick += np.float32(person.frontal_sinus) * frontal
    base = step(-z, 16, 5)
    thick += (2.8 + 0.8 * np.abs(texture) - thick) * base * (1 - 0.8 * step(y, 55, 10))
    np.maximum(thick, 2.0, out=thick)
    # Over the vault the outer table follows the hull, at the base it follows the inner table.
    outer = np.minimum(table, space.hull_mm + np.float32(0.5))
    outer += (table - outer) * base
    outer += thick
    depth = np.minimum(double(outer), -space.table_mm)
    shell = soft(depth, 1.0)
    shell *= soft(space.z + 74, 3.0)
    value = 130 * space.grain
    value += np.float32(person.diploe_hu - person.bone_hu)
    value *= soft(depth - double(np.float32(0.25) * thick), 1.2)
    value += np.float32(person.bone_hu)
    value -= np.float32(550 if age < 60 else 300) * soft(0.8 - sutures_mm, 0.8)
    mix(hu, value, shell)
    np.maximum(bone, shell, out=bone)
    if person.frontal_sinus > 3:
        part = space.near((-40, 30), (-100, -50))
        air = soft(depth[part] - 1.9, 1.0) * soft(double(frontal)[part] - 0.35, 0.15)
        mix(hu[part], -950.0, air)
        bone[part] *= 1 - air


def _base(hu: Volume, bone: Volume, space: _Space, person: _Person) -> None:
    """Petrous and mastoid bone with their cells, clivus, sella, clinoids, occipital condyles, first vertebra."""
    shapes: tuple[tuple[float, tuple[Link, ...]], ...] = (
        (1250, ((14, 16, -42, 7), (28, 22, -41, 9), (44, 30, -43, 11), (56, 34, -50, 11))),
        (950, ((56, 34, -52, 10), (53, 34, -74, 7))),
        (750, ((0, 12, -38, 5), (0, 20, -54, 4.5), (0, 25, -66, 4))),
        (1000, ((0, 8, -27, 1.8), (5, 8, -26, 2.2))),
        (1000, ((11, -14, -24, 2.2), (11, -5, -23, 1.5))),
        (700, ((14, 34, -70, 5), (19, 40, -77, 6))),
        (850, ((0, 20, -86, 4), (18, 30, -84, 7), (24, 46, -84, 6), (14, 62, -84, 4), (0, 66, -84, 4))),
        (800, ((0, 24, -76, 5), (0, 24, -98, 6))),
        (1000, ((50, 6, -52, 6), (50, 0, -62, 4.5), (52, -4, -98, 4.5))),
    )
    for level, chain in shapes:
        _bony(hu, bone, space, level, chain)
    part = space.near((-80, -30), (8, 60))
    z, y, side, table_mm, _ = space.cut(part)
    cells = tube(side, y, z, ((50, 30, -40, 8), (57, 36, -46, 10), (54, 36, -70, 5)))
    cells = soft(cells, 3.0) * step(space.grain[part], 0.9 - 1.3 * person.air, 0.2)
    canal = soft(tube(side, y, z, ((46, 20, -43, 4), (54, 18, -43, 3), (88, 20, -44, 3))), 1.0)
    for air in (cells, canal):
        air *= soft(-table_mm - 1.5, 1.0)
        mix(hu[part], -900.0, air)
        bone[part] *= 1 - air
    nerve = soft(tube(side, y, z, ((8, 24, -37, 2.5), (22, 22, -38, 2.5))), 1.0)
    mix(hu[part], 15.0, nerve)
    bone[part] *= 1 - nerve


def _bony(hu: Volume, bone: Volume, space: _Space, level: float, chain: tuple[Link, ...], rough: float = 1.0) -> None:
    """Paint a chain of cones of bone on both sides: a rind of compact bone about a spongy core."""
    part = space.near(*_extent(chain, 2.0))
    z, y, side, _, texture = space.cut(part)
    inside = tube(side, y, z, chain)
    inside += np.float32(rough) * texture
    covered = soft(inside, 1.0)
    value = level + 160 * space.grain[part] - 0.45 * level * soft(inside - 2.5, 2.0)
    mix(hu[part], value, covered)
    np.maximum(bone[part], covered, out=bone[part])


def _hollow(hu: Volume, bone: Volume, space: _Space, fluid_y: float, chain: tuple[Link, ...]) -> None:
    """Paint a sinus on both sides: air in a thin wall, outside the cranial cavity; fluid behind ``fluid_y``."""
    part = space.near(*_extent(chain, 2.0))
    z, y, side, table_mm, texture = space.cut(part)
    inside = np.minimum(tube(side, y, z, chain) + 1.2 * texture, -table_mm - 2.0)
    wall, room = soft(inside + 1.4, 1.0), soft(inside, 1.0)
    mix(hu[part], 650 + 120 * space.grain[part], wall)
    mix(hu[part], 25 - 985 * soft(fluid_y - y, 1.0), room)
    np.maximum(bone[part], wall, out=bone[part])
    bone[part] *= 1 - room


def _extent(chain: tuple[Link, ...], margin: float) -> list[tuple[float, float]]:
    """The range of z, y and x that a chain and its mirror image lie in."""
    reach = max(link[3] for link in chain) + margin
    z, y = ((min(c[k] for c in chain) - reach, max(c[k] for c in chain) + reach) for k in (2, 1))
    wide = max(link[0] for link in chain) + reach
    return [z, y, (-wide, wide)]


def _face(hu: Volume, bone: Volume, space: _Space, person: _Person) -> None:
    """Orbits, nose, sinuses, cheekbones."""
    # The orbit: a cone of fat in a thin wall; globe, lens, nerve and muscles in it.
    part = space.near((-62, -16), (-86, -16), (-58, 58))
    z, y, side, table_mm, _ = space.cut(part)
    view, solid = hu[part], bone[part]
    cone = tube(side, y, z, ((13, -20, -29, 3), (26, -42, -35, 14), (34, -66, -38, 19)))
    cone = np.minimum(cone, -table_mm - 1.6)
    wall = soft(cone + 2.0, 1.0) * soft(y + 69 - 0.3 * (side - 33), 2.0)
    mix(view, 850 + 150 * space.grain[part], wall)
    fat = soft(cone, 1.0) * soft(y + 74, 3.0)
    mix(view, person.fat_hu + 8 * space.grain[part], fat)
    np.maximum(solid, wall, out=solid)
    solid *= 1 - fat
    along = (y + 22) * np.float32(1 / -44)
    belly = (2.0 + 1.2 * np.sin(np.pi * np.clip(along, 0, 1))).astype(np.float32)
    fat *= along < 1.1
    for right, up in ((0, 11), (0, -11), (11, 0), (-11, 0)):
        away = np.hypot(side - 13 - (20 + right) * along, z + 29 + (9 - up) * along)
        mix(view, person.muscle_hu, soft(belly - away, 1.0) * fat)
    mix(view, 38.0, soft(tube(side, y, z, ((13, -20, -29, 2), (31, -56, -37, 2))), 1.0) * fat)
    globe = 12.8 - np.sqrt((side - 33) ** 2 + (y + 61) ** 2 + (z + 38) ** 2)
    mix(view, 45.0, soft(globe, 1.0))
    mix(view, 9.0, soft(globe - 1.5, 1.0))
    mix(view, 80.0, soft(4.5 - np.sqrt((side - 33) ** 2 + ((y + 70) * 1.8) ** 2 + (z + 38) ** 2), 1.0))

    # The nose: ethmoid cells above, below them turbinates about a septum.
    part = space.near((-100, -22), (-88, 12), (-22, 22))
    z, y, side, table_mm, texture = space.cut(part)
    grain, view, solid = space.grain[part], hu[part], bone[part]
    cells = tube(side, y, z, ((6, -68, -37, 5), (7, -46, -34, 7), (8, -28, -37, 6)))
    cells = np.minimum(cells, -table_mm - 1.5)
    wall, room = soft(cells + 1.3, 1.0), soft(cells, 1.0)
    cells = np.minimum(np.abs(np.mod((y + 3 * texture) * np.float32(1 / 7), 1) - 0.5) * 7, np.abs(side - 7 + texture))
    leaf = np.maximum(soft(0.6 - cells, 1.0), soft(0.9 - side, 1.0))
    mix(view, 500.0, wall)
    mix(view, -950.0, room)
    mix(view, 350 + 60 * grain, leaf * room)
    np.maximum(solid, wall * (1 - room), out=solid)
    nose = np.maximum.reduce(
        [
            tube(side, y, z, ((5, -80, -70, 5), (7, -56, -70, 9), (7, -26, -68, 8))),
            tube(side, y, z, ((3, -74, -52, 4), (5, -50, -54, 7), (5, -28, -54, 7))),
        ]
    )
    wall, room = soft(nose + 1.5, 1.0), soft(nose, 1.0)
    shell = np.abs(np.mod((z + 2.5 * side * 0.6 + 3 * texture) * np.float32(1 / 13), 1) - 0.5) * 13
    turbinate = soft(np.minimum(2.6 - shell, side - 3), 1.0)
    mix(view, 300.0, wall)
    mix(view, -970.0, room)
    mix(view, 50 + 10 * grain, room * turbinate)
    mix(view, 250.0, room * soft(1.1 - side, 1.0))
    solid *= 1 - room
    throat = soft(tube(side, y, z, ((0, -20, -66, 7), (0, -6, -76, 9), (0, -2, -98, 8))), 1.0)
    mix(view, -970.0, throat)
    solid *= 1 - throat

    size = 3 * person.air
    _hollow(hu, bone, space, 99.0, ((7, -6, -41, 5 + size), (9, -20, -39, 6 + size)))
    _hollow(hu, bone, space, person.sinus_fluid, ((31, -44, -66, 12), (29, -54, -72, 14)))
    for level, chain in (
        (1000, ((50, -60, -30, 2.5), (52, -58, -42, 3), (48, -62, -54, 4), (58, -46, -55, 3))),
        (1000, ((58, -46, -55, 2.5), (68, -22, -54, 2.2), (68, 2, -52, 2.5), (60, 10, -50, 3))),
        (1000, ((2, -80, -34, 3), (4, -90, -52, 1.5))),
        (800, ((20, -22, -52, 1.5), (20, -20, -84, 1.5))),
    ):
        _bony(hu, bone, space, level, chain, 0.5)


def _sheets(inside: Volume, space: _Space, person: _Person, cavity: Volume, tentorium_mm: Volume) -> None:
    """Dura with its two sheets and its sinuses, and the arteries at the base."""
    mix(inside, person.dura_hu, 0.8 * soft(0.7 - space.table_mm, 1.0) * cavity)
    # The falx hangs from the vault to an arch over the callosum; behind, down to the tentorium.
    part = space.near((-40, 140), (-100, 120), (-6, 6))
    z, y, side, table_mm, _ = space.cut(part)
    over, view, held = tentorium_mm[part], inside[part], cavity[part]
    lowest = 45 * (np.hypot((y + 2) / 60, (z - 2) / 42) - 1)
    lowest = np.minimum(np.minimum(lowest, z + 14 + 0.2 * np.minimum(y, 0)), over + 1)
    falx = soft(person.falx_mm + 0.15 * space.grain[part] - side, 1.0) * soft(lowest, 3.0)
    sagittal = soft(4.3 - np.hypot(side, table_mm - 2.5), 1.2) * soft(z + 14, 6) * step(y, -58, 5)
    straight = soft(2.6 - np.hypot(side, over), 1.2) * soft(y - 50, 3) * soft(92 - y, 1.0)
    mix(view, person.dura_hu, falx * held)
    mix(view, person.blood_hu, np.maximum(sagittal, straight) * held)

    part = space.near((-60, 30), (5, 120))
    z, y, side, table_mm, _ = space.cut(part)
    over, view, held = tentorium_mm[part], inside[part], cavity[part]
    notch = 24 * (np.hypot(side / 24, (y - 22) / 30) - 1)
    tent = soft(0.8 - np.abs(over), 1.0) * soft(np.minimum(notch, y - 14 - 0.42 * side), 2.0)
    wide = 3.1 - np.float32(person.dominant_mm) * np.sign(space.x[part])
    transverse = soft(wide - np.hypot(table_mm - 2.5, over), 1.2) * soft(y - 34, 3)
    sigmoid = soft(tube(side, y, z, ((60, 38, -27, 4), (54, 40, -40, 4), (44, 36, -56, 3.5))), 1.2)
    mix(view, person.dura_hu, 0.85 * tent * held)
    mix(view, person.blood_hu, np.maximum(transverse, sigmoid) * held)

    part = space.near((-60, -5), (-36, 32), (-42, 42))
    z, y, side, _, _ = space.cut(part)
    vessels = (
        ((0, 24, -56, 1.6), (0, 17, -40, 1.7), (0, 13, -24, 1.5)),
        ((9, 2, -30, 2.3), (9, -5, -22, 2.2), (14, -6, -19, 1.7), (36, -6, -17, 1.3), (40, -2, -12, 1.0)),
        ((10, -6, -20, 1.4), (2, -16, -16, 1.2), (2, -34, -6, 1.0)),
        ((1, 13, -23, 1.2), (16, 16, -20, 1.1), (24, 30, -14, 0.8)),
    )
    for chain in vessels:
        mix(inside[part], person.blood_hu - 4, soft(tube(side, y, z, chain), 1.2) * cavity[part])
