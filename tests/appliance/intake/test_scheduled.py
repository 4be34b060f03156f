"""What a modality worklist says becomes an order like those of HL7; what goes wrong is told, and holds up nothing."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.sop_class import ModalityWorklistInformationFind

from appliance import checks
from appliance.intake.scheduled import Asker, is_about, orders_in
from appliance.ledger.orders import Identifier, Order
from appliance.ledger.queries import LONGEST_PAUSE
from appliance.ledger.store import Ledger
from appliance.ledger.views import event_counts
from appliance.operations.health import Watchdog
from appliance.services.orders import ask_for_orders, said_of
from appliance.settings import ModalityWorklist
from dicom_io.errors import PeerError
from dicom_io.mwl import MOST_ITEMS, asking
from dicom_io.scu import Peer
from dicom_io.workitem import from_dataset
from tests.appliance.intake.test_retention import Box
from tests.appliance.test_orders import AGELESS, bring, criterion, decided, engine_of, hear, new_box
from tests.appliance.test_services import states, wait_until
from tests.hl7_support import orm
from tests.scheduled import scheduled

WORKLIST = ModalityWorklist(ae_title="RIS", host="127.0.0.1", port=1)
Answers = Callable[[Dataset], Iterator[tuple[int | Dataset, Dataset | None]]]


@contextmanager
def provider(answers: Answers) -> Iterator[Peer]:
    """A provider that answers as it is told."""
    ae = AE(ae_title="RIS")
    ae.add_supported_context(ModalityWorklistInformationFind)

    def find(event: Any) -> Iterator[tuple[int | Dataset, Dataset | None]]:
        for status, item in answers(event.identifier):
            if event.is_cancelled:
                yield 0xFE00, None
                return
            yield status, item

    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_FIND, find)])
    try:
        yield Peer("RIS", "127.0.0.1", server.server_address[1])
    finally:
        server.shutdown()


@contextmanager
def asked(box: Box, peer: Callable[[], Peer], **changes: Any) -> Iterator[Asker]:
    options: dict[str, Any] = {"answer_seconds": 5.0, "give_up_seconds": 600.0} | changes
    asker = Asker(box.ledger, peer, "SCANSIDE", ["STAT"], "", lambda: None, **options)
    asker.start()
    try:
        yield asker
    finally:
        asker.stop()
        asker.join(30)


def until(look: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def orders(ledger: Ledger, accession: str = "A1", study: str = "1.1") -> list[Order]:
    return ledger.orders_for([accession], study)[0]


def step(**changes: Any) -> dict[str, Any]:
    return from_dataset(scheduled(**changes))


def test_steps_of_one_order_are_one() -> None:
    urgent = step(RequestedProcedurePriority="stat", ReasonForTheRequestedProcedure="Fall")
    found = orders_in([step(PatientBirthDate=""), urgent, step(accession="A2")], ["STAT"], "SITE")
    assert [(one.accession, one.urgent, one.priority) for one in found] == [("A1", True, "S"), ("A2", False, "R")]
    assert found[0].reason == "Kopfschmerz, plötzlich; Fall" and found[0].birth_date == "19500203"
    assert found[0].patient == (Identifier("P1", "HOSP"),)


def test_the_authority_is_the_items_else_the_sites() -> None:
    qualified = Dataset()
    qualified.UniversalEntityID, qualified.UniversalEntityIDType = "1.2.9", "ISO"
    (one,) = orders_in([step(IssuerOfPatientID="", IssuerOfPatientIDQualifiersSequence=[qualified])], [], "SITE")
    assert one.patient == (Identifier("P1", "SITE", "1.2.9"),)


@pytest.mark.parametrize("changes", [{"PatientID": ""}, {"AccessionNumber": "A" * 16, "StudyInstanceUID": "9." * 40}])
def test_what_cannot_be_an_order_is_none(changes: dict[str, str]) -> None:
    assert orders_in([{**step(), **from_dataset(_only(changes))}], ["STAT"], "") == ()


def _only(changes: dict[str, str]) -> Dataset:
    made = Dataset()
    for keyword, value in changes.items():
        setattr(made, keyword, value)
    return made


def test_an_item_is_the_studys_by_either_number() -> None:
    assert is_about(step(), ["A1"], "9.9") and is_about(step(), [], "1.1")
    assert not is_about(step(AccessionNumber="", StudyInstanceUID="1.2"), [], "1.1")


def test_a_provider_that_ignores_the_key_is_cut_short() -> None:
    def everything(_: Dataset) -> Iterator[tuple[int, Dataset | None]]:
        for number in range(100 * MOST_ITEMS):
            if number > MOST_ITEMS:
                time.sleep(0.01)  # one that only writes hears of no cancel before its answers are too many
            yield 0xFF00, scheduled(f"B{number}", f"2.{number}")

    with provider(everything) as peer, asking(peer, "SCANSIDE") as query:
        found, whole = query.find("AccessionNumber", "A1")
    assert len(found) == MOST_ITEMS and not whole


def test_a_failure_is_told_without_words_that_may_name_a_patient() -> None:
    def failing(_: Dataset) -> Iterator[tuple[Dataset, Dataset | None]]:
        status = Dataset()
        status.Status, status.ErrorComment = 0xA700, "no room for Doe^Jane"
        yield status, None

    with provider(failing) as peer, asking(peer, "SCANSIDE") as query, pytest.raises(PeerError, match="0xA700") as told:
        query.find("AccessionNumber", "A1")
    assert "Doe" not in str(told.value)


def test_it_is_asked_again_until_it_answers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    box = new_box(tmp_path)
    bring(box, 1, slices=1)
    broken = threading.Event()
    broken.set()

    def answers(wanted: Dataset) -> Iterator[tuple[int, Dataset | None]]:
        if broken.is_set():
            yield 0xC001, None
        elif wanted.PatientID == "P1":  # the one key that a provider must match by
            yield 0xFF00, scheduled("A7", "1.7")
            yield 0xFF00, scheduled()

    with caplog.at_level(logging.ERROR), provider(answers) as peer, asked(box, lambda: peer):
        assert "0xC001" in until(lambda: (box.ledger.query_state(1) or ("", ""))[1])
        broken.clear()
        until(lambda: orders(box.ledger))
    assert len([one for one in caplog.records if "modality worklist" in one.message]) == 1
    assert box.ledger.query_state(1) == ("found", "")
    assert [one.accession for one in box.ledger.orders_for(["A1", "A7"], "1.1")[0]] == ["A1"]


def test_a_clock_that_was_set_back_puts_no_question_off(tmp_path: Path) -> None:
    box = new_box(tmp_path)
    bring(box, 1, slices=1)
    box.ledger.asked_in_vain([1], "why not", LONGEST_PAUSE)
    assert box.ledger.unasked_studies(0, 600.0) == [], "it has its pause"
    box.ledger.asked_in_vain([1], "why not", 3600.0)  # as a pause is whose clock was set back since
    assert [one.study_id for one in box.ledger.unasked_studies(0, 600.0)] == [1]


@pytest.mark.parametrize(("answered", "event"), [(True, "order.not_found"), (False, "order.unanswered")])
def test_giving_up_is_an_event(tmp_path: Path, answered: bool, event: str) -> None:
    box = new_box(tmp_path)
    bring(box, 1, slices=1)
    box.ledger.asked_in_vain([1], "why not", 0.0, answered=answered)
    assert box.ledger.give_up_asking(600.0) == []
    (one,) = box.ledger.give_up_asking(0.0)
    assert (one.study_id, one.reason) == (1, "why not") and event_counts(box.ledger)[event] == 1
    assert box.ledger.unasked_studies(0, 600.0) == [] and box.ledger.give_up_asking(0.0) == []


def test_old_studies_and_self_tests_are_not_asked_about(tmp_path: Path) -> None:
    box = new_box(tmp_path)
    bring(box, 1, slices=1)
    bring(box, 2, slices=1)
    box.ledger.begin_selftest("1.3", expected=True, alert_port=1, object_port=1)
    bring(box, 3, slices=1)
    assert [one.study_id for one in box.ledger.unasked_studies(0, 600.0)] == [2, 1]
    assert box.ledger.too_old_to_ask(0, 0.0) == 3 and box.ledger.too_old_to_ask(3, 600.0) == 3
    assert box.ledger.unasked_studies(0, 0.0) == []


def take(box: Box, *patients: str, **changes: Any) -> None:
    """The worklist's answer: one item, or one for each of these patients."""

    def one(_: Dataset) -> Iterator[tuple[int, Dataset | None]]:
        for patient in patients or ("P1",):
            yield 0xFF00, scheduled(patient=patient, **changes)

    with provider(one) as peer, asked(box, lambda: peer):
        until(lambda: (box.ledger.query_state(1) or ("",))[0] == "found")


def test_it_never_makes_an_order_of_hl7_less_urgent(tmp_path: Path) -> None:
    box = new_box(tmp_path)
    hear(box, orm(priority="S"))
    (before,) = orders(box.ledger)
    bring(box, 1, slices=1)
    take(box, IssuerOfPatientID="")
    (after,) = orders(box.ledger)
    assert before.urgent and after.urgent and after.priority == "S" and after.id == before.id
    assert after.patient == before.patient, "an identifier that says less takes nothing away"
    assert after.birth_source == f"Patient's Birth Date of order {after.id}" and after.birth_date == "19500203"
    assert after.patient_source == f"Patient ID of order {after.id}"


def test_without_an_accession_number_the_study_tells_orders_apart(tmp_path: Path) -> None:
    box = new_box(tmp_path)
    for study in (1, 2):
        bring(box, study, slices=1, accession_number="")
    by_study = {f"1.{study}": scheduled("", f"1.{study}", PatientBirthDate=f"196{study}0101") for study in (1, 2)}

    def answers(wanted: Dataset) -> Iterator[tuple[int, Dataset | None]]:
        if wanted.StudyInstanceUID in by_study:
            yield 0xFF00, by_study[wanted.StudyInstanceUID]

    with provider(answers) as peer, asked(box, lambda: peer):
        until(lambda: all((box.ledger.query_state(study) or ("",))[0] == "found" for study in (1, 2)))
    assert [one.birth_date for study in ("1.1", "1.2") for one in orders(box.ledger, "", study)] == [
        "19610101",
        "19620101",
    ]


def test_an_answer_after_the_decision_has_the_gate_asked_again(tmp_path: Path) -> None:
    box = new_box(tmp_path)
    bring(box, 1, **AGELESS)
    engine, _ = engine_of(box, modality_worklist=WORKLIST)
    wait_until(engine, lambda: states(box, 1) == ["refused"])
    take(box)
    wait_until(engine, lambda: states(box, 1) == ["running"])
    assert criterion(box, "age")["value"].endswith("years by Patient's Birth Date of order 1")
    engine.close()
    box.ledger.close()


def test_another_patients_item_with_the_studys_number_keeps_it_out(tmp_path: Path) -> None:
    box = new_box(tmp_path)
    bring(box, 1)
    take(box, "P2")
    engine, _ = engine_of(box, modality_worklist=WORKLIST)
    wait_until(engine, lambda: states(box, 1) == ["refused"])
    assert "Patient ID of order 1" in criterion(box, "patient")["value"]
    engine.close()
    box.ledger.close()


@pytest.mark.parametrize("imaged", ["P1", "P2"])
@pytest.mark.parametrize("ordered", ["P2", ""])
def test_where_the_hospital_names_two_patients_the_study_of_neither_is_read(
    tmp_path: Path, imaged: str, ordered: str
) -> None:
    """HL7 one and the worklist the other, or the worklist both."""
    box = new_box(tmp_path)
    if ordered:
        hear(box, orm(patient=f"{ordered}^^^HOSP"))
    bring(box, 1, patient_id=imaged)
    take(box, *(["P1"] if ordered else ["P1", "P2"]), PatientBirthDate="19610101")
    engine, asked = engine_of(box, modality_worklist=WORKLIST)
    wait_until(engine, lambda: states(box, 1) == ["refused"])
    assert criterion(box, "patient")["outcome"] == "violated" and asked.futures == {}
    engine.close()
    box.ledger.close()


def test_a_late_answer_of_the_worklist_lets_nobody_in_whom_hl7_keeps_out(tmp_path: Path) -> None:
    box = new_box(tmp_path)
    hear(box, orm(patient="P2^^^HOSP"))
    bring(box, 1)
    engine, _ = engine_of(box, modality_worklist=WORKLIST)
    wait_until(engine, lambda: states(box, 1) == ["refused"])
    take(box, PatientBirthDate="19610101")
    wait_until(engine, lambda: event_counts(box.ledger).get("study.reconsidered") == 1 and decided(box))
    assert states(box, 1) == ["refused"] and criterion(box, "patient")["outcome"] == "violated"
    engine.close()
    box.ledger.close()


def test_check_asks_for_an_order_that_nobody_has() -> None:
    with provider(lambda wanted: iter(())) as peer:
        section = ModalityWorklist(ae_title="RIS", host="127.0.0.1", port=peer.port)
        assert checks._modality_worklist(section, "SCANSIDE") == f"{peer} answers"
    with pytest.raises(PeerError):
        checks._modality_worklist(section, "SCANSIDE")


def test_a_provider_that_trickles_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dicom_io.mwl.LONGEST_ANSWER", 0.05)

    def for_ever(_: Dataset) -> Iterator[tuple[int, Dataset | None]]:
        while True:
            yield 0xFF00, scheduled()
            time.sleep(0.1)

    with provider(for_ever) as peer, pytest.raises(PeerError, match="does not come to an end"):  # noqa: SIM117
        with asking(peer, "SCANSIDE") as query:
            query.find("AccessionNumber", "A1")


def test_intake_asks_the_worklist_of_its_settings(tmp_path: Path) -> None:
    box = new_box(tmp_path)
    bring(box, 1, slices=1)
    with provider(lambda wanted: iter([(0xFF00, scheduled(RequestedProcedurePriority="HIGH"))])) as peer:
        section = ModalityWorklist(ae_title="RIS", host="127.0.0.1", port=peer.port, urgent_priorities=["HIGH"])
        intake = box.settings.intake.model_copy(update={"modality_worklist": section})
        settings = box.settings.model_copy(update={"intake": intake})
        rung = threading.Event()
        asker = ask_for_orders(settings, box.ledger, Watchdog(), rung.set)
        assert asker is not None and rung.wait(60)
        asker.stop()
        asker.join(30)
    (order,) = orders(box.ledger)
    assert order.urgent and order.priority == "A"
    said = said_of(settings, box.ledger, 1)
    assert [one["id"] for one in said["orders"]] == [order.id] and said["asked"] == [{"state": "found", "reason": ""}]
    assert ask_for_orders(box.settings, box.ledger, Watchdog(), rung.set) is None
