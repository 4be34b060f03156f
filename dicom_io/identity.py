"""Whose images they are, as far as any header tells it."""

from __future__ import annotations

import logging
from pathlib import Path

import pydicom
from pydicom.config import IGNORE
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

from dicom_io._elements import parse, reading

log = logging.getLogger(__name__)

_PLAIN = (
    "StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID", "Modality",
    "PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex", "PatientAge",
    "AdmissionID", "AccessionNumber", "PlacerOrderNumberImagingServiceRequest", "ReferringPhysicianName",
    "StudyID", "StudyDescription", "StudyDate", "StudyTime", "AcquisitionDateTime", "AcquisitionDate",
    "AcquisitionTime", "TimezoneOffsetFromUTC", "InstitutionName", "StationName", "Manufacturer",
)  # fmt: skip
_SEQUENCES = ("RequestAttributesSequence", "IssuerOfAccessionNumberSequence", "IssuerOfPatientIDQualifiersSequence")


def identifying_header(path: Path) -> Dataset:
    """The header of a Part 10 instance, for who needs patient, study and order of it.

    It is pydicom's. Where pydicom fails, as at sequences that are nested too deeply for it, it holds the attributes of
    those that are no sequences, as Unicode text, and nothing else: an alert must not fail for what it does not say.

    Raises:
        HeaderError: it is no Part 10 file, or damaged.
        OSError: it cannot be read.
    """
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True)
        for keyword in (*_PLAIN, *_SEQUENCES):
            str(header.get(keyword))  # values are converted when they are asked for
        return header
    except OSError:
        raise
    except Exception as error:
        log.warning("%s: pydicom cannot read the header (%s); only plain attributes are", path, type(error).__name__)
    return _plain(path)


def _plain(path: Path) -> Dataset:
    with path.open("rb") as stream, reading(str(path)):
        _, elements, _ = parse(stream, _PLAIN)
    header = Dataset()
    header.SpecificCharacterSet = "ISO_IR 192"
    for keyword in _PLAIN:
        tag = tag_for_keyword(keyword)
        if tag is not None and (text := elements.text(keyword)):
            header.add(DataElement(tag, dictionary_VR(tag), text, validation_mode=IGNORE))
    return header
