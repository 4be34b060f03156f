"""A study's order is asked of worklists that others wrote: DCMTK's wlmscpfs, and Orthanc's plug-in."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.demo.orthanc import LOOPBACK, configuration, find_orthanc, free_port
from appliance.intake.scheduled import Asker
from appliance.ledger.orders import Order
from appliance.operations.leash import Leashed
from dicom_io.mwl import asking
from dicom_io.scu import Peer, echo
from tests.appliance.test_orders import bring, new_box
from tests.interop.box import wait_for
from tests.peers import program
from tests.scheduled import scheduled, write_item

pytestmark = pytest.mark.interop
PLUGIN = Path("/usr/share/orthanc/plugins/libModalityWorklists.so")


def items(folder: Path) -> None:
    write_item(scheduled(RequestedProcedurePriority="STAT"), folder / "one.wl")
    write_item(scheduled("A2", "1.2", "P2"), folder / "two.wl")
    write_item(scheduled("A3", "1.3", "P1"), folder / "three.wl")


def started(command: list[Any], peer: Peer, log: Path) -> Leashed:
    process = Leashed(command, log=log, grace=8.0)

    def ready() -> bool | None:
        try:
            with socket.create_connection((LOOPBACK, peer.port), timeout=1.0):
                pass
            echo(peer, "SCANSIDE")
            return True
        except Exception:
            return None

    try:
        wait_for(ready, 60.0, lambda: process.tail(20))
    except BaseException:
        process.stop()
        raise
    return process


@pytest.fixture(params=["wlmscpfs", "Orthanc"])
def peer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Peer]:
    """A worklist with three items, one of them of our study."""
    there = Peer("RIS", LOOPBACK, free_port())
    if request.param == "wlmscpfs":
        command = [program("wlmscpfs"), "--keep-char-set", "--data-files-path", tmp_path / "lists", str(there.port)]
        items(tmp_path / "lists" / "RIS")
        (tmp_path / "lists" / "RIS" / "lockfile").touch()
    else:
        orthanc = find_orthanc()
        if orthanc is None or not PLUGIN.is_file():
            pytest.skip("Orthanc's worklist plug-in is not installed")
        items(tmp_path / "lists")
        modalities = {"box": Peer("SCANSIDE", LOOPBACK, 1)}
        said = configuration(tmp_path / "orthanc", "RIS", free_port(), there.port, modalities)
        said |= {"Plugins": [str(PLUGIN)], "Worklists": {"Enable": True, "Database": str(tmp_path / "lists")}}
        said["DicomAlwaysAllowEcho"] = True
        (tmp_path / "orthanc.json").write_text(json.dumps(said))
        command = [orthanc, tmp_path / "orthanc.json"]
    process = started(command, there, tmp_path / "peer.log")
    yield there
    process.stop()


def test_it_is_asked_by_accession_study_and_patient(peer: Peer) -> None:
    with asking(peer, "SCANSIDE") as query:
        for keyword, value in (("AccessionNumber", "A1"), ("StudyInstanceUID", "1.1"), ("PatientID", "P1")):
            found, whole = query.find(keyword, value)
            assert whole
            assert "A1" in {one["00080050"]["Value"][0] for one in found}, keyword
            (item,) = [one for one in found if one["00080050"]["Value"] == ["A1"]]
            assert item["00100010"]["Value"] == [{"Alphabetic": "Müller^Eva"}]
            assert item["00401002"]["Value"] == ["Kopfschmerz, plötzlich"]
        assert query.find("AccessionNumber", "A9") == ([], True)


def test_the_order_of_a_study_that_arrives_is_found(peer: Peer, tmp_path: Path) -> None:
    box = new_box(tmp_path)
    bring(box, 1, slices=2)
    rung: list[bool] = []
    asker = Asker(
        box.ledger, lambda: peer, "SCANSIDE", ["STAT"], "", lambda: rung.append(True),
        answer_seconds=10.0, give_up_seconds=600.0,
    )  # fmt: skip
    asker.start()

    def found() -> Order | None:
        orders, _ = box.ledger.orders_for(["A1"], "1.1")
        return orders[0] if orders else None

    order = wait_for(found, 60.0, lambda: str(box.ledger.query_state(1)))
    asker.stop()
    asker.join(30)
    assert (order.accession, order.study_instance_uid, order.urgent, order.priority) == ("A1", "1.1", True, "S")
    assert (order.birth_date, order.reason) == ("19500203", "Kopfschmerz, plötzlich")
    assert order.patient[0].value == "P1" and order.patient[0].namespace == "HOSP"
    assert rung == [True] and box.ledger.query_state(1) == ("found", "")
    assert len(box.ledger.orders_for(["A1", "A2", "A3"], "1.1")[0]) == 1, "what is another study's is not kept"
