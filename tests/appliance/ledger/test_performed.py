"""What is said of a study is written down once, survives, and is found by the study's UID."""

from __future__ import annotations

import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from appliance.ledger import database, performed, schema
from appliance.ledger.performed import NOTHING_SAID, Said
from appliance.ledger.store import Ledger, NewInstance
from appliance.ledger.views import event_counts, find_study, state_counts, study_report, verify_events
from dicom_io.performed import Availability, Named, NewStep, StepChange
from tests.builders import header

HEAD: Named = {"1.2.3.1": ("1.2.3.1.1", "1.2.3.1.2")}
SCOUT: Named = {"1.2.3.2": ("1.2.3.2.1",)}


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    one = Ledger(tmp_path / "ledger.sqlite")
    yield one
    one.close()


def study(ledger: Ledger, uid: str = "1.2.3") -> int:
    """The number of a study of one image."""
    association = ledger.open_association("SCANNER", "SCANSIDE", "127.0.0.1")
    one = header(study=uid, series=f"{uid}.1")
    ledger.record_instances([NewInstance(one, f"digest-{one.sop_instance_uid}", 10, association)])
    key = find_study(ledger, uid)
    assert key is not None
    return key


def begin(ledger: Ledger, uid: str = "1.7", series: Named | None = None, of: str = "1.2.3") -> str:
    return ledger.create_performed(NewStep(uid, of, series or {}), "SCANNER")


def end(ledger: Ledger, uid: str = "1.7", series: Named | None = HEAD, status: str = "COMPLETED") -> str:
    return ledger.change_performed(StepChange(uid, status, series), "SCANNER")


def test_a_completed_step_names_what_is_expected(ledger: Ledger) -> None:
    key = study(ledger)
    assert ledger.said_of(key) == NOTHING_SAID
    assert begin(ledger, series=SCOUT) == ""
    assert ledger.said_of(key) == Said({"in_progress": 1}, {})
    assert end(ledger) == ""
    assert ledger.said_of(key) == Said({"completed": 1}, {"1.2.3.1": frozenset(HEAD["1.2.3.1"])})


def test_it_may_be_said_before_the_first_instance(ledger: Ledger) -> None:
    assert (begin(ledger), end(ledger)) == ("", "")
    assert ledger.said_of(study(ledger)).expected == {"1.2.3.1": frozenset(HEAD["1.2.3.1"])}
    assert ledger.said_of(study(ledger, "1.2.4")) == NOTHING_SAID


def test_what_an_end_does_not_name_anew_stays(ledger: Ledger) -> None:
    begin(ledger)
    assert ledger.change_performed(StepChange("1.7", None, HEAD), "SCANNER") == ""
    assert ledger.change_performed(StepChange("1.7", "IN PROGRESS", None), "SCANNER") == ""
    assert end(ledger, series=None) == ""
    assert ledger.said_of(study(ledger)).expected == {"1.2.3.1": frozenset(HEAD["1.2.3.1"])}


def test_a_step_that_was_discontinued_expects_nothing(ledger: Ledger) -> None:
    begin(ledger)
    assert end(ledger, status="DISCONTINUED") == ""
    assert ledger.said_of(study(ledger)) == Said({"discontinued": 1}, {})


def test_steps_and_notifications_add_up(ledger: Ledger) -> None:
    begin(ledger, "1.7")
    begin(ledger, "1.8")
    end(ledger, "1.7", SCOUT)
    assert ledger.create_performed(Availability("1.9", "1.2.3", HEAD, 2), "PACS") == ""
    said = ledger.said_of(study(ledger))
    assert said.steps == {"completed": 1, "in_progress": 1, "announced": 1}
    assert said.expected == {uid: frozenset(named) for uid, named in (HEAD | SCOUT).items()}
    assert state_counts(ledger)["performed"] == said.steps


@pytest.mark.parametrize("series", [None, {}])
def test_no_step_ends_without_a_series(ledger: Ledger, series: Named | None) -> None:
    begin(ledger)
    assert end(ledger, series=series) == "no series"
    assert end(ledger, series=series, status="DISCONTINUED") == "no series"
    assert end(ledger, series={"1.2.3.1": ()}) == ""  # one without instances is one


def test_of_one_study_no_more_is_kept_than_is_bounded(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(performed, "MAXIMUM_NAMED", 3)
    assert begin(ledger, "1.7", SCOUT) == ""
    assert begin(ledger, "1.8", HEAD) == ""
    assert begin(ledger, "1.9", SCOUT) == "too many"
    assert end(ledger, "1.7", HEAD) == "too many"
    assert end(ledger, "1.8", {**HEAD}) == ""  # what it named before does not count twice
    assert begin(ledger, "1.9", HEAD, of="1.2.4") == ""
    assert state_counts(ledger)["performed"] == {"in_progress": 2, "completed": 1}


def test_every_change_is_an_event_of_its_study_if_there_is_one(ledger: Ledger) -> None:
    begin(ledger)
    key = study(ledger)
    ledger.change_performed(StepChange("1.7", None, HEAD), "OTHER")
    end(ledger)
    ledger.create_performed(Availability("1.9", "1.2.3", HEAD, 2), "PACS")
    events = [(one["name"], one["detail"]) for one in study_report(ledger, key)["events"]]
    told = {"performed": 1, "calling_ae": "SCANNER", "series": 1, "instances": 2}
    assert events[1:] == [
        ("step.updated", told | {"calling_ae": "OTHER"}),
        ("step.completed", told),
        ("availability.notified", told | {"performed": 2, "calling_ae": "PACS", "unavailable": 2}),
    ]
    assert event_counts(ledger)["step.created"] == 1
    assert verify_events(ledger) is None


def test_it_is_found_by_an_index(ledger: Ledger) -> None:
    """Not by reading all that was ever said, at each look at each study."""
    asked: list[str] = []

    def note(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        asked.append(statement)

    key = study(ledger)
    sa.event.listen(ledger._engine, "before_cursor_execute", note)
    ledger.said_of(key)
    (query,) = [one for one in asked if "SELECT" in one]
    with ledger.read() as connection:
        plan = [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}", (key,))]
    assert any("ix_performed_study_instance_uid" in line for line in plan), plan
    assert not any("SCAN" in line for line in plan), plan


def test_the_migration_goes_back(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    begin(ledger)
    ledger.close()
    config = Config()
    config.set_main_option("script_location", str(Path(database.__file__).parent / "migrations"))
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0004")
    engine.dispose()
    with sqlite3.connect(path) as raw:
        assert not raw.execute("select name from sqlite_master where tbl_name = 'performed'").fetchall()
    ledger = Ledger(path)
    assert begin(ledger) == ""
    ledger.close()


STEPS = ("1.7", "1.8", "1.9")
series_sets = st.sampled_from([{}, SCOUT, HEAD, {**HEAD, **SCOUT}])


class Model(RuleBasedStateMachine):
    """PS3.4 F.7 and Annex R in a dictionary, and the ledger beside it; it is opened anew now and then."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self.path = Path(self._folder.name) / "ledger.sqlite"
        self.ledger = Ledger(self.path)
        self.key = study(self.ledger)
        self.known: dict[str, tuple[str, Named]] = {}

    def teardown(self) -> None:
        assert verify_events(self.ledger) is None
        self.ledger.close()
        self._folder.cleanup()

    @rule(uid=st.sampled_from(STEPS), series=series_sets)
    def create(self, uid: str, series: Named) -> None:
        answer = self.ledger.create_performed(NewStep(uid, "1.2.3", series), "SCANNER")
        assert answer == ("duplicate" if uid in self.known else "")
        self.known.setdefault(uid, ("in_progress", series))

    @rule(uid=st.sampled_from(STEPS), series=series_sets)
    def announce(self, uid: str, series: Named) -> None:
        answer = self.ledger.create_performed(Availability(uid, "1.2.3", series, 0), "PACS")
        assert answer == ("duplicate" if uid in self.known else "")
        self.known.setdefault(uid, ("announced", series))

    @rule(
        uid=st.sampled_from(STEPS),
        status=st.sampled_from([None, "IN PROGRESS", "COMPLETED", "DISCONTINUED"]),
        series=st.none() | series_sets,
    )
    def change(self, uid: str, status: str | None, series: Named | None) -> None:
        answer = self.ledger.change_performed(StepChange(uid, status, series), "SCANNER")
        state, before = self.known.get(uid, ("", {}))
        after = before if series is None else series
        following = {"COMPLETED": "completed", "DISCONTINUED": "discontinued"}.get(status or "", "in_progress")
        if state in ("", "announced"):
            assert answer == "unknown"
        elif state != "in_progress":
            assert answer == "ended"
        elif following != "in_progress" and not after:
            assert answer == "no series"
        else:
            assert answer == ""
            self.known[uid] = following, after

    @rule()
    def reopen(self) -> None:
        self.ledger.close()
        self.ledger = Ledger(self.path)

    @invariant()
    def agrees(self) -> None:
        said = self.ledger.said_of(self.key)
        assert said.steps == Counter(state for state, _ in self.known.values())
        evidence = [series for state, series in self.known.values() if state in ("completed", "announced")]
        expected: dict[str, set[str]] = {}
        for series in evidence:
            for uid, uids in series.items():
                expected.setdefault(uid, set()).update(uids)
        assert said.expected == expected
        with self.ledger.read() as connection:
            rows = {row.sop_instance_uid: row for row in connection.execute(sa.select(schema.performed))}
        assert {
            uid: (row.state, {k: tuple(v) for k, v in row.series.items()}) for uid, row in rows.items()
        } == self.known


TestModel = pytest.mark.slow(Model.TestCase)
TestModel.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
