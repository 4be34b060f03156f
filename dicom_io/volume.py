"""Slices → one ordered volume: order, spacing, tilt, duplicates and gaps. Positions only, never pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from dicom_io.errors import GeometryError
from dicom_io.header import FramePlane, Header

DUPLICATE_MM = 0.01
"""Two planes nearer than this along the normal are one plane sent twice: no CT steps by less than 0.1 mm."""

ORIENTATION_TOLERANCE = 1e-3
"""Difference allowed in a direction cosine, 0.06°: devices round them to six digits, some to four."""

SPACING_TOLERANCE = 1e-3
"""Difference allowed in a pixel spacing, relative."""

GAP_FRACTION = 0.5
"""A gap is missing cover of more than this part of a slice."""

SHIFT_MM = 1.0
"""How far a plane may lie off the line on which its neighbours lead: no patient is scanned as a staircase."""

OVERLAP_MM = 10.0
"""Two acquisitions of one series may cover so much of the same: more is the same piece of the patient scanned twice."""

ROUNDING_MM = 0.001
"""Positions are decimal strings: what lies at a limit must not be a gap in one pose and none in another."""

UNIFORM_FRACTION = 0.01
UNIFORM_MM = 0.02
"""A volume is uniform if no distance differs from the median by more than 1 % or 0.02 mm."""


@dataclass(frozen=True, slots=True)
class Plane:
    """One frame and where it lies; ``frame`` counts from 0, ``acquisition`` is its AcquisitionNumber."""

    sop_instance_uid: str
    frame: int
    geometry: FramePlane
    instance_number: int | None
    acquisition: int | None = None


@dataclass(frozen=True, slots=True)
class Gap:
    """Missing cover of ``mm`` between ``planes[after]`` and ``planes[after + 1]``."""

    after: int
    mm: float


@dataclass(frozen=True, slots=True)
class Volume:
    """Parallel planes in order along their normal.

    Attributes:
        planes: by increasing offset: foot to head for axial slices.
        normal: unit normal; its largest component is positive, so it points to the patient's head for axial slices,
            to the back for coronal and to the left for sagittal ones.
        offsets: position of each plane along ``normal`` in mm, strictly increasing.
        tilt_degrees: angle between ``normal`` and the patient's long axis, 0 to 90.
        duplicates: planes left out because another lies in the same place.
        gaps: where cover is missing.
        uniform: whether the planes are evenly spaced.
    """

    planes: tuple[Plane, ...]
    normal: tuple[float, float, float]
    offsets: tuple[float, ...]
    tilt_degrees: float
    duplicates: tuple[Plane, ...]
    gaps: tuple[Gap, ...]
    uniform: bool


def planes_of(header: Header) -> tuple[Plane, ...]:
    """One plane for each frame; () where the header has no geometry."""
    return tuple(
        Plane(header.sop_instance_uid, index, frame, header.instance_number, header.acquisition_number)
        for index, frame in enumerate(header.frames)
    )


def assemble(planes: Sequence[Plane]) -> Volume:
    """Order the planes of one series (PS3.3 C.7.6.2.1.1); the order of the input makes no difference.

    Of planes in the same place the one with the highest instance number is kept (a repeated reconstruction
    counts on from the first); without numbers, the one whose SOP Instance UID sorts last.

    Between neighbours the cover that is missing is their distance minus the mean of their thicknesses (where a
    thickness is not given: the median distance of the volume). It is a gap if it exceeds half a slice: half the
    larger of that mean and the median distance.

    Raises:
        GeometryError: no planes, planes of different orientation or pixel spacing, two in one plane that are
            shifted against each other, planes that do not lie one above the other, or two acquisitions that cover the
            same: sorted together they would be one picture of two positions of the head.
    """
    if not planes:
        raise GeometryError("there are no slices with a position", "series", "see why their headers have no geometry")
    ranked = sorted(planes, key=_rank)
    reference = ranked[0]
    _check_alike(ranked, reference)
    row, column = reference.geometry.orientation[:3], reference.geometry.orientation[3:]
    normal = _normal(row, column)
    placed = sorted(ranked, key=lambda plane: (_dot(plane.geometry.position, normal), _rank(plane)))

    kept: list[Plane] = []
    duplicates: list[Plane] = []
    for plane in placed:
        if kept and _dot(plane.geometry.position, normal) - _dot(kept[-1].geometry.position, normal) < DUPLICATE_MM:
            _check_not_shifted(kept[-1], plane)
            worse, better = sorted((kept[-1], plane), key=_rank)
            kept[-1] = better
            duplicates.append(worse)
        else:
            kept.append(plane)
    offsets = tuple(_dot(plane.geometry.position, normal) for plane in kept)
    _check_in_line(kept, offsets, normal)
    _check_scanned_once(kept, offsets)
    distances = [b - a for a, b in pairwise(offsets)]
    return Volume(
        planes=tuple(kept),
        normal=normal,
        offsets=offsets,
        tilt_degrees=math.degrees(math.acos(min(1.0, abs(normal[2])))),
        duplicates=tuple(duplicates),
        gaps=_gaps(kept, distances),
        uniform=_uniform(distances),
    )


def _rank(plane: Plane) -> tuple[int, str, int]:
    number = plane.instance_number if plane.instance_number is not None else -(2**31) - 1
    return number, plane.sop_instance_uid, plane.frame


def _name(plane: Plane) -> str:
    return f"{plane.sop_instance_uid} frame {plane.frame + 1}"


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def _normal(row: Sequence[float], column: Sequence[float]) -> tuple[float, float, float]:
    cross = (
        row[1] * column[2] - row[2] * column[1],
        row[2] * column[0] - row[0] * column[2],
        row[0] * column[1] - row[1] * column[0],
    )
    length = math.copysign(math.hypot(*cross), max(cross, key=abs))
    # Adding 0.0 turns -0.0 into 0.0.
    return cross[0] / length + 0.0, cross[1] / length + 0.0, cross[2] / length + 0.0


def _check_alike(planes: Sequence[Plane], reference: Plane) -> None:
    for plane in planes:
        cosines, expected = plane.geometry.orientation, reference.geometry.orientation
        if max(abs(a - b) for a, b in zip(cosines, expected, strict=True)) > ORIENTATION_TOLERANCE:
            raise GeometryError(
                f"its slices have different orientations: {_shown(expected)} and {_shown(cosines)}",
                f"{_name(reference)} and {_name(plane)}",
                "analyse them as separate series",
            )
        spacing, wanted = plane.geometry.spacing, reference.geometry.spacing
        if any(abs(a - b) > SPACING_TOLERANCE * b for a, b in zip(spacing, wanted, strict=True)):
            raise GeometryError(
                f"its slices have different pixel spacings: {_shown(wanted)} and {_shown(spacing)} mm",
                f"{_name(reference)} and {_name(plane)}",
                "analyse them as separate series",
            )


def _check_not_shifted(first: Plane, second: Plane) -> None:
    shift = math.dist(first.geometry.position, second.geometry.position)
    if shift > max(DUPLICATE_MM, 0.5 * min(first.geometry.spacing)):
        raise GeometryError(
            f"two slices lie in the same plane but {shift:.2f} mm apart",
            f"{_name(first)} and {_name(second)}",
            "analyse the acquisitions as separate series",
        )


def _check_in_line(planes: Sequence[Plane], offsets: Sequence[float], normal: Sequence[float]) -> None:
    """That the planes lie one above the other, upright or, as a tilted gantry has it, along one slope."""
    steps = []
    for (below, above), rise in zip(pairwise(planes), (b - a for a, b in pairwise(offsets)), strict=True):
        way = [b - a for a, b in zip(below.geometry.position, above.geometry.position, strict=True)]
        steps.append((rise, [part - rise * along for part, along in zip(way, normal, strict=True)]))
    slope = [median(aside[axis] / rise for rise, aside in steps) for axis in range(3)] if steps else []
    for (below, above), (rise, aside) in zip(pairwise(planes), steps, strict=True):
        shift = math.dist(aside, [rise * part for part in slope])
        if shift > SHIFT_MM:
            raise GeometryError(
                f"a slice lies {shift:.1f} mm beside the line of the others",
                f"{_name(below)} and {_name(above)}",
                "analyse the acquisitions as separate series",
            )


def _check_scanned_once(planes: Sequence[Plane], offsets: Sequence[float]) -> None:
    """That no two acquisitions (General Acquisition Module, PS3.3 C.7.10.1) cover the same."""
    extents: dict[int, tuple[float, float]] = {}
    for plane, offset in zip(planes, offsets, strict=True):
        if plane.acquisition is not None:
            low, high = extents.get(plane.acquisition, (offset, offset))
            extents[plane.acquisition] = min(low, offset), max(high, offset)
    reached: tuple[float, int] | None = None
    for number, (low, high) in sorted(extents.items(), key=lambda each: each[1]):
        if reached and min(reached[0], high) - low > OVERLAP_MM:
            raise GeometryError(
                f"acquisitions {reached[1]} and {number} cover the same {min(reached[0], high) - low:.0f} mm",
                "series",
                "analyse the acquisitions as separate series",
            )
        reached = max(reached or (high, number), (high, number))


def uncovered(volume: Volume) -> float:
    """How much of the way from the first plane to the last no slice covers, 0..1.

    A slice whose thickness is not given covers as far as its neighbours.
    """
    extent = volume.offsets[-1] - volume.offsets[0]
    missing = 0.0
    for (below, above), (low, high) in zip(pairwise(volume.planes), pairwise(volume.offsets), strict=True):
        pair = (below.geometry.thickness, above.geometry.thickness)
        missing += max(0.0, (high - low) - math.fsum(high - low if one is None else one for one in pair) / 2)
    return missing / extent if extent else 0.0


def _shown(values: Sequence[float]) -> str:
    return "\\".join(f"{value:g}" for value in values)


def _gaps(planes: Sequence[Plane], distances: Sequence[float]) -> tuple[Gap, ...]:
    if not distances:
        return ()
    typical = median(distances)
    gaps = []
    for after, distance in enumerate(distances):
        pair = (planes[after].geometry.thickness, planes[after + 1].geometry.thickness)
        cover = math.fsum(typical if thickness is None else thickness for thickness in pair) / 2
        missing = distance - cover
        if missing > GAP_FRACTION * max(cover, typical) + ROUNDING_MM:
            gaps.append(Gap(after, missing))
    return tuple(gaps)


def _uniform(distances: Sequence[float]) -> bool:
    if not distances:
        return True
    typical = median(distances)
    return all(abs(distance - typical) <= max(UNIFORM_MM, UNIFORM_FRACTION * typical) for distance in distances)
