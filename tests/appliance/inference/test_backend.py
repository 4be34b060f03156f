"""Our backend by itself: each request of a batch gets its own answer or its own error.

It runs in the server's environment with a made-up server around it, which can send what the real one would not let by.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import triton_models
from appliance.governance.package import Package
from appliance.inference.server import prepare

pytestmark = pytest.mark.interop

DRIVER = """
import json, os, sys, types
import numpy as np

class Tensor:
    def __init__(self, name, array): self.name, self.array = name, array
    def as_numpy(self): return self.array
class Response:
    def __init__(self, output_tensors, error=None): self.tensors, self.error = output_tensors, error
class Request:
    def __init__(self, tensors, outputs): self.tensors, self.outputs = tensors, outputs
    def requested_output_names(self): return self.outputs
class Refused(Exception): pass
server = types.ModuleType("triton_python_backend_utils")
server.Tensor, server.InferenceResponse = Tensor, Response
server.TritonError, server.TritonModelException = str, Refused
server.get_input_tensor_by_name = lambda request, name: next((t for t in request.tensors if t.name == name), None)
server.triton_string_to_numpy = {"TYPE_FP32": np.float32, "TYPE_INT32": np.int32}.get
sys.modules["triton_python_backend_utils"] = server

sys.path.insert(0, sys.argv[1])
import model as backend
config = json.loads(sys.argv[3])
runs = []
model = backend.TritonPythonModel()
try:
    model.initialize({"model_config": json.dumps(config), "model_repository": sys.argv[2], "model_version": "1"})
except Refused as error:
    print(json.dumps({"refused": str(error)}))
    sys.exit()
model.finalize()  # or the guard would take this process' parent, the test, for a server whose model died
real = model.session.run
class Session:
    def run(self, names, feed):
        runs.append([len(feed["slabs"]), names])
        return real(names, feed)
session, model.session = model.session, Session()
rng = np.random.default_rng(0)
good = [rng.random((count, *config["input"][0]["dims"]), np.float32) for count in (1, 3, 2)]
both = ["probabilities", "lesion_map"]
requests = [
    Request([Tensor("slabs", good[0])], both),
    Request([Tensor("slabs", good[1].astype(np.int32))], both),
    Request([Tensor("slabs", good[1])], ["probabilities"]),
    Request([Tensor("slabs", good[1][:, :, :255])], both),
    Request([Tensor("slabs", good[1][:, 0])], both),
    Request([], both),
    Request([Tensor("slabs", good[2])], both),
]
answers = []
for request, response in zip(requests, model.execute(requests)):
    if response.error is not None:
        answers.append(response.error)
        continue
    slabs = request.tensors[0].as_numpy()
    expected = dict(zip(both, real(both, {"slabs": slabs})))
    answers.append({t.name: float(abs(t.array - expected[t.name]).max()) for t in response.tensors})
def broken(names, feed): raise RuntimeError("out of memory")
model.session.run = broken
failed = [response.error for response in model.execute(requests[:2])]
print(json.dumps({"answers": answers, "runs": runs, "failed": failed}))
"""


def drive(environment: Path, home: Path, package: Package, **changes: Any) -> dict[str, Any]:
    """What the backend does with a model whose configuration was changed so."""
    prepare(environment, home, [package], "cpu")
    config = {
        "max_batch_size": 16,
        "default_model_filename": "model.onnx",
        "input": [{"name": "slabs", "data_type": "TYPE_FP32", "dims": list(package.model.input.shape)}],
        "output": [
            {"name": "probabilities", "data_type": "TYPE_FP32", "dims": [6]},
            {"name": "lesion_map", "data_type": "TYPE_FP32", "dims": [1, 64, 64]},
        ],
        "parameters": {"intra_op_threads": {"string_value": "1"}},
    }
    backend = Path(triton_models.__file__).parent / "backends" / "onnxruntime"
    repository = home / "repository" / "ich_reference"
    ran = subprocess.run(
        [environment / "bin" / "python3", "-c", DRIVER, backend, repository, json.dumps(config | changes)],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": f"{environment / 'bin'}:/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    answer: dict[str, Any] = json.loads(ran.stdout)
    return answer


def test_each_request_has_its_own_answer(triton_environment: Path, reference: Package, tmp_path: Path) -> None:
    said = drive(triton_environment, tmp_path, reference)
    first, wrong_type, second, wrong_size, wrong_rank, missing, third = said["answers"]
    assert set(first) == set(third) == {"probabilities", "lesion_map"}
    assert set(second) == {"probabilities"}
    for answer in (first, second, third):
        assert max(answer.values()) < 1e-5
    assert wrong_type == "input slabs is int32, not float32"
    channels = reference.model.input.shape[0]
    assert wrong_size == f"input slabs has the shape [3, {channels}, 255, 256], not [-1, {channels}, 256, 256]"
    assert wrong_rank == f"input slabs has the shape [3, 256, 256], not [-1, {channels}, 256, 256]"
    assert missing == "input slabs is missing"
    assert said["runs"] == [[6, ["probabilities", "lesion_map"]]], "one run for all that can be batched"
    assert said["failed"] == ["ONNX Runtime: out of memory", wrong_type]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"default_model_filename": "other.onnx"}, "other.onnx"),
        ({"input": [{"name": "image", "data_type": "TYPE_FP32", "dims": [3, 256, 256]}]}, "inputs are ['slabs']"),
        ({"input": [{"name": "slabs", "data_type": "TYPE_INT32", "dims": [3, 256, 256]}]}, "is tensor(float)"),
        ({"input": [{"name": "slabs", "data_type": "TYPE_FP32", "dims": [3, 128, 128]}]}, "has the shape"),
        ({"output": [{"name": "mask", "data_type": "TYPE_FP32", "dims": [6]}]}, "outputs are"),
        ({"output": [{"name": "probabilities", "data_type": "TYPE_FP32", "dims": [5]}]}, "has the shape"),
    ],
)
def test_a_configuration_that_the_model_contradicts_is_refused(
    triton_environment: Path, reference: Package, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    assert says in drive(triton_environment, tmp_path, reference, **changes)["refused"]
