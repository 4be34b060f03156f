"""Work items for tests, in the DICOM JSON model."""

from __future__ import annotations

from typing import Any

from dicom_io.workitem import Step, code, put

READING = frozenset({"110005^DCM"})


def workitem(study: str = "1.2.3", priority: str = "MEDIUM", **changes: Any) -> Step:
    """What an N-CREATE of a reading brings; a change of value None leaves the attribute away."""
    step: Step = {}
    put(step, "ProcedureStepState", "CS", "SCHEDULED")
    put(step, "ScheduledProcedureStepPriority", "CS", priority)
    put(step, "ProcedureStepLabel", "LO", "Read CT head")
    put(step, "WorklistLabel", "LO", "NEURO")
    put(step, "ScheduledProcedureStepStartDateTime", "DT", "20261129120000")
    put(step, "InputReadinessState", "CS", "READY")
    put(step, "ScheduledWorkitemCodeSequence", "SQ", code("110005", "DCM", "Interpretation"))
    put(step, "PatientName", "PN", {"Alphabetic": "Müller^Eva"})
    put(step, "PatientID", "LO", "P-1")
    request: Step = {}
    put(request, "StudyInstanceUID", "UI", study)
    put(request, "AccessionNumber", "SH", "A-1")
    put(step, "ReferencedRequestSequence", "SQ", request)
    for keyword in (
        "ScheduledProcessingParametersSequence", "ScheduledStationNameCodeSequence", "InputInformationSequence",
        "ScheduledStationClassCodeSequence", "ScheduledStationGeographicLocationCodeSequence",
    ):  # fmt: skip
        put(step, keyword, "SQ")
    for keyword, vr in (
        ("CommentsOnTheScheduledProcedureStep", "LT"), ("IssuerOfPatientID", "LO"), ("PatientBirthDate", "DA"),
        ("PatientSex", "CS"), ("AdmissionID", "LO"), ("AdmittingDiagnosesDescription", "LO"),
    ):  # fmt: skip
        put(step, keyword, vr)
    for keyword, value in changes.items():
        put(step, keyword, "SQ" if keyword.endswith("Sequence") else "LO", *([] if value is None else [value]))
    return step


def performed() -> Step:
    """What whoever performed a step writes before it is COMPLETED."""
    done: Step = {}
    put(done, "PerformedStationNameCodeSequence", "SQ", code("ST1", "99SITE", "Station 1"))
    put(done, "PerformedProcedureStepStartDateTime", "DT", "20261129120100")
    put(done, "PerformedProcedureStepEndDateTime", "DT", "20261129120200")
    put(done, "PerformedWorkitemCodeSequence", "SQ", code("110005", "DCM", "Interpretation"))
    put(done, "OutputInformationSequence", "SQ")
    changes: Step = {}
    put(changes, "UnifiedProcedureStepPerformedProcedureSequence", "SQ", done)
    return changes


def abandoned() -> Step:
    """What whoever gives a step up writes before it is CANCELED."""
    said: Step = {}
    put(said, "ProcedureStepCancellationDateTime", "DT", "20261129120200")
    put(said, "ReasonForCancellation", "LT", "no time")
    changes: Step = {}
    put(changes, "ProcedureStepProgressInformationSequence", "SQ", said)
    return changes
