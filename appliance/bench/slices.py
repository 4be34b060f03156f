"""Simulated CT slices to send: 512 × 512 pixels of 16 bits, 0.53 MB each, all different."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

SIZE = 512
PIXEL_BYTES = SIZE * SIZE * 2
_SPACING_MM, _THICKNESS_MM = 0.45, 0.6


@dataclass(frozen=True, slots=True)
class Slice:
    """One image to send; its file ends with the pixels, `PIXEL_BYTES` long."""

    path: Path
    uid: str

    def pixels(self) -> bytes:
        """The pixels as they lie in the file."""
        return tail(self.path)


def tail(path: Path) -> bytes:
    """The last `PIXEL_BYTES` of a file: the pixels, whatever syntax of the plain ones the rest is written in."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - PIXEL_BYTES))
        return file.read()


def make(folder: Path, count: int, on_made: Callable[[], None] = lambda: None) -> list[Slice]:
    """Write one series of that many slices into a folder."""
    chance = np.random.default_rng(1)
    noise = chance.normal(0.0, 12.0, (SIZE, SIZE)).astype(np.int16)
    study, series, frame = (generate_uid(prefix=None) for _ in range(3))
    made = []
    for number in range(count):
        pixels = _head(number / max(1, count - 1)) + np.roll(noise, number * 1009)
        one = _image(number, pixels.astype("<i2"), (study, series, frame))
        path = folder / f"{number:06d}.dcm"
        one.save_as(path, enforce_file_format=True)
        made.append(Slice(path, str(one.SOPInstanceUID)))
        on_made()
    return made


def _head(height: float) -> npt.NDArray[np.int16]:
    """Skull and brain in HU, as ellipses that grow and shrink along the head (0 to 1)."""
    across = np.linspace(-1.0, 1.0, SIZE)
    radius = np.hypot(across / 0.70, across[:, None] / 0.85) / (0.55 + 0.45 * np.sin(np.pi * (0.15 + 0.7 * height)))
    return np.select([radius < 0.90, radius < 1.0], [35, 1100], -1000).astype(np.int16)


def _image(number: int, pixels: npt.NDArray[np.int16], uids: tuple[str, str, str]) -> FileDataset:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    one = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    one.SOPClassUID = meta.MediaStorageSOPClassUID = CTImageStorage
    one.SOPInstanceUID = meta.MediaStorageSOPInstanceUID = generate_uid(prefix=None)
    one.StudyInstanceUID, one.SeriesInstanceUID, one.FrameOfReferenceUID = uids
    one.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    one.Modality, one.Manufacturer = "CT", "scanside bench"
    one.PatientName, one.PatientID = "Bench^Simulated", "BENCH"
    one.PatientBirthDate, one.PatientSex, one.PatientAge = "19600101", "O", "065Y"
    one.StudyDate = one.SeriesDate = one.AcquisitionDate = one.ContentDate = "20250101"
    one.StudyTime = one.SeriesTime = one.AcquisitionTime = one.ContentTime = "030000"
    one.StudyID, one.AccessionNumber, one.ReferringPhysicianName = "1", "BENCH", ""
    one.StudyDescription, one.SeriesDescription, one.BodyPartExamined = "CT HEAD", "HEAD 0.6", "HEAD"
    one.SeriesNumber, one.AcquisitionNumber, one.InstanceNumber = 1, 1, number + 1
    one.KVP, one.ConvolutionKernel, one.GantryDetectorTilt = "120", "STANDARD", "0"
    one.PatientPosition, one.PositionReferenceIndicator = "HFS", ""
    one.SliceThickness, one.PixelSpacing = str(_THICKNESS_MM), [str(_SPACING_MM)] * 2
    one.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
    corner = f"{-_SPACING_MM * SIZE / 2:.2f}"
    one.ImagePositionPatient = [corner, corner, f"{number * _THICKNESS_MM:.1f}"]
    one.Rows = one.Columns = SIZE
    one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
    one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 1
    one.RescaleIntercept, one.RescaleSlope, one.RescaleType = "0", "1", "HU"
    one.PixelData = pixels.tobytes()
    return one
