"""The ledger's promises: what is recorded, how often, and what survives."""

from __future__ import annotations

import itertools
import sqlite3
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from appliance.ledger import outbox
from appliance.ledger.database import LedgerError, later, now
from appliance.ledger.records import SlabResult, Verdict
from appliance.ledger.schema import metadata
from appliance.ledger.store import Ledger, NewFinding, NewInstance, Told
from appliance.ledger.views import (
    event_counts,
    find_study,
    state_counts,
    studies,
    study_report,
    timeline,
    verify_events,
    waiting_destinations,
)
from tests.builders import head_series, header


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


def arrive(ledger: Ledger, count: int = 3, **changes: object) -> int:
    association = ledger.open_association("SCANNER", "SCANSIDE", "127.0.0.1")
    for one in head_series(count, **changes):
        assert (
            ledger.record_instances([NewInstance(one, f"digest-{one.sop_instance_uid}", 10, association)])[0]
            == "stored"
        )
    ledger.close_association(association, "released")
    key = find_study(ledger, "1.2.3")
    assert key is not None
    return key


def complete(ledger: Ledger, study: int) -> None:
    (row,) = ledger.arriving_studies()
    assert ledger.complete_study(study, row.last_instance_at, {"by": "test", "confidence": "high"})


def admit(ledger: Ledger, study: int, *, admitted: bool = True) -> None:
    ledger.decide(study, "pkg", "1", admitted=admitted, reason="" if admitted else "no", admission=[], selection=[],
                  inputs=[["1.2.3.1.1", "digest-1.2.3.1.1"]])  # fmt: skip


def verdict(positive: bool = True) -> Verdict:
    slab = SlabResult(0, 0.0, 5.0, "1.2.3.1.1", 0, {"any": 0.9}, (((1.0, 2.0), (3.0, 4.0), (5.0, 6.5)),), 1.5)
    return Verdict("1.2.3", "1.2.3.1", "pkg", "1", "notice", positive, 0.9, 0.5, {"subdural": 0.8}, 1.5, (slab,), (0,),
                   ("raw",), ("said",))  # fmt: skip


def issue(ledger: Ledger, study: int, *, revision: int = 1, positive: bool = True) -> None:
    admit(ledger, study)
    row = ledger.take_analysis(["pkg"])
    assert row is not None
    ledger.issue_verdict(
        row["id"],
        revision,
        verdict(positive),
        now(),
        [
            NewFinding("report", f"2.25.{revision}", None, ("pacs",), 10),
            NewFinding("alert.er", f"MSG{revision}", "a.hl7", ("er",), 0),
        ],
        admission=[],
        late=False,
    )


def test_migrations_make_exactly_the_schema(tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger.sqlite").close()
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_a_ledger_of_a_newer_scanside_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    Ledger(path).close()
    with sqlite3.connect(path) as raw:
        raw.execute("update alembic_version set version_num = '9999'")
    with pytest.raises(LedgerError, match="newer"):
        Ledger(path)


def test_every_commit_is_synced(ledger: Ledger) -> None:
    with ledger.read() as connection:
        assert connection.exec_driver_sql("pragma synchronous").scalar() == 2
        assert connection.exec_driver_sql("pragma journal_mode").scalar() == "wal"


def test_a_batch_is_what_its_instances_would_have_been_one_by_one(tmp_path: Path) -> None:
    """More than fit into one statement, of two studies, with repetitions within the batch and of what was there."""
    first, second = head_series(40), head_series(40, study_instance_uid="1.2.4")
    mixed = [one for pair in zip(first, second, strict=True) for one in pair]
    new = [(one, f"digest-{one.study_instance_uid}-{one.sop_instance_uid}") for one in mixed]
    again, other = new[5], (new[7][0], "other bytes")
    arrived = [*new[:20], again, other, *new[20:], other, new[7], (new[9][0], "newer"), (new[9][0], "newest")]

    def tell(ledger: Ledger, size: int) -> object:
        association = ledger.open_association("SCANNER", "SCANSIDE", "127.0.0.1")
        rows = [NewInstance(one, digest, 10, association) for one, digest in arrived]
        outcomes = [ledger.record_instances(rows[at : at + size]) for at in range(0, len(rows), size)]
        assert verify_events(ledger) is None
        kept = [
            [(one.sop_instance_uid, one.digest) for one in ledger.instances(study)]
            for uid in ("1.2.3", "1.2.4")
            if (study := find_study(ledger, uid)) is not None
        ]
        with ledger.read() as connection:
            told = connection.exec_driver_sql("select name, study_id, detail from event order by id").all()
            rows_kept = connection.exec_driver_sql("select digest, is_current, header from instance order by id").all()
        ledger.close()
        return list(itertools.chain(*outcomes)), kept, told, rows_kept

    at_once = tell(Ledger(tmp_path / "at_once.sqlite"), len(arrived))
    assert at_once == tell(Ledger(tmp_path / "one_by_one.sqlite"), 1)


def test_an_instance_comes_back_with_its_header(ledger: Ledger) -> None:
    study = arrive(ledger, 4)
    assert [one.header for one in ledger.instances(study)] == head_series(4)


def test_the_same_bytes_again_change_nothing(ledger: Ledger) -> None:
    study = arrive(ledger, 2)
    complete(ledger, study)
    association = ledger.open_association("SCANNER", "SCANSIDE", "127.0.0.1")
    one = header(1)
    assert (
        ledger.record_instances([NewInstance(one, f"digest-{one.sop_instance_uid}", 10, association)])[0] == "duplicate"
    )
    report = study_report(ledger, study)
    assert report["state"] == "complete"
    assert report["instances"] == 2
    assert event_counts(ledger)["instance.duplicate"] == 1


def test_other_bytes_under_the_same_uid_count_and_the_old_are_kept(ledger: Ledger) -> None:
    study = arrive(ledger, 2)
    association = ledger.open_association("SCANNER", "SCANSIDE", "127.0.0.1")
    changed = replace(header(1), kvp=100.0)
    assert ledger.record_instances([NewInstance(changed, "other", 11, association)])[0] == "conflict"
    assert {one.digest for one in ledger.instances(study)} == {"other", "digest-1.2.3.1.2"}
    assert "digest-1.2.3.1.1" in ledger.digests()
    # and back again: the newest counts, and still nothing is lost
    assert ledger.record_instances([NewInstance(header(1), "digest-1.2.3.1.1", 10, association)])[0] == "conflict"
    assert {one.digest for one in ledger.instances(study)} == {"digest-1.2.3.1.1", "digest-1.2.3.1.2"}


def test_an_instance_after_completion_reopens_the_study(ledger: Ledger) -> None:
    study = arrive(ledger, 2)
    complete(ledger, study)
    issue(ledger, study)
    association = ledger.open_association("SCANNER", "SCANSIDE", "127.0.0.1")
    ledger.record_instances([NewInstance(header(9), "late", 10, association)])[0]
    assert study_report(ledger, study)["state"] == "reopened"
    assert ledger.undecided_studies({"pkg": "1"}) == []
    complete(ledger, study)
    assert ledger.undecided_studies({"pkg": "1"}) == [(study, "pkg")]
    issue(ledger, study, revision=2)
    assert [one["revision"] for one in study_report(ledger, study)["verdicts"]] == [1, 2]
    assert ledger.undecided_studies({"pkg": "1"}) == []


def test_a_study_is_not_complete_if_something_came_meanwhile(ledger: Ledger) -> None:
    study = arrive(ledger, 2)
    (row,) = ledger.arriving_studies()
    ledger.record_instances([NewInstance(header(7), "new", 10, 1)])[0]
    assert not ledger.complete_study(study, row.last_instance_at, {"by": "x", "confidence": "low"})
    assert study_report(ledger, study)["state"] == "receiving"


def test_associations_are_evidence(ledger: Ledger) -> None:
    association = ledger.open_association("SCANNER", "SCANSIDE", "127.0.0.1")
    ledger.record_instances([NewInstance(header(1), "d", 10, association)])[0]
    (row,) = ledger.arriving_studies()
    assert (row.open_associations, row.outcomes) == (1, ())
    assert ledger.abandon_associations() == 1
    (row,) = ledger.arriving_studies()
    assert (row.open_associations, row.outcomes) == (0, ("lost",))


def test_a_parked_analysis_is_taken_again_and_issues_once(ledger: Ledger) -> None:
    study = arrive(ledger)
    complete(ledger, study)
    admit(ledger, study)
    assert ledger.take_analysis(["pkg"]) is not None
    assert ledger.take_analysis(["pkg"]) is None
    assert ledger.park_analyses(3) == 1
    row = ledger.take_analysis(["pkg"])
    assert row is not None
    assert row["attempts"] == 1
    finding = [NewFinding("report", "2.25.1", None, ("pacs",), 10)]
    ledger.issue_verdict(row["id"], 1, verdict(), now(), finding, admission=[], late=False)
    with pytest.raises(Exception, match="issue"):
        ledger.issue_verdict(row["id"], 1, verdict(), now(), finding, admission=[], late=False)
    assert len(study_report(ledger, study)["deliveries"]) == 1


def test_an_analysis_that_keeps_failing_is_set_aside_behind_the_others(ledger: Ledger) -> None:
    study = arrive(ledger)
    complete(ledger, study)
    admit(ledger, study)
    first = ledger.take_analysis(["pkg"])
    assert first is not None
    assert not ledger.fail_analysis(first["id"], "broken", attempts=2, pause=0.0)
    association = ledger.open_association("SCANNER", "SCANSIDE", "127.0.0.1")
    ledger.record_instances([NewInstance(header(1, study="1.2.4", series="1.2.4.1"), "d4", 10, association)])[0]
    other = find_study(ledger, "1.2.4")
    assert other is not None
    complete(ledger, other)
    admit(ledger, other)
    following = ledger.take_analysis(["pkg"])
    assert following is not None
    assert following["study_id"] == other
    again = ledger.take_analysis(["pkg"])
    assert again is not None
    assert ledger.fail_analysis(again["id"], "broken", attempts=2, pause=0.0)
    assert [one["state"] for one in study_report(ledger, study)["analyses"]] == ["failed"]


def test_a_failed_transaction_leaves_nothing(ledger: Ledger) -> None:
    study = arrive(ledger)
    complete(ledger, study)
    admit(ledger, study)
    row = ledger.take_analysis(["pkg"])
    assert row is not None
    twice = [NewFinding("report", "2.25.1", None, ("pacs",), 10), NewFinding("report", "2.25.2", None, ("pacs",), 10)]
    with pytest.raises(sa.exc.IntegrityError):
        ledger.issue_verdict(row["id"], 1, verdict(), now(), twice, admission=[], late=False)
    report = study_report(ledger, study)
    assert (report["verdicts"], report["findings"], report["deliveries"]) == ([], [], [])
    assert report["analyses"][0]["state"] == "running"
    assert verify_events(ledger) is None


def test_deliveries_wait_for_their_file_and_go_by_urgency(ledger: Ledger) -> None:
    study = arrive(ledger)
    complete(ledger, study)
    issue(ledger, study)
    assert ledger.take_delivery("pacs") is None
    finding = ledger.unrendered_finding(3)
    assert finding is not None
    ledger.rendered(finding["id"], study, "report.dcm")
    assert ledger.unrendered_finding(3) is None
    pacs = ledger.take_delivery("pacs")
    assert pacs is not None
    assert (pacs["object"], pacs["path"], pacs["uid"]) == ("report", "report.dcm", "2.25.1")
    assert ledger.take_delivery("pacs") is None
    alert = ledger.take_delivery("er")
    assert alert is not None
    ledger.settle_delivery(alert, "acknowledge")
    ledger.settle_delivery(pacs, "retry", "no answer", wait_seconds=60)
    assert ledger.take_delivery("pacs") is None
    states = {one["object"]: one["state"] for one in study_report(ledger, study)["deliveries"]}
    assert states == {"alert.er": "acknowledged", "report": "pending"}


def test_the_most_urgent_goes_first_and_equals_in_order(ledger: Ledger) -> None:
    study = arrive(ledger)
    complete(ledger, study)
    admit(ledger, study)
    row = ledger.take_analysis(["pkg"])
    assert row is not None
    findings = [
        NewFinding(name, f"2.25.{number}", f"{name}.dcm", ("pacs",), urgency)
        for number, (name, urgency) in enumerate([("capture.1", 20), ("report", 10), ("capture.2", 20), ("first", 0)])
    ]
    ledger.issue_verdict(row["id"], 1, verdict(), now(), findings, admission=[], late=False)
    taken = [ledger.take_delivery("pacs") for _ in findings]
    assert [one["object"] for one in taken if one] == ["first", "report", "capture.1", "capture.2"]


def test_what_was_on_its_way_is_sent_again_under_its_old_name(ledger: Ledger) -> None:
    study = arrive(ledger)
    complete(ledger, study)
    issue(ledger, study)
    first = ledger.take_delivery("er")
    assert first is not None
    assert ledger.park_deliveries() == 1
    again = ledger.take_delivery("er")
    assert again is not None
    assert (again["id"], again["uid"]) == (first["id"], first["uid"])


def test_a_correction_does_not_overtake_its_alert(ledger: Ledger) -> None:
    study = arrive(ledger)
    complete(ledger, study)
    issue(ledger, study)
    first = ledger.take_delivery("er")
    assert first is not None
    ledger.settle_delivery(first, "retry", "busy", wait_seconds=60)
    ledger.record_instances([NewInstance(header(9), "late", 10, 1)])[0]
    complete(ledger, study)
    issue(ledger, study, revision=2, positive=False)
    assert ledger.take_delivery("er") is None


def test_a_dead_letter_can_be_sent_once_more(ledger: Ledger) -> None:
    study = arrive(ledger)
    complete(ledger, study)
    issue(ledger, study)
    row = ledger.take_delivery("er")
    assert row is not None
    with pytest.raises(LedgerError, match="not dead"):
        ledger.requeue_delivery(row["id"], ["er", "pacs"])
    ledger.settle_delivery(row, "give_up", "nobody answers")
    assert ledger.take_delivery("er") is None
    ledger.requeue_delivery(row["id"], ["er", "pacs"])
    assert ledger.take_delivery("er") is not None
    with pytest.raises(LedgerError, match="no such delivery"):
        ledger.requeue_delivery(99, ["er"])


def test_an_alert_acknowledged_past_the_budget_is_late(ledger: Ledger) -> None:
    study = arrive(ledger)
    complete(ledger, study)
    issue(ledger, study)
    row = ledger.take_delivery("er")
    assert row is not None
    ledger.settle_delivery(row, "acknowledge", budget_seconds=0.0)
    assert study_report(ledger, study)["verdicts"][0]["late"]
    assert event_counts(ledger)["study.late"] == 1


def test_the_timeline_counts_from_the_last_instance(ledger: Ledger) -> None:
    study = arrive(ledger)
    steps = timeline(study_report(ledger, study))
    first, last = steps["first_instance"], steps["last_instance"]
    assert first is not None
    assert last is not None
    assert first["seconds"] < 0 == last["seconds"]
    assert steps["complete"] is None
    complete(ledger, study)
    issue(ledger, study)
    row = ledger.take_delivery("er")
    assert row is not None
    ledger.settle_delivery(row, "acknowledge")
    seconds = [moment["seconds"] for moment in timeline(study_report(ledger, study)).values() if moment]
    assert seconds == sorted(seconds)
    assert len(seconds) == 6


def test_a_changed_event_is_found(ledger: Ledger, tmp_path: Path) -> None:
    arrive(ledger, 5)
    assert verify_events(ledger) is None
    with sqlite3.connect(tmp_path / "ledger.sqlite") as raw:
        raw.execute("update event set detail = '{}' where id = 4")
    assert verify_events(ledger) == 4


def test_a_removed_event_is_found(ledger: Ledger, tmp_path: Path) -> None:
    arrive(ledger, 5)
    with sqlite3.connect(tmp_path / "ledger.sqlite") as raw:
        raw.execute("delete from event where id = 3")
    assert verify_events(ledger) == 3


def test_many_threads_and_a_second_process_lose_nothing(ledger: Ledger, tmp_path: Path) -> None:
    other = Ledger(tmp_path / "ledger.sqlite")

    def store(which: Ledger, series: str) -> None:
        association = which.open_association("SCANNER", "SCANSIDE", "127.0.0.1")
        for one in head_series(25, series=series):
            which.record_instances([NewInstance(one, one.sop_instance_uid, 10, association)])[0]

    threads = [threading.Thread(target=store, args=((ledger, other)[n % 2], f"1.2.3.{n}")) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (report,) = studies(ledger)
    assert report["instances"] == 100
    assert verify_events(ledger) is None
    assert state_counts(ledger)["study"] == {"receiving": 1}


def test_a_verdict_survives_its_json() -> None:
    assert Verdict.from_json(verdict().to_json()) == verdict()


def test_an_object_that_cannot_be_made_is_a_dead_letter_until_somebody_asks_again(ledger: Ledger) -> None:
    study = arrive(ledger)
    complete(ledger, study)
    issue(ledger, study)
    for _ in range(2):
        finding = ledger.unrendered_finding(2)
        assert finding is not None and ledger.unrendered_finding(2, [finding["id"]]) is None
        assert ledger.abandon_findings(2) == 0
        ledger.start_rendering(finding["id"])  # counted before it is made: it may end the engine
    ledger.render_failed(finding["id"], study, "broken")
    assert ledger.unrendered_finding(2) is None
    assert ledger.abandon_findings(2) == 1
    (report,) = [one for one in study_report(ledger, study)["deliveries"] if one["object"] == "report"]
    assert (report["state"], "broken" in report["reason"]) == ("dead", True)
    assert waiting_destinations(ledger) == {"er": 1}
    ledger.requeue_delivery(report["id"], ["er", "pacs"])
    assert ledger.unrendered_finding(2) is not None
    assert waiting_destinations(ledger) == {"er": 1, "pacs": 1}


def test_deliveries_to_a_destination_that_is_gone_are_dead_letters(ledger: Ledger) -> None:
    study = arrive(ledger)
    complete(ledger, study)
    issue(ledger, study)
    assert ledger.abandon_deliveries(["pacs"]) == 1
    (alert,) = [one for one in study_report(ledger, study)["deliveries"] if one["destination"] == "er"]
    assert alert["state"] == "dead"
    with pytest.raises(LedgerError, match="not configured"):
        ledger.requeue_delivery(alert["id"], ["pacs"])
    ledger.requeue_delivery(alert["id"], ["pacs", "er"])


def test_an_old_alert_cannot_be_sent_after_its_withdrawal(ledger: Ledger) -> None:
    study = arrive(ledger)
    complete(ledger, study)
    issue(ledger, study)
    alert = ledger.take_delivery("er")
    assert alert is not None
    ledger.settle_delivery(alert, "reject", "AR")
    ledger.record_instances([NewInstance(header(9), "late", 10, 1)])[0]
    complete(ledger, study)
    issue(ledger, study, revision=2, positive=False)
    with pytest.raises(LedgerError, match="newer"):
        ledger.requeue_delivery(alert["id"], ["er"])


def test_an_analysis_waits_while_its_study_is_open_again(ledger: Ledger) -> None:
    study = arrive(ledger)
    complete(ledger, study)
    admit(ledger, study)
    ledger.record_instances([NewInstance(header(9), "late", 10, 1)])[0]
    assert ledger.take_analysis(["pkg"]) is None
    complete(ledger, study)
    assert ledger.take_analysis(["pkg"]) is None, "the gate has not seen the late instance"
    assert ledger.undecided_studies({"pkg": "1"}) == [(study, "pkg")]
    admit(ledger, study)
    assert ledger.take_analysis(["another"]) is None
    assert ledger.take_analysis(["pkg"]) is not None


def test_an_admission_of_another_version_is_asked_for_again(ledger: Ledger) -> None:
    study = arrive(ledger)
    complete(ledger, study)
    admit(ledger, study)
    assert ledger.undecided_studies({"pkg": "1"}, [study]) == []
    assert ledger.undecided_studies({"pkg": "2"}, [study]) == [(study, "pkg")]


def test_what_waits_is_asked_about_again_at_a_start_and_its_tries_stay(ledger: Ledger) -> None:
    """The site's limits may be narrower since; what ends engines is not begun anew for ever."""
    study = arrive(ledger)
    complete(ledger, study)
    admit(ledger, study)
    assert ledger.undecided_studies({"pkg": "1"}) == [(study, "pkg")]
    for _ in range(3):
        assert ledger.take_analysis(["pkg"]) is not None
        ledger.park_analyses(3)
        if ledger.undecided_studies({"pkg": "1"}):
            admit(ledger, study)
    assert study_report(ledger, study)["analyses"][0]["state"] == "failed"
    assert ledger.undecided_studies({"pkg": "1"}) == []


def test_the_inputs_of_an_analysis_are_found_even_when_superseded(ledger: Ledger) -> None:
    study = arrive(ledger, 3)
    inputs = [[one.sop_instance_uid, one.digest] for one in reversed(ledger.instances(study))]
    ledger.record_instances([NewInstance(replace(header(1), kvp=80.0), "newer", 10, 1)])[0]
    found = ledger.inputs(study, inputs)
    assert [[one.sop_instance_uid, one.digest] for one in found] == inputs


def test_what_ends_the_engine_again_and_again_is_set_aside(ledger: Ledger) -> None:
    study = arrive(ledger)
    complete(ledger, study)
    admit(ledger, study)
    for _ in range(3):
        assert ledger.take_analysis(["pkg"]) is not None
        ledger.park_analyses(3)
    assert ledger.take_analysis(["pkg"]) is None
    assert study_report(ledger, study)["analyses"][0]["state"] == "failed"
    assert ledger.requeue_analyses(study) == 1
    assert ledger.take_analysis(["pkg"]) is not None


def test_a_failed_try_waits_for_its_pause(ledger: Ledger) -> None:
    study = arrive(ledger)
    complete(ledger, study)
    admit(ledger, study)
    row = ledger.take_analysis(["pkg"])
    assert row is not None
    assert not ledger.fail_analysis(row["id"], "broken", attempts=3, pause=60.0)
    assert ledger.take_analysis(["pkg"]) is None
    assert ledger.waiting_packages() == set()


def test_a_clock_that_was_set_back_holds_up_no_alert(ledger: Ledger) -> None:
    study = arrive(ledger)
    complete(ledger, study)
    issue(ledger, study)
    row = ledger.take_delivery("er")
    assert row is not None
    ledger.settle_delivery(row, "retry", "busy", wait_seconds=3600.0)  # as if written an hour ahead
    assert ledger.take_delivery("er", longest_pause=7200.0) is None
    assert ledger.take_delivery("er", longest_pause=300.0) is not None


@pytest.mark.parametrize("ahead", [0.0, 3600.0])
def test_an_alert_that_was_first_tried_in_the_future_holds_up_none_behind_it(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    for number, uid in enumerate(("1.2.3", "1.2.4"), start=1):
        association = ledger.open_association("SCANNER", "SCANSIDE", "127.0.0.1")
        ledger.record_instances([NewInstance(header(number, study=uid), uid, 10, association)])
        study = find_study(ledger, uid)
        assert study is not None
        complete(ledger, study)
        issue(ledger, study, revision=number)
    with monkeypatch.context() as patch:
        patch.setattr(outbox, "now", lambda: later(ahead))
        first = ledger.take_delivery("er")
    assert first is not None
    ledger.settle_delivery(first, "retry", "busy", wait_seconds=60.0)  # the clock was set back meanwhile
    second = ledger.take_delivery("er", order_seconds=120.0)
    assert (second["uid"] if second else None) == ("MSG2" if ahead else None)


def test_a_uid_that_another_study_uses_too_takes_nothing_from_it(ledger: Ledger) -> None:
    study = arrive(ledger, 3)
    association = ledger.open_association("SCANNER", "SCANSIDE", "127.0.0.1")
    intruder = header(1, study="9.9.9")
    assert ledger.record_instances([NewInstance(intruder, "other", 10, association)])[0] == "stored"
    assert len(ledger.instances(study)) == 3


def test_what_a_destination_was_told(ledger: Ledger) -> None:
    study = arrive(ledger)
    complete(ledger, study)
    issue(ledger, study)
    analysis = study_report(ledger, study)["analyses"][0]["id"]
    assert ledger.told(analysis) == {"er": [Told(True)]}
    assert [one["revision"] for one in ledger.verdicts(analysis)] == [1]


def test_a_verdict_stands_when_nothing_that_was_analysed_changed(ledger: Ledger) -> None:
    study = arrive(ledger)
    complete(ledger, study)
    assert ledger.standing_verdict(study, "pkg") is None
    issue(ledger, study)
    standing = ledger.standing_verdict(study, "pkg")
    assert standing is not None
    assert standing["inputs"] == [["1.2.3.1.1", "digest-1.2.3.1.1"]]
    ledger.record_instances([NewInstance(header(1, series="1.2.3.7", modality="SR"), "dose", 10, 1)])[0]
    complete(ledger, study)
    ledger.keep_verdict(study, "pkg", [])
    assert ledger.undecided_studies({"pkg": "1"}) == []
    assert len(study_report(ledger, study)["verdicts"]) == 1


# --- what a sender does -------------------------------------------------------------------------------------


def test_each_association_that_brought_some_of_a_series_is_a_visit(ledger: Ledger) -> None:
    """The scout's came first; of the head, two are open at once."""
    scout, one, two = (ledger.open_association(sender, "SCANSIDE", "127.0.0.1") for sender in ("CT1", "CT1", "PACS"))
    ledger.record_instances([NewInstance(header(1, series="1.2.3.9"), "scout", 10, scout)])
    ledger.close_association(scout, "released")
    ledger.record_instances([NewInstance(header(number), f"{number}", 10, one) for number in (1, 2)])
    ledger.record_instances([NewInstance(header(3), "3", 10, two), NewInstance(header(4), "4", 10, one)])
    ledger.close_association(one, "released")
    (row,) = ledger.arriving_studies()
    assert row.calling_ae == "CT1", "who brought the first instance"
    assert row.open_associations == 1
    assert [(series, closed is None) for series, _, closed in row.visits] == [
        ("1.2.3.9", False), ("1.2.3.1", False), ("1.2.3.1", True)
    ]  # fmt: skip
    assert [first for _, first, _ in row.visits] == sorted(first for _, first, _ in row.visits)
    assert row.said_at is None


def test_the_evidence_of_a_senders_last_studies(ledger: Ledger) -> None:
    for number in range(1, 8):
        sender = "CT1" if number % 2 else "CT2"
        association = ledger.open_association(sender, "SCANSIDE", "127.0.0.1")
        new = NewInstance(header(1, study=f"1.{number}", series=f"1.{number}.1"), f"digest-{number}", 10, association)
        ledger.record_instances([new])
        ledger.close_association(association, "released")
        (row,) = ledger.arriving_studies()
        assert row.calling_ae == sender
        ledger.complete_study(row.id, row.last_instance_at, {"calling_ae": sender, "longest_pause_s": float(number)})
    assert [one["longest_pause_s"] for one in ledger.earlier_evidence("CT1", 3)] == [7.0, 5.0, 3.0]
    assert [one["longest_pause_s"] for one in ledger.earlier_evidence("CT2", 20)] == [6.0, 4.0, 2.0]
    assert ledger.earlier_evidence("CT3", 20) == []


def test_the_urgent_are_taken_first(ledger: Ledger) -> None:
    for number, sender in enumerate(["CT1", "CT1", "ER", "CT1"], 1):
        association = ledger.open_association(sender, "SCANSIDE", "127.0.0.1")
        new = NewInstance(header(1, study=f"1.{number}", series=f"1.{number}.1"), f"digest-{number}", 10, association)
        ledger.record_instances([new])
        (row,) = ledger.arriving_studies()
        ledger.complete_study(row.id, row.last_instance_at, {"calling_ae": sender})
        admit(ledger, number)
    assert ledger.take_analysis(["pkg"], [], ["NOBODY"], only_urgent=True) is None
    taken = [ledger.take_analysis(["pkg"], {4}, ["ER"]) for _ in range(4)]
    assert [row["study_id"] for row in taken if row] == [3, 4, 1, 2]
    assert ledger.park_analyses(3, [row["id"] for row in taken[1:] if row]) == 1
    assert ledger.take_analysis(["pkg"], tried=False) is None
    assert 0 < ledger.retry_waited(["pkg"]) < 60 and ledger.retry_waited(["x"]) == 0
    assert [row["study_id"] for row in (ledger.take_analysis(["pkg"], tried=True),) if row] == [3]
