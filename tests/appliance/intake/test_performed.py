"""A performed step is durable before Success, rings the engine, and is refused with the status of the standard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from appliance.intake.performed import PerformedProvider
from appliance.ledger import performed, schema
from appliance.ledger.store import Ledger
from appliance.ledger.views import event_counts
from dicom_io.handlers import Answer, Session
from dicom_io.performed import Availability, NewStep, Request, StepChange

SESSION = Session(1, "SCANNER", "SCANSIDE", "127.0.0.1")
BEGUN = NewStep("1.7", "1.2.3", {})
ENDED = StepChange("1.7", "COMPLETED", {"1.2.3.1": ("1.2.3.1.1",)})
ANNOUNCED = Availability("1.9", "1.2.3", {"1.2.3.1": ("1.2.3.1.1",)}, 0)


class Bench:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "ledger.sqlite"
        self.ledger = Ledger(self.path)
        self.shortage = ""
        self.rung_at: list[dict[str, int]] = []
        self.provider = PerformedProvider(self.ledger, self._ring, lambda: self.shortage)

    def _ring(self) -> None:
        # By another connection: what is seen here is committed.
        other = Ledger(self.path)
        with other.read() as connection:
            self.rung_at.append(
                {row.sop_instance_uid: row.state for row in connection.execute(sa.select(schema.performed))}
            )
        other.close()

    def ask(self, *requests: Request) -> list[int]:
        return [self.provider.performed(SESSION, request).status for request in requests]

    def refusals(self) -> list[dict[str, Any]]:
        query = sa.select(schema.event.c.detail).where(schema.event.c.name == "performed.refused")
        with self.ledger.read() as connection:
            return [dict(one) for one in connection.scalars(query)]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    one = Bench(tmp_path)
    yield one
    one.ledger.close()


def test_it_is_written_down_before_the_engine_hears_of_it(bench: Bench) -> None:
    assert bench.ask(BEGUN, ENDED, ANNOUNCED) == [0, 0, 0]
    assert bench.rung_at == [
        {"1.7": "in_progress"},
        {"1.7": "completed"},
        {"1.7": "completed", "1.9": "announced"},
    ]
    assert bench.refusals() == []


def test_what_comes_twice_changes_nothing(bench: Bench) -> None:
    assert bench.ask(BEGUN, BEGUN, ENDED, ENDED, BEGUN, ANNOUNCED, ANNOUNCED) == [0, 0x111, 0, 0x110, 0x111, 0, 0x111]
    assert len(bench.rung_at) == 3
    assert event_counts(bench.ledger)["step.completed"] == 1
    assert [one["status"] for one in bench.refusals()] == ["0x0111", "0x0110", "0x0111", "0x0111"]


def test_a_step_that_has_ended_says_so_in_the_words_of_the_standard(bench: Bench) -> None:
    bench.ask(BEGUN, ENDED)
    answer = bench.provider.performed(SESSION, StepChange("1.7", "IN PROGRESS", None))
    assert (answer.status, answer.error_id) == (0x0110, 0xA710)
    assert answer.comment == "Performed Procedure Step Object may no longer be updated"  # PS3.4 table F.7.2-2
    assert len(answer.comment) <= 64


@pytest.mark.parametrize(
    ("requests", "status", "reason"),
    [
        ([ENDED], 0x0112, "no performed procedure step"),
        ([ANNOUNCED, StepChange("1.9", "COMPLETED", {})], 0x0112, "no performed procedure step"),
        ([BEGUN, StepChange("1.7", "COMPLETED", None)], 0x0121, "PerformedSeriesSequence"),
        ([BEGUN, BEGUN], 0x0111, "is there already"),
    ],
)
def test_a_refusal_is_written_down_with_its_reason(
    bench: Bench, requests: list[Request], status: int, reason: str
) -> None:
    assert bench.ask(*requests)[-1] == status
    (refusal,) = bench.refusals()
    assert (refusal["status"], refusal["calling_ae"]) == (f"0x{status:04X}", "SCANNER")
    assert reason in refusal["reason"]


def test_too_much_of_one_study(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(performed, "MAXIMUM_NAMED", 0)
    assert bench.ask(BEGUN, ENDED, ANNOUNCED) == [0, 0x0213, 0x0213]


def test_nothing_is_taken_while_the_disk_is_short(bench: Bench) -> None:
    bench.ask(BEGUN)
    bench.shortage = "the disk is nearly full"
    assert bench.ask(ENDED, ANNOUNCED) == [0x0213, 0x0213]
    assert bench.refusals()[0]["reason"] == "the disk is nearly full"
    bench.shortage = ""
    assert bench.ask(ENDED, ANNOUNCED) == [0, 0]


def test_a_ledger_that_cannot_be_written_is_no_success(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OperationalError("", None, Exception("disk I/O error"))

    bench.ask(BEGUN)
    monkeypatch.setattr(bench.ledger, "change_performed", fail)
    assert bench.ask(ENDED) == [0x0110]
    assert len(bench.rung_at) == 1


def test_what_the_server_refuses_is_written_down_too(bench: Bench) -> None:
    bench.provider.refused(SESSION, Answer(0x0120, "StudyInstanceUID is missing"))
    assert bench.refusals() == [{"calling_ae": "SCANNER", "status": "0x0120", "reason": "StudyInstanceUID is missing"}]
