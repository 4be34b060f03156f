"""Looking a volume up at the pixels of a tilted plane, beside scipy's way to do it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from triton_models.training.fields import at_places


@pytest.mark.parametrize("steep", [0.0, 0.3, -0.9])
@pytest.mark.parametrize("shape", [(7, 9, 11), (60, 1100, 20)])
def test_a_plane_through_a_volume_is_what_scipy_finds(steep: float, shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(5)
    volume = rng.uniform(-100, 100, shape).astype(np.float32)
    row, column = np.indices((shape[1] + 6, shape[2] + 6), dtype=np.float32)
    places = [(shape[0] / 2 + steep * row * shape[0] / shape[1] + 0.03 * column), row - 2.4, column - 3.3]
    found = at_places(volume, [np.asarray(place, dtype=np.float32) for place in places], -1000.0)
    inside = np.logical_and.reduce([(p >= 0) & (p <= n - 1) for p, n in zip(places, shape, strict=True)])
    wanted = map_coordinates(volume, places, order=1)
    assert inside.any() and not inside.all()
    # White noise is the worst that there is: neighbours differ by up to 200, and 1/64 of a voxel is lost on each axis.
    assert np.abs(found - wanted)[inside].max() < 200 * 2 / 64
    assert np.all(found[~inside] == -1000.0)


def test_a_plane_beside_a_volume_is_all_outside() -> None:
    places = [np.full((4, 5), value, dtype=np.float32) for value in (-3.0, 1.0, 1.0)]
    assert np.all(at_places(np.zeros((3, 3, 3), dtype=np.float32), places, 7.0) == 7.0)
