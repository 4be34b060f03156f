"""A verdict on somebody else's worklist: it raises only, takes back only what it raised, and never twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset

from appliance.delivery.outbox import Result
from appliance.delivery.steps import show_there
from appliance.ledger.store import Ledger
from appliance.services.delivery import _Raised
from appliance.settings import Settings, UpsDestination
from appliance.worklist.dimse import Provider
from appliance.worklist.refusals import Refusals
from dicom_io.errors import PeerError
from dicom_io.scu import Peer
from dicom_io.ups import UpsServer
from dicom_io.ups_user import Pull
from dicom_io.workitem import Step, from_dataset, put, text
from tests.foreign_worklist import ForeignWorklist, ai_task, code

READING = frozenset({"110005^DCM"})


def reading(uid: str = "2.1", priority: str = "MEDIUM", **changes: Any) -> Dataset:
    made = ai_task(uid, ScheduledWorkitemCodeSequence=[code("110005")], ScheduledProcedureStepPriority=priority)
    made.CommentsOnTheScheduledProcedureStep = "Fell.\r\nAsk the ward."
    for keyword, value in changes.items():
        setattr(made, keyword, value)
    return made


class List:
    """A worklist elsewhere, and what the box remembers of it."""

    def __init__(self, folder: Path, *steps: Dataset) -> None:
        self.folder = folder
        self.ledger = Ledger(folder / "ledger.sqlite")
        self.there = ForeignWorklist(*(steps or (reading(),)))

    def show(
        self,
        uid: str,
        standing: bool = True,
        mode: str = "reprioritise",
        package: str = "pkg",
        study: str = "1.1",
        patient: str = "",
    ) -> Result:
        step: Step = {}
        put(step, "PatientID", "LO", *([patient] if patient else []))
        said = {"uid": uid, "study_instance_uid": study, "package": package, "mode": mode, "standing": standing,
                "text": "suspected" if standing else "withdrawn", "step": step}  # fmt: skip
        path = self.folder / f"{uid}.json"
        path.write_text(json.dumps(said))
        peer = Peer("MANAGER", "127.0.0.1", self.there.port)
        return show_there(path, peer, "SCANSIDE", READING, _Raised(self.ledger, "other"), 10.0)

    def priority(self, uid: str = "2.1") -> str:
        return str(self.there.steps[uid].ScheduledProcedureStepPriority)

    def comment(self, uid: str = "2.1") -> list[str]:
        return str(self.there.steps[uid].CommentsOnTheScheduledProcedureStep).splitlines()


@pytest.fixture
def there(tmp_path: Path) -> Iterator[List]:
    one = List(tmp_path)
    yield one
    one.there.stop()
    one.ledger.close()


@pytest.mark.parametrize("before", ["LOW", "MEDIUM", "HIGH"])
def test_it_raises_and_takes_back(tmp_path: Path, before: str) -> None:
    there = List(tmp_path, reading(priority=before), reading("2.2", before, ReferencedRequestSequence=[]))
    outcome, words = there.show("M1")
    assert outcome == "acknowledge" and (before == "HIGH" or words == f"raised from {before} to HIGH")
    assert there.priority() == "HIGH" and there.comment() == ["[scanside pkg] suspected", "Fell.", "Ask the ward."]
    assert there.show("M1") == ("acknowledge", "nothing to change")
    assert there.show("M2", standing=False)[0] == "acknowledge"
    assert there.priority() == before and there.comment()[0] == "[scanside pkg] withdrawn"
    assert there.priority("2.2") == before and len(there.comment("2.2")) == 2, "another study's"
    there.there.stop()
    there.ledger.close()


def test_in_suggest_nobody_is_moved(there: List) -> None:
    assert there.show("M1", mode="suggest") == ("acknowledge", "marked")
    assert there.priority() == "MEDIUM" and there.comment()[0] == "[scanside pkg] suspected"


def test_who_lowers_what_it_raised_has_the_last_word(there: List) -> None:
    there.show("M1")
    there.there.steps["2.1"].ScheduledProcedureStepPriority = "LOW"
    there.show("M2")
    assert there.priority() == "LOW"
    there.show("M3", standing=False)
    assert there.priority() == "LOW"


def test_what_another_package_has_raised_too_stays_up(there: List) -> None:
    there.show("M1")
    there.show("N1", package="other")
    there.show("M2", standing=False)
    assert there.priority() == "HIGH"
    assert sorted(there.comment()[:2]) == ["[scanside other] suspected", "[scanside pkg] withdrawn"]
    there.show("N2", standing=False, package="other")
    assert there.priority() == "MEDIUM"


@pytest.mark.parametrize("state", ["IN PROGRESS", "COMPLETED", "CANCELED"])
def test_what_is_claimed_or_has_ended_stays_as_it_is(tmp_path: Path, state: str) -> None:
    there = List(tmp_path, reading(ProcedureStepState=state))
    assert there.show("M1")[0] == "acknowledge"
    assert there.priority() == "MEDIUM" and there.comment() == ["Fell.", "Ask the ward."]
    there.there.stop()
    there.ledger.close()


def test_a_claim_in_between_is_theirs(there: List) -> None:
    there.there.answer["N-SET"] = 0xC301
    assert there.show("M1") == ("acknowledge", "somebody has claimed or ended it meanwhile")
    assert there.priority() == "MEDIUM"


def test_a_reading_that_is_not_there_yet_is_waited_for(there: List) -> None:
    assert there.show("M1", study="9.9") == ("retry", "it has no reading of this study yet")
    assert there.show("M2", study="9.9", standing=False)[0] == "acknowledge"
    there.there.steps["2.1"].ScheduledWorkitemCodeSequence = [code("110004")]
    assert there.show("M3")[0] == "retry", "other work is no reading"
    there.there.steps["2.1"].ScheduledWorkitemCodeSequence = []
    assert there.show("M3")[0] == "acknowledge"


@pytest.mark.parametrize("heard", [False, True])
def test_a_try_that_died_is_done_once(there: List, monkeypatch: pytest.MonkeyPatch, heard: bool) -> None:
    change = Pull.set

    def dying(self: Pull, *given: Any) -> int:
        if heard:
            change(self, *given)
        raise PeerError("killed", "here", "try again")

    with monkeypatch.context() as patched:
        patched.setattr(Pull, "set", dying)
        with pytest.raises(PeerError):
            there.show("M1")
    assert there.show("M1")[0] == "acknowledge" and there.priority() == "HIGH"
    there.show("M2", standing=False)
    assert there.priority() == "MEDIUM"


def test_any_other_failure_is_tried_again(there: List) -> None:
    there.there.answer["N-SET"] = 0x0110
    assert there.show("M1")[0] == "retry"
    there.there.answer.clear()
    assert there.show("M1") == ("acknowledge", "raised from MEDIUM to HIGH")


def test_on_the_worklist_of_another_box(tmp_path: Path) -> None:
    theirs = Ledger(tmp_path / "theirs.sqlite")
    server = UpsServer("MANAGER", "127.0.0.1", 0, Provider(theirs, Refusals(theirs), frozenset(), {}, lambda: None))
    theirs.create_workitem("2.1", {k: v for k, v in from_dataset(reading()).items() if k[:5] != "00080"}, "RIS")
    there = List(tmp_path)
    there.there.stop()
    there.there.port = server.port
    assert there.show("M1") == ("acknowledge", "raised from MEDIUM to HIGH")
    step = theirs.workitem("2.1")["step"]
    assert text(step, "ScheduledProcedureStepPriority") == "HIGH"
    assert text(step, "CommentsOnTheScheduledProcedureStep").startswith("[scanside pkg] suspected")
    there.show("M2", standing=False)
    assert text(theirs.workitem("2.1")["step"], "ScheduledProcedureStepPriority") == "MEDIUM"
    server.stop()
    theirs.close()
    there.ledger.close()


def test_it_is_a_worklist_of_the_settings() -> None:
    one = {"kind": "ups", "name": "ris", "mode": "suggest", "ae_title": "A", "host": "h", "port": 1}
    settings = Settings(destination=[one])  # type: ignore[list-item]
    (found,) = settings.worklist_destinations
    assert isinstance(found, UpsDestination)


def test_a_step_of_another_patient_is_not_touched(tmp_path: Path) -> None:
    there = List(tmp_path, reading(PatientID="P-1"))
    assert there.show("M1", patient="P-2") == ("retry", "it has no reading of this study for this patient yet")
    assert there.priority() == "MEDIUM" and len(there.comment()) == 2
    assert there.show("M2", patient="P-1") == ("acknowledge", "raised from MEDIUM to HIGH")
    assert there.show("M3", standing=False, patient="P-2")[0] == "acknowledge"
    assert there.priority() == "HIGH", "what is taken back was said of another one"
    there.there.stop()
    there.ledger.close()
