"""Files go only after the ledger says so, in any order of events and wherever the process ends."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from appliance.accounting import account
from appliance.intake import retention as module
from appliance.intake.committer import Committer
from appliance.intake.retention import Retention, Room
from appliance.intake.spool import Spool, path_of
from appliance.ledger import database
from appliance.ledger import schema as t
from appliance.ledger.database import later, now
from appliance.ledger.ingest import NewInstance
from appliance.ledger.records import Verdict
from appliance.ledger.store import Ledger, NewFinding
from appliance.ledger.views import event_counts, troubles, verify_events
from appliance.settings import Settings
from dicom_io.header import Header
from tests.builders import header

PLENTY = Room(free=900, total=1000)
LOW = Room(free=100, total=1000)
HOURS = 3600.0


def made_settings(folder: Path, **retention: object) -> Settings:
    return Settings(
        box={"state_directory": folder},
        intake={"reserve_bytes": 0, "reserve_percent": 0},
        models={"packages": ["pkg"]},
        retention=retention,
    )  # type: ignore[arg-type]


class Box:
    """A ledger with a spool and findings, into which studies come and are finished."""

    def __init__(self, folder: Path, **retention: object) -> None:
        self.settings = made_settings(folder, **retention)
        self.folder = folder
        self.room = LOW
        self.open()
        self.association = self.ledger.open_association("S", "B", "127.0.0.1")

    def open(self) -> None:
        """Start intake: what was begun is finished."""
        self.ledger = Ledger(self.settings.ledger_path)
        self.spool = Spool(self.settings.spool_directory)
        self.settings.findings_directory.mkdir(exist_ok=True)
        self.swept = self.spool.sweep(self.ledger.digests(), self.ledger.removed_among).removed
        self.committer = Committer(self.ledger, self.spool, lambda: None)
        self.retention = Retention(self.ledger, self.settings, self.committer.paused, lambda: self.room)

    def store(self, one: Header, content: bytes = b"") -> str:
        """One instance, as an association of its own brings it."""
        lane = self.spool.take_lane()
        file = self.spool.open(lane)
        file.write(memoryview(content or one.sop_instance_uid.encode() * 10))
        file.sync()
        outcome = self.committer.commit(file, NewInstance(one, file.digest, file.size, self.association))
        self.spool.give_back(lane)
        self.spool.settle()
        return outcome

    def receive(self, study: int, images: int = 3) -> list[Header]:
        headers = [header(number, study=f"1.{study}", series=f"1.{study}.1") for number in range(1, images + 1)]
        for one in headers:
            assert self.store(one) == "stored"
        return headers

    def finish(self, study: int, *, age_hours: float = 100.0, delivered: bool = True) -> None:
        """Complete, analyse, render and deliver the newest study, ``age_hours`` ago."""
        (arriving,) = self.ledger.arriving_studies()
        self.ledger.complete_study(arriving.id, arriving.last_instance_at, {"by": "test", "confidence": "high"})
        inputs = [[one.sop_instance_uid, one.digest] for one in self.ledger.instances(arriving.id)]
        self.ledger.decide(arriving.id, "pkg", "1", admitted=True, reason="", admission=[], selection=[], inputs=inputs)
        row = self.ledger.take_analysis(["pkg"])
        assert row is not None
        revision = len(self.ledger.verdicts(row["id"])) + 1
        folder = Path(f"{arriving.id:06d}-pkg-{revision}")
        (self.settings.findings_directory / folder).mkdir(exist_ok=True)
        (self.settings.findings_directory / folder / "alert.hl7").write_text("alert")
        verdict = Verdict(f"1.{study}", f"1.{study}.1", "pkg", "1", "n", True, 0.9, 0.5, {}, 0.0, (), (), (), ())
        findings = [
            NewFinding("alert.er", f"MSG{study}.{revision}", str(folder / "alert.hl7"), ("er",), 0),
            NewFinding("report", f"2.25.{study}.{revision}", None, ("pacs",), 10),
        ]
        self.ledger.issue_verdict(row["id"], revision, verdict, now(), findings, admission=[], late=False)
        unmade = self.ledger.unrendered_finding(3)
        assert unmade is not None
        (self.settings.findings_directory / folder / "report.dcm").write_text("report")
        self.ledger.rendered(unmade["id"], arriving.id, str(folder / "report.dcm"))
        for destination in ("er", "pacs"):
            delivery = self.ledger.take_delivery(destination)
            assert delivery is not None
            self.ledger.settle_delivery(delivery, "acknowledge" if delivered else "give_up")
        at = later(-age_hours * HOURS)
        with self.ledger._write() as connection:
            connection.execute(t.study.update().where(t.study.c.id == arriving.id).values(completed_at=at))

    def studies(self) -> dict[str, bool]:
        """Study → whether its files are there; fails if a row and a file do not go together."""
        spool, folder = self.settings.spool_directory, self.settings.findings_directory
        with self.ledger.read() as connection:
            studies = connection.execute(sa.select(t.study)).all()
            instances = connection.execute(sa.select(t.instance)).all()
            findings = connection.execute(sa.select(t.finding).where(t.finding.c.path.is_not(None))).all()
        named = {path_of(spool, row.digest) for row in instances if row.removed_at is None}
        assert set(spool.glob("??/*")) == named
        assert not [path for path in (spool / "incoming").rglob("*") if path.is_file()]
        made = {folder / row.path for row in findings if row.removed_at is None}
        assert {path for path in folder.rglob("*") if path.is_file()} == made
        for study in studies:
            mine = [row.removed_at is None for row in instances if row.study_id == study.id]
            assert any(mine) == (study.removed_at is None)
        assert verify_events(self.ledger) is None
        return {study.study_instance_uid: study.removed_at is None for study in studies}


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    one = Box(tmp_path)
    yield one
    one.ledger.close()


def test_with_room_everything_stays(box: Box) -> None:
    box.receive(1)
    box.finish(1, age_hours=10_000)
    box.room = PLENTY
    assert box.retention.step() == 0
    assert box.studies() == {"1.1": True}


def test_the_oldest_go_until_there_is_room(box: Box) -> None:
    for study, age in ((1, 100), (2, 300), (3, 200), (4, 80)):
        box.receive(study)
        box.finish(study, age_hours=age)

    def room() -> Room:
        return Room(free=100 + 50 * sum(not there for there in box.studies().values()), total=1000)

    keeper = Retention(box.ledger, box.settings, room=room)
    assert keeper.step() == 2
    assert box.studies() == {"1.1": True, "1.2": False, "1.3": False, "1.4": True}
    assert keeper.step() == 0


def test_nothing_unfinished_goes_however_full_the_disk_is(box: Box, caplog: pytest.LogCaptureFixture) -> None:
    box.receive(1)
    box.finish(1, delivered=False)
    box.receive(2)
    box.finish(2, age_hours=71)
    box.receive(3)
    box.room = Room(free=0, total=1000)
    with caplog.at_level(logging.INFO, logger=module.__name__):
        assert [box.retention.step() for _ in range(3)] == [0, 0, 0]
    assert box.studies() == {"1.1": True, "1.2": True, "1.3": True}
    (record,) = caplog.records
    assert (record.levelname, "3 studies are held" in record.getMessage()) == ("ERROR", True)
    assert event_counts(box.ledger)["retention.exhausted"] == 1
    box.ledger.release_study(1)
    assert box.retention.step() == 1
    assert box.studies() == {"1.1": False, "1.2": True, "1.3": True}


@pytest.mark.parametrize(
    ("room", "low"),
    [
        (Room(149, 1000), True),
        (Room(150, 1000), False),
        (Room(900, 1000, inodes_percent=14), True),
        (Room(900, 1000, inodes_percent=15), False),
    ],
)
def test_the_disk_is_low_below_its_mark_of_bytes_or_inodes(box: Box, room: Room, low: bool) -> None:
    box.receive(1)
    box.finish(1)
    box.room = room
    assert box.retention.plan().low is low
    assert box.retention.step() == int(low)


def test_retention_begins_before_intake_refuses(tmp_path: Path) -> None:
    box = Box(tmp_path)
    intake = box.settings.intake.model_copy(update={"reserve_bytes": 400})
    settings = box.settings.model_copy(update={"intake": intake})
    for free, low in ((599, True), (601, False)):
        assert Retention(box.ledger, settings, room=lambda free=free: Room(free, 1000)).plan().low is low


def test_a_study_past_keep_days_goes_even_if_there_is_room(tmp_path: Path) -> None:
    box = Box(tmp_path, keep_days=7)
    box.room = PLENTY
    for study, days in ((1, 8), (2, 6)):
        box.receive(study)
        box.finish(study, age_hours=days * 24)
    assert [one.study_id for one in box.retention.plan().goes] == [1]
    assert box.retention.step() == 1
    assert box.studies() == {"1.1": False, "1.2": True}


def clock_ahead(monkeypatch: pytest.MonkeyPatch, hours: float) -> None:
    """Set the wall clock, and not the one that says how long the box has run."""

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(hours=hours)

    monkeypatch.setattr(database, "datetime", Shifted)


def test_a_clock_that_jumped_ahead_removes_nothing_by_age(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    box = Box(tmp_path, keep_days=30, troubled_days=60)
    box.room = PLENTY
    box.receive(1)
    box.finish(1, age_hours=48)
    box.receive(2)
    box.finish(2, age_hours=24, delivered=False)
    assert box.retention.step() == 0
    clock_ahead(monkeypatch, 365 * 24)
    assert (box.retention.step(), box.retention.step()) == (0, 0)
    assert box.studies() == {"1.1": True, "1.2": True}
    assert sum("clock" in record.getMessage() for record in caplog.records) == 1
    assert event_counts(box.ledger)["retention.suspended"] == 1
    box.room = LOW  # then they go as ever, but none that has troubles
    assert box.retention.step() == 1
    assert box.studies() == {"1.1": False, "1.2": True}
    clock_ahead(monkeypatch, 0.5)
    assert box.retention.step() == 0
    clock_ahead(monkeypatch, 365 * 24)
    box.retention.step()
    assert event_counts(box.ledger)["retention.suspended"] == 2
    box.ledger.close()


def test_time_that_passes_makes_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Box(tmp_path, keep_days=30)
    box.room = PLENTY
    box.receive(1)
    box.finish(1, age_hours=48)
    assert box.retention.step() == 0
    passed = 60 * 24 * HOURS
    clock_ahead(monkeypatch, passed / HOURS)
    real = time.clock_gettime
    monkeypatch.setattr(time, "clock_gettime", lambda clock: real(clock) + passed)
    assert box.retention.step() == 1
    assert box.studies() == {"1.1": False}
    box.ledger.close()


def test_the_plan_names_what_would_go_and_changes_nothing(box: Box) -> None:
    for study, age in ((1, 300), (2, 200), (3, 1)):
        box.receive(study)
        box.finish(study, age_hours=age)
    size = box.retention.plan().goes[0].size
    box.room = Room(free=10_000 - size, total=50_000)
    plan = box.retention.plan()
    assert (plan.low, plan.wanted) == (False, 0)
    assert [[one.study_id for one in part] for part in (plan.goes, plan.may_go, plan.held)] == [[], [1, 2], [3]]
    box.room = Room(free=100_000 - size, total=500_000)
    box.settings = box.settings.model_copy(
        update={"retention": box.settings.retention.model_copy(update={"start_percent": 20.0})}
    )
    plan = Retention(box.ledger, box.settings, room=lambda: box.room).plan()
    assert (plan.low, plan.wanted) == (True, size)
    assert [[one.study_id for one in part] for part in (plan.goes, plan.may_go, plan.held)] == [[1], [2], [3]]
    assert all(box.studies().values())


def test_what_was_superseded_goes_with_its_study(box: Box) -> None:
    one = box.receive(1)[0]
    file = box.spool.open(box.spool.take_lane())
    file.write(memoryview(b"other bytes"))
    file.sync()
    assert box.committer.commit(file, NewInstance(one, file.digest, file.size, box.association)) == "conflict"
    box.spool.give_back(file.lane)
    box.spool.settle()
    box.finish(1)
    assert box.retention.step() == 1
    assert box.studies() == {"1.1": False}


def test_the_ledger_gets_room_back(box: Box) -> None:
    box.receive(1, images=100)
    box.finish(1)

    def pages(pragma: str) -> int:
        with box.ledger.read() as connection:
            return int(connection.exec_driver_sql(f"pragma {pragma}").scalar())

    before = pages("freelist_count")
    assert box.retention.step() == 1
    freed = (pages("freelist_count") - before) * pages("page_size")
    assert freed > 100 * 1000  # most of the headers, of 1.5 kB each


def test_the_account_of_the_day_adds_up_afterwards(box: Box) -> None:
    box.receive(1)
    box.finish(1)
    box.receive(2)
    assert box.retention.step() == 1
    told = account(box.ledger, box.settings.spool_directory, datetime.now(UTC).date(), verify=True)
    assert (told.balanced, told.kept, told.removed) == (True, 6, 3)
    assert told.outcomes == {"analysed": 3, "waiting: its study is not complete": 3}
    kept = box.ledger.instances(2)[0]
    path_of(box.settings.spool_directory, kept.digest).unlink()
    told = account(box.ledger, box.settings.spool_directory, datetime.now(UTC).date())
    assert (told.balanced, told.missing_files) == (False, (kept.digest,))


def test_a_removed_study_needs_nobody(box: Box) -> None:
    box.receive(1)
    box.finish(1, delivered=False)
    assert len(troubles(box.ledger)["deliveries"]) == 2
    box.ledger.release_study(1)
    assert box.retention.step() == 1
    assert troubles(box.ledger)["deliveries"] == []


def test_a_removed_study_that_is_sent_again_is_stored_anew(box: Box) -> None:
    headers = box.receive(1)
    box.finish(1)
    assert box.retention.step() == 1
    assert box.store(headers[0]) == "stored"
    assert box.store(headers[0]) == "duplicate"
    assert box.studies() == {"1.1": True}
    assert [one.header for one in box.ledger.instances(1)] == headers[:1]
    assert box.ledger.removed_instances(1) == 2
    assert box.retention.step() == 0
    for one in headers[1:]:
        assert box.store(one) == "stored"
    assert box.ledger.removed_instances(1) == 0
    assert [one.header for one in box.ledger.instances(1)] == headers
    assert event_counts(box.ledger)["study.reopened"] == 1
    box.finish(1)
    assert box.retention.step() == 1
    assert box.studies() == {"1.1": False}


def test_an_instance_of_a_removed_study_with_other_bytes_is_a_conflict(box: Box) -> None:
    one = box.receive(1, images=1)[0]
    box.finish(1)
    assert box.retention.step() == 1
    file = box.spool.open(box.spool.take_lane())
    file.write(memoryview(b"other bytes"))
    file.sync()
    new = NewInstance(replace(one, kvp=100.0), file.digest, file.size, box.association)
    assert box.committer.commit(file, new) == "conflict"
    box.spool.give_back(file.lane)
    box.spool.settle()
    assert [stored.digest for stored in box.ledger.instances(1)] == [file.digest]
    assert (box.studies(), box.ledger.removed_instances(1)) == ({"1.1": True}, 0)


def test_a_study_that_comes_again_while_it_goes_loses_nothing(box: Box) -> None:
    headers = box.receive(1, images=40)
    for _ in range(10):
        box.finish(1)
        begin = threading.Barrier(3)

        def again(part: list[Header], begin: threading.Barrier = begin) -> None:
            begin.wait()
            for one in part:
                box.store(one)

        senders = [threading.Thread(target=again, args=(headers[n::2],)) for n in range(2)]
        for sender in senders:
            sender.start()
        begin.wait()
        box.retention.step()
        for sender in senders:
            sender.join()
        box.studies()  # every row that says so has its file
        # An instance may have come before the study went: it was a duplicate then, and went with it.
        for one in headers:
            box.store(one)
        assert box.studies() == {"1.1": True}
        assert len(box.ledger.instances(1)) == 40
    assert event_counts(box.ledger)["retention.removed"] == 10


def test_an_instance_that_becomes_durable_between_the_mark_and_the_deletion_keeps_its_file(box: Box) -> None:
    headers = box.receive(1)
    box.finish(1)
    before_deletion: list[Callable[[], object]] = [lambda: box.store(headers[1])]

    @contextmanager
    def pause() -> Iterator[None]:
        # Whoever waits for the committer's turn goes first.
        before_deletion.pop()()
        with box.committer.paused():
            yield

    assert Retention(box.ledger, box.settings, pause, lambda: LOW).step() == 1
    assert box.studies() == {"1.1": True}
    assert [one.header for one in box.ledger.instances(1)] == [headers[1]]


def test_a_file_that_cannot_be_deleted_is_told_of_and_goes_at_the_next_start(
    box: Box, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    box.receive(1)
    box.finish(1)
    with monkeypatch.context() as patch:

        def refuse(path: Path, missing_ok: bool = False) -> None:
            raise OSError(errno.EIO, "Input/output error", str(path))

        patch.setattr(Path, "unlink", refuse)
        assert box.retention.step() == 1
    assert sum("Input/output error" in record.getMessage() for record in caplog.records) == 5
    box.ledger.close()
    box.open()
    assert (box.swept, box.retention.resume()) == (3, 2)
    assert box.studies() == {"1.1": False}


def ends_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End this process like kill -9, before the step of that number: a mark, a deletion, a sync."""
    left = steps

    def fuse(real: Callable[..., object]) -> Callable[..., object]:
        def fused(*args: object, **kwargs: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                os._exit(9)
            return real(*args, **kwargs)

        return fused

    monkeypatch.setattr(Ledger, "remove_study", fuse(Ledger.remove_study))
    monkeypatch.setattr(Ledger, "unnamed_digests", fuse(Ledger.unnamed_digests))
    monkeypatch.setattr(Path, "unlink", fuse(Path.unlink))
    monkeypatch.setattr(Path, "rmdir", fuse(Path.rmdir))
    monkeypatch.setattr(module, "sync_folder", fuse(module.sync_folder))


def in_a_process_that_ends(steps: int, action: Callable[[], object]) -> bool:
    """Run it in a fork that ends before that step; False if it came to its end sooner."""
    child = os.fork()
    if child == 0:
        try:
            ends_after(steps, pytest.MonkeyPatch())
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.slow
def test_wherever_the_process_ends_the_next_start_leaves_rows_and_files_that_agree(tmp_path: Path) -> None:
    box = Box(tmp_path)
    for study in (1, 2):
        box.receive(study, images=2)
        box.finish(study)
    box.receive(3, images=2)
    box.ledger.close()
    seen = set()
    for steps in range(100):
        # A fresh copy of the state each time, so that every step is the last one once.
        copy = tmp_path / f"copy{steps}"
        copy.mkdir()
        shutil.copy(tmp_path / "ledger.sqlite", copy)
        for name in ("spool", "findings"):
            shutil.copytree(tmp_path / name, copy / name)
        settings = made_settings(copy)

        def step(settings: Settings = settings) -> None:
            ledger = Ledger(settings.ledger_path)
            Retention(ledger, settings, nullcontext, lambda: LOW).step()

        ended = in_a_process_that_ends(steps, step)
        again = Box.__new__(Box)
        again.settings, again.room = settings, PLENTY
        again.open()
        again.retention.resume()
        after = again.studies()
        assert after["1.3"]
        assert after["1.1"] <= after["1.2"]  # the older one first
        seen.add(tuple(after.values()))
        again.ledger.close()
        if not ended:
            break
    else:
        pytest.fail("it never came to its end")
    assert seen == {(True, True, True), (False, True, True), (False, False, True)}
    assert steps > 20
