"""What the gate would say of the files in a folder: nothing is stored, no model is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from appliance.governance.indication import Admission, BoardException, admit, admit_pixels, pixels_unknown
from appliance.governance.package import Package
from appliance.inference.brain import Brain, brain_area_mm2
from appliance.inference.slabs import SlabPlan, plan_slabs, slab_hu
from appliance.study.grouping import Series, group
from appliance.study.selection import Selection, first_admitted, select, unselected
from dicom_io.errors import DecodeError, HeaderError, ScansideError
from dicom_io.header import Header, read_header
from dicom_io.pixels import decode
from dicom_io.volume import Volume


@dataclass(frozen=True, slots=True)
class Folder:
    """The studies of a folder.

    Attributes:
        studies: Study Instance UID → SOP Instance UID → (file, header); of one instance in two files the later counts.
        skipped: files that are no DICOM instance, each with the reason.
    """

    studies: dict[str, dict[str, tuple[Path, Header]]] = field(default_factory=dict)
    skipped: list[tuple[Path, str]] = field(default_factory=list)


def read_folder(files: Sequence[Path], on_read: Callable[[], object] = lambda: None) -> Folder:
    """Read the headers of files, which may belong to several studies.

    Args:
        on_read: called after each.
    """
    found = Folder()
    for path in files:
        try:
            header = read_header(path)
        except HeaderError as error:
            found.skipped.append((path, error.what))
        else:
            found.studies.setdefault(header.study_instance_uid, {})[header.sop_instance_uid] = path, header
        on_read()
    return found


def judge(
    packages: Sequence[Package],
    study: dict[str, tuple[Path, Header]],
    exceptions: Callable[[Package], Sequence[BoardException]] = lambda _: (),
    on_decoded: Callable[[], object] = lambda: None,
) -> list[tuple[Package, Admission]]:
    """The admission of one study by each package, as the engine would decide it, with what only the pixels show.

    The pixels are decoded only where everything else is met. Where they cannot be, the criterion is unknown; the engine
    would set such an analysis aside as failed.

    Args:
        study: as in `Folder`.
        exceptions: those of the board for a package.
        on_decoded: called after each slice.
    """
    series = group(header for _, header in study.values())
    found = []
    for package in packages:
        selection, admission = _selected(package, series, exceptions(package))
        if selection.volume is None:
            found.append((package, admission))
            continue
        if admission.admitted:
            plans = plan_slabs(selection.volume, package.preprocessing.slab_mm)
            try:
                brain = _brain_ml(package, selection.volume, plans, study, on_decoded)
            except ScansideError as error:
                admission = pixels_unknown(package, admission, f"not decoded: {error.what}")
            else:
                admission = admit_pixels(package, admission, brain.seen, brain.unseen)
        else:
            admission = pixels_unknown(package, admission, "not judged: it is refused without")
        found.append((package, admission))
    return found


def _selected(
    package: Package, series: Sequence[Series], exceptions: Sequence[BoardException]
) -> tuple[Selection, Admission]:
    """The series that would be read, and what is decided on it before its pixels are looked at."""
    study = [header for one in series for header in one.headers]

    def judged(selection: Selection) -> Admission:
        if selection.series is None or selection.volume is None:
            return unselected(package, series, selection)
        slabs = len(plan_slabs(selection.volume, package.preprocessing.slab_mm))
        return admit(package, selection.series.headers, selection.volume, slabs, exceptions, study=study)

    return first_admitted(lambda refused: select(series, refused=refused), judged)


def _brain_ml(
    package: Package,
    volume: Volume,
    plans: Sequence[SlabPlan],
    study: dict[str, tuple[Path, Header]],
    on_decoded: Callable[[], object],
) -> Brain:
    """Soft tissue within the skull of a whole volume, as the engine measures it on its slabs."""
    field_mm = package.preprocessing.size * package.preprocessing.spacing_mm
    seen = unseen = 0.0
    hu_of = lru_cache(maxsize=1)(lambda path: decode(path).hu)  # of many frames in one file, decoded once
    for plan in plans:
        planes = []
        for member in plan.members:
            plane = volume.planes[member]
            path = study[plane.sop_instance_uid][0]
            frames = hu_of(path)
            if plane.frame >= len(frames):
                said = f"the header speaks of frame {plane.frame + 1}, the pixel data holds {len(frames)}"
                raise DecodeError(said, str(path), "send the instance again")
            planes.append(frames[plane.frame])
            on_decoded()
        middle = volume.planes[plan.members[len(plan.members) // 2]].geometry
        area = brain_area_mm2(slab_hu(planes, "slab"), middle.spacing, field_mm)
        seen += area.seen * plan.thickness_mm / 1000
        unseen += area.unseen * plan.thickness_mm / 1000
    return Brain(seen, unseen)
