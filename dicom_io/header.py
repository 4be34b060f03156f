"""What a received instance says about itself, read once and without its pixels.

Every value is taken from the raw bytes of its element and converted here, because a header is read from
whatever a peer sent: text where a number belongs, an infinite position or a UID with a slash in it must end as a
line in ``problems`` or as a `HeaderError`, never as an exception of the parser's or as a number that is used.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO

from dicom_io._elements import Elements, Parsed, parse_buffer, parse_file, reading, wanted
from dicom_io.errors import HeaderError

MAXIMUM_FRAMES = 100_000
"""More frames than any scanner makes; a larger number is a corrupt or hostile header."""

MAXIMUM_POSITION_MM = 100_000.0
"""Ten times the longest way that a table moves, ten times over; farther off is a corrupt number."""


@dataclass(frozen=True, slots=True)
class FramePlane:
    """One frame's place in the patient (PS3.3 C.7.6.2, C.7.6.16.2 for functional groups).

    Attributes:
        position: centre of the first pixel, mm (Image Position (Patient)).
        orientation: six direction cosines, of a row and then of a column (Image Orientation (Patient)).
        spacing: mm between the centres of neighbouring rows, then of neighbouring columns (Pixel Spacing).
        thickness: nominal Slice Thickness in mm, where it is given and above 0.
    """

    position: tuple[float, float, float]
    orientation: tuple[float, ...]
    spacing: tuple[float, float]
    thickness: float | None


@dataclass(frozen=True, slots=True)
class Header:
    """The attributes that decide what becomes of an instance.

    Text is '' and numbers are None (or 0 for the sizes) where the attribute is absent. ``frames`` is empty where
    the geometry is absent or unreadable; otherwise it has ``number_of_frames`` entries. ``problems`` names each
    attribute that is present and unreadable. Text attributes are as sent, without padding.

    ``anatomic_region`` is the first code of Anatomic Region Sequence with its scheme: "69536005 SCT".

    ``patient`` tells patients apart without naming them: a SHA-256 over PatientID, its issuer, name and birth date.

    For the enhanced objects ``kvp``, ``gantry_detector_tilt``, ``convolution_kernel``, ``body_part_examined``,
    ``anatomic_region`` and ``contrast_bolus_agent`` come from the functional groups (or the contrast sequence) of the
    first frame; ``kvp`` and ``convolution_kernel`` are unknown (a problem) where the frames differ in them.
    """

    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    transfer_syntax_uid: str
    modality: str
    image_type: tuple[str, ...]
    rows: int
    columns: int
    number_of_frames: int
    samples_per_pixel: int
    photometric_interpretation: str
    frames: tuple[FramePlane, ...]
    gantry_detector_tilt: float | None
    kvp: float | None
    convolution_kernel: str
    body_part_examined: str
    study_description: str
    series_description: str
    protocol_name: str
    manufacturer: str
    manufacturer_model_name: str
    contrast_bolus_agent: str
    frame_of_reference_uid: str
    patient: str
    patient_age: str
    patient_birth_date: str
    study_date: str
    instance_number: int | None
    series_number: int | None
    acquisition_number: int | None
    number_of_series_related_instances: int | None
    images_in_acquisition: int | None
    problems: tuple[str, ...]
    # Headers that were stored before these were read lack them.
    station_name: str = ""
    anatomic_region: str = ""
    accession_number: str = ""
    patient_id: str = ""
    issuer_of_patient_id: str = ""
    acquired: str = ""

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary that `from_json` turns back into an equal header."""
        frames = tuple(
            {
                "position": frame.position,
                "orientation": frame.orientation,
                "spacing": frame.spacing,
                "thickness": frame.thickness,
            }
            for frame in self.frames
        )
        return {**dict(zip(_NAMES, _VALUES(self), strict=True)), "frames": frames}  # asdict takes 30 times as long

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Header:
        """The header that `to_json` wrote, also after a trip through JSON text.

        What a later release stored besides is passed over: after a rollback its headers are still here.
        """
        frames = tuple(
            FramePlane(
                position=(frame["position"][0], frame["position"][1], frame["position"][2]),
                orientation=tuple(frame["orientation"]),
                spacing=(frame["spacing"][0], frame["spacing"][1]),
                thickness=frame["thickness"],
            )
            for frame in data["frames"]
        )
        tuples = {"image_type": tuple(data["image_type"]), "problems": tuple(data["problems"])}
        known = {name: data[name] for name in _NAMES if name in data}
        return cls(**{**known, **tuples, "frames": frames})


_SECOND = re.compile(r"\d{14}(?!\d)")
"""The start of a DT that says the second (PS3.5 6.2)."""
_NAMES = tuple(field.name for field in fields(Header))
_VALUES = attrgetter(*_NAMES)

_CONVERTED = ("UnassignedPerFrameConvertedAttributesSequence", "UnassignedSharedConvertedAttributesSequence")
_WANTED = wanted((
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID",
    "Modality", "ImageType", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation",
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness",
    "GantryDetectorTilt", "KVP", "ConvolutionKernel", "BodyPartExamined", "AnatomicRegionSequence",
    "StudyDescription", "SeriesDescription", "ProtocolName", "Manufacturer", "ManufacturerModelName",
    "ContrastBolusAgent", "ContrastBolusAgentSequence", "PatientAge", "PatientBirthDate", "StudyDate",
    "PatientID", "IssuerOfPatientID", "PatientName",
    "InstanceNumber", "SeriesNumber", "AcquisitionNumber", "NumberOfSeriesRelatedInstances", "ImagesInAcquisition",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence", "FrameAnatomySequence",
    "CTAcquisitionDetailsSequence", "CTXRayDetailsSequence", "CTReconstructionSequence", *_CONVERTED, "CodeMeaning",
    "StationName", "CodeValue", "CodingSchemeDesignator", "AccessionNumber",
    "AcquisitionDateTime", "AcquisitionDate", "AcquisitionTime",
))  # fmt: skip


def read_header(source: Path | bytes | memoryview | BinaryIO, *, complete: bool = True) -> Header:
    """Read the header of a Part 10 instance (PS3.10 7.1), up to its pixel data.

    Args:
        source: a file, its bytes (the instance is not copied, nor kept), or a binary stream at its start.
        complete: False if the bytes are only the first part of an instance. A header that is returned is then the
            one of the whole instance; `HeaderCutOff` says that they end before the header does.

    Raises:
        HeaderCutOff: it ends within an element before the pixel data; or, if not ``complete``, before the pixel data.
            (The first part of a deflated data set is always too short.)
        HeaderError: it is no Part 10 file, cannot be parsed, or one of its SOP Class, SOP Instance, Study
            Instance, Series Instance and Transfer Syntax UIDs is missing or no UID (PS3.5 9.1).
    """
    with reading(str(source) if isinstance(source, Path) else "received instance"):
        if isinstance(source, (bytes, memoryview)):
            return _header(parse_buffer(source, _WANTED, complete))
        if isinstance(source, Path):
            with source.open("rb") as file:
                return _header(parse_file(file, _WANTED, complete))
        return _header(parse_file(source, _WANTED, complete))


def _header(parsed: Parsed) -> Header:
    elements = parsed.elements
    sop_class, instance = elements.uid("SOPClassUID"), elements.uid("SOPInstanceUID")
    study, series = elements.uid("StudyInstanceUID"), elements.uid("SeriesInstanceUID")
    uids = (sop_class, instance, study, series, parsed.syntax)
    if not all(uids):
        names = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "TransferSyntaxUID")
        missing = [name for name, uid in zip(names, uids, strict=True) if not uid]
        raise HeaderError(f"{', '.join(missing)} missing or no UID")
    number_of_frames = _number_of_frames(elements)
    shared = elements.first("SharedFunctionalGroupsSequence")
    per_frame = elements.items("PerFrameFunctionalGroupsSequence")
    groups = [*per_frame[:1], *([] if shared is None else [shared])]
    # A conversion keeps the attributes that no functional group has a place for (PS3.3 A.71, C.7.6.16.2.25 and 26).
    places = [elements]
    for group in groups:
        places += [item for item in map(group.first, _CONVERTED) if item is not None]
    if per_frame or shared:
        frames = _grouped_planes(shared, per_frame, number_of_frames, elements.problems)
    else:
        frames = _single_plane(elements) if number_of_frames == 1 else ()
    region = _region(elements, groups)
    return Header(
        sop_class_uid=sop_class,
        sop_instance_uid=instance,
        study_instance_uid=study,
        series_instance_uid=series,
        transfer_syntax_uid=parsed.syntax,
        modality=elements.text("Modality"),
        image_type=elements.texts("ImageType"),
        rows=elements.short("Rows") or 0,
        columns=elements.short("Columns") or 0,
        number_of_frames=number_of_frames,
        samples_per_pixel=elements.short("SamplesPerPixel") or 0,
        photometric_interpretation=elements.text("PhotometricInterpretation"),
        frames=frames,
        gantry_detector_tilt=_grouped_number(places, groups, "CTAcquisitionDetailsSequence", "GantryDetectorTilt"),
        kvp=_grouped_number(places, groups, "CTXRayDetailsSequence", "KVP")
        if _agree(elements, groups, per_frame, "CTXRayDetailsSequence", "KVP")
        else None,
        convolution_kernel=_kernel(places, groups)
        if _agree(elements, groups, per_frame, "CTReconstructionSequence", "ConvolutionKernel")
        else "",
        body_part_examined=_body_part(elements, region),
        study_description=elements.text("StudyDescription"),
        series_description=elements.text("SeriesDescription"),
        protocol_name=elements.text("ProtocolName"),
        manufacturer=elements.text("Manufacturer"),
        manufacturer_model_name=elements.text("ManufacturerModelName"),
        contrast_bolus_agent=_contrast(places),
        frame_of_reference_uid=elements.uid("FrameOfReferenceUID"),
        patient=_patient(elements),
        patient_age=elements.text("PatientAge"),
        patient_birth_date=elements.text("PatientBirthDate"),
        study_date=elements.text("StudyDate"),
        instance_number=elements.integer("InstanceNumber"),
        series_number=elements.integer("SeriesNumber"),
        acquisition_number=elements.integer("AcquisitionNumber"),
        number_of_series_related_instances=elements.integer("NumberOfSeriesRelatedInstances"),
        images_in_acquisition=elements.integer("ImagesInAcquisition"),
        station_name=elements.text("StationName"),
        anatomic_region=_code(region),
        accession_number=elements.text("AccessionNumber"),
        patient_id=elements.text("PatientID"),
        issuer_of_patient_id=elements.text("IssuerOfPatientID"),
        acquired=_acquired(elements),
        problems=tuple(elements.problems),
    )


def _patient(elements: Elements) -> str:
    keywords = ("PatientID", "IssuerOfPatientID", "PatientName", "PatientBirthDate")
    return hashlib.sha256("\0".join(map(elements.text, keywords)).encode()).hexdigest()


def _acquired(elements: Elements) -> str:
    """When the acquisition began, to the second (PS3.3 C.7.6.1, C.8.15.2), "" if that is not said."""
    date_time, day = elements.text("AcquisitionDateTime"), elements.text("AcquisitionDate")
    for said in (date_time, day + elements.text("AcquisitionTime") if len(day) == 8 else ""):
        if found := _SECOND.match(said):
            return found[0]
    return ""


def _number_of_frames(elements: Elements) -> int:
    number = elements.integer("NumberOfFrames")
    if number is None:
        return 1
    if not 1 <= number <= MAXIMUM_FRAMES:
        elements.problem("NumberOfFrames", str(number), f"within 1 to {MAXIMUM_FRAMES}")
        return 0
    return number


def _single_plane(elements: Elements) -> tuple[FramePlane, ...]:
    plane = _plane(elements, elements, elements)
    return (plane,) if plane else ()


def _grouped_planes(
    shared: Elements | None, per_frame: Sequence[Elements], number_of_frames: int, problems: list[str]
) -> tuple[FramePlane, ...]:
    """The planes of an enhanced object (PS3.3 C.7.6.16): each macro is in the shared or the per-frame group."""
    if len(per_frame) != number_of_frames:
        problems.append(f"PerFrameFunctionalGroupsSequence: {len(per_frame)} items for {number_of_frames} frames")
        return ()

    def macro(frame: Elements, keyword: str) -> Elements | None:
        return frame.first(keyword) or (shared.first(keyword) if shared else None)

    planes = []
    for frame in per_frame:
        plane = _plane(
            macro(frame, "PlanePositionSequence"),
            macro(frame, "PlaneOrientationSequence"),
            macro(frame, "PixelMeasuresSequence"),
        )
        if plane is None:
            return ()
        planes.append(plane)
    return tuple(planes)


def _plane(position: Elements | None, orientation: Elements | None, measures: Elements | None) -> FramePlane | None:
    """The plane that three groups describe, None (with a problem if it is there but wrong) if incomplete."""
    if position is None or orientation is None or measures is None:
        return None
    point = _numbers(position, "ImagePositionPatient", 3)
    cosines = _numbers(orientation, "ImageOrientationPatient", 6)
    spacing = _numbers(measures, "PixelSpacing", 2)
    thickness = measures.number("SliceThickness")
    if thickness is not None and not 0 < thickness <= 1000:
        measures.problem("SliceThickness", f"{thickness:g}", "a thickness in mm")
        thickness = None
    if point and max(map(abs, point)) > MAXIMUM_POSITION_MM:
        position.problem("ImagePositionPatient", str(point), "a place in a patient")
        point = None
    if spacing and not 0 < min(spacing) <= max(spacing) <= 100:
        measures.problem("PixelSpacing", str(spacing), "two spacings in mm")
        spacing = None
    if cosines and not _orthonormal(cosines):
        orientation.problem("ImageOrientationPatient", str(cosines), "two perpendicular unit vectors")
        cosines = None
    if point is None or cosines is None or spacing is None:
        return None
    return FramePlane((point[0], point[1], point[2]), cosines, (spacing[0], spacing[1]), thickness)


def _numbers(elements: Elements, keyword: str, count: int) -> tuple[float, ...] | None:
    values = elements.numbers(keyword)
    if values is not None and len(values) != count:
        elements.problem(keyword, str(values), f"{count} numbers")
        return None
    return values


def _orthonormal(cosines: tuple[float, ...]) -> bool:
    """PS3.3 C.7.6.2.1.1: direction cosines are of unit length and perpendicular; devices round to 4 digits or so."""
    a, b, c, d, e, f = cosines
    return (
        abs(math.hypot(a, b, c) - 1) < 1e-2
        and abs(math.hypot(d, e, f) - 1) < 1e-2
        and abs(a * d + b * e + c * f) < 1e-2
    )


def _contrast(places: Sequence[Elements]) -> str:
    for item in places:
        if text := item.text("ContrastBolusAgent") or _meaning(item, "ContrastBolusAgentSequence"):
            return text
        if item.first("ContrastBolusAgentSequence") is not None:
            return "an agent that is not named"
    return ""


def _grouped_number(
    places: Sequence[Elements], groups: Sequence[Elements], sequence: str, keyword: str
) -> float | None:
    for item in [*places, *[group.first(sequence) for group in groups]]:
        if item is not None and (value := item.number(keyword)) is not None:
            return value
    return None


def _agree(
    elements: Elements, groups: Sequence[Elements], per_frame: Sequence[Elements], sequence: str, keyword: str
) -> bool:
    """Whether all frames of an enhanced object say the same; else (with a problem) nothing is known of it."""
    said = {item.text(keyword) for group in (*groups, *per_frame[1:]) for item in group.items(sequence)}
    if any(group.items(sequence) for group in per_frame) and not all(group.items(sequence) for group in per_frame):
        said |= {"", "absent in some"}
    if len(said) > 1:
        elements.problem(keyword, ", ".join(sorted(said)), "the same in every frame")
    return len(said) <= 1


def _kernel(places: Sequence[Elements], groups: Sequence[Elements]) -> str:
    for item in [*places, *[group.first("CTReconstructionSequence") for group in groups]]:
        if item is not None and (text := item.text("ConvolutionKernel")):
            return text
    return ""


def _region(elements: Elements, groups: Sequence[Elements]) -> Elements | None:
    """The first item of Anatomic Region Sequence."""
    for item in (elements, *(group.first("FrameAnatomySequence") for group in groups)):
        if item is not None and (region := item.first("AnatomicRegionSequence")) is not None:
            return region
    return None


def _body_part(elements: Elements, region: Elements | None) -> str:
    """Body Part Examined; else the meaning of the anatomic region's code, in capitals as the defined terms are."""
    return elements.text("BodyPartExamined") or (region.text("CodeMeaning").upper() if region is not None else "")


def _code(item: Elements | None) -> str:
    value, scheme = (item.text("CodeValue"), item.text("CodingSchemeDesignator")) if item is not None else ("", "")
    return f"{value} {scheme}" if value and scheme else ""


def _meaning(elements: Elements, keyword: str) -> str:
    item = elements.first(keyword)
    return item.text("CodeMeaning") if item is not None else ""
