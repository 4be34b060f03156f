"""How much brain a volume holds: enough for the indication gate to tell a head from a hollow skull or another organ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from .preprocess import to_field

BONE_HU = 250.0
SOFT_TISSUE_HU = (0.0, 80.0)
"""Between cerebrospinal fluid and clotted blood."""

_PIXEL_MM = 2.0


@dataclass(frozen=True, slots=True)
class Brain:
    """Soft tissue within the skull, in mm² of a slab or in mL of a volume.

    Attributes:
        seen: within the field that the model sees.
        unseen: in the images and beyond that field, where it goes on from what is within.
    """

    seen: float
    unseen: float


def brain_area_mm2(hu: NDArray[Any], spacing_mm: tuple[float, float], field_mm: float) -> Brain:
    """Soft tissue within the skull on one axial slab.

    It is what cannot be reached from the border of the image, or of the model's field where that is larger, without
    crossing bone, whose breaches up to 12 mm are closed first; of that, what lies in `SOFT_TISSUE_HU` and is wider than
    the rim in which bone blurs into air. A slab whose skull is open further than that counts as empty: after a large
    craniectomy the estimate is low.

    Args:
        hu: (rows, columns) HU.
        spacing_mm: (between rows, between columns).
        field_mm: edge of the square about the image's centre that the model sees.
    """
    extent = max(field_mm, hu.shape[0] * spacing_mm[0], hu.shape[1] * spacing_mm[1])
    size, seen = (2 * math.ceil(edge / (2 * _PIXEL_MM)) for edge in (extent, field_mm))  # even: they share a centre
    field = to_field(hu, spacing_mm, size=size, pixel_mm=_PIXEL_MM)
    bone = (field > BONE_HU).astype(np.uint8)
    closed = cv2.morphologyEx(bone, cv2.MORPH_CLOSE, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (7, 7)))
    passable = cv2.copyMakeBorder(1 - closed, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=1)
    cv2.floodFill(passable, None, (0, 0), 2)
    low, high = SOFT_TISSUE_HU
    soft = (passable[1:-1, 1:-1] == 1) & (field > low) & (field < high)
    kept = cv2.morphologyEx(soft.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    middle = slice((size - seen) // 2, (size + seen) // 2)
    inside = int(kept[middle, middle].sum())
    if size == seen:
        return Brain(inside * _PIXEL_MM**2, 0.0)
    # What lies wholly beyond is no part of this head: the marrow of a raised arm, say.
    _, pieces = cv2.connectedComponents(kept)
    of_the_head = np.isin(pieces, np.unique(pieces[middle, middle])) & (kept == 1)
    return Brain(inside * _PIXEL_MM**2, (int(of_the_head.sum()) - inside) * _PIXEL_MM**2)
