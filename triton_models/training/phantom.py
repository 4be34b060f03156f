"""Simulated head CTs, with or without a haemorrhage, as arrays and as a study on disk.

Everything is drawn from one seed, bit for bit on one version of NumPy and OpenCV.
"""

from __future__ import annotations

import datetime
import json
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

from . import haemorrhage, scanner
from .anatomy import Head
from .haemorrhage import SUBTYPES

INTERCEPT = -1024
LOWEST_MM, HIGHEST_MM = -66.0, 98.0
"""What the scan covers about the isocentre, foot to head."""
CLEAR_ML = {
    "epidural": (18.0, 55.0),
    "intraparenchymal": (14.0, 55.0),
    "intraventricular": (6.0, 20.0),
    "subarachnoid": (8.0, 30.0),
    "subdural": (28.0, 75.0),
}
"""The range that a bleed's volume is drawn from where none is asked for: plain to see."""


@dataclass(frozen=True, slots=True)
class Phantom:
    """A simulated head CT.

    Attributes:
        hu: (slices, rows, columns) float32, foot to head; rows run to the back, columns to the patient's left.
        spacing_mm: (between rows, between columns).
        thickness_mm: of a slice.
        step: between neighbouring slices' centres.
        positions: of each slice's first pixel in the patient, mm (PS3.3 C.7.6.2.1.1).
        mask: (slices, rows, columns) uint8: 0 none, else 1 + the position in `SUBTYPES`.
        volume_ml: by subtype, from the mask; subtypes that are not there are left out.
        seed: what it was drawn from.
        age: years.
        sex: "F" or "M".
    """

    hu: NDArray[np.float32]
    spacing_mm: tuple[float, float]
    thickness_mm: float
    step: float
    positions: tuple[tuple[float, float, float], ...]
    mask: NDArray[np.uint8]
    volume_ml: dict[str, float]
    seed: int
    age: int
    sex: str


def simulate(
    seed: int,
    *,
    bleed: str | None = None,
    volume_ml: float | None = None,
    thickness_mm: float = 5.0,
    size: int = 512,
    age: int | None = None,
) -> Phantom:
    """Scan a simulated head.

    Args:
        seed: 0 or more; the same seed gives the same person, whatever the bleed and the thickness.
        bleed: one of `SUBTYPES`, or None.
        volume_ml: about how large; by default drawn from `CLEAR_ML`.
        thickness_mm: of a slice; slices adjoin.
        size: rows and columns.
        age: years, 18 or more; drawn where it is not given.

    Raises:
        ValueError: an argument is outside what is said above.
    """
    if bleed is not None and bleed not in SUBTYPES:
        raise ValueError(f"no bleed {bleed!r}; there are {', '.join(SUBTYPES)}")
    if not 0.3 <= thickness_mm <= 10 or not 32 <= size <= 1024:
        raise ValueError(f"thickness {thickness_mm} mm must be 0.3 to 10 and size {size} 32 to 1024")
    person = np.random.default_rng([seed, 0])
    drawn_age, sex = int(person.integers(25, 93)), str(person.choice(("F", "M")))
    age = drawn_age if age is None else age
    head = Head(person, age)
    protocol = scanner.draw(np.random.default_rng([seed, 1]), size, thickness_mm)
    bleeds: tuple[haemorrhage.Bleed, ...] = ()
    if bleed is not None:
        rng = np.random.default_rng([seed, 2, SUBTYPES.index(bleed)])
        drawn = float(rng.uniform(*CLEAR_ML[bleed]))
        bleeds = (haemorrhage.draw(rng, head, bleed, drawn if volume_ml is None else volume_ml),)
    count = int((HIGHEST_MM - LOWEST_MM) / thickness_mm)
    pixel = protocol.pixel_mm
    first = -(size - 1) / 2 * pixel
    hu = np.empty((count, size, size), dtype=np.float32)
    mask = np.zeros((count, size, size), dtype=np.uint8)
    positions = []
    for index in range(count):
        z = LOWEST_MM + (index + 0.5) * thickness_mm
        hu[index], covered = scanner.scan(np.random.default_rng([seed, 3, index]), head, bleeds, protocol, z)
        if bleeds:
            mask[index] = label(covered)
        positions.append((round(first, 4), round(first, 4), round(z, 4)))
    voxel_ml = pixel * pixel * thickness_mm / 1000
    counts = np.bincount(mask.ravel(), minlength=len(SUBTYPES) + 1)[1:]
    volumes = {name: float(n) * voxel_ml for name, n in zip(SUBTYPES, counts, strict=True) if n}
    return Phantom(hu, (pixel, pixel), thickness_mm, thickness_mm, tuple(positions), mask, volumes, seed, age, sex)


def label(covered: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Coverage of each subtype (5, rows, columns) to a mask: the subtype that covers more than half of a pixel."""
    return np.where(covered.max(axis=0) > 0.5, covered.argmax(axis=0) + 1, 0).astype(np.uint8)


def write_study(
    phantom: Phantom,
    folder: Path,
    *,
    patient_id: str | None = None,
    accession_number: str | None = None,
    scanned: datetime.datetime | None = None,
) -> list[Path]:
    """Write a phantom as CT Image Storage instances (PS3.3 A.3), with what is true of it beside them.

    Identifiers and UIDs follow from the phantom and the arguments alone (UIDs: PS3.5 B.2), so that the same call
    writes the same bytes.

    Args:
        phantom: what `simulate` returned.
        folder: made if it is not there. ``IMG0001.dcm`` is the slice nearest the feet; ``truth.json`` holds volumes
            and slices by subtype, ``truth.npz`` the mask.
        patient_id: by default from the seed.
        accession_number: by default from the seed.
        scanned: local time of the study; by default 3 March 2025, a minute of the day from the seed.

    Returns:
        The paths of the instances, foot to head.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seed = phantom.seed
    kind = "+".join(phantom.volume_ml) or "none"
    patient_id = patient_id or f"SIM{seed:06d}"
    accession_number = accession_number or f"A{seed % 10**9:06d}{kind[:3].upper()}"
    when = scanned or datetime.datetime(2025, 3, 3) + datetime.timedelta(minutes=seed * 37 % 1440)
    identity = (
        f"{seed}/{kind}/{sum(phantom.volume_ml.values()):.3f}/{phantom.thickness_mm}/{phantom.hu.shape}/{phantom.age}"
    )
    identity = f"{identity}/{patient_id}/{accession_number}/{when.isoformat()}"
    shared = _shared(phantom, identity, patient_id, accession_number, when)
    paths = []
    for index, position in enumerate(phantom.positions):
        instance = Dataset()
        instance.update(shared)
        instance.SOPInstanceUID = _uid(identity, f"instance {index}")
        taken = when + datetime.timedelta(seconds=0.5 * index)
        instance.AcquisitionDate = instance.ContentDate = taken.strftime("%Y%m%d")
        instance.AcquisitionTime = instance.ContentTime = taken.strftime("%H%M%S.%f")
        instance.InstanceNumber = index + 1
        instance.ImagePositionPatient = [f"{p:.4f}" for p in position]
        instance.SliceLocation = f"{position[2]:.4f}"
        stored = np.rint(phantom.hu[index]) - INTERCEPT
        instance.PixelData = np.clip(stored, 0, 4095).astype("<u2").tobytes()
        instance.file_meta = FileMetaDataset()
        instance.file_meta.MediaStorageSOPClassUID = CTImageStorage
        instance.file_meta.MediaStorageSOPInstanceUID = instance.SOPInstanceUID
        instance.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        path = folder / f"IMG{index + 1:04d}.dcm"
        instance.save_as(path, enforce_file_format=True)
        paths.append(path)
    slices = {
        name: [int(i) + 1 for i in np.flatnonzero((phantom.mask == SUBTYPES.index(name) + 1).any(axis=(1, 2)))]
        for name in phantom.volume_ml
    }
    truth = {
        "simulated": True,
        "seed": seed,
        "study_instance_uid": str(shared.StudyInstanceUID),
        "volume_ml": {name: round(volume, 3) for name, volume in phantom.volume_ml.items()},
        "instance_numbers": slices,
    }
    (folder / "truth.json").write_text(json.dumps(truth, indent=2) + "\n", encoding="utf-8")
    np.savez_compressed(folder / "truth.npz", mask=phantom.mask)
    return paths


def _uid(identity: str, what: str) -> UID:
    """A UID derived from a UUID (PS3.5 B.2) that follows from its arguments."""
    return UID(f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, f'scanside phantom/{identity}/{what}').int}")


def _shared(
    phantom: Phantom, identity: str, patient_id: str, accession_number: str, when: datetime.datetime
) -> Dataset:
    """What all instances of the study say."""
    data = Dataset()
    data.SpecificCharacterSet = "ISO_IR 100"
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.SOPClassUID = CTImageStorage
    data.StudyDate = data.SeriesDate = when.strftime("%Y%m%d")
    data.StudyTime = data.SeriesTime = when.strftime("%H%M%S")
    data.AccessionNumber = accession_number
    data.Modality = "CT"
    data.Manufacturer = "scanside"
    data.InstitutionName = "SIMULATED"
    data.ReferringPhysicianName = ""
    data.StudyDescription = "CT HEAD WITHOUT CONTRAST"
    data.SeriesDescription = f"AXIAL HEAD {phantom.thickness_mm:g} MM"
    data.ManufacturerModelName = "phantom generator"
    data.PatientName = f"PHANTOM^SIMULATED {phantom.seed}"
    data.PatientID = patient_id
    month = 1 + phantom.seed % 12
    birthday_passed = (month, 15) <= (when.month, when.day)
    data.PatientBirthDate = f"{when.year - phantom.age - (not birthday_passed)}{month:02d}15"
    data.PatientSex = phantom.sex
    data.PatientAge = f"{phantom.age:03d}Y"
    data.BodyPartExamined = "HEAD"
    data.SliceThickness = f"{phantom.thickness_mm:g}"
    data.KVP = "120"
    data.DataCollectionDiameter = "250"
    data.DeviceSerialNumber = "0"
    data.SoftwareVersions = "1"
    data.ProtocolName = "HEAD ROUTINE"
    data.ReconstructionDiameter = f"{phantom.spacing_mm[0] * phantom.hu.shape[1]:.1f}"
    data.GantryDetectorTilt = "0"
    data.TableHeight = "150"
    data.RotationDirection = "CW"
    data.ExposureTime = "1000"
    data.XRayTubeCurrent = "250"
    data.Exposure = "250"
    data.FilterType = "HEAD"
    data.FocalSpots = "0.7"
    data.ConvolutionKernel = "STANDARD"
    data.PatientPosition = "HFS"
    data.StudyInstanceUID = _uid(identity, "study")
    data.SeriesInstanceUID = _uid(identity, "series")
    data.StudyID = str(phantom.seed % 10**6)
    data.SeriesNumber = 2
    data.AcquisitionNumber = 1
    data.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
    data.FrameOfReferenceUID = _uid(identity, "frame of reference")
    data.PositionReferenceIndicator = "OM"
    data.ImageComments = "SIMULATED: drawn by a phantom generator, not a patient"
    data.SamplesPerPixel = 1
    data.PhotometricInterpretation = "MONOCHROME2"
    data.Rows, data.Columns = phantom.hu.shape[1:]
    data.PixelSpacing = [f"{s:.6f}" for s in phantom.spacing_mm]
    data.BitsAllocated = 16
    data.BitsStored = 12
    data.HighBit = 11
    data.PixelRepresentation = 0
    data.WindowCenter = "40"
    data.WindowWidth = "80"
    data.RescaleIntercept = str(INTERCEPT)
    data.RescaleSlope = "1"
    data.RescaleType = "HU"
    return data
