"""What a box says of itself to whoever looks after many: what is under way, what went wrong, what ends when."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from appliance import init
from appliance.cli import app
from appliance.events import Event
from appliance.governance import board
from appliance.governance.package import load_configured
from appliance.ledger.records import Verdict
from appliance.ledger.standing import in_flight
from appliance.ledger.store import Ledger, NewFinding
from appliance.settings import load_settings
from appliance.status import status
from tests.appliance.intake.test_retention import Box
from tests.builders import header
from tests.dicom_io.certificates import Authority


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    one = Box(tmp_path)
    yield one
    one.ledger.close()


def test_what_is_under_way_step_by_step(box: Box) -> None:
    """From the first image to the acknowledged alert something is always under way, and then nothing."""
    assert sum(in_flight(box.ledger, ["pkg"]).values()) == 0
    box.receive(1)
    assert in_flight(box.ledger, ["pkg"]) == {"arriving": 1, "undecided": 0, "analyses": 0, "alerts": 0}
    (arriving,) = box.ledger.arriving_studies()
    box.ledger.complete_study(arriving.id, arriving.last_instance_at, {"by": "test", "confidence": "high"})
    assert in_flight(box.ledger, ["pkg"]) == {"arriving": 0, "undecided": 1, "analyses": 0, "alerts": 0}
    box.ledger.decide(arriving.id, "pkg", "1", admitted=True, reason="", admission=[], selection=[], inputs=[])
    assert in_flight(box.ledger, ["pkg"]) == {"arriving": 0, "undecided": 0, "analyses": 1, "alerts": 0}
    assert sum(in_flight(box.ledger, ["another"]).values()) == 0
    row = box.ledger.take_analysis(["pkg"])
    assert row is not None
    assert in_flight(box.ledger, ["pkg"])["analyses"] == 1


def test_a_finished_study_is_not_under_way_and_one_that_came_again_is(box: Box) -> None:
    box.receive(1)
    box.finish(1)
    assert sum(in_flight(box.ledger, ["pkg"]).values()) == 0
    assert box.store(header(4, study="1.1", series="1.1.1")) == "stored"
    assert in_flight(box.ledger, ["pkg"])["arriving"] == 1


def test_an_alert_that_nobody_takes_does_not_hold_up_an_update(box: Box) -> None:
    box.receive(1)
    (arriving,) = box.ledger.arriving_studies()
    box.ledger.complete_study(arriving.id, arriving.last_instance_at, {"by": "test", "confidence": "high"})
    box.ledger.decide(arriving.id, "pkg", "1", admitted=True, reason="", admission=[], selection=[], inputs=[])
    row = box.ledger.take_analysis(["pkg"])
    assert row is not None
    verdict = Verdict("1.1", "1.1.1", "pkg", "1", "n", True, 0.9, 0.5, {}, 0.0, (), (), (), ())
    findings = [NewFinding("alert.er", "MSG1", "alert.hl7", ("er",), 0)]
    box.ledger.issue_verdict(row["id"], 1, verdict, "2026-01-01T00:00:00", findings, admission=[], late=False)
    assert in_flight(box.ledger, ["pkg"])["alerts"] == 1
    delivery = box.ledger.take_delivery("er")
    assert delivery is not None
    assert in_flight(box.ledger, ["pkg"])["alerts"] == 1  # on its way
    box.ledger.settle_delivery(delivery, "retry", wait_seconds=3600.0)
    assert sum(in_flight(box.ledger, ["pkg"]).values()) == 0


class Site:
    """A configured box, and what the command says of it."""

    def __init__(self, folder: Path, **sections: dict[str, Any]) -> None:
        self.config = init.write(folder / "box", sections)
        self.settings = load_settings(self.config)
        self.ledger = Ledger(self.settings.ledger_path)

    def says(self, *options: str, code: int = 0) -> dict[str, Any]:
        done = CliRunner().invoke(app, ["--config", str(self.config), "status", "--json", *options])
        assert done.exit_code == code, done.output
        told: dict[str, Any] = json.loads(done.stdout)
        return told


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    one = Site(tmp_path)
    yield one
    one.ledger.close()


def test_errors_are_counted_from_then_on(site: Site) -> None:
    site.ledger.log(Event.SERVICE_FAILED, unit="x")
    site.ledger.log(Event.SERVICE_STARTED)  # no error
    figures = site.says()["figures"]
    assert figures["errors"] == {"service.failed": 1}
    assert figures["errors_per_hour"] == round(1 / 24, 3)
    later = (datetime.now(UTC) + timedelta(seconds=2)).strftime("%Y-%m-%dT%H:%M:%S")
    assert site.says("--since", later)["figures"]["errors"] == {}


def test_a_study_that_arrives_is_an_exit_code(tmp_path: Path) -> None:
    site = Site(tmp_path, models={"packages": ["ich_reference"]})
    assert site.says("--idle")["in_flight"]["total"] == 0
    box = Box(tmp_path / "box")
    box.receive(1)
    box.ledger.close()
    assert site.says("--idle", code=1)["in_flight"]["arriving"] == 1
    assert "1 arriving" in CliRunner().invoke(app, ["--config", str(site.config), "status"]).output


def test_a_suspended_model_does_not_run(site: Site) -> None:
    (package,) = load_configured(site.settings)
    (model,) = site.says()["models"]
    assert (model["version"], model["digest"], model["runs"], model["mode"]) == (
        package.version, package.digest, True, "evaluation",
    )  # fmt: skip
    until = date.today() + timedelta(30)
    board.approve(
        site.ledger, site.settings.evidence_directory, package, "shadow", who="Dr A", why="b", until=until,
        evidence=None,
    )  # fmt: skip
    (model,) = site.says()["models"]
    assert (model["mode"], model["until"]) == ("shadow", until.isoformat())
    board.suspend(site.ledger, site.settings.evidence_directory, package.name, package, who="Dr A", why="recall 7")
    (model,) = site.says()["models"]
    assert (model["runs"], model["mode"], model["until"]) == (False, None, None)
    assert "recall 7" in model["said"]


def test_a_model_that_cannot_be_loaded_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    (model,) = Site(tmp_path, models={"repository": str(tmp_path / "none")}).says()["models"]
    assert (model["runs"], model["version"]) == (False, None)
    assert "ich_reference" in model["said"]


def test_the_certificate_that_ends_first_is_told(tmp_path: Path) -> None:
    pair = Authority(tmp_path).issue("box")
    site = Site(tmp_path, intake={"tls": {"certificate": str(pair.certificate), "key": str(pair.key)}})
    (one,) = site.says()["certificates"]
    assert one["what"] == "intake"
    assert one["days"] >= 0
    gone = status(site.settings, now=datetime.now(UTC) + timedelta(days=one["days"] + 3))
    assert gone["certificates"][0]["days"] < 0
    pair.certificate.write_text("no certificate")
    (one,) = status(site.settings)["certificates"]
    assert one["until"] is None and one["problem"]


def test_every_certificate_of_the_settings_is_told(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("box")
    ours = {"certificate": str(pair.certificate), "key": str(pair.key)}
    shown = ours | {"client_authorities": str(authority.certificate)}
    called = ours | {"authorities": str(authority.certificate)}
    peer = {"ae_title": "RIS", "host": "127.0.0.1", "port": 1, "tls": called}
    site = Site(
        tmp_path,
        intake={"tls": shown, "hl7": {"tls": shown}, "modality_worklist": peer},
        worklist={"web_port": 8080, "tls": shown},
        performer=peer | {"workitem_codes": ["1^L"]},
    )
    values = [f"{key} = {json.dumps(value)}" for key, value in called.items()]
    er = ["", "[[destination]]", 'kind = "hl7"', 'name = "er"', 'host = "127.0.0.1"', "port = 1", "[destination.tls]"]
    site.config.write_text(site.config.read_text() + "\n".join([*er, *values]))
    names = ("intake", "HL7 intake", "worklist", "modality worklist", "performer", "destination er")
    told = {one["what"]: one["problem"] for one in status(load_settings(site.config))["certificates"]}
    assert told == dict.fromkeys([*names, *(f"{name}, authorities" for name in names)])


def test_without_a_ledger_it_says_so(tmp_path: Path) -> None:
    config = init.write(tmp_path / "box", {})
    done = CliRunner().invoke(app, ["--config", str(config), "status"])
    assert done.exit_code == 1
    assert "there is no ledger yet" in done.output
