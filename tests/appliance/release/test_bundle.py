"""The bundle: made the same twice, and refused when anything in it, or about it, is not what was signed."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from appliance.cli import app
from appliance.ledger import migration
from appliance.release.bundle import MANIFEST, Bundle, read_bundle, signed, trusted_comment, version_key
from appliance.release.create import Made
from appliance.release.errors import ReleaseError
from appliance.release.minisign import SUFFIX, SecretKey, new_key, sign
from tests.release_support import ROOT, a_wheel, small_bundle, small_source

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("release")]
KEY = SecretKey(b"release1", bytes(range(32)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    small_source(folder)
    return folder


@pytest.fixture(scope="module")
def made(folder: Path) -> Made:
    return small_bundle(folder, folder / "out", KEY, "1.2.0", channel="canary", minimum="1.0.0")


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    """A bundle to change."""
    for one in (made.bundle, made.signature):
        shutil.copy(one, tmp_path)
    return tmp_path / made.bundle.name


def read(path: Path, into: Path | None = None) -> tuple[Bundle, dict[str, Any]]:
    bundle = signed(path, [KEY.public])
    return bundle, read_bundle(path, bundle, into)


Member = tuple[tarfile.TarInfo, bytes]


def members(path: Path) -> Iterator[Member]:
    with tarfile.open(path) as tar:
        for one in tar:
            file = tar.extractfile(one)
            yield one, file.read() if file else b""


def rewritten(path: Path, change: Callable[[list[Member]], list[Member]], comment: str = "") -> None:
    """Change the members and sign again: what somebody with the key could have made by mistake, or worse."""
    changed = change(list(members(path)))
    with tarfile.open(path, "w") as tar:
        for info, content in changed:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    comment = comment or trusted_comment("1.2.0", "canary", "1.0.0")
    Path(f"{path}{SUFFIX}").write_text(sign(path, KEY, comment))


def test_what_is_in_it(made: Made, folder: Path, tmp_path: Path) -> None:
    bundle, manifest = read(made.bundle, tmp_path)
    assert (bundle.version, bundle.channel, bundle.minimum, bundle.key) == ("1.2.0", "canary", "1.0.0", KEY.public.id)
    assert manifest["schema"] == migration.head()
    inside = {str(one.relative_to(tmp_path)): one for one in tmp_path.rglob("*") if one.is_file()}
    assert set(inside) == {*manifest["files"], MANIFEST}
    for name, stated in manifest["files"].items():
        content = inside[name].read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (stated["sha256"], stated["size"])
    tops = {name.split("/")[0] for name in inside}
    assert tops == {
        MANIFEST, "sbom.cdx.json", "wheels", "wheels-triton", "wheels-install", "requirements", "models", "systemd",
        "install", "docs",
    }  # fmt: skip
    units = {str(one.relative_to(ROOT / "systemd")) for one in (ROOT / "systemd").rglob("*") if one.is_file()}
    assert {name.removeprefix("systemd/") for name in inside if name.startswith("systemd/")} == units
    # Every wheel has a hash of the requirements that it is installed by.
    for wheels, lists in (
        ("wheels", ("appliance", "scanside")),
        ("wheels-triton", ("triton",)),
        ("wheels-install", ("install",)),
    ):
        stated = set().union(
            *(re.findall(r"sha256:(\w+)", inside[f"requirements/{one}.txt"].read_text()) for one in lists)
        )
        there = {manifest["files"][name]["sha256"] for name in inside if name.startswith(f"{wheels}/")}
        assert there and there <= stated


def test_a_bundle_for_a_gpu_has_what_such_a_box_needs_once(folder: Path, tmp_path: Path) -> None:
    trt = a_wheel(tmp_path, "tensorrt", "10.0", {"tensorrt.py": ""})
    made = small_bundle(folder, tmp_path / "out", KEY, "1.2.0", gpu=True, gpu_wheels=[trt])
    _, manifest = read(made.bundle, tmp_path / "inside")
    assert manifest["gpu"] is True
    there = {name for name in manifest["files"] if name.startswith("wheels-gpu/")}
    assert there == {f"wheels-gpu/{one}-py3-none-any.whl" for one in ("for_a_gpu-1.0", "tensorrt-10.0")}
    listed = {one["bom-ref"] for one in json.loads((tmp_path / "inside/sbom.cdx.json").read_text())["components"]}
    assert there <= listed
    again = small_bundle(folder, tmp_path / "again", KEY, "1.2.0", gpu=True, gpu_wheels=[trt])
    assert again.bundle.read_bytes() == made.bundle.read_bytes()


@pytest.mark.parametrize(
    ("wheel", "gpu", "said"),
    [
        ("tensorrt-10.0-py3-none-any.whl", False, "--gpu"),
        ("tensorrt-10.0-cp38-cp38-any.whl", True, "tensorrt==10.0"),  # for another Python
        ("nothing.whl", True, "this is no wheel"),
    ],
)
def test_a_wheel_that_no_gpu_box_could_install_is_refused(
    folder: Path, tmp_path: Path, wheel: str, gpu: bool, said: str
) -> None:
    made = a_wheel(tmp_path, "tensorrt", "10.0", {"tensorrt.py": ""}).rename(tmp_path / wheel)
    if wheel == "nothing.whl":
        made.write_bytes(b"nothing")
    with pytest.raises(ReleaseError) as refused:
        small_bundle(folder, tmp_path / "out", KEY, "1.2.0", gpu=gpu, gpu_wheels=[made])
    assert said in str(refused.value)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_the_list_of_a_gpu_box_is_the_appliances_and_more() -> None:
    pins = {
        name: set(
            re.findall(r"^([a-z0-9_.-]+==[^ ;\\]+)", (ROOT / f"requirements/{name}.txt").read_text(), re.MULTILINE)
        )
        for name in ("appliance", "gpu", "test")
    }
    assert pins["appliance"] < pins["gpu"] < pins["test"]
    more = {one.split("==")[0] for one in pins["gpu"] - pins["appliance"]}
    assert {"cupy-cuda13x", "nvidia-nvimgcodec-cu13", "nvidia-nvjpeg2k-cu13", "nvidia-cuda-nvrtc"} <= more


def test_the_same_input_makes_the_same_bundle(made: Made, folder: Path, tmp_path: Path) -> None:
    for one in (folder / "source").rglob("*.py"):
        one.touch()
    shutil.copytree(folder, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("out"))
    again = small_bundle(
        tmp_path / "elsewhere", tmp_path / "elsewhere/out", KEY, "1.2.0", channel="canary", minimum="1.0.0"
    )
    assert again.bundle.read_bytes() == made.bundle.read_bytes()
    assert again.signature.read_bytes() == made.signature.read_bytes()


def test_the_bill_of_materials_is_valid_and_names_all(made: Made) -> None:
    validation = pytest.importorskip("cyclonedx.validation.json")
    from cyclonedx.schema import SchemaVersion

    content = {info.name: data for info, data in members(made.bundle)}
    fault = validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(content["sbom.cdx.json"].decode())
    assert fault is None
    document = json.loads(content["sbom.cdx.json"])
    listed = {one["bom-ref"]: one for one in document["components"]}
    running = [name for name in content if name.startswith(("wheels", "models/"))]
    assert sorted(listed) == sorted(running)
    for name in running:
        assert listed[name]["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(content[name]).hexdigest()}]
    (own,) = [one for one in listed.values() if one["name"] == "scanside"]
    assert (own["version"], own["purl"]) == ("1.2.0", "pkg:pypi/scanside@1.2.0")
    assert own["licenses"] == [{"expression": "Apache-2.0"}]


def test_a_bit_of_every_kind_of_file_is_noticed(made: Made, copy: Path) -> None:
    sound = made.bundle.read_bytes()
    places: dict[str, int] = {}
    with tarfile.open(made.bundle) as tar:
        for one in tar:
            places[one.name.split("/")[0]] = one.offset_data + one.size // 2
            places.setdefault("a header", one.offset + 100)
    places["the end"] = len(sound) - 1
    assert len(places) >= 12
    for kind, at in places.items():
        copy.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        with pytest.raises(ReleaseError, match="it is not what key") as caught:
            read(copy)
        assert caught.value.where == str(copy), kind
    for wrong in (sound[:-1], sound + b"\0", sound[: len(sound) // 2], b""):
        copy.write_bytes(wrong)
        with pytest.raises(ReleaseError):
            read(copy)


def test_a_content_that_is_not_the_manifests_is_refused_although_it_is_signed(copy: Path, tmp_path: Path) -> None:
    def changed(all_: list[Member]) -> list[Member]:
        return [(info, data + b"\n" if info.name == "systemd/scanside.slice" else data) for info, data in all_]

    rewritten(copy, changed)
    with pytest.raises(ReleaseError, match=r"SHA-256 or size is not the manifest's .*systemd/scanside\.slice"):
        read(copy)


def test_a_file_too_many_or_too_few_is_refused(made: Made, copy: Path) -> None:
    rewritten(copy, lambda all_: [*all_, (tarfile.TarInfo("install/more.py"), b"")])
    with pytest.raises(ReleaseError, match=r"does not name this file .*install/more\.py"):
        read(copy)
    rewritten(copy, lambda all_: [one for one in all_ if one[0].name not in ("install/more.py", "sbom.cdx.json")])
    with pytest.raises(ReleaseError, match=r"is missing .*sbom\.cdx\.json"):
        read(copy)
    rewritten(copy, lambda all_: all_[1:])
    with pytest.raises(ReleaseError, match=r"manifest\.json does not come first"):
        read(copy)


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "a/../../up", "./a", "a//b"])
def test_nothing_is_written_outside(copy: Path, tmp_path: Path, name: str) -> None:
    stated = {"sha256": hashlib.sha256(b"x").hexdigest(), "size": 1}

    def evil(all_: list[Member]) -> list[Member]:
        manifest = json.loads(all_[0][1]) | {"files": {name: stated}}
        return [(all_[0][0], json.dumps(manifest).encode()), (tarfile.TarInfo(name), b"x")]

    rewritten(copy, evil)
    into = tmp_path / "deep/into"
    into.mkdir(parents=True)
    with pytest.raises(ReleaseError, match="no plain file below"):
        read(copy, into)
    assert not [one for one in tmp_path.rglob("*") if one.name in ("up", "passwd")]


def test_a_link_is_no_file(copy: Path, tmp_path: Path) -> None:
    def evil(all_: list[Member]) -> list[Member]:
        link = tarfile.TarInfo("a")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        manifest = json.loads(all_[0][1]) | {"files": {"a": {"sha256": hashlib.sha256(b"").hexdigest(), "size": 0}}}
        return [(all_[0][0], json.dumps(manifest).encode()), (link, b"")]

    rewritten(copy, evil)
    with pytest.raises(ReleaseError, match="no plain file below"):
        read(copy, tmp_path)


def test_what_the_signature_says_must_be_what_the_manifest_says(copy: Path) -> None:
    for version, channel, minimum in (
        ("1.2.1", "canary", "1.0.0"),
        ("1.2.0", "stable", "1.0.0"),
        ("1.2.0", "canary", "0.1"),
    ):
        Path(f"{copy}{SUFFIX}").write_text(sign(copy, KEY, trusted_comment(version, channel, minimum)))
        with pytest.raises(ReleaseError, match="another version than its manifest"):
            read(copy)
    Path(f"{copy}{SUFFIX}").write_text(sign(copy, KEY, "timestamp:1580601600"))
    with pytest.raises(ReleaseError, match="trusted comment is none of a bundle"):
        read(copy)


def test_a_file_that_changes_between_two_readings_is_refused(made: Made, copy: Path, tmp_path: Path) -> None:
    bundle = signed(copy, [KEY.public])
    rewritten(copy, lambda all_: all_)  # another file, as good as the one that was checked
    copy.write_bytes(copy.read_bytes() + bytes(512))
    into = tmp_path / "into"
    into.mkdir()
    with pytest.raises(ReleaseError, match="changed while it was read"):
        read_bundle(copy, bundle, into)


def test_wheels_must_have_the_hashes_of_the_requirements(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "all", ignore=shutil.ignore_patterns("out"))
    a_wheel(tmp_path / "all/wheels", "borrowed", "1.0", {"borrowed.pth": "/somewhere/else\n"})
    with pytest.raises(ReleaseError, match=r"appliance\.txt"):
        small_bundle(tmp_path / "all", tmp_path / "out", KEY, "1.2.0")
    assert not list((tmp_path / "out").iterdir())


def test_the_commands(made: Made, copy: Path, tmp_path: Path) -> None:
    run = CliRunner()
    done = run.invoke(app, ["bundle", "keygen", "--out", str(tmp_path / "a.key"), "--json"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "a.key").stat().st_mode & 0o777 == 0o600
    assert run.invoke(app, ["bundle", "keygen", "--out", str(tmp_path / "a.key")]).exit_code == 1
    (tmp_path / "release.pub").write_text(KEY.public.encode())
    wrong = run.invoke(app, ["bundle", "verify", str(copy), "--key", str(tmp_path / "a.pub"), "--json"])
    assert wrong.exit_code == 1
    assert "is not trusted" in wrong.stderr and copy.name in wrong.stderr
    keys = ["--key", str(tmp_path / "a.pub"), "--key", str(tmp_path / "release.pub")]
    good = run.invoke(app, ["bundle", "verify", str(copy), *keys, "--json"])
    assert good.exit_code == 0, good.output
    said = json.loads(good.stdout)
    assert (said["version"], said["minimum"], said["key"], said["gpu"]) == ("1.2.0", "1.0.0", KEY.public.id, False)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=2))
def test_versions_are_compared_by_their_numbers(pair: list[tuple[int, int, int]]) -> None:
    first, second = (".".join(map(str, one)) for one in pair)
    assert (version_key(first) < version_key(second)) == (pair[0] < pair[1])


def test_versions_in_their_order() -> None:
    rising = ["0.9", "0.10", "1.0a1", "1.0b1", "1.0b2", "1.0rc1", "1.0", "1.0.1", "1.0.10", "1.10"]
    assert sorted(rising, key=version_key) == rising
    assert version_key("1.0") == version_key("1.0.0")
    for wrong in ("", "1", "v1.0", "1.0.", "1.0-dev", "01.0", "1.0.0.0.0", "1.0 ", "../1.0"):
        with pytest.raises(ReleaseError):
            version_key(wrong)
    with pytest.raises(ReleaseError, match="above the version"):
        trusted_comment("1.0", "stable", "1.1")
    with pytest.raises(ReleaseError, match="a channel"):
        trusted_comment("1.0", "a b", "1.0")


def test_another_key_of_another_number(made: Made) -> None:
    with pytest.raises(ReleaseError, match="is not trusted"):
        signed(made.bundle, [new_key().public])
