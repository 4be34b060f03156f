"""A request is answered with what is really there, on its own association or another one, until it is acknowledged."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydicom.uid import CTImageStorage, MRImageStorage
from sqlalchemy.exc import OperationalError

from appliance.intake import commitment as module
from appliance.intake.commitment import CommitmentProvider, Reporter
from appliance.intake.spool import path_of
from appliance.ledger.database import Row
from appliance.ledger.store import Ledger, NewInstance
from appliance.ledger.views import event_counts
from dicom_io.commitment import CommitmentReport, CommitmentRequest, Failure, Reference
from dicom_io.errors import PeerError
from dicom_io.handlers import Session
from dicom_io.scu import Peer
from tests.builders import header

KNOWN = Peer("SCANNER", "127.0.0.1", 11113)
UIDS = [header(number).sop_instance_uid for number in range(1, 4)]
REFERENCES = tuple(Reference(CTImageStorage, uid) for uid in UIDS)
REQUEST = CommitmentRequest("1.2.9", REFERENCES)


class Device:
    """Where reports on new associations go: answers as it is told to."""

    def __init__(self, *answers: int | Exception) -> None:
        self.answers = list(answers)
        self.heard: list[tuple[Peer, str, CommitmentReport]] = []
        self.row_when_heard: list[tuple[str, int]] = []
        self.ledger: Ledger | None = None

    def __call__(self, peer: Peer, our_ae: str, report: CommitmentReport) -> int:
        self.heard.append((peer, our_ae, report))
        if self.ledger is not None:
            (row,) = self.ledger.commitments()
            self.row_when_heard.append((row["state"], row["attempts"]))
        answer = self.answers.pop(0) if self.answers else 0
        if isinstance(answer, Exception):
            raise answer
        return answer


class Bench:
    """A provider with three stored instances."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spool = folder / "spool"
        self.ledger = Ledger(folder / "ledger.sqlite")
        self.due = 0
        self.shortage = ""
        self.provider = self.provide()
        association = self.ledger.open_association("SCANNER", "SCANSIDE", "127.0.0.1")
        for number in range(1, 4):
            path, digest = self.file(number), self.digest(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.content(number))
            self.ledger.record_instances([NewInstance(header(number), digest, 10, association)])

    def provide(self, **changes: Any) -> CommitmentProvider:
        options = {"attempts": 3, "first_retry_seconds": 0.01, "longest_retry_seconds": 0.02, "hold_seconds": 0.0}
        return CommitmentProvider(
            self.ledger, self.spool, {KNOWN.ae_title: KNOWN}, shortage=lambda: self.shortage, due=self._due,
            **(options | changes),
        )  # fmt: skip

    def _due(self) -> None:
        self.due += 1

    def row(self) -> Row:
        (row,) = self.ledger.commitments()
        return row

    def content(self, number: int) -> bytes:
        return f"instance {number}".encode()

    def digest(self, number: int) -> str:
        return hashlib.sha256(self.content(number)).hexdigest()

    def file(self, number: int) -> Path:
        return path_of(self.spool, self.digest(number))

    def events(self) -> dict[str, int]:
        return {
            name: count for name, count in event_counts(self.ledger).items() if count and name.startswith("commitment.")
        }

    def reporting(self, device: Callable[[Peer, str, CommitmentReport], int], done: Callable[[], bool]) -> None:
        """Run the worker until something is so."""
        worker = Reporter(self.ledger, self.provider, KNOWN, send=device)
        worker.start()
        deadline = time.monotonic() + 20
        while not done():
            assert time.monotonic() < deadline, (self.row()["state"], self.row()["reason"])
            worker.wake()
            time.sleep(0.01)
        worker.stop()
        worker.join(10)
        assert not worker.is_alive()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    one = Bench(tmp_path)
    yield one
    one.ledger.close()


def session(number: int = 1, ae: str = "SCANNER") -> Session:
    return Session(number, ae, "SCANSIDE", "127.0.0.1")


# --- what is committed to ---------------------------------------------------------------------------------


def test_what_is_in_ledger_and_spool_is_committed_to(bench: Bench) -> None:
    assert bench.provider.judge(REQUEST) == CommitmentReport("1.2.9", REFERENCES, ())


def test_what_is_not_there_is_no_such_instance(bench: Bench) -> None:
    bench.file(2).unlink()
    absent = Reference(CTImageStorage, "9.9.9")
    report = bench.provider.judge(CommitmentRequest("1.2.9", (*REFERENCES, absent)))
    assert report.committed == (REFERENCES[0], REFERENCES[2])
    assert report.failed == tuple(Failure(one, 0x0112) for one in (REFERENCES[1], absent))


@pytest.mark.parametrize("content", [b"cut", b"rotten 123"])
def test_what_is_no_longer_what_was_received_is_a_failure(bench: Bench, content: bytes) -> None:
    """Also where the disk lost a bit and kept the size."""
    bench.file(2).write_bytes(content)
    report = bench.provider.judge(REQUEST)
    assert report.failed == (Failure(REFERENCES[1], 0x0110),)
    bench.file(2).write_bytes(bench.content(2))
    assert bench.provider.judge(REQUEST).failed == ()


def test_another_class_is_a_conflict(bench: Bench) -> None:
    wrong = Reference(MRImageStorage, UIDS[0])
    report = bench.provider.judge(CommitmentRequest("1.2.9", (wrong, REFERENCES[1])))
    assert report == CommitmentReport("1.2.9", (REFERENCES[1],), (Failure(wrong, 0x0119),))


def test_a_spool_that_cannot_be_looked_at_commits_to_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_directory: Path, _digest: str) -> Path:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module, "path_of", broken)
    report = bench.provider.judge(REQUEST)
    assert report.failed == tuple(Failure(one, 0x0110) for one in REFERENCES)


# --- on its own association -------------------------------------------------------------------------------


def test_a_report_on_its_own_association(bench: Bench) -> None:
    assert bench.provider.report(session()) is None
    assert bench.provider.commitment(session(), REQUEST) == 0x0000
    assert bench.row()["state"] == "requested"
    assert bench.provider.report(session(2, "OTHER")) is None
    report = bench.provider.report(session())
    assert report == CommitmentReport("1.2.9", REFERENCES, ())
    assert (bench.row()["state"], bench.row()["attempts"]) == ("reporting", 1)
    assert bench.provider.report(session()) is None
    bench.provider.reported(session(), "1.2.9", 0x0000)
    assert bench.row()["state"] == "acknowledged"
    bench.provider.closed(session())
    assert bench.events() == {"commitment.requested": 1, "commitment.reporting": 1, "commitment.reported": 1}


def slowly(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Files that take their time to be read: until the event is set."""
    read = threading.Event()

    def is_intact(*_: object) -> bool:
        assert read.wait(30)
        return True

    monkeypatch.setattr(module, "JUDGE_SECONDS", 0.01)
    monkeypatch.setattr(module, "is_intact", is_intact)
    return read


def test_an_association_does_not_wait_for_files_that_take_long(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    read = slowly(bench, monkeypatch)
    bench.provider.commitment(session(), REQUEST)
    assert bench.provider.report(session()) is None
    assert bench.provider.report(session()) is None
    read.set()
    monkeypatch.setattr(module, "JUDGE_SECONDS", 30.0)
    assert bench.provider.report(session()) == CommitmentReport("1.2.9", REFERENCES, ())
    bench.provider.reported(session(), "1.2.9", 0x0000)
    assert (bench.row()["state"], bench.row()["attempts"]) == ("acknowledged", 1)


def test_an_association_that_ends_while_files_are_read(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    read = slowly(bench, monkeypatch)
    bench.provider.commitment(session(), REQUEST)
    assert bench.provider.report(session()) is None
    bench.provider.closed(session())
    read.set()
    device = Device()
    bench.reporting(device, lambda: bench.row()["state"] == "acknowledged")
    assert [report.committed for _, _, report in device.heard] == [REFERENCES]


def test_a_peer_that_releases_at_once_is_left_alone(bench: Bench) -> None:
    bench.provider = bench.provide(hold_seconds=60.0)
    bench.provider.commitment(session(), REQUEST)
    assert bench.provider.report(session()) is None
    bench.provider.closed(session())
    assert bench.due == 1
    device = Device()
    bench.reporting(device, lambda: bench.row()["state"] == "acknowledged")
    assert device.heard == [(KNOWN, "SCANSIDE", CommitmentReport("1.2.9", REFERENCES, ()))]


@pytest.mark.parametrize("status", [None, 0x0110])
def test_a_report_that_was_not_acknowledged_is_sent_over_a_new_association(bench: Bench, status: int | None) -> None:
    bench.provider.commitment(session(), REQUEST)
    assert bench.provider.report(session()) is not None
    bench.provider.reported(session(), "1.2.9", status)
    bench.provider.closed(session())
    assert bench.row()["state"] == "requested"
    device = Device()
    bench.reporting(device, lambda: bench.row()["state"] == "acknowledged")
    assert len(device.heard) == 1
    assert bench.row()["attempts"] == 2


def test_an_association_that_ends_while_an_answer_is_awaited(bench: Bench) -> None:
    bench.provider.commitment(session(), REQUEST)
    bench.provider.report(session())
    bench.provider.closed(session())
    assert (bench.row()["state"], bench.row()["reason"]) == (
        "requested",
        "its own association ended without an answer",
    )


def test_a_peer_without_an_address_has_its_own_association_only(bench: Bench) -> None:
    nowhere = session(7, "NOWHERE")
    bench.provider.commitment(nowhere, REQUEST)
    bench.provider.closed(nowhere)
    assert (bench.row()["state"], bench.row()["reason"]) == ("dead", "no address configured for AE NOWHERE")
    assert bench.due == 0
    # asked again, and answered
    again = session(8, "NOWHERE")
    assert bench.provider.commitment(again, REQUEST) == 0x0000
    assert bench.provider.report(again) is not None
    bench.provider.reported(again, "1.2.9", 0x0000)
    bench.provider.closed(again)
    assert bench.row()["state"] == "acknowledged"


def test_a_peer_without_an_address_that_does_not_answer(bench: Bench) -> None:
    nowhere = session(7, "NOWHERE")
    bench.provider.commitment(nowhere, REQUEST)
    bench.provider.report(nowhere)
    bench.provider.reported(nowhere, "1.2.9", None)
    assert bench.row()["state"] == "dead"
    assert bench.row()["reason"] == "no address configured for AE NOWHERE; no answer on its own association"


def test_a_peer_that_lost_its_association_asks_again_on_another(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first association hangs with a report on it; the second one must get it when the first is given up."""
    monkeypatch.setattr(module, "POLL_SECONDS", 0.0)
    first, second = session(7, "NOWHERE"), session(8, "NOWHERE")
    bench.provider.commitment(first, REQUEST)
    assert bench.provider.report(first) is not None
    assert bench.provider.commitment(second, REQUEST) == 0x0000
    assert bench.provider.report(second) is None  # it is under way
    bench.provider.reported(first, "1.2.9", None)
    bench.provider.closed(first)
    assert bench.row()["state"] == "requested"
    assert bench.provider.report(second) is not None
    bench.provider.reported(second, "1.2.9", 0x0000)
    assert bench.row()["state"] == "acknowledged"


def test_of_two_associations_that_asked_the_one_that_stays_is_told(bench: Bench) -> None:
    first, second = session(7, "NOWHERE"), session(8, "NOWHERE")
    bench.provider.commitment(first, REQUEST)
    bench.provider.commitment(second, REQUEST)
    bench.provider.closed(first)
    assert bench.provider.report(second) is not None
    bench.provider.reported(second, "1.2.9", 0x0000)
    assert bench.row()["state"] == "acknowledged"


def test_what_was_not_committed_to_is_kept_with_the_answer(bench: Bench) -> None:
    bench.file(2).unlink()
    bench.provider.commitment(session(), REQUEST)
    bench.provider.report(session())
    bench.provider.reported(session(), "1.2.9", 0x0000)
    assert bench.row()["failed"] == [[UIDS[1], 0x0112]]


def test_an_answer_counts_once(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    nowhere = session(7, "NOWHERE")
    bench.provider.commitment(nowhere, REQUEST)
    bench.provider.report(nowhere)
    bench.provider.reported(nowhere, "1.2.9", 0x0000)
    bench.provider.reported(nowhere, "1.2.9", 0x0110)
    bench.provider.reported(nowhere, "9.9.9", 0x0000)
    bench.provider.closed(nowhere)
    assert bench.row()["state"] == "acknowledged"
    assert "dead letter" not in caplog.text


def test_two_requests_of_one_association_are_reported_one_after_another(bench: Bench) -> None:
    other = CommitmentRequest("1.2.10", REFERENCES[:1])
    bench.provider.commitment(session(), REQUEST)
    bench.provider.commitment(session(), other)
    told = []
    while (report := bench.provider.report(session())) is not None:
        told.append(report.transaction_uid)
        bench.provider.reported(session(), report.transaction_uid, 0x0000)
    assert told == ["1.2.9", "1.2.10"]
    assert {row["state"] for row in bench.ledger.commitments()} == {"acknowledged"}


# --- requests that are not taken --------------------------------------------------------------------------


def test_a_full_disk_takes_no_requests(bench: Bench) -> None:
    bench.shortage = "the disk's reserve is reached"
    assert bench.provider.commitment(session(), REQUEST) == 0x0213
    assert bench.ledger.commitments() == []
    assert bench.events() == {"commitment.refused": 1}


def test_a_transaction_uid_of_other_instances_is_refused(bench: Bench) -> None:
    bench.provider.commitment(session(), REQUEST)
    assert bench.provider.commitment(session(), replace(REQUEST, references=REFERENCES[:1])) == 0x0115


def test_a_request_that_cannot_be_written_down_is_not_accepted(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> int:
        raise OperationalError("insert", {}, Exception("disk I/O error"))

    monkeypatch.setattr(bench.ledger, "request_commitment", broken)
    assert bench.provider.commitment(session(), REQUEST) == 0x0110
    assert bench.provider.report(session()) is None


# --- over associations of ours ----------------------------------------------------------------------------


def waiting(bench: Bench) -> None:
    """A request whose association has ended."""
    bench.provider.commitment(session(), REQUEST)
    bench.provider.closed(session())


def test_each_try_is_written_down_before_it_is_made(bench: Bench) -> None:
    waiting(bench)
    device = Device(PeerError("it cannot be reached"), 0x0000)
    device.ledger = bench.ledger
    bench.reporting(device, lambda: bench.row()["state"] == "acknowledged")
    assert device.row_when_heard == [("reporting", 1), ("reporting", 2)]


def test_a_late_report_tells_what_is_there_now(bench: Bench) -> None:
    bench.file(1).rename(bench.folder / "away")
    waiting(bench)
    device = Device(PeerError("it cannot be reached"))

    def send(peer: Peer, our_ae: str, report: CommitmentReport) -> int:
        if not device.heard:  # here, as the next try may come before anybody else could do it
            (bench.folder / "away").rename(bench.file(1))
        return device(peer, our_ae, report)

    bench.reporting(send, lambda: bench.row()["state"] == "acknowledged")
    assert [len(report.failed) for _, _, report in device.heard] == [1, 0]
    assert bench.row()["failed"] == []


def test_tries_end_and_the_reason_is_kept(bench: Bench) -> None:
    waiting(bench)
    device = Device(PeerError("it cannot be reached"), ValueError("odd"), 0x0112, 0x0000)
    bench.reporting(device, lambda: bench.row()["state"] == "dead")
    assert len(device.heard) == 3
    assert bench.row()["reason"] == "the peer answered 0x0112"
    assert bench.events() == {"commitment.requested": 1, "commitment.reporting": 3, "commitment.retried": 2,
                              "commitment.dead": 1}  # fmt: skip


def test_pauses_double_up_to_a_bound(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.provider = bench.provide(attempts=6, first_retry_seconds=1.0, longest_retry_seconds=5.0)
    waiting(bench)
    pauses: list[float] = []
    settle = bench.ledger.settle_commitment

    def at_once(row: Row, outcome: Any, reason: str = "", *, wait_seconds: float = 0.0, **rest: Any) -> bool:
        pauses.append(wait_seconds)
        return settle(row, outcome, reason, wait_seconds=0.0, **rest)

    monkeypatch.setattr(bench.ledger, "settle_commitment", at_once)
    bench.reporting(Device(*[PeerError("no")] * 6), lambda: bench.row()["state"] == "dead")
    assert pauses == [1.0, 2.0, 4.0, 5.0, 5.0, 0.0]


def test_an_outcome_that_cannot_be_written_is_not_lost(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the device would be told again what it has acknowledged."""
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    waiting(bench)
    settle, failures = bench.ledger.settle_commitment, [1, 2, 3]

    def sometimes(*arguments: Any, **rest: Any) -> bool:
        if failures:
            failures.pop()
            raise OperationalError("update", {}, Exception("database is locked"))
        return settle(*arguments, **rest)

    monkeypatch.setattr(bench.ledger, "settle_commitment", sometimes)
    device = Device()
    bench.reporting(device, lambda: bench.row()["state"] == "acknowledged")
    assert len(device.heard) == 1


def test_after_the_end_of_the_process_the_report_is_sent_by_the_next(bench: Bench) -> None:
    waiting(bench)
    assert bench.ledger.take_due_commitment("SCANNER") is not None  # and then kill -9
    bench.provider = bench.provide()
    bench.ledger.park_commitments({"SCANNER"})
    device = Device()
    bench.reporting(device, lambda: bench.row()["state"] == "acknowledged")
    assert len(device.heard) == 1
    assert bench.events()["commitment.parked"] == 1


def test_a_report_for_an_open_association_is_not_taken_from_it(bench: Bench) -> None:
    bench.provider.commitment(session(), REQUEST)
    assert bench.ledger.take_due_commitment("SCANNER", bench.provider.longest_pause) is None
    assert bench.provider.report(session()) is not None
