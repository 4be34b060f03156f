"""Simulated head CTs for the benchmarks: one head, in slices of any thickness and syntax, as often as wanted."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pydicom
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from appliance.bench.decode import encoded
from dicom_io.header import read_header
from triton_models.training.phantom import Phantom, simulate, write_study

SEED = 7
BLEED = "intraparenchymal"
"""A haemorrhage that the shipped model finds: without one there is no alert to wait for."""

SYNTAXES = {
    "explicit": ExplicitVRLittleEndian,
    "implicit": ImplicitVRLittleEndian,
    "bigendian": ExplicitVRBigEndian,
    "deflated": DeflatedExplicitVRLittleEndian,
    "rle": RLELossless,
    "jpeglossless": JPEGLossless,
    "jpeglossless-sv1": JPEGLosslessSV1,
    "jpegls": JPEGLSLossless,
    "jpeg2000": JPEG2000Lossless,
    "htj2k": HTJ2KLossless,
    "htj2k-rpcl": HTJ2KLosslessRPCL,
}


@dataclass(frozen=True, slots=True)
class Study:
    """The files of one study, in the order in which they are sent."""

    uid: str
    paths: tuple[Path, ...]


@cache
def _head(thickness_mm: float) -> Phantom:
    return simulate(SEED, bleed=BLEED, thickness_mm=thickness_mm)


def original(folder: Path, slices: int, syntax: str = "explicit") -> Study:
    """The head in about that many slices.

    Args:
        folder: receives the files.
        slices: 16 to 500.
        syntax: a key of `SYNTAXES`.
    """
    paths = write_study(_head(round(160.0 / slices, 3)), folder)
    if syntax != "explicit":
        for path in paths:
            dataset, uid = pydicom.dcmread(path), UID(SYNTAXES[syntax])
            if uid.is_encapsulated:
                dataset.PixelData = encapsulate([encoded(uid, dataset.pixel_array, dataset)])
                dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
            elif not uid.is_little_endian:
                dataset.PixelData = dataset.pixel_array.byteswap().tobytes()  # pydicom writes the value as it is
            list(dataset.iterall())  # read while the order of their bytes is known
            dataset.file_meta.TransferSyntaxUID = uid
            pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    return Study(read_header(paths[0]).study_instance_uid, tuple(paths))


def copies(folder: Path, originals: Sequence[Study], number: int) -> Study:
    """The same images as another study: every UID of the scanner's is another one.

    Args:
        originals: what makes up the study, a series each.
        number: tells copies apart.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    study = _other(originals[0].uid, number)
    for series, one in enumerate(originals):
        for place, path in enumerate(one.paths):
            dataset = pydicom.dcmread(path)
            dataset.StudyInstanceUID = study
            for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
                setattr(dataset, keyword, _other(dataset[keyword].value, number))
            dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
            paths.append(folder / f"{series}-{place:04d}.dcm")
            dataset.save_as(paths[-1], enforce_file_format=True)
    return Study(study, tuple(paths))


def _other(uid: str, number: int) -> UID:
    """Another UID, derived from one (PS3.5 B.2)."""
    return UID(f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, f'{uid}/{number}').int}")
