"""`scanside retention`: what would go, what holds the rest, and a round by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner, Result

from appliance import init
from appliance.cli import app
from appliance.intake.spool import Spool, path_of
from appliance.ledger import schema as t
from appliance.ledger.database import later
from appliance.ledger.store import Ledger, NewInstance
from appliance.services.process import only_one
from appliance.settings import Settings, load_settings
from tests.builders import header, spooled

# A disk of a test is low at any time, or age decides; both lead to the same.
LOW = {"retention": {"start_percent": 90, "stop_percent": 95}, "models": {"packages": ["pkg"]}}


def run(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["--config", str(config), "retention", *arguments], env={"COLUMNS": "200"})


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A box with study 1, refused long ago, and study 2, whose analysis failed long ago."""
    path = init.write(tmp_path / "box", LOW)
    settings = load_settings(path)
    ledger, spool = Ledger(settings.ledger_path), Spool(settings.spool_directory)
    association = ledger.open_association("S", "B", "127.0.0.1")
    for study in (1, 2):
        one = header(study=f"1.{study}", series=f"1.{study}.1")
        ledger.record_instances([NewInstance(one, spooled(spool, one.sop_instance_uid.encode()), 9, association)])
        (arriving,) = ledger.arriving_studies()
        ledger.complete_study(study, arriving.last_instance_at, {"by": "test", "confidence": "high"})
        ledger.decide(study, "pkg", "1", admitted=study == 2, reason="", admission=[], selection=[], inputs=[])
    row = ledger.take_analysis(["pkg"])
    assert row is not None
    assert ledger.fail_analysis(row["id"], "broken", 1, 0.0)
    with ledger._write() as connection:
        connection.execute(t.study.update().values(completed_at=later(-100 * 3600)))
    ledger.close()
    return path


def files(settings: Settings) -> int:
    return len(list(settings.spool_directory.glob("??/*.dcm")))


def test_a_dry_run_shows_what_goes_and_what_holds_the_rest(config: Path) -> None:
    told = json.loads(run(config, "--dry-run", "--json").stdout)
    assert [one["study_id"] for one in told["goes"] + told["may_go"]] == [1]
    assert [(one["study_id"], one["holds"]) for one in told["held"]] == [(2, ["its analysis by pkg failed"])]
    assert (told["dry_run"], told["removed"]) == (True, 0)
    table = run(config, "--dry-run").stdout
    assert "its analysis by pkg failed" in table
    assert files(load_settings(config)) == 2


def test_a_round_by_hand_and_a_release(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(config)
    monkeypatch.setenv("SCANSIDE_RETENTION__KEEP_DAYS", "3.5")
    first = run(config)
    assert (first.exit_code, "1 studies removed" in first.stdout) == (0, True)
    assert files(settings) == 1
    assert run(config, "--release", "9").exit_code == 1
    assert "held by its failures no longer" in run(config, "--release", "1.2").stdout
    assert files(settings) == 1
    assert json.loads(run(config, "--json").stdout)["removed"] == 1
    assert files(settings) == 0
    assert "no study has files" in run(config, "--dry-run").stdout
    ledger = Ledger(settings.ledger_path)
    with ledger.read() as connection:
        digests = connection.scalars(sa.select(t.instance.c.digest)).all()
    ledger.close()
    assert len(digests) == 2
    assert not any(path_of(settings.spool_directory, one).exists() for one in digests)


def test_beside_a_running_intake_it_only_shows(config: Path) -> None:
    settings = load_settings(config)
    with only_one(settings, "intake"):
        refused = run(config)
        assert (refused.exit_code, "intake runs already" in refused.stderr) == (1, True)
        assert run(config, "--dry-run").exit_code == 0
    assert files(settings) == 2
