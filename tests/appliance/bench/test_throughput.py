"""The benchmark of throughput: its figures from made-up runs, and one small run of it on a real box."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pydicom import dcmread
from rich.console import Console
from typer.testing import CliRunner

from appliance import init
from appliance.bench import throughput
from appliance.bench.box import Box
from appliance.bench.contestants import CONTESTANTS
from appliance.bench.studies import copies, original
from appliance.bench.throughput import SERVICES, Run, document, measure, tables, used
from appliance.cli import app
from appliance.demo.hospital import Hospital
from appliance.demo.orthanc import find_orthanc, free_port
from appliance.ledger.store import Ledger
from appliance.operations.leash import Leashed
from appliance.settings import load_settings
from dicom_io.errors import PeerError, ScansideError
from tests.builders import mentioning
from tests.interop.box import triton_environment

pytestmark = pytest.mark.slow


def run(studies: int, seconds: float, **others: Any) -> Run:
    """A run in which everything was even: one CPU second a study and service, 100 MB a service."""
    one = Run(
        seconds=seconds,
        cpu_s=dict.fromkeys(SERVICES, float(studies)),
        quarter_mb=dict.fromkeys(SERVICES, 100.0),
        peak_mb=dict.fromkeys(SERVICES, 100.0),
        last_instance_to_ack_s=[0.5] * studies,
        answers=[{"probability": 0.9}] * studies,
        reopened=0,
    )
    return replace(one, **others)


def test_figures_are_for_each_study_and_the_median_of_the_rounds() -> None:
    cpu = {"intake": 2.0, "engine": 8.0, "deliver": 1.0, "triton": 4.0}
    peak = {"intake": 100.0, "engine": 500.0, "deliver": 100.0, "triton": 300.0}
    rounds = [run(4, 10.0, cpu_s=cpu), run(4, 1.0, cpu_s=cpu, peak_mb=peak), run(4, 20.0, cpu_s=cpu)]
    told = document({1: rounds})
    one = told["scanners"]["1"]
    assert (one["studies"], one["rounds"], one["studies_per_h"]) == (4, 3, 1440.0)
    assert one["cpu_s_per_study"] == {"intake": 0.5, "engine": 2.0, "deliver": 0.25, "triton": 1.0}
    assert one["peak_mb"]["engine"] == 100.0
    assert document({1: [rounds[1]]})["scanners"]["1"]["peak_mb"] == peak
    assert document({1: [rounds[1]]})["ratios"] == {"peak_mb_end_over_quarter_1": 2.5}


def test_percentiles_are_over_the_studies_of_all_rounds() -> None:
    rounds = [run(2, 1.0, last_instance_to_ack_s=[0.1, 0.2]), run(2, 1.0, last_instance_to_ack_s=[0.3, 9.0])]
    assert document({3: rounds})["scanners"]["3"]["last_instance_to_ack_s"] == {
        "p50": 0.3,
        "p95": 9.0,
        "p99": 9.0,
        "n": 4,
    }


def test_a_ratio_is_the_median_of_the_ratios_to_the_fewest_scanners_of_its_round() -> None:
    # The machine was ten times as slow in the second round.
    few = [run(4, 10.0), run(4, 100.0), run(4, 10.0)]
    more = [run(8, 10.0), run(8, 100.0, cpu_s=dict.fromkeys(SERVICES, 12.0)), run(8, 5.0)]
    grown = [replace(one, peak_mb=dict.fromkeys(SERVICES, 150.0)) for one in more]
    assert document({2: few, 4: grown})["ratios"] == {
        "peak_mb_end_over_quarter_2": 1.0,
        "peak_mb_end_over_quarter_4": 1.5,
        "scanners_4_over_2": 2.0,
        "cpu_s_per_study_4_over_2": 1.0,
        "peak_mb_4_over_2": 1.5,
    }


def test_time_too_short_for_the_clock_makes_no_ratio() -> None:
    none = dict.fromkeys(SERVICES, 0.0)
    told = document({1: [run(1, 1.0, cpu_s=none)], 2: [run(2, 1.0)]})
    assert "cpu_s_per_study_2_over_1" not in told["ratios"]
    assert told["ratios"]["scanners_2_over_1"] == 2.0


def test_answers_that_differ_from_the_first_study_are_counted_in_every_run() -> None:
    right, wrong = {"probability": 0.9}, {"probability": 0.8}
    told = document(
        {1: [run(3, 1.0, answers=[right, wrong, right], reopened=1)], 2: [run(2, 1.0, answers=[wrong] * 2)]}
    )
    assert [one["verdicts_that_differ"] for one in told["scanners"].values()] == [1, 2]
    assert [one["studies_reopened"] for one in told["scanners"].values()] == [1, 0]


def test_the_tables_show_every_number_of_scanners() -> None:
    machine = {"cores": 2, "python": "3.11.7", "file_system": "ext4", "pacs": "Orthanc"}
    told = {"machine": machine, "slices": 28, **document({1: [run(4, 10.0)], 16: [run(64, 200.0)]})}
    output = StringIO()
    Console(width=110, file=output).print(tables(told))
    for words in ("28 slices", "2 cores", "1440", "1152", "0.500", "triton", "1.00; 100 → 100"):
        assert words in output.getvalue()


def test_copies_are_other_studies_of_the_same_images(tmp_path: Path) -> None:
    head = original(tmp_path / "head", 16)
    one, two = (copies(tmp_path / str(number), [head], number) for number in (1, 2))
    assert len({head.uid, one.uid, two.uid}) == 3
    for first, second in zip(one.paths, two.paths, strict=True):
        left, right = dcmread(first), dcmread(second)
        assert left.PixelData == right.PixelData
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID"):
            assert left[keyword].value != right[keyword].value


def test_what_is_asked_for_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("0", "1,x", "", "17"):
        assert CliRunner().invoke(app, ["bench", "throughput", "--scanners", wrong]).exit_code == 2
    monkeypatch.setattr(throughput, "PIXEL_BYTES", 1 << 40)
    with pytest.raises(ScansideError, match="GB are needed"):
        measure([1], 1, 28, 1, tmp_path, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_judged_the_same_images_differently_fails_after_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [{"probability": 0.9}, {"probability": 0.8}]
    told = {"machine": {}, "slices": 28, **document({1: [run(2, 1.0, answers=answers)]})}
    monkeypatch.setattr(throughput, "measure", lambda *_, **__: told)
    result = CliRunner().invoke(app, ["bench", "throughput", "--json"])
    assert json.loads(result.stdout) == told
    assert result.exit_code == 1
    assert "differently in 1 studies" in result.stderr


SERVICE = "import subprocess, sys, time\nheld = b'x' * 60_000_000\nprint('ready', flush=True)\n"
"""A stand-in for a service, of which it is known what it uses: it holds 60 MB."""


def test_what_a_service_used_counts_its_children_and_nobody_else(tmp_path: Path) -> None:
    burn = f"{SERVICE}while time.process_time() < 0.3: pass\nprint('ready', flush=True)\ntime.sleep(60)"
    busy = f"{SERVICE}subprocess.run([sys.executable, '-c', {burn!r}, 'intake'])"
    idle = f"{SERVICE}time.sleep(60)"
    server = tmp_path / "tritonserver"
    server.symlink_to(sys.executable)
    commands = [[sys.executable, "-c", idle, name] for name in ("intake", "deliver", "other")]
    commands += [[sys.executable, "-c", busy, "engine"], [str(server), "-c", "import time; time.sleep(60)"]]
    supervisor = f"import subprocess, sys, time\nfor one in {commands!r}: subprocess.Popen(one)\ntime.sleep(60)"
    process = Leashed([sys.executable, "-c", supervisor], log=tmp_path / "log")
    try:
        deadline = time.monotonic() + 30.0
        while time.monotonic() < deadline and process.tail(20).count("ready") < 6:
            time.sleep(0.05)
        found = used(process.keeper_pid)
        assert set(found) == set(SERVICES)
        assert len({one.pid for one in found.values()}) == 4
        # The engine's child does the work; that it is called intake, too, makes it no service.
        assert found["intake"].cpu_s < 0.25 < found["engine"].cpu_s < 10.0
        assert found["engine"].peak_mb > 120.0 > found["intake"].peak_mb > 60.0 > found["triton"].peak_mb > 1.0
    finally:
        os.killpg(process.keeper_pid, signal.SIGKILL)  # all of them are of its session
        process.stop()
    with pytest.raises(PeerError, match="does not run"):
        used(process.keeper_pid)


@contextmanager
def box_without_engine(folder: Path, _environment: Path, _study: dict[str, Any]) -> Iterator[Box]:
    """An intake that answers Success, an empty ledger, and nobody behind them."""
    folder.mkdir(parents=True)
    (sink,) = [one for one in CONTESTANTS if one.name == "sink"]
    receiver = sink.start(folder)
    intake = {"host": "127.0.0.1", "port": receiver.peer.port, "ae_title": receiver.peer.ae_title}
    settings = load_settings(init.write(folder / "box", {"intake": intake}, []))
    ledger = Ledger(settings.ledger_path)
    try:
        yield Box(settings, cast(Hospital, SimpleNamespace(pacs=SimpleNamespace(name=""))), receiver.process, ledger)
    finally:
        ledger.close()
        receiver.process.stop()


def test_a_study_without_an_alert_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "running_box", box_without_engine)
    monkeypatch.setattr(throughput, "SILENT_SECONDS", 1.0)
    with pytest.raises(PeerError, match="5 of 5 studies got no alert"):
        measure([1], 1, 28, 1, tmp_path, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_is_not_taken_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def box_without_intake(folder: Path, *others: Any) -> Iterator[Box]:
        nobody = load_settings(init.write(folder / "other", {"intake": {"port": free_port()}}, []))
        with box_without_engine(folder / "one", *others) as box:
            yield replace(box, settings=nobody)

    monkeypatch.setattr(throughput, "running_box", box_without_intake)
    with pytest.raises(PeerError, match="could not be sent"):
        measure([1], 1, 28, 1, tmp_path, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.interop
@pytest.mark.xdist_group("box")
def test_a_tiny_run_has_every_figure(tmp_path: Path) -> None:
    if find_orthanc() is None:
        pytest.skip("Orthanc is not installed")
    picture = tmp_path / "picture.svg"
    (tmp_path / "run").mkdir()
    arguments = ["bench", "throughput", "--scanners", "2", "--studies", "2", "--json", "--plot", str(picture)]
    arguments += ["--triton", str(triton_environment()), "--directory", str(tmp_path / "run")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["slices"], told["studies_per_scanner"], list(told["scanners"])) == (28, 2, ["2"])
    one = told["scanners"]["2"]
    assert (one["studies"], one["verdicts_that_differ"], one["studies_reopened"]) == (4, 0, 0)
    assert one["last_instance_to_ack_s"]["n"] == 4
    assert one["studies_per_h"] > 0
    assert one["last_instance_to_ack_s"]["p95"] <= 4 * 3600 / one["studies_per_h"]
    assert set(one["cpu_s_per_study"]) == set(SERVICES)
    assert one["cpu_s_per_study"]["engine"] > 0
    assert one["cpu_s_per_study"]["triton"] > 0
    for name in SERVICES:
        # The kernel counts pages in batches for each thread: a peak may shrink by some of them.
        assert 20 < one["peak_mb_after_a_quarter"][name] <= 1.01 * one["peak_mb"][name]
    assert picture.read_text().startswith("<svg")
    assert list((tmp_path / "run").iterdir()) == []
    assert mentioning(str(tmp_path)) == []


@pytest.mark.interop
@pytest.mark.xdist_group("box")
def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "appliance.cli", "bench", "throughput", "--scanners", "2", "--studies", "12"]
    command += ["--triton", str(triton_environment()), "--directory", str(tmp_path)]
    bench = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 100.0
        # The first of the files that a box has once images come.
        while time.monotonic() < deadline and not list(tmp_path.glob("*/box-*/box/**/*.dcm")):
            time.sleep(0.05)
        assert bench.poll() is None
        bench.send_signal(signal.SIGINT)
        assert bench.wait(30) != 0
    finally:
        bench.kill()
        bench.wait()
    assert list(tmp_path.iterdir()) == []
    assert mentioning(str(tmp_path)) == []
