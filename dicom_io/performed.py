"""What others say that was done: Modality Performed Procedure Step (PS3.4 F.7) and Instance Availability Notification
(PS3.4 Annex R), as their provider reads them.

A step is made with N-CREATE when the examination begins, and N-SET says what came of it; a notification is one
N-CREATE. Of all their attributes those are read that tell which instances a study has. A data set is looked through by
the scanner of headers (`_scan`), which neither recurses nor looks at a byte twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydicom.uid import ExplicitVRBigEndian

from dicom_io._elements import Elements, wanted
from dicom_io._scan import Overrun, looks_implicit, scan
from dicom_io.errors import HeaderError, ScansideError

IN_PROGRESS, COMPLETED, DISCONTINUED = "IN PROGRESS", "COMPLETED", "DISCONTINUED"
"""Values of Performed Procedure Step Status (0040,0252), PS3.3 C.4.14."""

UNAVAILABLE = "UNAVAILABLE"
AVAILABILITIES = ("ONLINE", "NEARLINE", "OFFLINE", UNAVAILABLE)
"""Values of Instance Availability (0008,0056), PS3.3 C.4.23.1.1."""

MAXIMUM_NAMED = 20_000
"""More series and instances in one request are refused: they would hold up other senders while they are read."""

# DIMSE status of a request that cannot be taken (PS3.7 10.1.3, 10.1.5 and C.5).
INVALID_VALUE = 0x0106
PROCESSING_FAILURE = 0x0110
DUPLICATE_INSTANCE = 0x0111
NO_SUCH_INSTANCE = 0x0112
MISSING_ATTRIBUTE = 0x0120
MISSING_VALUE = 0x0121
RESOURCE_LIMITATION = 0x0213

MAY_NOT_BE_UPDATED = (PROCESSING_FAILURE, 0xA710, "Performed Procedure Step Object may no longer be updated")
"""Status, Error ID (0000,0903) and Error Comment where an N-SET comes for a step that has ended (PS3.4 F.7.2.2.4)."""

Named = Mapping[str, tuple[str, ...]]
"""Series Instance UID → SOP Instance UIDs of that series, each once."""

_WANTED = wanted(
    (
        "ScheduledStepAttributesSequence",
        "StudyInstanceUID",
        "PerformedProcedureStepStatus",
        "PerformedSeriesSequence",
        "SeriesInstanceUID",
        "ReferencedImageSequence",
        "ReferencedNonImageCompositeSOPInstanceSequence",
        "ReferencedSeriesSequence",
        "ReferencedSOPSequence",
        "ReferencedSOPInstanceUID",
        "InstanceAvailability",
    )
)
# An Item Delimitation Item (PS3.5 7.5) in either byte order, big first.
_END = b"\xff\xfe\xe0\x0d\0\0\0\0", b"\xfe\xff\x0d\xe0\0\0\0\0"
_REMEDY = "send it as PS3.4 F.7.2 and R.3.2 say"


class PerformedError(ScansideError):
    """A request that cannot be taken.

    Attributes:
        status: the DIMSE status to answer with.
    """

    def __init__(self, what: str, where: str = "", remedy: str = "", *, status: int = INVALID_VALUE) -> None:
        super().__init__(what, where, remedy)
        self.status = status


@dataclass(frozen=True, slots=True)
class NewStep:
    """An N-CREATE: a step that is in progress (PS3.4 F.7.2.1)."""

    sop_instance_uid: str
    study_instance_uid: str
    series: Named


@dataclass(frozen=True, slots=True)
class StepChange:
    """An N-SET (PS3.4 F.7.2.2): what is None stays as it is.

    Attributes:
        status: `IN_PROGRESS`, `COMPLETED` or `DISCONTINUED`.
        series: all of them, also those that were told before.
    """

    sop_instance_uid: str
    status: str | None
    series: Named | None


@dataclass(frozen=True, slots=True)
class Availability:
    """An N-CREATE of a notification (PS3.4 R.3.2.1).

    Attributes:
        series: the instances that exist: online, near-line or off-line.
        unavailable: how many more it names that cannot be had.
    """

    sop_instance_uid: str
    study_instance_uid: str
    series: Named
    unavailable: int


Request = NewStep | StepChange | Availability


def read_new_step(sop_instance_uid: str, data: bytes, transfer_syntax_uid: str) -> NewStep:
    """The Attribute List of an N-CREATE of a step, which anybody may have sent.

    Raises:
        PerformedError: it is no data set; its status is not `IN_PROGRESS`; it names no study or several; a UID is none;
            or it names more than `MAXIMUM_NAMED`.
    """
    found = _read(data, transfer_syntax_uid)
    scheduled = _items(found, "ScheduledStepAttributesSequence", required=True)
    study, *others = {_uid(item, "StudyInstanceUID") for item in scheduled}
    if others:
        raise _error(f"StudyInstanceUID: {len(others) + 1} studies in one step")
    _code(found, "PerformedProcedureStepStatus", (IN_PROGRESS,))
    return NewStep(sop_instance_uid, study, _performed(found))


def read_step_change(sop_instance_uid: str, data: bytes, transfer_syntax_uid: str) -> StepChange:
    """The Modification List of an N-SET, which anybody may have sent.

    Raises:
        PerformedError: it is no data set; its status is none that a step can have; a UID is none; or it names more
            than `MAXIMUM_NAMED`.
    """
    found = _read(data, transfer_syntax_uid)
    status, series = None, None
    if "PerformedProcedureStepStatus" in found:
        status = _code(found, "PerformedProcedureStepStatus", (IN_PROGRESS, COMPLETED, DISCONTINUED))
    if "PerformedSeriesSequence" in found:
        series = _performed(found)
    return StepChange(sop_instance_uid, status, series)


def read_availability(sop_instance_uid: str, data: bytes, transfer_syntax_uid: str) -> Availability:
    """The Attribute List of an N-CREATE of a notification, which anybody may have sent.

    Raises:
        PerformedError: it is no data set; a UID, a series, an instance or its availability is missing or is none; or it
            names more than `MAXIMUM_NAMED`.
    """
    found = _read(data, transfer_syntax_uid)
    study = _uid(found, "StudyInstanceUID")
    gathered, unavailable = _Gathered(), 0
    for item in _items(found, "ReferencedSeriesSequence", required=True):
        series = _uid(item, "SeriesInstanceUID")
        for reference in _items(item, "ReferencedSOPSequence", required=True):
            uid = _uid(reference, "ReferencedSOPInstanceUID")
            if _code(reference, "InstanceAvailability", AVAILABILITIES) == UNAVAILABLE:
                unavailable += 1
                gathered.count()
            else:
                gathered.add(series, uid)
    return Availability(sop_instance_uid, study, gathered.named, unavailable)


def _performed(found: Elements) -> Named:
    """The Performed Series Sequence (PS3.3 C.4.15); a series may yet have no instances."""
    gathered = _Gathered()
    for item in _items(found, "PerformedSeriesSequence"):
        series = _uid(item, "SeriesInstanceUID")
        gathered.add(series)
        for keyword in ("ReferencedImageSequence", "ReferencedNonImageCompositeSOPInstanceSequence"):
            for reference in _items(item, keyword):
                gathered.add(series, _uid(reference, "ReferencedSOPInstanceUID"))
    return gathered.named


class _Gathered:
    """Series and their instances as they are read."""

    def __init__(self) -> None:
        self._series: dict[str, dict[str, None]] = {}  # sets that keep their order
        self._count = 0

    def add(self, series: str, *instances: str) -> None:
        self._series.setdefault(series, {}).update(dict.fromkeys(instances))
        self.count()

    def count(self) -> None:
        self._count += 1
        if self._count > MAXIMUM_NAMED:
            raise _error(f"it names more than {MAXIMUM_NAMED} series and instances", RESOURCE_LIMITATION)

    @property
    def named(self) -> Named:
        return {series: tuple(instances) for series, instances in self._series.items()}


def _error(what: str, status: int = INVALID_VALUE) -> PerformedError:
    return PerformedError(what, "request about what was performed", _REMEDY, status=status)


def _read(data: bytes, syntax: str) -> Elements:
    """Find what is wanted of a data set.

    Raises:
        PerformedError: it is damaged or cut off.
    """
    little = syntax != ExplicitVRBigEndian
    # With a delimiter behind it: a scan that ends anywhere else has met an element that is cut off.
    data += _END[little]
    implicit = looks_implicit(data, 0)
    try:
        found, position, stopped = scan(data, 0, len(data), implicit, little, _WANTED.item[little])
    except (Overrun, HeaderError):
        stopped = False
    if not stopped or position != len(data):
        raise _error("it is damaged or cut off", PROCESSING_FAILURE)
    return Elements(data, found, _WANTED, (implicit, little), [])


def _items(found: Elements, keyword: str, *, required: bool = False) -> Sequence[Elements]:
    try:
        items = found.items(keyword)
    except HeaderError as error:
        raise _error(error.what, PROCESSING_FAILURE) from None
    if found.problems:
        raise _error(found.problems[0])
    if required and not items:
        raise _missing(found, keyword)
    return items


def _uid(found: Elements, keyword: str) -> str:
    uid = found.uid(keyword)
    if found.problems:
        raise _error(found.problems[0])
    if not uid:
        raise _missing(found, keyword)
    return uid


def _code(found: Elements, keyword: str, known: tuple[str, ...]) -> str:
    code = found.text(keyword)
    if not code and not found.problems:
        raise _missing(found, keyword)
    if code not in known:
        found.problem(keyword, code, " or ".join(known))
        raise _error(found.problems[0])
    return code


def _missing(found: Elements, keyword: str) -> PerformedError:
    if keyword in found:
        return _error(f"{keyword} is empty", MISSING_VALUE)
    return _error(f"{keyword} is missing", MISSING_ATTRIBUTE)
