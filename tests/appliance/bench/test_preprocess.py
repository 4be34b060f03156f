"""The benchmark of preprocessing, tiny: its structure, and that what computes something else is an error."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from appliance.bench import preprocess
from appliance.cli import app
from dicom_io.errors import ScansideError


@pytest.mark.parametrize(("spacing", "peers"), [(0.5, {"opencv", "numpy"}), (0.45, {"opencv"})])
def test_a_tiny_run_has_every_figure(spacing: float, peers: set[str]) -> None:
    arguments = ["bench", "preprocess", "--slabs", "2", "--rounds", "1", "--spacing", str(spacing), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["slabs"], told["rounds"], told["spacing_mm"]) == (2, 1, spacing)
    speeds = told["slices_per_s"]
    assert {"definition", "arrays"} | peers <= set(speeds)
    assert set(speeds) | {one["name"] for one in told["left_out"]} == set(preprocess.CONTESTANTS)
    assert all(speed > 0 for speed in speeds.values())
    assert set(told["parity"]) == set(speeds) - {"definition"}
    assert all(0 <= difference <= 1e-4 for difference in told["parity"].values())
    assert set(told["ratios"]) == set(speeds) - peers
    fastest = max(speeds[name] for name in peers)
    for name, ratio in told["ratios"].items():
        assert ratio == pytest.approx(speeds[name] / fastest, rel=0.01, abs=0.001)
    shown = CliRunner().invoke(app, arguments[:-1]).stdout
    assert all(name in shown for name in (*speeds, "left out: cupy" if told["device"] == "cpu" else "cupy"))


def test_a_ratio_is_against_the_fastest_peer_of_each_round() -> None:
    seconds = {"opencv": [1.0, 4.0, 2.0], "numpy": [2.0, 2.0, 3.0], "definition": [1.0, 1.0, 1.0]}
    assert preprocess.ratios(seconds) == {"definition": 2.0}


def test_the_heads_of_a_run_differ_and_fill_every_window() -> None:
    slabs = preprocess.heads(3)
    assert not np.array_equal(slabs[0], slabs[1])
    for channel in preprocess.preprocess.model_input(slabs[0], (0.5, 0.5)):
        assert 0.01 < np.mean((channel > 0) & (channel < 1)) < 0.99


@pytest.mark.parametrize("wrong", ["value", "shape", "nan"])
def test_what_computes_something_else_is_an_error(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    def other(hu: Any, spacing_mm: Any) -> preprocess.Work:
        right = preprocess.CONTESTANTS["definition"](hu, spacing_mm)()
        if wrong == "shape":
            return lambda: [slab[:, :-1] for slab in right]
        right[1][2, 100, 100] += 2e-4 if wrong == "value" else np.nan
        return lambda: right

    monkeypatch.setitem(preprocess.CONTESTANTS, "opencv", other)
    with pytest.raises(ScansideError, match="opencv"):
        preprocess.measure(2, 1)


@pytest.mark.parametrize("spacing", [0.51, 0.0, float("nan")])
def test_a_spacing_that_the_peers_cannot_take_is_an_error(spacing: float) -> None:
    with pytest.raises(ScansideError, match="at most"):
        preprocess.measure(2, 1, spacing)


def test_it_runs_where_only_numpy_and_opencv_are_installed() -> None:
    program = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("typer", "rich", "sqlalchemy", "pydantic", "pydicom", "cupy", "nvidia"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from appliance.bench.preprocess import main
sys.argv = ["preprocess", "--slabs", "2", "--rounds", "1", "--json"]
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["device"] == "cpu"
    assert set(told["slices_per_s"]) == {"definition", "opencv", "numpy", "arrays"}
    assert {one["reason"] for one in told["left_out"]} == {"DALI is not installed", "CuPy is not installed"}
