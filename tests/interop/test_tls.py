"""DCMTK's tools against a running intake over TLS, with and without client certificates.

dcmsend 3.6.7 has no TLS: storescu plays the scanner.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom
import pytest

from appliance import init
from appliance.demo.orthanc import LOOPBACK, free_ports
from appliance.ledger.store import Ledger
from appliance.ledger.views import event_counts
from appliance.operations.leash import Leashed
from appliance.settings import Settings, load_settings
from tests.dicom_io.certificates import Authority, Pair
from tests.interop.box import ROOT, wait_for
from triton_models.training.phantom import simulate, write_study

pytestmark = pytest.mark.interop

Options = list[str]


@dataclass(frozen=True, slots=True)
class Intake:
    """A running intake, its certificates, and what it wrote down."""

    settings: Settings
    port: int
    authority: Authority
    pair: Pair
    process: Leashed

    def tool(
        self, name: str, options: Options, *files: Path, port: int | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run one of DCMTK's tools against the port with TLS, or another one."""
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")
        address = ["-aec", self.settings.intake.ae_title, LOOPBACK, str(port or self.port)]
        return subprocess.run([name, *options, *address, *map(str, files)], capture_output=True, text=True, timeout=60)

    def trusting(self, client: Pair | None = None) -> Options:
        """The options of a client that knows our authority, with or without a certificate of its own."""
        shown = ["+tls", str(client.key), str(client.certificate)] if client else ["+tla"]
        return [*shown, "+cf", str(self.authority.certificate)]

    def stored(self) -> int:
        """How many instances the ledger holds."""
        ledger = Ledger(self.settings.ledger_path)
        try:
            return event_counts(ledger)["instance.stored"]
        finally:
            ledger.close()


@contextmanager
def running_intake(folder: Path, *, client_certificates: bool, plain: bool) -> Iterator[Intake]:
    folder.mkdir()
    authority = Authority(folder)
    pair = authority.issue("box", rsa_bits=2048)
    plain_port, port = free_ports(2)
    tls: dict[str, Any] = {"port": port, "certificate": str(pair.certificate), "key": str(pair.key)}
    if client_certificates:
        tls["client_authorities"] = str(authority.certificate)
    intake = {"host": LOOPBACK, "port": plain_port, "plain": plain, "reserve_percent": 0.0, "reserve_bytes": 0}
    config = init.write(folder / "box", {"intake": {**intake, "tls": tls}})
    command = [sys.executable, "-m", "appliance.cli", "--config", config, "intake"]
    process = Leashed(command, log=folder / "intake.log", grace=12.0)
    made = Intake(load_settings(config), port, authority, pair, process)

    def listening() -> bool | None:
        with socket.socket() as probe:
            return True if probe.connect_ex((LOOPBACK, port)) == 0 else None

    try:
        wait_for(listening, 30.0, lambda: f"the intake does not listen\n{process.tail(30)}")
        yield made
    finally:
        process.stop()


@pytest.fixture(scope="module")
def open_intake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Intake]:
    """Any client; the port without TLS listens, too."""
    with running_intake(tmp_path_factory.mktemp("tls") / "a", client_certificates=False, plain=True) as intake:
        yield intake


@pytest.fixture(scope="module")
def closed_intake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Intake]:
    """Only clients of the authority; nothing listens without TLS."""
    with running_intake(tmp_path_factory.mktemp("tls") / "b", client_certificates=True, plain=False) as intake:
        yield intake


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_study(simulate(5, thickness_mm=10.0), tmp_path_factory.mktemp("tls") / "study")


def renamed(files: list[Path], folder: Path) -> list[Path]:
    """The same images under UIDs of their own."""
    folder.mkdir()
    made = []
    for number, path in enumerate(files):
        dataset = pydicom.dcmread(path)
        dataset.SOPInstanceUID = pydicom.uid.generate_uid()
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.save_as(folder / f"{number}.dcm")
        made.append(folder / f"{number}.dcm")
    return made


# DCMTK 3.6.7's profiles of PS3.15 B.9, B.10 and B.11; it has none of the later ones.
@pytest.mark.parametrize("profile", ["+px", "+py", "+pz"])
def test_echo_under_each_profile_that_dcmtk_has(open_intake: Intake, profile: str) -> None:
    done = open_intake.tool("echoscu", [*open_intake.trusting(), profile])
    assert done.returncode == 0, done.stderr + open_intake.process.tail(30)


@pytest.mark.parametrize("profile", ["+pa", "+pn"])
def test_the_profile_with_aes_in_cbc_and_the_one_without_encryption_are_refused(
    open_intake: Intake, profile: str
) -> None:
    assert open_intake.tool("echoscu", [*open_intake.trusting(), profile]).returncode != 0


def test_a_study_is_stored(open_intake: Intake, study: list[Path], tmp_path: Path) -> None:
    before = open_intake.stored()
    files = renamed(study, tmp_path / "files")
    done = open_intake.tool("storescu", open_intake.trusting(), *files)
    assert done.returncode == 0, done.stderr + open_intake.process.tail(30)
    assert open_intake.stored() == before + len(files)


def test_both_ports_serve_side_by_side(open_intake: Intake) -> None:
    assert open_intake.tool("echoscu", [], port=open_intake.settings.intake.port).returncode == 0
    # Each refuses what belongs to the other.
    assert open_intake.tool("echoscu", [*open_intake.trusting()], port=open_intake.settings.intake.port).returncode != 0
    assert open_intake.tool("echoscu", ["-to", "5", "-ta", "5"]).returncode != 0
    assert open_intake.tool("echoscu", open_intake.trusting()).returncode == 0


def test_a_client_of_the_authority_is_served(closed_intake: Intake, study: list[Path], tmp_path: Path) -> None:
    before = closed_intake.stored()
    files = renamed(study, tmp_path / "files")
    scanner = closed_intake.authority.issue("scanner", client=True, rsa_bits=2048)
    done = closed_intake.tool("storescu", closed_intake.trusting(scanner), *files)
    assert done.returncode == 0, done.stderr + closed_intake.process.tail(30)
    assert closed_intake.stored() == before + len(files)


def test_other_clients_are_refused(closed_intake: Intake, study: list[Path], tmp_path: Path) -> None:
    before = closed_intake.stored()
    stranger = Authority(tmp_path, "strangers").issue("stranger", client=True, rsa_bits=2048)
    for client in (None, stranger):
        done = closed_intake.tool("storescu", closed_intake.trusting(client), *study[:1])
        assert done.returncode != 0
        assert closed_intake.tool("echoscu", closed_intake.trusting(client)).returncode != 0
    assert closed_intake.stored() == before


def test_the_plain_port_is_off(closed_intake: Intake) -> None:
    with socket.socket() as probe:
        assert probe.connect_ex((LOOPBACK, closed_intake.settings.intake.port)) != 0


def test_a_renewed_certificate_is_shown_to_the_next_client(closed_intake: Intake, tmp_path: Path) -> None:
    scanner = closed_intake.authority.issue("scanner-renewal", client=True, rsa_bits=2048)
    other = Authority(tmp_path, "successor")
    options = ["+tls", str(scanner.key), str(scanner.certificate), "+cf", str(other.certificate)]
    assert closed_intake.tool("echoscu", options).returncode != 0
    original = Pair(tmp_path / "old.crt", tmp_path / "old.key")
    closed_intake.pair.copy_to(original.certificate, original.key)
    other.issue("renewed", rsa_bits=2048).copy_to(closed_intake.pair.certificate, closed_intake.pair.key)
    try:
        assert closed_intake.tool("echoscu", options).returncode == 0
    finally:
        original.copy_to(closed_intake.pair.certificate, closed_intake.pair.key)
    assert closed_intake.tool("echoscu", closed_intake.trusting(scanner)).returncode == 0


def test_check_shows_the_certificate(open_intake: Intake) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "appliance.cli", "--config", open_intake.settings.box.state_directory / "scanside.toml",
         "check"],
        capture_output=True, text=True, timeout=60, cwd=ROOT, env={"COLUMNS": "200", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert "the certificate is good until" in done.stdout
