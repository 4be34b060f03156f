"""Many compressed frames at once, on a GPU: nvImageCodec, with nvJPEG and nvJPEG2000 below it.

It is asked only for what it can be trusted with. nvJPEG before 13.0.2 decodes JPEG Lossless of 9 to 15 bits to zeros
and reports success, so an older one is not used at all, and neither is a decoder that fails at a frame of each kind
whose pixels are known. What is asked for and comes back impossible counts as a failure; the reference decides.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import threading
from collections.abc import Sequence
from typing import Any, Literal

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom.uid import HTJ2KLossless, HTJ2KLosslessRPCL, JPEG2000Lossless, JPEGLossless, JPEGLosslessSV1

from dicom_io._codecs import Cells, CodedFrame, Stream, inspect_frame, with_junk
from dicom_io.errors import DecodeError, ScansideError

JPEG_SYNTAXES = (JPEGLossless, JPEGLosslessSV1)
WAVELET_SYNTAXES = (JPEG2000Lossless, HTJ2KLossless, HTJ2KLosslessRPCL)

LEAST_NVJPEG = (13, 0, 2)

BATCH = 64
"""Frames of a call: some 35 MB of a GPU's memory for slices of 512 × 512."""

logger = logging.getLogger(__name__)


class NvImageCodec:
    """A `dicom_io.pixels.FrameDecoder`; safe to share between threads, which wait for one another.

    Args:
        backend: "gpu", or "cpu" for nvImageCodec's own decoders on the CPU, which take unsigned JPEG 2000 and
            JPEG Lossless of 8 bits: good for a comparison, and for tests where there is no GPU.

    Raises:
        ScansideError: it is not installed or too old, there is no GPU, or it decodes wrongly.
    """

    def __init__(self, backend: Literal["gpu", "cpu"] = "gpu") -> None:
        # Else it writes a line to stderr for each frame that it does not take, and for each codec that it lacks.
        os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
        try:
            codec = importlib.import_module("nvidia.nvimgcodec")
        except ImportError as error:
            raise ScansideError(f"it cannot be imported ({error})", "nvImageCodec", _REMEDY) from error
        kinds = codec.BackendKind
        wanted = [kinds.CPU_ONLY] if backend == "cpu" else [kinds.GPU_ONLY, kinds.HYBRID_CPU_GPU, kinds.HW_GPU_ONLY]
        device = codec.NVIMGCODEC_DEVICE_CPU_ONLY if backend == "cpu" else codec.NVIMGCODEC_DEVICE_CURRENT
        try:
            self._decoder = codec.Decoder(device_id=device, backends=[codec.Backend(kind) for kind in wanted])
        except RuntimeError as error:
            raise ScansideError(f"it finds no GPU that it can use ({error})", "nvImageCodec", _REMEDY) from error
        if backend == "gpu":
            check_nvjpeg(nvjpeg_version())
        self._codec = codec
        self._params = codec.DecodeParams(
            apply_exif_orientation=False, color_spec=codec.ColorSpec.UNCHANGED, allow_any_depth=True
        )
        self._lock = threading.Lock()
        self.name = f"nvimgcodec {codec.__version__}" + (" (cpu)" if backend == "cpu" else "")
        self.takes = self._prove()
        """The kinds of `KNOWN` that it decoded, and rightly; what it does not take the reference decodes."""

    def decode(self, frames: Sequence[CodedFrame]) -> list[Cells | None]:
        """Decode frames, `BATCH` at a time; None for each that it does not take, or fails at."""
        found: list[Cells | None] = []
        for start in range(0, len(frames), BATCH):
            found += self._batch(frames[start : start + BATCH])
        return found

    def _batch(self, frames: Sequence[CodedFrame]) -> list[Cells | None]:
        streams = [_accepted(frame) for frame in frames]
        jobs: list[tuple[int, bytes]] = []
        for number, (frame, stream) in enumerate(zip(frames, streams, strict=True)):
            if stream is None:
                continue
            data = frame.data.rstrip(b"\0")
            jobs.append((number, data))
            if not stream.whole:
                jobs.append((number, with_junk(data)))
        images: list[list[NDArray[Any] | None]] = [[] for _ in frames]
        for (number, _), image in zip(jobs, self._images([data for _, data in jobs]), strict=True):
            images[number].append(image)
        return [
            None if stream is None else _cells(stream, found) for stream, found in zip(streams, images, strict=True)
        ]

    def _images(self, data: Sequence[bytes]) -> list[NDArray[Any] | None]:
        if not data:
            return []
        try:
            with self._lock:
                images = self._decoder.decode([self._codec.CodeStream(one) for one in data], params=self._params)
                # The copy keeps the pixels when the image, and with it a buffer that is used again, is gone.
                return [None if one is None else np.array(one.cpu()) for one in images]
        except Exception as error:  # pybind11 has no class for a CUDA error
            logger.warning("%s failed at %d frames; the CPU decodes them: %s", self.name, len(data), error)
            return [None] * len(data)

    def _prove(self) -> tuple[str, ...]:
        """Decode frames whose pixels are known.

        Raises:
            ScansideError: it decodes one of them wrongly.
        """
        takes = []
        for kind, (frame, expected) in known_frames().items():
            (cells,) = self.decode([frame])
            if cells is None:
                continue
            if not np.array_equal(cells.values, expected):
                raise ScansideError(f"{self.name} decodes {kind} wrongly", "nvImageCodec", _REMEDY)
            takes.append(kind)
        return tuple(takes)


_REMEDY = 'install the gpu extra and a driver for CUDA 13, or set box.device = "cpu"'


def known_frames() -> dict[str, tuple[CodedFrame, NDArray[Any]]]:
    """A frame of each kind with its pixels, encoded by the CPU's codecs."""
    y, x = np.mgrid[:64, :96]
    ramp = (y * 37 + x * 11 + (x * y) % 23).astype(np.uint16) % 4096
    signed = (ramp.astype(np.int32) * 5 - 9000).astype(np.int16)
    found = {}
    for bits, values in ((8, (ramp % 256).astype(np.uint8)), (12, ramp), (16, ramp * 16)):
        data = imagecodecs.jpeg8_encode(values, lossless=True, predictor=1, bitspersample=bits)
        found[f"JPEG Lossless, {bits} bits"] = JPEGLosslessSV1, data, values
    for name, values in (("unsigned", ramp), ("signed", signed)):
        data = imagecodecs.jpeg2k_encode(values, level=0, codecformat="j2k", reversible=True)
        found[f"JPEG 2000, {name}"] = JPEG2000Lossless, data, values
        found[f"HTJ2K, {name}"] = HTJ2KLossless, imagecodecs.htj2k_encode(values, reversible=True), values
    return {
        kind: (CodedFrame(syntax, bytes(data), *values.shape), values) for kind, (syntax, data, values) in found.items()
    }


def nvjpeg_version() -> tuple[int, int, int] | None:
    """The version of the nvJPEG of CUDA 13 that this process uses; None without one."""
    try:
        library = ctypes.CDLL("libnvjpeg.so.13")
    except OSError:
        return None
    parts = []
    for which in range(3):  # MAJOR_VERSION, MINOR_VERSION, PATCH_LEVEL
        value = ctypes.c_int(-1)
        if library.nvjpegGetProperty(which, ctypes.byref(value)):
            return None
        parts.append(value.value)
    return parts[0], parts[1], parts[2]


def check_nvjpeg(version: tuple[int, int, int] | None) -> None:
    """See that nvJPEG is one that does not decode JPEG Lossless to zeros.

    Raises:
        ScansideError: it is older than `LEAST_NVJPEG`, or missing.
    """
    if version is None or version < LEAST_NVJPEG:
        shown = "missing" if version is None else ".".join(map(str, version))
        least = ".".join(map(str, LEAST_NVJPEG))
        raise ScansideError(f"nvJPEG of CUDA 13 is {shown}, not {least} or newer", "nvImageCodec", _REMEDY)


def _accepted(frame: CodedFrame) -> Stream | None:
    """What the codestream says of itself, if nvImageCodec can be asked for it.

    Not: a stream whose walk finds a fault, JPEG Lossless with another predictor than the first, and JPEG 2000 with a
    tile-part of open length, of which nobody can tell whether it was cut off.
    """
    if frame.syntax not in (*JPEG_SYNTAXES, *WAVELET_SYNTAXES):
        return None
    try:
        stream = inspect_frame(frame.syntax, frame.data, frame.rows, frame.columns)
    except DecodeError:
        return None  # the reference says what is wrong with it
    return stream if (stream.predictor == 1 if frame.syntax in JPEG_SYNTAXES else stream.whole) else None


def _cells(stream: Stream, images: Sequence[NDArray[Any] | None]) -> Cells | None:
    """The image, if all decodings agree, it has the right shape, and its values are in the codestream's range."""
    first = images[0]
    if first is None or first.dtype.kind != ("i" if stream.signed else "u"):
        return None
    values = first[..., 0] if first.ndim == 3 and first.shape[2] == 1 else first
    if values.shape != (stream.rows, stream.columns):
        return None
    least, most = (
        (-1 << stream.precision - 1, (1 << stream.precision - 1) - 1)
        if stream.signed
        else (0, (1 << stream.precision) - 1)
    )
    if values.min() < least or values.max() > most:
        return None
    if any(one is None or not np.array_equal(one, first) for one in images[1:]):
        return None
    return Cells(values, stream.precision, stream.signed)
