"""The account of a day balances, and says what is missing when it does not."""

from __future__ import annotations

import os
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from appliance.accounting import account
from appliance.intake.spool import Spool, path_of
from appliance.ledger.database import now
from appliance.ledger.records import Verdict
from appliance.ledger.store import Ledger, NewInstance
from tests.builders import header, spooled

TODAY = datetime.now(UTC).date()


class Day:
    """A ledger and a spool into which instances come."""

    def __init__(self, folder: Path) -> None:
        self.ledger = Ledger(folder / "ledger.sqlite")
        self.directory = folder / "spool"
        self.spool = Spool(self.directory)
        self.association = self.ledger.open_association("S", "B", "127.0.0.1")

    def store(self, number: int, *, series: str = "1.2.3.1", content: str = "") -> str:
        one = header(number, series=series)
        digest = spooled(self.spool, (content or one.sop_instance_uid).encode())
        self.ledger.record_instances([NewInstance(one, digest, 1, self.association)])[0]
        return digest

    def decide(self, inputs: list[list[str]], *, admitted: bool = True, reason: str = "") -> None:
        (arriving,) = self.ledger.arriving_studies()
        self.ledger.complete_study(1, arriving.last_instance_at, {"by": "test", "confidence": "high"})
        selection = [
            {"series_instance_uid": "1.2.3.1", "chosen": True, "reason": "axial"},
            {"series_instance_uid": "1.2.3.9", "chosen": False, "reason": "a localizer"},
        ]
        self.ledger.decide(
            1, "pkg", "1", admitted=admitted, reason=reason, admission=[], selection=selection, inputs=inputs
        )

    def analyse(self) -> None:
        row = self.ledger.take_analysis(["pkg"])
        assert row is not None
        verdict = Verdict("1.2.3", "1.2.3.1", "pkg", "1", "n", False, 0.1, 0.5, {}, 0.0, (), (), (), ())
        self.ledger.issue_verdict(row["id"], 1, verdict, now(), [], admission=[], late=False)


@pytest.fixture
def day(tmp_path: Path) -> Day:
    return Day(tmp_path)


def test_every_instance_has_one_outcome(day: Day) -> None:
    inputs = [[f"1.2.3.1.{n}", day.store(n)] for n in range(1, 4)]
    day.store(1, series="1.2.3.9")
    day.store(1)  # the same bytes again
    day.ledger.record_refusal(day.association, 0xC000, "not DICOM", 10)
    day.decide(inputs)
    day.analyse()
    told = account(day.ledger, day.directory, TODAY, verify=True)
    assert told.balanced
    assert (told.received, told.kept, told.duplicates) == (6, 4, 1)
    assert told.refused == {"not DICOM": 1}
    assert told.outcomes == {"analysed": 3, "set aside: a localizer": 1}
    assert told.received == told.kept + told.duplicates + sum(told.refused.values())


def test_what_is_not_done_yet_waits_and_what_was_refused_says_why(day: Day) -> None:
    first = day.store(1)
    assert account(day.ledger, day.directory, TODAY).outcomes == {"waiting: its study is not complete": 1}
    day.decide([["1.2.3.1.1", first]], admitted=False, reason="age: 9 years")
    assert account(day.ledger, day.directory, TODAY).outcomes == {"refused: age: 9 years": 1}


def test_superseded_bytes_are_accounted_for(day: Day) -> None:
    day.store(1)
    day.store(1, content="other bytes")
    told = account(day.ledger, day.directory, TODAY)
    assert told.kept == 2
    assert told.outcomes["superseded by other bytes under the same UID"] == 1
    assert told.balanced


def test_a_lost_or_changed_file_is_found(day: Day) -> None:
    lost, changed = day.store(1), day.store(2)
    path_of(day.directory, lost).unlink()
    path_of(day.directory, changed).write_bytes(b"rotten")
    quick = account(day.ledger, day.directory, TODAY)
    assert (quick.missing_files, quick.balanced) == ((lost,), False)
    assert set(account(day.ledger, day.directory, TODAY, verify=True).missing_files) == {lost, changed}


def test_a_lost_row_is_found(day: Day, tmp_path: Path) -> None:
    day.store(1)
    lost = day.store(2)
    with sqlite3.connect(tmp_path / "ledger.sqlite") as raw:
        raw.execute("delete from instance where digest = ?", (lost,))
    told = account(day.ledger, day.directory, TODAY)
    assert (told.missing_rows, told.balanced) == ((lost,), False)
    assert sum(told.outcomes.values()) == told.kept - 1


def test_what_came_and_is_not_in_the_ledger_is_found(day: Day) -> None:
    """The count of the network is not the ledger's own."""
    day.store(1)
    day.store(1)
    day.ledger.record_refusal(day.association, 0xC000, "not DICOM", 10)
    day.ledger.close_association(day.association, "released", 3)
    told = account(day.ledger, day.directory, TODAY)
    assert (told.counted, told.uncounted, told.differences, told.balanced) == (3, 0, (), True)
    day.association = day.ledger.open_association("S", "B", "127.0.0.1")
    day.store(2)
    day.ledger.close_association(day.association, "broken", 2)
    told = account(day.ledger, day.directory, TODAY)
    assert (told.counted, told.differences, told.balanced) == (5, ((day.association, 2, 1),), False)


def test_an_association_that_nobody_counted_is_told(day: Day) -> None:
    day.store(1)
    day.ledger.abandon_associations()  # as the start of intake does after a kill
    told = account(day.ledger, day.directory, TODAY)
    assert (told.uncounted, told.counted, told.balanced) == (1, 0, True)


def test_a_file_without_a_row_is_found(day: Day) -> None:
    day.store(1)
    stray = spooled(day.spool, b"of nobody")
    path = path_of(day.directory, stray)
    assert account(day.ledger, day.directory, TODAY).balanced  # its row may come in a moment
    yesterday = datetime.now(UTC) - timedelta(days=1)
    os.utime(path, (yesterday.timestamp(), yesterday.timestamp()))
    told = account(day.ledger, day.directory, yesterday.date())
    assert (told.stray_files, told.balanced) == ((stray,), False)
    assert account(day.ledger, day.directory, TODAY).balanced


def test_another_day_is_another_account(day: Day) -> None:
    day.store(1)
    assert account(day.ledger, day.directory, TODAY - timedelta(days=1)).received == 0
