from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest

from appliance.findings import wording
from appliance.findings.render import key_png, object_uid, objects_for
from dicom_io.objects.common import part10
from tests.findings_support import Series, ct_series, renamed, rendered, verdict_on


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


def test_a_positive_verdict_has_a_report_and_a_capture_for_each_key_slab(series: Series) -> None:
    assert objects_for(verdict_on(series)) == ("report", "capture.1", "capture.2")
    assert objects_for(verdict_on(series, positive=False)) == ("report",)


@pytest.mark.parametrize("name", ["report", "capture.1", "capture.2"])
def test_rendering_twice_gives_the_same_bytes(name: str, series: Series) -> None:
    verdict = verdict_on(series)
    first = part10(rendered(series, verdict, name))
    time.sleep(0.01)
    assert part10(rendered(series, verdict, name)) == first


def test_each_object_is_its_own_instance_and_each_revision_another(series: Series) -> None:
    verdict = verdict_on(series)
    made = [rendered(series, verdict, name, revision=revision) for name in objects_for(verdict) for revision in (1, 2)]
    assert len({ds.SOPInstanceUID for ds in made}) == 6
    assert len({ds.SeriesInstanceUID for ds in made}) == 4  # reports and captures, of either revision
    assert len({ds.SeriesNumber for ds in made}) == 4
    assert {ds.StudyInstanceUID for ds in made} == {series.study_uid}
    assert all("revision 2" in ds.SeriesDescription for ds in made[1::2])


def test_the_instance_uid_is_the_one_that_the_ledger_can_compute(series: Series) -> None:
    verdict = verdict_on(series)
    made = rendered(series, verdict, "capture.2", uid_root="1.2.826.0.1.3680043.8.498", revision=3)
    assert made.SOPInstanceUID == object_uid(
        "1.2.826.0.1.3680043.8.498", series.study_uid, "ich_reference", "0.1.0", 3, "capture.2"
    )
    assert made.InstanceNumber == 2


@pytest.mark.parametrize("name", ["capture.3", "capture.0", "capture.01", "capture", "segmentation", ""])
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
    made = rendered(series, verdict_on(series), "report", analysed=series.uids[:2])
    [study] = made.CurrentRequestedProcedureEvidenceSequence
    items = study.ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert [item.ReferencedSOPInstanceUID for item in items] == series.uids[:2]
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
