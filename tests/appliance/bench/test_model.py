"""The benchmark of a model: a real server beside ONNX Runtime alone, tiny."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import triton_models
from appliance.bench import model
from appliance.cli import app
from appliance.governance.package import load_configured
from appliance.inference.triton import Output, TritonClient
from appliance.settings import Settings
from dicom_io.errors import PeerError


@pytest.fixture(scope="module")
def environment() -> Path:
    default = Path(triton_models.__file__).parent.parent / ".venv-triton"
    found = Path(os.environ.get("SCANSIDE_TRITON_ENVIRONMENT", default))
    if not (found / "bin" / "python3").exists():
        pytest.skip(f"there is no Triton environment {found} (set SCANSIDE_TRITON_ENVIRONMENT)")
    return found


@pytest.mark.interop
def test_a_tiny_run_has_every_figure(environment: Path) -> None:
    arguments = ["bench", "model", "--slabs", "17", "--rounds", "2", "--triton", str(environment)]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["slabs"], told["rounds"], told["package"]["name"]) == (17, 2, "ich_reference")
    for one in told["seconds"].values():
        assert 0 < one["least"] <= one["p50"] <= one["most"]
    assert set(told["seconds"]) == {"triton", "onnxruntime"}
    assert told["ratios"]["triton_over_onnxruntime"] > 0
    assert 0 <= told["difference"] <= model.TOLERANCE
    shown = model.lines(told)
    assert "ich_reference" in shown
    assert f"{told['seconds']['triton']['p50']:.3f} s" in shown


@pytest.mark.interop
def test_a_server_that_says_something_else_is_no_figure(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package,) = load_configured(Settings())
    infer = TritonClient.infer

    def wrong(client: TritonClient, *arguments: object, **named: object) -> Output:
        said = infer(client, *arguments, **named)  # type: ignore[arg-type]
        return replace(said, probabilities=np.float32(1) - said.probabilities)

    monkeypatch.setattr(TritonClient, "infer", wrong)
    with pytest.raises(PeerError, match="differ by"):
        model.measure(package, environment, 2, 1)


def test_a_folder_without_a_package_is_said(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "model", str(tmp_path)])
    assert result.exit_code == 1
    assert "package.toml" in result.stderr
