"""A verdict as DICOM objects. Rendering twice gives the same bytes: a retry stores the same object."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from appliance.findings import wording
from appliance.ledger.records import SlabResult, Verdict
from dicom_io.objects import capture, codes
from dicom_io.objects.common import Device, ImageReference, Place
from dicom_io.objects.report import Algorithm, Quantity, Report, ReportFinding, build_report
from dicom_io.objects.uids import derived_uid

REPORT = "report"
_CAPTURE = re.compile(r"capture\.([1-9][0-9]*)")
# Series numbers above those of scanners; each revision has its own series.
_SERIES_NUMBER = 9000
_DIGITS_OF_A_PROBABILITY = 4
_DIGITS_OF_A_VOLUME = 2

Sources = Callable[[str], Path]
"""SOP Instance UID → the Part 10 file that was received."""
Hounsfield = Callable[[str, int], NDArray[np.float32]]
"""SOP Instance UID and 0-based frame → Hounsfield units, (rows, columns)."""


def objects_for(verdict: Verdict) -> tuple[str, ...]:
    """The names of the objects made from this verdict, in order of urgency; none of one that is soon superseded."""
    if verdict.provisional or verdict.withdrawn:
        return ()
    return (REPORT, *(f"capture.{number}" for number in range(1, len(verdict.key_slabs) + 1)))


def object_uid(uid_root: str, study_uid: str, package: str, version: str, revision: int, object_name: str) -> str:
    """The SOP Instance UID that this object of this revision of the verdict always has."""
    return derived_uid(uid_root, "instance", study_uid, package, version, str(revision), object_name)


def package_device(verdict: Verdict, *, uid_root: str, station: str, manufacturer: str) -> Device:
    """The package at work on this box, as the observer that objects name.

    Args:
        station: the box's name at the site.
        manufacturer: the package's.
    """
    return Device(
        uid=derived_uid(uid_root, "device", station, verdict.package),
        name=station,
        manufacturer=manufacturer,
        model_name=verdict.package,
        software_version=verdict.package_version,
    )


def render(
    object_name: str,
    verdict: Verdict,
    *,
    revision: int,
    issued_at: datetime,
    sources: Sources,
    hu_of: Hounsfield,
    analysed: Sequence[str],
    uid_root: str,
    device: Device,
) -> Dataset:
    """One object of `objects_for(verdict)`, ready to be written or sent.

    Args:
        issued_at: when the verdict was issued (aware). Objects carry it in the source's time zone, or where the
            source names none, in this machine's.
        analysed: SOP Instance UIDs of the analysed images, in order.
        device: see `package_device`.

    Returns: a data set with file meta, Explicit VR Little Endian.
    Raises: ValueError for a name that is none of this verdict's, OSError or InvalidDicomError for a source that
        is gone or damaged.
    """
    if object_name not in objects_for(verdict):
        raise ValueError(f"{object_name!r} is no object of this verdict: {', '.join(objects_for(verdict))}")
    key = (verdict.study_instance_uid, verdict.package, verdict.package_version)
    number = _CAPTURE.fullmatch(object_name)
    kind = "capture" if number else REPORT
    revised = f", revision {revision}" if revision > 1 else ""
    place = Place(
        sop_instance_uid=object_uid(uid_root, *key, revision, object_name),
        series_instance_uid=derived_uid(uid_root, "series", *key, str(revision), kind),
        series_number=_SERIES_NUMBER + 10 * revision + (2 if number else 1),
        instance_number=int(number[1]) if number else 1,
        series_description=f"{verdict.package} {'key images' if number else 'report'}{revised} (unverified)",
        created=issued_at.astimezone(),
    )
    if number:
        slab = verdict.slabs[verdict.key_slabs[int(number[1]) - 1]]
        header = _header(sources(slab.sop_instance_uid))
        return capture.build_capture(
            _picture(verdict, slab, hu_of),
            header,
            _reference(header, slab.frame),
            description=f"Key slab {slab.index + 1}, window 40/80, outline by {wording.judged_by(verdict)}",
            comment=f"{wording.TRIAGE_ONLY} {verdict.notice}",
            device=device,
            place=place,
        )
    return build_report(
        _report(verdict, revision, sources, analysed, uid_root),
        _header(sources(analysed[0])),
        procedure=codes.CT_HEAD,
        algorithm=Algorithm(
            name=verdict.package,
            version=verdict.package_version,
            manufacturer=device.manufacturer,
            parameters=(f"threshold {verdict.threshold:g}", f"decoders {', '.join(verdict.codecs)}"),
        ),
        device=device,
        place=place,
    )


def key_png(verdict: Verdict, hu_of: Hounsfield, number: int = 1) -> bytes:
    """The picture of capture `number` (1 is the most important key slab) as a PNG file.

    Raises: ValueError if the verdict has no such key slab.
    """
    if not 1 <= number <= len(verdict.key_slabs):
        raise ValueError(f"key slab {number} of {len(verdict.key_slabs)}")
    return capture.png(_picture(verdict, verdict.slabs[verdict.key_slabs[number - 1]], hu_of))


def _picture(verdict: Verdict, slab: SlabResult, hu_of: Hounsfield) -> NDArray[np.uint8]:
    hu = hu_of(slab.sop_instance_uid, slab.frame)
    return capture.key_image(hu, slab.outlines, wording.banner(verdict, slab))


def _report(verdict: Verdict, revision: int, sources: Sources, analysed: Sequence[str], uid_root: str) -> Report:
    tracking = (uid_root, "tracking", verdict.study_instance_uid, verdict.package, verdict.package_version)
    findings = []
    whole = codes.INTRACRANIAL_HEMORRHAGE
    for index in verdict.key_slabs:
        slab = verdict.slabs[index]
        image = _reference(_header(sources(slab.sop_instance_uid)), slab.frame)
        likely = wording.likely_subtypes(slab.probabilities)
        for number, outline in enumerate(slab.outlines or (None,), start=1):
            label = f"slab {slab.index + 1}" + (f" outline {number}" if outline else "")
            findings.append(
                ReportFinding(
                    label=f"{label}: {wording.kinds(slab.probabilities)}",
                    uid=derived_uid(*tracking, str(revision), label),
                    concept=next((codes.SUBTYPES[one] for one in likely if one in codes.SUBTYPES), whole),
                    image=image,
                    quantities=(_probability(codes.PROBABILITY, slab.probabilities["any"]),),
                    outline=outline,
                )
            )
    return Report(
        label="intracranial haemorrhage",
        uid=derived_uid(*tracking, str(revision), "study"),
        finding=whole if verdict.positive else None,
        result=codes.SUSPECTED if verdict.positive else codes.NONE_FOUND,
        impression=wording.impression(verdict),
        quantities=(
            _probability(codes.PROBABILITY_ANY, verdict.probability),
            _probability(codes.THRESHOLD, verdict.threshold),
            *(
                _probability(codes.PROBABILITIES[label], verdict.subtypes[label])
                for label in codes.PROBABILITIES
                if label in verdict.subtypes
            ),
            Quantity(codes.VOLUME, round(verdict.volume_ml, _DIGITS_OF_A_VOLUME), codes.MILLILITER),
        ),
        findings=tuple(findings),
        comments=(wording.TRIAGE_ONLY, verdict.notice),
        limitations=verdict.limitations,
        images=tuple(ImageReference(_sop_class(sources(uid)), uid) for uid in analysed),
    )


def _probability(name: codes.Concept, value: float) -> Quantity:
    return Quantity(name, round(value, _DIGITS_OF_A_PROBABILITY), codes.NO_UNITS)


def _header(path: Path) -> Dataset:
    return pydicom.dcmread(path, stop_before_pixels=True)


def _sop_class(path: Path) -> str:
    """From the file meta alone: a report refers to hundreds of images."""
    return str(pydicom.filereader.read_file_meta_info(path).MediaStorageSOPClassUID)


def _reference(header: Dataset, frame: int) -> ImageReference:
    multiframe = int(header.get("NumberOfFrames") or 1) > 1
    return ImageReference(str(header.SOPClassUID), str(header.SOPInstanceUID), frame + 1 if multiframe else None)
