from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from appliance.findings import wording
from appliance.findings.render import (
    Revision,
    key_png,
    object_uid,
    objects_for,
    package_device,
    series_uid,
    slices_of,
)
from appliance.inference.slabs import plan_slabs
from appliance.ledger.records import SlabResult
from dicom_io.header import FramePlane
from dicom_io.objects.common import part10
from dicom_io.objects.uids import derived_uid
from dicom_io.volume import Plane, assemble
from tests.builders import AXIAL
from tests.findings_support import ISSUED, Series, ct_series, renamed, rendered, verdict_on


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Series:
    return ct_series(tmp_path_factory.mktemp("series"))


@pytest.fixture
def zone() -> Iterator[None]:
    before = os.environ.get("TZ")
    os.environ["TZ"] = "America/New_York"
    time.tzset()
    yield
    os.environ.pop("TZ") if before is None else os.environ.update(TZ=before)
    time.tzset()


def test_a_positive_verdict_has_every_object_and_a_negative_one_report_and_summary(series: Series) -> None:
    assert objects_for(verdict_on(series)) == (
        *("report", "capture.summary", "capture.1", "capture.2"),
        *("segmentation", "presentation.1", "presentation.2", "selection", "report.2d"),
    )
    assert objects_for(verdict_on(series, positive=False)) == ("report", "capture.summary", "report.2d")


def test_where_nothing_is_outlined_there_is_no_segmentation(series: Series) -> None:
    verdict = verdict_on(series)
    bare = renamed(verdict, slabs=tuple(replace(slab, outlines=()) for slab in verdict.slabs))
    assert "segmentation" not in objects_for(bare)
    assert set(objects_for(verdict)) - set(objects_for(bare)) == {"segmentation"}


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(
        st.tuples(st.lists(st.sampled_from([0.6, 1.25, 2.5, 5.0, 7.0]), min_size=1, max_size=40), st.just(1.0)),
        st.tuples(
            st.builds(lambda step, count: [step] * count, st.sampled_from([0.6, 1.25, 2.0, 5.0]), st.integers(1, 60)),
            st.sampled_from([0.7, 1.0, 1.6]),
        ),
    ),
    st.integers(0, 39),
    st.booleans(),
)
def test_a_slabs_slices_are_those_that_it_was_averaged_from(
    series: tuple[list[float], float], gap: int, down: bool
) -> None:
    steps, overlap = series  # thickness as a part of the step; slices of several thicknesses adjoin
    heights = [sum(steps[:n]) + sum(steps[: n + 1]) for n in range(len(steps))]  # twice each centre
    planes = [
        Plane(
            f"1.2.{n}",
            0,
            FramePlane((0.0, 0.0, h / 2 + (30.0 if n > gap else 0.0)), AXIAL, (0.5, 0.5), step * overlap),
            -n if down else n,
        )
        for n, (h, step) in enumerate(zip(heights, steps, strict=True))
    ]
    volume = assemble(planes)
    plans = plan_slabs(volume, 5.0)
    verdict = renamed(
        verdict_on(Series({}, "1.2", "1.3")),
        slabs=tuple(SlabResult(p.index, p.offset_mm, p.thickness_mm, "", 0, {"any": 0.9}, (), 0.0) for p in plans),
    )
    assert slices_of(verdict, volume) == [[volume.planes[m] for m in plan.members] for plan in plans]


@pytest.mark.parametrize(
    "name", ["report", "capture.summary", "capture.2", "segmentation", "presentation.1", "selection"]
)
def test_rendering_twice_gives_the_same_bytes(name: str, series: Series) -> None:
    verdict = verdict_on(series)
    first = part10(rendered(series, verdict, name))
    time.sleep(0.01)
    assert part10(rendered(series, verdict, name)) == first


def test_each_object_is_its_own_instance_and_each_revision_another(series: Series) -> None:
    verdict = verdict_on(series)
    made = [rendered(series, verdict, name, revision=revision) for name in objects_for(verdict) for revision in (1, 2)]
    assert len({ds.SOPInstanceUID for ds in made}) == 18
    assert len({ds.SeriesInstanceUID for ds in made}) == 10  # the kinds of objects, of either revision
    assert len({ds.SeriesNumber for ds in made}) == 10
    assert {ds.StudyInstanceUID for ds in made} == {series.study_uid}
    assert all("revision 2" in ds.SeriesDescription for ds in made[1::2])


def test_the_instance_uid_is_the_one_that_the_ledger_can_compute(series: Series) -> None:
    verdict = verdict_on(series)
    made = rendered(series, verdict, "capture.2", uid_root="1.2.826.0.1.3680043.8.498", revision=3)
    issued = Revision(verdict, 3, ISSUED)
    assert made.SOPInstanceUID == object_uid("1.2.826.0.1.3680043.8.498", issued, "capture.2")
    assert made.InstanceNumber == 3  # the summary is the first
    assert rendered(series, verdict, "capture.summary").InstanceNumber == 1


def _uids(dataset: Dataset) -> set[str]:
    """All UIDs in a data set that the box gave; those of the images are of another root."""
    elements = (element for element in dataset.iterall() if element.VR == "UI")
    return {str(element.value) for element in elements if str(element.value).startswith("2.25.")}


@pytest.mark.parametrize("name", ["report", "capture.1", "segmentation", "presentation.1", "selection"])
def test_what_two_boxes_say_of_one_study_are_two_objects(name: str, series: Series) -> None:
    """Or what one says whose ledger was lost and counts anew: an archive keeps the first object of a UID for good."""
    verdict = verdict_on(series)
    device = package_device(verdict, uid_root="2.25", station="CT", manufacturer="scanside")
    one, other = (
        _uids(rendered(series, verdict, name, device=device, issued_at=ISSUED + timedelta(microseconds=late)))
        for late in (0, 1)
    )
    assert one and one & other <= {device.uid}


def test_what_an_earlier_release_named_keeps_its_names(series: Series) -> None:
    """Its objects that were not made yet, and its reports that later ones follow."""
    verdict = verdict_on(series)
    key = (series.study_uid, "ich_reference", "0.1.0", "2")
    old = derived_uid("2.25", "instance", *key, "report")
    made = rendered(series, verdict, "report", revision=2, sop_instance_uid=old)
    assert (made.SOPInstanceUID, made.SeriesInstanceUID) == (old, derived_uid("2.25", "series", *key, "report"))
    assert made.SeriesInstanceUID == series_uid("2.25", Revision(verdict, 2, ISSUED), "report", old)


@pytest.mark.parametrize(
    "name", ["capture.3", "capture.0", "capture.01", "capture", "presentation.3", "segmentation.1", ""]
)
def test_an_object_that_the_verdict_has_not_is_refused(name: str, series: Series) -> None:
    with pytest.raises(ValueError, match="no object of this verdict"):
        rendered(series, verdict_on(series), name)


def test_key_png_is_the_first_capture(series: Series, tmp_path: Path) -> None:
    verdict = verdict_on(series)
    data = key_png(verdict, series.hu)
    assert data.startswith(b"\x89PNG") and data == key_png(verdict, series.hu, 1)
    assert data != key_png(verdict, series.hu, 2)
    with pytest.raises(ValueError, match="key slab 3 of 2"):
        key_png(verdict, series.hu, 3)
    with pytest.raises(ValueError, match="key slab 1 of 0"):
        key_png(verdict_on(series, positive=False), series.hu)


def test_times_are_local_to_the_machine(series: Series, zone: None) -> None:
    made = rendered(series, verdict_on(series), "report")
    assert (made.ContentDate, made.ContentTime) == ("20260304", "000607.891011")  # UTC-5
    assert "TimezoneOffsetFromUTC" not in made


def test_times_follow_the_offset_of_the_source(tmp_path: Path, zone: None) -> None:
    series = ct_series(tmp_path, change=lambda ds: setattr(ds, "TimezoneOffsetFromUTC", "-0930"), count=3)
    made = rendered(series, verdict_on(series), "capture.1")
    assert (made.ContentDate, made.ContentTime) == ("20260303", "193607.891011")
    assert made.SeriesDate == made.ContentDate and made.TimezoneOffsetFromUTC == "-0930"


def test_the_source_is_not_changed(series: Series) -> None:
    before = [path.read_bytes() for path in series.files.values()]
    for name in objects_for(verdict_on(series)):
        rendered(series, verdict_on(series), name)
    assert [path.read_bytes() for path in series.files.values()] == before


def test_a_report_refers_to_images_by_the_class_they_were_received_as(series: Series) -> None:
    made = rendered(series, verdict_on(series), "report", analysed=series.uids[:3])
    [study] = made.CurrentRequestedProcedureEvidenceSequence
    items = study.ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert [item.ReferencedSOPInstanceUID for item in items] == series.uids[:3]
    classes = {str(pydicom.dcmread(path, specific_tags=["SOPClassUID"]).SOPClassUID) for path in series.files.values()}
    assert {item.ReferencedSOPClassUID for item in items} == classes


def test_a_subtype_is_named_only_when_it_is_likely(series: Series) -> None:
    verdict = verdict_on(series)
    assert wording.likely_subtypes(verdict.subtypes) == ("subdural", "subarachnoid")
    assert "subdural, subarachnoid" in wording.impression(verdict)
    unsure = renamed(verdict, subtypes=dict.fromkeys(verdict.subtypes, 0.49))
    assert "type open" in wording.impression(unsure)
    assert wording.likely_subtypes({"any": 0.9, "subdural": 0.5}) == ("subdural",)


def test_every_picture_carries_package_version_probability_volume_and_notice(series: Series) -> None:
    verdict = verdict_on(series)
    shown = " ".join(wording.banner(verdict, verdict.slabs[1]))
    for part in ("ich_reference", "0.1.0", "0.93", "0.80", "12.3 mL", "subdural", verdict.notice, "unverified"):
        assert part in shown
