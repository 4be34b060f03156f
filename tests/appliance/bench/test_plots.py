"""The pictures: well-formed SVG, a mark for each value, and every mark where its value belongs."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from appliance.bench import latency, throughput
from appliance.bench.latency import STAGES, Measured
from appliance.bench.plots import LEFT, RIGHT, WIDTH, Panel, Row, draw
from appliance.bench.plots import decode as decode_picture
from appliance.bench.plots import latency as latency_picture
from appliance.bench.plots import preprocess as preprocess_picture
from appliance.bench.plots import throughput as throughput_picture
from appliance.bench.throughput import SERVICES, Run
from appliance.cli import app

SVG = "{http://www.w3.org/2000/svg}"


def marks(picture: str, kind: str) -> list[ET.Element]:
    return [one for one in ET.fromstring(picture).iter() if one.get("class") == kind]


def words(picture: str, kind: str) -> list[str]:
    return [one.text or "" for one in marks(picture, kind)]


def number(label: str) -> float:
    return float(label.split()[0].replace(",", ""))


values = st.floats(0, 1e7).map(lambda value: round(value, 3))
rows = st.lists(
    st.builds(
        Row, st.text("abc <&>", max_size=20), st.lists(values, max_size=4), st.lists(values, max_size=3), st.just("")
    ),
    max_size=9,
)


@given(rows)
def test_every_value_has_its_mark_within_the_axis(drawn: list[Row]) -> None:
    picture = draw([Panel("<title> & more", "s", ("one",), ("two",), "", drawn)])
    bars, dots = marks(picture, "bar"), marks(picture, "dot")
    assert [len(bars), len(dots)] == [sum(len(row.bars) for row in drawn), sum(len(row.dots) for row in drawn)]
    assert words(picture, "label") == [row.label or "" for row in drawn]
    for bar in bars:
        assert (
            LEFT
            <= float(bar.get("x", ""))
            <= float(bar.get("x", "")) + float(bar.get("width", ""))
            <= WIDTH - RIGHT + 1
        )
    for dot in dots:
        assert LEFT <= float(dot.get("cx", "")) <= WIDTH - RIGHT
    assert len(marks(picture, "key")) == 1
    _, _, width, height = map(float, ET.fromstring(picture).get("viewBox", "").split())
    assert all(float(text.get("y", "")) < height for text in ET.fromstring(picture).iter(f"{SVG}text"))
    assert width == WIDTH


@given(values.filter(lambda value: value > 0))
def test_the_axis_reaches_from_zero_to_the_longest_bar_in_a_few_steps(value: float) -> None:
    picture = draw([Panel("", "s", (), (), "", [Row("", [value], [], "")])])
    ticks = [number(text) for text in words(picture, "small") if text]
    assert ticks[0] == 0
    assert value <= ticks[-1] * (1 + 1e-5)  # a label has six digits
    assert value >= ticks[-2] * (1 - 1e-5)
    assert 4 <= len(ticks) <= 9
    (bar,) = marks(picture, "bar")
    assert float(bar.get("width", "")) == pytest.approx((WIDTH - LEFT - RIGHT) * value / ticks[-1], abs=0.2)


def test_bars_are_stacked_and_dots_are_counted_from_zero() -> None:
    picture = draw([Panel("", "s", (), (), "", [Row("", [1.0, 3.0], [4.0, 2.0], "")])])
    one, three = marks(picture, "bar")
    assert float(one.get("x", "")) == LEFT
    assert float(three.get("x", "")) == pytest.approx(LEFT + float(one.get("width", "")), abs=0.2)
    assert float(three.get("width", "")) == pytest.approx(3 * float(one.get("width", "")), abs=0.3)
    assert one.get("fill") != three.get("fill")
    end = float(three.get("x", "")) + float(three.get("width", ""))
    assert sorted(float(dot.get("cx", "")) for dot in marks(picture, "dot")) == pytest.approx([(LEFT + end) / 2, end])


def test_a_picture_of_latency_stacks_the_stages_of_each_scenario() -> None:
    fast, slow = (
        Measured(dict(zip(STAGES, taken, strict=True)), 2.0, {})
        for taken in ((0.1, 0.3, 0.3, 0.4), (0.1, 0.3, 0.5, 0.6))
    )
    told = latency.document({"thick_28_paced": [fast, slow, fast], "thin_300_fast": [slow]}, {}, [])
    picture = latency_picture(told)
    assert words(picture, "label") == ["thick 28 paced", "thin 300 fast"]
    assert (len(marks(picture, "bar")), len(marks(picture, "dot"))) == (2 * 4, 2 * 3)
    assert words(picture, "note")[0] == "0.400 / 0.600 / 0.600"
    # Stages at 0.1, 0.3, 0.3 and 0.4 s after the last image.
    widths = [float(bar.get("width", "")) for bar in marks(picture, "bar")][:4]
    assert [round(one / widths[0], 1) for one in widths] == [1.0, 2.0, 0.0, 1.0]
    median = float(marks(picture, "dot")[2].get("cx", ""))  # drawn last, above the others
    assert median == pytest.approx(LEFT + sum(widths), abs=0.2)


def test_a_picture_of_throughput_has_a_row_for_each_number_of_scanners() -> None:
    used = dict.fromkeys(SERVICES, 100.0)
    runs = {count: [Run(2.0, used, used, used, [0.5], [{}] * count, 0)] for count in (1, 2)}
    picture = throughput_picture({"slices": 28, **throughput.document(runs)})
    assert words(picture, "label") == ["1 scanner", "2 scanners"] * 4
    assert len(marks(picture, "bar")) == 2 * (1 + 1 + 4 + 4)
    assert len(marks(picture, "dot")) == 2 * (2 + 1)
    assert words(picture, "note")[:2] == ["1,800", "3,600"]
    first, second = marks(picture, "bar")[:2]
    assert float(second.get("width", "")) == pytest.approx(2 * float(first.get("width", "")), abs=0.2)


def test_a_picture_of_preprocessing_has_a_panel_for_each_run_and_a_row_for_each_implementation() -> None:
    run = {"device": "cpu", "spacing_mm": 0.5, "ratios": {"definition": 1.25}}
    told = {**run, "slices_per_s": {"definition": 2000.0, "opencv": 1600.0}}
    picture = preprocess_picture([told, {**told, "spacing_mm": 0.45}])
    assert words(picture, "label") == ["definition", "opencv"] * 2
    assert words(picture, "note")[:2] == ["2,000 / 1.25", "1,600"]
    assert [title.split(" at ")[1] for title in words(picture, "title")] == ["0.5 mm, cpu", "0.45 mm, cpu"]
    first, second, *_ = marks(picture, "bar")
    assert float(first.get("width", "")) == pytest.approx(1.25 * float(second.get("width", "")), abs=0.2)


def test_a_picture_of_decoding_has_a_panel_for_each_kind_and_names_what_is_wrong() -> None:
    measured = [("rle", "scanside", 1000.0, True), ("rle", "other", 500.0, False), ("raw", "scanside", 40.0, True)]
    results = [
        {"kind": kind, "decoder": name, "slices_per_s": speed, "bit_exact": exact}
        for kind, name, speed, exact in measured
    ]
    picture = decode_picture({"results": results, "ratios": {"rle_other": 2.0}})
    assert words(picture, "title") == ["Decoding rle", "Decoding raw"]
    assert words(picture, "label") == ["scanside", "other", "scanside"]
    assert words(picture, "note") == ["1,000.0", "500.0 / 2.00 / wrong values", "40.0"]
    ours, theirs, _ = (float(bar.get("width", "")) for bar in marks(picture, "bar"))
    assert ours == pytest.approx(2 * theirs, abs=0.2)


@pytest.mark.parametrize("command", ["latency", "throughput", "preprocess", "decode"])
def test_a_picture_that_could_not_be_written_is_refused_before_the_measurement(command: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", command, "--plot", str(tmp_path / "absent" / "picture.svg")])
    assert result.exit_code == 2
    assert "there is no folder" in " ".join(result.stderr.replace("│", " ").split())
