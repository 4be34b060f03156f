"""Which objects of a verdict go to a destination, and what goes there in place of one that it does not take."""

from __future__ import annotations

from appliance.findings.render import CAPTURE, REPORT, REPORT_2D, SUMMARY, class_of, kind_of, objects_for
from appliance.ledger.records import Verdict
from appliance.settings import ImageDestination

_FORMS = (REPORT, REPORT_2D, SUMMARY)
"""What says the same, the fullest first."""


def routed(destination: ImageDestination, verdict: Verdict, *, pictured: bool = False) -> dict[str, int]:
    """The objects that go to a destination from the start → the urgency of each, by the order of its `objects`.

    Of the forms of a report it gets one. Of a negative study there is nothing to show, so its picture only stands in
    for a report, or against pictures.

    Args:
        pictured: an earlier verdict was positive, and pictures of it went where they are wanted.
    """
    wanted: dict[str, int] = {kind: 10 * place for place, kind in enumerate(destination.objects, start=1)}
    form = report_form(destination)
    found = {}
    for name in objects_for(verdict):
        urgency = wanted.get(kind_of(name))
        if kind_of(name) == REPORT:
            urgency = urgency if name == form else None
        elif name == SUMMARY and form == SUMMARY:
            urgency = wanted.get(CAPTURE, wanted[REPORT])
        elif name == SUMMARY and form and not (verdict.positive or pictured):
            urgency = None
        if urgency is not None and class_of(name) in destination.sop_classes:
            found[name] = urgency
    return found


def forms_not_analysed(destination: ImageDestination, *, pictured: bool) -> tuple[str, ...]:
    """In what form a destination is told from the start that a study was not analysed.

    Args:
        pictured: an earlier verdict was positive; where its pictures went, one goes that takes them back.
    """
    form = report_form(destination)
    shown = CAPTURE in destination.objects and class_of(SUMMARY) in destination.sop_classes
    both = (form, SUMMARY if shown and (pictured or not form) else "")
    return tuple(dict.fromkeys(name for name in both if name))


def report_form(destination: ImageDestination) -> str:
    """The form in which a destination gets reports from the start; '' if it gets none."""
    if REPORT not in destination.objects:
        return ""
    return next((name for name in _FORMS if class_of(name) in destination.sop_classes), "")


def in_place_of(destination: ImageDestination, name: str) -> tuple[str, ...]:
    """What a destination may get that declines an object, the best first."""
    if name not in _FORMS:
        return ()
    return tuple(one for one in _FORMS[_FORMS.index(name) + 1 :] if class_of(one) in destination.sop_classes)


def classes_of(destination: ImageDestination) -> dict[str, tuple[str, ...]]:
    """Kind of objects that a destination wants → keywords of the classes that they may come in, the best first."""
    found: dict[str, tuple[str, ...]] = {}
    for kind in destination.objects:
        names = _FORMS if kind == REPORT else (kind,)
        found[kind] = tuple(one for one in map(class_of, names) if one in destination.sop_classes)
    return found


def needs_2d(destination: ImageDestination) -> bool:
    """Whether a destination may come to need reports without coordinates in space."""
    return REPORT in destination.objects and class_of(REPORT_2D) in destination.sop_classes


def needs_summary(destination: ImageDestination) -> bool:
    """Whether a destination may come to need reports as pictures."""
    return REPORT in destination.objects and class_of(SUMMARY) in destination.sop_classes
