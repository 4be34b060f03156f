"""The training command, on a few slabs that are made up here: what it starts from, and what its package then states."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appliance.inference.preprocess import SIZE
from triton_models.training.calibrate import logit, predictor
from triton_models.training.haemorrhage import SUBTYPES
from triton_models.training.samples import CALIBRATION, MAP_PIXEL_MM2, MAP_SIZE, SLAB_MM, TRAIN, Kind, run_input, shrink

ROOT = Path(__file__).resolve().parents[3]
PYTHON = ROOT / ".venv-training" / "bin" / "python"
SHIPPED = ROOT / "triton_models" / "ich_reference" / "model_fp32.onnx"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="the training environment is not there: make .venv-training/.ready"),
]


@dataclass(frozen=True, slots=True)
class Made:
    """What a run of the command left."""

    package: dict[str, Any]
    metrics: dict[str, Any]
    work: Path


def draw(folder: Path, kind: Kind, seed: int) -> None:
    """One head of a kind and seed as the simulator leaves it: a grey ball in bone, with blood in every other scan."""
    rng = np.random.default_rng(seed)
    row, column = np.indices((SIZE, SIZE), dtype=np.float32) - (SIZE - 1) / 2
    far = np.hypot(row, column)
    fields, covered, scans = [], [], []
    for number in range(len(kind.stories)):
        bleeds = number % 2 == 1
        blood = (np.hypot(row - 20, column + 30) < 16) & bleeds
        head = np.select([far > 90, far > 82, blood], [-1000, 900, 65], 32)
        share = np.zeros((len(SUBTYPES), MAP_SIZE, MAP_SIZE), dtype=np.uint8)
        share[1] = np.rint(255 * shrink(blood.astype(np.float32)))
        fields += [(head + rng.normal(0, 4, head.shape)).astype(np.int16) for _ in range(5)]
        covered += [share] * 5
        scans.append(
            {
                "first": 5 * number,
                "count": 5,
                "thickness_mm": [SLAB_MM] * 5,
                "slice_mm": SLAB_MM,
                "volume_ml": {"intraparenchymal": 20.0} if bleeds else {},
                "look_alikes": [],
            }
        )
    areas = np.array(covered).sum(axis=(2, 3), dtype=np.int64) * (MAP_PIXEL_MM2 / 255)
    here = folder / f"{kind.name}-{seed}"
    here.mkdir(parents=True)
    np.save(here / "fields-00000.npy", np.array(fields))
    np.save(here / "covered-00000.npy", np.array(covered))
    (here / "head-00000.json").write_text(json.dumps({"scans": scans, "areas_mm2": areas.tolist()}), "utf-8")


def train(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The command on those heads, one step at a rate that changes nothing."""
    work = folder / "work"
    for kind, seed in ((TRAIN, 1), (CALIBRATION, 1), (CALIBRATION, 2)):
        if not (work / f"{kind.name}-{seed}").exists():
            draw(work, kind, seed)
    command = [str(PYTHON), "-m", "triton_models.training.train", "--out", str(folder / "package"), "--work", str(work)]
    few = ["--heads", "1", "--calibration", "1", "--steps", "1", "--batch", "2", "--rate", "1e-9", "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ORT_DISABLE_TELEMETRY": "1"}
    (folder / "package").mkdir(exist_ok=True)
    return subprocess.run([*command, *few, *options], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A run that began with the shipped model, on another run's heads too, and was told a least threshold."""
    folder = tmp_path_factory.mktemp("train")
    options = ("--start", str(SHIPPED), "--also", "calibration-2:1", "--least-threshold", "0.97", "--no-half")
    ran = train(folder, *options)
    assert ran.returncode == 0, ran.stderr[-2000:]
    package = tomllib.loads((folder / "package" / "package.toml").read_text("utf-8"))
    return Made(package, json.loads((folder / "package" / "metrics.json").read_text("utf-8")), folder / "work")


@pytest.mark.timeout(600)
def test_a_training_that_starts_from_a_package_says_what_that_package_says(made: Made) -> None:
    calibration = json.loads((SHIPPED.parent / "metrics.json").read_text("utf-8"))["calibration"]
    with np.load(SHIPPED.parent / "parity.npz") as vectors:
        slabs, published = run_input(vectors["fields"]), logit(vectors["probabilities"])
    said = logit(predictor(made.work / "uncalibrated.onnx", 1)(slabs)[0])
    # The package's own calibration is in its answers; the new one would be fitted to studies that are none.
    there = said * np.array(calibration["slope"]) + np.array(calibration["shift"])
    assert np.abs(there - published).max() < 1  # one step moves the statistics of the normalisations a little
    assert np.corrcoef(there.ravel(), published.ravel())[0, 1] > 0.99
    assert made.metrics["started_from"] == hashlib.sha256(SHIPPED.read_bytes()).hexdigest()


@pytest.mark.timeout(600)
def test_weights_can_be_calibrated_as_they_are(tmp_path: Path) -> None:
    ran = train(tmp_path, "--start", str(SHIPPED), "--steps", "0")
    assert ran.returncode == 0, ran.stderr[-2000:]
    published = json.loads((SHIPPED.parent / "metrics.json").read_text("utf-8"))["calibration"]
    with np.load(SHIPPED.parent / "parity.npz") as vectors:
        slabs = run_input(vectors["fields"])
    shipped = predictor(SHIPPED, 1)
    twice = (logit(shipped(slabs)[0]) + logit(shipped(np.ascontiguousarray(slabs[..., ::-1]))[0])) / 2
    said = logit(predictor(tmp_path / "work" / "uncalibrated.onnx", 1)(slabs)[0])
    there = said * np.array(published["slope"]) + np.array(published["shift"])
    assert np.abs(there - twice).max() < 0.1  # the statistics of the normalisations are taken anew
    assert json.loads((tmp_path / "package" / "metrics.json").read_text("utf-8"))["steps"] == 0
    assert train(tmp_path, "--steps", "0").returncode == 2


_DEEPER = """
import sys
from pathlib import Path
import torch
from torch import nn
from triton_models.training.export import to_onnx
from triton_models.training.inherit import inherit
from triton_models.training.network import Network

torch.manual_seed(5)
shallow, deep, slabs = Network(), Network(), torch.rand(24, 9, 256, 256)
for part in (shallow.stem, shallow.stage1, shallow.stage2, shallow.stage3, shallow.stage4):
    del part[2:]
shallow.refine = nn.Identity()
shallow.scale.data.fill_(1.0)
shallow(slabs)  # statistics of its own
to_onnx(shallow.eval(), Path(sys.argv[1]))
before = {name: value.clone() for name, value in deep.state_dict().items()}
inherit(deep, Path(sys.argv[1]), slabs)
with torch.no_grad():
    off = (deep.eval()(slabs)[1] - shallow(slabs)[1]).abs().max()
assert off < 0.3, off
new = "stage1.2.first.0.weight"
assert torch.equal(deep.state_dict()[new], before[new])  # it can learn: not zero, and no one else's
try:
    inherit(shallow, Path(sys.argv[2]), slabs)
except ValueError as error:
    assert "another network" in str(error)
else:
    raise AssertionError("a deeper file was taken")
"""


@pytest.mark.timeout(600)
def test_a_deeper_network_begins_as_the_one_that_it_takes_over(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ORT_DISABLE_TELEMETRY": "1"}
    command = [str(PYTHON), "-c", _DEEPER, str(tmp_path / "shallow.onnx"), str(SHIPPED)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]


_TAUGHT = """
from types import SimpleNamespace
import numpy as np
import torch
from triton_models.training.train import Sampler, loss

maps, slabs = torch.full((1, 6, 48, 40), -9.0), torch.zeros(1, 6)

def cost(share, said):
    covered, told = torch.zeros(1, 5, 48, 40), maps.clone()
    covered[0, 1, 20, 20] = share
    told[0, (0, 2), 20, 20] = said
    return float(loss(told, slabs, covered))

# Nearly half a pixel of blood is blood, and a slab is called by it; a tenth of one is told as what it is.
assert cost(0.45, 4.0) < cost(0.45, -0.2), "the share is taught"
assert cost(0.1, -1.1) < cost(0.1, 4.0)

areas = np.zeros((400, 5), dtype=np.float32)
areas[:2, 1] = 60.0
volumes = ({"epidural": 0.5}, {"epidural": 40.0}, {})
scans = [(first, end, {"volume_ml": each}) for (first, end), each in zip(((0, 1), (1, 2), (2, 400)), volumes)]
class Heads(SimpleNamespace):
    def __len__(self):
        return len(self.areas_mm2)
sampler = Sampler(Heads(areas_mm2=areas, scans=scans))
sampler.suspicion[2:] = 0.02
sampler.suspicion[77] = 0.9
drawn = np.bincount(sampler.draw(np.random.default_rng(1), 500, 16).ravel(), minlength=400)
assert drawn[:2].sum() == 4000
assert drawn[0] == max(drawn[:2]) and 1.8 < drawn[0] / drawn[1] < 2.2, drawn[:2]
assert 25 * np.median(drawn[2:]) < drawn[77], (drawn[77], np.median(drawn[2:]))
"""


@pytest.mark.timeout(600)
def test_what_is_small_counts_and_what_was_taken_for_blood_comes_again() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([str(PYTHON), "-c", _TAUGHT], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["fp32.onnx", "int8.onnx"])
def test_a_head_and_its_mirror_image_are_the_same_to_what_is_exported(made: Made, name: str) -> None:
    with np.load(SHIPPED.parent / "parity.npz") as vectors:
        slabs = run_input(vectors["fields"])
    ask = predictor(made.work / name, 1)
    (seen, lesion_map), (mirrored, mirrored_map) = ask(slabs), ask(np.ascontiguousarray(slabs[..., ::-1]))
    assert np.abs(seen - mirrored).max() < 1e-5
    assert np.abs(lesion_map - mirrored_map[..., ::-1]).max() < 1e-5
    assert np.abs(lesion_map - lesion_map[..., ::-1]).max() > 0.1, "it is no image that is the same mirrored"


@pytest.mark.timeout(600)
def test_the_least_threshold_is_stated_with_what_was_measured_at_it(made: Made) -> None:
    point, figures = made.package["operating_point"], made.metrics["calibration"]
    assert point["threshold"] == figures["threshold"] == 0.97
    assert figures["threshold_of_these_studies"] < 0.97
    assert "--least-threshold 0.97" in made.metrics["command"]
    shipped = made.metrics["precision"][made.metrics["precision"]["shipped"]]
    assert (point["sensitivity"], point["specificity"]) == (shipped["sensitivity"], shipped["specificity"])


@pytest.mark.timeout(600)
def test_a_start_that_is_no_model_is_refused_by_name(tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    other.write_bytes(b"no model at all")
    ran = train(tmp_path, "--start", str(other))
    assert ran.returncode != 0
    assert "other.onnx cannot be read as an ONNX model" in ran.stderr and "Traceback" not in ran.stderr


@pytest.mark.timeout(600)
def test_heads_of_another_run_are_trained_on_and_said(made: Made) -> None:
    metrics = made.metrics
    assert metrics["heads_simulated"] == 2 and metrics["scans_simulated"] == len(TRAIN.stories) + len(
        CALIBRATION.stories
    )
    assert " --also calibration-2:1 " in metrics["command"]
    assert metrics["calibration"]["studies"] == len(CALIBRATION.stories)


@pytest.mark.parametrize(
    ("also", "why"),
    [("calibration-1:1", "are to calibrate, and may not be trained on"), ("test-1:1", "is not KIND-SEED:COUNT")],
)
def test_heads_that_may_not_be_trained_on_are_refused(tmp_path: Path, also: str, why: str) -> None:
    ran = train(tmp_path, "--also", also)
    assert ran.returncode == 2
    assert also in ran.stderr and why in ran.stderr


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16 sse", "True"),
        ("flags\t\t: fpu amx_bf16", "True"),
        ("flags\t\t: fpu avx2\nbugs\t\t: avx512_bf16", "False"),
        ("Features\t: fp asimd", "False"),
        (None, "False"),
    ],
)
def test_it_convolves_in_half_where_the_processor_does(tmp_path: Path, said: str | None, expected: str) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    if said is not None:
        cpuinfo.write_text(said)
    asked = f"from pathlib import Path; print(train.convolves_in_half(Path({str(cpuinfo)!r})))"
    run = [PYTHON, "-c", f"from triton_models.training import train; {asked}"]
    assert subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == expected
