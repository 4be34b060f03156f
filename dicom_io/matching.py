"""Matching of work items against keys (PS3.4 C.2.2.2 and CC.2.8), and queries by parameters (PS3.18 8.3.4).

Keys and items are dictionaries in the DICOM JSON model; see `dicom_io.workitem`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from pydicom.datadict import dictionary_VR, tag_for_keyword

from dicom_io.workitem import MAXIMUM_DEPTH, Step, WorkitemError

_NO_WILD_CARDS = frozenset(("DA", "TM", "DT", "UI", "SL", "SS", "US", "UL", "FL", "FD", "SV", "UV", "IS", "DS", "AT"))
_MOMENT = re.compile(r"(\d{4})(\d{2})?(\d{2})?(\d{2})?(\d{2})?(\d{2})?(\.\d{1,6})?([+-]\d{4})?")
_HEX = re.compile(r"[0-9A-Fa-f]{8}")
MAXIMUM_KEYS = 64


def matches(step: Mapping[str, Any], keys: Mapping[str, Any]) -> bool:
    """Whether an item has all that the keys ask for. A key without a value matches everything."""
    return all(_element_matches(step.get(key), wanted) for key, wanted in keys.items() if key != "00080005")


def _element_matches(found: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> bool:
    asked = [one for one in wanted.get("Value", []) if one not in (None, "", {}, "*")]
    if not asked:
        return True
    vr = str(wanted.get("vr", "UN"))
    there = (found or {}).get("Value", [])
    if vr == "SQ":
        # PS3.4 C.2.2.2.6: one item of keys; an item of the sequence must have all of them.
        asked = [one for one in asked if isinstance(one, dict) and any(_asks(element) for element in one.values())]
        return not asked or any(matches(item, one) for one in asked for item in there if isinstance(item, dict))
    return any(_value_matches(vr, _plain(value), _plain(one)) for value in there for one in asked)


def _asks(element: Mapping[str, Any]) -> bool:
    return any(one not in (None, "", {}, "*") for one in element.get("Value", []))


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return str(value.get("Alphabetic", ""))
    return "" if value is None else str(value)


def _value_matches(vr: str, there: str, asked: str) -> bool:
    if vr in ("DA", "TM", "DT"):
        return _time_matches(vr, there, asked)
    if vr in ("IS", "DS", "US", "UL", "SS", "SL", "FL", "FD"):
        try:
            return float(there) == float(asked)
        except ValueError:
            return False
    there, asked = there.strip(), asked.strip()
    if vr == "PN":
        # PS3.4 C.2.2.2.1: names may be compared without case, and without the empty components at their end.
        there, asked = there.casefold().rstrip("^"), asked.casefold().rstrip("^")
    if vr not in _NO_WILD_CARDS and ("*" in asked or "?" in asked):
        return _wild(there, asked)
    return there == asked


def _wild(there: str, pattern: str) -> bool:
    """Whether a text fits a pattern of * and ?; a regular expression could be made to take for ever."""
    first, *others = pattern.split("*")
    if not others:
        return len(there) == len(first) and _fits(there, first, 0)
    *middle, last = others
    end = len(there) - len(last)
    if end < len(first) or not _fits(there, first, 0) or not _fits(there, last, end):
        return False
    position = len(first)
    for part in middle:
        position = next((at for at in range(position, end - len(part) + 1) if _fits(there, part, at)), -1)
        if position < 0:
            return False
        position += len(part)
    return True


def _fits(there: str, part: str, at: int) -> bool:
    return all(one in ("?", other) for one, other in zip(part, there[at : at + len(part)], strict=True))


def _time_matches(vr: str, there: str, asked: str) -> bool:
    """Single value or range (PS3.4 C.2.2.2.5): "A-B", "-B", "A-"."""
    found = _moment(vr, there, last=False)
    if found is None:
        return False
    first, last = _range(vr, asked)
    low, high = _moment(vr, first, last=False), _moment(vr, last, last=True)
    if (first and low is None) or (last and high is None):
        return False
    return (low is None or found >= low) and (high is None or found <= high)


def _range(vr: str, asked: str) -> tuple[str, str]:
    if vr != "DT":
        first, dash, last = asked.partition("-")
        return (first, last) if dash else (asked, asked)
    # A hyphen may be the sign of an offset: the range's is one that no offset of four digits follows, or the second.
    for found in re.finditer("-", asked):
        first, last = asked[: found.start()], asked[found.end() :]
        if (not first or _MOMENT.fullmatch(first)) and (not last or _MOMENT.fullmatch(last)):
            if re.fullmatch(r"\d{4}", last) and _MOMENT.fullmatch(asked) and len(first) >= 8:
                continue
            return first, last
    return asked, asked


def _moment(vr: str, given: str, *, last: bool) -> datetime | None:
    """The first or last moment that a date, time or date-time names, without a zone where it names none."""
    given = given.strip()
    if vr == "TM":
        given = "20000101" + given.replace(":", "")
    elif vr == "DA":
        given = given.replace(".", "") if len(given) == 10 else given
    found = _MOMENT.fullmatch(given)
    if found is None:
        return None
    numbers = [int(one) if one else None for one in found.groups()[:6]]
    year, month, day, hour, minute, second = numbers
    try:
        moment = datetime(year or 1, month or 1, day or 1, hour or 0, minute or 0, min(second or 0, 59))
        if found[7]:
            moment += timedelta(microseconds=round(float(found[7]) * 1e6))
        elif last:
            moment = _end(moment, [month, day, hour, minute, second])
        offset = found[8]
        if offset:
            away = timedelta(hours=int(offset[1:3]), minutes=int(offset[3:]))
            moment += -away if offset[0] == "+" else away
        elif vr == "DT":
            moment -= moment.astimezone().utcoffset() or timedelta()
    except (ValueError, OverflowError, OSError):
        return None
    return moment


def _end(moment: datetime, named: Sequence[int | None]) -> datetime:
    """The last microsecond of the year, month, day, hour, minute or second that was named."""
    month, day, hour, minute, second = named
    if month is None:
        following = moment.replace(year=moment.year + 1)
    elif day is None:
        following = (moment + timedelta(days=31)).replace(day=1)
    elif hour is None:
        following = moment + timedelta(days=1)
    elif minute is None:
        following = moment + timedelta(hours=1)
    else:
        following = moment + (timedelta(minutes=1) if second is None else timedelta(seconds=1))
    return following - timedelta(microseconds=1)


def selected(step: Mapping[str, Any], keys: Mapping[str, Any]) -> Step:
    """Of an item what the keys name, empty where it has none (PS3.4 C.4.1.1.3.2), and its UIDs."""
    found: Step = {}
    for key, wanted in keys.items():
        element = step.get(key, {"vr": wanted.get("vr", "UN")})
        items = [one for one in wanted.get("Value", []) if isinstance(one, dict)] if wanted.get("vr") == "SQ" else []
        if items and items[0] and element.get("Value"):
            element = {**element, "Value": [selected(item, items[0]) for item in element["Value"]]}
        found[key] = element
    for key in ("00080016", "00080018"):
        if key in step:
            found[key] = step[key]
    found.pop("00081195", None)
    return found


@dataclass(frozen=True, slots=True)
class Query:
    """What a query by parameters asks for.

    Attributes:
        keys: to match.
        include: keys of attributes that are wanted beside the usual ones; None: all.
        limit: so many items at most; None: as many as there are.
    """

    keys: Step
    include: Step | None
    limit: int | None
    offset: int


_USUAL = (
    "SOPClassUID", "SOPInstanceUID", "ProcedureStepState", "ScheduledProcedureStepPriority", "ProcedureStepLabel",
    "WorklistLabel", "ScheduledProcedureStepStartDateTime", "ScheduledWorkitemCodeSequence", "InputReadinessState",
    "CommentsOnTheScheduledProcedureStep", "PatientName", "PatientID", "PatientBirthDate", "PatientSex",
    "ReferencedRequestSequence", "InputInformationSequence", "ScheduledStationNameCodeSequence",
    "ProcedureStepProgressInformationSequence",
)  # fmt: skip


def read_query(parameters: Sequence[tuple[str, str]]) -> Query:
    """The parameters of a search (PS3.18 8.3.4): attribute=value, includefield, limit, offset, fuzzymatching.

    An attribute is a keyword or eight hexadecimal digits, in sequences with points between them.

    Raises:
        WorkitemError: one is no parameter, or its value cannot be.
    """
    keys: Step = {}
    include: Step | None = {}
    limit, offset = None, 0
    if len(parameters) > MAXIMUM_KEYS:
        raise WorkitemError(0x0115, f"more than {MAXIMUM_KEYS} parameters")
    for name, value in parameters:
        if name in ("limit", "offset"):
            if not re.fullmatch(r"\d{1,9}", value):
                raise WorkitemError(0x0106, f"{name} is no number")
            limit, offset = (int(value), offset) if name == "limit" else (limit, int(value))
        elif name == "fuzzymatching":
            if value not in ("true", "false"):
                raise WorkitemError(0x0106, "fuzzymatching is true or false")
        elif name == "includefield":
            for one in value.split(","):
                if one == "all":
                    include = None
                elif include is not None:
                    _enter(include, one, None)
        else:
            _enter(keys, name, value)
    return Query(keys, None if include is None else {**_usual(), **include, **keys}, limit, offset)


def _usual() -> Step:
    found: Step = {}
    for keyword in _USUAL:
        _enter(found, keyword, None)
    return found


def _enter(keys: Step, path: str, value: str | None) -> None:
    """Write an attribute of that path into keys, with its value."""
    parts = path.split(".")
    if len(parts) > MAXIMUM_DEPTH:
        raise WorkitemError(0x0115, "an attribute lies too deep in sequences")
    for place, part in enumerate(parts, start=1):
        number = int(part, 16) if _HEX.fullmatch(part) else tag_for_keyword(part)
        try:
            vr = dictionary_VR(number)  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError, OverflowError):
            raise WorkitemError(0x0115, f"there is no attribute {part[:64]!r}") from None
        key = f"{number:08X}"
        if place < len(parts):
            if vr != "SQ":
                raise WorkitemError(0x0115, f"{part[:64]} is no sequence")
            element = keys.setdefault(key, {"vr": "SQ", "Value": [{}]})
            keys = element["Value"][0]
            continue
        if vr == "SQ":
            keys.setdefault(key, {"vr": "SQ", "Value": [{}]})
            return
        # "|" stands between UIDs of a list, beside the comma of older editions (PS3.18 8.3.4.1).
        listed = re.split(r"[,\\]", value) if value and vr == "UI" else [value] if value else []
        wrapped = [{"Alphabetic": one} if vr == "PN" else one for one in listed]
        keys[key] = {"vr": vr.split()[0], **({"Value": wrapped} if wrapped else {})}
