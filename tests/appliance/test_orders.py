"""An order before and after its study: whose study goes first, what the gate is told, and what it is asked again."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any, cast

from typer.testing import CliRunner

from appliance import init
from appliance.cli import app
from appliance.governance.package import load_configured
from appliance.intake.hl7_message import Rules
from appliance.intake.hl7_receiver import OrderReceiver
from appliance.ledger.store import Ledger, NewInstance
from appliance.ledger.views import event_counts, study_report
from appliance.services.engine import ANALYSES, Engine
from appliance.services.issuing import Issuer
from appliance.settings import Hl7Intake, Settings, load_settings
from appliance.settings import Study as StudySettings
from tests.appliance.intake.test_retention import Box
from tests.appliance.test_services import Asked, Ready, states, wait_until
from tests.builders import header
from tests.hl7_support import a08, a40, omi, orm, oru

numbers = itertools.count(1)


def new_box(folder: Path) -> Box:
    box = Box(folder)
    box.settings.run_directory.mkdir(exist_ok=True)
    return box


def engine_of(box: Box, **hears: Any) -> tuple[Engine, Asked]:
    """An engine that hears orders, over HL7 if nothing else is said; nothing is ever answered by its model."""
    package = dataclasses.replace(load_configured(Settings())[0], name="pkg")
    intake = box.settings.intake.model_copy(update=hears or {"hl7": Hl7Intake()})
    study = StudySettings(settle_seconds=0, quiet_seconds=0.001)
    settings = box.settings.model_copy(update={"study": study, "intake": intake})
    asked, issuer = Asked(), Issuer(settings, box.ledger, [package])
    return Engine(settings, box.ledger, [package], cast(Any, Ready()), cast(Any, asked), issuer), asked


def hear(box: Box, text: str) -> None:
    text = text.replace("|M1|", f"|N{next(numbers)}|", 1)
    receiver = OrderReceiver(box.ledger, Rules(), "BOX", 1 << 20, lambda: None, lambda: "")
    (answer,) = receiver.take(text.encode(), "127.0.0.1")
    assert "MSA|AA|" in answer


def bring(box: Box, study: int, slices: int = 30, **changes: Any) -> None:
    """A head, sent on an association of its own."""
    box.association = box.ledger.open_association("S", "B", "127.0.0.1")
    said = {"accession_number": f"A{study}", "patient_id": "P1", "issuer_of_patient_id": "HOSP", **changes}
    for number in range(1, slices + 1):
        one = header(number, study=f"1.{study}", series=f"1.{study}.1", z=5.0 * number, **said)
        box.store(one, f"{study}/{number}".encode() * 10)
    box.ledger.close_association(box.association, "released")


AGELESS = {"patient_age": "", "patient_birth_date": ""}


def criterion(box: Box, name: str, study: int = 1) -> dict[str, Any]:
    (analysis,) = study_report(box.ledger, study)["analyses"]
    return next(one for one in analysis["admission"] if one["criterion"] == name)


def decided(box: Box, study: int = 1) -> bool:
    """The study is decided upon as it is now."""
    report = study_report(box.ledger, study)
    return [one["completion"] for one in report["analyses"]] == [report["completions"]] != [0]


def test_an_order_before_its_study_gives_the_age(tmp_path: Path) -> None:
    box = new_box(tmp_path)
    hear(box, orm(born="19610101"))
    bring(box, 1, **AGELESS)
    engine, _ = engine_of(box)
    wait_until(engine, lambda: states(box, 1) == ["running"])
    age = criterion(box, "age")
    assert (age["outcome"], age["value"]) == ("met", "65 years by PID-7 of order 1")
    assert age["attribute"] == "PatientAge, PatientBirthDate, StudyDate, PID-7 of order 1"
    assert event_counts(box.ledger)["study.ordered"] == 1
    engine.close()
    box.ledger.close()


def test_an_order_after_its_study_lets_it_in(tmp_path: Path) -> None:
    box = new_box(tmp_path)
    bring(box, 1, **AGELESS)
    engine, _ = engine_of(box)
    wait_until(engine, lambda: states(box, 1) == ["refused"])
    hear(box, orm(accession="A9", born="19610101"))
    engine.step()
    assert states(box, 1) == ["refused"]
    hear(box, orm(born="19610101"))
    wait_until(engine, lambda: states(box, 1) == ["running"])
    assert criterion(box, "age")["outcome"] == "met"
    assert event_counts(box.ledger)["study.reconsidered"] == 1
    engine.close()
    box.ledger.close()


def test_an_order_that_came_while_no_engine_ran_is_heard_at_its_start(tmp_path: Path) -> None:
    box = new_box(tmp_path)
    bring(box, 1, **AGELESS)
    engine, _ = engine_of(box)
    wait_until(engine, lambda: states(box, 1) == ["refused"])
    engine.close()
    hear(box, orm(born="19610101"))
    engine, _ = engine_of(box)
    wait_until(engine, lambda: states(box, 1) == ["running"])
    for _ in range(3):
        engine.step()
    assert event_counts(box.ledger)["study.reconsidered"] == 1
    engine.close()
    box.ledger.close()


def test_a_childs_order_keeps_a_study_out_whose_images_do_not_say(tmp_path: Path) -> None:
    box = new_box(tmp_path)
    hear(box, orm(born="20190101"))
    bring(box, 1, **AGELESS)
    engine, asked = engine_of(box)
    wait_until(engine, lambda: states(box, 1) == ["refused"])
    assert "paediatric" not in criterion(box, "age")["value"]
    assert criterion(box, "age")["outcome"] == "violated"
    assert asked.futures == {}, "no model saw it, not even ahead"
    engine.close()
    box.ledger.close()


def test_where_order_and_images_disagree_nothing_is_analysed_until_somebody_mends_it(tmp_path: Path) -> None:
    box = new_box(tmp_path)
    hear(box, orm(born="19610102"))
    bring(box, 1)
    engine, _ = engine_of(box)
    wait_until(engine, lambda: states(box, 1) == ["refused"])
    assert criterion(box, "age")["outcome"] == "unknown"
    assert " but " in criterion(box, "age")["value"]
    hear(box, a08(born="19610101"))
    wait_until(engine, lambda: states(box, 1) == ["running"])
    assert criterion(box, "age")["attribute"].endswith("PID-7 of order 1 by ADT^A08")
    engine.close()
    box.ledger.close()


def test_another_patient_under_the_studys_number_refuses_it_until_both_are_merged(tmp_path: Path) -> None:
    box = new_box(tmp_path)
    hear(box, orm(patient="P2^^^HOSP"))
    bring(box, 1)
    engine, asked = engine_of(box)
    wait_until(engine, lambda: states(box, 1) == ["refused"])
    assert criterion(box, "patient")["outcome"] == "violated"
    assert asked.futures == {}
    hear(box, a40(survivor="P2^^^HOSP", prior="P1^^^HOSP"))
    wait_until(engine, lambda: states(box, 1) == ["running"])
    assert criterion(box, "patient")["outcome"] == "met"
    engine.close()
    box.ledger.close()


def test_the_study_of_an_urgent_order_finds_a_place_when_all_are_taken(tmp_path: Path) -> None:
    """Ordered before its images came, and after they waited in the queue already."""
    box = new_box(tmp_path)
    for study in range(1, ANALYSES + 4):
        bring(box, study, 25)
    engine, _ = engine_of(box)
    wait_until(engine, lambda: states(box, ANALYSES) == ["running"] * ANALYSES)
    wait_until(engine, lambda: states(box, ANALYSES + 3)[-3:] == ["admitted"] * 3)
    hear(box, omi(accession=f"A{ANALYSES + 3}", priority="S", uid=""))
    wait_until(engine, lambda: states(box, ANALYSES + 3)[-1] == "running")
    hear(box, omi(accession="A99", priority="S", uid=""))
    bring(box, 99, 25)
    wait_until(engine, lambda: len(study_report(box.ledger, ANALYSES + 4)["analyses"]) == 1)
    wait_until(engine, lambda: states(box, ANALYSES + 4)[-1] == "running")
    assert states(box, ANALYSES + 2)[-2:] == ["admitted"] * 2
    engine.close()
    box.ledger.close()


def test_a_cancelled_order_makes_nothing_urgent(tmp_path: Path) -> None:
    box = new_box(tmp_path)
    for study in range(1, ANALYSES + 2):
        bring(box, study, 25)
    engine, _ = engine_of(box)
    wait_until(engine, lambda: states(box, ANALYSES) == ["running"] * ANALYSES)
    number = ANALYSES + 1
    hear(box, orm(accession=f"A{number}", priority="S", control="CA"))
    for _ in range(5):
        engine.step()
    wait_until(engine, lambda: decided(box, number))
    engine.step()
    assert states(box, number)[-1] == "admitted"
    engine.close()
    box.ledger.close()


def test_what_came_is_listed_and_shown_beside_its_study(tmp_path: Path) -> None:
    config = init.write(tmp_path, {"intake": {"hl7": {"port": 2575}}})
    box = new_box(tmp_path / "other")
    box.ledger.close()
    box.ledger = Ledger(load_settings(config).ledger_path)
    box.association = box.ledger.open_association("S", "B", "127.0.0.1")
    said = {"accession_number": "A1", "patient_id": "P1"}
    one = header(1, study="1.1", series="1.1.1", **said)
    box.ledger.record_instances([NewInstance(one, "ab" * 32, 1, box.association)])
    hear(box, orm(priority="S"))
    hear(box, oru(text="Subdural [bold]haematoma."))
    hear(box, oru(text="Of somebody else.").replace("P1^^^HOSP", "P2^^^HOSP"))
    receiver = OrderReceiver(box.ledger, Rules(), "BOX", 1 << 20, lambda: None, lambda: "")
    receiver.take(orm("BAD", control="ZZ").encode(), "127.0.0.1")
    box.ledger.close()

    def run(*words: str) -> str:
        done = CliRunner().invoke(app, ["--config", str(config), *words], env={"COLUMNS": "200"})
        assert done.exit_code == 0, done.output
        return done.stdout

    told = json.loads(run("study", "1", "--json"))["said"]
    assert [(one["accession"], one["urgent"], one["reason"]) for one in told["orders"]] == [
        ("A1", True, "fell from a ladder")
    ]
    assert [(one["status"], one["text"]) for one in told["reports"]] == [("F", "Subdural [bold]haematoma.")]
    shown = run("study", "1")
    assert "A1, priority S, goes first, fell from a ladder" in shown and "Subdural [bold]haematoma." in shown
    listed = json.loads(run("hl7", "received", "--json"))
    assert [(one["kind"], one["code"]) for one in listed][:1] == [("ORM^O01", "AE")] and len(listed) == 4
    (refused,) = json.loads(run("hl7", "received", "--refused", "--json"))
    assert refused["reason"] == "ORC-1: ZZ is no order control code"
    assert "ORC|ZZ|PL-A1" in run("hl7", "received", str(refused["id"]))
    assert "ORC-1: ZZ is no" in " ".join(run("hl7", "received").split())  # the rest may be on the next line
    missing = CliRunner().invoke(app, ["--config", str(config), "hl7", "received", "99"])
    assert missing.exit_code == 1
