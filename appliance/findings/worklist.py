"""What a verdict says on a worklist: one line for the reading's comments, and the item to make where there is none."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from pydicom.dataset import Dataset

from appliance.findings.alert import accession_of, value_of
from appliance.findings.notice import Notice
from appliance.ledger.records import ANOTHER_PATIENT
from dicom_io.workitem import Step, code, put

LINE = 1000
"""Longest line that is put among an item's comments."""
ACCESSION = 16
"""Longest accession number, an SH (PS3.5 6.2). Cut off it would name another order."""


def mark_text(notice: Notice, late_seconds: float | None) -> str:
    """What the verdict says, in one line.

    Args:
        late_seconds: of a verdict past its budget, how long after the last image it was issued.
    """
    late = f" LATE: {late_seconds:.0f} s after the last image." if late_seconds is not None else ""
    said = f"{notice.headline}.{late} {' '.join(notice.sentences)}"
    return " ".join(said.split())[:LINE]


def render_mark(notice: Notice, header: Dataset, mode: str, item_uid: str, late_seconds: float | None) -> bytes:
    """The change of the worklist, as a JSON object in UTF-8.

    Args:
        header: of an image of the study; patient and order are its.
        mode: reprioritise or suggest, by the settings. A package that is not in clinical mode never moves anybody.
        item_uid: SOP Instance UID of the item that is made where the study has none.
    """
    said: dict[str, Any] = {
        "uid": notice.id,
        "kind": notice.kind,
        "study_instance_uid": notice.verdict.study_instance_uid,
        "package": notice.verdict.package,
        "mode": "suggest" if notice.is_test else mode,
        "standing": notice.verdict.positive,
        "moved": notice.verdict.withdrawn == ANOTHER_PATIENT,
        "text": mark_text(notice, late_seconds),
        "step": reading_step(header, notice.verdict.study_instance_uid, item_uid, notice.issued_at),
    }
    return json.dumps(said, ensure_ascii=False).encode("utf-8")


def reading_step(header: Dataset, study_instance_uid: str, item_uid: str, at: datetime) -> Step:
    """A work item "read this study" (PS3.4 Table CC.2.5-3) in the DICOM JSON model."""
    step: Step = {}
    put(step, "SOPInstanceUID", "UI", item_uid)
    put(step, "ProcedureStepState", "CS", "SCHEDULED")
    put(step, "ScheduledProcedureStepPriority", "CS", "MEDIUM")
    description = _text(header, "StudyDescription")
    put(step, "ProcedureStepLabel", "LO", f"Read {description or 'CT head'}"[:64])
    put(step, "ScheduledProcedureStepStartDateTime", "DT", at.strftime("%Y%m%d%H%M%S.%f%z"))
    put(step, "InputReadinessState", "CS", "READY")
    put(step, "ScheduledWorkitemCodeSequence", "SQ", code("110005", "DCM", "Interpretation"))
    put(step, "StudyInstanceUID", "UI", study_instance_uid)
    birth, sex = (_text(header, keyword) for keyword in ("PatientBirthDate", "PatientSex"))
    put(step, "PatientName", "PN", *_name(_text(header, "PatientName", 3 * 64 + 2)))
    put(step, "PatientID", "LO", *_given(_text(header, "PatientID")))
    put(step, "IssuerOfPatientID", "LO", *_given(_text(header, "IssuerOfPatientID")))
    put(step, "PatientBirthDate", "DA", *_given(birth if len(birth) == 8 and birth.isdecimal() else ""))
    put(step, "PatientSex", "CS", *_given(sex if sex in ("F", "M", "O") else ""))
    request: Step = {}
    put(request, "StudyInstanceUID", "UI", study_instance_uid)
    accession = _accession(header)
    fits = len(accession) <= ACCESSION
    put(request, "AccessionNumber", "SH", *_given(accession if fits else ""))
    if not fits:
        put(step, "CommentsOnTheScheduledProcedureStep", "LT", f"The accession number is too long here: {accession}")
    put(request, "IssuerOfAccessionNumberSequence", "SQ")
    put(request, "RequestedProcedureID", "SH")
    put(request, "RequestedProcedureDescription", "LO", *_given(description))
    put(request, "RequestedProcedureCodeSequence", "SQ")
    put(request, "PlacerOrderNumberImagingServiceRequest", "LO")
    put(request, "FillerOrderNumberImagingServiceRequest", "LO")
    put(step, "ReferencedRequestSequence", "SQ", request)
    return step


def _name(value: str) -> list[dict[str, str]]:
    """A person's name with those of its three groups that are there (PS3.18 F.2.2)."""
    groups = zip(("Alphabetic", "Ideographic", "Phonetic"), value.split("="), strict=False)
    found = {group: one.strip()[:64] for group, one in groups if one.strip()}
    return [found] if found else []


def _accession(header: Dataset) -> str:
    """The accession number, that of the request where the study has none, as it is in an alert."""
    try:
        value = accession_of(header)
    except Exception:  # an image's header may hold anything
        return ""
    return _printable(value)[:64]


def _text(header: Dataset, keyword: str, longest: int = 64) -> str:
    """A value as printable text of at most so many characters; '' if there is none that can be told."""
    try:
        value = value_of(header, keyword)
    except Exception:  # an image's header may hold anything; the item is made without it
        return ""
    return _printable(value)[:longest]


def _printable(value: str) -> str:
    return "".join(one if one.isprintable() and one != "\\" else " " for one in value).strip()


def _given(value: str) -> tuple[str, ...]:
    return (value,) if value else ()
