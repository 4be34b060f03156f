"""A trained network to a model package: ``model.onnx``, ``parity.npz`` and ``package.toml``, which says what it is."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from appliance.inference.preprocess import PIXEL_MM, SIZE, WINDOWS

from .calibrate import Calibration, predictor
from .network import INPUTS, LABELS, Network, Shipped
from .samples import MAP_SIZE, NEIGHBOURS, SLAB_MM, run_input

NAME = "ich_reference"
OPSET = 17
SINGLE = "model_fp32.onnx"
PARITY = 1e-4
"""Largest difference between PyTorch's and ONNX Runtime's outputs that is accepted."""

_TOML = '''\
# Written by triton_models.training.export; what a field means is said in docs/architecture.md.
name = "{name}"
version = "{version}"
title = "Intracranial haemorrhage, reference model"
manufacturer = "scanside contributors"
clearance = "none: research reference"
notice = "Research use, not cleared. Trained on simulated head CTs only."
mode = "evaluation"
intended_use = "triage"
data = """
Trained, calibrated and tested on simulated non-contrast head CTs only: an average brain (MNI152), deformed, with \\
bleeds, look-alikes and scanners by rule. No patient's images. Its operating point was set on {studies} studies of \\
the same simulator; metrics.json says on how many heads it was trained, docs/model how it did on other settings."""
labels = [{labels}]

[indication]
modality = ["CT"]
sop_classes = [
    "1.2.840.10008.5.1.4.1.1.2",    # CT Image Storage
    "1.2.840.10008.5.1.4.1.1.2.1",  # Enhanced CT Image Storage
    "1.2.840.10008.5.1.4.1.1.2.2",  # Legacy Converted Enhanced CT Image Storage
]
body_parts = ["HEAD", "BRAIN", "SKULL"]
minimum_age = "18 years"
kvp = [80.0, 140.0]
slice_thickness_mm = [0.4, 10.0]
contrast = false
minimum_slabs = 10
minimum_coverage_mm = 80.0
minimum_brain_ml = 400.0

# Where in the label each rule stands; a model without a label says what else it follows from.
[indication.clauses]
intended_use = "notice"
modality = "what it was trained on"
sop_class = "what it was trained on"
body_part = "what it was trained on"
age = "what it was trained on: adult heads"
contrast = "what it was trained on: heads without an agent"
kvp = "trained on 100 to 140 kV, taken to hold from 80"
slice_thickness = "what its slabs can be made of"
coverage = "least that counts as a head"
slabs = "least that counts as a head"
brain = "least that counts as a brain"

[preprocessing]
slab_mm = {slab_mm}
neighbours = {neighbours}
size = {size}
spacing_mm = {pixel_mm}
windows = [{windows}]

[model]
triton_name = "{name}"
maximum_batch = 16

[model.input]
name = "slabs"
datatype = "FP32"
shape = [{inputs}, {size}, {size}]

[[model.outputs]]
name = "probabilities"
datatype = "FP32"
shape = [{label_count}]

[[model.outputs]]
name = "lesion_map"
datatype = "FP32"
shape = [1, {map_size}, {map_size}]

[operating_point]
threshold = {threshold}
lesion_threshold = {lesion_threshold}
# On the simulated studies that both thresholds were set on; figures of a test are in docs/model/.
sensitivity = {sensitivity}
specificity = {specificity}
studies = {studies}

[parity]
tolerance = {tolerance}

[files]
{files}
'''


def to_onnx(
    network: Network, path: Path, *, slope: NDArray[np.float64] | None = None, shift: NDArray[np.float64] | None = None
) -> float:
    """Write a network as ONNX, with each label's calibration in the graph.

    Args:
        network: the trained network; left in evaluation mode.
        path: the file; its folder must be there.
        slope, shift: of each label's logit (6,); by default 1 and 0.

    Returns:
        The largest absolute difference between PyTorch and ONNX Runtime over a batch of one and a batch of three.

    Raises:
        RuntimeError: that difference is above `PARITY`; nothing is left in place of the old file.
    """
    ones, zeros = np.ones(len(LABELS)), np.zeros(len(LABELS))
    shipped = Shipped(
        network,
        torch.tensor(ones if slope is None else slope, dtype=torch.float32),
        torch.tensor(zeros if shift is None else shift, dtype=torch.float32),
    ).eval()
    staged = path.with_suffix(".onnx.new")
    torch.onnx.export(
        shipped,
        (torch.rand(2, INPUTS, SIZE, SIZE),),
        str(staged),
        input_names=["slabs"],
        output_names=["probabilities", "lesion_map"],
        dynamic_axes={"slabs": {0: "n"}, "probabilities": {0: "n"}, "lesion_map": {0: "n"}},
        opset_version=OPSET,
        dynamo=False,
        external_data=False,
    )
    onnx.checker.check_model(str(staged), full_check=True)
    difference = _difference(shipped, staged)
    if difference > PARITY:
        staged.unlink()
        raise RuntimeError(f"ONNX Runtime differs from PyTorch by {difference:.2g}")
    staged.replace(path)
    return difference


def export(
    model: Path,
    single: Path,
    folder: Path,
    *,
    version: str,
    calibration: Calibration,
    sensitivity: float,
    specificity: float,
    example: NDArray[np.int16],
) -> None:
    """Write ``model.onnx``, ``parity.npz`` and ``package.toml``; the package is unsigned until somebody signs it.

    Where what is shipped has eight bits, ``model_fp32.onnx`` lies beside it: TensorRT does not read unsigned ones.

    Args:
        model: what is shipped, calibrated.
        single: the same in single precision, or the same file; its answers are the parity vectors.
        folder: made if it is not there.
        version: the package's version.
        calibration: operating points.
        sensitivity, specificity: what `model` was seen to have at them on the calibration studies.
        example: (n, 256, 256) HU, neighbouring slabs foot to head.
    """
    folder.mkdir(parents=True, exist_ok=True)
    slabs = run_input(example)
    probabilities, lesion_map = predictor(single)(slabs)
    seen_by_shipped = predictor(model)(slabs)
    off = max(float(np.abs(a - b).max()) for a, b in zip(seen_by_shipped, (probabilities, lesion_map), strict=True))
    # A signature of what lay here before would say nothing about the new package.
    (folder / "package.sig").unlink(missing_ok=True)
    shutil.copyfile(model, folder / "model.onnx")
    names = ["model.onnx", "parity.npz"]
    (folder / SINGLE).unlink(missing_ok=True)
    if model != single:
        shutil.copyfile(single, folder / SINGLE)
        names.insert(1, SINGLE)
    np.savez_compressed(folder / "parity.npz", fields=example, probabilities=probabilities, lesion_map=lesion_map)
    text = _TOML.format(
        name=NAME,
        version=version,
        labels=", ".join(f'"{label}"' for label in LABELS),
        slab_mm=SLAB_MM,
        neighbours=NEIGHBOURS,
        size=SIZE,
        pixel_mm=PIXEL_MM,
        windows=", ".join(f"{{ center = {centre}, width = {width} }}" for centre, width in WINDOWS),
        inputs=INPUTS,
        label_count=len(LABELS),
        map_size=MAP_SIZE,
        threshold=calibration.threshold,
        lesion_threshold=calibration.lesion_threshold,
        sensitivity=sensitivity,
        specificity=specificity,
        studies=calibration.figures["studies"],
        tolerance=round(max(0.01, 1.5 * off), 3),  # another runtime rounds otherwise
        files="\n".join(
            f'"{name}" = "sha256:{hashlib.sha256((folder / name).read_bytes()).hexdigest()}"' for name in names
        ),
    )
    (folder / "package.toml").write_text(text, encoding="utf-8")


def _difference(shipped: Shipped, path: Path) -> float:
    predict = predictor(path)
    worst = 0.0
    for count in (1, 3):
        slabs = torch.rand(count, INPUTS, SIZE, SIZE, generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            expected = [output.numpy() for output in shipped(slabs)]
        for one, other in zip(expected, predict(slabs.numpy()), strict=True):
            worst = max(worst, float(np.abs(one - other).max()))
    return worst
