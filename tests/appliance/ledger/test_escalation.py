"""Escalation in the ledger: who is told next, who is spared, and that nobody was reached is noted once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from appliance.events import Event
from appliance.ledger.database import now
from appliance.ledger.records import Verdict
from appliance.ledger.store import Ledger, NewFinding, NewInstance, Told
from appliance.ledger.views import study_report, unreached_alerts, verify_events, waiting_destinations
from appliance.operations.health import metrics_text
from tests.builders import header

AT_ONCE = ("er", "ris")
STEPS = ("second", "mail")
ALL = (*AT_ONCE, *STEPS)
LONGEST = 240.0


class Box:
    """A ledger with one study, told of verdict after verdict as the services do it, with time that the test moves."""

    def __init__(self, folder: Path, *, at_once: Sequence[str] = ("er",), steps: Sequence[str] = STEPS) -> None:
        self.ledger = Ledger(folder / "ledger.sqlite")
        self.at_once, self.steps = at_once, steps
        self.analysis, self.revision = 0, 0
        self.complete()

    def complete(self, number: int = 1) -> None:
        """One more instance, and the study is complete with it."""
        association = self.ledger.open_association("S", "B", "here")
        self.ledger.record_instances([NewInstance(header(number), f"d{number}", 1, association)])
        (arriving,) = self.ledger.arriving_studies()
        self.ledger.complete_study(1, arriving.last_instance_at, {"by": "test", "confidence": "high"})

    def verdict(self, positive: bool, told: Sequence[str], *, held: bool = True, provisional: bool = False) -> None:
        """A further revision that tells these destinations something."""
        self.ledger.decide(1, "pkg", "1", admitted=True, reason="", admission=[], selection=[], inputs=[])
        row = self.ledger.take_analysis(["pkg"])
        assert row is not None
        self.analysis, self.revision = row["id"], self.revision + 1
        verdict = Verdict(
            "1.2.3", "1.2.3.1", "pkg", "1", "n", positive, 0.9, 0.5, {}, 1.0, (), (), (), (), provisional=provisional
        )
        findings = [
            NewFinding(
                f"alert.{name}", f"M{self.revision}{name}", f"{name}.hl7", (name,), 0,
                (60.0 + 60.0 * self.steps.index(name)) if held and name in self.steps else 0.0,
            )
            for name in told
        ]  # fmt: skip
        self.ledger.issue_verdict(row["id"], self.revision, verdict, now(), findings, admission=[], late=False)

    def state(self, name: str) -> str:
        """Of the newest delivery to that destination."""
        return str([one for one in self.deliveries() if one["destination"] == name][-1]["state"])

    def states(self) -> dict[str, str]:
        return {name: self.state(name) for name in {one["destination"] for one in self.deliveries()}}

    def deliveries(self) -> list[dict[str, Any]]:
        return sorted(study_report(self.ledger, 1)["deliveries"], key=lambda one: one["id"])

    def settle(self, name: str, outcome: Literal["acknowledge", "retry", "reject", "give_up"]) -> bool:
        row = self.ledger.take_delivery(name)
        assert row is not None, self.states()
        return self.ledger.settle_delivery(row, outcome, "because", steps=self.steps, budget_seconds=600.0)

    def pass_time(self, seconds: float) -> list[str]:
        """As if so much time had gone by; who is told now."""
        with self.ledger._write() as connection:  # the clock itself cannot be moved
            connection.exec_driver_sql(
                "UPDATE delivery SET due_at = strftime('%Y-%m-%dT%H:%M:%f000+00:00', due_at, ?)",
                (f"{-seconds:+} seconds",),
            )
            connection.exec_driver_sql(
                "UPDATE verdict SET issued_at = strftime('%Y-%m-%dT%H:%M:%f000+00:00', issued_at, ?)",
                (f"{-seconds:+} seconds",),
            )
        return [name for _, name, _ in self.look().steps]

    def look(self, alarm_seconds: float = 300.0) -> Any:
        return self.ledger.escalate((*self.at_once, *self.steps), LONGEST, alarm_seconds)

    def events(self, name: Event) -> int:
        return sum(one["name"] == name for one in study_report(self.ledger, 1)["events"])


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def test_a_step_waits_for_its_time_and_is_then_a_delivery_like_any_other(box: Box) -> None:
    box.verdict(True, ("er", *STEPS))
    assert box.states() == {"er": "pending", "second": "held", "mail": "held"}
    assert not box.look().steps
    assert box.ledger.take_delivery("second") is None
    box.settle("er", "retry")
    assert box.pass_time(61) == ["second"]
    assert box.states() == {"er": "pending", "second": "pending", "mail": "held"}
    assert box.pass_time(10) == []
    assert box.pass_time(50) == ["mail"]
    row = box.ledger.take_delivery("mail")
    assert row is not None and row["uid"] == "M1mail"
    assert box.events(Event.DELIVERY_ESCALATED) == 2
    taken = [one["detail"] for one in study_report(box.ledger, 1)["events"] if one["name"] == Event.DELIVERY_ESCALATED]
    assert [one["destination"] for one in taken] == ["second", "mail"]
    assert "er is pending" in taken[0]["reason"]


def test_an_acknowledgement_in_time_spares_the_steps(box: Box) -> None:
    box.verdict(True, ("er", *STEPS))
    box.settle("er", "acknowledge")
    assert box.states() == {"er": "acknowledged", "second": "spared", "mail": "spared"}
    assert box.pass_time(1000) == []
    assert not box.look().unreached
    assert box.events(Event.DELIVERY_SPARED) == 2
    assert box.ledger.told(box.analysis) == {"er": [Told(True)]}
    assert waiting_destinations(box.ledger) == {}
    assert unreached_alerts(box.ledger) == []


def test_every_destination_that_is_told_at_once_has_to_acknowledge(tmp_path: Path) -> None:
    box = Box(tmp_path, at_once=AT_ONCE)
    box.verdict(True, ("er", "ris", *STEPS))
    box.settle("er", "acknowledge")
    assert box.state("second") == "held"
    assert box.pass_time(61) == ["second"]
    box.settle("second", "acknowledge")
    assert box.state("mail") == "spared"


def test_a_step_that_acknowledges_spares_the_next(box: Box) -> None:
    box.verdict(True, ("er", *STEPS))
    box.settle("er", "retry")
    box.pass_time(61)
    box.settle("second", "acknowledge")
    assert box.states() == {"er": "pending", "second": "acknowledged", "mail": "spared"}


def test_where_nobody_will_ever_answer_the_next_is_told_at_once_one_after_another(box: Box) -> None:
    box.verdict(True, ("er", *STEPS))
    assert not box.settle("er", "reject")
    assert [name for _, name, _ in box.look().steps] == ["second"]
    assert not box.look().steps
    assert not box.settle("second", "give_up")
    assert [name for _, name, _ in box.look().steps] == ["mail"]
    assert box.settle("mail", "reject"), "nobody was reached"
    assert box.events(Event.ALERT_UNREACHED) == 1


def test_nobody_reached_in_time_is_noted_once_and_over_with_an_acknowledgement(box: Box) -> None:
    box.verdict(True, ("er", *STEPS))
    box.settle("er", "retry")
    box.pass_time(299)
    assert unreached_alerts(box.ledger) == []
    box.pass_time(2)
    box.look()
    box.look()
    assert box.events(Event.ALERT_UNREACHED) == 1
    (alarm,) = unreached_alerts(box.ledger)
    assert alarm["study_id"] == 1
    assert "scanside_alerts_unreached 1.0" in metrics_text(box.ledger)
    assert 'scanside_events_total{event="alert.unreached"} 1.0' in metrics_text(box.ledger)
    box.settle("mail", "acknowledge")
    assert unreached_alerts(box.ledger) == []
    assert "scanside_alerts_unreached 0.0" in metrics_text(box.ledger)


def test_an_alarm_is_over_when_a_person_releases_the_study_and_again_one_if_it_fails_again(box: Box) -> None:
    box.verdict(True, ("er",))
    assert box.settle("er", "reject")
    assert len(unreached_alerts(box.ledger)) == 1
    box.ledger.release_study(1)
    assert unreached_alerts(box.ledger) == []
    box.ledger.requeue_delivery(box.deliveries()[0]["id"], ["er"])
    assert len(unreached_alerts(box.ledger)) == 1
    box.settle("er", "acknowledge")
    assert unreached_alerts(box.ledger) == []


@pytest.mark.parametrize("scanned_again", [True, False])
def test_a_release_hides_no_alarm_of_later(box: Box, scanned_again: bool) -> None:
    box.ledger.release_study(1)
    if scanned_again:
        box.complete(2)
    box.verdict(True, ("er",))
    assert box.settle("er", "give_up")
    assert len(unreached_alerts(box.ledger)) == 1
    assert "scanside_alerts_unreached 1.0" in metrics_text(box.ledger)
    box.ledger.release_study(1)
    assert unreached_alerts(box.ledger) == []


def test_a_new_completion_takes_the_release_of_an_alarm_back(box: Box) -> None:
    box.verdict(True, ("er",))
    assert box.settle("er", "reject")
    box.ledger.release_study(1)
    box.complete(2)
    assert len(unreached_alerts(box.ledger)) == 1


def test_a_negative_verdict_and_a_withdrawal_are_no_alarm(box: Box) -> None:
    box.verdict(True, ("er",))
    box.settle("er", "acknowledge")
    box.verdict(False, ("er",))
    assert not box.settle("er", "reject")
    assert unreached_alerts(box.ledger) == []


def test_a_confirmation_that_fails_is_no_alarm_where_the_alert_arrived_but_a_correction_is(box: Box) -> None:
    box.verdict(True, ("er",), provisional=True)
    box.settle("er", "acknowledge")
    box.verdict(True, ("er",))
    assert not box.settle("er", "reject")
    box.verdict(False, ("er",))
    box.settle("er", "acknowledge")
    box.verdict(True, ("er",))
    assert box.settle("er", "reject")
    assert len(unreached_alerts(box.ledger)) == 1
    box.verdict(False, ("er",))
    assert unreached_alerts(box.ledger) == []


def test_a_suspended_package_tells_no_further_step(box: Box) -> None:
    box.verdict(True, ("er", *STEPS))
    box.ledger.record_decision(Event.BOARD_SUSPENDED, "pkg", who="board")
    assert set(box.states().values()) == {"withdrawn"}
    assert box.pass_time(1000) == []
    assert unreached_alerts(box.ledger) == []
    assert box.ledger.told(box.analysis) == {}


def test_what_was_refused_or_never_tried_told_nobody_and_what_was_tried_in_vain_perhaps(box: Box) -> None:
    box.verdict(True, ("er",))
    box.settle("er", "reject")
    assert box.ledger.told(box.analysis) == {}
    box.ledger.requeue_delivery(box.deliveries()[0]["id"], ["er"])
    assert box.ledger.told(box.analysis) == {"er": [Told(True)]}
    box.settle("er", "give_up")
    assert box.ledger.told(box.analysis) == {"er": [Told(True, certain=False)]}
    # Sent again, and its destination gone: it was tried all the same.
    box.ledger.requeue_delivery(box.deliveries()[0]["id"], ["er"])
    box.ledger.abandon_deliveries([])
    assert [(one["state"], one["attempts"]) for one in box.deliveries()] == [("dead", 0)]
    assert box.ledger.told(box.analysis) == {"er": [Told(True, certain=False)]}
    box.verdict(False, ("ris",))
    box.ledger.abandon_deliveries([])
    assert set(box.ledger.told(box.analysis)) == {"er"}


def test_a_step_that_is_held_when_its_alert_is_taken_back_is_never_told(box: Box) -> None:
    box.verdict(True, ("er", *STEPS))
    box.settle("er", "retry")
    assert box.ledger.told(box.analysis)["mail"] == [Told(True)]
    box.verdict(False, ("er", *STEPS), held=False)
    assert {one["state"] for one in box.deliveries() if one["destination"] in STEPS} == {"spared"}
    assert box.pass_time(1000) == []
    assert set(box.ledger.told(box.analysis)) == {"er"}


def test_a_step_that_was_told_hears_at_once_that_it_is_taken_back(box: Box) -> None:
    box.verdict(True, ("er", *STEPS))
    box.settle("er", "retry")
    box.pass_time(61)
    box.settle("second", "acknowledge")
    box.verdict(False, ("er", "second"), held=False)
    assert box.state("second") == "pending"
    row = box.ledger.take_delivery("second")
    assert row is not None and row["uid"] == "M2second"


def test_a_newer_alert_takes_the_place_and_the_time_of_one_that_is_held(box: Box) -> None:
    box.verdict(True, ("er", *STEPS), provisional=True)
    box.settle("er", "retry")
    assert box.pass_time(40) == []
    box.verdict(True, ("er", *STEPS), held=False)
    assert [one["state"] for one in box.deliveries() if one["destination"] == "second"] == ["spared", "held"]
    assert box.pass_time(21) == ["second"]
    row = box.ledger.take_delivery("second")
    assert row is not None and row["uid"] == "M2second"


def test_what_is_held_for_a_destination_that_is_gone_is_a_dead_letter(box: Box) -> None:
    box.verdict(True, ("er", *STEPS))
    assert waiting_destinations(box.ledger)["mail"] == 1
    assert box.ledger.abandon_deliveries(["er", "second"]) == 1
    assert box.states() == {"er": "pending", "second": "held", "mail": "dead"}


def test_a_message_that_is_invalid_is_a_dead_letter_and_the_next_step_is_told(box: Box) -> None:
    box.ledger.decide(1, "pkg", "1", admitted=True, reason="", admission=[], selection=[], inputs=[])
    row = box.ledger.take_analysis(["pkg"])
    assert row is not None
    verdict = Verdict("1.2.3", "1.2.3.1", "pkg", "1", "n", True, 0.9, 0.5, {}, 1.0, (), (), (), ())
    findings = [
        NewFinding("alert.er", "M1", "a.hl7", ("er",), 0, failed="PID is wrong"),
        NewFinding("alert.mail", "M2", "b.eml", ("mail",), 0, 60.0),
    ]
    box.ledger.issue_verdict(row["id"], 1, verdict, now(), findings, admission=[], late=False)
    assert box.ledger.take_delivery("er") is None
    assert box.ledger.unrendered_finding(20) is None
    assert box.events(Event.FINDING_FAILED) == 1
    assert box.ledger.abandon_findings(20) == 1
    assert "PID is wrong" in box.deliveries()[0]["reason"]
    assert [name for _, name, _ in box.look().steps] == ["mail"]
    assert box.settle("mail", "give_up")


def test_a_clock_that_was_set_back_silences_no_alarm(box: Box) -> None:
    box.verdict(True, ("er",))
    box.settle("er", "retry")
    box.pass_time(-5)
    assert not box.look().unreached, "a clock that is adjusted is none that was set back"
    box.pass_time(-3600)
    (alarm,) = unreached_alerts(box.ledger)
    assert "the clock was set back" in alarm["reason"]


def test_a_clock_that_was_set_back_holds_no_step_back(box: Box) -> None:
    box.verdict(True, ("er", *STEPS))
    box.settle("er", "retry")
    assert box.pass_time(-3600) == ["second", "mail"]


@pytest.mark.slow
@settings(max_examples=20, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(data=st.data())
def test_nobody_is_told_twice_or_forgotten_whatever_happens(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Each delivery ends once; somebody is reached or the alarm was given; a start after kill -9 changes nothing."""
    folder = tmp_path_factory.mktemp("any")
    box = Box(folder, at_once=AT_ONCE)
    box.verdict(True, ALL)
    acknowledged: list[str] = []
    for _ in range(data.draw(st.integers(0, 25))):
        match data.draw(st.sampled_from(["deliver", "time", "kill"])):
            case "time":
                box.pass_time(data.draw(st.sampled_from([1.0, 30.0, 61.0])))
            case "kill":
                box.ledger.close()
                box.ledger = Ledger(folder / "ledger.sqlite")
                box.ledger.park_deliveries()
            case "deliver":
                name = data.draw(st.sampled_from(ALL))
                row = box.ledger.take_delivery(name)
                if row is not None and data.draw(st.booleans()):  # else it is killed on its way
                    outcome = data.draw(st.sampled_from(["acknowledge", "retry", "reject", "give_up"]))
                    box.ledger.settle_delivery(row, outcome, steps=STEPS)
                    acknowledged += [name] if outcome == "acknowledge" else []
    box.ledger.park_deliveries()
    for _ in range(8):  # let it come to its end: whoever is asked now is dead
        box.pass_time(200.0)
        for name in ALL:
            if (row := box.ledger.take_delivery(name)) is not None:
                box.ledger.settle_delivery(row, "give_up", steps=STEPS)
    assert len(acknowledged) == len(set(acknowledged))
    states = box.states()
    assert set(states.values()) <= {"acknowledged", "rejected", "dead", "spared"}
    assert {name for name, state in states.items() if state == "acknowledged"} == set(acknowledged)
    if not acknowledged:
        assert "spared" not in states.values()
    spared = [name for name in STEPS if states[name] == "spared"]
    if spared:
        assert set(AT_ONCE) <= set(acknowledged) or set(STEPS) & set(acknowledged)
    # Acknowledged by nobody for 300 s, or for good: alarmed once.
    assert box.events(Event.ALERT_UNREACHED) <= 1
    assert bool(acknowledged) or box.events(Event.ALERT_UNREACHED) == 1
    assert (len(unreached_alerts(box.ledger)) == 1) == (not acknowledged)
    assert verify_events(box.ledger) is None
    assert sorted(one["destination"] for one in box.deliveries()) == sorted(ALL)
    box.ledger.close()
