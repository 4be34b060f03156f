"""Which series of a study is analysed, and why each of the others is not."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage

from appliance.governance.indication import BOX, Admission, Criterion, body_region, has_contrast, scanner
from appliance.governance.package import Package
from appliance.study.grouping import Series
from dicom_io.errors import GeometryError
from dicom_io.header import Header
from dicom_io.volume import Volume, assemble, planes_of

CT_IMAGES = (CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)

MAXIMUM_TILT_DEGREES = 35.0
"""Gantries tilt to about 30°; a series further off the axial plane is a reformat or a scout."""

UPRIGHT = 0.8
"""Least cosine between the image's axes and the patient's: a head turned by more than 37° in the image is not read."""

MINIMUM_SLICES = 5
"""Fewer are a scout, a bolus monitor or a fragment."""

THICK_MM = 2.5
"""At and above this slice thickness a series counts as thick."""

_SHARP_NAMES = re.compile(r"BONE|EDGE|LUNG|ULTRA|SHARP|DETAIL|KNOCHEN")


@dataclass(frozen=True, slots=True)
class Considered:
    """One series of the study and what was decided on it.

    Attributes:
        left_out: its slices that lie in the place of another one.
    """

    series_instance_uid: str
    series_number: int | None
    description: str
    instances: int
    chosen: bool
    reason: str
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class Selection:
    """The decision: the chosen series with its geometry, or None; and every series with its reason."""

    series: Series | None
    volume: Volume | None
    considered: tuple[Considered, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """What was considered, JSON-ready."""
        return [asdict(one) for one in self.considered]


@dataclass(frozen=True, slots=True)
class _Candidate:
    series: Series
    volume: Volume
    kernel: Literal["soft", "unknown"]
    thickness: float

    def rank(self) -> tuple[bool, bool, bool, int, int]:
        """Smaller is better: without contrast, a known soft kernel, thick, many slices, low series number."""
        first = self.series.first
        return (
            has_contrast(first),
            self.kernel != "soft",
            self.thickness < THICK_MM,
            -len(self.volume.planes) if self.thickness >= THICK_MM else 0,
            first.series_number or 0,
        )


def kernel_class(header: Header) -> Literal["soft", "sharp", "unknown"]:
    """Whether a reconstruction kernel is for soft tissue, from the makers' own naming.

    GE names its kernels in words (SOFT, STANDARD, BONE …). Siemens numbers them by sharpness (H31s, Hr40f,
    J45s, Hr64h): below 50 is soft. Canon's FC20 to FC29 and FC64 to FC69 are brain kernels, FC01 to FC19 body
    kernels, FC30 to FC39, FC50 to FC59 and FC80 upwards sharp ones. Philips' UA, UB and UC are brain kernels,
    A, B and C smooth ones, D, E, L and the Y kernels sharp.
    """
    kernel = header.convolution_kernel.split("\\")[0].strip().upper()
    if _SHARP_NAMES.search(kernel) or _SHARP_NAMES.search(header.series_description.upper()):
        return "sharp"
    if re.match(r"SOFT|STAND|STD|BRAIN|SMOOTH", kernel):
        return "soft"
    if number := re.fullmatch(r"FC(\d\d)", kernel):
        n = int(number[1])
        if 30 <= n <= 39 or 50 <= n <= 59 or n >= 80:
            return "sharp"
        return "soft" if n < 30 or 64 <= n <= 69 else "unknown"
    if number := re.fullmatch(r"[A-Z]{1,2}(\d\d)[A-Z]?", kernel):
        return "soft" if int(number[1]) < 50 else "sharp"
    if header.manufacturer.upper().startswith("PHILIPS"):
        if kernel in ("UA", "UB", "UC", "A", "B", "C"):
            return "soft"
        if kernel in ("D", "E", "L") or re.fullmatch(r"Y[A-Z]", kernel):
            return "sharp"
    return "unknown"


def select(series: Sequence[Series]) -> Selection:
    """Choose the axial, original head series with a soft-tissue kernel; thick before thin where both came."""
    candidates: dict[str, _Candidate] = {}
    reasons: dict[str, str] = {}
    for one in series:
        outcome = _candidate(one)
        if isinstance(outcome, str):
            reasons[one.series_instance_uid] = outcome
        else:
            candidates[one.series_instance_uid] = outcome
    best = min(candidates.values(), key=lambda c: (c.rank(), c.series.series_instance_uid), default=None)
    for uid, candidate in candidates.items():
        reasons[uid] = _why(candidate) if candidate is best else _why_not(candidate, best)
    return Selection(
        best.series if best else None,
        best.volume if best else None,
        tuple(
            considered(
                one,
                chosen=best is not None and one is best.series,
                reason=reasons[one.series_instance_uid],
                left_out=len(best.volume.duplicates) if best is not None and one is best.series else 0,
            )
            for one in series
        ),
    )


def unselected(package: Package, series: Sequence[Series], selection: Selection) -> Admission:
    """The gate's decision on a study of which no series can be analysed."""
    reasons = "; ".join(f"series {_number(one)}: {one.reason}" for one in selection.considered)
    rule = "an axial original head CT series"
    who = scanner(package, [one.first for one in series])
    return Admission((who, Criterion("series", "series of the study", reasons, rule, "violated", clause=BOX)))


def considered(series: Series, *, chosen: bool, reason: str, left_out: int = 0) -> Considered:
    """What is recorded of one series."""
    first, count = series.first, len(series.headers)
    return Considered(
        series.series_instance_uid, first.series_number, first.series_description, count, chosen, reason, left_out
    )


def _number(series: Considered) -> str:
    return str(series.series_number) if series.series_number is not None else "without number"


def _candidate(series: Series) -> _Candidate | str:
    """The series as a candidate, or the reason why it is none."""
    first = series.first
    if any(header.sop_class_uid not in CT_IMAGES for header in series.headers):
        return f"not CT images ({first.sop_class_uid})"
    if first.modality != "CT":
        return f"Modality is {first.modality or 'absent'}, not CT"
    kinds = {value.upper() for header in series.headers for value in header.image_type}
    if "LOCALIZER" in kinds:
        return "a localizer"
    if any(header.image_type[:1] != ("ORIGINAL",) for header in series.headers):
        image_type = "\\".join(first.image_type) or "absent"
        return f"not original images (ImageType {image_type})"
    if "SECONDARY" in kinds:
        return "secondary images"
    planes = [plane for header in series.headers for plane in planes_of(header)]
    if not planes:
        return "no image positions"
    if len(planes) < MINIMUM_SLICES:
        return f"only {len(planes)} slices"
    if len({(header.rows, header.columns) for header in series.headers}) > 1:
        return "images of different sizes"
    try:
        volume = assemble(planes)
    except GeometryError as error:
        return f"not one volume: {error.what}"
    off_axis = math.degrees(math.acos(min(1.0, abs(volume.normal[2]))))
    if off_axis > MAXIMUM_TILT_DEGREES:
        return f"not axial: {off_axis:.0f}° off"
    row, column = volume.planes[0].geometry.orientation[:3], volume.planes[0].geometry.orientation[3:]
    if abs(row[0]) < UPRIGHT or column[1] < UPRIGHT:
        # Models are trained on faces that look up; a mirrored head is the same to them, a turned one is not.
        return "the head is turned in the image (prone, or on its side)"
    if body_region(first) == "elsewhere":
        return "not of the head"
    kernel = kernel_class(first)
    if kernel == "sharp":
        return f"a sharp kernel ({first.convolution_kernel or first.series_description})"
    thicknesses = sorted(plane.geometry.thickness or 0.0 for plane in volume.planes)
    return _Candidate(series, volume, kernel, thicknesses[len(thicknesses) // 2])


def _why(candidate: _Candidate) -> str:
    return (
        f"axial, original, {candidate.kernel} kernel ({candidate.series.first.convolution_kernel or 'absent'}), "
        f"{len(candidate.volume.planes)} slices of {candidate.thickness:g} mm"
    )


def _why_not(candidate: _Candidate, best: _Candidate | None) -> str:
    assert best is not None
    names = (
        "it has contrast",
        "its kernel is unknown",
        "thin slices, and thick ones came too",
        "fewer slices",
    )
    for name, mine, its in zip(names, candidate.rank(), best.rank(), strict=False):
        if mine != its:
            return name
    return "the same kind of series with a lower number came too"
