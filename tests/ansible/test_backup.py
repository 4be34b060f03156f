"""The backup of a box that works on: whole, nobody else's to read, and nothing left behind when it fails."""

from __future__ import annotations

import importlib.util
import os
import sqlite3
import tarfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType

import pytest

from tests.release_support import ROOT


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script, on a box in a folder; with the umask that a shell has."""
    spec = importlib.util.spec_from_file_location("backup", ROOT / "ansible/roles/appliance/files/backup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    state, config = tmp_path / "state", tmp_path / "config"
    for study in ("1", "2"):
        (state / "findings" / study).mkdir(parents=True)
        (state / "findings" / study / "report.dcm").write_bytes(b"report " + study.encode())
    (state / "evidence").mkdir()
    (state / "evidence" / "abc").write_bytes(b"minutes")
    (state / "ledger.head").write_text("head")
    config.mkdir()
    (config / "scanside.toml").write_text("[box]\n")
    with closing(sqlite3.connect(state / "ledger.sqlite")) as ledger:
        ledger.execute("CREATE TABLE event (id INTEGER)")
        ledger.commit()
    monkeypatch.setattr(module, "STATE", state)
    monkeypatch.setattr(module, "CONFIG", config)
    before = os.umask(0o022)
    yield module
    os.umask(before)


WHOLE = {
    "state/ledger.sqlite", "state/ledger.head", "state/evidence/abc", "state/findings/1/report.dcm",
    "state/findings/2/report.dcm", "config/scanside.toml",
}  # fmt: skip


def files(path: Path) -> set[str]:
    with tarfile.open(path) as tar:
        return {one.name for one in tar if one.isfile()}


def test_it_holds_all_and_is_nobody_elses_to_read(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int] = []
    add = tarfile.TarFile.add

    def watched(tar: tarfile.TarFile, *arguments: object, **named: object) -> None:
        modes.append(Path(str(tar.name)).stat().st_mode & 0o777)
        add(tar, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(tarfile.TarFile, "add", watched)
    script.main(tmp_path / "backup.tar.gz")
    assert files(tmp_path / "backup.tar.gz") == WHOLE
    assert set(modes) == {0o600}, "also while it is written"
    assert (tmp_path / "backup.tar.gz").stat().st_mode & 0o777 == 0o600
    assert {one.name for one in tmp_path.iterdir()} == {"state", "config", "backup.tar.gz"}


def test_findings_that_retention_removes_meanwhile_do_not_end_it(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = script.STATE / "findings" / "2" / "report.dcm"
    stat = tarfile.TarFile.gettarinfo

    def removing(tar: tarfile.TarFile, name: object = None, *arguments: object, **named: object) -> tarfile.TarInfo:
        told = stat(tar, name, *arguments, **named)  # type: ignore[arg-type]
        if name == gone:
            gone.unlink()
        return told

    monkeypatch.setattr(tarfile.TarFile, "gettarinfo", removing)
    script.main(tmp_path / "backup.tar.gz")
    assert files(tmp_path / "backup.tar.gz") == WHOLE - {"state/findings/2/report.dcm"}


def test_a_backup_that_fails_leaves_nothing(script: ModuleType, tmp_path: Path) -> None:
    (script.STATE / "ledger.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises((SystemExit, sqlite3.Error)):
        script.main(tmp_path / "backup.tar.gz")
    assert {one.name for one in tmp_path.iterdir()} == {"state", "config"}
    (script.STATE / "evidence" / "abc").unlink()
    (script.STATE / "evidence").rmdir()
    (script.STATE / "ledger.sqlite").unlink()
    with closing(sqlite3.connect(script.STATE / "ledger.sqlite")) as ledger:
        ledger.execute("CREATE TABLE event (id INTEGER)")
    (script.CONFIG / "scanside.toml").unlink()
    script.CONFIG.rmdir()
    with pytest.raises(FileNotFoundError):  # what is not a finding must be there
        script.main(tmp_path / "backup.tar.gz")
    assert {one.name for one in tmp_path.iterdir()} == {"state"}
