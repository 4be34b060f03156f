"""The model's input: one slab in Hounsfield units to three windowed channels on a fixed physical field.

This version, NumPy and OpenCV on the CPU, is the definition. Training imports it; any other implementation
(preprocess_gpu.py, preprocess_dali.py) is right when it agrees with this one. `resampling` tells them in numbers what
OpenCV does.

The *field* is the square that the model sees: ``size`` pixels of ``pixel_mm`` about the centre of the source
image. The *lesion map* covers the same field with fewer, larger pixels. Points are (column, row) with pixel centres
at integers, in the source image, in the field and in the map alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

AIR_HU = -1024.0
WINDOWS: tuple[tuple[float, float], ...] = ((40.0, 80.0), (80.0, 200.0), (600.0, 2800.0))
"""(centre, width) in HU: brain, blood against bone, bone."""
SIZE = 256
PIXEL_MM = 1.0

TOLERANCE_HU = 0.005
"""How far another implementation may be from the field of the definition; seen were 0.0008."""
TOLERANCE = 1e-4
"""How far it may be from the model input of the definition, in 0..1; seen were 4e-6."""


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
        if source.shape == (size, size):
            return source
    field = np.full((size, size), fill, dtype=np.float32)
    top, left = (size - rows) // 2, (size - columns) // 2
    inside = source[max(0, -top) : max(0, -top) + size, max(0, -left) : max(0, -left) + size]
    top, left = max(0, top), max(0, left)
    field[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return field


def window(field: NDArray[np.float32], windows: Sequence[tuple[float, float]] = WINDOWS) -> NDArray[np.float32]:
    """Each (centre, width) in HU as one channel in 0..1 (linear, PS3.3 C.11.2.1.3.2): (len(windows), *field.shape)."""
    lowest, scale = window_constants(windows, field.ndim)
    channels = np.subtract(field, lowest)
    np.multiply(channels, scale, out=channels)
    return np.clip(channels, 0, 1, out=channels)


def window_constants(
    windows: Sequence[tuple[float, float]], dimensions: int = 2
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Lower end and 1 / width of each window, (len(windows), 1, …): a channel is (HU - lower end) x scale in 0..1."""
    shape = (len(windows), *[1] * dimensions)
    lowest = np.array([centre - width / 2 for centre, width in windows], np.float32)
    scale = np.array([1 / width for _, width in windows], np.float32)
    return lowest.reshape(shape), scale.reshape(shape)


@dataclass(frozen=True, slots=True)
class Resampling:
    """How `to_field` makes the rows (or the columns) of the field that show the source image.

    Attributes:
        start: the first of them in the field; those before and after are fill.
        sources: (n, taps) the source's rows of which each is made.
        weights: (n, taps) float32, their weights; 0 where a row needs fewer.
    """

    start: int
    sources: NDArray[np.intp]
    weights: NDArray[np.float32]


def resampling(
    shape: tuple[int, int], spacing_mm: tuple[float, float], *, size: int = SIZE, pixel_mm: float = PIXEL_MM
) -> tuple[Resampling, Resampling]:
    """The resampling of `to_field` in numbers: rows, then columns (it is separable).

    Args:
        shape: (rows, columns) of the source image.
        spacing_mm: (between rows, between columns).
        size: rows and columns of the field.
        pixel_mm: edge of the field's pixels.

    Raises:
        ValueError: the shape is not two-dimensional, or a size or spacing is not positive.
    """
    _check(shape, spacing_mm, size, pixel_mm)
    counts = [_resampled(length, spacing, pixel_mm) for length, spacing in zip(shape, spacing_mm, strict=True)]
    shrinks = any(count < length for count, length in zip(counts, shape, strict=True))
    # OpenCV averages areas only where neither axis grows; else its INTER_AREA is a sort of linear, on both.
    grows = any(count > length for count, length in zip(counts, shape, strict=True))
    weigh = _linear if not shrinks else _linear_by_area if grows else _area
    axes = []
    for length, count in zip(shape, counts, strict=True):
        first = max(0, -((size - count) // 2))
        sources, weights = weigh(length, count)
        kept = slice(first, first + size)
        used = weights[kept].any(axis=0)
        axes.append(Resampling(max(0, (size - count) // 2), sources[kept, used], weights[kept, used]))
    return axes[0], axes[1]


_Taps = tuple[NDArray[np.intp], NDArray[np.float32]]


def _area(length: int, count: int) -> _Taps:
    """The share of each source pixel that lies in a pixel; as in OpenCV, shares under a thousandth are left out."""
    scale = length / count
    low = (np.arange(count) * scale)[:, None]
    sources = np.floor(low).astype(np.intp) + np.arange(int(np.ceil(scale)) + 1)
    shares = np.minimum(low + scale, sources + 1) - np.maximum(low, sources)
    shares[shares <= 1e-3] = 0
    return np.minimum(sources, length - 1), (shares / scale).astype(np.float32)


def _linear(length: int, count: int) -> _Taps:
    """Between the two nearest pixel centres."""
    at = (np.arange(count) + 0.5) * (length / count) - 0.5
    return _two(length, np.floor(at).astype(np.intp), at - np.floor(at))


def _linear_by_area(length: int, count: int) -> _Taps:
    """What OpenCV makes of INTER_AREA where an axis grows."""
    scale = count / length
    left = np.floor(np.arange(count) * (1 / scale)).astype(np.intp)  # not length / count: whole numbers must agree
    share = (np.arange(1, count + 1) - (left + 1) * scale).astype(np.float32)
    return _two(length, left, np.where(share <= 0, 0, share - np.floor(share)))


def _two(length: int, left: NDArray[np.intp], share: NDArray[Any]) -> _Taps:
    sources = np.clip(np.stack([left, left + 1], axis=1), 0, length - 1)
    return sources, np.stack([1 - share, share], axis=1).astype(np.float32)


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
