"""The worklist as a service: a verdict raises an item, a subscriber hears it, and kill -9 takes nothing away."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect

from appliance import init
from appliance.demo.orthanc import LOOPBACK, free_ports
from appliance.ledger.marks import Mark
from appliance.ledger.store import Ledger
from appliance.operations.leash import Leashed
from appliance.settings import load_settings
from dicom_io.errors import PeerError
from dicom_io.scu import Peer, echo
from dicom_io.workitem import put, text
from tests.interop.box import wait_for
from tests.workitems import READING, workitem

pytestmark = [pytest.mark.interop, pytest.mark.slow]
GLOBAL = "1.2.840.10008.5.1.4.34.5"


class Service:
    """`scanside worklist` as a process."""

    def __init__(self, folder: Path) -> None:
        web, dicom, intake = free_ports(3)
        self.config = init.write(
            folder / "box", {"intake": {"port": intake}, "worklist": {"web_port": web, "port": dicom}}, []
        )
        self.settings = load_settings(self.config)
        self.root = f"{LOOPBACK}:{web}/ups-rs"
        self.http = httpx.Client(base_url=f"http://{self.root}/", timeout=30, trust_env=False)
        self.peer = Peer("SCANSIDE", LOOPBACK, dicom)
        self.log = folder / "worklist.log"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "appliance.cli", "--config", self.config, "worklist"]
        self.process = Leashed(command, log=self.log, grace=12.0)

        def ready() -> bool | None:
            try:
                if self.http.get("workitems").status_code not in (200, 204):
                    return None
                echo(self.peer, "READER")  # its two ports do not open at once
            except (httpx.TransportError, PeerError):
                return None
            return True

        wait_for(ready, 90.0, lambda: self.process.tail(30))

    def kill(self) -> None:
        os.killpg(self.process.keeper_pid, signal.SIGKILL)
        self.process.stop()

    def put_on(self, uid: str, priority: str = "LOW") -> int:
        body = json.dumps(workitem(f"1.2.{uid}", priority))
        headers = {"Content-Type": "application/dicom+json"}
        return self.http.post(f"workitems?{uid}", content=body, headers=headers).status_code


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    made = Service(tmp_path)
    yield made
    made.http.close()
    made.process.stop()


def hear(channel: Any) -> tuple[str, int, str]:
    step = json.loads(channel.recv(timeout=30))
    said = text(step, "ScheduledProcedureStepPriority") or text(step, "SCPStatus")
    return text(step, "AffectedSOPInstanceUID"), int(text(step, "EventTypeID")), said


def test_what_a_subscriber_has_yet_to_hear_outlives_a_kill(service: Service) -> None:
    echo(service.peer, "READER")
    assert service.http.post(f"workitems/{GLOBAL}/subscribers/READER").status_code == 201
    assert service.put_on("1.1") == 201
    channel = f"ws://{service.root}/subscribers/READER"
    with connect(channel, proxy=None) as listening:
        assert hear(listening) == ("1.1", 1, "LOW")
        # As delivery does it, from another process: the doorbell wakes the channel.
        ledger = Ledger(service.settings.ledger_path)
        step = workitem("1.2.1.1")
        put(step, "SOPInstanceUID", "UI", "2.25.7")
        ledger.mark_study(Mark("m", "1.2.1.1", "pkg", "reprioritise", True, "suspected", step), READING)
        ledger.close()
        assert hear(listening) == ("1.1", 1, "HIGH")
    assert service.put_on("1.2") == 201
    service.kill()
    service.start()
    with connect(channel, proxy=None) as listening:
        assert hear(listening) == ("1.2", 1, "LOW")
        assert hear(listening) == (GLOBAL, 4, "RESTARTED")
    found = service.http.get("workitems").json()
    assert [text(one, "SOPInstanceUID") for one in found] == ["1.1", "1.2"]


def test_killed_while_it_answers_it_keeps_what_it_acknowledged(service: Service) -> None:
    acknowledged: list[str] = []
    for turn in range(3):
        end = time.monotonic() + 0.5 + turn * 0.3
        number = 0
        while time.monotonic() < end:
            number += 1
            uid = f"1.{turn + 1}.{number}"
            assert service.put_on(uid) == 201
            acknowledged.append(uid)
        service.kill()
        service.start()
    found = {text(one, "SOPInstanceUID") for one in service.http.get("workitems?limit=1000").json()}
    assert set(acknowledged) == found


def test_the_command_shows_what_is_on_it(service: Service) -> None:
    service.put_on("1.1", "HIGH")
    command = [sys.executable, "-m", "appliance.cli", "--config", str(service.config), "workitems"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "HIGH" in shown.stdout and "Read CT head" in shown.stdout
    (step,) = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60).stdout)
    assert text(step, "SOPInstanceUID") == "1.1"
