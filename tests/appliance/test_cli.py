"""The command: clear errors, exit codes that mean something, JSON for machines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest
from typer.testing import CliRunner, Result

from appliance.cli import app
from appliance.demo.orthanc import free_port
from appliance.ledger.store import Ledger, NewInstance
from appliance.settings import DicomDestination, DicomwebDestination, load_settings
from tests.builders import head_series
from tests.dicom_io.support import Recorder, serving

RUNNER = CliRunner()


def run(*arguments: str | Path) -> Result:
    return RUNNER.invoke(app, [str(one) for one in arguments])


@pytest.fixture
def node() -> Iterator[tuple[str, Recorder]]:
    recorder = Recorder()
    with serving(recorder) as server:
        yield f"NODE@127.0.0.1:{server.port}", recorder


def test_help_names_every_command() -> None:
    text = run("--help").stdout
    names = "init check run intake engine deliver triton echo"
    names += " send phantom studies study retry accounting models metrics demo"
    for command in names.split():
        assert command in text
    assert run("--version").stdout.startswith("scanside ")


def test_init_sets_up_each_kind_of_archive(tmp_path: Path) -> None:
    archives = (
        "--pacs",
        "PACS@10.0.0.5:104",
        "--orthanc",
        "ORTHANC@10.0.0.6:4242",
        "--dicomweb",
        "https://archive/web",
    )
    made = run("init", tmp_path / "box", *archives)
    assert made.exit_code == 0, made.output
    pacs, orthanc, archive = load_settings(tmp_path / "box" / "scanside.toml").destination
    assert isinstance(pacs, DicomDestination) and isinstance(orthanc, DicomDestination)
    assert (pacs.objects, pacs.commitment) == (["report", "capture"], "if_offered")
    assert (orthanc.ae_title, orthanc.port, orthanc.commitment) == ("ORTHANC", 4242, "required")
    assert isinstance(archive, DicomwebDestination) and archive.url == "https://archive/web"
    assert orthanc.transfer_syntaxes == ["JPEG2000Lossless", "ExplicitVRLittleEndian"]
    assert pacs.transfer_syntaxes == archive.transfer_syntaxes == ["ExplicitVRLittleEndian"]
    assert orthanc.objects == archive.objects == ["report", "capture", "segmentation", "presentation", "selection"]


def test_init_then_studies(tmp_path: Path) -> None:
    made = run("init", tmp_path / "box", "--pacs", "PACS@127.0.0.1:104", "--hl7", "127.0.0.1:2575")
    assert made.exit_code == 0
    config = tmp_path / "box" / "scanside.toml"
    again = run("init", tmp_path / "box")
    assert (again.exit_code, "already" in again.stderr) == (2, True)
    before = run("--config", config, "studies")
    assert (before.exit_code, "no ledger yet" in before.stderr) == (1, True)
    ledger = Ledger(tmp_path / "box" / "ledger.sqlite")
    assert run("--config", config, "studies").stdout.strip() == "no study yet"
    association = ledger.open_association("S", "B", "127.0.0.1")
    for one in head_series(3):
        ledger.record_instances([NewInstance(one, one.sop_instance_uid, 1, association)])
    listed = json.loads(run("--config", config, "studies", "--json").stdout)
    assert [(one["study"], one["state"], one["instances"]) for one in listed] == [(1, "receiving", 3)]
    assert json.loads(run("--config", config, "study", "1", "--json").stdout)["study_instance_uid"] == "1.2.3"
    assert "1.2.3" in run("--config", config, "study", "1.2.3").stdout
    lost = run("--config", config, "accounting")  # rows without files
    assert (lost.exit_code, "NOT balanced" in lost.stdout) == (1, True)
    assert run("--config", config, "accounting", "--day", "2020-01-01").exit_code == 0
    assert run("--config", config, "accounting", "--day", "yesterday").exit_code == 2
    ledger.close()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["init", "x", "--pacs", "nonsense"], 2, "AE@host:port"),
        (["init", "x", "--hl7", "nonsense"], 2, "host:port"),
        (["--config", "absent.toml", "check"], 2, "no configuration file"),
        (["phantom", "--out", "x", "--bleed", "nosebleed"], 2, "nosebleed"),
        (["send", "absent", "--to", "A@127.0.0.1:1"], 2, "absent"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_a_mistake_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == code
    assert said in result.stderr
    assert "Traceback" not in result.output


def test_echo(node: tuple[str, Recorder]) -> None:
    assert run("echo", node[0]).exit_code == 0
    nobody = run("echo", f"NODE@127.0.0.1:{free_port()}")
    assert nobody.exit_code == 1
    assert "127.0.0.1" in nobody.stderr


@pytest.mark.slow
def test_a_phantom_is_written_and_sent(tmp_path: Path, node: tuple[str, Recorder]) -> None:
    target, recorder = node
    made = run("phantom", "--out", tmp_path, "--bleed", "subdural", "--seed", "3", "--thickness", "8", "--json")
    assert made.exit_code == 0
    told = json.loads(made.stdout)
    assert told["volume_ml"]["subdural"] > 0
    (tmp_path / "readme.txt").write_text("not DICOM")
    sent = run("send", tmp_path, "--to", target, "--json")
    assert sent.exit_code == 0
    answer = json.loads(sent.stdout)
    assert answer["sent"] == told["instances"] == len(recorder.received)
    assert any(one["path"].endswith("readme.txt") for one in answer["skipped"])
    dataset = pydicom.dcmread(pydicom.filebase.DicomBytesIO(recorder.received[0].part10))
    assert dataset.Modality == "CT"
    recorder.status = 0xA700
    refused = run("send", tmp_path, "--to", target)
    assert refused.exit_code == 1
    assert "0 stored" in refused.stdout


def test_a_folder_without_dicom_is_said(tmp_path: Path) -> None:
    result = run("send", tmp_path, "--to", "A@127.0.0.1:1")
    assert (result.exit_code, "no DICOM instance" in result.stderr) == (1, True)


def test_a_state_folder_that_cannot_be_used_is_named_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    config = tmp_path / "scanside.toml"
    config.write_text('[box]\nstate_directory = "taken"\n')
    for service in ("intake", "deliver", "engine"):
        result = run("--config", config, service)
        assert result.exit_code == 2
        assert "box.state_directory" in result.stderr
