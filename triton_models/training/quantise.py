"""The same network in eight bits, and whether that is worth shipping.

QDQ with unsigned activations and signed weights, a scale for each output channel (U8S8). Weights keep seven bits:
without VNNI, AVX2 adds pairs of products in sixteen bits and saturates with eight.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from .calibrate import Answer, Calibration, ask, predictor, sigmoid, summary
from .samples import Store, network_input

WITHIN = 0.005
"""How much worse than in single precision AUC, sensitivity and specificity may be."""
FASTER = 1.15
"""How much faster eight bits must be on this processor to be shipped on it."""
SLABS = 96
"""Of the training data, that the ranges of activations are taken from."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What is shipped.

    Attributes:
        name: "fp32" or "int8".
        model: the file.
        figures: what the choice rests on, JSON-ready; both precisions at the threshold of single precision.
        answers: of what is shipped on the calibration studies, where they are its own: the calibration is in its graph.
    """

    name: str
    model: Path
    figures: dict[str, Any]
    answers: Sequence[Answer] | None


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, slabs: NDArray[np.float32]) -> None:
        self._left: Iterator[dict[str, NDArray[np.float32]]] = iter(
            [{"slabs": slabs[n : n + 8]} for n in range(0, len(slabs), 8)]
        )

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return next(self._left, None)


def quantise(model: Path, out: Path, store: Store) -> None:
    """Write a model in eight bits but for its first convolution, the two that make the maps and what follows.

    In eight bits those two, and the sums behind them, left a slab's probability a few dozen values to choose from.

    Args:
        model: in single precision.
        out: the file to write.
        store: training data, half of whose slabs taken for the ranges bleed.
    """
    rng = np.random.default_rng(5)
    bleeds = store.areas_mm2.sum(axis=1) > 12
    picked = [int(n) for group in (bleeds, ~bleeds) for n in rng.choice(np.flatnonzero(group), SLABS // 2)]
    slabs = network_input(np.stack([store.sample(n)[0] for n in picked]))
    ready = out.with_suffix(".ready.onnx")
    quant_pre_process(str(model), str(ready), skip_symbolic_shape=True)
    nodes = list(onnx.load(str(ready)).graph.node)
    convolutions = [n for n, node in enumerate(nodes) if node.op_type == "Conv"]
    quantize_static(
        str(ready),
        str(out),
        _Reader(slabs),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["Conv", "Add", "Relu", "Resize"],
        nodes_to_exclude=[nodes[convolutions[0]].name, *(node.name for node in nodes[convolutions[-2] :])],
    )
    ready.unlink()


def speed(model: Path, threads: int, *, seconds: float = 2.0, batch: int = 16) -> float:
    """Slabs a second in ONNX Runtime: the best of the batches that fit into that time."""
    predict = predictor(model, threads)
    slabs = np.random.default_rng(0).random((batch, 9, 256, 256), dtype=np.float32)
    predict(slabs)
    best, ends = np.inf, time.monotonic() + seconds
    while time.monotonic() < ends:
        started = time.perf_counter()
        predict(slabs)
        best = min(best, time.perf_counter() - started)
    return batch / best


def choose(work: Path, store: Store, studies: Store, calibration: Calibration, answers: Sequence[Answer]) -> Choice:
    """Quantise `fp32.onnx` of the work folder, measure both on the calibration studies and choose.

    Eight bits are chosen where they are faster by `FASTER` on one thread and no figure is worse by more than `WITHIN`.

    Args:
        answers: of the network in single precision, before its calibration.
    """
    models = {"fp32": work / "fp32.onnx", "int8": work / "int8.onnx"}
    quantise(models["fp32"], models["int8"], store)
    # Eight bits are asked with the calibration in their graph.
    told = {
        "fp32": (answers, calibration.slope, calibration.shift),
        "int8": (ask(predictor(models["int8"]), studies), np.ones(6), np.zeros(6)),
    }
    figures: dict[str, Any] = {}
    said = {}
    for name, model in models.items():
        of, slope, shift = told[name]
        said[name] = sigmoid(np.array([answer.logits[0] for answer in of]) * slope[0] + shift[0])
        seen = summary(of, slope, shift, calibration.threshold)
        figures[name] = {
            **{key: seen[key] for key in ("auc", "sensitivity", "specificity")},
            "slabs_per_second_one_thread": round(speed(model, 1), 1),
            "slabs_per_second_two_threads": round(speed(model, 2), 1),
            "bytes": model.stat().st_size,
        }
    figures["largest_difference_of_a_study"] = round(float(np.abs(said["fp32"] - said["int8"]).max()), 4)
    worse = max(
        (figures["fp32"][key] or 0.0) - (figures["int8"][key] or 0.0) for key in ("auc", "sensitivity", "specificity")
    )
    key = "slabs_per_second_one_thread"
    gain = figures["int8"][key] / figures["fp32"][key]
    name = "int8" if worse <= WITHIN and gain >= FASTER else "fp32"
    figures |= {"int8_worse_by": round(worse, 4), "int8_faster_by": round(gain, 3), "shipped": name}
    return Choice(name, models[name], figures, told["int8"][0] if name == "int8" else None)
