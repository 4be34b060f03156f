"""Pictures of the measurements: horizontal bars and dots on an axis, as SVG that reads in light and dark."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, LEFT, RIGHT, ROW = 860, 190, 200, 24
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")
"""Okabe and Ito's, which the colour-blind tell apart."""
DOTS = ("#ffffff", "#8c959f", "#1f2328")
_STYLE = """
text { font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 15px }
.small { font-size: 12px; fill: #59636e }
.ground { fill: #ffffff }
.grid { stroke: #d1d9e0 }
.dot, .whisker { stroke: #1f2328; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc }
  .small { fill: #9198a1 }
  .ground { fill: #0d1117 }
  .grid { stroke: #3d444d }
  .dot, .whisker { stroke: #f0f6fc }
}
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a panel: bars one after another, dots over them, all from zero, and a note at the end."""

    label: str
    bars: Sequence[float]
    dots: Sequence[float]
    note: str


@dataclass(frozen=True, slots=True)
class Panel:
    """Rows on one axis.

    Attributes:
        bars, dots: names of the bars and of the dots, at most as many as `COLOURS` and `DOTS`; empty: no legend.
        notes: heading of the notes.
    """

    title: str
    unit: str
    bars: Sequence[str]
    dots: Sequence[str]
    notes: str
    rows: Sequence[Row]


def draw(panels: Sequence[Panel]) -> str:
    """The SVG file (SVG 1.1) of panels one below another. A bar has the class ``bar``, a dot ``dot``."""
    svg = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "role": "img"})
    ET.SubElement(svg, "title").text = "; ".join(panel.title for panel in panels)
    ET.SubElement(svg, "style").text = _STYLE
    ground = ET.SubElement(svg, "rect", {"class": "ground", "width": str(WIDTH), "rx": "6"})
    height = 16.0
    for panel in panels:
        height = _panel(svg, panel, height)
    ground.set("height", f"{height:g}")
    svg.set("viewBox", f"0 0 {WIDTH} {height:g}")
    svg.set("width", str(WIDTH))
    svg.set("height", f"{height:g}")
    ET.indent(svg)
    return ET.tostring(svg, encoding="unicode") + "\n"


def _panel(svg: ET.Element, panel: Panel, top: float) -> float:
    """Draw a panel below ``top``; where it ends."""
    _text(svg, 16, top + 14, panel.title, "title")
    _text(svg, WIDTH - 16, top + 42, panel.notes, "small", "end")
    _legend(svg, panel, top + 38)
    first = top + 54
    last = first + ROW * len(panel.rows)
    most = max((max(sum(row.bars), *row.dots, 0.0) for row in panel.rows), default=0.0) or 1.0
    ticks = _ticks(most)
    scale = (WIDTH - LEFT - RIGHT) / max(most, ticks[-1])
    for tick in ticks:
        x = LEFT + tick * scale
        _line(svg, "grid", x, first, x, last)
        _text(svg, x, last + 16, f"{tick:,g} {panel.unit if tick == ticks[-1] else ''}".strip(), "small", "middle")
    for place, row in enumerate(panel.rows):
        middle = first + ROW * (place + 0.5)
        _text(svg, LEFT - 12, middle + 4, row.label, "label", "end")
        _text(svg, WIDTH - 16, middle + 4, row.note, "note", "end")
        x = float(LEFT)
        for colour, value in zip(COLOURS, row.bars, strict=False):
            box = {"x": f"{x:.1f}", "y": f"{middle - 8:.1f}", "width": f"{value * scale:.1f}", "height": "16"}
            ET.SubElement(svg, "rect", {"class": "bar", "fill": colour, **box})
            x += value * scale
        if row.dots:
            _line(svg, "whisker", LEFT + min(row.dots) * scale, middle, LEFT + max(row.dots) * scale, middle)
        # The first comes last, so that it lies above the others where they meet.
        for colour, value in reversed(list(zip(DOTS, row.dots, strict=False))):
            _dot(svg, "dot", LEFT + value * scale, middle, colour)
    return last + 40


def _legend(svg: ET.Element, panel: Panel, middle: float) -> None:
    x = 16.0
    for colour, name in zip(COLOURS, panel.bars, strict=False):
        box = {"x": f"{x:.1f}", "y": f"{middle - 5:.1f}", "width": "10", "height": "10"}
        ET.SubElement(svg, "rect", {"class": "key", "fill": colour, **box})
        _text(svg, x + 15, middle + 4, name, "small")
        x += 32 + 6.6 * len(name)
    for colour, name in zip(DOTS, panel.dots, strict=False):
        _dot(svg, "dot key", x + 5, middle, colour)
        _text(svg, x + 15, middle + 4, name, "small")
        x += 32 + 6.6 * len(name)


def _text(svg: ET.Element, x: float, y: float, words: str, kind: str, anchor: str = "start") -> None:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}
    ET.SubElement(svg, "text", {"class": kind, **place}).text = words


def _line(svg: ET.Element, kind: str, x1: float, y1: float, x2: float, y2: float) -> None:
    ends = {"x1": f"{x1:.1f}", "y1": f"{y1:.1f}", "x2": f"{x2:.1f}", "y2": f"{y2:.1f}"}
    ET.SubElement(svg, "line", {"class": kind, **ends})


def _dot(svg: ET.Element, kind: str, x: float, y: float, colour: str) -> None:
    ET.SubElement(svg, "circle", {"class": kind, "fill": colour, "cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "4"})


def _ticks(most: float) -> list[float]:
    """From zero to at least ``most``, four to eight steps of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(most))
    step = next(one for one in (power * share for share in (0.1, 0.2, 0.5, 1, 2)) if most <= 8 * one)
    return [round(step * number, 12) for number in range(math.ceil(round(most / step, 9)) + 1)]


def latency(told: dict[str, Any]) -> str:
    """The picture of `scanside bench latency`'s document."""
    rows = []
    for name, one in told["scenarios"].items():
        reached = [stage["p50"] for stage in one["stages_s"].values()]
        bars = [after - before for before, after in zip([0.0, *reached], reached, strict=False)]
        dots = [one["last_instance_to_ack_s"][share] for share in ("p50", "p95", "p99")]
        rows.append(Row(name.replace("_", " "), bars, dots, " / ".join(f"{value:.3f}" for value in dots)))
    stages = ("complete", "inferred", "alert sent", "acknowledged")
    title = "From the last image to the acknowledged alert, stages at their median"
    return draw([Panel(title, "s", stages, ("p50", "p95", "p99"), "p50 / p95 / p99, s", rows)])


def throughput(told: dict[str, Any]) -> str:
    """The picture of `scanside bench throughput`'s document."""
    pace, wait, cost, peak = [], [], [], []
    services: tuple[str, ...] = ()
    for count, one in told["scanners"].items():
        label = f"{count} scanner" if count == "1" else f"{count} scanners"
        hourly, ack = one["studies_per_h"], one["last_instance_to_ack_s"]
        pace.append(Row(label, [hourly], [], f"{hourly:,.0f}"))
        wait.append(Row(label, [ack["p50"]], [ack["p50"], ack["p95"]], f"{ack['p50']:.2f} / {ack['p95']:.2f}"))
        services = tuple(one["cpu_s_per_study"])
        used = list(one["cpu_s_per_study"].values())
        cost.append(Row(label, used, [], f"{sum(used):.2f}"))
        held = list(one["peak_mb"].values())
        quarter = sum(one["peak_mb_after_a_quarter"].values())
        peak.append(Row(label, held, [quarter], f"{quarter:,.0f} / {sum(held):,.0f}"))
    kind = f"of {told['slices']} slices"
    after = ("all after a quarter of the studies",)
    return draw(
        [
            Panel(f"Throughput, studies {kind}", "/h", (), (), "studies/h", pace),
            Panel("From the last image to the acknowledged alert", "s", (), ("p50", "p95"), "p50 / p95, s", wait),
            Panel(f"Processor time for a study {kind}", "s", services, (), "all, s", cost),
            Panel("Peak resident memory", "MB", services, after, "after a quarter / at the end, MB", peak),
        ]
    )


def preprocess(runs: Sequence[dict[str, Any]]) -> str:
    """The picture of documents of `scanside bench preprocess`, a panel each."""
    panels = []
    for told in runs:
        rows = []
        for name, speed in told["slices_per_s"].items():
            ratio = told["ratios"].get(name)  # a peer has none
            note = f"{speed:,.0f}" if ratio is None else f"{speed:,.0f} / {ratio:.2f}"
            rows.append(Row(name.replace("_", " "), [speed], [], note))
        title = f"Preprocessing, slabs of 512 × 512 at {told['spacing_mm']:g} mm, {told['device']}"
        panels.append(Panel(title, "slices/s", (), (), "slices/s / of the fastest peer", rows))
    return draw(panels)


def decode(told: dict[str, Any]) -> str:
    """The picture of `scanside bench decode`'s document: a panel for each kind of pixel data."""
    panels = []
    for kind in dict.fromkeys(one["kind"] for one in told["results"]):
        rows = []
        for one in (one for one in told["results"] if one["kind"] == kind):
            ratio = told["ratios"].get(f"{kind}_{one['decoder']}")  # ours has none
            notes = [f"{one['slices_per_s']:,.1f}", *([] if ratio is None else [f"{ratio:.2f}"])]
            notes += [] if one["bit_exact"] else ["wrong values"]
            rows.append(Row(one["decoder"], [one["slices_per_s"]], [], " / ".join(notes)))
        panels.append(Panel(f"Decoding {kind}", "slices/s", (), (), "slices/s / ours over theirs", rows))
    return draw(panels)
