"""Drift: what is not what was signed is named, at the start and while the box runs; and so is what Triton has of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

import triton_models
from appliance.governance.integrity import REHASH_SECONDS, Files, load_sound, package_files
from appliance.governance.package import Package, load, seal
from appliance.governance.signature import key_id, read_private, write_keys
from appliance.inference.served import repository_problem, served_problem
from appliance.inference.server import render_config, write_repository
from appliance.settings import Settings, SettingsError

SHIPPED = Path(triton_models.__file__).parent / "ich_reference"
KEY = Ed25519PrivateKey.generate()
TRUSTED = {key_id(KEY.public_key()): KEY.public_key()}


def signed(folder: Path, name: str = "ich_reference") -> Package:
    """A copy of the shipped package under another name, signed by the site's key."""
    shutil.copytree(SHIPPED, folder / name)
    manifest = folder / name / "package.toml"
    manifest.write_text(manifest.read_text("utf-8").replace('"ich_reference"', f'"{name}"'), "utf-8")
    return seal(folder / name, KEY)


@pytest.fixture
def package(tmp_path: Path) -> Package:
    return signed(tmp_path)


@pytest.fixture
def files(package: Package) -> Files:
    return package_files(package, TRUSTED, allow_unsigned=False)


def flip(path: Path) -> None:
    """Change one bit, and leave size and date as they were."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


TAMPERED: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights": (lambda folder: flip(folder / "model.onnx"), "model.onnx: its digest is"),
    "weights replaced": (lambda folder: (folder / "model.onnx").write_bytes(b"another"), "model.onnx: its digest is"),
    "weights gone": (lambda folder: (folder / "model.onnx").unlink(), "model.onnx: No such file"),
    "manifest": (lambda folder: flip(folder / "package.toml"), "package.sig: it is not key"),
    "manifest gone": (lambda folder: (folder / "package.toml").unlink(), "package.toml: No such file"),
    "signature": (lambda folder: flip(folder / "package.sig"), "package.sig: "),
    "signature gone": (lambda folder: (folder / "package.sig").unlink(), "package.sig: the package is not signed"),
    "stray file": (lambda folder: (folder / "run.py").write_text(""), "run.py: package.toml does not list it"),
    "another signed": (
        lambda folder: seal(_edited(folder, 'version = "', 'version = "9'), KEY),
        "restart to run what lies there",
    ),
}


def _edited(folder: Path, old: str, new: str) -> Path:
    manifest = folder / "package.toml"
    manifest.write_text(manifest.read_text("utf-8").replace(old, new, 1), "utf-8")
    return folder


@pytest.mark.parametrize("name", TAMPERED)
def test_what_was_changed_is_named_and_what_was_mended_goes_on(
    package: Package, files: Files, tmp_path: Path, name: str
) -> None:
    shutil.copytree(package.folder, tmp_path / "sound")
    assert files.look() == files.look() == ""
    tamper, says = TAMPERED[name]
    tamper(package.folder)
    assert says in files.look()
    assert str(package.folder) in files.look()
    shutil.rmtree(package.folder)
    shutil.copytree(tmp_path / "sound", package.folder)
    assert files.look() == ""


def test_files_are_read_only_where_something_looks_changed_and_now_and_then(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("1")
    read: list[int] = []
    now = [0.0]

    def check() -> str:
        read.append(1)
        return ""

    files = Files([tmp_path], check, lambda: now[0])
    for _ in range(3):
        files.look()
    assert len(read) == 1
    (tmp_path / "two").write_text("")
    files.look()
    files.look()
    assert len(read) == 2
    now[0] += REHASH_SECONDS
    files.look()
    files.look()
    assert len(read) == 3


# --- at the start ---------------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Two packages of which each is the other's like, but for its name."""
    write_keys(tmp_path / "site.pem")
    for name in ("one", "two"):
        signed(tmp_path / "models", name)
        seal(tmp_path / "models" / name, read_private(tmp_path / "site.pem"))
    return Settings(
        box={"state_directory": tmp_path / "state"},
        models={
            "repository": tmp_path / "models", "packages": ["one", "two"],
            "trusted_keys": [tmp_path / "site.pub.pem"],
        },
    )  # type: ignore[arg-type]  # fmt: skip


def test_a_broken_package_leaves_the_others(settings: Settings) -> None:
    packages, broken = load_sound(settings)
    assert ([one.name for one in packages], broken) == (["one", "two"], {})
    flip(settings.model_repository / "one" / "model.onnx")
    packages, broken = load_sound(settings)
    assert [one.name for one in packages] == ["two"]
    assert list(broken) == ["one"]
    assert "one/model.onnx: its digest is" in broken["one"]
    shutil.rmtree(settings.model_repository / "two")
    packages, broken = load_sound(settings)
    assert (packages, sorted(broken)) == ((), ["one", "two"])


def test_wrong_settings_are_nobodys_drift(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "site.pub.pem").write_text("no key")
    with pytest.raises(SettingsError, match=r"models\.trusted_keys"):
        load_sound(settings)


# --- Triton's side --------------------------------------------------------------------------------------


@pytest.fixture
def home(package: Package, tmp_path: Path) -> Path:
    """Triton's home as `prepare` makes it, without what is Triton's own."""
    folder = tmp_path / "triton"
    write_repository(folder / "repository", [package], "cpu")
    backend = folder / "backends" / "onnxruntime"
    backend.mkdir(parents=True)
    shutil.copy(SHIPPED.parent / "backends" / "onnxruntime" / "model.py", backend)
    return folder


MODEL = "repository/ich_reference"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (f"{MODEL}/config.pbtxt", None),
        (f"{MODEL}/config.pbtxt", b""),
        (f"{MODEL}/1/model.onnx", b"another"),
        (f"{MODEL}/1/model.onnx", None),
        (f"{MODEL}/2/model.onnx", b"another"),
        ("backends/onnxruntime/model.py", b"print()"),
    ],
)
def test_a_changed_file_of_triton_is_named(package: Package, home: Path, name: str, content: bytes | None) -> None:
    assert repository_problem(home, package) == ""
    path = home / name
    if content is None:
        path.unlink()
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    assert str(path if path.parent.name != "2" else path.parent) in repository_problem(home, package)


class Answer:
    """Stands for a Triton that says this of its model, with what Triton adds by itself."""

    def __init__(self, package: Package, old: str = "", new: str = "", versions: tuple[str, ...] = ("1",)) -> None:
        text = render_config(package, "cpu")
        assert old in text
        self.versions = versions
        self.config = text_format.Parse(text.replace(old, new, 1), model_config_pb2.ModelConfig())
        self.config.platform = "onnxruntime_onnx"
        self.config.runtime = "model.py"
        self.config.instance_group[0].name = "ich_reference_0"
        self.config.optimization.input_pinned_memory.enable = True
        if self.config.HasField("dynamic_batching"):
            self.config.dynamic_batching.preferred_batch_size.append(16)

    def served(self, package: Package) -> Any:
        return self.versions, self.config


def test_what_triton_adds_is_no_difference(package: Package) -> None:
    assert served_problem(Answer(package), package, "cpu") == ""  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("dims: [ 6 ]", "dims: [ 5 ]", "its output.dims"),
        ("max_batch_size: 16", "max_batch_size: 8", "its max_batch_size is 8, the package's is 16"),
        ('default_model_filename: "model.onnx"', 'default_model_filename: "other.onnx"', "default_model_filename"),
        ('string_value: "sha256:', 'string_value: "sha256:0', "parameters.scanside_model_digest.string_value"),
        ("kind: KIND_CPU", "kind: KIND_GPU", "instance_group.kind"),
        ("dynamic_batching {", "response_cache { enable: true } dynamic_batching {", "response_cache"),
        ("priority_levels: 2", "priority_levels: 3", "dynamic_batching.priority_levels"),
        ("parameters {", 'parameters { key: "x" value { string_value: "y" } } parameters {', "parameters.x"),
    ],
)
def test_what_triton_serves_otherwise_is_named(package: Package, old: str, new: str, says: str) -> None:
    problem = served_problem(Answer(package, old, new), package, "cpu")  # type: ignore[arg-type]
    assert "Triton's ich_reference" in problem
    assert says in problem


def test_another_version_is_named(package: Package) -> None:
    for versions in ((), ("2",), ("1", "2")):
        assert "version" in served_problem(Answer(package, versions=versions), package, "cpu")  # type: ignore[arg-type]


def test_a_package_is_what_its_manifest_was(package: Package) -> None:
    assert load(package.folder, trusted=TRUSTED).digest == package.digest
    seal(_edited(package.folder, 'title = "', 'title = "A'), KEY)
    assert load(package.folder, trusted=TRUSTED).digest != package.digest
