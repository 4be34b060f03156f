"""The model card of outcomes that nobody had to compute."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from triton_models.training import card
from triton_models.training.charts import Axis, Plot, Series, intervals, plot
from triton_models.training.measures import Outcome, summary

SVG = "{http://www.w3.org/2000/svg}"
SUBTYPES = ("epidural", "subdural")


def outcomes(family: str, *, found: int, alarms: int) -> list[Outcome]:
    """A hundred studies with blood, 0.5 to 50 mL, so many of them found; a hundred without, so many of them called."""
    studies = []
    for number in range(100):
        name = SUBTYPES[number % 2]
        volume = float(np.exp(np.log(0.5) + number / 99 * np.log(100)))
        hit = number >= 100 - found
        blood = Outcome(
            seed=number,
            family=family,
            volumes_ml={name: volume},
            blood_hu=55.0,
            signal_to_noise=3.0 if number < 7 else 20.0,
            thickness_mm=(1.0, 5.0)[number % 2],
            kernel=("H30s", "UB")[number // 2 % 2],
            vendor="B",
            kvp=120.0,
            tilt_deg=0.0,
            look_alikes=(),
            age=60,
            refused="",
            probability=0.6 + number / 400 if hit else 0.2,
            called_ml=0.9 * volume if hit else 0.0,
            subtypes={one: 0.9 if one == name else 0.1 for one in SUBTYPES},
            points_at_blood=hit,
            seconds=2.0,
        )
        called = number < alarms
        none = replace(
            blood,
            seed=1000 + number,
            volumes_ml={},
            blood_hu=0.0,
            signal_to_noise=0.0,
            look_alikes=("clip",) if number < 20 else ("pineal",),
            probability=0.8 if called else 0.1,
            called_ml=3.0 if called else 0.0,
            points_at_blood=False,
        )
        studies += [blood, none]
    return studies


def figures(unseen: list[Outcome], training: list[Outcome], **others: Any) -> dict[str, Any]:
    return {
        **summary(unseen, 0.5),
        "training_family": summary(training, 0.5),
        "real": {"name": "a_head", "gate": "age: absent", "positive": False, "probability": 0.0432, "threshold": 0.5,
                 "slabs": [0.011, 0.0432, 0.022]},
        "threshold": 0.5,
        "stated": {"threshold": 0.5, "sensitivity": 0.91, "specificity": 0.96, "studies": 321},
        "package": {"name": "some_model", "version": "9.8.7", "title": "Some model", "clearance": "none: research",
                    "notice": "Research use, not cleared.", "model_onnx": "sha256:abc"},
        "seeds": {"unseen": [50, 249], "training": [600, 799]},
        "studies_by_family": {"unseen": 200, "training": 200},
        "studies_for_look_alikes": 77,
        "refused_because": {},
        "versions": {"numpy": "1.2.3"},
        "command": "make it",
        "cores": 2,
        "seconds": 800,
        **others,
    }  # fmt: skip


GOOD = (outcomes("unseen", found=96, alarms=2), outcomes("training", found=100, alarms=0))
POOR = (outcomes("unseen", found=60, alarms=25), outcomes("training", found=90, alarms=10))


def pictures(studies: list[Outcome]) -> card.Examples:
    grey = np.repeat(np.random.default_rng(1).integers(0, 255, (320, 320, 1), np.uint8), 3, axis=2)
    grey[100:110, 100:110] = card.TRUTH
    grey[120:130, 100:110] = card.CALLED
    return {"hits": [(studies[-2], grey), (studies[-4], grey)], "misses": [(studies[0], grey)], "false_alarms": []}


def rows(page: str, start: str) -> list[str]:
    return [line for line in page.splitlines() if line.startswith(f"| {start}")]


def test_the_page_says_what_goals_were_met_and_what_it_is() -> None:
    page = card.readme(figures(*GOOD), {"hits": [], "misses": [], "false_alarms": []})
    assert "Research use, not cleared." in page and "none: research" in page and "some_model 9.8.7" in page
    assert "drawn by a program" in page and "triage and not diagnosis" in page
    goals = [rows(page, name)[0] for name in ("AUC", "sensitivity |", "specificity |", "sensitivity under")]
    assert [goal.split(" | ")[1] for goal in goals] == ["0.97", "0.95", "0.95", "0.75"]
    assert [goal.split(" | ")[3] for goal in goals] == ["met"] * 4
    assert "0.960 (0.902 to 0.984; 100)" in goals[1] and "1.000 (0.963 to 1.000; 100)" in goals[1]
    assert "sensitivity 0.910, specificity 0.960, on 321" in page
    assert "50 to 249" in page and "600 to 799" in page and "sha256:abc" in page and "numpy 1.2.3" in page


def test_a_goal_that_was_missed_is_said_to_be() -> None:
    page = card.readme(figures(*POOR), {"hits": [], "misses": [], "false_alarms": []})
    goals = [rows(page, name)[0] for name in ("AUC", "sensitivity |", "specificity |", "sensitivity under")]
    assert [goal.split(" | ")[3] for goal in goals] == ["**not met**"] * 4
    small = sum(one.volume_ml < 5 for one in POOR[0][:80:2])
    assert (
        f"40 of 100 bleeds were missed, {small} of them under 5 mL" in page
        and "25 of 100 studies without blood were called positive" in page
    )
    weakest = page.partition("The weakest groups")[2].splitlines()[4:]
    assert weakest[0] == "| sensitivity by volume, mL | below 1 | 0.000 (0.000 to 0.204; 15) | 15 of 15 |"
    assert weakest[1] == "| specificity by look-alike | clip | 0.000 (0.000 to 0.161; 20) | 20 of 20 |"
    most = page.partition("Most misses")[2].splitlines()[4:7]
    assert [line.split(" | ")[1:3] for line in most] == [
        ["1 to 5", "13 of 18"],
        ["1 to 5", "12 of 17"],
        ["below 1", "8 of 8"],
    ]
    assert "noise with certainty (Rose, J Opt Soc Am 1948; 38:196): 7 of 100 studies with blood." in page
    assert rows(page, "pineal")[0].endswith("| 0.938 (0.862 to 0.973; 80) |")
    assert "There were none." in page


def test_the_real_head_is_there_or_its_absence_is() -> None:
    shown: dict[str, list[Outcome]] = {"hits": [], "misses": [], "false_alarms": []}
    page = card.readme(figures(*GOOD), shown)
    assert "It comes out **negative**: probability 0.043" in page and "0.011, 0.043, 0.022" in page
    wrong = figures(*GOOD)
    wrong["real"]["positive"] = True
    assert "positive, which is wrong" in card.readme(wrong, shown)
    assert "**Skipped:** no data" in card.readme(figures(*GOOD, real={"skipped": "no data"}), shown)


def test_refusals_are_counted_by_criterion() -> None:
    told = figures(*GOOD, refused_because={"series": 3, "age": 1})
    page = card.readme(told, {"hits": [], "misses": [], "false_alarms": []})
    assert "Criteria of the gate that refused: age 1, series 3." in page


def test_the_folder_holds_page_figures_plots_and_pictures(tmp_path: Path) -> None:
    (tmp_path / "old.png").touch()
    told = figures(*POOR)
    card.write(tmp_path, told, [*POOR[0], *POOR[1]], pictures(POOR[0]))
    kept = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    assert kept == told
    for key in ("auc", "sensitivity", "specificity", "sensitivity_under_5_ml"):
        assert set(kept[key]) == {"value", "low", "high", "n"}
    there = {path.name for path in tmp_path.iterdir()}
    assert there == {"README.md", "metrics.json", "roc.svg", "reliability.svg", "strata.svg", "agreement.svg",
                     "hits.png", "misses.png"}  # fmt: skip
    page = (tmp_path / "README.md").read_text("utf-8")
    assert {name for name in there if f"({name})" in page} == there - {"README.md"}
    with Image.open(tmp_path / "hits.png") as image:
        assert image.size == (640, 320)
        pixels = np.asarray(image.convert("RGB"))
    assert tuple(pixels[105, 105]) == card.TRUTH and tuple(pixels[125, 425]) == card.CALLED
    assert len(ET.fromstring((tmp_path / "roc.svg").read_text()).findall(f".//{SVG}polyline")) == 2
    found = sum(one.probability >= 0.5 for one in POOR[0] if one.bleeds)
    dots = ET.fromstring((tmp_path / "agreement.svg").read_text()).findall(f".//{SVG}circle[@class='point']")
    assert len(dots) == found == 60
    zero = next(
        line for line in ET.fromstring((tmp_path / "agreement.svg").read_text()).iter(f"{SVG}text") if line.text == "0"
    )
    assert all(float(dot.attrib["cy"]) > float(zero.attrib["y"]) - 4 for dot in dots)  # too little is called


def test_a_tile_shows_brain_truth_and_call() -> None:
    hu = np.full((200, 200), 40.0, np.float32)
    hu[:50] = 1000.0
    truth = np.zeros((200, 200), bool)
    truth[80:120, 60:100] = True
    called = [(120.0, 100.0), (160.0, 100.0), (160.0, 140.0), (120.0, 140.0)]
    picture = card.tile(hu, truth, [called], (1.0, 1.0))
    assert picture.shape == (320, 320, 3)
    assert tuple(picture[240, 100]) == (128, 128, 128) and tuple(picture[40, 160]) == (255, 255, 255)

    def middle(colour: tuple[int, int, int]) -> tuple[float, float]:
        """Of the contour, as (column, row) in mm about the image's centre."""
        places = np.argwhere((picture == colour).all(axis=2))
        row, column = (places.min(axis=0) + places.max(axis=0)) / 2
        return (column - 159.5) * card.TILE_MM, (row - 159.5) * card.TILE_MM

    assert middle(card.TRUTH) == pytest.approx((79.5 - 99.5, 99.5 - 99.5), abs=1)
    assert middle(card.CALLED) == pytest.approx((140 - 99.5, 120 - 99.5), abs=1)


def test_a_plot_puts_points_where_they_belong() -> None:
    axis = Axis("x", [0.1, 1, 10, 100], logarithmic=True)
    assert [axis.share(x) for x in (0.01, 0.1, 1, 10, 1000)] == pytest.approx([0, 0, 1 / 3, 2 / 3, 1])
    assert [Axis("y", [-1.0, 3.0]).share(y) for y in (-1, 0, 3)] == [0, 0.25, 1]
    svg = ET.fromstring(
        plot(
            Plot("t", axis, Axis("y", [-1.0, 1.0]), [Series("s", [(1, 0), (10, 1)], spans=[(-0.5, 0.5)])],
                 [((0.1, 0), (100, 0), "zero")])
        )
    )  # fmt: skip
    first, second = svg.findall(f".//{SVG}circle[@class='point']")
    (mark,) = svg.findall(f".//{SVG}line[@class='mark']")
    (span,) = svg.findall(f".//{SVG}line[@class='span']")
    assert first.get("cy") == mark.get("y1") == mark.get("y2")
    grid = [float(line.attrib["y1"]) for line in svg.findall(f".//{SVG}line[@class='grid']")[-2:]]
    assert float(first.attrib["cy"]) == pytest.approx(sum(grid) / 2, abs=0.1)
    assert float(first.attrib["cx"]) - float(mark.attrib["x1"]) == pytest.approx(
        float(second.attrib["cx"]) - float(first.attrib["cx"]), abs=0.2
    )
    assert float(span.attrib["y2"]) < float(first.attrib["cy"]) < float(span.attrib["y1"])


def test_estimates_stand_in_their_groups_with_their_intervals() -> None:
    one = {"value": 0.5, "low": 0.25, "high": 1.0, "n": 7}
    none = {"value": None, "low": 0.0, "high": 1.0, "n": 0}
    svg = ET.fromstring(intervals("t", {"by this": {"a": one, "b": none}}, goal=0.75))
    (dot,) = svg.findall(f".//{SVG}circle")
    (span,) = svg.findall(f".//{SVG}line[@class='span']")
    (goal,) = svg.findall(f".//{SVG}line[@class='mark']")
    x, low, high, aim = (
        float(place) for place in (dot.attrib["cx"], span.attrib["x1"], span.attrib["x2"], goal.attrib["x1"])
    )
    assert (x - low) * 2 == pytest.approx(high - x, abs=0.3) and aim == pytest.approx((x + high) / 2, abs=0.3)
    words = [text.text for text in svg.iter(f"{SVG}text")]
    assert {"by this", "a", "b", "0.50 (0.25 to 1.00), 7"} <= set(words)
