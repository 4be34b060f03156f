"""A delivery stays open until its peer has committed itself to keeping it, whatever is lost on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from appliance.ledger.database import now
from appliance.ledger.records import Verdict
from appliance.ledger.retention import Rules
from appliance.ledger.store import Ledger, NewFinding, NewInstance
from appliance.ledger.views import study_report
from dicom_io.commitment import CommitmentReport, Failure, Reference
from tests.builders import header

CLASS = "1.2.840.10008.5.1.4.1.1.7"


def stored(folder: Path) -> Ledger:
    """A ledger with two objects on their way to "pacs", both stored there."""
    one = Ledger(folder / "ledger.sqlite")
    one.record_instances([NewInstance(header(), "d", 1, one.open_association("S", "B", "127.0.0.1"))])
    (arriving,) = one.arriving_studies()
    one.complete_study(1, arriving.last_instance_at, {"by": "test", "confidence": "high"})
    one.decide(1, "pkg", "1", admitted=True, reason="", admission=[], selection=[], inputs=[])
    row = one.take_analysis(["pkg"])
    assert row is not None
    verdict = Verdict("1.2.3", "1.2.3.1", "pkg", "1", "n", True, 0.9, 0.5, {}, 1.0, (), (), (), ())
    findings = [NewFinding(name, f"2.25.{i}", f"{name}.dcm", ("pacs",), i) for i, name in enumerate(("a", "b"), 1)]
    one.issue_verdict(row["id"], 1, verdict, now(), findings, admission=[], late=False)
    for _ in findings:
        taken = one.take_delivery("pacs")
        assert taken is not None
        one.settle_delivery(taken, "store")
    return one


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return stored(tmp_path)


def deliveries(ledger: Ledger) -> dict[str, dict[str, Any]]:
    return {one["object"]: dict(one) for one in study_report(ledger, 1)["deliveries"]}


def states(ledger: Ledger) -> list[str]:
    return [one["state"] for one in deliveries(ledger).values()]


def report(transaction: str, kept: str = "", failed: str = "") -> CommitmentReport:
    def reference(number: str) -> Reference:
        return Reference(CLASS, f"2.25.{number}")

    return CommitmentReport(
        transaction, tuple(map(reference, kept)), tuple(Failure(reference(one), 0x0112) for one in failed)
    )


def test_stored_is_not_delivered(ledger: Ledger) -> None:
    assert states(ledger) == ["stored", "stored"]
    assert all(one["acknowledged_at"] is None for one in deliveries(ledger).values())
    assert ledger.take_delivery("pacs") is None  # nor is it sent again


def test_committed_is(ledger: Ledger) -> None:
    rows = ledger.ask_for_commitment("pacs", "T", 600)
    assert [row["uid"] for row in rows] == ["2.25.1", "2.25.2"]
    assert states(ledger) == ["asked", "asked"] and ledger.is_asked("T")
    assert ledger.ask_for_commitment("pacs", "U", 600) == []
    assert ledger.storage_committed(report("T", kept="12"), 5, 0)
    assert states(ledger) == ["acknowledged", "acknowledged"] and not ledger.is_asked("T")
    assert all(one["acknowledged_at"] for one in deliveries(ledger).values())
    assert ledger.storage_committed(report("T", kept="12"), 5, 0)  # told twice
    assert states(ledger) == ["acknowledged", "acknowledged"]


def test_what_was_not_kept_is_stored_again(ledger: Ledger) -> None:
    ledger.ask_for_commitment("pacs", "T", 600)
    assert ledger.storage_committed(report("T", kept="1", failed="2"), 5, 0)
    found = deliveries(ledger)
    assert (found["a"]["state"], found["b"]["state"]) == ("acknowledged", "pending")
    assert "has not kept it (0x0112)" in found["b"]["reason"]
    again = ledger.take_delivery("pacs")
    assert again is not None and again["uid"] == "2.25.2"


def test_what_is_never_kept_is_a_dead_letter_in_the_end(ledger: Ledger) -> None:
    ledger.ask_for_commitment("pacs", "T", 600)
    assert ledger.storage_committed(report("T", kept="1", failed="2"), 2, 0)
    assert deliveries(ledger)["b"]["state"] == "dead"


def test_a_report_in_part_leaves_the_rest_asked(ledger: Ledger) -> None:
    ledger.ask_for_commitment("pacs", "T", 600)
    assert ledger.storage_committed(report("T", kept="2"), 5, 0)
    assert states(ledger) == ["asked", "acknowledged"]


def test_without_a_report_it_is_asked_anew_and_the_old_one_is_late(ledger: Ledger) -> None:
    """Also after kill -9 between the row and the request: nobody knows whether it was asked."""
    ledger.ask_for_commitment("pacs", "T", 0.0)
    rows = ledger.ask_for_commitment("pacs", "U", 600)
    assert [row["transaction_uid"] for row in rows] == ["T", "T"]
    assert not ledger.storage_committed(report("T", kept="12"), 5, 0)
    assert states(ledger) == ["asked", "asked"]
    ledger.settle_asked(rows, "T", "unask", "late", 0)  # an answer to the first try
    assert states(ledger) == ["asked", "asked"]
    assert ledger.storage_committed(report("U", kept="12"), 5, 0)
    assert states(ledger) == ["acknowledged", "acknowledged"]


def test_nobody_can_commit_to_what_was_not_asked(ledger: Ledger) -> None:
    assert not ledger.storage_committed(report("T", kept="12"), 5, 0)
    assert states(ledger) == ["stored", "stored"]
    ledger.ask_for_commitment("pacs", "T", 600)
    assert ledger.storage_committed(report("T", kept="9"), 5, 0)
    assert states(ledger) == ["asked", "asked"]


def test_a_request_that_failed_is_made_later(ledger: Ledger) -> None:
    rows = ledger.ask_for_commitment("pacs", "T", 600)
    ledger.settle_asked(rows, "T", "unask", "nobody there", 100)
    assert states(ledger) == ["stored", "stored"]
    assert ledger.ask_for_commitment("pacs", "U", 600) == []


def test_a_start_of_delivery_leaves_it_and_a_removed_destination_ends_it(ledger: Ledger) -> None:
    ledger.ask_for_commitment("pacs", "T", 600)
    assert ledger.park_deliveries() == 0
    assert states(ledger) == ["asked", "asked"]
    assert ledger.abandon_deliveries(["other"]) == 2
    assert states(ledger) == ["dead", "dead"]


def test_retention_keeps_what_is_not_committed(ledger: Ledger) -> None:
    ledger.ask_for_commitment("pacs", "T", 600)
    (study,) = ledger.kept_studies(Rules(["pkg"], 3, 0))
    assert any("asked" in reason for reason in study.holds), study.holds
