"""What every object made from a source image shares: whose it is, who made it, and how it is written."""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import pydicom
from pydicom.charset import convert_encodings
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag
from pydicom.uid import ExplicitVRLittleEndian

from dicom_io.objects import codes
from dicom_io.objects.codes import (
    PRIVATE_SCHEME,
    PRIVATE_SCHEME_NAME,
    PRIVATE_SCHEME_ORGANIZATION,
    Concept,
)
from dicom_io.verbatim import write_verbatim

TYPE_2 = (
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "ReferringPhysicianName",
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyID",
)
"""Patient and General Study attributes that must be present, if need be empty (PS3.3 C.7.1.1, C.7.2.1)."""

IDENTITY = (
    *TYPE_2,
    "SpecificCharacterSet",
    "TimezoneOffsetFromUTC",
    # Patient (C.7.1.1)
    "IssuerOfPatientID",
    "IssuerOfPatientIDQualifiersSequence",
    "TypeOfPatientID",
    "PatientBirthTime",
    "OtherPatientIDsSequence",
    "OtherPatientNames",
    "EthnicGroup",
    "PatientComments",
    "QualityControlSubject",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
    "DeidentificationMethodCodeSequence",
    "ClinicalTrialSponsorName",
    "ClinicalTrialProtocolID",
    "ClinicalTrialProtocolName",
    "ClinicalTrialSiteID",
    "ClinicalTrialSiteName",
    "ClinicalTrialSubjectID",
    "ClinicalTrialSubjectReadingID",
    # General Study and Patient Study (C.7.2.1, C.7.2.2)
    "StudyInstanceUID",
    "IssuerOfAccessionNumberSequence",
    "StudyDescription",
    "ReferringPhysicianIdentificationSequence",
    "RequestingServiceCodeSequence",
    "ProcedureCodeSequence",
    "ReferencedStudySequence",
    "AdmittingDiagnosesDescription",
    "PatientAge",
    "PatientSize",
    "PatientWeight",
    "AdmissionID",
    "IssuerOfAdmissionIDSequence",
    "AdditionalPatientHistory",
    "ClinicalTrialTimePointID",
    "ClinicalTrialTimePointDescription",
)
"""What an object takes from its source, value by value."""

_DOCUMENTS = ("SR", "KO")
"""Modalities of documents: they name a request in Referenced Request Sequence (PS3.3 C.17.2, C.17.6.2), others in
Request Attributes Sequence (C.7.3.1)."""
_REQUEST = (
    "StudyInstanceUID",
    "ReferencedStudySequence",
    "AccessionNumber",
    "IssuerOfAccessionNumberSequence",
    "PlacerOrderNumberImagingServiceRequest",
    "FillerOrderNumberImagingServiceRequest",
    "RequestedProcedureID",
    "RequestedProcedureDescription",
    "RequestedProcedureCodeSequence",
)
_REQUEST_TYPE_2 = frozenset(_REQUEST) - {"StudyInstanceUID", "IssuerOfAccessionNumberSequence"}

# The values of these are characters, so their bytes mean the same under every transfer syntax.
_CHARACTERS = frozenset(
    ("AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT")
)

# pydicom's codecs whose every character the declared set really has. Not among them: the one for the default
# repertoire, which writes Latin-1, Shift JIS, of which DICOM allows a part, and those that need escape sequences.
_WHOLE_CODECS = frozenset(
    (
        *("latin_1", "iso8859_2", "iso8859_3", "iso8859_4", "UTF8", "GB18030", "GBK"),
        *(f"iso_ir_{number}" for number in (126, 127, 138, 144, 148, 166)),
    )
)


@dataclass(frozen=True, slots=True)
class Device:
    """The equipment that makes objects (PS3.3 C.7.5.1; PS3.16 TID 1004).

    Attributes:
        uid: identifies this installation as an observer.
        name: what the site calls it.
        serial_number: '' where there is none.
        udi: unique device identifier, as its label has it; '' where there is none.
    """

    uid: str
    name: str
    manufacturer: str
    model_name: str
    software_version: str
    serial_number: str = ""
    udi: str = ""


@dataclass(frozen=True, slots=True)
class Algorithm:
    """What computed the results (PS3.16 TID 4019, PS3.3 Table 10-19)."""

    name: str
    version: str
    manufacturer: str
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ImageReference:
    """An image that an object speaks of; `frame` is 1-based, None for a single-frame image."""

    sop_class_uid: str
    sop_instance_uid: str
    frame: int | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a new instance stands in its study, and when it was made.

    Attributes:
        created: an aware time. It is written in the source's time zone where the source names one
            (Timezone Offset From UTC), else as this value's own zone shows it.
    """

    sop_instance_uid: str
    series_instance_uid: str
    series_number: int
    instance_number: int
    series_description: str
    created: datetime


def begin(sop_class_uid: str, modality: str, source: Dataset, device: Device, place: Place) -> Dataset:
    """A new instance of this class in the source's study, with everything but its own content.

    Patient and study identity are the source's, byte for byte; type 2 attributes it lacks are there and empty.
    Dates are local time as DICOM wants them (PS3.3 C.12.1.1.8 where the source carries an offset).

    Args:
        source: header of a source image, as pydicom read it; it is not changed.
    """
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    for keyword in IDENTITY:
        _carry(source, made, tag_for_keyword(keyword))
    for keyword in TYPE_2:
        if keyword not in made:
            setattr(made, keyword, "")
    if _characters(made, "PatientIdentityRemoved") == "YES" and not (
        _characters(made, "DeidentificationMethod") or "DeidentificationMethodCodeSequence" in made
    ):
        made.DeidentificationMethod = "not stated by the source"  # type 1C, and the source left it out

    if modality in _DOCUMENTS:
        if requests := _requests(source):
            made.ReferencedRequestSequence = requests
    else:
        _carry(source, made, tag_for_keyword("RequestAttributesSequence"))

    made.SOPClassUID = sop_class_uid
    made.SOPInstanceUID = place.sop_instance_uid
    made.Modality = modality
    made.SeriesInstanceUID = place.series_instance_uid
    made.SeriesNumber = place.series_number
    made.InstanceNumber = place.instance_number
    made.SeriesDescription = fit(made, place.series_description, 64)
    made.Manufacturer = fit(made, device.manufacturer, 64)
    made.ManufacturerModelName = fit(made, device.model_name, 64)
    made.SoftwareVersions = fit(made, device.software_version, 64)
    if device.serial_number:
        made.DeviceSerialNumber = fit(made, device.serial_number, 64)
    if device.udi:
        made.UDISequence = Sequence([item(UniqueDeviceIdentifier=fit(made, device.udi))])  # PS3.3 10.29
    clock = _local(made, place.created)
    date, time = clock.strftime("%Y%m%d"), clock.strftime("%H%M%S.%f")
    made.InstanceCreationDate = made.SeriesDate = made.ContentDate = date
    made.InstanceCreationTime = made.SeriesTime = made.ContentTime = time
    return made


def fit(made: Dataset, text: str, length: int | None = None) -> str:
    """Text that the object's character set can write, without backslashes or control characters.

    Where the set lacks a character, its plain letter stands in, or a question mark.
    """
    text = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text).replace("\\", "/")
    codec = convert_encodings(made.get("SpecificCharacterSet") or None)[0]
    if codec not in _WHOLE_CODECS:
        codec = "ascii"
    try:
        text.encode(codec)
    except UnicodeEncodeError:
        for character, plain in (("–", "-"), ("—", "-"), ("×", "x"), ("≥", ">="), ("·", "-"), ("’", "'")):
            text = text.replace(character, plain)
        letters = unicodedata.normalize("NFKD", text)
        letters = "".join(c for c in letters if not unicodedata.combining(c))
        text = letters.encode("ascii", "replace").decode("ascii")
    return text if length is None else text[:length].rstrip()


def item(**attributes: Any) -> Dataset:
    """An item of a sequence with these attributes, by keyword."""
    made = Dataset()
    for keyword, value in attributes.items():
        setattr(made, keyword, value)
    return made


def code_item(concept: Concept) -> Dataset:
    """An item of a code sequence (PS3.3 8.8)."""
    return item(CodeValue=concept.value, CodingSchemeDesignator=concept.scheme, CodeMeaning=concept.meaning)


def declare_private_scheme(made: Dataset) -> None:
    """Say whose codes the private ones are (PS3.3 C.12.1.1.7)."""
    scheme = item(
        CodingSchemeDesignator=PRIVATE_SCHEME,
        CodingSchemeName=PRIVATE_SCHEME_NAME,
        CodingSchemeResponsibleOrganization=PRIVATE_SCHEME_ORGANIZATION,
    )
    made.CodingSchemeIdentificationSequence = Sequence([scheme])


def part10(made: Dataset) -> bytes:
    """The object as a Part 10 file: the same bytes for the same object."""
    buffer = io.BytesIO()
    write_verbatim(buffer, made)
    return buffer.getvalue()


def _carry(source: Dataset, made: Dataset, tag: int | None) -> None:
    """Copy one element as it is written in the source; text is never decoded on the way."""
    if tag is None or tag not in source:
        return
    element = source.get_item(tag)
    vr = dictionary_VR(tag)
    if vr == "SQ":
        items = [_carry_item(one) for one in source[tag].value or ()]
        if items:  # a type 3 sequence without items says nothing
            made.add_new(tag, "SQ", Sequence(items))
    elif isinstance(element, RawDataElement) and vr in _CHARACTERS:
        value = element.value or b""
        if len(value) % 2:  # a source that breaks PS3.5 6.2 is not copied in that
            value += b"\0" if vr == "UI" else b" "
        if value or _keyword_is_type_2(tag):
            made[tag] = RawDataElement(BaseTag(tag), vr, len(value), value, 0, False, True)
    elif not source[tag].is_empty or _keyword_is_type_2(tag):
        made.add(source[tag])


def _requests(source: Dataset) -> Sequence:
    """The requests that the source was acquired for, as a document refers to them; what it does not know is empty."""
    found = []
    for request in source.get("RequestAttributesSequence") or ():
        made = Dataset()
        for keyword in _REQUEST:
            tag = tag_for_keyword(keyword)
            # What an image says once for all requests stands outside of them.
            of_study = keyword not in request and keyword in ("StudyInstanceUID", "AccessionNumber", _REQUEST[3])
            _carry(source if of_study else request, made, tag)
            if keyword not in made and keyword in _REQUEST_TYPE_2:
                setattr(made, keyword, Sequence() if dictionary_VR(str(keyword)) == "SQ" else "")
        found.append(made)
    return Sequence(found)


def _carry_item(source: Dataset) -> Dataset:
    made = Dataset()
    for tag in source.keys():  # noqa: SIM118 - iterating a Dataset itself decodes every element
        if not BaseTag(tag).is_private:
            try:
                _carry(source, made, tag)
            except KeyError:
                continue  # an element newer than pydicom's dictionary: its representation is not known
    return made


def _keyword_is_type_2(tag: int) -> bool:
    return pydicom.datadict.keyword_for_tag(tag) in TYPE_2


def _characters(made: Dataset, keyword: str) -> str:
    value = made.get(keyword)
    return str(value[0] if isinstance(value, MultiValue) and value else value or "").strip()


def _local(made: Dataset, created: datetime) -> datetime:
    offset = re.fullmatch(r"([+-])(0[0-9]|1[0-4])([0-5][0-9])", _characters(made, "TimezoneOffsetFromUTC"))
    if offset is None:
        return created
    minutes = int(offset[2]) * 60 + int(offset[3])
    return created.astimezone(timezone(timedelta(minutes=minutes if offset[1] == "+" else -minutes)))


def keep_lossy(source: Dataset, made: Dataset) -> None:
    """An image that once lost information stays marked (PS3.3 C.7.6.1.1.5)."""
    made.LossyImageCompression = "00"
    if source.get("LossyImageCompression") == "01":
        for keyword in ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"):
            if keyword in source:
                made.add(source[keyword])


def keep_body_part(source: Dataset, made: Dataset) -> None:
    """The body part as the source has it; where it has none, nobody knows of a side either (PS3.3 C.7.3.1, type 2C)."""
    if source.get("BodyPartExamined"):
        made.BodyPartExamined = source.BodyPartExamined
    else:
        made.Laterality = ""


def source_item(image: ImageReference) -> Dataset:
    """An item of Source Image Sequence: the image that something was computed from (PS3.3 C.7.6.1)."""
    made = reference_item(image)
    made.PurposeOfReferenceCodeSequence = Sequence([code_item(codes.SOURCE_FOR_PROCESSING)])
    return made


def reference_item(image: ImageReference) -> Dataset:
    """An image by class, instance and, where it has several, frame (PS3.3 10.3)."""
    made = item(ReferencedSOPClassUID=image.sop_class_uid, ReferencedSOPInstanceUID=image.sop_instance_uid)
    if image.frame is not None:
        made.ReferencedFrameNumber = image.frame
    return made


def references(images: Iterable[ImageReference]) -> Sequence:
    """Referenced SOP Sequence: each image once, in order (PS3.3 10.8)."""
    unique = {image.sop_instance_uid: image.sop_class_uid for image in images}
    return Sequence([reference_item(ImageReference(cls, uid)) for uid, cls in unique.items()])


def in_study(study_uid: str, series_uid: str, images: Iterable[ImageReference]) -> Sequence:
    """Instances of one series, with series and study (PS3.3 Table C.17-3, Hierarchical SOP Instance Reference)."""
    series = item(SeriesInstanceUID=series_uid, ReferencedSOPSequence=references(images))
    return Sequence([item(StudyInstanceUID=study_uid, ReferencedSeriesSequence=Sequence([series]))])
