"""Frames → stored values → Hounsfield units. The codecs of the CPU are the reference for every other decoder.

A wrong image must never come out silently, so whatever is doubtful is a `DecodeError` that says why. Another decoder
(`decoder_for`) does many frames at once; what it does not take the reference does, and of what it did a sample is
decoded by the reference too.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSNearLossless,
)

from dicom_io._codecs import COMPRESSED_SYNTAXES, Cells, CodedFrame, codec_name, decode_frame
from dicom_io._codecs import FrameDecoder as FrameDecoder
from dicom_io._elements import MAXIMUM_DEFLATED_HEADER, Elements, inflate, parse, parse_meta, reading
from dicom_io._encapsulated import frames_of
from dicom_io.errors import DecodeError
from dicom_io.plausible import ImplausibleImage

NATIVE_SYNTAXES: tuple[str, ...] = (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
)
SUPPORTED_TRANSFER_SYNTAXES: tuple[str, ...] = NATIVE_SYNTAXES + COMPRESSED_SYNTAXES

PADDING_HU = -1024.0
"""What padding becomes: air."""

MAXIMUM_BYTES = 4 << 30
MAXIMUM_SIDE = 8192
"""Stored values of one instance, and rows or columns, at most: a codestream of some bytes may claim any size."""

SAMPLED_ONE_IN = 16
"""Of the frames that another decoder did, one in so many is decoded by the reference, too, and compared."""

_LOSSY_SYNTAXES = (JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless, JPEG2000, HTJ2K)
_TISSUE_HU = -500.0  # a padding value that means more than this would erase tissue
_MOST_HU = 1e6  # beyond it a rescale is nonsense

_KEYWORDS = (
    "SOPClassUID", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence",
    "PixelPaddingValue", "PixelPaddingRangeLimit",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "PixelValueTransformationSequence",
    "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
)  # fmt: skip
_OVERLAY_BITS_ALLOCATED, _OVERLAY_BIT_POSITION = 0x60000100, 0x60000102
_OVERLAY_GROUPS = tuple(group << 16 for group in range(0, 0x20, 2))  # 6000 to 601E
_OVERLAY_TAGS = tuple(
    tag + group for group in _OVERLAY_GROUPS for tag in (_OVERLAY_BITS_ALLOCATED, _OVERLAY_BIT_POSITION)
)
_UNDEFINED = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Decoded:
    """The pixels of one instance.

    Attributes:
        stored: (frames, rows, columns), int16 or uint16 as Pixel Representation says: the stored values.
        hu: the same shape, float32: ``stored`` × slope + intercept, in HU; padding is `PADDING_HU`.
        codec: what decoded them: "raw", "deflate", "imagecodecs." and the function's name, or the name of another
            decoder; joined with " + " where frames differ in it.
    """

    stored: NDArray[np.integer[Any]]
    hu: NDArray[np.float32]
    codec: str


@dataclass(frozen=True, slots=True)
class _Format:
    """The image pixel description (PS3.3 C.7.6.3), checked."""

    frames: int
    rows: int
    columns: int
    bits_stored: int
    signed: bool
    overlay_mask: int  # bits of a cell that hold overlays (PS3.5 8.1.2, retired)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.frames, self.rows, self.columns

    @property
    def size(self) -> int:
        """Bytes of the pixel cells."""
        return self.frames * self.rows * self.columns * 2


def decode(path: Path, content: bytes | None = None) -> Decoded:
    """Decode all frames of a CT-like instance: one sample, MONOCHROME2, 16 bits allocated, rescaled to HU.

    Bits above Bits Stored may hold overlays that are declared (they are masked off), zeros, or the sign's
    extension. Anything else there is an error.

    Args:
        content: what the file holds, if that was read already.

    Raises:
        DecodeError: a transfer syntax that is lossy or not in `SUPPORTED_TRANSFER_SYNTAXES`; no, damaged, or
            more or less pixel data than the header describes; values outside the bits stored; no rescale to HU
            (PS3.3 C.8.2.1); padding that would erase tissue.
    """
    with reading(str(path), DecodeError):
        packed = _unpack(path, content)
        return _finish(packed, [None] * len(packed.frames), None)


def decoder_for(device: Literal["cpu", "gpu"]) -> FrameDecoder | None:
    """The decoder for a device; None is the reference.

    Raises:
        ScansideError: there is no GPU, or nvImageCodec is missing or decodes wrongly.
    """
    if device == "cpu":
        return None
    from dicom_io.nvimage import NvImageCodec  # a CPU box does not have what it imports

    return NvImageCodec("gpu")


def decode_many(paths: Sequence[Path], decoder: FrameDecoder | None = None) -> list[Decoded]:
    """Decode instances as `decode` does, a thread a core; compressed frames with ``decoder`` where one is given.

    What the decoder does not take is decoded by the reference, and `Decoded.codec` says so. Of what it did, the
    reference decodes a sample too: first, middle, last and one in `SAMPLED_ONE_IN` (the middle one of fewer), and
    every frame of one value or with the values of the frame before it. They must agree bit for bit.

    Args:
        paths: in the order of the volume, as the sample is drawn from it.

    Raises:
        DecodeError: as `decode`.
        ImplausibleImage: the decoder and the reference disagree.
    """
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        if decoder is None:
            return list(pool.map(decode, paths))
        packed = list(pool.map(_unpacked, paths))
        frames = [frame for one in packed for frame in one.frames]
        cells = decoder.decode(frames) if frames else []
        if len(cells) != len(frames):
            raise DecodeError(f"{decoder.name} answered for {len(cells)} of {len(frames)} frames")
        owners = [one.path for one in packed for _ in one.frames]
        list(pool.map(lambda n: _cross_check(owners[n], frames[n], cells[n], decoder.name), _sample(cells)))
        ends = itertools.accumulate((len(one.frames) for one in packed), initial=0)
        parts = [cells[start:end] for start, end in itertools.pairwise(ends)]
        return list(pool.map(lambda one, part: _finished(one, part, decoder.name), packed, parts))


def _sample(cells: Sequence[Cells | None]) -> list[int]:
    """Which frames the reference decodes too; without those that it decodes anyway."""
    count = len(cells)
    chosen = {count // 2}
    if count >= SAMPLED_ONE_IN:
        chosen |= {0, count - 1, *range(0, count, SAMPLED_ONE_IN)}
    found = []
    before: NDArray[Any] | None = None
    for number, one in enumerate(cells):
        values = None if one is None else one.values
        if values is not None:
            odd = bool(np.all(values == values.flat[0])) or (before is not None and np.array_equal(values, before))
            if odd or number in chosen:
                found.append(number)
        before = values
    return found


def _cross_check(path: Path, frame: CodedFrame, cells: Cells | None, name: str) -> None:
    with reading(str(path), DecodeError):
        reference = decode_frame(frame.syntax, frame.data, frame.rows, frame.columns)
    if cells is None or not np.array_equal(cells.values, reference.values):
        raise ImplausibleImage(
            f"{name} and {codec_name(frame.syntax)} decode a frame of it differently",
            str(path),
            'nothing of the series is analysed: set box.device = "cpu" and report this fault',
        )


def _check_syntax(syntax: str) -> None:
    if syntax not in SUPPORTED_TRANSFER_SYNTAXES:
        reason = "lossy, or may be" if syntax in _LOSSY_SYNTAXES else "not supported"
        raise DecodeError(f"its transfer syntax is {reason}: {UID(syntax).name}")


def _format(elements: Elements) -> _Format:
    def exactly(keyword: str, expected: int | str) -> None:
        value = elements.short(keyword) if isinstance(expected, int) else elements.text(keyword)
        if value != expected:
            raise DecodeError(f"{keyword} is {'missing' if value in (None, '') else value}, not {expected}")

    exactly("SamplesPerPixel", 1)
    exactly("PhotometricInterpretation", "MONOCHROME2")
    exactly("BitsAllocated", 16)
    bits_stored = elements.short("BitsStored") or 0
    if not 2 <= bits_stored <= 16:
        raise DecodeError(f"BitsStored is {bits_stored}, not 2 to 16")
    exactly("HighBit", bits_stored - 1)
    representation = elements.short("PixelRepresentation")
    if representation not in (0, 1):
        raise DecodeError(f"PixelRepresentation is {representation}, not 0 or 1")
    frames = elements.integer("NumberOfFrames") if elements.text("NumberOfFrames") else 1
    rows, columns = elements.short("Rows") or 0, elements.short("Columns") or 0
    form = _Format(frames or 0, rows, columns, bits_stored, representation == 1, _overlay_mask(elements, bits_stored))
    if frames is None or frames < 1 or not rows or not columns:
        raise DecodeError(f"NumberOfFrames, Rows and Columns are {frames}, {rows} and {columns}")
    if form.size > MAXIMUM_BYTES or max(rows, columns) > MAXIMUM_SIDE:
        raise DecodeError(f"{frames} frames of {rows} × {columns} are too large")
    return form


def _overlay_mask(elements: Elements, bits_stored: int) -> int:
    mask = 0
    for group in _OVERLAY_GROUPS:
        position = elements.short(_OVERLAY_BIT_POSITION + group)
        if position and elements.short(_OVERLAY_BITS_ALLOCATED + group) == 16:
            if not bits_stored <= position <= 15:
                raise DecodeError(f"an overlay lies in bit {position} of the pixels")
            mask |= 1 << position
    return mask


def _whole(file: BinaryIO, stream: BinaryIO, form: _Format) -> BinaryIO:
    """The inflated data set up to the pixel data's end, which is beyond what `parse` inflates in large objects."""
    start = stream.tell()
    end = start + 12 + form.size
    if end <= MAXIMUM_DEFLATED_HEADER:
        return stream
    file.seek(0)
    parse_meta(file)
    whole = BytesIO(inflate(file.read(), end))
    whole.seek(start)
    return whole


@dataclass(frozen=True, slots=True)
class _Packed:
    """An instance that was read: its stored values if they lie there as they are, else its compressed frames."""

    path: Path
    elements: Elements
    form: _Format
    stored: NDArray[np.integer[Any]] | None
    frames: list[CodedFrame]
    codec: str


def _unpacked(path: Path) -> _Packed:
    with reading(str(path), DecodeError):
        return _unpack(path)


def _finished(packed: _Packed, cells: Sequence[Cells | None], name: str) -> Decoded:
    with reading(str(packed.path), DecodeError):
        return _finish(packed, cells, name)


def _unpack(path: Path, content: bytes | None = None) -> _Packed:
    with path.open("rb") if content is None else BytesIO(content) as file:
        syntax, elements, stream = parse(file, _KEYWORDS, _OVERLAY_TAGS)
        _check_syntax(syntax)
        form = _format(elements)
        if syntax == DeflatedExplicitVRLittleEndian:
            stream = _whole(file, stream, form)
        length = _at_pixel_data(stream, elements)
        if syntax in NATIVE_SYNTAXES:
            stored = _native(stream, length, elements.encoding[1], form)
            codec = "deflate" if syntax == DeflatedExplicitVRLittleEndian else "raw"
            return _Packed(path, elements, form, stored, [], codec)
        if length != _UNDEFINED:
            raise DecodeError("its pixel data is not encapsulated, as its transfer syntax says")
        tables = elements.raw_bytes("ExtendedOffsetTable"), elements.raw_bytes("ExtendedOffsetTableLengths")
        extended = None if tables[0] is None else (tables[0], tables[1] or b"")
        coded = frames_of(stream.read(), form.frames, extended)
    frames = [CodedFrame(syntax, data, form.rows, form.columns) for data in coded]
    return _Packed(path, elements, form, None, frames, codec_name(syntax))


def _native(stream: BinaryIO, length: int, little: bool, form: _Format) -> NDArray[np.integer[Any]]:
    if length != form.size:
        shown = "an undefined number of" if length == _UNDEFINED else length
        raise DecodeError(f"it has {shown} bytes of pixel data, the header describes {form.size}")
    value = stream.read(form.size)
    if len(value) != form.size:
        raise DecodeError(f"its pixel data is cut off after {len(value)} of {form.size} bytes")
    patterns = np.frombuffer(value, "<u2" if little else ">u2").reshape(form.shape).astype(np.uint16, copy=False)
    return _from_patterns(patterns, 16, form)


def _finish(packed: _Packed, decoded: Sequence[Cells | None], name: str | None) -> Decoded:
    """Stored values and HU from cells; the reference decodes the frames that have none yet."""
    form, stored = packed.form, packed.stored
    codecs = {packed.codec}
    if stored is None:
        stored = np.empty(form.shape, np.int16 if form.signed else np.uint16)
        codecs = set()
        for index, (frame, cells) in enumerate(zip(packed.frames, decoded, strict=True)):
            codecs.add(packed.codec if cells is None or name is None else name)
            if cells is None:
                cells = decode_frame(frame.syntax, frame.data, frame.rows, frame.columns)
            stored[index] = (
                _from_samples(cells, form) if cells.signed else _from_patterns(cells.values, cells.precision, form)
            )
    return Decoded(stored, _to_hu(stored, packed.elements, form), " + ".join(sorted(codecs)))


def _at_pixel_data(stream: BinaryIO, elements: Elements) -> int:
    """Read the header of the Pixel Data element (PS3.5 7.1); returns the length of its value."""
    implicit, little = elements.encoding
    order = "<" if little else ">"
    head = stream.read(8 if implicit else 12)
    if len(head) < (8 if implicit else 12):
        raise DecodeError("it has no pixel data")
    group, element = struct.unpack(order + "HH", head[:4])
    if (group, element) != (0x7FE0, 0x0010):
        raise DecodeError("its pixel data is floating point")
    if not implicit and head[4:6] not in (b"OW", b"OB"):
        raise DecodeError("its pixel data is neither OW nor OB")
    (length,) = struct.unpack(order + "I", head[-4:])
    return int(length)


def _from_patterns(cells: NDArray[Any], precision: int, form: _Format) -> NDArray[np.integer[Any]]:
    """Stored values from bit patterns of ``precision`` bits: remove overlays, extend the sign, check the rest."""
    if form.signed and precision < form.bits_stored:
        raise DecodeError(f"its samples have {precision} bits, too few for signed values of {form.bits_stored}")
    patterns = cells.astype(np.uint16, copy=False)
    if form.overlay_mask:
        patterns = patterns & np.uint16(0xFFFF & ~form.overlay_mask)
    unused = 16 - form.bits_stored
    if not form.signed:
        if unused and int(patterns.max()) >> form.bits_stored:
            raise DecodeError(f"it has values outside the {form.bits_stored} bits stored (up to {patterns.max()})")
        return patterns
    if not unused:
        return patterns.view(np.int16)
    values = (patterns << unused).view(np.int16) >> unused
    # The bits above must be the sign's extension as far as the samples reach, or zeros; an overlay's are zeros. Not now
    # the one and now the other: zeros above what seems negative, where others have the sign, are a value out of range.
    kept = np.uint16((1 << precision) - 1 & ~form.overlay_mask)
    extended = np.array_equal(patterns, values.view(np.uint16) & kept)
    if not extended and int(patterns.max()) >> form.bits_stored:
        raise DecodeError(f"it has values outside the {form.bits_stored} bits stored")
    return values


def _from_samples(cells: Cells, form: _Format) -> NDArray[np.integer[Any]]:
    """Stored values from samples that the codestream declares to be signed.

    If Pixel Representation says unsigned, the two readings agree as long as no sample is negative.
    """
    low, high = int(cells.values.min()), int(cells.values.max())
    least, most = (
        (-1 << form.bits_stored - 1, (1 << form.bits_stored - 1) - 1)
        if form.signed
        else (0, (1 << form.bits_stored) - 1)
    )
    if low < least or high > most:
        raise DecodeError(f"it has values outside the {form.bits_stored} bits stored ({low} to {high})")
    return cells.values.astype(np.int16 if form.signed else np.uint16)


def _to_hu(stored: NDArray[np.integer[Any]], elements: Elements, form: _Format) -> NDArray[np.float32]:
    rescales = _rescales(elements, form.frames)
    padding = _padding(elements, form.signed)
    if elements.problems:
        raise DecodeError("; ".join(elements.problems))
    hu = stored.astype(np.float32)
    for index, (slope, intercept) in enumerate(rescales):
        frame, values = hu[index], stored[index]
        frame *= np.float32(slope)
        frame += np.float32(intercept)
        if padding is None:
            continue
        low, high = padding
        padded = values == low if low == high else (values >= low) & (values <= high)
        if padded.any():
            if high * slope + intercept > _TISSUE_HU:
                raise DecodeError(f"its padding value {high} means {high * slope + intercept:g} HU, which is no air")
            frame[padded] = PADDING_HU
    return hu


def _padding(elements: Elements, signed: bool) -> tuple[int, int] | None:
    """The lowest and the highest value that is padding (PS3.3 C.7.5.1.1.2)."""
    value = elements.short("PixelPaddingValue")
    if value is None:
        return None
    limit = elements.short("PixelPaddingRangeLimit")
    values = [value if limit is None else limit, value]
    if signed:
        values = [v - 0x10000 if v & 0x8000 else v for v in values]
    return min(values), max(values)


def _rescales(elements: Elements, frames: int) -> list[tuple[float, float]]:
    """Slope and intercept of each frame; the enhanced objects keep them in the functional groups."""
    if "ModalityLUTSequence" in elements:
        raise DecodeError("it has a modality lookup table in place of a rescale to HU")
    per_frame = elements.items("PerFrameFunctionalGroupsSequence")
    shared = elements.first("SharedFunctionalGroupsSequence")
    if not per_frame and shared is None:
        return [_rescale(elements)] * frames
    if len(per_frame) != frames:
        raise DecodeError(f"it has functional groups for {len(per_frame)} of {frames} frames")
    common = shared.first("PixelValueTransformationSequence") if shared else None
    return [_rescale(group.first("PixelValueTransformationSequence") or common or elements) for group in per_frame]


def _rescale(elements: Elements) -> tuple[float, float]:
    slope, intercept = elements.number("RescaleSlope"), elements.number("RescaleIntercept")
    if slope is None or intercept is None:
        raise DecodeError("RescaleSlope or RescaleIntercept is missing or unreadable")
    kind = elements.text("RescaleType")
    if kind not in ("", "HU"):
        raise DecodeError(f"its values are rescaled to {kind}, not HU")
    if slope <= 0 or slope * 0x10000 > _MOST_HU or abs(intercept) > _MOST_HU:
        raise DecodeError(f"RescaleSlope {slope:g} and RescaleIntercept {intercept:g} do not give HU")
    return slope, intercept
