"""How good a network is on simulated studies that it never saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.inference.preprocess import SIZE, model_input, to_field

from .haemorrhage import SUBTYPES
from .phantom import simulate
from .samples import shrink

Predict = Callable[[NDArray[np.float32]], tuple[NDArray[np.float32], NDArray[np.float32]]]
"""Slabs (n, 3, 256, 256) to probabilities (n, 6) and lesion maps (n, 1, 64, 64)."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One study: what is true of it and what was said of it.

    Attributes:
        seed: of the phantom.
        bleed: its subtype, or "".
        volume_ml: of blood, by the mask.
        probability: the highest of the slabs' probabilities of any haemorrhage.
        paired: the highest mean of two neighbouring slabs' probabilities.
        subtypes: the highest of the slabs' probabilities of each subtype, in order.
        overlap: {lesion threshold: (blood and called, blood, called)}, counts of map pixels.
    """

    seed: int
    bleed: str
    volume_ml: float
    probability: float
    paired: float
    subtypes: tuple[float, ...]
    overlap: dict[float, tuple[int, int, int]]


LESION_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)


def outcome(predict: Predict, seed: int, bleed: str | None, volume_ml: float | None, *, size: int = SIZE) -> Outcome:
    """Simulate a study of 5 mm slices and ask the network about it."""
    phantom = simulate(seed, bleed=bleed, volume_ml=volume_ml, size=size)
    slabs = np.stack([model_input(hu, phantom.spacing_mm) for hu in phantom.hu])
    parts = [predict(slabs[n : n + 16]) for n in range(0, len(slabs), 16)]
    probabilities = np.concatenate([part[0] for part in parts])
    maps = np.concatenate([part[1] for part in parts])[:, 0]
    blood = np.stack([shrink(to_field((m > 0).astype(np.float32), phantom.spacing_mm, fill=0.0)) for m in phantom.mask])
    truth = blood > 0.5
    overlap = {
        t: (int((truth & (maps >= t)).sum()), int(truth.sum()), int((maps >= t).sum())) for t in LESION_THRESHOLDS
    }
    any_blood = probabilities[:, 0]
    return Outcome(
        seed,
        bleed or "",
        sum(phantom.volume_ml.values()),
        float(any_blood.max()),
        float((any_blood[1:] + any_blood[:-1]).max() / 2),
        tuple(float(p) for p in probabilities[:, 1:].max(axis=0)),
        overlap,
    )


def studies(predict: Predict, seeds: Sequence[int], report: Callable[[str], None]) -> list[Outcome]:
    """One study for each seed: every other one bleeds, in each subtype by turns, from 1 to 60 mL."""
    outcomes = []
    for n, seed in enumerate(seeds):
        bleed = SUBTYPES[n // 2 % len(SUBTYPES)] if n % 2 else None
        volume = float(np.exp(np.random.default_rng([seed, 4]).uniform(0, np.log(60))))
        outcomes.append(outcome(predict, seed, bleed, volume if bleed else None))
        if n % 20 == 19:
            report(f"evaluated {n + 1} of {len(seeds)} studies")
    return outcomes


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Area under the ROC curve: how often a positive scores above a negative, ties counted half."""
    p, n = np.asarray(positive)[:, None], np.asarray(negative)[None, :]
    return float((p > n).mean() + 0.5 * (p == n).mean())


def best_threshold(outcomes: Sequence[Outcome], *, least_specificity: float = 0.95) -> float:
    """The threshold of the highest sensitivity at that specificity, half way to the next score below it.

    It is kept within 0.2 to 0.9, so that a handful of studies cannot drive it to an end of the scale.
    """
    negative = np.sort([o.probability for o in outcomes if not o.bleed])
    positive = np.sort([o.probability for o in outcomes if o.bleed])
    allowed = int((1 - least_specificity) * len(negative))
    floor = float(negative[len(negative) - 1 - allowed])
    above = positive[positive > floor]
    ceiling = float(above[0]) if len(above) else 1.0
    return round(float(np.clip((floor + ceiling) / 2, 0.2, 0.9)), 3)


def best_lesion_threshold(outcomes: Sequence[Outcome]) -> float:
    """The threshold on the map with the highest Dice over all bleeding studies' pixels."""
    return max(LESION_THRESHOLDS, key=lambda t: _dice([o for o in outcomes if o.bleed], t))


def _dice(outcomes: Sequence[Outcome], threshold: float) -> float:
    both, truth, called = np.sum([o.overlap[threshold] for o in outcomes], axis=0)
    return float(2 * both / max(1, truth + called))


def summary(outcomes: Sequence[Outcome], threshold: float, lesion_threshold: float) -> dict[str, Any]:
    """The figures that a reader asks for, JSON-ready."""
    positive = [o for o in outcomes if o.bleed]
    negative = [o for o in outcomes if not o.bleed]

    def sensitivity(group: Sequence[Outcome]) -> dict[str, Any]:
        found = sum(o.probability >= threshold for o in group)
        return {"studies": len(group), "found": found, "sensitivity": round(found / len(group), 3) if group else None}

    named = sum(SUBTYPES[int(np.argmax(o.subtypes))] == o.bleed for o in positive)
    bins = ((0, 2), (2, 5), (5, 15), (15, 1000))
    return {
        "studies": len(outcomes),
        "with_bleed": len(positive),
        "auc": round(auc([o.probability for o in positive], [o.probability for o in negative]), 4),
        "auc_mean_of_two_slabs": round(auc([o.paired for o in positive], [o.paired for o in negative]), 4),
        "threshold": threshold,
        "sensitivity": sensitivity(positive)["sensitivity"],
        "specificity": round(sum(o.probability < threshold for o in negative) / len(negative), 3),
        "by_subtype": {name: sensitivity([o for o in positive if o.bleed == name]) for name in SUBTYPES},
        "by_volume_ml": {
            f"{low} to {high}" if high < 1000 else f"above {low}": sensitivity(
                [o for o in positive if low < o.volume_ml <= high]
            )
            for low, high in bins
        },
        "subtype_named_right": round(named / len(positive), 3),
        "lesion_threshold": lesion_threshold,
        "map_dice": round(_dice(positive, lesion_threshold), 3),
        "map_pixels_called_per_negative_study": round(
            float(np.mean([o.overlap[lesion_threshold][2] for o in negative])), 2
        ),
    }
