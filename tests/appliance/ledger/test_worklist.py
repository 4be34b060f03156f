"""Work items live as PS3.4 Annex CC says, under any sequence of requests; and who listens hears of it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from appliance.events import Event
from appliance.ledger import subscriptions
from appliance.ledger.database import later
from appliance.ledger.store import Ledger
from appliance.ledger.views import event_counts, verify_events
from dicom_io.workitem import (
    CANCEL_REQUESTED,
    CANCELED,
    COMPLETED,
    FILTERED,
    GLOBAL,
    IN_PROGRESS,
    PROGRESS_REPORT,
    SCHEDULED,
    SCP_STATUS,
    STATE_REPORT,
    Step,
    WorkitemError,
    put,
    text,
    values,
)
from tests.workitems import abandoned, performed, workitem


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path / "ledger.sqlite")
    yield opened
    opened.close()


def status(action: Callable[[], int | None]) -> int:
    try:
        return action() or 0
    except WorkitemError as error:
        return error.status


def heard(ledger: Ledger, ae_title: str = "PACS") -> list[tuple[int, str]]:
    """Type and state of each report that waits; they are heard then."""
    found = []
    for row in ledger.next_events(ae_title, 1000):
        found.append((row["event_type"], text(row["information"], "ProcedureStepState")))
        ledger.heard(row["id"])
    return found


LOCKS = ("1.9.1", "1.9.2", "")
UIDS = ("1.1", "1.2")


@cache
def empty_ledger() -> bytes:
    """The file of a ledger that holds nothing: to make one takes longer than all that a machine does in it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.sqlite"
        Ledger(path).close()
        return path.read_bytes()


class Lives(RuleBasedStateMachine):
    """Requests in any order against a model that says in its own words what the standard's table does."""

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.folder.joinpath("ledger.sqlite").write_bytes(empty_ledger())
        self.ledger = Ledger(self.folder / "ledger.sqlite")
        self.state: dict[str, str] = {}
        self.lock: dict[str, str] = {}
        self.ready: dict[str, set[str]] = {uid: set() for uid in UIDS}
        self.ledger.subscribe("PACS", GLOBAL, locked=False)

    def teardown(self) -> None:
        assert verify_events(self.ledger) is None
        self.ledger.close()
        shutil.rmtree(self.folder)

    def told(self, *states: str) -> None:
        reports = [state for kind, state in heard(self.ledger) if kind == STATE_REPORT]
        assert reports == list(states)

    @rule(uid=st.sampled_from(UIDS))
    def create(self, uid: str) -> None:
        got = status(lambda: self.ledger.create_workitem(uid, workitem(), "RIS"))
        if uid in self.state:
            assert got == 0x0111
            self.told()
        else:
            assert got == 0
            self.state[uid] = SCHEDULED
            self.told(SCHEDULED)

    @rule(uid=st.sampled_from(UIDS), lock=st.sampled_from(LOCKS))
    def claim(self, uid: str, lock: str) -> None:
        got = status(lambda: self.ledger.change_state(uid, IN_PROGRESS, lock, "WS"))
        state = self.state.get(uid)
        if state is None:
            assert got == 0xC307
        elif not lock:
            assert got == 0xC301
        elif state == SCHEDULED:
            assert got == 0
            self.state[uid], self.lock[uid] = IN_PROGRESS, lock
            self.told(IN_PROGRESS)
        else:
            assert got == (0xC302 if state == IN_PROGRESS else 0xC300)

    @rule(uid=st.sampled_from(UIDS), lock=st.sampled_from(LOCKS))
    def back_to_scheduled(self, uid: str, lock: str) -> None:
        got = status(lambda: self.ledger.change_state(uid, SCHEDULED, lock, "WS"))
        assert got == (0xC303 if uid in self.state else 0xC307)

    @rule(uid=st.sampled_from(UIDS), lock=st.sampled_from(LOCKS), state=st.sampled_from((COMPLETED, CANCELED)))
    def end(self, uid: str, lock: str, state: str) -> None:
        got = status(lambda: self.ledger.change_state(uid, state, lock, "WS"))
        was = self.state.get(uid)
        if was is None:
            assert got == 0xC307
        elif not lock or (uid in self.lock and lock != self.lock[uid]):
            assert got == 0xC301
        elif was == SCHEDULED:
            assert got == 0xC310
        elif was == IN_PROGRESS:
            assert got == (0 if state in self.ready[uid] else 0xC304)
            if got == 0:
                self.state[uid] = state
                self.told(state)
        elif was == state:
            assert got == (0xB306 if state == COMPLETED else 0xB304)
        else:
            assert got == 0xC300

    @rule(uid=st.sampled_from(UIDS), lock=st.sampled_from(LOCKS), state=st.sampled_from((COMPLETED, CANCELED)))
    def update(self, uid: str, lock: str, state: str) -> None:
        changes = performed() if state == COMPLETED else abandoned()
        got = status(lambda: self.ledger.update_workitem(uid, changes, lock, "WS"))
        was = self.state.get(uid)
        if was is None:
            assert got == 0xC307
        elif was in (COMPLETED, CANCELED):
            assert got == 0xC300
        elif was == IN_PROGRESS and lock != self.lock[uid]:
            assert got == 0xC301
        else:
            assert got == 0
            self.ready[uid].add(state)
        heard(self.ledger)

    @rule(uid=st.sampled_from(UIDS))
    def ask_to_cancel(self, uid: str) -> None:
        got = status(lambda: self.ledger.request_cancel(uid, {}, "RIS"))
        was = self.state.get(uid)
        reports = heard(self.ledger)
        if was is None:
            assert got == 0xC307
        elif was == COMPLETED:
            assert got == 0xC311
        elif was == CANCELED:
            assert got == 0xB304
        elif was == SCHEDULED:
            assert got == 0
            self.state[uid] = CANCELED
            self.lock.pop(uid, None)
            assert reports == [(STATE_REPORT, IN_PROGRESS), (STATE_REPORT, CANCELED)]
        else:
            assert got == 0
            assert reports == [(CANCEL_REQUESTED, "")]

    @invariant()
    def the_ledger_agrees(self) -> None:
        for uid, state in getattr(self, "state", {}).items():
            row = self.ledger.workitem(uid)
            assert (row["state"], text(row["step"], "ProcedureStepState")) == (state, state)
            assert row["transaction_uid"] == self.lock.get(uid)
            assert not text(row["step"], "TransactionUID")


Lives.TestCase.settings = settings(
    max_examples=12, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestLives = Lives.TestCase


@pytest.mark.parametrize(
    "change",
    [
        {"ScheduledProcedureStepPriority": "URGENT"}, {"ScheduledProcedureStepPriority": None},
        {"ProcedureStepLabel": None},
        {"InputReadinessState": "MAYBE"}, {"ScheduledProcedureStepStartDateTime": "tomorrow"},
        {"ProcedureStepState": "IN PROGRESS"}, {"TransactionUID": "1.2"},
    ],
)  # fmt: skip
def test_what_is_no_work_item_is_refused(ledger: Ledger, change: dict[str, str | None]) -> None:
    wanted = 0xC309 if "ProcedureStepState" in change else 0x0121 if None in change.values() else 0x0106
    assert status(lambda: ledger.create_workitem("1.1", workitem(**change), "RIS")) == wanted
    assert status(lambda: ledger.create_workitem("1.02", workitem(), "RIS")) == 0x0106
    assert ledger.find_workitems({}, 10) == []


def test_empty_attributes_that_were_left_away_are_made_and_it_is_told(ledger: Ledger) -> None:
    step = workitem()
    del step["00400400"], step["00100030"]
    assert ledger.create_workitem("1.1", step, "RIS") == 0xB300
    assert "00400400" in ledger.workitem("1.1")["step"]
    del step["00741200"]
    assert status(lambda: ledger.create_workitem("1.2", step, "RIS")) == 0x0120


@pytest.mark.parametrize("keyword", ["ProcedureStepState", "PatientID", "StudyInstanceUID", "SOPInstanceUID"])
def test_an_update_changes_neither_state_nor_patient(ledger: Ledger, keyword: str) -> None:
    ledger.create_workitem("1.1", workitem(), "RIS")
    changes: Step = {}
    put(changes, keyword, "LO", "COMPLETED")
    before = ledger.workitem("1.1")
    assert status(lambda: ledger.update_workitem("1.1", changes, "", "RIS")) == 0x0106
    assert ledger.workitem("1.1") == before


def test_reports_go_to_those_that_are_subscribed(ledger: Ledger) -> None:
    ledger.create_workitem("1.1", workitem(), "RIS")
    ledger.subscribe("ONE", "1.1", locked=False)
    assert heard(ledger, "ONE") == [(STATE_REPORT, SCHEDULED)]
    ledger.subscribe("ALL", GLOBAL, locked=False)
    ledger.subscribe("LOCK", GLOBAL, locked=True)
    assert heard(ledger, "ALL") == []  # without a lock there is no first report (Table CC.2.3-2)
    assert heard(ledger, "LOCK") == [(STATE_REPORT, SCHEDULED)]
    ledger.update_workitem("1.1", abandoned(), "", "RIS")
    ledger.create_workitem("1.2", workitem(), "RIS")
    assert heard(ledger, "ONE") == [(PROGRESS_REPORT, "")]
    assert heard(ledger, "ALL") == [(PROGRESS_REPORT, ""), (STATE_REPORT, SCHEDULED)]
    ledger.suspend("ALL", GLOBAL)
    ledger.create_workitem("1.3", workitem(), "RIS")
    assert heard(ledger, "ALL") == []
    ledger.change_state("1.1", IN_PROGRESS, "1.9", "WS")
    assert heard(ledger, "ALL") == [(STATE_REPORT, IN_PROGRESS)]
    ledger.unsubscribe("ALL", GLOBAL)
    ledger.update_workitem("1.2", performed(), "", "RIS")
    ledger.change_state("1.2", IN_PROGRESS, "1.9", "WS")
    assert heard(ledger, "ALL") == []
    ledger.announce_start()
    assert [kind for kind, _ in heard(ledger, "ONE")] == [STATE_REPORT, SCP_STATUS]


def test_a_filter_subscribes_to_what_matches(ledger: Ledger) -> None:
    ledger.create_workitem("1.1", workitem(), "RIS")
    ledger.create_workitem("1.2", workitem(WorklistLabel="CHEST"), "RIS")
    keys: Step = {}
    put(keys, "WorklistLabel", "LO", "CH*")
    ledger.subscribe("PACS", FILTERED, locked=True, keys=keys)
    ledger.create_workitem("1.3", workitem(), "RIS")
    ledger.create_workitem("1.4", workitem(WorklistLabel="CHEST 2"), "RIS")
    assert [row["uid"] for row in ledger.next_events("PACS")] == ["1.2", "1.4"]


def test_a_subscriber_that_never_listens_costs_a_bounded_place(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscriptions, "MAXIMUM_WAITING", 3)
    ledger.subscribe("PACS", GLOBAL, locked=False)
    for number in range(1, 6):
        ledger.create_workitem(f"1.{number}", workitem(), "RIS")
    assert [row["uid"] for row in ledger.next_events("PACS")] == ["1.3", "1.4", "1.5"]
    assert event_counts(ledger)[Event.WORKLIST_FORGOTTEN] == 2
    monkeypatch.setattr(subscriptions, "MAXIMUM_SUBSCRIBERS", 1)
    ledger.subscribe("PACS", "1.1", locked=False)
    assert status(lambda: ledger.subscribe("OTHER", "1.1", locked=False)) == 0x0213


def test_an_item_that_ended_goes_unless_somebody_holds_it(ledger: Ledger) -> None:
    for uid in ("1.1", "1.2", "1.3"):
        ledger.create_workitem(uid, workitem(), "RIS")
    ledger.subscribe("PACS", "1.2", locked=True)
    for uid in ("1.1", "1.2"):
        ledger.request_cancel(uid, {}, "RIS")
    assert ledger.remove_ended(later(-60)) == 0
    assert ledger.remove_ended(later(1)) == 1
    left = [text(one, "SOPInstanceUID") for one in ledger.find_workitems({}, 10)]
    assert left == ["1.2", "1.3"]
    ledger.unsubscribe("PACS", "1.2")
    assert ledger.remove_ended(later(1)) == 1


def test_a_cancel_of_a_claimed_item_that_nobody_would_hear_is_refused(ledger: Ledger) -> None:
    ledger.create_workitem("1.1", workitem(), "RIS")
    ledger.change_state("1.1", IN_PROGRESS, "1.9", "WS")
    assert status(lambda: ledger.request_cancel("1.1", {}, "RIS")) == 0xC312
    ledger.subscribe("WS", "1.1", locked=False)
    said: Step = {}
    put(said, "ReasonForCancellation", "LT", "moved away")
    assert ledger.request_cancel("1.1", said, "RIS") == 0
    report = ledger.next_events("WS")[-1]["information"]
    assert (text(report, "RequestingAE"), text(report, "ReasonForCancellation")) == ("RIS", "moved away")
    assert ledger.workitem("1.1")["state"] == IN_PROGRESS


def test_canceling_what_nobody_claimed_meets_the_final_state(ledger: Ledger) -> None:
    ledger.create_workitem("1.1", workitem(), "RIS")
    said: Step = {}
    put(said, "ReasonForCancellation", "LT", "double")
    ledger.request_cancel("1.1", said, "RIS")
    (progress,) = values(ledger.workitem("1.1")["step"], "ProcedureStepProgressInformationSequence")
    assert text(progress, "ReasonForCancellation") == "double"
    assert text(progress, "ProcedureStepCancellationDateTime")


def test_the_most_urgent_come_first(ledger: Ledger) -> None:
    for number, priority in enumerate(("LOW", "HIGH", "MEDIUM", "HIGH"), start=1):
        ledger.create_workitem(f"1.{number}", workitem(priority=priority), "RIS")
    found = [text(one, "SOPInstanceUID") for one in ledger.find_workitems({}, 10)]
    assert found == ["1.2", "1.4", "1.3", "1.1"]
    assert [text(one, "SOPInstanceUID") for one in ledger.find_workitems({}, 2, 1)] == ["1.4", "1.3"]
