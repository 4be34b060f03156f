"""`scanside retry --since`: what a bad hour left behind is taken up again, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import pytest
from typer.testing import CliRunner

from appliance import retry_cli
from appliance.cli import app
from appliance.events import Event
from appliance.ledger.database import now
from appliance.ledger.records import Verdict
from appliance.ledger.standing import set_aside_since
from appliance.ledger.store import NewFinding, Notice
from appliance.ledger.views import study_report, troubles
from appliance.settings import Settings
from tests.appliance.intake.test_retention import Box

HL7 = {"kind": "hl7", "name": "er", "host": "127.0.0.1", "port": 2575}
PACS = {"kind": "dicom", "name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": 104}


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Box]:
    one = Box(tmp_path)
    reached = Settings(destination=[HL7, PACS]).destination  # type: ignore[list-item]
    settings = one.settings.model_copy(update={"destination": reached})
    monkeypatch.setattr(retry_cli, "read_settings", lambda: (settings, tmp_path))
    yield one
    one.ledger.close()


def analysed(box: Box, study: int) -> tuple[int, int]:
    """A study that is being analysed: its number and its analysis's."""
    box.receive(study)
    (arriving,) = box.ledger.arriving_studies()
    box.ledger.complete_study(arriving.id, arriving.last_instance_at, {"by": "test", "confidence": "high"})
    box.ledger.decide(arriving.id, "pkg", "1", admitted=True, reason="", admission=[], selection=[], inputs=[])
    row = box.ledger.take_analysis(["pkg"])
    assert row is not None
    return arriving.id, row["id"]


def waiting(box: Box, study: int, revision: int) -> None:
    """A study with an alert and a report that wait to be sent."""
    if revision == 1:
        _, analysis = analysed(box, study)
    else:
        box.ledger.decide(study, "pkg", "1", admitted=True, reason="", admission=[], selection=[], inputs=[])
        row = box.ledger.take_analysis(["pkg"])
        assert row is not None
        analysis = row["id"]
    verdict = Verdict(f"1.{study}", f"1.{study}.1", "pkg", "1", "n", True, 0.9, 0.5, {}, 0.0, (), (), (), ())
    findings = [
        NewFinding("alert.er", f"MSG{study}.{revision}", "alert.hl7", ("er",), 0),
        NewFinding("report", f"2.25.{study}.{revision}", "report.dcm", ("pacs",), 10),
    ]
    box.ledger.issue_verdict(analysis, revision, verdict, now(), findings, admission=[], late=False)


def delivered(box: Box, study: int, outcome: Literal["acknowledge", "reject", "give_up"]) -> None:
    """A study with an alert and a report, and what became of both."""
    waiting(box, study, 1)
    for destination in ("er", "pacs"):
        delivery = box.ledger.take_delivery(destination)
        assert delivery is not None
        box.ledger.settle_delivery(delivery, outcome)


def set_aside(box: Box, study: int) -> int:
    """A study whose analysis fails; its number in the ledger."""
    number, analysis = analysed(box, study)
    assert box.ledger.fail_analysis(analysis, "a bad release", 1, 0.0)
    return number


def ask(since: datetime, *options: str) -> str:
    done = CliRunner().invoke(app, ["retry", "--since", since.strftime("%Y-%m-%dT%H:%M:%S"), *options])
    assert done.exit_code == 0, done.output
    return done.output


def test_all_that_was_set_aside_or_is_dead_since_is_tried_again(box: Box) -> None:
    delivered(box, 1, "acknowledge")
    delivered(box, 2, "give_up")
    failed = set_aside(box, 3)
    hour = timedelta(hours=1)
    assert "nothing was set aside since" in ask(datetime.now(UTC) + hour)
    assert [len(found) for found in troubles(box.ledger).values()] == [2, 1]
    said = ask(datetime.now(UTC) - hour)
    assert f"study {failed} is analysed again" in said
    assert said.count("is pending again") == 2
    assert troubles(box.ledger) == {"deliveries": [], "analyses": []}
    assert box.ledger.take_delivery("er") is not None
    assert box.ledger.take_analysis(["pkg"]) is not None
    assert set_aside_since(box.ledger, datetime.now(UTC) - hour) == ([], [])


def test_what_a_release_decided_is_decided_again_when_it_is_left(box: Box) -> None:
    delivered(box, 1, "acknowledge")
    box.receive(2)
    (arriving,) = box.ledger.arriving_studies()
    box.ledger.complete_study(arriving.id, arriving.last_instance_at, {"by": "test", "confidence": "high"})
    box.ledger.decide(arriving.id, "pkg", "1", admitted=False, reason="no", admission=[], selection=[], inputs=[])
    failed = set_aside(box, 3)
    hour = timedelta(hours=1)
    assert "nothing was decided or set aside since" in ask(datetime.now(UTC) + hour, "--decided")
    assert box.ledger.undecided_studies({"pkg": "1"}) == []
    said = ask(datetime.now(UTC) - hour, "--decided")
    assert said.count("is decided again") == 2
    assert f"study {failed} is analysed again" in said
    undecided = box.ledger.undecided_studies({"pkg": "1"}, among=[1, arriving.id, failed])
    assert undecided == [(1, "pkg"), (arriving.id, "pkg")]
    assert "decided again" not in ask(datetime.now(UTC) - hour)


def decided(box: Box, name: Event, **detail: str) -> None:
    box.ledger.record_decision(name, "pkg", **({"version": "1", "digest": "d", "who": "Dr A"} | detail))


def test_what_the_board_withdrew_is_sent_once_it_lets_the_package_alert_again(box: Box) -> None:
    """As long as it is stopped, nothing is taken up, and nothing of what a newer revision answers for."""
    waiting(box, 1, 1)
    waiting(box, 2, 1)
    decided(box, Event.BOARD_SUSPENDED)
    hour = timedelta(hours=1)
    assert set_aside_since(box.ledger, datetime.now(UTC) - hour) == ([], []), "it is stopped"
    decided(box, Event.BOARD_APPROVED, mode="shadow")
    assert set_aside_since(box.ledger, datetime.now(UTC) - hour) == ([], []), "so it is in shadow"
    decided(box, Event.BOARD_APPROVED, mode="clinical")
    waiting(box, 1, 2)
    assert set_aside_since(box.ledger, datetime.now(UTC) + hour) == ([], [])
    assert ask(datetime.now(UTC) - hour).count("is pending again") == 2
    assert set_aside_since(box.ledger, datetime.now(UTC) - hour) == ([], [])
    for name in ("er", "pacs"):
        sent = []
        while (row := box.ledger.take_delivery(name)) is not None:
            sent.append((row["study_id"], row["revision"]))
            box.ledger.settle_delivery(row, "acknowledge")
        assert sorted(sent) == [(1, 2), (2, 1)]


def test_a_notice_of_a_refusal_that_was_overtaken_is_not_taken_up(box: Box) -> None:
    study, analysis = analysed(box, 1)
    nothing = Verdict(
        "1.1", "", "pkg", "1", "n", False, 0.0, 0.5, {}, 0.0, (), (), (), (), withdrawn="too few", mode="clinical"
    )
    refusal = Notice(nothing, now(), [NewFinding("refusal.er", "MSG1", "refusal.hl7", ("er",), 20)])
    box.ledger.withhold(analysis, "too few", [], refusal)
    box.ledger.decide(study, "pkg", "1", admitted=True, reason="", admission=[], selection=[], inputs=[])
    row = box.ledger.take_analysis(["pkg"])
    assert row is not None
    read = replace(nothing, withdrawn="")
    box.ledger.issue_verdict(analysis, 2, read, now(), [], admission=[], late=False)
    assert box.ledger.take_delivery("er") is None
    (delivery,) = study_report(box.ledger, study)["deliveries"]
    assert delivery["state"] == "withdrawn"
    assert set_aside_since(box.ledger, datetime.now(UTC) - timedelta(hours=1)) == ([], [])


def test_what_cannot_be_tried_again_is_said_and_keeps_nothing_else_from_it(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, config = retry_cli.read_settings()
    only = [one for one in settings.destination if one.name == "er"]
    monkeypatch.setattr(retry_cli, "read_settings", lambda: (settings.model_copy(update={"destination": only}), config))
    delivered(box, 1, "reject")
    failed = set_aside(box, 2)
    said = ask(datetime.now(UTC) - timedelta(hours=1))
    assert f"study {failed} is analysed again" in said
    assert said.count("is pending again") == 1
    assert "pacs is not configured" in said


@pytest.mark.parametrize(
    "options", [[], ["--study", "2", "--decided"], ["1", "--study", "2"], ["1", "--since", "2026-01-01T00:00:00"]]
)
def test_one_thing_is_named(box: Box, options: list[str]) -> None:
    assert CliRunner().invoke(app, ["retry", *options]).exit_code == 2
