"""Smooth random fields on a grid, the soft edge that every shape of the head is drawn with, and looking volumes up."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Volume = NDArray[np.float32]
Array = NDArray[np.floating[Any]]
_TALLEST = 32000
"""Rows of the tallest image that `cv2.remap` reads."""


def enlarge(coarse: Volume, shape: Sequence[int]) -> Volume:
    """A volume brought to a larger shape by cubic interpolation; the corners of the two fall together."""
    across, down = np.meshgrid(
        np.linspace(0, coarse.shape[2] - 1, shape[2], dtype=np.float32),
        np.linspace(0, coarse.shape[1] - 1, shape[1], dtype=np.float32),
    )
    planes = [cv2.remap(p, across, down, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101) for p in coarse]
    out = np.zeros(tuple(shape), dtype=np.float32)
    last = len(planes) - 1
    for row, at in zip(out, np.linspace(0, last, shape[0]), strict=True):
        low = min(int(at), last - 1)
        t = at - low
        weights = (-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2)  # Catmull-Rom
        for index, weight in zip((max(low - 1, 0), low, low + 1, min(low + 2, last)), weights, strict=True):
            row += planes[index] * np.float32(weight / 2)
    return out


def double(coarse: Volume) -> Volume:
    """A volume on twice as fine a grid, n to 2n - 1 along each axis, by linear interpolation."""
    for axis in (2, 1, 0):  # the last is the largest, and its planes lie together
        shape = list(coarse.shape)
        shape[axis] = 2 * shape[axis] - 1
        fine = np.empty(shape, dtype=np.float32)
        into, source = np.moveaxis(fine, axis, 0), np.moveaxis(coarse, axis, 0)
        into[::2] = source
        between = into[1::2]
        np.add(source[:-1], source[1:], out=between)
        between *= np.float32(0.5)
        coarse = fine
    return coarse


def at_places(volume: Volume, places: Sequence[Volume], outside: float) -> Volume:
    """A volume at the places of a picture's pixels, by linear interpolation; in OpenCV 4 to 1/32 of a voxel.

    The slices of the volume that the picture crosses lie under one another as one image, in which `cv2.remap` looks up
    two of them at a time: some four times as fast as `scipy.ndimage.affine_transform`.

    Args:
        volume: (z, y, x).
        places: z, y and x of each pixel, in voxels, all of the picture's shape.
        outside: the value beyond the volume.
    """
    z, y, x = places
    depth, height, width = volume.shape
    within = (z >= 0) & (z <= depth - 1) & (y >= 0) & (y <= height - 1) & (x >= 0) & (x <= width - 1)
    if not within.any():
        return np.full(z.shape, outside, dtype=np.float32)
    low = int(np.clip(np.floor(z[within].min()), 0, depth - 2))
    high = int(np.clip(np.ceil(z[within].max()), low + 1, depth - 1))
    if (high - low + 1) * height > _TALLEST and len(z) > 1:
        half = len(z) // 2
        ends = ([place[:half] for place in places], [place[half:] for place in places])
        return np.concatenate([at_places(volume, end, outside) for end in ends])
    picture = volume[low : high + 1].reshape(-1, width)
    level = np.clip(z - np.float32(low), 0, high - low)
    lower = np.minimum(np.floor(level), high - low - 1)
    rows, columns = np.clip(y, 0, height - 1) + lower * np.float32(height), np.clip(x, 0, width - 1)
    near, far = (cv2.remap(picture, columns, rows + np.float32(k * height), cv2.INTER_LINEAR) for k in (0, 1))
    near += (far - near) * (level - lower)
    return np.where(within, near, np.float32(outside))


def noise(rng: np.random.Generator, shape: Sequence[int], cell_mm: float) -> Volume:
    """Unit-variance noise on a 1 mm grid, correlated over about ``cell_mm``."""
    count = [max(int(np.ceil(n / cell_mm)) + 1, 3) for n in shape]
    coarse = rng.standard_normal(count, dtype=np.float32)
    if cell_mm >= 5 and all(n % 2 for n in shape):
        field = double(enlarge(coarse, [(n + 1) // 2 for n in shape]))
    else:
        field = enlarge(coarse, shape)
    field *= np.float32(1 / field[::3, ::3, ::3].std())
    return field


def soft(distance_mm: Array, width_mm: float) -> Volume:
    """Coverage 0..1 of a shape whose signed distance, positive inside, is given; its edge is ``width_mm`` wide."""
    covered = np.asarray(distance_mm * np.float32(1 / width_mm), dtype=np.float32)
    covered += np.float32(0.5)
    return np.clip(covered, 0, 1, out=covered)


def bump(x: Array, centre: float, width: float) -> Volume:
    """A Gaussian of height 1."""
    scaled = (x - np.float32(centre)) * np.float32(1 / width)
    return np.asarray(np.exp(-scaled * scaled), dtype=np.float32)


def step(x: Array, at: float, width: float) -> Volume:
    """A logistic step from 0 to 1."""
    scaled = np.clip((np.float32(at) - x) * np.float32(1 / width), -30, 30)
    return np.asarray(1 / (1 + np.exp(scaled)), dtype=np.float32)


def mix(image: Volume, value: Array | float, coverage: Array) -> None:
    """Paint a value over an image, in place, where coverage is 1, and in part where it is less."""
    image += (value - image) * coverage


Link = tuple[float, float, float, float]


def tube(x: Array, y: Array, z: Array, points: Sequence[Link]) -> Volume:
    """Signed distance in mm, positive inside, to a chain of round-ended cones.

    Args:
        x, y, z: coordinates in mm, broadcast against one another.
        points: each a link's end: x, y, z and radius.
    """
    inside = np.full(np.broadcast_shapes(x.shape, y.shape, z.shape), -99.0, dtype=np.float32)
    for first, second in pairwise(np.asarray(points, dtype=np.float32)):
        along = second[:3] - first[:3]
        px, py, pz = x - first[0], y - first[1], z - first[2]
        share = np.clip((px * along[0] + py * along[1] + pz * along[2]) * np.float32(1 / float(along @ along)), 0, 1)
        away = (px - share * along[0]) ** 2
        away += (py - share * along[1]) ** 2
        away += (pz - share * along[2]) ** 2
        np.maximum(inside, first[3] + share * (second[3] - first[3]) - np.sqrt(away), out=inside)
    return inside
