"""When a study has arrived, and on what evidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from appliance.ledger.database import seconds_between
from appliance.ledger.store import Arriving
from appliance.study.selection import Selection

HEAD_MM = 100.0
"""Least cover along the normal that counts as a head; adult brains measure about 130 mm from base to vertex."""


@dataclass(frozen=True, slots=True)
class Completeness:
    """Whether a study is complete, and the evidence.

    Attributes:
        wait_seconds: when not complete, look again after this long even if nothing arrives.
        evidence: JSON-ready; ``by`` names what decided, ``confidence`` is high or low.
    """

    complete: bool
    wait_seconds: float
    evidence: dict[str, Any]


def weigh(
    arriving: Arriving, selection: Selection, at: str, *, settle_seconds: float, quiet_seconds: float
) -> Completeness:
    """Weigh the evidence on one study that is receiving or reopened.

    The scanner's word comes first: every association that brought an instance was released, a moment has
    passed in which no other brought one, and the series to analyse is contiguous and covers a head. Else the
    last resort: nothing came for ``quiet_seconds``.

    Args:
        at: the time now, as the ledger writes it.
    """
    silent = _elapsed(arriving.last_instance_at, at)
    volume = selection.volume
    evidence: dict[str, Any] = {
        "associations": [*arriving.outcomes, *["open"] * arriving.open_associations],
        "contiguous": volume is not None and not volume.gaps,
        "coverage_mm": round(volume.offsets[-1] - volume.offsets[0], 1) if volume else 0.0,
        "slices": len(volume.planes) if volume else 0,
    }
    released = not arriving.open_associations and arriving.outcomes == ("released",)
    if released and arriving.last_closed_at and evidence["contiguous"] and evidence["coverage_mm"] >= HEAD_MM:
        settled = _elapsed(arriving.last_closed_at, at)
        if settled >= settle_seconds:
            evidence |= {"by": "association released, geometry contiguous", "confidence": "high"}
            return Completeness(True, 0.0, evidence)
        return Completeness(False, settle_seconds - settled, evidence)
    if silent >= quiet_seconds:
        evidence |= {"by": f"nothing came for {quiet_seconds:g} s", "confidence": "low"}
        return Completeness(True, 0.0, evidence)
    return Completeness(False, quiet_seconds - silent, evidence)


def _elapsed(earlier: str, at: str) -> float:
    """Seconds since then; for ever if it lies ahead: a clock that was set back must not hold up a study."""
    seconds = seconds_between(earlier, at)
    return seconds if seconds >= 0 else float("inf")
