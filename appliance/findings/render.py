"""A verdict as DICOM objects. Rendering twice gives the same bytes: a retry stores the same object."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from appliance.findings import wording
from appliance.ledger.records import Outline, SlabResult, Verdict
from dicom_io.header import FramePlane, Header, read_header
from dicom_io.objects import capture, codes
from dicom_io.objects.common import Algorithm, Device, ImageReference, Place
from dicom_io.objects.presentation import build_presentation
from dicom_io.objects.report import Drawn, Quantity, Report, ReportFinding, build_report
from dicom_io.objects.segmentation import Marked, Segment, build_segmentation
from dicom_io.objects.selection import build_selection
from dicom_io.objects.uids import derived_uid
from dicom_io.volume import Plane, Volume, assemble, planes_of

REPORT, CAPTURE, SEGMENTATION, PRESENTATION, SELECTION = KINDS = (
    "report",
    "capture",
    "segmentation",
    "presentation",
    "selection",
)
"""The kinds of objects, in order of urgency. Captures and presentations are numbered as the key slabs are."""
REPORT_2D = f"{REPORT}.2d"
"""The report as a Comprehensive SR, without coordinates in space, for who does not take Comprehensive 3D SR."""
SUMMARY = f"{CAPTURE}.summary"
"""The first picture of the captures, and the only one of a negative verdict."""
CLASSES = {
    REPORT: "Comprehensive3DSRStorage",
    REPORT_2D: "ComprehensiveSRStorage",
    CAPTURE: "SecondaryCaptureImageStorage",
    SEGMENTATION: "SegmentationStorage",
    PRESENTATION: "GrayscaleSoftcopyPresentationStateStorage",
    SELECTION: "KeyObjectSelectionDocumentStorage",
}
"""Object or kind of objects → keyword of its SOP class."""
_NUMBERED = re.compile(rf"({CAPTURE}|{PRESENTATION})\.([1-9][0-9]*)")
_TITLES = {
    REPORT: "report",
    CAPTURE: "key images",
    SEGMENTATION: "segmentation",
    PRESENTATION: "presentation",
    SELECTION: "key slices",
}
# Series numbers above those of scanners; each revision has its own series.
_SERIES_NUMBER = 9000
_DIGITS_OF_A_PROBABILITY = 4
_DIGITS_OF_A_VOLUME = 2
RIM_MM = 0.25
"""Outlines run through the centres of the outermost half-millimetre pixels of a region, which reach so much farther."""

Sources = Callable[[str], Path]
"""SOP Instance UID → the Part 10 file that was received."""
Hounsfield = Callable[[str, int], NDArray[np.float32]]
"""SOP Instance UID and 0-based frame → Hounsfield units, (rows, columns)."""


def objects_for(verdict: Verdict) -> tuple[str, ...]:
    """The names of the objects made from this verdict, in order of urgency; none of one that is soon superseded."""
    if verdict.provisional or verdict.withdrawn:
        return ()
    numbers = range(1, len(verdict.key_slabs) + 1)
    return (
        REPORT,
        SUMMARY,
        *(f"{CAPTURE}.{number}" for number in numbers),
        *((SEGMENTATION,) if any(slab.outlines for slab in verdict.slabs) else ()),
        *(f"{PRESENTATION}.{number}" for number in numbers),
        *((SELECTION,) if numbers else ()),
        REPORT_2D,  # mostly for nobody
    )


def kind_of(object_name: str) -> str:
    """The kind of an object of that name: "capture" of "capture.2"."""
    return object_name.split(".")[0]


def class_of(object_name: str) -> str:
    """The keyword of the SOP class of an object of that name."""
    return CLASSES.get(object_name) or CLASSES[kind_of(object_name)]


@dataclass(frozen=True, slots=True)
class Revision:
    """A verdict as it was issued: what identifies the objects made of it is derived from this.

    Attributes:
        number: 1 for the first verdict of an analysis.
        at: when it was issued (aware). It tells apart what two boxes say of one study, or one box whose ledger was lost
            or came back from a backup and counts its revisions anew: a receiver that has an object of that UID,
            whatever it says, takes no other (PS3.5 9).
    """

    verdict: Verdict
    number: int
    at: datetime

    def key(self) -> tuple[str, ...]:
        """What no other revision of any verdict has."""
        one = self.verdict
        issued_at = self.at.astimezone(UTC).isoformat(timespec="microseconds")
        return one.study_instance_uid, one.package, one.package_version, str(self.number), issued_at


def object_uid(uid_root: str, revision: Revision, object_name: str) -> str:
    """The SOP Instance UID that this object of this revision of the verdict always has."""
    return derived_uid(uid_root, "instance", *revision.key(), object_name)


def series_uid(uid_root: str, revision: Revision, object_name: str, sop_instance_uid: str) -> str:
    """The Series Instance UID of an object: one for each kind of objects of each revision.

    Args:
        sop_instance_uid: of the object. Where an earlier release named it, without the time, it named the series so.
    """
    key = revision.key()
    if sop_instance_uid != object_uid(uid_root, revision, object_name):
        key = key[:-1]
    return derived_uid(uid_root, "series", *key, kind_of(object_name))


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
        udi=verdict.udi,
    )


def render(
    object_name: str,
    revision: Revision,
    *,
    sop_instance_uid: str,
    sources: Sources,
    hu_of: Hounsfield,
    analysed: Sequence[str],
    uid_root: str,
    device: Device,
    predecessor: tuple[str, str] | None = None,
) -> Dataset:
    """One object of `objects_for(verdict)`, ready to be written or sent.

    Args:
        revision: objects carry the time of its issue in the source's time zone, or where the source names none, in
            this machine's.
        sop_instance_uid: what it is called.
        analysed: SOP Instance UIDs of the analysed images, in order.
        device: see `package_device`.
        predecessor: SOP Instance UID and Series Instance UID of the report, in the same class, that a report follows.

    Returns: a data set with file meta, Explicit VR Little Endian.
    Raises: ValueError for a name that is none of this verdict's, OSError or InvalidDicomError for a source that
        is gone or damaged, GeometryError for sources that are no volume any more.
    """
    verdict = revision.verdict
    if object_name not in objects_for(verdict):
        raise ValueError(f"{object_name!r} is no object of this verdict: {', '.join(objects_for(verdict))}")
    numbered = _NUMBERED.fullmatch(object_name)
    number = int(numbered[2]) if numbered else 1
    kind = kind_of(object_name)
    revised = f", revision {revision.number}" if revision.number > 1 else ""
    place = Place(
        sop_instance_uid,
        series_uid(uid_root, revision, object_name, sop_instance_uid),
        series_number=_SERIES_NUMBER + 10 * revision.number + 1 + KINDS.index(kind),
        # Of the captures the summary is the first.
        instance_number=number + (kind == CAPTURE and object_name != SUMMARY) + (object_name == REPORT_2D),
        series_description=f"{verdict.package} {_TITLES[kind]}{revised} (unverified)",
        created=revision.at.astimezone(),
    )
    algorithm = Algorithm(
        name=verdict.package,
        version=verdict.package_version,
        manufacturer=device.manufacturer,
        parameters=(f"threshold {verdict.threshold:g}", f"decoders {', '.join(verdict.codecs)}"),
    )
    if kind == REPORT:
        return build_report(
            _report(revision, sources, analysed, uid_root),
            _header(sources(analysed[0])),
            procedure=codes.CT_HEAD,
            algorithm=algorithm,
            predecessor=predecessor,
            device=device,
            place=place,
            in_space=object_name == REPORT,
        )
    if kind == SEGMENTATION:
        return _segmentation(revision, sources, analysed, uid_root, algorithm, device, place)
    if object_name == SUMMARY:
        slabs = [verdict.slabs[index] for index in verdict.key_slabs]
        header = _header(sources(slabs[0].sop_instance_uid if slabs else analysed[0]))
        return capture.build_capture(
            capture.summary(
                [capture.key_image(hu_of(one.sop_instance_uid, one.frame), one.outlines, ()) for one in slabs],
                wording.summary(verdict),
            ),
            header,
            [_reference(_header(sources(one.sop_instance_uid)), one.frame) for one in slabs],
            description=f"Summary of {wording.judged_by(verdict)}",
            comment=f"{wording.TRIAGE_ONLY} {verdict.notice}",
            device=device,
            place=place,
        )
    slab = verdict.slabs[verdict.key_slabs[number - 1]]
    path = sources(slab.sop_instance_uid)
    header = _header(path)
    image = _reference(header, slab.frame)
    if kind == SELECTION:
        slabs = [verdict.slabs[index] for index in verdict.key_slabs]
        return build_selection(
            [_reference(_header(sources(one.sop_instance_uid)), one.frame) for one in slabs],
            header,
            title=codes.OF_INTEREST,
            description=" ".join((wording.impression(verdict), wording.TRIAGE_ONLY, verdict.notice)),
            device=device,
            place=place,
        )
    if kind == PRESENTATION:
        return build_presentation(
            hu_of(slab.sop_instance_uid, slab.frame),
            slab.outlines,
            wording.label(verdict, slab),
            header,
            image,
            spacing_mm=read_header(path).frames[slab.frame].spacing,
            rescale=_rescale(header, slab.frame),
            label=f"Slab {slab.index + 1}: {wording.kinds(slab.probabilities)}",
            device=device,
            place=place,
        )
    return capture.build_capture(
        _picture(verdict, slab, hu_of),
        header,
        [image],
        description=f"Key slab {slab.index + 1}, window 40/80, outline by {wording.judged_by(verdict)}",
        comment=f"{wording.TRIAGE_ONLY} {verdict.notice}",
        device=device,
        place=place,
    )


def render_refusal(
    object_name: str,
    revision: Revision,
    source: Dataset,
    *,
    uid_root: str,
    device: Device,
    predecessor: tuple[str, str] | None = None,
) -> Dataset:
    """The report of a study that was not analysed, or its picture: that, and why.

    Args:
        object_name: REPORT, REPORT_2D or SUMMARY.
        revision: its verdict is withdrawn, of the reason, and has no slabs. Above 1 where there was one that does not
            stand any more.
        source: header of any image of the study.
        uid_root, device, predecessor: as for `render`.

    Returns: a data set with file meta, Explicit VR Little Endian.
    """
    verdict, kind = revision.verdict, kind_of(object_name)
    uid = object_uid(uid_root, revision, object_name)
    place = Place(
        uid,
        series_uid(uid_root, revision, object_name, uid),
        series_number=_SERIES_NUMBER + 10 * revision.number + 1 + KINDS.index(kind),
        instance_number=1 + (object_name == REPORT_2D),
        series_description=f"{verdict.package} {_TITLES[kind]} (not analysed)",
        created=revision.at.astimezone(),
    )
    said, limitations = wording.not_analysed(verdict), (verdict.withdrawn, *verdict.limitations)
    if kind == CAPTURE:
        lines = ("NOT ANALYSED", said, *verdict.limitations, wording.TRIAGE_ONLY, verdict.notice)
        return capture.build_capture(
            capture.summary([], lines),
            source,
            [],
            description=f"Not analysed by {verdict.package} {verdict.package_version}",
            comment=f"{wording.TRIAGE_ONLY} {verdict.notice}",
            device=device,
            place=place,
        )
    return build_report(
        Report(
            label="intracranial haemorrhage",
            uid=derived_uid(uid_root, "tracking", *revision.key(), "study"),
            finding=None,
            result=codes.NOT_ANALYSED,
            impression=said,
            quantities=(),
            findings=(),
            comments=(wording.TRIAGE_ONLY, verdict.notice),
            limitations=limitations,
            images=(),
            complete=False,
        ),
        source,
        procedure=codes.CT_HEAD,
        algorithm=Algorithm(verdict.package, verdict.package_version, device.manufacturer),
        predecessor=predecessor,
        device=device,
        place=place,
        in_space=object_name == REPORT,
    )


def slices_of(verdict: Verdict, volume: Volume) -> list[list[Plane]]:
    """The planes of the volume that each slab was averaged from, foot to head, in the order of the slabs.

    A verdict names its slabs' centres and extents; a plane is of the slab whose centre is nearest, measured in that
    slab's thickness. (Where slices of different thickness overlap, one at a border may be counted to the neighbour.)
    """
    planes: list[list[Plane]] = [[] for _ in verdict.slabs]
    for plane, offset in zip(volume.planes, volume.offsets, strict=True):
        nearest = min(
            range(len(planes)),
            key=lambda i: abs(offset - verdict.slabs[i].offset_mm) / max(verdict.slabs[i].thickness_mm, 1e-3),
        )
        planes[nearest].append(plane)
    return planes


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


def _concept(slab: SlabResult) -> codes.Concept:
    """What a slab's region is called: its likeliest subtype, or haemorrhage where none is likely.

    The lesion map knows no subtypes; only the slab's probabilities do.
    """
    likely = wording.likely_subtypes(slab.probabilities)
    return next((codes.SUBTYPES[one] for one in likely if one in codes.SUBTYPES), codes.INTRACRANIAL_HEMORRHAGE)


def _segmentation(
    revision: Revision,
    sources: Sources,
    analysed: Sequence[str],
    uid_root: str,
    algorithm: Algorithm,
    device: Device,
    place: Place,
) -> Dataset:
    paths = {uid: sources(uid) for uid in analysed}
    headers = {uid: read_header(path) for uid, path in paths.items()}
    volume = assemble([plane for header in headers.values() for plane in planes_of(header)])
    slices: dict[codes.Concept, list[Marked]] = {}
    verdict = revision.verdict
    for slab, planes in zip(verdict.slabs, slices_of(verdict, volume), strict=True):
        if slab.outlines:
            slices.setdefault(_concept(slab), []).extend(
                Marked(_image(headers[one.sop_instance_uid], one.frame), one.geometry, slab.outlines) for one in planes
            )
    first = headers[analysed[0]]
    return build_segmentation(
        [
            Segment(
                uid=derived_uid(uid_root, "tracking", *revision.key(), "segment", concept.value),
                concept=concept,
                description=(
                    f"{concept.meaning} suspected by {wording.judged_by(verdict)}. The lesion map does not tell types "
                    "apart: regions are named by the likeliest type of their slab, and marked on every slice that the "
                    f"slab was averaged from. {wording.TRIAGE_ONLY} {verdict.notice}"
                ),
                slices=tuple(marked),
            )
            for concept, marked in sorted(slices.items(), key=lambda one: (-len(one[1]), one[0].value))
        ],
        _header(paths[analysed[0]]),
        (first.rows, first.columns),
        rim_mm=RIM_MM,
        algorithm=algorithm,
        organization_uid=derived_uid(uid_root, "dimensions", place.sop_instance_uid),
        device=device,
        place=place,
    )


def _rescale(header: Dataset, frame: int) -> tuple[float, float]:
    """Slope and intercept of one frame (PS3.3 C.11.1, C.7.6.16.2.9 in functional groups)."""
    groups = [
        *header.get("PerFrameFunctionalGroupsSequence", [])[frame : frame + 1],
        *header.get("SharedFunctionalGroupsSequence", []),
    ]
    found = [
        group.PixelValueTransformationSequence[0] for group in groups if "PixelValueTransformationSequence" in group
    ]
    values = (found or [header])[0]
    return float(values.RescaleSlope), float(values.RescaleIntercept)


def _report(revision: Revision, sources: Sources, analysed: Sequence[str], uid_root: str) -> Report:
    verdict, tracking = revision.verdict, (uid_root, "tracking", *revision.key())
    paths = {uid: sources(uid) for uid in analysed}
    headers = {uid: read_header(path) for uid, path in paths.items()}
    findings = []
    for index in verdict.key_slabs:
        slab = verdict.slabs[index]
        image = _image(headers[slab.sop_instance_uid], slab.frame)
        shares = _volumes(slab)
        for number, outline in enumerate(slab.outlines or (None,), start=1):
            label = f"slab {slab.index + 1}" + (f" outline {number}" if outline else "")
            findings.append(
                ReportFinding(
                    label=f"{label}: {wording.kinds(slab.probabilities)}",
                    uid=derived_uid(*tracking, label),
                    concept=_concept(slab),
                    image=image,
                    quantities=(
                        _probability(codes.PROBABILITY, slab.probabilities["any"]),
                        *((_volume(shares[number - 1]),) if outline else ()),
                    ),
                    outline=outline,
                )
            )
    return Report(
        label="intracranial haemorrhage",
        uid=derived_uid(*tracking, "study"),
        finding=codes.INTRACRANIAL_HEMORRHAGE if verdict.positive else None,
        result=codes.SUSPECTED if verdict.positive else codes.NONE_FOUND,
        actionable=codes.ACTIONABLE_1 if verdict.positive else None,
        types=tuple(
            codes.SUBTYPES[label]
            for label in (wording.likely_subtypes(verdict.subtypes) if verdict.positive else ())
            if label in codes.SUBTYPES
        ),
        impression=wording.impression(verdict),
        quantities=(
            _probability(codes.PROBABILITY_ANY, verdict.probability),
            _probability(codes.THRESHOLD, verdict.threshold),
            *(
                _probability(codes.PROBABILITIES[label], verdict.subtypes[label])
                for label in codes.PROBABILITIES
                if label in verdict.subtypes
            ),
            _volume(verdict.volume_ml),
        ),
        findings=tuple(findings),
        comments=(wording.TRIAGE_ONLY, verdict.notice),
        limitations=verdict.limitations,
        images=tuple(ImageReference(header.sop_class_uid, uid) for uid, header in headers.items()),
        complete=not verdict.incomplete
        and not assemble([plane for header in headers.values() for plane in planes_of(header)]).gaps,
        outlines=tuple(
            Drawn(
                _image(headers[slab.sop_instance_uid], slab.frame),
                outline,
                _in_space(headers[slab.sop_instance_uid].frames[slab.frame], outline),
            )
            for slab in sorted(verdict.slabs, key=lambda one: one.index not in verdict.key_slabs[:1])
            for outline in slab.outlines
        ),
    )


def _volumes(slab: SlabResult) -> list[float]:
    """A slab's volume, in mL, shared out among its outlines by the area within each."""
    areas = []
    for outline in slab.outlines:
        x, y = np.array(outline).T
        areas.append(abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2 or 1e-9)
    return [slab.volume_ml * area / sum(areas) for area in areas]


def _in_space(plane: FramePlane, outline: Outline) -> tuple[tuple[float, float, float], ...]:
    """Points of an image in its frame of reference, mm (PS3.3 C.7.6.2.1.1)."""
    row, column = np.array(plane.orientation[:3]), np.array(plane.orientation[3:])
    points = np.array(outline)
    found = (
        np.array(plane.position) + points[:, :1] * plane.spacing[1] * row + points[:, 1:] * plane.spacing[0] * column
    )
    return tuple((float(x), float(y), float(z)) for x, y, z in found)


def _probability(name: codes.Concept, value: float) -> Quantity:
    return Quantity(name, round(value, _DIGITS_OF_A_PROBABILITY), codes.NO_UNITS)


def _volume(value: float) -> Quantity:
    return Quantity(codes.VOLUME, round(value, _DIGITS_OF_A_VOLUME), codes.MILLILITER)


def _header(path: Path) -> Dataset:
    return pydicom.dcmread(path, stop_before_pixels=True)


def _reference(header: Dataset, frame: int) -> ImageReference:
    multiframe = int(header.get("NumberOfFrames") or 1) > 1
    return ImageReference(str(header.SOPClassUID), str(header.SOPInstanceUID), frame + 1 if multiframe else None)


def _image(header: Header, frame: int) -> ImageReference:
    return ImageReference(
        header.sop_class_uid, header.sop_instance_uid, frame + 1 if header.number_of_frames > 1 else None
    )
