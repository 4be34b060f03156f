"""Sound heads pass, real and simulated; each trace of a decoder that lied is found, wherever it is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dicom_io.errors import DecodeError, HeaderError
from dicom_io.header import FramePlane, read_header
from dicom_io.pixels import decode
from dicom_io.plausible import ImplausibleImage, check_plausible, implausibilities, look_at
from dicom_io.volume import Plane, Volume, assemble, planes_of
from triton_models.training.phantom import simulate

SIZE, SPACING, STEP, PLANES = 96, 2.5, 6.0, 28
INSIDE = 12  # a plane in the middle of the head
ABOVE = 25  # the first plane above its vertex


def volume(count: int = PLANES, tilt: float = 0.0) -> Volume:
    cosine, sine = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
    orientation = (1.0, 0.0, 0.0, 0.0, cosine, -sine)
    corner = -SIZE / 2 * SPACING
    return assemble(
        [
            Plane(f"1.2.{n}", 0, FramePlane((corner, corner, STEP * n), orientation, (SPACING, SPACING), STEP), n)
            for n in range(count)
        ]
    )


def heads(seed: int = 0, noise: float = 8.0) -> list[NDArray[np.float32]]:
    """A head: neck and skull below, vertex at plane 24, then air; in HU, clipped to 12 bits as scanners do."""
    chance = np.random.default_rng(seed)
    y, x = (np.mgrid[:SIZE, :SIZE] - SIZE / 2) * SPACING
    made = []
    for n in range(PLANES):
        height = (n - 10) / 15
        across = 75 * math.sqrt(max(0.0, 1 - height**2)) if n > 10 else 75
        radius = np.hypot(x, y / 1.2) / max(across, 1e-3)
        hu = np.select([radius < 0.9, radius < 1.0], [35.0, 1100.0], -1000.0)
        made.append((hu + chance.normal(0, noise, hu.shape)).clip(-1024, 3071).astype(np.float32))
    return made


def reasons(planes: list[NDArray[Any]], of: Volume | None = None) -> list[str]:
    of = of or volume(len(planes))
    return implausibilities(
        of, [look_at(hu, plane.geometry.spacing) for hu, plane in zip(planes, of.planes, strict=True)]
    )


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    noise=st.floats(0.5, 60),
    padding=st.sampled_from([None, -1024.0, -2000.0, -3024.0, -32768.0]),
    metal=st.booleans(),
    tilt=st.floats(-30, 30),
)
def test_sound_heads_pass(seed: int, noise: float, padding: float | None, metal: bool, tilt: float) -> None:
    planes = heads(seed, noise)
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE / 2 + 0.5
    for hu in planes:
        if metal:
            hu[40:46, 30:36] = 30710  # the top of an extended scale
            hu[40:46, 36:60] -= 1500  # and a streak beside it
        if padding is not None:
            hu[np.hypot(x, y) > SIZE / 2] = padding
    assert reasons(planes, volume(PLANES, tilt)) == []


@pytest.mark.parametrize("padding", [-2000.0, -3024.0, -32768.0])
def test_much_padding_passes(padding: float) -> None:
    planes = heads()
    for hu in planes:
        hu[:, :20] = hu[:, -20:] = padding
    assert reasons(planes) == []


def test_blank_air_beyond_the_vertex_passes() -> None:
    planes = heads()
    for n in range(ABOVE, PLANES):
        planes[n][:] = -1024
    assert reasons(planes) == []


@pytest.mark.parametrize("value", [-1024.0, -2000.0])
def test_blank_air_below_the_neck_does_not(value: float) -> None:
    planes = heads()
    planes[0][:] = planes[1][:] = value
    assert len(reasons(planes)) == 2


@given(n=st.integers(0, ABOVE - 1), value=st.sampled_from([-1024.0, 0.0, 40.0, 3071.0]))
@settings(max_examples=25, deadline=None)
def test_a_plane_of_one_value_is_found(n: int, value: float) -> None:
    planes = heads()
    planes[n][:] = value
    (reason,) = reasons(planes)
    assert f"image 1.2.{n} frame 1 has the one value {value:g} HU" in reason


def test_what_is_blank_up_to_the_vertex_is_found() -> None:
    """As by a decoder that returns zeros from one frame on, which unsigned values make air of."""
    planes = heads()
    for n in range(INSIDE, PLANES):
        planes[n][:] = -1024
    assert len(reasons(planes)) == PLANES - INSIDE
    for hu in planes:
        hu[:] = -1024
    assert len(reasons(planes)) == PLANES


def test_bright_planes_of_one_value_beyond_the_vertex_are_found() -> None:
    planes = heads()
    planes[-1][:] = 0
    assert len(reasons(planes)) == 1


@given(pair=st.lists(st.integers(0, PLANES - 1), min_size=2, max_size=2, unique=True))
@settings(max_examples=25, deadline=None)
def test_two_planes_alike_are_found(pair: list[int]) -> None:
    planes = heads()
    first, second = sorted(pair)
    planes[second][:] = planes[first]
    assert reasons(planes) == [f"image 1.2.{second} frame 1 has the same pixels as image 1.2.{first} frame 1"]


FILLS = st.sampled_from([-1024.0, 0.0, 35.0, None])
"""What a decoder leaves where it stopped: one value, or over and over the row that it was at (None)."""


def filled(hu: NDArray[np.float32], rows: slice, fill: float | None, last: int) -> None:
    hu[rows] = hu[last] if fill is None else fill


@given(row=st.integers(20, 72), fill=FILLS)
@settings(max_examples=25, deadline=None)
def test_a_plane_that_stops_within_the_head_is_found(row: int, fill: float | None) -> None:
    planes = heads()
    filled(planes[INSIDE], slice(row, None), fill, row - 1)
    (reason,) = reasons(planes)
    assert reason == (
        f"image 1.2.{INSIDE} frame 1 ends in the middle of the body: nothing changes from row {row + 1} to {SIZE}"
    )


@given(row=st.integers(24, 76), fill=FILLS)
@settings(max_examples=25, deadline=None)
def test_a_plane_that_begins_within_the_head_is_found(row: int, fill: float | None) -> None:
    planes = heads()
    filled(planes[INSIDE], slice(0, row), fill, row)
    (reason,) = reasons(planes)
    assert f"image 1.2.{INSIDE} frame 1 begins in the middle of the body" in reason
    assert reason.endswith(f"to {row + (fill is None)}")


@given(row=st.integers(24, 60), rows=st.integers(5, 12), fill=FILLS)
@settings(max_examples=25, deadline=None)
def test_a_plane_with_a_gap_within_the_head_is_found(row: int, rows: int, fill: float | None) -> None:
    planes = heads()
    filled(planes[INSIDE], slice(row, row + rows), fill, row - 1)
    (reason,) = reasons(planes)
    assert f"image 1.2.{INSIDE} frame 1 is interrupted in the middle of the body" in reason


def test_a_plane_of_rows_of_one_value_each_is_no_sound_one_either() -> None:
    """They need not have the same one."""
    planes = heads()
    planes[INSIDE][50:] = np.arange(SIZE - 50, dtype=np.float32)[:, None]
    assert len(reasons(planes)) == 1


@pytest.mark.parametrize("blank", [-1024.0, -2000.0, 0.0])
def test_blank_air_and_padding_about_the_head_pass(blank: float) -> None:
    """Above it, between it and a table, below that, and around a circle."""
    planes = heads()
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE / 2 + 0.5
    noise = np.random.default_rng(3).normal(0, 8, (3, SIZE))
    for hu in planes:
        hu[hu < -900] = -1024
        hu[86:89, 10:86] = (-100 + noise)[:, 10:86]
        hu[np.hypot(x, y) > SIZE / 2 - 2] = blank
        hu[:4] = blank
    assert reasons(planes[:ABOVE]) == []


def test_rows_of_padding_below_the_head_pass() -> None:
    planes = heads()
    for hu in planes:
        hu[90:] = -1024
    assert reasons(planes) == []


@pytest.mark.parametrize(
    "broken",
    [
        lambda hu: (hu + 1024) * 16 - 1024,  # values shifted by four bits
        lambda hu: np.random.default_rng(1).integers(-(1 << 15), 1 << 15, hu.shape).astype(np.float32),
        lambda hu: np.random.default_rng(1).integers(-1024, 3072, hu.shape).astype(np.float32),
        lambda hu: np.where(np.arange(SIZE)[:, None] < SIZE // 2, hu, np.random.default_rng(1).permuted(hu)),
        lambda hu: hu.astype(np.int16).byteswap().astype(np.float32),
        lambda hu: np.where(hu > -500, 3071, hu),
        lambda hu: hu - 5000,
    ],
    ids=["shifted", "noise", "noise of 12 bits", "half shuffled", "swapped", "saturated", "sunk"],
)
def test_what_no_tissue_has_is_found(broken: Any) -> None:
    planes = heads()
    planes[INSIDE] = broken(planes[INSIDE]).astype(np.float32)
    found = reasons(planes)
    assert found and all(f"image 1.2.{INSIDE} " in one for one in found)


def test_the_error_has_its_three_parts_and_not_all_reasons() -> None:
    planes = heads()
    for n in range(5, 15):
        planes[n][:] = 0
    sound = volume()
    looks = [look_at(hu, (SPACING, SPACING)) for hu in planes]
    with pytest.raises(ImplausibleImage, match="7 more") as caught:
        check_plausible(sound, looks)
    assert isinstance(caught.value, DecodeError)
    assert caught.value.what.count("one value") == 3
    assert caught.value.where and "nothing of it was analysed" in caught.value.remedy
    check_plausible(sound, [look_at(hu, (SPACING, SPACING)) for hu in heads()])


def series_of(folder: Path) -> dict[str, tuple[Volume, dict[str, Path]]]:
    planes: dict[str, list[Plane]] = {}
    where: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        try:
            header = read_header(path)
        except HeaderError:
            continue
        if header.frames and header.samples_per_pixel == 1:
            planes.setdefault(header.series_instance_uid, []).extend(planes_of(header))
            where[header.sop_instance_uid] = path
    return {uid: (assemble(found), where) for uid, found in planes.items()}


def test_the_real_head_passes(ge_head: Path) -> None:
    ((head, where),) = series_of(ge_head).values()
    assert reasons([decode(where[plane.sop_instance_uid]).hu[0] for plane in head.planes], head) == []


def test_every_series_of_a_scanner_passes(philips_phantom: Path) -> None:
    counts = []
    for series, where in series_of(philips_phantom).values():
        planes = [decode(where[plane.sop_instance_uid]).hu[0] for plane in series.planes]
        assert reasons(planes, series) == []
        counts.append(len(planes))
    assert {28, 140} <= set(counts)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_simulated_heads_pass(seed: int) -> None:
    made = simulate(seed, bleed="subdural" if seed % 2 else None, thickness_mm=10, size=128)
    looks = [look_at(hu, made.spacing_mm) for hu in made.hu]
    assert implausibilities(volume(len(looks)), looks) == []
