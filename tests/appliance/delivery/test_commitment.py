"""Asking a PACS to keep what it was sent: one that does, offers nothing, or is away; and a file that is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pynetdicom import AE
from pynetdicom.sop_class import Verification

from appliance.delivery.commitment import Asker
from appliance.demo.orthanc import free_port
from appliance.ledger.store import Ledger
from dicom_io.commitment import CommitmentReport, Reference
from dicom_io.scu import Peer, identity
from tests.appliance.ledger.test_keeping import deliveries, states, stored
from tests.dicom_io.support import ct, head, save
from tests.dicom_io.test_commitment_user import Archive, encode_report

PIXELS = head(12, False)
EXPLICIT = "1.2.840.10008.1.2.1"


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return stored(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of the two objects that are stored."""
    for number, name in enumerate(("a", "b"), start=1):
        save(ct(PIXELS, 12, SOPInstanceUID=f"2.25.{number}"), tmp_path / f"{name}.dcm")
    return tmp_path


def asker(ledger: Ledger, folder: Path, peer: Peer, **changes: Any) -> Asker:
    options: dict[str, Any] = {
        "policy": "required", "report_seconds": 600.0, "attempts": 5, "first_retry_seconds": 0.0,
        "longest_retry_seconds": 0.0, **changes,
    }  # fmt: skip
    return Asker(ledger, "pacs", folder, lambda: peer, "SCANSIDE", **options)


class Committing(Archive):
    """A PACS that commits itself at once to all that it is asked for, and remembers what that was."""

    def _on_ask(self, event: Any) -> tuple[int, None]:
        asked = event.action_information
        kept = tuple(
            Reference(str(one.ReferencedSOPClassUID), str(one.ReferencedSOPInstanceUID))
            for one in asked.ReferencedSOPSequence
        )
        self._reports = (encode_report(CommitmentReport(str(asked.TransactionUID), kept, ()), EXPLICIT),)
        return super()._on_ask(event)


@pytest.fixture
def offering_nothing() -> Any:
    ae = AE(ae_title="PACS")
    ae.add_supported_context(Verification)
    server = ae.start_server(("127.0.0.1", 0), block=False)
    yield Peer("PACS", "127.0.0.1", server.server_address[1])
    server.shutdown()


def test_all_that_is_stored_is_asked_for_in_one_request(ledger: Ledger, folder: Path) -> None:
    pacs = Committing(seconds=0.05)
    try:
        ask = asker(ledger, folder, pacs.peer)
        assert ask()
        assert states(ledger) == ["acknowledged", "acknowledged"]
        assert not ask()
    finally:
        pacs.stop()
    ((_, _, asked),) = pacs.asked
    named = [(one.ReferencedSOPClassUID, one.ReferencedSOPInstanceUID) for one in asked.ReferencedSOPSequence]
    assert named == [identity(folder / "a.dcm"), identity(folder / "b.dcm")]


def test_where_none_is_offered_stored_is_enough_unless_it_is_required(
    ledger: Ledger,
    folder: Path,
    offering_nothing: Peer,
) -> None:
    assert asker(ledger, folder, offering_nothing)()
    assert states(ledger) == ["stored", "stored"]
    assert "accepts none of what was proposed" in deliveries(ledger)["a"]["reason"]
    assert asker(ledger, folder, offering_nothing, policy="if_offered")()
    assert states(ledger) == ["acknowledged", "acknowledged"]
    assert deliveries(ledger)["a"]["reason"] == "stored; it offers no storage commitment"


def test_a_setting_that_is_taken_back_holds_nothing(ledger: Ledger, folder: Path) -> None:
    assert asker(ledger, folder, Peer("PACS", "127.0.0.1", free_port()), policy="no")()
    assert states(ledger) == ["acknowledged", "acknowledged"]


def test_who_is_away_is_asked_again_until_the_tries_are_spent(ledger: Ledger, folder: Path) -> None:
    ask = asker(ledger, folder, Peer("PACS", "127.0.0.1", free_port()), attempts=3)
    assert ask() and states(ledger) == ["stored", "stored"]
    assert "cannot be reached" in deliveries(ledger)["a"]["reason"]
    for _ in range(3):
        ask()
    assert states(ledger) == ["dead", "dead"]
    assert "never committed itself" in deliveries(ledger)["a"]["reason"]


def test_a_file_that_is_gone_holds_up_nothing_else(ledger: Ledger, folder: Path) -> None:
    (folder / "a.dcm").unlink()
    pacs = Committing(seconds=0.05)
    try:
        assert asker(ledger, folder, pacs.peer)()
    finally:
        pacs.stop()
    assert states(ledger) == ["dead", "acknowledged"]
    assert "file cannot be read" in deliveries(ledger)["a"]["reason"]
