"""Programs of other people that the tests talk to; where one is absent the test skips and says so."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

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
