"""A power cut after storage commitment was promised: the request is still there, and its report will be made."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from pydicom import Dataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE
from pynetdicom.sop_class import StorageCommitmentPushModel, StorageCommitmentPushModelInstance

from appliance.ledger.schema import commitment
from appliance.ledger.store import Ledger
from tests.interop.powercut.invariants import LEDGER, SPOOL, violations
from tests.interop.powercut.recorded import Recording, connect, free_port, replayed, running, settings_file
from tests.interop.powercut.replay import MODES, Disk, answered, lay_out, lying_in, read_trace
from tests.interop.powercut.scanner import Sent
from tests.interop.powercut.test_cuts import ROUNDS, cut_points, fingerprint

pytestmark = [pytest.mark.interop, pytest.mark.slow, pytest.mark.xdist_group("powercut")]

N_ACTION_RSP = 0x8130
REQUESTS = 8
CUTS = 60 * ROUNDS


def requested(shim: Path, folder: Path, ignore: str = "") -> tuple[Recording, list[tuple[int, str]]]:
    """Intake is asked for commitment several times; after which operation each request counts as answered, and its UID.

    What is asked for never came, so each report will name a failure: the promise to report is what is tested.
    """
    port = free_port()
    config = settings_file(folder, port)
    state = folder / "state"
    before = Disk.of(state)
    environment = {
        **os.environ,
        "LD_PRELOAD": str(shim),
        "POWERCUT_ROOT": str(state.resolve()),
        "POWERCUT_TRACE": str(folder / "trace"),
        "POWERCUT_IGNORE": ignore,
    }
    transactions = {number: generate_uid() for number in range(1, REQUESTS + 1)}
    with running(config, environment, folder / "intake.log") as process:
        connect(port, Sent(), process).release()
        ae = AE("SCANNER")
        ae.add_requested_context(StorageCommitmentPushModel, ExplicitVRLittleEndian)
        association = ae.associate("127.0.0.1", port, ae_title="SCANSIDE")
        assert association.is_established
        for number, uid in transactions.items():
            status, _ = association.send_n_action(
                request(uid), 1, StorageCommitmentPushModel, StorageCommitmentPushModelInstance, msg_id=number
            )
            assert status.Status == 0x0000
        association.release()
    operations = read_trace(folder / "trace", state)
    answers = [(after, transactions[message]) for after, message in answered(operations, N_ACTION_RSP)]
    return Recording(before, operations, (), lying_in(state)), answers


def request(transaction: str) -> Dataset:
    """The information of an N-ACTION-RQ (PS3.4 J.3.2.1.1.1)."""
    one, asked = Dataset(), Dataset()
    one.ReferencedSOPClassUID, one.ReferencedSOPInstanceUID = CTImageStorage, generate_uid()
    asked.TransactionUID, asked.ReferencedSOPSequence = transaction, [one]
    return asked


def lost(recording: Recording, answers: list[tuple[int, str]], folder: Path) -> list[str]:
    """What does not hold after cuts; a state is looked at once for the same answers."""
    found = []
    seen = set()
    for number, disk in replayed(recording, cut_points(recording, CUTS, seed=4)):
        promised = {uid for after, uid in answers if after <= number}
        for mode in MODES:
            state = disk.after_cut(mode, random.Random(f"{number} {mode}"))
            key = fingerprint(state), len(promised)
            if key in seen:
                continue
            seen.add(key)
            place = folder / f"{number}-{mode}"
            place.mkdir()
            lay_out(state, place)
            if wrong := violations(place / LEDGER, place / SPOOL, (), start=False, cut=True):
                found += [f"cut {number} ({mode}): {one}" for one in wrong]
                continue
            ledger = Ledger(place / LEDGER)
            with ledger.read() as connection:
                kept = {row.transaction_uid for row in connection.execute(commitment.select())}
            ledger.close()
            found += [f"cut {number} ({mode}): {uid} was promised and is lost" for uid in sorted(promised - kept)]
    return found


@pytest.mark.timeout(120 * ROUNDS + 60)
def test_no_cut_loses_a_request_that_was_taken(shim: Path, tmp_path: Path, quick: Path) -> None:
    recording, answers = requested(shim, tmp_path)
    assert len(answers) == REQUESTS
    assert lost(recording, answers, quick)[:20] == []


def test_a_missing_sync_loses_one(shim: Path, tmp_path: Path, quick: Path) -> None:
    recording, answers = requested(shim, tmp_path, ignore="ledgersync")
    assert any("was promised and is lost" in one for one in lost(recording, answers, quick))
