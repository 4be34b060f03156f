"""The training samples, and the figures that a model is judged by."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_models.training.evaluate import LESION_THRESHOLDS, Outcome, auc, best_threshold, summary
from triton_models.training.haemorrhage import SUBTYPES
from triton_models.training.samples import SLABS_PER_HEAD, head_samples, varied


def test_one_head_one_set_of_samples() -> None:
    first, second = head_samples(1, 5), head_samples(1, 5)
    assert np.array_equal(first.fields, second.fields) and np.array_equal(first.covered, second.covered)
    assert first.fields.shape == (SLABS_PER_HEAD, 256, 256)
    assert first.covered.shape == (SLABS_PER_HEAD, len(SUBTYPES), 64, 64)
    assert not np.array_equal(first.fields, head_samples(1, 6).fields)


def test_the_truth_lies_where_the_blood_is() -> None:
    seen = 0
    for index in range(6):
        samples = head_samples(1, index)
        whole = samples.covered.max(axis=1) == 255
        means = samples.fields.reshape(SLABS_PER_HEAD, 64, 4, 64, 4).mean(axis=(2, 4))
        if whole.sum() > 8:
            seen += 1
            assert 35 < np.median(means[whole]) < 100
    assert seen >= 2


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), row=st.integers(24, 40), column=st.integers(24, 40))
def test_however_a_sample_is_varied_its_truth_moves_along(seed: int, row: int, column: int) -> None:
    covered = np.zeros((5, 64, 64), dtype=np.uint8)
    covered[2, row : row + 4, column : column + 4] = 255
    field = np.zeros((256, 256), dtype=np.int16)
    field[4 * row : 4 * row + 16, 4 * column : 4 * column + 16] = 500
    hu, blood = varied(np.random.default_rng(seed), field, covered)
    assert hu.shape == (256, 256) and blood.shape == (5, 64, 64)
    assert not blood[[0, 1, 3, 4]].any()
    light = np.clip(hu - 200, 0, None)
    rows, columns = np.indices(light.shape)
    map_rows, map_columns = np.indices(blood[2].shape)
    for of_hu, of_map in ((rows, map_rows), (columns, map_columns)):
        seen = (of_hu * light).sum() / light.sum()
        told = 4 * (of_map * blood[2]).sum() / blood[2].sum() + 1.5
        assert seen == pytest.approx(told, abs=2.5)


@settings(max_examples=60, deadline=None)
@given(
    positive=st.lists(st.integers(0, 9), min_size=1, max_size=20),
    negative=st.lists(st.integers(0, 9), min_size=1, max_size=20),
)
def test_auc_is_the_chance_that_a_positive_scores_higher(positive: list[int], negative: list[int]) -> None:
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    assert auc(positive, negative) == pytest.approx(wins / len(positive) / len(negative))


def _study(bleed: str, probability: float, volume_ml: float = 10.0) -> Outcome:
    named = tuple(float(name == bleed) for name in SUBTYPES)
    pixels = dict.fromkeys(LESION_THRESHOLDS, (8, 10, 12) if bleed else (0, 0, 3))
    return Outcome(0, bleed, volume_ml if bleed else 0.0, probability, probability, named, pixels)


def test_the_threshold_keeps_the_specificity_that_is_asked_for() -> None:
    negative = [_study("", p / 100) for p in range(100)]
    positive = [_study("epidural", 0.9) for _ in range(10)]
    threshold = best_threshold(negative + positive, least_specificity=0.8)
    assert sum(o.probability >= threshold for o in negative) <= 20
    assert 0.79 <= threshold <= 0.9


def test_the_summary_counts_what_was_found() -> None:
    outcomes = [_study("epidural", 0.9, 1.0), _study("subdural", 0.4, 20.0), _study("", 0.1), _study("", 0.8)]
    figures = summary(outcomes, 0.5, 0.5)
    assert (figures["sensitivity"], figures["specificity"], figures["auc"]) == (0.5, 0.5, 0.75)
    assert figures["by_subtype"]["epidural"] == {"studies": 1, "found": 1, "sensitivity": 1.0}
    assert figures["by_volume_ml"]["above 15"] == {"studies": 1, "found": 0, "sensitivity": 0.0}
    assert figures["map_dice"] == round(2 * 8 / 22, 3)
    assert figures["subtype_named_right"] == 1.0
