"""A whole box with a hospital around it, for tests: every service a process of its own, a real Triton, a real PACS."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pytest

from appliance import init
from appliance.demo.hospital import SCANNER_AE, Hospital, start_hospital
from appliance.demo.orthanc import LOOPBACK, find_orthanc, free_ports
from appliance.findings.render import KINDS
from appliance.ledger.store import Ledger
from appliance.ledger.views import find_study, study_report
from appliance.operations.leash import Leashed
from appliance.settings import Settings, load_settings
from dicom_io.header import read_header
from dicom_io.scu import Peer, SendResult, send
from triton_models.training.phantom import Phantom, simulate, write_study

ROOT = Path(__file__).resolve().parent.parent.parent
T = TypeVar("T")
URGENT_AE = "EMERGENCY"
"""A scanner whose studies go before all others."""
SETTLED = ("acknowledged", "rejected", "replaced", "dead")


def triton_environment() -> Path:
    """The environment of the Triton server; skips where there is none."""
    folder = Path(os.environ.get("SCANSIDE_TRITON_ENVIRONMENT", ROOT / ".venv-triton")).resolve()
    if not (folder / "bin" / "python3").exists():
        pytest.skip("no Triton environment (make setup, or set SCANSIDE_TRITON_ENVIRONMENT)")
    return folder


@cache
def head(bleed: str | None) -> Phantom:
    """The simulated heads that every test uses; the same as in the demo."""
    return simulate(7 if bleed else 19, bleed=bleed)


def study(folder: Path, bleed: str | None, name: str) -> tuple[str, list[Path]]:
    """A study of one of those heads with identifiers of its own: its UID and its files."""
    # Another minute for each name gives other UIDs; the name goes where a reader looks for it.
    files = write_study(head(bleed), folder / name, patient_id=name, accession_number=name[:16])
    return read_header(files[0]).study_instance_uid, files


class Box:
    """The box, its hospital, and a look into both."""

    def __init__(self, settings: Settings, config: Path, hospital: Hospital, process: Leashed) -> None:
        self.settings = settings
        self.config = config
        self.hospital = hospital
        self.process = process
        self.peer = Peer(settings.intake.ae_title, LOOPBACK, settings.intake.port)
        self.ledger = Ledger(settings.ledger_path)

    def send(self, files: list[Path], scanner: str = SCANNER_AE) -> list[SendResult]:
        """Play the scanner."""
        return send(files, self.peer, scanner)

    def report(self, uid: str) -> dict[str, Any] | None:
        """What the ledger knows of a study; None if nothing."""
        key = find_study(self.ledger, uid)
        return None if key is None else study_report(self.ledger, key)

    def settled(self, uid: str, seconds: float = 60.0) -> dict[str, Any]:
        """Wait until nothing more will happen to a study by itself."""

        def look() -> dict[str, Any] | None:
            report = self.report(uid)
            if report is None or report["state"] != "complete" or not report["analyses"]:
                return None
            done = all(one["state"] in ("refused", "issued", "failed") for one in report["analyses"])
            done = done and all(one["path"] for one in report["findings"])
            return report if done and all(one["state"] in SETTLED for one in report["deliveries"]) else None

        return wait_for(
            look, seconds, lambda: f"study {uid} did not settle: {self.report(uid)}\n{self.process.tail(30)}"
        )

    def messages(self, uid: str) -> list[Path]:
        """The distinct HL7 messages that the hospital received on a study."""
        return [path for path in self.hospital.messages() if uid in path.read_text(encoding="utf-8")]

    def transmissions(self, uid: str) -> int:
        """How often the hospital received a message on a study, repetitions included."""
        names = {path.stem for path in self.messages(uid)}
        return sum(one.get("id") in names for one in self.hospital.heard())

    def pid(self, service: str) -> int:
        """The process of one service."""

        def look() -> int | None:
            for entry in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    words = entry.read_bytes().split(b"\0")
                except OSError:
                    continue
                if service == "triton" and f"--grpc-port={self.settings.triton.grpc_port}".encode() in words:
                    return int(entry.parent.name)
                if str(self.config).encode() in words and words[-2:-1] == [service.encode()]:
                    return int(entry.parent.name)
            return None

        return wait_for(look, 30.0, lambda: f"{service} does not run\n{self.process.tail(30)}")

    def kill(self, service: str) -> None:
        """kill -9 one service; the supervisor starts it again."""
        os.kill(self.pid(service), signal.SIGKILL)

    def suspend(self, service: str) -> None:
        """Let one service do nothing, as one that hangs."""
        os.kill(self.pid(service), signal.SIGSTOP)

    def resume(self, service: str) -> None:
        """Let it go on."""
        os.kill(self.pid(service), signal.SIGCONT)

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the scanside command on this box."""
        return subprocess.run(
            [sys.executable, "-m", "appliance.cli", "--config", str(self.config), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
        )


def wait_for(look: Callable[[], T | None], seconds: float, complaint: Callable[[], str]) -> T:
    """Poll until there is something."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = look()
        if found is not None:
            return found
        time.sleep(0.05)
    pytest.fail(complaint())


@contextmanager
def running_box(
    folder: Path, *, answer: str = "AA", also: Sequence[Mapping[str, Any]] = (), **sections: dict[str, Any]
) -> Iterator[Box]:
    """Start a box and its hospital in a folder; stop both.

    Args:
        also: HL7 destinations beside "er"; the one listener stands for all.
    """
    environment = triton_environment()
    if find_orthanc() is None:
        pytest.skip("Orthanc is not installed")
    ports = free_ports(4)
    with start_hospital(folder / "hospital", scanside_port=ports[0], answer=answer) as hospital:
        config = init.write(
            folder / "box",
            {
                "intake": {"host": LOOPBACK, "port": ports[0], "reserve_percent": 0.0, "reserve_bytes": 0},
                "study": {"quiet_seconds": 5.0, "settle_seconds": 0.5, "stat_calling_ae_titles": [URGENT_AE]},
                "triton": {
                    "environment": str(environment),
                    "grpc_port": ports[1],
                    "http_port": ports[2],
                    "metrics_port": ports[3],
                },
                **sections,
            },
            [
                {"kind": "dicom", "name": "pacs", "ae_title": hospital.pacs.ae_title, "host": LOOPBACK,
                 "port": hospital.pacs.port, "objects": list(KINDS), "commitment": "no"},
                *(
                    {"kind": "hl7", "host": LOOPBACK, "port": hospital.hl7_port, "acknowledge_seconds": 5.0, **one}
                    for one in ({"name": "er"}, *also)
                ),
            ],
        )  # fmt: skip
        process = Leashed(
            [sys.executable, "-m", "appliance.cli", "--config", config, "run"], log=folder / "box.log", grace=12.0
        )
        box = Box(load_settings(config), config, hospital, process)
        try:
            wait_ready(box)
            yield box
        finally:
            box.ledger.close()
            process.stop()


def wait_ready(box: Box) -> None:
    """Wait until `scanside check` is content."""
    wait_for(
        lambda: True if box.process.running and box.command("check").returncode == 0 else None,
        90.0,
        lambda: f"the box is not ready: {box.command('check').stdout}\n{box.process.tail(30)}",
    )
