"""The model's input: one slab in Hounsfield units to three windowed channels on a fixed physical field.

This NumPy version is the definition. Training imports it; any other implementation (DALI, CuPy) is right when it
agrees with this one.

The *field* is the square that the model sees: ``size`` pixels of ``pixel_mm`` about the centre of the source
image. The *lesion map* covers the same field with fewer, larger pixels. Points are (column, row) with pixel centres
at integers, in the source image, in the field and in the map alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

AIR_HU = -1024.0
WINDOWS: tuple[tuple[float, float], ...] = ((40.0, 80.0), (80.0, 200.0), (600.0, 2800.0))
"""(centre, width) in HU: brain, blood against bone, bone."""
SIZE = 256
PIXEL_MM = 1.0


def _resampled(length: int, spacing: float, pixel_mm: float) -> int:
    """How many pixels of ``pixel_mm`` stand for ``length`` pixels of ``spacing``."""
    return max(1, round(length * spacing / pixel_mm))


def _check(shape: Sequence[int], spacing_mm: Sequence[float], size: int, pixel_mm: float) -> None:
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"a slab has rows and columns; got shape {tuple(shape)}")
    if not all(np.isfinite(s) and s > 0 for s in (*spacing_mm, pixel_mm)) or size < 1:
        raise ValueError(f"spacing {tuple(spacing_mm)} mm, pixel {pixel_mm} mm and size {size} must be positive")


def to_field(
    image: NDArray[Any],
    spacing_mm: tuple[float, float],
    *,
    size: int = SIZE,
    pixel_mm: float = PIXEL_MM,
    fill: float = AIR_HU,
) -> NDArray[np.float32]:
    """Resample an image to square pixels and cut or pad it about its centre.

    Args:
        image: (rows, columns), any real dtype; HU, or any other quantity of a pixel.
        spacing_mm: (between rows, between columns), as DICOM's PixelSpacing (PS3.3 10.7.1.3).
        size: rows and columns of the field.
        pixel_mm: edge of the field's pixels.
        fill: value outside the image.

    Returns:
        (size, size) float32.

    Raises:
        ValueError: the image is not two-dimensional, or a size or spacing is not positive.
    """
    _check(image.shape, spacing_mm, size, pixel_mm)
    source = np.ascontiguousarray(image, dtype=np.float32)  # OpenCV rounds when it resizes integers
    rows = _resampled(source.shape[0], spacing_mm[0], pixel_mm)
    columns = _resampled(source.shape[1], spacing_mm[1], pixel_mm)
    if (rows, columns) != source.shape:
        shrinks = rows < source.shape[0] or columns < source.shape[1]
        how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        source = np.asarray(cv2.resize(source, (columns, rows), interpolation=how), dtype=np.float32)
    field = np.full((size, size), fill, dtype=np.float32)
    top, left = (size - rows) // 2, (size - columns) // 2
    inside = source[max(0, -top) : max(0, -top) + size, max(0, -left) : max(0, -left) + size]
    top, left = max(0, top), max(0, left)
    field[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return field


def window(field: NDArray[np.float32], windows: Sequence[tuple[float, float]] = WINDOWS) -> NDArray[np.float32]:
    """Each (centre, width) in HU as one channel in 0..1 (linear, PS3.3 C.11.2.1.3.2): (len(windows), *field.shape)."""
    channels = np.empty((len(windows), *field.shape), dtype=np.float32)
    for channel, (centre, width) in zip(channels, windows, strict=True):
        np.subtract(field, np.float32(centre - width / 2), out=channel)
        np.multiply(channel, np.float32(1 / width), out=channel)
        np.clip(channel, 0, 1, out=channel)
    return channels


def model_input(
    hu: NDArray[Any],
    spacing_mm: tuple[float, float],
    *,
    windows: Sequence[tuple[float, float]] = WINDOWS,
    size: int = SIZE,
    pixel_mm: float = PIXEL_MM,
) -> NDArray[np.float32]:
    """What the model is given for one slab.

    Args:
        hu: (rows, columns) Hounsfield units.
        spacing_mm: (between rows, between columns).
        windows: (centre, width) in HU, one for each channel.
        size: rows and columns of the field.
        pixel_mm: edge of the field's pixels.

    Returns:
        (len(windows), size, size) float32 in 0..1.

    Raises:
        ValueError: the slab is not two-dimensional, or a size or spacing is not positive.
    """
    return window(to_field(hu, spacing_mm, size=size, pixel_mm=pixel_mm), windows)


def map_to_source(
    points: ArrayLike,
    shape: tuple[int, int],
    spacing_mm: tuple[float, float],
    *,
    map_size: int,
    size: int = SIZE,
    pixel_mm: float = PIXEL_MM,
) -> NDArray[np.float64]:
    """Where points of the lesion map lie in the source image.

    Args:
        points: (n, 2) of (column, row) in the map, pixel centres at integers.
        shape: (rows, columns) of the source image.
        spacing_mm: its spacing (between rows, between columns).
        map_size: rows and columns of the map.
        size: rows and columns of the field.
        pixel_mm: edge of the field's pixels.

    Returns:
        (n, 2) of (column, row) in the source image; outside it where the field reaches beyond it.

    Raises:
        ValueError: the shape, a size or a spacing is not positive.
    """
    _check(shape, spacing_mm, min(size, map_size), pixel_mm)
    field = (np.asarray(points, dtype=np.float64).reshape(-1, 2) + 0.5) * (size / map_size)
    rows = _resampled(shape[0], spacing_mm[0], pixel_mm)
    columns = _resampled(shape[1], spacing_mm[1], pixel_mm)
    offset = np.array([(size - columns) // 2, (size - rows) // 2], dtype=np.float64)
    stretch = np.array([shape[1] / columns, shape[0] / rows], dtype=np.float64)
    source: NDArray[np.float64] = (field - offset) * stretch - 0.5
    return source
