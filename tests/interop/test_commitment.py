"""Storage commitment by a real intake: told over a new association, over the one that asked, and after kill -9."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, generate_uid
from pynetdicom import AE, evt

from appliance import init
from appliance.demo.orthanc import LOOPBACK, Orthanc, find_orthanc, free_ports, start_orthanc
from appliance.ledger.store import Ledger
from appliance.operations.leash import Leashed
from appliance.settings import load_settings
from dicom_io.commitment import PUSH_MODEL, PUSH_MODEL_INSTANCE, TRANSFER_SYNTAXES
from dicom_io.errors import PeerError
from dicom_io.header import read_header
from dicom_io.scu import Peer, echo, send
from tests.interop.box import wait_for

pytestmark = [pytest.mark.interop, pytest.mark.slow]

SCANNER = "SCANNER"


class Intake:
    """`scanside intake`, a process of its own."""

    def __init__(self, folder: Path, port: int, peers: list[Peer]) -> None:
        sections = {
            "intake": {"host": LOOPBACK, "port": port, "reserve_percent": 0.0, "reserve_bytes": 0},
            "delivery": {"first_retry_seconds": 0.2, "longest_retry_seconds": 1.0},
        }
        self.config = init.write(folder / "box", sections)
        with self.config.open("a") as file:
            for one in peers:
                file.write(f'\n[[commitment_peer]]\nae_title = "{one.ae_title}"\nhost = "{one.host}"\n')
                file.write(f"port = {one.port}\n")
        self.settings = load_settings(self.config)
        self.peer = Peer(self.settings.intake.ae_title, LOOPBACK, port)
        self.log = folder / "intake.log"
        self.start()
        self.ledger = Ledger(self.settings.ledger_path)

    def start(self) -> None:
        command = [sys.executable, "-m", "appliance.cli", "--config", self.config, "intake"]
        self.process = Leashed(command, log=self.log, grace=10.0)
        wait_for(self._answers, 30.0, lambda: f"intake does not answer: {self.process.tail(20)}")

    def _answers(self) -> bool | None:
        try:
            echo(self.peer, "TEST", timeout=2)
        except PeerError:
            return None
        return True

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        children = Path(f"/proc/{self.process.keeper_pid}/task/{self.process.keeper_pid}/children").read_text()
        for child in children.split():
            os.kill(int(child), signal.SIGKILL)
        wait_for(lambda: None if self.process.running else True, 10.0, lambda: "intake survived kill -9")

    def stop(self) -> None:
        self.ledger.close()
        self.process.stop()

    def row(self, transaction: str) -> dict[str, Any] | None:
        return next((dict(one) for one in self.ledger.commitments() if one["transaction_uid"] == transaction), None)

    def wait_until(self, transaction: str, state: str) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            row = self.row(transaction)
            return row if row is not None and row["state"] == state else None

        return wait_for(look, 30.0, lambda: f"{self.row(transaction)}\n{self.process.tail(20)}")


@contextmanager
def intake(folder: Path, *peers: Peer, port: int = 0) -> Iterator[Intake]:
    one = Intake(folder, port or free_ports(1)[0], list(peers))
    try:
        yield one
    finally:
        one.stop()


class Device:
    """A modality on pynetdicom: asks, and hears reports on the association that asked or on its own port."""

    def __init__(self, ae_title: str) -> None:
        self.ae = AE(ae_title=ae_title)
        self.ae.add_requested_context(PUSH_MODEL, list(TRANSFER_SYNTAXES))
        self.ae.add_supported_context(PUSH_MODEL, list(TRANSFER_SYNTAXES), scu_role=False, scp_role=True)
        self.heard: list[tuple[int, Dataset]] = []
        self._changed = threading.Condition()
        self._handlers = [(evt.EVT_N_EVENT_REPORT, self._on_report)]

    def _on_report(self, event: Any) -> tuple[int, None]:
        with self._changed:
            self.heard.append((event.event_type, event.event_information))
            self._changed.notify_all()
        return 0x0000, None

    def wait_for_report(self) -> tuple[int, Dataset]:
        with self._changed:
            assert self._changed.wait_for(lambda: self.heard, 30)
            return self.heard[-1]

    @contextmanager
    def listening(self, port: int) -> Iterator[None]:
        server = self.ae.start_server((LOOPBACK, port), block=False, evt_handlers=self._handlers)
        try:
            yield
        finally:
            server.shutdown()

    @contextmanager
    def asking(self, box: Peer, transaction: str, uids: list[str]) -> Iterator[Any]:
        """An association on which commitment was asked for; released at the end."""
        association = self.ae.associate(box.host, box.port, ae_title=box.ae_title, evt_handlers=self._handlers)
        assert association.is_established
        request = Dataset()
        request.TransactionUID = transaction
        request.ReferencedSOPSequence = []
        for uid in uids:
            item = Dataset()
            item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = CTImageStorage, uid
            request.ReferencedSOPSequence.append(item)
        status, _ = association.send_n_action(request, 1, PUSH_MODEL, PUSH_MODEL_INSTANCE)
        assert status.Status == 0x0000
        try:
            yield association
        finally:
            association.release()


def ask(orthanc: Orthanc, path: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
        urllib.request.Request(orthanc.url + path, data=data), timeout=20
    ) as answer:
        return json.loads(answer.read())


@pytest.fixture
def slices(ge_head: Path) -> list[Path]:
    return sorted(ge_head.glob("*.dcm"))[:6]


@pytest.fixture
def uids(slices: list[Path]) -> list[str]:
    return [read_header(path).sop_instance_uid for path in slices]


def test_orthanc_sends_a_study_asks_and_is_told_over_a_new_association(
    tmp_path: Path, slices: list[Path], uids: list[str]
) -> None:
    program = find_orthanc()
    if program is None:
        pytest.skip("Orthanc is not installed")
    box_port, orthanc_port = free_ports(2)
    modalities = {"box": Peer("SCANSIDE", LOOPBACK, box_port), "scanner": Peer(SCANNER, LOOPBACK, 4)}
    orthanc = start_orthanc(program, tmp_path / "orthanc", modalities, port=orthanc_port)
    try:
        here = Peer(orthanc.ae_title, LOOPBACK, orthanc.port)
        with intake(tmp_path, here, port=box_port) as box:
            assert not [one for one in send(slices, here, SCANNER) if one.error]
            kept = ask(orthanc, "/instances")
            assert len(kept) == len(slices)
            orthanc.store_to("box", kept[:-1])
            held = {uid: ask(orthanc, f"/instances/{one}")["MainDicomTags"]["SOPInstanceUID"]
                    for uid, one in enumerate(kept)}  # fmt: skip
            assert set(held.values()) == set(uids)

            def settled(transaction: str) -> Any:
                known = ask(orthanc, f"/storage-commitment/{transaction}")
                return known if known["Status"] != "Pending" else None

            def told(resources: list[str]) -> Any:
                transaction = ask(orthanc, "/modalities/box/storage-commitment", {"Resources": resources})["ID"]
                answer = wait_for(
                    lambda: settled(transaction), 30.0, lambda: f"{box.row(transaction)}\n{box.process.tail(20)}"
                )
                assert box.wait_until(transaction, "acknowledged")["attempts"] == 1
                return answer

            whole = told(kept[:-1])
            assert whole["Status"] == "Success"
            assert {one["SOPInstanceUID"] for one in whole["Success"]} == {held[n] for n in range(len(kept) - 1)}
            # One was never sent here: Orthanc must not believe that it is safe.
            part = told(kept)
            assert part["Status"] == "Failure"
            failures = [(one["SOPInstanceUID"], one["FailureReason"]) for one in part["Failures"]]
            assert failures == [(held[len(kept) - 1], 0x0112)]
            assert len(part["Success"]) == len(kept) - 1
    finally:
        orthanc.stop()


@pytest.mark.parametrize("configured", [False, True])
def test_a_device_that_keeps_its_association_open_is_told_on_it(
    tmp_path: Path, slices: list[Path], uids: list[str], configured: bool
) -> None:
    peers = [Peer(SCANNER, LOOPBACK, port) for port in free_ports(1)] if configured else []  # where nobody listens
    with intake(tmp_path, *peers) as box:
        assert not [one for one in send(slices, box.peer, SCANNER) if one.error]
        device, transaction = Device(SCANNER), generate_uid(None)
        with device.asking(box.peer, transaction, [*uids, "1.2.3.4"]):
            event_type, data_set = device.wait_for_report()
            row = box.wait_until(transaction, "acknowledged")
        assert event_type == 2
        assert data_set.TransactionUID == transaction
        assert [one.ReferencedSOPInstanceUID for one in data_set.ReferencedSOPSequence] == uids
        assert [(one.ReferencedSOPInstanceUID, one.FailureReason) for one in data_set.FailedSOPSequence] == [
            ("1.2.3.4", 0x0112)
        ]
        assert (row["attempts"], row["failed"]) == (1, [["1.2.3.4", 0x0112]])
        assert len(device.heard) == 1


def test_a_device_without_an_address_that_does_not_wait(tmp_path: Path) -> None:
    with intake(tmp_path) as box:
        transaction = generate_uid(None)
        with Device("NOWHERE").asking(box.peer, transaction, ["1.2.3.4"]):
            pass
        assert box.wait_until(transaction, "dead")["reason"] == "no address configured for AE NOWHERE"


def test_killed_between_the_request_and_the_report(tmp_path: Path, slices: list[Path], uids: list[str]) -> None:
    (port,) = free_ports(1)
    device, transaction = Device(SCANNER), generate_uid(None)
    with intake(tmp_path, Peer(SCANNER, LOOPBACK, port)) as box:
        assert not [one for one in send(slices, box.peer, SCANNER) if one.error]
        with device.asking(box.peer, transaction, uids):
            box.kill()  # after Success to the request, and with nobody listening for the report
        assert box.row(transaction) is not None
        box.start()

        def tried() -> bool | None:
            row = box.row(transaction)
            return True if row is not None and row["attempts"] > 0 else None

        wait_for(tried, 30.0, lambda: f"{box.row(transaction)}\n{box.process.tail(20)}")
        with device.listening(port):
            event_type, data_set = device.wait_for_report()
            box.wait_until(transaction, "acknowledged")
        assert event_type == 1
        assert [one.ReferencedSOPInstanceUID for one in data_set.ReferencedSOPSequence] == uids
        assert len(device.heard) == 1
