"""`make demo`, as a newcomer runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pydicom
import pytest
from PIL import Image

from tests.interop.box import triton_environment, wait_for

pytestmark = [pytest.mark.interop, pytest.mark.slow, pytest.mark.xdist_group("demo"), pytest.mark.timeout(240)]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "appliance.cli", "demo", "--directory", str(folder), *arguments],
        env={**os.environ, "SCANSIDE_TRITON_ENVIRONMENT": str(triton_environment())},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    process = start(folder, "--json", *arguments)
    out, err = process.communicate(timeout=200)
    assert left_over(folder) == []
    return process.returncode, json.loads(out), err


def left_over(folder: Path) -> list[str]:
    """Command lines of processes that still work in the demo's folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line and "pytest" not in line:
            found.append(line)
    return found


def test_two_patients(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    code, summary, said = run(folder)
    assert code == 0, said
    assert summary["ok"]
    assert summary == json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    bleed, normal = summary["studies"]
    assert (bleed["verdict"], normal["verdict"]) == ("positive", "negative")
    assert all(moment["seconds"] is not None for moment in bleed["timeline"].values())
    assert normal["timeline"]["alert_sent"] is None
    (message,) = bleed["messages"]
    assert (folder / message).read_bytes().startswith(b"MSH|")
    assert normal["messages"] == []
    picture = Image.open(folder / bleed["pictures"][0])
    assert picture.width >= 512
    made = sorted((folder / "findings").rglob("*.dcm"))
    assert {pydicom.dcmread(path, stop_before_pixels=True).Modality for path in made} == {"SR", "OT"}
    for name in ("scanside.toml", "ledger.sqlite", "spool"):
        assert (folder / name).exists()
    # what a person sees
    assert "MSH|" in said
    assert "probability" in said
    assert re.search(r"alert acknowledged\s+\+", said)


def test_a_real_head(tmp_path: Path, ge_head: Path) -> None:
    code, summary, said = run(tmp_path / "demo", "--study", str(ge_head))
    assert code == 0, said
    (result,) = summary["studies"]
    assert result["verdict"] is not None
    assert result["pacs_holds_findings"]


def test_a_scanners_whole_study_of_a_hollow_skull(tmp_path: Path, philips_phantom: Path) -> None:
    code, summary, said = run(tmp_path / "demo", "--study", str(philips_phantom))
    assert code == 0, said
    (result,) = summary["studies"]
    assert [one["series_number"] for one in result["series"] if one["chosen"]] == [201]
    assert result["verdict"] is None
    assert "brain" in result["reasons"][0]


@pytest.mark.parametrize("when", ["at the start", "when ready", "in the middle of a study"])
def test_ctrl_c_stops_everything(tmp_path: Path, when: str) -> None:
    folder = tmp_path / "demo"
    process = start(folder)

    def reached() -> bool | None:
        if when == "at the start":
            return True if (folder / "hospital").exists() else None
        log = folder / "scanside.log"
        text = log.read_text(errors="replace") if log.exists() else ""
        return True if ("engine: runs" if when == "when ready" else "complete,") in text else None

    wait_for(reached, 90.0, lambda: "the demo did not get there")
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 15.0
    assert process.returncode == 130, out + err
    assert "Traceback" not in out + err
    # The process that runs a model notices at its next look that its server is gone.
    wait_for(lambda: True if not left_over(folder) else None, 10.0, lambda: f"still there: {left_over(folder)}")


def test_a_folder_that_is_not_a_demos_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    process = start(tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "not made by a demo" in err
    assert (tmp_path / "precious").exists()
