"""kill -9 of the real intake, step by step: at its first operation on a file or a peer, its second, its third...

Four scanners send without a break, and send again what was not answered, as scanners do, while intake is killed and
started again, hundreds of times. A write at which it is killed is half done. runner.py starts it and says how.
POWERCUT_ROUNDS=n kills it n times as often.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.interop.powercut.invariants import LEDGER, SPOOL, violations
from tests.interop.powercut.recorded import ROOT, SENDERS, free_port, settings_file
from tests.interop.powercut.scanner import SUCCESS, Association, Image, NotAnswered, Sent, image

pytestmark = [pytest.mark.interop, pytest.mark.slow, pytest.mark.xdist_group("powercut")]

ROUNDS = int(os.environ.get("POWERCUT_ROUNDS", "1"))
BOXES, KILLS_OF_A_BOX = 2 * ROUNDS, 40
FARTHEST = 400
"""A start of intake takes some 30 operations, an instance about as many; so this is some instances after a start.
Ten boxes are killed at every one of these steps."""
FIRST_STARTS = 12 * ROUNDS


class Runner:
    """runner.py under shim.c, for boxes below one folder."""

    def __init__(self, library: Path, folder: Path) -> None:
        environment = {
            **os.environ,
            "LD_PRELOAD": str(library),
            "POWERCUT_ROOT": str(folder.resolve()),
            "POWERCUT_NOSYNC": "1",  # what is written survives a kill; only a power cut asks for more
        }
        self._log = (folder / "runner.log").open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.interop.powercut.runner"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )

    def start(self, box: Path, kill_at: int = 0) -> int:
        """Start intake; its process."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{box} {kill_at}\n".encode())
        self._process.stdin.flush()
        return self._answer()

    def wait(self) -> int:
        """Wait until it has ended; its exit status, or minus the signal that ended it."""
        return self._answer()

    def _answer(self) -> int:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the runner has ended\n{Path(self._log.name).read_text('utf-8')}"
        return int(line)

    def close(self) -> None:
        """Stop it, and the intake with it."""
        self._process.communicate(timeout=20)
        self._log.close()


@pytest.fixture(scope="module")
def boxes(shim: Path) -> Iterator[tuple[Runner, Path]]:
    """A runner, and the folder below which its boxes lie."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="kills-", dir=memory if memory.is_dir() else None) as name:
        runner = Runner(shim, Path(name))
        try:
            yield runner, Path(name)
        finally:
            runner.close()


class Ward:
    """Scanners that never give up, and what was answered to them with Success.

    Each sends new images of a study of its own; every fifth it sends an earlier one again, every seventh one with
    other pixels under the UID of an earlier one.
    """

    def __init__(self, number: int, port: int) -> None:
        self._root = f"1.2.826.0.2.{number}"
        self._port = port
        self._sent = Sent()
        self._over = threading.Event()
        self.answered: list[Image] = []
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._scan, args=(sender,)) for sender in range(1, SENDERS + 1)]
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Let each scanner send what it has begun, until it is answered."""
        self._over.set()
        for thread in self._threads:
            thread.join(30.0)
        assert not any(thread.is_alive() for thread in self._threads), "a scanner still waits for an answer"

    def _scan(self, sender: int) -> None:
        study = f"{self._root}.{sender}"
        chance = random.Random(study)
        mine: list[Image] = []
        association: Association | None = None
        while not self._over.is_set():
            number = len(mine) + 1
            one = image(f"{study}.{number}", study, number)
            if mine and number % 5 == 0:
                one = chance.choice(mine)
            elif mine and number % 7 == 0:
                one = image(chance.choice(mine).uid, study, number, seed=number)
            association = self._until_answered(association, one)
            mine.append(one)
        if association is not None:
            association.release()

    def _until_answered(self, association: Association | None, one: Image) -> Association | None:
        deadline = math.inf  # while intake is killed over and over, a slow machine may serve nobody for long
        while time.monotonic() < deadline:
            if self._over.is_set():
                deadline = min(deadline, time.monotonic() + 25.0)
            try:
                association = association or Association(self._port, self._sent)
                if (status := association.store(one)) == SUCCESS:
                    self.answered.append(one)
                else:
                    self.failures.append(f"{one.uid} was answered with 0x{status:04X}")
                return association
            except NotAnswered:
                if association is not None:
                    association.abort()
                association = None
                time.sleep(0.002)
        self.failures.append(f"{one.uid} was never answered")
        return None


@contextmanager
def scanning(number: int, port: int) -> Iterator[Ward]:
    """Scanners that have stopped when this is left; intake has to run then."""
    ward = Ward(number, port)
    try:
        yield ward
    finally:
        ward.finish()


def look(box: Path, ward: Ward, quick: Path) -> list[str]:
    """What does not hold. The ledger is looked at in a copy, so that intake finds what it left itself."""
    answered = list(ward.answered)
    copy = quick / "copy"
    copy.mkdir()
    for name in (LEDGER, f"{LEDGER}-wal"):
        if (box / "state" / name).exists():
            shutil.copy(box / "state" / name, copy / name)
    try:
        return violations(copy / LEDGER, box / "state" / SPOOL, answered, start=False)
    finally:
        shutil.rmtree(copy)


def stop(runner: Runner, process: int) -> None:
    """SIGTERM, which ends intake in order."""
    os.kill(process, signal.SIGTERM)
    assert runner.wait() == 0


def in_the_end(box: Path, ward: Ward) -> list[str]:
    """What does not hold of a box whose intake has stopped and whose scanners are content."""
    return ward.failures + violations(box / "state" / LEDGER, box / "state" / SPOOL, ward.answered)


@pytest.mark.parametrize("number", range(BOXES))
def test_killed_at_every_step(boxes: tuple[Runner, Path], quick: Path, number: int) -> None:
    runner, folder = boxes
    port = free_port()
    box = folder / f"box-{number}"
    settings_file(box, port)
    steps = random.Random(1).sample(range(1, FARTHEST + 1), FARTHEST)
    mine = number * KILLS_OF_A_BOX % FARTHEST
    found: list[str] = []
    with scanning(number, port) as ward:
        for step in steps[mine : mine + KILLS_OF_A_BOX]:
            runner.start(box, step)
            assert runner.wait() == -signal.SIGKILL
            found += [f"killed at {step}: {one}" for one in look(box, ward, quick)]
        process = runner.start(box)
    stop(runner, process)
    assert found == []
    assert in_the_end(box, ward) == []
    assert len(ward.answered) >= KILLS_OF_A_BOX


@pytest.mark.timeout(120 * ROUNDS)
def test_killed_while_it_starts_for_the_first_time(boxes: tuple[Runner, Path], quick: Path) -> None:
    runner, folder = boxes
    found = []
    for number in range(FIRST_STARTS):
        port = free_port()
        box = folder / f"new-{number}"
        settings_file(box, port)
        step = random.Random(number).randint(1, 600)
        with scanning(1000 + number, port) as ward:
            runner.start(box, step)
            assert runner.wait() == -signal.SIGKILL
            found += [f"killed at {step}: {one}" for one in look(box, ward, quick)]
            process = runner.start(box)
        stop(runner, process)
        found += [f"killed at {step}: {one}" for one in in_the_end(box, ward)]
        assert ward.answered
    assert found == []
