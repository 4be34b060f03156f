"""Puts the inference server together: nvidia-pytriton's tritonserver with our backend and models.

The home folder is made anew from three sources each time: the server's environment (a virtual environment of its
own that holds nvidia-pytriton, numpy<2 and onnxruntime), the backends and the model packages::

    home/backends/python/        the server's Python backend, with the stub of the environment's Python
    home/backends/onnxruntime/   ours; runs within the Python backend
    home/repository/<model>/     config.pbtxt and the version folder

Files are copied, because the server refuses a backend that is a link out of its backend directory.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from appliance.governance.package import Package, Tensor, verify

from .plan import find, this_gpu
from .triton import DIGEST_PARAMETER, ROUTINE, SHARED_MEMORY, VERSION, TritonError

Device = Literal["cpu", "gpu"]

BACKENDS = {"cpu": ("onnxruntime", "model.onnx", "KIND_CPU"), "gpu": ("tensorrt", "model.plan", "KIND_GPU")}
"""Device → backend, model file, kind of instance."""

_INSTALL = "make it with Python 3.11 or 3.12 and install requirements/triton.txt into it"

_PROBE = """
import importlib.metadata as m, json, sys, sysconfig as s
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return ""
print(json.dumps({
    "python": "%d.%d" % sys.version_info[:2],
    "site": s.get_path("platlib"),
    "soname": s.get_config_var("INSTSONAME") or "",
    "folders": [s.get_config_var("LIBDIR") or "", sys.base_prefix + "/lib"],
    "packages": {name: version(name) for name in ("nvidia-pytriton", "numpy", "onnxruntime")},
}))
"""


@dataclass(frozen=True, slots=True)
class Launch:
    """How the server is started: the command and its whole environment. Both hold absolute paths only."""

    command: list[str]
    env: dict[str, str]


def prepare(
    environment: Path,
    home: Path,
    packages: Sequence[Package],
    device: Device,
    *,
    plans: Path | None = None,
    grpc_port: int = 8001,
    http_port: int = 8000,
    metrics_port: int = 8002,
) -> Launch:
    """Make the server's home folder and say how to start it. The server must not be running from it.

    The same arguments give the same files and the same answer, whatever the folder held before. Shared memory that a
    killed server of this home left behind is removed.

    Args:
        environment: virtual environment with nvidia-pytriton.
        home: made if absent; its ``backends`` and ``repository`` are replaced.
        packages: the models to serve.
        device: for "gpu" the repository is made, and then it is refused: the bundled server has no TensorRT backend.
        plans: folder of TensorRT plans, for "gpu".

    Raises:
        TritonError: the environment cannot run the server.
        PlanError: there is no plan that may serve a package on this box's GPU.
        PackageError: a model file is not the one its package states.
    """
    home = home.absolute()
    backends, repository = home / "backends", home / "repository"
    if device == "gpu":
        shutil.rmtree(repository, ignore_errors=True)
        write_repository(repository, packages, device, plans)
        raise TritonError(
            "the server of nvidia-pytriton has no TensorRT backend",
            str(environment),
            f"run NVIDIA's own Triton on {repository}, which holds the plans for this GPU; set triton.managed = false",
        )
    site, python, libraries = _inspect(environment)
    for folder in (backends, repository):
        shutil.rmtree(folder, ignore_errors=True)
    bundle = site / "pytriton" / "tritonserver"
    (backends / "python").mkdir(parents=True)
    for source in (
        bundle / "backends" / "python" / "libtriton_python.so",
        bundle / "backends" / "python" / "triton_python_backend_utils.py",
        bundle / "python_backend_stubs" / python / "triton_python_backend_stub",
    ):
        if not source.is_file():
            raise TritonError(f"nvidia-pytriton lacks {source.relative_to(site)}", str(environment), _INSTALL)
        shutil.copy(source, backends / "python")
    (backends / "onnxruntime").mkdir()
    code = files("triton_models").joinpath("backends", "onnxruntime", "model.py").read_bytes()
    (backends / "onnxruntime" / "model.py").write_bytes(code)
    write_repository(repository, packages, device)

    prefix = f"scanside-stub-{hashlib.sha256(str(home).encode()).hexdigest()[:12]}-"
    for left in SHARED_MEMORY.glob(f"{prefix}*"):
        left.unlink(missing_ok=True)
    command = [
        str(bundle / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        f"--backend-config=python,shm-region-prefix-name={prefix}",
        "--model-control-mode=none",
        "--disable-auto-complete-config",
        "--exit-on-error=true",
        "--exit-timeout-secs=5",
        "--http-address=127.0.0.1",
        f"--http-port={http_port}",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={grpc_port}",
        "--metrics-address=127.0.0.1",
        f"--metrics-port={metrics_port}",
        "--allow-gpu-metrics=false",
        "--pinned-memory-pool-byte-size=0",
        "--log-verbose=0",
    ]
    env = {
        # The stub finds its Python's packages by looking for python3 along PATH.
        "PATH": f"{environment.absolute() / 'bin'}:/usr/bin:/bin",
        "LD_LIBRARY_PATH": f"{libraries}:{site / 'nvidia_pytriton.libs'}",
        "LANG": "C.UTF-8",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return Launch(command, env)


def write_repository(repository: Path, packages: Sequence[Package], device: Device, plans: Path | None = None) -> None:
    """Write a model repository that holds exactly these packages; nothing is written unless all may serve.

    Args:
        repository: must not exist, or be empty.
        device: "cpu" takes each package's model.onnx, "gpu" its plan for the GPU of this box.
        plans: folder of TensorRT plans; "gpu" needs it.

    Raises:
        PackageError: a model file is not the one its package states.
        PlanError: there is no plan that may serve a package on this box's GPU.
    """
    name = BACKENDS[device][1]
    if device == "cpu":
        models = [verify(package, name) for package in packages]
    elif plans is None:
        raise ValueError("a GPU serves plans; say where they are")
    else:
        gpu = this_gpu()
        models = [find(plans, package, gpu) for package in packages]
    repository.mkdir(parents=True, exist_ok=True)
    for package, content in zip(packages, models, strict=True):
        folder = repository / package.model.triton_name
        (folder / VERSION).mkdir(parents=True)
        (folder / VERSION / name).write_bytes(content)
        (folder / "config.pbtxt").write_text(render_config(package, device), encoding="utf-8")


def render_config(package: Package, device: Device) -> str:
    """The model's config.pbtxt for a device (Triton's ModelConfig message as protobuf text)."""
    backend, filename, kind = BACKENDS[device]
    model = package.model
    platform = 'platform: "tensorrt_plan"\n' if device == "gpu" else ""
    outputs = ",\n".join(_tensor(tensor) for tensor in model.outputs)
    dims = ", ".join(map(str, model.input.shape))
    return f"""\
# {package.title}, {package.version}; rendered for {device}.
name: "{model.triton_name}"
backend: "{backend}"
{platform}default_model_filename: "{filename}"
max_batch_size: {model.maximum_batch}
input [
{_tensor(model.input)}
]
output [
{outputs}
]
version_policy {{ specific {{ versions: [ {VERSION} ] }} }}
instance_group [ {{ count: 1 kind: {kind} }} ]
dynamic_batching {{ priority_levels: {ROUTINE} default_priority_level: {ROUTINE} }}
model_warmup [
  {{
    name: "zeros"
    batch_size: 1
    inputs {{
      key: "{model.input.name}"
      value {{ data_type: TYPE_{model.input.datatype} dims: [ {dims} ] zero_data: true }}
    }}
  }}
]
parameters {{ key: "{DIGEST_PARAMETER}" value {{ string_value: "{package.files["model.onnx"]}" }} }}
"""


def _tensor(tensor: Tensor) -> str:
    dims = ", ".join(map(str, tensor.shape))
    return f'  {{ name: "{tensor.name}" data_type: TYPE_{tensor.datatype} dims: [ {dims} ] }}'


def _inspect(environment: Path) -> tuple[Path, str, str]:
    """(site-packages, "3.11", folder of its libpython) of the server's environment.

    Raises:
        TritonError: it is absent, incomplete, or would corrupt tensors.
    """
    python = environment.absolute() / "bin" / "python3"
    where = str(environment)
    try:
        answer = subprocess.run(
            [python, "-I", "-c", _PROBE], capture_output=True, text=True, timeout=60, check=True, cwd="/"
        ).stdout
    except FileNotFoundError as error:
        raise TritonError("there is no such environment", where, _INSTALL) from error
    except (OSError, subprocess.SubprocessError) as error:
        raise TritonError(f"its Python does not run: {error}", where, _INSTALL) from error
    facts = json.loads(answer)
    versions: dict[str, str] = facts["packages"]
    for name, version in versions.items():
        if not version:
            raise TritonError(f"{name} is not installed", where, _INSTALL)
    if int(versions["numpy"].split(".")[0]) >= 2:
        raise TritonError(f"numpy {versions['numpy']} silently corrupts tensors in this server", where, _INSTALL)
    # The stub is linked against libpython; a Python built without it, or Debian's without that package, has none.
    for folder in facts["folders"]:
        if folder and facts["soname"] and (Path(folder) / facts["soname"]).is_file():
            return Path(facts["site"]), facts["python"], folder
    raise TritonError(
        f"its Python {facts['python']} has no shared library libpython{facts['python']}.so.1.0",
        where,
        f"install it (Debian, Ubuntu: libpython{facts['python']})",
    )
