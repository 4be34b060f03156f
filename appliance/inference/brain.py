"""How much brain a volume holds: enough for the indication gate to tell a head from a hollow skull or another organ."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from .preprocess import to_field

BONE_HU = 250.0
SOFT_TISSUE_HU = (0.0, 80.0)
"""Between cerebrospinal fluid and clotted blood."""

_PIXEL_MM = 2.0
_FIELD = 128


def brain_area_mm2(hu: NDArray[Any], spacing_mm: tuple[float, float]) -> float:
    """Soft tissue within the skull on one axial slab.

    It is what cannot be reached from the border of a 256 mm field without crossing bone, whose breaches up to 12 mm
    are closed first; of that, what lies in `SOFT_TISSUE_HU` and is wider than the rim in which bone blurs into air.
    A slab whose skull is open further than that counts as empty: after a large craniectomy the estimate is low.

    Args:
        hu: (rows, columns) HU.
        spacing_mm: (between rows, between columns).
    """
    field = to_field(hu, spacing_mm, size=_FIELD, pixel_mm=_PIXEL_MM)
    bone = (field > BONE_HU).astype(np.uint8)
    closed = cv2.morphologyEx(bone, cv2.MORPH_CLOSE, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (7, 7)))
    passable = cv2.copyMakeBorder(1 - closed, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=1)
    cv2.floodFill(passable, None, (0, 0), 2)
    low, high = SOFT_TISSUE_HU
    soft = (passable[1:-1, 1:-1] == 1) & (field > low) & (field < high)
    kept = cv2.morphologyEx(soft.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    return float(kept.sum()) * _PIXEL_MM**2
