"""Whether a model that serves a package is the model that was published: the package's own slabs, asked for again."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from appliance.governance.package import PARITY, Package, PackageError, verify

from .preprocess import window
from .triton import Output


@dataclass(frozen=True, slots=True)
class Parity:
    """How far answers are from the published ones, at most.

    Attributes:
        slabs: how many were asked for.
        probability: over all slabs and labels.
        lesion_map: over all slabs and pixels.
        where: the place of the larger of the two.
        tolerance: what the package allows.
    """

    slabs: int
    probability: float
    lesion_map: float
    where: str
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether neither is farther away than the package allows; not for an answer that is no number."""
        return self.probability <= self.tolerance and self.lesion_map <= self.tolerance

    def __str__(self) -> str:
        return (
            f"over {self.slabs} slabs probabilities differ by up to {self.probability:.2g} and the lesion map by up to "
            f"{self.lesion_map:.2g} from the published ones, most in {self.where}; {self.tolerance:g} is allowed"
        )


def check_parity(package: Package, ask: Callable[[NDArray[np.float32]], Output]) -> Parity:
    """Ask for the slabs of ``parity.npz`` and compare the answers with the ones beside them.

    The file holds ``fields`` (n, size, size) int16 HU of neighbouring slabs, foot to head, on the model's field, and
    what the published model says of them in single precision: ``probabilities`` (n, labels) and ``lesion_map``
    (n, map, map).

    Args:
        package: signed and loaded; its file is compared with its digest again.
        ask: (k, channels, size, size) in 0..1 to the answers; k is no more than the package's largest batch.

    Raises:
        PackageError: the package has no such file, or it does not hold that.
    """
    if package.parity is None:
        raise PackageError("it has no parity vectors", str(package.folder), "get a package that has")
    try:
        with np.load(io.BytesIO(verify(package, PARITY)), allow_pickle=False) as stored:
            fields, probabilities, lesion_map = (stored[key] for key in ("fields", "probabilities", "lesion_map"))
        slabs = _slabs(package, fields)
        lesion_map = lesion_map.reshape(len(fields), *package.model.output("lesion_map").shape[1:])
        probabilities = probabilities.reshape(len(fields), len(package.labels))
    except (ValueError, KeyError, IndexError) as error:
        raise PackageError(
            f"it does not hold the slabs of the model and their answers: {error}",
            str(package.folder / PARITY),
            "restore the package as it was published",
        ) from error
    batch = package.model.maximum_batch
    answers = [ask(slabs[first : first + batch]) for first in range(0, len(slabs), batch)]
    apart = np.abs(np.concatenate([one.probabilities for one in answers]) - probabilities)
    apart_on_map = np.abs(np.concatenate([one.lesion_map for one in answers]) - lesion_map)
    # The place of what is no number comes first, too.
    slab, label = np.unravel_index(apart.argmax(), apart.shape)
    on_slab, row, column = np.unravel_index(apart_on_map.argmax(), apart_on_map.shape)
    probability, on_map = float(apart[slab, label]), float(apart_on_map[on_slab, row, column])
    if on_map > probability or np.isnan(on_map):
        where = f"row {row}, column {column} of the lesion map of slab {on_slab}"
    else:
        where = f"{package.labels[label]} of slab {slab}"
    return Parity(len(slabs), probability, on_map, where, package.parity.tolerance)


def _slabs(package: Package, fields: NDArray[np.int16]) -> NDArray[np.float32]:
    """The model's input (n, channels, size, size) for each slab of a run of neighbours."""
    seen = package.preprocessing
    if fields.ndim != 3 or not len(fields) or fields.shape[1:] != (seen.size, seen.size):
        raise ValueError(f"fields are {fields.shape}")
    windows = [(one.center, one.width) for one in seen.windows]
    channels = [window(field.astype(np.float32), windows) for field in fields]
    last = len(channels) - 1
    beside = range(-seen.neighbours, seen.neighbours + 1)
    return np.stack(
        [np.concatenate([channels[min(max(n + by, 0), last)] for by in beside]) for n in range(len(channels))]
    )
