"""The box raises the reading of a study and takes back only what it raised; nobody else's priority is ever lowered."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.ledger.marks import PREFIX, Mark
from appliance.ledger.store import Ledger
from dicom_io.workitem import CANCELED, IN_PROGRESS, PRIORITIES, STATE_REPORT, Step, put, text
from tests.workitems import READING, performed, workitem

STUDY = "1.2.3"


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path / "ledger.sqlite")
    yield opened
    opened.close()


def mark(
    uid: str,
    standing: bool = True,
    mode: Any = "reprioritise",
    package: str = "pkg",
    item: str = "2.25.1",
    moved: bool = False,
    **changes: Any,
) -> Mark:
    step = workitem(STUDY, **changes)
    put(step, "SOPInstanceUID", "UI", item)
    said = "suspected" if standing else "withdrawn"
    return Mark(uid, STUDY, package, mode, standing, f"{package}: {said}", step, moved)


def priority(ledger: Ledger, uid: str) -> str:
    row = ledger.workitem(uid)
    assert text(row["step"], "ScheduledProcedureStepPriority") == row["priority"]
    assert row["rank"] == PRIORITIES.index(row["priority"])
    return str(row["priority"])


def comment(ledger: Ledger, uid: str) -> list[str]:
    return text(ledger.workitem(uid)["step"], "CommentsOnTheScheduledProcedureStep").splitlines()


def set_priority(ledger: Ledger, uid: str, value: str) -> None:
    changes: Step = {}
    put(changes, "ScheduledProcedureStepPriority", "CS", value)
    ledger.update_workitem(uid, changes, "", "RIS", READING)


@pytest.mark.parametrize("before", PRIORITIES)
def test_it_raises_and_takes_back(ledger: Ledger, before: str) -> None:
    ledger.create_workitem("1.1", workitem(STUDY, before), "RIS", READING)
    ledger.create_workitem("1.2", workitem("1.9", before), "RIS", READING)
    ledger.mark_study(mark("m1"), READING)
    assert (priority(ledger, "1.1"), priority(ledger, "1.2")) == ("HIGH", before)
    assert comment(ledger, "1.1") == [f"{PREFIX}pkg: suspected"]
    ledger.mark_study(mark("m2", standing=False), READING)
    assert priority(ledger, "1.1") == before
    assert comment(ledger, "1.1") == [f"{PREFIX}pkg: withdrawn"]


def test_to_suggest_is_never_to_move(ledger: Ledger) -> None:
    ledger.create_workitem("1.1", workitem(STUDY, "LOW", CommentsOnTheScheduledProcedureStep="fell"), "RIS", READING)
    ledger.mark_study(mark("m1", mode="suggest"), READING)
    assert priority(ledger, "1.1") == "LOW"
    assert comment(ledger, "1.1") == [f"{PREFIX}pkg: suspected", "fell"]
    ledger.create_workitem("1.2", workitem(STUDY, "LOW"), "RIS", READING)
    assert priority(ledger, "1.2") == "LOW"
    assert comment(ledger, "1.2") == [f"{PREFIX}pkg: suspected"]
    assert priority(ledger, "1.1") == "LOW"


def test_once_more_changes_nothing(ledger: Ledger) -> None:
    ledger.create_workitem("1.1", workitem(STUDY), "RIS", READING)
    said = ledger.mark_study(mark("m1"), READING)
    set_priority(ledger, "1.1", "LOW")
    before = ledger.workitem("1.1")
    assert ledger.mark_study(mark("m1"), READING) == said
    assert ledger.workitem("1.1") == before


def test_a_priority_that_somebody_set_since_stays(ledger: Ledger) -> None:
    ledger.create_workitem("1.1", workitem(STUDY, "LOW"), "RIS", READING)
    ledger.mark_study(mark("m1"), READING)
    set_priority(ledger, "1.1", "HIGH")  # the same value: theirs from now on
    ledger.mark_study(mark("m2", standing=False), READING)
    assert priority(ledger, "1.1") == "HIGH"


def test_who_lowered_it_again_is_not_overruled_by_the_same_answer(ledger: Ledger) -> None:
    ledger.create_workitem("1.1", workitem(STUDY), "RIS", READING)
    ledger.mark_study(mark("m1"), READING)
    set_priority(ledger, "1.1", "LOW")
    ledger.mark_study(mark("m2"), READING)  # confirmed
    assert priority(ledger, "1.1") == "LOW"
    ledger.mark_study(mark("m3", standing=False), READING)
    ledger.mark_study(mark("m4"), READING)  # a correction is news
    assert priority(ledger, "1.1") == "HIGH"


def test_two_packages_raise_once_and_the_last_takes_back(ledger: Ledger) -> None:
    ledger.create_workitem("1.1", workitem(STUDY), "RIS", READING)
    ledger.mark_study(mark("a1", package="a"), READING)
    ledger.mark_study(mark("b1", package="b"), READING)
    ledger.mark_study(mark("a2", standing=False, package="a"), READING)
    assert priority(ledger, "1.1") == "HIGH"
    ledger.mark_study(mark("b2", standing=False, package="b"), READING)
    assert priority(ledger, "1.1") == "MEDIUM"


def test_where_there_is_no_item_the_box_makes_one_until_the_hospital_does(ledger: Ledger) -> None:
    ledger.subscribe("PACS", "1.2.840.10008.5.1.4.34.5", locked=False)
    ledger.mark_study(mark("m1"), READING)
    assert priority(ledger, "2.25.1") == "HIGH"
    assert [row["uid"] for row in ledger.next_events("PACS")] == ["2.25.1"]
    assert ledger.create_workitem("1.1", workitem(STUDY, "LOW"), "RIS", READING) == 0xB300
    assert priority(ledger, "1.1") == "HIGH"
    assert ledger.workitem("2.25.1")["state"] == CANCELED
    ledger.mark_study(mark("m2", standing=False), READING)
    assert priority(ledger, "1.1") == "LOW"


def test_what_the_box_made_stays_in_the_list_when_the_alert_is_withdrawn(ledger: Ledger) -> None:
    ledger.mark_study(mark("m1"), READING)
    ledger.mark_study(mark("m2", standing=False), READING)
    assert (priority(ledger, "2.25.1"), ledger.workitem("2.25.1")["state"]) == ("MEDIUM", "SCHEDULED")


def test_a_site_whose_readings_have_a_code_of_their_own(ledger: Ledger) -> None:
    own = frozenset({"READ^99SITE"})
    ledger.mark_study(mark("a1", package="a"), own)
    ledger.mark_study(mark("b1", package="b"), own)
    for package in ("a", "b"):
        ledger.mark_study(mark(f"{package}2", standing=False, package=package), own)
    assert [text(one, "SOPInstanceUID") for one in ledger.find_workitems({}, 10)] == ["2.25.1"]
    assert priority(ledger, "2.25.1") == "MEDIUM"


def test_a_withdrawal_alone_makes_nothing(ledger: Ledger) -> None:
    assert "no item" in ledger.mark_study(mark("m1", standing=False), READING)
    assert ledger.find_workitems({}, 10) == []


def test_what_is_claimed_or_ended_is_not_moved(ledger: Ledger) -> None:
    for uid in ("1.1", "1.2"):
        ledger.create_workitem(uid, workitem(STUDY), "RIS", READING)
        ledger.change_state(uid, IN_PROGRESS, "1.9", "WS")
    ledger.update_workitem("1.2", performed(), "1.9", "WS")
    ledger.change_state("1.2", "COMPLETED", "1.9", "WS")
    said = ledger.mark_study(mark("m1"), READING)
    assert "somebody has claimed it" in said and "is completed" in said
    assert (priority(ledger, "1.1"), priority(ledger, "1.2")) == ("MEDIUM", "MEDIUM")
    assert (len(comment(ledger, "1.1")), len(comment(ledger, "1.2"))) == (1, 0)


def test_other_work_on_the_study_is_left_alone(ledger: Ledger) -> None:
    step = workitem(STUDY)
    step["00404018"]["Value"][0]["00080100"]["Value"] = ["110003"]
    ledger.create_workitem("1.1", step, "RIS", READING)
    ledger.mark_study(mark("m1"), READING)
    assert priority(ledger, "1.1") == "MEDIUM"
    assert priority(ledger, "2.25.1") == "HIGH"


def test_an_item_that_learns_its_study_late_is_raised_then(ledger: Ledger) -> None:
    ledger.create_workitem("1.1", workitem("1.8"), "RIS", READING)
    ledger.mark_study(mark("m1"), READING)
    item: Step = {}
    put(item, "StudyInstanceUID", "UI", STUDY)
    changes: Step = {}
    put(changes, "InputInformationSequence", "SQ", item)
    ledger.subscribe("PACS", "1.1", locked=False)
    for row in ledger.next_events("PACS"):
        ledger.heard(row["id"])
    ledger.update_workitem("1.1", changes, "", "RIS", READING)
    assert priority(ledger, "1.1") == "HIGH"
    assert [row["event_type"] for row in ledger.next_events("PACS")] == [STATE_REPORT], "who listens hears of it"
    ledger.update_workitem("1.1", changes, "", "RIS", READING)
    assert len(ledger.next_events("PACS")) == 1


ACTIONS = st.one_of(
    st.tuples(st.just("mark"), st.sampled_from("ab"), st.sampled_from(("reprioritise", "suggest"))),
    st.tuples(st.just("withdraw"), st.sampled_from("ab"), st.sampled_from(("reprioritise", "suggest"))),
    st.tuples(st.just("set"), st.sampled_from(PRIORITIES), st.just("")),
)


def test_it_never_stands_lower_than_the_hospital_put_it(ledger: Ledger) -> None:
    studies = itertools.count(1)

    @settings(max_examples=25, deadline=None)
    @given(first=st.sampled_from(PRIORITIES), actions=st.lists(ACTIONS, max_size=8))
    def holds(first: str, actions: list[tuple[str, str, str]]) -> None:
        study = f"1.7.{next(studies)}"
        uid = f"{study}.1"
        ledger.create_workitem(uid, workitem(study, first), "RIS", READING)
        theirs = first
        standing: dict[str, str] = {}
        for number, (what, who, mode) in enumerate(actions):
            if what == "set":
                set_priority(ledger, uid, who)
                theirs = who
            else:
                said = mark(f"{study}.m{number}", what == "mark", mode, who)
                ledger.mark_study(replace(said, study_instance_uid=study), READING)
                standing.pop(who, None)
                if what == "mark":
                    standing[who] = mode
            now = priority(ledger, uid)
            assert PRIORITIES.index(now) >= PRIORITIES.index(theirs)
            if "reprioritise" not in standing.values():
                assert now == theirs

    holds()


def states(ledger: Ledger) -> dict[str, tuple[str, str, str]]:
    """Item → the patient whom it names, its state and its priority."""
    found = ledger.find_workitems({}, 10)
    keywords = ("PatientID", "ProcedureStepState", "ScheduledProcedureStepPriority")
    return {text(one, "SOPInstanceUID"): tuple(text(one, keyword) for keyword in keywords) for one in found}  # type: ignore[misc]


@pytest.mark.parametrize("told", [True, False])
def test_who_gets_the_images_in_the_end_is_on_the_list_and_who_had_them_is_not(ledger: Ledger, told: bool) -> None:
    ledger.mark_study(mark("m1"), READING)
    if told:
        said = ledger.mark_study(mark("m2", standing=False, moved=True), READING)
        assert "canceled: the images came again under another Patient ID" in said
    ledger.mark_study(mark("m3", item="2.25.2", PatientID="P-2"), READING)
    assert states(ledger) == {
        "2.25.1": ("P-1", "CANCELED", "HIGH" if not told else "MEDIUM"),
        "2.25.2": ("P-2", "SCHEDULED", "HIGH"),
    }
    assert comment(ledger, "2.25.2") == [f"{PREFIX}pkg: suspected"]
    ledger.mark_study(mark("m4", standing=False, item="2.25.2", moved=True, PatientID="P-2"), READING)
    ledger.mark_study(mark("m5", item="2.25.3"), READING)
    assert {one: state for one, (_, state, _) in states(ledger).items()} == {
        "2.25.1": "CANCELED", "2.25.2": "CANCELED", "2.25.3": "SCHEDULED",
    }  # fmt: skip


def test_what_somebody_has_claimed_for_another_patient_stays_theirs(ledger: Ledger) -> None:
    ledger.mark_study(mark("m1"), READING)
    ledger.change_state("2.25.1", IN_PROGRESS, "1.9", "READER")
    ledger.mark_study(mark("m2", standing=False, moved=True), READING)
    ledger.mark_study(mark("m3", item="2.25.2", PatientID="P-2"), READING)
    assert states(ledger) == {"2.25.1": ("P-1", IN_PROGRESS, "HIGH"), "2.25.2": ("P-2", "SCHEDULED", "HIGH")}
    assert comment(ledger, "2.25.1") == [f"{PREFIX}pkg: withdrawn"]


@pytest.mark.parametrize(
    ("theirs", "same"),
    [
        ({"PatientID": "P-2"}, False),
        ({"PatientID": "P-1", "IssuerOfPatientID": "ELSEWHERE"}, False),
        ({"PatientID": "P-1", "IssuerOfPatientID": "HERE"}, True),
        ({"PatientID": "P-1 "}, True),
        ({"PatientID": None}, True),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_an_item_of_the_hospital_is_raised_only_if_it_may_be_of_that_patient(
    ledger: Ledger, theirs: dict[str, Any], same: bool, first: bool
) -> None:
    one = mark("m1", PatientID="P-1", IssuerOfPatientID="HERE")
    if first:
        ledger.create_workitem("1.1", workitem(STUDY, "LOW", **theirs), "RIS", READING)
        ledger.mark_study(one, READING)
    else:
        ledger.mark_study(one, READING)
        ledger.create_workitem("1.1", workitem(STUDY, "LOW", **theirs), "RIS", READING)
    assert priority(ledger, "1.1") == ("HIGH" if same else "LOW")
    assert comment(ledger, "1.1") == ([f"{PREFIX}pkg: suspected"] if same else [])
    own = states(ledger).get("2.25.1")
    assert own in (None, ("P-1", "CANCELED", "HIGH")) if same else own == ("P-1", "SCHEDULED", "HIGH")


def test_a_mark_that_names_nobody_shows_on_every_item(ledger: Ledger) -> None:
    ledger.create_workitem("1.1", workitem(STUDY), "RIS", READING)
    ledger.mark_study(replace(mark("m1", mode="suggest"), step={}), READING)
    assert comment(ledger, "1.1") == [f"{PREFIX}pkg: suspected"]
