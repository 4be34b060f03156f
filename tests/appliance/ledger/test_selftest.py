"""What counts as a self-test: nothing that a scanner could send; and that nobody hears of one."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa

from appliance.ledger import migration
from appliance.ledger import schema as t
from appliance.ledger.database import LedgerError, now
from appliance.ledger.records import Verdict
from appliance.ledger.retention import Rules
from appliance.ledger.selftest import (
    LONGEST_SECONDS,
    SELFTEST_AE,
    SELFTEST_ALERTS,
    SELFTEST_OBJECTS,
    is_loopback,
)
from appliance.ledger.standing import errors_since, in_flight, waiting
from appliance.ledger.store import Ledger, NewFinding, NewInstance
from appliance.ledger.views import (
    event_counts,
    find_study,
    state_counts,
    study_report,
    troubles,
    unreached_alerts,
    verify_events,
    waiting_destinations,
)
from tests.builders import head_series

UID = "2.25.1"
RULES = Rules(packages=("pkg",), attempts=3, keep_seconds=72 * 3600.0)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


def begin(ledger: Ledger, uid: str = UID) -> None:
    ledger.begin_selftest(uid, expected=True, alert_port=1, object_port=2)


def arrive(
    ledger: Ledger, uid: str = UID, *, title: str = SELFTEST_AE, address: str = "127.0.0.1", digest: str = "a"
) -> int:
    """Some images of a study from somebody; its number."""
    association = ledger.open_association(title, "SCANSIDE", address)
    for number, one in enumerate(head_series(2, study_instance_uid=uid)):
        ledger.record_instances([NewInstance(one, f"{digest}-{uid}-{number}", 10, association)])
    ledger.close_association(association, "released")
    key = find_study(ledger, uid)
    assert key is not None
    return key


def issue(ledger: Ledger, study: int, destinations: tuple[str, str], uid: str = UID) -> None:
    """A positive verdict on a study, told to an alert's and an object's destination."""
    (row,) = [one for one in ledger.arriving_studies() if one.id == study]
    assert ledger.complete_study(study, row.last_instance_at, {"by": "test", "calling_ae": row.calling_ae})
    ledger.decide(study, "pkg", "1", admitted=True, reason="", admission=[], selection=[], inputs=[])
    taken = ledger.take_analysis(["pkg"])
    assert taken is not None and taken["study_id"] == study
    verdict = Verdict(uid, "1.2", "pkg", "1", "notice", True, 0.9, 0.5, {}, 1.0, (), (), ("raw",), ())
    findings = [
        NewFinding(f"alert.{destinations[0]}", f"M{study}", "a.hl7", (destinations[0],), 0),
        NewFinding("report", f"2.25.9{study}", "r.dcm", (destinations[1],), 10),
    ]
    ledger.issue_verdict(taken["id"], 1, verdict, now(), findings, admission=[], late=False)


def with_deliveries(ledger: Ledger) -> int:
    """A self-test whose deliveries wait."""
    begin(ledger)
    study = arrive(ledger)
    assert ledger.selftest(study) is not None
    issue(ledger, study, (SELFTEST_ALERTS, SELFTEST_OBJECTS))
    return study


def test_what_was_announced_and_came_from_this_machine_is_a_test(ledger: Ledger) -> None:
    begin(ledger)
    study = arrive(ledger)
    test = ledger.selftest(study)
    assert test is not None
    assert (test.study_instance_uid, test.expected, test.alert_port, test.object_port) == (UID, True, 1, 2)
    assert study_report(ledger, study)["selftest"] is True
    assert event_counts(ledger)["selftest.recognised"] == 1
    ledger.selftest(study)
    assert event_counts(ledger)["selftest.recognised"] == 1
    assert verify_events(ledger) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"title": "CT01"},
        {"address": "10.1.2.3"},
        {"address": "::ffff:10.1.2.3"},
        {"title": "scanside-test"},
        {"uid": "1.2.3"},
    ],
    ids=str,
)
def test_what_a_scanner_could_send_is_a_patients(ledger: Ledger, wrong: dict[str, str]) -> None:
    begin(ledger)
    study = arrive(ledger, **wrong)  # type: ignore[arg-type]
    assert ledger.selftest(study) is None
    assert study_report(ledger, study)["selftest"] is False


@pytest.mark.parametrize("title", [SELFTEST_AE, "CT01"])
@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "10.0.0.1", "", "127.0.0.1.x"])
def test_only_all_of_it_makes_a_test(ledger: Ledger, title: str, address: str) -> None:
    begin(ledger)
    study = arrive(ledger, title=title, address=address)
    assert (ledger.selftest(study) is not None) == (title == SELFTEST_AE and address in ("127.0.0.1", "::1"))


def test_one_image_from_elsewhere_makes_all_of_it_a_patients(ledger: Ledger) -> None:
    begin(ledger)
    study = arrive(ledger)
    assert ledger.selftest(study) is not None
    arrive(ledger, title="CT01", address="10.1.2.3", digest="b")
    assert ledger.selftest(study) is None
    assert study_report(ledger, study)["selftest"] is False
    assert event_counts(ledger)["selftest.refuted"] == 1
    assert ledger.was_registered(study)
    issue(ledger, study, ("er", "pacs"))  # the hospital hears of it


def test_a_study_that_is_here_already_cannot_be_announced(ledger: Ledger) -> None:
    study = arrive(ledger)
    with pytest.raises(LedgerError, match="here already"):
        begin(ledger)
    assert ledger.selftest(study) is None
    begin(ledger, "2.25.2")
    with pytest.raises(sa.exc.IntegrityError):
        begin(ledger, "2.25.2")


def test_images_from_before_the_announcement_do_not_count(ledger: Ledger, tmp_path: Path) -> None:
    begin(ledger)
    study = arrive(ledger)
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as connection:
        connection.execute("UPDATE selftest SET begun_at = '2999-01-01T00:00:00+00:00'")
        connection.commit()
    assert ledger.selftest(study) is None


def test_whoever_makes_it_no_delivery_of_a_test_goes_to_the_hospital_and_none_of_a_patient_to_the_test(
    ledger: Ledger,
) -> None:
    begin(ledger)
    test = arrive(ledger)
    assert ledger.selftest(test) is not None
    with pytest.raises(LedgerError, match="not for er"):
        issue(ledger, test, ("er", "pacs"))
    ledger.park_analyses(3)
    patient = arrive(ledger, "1.2.3", title="CT01", address="10.0.0.1")
    with pytest.raises(LedgerError, match="not for selftest"):
        issue(ledger, patient, (SELFTEST_ALERTS, "pacs"), "1.2.3")
    assert study_report(ledger, patient)["deliveries"] == study_report(ledger, test)["deliveries"] == []


def test_it_counts_nowhere_but_as_a_test(ledger: Ledger) -> None:
    patient = arrive(ledger, "1.2.3", title="CT01", address="10.0.0.1")
    study = with_deliveries(ledger)
    for _ in range(2):
        row = ledger.take_delivery(SELFTEST_ALERTS) or ledger.take_delivery(SELFTEST_OBJECTS)
        assert row is not None
        assert ledger.settle_delivery(row, "give_up", "no") is False  # nobody has to be reached
    counts = state_counts(ledger)
    assert (counts["study"], counts["analysis"], counts["delivery"]) == ({"receiving": 1}, {}, {})
    events = event_counts(ledger)
    assert (events["instance.stored"], events["verdict.issued"], events["delivery.dead"]) == (2, 0, 0)
    assert events["alert.unreached"] == 0
    assert unreached_alerts(ledger) == []
    assert troubles(ledger) == {"deliveries": [], "analyses": []}
    assert waiting(ledger) == waiting_destinations(ledger) == {}
    busy = in_flight(ledger, ["pkg"])
    assert (busy["arriving"], sum(busy.values())) == (1, 1)
    assert errors_since(ledger, datetime(2000, 1, 1, tzinfo=UTC)) == {}
    overdue = ledger.mark_overdue(["pkg"], ["er"], completion=-1.0, analysis=-1.0, alert=-1.0)
    assert {one.study_id for one in overdue} == {patient} != {study}


def test_a_patient_goes_first(ledger: Ledger) -> None:
    begin(ledger)
    for uid, title in ((UID, SELFTEST_AE), ("1.2.3", "CT01")):
        study = arrive(ledger, uid, title=title)
        ledger.selftest(study)
        (row,) = ledger.arriving_studies()
        ledger.complete_study(study, row.last_instance_at, {"by": "test", "calling_ae": title})
        ledger.decide(study, "pkg", "1", admitted=True, reason="", admission=[], selection=[], inputs=[])
    taken = [ledger.take_analysis(["pkg"]) for _ in range(2)]
    assert [one["study_instance_uid"] for one in taken if one] == ["1.2.3", UID]


def test_when_it_has_ended_nothing_more_is_sent_and_its_files_go_first(ledger: Ledger) -> None:
    study = with_deliveries(ledger)
    (kept,) = ledger.kept_studies(RULES, selftests=True)
    assert kept.holds == ("its self-test has not ended",)
    assert ledger.remove_study(study, RULES) is None
    ledger.end_selftest(UID, passed=True, seconds=1.5)
    ledger.end_selftest(UID, passed=False, seconds=None, reason="late")  # the first word holds
    ledger.sweep_selftests()
    assert {one["state"] for one in study_report(ledger, study)["deliveries"]} == {"withdrawn"}
    (newest,) = ledger.newest_selftests()
    assert (newest.passed, newest.seconds, newest.reason) == (True, 1.5, "")
    patient = arrive(ledger, "1.2.3", title="CT01", address="10.0.0.1")
    assert [one.study_id for one in ledger.kept_studies(RULES)] == [study, patient]
    removal = ledger.remove_study(study, RULES)
    assert removal is not None and len(removal.digests) == 2
    assert ledger.selftest(study) is not None  # it stays what it was
    assert event_counts(ledger)["selftest.passed"] == 1


def test_one_whose_process_was_killed_is_ended(ledger: Ledger, tmp_path: Path) -> None:
    study = with_deliveries(ledger)
    ledger.sweep_selftests()
    assert {one["state"] for one in study_report(ledger, study)["deliveries"]} == {"pending"}
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as connection:
        connection.execute("UPDATE selftest SET begun_at = datetime('now', ?)", (f"-{LONGEST_SECONDS + 60} seconds",))
        connection.commit()
    ledger.sweep_selftests()
    assert {one["state"] for one in study_report(ledger, study)["deliveries"]} == {"withdrawn"}
    (newest,) = ledger.newest_selftests()
    assert (newest.passed, newest.reason) == (False, "it did not end")


def test_an_older_scanside_finds_no_test_to_alert_of(ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    study = with_deliveries(ledger)
    begin(ledger, "2.25.2")
    unseen = arrive(ledger, "2.25.2")  # nobody has looked at it yet
    patient = arrive(ledger, "1.2.3", title="CT01", address="10.0.0.1")
    begin(ledger, "2.25.3")
    refuted = arrive(ledger, "2.25.3", address="10.0.0.1")
    ledger.close()
    before = migration.revisions()[migration.revisions().index(_revision()) - 1]
    migration.downgrade(path, before)
    with closing(sqlite3.connect(path)) as connection:
        left = {row[0] for row in connection.execute("SELECT DISTINCT study_id FROM instance")}
        states = dict(connection.execute("SELECT id, state FROM study").fetchall())
        assert connection.execute("SELECT count(*) FROM delivery").fetchone() == (0,)
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    assert left == {patient, refuted}
    assert (states[study], states[unseen], states[patient]) == ("complete", "complete", "receiving")


def _revision() -> str:
    """The revision that brought the tests."""
    folder = Path(migration.__file__).parent / "migrations/versions"
    (found,) = folder.glob("*_selftest.py")
    return found.name.split("_")[0]


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("10.0.0.1", False), ("localhost", False), ("", False)],
)
def test_loopback(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected


def test_the_columns_are_those_of_the_schema(ledger: Ledger) -> None:
    with ledger.read() as connection:
        assert {one["name"] for one in sa.inspect(connection).get_columns("selftest")} == set(t.selftest.c.keys())
