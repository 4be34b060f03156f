"""What only a GPU box does, with NumPy in the place of CuPy where there is no GPU; and by CuPy itself where there is.

The tests marked `gpu` have never run: no machine with a GPU was there since they were written.
"""

from __future__ import annotations

import base64
import inspect
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from appliance.governance.package import Package
from appliance.inference import cuda, preprocess_dali
from appliance.inference.cuda import CudaMemory, GpuError, GpuInput, find_cupy
from appliance.inference.preprocess import TOLERANCE, model_input
from appliance.inference.stream import Pipeline, read_volume, verdict_on
from appliance.inference.triton import TritonClient, TritonError

from .conftest import Server, seeing
from .fake_cupy import Device, FakeCupy
from .test_preprocess_gpu import GRIDS, Grid, apart, heads
from .test_stream import ADMITTED, real
from .test_triton_client import Fake, Running, answer_of, slabs_of


class OnDevice(Fake):
    """Triton's service as `Fake` has it, for CUDA's shared memory."""

    def __init__(self, digest: str, cupy: FakeCupy) -> None:
        super().__init__(digest)
        self.cupy = cupy
        self.opened: dict[str, Any] = {}
        self.freed_too_soon: list[str] = []

    def CudaSharedMemoryStatus(self, request: Any, context: Any) -> Any:
        response = service_pb2.CudaSharedMemoryStatusResponse()
        for name in self.opened:
            response.regions[name].device_id = 0
        return response

    def CudaSharedMemoryRegister(self, request: Any, context: Any) -> Any:
        assert request.device_id == 0
        self.opened[request.name] = request.raw_handle
        assert self.cupy.cuda.runtime.opened(request.raw_handle).nbytes == request.byte_size
        return service_pb2.CudaSharedMemoryRegisterResponse()

    def CudaSharedMemoryUnregister(self, request: Any, context: Any) -> Any:
        handle = self.opened.pop(request.name, None)
        if handle and int.from_bytes(handle, "little") not in self.cupy.cuda.runtime.allocated:
            self.freed_too_soon.append(request.name)
        return service_pb2.CudaSharedMemoryUnregisterResponse()

    def ModelInfer(self, request: Any, context: Any) -> Any:
        tensor = request.inputs[0]
        region = tensor.parameters["shared_memory_region"].string_param
        if region not in self.opened:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"Unable to find shared memory region: '{region}'")
        memory = self.cupy.cuda.runtime.opened(self.opened[region])
        shape = tuple(tensor.shape)
        response = service_pb2.ModelInferResponse()
        wanted = {output.name: output for output in request.outputs}
        for name, array in answer_of(memory[: int(np.prod(shape))].reshape(shape)).items():
            response.outputs.add(name=name, shape=array.shape, datatype="FP32")
            start = wanted[name].parameters["shared_memory_offset"].int64_param // 4
            memory[start : start + array.size] = array.reshape(-1)
        return response


@pytest.fixture
def cupy() -> FakeCupy:
    return FakeCupy()


@pytest.fixture
def package(reference: Package) -> Package:
    return seeing(reference, 1)


@pytest.fixture
def server(package: Package, cupy: FakeCupy) -> Iterator[Running]:
    fake = OnDevice(package.files["model.onnx"], cupy)
    service = grpc.server(ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(fake, service)
    port = service.add_insecure_port("127.0.0.1:0")
    service.start()
    yield Running(fake, f"127.0.0.1:{port}")
    service.stop(0).wait()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_slabs_become_what_the_definition_says_and_stay_on_the_device(cupy: FakeCupy, grid: Grid, dtype: type) -> None:
    shape, spacing, size, pixel_mm = grid
    made = GpuInput(cupy)
    for slab in heads(2, shape, 3).astype(dtype):
        found = made(slab, spacing, size=size, pixel_mm=pixel_mm)
        assert isinstance(found, Device)
        expected = model_input(slab, spacing, size=size, pixel_mm=pixel_mm)
        assert apart(np.asarray(found), expected) <= (TOLERANCE if max(spacing) <= pixel_mm else 0.005)


def test_a_result_is_not_changed_by_the_next_slab(cupy: FakeCupy) -> None:
    made = GpuInput(cupy)
    one, other = heads(2, (512, 512), 5)
    first = made(one, (0.5, 0.5))
    before = first.get()
    made(other, (0.5, 0.5))
    np.testing.assert_array_equal(first.get(), before)


def test_each_thread_has_a_stream_and_a_pinned_buffer_of_its_own(cupy: FakeCupy) -> None:
    made, start = GpuInput(cupy), threading.Barrier(3)

    def work(seed: int) -> None:
        for slab in heads(3, (128, 128), seed):
            start.wait(10)
            expected = model_input(slab, (0.5, 0.5))
            assert apart(np.asarray(made(slab, (0.5, 0.5))), expected) <= TOLERANCE

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    assert len(cupy.cuda.streams) == len(cupy.cuda.pinned) == 3
    assert all(stream.non_blocking and stream.synchronized >= 3 for stream in cupy.cuda.streams)


def test_a_gpu_that_calculates_otherwise_is_not_used(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    GpuInput(cupy).prove((128, 128))
    right = cuda.prepare

    def wrong(*values: Any, **options: Any) -> Any:
        run = right(*values, **options)
        return lambda hu: run(hu) + np.float32(0.001)

    monkeypatch.setattr(cuda, "prepare", wrong)
    with pytest.raises(GpuError, match=r"differs from the definition by 0\.001"):
        GpuInput(cupy).prove((128, 128))
    monkeypatch.setattr(cuda, "prepare", lambda *a, **o: lambda hu: right(*a, **o)(hu) * np.float32(np.nan))
    with pytest.raises(GpuError, match="differs"):
        GpuInput(cupy).prove((128, 128))


def test_cupy_needs_no_home(tmp_path: Path) -> None:
    """No service has one, and CuPy by itself makes a folder in it."""
    pytest.importorskip("cupy", exc_type=ImportError)
    home = tmp_path / "nonexistent"
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(home)}
    home.touch()  # nobody can make a folder of it, root neither
    for code, fails in (("import cupy", 1), ("from appliance.inference.cuda import import_cupy as go; go()", 0)):
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == fails, done.stderr


def test_where_there_is_no_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, cupy: FakeCupy) -> None:
    monkeypatch.setattr(cuda.importlib, "import_module", lambda _: cupy)
    assert find_cupy() is cupy
    cupy.cuda.runtime.devices = 0
    with pytest.raises(GpuError, match="there is no GPU"):
        find_cupy()
    monkeypatch.setattr(cuda.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(GpuError, match="CuPy cannot use a GPU"):
        find_cupy()


@pytest.mark.parametrize("parts", [False, True], ids=["from the host", "from the device"])
def test_slabs_reach_the_server_through_the_gpus_memory(
    server: Running, package: Package, cupy: FakeCupy, parts: bool
) -> None:
    slabs = slabs_of(18)
    given: Any = [[one[:3].view(Device), one[3:].view(Device)] for one in slabs] if parts else slabs
    fake = cast(OnDevice, server.fake)
    with TritonClient(server.url, memory=CudaMemory(cupy)) as client:
        assert client.problem(package) == ""
        output = client.infer(package, given)
        np.testing.assert_allclose(output.probabilities[:, 0], slabs.mean(axis=(1, 2, 3)), rtol=1e-5)
        assert type(output.lesion_map) is np.ndarray
        assert cupy.cuda.get_current_stream().synchronized >= 2
        with pytest.raises(ValueError, match="finite"):
            client.infer(package, slabs * np.float32(np.nan))
    assert (fake.opened, fake.freed_too_soon, cupy.cuda.runtime.allocated) == ({}, [], {})


def test_a_server_that_forgot_a_region_gets_another(server: Running, package: Package, cupy: FakeCupy) -> None:
    with TritonClient(server.url, memory=CudaMemory(cupy)) as client:
        client.infer(package, slabs_of(1))
        cast(OnDevice, server.fake).opened.clear()
        client.infer(package, slabs_of(1))
    assert cupy.cuda.runtime.allocated == {}


def test_what_a_killed_client_left_is_closed_and_a_living_ones_is_not(
    server: Running, package: Package, cupy: FakeCupy
) -> None:
    fake = cast(OnDevice, server.fake)
    handle = b"x" * 64
    names = [f"scanside-cuda-{2**22 + 1}-dead", f"scanside-cuda-{os.getppid()}-alive", "of somebody else"]
    fake.opened = dict.fromkeys(names, handle)
    fake.freed_too_soon = []
    with TritonClient(server.url, memory=CudaMemory(cupy)) as client:
        client.infer(package, slabs_of(1))
    assert list(fake.opened) == names[1:]


def test_a_gpu_without_room_is_an_error(server: Running, package: Package, cupy: FakeCupy) -> None:
    cupy.cuda.runtime.left = 1000
    with (
        TritonClient(server.url, memory=CudaMemory(cupy)) as client,
        pytest.raises(TritonError, match=r"no memory that can be shared.*out of memory"),
    ):
        client.infer(package, slabs_of(1))


@pytest.mark.interop
def test_a_triton_that_cannot_open_the_gpus_memory_says_so(
    triton_server: Server, reference: Package, cupy: FakeCupy
) -> None:
    """The real server of a CPU box: it knows the request, and refuses it."""
    with (
        TritonClient(triton_server.url, memory=CudaMemory(cupy)) as client,
        pytest.raises(TritonError, match="cannot use shared memory"),
    ):
        client.infer(reference, np.zeros((1, *reference.model.input.shape), np.float32))


def by_dali(hu: Any, spacing_mm: tuple[float, float], **options: Any) -> Any:
    return preprocess_dali.prepare("cpu", hu.shape, spacing_mm, maximum_batch=1, **options)(hu[None])[0]


@pytest.mark.interop
@pytest.mark.parametrize("kind", ["arrays", "dali"])
def test_a_study_gets_the_same_verdict(
    triton_server: Server, reference: Package, cupy: FakeCupy, ge_head: Path, kind: str
) -> None:
    """Through another implementation of preprocessing and a real server, to the final probability."""
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    assert reference.parity is not None
    tolerance = reference.parity.tolerance  # what the package allows another runtime
    volume, files, decoder = real(ge_head)
    found = []
    for prepare in (model_input, by_dali if kind == "dali" else GpuInput(cupy)):
        with TritonClient(triton_server.url) as client:
            made = Pipeline(client, decode=decoder, prepare=prepare)
            try:
                reading = read_volume(made, reference, ADMITTED, volume, files, owner=1)
            finally:
                made.close()
        found.append(verdict_on(reference, volume, reading, study_uid="1", series_uid="2"))
    definition, other = found
    assert abs(definition.probability - other.probability) <= tolerance
    assert definition.positive == other.positive
    for one, two in zip(definition.slabs, other.slabs, strict=True):
        for label, value in one.probabilities.items():
            assert abs(value - two.probabilities[label]) <= tolerance


def test_cupy_has_what_is_used_of_it() -> None:
    """The names that the fake has; whether they do on a GPU what is expected of them, no test here can say."""
    there = pytest.importorskip("cupy", exc_type=ImportError)
    for name in ("float32", "take", "full", "subtract", "multiply", "clip", "empty", "asarray", "asnumpy", "isfinite"):
        assert hasattr(there, name), name
    for name in ("malloc", "free", "ipcGetMemHandle", "getDeviceCount"):
        assert callable(getattr(there.cuda.runtime, name))
    for name in ("Stream", "alloc_pinned_memory", "get_current_stream", "UnownedMemory", "MemoryPointer"):
        assert callable(getattr(there.cuda, name))
    assert "memptr" in (there.ndarray.__doc__ or "")
    assert "stream" in inspect.getdoc(there.ndarray.set)


@pytest.fixture
def device() -> Any:
    """CuPy, where there is a GPU."""
    try:
        return find_cupy()
    except GpuError as error:
        pytest.skip(f"needs an NVIDIA GPU: {error}")


@pytest.mark.gpu
def test_the_gpu_calculates_as_the_definition_does(device: Any) -> None:
    made = GpuInput(device)
    made.prove()
    with ThreadPoolExecutor(4) as pool:
        slabs = heads(16, (512, 512), 1)
        for slab, found in zip(slabs, pool.map(lambda one: made(one, (0.45, 0.45)), slabs), strict=True):
            assert isinstance(found, device.ndarray)
            assert apart(device.asnumpy(found), model_input(slab, (0.45, 0.45))) <= TOLERANCE


@pytest.mark.gpu
def test_another_process_opens_the_memory_that_is_shared(device: Any) -> None:
    """As Triton does it; a process cannot open its own handle."""
    import multiprocessing

    region = CudaMemory(device).region(1 << 20)
    region.write(region.floats[:256], np.arange(256, dtype=np.float32))
    region.finish()
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        assert pool.apply(_opened, (base64.b64decode(cast(Any, region)._handle),)) == list(range(256))
    assert region.host(region.floats[256:260]).tolist() == [7, 7, 7, 7]
    region.free()


def _opened(handle: bytes) -> list[float]:
    import cupy

    pointer = cupy.cuda.runtime.ipcOpenMemHandle(handle)
    memory = cupy.cuda.UnownedMemory(pointer, 1 << 20, None, 0)
    floats = cupy.ndarray((1 << 18,), cupy.float32, memptr=cupy.cuda.MemoryPointer(memory, 0))
    found = [float(value) for value in cupy.asnumpy(floats[:256])]
    floats[256:260] = 7
    cupy.cuda.get_current_stream().synchronize()
    cupy.cuda.runtime.ipcCloseMemHandle(pointer)
    return found
