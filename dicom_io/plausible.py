"""Could a scanner have made this volume? What a decoder returns in good health may still be no image.

A decoder can succeed and return zeros, the image before, half of an image, or noise. Each leaves traces
that no CT reconstruction has, as that is never without noise. They are looked for plane by plane (`look_at`), so that
a plane need not be kept, and judged together (`implausibilities`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dicom_io.errors import DecodeError
from dicom_io.volume import Volume

AIR_HU = -900.0
"""Below it is air, or padding. Air is -1000 HU by definition (PS3.3 C.11.1.1.2, Hounsfield units), water 0."""

TISSUE_HU = -500.0
"""Half of air and half of water: the edge of a body."""

DENSEST_HU = 2000.0
"""No cross-section of a head is denser in the middle of its values: brain has 20 to 40 HU, compact bone reaches 2000,
only enamel (3000) and metal exceed it, and of those there is little."""

VACUUM_HU = -1200.0
"""Nothing attenuates less than vacuum, -1000 HU. Noise and the streaks of metal go below it in few pixels; values that
mean padding do, too, but they are one value."""

_NOT_VACUUM = 0.25  # part of an image that may lie below it
_SECTION_MM2 = 5000.0  # the cross-section of a small head's neck; the cap under the vertex, 5 mm deep, has half
_STOPPED_ROWS = 4
_STOPPED_MM = 60.0  # a skull of 90 mm radius is as wide 5 mm within its edge, and no image ends its noise there
_TABLE_MM = 10.0  # where a scanner blanks the air, a table may end it by a straight edge: its shell is thinner
_NEIGHBOURS_HU = 500.0  # from air to tissue at once, or from brain to bone: the edges of an image, and little else
_NO_EDGE = 0.25  # part of the neighbours that may differ by so much; of white noise of 12 bits it is three quarters
_GRID = 2  # every second row and column is enough for what is no edge


class ImplausibleImage(DecodeError):
    """Pixels that were decoded without an error and cannot be what a scanner sent."""


@dataclass(frozen=True, slots=True)
class Look:
    """What is kept of a plane.

    Attributes:
        constant: its only value in HU; None where it has several.
        tissue_mm2: area above `TISSUE_HU`.
        digest: of every fourth value of every fourth row; noise makes those differ between any two planes.
        problems: what is impossible about the plane by itself, each a phrase that follows "it".
    """

    constant: float | None
    tissue_mm2: float
    digest: bytes
    problems: tuple[str, ...]


def look_at(hu: NDArray[Any], spacing_mm: tuple[float, float]) -> Look:
    """Look at one plane.

    Args:
        hu: (rows, columns) HU.
        spacing_mm: (between rows, between columns).
    """
    coarse = np.ascontiguousarray(hu[::_GRID, ::_GRID])
    tissue = np.count_nonzero(coarse > TISSUE_HU)
    area = tissue / coarse.size * hu.size * spacing_mm[0] * spacing_mm[1]
    digest = hashlib.blake2b(np.ascontiguousarray(coarse[::_GRID, ::_GRID]).data, digest_size=16).digest()
    one_value, repeated = _still_rows(hu)
    if one_value.all() and (hu[:, 0] == hu[0, 0]).all():
        return Look(float(hu[0, 0]), area, digest, ())
    problems = []
    if tissue and (area >= _SECTION_MM2 or tissue > coarse.size / 2):
        dense = np.count_nonzero(coarse > DENSEST_HU)
        if dense > tissue / 2:
            problems.append(f"is denser than bone ({dense / tissue:.0%} of its body above {DENSEST_HU:g} HU)")
    empty = np.count_nonzero(coarse < VACUUM_HU)
    if empty > _NOT_VACUUM * coarse.size:
        _, counts = np.unique(coarse[coarse < VACUUM_HU], return_counts=True)
        if empty - counts.max() > _NOT_VACUUM * coarse.size:
            problems.append(f"is emptier than vacuum in {empty / coarse.size:.0%} of its pixels")
    rows = hu[:: 2 * _GRID]
    steps = np.count_nonzero(np.abs(np.subtract(rows[:, 1:], rows[:, :-1], dtype=np.float32)) > _NEIGHBOURS_HU)
    apart = steps / max(rows[:, 1:].size, 1)
    if apart > _NO_EDGE:
        problems.append(f"is noise: {apart:.0%} of its neighbouring pixels are {_NEIGHBOURS_HU:g} HU apart or more")
    problems += _dead_rows(hu, one_value | repeated, spacing_mm)
    return Look(None, area, digest, tuple(problems))


def _still_rows(hu: NDArray[Any]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(rows,) which rows have one value only, and which have the values of the row before."""
    few = np.ascontiguousarray(hu[:, ::16])  # columns that tell most rows apart
    one_value = (few == few[:, :1]).all(axis=1)
    candidates = np.flatnonzero(one_value)
    one_value[candidates] = (hu[candidates] == hu[candidates, :1]).all(axis=1)
    repeated = np.zeros(len(hu), bool)
    repeated[1:] = (few[1:] == few[:-1]).all(axis=1)
    candidates = np.flatnonzero(repeated)
    repeated[candidates] = (hu[candidates] == hu[candidates - 1]).all(axis=1)
    return one_value, repeated


def _dead_rows(hu: NDArray[Any], dead: NDArray[np.bool_], spacing_mm: tuple[float, float]) -> list[str]:
    """Runs of dead rows, each of one value or the same as the row before, that cut off a wide section of tissue."""
    deeper = max(1, round(_TABLE_MM / spacing_mm[0]))
    found = []
    bounds = np.flatnonzero(np.diff(np.concatenate(([False], dead, [False])).astype(np.int8)))
    for first, end in zip(bounds[::2].tolist(), bounds[1::2].tolist(), strict=True):
        if end - first < _STOPPED_ROWS:
            continue
        # Beside a run at an edge of the image there is one row that lives.
        beside = [(first - 1, max(first - 1 - deeper, 0))] if first else []
        beside += [(end, min(end + deeper, len(hu) - 1))] if end < len(hu) else []
        # What fills the dead rows fills corners, too.
        if beside and all(
            _wide(hu[row], hu[first, 0], spacing_mm[1]) > _STOPPED_MM
            and _wide(hu[inner], hu[first, 0], spacing_mm[1]) > _STOPPED_MM / 2
            for row, inner in beside
        ):
            what = "ends in" if end == len(hu) else "begins in" if first <= 1 else "is interrupted in"
            found.append(f"{what} the middle of the body: nothing changes from row {first + 1} to {end}")
    return found


def _wide(row: NDArray[Any], fill: float, column_mm: float) -> float:
    """How many mm of a row are tissue."""
    return np.count_nonzero((row > TISSUE_HU) & (row != fill)) * column_mm


def implausibilities(volume: Volume, looks: Sequence[Look]) -> list[str]:
    """Why the volume can be no CT of a body; empty where nothing speaks against it.

    Planes of nothing but air are let through beyond the vertex: some scanners blank what lies outside the body.

    Args:
        looks: one for each of ``volume.planes``.
    """
    reasons = [f"{_name(volume, index)} {problem}" for index, look in enumerate(looks) for problem in look.problems]
    beyond = _beyond_the_body(looks)
    seen: dict[bytes, int] = {}
    for index, look in enumerate(looks):
        if index in beyond:
            continue
        if look.constant is not None:
            reasons.append(f"{_name(volume, index)} has the one value {look.constant:g} HU")
        elif look.digest in seen:
            reasons.append(f"{_name(volume, index)} has the same pixels as {_name(volume, seen[look.digest])}")
        seen.setdefault(look.digest, index)
    return reasons


def _beyond_the_body(looks: Sequence[Look]) -> set[int]:
    """Planes of nothing but air that follow, up to an end of the volume, on one with little tissue or none."""
    found: set[int] = set()
    for indices in (range(len(looks)), range(len(looks) - 1, -1, -1)):
        run: list[int] = []
        for index in indices:
            constant = looks[index].constant
            if constant is None or constant > AIR_HU:
                if looks[index].tissue_mm2 < _SECTION_MM2:
                    found.update(run)
                break
            run.append(index)
    return found


def check_plausible(volume: Volume, looks: Sequence[Look]) -> None:
    """Let nothing come of a volume that can be no CT of a body.

    Raises:
        ImplausibleImage: with the reasons, of many the first few.
    """
    reasons = implausibilities(volume, looks)
    if reasons:
        more = f" (and {len(reasons) - 3} more)" if len(reasons) > 3 else ""
        raise ImplausibleImage(
            "; ".join(reasons[:3]) + more,
            "the decoded images",
            "look at the series: if it is sound there, report this fault with it; nothing of it was analysed",
        )


def _name(volume: Volume, index: int) -> str:
    plane = volume.planes[index]
    return f"image {plane.sop_instance_uid} frame {plane.frame + 1}"
