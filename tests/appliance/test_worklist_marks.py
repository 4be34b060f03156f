"""A verdict's change of the worklist is a delivery like the others: made with it, carried out once, taken back."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydicom
import pytest
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as NoConnection

from appliance.events import Event
from appliance.governance.indication import Admission
from appliance.governance.package import load_configured
from appliance.ledger.records import Verdict
from appliance.ledger.store import Ledger
from appliance.ledger.views import studies, study_report, timeline
from appliance.services import issuing, telling
from appliance.services.delivery import _deliverer
from appliance.services.issuing import Issuer
from appliance.services.lateness import mark_late
from appliance.settings import Settings, SettingsError, load_settings
from dicom_io.header import read_header
from dicom_io.workitem import read_json, text, to_dataset, values
from tests.appliance.intake.test_retention import Box
from tests.appliance.ledger.test_store import admit, arrive, complete, issue
from tests.findings_support import Series, ct_series, verdict_on
from tests.workitems import READING, workitem

MODES = ("reprioritise", "suggest")


class Shown:
    """A box with a worklist and a study that is judged again and again."""

    def __init__(self, folder: Path, mode: str, **header: Any) -> None:
        self.box = Box(folder)
        self.settings = Settings(
            box={"state_directory": folder, "name": "BOX"},
            worklist={"web_port": 1},
            destination=[
                {"kind": "worklist", "name": "list", "mode": mode},
                {"kind": "hl7", "name": "er", "host": "h", "port": 1},
            ],
        )  # type: ignore[arg-type]
        self.settings.run_directory.mkdir(exist_ok=True)
        (folder / "series").mkdir()

        def change(dataset: pydicom.Dataset) -> None:
            dataset.PatientID, dataset.AccessionNumber, dataset.PatientName = "P-1", "ACC-1", "Doe^Jane"
            for keyword, value in header.items():
                setattr(dataset, keyword, value)

        self.series: Series = ct_series(folder / "series", change=change)
        self.issuer = Issuer(self.settings, self.ledger, load_configured(Settings()))
        for path in list(self.series.files.values())[:3]:
            assert self.box.store(read_header(path), path.read_bytes()) == "stored"
        self.study = 0
        self.stack = ExitStack()
        deliverers = {one.name: one for one in self.settings.destination}
        self.deliver = _deliverer(self.settings, self.ledger, deliverers["list"], self.stack)

    @property
    def ledger(self) -> Ledger:
        return self.box.ledger

    def issue(self, positive: bool = True, mode: str = "clinical", **changes: Any) -> None:
        if not self.study:
            (arriving,) = self.ledger.arriving_studies()
            self.study = arriving.id
            self.ledger.complete_study(arriving.id, arriving.last_instance_at, {"by": "test", "confidence": "high"})
        verdict = replace(verdict_on(self.series), positive=positive, slabs=(), key_slabs=(), mode=mode, **changes)
        self.record(verdict)

    def record(self, verdict: Verdict) -> None:
        stored = self.ledger.instances(self.study)
        self.ledger.decide(
            self.study, verdict.package, verdict.package_version, admitted=True, reason="", admission=[], selection=[],
            inputs=[[one.sop_instance_uid, one.digest] for one in stored],
        )  # fmt: skip
        row = self.ledger.take_analysis([verdict.package])
        assert row is not None
        self.issuer.issue(row, verdict, Admission(()), stored[0])

    def carry_out(self) -> list[str]:
        """Deliver what waits for the worklist; what was said of it."""
        said = []
        while (row := self.ledger.take_delivery("list")) is not None:
            outcome, reason = self.deliver(row)
            self.ledger.settle_delivery(row, outcome, reason)
            assert outcome == "acknowledge"
            said.append(reason)
        return said

    def items(self) -> list[tuple[str, str]]:
        found = self.ledger.find_workitems({}, 10)
        return [(text(one, "SOPInstanceUID"), text(one, "ScheduledProcedureStepPriority")) for one in found]


@pytest.fixture(params=MODES)
def shown(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Shown]:
    made = Shown(tmp_path, request.param)
    yield made
    made.ledger.close()


def raised(shown: Shown, before: str) -> str:
    return "HIGH" if shown.settings.worklist_destinations[0].mode == "reprioritise" else before


def test_a_positive_study_is_raised_or_marked_and_a_withdrawal_takes_it_back(shown: Shown) -> None:
    shown.ledger.create_workitem("1.1", workitem(shown.series.study_uid, "LOW"), "RIS", READING)
    shown.issue()
    (delivery,) = [one for one in study_report(shown.ledger, shown.study)["deliveries"] if one["destination"] == "list"]
    assert (delivery["object"], delivery["state"]) == ("worklist.list", "pending")
    assert len(shown.carry_out()) == 1
    assert shown.items() == [("1.1", raised(shown, "LOW"))]
    step = shown.ledger.workitem("1.1")["step"]
    assert "haemorrhage suspected" in text(step, "CommentsOnTheScheduledProcedureStep")
    assert "Triage only" in text(step, "CommentsOnTheScheduledProcedureStep")
    assert timeline(study_report(shown.ledger, shown.study))["findings_stored"] is None
    shown.issue(positive=True)
    assert shown.carry_out() == []  # it says nothing new
    shown.issue(positive=False)
    shown.carry_out()
    assert shown.items() == [("1.1", "LOW")]
    assert "withdrawn" in text(shown.ledger.workitem("1.1")["step"], "CommentsOnTheScheduledProcedureStep")
    report = study_report(shown.ledger, shown.study)
    assert [one["state"] for one in report["deliveries"] if one["destination"] == "list"] == ["acknowledged"] * 2
    assert Event.WORKITEM_MARKED in {one["name"] for one in report["events"]}
    assert studies(shown.ledger)


def test_a_negative_study_is_not_on_the_list(shown: Shown) -> None:
    shown.issue(positive=False)
    assert shown.carry_out() == shown.items() == []


def test_what_is_tried_again_after_a_kill_is_done_once(shown: Shown) -> None:
    shown.issue()
    row = shown.ledger.take_delivery("list")
    assert row is not None
    shown.deliver(row)  # and the process ends before it writes down that it did
    before = shown.ledger.workitem(shown.items()[0][0])
    assert shown.ledger.park_deliveries() == 1
    (said,) = shown.carry_out()
    assert said == (f"item 1: {'raised from MEDIUM to HIGH' if raised(shown, '') else 'marked'}")
    assert shown.ledger.workitem(before["uid"]) == before


def test_the_item_that_the_box_makes_says_whose_study_it_is(shown: Shown) -> None:
    shown.issue()
    shown.carry_out()
    ((uid, priority),) = shown.items()
    assert priority == raised(shown, "MEDIUM")
    dataset = to_dataset(shown.ledger.workitem(uid)["step"])
    (request,) = dataset.ReferencedRequestSequence
    assert (request.StudyInstanceUID, request.AccessionNumber) == (shown.series.study_uid, "ACC-1")
    assert (dataset.PatientID, dataset.PatientName) == ("P-1", "Doe^Jane")


@pytest.mark.parametrize("mode", ["evaluation", ""])
def test_what_is_only_evaluated_moves_nobody(tmp_path: Path, mode: str) -> None:
    shown = Shown(tmp_path, "reprioritise")
    shown.ledger.create_workitem("1.1", workitem(shown.series.study_uid, "LOW"), "RIS", READING)
    shown.issue(mode=mode)
    shown.carry_out()
    assert shown.items() == [("1.1", "LOW")]
    step = shown.ledger.workitem("1.1")["step"]
    assert "EVALUATION ONLY, NOT FOR CARE" in text(step, "CommentsOnTheScheduledProcedureStep")
    shown.ledger.close()


def test_what_was_only_evaluated_is_raised_once_the_package_is_clinical_and_taken_back(tmp_path: Path) -> None:
    shown = Shown(tmp_path, "reprioritise")
    shown.ledger.create_workitem("1.1", workitem(shown.series.study_uid, "LOW"), "RIS", READING)
    shown.issue(mode="evaluation")
    shown.carry_out()
    shown.issue(mode="clinical")
    shown.carry_out()
    assert shown.items() == [("1.1", "HIGH")]
    step = shown.ledger.workitem("1.1")["step"]
    assert "EVALUATION ONLY" not in text(step, "CommentsOnTheScheduledProcedureStep")
    shown.issue(mode="evaluation")
    assert shown.carry_out() == []
    shown.issue(positive=False, mode="evaluation")
    shown.carry_out()
    assert shown.items() == [("1.1", "LOW")]
    step = shown.ledger.workitem("1.1")["step"]
    assert "EVALUATION ONLY" not in text(step, "CommentsOnTheScheduledProcedureStep")
    shown.ledger.close()


def test_in_shadow_nothing_is_said(shown: Shown) -> None:
    shown.issue(mode="shadow")
    assert shown.carry_out() == []


def test_a_suspended_package_raises_nobody_but_takes_back(shown: Shown) -> None:
    shown.ledger.create_workitem("1.1", workitem(shown.series.study_uid, "LOW"), "RIS", READING)
    shown.issue()
    shown.carry_out()
    shown.issue(positive=False)
    shown.ledger.record_decision(Event.BOARD_SUSPENDED, verdict_on(shown.series).package, who="x", reason="y")
    shown.carry_out()
    assert shown.items() == [("1.1", "LOW")]
    shown.issue()
    assert shown.carry_out() == []
    assert shown.items() == [("1.1", "LOW")]


def test_a_late_study_is_marked_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown(tmp_path, "suggest")
    monkeypatch.setattr(issuing, "seconds_between", lambda *_: 95.0)
    shown.issue()
    shown.carry_out()
    step = shown.ledger.workitem(shown.items()[0][0])["step"]
    assert "LATE: 95 s after the last image" in text(step, "CommentsOnTheScheduledProcedureStep")
    shown.ledger.close()


@pytest.mark.parametrize(
    "header",
    [
        {"PatientName": "A\\B^\x07C=D"},
        {"PatientBirthDate": "yesterday"},
        {"StudyDescription": "x" * 64, "PatientSex": "?"},
    ],
)
def test_whatever_a_header_holds_the_item_can_be_read(tmp_path: Path, header: dict[str, str]) -> None:
    shown = Shown(tmp_path, "reprioritise", **header)
    shown.issue()
    shown.carry_out()
    ((uid, _),) = shown.items()
    step = shown.ledger.workitem(uid)["step"]
    read = read_json(json.dumps(step).encode())
    assert {key: one for key, one in read.items() if one["vr"] != "SQ"} == {
        key: one for key, one in step.items() if one["vr"] != "SQ"
    }, "it is read as it was written"
    assert to_dataset(step).ProcedureStepState == "SCHEDULED"
    shown.ledger.close()


def with_vendor(shown: Shown) -> None:
    """There is a vendor's worklist, too."""
    vendor = {"kind": "rest", "name": "vendor", "mode": "suggest", "url": "https://h/", "body": "{}"}
    more = Settings(destination=[vendor]).destination  # type: ignore[list-item]
    shown.issuer._settings = shown.settings.model_copy(update={"destination": [*shown.settings.destination, *more]})


def test_a_backslash_in_a_value_is_no_list_of_values(tmp_path: Path) -> None:
    shown = Shown(tmp_path, "suggest", PatientID="AB\\12", StudyDescription="CT\\head")
    shown.issue()
    shown.carry_out()
    step = shown.ledger.workitem(shown.items()[0][0])["step"]
    assert (text(step, "PatientID"), text(step, "ProcedureStepLabel")) == ("AB 12", "Read CT head")
    shown.ledger.close()


def test_no_alert_and_no_other_worklist_waits_for_one_that_cannot_be_told(
    shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ValueError("a header that nobody foresaw")

    with_vendor(shown)
    with monkeypatch.context() as patch:
        patch.setattr(telling, "render_mark", fails)
        shown.issue()
    shown.ledger.abandon_findings(3)
    report = study_report(shown.ledger, shown.study)
    states = {one["object"]: one["state"] for one in report["deliveries"]}
    assert states == {"alert.er": "pending", "worklist.list": "dead", "worklist.vendor": "pending"}
    (failed,) = [one["detail"] for one in report["events"] if one["name"] == Event.FINDING_FAILED]
    assert "ValueError" in failed["reason"] and "nobody foresaw" not in failed["reason"], "its words may be a patient's"
    shown.issue()
    assert len(shown.carry_out()) == 1, "the next verdict tells it"


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), OperationalError("", {}, Exception("locked")), NoConnection()],
)
def test_where_the_disk_or_the_ledger_fails_the_whole_verdict_is_tried_again(
    shown: Shown, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(telling, "render_mark", fails)
        with pytest.raises(type(error)):
            shown.issue()
    assert shown.ledger.verdicts(1) == []
    shown.ledger.park_analysis(1, "the disk is full", 0.0)
    row = shown.ledger.take_analysis([verdict_on(shown.series).package])
    assert row is not None
    verdict = replace(verdict_on(shown.series), slabs=(), key_slabs=(), mode="clinical")
    shown.issuer.issue(row, verdict, Admission(()), shown.ledger.instances(shown.study)[0])
    assert len(shown.carry_out()) == 1


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("[worklist]\n", "worklist: neither web_port nor port is set"),
        ('[worklist]\nport = 104\nhost = "0.0.0.0"', "beyond this machine port needs"),
        ('[worklist]\nweb_port = 80\nhost = "10.0.0.1"\ntoken_file = "t"', "beyond this machine web_port needs tls"),
        ("[worklist]\nport = 11112", "worklist.port are both 11112"),
        ('[[destination]]\nkind = "worklist"\nname = "w"\nmode = "suggest"', "there is no [worklist]"),
        ('[[destination]]\nkind = "worklist"\nname = "w"', "destination.0.mode: field required"),
        ('[worklist]\nport = 1\nreading_codes = ["110005"]', "worklist.reading_codes.0"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, written: str, said: str) -> None:
    path = tmp_path / "scanside.toml"
    path.write_text(written)
    with pytest.raises(SettingsError) as caught:
        load_settings(path)
    assert said in str(caught.value)


def test_the_paths_of_a_worklist_start_at_the_file(tmp_path: Path) -> None:
    path = tmp_path / "scanside.toml"
    path.write_text(
        '[worklist]\nweb_port = 443\nhost = "0.0.0.0"\ntoken_file = "t"\n'
        '[worklist.tls]\ncertificate = "c"\nkey = "k"\n'
        '[[worklist.subscriber]]\nae_title = "P"\nhost = "h"\nport = 104\n'
    )
    worklist = load_settings(path).worklist
    assert worklist is not None and worklist.tls is not None
    assert (worklist.token_file, worklist.tls.key) == (tmp_path / "t", tmp_path / "k")


def late_box(folder: Path, seconds: float, study: str = "1.2.3") -> tuple[Settings, Ledger]:
    """A worklist with one reading of a study, and a budget of so many seconds."""
    third = seconds / 3
    settings = Settings(
        box={"state_directory": folder},
        models={"packages": ["pkg"]},
        worklist={"port": 11114},
        destination=[{"kind": "worklist", "name": "reading", "mode": "reprioritise"}],
        budget={"completion_seconds": third, "analysis_seconds": third, "alert_seconds": third},
    )  # type: ignore[arg-type]
    ledger = Ledger(settings.ledger_path)
    ledger.create_workitem("1.1", workitem(study), "RIS", READING)
    return settings, ledger


def line(ledger: Ledger, uid: str = "1.1") -> str:
    step = ledger.workitem(uid)["step"]
    assert text(step, "ScheduledProcedureStepPriority") == "MEDIUM", "nobody is moved because an answer is late"
    return text(step, "CommentsOnTheScheduledProcedureStep")


@pytest.mark.parametrize("end", ["issued", "refused"])
def test_a_study_without_an_answer_in_time_is_marked_until_it_has_one(tmp_path: Path, end: str) -> None:
    settings, ledger = late_box(tmp_path, 0.003)
    study = arrive(ledger)
    time.sleep(0.01)
    assert mark_late(settings, ledger) and line(ledger).startswith("[scanside] LATE: there is no answer yet")
    assert not mark_late(settings, ledger)
    ledger.create_workitem("1.4", workitem("1.2.3"), "RIS", READING)
    assert "LATE" in line(ledger, "1.4"), "an item that comes later shows it, too"
    complete(ledger, study)
    assert not mark_late(settings, ledger) and "LATE" in line(ledger)
    if end == "issued":
        issue(ledger, study)
    else:
        admit(ledger, study, admitted=False)
    assert mark_late(settings, ledger) and line(ledger) == line(ledger, "1.4") == ""
    assert not mark_late(settings, ledger)


def test_a_study_that_was_set_aside_stays_marked(tmp_path: Path) -> None:
    settings, ledger = late_box(tmp_path, 0.003)
    study = arrive(ledger)
    complete(ledger, study)
    admit(ledger, study)
    row = ledger.take_analysis(["pkg"])
    assert row is not None
    ledger.fail_analysis(row["id"], "broken", 1, 0.0)
    time.sleep(0.01)
    assert mark_late(settings, ledger) and "LATE" in line(ledger)
    assert not mark_late(settings, ledger)


def test_within_the_budget_nothing_is_marked_and_no_item_is_made(tmp_path: Path) -> None:
    settings, ledger = late_box(tmp_path, 3600)
    arrive(ledger)
    assert not mark_late(settings, ledger) and line(ledger) == ""
    settings, ledger = late_box(tmp_path / "other", 0.003, "9.9")
    arrive(ledger)
    time.sleep(0.01)
    assert mark_late(settings, ledger) and line(ledger) == ""
    assert len(ledger.find_workitems({}, 10)) == 1


def _again(shown: Shown, patient: str) -> None:
    """The images come again under another Patient ID; the study is complete once more with the next answer."""
    shown.study = 0
    for path in list(shown.series.files.values())[:3]:
        dataset = pydicom.dcmread(path)
        dataset.PatientID = patient
        dataset.save_as(path)
        assert shown.box.store(read_header(path), path.read_bytes()) == "conflict"


def test_images_that_come_again_under_another_patient_id_leave_the_wrong_patient_off_the_list(shown: Shown) -> None:
    shown.issue()
    shown.carry_out()
    _again(shown, "P-2")
    shown.issue()
    shown.carry_out()
    found = shown.ledger.find_workitems({}, 10)
    states = {text(one, "PatientID"): text(one, "ProcedureStepState") for one in found}
    assert states == {"P-1": "CANCELED", "P-2": "SCHEDULED"}
    (right,) = [one for one in found if text(one, "PatientID") == "P-2"]
    assert text(right, "ScheduledProcedureStepPriority") == raised(shown, "MEDIUM")
    _again(shown, "P-3")
    shown.issue(positive=False)
    shown.carry_out()
    assert {text(one, "ProcedureStepState") for one in shown.ledger.find_workitems({}, 10)} == {"CANCELED"}


@pytest.mark.parametrize(
    ("header", "accession", "comment"),
    [
        ({"AccessionNumber": "A" * 16}, "A" * 16, ""),
        ({"AccessionNumber": "A" * 17}, "", "A" * 17),
        ({"AccessionNumber": ""}, "R-1", ""),
        ({"AccessionNumber": "A-1"}, "A-1", ""),
    ],
)
def test_an_item_names_the_order_whole_or_not_at_all(
    tmp_path: Path, header: dict[str, str], accession: str, comment: str
) -> None:
    request = pydicom.Dataset()
    request.AccessionNumber = "R-1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the value is too long
        shown = Shown(tmp_path, "suggest", RequestAttributesSequence=[request], **header)
    shown.issue()
    shown.carry_out()
    (item,) = shown.ledger.find_workitems({}, 10)
    (asked,) = values(item, "ReferencedRequestSequence")
    assert text(asked, "AccessionNumber") == accession
    said = text(item, "CommentsOnTheScheduledProcedureStep")
    assert (f"The accession number is too long here: {comment}" in said) == bool(comment)
    shown.ledger.close()


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("Yamada^Tarou=山田^太郎=やまだ^たろう", {"Alphabetic", "Ideographic", "Phonetic"}),
        ("=山田^太郎", {"Ideographic"}),
        ("==やまだ^たろう", {"Phonetic"}),
        ("Doe^Jane", {"Alphabetic"}),
    ],
)
def test_an_item_names_the_patient_in_each_script_that_the_images_have(
    tmp_path: Path, name: str, groups: set[str]
) -> None:
    shown = Shown(tmp_path, "suggest", SpecificCharacterSet="ISO_IR 192", PatientName=name)
    shown.issue()
    shown.carry_out()
    (item,) = shown.ledger.find_workitems({}, 10)
    (said,) = values(item, "PatientName")
    assert {one for one, value in said.items() if value} == groups
    assert set(filter(None, name.split("="))) == set(said.values())
    shown.ledger.close()
