"""Whatever a destination is set to take: nothing else goes there, and of a report one form."""

from __future__ import annotations

from typing import get_args

from hypothesis import given
from hypothesis import strategies as st

from appliance.findings.render import KINDS, REPORT, REPORT_2D, SUMMARY, class_of, kind_of, objects_for
from appliance.services.routing import classes_of, in_place_of, needs_2d, report_form, routed
from appliance.settings import DicomDestination, SopClass
from tests.findings_support import Series, renamed, verdict_on

FORMS = (REPORT, REPORT_2D, SUMMARY)
VERDICT = verdict_on(Series({}, "1.2", "1.3"))


def destination(objects: list[str], classes: list[str]) -> DicomDestination:
    return DicomDestination.model_validate(
        {"kind": "dicom", "name": "p", "ae_title": "P", "host": "h", "port": 104, "objects": objects}
        | {"sop_classes": classes}
    )


@given(
    objects=st.lists(st.sampled_from(KINDS), unique=True),
    classes=st.lists(st.sampled_from(get_args(SopClass)), unique=True),
    positive=st.booleans(),
)
def test_nothing_goes_where_it_is_not_taken(objects: list[str], classes: list[str], positive: bool) -> None:
    there = destination(objects, classes)
    verdict = renamed(VERDICT, positive=positive) if positive else renamed(VERDICT, positive=False, key_slabs=())
    found = routed(there, verdict)
    assert set(found) <= set(objects_for(verdict))
    assert {class_of(name) for name in found} <= set(classes)
    wanted = {*objects, *({"capture"} if REPORT in objects else set())}
    assert {kind_of(name) for name in found} <= wanted
    # Of a report one form, the best that is taken; the summary beside it only where pictures are wanted of a bleed.
    forms = [name for name in FORMS if class_of(name) in classes] if REPORT in objects else []
    assert report_form(there) == (forms[0] if forms else "")
    assert [name for name in (REPORT, REPORT_2D) if name in found] == [one for one in forms[:1] if one != SUMMARY]
    if forms:
        assert forms[0] in found
        assert SUMMARY not in found or forms[0] == SUMMARY or (positive and "capture" in objects)
    # In the order of `objects`.
    kinds = [kind_of(name) for name in sorted(found, key=lambda name: found[name]) if kind_of(name) in objects]
    assert kinds == sorted(kinds, key=objects.index)
    for name in FORMS:
        instead = in_place_of(there, name)
        assert set(instead) <= set(FORMS[FORMS.index(name) + 1 :]) and {class_of(one) for one in instead} <= set(
            classes
        )
    assert needs_2d(there) == (REPORT_2D in forms)
    for kind, ways in classes_of(there).items():
        assert kind in objects and set(ways) <= set(classes)


def test_only_reports_have_a_stand_in() -> None:
    there = destination(list(KINDS), list(get_args(SopClass)))
    assert in_place_of(there, REPORT) == (REPORT_2D, SUMMARY)
    assert in_place_of(there, REPORT_2D) == (SUMMARY,)
    for name in ("segmentation", "capture.1", SUMMARY, "presentation.1", "selection", "alert.er"):
        assert in_place_of(there, name) == ()
