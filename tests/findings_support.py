"""A small CT series and verdicts on it, and the validators that judge what is made from them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, generate_uid

from appliance.findings.render import Revision, object_uid, package_device, render
from appliance.governance.package import load_configured
from appliance.inference.preprocess import to_field
from appliance.inference.slabs import plan_slabs
from appliance.inference.triton import Output
from appliance.inference.verdict import aggregate
from appliance.ledger.records import SlabResult, Verdict
from appliance.settings import Settings
from dicom_io.header import read_header
from dicom_io.objects.common import part10
from dicom_io.pixels import decode
from dicom_io.volume import assemble, planes_of
from tests.peers import program as tool
from triton_models.training.phantom import SUBTYPES, Phantom, simulate, write_study

ISSUED = datetime(2026, 3, 4, 5, 6, 7, 891011, tzinfo=UTC)
SIZE = 128
SQUARE = ((40.0, 50.0), (70.0, 50.0), (70.0, 80.0), (40.0, 80.0))

# Person names as their bytes are sent, by Specific Character Set: PS3.5 Annexes H to K and PS3.3 C.12.1.1.2.
NAMES: dict[str, tuple[str, str]] = {
    "latin": ("ISO_IR 100", "Müller^Jörg^^Dr."),
    "arabic": ("ISO_IR 127", "قباني^لنزار"),
    "cyrillic": ("ISO_IR 144", "Люкceмбypг^Анна"),
    "japanese": (
        "\\ISO 2022 IR 87",
        "Yamada^Tarou=山田^太郎=やまだ^たろう",
    ),
    "chinese": ("GB18030", "Wang^XiaoDong=王^小东"),
    "utf8": ("ISO_IR 192", "Wang^XiaoDong=王^小东"),
    "delimiters": ("ISO_IR 100", "O|Brien^A&B~C"),
}


@dataclass(frozen=True)
class Series:
    """Files of one series by SOP Instance UID, in order."""

    files: dict[str, Path]
    study_uid: str
    series_uid: str

    @property
    def uids(self) -> list[str]:
        return list(self.files)

    def source(self, uid: str) -> Path:
        return self.files[uid]

    def header(self) -> Dataset:
        return pydicom.dcmread(next(iter(self.files.values())), stop_before_pixels=True)

    def hu(self, uid: str, frame: int) -> NDArray[np.float32]:
        return decode(self.files[uid]).hu[frame]


def ct_series(
    folder: Path,
    *,
    name: str = "Doe^Jane",
    character_set: str = "ISO_IR 100",
    drop: Iterable[str] = (),
    syntax: str = ExplicitVRLittleEndian,
    change: Callable[[Dataset], Any] = lambda ds: None,
    count: int = 4,
) -> Series:
    """A valid head CT series: a grey ellipse with a brighter square."""
    study, series, frame = (generate_uid(entropy_srcs=[str(folder), kind]) for kind in ("st", "se", "fr"))
    rows, columns = np.mgrid[0:SIZE, 0:SIZE]
    hu = np.full((SIZE, SIZE), -1000, np.int16)
    hu[((columns - 64) / 48) ** 2 + ((rows - 64) / 58) ** 2 < 1] = 35
    hu[52:79, 42:69] = 70
    files: dict[str, Path] = {}
    for index in range(count):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = UID(syntax)
        if character_set:
            ds.SpecificCharacterSet = character_set.split("\\")
        ds.SOPClassUID = CTImageStorage
        ds.SOPInstanceUID = generate_uid(entropy_srcs=[str(folder), str(index)])
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, frame
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.StudyDate, ds.StudyTime = "20260304", "041500.25"
        ds.AcquisitionDate, ds.AcquisitionTime = "20260304", "041630"
        ds.AccessionNumber, ds.StudyID, ds.ReferringPhysicianName = "ACC-1", "7", "House^G"
        ds.PatientName, ds.PatientID, ds.IssuerOfPatientID = name, "PID-1", "HOSP"
        ds.PatientBirthDate, ds.PatientSex, ds.PatientAge = "19610203", "F", "065Y"
        ds.StudyDescription, ds.Modality, ds.Manufacturer = "CT head", "CT", "ACME"
        ds.BodyPartExamined, ds.KVP, ds.SliceThickness, ds.PatientPosition = "HEAD", "120", "5", "HFS"
        ds.SeriesNumber, ds.InstanceNumber, ds.AcquisitionNumber = 2, index + 1, 1
        ds.ImagePositionPatient = [-120, -120, 5 * index]
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.PixelSpacing, ds.PositionReferenceIndicator = [1.9, 1.9], ""
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.Rows = ds.Columns = SIZE
        ds.BitsAllocated = ds.BitsStored = 16
        ds.HighBit, ds.PixelRepresentation = 15, 1
        ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = 0, 1, "HU"
        little = UID(syntax).is_little_endian
        ds.PixelData = hu.astype("<i2" if little else ">i2").tobytes()
        ds["PixelData"].VR = "OW"
        for keyword in drop:
            del ds[keyword]
        change(ds)
        path = folder / f"{index}.dcm"
        pydicom.dcmwrite(path, ds, enforce_file_format=True)
        files[str(ds.SOPInstanceUID)] = path
    return Series(files, study, series)


def verdict_on(series: Series, *, positive: bool = True) -> Verdict:
    """A verdict with two key slabs (one with two outlines, one with none), or a negative one."""
    planes = [plane for path in series.files.values() for plane in planes_of(read_header(path))]
    volume = assemble(planes) if planes else None
    places = (
        dict(zip([plane.sop_instance_uid for plane in volume.planes], volume.offsets, strict=True)) if volume else {}
    )
    slabs = tuple(
        SlabResult(
            index=index,
            offset_mm=places.get(uid, 0.0),
            thickness_mm=5.0,
            sop_instance_uid=uid,
            frame=0,
            probabilities={
                "any": 0.9 - 0.1 * index if positive else 0.02,
                "epidural": 0.01,
                "intraparenchymal": 0.125 if positive else 0.01,
                "intraventricular": 0.02,
                "subarachnoid": 0.03,
                "subdural": 0.8125 if positive and index == 1 else 0.01,
            },
            outlines=(SQUARE, ((90.0, 60.0), (96.0, 60.0), (93.0, 66.5))) if positive and index == 1 else (),
            volume_ml=6.17 if positive and index == 1 else 0.0,
        )
        for index, uid in enumerate(series.uids)
    )
    return Verdict(
        study_instance_uid=series.study_uid,
        series_instance_uid=series.series_uid,
        package="ich_reference",
        package_version="0.1.0",
        notice="research use, not cleared",
        positive=positive,
        probability=0.93125 if positive else 0.0313,
        threshold=0.5,
        subtypes={
            "epidural": 0.0123 if positive else 0.01,
            "intraparenchymal": 0.125 if positive else 0.01,
            "intraventricular": 0.02,
            "subarachnoid": 0.5625 if positive else 0.01,
            "subdural": 0.8125 if positive else 0.01,
        },
        volume_ml=12.34 if positive else 0.0,
        slabs=slabs,
        key_slabs=(1, 2) if positive else (),
        codecs=("raw",),
        limitations=("Two slices at the vertex were missing – not analysed.",),
    )


def rendered(
    series: Series,
    verdict: Verdict,
    name: str,
    *,
    revision: int = 1,
    issued_at: datetime = ISSUED,
    uid_root: str = "2.25",
    **changes: Any,
) -> Dataset:
    """An object of the verdict, with defaults for all that a test does not care about."""
    issued = Revision(verdict, revision, issued_at)
    arguments: dict[str, Any] = {
        "sop_instance_uid": object_uid(uid_root, issued, name),
        "sources": series.source,
        "hu_of": series.hu,
        "analysed": series.uids,
        "uid_root": uid_root,
        "device": package_device(verdict, uid_root=uid_root, station="CT-BOX-1", manufacturer="scanside"),
    }
    return render(name, issued, **{**arguments, **changes})


def written_objects(folder: Path) -> dict[str, Path]:
    """One object of each encoding, as it lies on the box: name → its file in that folder."""
    series = ct_series(folder)
    verdict = verdict_on(series)
    paths = {name: folder / f"{name}.object" for name in ("report", "capture.1", "segmentation", "presentation.1")}
    for name, path in paths.items():
        path.write_bytes(part10(rendered(series, verdict, name)))
    return paths


def renamed(verdict: Verdict, **changes: Any) -> Verdict:
    return replace(verdict, **changes)


_KNOWN = (
    "Comprehensive3DSR",
    "ComprehensiveSR",
    "SCImage",
    "CTImage",
    "Segmentation",
    "GrayscaleSoftcopyPresentationState",
    "KeyObjectSelectionDocument",
)


def dciodvfy_errors(path: Path) -> list[str]:
    """The error lines of dicom3tools' validator, which exits 0 whatever it finds."""
    done = subprocess.run([tool("dciodvfy"), str(path)], capture_output=True, timeout=60, check=False)
    output = (done.stdout + done.stderr).decode(errors="replace")
    assert re.search(rf"^({'|'.join(_KNOWN)})$", output, re.M), output  # it knew the object
    return [line for line in output.splitlines() if line.startswith("Error")]


def dcentvfy_errors(paths: Iterable[Path]) -> list[str]:
    """What dicom3tools finds to differ between objects of one study that must agree in it."""
    done = subprocess.run([tool("dcentvfy"), *map(str, paths)], capture_output=True, timeout=60, check=False)
    return [line for line in (done.stdout + done.stderr).decode(errors="replace").splitlines() if "Error" in line]


@cache
def phantom() -> Phantom:
    """A head with two bleeds under a tilted gantry, in slices half as thick as a slab."""
    bleeds = ("intraparenchymal", "subdural")
    return simulate(7, bleed=bleeds, thickness_mm=2.5, size=128, tilt_deg=12.0)


def simulated(
    folder: Path,
    *,
    vendor: str = "",
    convert: Callable[[list[Path], Path], list[Path]] = lambda files, folder: files,
) -> tuple[Series, Verdict]:
    """`phantom` as that vendor writes it, and the verdict of a model that sees all of it.

    No model is asked: the lesion maps are the simulator's truth in the model's resolution, so that what objects show
    can be held against it. The type of a slab is the one that it shows more of.

    Args:
        convert: makes other files of those of the simulator, in that folder.
    """
    head = replace(phantom(), vendor=vendor)
    files = convert(write_study(head, folder / "written"), folder)
    headers = [read_header(path) for path in files]
    volume = assemble([plane for header in headers for plane in planes_of(header)])  # foot to head, as the truth is
    package = load_configured(Settings())[0]
    plans = plan_slabs(volume, package.preprocessing.slab_mm)
    maps, values = [], []
    for plan in plans:
        masks = head.mask[list(plan.members)]
        field = to_field((masks > 0).mean(axis=0), head.spacing_mm, fill=0)
        maps.append(cv2.resize(field, (64, 64), interpolation=cv2.INTER_AREA))
        counts = {name: int((masks == number).sum()) for number, name in enumerate(SUBTYPES, start=1)}
        there = sum(counts.values()) >= 10
        most = max(counts, key=lambda name: counts[name])
        values.append([0.9 if there and label in ("any", most) else 0.01 for label in package.labels])
    verdict = aggregate(
        replace(package, operating_point=replace(package.operating_point, threshold=0.5, lesion_threshold=0.5)),
        volume,
        plans,
        Output(np.array(values, np.float32), np.array(maps, np.float32)),
        study_uid=headers[0].study_instance_uid,
        series_uid=headers[0].series_instance_uid,
        shape=(headers[0].rows, headers[0].columns),
        codecs=["raw"],
    )
    series = Series(
        {header.sop_instance_uid: path for header, path in zip(headers, files, strict=True)},
        headers[0].study_instance_uid,
        headers[0].series_instance_uid,
    )
    return series, verdict
