"""A RIS and a vendor's worklist are told that a study goes first, and that it no longer does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hl7
import pytest

from appliance.ledger.database import LedgerError
from appliance.ledger.orders import Identifier, NewMessage, NewOrder
from appliance.ledger.views import study_report
from appliance.services.delivery import _deliverer
from appliance.settings import Settings, SettingsError, load_settings
from tests.appliance.delivery.test_hl7 import Peer, polite
from tests.appliance.delivery.test_webhook import Receiver
from tests.appliance.test_worklist_marks import Shown
from tests.findings_support import verdict_on

BODY = '{"study": "${study_uid}", "accession": "${accession}", "score": ${probability}, "why": "${text}"}'


class Told(Shown):
    """A box with one worklist of others."""

    def __init__(self, folder: Path, destination: dict[str, Any], **header: Any) -> None:
        super().__init__(folder, "suggest", **header)
        self.settings = self.settings.model_copy(
            update={"destination": Settings(destination=[{"name": "list", **destination}]).destination}
        )
        self.issuer._settings = self.settings
        self.deliver = _deliverer(self.settings, self.ledger, self.settings.destination[0], self.stack)

    def outcomes(self) -> list[tuple[str, str]]:
        found = []
        while (row := self.ledger.take_delivery("list")) is not None:
            outcome, reason = self.deliver(row)
            self.ledger.settle_delivery(row, outcome, reason, wait_seconds=60.0)
            found.append((outcome, reason))
        return found


@pytest.fixture
def ris() -> Iterator[Peer]:
    peer = Peer(polite, polite, polite)
    yield peer
    peer.close()


def received(peer: Peer) -> list[hl7.Message]:
    return [hl7.parse(one if isinstance(one, str) else one.decode()) for one in peer.received]


def order(peer: Peer, **more: Any) -> dict[str, Any]:
    return {"kind": "hl7_order", "host": "127.0.0.1", "port": peer.port, **more}


def test_a_ris_is_told_of_the_new_priority_and_of_the_old_one(tmp_path: Path, ris: Peer) -> None:
    told = Told(tmp_path, order(ris, usual_priority="R"))
    told.issue()
    assert told.outcomes() == [("acknowledge", "AA")]
    told.issue()
    assert told.outcomes() == []
    told.issue(positive=False)
    assert [outcome for outcome, _ in told.outcomes()] == ["acknowledge"]
    first, second = received(ris)
    assert str(first["MSH"][0][9]) == "ORM^O01^ORM_O01"
    assert str(first["PID"][0][3]).startswith("P-1")
    for message, priority in ((first, "S"), (second, "R")):
        assert str(message["ORC"][0][1]) == "XO"
        assert str(message["ORC"][0][3]).startswith("ACC-1")
        assert str(message["ORC"][0][7]) == str(message["OBR"][0][27]) == f"^^^^^{priority}"
    assert "haemorrhage suspected" in str(first["NTE"][0][3])
    assert "withdrawn" in str(second["NTE"][0][3])
    assert str(first["MSH"][0][10]) != str(second["MSH"][0][10])
    told.stack.close()
    told.ledger.close()


def test_what_was_raised_is_lowered_also_once_the_package_is_only_evaluated(tmp_path: Path, ris: Peer) -> None:
    told = Told(tmp_path, order(ris, usual_priority="R"))
    told.issue()
    told.issue(positive=False, mode="evaluation")
    told.outcomes()
    assert [str(one["ORC"][0][7])[5:] for one in received(ris)] == ["S", "R"]
    assert {str(one["MSH"][0][11]) for one in received(ris)} == {"P"}
    told.stack.close()
    told.ledger.close()


def test_a_withdrawal_puts_nothing_back_that_nobody_knows(tmp_path: Path, ris: Peer) -> None:
    told = Told(tmp_path, order(ris))
    told.issue()
    told.issue(positive=False)
    told.outcomes()
    assert len(received(ris)) == 1
    told.stack.close()
    told.ledger.close()


def test_a_ris_that_rejected_the_new_priority_is_not_asked_again_once_the_study_is_negative(
    tmp_path: Path, ris: Peer
) -> None:
    told = Told(tmp_path, order(ris, usual_priority="R"))
    told.issue()
    row = told.ledger.take_delivery("list")
    assert row is not None
    told.ledger.settle_delivery(row, "reject")
    told.issue(positive=False)
    with pytest.raises(LedgerError, match="revision 2 is negative"):
        told.ledger.requeue_delivery(row["id"], ["list"])
    told.stack.close()
    told.ledger.close()


@pytest.mark.parametrize("mode", ["evaluation", "shadow", ""])
def test_what_is_not_clinical_moves_nobody(tmp_path: Path, ris: Peer, mode: str) -> None:
    told = Told(tmp_path, order(ris, usual_priority="R"))
    told.issue(mode=mode)
    assert told.outcomes() == []
    told.ledger.close()


def heard(priority: str, urgent: bool, *, cancelled: bool = False, patient: str = "P-1") -> NewMessage:
    """A message with an order of the study's accession number."""
    placed = NewOrder("ACC-1", "", "", cancelled, (Identifier(patient),), priority=priority, urgent=urgent)
    return NewMessage("RIS", "RIS", "M1", "ORM^O01", "d", b"", "AA", "", (placed,))


@pytest.mark.parametrize(
    ("message", "sent"),
    [
        (heard("S", True), []),
        (heard("A", False), ["S", "A"]),
        (heard("S", True, cancelled=True), ["S", "R"]),
        (heard("S", True, patient="PID-8"), ["S", "R"]),
        (heard("A", False, patient="PID-8"), ["S", "R"]),
        (None, ["S", "R"]),
    ],
    ids=["urgent already", "its priority", "cancelled", "another's, urgent", "another's priority", "none"],
)
def test_what_the_order_says_counts(tmp_path: Path, ris: Peer, message: NewMessage | None, sent: list[str]) -> None:
    told = Told(tmp_path, order(ris, usual_priority="R"))
    if message is not None:
        told.ledger.take_message(message)
    told.issue()
    told.issue(positive=False)
    told.outcomes()
    assert [str(one["ORC"][0][7])[5:] for one in received(ris)] == sent
    told.stack.close()
    told.ledger.close()


def rest(receiver: Receiver, **more: Any) -> dict[str, Any]:
    url = f"http://127.0.0.1:{receiver.server_address[1]}/studies/${{accession}}"
    return {"kind": "rest", "mode": "reprioritise", "url": url, "body": BODY, **more}


@pytest.fixture
def vendor() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.shutdown()
    made.server_close()


def test_a_vendor_is_asked_by_the_sites_templates(tmp_path: Path, vendor: Receiver) -> None:
    secret = tmp_path / "secret"
    secret.write_text("Bearer abc\n")
    told = Told(
        tmp_path, rest(vendor, secret_file=secret, withdraw_body='{"gone": "${id}"}'), AccessionNumber='A/1 "x"'
    )
    told.issue()
    assert told.outcomes()[0][0] == "acknowledge"
    path, headers, body = vendor.requests[0]
    said = json.loads(body)
    assert path == "/studies/A%2F1%20%22x%22"
    assert (headers["Authorization"], said["accession"], said["study"]) == (
        "Bearer abc", 'A/1 "x"', told.series.study_uid,
    )  # fmt: skip
    assert isinstance(said["score"], float) and "haemorrhage suspected" in said["why"]
    told.issue(positive=False)
    told.outcomes()
    assert list(json.loads(vendor.requests[1][2])) == ["gone"]
    assert len({one[1]["Idempotency-Key"] for one in vendor.requests}) == 2
    told.ledger.close()


def by_another(told: Told, positive: bool, mode: str = "clinical") -> None:
    """A second package's verdict on the study."""
    verdict = replace(verdict_on(told.series), positive=positive, slabs=(), key_slabs=(), mode=mode, package="other")
    told.record(verdict)


@pytest.mark.parametrize("mode", ["clinical", "evaluation"])
def test_an_order_stays_raised_while_another_package_finds_the_study_positive(
    tmp_path: Path, ris: Peer, mode: str
) -> None:
    told = Told(tmp_path, order(ris, usual_priority="R"))
    told.issue()
    by_another(told, True, mode)
    told.outcomes()
    told.issue(positive=False)
    told.outcomes()
    raised = ["S", "S"] if mode == "clinical" else ["S", "R"]
    assert [str(one["ORC"][0][7])[5:] for one in received(ris)] == raised
    by_another(told, False)
    told.outcomes()
    assert str(received(ris)[-1]["ORC"][0][7])[5:] == "R"
    told.stack.close()
    told.ledger.close()


@pytest.mark.parametrize(
    ("more", "bodies"),
    [
        ({"mode": "reprioritise"}, ["up", "up", "down"]),
        ({"mode": "suggest"}, ["up", "up", "down"]),
        ({"mode": "suggest", "withdraw_body": '"down ${package}"'}, ["up", "up", "down", "down"]),
        ({"mode": "reprioritise", "withdraw_body": '"down ${package}"'}, ["up", "up", "down"]),
    ],
)
def test_a_vendor_is_asked_to_withdraw_only_when_no_package_finds_the_study_positive(
    tmp_path: Path, vendor: Receiver, more: dict[str, Any], bodies: list[str]
) -> None:
    told = Told(tmp_path, rest(vendor, **{"body": '"up"', "withdraw_body": '"down"', **more}))
    told.issue()
    by_another(told, True)
    told.issue(positive=False)
    by_another(told, False)
    told.outcomes()
    assert [json.loads(one[2]).split()[0] for one in vendor.requests] == bodies
    told.ledger.close()


def test_tried_again_it_is_the_same_request(tmp_path: Path, vendor: Receiver) -> None:
    told = Told(tmp_path, rest(vendor))
    told.issue()
    vendor.status = 503
    assert told.outcomes()[0][0] == "retry"
    row = study_report(told.ledger, told.study)["deliveries"][0]
    assert (row["object"], row["state"]) == ("worklist.list", "pending")
    vendor.status = 204
    told.deliver({"path": _path(told), "uid": row["uid"]})  # type: ignore[arg-type]
    first, second = vendor.requests
    assert (first[0], first[2], first[1]["Idempotency-Key"]) == (second[0], second[2], second[1]["Idempotency-Key"])
    told.ledger.close()


def _path(told: Told) -> str:
    (finding,) = [one for one in study_report(told.ledger, told.study)["findings"] if one["object"] == "worklist.list"]
    return str(finding["path"])


def test_what_is_only_evaluated_is_told_where_nothing_moves(tmp_path: Path, vendor: Receiver) -> None:
    for number, (mode, count) in enumerate((("reprioritise", 0), ("suggest", 1))):
        folder = tmp_path / str(number)
        folder.mkdir()
        told = Told(folder, rest(vendor, mode=mode))
        told.issue(mode="evaluation")
        told.outcomes()
        assert len(vendor.requests) == count
        told.ledger.close()
    assert "EVALUATION ONLY" in json.loads(vendor.requests[0][2])["why"]


@pytest.mark.parametrize(
    ("named", "header", "lacking"),
    [
        ("accession", {"AccessionNumber": ""}, "no accession"),
        ("patient_id", {"PatientID": ""}, "no patient_id"),
        ("patient_id}/${accession", {"PatientID": "", "AccessionNumber": ""}, "no accession, patient_id"),
        ("patient_id", {"AccessionNumber": ""}, ""),
        ("study_uid", {"PatientID": "", "AccessionNumber": ""}, ""),
    ],
)
def test_an_address_without_what_it_names_is_a_dead_letter_that_says_so(
    tmp_path: Path, vendor: Receiver, named: str, header: dict[str, str], lacking: str
) -> None:
    told = Told(tmp_path, rest(vendor, url=f"http://127.0.0.1:{vendor.server_address[1]}/${{{named}}}"), **header)
    told.issue()
    told.ledger.abandon_findings(3)
    (row,) = study_report(told.ledger, told.study)["deliveries"]
    assert (row["state"], lacking in row["reason"]) == ("dead" if lacking else "pending", True)
    told.ledger.close()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"body": "{"}, "body is no JSON"), ({"body": '{"a": "${nothing}"}'}, "body names ${nothing}"),
        ({"url": "https://${accession}/"}, "destination.0.url"), ({"url": "http://list.example/"}, "destination.0.url"),
        ({"url": "https://h/${x}"}, "url names ${x}"), ({"header": "A B"}, "destination.0.header"),
    ],
)  # fmt: skip
def test_templates_that_cannot_be(tmp_path: Path, changes: dict[str, str], said: str) -> None:
    values = {"name": "v", "kind": "rest", "mode": "suggest", "url": "https://h/", "body": "{}", **changes}
    path = tmp_path / "scanside.toml"
    path.write_text("[[destination]]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items()))
    with pytest.raises(SettingsError) as caught:
        load_settings(path)
    assert said in str(caught.value)
