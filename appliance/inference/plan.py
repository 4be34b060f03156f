"""TensorRT plans: built on the box from a package's ONNX, and served only after they proved to be the model.

A plan is code for one GPU architecture and one version of TensorRT, so no package can hold it. It lies below the state
directory, beside a record of what it was built from and how far its answers were from the published ones::

    plans/<package>-<start of the ONNX's SHA-256>-trt<version>-sm<compute capability>.plan
    plans/<the same>.json
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from appliance.governance.package import PARITY, Model, Package, PackageError, verify
from dicom_io.errors import ScansideError

from .parity import Parity, check_parity
from .triton import Output

log = logging.getLogger(__name__)

SINGLE = "model_fp32.onnx"
"""What a package lists whose model.onnx is quantised for CPUs; TensorRT does not read that one."""

_BUILD = "run `scanside models build`"
_WHERE = "TensorRT"


class PlanError(ScansideError):
    """There is no TensorRT plan that may serve."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """The first GPU of this box, and the TensorRT that builds for it.

    Attributes:
        trt: the module ``tensorrt``.
        cupy: the module ``cupy``.
        capability: compute capability without the dot, as "90".
    """

    trt: Any
    cupy: Any
    capability: str

    @property
    def tensorrt(self) -> str:
        """TensorRT's version, as "10.13.2.6"; a plan runs on no other."""
        return str(self.trt.__version__)


@checked(frozen=True, slots=True, config=ConfigDict(extra="forbid", strict=True))
class Record:
    """What a plan was built from, and how it did. Digests are "sha256:…".

    Attributes:
        plan: digest of the plan.
        onnx: digest of the ONNX file that it was built from.
        vectors: digest of the slabs and answers that it was proven against.
        tensorrt, capability: as `Gpu` has them.
        built_at: UTC, ISO 8601.
    """

    package: str
    version: str
    plan: str
    onnx: str
    vectors: str
    tensorrt: str
    capability: str
    precision: Literal["fp32", "fp16"]
    parity: Parity
    built_at: str


_RECORD = TypeAdapter(Record)


def this_gpu() -> Gpu:
    """This box's GPU.

    Raises:
        PlanError: there is none, or CuPy or TensorRT is not installed.
    """
    from .cuda import import_cupy  # no CPU box needs what it imports

    try:
        cupy = import_cupy()
    except ImportError as error:
        raise PlanError(f"CuPy is not there: {error}", _WHERE, "install scanside's extra gpu") from error
    try:
        capability = str(cupy.cuda.Device(0).compute_capability)
    except Exception as error:  # CuPy's errors are classes of modules that load only with CUDA
        raise PlanError(
            f"there is no NVIDIA GPU: {error}", _WHERE, 'run this on the GPU box, or set box.device = "cpu"'
        ) from error
    try:
        trt = importlib.import_module("tensorrt")
    except ImportError as error:
        raise PlanError(
            f"TensorRT is not there: {error}", _WHERE, "install the wheel `tensorrt` in the version that Triton has"
        ) from error
    return Gpu(trt, cupy, capability)


def plan_path(directory: Path, package: Package, gpu: Gpu) -> Path:
    """Where the plan of a package for a GPU lies; its record lies beside it with the suffix .json."""
    start = package.files[_source(package)].removeprefix("sha256:")[:16]
    return directory / f"{package.name}-{start}-trt{gpu.tensorrt}-sm{gpu.capability}.plan"


def build(directory: Path, package: Package, gpu: Gpu, *, fp16: bool = False) -> Record:
    """Build a package's plan for this GPU and keep it if it answers as the published model does; takes minutes.

    A plan that does not hold leaves nothing behind, and one that was there before as it is.

    Args:
        directory: of plans; made if absent.
        fp16: let TensorRT also use half precision; the tolerance of the package stays the same.

    Raises:
        PackageError: the package has no parity vectors, or a file of it is not the one it states.
        PlanError: TensorRT cannot build or run it, or its answers are too far from the published ones.
    """
    vectors, onnx = _vectors(package), verify(package, _source(package))
    plan = compile_plan(gpu.trt, onnx, package.model, fp16=fp16)
    parity = check_parity(package, runner(gpu, plan, package.model))
    path = plan_path(directory, package, gpu)
    if not parity.holds:
        raise PlanError(
            f"it is not the model that was published: {parity}",
            path.name,
            "build it without --fp16" if fp16 else "do not serve it; try another version of TensorRT",
        )
    record = Record(
        package.name,
        package.version,
        _digest(plan),
        package.files[_source(package)],
        vectors,
        gpu.tensorrt,
        gpu.capability,
        "fp16" if fp16 else "fp32",
        parity,
        datetime.now(UTC).isoformat(timespec="seconds"),
    )
    directory.mkdir(parents=True, exist_ok=True)
    # The record last: between the two, the record that was there before does not fit, and nothing is served.
    _write(path, plan)
    _write(path.with_suffix(".json"), _RECORD.dump_json(record, indent=2) + b"\n")
    return record


def find(directory: Path, package: Package, gpu: Gpu) -> bytes:
    """The plan that serves a package on this GPU, after holding it against its record and that against the package.

    Raises:
        PackageError: the package has no parity vectors.
        PlanError: no plan was built for this model, GPU and TensorRT, it is not the one that was built, or what it was
            proven against is not what the package holds now.
    """
    path = plan_path(directory, package, gpu)
    vectors = _vectors(package)
    try:
        content = path.read_bytes()
        record = _RECORD.validate_json(path.with_suffix(".json").read_bytes())
    except FileNotFoundError as error:
        made_for = f"sm{gpu.capability} and TensorRT {gpu.tensorrt}"
        raise PlanError(
            f"{package.name} has no TensorRT plan for this GPU ({made_for})", str(error.filename), _BUILD
        ) from error
    except OSError as error:
        raise PlanError(error.strerror or str(error), str(error.filename), "make it readable for this user") from error
    except ValidationError as error:
        raise PlanError("this is no record of a plan", str(path.with_suffix(".json")), _BUILD) from error
    stated = (record.package, record.onnx, record.vectors, record.tensorrt, record.capability)
    if stated != (package.name, package.files[_source(package)], vectors, gpu.tensorrt, gpu.capability):
        raise PlanError(
            "its record is of another package, model, GPU or TensorRT", str(path.with_suffix(".json")), _BUILD
        )
    if record.plan != _digest(content):
        raise PlanError(f"its digest is {_digest(content)}, its record states {record.plan}", str(path), _BUILD)
    assert package.parity is not None  # there are vectors
    parity = replace(record.parity, tolerance=package.parity.tolerance)
    if not parity.holds:
        raise PlanError(f"it is not the model that was published: {parity}", str(path), _BUILD)
    return content


def compile_plan(trt: Any, onnx: bytes, model: Model, *, fp16: bool = False) -> bytes:
    """A serialised engine for batches of one to the model's largest.

    Args:
        trt: the module ``tensorrt`` (10 or 11), or ``tensorrt_rtx``, which has the same names.
        onnx: a model whose first dimension is the batch.
        fp16: needs weakly typed networks, which TensorRT 11 and TensorRT-RTX no longer have.

    Raises:
        PlanError: it cannot be read or built; says what TensorRT said.
    """
    flag = getattr(trt.BuilderFlag, "FP16", None)
    if fp16 and flag is None:
        raise PlanError(
            f"TensorRT {trt.__version__} takes the precision from the model alone", _WHERE, "build without --fp16"
        )
    logger = _logger(trt)
    builder = _made(trt.Builder, logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx):
        said = "; ".join(str(parser.get_error(n).desc()) for n in range(parser.num_errors))
        raise PlanError(
            f"TensorRT cannot read the model: {said or logger.said()}", _WHERE, f"get a package that lists {SINGLE}"
        )
    config = builder.create_builder_config()
    if fp16:
        config.set_flag(flag)
    shape, largest = model.input.shape, model.maximum_batch
    profile = builder.create_optimization_profile()
    profile.set_shape(model.input.name, (1, *shape), (largest, *shape), (largest, *shape))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise PlanError(f"TensorRT cannot build the plan: {logger.said()}", _WHERE, "see what it says")
    return bytes(plan)


def runner(gpu: Gpu, plan: bytes, model: Model) -> Callable[[NDArray[np.float32]], Output]:
    """What asks a plan on this GPU: (n, channels, size, size) in 0..1 to the answers.

    Raises:
        PlanError: TensorRT cannot run it, or its tensors are not the model's; also what it returns raises this.
    """
    trt, cupy = gpu.trt, gpu.cupy
    logger = _logger(trt)
    engine = _made(trt.Runtime, logger).deserialize_cuda_engine(plan)
    context = engine and engine.create_execution_context()
    if not context:
        raise PlanError(f"TensorRT cannot run the plan: {logger.said()}", _WHERE, "see what it says")
    # TensorRT reads and writes where it is told to, so a tensor of another type or shape would be a wild one.
    names = [engine.get_tensor_name(n) for n in range(engine.num_io_tensors)]
    expected = [model.input.name, *(output.name for output in model.outputs)]
    if sorted(names) != sorted(expected) or any(engine.get_tensor_dtype(name) != trt.float32 for name in names):
        raise PlanError(
            f"the model has the tensors {', '.join(names)}; FP32 {', '.join(expected)} are stated",
            _WHERE,
            "correct the package",
        )
    stream = cupy.cuda.Stream(non_blocking=True)

    def ask(slabs: NDArray[np.float32]) -> Output:
        with stream:
            buffers = {model.input.name: cupy.asarray(np.ascontiguousarray(slabs, np.float32))}
            context.set_input_shape(model.input.name, slabs.shape)
            for output in model.outputs:
                # An answer that was never written does not pass for one.
                buffers[output.name] = cupy.full((len(slabs), *output.shape), np.nan, np.float32)
            for name, buffer in buffers.items():
                if tuple(context.get_tensor_shape(name)) != buffer.shape:
                    raise PlanError(f"{name} has not the stated shape {buffer.shape}", _WHERE, "correct the package")
                context.set_tensor_address(name, buffer.data.ptr)
            if not context.execute_async_v3(stream.ptr):
                raise PlanError(f"TensorRT cannot run the plan: {logger.said()}", _WHERE, "see what it says")
            stream.synchronize()
            return Output(cupy.asnumpy(buffers["probabilities"]), cupy.asnumpy(buffers["lesion_map"])[:, 0])

    return ask


def _source(package: Package) -> str:
    """The file that a plan is built from."""
    return SINGLE if SINGLE in package.files else "model.onnx"


def _vectors(package: Package) -> str:
    """The digest of the package's parity vectors."""
    if package.parity is None:
        raise PackageError("it has no parity vectors to prove a plan by", str(package.folder), "get a package that has")
    return package.files[PARITY]


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _made(kind: Callable[[Any], Any], logger: Any) -> Any:
    """A builder or runtime; where CUDA does not start, the binding raises this and the logger knows why."""
    try:
        return kind(logger)
    except TypeError as error:
        raise PlanError(
            f"TensorRT does not start: {logger.said() or error}", _WHERE, "install a driver that fits it"
        ) from error


def _logger(trt: Any) -> Any:
    """Takes TensorRT's messages: its own logger would print them among the command's output."""
    severity = trt.ILogger.Severity

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, level: Any, message: str) -> None:
            if level in (severity.INTERNAL_ERROR, severity.ERROR):
                self.errors.append(message)
            elif level == severity.WARNING:
                log.warning("TensorRT: %s", message)

        def said(self) -> str:
            return "; ".join(self.errors)

    return Logger()


def _write(path: Path, content: bytes) -> None:
    """Write a file so that it is either whole and synced under its name, or not there."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
