"""The model's input for a batch of slabs on a GPU, by CuPy: the arithmetic of preprocess.py.

Written for an array namespace, so that NumPy runs the same lines on a machine with no GPU; there preprocess.py is
faster. The resampling is two matrices, of whose rows a handful of numbers are not zero; only these are multiplied,
which is less work than a matrix product and needs no cuBLAS on the box.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .preprocess import AIR_HU, PIXEL_MM, SIZE, WINDOWS, resampling, window_constants


def prepare(
    xp: Any,
    shape: tuple[int, int],
    spacing_mm: tuple[float, float],
    *,
    windows: Sequence[tuple[float, float]] = WINDOWS,
    size: int = SIZE,
    pixel_mm: float = PIXEL_MM,
) -> Callable[[Any], Any]:
    """What turns the slabs of one series into the model's input, its tables already on the device.

    Args:
        xp: the array namespace, `cupy` or `numpy`.
        shape: (rows, columns) of every slab.
        spacing_mm: (between rows, between columns).
        windows: (centre, width) in HU, one for each channel.
        size: rows and columns of the field.
        pixel_mm: edge of the field's pixels.

    Returns:
        A function from (n, rows, columns) HU, any real dtype, on the host or on the device, to
        (n, len(windows), size, size) float32 in 0..1 on the device. It raises ValueError for slabs of another shape.

    Raises:
        ValueError: the shape is not two-dimensional, or a size or spacing is not positive.
    """
    rows, columns = resampling(shape, spacing_mm, size=size, pixel_mm=pixel_mm)
    height, width = len(rows.sources), len(columns.sources)
    tables = []
    for number, axis in ((1, rows), (2, columns)):
        along = (-1, 1) if number == 1 else (-1,)
        pairs = zip(axis.sources.T, axis.weights.T, strict=True)
        taps = [(xp.asarray(sources), xp.asarray(weights.reshape(along))) for sources, weights in pairs]
        tables.append((number, taps))
    lowest, scale = (xp.asarray(constant) for constant in window_constants(windows))

    def model_inputs(hu: Any) -> Any:
        if hu.ndim != 3 or hu.shape[1:] != tuple(shape):
            raise ValueError(f"prepared for slabs of {tuple(shape)}; got shape {hu.shape}")
        image = xp.asarray(hu).astype(xp.float32)  # moved as it is, so that 16 bits travel as 16 bits
        for axis, taps in tables:
            parts = (xp.take(image, sources, axis=axis) * weights for sources, weights in taps)
            total = next(parts)
            for part in parts:
                total += part
            image = total
        field = xp.full((len(image), 1, size, size), AIR_HU, dtype=xp.float32)
        field[:, 0, rows.start : rows.start + height, columns.start : columns.start + width] = image
        channels = xp.subtract(field, lowest)
        xp.multiply(channels, scale, out=channels)
        return xp.clip(channels, 0, 1, out=channels)

    return model_inputs
