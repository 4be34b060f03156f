"""The outbox delivers each row until it is acknowledged, rejected or dead; a dead destination delays nobody else."""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from sqlalchemy.exc import OperationalError

from appliance.delivery.outbox import Result, Said, Worker
from appliance.ledger.database import Row, now
from appliance.ledger.records import Verdict
from appliance.ledger.store import Ledger, NewFinding, NewInstance
from appliance.ledger.views import study_report
from appliance.show import study_view
from dicom_io.errors import PeerError
from tests.builders import header


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """A ledger with one positive verdict: an alert to "er" and a report to "pacs", both ready."""
    one = Ledger(tmp_path / "ledger.sqlite")
    one.record_instances([NewInstance(header(), "d", 1, one.open_association("S", "B", "127.0.0.1"))])[0]
    (arriving,) = one.arriving_studies()
    one.complete_study(1, arriving.last_instance_at, {"by": "test", "confidence": "high"})
    one.decide(1, "pkg", "1", admitted=True, reason="", admission=[], selection=[], inputs=[])
    row = one.take_analysis(["pkg"])
    assert row is not None
    verdict = Verdict("1.2.3", "1.2.3.1", "pkg", "1", "n", True, 0.9, 0.5, {}, 1.0, (), (), (), ())
    findings = [
        NewFinding("alert.er", "MSG", "a.hl7", ("er",), 0),
        NewFinding("report", "2.25.1", "r.dcm", ("pacs",), 10),
    ]
    one.issue_verdict(row["id"], 1, verdict, now(), findings, admission=[], late=False)
    return one


def worker(
    ledger: Ledger,
    destination: str,
    deliver: Callable[[Row], Result],
    *,
    attempts: int = 5,
    turn: Callable[[], None] = lambda: None,
) -> Worker:
    return Worker(
        ledger,
        destination,
        deliver,
        attempts=attempts,
        first_retry_seconds=0.01,
        longest_retry_seconds=0.02,
        budget_seconds=60.0,
        turn=turn,
    )


def run_until(ledger: Ledger, one: Worker, delivery: str, state: str) -> dict[str, object]:
    one.start()
    deadline = time.monotonic() + 20.0
    try:
        while time.monotonic() < deadline:
            one.wake()
            row = next(r for r in study_report(ledger, 1)["deliveries"] if r["object"] == delivery)
            if row["state"] == state:
                return dict(row)
            time.sleep(0.01)
        pytest.fail(f"{delivery} is {row['state']}, not {state}")
    finally:
        one.stop()
        one.join(5.0)
        assert not one.is_alive()


def test_an_answer_ends_it(ledger: Ledger) -> None:
    row = run_until(ledger, worker(ledger, "er", lambda _: ("acknowledge", "AA")), "alert.er", "acknowledged")
    assert (row["attempts"], row["reason"]) == (1, "AA")
    assert row["acknowledged_at"] is not None


def test_it_tries_again_until_the_peer_is_there(ledger: Ledger) -> None:
    tries: list[str] = []

    def deliver(row: Row) -> Result:
        tries.append(row["uid"])
        if len(tries) < 4:
            raise PeerError("connection refused", "127.0.0.1:1", "start it")
        return "acknowledge", "AA"

    row = run_until(ledger, worker(ledger, "er", deliver), "alert.er", "acknowledged")
    assert row["attempts"] == 4
    assert set(tries) == {"MSG"}


def test_after_so_many_tries_it_is_a_dead_letter_with_its_reason(ledger: Ledger) -> None:
    row = run_until(ledger, worker(ledger, "er", lambda _: ("retry", "AE busy"), attempts=3), "alert.er", "dead")
    assert (row["attempts"], row["reason"]) == (3, "AE busy")


def test_a_refusal_is_not_repeated(ledger: Ledger) -> None:
    row = run_until(ledger, worker(ledger, "er", lambda _: ("reject", "AR no")), "alert.er", "rejected")
    assert (row["attempts"], row["reason"]) == (1, "AR no")


@pytest.mark.parametrize(
    ("outcome", "attempts", "state"),
    [("retry", 2, "dead"), ("reject", 5, "rejected"), ("acknowledge", 5, "acknowledged")],
)
def test_what_a_peer_says_in_its_own_words_stays_with_the_delivery(
    ledger: Ledger, caplog: pytest.LogCaptureFixture, outcome: Any, attempts: int, state: str
) -> None:
    caplog.set_level(logging.INFO)
    said = Said("AE Patient 4711 DOE^JANE is not known", "AE")
    row = run_until(ledger, worker(ledger, "er", lambda _: (outcome, said), attempts=attempts), "alert.er", state)
    assert row["reason"] == "AE Patient 4711 DOE^JANE is not known"
    report = study_report(ledger, 1)
    shown = Console(width=200, record=True, file=io.StringIO())
    shown.print(study_view(report))
    assert "AE Patient 4711 DOE^JANE" in shown.export_text(), "`scanside study` has it"
    told = [one["detail"] for one in report["events"] if one["name"].startswith("delivery.")]
    reasons = [one["reason"] for one in told if one.get("reason")]
    assert set(reasons) == {"AE"}
    assert "DOE" not in str(report["events"]) and "DOE" not in caplog.text and "AE" in caplog.text


def test_a_surprise_does_not_end_the_worker(ledger: Ledger) -> None:
    surprises = iter([ZeroDivisionError("surprise")])

    def deliver(_: Row) -> Result:
        for error in surprises:
            raise error
        return "acknowledge", "AA"

    assert run_until(ledger, worker(ledger, "er", deliver), "alert.er", "acknowledged")["attempts"] == 2


def test_a_ledger_that_stumbles_does_not_end_the_worker(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    real, stumbles = ledger.take_delivery, iter([OSError("disk")])

    def take(*arguments: Any) -> Row | None:
        for error in stumbles:
            raise error
        return real(*arguments)

    monkeypatch.setattr(ledger, "take_delivery", take)
    row = run_until(ledger, worker(ledger, "er", lambda _: ("acknowledge", "AA")), "alert.er", "acknowledged")
    assert row["attempts"] == 1
    assert next(stumbles, None) is None


def test_a_worker_that_only_stumbles_gives_no_sign_of_life(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    turns, tries = 0, threading.Event()

    def sign() -> None:
        nonlocal turns
        turns += 1

    def broken(*_: object) -> None:
        tries.set()
        raise OperationalError("BEGIN IMMEDIATE", {}, Exception("disk I/O error"))

    one = worker(ledger, "er", lambda _: ("acknowledge", ""), turn=sign)
    take = ledger.take_delivery
    monkeypatch.setattr(ledger, "take_delivery", broken)
    one.start()
    try:
        for _ in range(3):
            tries.clear()
            one.wake()
            assert tries.wait(10)
        assert turns == 1, "as it began"
        monkeypatch.setattr(ledger, "take_delivery", take)
        deadline = time.monotonic() + 10
        while turns == 1 and time.monotonic() < deadline:
            one.wake()
            time.sleep(0.01)
        assert turns > 1
    finally:
        one.stop()
        one.join()


@pytest.mark.slow
def test_a_hanging_destination_delays_nobody_else(ledger: Ledger) -> None:
    hanging = worker(ledger, "pacs", lambda _: (time.sleep(3.0), ("retry", "slow"))[1])
    hanging.start()
    run_until(ledger, worker(ledger, "er", lambda _: ("acknowledge", "AA")), "alert.er", "acknowledged")
    states = {row["object"]: row["state"] for row in study_report(ledger, 1)["deliveries"]}
    assert states["report"] == "sending"
    hanging.stop()
    hanging.join(10.0)


def test_an_answer_that_cannot_be_written_at_once_is_written_later_and_not_asked_for_again(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, stumbles, sent = ledger.settle_delivery, iter([OperationalError("", {}, Exception("disk full"))]), []

    def settle(*arguments: Any, **options: Any) -> None:
        for error in stumbles:
            raise error
        real(*arguments, **options)

    def deliver(row: Row) -> Result:
        sent.append(row["uid"])
        return "acknowledge", "AA"

    monkeypatch.setattr(ledger, "settle_delivery", settle)
    run_until(ledger, worker(ledger, "er", deliver), "alert.er", "acknowledged")
    assert sent == ["MSG"]
