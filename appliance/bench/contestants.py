"""The receivers that are compared: how each is started, and what it has kept afterwards."""

from __future__ import annotations

import os
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from appliance import init
from appliance.bench.processes import listens
from appliance.demo.orthanc import LOOPBACK, find_orthanc, free_port, start_orthanc
from appliance.intake.spool import path_of
from appliance.operations.leash import Leashed
from appliance.settings import load_settings
from dicom_io.errors import PeerError
from dicom_io.scu import Peer, echo

CALLING_AE = "BENCH"
START_SECONDS = 20.0

Kept = Mapping[str, Path | None]
"""SOP Instance UID → the file that it lies in, or None where there is no file to look into."""


@dataclass(frozen=True, slots=True)
class Receiver:
    """A running contestant.

    Attributes:
        kept: what it has, asked while it still runs.
    """

    peer: Peer
    process: Leashed
    kept: Callable[[], Kept]


@dataclass(frozen=True, slots=True)
class Contestant:
    """A receiver that can be started.

    Attributes:
        what: how it runs, in a few words.
        missing: why it cannot run here; "" if it can.
        start: starts it with everything that it keeps in an empty folder, and returns once it answers.
    """

    name: str
    what: str
    missing: Callable[[], str]
    start: Callable[[Path], Receiver]


def _never() -> str:
    return ""


def _without(program: str) -> Callable[[], str]:
    return lambda: "" if shutil.which(program) else f"{program} is not installed"


# --- scanside -------------------------------------------------------------------------------------------


def _start_scanside(folder: Path) -> Receiver:
    port = free_port()
    intake = {"host": LOOPBACK, "port": port, "maximum_associations": 100, "reserve_percent": 0.0, "reserve_bytes": 0}
    config = init.write(folder / "box", {"intake": intake})
    settings = load_settings(config)
    # The environment overrides the file; a benchmark must not write into the state folder of a box.
    unset = [word for name in os.environ if name.startswith("SCANSIDE_") for word in ("-u", name)]
    command: list[str | Path] = ["env", *unset, sys.executable, "-m", "appliance.cli", "--config", config, "intake"]

    def kept() -> Kept:
        with closing(sqlite3.connect(f"file:{settings.ledger_path}?mode=ro", uri=True)) as ledger:
            rows = ledger.execute("SELECT sop_instance_uid, digest FROM instance").fetchall()
        return {uid: path_of(settings.spool_directory, digest) for uid, digest in rows}

    return _started(command, folder, Peer(settings.intake.ae_title, LOOPBACK, port), kept)


# --- others ---------------------------------------------------------------------------------------------


def program(command: Callable[[int, Path], Sequence[str | Path]], ae_title: str = "PEER") -> Callable[[Path], Receiver]:
    """Starts a program that writes a file for each instance, with the UID at the end of the file's stem.

    Args:
        command: the program and its arguments, for a port and an output folder.
    """

    def start(folder: Path) -> Receiver:
        port, received = free_port(), folder / "received"
        received.mkdir()
        return _started(command(port, received), folder, Peer(ae_title, LOOPBACK, port), lambda: _files(received))

    return start


def _files(folder: Path) -> Kept:
    """Files named <UID>.dcm, or CT.<UID> as DCMTK names them."""
    return {path.name.removeprefix("CT.").removesuffix(".dcm"): path for path in folder.iterdir()}


def _storescp(port: int, folder: Path) -> list[str | Path]:
    return ["env", "TCP_NODELAY=1", "storescp", "--fork", "+B", "-pdu", "131072", "-od", folder, str(port)]


def _dcmrecv(port: int, folder: Path) -> list[str | Path]:
    """Unlike storescp it accepts only what a file names (DCMTK's asconfig.txt)."""
    config = folder.parent / "dcmrecv.cfg"
    config.write_text(_DCMRECV_CONFIG, encoding="ascii")
    tuned: list[str | Path] = ["env", "TCP_NODELAY=1", "dcmrecv", "+B", "-pdu", "131072"]
    return [*tuned, "-xf", config, "Default", "-od", folder, str(port)]


_DCMRECV_CONFIG = r"""
[[TransferSyntaxes]]
[Plain]
TransferSyntax1 = LittleEndianExplicit
TransferSyntax2 = LittleEndianImplicit
[[PresentationContexts]]
[Storage]
PresentationContext1 = VerificationSOPClass\Plain
PresentationContext2 = CTImageStorage\Plain
[[Profiles]]
[Default]
PresentationContexts = Storage
"""


def _start_sink(folder: Path) -> Receiver:
    port, tally = free_port(), folder / "tally"
    tally.touch()
    command: list[str | Path] = [sys.executable, "-m", "appliance.bench.sink", str(port), tally]

    def kept() -> Kept:
        return dict.fromkeys(tally.read_text("ascii").split())

    return _started(command, folder, Peer("SINK", LOOPBACK, port), kept)


def _start_orthanc(folder: Path) -> Receiver:
    found = find_orthanc()
    if found is None:
        raise PeerError("Orthanc is not installed", "orthanc", "leave it out")
    sender = {"bench": Peer(CALLING_AE, LOOPBACK, 104)}  # only its title and address count: nothing is sent to it
    orthanc = start_orthanc(found, folder / "orthanc", sender, synced=True, no_delay=True)
    return Receiver(
        Peer(orthanc.ae_title, LOOPBACK, orthanc.port),
        orthanc.process,
        lambda: dict.fromkeys(orthanc.instance_uids()),
    )


def _started(command: Sequence[str | Path], folder: Path, peer: Peer, kept: Callable[[], Kept]) -> Receiver:
    """Start a command and wait until it listens and answers a C-ECHO.

    The echo also lets it load what it loads at its first association, which a service in use has done long ago.
    """
    process = Leashed(command, log=folder / "receiver.log")
    try:
        deadline = time.monotonic() + START_SECONDS
        while not listens(peer.port):
            if not process.running or time.monotonic() > deadline:
                raise PeerError(f"it does not start: {process.tail(3)}", " ".join(map(str, command)))
            time.sleep(0.02)
        echo(peer, CALLING_AE)
    except BaseException:
        process.stop()
        raise
    return Receiver(peer, process, kept)


CONTESTANTS: tuple[Contestant, ...] = (
    Contestant("scanside", "`scanside intake`: synced and in the ledger before Success", _never, _start_scanside),
    Contestant(
        "storescp",
        "DCMTK with --fork +B -pdu 131072 and TCP_NODELAY=1; syncs nothing",
        _without("storescp"),
        program(_storescp),
    ),
    Contestant(
        "dcmrecv",
        "DCMTK with +B -pdu 131072 and TCP_NODELAY=1; one association at a time, syncs nothing",
        _without("dcmrecv"),
        program(_dcmrecv),
    ),
    Contestant(
        "orthanc",
        "its own storage and index, each file synced (its default), and TCP_NODELAY=1",
        lambda: "" if find_orthanc() else "Orthanc is not installed",
        _start_orthanc,
    ),
    Contestant(
        "pynetdicom",
        "the storage SCP of its documentation; syncs nothing",
        _never,
        program(lambda port, folder: [sys.executable, "-m", "appliance.bench.plain", str(port), folder]),
    ),
    Contestant("sink", "a bare socket in Python that answers Success and stores nothing", _never, _start_sink),
)
OURS = "scanside"
