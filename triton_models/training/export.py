"""A trained network to a model package: ``model.onnx`` and the ``package.toml`` that states what it is."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

from appliance.inference.preprocess import PIXEL_MM, SIZE, WINDOWS

from .network import LABELS, Network, Shipped

NAME = "ich_reference"
OPSET = 17
MAP_SIZE = 64
PARITY = 1e-4
"""Largest difference between PyTorch's and ONNX Runtime's outputs that is accepted."""

_TOML = """\
# Written by triton_models.training.export; what a field means is said in docs/architecture.md.
name = "{name}"
version = "{version}"
title = "Intracranial haemorrhage, reference model"
manufacturer = "scanside contributors"
clearance = "none: research reference"
notice = "Research use, not cleared. Trained on simulated head CTs only."
mode = "evaluation"
intended_use = "triage"
labels = [{labels}]

[indication]
modality = ["CT"]
sop_classes = [
    "1.2.840.10008.5.1.4.1.1.2",    # CT Image Storage
    "1.2.840.10008.5.1.4.1.1.2.1",  # Enhanced CT Image Storage
    "1.2.840.10008.5.1.4.1.1.2.2",  # Legacy Converted Enhanced CT Image Storage
]
body_parts = ["HEAD", "BRAIN", "SKULL"]
minimum_age_years = 18
kvp = [80.0, 140.0]
slice_thickness_mm = [0.4, 10.0]
contrast = false
minimum_slabs = 10
minimum_coverage_mm = 80.0
minimum_brain_ml = 400.0

[preprocessing]
slab_mm = 5.0
size = {size}
spacing_mm = {pixel_mm}
windows = [{windows}]

[model]
triton_name = "{name}"
maximum_batch = 16

[model.input]
name = "slabs"
datatype = "FP32"
shape = [3, {size}, {size}]

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

[files]
"model.onnx" = "sha256:{digest}"
"""


def export(
    network: Network,
    folder: Path,
    *,
    version: str,
    threshold: float,
    lesion_threshold: float,
) -> float:
    """Write ``model.onnx`` and ``package.toml`` into a folder; the package is unsigned until somebody signs it.

    Args:
        network: the trained network; left in evaluation mode.
        folder: made if it is not there.
        version: the package's version.
        threshold: operating point on the study's probability of any haemorrhage, 0..1.
        lesion_threshold: operating point on the lesion map, 0..1.

    Returns:
        The largest absolute difference between PyTorch and ONNX Runtime over a batch of one and a batch of three.

    Raises:
        RuntimeError: that difference is above `PARITY`; nothing is left in place of the old files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shipped = Shipped(network).eval()
    staged = folder / "model.onnx.new"
    torch.onnx.export(
        shipped,
        (torch.rand(2, 3, SIZE, SIZE),),
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
    # A signature of what lay here before would say nothing about the new package.
    (folder / "package.sig").unlink(missing_ok=True)
    staged.replace(folder / "model.onnx")
    text = _TOML.format(
        name=NAME,
        version=version,
        labels=", ".join(f'"{label}"' for label in LABELS),
        size=SIZE,
        pixel_mm=PIXEL_MM,
        windows=", ".join(f"{{ center = {centre}, width = {width} }}" for centre, width in WINDOWS),
        label_count=len(LABELS),
        map_size=MAP_SIZE,
        threshold=threshold,
        lesion_threshold=lesion_threshold,
        digest=hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest(),
    )
    (folder / "package.toml").write_text(text, encoding="utf-8")
    return difference


def _difference(shipped: Shipped, path: Path) -> float:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for count in (1, 3):
        slabs = torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            expected = [output.numpy() for output in shipped(slabs)]
        for one, other in zip(expected, session.run(None, {"slabs": slabs.numpy()}), strict=True):
            worst = max(worst, float(np.abs(one - other).max()))
    return worst
