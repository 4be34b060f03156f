"""The shipped model on several runtimes, run and compared by polygraphy on the slabs that the package carries."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import
import onnxruntime
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.common import BytesFromPath
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator, SimpleCompareFunc

from appliance.governance.package import Package
from appliance.inference.parity import check_parity
from appliance.inference.plan import SINGLE
from appliance.inference.triton import Output, TritonClient

from .conftest import Server

SAME = 1e-5


class Triton(BaseRunner):  # type: ignore[misc]
    """What a running Triton answers, through our client."""

    def __init__(self, url: str, package: Package) -> None:
        super().__init__(name="triton")
        self._url, self._package = url, package

    def activate_impl(self) -> None:
        self._client = TritonClient(self._url)

    def deactivate_impl(self) -> None:
        self._client.close()

    def get_input_metadata_impl(self) -> Any:
        tensor = self._package.model.input
        return TensorMetadata().add(tensor.name, np.float32, (None, *tensor.shape))

    def infer_impl(self, feed_dict: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        answer = self._client.infer(self._package, feed_dict[self._package.model.input.name])
        self.inference_time = 0.0
        return {"probabilities": answer.probabilities, "lesion_map": answer.lesion_map[:, None]}


def feeds(package: Package) -> list[dict[str, NDArray[np.float32]]]:
    """The published slabs, batch by batch, as the model wants them."""
    kept: list[dict[str, NDArray[np.float32]]] = []

    def keep(slabs: NDArray[np.float32]) -> Output:
        kept.append({package.model.input.name: slabs})
        field = package.model.output("lesion_map").shape[1:]
        return Output(
            np.zeros((len(slabs), len(package.labels)), np.float32), np.zeros((len(slabs), *field), np.float32)
        )

    check_parity(package, keep)
    return kept


def on_cpu(package: Package, file: str, *, optimised: bool = True) -> OnnxrtRunner:
    """ONNX Runtime on a file of the package."""
    content = BytesFromPath(str(package.folder / file))

    def session() -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        if not optimised:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return onnxruntime.InferenceSession(content(), options, providers=["CPUExecutionProvider"])

    return OnnxrtRunner(session, name=f"{file}{'' if optimised else ', as written'}")


def agree(runners: list[BaseRunner], package: Package, tolerance: float) -> bool:
    """Whether all outputs of all runners lie within the tolerance of the first one's."""
    batches = feeds(package)
    results = Comparator.run(runners, data_loader=batches)
    assert [len(answers) for _, answers in results.items()] == [len(batches)] * len(runners)
    compared = Comparator.compare_accuracy(
        results,
        comparisons=[(0, other) for other in range(1, len(runners))],
        compare_func=SimpleCompareFunc(atol=tolerance, rtol=0, check_error_stat="max"),
    )
    return bool(compared)


def test_single_precision_is_the_same_however_the_graph_is_optimised(reference: Package) -> None:
    single = SINGLE if SINGLE in reference.files else "model.onnx"
    assert agree([on_cpu(reference, single), on_cpu(reference, single, optimised=False)], reference, SAME)


def test_eight_bits_are_within_what_the_package_allows(reference: Package) -> None:
    if SINGLE not in reference.files:
        pytest.skip("the package ships single precision alone")
    assert reference.parity is not None
    runners = [on_cpu(reference, SINGLE), on_cpu(reference, "model.onnx")]
    assert agree(runners, reference, reference.parity.tolerance)
    assert not agree(runners, reference, SAME), "a comparison that finds no difference here finds none anywhere"


@pytest.mark.interop
def test_triton_answers_as_onnx_runtime_does(triton_server: Server, reference: Package) -> None:
    assert agree([on_cpu(reference, "model.onnx"), Triton(triton_server.url, reference)], reference, SAME)
