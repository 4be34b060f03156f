"""Model packages: what is accepted, and how what is not is named."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import triton_models
from appliance.governance import package as packages
from appliance.governance.package import Package, PackageError, load_configured, verify
from appliance.settings import Settings

SHIPPED = Path(triton_models.__file__).parent

Edit = Callable[[str, str], None]


def load(folder: Path) -> Package:
    """What a package.toml must hold does not depend on who signed it; test_signature.py tells about that."""
    return packages.load(folder, allow_unsigned=True)


def load_all(repository: Path, names: list[str]) -> tuple[Package, ...]:
    return packages.load_all(repository, names, allow_unsigned=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the shipped package, under its own name."""
    target = tmp_path / "ich_reference"
    shutil.copytree(SHIPPED / "ich_reference", target, ignore=shutil.ignore_patterns("package.sig"))
    return target


@pytest.fixture
def edit(folder: Path) -> Edit:
    """Replaces a piece of package.toml that must be there."""

    def replace(old: str, new: str) -> None:
        text = (folder / "package.toml").read_text("utf-8")
        assert old in text
        (folder / "package.toml").write_text(text.replace(old, new, 1), "utf-8")

    return replace


def test_the_shipped_package() -> None:
    (package,) = load_configured(Settings())
    folder = SHIPPED / "ich_reference"
    assert (package.name, package.mode, package.intended_use) == ("ich_reference", "evaluation", "triage")
    assert package.labels[0] == "any"
    assert package.indication.modality == ("CT",)
    channels = 3 * (1 + 2 * package.preprocessing.neighbours)
    assert package.model.input.shape == (channels, 256, 256)
    assert package.model.output("lesion_map").shape == (1, 64, 64)
    assert len(package.preprocessing.windows) == 3
    assert "not cleared" in package.notice
    assert (package.folder, len(package.signed_by)) == (folder, 16)
    assert verify(package, "model.onnx") == (folder / "model.onnx").read_bytes()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('mode = "evaluation"', 'mode = "evaluation"\nspeed = 1', "speed: there is no such key"),
        ("[model]", "[model]\nspeed = 1", "model.speed: there is no such key"),
        ('mode = "evaluation"', 'mode = "evaluation"\nfolder = "/"', "folder: there is no such key"),
        ('manufacturer = "', '# manufacturer = "', "manufacturer: it is missing"),
        ("slab_mm = 5.0", "", "preprocessing.slab_mm: it is missing"),
        ('mode = "evaluation"', 'mode = "free"', "mode: input should be 'evaluation' or 'clinical'"),
        ("slab_mm = 5.0", 'slab_mm = "5.0"', "preprocessing.slab_mm: input should be a valid number"),
        ("slab_mm = 5.0", "slab_mm = 0.0", "preprocessing.slab_mm: input should be greater than 0"),
        ("contrast = false", "contrast = 0", "indication.contrast: input should be a valid boolean"),
        ("kvp = [80.0, 140.0]", "kvp = [140.0, 80.0]", "indication: kvp runs from 140.0 down to 80.0"),
        ("kvp = [80.0, 140.0]", "kvp = [80.0]", "indication.kvp.1: it is missing"),
        ("maximum_batch = 16", "maximum_batch = 0", "model.maximum_batch: input should be greater"),
        ("size = 256", "size = 128", ", 256, 256], preprocessing makes ["),
        ("shape = [6]", "shape = [5]", "probabilities has another length than the 6 labels"),
        ('"any", ', '"all", ', "labels must hold 'any'"),
        ('"subdural"]', '"epidural"]', "labels must hold 'any' and differ from one another"),
        ("shape = [1, 64, 64]", "shape = [64, 64]", "lesion_map must be square with one channel"),
        ('name = "lesion_map"', 'name = "mask"', "the outputs must be probabilities and lesion_map"),
        ('"model.onnx" = ', '"../model.onnx" = ', "files"),
        ("[files]", '[files]\n"../x" = "sha256:' + "0" * 64 + '"', "files.'../x' lies outside the package"),
        ("[files]", '[files]\n"./x" = "sha256:' + "0" * 64 + '"', "files.'./x' cannot be listed under that name"),
        ("[files]", '[files]\n"package.sig" = "sha256:' + "0" * 64 + '"', "files.'package.sig' cannot be listed"),
        ('mode = "evaluation"', 'mode = "evaluation"\nsigned_by = "us"', "signed_by: there is no such key"),
        ("sha256:", "md5:", "files.model.onnx: string should match pattern"),
        ('triton_name = "', 'triton_name = "../', "model.triton_name: string should match pattern"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, edit: Edit, old: str, new: str, says: str) -> None:
    edit(old, new)
    with pytest.raises(PackageError) as caught:
        load(folder)
    assert says in caught.value.what
    assert caught.value.where == str(folder / "package.toml")
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


@pytest.fixture
def plain(folder: Path, edit: Edit) -> Edit:
    """`edit`, of a package that sees slabs alone, was measured on nothing and has no parity vectors."""
    (folder / "parity.npz").unlink(missing_ok=True)
    optional = r'(?m)^(neighbours|sensitivity|specificity|studies|\[parity\]|tolerance|"parity.npz").*\n'
    text = re.sub(optional, "", (folder / "package.toml").read_text("utf-8"))
    text = re.sub(r"shape = \[\d+, 256, 256\]", "shape = [3, 256, 256]", text)
    (folder / "package.toml").write_text(text, "utf-8")
    return edit


def test_what_a_package_need_not_say(folder: Path, plain: Edit) -> None:
    package = load(folder)
    assert package.preprocessing.neighbours == 0
    point = package.operating_point
    assert (point.sensitivity, point.specificity, point.studies, package.parity) == (None, None, None, None)
    plain("size = 256", "size = 256\nneighbours = 1")
    with pytest.raises(PackageError, match=r"model.input is \[3, 256, 256\], preprocessing makes \[9, 256, 256\]"):
        load(folder)
    plain("shape = [3, 256, 256]", "shape = [9, 256, 256]")
    plain("lesion_threshold", "sensitivity = 0.96\nspecificity = 0.97\nstudies = 600\nlesion_threshold")
    (folder / "parity.npz").write_bytes(b"vectors")
    plain("[files]", f'[parity]\ntolerance = 0.02\n[files]\n"parity.npz" = "{digest_of(b"vectors")}"')
    package = load(folder)
    assert (package.preprocessing.neighbours, package.model.input.shape) == (1, (9, 256, 256))
    point = package.operating_point
    assert (point.sensitivity, point.specificity, point.studies) == (0.96, 0.97, 600)
    assert package.parity == packages.Parity(0.02)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("size = 256", "size = 256\nneighbours = 2", "preprocessing.neighbours: input should be 0 or 1"),
        ("lesion_thr", "sensitivity = 0.9\nstudies = 9\nlesion_thr", "specificity and studies go together"),
        ("[files]", "[parity]\ntolerance = 0.01\n[files]", "[parity] and parity.npz among the files go together"),
        ("[files]", f'[files]\n"parity.npz" = "sha256:{0:064}"', "[parity] and parity.npz among the files go together"),
        ("[files]", "[parity]\ntolerance = 0.0\n[files]", "parity.tolerance: input should be greater than 0"),
    ],
)
def test_what_is_wrong_with_it_is_named(folder: Path, plain: Edit, old: str, new: str, says: str) -> None:
    plain(old, new)
    with pytest.raises(PackageError) as caught:
        load(folder)
    assert says in caught.value.what


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@pytest.mark.parametrize("value", ["nan", "inf", "-0.1", "1.1"])
def test_a_threshold_is_a_probability(folder: Path, edit: Edit, value: str) -> None:
    edit("\nthreshold = ", f"\nthreshold = {value} # ")
    with pytest.raises(PackageError, match=r"operating_point\.threshold"):
        load(folder)


def test_every_wrong_key_is_named_at_once(folder: Path, edit: Edit) -> None:
    edit("slab_mm = 5.0", "")
    edit('title = "', 'heading = "')
    with pytest.raises(PackageError) as caught:
        load(folder)
    for line in ("preprocessing.slab_mm: it is missing", "title: it is missing", "heading: there is no such key"):
        assert line in caught.value.what


def test_a_changed_model_is_refused(folder: Path) -> None:
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(PackageError, match="digest") as caught:
        load(folder)
    assert caught.value.where == str(folder / "model.onnx")


def test_a_model_changed_after_loading_is_refused(folder: Path) -> None:
    package = load(folder)
    (folder / "model.onnx").write_bytes(b"another")
    with pytest.raises(PackageError, match="digest"):
        verify(package, "model.onnx")


def test_an_absent_model_is_named(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    with pytest.raises(PackageError) as caught:
        load(folder)
    assert caught.value.where == str(folder / "model.onnx")


@pytest.mark.parametrize("content", [b"name = ", b"\xff\xfe", b"name = 1\nname = 2"])
def test_what_is_no_toml_is_named(folder: Path, content: bytes) -> None:
    (folder / "package.toml").write_bytes(content)
    with pytest.raises(PackageError, match="not TOML"):
        load(folder)


def test_an_absent_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(PackageError) as caught:
        load_all(tmp_path, ["nothing"])
    assert caught.value.where == str(tmp_path / "nothing" / "package.toml")


def test_packages_come_in_the_order_asked_for(folder: Path, tmp_path: Path, edit: Edit) -> None:
    shutil.copytree(folder, tmp_path / "second")
    text = (tmp_path / "second" / "package.toml").read_text("utf-8")
    (tmp_path / "second" / "package.toml").write_text(text.replace('"ich_reference"', '"second"'), "utf-8")
    names = ["second", "ich_reference"]
    assert [package.name for package in load_all(tmp_path, names)] == names


def test_two_packages_cannot_be_one_triton_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"model\.triton_name"):
        load_all(tmp_path, ["ich_reference", "ich_reference"])


def test_a_package_lies_in_a_folder_of_its_name(folder: Path, tmp_path: Path) -> None:
    folder.rename(tmp_path / "other")
    with pytest.raises(PackageError, match="'ich_reference' in a folder 'other'"):
        load_all(tmp_path, ["other"])
