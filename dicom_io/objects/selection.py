"""Which images to look at first: a Key Object Selection document (PS3.3 A.35.4) after PS3.16 TID 2010."""

from __future__ import annotations

from collections.abc import Sequence

import highdicom.sr as sr
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import KeyObjectSelectionDocumentStorage

from dicom_io.objects import codes
from dicom_io.objects.codes import Concept
from dicom_io.objects.common import Device, ImageReference, Place, begin, fit, in_study
from dicom_io.objects.report import coded, observer


def build_selection(
    images: Sequence[ImageReference],
    source: Dataset,
    *,
    title: Concept,
    description: str,
    device: Device,
    place: Place,
) -> Dataset:
    """A selection of images of one series, the most important first.

    Args:
        source: header of one of them.
        title: of PS3.16 CID 7010.
        description: why they were selected.

    Returns: a data set with file meta, ready to be written; the same for the same arguments.
    Raises: ValueError if there is no image.
    """
    if not images:
        raise ValueError("a selection needs an image")
    made = begin(KeyObjectSelectionDocumentStorage, "KO", source, device, place)
    made.ReferencedPerformedProcedureStepSequence = DicomSequence()
    made.CurrentRequestedProcedureEvidenceSequence = in_study(source.StudyInstanceUID, source.SeriesInstanceUID, images)
    container = sr.ContainerContentItem(coded(title), template_id="2010")
    contains = sr.RelationshipTypeValues.CONTAINS
    container.ContentSequence = sr.ContentSequence(
        [
            *observer(made, device),
            sr.TextContentItem(coded(codes.KEY_OBJECT_DESCRIPTION), fit(made, description), relationship_type=contains),
            *(
                sr.ImageContentItem(
                    coded(codes.SOURCE),
                    image.sop_class_uid,
                    image.sop_instance_uid,
                    None if image.frame is None else [image.frame],
                    relationship_type=contains,
                )
                for image in images
            ),
        ]
    )
    for element in container:
        made[element.tag] = element
    return made
