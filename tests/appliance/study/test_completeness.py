"""A study is complete on evidence; the clock is the last resort."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.ledger.database import later, now
from appliance.ledger.performed import NOTHING_SAID, Said
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
    said: Said = NOTHING_SAID,
    visits: Sequence[tuple[str, float, float | None]] = (),
) -> Completeness:
    """Weigh it; times are seconds ago."""
    came = tuple((series, later(-first), None if end is None else later(-end)) for series, first, end in visits)
    arriving = Arriving(1, later(-last), open_, None if closed is None else later(-closed), outcomes, "CT1", came)
    series = group(headers)
    return weigh(arriving, select(series), series, habit, said, now(), settle_seconds=1.0, quiet_seconds=20.0)


def done(headers: list[Header], **steps: int) -> Said:
    """The word that these are all."""
    named = {one.series_instance_uid: frozenset(h.sop_instance_uid for h in one.headers) for one in group(headers)}
    return Said(steps or {"completed": 1}, named)


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


def test_a_series_that_paused_already_is_waited_for_whoever_sends_it() -> None:
    head = "1.2.3.1"
    for habit in (STEADY, STRANGER):
        paused = [(head, 20.0, 15.0), (head, 11.0, 1.2)]
        early = decide(head_series(), closed=1.2, last=1.3, outcomes=("released",), habit=habit, visits=paused)
        assert not early.complete
        assert 4.5 < early.wait_seconds <= 4.8
        assert early.evidence["longest_pause_s"] == pytest.approx(4.0, abs=0.01)
    # Two at once, and one within another, are no pause; nor is what came of other series.
    for visits in (
        [(head, 20.0, 10.0), (head, 12.0, 1.2)],
        [(head, 20.0, 2.0), (head, 12.0, 8.0), (head, 5.0, 1.2)],
        [("1.2.3.9", 30.0, 29.0), (head, 20.0, 1.2)],
        [(head, 60.0, 50.0), (head, 20.0, 1.2)],
    ):
        assert decide(head_series(), closed=1.2, last=1.3, outcomes=("released",), habit=STEADY, visits=visits).complete


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


def test_a_number_that_counts_along_is_not_believed() -> None:
    """Some senders write how many there are so far."""
    so_far = [replace(one, number_of_series_related_instances=n) for n, one in enumerate(head_series(25), 1)]
    decision = decide(so_far, closed=None, last=0.0, outcomes=(), open_=1)
    assert not decision.complete
    assert decision.evidence["expected_instances"] is None


def test_acquisitions_of_a_step_and_shoot_head_say_nothing_of_how_many_are_to_come() -> None:
    rotations = [
        replace(one, acquisition_number=number // 2, images_in_acquisition=2)
        for number, one in enumerate(head_series(22))
    ]
    assert not decide(rotations, closed=None, last=0.0, outcomes=(), open_=1).complete


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
    if last >= 20.0:
        assert decision.complete
    if not decision.complete:
        assert 0 < decision.wait_seconds <= 20.0


def test_the_habit_is_the_longest_pause_and_the_least_cover_of_the_last_studies() -> None:
    assert habit_of([]) == Habit(0, 0.0)
    head = {"contiguous": True, "coverage_mm": 150.0}
    cut_off = {**head, "coverage_mm": 104.0}
    earlier = [{**head, "longest_pause_s": 0.0}, {**head, "longest_pause_s": 2.5, "coverage_mm": 141.5}, cut_off]
    assert habit_of(earlier) == Habit(3, 2.5, 141.5)
    assert habit_of([*earlier, cut_off]).least_cover_mm == 104.0  # that is how it is done now
    # What is no head shows nothing of how it sends one, nor does the evidence of an older version.
    assert habit_of([*earlier, {"contiguous": False, "longest_pause_s": 9.0}, {"by": "quiet"}]) == Habit(3, 2.5, 141.5)


def test_a_head_that_ends_where_this_senders_heads_never_do_is_waited_for() -> None:
    shorter = {"closed": 1.5, "last": 1.6, "outcomes": ("released",)}
    headers = head_series()  # of 145 mm
    assert decide(headers, **shorter, habit=Habit(20, 0.0, 155.0)).complete
    assert decide(headers, **shorter, habit=Habit(4, 0.0, 175.0)).complete
    early = decide(headers, **shorter, habit=Habit(20, 0.0, 175.0))
    assert not early.complete and early.wait_seconds > 10
    late = decide(headers, closed=20.1, last=20.2, outcomes=("released",), habit=Habit(20, 0.0, 175.0))
    assert late.evidence["confidence"] == "low"
    assert "it covers 145 mm, this sender's last heads 175 mm or more" in late.evidence["by"]
    told = decide(headers, **shorter, habit=Habit(20, 0.0, 175.0), said=done(headers))
    assert told.evidence["confidence"] == "high"


def test_what_the_scanner_said_is_done_is_complete_while_it_stays_connected() -> None:
    head = head_series()
    decision = decide(head, closed=None, last=0.0, outcomes=(), open_=1, said=done(head))
    assert decision.complete
    assert decision.evidence["confidence"] == "high"
    assert decision.evidence["by"] == "the scanner said that it is done, and all of it is here"
    assert decision.evidence["performed"] == {"completed": 1, "named": 30, "missing": 0}


def test_what_an_archive_announced_is_complete_and_named_as_that() -> None:
    head = head_series()
    decision = decide(head, closed=None, last=0.0, outcomes=(), open_=1, said=done(head, announced=2))
    assert decision.complete
    assert decision.evidence["by"] == "an archive announced the study, and all of it is here"
    assert decision.evidence["performed"] == {"announced": 2, "named": 30, "missing": 0}


def test_as_long_as_something_that_was_named_is_missing_only_quiet_helps() -> None:
    head, scout = head_series(), head_series(2, series="1.2.3.9")
    for here, named in ((head[:-1], head), ([*head, *scout[:1]], [*head, *scout])):
        missing = done(named)
        open_ = decide(here, closed=None, last=0.0, outcomes=(), open_=1, said=missing)
        assert not open_.complete
        assert open_.evidence["performed"] == {"completed": 1, "named": len(named), "missing": 1}
        released = decide(here, closed=5.0, last=5.1, outcomes=("released",), habit=STEADY, said=missing)
        assert not released.complete
        assert 14.0 < released.wait_seconds <= 15.0
        quiet = decide(here, closed=20.0, last=20.1, outcomes=("released",), habit=STEADY, said=missing)
        assert quiet.complete
        assert quiet.evidence["confidence"] == "low"


def test_a_series_of_which_nothing_came_is_not_waited_for() -> None:
    """It may be sent elsewhere; if it comes here after all, it reopens the study."""
    head = head_series()
    said = done([*head, *head_series(300, series="1.2.3.9", step=0.5)])
    decision = decide(head, closed=None, last=0.0, outcomes=(), open_=1, said=said)
    assert decision.complete
    assert decision.evidence["performed"] == {"completed": 1, "named": 330, "missing": 0}


def test_an_expected_count_that_is_reached_does_not_outweigh_what_is_missing() -> None:
    told = [replace(one, number_of_series_related_instances=30) for one in head_series()]
    more = done([*told, *head_series(40)[30:]])
    assert not decide(told, closed=None, last=0.0, outcomes=(), open_=1, said=more).complete


def test_a_step_of_the_scout_says_nothing_of_the_head() -> None:
    scout = [replace(one, image_type=("ORIGINAL", "PRIMARY", "LOCALIZER")) for one in head_series(1, series="1.2.3.9")]
    arriving = [*head_series(25), *scout]  # the head goes on
    assert not decide(arriving, closed=None, last=0.0, outcomes=(), open_=1, said=done(scout)).complete
    # Nor does it hold up what would be complete without it.
    assert decide(arriving, closed=1.5, last=1.6, outcomes=("released",), said=done(scout)).complete


def test_an_image_beyond_what_was_named_is_no_end() -> None:
    head = head_series()
    assert not decide(head, closed=None, last=0.0, outcomes=(), open_=1, said=done(head[:-1])).complete


def test_all_of_a_study_that_is_no_whole_head_is_not_complete_at_once() -> None:
    for head in (head_series(10), [*head_series(14), *head_series(30)[16:]]):
        assert not decide(head, closed=None, last=0.0, outcomes=(), open_=1, said=done(head)).complete


def test_a_step_that_was_discontinued_or_goes_on_is_no_evidence_and_is_recorded() -> None:
    said = Said({"discontinued": 1, "in_progress": 1}, {})
    head = head_series()
    assert not decide(head, closed=None, last=0.0, outcomes=(), open_=1, said=said).complete
    decision = decide(head, closed=1.5, last=1.6, outcomes=("released",), said=said)
    assert decision.complete
    assert decision.evidence["performed"] == {"discontinued": 1, "in_progress": 1, "named": 0, "missing": 0}
