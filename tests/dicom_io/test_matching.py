"""Matching by PS3.4 C.2.2.2, and queries by parameters as PS3.18 8.3.4 says them."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicom_io.matching import MAXIMUM_KEYS, matches, read_query, selected
from dicom_io.workitem import MEANINGS, Step, WorkitemError, put, tag, text, values
from tests.workitems import workitem


def element(keyword: str, vr: str, *given: Any) -> Step:
    step: Step = {}
    put(step, keyword, vr, *given)
    return step


def label(value: str) -> Step:
    return element("WorklistLabel", "LO", value)


@given(
    there=st.text("ab. *", max_size=6).map(str.strip),
    asked=st.lists(st.sampled_from(("a", "b", ".", "*", "?")), max_size=5).map("".join),
)
def test_wild_cards_match_as_their_definition_says(there: str, asked: str) -> None:
    def fits(pattern: str, value: str) -> bool:
        if not pattern:
            return not value
        if pattern[0] == "*":
            return fits(pattern[1:], value) or (bool(value) and fits(pattern, value[1:]))
        return bool(value) and pattern[0] in ("?", value[0]) and fits(pattern[1:], value[1:])

    universal = asked in ("", "*")
    assert matches(label(there) if there else {}, label(asked)) == (universal or (bool(there) and fits(asked, there)))


def test_a_pattern_cannot_take_for_ever() -> None:
    assert not matches(label("a" * 10_000), label("*a" * 8 + "b"))
    assert not matches(label("a" * 10_000), label("*a?" * 20 + "b"))
    assert matches(label("a" * 10_000), label("*a" * 8))


@given(
    there=st.datetimes(datetime(1950, 1, 2), datetime(2090, 1, 1)).map(lambda one: one.replace(microsecond=0)),
    first=st.none() | st.integers(-50_000, 50_000).map(lambda one: timedelta(seconds=one)),
    last=st.none() | st.integers(-50_000, 50_000).map(lambda one: timedelta(seconds=one)),
    zone=st.sampled_from(("", "+0000", "-0500", "+0930")),
)  # fmt: skip
def test_ranges_of_date_times(there: datetime, first: timedelta | None, last: timedelta | None, zone: str) -> None:
    low = None if first is None else there + first
    high = None if last is None else there + last
    if low is None and high is None:
        return

    def written(moment: datetime | None) -> str:
        return "" if moment is None else moment.strftime("%Y%m%d%H%M%S") + zone

    keys = element("ScheduledProcedureStepStartDateTime", "DT", f"{written(low)}-{written(high)}")
    step = element("ScheduledProcedureStepStartDateTime", "DT", written(there))
    assert matches(step, keys) == ((low is None or low <= there) and (high is None or there <= high))


@pytest.mark.parametrize(
    ("vr", "there", "asked", "fits"),
    [
        ("DT", "20261129120000", "20261129", True), ("DT", "20261129120000", "20261128", False),
        ("DT", "20261129120000", "202611-", True), ("DT", "20261231235959.5", "-2026", True),
        ("DT", "20270101", "-2026", False), ("DT", "20261129120000+0100", "20261129110000+0000", True),
        ("DT", "20261129120000-0500", "20261129115959-0500-20261129120001-0500", True),
        ("DT", "nonsense", "2026", False), ("DT", "20261129", "nonsense-", False), ("DT", "20269929", "2026", False),
        ("DA", "20261129", "20261101-20261130", True), ("DA", "20261129", "20261130-", False),
        ("TM", "120000", "1159-1201", True), ("TM", "12", "13-", False),
        ("UI", "1.2.3", "1.2.3", True), ("UI", "1.2.3", "1.2*", False),
        ("PN", "Müller^Eva", "müller^e*", True), ("PN", "Müller^Eva", "MÜLLER^EVA^^", True),
        ("PN", "Müller", "Mueller", False),
        ("LO", "Neuro", "neuro", False), ("IS", "10", "10", True), ("IS", "10", "x", False),
    ],
)  # fmt: skip
def test_values(vr: str, there: str, asked: str, fits: bool) -> None:
    keyword = {
        "DT": "ScheduledProcedureStepStartDateTime", "DA": "PatientBirthDate", "TM": "StudyTime", "PN": "PatientName",
        "UI": "StudyInstanceUID", "LO": "WorklistLabel", "IS": "InstanceNumber",
    }[vr]  # fmt: skip

    def wrapped(value: str) -> Any:
        return {"Alphabetic": value} if vr == "PN" else value

    assert matches(element(keyword, vr, wrapped(there)), element(keyword, vr, wrapped(asked))) == fits


def test_a_list_of_uids_and_sequences() -> None:
    step = workitem("1.2.3")
    assert matches(step, read_query([("ReferencedRequestSequence.StudyInstanceUID", "1.9,1.2.3")]).keys)
    assert not matches(step, read_query([("ReferencedRequestSequence.StudyInstanceUID", "1.9")]).keys)
    both = read_query([("0040A370.0020000D", "1.2.3"), ("ReferencedRequestSequence.AccessionNumber", "A-2")]).keys
    assert not matches(step, both)
    assert matches(step, read_query([("ScheduledWorkitemCodeSequence.CodeValue", "110005")]).keys)
    assert matches(step, element("ReferencedRequestSequence", "SQ", {}))
    assert not matches({}, read_query([("ReferencedRequestSequence.StudyInstanceUID", "1.9")]).keys)


def test_the_answer_has_what_was_asked_and_never_the_lock() -> None:
    step = workitem("1.2.3") | element("TransactionUID", "UI", "1.9") | element("SOPInstanceUID", "UI", "1.1")
    asked = read_query([("includefield", "PatientID,TransactionUID,AdmissionID"), ("WorklistLabel", "N*")])
    assert asked.include is not None
    found = selected(step, asked.include)
    assert (text(found, "PatientID"), text(found, "WorklistLabel")) == ("P-1", "NEURO")
    assert tag("AdmissionID") in found and tag("TransactionUID") not in found
    request = selected(step, read_query([("ReferencedRequestSequence.AccessionNumber", "")]).keys)
    assert list(values(request, "ReferencedRequestSequence")[0]) == [tag("AccessionNumber")]


def test_parameters() -> None:
    asked = read_query([("limit", "10"), ("offset", "3"), ("includefield", "all"), ("fuzzymatching", "false")])
    assert (asked.limit, asked.offset, asked.include, asked.keys) == (10, 3, None, {})


@pytest.mark.parametrize(
    "parameter",
    [("limit", "-1"), ("limit", "x"), ("offset", "9" * 10), ("NoSuch", "1"), ("GGGGGGGG", "1"),
     ("00100010.00100020", "1"), ("includefield", "nothing"), ("fuzzymatching", "maybe"),
     (".".join(["ReferencedRequestSequence"] * 9), "1")],
)  # fmt: skip
def test_what_is_no_parameter(parameter: tuple[str, str]) -> None:
    with pytest.raises(WorkitemError):
        read_query([parameter])
    with pytest.raises(WorkitemError):
        read_query([("PatientID", "1")] * (MAXIMUM_KEYS + 1))


@given(st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)), max_size=3))
def test_hostile_parameters_are_an_error_or_keys(parameters: list[tuple[str, str]]) -> None:
    try:
        asked = read_query(parameters)
    except WorkitemError as error:
        assert error.what and error.status in MEANINGS
    else:
        assert all(re.fullmatch("[0-9A-F]{8}", key) for key in asked.keys)
        assert matches(workitem(), asked.keys) in (True, False)
