"""Programs of other people that the tests talk to; where one is absent the test skips and says so."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from pydicom import uid

CACHE = Path(__file__).resolve().parent.parent / ".cache"


def program(name: str) -> str:
    """The path of a program."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def node_packages(source: Path) -> Path:
    """The folder into which the pinned npm packages of a test folder are installed, once for all test processes.

    Args:
        source: holds package.json, package-lock.json and .npmrc.
    """
    program("node")
    npm = program("npm")
    folder = Path(os.environ.get("SCANSIDE_NPM_CACHE", CACHE)) / f"npm-{source.name}"
    folder.mkdir(parents=True, exist_ok=True)
    pinned = (source / "package-lock.json").read_bytes()
    stamp = folder / "installed.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_bytes() != pinned:
            stamp.unlink(missing_ok=True)
            for name in ("package.json", "package-lock.json", ".npmrc"):
                shutil.copy(source / name, folder / name)
            command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            installed = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100)
            if installed.returncode != 0:
                pytest.skip(f"npm ci failed: {installed.stderr.strip().splitlines()[-1:]}")
            stamp.write_bytes(pinned)
    return folder


def npm_package(name: str, integrity: str) -> Path:
    """The folder of one npm package without what it depends on, fetched once for all test processes.

    Args:
        name: with its version, such as "@ohif/app@3.13.2".
        integrity: "sha512-" and the base64 of its archive's digest, as npm's lock files have it.
    """
    npm = program("npm")
    folder = Path(os.environ.get("SCANSIDE_NPM_CACHE", CACHE)) / f"npm-{name.replace('/', '-').strip('@')}"
    folder.mkdir(parents=True, exist_ok=True)
    stamp = folder / "fetched"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != integrity:
            stamp.unlink(missing_ok=True)
            command = [npm, "pack", "--silent", "--ignore-scripts", f"--pack-destination={folder}", name]
            fetched = subprocess.run(command, capture_output=True, text=True, timeout=100)
            if fetched.returncode != 0:
                pytest.skip(f"npm pack {name} failed: {fetched.stderr.strip().splitlines()[-1:]}")
            archive = folder / fetched.stdout.split()[-1]
            digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
            assert f"sha512-{digest}" == integrity, f"{name} is not what it was"
            shutil.rmtree(folder / "package", ignore_errors=True)
            with tarfile.open(archive) as members:
                members.extractall(folder, filter="data")
            archive.unlink()
            stamp.write_text(integrity)
    return folder / "package"


ENCODERS = {
    uid.ExplicitVRLittleEndian: "dcmconv +te",
    uid.ImplicitVRLittleEndian: "dcmconv +ti",
    uid.ExplicitVRBigEndian: "dcmconv +tb",
    uid.DeflatedExplicitVRLittleEndian: "dcmconv +td",
    uid.RLELossless: "dcmcrle",
    uid.JPEGLosslessSV1: "dcmcjpeg +e1",
    uid.JPEGLossless: "dcmcjpeg +el",
    uid.JPEGLSLossless: "dcmcjpls +el",
    uid.JPEG2000Lossless: "gdcmconv --j2k",
    # What follows loses something, and the encoder gives the image another UID for it.
    uid.JPEGBaseline8Bit: "dcmcjpeg +eb",
    uid.JPEGExtended12Bit: "dcmcjpeg +ee",
    uid.JPEGLSNearLossless: "dcmcjpls +en",
    uid.JPEG2000: "gdcmconv --j2k --lossy -q 40",
}
"""Transfer syntax → the command of DCMTK or GDCM that writes an image in it."""


def encode(source: Path, target: Path, syntax: str) -> Path:
    """Write a CT image in one of the transfer syntaxes of `ENCODERS`; returns the target."""
    name, *options = ENCODERS[uid.UID(syntax)].split()
    command = [program(name), *options, str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return target
