"""The statistics of the model card, against published examples and against their definitions."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_models.training.measures import (
    VOLUMES_ML,
    Outcome,
    Z,
    agreement,
    auc,
    proportion,
    ranges,
    reliability,
    roc,
    summary,
    wilson,
)

NOTHING = Outcome(
    seed=1,
    family="unseen",
    volumes_ml={},
    blood_hu=0.0,
    signal_to_noise=0.0,
    thickness_mm=5.0,
    kernel="STANDARD",
    vendor="A",
    kvp=120.0,
    tilt_deg=0.0,
    look_alikes=(),
    age=60,
    refused="",
    probability=0.1,
    called_ml=0.0,
    subtypes={"epidural": 0.1, "subdural": 0.05},
    points_at_blood=False,
    seconds=1.0,
)
BLEED = replace(
    NOTHING,
    volumes_ml={"subdural": 8.0},
    blood_hu=45.0,
    signal_to_noise=20.0,
    probability=0.9,
    called_ml=6.0,
    subtypes={"epidural": 0.1, "subdural": 0.9},
    points_at_blood=True,
)
SCORES = st.lists(st.integers(0, 6).map(lambda n: n / 6), min_size=2, max_size=12)


@pytest.mark.parametrize(
    ("found", "of", "low", "high"),
    # Newcombe, Stat Med 1998; 17:857, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval_is_the_published_one(found: int, of: int, low: float, high: float) -> None:
    assert wilson(found, of) == pytest.approx((low, high), abs=5e-5)


def test_a_proportion_of_nothing_has_no_value() -> None:
    assert proportion(0, 0) == {"value": None, "low": 0.0, "high": 1.0, "n": 0}


def test_the_area_is_the_published_one() -> None:
    # Hanley and McNeil, Radiology 1982; 143:29: ratings of 109 CT images, area 0.893
    normal = np.repeat([1, 2, 3, 4, 5], [33, 6, 6, 11, 2]).tolist()
    abnormal = np.repeat([1, 2, 3, 4, 5], [3, 2, 2, 11, 33]).tolist()
    area = auc(abnormal, normal)
    assert (round(area["value"], 3), area["n"]) == (0.893, 109)
    assert 0.81 < area["low"] < 0.83 and 0.93 < area["high"] < 0.95


@settings(max_examples=60, deadline=None)
@given(positive=SCORES, negative=SCORES)
def test_the_interval_is_delongs(positive: list[float], negative: list[float]) -> None:
    """By the definition: the components of each positive and each negative, compared one by one."""
    better = np.array([[(p > n) + 0.5 * (p == n) for n in negative] for p in positive])
    area, variance = (
        better.mean(),
        better.mean(1).var(ddof=1) / len(positive) + better.mean(0).var(ddof=1) / len(negative),
    )
    told = auc(positive, negative)
    assert told["value"] == pytest.approx(area, abs=1e-4)
    assert 0 <= told["low"] <= told["value"] <= told["high"] <= 1
    if 0 < area < 1 and variance > 0:
        half = Z * math.sqrt(variance) / (area * (1 - area))
        logits = [math.log(area / (1 - area)) - half, math.log(area / (1 - area)) + half]
        assert (told["low"], told["high"]) == pytest.approx([1 / (1 + math.exp(-x)) for x in logits], abs=1e-4)


def test_a_perfect_area_is_not_certain() -> None:
    assert auc([0.8, 0.9], [0.1] * 20) == {"value": 1.0, "low": 0.3424, "high": 1.0, "n": 22}
    with pytest.raises(ValueError, match="both groups"):
        auc([], [0.1])


@settings(max_examples=40, deadline=None)
@given(positive=SCORES, negative=SCORES)
def test_the_area_lies_under_the_curve(positive: list[float], negative: list[float]) -> None:
    x, y = zip(*roc(positive, negative), strict=True)
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(y, x) == pytest.approx(auc(positive, negative)["value"], abs=1e-4)


def test_the_agreement_is_the_published_one() -> None:
    # Bland and Altman, Lancet 1986; i:307: peak expiratory flow by two meters, L/min; limits there are of 2 s
    large = [494, 395, 516, 434, 476, 557, 413, 442, 650, 433, 417, 656, 267, 478, 178, 423, 427]
    small = [512, 430, 520, 428, 500, 600, 364, 380, 658, 445, 432, 626, 260, 477, 259, 350, 451]
    told = agreement(small, large)
    assert told is not None
    assert [told["bias"][end] for end in ("low", "value", "high")] == pytest.approx([-22.0, -2.1, 17.8], abs=0.1)
    spread = (told["upper_limit"]["value"] - told["bias"]["value"]) / Z
    assert spread == pytest.approx(38.8, abs=0.05)
    assert told["lower_limit"]["high"] - told["lower_limit"]["value"] == pytest.approx(34.6, abs=0.1)
    assert told["lower_limit"]["value"] - told["bias"]["value"] == pytest.approx(-Z * spread, abs=0.01)
    assert told["median_ratio"] == pytest.approx(np.median(np.divide(large, small)), abs=1e-4)
    assert agreement([1, 2], [1, 2]) is None


def test_who_says_what_is_true_is_calibrated() -> None:
    said = [0.25] * 40 + [0.75] * 40
    true = [True] * 10 + [False] * 30 + [True] * 30 + [False] * 10
    told = reliability(said, true)
    assert told["ece"]["value"] == 0 and told["brier"]["value"] == pytest.approx(0.1875)
    assert told["brier"]["low"] < 0.1875 < told["brier"]["high"]
    assert [(one["from"], one["observed"]["value"], one["observed"]["n"]) for one in told["bins"]] == [
        (0.2, 0.25, 40),
        (0.7, 0.75, 40),
    ]
    assert reliability(said, [not one for one in true])["ece"]["value"] == pytest.approx(0.5)
    assert reliability([0.0, 1.0], [False, True])["bins"][1]["to"] == 1.0  # certainty has a bin as well


def test_ranges_adjoin_and_hold_everything() -> None:
    rows = ranges(VOLUMES_ML)
    assert [name for name, _, _ in rows] == ["below 1", "1 to 5", "5 to 25", "25 and more"]
    assert [low for _, low, _ in rows] == [0.0, 1.0, 5.0, 25.0]
    assert [high for _, _, high in rows] == [1.0, 5.0, 25.0, math.inf]


def outcomes() -> list[Outcome]:
    """Four with blood (one missed), four without (one called), one refused, one with too little to see."""
    return [
        BLEED,
        replace(BLEED, volumes_ml={"subdural": 30.0, "epidural": 2.0}, called_ml=40.0, thickness_mm=1.0),
        replace(BLEED, volumes_ml={"epidural": 0.5}, called_ml=1.0, probability=0.5, blood_hu=50.0),
        replace(
            BLEED, volumes_ml={"epidural": 4.0}, probability=0.3, called_ml=0.0, kernel="H30s", signal_to_noise=4.9
        ),
        NOTHING,
        replace(NOTHING, look_alikes=("pineal",)),
        replace(NOTHING, look_alikes=("pineal", "clip"), probability=0.6, kernel="H30s"),
        replace(NOTHING, thickness_mm=1.25),
        replace(NOTHING, refused="age: unknown", probability=0.99),
        replace(BLEED, volumes_ml={}, probability=0.99),
    ]


def of(one: dict[str, float]) -> tuple[float, float]:
    return one["value"], one["n"]


def test_every_group_counts_its_own() -> None:
    told = summary(outcomes(), 0.5)
    assert of(told["auc"]) == (14 / 16, 8)
    assert of(told["sensitivity"]) == (0.75, 4) and of(told["specificity"]) == (0.75, 4)
    assert of(told["sensitivity_under_5_ml"]) == (0.5, 2)
    assert {name: of(one) for name, one in told["by_subtype"].items()} == {
        "epidural": (pytest.approx(2 / 3, abs=1e-4), 3),
        "subdural": (1.0, 2),
    }
    assert {name: one["n"] for name, one in told["by_volume_ml"].items()} == {
        "below 1": 1, "1 to 5": 1, "5 to 25": 1, "25 and more": 1
    }  # fmt: skip
    assert of(told["by_volume_ml"]["1 to 5"]) == (0.0, 1)
    mostly = told["by_subtype_and_volume_ml"]
    assert of(mostly["subdural"]["5 to 25"]) == of(mostly["subdural"]["25 and more"]) == (1.0, 1)
    assert mostly["epidural"]["25 and more"]["n"] == 0
    assert {name: of(one) for name, one in told["by_look_alike"].items()} == {
        "none": (1.0, 2), "pineal": (0.5, 2), "clip": (0.0, 1)
    }  # fmt: skip
    assert set(told["by_thickness_mm"]) == {"below 1.25", "1.25 to 2.5", "4 and more"}
    assert of(told["by_thickness_mm"]["1.25 to 2.5"]["specificity"]) == (1.0, 1)
    assert of(told["by_thickness_mm"]["below 1.25"]["sensitivity"]) == (1.0, 1)
    assert {name: of(one) for name, one in told["by_blood_hu"].items() if one["n"]} == {
        "40 to 50": (pytest.approx(2 / 3, abs=1e-4), 3), "50 to 60": (1.0, 1)
    }  # fmt: skip
    assert {name: of(one) for name, one in told["by_signal_to_noise"].items() if one["n"]} == {
        "below 5": (0.0, 1), "16 and more": (1.0, 3)
    }  # fmt: skip
    assert of(told["by_kernel"]["H30s"]["sensitivity"]) == (0.0, 1)
    assert of(told["by_kernel"]["H30s"]["specificity"]) == (0.0, 1)
    assert told["by_vendor"]["A"]["sensitivity"]["n"] == 4
    assert of(told["refused"]) == of(told["blood_too_little_to_see"]) == (0.1, 10)
    assert of(told["key_slab_holds_blood"]) == (1.0, 3)
    assert of(told["subtype_named_right"]) == (pytest.approx(2 / 3, abs=1e-4), 3)
    wrong = [replace(one, subtypes={"epidural": 0.9, "subdural": 0.1}) for one in outcomes()[:1]]
    assert of(summary([*wrong, NOTHING], 0.5)["subtype_named_right"]) == (0.0, 1)
    assert told["volume_agreement"]["bias"]["value"] == pytest.approx((-2 + 8 + 0.5) / 3, abs=1e-4)
    assert told["calibration"]["brier"]["n"] == 8


def test_studies_drawn_for_a_look_alike_count_there_alone() -> None:
    clips = [replace(NOTHING, look_alikes=("clip",), probability=p) for p in (0.1, 0.2, 0.9)]
    told = summary(outcomes(), 0.5, [*clips, replace(clips[0], refused="age: unknown")])
    assert of(told["by_look_alike"]["clip"]) == (0.5, 4) and of(told["by_look_alike"]["pineal"]) == (0.5, 2)
    before = summary(outcomes(), 0.5)
    assert {key: one for key, one in told.items() if key != "by_look_alike"} == {
        key: one for key, one in before.items() if key != "by_look_alike"
    }
