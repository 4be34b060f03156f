"""Many compressed frames at once, on a GPU: nvImageCodec, with nvJPEG2000 below it.

It is asked for JPEG 2000 and HTJ2K only, and of these only for the kinds of which it decoded a frame with known pixels
rightly. What comes back impossible counts as a failure; the reference decides.

It is never asked for JPEG Lossless. On an H100 (nvImageCodec 0.9.0, nvJPEG 13.3.2) that decoder returned wrong pixels
and reported success: of ramps and noise of 64 × 96 pixels and of ramps of 128 × 128, in 10, 12 and 16 bits (2 to
12 KB coded), and from one decoder not always the same pixels twice. Constant images, noise of 128 × 128 and all
simulated slices of 256 × 256 and 512 × 512 (24 to 420 KB) came out right. Nobody knows where the line lies, so all of
it is left to the CPU.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections.abc import Sequence
from typing import Any, Literal

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom.uid import HTJ2KLossless, HTJ2KLosslessRPCL, JPEG2000Lossless

from dicom_io._codecs import Cells, CodedFrame, Stream, inspect_frame
from dicom_io.errors import DecodeError, ScansideError

_FAMILIES: dict[str, str] = {JPEG2000Lossless: "JPEG 2000", HTJ2KLossless: "HTJ2K", HTJ2KLosslessRPCL: "HTJ2K"}

BATCH = 64
"""Frames of a call: some 35 MB of a GPU's memory for slices of 512 × 512."""

logger = logging.getLogger(__name__)


class NvImageCodec:
    """A `dicom_io.pixels.FrameDecoder`; safe to share between threads, which wait for one another.

    Args:
        backend: "gpu", or "cpu" for nvImageCodec's own decoders on the CPU, which take only what is unsigned: good
            for a comparison, and for tests where there is no GPU.

    Raises:
        ScansideError: it is not installed, there is no GPU, or it decodes wrongly.
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
        self._codec = codec
        self._params = codec.DecodeParams(
            apply_exif_orientation=False, color_spec=codec.ColorSpec.UNCHANGED, allow_any_depth=True
        )
        self._lock = threading.Lock()
        self.name = f"nvimgcodec {codec.__version__}" + (" (cpu)" if backend == "cpu" else "")
        known = known_frames()
        self.takes = tuple(known)
        """The kinds that it is asked for: of `known_frames`, those that it decoded, and rightly."""
        self.takes = self._prove(known)
        for kind in known:
            if backend == "gpu" and kind not in self.takes:
                # Else a box with a GPU would decode on its CPU and nobody would know.
                logger.warning("%s does not take %s, as it should; the CPU decodes that", self.name, kind)

    def decode(self, frames: Sequence[CodedFrame]) -> list[Cells | None]:
        """Decode frames, `BATCH` at a time; None for each that it does not take, or fails at."""
        found: list[Cells | None] = [None] * len(frames)
        asked = [(number, stream) for number, frame in enumerate(frames) if (stream := self._accepted(frame))]
        for start in range(0, len(asked), BATCH):
            batch = asked[start : start + BATCH]
            images = self._images([frames[number].data.rstrip(b"\0") for number, _ in batch])
            for (number, stream), image in zip(batch, images, strict=True):
                found[number] = None if image is None else _cells(stream, image)
        return found

    def _accepted(self, frame: CodedFrame) -> Stream | None:
        """What the codestream says of itself, if nvImageCodec can be asked for it.

        Not: a kind that it was not proven to decode, a stream whose walk finds a fault, and one with a tile-part of
        open length, of which nobody can tell whether it was cut off.
        """
        family = _FAMILIES.get(frame.syntax)
        if family is None:
            return None
        try:
            stream = inspect_frame(frame.syntax, frame.data, frame.rows, frame.columns)
        except DecodeError:
            return None  # the reference says what is wrong with it
        return stream if stream.whole and _kind(family, stream.signed) in self.takes else None

    def _images(self, data: Sequence[bytes]) -> list[NDArray[Any] | None]:
        try:
            with self._lock:
                images = self._decoder.decode([self._codec.CodeStream(one) for one in data], params=self._params)
                # The copy keeps the pixels when the image, and with it a buffer that is used again, is gone.
                return [None if one is None else np.array(one.cpu()) for one in images]
        except Exception as error:  # pybind11 has no class for a CUDA error
            logger.warning("%s failed at %d frames; the CPU decodes them: %s", self.name, len(data), error)
            return [None] * len(data)

    def _prove(self, known: dict[str, tuple[CodedFrame, NDArray[Any]]]) -> tuple[str, ...]:
        """Decode frames whose pixels are known; the kinds that it took.

        Raises:
            ScansideError: it decodes one of them wrongly.
        """
        takes = []
        for kind, (frame, expected) in known.items():
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
    for values in (ramp, signed):
        data = imagecodecs.jpeg2k_encode(values, level=0, codecformat="j2k", reversible=True)
        coded = {JPEG2000Lossless: data, HTJ2KLossless: imagecodecs.htj2k_encode(values, reversible=True)}
        for syntax, frame in coded.items():
            kind = _kind(_FAMILIES[syntax], values is signed)
            found[kind] = CodedFrame(syntax, bytes(frame), *values.shape), values
    return found


def _kind(family: str, signed: bool) -> str:
    return f"{family}, {'signed' if signed else 'unsigned'}"


def _cells(stream: Stream, image: NDArray[Any]) -> Cells | None:
    """The image, if it has the right shape and its values are in the codestream's range."""
    if image.dtype.kind != ("i" if stream.signed else "u"):
        return None
    values = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
    if values.shape != (stream.rows, stream.columns):
        return None
    least, most = (
        (-1 << stream.precision - 1, (1 << stream.precision - 1) - 1)
        if stream.signed
        else (0, (1 << stream.precision) - 1)
    )
    if values.min() < least or values.max() > most:
        return None
    return Cells(values, stream.precision, stream.signed)
