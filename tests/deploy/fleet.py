"""The controller of the lab: releases in signed bundles, an inventory, and Ansible with the project's collection."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.lab import DICOM_PORT, HL7, HL7_PORT, METRICS_PORT, NETWORK, PACS, PACS_PORT, Lab
from tests.deploy.machine import ROOT
from tests.dicom_io.certificates import Authority
from tests.peers import CACHE

ENVIRONMENT = ROOT / ".venv-ansible"
REQUIREMENTS = ("appliance.txt", "triton.txt", "install.txt")


def ansible(name: str) -> Path:
    """A program of the controller's environment; skips where there is none."""
    path = ENVIRONMENT / "bin" / name
    if not path.exists():
        pytest.skip("no environment with Ansible (make .venv-ansible/.ready)")
    return path


def wheels() -> Path:
    """All wheels of a bundle, fetched once; what is in a lab comes from here."""
    files = [ROOT / "requirements" / name for name in REQUIREMENTS]
    stated = hashlib.sha256(b"".join(one.read_bytes() for one in files)).hexdigest()
    folder = CACHE / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    stamp = folder / "fetched"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != stated:
            for one in files:
                done = subprocess.run(
                    [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps",
                     "--require-hashes", "--only-binary=:all:", "--dest", str(folder), "--requirement", str(one)],
                    capture_output=True, text=True,
                )  # fmt: skip
                if done.returncode != 0:
                    pytest.skip(f"the wheels cannot be fetched: {done.stderr.strip().splitlines()[-1:]}")
            stamp.write_text(stated)
    return folder


class Site:
    """The controller of a lab's boxes."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.folder = lab.folder / "controller"
        self.folder.mkdir()
        self.key = self.folder / "release.key"
        self.command("bundle", "keygen", "--out", self.key)
        collections = self.folder / "collections"
        (collections / "ansible_collections/scanside").mkdir(parents=True)
        shutil.copytree(ROOT / "ansible", collections / "ansible_collections/scanside/fleet")
        self.inventory = self.folder / "inventory.json"
        self.tls = Authority(self.folder).issue("box")
        self.write_inventory()
        self._begun: list[subprocess.Popen[bytes]] = []
        self._environment = {
            "PATH": f"{ENVIRONMENT / 'bin'}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "LANG": "C.UTF-8",
            "ANSIBLE_COLLECTIONS_PATH": str(collections),
            "ANSIBLE_HOST_KEY_CHECKING": "False",
            "ANSIBLE_PIPELINING": "True",
            "ANSIBLE_SSH_RETRIES": "0",
            # Wheels do not get smaller by being compressed again. A box that goes while something runs is noticed.
            "ANSIBLE_SSH_ARGS": "-o ControlMaster=auto -o ControlPersist=30s -o Compression=no "
            "-o Ciphers=aes128-gcm@openssh.com -o ServerAliveInterval=3 -o ServerAliveCountMax=3",
            "ANSIBLE_TIMEOUT": "6",
            "ANSIBLE_NOCOLOR": "True",
            "ANSIBLE_FORKS": "8",
            "ANSIBLE_LOCAL_TEMP": str(self.folder / "tmp"),
            "PYTHONPATH": str(ROOT),
        }

    def command(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command of scanside on the controller."""
        done = subprocess.run(
            [sys.executable, "-m", "appliance.cli", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def release(self, version: str, source: Path = ROOT) -> Path:
        """A bundle of a tree as that version, signed by the site's key."""
        out = self.folder / "bundles"
        self.command(
            "bundle", "create", "--out", out, "--key", self.key, "--version", version, "--wheels", wheels(),
            "--source", source,
        )  # fmt: skip
        return out / f"scanside-{version}.tar"

    def write_inventory(self, **more: Any) -> None:
        """The boxes, the first the canary, and what the site wants of each."""
        destinations = [
            {"kind": "dicom", "name": "pacs", "ae_title": "PACS", "host": PACS, "port": PACS_PORT},
            {"kind": "hl7", "name": "er", "host": HL7, "port": HL7_PORT, "acknowledge_seconds": 5.0},
        ]
        hosts = {
            box: {
                "ansible_host": address,
                "scanside_settings": {
                    "intake": {"ae_title": box.upper(), "port": DICOM_PORT, "metrics_port": METRICS_PORT,
                               "reserve_percent": 0.0, "reserve_bytes": 50_000_000, "hl7": {"port": 2577}},
                    "study": {"quiet_seconds": 90.0, "settle_seconds": 0.5},
                    "retention": {"start_percent": 0.0, "stop_percent": 1.0},
                    "delivery": {"first_retry_seconds": 1.0, "longest_retry_seconds": 5.0},
                },
            }
            for box, address in self.lab.address.items()
        }  # fmt: skip
        values = {
            "ansible_user": "root",
            "ansible_ssh_private_key_file": str(self.lab.key),
            "ansible_ssh_common_args": "-o UserKnownHostsFile=/dev/null -o LogLevel=ERROR",
            "ansible_python_interpreter": "/usr/bin/python3",
            "scanside_release_keys": [str(self.key.with_suffix(".pub"))],
            "scanside_controller_command": [sys.executable, "-m", "appliance.cli"],
            "scanside_destinations": destinations,
            "scanside_tls_certificate": str(self.tls.certificate),
            "scanside_tls_key": str(self.tls.key),
            "scanside_accept_dicom_from": [f"{NETWORK}.0/24"],
            "scanside_metrics_port": METRICS_PORT,
            # A lab's disk is not encrypted, its clock is the host's, and nothing of it is large.
            "scanside_require_encryption": False,
            "scanside_require_time_sync": False,
            "scanside_minimum_free_gb": 2,
            "scanside_minimum_memory_gb": 2,
            "scanside_drain_seconds": 90,
            **more,
        }
        canary = next(iter(hosts))
        groups = {"scanside": {"hosts": hosts, "vars": values}, "scanside_canary": {"hosts": {canary: None}}}
        self.inventory.write_text(json.dumps({"all": {"children": groups}}, indent=1), encoding="utf-8")

    def start(self, playbook: str, *options: str, **extra: Any) -> subprocess.Popen[bytes]:
        """Begin a playbook of the collection."""
        command = self.lab.at_controller(
            ansible("ansible-playbook"), "--inventory", self.inventory, f"scanside.fleet.{playbook}",
            "--extra-vars", json.dumps(extra), *options,
        )  # fmt: skip
        with (self.folder / f"{playbook}.log").open("wb") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self._begun.append(process)
        return process

    def end(self) -> None:
        """End what still plays, with its own processes."""
        for process in self._begun:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def said(self, playbook: str) -> str:
        """What the last run of a playbook said."""
        return (self.folder / f"{playbook}.log").read_text(encoding="utf-8", errors="replace")

    def play(self, playbook: str, *options: str, ok: bool = True, **extra: Any) -> str:
        """Run a playbook of the collection to its end; what it said."""
        process = self.start(playbook, *options, **extra)
        try:
            process.wait(1500)
        finally:
            self.end()
        said = self.said(playbook)
        assert (process.returncode == 0) is ok, f"{playbook} ended with {process.returncode}\n{said[-6000:]}"
        return said
