"""Simulated head CTs, with or without a haemorrhage, as arrays and as a study on disk.

Everything is drawn from one seed, bit for bit on one version of NumPy, SciPy and OpenCV.
"""

from __future__ import annotations

import datetime
import json
import uuid
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from . import anatomy, haemorrhage, lookalikes, scanner
from .anatomy import Head
from .haemorrhage import SUBTYPES, Bleed
from .lookalikes import KINDS
from .vendors import VENDORS, names, words

LOWEST_MM, HIGHEST_MM = -66.0, 98.0
"""What the scan covers about the anterior commissure, foot to head."""
CLEAR_ML = {
    "epidural": (18.0, 55.0),
    "intraparenchymal": (14.0, 55.0),
    "intraventricular": (6.0, 20.0),
    "subarachnoid": (8.0, 30.0),
    "subdural": (28.0, 75.0),
}
"""The range that a bleed's volume is drawn from where none is asked for: plain to see."""
_CLEAR_HU = (58.0, 74.0)
"""Its attenuation then: fresh clot."""
_THICKNESSES_MM = (0.6, 1.25, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0)
_HOW_OFTEN = (0.03, 0.05, 0.11, 0.09, 0.1, 0.46, 0.09, 0.07)

Family = Literal["training", "unseen"]
"""Whose scanners: those that training draws from, or a maker, a kernel and a noise that it never does."""


@dataclass(frozen=True, slots=True)
class Phantom:
    """A simulated head CT.

    Attributes:
        hu: (slices, rows, columns) float32, foot to head; rows run to the back, columns to the patient's left.
            `scanner.PADDING_HU` outside the circle of a padded field.
        spacing_mm: (between rows, between columns).
        thickness_mm: of a slice.
        step: between neighbouring slices' centres, along their normal.
        positions: of each slice's first pixel in the patient, mm (PS3.3 C.7.6.2.1.1).
        orientation: row and column cosines.
        mask: (slices, rows, columns) uint8: 0 none, else 1 + the position in `SUBTYPES`.
        volume_ml: by subtype, what counts of the blood within the slices; subtypes that are not there are left out.
        bleeds: as they were painted.
        look_alikes: names in `lookalikes.KINDS`.
        seed: what it was drawn from.
        age: years.
        sex: "F" or "M".
        vendor: a name in `vendors.VENDORS`.
        kernel: a name in `scanner.KERNELS`.
        kvp, mas: of the tube, kV and mAs.
        tilt_deg: of the gantry, as in `scanner.Protocol`.
    """

    hu: NDArray[np.float32]
    spacing_mm: tuple[float, float]
    thickness_mm: float
    step: float
    positions: tuple[tuple[float, float, float], ...]
    orientation: tuple[float, float, float, float, float, float]
    mask: NDArray[np.uint8]
    volume_ml: dict[str, float]
    bleeds: tuple[Bleed, ...]
    look_alikes: tuple[str, ...]
    seed: int
    age: int
    sex: str
    vendor: str
    kernel: str
    kvp: float
    mas: float
    tilt_deg: float


def simulate(
    seed: int,
    *,
    bleed: str | Sequence[str] | None = None,
    volume_ml: float | None = None,
    thickness_mm: float = 5.0,
    size: int = 512,
    age: int | None = None,
    look_alikes: Sequence[str] = (),
    vendor: str = "",
    tilt_deg: float = 0.0,
) -> Phantom:
    """Scan a simulated head whose bleeds, if any, are plain to see.

    Args:
        seed: 0 or more; the same seed gives the same person, whatever the bleed and the thickness.
        bleed: one or several of `SUBTYPES`, or None.
        volume_ml: about how large each; by default drawn from `CLEAR_ML`.
        thickness_mm: of a slice; slices adjoin.
        size: rows and columns.
        age: years, 18 or more; drawn where it is not given.
        look_alikes: names in `lookalikes.KINDS`.
        vendor: whose scanner, a name in `vendors.VENDORS`; "" is none's.
        tilt_deg: of the gantry, as in `scanner.Protocol`.

    Raises:
        ValueError: an argument is outside what is said above.
    """
    subtypes = (bleed,) if isinstance(bleed, str) else tuple(bleed or ())
    for what, asked, there in (("bleed", subtypes, SUBTYPES), ("look-alike", look_alikes, KINDS)):
        if unknown := [one for one in asked if one not in there]:
            raise ValueError(f"no {what} {unknown[0]!r}; there are {', '.join(there)}")
    if vendor not in VENDORS:
        raise ValueError(f"no vendor {vendor!r}; there are {', '.join(filter(None, VENDORS))}")
    if not 0.3 <= thickness_mm <= 10 or not 32 <= size <= 1024:
        raise ValueError(f"thickness {thickness_mm} mm must be 0.3 to 10 and size {size} 32 to 1024")
    if not -30 <= tilt_deg <= 30:
        raise ValueError(f"a gantry tilts by up to 30 degrees, not {tilt_deg:g}")
    head = _person(seed, age)
    for kind in look_alikes:
        lookalikes.add(np.random.default_rng([seed, 5, KINDS.index(kind)]), head, kind)
    truth = np.zeros(head.hu.shape, dtype=np.uint8)
    bleeds = []
    for subtype in subtypes:
        rng = np.random.default_rng([seed, 2, SUBTYPES.index(subtype)])
        drawn = float(rng.uniform(*CLEAR_ML[subtype]))
        clot = float(rng.uniform(*_CLEAR_HU))
        bleeds.append(haemorrhage.bleed(rng, head, truth, subtype, drawn if volume_ml is None else volume_ml, clot))
    habits = VENDORS[vendor]
    protocol = replace(
        scanner.draw(
            np.random.default_rng([seed, 1]),
            kernels=("standard" if "standard" in habits.kernels else next(iter(habits.kernels)),),
            vendor=vendor,
            thickness_mm=thickness_mm,
            size=size,
            tilt_deg=tilt_deg,
            padded=habits.padding is not None,
        ),
        kvp=120.0,
        step_mm=thickness_mm,
        low_mm=LOWEST_MM,
        high_mm=HIGHEST_MM,
        motion_mm=0.0,
    )
    return _scan(seed, head, truth, tuple(bleeds), tuple(look_alikes), protocol)


def study(
    seed: int,
    *,
    person: int | None = None,
    positive: bool | None = None,
    family: Family = "training",
    size: int = 256,
    thickness_mm: float | None = None,
    kernels: Sequence[str] = tuple(scanner.KERNELS),
) -> Phantom:
    """A study as one comes to an emergency department: everything about it is drawn from its seed.

    Args:
        person: seed of the head that it is of; by default the study's own. Several studies of one head in a row cost
            less than of several; their look-alikes, bleeds and scanners are each study's own.
        positive: whether it bleeds; drawn, one in two, where it is not given.
        family: whose scanners.
        size: rows and columns.
        thickness_mm: of a slice; drawn where it is not given.
        kernels: those that may be drawn, of the ones that the scanner has.
    """
    rng = np.random.default_rng([seed, 6])
    head = _person(seed, None) if person is None else deepcopy(_kept(person))
    bleeding = bool(rng.random() < 0.5) if positive is None else positive
    kinds = []
    for kind in lookalikes.draw_kinds(rng, head.age):
        try:
            lookalikes.add(rng, head, kind)
            kinds.append(kind)
        except ValueError:  # this head has no place for it
            continue
    truth = np.zeros(head.hu.shape, dtype=np.uint8)
    bleeds = tuple(haemorrhage.draw_study(rng, head, truth)) if bleeding else ()
    chance = np.random.default_rng([seed, 7, 0])
    vendor = str(chance.choice(names(unseen=family == "unseen")))
    drawn = float(chance.choice(_THICKNESSES_MM, p=_HOW_OFTEN))
    protocol = scanner.draw(
        chance,
        kernels=tuple(name for name in VENDORS[vendor].kernels if name in kernels),
        vendor=vendor,
        thickness_mm=drawn if thickness_mm is None else thickness_mm,
        size=size,
        padded=VENDORS[vendor].padding is not None,
    )
    return _scan(seed, head, truth, bleeds, tuple(kinds), protocol)


@lru_cache(maxsize=1)
def _kept(seed: int) -> Head:
    """A head that nobody may change."""
    return _person(seed, None)


def _person(seed: int, age: int | None) -> Head:
    rng = np.random.default_rng([seed, 0])
    drawn_age, sex = int(rng.integers(25, 93)), str(rng.choice(("F", "M")))
    return anatomy.draw(rng, drawn_age if age is None else age, sex)


def _scan(
    seed: int,
    head: Head,
    truth: NDArray[np.uint8],
    bleeds: tuple[Bleed, ...],
    kinds: tuple[str, ...],
    protocol: scanner.Protocol,
) -> Phantom:
    made = scanner.scan(np.random.default_rng([seed, 3, 0]), head, truth, protocol)
    return Phantom(
        hu=made.hu,
        spacing_mm=(protocol.pixel_mm, protocol.pixel_mm),
        thickness_mm=protocol.thickness_mm,
        step=protocol.step_mm,
        positions=made.positions,
        orientation=made.orientation,
        mask=made.mask,
        volume_ml=made.volume_ml,
        bleeds=bleeds,
        look_alikes=kinds,
        seed=seed,
        age=head.age,
        sex=head.sex,
        vendor=protocol.vendor,
        kernel=protocol.kernel,
        kvp=protocol.kvp,
        mas=protocol.mas,
        tilt_deg=protocol.tilt_deg,
    )


def write_study(
    phantom: Phantom,
    folder: Path,
    *,
    patient_id: str | None = None,
    accession_number: str | None = None,
    scanned: datetime.datetime | None = None,
    on_written: Callable[[], None] = lambda: None,
) -> list[Path]:
    """Write a phantom as CT Image Storage instances (PS3.3 A.3), with what is true of it beside them.

    Identifiers and UIDs follow from the phantom and the arguments alone (UIDs: PS3.5 B.2), so that the same call
    writes the same bytes.

    Args:
        phantom: what `simulate` or `study` returned.
        folder: made if it is not there. ``IMG0001.dcm`` is the slice nearest the feet; ``truth.json`` holds volumes
            and slices by subtype and what else is in the picture, ``truth.npz`` the mask.
        patient_id: by default from the seed.
        accession_number: by default from the seed.
        scanned: local time of the study; by default 3 March 2025, a minute of the day from the seed.
        on_written: called after each instance.

    Returns:
        The paths of the instances, foot to head.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seed, vendor = phantom.seed, VENDORS[phantom.vendor]
    kind = "+".join(phantom.volume_ml) or "none"
    patient_id = patient_id or f"SIM{seed:06d}"
    accession_number = accession_number or f"A{seed % 10**9:06d}{kind[:3].upper()}"
    when = scanned or datetime.datetime(2025, 3, 3) + datetime.timedelta(minutes=seed * 37 % 1440)
    identity = "/".join(
        str(part)
        for part in (
            seed, kind, f"{sum(phantom.volume_ml.values()):.3f}", phantom.thickness_mm, phantom.hu.shape,
            phantom.age, *phantom.look_alikes, phantom.vendor, phantom.tilt_deg, patient_id, accession_number,
            when.isoformat(),
        )
    )  # fmt: skip
    shared = _shared(phantom, identity, patient_id, accession_number, when)
    count = len(phantom.positions)
    numbers = range(count, 0, -1) if vendor.head_first else range(1, count + 1)
    lowest, highest = (-32768, 32767) if vendor.signed else (0, 2**vendor.bits_stored - 1)
    paths = []
    for index, position in enumerate(phantom.positions):
        instance = Dataset()
        instance.update(shared)
        instance.SOPInstanceUID = _uid(identity, f"instance {index}")
        taken = when + datetime.timedelta(seconds=0.5 * index)
        instance.AcquisitionDate = instance.ContentDate = taken.strftime("%Y%m%d")
        instance.AcquisitionTime = instance.ContentTime = taken.strftime("%H%M%S.%f")
        instance.InstanceNumber = numbers[index]
        instance.ImagePositionPatient = [f"{p:.4f}" for p in position]
        instance.SliceLocation = f"{position[2]:.4f}"
        hu = phantom.hu[index]
        stored = np.clip(np.rint(np.maximum(hu, -1024)) - vendor.intercept, lowest, highest)
        if vendor.padding is not None:
            stored[hu <= scanner.PADDING_HU] = vendor.padding
        instance.PixelData = stored.astype("<i2" if vendor.signed else "<u2").tobytes()
        instance.file_meta = FileMetaDataset()
        instance.file_meta.MediaStorageSOPClassUID = CTImageStorage
        instance.file_meta.MediaStorageSOPInstanceUID = instance.SOPInstanceUID
        instance.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if vendor.implicit else ExplicitVRLittleEndian
        path = folder / f"IMG{index + 1:04d}.dcm"
        instance.save_as(path, enforce_file_format=True)
        paths.append(path)
        on_written()
    slices = {
        name: [numbers[i] for i in np.flatnonzero((phantom.mask == SUBTYPES.index(name) + 1).any(axis=(1, 2)))]
        for name in phantom.volume_ml
    }
    truth = {
        "simulated": True,
        "seed": seed,
        "study_instance_uid": str(shared.StudyInstanceUID),
        "volume_ml": {name: round(volume, 3) for name, volume in phantom.volume_ml.items()},
        "instance_numbers": slices,
        "bleeds": [
            {"subtype": one.subtype, "volume_ml": round(one.volume_ml, 3), "hu": round(one.hu, 1), "age": one.age}
            for one in phantom.bleeds
        ],
        "look_alikes": list(phantom.look_alikes),
        "vendor": phantom.vendor,
        "kernel": phantom.kernel,
        "kvp": phantom.kvp,
        "tilt_deg": phantom.tilt_deg,
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
    vendor = VENDORS[phantom.vendor]
    kernel = vendor.kernels.get(phantom.kernel, phantom.kernel.upper())
    said = words(np.random.default_rng([phantom.seed, 8, 0]), phantom.vendor, phantom.thickness_mm, kernel)
    data = Dataset()
    data.SpecificCharacterSet = vendor.character_set
    data.ImageType = list(vendor.image_type)
    data.SOPClassUID = CTImageStorage
    data.StudyDate = data.SeriesDate = when.strftime("%Y%m%d")
    data.StudyTime = data.SeriesTime = when.strftime("%H%M%S")
    data.AccessionNumber = accession_number
    data.Modality = "CT"
    data.Manufacturer = vendor.manufacturer
    data.InstitutionName = "SIMULATED"
    data.ReferringPhysicianName = ""
    data.StudyDescription = said.study
    data.SeriesDescription = said.series
    data.ManufacturerModelName = said.model
    data.PatientName = f"PHANTOM^SIMULATED {phantom.seed}"
    data.PatientID = patient_id
    month = 1 + phantom.seed % 12
    birthday_passed = (month, 15) <= (when.month, when.day)
    born = f"{when.year - phantom.age - (not birthday_passed)}{month:02d}15"
    data.PatientBirthDate = born if vendor.says_birth else ""
    data.PatientSex = phantom.sex
    if vendor.says_age:
        data.PatientAge = f"{phantom.age:03d}Y"
    if said.body_part:
        data.BodyPartExamined = said.body_part
    else:
        data.Laterality = ""  # asked for of every series that names no part
    data.SliceThickness = f"{phantom.thickness_mm:g}"
    data.KVP = f"{phantom.kvp:g}"
    data.DataCollectionDiameter = "250"
    data.DeviceSerialNumber = "0"
    data.SoftwareVersions = "1"
    data.ProtocolName = said.protocol
    data.ReconstructionDiameter = f"{phantom.spacing_mm[0] * phantom.hu.shape[1]:.1f}"
    if vendor.says_tilt:
        data.GantryDetectorTilt = f"{phantom.tilt_deg:g}"
    data.TableHeight = "150"
    data.RotationDirection = "CW"
    data.ExposureTime = "1000"
    data.XRayTubeCurrent = data.Exposure = f"{phantom.mas:.0f}"
    data.FilterType = "HEAD"
    data.FocalSpots = "0.7"
    data.ConvolutionKernel = kernel
    data.PatientPosition = "HFS"
    if "contrast" in phantom.look_alikes:
        data.ContrastBolusAgent = "IODINE 350"
        data.ContrastBolusRoute = "IV"
    data.StudyInstanceUID = _uid(identity, "study")
    data.SeriesInstanceUID = _uid(identity, "series")
    data.StudyID = str(phantom.seed % 10**6)
    data.SeriesNumber = 2
    data.AcquisitionNumber = 1
    data.ImageOrientationPatient = [f"{cosine:.8f}".rstrip("0").rstrip(".") for cosine in phantom.orientation]
    data.FrameOfReferenceUID = _uid(identity, "frame of reference")
    data.PositionReferenceIndicator = "OM"
    data.ImageComments = "SIMULATED: drawn by a phantom generator, not a patient"
    data.SamplesPerPixel = 1
    data.PhotometricInterpretation = "MONOCHROME2"
    data.Rows, data.Columns = phantom.hu.shape[1:]
    data.PixelSpacing = [f"{s:.6f}" for s in phantom.spacing_mm]
    data.BitsAllocated = 16
    data.BitsStored = vendor.bits_stored
    data.HighBit = vendor.bits_stored - 1
    data.PixelRepresentation = int(vendor.signed)
    if vendor.padding is not None:
        data.PixelPaddingValue = vendor.padding
    data.WindowCenter = "40"
    data.WindowWidth = "80"
    data.RescaleIntercept = str(vendor.intercept)
    data.RescaleSlope = "1"
    data.RescaleType = "HU"
    if vendor.private is not None:
        creator, element, vr, value = vendor.private
        data.private_block(0x0019, creator, create=True).add_new(element, vr, value)
    return data
