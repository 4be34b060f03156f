"""Make the reference model: simulate heads, train, calibrate, quantise, write the package.

    python -m triton_models.training.train --out triton_models/ich_reference

Simulated heads and checkpoints lie in the work folder: a run that was cut short goes on from there. The simulated
heads follow from the seed bit for bit on the same library versions. The weights do so only with the same number of
threads on the same kind of processor, because sums of floating-point numbers are divided among threads; and `--minutes`
turns into a number of steps by the speed that is measured, which is kept in the work folder and in metrics.json
(`--steps` gives it outright).
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import scipy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from appliance.inference.preprocess import WINDOWS, window_constants

from . import calibrate, quantise
from .export import export, to_onnx
from .inherit import inherit
from .network import INPUTS, Network
from .progress import Bar, say
from .samples import CALIBRATION, CROP, MAP_PIXEL_MM2, TRAIN, Heads, Store, Variety, make

VERSION = "0.8.0"
PRESENT_MM2 = 12.0
"""A slab with so much blood is one that bleeds; what is below teaches its map only."""
PLAIN_SHARE = 0.4
"""A pixel of the map that bleeds so much bleeds. Taught the share itself, a map is no surer of the few pixels of a
small lesion than of the rim of a large one, and its peaks are what a slab is called by."""
BLOCK = 100
"""Steps between two looks at which negative slabs are the hard ones."""
EMA = 0.998
WARM = 300
"""Steps in which the learning rate rises."""
AHEAD = 16
"""Batches that are prepared at once."""


def loss(maps: Tensor, slabs: Tensor, covered: Tensor) -> Tensor:
    """Cross-entropy and Dice of the maps, cross-entropy of the slabs.

    Args:
        maps: logits (n, 6, h, w).
        slabs: logits (n, 6).
        covered: (n, 5, h, w), share of each map pixel that a subtype covers.
    """
    target = torch.cat([covered.sum(dim=1, keepdim=True).clamp(max=1), covered], dim=1)
    area = target.sum(dim=(2, 3)) * MAP_PIXEL_MM2
    target = (target / PLAIN_SHARE).clamp(max=1)
    dense = functional.binary_cross_entropy_with_logits(maps, target, reduction="none")
    # Half of all lesions are under 1 mL: without the weight their few pixels would drown in the large ones'.
    small = (400 / area.clamp(min=16)).sqrt().clamp(1, 4)[:, :, None, None]
    wrong = (target - torch.sigmoid(maps.detach())).abs()
    dense = (dense * (0.2 + wrong) * (1 + 4 * small * target)).mean(dim=(0, 2, 3))
    called = torch.sigmoid(maps[:, 0]).flatten(1)
    truth = target[:, 0].flatten(1)
    both = (called * truth).sum(dim=1)
    # A small lesion that is missed costs as much as a large one; a pixel that is called where there is none, less.
    even = torch.where(area[:, 0] > 0, 0.5, 4.0)
    dice = 1 - (2 * both + even) / (called.square().sum(dim=1) + truth.square().sum(dim=1) + even)
    present = (area >= PRESENT_MM2).float()
    told = ((area >= PRESENT_MM2) | (area < 1)).float()
    whole = functional.binary_cross_entropy_with_logits(slabs, present, reduction="none")
    whole = (whole * told).mean(dim=0)
    return 20 * (dense[0] + 0.5 * dense[1:].sum()) + dice.mean() + 2 * whole[0] + 0.5 * whole[1:].sum()


class Sampler:
    """Which slabs a block of steps looks at: half of them bleed, and of both halves those come more often that the
    network gets wrong.

    Attributes:
        suspicion: (slabs,) what the network last said of each, 0..1.
    """

    def __init__(self, store: Store) -> None:
        total = store.areas_mm2.sum(axis=1)
        self._bleeds = np.flatnonzero(total >= PRESENT_MM2)
        self._clean = np.flatnonzero(total < 1)
        # A lesion of one slab is met as often as a quarter of one of sixteen.
        weights = np.zeros(len(store))
        for first, end, scan in store.scans:
            areas = store.areas_mm2[first:end] >= PRESENT_MM2
            weights[first:end] = (areas / np.sqrt(np.maximum(areas.sum(axis=0), 1))).max(axis=1)
            # Large bleeds are found as they are: those of studies that have little come up to twice as often.
            weights[first:end] *= np.clip(np.sqrt(5 / max(sum(scan["volume_ml"].values()), 0.01)), 1, 2)
        self._weights = weights[self._bleeds]
        self.suspicion = np.full(len(store), 0.5, dtype=np.float32)
        self.suspicion[self._clean] = 0.15  # before anything is known: far from those that were taken for blood

    def draw(self, rng: np.random.Generator, steps: int, batch: int) -> NDArray[np.intp]:
        """(steps, batch) numbers of slabs."""
        half = batch // 2
        # Some lesions nobody could see: the missed come at most five times as often as what is plain.
        odds = self._weights * (1.25 - self.suspicion[self._bleeds].astype(np.float64))
        bleeds = rng.choice(self._bleeds, (steps, half), p=odds / odds.sum())
        # What calls one clean study in twenty is one slab in a thousand: those have to come again and again.
        odds = 0.02 + self.suspicion[self._clean].astype(np.float64) ** 2
        clean = rng.choice(self._clean, (steps, batch - half), p=odds / odds.sum())
        return np.concatenate([bleeds, clean], axis=1)


def _batch(
    store: Store, variety: Variety, seed: tuple[int, ...], slabs: NDArray[np.intp], crop: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    lowest, scale = window_constants(WINDOWS, 0)
    # Channels last from the start, which the convolutions want; `network_input` says the same of one sample.
    channels = np.empty((len(slabs), *crop, INPUTS // len(WINDOWS), len(WINDOWS)), dtype=np.float32)
    truth = []
    for slab, seen in zip(slabs, channels, strict=True):
        hu, blood = variety(rng, *store.sample(int(slab)), crop)
        truth.append(blood)
        for n in range(len(WINDOWS)):
            seen[..., n] = np.clip((hu - lowest[n]) * scale[n], 0, 1)
    inputs = torch.from_numpy(channels.reshape(*channels.shape[:3], INPUTS))
    return inputs.permute(0, 3, 1, 2), torch.from_numpy(np.stack(truth))


def _batches(
    pool: ThreadPoolExecutor, store: Store, variety: Variety, seed: int, first: int, slabs: NDArray[np.intp]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a block; one in sixteen shows the whole field.

    They are prepared on all threads before the network goes on: beside it, each step took a tenth longer, because its
    threads wait for the one that has less of a core.
    """

    def prepared(n: int) -> tuple[Tensor, Tensor]:
        crop = (256, 256) if n % 16 == 15 else CROP
        return _batch(store, variety, (seed, 12, first + n), slabs[n], crop)

    for start in range(0, len(slabs), AHEAD):
        yield from list(pool.map(prepared, range(start, min(start + AHEAD, len(slabs)))))


class _Average:
    """The exponential moving average of a network's weights; its statistics too."""

    def __init__(self, network: nn.Module) -> None:
        self.network = copy.deepcopy(network).eval()

    def follow(self, network: nn.Module, step: int) -> None:
        keep = min(EMA, (1 + step) / (10 + step))
        with torch.no_grad():
            for mine, other in zip(self.network.state_dict().values(), network.state_dict().values(), strict=True):
                if mine.is_floating_point():
                    mine.lerp_(other, 1 - keep)
                else:
                    mine.copy_(other)


def convolves_in_half(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor has instructions for bfloat16. Without them it takes ten times as long as single precision.

    Args:
        cpuinfo: what Linux says of the processor.
    """
    try:
        flags = next(line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return False
    return bool({"avx512_bf16", "amx_bf16"} & set(flags.split()))


def measured_steps(minutes: float, batch: int, half: bool) -> int:
    """How many steps fit into so many minutes on this machine, from the time of some."""
    network = Network().to(memory_format=torch.channels_last)
    slabs = torch.rand(batch, INPUTS, *CROP).to(memory_format=torch.channels_last)
    covered = torch.zeros(batch, 5, CROP[0] // 4, CROP[1] // 4)
    for n in range(25):
        if n == 5:
            started = time.monotonic()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            maps, logits = network(slabs)
        loss(maps.float(), logits.float(), covered).backward()
    seconds = (time.monotonic() - started) / 20
    # Optimiser, batches in the background and the whole fields came to about a sixth where it was tried.
    return max(BLOCK, round(minutes * 60 / (1.17 * seconds) / BLOCK) * BLOCK)


def cooling(steps: int) -> int:
    """The step from which on the rate sinks."""
    return round(0.6 * steps)


def pace(step: int, steps: int) -> float:
    """The learning rate of a step as a share of the highest: up at first, level for long, down to the end."""
    if step < WARM:
        return (step + 1) / WARM
    left = (steps - step) / max(steps - cooling(steps), 1)
    return min(1.0, max(left, 0.005))


def fit(
    store: Store,
    work: Path,
    *,
    seed: int,
    steps: int,
    batch: int,
    rate: float,
    half: bool,
    start: Path | None,
    heads: int,
) -> tuple[Network, float, list[list[int]]]:
    """Train, from the work folder's checkpoint if it holds one of the same run.

    As long as the rate has not begun to sink, a run may go on with more steps in all and with more heads; one that is
    asked for no more steps than it has had ends there.

    Args:
        store: what to train on.
        heads: how many that are.
        work: folder of the checkpoint.
        seed, steps, batch, rate, half: as the command has them.
        start: a model whose weights come first; None begins at random.

    Returns:
        The average of the last weights, in evaluation mode; the seconds that training took in all; and from which step
        on there were how many heads.
    """
    torch.manual_seed(seed)
    network = Network().to(memory_format=torch.channels_last)
    variety = Variety(seed)
    sampler = Sampler(store)
    if start is not None:
        some = sampler.draw(np.random.default_rng([seed, 13]), 1, 96)[0]
        try:
            inherit(network, start, _batch(store, variety, (seed, 14), some, (256, 256))[0])
        except ValueError as error:
            raise SystemExit(f"--start: {error}") from error
    average = _Average(network)
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}])
    if not steps:
        return average.network.to(memory_format=torch.contiguous_format), 0.0, [[0, heads]]
    checkpoint = work / f"checkpoint-{seed}-{batch}-{rate:g}-{'half' if half else 'single'}.pt"
    done, spent, joined = 0, 0.0, [[0, heads]]
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        done, spent, joined = int(state["steps"]), float(state["seconds"]), state["joined"]
        if cooling(int(state["of"])) < done < steps and int(state["of"]) != steps:
            raise SystemExit(f"{checkpoint} was ending a training of {state['of']} steps; it cannot go on to {steps}")
        network.load_state_dict(state["network"])
        average.network.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        known = state["suspicion"].numpy()
        sampler.suspicion[: len(known)] = known
        if joined[-1][1] != heads:
            joined.append([done, heads])
        say(f"goes on after step {done}")
    network.train()
    bar = Bar("training", steps, done)
    started, saved = time.monotonic(), time.monotonic()
    lately = 0.0
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for first in range(done, steps, BLOCK):
            count = min(BLOCK, steps - first)
            picked = sampler.draw(np.random.default_rng([seed, 11, first]), count, batch)
            total = 0.0
            for n, (slabs, covered) in enumerate(_batches(pool, store, variety, seed, first, picked)):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                    maps, logits = network(slabs)
                value = loss(maps.float(), logits.float(), covered)
                for group in optimiser.param_groups:
                    group["lr"] = rate * pace(first + n, steps)
                optimiser.zero_grad()
                value.backward()
                nn.utils.clip_grad_norm_(network.parameters(), 5.0)
                optimiser.step()
                average.follow(network, first + n)
                said = torch.sigmoid(logits[:, 0].detach()).numpy()
                sampler.suspicion[picked[n]] = 0.2 * sampler.suspicion[picked[n]] + 0.8 * said
                total += float(value.detach())
                bar.show(first + n + 1, f"loss {lately:.3f}")
            lately = total / count
            if time.monotonic() - saved > 60 or first + count == steps:
                saved = time.monotonic()
                state = {
                    "network": network.state_dict(),
                    "average": average.network.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "suspicion": torch.from_numpy(sampler.suspicion),
                    "steps": first + count,
                    "of": steps,
                    "joined": joined,
                    "seconds": spent + saved - started,
                }
                staged = checkpoint.with_suffix(".part")
                torch.save(state, staged)
                staged.replace(checkpoint)
    trained: Network = average.network.to(memory_format=torch.contiguous_format)
    return trained, spent + time.monotonic() - started, joined


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model package")
    parser.add_argument("--work", type=Path, default=Path("build/ich_reference"), help="samples and checkpoints")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--heads", type=int, default=400, help="to train on, four scans each")
    parser.add_argument(
        "--also",
        type=_heads,
        action="append",
        default=[],
        metavar="KIND-SEED:COUNT",
        help="heads of an earlier training or calibration to train on as well, in the work folder; may come again",
    )
    parser.add_argument(
        "--calibration", type=int, default=120, help="heads whose two studies calibrate and set the thresholds"
    )
    parser.add_argument("--minutes", type=float, default=60, help="to train; becomes a number of steps")
    parser.add_argument(
        "--steps", type=int, help="to train, whatever the minutes; 0 calibrates the weights of --start as they are"
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=3e-3, help="the highest learning rate")
    parser.add_argument("--start", type=Path, help="a package's model_fp32.onnx to begin with, of the same network")
    parser.add_argument(
        "--half",
        action=argparse.BooleanOptionalAction,
        default=convolves_in_half(),
        help="convolve in bfloat16; else in single precision (default: what this processor does faster)",
    )
    parser.add_argument("--least-threshold", type=float, default=0.0, help="of the study's probability")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="and processes that simulate")
    parser.add_argument("--only", choices=("simulate",), help="stop after that")
    arguments = parser.parse_args()

    clock = {"start": time.monotonic()}
    torch.set_num_threads(arguments.threads)
    cv2.setNumThreads(1)
    work: Path = arguments.work
    training = [Heads(TRAIN, arguments.seed, arguments.heads), *arguments.also]
    calibration_heads = Heads(CALIBRATION, arguments.seed, arguments.calibration)
    if calibration_heads.seed in {heads.seed for heads in arguments.also if heads.kind is CALIBRATION}:
        parser.error(f"--also: heads of {calibration_heads} are to calibrate, and may not be trained on")
    for heads in training:
        make(work, heads, processes=arguments.threads)
    if arguments.only == "simulate":
        make(work, calibration_heads, processes=arguments.threads)
        return
    clock["simulated"] = time.monotonic()

    store = Store(work, training)
    head_count = sum(heads.count for heads in training)
    plan = work / f"steps-{arguments.seed}-{arguments.minutes:g}-{arguments.batch}"
    if arguments.steps == 0 and arguments.start is None:
        parser.error("--steps 0: name the weights to calibrate with --start")
    if arguments.steps is None and not plan.exists():
        plan.write_text(str(measured_steps(arguments.minutes, arguments.batch, arguments.half)), encoding="ascii")
    steps = int(plan.read_text(encoding="ascii")) if arguments.steps is None else arguments.steps
    say(f"{steps} steps of {arguments.batch} on {len(store)} slabs")
    network, seconds, joined = fit(
        store,
        work,
        seed=arguments.seed,
        steps=steps,
        batch=arguments.batch,
        rate=arguments.rate,
        half=arguments.half,
        start=arguments.start,
        heads=head_count,
    )
    make(work, calibration_heads, processes=arguments.threads)
    clock["trained"] = time.monotonic()

    say("calibrating")
    difference = to_onnx(network, work / "uncalibrated.onnx")
    studies = Store(work, [calibration_heads])
    answers = calibrate.ask(calibrate.predictor(work / "uncalibrated.onnx"), studies)
    calibration = calibrate.calibrate(answers, arguments.least_threshold)
    to_onnx(network, work / "fp32.onnx", slope=calibration.slope, shift=calibration.shift)
    say("quantising")
    choice = quantise.choose(work, store, studies, calibration, answers)
    if choice.answers is not None:
        calibration = calibrate.of_shipped(calibration, choice.answers, arguments.least_threshold)
    clock["calibrated"] = time.monotonic()

    commands = {name: value for name, value in vars(arguments).items() if name not in ("out", "work", "only", "start")}
    figures: dict[str, Any] = {
        "command": "python -m triton_models.training.train --out triton_models/ich_reference "
        + " ".join(filter(None, (_option(name, value) for name, value in commands.items() if value is not None))),
        "started_from": hashlib.sha256(arguments.start.read_bytes()).hexdigest() if arguments.start else None,
        "seed": arguments.seed,
        "steps": steps,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "numpy": np.__version__,
            "opencv": cv2.__version__,
            "scipy": scipy.__version__,
        },
        "processor": _processor(),
        "threads": arguments.threads,
        "parameters": sum(p.numel() for p in network.parameters()),
        "heads_simulated": head_count,
        "heads_from_step": joined,
        "scans_simulated": len(store.scans),
        "slabs_simulated": len(store),
        "slabs_seen": steps * arguments.batch,
        "seconds": {
            "simulate_in_this_run": round(clock["simulated"] - clock["start"]),
            "train_in_all": round(seconds),
            "calibrate_and_quantise": round(clock["calibrated"] - clock["trained"]),
        },
        "onnx_runtime_against_torch": difference,
        "calibration": calibration.figures,
        "precision": choice.figures,
    }
    export(
        choice.model,
        work / "fp32.onnx",
        arguments.out,
        version=VERSION,
        calibration=calibration,
        sensitivity=calibration.figures["sensitivity"],
        specificity=calibration.figures["specificity"],
        example=calibrate.example(studies),
    )
    (arguments.out / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    say(f"wrote {arguments.out}: {choice.name}, AUC on the calibration studies {calibration.figures['auc']}")


def _heads(text: str) -> Heads:
    try:
        return Heads.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _option(name: str, value: object) -> str:
    name = name.replace("_", "-")
    if isinstance(value, list):
        return " ".join(_option(name, one) for one in value)
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
