"""What a scanner adds to a slice: slab thickness, blur, noise, beam hardening, streaks, the head-holder."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from .anatomy import Head
from .fields import Grid, Image, bump, mix, soft
from .haemorrhage import SUBTYPES, Bleed


@dataclass(frozen=True, slots=True)
class Protocol:
    """How the head is scanned.

    Attributes:
        field_mm: edge of the reconstructed field.
        size: rows and columns.
        thickness_mm: of a slice.
        noise_hu: standard deviation in the head's middle.
        grain_mm: how far noise is correlated in the slice.
        blur_mm: standard deviation of the kernel.
        cupping_hu: brightening under the skull that is left by the correction of beam hardening.
        cupping_mm: how far under the skull it reaches.
        streak_hu: amplitude of the bands between the petrous bones.
        shift_hu: error of calibration.
        motion_mm: how far the head moved in a slice that it moved in.
        holder_mm: radius of the head-holder's arc; 0 where there is none in the field.
    """

    field_mm: float
    size: int
    thickness_mm: float
    noise_hu: float
    grain_mm: float
    blur_mm: float
    cupping_hu: float
    cupping_mm: float
    streak_hu: float
    shift_hu: float
    motion_mm: float
    holder_mm: float

    @property
    def pixel_mm(self) -> float:
        """Edge of a pixel."""
        return self.field_mm / self.size


def draw(rng: np.random.Generator, size: int, thickness_mm: float) -> Protocol:
    """A plausible protocol; thinner slices are noisier."""
    thin = min(2.2, max(0.8, float(np.sqrt(5 / thickness_mm))))
    return Protocol(
        field_mm=round(float(rng.uniform(218, 256)), 1),
        size=size,
        thickness_mm=thickness_mm,
        noise_hu=float(rng.uniform(1.8, 4.5)) * thin,
        grain_mm=float(rng.uniform(0.35, 0.9)),
        blur_mm=float(rng.uniform(0.3, 1.0)),
        cupping_hu=float(rng.uniform(-1, 9) if rng.random() < 0.5 else rng.uniform(5, 22)),
        cupping_mm=float(rng.uniform(4, 10)),
        streak_hu=float(rng.uniform(0, 12)),
        shift_hu=float(rng.normal(0, 2)),
        motion_mm=float(rng.uniform(0.5, 3) if rng.random() < 0.08 else 0),
        holder_mm=float(rng.uniform(105, 135) if rng.random() < 0.85 else 0),
    )


def scan(
    rng: np.random.Generator, head: Head, bleeds: tuple[Bleed, ...], protocol: Protocol, z: float
) -> tuple[Image, Image]:
    """One slice at height ``z`` mm in the scanner.

    The anatomy is drawn on pixels of about 1 mm, twice for a slice above 3 mm, and enlarged; noise is made at
    full resolution.

    Returns:
        HU (size, size), and the coverage 0..1 of each subtype (5, size, size), in the order of `SUBTYPES`.
    """
    coarse = min(protocol.size, round(protocol.field_mm / 1.0))
    grid = Grid(coarse, protocol.field_mm / coarse)
    offsets = (-protocol.thickness_mm / 4, protocol.thickness_mm / 4) if protocol.thickness_mm > 3 else (0.0,)
    hu = np.zeros((coarse, coarse), dtype=np.float32)
    covered = np.zeros((len(SUBTYPES), coarse, coarse), dtype=np.float32)
    for offset in offsets:
        one, blood = _cut(head, bleeds, protocol, grid, z + offset)
        hu += one / np.float32(len(offsets))
        covered += blood / np.float32(len(offsets))
    hu += _streaks(rng, head, protocol, grid, z)
    if protocol.motion_mm and rng.random() < 0.5:
        angle = rng.uniform(0, 2 * np.pi)
        move = np.array([[1, 0, np.cos(angle)], [0, 1, np.sin(angle)]]) * np.array(
            [1, 1, protocol.motion_mm / grid.pixel_mm]
        )
        hu = (hu + cv2.warpAffine(hu, move, (coarse, coarse), borderMode=cv2.BORDER_REPLICATE)) * np.float32(0.5)
    hu = np.asarray(cv2.GaussianBlur(hu, (0, 0), protocol.blur_mm / grid.pixel_mm), dtype=np.float32)
    size = protocol.size
    if size != coarse:
        hu = np.asarray(cv2.resize(hu, (size, size), interpolation=cv2.INTER_CUBIC), dtype=np.float32)
        covered = np.stack([cv2.resize(c, (size, size), interpolation=cv2.INTER_LINEAR) for c in covered])
    hu += _noise(rng, protocol)
    np.clip(hu, -1024, 3071, out=hu)
    return hu, covered


def _cut(head: Head, bleeds: tuple[Bleed, ...], protocol: Protocol, grid: Grid, z: float) -> tuple[Image, Image]:
    lifts = [bleed.lift(head, grid, z) for bleed in bleeds]
    lifted = [lift for lift in lifts if lift is not None]
    pushes = [push for bleed in bleeds if (push := bleed.push()) is not None]
    tissue = head.slice(
        grid,
        z,
        protocol.thickness_mm / (2 if protocol.thickness_mm > 3 else 1),
        lift=np.maximum.reduce(lifted) if lifted else None,
        push=max(pushes, key=lambda push: push.radius) if pushes else None,
    )
    hu = tissue.hu
    covered = np.zeros((len(SUBTYPES), grid.size, grid.size), dtype=np.float32)
    for bleed, lift in zip(bleeds, lifts, strict=True):
        blood = bleed.paint(hu, tissue, lift)
        layer = covered[SUBTYPES.index(bleed.subtype)]
        np.maximum(layer, blood, out=layer)
    hu += (
        protocol.cupping_hu * np.exp(-np.maximum(tissue.table, 0) / protocol.cupping_mm) + protocol.shift_hu
    ) * tissue.cranial
    if protocol.holder_mm:
        x, y = grid.axis()[None, :], grid.axis()[:, None]
        arc = protocol.holder_mm - np.hypot(x * 1.05, y + 10)
        arc = np.where(y < 5, np.float32(-40), np.minimum(arc, 3.5 - arc))
        mix(hu, 120.0, soft(arc.astype(np.float32), 1.0) * (hu < -300))
    return hu, covered


def _streaks(rng: np.random.Generator, head: Head, protocol: Protocol, grid: Grid, z: float) -> Image:
    """Dark and bright bands between the petrous bones, and fainter ones wherever bone is thick."""
    x, y, h = head.place(grid, z)
    strength = protocol.streak_hu * bump(h, -30 + head.base_mm, 11) + 0.1 * protocol.streak_hu
    slope = rng.uniform(-0.25, 0.25)
    waves = cv2.GaussianBlur(rng.standard_normal((1, 256), dtype=np.float32), (0, 0), rng.uniform(0.7, 2.0))
    waves /= waves.std() + np.float32(1e-3)
    across = (y + slope * x + 128) / 2
    bands = cv2.remap(np.ascontiguousarray(waves), across.astype(np.float32), np.zeros_like(x), cv2.INTER_LINEAR)
    inside = soft(58 - np.abs(x), 16) * soft(48 - np.abs(y - 8), 22)
    dark = -0.9 * bump(y - 8, 0, 14)
    return np.asarray(strength * inside * (0.7 * bands + dark), dtype=np.float32)


def _noise(rng: np.random.Generator, protocol: Protocol) -> Image:
    size = protocol.size
    sigma = max(0.3, protocol.grain_mm / protocol.pixel_mm)
    noise = cv2.GaussianBlur(rng.standard_normal((size, size), dtype=np.float32), (0, 0), sigma)
    slow = cv2.resize(rng.standard_normal((24, 24), dtype=np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    noise *= np.float32(protocol.noise_hu) / (noise.std() + np.float32(1e-6))
    noise += np.float32(0.12 * protocol.noise_hu) * slow
    axis = Grid(size, protocol.pixel_mm).axis()
    fall = np.exp(-((axis / np.float32(70)) ** 2))
    noise *= np.float32(0.65) + np.float32(0.4) * fall[None, :] * fall[:, None]
    return np.asarray(noise, dtype=np.float32)
