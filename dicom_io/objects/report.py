"""A measurement report: Comprehensive 3D SR, or Comprehensive SR, after PS3.16 TID 1500."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import highdicom.sr as sr
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import Comprehensive3DSRStorage, ComprehensiveSRStorage

from dicom_io.objects import codes
from dicom_io.objects.codes import Concept
from dicom_io.objects.common import (
    Algorithm,
    Device,
    ImageReference,
    Place,
    begin,
    declare_private_scheme,
    fit,
    in_study,
)

_CONTAINS = sr.RelationshipTypeValues.CONTAINS
_CONTEXT = sr.RelationshipTypeValues.HAS_ACQ_CONTEXT
_OBSERVED = sr.RelationshipTypeValues.HAS_OBS_CONTEXT


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number with its name and unit (PS3.16 TID 300)."""

    name: Concept
    value: float
    unit: Concept


@dataclass(frozen=True, slots=True)
class ReportFinding:
    """A finding on one image (PS3.16 TID 1410 where outlined, else TID 1501).

    Attributes:
        label: human readable tracking identifier; `uid` is the unique one.
        outline: closed polygon of (column, row), pixel centres at integers; None for the whole image.
    """

    label: str
    uid: str
    concept: Concept
    image: ImageReference
    quantities: tuple[Quantity, ...] = ()
    outline: tuple[tuple[float, float], ...] | None = None


@dataclass(frozen=True, slots=True)
class Drawn:
    """A closed polygon, in its image and in space.

    Attributes:
        outline: of (column, row), pixel centres at integers.
        in_space: the same points as (x, y, z) in mm of the frame of reference.
    """

    image: ImageReference
    outline: tuple[tuple[float, float], ...]
    in_space: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True, slots=True)
class Report:
    """What the report says.

    Attributes:
        label, uid: tracking identifiers of the result for the whole study.
        finding: what is suspected; None if nothing was found, so that no reader takes it for a finding.
        result: the coded triage result.
        actionable: category of an actionable finding (PS3.16 CID 7035), if it is one.
        types: the likely types of what is suspected, most likely first.
        impression: one or more sentences for a person.
        quantities: study-level numbers.
        findings: where it is seen, most important first.
        comments: the regulatory notice and the like.
        limitations: what was not analysed or is doubtful.
        images: every analysed image, all of one series, in order; empty only of a study that was not analysed.
        complete: whether the images are all of that series, as far as can be seen.
        outlines: all that the volume was measured in, first what the first finding outlines. (OHIF draws the first of
            them on that image.)
    """

    label: str
    uid: str
    finding: Concept | None
    result: Concept
    impression: str
    quantities: tuple[Quantity, ...]
    findings: tuple[ReportFinding, ...]
    comments: tuple[str, ...]
    limitations: tuple[str, ...]
    images: tuple[ImageReference, ...]
    complete: bool = True
    actionable: Concept | None = None
    types: tuple[Concept, ...] = ()
    outlines: tuple[Drawn, ...] = ()


def build_report(
    report: Report,
    source: Dataset,
    *,
    procedure: Concept,
    algorithm: Algorithm,
    predecessor: tuple[str, str] | None = None,
    device: Device,
    place: Place,
    in_space: bool = True,
) -> Dataset:
    """An unverified, preliminary TID 1500 report on one series.

    Its Completion Flag is PARTIAL where images of the series are missing. The result for the study is a TID 1501 group.
    Its probability is inferred (TID 320) from the outlines on the first finding's image, its volume from all outlines,
    closed polylines in space, or where that is not wanted on their images. (The volume surface of a TID 1411 group
    would have to be of polygons, and OHIF 3.13 shows an error page instead of a report that has one.) A number that no
    outline belongs to is inferred from the border of its whole image, since OHIF 3.13 shows nothing at all of a report
    that has a group without coordinates.

    Args:
        source: header of an analysed image, or of any image of a study that was not analysed; the report takes patient
            and study from it.
        procedure: the imaging procedure that is reported on.
        predecessor: SOP Instance UID and Series Instance UID of the report in this study that this one supersedes, of
            the same class.
        in_space: Comprehensive 3D SR; else Comprehensive SR, which has no coordinates in space (PS3.3 A.35.3.3.1.2) and
            says everything else alike.

    Returns: a data set with file meta, ready to be written; the same for the same arguments.
    Raises: ValueError if `report.images` is empty and the result is another than that nothing was analysed.
    """
    if not report.images and report.result != codes.NOT_ANALYSED:
        raise ValueError("a report needs at least one analysed image")
    sop_class = Comprehensive3DSRStorage if in_space else ComprehensiveSRStorage
    made = begin(sop_class, "SR", source, device, place)
    made.CompletionFlag = "COMPLETE" if report.complete else "PARTIAL"
    if not report.images:
        made.CompletionFlagDescription = "The study was not analysed"
    elif not report.complete:
        made.CompletionFlagDescription = "Images of the analysed series are missing, see its limitations"
    made.VerificationFlag = "UNVERIFIED"
    made.PreliminaryFlag = "PRELIMINARY"
    made.ReferencedPerformedProcedureStepSequence = DicomSequence()
    made.PerformedProcedureCodeSequence = DicomSequence()
    study, series = source.StudyInstanceUID, source.SeriesInstanceUID
    if report.images:
        made.CurrentRequestedProcedureEvidenceSequence = in_study(study, series, report.images)
    if predecessor is not None:
        instance_uid, series_uid = predecessor
        earlier = ImageReference(sop_class, instance_uid)
        made.PredecessorDocumentsSequence = in_study(study, series_uid, [earlier])
    declare_private_scheme(made)

    identification = sr.AlgorithmIdentification(
        name=fit(made, algorithm.name),
        version=fit(made, algorithm.version),
        manufacturer=fit(made, algorithm.manufacturer),
        parameters=[fit(made, parameter) for parameter in algorithm.parameters] or None,
    )
    groups: list[Any] = [_study_group(made, report, source, identification, in_space)]
    groups += [_finding_group(made, finding, source, identification) for finding in report.findings]
    tree = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=observer(made, device)),
        procedure_reported=coded(procedure),
        imaging_measurements=groups,
    )[0]
    if report.images:
        tree.ContentSequence.insert(len(tree.ContentSequence) - 1, _image_library(source, report.images))
    for element in tree:
        made[element.tag] = element
    return made


def coded(concept: Concept) -> Any:
    """The concept as highdicom writes it."""
    return sr.CodedConcept(concept.value, concept.scheme, concept.meaning)


def _text(made: Dataset, name: Concept, text: str) -> Any:
    return sr.TextContentItem(coded(name), fit(made, text), relationship_type=_CONTAINS)


def observer(made: Dataset, device: Device) -> Any:
    """The device as the observer of a document (PS3.16 TID 1002).

    Its UDI is in the UDI Sequence, from which TID 1004 takes it by default, and once more as text, as that extensible
    template allows: its own container of UDIs DCMTK 3.6.7 refuses, with the whole report.
    """
    context = sr.ObserverContext(
        observer_type=coded(codes.DEVICE),
        observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
            uid=device.uid,
            name=fit(made, device.name),
            manufacturer_name=fit(made, device.manufacturer),
            model_name=fit(made, f"{device.model_name} {device.software_version}"),
            serial_number=fit(made, device.serial_number) or None,
        ),
    )
    if device.udi:
        context.append(sr.TextContentItem(coded(codes.UDI), fit(made, device.udi), relationship_type=_OBSERVED))
    return context


def _measured(quantity: Quantity, coordinates: Sequence[Any] | None = None) -> Any:
    unit = coded(quantity.unit)
    return sr.Measurement(coded(quantity.name), float(quantity.value), unit, referenced_coordinates=coordinates or None)


def _on_image(image: ImageReference) -> sr.SourceImageForRegion:
    frames = None if image.frame is None else [image.frame]
    return sr.SourceImageForRegion(image.sop_class_uid, image.sop_instance_uid, frames)


def _points(outline: Sequence[tuple[float, float]]) -> NDArray[np.float64]:
    # The corner of the first pixel is 0\0 and its centre 0.5\0.5 (PS3.3 C.18.6); a closed line repeats its start.
    return np.array([*outline, outline[0]], dtype=np.float64) + 0.5


def _seen_in(finding: ReportFinding, source: Dataset) -> Any:
    """The outline of a finding, or the border of its image, as what a number was inferred from."""
    right, bottom = source.Columns - 0.5, source.Rows - 0.5
    border = ((-0.5, -0.5), (right, -0.5), (right, bottom), (-0.5, bottom))
    return sr.CoordinatesForMeasurement(
        graphic_type=sr.GraphicTypeValues.POLYLINE,
        graphic_data=_points(finding.outline or border),
        source_image=_on_image(finding.image),
    )


def _measured_in(source: Dataset, report: Report, in_space: bool) -> list[Any]:
    """The outlines on their images, or in the frame of reference of the source; none there where it has none."""
    if not in_space:
        return [
            sr.CoordinatesForMeasurement(
                graphic_type=sr.GraphicTypeValues.POLYLINE,
                graphic_data=_points(one.outline),
                source_image=_on_image(one.image),
            )
            for one in report.outlines
        ]
    if not source.get("FrameOfReferenceUID"):
        return []
    return [
        sr.CoordinatesForMeasurement3D(
            graphic_type=sr.GraphicTypeValues3D.POLYLINE,
            graphic_data=np.array([*one.in_space, one.in_space[0]], dtype=np.float64),
            frame_of_reference_uid=source.FrameOfReferenceUID,
        )
        for one in report.outlines
    ]


def _study_group(made: Dataset, report: Report, source: Dataset, identification: Any, in_space: bool) -> Any:
    # The study's probability is that of its most suspicious slab.
    seen_in = {
        codes.PROBABILITY_ANY: [
            _seen_in(one, source) for one in report.findings if one.image == report.findings[0].image
        ],
        codes.VOLUME: _measured_in(source, report, in_space),
    }
    measurements = [_measured(one, seen_in.get(one.name)) for one in report.quantities]
    group = sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(uid=report.uid, identifier=fit(made, report.label)),
        finding_type=coded(report.finding) if report.finding else None,
        algorithm_id=identification,
        measurements=measurements or None,
        qualitative_evaluations=[
            sr.QualitativeEvaluation(coded(name), coded(value))
            for name, value in (
                (codes.TRIAGE_RESULT, report.result),
                (codes.ACTIONABILITY, report.actionable),
                *((codes.SUSPECTED_TYPE, one) for one in report.types),
            )
            if value is not None
        ],
    )
    items = group[0].ContentSequence
    items.append(_text(made, codes.IMPRESSION, report.impression))
    items.extend([_text(made, codes.COMMENT, comment) for comment in report.comments])
    items.extend([_text(made, codes.LIMITATION, limitation) for limitation in report.limitations])
    return group


def _finding_group(made: Dataset, finding: ReportFinding, source: Dataset, identification: Any) -> Any:
    image = finding.image
    frames = None if image.frame is None else [image.frame]
    common = {
        "tracking_identifier": sr.TrackingIdentifier(uid=finding.uid, identifier=fit(made, finding.label)),
        "finding_type": coded(finding.concept),
        "algorithm_id": identification,
    }
    if finding.outline is None:
        border = [_seen_in(finding, source)]
        return sr.MeasurementsAndQualitativeEvaluations(
            source_images=[sr.SourceImageForMeasurementGroup(image.sop_class_uid, image.sop_instance_uid, frames)],
            measurements=[_measured(one, border) for one in finding.quantities] or None,
            **common,
        )
    region = sr.ImageRegion(
        graphic_type=sr.GraphicTypeValues.POLYLINE,
        graphic_data=_points(finding.outline),
        source_image=_on_image(image),
    )
    return sr.PlanarROIMeasurementsAndQualitativeEvaluations(
        referenced_region=region, measurements=[_measured(one) for one in finding.quantities] or None, **common
    )


def _image_library(source: Dataset, images: Sequence[ImageReference]) -> Any:
    """PS3.16 TID 1600: one group, described by what all its images share."""
    group = sr.ContainerContentItem(coded(codes.IMAGE_LIBRARY_GROUP), relationship_type=_CONTAINS)
    group.ContentSequence = sr.ContentSequence()
    group.ContentSequence.append(
        sr.CodeContentItem(coded(codes.MODALITY), coded(codes.CT_MODALITY), relationship_type=_CONTEXT)
    )
    if frame_of_reference := source.get("FrameOfReferenceUID"):
        group.ContentSequence.append(
            sr.UIDRefContentItem(coded(codes.FRAME_OF_REFERENCE), frame_of_reference, relationship_type=_CONTEXT)
        )
    unique = {image.sop_instance_uid: image.sop_class_uid for image in images}
    group.ContentSequence.extend(
        [sr.ImageContentItem(coded(codes.SOURCE), cls, uid, relationship_type=_CONTAINS) for uid, cls in unique.items()]
    )
    library = sr.ContainerContentItem(coded(codes.IMAGE_LIBRARY), relationship_type=_CONTAINS)
    library.ContentSequence = sr.ContentSequence([group])
    return library
