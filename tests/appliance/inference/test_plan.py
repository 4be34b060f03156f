"""TensorRT plans: built, proven, kept and found. Without a GPU by fakes of TensorRT and CuPy, which say so."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

from appliance.cli import app
from appliance.governance.package import PARITY, Package, PackageError, Parity
from appliance.inference.parity import Parity as Figures
from appliance.inference.parity import check_parity
from appliance.inference.plan import SINGLE, Gpu, PlanError, Record, build, compile_plan, find, plan_path, this_gpu
from appliance.inference.server import prepare, render_config
from appliance.inference.triton import Output, TritonError

from .fake_tensorrt import FakeTensorRT, answer, fake_cupy

TOLERANCE = 0.01


def listing(package: Package, **contents: bytes) -> Package:
    """The package with these files, and their digests among the others."""
    for name, content in contents.items():
        (package.folder / name).write_bytes(content)
    return replace(
        package,
        files={
            **package.files,
            **{name: f"sha256:{hashlib.sha256(one).hexdigest()}" for name, one in contents.items()},
        },
    )


def proven(package: Package, folder: Path, slabs: int = 3) -> Package:
    """The package with parity vectors that hold what the fakes answer."""
    folder.mkdir(parents=True)
    package = replace(
        package,
        folder=folder,
        parity=Parity(TOLERANCE),
        files=dict.fromkeys((PARITY, "model.onnx"), "sha256:" + 64 * "0"),
    )
    size, field = package.preprocessing.size, package.model.output("lesion_map").shape
    fields = np.random.default_rng(1).integers(-20, 90, (slabs, size, size)).astype(np.int16)
    nothing = np.zeros((slabs, len(package.labels))), np.zeros((slabs, *field))
    seen: list[NDArray[np.float32]] = []

    def look(part: NDArray[np.float32]) -> Output:
        seen.append(part)
        return answer(part, package.model)

    np.savez(folder / PARITY, fields=fields, probabilities=nothing[0], lesion_map=nothing[1])
    check_parity(listing(package, **{PARITY: (folder / PARITY).read_bytes()}), look)
    said = answer(np.concatenate(seen), package.model)
    np.savez(folder / PARITY, fields=fields, probabilities=said.probabilities, lesion_map=said.lesion_map)
    return listing(package, **{PARITY: (folder / PARITY).read_bytes(), "model.onnx": b"an ONNX model"})


@pytest.fixture
def package(reference: Package, tmp_path: Path) -> Package:
    return proven(reference, tmp_path / "package")


@pytest.fixture
def gpu(package: Package) -> Gpu:
    return Gpu(FakeTensorRT(package.model), fake_cupy(), "90")


@pytest.fixture
def plans(tmp_path: Path) -> Path:
    return tmp_path / "state" / "plans"


def test_a_plan_is_kept_with_what_it_was_built_from(package: Package, gpu: Gpu, plans: Path) -> None:
    record = build(plans, package, gpu)
    path = plan_path(plans, package, gpu)
    assert {one.name for one in plans.iterdir()} == {path.name, path.with_suffix(".json").name}
    assert path.name == f"ich_reference-{package.files['model.onnx'][7:23]}-trt10.13.2.6-sm90.plan"
    assert find(plans, package, gpu) == path.read_bytes() == b"a fake plan of an ONNX model"
    assert (record.onnx, record.vectors) == (package.files["model.onnx"], package.files[PARITY])
    assert (record.tensorrt, record.capability, record.precision) == ("10.13.2.6", "90", "fp32")
    assert (record.parity.slabs, record.parity.holds, record.parity.tolerance) == (3, True, TOLERANCE)
    assert record.plan == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    size = package.model.input.shape
    most = package.model.maximum_batch
    assert gpu.trt.profiles == [(package.model.input.name, (1, *size), (most, *size), (most, *size))]


def test_the_model_in_single_precision_is_taken_where_there_is_one(package: Package, gpu: Gpu, plans: Path) -> None:
    both = listing(package, **{SINGLE: b"the same in single precision"})
    assert build(plans, both, gpu).onnx == both.files[SINGLE]
    assert find(plans, both, gpu) == b"a fake plan of the same in single precision"
    with pytest.raises(PlanError, match="no TensorRT plan"):
        find(plans, package, gpu)


def test_more_slabs_than_a_batch_are_proven(reference: Package, tmp_path: Path, plans: Path) -> None:
    package = proven(replace(reference, model=replace(reference.model, maximum_batch=2)), tmp_path / "package", slabs=5)
    assert build(plans, package, Gpu(FakeTensorRT(package.model), fake_cupy(), "90")).parity.slabs == 5


@pytest.mark.parametrize("off", [TOLERANCE * 2, np.nan])
@pytest.mark.parametrize("fp16", [False, True])
def test_a_plan_that_answers_otherwise_is_not_kept(
    package: Package, gpu: Gpu, plans: Path, off: float, fp16: bool
) -> None:
    gpu.trt.off = off
    with pytest.raises(PlanError, match="not the model that was published") as told:
        build(plans, package, gpu, fp16=fp16)
    assert ("--fp16" in told.value.remedy) == fp16
    assert not plans.exists()


def test_a_failed_build_leaves_the_plan_that_was_there(package: Package, gpu: Gpu, plans: Path) -> None:
    build(plans, package, gpu)
    gpu.trt.off = 1.0
    with pytest.raises(PlanError):
        build(plans, package, gpu)
    assert find(plans, package, gpu)


def test_a_crash_between_the_two_files_serves_nothing(
    package: Package, gpu: Gpu, plans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(plans, package, gpu)
    real = Path.replace

    def full(self: Path, target: Path) -> Path:
        if target.suffix == ".json":
            raise OSError("no space left")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", full)
    monkeypatch.setattr("appliance.inference.plan.compile_plan", lambda *_, **__: b"a fake plan of something newer")
    with pytest.raises(OSError, match="no space"):
        build(plans, package, gpu)
    assert not [one for one in plans.iterdir() if one.suffix == ".part"]
    with pytest.raises(PlanError, match="digest"):
        find(plans, package, gpu)


@pytest.mark.parametrize(("version", "capability"), [("10.13.3.9", "90"), ("10.13.2.6", "89")])
def test_a_plan_for_another_gpu_or_tensorrt_does_not_serve(
    package: Package, gpu: Gpu, plans: Path, version: str, capability: str
) -> None:
    build(plans, package, gpu)
    other = Gpu(FakeTensorRT(package.model, version), fake_cupy(), capability)
    with pytest.raises(PlanError, match=f"sm{capability} and TensorRT {version}") as told:
        find(plans, package, other)
    assert "scanside models build" in told.value.remedy
    for suffix in (".plan", ".json"):  # under the other's name it does not serve either
        there = plan_path(plans, package, gpu).with_suffix(suffix)
        there.rename(plan_path(plans, package, other).with_suffix(suffix))
    with pytest.raises(PlanError, match="another package, model, GPU or TensorRT"):
        find(plans, package, other)


def test_a_plan_that_was_changed_does_not_serve(package: Package, gpu: Gpu, plans: Path) -> None:
    build(plans, package, gpu)
    path = plan_path(plans, package, gpu)
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(PlanError, match="digest") as told:
        find(plans, package, gpu)
    assert told.value.where == str(path)


@pytest.mark.parametrize("key", ["package", "onnx", "vectors", "tensorrt", "capability"])
def test_a_record_of_something_else_does_not_serve(package: Package, gpu: Gpu, plans: Path, key: str) -> None:
    change(plans, package, gpu, {key: "sha256:" + 64 * "0"})
    with pytest.raises(PlanError, match="another package"):
        find(plans, package, gpu)


@pytest.mark.parametrize("change_", [{"plan": None}, {"more": 1}, {"precision": "int4"}, {"parity": {}}])
def test_a_record_that_is_none_does_not_serve(package: Package, gpu: Gpu, plans: Path, change_: dict[str, Any]) -> None:
    change(plans, package, gpu, change_)
    with pytest.raises(PlanError, match="no record of a plan"):
        find(plans, package, gpu)


@pytest.mark.parametrize("figure", ["probability", "lesion_map"])
def test_what_did_not_hold_does_not_serve(package: Package, gpu: Gpu, plans: Path, figure: str) -> None:
    build(plans, package, gpu)
    found = json.loads(plan_path(plans, package, gpu).with_suffix(".json").read_text())["parity"]
    change(plans, package, gpu, {"parity": {**found, figure: 0.02, "tolerance": 0.5}})
    with pytest.raises(PlanError, match=r"not the model that was published.*0\.01 is allowed"):
        find(plans, package, gpu)


@pytest.mark.parametrize("suffix", [".plan", ".json"])
def test_a_missing_half_does_not_serve(package: Package, gpu: Gpu, plans: Path, suffix: str) -> None:
    build(plans, package, gpu)
    gone = plan_path(plans, package, gpu).with_suffix(suffix)
    gone.unlink()
    with pytest.raises(PlanError, match="no TensorRT plan") as told:
        find(plans, package, gpu)
    assert told.value.where == str(gone)


def change(plans: Path, package: Package, gpu: Gpu, values: dict[str, Any]) -> None:
    """Build a plan and alter its record."""
    build(plans, package, gpu)
    path = plan_path(plans, package, gpu).with_suffix(".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_without_parity_vectors_nothing_is_built_or_served(package: Package, gpu: Gpu, plans: Path) -> None:
    bare = replace(package, parity=None, files={"model.onnx": package.files["model.onnx"]})
    with pytest.raises(PackageError, match="no parity vectors"):
        build(plans, bare, gpu)
    assert not gpu.trt.profiles
    with pytest.raises(PackageError, match="no parity vectors"):
        find(plans, bare, gpu)


def test_a_model_that_is_not_the_stated_one_is_not_built(package: Package, gpu: Gpu, plans: Path) -> None:
    (package.folder / "model.onnx").write_bytes(b"another")
    with pytest.raises(PackageError, match="digest"):
        build(plans, package, gpu)


@pytest.mark.parametrize(
    ("lacks", "says"),
    [
        ("readable", "cannot read the model: zero point is unsigned"),
        ("buildable", "cannot build the plan: there is no implementation"),
        ("runnable", "cannot run the plan: the plan is of another version"),
    ],
)
def test_what_tensorrt_says_is_passed_on(package: Package, gpu: Gpu, plans: Path, lacks: str, says: str) -> None:
    setattr(gpu.trt, lacks, False)
    with pytest.raises(PlanError, match=says):
        build(plans, package, gpu)


def test_half_precision_only_where_tensorrt_has_it(package: Package, gpu: Gpu, plans: Path) -> None:
    assert build(plans, package, gpu, fp16=True).precision == "fp16"
    assert gpu.trt.flags == ["fp16"]
    newer = Gpu(FakeTensorRT(package.model, "11.4.0.106", fp16=False), fake_cupy(), "90")
    with pytest.raises(PlanError, match="from the model alone"):
        build(plans, package, newer, fp16=True)


@pytest.mark.parametrize(
    "change_", [{"names": ["slabs", "probabilities"]}, {"dtype": "float16"}, {"names": ["a", "b", "c"]}]
)
def test_an_engine_with_other_tensors_is_never_run(
    package: Package, gpu: Gpu, plans: Path, change_: dict[str, Any]
) -> None:
    for name, value in change_.items():
        setattr(gpu.trt, name, value)
    with pytest.raises(PlanError, match="are stated"):
        build(plans, package, gpu)


def test_an_engine_with_another_shape_is_never_run(package: Package, gpu: Gpu, plans: Path) -> None:
    wide = replace(package.model.output("lesion_map"), shape=(1, 128, 128))
    gpu.trt.model = replace(package.model, outputs=(package.model.output("probabilities"), wide))
    with pytest.raises(PlanError, match="lesion_map has not the stated shape"):
        build(plans, package, gpu)


def installed(monkeypatch: pytest.MonkeyPatch, cupy: Any, trt: Any) -> None:
    """What `import cupy` and `import tensorrt` give; None: not installed."""
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)


def no_gpu(number: int) -> Any:
    raise RuntimeError("cudaErrorInsufficientDriver")


@pytest.mark.parametrize(
    ("cupy", "trt", "says"),
    [
        (None, None, "CuPy is not there"),
        (SimpleNamespace(cuda=SimpleNamespace(Device=no_gpu)), None, "there is no NVIDIA GPU: cudaError"),
        (fake_cupy(), None, "TensorRT is not there"),
    ],
)
def test_what_a_gpu_box_lacks_is_named(monkeypatch: pytest.MonkeyPatch, cupy: Any, trt: Any, says: str) -> None:
    installed(monkeypatch, cupy, trt)
    with pytest.raises(PlanError, match=says):
        this_gpu()


def test_a_gpu_box_is_found(monkeypatch: pytest.MonkeyPatch, package: Package) -> None:
    trt = FakeTensorRT(package.model)
    installed(monkeypatch, fake_cupy("120"), trt)
    found = this_gpu()
    assert (found.trt, found.tensorrt, found.capability) == (trt, "10.13.2.6", "120")


def test_a_gpu_repository_holds_the_plans(
    package: Package, gpu: Gpu, plans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, gpu.cupy, gpu.trt)
    home = tmp_path / "triton"
    with pytest.raises(PlanError, match="no TensorRT plan for this GPU") as told:
        prepare(tmp_path, home, [package], "gpu", plans=plans)
    assert "scanside models build" in told.value.remedy
    assert not (home / "repository").exists()
    build(plans, package, gpu)
    (home / "repository" / "stale").mkdir(parents=True)
    with pytest.raises(TritonError, match="no TensorRT backend") as made:
        prepare(tmp_path, home, [package], "gpu", plans=plans)
    assert str(home / "repository") in made.value.remedy
    files = {str(one.relative_to(home)): one.read_bytes() for one in home.rglob("*") if one.is_file()}
    assert files == {
        "repository/ich_reference/1/model.plan": find(plans, package, gpu),
        "repository/ich_reference/config.pbtxt": render_config(package, "gpu").encode(),
    }
    plan_path(plans, package, gpu).write_bytes(b"another")
    with pytest.raises(PlanError, match="digest"):
        prepare(tmp_path, home, [package], "gpu", plans=plans)
    assert not (home / "repository").exists()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "scanside.toml"
    path.write_text('[box]\nstate_directory = "state"\n')
    return path


def command(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["--config", str(config), "models", "build", *arguments])


def test_the_command_builds_what_runs(
    config: Path, reference: Package, plans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(FakeTensorRT(reference.model), fake_cupy(), "90")
    installed(monkeypatch, gpu.cupy, gpu.trt)
    # The fake engine does not answer as the shipped model does.
    refused = command(config)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "not the model that was published" in refused.stderr
    assert not plans.exists()
    agrees = Figures(3, 0.0, 0.0, "any", TOLERANCE)
    monkeypatch.setattr("appliance.inference.plan.check_parity", lambda package, ask: agrees)
    built = command(config, "ich_reference", "--fp16", "--json")
    assert built.exit_code == 0, built.output
    (plan,) = json.loads(built.stdout)["plans"]
    assert (plan["path"], plan["precision"]) == (str(plan_path(plans, reference, gpu)), "fp16")
    assert find(plans, reference, gpu)
    assert "TensorRT 10.13.2.6, sm90, fp32" in command(config).stdout


def test_the_command_says_that_there_is_no_gpu(config: Path, plans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, SimpleNamespace(cuda=SimpleNamespace(Device=no_gpu)), None)
    refused = command(config)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "there is no NVIDIA GPU" in refused.stderr
    assert not plans.exists()


def test_the_real_tensorrt_for_rtx_builds_the_shipped_model(reference: Package) -> None:
    """For another GPU than this machine has: the names and arguments are TensorRT's own, the engine is not run."""
    trt = pytest.importorskip("tensorrt_rtx_bindings", reason="needs tensorrt-rtx-cu13-bindings and its -libs")

    class Builder(trt.Builder):  # type: ignore[misc, name-defined]
        def create_builder_config(self) -> Any:
            config = super().create_builder_config()
            config.num_compute_capabilities = 1
            assert config.set_compute_capability(trt.ComputeCapability.SM86, 0)
            return config

    for_sm86 = SimpleNamespace(**{**vars(trt), "Builder": Builder})
    source = SINGLE if SINGLE in reference.files else "model.onnx"
    onnx = (reference.folder / source).read_bytes()
    assert len(compile_plan(for_sm86, onnx, reference.model)) > len(onnx) // 4
    with pytest.raises(PlanError, match="cannot read the model"):
        compile_plan(for_sm86, onnx[: len(onnx) // 2], reference.model)
    if source == SINGLE:  # why there is one
        with pytest.raises(PlanError, match="cannot read the model"):
            compile_plan(for_sm86, (reference.folder / "model.onnx").read_bytes(), reference.model)
    with pytest.raises(PlanError, match="from the model alone"):
        compile_plan(for_sm86, onnx, reference.model, fp16=True)
    renamed = replace(reference.model, input=replace(reference.model.input, name="another"))
    with pytest.raises(PlanError, match=r"cannot build the plan: .*slabs"):
        compile_plan(for_sm86, onnx, renamed)


@pytest.mark.gpu
@pytest.mark.slow
def test_a_real_gpu_builds_and_proves_the_shipped_model(reference: Package, plans: Path) -> None:
    try:
        gpu = this_gpu()
    except PlanError as error:
        pytest.skip(error.what)
    if reference.parity is None:
        pytest.skip("the package has no parity vectors")
    record: Record = build(plans, reference, gpu)
    assert record.parity.holds
    assert find(plans, reference, gpu)
