"""`scanside models`: what it says of good and bad packages, and its exit codes."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import stat
import tomllib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

import triton_models
from appliance.cli import app
from appliance.demo.orthanc import free_ports
from appliance.governance.package import Package
from appliance.inference.triton import Output, TritonClient

SHIPPED = Path(triton_models.__file__).parent
STATED = tomllib.loads((SHIPPED / "ich_reference" / "package.toml").read_text("utf-8"))
RUNNER = CliRunner()


def run(*arguments: str | Path) -> Result:
    return RUNNER.invoke(app, [str(one) for one in arguments])


def told(*arguments: str | Path, code: int = 0) -> dict[str, object]:
    result = run(*arguments, "--json")
    assert result.exit_code == code, result.output
    answer: dict[str, object] = json.loads(result.stdout)
    return answer


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of the shipped package as it is signed, and a second one that nobody signed."""
    folder = tmp_path / "packages"
    for name in ("ich_reference", "second"):
        shutil.copytree(SHIPPED / "ich_reference", folder / name, ignore=shutil.ignore_patterns("package.sig"))
        text = (SHIPPED / "ich_reference" / "package.toml").read_text("utf-8")
        (folder / name / "package.toml").write_text(text.replace('"ich_reference"', f'"{name}"'), "utf-8")
    shutil.copy(SHIPPED / "ich_reference" / "package.sig", folder / "ich_reference")
    (folder / "keys").mkdir()
    return folder


@pytest.fixture
def config(tmp_path: Path, repository: Path) -> Path:
    path = tmp_path / "scanside.toml"
    path.write_text('[models]\nrepository = "packages"\n')
    return path


def test_without_a_repository_of_its_own_a_box_has_the_shipped_package(tmp_path: Path) -> None:
    (tmp_path / "scanside.toml").write_text("")
    answer = told("--config", tmp_path / "scanside.toml", "models", "list")
    (one,) = answer["packages"]  # type: ignore[misc]
    assert (one["name"], one["ok"], one["runs"], one["clearance"]) == (
        "ich_reference",
        True,
        True,
        "none: research reference",
    )
    assert run("--config", tmp_path / "scanside.toml", "models", "verify").exit_code == 0


def test_list_tells_which_run_and_what_is_wrong(config: Path) -> None:
    answer = told("--config", config, "models", "list")
    good, bad = answer["packages"]  # type: ignore[misc]
    assert (good["name"], good["ok"], good["runs"], good["version"]) == ("ich_reference", True, True, STATED["version"])
    assert (bad["name"], bad["ok"], bad["runs"], bad["signed_by"]) == ("second", False, False, None)
    assert "second/package.sig: the package is not signed" in bad["problem"]
    table = run("--config", config, "models", "list")
    assert table.exit_code == 0
    assert good["signed_by"] in table.stdout
    assert "not signed" in table.stdout


def test_show(config: Path) -> None:
    shown = run("--config", config, "models", "show", "ich_reference")
    assert shown.exit_code == 0
    threshold = f"{STATED['operating_point']['threshold']:g}"
    for words in ("none: research reference", "not cleared", threshold, "18 years or older", "sha256:", "triage"):
        assert words in shown.stdout
    answer = told("--config", config, "models", "show", "ich_reference")
    figures = dict.fromkeys(("sensitivity", "specificity", "studies"))
    assert answer["operating_point"] == figures | STATED["operating_point"]
    assert answer["signed_by"]
    refused = run("--config", config, "models", "show", "second")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "second/package.sig: the package is not signed" in refused.stderr


@pytest.fixture
def published(config: Path, repository: Path) -> Path:
    """The configuration of a box whose one package has parity vectors, to which the model says 0.25, and figures."""
    folder = repository / "second"
    seen = STATED["preprocessing"]
    fields = np.zeros((2, seen["size"], seen["size"]), np.int16)
    answers, maps = np.full((2, 6), 0.25), np.full((2, 64, 64), 0.25)
    np.savez(folder / "parity.npz", fields=fields, probabilities=answers, lesion_map=maps)
    text = (folder / "package.toml").read_text("utf-8")
    text = re.sub(r'(?m)^(sensitivity|specificity|studies|\[parity\]|tolerance|"parity.npz").*\n', "", text)
    text = text.replace("lesion_threshold", "sensitivity = 0.96\nspecificity = 0.97\nstudies = 600\nlesion_threshold")
    digest = hashlib.sha256((folder / "parity.npz").read_bytes()).hexdigest()
    text = text.replace("[files]", f'[parity]\ntolerance = 0.01\n[files]\n"parity.npz" = "sha256:{digest}"')
    (folder / "package.toml").write_text(text, "utf-8")
    config.write_text(
        '[models]\nrepository = "packages"\nallow_unsigned = true\npackages = ["second"]\n'
        f"[triton]\ngrpc_port = {free_ports(1)[0]}\n"
    )
    return config


def test_show_says_what_was_measured(published: Path) -> None:
    shown = " ".join(run("--config", published, "models", "show", "second").stdout.split())
    assert "sensitivity 0.96 and specificity 0.97 of 600 studies" in shown


@pytest.mark.parametrize(("said", "code"), [(0.255, 0), (0.27, 1), (float("nan"), 1)])
def test_verify_asks_triton_for_what_was_published(
    published: Path, said: float, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is made up; test_parity.py asks a real one."""

    def infer(client: TritonClient, package: Package, slabs: NDArray[np.float32]) -> Output:
        return Output(np.full((len(slabs), 6), said, np.float32), np.full((len(slabs), 64, 64), said, np.float32))

    monkeypatch.setattr(TritonClient, "infer", infer)
    answer = told("--config", published, "models", "verify", "--parity", code=code)
    (one,) = answer["packages"]  # type: ignore[misc]
    assert (one["ok"], one["parity"]["holds"], one["parity"]["slabs"]) == (True, code == 0, 2)
    result = run("--config", published, "models", "verify", "--parity")
    assert result.exit_code == code
    assert ("not the model" in result.stdout) == bool(code)
    assert "0.01 is allowed" in result.stdout
    assert run("--config", published, "models", "verify").exit_code == 0


def test_verify_fails_where_there_is_nothing_to_ask_or_nobody(published: Path, repository: Path) -> None:
    nobody = run("--config", published, "models", "verify", "--parity")
    assert (nobody.exit_code, "cannot be reached" in nobody.stderr) == (1, True)
    text = (repository / "second" / "package.toml").read_text("utf-8")
    text = re.sub(r'(?m)^(\[parity\]|tolerance|"parity.npz").*\n', "", text)
    (repository / "second" / "package.toml").write_text(text, "utf-8")
    (repository / "second" / "parity.npz").unlink()
    nothing = run("--config", published, "models", "verify", "--parity")
    assert (nothing.exit_code, "no parity vectors" in nothing.stderr) == (1, True)


@pytest.mark.parametrize("file", ["package.toml", "model.onnx", "package.sig"])
def test_verify_names_what_was_changed(config: Path, repository: Path, file: str) -> None:
    assert run("--config", config, "models", "verify").exit_code == 0
    path = repository / "ich_reference" / file
    path.write_bytes(path.read_bytes() + b" ")
    named = "package.sig" if file == "package.toml" else file
    for arguments in ([], ["ich_reference"], [f"{repository}/ich_reference"]):
        answer = told("--config", config, "models", "verify", *arguments, code=1)
        (one,) = answer["packages"]  # type: ignore[misc]
        assert f"ich_reference/{named}: " in one["problem"]
        assert "failed" in run("--config", config, "models", "verify", *arguments).stdout


def test_a_bare_name_is_never_a_folder_here(config: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository / "ich_reference" / "package.sig").unlink()
    monkeypatch.chdir(SHIPPED)  # where a good package of that name lies
    assert run("--config", config, "models", "verify", "ich_reference").exit_code == 1
    assert run("--config", config, "models", "verify", "./ich_reference").exit_code == 0
    unknown = told("--config", config, "models", "verify", "third", code=1)
    assert "say ./third" in unknown["packages"][0]["problem"]  # type: ignore[index]


def test_a_site_signs_its_own_package(config: Path, repository: Path, tmp_path: Path) -> None:
    key = tmp_path / "site.pem"
    made = told("models", "keygen", "--out", key)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert made["public"] == str(tmp_path / "site.pub.pem")
    again = run("models", "keygen", "--out", key)
    assert (again.exit_code, "already" in again.stderr) == (1, True)
    signed = told("models", "sign", repository / "second", "--key", key)
    assert signed == {"name": "second", "version": STATED["version"], "signed_by": made["key"]}
    distrusted = run("--config", config, "models", "verify", "second")
    assert (distrusted.exit_code, "not trusted" in distrusted.stdout) == (1, True)
    config.write_text('[models]\nrepository = "packages"\ntrusted_keys = ["site.pub.pem"]\npackages = ["second"]\n')
    assert run("--config", config, "models", "verify").exit_code == 0
    shipped = run("--config", config, "models", "verify", "ich_reference")
    assert (shipped.exit_code, "not trusted" in shipped.stdout) == (1, True)


def test_what_is_wrong_is_not_signed(repository: Path, tmp_path: Path) -> None:
    run("models", "keygen", "--out", tmp_path / "key.pem")
    (repository / "second" / "stray.txt").write_text("")
    refused = run("models", "sign", repository / "second", "--key", tmp_path / "key.pem")
    assert refused.exit_code == 1
    assert "second/stray.txt: package.toml does not list it" in refused.stderr
    assert not (repository / "second" / "package.sig").exists()
    absent = run("models", "sign", repository / "ich_reference", "--key", tmp_path / "none.pem")
    assert (absent.exit_code, "none.pem" in absent.stderr) == (1, True)


def test_unsigned_where_it_is_allowed_is_said(config: Path) -> None:
    config.write_text('[models]\nrepository = "packages"\nallow_unsigned = true\npackages = ["second"]\n')
    result = run("--config", config, "models", "verify")
    assert (result.exit_code, "nobody" in result.stdout) == (0, True)
    assert "nobody" in run("--config", config, "models", "show", "second").stdout


def test_packages_that_cannot_run_together_fail(config: Path) -> None:
    config.write_text('[models]\nrepository = "packages"\npackages = ["ich_reference", "ich_reference"]\n')
    result = run("--config", config, "models", "verify")
    assert (result.exit_code, "another package's" in result.stdout) == (1, True)


def test_a_wrong_configuration_is_told_from_a_wrong_package(config: Path, repository: Path) -> None:
    config.write_text('[models]\nrepository = "packages"\ntrusted_keys = ["packages/second/model.onnx"]\n')
    for command in ("list", "verify"):
        result = run("--config", config, "models", command)
        assert result.exit_code == 2
        assert "models.trusted_keys" in result.stderr
        assert str(repository / "second" / "model.onnx") in result.stderr
    config.write_text("[models]\nallow_unsinged = true\n")
    assert run("--config", config, "models", "list").exit_code == 2


@pytest.mark.parametrize(("allowed", "ok", "says"), [("true", True, "unsigned)"), ("false", False, "not signed")])
def test_check_says_that_a_package_is_unsigned(config: Path, allowed: str, ok: bool, says: str) -> None:
    one, two, three, four = free_ports(4)
    config.write_text(
        f'[box]\nstate_directory = "state"\n[intake]\nport = {one}\n'
        f"[triton]\ngrpc_port = {two}\nhttp_port = {three}\nmetrics_port = {four}\n"
        f'[models]\nrepository = "packages"\nallow_unsigned = {allowed}\npackages = ["second"]\n'
    )
    checks = told("--config", config, "check", code=1)["checks"]  # nothing runs, so the others fail
    (models,) = [check for check in checks if check["check"] == "models"]  # type: ignore[attr-defined]
    assert models["ok"] is ok
    assert says in models["detail"]
