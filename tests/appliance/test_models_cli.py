"""`scanside models`: what it says of good and bad packages, and its exit codes."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import triton_models
from appliance.cli import app
from appliance.demo.orthanc import free_ports

SHIPPED = Path(triton_models.__file__).parent
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
        (folder / name).mkdir(parents=True)
        shutil.copy(SHIPPED / "ich_reference" / "model.onnx", folder / name)
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
    assert (good["name"], good["ok"], good["runs"], good["version"]) == ("ich_reference", True, True, "0.1.0")
    assert (bad["name"], bad["ok"], bad["runs"], bad["signed_by"]) == ("second", False, False, None)
    assert "second/package.sig: the package is not signed" in bad["problem"]
    table = run("--config", config, "models", "list")
    assert table.exit_code == 0
    assert good["signed_by"] in table.stdout
    assert "not signed" in table.stdout


def test_show(config: Path) -> None:
    shown = run("--config", config, "models", "show", "ich_reference")
    assert shown.exit_code == 0
    for words in ("none: research reference", "not cleared", "0.757", "age from 18 years", "sha256:", "triage"):
        assert words in shown.stdout
    answer = told("--config", config, "models", "show", "ich_reference")
    assert answer["operating_point"] == {"threshold": 0.757, "lesion_threshold": 0.5}
    assert answer["signed_by"]
    refused = run("--config", config, "models", "show", "second")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "second/package.sig: the package is not signed" in refused.stderr


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
    assert signed == {"name": "second", "version": "0.1.0", "signed_by": made["key"]}
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
