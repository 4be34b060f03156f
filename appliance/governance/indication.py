"""The gate: whether a model package may see a study, criterion by criterion. What is unknown is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any, Literal

from appliance.governance.package import Package
from appliance.settings import IndicationException
from dicom_io.header import Header
from dicom_io.volume import Volume

Outcome = Literal["met", "violated", "unknown", "excepted"]

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
    def reason(self) -> str:
        """Why it is refused, in one line; '' when admitted."""
        return "; ".join(str(c) for c in self.criteria if c.outcome in ("violated", "unknown"))

    def to_json(self) -> list[dict[str, Any]]:
        """The criteria, JSON-ready."""
        return [asdict(criterion) for criterion in self.criteria]


def body_region(header: Header) -> Literal["head", "elsewhere", ""]:
    """The region that a header speaks of: the coded one first, then what people wrote; '' if none says.

    Body Part Examined is empty on many scanners and wrong on some, so a description that names another
    region ("CTA CAROTIDS" in a study called HEAD) outweighs one that names the head.
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


def admit(
    package: Package,
    header: Header,
    volume: Volume,
    slabs: int,
    exceptions: Sequence[IndicationException] = (),
    today: date | None = None,
) -> Admission:
    """Apply a package's indication to the selected series of a study.

    Args:
        header: the header that speaks for the series.
        volume: its geometry.
        slabs: how many slabs of the model's thickness it yields.
        exceptions: signed exceptions; each lets one unknown criterion of one package pass until its day.
        today: the day on which exceptions must hold; today if omitted.
    """
    label = package.indication
    age = age_in_years(header)
    thicknesses = [plane.geometry.thickness for plane in volume.planes]
    known = [value for value in thicknesses if value is not None]
    region = body_region(header)
    coverage = volume.offsets[-1] - volume.offsets[0] + (known[-1] if known else 0.0)
    low_kv, high_kv = label.kvp
    thin, thick = label.slice_thickness_mm
    contrast = bool(header.contrast_bolus_agent.strip()) and not re.fullmatch(
        r"(NO|NONE|WITHOUT|N)( .*)?", header.contrast_bolus_agent.strip().upper()
    )
    criteria = [
        _judge("modality", "Modality", header.modality, " or ".join(label.modality),
               header.modality in label.modality if header.modality else None),
        _judge("sop_class", "SOPClassUID", header.sop_class_uid, "a listed image class",
               header.sop_class_uid in label.sop_classes),
        _judge("body_part", "BodyPartExamined, SeriesDescription, ProtocolName, StudyDescription",
               " · ".join(filter(None, (header.body_part_examined, header.series_description,
                                        header.protocol_name, header.study_description))),
               " or ".join(label.body_parts),
               None if not region else region == "head" and bool(_HEAD_TERMS & set(label.body_parts))),
        _judge("age", "PatientAge, PatientBirthDate, StudyDate", "" if age is None else f"{age:.1f} years",
               f"{label.minimum_age_years:g} years or older",
               None if age is None else age >= label.minimum_age_years),
        _judge("kvp", "KVP", "" if header.kvp is None else f"{header.kvp:g} kV", f"{low_kv:g} to {high_kv:g} kV",
               None if header.kvp is None else low_kv <= header.kvp <= high_kv),
        _judge("slice_thickness", "SliceThickness",
               f"{min(known):g} to {max(known):g} mm" if known else "", f"{thin:g} to {thick:g} mm",
               None if len(known) < len(thicknesses) else thin <= min(known) <= max(known) <= thick),
        _judge("contrast", "ContrastBolusAgent", header.contrast_bolus_agent or "none",
               "with or without" if label.contrast else "no contrast agent", label.contrast or not contrast),
        _judge("coverage", "ImagePositionPatient", f"{coverage:.0f} mm", f"{label.minimum_coverage_mm:g} mm or more",
               coverage >= label.minimum_coverage_mm),
        _judge("slabs", "slabs", str(slabs), f"{label.minimum_slabs} or more", slabs >= label.minimum_slabs),
        _judge("gaps", "ImagePositionPatient",
               "none" if not volume.gaps else f"{len(volume.gaps)}, {sum(g.mm for g in volume.gaps):.1f} mm in all",
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
