"""The hospital around the box: a PACS and an HL7 listener on this machine, for the demo and for tests."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from appliance.demo import listener
from appliance.demo.orthanc import LOOPBACK, Pacs, find_orthanc, start_orthanc
from appliance.demo.plain_pacs import FallbackPacs
from appliance.operations.leash import Leashed
from dicom_io.errors import PeerError
from dicom_io.scu import Peer

PACS_AE = "PACS"
SCANNER_AE = "SCANNER"
LISTENER_TIMEOUT = 10.0


@dataclass(frozen=True, slots=True)
class Hospital:
    """A running PACS and HL7 listener; leave its ``with`` block, or call `stop`, to end both.

    Attributes:
        pacs: the archive; its ``name`` says which kind could be started.
        hl7_host: where the HL7 listener takes messages, with ``hl7_port``.
        received: the folder of the messages that the listener kept.
    """

    pacs: Pacs
    hl7_host: str
    hl7_port: int
    received: Path
    _listener: Leashed

    def messages(self) -> list[Path]:
        """The messages that the listener kept, each once, oldest first."""
        return sorted(self.received.glob("*.hl7"), key=lambda path: (path.stat().st_mtime_ns, path.name))

    def heard(self) -> list[dict[str, Any]]:
        """What the listener reported, line by line: ``state`` (stored, duplicate, refused, unreadable), ``id`` …"""
        lines = self._listener.log.read_text("utf-8", errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def stop(self) -> None:
        """Stop both and wait until they are gone."""
        self._listener.release()
        self.pacs.stop()
        self._listener.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()


def start_hospital(folder: Path, *, scanside_port: int, scanside_ae: str = "SCANSIDE", answer: str = "AA") -> Hospital:
    """Start the PACS and the HL7 listener on free ports of the loopback interface, and wait until both answer.

    Both end with this process, even if it is killed.

    Args:
        folder: receives ``pacs/`` and ``hl7/`` with their logs and all that they keep.
        scanside_port, scanside_ae: the box, which may send to the PACS and to which the PACS can send (Orthanc's
            modality ``scanside``).
        answer: what the listener answers to every message: AA, AE or AR.

    Raises:
        PeerError: one of them does not start. Where Orthanc is not installed the PACS is a `FallbackPacs` instead.
    """
    received = folder / "hl7"
    received.mkdir(parents=True, exist_ok=True)
    ready = received / "port"
    ready.unlink(missing_ok=True)
    ear = Leashed(
        # -P: the folder of this script must not shadow anything.
        [sys.executable, "-P", Path(listener.__file__), "--host", LOOPBACK, "--port", "0", "--out", received,
         "--ready-file", ready, "--answer", answer, "--json"],
        log=received / "listener.log",
        grace=2.0,
    )  # fmt: skip
    pacs: Pacs | None = None
    try:
        program = find_orthanc()
        if program is None:
            pacs = FallbackPacs(folder / "pacs", ae_title=PACS_AE)
        else:
            modalities = {
                "scanside": Peer(scanside_ae, LOOPBACK, scanside_port),
                "scanner": Peer(SCANNER_AE, LOOPBACK, scanside_port),
            }
            pacs = start_orthanc(program, folder / "pacs", modalities, ae_title=PACS_AE)
        return Hospital(pacs, LOOPBACK, _port_from(ready, ear), received, ear)
    except BaseException:
        if pacs is not None:
            pacs.stop()
        ear.stop()
        raise


def _port_from(ready: Path, process: Leashed) -> int:
    """The port that the listener wrote once it took connections."""
    deadline = time.monotonic() + LISTENER_TIMEOUT
    while time.monotonic() < deadline:
        if ready.exists():
            return int(ready.read_text())
        if not process.running:
            break
        time.sleep(0.01)
    raise PeerError(f"the HL7 listener did not start: {process.tail(1)}", str(process.log), "read its log")
