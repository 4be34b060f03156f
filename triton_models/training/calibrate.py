"""From what a network says of slabs to what may be stated of a study: calibrated probabilities and thresholds.

All of it rests on calibration studies that training never saw; no figure here is of a test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from appliance.inference.preprocess import SIZE

from .haemorrhage import SUBTYPES
from .samples import MAP_PIXEL_MM2, Store, run_input

LEAST_SPECIFICITY = 0.95
MARGIN = 0.01
"""On as many studies as there are, 0.95 seen may well be 0.93."""
PRESENT_ML = 0.02
"""A study with less blood than this, which no reader sees, does not count as one with it."""
LESION_THRESHOLDS = tuple(round(0.2 + 0.05 * n, 2) for n in range(16))
FINE_MM = 0.5
"""As in `appliance.inference.verdict`, which needs more than the training environment has."""
FINE = round(SIZE / FINE_MM)

Predict = Callable[[NDArray[np.float32]], tuple[NDArray[np.float32], NDArray[np.float32]]]
"""(n, 9, 256, 256) to probabilities (n, 6) and lesion maps (n, 1, 64, 64)."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What is true of a study and what was said of it.

    Attributes:
        volume_ml: of each subtype (5,).
        logits: the highest slab logit of each label (6,).
        slab_logits: of "any", (slabs,).
        called_ml: (slabs, thresholds) that the lesion map calls at each of `LESION_THRESHOLDS`.
    """

    volume_ml: NDArray[np.float64]
    logits: NDArray[np.float64]
    slab_logits: NDArray[np.float64]
    called_ml: NDArray[np.float64]

    @property
    def truth(self) -> NDArray[np.bool_]:
        """Whether each label is true of the study (6,)."""
        present = self.volume_ml >= PRESENT_ML
        return np.concatenate([[present.any()], present])


@dataclass(frozen=True, slots=True)
class Calibration:
    """What is folded into the graph, and the operating points.

    Attributes:
        slope, shift: of each label's logit (6,).
        threshold: of the study's probability.
        lesion_threshold: of the map.
        figures: what was seen on the calibration studies, JSON-ready.
    """

    slope: NDArray[np.float64]
    shift: NDArray[np.float64]
    threshold: float
    lesion_threshold: float
    figures: dict[str, Any]


def predictor(model: Path, threads: int = 0) -> Predict:
    """An exported model in ONNX Runtime; 0 threads are as many as there are cores."""
    import onnxruntime  # only in the training environment; what else is here also runs without

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])

    def predict(slabs: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        probabilities, maps = session.run(None, {"slabs": slabs})
        return probabilities, maps

    return predict


def ask(predict: Predict, studies: Store) -> list[Answer]:
    """What a network says of each scan of a store."""
    answers = []
    for first, end, told in studies.scans:
        fields, _ = studies.run(first, end)
        slabs = run_input(fields)
        parts = [predict(slabs[n : n + 16]) for n in range(0, len(slabs), 16)]
        logits = logit(np.concatenate([part[0] for part in parts]))
        maps = np.concatenate([part[1] for part in parts])[:, 0]
        called = np.array([_areas_mm2(one) for one in maps]) * np.array(told["thickness_mm"])[:, None] / 1000
        volumes = np.array([told["volume_ml"].get(name, 0.0) for name in SUBTYPES])
        answers.append(Answer(volumes, logits.max(axis=0), logits[:, 0], called))
    return answers


def _areas_mm2(lesion_map: NDArray[np.float32]) -> list[float]:
    """What the map calls at each threshold, enlarged as the verdict does it."""
    fine = cv2.resize(lesion_map, (FINE, FINE), interpolation=cv2.INTER_LINEAR)
    called = fine[fine >= LESION_THRESHOLDS[0]]  # mostly few of many: five times as fast
    counts = np.histogram(called, bins=[*LESION_THRESHOLDS, np.inf])[0][::-1].cumsum()[::-1]
    return [float(count) * FINE_MM**2 for count in counts]


def logit(probability: NDArray[Any]) -> NDArray[np.float64]:
    """Of a probability in single precision, which is never quite 0 nor 1 for this."""
    p = np.clip(np.asarray(probability, dtype=np.float64), 1e-7, 1 - 6e-8)
    return np.asarray(np.log(p) - np.log1p(-p), dtype=np.float64)


def sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The logistic function."""
    return np.asarray(0.5 * (1 + np.tanh(x / 2)), dtype=np.float64)


def platt(scores: NDArray[np.float64], truth: NDArray[np.bool_]) -> tuple[float, float]:
    """Slope above 0 and shift of a score's logistic fit to what is true (Platt 1999, with his smoothed targets).

    Where all or none is true, nothing can be fitted: slope 1, shift 0.
    """
    positive, negative = int(truth.sum()), int((~truth).sum())
    if not positive or not negative:
        return 1.0, 0.0
    target = np.where(truth, (positive + 1) / (positive + 2), 1 / (negative + 2))

    def cost(x: NDArray[np.float64]) -> float:
        z = np.exp(x[0]) * scores + x[1]
        # The slope is held near 1 a little, so that a few studies that happen to fall apart do not make it endless.
        return float((np.logaddexp(0, z) - target * z).sum() + 0.5 * x[0] ** 2)

    found = minimize(cost, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-9, "maxiter": 2000})
    return float(np.exp(found.x[0])), float(found.x[1])


def best_threshold(negative: Sequence[float], positive: Sequence[float], least_specificity: float) -> float:
    """The threshold at which the lesser of sensitivity and specificity is greatest, at that specificity at least.

    It lies half way between two studies' scores; where several serve as well, in the middle of them, as far as can be
    from both kinds of error.
    """
    low, high = np.sort(np.asarray(negative, np.float64)), np.sort(np.asarray(positive, np.float64))
    scores = np.unique([0.0, *low, *high, 1.0])
    between = (scores[1:] + scores[:-1]) / 2
    specificity = np.searchsorted(low, between) / max(len(low), 1)
    sensitivity = 1 - np.searchsorted(high, between) / max(len(high), 1)
    # Counted in studies: the share that is allowed may not be a number of them, nor exact as a sum of binary fractions.
    enough = specificity * len(low) >= len(low) - int((1 - least_specificity) * len(low) + 1e-9) - 1e-9
    lesser = np.where(enough, np.minimum(sensitivity, specificity if len(low) else 1.0), -1.0)
    best = np.flatnonzero(lesser >= lesser.max() - 1e-12)
    run = best[: int(np.argmax(np.diff(best, append=best[-1] + 2) > 1)) + 1]  # those that lie together
    return float(np.clip((between[run[0]] + between[run[-1]]) / 2, 0.01, 0.99))


def auc(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> float:
    """Area under the ROC curve: how often a positive scores above a negative, ties counted half."""
    p, n = positive[:, None], negative[None, :]
    return float((p > n).mean() + 0.5 * (p == n).mean())


def calibrate(answers: Sequence[Answer], least_threshold: float = 0.0) -> Calibration:
    """Fit each label's slope and shift, then choose both thresholds.

    Args:
        answers: of the calibration studies.
        least_threshold: of the study's probability, where more is known than these studies show.
    """
    truth = np.array([answer.truth for answer in answers])
    logits = np.array([answer.logits for answer in answers])
    fits = [platt(logits[:, label], truth[:, label]) for label in range(logits.shape[1])]
    slope, shift = (np.array(values) for values in zip(*fits, strict=True))
    return _at_its_points(answers, slope, shift, least_threshold, Calibration(slope, shift, 0.5, 0.5, {}))


def of_shipped(calibration: Calibration, answers: Sequence[Answer], least_threshold: float = 0.0) -> Calibration:
    """The same with operating points that are chosen on the answers of what ships, in its precision: a threshold
    between two studies' scores in one precision may lie on the wrong side of one of them in another.

    Args:
        answers: of a model that has the calibration in its graph.
    """
    labels = len(calibration.slope)
    return _at_its_points(answers, np.ones(labels), np.zeros(labels), least_threshold, calibration)


def _at_its_points(
    answers: Sequence[Answer],
    slope: NDArray[np.float64],
    shift: NDArray[np.float64],
    least_threshold: float,
    calibration: Calibration,
) -> Calibration:
    truth = np.array([answer.truth[0] for answer in answers])
    said = sigmoid(np.array([answer.logits[0] for answer in answers]) * slope[0] + shift[0])
    chosen = round(best_threshold(list(said[~truth]), list(said[truth]), LEAST_SPECIFICITY + MARGIN), 3)
    threshold = max(chosen, least_threshold)
    lesion_threshold, error = best_lesion_threshold(answers, slope[0], shift[0], threshold)
    figures = {**summary(answers, slope, shift, threshold), "lesion_threshold": lesion_threshold}
    figures["threshold_of_these_studies"] = chosen
    figures |= {
        "volume_error_factor": round(float(np.exp(error)), 3),
        "slope": np.round(calibration.slope, 4).tolist(),
        "shift": np.round(calibration.shift, 4).tolist(),
    }
    return replace(calibration, threshold=threshold, lesion_threshold=lesion_threshold, figures=figures)


def best_lesion_threshold(
    answers: Sequence[Answer], slope: float, shift: float, threshold: float
) -> tuple[float, float]:
    """The map's threshold with the least error of volume where a study with blood is called, and that error.

    The error is the mean absolute logarithm of the ratio of both volumes, each with 0.5 mL added.
    """
    errors = []
    for answer in answers:
        called = sigmoid(answer.slab_logits * slope + shift) >= threshold
        if answer.truth[0] and called.any():
            errors.append(np.abs(np.log((answer.called_ml[called].sum(axis=0) + 0.5) / (answer.volume_ml.sum() + 0.5))))
    if not errors:
        return 0.5, float("nan")
    mean = np.mean(errors, axis=0)
    return LESION_THRESHOLDS[int(mean.argmin())], float(mean.min())


def summary(
    answers: Sequence[Answer], slope: NDArray[np.float64], shift: NDArray[np.float64], threshold: float
) -> dict[str, Any]:
    """What was seen on these studies, JSON-ready."""
    truth = np.array([answer.truth for answer in answers])
    said = sigmoid(np.array([answer.logits for answer in answers]) * slope + shift)
    bleeds, any_said = truth[:, 0], said[:, 0]
    volume = np.array([answer.volume_ml.sum() for answer in answers])

    def found(group: NDArray[np.bool_]) -> dict[str, int]:
        return {"studies": int(group.sum()), "found": int((any_said[group] >= threshold).sum())}

    bins = ((0, 1), (1, 5), (5, 25), (25, 10_000))
    return {
        "studies": len(answers),
        "with_blood": int(bleeds.sum()),
        "auc": _rounded(auc(any_said[bleeds], any_said[~bleeds]) if 0 < bleeds.sum() < len(bleeds) else float("nan")),
        "threshold": threshold,
        "sensitivity": _rounded(float((any_said[bleeds] >= threshold).mean()) if bleeds.any() else float("nan")),
        "specificity": _rounded(float((any_said[~bleeds] < threshold).mean()) if not bleeds.all() else float("nan")),
        "by_volume_ml": {
            f"{low} to {high}" if high < 1000 else f"above {low}": found(bleeds & (volume >= low) & (volume < high))
            for low, high in bins
        },
        "by_subtype": {name: found(truth[:, n + 1]) for n, name in enumerate(SUBTYPES)},
        "auc_by_subtype": {
            name: _rounded(auc(said[truth[:, n + 1], n + 1], said[~truth[:, n + 1], n + 1]))
            for n, name in enumerate(SUBTYPES)
            if 0 < truth[:, n + 1].sum() < len(truth)
        },
    }


def _rounded(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None


def example(studies: Store, count: int = 4) -> NDArray[np.int16]:
    """A short run of neighbouring slabs (count, 256, 256) with blood in them, for whoever wants to prove an engine.

    Raises:
        ValueError: no study has blood.
    """
    areas = studies.areas_mm2.sum(axis=1)
    # Plain to see, and not the plainest: what lies in the middle moves most when something is wrong.
    runs = [(first, end) for first, end, _ in studies.scans if areas[first:end].max() > 25 * MAP_PIXEL_MM2]
    if not runs:
        raise ValueError("no calibration study has blood to see; simulate more of them")
    first, end = min(runs, key=lambda run: float(areas[run[0] : run[1]].max()))
    peak = int(areas[first:end].argmax())
    start = min(max(peak - count // 2, 0), end - first - count)
    return np.array(studies.run(first, end)[0][start : start + count])
