"""What a real Orthanc is sent counts as delivered once it has committed itself to keep it, whatever dies meanwhile."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest

from appliance import init
from appliance.demo.orthanc import LOOPBACK, Orthanc, find_orthanc, free_ports, start_orthanc
from appliance.findings.render import KINDS, objects_for
from appliance.ledger.database import now
from appliance.ledger.store import Ledger, NewFinding, NewInstance
from appliance.ledger.views import study_report
from appliance.operations.leash import Leashed
from appliance.settings import load_settings
from dicom_io.errors import PeerError
from dicom_io.objects.common import part10
from dicom_io.scu import Peer, echo
from tests.builders import header
from tests.findings_support import ct_series, rendered, verdict_on
from tests.interop.box import wait_for

pytestmark = [pytest.mark.interop, pytest.mark.slow, pytest.mark.timeout(300)]


class Delivering:
    """`scanside intake` and `scanside deliver` with Orthanc as the only destination, and one verdict's objects."""

    def __init__(self, folder: Path, pacs: Orthanc, port: int) -> None:
        destination = {"kind": "dicom", "name": "pacs", "ae_title": pacs.ae_title, "host": LOOPBACK,
                       "port": pacs.port, "objects": list(KINDS), "commitment": "required",
                       "commitment_seconds": 2.0}  # fmt: skip
        sections = {
            "intake": {"host": LOOPBACK, "port": port, "reserve_percent": 0.0, "reserve_bytes": 0},
            "delivery": {"first_retry_seconds": 0.2, "longest_retry_seconds": 1.0},
        }
        self.config = init.write(folder / "box", sections, [destination])
        self.settings = load_settings(self.config)
        self.folder, self.pacs = folder, pacs
        self.ledger = Ledger(self.settings.ledger_path)
        self.uids = self._issue()
        self.intake = self.start("intake")
        self.peer = Peer("SCANSIDE", LOOPBACK, port)
        wait_for(self._answers, 60.0, lambda: f"intake does not answer: {self.intake.tail(20)}")

    def _issue(self) -> dict[str, str]:
        """A verdict and its objects, as the engine would leave them; object → UID."""
        (self.folder / "ct").mkdir()
        series = ct_series(self.folder / "ct")
        verdict = verdict_on(series)
        association = self.ledger.open_association("SCANNER", "SCANSIDE", LOOPBACK)
        self.ledger.record_instances([NewInstance(header(study=series.study_uid), "d", 1, association)])
        (arriving,) = self.ledger.arriving_studies()
        self.ledger.complete_study(1, arriving.last_instance_at, {"by": "test", "confidence": "high"})
        self.ledger.decide(1, verdict.package, "1", admitted=True, reason="", admission=[], selection=[], inputs=[])
        row = self.ledger.take_analysis([verdict.package])
        assert row is not None
        findings, uids = [], {}
        for urgency, name in enumerate(objects_for(verdict)):
            made = rendered(series, verdict, name)
            (self.settings.findings_directory / f"{name}.dcm").write_bytes(part10(made))
            uids[name] = str(made.SOPInstanceUID)
            findings.append(NewFinding(name, uids[name], f"{name}.dcm", ("pacs",), urgency))
        self.ledger.issue_verdict(row["id"], 1, verdict, now(), findings, admission=[], late=False)
        return uids

    def start(self, service: str) -> Leashed:
        command = [sys.executable, "-m", "appliance.cli", "--config", self.config, service]
        return Leashed(command, log=self.folder / f"{service}.log", grace=10.0)

    def _answers(self) -> bool | None:
        try:
            echo(self.peer, self.pacs.ae_title, timeout=2)
        except PeerError:
            return None
        return True

    def deliveries(self) -> list[dict[str, Any]]:
        return [dict(one) for one in study_report(self.ledger, 1)["deliveries"]]

    def events(self, delivery: int) -> list[str]:
        found = study_report(self.ledger, 1)["events"]
        return [one["name"] for one in found if one["detail"].get("delivery") == delivery]

    def committed(self, seconds: float = 90.0) -> list[dict[str, Any]]:
        def look() -> list[dict[str, Any]] | None:
            found = self.deliveries()
            return found if all(one["state"] == "acknowledged" for one in found) else None

        states = lambda: [(one["object"], one["state"], one["reason"]) for one in self.deliveries()]  # noqa: E731
        log = self.folder / "deliver.log"
        return wait_for(look, seconds, lambda: f"{states()}\n{log.read_text() if log.exists() else ''}")


@pytest.fixture
def delivering(tmp_path: Path) -> Iterator[Delivering]:
    program = find_orthanc()
    if program is None:
        pytest.skip("Orthanc is not installed")
    (port,) = free_ports(1)
    pacs = start_orthanc(program, tmp_path / "orthanc", {"scanside": Peer("SCANSIDE", LOOPBACK, port)}, ae_title="PACS")
    one = None
    try:
        one = Delivering(tmp_path, pacs, port)
        yield one
    finally:
        if one is not None:
            one.intake.release()
            one.ledger.close()
        pacs.stop()
        if one is not None:
            one.intake.stop()


def test_orthanc_commits_itself_and_stores_again_what_it_has_not(delivering: Delivering) -> None:
    lost = delivering.ledger.take_delivery("pacs")
    assert lost is not None
    delivering.ledger.settle_delivery(lost, "store")  # as if Orthanc had taken it, and then lost it
    deliver = delivering.start("deliver")
    try:
        found = delivering.committed()
    finally:
        deliver.stop()
    assert {one["reason"] for one in found} == {"storage committed"}
    assert delivering.pacs.instance_uids() == set(delivering.uids.values())
    for one in found:
        names = delivering.events(one["id"])
        stored, asked, done = ("delivery.stored", "delivery.asked", "delivery.acknowledged")
        assert names.index(stored) < names.index(asked) < names.index(done) == len(names) - 1
        assert ("delivery.unkept" in names) == (one["id"] == lost["id"])


def test_killed_at_any_moment_nothing_is_lost_and_nothing_committed_twice(delivering: Delivering) -> None:
    dice = random.Random(5)
    for _ in range(4):
        deliver = delivering.start("deliver")
        wait_for(lambda one=deliver: True if one.running else None, 10.0, lambda: "deliver does not run")  # type: ignore[misc]
        time.sleep(dice.uniform(0.8, 2.5))
        children = Path(f"/proc/{deliver.keeper_pid}/task/{deliver.keeper_pid}/children").read_text()
        for child in children.split():
            os.kill(int(child), signal.SIGKILL)
        deliver.stop()
    deliver = delivering.start("deliver")
    try:
        found = delivering.committed()
    finally:
        deliver.stop()
    assert delivering.pacs.instance_uids() == set(delivering.uids.values())
    for one in found:
        assert delivering.events(one["id"]).count("delivery.acknowledged") == 1
    kept = delivering.settings.findings_directory
    assert {pydicom.dcmread(path).SOPInstanceUID for path in kept.glob("*.dcm")} == set(delivering.uids.values())
