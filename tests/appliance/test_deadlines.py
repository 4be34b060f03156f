"""A stage that takes longer than it may is reported while it does, once."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from appliance.ledger.store import Ledger
from appliance.ledger.views import event_counts, is_late, study_report
from appliance.settings import Settings
from appliance.show import study_view
from tests.appliance.ledger.test_store import admit, arrive, complete, issue

AGES: dict[str, Any] = {"completion": 3600.0, "analysis": 3600.0, "alert": 3600.0}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


def overdue(ledger: Ledger, *destinations: str, **limits: float) -> list[tuple[str, str]]:
    return [(one.stage, one.subject) for one in ledger.mark_overdue(["pkg"], destinations, **(AGES | limits))]


def test_each_stage_has_its_own_deadline_and_is_reported_once(ledger: Ledger) -> None:
    study = arrive(ledger)
    assert overdue(ledger) == []
    assert overdue(ledger, analysis=0, alert=0) == []
    assert overdue(ledger, completion=0) == [("completion", "")]
    assert overdue(ledger, completion=0) == []
    complete(ledger, study)
    assert overdue(ledger, "er", completion=0, alert=0) == []
    admit(ledger, study)
    assert overdue(ledger, "er", completion=0, alert=0) == []
    assert overdue(ledger, "er", analysis=0) == [("analysis", "pkg")]
    issue(ledger, study)
    assert overdue(ledger, "er", "pacs", completion=0, analysis=0) == []
    assert overdue(ledger, "pacs", alert=0) == []
    assert overdue(ledger, "er", "pacs", alert=0) == [("alert", "er")]
    row = ledger.take_delivery("er")
    assert row is not None
    assert overdue(ledger, "er", alert=0) == []
    ledger.settle_delivery(row, "acknowledge")
    assert event_counts(ledger)["stage.overdue"] == 3
    console = Console(width=200, record=True)
    console.print(study_view(study_report(ledger, study)))
    shown = console.export_text()
    assert shown.count("deadline missed") == 3
    assert "analysis (pkg), begun at" in shown


def test_a_study_on_which_nobody_decides_is_overdue_and_late(ledger: Ledger) -> None:
    study = arrive(ledger)
    complete(ledger, study)
    assert overdue(ledger, analysis=0) == [("analysis", "pkg")]
    assert overdue(ledger, analysis=0) == []
    report = study_report(ledger, study)
    assert is_late(report, -1.0) and not is_late(report, 3600.0)
    admit(ledger, study)
    issue(ledger, study)
    assert overdue(ledger, analysis=0) == []
    arrive(ledger, series="1.2.3.9")
    complete(ledger, study)  # what was decided was on less
    assert overdue(ledger, analysis=0) == [("analysis", "pkg")]
    assert is_late(study_report(ledger, study), -1.0)


def test_a_stage_that_begins_anew_may_be_overdue_again(ledger: Ledger) -> None:
    study = arrive(ledger)
    assert overdue(ledger, completion=0) == [("completion", "")]
    complete(ledger, study)
    arrive(ledger, series="1.2.3.9")
    assert overdue(ledger, completion=0) == [("completion", "")]


def test_what_was_refused_or_acknowledged_is_not_overdue(ledger: Ledger) -> None:
    study = arrive(ledger)
    complete(ledger, study)
    admit(ledger, study, admitted=False)
    assert overdue(ledger, "er", completion=0, analysis=0, alert=0) == []


def set_back(ledger: Ledger, seconds: float) -> None:
    """As if the clock had been set back by so much."""
    with ledger._write() as connection:  # the clock itself cannot be moved
        for place in ("study.last_instance_at", "study.completed_at", "verdict.issued_at"):
            table, column = place.split(".")
            connection.exec_driver_sql(
                f"UPDATE {table} SET {column} = strftime('%Y-%m-%dT%H:%M:%f000+00:00', {column}, ?)",
                (f"{seconds:+} seconds",),
            )


def test_a_clock_that_was_set_back_moves_no_deadline(ledger: Ledger) -> None:
    study = arrive(ledger)
    set_back(ledger, 5)
    assert overdue(ledger) == [] and ledger.late_studies(["pkg"], 3600.0) == {}, "it was only adjusted"
    set_back(ledger, 7200)
    assert overdue(ledger) == [("completion", "")] and list(ledger.late_studies(["pkg"], 3600.0)) == ["1.2.3"]
    complete(ledger, study)
    admit(ledger, study)
    assert overdue(ledger) == [] and ledger.mark_degraded(3600.0, "less") == ([], [])
    set_back(ledger, 7200)
    assert overdue(ledger) == [("analysis", "pkg")]
    assert is_late(study_report(ledger, study), 3600.0)
    found, new = ledger.mark_degraded(3600.0, "less")
    assert len(found) == len(new) == 1
    issue(ledger, study)
    assert overdue(ledger, "er") == []
    set_back(ledger, 7200)
    assert overdue(ledger, "er") == [("alert", "er")] and overdue(ledger, "er") == []


def test_the_budget_is_the_sum_of_its_deadlines() -> None:
    assert Settings().budget.seconds == 60.0
    settings = Settings.model_validate({"budget": {"completion_seconds": 5, "analysis_seconds": 3, "alert_seconds": 2}})
    assert settings.budget.seconds == 10.0


@pytest.mark.slow
def test_delivery_holds_the_other_stages_against_their_deadlines(tmp_path: Path) -> None:
    """No engine runs here that could do it."""
    config = tmp_path / "scanside.toml"
    config.write_text('[box]\nstate_directory = "."\n[budget]\ncompletion_seconds = 0.001\n')
    ledger = Ledger(tmp_path / "ledger.sqlite")
    study = arrive(ledger)
    command = [sys.executable, "-m", "appliance.cli", "--config", str(config), "deliver"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as delivery:
        for _ in range(600):
            if event_counts(ledger).get("stage.overdue"):
                break
            time.sleep(0.1)
        delivery.send_signal(signal.SIGTERM)
        _, said = delivery.communicate(timeout=60)
    (one,) = [one for one in study_report(ledger, study)["events"] if one["name"] == "stage.overdue"]
    assert one["detail"]["stage"] == "completion"
    assert f"study {study}: completion is past its deadline" in said
