"""The gate refuses what a label excludes, and what nobody knows."""

from __future__ import annotations

import json
import time
import tomllib
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from pydicom.sr._snomed_dict import mapping

from appliance.governance.indication import (
    BOX,
    CRITERIA,
    HEAD_CODES,
    UNSEEN_ML,
    Admission,
    BoardException,
    Criterion,
    acquired_after,
    admit,
    admit_pixels,
    age_said,
    body_region,
    contrast_said,
    first_with_agent,
    rules,
)
from appliance.governance.label import RULES, Age, Indication, kernel_matches, maker, narrowed, scanner_matches
from appliance.governance.package import Package, load_configured
from appliance.settings import Settings, SettingsError
from dicom_io.header import FramePlane, Header
from dicom_io.volume import assemble, planes_of
from tests.builders import CT, SECONDARY_CAPTURE, head_series, header, plane

PACKAGE: Package = load_configured(Settings())[0]
DAY = date(2026, 6, 1)
LABELS = Path(__file__).parent / "labels"


def label(name: str) -> Package:
    """The shipped package under another label."""
    stated = tomllib.loads((LABELS / f"{name}.toml").read_text("utf-8"))["indication"]
    return replace(PACKAGE, indication=TypeAdapter(Indication).validate_json(json.dumps(stated)))


def with_rules(**keys: Any) -> Package:
    """The shipped package, whose label has these keys too."""
    clauses = dict(PACKAGE.indication.clauses)
    clauses.update({name: "§" for name, of in RULES.items() if set(of) & set(keys)})
    return replace(PACKAGE, indication=replace(PACKAGE.indication, clauses=clauses, **keys))


def admission(
    series: list[Header], package: Package = PACKAGE, exceptions: tuple[BoardException, ...] = ()
) -> Admission:
    volume = assemble([one for member in series for one in planes_of(member)])
    found = admit(package, series, volume, len(volume.planes), exceptions, DAY)
    assert found.admitted == all(c.outcome in ("met", "excepted") for c in found.criteria)
    assert bool(found.reason) != found.admitted
    return found


def decide(
    first: Header, series: list[Header] | None = None, package: Package = PACKAGE,
    *, exceptions: tuple[BoardException, ...] = (),
) -> dict[str, str]:  # fmt: skip
    """The gate's outcome by criterion, on a series or on a good one whose first slice is that."""
    criteria = admission(series or [first, *head_series()[1:]], package, exceptions).criteria
    return {criterion.criterion: criterion.outcome for criterion in criteria}


def test_an_adults_plain_head_is_admitted() -> None:
    found = admission(head_series())
    assert {c.outcome for c in found.criteria} == {"met"}
    assert [c.criterion for c in found.criteria] == [name for name in CRITERIA if name in rules(PACKAGE)][:-1]


@pytest.mark.parametrize(
    ("others", "outcome"),
    [
        ([], "met"),
        ([{"patient_id": "ANN"}], "met"),
        # A scout of whoever lay there before, or a dose screen under the name that the operator then found right.
        ([{"patient_id": "BOB"}], "violated"),
        ([{"patient_id": "BOB", "sop_class_uid": SECONDARY_CAPTURE}], "violated"),
        # An ID that is not there is not another one.
        ([{"patient_id": ""}], "met"),
        # A capture of ours that an archive sends on, after it merged two records.
        ([{"patient_id": "BOB", "modality": "OT", "sop_class_uid": SECONDARY_CAPTURE}], "met"),
    ],
)
def test_the_whole_study_is_of_one_patient(others: list[dict[str, Any]], outcome: str) -> None:
    series = head_series(patient_id="ANN")
    study = [*series, *(header(1, series="1.2.3.9", **changes) for changes in others)]
    volume = assemble([one for member in series for one in planes_of(member)])
    found = {c.criterion: c for c in admit(PACKAGE, series, volume, 30, (), DAY, study=study).criteria}
    assert found["patient"].outcome == outcome
    assert ("2 Patient IDs" in found["patient"].value) == (outcome == "violated")
    assert not any(name in found["patient"].value for name in ("ANN", "BOB"))


@pytest.mark.parametrize(
    ("head", "angio", "agent", "outcome"),
    [
        ("20260601141500", "20260601140500", "OMNIPAQUE", "unknown"),
        ("20260601140000", "20260601140500", "OMNIPAQUE", "met"),
        ("20260601141500", "20260601140500", "NONE", "met"),
        ("20260601141500", "", "OMNIPAQUE", "met"),
        ("", "20260601140500", "OMNIPAQUE", "met"),
    ],
)
def test_a_head_that_was_scanned_after_an_agent_was_given_is_not_known_to_be_without(
    head: str, angio: str, agent: str, outcome: str
) -> None:
    series = head_series(acquired=head)
    study = [*series, *head_series(5, series="1.2.3.9", acquired=angio, contrast_bolus_agent=agent)]
    volume = assemble([one for member in series for one in planes_of(member)])

    def contrast(package: Package) -> Criterion:
        criteria = admit(package, series, volume, 30, (), DAY, study=study).criteria
        return next(one for one in criteria if one.criterion == "contrast")

    found = contrast(PACKAGE)
    assert (found.outcome, "acquired after series 9" in found.value) == (outcome, outcome != "met")
    assert contrast(with_rules(contrast=True)).outcome == "met"


@pytest.mark.parametrize(
    ("head", "angio"), [("20261025025000", "20261025021500"), ("20261025031000", "20261025024000")]
)
def test_in_the_hour_that_clocks_show_twice_nobody_knows_what_came_after_an_agent(
    monkeypatch: pytest.MonkeyPatch, head: str, angio: str
) -> None:
    """25 October 2026 in Berlin: a plain head at 02:50 of summer, and at 02:15 of winter, 25 minutes later, vessels."""
    series = head_series(acquired=head)
    given = head_series(5, series="1.2.3.9", acquired=angio, contrast_bolus_agent="OMNIPAQUE")[0]
    assert acquired_after(series, first_with_agent([*series, given]))
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        assert not acquired_after(series, first_with_agent([*series, given]))
    finally:
        monkeypatch.undo()
        time.tzset()


def test_each_criterion_says_what_was_read_what_is_asked_and_where_the_label_says_so() -> None:
    found = {c.criterion: c.row() for c in admission(head_series()).criteria}
    assert found["kvp"] == {
        "criterion": "kvp", "attribute": "KVP", "value": "120 kV", "rule": "80 to 140 kV",
        "clause": PACKAGE.indication.clauses["kvp"], "met": True,
    }  # fmt: skip
    assert found["gaps"]["clause"] == BOX
    assert all(row["clause"] and row["rule"] and row["attribute"] and row["value"] for row in found.values())
    child = admission([header(patient_age="009Y", patient_birth_date="")])
    (age,) = [c for c in child.criteria if c.criterion == "age"]
    assert (age.value, age.rule, age.met) == ("009Y", "18 years or older", False)
    assert "age: PatientAge, PatientBirthDate, StudyDate is 009Y, the label asks for 18 years or older" in child.reason


@pytest.mark.parametrize(
    ("criterion", "changes", "outcome"),
    [
        ("modality", {"modality": "MR"}, "violated"),
        ("modality", {"modality": ""}, "unknown"),
        ("sop_class", {"sop_class_uid": SECONDARY_CAPTURE}, "violated"),
        ("age", {"patient_age": "009Y", "patient_birth_date": "20170101"}, "violated"),
        ("age", {"patient_age": "017Y", "patient_birth_date": ""}, "violated"),
        ("age", {"patient_age": "018Y", "patient_birth_date": ""}, "met"),
        ("age", {"patient_age": "215M", "patient_birth_date": ""}, "violated"),
        ("age", {"patient_age": "216M", "patient_birth_date": ""}, "met"),
        ("age", {"patient_age": "939W", "patient_birth_date": ""}, "unknown"),
        ("age", {"patient_age": "940W", "patient_birth_date": ""}, "met"),
        ("age", {"patient_age": "000Y", "patient_birth_date": "19610101"}, "violated"),
        ("age", {"patient_age": "", "patient_birth_date": ""}, "unknown"),
        ("age", {"patient_age": "65", "patient_birth_date": ""}, "unknown"),
        ("age", {"patient_age": "065Y", "patient_birth_date": "20170101"}, "violated"),
        ("age", {"patient_age": "065Y", "patient_birth_date": "19900101"}, "unknown"),
        ("age", {"patient_age": "065Y", "patient_birth_date": "20270101"}, "unknown"),
        ("age", {"patient_age": "065Y", "patient_birth_date": "19620301"}, "met"),
        ("age", {"patient_age": "065Y", "patient_birth_date": "19620901"}, "unknown"),
        ("age", {"patient_age": "065Y", "patient_birth_date": "19590401"}, "unknown"),
        ("age", {"patient_age": "065Y", "patient_birth_date": "19591001"}, "met"),
        ("age", {"patient_age": "065Y", "patient_birth_date": "19590507"}, "met"),
        ("age", {"patient_age": "", "patient_birth_date": "20080602"}, "violated"),
        ("age", {"patient_age": "", "patient_birth_date": "20080601"}, "met"),
        ("age", {"patient_age": "018Y", "patient_birth_date": "20080602"}, "violated"),
        ("age", {"patient_age": "", "study_date": ""}, "unknown"),
        # One of the two cannot be read: nobody knows what it would say.
        ("age", {"patient_age": "9 Y", "patient_birth_date": "19610101"}, "unknown"),
        ("age", {"patient_age": "065", "patient_birth_date": "19610101"}, "unknown"),
        ("age", {"patient_age": "065Y\\009Y", "patient_birth_date": ""}, "unknown"),
        ("age", {"patient_age": "065Y", "patient_birth_date": "20170000"}, "unknown"),
        ("age", {"patient_age": "065Y", "patient_birth_date": "19610101\\20170101"}, "unknown"),
        ("age", {"patient_age": "065Y", "patient_birth_date": "20170101", "study_date": ""}, "unknown"),
        ("age", {"patient_age": "009Y", "patient_birth_date": "20170000"}, "violated"),
        # Without its zeros it says what it says.
        ("age", {"patient_age": "9Y", "patient_birth_date": "19610101"}, "violated"),
        ("age", {"patient_age": "65y", "patient_birth_date": "19610101"}, "met"),
        # What stands where nobody knew.
        ("age", {"patient_age": "", "patient_birth_date": "19000101"}, "unknown"),
        ("age", {"patient_age": "999Y", "patient_birth_date": ""}, "unknown"),
        ("age", {"patient_age": "", "patient_birth_date": "19060602"}, "met"),
        ("age", {"patient_age": "", "patient_birth_date": "19060601"}, "unknown"),
        ("patient", {"patient": "somebody else"}, "violated"),
        ("kvp", {"kvp": 70.0}, "violated"),
        ("kvp", {"kvp": 150.0}, "violated"),
        ("kvp", {"kvp": None}, "unknown"),
        ("contrast", {"contrast_bolus_agent": "OMNIPAQUE 350"}, "violated"),
        ("contrast", {"contrast_bolus_agent": "NONE"}, "met"),
        ("contrast", {"series_description": "HEAD +C"}, "violated"),
        ("contrast", {"image_type": ("ORIGINAL", "PRIMARY", "POST_CONTRAST")}, "violated"),
        ("body_part", {"series_description": "NECK"}, "violated"),
        ("body_part", {"body_part_examined": "", "study_description": "", "series_description": ""}, "unknown"),
        ("body_part", {"body_part_examined": "", "series_description": "", "study_description": "CT Schädel"}, "met"),
        ("body_part", {"anatomic_region": "12738006 SCT", "body_part_examined": "CHEST"}, "met"),
        ("body_part", {"anatomic_region": "T-D1100 SRT", "body_part_examined": "", "study_description": ""}, "met"),
        ("body_part", {"anatomic_region": "45048000 SCT", "body_part_examined": "HEAD"}, "violated"),
        ("body_part", {"anatomic_region": "H1 99ACME", "body_part_examined": "", "study_description": ""}, "unknown"),
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
        ("slice_thickness", head_series(300, thickness=0.3, step=0.5), "violated"),
        ("slice_thickness", head_series(30, thickness=None), "unknown"),
        ("coverage", head_series(60, step=1.0, thickness=1.0), "violated"),
        ("slabs", head_series(9, step=10.0, thickness=10.0), "violated"),
        ("gaps", [one for one in head_series(30) if one.instance_number != 15], "violated"),
        ("gaps", [one for one in head_series(60) if (one.instance_number or 0) % 2], "violated"),
    ],
)
def test_the_geometry_of_the_label(criterion: str, series: list[Header], outcome: str) -> None:
    assert decide(series[0], series)[criterion] == outcome


def test_a_slice_whose_place_is_unreadable_is_not_passed_over() -> None:
    assert decide(header(frames=()))["geometry"] == "unknown"


TWICE = [*head_series(), header(40, z=25.0)]
JUMPING = [header(n ^ 1, z=5.0 * n) for n in range(2, 32)]
WAVERING = [header(n, z=5.0 * n + 0.01 * (n % 2)) for n in range(30)]
NO_NUMBERS = [replace(one, instance_number=None) for one in head_series()]


@pytest.mark.parametrize(
    ("rule", "criterion", "series", "outcome"),
    [
        ({"maximum_age": "21 years"}, "age", [header(patient_age="021Y", patient_birth_date="")], "met"),
        ({"maximum_age": "21 years"}, "age", [header(patient_age="022Y", patient_birth_date="")], "violated"),
        ({"maximum_age": "64 years"}, "age", [header(patient_age="", patient_birth_date="19610601")], "violated"),
        ({"maximum_age": "65 years"}, "age", [header(patient_age="", patient_birth_date="19610601")], "met"),
        ({"minimum_age": "6 months"}, "age", [header(patient_age="005M", patient_birth_date="")], "violated"),
        ({"minimum_age": "6 months"}, "age", [header(patient_age="000Y", patient_birth_date="")], "unknown"),
        ({"minimum_age": "6 months"}, "age", [header(patient_age="", patient_birth_date="20251201")], "met"),
        ({"contrast": True}, "contrast", [header(contrast_bolus_agent="OMNIPAQUE")], "met"),
        ({"scanners": ("ACME",)}, "scanner", head_series(), "met"),
        ({"scanners": ("GE",)}, "scanner", head_series(), "violated"),
        ({"scanners": ("ACME/T*",)}, "scanner", head_series(), "violated"),
        ({"scanners": ("GE", "ACME/O*")}, "scanner", head_series(), "met"),
        ({"excluded_scanners": ("Acme",)}, "scanner", [header(manufacturer=" ACME,  Inc. ")], "violated"),
        ({"excluded_scanners": ("ACME",)}, "scanner", [header(manufacturer="ACMETEC")], "met"),
        ({"scanners": ("ACME",)}, "scanner", [header(manufacturer="")], "unknown"),
        ({"scanners": ("ACME/O*",)}, "scanner", [header(manufacturer_model_name="")], "unknown"),
        ({"excluded_scanners": ("ACME",)}, "scanner", head_series(), "violated"),
        ({"excluded_scanners": ("ACME/T*",)}, "scanner", head_series(), "met"),
        ({"excluded_scanners": ("ACME/T*",)}, "scanner", [header(manufacturer_model_name="")], "unknown"),
        ({"excluded_scanners": ("GE",)}, "scanner", [header(manufacturer="")], "unknown"),
        ({"slice_spacing_mm": (5.0, 5.0)}, "spacing", head_series(), "met"),
        ({"slice_spacing_mm": (0.5, 4.9)}, "spacing", head_series(), "violated"),
        ({"slice_spacing_mm": (5.1, 6.0)}, "spacing", head_series(), "violated"),
        ({"slice_spacing_mm": (0.5, 5.0)}, "spacing", [header()], "unknown"),
        ({"slice_spacing_mm": (5.0, 5.0)}, "spacing", WAVERING, "met"),
        ({"slice_spacing_mm": (5.0, 5.0)}, "spacing", [header(), header(2, z=4.97)], "violated"),
        ({"slice_spacing_mm": (5.0, 5.0)}, "spacing", [header(), header(2, z=5.03)], "violated"),
        ({"minimum_coverage_mm": 150.0}, "coverage", head_series(), "met"),
        ({"minimum_coverage_mm": 150.1}, "coverage", head_series(), "violated"),
        ({"minimum_slabs": 30}, "slabs", head_series(), "met"),
        ({"minimum_slabs": 31}, "slabs", head_series(), "violated"),
        ({"kernels": ("STAND*",)}, "kernel", head_series(), "met"),
        ({"kernels": ("SOFT",)}, "kernel", head_series(), "violated"),
        ({"kernels": ("SOFT",)}, "kernel", [header(convolution_kernel="")], "unknown"),
        ({"excluded_kernels": ("BONE*",)}, "kernel", head_series(), "met"),
        ({"excluded_kernels": ("BONE*", "stand*")}, "kernel", head_series(), "violated"),
        ({"maximum_tilt_degrees": 0.0}, "tilt", head_series(), "met"),
        ({"maximum_tilt_degrees": 10.0}, "tilt", [header(gantry_detector_tilt=-18.5)], "violated"),
        ({"maximum_tilt_degrees": 10.0}, "tilt",
         [header(gantry_detector_tilt=None, frames=(plane(0, orientation=(1, 0, 0, 0, 0.9, -0.43589)),))], "violated"),
        ({"duplicate_slices": False}, "duplicates", head_series(), "met"),
        ({"duplicate_slices": False}, "duplicates", TWICE, "violated"),
        ({"misordered_slices": False}, "order", head_series(), "met"),
        ({"misordered_slices": False}, "order", head_series(step=-5.0), "met"),
        ({"misordered_slices": False}, "order", JUMPING, "violated"),
        ({"misordered_slices": False}, "order", NO_NUMBERS, "unknown"),
        ({"misordered_slices": False}, "order", [header(), header(z=10.0)], "violated"),
        ({"misordered_slices": False}, "order",
         [header(number_of_frames=3, frames=(plane(0), plane(5), plane(10)))], "met"),
        ({"maximum_hours_since_onset": 24.0}, "onset", head_series(), "unknown"),
    ],
)  # fmt: skip
def test_what_a_label_may_say_beyond_the_shipped_one(
    rule: dict[str, Any], criterion: str, series: list[Header], outcome: str
) -> None:
    assert decide(series[0], series, with_rules(**rule))[criterion] == outcome


def test_what_a_label_does_not_limit_is_not_asked() -> None:
    asked = decide(header(), TWICE)
    assert set(asked) >= {"scanner", "gaps"}
    assert set(asked.values()) == {"met"}
    assert not {"spacing", "kernel", "tilt", "duplicates", "order", "onset"} & set(asked)


def test_a_package_for_another_use_is_refused() -> None:
    assert decide(header(), None, replace(PACKAGE, intended_use="detection"))["intended_use"] == "violated"


def test_only_the_unknown_can_be_excepted_and_only_until_its_day() -> None:
    def exception(until: date, package: str = "ich_reference") -> BoardException:
        return BoardException(package=package, criterion="age", reason="r", signed_by="board", until=until)

    nobody_knows = header(patient_age="", patient_birth_date="")
    assert decide(nobody_knows, exceptions=(exception(DAY),))["age"] == "excepted"
    assert decide(nobody_knows, exceptions=(exception(DAY - timedelta(1)),))["age"] == "unknown"
    assert decide(nobody_knows, exceptions=(exception(DAY, "another"),))["age"] == "unknown"
    assert decide(header(kvp=None), exceptions=(exception(DAY),))["kvp"] == "unknown"
    for child in (
        header(patient_age="009Y", patient_birth_date=""),
        header(patient_age="065Y", patient_birth_date="20170101"),
    ):
        assert decide(child, exceptions=(exception(DAY),))["age"] == "violated"


def test_what_is_wrong_in_one_slice_and_unknown_in_another_cannot_be_excepted() -> None:
    first, second, *others = head_series()
    series = [replace(first, kvp=None), replace(second, kvp=70.0), *others]
    exception = BoardException(package="ich_reference", criterion="kvp", reason="r", signed_by="b", until=DAY)
    assert decide(first, series, exceptions=(exception,))["kvp"] == "violated"
    assert decide(first, [series[0], *others], exceptions=(exception,))["kvp"] == "excepted"


def test_a_head_without_a_brain_is_refused_late() -> None:
    found = admission(head_series())
    assert admit_pixels(PACKAGE, found, 1200.0, 0.0).admitted
    assert admit_pixels(PACKAGE, found, PACKAGE.indication.minimum_brain_ml, 0.0).admitted
    assert not admit_pixels(PACKAGE, found, PACKAGE.indication.minimum_brain_ml - 0.1, 0.0).admitted
    hollow = admit_pixels(PACKAGE, found, 20.0, 0.0)
    assert "soft tissue" in hollow.reason
    assert hollow.criteria[-1].clause == PACKAGE.indication.clauses["brain"]


@pytest.mark.parametrize(("apart", "met"), [(5.0, True), (5.02, False)])
@pytest.mark.parametrize("tilt", [0.0, 7.0, 18.5])
def test_a_quarter_may_lie_between_the_slices(apart: float, met: bool, tilt: float) -> None:
    cosine, sine = np.cos(np.deg2rad(tilt)), np.sin(np.deg2rad(tilt))
    frames = [
        FramePlane(
            (-128.0, round(-128 - sine * apart * n, 4), round(cosine * apart * n, 4)),
            (1.0, 0.0, 0.0, 0.0, round(cosine, 6), round(sine, 6)), (0.5, 0.5), 3.75,
        )
        for n in range(1, 31)
    ]  # fmt: skip
    series = [replace(one, frames=(frame,)) for one, frame in zip(head_series(30), frames, strict=True)]
    (gaps,) = [one for one in admission(series).criteria if one.criterion == "gaps"]
    assert gaps.met == met, gaps.value


def test_a_head_of_which_the_model_does_not_see_all_is_refused() -> None:
    found = admission(head_series())
    assert admit_pixels(PACKAGE, found, 1200.0, UNSEEN_ML).admitted
    cut = admit_pixels(PACKAGE, found, 1200.0, UNSEEN_ML + 2)
    assert not cut.admitted and cut.criteria[-1].outcome == "violated"
    assert "1200 mL, and 4 mL outside the model's field" in cut.reason


def test_a_series_that_still_arrives_is_promising_only_if_further_slices_can_mend_it() -> None:
    few = head_series(5)
    assert not admission(few).admitted
    assert admission(few).promising
    assert not admission([replace(few[0], kvp=70.0), *few[1:]]).promising
    # Slices that come in no order: what lies between two of them may be on its way.
    apart = admission(few[::2], with_rules(slice_spacing_mm=(0.5, 5.0)))
    assert "spacing" in apart.reason
    assert apart.promising
    assert not admission([replace(few[0], patient_age="", patient_birth_date=""), *few[1:]]).promising


@settings(deadline=None)
@given(
    count=st.integers(0, 1500), unit=st.sampled_from(["days", "weeks", "months", "years"]),
    born=st.dates(date(1900, 1, 1), date(2040, 12, 31)),
)  # fmt: skip
def test_an_age_is_reached_between_its_fewest_and_its_most_days(count: int, unit: str, born: date) -> None:
    age = Age(count % 130 if unit == "years" else count, unit)
    fewest, most = age.days()
    assert fewest <= (age.reached_on(born) - born).days <= most


@settings(deadline=None)
@given(
    stated=st.builds(Age, st.integers(0, 999), st.sampled_from(["days", "weeks", "months", "years"])),
    limit=st.builds(Age, st.integers(0, 99), st.sampled_from(["days", "weeks", "months", "years"])),
    born=st.dates(date(1900, 1, 1), date(2040, 12, 31)), share=st.floats(0, 1, exclude_max=True),
)  # fmt: skip
def test_what_is_said_of_an_age_holds_for_everybody_of_that_age(
    stated: Age, limit: Age, born: date, share: float
) -> None:
    first, end = stated.reached_on(born), stated.next.reached_on(born)
    today = first + timedelta(int((end - first).days * share))
    reached = stated.has_reached(limit)
    assert reached is None or reached == (limit.reached_on(born) <= today)


def test_an_age_is_not_told_where_only_some_have_reached_it() -> None:
    """A year is longer than 52 weeks: of those who are one, some are 53 weeks old."""
    assert [Age(1, "years").has_reached(Age(weeks, "weeks")) for weeks in (52, 53, 105)] == [None, None, False]
    assert [Age(weeks, "weeks").has_reached(Age(1, "years")) for weeks in (50, 52, 53)] == [False, None, True]


def test_a_birthday_on_29_february_is_kept_on_1_march() -> None:
    assert Age(18, "years").reached_on(date(2008, 2, 29)) == date(2026, 3, 1)
    assert Age(1, "months").reached_on(date(2025, 12, 31)) == date(2026, 1, 31)
    assert Age(2, "months").reached_on(date(2025, 12, 31)) == date(2026, 3, 1)
    assert Age(4, "years").reached_on(date(2008, 2, 29)) == date(2012, 2, 29)


@settings(deadline=None)
@given(
    age=st.sampled_from(["", "000D", "100D", "080W", "215M", "216M", "017Y", "018Y", "120Y", "x"]),
    born=st.sampled_from(["", "20260601", "20080601", "20080602", "19000101", "20991231", "zzz"]),
    studied=st.sampled_from(["", "20260601"]),
)
def test_nobody_under_age_or_of_unknown_age_is_admitted(age: str, born: str, studied: str) -> None:
    if decide(header(patient_age=age, patient_birth_date=born, study_date=studied))["age"] == "met":
        assert age in ("", "216M", "018Y")
        assert (born, studied) == ("20080601", "20260601") or (age and not born)


@pytest.mark.parametrize(
    ("text", "region"),
    [
        ("HEAD W/O", "head"), ("Brain_5mm", "head"), ("HeadRoutine", "head"), ("cranio", "head"),
        ("Kopf nativ", "head"),
        ("CCT", "head"), ("CRÂNE SANS INJECTION", "head"), ("encéphale", "head"), ("Head^HeadSeq", "head"),
        ("HEAD AND NECK", "elsewhere"), ("HEADNECK", "elsewhere"), ("head/neck", "elsewhere"), ("C-SPINE", "elsewhere"),
        ("CSPINE", "elsewhere"), ("SPINE", "elsewhere"), ("CTA HEAD", "elsewhere"), ("FEMORAL HEAD", "elsewhere"),
        ("HWS", "elsewhere"), ("BRAIN PERFUSION", "elsewhere"), ("ORBIT", "elsewhere"),
        ("CABEÇA", "head"), ("CRÂNIO", "head"), ("ENCEFALO", "head"), ("CERVEAU", "head"), ("Scha\u0308del", "head"),
        ("TETE ET COU", "elsewhere"), ("CABEZA Y CUELLO", "elsewhere"), ("TESTA E COLLO", "elsewhere"),
        ("CRANE RACHIS", "elsewhere"), ("CRANIO TORACE", "elsewhere"), ("Kopf/Becken", "elsewhere"),
        ("SCHAEDEL NNH", "elsewhere"), ("HEAD CERVICAL", "elsewhere"), ("SKULL BASE TO MIDTHIGH", "elsewhere"),
        ("TIBIA HEAD", "elsewhere"), ("METATARSAL HEAD", "elsewhere"), ("Gesichtsschädel", "elsewhere"),
        ("5MM", ""), ("AHEAD", ""), ("HEADREST", ""), ("", ""),
    ],
)  # fmt: skip
def test_what_people_write_into_descriptions(text: str, region: str) -> None:
    one = header(series_description=text, body_part_examined="", study_description="", protocol_name="")
    assert body_region(one) == region


def test_the_more_particular_word_counts() -> None:
    silent = header(series_description="5MM", body_part_examined="", study_description="", protocol_name="")
    assert body_region(replace(silent, protocol_name="Head", anatomic_region="45048000 SCT")) == "head"
    assert body_region(replace(silent, anatomic_region="45048000 SCT", body_part_examined="HEAD")) == "elsewhere"
    assert body_region(replace(silent, body_part_examined="CHEST", study_description="CT HEAD")) == "elsewhere"


def test_the_codes_of_the_head_are_those_of_the_standard() -> None:
    sct = {"69536005": "T-D1100", "12738006": "T-A0100", "89546000": "T-11100"}
    assert {f"{code} SCT" for code in sct} | {f"{code} SRT" for code in sct.values()} == HEAD_CODES
    assert {mapping["SCT"][code] for code in sct} == set(sct.values())


@pytest.mark.parametrize(
    ("changes", "given"),
    [
        *(({"contrast_bolus_agent": agent}, False) for agent in ("", "NONE", "no", "N", "NO CONTRAST", "ohne KM", "-",
          "no IV contrast", "NONE GIVEN", "NO_CONTRAST")),
        *(({"contrast_bolus_agent": agent}, True) for agent in ("OMNIPAQUE", "IV", "Y", "ORAL & IV", "APPLIED",
          "NON IONIC", "Non ionic iodinated 350", "NO 350")),
        *(({"series_description": text}, True) for text in (
            "HeadContrast 5.0", "HEADCONTRAST", "HEAD IV CON", "KopfKontrast",
            "HEAD +C", "HEAD C+", "POST CONTRAST", "Post-Con", "HEAD W CONTRAST", "with contrast", "mit KM", "nach KM",
            "W/O & W CONTRAST", "CTA HEAD", "CT ANGIO", "PERFUSION", "ENHANCED", "AVEC INJECTION", "ARTERIAL", "5mm +C",
            "Kopf mit Kontrast", "KONTRASTMITTEL", "TESTA CON MDC", "CRANE APRES PDC", "CRANE IV+", "CRANIO C/C",
            "HEAD+C", "HEAD W CON", "HEAD W/C", "HEAD W/", "CE HEAD", "HEAD ENH", "HEAD W WO CONTRAST", "HEAD W/WO",
            "HEAD WO/W", "WITH AND WITHOUT CONTRAST", "mit und ohne KM", "HEAD W and W/O contrast", "HEAD WITHOUT/WITH",
            "HEAD DELAY 5 MIN", "HEAD DELAYED", "HEAD POST", "HEAD 2ND PHASE", "VENOGRAM", "CRANE IV", "tete inj",
            "Schädel KMgabe", "CRANE TARDIF",
        )),
        *(({"series_description": text}, False) for text in (
            "HeadNonContrast", "HeadNoContrast", "HeadWithoutContrast", "HeadPreContrast", "KopfOhneKontrast",
            "HEADWOCONTRAST",
            "HEAD NO IV CON", "HEAD W/O IV CON", "CCT Kontrolle", "HEAD CONTROL",
            "HEAD W/O", "HEAD W/O CONTRAST", "WITHOUT CONTRAST", "NON-CONTRAST", "NON CON", "NONCONTRAST",
            "NO CONTRAST", "PRE CONTRAST", "C-", "HEAD -C", "ohne KM", "nativ", "SANS INJECTION", "UNENHANCED", "NCCT",
            "AXIAL", "", "HEAD 5 (enhanced conversion)", "CCT o. KM", "Kopf ohne Kontrastmittel", "CRANIO S/C",
            "SENZA MDC", "SEM CONTRASTE", "UTAN KONTRAST", "POST OP HEAD", "POST CRANIOTOMY", "HEAD W/O IV CONTRAST",
            "HEAD W/O IV", "SANS INJ", "POST TPA HEAD", "TETE NON INJ", "HEAD INJURY", "CT HEAD INJURIES",
            "FOSSA POST.", "Fosse post",
        )),
        ({"series_description": "AXIAL", "protocol_name": "HEAD WITH CONTRAST"}, True),
        ({"series_description": "AXIAL", "protocol_name": "HEAD W/WO CONTRAST W/O"}, False),
        ({"series_description": "W/O", "protocol_name": "HEAD WITH CONTRAST"}, False),
        ({"study_description": "CT HEAD W CONTRAST"}, False),
        ({"image_type": ("ORIGINAL", "PRIMARY", "ANGIO")}, True),
        ({"contrast_bolus_agent": "NONE", "series_description": "POST CONTRAST"}, True),
    ],
)  # fmt: skip
def test_what_speaks_of_a_contrast_agent(changes: dict[str, Any], given: bool) -> None:
    assert contrast_said(replace(header(), **changes))[1] is given


@pytest.mark.parametrize(
    ("spellings", "name"),
    [
        (
            ("GE", "GE MEDICAL SYSTEMS", "GE Healthcare", "General Electric", " ge_medical", "G.E. Medical", "GEMS IT"),
            "GE",
        ),
        (("SIEMENS", "Siemens Healthineers", "Siemens HealthCare GmbH"), "SIEMENS"),
        (("Philips", "Philips Medical Systems", "PHILIPS Healthcare"), "PHILIPS"),
        (("TOSHIBA", "TOSHIBA_MEC", "Canon Medical Systems", "CANON_MEC"), "CANON"),
        (("GERMAN IMAGING",), "GERMAN IMAGING"),
        (("", " "), ""),
    ],
)
def test_the_spellings_of_makers(spellings: tuple[str, ...], name: str) -> None:
    assert {maker(one) for one in spellings} == {name}
    for one in spellings:
        assert scanner_matches((name or "GE",), one, "") is (True if name else None)


def test_what_one_rule_tells_no_other_makes_unknown() -> None:
    assert scanner_matches(("ACME/One*", "ACME"), "ACME", "") is True
    assert scanner_matches(("ACME", "ACME/One*"), "ACME", "") is True
    assert scanner_matches(("GE", "ACME/One*"), "ACME", "") is None
    assert scanner_matches(("GE", "SIEMENS/One*"), "ACME", "") is False


def test_kernels_by_pattern() -> None:
    assert kernel_matches(("J40?",), "J40s\\3")
    assert kernel_matches(("bone*",), "BONEPLUS")
    assert not kernel_matches(("H3*",), "H60s")


# --- the labels -----------------------------------------------------------------------------------------

CASES = {
    "adult_18": {"": True, "017Y": False, "021Y": True},
    "adult_22": {"": True, "017Y": False, "021Y": False, "022Y": True},
    "not_on_one_maker": {"": True, "GE MEDICAL SYSTEMS": False, "GE HEALTHCARE": False, "SIEMENS": True},
    "kvp_100_140": {"": True, "80 kV": False, "99 kV": False, "100 kV": True, "140 kV": True, "150 kV": False},
    "thin_to_5mm": {"": True, "0.5 mm": False, "0.625 mm": True, "5 mm": True, "5.5 mm": False, "10 mm": False},
    "not_isolated_subarachnoid": {"": True},
}  # fmt: skip


@pytest.mark.parametrize(("name", "said", "admitted"), [(n, s, a) for n, of in CASES.items() for s, a in of.items()])
def test_real_labels(name: str, said: str, admitted: bool) -> None:
    if said.endswith("Y"):
        series = head_series(patient_age=said, patient_birth_date="")
    elif said.endswith("kV"):
        series = head_series(kvp=float(said.split()[0]))
    elif said.endswith("mm"):
        thick = float(said.split()[0])
        series = head_series(int(150 / min(thick, 5.0)), step=min(thick, 5.0), thickness=thick)
    else:
        series = head_series(manufacturer=said or "ACME")
    found = admission(series, label(name))
    assert found.admitted is admitted, found.reason
    assert len([c for c in found.criteria if not c.met]) == (not admitted)
    assert all(c.clause for c in found.criteria)


def test_what_no_header_shows_is_carried_as_a_limitation() -> None:
    (limitation,) = label("not_isolated_subarachnoid").indication.limitations
    assert "subarachnoid" in limitation.text
    assert limitation.clause


# --- a label that cannot be, and a site that narrows one --------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kvp": (140.0, 80.0)}, "kvp runs from 140.0 down to 80.0"),
        ({"slice_spacing_mm": (5.0, 1.0), "clauses": {**PACKAGE.indication.clauses, "spacing": "x"}}, "runs from"),
        ({"maximum_age": "17 years"}, "maximum_age is 17 years, minimum_age 18 years"),
        ({"minimum_age": "18"}, "pattern"),
        ({"body_parts": ("CHEST",)}, "HEAD"),
        ({"clauses": {**PACKAGE.indication.clauses, "onset": "x"}}, "onset has a clause and no rule"),
        ({"clauses": {k: v for k, v in PACKAGE.indication.clauses.items() if k != "kvp"}}, "speak of kvp"),
        ({"kernels": ("SOFT",)}, "speak of kernel"),
        ({"misordered_slices": False}, "speak of order"),
    ],
)
def test_a_label_that_cannot_be(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(PACKAGE.indication, **change)


@pytest.mark.parametrize(
    "limit",
    [
        {"minimum_age": "22 years"}, {"minimum_age": "216 months"}, {"maximum_age": "90 years"},
        {"kvp": [100.0, 140.0]}, {"kvp": [80.0, 140.0]}, {"slice_thickness_mm": [0.625, 5.0]},
        {"slice_spacing_mm": [1.0, 5.0]},
        {"contrast": False}, {"minimum_slabs": 20}, {"minimum_brain_ml": 800.0}, {"minimum_coverage_mm": 100.0},
        {"body_parts": ["HEAD"]}, {"sop_classes": [CT]}, {"scanners": ["GE/Rev*"]}, {"excluded_scanners": ["GE"]},
        {"excluded_kernels": ["BONE"]}, {"kernels": ["STANDARD"]}, {"maximum_tilt_degrees": 10.0},
        {"misordered_slices": False, "duplicate_slices": False}, {"maximum_hours_since_onset": 24.0},
    ],
)  # fmt: skip
def test_a_site_may_narrow(limit: dict[str, Any]) -> None:
    site = narrowed(PACKAGE.indication, limit)
    assert site == narrowed(site, {})
    for name, keys in RULES.items():
        if set(keys) & set(limit):
            assert "narrowed by this site" in site.clauses[name]
        else:
            assert site.clauses.get(name) == PACKAGE.indication.clauses.get(name)
    for key, value in limit.items():
        assert json.loads(json.dumps(getattr(site, key))) == value


WIDE = with_rules(
    maximum_age="90 years", scanners=("GE/Rev*", "SIEMENS"), excluded_scanners=("GE/Rev X",), kernels=("ST*",),
    excluded_kernels=("BONE*",), maximum_tilt_degrees=20.0, slice_spacing_mm=(1.0, 5.0), duplicate_slices=False,
    misordered_slices=False, maximum_hours_since_onset=24.0,
).indication  # fmt: skip


@pytest.mark.parametrize(
    ("limit", "key"),
    [
        ({"minimum_age": "939 weeks"}, "minimum_age"),
        ({"minimum_age": "17 years"}, "minimum_age"), ({"minimum_age": "900 weeks"}, "minimum_age"),
        ({"maximum_age": "91 years"}, "maximum_age"), ({"kvp": [70.0, 140.0]}, "kvp"), ({"kvp": [80.0, 150.0]}, "kvp"),
        ({"slice_thickness_mm": [0.4, 12.0]}, "slice_thickness_mm"),
        ({"slice_spacing_mm": [0.5, 5.0]}, "slice_spacing_mm"),
        ({"contrast": True}, "contrast"), ({"minimum_slabs": 9}, "minimum_slabs"),
        ({"minimum_brain_ml": 1.0}, "minimum_brain_ml"), ({"minimum_coverage_mm": 79.0}, "minimum_coverage_mm"),
        ({"modality": ["CT", "MR"]}, "modality"), ({"sop_classes": [SECONDARY_CAPTURE]}, "sop_classes"),
        ({"scanners": ["PHILIPS"]}, "scanners"), ({"scanners": ["GE"]}, "scanners"), ({"scanners": []}, "scanners"),
        ({"kernels": ["S*"]}, "kernels"), ({"maximum_tilt_degrees": 21.0}, "maximum_tilt_degrees"),
        ({"duplicate_slices": True}, "duplicate_slices"), ({"misordered_slices": True}, "misordered_slices"),
        ({"maximum_hours_since_onset": 25.0}, "maximum_hours_since_onset"),
        ({"clauses": {}}, "clauses"), ({"limitations": []}, "limitations"), ({"age": "18 years"}, "age"),
        ({"kvp": "120"}, "kvp"), ({"kvp": [140.0, 100.0]}, "kvp"), ({"minimum_slabs": 20.5}, "minimum_slabs"),
        ({"excluded_kernels": "BONE"}, "excluded_kernels"),
    ],
)  # fmt: skip
def test_a_site_may_not_widen_nor_invent(limit: dict[str, Any], key: str) -> None:
    with pytest.raises(SettingsError, match=f"limit.*{key}"):
        narrowed(WIDE, limit)


def test_what_a_site_excludes_is_added() -> None:
    site = narrowed(WIDE, {"excluded_scanners": ["SIEMENS/Go*"], "excluded_kernels": ["H6*"]})
    assert site.excluded_scanners == ("GE/Rev X", "SIEMENS/Go*")
    assert site.excluded_kernels == ("BONE*", "H6*")


def test_a_pattern_with_one_letter_open_is_not_taken_for_a_wider_one() -> None:
    narrow = with_rules(kernels=("H3?",)).indication
    assert narrowed(narrow, {"kernels": ["h3?"]}).kernels == ("h3?",)
    with pytest.raises(SettingsError, match="wider"):
        narrowed(narrow, {"kernels": ["H3*"]})


def test_limits_come_from_the_settings() -> None:
    settings = Settings(limit=[{"package": "ich_reference", "kvp": [100.0, 140.0]}])
    (package,) = load_configured(settings)
    assert package.indication.kvp == (100.0, 140.0)
    with pytest.raises(SettingsError, match="another"):
        load_configured(Settings(limit=[{"package": "another", "kvp": [100.0, 140.0]}]))
    with pytest.raises(SettingsError, match="wider"):
        load_configured(Settings(limit=[{"package": "ich_reference", "kvp": [10.0, 140.0]}]))


def test_an_age_that_is_told_twice_is_shown_twice_and_without_the_birth_date() -> None:
    said, met = age_said(PACKAGE.indication, header(patient_age="065Y", patient_birth_date="19610101"))
    assert (said, met) == ("065Y, 65 years by the dates", True)
    said, _ = age_said(PACKAGE.indication, header(patient_age="", patient_birth_date="20260501"))
    assert said == "31 days by the dates"


def test_the_examples_of_the_manual_are_labels() -> None:
    text = (Path(__file__).parents[3] / "docs" / "indications.md").read_text("utf-8")
    blocks = text.split("\n\n### Example")[1:]
    first, second = (
        tomllib.loads("\n".join(line[4:] for line in block.split("\n## ")[0].splitlines() if line.startswith("    ")))
        for block in blocks
    )
    schema = TypeAdapter(Indication)
    one = schema.validate_json(json.dumps(first["indication"]))
    assert one.limitations
    assert one.scanners == ()
    merged = {**first["indication"], **second["indication"]}
    merged["clauses"] = {**first["indication"]["clauses"], **second["indication"]["clauses"]}
    two = schema.validate_json(json.dumps(merged))
    assert (two.minimum_age, two.maximum_age, two.misordered_slices) == ("12 years", "89 years", False)
