"""The figures of a run: medians, ratios within a round, and the table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Round:
    """One measurement.

    Attributes:
        cpu_s_per_1000: CPU seconds of the receiver's processes for 1,000 images.
        p50_ms, p99_ms: response time of an image; None where the sender cannot tell.
    """

    images_per_s: float
    cpu_s_per_1000: float
    p50_ms: float | None
    p99_ms: float | None


@dataclass(frozen=True, slots=True)
class Series:
    """The measurements of one contestant with one sender and one number of associations, a round each."""

    contestant: str
    sender: str
    associations: int
    rounds: list[Round]

    def document(self) -> dict[str, Any]:
        """As JSON: the median of the rounds for each figure, and the rounds."""
        figures = {
            name: _rounded(_median([getattr(one, name) for one in self.rounds])) for name in Round.__dataclass_fields__
        }
        return {
            "contestant": self.contestant,
            "sender": self.sender,
            "associations": self.associations,
            **figures,
            "rounds": [{name: _rounded(value) for name, value in asdict(one).items()} for one in self.rounds],
        }


def document(
    images: int,
    rounds: int,
    machine: Mapping[str, Any],
    series: Sequence[Series],
    left_out: Sequence[Mapping[str, str]],
    *,
    ours: str,
) -> dict[str, Any]:
    """The one JSON object of a run."""
    return {
        "images": images,
        "rounds": rounds,
        "machine": dict(machine),
        "results": [one.document() for one in series],
        "ratios": ratios(series, ours, "dcmsend", "images_per_s"),
        "sender_ratios": {
            name: ratios(series, ours, name, "images_per_s") for name in dict.fromkeys(one.sender for one in series)
        },
        "cpu_ratios": ratios(series, ours, "dcmsend", "cpu_s_per_1000"),
        "left_out": [dict(one) for one in left_out],
    }


def ratios(series: Sequence[Series], ours: str, sender: str, figure: str) -> dict[str, float]:
    """``<contestant>_<associations>`` → ours over theirs in each round, and of those the median.

    Within a round both ran shortly after one another, so that what else the machine did weighs on both.
    """
    own = {one.associations: one for one in series if (one.contestant, one.sender) == (ours, sender)}
    found: dict[str, float] = {}
    for one in series:
        if one.contestant == ours or one.sender != sender or one.associations not in own:
            continue
        pairs = zip(own[one.associations].rounds, one.rounds, strict=True)
        each = [getattr(our, figure) / getattr(their, figure) for our, their in pairs if getattr(their, figure)]
        if each:
            found[f"{one.contestant}_{one.associations}"] = round(median(each), 3)
    return found


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def tables(told: Mapping[str, Any]) -> Group:
    """The document for people."""
    machine = told["machine"]
    title = (
        f"{told['images']} images of 0.53 MB, median of {told['rounds']} rounds; {machine['cores']} cores, "
        f"Python {machine['python']}, {machine['file_system']}"
    )
    table = Table(title=escape(title), title_justify="left", box=None)
    for name in ("receiver", "sender"):
        table.add_column(name, no_wrap=True)
    for name in ("assoc.", "images/s", "CPU s/1000", "p50 ms", "p99 ms", "ours/theirs"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in told["results"]:
        ratio = told["sender_ratios"][one["sender"]].get(f"{one['contestant']}_{one['associations']}")
        table.add_row(
            escape(one["contestant"]),
            one["sender"],
            str(one["associations"]),
            f"{one['images_per_s']:.0f}",
            f"{one['cpu_s_per_1000']:.2f}",
            *("" if one[name] is None else f"{one[name]:.1f}" for name in ("p50_ms", "p99_ms")),
            "" if ratio is None else f"{ratio:.2f}",
        )
    absent = [f"[yellow]left out:[/] {escape(one['name'])}: {escape(one['reason'])}" for one in told["left_out"]]
    return Group(table, *absent)
