"""What only a box with a GPU does: slabs made into the model's input in its memory, and handed to Triton there.

All of it is here, and takes CuPy as an argument. No GPU has run it yet: the tests give it NumPy in the place of CuPy.
"""

from __future__ import annotations

import base64
import importlib
import os
import re
import secrets
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dicom_io.errors import ScansideError

from .preprocess import PIXEL_MM, SIZE, TOLERANCE, WINDOWS, model_input
from .preprocess_gpu import prepare
from .triton import Region, TritonError

DEVICE = 0
"""The first GPU; Triton's configuration says so too."""

_PREFIX = "scanside-cuda-"
_OWNER = re.compile(rf"{_PREFIX}(\d+)-")

GRIDS = 16
"""Kinds of images whose tables are kept on the device, 10 KB each."""


class GpuError(ScansideError):
    """There is no GPU, or it does not calculate as the definition of preprocessing does."""


def import_cupy() -> Any:
    """CuPy, with its compiled kernels in memory.

    By itself it makes a folder for them in the user's home when it is imported, and no service has a home.

    Raises:
        ImportError: it is not there.
    """
    if "CUPY_CACHE_DIR" not in os.environ:
        os.environ["CUPY_CACHE_IN_MEMORY"] = "1"
        os.environ["CUPY_CACHE_DIR"] = tempfile.gettempdir()  # a folder that is there; nothing is put into it
    return importlib.import_module("cupy")


def find_cupy() -> Any:
    """CuPy, where there is a GPU that it can use.

    Raises:
        GpuError: there is none.
    """
    try:
        cupy = import_cupy()
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CuPy's own kind of error cannot be named without it
        raise GpuError(f"CuPy cannot use a GPU: {error}", 'box.device = "gpu"', "see nvidia-smi, or set cpu") from error
    if not count:
        raise GpuError("there is no GPU", 'box.device = "gpu"', "see nvidia-smi, or set cpu")
    return cupy


class GpuInput:
    """`preprocess.model_input` on a GPU; its results stay there. Threads may share it.

    Each thread has a stream and a pinned buffer of its own: while one slab travels, the next one is worked on.

    Args:
        cupy: CuPy.
    """

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._mine = threading.local()
        self._lock = threading.Lock()
        self._prepared: OrderedDict[Any, Callable[[Any], Any]] = OrderedDict()

    def __call__(
        self,
        hu: NDArray[Any],
        spacing_mm: tuple[float, float],
        *,
        windows: Sequence[tuple[float, float]] = WINDOWS,
        size: int = SIZE,
        pixel_mm: float = PIXEL_MM,
    ) -> Any:
        """As `model_input`, in the GPU's memory; finished when it returns, whatever stream reads it then."""
        cupy = self._cupy
        with self._stream() as stream:
            run = self._run(hu.shape, spacing_mm, tuple(windows), size, pixel_mm, stream)
            staged = self._buffer(hu.size).reshape(hu.shape)
            np.copyto(staged, hu, casting="same_kind")
            moved = cupy.empty((1, *hu.shape), cupy.float32)
            moved.set(staged[None], stream=stream)
            channels = run(moved)[0]
            stream.synchronize()  # the buffer is the next slab's
        return channels

    def prove(self, shape: tuple[int, int] = (512, 512)) -> None:
        """Hold the GPU to the definition on slabs of noise, which also has its kernels compiled before a patient waits.

        Raises:
            GpuError: it calculates otherwise.
        """
        random = np.random.default_rng(1)
        for spacing in ((0.5, 0.5), (0.43, 0.43), (1.2, 0.9)):
            hu = random.uniform(-1100, 1500, shape).astype(np.float32)
            found, wanted = self._cupy.asnumpy(self(hu, spacing)), model_input(hu, spacing)
            # The two spacings that enlarge are those in which OpenCV itself differs from build to build.
            limit = TOLERANCE if max(spacing) <= 1 else 50 * TOLERANCE
            if found.shape != wanted.shape or not np.abs(found - wanted).max() <= limit:
                raise GpuError(
                    f"it differs from the definition by {np.abs(found - wanted).max():g} at {spacing} mm",
                    "preprocessing on the GPU",
                    'report this fault; box.device = "cpu" works',
                )

    def _stream(self) -> Any:
        if not hasattr(self._mine, "stream"):
            self._mine.stream = self._cupy.cuda.Stream(non_blocking=True)
        return self._mine.stream

    def _buffer(self, count: int) -> NDArray[np.float32]:
        """Pinned memory of this thread for so many numbers."""
        if getattr(self._mine, "size", 0) < count:
            self._mine.memory = self._cupy.cuda.alloc_pinned_memory(4 * count)
            self._mine.size = count
        return np.frombuffer(self._mine.memory, np.float32, count)

    def _run(
        self,
        shape: Any,
        spacing_mm: tuple[float, float],
        windows: tuple[tuple[float, float], ...],
        size: int,
        pixel_mm: float,
        stream: Any,
    ) -> Callable[[Any], Any]:
        key = shape, spacing_mm, windows, size, pixel_mm
        with self._lock:
            if key in self._prepared:
                self._prepared.move_to_end(key)
                return self._prepared[key]
        made = prepare(self._cupy, shape, spacing_mm, windows=windows, size=size, pixel_mm=pixel_mm)
        stream.synchronize()  # other threads' streams know nothing of the tables' way to the device
        with self._lock:
            self._prepared[key] = made
            while len(self._prepared) > GRIDS:
                self._prepared.popitem(last=False)
        return made


class CudaMemory:
    """The GPU's memory, which Triton opens too, by CUDA's handles for other processes (cudaIpcGetMemHandle).

    Args:
        cupy: CuPy.
    """

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy

    def region(self, size: int) -> Region:
        return _CudaRegion(self._cupy, size)

    def unregister(self, grpc: Any, name: str, timeout: float) -> None:
        grpc.unregister_cuda_shared_memory(name, client_timeout=timeout)

    def sweep(self, grpc: Any, timeout: float) -> list[str]:
        """The memory itself went with the processes that had it."""
        opened = grpc.get_cuda_shared_memory_status(client_timeout=timeout).regions
        return [name for name in opened if (owner := _OWNER.match(name)) and not Path(f"/proc/{owner[1]}").exists()]


class _CudaRegion:
    def __init__(self, cupy: Any, size: int) -> None:
        self._cupy = cupy
        self.size = size
        self.name = f"{_PREFIX}{os.getpid()}-{secrets.token_hex(6)}"
        runtime = cupy.cuda.runtime
        # Not from CuPy's pool: a handle opens a whole allocation, and the pool gives out parts of one.
        try:
            self._pointer = runtime.malloc(size)
            self._handle = base64.b64encode(bytes(runtime.ipcGetMemHandle(self._pointer)))
        except Exception as error:
            raise TritonError(
                f"the GPU has no memory that can be shared: {error}", f"GPU {DEVICE}", "see nvidia-smi"
            ) from error
        memory = cupy.cuda.UnownedMemory(self._pointer, size, None, DEVICE)
        self.floats = cupy.ndarray((size // 4,), cupy.float32, memptr=cupy.cuda.MemoryPointer(memory, 0))

    def register(self, grpc: Any, timeout: float) -> None:
        grpc.register_cuda_shared_memory(self.name, self._handle, DEVICE, self.size, client_timeout=timeout)

    def write(self, place: Any, part: Any) -> None:
        place[...] = self._cupy.asarray(part)

    def finish(self) -> None:
        # Triton reads on streams of its own, in another process.
        self._cupy.cuda.get_current_stream().synchronize()

    def isfinite(self, values: Any) -> bool:
        return bool(self._cupy.isfinite(values).all())

    def host(self, values: Any) -> NDArray[np.float32]:
        return np.array(self._cupy.asnumpy(values), np.float32)

    def unlink(self) -> None:
        """It has no name, and must not go while the server has it open (cudaFree)."""

    def free(self) -> None:
        self.floats = None
        self._cupy.cuda.runtime.free(self._pointer)
