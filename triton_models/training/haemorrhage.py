"""Bleeds, each shaped by how it comes about, painted into a slice of a head."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .anatomy import Head, Push, Tissue
from .fields import Grid, Image, mix, soft

SUBTYPES = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")
"""In the order of the model's labels; a mask holds 1 + the position here."""

_SEATS = (  # where parenchymal bleeds sit: x (either side), y, z, spread
    (25.0, -4.0, 4.0, 5.0),  # putamen
    (12.0, 12.0, 6.0, 3.0),  # thalamus
    (42.0, -40.0, 22.0, 12.0),  # frontal lobe
    (48.0, 8.0, -8.0, 7.0),  # temporal lobe
    (38.0, 30.0, 38.0, 12.0),  # parietal lobe
    (30.0, 62.0, 12.0, 7.0),  # occipital lobe
    (24.0, 48.0, -38.0, 7.0),  # cerebellum
    (0.0, 8.0, -30.0, 3.0),  # pons
)
_BLEEDING_CISTERNS = ((0.0, -12.0, -18.0), (44.0, -8.0, 0.0), (-44.0, -8.0, 0.0), (0.0, 10.0, -16.0))
_SURFACE_MM = 70.0
"""The radius that turns an angle about the head's centre into millimetres along the inner table."""


@dataclass(frozen=True, slots=True)
class Bleed:
    """One haemorrhage: a subtype and the numbers that its shape needs.

    Attributes:
        subtype: one of `SUBTYPES`.
        centre: where it sits, in head coordinates (for a bleed on the surface: the direction from the centre).
        extent_mm: its radius, or its half-length along the inner table.
        depth_mm: its greatest thickness under the inner table; epidural and subdural only.
        axes: how it is stretched along x, y and z; parenchymal only.
        level_mm: the blood's surface in the ventricles: it lies behind (dependent of) this y.
        side: -1 or 1 where it keeps to one side of the falx, else 0.
        hu: attenuation of clot.
        oedema_mm: width of the dark rim; parenchymal only.
        patchy: how uneven it is, 0..1.
    """

    subtype: str
    centre: tuple[float, float, float]
    extent_mm: float
    hu: float
    depth_mm: float = 0.0
    axes: tuple[float, float, float] = (1.0, 1.0, 1.0)
    level_mm: float = 0.0
    side: int = 0
    oedema_mm: float = 0.0
    patchy: float = 0.3

    def push(self) -> Push | None:
        """The displacement that a large mass in the brain or on it causes."""
        if self.subtype == "intraparenchymal" and self.extent_mm > 7:
            return Push(self.centre, 0.9 * self.extent_mm)
        if self.depth_mm > 6:
            x, y, z = (61 * c / np.sqrt(sum(v * v for v in self.centre)) for c in self.centre)
            return Push((x, y, z), 1.3 * self.depth_mm)
        return None

    def lift(self, head: Head, grid: Grid, z: float) -> Image | None:
        """Thickness in mm of the blood between the inner table and the brain, at each pixel of a slice."""
        if self.subtype not in ("epidural", "subdural"):
            return None
        x, y, h = head.place(grid, z)
        radius = np.sqrt(x * x + y * y + h * h) + np.float32(1e-3)
        ahead = (x * self.centre[0] + y * self.centre[1] + h * self.centre[2]) / (
            radius * np.float32(np.sqrt(sum(c * c for c in self.centre)))
        )
        along = _SURFACE_MM * np.arccos(np.clip(ahead, -1, 1)) / self.extent_mm
        if self.subtype == "epidural":  # held by the dura's attachments: a lens
            return np.asarray(self.depth_mm * np.clip(1 - along * along, 0, 1), dtype=np.float32)
        profile = np.clip(1 - along**4, 0, 1) * (1 + self.patchy * head.lobes.at(z, grid))
        return np.asarray(self.depth_mm * np.clip(profile, 0, 2) * soft(self.side * x - 2, 3.0), dtype=np.float32)

    def paint(self, hu: Image, tissue: Tissue, lift: Image | None) -> Image:
        """Paint the bleed over a slice in place, and return its coverage 0..1 of each pixel."""
        edge = 1.2
        x, y, z = tissue.x, tissue.y, tissue.z
        clot = self.hu + 7 * self.patchy * tissue.texture
        if lift is not None:
            covered = soft(np.minimum(tissue.table, lift - tissue.table), edge) * tissue.cranial
            covered = np.minimum(covered, lift * np.float32(0.8)) * (lift > 0.3)
        elif self.subtype == "intraparenchymal":
            offsets = [(axis - c) / s for axis, c, s in zip((x, y, z), self.centre, self.axes, strict=True)]
            away = np.sqrt(offsets[0] ** 2 + offsets[1] ** 2 + offsets[2] ** 2)
            inside = self.extent_mm * (1 + 0.22 * tissue.texture) - away
            brain = tissue.cranial * (1 - tissue.ventricle) * soft(tissue.table - 2.5, 2.0)
            mix(hu, hu - 10, 0.9 * soft(inside + self.oedema_mm, 4.0) * brain * (1 - tissue.subarachnoid))
            covered = soft(inside, edge) * brain
        elif self.subtype == "intraventricular":
            below = y - self.level_mm + 0.12 * x + 1.5 * self.patchy * tissue.texture
            covered = soft(below, 2.0) * tissue.ventricle
            if self.side:
                covered = covered * soft(self.side * x + 1.0, 2.0)
        else:
            away = np.sqrt((x - self.centre[0]) ** 2 + (y - self.centre[1]) ** 2 + (z - self.centre[2]) ** 2)
            inside = self.extent_mm * (1 + 0.3 * tissue.texture) - away
            covered = soft(inside, 10.0) * tissue.subarachnoid * soft(tissue.texture + 2.2 - 2 * self.patchy, 1.0)
        mix(hu, clot, covered)
        return np.asarray(covered, dtype=np.float32)


def draw(rng: np.random.Generator, head: Head, subtype: str, volume_ml: float) -> Bleed:
    """A bleed of a subtype whose volume is about the one that is asked for (exactly is what the mask says).

    Raises:
        ValueError: no such subtype, or the volume is not positive.
    """
    if subtype not in SUBTYPES or not volume_ml > 0:
        raise ValueError(f"no bleed of {volume_ml} mL of subtype {subtype!r}; subtypes are {', '.join(SUBTYPES)}")
    cubic_mm = 1000.0 * volume_ml
    side = int(rng.choice((-1, 1)))
    patchy = float(rng.uniform(0.1, 0.6))
    hu = float(np.clip(rng.normal(62, 7), 46, 85))
    if subtype == "epidural":
        steep = rng.uniform(0.3, 0.6)
        extent = float(np.clip((2 * cubic_mm / (np.pi * steep)) ** (1 / 3), 9, 52))
        depth = float(np.clip(2 * cubic_mm / (np.pi * extent**2), 4, 38))
        return Bleed(subtype, _surface(rng, side), extent, hu, depth_mm=depth, side=side, patchy=patchy)
    if subtype == "subdural":
        extent = float(np.clip(rng.uniform(30, 50) * (volume_ml / 10) ** 0.2, 18, 80))
        depth = float(np.clip(cubic_mm / (0.62 * np.pi * extent**2), 3.5, 24))
        return Bleed(subtype, _surface(rng, side), extent, hu, depth_mm=depth, side=side, patchy=patchy)
    if subtype == "intraparenchymal":
        cx, cy, cz, spread = _SEATS[int(rng.choice(len(_SEATS), p=(0.22, 0.13, 0.15, 0.12, 0.14, 0.08, 0.1, 0.06)))]
        axes = rng.uniform(0.75, 1.3, 3)
        axes = axes / np.prod(axes) ** (1 / 3)
        radius = (3 * cubic_mm / (4 * np.pi)) ** (1 / 3)
        centre = np.array(
            [
                side * (cx + spread * rng.normal(0, 0.4)),
                cy + spread * rng.normal(0, 0.5),
                cz + spread * rng.normal(0, 0.5),
            ]
        )
        a, b, c = (float(v) for v in axes)
        rim = float(rng.uniform(1, 3) + 0.35 * radius * rng.uniform(0.2, 1))
        return Bleed(subtype, _triple(centre), float(radius), hu, axes=(a, b, c), oedema_mm=rim, patchy=patchy)
    if subtype == "intraventricular":
        level = float(np.interp(np.log(volume_ml), np.log([0.3, 2, 6, 15]), [49, 34, 14, -45]) + rng.normal(0, 4))
        kept = side if rng.random() < 0.3 else 0
        return Bleed(subtype, (0.0, level, 10.0), 60.0, min(hu, 70.0), level_mm=level, side=kept, patchy=patchy)
    extent = float(np.clip(15 * (volume_ml + 0.3) ** 0.34, 12, 70))
    if rng.random() < 0.55:
        centre = np.array(_BLEEDING_CISTERNS[int(rng.integers(len(_BLEEDING_CISTERNS)))])
    else:
        direction = np.array(_surface(rng, side))
        centre = 62 * direction / np.linalg.norm(direction)
        extent *= 1.15
    return Bleed(subtype, _triple(centre), extent, float(np.clip(hu - 4, 46, 76)), side=0, patchy=patchy)


def _surface(rng: np.random.Generator, side: int) -> tuple[float, float, float]:
    """A direction to the side of the vault, away from its floor and its midline."""
    around = rng.uniform(-1.0, 1.0)
    up = rng.uniform(0.0, 0.75)
    return (side * float(np.cos(around) * np.cos(up)), float(np.sin(around) * np.cos(up)), float(np.sin(up)))


def _triple(vector: NDArray[np.float64]) -> tuple[float, float, float]:
    return float(vector[0]), float(vector[1]), float(vector[2])
