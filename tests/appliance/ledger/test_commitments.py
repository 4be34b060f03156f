"""A request for storage commitment is written down once, and its report is taken by one sender at a time."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from pydicom.uid import CTImageStorage

from appliance.ledger import commitments, database, schema
from appliance.ledger.commitments import Held, requested
from appliance.ledger.database import Row
from appliance.ledger.store import Ledger, NewInstance
from appliance.ledger.views import event_counts, state_counts, verify_events
from dicom_io.commitment import CommitmentRequest, Failure, Reference
from tests.builders import head_series, header

ONE, TWO = Reference(CTImageStorage, "1.2.3.1.1"), Reference(CTImageStorage, "1.2.3.1.2")
REQUEST = CommitmentRequest("1.2.9", (ONE, TWO))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    one = Ledger(tmp_path / "ledger.sqlite")
    yield one
    one.close()


def ask(ledger: Ledger, request: CommitmentRequest = REQUEST, ae: str = "SCANNER", *, due_in: float = 0.0) -> int:
    key = ledger.request_commitment(request, ae, "SCANSIDE", "127.0.0.1", due_in=due_in)
    assert key is not None
    return key


def take(ledger: Ledger, ae: str = "SCANNER") -> Row:
    row = ledger.take_due_commitment(ae)
    assert row is not None
    return row


def states(ledger: Ledger) -> dict[str, int]:
    return state_counts(ledger)["commitment"]


def events(ledger: Ledger) -> dict[str, int]:
    return {name: count for name, count in event_counts(ledger).items() if count}


def test_a_request_comes_back_as_it_was_asked(ledger: Ledger) -> None:
    ask(ledger)
    row = take(ledger)
    assert requested(row) == REQUEST
    assert (row["calling_ae"], row["called_ae"], row["attempts"]) == ("SCANNER", "SCANSIDE", 0)
    assert events(ledger) == {"commitment.requested": 1, "commitment.reporting": 1}
    assert verify_events(ledger) is None


def test_the_same_transaction_is_the_same_request(ledger: Ledger) -> None:
    key = ask(ledger)
    assert ask(ledger, CommitmentRequest("1.2.9", (TWO, ONE))) == key  # the order says nothing
    assert ask(ledger, ae="OTHER") != key  # another device's transaction is another one
    assert states(ledger) == {"requested": 2}


def test_a_transaction_uid_is_not_used_for_other_instances(ledger: Ledger) -> None:
    ask(ledger)
    other = CommitmentRequest("1.2.9", (ONE,))
    assert ledger.request_commitment(other, "SCANNER", "SCANSIDE", "127.0.0.1", due_in=0) is None
    assert requested(take(ledger)) == REQUEST
    assert events(ledger)["commitment.refused"] == 1


def test_a_report_is_taken_once_and_only_when_it_is_due(ledger: Ledger) -> None:
    key = ask(ledger, due_in=60)
    assert ledger.take_due_commitment("SCANNER") is None
    assert ledger.take_due_commitment("OTHER") is None
    assert ledger.take_commitment(key) is not None  # its own association need not wait
    assert ledger.take_commitment(key) is None
    assert ledger.commitment_state(key) == "reporting"


def test_of_many_senders_one_gets_it(ledger: Ledger) -> None:
    key = ask(ledger)
    taken: list[Row] = []
    start = threading.Barrier(6)

    def sender(way: int) -> None:
        start.wait()
        row = ledger.take_commitment(key) if way % 2 else ledger.take_due_commitment("SCANNER")
        if row is not None:
            taken.append(row)

    threads = [threading.Thread(target=sender, args=(way,)) for way in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1


def test_a_clock_that_was_set_back_delays_no_report_for_long(ledger: Ledger) -> None:
    ask(ledger, due_in=10_000)
    assert ledger.take_due_commitment("SCANNER", longest_pause=20_000) is None
    assert ledger.take_due_commitment("SCANNER", longest_pause=300) is not None


def test_each_outcome_is_written_down(ledger: Ledger) -> None:
    ask(ledger)
    assert ledger.settle_commitment(take(ledger), "retry", "it did not answer", wait_seconds=60)
    assert ledger.take_due_commitment("SCANNER") is None
    (row,) = ledger.commitments()
    assert (row["state"], row["attempts"], row["reason"]) == ("requested", 1, "it did not answer")
    with ledger._write() as connection:
        connection.execute(schema.commitment.update().values(due_at=database.now()))
    assert ledger.settle_commitment(take(ledger), "acknowledge", failed=[Failure(TWO, 0x0112)])
    (row,) = ledger.commitments()
    assert (row["state"], row["attempts"], row["failed"]) == ("acknowledged", 2, [["1.2.3.1.2", 0x0112]])
    assert row["acknowledged_at"]
    assert events(ledger) == {"commitment.requested": 1, "commitment.reporting": 2, "commitment.retried": 1,
                              "commitment.reported": 1}  # fmt: skip


@pytest.mark.parametrize("outcome", ["acknowledge", "give_up"])
def test_a_settled_request_is_answered_again_when_it_is_asked_again(ledger: Ledger, outcome: str) -> None:
    key = ask(ledger)
    ledger.settle_commitment(take(ledger), outcome)  # type: ignore[arg-type]
    assert ledger.take_due_commitment("SCANNER") is None
    assert ask(ledger) == key
    assert take(ledger)["attempts"] == 0


def test_asking_again_does_not_disturb_a_report_under_way(ledger: Ledger) -> None:
    ask(ledger)
    row = take(ledger)
    ask(ledger)
    assert ledger.take_due_commitment("SCANNER") is None
    assert ledger.settle_commitment(row, "acknowledge")
    assert states(ledger) == {"acknowledged": 1}


def test_a_try_that_was_forgotten_is_taken_up_and_its_late_outcome_changes_nothing(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(ledger)
    monkeypatch.setattr(commitments, "LEASE_SECONDS", -1.0)
    forgotten = take(ledger)
    again = take(ledger)
    assert again["attempts"] == 1
    assert not ledger.settle_commitment(forgotten, "give_up")
    assert ledger.settle_commitment(again, "acknowledge")
    assert events(ledger)["commitment.parked"] == 1


def test_after_a_crash_what_was_on_its_way_is_sent_again(tmp_path: Path) -> None:
    first = Ledger(tmp_path / "ledger.sqlite")
    ask(first)
    take(first)
    ask(first, CommitmentRequest("1.2.10", (ONE,)), due_in=60)  # for the association that the crash ended
    ask(first, CommitmentRequest("1.2.11", (ONE,)))
    assert first.settle_commitment(take(first), "retry", wait_seconds=60)
    ask(first, ae="NOWHERE")
    first.close()
    second = Ledger(tmp_path / "ledger.sqlite")
    assert second.park_commitments({"SCANNER"}) == 3
    taken = [second.take_due_commitment("SCANNER", longest_pause=3600) for _ in range(2)]
    assert {(row["transaction_uid"], row["attempts"]) for row in taken if row} == {("1.2.9", 1), ("1.2.10", 0)}
    assert second.take_due_commitment("SCANNER") is None  # the third is in the pause after its first try
    assert [(row["state"], row["reason"]) for row in second.commitments() if row["calling_ae"] == "NOWHERE"] == [
        ("dead", "no address configured for AE NOWHERE")
    ]
    second.close()


def test_when_an_association_ends_its_reports_go_another_way_or_nowhere(ledger: Ledger) -> None:
    known, unknown = ask(ledger, due_in=60), ask(ledger, ae="NOWHERE", due_in=60)
    under_way = ask(ledger, CommitmentRequest("1.2.10", (ONE,)), ae="NOWHERE")
    ledger.take_commitment(under_way)
    assert ledger.leave_commitments([known, unknown, under_way], {"SCANNER"}) == 1
    assert take(ledger)["id"] == known
    assert ledger.commitment_state(unknown) == "dead"
    assert ledger.commitment_state(under_way) == "reporting"


def test_current_instances_are_found_by_their_uids(ledger: Ledger) -> None:
    association = ledger.open_association("SCANNER", "SCANSIDE", "127.0.0.1")
    arrived = [NewInstance(one, f"digest-{one.sop_instance_uid}", 10, association) for one in head_series(3)]
    ledger.record_instances([*arrived, NewInstance(replace(header(1), kvp=100.0), "newer", 11, association)])
    uid = header(1).sop_instance_uid
    found = ledger.current_instances([uid, "9.9.9", header(2).sop_instance_uid])
    assert found == {
        uid: [Held(header(1).sop_class_uid, "newer", 11)],
        header(2).sop_instance_uid: [Held(header(2).sop_class_uid, f"digest-{header(2).sop_instance_uid}", 10)],
    }
    with ledger._write() as connection:
        connection.execute(
            schema.instance.update().where(schema.instance.c.digest == "newer").values(removed_at=database.now())
        )
    assert ledger.current_instances([uid]) == {}
    # more than SQLite takes in one statement
    assert (
        len(ledger.current_instances([f"1.{number}" for number in range(40_000)] + [header(2).sop_instance_uid])) == 1
    )


def test_a_ledger_of_the_first_schema_is_migrated_and_goes_back(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    config = Config()
    config.set_main_option("script_location", str(Path(database.__file__).parent / "migrations"))
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    ledger = Ledger(path)
    ask(ledger)
    assert states(ledger) == {"requested": 1}
    ledger.close()
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0001")
    engine.dispose()
    with sqlite3.connect(path) as raw:
        tables = {row[0] for row in raw.execute("select name from sqlite_master where type = 'table'")}
    assert "commitment" not in tables and "delivery" in tables
