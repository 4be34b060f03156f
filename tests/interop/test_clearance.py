"""What the board and the files of a package decide on a box that runs: who is analysed, and who hears of the others."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.uid import generate_uid

import triton_models

from .box import Box, running_box, study, wait_for

pytestmark = [pytest.mark.interop, pytest.mark.xdist_group("clearance")]

PACKAGE = "ich_reference"
SIGNED = ("--who", "Dr A", "--why", "a test")
LATER = str(date.today() + timedelta(days=30))


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """A box whose package is a copy of the shipped one; "desk" hears of refusals, "er" does not."""
    folder = tmp_path_factory.mktemp("clearance")
    shutil.copytree(Path(triton_models.__file__).parent / PACKAGE, folder / "models" / PACKAGE)
    with running_box(
        folder,
        also=[{"name": "desk", "receiving_application": "DESK", "refusals": True}],
        models={"repository": str(folder / "models")},
    ) as made:
        yield made


def decide(box: Box, *arguments: str) -> dict[str, Any]:
    """What `scanside models` recorded."""
    done = box.command("models", *arguments, *SIGNED, "--json")
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def renamed(files: list[Path], folder: Path, **values: str) -> tuple[str, list[Path]]:
    """The same images as a study of its own, with these attributes."""
    folder.mkdir()
    study_uid, series_uid, made = generate_uid(), generate_uid(), []
    for path in files:
        dataset = pydicom.dcmread(path)
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study_uid, series_uid
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        for keyword, value in values.items():
            setattr(dataset, keyword, value)
        dataset.save_as(folder / path.name)
        made.append(folder / path.name)
    return study_uid, made


def sent(box: Box, uid: str, files: list[Path]) -> dict[str, Any]:
    """Send a study, and wait until nothing more happens to it."""
    assert [result.error for result in box.send(files)] == [""] * len(files)
    return box.settled(uid)


def criterion(report: dict[str, Any], name: str) -> dict[str, Any]:
    (analysis,) = report["analyses"]
    (found,) = [one for one in analysis["admission"] if one["criterion"] == name]
    return dict(found)


def unmet(report: dict[str, Any]) -> list[str]:
    """The criteria that refused a study, of which nothing was analysed; what "desk" is told of it is no answer."""
    (analysis,) = report["analyses"]
    assert (analysis["state"], [one for one in report["verdicts"] if not one["result"]["withdrawn"]]) == ("refused", [])
    assert {one["object"].split(".")[0] for one in report["findings"]} <= {"refusal"}
    return [one["criterion"] for one in analysis["admission"] if one["outcome"] not in ("met", "excepted")]


def heard(box: Box, uid: str) -> dict[str, list[str]]:
    """The messages on a study, by who they were for; the PACS heard of it only if it was analysed."""
    found: dict[str, list[str]] = {"er": [], "desk": []}
    for path in box.messages(uid):
        text = path.read_text(encoding="utf-8")
        found["desk" if text.split("|")[4] == "DESK" else "er"].append(text)
    return found


def numbers(box: Box, study: int, name: str) -> list[int]:
    """The numbers of a study's events of that name: the chain's order, which no clock decides."""
    with closing(sqlite3.connect(box.settings.ledger_path)) as raw:
        query = "select id from event where study_id = ? and name = ?"
        return [row[0] for row in raw.execute(query, (study, name))]


def test_a_suspension_stops_the_next_study_and_an_approval_lets_it_run_again(box: Box, tmp_path: Path) -> None:
    uid, files = study(tmp_path, "intraparenchymal", "BOARD1")
    report = sent(box, uid, files)
    assert report["verdicts"][-1]["positive"]
    assert criterion(report, "approval")["value"] == "none is needed: it is only evaluated"
    assert [len(found) for found in heard(box, uid).values()] == [1, 1]

    stop = decide(box, "suspend", PACKAGE)["record"]
    uid, files = renamed(files, tmp_path / "second")
    report = sent(box, uid, files)
    assert unmet(report) == ["approval"]
    assert criterion(report, "approval")["value"] == f"suspended by Dr A: a test (record {stop})"
    assert heard(box, uid) == {"er": [], "desk": []}, "the box itself is why: nobody is told, whoever wants to hear"
    assert box.hospital.pacs.holds(uid) == []
    assert report["deliveries"] == []
    # From the suspension on, nothing of the package was begun.
    begun = {"study.admitted", "analysis.started", "verdict.issued"}
    assert not begun & {one["name"] for one in report["events"]}
    (refused,) = numbers(box, report["id"], "study.refused")
    assert refused > stop

    record = decide(box, "approve", PACKAGE, "--mode", "evaluation", "--until", LATER)["record"]
    uid, files = renamed(files, tmp_path / "third")
    report = sent(box, uid, files)
    said = f"approved by Dr A as evaluation until {LATER} (record {record})"
    assert (report["verdicts"][-1]["positive"], criterion(report, "approval")["value"]) == (True, said)
    assert [len(found) for found in heard(box, uid).values()] == [1, 1]
    assert "Evaluation only" in heard(box, uid)["er"][0]
    history = json.loads(box.command("models", "history", PACKAGE, "--json").stdout)
    assert [(one["record"], one["what"], one["holds"]) for one in history] == [
        (stop, "suspended", False),
        (record, "approved", True),
    ]


def test_a_weight_file_that_drifts_stops_its_package(box: Box, tmp_path: Path) -> None:
    _, files = study(tmp_path, "intraparenchymal", "DRIFT1")
    weights = box.settings.model_repository / PACKAGE / "model.onnx"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))

    def events(name: str) -> bool | None:
        return True if f'event="{name}"' in box.command("metrics").stdout else None

    wait_for(lambda: events("package.drifted"), 30.0, lambda: f"nobody noticed\n{box.process.tail(30)}")
    uid, sent_files = renamed(files, tmp_path / "drifted")
    report = sent(box, uid, sent_files)
    assert unmet(report) == ["integrity"]
    assert f"{weights}: its digest is" in criterion(report, "integrity")["value"]
    assert heard(box, uid) == {"er": [], "desk": []}
    assert box.hospital.pacs.holds(uid) == []
    assert str(weights) in box.command("study", uid, "--json").stdout
    weights.write_bytes(sound)
    wait_for(lambda: events("package.restored"), 30.0, lambda: f"nobody noticed\n{box.process.tail(30)}")
    uid, sent_files = renamed(files, tmp_path / "mended")
    assert sent(box, uid, sent_files)["verdicts"][-1]["positive"]


def test_only_who_wants_to_hear_of_a_child_does(box: Box, tmp_path: Path) -> None:
    _, files = study(tmp_path, "intraparenchymal", "CHILD1")
    uid, files = renamed(files, tmp_path / "child", PatientAge="009Y", PatientBirthDate="")
    report = sent(box, uid, files)
    assert unmet(report) == ["age"]
    told = heard(box, uid)
    assert (len(told["er"]), len(told["desk"])) == (0, 1)
    assert "not analysed: paediatric (age 009Y; label: 18 years or older)" in told["desk"][0]
    assert box.hospital.pacs.holds(uid) == []


def test_a_real_head_of_unknown_age_passes_under_an_exception_of_the_board(
    box: Box, tmp_path: Path, ge_head: Path
) -> None:
    files = sorted(ge_head.glob("*.dcm"))
    uid = str(pydicom.dcmread(files[0], stop_before_pixels=True).StudyInstanceUID)
    report = sent(box, uid, files)
    assert unmet(report) == ["age"]
    assert criterion(report, "age")["outcome"] == "unknown"
    told = heard(box, uid)
    assert (len(told["er"]), len(told["desk"]), "not analysed: age not known" in told["desk"][0]) == (0, 1, True)
    assert box.hospital.pacs.holds(uid) == []
    record = decide(box, "except", PACKAGE, "age", "--until", LATER)["record"]
    uid, files = renamed(files, tmp_path / "again")
    report = sent(box, uid, files)
    said = criterion(report, "age")
    assert (said["outcome"], said["note"]) == ("excepted", f"excepted by Dr A until {LATER}: a test (record {record})")
    assert len(report["verdicts"]) == 1
    assert box.hospital.pacs.holds(uid) != []
    decide(box, "revoke", str(record))
    uid, files = renamed(files, tmp_path / "and_again")
    assert unmet(sent(box, uid, files)) == ["age"]


def test_the_chain_of_all_that_is_whole(box: Box) -> None:
    done = box.command("audit", "verify", "--json")
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["ok"], answer["fault"]) == (0, True, None)
    assert answer["noted"], "the engine noted a head"
