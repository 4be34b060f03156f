"""A study is complete on evidence; the clock is the last resort."""

from __future__ import annotations

from appliance.ledger.database import later, now
from appliance.ledger.store import Arriving
from appliance.study.completeness import Completeness, weigh
from appliance.study.grouping import group
from appliance.study.selection import select
from dicom_io.header import Header
from tests.builders import head_series


def decide(
    headers: list[Header], *, closed: float | None, last: float, outcomes: tuple[str, ...], open_: int = 0
) -> Completeness:
    arriving = Arriving(1, later(-last), open_, None if closed is None else later(-closed), outcomes)
    return weigh(arriving, select(group(headers)), now(), settle_seconds=1.0, quiet_seconds=20.0)


def test_a_released_association_and_a_contiguous_head_are_enough() -> None:
    decision = decide(head_series(), closed=1.5, last=1.6, outcomes=("released",))
    assert decision.complete
    assert decision.evidence["confidence"] == "high"
    assert decision.evidence["slices"] == 30


def test_a_moment_is_left_for_a_further_association() -> None:
    decision = decide(head_series(), closed=0.2, last=0.3, outcomes=("released",))
    assert not decision.complete
    assert 0 < decision.wait_seconds <= 0.8


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
        early = decide(headers, closed=5.0, last=5.0, outcomes=outcomes, open_=open_)
        assert not early.complete
        assert 14.0 < early.wait_seconds <= 15.0
        late = decide(headers, closed=21.0, last=21.0, outcomes=outcomes, open_=open_)
        assert late.complete
        assert late.evidence["confidence"] == "low"


def test_a_clock_that_was_set_back_holds_up_nobody() -> None:
    assert decide(head_series(), closed=-3600.0, last=-3600.0, outcomes=("released",)).complete
    assert decide(head_series(), closed=-3600.0, last=-3600.0, outcomes=("lost",)).complete
