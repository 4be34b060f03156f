"""A study is complete on evidence; the clock is the last resort."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from appliance.ledger.database import later, now
from appliance.ledger.store import Arriving
from appliance.study.completeness import Completeness, Habit, habit_of, weigh
from appliance.study.grouping import group
from appliance.study.selection import select
from dicom_io.header import Header
from tests.builders import head_series

STRANGER = Habit(0, 0.0)
STEADY = Habit(20, 0.0)


def decide(
    headers: list[Header],
    *,
    closed: float | None,
    last: float,
    outcomes: tuple[str, ...],
    open_: int = 0,
    habit: Habit = STRANGER,
) -> Completeness:
    arriving = Arriving(1, later(-last), open_, None if closed is None else later(-closed), outcomes)
    series = group(headers)
    return weigh(arriving, select(series), series, habit, now(), settle_seconds=1.0, quiet_seconds=20.0)


def test_a_released_association_and_a_contiguous_head_are_enough() -> None:
    decision = decide(head_series(), closed=1.5, last=1.6, outcomes=("released",))
    assert decision.complete
    assert decision.evidence["confidence"] == "high"
    assert decision.evidence["slices"] == 30


def test_a_moment_is_left_for_a_further_association_of_a_stranger() -> None:
    decision = decide(head_series(), closed=0.2, last=0.3, outcomes=("released",))
    assert not decision.complete
    assert 0 < decision.wait_seconds <= 0.8


def test_nothing_is_waited_for_that_the_sender_never_does() -> None:
    decision = decide(head_series(), closed=0.0, last=0.1, outcomes=("released",), habit=STEADY)
    assert decision.complete
    assert "as this sender always does" in decision.evidence["by"]


def test_a_sender_that_pauses_is_waited_for() -> None:
    pausing = Habit(7, 4.0)
    early = decide(head_series(), closed=2.0, last=2.1, outcomes=("released",), habit=pausing)
    assert not early.complete
    assert 3.5 < early.wait_seconds <= 4.0
    assert decide(head_series(), closed=6.1, last=6.2, outcomes=("released",), habit=pausing).complete
    # But never longer than for one that says nothing.
    assert decide(head_series(), closed=20.1, last=20.2, outcomes=("released",), habit=Habit(7, 600.0)).complete


def test_holes_in_the_numbers_are_not_trusted_to_habit() -> None:
    """Every second slice of a scan with overlapping slices is contiguous, and half of it."""
    half = [one for one in head_series(60, step=2.5) if (one.instance_number or 0) % 2]
    assert not decide(half, closed=0.5, last=0.6, outcomes=("released",), habit=STEADY).complete
    late = decide(half, closed=1.5, last=1.6, outcomes=("released",), habit=STEADY)
    assert late.complete
    assert late.evidence["confidence"] == "medium"


def test_as_many_as_the_sender_said_are_enough_while_it_stays_connected() -> None:
    told = [replace(one, number_of_series_related_instances=30) for one in head_series()]
    assert decide(told, closed=None, last=0.0, outcomes=(), open_=1).complete
    assert not decide(told[:-1], closed=None, last=0.0, outcomes=(), open_=1).complete
    # The scout's series has no number: more may come.
    scout = [replace(one, image_type=("ORIGINAL", "PRIMARY", "LOCALIZER")) for one in head_series(1, series="1.2.3.9")]
    assert not decide([*told, *scout], closed=None, last=0.0, outcomes=(), open_=1).complete


def test_fewer_than_the_sender_said_leave_only_the_last_resort() -> None:
    told = [replace(one, number_of_series_related_instances=40) for one in head_series()]
    early = decide(told, closed=5.0, last=5.0, outcomes=("released",), habit=STEADY)
    assert not early.complete
    late = decide(told, closed=21.0, last=21.0, outcomes=("released",), habit=STEADY)
    assert late.complete
    assert late.evidence["confidence"] == "low"
    assert late.evidence["expected_instances"] == {"series": 1, "expected": 40, "arrived": 30}


def test_images_in_acquisition_say_that_all_came_but_not_that_some_did_not() -> None:
    told = [replace(one, images_in_acquisition=30) for one in head_series()]
    assert decide(told, closed=None, last=0.0, outcomes=(), open_=1).complete
    more = [replace(one, images_in_acquisition=60) for one in head_series()]  # the other half is another series
    assert not decide(more, closed=None, last=0.0, outcomes=(), open_=1).complete
    assert decide(more, closed=1.5, last=1.6, outcomes=("released",)).complete


def test_what_is_not_enough_waits_for_quiet() -> None:
    gap = [one for one in head_series() if one.instance_number != 15]
    for headers, outcomes, open_ in (
        (gap, ("released",), 0),
        (head_series(), ("broken",), 0),
        (head_series(), ("aborted", "released"), 0),
        (head_series(), ("lost",), 0),
        (head_series(), ("released",), 1),
        (head_series(15), ("released",), 0),
        ([], ("released",), 0),
    ):
        for habit in (STRANGER, STEADY):
            early = decide(headers, closed=5.0, last=5.0, outcomes=outcomes, open_=open_, habit=habit)
            assert not early.complete
            assert 14.0 < early.wait_seconds <= 15.0
            late = decide(headers, closed=21.0, last=21.0, outcomes=outcomes, open_=open_, habit=habit)
            assert late.complete
            assert late.evidence["confidence"] == "low"


def test_a_clock_that_was_set_back_holds_up_nobody() -> None:
    assert decide(head_series(), closed=-3600.0, last=-3600.0, outcomes=("released",)).complete
    assert decide(head_series(), closed=-3600.0, last=-3600.0, outcomes=("lost",)).complete


@given(
    st.integers(1, 40),
    st.floats(0, 100),
    st.floats(0, 100),
    st.sets(st.sampled_from(["released", "aborted", "broken", "lost"])),
    st.integers(0, 3),
    st.builds(Habit, st.integers(0, 20), st.floats(0, 1000)),
)
def test_every_study_is_complete_in_the_end_and_none_is_looked_at_in_vain(
    slices: int, closed: float, last: float, outcomes: set[str], open_: int, habit: Habit
) -> None:
    found = tuple(sorted(outcomes))
    decision = decide(
        head_series(slices), closed=closed if found else None, last=last, outcomes=found, open_=open_, habit=habit
    )
    if last >= 20.0 and (closed >= 20.0 or not found):
        assert decision.complete
    if not decision.complete:
        assert 0 < decision.wait_seconds <= 20.0


def test_the_habit_is_the_longest_pause_of_the_last_studies() -> None:
    assert habit_of([]) == Habit(0, 0.0)
    earlier = [{"longest_pause_s": 0.0}, {"longest_pause_s": 2.5}, {"by": "an older version"}]
    assert habit_of(earlier) == Habit(3, 2.5)
