"""The gate refuses what a label excludes, and what nobody knows."""

from __future__ import annotations

from dataclasses import replace
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.governance.indication import CRITERIA, admit, admit_pixels, age_in_years, body_region
from appliance.governance.package import Package, load_configured
from appliance.settings import IndicationException, Settings
from dicom_io.header import Header
from dicom_io.volume import assemble, planes_of
from tests.builders import CT, SECONDARY_CAPTURE, head_series, header

PACKAGE: Package = load_configured(Settings())[0]
DAY = date(2026, 6, 1)


def decide(
    first: Header, series: list[Header] | None = None, *, exceptions: tuple[IndicationException, ...] = ()
) -> dict[str, str]:
    """The gate's outcome by criterion, on a series or on a good one whose first slice is that."""
    members = series or [first, *head_series()[1:]]
    volume = assemble([plane for one in members for plane in planes_of(one)])
    admission = admit(PACKAGE, members, volume, len(volume.planes), exceptions, DAY)
    assert admission.admitted == all(c.outcome in ("met", "excepted") for c in admission.criteria)
    assert bool(admission.reason) != admission.admitted
    return {criterion.criterion: criterion.outcome for criterion in admission.criteria}


def test_an_adults_plain_head_is_admitted() -> None:
    outcomes = decide(header())
    assert set(outcomes.values()) == {"met"}
    assert (*outcomes, "brain") == CRITERIA


@pytest.mark.parametrize(
    ("criterion", "changes", "outcome"),
    [
        ("modality", {"modality": "MR"}, "violated"),
        ("modality", {"modality": ""}, "unknown"),
        ("sop_class", {"sop_class_uid": SECONDARY_CAPTURE}, "violated"),
        ("age", {"patient_age": "009Y", "patient_birth_date": "20170101"}, "violated"),
        ("age", {"patient_age": "017Y", "patient_birth_date": ""}, "violated"),
        ("age", {"patient_age": "018Y", "patient_birth_date": ""}, "met"),
        ("age", {"patient_age": "", "patient_birth_date": ""}, "unknown"),
        ("age", {"patient_age": "65", "patient_birth_date": ""}, "unknown"),
        ("age", {"patient_age": "065Y", "patient_birth_date": "20170101"}, "unknown"),
        ("patient", {"patient": "somebody else"}, "violated"),
        ("kvp", {"kvp": 70.0}, "violated"),
        ("kvp", {"kvp": 150.0}, "violated"),
        ("kvp", {"kvp": None}, "unknown"),
        ("contrast", {"contrast_bolus_agent": "OMNIPAQUE 350"}, "violated"),
        ("contrast", {"contrast_bolus_agent": "NONE"}, "met"),
        ("body_part", {"series_description": "CTA CAROTIDS"}, "violated"),
        ("body_part", {"body_part_examined": "", "study_description": "", "series_description": ""}, "unknown"),
        ("body_part", {"body_part_examined": "", "series_description": "", "study_description": "CT Schädel"}, "met"),
    ],
)  # fmt: skip
def test_each_criterion_of_the_label(criterion: str, changes: dict[str, object], outcome: str) -> None:
    found = decide(replace(header(), **changes))  # type: ignore[arg-type]
    assert found[criterion] == outcome
    assert {name for name, value in found.items() if value != "met"} == (set() if outcome == "met" else {criterion})


@pytest.mark.parametrize(
    ("criterion", "series", "outcome"),
    [
        ("slice_thickness", head_series(30, thickness=12.0), "violated"),
        ("slice_thickness", head_series(30, thickness=None), "unknown"),
        ("coverage", head_series(60, step=1.0, thickness=1.0), "violated"),
        ("slabs", head_series(9, step=10.0, thickness=10.0), "violated"),
        ("gaps", [one for one in head_series(30) if one.instance_number != 15], "violated"),
    ],
)
def test_the_geometry_of_the_label(criterion: str, series: list[Header], outcome: str) -> None:
    assert decide(series[0], series)[criterion] == outcome


def test_a_slice_whose_place_is_unreadable_is_not_passed_over() -> None:
    assert decide(header(frames=()))["geometry"] == "unknown"


def test_only_the_unknown_can_be_excepted_and_only_until_its_day() -> None:
    def exception(until: date, package: str = "ich_reference") -> IndicationException:
        return IndicationException(package=package, criterion="age", reason="r", signed_by="board", until=until)

    nobody_knows = header(patient_age="", patient_birth_date="")
    assert decide(nobody_knows, exceptions=(exception(DAY),))["age"] == "excepted"
    assert decide(nobody_knows, exceptions=(exception(date(2026, 5, 31)),))["age"] == "unknown"
    assert decide(nobody_knows, exceptions=(exception(DAY, "another"),))["age"] == "unknown"
    child = header(patient_age="009Y", patient_birth_date="")
    assert decide(child, exceptions=(exception(DAY),))["age"] == "violated"


def test_a_head_without_a_brain_is_refused_late() -> None:
    volume = assemble([plane for one in head_series() for plane in planes_of(one)])
    admission = admit(PACKAGE, head_series(), volume, 30, (), DAY)
    assert admit_pixels(PACKAGE, admission, 1200.0).admitted
    hollow = admit_pixels(PACKAGE, admission, 20.0)
    assert not hollow.admitted
    assert "soft tissue" in hollow.reason


@given(
    age=st.sampled_from(["", "000D", "100D", "080W", "215M", "216M", "017Y", "018Y", "120Y", "x"]),
    born=st.sampled_from(["", "20260601", "20080601", "20080602", "19000101", "20991231", "zzz"]),
    studied=st.sampled_from(["", "20260601"]),
)
def test_nobody_under_age_or_of_unknown_age_is_admitted(age: str, born: str, studied: str) -> None:
    one = header(patient_age=age, patient_birth_date=born, study_date=studied)
    years = age_in_years(one)
    outcome = decide(one)["age"]
    assert outcome == ("unknown" if years is None else "met" if years >= 18 else "violated")
    if studied and born.isdecimal() and years is not None:
        assert abs(years - (date.fromisoformat(studied) - date.fromisoformat(born)).days / 365.25) < 1.2


@pytest.mark.parametrize(
    ("text", "region"),
    [
        ("HEAD W/O", "head"),
        ("Brain_5mm", "head"),
        ("HEAD AND NECK", "elsewhere"),
        ("C-SPINE", "elsewhere"),
        ("5MM", ""),
    ],
)
def test_what_people_write_into_descriptions(text: str, region: str) -> None:
    one = header(series_description=text, body_part_examined="", study_description="", protocol_name="")
    assert body_region(one) == region


def test_builders_use_the_class_of_the_label() -> None:
    assert CT in PACKAGE.indication.sop_classes
