"""A head that is scanned again in the same study: what is read, what is said, and that no answer changes in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, get_args

import pytest
from pydicom import dcmread
from rich.console import Console

from appliance.findings.alert import Kind
from appliance.governance.board import suspend
from appliance.inference.stream import Closed
from appliance.ledger import schema as t
from appliance.ledger.database import later
from appliance.ledger.records import ALERT_STANDS
from appliance.ledger.views import event_counts
from appliance.services.telling import preview
from appliance.show import study_view
from tests.appliance.test_clearance import Site, messages
from tests.appliance.test_services import wait_until
from tests.builders import header
from tests.dicom_io.support import ct, head

PIXELS = head(12, False)


def removed(site: Site) -> None:
    """Days later retention takes the files of the study, of which all was delivered."""
    site.engine.close()
    with site.box.ledger._write() as connection:
        connection.execute(t.finding.update().where(t.finding.c.path.is_(None)).values(path="made"))
    for destination in ("er", "pacs"):
        while (row := site.box.ledger.take_delivery(destination)) is not None:
            site.box.ledger.settle_delivery(row, "acknowledge")
    with site.box.ledger._write() as connection:
        connection.execute(t.study.update().values(completed_at=later(-1e6)))
    assert site.box.retention.step() == 1
    site.start()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    one = Site(tmp_path)
    one.approve("clinical")
    yield one
    one.stop()


@cache
def image(number: int, apart: float, patient: str) -> bytes:
    """The same bytes each time, as a scanner or an archive sends them again."""
    file = BytesIO()
    made = ct(PIXELS, 12, position=(0.0, 0.0, apart * number), instance_number=number, study="2.25.1")
    made.PatientID = patient
    made.save_as(file, enforce_file_format=True)
    return file.getvalue()


def bring(site: Site, series: int, slices: int = 30, *, apart: float = 5.0, **changes: Any) -> None:
    """A series of study 1 arrives, on an association of its own."""
    site.box.association = site.box.ledger.open_association("S", "B", "127.0.0.1")
    for number in range(1, slices + 1):
        one = header(number, study="1.1", series=f"1.1.{series}", z=apart * number, **changes)
        content = image(number, apart, one.patient_id) + str((one.sop_instance_uid, sorted(changes.items()))).encode()
        assert site.box.store(one, content) in ("stored", "conflict", "duplicate")
    site.box.ledger.close_association(site.box.association, "released")


@contextmanager
def together(site: Site) -> Iterator[None]:
    """All that is brought belongs together: an association stays open until the last of it is there."""
    held = site.box.association = site.box.ledger.open_association("S", "B", "127.0.0.1")
    yield
    site.box.ledger.close_association(held, "released")


def refused(site: Site) -> str:
    """Why the study is refused."""
    wait_until(site.engine, lambda: bool(site.report(1)["analyses"]))
    (analysis,) = site.report(1)["analyses"]
    assert analysis["state"] == "refused"
    return str(analysis["reason"])


def read_until(site: Site, done: Callable[[], bool], probability: float) -> None:
    """Whatever the model is asked is answered, until then."""

    def answered() -> bool:
        for future in list(site.asked.futures.get(1, [])):
            site.answer_one(future, probability)
        return done()

    wait_until(site.engine, answered)


def read(site: Site, probability: float, revision: int) -> dict[str, Any]:
    """Whatever the model is asked is answered, until there is that verdict, which is returned."""
    read_until(site, lambda: len(site.box.ledger.verdicts(1)) == revision, probability)
    wait_until(site.engine, lambda: not site.engine._working)
    assert site.report(1)["analyses"][0]["state"] == "issued"
    return dict(site.box.ledger.verdicts(1)[-1]["result"])


def come_back_with_a_dose_report(site: Site, kept: int) -> None:
    """Nothing that matters comes: the verdict stands, also for an engine that has just started."""
    site.restart()
    bring(site, 80 + kept, 1, modality="SR")
    wait_until(site.engine, lambda: event_counts(site.box.ledger)["verdict.kept"] == kept)


def test_a_bleed_in_the_repeated_scan_is_found_after_a_negative_first_one(site: Site) -> None:
    bring(site, 2)
    assert read(site, 0.01, 1)["series_instance_uid"] == "1.1.2"
    assert messages(site) == []
    bring(site, 5)
    result = read(site, 0.9, 2)
    assert (result["positive"], result["series_instance_uid"]) == (True, "1.1.5")
    assert "Series 2 was not analysed: a later series of the same kind came too." in result["limitations"]
    assert len(messages(site)) == 1
    come_back_with_a_dose_report(site, 1)
    assert (len(site.box.ledger.verdicts(1)), len(messages(site))) == (2, 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"slices": 20}, "it covers less of the head"),
        (
            {"slices": 75, "apart": 2.0, "thickness": 2.0, "acquisition_number": 2},
            "thin slices, and thick ones came too",
        ),
        ({"rows": 0}, "images of different sizes"),
    ],
)
def test_a_repeated_scan_that_cannot_be_read_leaves_no_negative_answer_that_is_silent_on_it(
    site: Site, changes: dict[str, Any], reason: str
) -> None:
    bring(site, 2)
    said = f"Series 5 was not analysed: {reason}."
    assert said not in read(site, 0.01, 1)["limitations"]
    if "rows" in changes:
        site.box.store(header(31, study="1.1", series="1.1.5", z=155.0), b"another size")
    bring(site, 5, **changes)
    result = read(site, 0.01, 2)
    assert (result["positive"], result["series_instance_uid"]) == (False, "1.1.2")
    assert said in result["limitations"]
    # Its report goes where the first went; and this was said once.
    reports = [one["destination"] for one in site.report(1)["deliveries"] if one["object"] == "report"]
    assert reports == ["pacs", "pacs"]
    come_back_with_a_dose_report(site, 1)
    assert len(site.box.ledger.verdicts(1)) == 2


def test_a_repeated_scan_outside_the_label_takes_no_answer_from_the_first(site: Site) -> None:
    bring(site, 2)
    read(site, 0.01, 1)
    bring(site, 5, kvp=60.0)
    result = read(site, 0.01, 2)
    assert (result["positive"], result["series_instance_uid"]) == (False, "1.1.2")
    (said,) = [one for one in result["limitations"] if one.startswith("Series 5 ")]
    assert said.startswith("Series 5 was not analysed: it may not be read: ") and "60" in said
    come_back_with_a_dose_report(site, 1)
    assert len(site.box.ledger.verdicts(1)) == 2


def test_a_bleed_in_the_scan_that_may_be_read_is_found_beside_one_that_may_not(site: Site) -> None:
    with together(site):
        bring(site, 2)
        bring(site, 5, kvp=60.0)
    result = read(site, 0.9, 1)
    assert (result["positive"], result["series_instance_uid"]) == (True, "1.1.2")
    assert len(messages(site)) == 1
    come_back_with_a_dose_report(site, 1)
    assert (len(site.box.ledger.verdicts(1)), len(messages(site))) == (1, 1)


@pytest.mark.parametrize("changes", [{"patient_age": "009Y"}, {"patient_age": "", "patient_birth_date": ""}])
def test_what_a_later_scan_says_of_the_patient_holds_for_the_whole_study(site: Site, changes: dict[str, str]) -> None:
    bring(site, 2)
    bring(site, 5, kvp=60.0, **changes)
    assert "age" in refused(site)


def test_a_slice_of_another_patient_in_a_later_scan_refuses_the_whole_study(site: Site) -> None:
    bring(site, 2)
    site.box.store(header(31, study="1.1", series="1.1.5", z=155.0, patient="another"), b"of another patient")
    bring(site, 5)
    assert "2 different" in refused(site)


def test_where_no_scan_may_be_read_the_reason_is_that_of_the_one_to_be_read(site: Site) -> None:
    bring(site, 2, kvp=50.0)
    bring(site, 5, kvp=60.0)
    reason = refused(site)
    assert "60" in reason and "50" not in reason


@pytest.mark.parametrize(
    "changes",
    [
        {"apart": 1.0, "slices": 145, "thickness": 1.0},
        {"convolution_kernel": "BONE"},
        {"contrast_bolus_agent": "OMNIPAQUE"},
        {"image_type": ("DERIVED", "PRIMARY", "AXIAL")},
    ],
)
def test_another_reconstruction_of_what_was_read_needs_no_new_answer(site: Site, changes: dict[str, Any]) -> None:
    bring(site, 2)
    read(site, 0.01, 1)
    bring(site, 5, **changes)
    wait_until(site.engine, lambda: event_counts(site.box.ledger)["verdict.kept"] == 1)
    assert len(site.box.ledger.verdicts(1)) == 1


def test_a_repeated_scan_does_not_overturn_an_alert(site: Site) -> None:
    """The first scan stays the one that is read; that there is another one is said."""
    bring(site, 2)
    assert read(site, 0.9, 1)["positive"]
    alert = messages(site)
    bring(site, 5)
    result = read(site, 0.9, 2)
    assert (result["positive"], result["series_instance_uid"]) == (True, "1.1.2")
    assert "Series 5 was not analysed: the alert rests on another series." in result["limitations"]
    assert messages(site) == alert, "it is neither withdrawn nor told again"
    come_back_with_a_dose_report(site, 1)
    assert len(site.box.ledger.verdicts(1)) == 2


@pytest.mark.parametrize("again", [True, False])
def test_nor_does_another_series_where_the_alerted_one_can_be_read_no_longer(site: Site, again: bool) -> None:
    """The head is scanned again into the series that the alert rests on, a little higher."""
    bring(site, 2, acquisition_number=1)
    assert read(site, 0.9, 1)["positive"]
    alert = messages(site)
    with together(site):
        for number in range(31, 61):
            place = 5.0 * (number - 30) + 2
            one = header(number, study="1.1", series="1.1.2", z=place, acquisition_number=2)
            assert site.box.store(one, f"again {number}".encode()) == "stored"
        if again:
            bring(site, 5, acquisition_number=3)
    wait_until(site.engine, lambda: site.report(1)["analyses"][0]["state"] == "refused")
    assert "acquisitions 1 and 2 cover the same" in refused(site)
    assert ("an alert rests on another series" in refused(site)) == again
    assert [one["positive"] for one in site.box.ledger.verdicts(1)] == [True]
    assert messages(site) == alert, "the alert stands"


def test_of_two_scans_that_come_at_once_the_later_is_read_and_the_other_named(site: Site) -> None:
    with together(site):
        bring(site, 5)
        bring(site, 2, 31)
    result = read(site, 0.01, 1)
    assert result["series_instance_uid"] == "1.1.5"
    assert "Series 2 was not analysed: a later series of the same kind came too." in result["limitations"]


@pytest.mark.parametrize("probability", [0.01, 0.9])
def test_a_scan_under_the_number_of_a_negative_study_that_retention_removed_is_read(
    site: Site, probability: float
) -> None:
    bring(site, 2)
    read(site, 0.01, 1)
    removed(site)
    bring(site, 7)
    result = read(site, probability, 2)
    assert (result["positive"], result["series_instance_uid"]) == (probability > 0.5, "1.1.7")
    assert ALERT_STANDS not in result["limitations"]
    assert len(messages(site)) == (probability > 0.5)
    come_back_with_a_dose_report(site, 1)
    assert len(site.box.ledger.verdicts(1)) == 2


def test_it_overturns_no_alert_on_images_that_nobody_can_read_again(site: Site) -> None:
    bring(site, 2)
    read(site, 0.9, 1)
    removed(site)
    assert messages(site) == []  # its file went with the others
    bring(site, 7)
    result = read(site, 0.01, 2)
    assert (result["positive"], result["series_instance_uid"]) == (False, "1.1.7")
    assert ALERT_STANDS in result["limitations"]
    assert messages(site) == [], "nothing is withdrawn"
    come_back_with_a_dose_report(site, 1)
    removed(site)
    bring(site, 9)
    assert ALERT_STANDS in read(site, 0.01, 3)["limitations"]
    assert messages(site) == []


def stands_beside(site: Site, series: int = 7) -> None:
    """An alert on series 2, whose images retention removed, stands beside a negative answer on a new scan."""
    bring(site, 2)
    read(site, 0.9, 1)
    removed(site)
    bring(site, series)
    assert ALERT_STANDS in read(site, 0.01, 2)["limitations"]


@pytest.mark.parametrize("how", ["contrast", "suspended"])
def test_nor_does_a_refusal_of_the_new_scan_and_that_the_alert_stands_is_said_again(site: Site, how: str) -> None:
    """What is taken back is the negative report; nobody but the archive has heard of it."""
    stands_beside(site)
    if how == "suspended":
        site.decide(suspend, "pkg", site.packages[0])
    contrast = {"contrast_bolus_agent": "OMNIPAQUE"} if how == "contrast" else {}
    site.box.association = site.box.ledger.open_association("S", "B", "127.0.0.1")
    assert site.box.store(header(31, study="1.1", series="1.1.7", z=155.0, **contrast), b"late") == "stored"
    site.box.ledger.close_association(site.box.association, "released")
    report = site.wait(1, "refused")
    newest = report["verdicts"][-1]
    assert (newest["revision"], newest["result"]["limitations"]) == (3, [ALERT_STANDS])
    assert messages(site) == [], "nothing is withdrawn"
    mine = [one["object"] for one in report["deliveries"] if one["verdict_id"] == newest["id"]]
    assert mine == ["report"]
    (file,) = site.settings.findings_directory.glob("*-3/report.dcm")
    assert b"An earlier alert on this study STANDS" in file.read_bytes()
    with (console := Console(width=300)).capture() as text:
        console.print(study_view(report))
    assert text.get().count(ALERT_STANDS) == 2
    # Nor does the next negative answer overturn it.
    if how == "contrast":
        bring(site, 7, contrast_bolus_agent="NONE")
        site.box.association = site.box.ledger.open_association("S", "B", "127.0.0.1")
        site.box.store(header(31, study="1.1", series="1.1.7", z=155.0), b"late again")
        site.box.ledger.close_association(site.box.association, "released")
        assert ALERT_STANDS in read(site, 0.01, 4)["limitations"]
        assert messages(site) == []


@pytest.mark.parametrize("probability", [0.01, 0.9])
def test_the_scan_that_an_alert_rests_on_is_read_again_once_all_of_it_came_back(site: Site, probability: float) -> None:
    stands_beside(site)
    bring(site, 2, 20)
    result = read(site, 0.01, 3)
    assert (result["series_instance_uid"], ALERT_STANDS in result["limitations"]) == ("1.1.7", True), "a part of it"
    bring(site, 2)
    result = read(site, probability, 4)
    assert (result["positive"], result["series_instance_uid"]) == (probability > 0.5, "1.1.2")
    assert "Series 7 was not analysed: the alert rests on another series." in result["limitations"]
    assert ALERT_STANDS not in result["limitations"]
    # Only another look at the same images can disprove it; and who has the alert is not told it twice.
    assert [one for one in messages(site) if "||withdrawal||" in one] == messages(site)
    assert len(messages(site)) == (probability < 0.5)
    if probability > 0.5:
        come_back_with_a_dose_report(site, 1)
        assert len(site.box.ledger.verdicts(1)) == 4


def test_another_scan_disproves_no_alert_whose_own_came_back_and_can_be_read_no_longer(site: Site) -> None:
    """The scout is still gone; with the head that was alerted of came slices in the place of others."""
    with together(site):
        site.box.store(
            header(1, study="1.1", series="1.1.1", image_type=("ORIGINAL", "PRIMARY", "LOCALIZER")), b"scout"
        )
        bring(site, 2)
    read(site, 0.9, 1)
    removed(site)
    with together(site):
        for number in range(31, 61):
            one = header(number, study="1.1", series="1.1.2", z=5.0 * (number - 30) + 2, acquisition_number=2)
            assert site.box.store(one, f"again {number}".encode()) == "stored"
        bring(site, 2)
        bring(site, 7)
    report = site.wait(1, "refused")
    assert "an alert rests on another series" in report["analyses"][0]["reason"]
    assert ([one["positive"] for one in report["verdicts"]], messages(site)) == ([True], [])


def told(site: Site) -> list[tuple[str, str, str]]:
    """Of each message to the emergency team its patient, its kind, and the kind and patient of the first it names."""
    found, ids = [], {}
    for one in [one for one in site.report(1)["findings"] if one["object"] == "alert.er" and not one["removed_at"]]:
        text = (site.settings.findings_directory / one["path"]).read_bytes().decode("utf-8")
        lines = [line.split("|") for line in text.split("\r") if line]
        said = {line[3].split("^")[1]: line[5] for line in lines if line[0] == "OBX"}
        (patient,) = [line[3].split("^")[0] for line in lines if line[0] == "PID"]
        ids[lines[0][9]] = patient
        kind = next(value for value in said.values() if value in get_args(Kind))
        found.append((patient, kind, next((ids[value] for value in said.values() if value in ids), "")))
    return found


def deliver(site: Site) -> None:
    while (row := site.box.ledger.take_delivery("er")) is not None:
        site.box.ledger.settle_delivery(row, "acknowledge")


def again_as(site: Site, patient: str, probability: float, revision: int, **changes: Any) -> dict[str, Any]:
    """The head comes (again) under that Patient ID, and is read; whoever is told acknowledges it."""
    bring(site, 2, patient=patient, patient_id=patient, **changes)
    result = read(site, probability, revision)
    deliver(site)
    return result


def previewed(site: Site) -> tuple[str, str] | None:
    """The Patient ID and the kind of the message that the newest verdict comes to."""
    (shown,) = preview(site.settings, site.box.ledger, 1)
    for one in shown.messages:
        (pid,) = [line for line in one.content.decode().split("\r") if line.startswith("PID|")]
        return pid.split("|")[3].split("^")[0], one.kind
    return None


ALERTED = [("WRONG", "alert", ""), ("WRONG", "withdrawal", "WRONG")]


@pytest.mark.slow
@pytest.mark.parametrize("probability", [0.01, 0.9])
@pytest.mark.parametrize("killed", [False, True])
def test_an_alert_follows_its_images_to_the_patient_under_whom_they_come_again(
    site: Site, probability: float, killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who was alerted of the wrong patient hears that, and of the right one as of any other; once, whatever dies."""
    again_as(site, "WRONG", 0.9, 1)
    if killed:
        bring(site, 2, patient="RIGHT", patient_id="RIGHT")
        with monkeypatch.context() as patch:

            def die(*arguments: Any, **options: Any) -> None:
                raise Closed("the engine is killed", "here", "none")

            patch.setattr(site.box.ledger, "issue_verdict", die)
            read_until(site, lambda: len(site.box.ledger.verdicts(1)) == 2, 0.9)
            assert previewed(site) == ("WRONG", "withdrawal")
            site.restart()
    again_as(site, "RIGHT", probability, 3)
    right = [("RIGHT", "alert", "")] if probability > 0.5 else []
    assert told(site) == ALERTED + right
    assert previewed(site) == (right[0][:2] if right else None)
    (withdrawal,) = [one for one in messages(site) if "||withdrawal|" in one]
    assert "came again under another Patient ID" in withdrawal and "not disproved" in withdrawal
    reports = sorted(site.settings.findings_directory.glob("*/report.dcm"))
    site.engine._issuer.render()
    assert [dcmread(path).PatientID for path in reports] == ["WRONG"], "that of the withdrawal"
    reports = sorted(site.settings.findings_directory.glob("*/report.dcm"))
    assert [dcmread(path).PatientID for path in reports] == ["WRONG", "WRONG", "RIGHT"]
    assert ["PredecessorDocumentsSequence" in dcmread(path) for path in reports] == [False, True, False]
    # What follows for the right patient follows what that one was told, and nothing is told twice.
    bring(site, 2, patient="RIGHT", patient_id="RIGHT", kvp=121.0)
    read(site, 0.01, 4)
    deliver(site)
    back = [("RIGHT", "withdrawal", "RIGHT")] if probability > 0.5 else []
    assert told(site) == ALERTED + right + back
    come_back_with_a_dose_report(site, 1)
    assert told(site) == ALERTED + right + back


def test_what_is_no_other_patient_moves_no_alert(site: Site) -> None:
    """An issuer that the archive added, and a Patient ID that got lost."""
    again_as(site, "ANN", 0.9, 1)
    again_as(site, "ANN", 0.9, 2, issuer_of_patient_id="HOSPITAL")
    again_as(site, "", 0.9, 3)
    assert told(site) == [("ANN", "alert", "")]
    again_as(site, "ANN", 0.01, 4, issuer_of_patient_id="HOSPITAL")
    assert told(site) == [("ANN", "alert", ""), ("ANN", "withdrawal", "ANN")]


def test_an_alert_that_named_no_patient_is_told_anew_once_the_images_name_one(site: Site) -> None:
    again_as(site, "", 0.9, 1)
    again_as(site, "ANN", 0.9, 3)
    assert [kind for _, kind, _ in told(site)] == ["alert", "withdrawal", "alert"]
    assert told(site)[-1] == ("ANN", "alert", "")


def test_of_one_number_that_two_issuers_gave_they_are_two_patients(site: Site) -> None:
    again_as(site, "7", 0.9, 1, issuer_of_patient_id="ONE")
    again_as(site, "7", 0.9, 3, issuer_of_patient_id="TWO")
    assert [kind for _, kind, _ in told(site)] == ["alert", "withdrawal", "alert"]


def test_an_alert_stands_while_only_a_part_of_its_images_has_another_patient(site: Site) -> None:
    """Nobody knows whose it is; once all of them have one, it moves."""
    again_as(site, "WRONG", 0.9, 1)
    bring(site, 2, 10, patient="RIGHT", patient_id="RIGHT")
    site.wait(1, "refused")
    assert told(site) == [("WRONG", "alert", "")]
    again_as(site, "RIGHT", 0.9, 3)
    assert told(site) == [*ALERTED, ("RIGHT", "alert", "")]


def test_an_alert_on_images_that_are_gone_keeps_none_of_another_patient(site: Site) -> None:
    """The old one stands for the patient who had it: its images did not come again."""
    again_as(site, "WRONG", 0.9, 1)
    removed(site)
    bring(site, 7, patient="WRONG", patient_id="WRONG")
    assert ALERT_STANDS in read(site, 0.01, 2)["limitations"]
    bring(site, 7, patient="RIGHT", patient_id="RIGHT")
    result = read(site, 0.9, 4)
    deliver(site)
    assert result["positive"]
    (withdrawn,) = [one["result"] for one in site.box.ledger.verdicts(1) if one["result"]["withdrawn"]]
    assert withdrawn["limitations"] == [ALERT_STANDS]
    bring(site, 7, 31, patient="RIGHT", patient_id="RIGHT")
    assert ALERT_STANDS not in read(site, 0.01, 5)["limitations"]
    assert told(site)[-2:] == [("RIGHT", "alert", ""), ("RIGHT", "withdrawal", "RIGHT")]


def test_in_shadow_no_alert_moves_until_the_package_may_alert_again(site: Site) -> None:
    """Nobody would be told of the right patient."""
    again_as(site, "WRONG", 0.9, 1)
    site.approve("shadow")
    again_as(site, "RIGHT", 0.9, 2)
    assert told(site) == [("WRONG", "alert", "")]
    site.approve("clinical")
    bring(site, 8, 1, modality="SR", patient="RIGHT", patient_id="RIGHT")
    read(site, 0.9, 4)
    assert told(site) == [*ALERTED, ("RIGHT", "alert", "")]


@pytest.mark.parametrize("first", [0.01, 0.9])
def test_a_part_of_a_scan_that_was_removed_or_of_a_new_one_beside_it_is_never_silently_left(
    site: Site, first: float
) -> None:
    """Thirty slices of the old scan come back and ten do not; or a repeated scan cannot be read."""
    bring(site, 2, 40)
    read(site, first, 1)
    removed(site)
    # What was read already says nothing new, though the archive has touched it.
    bring(site, 2, 30)
    wait_until(site.engine, lambda: event_counts(site.box.ledger)["verdict.kept"] == 1)
    # A scan beside it that no series can be made of does.
    site.box.store(header(31, study="1.1", series="1.1.7", z=155.0, rows=0), b"another size")
    bring(site, 7)
    report = site.wait(1, "refused")
    assert "10 instances were removed by retention" in report["analyses"][0]["reason"]
    verdicts = site.box.ledger.verdicts(1)
    if first > 0.5:
        assert [one["positive"] for one in verdicts] == [True], "the alert stands"
    else:
        assert "removed by retention" in verdicts[-1]["result"]["withdrawn"], "the negative report does not"
