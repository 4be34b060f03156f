"""What the network learns from: slabs of simulated heads on the model's field, with the truth on its map."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from appliance.inference.preprocess import SIZE, to_field

from . import haemorrhage, scanner
from .anatomy import Head
from .haemorrhage import SUBTYPES

MAP_SIZE = 64
SLABS_PER_HEAD = 6
HEADS_PER_SHARD = 50
_STREAM = 7_301
"""Keeps these heads apart from those of `phantom.simulate`, whose seeds start a sequence of their own."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Slabs and their truth.

    Attributes:
        fields: (n, 256, 256) int16, HU on the model's field.
        covered: (n, 5, 64, 64) uint8, share of each map pixel that a subtype covers, times 255.
    """

    fields: NDArray[np.int16]
    covered: NDArray[np.uint8]


def head_samples(seed: int, index: int) -> Samples:
    """Some slabs of one head: a little under half of heads bleed nowhere, some in two ways at once."""
    rng = np.random.default_rng([_STREAM, seed, index])
    head = Head(rng, float(rng.uniform(18, 95)))
    protocol = scanner.draw(rng, SIZE, float(rng.choice((3, 4, 5, 5, 5, 6, 7))))
    count = int(rng.choice((0, 1, 2), p=(0.42, 0.45, 0.13)))
    kinds = rng.choice(len(SUBTYPES), count, replace=False, p=(0.19, 0.22, 0.17, 0.23, 0.19))
    bleeds = tuple(
        haemorrhage.draw(rng, head, SUBTYPES[kind], float(np.exp(rng.uniform(np.log(0.9), np.log(60)))))
        for kind in kinds
    )
    heights = list(rng.uniform(-68, 95, SLABS_PER_HEAD))
    for n in range(4 if bleeds else 0):
        heights[n] = _near(rng, head, bleeds[n % len(bleeds)])
    if not bleeds:
        heights[0] = rng.uniform(-55, -10)  # the base of the skull misleads most
    fields = np.empty((SLABS_PER_HEAD, SIZE, SIZE), dtype=np.int16)
    covered = np.empty((SLABS_PER_HEAD, len(SUBTYPES), MAP_SIZE, MAP_SIZE), dtype=np.uint8)
    for n, height in enumerate(heights):
        hu, blood = scanner.scan(rng, head, bleeds, protocol, float(height))
        spacing = (protocol.pixel_mm, protocol.pixel_mm)
        fields[n] = np.rint(to_field(hu, spacing))
        for layer, one in zip(covered[n], blood, strict=True):
            layer[:] = np.rint(255 * shrink(to_field((one > 0.5).astype(np.float32), spacing, fill=0.0)))
    return Samples(fields, covered)


def shrink(field: NDArray[np.float32]) -> NDArray[np.float32]:
    """A quantity on the field to its mean in each pixel of the map."""
    return np.asarray(cv2.resize(field, (MAP_SIZE, MAP_SIZE), interpolation=cv2.INTER_AREA), dtype=np.float32)


def _near(rng: np.random.Generator, head: Head, bleed: haemorrhage.Bleed) -> float:
    """A height in the scanner at which a bleed is likely to be cut."""
    centre = np.array(bleed.centre)
    reach = bleed.extent_mm
    if bleed.depth_mm:
        centre = 66 * centre / np.linalg.norm(centre)
        reach = min(reach, 45)
    elif bleed.subtype == "intraventricular":
        reach = 22
    return float((head.rotation() @ centre)[2] + rng.normal(0, 0.5 * reach))


def shard(folder: Path, seed: int, number: int) -> Samples:
    """The samples of `HEADS_PER_SHARD` heads, read from the folder or made and left there."""
    path = folder / f"shard-{seed}-{number:04d}.npz"
    if path.exists():
        with np.load(path) as stored:
            return Samples(stored["fields"], stored["covered"])
    made = [head_samples(seed, number * HEADS_PER_SHARD + n) for n in range(HEADS_PER_SHARD)]
    samples = Samples(np.concatenate([m.fields for m in made]), np.concatenate([m.covered for m in made]))
    staged = path.with_suffix(".part.npz")
    np.savez(staged, fields=samples.fields, covered=samples.covered)
    staged.replace(path)
    return samples


def varied(
    rng: np.random.Generator, field: NDArray[np.int16], covered: NDArray[np.uint8]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """One sample seen otherwise: mirrored, moved, at another level, noisier, sharper or blurred.

    Returns:
        The field (256, 256) in HU and the share of each map pixel that a subtype covers (5, 64, 64).
    """
    hu = field.astype(np.float32)
    blood = covered.astype(np.float32) / 255
    if rng.random() < 0.5:
        hu, blood = hu[:, ::-1], blood[:, :, ::-1]
    if rng.random() < 0.5:
        angle, scale = rng.uniform(-15, 15), rng.uniform(0.88, 1.13)
        dx, dy = rng.uniform(-14, 14, 2)
        hu = _moved(hu, angle, scale, dx, dy, -1024.0)
        ratio = MAP_SIZE / SIZE
        blood = np.stack([_moved(layer, angle, scale, dx * ratio, dy * ratio, 0.0) for layer in blood])
    if rng.random() < 0.25:
        blurred = cv2.GaussianBlur(hu, (0, 0), rng.uniform(0.5, 1.2))
        hu = hu + np.float32(rng.uniform(-0.8, 1.0)) * (hu - blurred)
    if rng.random() < 0.35:
        grain = cv2.GaussianBlur(rng.standard_normal(hu.shape, dtype=np.float32), (0, 0), rng.uniform(0.3, 1.2))
        hu = hu + grain * np.float32(rng.uniform(0, 6) / (grain.std() + 1e-6))
    hu = hu * np.float32(rng.normal(1, 0.03)) + np.float32(rng.normal(0, 2.5))
    return hu, np.ascontiguousarray(blood)


def _moved(
    image: NDArray[np.float32], angle: float, scale: float, dx: float, dy: float, fill: float
) -> NDArray[np.float32]:
    middle = (image.shape[0] - 1) / 2
    move = cv2.getRotationMatrix2D((middle, middle), angle, scale)
    move[:, 2] += (dx, dy)
    moved = cv2.warpAffine(
        np.ascontiguousarray(image), move, image.shape[::-1], flags=cv2.INTER_LINEAR, borderValue=fill
    )
    return np.asarray(moved, dtype=np.float32)
