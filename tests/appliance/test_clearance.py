"""No model runs outside what the board approved, and none that is not what it approved: the engine's part.

The pipeline and Triton are fakes that the tests answer for; ledger, spool, gate, board and findings are real.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from datetime import date, timedelta
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from google.protobuf import text_format
from rich.console import Console
from tritonclient.grpc import model_config_pb2

import triton_models
from appliance import show
from appliance.governance import board, indication
from appliance.governance.board import BoardError, approve, make_exception, retire, revoke, suspend
from appliance.governance.integrity import load_sound
from appliance.governance.package import seal
from appliance.governance.signature import read_private, write_keys
from appliance.inference.brain import Brain
from appliance.inference.server import render_config, write_repository
from appliance.inference.stream import Closed, SlabAnswer
from appliance.inference.triton import TritonError
from appliance.ledger.views import event_counts, study_report, verify_events
from appliance.services import guard
from appliance.services.engine import Engine
from appliance.services.issuing import Issuer
from appliance.settings import DicomDestination, Hl7Destination, Models, Settings, Triton
from appliance.settings import Study as StudySettings
from dicom_io.plausible import Look
from tests.appliance.intake.test_retention import Box
from tests.appliance.test_services import Asked, wait_until
from tests.builders import header
from tests.dicom_io.support import ct, head

SHIPPED = Path(triton_models.__file__).parent / "ich_reference"
LATER = date.today() + timedelta(days=100)
SIGNED: dict[str, Any] = {"who": "Dr A", "why": "because"}
SLICES = 30


class Absent:
    """Stands for the client of a Triton that is ready for the engine, and tells the guard nothing."""

    ready = True

    def problem(self, package: Any) -> str:
        return "" if self.ready else "it is not ready"

    def served(self, package: Any) -> Any:
        raise TritonError("it does not tell", "here", "none")


class Serving(Absent):
    """Stands for the client of a Triton that serves what it was given, or what a test makes of it."""

    old = new = ""

    def served(self, package: Any) -> Any:
        text = render_config(package, "cpu")
        assert self.old in text
        return ("1",), text_format.Parse(text.replace(self.old, self.new, 1), model_config_pb2.ModelConfig())


class Ended(Asked):
    """A pipeline that ends as the real one does: what was asked for is taken up again at the next start."""

    def close(self) -> None:
        self.closed = True
        for future in [one for asked in self.futures.values() for one in asked if not one.done()]:
            future.set_exception(Closed("the engine is stopping", "here", "none"))


class Site:
    """A box with packages that its own key signed, and an engine that a test steps."""

    def __init__(
        self, folder: Path, *, mode: str = "clinical", names: tuple[str, ...] = ("pkg",), refusals: bool = False
    ) -> None:
        self.box = Box(folder / "box")
        self.box.settings.run_directory.mkdir(exist_ok=True)
        write_keys(folder / "site.pem")
        for name in names:
            self.publish(folder / "models" / name, name, mode, folder / "site.pem")
        self.folder = folder / "models"
        self.settings: Settings = self.box.settings.model_copy(
            update={
                "study": StudySettings(settle_seconds=0, quiet_seconds=0.001),
                "models": Models(repository=self.folder, trusted_keys=[folder / "site.pub.pem"], packages=list(names)),
                "triton": Triton(managed=False),
                "destination": [
                    Hl7Destination(kind="hl7", name="er", host="127.0.0.1", port=2575, refusals=refusals),
                    DicomDestination(kind="dicom", name="pacs", ae_title="PACS", host="127.0.0.1", port=104),
                ],
            }
        )
        self.client: Absent = Absent()
        self.studies = 0
        self.start()

    @staticmethod
    def publish(folder: Path, name: str, mode: str, key: Path) -> None:
        shutil.copytree(SHIPPED, folder)
        text = (folder / "package.toml").read_text("utf-8").replace('"ich_reference"', f'"{name}"')
        text = text.replace('mode = "evaluation"', f'mode = "{mode}"')
        text = text.replace('clearance = "none: research reference"', 'clearance = "test clearance"')
        (folder / "package.toml").write_text(text, "utf-8")
        seal(folder, read_private(key))

    def start(self) -> None:
        self.packages, broken = load_sound(self.settings)
        self.asked = Ended()
        issuer = Issuer(self.settings, self.box.ledger, self.packages)
        self.engine = Engine(
            self.settings, self.box.ledger, self.packages, cast(Any, self.client), cast(Any, self.asked), issuer, broken
        )
        self.engine.breaker.step()

    def restart(self) -> None:
        self.engine.close()
        self.start()
        self.engine.guard.step()

    def serve(self) -> Serving:
        """From now on it has a Triton of its own, whose home is as `scanside triton` makes it."""
        self.client = client = Serving()
        self.settings = self.settings.model_copy(update={"triton": Triton(managed=True)})
        home = self.settings.triton_directory
        write_repository(home / "repository", self.packages, "cpu")
        (home / "backends" / "onnxruntime").mkdir(parents=True)
        shutil.copy(SHIPPED.parent / "backends" / "onnxruntime" / "model.py", home / "backends" / "onnxruntime")
        self.restart()
        return client

    def stop(self) -> None:
        self.engine.close()
        self.box.ledger.close()

    def decide(self, what: Any, *arguments: Any, **keywords: Any) -> int:
        decision = what(self.box.ledger, self.settings.evidence_directory, *arguments, **(SIGNED | keywords))
        return int(decision.record)

    def approve(self, mode: str, place: int = 0, until: date = LATER) -> int:
        return self.decide(approve, self.packages[place], mode, until=until)

    def scan(self, **changes: Any) -> int:
        """A head arrives, on an association of its own; returns its study."""
        self.studies += 1
        self.bring(self.studies, **changes)
        return self.studies

    def bring(self, study: int, first: int = 1, **changes: Any) -> None:
        self.box.association = self.box.ledger.open_association("S", "B", "127.0.0.1")
        for number in range(first, SLICES + 1):
            one = header(number, study=f"1.{study}", series=f"1.{study}.1", z=5.0 * number, **changes)
            assert self.box.store(one, image(study, number)) == "stored"
        self.box.ledger.close_association(self.box.association, "released")

    def report(self, study: int) -> dict[str, Any]:
        return study_report(self.box.ledger, study)

    def wait(self, study: int, *states: str) -> dict[str, Any]:
        """Step until the study's analyses are in these states, in the packages' order."""

        def done() -> bool:
            found = [one["state"] for one in sorted(self.report(study)["analyses"], key=lambda one: one["package"])]
            return found == list(states)

        wait_until(self.engine, done)
        return self.report(study)

    def answer(self, study: int, probability: float = 0.9) -> None:
        """Whatever is asked of the model for that study is answered, until its analyses have ended.

        More may be asked while the first are answered: what was asked ahead is asked again where it was another slab.
        """
        wait_until(self.engine, lambda: len(self.asked.futures.get(study, [])) >= SLICES)

        def ended() -> bool:
            for future in list(self.asked.futures.get(study, [])):
                self.answer_one(future, probability)
            return all(one["state"] not in ("admitted", "running") for one in self.report(study)["analyses"])

        wait_until(self.engine, ended)
        self.asked.futures.pop(study)

    @staticmethod
    def answer_one(future: Future[Any], probability: float) -> None:
        values = np.full(6, probability, np.float32)
        lesion = np.zeros((64, 64), np.float32)
        look = Look(None, 20_000.0, id(future).to_bytes(8, "little"), ())
        if not future.done():
            future.set_result(SlabAnswer(values, lesion, Brain(20_000.0, 0.0), (48, 64), ("raw",), (look,)))


@cache
def image(study: int, number: int) -> bytes:
    file = BytesIO()
    ct(head(12, False), 12, position=(0.0, 0.0, 5.0 * number), instance_number=number, study=f"2.25.{study}").save_as(
        file, enforce_file_format=True
    )
    return file.getvalue()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """Makes a site, and stops it after the test, however that ends: its threads would wait for ever."""
    with ExitStack() as stack:

        def one(**keywords: Any) -> Site:
            made = Site(tmp_path, **keywords)
            stack.callback(made.stop)
            return made

        yield one


@pytest.fixture
def site(make: Callable[..., Site]) -> Site:
    return make()


def criterion(report: dict[str, Any], name: str, place: int = 0) -> dict[str, Any]:
    (found,) = [one for one in report["analyses"][place]["admission"] if one["criterion"] == name]
    return cast(dict[str, Any], found)


def messages(site: Site) -> list[str]:
    return [path.read_text("utf-8") for path in sorted(site.settings.findings_directory.rglob("*.hl7"))]


def states(report: dict[str, Any]) -> set[str]:
    return {one["state"] for one in report["deliveries"]}


def test_a_clinical_package_alerts_only_once_it_is_approved(site: Site) -> None:
    report = site.wait(site.scan(), "refused")
    said = criterion(report, "approval")
    assert (said["outcome"], said["value"], said["attribute"]) == ("violated", "never approved", "board record")
    assert criterion(report, "integrity")["outcome"] == "met"
    assert "approval: board record is never approved" in report["analyses"][0]["reason"]
    assert site.asked.futures == {}, "nothing reached the model"
    record = site.approve("clinical")
    study = site.scan()
    site.wait(study, "running")
    site.answer(study)
    report = site.wait(study, "issued")
    assert f"(record {record})" in criterion(report, "approval")["value"]
    assert {"alert", "report"} <= {one["object"].split(".")[0] for one in report["deliveries"]}
    assert report["verdicts"][0]["result"]["mode"] == "clinical"
    (message,) = messages(site)
    assert "|P|2.5.1" in message
    assert "Evaluation only" not in message
    assert states(report) == {"pending"}
    record = site.decide(suspend, "pkg", site.packages[0])
    deliveries = site.report(study)["deliveries"]
    assert {(one["state"], f"suspended by Dr A (record {record})" in one["reason"]) for one in deliveries} == {
        ("withdrawn", True)
    }
    assert site.box.ledger.take_delivery("er") is None
    assert verify_events(site.box.ledger) is None


def test_a_package_that_is_suspended_while_it_reads_says_nothing(site: Site) -> None:
    site.approve("clinical")
    study = site.scan()
    site.wait(study, "running")
    record = site.decide(suspend, "pkg", None, why="false alerts")
    site.answer(study)
    report = site.wait(study, "refused")
    assert f"suspended by Dr A: false alerts (record {record})" in report["analyses"][0]["reason"]
    assert (report["verdicts"], report["deliveries"], messages(site)) == ([], [], [])
    assert site.wait(site.scan(), "refused")["verdicts"] == []


def test_a_package_that_is_suspended_at_the_last_moment_says_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the engine's last look at the board and the transaction that issues."""
    site.approve("clinical")
    study = site.scan()
    site.wait(study, "running")
    issue = site.box.ledger.issue_verdict
    suspended: list[int] = []

    def late(*arguments: Any, **keywords: Any) -> int:
        if not suspended:
            suspended.append(site.decide(suspend, "pkg", None))
        return issue(*arguments, **keywords)

    monkeypatch.setattr(site.box.ledger, "issue_verdict", late)
    site.answer(study)
    wait_until(site.engine, lambda: bool(suspended))
    wait_until(
        site.engine, lambda: study in site.asked.futures or site.report(study)["analyses"][0]["state"] != "running"
    )
    report = site.wait(study, "refused")
    assert f"(record {suspended[0]})" in report["analyses"][0]["reason"]
    assert (report["verdicts"], report["deliveries"]) == ([], [])


def test_what_a_bad_release_called_negative_is_analysed_again_when_somebody_asks(site: Site) -> None:
    """The same images, and the same version of the model: whatever was wrong was elsewhere."""
    site.approve("clinical")
    study = site.scan()
    site.wait(study, "running")
    site.answer(study, 0.01)
    report = site.wait(study, "issued")
    assert not report["verdicts"][-1]["positive"]
    assert site.box.ledger.reconsider(study, order=1)
    site.restart()
    wait_until(site.engine, lambda: event_counts(site.box.ledger)["verdict.kept"] == 1)
    assert site.asked.futures == {}, "an order alone is no reason to analyse the same again"
    for revision, sent in ((2, 1), (3, 1)):
        assert site.box.ledger.reconsider(study, asked="retry")
        site.answer(study, 0.9)
        wait_until(site.engine, lambda wanted=revision: len(site.report(study)["verdicts"]) == wanted)
        report = site.wait(study, "issued")
        assert report["verdicts"][-1]["positive"]
        assert len(messages(site)) == sent, "nobody is told the same twice"
    assert event_counts(site.box.ledger)["verdict.kept"] == 1
    assert site.box.ledger.undecided_studies({"pkg": site.packages[0].version}) == []


def test_another_decision_at_the_last_moment_does_no_harm(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.approve("clinical")
    study = site.scan()
    site.wait(study, "running")
    issue = site.box.ledger.issue_verdict
    moved: list[int] = []

    def late(*arguments: Any, **keywords: Any) -> int:
        if not moved:
            moved.append(site.decide(suspend, "another", None))
        return issue(*arguments, **keywords)

    monkeypatch.setattr(site.box.ledger, "issue_verdict", late)
    site.answer(study)
    assert len(site.wait(study, "issued")["verdicts"]) == len(moved) == 1


def test_what_was_admitted_and_waits_is_refused_before_the_model_sees_it(site: Site) -> None:
    site.client.ready = False
    site.approve("clinical")
    study = site.scan()
    site.wait(study, "admitted")
    site.asked.futures.clear()
    site.decide(retire, site.packages[0], why="replaced")
    site.client.ready = True
    report = site.wait(study, "refused")
    assert "retired by Dr A: replaced" in report["analyses"][0]["reason"]
    assert study not in site.asked.futures


def test_in_shadow_nobody_is_told(site: Site) -> None:
    site.approve("shadow")
    study = site.scan()
    site.wait(study, "running")
    site.answer(study)
    report = site.wait(study, "issued")
    assert (report["verdicts"][0]["positive"], report["verdicts"][0]["result"]["mode"]) == (True, "shadow")
    made = {one["object"].split(".")[0] for one in report["findings"]}
    assert ("report" in made, "alert" in made) == (True, False)
    assert (report["deliveries"], messages(site)) == ([], [])
    assert event_counts(site.box.ledger)["alert.undeliverable"] == 0
    assert report["verdicts"][0]["result"]["notice"].startswith("Evaluation only")
    console = Console(width=200)
    with console.capture() as text:
        console.print(show.study_view(report))
        console.print(show.studies_table([report], {"deliveries": [], "analyses": []}, 60.0))
    assert "in shadow: nobody was told" in text.get()
    assert "shadow: positive" in text.get()
    # Once it is approved to alert, what comes again is told as if for the first time.
    site.approve("clinical")
    site.box.association = site.box.ledger.open_association("S", "B", "127.0.0.1")
    assert site.box.store(header(99, study="1.1", series="1.1.9", modality="SR")) == "stored"
    site.box.ledger.close_association(site.box.association, "released")
    site.wait(study, "running")
    site.answer(study)
    report = site.wait(study, "issued")
    assert [one["result"]["mode"] for one in report["verdicts"]] == ["shadow", "clinical"]
    assert states(report) == {"pending"}
    (message,) = messages(site)
    assert "||alert||" in message


def dose_report(site: Site, number: int) -> None:
    """Something of study 1 comes that nobody analyses."""
    site.box.association = site.box.ledger.open_association("S", "B", "127.0.0.1")
    assert site.box.store(header(number, study="1.1", series="1.1.9", modality="SR")) == "stored"
    site.box.ledger.close_association(site.box.association, "released")


def read(site: Site, revision: int) -> None:
    """Whatever the model is asked of study 1 is answered, until there is that verdict."""

    def issued() -> bool:
        for future in list(site.asked.futures.get(1, [])):
            site.answer_one(future, 0.9)
        return len(site.report(1)["verdicts"]) == revision

    wait_until(site.engine, issued)
    wait_until(site.engine, lambda: not site.engine._working)


def kept(site: Site, times: int) -> None:
    wait_until(site.engine, lambda: event_counts(site.box.ledger)["verdict.kept"] == times)


@pytest.mark.parametrize("how", ["suspended", "in shadow"])
@pytest.mark.parametrize("looked", ["once", "twice"])
@pytest.mark.parametrize("tried", [False, True], ids=["never tried", "tried"])
def test_who_was_not_alerted_as_the_package_was_stopped_is_when_it_may_alert_again(
    site: Site, how: str, looked: str, tried: bool
) -> None:
    site.approve("clinical")
    study = site.scan()
    read(site, 1)
    if looked == "twice":
        assert site.box.ledger.reconsider(study, asked="retry")
        read(site, 2)
    last = 3 if looked == "twice" else 2
    assert len(messages(site)) == 1, "the alert waits, and is not told twice"
    if tried:
        row = site.box.ledger.take_delivery("er")
        assert row is not None
        site.box.ledger.settle_delivery(row, "retry")
    if how == "suspended":
        site.decide(suspend, "pkg", site.packages[0])
    else:
        site.approve("shadow")
    site.approve("clinical")
    dose_report(site, 98)
    read(site, last)
    report = site.report(study)
    alerts = [(one["state"], one["uid"]) for one in report["deliveries"] if one["object"] == "alert.er"]
    assert [state for state, _ in alerts] == ["withdrawn", "pending"]
    (again,) = [one for one in messages(site) if alerts[1][1] in one.split("\r")[0]]
    assert ("||correction|" if tried else "||alert|") in again, "who may have it gets no second alert"
    dose_report(site, 99)
    kept(site, 1)
    assert (len(messages(site)), len(site.report(study)["verdicts"])) == (2, last)


def test_who_was_alerted_before_the_package_was_stopped_hears_nothing_when_it_may_alert_again(site: Site) -> None:
    site.approve("clinical")
    study = site.scan()
    read(site, 1)
    row = site.box.ledger.take_delivery("er")
    assert row is not None
    site.box.ledger.settle_delivery(row, "acknowledge")
    site.decide(suspend, "pkg", site.packages[0])
    site.approve("clinical")
    dose_report(site, 98)
    kept(site, 1)
    assert (len(messages(site)), len(site.report(study)["verdicts"])) == (1, 1)


def test_an_alert_that_went_with_the_clinical_mode_is_not_told_in_shadow(site: Site) -> None:
    site.approve("clinical")
    study = site.scan()
    read(site, 1)
    site.approve("shadow")
    dose_report(site, 98)
    read(site, 2)
    dose_report(site, 99)
    kept(site, 1)
    assert (len(messages(site)), len(site.report(study)["verdicts"])) == (1, 2)


def test_in_shadow_nobody_hears_of_a_refusal_either(make: Callable[..., Site]) -> None:
    site = make(refusals=True)
    child = {"patient_age": "009Y", "patient_birth_date": ""}
    site.wait(site.scan(**child), "refused")
    assert messages(site) == [], "never approved"
    site.approve("shadow")
    report = site.wait(site.scan(**child), "refused")
    assert (messages(site), report["deliveries"]) == ([], [])
    site.approve("clinical")
    site.wait(site.scan(**child), "refused")
    (message,) = messages(site)
    assert "not analysed: paediatric" in message


def test_a_site_can_evaluate_a_cleared_package(site: Site) -> None:
    site.approve("evaluation")
    study = site.scan()
    site.wait(study, "running")
    site.answer(study)
    assert site.wait(study, "issued")["verdicts"][0]["result"]["mode"] == "evaluation"
    (message,) = messages(site)
    assert "|T|2.5.1" in message
    assert "Evaluation only" in message


def test_what_is_made_for_evaluation_runs_without_the_board_but_never_as_clinical(make: Callable[..., Site]) -> None:
    site = make(mode="evaluation")
    with pytest.raises(BoardError):
        site.approve("clinical")
    study = site.scan()
    site.wait(study, "running")
    site.answer(study)
    report = site.wait(study, "issued")
    assert report["verdicts"][0]["result"]["mode"] == "evaluation"
    assert "|T|2.5.1" in messages(site)[0]
    site.decide(suspend, "pkg", None)
    assert states(site.report(study)) == {"withdrawn"}
    site.wait(site.scan(), "refused")


def spoil(path: Path) -> None:
    """Change a bit, and leave the file's size as it was."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def named(path: Path) -> Path:
    """The file that is said to be wrong: a changed package.toml shows in its signature, which is read first."""
    return path.with_name("package.sig") if path.name == "package.toml" else path


@pytest.mark.parametrize("name", ["model.onnx", "package.toml"])
def test_drift_stops_that_package_alone_and_while_it_lasts(make: Callable[..., Site], name: str) -> None:
    site = make(names=("one", "two"))
    for place in (0, 1):
        site.approve("clinical", place)
    site.engine.guard.step()
    study = site.scan()
    site.wait(study, "running", "running")
    path = site.folder / "one" / name
    sound = path.read_bytes()
    spoil(path)
    for _ in range(3):
        site.engine.guard.step()
    assert event_counts(site.box.ledger)["package.drifted"] == 1
    wait_until(site.engine, lambda: len(site.asked.futures.get(study, [])) >= 2 * SLICES)
    site.answer(study)
    report = site.wait(study, "refused", "issued")
    assert str(named(path)) in report["analyses"][0]["reason"]
    assert criterion(report, "integrity", 0)["outcome"] == "violated"
    assert {one["package"] for one in [v["result"] for v in report["verdicts"]]} == {"two"}
    site.wait(site.scan(), "refused", "running")
    path.write_bytes(sound)
    site.engine.guard.step()
    assert event_counts(site.box.ledger)["package.restored"] == 1
    site.wait(site.scan(), "running", "running")


@pytest.mark.parametrize("name", ["model.onnx", "package.toml", "package.sig"])
def test_what_is_broken_at_the_start_refuses_and_the_others_run(make: Callable[..., Site], name: str) -> None:
    site = make(names=("one", "two"))
    for place in (0, 1):
        site.approve("clinical", place)
    site.client.ready = False
    waiting = site.scan()
    site.wait(waiting, "admitted", "admitted")
    site.engine.close()
    path = site.folder / "one" / name
    sound = path.read_bytes()
    spoil(path)
    site.client.ready = True
    site.start()
    assert event_counts(site.box.ledger)["package.drifted"] == 1
    report = site.wait(waiting, "refused", "running")
    (said,) = report["analyses"][0]["admission"]
    assert (said["criterion"], said["outcome"], str(named(path)) in said["value"]) == ("integrity", "violated", True)
    site.wait(site.scan(), "refused", "running")
    assert messages(site) == []
    site.engine.close()
    path.write_bytes(sound)
    site.start()
    site.wait(site.scan(), "running", "running")


@pytest.mark.parametrize("when", ["at the start", "while it runs"])
@pytest.mark.parametrize("name", ["config.pbtxt", "1/model.onnx"])
def test_a_file_of_triton_that_drifted_is_named(site: Site, name: str, when: str) -> None:
    site.approve("clinical")
    site.serve()
    site.wait(site.scan(), "running")
    path = site.settings.triton_directory / "repository" / site.packages[0].model.triton_name / name
    sound = path.read_bytes()
    spoil(path)
    if when == "at the start":
        site.restart()
    else:
        site.engine.guard.step()
    report = site.wait(site.scan(), "refused")
    assert str(path) in criterion(report, "integrity")["value"]
    assert [one["criterion"] for one in report["analyses"][0]["admission"] if one["outcome"] != "met"] == ["integrity"]
    path.write_bytes(sound)
    site.engine.guard.step()
    site.wait(site.scan(), "running")


def test_a_triton_that_serves_something_else_is_named(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "SERVED_SECONDS", 0.0)
    site.approve("clinical")
    triton = site.serve()
    study = site.scan()
    site.wait(study, "running")
    triton.old, triton.new = "max_batch_size: 16", "max_batch_size: 8"
    site.engine.guard.step()
    site.answer(study)
    report = site.wait(study, "refused")
    assert "its max_batch_size is 8, the package's is 16" in criterion(report, "integrity")["value"]
    assert (report["verdicts"], messages(site)) == ([], [])
    site.restart()
    site.wait(site.scan(), "refused")
    triton.old = triton.new = ""
    site.engine.guard.step()
    site.wait(site.scan(), "running")


def test_a_broken_chain_approves_nothing(site: Site) -> None:
    record = site.approve("clinical")
    site.engine.guard.step()
    site.wait(site.scan(), "running")
    with sqlite3.connect(site.settings.ledger_path) as raw:
        raw.execute("update event set detail = replace(detail, 'Dr A', 'Dr B') where id = ?", (record,))
    site.engine.guard.step()
    assert f"event {record} (board.approved)" in site.engine.guard.fault
    report = site.wait(site.scan(), "refused")
    said = criterion(report, "approval")
    assert (said["outcome"], f"event {record} (board.approved)" in said["value"]) == ("unknown", True)
    assert event_counts(site.box.ledger)["audit.broken"] == 1
    # And so it is at the next start.
    site.engine.close()
    site.start()
    site.engine.guard.step()
    site.wait(site.scan(), "refused")


def test_a_suspension_that_is_removed_lets_nothing_run(site: Site) -> None:
    site.approve("clinical")
    site.engine.guard.step()
    record = site.decide(suspend, "pkg", None)
    site.wait(site.scan(), "refused")
    site.engine.guard.step()
    with sqlite3.connect(site.settings.ledger_path) as raw:
        raw.execute("delete from event where id >= ?", (record,))
    site.wait(site.scan(), "refused")
    site.engine.guard.step()
    assert site.engine.guard.fault
    site.engine.close()
    site.start()
    site.engine.guard.step()
    assert site.engine.guard.fault, "the noted head knows of the suspension"
    site.wait(site.scan(), "refused")


NOBODY_KNOWS = {"patient_age": "", "patient_birth_date": ""}


def test_an_exception_of_the_board_lets_what_is_unknown_pass(site: Site) -> None:
    site.approve("clinical")
    report = site.wait(site.scan(**NOBODY_KNOWS), "refused")
    assert criterion(report, "age")["outcome"] == "unknown"
    record = site.decide(make_exception, site.packages[0], "age", until=LATER, why="de-identified")
    report = site.wait(site.scan(**NOBODY_KNOWS), "running")
    said = criterion(report, "age")
    assert (said["outcome"], f"de-identified (record {record})" in said["note"]) == ("excepted", True)
    child = site.wait(site.scan(patient_age="009Y", patient_birth_date=""), "refused")
    assert criterion(child, "age")["outcome"] == "violated"
    site.decide(revoke, record)
    assert criterion(site.wait(site.scan(**NOBODY_KNOWS), "refused"), "age")["outcome"] == "unknown"


def let_days_pass(patch: pytest.MonkeyPatch, days: int) -> None:
    """The day on which approvals and exceptions must hold is so many days from now."""
    then = date.today() + timedelta(days)

    class Then(date):
        @classmethod
        def today(cls) -> Then:
            return cls(then.year, then.month, then.day)

    for module in (board, indication):
        patch.setattr(module, "date", Then)


def test_an_approval_ends_with_its_last_day_also_for_what_is_being_read(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    until = date.today() + timedelta(1)
    record = site.approve("clinical", until=until)
    let_days_pass(monkeypatch, 1)
    study = site.scan()
    site.wait(study, "running")
    let_days_pass(monkeypatch, 2)
    site.answer(study)
    report = site.wait(study, "refused")
    said = f"approved by Dr A as clinical until {until} (record {record}): that is over"
    assert said in report["analyses"][0]["reason"]
    assert (report["verdicts"], report["deliveries"], messages(site)) == ([], [], [])
    assert said in site.wait(site.scan(), "refused")["analyses"][0]["reason"]
    site.approve("clinical", until=until + timedelta(9))
    site.wait(site.scan(), "running")


def test_an_exception_ends_with_its_last_day_also_for_what_is_being_read(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.approve("clinical")
    site.decide(make_exception, site.packages[0], "age", until=date.today() + timedelta(1))
    let_days_pass(monkeypatch, 1)
    study = site.scan(**NOBODY_KNOWS)
    site.wait(study, "running")
    let_days_pass(monkeypatch, 2)
    site.answer(study)
    report = site.wait(study, "refused")
    assert (criterion(report, "age")["outcome"], criterion(report, "age")["note"]) == ("unknown", "")
    assert (report["verdicts"], messages(site)) == ([], [])
    assert criterion(site.wait(site.scan(**NOBODY_KNOWS), "refused"), "age")["outcome"] == "unknown"
    site.wait(site.scan(), "running")


def test_an_exception_that_is_revoked_ends_also_for_what_is_being_read(site: Site) -> None:
    site.approve("clinical")
    record = site.decide(make_exception, site.packages[0], "age", until=LATER)
    study = site.scan(**NOBODY_KNOWS)
    site.wait(study, "running")
    site.decide(revoke, record)
    site.answer(study)
    assert criterion(site.wait(study, "refused"), "age")["outcome"] == "unknown"


def test_an_approval_of_another_version_does_not_count(site: Site, tmp_path: Path) -> None:
    record, before = site.approve("clinical"), site.packages[0].version
    site.decide(make_exception, site.packages[0], "age", until=LATER)
    site.wait(site.scan(**NOBODY_KNOWS), "running")

    def publish(old: str, new: str) -> None:
        manifest = site.folder / "pkg" / "package.toml"
        manifest.write_text(manifest.read_text("utf-8").replace(old, new, 1), "utf-8")
        seal(manifest.parent, read_private(tmp_path / "site.pem"))
        site.restart()

    publish(f'version = "{before}"', 'version = "9.0.0"')
    report = site.wait(site.scan(), "refused")
    said = f"approved was {before} (record {record}), this is 9.0.0"
    assert (criterion(report, "approval")["outcome"], criterion(report, "approval")["value"]) == ("violated", said)
    site.approve("clinical")
    site.wait(site.scan(), "running")
    report = site.wait(site.scan(**NOBODY_KNOWS), "refused")
    assert criterion(report, "age")["outcome"] == "unknown", "the exception was for the version before"
    # Nor does that of the same version with another threshold.
    publish(f"threshold = {site.packages[0].operating_point.threshold}", "threshold = 0.6")
    report = site.wait(site.scan(), "refused")
    assert "approved was 9.0.0 with another package.toml" in criterion(report, "approval")["value"]


def test_an_engine_that_starts_again_knows_what_the_board_decided(make: Callable[..., Site]) -> None:
    site = make(names=("one", "two"))
    for place in (0, 1):
        site.approve("clinical" if place else "shadow", place)
        site.decide(make_exception, site.packages[place], "age", until=LATER)
    site.restart()
    study = site.scan(**NOBODY_KNOWS)
    report = site.wait(study, "running", "running")
    assert {criterion(report, "age", place)["outcome"] for place in (0, 1)} == {"excepted"}
    assert "as shadow until" in criterion(report, "approval", 0)["value"]
    record = site.decide(suspend, "two", None, why="a doubt")
    site.restart()
    report = site.wait(study, "running", "refused")  # what was being read is taken up again, as far as it may be
    assert f"suspended by Dr A: a doubt (record {record})" in criterion(report, "approval", 1)["value"]
    site.decide(retire, site.packages[0], why="replaced")
    site.restart()
    report = site.wait(site.scan(), "refused", "refused")
    assert "retired by Dr A: replaced" in criterion(report, "approval", 0)["value"]
    assert messages(site) == []
    assert verify_events(site.box.ledger) is None
