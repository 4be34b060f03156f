"""The model's input as a DALI graph, the same for `cpu` and `gpu`: the arithmetic of preprocess.py.

None of the filters of DALI's resize averages areas as the definition does; after windowing their results differ from
it by tenths. So nothing is left to them: `fn.sequence_rearrange` fetches the rows of `resampling`, which are weighed
and added up; between two transpositions the same is done to the columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .preprocess import AIR_HU, PIXEL_MM, SIZE, WINDOWS, Resampling, resampling, window_constants


def prepare(
    device: Literal["cpu", "gpu"],
    shape: tuple[int, int],
    spacing_mm: tuple[float, float],
    *,
    maximum_batch: int,
    threads: int = 1,
    windows: Sequence[tuple[float, float]] = WINDOWS,
    size: int = SIZE,
    pixel_mm: float = PIXEL_MM,
) -> Callable[[NDArray[Any]], Any]:
    """Build the graph that turns the slabs of one series into the model's input.

    Args:
        device: where all of it runs; `gpu` is the first GPU.
        shape: (rows, columns) of every slab.
        spacing_mm: (between rows, between columns).
        maximum_batch: the most slabs given at once.
        threads: CPU threads of the graph.
        windows: (centre, width) in HU, one for each channel.
        size: rows and columns of the field.
        pixel_mm: edge of the field's pixels.

    Returns:
        A function from (n, rows, columns) HU in host memory, any real dtype, to (n, len(windows), size, size) float32
        in 0..1: a NumPy array, or for `gpu` a CuPy array. It raises ValueError for slabs of another shape, none, or
        more than the batch.

    Raises:
        ImportError: DALI (or for `gpu` CuPy) is not installed.
        RuntimeError: there is no GPU.
        ValueError: the shape is not two-dimensional, or a size or spacing is not positive.
    """
    from nvidia.dali import Pipeline, fn, math, types

    rows, columns = resampling(shape, spacing_mm, size=size, pixel_mm=pixel_mm)
    lowest, scale = window_constants(windows)

    def constant(value: NDArray[Any]) -> Any:
        return types.Constant(value, device=device)

    def weighed(image: Any, axis: Resampling) -> Any:
        total = None
        for sources, weights in zip(axis.sources.T, axis.weights.T, strict=True):
            part = fn.sequence_rearrange(image, new_order=sources.tolist()) * constant(weights[:, None].copy())
            total = part if total is None else total + part
        return total

    # One batch is wanted at a time, and the next one is not known before its result: nothing to fetch ahead.
    pipeline = Pipeline(
        batch_size=maximum_batch,
        num_threads=threads,
        device_id=0 if device == "gpu" else None,
        prefetch_queue_depth=1,
    )
    with pipeline:
        image = fn.external_source(name="hu", ndim=2, dtype=types.FLOAT, device=device)
        image = fn.transpose(weighed(image, rows), perm=[1, 0])
        image = fn.transpose(weighed(image, columns), perm=[1, 0])
        field = fn.slice(
            image,
            start=[-rows.start, -columns.start],
            shape=[size, size],
            axes=[0, 1],
            out_of_bounds_policy="pad",
            fill_values=AIR_HU,
        )
        channels = (fn.reshape(field, shape=[1, size, size]) - constant(lowest)) * constant(scale)
        pipeline.set_outputs(math.clamp(channels, 0.0, 1.0))
    pipeline.build()

    def model_inputs(hu: NDArray[Any]) -> Any:
        if hu.ndim != 3 or hu.shape[1:] != tuple(shape) or not 1 <= len(hu) <= maximum_batch:
            raise ValueError(f"built for 1 to {maximum_batch} slabs of {tuple(shape)}; got shape {hu.shape}")
        pipeline.feed_input("hu", np.ascontiguousarray(hu, dtype=np.float32))
        (result,) = pipeline.run()
        if device == "cpu":
            return result.as_array()  # a copy
        import cupy

        # Copied before DALI may write the next batch there.
        copied = cupy.array(result.as_tensor())
        cupy.cuda.get_current_stream().synchronize()
        return copied

    return model_inputs
