"""The schema's way back: every revision, with what a ledger holds."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from typer.testing import CliRunner

from appliance import init
from appliance.cli import app
from appliance.ledger import database, migration
from appliance.ledger.database import LedgerError, now
from appliance.ledger.records import SlabResult, Verdict
from appliance.ledger.store import Ledger, NewFinding, NewInstance
from appliance.ledger.views import find_study, study_report, verify_events
from tests.builders import head_series

REVISIONS = migration.revisions()


def filled(path: Path) -> Ledger:
    """A ledger with a study that was alerted, one that is arriving, and a request for storage commitment."""
    ledger = Ledger(path)
    for prefix, released in (("1.2.3", True), ("1.2.4", False)):
        association = ledger.open_association("SCANNER", "SCANSIDE", "127.0.0.1")
        for one in head_series(3, study_instance_uid=prefix):
            digest = f"{prefix}-{one.sop_instance_uid}"
            assert ledger.record_instances([NewInstance(one, digest, 10, association)]) == ["stored"]
        if released:
            ledger.close_association(association, "released")
    study = find_study(ledger, "1.2.3")
    assert study is not None
    (row,) = [one for one in ledger.arriving_studies() if one.id == study]
    assert ledger.complete_study(study, row.last_instance_at, {"by": "test", "calling_ae": "SCANNER"})
    inputs = [["1.2.3.1.1", "1.2.3-1.2.3.1.1"]]
    ledger.decide(study, "pkg", "1", admitted=True, reason="", admission=[], selection=[], inputs=inputs)
    taken = ledger.take_analysis(["pkg"])
    assert taken is not None
    slab = SlabResult(0, 0.0, 5.0, "1.2.3.1.1", 0, {"any": 0.9}, (), 1.5)
    verdict = Verdict("1.2.3", "1.2.3.1", "pkg", "1", "notice", True, 0.9, 0.5, {"subdural": 0.8}, 1.5, (slab,), (0,),
                      ("raw",), ())  # fmt: skip
    findings = [
        NewFinding("report", "2.25.1", None, ("pacs",), 10),
        NewFinding("alert.er", "MSG1", "a.hl7", ("er",), 0),
    ]
    ledger.issue_verdict(taken["id"], 1, verdict, now(), findings, admission=[], late=False)
    return ledger


def contents(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Table → its rows."""
    with closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {
            name: [dict(row) for row in connection.execute(f"SELECT * FROM {name} ORDER BY 1")]
            for name in names
            if name != "alembic_version"
        }


def shape(path: Path) -> dict[str, Any]:
    """Columns of each table, and each index, as SQLite itself tells them."""
    with closing(sqlite3.connect(path)) as connection:
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        columns = {one: sorted(row[1:4] for row in connection.execute(f"PRAGMA table_info({one})")) for one in tables}
        indexes = sorted(
            row[0]
            for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL")
        )
        return {"columns": columns, "indexes": indexes}


def made_then(path: Path, revision: str) -> None:
    """An empty ledger of the scanside that had that schema."""
    config = Config()
    config.set_main_option("script_location", str(Path(database.__file__).parent / "migrations"))
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        connection.commit()
    engine.dispose()


@pytest.mark.slow
@pytest.mark.parametrize("revision", REVISIONS)
def test_every_revision_can_be_gone_back_to_with_all_that_it_can_hold(tmp_path: Path, revision: str) -> None:
    path = tmp_path / "ledger.sqlite"
    filled(path).close()
    before = contents(path)
    assert migration.downgrade(path, revision) == migration.head()
    assert migration.revision(path) == revision
    made_then(tmp_path / "then.sqlite", revision)
    assert shape(path) == shape(tmp_path / "then.sqlite")
    for table, rows in contents(path).items():
        wanted = [{key: value for key, value in row.items() if key in rows[0]} for row in before[table]] if rows else []
        if table == "instance":  # a header states what its time knew
            for row in (*rows, *wanted):
                row["header"] = json.loads(row["header"])["sop_instance_uid"]
        assert rows == wanted, table
        assert bool(rows) == bool(before[table]), table
    ledger = Ledger(path)  # and forward again, by itself
    assert verify_events(ledger) is None
    study = find_study(ledger, "1.2.3")
    assert study is not None
    assert [one["object"] for one in study_report(ledger, study)["findings"]] == ["report", "alert.er"]
    ledger.close()
    assert migration.revision(path) == migration.head()


def test_what_came_after_the_update_is_still_there_after_the_way_back(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = filled(path)
    association = ledger.open_association("SCANNER", "SCANSIDE", "127.0.0.1")
    late = head_series(1, study_instance_uid="1.2.5")[0]
    assert ledger.record_instances([NewInstance(late, "late", 10, association)]) == ["stored"]
    ledger.close()
    migration.downgrade(path, REVISIONS[0])
    ledger = Ledger(path)
    assert "late" in ledger.digests()  # so that the start of intake keeps its file
    assert find_study(ledger, "1.2.5") is not None


def test_there_and_back_again_changes_nothing_more(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    assert migration.revision(path) == ""
    assert migration.downgrade(path, "0001") == ""
    assert not path.exists()
    filled(path).close()
    migration.downgrade(path, "0003")
    before = contents(path)
    assert migration.downgrade(path, "0003") == "0003"
    assert contents(path) == before


def test_a_schema_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    filled(path).close()
    with pytest.raises(LedgerError, match="there is no schema 0000"):
        migration.downgrade(path, "0000")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()
    before = contents(path)
    with pytest.raises(LedgerError, match="schema 9999 is not newer"):
        migration.downgrade(path, "0001")
    assert contents(path) == before
    (tmp_path / "no.sqlite").write_bytes(b"this is no database at all, but long enough to be looked at" * 100)
    with pytest.raises(LedgerError):
        migration.revision(tmp_path / "no.sqlite")


def test_the_commands(tmp_path: Path) -> None:
    config = init.write(tmp_path / "box", {}, [])
    run = CliRunner()

    def ask(*words: str) -> dict[str, Any]:
        done = run.invoke(app, ["--config", str(config), "ledger", *words, "--json"])
        assert done.exit_code == 0, done.output
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    assert ask("schema") == {"revision": "", "head": migration.head()}
    assert ask("upgrade") == {"before": "", "revision": migration.head()}
    filled(next((tmp_path / "box").rglob("ledger.sqlite"))).close()
    assert ask("downgrade", "0002") == {"before": migration.head(), "revision": "0002"}
    assert ask("schema") == {"revision": "0002", "head": migration.head()}
    wrong = run.invoke(app, ["--config", str(config), "ledger", "downgrade", "x"])
    assert wrong.exit_code == 1
