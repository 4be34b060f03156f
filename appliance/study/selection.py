"""Which series of a study is analysed, and why each of the others is not."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage

from appliance.governance.indication import (
    BOX,
    PICTURE,
    Admission,
    Criterion,
    acquired_after,
    body_region,
    first_with_agent,
    has_contrast,
    scanner,
    shown_twice,
)
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

NEARLY = 0.9
"""A series that covers this part of what the longest of its kind covers is as good as that: the head was scanned again
with a slice or two more or fewer."""

_SHARP_NAMES = re.compile(r"BONE|EDGE|LUNG|ULTRA|SHARP|DETAIL|KNOCHEN")


@dataclass(frozen=True, slots=True)
class Considered:
    """One series of the study and what was decided on it.

    Attributes:
        left_out: its slices that lie in the place of another one.
        alike: it may show another state of the head than the chosen one, or a better picture of it: a scan that was
            repeated. An answer that is silent on it must not stand.
    """

    series_instance_uid: str
    series_number: int | None
    description: str
    instances: int
    chosen: bool
    reason: str
    left_out: int = 0
    alike: bool = False


@dataclass(frozen=True, slots=True)
class Selection:
    """The decision: the chosen series with its geometry, or None; and every series with its reason.

    Attributes:
        others: whether another one could take the chosen one's place: of the same contrast, region and kernel.
    """

    series: Series | None
    volume: Volume | None
    considered: tuple[Considered, ...]
    others: bool = False

    def to_json(self) -> list[dict[str, Any]]:
        """What was considered, JSON-ready."""
        return [asdict(one) for one in self.considered]


@dataclass(frozen=True, slots=True)
class _Candidate:
    series: Series
    volume: Volume
    kernel: Literal["soft", "unknown"]
    thickness: float
    after_agent: bool

    @property
    def cover(self) -> float:
        """From its first slice to its last, in mm."""
        return self.volume.offsets[-1] - self.volume.offsets[0]

    @property
    def kind(self) -> tuple[bool, bool, bool, bool]:
        """Smaller is better: without contrast, its own or an earlier scan's, of the head by its own word, a known soft
        kernel, thick."""
        first = self.series.first
        contrast = has_contrast(first) or self.after_agent
        return contrast, body_region(first) != "head", self.kernel != "soft", self.thickness < THICK_MM

    @property
    def acquisitions(self) -> set[int]:
        """The acquisition numbers of its images, as far as they have one."""
        return {one.acquisition_number for one in self.series.headers if one.acquisition_number is not None}

    @property
    def acquired(self) -> int:
        """When the last of its images was, as YYYYMMDDHHMMSS; 0 if one does not say, or if that was in the hour that
        clocks show twice in autumn: what was later there, its time does not tell."""
        said = [one.acquired for one in self.series.headers]
        return int(max(said)) if all(said) and not shown_twice(max(said)) else 0

    def rank(
        self, longest: float, alerted: str, timed: bool
    ) -> tuple[bool, bool, bool, bool, bool, bool, bool, float, int, int]:
        """Smaller is better: without contrast, of the head by its own word, a known soft kernel, the one that an alert
        rests on, thick; then what covers the head, is whole, has its slices close together, and was made last: by the
        time of acquisition, and at the same time or without it by the series' number.

        Args:
            longest: what the longest series of its kind covers, in mm.
            alerted: the series that an alert rests on; "" if there is none.
            timed: whether the time of acquisition is known of all of its kind.
        """
        contrast, region, kernel, thin = self.kind
        volume = self.volume
        return (
            contrast,
            region,
            kernel,
            self.series.series_instance_uid != alerted,
            thin,
            self.cover < NEARLY * longest,
            bool(volume.gaps or volume.duplicates),
            round(self.cover / (len(volume.planes) - 1), 1) if len(volume.planes) > 1 and not thin else 0.0,
            -self.acquired if timed else 0,
            -(self.series.first.series_number or 0),
        )

    def repeats(self, best: _Candidate) -> bool:
        """Whether it is no other reconstruction of what the best one shows, for all that is known."""
        if self.kind == best.kind:
            return True
        other = self.acquisitions and best.acquisitions and not self.acquisitions & best.acquisitions
        return self.kind[:-1] == best.kind[:-1] and bool(other)


class _Unreadable(str):
    """The reason why images of the head, of a kind that could be read, are no series to analyse."""


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


def select(series: Sequence[Series], alerted: str = "", refused: Mapping[str, str] | None = None) -> Selection:
    """Choose the axial, original head series with a soft-tissue kernel; thick before thin where both came.

    Of two alike the later is chosen: the head was scanned again because the first scan was bad, or because the patient
    got worse. But what an alert rests on keeps its place: a later scan must not overturn it.

    Args:
        alerted: the series that the hospital was alerted of.
        refused: the series that may not be read, and why.
    """
    candidates: dict[str, _Candidate] = {}
    reasons: dict[str, str] = {}
    agent = first_with_agent(header for one in series for header in one.headers)
    for one in series:
        why = (refused or {}).get(one.series_instance_uid)
        outcome = _Unreadable(why) if why else _candidate(one, agent)
        if isinstance(outcome, str):
            reasons[one.series_instance_uid] = outcome
        else:
            candidates[one.series_instance_uid] = outcome
    longest: dict[tuple[bool, bool, bool, bool], float] = {}
    for candidate in candidates.values():
        longest[candidate.kind] = max(candidate.cover, longest.get(candidate.kind, 0.0))
    untimed = {candidate.kind for candidate in candidates.values() if not candidate.acquired}
    ranks = {
        uid: candidate.rank(longest[candidate.kind], alerted, candidate.kind not in untimed)
        for uid, candidate in candidates.items()
    }
    chosen = min(candidates, key=lambda uid: (ranks[uid], uid), default="")
    best = candidates.get(chosen)
    alike = {uid for uid, reason in reasons.items() if isinstance(reason, _Unreadable)}
    for uid, candidate in candidates.items():
        assert best is not None
        reasons[uid] = _why(candidate) if candidate is best else _why_not(ranks[uid], ranks[chosen])
        if candidate is not best and candidate.repeats(best):
            alike.add(uid)
    return Selection(
        best.series if best else None,
        best.volume if best else None,
        tuple(
            considered(
                one,
                chosen=best is not None and one is best.series,
                reason=reasons[one.series_instance_uid],
                left_out=len(best.volume.duplicates) if best is not None and one is best.series else 0,
                alike=one.series_instance_uid in alike,
            )
            for one in series
        ),
        best is not None and any(one is not best and one.kind[:3] == best.kind[:3] for one in candidates.values()),
    )


def first_admitted(
    choose: Callable[[Mapping[str, str]], Selection], judge: Callable[[Selection], Admission], alerted: str = ""
) -> tuple[Selection, Admission]:
    """The series to read and what is decided on it: the first that is admitted; if none is, the first.

    A head that was scanned twice is not left unread because the scan that would be read was made as the label does
    not allow. For any other reason, whose head it is above all, the whole study is refused. The series that an alert
    rests on is not passed over for another, which could not disprove it.

    Args:
        choose: what is selected where these series may not be read, for these reasons.
        judge: the decision on what was selected.
        alerted: the series that the hospital was alerted of.
    """
    refused: dict[str, str] = {}
    found: list[tuple[Selection, Admission]] = []
    while True:
        selection = choose(refused)
        admission = judge(selection)
        found.append((selection, admission))
        series = selection.series
        if admission.admitted:
            return selection, admission
        other = any(not one.met and one.criterion not in PICTURE for one in admission.criteria)
        if other or series is None or not selection.others or series.series_instance_uid == alerted:
            return found[0]
        refused[series.series_instance_uid] = f"it may not be read: {admission.reason}"


def only_of(selection: Selection, alerted: str) -> Selection:
    """The same, or nothing chosen where it is not the series that an alert rests on, though that is there.

    Its images make no volume any more, as where the head was scanned again into the same series. Another series could
    not disprove the alert.
    """
    if selection.series is None or selection.series.series_instance_uid == alerted:
        return selection
    if alerted not in {one.series_instance_uid for one in selection.considered}:
        return selection
    why = "an alert rests on another series, which can be read no longer"
    considered = (
        replace(one, chosen=False, reason=why, left_out=0, alike=True) if one.chosen else one
        for one in selection.considered
    )
    return Selection(None, None, tuple(considered))


def unselected(package: Package, series: Sequence[Series], selection: Selection) -> Admission:
    """The gate's decision on a study of which no series can be analysed."""
    reasons = "; ".join(f"series {_number(one)}: {one.reason}" for one in selection.considered)
    rule = "an axial original head CT series"
    who = scanner(package, [one.first for one in series])
    return Admission((who, Criterion("series", "series of the study", reasons, rule, "violated", clause=BOX)))


def considered(series: Series, *, chosen: bool, reason: str, left_out: int = 0, alike: bool = False) -> Considered:
    """What is recorded of one series."""
    first, count = series.first, len(series.headers)
    return Considered(
        series.series_instance_uid,
        first.series_number,
        first.series_description,
        count,
        chosen,
        str(reason),
        left_out,
        alike,
    )


def not_analysed(selection: Sequence[Mapping[str, Any]], *, alike: bool = False) -> list[str]:
    """What a verdict says of each series that it does not rest on.

    Args:
        selection: as `Selection.to_json` has it.
        alike: only of those on which no verdict may be silent.
    """
    return [
        f"Series {one['series_number'] if one['series_number'] is not None else 'without number'} "
        f"was not analysed: {one['reason']}."
        for one in selection
        if not one["chosen"] and (one.get("alike") or not alike)
    ]


def _number(series: Considered) -> str:
    return str(series.series_number) if series.series_number is not None else "without number"


def _candidate(series: Series, agent: Header | None) -> _Candidate | str:
    """The series as a candidate, or the reason why it is none.

    Args:
        agent: the study's first image with a contrast agent.
    """
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
    if body_region(first) == "elsewhere":
        return "not of the head"
    kernel = kernel_class(first)
    if kernel == "sharp":
        return f"a sharp kernel ({first.convolution_kernel or 'by its description'})"
    late = acquired_after(series.headers, agent)
    unreadable = str if has_contrast(first) or late else _Unreadable  # it would not have been read anyway
    if len({(header.rows, header.columns) for header in series.headers}) > 1:
        return unreadable("images of different sizes")
    # PS3.3 C.7.4.1: positions of two frames of reference have nothing to do with each other; a series has one.
    if len(frames := {uid for header in series.headers if (uid := header.frame_of_reference_uid)}) > 1:
        return unreadable(f"images in {len(frames)} frames of reference")
    try:
        volume = assemble(planes)
    except GeometryError as error:
        return unreadable(f"not one volume: {error.what}")
    off_axis = math.degrees(math.acos(min(1.0, abs(volume.normal[2]))))
    if off_axis > MAXIMUM_TILT_DEGREES:
        return f"not axial: {off_axis:.0f}° off"
    row, column = volume.planes[0].geometry.orientation[:3], volume.planes[0].geometry.orientation[3:]
    if abs(row[0]) < UPRIGHT or column[1] < UPRIGHT:
        # Models are trained on faces that look up; a mirrored head is the same to them, a turned one is not.
        return unreadable("the head is turned in the image (prone, or on its side)")
    thicknesses = sorted(plane.geometry.thickness or 0.0 for plane in volume.planes)
    return _Candidate(series, volume, kernel, thicknesses[len(thicknesses) // 2], late)


def _why(candidate: _Candidate) -> str:
    return (
        f"axial, original, {candidate.kernel} kernel ({candidate.series.first.convolution_kernel or 'absent'}), "
        f"{len(candidate.volume.planes)} slices of {candidate.thickness:g} mm"
    )


def _why_not(mine: Sequence[float], best: Sequence[float]) -> str:
    names = (
        "it has contrast, or was acquired after a series that has",
        "nothing says that it is of the head",
        "its kernel is unknown",
        "the alert rests on another series",
        "thin slices, and thick ones came too",
        "it covers less of the head",
        "slices of it are missing or came twice",
        "its slices are farther apart",
    )
    for name, own, its in zip(names, mine, best, strict=False):
        if own != its:
            return name
    return "a later series of the same kind came too"
