"""A head as soft-edged shapes in space, cut by transverse slices.

Coordinates in the head are millimetres: x to the patient's left, y to the back, z to the crown, with the origin near
the third ventricle. The shapes are coarse and the numbers are typical adult ones; nothing is taken from a patient.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .fields import Array, Field, Grid, Image, bump, mix, soft, step, tube

_LATERAL = np.array(  # frontal horn, body, trigone; then the two horns that leave it
    [[11, -36, 6, 3.5], [8, -24, 14, 5], [8, -4, 22, 5], [12, 14, 22, 5.5], [22, 32, 12, 6.5]], dtype=np.float32
)
_OCCIPITAL = np.array([[22, 32, 12, 6.5], [23, 44, 8, 4.5], [22, 56, 6, 2]], dtype=np.float32)
_TEMPORAL = np.array([[22, 32, 12, 6.5], [31, 20, -5, 3], [30, 2, -15, 2.5]], dtype=np.float32)
_THIRD = np.array([[0, -10, 0, 2], [0, 6, 2, 2.5], [0, 14, 0, 1.5]], dtype=np.float32)
_NUCLEI = (  # caudate, lentiform, thalamus: centre and half-axes, either side
    (11.0, -22.0, 6.0, 5.0, 10.0, 9.0),
    (24.0, -6.0, 4.0, 8.0, 17.0, 10.0),
    (11.0, 11.0, 6.0, 8.0, 12.0, 8.0),
)
_FOURTH = np.array([[0, 24, -14, 1], [0, 32, -30, 5], [0, 34, -42, 3]], dtype=np.float32)
_CISTERNS = (
    np.array([[0, -20, -19, 5], [0, -4, -20, 7]], dtype=np.float32),
    np.array([[4, -12, -19, 4.5], [24, -14, -17, 3.5], [36, -12, -12, 3]], dtype=np.float32),
    np.array(
        [[5, -2, -18, 4], [17, 6, -16, 2.5], [18, 16, -12, 2.5], [8, 26, -8, 3.5], [0, 27, -7, 4]], dtype=np.float32
    ),
    np.array([[0, -6, -24, 4], [0, 2, -45, 3.5]], dtype=np.float32),
    np.array([[4, 2, -40, 3], [20, 6, -42, 4]], dtype=np.float32),
)


@dataclass(frozen=True, slots=True)
class Tissue:
    """What one slice of a head is made of, on its grid; coverages are 0..1, distances in mm.

    Attributes:
        hu: the image without blood, noise or artefact.
        x, y, z: coordinates in the head.
        table: depth under the skull's inner table, negative outside.
        floor: height above the floor of the skull.
        cranial: coverage of the inside of the skull.
        ventricle: coverage of the ventricles.
        subarachnoid: coverage of sulci, fissures, cisterns and the space over the brain.
        texture: a field correlated over about 12 mm, for the edges of lesions.
    """

    hu: Image
    x: Image
    y: Image
    z: Image
    table: Image
    floor: Image
    cranial: Image
    ventricle: Image
    subarachnoid: Image
    texture: Image


@dataclass(frozen=True, slots=True)
class Push:
    """Tissue pushed away from a mass at ``centre`` whose radius is ``radius`` mm (0: nothing is pushed)."""

    centre: tuple[float, float, float]
    radius: float


@dataclass(frozen=True, slots=True)
class _Cut:
    """One slice's pixels in the head: coordinates, distances and fields, as in `Tissue`; ``side`` is |x|."""

    x: Image
    y: Image
    h: Image
    side: Image
    table: Image
    floor: Image
    lobes: Image
    texture: Image
    grain: Image
    soft_mm: float


class Head:
    """One person's head: shape, tissue and pose, drawn from a generator.

    Args:
        rng: everything is drawn from it.
        age: years; the older, the wider the spaces that hold fluid.
    """

    def __init__(self, rng: np.random.Generator, age: float) -> None:
        uniform, normal = rng.uniform, rng.normal
        self.half_width = uniform(61, 70)
        self.half_length = uniform(76, 88)
        self.height = uniform(72, 86)
        self.taper = uniform(0.02, 0.12)
        self.lopsided = normal(0, 0.015)
        self.bone_mm = uniform(4.0, 11.0)
        self.scalp_mm = uniform(4, 8)
        self.bone_hu = uniform(1150, 1750)
        self.edge = uniform(1.0, 2.6)
        self.dura_mm = uniform(-0.5, 1.2)
        self.muscle_top = uniform(-15, 50)
        self.muscle_mm = uniform(3, 12)
        self.swelling = (
            float(rng.choice((-1, 1))) * uniform(0.2, 1),
            normal(0, 0.6),
            normal(0.4, 0.4),
            uniform(4, 12) if rng.random() < 0.3 else 0.0,
        )
        self.diploe_hu = uniform(350, 950)
        atrophy = float(np.clip((age - 45) / 45 + normal(0, 0.3), 0, 1.3))
        self.gap_mm = uniform(-0.2, 0.9) + uniform(0.3, 2.2) * atrophy
        self.sulcus_mm = 0.65 + 1.2 * atrophy * uniform(0.5, 1.2)
        self.sulcus_depth_mm = uniform(12, 22)
        self.ventricle_mm = -1.5 + 4.0 * atrophy + normal(0, 0.9)
        self.ventricle_tilt = normal(0, 0.08)
        self.cistern_mm = -1.2 + 2.2 * atrophy + normal(0, 0.6)
        self.sylvian_mm = 0.8 + 2.2 * atrophy + abs(normal(0, 0.5))
        self.sylvian_y, self.sylvian_slope = uniform(2, 16), uniform(0.3, 1.3)
        self.sylvian_wave, self.sylvian_turn = uniform(1, 7), uniform(-1.5, 1.5)
        self.fissure_mm = 0.5 + 1.5 * atrophy
        self.grey_hu = uniform(30, 42)
        self.white_hu = self.grey_hu - uniform(4.5, 9.5)
        self.fluid_hu = uniform(2, 12)
        self.pale_mm = uniform(4, 14)
        self.pale_hu = uniform(0, 4) + 7 * atrophy * uniform(0, 1)
        self.falx_hu = uniform(42, 65)
        self.falx_mm = uniform(0.6, 1.4)
        self.sinus_hu = uniform(44, 64)
        self.vessel_hu = uniform(40, 58)
        self.base_mm = uniform(-5, 5)
        self.air = uniform(0.3, 1.0)
        self.pitch = np.deg2rad(uniform(-18, 14))
        self.roll = np.deg2rad(normal(0, 3.5))
        self.yaw = np.deg2rad(normal(0, 6))
        self.centre = np.array([normal(0, 6), normal(-2, 7), 0.0])
        self.calcified = _calcifications(rng)
        self.scars = _scars(rng, age)
        self.shape = Field(rng, 45)
        self.folds = Field(rng, uniform(7.0, 9.5))
        self.lobes = Field(rng, 24)
        self.texture = Field(rng, 12)
        self.grain = Field(rng, 4.0)

    def rotation(self) -> NDArray[np.float64]:
        """The matrix from head coordinates to the scanner's."""
        (cp, sp), (cr, sr), (cy, sy) = ((np.cos(a), np.sin(a)) for a in (self.pitch, self.roll, self.yaw))
        about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
        about_y = np.array([[cr, 0, sr], [0, 1, 0], [-sr, 0, cr]])
        about_z = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
        return np.asarray(about_z @ about_y @ about_x)

    def place(self, grid: Grid, z: float) -> tuple[Image, Image, Image]:
        """Head coordinates (x, y, z) of every pixel of the slice at scanner height ``z``."""
        inverse = self.rotation().T.astype(np.float32)
        across = (grid.axis() - self.centre[0])[None, :].astype(np.float32)
        down = (grid.axis() - self.centre[1])[:, None].astype(np.float32)
        x, y, h = (row[0] * across + row[1] * down + row[2] * np.float32(z - self.centre[2]) for row in inverse)
        return x, y, h

    def table(self, x: Image, y: Image, z: Image, wobble: Image | float = 0.0) -> Image:
        """Depth under the inner table in mm, positive inside, measured toward the origin."""
        a = self.half_width * (1 + self.taper * y / self.half_length) * (1 + self.lopsided * np.sign(x))
        flat = np.power(np.abs(x / a), 2.25) + np.power(np.abs(y / self.half_length), 2.25)
        flat = np.power(flat, 1 / 2.25)
        high = np.where(z > 0, np.abs(z) / self.height, np.abs(z) / 118)
        ratio = np.sqrt(flat * flat + high * high) + np.float32(1e-3)
        radius = np.sqrt(x * x + y * y + z * z)
        return np.asarray(radius * (1 / ratio - 1) + wobble, dtype=np.float32)

    def slice(
        self, grid: Grid, z: float, thickness_mm: float, *, lift: Image | None = None, push: Push | None = None
    ) -> Tissue:
        """Cut the head.

        Args:
            grid: the slice's pixels.
            z: its height in the scanner, mm.
            thickness_mm: bone that crosses the slice at a slant is blurred over this much.
            lift: how far the brain is lifted off the inner table at each pixel, mm.
            push: a mass that displaces ventricles and cisterns.
        """
        soft_mm = max(1.0, grid.pixel_mm)
        x, y, h = self.place(grid, z)
        near = (float(h.min()), float(h.max()))
        shape, lobes = self.shape.at(z, grid), self.lobes.at(z, grid)
        texture, grain, folds = self.texture.at(z, grid), self.grain.at(z, grid), self.folds.at(z, grid)
        side = np.abs(x)

        table = self.table(x, y, h, 2.2 * shape)
        floor = h - self._floor(x, y, side, lobes)
        thickness = self.bone_mm * (1 + 0.22 * lobes - 0.4 * bump(h, -8, 24) * bump(side, self.half_width, 16))
        thickness = np.maximum(thickness + 2.5 * bump(side, 0, 18) * bump(y, self.half_length, 20), 2.4)

        cut = _Cut(x, y, h, side, table, floor, lobes, texture, grain, soft_mm)
        hu = np.full(x.shape, -1000.0, dtype=np.float32)
        self._outside(hu, cut, thickness)

        # The vault: two tables with the diploë between them.
        out = -table
        slant = np.clip(np.abs(h) / np.sqrt(x * x + y * y + h * h + 1), 0, 0.9)
        blurred = self.edge * (soft_mm + thickness_mm * slant)
        middle = soft(np.minimum(out - 0.28 * thickness, 0.72 * thickness - out), soft_mm)
        vault = soft(np.minimum(out, thickness - out), blurred)
        bone = self.bone_hu * (1 + 0.05 * texture) + (self.diploe_hu + 160 * grain - self.bone_hu) * middle
        mix(hu, bone, vault * soft(floor + 26, 6.0))

        cranial = np.minimum(soft(table, blurred), soft(floor, soft_mm + 0.7 * thickness_mm))
        self._base(hu, cut)

        # The brain and the spaces that hold fluid.
        depth = np.minimum(table - (0 if lift is None else lift), floor * 0.9)
        bx, by, bh = _pushed(x, y, h, push)
        bside = np.abs(bx)
        ventricle_mm = self._ventricle(bx, by, bh, bside, texture, near)
        ventricle = soft(ventricle_mm, soft_mm)
        sulcus = _line(folds, grid.pixel_mm)
        open_mm = self.sulcus_mm * (1 + 0.5 * lobes) * np.clip(1 - depth / self.sulcus_depth_mm, 0, 1)
        open_mm *= 1 - 0.5 * step(-h, 22, 4)
        sulci = soft(open_mm - sulcus, soft_mm) * (open_mm > 0.05)
        over = soft(self.gap_mm * (1 + 0.35 * lobes) * soft(h + 15, 30) + 0.4 - depth, soft_mm)
        cistern = self._cistern(bx, by, bh, bside, texture, near, soft_mm)
        wander = bx + 0.8 * lobes
        cleft = self.fissure_mm * np.clip(1.25 - depth / 30, 0.15, 1) * soft(bh - 12 + 34 * step(-by, 20, 5), 8)
        fissure = soft(cleft + 0.4 * texture * self.fissure_mm - np.abs(wander), soft_mm)
        subarachnoid = np.maximum.reduce([sulci, over, cistern, fissure]) * cranial * (1 - ventricle)

        ribbon = np.minimum(sulcus - open_mm + 0.35 * np.maximum(depth - 6, 0), depth - self.gap_mm)
        grey = soft(3.6 - ribbon, 3.0)
        for cx, cy, cz, rx, ry, rz in _NUCLEI:
            gone = ((bside - cx) / rx) ** 2 + ((by - cy) / ry) ** 2 + ((bh - cz) / rz) ** 2
            np.maximum(grey, 0.85 * soft((1.2 - gone) * 4, 3.0), out=grey)
        np.maximum(grey, 0.55 * step(-h, 24, 3) * step(by, 8, 4), out=grey)  # cerebellum
        brain = self.white_hu + (self.grey_hu - self.white_hu) * grey + 0.9 * texture + 0.9 * lobes + 0.5 * grain
        brain -= self.pale_hu * np.exp(-np.maximum(-ventricle_mm, 0) / self.pale_mm) * (1 - grey) * soft(h + 2, 8)
        for sx, sy, sz, radius, drop in self.scars:
            away = radius * (1 + 0.25 * texture) - np.sqrt((x - sx) ** 2 + (y - sy) ** 2 + (h - sz) ** 2)
            mix(brain, self.fluid_hu + 6, np.float32(drop) * soft(away, 5.0))
        mix(brain, self.fluid_hu + 1.5 * texture, np.maximum(subarachnoid, ventricle * cranial))
        self._dura(brain, cut, cranial, (bx, by, bh))
        mix(hu, brain, cranial)
        for cx, cy, cz, radius, level in self.calcified:
            gone = np.sqrt((bx - cx) ** 2 + (by - cy) ** 2 + (bh - cz) ** 2)
            mix(hu, level, soft(radius * (1 + 0.2 * grain) - gone, soft_mm) * cranial)
        return Tissue(hu, x, y, h, table, floor, cranial, ventricle * cranial, subarachnoid, texture)

    def _dura(self, brain: Image, cut: _Cut, cranial: Image, pushed: tuple[Image, Image, Image]) -> None:
        """Dura, its sinuses, and vessels in the cisterns."""
        x, y, h, table, lobes, soft_mm = cut.x, cut.y, cut.h, cut.table, cut.lobes, cut.soft_mm
        bx, by, bh = pushed
        wander = bx + 0.8 * lobes
        mix(brain, self.falx_hu, soft(self.dura_mm + 0.3 * cut.grain - table, soft_mm) * cranial)
        falx = soft(self.falx_mm - np.abs(wander), soft_mm) * soft(h - 12 + 26 * step(-y, 25, 5), 6)
        mix(brain, self.falx_hu, falx * soft(26 + 14 * np.abs(lobes) - table, 6) * soft(60 - h, 30) * cranial)
        mix(
            brain, self.sinus_hu, soft(4.2 - np.hypot(x * 1.1, table - 2.5), soft_mm) * soft(h + 5, 8) * step(y, -60, 6)
        )
        cross = np.hypot(table - 3.5, (h + 24 + 2 * lobes) * 0.9)
        mix(brain, self.sinus_hu, soft(3.6 - cross, soft_mm) * step(y, 30, 5))
        tent = 1.0 - np.abs(h + 22 - 0.55 * np.maximum(62 - np.hypot(x, y - 30), 0))
        mix(brain, 0.6 * self.falx_hu + 0.4 * brain, 0.7 * soft(tent, soft_mm) * step(y, 22, 3) * cranial)
        vessel = soft(1.3 - np.hypot(by + 13 - 0.15 * np.abs(bx), bh + 17), soft_mm) * soft(34 - np.abs(bx), 3)
        vessel = np.maximum(vessel, soft(1.8 - np.hypot(bx, by + 4), soft_mm) * soft(-26 - bh, 5))
        mix(brain, self.vessel_hu, vessel * cranial)

    def _floor(self, x: Image, y: Image, side: Image, lobes: Image) -> Image:
        """Height of the skull's floor: three steps down from front to back, with the petrous ridges between."""
        front = -20 - 7 * bump(side, 0, 9) + 4 * bump(side, 30, 16)
        middle = -41 + 19 * bump(side, 0, 13) + 5 * bump(side, 62, 14)
        ridge_y = -6 + 0.55 * side
        back = -66 + 0.006 * side * side + 10 * bump(y, self.half_length, 22) - 70 * soft(15 - np.hypot(x, y - 24), 4)
        behind_wing = step(y + 0.18 * side, -24, 2.5)
        behind_ridge = step(y - ridge_y, 0, 2.5)
        floor = front + (middle - front) * behind_wing
        floor = floor + (back - floor) * behind_ridge
        ridge = bump(y - ridge_y, 0, 7) * step(side, 12, 3)
        return np.asarray(floor + (-27 - floor) * 0.85 * ridge + self.base_mm + 1.5 * lobes, dtype=np.float32)

    def _outside(self, hu: Image, cut: _Cut, thickness: Array) -> None:
        """Scalp, face and neck."""
        x, y, h, side, table = cut.x, cut.y, cut.h, cut.side, cut.table
        texture, grain, soft_mm = cut.texture, cut.grain, cut.soft_mm
        scalp = self.scalp_mm * (1 + 0.15 * texture) + 9 * step(-h, 30, 8) * step(y, 20, 10)
        temple = bump(y, -20, 30) * step(side, self.half_width * 0.7, 5) * step(self.muscle_top - h, 0, 6)
        scalp = scalp + self.muscle_mm * temple
        reach = np.sqrt(x * x + y * y + h * h + 1)
        sx, sy, sz, high = self.swelling
        toward = (sx * x + sy * y + sz * h) / (reach * np.float32(np.sqrt(sx * sx + sy * sy + sz * sz)))
        swollen = bump(toward, 1, 0.12)
        scalp = scalp + high * swollen
        skin = table + thickness + scalp
        face = 48 - np.sqrt((x * 0.98) ** 2 + ((y + 62) * 1.0) ** 2 + (np.maximum(h + 42, 0) * 1.5) ** 2)
        nose = 11 - np.hypot(x, (y + 106) * 0.6) - 1.2 * np.maximum(h + 36, 0)
        neck = 62 - np.hypot(x, (y - 30) * 0.9) - 1.5 * np.maximum(h + 45, 0)
        skin = np.maximum.reduce([skin, face, nose, neck])
        ear = np.minimum(4 + 1.5 * texture - np.abs(side - self.half_width - 17), 17 - np.hypot(y - 8, h + 36))
        skin = np.maximum(skin, ear)
        inside = soft(skin, soft_mm)
        muscle = step(texture + 0.3 * grain, -0.9, 0.3) * (1 - 0.75 * soft(1.2 - _line(texture, 1.0), 1.0))
        deep = step(-h, 22, 5) + np.minimum(temple * 1.8, 1) + (high > 0) * np.minimum(swollen * 1.6, 1)
        flesh = -95 + 148 * np.clip(deep, 0, 1) * muscle
        flesh = flesh + (15 - flesh) * soft(2.2 - skin, 1.5)
        mix(hu, flesh + 6 * grain, inside)

    def _base(self, hu: Image, cut: _Cut) -> None:
        """Skull base, orbits, sinuses, and what hangs below."""
        x, y, h, side, table, floor = cut.x, cut.y, cut.h, cut.side, cut.table, cut.floor
        texture, grain, soft_mm = cut.texture, cut.grain, cut.soft_mm
        if float(h[table > -25].min(initial=99)) > 0:
            return
        ridge_y = -6 + 0.55 * side
        thick = 4 + 3 * np.abs(texture) + 16 * bump(y - ridge_y, 0, 9) + 9 * bump(side, 0, 11) * bump(y, -10, 20)
        bone = soft(np.minimum(-floor, thick + floor), soft_mm) * soft(table + 4, 3)
        mix(hu, 780 + 330 * texture + 260 * grain, bone)
        cells = step(grain + 0.4 * texture, 0.55 - 0.5 * self.air, 0.2)
        mastoid = soft(15 - np.sqrt((side - 52) ** 2 + (y - 22) ** 2 + ((h + 42) * 0.7) ** 2), 3)
        mix(hu, 850 - 1500 * cells, mastoid)
        # The face: walls of bone round air, mottled.
        face = soft(30 - np.maximum.reduce([np.abs(x), np.abs(y + 66), (h + 62) * 1.1]), 3) * soft(-floor - 2, 2)
        wall = _line(texture + 0.4 * grain, 1.0)
        mix(hu, 420 + 260 * grain, 0.75 * face * soft(1.6 - wall, soft_mm))
        nasal = soft(np.minimum(17 - side, 26 - np.abs(y + 66)), 2) * soft(-floor - 3, 2) * step(-h, 24, 2)
        septum = soft(
            1.0 - np.abs(np.abs(x + 1.5 * texture) - np.where(np.abs(grain) > 0.2, np.float32(6), np.float32(0))),
            soft_mm,
        )
        mix(hu, -850 + 1000 * np.maximum(septum, 0.7 * step(grain, 0.9, 0.2)), nasal * min(1.0, self.air + 0.2))
        antrum = 14 + 2 * texture - np.sqrt((side - 31) ** 2 + (y + 66) ** 2 + ((h + 66) * 0.8) ** 2)
        mix(hu, 700.0, soft(antrum + 2.0, soft_mm))
        mix(hu, -950.0, soft(antrum, soft_mm))
        sphenoid = 10 + 1.5 * texture - np.sqrt((side - 7) ** 2 + (y + 24) ** 2 + (h + 33) ** 2)
        mix(hu, 650.0, soft(sphenoid + 1.8, soft_mm))
        mix(hu, -950.0, soft(sphenoid, soft_mm) * self.air)
        frontal = (
            8 * self.air + 1.5 * texture - np.sqrt((x * 0.5) ** 2 + (y + self.half_length - 1) ** 2 + (h + 12) ** 2)
        )
        mix(hu, 900.0, soft(frontal + 2, soft_mm))
        mix(hu, -950.0, soft(frontal, soft_mm))
        orbit = 18.5 - np.sqrt((side - 33) ** 2 + ((y + 66) * 0.72) ** 2 + (h + 36) ** 2)
        mix(hu, 750.0, soft(orbit + 2.2, soft_mm) * soft(y + 84, 4))
        mix(hu, -85 + 10 * grain, soft(orbit, soft_mm))
        globe = 12.5 - np.sqrt((side - 33) ** 2 + (y + 76) ** 2 + (h + 36) ** 2)
        mix(hu, 42.0, soft(globe, soft_mm))
        mix(hu, 8.0, soft(globe - 1.6, soft_mm))
        lens = 4 - np.sqrt((side - 33) ** 2 + ((y + 86) * 1.6) ** 2 + (h + 36) ** 2)
        mix(hu, 75.0, soft(lens, soft_mm))
        nerve = soft(2.2 - np.hypot(side - 33 + 0.42 * (y + 64), h + 36), soft_mm) * soft(
            np.minimum(y + 64, -34 - y), 3
        )
        mix(hu, 40.0, nerve)
        # Jaw joints and the first vertebra about the canal.
        joint = 7 + 2 * texture - np.sqrt((side - 50) ** 2 + (y + 2) ** 2 + ((h + 56) * 0.5) ** 2)
        mix(hu, 650 + 250 * grain, soft(joint, soft_mm))
        ring = 5 + 2.0 * texture - np.abs(np.hypot(x * 0.75, y - 24) - 21)
        mix(hu, 750 + 250 * grain, soft(ring, soft_mm) * soft(-72 - h, 4))
        canal = 14 - np.hypot(x, y - 24)
        mix(hu, self.fluid_hu + 4, soft(canal, soft_mm) * soft(-66 - h, 4))
        mix(hu, self.grey_hu - 3, soft(canal - 7, soft_mm) * soft(-66 - h, 4))

    def _ventricle(self, x: Image, y: Image, h: Image, side: Image, texture: Image, near: tuple[float, float]) -> Image:
        """Signed distance in mm, positive inside."""
        signed = side - self.ventricle_tilt * x
        wide = (signed * 0.96, y, h)
        inside = np.maximum.reduce([tube(*wide, chain, near) for chain in (_LATERAL, _OCCIPITAL, _TEMPORAL)])
        inside = np.minimum(inside + self.ventricle_mm, side - 0.8)  # the septum stays between the two
        third = tube(x, y, h * 0.7, _THIRD, (near[0] * 0.7, near[1] * 0.7)) + 0.35 * self.ventricle_mm
        fourth = tube(x, y, h, _FOURTH, near) + 0.25 * self.ventricle_mm
        return np.asarray(np.maximum.reduce([inside, third, fourth]) + 0.8 * texture, dtype=np.float32)

    def _cistern(
        self, x: Image, y: Image, h: Image, side: Image, texture: Image, near: tuple[float, float], soft_mm: float
    ) -> Image:
        inside = np.maximum.reduce([tube(side, y, h, chain, near) for chain in _CISTERNS])
        inside = inside + self.cistern_mm + 0.7 * texture
        turn = side * 0.16 + self.sylvian_turn * np.sign(x)
        course = (
            y + self.sylvian_y - self.sylvian_slope * h - self.sylvian_wave * np.sin(turn) + 2 * texture
        )  # the sylvian fissure: a folded sheet under the temple
        sheet = self.sylvian_mm * (1 + 0.5 * texture) - np.abs(course) / 1.3
        sheet = np.minimum(sheet, np.minimum(side - 34, 24 - np.abs(h - 2)))
        return soft(np.maximum(inside, sheet), soft_mm)


def _line(field: Array, pixel_mm: float) -> Image:
    """About the distance in mm to the field's zero contour."""
    down, across = np.gradient(field, np.float32(pixel_mm))
    return np.asarray(np.abs(field) / (np.hypot(down, across) + np.float32(0.02)), dtype=np.float32)


def _pushed(x: Image, y: Image, h: Image, push: Push | None) -> tuple[Image, Image, Image]:
    """Where the tissue now at a point came from when a mass grew, keeping its volume, at some centre."""
    if push is None or push.radius <= 0:
        return x, y, h
    cx, cy, cz = (np.float32(c) for c in push.centre)
    away = np.sqrt((x - cx) ** 2 + (y - cy) ** 2 + (h - cz) ** 2) + np.float32(1e-3)
    kept = np.cbrt(np.clip(1 - (push.radius / away) ** 3, 0.02, 1)).astype(np.float32)
    return cx + (x - cx) * kept, cy + (y - cy) * kept, cz + (h - cz) * kept


def _calcifications(rng: np.random.Generator) -> tuple[tuple[float, ...], ...]:
    """Bright specks that are no haemorrhage: (x, y, z, radius, HU)."""
    specks: list[tuple[float, ...]] = []
    if rng.random() < 0.6:
        specks.append(
            (rng.normal(0, 1), 22 + rng.normal(0, 2), -1 + rng.normal(0, 2), rng.uniform(1, 3.5), rng.uniform(70, 350))
        )
    for side in (-1, 1):
        if rng.random() < 0.6:
            specks.append(
                (
                    side * 22 + rng.normal(0, 1.5),
                    34 + rng.normal(0, 3),
                    11 + rng.normal(0, 3),
                    rng.uniform(1.2, 5),
                    rng.uniform(60, 320),
                )
            )
        if rng.random() < 0.15:
            specks.append(
                (
                    side * 20 + rng.normal(0, 1.5),
                    -4 + rng.normal(0, 3),
                    3 + rng.normal(0, 2),
                    rng.uniform(1, 4),
                    rng.uniform(50, 150),
                )
            )
    for side in (-1, 1):  # clinoid processes and carotid walls, cut through
        if rng.random() < 0.6:
            specks.append(
                (
                    side * 10 + rng.normal(0, 2),
                    -15 + rng.normal(0, 4),
                    -20 + rng.normal(0, 3),
                    rng.uniform(1, 3.5),
                    rng.uniform(80, 700),
                )
            )
        if rng.random() < 0.4:
            specks.append(
                (
                    side * 5 + rng.normal(0, 2),
                    -4 + rng.normal(0, 2),
                    -20 + rng.normal(0, 3),
                    rng.uniform(1, 3),
                    rng.uniform(80, 700),
                )
            )
    for _ in range(rng.integers(0, 3) if rng.random() < 0.4 else 0):
        specks.append(
            (rng.normal(0, 0.8), rng.uniform(-60, -10), rng.uniform(35, 65), rng.uniform(1, 4), rng.uniform(100, 600))
        )
    return tuple(specks)


def _scars(rng: np.random.Generator, age: float) -> tuple[tuple[float, ...], ...]:
    """Old infarcts: (x, y, z, radius, how far to fluid)."""
    count = int(rng.random() < 0.1 + 0.003 * max(0.0, age - 40)) * int(rng.integers(1, 3))
    return tuple(
        (rng.uniform(-48, 48), rng.uniform(-45, 55), rng.uniform(-20, 45), rng.uniform(3, 22), rng.uniform(0.2, 0.95))
        for _ in range(count)
    )
