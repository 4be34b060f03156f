"""Fakes of ``tensorrt`` and ``cupy``, for machines that have no GPU: they show how `plan` uses the two, not that the
real ones agree. The fake engine answers with the mean of what it sees, at the addresses it was given.
"""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.governance.package import Model
from appliance.inference.triton import Output


def answer(slabs: NDArray[np.float32], model: Model, off: float = 0.0) -> Output:
    """The mean of what is seen, everywhere."""
    means = np.float32(off) + slabs.mean(axis=(1, 2, 3), dtype=np.float32)
    labels, field = model.output("probabilities").shape, model.output("lesion_map").shape[1:]
    return Output(
        np.broadcast_to(means[:, None], (len(means), *labels)),
        np.broadcast_to(means[:, None, None], (len(means), *field)),
    )


class _Buffer(np.ndarray):
    """An array whose memory stands for the device's."""

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self.ctypes.data)


def fake_cupy(capability: str = "90") -> Any:
    def device(number: int) -> Any:
        return SimpleNamespace(compute_capability=capability)

    class Stream(nullcontext[None]):
        ptr = 7

        def __init__(self, *, non_blocking: bool) -> None:
            super().__init__()

        def synchronize(self) -> None: ...

    return SimpleNamespace(
        cuda=SimpleNamespace(Device=device, Stream=Stream),
        asarray=lambda values: np.array(values).view(_Buffer),
        full=lambda shape, value, dtype: np.full(shape, value, dtype).view(_Buffer),
        asnumpy=lambda buffer: np.array(buffer),
    )


class FakeTensorRT:
    """The names of ``tensorrt`` that `plan` uses.

    Args:
        model: whose tensors its engines have.
        off: how far their answers are off.
        fp16: whether this version still has the flag.
    """

    float32 = "float32"

    class ILogger:
        Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2)

        def log(self, level: int, message: str) -> None:
            raise NotImplementedError

    def __init__(self, model: Model, version: str = "10.13.2.6", *, off: float = 0.0, fp16: bool = True) -> None:
        self.__version__ = version
        self.model, self.off = model, off
        self.names = [model.input.name, *(output.name for output in model.outputs)]
        self.dtype = self.float32
        self.readable = self.buildable = self.runnable = True
        self.flags: list[str] = []
        self.profiles: list[tuple[Any, ...]] = []
        self.BuilderFlag = SimpleNamespace(FP16="fp16") if fp16 else SimpleNamespace()

    def Builder(self, logger: Any) -> Any:
        def config() -> Any:
            return SimpleNamespace(set_flag=self.flags.append, add_optimization_profile=lambda profile: 0)

        def compiled(network: Any, config: Any) -> bytes | None:
            logger.log(2, "a warning")
            if not self.buildable:
                logger.log(1, "there is no implementation")
                return None
            return b"a fake plan of " + bytes(network.onnx)

        return SimpleNamespace(
            create_network=lambda flags: SimpleNamespace(onnx=b""),
            create_builder_config=config,
            create_optimization_profile=lambda: SimpleNamespace(set_shape=lambda *at: self.profiles.append(at)),
            build_serialized_network=compiled,
        )

    def OnnxParser(self, network: Any, logger: Any) -> Any:
        def parse(onnx: bytes) -> bool:
            network.onnx = onnx
            return self.readable

        said = SimpleNamespace(desc=lambda: "zero point is unsigned")
        return SimpleNamespace(parse=parse, num_errors=1, get_error=lambda number: said)

    def Runtime(self, logger: Any) -> Any:
        def engine(plan: bytes) -> Any:
            if not self.runnable:
                logger.log(1, "the plan is of another version")
                return None
            assert plan.startswith(b"a fake plan of ")
            return SimpleNamespace(
                num_io_tensors=len(self.names),
                get_tensor_name=lambda number: self.names[number],
                get_tensor_dtype=lambda name: self.dtype,
                create_execution_context=lambda: _Context(self),
            )

        return SimpleNamespace(deserialize_cuda_engine=engine)


class _Context:
    def __init__(self, trt: FakeTensorRT) -> None:
        self.trt, self.shapes, self.places = trt, dict[str, tuple[int, ...]](), dict[str, int]()

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert 1 <= shape[0] <= self.trt.model.maximum_batch
        self.shapes = {name: shape} | {one.name: (shape[0], *one.shape) for one in self.trt.model.outputs}
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def set_tensor_address(self, name: str, place: int) -> bool:
        self.places[name] = place
        return True

    def execute_async_v3(self, stream: int) -> bool:
        said = answer(self._at(self.trt.model.input.name), self.trt.model, self.trt.off)
        self._at("probabilities")[:] = said.probabilities
        self._at("lesion_map")[:, 0] = said.lesion_map
        return stream == 7

    def _at(self, name: str) -> NDArray[np.float32]:
        shape = self.shapes[name]
        memory = (ctypes.c_float * int(np.prod(shape))).from_address(self.places[name])
        return np.ctypeslib.as_array(memory).reshape(shape)
