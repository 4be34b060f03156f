"""A Triton backend that serves `backend: "onnxruntime"` models (a version folder with model.onnx) on the CPU.

The server's Python backend loads this file as the backend's code, so a model repository needs nothing that a server
with NVIDIA's own ONNX Runtime backend would not understand. It runs in the stub process of the server's environment;
only that environment's packages can be imported here.

A model's configuration may set the parameter ``intra_op_threads`` (default: every core this process may use).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

# ONNX Runtime reports to its maker unless this is set before it is loaded; nothing may leave this machine.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

_GUARD = """
import os, select, signal, sys, time
server, stub = (os.pidfd_open(int(number)) for number in sys.argv[1:])
ended = select.select([server, stub], [], [])[0]
if server in ended:
    time.sleep(3)  # a stub that is well ends by itself, and tidies up
    if not select.select([stub], [], [], 0)[0]:
        signal.pidfd_send_signal(stub, signal.SIGKILL)
else:
    print("the process of a model died; the server is told to end", file=sys.stderr, flush=True)
    signal.pidfd_send_signal(server, signal.SIGTERM)
"""

ONNX_TYPES = {
    "tensor(bool)": "TYPE_BOOL",
    "tensor(uint8)": "TYPE_UINT8",
    "tensor(int8)": "TYPE_INT8",
    "tensor(int16)": "TYPE_INT16",
    "tensor(int32)": "TYPE_INT32",
    "tensor(int64)": "TYPE_INT64",
    "tensor(float16)": "TYPE_FP16",
    "tensor(float)": "TYPE_FP32",
    "tensor(double)": "TYPE_FP64",
}


class TritonPythonModel:
    """One instance of one model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the model and hold it against its configuration.

        Raises:
            pb_utils.TritonModelException: the model cannot be served; the server then refuses to load it.
        """
        if int(np.__version__.split(".")[0]) >= 2:
            raise pb_utils.TritonModelException(
                f"numpy {np.__version__} silently corrupts tensors in this server; install numpy<2"
            )
        config = json.loads(args["model_config"])
        self.batched = int(config["max_batch_size"]) > 0
        name = config.get("default_model_filename") or "model.onnx"
        path = Path(args["model_repository"]) / args["model_version"] / name
        options = onnxruntime.SessionOptions()
        threads = int(config.get("parameters", {}).get("intra_op_threads", {}).get("string_value", "0"))
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.inter_op_num_threads = 1
        # Threads that spin between two batches would take their cores from the decoders.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self.session = onnxruntime.InferenceSession(
                str(path), sess_options=options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's own exceptions share no base class
            raise pb_utils.TritonModelException(f"{path}: {error}") from error
        self.inputs = {entry["name"]: self._tensor(entry) for entry in config["input"]}
        self.outputs = {entry["name"]: self._tensor(entry) for entry in config["output"]}
        self._match("input", config["input"], self.session.get_inputs(), everything=True)
        self._match("output", config["output"], self.session.get_outputs(), everything=False)
        # Last: a model that is refused is no reason to end the server.
        self.guard = _guard(os.getppid())

    def _tensor(self, entry: dict[str, Any]) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """(type, dimensions with the batch as -1) of one configured tensor."""
        dims = tuple(int(size) for size in entry["dims"])
        return np.dtype(pb_utils.triton_string_to_numpy(entry["data_type"])), ((-1, *dims) if self.batched else dims)

    def _match(self, kind: str, configured: list[dict[str, Any]], found: list[Any], everything: bool) -> None:
        """Refuse a configuration that says something else than the model file."""
        model = {tensor.name: tensor for tensor in found}
        names = {entry["name"] for entry in configured}
        if names - set(model) or (everything and set(model) - names):
            raise pb_utils.TritonModelException(
                f"the model's {kind}s are {sorted(model)}, the configuration's {sorted(names)}"
            )
        wanted = self.inputs if kind == "input" else self.outputs
        for entry in configured:
            tensor, shape = model[entry["name"]], wanted[entry["name"]][1]
            if ONNX_TYPES.get(tensor.type) != entry["data_type"]:
                raise pb_utils.TritonModelException(
                    f"{kind} {tensor.name} is {tensor.type}, the configuration says {entry['data_type']}"
                )
            # A dimension that the model leaves open is a name or None.
            if len(tensor.shape) != len(shape) or any(
                isinstance(size, int) and want != -1 and size != want
                for size, want in zip(tensor.shape, shape, strict=True)
            ):
                raise pb_utils.TritonModelException(
                    f"{kind} {tensor.name} has the shape {tensor.shape}, the configuration says {list(shape)}"
                )
            if self.batched and isinstance(tensor.shape[0], int):
                raise pb_utils.TritonModelException(f"{kind} {tensor.name} has a fixed batch of {tensor.shape[0]}")

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer every request; those that can be batched share one run of the model."""
        responses: list[Any] = [None] * len(requests)
        feeds: dict[int, dict[str, np.ndarray[Any, Any]]] = {}
        for index, request in enumerate(requests):
            try:
                feeds[index] = self._feed(request)
            except ValueError as error:
                responses[index] = _refusal(str(error))
        for group in self._groups(feeds):
            names = [name for name in self.outputs if any(name in requests[i].requested_output_names() for i in group)]
            feed = {
                name: feeds[group[0]][name] if len(group) == 1 else np.concatenate([feeds[i][name] for i in group])
                for name in self.inputs
            }
            try:
                arrays = dict(zip(names, self.session.run(names, feed), strict=True))
            except Exception as error:  # as above
                for index in group:
                    responses[index] = _refusal(f"ONNX Runtime: {error}")
                continue
            start = 0
            for index in group:
                end = start + len(next(iter(feeds[index].values()))) if self.batched else None
                responses[index] = pb_utils.InferenceResponse(
                    [
                        pb_utils.Tensor(name, np.ascontiguousarray(array[start:end] if self.batched else array))
                        for name, array in arrays.items()
                        if name in requests[index].requested_output_names()
                    ]
                )
                start = end or 0
        return responses

    def finalize(self) -> None:
        """The server lets the model go: an end that the guard has no business with."""
        self.guard.kill()
        self.guard.wait()

    def _feed(self, request: Any) -> dict[str, np.ndarray[Any, Any]]:
        """A request's tensors by name.

        Raises:
            ValueError: one is missing, or its type or shape is not the configured one.
        """
        feed = {}
        for name, (dtype, shape) in self.inputs.items():
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            if tensor is None:
                raise ValueError(f"input {name} is missing")
            array = tensor.as_numpy()
            if array.dtype != dtype:
                raise ValueError(f"input {name} is {array.dtype}, not {dtype}")
            if array.ndim != len(shape) or any(
                want not in (-1, got) for got, want in zip(array.shape, shape, strict=True)
            ):
                raise ValueError(f"input {name} has the shape {list(array.shape)}, not {list(shape)}")
            feed[name] = array
        if self.batched and len({len(array) for array in feed.values()}) != 1:
            raise ValueError("the inputs differ in their batch size")
        return feed

    def _groups(self, feeds: dict[int, dict[str, np.ndarray[Any, Any]]]) -> list[list[int]]:
        """Which requests run together: those whose tensors differ in nothing but the batch."""
        if not self.batched:
            return [[index] for index in feeds]
        groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        for index, feed in feeds.items():
            groups.setdefault(tuple(array.shape[1:] for array in feed.values()), []).append(index)
        return list(groups.values())


def _refusal(message: str) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(message))


def _guard(server: int) -> subprocess.Popen[bytes]:
    """Tie this process and its server together, each to end with the other, by a small process that watches both.

    A stub looks for its server itself, but one that waits for a lock which a killed server held in their shared memory
    waits for ever, with Python's interpreter lock in its hands: nothing within it can run any more. The other way
    round, a server whose stub has died goes on calling the model ready while every request fails; it is told to end,
    so that whatever supervises it starts it again.
    """
    return subprocess.Popen(
        ["python3", "-I", "-S", "-c", _GUARD, str(server), str(os.getpid())], stdin=subprocess.DEVNULL
    )
