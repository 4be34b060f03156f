"""What a verdict tells the hospital, over the life of a study; and what the engine makes of one that lost its files."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import time
from collections.abc import Callable
from concurrent.futures import Future
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from appliance.governance.package import load_configured
from appliance.inference.stream import Closed
from appliance.intake.spool import path_of
from appliance.ledger import schema as t
from appliance.ledger.database import later
from appliance.ledger.records import Verdict
from appliance.ledger.store import NewFinding, Told
from appliance.ledger.views import event_counts, study_report
from appliance.services import issuing
from appliance.services.engine import ANALYSES, HURRY_LOOK_SECONDS, Engine, longest_run
from appliance.services.issuing import Issuer
from appliance.services.telling import alert_kind
from appliance.settings import Budget, Hl7Destination, Models, Settings
from appliance.settings import Study as StudySettings
from appliance.show import study_view
from dicom_io.errors import DecodeError
from dicom_io.header import Header
from dicom_io.plausible import ImplausibleImage
from tests.appliance.intake.test_retention import Box
from tests.builders import header
from tests.dicom_io.support import ct, head


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.booleans())
def test_the_hospital_always_knows_the_newest_answer_and_is_told_only_changes(answers: list[bool], early: bool) -> None:
    """Of a provisional answer, which only the first can be, it is told as well what became of it."""
    known = False
    told: list[str] = []
    for number, positive in enumerate(answers):
        before = [Told(one, early and place == 0) for place, one in enumerate(answers[:number])]
        kind = alert_kind(before, positive, provisional=early and number == 0)
        if positive == known:
            assert kind == ("confirmation" if positive and early and number == 1 else None)
        elif positive:
            assert kind == ("correction" if told else "provisional" if early and number == 0 else "alert")
        else:
            assert kind == "withdrawal"
        if kind:
            told.append(kind)
        known = positive
    assert told.count("alert") + told.count("provisional") <= 1
    assert (told[:1] in (["alert"], ["provisional"])) == any(answers)


@given(st.lists(st.integers(1, 4), max_size=12), st.sets(st.integers(0, 40), max_size=4), st.sets(st.integers(0, 11)))
def test_slabs_lie_next_to_one_another_where_nothing_is_between(
    sizes: list[int], gaps: set[int], left_out: set[int]
) -> None:
    ends = [0, *itertools.accumulate(sizes)]
    slabs = [tuple(range(a, b)) for a, b in itertools.pairwise(ends)]
    kept = [slab for number, slab in enumerate(slabs) if number not in left_out]
    longest = 0
    for start in range(len(slabs)):
        for end in range(start + 1, len(slabs) + 1):
            part = slabs[start:end]
            inner = [slab[-1] for slab in part[:-1]]
            if all(slab in kept for slab in part) and not gaps & set(inner):
                longest = max(longest, len(part))
    assert longest_run(kept, gaps) == longest


def engine_beside(box: Box) -> Engine:
    """An engine with the shipped package under the name that the box's studies know; no study may reach Triton."""
    package = dataclasses.replace(load_configured(Settings())[0], name="pkg")
    settings = box.settings.model_copy(update={"study": StudySettings(settle_seconds=0, quiet_seconds=0.001)})
    return Engine(
        settings, box.ledger, [package], cast(Any, Ready()), cast(Any, None), Issuer(settings, box.ledger, [package])
    )


def come_again(box: Box, one: Header) -> None:
    assert box.store(one) in ("stored", "conflict")
    box.ledger.close_association(box.association, "released")
    engine_beside(box).step()


def test_what_comes_back_to_a_study_without_images_leaves_its_verdict(tmp_path: Path) -> None:
    """A capture that the PACS sends on, days after retention took the study's files."""
    box = Box(tmp_path)
    box.receive(1)
    box.finish(1)
    assert box.retention.step() == 1
    come_again(box, header(9, study="1.1", series="1.1.9", modality="OT"))
    report = study_report(box.ledger, 1)
    assert (report["state"], event_counts(box.ledger)["study.completed"]) == ("complete", 2)
    assert [one["state"] for one in report["analyses"]] == ["issued"]
    assert [one["revision"] for one in box.ledger.verdicts(1)] == [1]
    assert event_counts(box.ledger)["study.refused"] == 0
    box.ledger.close()


def test_a_study_of_which_only_a_part_came_again_is_refused_and_that_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    box = Box(tmp_path)
    er = Hl7Destination(kind="hl7", name="er", host="127.0.0.1", port=2575, refusals=True)
    box.settings = box.settings.model_copy(update={"destination": [er]})
    headers = box.receive(1)
    (arriving,) = box.ledger.arriving_studies()
    box.ledger.complete_study(arriving.id, arriving.last_instance_at, {"by": "test", "confidence": "high"})
    box.ledger.decide(1, "pkg", "1", admitted=False, reason="a test", admission=[], selection=[], inputs=[])
    with box.ledger._write() as connection:
        connection.execute(t.study.update().values(completed_at=later(-1e6)))
    assert box.retention.step() == 1
    come_again(box, headers[0])
    (analysis,) = study_report(box.ledger, 1)["analyses"]
    assert analysis["state"] == "refused"
    assert "2 instances were removed by retention" in analysis["reason"]
    # It is the hospital's to send it whole, so whoever hears of refusals hears of this one.
    (message,) = box.settings.findings_directory.rglob("*.hl7")
    assert "2 instances were removed by retention" in message.read_text(encoding="utf-8")
    assert [one.levelname for one in caplog.records if "cannot be judged" in one.message] == ["ERROR"]
    box.ledger.close()


# --- the engine's order of work; its pipeline is one that only notes what it is asked for --------------------------


@dataclasses.dataclass
class Asked:
    """Stands for the pipeline: what is asked for is never answered until the test does."""

    futures: dict[int, list[Future[Any]]] = dataclasses.field(default_factory=dict)
    closed: bool = False
    urged: list[int] = dataclasses.field(default_factory=list)

    def ask(self, package: Any, admission: Any, slabs: Any, *, owner: int, urgency: int) -> Future[Any]:
        if self.closed:
            raise Closed("the test is over", "here", "none")
        future: Future[Any] = Future()
        self.futures.setdefault(owner, []).append(future)
        return future

    def urge(self, owner: int) -> None:
        self.urged.append(owner)

    def prepare(self, files: Any, *, urgency: int) -> None:
        assert not files, "these are not compressed"

    def close(self) -> None:
        self.closed = True
        for owner in list(self.futures):
            self.fail(owner)

    def fail(self, owner: int) -> None:
        for future in self.futures.pop(owner):
            if not future.done():
                future.set_exception(DecodeError("it is broken", "here", "none"))


class Ready:
    """Stands for the client of a server that is ready."""

    def problem(self, package: Any) -> str:
        return ""


def busy_engine(box: Box, server: Any = None) -> tuple[Engine, Asked]:
    package = dataclasses.replace(load_configured(Settings())[0], name="pkg")
    settings = box.settings.model_copy(update={"study": StudySettings(settle_seconds=0, quiet_seconds=0.001)})
    asked = Asked()
    issuer = Issuer(settings, box.ledger, [package])
    return Engine(settings, box.ledger, [package], server or cast(Any, Ready()), cast(Any, asked), issuer), asked


def bring(box: Box, study: int, slices: int = 30) -> None:
    """A head on the association that is open."""
    for number in range(1, slices + 1):
        one = header(number, study=f"1.{study}", series=f"1.{study}.1", z=5.0 * number)
        assert box.store(one, f"{study}/{number}".encode() * 10) == "stored"


def states(box: Box, count: int) -> list[str]:
    """Of the analysis of each study; "" where nothing was decided."""
    reports = [study_report(box.ledger, study) for study in range(1, count + 1)]
    return [one["analyses"][0]["state"] if one["analyses"] else "" for one in reports]


def wait_until(engine: Engine, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline
        engine.breaker.step()
        engine.step()
        time.sleep(0.01)


def test_what_was_arriving_when_an_engine_ended_waits_for_its_analysis(tmp_path: Path) -> None:
    """It may be what ended it: work ahead costs no try, so it would end one engine after the other."""
    box = Box(tmp_path)
    box.settings.run_directory.mkdir(exist_ok=True)
    bring(box, 1)
    engine, asked = busy_engine(box)
    bring(box, 2)
    engine._settings = engine._settings.model_copy(update={"study": StudySettings(quiet_seconds=60)})
    engine.breaker.step()
    engine.step()
    assert set(asked.futures) == {2}
    engine.close()
    box.ledger.close()


def test_what_failed_is_answered_alone(tmp_path: Path) -> None:
    """If it is what ends the engine, no other study is with it when it does."""
    box = Box(tmp_path)
    box.settings.run_directory.mkdir(exist_ok=True)
    for study in range(1, 4):
        bring(box, study)
    box.ledger.close_association(box.association, "released")
    engine, asked = busy_engine(box)
    wait_until(engine, lambda: states(box, 3) == ["running"] * 3)
    with box.ledger._write() as connection:  # as at the next start, after the engine died with all three
        connection.execute(t.analysis.update().values(state="admitted", due_at=later(-1)))
    before, (engine, asked) = asked, busy_engine(box)
    wait_until(engine, lambda: "running" in states(box, 3))
    for _ in range(3):
        engine.step()
    assert states(box, 3) == ["running", "admitted", "admitted"]
    wait_until(engine, lambda: 1 in asked.futures)
    asked.fail(1)
    wait_until(engine, lambda: states(box, 3)[1] == "running")
    assert states(box, 3)[2] == "admitted"
    engine.close()
    before.close()
    box.ledger.close()


def test_what_failed_has_its_turn_although_others_keep_coming(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.settings.run_directory.mkdir(exist_ok=True)
    for study in (1, 2):
        bring(box, study)
    box.ledger.close_association(box.association, "released")
    engine, asked = busy_engine(box)
    wait_until(engine, lambda: states(box, 2) == ["running"] * 2)
    asked.fail(1)
    wait_until(engine, lambda: states(box, 2) == ["admitted", "running"])
    with box.ledger._write() as connection:  # its pause is over, and it waited
        connection.execute(t.analysis.update().where(t.analysis.c.study_id == 1).values(due_at=later(-7)))
    box.association = box.ledger.open_association("S", "B", "127.0.0.1")
    bring(box, 3)
    box.ledger.close_association(box.association, "released")
    wait_until(engine, lambda: states(box, 3)[2] == "admitted")
    for _ in range(3):
        engine.step()
    assert states(box, 3) == ["admitted", "running", "admitted"]
    asked.fail(2)
    wait_until(engine, lambda: states(box, 3)[0] == "running")
    assert states(box, 3)[2] == "admitted"
    engine.close()
    box.ledger.close()


@pytest.mark.parametrize(("waited", "begun"), [(7, "2 urgent"), (20, "none"), (60, "1 itself")])
def test_what_failed_is_not_starved_by_studies_that_go_first(tmp_path: Path, waited: int, begun: str) -> None:
    box = Box(tmp_path)
    box.settings.run_directory.mkdir(exist_ok=True)
    for study in (1, 2):
        bring(box, study)
    box.ledger.close_association(box.association, "released")
    engine, asked = busy_engine(box)
    wait_until(engine, lambda: states(box, 2) == ["running"] * 2 and 1 in asked.futures)
    asked.fail(1)
    wait_until(engine, lambda: states(box, 2) == ["admitted", "running"])
    with box.ledger._write() as connection:
        connection.execute(t.analysis.update().where(t.analysis.c.study_id == 1).values(due_at=later(-waited)))
    study_settings = StudySettings(settle_seconds=0, quiet_seconds=0.001, stat_calling_ae_titles=["ER"])
    engine._settings = engine._settings.model_copy(update={"study": study_settings})
    box.association = box.ledger.open_association("ER", "B", "127.0.0.1")
    bring(box, 3)
    box.ledger.close_association(box.association, "released")
    expected = {
        "2 urgent": ["admitted", "running", "running"],
        "none": ["admitted", "running", "admitted"],
        "1 itself": ["running", "running", "admitted"],
    }[begun]
    wait_until(engine, lambda: states(box, 3) == expected)
    for _ in range(3):
        engine.step()
    assert states(box, 3) == expected
    asked.close()
    engine.close()
    box.ledger.close()


def test_what_may_miss_its_deadline_goes_first_and_the_rest_waits(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.settings.run_directory.mkdir(exist_ok=True)
    box.settings = box.settings.model_copy(update={"budget": Budget(analysis_seconds=3600)})
    bring(box, 1)
    box.ledger.close_association(box.association, "released")
    engine, asked = busy_engine(box)
    wait_until(engine, lambda: states(box, 1) == ["running"])
    assert (asked.urged, event_counts(box.ledger)["stage.degraded"]) == ([], 0)
    with box.ledger._write() as connection:
        connection.execute(t.study.update().values(completed_at=later(-3600 * 0.41)))
    wait_until(engine, lambda: asked.urged == [1])
    time.sleep(HURRY_LOOK_SECONDS)
    engine.step()
    assert (asked.urged, event_counts(box.ledger)["stage.degraded"]) == ([1], 1)
    assert engine._is_stat(1, "S") and not engine._is_stat(2, "S")
    # Nothing is done ahead for others, but for what goes first anyway.
    engine._settings = engine._settings.model_copy(
        update={"study": StudySettings(settle_seconds=60, quiet_seconds=60, stat_calling_ae_titles=["ER"])}
    )
    for study, sender in ((2, "CT1"), (3, "ER")):
        box.association = box.ledger.open_association(sender, "B", "127.0.0.1")
        bring(box, study)
    wait_until(engine, lambda: 3 in asked.futures)
    assert 2 not in asked.futures
    assert "deadline near" in shown(box, 1)
    asked.close()
    wait_until(engine, lambda: states(box, 1) != ["running"])
    engine.close()
    box.ledger.close()


def shown(box: Box, study: int) -> str:
    console = Console(width=200, record=True)
    console.print(study_view(study_report(box.ledger, study)))
    return console.export_text()


def test_a_study_that_cannot_wait_finds_a_place_when_all_are_taken(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.settings.run_directory.mkdir(exist_ok=True)
    for study in range(1, ANALYSES + 3):
        bring(box, study, 25)
    box.ledger.close_association(box.association, "released")
    engine, _ = busy_engine(box)
    wait_until(engine, lambda: states(box, ANALYSES) == ["running"] * ANALYSES)
    engine.step()
    assert states(box, ANALYSES + 2)[-2:] == ["admitted"] * 2
    box.association = box.ledger.open_association("ER", "B", "127.0.0.1")
    bring(box, 99, 25)
    box.ledger.close_association(box.association, "released")
    study = StudySettings(settle_seconds=0, quiet_seconds=0.001, stat_calling_ae_titles=["ER"])
    engine._settings = engine._settings.model_copy(update={"study": study})
    wait_until(engine, lambda: len(study_report(box.ledger, ANALYSES + 3)["analyses"]) == 1)
    wait_until(engine, lambda: states(box, ANALYSES + 3)[-1] == "running")
    assert states(box, ANALYSES + 2)[-2:] == ["admitted"] * 2
    engine.close()
    box.ledger.close()


def alerted_early(folder: Path, slices: int = 1) -> tuple[Box, int]:
    """A box that sent a provisional alert on a study of so many slices; the number of its analysis."""
    box = Box(folder)
    box.settings.run_directory.mkdir(exist_ok=True)
    hl7 = Hl7Destination(kind="hl7", name="er", host="127.0.0.1", port=2575)
    box.settings = box.settings.model_copy(update={"destination": [hl7]})
    file = BytesIO()
    image = ct(head(12, False), 12, position=(0.0, 0.0, 5.0), instance_number=1)
    image.save_as(file, enforce_file_format=True)
    for number in range(1, slices + 1):
        one = header(number, study="1.1", series="1.1.1", z=5.0 * number)
        assert box.store(one, file.getvalue() + number.to_bytes(2, "big")) == "stored"
    verdict = Verdict(
        study_instance_uid="1.1", series_instance_uid="1.1.1", package="pkg", package_version="1", notice="",
        positive=True, probability=0.99, threshold=0.5, subtypes={}, volume_ml=1.0, slabs=(), key_slabs=(),
        codecs=("raw",), limitations=(), provisional=True,
    )  # fmt: skip
    row = box.ledger.begin_early(1, "pkg", "1", admission=[], selection=[], inputs=[])
    assert row is not None
    alert = NewFinding("alert.er", "CONTROL1", "a.hl7", ("er",), 0)
    box.ledger.issue_verdict(row["id"], 1, verdict, later(0), [alert], admission=[], late=False)
    return box, row["id"]


def assert_withdrawn_once(box: Box, analysis: int, *said: str) -> None:
    assert box.ledger.told(analysis)["er"] == [Told(True, True), Told(False)]
    (message,) = box.settings.findings_directory.rglob("*.hl7")
    text = message.read_text(encoding="utf-8")
    assert all(words in text for words in ("WITHDRAWAL", "Nothing is said of haemorrhage", *said))
    assert event_counts(box.ledger)["verdict.withdrawn"] == 1


@pytest.mark.parametrize("how", ["fails", "cannot be a CT", "ends the engine"])
def test_a_provisional_alert_is_withdrawn_when_the_whole_study_is_set_aside(tmp_path: Path, how: str) -> None:
    """It promised a word on the whole study; nobody may wait for one that does not come."""
    box, analysis = alerted_early(tmp_path, 30)
    box.ledger.close_association(box.association, "released")
    box.settings = box.settings.model_copy(update={"models": Models(attempts=1)})
    engine, asked = busy_engine(box)
    wait_until(engine, lambda: states(box, 1) == ["running"] and 1 in asked.futures)
    assert len(box.ledger.verdicts(analysis)) == 1
    said = "it is broken"
    if how == "ends the engine":
        box.ledger.park_analyses(1)  # as at the next start
        (before, engine), asked = (engine, busy_engine(box)[0]), asked
        said = "the engine ended or stumbled 1 times"
        engine.step()
        before.step()
        engine.close()
        engine = before
    elif how == "fails":
        asked.fail(1)
    else:
        said = "it is all zeros"
        for future in asked.futures[1]:
            future.set_exception(ImplausibleImage(said, "here", "none"))
    wait_until(engine, lambda: len(box.ledger.verdicts(analysis)) == 2)
    for _ in range(3):
        engine.step()
    assert states(box, 1) == ["failed"]
    assert_withdrawn_once(box, analysis, said, "is not disproved")
    asked.close()
    engine.close()
    box.ledger.close()


def test_the_word_on_a_provisional_alert_rests_on_the_scan_that_it_was_given_on(tmp_path: Path) -> None:
    """The head was scanned again before the study was complete; that scan must not take the alert back."""
    box, _ = alerted_early(tmp_path, 30)
    for number in range(1, 31):
        box.store(header(number, study="1.1", series="1.1.5", z=5.0 * number), f"again {number}".encode() * 10)
    box.ledger.close_association(box.association, "released")
    engine, asked = busy_engine(box)
    wait_until(engine, lambda: states(box, 1) == ["running"])
    (analysis,) = study_report(box.ledger, 1)["analyses"]
    assert {uid.rsplit(".", 1)[0] for uid, _ in analysis["inputs"]} == {"1.1.1"}
    assert [one["reason"] for one in analysis["selection"] if not one["chosen"]] == [
        "the alert rests on another series"
    ]
    asked.close()
    engine.close()
    box.ledger.close()


def test_a_provisional_alert_is_withdrawn_once_although_the_engine_dies_between(tmp_path: Path) -> None:
    box, analysis = alerted_early(tmp_path)
    box.ledger.close_association(box.association, "released")
    dying, _ = busy_engine(box)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(box.ledger, "decide", _die)
        wait_until(dying, lambda: len(box.ledger.verdicts(analysis)) == 2)
        dying.step()
    dying.close()
    engine, _ = busy_engine(box)
    wait_until(engine, lambda: states(box, 1) == ["refused"])
    engine.close()
    assert_withdrawn_once(box, analysis)
    box.ledger.close()


class Away:
    """Stands for the client of a server that does not answer."""

    def problem(self, package: Any) -> str:
        return "no answer"


@pytest.mark.parametrize("restarted", [False, True])
def test_a_provisional_alert_is_withdrawn_when_a_study_that_waits_is_refused(tmp_path: Path, restarted: bool) -> None:
    """Triton is away: the study was admitted and not run when it came out that it may not be."""
    box, analysis = alerted_early(tmp_path, 30)
    box.ledger.close_association(box.association, "released")
    engine, _ = busy_engine(box, Away())
    wait_until(engine, lambda: states(box, 1) == ["admitted"])
    if restarted:
        engine.close()
        engine, _ = busy_engine(box, Away())
        (package,) = engine._packages.values()
        narrowed = dataclasses.replace(package.indication, kvp=(130.0, 140.0))
        engine._packages["pkg"] = dataclasses.replace(package, indication=narrowed)
    else:
        box.association = box.ledger.open_association("S", "B", "127.0.0.1")
        box.store(header(31, study="1.1", series="1.1.1", z=155.0, contrast_bolus_agent="OMNIPAQUE"), b"late" * 10)
        box.ledger.close_association(box.association, "released")
    wait_until(engine, lambda: states(box, 1) == ["refused"])
    # In the same step, or it would only be found at the next start.
    assert_withdrawn_once(box, analysis, "KVP" if restarted else "OMNIPAQUE")
    engine.step()
    engine.close()
    assert_withdrawn_once(box, analysis)
    box.ledger.close()


def test_a_withdrawal_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box, analysis = alerted_early(tmp_path, 30)
    box.ledger.close_association(box.association, "released")
    box.settings = box.settings.model_copy(update={"models": Models(attempts=1)})
    engine, asked = busy_engine(box)
    wait_until(engine, lambda: states(box, 1) == ["running"] and 1 in asked.futures)
    failures = [OSError(errno.ENOSPC, "no space left"), ValueError("odd")]
    write = issuing._write_durably

    def failing(path: Path, content: bytes) -> None:
        if failures:
            raise failures.pop()
        write(path, content)

    monkeypatch.setattr(issuing, "_write_durably", failing)
    asked.fail(1)
    wait_until(engine, lambda: len(box.ledger.verdicts(analysis)) == 2)
    engine.step()
    assert_withdrawn_once(box, analysis, "it is broken")
    asked.close()
    engine.close()
    box.ledger.close()


@pytest.mark.parametrize(
    ("error", "after"), [(OSError(errno.EIO, "I/O error"), "failed"), (OSError(errno.ENOSPC, "full"), "admitted")]
)
def test_a_file_that_the_disk_cannot_read_costs_a_try_and_a_full_disk_none(
    tmp_path: Path, error: OSError, after: str
) -> None:
    box = Box(tmp_path)
    box.settings.run_directory.mkdir(exist_ok=True)
    box.settings = box.settings.model_copy(update={"models": Models(attempts=1)})
    bring(box, 1)
    box.ledger.close_association(box.association, "released")
    engine, asked = busy_engine(box)
    wait_until(engine, lambda: states(box, 1) == ["running"] and 1 in asked.futures)
    for future in asked.futures[1]:
        future.set_exception(error)
    wait_until(engine, lambda: states(box, 1) != ["running"])
    assert states(box, 1) == [after]
    asked.close()
    engine.close()
    box.ledger.close()


def test_what_was_set_aside_for_a_damaged_file_is_analysed_when_that_comes_again(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.settings.run_directory.mkdir(exist_ok=True)
    box.settings = box.settings.model_copy(update={"models": Models(attempts=1)})
    bring(box, 1)
    box.ledger.close_association(box.association, "released")
    engine, asked = busy_engine(box)
    wait_until(engine, lambda: states(box, 1) == ["running"] and 1 in asked.futures)
    one = box.ledger.instances(1)[0]
    path = path_of(box.settings.spool_directory, one.digest)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"?")
    asked.fail(1)
    wait_until(engine, lambda: states(box, 1) == ["failed"])
    assert box.store(one.header, content) == "duplicate"
    wait_until(engine, lambda: states(box, 1) == ["running"] and 1 in asked.futures)
    asked.close()
    engine.close()
    box.ledger.close()


def test_what_cannot_be_brought_to_an_end_does_not_slow_down_the_others_for_ever(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.settings.run_directory.mkdir(exist_ok=True)
    box.settings = box.settings.model_copy(update={"budget": Budget(analysis_seconds=3600)})
    bring(box, 1)
    box.ledger.close_association(box.association, "released")
    engine, asked = busy_engine(box)
    wait_until(engine, lambda: states(box, 1) == ["running"])
    for hours, hurried in ((0.5, True), (2.5, False)):
        with box.ledger._write() as connection:
            connection.execute(t.study.update().values(completed_at=later(-3600 * hours)))
        wait_until(engine, lambda: engine._is_stat(1, "S") == hurried)  # noqa: B023
        assert states(box, 1) == ["running"]
    asked.close()
    engine.close()
    box.ledger.close()


def _die(*_: object, **__: object) -> None:
    raise RuntimeError("the engine dies here")
