"""How good a model was on studies whose truth is known: proportions, areas, agreement, each with a 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from scipy.stats import t as student

Z = 1.959964
"""The normal distribution's 97.5th percentile: every interval here is one of 95 %."""
VOLUMES_ML = (1.0, 5.0, 25.0)
THICKNESSES_MM = (1.25, 2.5, 4.0)
ATTENUATIONS_HU = (40.0, 50.0, 60.0)
SIGNALS_TO_NOISE = (5.0, 8.0, 12.0, 16.0)
SMALL_ML = 5.0
BINS = 10
_REPLICATES = 1000


@dataclass(frozen=True, slots=True)
class Outcome:
    """One study: what is true of it, and what the appliance said.

    Attributes:
        seed: of the phantom.
        family: of the simulator's settings, "training" or "unseen"; or a look-alike, where the study was drawn for it.
        volumes_ml: of blood by subtype, within the slices; empty where no voxel of the mask bleeds.
        blood_hu: mean attenuation of the blood as it was painted; 0 where none was.
        signal_to_noise: of the blood in the slab where it stands out most, as `evaluate.signal_to_noise` has it; 0 of
            none.
        thickness_mm, kernel, vendor, kvp, tilt_deg: how it was scanned.
        look_alikes: what else is in it.
        age: years.
        refused: why the gate keeps the model from it; then nothing below was asked.
        probability: of any haemorrhage.
        called_ml: the verdict's volume.
        subtypes: the verdict's probabilities.
        points_at_blood: whether one of the key slabs holds some.
        seconds: that simulating, writing and reading it took.
    """

    seed: int
    family: str
    volumes_ml: Mapping[str, float]
    blood_hu: float
    signal_to_noise: float
    thickness_mm: float
    kernel: str
    vendor: str
    kvp: float
    tilt_deg: float
    look_alikes: tuple[str, ...]
    age: int
    refused: str
    probability: float
    called_ml: float
    subtypes: Mapping[str, float]
    points_at_blood: bool
    seconds: float

    @property
    def volume_ml(self) -> float:
        """Of all blood."""
        return sum(self.volumes_ml.values())

    @property
    def bleeds(self) -> bool:
        """Whether there is any to see."""
        return bool(self.volumes_ml)

    @property
    def mostly(self) -> str:
        """The subtype that most of the blood is; "" of none."""
        return max(self.volumes_ml, key=lambda name: self.volumes_ml[name], default="")

    @property
    def unjudged(self) -> bool:
        """Whether nothing can be said of it: the gate refused it, or it bleeds, and no voxel of its slices shows it."""
        return bool(self.refused) or (self.blood_hu > 0 and not self.volumes_ml)


def wilson(found: int, of: int) -> tuple[float, float]:
    """The score interval of a proportion (Wilson, J Am Stat Assoc 1927; 22:209)."""
    if not of:
        return 0.0, 1.0
    share, square = found / of, Z * Z
    middle = (share + square / (2 * of)) / (1 + square / of)
    half = Z * math.sqrt(share * (1 - share) / of + square / (4 * of * of)) / (1 + square / of)
    return max(0.0, middle - half), min(1.0, middle + half)


def proportion(found: int, of: int) -> dict[str, Any]:
    """``found`` of ``of`` as {value, low, high, n}; the value is None of nothing."""
    low, high = wilson(found, of)
    return _estimate(found / of if of else None, low, high, of)


def auc(positive: Sequence[float], negative: Sequence[float]) -> dict[str, Any]:
    """Area under the ROC curve as {value, low, high, n}: how often a positive scores above a negative, ties half.

    Its variance is DeLong's (Biometrics 1988; 44:837), by ranks (Sun and Xu, IEEE Signal Process Lett 2014; 21:1389);
    the interval is symmetric on the logit, so that it stays within 0..1 (Pepe 2003, 5.2.4). Where all positives score
    above all negatives that variance is zero, and the interval is Wilson's for all of the smaller group.

    Raises:
        ValueError: one of the groups is empty.
    """
    m, n = len(positive), len(negative)
    if not m or not n:
        raise ValueError(f"an AUC needs both groups, not {m} and {n}")
    ranks = rankdata(np.concatenate([positive, negative]))
    above = (ranks[:m] - rankdata(positive)) / n  # of each positive: the share of negatives below it
    below = 1 - (ranks[m:] - rankdata(negative)) / m  # of each negative: the share of positives above it
    area = float(above.mean())
    variance = sum(float(part.var(ddof=1)) / len(part) for part in (above, below) if len(part) > 1)
    if not 0 < area < 1 or variance == 0:
        low, high = wilson(round(area * min(m, n)), min(m, n))
        return _estimate(area, low, high, m + n)
    logit, half = math.log(area / (1 - area)), Z * math.sqrt(variance) / (area * (1 - area))
    return _estimate(area, _logistic(logit - half), _logistic(logit + half), m + n)


def roc(positive: Sequence[float], negative: Sequence[float]) -> list[tuple[float, float]]:
    """(1 - specificity, sensitivity) at every threshold, from (0, 0) to (1, 1)."""
    p, n = np.sort(positive), np.sort(negative)
    thresholds = np.unique(np.concatenate([p, n]))[::-1]
    false = 1 - np.searchsorted(n, thresholds) / len(n)
    true = 1 - np.searchsorted(p, thresholds) / len(p)
    return [(0.0, 0.0), *((float(x), float(y)) for x, y in zip(false, true, strict=True))]


def reliability(probabilities: Sequence[float], truths: Sequence[bool]) -> dict[str, Any]:
    """Calibration: Brier score, expected calibration error (ten bins of equal width), and the bins.

    The intervals of both scores are bootstrap percentiles of 1,000 samples of the studies.
    """
    said, true = np.asarray(probabilities, np.float64), np.asarray(truths, np.float64)
    place = np.minimum((said * BINS).astype(np.intp), BINS - 1)
    bins = []
    for index in range(BINS):
        members = place == index
        count = int(members.sum())
        if count:
            observed = proportion(int(true[members].sum()), count)
            bins.append({"from": index / BINS, "to": (index + 1) / BINS, "said": _round(said[members].mean()),
                         "observed": observed})  # fmt: skip

    def brier(some: NDArray[np.intp]) -> float:
        return float(np.square(said[some] - true[some]).mean())

    def error(some: NDArray[np.intp]) -> float:
        gaps = np.bincount(place[some], said[some] - true[some], BINS)
        return float(np.abs(gaps).sum() / len(some))

    return {"brier": _bootstrap(brier, len(said)), "ece": _bootstrap(error, len(said)), "bins": bins}


def agreement(truth_ml: Sequence[float], called_ml: Sequence[float]) -> dict[str, Any] | None:
    """Bland and Altman's bias and limits of agreement of called minus true volumes (Lancet 1986; i:307).

    Returns:
        {bias, lower_limit, upper_limit: {value, low, high, n}} in mL, their intervals as given there (Student's t
        times s/√n and s√(3/n)), and the median of called over true; None of fewer than three studies.
    """
    if len(truth_ml) < 3:
        return None
    truth, called = np.asarray(truth_ml, np.float64), np.asarray(called_ml, np.float64)
    differences = called - truth
    count, bias, spread = len(truth), float(differences.mean()), float(differences.std(ddof=1))
    error = float(student.ppf(0.975, count - 1)) * spread / math.sqrt(count)
    error_of_limit = math.sqrt(3) * error
    lower, upper = bias - Z * spread, bias + Z * spread
    return {
        "bias": _estimate(bias, bias - error, bias + error, count),
        "lower_limit": _estimate(lower, lower - error_of_limit, lower + error_of_limit, count),
        "upper_limit": _estimate(upper, upper - error_of_limit, upper + error_of_limit, count),
        "median_ratio": _round(float(np.median(called / truth))),
    }


def summary(outcomes: Sequence[Outcome], threshold: float, others: Sequence[Outcome] = ()) -> dict[str, Any]:
    """The figures of some studies at an operating point, JSON-ready.

    Args:
        outcomes: at least one with blood and one without that can be judged; the others are only counted.
        others: studies without blood that count among their look-alikes alone.
    """
    seen = [one for one in outcomes if not one.unjudged]
    positive, negative = [one for one in seen if one.bleeds], [one for one in seen if not one.bleeds]
    small = [one for one in positive if one.volume_ml < SMALL_ML]
    found = [one for one in positive if one.probability >= threshold]
    named = sum(max(one.subtypes, key=lambda name: one.subtypes[name]) in one.volumes_ml for one in found)
    sensitivity = _share(threshold, called=True)
    specificity = _share(threshold, called=False)
    subtypes = sorted({name for one in positive for name in one.volumes_ml})
    like = [*negative, *(one for one in others if not one.unjudged)]
    look_alikes = sorted({kind for one in like for kind in one.look_alikes})

    def both(groups: Iterable[tuple[str, Callable[[Outcome], bool]]]) -> dict[str, Any]:
        return {
            name: {
                "sensitivity": sensitivity(filter(inside, positive)),
                "specificity": specificity(filter(inside, negative)),
            }
            for name, inside in groups
            if any(map(inside, seen))
        }

    return {
        "auc": auc([one.probability for one in positive], [one.probability for one in negative]),
        "sensitivity": sensitivity(positive),
        "specificity": specificity(negative),
        "sensitivity_under_5_ml": sensitivity(small),
        "by_subtype": {name: sensitivity(one for one in positive if name in one.volumes_ml) for name in subtypes},
        "by_volume_ml": {
            name: sensitivity(one for one in positive if low <= one.volume_ml < high)
            for name, low, high in ranges(VOLUMES_ML)
        },
        "by_subtype_and_volume_ml": {
            subtype: {
                name: sensitivity(one for one in positive if one.mostly == subtype and low <= one.volume_ml < high)
                for name, low, high in ranges(VOLUMES_ML)
            }
            for subtype in subtypes
        },
        "by_blood_hu": {
            name: sensitivity(one for one in positive if low <= one.blood_hu < high)
            for name, low, high in ranges(ATTENUATIONS_HU)
        },
        "by_signal_to_noise": {
            name: sensitivity(one for one in positive if low <= one.signal_to_noise < high)
            for name, low, high in ranges(SIGNALS_TO_NOISE)
        },
        "by_thickness_mm": both(
            (name, lambda one, low=low, high=high: low <= one.thickness_mm < high)  # type: ignore[misc]
            for name, low, high in ranges(THICKNESSES_MM)
        ),
        "by_kernel": both(_each(seen, lambda one: one.kernel)),
        "by_vendor": both(_each(seen, lambda one: one.vendor)),
        "by_look_alike": {
            "none": specificity(one for one in like if not one.look_alikes),
            **{kind: specificity(one for one in like if kind in one.look_alikes) for kind in look_alikes},
        },
        "calibration": reliability([one.probability for one in seen], [one.bleeds for one in seen]),
        "volume_agreement": agreement([one.volume_ml for one in found], [one.called_ml for one in found]),
        "subtype_named_right": proportion(named, len(found)),
        "key_slab_holds_blood": proportion(sum(one.points_at_blood for one in found), len(found)),
        "refused": proportion(sum(bool(one.refused) for one in outcomes), len(outcomes)),
        "blood_too_little_to_see": proportion(sum(one.unjudged and not one.refused for one in outcomes), len(outcomes)),
    }


def ranges(edges: Sequence[float]) -> list[tuple[str, float, float]]:
    """(name, from, to) of the ranges between rising edges, and of the two beyond them; the first begins at 0."""
    names = [f"below {edges[0]:g}", *(f"{a:g} to {b:g}" for a, b in pairwise(edges)),
             f"{edges[-1]:g} and more"]  # fmt: skip
    return list(zip(names, (0.0, *edges), (*edges, math.inf), strict=True))


def _share(threshold: float, *, called: bool) -> Callable[[Iterable[Outcome]], dict[str, Any]]:
    """What gives the proportion of studies that are called positive, or that are not."""

    def of(group: Iterable[Outcome]) -> dict[str, Any]:
        right = [(one.probability >= threshold) == called for one in group]
        return proportion(sum(right), len(right))

    return of


def _each(
    outcomes: Sequence[Outcome], key: Callable[[Outcome], str]
) -> Iterable[tuple[str, Callable[[Outcome], bool]]]:
    for name in sorted({key(one) for one in outcomes}):
        yield name, lambda one, name=name: key(one) == name  # type: ignore[misc]


def _bootstrap(score: Callable[[NDArray[np.intp]], float], count: int) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    replicates = [score(rng.integers(0, count, count)) for _ in range(_REPLICATES)]
    low, high = np.percentile(replicates, (2.5, 97.5))
    return _estimate(score(np.arange(count)), float(low), float(high), count)


def _estimate(value: float | None, low: float, high: float, n: int) -> dict[str, Any]:
    return {"value": None if value is None else _round(value), "low": _round(low), "high": _round(high), "n": n}


def _round(value: float) -> float:
    return round(float(value), 4)


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))
