"""CuPy for machines that have no GPU: NumPy's arrays stand for those of the device. It shows how `cuda` uses CuPy, not
that the real one agrees; what it has of CuPy has the real one's names, which a test holds.

Memory that was allocated for other processes is found by its handle, as Triton would open it.
"""

from __future__ import annotations

import ctypes
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np


class Device(np.ndarray):
    """An array of the device: it is not to be mixed with the host's unasked."""

    def set(self, values: Any, stream: Any = None) -> None:
        assert isinstance(values, np.ndarray) and not isinstance(values, Device)
        assert stream is not None and stream is _current(), "its copy runs on the stream of its thread"
        np.copyto(np.asarray(self), values)

    def get(self) -> Any:
        return np.array(np.asarray(self))

    def __setitem__(self, place: Any, values: Any) -> None:
        assert not isinstance(values, np.ndarray) or isinstance(values, Device), "CuPy takes no array of the host here"
        super().__setitem__(place, values)


_local = threading.local()


def _current() -> Any:
    return getattr(_local, "stream", None)


@dataclass
class Stream(AbstractContextManager["Stream"]):
    non_blocking: bool = False
    synchronized: int = 0

    def __enter__(self) -> Stream:
        _local.stream = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _local.stream = None

    def synchronize(self) -> None:
        self.synchronized += 1


@dataclass
class Runtime:
    """Memory of the device: address → what lies there. A handle is the address in 64 bytes."""

    devices: int = 1
    left: int = 1 << 34
    allocated: dict[int, Any] = field(default_factory=dict)

    def getDeviceCount(self) -> int:
        return self.devices

    def malloc(self, size: int) -> int:
        if size > self.left:
            raise RuntimeError("cudaErrorMemoryAllocation: out of memory")
        memory = ctypes.create_string_buffer(size)
        self.allocated[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def free(self, address: int) -> None:
        del self.allocated[address]

    def ipcGetMemHandle(self, address: int) -> bytes:
        assert address in self.allocated
        return address.to_bytes(64, "little")

    def opened(self, handle: bytes) -> Any:
        """What another process sees."""
        return np.frombuffer(self.allocated[int.from_bytes(handle, "little")], np.float32)


class Cuda:
    def __init__(self) -> None:
        self.runtime = Runtime()
        self.pinned: list[int] = []
        self.streams: list[Stream] = []
        self._default = Stream()

    def Stream(self, *, non_blocking: bool = False) -> Stream:
        self.streams.append(Stream(non_blocking))
        return self.streams[-1]

    def get_current_stream(self) -> Stream:
        return _current() or self._default

    def alloc_pinned_memory(self, size: int) -> Any:
        self.pinned.append(size)
        return bytearray(size)

    def UnownedMemory(self, address: int, size: int, owner: Any, device_id: int = -1) -> Any:
        return self.runtime.allocated[address]

    def MemoryPointer(self, memory: Any, offset: int) -> Any:
        assert offset == 0
        return memory


class FakeCupy:
    """The part of CuPy that `cuda` and `preprocess_gpu` use."""

    float32 = np.float32

    def __init__(self) -> None:
        self.cuda = Cuda()

    def __getattr__(self, name: str) -> Any:
        def on_device(*values: Any, **options: Any) -> Any:
            return np.asarray(getattr(np, name)(*values, **options)).view(Device)

        if name not in ("take", "full", "subtract", "multiply", "clip", "empty", "asarray", "isfinite"):
            raise AttributeError(name)
        return on_device

    def ndarray(self, shape: tuple[int, ...], dtype: Any, memptr: Any) -> Any:
        return np.frombuffer(memptr, dtype, shape[0]).view(Device)

    def asnumpy(self, values: Device) -> Any:
        return values.get()
