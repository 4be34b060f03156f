"""Items of a modality worklist for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian


def scheduled(accession: str = "A1", study: str = "1.1", patient: str = "P1", **changes: Any) -> Dataset:
    """A scheduled head CT, with what a provider must have of it (PS3.4 Table K.6-1)."""
    step = Dataset()
    step.Modality, step.ScheduledStationAETitle = "CT", "CT1"
    step.ScheduledProcedureStepStartDate, step.ScheduledProcedureStepStartTime = "20261130", "010203"
    step.ScheduledProcedureStepID, step.ScheduledProcedureStepDescription = "S1", "CT head"
    step.ScheduledPerformingPhysicianName = "Who^Ever"
    item = Dataset()
    item.SpecificCharacterSet = "ISO_IR 100"
    item.PatientName, item.PatientID, item.IssuerOfPatientID = "Müller^Eva", patient, "HOSP"
    item.PatientBirthDate, item.PatientSex = "19500203", "F"
    item.AccessionNumber, item.StudyInstanceUID = accession, study
    item.RequestedProcedureID, item.RequestedProcedureDescription = "R1", "CT head without contrast"
    item.RequestedProcedurePriority = "ROUTINE"
    item.ReasonForTheRequestedProcedure = "Kopfschmerz, plötzlich"
    item.ScheduledProcedureStepSequence = [step]
    for keyword, value in changes.items():
        setattr(item, keyword, value)
    return item


def write_item(item: Dataset, path: Path) -> None:
    """Write an item as the file that providers of other people read."""
    item.file_meta = FileMetaDataset()
    item.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    item.file_meta.MediaStorageSOPClassUID = "1.2.276.0.7230010.3.1.0.1"
    item.file_meta.MediaStorageSOPInstanceUID = "2.25.1"
    path.parent.mkdir(parents=True, exist_ok=True)
    item.save_as(path, enforce_file_format=True)
