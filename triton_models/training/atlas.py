"""The average adult brain that the simulated heads are bent from: maps on a 1 mm grid, made once and committed.

``python -m triton_models.training.atlas`` makes ``mni152.npz`` anew from the ICBM 152 2009a symmetric average, as
nilearn brings it; its notice is in ``LICENSE.mni152``. Reading it needs NumPy alone.

Axes are (z, y, x) in mm as in the head: x to the left, y to the back, z to the crown; the origin is the anterior
commissure.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .fields import Volume, step, tube

PATH = Path(__file__).parent / "mni152.npz"
LEVELS = 15
"""The highest of the levels that fluid and white matter are stored in."""
QUARTERS = 4
"""Distances are stored in quarters of a mm, up to 31.75 mm, in a byte."""
TABLE_STEP = 2
"""The skull's inner table and its hull are stored on every second mm."""
LOW_MM, HIGH_MM = (-106, -140, -106), (118, 136, 106)
"""What the inner table's map covers, (z, y, x)."""

_LATERAL = (  # the left lateral ventricle: x, y, z and a radius that holds it and no cistern
    ((14, -36, 2, 10), (12, -14, 10, 11), (13, 8, 21, 10), (21, 30, 18, 10), (28, 42, 6, 10), (27, 62, 3, 9)),
    ((27, 42, 6, 9), (35, 30, -6, 7.5), (36, 18, -14, 7), (32, 6, -20, 7)),
)
_THIRD = ((0, -4, -9, 3.5), (0, 6, -4, 4.5), (0, 20, 0, 4.5), (0, 28, 0, 3))
_FOURTH = ((0, 28, -3, 2.5), (0, 37, -16, 3), (0, 45, -28, 9), (0, 50, -36, 10), (0, 49, -48, 6), (0, 46, -54, 3))
_CISTERNS = (  # spaces under the brain that the stripped average leaves out
    ((0, -14, -20, 5), (0, -2, -22, 8), (0, 12, -28, 6), (0, 22, -44, 6), (0, 30, -62, 8)),
    ((0, 12, -28, 6), (14, 22, -36, 5), (24, 34, -40, 5)),
    ((0, 12, -28, 6), (-14, 22, -36, 5), (-24, 34, -40, 5)),
    ((0, 70, -52, 5), (0, 64, -60, 7), (0, 48, -70, 12), (0, 44, -120, 12)),
)


@dataclass(frozen=True, slots=True)
class Atlas:
    """The maps as they are stored.

    Attributes:
        fluid: (z, y, x) 0..`LEVELS`; the higher, the more surely there is fluid and not brain.
        white: (z, y, x) 0..`LEVELS`, white matter's share of the brain.
        ventricle: (z, y, x) distance into the ventricles, negative outside, in quarters of a mm.
        origin_mm: of the first voxel of these three, (z, y, x).
        table: (z, y, x) depth under the inner table, negative outside, in quarters of a mm, from `LOW_MM` on.
        hull: (z, y, x) the same for a smooth hull about the inside of the skull.
        tentorium_mm: (y, x) its height, on the columns of the first three.
        cavity_ml: the inside of the skull.
    """

    fluid: NDArray[np.uint8]
    white: NDArray[np.uint8]
    ventricle: NDArray[np.int8]
    origin_mm: NDArray[np.float32]
    table: NDArray[np.int8]
    hull: NDArray[np.int8]
    tentorium_mm: NDArray[np.float32]
    cavity_ml: float


@cache
def load() -> Atlas:
    """The committed atlas; nobody may change its arrays."""
    with np.load(PATH) as file:
        return Atlas(
            **{name: file[name] for name in Atlas.__slots__ if name != "cavity_ml"}, cavity_ml=float(file["cavity_ml"])
        )


def _axes(low: tuple[int, ...], shape: tuple[int, ...]) -> list[Volume]:
    """The coordinates z, y and x of a 1 mm grid, to be broadcast."""
    axes = (np.arange(first, first + count, dtype=np.float32) for first, count in zip(low, shape, strict=True))
    return list(np.ix_(*axes))


def _signed(inside: NDArray[np.bool_]) -> Volume:
    from scipy import ndimage

    outer = ndimage.distance_transform_edt(~inside)
    inner = ndimage.distance_transform_edt(inside)
    return np.asarray(inner - outer, dtype=np.float32)


def _closed(inside: NDArray[np.bool_], radius: float, flat: bool = False) -> NDArray[np.bool_]:
    """Gaps up to twice ``radius`` mm wide filled, in space or, ``flat``, in each transverse slice."""
    from scipy import ndimage

    far = (1e6, 1, 1) if flat else 1
    grown = ndimage.distance_transform_edt(~inside, sampling=far) <= radius
    return np.asarray(ndimage.distance_transform_edt(grown, sampling=far) > radius)


def _ventricles(fluid: Volume, axes: list[Volume]) -> NDArray[np.bool_]:
    """Fluid within the ventricles' envelopes that is connected to their middles."""
    from scipy import ndimage

    z, y, x = axes
    side = np.abs(x)
    envelope = np.maximum.reduce([tube(side, y, z, chain) for chain in _LATERAL])
    envelope = np.maximum.reduce([envelope, tube(x, y, z, _THIRD), tube(x, y, z, _FOURTH)])
    parts, _ = ndimage.label((fluid > 0.5) & (envelope > 0))
    counts = np.bincount(parts.ravel())
    counts[0] = 0
    return np.asarray((counts > 150)[parts])


def _cavity(mask: NDArray[np.bool_], axes: list[Volume]) -> Volume:
    """Depth under the inner table on the grid."""
    from scipy import ndimage

    z, y, x = axes
    inside = _closed(mask, 5) | (_closed(mask, 20, flat=True) & (z > -14 + 0.1 * np.maximum(-y, 0)))
    inside |= _closed(mask & (y > 20), 9, flat=True) & (y > 30)
    for chain in _CISTERNS:
        inside |= tube(x, y, z, chain) > 0
    signed = _signed(inside) + np.float32(2.0)
    fine, smooth = (ndimage.gaussian_filter(signed, sigma) for sigma in (1.6, 4.0))
    return np.asarray(fine + (smooth - fine) * step(z, -5, 6), dtype=np.float32)


def _tentorium(fluid: Volume, axes: list[Volume]) -> NDArray[np.float32]:
    """(y, x): height of the sheet of fluid between cerebrum and cerebellum, smoothed."""
    from scipy import ndimage

    z, y, x = axes
    ridge = 12 - 0.79 * (np.clip(y, 45, 90) - 50)
    edge = -21 - 0.12 * np.maximum(np.abs(x) - 30, 0) - 0.1 * np.maximum(y - 75, 0)
    guess = (edge + (ridge - edge) * np.exp(-((x / 15) ** 2)))[0]
    near = ndimage.gaussian_filter(fluid, 1.0) - ((z - guess) / 10) ** 2
    found = z[:, 0, 0][near.argmax(axis=0)]
    certain = np.clip(near.max(axis=0), 0.02, 1)
    smooth = [ndimage.gaussian_filter(a, 5.0) for a in (found * certain, certain)]
    height = smooth[0] / smooth[1]
    height -= 2 * np.maximum(10 + 0.45 * np.abs(x[0]) - y[0], 0)  # before the petrous ridges all is above it
    return np.asarray((height + height[:, ::-1]) / 2, dtype=np.float32)


def build() -> dict[str, NDArray[Any]]:
    """The atlas's arrays, from nilearn's copy of the average."""
    from importlib import resources

    import nibabel
    from scipy import ndimage

    def read(name: str) -> Volume:
        path = resources.files("nilearn.datasets.data") / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz"
        image = nibabel.load(str(path))
        # Stored to the right, to the front, to the crown, from (-98, -134, -72).
        return np.asarray(image.dataobj, dtype=np.float32).transpose(2, 1, 0)[:, ::-1, ::-1]

    t1, grey, white = read("t1"), read("gm") / np.float32(255), read("wm") / np.float32(255)
    before = [first - low for first, low in zip((-72, -98, -98), LOW_MM, strict=True)]
    after = [high - low - n - b for high, low, n, b in zip(HIGH_MM, LOW_MM, t1.shape, before, strict=True)]
    padding = tuple(zip(before, after, strict=True))
    t1, grey, white = (np.pad(a, padding).astype(np.float32) for a in (t1, grey, white))
    mask = t1 > 0
    axes = _axes(LOW_MM, t1.shape)

    # Sulci are blurred in an average of 152: what is darker than its surroundings is fluid too.
    seen = np.where(mask, t1, np.float32(70))
    hollow = (ndimage.gaussian_filter(seen, 3.0) - seen) / 100
    fluid = 0.6 * (185 - seen) / 115 + 0.6 * np.clip(1 - grey - white, 0, 1) + hollow
    table = _cavity(mask, axes)
    hull = ndimage.gaussian_filter(_signed(_closed((table > 0) & (axes[0] > -62), 30)), 4.0)
    ventricle = _signed(_ventricles(fluid, axes))
    tentorium = _tentorium(fluid, axes)

    def coarse(signed: Volume) -> NDArray[np.int8]:
        return np.rint(np.clip(signed[::TABLE_STEP, ::TABLE_STEP, ::TABLE_STEP], -31, 31) * QUARTERS).astype(np.int8)

    box = tuple(slice(int(a.min()) - 4, int(a.max()) + 5) for a in np.nonzero(mask))
    ventricle = ndimage.gaussian_filter(ventricle, 0.6)
    share = ndimage.gaussian_filter(white, 0.4) / (ndimage.gaussian_filter(white + grey, 0.4) + 1e-2)
    return {
        "fluid": np.rint(np.clip(fluid[box] / 0.9, 0, 1) * LEVELS).astype(np.uint8),
        "white": np.rint(np.clip(share[box], 0, 1) * LEVELS).astype(np.uint8),
        "ventricle": np.rint(np.clip(ventricle[box], -12, 12) * QUARTERS).astype(np.int8),
        "origin_mm": np.array([low + part.start for low, part in zip(LOW_MM, box, strict=True)], dtype=np.float32),
        "table": coarse(table),
        "hull": coarse(hull),
        "tentorium_mm": tentorium[box[1:]],
        "cavity_ml": np.float64(((table > 0) & (axes[0] > -66)).sum() / 1000),
    }


if __name__ == "__main__":
    np.savez_compressed(PATH, **build())  # type: ignore[arg-type]
