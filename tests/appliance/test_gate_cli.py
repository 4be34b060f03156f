"""`scanside gate`: a folder judged without a box, and what a box says of its scanners."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import generate_uid
from typer.testing import CliRunner, Result

from appliance import init
from appliance.cli import app
from appliance.governance.board import make_exception, suspend
from appliance.governance.indication import BoardException, admit
from appliance.governance.package import Package, load_configured
from appliance.ledger.selftest import SELFTEST_AE
from appliance.ledger.store import Ledger, NewInstance
from appliance.services.dry_run import judge, read_folder
from appliance.settings import Settings, load_settings
from appliance.study.grouping import group
from appliance.study.selection import select
from dicom_io.header import Header
from dicom_io.volume import assemble, planes_of
from tests.appliance.governance.test_indication import label
from tests.builders import head_series
from triton_models.training import phantom
from triton_models.training.vendors import VENDORS

(PACKAGE,) = load_configured(Settings())


def run(config: Path, *arguments: str | Path) -> Result:
    return CliRunner().invoke(
        app, ["--config", str(config), "gate", *map(str, arguments)], env={"COLUMNS": "200", "TERM": "dumb"}
    )


pytestmark = pytest.mark.slow  # a folder of studies, simulated once


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return init.write(tmp_path / "box", {})


@pytest.fixture(scope="module")
def vendors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """A small study of a man of 20 by each maker's scanner."""
    folder = tmp_path_factory.mktemp("vendors")
    return {
        name: phantom.write_study(phantom.simulate(3, size=64, age=20, vendor=name), folder / (name or "plain"))
        for name in VENDORS
    }


def headers_of(files: list[Path]) -> list[Header]:
    (study,) = read_folder(files).studies.values()
    return [header for _, header in study.values()]


@pytest.mark.parametrize("name", VENDORS)
@pytest.mark.parametrize(
    "of", ["adult_18", "adult_22", "not_on_one_maker", "kvp_100_140", "thin_to_5mm", "not_isolated_subarachnoid"]
)
@pytest.mark.slow
def test_real_labels_on_the_scanners_of_every_maker(vendors: dict[str, list[Path]], name: str, of: str) -> None:
    selection = select(group(headers_of(vendors[name])))
    assert selection.series is not None
    assert selection.volume is not None
    found = admit(label(of), selection.series.headers, selection.volume, 30)
    wrong = {one.criterion for one in found.criteria if not one.met}
    assert wrong == (
        {"age"} if of == "adult_22" else {"scanner"} if (of, name) == ("not_on_one_maker", "ge") else set()
    )
    (who,) = [one.value for one in found.criteria if one.criterion == "scanner"]
    assert who.startswith(VENDORS[name].manufacturer)


def test_a_real_study_without_an_age_is_refused_and_admitted_under_an_exception(ge_head: Path) -> None:
    (study,) = read_folder(sorted(ge_head.glob("*.dcm"))).studies.values()
    ((_, refused),) = judge([PACKAGE], study)
    assert [one.criterion for one in refused.criteria if not one.met] == ["age", "brain"]
    assert [one.outcome for one in refused.criteria if one.criterion == "age"] == ["unknown"]
    signed = BoardException(PACKAGE.name, "age", "an old archive", "Dr A", date.today() + timedelta(1))
    ((_, admitted),) = judge([PACKAGE], study, lambda package: [signed] if package is PACKAGE else [])
    assert admitted.admitted
    (brain,) = [one for one in admitted.criteria if one.criterion == "brain"]
    assert 400 < float(brain.value.removesuffix(" mL")) < 2500


def test_a_study_of_unknown_age_is_admitted_under_an_exception(vendors: dict[str, list[Path]]) -> None:
    (study,) = read_folder(vendors["canon"]).studies.values()
    nobody_knows = {
        uid: (path, replace(header, patient_age="", patient_birth_date="")) for uid, (path, header) in study.items()
    }
    signed = BoardException(PACKAGE.name, "age", "an old archive", "Dr A", date.today())
    ((_, refused),) = judge([PACKAGE], nobody_knows)
    ((_, admitted),) = judge([PACKAGE], nobody_knows, lambda _: [signed])
    assert (refused.admitted, admitted.admitted) == (False, True)


def test_a_study_without_a_series_to_analyse_is_refused_with_its_scanner(vendors: dict[str, list[Path]]) -> None:
    (study,) = read_folder(vendors["ge"]).studies.values()
    few = dict(list(study.items())[:3])
    ((_, found),) = judge([PACKAGE], few)
    assert [(one.criterion, one.met) for one in found.criteria] == [("scanner", True), ("series", False)]
    assert found.criteria[0].value.startswith("GE MEDICAL SYSTEMS")
    assert "only 3 slices" in found.reason


def test_what_the_pixels_show_refuses_too(philips_phantom: Path, tmp_path: Path) -> None:
    """The hollow skull, made old enough."""
    for path in philips_phantom.glob("S*/I*"):
        dataset = dcmread(path, force=True)
        if dataset.get("SeriesNumber") == 201:
            dataset.PatientAge = "050Y"
            dataset.save_as(tmp_path / path.name)
    (study,) = read_folder(sorted(tmp_path.iterdir())).studies.values()
    ((_, found),) = judge([PACKAGE], study)
    assert [one.criterion for one in found.criteria if not one.met] == ["brain"]
    cut = next(iter(study.values()))[0]
    cut.write_bytes(cut.read_bytes()[:-1000])
    ((_, found),) = judge([PACKAGE], study)
    assert found.criteria[-1].outcome == "unknown"
    assert "not decoded" in found.criteria[-1].value


def test_a_head_that_the_model_would_not_see_all_of_is_refused(vendors: dict[str, list[Path]], tmp_path: Path) -> None:
    """The head in the corner of an image three quarters as large again."""
    for path in vendors["ge"]:
        dataset = dcmread(path)
        pixels = dataset.pixel_array
        wide = np.full([n + 3 * n // 4 for n in pixels.shape], pixels.min(), pixels.dtype)
        wide[: pixels.shape[0], : pixels.shape[1]] = pixels
        dataset.Rows, dataset.Columns = wide.shape
        dataset.PixelData = wide.tobytes()
        dataset.save_as(tmp_path / path.name)
    (study,) = read_folder(sorted(tmp_path.iterdir())).studies.values()
    ((_, found),) = judge([PACKAGE], study)
    assert [one.criterion for one in found.criteria if not one.met] == ["brain"]
    assert "outside the model's field" in found.reason


def test_a_folder_is_judged_as_a_list_of_studies_and_packages(
    config: Path, vendors: dict[str, list[Path]], tmp_path: Path
) -> None:
    folder = tmp_path / "cd"
    shutil.copytree(vendors["siemens"][0].parent, folder / "a" / "b")
    shutil.copytree(vendors["philips"][0].parent, folder / "c")
    (folder / "readme.txt").write_text("not DICOM")
    for path in (folder / "c").glob("*.dcm"):
        dataset = dcmread(path)
        dataset.PatientBirthDate, dataset.PatientAge = "", "009Y"
        dataset.save_as(path)
    result = run(config, "test", folder, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert [set(one) for one in told] == [{"study", "package", "decision", "criteria"}] * 2
    assert sorted(one["decision"] for one in told) == ["admitted", "refused"]
    for one in told:
        assert one["package"] == "ich_reference"
        assert all(
            list(criterion) == ["criterion", "attribute", "value", "rule", "clause", "met"]
            for criterion in one["criteria"]
        )
        assert (one["decision"] == "admitted") == all(criterion["met"] for criterion in one["criteria"])
    (admitted,) = [one for one in told if one["decision"] == "admitted"]
    (brain,) = [c["value"] for c in admitted["criteria"] if c["criterion"] == "brain"]
    assert float(brain.removesuffix(" mL")) > 400
    (refused,) = [one for one in told if one["decision"] == "refused"]
    assert {c["criterion"]: c["value"] for c in refused["criteria"] if not c["met"]} == {
        "age": "009Y", "brain": "not judged: it is refused without",
    }  # fmt: skip
    shown = run(config, "test", folder).stdout
    for words in ("admitted", "refused", "009Y", "18 years or older", PACKAGE.indication.clauses["age"]):
        assert set(words.split()) <= set(shown.split())  # a narrow console folds a cell


def test_what_the_board_decided_counts_in_a_dry_run(config: Path, ge_head: Path) -> None:
    settings = load_settings(config)
    ledger = Ledger(settings.ledger_path)
    tomorrow = date.today() + timedelta(1)
    evidence = settings.box.state_directory / "evidence"
    make_exception(ledger, evidence, PACKAGE, "age", who="Dr A", why="an old archive", until=tomorrow)

    def told() -> tuple[str, dict[str, bool]]:
        (one,) = json.loads(run(config, "test", ge_head, "--json").stdout)
        return one["decision"], {criterion["criterion"]: criterion["met"] for criterion in one["criteria"]}

    decision, met = told()
    assert (decision, met["age"], met["approval"]) == ("admitted", True, True)
    suspend(ledger, evidence, PACKAGE.name, PACKAGE, who="Dr A", why="a doubt")
    decision, met = told()
    assert (decision, met["age"], met["approval"]) == ("refused", True, False)
    ledger.close()


# --- what each maker's scanners send, within the label and outside it ------------------------------------


def nine_years_old(dataset: Dataset) -> None:
    """As the maker says it: by the age, by the birth date, or by both."""
    if "PatientAge" in dataset:
        dataset.PatientAge = "009Y"
    if dataset.get("PatientBirthDate"):
        dataset.PatientBirthDate = f"{int(dataset.StudyDate[:4]) - 9}0101"


def nameless(dataset: Dataset) -> None:
    dataset.Manufacturer = ""


CASES: dict[str, tuple[Callable[[Dataset], object], str]] = {
    "an adult's plain head": (lambda dataset: None, ""),
    "a child": (nine_years_old, "age"),
    "an agent": (lambda dataset: setattr(dataset, "ContrastBolusAgent", "OMNIPAQUE 350"), "contrast"),
    "an agent, said in the description only": (
        lambda dataset: setattr(dataset, "SeriesDescription", f"{dataset.SeriesDescription} +C"), "contrast",
    ),
    "too low a voltage": (lambda dataset: setattr(dataset, "KVP", "99.9"), "kvp"),
    "too high a voltage": (lambda dataset: setattr(dataset, "KVP", "140.1"), "kvp"),
    "no voltage": (lambda dataset: delattr(dataset, "KVP"), "kvp"),
    "too thick a slice": (lambda dataset: setattr(dataset, "SliceThickness", "5.1"), "slice_thickness"),
    "another region": (lambda dataset: setattr(dataset, "SeriesDescription", "ROUTINE NECK"), "series"),
    "an excluded maker": (lambda dataset: setattr(dataset, "Manufacturer", "Hitachi Medical"), "scanner"),
    "no maker": (nameless, "scanner"),
}  # fmt: skip


@pytest.mark.slow
def test_what_each_makers_scanners_send_within_the_label_and_outside(
    config: Path, vendors: dict[str, list[Path]], tmp_path: Path
) -> None:
    with config.open("a") as file:
        file.write(
            '\n[[limit]]\npackage = "ich_reference"\nkvp = [100.0, 140.0]\nslice_thickness_mm = [0.625, 5.0]\n'
            'excluded_scanners = ["HITACHI MEDICAL"]\n'
        )
    expected: dict[str, tuple[str, str, str]] = {}
    for vendor, files in vendors.items():
        for case, (change, criterion) in CASES.items():
            uid, series = generate_uid(), generate_uid()
            expected[uid] = (vendor, case, criterion)
            for path in files:
                dataset = dcmread(path)
                dataset.StudyInstanceUID, dataset.SeriesInstanceUID = uid, series
                dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
                change(dataset)
                dataset.save_as(tmp_path / f"{dataset.SOPInstanceUID}.dcm")
    result = run(config, "test", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    told = {
        one["study"]: (
            one["decision"],
            {c["criterion"] for c in one["criteria"] if not c["met"]} - {"brain"},
            {c["criterion"]: c["met"] for c in one["criteria"]}.get("brain", False),
        )
        for one in json.loads(result.stdout)
    }
    for study, (vendor, case, criterion) in expected.items():
        wanted = ("refused", {criterion}, False) if criterion else ("admitted", set(), True)
        assert told[study] == wanted, (vendor, case)
    (package,) = load_configured(load_settings(config))
    folder = read_folder(sorted(tmp_path.glob("*.dcm")))
    for study, members in folder.studies.items():
        ((_, found),) = judge([package], members)
        wrong = {one.criterion for one in found.criteria if not one.met} - {"brain"}
        assert (found.admitted, wrong) == (told[study][0] == "admitted", told[study][1]), expected[study]
    assert set(told) == set(folder.studies) == set(expected)


def test_a_folder_without_dicom_is_an_error(config: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert run(config, "test", tmp_path / "empty").exit_code == 1
    assert run(config, "test", tmp_path / "nowhere").exit_code == 2


# --- report ---------------------------------------------------------------------------------------------


def decided(ledger: Ledger, number: int, package: Package, *, caller: str = "S", **changes: Any) -> None:
    """A study that a box received, completed and decided on."""
    series = [replace(one, **changes) for one in head_series(study=f"1.{number}", series=f"1.{number}.1")]
    association = ledger.open_association(caller, "B", "127.0.0.1")
    ledger.record_instances([NewInstance(one, f"{number}-{place}", 9, association) for place, one in enumerate(series)])
    ledger.close_association(association, "released")
    (arriving,) = ledger.arriving_studies()
    ledger.complete_study(arriving.id, arriving.last_instance_at, {"by": "test", "confidence": "high"})
    found = admit(package, series, assemble([one for member in series for one in planes_of(member)]), 30)
    ledger.decide(
        arriving.id, package.name, package.version, admitted=found.admitted, reason=found.reason,
        admission=found.to_json(), selection=[], inputs=[],
    )  # fmt: skip


def test_the_report_counts_by_scanner_and_warns_of_one_that_is_always_refused(config: Path) -> None:
    ledger = Ledger(load_settings(config).ledger_path)
    good = {"manufacturer": "SIEMENS", "manufacturer_model_name": "SOMATOM Force", "station_name": "CT1"}
    bad = {"manufacturer": "GE MEDICAL SYSTEMS", "manufacturer_model_name": "Revolution EVO", "station_name": "CT2"}
    decided(ledger, 1, PACKAGE, **good)
    decided(ledger, 2, PACKAGE, **good, patient_age="009Y", patient_birth_date="")
    decided(ledger, 3, PACKAGE, **bad, kvp=None)
    decided(ledger, 4, PACKAGE, **bad, kvp=None, patient_age="", patient_birth_date="")
    ledger.close()
    today = date.today()
    told = json.loads(run(config, "report", "--from", str(today - timedelta(1)), "--json").stdout)
    one, two = told["scanners"]
    assert (one["scanner"], one["package"]) == ("GE MEDICAL SYSTEMS · Revolution EVO · CT2", "ich_reference")
    assert (one["admitted"], one["refused"], one["every_study_refused"]) == (0, 2, True)
    assert [(why["criterion"], why["studies"]) for why in one["reasons"]] == [("kvp", 2), ("age", 1)]
    assert (two["admitted"], two["refused"], two["every_study_refused"]) == (1, 1, False)
    assert "009Y" in two["reasons"][0]["example"]
    shown = run(config, "report").stdout
    assert "warning: every study of GE MEDICAL SYSTEMS · Revolution EVO · CT2 was refused" in shown
    assert "every study of SIEMENS" not in shown
    tomorrow = str(today + timedelta(1))
    later = json.loads(run(config, "report", "--from", tomorrow, "--to", tomorrow, "--json").stdout)
    assert later["scanners"] == []
    before = json.loads(run(config, "report", "--to", str(today - timedelta(2)), "--json").stdout)
    assert before["scanners"] == []
    assert run(config, "report", "--from", "2026-02-01", "--to", "2026-01-01").exit_code == 2
    study = (
        CliRunner().invoke(app, ["--config", str(config), "study", "4"], env={"COLUMNS": "200", "TERM": "dumb"}).stdout
    )
    for words in ("absent", "80 to 140 kV", PACKAGE.indication.clauses["kvp"]):
        assert set(words.split()) <= set(study.split())
    assert "PatientAge" in study


def test_the_report_leaves_the_studies_of_self_tests_out(config: Path) -> None:
    ledger = Ledger(load_settings(config).ledger_path)
    decided(ledger, 1, PACKAGE, manufacturer="SIEMENS", kvp=None)
    ledger.begin_selftest("1.2", expected=True, alert_port=1, object_port=2)
    decided(ledger, 2, PACKAGE, manufacturer="SIEMENS", caller=SELFTEST_AE)
    assert ledger.selftest(2) is not None
    ledger.close()
    (one,) = json.loads(run(config, "report", "--json").stdout)["scanners"]
    assert (one["admitted"], one["refused"], one["every_study_refused"]) == (0, 1, True)


def test_without_a_ledger_there_is_no_report(config: Path) -> None:
    assert run(config, "report").exit_code == 1


def test_a_dry_run_trusts_the_records_no_more_than_the_box_does(config: Path, ge_head: Path) -> None:
    settings = load_settings(config)
    ledger = Ledger(settings.ledger_path)
    tomorrow = date.today() + timedelta(1)
    make_exception(ledger, settings.evidence_directory, PACKAGE, "age", who="Dr A", why="an archive", until=tomorrow)
    ledger.close()
    with sqlite3.connect(settings.ledger_path) as raw:
        raw.execute("update event set detail = replace(detail, 'Dr A', 'Dr B') where name = 'board.excepted'")
    (one,) = json.loads(run(config, "test", ge_head, "--json").stdout)
    wrong = {criterion["criterion"]: criterion["value"] for criterion in one["criteria"] if not criterion["met"]}
    assert (one["decision"], sorted(wrong)) == ("refused", ["age", "approval", "brain"])
    assert "not to be trusted" in wrong["approval"]


def test_a_package_that_is_broken_refuses_in_a_dry_run_as_it_does_in_the_box(
    config: Path, vendors: dict[str, list[Path]], tmp_path: Path
) -> None:
    shutil.copytree(PACKAGE.folder, tmp_path / "models" / PACKAGE.name)
    text = config.read_text("utf-8").replace("[models]", f'[models]\nrepository = "{tmp_path / "models"}"', 1)
    assert text != config.read_text("utf-8")
    config.write_text(text, "utf-8")
    weights = tmp_path / "models" / PACKAGE.name / "model.onnx"
    weights.write_bytes(weights.read_bytes()[:-1])
    folder = vendors["siemens"][0].parent
    (one,) = json.loads(run(config, "test", folder, "--json").stdout)
    (said,) = one["criteria"]
    assert (one["package"], one["decision"]) == (PACKAGE.name, "refused")
    assert (said["criterion"], said["met"], str(weights) in said["value"]) == ("integrity", False, True)
    assert f"by {PACKAGE.name}: refused" in run(config, "test", folder).stdout
