"""What the gate makes of what orders say: they may give what the images lack, and never overrule them."""

from __future__ import annotations

from dataclasses import replace
from datetime import date, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.governance.indication import Criterion, admit
from appliance.governance.ordered import NOTHING_ORDERED, Ordered, accessions, match_orders
from appliance.ledger.orders import Identifier, Order, Patient
from dicom_io.header import Header
from dicom_io.volume import assemble, planes_of
from tests.appliance.governance.test_indication import PACKAGE, with_rules
from tests.builders import head_series, header

CAME = "2026-06-01T10:00:00.000000+00:00"
P1 = (Identifier("P1", "HOSP"),)


def an_order(number: int = 1, **changes: Any) -> Order:
    base = Order(
        id=number, accession="A1", study_instance_uid="", patient=P1, cancelled=False, birth_date="", birth_source="",
        patient_source=f"PID-3 of order {number}",
        priority="R", urgent=False, reason="", onset="", onset_earliest="", onset_latest="",
    )  # fmt: skip
    born = changes.get("birth_date")
    return replace(base, **changes, birth_source=f"PID-7 of order {number}" if born else "")


def judged(series: list[Header], ordered: Ordered, package: Any = PACKAGE) -> dict[str, Criterion]:
    volume = assemble([one for member in series for one in planes_of(member)])
    found = admit(package, series, volume, len(volume.planes), (), date(2026, 6, 1), ordered)
    return {one.criterion: one for one in found.criteria}


# Age


@pytest.mark.parametrize(
    ("age", "born", "ordered", "outcome", "value"),
    [
        ("", "", "19610101", "met", "65 years by PID-7 of order 1"),
        ("", "", "20190101", "violated", "7 years by PID-7 of order 1"),
        ("", "", "", "unknown", ""),
        ("065Y", "19610101", "19610101", "met", None),
        ("065Y", "", "19610101", "met", None),
        ("065Y", "19610101", "19610102", "unknown", None),  # one of them is somebody else's
        ("065Y", "", "19800101", "unknown", None),
        ("", "19610101", "19620101", "unknown", None),
        ("", "19610101", "20190101", "violated", None),
        ("065Y", "", "20190101", "violated", None),
        ("009Y", "", "19610101", "violated", None),
        ("", "nonsense", "19610101", "unknown", None),
        ("", "", "19000101", "unknown", None),
        ("", "", "20270101", "unknown", None),
    ],
)
def test_an_order_gives_the_age_that_the_images_lack_and_never_overrules_them(
    age: str, born: str, ordered: str, outcome: str, value: str | None
) -> None:
    series = head_series(patient_age=age, patient_birth_date=born)
    found = judged(series, Ordered((an_order(birth_date=ordered),), (), CAME))["age"]
    assert found.outcome == outcome
    assert ("PID-7 of order 1" in found.attribute) is bool(ordered)
    if value is not None:
        assert found.value == value


def test_two_orders_that_disagree_leave_the_age_unknown() -> None:
    series = head_series(patient_age="", patient_birth_date="19610101")
    both = (an_order(1, birth_date="19610101"), an_order(2, birth_date="19630101"))
    assert judged(series, Ordered(both, (), CAME))["age"].outcome == "unknown"


days = st.dates(date(1890, 1, 1), date(2027, 1, 1))


@settings(deadline=None)
@given(born=days | st.none(), ordered=days, age=st.sampled_from(["", "017Y", "018Y", "065Y", "nonsense"]))
def test_an_order_lets_nobody_in_whom_the_images_alone_would_keep_out(
    born: date | None, ordered: date, age: str
) -> None:
    """What images and order say together is never more than the lesser of what either says."""
    birth = born.strftime("%Y%m%d") if born else ""
    series = head_series(2, patient_age=age, patient_birth_date=birth)
    alone = judged(series, NOTHING_ORDERED)["age"].outcome
    bare = head_series(2, patient_age="", patient_birth_date="")
    by_order = judged(bare, Ordered((an_order(birth_date=ordered.strftime("%Y%m%d")),), (), CAME))["age"].outcome
    together = judged(series, Ordered((an_order(birth_date=ordered.strftime("%Y%m%d")),), (), CAME))["age"].outcome
    if age or birth:
        assert together != "met" or (alone == "met" and by_order == "met")
        assert together == "violated" or "violated" not in (alone, by_order)
        assert together != "met" or not born or born == ordered
    else:
        assert together == by_order


# The patient


def test_an_order_of_another_patient_with_the_studys_number_refuses_it() -> None:
    found = judged(head_series(), Ordered((), (an_order(7),), CAME))["patient"]
    assert found.outcome == "violated"
    assert "another one in PID-3 of order 7" in found.value and "PID-3 of order 7" in found.attribute
    assert judged(head_series(), Ordered((an_order(7),), (), CAME))["patient"].outcome == "met"


def matched(said: Header, *orders: Order, merges: dict[Identifier, Identifier] | None = None) -> Ordered:
    def names(patient: Patient) -> Patient:
        return (*patient, *((merges or {})[one] for one in patient if one in (merges or {})))

    return match_orders([said], orders, names, "", CAME)


@pytest.mark.parametrize(
    ("identifier", "issuer", "ordered", "ours", "others"),
    [
        ("P1", "HOSP", Identifier("P1", "HOSP"), 1, 0),
        ("P1", "hosp", Identifier("P1", "HOSP"), 1, 0),
        ("P1", "1.2.3", Identifier("P1", "HOSP", "1.2.3"), 1, 0),
        ("P1", "", Identifier("P1", "HOSP"), 1, 0),
        ("P1", "HOSP", Identifier("P1"), 1, 0),
        ("P1", "HOSP", Identifier("P2", "HOSP"), 0, 1),
        ("P1", "", Identifier("P2", "HOSP"), 0, 1),
        ("P1", "HOSP", Identifier("P1", "OTHER"), 0, 0),  # another hospital's number, by chance the same
        ("P1", "HOSP", Identifier("P2", "OTHER"), 0, 0),
        ("", "HOSP", Identifier("P1", "HOSP"), 0, 0),
    ],
)
def test_an_order_is_the_studys_by_patient_and_issuer(
    identifier: str, issuer: str, ordered: Identifier, ours: int, others: int
) -> None:
    said = header(patient_id=identifier, issuer_of_patient_id=issuer, accession_number="A1")
    found = matched(said, an_order(patient=(ordered,)))
    assert (len(found.orders), len(found.others)) == (ours, others)


def test_any_of_a_patients_identifiers_will_do_and_merges_are_followed() -> None:
    said = header(patient_id="P1", issuer_of_patient_id="HOSP")
    both = an_order(patient=(Identifier("E9", "STATE"), Identifier("P1", "HOSP")))
    assert matched(said, both).orders == (both,)
    new, old = Identifier("P2", "HOSP"), Identifier("P1", "HOSP")
    moved = an_order(patient=(new,))
    assert matched(said, moved).others == (moved,)
    assert matched(said, moved, merges={old: new}).orders == (moved,)
    assert matched(header(patient_id="P2"), an_order(), merges={old: new}).orders == (an_order(),)


def test_what_was_cancelled_says_nothing() -> None:
    said = header(patient_id="P1")
    assert matched(said, an_order(cancelled=True)) == Ordered((), (), CAME)
    assert matched(said, an_order(cancelled=True, patient=(Identifier("P2"),))).others == ()


def test_the_numbers_of_a_study_are_those_of_its_images() -> None:
    assert accessions([header(accession_number=one) for one in ("A1 ", "", "A1", "A2")]) == ("A1", "A2")


# Onset

WITH_ONSET = with_rules(maximum_hours_since_onset=24.0)


def at(hours_before: float) -> str:
    from datetime import datetime

    return (datetime.fromisoformat(CAME) - timedelta(hours=hours_before)).isoformat()


@pytest.mark.parametrize(
    ("earliest", "latest", "outcome", "value"),
    [
        (2.5, 2.5, "met", "2.5 hours by OBX-5 of order 1"),
        (24.0, 24.0, "met", "24.0 hours by OBX-5 of order 1"),
        (30.0, 29.9, "violated", "29.9 to 30.0 hours by OBX-5 of order 1"),
        (25.0, 1.0, "unknown", "1.0 to 25.0 hours by OBX-5 of order 1"),
        (14.0, -10.0, "met", "0.0 to 14.0 hours by OBX-5 of order 1"),  # "today"
        (-1.0, -2.0, "unknown", "after the images by OBX-5 of order 1"),
    ],
)
def test_hours_since_onset(earliest: float, latest: float, outcome: str, value: str) -> None:
    order = an_order(onset="said", onset_earliest=at(earliest), onset_latest=at(latest))
    found = judged(head_series(), Ordered((order,), (), CAME), WITH_ONSET)["onset"]
    assert (found.outcome, found.value) == (outcome, value)


def test_an_onset_that_is_not_said_or_cannot_be_read_is_unknown() -> None:
    for orders in ((), (an_order(),), (an_order(onset="this morning"),)):
        assert judged(head_series(), Ordered(orders, (), CAME), WITH_ONSET)["onset"].outcome == "unknown"
    assert "onset" not in judged(head_series(), NOTHING_ORDERED)
