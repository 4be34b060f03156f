"""Small bundles that are real ones: scanside's own wheel, uv's, and environments that borrow this one's libraries."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from appliance.ledger import migration
from appliance.release.create import Made, create
from appliance.release.minisign import SecretKey
from tests.peers import CACHE

ROOT = Path(__file__).resolve().parents[1]


def a_wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> Path:
    """A wheel with those files."""
    about = f"{name}-{version}.dist-info"
    files = files | {
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nLicense: MIT\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }

    def entry(path: str, content: str) -> str:
        digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).rstrip(b"=").decode()
        return f"{path},sha256={digest},{len(content)}\n"

    record = "".join(entry(*one) for one in files.items()) + f"{about}/RECORD,,\n"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for one, content in {**files, f"{about}/RECORD": record}.items():
            archive.writestr(zipfile.ZipInfo(one), content)
    return path


def uv_wheel() -> Path:
    """The wheel of uv that a bundle brings, fetched once; skips where it cannot be."""
    folder = CACHE / "uv"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # pip compares it with its hash whether it lies there already or not.
        done = subprocess.run(
            [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download", "--require-hashes",
             "--no-deps", "--only-binary", ":all:", "-d", str(folder), "-r", str(ROOT / "requirements/install.txt")],
            capture_output=True, text=True,
        )  # fmt: skip
    if done.returncode != 0:
        pytest.skip(f"uv cannot be fetched: {done.stderr.strip().splitlines()[-1:]}")
    return max(folder.glob("uv-*.whl"), key=lambda one: one.stat().st_mtime)


def small_source(folder: Path) -> tuple[Path, Path]:
    """A source tree with scanside's own code and requirements that this environment meets; its folder of wheels."""
    source, wheels = folder / "source", folder / "wheels"
    wheels.mkdir(parents=True)
    ignored = shutil.ignore_patterns("__pycache__", ".*", "ich_reference")
    for name in ("appliance", "dicom_io", "triton_models", "systemd", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    package = source / "triton_models/small"
    package.mkdir()
    (package / "package.toml").write_text('name = "small"\n')
    site = sysconfig.get_path("purelib")
    borrowed = a_wheel(wheels, "borrowed", "1.0", {"borrowed.pth": f"{site}\n"})
    gpu = a_wheel(wheels, "for_a_gpu", "1.0", {"for_a_gpu.py": ""})
    uv = shutil.copy(uv_wheel(), wheels)
    (source / "requirements").mkdir()
    for name, wheel, said in (
        ("appliance", borrowed, "borrowed==1.0"),
        ("triton", borrowed, "borrowed==1.0"),
        ("install", uv, f"uv=={Path(uv).name.split('-')[1]}"),
    ):
        (source / f"requirements/{name}.txt").write_text(_stated(said, wheel))
    of_a_gpu = _stated("borrowed==1.0", borrowed) + _stated("for-a-gpu==1.0", gpu)
    (source / "requirements/gpu.txt").write_text(of_a_gpu)
    return source, wheels


def _stated(requirement: str, wheel: str | Path) -> str:
    return f"{requirement} --hash=sha256:{hashlib.sha256(Path(wheel).read_bytes()).hexdigest()}\n"


def small_bundle(folder: Path, out: Path, key: SecretKey, version: str, **options: object) -> Made:
    """A bundle of that source, signed."""
    return create(
        folder / "source",
        out,
        key,
        schema=migration.head(folder / "source/appliance/ledger/migrations"),
        version=version,
        wheels=[folder / "wheels"],
        **options,  # type: ignore[arg-type]
    )
