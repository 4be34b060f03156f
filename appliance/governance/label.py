"""What a model package may be used on, as its maker's label says it; a site may make that less, never more."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from datetime import date
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from appliance.settings import SettingsError

_CONFIG = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[float, Field(gt=0)]
Span = tuple[Positive, Positive]
AgeText = Annotated[str, StringConstraints(pattern=r"^(0|[1-9]\d{0,3}) (days|weeks|months|years)$")]
RULES: dict[str, tuple[str, ...]] = {
    "modality": ("modality",),
    "sop_class": ("sop_classes",),
    "body_part": ("body_parts",),
    "age": ("minimum_age", "maximum_age"),
    "contrast": ("contrast",),
    "scanner": ("scanners", "excluded_scanners"),
    "kvp": ("kvp",),
    "slice_thickness": ("slice_thickness_mm",),
    "spacing": ("slice_spacing_mm",),
    "kernel": ("kernels", "excluded_kernels"),
    "tilt": ("maximum_tilt_degrees",),
    "coverage": ("minimum_coverage_mm",),
    "slabs": ("minimum_slabs",),
    "duplicates": ("duplicate_slices",),
    "order": ("misordered_slices",),
    "onset": ("maximum_hours_since_onset",),
    "brain": ("minimum_brain_ml",),
}
"""Criterion → the keys of the label that limit it; the package's ``intended_use`` is one more."""

_DAYS_OF_MONTH = 30.436875
_MONTHS = {"months": 1, "years": 12}
_WEEKS = {"days": 1, "weeks": 7}
_UNITS = {"D": "days", "W": "weeks", "M": "months", "Y": "years"}


class Age(NamedTuple):
    """An age as people state it: so many completed units, so that "17 years" lasts until the 18th birthday."""

    number: int
    unit: str

    @classmethod
    def of(cls, text: str) -> Age:
        """From "18 years", or from DICOM's age string "018Y" (PS3.5 6.2, VR AS). ValueError if it is neither.

        Some devices leave out zeros in front ("18Y"), or write a small letter.
        """
        if stated := re.fullmatch(r"([0-9]{1,3})([DWMY])", text.strip().upper()):
            return cls(int(stated[1]), _UNITS[stated[2]])
        if stated := re.fullmatch(r"(\d+) (days|weeks|months|years)", text):
            return cls(int(stated[1]), stated[2])
        raise ValueError(f"{text!r} is no age")

    @property
    def next(self) -> Age:
        """One unit more."""
        return Age(self.number + 1, self.unit)

    def has_reached(self, limit: Age) -> bool | None:
        """Whether who is of this age has reached that one; None if some of them have and some have not."""
        for family in (_MONTHS, _WEEKS):
            if self.unit in family and limit.unit in family:
                first, end, wanted = self.number * family[self.unit], self.next.number * family[self.unit], limit.number
                wanted *= family[limit.unit]
                return True if first >= wanted else False if end <= wanted else None
        if self.days()[0] >= limit.days()[1]:
            return True
        return False if self.next.days()[1] <= limit.days()[0] else None

    def days(self) -> tuple[int, int]:
        """The fewest and the most days after birth on which it can be reached."""
        if self.unit in _WEEKS:
            return self.number * _WEEKS[self.unit], self.number * _WEEKS[self.unit]
        # So many months are never three days off the mean: 28 to 31 days make one, 1460 or 1461 four years.
        mean = self.number * _MONTHS[self.unit] * _DAYS_OF_MONTH
        return (math.floor(mean) - 3, math.ceil(mean) + 3) if self.number else (0, 0)

    def reached_on(self, born: date) -> date:
        """The day on which somebody born on that day reaches it; 1 March for a birthday that the year has not.

        Raises: OverflowError or ValueError if the calendar ends before.
        """
        if self.unit in _WEEKS:
            return date.fromordinal(born.toordinal() + self.days()[0])
        year, month = divmod(born.year * 12 + born.month - 1 + self.number * _MONTHS[self.unit], 12)
        try:
            return date(year, month + 1, born.day)
        except ValueError:
            return date(year + (month == 11), (month + 1) % 12 + 1, 1)

    def __str__(self) -> str:
        return f"{self.number} {self.unit}"


@dataclass(frozen=True, slots=True, config=_CONFIG)
class Limitation:
    """What a label rules out and no header shows; said with each verdict, held against nothing."""

    text: Text
    clause: Text


@dataclass(frozen=True, slots=True, config=_CONFIG)
class Indication:
    """What the package may be used on, for the gate to hold a study against. Ranges include both ends.

    A key that may be left out limits nothing then.

    Attributes:
        body_parts: Body Part Examined terms (PS3.16 annex L) for the head: the one region that this box can tell.
        minimum_age: such as "18 years"; it counts from the birthday on.
        maximum_age: the highest age in completed units: "21 years" lets in who turned 21 and not yet 22.
        contrast: whether a contrast agent may have been given.
        scanners: "GE", or with a pattern for the model "GE/Revolution*": only these (`scanner_matches`).
        excluded_scanners: none of these.
        slice_spacing_mm: distance between neighbouring slices, from their positions.
        kernels: patterns for Convolution Kernel, such as "H3*" (case makes no difference): only these.
        excluded_kernels: none of these.
        maximum_tilt_degrees: of the gantry against the patient's long axis.
        minimum_slabs: slabs of the model's thickness.
        minimum_brain_ml: soft tissue within the skull, which only the pixels show.
        duplicate_slices: whether slices may have been sent twice.
        misordered_slices: whether the instance numbers may jump as the slices go along the head.
        maximum_hours_since_onset: as the order says it.
        clauses: criterion → where in the label its rule stands; one for each criterion that the label limits.
        limitations: what else the label rules out.
    """

    modality: Annotated[tuple[Text, ...], Field(min_length=1)]
    sop_classes: Annotated[tuple[Text, ...], Field(min_length=1)]
    body_parts: Annotated[tuple[Literal["HEAD", "BRAIN", "SKULL"], ...], Field(min_length=1)]
    minimum_age: AgeText
    kvp: Span
    slice_thickness_mm: Span
    contrast: bool
    minimum_slabs: Annotated[int, Field(ge=1)]
    minimum_coverage_mm: Positive
    minimum_brain_ml: Annotated[float, Field(ge=0)]
    clauses: dict[str, Text]
    maximum_age: AgeText | None = None
    scanners: tuple[Text, ...] = ()
    excluded_scanners: tuple[Text, ...] = ()
    slice_spacing_mm: Span | None = None
    kernels: tuple[Text, ...] = ()
    excluded_kernels: tuple[Text, ...] = ()
    maximum_tilt_degrees: Annotated[float, Field(ge=0, le=90)] | None = None
    duplicate_slices: bool = True
    misordered_slices: bool = True
    maximum_hours_since_onset: Positive | None = None
    limitations: tuple[Limitation, ...] = ()

    def limits(self, criterion: str) -> bool:
        """Whether the label limits it at all."""
        return criterion == "contrast" or any(_limits(getattr(self, key)) for key in RULES[criterion])

    @model_validator(mode="after")
    def _agrees(self) -> Indication:
        for name in ("kvp", "slice_thickness_mm", "slice_spacing_mm"):
            low, high = getattr(self, name) or (0, 0)
            if low > high:
                raise ValueError(f"{name} runs from {low} down to {high}")
        for rule in (*self.scanners, *self.excluded_scanners):
            if not _split(rule)[0]:
                raise ValueError(f"{rule!r} names no maker")
        youngest, oldest = Age.of(self.minimum_age), Age.of(self.maximum_age or "999 years")
        if oldest.has_reached(youngest) is False:
            raise ValueError(f"maximum_age is {oldest}, minimum_age {youngest}")
        limited = {"intended_use", *filter(self.limits, RULES)}
        for criterion in sorted(limited - set(self.clauses)):
            raise ValueError(f"clauses: where does the label speak of {criterion}?")
        for criterion in sorted(set(self.clauses) - limited):
            raise ValueError(f"clauses: {criterion} has a clause and no rule")
        return self


_SCHEMA = TypeAdapter(Indication)
_NARROWED = "narrowed by this site ([[limit]] in its settings)"


def narrowed(indication: Indication, limit: Mapping[str, Any]) -> Indication:
    """The label with a site's own limits; what they exclude is added to what it excludes, the rest takes its place.

    Args:
        limit: keys of the label with their values.

    Raises:
        SettingsError: naming the key that a label has not, whose value is wrong, or that would widen the label.
    """
    stated = asdict(indication)
    known = {key for keys in RULES.values() for key in keys}
    for key in limit:
        if key not in known:
            raise _refused(key, "a label has no such key", f"it has {', '.join(sorted(known))}")
    merged = {key: [*stated[key], *value] if key.startswith("excluded_") and isinstance(value, list) else value
              for key, value in limit.items()}  # fmt: skip
    clauses = dict(stated["clauses"])
    for criterion, keys in RULES.items():
        if set(keys) & set(limit):
            said = clauses.pop(criterion, "")
            if criterion == "contrast" or any(_limits(merged.get(key, stated[key])) for key in keys):
                clauses[criterion] = f"{said}; {_NARROWED}" if said else _NARROWED
    try:
        wanted = _SCHEMA.validate_json(json.dumps({**stated, "clauses": clauses, **merged}, default=str))
    except ValidationError as error:
        said = "; ".join(
            f"{'.'.join(map(str, one['loc']))}: {one['msg'].removeprefix('Value error, ')}" for one in error.errors()
        )
        raise _refused("", said, "correct it") from error
    for key in limit:
        ours, theirs = getattr(wanted, key), getattr(indication, key)
        if not _is_within(key, ours, theirs):
            raise _refused(
                key, f"{_shown(ours)} is wider than the label's {_shown(theirs)}", "a site can only narrow a label"
            )
    return wanted


def _limits(value: Any) -> bool:
    return not (value is None or value is True or value in ((), []))


def _refused(key: str, what: str, remedy: str) -> SettingsError:
    return SettingsError(f"limit.{key}: {what}" if key else f"limit: {what}", "", remedy)


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _is_within(key: str, ours: Any, theirs: Any) -> bool:
    """Whether what the site lets in by a key is part of what the label lets in."""
    if not _limits(theirs) or key.startswith("excluded_"):
        return True
    if key == "minimum_age":
        return Age.of(ours).has_reached(Age.of(theirs)) is True
    if key == "maximum_age":
        return ours is not None and Age.of(theirs).next.has_reached(Age.of(ours).next) is True
    if key.startswith("minimum_"):
        return bool(ours >= theirs)
    if key.startswith("maximum_"):
        return ours is not None and bool(ours <= theirs)
    if key in ("kvp", "slice_thickness_mm", "slice_spacing_mm"):
        return ours is not None and bool(theirs[0] <= ours[0] and ours[1] <= theirs[1])
    if isinstance(theirs, bool):
        return ours is theirs
    covers = _covers_scanner if key == "scanners" else _covers if key == "kernels" else str.__eq__
    return bool(ours) and all(any(covers(their, our) for their in theirs) for our in ours)


def _covers(wide: str, narrow: str) -> bool:
    """Whether a pattern matches all that another one does; False where it cannot be told."""
    wide, narrow = wide.upper(), narrow.upper()
    return wide == narrow or (not set("?[") & set(wide) and fnmatchcase(narrow, wide))


def _covers_scanner(wide: str, narrow: str) -> bool:
    (their_maker, their_model), (our_maker, our_model) = _split(wide), _split(narrow)
    return their_maker == our_maker and _covers(their_model, our_model)


# --- scanners and kernels -------------------------------------------------------------------------------

_MAKERS = (
    (r"G ?E|G ?E (MED|HEALTH|MR|CGR|YMS|YOKOGAWA).*|GEMS.*|GEHC.*|GENERAL ELECTRIC.*", "GE"),
    (r"SIEMENS.*", "SIEMENS"),
    (r"PHILIPS.*|MARCONI.*", "PHILIPS"),
    # The same company: renamed in 2018.
    (r"TOSHIBA.*|CANON.*", "CANON"),
    (r"UNITED ?IMAGING.*|UIH.*|SHANGHAI UNITED IMAGING.*", "UNITED IMAGING"),
)  # fmt: skip


@lru_cache(maxsize=1024)
def maker(manufacturer: str) -> str:
    """One name for the spellings of Manufacturer that one company's scanners send; any other as it is, in capitals."""
    words = re.sub(r"[\W_]+", " ", manufacturer.upper()).strip()
    return next((name for pattern, name in _MAKERS if re.fullmatch(pattern, words)), words)


def _split(rule: str) -> tuple[str, str]:
    who, _, model = rule.partition("/")
    return maker(who), model.strip() or "*"


@lru_cache(maxsize=4096)
def scanner_matches(rules: tuple[str, ...], manufacturer: str, model: str) -> bool | None:
    """Whether a scanner is one of those that the rules name; None if it does not say enough of itself.

    Args:
        rules: "MAKER" or "MAKER/PATTERN", the pattern for Manufacturer's Model Name with * ? [].
    """
    who = maker(manufacturer)
    answers: list[bool | None] = []
    for rule in rules:
        wanted, pattern = _split(rule)
        if not who:
            answers.append(None)
        elif who != wanted and not who.startswith(f"{wanted} "):  # "ACME" is also ACME INC
            answers.append(False)
        elif pattern == "*" or model.strip():
            answers.append(fnmatchcase(model.strip().upper(), pattern.upper()))
        else:
            answers.append(None)
    return True if True in answers else None if None in answers else False


@lru_cache(maxsize=4096)
def kernel_matches(patterns: tuple[str, ...], kernel: str) -> bool:
    r"""Whether a Convolution Kernel is one of those, as a whole or by one value ("J40s\3" is J40s, strength 3)."""
    values = [kernel, *kernel.split("\\")]
    return any(fnmatchcase(value.strip().upper(), pattern.upper()) for value in values for pattern in patterns)


_FIELDS = {field.name for field in fields(Indication)}
assert {key for keys in RULES.values() for key in keys} == _FIELDS - {"clauses", "limitations"}
