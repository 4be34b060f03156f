"""Child processes end with the process that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from appliance.operations.leash import Leashed

STUBBORN = (
    "import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print(os.getpid(), flush=True); time.sleep(60)"
)
WILLING = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return condition()


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def pid_in(log: Path) -> int:
    assert eventually(lambda: log.exists() and log.read_text().endswith("\n"))
    return int(log.read_text().split()[0])


def test_stop_ends_a_willing_command_at_once(tmp_path: Path) -> None:
    leashed = Leashed([sys.executable, "-c", WILLING], log=tmp_path / "log")
    pid = pid_in(tmp_path / "log")
    assert leashed.running
    assert leashed.exit_code is None
    begun = time.monotonic()
    leashed.stop()
    assert time.monotonic() - begun < 2
    assert not alive(pid)
    assert not leashed.running
    assert leashed.exit_code == -signal.SIGTERM
    leashed.stop()


def test_stop_kills_a_stubborn_command_after_the_grace(tmp_path: Path) -> None:
    leashed = Leashed([sys.executable, "-c", STUBBORN], log=tmp_path / "log", grace=0.3)
    pid = pid_in(tmp_path / "log")
    begun = time.monotonic()
    leashed.stop()
    assert 0.3 <= time.monotonic() - begun < 2.3
    assert not alive(pid)
    assert leashed.exit_code == -signal.SIGKILL


def test_exit_code_and_last_words_are_known(tmp_path: Path) -> None:
    leashed = Leashed([sys.executable, "-c", "print('one', flush=True); raise SystemExit('two')"], log=tmp_path / "log")
    assert eventually(lambda: not leashed.running)
    assert leashed.exit_code == 1
    assert leashed.tail(1) == "two"
    leashed.stop()


def test_a_missing_program_is_told_in_the_log(tmp_path: Path) -> None:
    leashed = Leashed([tmp_path / "absent"], log=tmp_path / "log")
    assert eventually(lambda: not leashed.running)
    assert leashed.exit_code == 127
    assert "No such file" in leashed.tail()
    leashed.stop()


@pytest.mark.parametrize("script", [WILLING, STUBBORN], ids=["willing", "stubborn"])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_the_command_ends_when_its_starter_is_killed(tmp_path: Path, script: str, end: signal.Signals) -> None:
    """Started from a thread that ends at once, which must not end the command."""
    log = tmp_path / "log"
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, threading, time; from pathlib import Path; from appliance.operations.leash import Leashed\n"
            "kept = []\n"
            "start = lambda: kept.append(Leashed(sys.argv[2:], log=Path(sys.argv[1]), grace=0.3))\n"
            "thread = threading.Thread(target=start); thread.start(); thread.join(); time.sleep(60)",
            str(log),
            sys.executable,
            "-c",
            script,
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        pid = pid_in(log)
        time.sleep(0.2)
        assert alive(pid)
        parent.send_signal(end)
        parent.wait(10)
        assert eventually(lambda: not alive(pid), 5)
    finally:
        parent.kill()
        parent.wait()


def test_the_command_ends_when_its_keeper_is_killed(tmp_path: Path) -> None:
    leashed = Leashed([sys.executable, "-c", WILLING], log=tmp_path / "log")
    pid = pid_in(tmp_path / "log")
    keeper = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(keeper, signal.SIGKILL)
    assert eventually(lambda: not alive(pid), 5)
    leashed.stop()
