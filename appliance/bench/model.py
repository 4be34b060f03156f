"""The benchmark of a model package: a study's slabs through a real server, beside ONNX Runtime alone.

What is measured, and what it means, is written in docs/performance.md.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from appliance.demo.orthanc import LOOPBACK, free_ports
from appliance.governance.package import Package
from appliance.inference.server import prepare
from appliance.inference.triton import TritonClient
from appliance.operations.leash import Leashed
from dicom_io.errors import PeerError

TOLERANCE = 1e-4
"""Of a probability; the same library computes both, in batches of the same size."""

_ALONE = """
import json, os, sys, time
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import numpy, onnxruntime
slabs, batch = numpy.load(sys.argv[2]), int(sys.argv[3])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = len(os.sched_getaffinity(0))
options.add_session_config_entry("session.intra_op.allow_spinning", "0")
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
(name,) = [one.name for one in session.get_inputs()]
print(onnxruntime.__version__, flush=True)
for _ in sys.stdin:
    start = time.perf_counter()
    parts = [session.run(["probabilities"], {name: slabs[n : n + batch]})[0] for n in range(0, len(slabs), batch)]
    print(json.dumps([time.perf_counter() - start, numpy.concatenate(parts).tolist()]), flush=True)
"""


def measure(
    package: Package,
    environment: Path,
    slabs: int = 40,
    rounds: int = 9,
    directory: Path | None = None,
    *,
    on_step: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run the benchmark; the document that `scanside bench model --json` prints.

    Args:
        package: the model.
        environment: the virtual environment of Triton.
        slabs: of one study.
        rounds: how often each does the study, in turns.
        directory: where everything lies meanwhile; None is the system's temporary folder.
        on_step: told what is done now.

    Raises:
        ScansideError: the server does not start, or does not answer.
        PeerError: ONNX Runtime alone does not run, or says something else of the same slabs.
    """
    # Noise is as much work for a convolution as a head is.
    values = np.random.default_rng(1).random((slabs, *package.model.input.shape), np.float32)
    seconds: dict[str, list[float]] = {"triton": [], "onnxruntime": []}
    with TemporaryDirectory(dir=directory, prefix="scanside-bench-") as name:
        folder = Path(name)
        np.save(folder / "slabs.npy", values)
        on_step("starting the server")
        with (
            serving(package, environment, folder) as url,
            TritonClient(url) as client,
            _alone(package, environment, folder) as (version, alone),
        ):
            said = client.infer(package, values).probabilities  # warm, and its shared memory is there
            _, expected = alone()
            if not (difference := float(np.abs(said - expected).max())) <= TOLERANCE:
                raise PeerError(
                    f"the server and ONNX Runtime differ by {difference:.2g} on the same slabs",
                    package.name,
                    "report this fault; such a server must not be trusted",
                )
            for number in range(rounds):
                on_step(f"round {number + 1} of {rounds}")
                for who in ("triton", "onnxruntime") if number % 2 else ("onnxruntime", "triton"):
                    if who == "onnxruntime":
                        seconds[who].append(alone()[0])
                        continue
                    start = time.perf_counter()
                    client.infer(package, values)
                    seconds[who].append(time.perf_counter() - start)
    return {
        "package": {"name": package.name, "version": package.version, "clearance": package.clearance},
        "device": "cpu",
        "slabs": slabs,
        "rounds": rounds,
        "machine": {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version(), "onnxruntime": version},
        "seconds": {who: spread(each) for who, each in seconds.items()},
        "ratios": {
            "triton_over_onnxruntime": round(
                median(a / b for a, b in zip(seconds["triton"], seconds["onnxruntime"], strict=True)), 3
            )
        },
        "difference": difference,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """The least, the median and the greatest."""
    return {"least": round(min(values), 4), "p50": round(median(values), 4), "most": round(max(values), 4)}


@contextmanager
def serving(package: Package, environment: Path, home: Path) -> Iterator[str]:
    """A Triton server of one package on the CPU: its address.

    Args:
        environment: its virtual environment.
        home: folder for what it needs, and for its log, ``triton.log``.

    Raises:
        ScansideError: it does not start.
    """
    grpc, http, of_metrics = free_ports(3)
    launch = prepare(environment, home, [package], "cpu", grpc_port=grpc, http_port=http, metrics_port=of_metrics)
    variables = [f"{name}={value}" for name, value in launch.env.items()]
    server = Leashed(["env", "-i", *variables, *launch.command], log=home / "triton.log")
    try:
        with TritonClient(f"{LOOPBACK}:{grpc}") as client:
            client.wait_ready(60, [package])
        yield f"{LOOPBACK}:{grpc}"
    finally:
        server.stop()


@contextmanager
def _alone(
    package: Package, environment: Path, folder: Path
) -> Iterator[tuple[str, Callable[[], tuple[float, np.ndarray[Any, Any]]]]]:
    """ONNX Runtime of the server's environment in a process of its own: its version, and what does the slabs once."""
    python = environment.absolute() / "bin" / "python"
    model, batch = package.folder / "model.onnx", str(package.model.maximum_batch)
    with (
        (folder / "onnxruntime.log").open("w+") as log,
        subprocess.Popen(
            [python, "-I", "-c", _ALONE, model, folder / "slabs.npy", batch],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        asked, answers = process.stdin, process.stdout

        def line() -> str:
            if not (told := answers.readline()):
                log.seek(0)
                raise PeerError(
                    "ONNX Runtime does not run", str(python), (log.read().strip() or "it said nothing")[-300:]
                )
            return told

        def work() -> tuple[float, np.ndarray[Any, Any]]:
            asked.write("\n")
            asked.flush()
            took, probabilities = json.loads(line())
            return float(took), np.asarray(probabilities, np.float32)

        try:
            yield line().strip(), work
        finally:
            asked.close()


def lines(told: dict[str, Any]) -> str:
    """The figures for people."""
    package, seconds = told["package"], told["seconds"]
    shown = [f"{package['name']} {package['version']}, {told['slabs']} slabs on {told['machine']['cores']} cores:"]
    for who, one in seconds.items():
        shown.append(f"  {who:<12} {one['p50']:.3f} s ({one['least']:.3f} to {one['most']:.3f})")
    shown.append(f"  the server takes {told['ratios']['triton_over_onnxruntime']:.2f} times as long")
    return "\n".join(shown)
