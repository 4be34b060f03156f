"""Calibration and operating points, from what was said of studies to what may be stated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from appliance.inference import verdict
from triton_models.training import calibrate
from triton_models.training.calibrate import LESION_THRESHOLDS, Answer, best_threshold, platt, sigmoid
from triton_models.training.haemorrhage import SUBTYPES


def answer(volume_ml: float, logit: float, called_ml: NDArray[np.float64] | None = None) -> Answer:
    """A study with a subdural of that volume, of whose two slabs one is called."""
    volumes = np.array([0, 0, 0, 0, volume_ml], dtype=np.float64)
    called = np.zeros((2, len(LESION_THRESHOLDS)))
    if called_ml is not None:
        called[0] = called_ml
    return Answer(volumes, np.array([logit, -5, -5, -5, -5, logit]), np.array([logit, -9.0]), called)


@settings(max_examples=20, deadline=None)
@given(slope=st.floats(0.4, 2.5), shift=st.floats(-2, 2), seed=st.integers(0, 1000))
def test_platt_finds_what_the_truth_was_drawn_with(slope: float, shift: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.normal(0, 2, 20_000)
    truth = rng.random(len(scores)) < sigmoid(slope * scores + shift)
    assert platt(scores, truth) == pytest.approx((slope, shift), abs=0.15)


def test_platt_keeps_the_order_whatever_it_is_shown() -> None:
    scores = np.array([3.0, 2.0, -2.0, -3.0])
    assert platt(scores, np.array([False, False, True, True]))[0] > 0
    slope, shift = platt(scores, np.array([True, True, False, False]))
    assert 0 < slope < 20 and abs(shift) < 1
    assert platt(scores, np.zeros(4, dtype=bool)) == (1.0, 0.0)


@settings(max_examples=100, deadline=None)
@given(
    negative=st.lists(st.floats(0.02, 0.98), min_size=1, max_size=60),
    positive=st.lists(st.floats(0.02, 0.98), max_size=40),
    least=st.sampled_from([0.9, 0.95, 0.97]),
)
def test_the_threshold_keeps_the_specificity_and_none_is_better_on_both_sides(
    negative: list[float], positive: list[float], least: float
) -> None:
    def lesser(threshold: float) -> float:
        called = sum(score >= threshold for score in negative)
        if called > (1 - least) * len(negative) + 1e-6:
            return -1
        found = sum(score >= threshold for score in positive) / len(positive) if positive else 1.0
        return min(found, 1 - called / len(negative))

    chosen = best_threshold(negative, positive, least)
    assert chosen == 0.99 or lesser(chosen) >= max(lesser(other) for other in (*negative, *positive, 0.99)) - 1e-9


def test_the_threshold_stands_clear_of_both_kinds_of_study() -> None:
    assert best_threshold([0.1, 0.2], [0.8, 0.9], 0.95) == pytest.approx(0.5)
    negative, positive = [0.01 * n for n in range(1, 51)], [0.5 + 0.005 * n for n in range(1, 100)]
    assert best_threshold(negative, positive, 0.95) == pytest.approx(0.5, abs=0.01)  # not at 0.48, where 0.95 would do


def test_auc_is_the_chance_that_a_positive_scores_higher() -> None:
    rng = np.random.default_rng(3)
    positive, negative = rng.integers(0, 9, 30).astype(float), rng.integers(0, 9, 20).astype(float)
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    assert calibrate.auc(positive, negative) == pytest.approx(wins / 600)


def test_the_maps_threshold_is_the_one_whose_volumes_are_right() -> None:
    right = LESION_THRESHOLDS.index(0.4)
    called = np.linspace(1, 0, len(LESION_THRESHOLDS))
    called += 10 - called[right]
    studies = [answer(10.0, 4.0, called), answer(40.0, -4.0, called), answer(0.0, 4.0, called)]
    assert calibrate.best_lesion_threshold(studies, 1.0, 0.0, 0.5) == (0.4, pytest.approx(0.0, abs=1e-9))


def test_a_calibration_states_what_was_seen_at_its_threshold() -> None:
    rng = np.random.default_rng(1)
    studies = [answer(0.0, score) for score in rng.normal(-3, 1, 50)]
    studies += [
        answer(volume, score) for volume, score in zip(rng.uniform(0.1, 50, 50), rng.normal(2, 2, 50), strict=True)
    ]
    made = calibrate.calibrate(studies)
    said = np.array([sigmoid(s.logits[0] * made.slope[0] + made.shift[0]) for s in studies])
    figures = made.figures
    assert figures["studies"] == 100 and figures["with_blood"] == 50
    assert figures["specificity"] == pytest.approx((said[:50] < made.threshold).mean(), abs=1e-4)
    assert figures["sensitivity"] == pytest.approx((said[50:] >= made.threshold).mean(), abs=1e-4)
    assert figures["specificity"] >= calibrate.LEAST_SPECIFICITY + calibrate.MARGIN
    assert sum(group["studies"] for group in figures["by_volume_ml"].values()) == 50
    assert figures["by_subtype"]["subdural"]["studies"] == 50
    assert figures["by_subtype"][SUBTYPES[0]] == {"studies": 0, "found": 0}
    assert said[50:].mean() > 0.6 > 0.4 > said[:50].mean()


def test_the_points_of_what_ships_are_chosen_on_its_own_answers() -> None:
    """Half way between its own studies, though single precision had them elsewhere."""
    studies = [answer(0.0, -2.0) for _ in range(50)] + [answer(10.0, 2.0) for _ in range(50)]
    single = calibrate.calibrate(studies)
    eight = [answer(0.0, calibrate.logit(np.array([0.3]))[0]) for _ in range(50)]
    eight += [answer(10.0, calibrate.logit(np.array([0.9]))[0]) for _ in range(50)]
    made = calibrate.of_shipped(single, eight)
    assert made.threshold == pytest.approx(0.6, abs=1e-3) != single.threshold
    assert made.figures["sensitivity"] == made.figures["specificity"] == 1
    assert made.figures["threshold"] == made.figures["threshold_of_these_studies"] == made.threshold
    assert np.array_equal(made.slope, single.slope) and np.array_equal(made.shift, single.shift)
    assert made.figures["slope"] == single.figures["slope"] and made.figures["shift"] == single.figures["shift"]
    assert calibrate.of_shipped(single, eight, 0.7).threshold == 0.7


def test_blood_too_little_to_see_is_none() -> None:
    assert not answer(0.001, 0).truth.any()
    assert list(np.flatnonzero(answer(0.5, 0).truth)) == [0, 5]


def test_areas_are_taken_as_the_verdict_takes_them() -> None:
    assert calibrate.FINE_MM == verdict.FINE_MM
    lesion_map = np.zeros((64, 64), np.float32)
    lesion_map[20:24, 20:30] = 1.0
    areas = calibrate._areas_mm2(lesion_map)
    assert areas[LESION_THRESHOLDS.index(0.5)] == pytest.approx(4 * 10 * 16, rel=0.02)
    assert areas == sorted(areas, reverse=True) and areas[0] > areas[-1] > 0
