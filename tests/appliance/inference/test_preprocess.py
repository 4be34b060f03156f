"""The model's input, checked against arithmetic done another way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.inference.preprocess import (
    AIR_HU,
    WINDOWS,
    map_to_source,
    model_input,
    to_field,
    window,
)

shapes = st.tuples(st.integers(10, 700), st.integers(10, 700))
spacings = st.tuples(st.floats(0.2, 2.5), st.floats(0.2, 2.5))


@settings(max_examples=40, deadline=None)
@given(shape=shapes, spacing=spacings, level=st.floats(-1024, 3071))
def test_any_slab_becomes_three_channels_in_0_to_1(
    shape: tuple[int, int], spacing: tuple[float, float], level: float
) -> None:
    slab = np.full(shape, level, dtype=np.float32)
    result = model_input(slab, spacing)
    assert result.shape == (3, 256, 256)
    assert result.dtype == np.float32
    assert result.min() >= 0 and result.max() <= 1
    expected = [min(1, max(0, (level - (c - w / 2)) / w)) for c, w in WINDOWS]
    assert result[:, 128, 128] == pytest.approx(expected, abs=2e-4)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, spacing=spacings)
def test_outside_the_source_is_air(shape: tuple[int, int], spacing: tuple[float, float]) -> None:
    field = to_field(np.zeros(shape, dtype=np.float32), spacing)
    height, width = min(256, shape[0] * spacing[0]), min(256, shape[1] * spacing[1])
    inside = field == 0
    assert np.all(inside | (field == AIR_HU))
    assert abs(inside.any(axis=1).sum() - height) <= 1
    assert abs(inside.any(axis=0).sum() - width) <= 1
    if height < 250:  # the air is shared out between the two sides
        rows = np.flatnonzero(inside.any(axis=1))
        assert abs(rows[0] - (255 - rows[-1])) <= 1


def _disc(shape: tuple[int, int], spacing: tuple[float, float], offset_mm: tuple[float, float]) -> np.ndarray:
    """A disc of 30 mm radius, at an offset from the image's centre, sampled on some grid."""
    down = (np.arange(shape[0]) - (shape[0] - 1) / 2) * spacing[0] - offset_mm[0]
    across = (np.arange(shape[1]) - (shape[1] - 1) / 2) * spacing[1] - offset_mm[1]
    return np.clip(30.5 - np.hypot(down[:, None], across[None, :]), 0, 1).astype(np.float32) * 80


@pytest.mark.parametrize("spacing", [(0.4, 0.4), (0.5, 0.7), (1.0, 1.0), (1.6, 1.6), (0.9, 1.3)])
def test_the_same_body_gives_the_same_field_on_any_grid(spacing: tuple[float, float]) -> None:
    offset = (21.0, -34.0)
    shape = (round(240 / spacing[0]), round(240 / spacing[1]))
    field = to_field(_disc(shape, spacing, offset), spacing, fill=0.0)
    rows, columns = np.indices(field.shape)
    total = field.sum()
    assert total / 80 == pytest.approx(np.pi * 30**2, rel=0.02)
    assert (rows * field).sum() / total == pytest.approx(127.5 + offset[0], abs=0.75)
    assert (columns * field).sum() / total == pytest.approx(127.5 + offset[1], abs=0.75)
    reference = to_field(_disc((240, 240), (1.0, 1.0), offset), (1.0, 1.0), fill=0.0)
    assert np.abs(field - reference).mean() < 0.6


def test_whole_numbers_are_not_rounded_when_resampled() -> None:
    stripes = np.tile(np.array([0, 1], dtype=np.int16), (512, 256))
    field = to_field(stripes, (0.5, 0.5))
    assert field[128, 128] == 0.5


def test_a_large_field_of_view_is_cut_about_its_centre() -> None:
    slab = np.zeros((400, 400), dtype=np.float32)
    slab[72:328, 72:328] = 100
    assert np.all(to_field(slab, (1.0, 1.0)) == 100)


def test_windows_are_linear_between_their_ends() -> None:
    hu = np.array([[-60, 0, 20, 40, 80, 200]], dtype=np.float32)
    assert window(hu, [(40, 80)])[0, 0] == pytest.approx([0, 0, 0.25, 0.5, 1, 1])


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(100, 640), st.integers(100, 640)),
    spacing=st.tuples(st.floats(0.35, 1.2), st.floats(0.35, 1.2)),
    where=st.tuples(st.floats(0.2, 0.8), st.floats(0.2, 0.8)),
)
def test_the_map_leads_back_to_where_the_light_was(
    shape: tuple[int, int], spacing: tuple[float, float], where: tuple[float, float]
) -> None:
    size_mm = (shape[0] * spacing[0], shape[1] * spacing[1])
    row, column = (round(n / 2 + (w - 0.5) * min(n, 240 / s)) for n, s, w in zip(shape, spacing, where, strict=True))
    if min(row, column) < 8 or row > shape[0] - 9 or column > shape[1] - 9:
        return
    slab = np.zeros(shape, dtype=np.float32)
    slab[row - 6 : row + 7, column - 6 : column + 7] = 100
    field = to_field(slab, spacing, fill=0.0)
    light = field.reshape(64, 4, 64, 4).mean(axis=(1, 3))
    rows, columns = np.indices(light.shape)
    on_map = [(columns * light).sum() / light.sum(), (rows * light).sum() / light.sum()]
    back = map_to_source([on_map], shape, spacing, map_size=64)[0]
    assert back[0] == pytest.approx(column, abs=1.0 / spacing[1] + 0.5), size_mm
    assert back[1] == pytest.approx(row, abs=1.0 / spacing[0] + 0.5), size_mm


def test_the_map_covers_the_same_field() -> None:
    corners = map_to_source([(-0.5, -0.5), (63.5, 63.5)], (256, 256), (1.0, 1.0), map_size=64)
    assert corners == pytest.approx(np.array([[-0.5, -0.5], [255.5, 255.5]]))
    halved = map_to_source([(-0.5, -0.5), (63.5, 63.5)], (512, 512), (0.5, 0.5), map_size=64)
    assert halved == pytest.approx(np.array([[-0.5, -0.5], [511.5, 511.5]]))


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((3, 4, 4), (1.0, 1.0)), ((4,), (1.0, 1.0)), ((4, 4), (0.0, 1.0)), ((4, 4), (1.0, float("nan")))],
)
def test_what_is_no_slab_is_refused(shape: tuple[int, ...], spacing: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"slab|positive"):
        model_input(np.zeros(shape, dtype=np.float32), spacing)
