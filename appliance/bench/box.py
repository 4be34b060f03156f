"""A whole box, with a hospital around it, to be measured: every service a process, a real Triton, HL7 and a PACS."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance import init
from appliance.demo.hospital import Hospital, start_hospital
from appliance.demo.orthanc import LOOPBACK, free_ports
from appliance.ledger.store import Ledger
from appliance.ledger.views import find_study, study_report
from appliance.operations.leash import Leashed
from appliance.settings import Settings, load_settings
from dicom_io.errors import PeerError

READY_SECONDS = 90.0
SCANNER = "BENCH"
"""AE title that the benchmarks send under."""


@dataclass(frozen=True, slots=True)
class Box:
    """A running box; `ledger` is a look into it."""

    settings: Settings
    hospital: Hospital
    process: Leashed
    ledger: Ledger

    def report(self, uid: str) -> dict[str, Any] | None:
        """What the box knows of a study; None if nothing."""
        key = find_study(self.ledger, uid)
        return None if key is None else study_report(self.ledger, key)


@contextmanager
def running_box(folder: Path, environment: Path, study: Mapping[str, Any]) -> Iterator[Box]:
    """Start a box and its hospital in a folder; stop both.

    Args:
        environment: the virtual environment of its Triton.
        study: what differs from the defaults in the settings' section ``study``.

    Raises:
        PeerError: it does not start.
    """
    ports = free_ports(4)
    with start_hospital(folder / "hospital", scanside_port=ports[0]) as hospital:
        config = init.write(
            folder / "box",
            {
                "intake": {"host": LOOPBACK, "port": ports[0], "reserve_percent": 0.0, "reserve_bytes": 0},
                "study": study,
                "retention": {"start_percent": 0.0, "stop_percent": 0.0},
                "triton": {"environment": str(environment.resolve()), "grpc_port": ports[1], "http_port": ports[2],
                           "metrics_port": ports[3]},
            },
            [
                {"kind": "hl7", "name": "er", "host": LOOPBACK, "port": hospital.hl7_port},
                {"kind": "dicom", "name": "pacs", "ae_title": hospital.pacs.ae_title, "host": LOOPBACK,
                 "port": hospital.pacs.port},
            ],
        )  # fmt: skip
        # The environment overrides the file; a benchmark must not write into the state folder of a box.
        unset = [word for name in os.environ if name.startswith("SCANSIDE_") for word in ("-u", name)]
        scanside = ["env", *unset, sys.executable, "-m", "appliance.cli", "--config", str(config)]
        process = Leashed([*scanside, "run"], log=folder / "box.log", grace=12.0)
        try:
            deadline = time.monotonic() + READY_SECONDS
            while subprocess.run([*scanside, "check"], capture_output=True, timeout=60).returncode != 0:
                if time.monotonic() > deadline or not process.running:
                    raise PeerError("the box is not ready", str(process.log), process.tail(5))
            ledger = Ledger(load_settings(config).ledger_path)
            try:
                yield Box(load_settings(config), hospital, process, ledger)
            finally:
                ledger.close()
        finally:
            process.stop()


class Sending:
    """Studies on their way from scanners of their own, each study one association; made ready, then started.

    Args:
        every: seconds from one image of a study to the next; 0: as fast as they are taken.
    """

    def __init__(self, settings: Settings, studies: Sequence[Sequence[Path]], every: float, folder: Path) -> None:
        lists = []
        for number, paths in enumerate(studies):
            lists.append(folder / f"list-{number}")
            lists[-1].write_text("\n".join(map(str, paths)))
        intake = settings.intake
        command: list[str | Path] = [sys.executable, "-m", "appliance.bench.replay"]
        command += ["--every", str(every)] if every else []
        command += [LOOPBACK, str(intake.port), SCANNER, intake.ae_title, *lists]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def start(self) -> None:
        """Begin to send."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def wait(self) -> str:
        """Wait until all is sent: the sender's own account, as JSON."""
        told, _ = self._process.communicate()
        return told
