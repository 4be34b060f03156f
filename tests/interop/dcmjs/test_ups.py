"""Unified Procedure Steps with dcmjs-dimse at the other end: our worklist is asked by it, our performer asks it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from appliance.ledger.store import Ledger
from appliance.worklist.dimse import Provider
from appliance.worklist.refusals import Refusals
from dicom_io.ups import UpsServer
from tests.appliance.worklist.test_performer import DONE, Work
from tests.foreign_worklist import ai_task
from tests.interop.dcmjs.test_dcmjs import HERE
from tests.peers import node_packages
from tests.workitems import READING, performed, workitem

pytestmark = [pytest.mark.interop, pytest.mark.xdist_group("dcmjs")]


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """The folder into which the pinned packages are installed, once for all test processes."""
    return node_packages(HERE)


def named(step: dict[str, Any]) -> dict[str, Any]:
    """A data set of the DICOM JSON model by keywords, as dcmjs has it."""
    from pydicom.datadict import keyword_for_tag

    found: dict[str, Any] = {}
    for key, element in step.items():
        values = element.get("Value", [])
        if element["vr"] == "SQ":
            values = [named(one) for one in values]
        elif element["vr"] == "PN":
            values = [one["Alphabetic"] for one in values]
        plain = values[0] if len(values) == 1 and element["vr"] != "SQ" else values
        found[keyword_for_tag(key)] = "" if values == [] and element["vr"] != "SQ" else plain
    return found


def test_dcmjs_works_on_our_worklist(node_modules: Path, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    server = UpsServer("BOX", "127.0.0.1", 0, Provider(ledger, Refusals(ledger), READING, {}, lambda: None))

    def state(value: str, lock: str = "1.2.3.4") -> list[Any]:
        return ["action", "2.25.7", {"ProcedureStepState": value, "TransactionUID": lock}, 1]

    ended = {**named(performed()), "TransactionUID": "1.2.3.4"}
    asked: list[Any] = [
        ["create", "2.25.7", named(workitem("1.1", "HIGH"))],
        ["create", "2.25.7", named(workitem("1.1", "HIGH"))],
        ["find", "", {"ProcedureStepState": "SCHEDULED", "SOPInstanceUID": "", "PatientName": ""}],
        state("IN PROGRESS"),
        state("IN PROGRESS", "9.9"),
        state("COMPLETED"),
        ["set", "2.25.7", {**ended, "TransactionUID": "9.9"}],
        ["set", "2.25.7", ended],
        state("COMPLETED"),
        ["get", "2.25.7", {}],
    ]
    command = ["node", str(HERE / "ups.cjs"), str(server.port), "DCMJS", "BOX", json.dumps(asked)]
    done = subprocess.run(command, cwd=node_modules, capture_output=True, text=True, timeout=60)
    server.stop()
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["outcome"] == "released"
    assert [(name, status) for name, status, _ in said["answers"]] == [
        ("create", 0), ("create", 0x0111), ("find", 0xFF00), ("find", 0), ("action", 0), ("action", 0xC302),
        ("action", 0xC304), ("set", 0xC301), ("set", 0), ("action", 0), ("get", 0),
    ]  # fmt: skip
    answers = [found for _, _, found in said["answers"]]
    assert answers[2]["SOPInstanceUID"] == "2.25.7"
    assert answers[-1]["ProcedureStepState"] == "COMPLETED" and "TransactionUID" not in answers[-1]
    assert ledger.workitem("2.25.7")["created_by"] == "DCMJS"
    ledger.close()


def test_our_performer_works_on_its_worklist(node_modules: Path, tmp_path: Path) -> None:
    step = named(json.loads(ai_task("2.25.7").to_json()))
    command = ["node", str(HERE / "worklist.cjs"), json.dumps(step)]
    with subprocess.Popen(command, cwd=node_modules, stdout=subprocess.PIPE, text=True) as peer:
        assert peer.stdout is not None
        try:
            work = Work(tmp_path)
            work.there.stop()
            work.there.port = json.loads(peer.stdout.readline())[1]
            work.step(2)
            assert work.task("2.25.7").state == "claimed"
            work.outcome = DONE
            work.step(2)
            assert work.task("2.25.7").state == "completed"
            lock = work.task("2.25.7").transaction_uid
        finally:
            peer.kill()
        heard = [json.loads(line) for line in peer.stdout]
    assert [one[:2] for one in heard] == [["action", 1], ["set", 0], ["action", 1]]
    assert heard[0] == ["action", 1, 0, "IN PROGRESS", lock] and heard[2] == ["action", 1, 0, "COMPLETED", lock]
    (done,) = heard[1][2]["UnifiedProcedureStepPerformedProcedureSequence"]
    assert done["OutputInformationSequence"][0]["StudyInstanceUID"] == "1.1"
    work.ledger.close()
