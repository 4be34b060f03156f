"""Train the reference model on simulated slabs and write its package.

    python -m triton_models.training.train --out triton_models/ich_reference

Seeded and on one thread. Simulated slabs and a checkpoint after each epoch lie in the work folder: a run that was
cut short goes on from there.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from appliance.inference.preprocess import window

from . import evaluate
from .export import export
from .haemorrhage import SUBTYPES
from .network import Network
from .samples import HEADS_PER_SHARD, SLABS_PER_HEAD, shard, varied

VERSION = "0.1.0"
PRESENT_MM2, ABSENT_MM2 = 40.0, 6.0
"""A slab bleeds from the first area on, and does not below the second; between them it teaches the map only."""
MAP_PIXEL_MM2 = 16.0
CALIBRATION_SEEDS, TEST_SEEDS = 1_000_000, 2_000_000


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def _batches(
    rng: np.random.Generator, folder: Path, seed: int, shards: int, batch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch: slabs (n, 3, 256, 256) and coverage (n, 5, 64, 64), mixed over a few shards at a time."""
    order = rng.permutation(shards)
    for start in range(0, shards, 6):
        group = [shard(folder, seed, int(number)) for number in order[start : start + 6]]
        places = [(g, n) for g, samples in enumerate(group) for n in range(len(samples.fields))]
        rng.shuffle(places)
        for first in range(0, len(places) - batch + 1, batch):
            pairs = [varied(rng, group[g].fields[n], group[g].covered[n]) for g, n in places[first : first + batch]]
            slabs = np.stack([window(hu) for hu, _ in pairs])
            yield torch.from_numpy(slabs), torch.from_numpy(np.stack([blood for _, blood in pairs]))


def loss(maps: Tensor, slabs: Tensor, covered: Tensor) -> Tensor:
    """Cross-entropy and Dice of the maps, cross-entropy of the slabs.

    Args:
        maps: logits (n, 6, 64, 64).
        slabs: logits (n, 6).
        covered: (n, 5, 64, 64), share of each map pixel that a subtype covers.
    """
    target = torch.cat([covered.sum(dim=1, keepdim=True).clamp(max=1), covered], dim=1)
    dense = functional.binary_cross_entropy_with_logits(maps, target, reduction="none")
    dense = (dense * (1 + 5 * target)).mean(dim=(0, 2, 3)).sum() * 20
    called = torch.sigmoid(maps[:, 0])
    both = (called * target[:, 0]).sum()
    dice = 1 - (2 * both + 1) / (called.square().sum() + target[:, 0].square().sum() + 1)
    area = target.sum(dim=(2, 3)) * MAP_PIXEL_MM2
    known = ((area >= PRESENT_MM2) | (area < ABSENT_MM2)).float()
    whole = functional.binary_cross_entropy_with_logits(slabs, (area >= PRESENT_MM2).float(), reduction="none")
    return dense + dice + (whole * known).mean(dim=0).sum()


def fit(network: Network, work: Path, *, seed: int, shards: int, epochs: int, batch: int, rate: float) -> int:
    """Train in place, from the work folder's checkpoint if it holds one; returns the number of slabs seen."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-3)
    steps = epochs * (shards * HEADS_PER_SHARD * SLABS_PER_HEAD // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps + 1, pct_start=0.1)
    checkpoint = work / f"checkpoint-{seed}-{shards}-{epochs}.pt"
    done = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(state["network"])
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        done = int(state["epochs"])
        _say(f"went on after epoch {done}")
    network.train().to(memory_format=torch.channels_last)
    for epoch in range(done, epochs):
        rng = np.random.default_rng([seed, 11, epoch])
        started, total, seen = time.monotonic(), 0.0, 0
        for slabs, covered in _batches(rng, work, seed, shards, batch):
            maps, logits = network(slabs.to(memory_format=torch.channels_last))
            value = loss(maps, logits, covered)
            optimiser.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimiser.step()
            schedule.step()
            total += float(value.detach()) * len(slabs)
            seen += len(slabs)
            if seen % (100 * batch) == 0:
                speed = seen / (time.monotonic() - started)
                _say(f"epoch {epoch + 1} of {epochs}: {seen} slabs, loss {total / seen:.3f}, {speed:.0f} slabs/s")
        _say(f"epoch {epoch + 1} of {epochs}: loss {total / max(1, seen):.4f}")
        torch.save(
            {
                "network": network.state_dict(),
                "optimiser": optimiser.state_dict(),
                "schedule": schedule.state_dict(),
                "epochs": epoch + 1,
            },
            checkpoint,
        )
    return epochs * shards * HEADS_PER_SHARD * SLABS_PER_HEAD


def predictor(model: Path) -> evaluate.Predict:
    """An exported model on one thread of ONNX Runtime, as `evaluate` wants it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])

    def predict(slabs: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        probabilities, maps = session.run(None, {"slabs": slabs})
        return probabilities, maps

    return predict


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model package")
    parser.add_argument("--work", type=Path, default=Path("build/ich_reference"), help="samples and checkpoints")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--shards", type=int, default=22, help="of 50 heads, 6 slabs each")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=3e-3, help="the highest learning rate")
    parser.add_argument("--calibration", type=int, default=60, help="studies that set the thresholds")
    parser.add_argument("--test", type=int, default=100, help="studies that the figures come from")
    arguments = parser.parse_args()

    started = time.monotonic()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    torch.manual_seed(arguments.seed)
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    for number in range(arguments.shards):
        shard(work, arguments.seed, number)
        if number % 5 == 4:
            _say(f"simulated {number + 1} of {arguments.shards} shards")
    simulated = time.monotonic()

    network = Network()
    seen = fit(
        network,
        work,
        seed=arguments.seed,
        shards=arguments.shards,
        epochs=arguments.epochs,
        batch=arguments.batch,
        rate=arguments.rate,
    )
    network.to(memory_format=torch.contiguous_format)
    network.eval()
    trained = time.monotonic()
    _say("trained; calibrating")
    difference = export(network, work / "uncalibrated", version=VERSION, threshold=0.5, lesion_threshold=0.5)
    predict = predictor(work / "uncalibrated" / "model.onnx")
    calibration = evaluate.studies(predict, range(CALIBRATION_SEEDS, CALIBRATION_SEEDS + arguments.calibration), _say)
    threshold = evaluate.best_threshold(calibration)
    lesion_threshold = evaluate.best_lesion_threshold(calibration)
    test = evaluate.studies(predict, range(TEST_SEEDS, TEST_SEEDS + arguments.test), _say)
    slabs = np.zeros((16, 3, 256, 256), dtype=np.float32)
    clock = time.monotonic()
    for _ in range(4):
        predict(slabs)
    speed = 64 / (time.monotonic() - clock)
    export(network, arguments.out, version=VERSION, threshold=threshold, lesion_threshold=lesion_threshold)
    ended = time.monotonic()
    figures: dict[str, Any] = {
        "command": "python -m triton_models.training.train "
        + " ".join(f"--{name} {value}" for name, value in vars(arguments).items() if name not in ("out", "work")),
        "seed": arguments.seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "numpy": np.__version__,
            "opencv": cv2.__version__,
        },
        "parameters": sum(p.numel() for p in network.parameters()),
        "slabs_simulated": arguments.shards * HEADS_PER_SHARD * SLABS_PER_HEAD,
        "slabs_seen": seen,
        "seconds_of_this_run": {
            "simulate": round(simulated - started),
            "train": round(trained - simulated),
            "evaluate_and_export": round(ended - trained),
        },
        "onnx_runtime_slabs_per_second_one_thread": round(speed, 1),
        "onnx_runtime_against_torch": difference,
        "calibration": evaluate.summary(calibration, threshold, lesion_threshold),
        "test": evaluate.summary(test, threshold, lesion_threshold),
        "subtypes": list(SUBTYPES),
    }
    (arguments.out / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    _say(f"wrote {arguments.out}: test AUC {figures['test']['auc']}")


if __name__ == "__main__":
    main()
