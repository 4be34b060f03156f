"""When a study has arrived, and on what evidence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from appliance.ledger.database import seconds_between
from appliance.ledger.store import Arriving
from appliance.study.grouping import Series
from appliance.study.selection import Selection

HEAD_MM = 100.0
"""Least cover along the normal that counts as a head; adult brains measure about 130 mm from base to vertex."""

HABIT_STUDIES = 5
"""So many studies of a sender must have come before its habit counts."""

HABIT_MEMORY = 20
"""So many of a sender's last studies make its habit."""

HABIT_MARGIN = 1.5
"""A sender that pauses between associations is waited for so much longer than its longest pause."""


@dataclass(frozen=True, slots=True)
class Habit:
    """What a sender usually does.

    Attributes:
        studies: how many of its last ones are known.
        longest_pause: the most seconds that it let pass between two associations of one study; 0: it never did.
    """

    studies: int
    longest_pause: float


@dataclass(frozen=True, slots=True)
class Completeness:
    """Whether a study is complete, and the evidence.

    Attributes:
        wait_seconds: when not complete, look again after this long even if nothing arrives.
        evidence: JSON-ready; ``by`` names what decided, ``confidence`` is high, medium or low.
    """

    complete: bool
    wait_seconds: float
    evidence: dict[str, Any]


def habit_of(evidence: Sequence[dict[str, Any]]) -> Habit:
    """The habit that the evidence of a sender's last studies shows."""
    return Habit(len(evidence), max((float(one.get("longest_pause_s", 0.0)) for one in evidence), default=0.0))


def weigh(
    arriving: Arriving,
    selection: Selection,
    series: Sequence[Series],
    habit: Habit,
    at: str,
    *,
    settle_seconds: float,
    quiet_seconds: float,
) -> Completeness:
    """Weigh the evidence on one study that is receiving or reopened.

    Everything below asks for a series to analyse that is contiguous and covers a head, and waits for the end of every
    association that brought an instance. In this order:

    1. The sender gave the number of instances of every series, and they are there: complete, even if it keeps its
       association open.
    2. Every association was released, and the instance numbers have no holes: complete after the longest pause that
       this sender is known to make, at once if it makes none; where its habit is not known, after
       ``settle_seconds``.
    3. Every association was released, with holes in the numbers: after ``settle_seconds``.
    4. The last resort, whatever there is: nothing came for ``quiet_seconds``.

    A number of instances that was given and not reached leaves only the last resort.

    Args:
        series: everything that arrived.
        habit: of the sender.
        at: the time now, as the ledger writes it.
    """
    silent = _elapsed(arriving.last_instance_at, at)
    volume = selection.volume
    contiguous = volume is not None and not volume.gaps
    cover = volume.offsets[-1] - volume.offsets[0] if volume else 0.0
    counts = _counts(series)
    numbered = selection.series is not None and _numbered(selection.series)
    evidence: dict[str, Any] = {
        "associations": [*arriving.outcomes, *["open"] * arriving.open_associations],
        "calling_ae": arriving.calling_ae,
        "longest_pause_s": round(arriving.longest_pause, 3),
        "habit": {"studies": habit.studies, "longest_pause_s": round(habit.longest_pause, 3)},
        "contiguous": contiguous,
        "coverage_mm": round(cover, 1),
        "slices": len(volume.planes) if volume else 0,
        "instance_numbers": "without holes" if numbered else "with holes or absent",
        "expected_instances": counts,
    }
    whole = contiguous and cover >= HEAD_MM
    short = counts is not None and counts["arrived"] < counts["expected"]

    def complete(by: str, confidence: str) -> Completeness:
        return Completeness(True, 0.0, {**evidence, "by": by, "confidence": confidence})

    if whole and counts is not None and not short and counts["series"] == len(series):
        return complete("as many instances as the sender said", "high")
    released = not arriving.open_associations and arriving.outcomes == ("released",)
    if released and arriving.last_closed_at and whole and not short:
        known = habit.studies >= HABIT_STUDIES
        wait = min(HABIT_MARGIN * habit.longest_pause, quiet_seconds) if numbered and known else settle_seconds
        settled = _elapsed(arriving.last_closed_at, at)
        if settled >= wait:
            if not numbered:
                return complete("association released, geometry contiguous, instance numbers with holes", "medium")
            said = "association released, geometry and instance numbers contiguous"
            return complete(f"{said}, as this sender always does" if known else said, "high")
        return Completeness(False, wait - settled, evidence)
    if silent >= quiet_seconds:
        return complete(f"nothing came for {quiet_seconds:g} s", "low")
    return Completeness(False, quiet_seconds - silent, evidence)


def _counts(series: Sequence[Series]) -> dict[str, int] | None:
    """What senders said of how many instances there are (Number of Series Related Instances), and what came.

    Images in Acquisition counts over all reconstructions of one acquisition, of which not all need be sent: it stands
    in where every image of the study has it, and only once that many are there.
    """
    told = [one for one in series if one.first.number_of_series_related_instances]
    if told:
        return {
            "series": len(told),
            "expected": sum(one.first.number_of_series_related_instances or 0 for one in told),
            "arrived": sum(min(len(one.headers), one.first.number_of_series_related_instances or 0) for one in told),
        }
    headers = [header for one in series for header in one.headers]
    if not headers or any(not h.images_in_acquisition or h.acquisition_number is None for h in headers):
        return None
    arrived = Counter(header.acquisition_number for header in headers)
    expected = {header.acquisition_number: header.images_in_acquisition or 0 for header in headers}
    if any(arrived[number] < count for number, count in expected.items()):
        return None
    return {"series": len(series), "expected": sum(expected.values()), "arrived": len(headers)}


def _numbered(series: Series) -> bool:
    """Whether the instance numbers of a series follow one another without a hole; a repeated one is no hole."""
    numbers = {header.instance_number for header in series.headers}
    known = {number for number in numbers if number is not None}
    return len(known) == len(numbers) and max(known) - min(known) + 1 == len(known)


def _elapsed(earlier: str, at: str) -> float:
    """Seconds since then; for ever if it lies ahead: a clock that was set back must not hold up a study."""
    seconds = seconds_between(earlier, at)
    return seconds if seconds >= 0 else float("inf")
