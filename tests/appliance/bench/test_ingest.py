"""The benchmark as a whole, tiny: its structure, and that a receiver that loses an image is an error."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from appliance.bench import processes
from appliance.bench.contestants import CONTESTANTS, Contestant, program
from appliance.bench.ingest import Plan, measure, plan, verify
from appliance.bench.slices import make
from appliance.cli import app
from appliance.demo.orthanc import free_port
from appliance.operations.leash import Leashed
from appliance.settings import load_settings
from dicom_io.errors import PeerError, ScansideError
from tests.builders import mentioning
from tests.peers import program as installed

pytestmark = pytest.mark.slow

KNOWN = {one.name: one for one in CONTESTANTS}


@pytest.mark.interop
@pytest.mark.timeout(240)
def test_a_tiny_run_has_every_figure(tmp_path: Path) -> None:
    installed("storescp")
    installed("dcmsend")
    arguments = ["bench", "ingest", "--images", "6", "--rounds", "1", "--associations", "1,2", "--json"]
    arguments += ["--contestants", "scanside,storescp,sink", "--directory", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["images"], told["rounds"], told["left_out"]) == (6, 1, [])
    assert told["machine"]["cores"] >= 1
    named = {(one["contestant"], one["sender"], one["associations"]) for one in told["results"]}
    everyone = ("scanside", "storescp", "sink")
    assert named == {(who, how, count) for who in everyone for how in ("dcmsend", "replay") for count in (1, 2)}
    for one in told["results"]:
        assert one["images_per_s"] > 0
        assert one["cpu_s_per_1000"] >= 0  # six images may take less than one tick of the clock
        assert len(one["rounds"]) == 1
        if one["sender"] == "replay":
            assert 0 < one["p50_ms"] <= one["p99_ms"]
        else:
            assert one["p50_ms"] is None
    speed = {(one["contestant"], one["sender"], one["associations"]): one["images_per_s"] for one in told["results"]}
    assert set(told["ratios"]) == {"storescp_1", "storescp_2", "sink_1", "sink_2"}
    for key, ratio in told["ratios"].items():
        who, count = key.rsplit("_", 1)
        ours, theirs = speed["scanside", "dcmsend", int(count)], speed[who, "dcmsend", int(count)]
        assert ratio == pytest.approx(ours / theirs, abs=0.002)
    assert told["sender_ratios"]["dcmsend"] == told["ratios"]
    assert set(told["sender_ratios"]["replay"]) == set(told["ratios"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.interop
@pytest.mark.parametrize("name", ["dcmrecv", "orthanc", "pynetdicom"])
def test_every_other_contestant_keeps_what_it_is_sent(name: str, tmp_path: Path) -> None:
    if KNOWN[name].missing():
        pytest.skip(KNOWN[name].missing())
    told = measure(Plan(4, 1, (2,), [KNOWN[name]]), tmp_path)
    assert {one["contestant"] for one in told["results"]} == {name}
    assert told["ratios"] == {}


@pytest.mark.interop
def test_a_receiver_that_loses_images_is_an_error(tmp_path: Path) -> None:
    installed("storescp")

    def forgetful(port: int, folder: Path) -> list[str | Path]:
        return ["sh", "-c", f"echo keeps nothing; exec storescp --ignore -od {folder} {port}"]

    loser = Contestant("loser", "answers Success and keeps nothing", lambda: "", program(forgetful))
    with pytest.raises(PeerError, match="loser lost 3 of 3 images; its last words: keeps nothing"):
        measure(Plan(3, 1, (1,), [loser]), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_our_receiver_takes_images_on_a_disk_that_a_box_would_call_full(tmp_path: Path) -> None:
    receiver = KNOWN["scanside"].start(tmp_path)
    try:
        intake = load_settings(tmp_path / "box" / "scanside.toml").intake
    finally:
        receiver.process.stop()
    assert (intake.reserve_percent, intake.reserve_bytes) == (0.0, 0), "the benchmark looks at the room itself"


def test_one_lost_foreign_or_broken_image_is_enough(tmp_path: Path) -> None:
    made = make(tmp_path, 3)
    kept = {one.uid: one.path for one in made}
    verify("peer", made, kept)
    verify("peer", made, dict.fromkeys(kept))
    with pytest.raises(PeerError, match="lost 1 of 3"):
        verify("peer", made, {uid: path for uid, path in kept.items() if uid != made[1].uid})
    with pytest.raises(PeerError, match="has 4 images where 3"):
        verify("peer", made, {**kept, "1.2.3": made[0].path})
    cut = tmp_path / "cut.dcm"
    cut.write_bytes(made[2].path.read_bytes()[:-2])
    for other in (cut, made[0].path, tmp_path / "absent.dcm"):
        with pytest.raises(PeerError, match="without its pixels"):
            verify("peer", made, {**kept, made[2].uid: other})


def test_what_is_missing_is_left_out_by_name(tmp_path: Path) -> None:
    absent = replace(KNOWN["storescp"], missing=lambda: "storescp is not installed")
    told = measure(Plan(1, 1, (1,), [absent]), tmp_path)
    assert {"name": "storescp", "reason": "storescp is not installed"} in told["left_out"]
    assert told["results"] == []


def test_names_and_numbers_are_checked() -> None:
    assert [one.name for one in plan(1, 1, [4, 1, 4], [], []).contestants] == list(KNOWN)
    assert plan(1, 1, [4, 1, 4], [], []).associations == [1, 4]
    with pytest.raises(ScansideError, match="no such contestant"):
        plan(1, 1, [1], ["storescu"], [])
    with pytest.raises(ScansideError, match="no such sender"):
        plan(1, 1, [1], [], ["storescu"])
    for wrong in ("0", "1,x", "", "65"):
        assert CliRunner().invoke(app, ["bench", "ingest", "--associations", wrong]).exit_code == 2


def test_cpu_time_counts_children_that_were_waited_for(tmp_path: Path) -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    code = f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {burn!r}]); print('done', flush=True)"
    process = Leashed([sys.executable, "-c", f"{code}; time.sleep(60)"], log=tmp_path / "log")
    try:
        deadline = time.monotonic() + 30.0
        while "done" not in process.tail() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert 0.25 < processes.cpu_seconds_below(process.keeper_pid) < 5.0
    finally:
        process.stop()
    assert processes.cpu_seconds_below(process.keeper_pid) == 0.0


def test_listening_is_seen_without_connecting(tmp_path: Path) -> None:
    import socket

    port = free_port()
    assert not processes.listens(port)
    with socket.create_server(("127.0.0.1", port)):
        assert processes.listens(port)
    assert processes.file_system(Path("/proc")) == "proc"


@pytest.mark.interop
def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "appliance.cli", "bench", "ingest", "--images", "20", "--associations", "2"]
    command += ["--contestants", "scanside,sink", "--rounds", "50", "--directory", str(tmp_path)]
    bench = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 60.0
        while not list(tmp_path.glob("*/[0-9]*/receiver.log")) and time.monotonic() < deadline:
            time.sleep(0.02)
        bench.send_signal(2)
        assert bench.wait(30) != 0
    finally:
        bench.kill()
        bench.wait()
    assert list(tmp_path.iterdir()) == []
    assert not mentioning(str(tmp_path))
