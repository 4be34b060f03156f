"""A real `scanside intake` under shim.c, with scanners that send to it from several associations at once."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from appliance import init
from tests.interop.powercut.replay import Disk, Operation, answered, lying_in, read_trace
from tests.interop.powercut.scanner import SUCCESS, Association, Image, NotAnswered, Sent, image

ROOT = Path(__file__).resolve().parents[3]
SENDERS = 4
START_SECONDS, STOP_SECONDS = 60.0, 20.0


@dataclass(frozen=True, slots=True)
class Recording:
    """What intake did to its state folder.

    Attributes:
        before: the disk before the first operation; `copy.deepcopy` it to replay.
        answers: (number of operations after which Success counts as sent, the image).
        after: what really lay in the folder in the end: path → bytes.
    """

    before: Disk
    operations: Sequence[Operation]
    answers: Sequence[tuple[int, Image]]
    after: dict[str, bytes]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


def settings_file(folder: Path, port: int) -> Path:
    """A configuration whose state lies in ``folder/state``: an empty folder, as systemd makes it for a new box."""
    config = init.write(
        folder,
        {
            "box": {"state_directory": "state", "log_level": "WARNING"},
            "intake": {"host": "127.0.0.1", "port": port, "reserve_percent": 0.0, "reserve_bytes": 0},
        },
    )
    shutil.rmtree(folder / "state")
    (folder / "state").mkdir()
    return config


def round_of_images(name: int, count: int) -> list[list[Image]]:
    """What each sender sends in one round: a study of its own; at the end the last of another's again, one image with
    other pixels under the same UID, and one that all of them send at the same time."""
    root = f"1.2.826.0.1.{name}"
    own = [
        [image(f"{root}.{sender}.{number}", f"{root}.{sender}", number) for number in range(1, count // SENDERS + 1)]
        for sender in range(1, SENDERS + 1)
    ]
    everybody = image(f"{root}.9.1", f"{root}.9", 1)
    again = [own[(sender + 1) % SENDERS][-1] for sender in range(SENDERS)]
    plans = [[*images, again[sender], everybody] for sender, images in enumerate(own)]
    plans[0].append(image(own[0][0].uid, f"{root}.1", 1, seed=1))
    return plans


def record(
    library: Path, folder: Path, *, ignore: str = "", rounds: int = 2, images: int = 30, killed: bool = False
) -> Recording:
    """Run intake once for each round and stop it at its end; every image has to be answered with Success.

    Args:
        ignore: see POWERCUT_IGNORE in shim.c.
        killed: end every round but the last with kill -9 instead, while the associations are still open. A cut in the
            round after it finds what no end of an association and no stop has tidied up.
    """
    port = free_port()
    config = settings_file(folder, port)
    state = folder / "state"
    before = Disk.of(state)
    sent = Sent()
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "POWERCUT_ROOT": str(state.resolve()),
        "POWERCUT_TRACE": str(folder / "trace"),
        "POWERCUT_IGNORE": ignore,
    }
    for number in range(1, rounds + 1):
        with running(config, environment, folder / "intake.log") as process:
            _send(round_of_images(number, images), port, sent, process, kill=killed and number < rounds)
    operations = read_trace(folder / "trace", state)
    answers = [(after, sent.by_message[message]) for after, message in answered(operations)]
    return Recording(before, operations, answers, lying_in(state))


@contextmanager
def running(config: Path, environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Intake, until the block is left; then it has to end in order, unless the block has killed it."""
    command = [sys.executable, "-m", "appliance.cli", "--config", str(config), "intake"]
    with log.open("ab") as output:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=output, stderr=output)
    try:
        yield process
        if process.poll() != -signal.SIGKILL:
            process.send_signal(signal.SIGTERM)
            code = process.wait(STOP_SECONDS)
            assert code == 0, f"intake ended with {code}\n{log.read_text('utf-8')}"
    finally:
        process.kill()
        process.wait()


def connect(port: int, sent: Sent, alive: subprocess.Popen[bytes], calling: str = "SCANNER") -> Association:
    """An association with an intake that may still be starting."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            return Association(port, sent, calling)
        except NotAnswered as error:
            if alive.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"intake does not answer (exit code {alive.poll()}): {error}") from error
            time.sleep(0.05)


def _send(
    plans: Sequence[Sequence[Image]], port: int, sent: Sent, process: subprocess.Popen[bytes], *, kill: bool = False
) -> None:
    """Send each plan over an association of its own. All but the first are released, unless intake is killed."""
    together = threading.Barrier(len(plans))
    failures: list[str] = []
    open_: list[Association] = []

    def scan(number: int, plan: Sequence[Image]) -> None:
        try:
            association = connect(port, sent, process, f"SCANNER{number}")
            open_.append(association)
            together.wait(START_SECONDS)
            for one in plan:
                if (status := association.store(one)) != SUCCESS:
                    failures.append(f"{one.uid} was answered with 0x{status:04X}")
            if number and not kill:
                association.release()
        except (AssertionError, NotAnswered, threading.BrokenBarrierError) as error:
            failures.append(f"sender {number}: {error!r}")

    threads = [threading.Thread(target=scan, args=each) for each in enumerate(plans)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if kill:
        process.kill()  # nothing is under way, so that no operation is done and not recorded
        process.wait()
    for association in open_:
        association.abort()
    assert not failures, failures


def replayed(recording: Recording, wanted: Sequence[int]) -> Iterator[tuple[int, Disk]]:
    """The disk after each of so many operations; ``wanted`` goes up."""
    disk = copy.deepcopy(recording.before)
    done = 0
    for number in wanted:
        for one in recording.operations[done:number]:
            disk.apply(one)
        done = number
        yield number, disk
