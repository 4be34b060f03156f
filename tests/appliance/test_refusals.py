"""A study that was not analysed: who hears of it, what is said, and how often."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, date, datetime
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import pytest
from highdicom.sr import srread
from pydicom import dcmread
from pydicom.uid import ComprehensiveSRStorage

from appliance.accounting import account
from appliance.governance.board import make_exception, revoke
from appliance.ledger import schema as t
from appliance.ledger.database import LedgerError, later
from appliance.ledger.records import Verdict
from appliance.ledger.store import NewFinding
from appliance.ledger.views import event_counts, study_report
from appliance.services.routing import in_place_of
from appliance.settings import DicomDestination, Hl7Destination, Limit, Provisional
from appliance.settings import Study as StudySettings
from appliance.show import study_view, summary
from dicom_io.header import Header
from tests.appliance.intake.test_retention import Box
from tests.appliance.test_clearance import LATER, NOBODY_KNOWS, Site, criterion, image, let_days_pass
from tests.appliance.test_services import engine_beside, states, wait_until
from tests.builders import header
from tests.dicom_io.support import ct, head
from tests.findings_support import dciodvfy_errors
from tests.peers import program

PIXELS = head(12, False)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    one = Site(tmp_path)
    yield one
    one.stop()


def box_of_a_child(folder: Path, *, refusals: bool) -> Box:
    """A box that two interface engines listen to, of which one may want to hear of refusals; a child's head came."""
    box = Box(folder)
    box.settings.run_directory.mkdir(exist_ok=True)
    er = Hl7Destination(kind="hl7", name="er", host="127.0.0.1", port=2575, refusals=refusals)
    other = Hl7Destination(kind="hl7", name="other", host="127.0.0.1", port=2576)
    box.settings = box.settings.model_copy(update={"destination": [er, other]})
    bring(box, range(1, 31), patient_age="009Y", patient_birth_date="")
    return box


def bring(box: Box, numbers: Any, **changes: Any) -> None:
    for number in numbers:
        one = header(number, study="1.1", series="1.1.1", z=5.0 * number, **changes)
        file = BytesIO()
        image = ct(PIXELS, 12, position=(0.0, 0.0, 5.0 * number), instance_number=number, PatientAge=one.patient_age)
        image.save_as(file, enforce_file_format=True)
        assert box.store(one, file.getvalue()) in ("stored", "conflict")


def let_decide(box: Box, state: str = "refused") -> None:
    box.ledger.close_association(box.association, "released")
    engine = engine_beside(box)
    wait_until(engine, lambda: states(box, 1) == [state] and not box.ledger.arriving_studies())


def messages(box: Box) -> list[str]:
    return [path.read_bytes().decode("utf-8") for path in sorted(box.settings.findings_directory.rglob("*.hl7"))]


def of_patient(patient: str, number: int, **changes: Any) -> tuple[Header, bytes]:
    """Slice ``number`` of study 1.1 as a scanner that knows the patient sends it, and its file."""
    one = header(number, study="1.1", z=5.0 * number, patient=patient, patient_id=patient, **changes)
    file = BytesIO()
    image = ct(PIXELS, 12, position=(0.0, 0.0, 5.0 * number), instance_number=number, PatientID=patient)
    image.save_as(file, enforce_file_format=True)
    return one, file.getvalue() + one.sop_instance_uid.encode()


def bring_two_patients(box: Box, *, another: str = "BOB") -> None:
    """First a scout under the name of who lay there before, then the head of ANN."""
    scout = of_patient(another, 1, series="1.1.9", image_type=("ORIGINAL", "PRIMARY", "LOCALIZER"))
    for one, content in (scout, *(of_patient("ANN", number, series="1.1.1") for number in range(1, 31))):
        assert box.store(one, content) == "stored"


def patient_of(message: str) -> str:
    (segment,) = [line for line in message.split("\r") if line.startswith("PID")]
    return segment.split("|")[3].split("^")[0]


def test_by_default_a_refusal_tells_nobody(tmp_path: Path) -> None:
    box = box_of_a_child(tmp_path, refusals=False)
    let_decide(box)
    assert (messages(box), study_report(box.ledger, 1)["deliveries"]) == ([], [])
    box.ledger.close()


def test_who_wants_to_hear_of_it_is_told_once_and_without_an_alert(tmp_path: Path) -> None:
    box = box_of_a_child(tmp_path, refusals=True)
    let_decide(box)
    (message,) = messages(box)
    assert "not analysed: paediatric (age 009Y; label: 18 years or older)" in message
    segments = [line.split("|") for line in message.split("\r") if line]
    kinds = {one[3].split("^")[1]: one for one in segments if one[0] == "OBX"}
    assert next(one[5] for one in kinds.values() if one[5] == "refusal")
    assert all(len(one) < 9 or one[8] == "" for one in kinds.values()), "no abnormal flag, and no normal one"
    assert not any("robability" in name or "emorrhage" in name for name in kinds)
    assert segments[0][10] == "T", "the package is only evaluated"
    (delivery,) = study_report(box.ledger, 1)["deliveries"]
    assert (delivery["object"], delivery["destination"], delivery["state"]) == ("refusal.er", "er", "pending")
    assert box.ledger.told(1) == {}
    assert event_counts(box.ledger)["study.refused"] == 1
    # It comes again with one slice more: it is refused again, and nobody hears of it again.
    box.association = box.ledger.open_association("S", "B", "127.0.0.1")
    bring(box, [31], patient_age="009Y", patient_birth_date="")
    box.ledger.close_association(box.association, "released")
    engine = engine_beside(box)
    wait_until(engine, lambda: event_counts(box.ledger)["study.refused"] == 2)
    assert messages(box) == [message]
    assert len(study_report(box.ledger, 1)["deliveries"]) == 1
    box.ledger.close()


def test_an_archive_that_wants_it_gets_one_report_that_finds_nothing_out(tmp_path: Path) -> None:
    box = box_of_a_child(tmp_path, refusals=False)
    archives = [
        DicomDestination(kind="dicom", name=name, ae_title="PACS", host="h", port=104, refusals=wanted)
        for name, wanted in (("pacs", True), ("other pacs", False))
    ]
    box.settings = box.settings.model_copy(update={"destination": [*box.settings.destination, *archives]})
    let_decide(box)
    assert messages(box) == []
    (delivery,) = study_report(box.ledger, 1)["deliveries"]
    assert (delivery["object"], delivery["destination"], delivery["state"]) == ("report", "pacs", "pending")
    paths = {path.stem: path for path in box.settings.findings_directory.rglob("*.dcm")}
    assert set(paths) == {"report", "report.2d", "capture.summary"}
    assert dcmread(paths["report"]).SOPInstanceUID == delivery["uid"]
    assert dcmread(paths["report.2d"]).SOPClassUID == ComprehensiveSRStorage
    assert dciodvfy_errors(paths.pop("capture.summary")) == []
    for path in paths.values():
        made = dcmread(path)
        assert (made.CompletionFlag, made.VerificationFlag) == ("PARTIAL", "UNVERIFIED")
        assert dciodvfy_errors(path) == []
        (group,) = srread(path).content.get_image_measurement_groups()
        assert group.finding_type is None and group.get_measurements() == []
        (result,) = group.get_qualitative_evaluations()
        assert result.value.value == "NOT-ANALYSED"
        done = subprocess.run([program("dsrdump"), "+Pl", str(path)], capture_output=True, text=True, check=True)
        assert "paediatric (age 009Y; label: 18 years or older)" in done.stdout
        assert "Nothing is said of haemorrhage" in done.stdout
        assert "No hemorrhage" not in done.stdout and "Probability" not in done.stdout
    row = box.ledger.take_delivery("pacs")
    assert row is not None
    box.ledger.settle_delivery(row, "decline", "it takes none", instead=in_place_of(archives[0], "report"))
    (row,) = [one for one in study_report(box.ledger, 1)["deliveries"] if one["state"] == "pending"]
    assert row["object"] == "report.2d"
    box.ledger.close()


def test_a_refusal_that_was_told_is_no_verdict(tmp_path: Path) -> None:
    box = box_of_a_child(tmp_path, refusals=True)
    let_decide(box)
    report = study_report(box.ledger, 1)
    told = summary(report, 60.0)
    assert (told["positive"], told["probability"], told["late"]) == (None, None, False)
    assert study_view(report)
    assert box.ledger.standing_verdict(1, "pkg") is None
    (outcome,) = account(box.ledger, box.settings.spool_directory, datetime.now(UTC).date()).outcomes
    assert outcome.startswith("refused: age")
    box.ledger.close()


def test_what_is_the_boxs_own_fault_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_(*_: object, **__: object) -> None:
        raise RuntimeError("the gate is broken")

    box = box_of_a_child(tmp_path, refusals=True)
    monkeypatch.setattr("appliance.services.engine.admit", break_)
    let_decide(box)
    assert "the gate is broken" in study_report(box.ledger, 1)["analyses"][0]["reason"]
    assert messages(box) == []
    box.ledger.close()


def test_a_study_of_two_patients_is_refused_and_that_is_told_of_the_one_whose_head_it_is(tmp_path: Path) -> None:
    box = box_of_a_child(tmp_path / "child", refusals=True)
    settings, box = box.settings, Box(tmp_path / "two")
    box.settings.run_directory.mkdir(exist_ok=True)
    box.settings = box.settings.model_copy(update={"destination": settings.destination})
    bring_two_patients(box)
    let_decide(box)
    report = study_report(box.ledger, 1)
    assert "2 Patient IDs" in report["analyses"][0]["reason"]
    assert not any(name in report["analyses"][0]["reason"] for name in ("ANN", "BOB"))
    (message,) = messages(box)
    assert patient_of(message) == "ANN"
    box.ledger.close()


def test_what_no_series_could_be_chosen_from_is_told_of_the_patient_with_most_images(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.settings.run_directory.mkdir(exist_ok=True)
    er = Hl7Destination(kind="hl7", name="er", host="127.0.0.1", port=2575, refusals=True)
    box.settings = box.settings.model_copy(update={"destination": [er]})
    one, content = of_patient("BOB", 1, series="1.1.9", image_type=("ORIGINAL", "PRIMARY", "LOCALIZER"))
    box.store(one, content)
    for number in range(1, 31):
        box.store(*of_patient("ANN", number, series="1.1.1", convolution_kernel="BONE"))
    let_decide(box)
    assert [patient_of(one) for one in messages(box)] == ["ANN"]
    box.ledger.close()


@pytest.mark.parametrize("how", ["refused", "set aside"])
def test_a_withdrawal_goes_to_the_patient_of_the_images_that_were_read(tmp_path: Path, how: str) -> None:
    """Also where what came first, or what made it be refused, is of another one."""
    box = Box(tmp_path)
    box.settings.run_directory.mkdir(exist_ok=True)
    er = Hl7Destination(kind="hl7", name="er", host="127.0.0.1", port=2575)
    box.settings = box.settings.model_copy(update={"destination": [er]})
    bring_two_patients(box)
    inputs = [
        [one.sop_instance_uid, one.digest]
        for one in box.ledger.instances(1)
        if one.header.series_instance_uid == "1.1.1"
    ]
    row = box.ledger.begin_early(1, "pkg", "1", admission=[], selection=[], inputs=inputs)
    assert row is not None
    verdict = Verdict("1.1", "1.1.1", "pkg", "1", "n", True, 0.99, 0.5, {}, 1.0, (), (), (), (), provisional=True)
    alert = NewFinding("alert.er", "CONTROL1", "a.hl7", ("er",), 0)
    box.ledger.issue_verdict(row["id"], 1, verdict, later(0), [alert], admission=[], late=False)
    if how == "refused":
        let_decide(box)
    else:
        with box.ledger._write() as connection:
            connection.execute(t.analysis.update().values(state="failed", reason="a test"))
        engine_beside(box).step()
    assert [patient_of(one) for one in messages(box)] == ["ANN"]
    assert "WITHDRAWAL" in messages(box)[0]
    box.ledger.close()


@pytest.mark.parametrize("how", ["revoked", "over"])
@pytest.mark.parametrize("when", ["admitted", "running"])
def test_an_exception_that_ends_lets_pass_nothing_that_waits(
    site: Site, how: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The study was admitted under it; Triton was away for a day, or the model is still at work."""
    site.approve("clinical")
    record = site.decide(make_exception, site.packages[0], "age", until=LATER if how == "revoked" else date.today())
    site.client.ready = when == "running"
    study = site.scan(**NOBODY_KNOWS)
    assert criterion(site.wait(study, when), "age")["outcome"] == "excepted"
    assert when == "running" or study not in site.asked.futures, "nothing is done ahead while Triton is away"
    if how == "revoked":
        site.decide(revoke, record)
    else:
        let_days_pass(monkeypatch, 1)
    site.client.ready = True
    if when == "running":
        site.answer(study)
    report = site.wait(study, "refused")
    assert criterion(report, "age")["outcome"] == "unknown"
    assert (report["verdicts"], report["deliveries"]) == ([], [])
    assert when == "running" or study not in site.asked.futures, "the model did not see it"


@pytest.mark.slow
def test_a_provisional_alert_waits_for_all_that_the_label_asks_for(site: Site) -> None:
    """Slabs side by side leave no doubt, but the head is not covered yet: nothing is refused, and nobody told."""
    site.approve("clinical")
    er = Hl7Destination(kind="hl7", name="er", host="127.0.0.1", port=2575, refusals=True)
    site.settings = site.settings.model_copy(
        update={
            "destination": [er],
            "provisional": Provisional(alerts=True, slabs=2),
            "study": StudySettings(settle_seconds=60, quiet_seconds=60),
        }
    )
    site.restart()
    site.box.association = site.box.ledger.open_association("S", "B", "127.0.0.1")

    def arrive(numbers: range) -> None:
        for number in numbers:
            one = header(number, study="1.1", series="1.1.1", z=5.0 * number)
            assert site.box.store(one, image(1, number)) == "stored"

    arrive(range(1, 12))
    wait_until(site.engine, lambda: len(site.asked.futures.get(1, [])) >= 9)
    for future in site.asked.futures[1]:
        site.answer_one(future, 0.99)
    until = time.monotonic() + 2.5  # the engine looks again after a second
    while time.monotonic() < until:
        site.engine.step()
        time.sleep(0.05)
    assert (site.report(1)["analyses"], messages(site.box)) == ([], [])
    arrive(range(12, 25))
    wait_until(site.engine, lambda: len(site.asked.futures[1]) >= 20)
    for future in site.asked.futures[1]:
        site.answer_one(future, 0.99)
    wait_until(site.engine, lambda: bool(site.report(1)["analyses"]))

    def issued() -> bool:
        for future in site.asked.futures[1]:
            site.answer_one(future, 0.99)
        return bool(site.report(1)["verdicts"])

    wait_until(site.engine, issued)
    report = site.report(1)
    assert (report["state"], report["verdicts"][0]["result"]["provisional"]) == ("receiving", True)
    assert {one["outcome"] for one in report["analyses"][0]["admission"]} == {"met"}
    (message,) = messages(site.box)
    assert "provisional" in message


def test_a_negative_report_is_taken_back_when_the_study_comes_again_and_is_refused_before_it_runs(site: Site) -> None:
    site.approve("clinical")
    study = site.scan()
    site.wait(study, "running")
    site.answer(study, 0.01)
    assert not site.wait(study, "issued")["verdicts"][-1]["positive"]
    site.client.ready = False
    for number, agent, state in ((31, "", "admitted"), (32, "OMNIPAQUE", "refused")):
        site.box.association = site.box.ledger.open_association("S", "B", "127.0.0.1")
        one = header(number, study="1.1", series="1.1.1", z=5.0 * number, contrast_bolus_agent=agent)
        assert site.box.store(one, image(1, number)) == "stored"
        site.box.ledger.close_association(site.box.association, "released")
        report = site.wait(study, state)
    assert [one["positive"] for one in report["verdicts"]] == [False, False]
    assert "OMNIPAQUE" in report["verdicts"][-1]["result"]["withdrawn"]
    reports = [one for one in report["deliveries"] if one["object"] == "report"]
    assert [one["destination"] for one in reports] == ["pacs", "pacs"], "who has the first gets the second"
    site.restart()
    site.engine.step()
    assert len(site.report(study)["verdicts"]) == 2


@pytest.fixture
def hearing(tmp_path: Path) -> Iterator[Site]:
    """A site whose emergency team wants to hear of refusals, and of a study twelve slices, which are too few."""
    one = Site(tmp_path, refusals=True)
    one.approve("clinical")
    arrive(one, range(1, 13))
    assert criterion(one.wait(1, "refused"), "coverage")["outcome"] == "violated"
    (refusal,) = one.report(1)["deliveries"]
    assert (refusal["object"], refusal["state"]) == ("refusal.er", "pending")
    yield one
    one.stop()


def arrive(site: Site, numbers: range, **changes: Any) -> None:
    """Slices of the one study, on an association of their own."""
    site.box.association = site.box.ledger.open_association("S", "B", "127.0.0.1")
    for number in numbers:
        one = header(number, study="1.1", series="1.1.1", z=5.0 * number, **changes)
        assert site.box.store(one, image(1, number)) == "stored"
    site.box.ledger.close_association(site.box.association, "released")


def whole(site: Site, probability: float) -> None:
    """What was missing of the head comes, and is read."""
    arrive(site, range(13, 31))
    site.wait(1, "running")
    site.answer(1, probability)
    site.wait(1, "issued")


def try_er(site: Site, outcome: Literal["acknowledge", "retry", "reject"]) -> tuple[str, int] | None:
    """What the emergency team is sent next, and what becomes of it; None if nothing is."""
    row = site.box.ledger.take_delivery("er")
    if row is None:
        return None
    site.box.ledger.settle_delivery(row, outcome)
    return row["object"], row["revision"]


def refusal_of(site: Site) -> dict[str, Any]:
    (one,) = [one for one in site.report(1)["deliveries"] if one["object"] == "refusal.er"]
    return dict(one)


@pytest.mark.parametrize("tried", [False, True], ids=["never tried", "tried before"])
@pytest.mark.parametrize("probability", [0.9, 0.01])
def test_that_nothing_was_read_is_not_told_once_it_was(hearing: Site, probability: float, tried: bool) -> None:
    """The destination comes back: "nothing is said of haemorrhage" after the alert would seem to take it back."""
    if tried:
        assert try_er(hearing, "retry") == ("refusal.er", 1)
    whole(hearing, probability)
    if probability > 0.5:
        assert try_er(hearing, "acknowledge") == ("alert.er", 2)
    for _ in range(2):
        assert try_er(hearing, "acknowledge") is None
        refusal = refusal_of(hearing)
        assert (refusal["state"], refusal["reason"]) == ("withdrawn", "the study was analysed since (revision 2)")
    assert event_counts(hearing.box.ledger)["delivery.withdrawn"] == 1
    with pytest.raises(LedgerError, match=r"analysed since \(revision 2\)"):
        hearing.box.ledger.requeue_delivery(refusal["id"], ["er", "pacs"])


@pytest.mark.parametrize("probability", [0.9, 0.01])
def test_a_refusal_that_was_rejected_is_not_sent_again_after_the_verdict(hearing: Site, probability: float) -> None:
    assert try_er(hearing, "reject") == ("refusal.er", 1)
    hearing.box.ledger.requeue_delivery(refusal_of(hearing)["id"], ["er", "pacs"])
    assert try_er(hearing, "reject") == ("refusal.er", 1), "nothing contradicts it yet"
    whole(hearing, probability)
    with pytest.raises(LedgerError, match=r"analysed since \(revision 2\)"):
        hearing.box.ledger.requeue_delivery(refusal_of(hearing)["id"], ["er", "pacs"])
    assert refusal_of(hearing)["state"] == "rejected"


def test_a_refusal_that_was_rejected_is_sent_again_after_a_verdict_that_nobody_heard_of(hearing: Site) -> None:
    assert try_er(hearing, "reject") == ("refusal.er", 1)
    hearing.approve("shadow")
    whole(hearing, 0.9)
    hearing.box.ledger.requeue_delivery(refusal_of(hearing)["id"], ["er", "pacs"])
    assert refusal_of(hearing)["state"] == "pending"


def test_that_nothing_was_read_is_told_where_that_is_so_in_the_end(hearing: Site) -> None:
    """Nobody else tells the team: it was told nothing of the negative answer that is taken back."""
    whole(hearing, 0.01)
    arrive(hearing, range(31, 32), contrast_bolus_agent="OMNIPAQUE")
    assert hearing.wait(1, "refused")["verdicts"][-1]["result"]["withdrawn"]
    assert try_er(hearing, "acknowledge") == ("refusal.er", 1)


def test_what_waits_when_the_site_narrows_its_limits_is_judged_by_them(site: Site) -> None:
    site.approve("clinical")
    site.client.ready = False
    study = site.scan()
    before = site.wait(study, "admitted")["analyses"][0]
    site.settings = site.settings.model_copy(
        update={"limit": [Limit.model_validate({"package": "pkg", "kvp": [130.0, 140.0]})]}
    )
    site.client.ready = True
    site.restart()
    report = site.wait(study, "refused")
    assert criterion(report, "kvp")["rule"] == "130 to 140 kV"
    assert before["attempts"] == 0
    assert report["verdicts"] == []


def test_what_cannot_be_looked_at_is_refused_and_holds_up_no_other_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path, names=("one", "two"))
    try:
        site.engine.guard.step()

        def fail() -> str:
            raise RuntimeError("out of file handles")

        monkeypatch.setattr(site.engine.guard._files["one"], "look", fail)
        weights = site.folder / "two" / "model.onnx"
        weights.write_bytes(weights.read_bytes() + b" ")
        site.engine.guard.step()
        assert "could not be looked at (RuntimeError: out of file handles)" in site.engine.guard.problem("one")
        assert str(weights) in site.engine.guard.problem("two")
        monkeypatch.undo()
        site.engine.guard.step()
        assert site.engine.guard.problem("one") == ""
    finally:
        site.stop()
