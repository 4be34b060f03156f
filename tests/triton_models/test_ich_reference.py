"""The reference model's package agrees with its files and with the code that feeds it."""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from appliance.inference import preprocess
from triton_models.training.haemorrhage import SUBTYPES

PACKAGE = Path(__file__).resolve().parents[2] / "triton_models" / "ich_reference"


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return tomllib.loads((PACKAGE / "package.toml").read_text(encoding="utf-8"))


def test_the_digests_are_the_files(manifest: dict[str, Any]) -> None:
    assert "model.onnx" in manifest["files"]
    for name, digest in manifest["files"].items():
        content = (PACKAGE / name).read_bytes()
        assert digest == f"sha256:{hashlib.sha256(content).hexdigest()}"


def test_the_model_is_one_small_file(manifest: dict[str, Any]) -> None:
    assert (PACKAGE / "model.onnx").stat().st_size < 10_000_000
    assert not list(PACKAGE.glob("*.data"))


def test_the_manifest_states_the_input_that_the_code_makes(manifest: dict[str, Any]) -> None:
    stated = manifest["preprocessing"]
    assert (stated["size"], stated["spacing_mm"]) == (preprocess.SIZE, preprocess.PIXEL_MM)
    assert tuple((w["center"], w["width"]) for w in stated["windows"]) == preprocess.WINDOWS
    channels = len(preprocess.WINDOWS) * (1 + 2 * stated["neighbours"])
    assert manifest["model"]["input"]["shape"] == [channels, preprocess.SIZE, preprocess.SIZE]


def test_the_labels_are_the_phantoms_in_the_same_order(manifest: dict[str, Any]) -> None:
    assert manifest["labels"] == ["any", *SUBTYPES]


def test_the_operating_point_is_what_was_seen_when_it_was_set(manifest: dict[str, Any]) -> None:
    figures = json.loads((PACKAGE / "metrics.json").read_text(encoding="utf-8"))["calibration"]
    for key, value in manifest["operating_point"].items():
        assert value == figures[key], key
    assert figures["studies"] > 100
    assert figures["specificity"] >= 0.95


def test_what_is_shipped_is_no_worse_than_single_precision() -> None:
    figures = json.loads((PACKAGE / "metrics.json").read_text(encoding="utf-8"))["precision"]
    if figures["shipped"] == "int8":
        for key in ("auc", "sensitivity", "specificity"):
            assert figures["int8"][key] >= figures["fp32"][key] - 0.005
