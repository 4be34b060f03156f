"""Pictures of a model's figures: curves and points on two axes, and estimates with their intervals, as SVG.

They read in light and dark, as those of the benchmarks do.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")
"""Okabe and Ito's, which the colour-blind tell apart."""
_STYLE = """
text { font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 15px }
.small { font-size: 12px; fill: #59636e }
.ground { fill: #ffffff }
.grid { stroke: #d1d9e0 }
.mark { stroke: #59636e; stroke-dasharray: 5 4 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc }
  .small { fill: #9198a1 }
  .ground { fill: #0d1117 }
  .grid { stroke: #3d444d }
  .mark { stroke: #9198a1 }
}
"""
_WIDTH, _HEIGHT, _LEFT, _TOP, _FOOT = 620, 460, 70, 66, 50
_ROW, _LABELS, _NOTES = 22, 220, 190


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: its name and its ticks, the first and the last of which are its ends; logarithmic if it says so."""

    name: str
    ticks: Sequence[float]
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """Where a value lies, 0 to 1; what is beyond an end lies there."""
        first, last = self.ticks[0], self.ticks[-1]
        value = min(max(value, first), last)
        if self.logarithmic:
            return math.log(value / first) / math.log(last / first)
        return (value - first) / (last - first)


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one colour. ``joined``: a curve through them. ``spans``: (low, high) of y at each."""

    name: str
    points: Sequence[tuple[float, float]]
    joined: bool = False
    spans: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True, slots=True)
class Plot:
    """Series on two axes, and dashed lines from point to point with a word at their end."""

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    marks: Sequence[tuple[tuple[float, float], tuple[float, float], str]] = field(default=())


def plot(one: Plot) -> str:
    """The SVG file (SVG 1.1). A point has the class ``point``, a curve ``curve``, a dashed line ``mark``."""
    svg = _open(one.title, _WIDTH, _HEIGHT)
    width, height = _WIDTH - _LEFT - 30, _HEIGHT - _TOP - _FOOT

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT + width * one.x.share(x), _TOP + height * (1 - one.y.share(y))

    for tick in one.x.ticks:
        x, y = place(tick, one.y.ticks[0])
        _line(svg, "grid", x, _TOP, x, y)
        _text(svg, x, y + 17, f"{tick:g}", "small", "middle")
    for tick in one.y.ticks:
        x, y = place(one.x.ticks[0], tick)
        _line(svg, "grid", x, y, x + width, y)
        _text(svg, x - 8, y + 4, f"{tick:g}", "small", "end")
    _text(svg, _LEFT + width / 2, _HEIGHT - 12, one.x.name, "small", "middle")
    _text(svg, 16, 44, one.y.name, "small")
    for begin, end, word in one.marks:
        (x1, y1), (x2, y2) = place(*begin), place(*end)
        _line(svg, "mark", x1, y1, x2, y2)
        _text(svg, x2 - 4, y2 - 5, word, "small", "end")
    right = _WIDTH - 30.0
    for colour, series in reversed(list(zip(COLOURS, one.series, strict=False))):
        _text(svg, right, 44, series.name, "small", "end")
        right -= 6.6 * len(series.name) + 12
        _dot(svg, "key", right, 40, colour)
        right -= 18
    for colour, series in zip(COLOURS, one.series, strict=False):
        placed = [place(*point) for point in series.points]
        for (x, _), (low, high) in zip(placed, series.spans, strict=False):
            left = one.x.ticks[0]
            _line(svg, "span", x, place(left, low)[1], x, place(left, high)[1], colour)
        if series.joined:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
            style = {"fill": "none", "stroke": colour, "stroke-width": "2"}
            ET.SubElement(svg, "polyline", {"class": "curve", "points": path, **style})
        else:
            for x, y in placed:
                _dot(svg, "point", x, y, colour)
    return _close(svg)


def intervals(title: str, groups: Mapping[str, Mapping[str, Mapping[str, Any]]], goal: float | None = None) -> str:
    """Estimates of 0 to 1 as dots with whiskers, group below group, as an SVG file.

    Args:
        groups: {group: {row: {value, low, high, n}}}; a row without a value is left out.
        goal: a dashed line there.
    """
    rows = sum(1 + len(group) for group in groups.values())
    height = 56 + rows * _ROW + 26
    svg = _open(title, 760, height)
    width = 760 - _LABELS - _NOTES
    _text(svg, 744, 44, "value, 95 % interval, studies", "small", "end")
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = _LABELS + tick * width
        _line(svg, "grid", x, 52, x, height - 26)
        _text(svg, x, height - 10, f"{tick:g}", "small", "middle")
    if goal is not None:
        _line(svg, "mark", _LABELS + goal * width, 52, _LABELS + goal * width, height - 26)
    y = 56 + _ROW / 2
    for name, group in groups.items():
        _text(svg, 16, y + 4, name, "small")
        y += _ROW
        for label, one in group.items():
            _text(svg, _LABELS - 12, y + 4, label, "label", "end")
            if one["value"] is not None:
                _line(svg, "span", _LABELS + one["low"] * width, y, _LABELS + one["high"] * width, y, COLOURS[0])
                _dot(svg, "point", _LABELS + one["value"] * width, y, COLOURS[0])
                said = f"{one['value']:.2f} ({one['low']:.2f} to {one['high']:.2f}), {one['n']}"
                _text(svg, 744, y + 4, said, "small", "end")
            y += _ROW
    return _close(svg)


def _open(title: str, width: int, height: int) -> ET.Element:
    size = {"viewBox": f"0 0 {width} {height}", "width": str(width), "height": str(height)}
    svg = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "role": "img", **size})
    ET.SubElement(svg, "title").text = title
    ET.SubElement(svg, "style").text = _STYLE
    ET.SubElement(svg, "rect", {"class": "ground", "width": str(width), "height": str(height), "rx": "6"})
    _text(svg, 16, 24, title, "title")
    return svg


def _close(svg: ET.Element) -> str:
    ET.indent(svg, space="")
    return ET.tostring(svg, encoding="unicode") + "\n"


def _text(svg: ET.Element, x: float, y: float, words: str, kind: str, anchor: str = "start") -> None:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}
    ET.SubElement(svg, "text", {"class": kind, **place}).text = words


def _line(svg: ET.Element, kind: str, x1: float, y1: float, x2: float, y2: float, colour: str = "") -> None:
    ends = {"x1": f"{x1:.1f}", "y1": f"{y1:.1f}", "x2": f"{x2:.1f}", "y2": f"{y2:.1f}"}
    style = {"stroke": colour, "stroke-width": "1.5"} if colour else {}
    ET.SubElement(svg, "line", {"class": kind, **ends, **style})


def _dot(svg: ET.Element, kind: str, x: float, y: float, colour: str) -> None:
    ET.SubElement(svg, "circle", {"class": kind, "fill": colour, "cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "3.5"})
