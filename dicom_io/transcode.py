"""An object of ours in another transfer syntax, without a loss: what a destination would rather have (PS3.5 Annex A).

The instance stays the same: its UID does not change where nothing is lost (PS3.4 B.4.1.3). Each compressed frame is
decoded again and compared before anybody gets it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels.encoders.base import RLELosslessEncoder
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

from dicom_io.verbatim import write_verbatim

SYNTAXES: tuple[UID, ...] = (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
    JPEG2000Lossless,
)
"""What an object can be written in."""
_PLAIN = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian)


def fitting(path: Path, wanted: Sequence[str]) -> tuple[str, ...]:
    """Those of some transfer syntaxes that a Part 10 file of ours can be written in, in their order.

    RLE is for whole bytes: no reader that we could ask reads single bits in it. JPEG 2000 takes them as well.

    Raises:
        OSError, InvalidDicomError: it cannot be read.
    """
    header = pydicom.dcmread(path, stop_before_pixels=True)
    return tuple(one for one in wanted if _fits(header, UID(one)))


def _fits(header: Dataset, syntax: UID) -> bool:
    if syntax in _PLAIN:
        return True
    # A presentation state or a report has no pixels.
    bits, samples = header.get("BitsAllocated"), header.get("SamplesPerPixel")
    if samples not in (1, 3):
        return False
    return bits == 8 if syntax == RLELossless else bits == 8 or (bits, samples) == (1, 1)


def transcoded(source: Path, target: Path, syntax: str) -> None:
    """Write a Part 10 file in Explicit VR Little Endian, as ours are, anew in a syntax that `fitting` has for it.

    Raises:
        ValueError: it cannot be, or the pixels that were read back are not those that were written.
        OSError, InvalidDicomError: a file cannot be read or written.
    """
    made = pydicom.dcmread(source)
    if made.file_meta.TransferSyntaxUID != ExplicitVRLittleEndian or not _fits(made, UID(syntax)):
        raise ValueError(f"{UID(made.file_meta.TransferSyntaxUID).name} cannot become {UID(syntax).name}")
    if UID(syntax) not in _PLAIN:
        _compress(made, UID(syntax))
    made.file_meta.TransferSyntaxUID = UID(syntax)
    write_verbatim(target, made)


def _compress(made: Dataset, syntax: UID) -> None:
    bits, samples = int(made.BitsAllocated), int(made.SamplesPerPixel)
    count, shape = int(made.get("NumberOfFrames") or 1), (int(made.Rows), int(made.Columns))
    pixels = np.ascontiguousarray(made.pixel_array).reshape(count, *shape, *((samples,) if samples > 1 else ()))
    frames = []
    for frame in pixels:
        coded = _run_lengths(frame) if syntax == RLELossless else _wavelets(frame, bits)
        again = _decoded(coded, frame.shape, syntax)
        if again.shape != frame.shape or not np.array_equal(again, frame):
            raise ValueError(f"{syntax.name}: what is read back is not what was written")
        frames.append(coded)
    made.PixelData = encapsulate(frames)
    made["PixelData"].VR = "OB"
    made["PixelData"].is_undefined_length = True
    if samples > 1 and syntax == JPEG2000Lossless:
        made.PhotometricInterpretation = "YBR_RCT"  # PS3.5 8.2.4: the reversible transformation


def _wavelets(frame: NDArray[np.uint8], bits: int) -> bytes:
    return bytes(
        imagecodecs.jpeg2k_encode(
            frame, level=0, codecformat="j2k", reversible=True, mct=frame.ndim == 3, bitspersample=bits
        )
    )


def _run_lengths(frame: NDArray[np.uint8]) -> bytes:
    coded = RLELosslessEncoder.encode(
        frame,
        rows=frame.shape[0],
        columns=frame.shape[1],
        samples_per_pixel=1 if frame.ndim == 2 else frame.shape[2],
        number_of_frames=1,
        bits_allocated=8,
        bits_stored=8,
        pixel_representation=0,
        photometric_interpretation="MONOCHROME2" if frame.ndim == 2 else "RGB",
        planar_configuration=0,
        encoding_plugin="pydicom",
    )
    return bytes(coded)


def _decoded(coded: bytes, shape: tuple[int, ...], syntax: UID) -> NDArray[np.uint8]:
    if syntax == JPEG2000Lossless:
        return np.asarray(imagecodecs.jpeg2k_decode(coded))
    planes = np.frombuffer(imagecodecs.dicomrle_decode(coded, "<u1"), np.uint8)
    if len(shape) == 2:
        return planes.reshape(shape)
    return np.moveaxis(planes.reshape(shape[2], *shape[:2]), 0, -1)
