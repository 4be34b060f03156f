"""What the client makes of a server that answers wrongly, late or not at all: a server that does what the test says."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from appliance.governance.package import Package
from appliance.inference.triton import DIGEST_PARAMETER, TritonClient, TritonError

from .conftest import seeing

SHARED_MEMORY = Path("/dev/shm")

Outputs = dict[str, Any]
"""name → array."""


def answer_of(slabs: Any) -> Outputs:
    """What the made-up model says: each slab's mean, in every label and all over the map."""
    means = slabs.reshape(len(slabs), -1).mean(axis=1, dtype=np.float32)
    return {
        "probabilities": np.repeat(means[:, None], 6, axis=1),
        "lesion_map": np.broadcast_to(means[:, None, None, None], (len(slabs), 1, 64, 64)).copy(),
    }


@dataclass
class Fake(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """The part of Triton's gRPC service that the client uses; ``answer`` makes the outputs."""

    digest: str
    answer: Callable[[Any], Outputs] = answer_of
    regions: dict[str, str] = field(default_factory=dict)
    busy: set[str] = field(default_factory=set)
    refused: threading.Event = field(default_factory=threading.Event)
    requests: list[int] = field(default_factory=list)
    used: list[str] = field(default_factory=list)
    writes: bool = True

    def ServerReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=True)

    def ModelReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=request.name == "ich_reference")

    def ModelConfig(self, request: Any, context: Any) -> Any:
        response = service_pb2.ModelConfigResponse()
        response.config.parameters[DIGEST_PARAMETER].string_value = self.digest
        return response

    def SystemSharedMemoryStatus(self, request: Any, context: Any) -> Any:
        response = service_pb2.SystemSharedMemoryStatusResponse()
        for name, key in self.regions.items():
            response.regions[name].key = key
        return response

    def SystemSharedMemoryRegister(self, request: Any, context: Any) -> Any:
        assert (SHARED_MEMORY / request.key.lstrip("/")).stat().st_size >= request.byte_size
        self.regions[request.name] = request.key
        return service_pb2.SystemSharedMemoryRegisterResponse()

    def SystemSharedMemoryUnregister(self, request: Any, context: Any) -> Any:
        if request.name in self.busy:
            self.refused.set()
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"region '{request.name}' is in use")
        self.regions.pop(request.name, None)
        return service_pb2.SystemSharedMemoryUnregisterResponse()

    def ModelInfer(self, request: Any, context: Any) -> Any:
        tensor = request.inputs[0]
        shape = tuple(tensor.shape)
        self.requests.append(shape[0])
        region = tensor.parameters["shared_memory_region"].string_param
        self.used.append(region)
        if region and region not in self.regions:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"Unable to find shared memory region: '{region}'")
        memory = np.memmap(SHARED_MEMORY / self.regions[region].lstrip("/"), np.float32, "r+") if region else None
        values = (
            memory[: int(np.prod(shape))]
            if memory is not None
            else np.frombuffer(request.raw_input_contents[0], np.float32)
        )
        response = service_pb2.ModelInferResponse()
        wanted = {output.name: output for output in request.outputs}
        for name, array in self.answer(values.reshape(shape)).items():
            output = response.outputs.add(name=name, shape=array.shape)
            output.datatype = {"float32": "FP32", "float64": "FP64"}[array.dtype.name]
            if memory is None:
                response.raw_output_contents.append(array.tobytes())
            elif self.writes:
                start = wanted[name].parameters["shared_memory_offset"].int64_param // 4
                memory[start : start + array.size] = array.reshape(-1)
        return response


@dataclass
class Running:
    fake: Fake
    url: str


@pytest.fixture
def reference(reference: Package) -> Package:
    """With a model that sees neighbours, which makes the larger tensors."""
    return seeing(reference, 1)


@pytest.fixture
def server(reference: Package) -> Iterator[Running]:
    fake = Fake(reference.files["model.onnx"])
    pool = ThreadPoolExecutor(8)
    service = grpc.server(pool, options=[("grpc.max_receive_message_length", -1)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(fake, service)
    port = service.add_insecure_port("127.0.0.1:0")
    service.start()
    yield Running(fake, f"127.0.0.1:{port}")
    service.stop(0).wait()
    pool.shutdown()


@pytest.fixture(params=[True, False], ids=["shared memory", "messages"])
def client(request: pytest.FixtureRequest, server: Running) -> Iterator[TritonClient]:
    with TritonClient(server.url, shared_memory=request.param, timeout=60.0) as client:
        yield client


def slabs_of(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).random((count, 9, 256, 256), np.float32)


def ours() -> set[str]:
    """The regions of this process; others on this machine may have theirs."""
    return {path.name for path in SHARED_MEMORY.glob(f"scanside-tensors-{os.getpid()}-*")}


@pytest.mark.parametrize("count", [1, 16, 17, 40])
def test_every_slab_gets_its_own_answer(client: TritonClient, server: Running, reference: Package, count: int) -> None:
    slabs = slabs_of(count)
    output = client.infer(reference, slabs)
    expected = answer_of(slabs)
    np.testing.assert_array_equal(output.probabilities, expected["probabilities"])
    np.testing.assert_array_equal(output.lesion_map, expected["lesion_map"][:, 0])
    assert output.lesion_map.shape == (count, 64, 64)
    assert server.fake.requests == [16] * (count // 16) + ([count % 16] if count % 16 else [])


def test_a_slab_may_come_in_parts(client: TritonClient, reference: Package) -> None:
    slabs = slabs_of(18, seed=3)
    parts = [[one[:3], one[3:4], one[4:]] for one in slabs]
    whole, joined = client.infer(reference, slabs), client.infer(reference, parts)
    np.testing.assert_array_equal(joined.probabilities, whole.probabilities)
    np.testing.assert_array_equal(joined.lesion_map, whole.lesion_map)
    for wrong in ([slabs[0][:3], slabs[0][3:8]], [slabs[0], slabs[0][:1]], [slabs[0][:, 1:]], [slabs[0].astype(float)]):
        with pytest.raises(ValueError, match="9, 256, 256"):
            client.infer(reference, [parts[0], wrong])


def test_no_slabs_need_no_server(reference: Package) -> None:
    with TritonClient("127.0.0.1:1") as client:
        output = client.infer(reference, slabs_of(0))
    assert (output.probabilities.shape, output.lesion_map.shape) == ((0, 6), (0, 64, 64))


def test_an_answer_is_not_changed_by_the_next_one(client: TritonClient, reference: Package) -> None:
    first = client.infer(reference, slabs_of(2, seed=1))
    before = first.lesion_map.copy()
    client.infer(reference, slabs_of(2, seed=2))
    np.testing.assert_array_equal(first.lesion_map, before)


@pytest.mark.parametrize("dtype", [np.float64, np.int16])
def test_slabs_are_float32(client: TritonClient, reference: Package, dtype: type) -> None:
    with pytest.raises(ValueError, match="float32"):
        client.infer(reference, slabs_of(1).astype(dtype))


@pytest.mark.parametrize("shape", [(1, 9, 256, 255), (1, 3, 256, 256), (9, 256, 256), (1, 1, 9, 256, 256)])
def test_slabs_have_the_models_shape(client: TritonClient, reference: Package, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="9, 256, 256"):
        client.infer(reference, np.zeros(shape, np.float32))


def test_slabs_are_finite(client: TritonClient, reference: Package) -> None:
    slabs = slabs_of(20)
    slabs[19, 0, 5, 5] = np.nan
    with pytest.raises(ValueError, match="finite"):
        client.infer(reference, slabs)


def with_value(name: str, value: float) -> Callable[[Any], Outputs]:
    def answer(slabs: Any) -> Outputs:
        outputs = answer_of(slabs)
        outputs[name].reshape(-1)[-1] = value
        return outputs

    return answer


@pytest.mark.parametrize("name", ["probabilities", "lesion_map"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.001, 1.001])
def test_what_is_no_probability_is_refused(
    client: TritonClient, server: Running, reference: Package, name: str, value: float
) -> None:
    server.fake.answer = with_value(name, value)
    with pytest.raises(TritonError, match=f"{name} holds values that are no probabilities"):
        client.infer(reference, slabs_of(3))


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("probabilities", lambda a: a[:, :5], r"FP32 \[3, 5\]"),
        ("probabilities", lambda a: a[:2], r"FP32 \[2, 6\]"),
        ("probabilities", lambda a: a.astype(np.float64), r"FP64 \[3, 6\]"),
        ("lesion_map", lambda a: a[:, 0], r"FP32 \[3, 64, 64\]"),
        ("lesion_map", lambda a: None, "nothing"),
    ],
)
def test_an_answer_of_another_shape_is_refused(
    client: TritonClient, server: Running, reference: Package, name: str, change: Callable[[Any], Any], says: str
) -> None:
    def answer(slabs: Any) -> Outputs:
        outputs = answer_of(slabs)
        outputs[name] = change(outputs[name])
        return {name: array for name, array in outputs.items() if array is not None}

    server.fake.answer = answer
    with pytest.raises(TritonError, match=says):
        client.infer(reference, slabs_of(3))


def test_an_answer_that_was_never_written_is_refused(server: Running, reference: Package) -> None:
    with TritonClient(server.url) as client:
        client.infer(reference, slabs_of(2))  # leaves good values in the region
        server.fake.writes = False
        with pytest.raises(TritonError, match="no probabilities"):
            client.infer(reference, slabs_of(2))


def test_a_late_answer_is_an_error_in_time(client: TritonClient, server: Running, reference: Package) -> None:
    client.infer(reference, slabs_of(1))
    release = threading.Event()

    def answer(slabs: Any) -> Outputs:
        release.wait(10)
        return answer_of(slabs)

    server.fake.answer = answer
    client._timeout = 0.3
    start = time.monotonic()
    with pytest.raises(TritonError, match=r"no answer within 0\.3 s"):
        client.infer(reference, slabs_of(1))
    assert time.monotonic() - start < 2
    release.set()


def test_a_region_that_the_server_may_still_write_to_is_not_used_again(server: Running, reference: Package) -> None:
    """The answer to a request that timed out may come while a later one is under way; it must not be taken for its."""
    release = threading.Event()
    with TritonClient(server.url, timeout=5.0) as client:
        client.infer(reference, slabs_of(2))
        server.fake.answer = lambda slabs: answer_of(slabs) if release.wait(10) else {}
        client._timeout = 0.3
        with pytest.raises(TritonError, match="no answer"):
            client.infer(reference, slabs_of(2))
        server.fake.answer = answer_of
        client._timeout = 5.0
        client.infer(reference, slabs_of(2))
        release.set()
    first, late, after = server.fake.used
    assert first == late
    assert after != late


def test_a_refusal_says_what_the_server_said(client: TritonClient, server: Running, reference: Package) -> None:
    def answer(slabs: Any) -> Outputs:
        raise RuntimeError("the model broke")

    server.fake.answer = answer
    with pytest.raises(TritonError, match="the model broke") as caught:
        client.infer(reference, slabs_of(1))
    assert caught.value.where == f"{server.url}, model ich_reference"


def test_another_model_is_never_asked(client: TritonClient, server: Running, reference: Package) -> None:
    server.fake.digest = "sha256:" + "0" * 64
    with pytest.raises(TritonError, match="restart the server with this package"):
        client.infer(reference, slabs_of(1))
    assert server.fake.requests == []
    assert "sha256:0000" in client.problem(reference)
    assert not client.ready(reference)


def test_a_model_that_was_exchanged_is_noticed_when_the_server_forgot_our_regions(
    server: Running, reference: Package
) -> None:
    with TritonClient(server.url) as client:
        client.infer(reference, slabs_of(1))
        server.fake.regions.clear()
        server.fake.digest = "sha256:" + "0" * 64
        with pytest.raises(TritonError, match="restart the server with this package"):
            client.infer(reference, slabs_of(1))


def test_a_server_that_forgot_our_regions_gets_new_ones(server: Running, reference: Package) -> None:
    with TritonClient(server.url) as client:
        client.infer(reference, slabs_of(1))
        server.fake.regions.clear()
        client.infer(reference, slabs_of(1))
        assert len(server.fake.regions) == 1


def test_no_server(reference: Package) -> None:
    before = ours()
    with TritonClient("127.0.0.1:1") as client:
        assert "does not answer" in client.problem(reference)
        with pytest.raises(TritonError, match="cannot be reached"):
            client.infer(reference, slabs_of(1))
        start = time.monotonic()
        with pytest.raises(TritonError, match="does not answer"):
            client.wait_ready(0.3, [reference])
        assert 0.3 <= time.monotonic() - start < 3
    assert ours() == before


def test_ready_is_proven_once_and_again_after_a_failure(
    client: TritonClient, server: Running, reference: Package
) -> None:
    assert client.ready(reference)
    assert client.ready(reference)
    assert server.fake.requests == [1]
    good = server.fake.answer
    server.fake.answer = with_value("probabilities", 2.0)
    with pytest.raises(TritonError):
        client.infer(reference, slabs_of(1))
    assert not client.ready(reference)  # the server calls the model ready all the while
    server.fake.answer = good
    assert client.ready(reference)
    other = replace(reference, model=replace(reference.model, triton_name="another"))
    assert client.problem(other) == "the server does not serve another"


def test_regions_are_reused_and_all_given_back(server: Running, reference: Package) -> None:
    before = ours()
    with TritonClient(server.url) as client:
        for seed in range(5):
            client.infer(reference, slabs_of(17, seed))
        assert len(server.fake.regions) == len(ours() - before) == 1
    assert server.fake.regions == {}
    assert ours() == before


def test_each_call_under_way_has_a_region_of_its_own(server: Running, reference: Package) -> None:
    gate = threading.Barrier(3)

    def answer(slabs: Any) -> Outputs:
        gate.wait(10)
        return answer_of(slabs)

    server.fake.answer = answer
    with TritonClient(server.url) as client, ThreadPoolExecutor(3) as threads:
        inputs = [slabs_of(2, seed) for seed in range(3)]
        outputs = list(threads.map(lambda slabs: client.infer(reference, slabs), inputs))
        assert len(server.fake.regions) == 3
    for slabs, output in zip(inputs, outputs, strict=True):
        np.testing.assert_array_equal(output.probabilities, answer_of(slabs)["probabilities"])
    assert server.fake.regions == {}


def test_a_region_in_use_is_given_back_later(server: Running, reference: Package) -> None:
    with TritonClient(server.url) as client:
        client.infer(reference, slabs_of(1))
        (name,) = server.fake.regions
        server.fake.busy.add(name)
        server.fake.answer = with_value("probabilities", 2.0)
        with pytest.raises(TritonError):
            client.infer(reference, slabs_of(1))
        server.fake.answer = answer_of
        client.infer(reference, slabs_of(1))
        assert name in server.fake.regions
        server.fake.busy.clear()
    assert server.fake.regions == {}


def test_a_region_in_use_at_the_end_is_given_back_once_it_is_free(server: Running, reference: Package) -> None:
    """Right after an answer the real server refuses to let go of its region."""
    with TritonClient(server.url) as client:
        client.infer(reference, slabs_of(1))
        server.fake.busy.update(server.fake.regions)
        server.fake.refused.clear()

        def free() -> None:
            server.fake.refused.wait(30)
            server.fake.busy.clear()

        frees = threading.Thread(target=free)
        frees.start()
    frees.join()
    assert not server.fake.regions


def test_what_a_killed_client_left_is_swept_and_a_living_ones_is_not(server: Running, reference: Package) -> None:
    left = SHARED_MEMORY / "scanside-tensors-1-0123456789ab"
    left.write_bytes(bytes(16))
    gone = "scanside-tensors-2-0123456789ab"
    server.fake.regions |= {left.name: f"/{left.name}", gone: f"/{gone}", "somebody-elses": "/x"}
    try:
        with TritonClient(server.url) as one, TritonClient(server.url) as other:
            one.infer(reference, slabs_of(1))
            assert not left.exists()
            mine = {name for name in server.fake.regions if name.startswith("scanside-")}
            assert len(mine) == 1
            assert "somebody-elses" in server.fake.regions
            other.infer(reference, slabs_of(1))
            assert mine < set(server.fake.regions)
            assert mine <= ours()
            one.infer(reference, slabs_of(1))
    finally:
        left.unlink(missing_ok=True)


def test_a_full_file_system_is_an_error_and_not_a_crash(
    server: Running, reference: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with TritonClient(server.url) as client, pytest.raises(TritonError, match="No space left on device"):
        client.infer(reference, slabs_of(1))
