"""Putting the inference server together: its model repository, its environment, its command."""

from __future__ import annotations

import re
import shutil
import venv
from pathlib import Path
from typing import Literal

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from appliance.governance.package import Package, PackageError, load
from appliance.inference.server import Device, prepare, render_config, write_repository
from appliance.inference.triton import DIGEST_PARAMETER, TritonError

from .conftest import REFERENCE, seeing


@pytest.fixture
def package(tmp_path: Path) -> Package:
    """A copy of the reference package."""
    folder = tmp_path / "package"
    shutil.copytree(REFERENCE, folder, ignore=shutil.ignore_patterns("package.sig"))
    return load(folder, allow_unsigned=True)


def parse(text: str) -> pb.ModelConfig:
    return text_format.Parse(text, pb.ModelConfig())


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("neighbours", [0, 1])
def test_the_configuration_is_one_that_triton_knows(
    package: Package, device: Device, neighbours: Literal[0, 1]
) -> None:
    package = seeing(package, neighbours)
    dims = [9 if neighbours else 3, 256, 256]
    config = parse(render_config(package, device))
    assert config.name == "ich_reference"
    assert config.max_batch_size == 16
    (tensor,) = config.input
    assert (tensor.name, tensor.data_type, list(tensor.dims)) == ("slabs", pb.TYPE_FP32, dims)
    outputs = {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in config.output}
    assert outputs == {"probabilities": (pb.TYPE_FP32, [6]), "lesion_map": (pb.TYPE_FP32, [1, 64, 64])}
    assert config.HasField("dynamic_batching")
    assert list(config.version_policy.specific.versions) == [1]
    assert config.parameters[DIGEST_PARAMETER].string_value == package.files["model.onnx"]
    (warmup,) = config.model_warmup
    assert list(warmup.inputs["slabs"].dims) == dims


def test_the_targets_differ_in_backend_file_and_place_alone(package: Package) -> None:
    cpu, gpu = parse(render_config(package, "cpu")), parse(render_config(package, "gpu"))
    assert (cpu.backend, cpu.platform, cpu.default_model_filename) == ("onnxruntime", "", "model.onnx")
    assert (gpu.backend, gpu.platform, gpu.default_model_filename) == ("tensorrt", "tensorrt_plan", "model.plan")
    assert [group.kind for group in cpu.instance_group] == [pb.ModelInstanceGroup.KIND_CPU]
    assert [group.kind for group in gpu.instance_group] == [pb.ModelInstanceGroup.KIND_GPU]
    for config in (cpu, gpu):
        for name in ("backend", "platform", "default_model_filename", "instance_group"):
            config.ClearField(name)
    assert cpu == gpu


def test_the_oracle_names_an_unknown_field(package: Package) -> None:
    with pytest.raises(text_format.ParseError, match="max_batch_sizes"):
        parse(render_config(package, "cpu").replace("max_batch_size", "max_batch_sizes"))


def test_a_repository_holds_the_model_and_its_configuration(package: Package, tmp_path: Path) -> None:
    """The plan of a GPU box is in test_plan.py."""
    repository, name = tmp_path / "repository", "model.onnx"
    write_repository(repository, [package], "cpu")
    files = {str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()}
    assert files == {"ich_reference/config.pbtxt", f"ich_reference/1/{name}"}
    assert (repository / "ich_reference" / "1" / name).read_bytes() == (package.folder / name).read_bytes()
    assert (repository / "ich_reference" / "config.pbtxt").read_text("utf-8") == render_config(package, "cpu")


def test_a_model_that_is_not_the_stated_one_is_not_served(package: Package, tmp_path: Path) -> None:
    (package.folder / "model.onnx").write_bytes(b"another")
    with pytest.raises(PackageError, match="digest"):
        write_repository(tmp_path / "repository", [package], "cpu")


def test_no_environment(reference: Package, tmp_path: Path) -> None:
    with pytest.raises(TritonError, match="no such environment") as caught:
        prepare(tmp_path / "nowhere", tmp_path / "home", [reference], "cpu")
    assert caught.value.where == str(tmp_path / "nowhere")
    assert "triton.txt" in caught.value.remedy


def fake_environment(folder: Path, **versions: str) -> Path:
    """An environment that says it holds these packages."""
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python3*/site-packages")
    for name, version in versions.items():
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


@pytest.mark.parametrize(
    ("versions", "says"),
    [
        ({}, "nvidia-pytriton is not installed"),
        ({"nvidia_pytriton": "0.7.0", "numpy": "1.26.4"}, "onnxruntime is not installed"),
        ({"nvidia_pytriton": "0.7.0", "numpy": "2.0.0", "onnxruntime": "1.32.0"}, r"numpy 2\.0\.0 silently corrupts"),
    ],
)
def test_an_environment_that_would_not_do(
    reference: Package, tmp_path: Path, versions: dict[str, str], says: str
) -> None:
    environment = fake_environment(tmp_path / "environment", **versions)
    with pytest.raises(TritonError, match=says):
        prepare(environment, tmp_path / "home", [reference], "cpu")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.interop
def test_preparing_again_gives_the_same(
    reference: Package, triton_environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    first = prepare(triton_environment, home, [reference], "cpu")
    before = contents(home)
    (home / "repository" / "stale").mkdir()
    (home / "repository" / "stale" / "config.pbtxt").write_text("name: 'stale'")
    (home / "backends" / "onnxruntime" / "model.py").write_text("broken")
    monkeypatch.chdir(tmp_path)
    assert prepare(triton_environment, Path("home"), [reference], "cpu") == first
    assert contents(home) == before


@pytest.mark.interop
def test_the_server_listens_to_this_machine_alone(reference: Package, triton_environment: Path, tmp_path: Path) -> None:
    launch = prepare(triton_environment, tmp_path, [reference], "cpu", grpc_port=1, http_port=2, metrics_port=3)
    addresses = [part for part in launch.command if re.match(r"--\w+-address=", part)]
    assert sorted(addresses) == [f"--{name}-address=127.0.0.1" for name in ("grpc", "http", "metrics")]
    assert {"--grpc-port=1", "--http-port=2", "--metrics-port=3"} < set(launch.command)
    assert "PYTHONPATH" not in launch.env


@pytest.mark.interop
def test_what_a_killed_server_of_this_home_left_is_removed(
    reference: Package, triton_environment: Path, tmp_path: Path
) -> None:
    launch = prepare(triton_environment, tmp_path, [reference], "cpu")
    (prefix,) = [part.rsplit("=", 1)[1] for part in launch.command if "shm-region-prefix-name" in part]
    left, other = Path("/dev/shm") / f"{prefix}left", Path("/dev/shm") / "scanside-stub-000000000000-left"
    try:
        for path in (left, other):
            path.write_bytes(b"")
        prepare(triton_environment, tmp_path, [reference], "cpu")
        assert not left.exists()
        assert other.exists()
    finally:
        for path in (left, other):
            path.unlink(missing_ok=True)
