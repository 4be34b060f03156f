"""The benchmark of the decoders measures what it says, sees a wrong bit, and runs without the command's libraries."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from typer.testing import CliRunner

from appliance.bench.decode import KINDS, lines, measure
from appliance.cli import app
from dicom_io.errors import ScansideError

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_every_kind_is_decoded_exactly_by_us_and_by_others() -> None:
    told = measure(1, 2)
    by_kind: dict[str, set[str]] = {}
    for one in told["results"]:
        assert one["bit_exact"] is True, one
        assert one["slices_per_s"] > 0 and len(one["rounds"]) == 2
        by_kind.setdefault(one["kind"], set()).add(one["decoder"])
    assert set(by_kind) == {kind.name for kind in KINDS}
    for kind, decoders in by_kind.items():
        assert {"scanside", "scanside all cores"} <= decoders and len(decoders) > 2, kind
    assert set(told["ratios"]) == {
        f"{kind}_{name}" for kind, names in by_kind.items() for name in names if name != "scanside"
    }
    shown = "\n".join(lines(told))
    assert "htj2k" in shown and "NO" not in shown.split("left out")[0]


def test_a_wrong_bit_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = imagecodecs.htj2k_decode

    def wrong(frame: bytes) -> Any:
        values = np.array(right(frame))
        values[0, 0] ^= 1
        return values

    monkeypatch.setattr(imagecodecs, "htj2k_decode", wrong)
    told = measure(1, 1, ["htj2k"])
    exact = {one["decoder"]: one["bit_exact"] for one in told["results"]}
    assert exact["imagecodecs"] is False and exact["scanside"] is True
    assert any(" NO " in line and "imagecodecs" in line for line in lines(told))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ScansideError, match="no such kind") as caught:
        measure(1, 1, ["jpeg3000"])
    assert "jpeg2000" in caught.value.remedy


def test_it_runs_where_the_commands_own_libraries_are_missing() -> None:
    """They are made to be missing: an import of each fails."""
    missing = ["typer", "rich", "sqlalchemy", "pydantic", "pynetdicom", "highdicom", "tritonclient", "grpc"]
    program = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({missing!r}))\n"
        "sys.argv[1:] = ['--images', '1', '--rounds', '1', '--kinds', 'raw,htj2k', '--json']\n"
        "runpy.run_module('appliance.bench.decode', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    told = json.loads(done.stdout)
    assert {one["kind"] for one in told["results"]} == {"raw", "htj2k"}


def test_the_command_prints_the_document() -> None:
    ran = CliRunner().invoke(app, ["bench", "decode", "--images", "1", "--rounds", "1", "--kinds", "raw", "--json"])
    assert ran.exit_code == 0, ran.output
    assert {one["kind"] for one in json.loads(ran.stdout)["results"]} == {"raw"}
    assert CliRunner().invoke(app, ["bench", "decode", "--kinds", "jpeg3000"]).exit_code != 0
