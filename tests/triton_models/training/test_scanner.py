"""What a scanner makes of a volume, on balls and cylinders instead of a head."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray

from triton_models.training import scanner
from triton_models.training.anatomy import Head
from triton_models.training.fields import Volume
from triton_models.training.scanner import KERNELS, PADDING_HU, Protocol, Scan

QUIET = Protocol(
    vendor="", kernel="standard", kvp=120, mas=300, field_mm=160, size=160, thickness_mm=5, step_mm=5, low_mm=-40,
    high_mm=40, tilt_deg=0, pitch_deg=0, roll_deg=0, yaw_deg=0, centre_mm=(0, 0), noise_hu=1e-6, hardening_hu=0,
    cupping_hu=0, shift_hu=0, gain=1, motion_mm=0, holder_mm=0, padded=False,
)  # fmt: skip
SHAPE = (121, 161, 161)
ORIGIN_MM = (-60.0, -80.0, -80.0)


def grid() -> tuple[NDArray[np.float64], ...]:
    """z, y, x of every voxel in mm."""
    return tuple(axis + origin for axis, origin in zip(np.indices(SHAPE, dtype=np.float64), ORIGIN_MM, strict=True))


def scan(hu: Volume, protocol: Protocol, truth: NDArray[np.uint8] | None = None, seed: int = 1) -> Scan:
    head = cast(Head, SimpleNamespace(hu=hu.astype(np.float32), origin_mm=ORIGIN_MM))
    blood = np.zeros(SHAPE, np.uint8) if truth is None else truth
    return scanner.scan(np.random.default_rng(seed), head, blood, protocol)


@pytest.fixture(scope="module")
def water() -> Volume:
    """A cylinder of soft tissue."""
    _, y, x = grid()
    return np.where(np.hypot(x, y) < 70, 30.0, -1000.0).astype(np.float32)


def ball(centre: tuple[float, float, float], radius: float) -> NDArray[np.bool_]:
    """True within a radius of (z, y, x) mm."""
    z, y, x = grid()
    return np.asarray(np.sqrt((z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2) < radius)


@pytest.mark.parametrize("turned", [{}, {"tilt_deg": 18.0}, {"pitch_deg": -12.0, "yaw_deg": 8.0}, {"size": 320}])
def test_a_ball_is_found_where_it_is(water: Volume, turned: dict[str, float]) -> None:
    inside = ball((12.0, -20.0, 25.0), 9.0)
    protocol = replace(QUIET, **turned)
    seen = scan(np.where(inside, 70, water), protocol, inside.astype(np.uint8))
    (volume,) = seen.volume_ml.values()
    assert volume == pytest.approx(inside.sum() / 1000, rel=0.03)
    assert np.median(seen.hu[seen.mask > 0]) == pytest.approx(70, abs=4)
    slices, rows, columns = (axis.mean() for axis in np.nonzero(seen.mask))
    first = np.array([np.interp(slices, range(len(seen.positions)), one) for one in zip(*seen.positions, strict=True)])
    across, down = np.array(seen.orientation[:3]), np.array(seen.orientation[3:])
    patient = first + protocol.pixel_mm * (columns * across + rows * down)
    there = scanner._rotation(protocol) @ np.array([25.0, -20.0, 12.0])
    assert patient == pytest.approx(there, abs=1.0)


def test_a_thick_slice_is_the_mean_of_what_it_covers(water: Volume) -> None:
    z, _, _ = grid()
    sheet = np.where(np.abs(z - 2) < 0.5, water + 100, water)  # one millimetre
    thick = scan(sheet, QUIET)
    thin = scan(sheet, replace(QUIET, thickness_mm=1, step_mm=1))
    assert thick.hu[:, 80, 80].max() == pytest.approx(30 + 100 / 5, abs=5)
    assert thin.hu[:, 80, 80].max() > 30 + 40  # no slice lies just in it


def test_noise_is_as_loud_as_the_protocol_says_and_as_fine_as_the_kernel(water: Volume) -> None:
    def spread(kernel: str) -> tuple[float, float]:
        protocol = replace(QUIET, kernel=kernel, noise_hu=5.0)
        one, other = (scan(water, protocol, seed=seed).hu[:, 50:110, 50:110] for seed in (1, 2))
        noise = (one - other) / np.sqrt(2)
        return float(noise.std()), float((noise[:, 1:] * noise[:, :-1]).mean() / noise.var())

    found = {kernel: spread(kernel) for kernel in KERNELS}
    for loud, _ in found.values():
        assert 3 < loud < 8
    assert found["soft"][1] > found["standard"][1] > found["sharp"][1]
    assert found["iterative"][1] > found["standard"][1]


def test_between_thick_bones_it_is_darker_and_beside_bone_brighter(water: Volume) -> None:
    _, y, x = grid()
    bones = (np.abs(np.abs(x) - 45) < 14) & (np.abs(y) < 8)
    head = np.where(bones, 1400, water)
    clean = scan(head, QUIET).hu
    bands = np.mean([scan(head, replace(QUIET, hardening_hu=1.5), seed=s).hu - clean for s in range(6)], axis=0)
    assert bands[:, 76:84, 74:86].mean() < -4
    assert abs(bands[:, 20:28, 74:86].mean()) < 2
    cupping = scan(head, replace(QUIET, cupping_hu=15)).hu - clean
    assert cupping[:, 80, 108:110].mean() > 2 > abs(cupping[:, 80, 80].mean())


def test_metal_throws_streaks(water: Volume) -> None:
    metal = np.where(ball((0.0, 0.0, 30.0), 3.0), 9000, water)
    error = np.abs(scan(metal, QUIET).hu - scan(water, QUIET).hu)
    slices = error[:, 60:100, 85:100]
    assert slices[len(error) // 2].max() > 20
    assert error[1].max() < 1


def test_what_is_outside_the_field_is_padding_only_where_the_scanner_pads(water: Volume) -> None:
    assert (scan(water, replace(QUIET, padded=True)).hu[:, 0, 0] == PADDING_HU).all()
    assert scan(water, QUIET).hu.min() >= -1024


def test_motion_shows_in_some_neighbouring_slices(water: Volume) -> None:
    moved = np.abs(scan(water, replace(QUIET, motion_mm=4.0)).hu - scan(water, QUIET).hu).max(axis=(1, 2)) > 20
    (where,) = np.nonzero(moved)
    assert 1 <= len(where) <= 5
    assert np.ptp(where) == len(where) - 1


def test_protocols_are_plausible_and_thin_slices_noisier() -> None:
    drawn = {
        mm: [scanner.draw(np.random.default_rng(n), kernels=("standard",), thickness_mm=mm) for n in range(40)]
        for mm in (0.6, 5.0)
    }
    for protocols in drawn.values():
        assert all(-30 < one.tilt_deg < 30 and 200 < one.field_mm < 260 and 1 < one.noise_hu < 17 for one in protocols)
    thin, thick = (np.mean([one.noise_hu for one in drawn[mm]]) for mm in (0.6, 5.0))
    assert thin > 2 * thick
