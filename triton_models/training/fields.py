"""Smooth random fields in space, and the soft edge that every shape of the phantom is drawn with."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]
Array = NDArray[np.floating[Any]]

REACH_MM = 150.0
"""Half the edge of the cube about the isocentre in which fields are defined."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The pixels of one transverse slice about the isocentre: ``size`` × ``size`` of ``pixel_mm``."""

    size: int
    pixel_mm: float

    def axis(self) -> Image:
        """Coordinates in mm of the pixel centres along a row or a column."""
        return ((np.arange(self.size) - (self.size - 1) / 2) * self.pixel_mm).astype(np.float32)


class Field:
    """Unit-variance noise, correlated over about ``cell_mm`` in all three directions and fixed in space."""

    def __init__(self, rng: np.random.Generator, cell_mm: float) -> None:
        self.cell_mm = cell_mm
        count = int(np.ceil(2 * REACH_MM / cell_mm)) + 2
        self.planes = rng.standard_normal((count, count, count), dtype=np.float32)

    def at(self, z: float, grid: Grid) -> Image:
        """The field's values on the slice at height ``z`` mm."""
        height = float(np.clip((z + REACH_MM) / self.cell_mm, 0, len(self.planes) - 1.001))
        low = int(height)
        upper = height - low
        plane = self.planes[low] * np.float32(1 - upper) + self.planes[low + 1] * np.float32(upper)
        plane *= np.float32(1 / np.hypot(upper, 1 - upper))
        scale = grid.pixel_mm / self.cell_mm
        start = (REACH_MM - (grid.size - 1) / 2 * grid.pixel_mm) / self.cell_mm
        to_plane = np.array([[scale, 0, start], [0, scale, start]])
        how = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        image = cv2.warpAffine(plane, to_plane, (grid.size, grid.size), flags=how, borderMode=cv2.BORDER_REFLECT)
        return np.asarray(image, dtype=np.float32)


def soft(distance_mm: Array, width_mm: Array | float) -> Image:
    """Coverage 0..1 of a shape whose signed distance, positive inside, is given; its edge is ``width_mm`` wide."""
    return np.asarray(np.clip(distance_mm / width_mm + 0.5, 0, 1), dtype=np.float32)


def bump(x: Array, centre: float, width: float) -> Image:
    """A Gaussian of height 1."""
    scaled = (x - np.float32(centre)) * np.float32(1 / width)
    return np.asarray(np.exp(-scaled * scaled), dtype=np.float32)


def step(x: Array, at: float, width: float) -> Image:
    """A logistic step from 0 to 1."""
    return np.asarray(
        1 / (1 + np.exp(np.clip((np.float32(at) - x) * np.float32(1 / width), -30, 30))), dtype=np.float32
    )


def mix(image: Image, value: Array | float, coverage: Array) -> None:
    """Paint a value over an image, in place, where coverage is 1, and in part where it is less."""
    image += (value - image) * coverage


def tube(x: Array, y: Array, z: Array, points: NDArray[np.float32], near_z: tuple[float, float]) -> Image:
    """Signed distance, positive inside, to a chain of round-ended cones.

    Args:
        x, y, z: coordinates in mm.
        points: (n, 4) of x, y, z and radius.
        near_z: the lowest and highest z of the slice; links wholly elsewhere are left out.
    """
    inside = np.full(x.shape, -99.0, dtype=np.float32)
    for first, second in pairwise(points):
        radius = max(first[3], second[3])
        if min(first[2], second[2]) - radius - 4 > near_z[1] or max(first[2], second[2]) + radius + 4 < near_z[0]:
            continue
        along = second[:3] - first[:3]
        px, py, pz = x - first[0], y - first[1], z - first[2]
        share = np.clip((px * along[0] + py * along[1] + pz * along[2]) * (1 / float(along @ along)), 0, 1)
        px -= share * along[0]
        py -= share * along[1]
        pz -= share * along[2]
        reach = first[3] + share * (second[3] - first[3]) - np.sqrt(px * px + py * py + pz * pz)
        np.maximum(inside, reach, out=inside)
    return inside
