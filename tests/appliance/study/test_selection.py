"""The right series is chosen, whatever else came with it and in whatever order."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from appliance.governance.indication import Admission, Criterion, Outcome
from appliance.study.grouping import group
from appliance.study.selection import Selection, first_admitted, kernel_class, not_analysed, select
from dicom_io.errors import HeaderError
from dicom_io.header import FramePlane, Header, read_header
from tests.builders import SECONDARY_CAPTURE, head_series, header, plane


def choose(*series: list[Header], alerted: str = "") -> tuple[str | None, dict[str, str]]:
    headers = [one for members in series for one in members]
    random.Random(7).shuffle(headers)
    selection = select(group(headers), alerted)
    assert_consistent(selection)
    chosen = selection.series.series_instance_uid if selection.series else None
    return chosen, {one.series_instance_uid: one.reason for one in selection.considered}


def assert_consistent(selection: Selection) -> None:
    assert sum(one.chosen for one in selection.considered) == (selection.series is not None)
    assert all(one.reason for one in selection.considered)


def test_thick_before_thin() -> None:
    thin = head_series(150, step=1.0, thickness=1.0, series="1.2.3.1")
    thick = head_series(30, series="1.2.3.2")
    chosen, reasons = choose(thin, thick)
    assert chosen == "1.2.3.2"
    assert "thin" in reasons["1.2.3.1"]
    assert choose(thin)[0] == "1.2.3.1"


def test_a_soft_kernel_before_an_unknown_one_and_never_a_sharp_one() -> None:
    unknown = head_series(30, series="1.2.3.1", convolution_kernel="ZZZ")
    soft = head_series(30, series="1.2.3.2", convolution_kernel="H31s")
    bone = head_series(30, series="1.2.3.3", convolution_kernel="H60s")
    chosen, reasons = choose(unknown, soft, bone)
    assert chosen == "1.2.3.2"
    assert "kernel is unknown" in reasons["1.2.3.1"]
    assert "sharp" in reasons["1.2.3.3"]
    assert choose(bone)[0] is None


def test_none_is_no_contrast_agent() -> None:
    unknown = head_series(30, series="1.2.3.1", convolution_kernel="ZZZ")
    none = head_series(30, series="1.2.3.2", contrast_bolus_agent="NONE")
    assert choose(unknown, none)[0] == "1.2.3.2"


def test_of_two_alike_the_later_unless_an_alert_rests_on_the_other() -> None:
    first, again = head_series(30, series="1.2.3.2"), head_series(29, series="1.2.3.10")
    chosen, reasons = choose(first, again)
    assert (chosen, reasons["1.2.3.2"]) == ("1.2.3.10", "a later series of the same kind came too")
    chosen, reasons = choose(first, again, alerted="1.2.3.2")
    assert (chosen, reasons["1.2.3.10"]) == ("1.2.3.2", "the alert rests on another series")
    assert choose(first, again, alerted="1.2.3.99")[0] == "1.2.3.10"


def test_the_later_is_what_was_acquired_later_where_all_of_its_kind_say_when() -> None:
    first = head_series(30, series="1.2.3.10", acquired="20260601100000")
    again = head_series(30, series="1.2.3.2", acquired="20260601101500")
    thin = head_series(150, step=1.0, thickness=1.0, series="1.2.3.3")
    chosen, reasons = choose(first, again, thin)
    assert (chosen, reasons["1.2.3.10"]) == ("1.2.3.2", "a later series of the same kind came too")
    one_silent = [replace(again[0], acquired=""), *again[1:]]
    assert choose(first, one_silent)[0] == "1.2.3.10"
    assert choose([replace(first[0], acquired=""), *first[1:]], again)[0] == "1.2.3.10"
    as_late = [replace(one, acquired="20260601101500") for one in first]
    assert choose(as_late, again)[0] == "1.2.3.10"


@pytest.mark.parametrize(
    ("alerted", "admitted", "chosen", "asked"),
    [
        ("", {"1.2.3.5"}, "1.2.3.5", ["1.2.3.5"]),
        ("", {"1.2.3.1"}, "1.2.3.1", ["1.2.3.5", "1.2.3.2", "1.2.3.1"]),  # thin, of the same head
        ("", {"1.2.3.3", "1.2.3.4"}, "1.2.3.5", ["1.2.3.5", "1.2.3.2", "1.2.3.1"]),  # a last resort is none for them
        ("1.2.3.2", {"1.2.3.5"}, "1.2.3.2", ["1.2.3.2"]),
    ],
)
def test_the_first_that_is_admitted_is_read(alerted: str, admitted: set[str], chosen: str, asked: list[str]) -> None:
    series = group(
        head_series(150, step=1.0, thickness=1.0, series="1.2.3.1")
        + head_series(30, series="1.2.3.2")
        + head_series(30, series="1.2.3.3", convolution_kernel="ZZZ")
        + head_series(30, series="1.2.3.4", contrast_bolus_agent="IOHEXOL")
        + head_series(30, series="1.2.3.5")
    )
    seen: list[str] = []

    def judge(selection: Selection) -> Admission:
        assert selection.series is not None
        uid = selection.series.series_instance_uid
        seen.append(uid)
        outcome: Outcome = "met" if uid in admitted else "violated"
        return Admission((Criterion("kvp", "KVP", f"of {uid}", "another", outcome),))

    selection, admission = first_admitted(lambda refused: select(series, alerted, refused), judge, alerted)
    assert selection.series is not None
    assert (selection.series.series_instance_uid, seen) == (chosen, asked)
    assert admission.criteria[0].value == f"of {chosen}"
    said = {one.series_instance_uid: one.reason for one in selection.considered}
    for uid in asked[: asked.index(chosen)]:
        assert said[uid].startswith("it may not be read: ") and uid in said[uid]


def test_a_head_that_is_scanned_after_an_agent_was_given_does_not_replace_the_one_before() -> None:
    """As after an angiography: the agent is in the later head, whose header does not name it."""
    plain = head_series(30, series="1.2.3.2", acquired="20260601140000")
    late = head_series(30, series="1.2.3.5", acquired="20260601141500")
    assert choose(plain, late)[0] == "1.2.3.5"
    for number, changes in enumerate(({"contrast_bolus_agent": "OMNIPAQUE"}, {"series_description": "CTA NECK"})):
        angio = head_series(40, series="1.2.3.4", acquired="20260601140500", **changes)  # type: ignore[arg-type]
        chosen, reasons = choose(plain, late, angio)
        assert chosen == "1.2.3.2", number
        assert "acquired after a series that has" in reasons["1.2.3.5"]
    scout = [replace(one, image_type=("ORIGINAL", "PRIMARY", "LOCALIZER")) for one in angio]
    assert choose(plain, late, scout)[0] == "1.2.3.5", "an agent that is only planned"
    derived = [replace(one, image_type=("DERIVED", "SECONDARY")) for one in angio]
    assert choose(plain, late, derived)[0] == "1.2.3.5"
    untold = [replace(one, acquired="") for one in angio]
    assert choose(plain, late, untold)[0] == "1.2.3.5"
    assert choose(late, angio)[0] == "1.2.3.5", "for the gate to refuse"


def test_in_the_hour_that_clocks_show_twice_the_number_tells_what_was_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """25 October 2026 in Berlin: 02:50 of summer, and 25 minutes later 02:15 of winter."""
    first = head_series(30, series="1.2.3.10", acquired="20261025025000")
    again = [replace(one, series_number=12) for one in head_series(30, series="1.2.3.2", acquired="20261025021500")]
    assert choose(first, again)[0] == "1.2.3.10", "elsewhere that was earlier"
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        assert choose(first, again)[0] == "1.2.3.2"
        as_usual = [replace(one, acquired=one.acquired.replace("1025", "1024")) for one in (*first, *again)]
        assert choose(as_usual[:30], as_usual[30:])[0] == "1.2.3.10"
    finally:
        monkeypatch.undo()
        time.tzset()


def test_what_may_be_of_another_region_is_no_later_scan_of_the_head() -> None:
    unnamed = {"study_description": "TRAUMA", "body_part_examined": ""}
    first, other = head_series(30, series="1.2.3.2"), head_series(36, series="1.2.3.5", **unnamed)
    chosen, reasons = choose(first, other)
    assert (chosen, reasons["1.2.3.5"]) == ("1.2.3.2", "nothing says that it is of the head")
    assert choose(other)[0] == "1.2.3.5"


def test_an_alert_does_not_keep_a_series_that_is_of_less_use() -> None:
    with_contrast = head_series(30, series="1.2.3.1", contrast_bolus_agent="IOHEXOL")
    unknown = head_series(30, series="1.2.3.2", convolution_kernel="ZZZ")
    plain = head_series(30, series="1.2.3.3")
    assert choose(with_contrast, unknown, plain, alerted="1.2.3.1")[0] == "1.2.3.3"
    assert choose(with_contrast, unknown, plain, alerted="1.2.3.2")[0] == "1.2.3.3"
    thin = head_series(150, step=1.0, thickness=1.0, series="1.2.3.4")
    assert choose(plain, thin, alerted="1.2.3.4")[0] == "1.2.3.4"


@pytest.mark.parametrize(
    ("slices", "step", "without", "reason"),
    [
        (25, 5.0, (), "it covers less of the head"),
        (30, 5.0, (12,), "slices of it are missing or came twice"),
        (29, 5.1, (), "its slices are farther apart"),
    ],
)
def test_a_later_series_must_be_as_good(slices: int, step: float, without: tuple[int, ...], reason: str) -> None:
    again = head_series(slices, series="1.2.3.5", step=step)
    again = [one for one in again if one.instance_number not in without]
    chosen, reasons = choose(head_series(30, series="1.2.3.2"), again)
    assert (chosen, reasons["1.2.3.5"]) == ("1.2.3.2", reason)


@pytest.mark.parametrize(
    ("changes", "alike"),
    [
        ({}, True),
        ({"slices": 12}, True),
        ({"thickness": 1.0, "step": 1.0, "slices": 150}, False),
        ({"thickness": 1.0, "step": 1.0, "slices": 150, "acquisition_number": 2}, True),
        ({"thickness": 1.0, "step": 1.0, "slices": 150, "acquisition_number": None}, False),
        ({"contrast_bolus_agent": "IOHEXOL", "acquisition_number": 2}, False),
        ({"convolution_kernel": "ZZZ"}, False),
        ({"convolution_kernel": "BONE"}, False),
        ({"image_type": ("DERIVED", "PRIMARY", "AXIAL")}, False),
        ({"frame_of_reference_uid": "1.2.3.10"}, True),
        ({"frame_of_reference_uid": "1.2.3.10", "contrast_bolus_agent": "IOHEXOL"}, False),
    ],
)
def test_which_series_no_answer_may_be_silent_on(changes: dict[str, Any], alike: bool) -> None:
    values = dict(changes)
    other = head_series(values.pop("slices", 30), **values)
    if "frame_of_reference_uid" in values:
        other[0] = header(1, contrast_bolus_agent=values.get("contrast_bolus_agent", ""))
    series = group([*head_series(30, series="1.2.3.9"), *other])
    found = {one.series_instance_uid: one for one in select(series).considered}
    assert found["1.2.3.9"].chosen and not found["1.2.3.9"].alike
    assert found["1.2.3.1"].alike == alike
    said = not_analysed(select(series).to_json(), alike=True)
    assert said == [f"Series 1 was not analysed: {found['1.2.3.1'].reason}."] * alike


def test_a_series_has_one_frame_of_reference() -> None:
    """PS3.3 C.7.4.1. Positions of two have nothing to do with each other."""
    two = [header(n, frame_of_reference_uid="1.2.3.9" if n < 20 else "1.2.3.10") for n in range(1, 31)]
    chosen, reasons = choose(two)
    assert (chosen, reasons["1.2.3.1"]) == (None, "images in 2 frames of reference")
    # Where one is not given nobody knows of another.
    assert choose([header(n, frame_of_reference_uid="1.2.3.9" if n < 20 else "") for n in range(1, 31)])[0]


def test_plain_before_contrast() -> None:
    with_contrast = head_series(40, series="1.2.3.1", contrast_bolus_agent="IOHEXOL")
    plain = head_series(30, series="1.2.3.2")
    assert choose(with_contrast, plain)[0] == "1.2.3.2"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sop_class_uid": SECONDARY_CAPTURE}, "not CT images"),
        ({"modality": "MR"}, "Modality"),
        ({"image_type": ("ORIGINAL", "PRIMARY", "LOCALIZER")}, "localizer"),
        ({"image_type": ("DERIVED", "PRIMARY", "AXIAL")}, "not original"),
        ({"image_type": ("ORIGINAL", "SECONDARY", "AXIAL")}, "secondary"),
        ({"image_type": ()}, "not original"),
        ({"frames": ()}, "no image positions"),
        ({"rows": 0}, "different sizes"),
        ({"series_description": "C-SPINE 2MM"}, "not of the head"),
    ],
)
def test_what_is_never_analysed(changes: dict[str, object], reason: str) -> None:
    series = head_series(30, **changes)
    if "rows" in changes:
        series[3] = header(4)
    chosen, reasons = choose(series)
    assert chosen is None
    assert reason in reasons["1.2.3.1"]


def test_scouts_and_reformats_are_not_axial() -> None:
    sagittal = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
    series = [header(n, frames=(FramePlane((5.0 * n, -128.0, 0.0), sagittal, (0.5, 0.5), 5.0),)) for n in range(1, 31)]
    chosen, reasons = choose(series)
    assert chosen is None
    assert "not axial" in reasons["1.2.3.1"]


@pytest.mark.parametrize(
    ("orientation", "read"),
    [
        ((1.0, 0.0, 0.0, 0.0, 1.0, 0.0), True),
        ((-1.0, 0.0, 0.0, 0.0, 1.0, 0.0), True),  # mirrored, as some feet-first series are
        ((0.906, 0.423, 0.0, -0.423, 0.906, 0.0), True),  # 25° on the head-rest
        ((0.0, 1.0, 0.0, -1.0, 0.0, 0.0), False),
        ((0.0, -1.0, 0.0, 1.0, 0.0, 0.0), False),
        ((-1.0, 0.0, 0.0, 0.0, -1.0, 0.0), False),
    ],
)
def test_a_head_that_is_turned_in_the_image_is_not_read(orientation: tuple[float, ...], read: bool) -> None:
    series = [header(n, frames=(plane(5.0 * n, orientation=orientation),)) for n in range(1, 31)]
    chosen, reasons = choose(series)
    assert (chosen is not None) == read
    assert ("turned" in reasons["1.2.3.1"]) != read


def test_a_fragment_is_not_chosen() -> None:
    chosen, reasons = choose(head_series(4))
    assert chosen is None
    assert "only 4" in reasons["1.2.3.1"]


@pytest.mark.parametrize(
    ("maker", "kernel", "kind"),
    [
        ("GE MEDICAL SYSTEMS", "STANDARD", "soft"), ("GE MEDICAL SYSTEMS", "STD+", "soft"),
        ("GE MEDICAL SYSTEMS", "BONEPLUS", "sharp"), ("SIEMENS", "H31s", "soft"), ("SIEMENS", "Hr64h", "sharp"),
        ("SIEMENS", "J45s\\3", "soft"), ("TOSHIBA", "FC26", "soft"), ("TOSHIBA", "FC30", "sharp"),
        ("TOSHIBA", "FC68", "soft"), ("Philips", "UB", "soft"), ("Philips", "YB", "sharp"), ("ACME", "", "unknown"),
        ("ACME", "UB", "unknown"),
    ],
)  # fmt: skip
def test_kernels_by_their_makers_names(maker: str, kernel: str, kind: str) -> None:
    assert kernel_class(header(manufacturer=maker, convolution_kernel=kernel)) == kind


def test_a_scanners_whole_study(philips_phantom: Path) -> None:
    headers = []
    for path in sorted(one for one in philips_phantom.rglob("*") if one.is_file()):
        try:
            headers.append(read_header(path))
        except HeaderError:
            continue
    selection = select(group(headers))
    assert_consistent(selection)
    assert selection.series is not None
    assert selection.series.first.series_number == 201
    reasons = {one.series_number: one.reason for one in selection.considered}
    assert "localizer" in reasons[100]
    assert "thin" in reasons[202]
    assert "not CT images" in reasons[401]


def test_a_real_head_with_a_tilted_gantry(ge_head: Path) -> None:
    selection = select(group(read_header(path) for path in sorted(ge_head.glob("*.dcm"))))
    assert selection.series is not None
    assert selection.volume is not None
    assert len(selection.volume.planes) == 28
    assert selection.volume.gaps == ()
