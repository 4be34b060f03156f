"""The box as performer of somebody else's worklist: one claim, one end, whatever dies in between."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import ValidationError
from pydicom.dataset import Dataset

from appliance import checks
from appliance.ledger.store import Ledger
from appliance.ledger.views import event_counts, study_report, verify_events
from appliance.services.performing import code_of, outcome_of, study_of
from appliance.settings import Performing, Settings
from appliance.worklist import performer as module
from appliance.worklist.dimse import Provider
from appliance.worklist.performer import Outcome, Output, Performer, is_ours, subject_of
from appliance.worklist.refusals import Refusals
from dicom_io.errors import PeerError
from dicom_io.scu import Peer
from dicom_io.ups import UpsServer
from dicom_io.ups_user import Pull
from dicom_io.workitem import from_dataset, text, values
from tests.appliance.intake.test_retention import Box
from tests.builders import header
from tests.foreign_worklist import ForeignWorklist, ai_task, code
from tests.scheduled import write_item

PATIENT = {"patient_id": "P1", "issuer_of_patient_id": "HOSP", "accession_number": "A1"}
DONE = Outcome(True, "pkg 1", outputs=(Output("1.1", "1.1.9", (("1.2.840.1", "2.25.7"),), ae_title="PACS"),))
REFUSED = Outcome(False, reason="the study was refused by pkg: it is a knee")


class Work:
    """A box with one study, and a worklist elsewhere."""

    def __init__(self, folder: Path, *steps: Dataset) -> None:
        self.box = Box(folder)
        self.box.store(header(1, study="1.1", series="1.1.1", **PATIENT))
        self.ledger = self.box.ledger
        self.there = ForeignWorklist(*(steps or (ai_task("2.1"),)))
        self.outcome: Outcome | None = None
        self.outcome_of: Callable[[Any], Outcome | None] = lambda task: self.outcome

    def performer(self) -> Performer:
        """As after a start."""
        return Performer(
            self.ledger,
            lambda: Peer("MANAGER", "127.0.0.1", self.there.port),
            "SCANSIDE",
            [code_of("110004^DCM")],
            code_of("SCANSIDE^99SCANSIDE", "box"),
            lambda step, uid: study_of(self.box.settings, self.ledger, step, uid),
            lambda task: self.outcome_of(task),
            poll_seconds=0.1,
            answer_seconds=10.0,
        )

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.performer().step()

    def task(self, uid: str = "2.1") -> Any:
        return self.ledger.task(uid)

    def close(self) -> None:
        self.there.stop()
        self.ledger.close()


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Work]:
    one = Work(tmp_path)
    yield one
    one.close()


def test_a_task_is_claimed_and_completed_with_what_came_of_it(work: Work) -> None:
    work.step(2)
    assert work.there.state("2.1") == "IN PROGRESS" and work.task().state == "claimed"
    assert work.there.claims == [("2.1", work.task().transaction_uid)]
    work.outcome = DONE
    work.step(2)
    assert work.there.told == [("2.1", "IN PROGRESS"), ("2.1", "COMPLETED")] and work.task().state == "completed"
    (done,) = work.there.steps["2.1"].UnifiedProcedureStepPerformedProcedureSequence
    (output,) = done.OutputInformationSequence
    assert (output.StudyInstanceUID, output.SeriesInstanceUID) == ("1.1", "1.1.9")
    assert output.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == "2.25.7"
    assert output.DICOMRetrievalSequence[0].RetrieveAETitle == "PACS"
    assert done.PerformedWorkitemCodeSequence[0].CodeValue == "110004"
    assert done.PerformedStationNameCodeSequence[0].CodeMeaning == "box"
    counts = event_counts(work.ledger)
    assert all(counts[f"task.{one}"] == 1 for one in ("found", "claimed", "finishing", "completed"))
    assert verify_events(work.ledger) is None


def test_a_refused_study_cancels_its_task_with_the_reason(work: Work) -> None:
    work.step()
    work.outcome = REFUSED
    work.step()
    assert work.there.state("2.1") == "CANCELED" and work.task().state == "canceled"
    (progress,) = work.there.steps["2.1"].ProcedureStepProgressInformationSequence
    assert progress.ReasonForCancellation == REFUSED.reason
    assert progress.ProcedureStepDiscontinuationReasonCodeSequence[0].CodeValue == "110513"


@pytest.mark.parametrize(
    "step",
    [
        ai_task("2.1", study="1.7"),
        ai_task("2.1", study="1"),
        ai_task("2.1", patient="P2"),
        ai_task("2.1", InputReadinessState="INCOMPLETE"),
        ai_task("2.1", ScheduledStationNameCodeSequence=[code("OTHER", "99X")]),
        ai_task("2.1", ScheduledWorkitemCodeSequence=[code("110005")]),
        ai_task("2.1", ProcedureStepState="IN PROGRESS"),
    ],
    ids=[
        "a study that is not here",
        "a number",
        "another patient",
        "not ready",
        "another station",
        "other work",
        "claimed",
    ],
)
def test_what_is_not_ours_is_left_alone(tmp_path: Path, step: Dataset) -> None:
    work = Work(tmp_path, step)
    work.step(2)
    assert work.there.claims == [] and work.task() is None
    work.close()


def test_one_for_our_station_is_ours(tmp_path: Path) -> None:
    stations = [code("OTHER", "99X"), code("SCANSIDE", "99SCANSIDE")]
    work = Work(tmp_path, ai_task("2.1", ScheduledStationNameCodeSequence=stations))
    work.step()
    assert work.there.state("2.1") == "IN PROGRESS"
    work.close()


def test_which_study_a_step_is_about() -> None:
    prior, study = Dataset(), Dataset()
    prior.StudyInstanceUID, study.StudyInstanceUID = "1.0", "1.1"
    assert subject_of(from_dataset(ai_task("2.1", InputInformationSequence=[prior, study]))) == "1.1"
    both = ai_task("2.1", InputInformationSequence=[prior, study], ReferencedRequestSequence=[])
    assert subject_of(from_dataset(both)) == "", "it does not say which"
    assert subject_of(from_dataset(ai_task("2.1", InputInformationSequence=[]))) == "1.1"
    assert subject_of(from_dataset(ai_task("2.1", ReferencedRequestSequence=[]))) == "1.1"
    assert not is_ours({}, {})


def somebody_claims(work: Work, uid: str = "2.1") -> Callable[[], None]:
    def claim() -> None:
        work.there.steps[uid].ProcedureStepState, work.there.locks[uid] = "IN PROGRESS", "9.9"

    return claim


def test_a_claim_that_somebody_else_made_first_is_theirs(work: Work) -> None:
    work.there.after_find = somebody_claims(work)
    work.there.answer["N-SET"] = 0x0000  # a worklist that looks at no lock
    work.outcome = DONE
    work.step(3)
    assert work.task().state == "lost" and work.there.locks == {"2.1": "9.9"} and work.there.told == []
    assert "UnifiedProcedureStepPerformedProcedureSequence" not in work.there.steps["2.1"]
    assert "ProcedureStepProgressInformationSequence" not in work.there.steps["2.1"]


def test_two_boxes_with_one_name_do_not_both_have_it(tmp_path: Path, work: Work) -> None:
    other = Work(tmp_path / "other")
    other.there.stop()
    other.there = work.there
    # Both have seen it scheduled before either claims.
    seen = work.there.after_find
    work.there.after_find = lambda: (setattr(work.there, "after_find", seen), other.step())[0]
    work.step()
    assert [work.task().state, other.task().state] == ["lost", "claimed"]
    assert work.there.claims == [("2.1", other.task().transaction_uid)]
    other.ledger.close()


def both_claimed(tmp_path: Path) -> Work:
    work = Work(tmp_path, ai_task("2.1"), ai_task("2.2"), ai_task("2.3", study="1.2"))
    work.step(2)
    assert [work.task(uid).state for uid in ("2.1", "2.2")] == ["claimed", "claimed"]
    work.box.store(header(2, study="1.2", series="1.2.1", **PATIENT))
    return work


def test_a_task_whose_outcome_cannot_be_told_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    work = both_claimed(tmp_path)

    def outcome(task: Any) -> Outcome | None:
        if task.uid == "2.1":
            raise ValueError("Doe^Jane")
        return DONE

    work.outcome_of = outcome
    with caplog.at_level(logging.ERROR):
        work.step(3)
    assert [work.task(uid).state for uid in ("2.1", "2.2", "2.3")] == ["claimed", "completed", "completed"]
    assert work.task("2.1").reason == "ValueError" and complaints(caplog) == ["ERROR"]
    work.outcome_of = lambda task: DONE
    work.step()
    assert work.task("2.1").state == "completed" and work.task("2.1").reason == ""
    work.close()


def test_a_task_that_the_worklist_does_not_answer_for_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    work = both_claimed(tmp_path)
    work.outcome = DONE
    broken: list[Pull] = []
    ask = Pull.set

    def set_(self: Pull, uid: str, changes: Any, lock: str) -> int:
        if uid == "2.1" or self in broken:
            broken.append(self)
            raise PeerError("it did not answer N-SET within 10 s", "MANAGER", "see its log")
        return ask(self, uid, changes, lock)

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(Pull, "set", set_)
        work.step(3)
    assert [work.task(uid).state for uid in ("2.1", "2.2", "2.3")] == ["finishing", "completed", "completed"]
    assert "did not answer N-SET" in work.task("2.1").reason and complaints(caplog) == ["ERROR"]
    work.step()
    assert work.task("2.1").state == "completed"
    work.close()


def test_a_step_that_cannot_be_looked_at_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    work = Work(tmp_path, ai_task("2.1"), ai_task("2.2"))

    def odd(step: Any) -> str:
        if text(step, "SOPInstanceUID") == "2.1":
            raise ValueError("Doe^Jane")
        return subject_of(step)

    monkeypatch.setattr(module, "subject_of", odd)
    performer = work.performer()
    with caplog.at_level(logging.ERROR):
        performer.step()
        performer.step()
    assert work.task("2.1") is None and work.task("2.2").state == "claimed"
    assert complaints(caplog) == ["ERROR"], "it is said once"
    work.close()


class Died(BaseException):
    """kill -9, at a place of our choice."""


def dying(monkeypatch: pytest.MonkeyPatch, at: int, *, heard: bool) -> None:
    """Die at that request: before it is sent, or with the answer unread."""
    count = 0
    request = Pull._request

    def counted(self: Pull, name: str, send: Callable[[], Any]) -> Any:
        nonlocal count
        count += 1
        if count == at and not heard:
            raise Died
        answer = request(self, name, send)
        if count == at:
            raise Died
        return answer

    monkeypatch.setattr(Pull, "_request", counted)


@pytest.mark.slow
@pytest.mark.parametrize("heard", [False, True], ids=["before it is sent", "with the answer unread"])
@pytest.mark.parametrize("outcome", [DONE, REFUSED], ids=["completed", "canceled"])
def test_wherever_it_dies_it_claims_once_and_ends_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: Outcome, heard: bool
) -> None:
    final = "COMPLETED" if outcome.completed else "CANCELED"
    for at in range(1, 4):  # the claim, what it says at its end, the end
        work = Work(tmp_path / str(at))
        with monkeypatch.context() as patched:
            dying(patched, at, heard=heard)
            for _ in range(3):
                try:
                    work.step()
                    work.outcome = outcome
                except Died:
                    break
            else:
                pytest.fail(f"there were not {at} requests")
        work.outcome = outcome
        work.step(4)
        assert work.task().state == final.lower(), (at, heard)
        assert work.there.told == [("2.1", "IN PROGRESS"), ("2.1", final)]
        assert len({lock for _, lock in work.there.claims}) == 1
        work.close()


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.levelname for one in caplog.records if one.name == module.__name__ and one.levelno > logging.INFO]


@pytest.mark.parametrize(("state", "status"), [("IN PROGRESS", 0x0110), ("COMPLETED", 0xC304), ("N-SET", 0x0110)])
def test_what_is_refused_for_another_reason_is_told_once_and_tried_again(
    work: Work, caplog: pytest.LogCaptureFixture, state: str, status: int
) -> None:
    work.there.answer = {state: status}
    work.outcome = DONE
    with caplog.at_level(logging.ERROR):
        work.step(4)
    assert complaints(caplog) == ["ERROR"] and f"0x{status:04X}" in caplog.text
    assert f"0x{status:04X}" in work.task().reason
    work.there.answer = {}
    work.step(3)
    assert work.there.state("2.1") == "COMPLETED" and work.task().state == "completed" and work.task().reason == ""


@pytest.mark.parametrize("end", ["CANCELED", "gone", "COMPLETED", "another lock"])
def test_a_task_that_is_taken_from_us_is_lost_and_told(work: Work, caplog: pytest.LogCaptureFixture, end: str) -> None:
    work.step(2)
    if end == "gone":
        del work.there.steps["2.1"]
    elif end == "another lock":
        somebody_claims(work)()
    else:
        work.there.steps["2.1"].ProcedureStepState = end
    work.outcome = REFUSED if end == "COMPLETED" else DONE
    work.step(2)
    assert work.task().state == "lost" and event_counts(work.ledger)["task.lost"] == 1
    assert complaints(caplog) == ["ERROR"]


def test_a_worklist_that_is_away_costs_nothing(work: Work) -> None:
    work.step(2)
    work.there.stop()
    work.outcome = DONE
    with pytest.raises(PeerError):
        work.step()
    assert work.task().state == "claimed"
    there, work.there = work.there, ForeignWorklist(*work.there.steps.values())
    work.there.locks = there.locks
    work.step()
    assert work.there.state("2.1") == "COMPLETED"


def test_against_the_worklist_of_another_box(tmp_path: Path) -> None:
    """Our own provider, with its own ledger: its final state requirements hold."""
    theirs = Ledger(tmp_path / "theirs.sqlite")
    owner = Provider(theirs, Refusals(theirs), frozenset(), {}, lambda: None)
    server = UpsServer("MANAGER", "127.0.0.1", 0, owner)
    steps = {uid: from_dataset(ai_task(uid)) for uid in ("2.1", "2.2")}
    for uid, step in steps.items():
        theirs.create_workitem(uid, {key: one for key, one in step.items() if key[:5] != "00080"}, "RIS")
    work = Work(tmp_path)
    work.there.stop()
    work.there.port = server.port
    work.step()
    assert [text(theirs.workitem(uid)["step"], "ProcedureStepState") for uid in steps] == ["IN PROGRESS"] * 2
    work.outcome = DONE
    work.step()
    for uid in steps:
        ended = theirs.workitem(uid)["step"]
        (done,) = values(ended, "UnifiedProcedureStepPerformedProcedureSequence")
        assert text(ended, "ProcedureStepState") == "COMPLETED"
        assert text(values(done, "OutputInformationSequence")[0], "StudyInstanceUID") == "1.1"
    server.stop()
    theirs.close()
    work.ledger.close()


# --- what the ledger says of a task's end -------------------------------------------------------------------


def report_settings(box: Box) -> Settings:
    pacs = {"kind": "dicom", "name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": 104}
    return Settings(**{**box.settings.model_dump(exclude_unset=True), "destination": [pacs]})


def test_a_task_ends_when_its_objects_are_in_the_archive(work: Work) -> None:
    settings = report_settings(work.box)
    work.step(2)
    assert outcome_of(settings, work.ledger, "pkg", work.task()) is None, "the study is still arriving"
    work.box.finish(1)
    report = next(iter(work.box.settings.findings_directory.glob("*/report.dcm")))
    instance = Dataset()
    instance.SOPClassUID, instance.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.88.33", "2.25.1.1"
    instance.SeriesInstanceUID = "1.1.9"
    write_item(instance, report)
    outcome = outcome_of(settings, work.ledger, "pkg", work.task())
    assert outcome is not None and outcome.completed and outcome.by == "pkg 1"
    (output,) = outcome.outputs
    assert output.ae_title == "PACS" and output.study_instance_uid == "1.1"
    assert output.instances == ((str(instance.SOPClassUID), "2.25.1.1"),)


def test_what_no_archive_took_is_no_output(work: Work) -> None:
    work.step(2)
    work.box.finish(1, delivered=False)
    outcome = outcome_of(report_settings(work.box), work.ledger, "pkg", work.task())
    assert outcome == Outcome(True, "pkg 1")


def test_a_delivery_that_is_on_its_way_is_waited_for(work: Work) -> None:
    work.step(2)
    work.box.finish(1, delivered=False)
    (row,) = [one for one in study_report(work.ledger, 1)["deliveries"] if one["destination"] == "pacs"]
    work.ledger.requeue_delivery(row["id"], ["pacs"])
    assert outcome_of(report_settings(work.box), work.ledger, "pkg", work.task()) is None


@pytest.mark.parametrize("failed", [False, True])
def test_a_study_without_a_verdict_is_canceled(work: Work, failed: bool) -> None:
    work.step(2)
    ledger = work.ledger
    (arriving,) = ledger.arriving_studies()
    ledger.complete_study(arriving.id, arriving.last_instance_at, {"by": "test", "confidence": "high"})
    ledger.decide(arriving.id, "pkg", "1", admitted=failed, reason="a knee", admission=[], selection=[], inputs=[])
    if failed:
        row = cast(Any, ledger.take_analysis(["pkg"]))
        ledger.fail_analysis(row["id"], "a knee", 1, 0.0)
    outcome = outcome_of(report_settings(work.box), ledger, "pkg", work.task())
    assert outcome is not None and not outcome.completed and outcome.reason.endswith(" by pkg: a knee")


def test_check_asks_for_tasks(work: Work) -> None:
    section = Performing(ae_title="MANAGER", host="127.0.0.1", port=work.there.port, workitem_codes=["110004^DCM"])
    assert checks._performer(section, "SCANSIDE").endswith("1 tasks are scheduled there")
    work.there.stop()
    with pytest.raises(PeerError):
        checks._performer(section, "SCANSIDE")


def test_its_package_must_run() -> None:
    section = {"ae_title": "A", "host": "h", "port": 1, "workitem_codes": ["1^X"], "package": "other"}
    with pytest.raises(ValidationError, match="not among models"):
        Settings(performer=section)  # type: ignore[arg-type]
