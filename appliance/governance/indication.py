"""The gate: whether a model package may see a study, criterion by criterion. What is unknown is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any, Literal

from appliance.governance.package import Package
from appliance.settings import IndicationException
from dicom_io.header import Header
from dicom_io.volume import Volume

Outcome = Literal["met", "violated", "unknown", "excepted"]

CRITERIA = (
    "modality", "sop_class", "body_part", "age", "kvp", "slice_thickness", "contrast", "patient", "geometry",
    "coverage", "slabs", "gaps", "brain",
)  # fmt: skip
"""The names of the criteria, in the order in which they are shown; exceptions refer to them."""

_GROWING = {"coverage", "slabs", "gaps"}
"""Criteria that a series which is still arriving can yet come to meet."""

_HEAD = re.compile(r"\b(HEAD|BRAIN|SKULL|CRANI\w*|CEREBR\w*|NEURO\w*|SCHAEDEL|SCHÄDEL|KOPF|CRANE|CRÂNE|TETE|TÊTE)\b")
_HEAD_TERMS = {"HEAD", "BRAIN", "SKULL"}
"""The Body Part Examined terms (PS3.16 Annex L) by which a label names the head."""
_ELSEWHERE = re.compile(
    r"\b(NECK|SPINE|C-?SPINE|CHEST|THORAX|LUNG|ABDOMEN|PELVIS|SINUS\w*|ORBITS?|TEMPORAL|FACE|FACIAL|MAXILLO\w*"
    r"|EXTREMITY|KNEE|HIP|SHOULDER|CAROTID\w*|ANGIO\w*|CTA|PERFUSION|CTP)\b"
)
_AGE = re.compile(r"(\d{3})([DWMY])")
_DAYS = {"D": 1.0, "W": 7.0, "M": 30.4375, "Y": 365.25}


@dataclass(frozen=True, slots=True)
class Criterion:
    """One line of a label, applied to one study.

    Attributes:
        criterion: its name; an exception in the settings refers to it.
        attribute: DICOM keywords that were read, or what was measured.
        value: what was read, as text.
        rule: what the label asks for.
        outcome: unknown counts as refused; excepted is unknown under a signed exception.
    """

    criterion: str
    attribute: str
    value: str
    rule: str
    outcome: Outcome
    note: str = ""

    def __str__(self) -> str:
        said = self.value or "absent"
        return f"{self.criterion}: {self.attribute} is {said}, the label asks for {self.rule}"


@dataclass(frozen=True, slots=True)
class Admission:
    """The gate's decision on one (study, package)."""

    criteria: tuple[Criterion, ...]

    @property
    def admitted(self) -> bool:
        """True only if every criterion is met or excepted, and there is at least one."""
        return bool(self.criteria) and all(c.outcome in ("met", "excepted") for c in self.criteria)

    @property
    def promising(self) -> bool:
        """Whether the model may see what has arrived: all is met that does not need further slices to be met."""
        return bool(self.criteria) and all(
            c.outcome in ("met", "excepted") or c.criterion in _GROWING for c in self.criteria
        )

    @property
    def reason(self) -> str:
        """Why it is refused, in one line; '' when admitted."""
        return "; ".join(str(c) for c in self.criteria if c.outcome in ("violated", "unknown"))

    def to_json(self) -> list[dict[str, Any]]:
        """The criteria, JSON-ready."""
        return [asdict(criterion) for criterion in self.criteria]


def body_region(header: Header) -> Literal["head", "elsewhere", ""]:
    """The region that a header speaks of, the most particular text first; '' if none says.

    Body Part Examined is empty on many scanners and wrong on some, so the description of the series comes before it
    ("CTA CAROTIDS" in a study called HEAD), and of one text another region outweighs the head ("HEAD AND NECK").
    """
    texts = (
        header.series_description,
        header.protocol_name,
        header.body_part_examined,
        header.study_description,
    )
    for text in texts:
        words = re.sub(r"[_/.,;^]", " ", text.upper())
        if _ELSEWHERE.search(words):
            return "elsewhere"
        if _HEAD.search(words):
            return "head"
    return ""


def age_in_years(header: Header) -> float | None:
    """The patient's age at the study: PatientAge (PS3.5 6.2, VR AS), else from the birth and study dates.

    None if neither is readable, or if both are and differ by more than a year: then nobody knows which is right.
    """
    stated = _AGE.fullmatch(header.patient_age.strip())
    years = int(stated[1]) * _DAYS[stated[2]] / _DAYS["Y"] if stated else None
    try:
        born = date.fromisoformat(header.patient_birth_date.strip())
        studied = date.fromisoformat(header.study_date.strip())
    except ValueError:
        return years
    computed = (studied - born).days / _DAYS["Y"]
    if computed < 0 or (years is not None and abs(years - computed) > 1.0 + 1 / 12):
        return None
    return computed if years is None else years


def has_contrast(header: Header) -> bool:
    """Whether the header speaks of a contrast agent; "NONE" and the like do not."""
    agent = header.contrast_bolus_agent.strip().upper()
    return bool(agent) and not re.fullmatch(r"(NO|NONE|WITHOUT|N)( .*)?", agent)


def admit(
    package: Package,
    headers: Sequence[Header],
    volume: Volume,
    slabs: int,
    exceptions: Sequence[IndicationException] = (),
    today: date | None = None,
) -> Admission:
    """Apply a package's indication to the selected series of a study.

    A criterion is met only if every image meets it: one slice of a child, or of another patient, refuses them all.

    Args:
        headers: of every image of the series.
        volume: its geometry.
        slabs: how many slabs of the model's thickness it yields.
        exceptions: signed exceptions; each lets one unknown criterion of one package pass until its day.
        today: the day on which exceptions must hold; today if omitted.
    """
    label = package.indication
    low_kv, high_kv = label.kvp
    thin, thick = label.slice_thickness_mm
    last = volume.planes[-1].geometry.thickness or 0.0
    coverage = volume.offsets[-1] - volume.offsets[0] + last
    patients = len({header.patient for header in headers})
    placed = sum(bool(header.frames) for header in headers)

    def every(
        criterion: str, attribute: str, rule: str, read: Callable[[Header], tuple[str, bool | None]]
    ) -> Criterion:
        answers = dict.fromkeys(read(header) for header in headers)
        verdicts = {met for _, met in answers}
        met = False if False in verdicts else None if None in verdicts or not verdicts else True
        shown = [text for text, one in answers if one is met] or [text for text, _ in answers]
        return _judge(criterion, attribute, " / ".join(shown[:3]), rule, met)

    def body_part(header: Header) -> tuple[str, bool | None]:
        texts = (header.body_part_examined, header.series_description, header.protocol_name, header.study_description)
        region = body_region(header)
        met = None if not region else region == "head" and bool(_HEAD_TERMS & set(label.body_parts))
        return " · ".join(filter(None, texts)), met

    def age(header: Header) -> tuple[str, bool | None]:
        years = age_in_years(header)
        return ("", None) if years is None else (f"{years:.1f} years", years >= label.minimum_age_years)

    def kvp(header: Header) -> tuple[str, bool | None]:
        return ("", None) if header.kvp is None else (f"{header.kvp:g} kV", low_kv <= header.kvp <= high_kv)

    def thickness(header: Header) -> tuple[str, bool | None]:
        known = [plane.thickness for plane in header.frames if plane.thickness is not None]
        if not known or len(known) < len(header.frames):
            return "", None
        text = f"{min(known):g} mm" if min(known) == max(known) else f"{min(known):g} to {max(known):g} mm"
        return text, thin <= min(known) <= max(known) <= thick

    missing = sum(gap.mm for gap in volume.gaps)
    criteria = [
        every("modality", "Modality", " or ".join(label.modality),
              lambda h: (h.modality, h.modality in label.modality if h.modality else None)),
        every("sop_class", "SOPClassUID", "a listed image class",
              lambda h: (h.sop_class_uid, h.sop_class_uid in label.sop_classes)),
        every("body_part", "BodyPartExamined, SeriesDescription, ProtocolName, StudyDescription",
              " or ".join(label.body_parts), body_part),
        every("age", "PatientAge, PatientBirthDate, StudyDate", f"{label.minimum_age_years:g} years or older", age),
        every("kvp", "KVP", f"{low_kv:g} to {high_kv:g} kV", kvp),
        every("slice_thickness", "SliceThickness", f"{thin:g} to {thick:g} mm", thickness),
        every("contrast", "ContrastBolusAgent", "with or without" if label.contrast else "no contrast agent",
              lambda h: (h.contrast_bolus_agent or "none", label.contrast or not has_contrast(h))),
        _judge("patient", "PatientID, IssuerOfPatientID, PatientName, PatientBirthDate",
               "the same in every image" if patients == 1 else f"{patients} different", "one patient", patients == 1),
        _judge("geometry", "ImagePositionPatient, ImageOrientationPatient, PixelSpacing",
               f"readable in {placed} of {len(headers)} images", "readable in every image",
               True if placed == len(headers) else None),
        _judge("coverage", "ImagePositionPatient", f"{coverage:.0f} mm", f"{label.minimum_coverage_mm:g} mm or more",
               coverage >= label.minimum_coverage_mm),
        _judge("slabs", "slabs", str(slabs), f"{label.minimum_slabs} or more", slabs >= label.minimum_slabs),
        _judge("gaps", "ImagePositionPatient",
               "none" if not volume.gaps else f"{len(volume.gaps)}, {missing:.1f} mm in all",
               "no gap between slices", not volume.gaps),
    ]  # fmt: skip
    return Admission(tuple(_except(package, c, exceptions, today or date.today()) for c in criteria))


def admit_pixels(package: Package, admission: Admission, brain_volume_ml: float) -> Admission:
    """The same admission with what only the pixels show: that there is a brain in the picture."""
    least = package.indication.minimum_brain_ml
    criterion = _judge("brain", "soft tissue inside the skull", f"{brain_volume_ml:.0f} mL", f"{least:g} mL or more",
                       brain_volume_ml >= least)  # fmt: skip
    return Admission((*admission.criteria, criterion))


def _judge(criterion: str, attribute: str, value: str, rule: str, met: bool | None) -> Criterion:
    outcome: Outcome = "unknown" if met is None else "met" if met else "violated"
    return Criterion(criterion, attribute, value, rule, outcome)


def _except(
    package: Package, criterion: Criterion, exceptions: Sequence[IndicationException], today: date
) -> Criterion:
    if criterion.outcome != "unknown":
        return criterion
    for one in exceptions:
        if (one.package, one.criterion) == (package.name, criterion.criterion) and today <= one.until:
            note = f"excepted by {one.signed_by} until {one.until}: {one.reason}"
            return Criterion(
                criterion.criterion, criterion.attribute, criterion.value, criterion.rule, "excepted", note
            )
    return criterion
