"""What messages make of the ledger's orders, and which studies an order finds late."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from appliance.intake.hl7_message import Rules, read_message
from appliance.intake.scheduled import orders_in
from appliance.ledger.database import later
from appliance.ledger.orders import QUERIED, Identifier, NewMessage, Order, Scheduled
from appliance.ledger.store import Ledger, NewInstance
from appliance.ledger.views import event_counts, verify_events
from appliance.services.heeding import Heeded
from dicom_io.workitem import from_dataset
from tests.builders import header
from tests.hl7_support import a08, a40, omi, orm, oru
from tests.scheduled import scheduled

P1, P2 = "P1^^^HOSP^MR", "P2^^^HOSP^MR"


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    one = Ledger(tmp_path / "ledger.sqlite")
    yield one
    assert verify_events(one) is None
    one.close()


numbers = itertools.count(1)


def hear(ledger: Ledger, text: str) -> None:
    """A message under a control id of its own."""
    text = text.replace("|M1|", f"|N{next(numbers)}|", 1)
    message = read_message(text.encode(), Rules())
    new = NewMessage(
        "127.0.0.1", message.sender, message.header[10], message.kind, message.digest, text.encode(), message.code,
        message.reason, message.changes,
    )  # fmt: skip
    assert (ledger.take_message(new), message.reason) == ("taken", "")


def answer(ledger: Ledger, *patients: str) -> None:
    """What a modality worklist answers: an item of the same order for each of these patients."""
    found = orders_in([from_dataset(scheduled(patient=one)) for one in patients], [], "")
    changes = tuple(Scheduled(one) for one in found)
    ledger.take_message(NewMessage("127.0.0.1", "RIS", "", QUERIED, "d", b"", "AA", "", changes))


def patients(ledger: Ledger) -> list[list[str]]:
    return [[one.value for one in order.patient] for order in orders(ledger)]


def orders(ledger: Ledger, accession: str = "A1", uid: str = "") -> list[Order]:
    return ledger.orders_for([accession], uid)[0]


def test_what_a_later_message_does_not_say_stays(ledger: Ledger) -> None:
    hear(ledger, orm(priority="S", extra="OBX|1|TS|11368-8^^LN||20260601073000+0200\r"))
    (before,) = orders(ledger)
    hear(ledger, f"{orm(control='SC', priority='', born='').split('ORC|')[0]}ORC|SC|PL-A1|F-A1\rOBR|1||A1|CT\r")
    (after,) = orders(ledger)
    assert after == before
    hear(ledger, orm(control="XO", priority="R", born="19700101"))
    (after,) = orders(ledger)
    assert (after.urgent, after.birth_date, after.onset) == (False, "19700101", before.onset)
    assert (event_counts(ledger)["order.placed"], event_counts(ledger)["order.changed"]) == (1, 2)


def test_a_patients_new_birth_date_is_that_of_all_his_orders(ledger: Ledger) -> None:
    hear(ledger, orm(accession="A1"))
    hear(ledger, orm(accession="A2", patient="X9^^^STATE~P1^^^HOSP"))
    hear(ledger, orm(accession="A3", patient=P2))
    hear(ledger, orm(accession="A4", patient="P1^^^ELSEWHERE"))
    hear(ledger, a08(born="19700203"))
    found = {name: orders(ledger, name)[0] for name in ("A1", "A2", "A3", "A4")}
    assert [one.birth_date for one in found.values()] == ["19700203", "19700203", "19610101", "19610101"]
    assert found["A1"].birth_source == f"PID-7 of order {found['A1'].id} by ADT^A08"
    assert found["A3"].birth_source == f"PID-7 of order {found['A3'].id}"


def test_two_hospitals_may_use_one_number(ledger: Ledger) -> None:
    hear(ledger, orm(priority="S"))
    hear(ledger, orm(patient="77^^^ELSEWHERE"))
    assert [(one.patient[0].namespace, one.urgent) for one in orders(ledger)] == [("HOSP", True), ("ELSEWHERE", False)]
    # Of one hospital it is one order, whose patient was corrected.
    hear(ledger, orm(control="XO", patient=P2))
    assert [one.patient[0].value for one in orders(ledger)] == ["P2", "77"]


ONSET = "OBX|1|TS|11368-8^^LN||20260601073000+0200\r"
SAYS_LITTLE = orm(control="XO", patient=P2, born="", priority="").replace("fell from a ladder", "")


def test_an_order_of_another_patient_keeps_nothing_of_the_first_one(ledger: Ledger) -> None:
    hear(ledger, orm(priority="S", born="19500101", extra=ONSET))
    hear(ledger, SAYS_LITTLE)
    (order,) = orders(ledger)
    assert order.patient == (Identifier("P2", "HOSP"),)
    assert (order.birth_date, order.birth_source, order.priority, order.urgent, order.reason) == ("", "", "", False, "")
    assert (order.onset, order.onset_earliest, order.onset_latest) == ("", "", "")


@pytest.mark.parametrize("known", ["merged", "named"])
def test_an_order_of_the_same_patient_by_another_identifier_keeps_all(ledger: Ledger, known: str) -> None:
    hear(ledger, orm(priority="S", born="19500101", extra=ONSET, patient=P1 if known == "merged" else f"{P1}~{P2}"))
    (before,) = orders(ledger)
    if known == "merged":
        hear(ledger, a40(survivor=P2, prior=P1))
    hear(ledger, SAYS_LITTLE)
    assert orders(ledger) == [replace(before, patient=(Identifier("P2", "HOSP"),))]
    assert before.urgent and before.onset_earliest and before.birth_date == "19500101"


def test_merges_are_followed_and_go_in_no_circle(ledger: Ledger) -> None:
    one, two, three = (Identifier(f"P{number}", "HOSP") for number in (1, 2, 3))
    hear(ledger, a40(survivor=P2, prior=P1))
    hear(ledger, a40(survivor="P3^^^HOSP", prior=P2))
    assert set(ledger.names((one,))) == {one, two, three}
    assert ledger.names((three,)) == (three,)
    assert ledger.names((Identifier("P1", "ELSEWHERE"),)) == (Identifier("P1", "ELSEWHERE"),)
    hear(ledger, a40(survivor=P1, prior="P3^^^HOSP"))
    assert set(ledger.names((three,))) == {one, two, three}


def test_a_worklist_that_names_another_patient_than_hl7_is_known_beside_it(ledger: Ledger) -> None:
    hear(ledger, orm(priority="S"))
    hear(ledger, orm(control="XO", patient=P2))
    (before,) = orders(ledger)
    answer(ledger, "P1")
    answer(ledger, "P1")
    assert patients(ledger) == [["P2"], ["P1"]]
    assert orders(ledger)[0] == replace(before, study_instance_uid="1.1"), "of that study both of them are"
    assert event_counts(ledger)["order.placed"] == 2


def test_a_worklist_that_names_two_patients_has_both_known(ledger: Ledger) -> None:
    answer(ledger, "P1", "P2")
    assert patients(ledger) == [["P1"], ["P2"]]


@pytest.mark.parametrize("settled", ["P1", "P2"])
def test_the_next_word_of_hl7_settles_what_it_and_the_worklist_said(ledger: Ledger, settled: str) -> None:
    hear(ledger, orm(patient=P2))
    hear(ledger, orm(patient="77^^^ELSEWHERE"))
    answer(ledger, "P1")
    study = complete(ledger, "1.1", "A1")
    hear(ledger, orm(control="SC", patient=f"{settled}^^^HOSP"))
    assert sorted(patients(ledger)) == [["77"], [settled]], "of another hospital it is another order"
    assert late(ledger) == [study]


def test_a_cancellation_is_of_one_of_two_patients_of_an_order(ledger: Ledger) -> None:
    hear(ledger, orm(patient=P2))
    answer(ledger, "P1")
    hear(ledger, orm(control="CA", patient=P1))
    assert [(one.patient[0].value, one.cancelled) for one in orders(ledger)] == [("P2", False), ("P1", True)]


def test_a_worklist_knows_a_merged_patient_by_the_old_identifier(ledger: Ledger) -> None:
    hear(ledger, orm(patient=P2))
    hear(ledger, a40(survivor=P2, prior=P1))
    answer(ledger, "P1")
    assert patients(ledger) == [["P2", "P1"]]


def test_a_worklist_never_takes_a_cancellation_back(ledger: Ledger) -> None:
    hear(ledger, orm())
    hear(ledger, orm(control="CA"))
    answer(ledger, "P1")
    assert [one.cancelled for one in orders(ledger)] == [True]
    hear(ledger, orm())
    assert [one.cancelled for one in orders(ledger)] == [False]


def test_reports_are_found_by_number_or_study(ledger: Ledger) -> None:
    hear(ledger, oru(status="P", text="Preliminary."))
    hear(ledger, oru(status="F", text="Subdural haematoma."))
    hear(ledger, oru(accession="A2"))
    found = ledger.report_rows(["A1"], "")
    assert [(one["status"], one["text"]) for one in found] == [("P", "Preliminary."), ("F", "Subdural haematoma.")]
    assert ledger.report_rows([""], "") == []


def test_the_text_of_old_messages_goes_and_what_it_said_stays(ledger: Ledger) -> None:
    hear(ledger, orm())
    assert ledger.empty_messages(later(-60)) == 0
    assert ledger.empty_messages(later(60)) == 1
    assert ledger.message_content(1) is None
    assert len(orders(ledger)) == 1 and len(ledger.messages(9)) == 1
    assert ledger.empty_messages(later(60)) == 0


# Late orders


def complete(ledger: Ledger, uid: str, accession: str) -> int:
    association = ledger.open_association("S", "B", "127.0.0.1")
    one = header(study=uid, series=f"{uid}.1", accession_number=accession)
    ledger.record_instances([NewInstance(one, f"{len(uid)}{accession:0>63}", 1, association)])
    ledger.close_association(association, "released")
    (arriving,) = ledger.arriving_studies()
    assert ledger.complete_study(arriving.id, arriving.last_instance_at, {"by": "test", "confidence": "high"})
    _, heard = ledger.orders_for([accession], uid)
    ledger.identify_study(arriving.id, [accession] if accession else [], [], heard)
    return arriving.id


def late(ledger: Ledger, since: int = 0) -> list[int]:
    return [study for study, _ in ledger.late_orders(since)[0]]


def test_only_what_the_gate_has_not_heard_is_late(ledger: Ledger) -> None:
    hear(ledger, orm(accession="A1"))
    first = complete(ledger, "1.1", "A1")
    second = complete(ledger, "1.22", "A2")
    other = complete(ledger, "1.333", "A3")
    assert late(ledger) == []
    hear(ledger, orm(accession="A2"))
    assert late(ledger) == [second]
    _, newest = ledger.late_orders(0)
    assert late(ledger, newest) == [], "it is told once"
    hear(ledger, orm(accession="A1", control="SC"))
    assert late(ledger, newest) == [], "nothing that the gate heeds has changed"
    hear(ledger, orm(accession="A1", control="XO", born="19700101"))
    hear(ledger, omi(accession="OTHER", uid="1.333"))
    assert late(ledger, newest) == [first, other]
    ledger.identify_study(first, ["A1"], [1], ledger.orders_for(["A1"], "")[1])
    assert late(ledger) == [second, other]
    assert event_counts(ledger)["study.ordered"] == 1


def test_a_merge_or_a_new_birth_date_is_heard_late_too(ledger: Ledger) -> None:
    hear(ledger, orm(accession="A1", patient=P2))
    study = complete(ledger, "1.1", "A1")
    assert late(ledger) == []
    hear(ledger, a40(survivor=P2, prior=P1))
    assert late(ledger) == [study]
    _, newest = ledger.late_orders(0)
    hear(ledger, a08(patient=P2, born="19700101"))
    assert late(ledger, newest) == [study]
    _, newest = ledger.late_orders(0)
    hear(ledger, a08(patient=P2, born="19700101"))
    assert late(ledger, newest) == [], "it says what is known"


def test_what_a_ledger_that_fails_half_way_kept_back_is_asked_again(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies = {complete(ledger, f"1.{n}", f"A{n}") for n in range(1, 4)}
    heeded = Heeded(ledger, hears=True)
    assert heeded.late() == set()
    for n in range(1, 4):
        hear(ledger, orm(accession=f"A{n}"))
    calls, reconsider = iter(range(99)), ledger.reconsider

    def failing(study_id: int, *, order: int) -> None:
        if next(calls) == 1:
            raise OperationalError("UPDATE study", {}, sqlite3.OperationalError("database is locked"))
        reconsider(study_id, order=order)

    monkeypatch.setattr(ledger, "reconsider", failing)
    with pytest.raises(OperationalError):
        heeded.late()
    assert heeded.late() == studies
    assert heeded.late() == set()


def test_a_study_that_is_asked_about_again_waits_for_its_answer(ledger: Ledger) -> None:
    study = complete(ledger, "1.1", "A1")
    decided = {"admitted": False, "reason": "x", "admission": [], "selection": [], "inputs": []}
    ledger.decide(study, "pkg", "1", **decided)  # type: ignore[arg-type]
    assert ledger.undecided_studies({"pkg": "1"}) == []
    ledger.reconsider(study, order=1)
    assert ledger.undecided_studies({"pkg": "1"}) == [(study, "pkg")]
    assert event_counts(ledger)["study.reconsidered"] == 1
