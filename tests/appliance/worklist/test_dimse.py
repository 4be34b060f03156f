"""UPS Push, Pull, Watch, Query and Event, with pynetdicom as the peer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.sop_class import (
    UnifiedProcedureStepEvent,
    UnifiedProcedureStepPull,
    UnifiedProcedureStepPush,
    UnifiedProcedureStepQuery,
    UnifiedProcedureStepWatch,
)

from appliance.events import Event
from appliance.ledger.store import Ledger
from appliance.ledger.views import event_counts
from appliance.worklist import dimse
from appliance.worklist.dimse import EventSender, Provider
from appliance.worklist.refusals import Refusals
from dicom_io import ups
from dicom_io.errors import ScansideError
from dicom_io.scu import Peer
from dicom_io.ups import UpsServer
from dicom_io.workitem import FILTERED, GLOBAL, to_dataset
from tests.workitems import READING, abandoned, performed, workitem

PUSH, PULL, WATCH, QUERY = (
    UnifiedProcedureStepPush, UnifiedProcedureStepPull, UnifiedProcedureStepWatch, UnifiedProcedureStepQuery,
)  # fmt: skip


class Peers:
    """A provider, and a reading workstation that asks and listens."""

    def __init__(self, folder: Path, accepted: tuple[str, ...] = ()) -> None:
        self.ledger = Ledger(folder / "ledger.sqlite")
        self.heard: list[tuple[str, int, Dataset]] = []
        ae = AE(ae_title="PACS")
        ae.add_supported_context(UnifiedProcedureStepEvent, scu_role=True, scp_role=True)
        self.deaf = False
        self.listener = ae.start_server(
            ("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_N_EVENT_REPORT, self._hear)]
        )
        self.peer = Peer("PACS", "127.0.0.1", self.listener.server_address[1])
        self.sender = EventSender(self.ledger, self.peer, "BOX")
        owner = Provider(self.ledger, Refusals(self.ledger), READING, {"PACS": self.peer}, self.sender.wake)
        self.server = UpsServer("BOX", "127.0.0.1", 0, owner, accepted_calling=accepted)
        self.sender.start()

    def _hear(self, event: Any) -> tuple[int, None]:
        if self.deaf:
            event.assoc.abort()
            return 0x0110, None
        request = event.request
        assert request.AffectedSOPClassUID == PUSH
        self.heard.append((request.AffectedSOPInstanceUID, event.event_type, event.event_information))
        return 0x0000, None

    def close(self) -> None:
        self.sender.stop()
        self.sender.join(10)
        self.server.stop()
        self.listener.shutdown()
        self.ledger.close()

    def associate(self, *classes: str, title: str = "RIS", syntax: str = ExplicitVRLittleEndian) -> Any:
        ae = AE(ae_title=title)
        ae.dimse_timeout = 20
        for one in classes:
            ae.add_requested_context(one, syntax)
        return ae.associate("127.0.0.1", self.server.port)

    def ask(self, send: Callable[[Any], Any], *classes: str, **options: Any) -> Any:
        association = self.associate(*(classes or (PUSH, PULL, WATCH, QUERY)), **options)
        assert association.is_established
        try:
            return send(association)
        finally:
            association.release()

    def create(self, uid: str | None, dataset: Dataset) -> int:
        return int(self.ask(lambda a: a.send_n_create(dataset, PUSH, uid))[0].Status)

    def action(self, kind: int, uid: str, **said: Any) -> int:
        information = Dataset()
        for keyword, value in said.items():
            setattr(information, keyword, value)
        return int(self.ask(lambda a: a.send_n_action(information, kind, PUSH, uid))[0].Status)

    def wait(self, count: int) -> None:
        end = time.monotonic() + 20
        while len(self.heard) < count and time.monotonic() < end:
            time.sleep(0.02)
        assert len(self.heard) == count


@pytest.fixture
def peers(tmp_path: Path) -> Iterator[Peers]:
    made = Peers(tmp_path)
    yield made
    made.close()


def step(**changes: Any) -> Dataset:
    return to_dataset(workitem(**changes))


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_a_life_from_push_to_completion(peers: Peers, syntax: str) -> None:
    association = peers.associate(PUSH, PULL, WATCH, syntax=syntax)
    try:
        assert association.send_n_create(step(), PUSH, "1.1")[0].Status == 0
        assert association.send_n_create(step(), PUSH, "1.1")[0].Status == 0x0111
        status, got = association.send_n_get([0x00741000, 0x00100010], PUSH, "1.1", meta_uid=PULL)
        assert (status.Status, got.ProcedureStepState, got.PatientName) == (0, "SCHEDULED", "Müller^Eva")
        assert "ProcedureStepLabel" not in got
        claim = Dataset()
        claim.ProcedureStepState, claim.TransactionUID = "IN PROGRESS", "1.9"
        assert association.send_n_action(claim, 1, PUSH, "1.1", meta_uid=PULL)[0].Status == 0
        claim.TransactionUID = "1.8"
        refused = association.send_n_action(claim, 1, PUSH, "1.1", meta_uid=PULL)[0]
        assert (refused.Status, refused.ErrorComment) == (0xC302, "the work item is already IN PROGRESS")
        done = to_dataset(performed())
        assert association.send_n_set(done, PUSH, "1.1", meta_uid=PULL)[0].Status == 0xC301
        done.TransactionUID = "1.9"
        assert association.send_n_set(done, PUSH, "1.1", meta_uid=PULL)[0].Status == 0
        claim.ProcedureStepState, claim.TransactionUID = "COMPLETED", "1.9"
        assert association.send_n_action(claim, 1, PUSH, "1.1", meta_uid=PULL)[0].Status == 0
        assert association.send_n_action(claim, 1, PUSH, "1.1", meta_uid=PULL)[0].Status == 0xB306
        _, got = association.send_n_get([], PUSH, "1.1", meta_uid=WATCH)
        assert (got.ProcedureStepState, "TransactionUID" in got) == ("COMPLETED", False)
    finally:
        association.release()


def test_names_in_another_character_set_are_read(peers: Peers) -> None:
    dataset = step()
    dataset.SpecificCharacterSet = "ISO_IR 100"
    assert peers.create("1.1", dataset) == 0
    _, got = peers.ask(lambda a: a.send_n_get([], PUSH, "1.1"))
    assert (got.PatientName, got.SpecificCharacterSet) == ("Müller^Eva", "ISO_IR 192")


def test_a_query(peers: Peers) -> None:
    for number, priority in enumerate(("LOW", "HIGH"), start=1):
        peers.create(f"1.{number}", step(study=f"1.2.{number}", priority=priority))
    keys = Dataset()
    keys.ScheduledProcedureStepPriority = keys.ProcedureStepLabel = ""
    keys.ProcedureStepState = "SCHEDULED"
    keys.ScheduledProcedureStepStartDateTime = "20261129-20261130"
    keys.PatientName = "müll*"
    request = Dataset()
    request.StudyInstanceUID, request.AccessionNumber = "", ""
    keys.ReferencedRequestSequence = [request]

    def find(model: str) -> list[Dataset]:
        answers = peers.ask(lambda a: list(a.send_c_find(keys, model)))
        assert answers[-1][0].Status == 0
        return [found for _, found in answers[:-1]]

    for model in (PULL, WATCH, QUERY):
        found = find(model)
        assert [one.ScheduledProcedureStepPriority for one in found] == ["HIGH", "LOW"]
        assert found[0].ReferencedRequestSequence[0].StudyInstanceUID == "1.2.2"
        assert found[0].SOPInstanceUID == "1.2"
    request.StudyInstanceUID = "1.2.1"
    assert [one.SOPInstanceUID for one in find(PULL)] == ["1.1"]


def test_a_query_that_finds_too_much_says_so(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ups, "MOST_MATCHES", 1)
    for uid in ("1.1", "1.2"):
        peers.create(uid, step())
    keys = Dataset()
    keys.PatientID = ""
    answers = peers.ask(lambda a: list(a.send_c_find(keys, PULL)))
    assert [one[0].Status for one in answers] == [0xFF00, 0xA700]


def test_a_subscriber_is_called(peers: Peers) -> None:
    assert peers.action(3, GLOBAL, ReceivingAE="PACS", DeletionLock="FALSE") == 0
    peers.create("1.1", step())
    peers.wait(1)
    assert peers.action(1, "1.1", ProcedureStepState="IN PROGRESS", TransactionUID="1.9") == 0
    assert peers.action(2, "1.1", ReasonForCancellation="moved away") == 0
    peers.wait(3)
    assert [(uid, kind) for uid, kind, _ in peers.heard] == [("1.1", 1), ("1.1", 1), ("1.1", 2)]
    assert peers.heard[0][2].ScheduledProcedureStepPriority == "MEDIUM"
    assert (peers.heard[2][2].RequestingAE, peers.heard[2][2].ReasonForCancellation) == ("RIS", "moved away")
    assert peers.action(5, GLOBAL, ReceivingAE="PACS") == 0
    peers.create("1.2", step())
    assert peers.action(4, GLOBAL, ReceivingAE="PACS") == 0
    said = to_dataset(abandoned())
    said.TransactionUID = "1.9"
    assert peers.ask(lambda a: a.send_n_set(said, PUSH, "1.1"))[0].Status == 0
    assert peers.ledger.next_events("PACS") == []
    assert len(peers.heard) == 3


def test_a_subscriber_that_was_away_hears_what_it_missed(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dimse, "FIRST_PAUSE", 0.1)
    peers.deaf = True
    peers.action(3, GLOBAL, ReceivingAE="PACS", DeletionLock="FALSE")
    for uid in ("1.1", "1.2"):
        peers.create(uid, step())
    time.sleep(0.5)
    peers.deaf = False
    peers.wait(2)
    assert [uid for uid, _, _ in peers.heard] == ["1.1", "1.2"]


def test_a_filtered_subscription(peers: Peers) -> None:
    keys = {"ReceivingAE": "PACS", "DeletionLock": "FALSE", "ScheduledProcedureStepPriority": "HIGH"}
    assert peers.action(3, FILTERED, **keys) == 0
    peers.create("1.1", step())
    peers.create("1.2", step(priority="HIGH"))
    peers.wait(1)
    assert peers.heard[0][0] == "1.2"


@pytest.mark.parametrize(
    ("kind", "uid", "said", "status"),
    [
        (3, GLOBAL, {"ReceivingAE": "OTHER", "DeletionLock": "FALSE"}, 0xC308),
        (3, "1.7", {"ReceivingAE": "PACS", "DeletionLock": "FALSE"}, 0xC307),
        (3, GLOBAL, {"ReceivingAE": "PACS", "DeletionLock": "MAYBE"}, 0x0115),
        (3, GLOBAL, {"DeletionLock": "TRUE"}, 0x0115),
        (5, "1.1", {"ReceivingAE": "PACS"}, 0xC314), (4, "1.7", {"ReceivingAE": "PACS"}, 0xC307),
        (9, "1.1", {"ReceivingAE": "PACS"}, 0x0123), (1, "1.1", {"ProcedureStepState": "DONE"}, 0x0115),
        (1, "1.1", {"ProcedureStepState": "SCHEDULED", "TransactionUID": "1.9"}, 0xC303),
        (1, "1.7", {"ProcedureStepState": "IN PROGRESS", "TransactionUID": "1.9"}, 0xC307),
        (1, "1.1", {"ProcedureStepState": "IN PROGRESS"}, 0xC301),
    ],
)  # fmt: skip
def test_what_cannot_be_is_answered_with_why(
    peers: Peers, kind: int, uid: str, said: dict[str, str], status: int
) -> None:
    peers.create("1.1", step())
    assert peers.action(kind, uid, **said) == status
    assert event_counts(peers.ledger)[Event.WORKLIST_REFUSED] == 1


def test_creations_that_cannot_be(peers: Peers) -> None:
    assert peers.create(None, step()) == 0x0106
    assert peers.create("1.1", step(ProcedureStepState="COMPLETED")) == 0xC309
    lacking = step()
    del lacking.ProcedureStepLabel
    assert peers.create("1.1", lacking) == 0x0120
    deep = inner = step()
    for _ in range(12):
        item = Dataset()
        inner.ReferencedRequestSequence = [item]
        inner = item
    assert peers.create("1.3", deep) == 0x0115
    assert peers.create("1.4", step()) == 0


def test_only_who_is_accepted_may_call(tmp_path: Path) -> None:
    peers = Peers(tmp_path, accepted=("READER",))
    assert not peers.associate(PUSH, title="RIS").is_established
    assert peers.associate(PUSH, title="READER").is_established
    peers.close()


def test_a_port_that_is_taken_is_told(peers: Peers) -> None:
    with pytest.raises(ScansideError, match="cannot listen"):
        UpsServer("BOX", "127.0.0.1", peers.server.port, None)  # type: ignore[arg-type]


def test_it_is_the_same_worklist_for_many_at_once(peers: Peers) -> None:
    peers.create("1.1", step())
    answers: list[int] = []
    threads = [
        threading.Thread(
            target=lambda number=number: answers.append(
                peers.action(1, "1.1", ProcedureStepState="IN PROGRESS", TransactionUID=f"1.9.{number}")
            )
        )
        for number in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [0] + [0xC302] * 5
