"""Where it is, as a mask on the source's slices: a binary Segmentation (PS3.3 A.51)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from highdicom.color import CIELabColor
from numpy.typing import NDArray
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import SegmentationStorage
from pydicom.valuerep import format_number_as_ds

from dicom_io.header import FramePlane
from dicom_io.objects import codes
from dicom_io.objects.codes import Concept
from dicom_io.objects.common import (
    Algorithm,
    Device,
    ImageReference,
    Place,
    begin,
    code_item,
    declare_private_scheme,
    fit,
    item,
    keep_lossy,
    references,
    source_item,
)

Outlines = Sequence[Sequence[tuple[float, float]]]

_FINER = 4  # subdivisions of a pixel, in either direction, that its coverage is measured in
_BITS = 4  # of a coordinate's fraction
# Told apart on grey by everybody, also without seeing red and green as two colours (Okabe and Ito).
_COLORS = ((230, 159, 0), (86, 180, 233), (240, 228, 66), (204, 121, 167), (0, 158, 115), (213, 94, 0))


@dataclass(frozen=True, slots=True)
class Marked:
    """One slice on which a segment is seen; the outlines are closed polygons of (column, row), pixel centres at
    integers."""

    image: ImageReference
    plane: FramePlane
    outlines: tuple[tuple[tuple[float, float], ...], ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """One thing that is seen.

    Attributes:
        uid: the unique tracking identifier.
        slices: from one end of the volume to the other, not empty, each with at least one outline.
    """

    uid: str
    concept: Concept
    description: str
    slices: tuple[Marked, ...]


def filled(
    outlines: Outlines, shape: tuple[int, int], spacing_mm: tuple[float, float], rim_mm: float
) -> NDArray[np.bool_]:
    """The pixels of which at least half lies within an outline or no farther than `rim_mm` outside it.

    Where there is no such pixel at all, those that are covered most: what was found is never lost in a coarse grid.

    Args:
        shape: (rows, columns).
        spacing_mm: between rows, between columns.

    Returns: (rows, columns).
    """
    fine = np.zeros((shape[0] * _FINER, shape[1] * _FINER), np.uint8)
    # A line this wide reaches the rim on either side; the polygon itself is drawn with its edge.
    width = max(1, round(2 * rim_mm * _FINER / math.sqrt(spacing_mm[0] * spacing_mm[1])))
    for outline in outlines:
        points = (np.asarray(outline, dtype=np.float64) + 0.5) * _FINER - 0.5
        fixed = np.rint(points * 2**_BITS).astype(np.int32)[:, None, :]
        cv2.fillPoly(fine, [fixed], 255, cv2.LINE_8, _BITS)
        cv2.polylines(fine, [fixed], True, 255, width, cv2.LINE_8, _BITS)
    covered = cv2.resize(fine, (shape[1], shape[0]), interpolation=cv2.INTER_AREA)
    return np.asarray(covered >= max(1, min(128, int(covered.max()))))


def build_segmentation(
    segments: Sequence[Segment],
    source: Dataset,
    shape: tuple[int, int],
    *,
    rim_mm: float,
    algorithm: Algorithm,
    organization_uid: str,
    device: Device,
    place: Place,
) -> Dataset:
    """A binary Segmentation with one frame for each slice of each segment; slices without a mark have none.

    Every frame has position, orientation and spacing of its source image, so that nothing is resampled and a tilted
    gantry stays tilted. The bits are packed and not compressed: no compression that archives know takes single bits
    (RLE, PS3.5 Annex G, works on whole bytes).

    Args:
        source: header of an image of the series that all slices are of.
        shape: (rows, columns) of those images.
        rim_mm: how far a segment reaches beyond its outlines, see `filled`.
        organization_uid: names the way in which the frames are indexed (PS3.3 C.7.6.17).

    Returns: a data set with file meta, ready to be written; the same for the same arguments.
    Raises: ValueError if there is no segment, or one without slices.
    """
    if not segments or not all(segment.slices for segment in segments):
        raise ValueError("a segmentation needs segments, and each of them slices")
    made = begin(SegmentationStorage, "SEG", source, device, place)
    made.DeviceSerialNumber = made.get("DeviceSerialNumber") or device.uid  # type 1 here (C.7.5.2)
    made.ImageType = ["DERIVED", "PRIMARY"]
    made.ContentLabel = "AI_SEGMENTATION"
    made.ContentDescription = fit(made, f"{algorithm.name} {algorithm.version}, unverified", 64)
    made.ContentCreatorName = ""
    made.SegmentationType = "BINARY"
    made.SegmentsOverlap = "NO"
    if source.get("FrameOfReferenceUID"):
        made.FrameOfReferenceUID = source.FrameOfReferenceUID
        made.PositionReferenceIndicator = ""
    keep_lossy(source, made)
    declare_private_scheme(made)

    made.SamplesPerPixel = 1
    made.PhotometricInterpretation = "MONOCHROME2"
    made.Rows, made.Columns = shape
    made.BitsAllocated = made.BitsStored = 1
    made.HighBit = made.PixelRepresentation = 0

    made.SegmentSequence = DicomSequence(
        [_segment(made, number, segment, algorithm) for number, segment in enumerate(segments, start=1)]
    )
    marked = [(number, one) for number, segment in enumerate(segments, start=1) for one in segment.slices]
    made.NumberOfFrames = len(marked)
    series = Dataset()
    series.SeriesInstanceUID = source.SeriesInstanceUID
    series.ReferencedInstanceSequence = references(one.image for _, one in marked)
    made.ReferencedSeriesSequence = DicomSequence([series])

    made.DimensionOrganizationSequence = DicomSequence([item(DimensionOrganizationUID=organization_uid)])
    made.DimensionIndexSequence = DicomSequence(
        [
            _dimension(organization_uid, "ReferencedSegmentNumber", "SegmentIdentificationSequence"),
            _dimension(organization_uid, "ImagePositionPatient", "PlanePositionSequence"),
        ]
    )
    places = {one.plane.position: None for _, one in marked}
    normal = np.cross(marked[0][1].plane.orientation[:3], marked[0][1].plane.orientation[3:])
    ranks = {position: rank for rank, position in enumerate(sorted(places, key=lambda p: float(np.dot(p, normal))), 1)}
    made.PerFrameFunctionalGroupsSequence = DicomSequence(
        [_frame(number, one, ranks[one.plane.position]) for number, one in marked]
    )
    shared = Dataset()
    alike = len({(one.plane.orientation, one.plane.spacing, one.plane.thickness) for _, one in marked}) == 1
    groups = [shared] if alike else made.PerFrameFunctionalGroupsSequence
    for group, (_, one) in zip(groups, marked, strict=False):
        group.PlaneOrientationSequence = DicomSequence([item(ImageOrientationPatient=_ds(one.plane.orientation))])
        group.PixelMeasuresSequence = DicomSequence([_measures(one.plane)])
    made.SharedFunctionalGroupsSequence = DicomSequence([shared])
    made.PixelData = _packed([one for _, one in marked], shape, rim_mm)
    made["PixelData"].VR = "OB"
    return made


def _segment(made: Dataset, number: int, segment: Segment, algorithm: Algorithm) -> Dataset:
    concept = segment.concept
    return item(
        SegmentNumber=number,
        SegmentLabel=fit(made, concept.meaning, 64),
        SegmentDescription=fit(made, segment.description, 1024),
        SegmentAlgorithmType="AUTOMATIC",
        SegmentAlgorithmName=fit(made, algorithm.name, 64),
        SegmentationAlgorithmIdentificationSequence=DicomSequence(
            [
                item(
                    AlgorithmFamilyCodeSequence=DicomSequence([code_item(codes.ARTIFICIAL_INTELLIGENCE)]),
                    AlgorithmName=fit(made, algorithm.name, 64),
                    AlgorithmVersion=fit(made, algorithm.version, 64),
                    AlgorithmSource=fit(made, algorithm.manufacturer, 64),
                    AlgorithmParameters=fit(made, ", ".join(algorithm.parameters), 10240),
                )
            ]
        ),
        SegmentedPropertyCategoryCodeSequence=DicomSequence([code_item(codes.MORPHOLOGICALLY_ABNORMAL)]),
        SegmentedPropertyTypeCodeSequence=DicomSequence([code_item(concept)]),
        RecommendedDisplayCIELabValue=list(CIELabColor.from_rgb(*_COLORS[(number - 1) % len(_COLORS)]).value),
        TrackingID=fit(made, concept.meaning, 64),
        TrackingUID=segment.uid,
    )


def _frame(number: int, marked: Marked, rank: int) -> Dataset:
    source = source_item(marked.image)
    source.SpatialLocationsPreserved = "YES"
    derivation = item(
        DerivationCodeSequence=DicomSequence([code_item(codes.SEGMENTATION)]),
        SourceImageSequence=DicomSequence([source]),
    )
    return item(
        FrameContentSequence=DicomSequence([item(DimensionIndexValues=[number, rank])]),
        PlanePositionSequence=DicomSequence([item(ImagePositionPatient=_ds(marked.plane.position))]),
        DerivationImageSequence=DicomSequence([derivation]),
        SegmentIdentificationSequence=DicomSequence([item(ReferencedSegmentNumber=number)]),
    )


def _measures(plane: FramePlane) -> Dataset:
    made = item(PixelSpacing=_ds(plane.spacing))
    if plane.thickness is not None:
        made.SliceThickness = _ds([plane.thickness])[0]
    return made


def _dimension(organization_uid: str, pointer: str, group: str) -> Dataset:
    return item(
        DimensionOrganizationUID=organization_uid,
        DimensionIndexPointer=tag_for_keyword(pointer),
        FunctionalGroupPointer=tag_for_keyword(group),
        DimensionDescriptionLabel=pointer,
    )


def _packed(marked: Sequence[Marked], shape: tuple[int, int], rim_mm: float) -> bytes:
    """One bit a pixel, the first in the lowest, without a gap between frames (PS3.5 8.1.1, 8.2)."""
    masks: dict[Outlines, NDArray[np.bool_]] = {}
    for one in marked:  # the slices of a slab have the same outlines
        if one.outlines not in masks:
            masks[one.outlines] = filled(one.outlines, shape, one.plane.spacing, rim_mm).ravel()
    frames = [masks[one.outlines] for one in marked]
    # Eight frames end at a whole byte, whatever their size.
    parts = [np.packbits(np.concatenate(frames[i : i + 8]), bitorder="little") for i in range(0, len(frames), 8)]
    data = b"".join(part.tobytes() for part in parts)
    return data + b"\0" * (len(data) % 2)


def _ds(values: Iterable[float]) -> list[str]:
    """Decimal Strings of at most 16 characters (PS3.5 6.2)."""
    return [format_number_as_ds(float(value)) for value in values]
