"""The senders: DCMTK's dcmsend, as it comes and without Nagle's algorithm, and the replay of this package.

Each sends every association an equal share of the images.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from appliance.bench.contestants import CALLING_AE
from appliance.bench.slices import Slice
from dicom_io.errors import PeerError
from dicom_io.scu import Peer

FIXED_SECONDS, SECONDS_FOR_EACH_IMAGE = 60.0, 0.5
"""A measurement that takes longer than this has failed."""


@dataclass(frozen=True, slots=True)
class Sent:
    """How a sending went.

    Attributes:
        responses_ms: from the first byte of an image to the end of its answer; empty where the sender cannot tell.
    """

    seconds: float
    responses_ms: Sequence[float]


@dataclass(frozen=True, slots=True)
class Sender:
    """A way to send; ``missing`` as for a contestant."""

    name: str
    missing: Callable[[], str]
    send: Callable[[Peer, Sequence[Slice], int, Path], Sent]


def shares(slices: Sequence[Slice], associations: int) -> list[Sequence[Slice]]:
    """The slices, dealt out evenly; fewer shares than asked for where there are not as many slices."""
    return [slices[number::associations] for number in range(min(associations, len(slices)))]


def _dcmsend(
    peer: Peer, slices: Sequence[Slice], associations: int, folder: Path, environment: Sequence[str] = ()
) -> Sent:
    """One process an association. The time is that from the first start to the last end, so that it includes what
    dcmsend does before it connects: reading every file's header."""
    commands = [
        [*environment, "dcmsend", "-aet", CALLING_AE, "-aec", peer.ae_title, peer.host, str(peer.port), f"@{path}"]
        for path in _lists(slices, associations, folder)
    ]
    deadline = _deadline(slices)
    began = time.perf_counter()
    with _ended(folder / "sender.log") as start:
        running = [start(command) for command in commands]
        for process in running:
            _wait("dcmsend", process, deadline, folder)
        return Sent(time.perf_counter() - began, ())


def _dcmsend_nodelay(peer: Peer, slices: Sequence[Slice], associations: int, folder: Path) -> Sent:
    """By default dcmsend waits with the end of an image until the receiver's kernel has acknowledged what came before.

    How long that takes depends on the receiver's sockets more than on its speed; with this setting it does not.
    """
    return _dcmsend(peer, slices, associations, folder, ("env", "TCP_NODELAY=1"))


def _replay(peer: Peer, slices: Sequence[Slice], associations: int, folder: Path) -> Sent:
    """One process with a thread for each association; see `appliance.bench.replay`."""
    lists = _lists(slices, associations, folder)
    command = [sys.executable, "-m", "appliance.bench.replay", peer.host, str(peer.port), CALLING_AE, peer.ae_title]
    with _ended(folder / "sender.log") as start:
        process = start([*command, *map(str, lists)])
        said = _wait("replay", process, _deadline(slices), folder, "go\n")
    told = json.loads(said.splitlines()[-1])
    if told["error"]:
        raise PeerError(f"replay: {told['error']}", str(peer))
    return Sent(float(told["seconds"]), [float(one) for one in told["responses_ms"]])


def _lists(slices: Sequence[Slice], associations: int, folder: Path) -> list[Path]:
    paths = []
    for number, share in enumerate(shares(slices, associations)):
        path = folder / f"share-{number}.txt"
        path.write_text("\n".join(str(one.path) for one in share), encoding="utf-8")
        paths.append(path)
    return paths


def _deadline(slices: Sequence[Slice]) -> float:
    return time.monotonic() + FIXED_SECONDS + SECONDS_FOR_EACH_IMAGE * len(slices)


@contextmanager
def _ended(log: Path) -> Iterator[Callable[[Sequence[str]], subprocess.Popen[str]]]:
    """Start senders that have all ended when this is left.

    They need no leash: should this process be killed, their receiver goes with it, and a sender without one ends.
    """
    running: list[subprocess.Popen[str]] = []

    with log.open("a", encoding="utf-8") as errors:

        def start(command: Sequence[str]) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
            )
            running.append(process)
            return process

        try:
            yield start
        finally:
            for process in running:
                process.kill()
                process.communicate()


def _wait(name: str, process: subprocess.Popen[str], deadline: float, folder: Path, say: str = "") -> str:
    """Wait until a sender has ended well; what it printed."""
    try:
        said, _ = process.communicate(say, timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired as error:
        raise PeerError(f"{name} does not finish", str(folder / "sender.log")) from error
    if process.returncode != 0:
        lines = (folder / "sender.log").read_text("utf-8", errors="replace").splitlines()
        raise PeerError(f"{name} failed with exit code {process.returncode}: {' '.join(lines[-2:]) or said}")
    return said


def _without_dcmsend() -> str:
    return "" if shutil.which("dcmsend") else "dcmsend is not installed"


SENDERS: tuple[Sender, ...] = (
    Sender("dcmsend", _without_dcmsend, _dcmsend),
    Sender("dcmsend-nodelay", _without_dcmsend, _dcmsend_nodelay),
    Sender("replay", lambda: "", _replay),
)
