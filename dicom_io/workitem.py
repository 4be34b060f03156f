"""Unified Procedure Steps (PS3.4 Annex CC): states and locks, what a step must hold, and how it is read and written.

A step is a dictionary in the DICOM JSON model (PS3.18 Annex F), in UTF-8: "00741000" → {"vr": "CS", "Value": [...]}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from dicom_io.errors import ScansideError

Step = dict[str, Any]
"""A step, or part of one, in the DICOM JSON model."""

PUSH, WATCH, PULL, EVENT, QUERY = (f"1.2.840.10008.5.1.4.34.6.{number}" for number in range(1, 6))
"""UIDs of the SOP classes; every step is an instance of `PUSH` (PS3.4 CC.3.1)."""
GLOBAL, FILTERED = "1.2.840.10008.5.1.4.34.5", "1.2.840.10008.5.1.4.34.5.1"
"""Well-known UIDs of the subscription to all steps, and to those that match (PS3.4 CC.2.3)."""

SCHEDULED, IN_PROGRESS, COMPLETED, CANCELED = "SCHEDULED", "IN PROGRESS", "COMPLETED", "CANCELED"
FINAL = (COMPLETED, CANCELED)
PRIORITIES = ("LOW", "MEDIUM", "HIGH")
"""Values of Scheduled Procedure Step Priority (0074,1200), the least urgent first."""
READINESS = ("INCOMPLETE", "UNAVAILABLE", "READY")

CHANGE_STATE, REQUEST_CANCEL, SUBSCRIBE, UNSUBSCRIBE, SUSPEND = range(1, 6)
"""Action Type IDs (PS3.4 CC.2.1 to CC.2.3)."""
STATE_REPORT, CANCEL_REQUESTED, PROGRESS_REPORT, SCP_STATUS, ASSIGNED = range(1, 6)
"""Event Type IDs (PS3.4 Table CC.2.4-1)."""

MEANINGS: Final = {
    0x0000: "Success",
    0x0106: "a value is invalid",
    0x0110: "it could not be written down",
    0x0111: "a work item with this UID is there already",
    0x0115: "an argument is invalid",
    0x0120: "an attribute is missing",
    0x0121: "a value is missing",
    0x0123: "there is no such action",
    0x0213: "there are too many work items",
    0xB300: "The Workitem was created with modifications.",
    0xB304: "The UPS is already in the requested state of CANCELED.",
    0xB306: "The UPS is already in the requested state of COMPLETED.",
    0xC300: "the work item may no longer be updated",
    0xC301: "the Transaction UID is missing or incorrect",
    0xC302: "the work item is already IN PROGRESS",
    0xC303: "a work item becomes SCHEDULED only by its creation",
    0xC304: "the work item lacks what a final state requires",
    0xC307: "there is no such work item",
    0xC308: "this receiving AE title is unknown here",
    0xC309: "the state of a new work item is not SCHEDULED",
    0xC310: "the work item is not yet IN PROGRESS",
    0xC311: "the work item is already COMPLETED",
    0xC312: "nobody listens who could cancel it",
    0xC314: "the action does not fit what it is asked of",
}
"""DIMSE status → what it means (PS3.4 CC.2, PS3.7 Annex C)."""

_COLUMNS = ("", SCHEDULED, IN_PROGRESS, COMPLETED, CANCELED)
_ROWS: Final[dict[str, tuple[str | int, ...]]] = {
    "create": (SCHEDULED, 0x0111, 0x0111, 0x0111, 0x0111),
    "claim": (0xC307, IN_PROGRESS, 0xC302, 0xC300, 0xC300),
    "claim without lock": (0xC307, 0xC301, 0xC301, 0xC301, 0xC301),
    "schedule": (0xC307, 0xC303, 0xC303, 0xC303, 0xC303),
    "complete": (0xC307, 0xC310, COMPLETED, 0xB306, 0xC300),
    "complete without lock": (0xC307, 0xC301, 0xC301, 0xC301, 0xC301),
    "request cancel": (0xC307, CANCELED, IN_PROGRESS, 0xC311, 0xB304),
    "cancel": (0xC307, 0xC310, CANCELED, 0xC300, 0xB304),
    "cancel without lock": (0xC307, 0xC301, 0xC301, 0xC301, 0xC301),
    # PS3.4 CC.2.6.3: while it is scheduled nobody holds the lock.
    "update": (0xC307, SCHEDULED, IN_PROGRESS, 0xC300, 0xC300),
    "update without lock": (0xC307, SCHEDULED, 0xC301, 0xC300, 0xC300),
}
TRANSITIONS: Final[Mapping[tuple[str, str], str | int]] = {
    (state, event): cell for event, cells in _ROWS.items() for state, cell in zip(_COLUMNS, cells, strict=True)
}
"""(state, event) → the state that follows, or the status that is answered (PS3.4 Table CC.1.1-2; CC.2.6 for N-SET)."""

MAXIMUM_BYTES = 1 << 20
"""A longer data set is refused; a work item has a few kilobytes."""
MAXIMUM_DEPTH = 8
"""Sequences within sequences; more are refused."""
_UID = re.compile(r"(?=.{1,64}$)(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*))+")
_TAG = re.compile(r"[0-9A-F]{8}")
_DATE_TIME = re.compile(r"\d{4}(\d{2}){0,5}(\.\d{1,6})?([+-]\d{4})?")


class WorkitemError(ScansideError):
    """A request that cannot be taken.

    Attributes:
        status: the DIMSE status to answer with.
    """

    def __init__(self, status: int, what: str = "") -> None:
        super().__init__(what or MEANINGS[status], "work item", "send it as PS3.4 Annex CC says")
        self.status = status


def is_uid(text: object) -> bool:
    """Whether this is a UID (PS3.5 9.1)."""
    return isinstance(text, str) and _UID.fullmatch(text) is not None


def tag(keyword: str) -> str:
    """The key of an attribute in the DICOM JSON model.

    Raises:
        KeyError: there is no such attribute.
    """
    number = tag_for_keyword(keyword)
    if number is None:
        raise KeyError(keyword)
    return f"{number:08X}"


def values(step: Mapping[str, Any], keyword: str) -> list[Any]:
    """The values of an attribute; [] where it is absent or empty."""
    return list(step.get(tag(keyword), {}).get("Value", []))


def text(step: Mapping[str, Any], keyword: str) -> str:
    """The first value of an attribute as text; '' where there is none. Of a name, its alphabetic group."""
    for value in values(step, keyword)[:1]:
        if isinstance(value, dict):
            return str(value.get("Alphabetic", ""))
        return "" if value is None else str(value)
    return ""


def put(step: Step, keyword: str, vr: str, *given: Any) -> None:
    """Set an attribute; without values it is empty."""
    step[tag(keyword)] = {"vr": vr, "Value": list(given)} if given else {"vr": vr}


def code(value: str, scheme: str, meaning: str) -> Step:
    """An item of a code sequence (PS3.3 8.8)."""
    item: Step = {}
    put(item, "CodeValue", "SH", value)
    put(item, "CodingSchemeDesignator", "SH", scheme)
    put(item, "CodeMeaning", "LO", meaning)
    return item


def read_json(data: bytes) -> Step:
    """One data set in the DICOM JSON model, alone or in an array of one (PS3.18 F.2), which anybody may have sent.

    Raises:
        WorkitemError: it is longer than `MAXIMUM_BYTES`, nested deeper than `MAXIMUM_DEPTH`, or no data set.
    """
    if len(data) > MAXIMUM_BYTES:
        raise WorkitemError(0x0213, f"the data set is longer than {MAXIMUM_BYTES} bytes")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise WorkitemError(0x0115, f"this is no JSON: {type(error).__name__}") from error
    if isinstance(found, list) and len(found) == 1:
        (found,) = found
    return normal(found)


def normal(found: object) -> Step:
    """A data set in the DICOM JSON model as pydicom understands and writes it, without groups 0000 and 0002.

    Raises:
        WorkitemError: it is none, or nested too deep.
    """
    _check_depth(found, 1)
    try:
        assert isinstance(found, dict)
        dataset = Dataset.from_json({key: one for key, one in found.items() if key[:4] not in ("0000", "0002")})
        written = DicomBytesIO()
        written.is_implicit_VR, written.is_little_endian = False, True
        step = from_dataset(dataset)
        write_dataset(written, to_dataset(step))  # what cannot be written could never be sent on
        return step
    except Exception as error:  # whatever strangers send, pydicom may stumble over in its own ways
        raise WorkitemError(0x0115, f"this is no data set in the DICOM JSON model: {type(error).__name__}") from error


def from_dataset(dataset: Dataset) -> Step:
    """A data set in the DICOM JSON model; a value that does not fit its VR is an error.

    Raises:
        WorkitemError: it is nested deeper than `MAXIMUM_DEPTH`.
        ValueError and others of pydicom: a value cannot be told.
    """
    found: Step = dataset.to_json_dict(suppress_invalid_tags=False)
    found.pop(tag("SpecificCharacterSet"), None)
    _check_depth(found, 1)
    return found


def to_dataset(step: Mapping[str, Any]) -> Dataset:
    """The step as a data set whose texts are UTF-8."""
    dataset = Dataset.from_json(dict(step))
    dataset.SpecificCharacterSet = "ISO_IR 192"
    return dataset


def _check_depth(found: object, depth: int) -> None:
    if depth > MAXIMUM_DEPTH:
        raise WorkitemError(0x0115, f"sequences are nested deeper than {MAXIMUM_DEPTH}")
    if not isinstance(found, dict):
        raise WorkitemError(0x0115, "this is no data set in the DICOM JSON model")
    for key, element in found.items():
        if not _TAG.fullmatch(key) or not isinstance(element, dict) or not isinstance(element.get("vr"), str):
            raise WorkitemError(0x0115, "this is no data set in the DICOM JSON model")
        if element["vr"] == "SQ":
            if not isinstance(element.get("Value", []), list):
                raise WorkitemError(0x0115, "a sequence is no list")
            for item in element.get("Value", []):
                _check_depth(item, depth + 1)


# --- what a step must hold (PS3.4 Table CC.2.5-3) ---------------------------------------------------------

_REQUIRED: Final[dict[str, Callable[[str], bool]]] = {
    "ScheduledProcedureStepPriority": PRIORITIES.__contains__,
    "ProcedureStepLabel": bool,
    "ScheduledProcedureStepStartDateTime": lambda text: _DATE_TIME.fullmatch(text) is not None,
    "InputReadinessState": READINESS.__contains__,
}
_MAY_BE_EMPTY: Final = {
    "WorklistLabel": "LO", "ScheduledProcessingParametersSequence": "SQ", "ScheduledStationNameCodeSequence": "SQ",
    "ScheduledStationClassCodeSequence": "SQ", "ScheduledStationGeographicLocationCodeSequence": "SQ",
    "ScheduledWorkitemCodeSequence": "SQ", "CommentsOnTheScheduledProcedureStep": "LT",
    "InputInformationSequence": "SQ",
    "PatientName": "PN", "PatientID": "LO", "IssuerOfPatientID": "LO", "PatientBirthDate": "DA", "PatientSex": "CS",
    "AdmissionID": "LO", "AdmittingDiagnosesDescription": "LO", "ReferencedRequestSequence": "SQ",
}  # fmt: skip
ASSIGNMENT = ("ScheduledStationNameCodeSequence", "ScheduledHumanPerformersSequence")
"""What tells whom a step is assigned to."""
_WRITTEN_BY_US = ("TransactionUID", "SOPClassUID", "SOPInstanceUID", "ProcedureStepState")
_NEVER_CHANGED = ("PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID",
                  "ReferencedRequestSequence", "AdmissionID")  # fmt: skip


def new_step(given: Mapping[str, Any], uid: str) -> tuple[Step, bool]:
    """The step that an N-CREATE asks for; and whether it had to be completed, with empty attributes of type 2.

    Raises:
        WorkitemError: an attribute of type 1 is missing or wrong, or its state is not SCHEDULED.
    """
    step = dict(given)
    if not is_uid(uid):
        raise WorkitemError(0x0106, "the UID of the work item is none")
    if text(step, "TransactionUID"):
        raise WorkitemError(0x0106, "TransactionUID is not empty")
    if text(step, "ProcedureStepState") != SCHEDULED:
        raise WorkitemError(0xC309)
    for keyword, fits in _REQUIRED.items():
        check_value(step, keyword, fits)
    lacking = [keyword for keyword in _MAY_BE_EMPTY if tag(keyword) not in step]
    for keyword in lacking:
        put(step, keyword, _MAY_BE_EMPTY[keyword])
    step.pop(tag("TransactionUID"), None)
    put(step, "SOPClassUID", "UI", PUSH)
    put(step, "SOPInstanceUID", "UI", uid)
    return step, bool(lacking)


def check_value(step: Mapping[str, Any], keyword: str, fits: Callable[[str], bool]) -> None:
    """Hold an attribute of type 1 against what it may be.

    Raises:
        WorkitemError: it is missing, empty, or something else.
    """
    if tag(keyword) not in step:
        raise WorkitemError(0x0120, f"{keyword} is missing")
    if not text(step, keyword):
        raise WorkitemError(0x0121, f"{keyword} is empty")
    if len(values(step, keyword)) != 1 or not fits(text(step, keyword)):
        raise WorkitemError(0x0106, f"{keyword} cannot be {text(step, keyword)[:40]!r}")


def changed_step(step: Mapping[str, Any], given: Mapping[str, Any]) -> Step:
    """The step after an N-SET (PS3.4 CC.2.6): the attributes that are given replace those of the step.

    Raises:
        WorkitemError: it would change who or what the step is about, or its state; or a value cannot be.
    """
    changes = {key: one for key, one in given.items() if key != tag("TransactionUID")}
    for keyword in (*_WRITTEN_BY_US, *_NEVER_CHANGED):
        if tag(keyword) in changes and values(changes, keyword) != values(step, keyword):
            raise WorkitemError(0x0106, f"{keyword} cannot be changed")
    for keyword, fits in _REQUIRED.items():
        if tag(keyword) in changes:
            check_value(changes, keyword, fits)
    return {**step, **changes}


def lacks_for_end(step: Mapping[str, Any], state: str) -> str:
    """What a step lacks to be COMPLETED or CANCELED (PS3.4 CC.2.5.1.1); '' if nothing."""
    if state == CANCELED:
        items = values(step, "ProcedureStepProgressInformationSequence")
        wanted: tuple[str, ...] = ("ProcedureStepCancellationDateTime",)
        where = "ProcedureStepProgressInformationSequence"
    else:
        items = values(step, "UnifiedProcedureStepPerformedProcedureSequence")
        wanted = (
            "PerformedStationNameCodeSequence", "PerformedProcedureStepStartDateTime", "PerformedWorkitemCodeSequence",
            "PerformedProcedureStepEndDateTime",
        )  # fmt: skip
        where = "UnifiedProcedureStepPerformedProcedureSequence"
    if not items:
        return where
    return next((f"{where}.{keyword}" for item in items for keyword in wanted if not values(item, keyword)), "")


def studies_of(step: Mapping[str, Any]) -> list[str]:
    """The Study Instance UIDs that a step is about: of its input, its requests, and its own."""
    found = [text(step, "StudyInstanceUID")]
    for sequence in ("ReferencedRequestSequence", "InputInformationSequence"):
        found += [text(item, "StudyInstanceUID") for item in values(step, sequence)]
    return [uid for uid in dict.fromkeys(found) if uid]


def of_patient(step: Mapping[str, Any], patient_id: str, issuer: str) -> bool:
    """Whether a step may be of that patient: by Patient ID, and by its issuer where both are told. What names none, or
    is asked about none, may be of anybody.
    """
    theirs, of = text(step, "PatientID").strip(), text(step, "IssuerOfPatientID").strip()
    if not theirs or not patient_id.strip():
        return True
    return theirs == patient_id.strip() and (not of or not issuer.strip() or of == issuer.strip())


def event_report(event: int, step: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> Step:
    """The information of an event report (PS3.4 Table CC.2.4-1).

    Args:
        given: of a cancel request: RequestingAE, and what it says.
    """
    report: Step = {}
    if event == STATE_REPORT:
        put(report, "ProcedureStepState", "CS", text(step, "ProcedureStepState"))
        put(report, "InputReadinessState", "CS", text(step, "InputReadinessState"))
        # Beyond the standard: whoever watches learns of a new priority, for which there is no event.
        put(report, "ScheduledProcedureStepPriority", "CS", text(step, "ScheduledProcedureStepPriority"))
        for item in values(step, "ProcedureStepProgressInformationSequence")[:1]:
            for keyword in ("ReasonForCancellation", "ProcedureStepDiscontinuationReasonCodeSequence"):
                if values(item, keyword):
                    report[tag(keyword)] = item[tag(keyword)]
    elif event == CANCEL_REQUESTED:
        report |= given or {}
    elif event == PROGRESS_REPORT:
        keyword = "ProcedureStepProgressInformationSequence"
        report[tag(keyword)] = step.get(tag(keyword), {"vr": "SQ"})
    elif event == ASSIGNED:
        for keyword in ASSIGNMENT:
            report[tag(keyword)] = step.get(tag(keyword), {"vr": "SQ"})
    else:
        # A start after which all that was written down is still there.
        put(report, "SCPStatus", "CS", "RESTARTED")
        put(report, "SubscriptionListStatus", "CS", "WARM START")
        put(report, "UnifiedProcedureStepListStatus", "CS", "WARM START")
    return report
