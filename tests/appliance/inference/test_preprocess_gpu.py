"""Every other implementation of preprocessing, held to the definition.

Needs NumPy, OpenCV and hypothesis alone; what wants DALI, CuPy or a GPU skips where there is none.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from appliance.inference import preprocess_dali, preprocess_gpu
from appliance.inference.preprocess import (
    AIR_HU,
    TOLERANCE,
    TOLERANCE_HU,
    WINDOWS,
    Resampling,
    model_input,
    resampling,
    to_field,
)

WITHOUT_IPP_HU, WITHOUT_IPP = 0.3, 0.005
"""Where an axis grows and OpenCV has no Intel IPP, it rounds the place between two pixels to float32."""

Grid = tuple[tuple[int, int], tuple[float, float], int, float]

lengths = st.integers(4, 640)
spacings = st.floats(0.2, 2.5) | st.sampled_from([0.25, 1 / 3, 0.4, 0.5, 0.75, 1.0, 2.0])


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Shape, spacing, size and pixel of the field: it grows, shrinks, one of each, is cut or padded."""
    shape = (draw(lengths), draw(lengths))
    down = draw(spacings)
    spacing = (down, draw(st.just(down) | spacings))
    return shape, spacing, draw(st.sampled_from([256, 256, 64, 129])), draw(st.sampled_from([1.0, 1.0, 0.7, 1.9]))


def heads(count: int, shape: tuple[int, int], seed: int) -> np.ndarray:
    """(count, rows, columns) int16 HU: brain of some level in a skull, noise, air, at some place."""
    random = np.random.default_rng(seed)
    rows, columns = np.indices(shape)
    slabs = np.empty((count, *shape), np.int16)
    for slab in slabs:
        at = random.uniform(0.3, 0.7, 2) * shape
        radius = np.hypot((rows - at[0]) / (0.4 * shape[0]), (columns - at[1]) / (0.35 * shape[1]))
        inside = np.where(radius < 0.9, random.uniform(-5, 90), random.uniform(300, 3000))
        noise = random.normal(0, random.uniform(0, 60), shape)
        slab[:] = np.clip(np.where(radius < 1, inside, -1000) + noise, -1024, 3071).round()
    return slabs


def definition(slabs: np.ndarray, grid: Grid, windows: Any = WINDOWS) -> np.ndarray:
    _, spacing, size, pixel_mm = grid
    return np.stack([model_input(slab, spacing, windows=windows, size=size, pixel_mm=pixel_mm) for slab in slabs])


def apart(got: np.ndarray, expected: np.ndarray) -> float:
    assert got.shape == expected.shape
    assert got.dtype == np.float32
    return float(np.abs(got - expected).max())


def allowed(grid: Grid, tight: float, loose: float) -> float:
    """The tolerance that holds with the OpenCV that runs here."""
    shape, spacing, _, pixel_mm = grid
    grows = any(round(length * mm / pixel_mm) > length for length, mm in zip(shape, spacing, strict=True))
    return loose if grows and not cv2.ipp.useIPP() else tight


def _matrix(axis: Resampling, length: int, size: int) -> np.ndarray:
    """The resampling as a matrix (size, length); rows of zeros where the field is fill."""
    matrix = np.zeros((size, length))
    for row, (sources, weights) in enumerate(zip(axis.sources, axis.weights, strict=True), axis.start):
        np.add.at(matrix[row], sources, weights)
    return matrix


@pytest.mark.parametrize("ipp", [True, False])
@settings(max_examples=60, deadline=None)
@given(grid=grids(), seed=st.integers(0, 2**32), fill=st.floats(-2000, 3000, width=32))
@example(grid=((1500, 40), (0.8007, 0.8007), 1280, 1.0), seed=0, fill=AIR_HU)  # shares under a thousandth
@example(grid=((14, 100), (58 / 14, 0.5), 256, 1.0), seed=0, fill=AIR_HU)  # a share that float32 makes a whole
def test_the_resampling_in_numbers_is_the_one_of_the_definition(ipp: bool, grid: Grid, seed: int, fill: float) -> None:
    shape, spacing, size, pixel_mm = grid
    slab = heads(1, shape, seed)[0]
    rows, columns = resampling(shape, spacing, size=size, pixel_mm=pixel_mm)
    assert rows.weights.dtype == columns.weights.dtype == np.float32
    down, across = _matrix(rows, shape[0], size), _matrix(columns, shape[1], size)
    field = down @ slab @ across.T
    field[~np.outer(down.any(axis=1), across.any(axis=1))] = fill
    before = cv2.ipp.useIPP()
    cv2.ipp.setUseIPP(ipp)
    try:
        tolerance = allowed(grid, TOLERANCE_HU, WITHOUT_IPP_HU)
        expected = to_field(slab, spacing, size=size, pixel_mm=pixel_mm, fill=fill)
    finally:
        cv2.ipp.setUseIPP(before)
    assert apart(field.astype(np.float32), expected) <= tolerance


@settings(max_examples=60, deadline=None)
@given(grid=grids(), seed=st.integers(0, 2**32), count=st.integers(1, 3), whole=st.booleans())
def test_the_array_version_agrees_under_numpy(grid: Grid, seed: int, count: int, whole: bool) -> None:
    shape, spacing, size, pixel_mm = grid
    slabs = heads(count, shape, seed).astype(np.int16 if whole else np.float32)
    run = preprocess_gpu.prepare(np, shape, spacing, size=size, pixel_mm=pixel_mm)
    assert apart(run(slabs), definition(slabs, grid)) <= allowed(grid, TOLERANCE, WITHOUT_IPP)


@settings(max_examples=15, deadline=None)
@given(grid=grids(), seed=st.integers(0, 2**32), counts=st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_dali_on_the_cpu_agrees(grid: Grid, seed: int, counts: list[int]) -> None:
    pytest.importorskip("nvidia.dali")
    shape, spacing, size, pixel_mm = grid
    run = preprocess_dali.prepare("cpu", shape, spacing, maximum_batch=4, size=size, pixel_mm=pixel_mm)
    results = []
    for number, count in enumerate(counts):  # batches of different sizes through one graph, and of either type
        slabs = heads(count, shape, seed + number).astype(np.float32 if number % 2 else np.int16)
        results.append((run(slabs), definition(slabs, grid)))
    for got, expected in results:
        assert apart(got, expected) <= allowed(grid, TOLERANCE, WITHOUT_IPP)


@pytest.mark.parametrize("kind", ["numpy", "dali"])
def test_any_windows_become_channels_in_their_order(kind: str) -> None:
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    windows = [(600.0, 2800.0), (40.0, 80.0), (300.0, 1500.0), (32.0, 8.0)]
    grid = ((512, 512), (0.47, 0.47), 256, 1.0)
    slabs = heads(2, grid[0], 1)
    if kind == "dali":
        got = preprocess_dali.prepare("cpu", grid[0], grid[1], maximum_batch=2, windows=windows)(slabs)
    else:
        got = preprocess_gpu.prepare(np, grid[0], grid[1], windows=windows)(slabs)
    # A window ten times as narrow as that of the brain makes ten times of a difference in HU.
    assert apart(got, definition(slabs, grid, windows)) <= 10 * TOLERANCE


@pytest.mark.parametrize("shape", [(2, 512, 511), (512, 512), (1, 2, 512, 512)])
def test_slabs_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    run = preprocess_gpu.prepare(np, (512, 512), (0.5, 0.5))
    with pytest.raises(ValueError, match="prepared for"):
        run(np.zeros(shape, np.float32))


@pytest.mark.parametrize("shape", [(2, 512, 511), (512, 512), (0, 512, 512), (3, 512, 512)])
def test_dali_refuses_what_its_graph_was_not_built_for_and_goes_on(shape: tuple[int, ...]) -> None:
    pytest.importorskip("nvidia.dali")
    run = preprocess_dali.prepare("cpu", (512, 512), (0.5, 0.5), maximum_batch=2)
    with pytest.raises(ValueError, match="built for"):
        run(np.zeros(shape, np.float32))
    assert run(np.full((1, 512, 512), 40, np.float32))[0, 0] == pytest.approx(0.5)


def test_a_spacing_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        preprocess_gpu.prepare(np, (512, 512), (0.5, 0.0))


@pytest.fixture
def cupy() -> Any:
    """CuPy, where there is a GPU."""
    module = pytest.importorskip("cupy", exc_type=ImportError)
    try:
        count = module.cuda.runtime.getDeviceCount()
    except module.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"needs an NVIDIA GPU: {error}")
    if not count:
        pytest.skip("needs an NVIDIA GPU")
    return module


GRIDS: list[Grid] = [
    ((512, 512), (0.5, 0.5), 256, 1.0),
    ((512, 512), (0.45, 0.45), 256, 1.0),
    ((512, 512), (0.488281, 0.488281), 256, 1.0),
    ((512, 430), (0.6, 0.41), 256, 1.0),
    ((512, 512), (0.9, 0.9), 256, 1.0),
    ((256, 256), (1.0, 1.0), 256, 1.0),
    ((128, 200), (1.5, 1.2), 256, 1.0),
    ((300, 200), (0.4, 1.6), 129, 0.7),
]


@pytest.mark.gpu
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_cupy_agrees_with_the_definition(cupy: Any, grid: Grid, resident: bool, dtype: type) -> None:
    shape, spacing, size, pixel_mm = grid
    slabs = heads(5, shape, 7).astype(dtype)
    result = preprocess_gpu.prepare(cupy, shape, spacing, size=size, pixel_mm=pixel_mm)(
        cupy.asarray(slabs) if resident else slabs
    )
    assert isinstance(result, cupy.ndarray)
    assert apart(result.get(), definition(slabs, grid)) <= allowed(grid, TOLERANCE, WITHOUT_IPP)
    same = preprocess_gpu.prepare(np, shape, spacing, size=size, pixel_mm=pixel_mm)(slabs)
    assert apart(result.get(), same) <= 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("grid", GRIDS)
def test_dali_on_the_gpu_agrees_with_the_definition(cupy: Any, grid: Grid) -> None:
    pytest.importorskip("nvidia.dali")
    shape, spacing, size, pixel_mm = grid
    run = preprocess_dali.prepare("gpu", shape, spacing, maximum_batch=5, size=size, pixel_mm=pixel_mm)
    results = []
    for seed, count in enumerate((5, 2)):
        slabs = heads(count, shape, seed)
        results.append((run(slabs), definition(slabs, grid)))
    for got, expected in results:  # the second batch must not lie where the first one did
        assert isinstance(got, cupy.ndarray)
        assert apart(got.get(), expected) <= allowed(grid, TOLERANCE, WITHOUT_IPP)
