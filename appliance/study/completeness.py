"""When a study has arrived, and on what evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from appliance.ledger.database import seconds_between
from appliance.ledger.performed import Said
from appliance.ledger.store import Arriving
from appliance.study.grouping import Series
from appliance.study.selection import Selection

HEAD_MM = 100.0
"""Least cover along the normal that counts as a head; adult brains measure about 130 mm from base to vertex."""

HABIT_STUDIES = 5
"""So many studies of a sender must have come before its habit counts."""

HABIT_MEMORY = 20
"""So many of a sender's last studies make its habit."""

HABIT_COVER = 0.9
"""A head that covers less than this part of the least that its sender's last ones did may lack an end."""

HABIT_MARGIN = 1.5
"""A sender that pauses between the associations of a series is waited for so much longer than its longest pause."""


@dataclass(frozen=True, slots=True)
class Habit:
    """What a sender usually does.

    Attributes:
        studies: how many of its last ones are known.
        longest_pause: the most seconds that it let pass between two associations of one series; 0: it never did.
        least_cover_mm: the least that all of them but one covered along their normal: one may have been cut off itself.
    """

    studies: int
    longest_pause: float
    least_cover_mm: float = 0.0


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
    """The habit that the evidence of a sender's last studies shows; those that had no head show nothing of it."""
    heads = [one for one in evidence if one.get("contiguous") and float(one.get("coverage_mm", 0.0)) >= HEAD_MM]
    covers = sorted(float(one["coverage_mm"]) for one in heads)
    return Habit(
        len(heads),
        max((float(one.get("longest_pause_s", 0.0)) for one in heads), default=0.0),
        covers[1] if len(covers) > 1 else 0.0,
    )


def weigh(
    arriving: Arriving,
    selection: Selection,
    series: Sequence[Series],
    habit: Habit,
    said: Said,
    at: str,
    *,
    settle_seconds: float,
    quiet_seconds: float,
) -> Completeness:
    """Weigh the evidence on one study that is receiving or reopened.

    Everything below asks for a series to analyse that is contiguous and covers a head, and waits for the end of every
    association that brought an instance. In this order:

    1. A performed step was completed, or an archive announced what it has, and of the series of which something came
       every instance that was named is there, all of the series to analyse among them: complete, even if an
       association is open.
    2. The sender gave the number of instances of every series, and they are there: complete, even if it keeps its
       association open.
    3. Every association was released, and the instance numbers have no holes: complete after the longest pause that
       this sender is known to make between the associations of one series, and half as much again, at once if it
       makes none; where its habit is not known, after ``settle_seconds``. A pause that this series had already counts
       in any case; one beyond ``quiet_seconds`` never does, as no wait could bridge it.
    4. Every association was released, with holes in the numbers: after ``settle_seconds``.
    5. The last resort, whatever there is: nothing came for ``quiet_seconds``.

    A number of instances that was given and not reached, or one of these series that was named and is not there, leaves
    only the last resort; so does, where nobody gave a number, a head that covers clearly less than any of this
    sender's last ones. A step that was discontinued, or is in progress, is no evidence.

    Args:
        series: everything that arrived.
        habit: of the sender.
        said: what performed steps and availability notifications say of the study.
        at: the time now, as the ledger writes it.
    """
    silent = _elapsed(arriving.last_instance_at, at)
    paused = max((one for one in _pauses(arriving, selection) if one <= quiet_seconds), default=0.0)
    volume = selection.volume
    contiguous = volume is not None and not volume.gaps
    cover = volume.offsets[-1] - volume.offsets[0] if volume else 0.0
    counts = _counts(series)
    numbered = selection.series is not None and _numbered(selection.series)
    here = {one.series_instance_uid: {header.sop_instance_uid for header in one.headers} for one in series}
    # Of a series of which nothing came nobody knows whether it is sent here at all.
    missing = sum(len(said.expected.get(uid, frozenset()) - arrived) for uid, arrived in here.items())
    evidence: dict[str, Any] = {
        "associations": [*arriving.outcomes, *["open"] * arriving.open_associations],
        "calling_ae": arriving.calling_ae,
        "longest_pause_s": round(paused, 3),
        "habit": {
            "studies": habit.studies,
            "longest_pause_s": round(habit.longest_pause, 3),
            "least_coverage_mm": round(habit.least_cover_mm, 1),
        },
        "contiguous": contiguous,
        "coverage_mm": round(cover, 1),
        "slices": len(volume.planes) if volume else 0,
        "instance_numbers": "without holes" if numbered else "with holes or absent",
        "expected_instances": counts,
        "performed": {**said.steps, "named": sum(map(len, said.expected.values())), "missing": missing},
    }
    whole = contiguous and cover >= HEAD_MM
    known = habit.studies >= HABIT_STUDIES
    cut = known and cover < HABIT_COVER * habit.least_cover_mm
    short = missing > 0 or (counts is not None and counts["arrived"] < counts["expected"])

    def complete(by: str, confidence: str) -> Completeness:
        return Completeness(True, 0.0, {**evidence, "by": by, "confidence": confidence})

    if whole and not missing and _names_all(said, selection.series):
        who = "the scanner said that it is done" if "completed" in said.steps else "an archive announced the study"
        return complete(f"{who}, and all of it is here", "high")
    if whole and counts is not None and not short and counts["series"] == len(series):
        return complete("as many instances as the sender said", "high")
    released = not arriving.open_associations and arriving.outcomes == ("released",)
    if released and arriving.last_closed_at and whole and not short and not cut:
        trusted = numbered and known
        wait = HABIT_MARGIN * max(paused, habit.longest_pause if trusted else 0.0)
        wait = min(wait if trusted else max(wait, settle_seconds), quiet_seconds)
        settled = _elapsed(arriving.last_closed_at, at)
        if settled >= wait or silent >= quiet_seconds:
            if not numbered:
                return complete("association released, geometry contiguous, instance numbers with holes", "medium")
            words = "association released, geometry and instance numbers contiguous"
            return complete(f"{words}, as this sender always does" if known else words, "high")
        return Completeness(False, min(wait - settled, quiet_seconds - silent), evidence)
    if silent >= quiet_seconds:
        less = (
            f"; it covers {cover:.0f} mm, this sender's last heads {habit.least_cover_mm:.0f} mm or more" if cut else ""
        )
        return complete(f"nothing came for {quiet_seconds:g} s{less if cut else ''}", "low")
    return Completeness(False, quiet_seconds - silent, evidence)


def _names_all(said: Said, series: Series | None) -> bool:
    """Whether what was named is all of this series that is here: a step of the scout says nothing of the head."""
    if series is None:
        return False
    return {header.sop_instance_uid for header in series.headers} <= said.expected.get(
        series.series_instance_uid, frozenset()
    )


def _pauses(arriving: Arriving, selection: Selection) -> list[float]:
    """Each time, in seconds, in which no association was there that had brought some of the series to analyse."""
    if selection.series is None:
        return []
    pauses, ended = [], ""
    for series, first, closed in arriving.visits:
        if series != selection.series.series_instance_uid:
            continue
        if ended and first > ended:
            pauses.append(seconds_between(ended, first))
        if closed is None:
            break
        ended = max(ended, closed)
    return pauses


def _counts(series: Sequence[Series]) -> dict[str, int] | None:
    """What senders said of how many instances there are (Number of Series Related Instances), and what came.

    A number that differs within its series is a count so far, and is not believed. Images in Acquisition counts over
    all reconstructions of one acquisition, of which not all need be sent, and a step-and-shoot head has an acquisition
    for each rotation: it stands in where every image of the study is of one acquisition, and only once that many are
    there.
    """
    said = [({header.number_of_series_related_instances for header in one.headers}, one) for one in series]
    told = [(count, one) for counts, one in said if len(counts) == 1 and (count := next(iter(counts)))]
    if told:
        return {
            "series": len(told),
            "expected": sum(count for count, _ in told),
            "arrived": sum(min(len(one.headers), count) for count, one in told),
        }
    headers = [header for one in series for header in one.headers]
    acquisitions = {(header.acquisition_number, header.images_in_acquisition) for header in headers}
    if len(acquisitions) != 1:
        return None
    ((number, count),) = acquisitions
    if number is None or not count or len(headers) < count:
        return None
    return {"series": len(series), "expected": count, "arrived": len(headers)}


def _numbered(series: Series) -> bool:
    """Whether the instance numbers of a series follow one another without a hole; a repeated one is no hole."""
    numbers = {header.instance_number for header in series.headers}
    known = {number for number in numbers if number is not None}
    return len(known) == len(numbers) and max(known) - min(known) + 1 == len(known)


def _elapsed(earlier: str, at: str) -> float:
    """Seconds since then; for ever if it lies ahead: a clock that was set back must not hold up a study."""
    seconds = seconds_between(earlier, at)
    return seconds if seconds >= 0 else float("inf")
