"""One compressed frame → its pixel cells, with the checks that the codecs themselves do not make.

Some decoders return an image for a stream that was cut off or damaged. OpenJPH (``htj2k``) does, as imagecodecs drops
its errors, so OpenJPEG decodes HTJ2K too, at half the speed. libjpeg-turbo (``jpeg8``) does, so a frame is decoded
twice; liblj92 (``ljpeg``) reads on in the memory behind the frame and is not used. Every codestream is walked
before it is decoded. None of these formats has a checksum: a wrong bit in the coded data may still go unseen.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom.uid import (
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from dicom_io.errors import DecodeError


@dataclass(frozen=True, slots=True)
class Cells:
    """A decoded frame, before the meaning of its bits is settled.

    Attributes:
        values: (rows, columns), integer.
        precision: bits of a sample in the codestream; 16 for RLE, which codes whole cells.
        signed: whether the codestream says that its samples are signed. If not, ``values`` are bit patterns.
    """

    values: NDArray[Any]
    precision: int
    signed: bool


@dataclass(frozen=True, slots=True)
class CodedFrame:
    """A compressed frame, and what the header says of it."""

    syntax: str
    data: bytes
    rows: int
    columns: int


class FrameDecoder(Protocol):
    """A decoder beside the reference, which is `decode_frame`."""

    @property
    def name(self) -> str:
        """What it is called where a verdict names its decoders."""

    def decode(self, frames: Sequence[CodedFrame]) -> list[Cells | None]:
        """Decode many frames at once; None for each that it does not take, or fails at. Raises nothing for a frame."""


@dataclass(frozen=True, slots=True)
class Stream:
    """What a codestream says of itself.

    Attributes:
        whole: whether the walk proved that nothing is missing at its end.
    """

    rows: int
    columns: int
    components: int
    precision: int
    signed: bool
    whole: bool = False


def inspect_frame(syntax: str, frame: bytes, rows: int, columns: int) -> Stream:
    """Walk one frame of a compressed transfer syntax without decoding it.

    Raises:
        DecodeError: it is damaged, lossy, or not of one component, ``rows`` × ``columns`` and 16 bits or less.
    """
    inspect, _ = _CODECS[syntax]
    try:
        stream = inspect(frame, rows, columns)
    except (IndexError, struct.error):
        raise DecodeError("the compressed frame ends within its header") from None
    if (stream.rows, stream.columns) != (rows, columns):
        raise DecodeError(
            f"the compressed frame has {stream.rows} × {stream.columns} pixels, the header says {rows} × {columns}"
        )
    if stream.components != 1:
        raise DecodeError(f"the compressed frame has {stream.components} components, not 1")
    if not 2 <= stream.precision <= 16:
        raise DecodeError(f"the compressed frame has {stream.precision} bits in a sample, not 2 to 16")
    return stream


def decode_frame(syntax: str, frame: bytes, rows: int, columns: int) -> Cells:
    """Decode one frame of a compressed transfer syntax (PS3.5 A.4).

    Raises:
        DecodeError: as `inspect_frame`, or the codec fails.
    """
    stream = inspect_frame(syntax, frame, rows, columns)
    _, decode = _CODECS[syntax]
    try:
        values = decode(frame, rows, columns)
    except Exception as error:  # each codec has an error class of its own
        raise DecodeError(f"the compressed frame is damaged ({error})") from error
    if values.shape != (rows, columns) or values.dtype.kind not in "iu":
        raise DecodeError(f"the decoder returned {values.dtype} of shape {values.shape}")
    return Cells(values, stream.precision, stream.signed)


def codec_name(syntax: str) -> str:
    """The decoder that `decode_frame` uses for a transfer syntax."""
    return _NAMES[syntax]


def _inspect_rle(frame: bytes, rows: int, columns: int) -> Stream:
    """PS3.5 G.5: 16 numbers of 32 bits, the count of segments and their offsets; two segments for 16-bit cells."""
    count, *offsets = struct.unpack("<16I", frame[:64])
    if count != 2:
        raise DecodeError(f"the RLE frame has {count} segments, not 2")
    if not 64 == offsets[0] < offsets[1] < len(frame):
        raise DecodeError("the RLE frame's segment offsets lie outside it")
    return Stream(rows, columns, 1, 16, False)


def _inspect_jpeg(frame: bytes, expected: int, name: str) -> tuple[Stream, bytes]:
    """Walk the marker segments up to the first scan (ISO/IEC 10918-1 B.1). Returns also that scan's header."""
    if frame[:2] != b"\xff\xd8":
        raise DecodeError(f"the frame is no {name} stream")
    if not frame.rstrip(b"\0").endswith(b"\xff\xd9"):
        raise DecodeError(f"the {name} stream is cut off: it has no end marker")
    stream = None
    position = 2
    while True:
        if frame[position] != 0xFF:
            raise DecodeError(f"the {name} stream has no marker where one must be")
        marker = frame[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        (length,) = struct.unpack(">H", frame[position + 2 : position + 4])
        segment = frame[position + 4 : position + 2 + length]
        if marker == 0xDA:
            break
        if marker == expected:
            precision, rows, columns, components = struct.unpack(">BHHB", segment[:6])
            stream = Stream(rows, columns, components, precision, False)
        elif marker in _FRAME_MARKERS:
            raise DecodeError(f"the frame is another kind of JPEG (SOF marker 0x{marker:02X}), not {name}")
        position += 2 + length
    if stream is None:
        raise DecodeError(f"the {name} stream has no frame header")
    return stream, segment


_JUNK = bytes(range(1, 255))  # no 0xFF, which would begin a marker
_FRAME_MARKERS = frozenset({*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC})


def _inspect_jpeg_lossless(frame: bytes, rows: int, columns: int) -> Stream:
    stream, scan = _inspect_jpeg(frame, 0xC3, "JPEG Lossless")
    if scan[-1] & 0x0F:
        raise DecodeError("the JPEG Lossless stream drops low bits (a point transform), so it is lossy")
    return stream


def _inspect_jpeg_ls(frame: bytes, rows: int, columns: int) -> Stream:
    stream, scan = _inspect_jpeg(frame, 0xF7, "JPEG-LS")
    if scan[1 + 2 * scan[0]]:
        raise DecodeError(f"the JPEG-LS stream is near-lossless (NEAR = {scan[1 + 2 * scan[0]]})")
    return stream


def _inspect_jpeg_2000(frame: bytes, rows: int, columns: int) -> Stream:
    """Walk main header and tile-parts (ISO/IEC 15444-1 A.3 to A.6), which must end just at the end of the stream."""
    data = frame.rstrip(b"\0")
    if data[:4] != b"\xff\x4f\xff\x51":
        raise DecodeError("the frame is no JPEG 2000 codestream")
    if not data.endswith(b"\xff\xd9"):
        raise DecodeError("the JPEG 2000 codestream is cut off: it has no end marker")
    width, height, left, top = struct.unpack(">4I", data[8:24])
    (components,) = struct.unpack(">H", data[40:42])
    stream = Stream(height - top, width - left, components, (data[42] & 0x7F) + 1, bool(data[42] & 0x80))
    position, whole = 2, True
    while (marker := data[position : position + 2]) != b"\xff\xd9":
        (length,) = struct.unpack(">H", data[position + 2 : position + 4])
        if marker == b"\xff\x90":  # SOT: its Psot counts from here to the end of the tile-part, 0 to the end of all
            (part,) = struct.unpack(">I", data[position + 6 : position + 10])
            whole = whole and part != 0
            position = position + part if part else len(data) - 2
            if part and part < 14:
                raise DecodeError("the JPEG 2000 codestream has a tile-part of no length")
        else:
            if marker == b"\xff\x52" and data[position + 13] != 1:  # COD: the transformation, 1 is the 5-3 filter
                raise DecodeError("the JPEG 2000 codestream uses the irreversible transformation, so it is lossy")
            position += 2 + length
    if position != len(data) - 2:
        raise DecodeError("the JPEG 2000 codestream has an end marker within")
    return replace(stream, whole=whole)


def _decode_rle(frame: bytes, rows: int, columns: int) -> NDArray[Any]:
    # Each half by itself: of two segments of wrong lengths that make up the right sum the whole would be a wrong image.
    first, second = struct.unpack_from("<2I", frame, 4)
    halves = [imagecodecs.packbits_decode(part) for part in (frame[first:second], frame[second:])]
    if any(len(half) != rows * columns for half in halves):
        raise ValueError("a segment has another length than the image")
    high, low = (np.frombuffer(half, np.uint8).astype(np.uint16) for half in halves)
    values: NDArray[Any] = ((high << 8) | low).reshape(rows, columns)
    return values


def with_junk(data: bytes) -> bytes:
    """A JPEG stream that ends with its end marker, with bytes that mean nothing before that.

    A decoder makes up what is missing of a stream that was cut off. If nothing is, then what follows the
    entropy-coded data makes no difference to the image.
    """
    return data[:-2] + _JUNK + data[-2:]


def _decode_jpeg_lossless(frame: bytes, rows: int, columns: int) -> NDArray[Any]:
    data = frame.rstrip(b"\0")
    values = np.asarray(imagecodecs.jpeg8_decode(data))
    if not np.array_equal(values, imagecodecs.jpeg8_decode(with_junk(data))):
        raise ValueError("its entropy-coded data ends too early")
    return values


def _decode_jpeg_ls(frame: bytes, rows: int, columns: int) -> NDArray[Any]:
    return np.asarray(imagecodecs.jpegls_decode(frame))


def _decode_jpeg_2000(frame: bytes, rows: int, columns: int) -> NDArray[Any]:
    return np.asarray(imagecodecs.jpeg2k_decode(frame))


_CODECS: dict[str, tuple[Callable[[bytes, int, int], Stream], Callable[[bytes, int, int], NDArray[Any]]]] = {
    RLELossless: (_inspect_rle, _decode_rle),
    JPEGLossless: (_inspect_jpeg_lossless, _decode_jpeg_lossless),
    JPEGLosslessSV1: (_inspect_jpeg_lossless, _decode_jpeg_lossless),
    JPEGLSLossless: (_inspect_jpeg_ls, _decode_jpeg_ls),
    JPEG2000Lossless: (_inspect_jpeg_2000, _decode_jpeg_2000),
    HTJ2KLossless: (_inspect_jpeg_2000, _decode_jpeg_2000),
    HTJ2KLosslessRPCL: (_inspect_jpeg_2000, _decode_jpeg_2000),
}
_NAMES: dict[str, str] = {
    RLELossless: "imagecodecs.packbits",
    JPEGLossless: "imagecodecs.jpeg8",
    JPEGLosslessSV1: "imagecodecs.jpeg8",
    JPEGLSLossless: "imagecodecs.jpegls",
    JPEG2000Lossless: "imagecodecs.jpeg2k",
    HTJ2KLossless: "imagecodecs.jpeg2k",
    HTJ2KLosslessRPCL: "imagecodecs.jpeg2k",
}
COMPRESSED_SYNTAXES: tuple[str, ...] = tuple(_CODECS)
