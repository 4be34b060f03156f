"""A site's own form of the alert: a Jinja2 template over the standard message, and what no template may change.

A template writes segments, one a line. Every value that it prints is escaped for HL7 (chapter 2.7); what is ER7
already, as the standard segments are, stands as it is. It runs in Jinja2's sandbox, with nothing of the box in reach.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

LONGEST = 256 * 1024
"""Characters of a message; more is a template that has lost its way."""
_FIXED = {
    2: "separators",
    9: "message type",
    10: "control id",
    11: "processing id",
    12: "version",
    15: "accept acknowledgement",
    16: "application acknowledgement",
    18: "character set",
}
"""Fields of MSH that stay as they are."""
_ESCAPES = str.maketrans({"\\": "\\E\\", "|": "\\F\\", "^": "\\S\\", "&": "\\T\\", "~": "\\R\\"})
_BREAKS = re.compile(r"\r\n|\r|\n")


class MappingError(ValueError):
    """A template that cannot be used, or whose message says what it may not, or does not say what it must."""


class Er7(str):
    """What is ER7 already: printed as it is."""


class Segment(Er7):
    """A segment of the standard message.

    Attributes:
        name, code, value: such as OBX, the code of its OBX-3, and its OBX-5; "" in other segments.
    """

    @property
    def name(self) -> str:
        return self.split("|", 1)[0]

    @property
    def code(self) -> str:
        return _field(self, 3).split("^")[0] if self.name == "OBX" else ""

    @property
    def value(self) -> Er7:
        return Er7(_field(self, 5) if self.name == "OBX" else "")


def with_field(segment: str, number: int, *components: object) -> Segment:
    """The segment with another value in one field, of these components, each escaped. MSH-1 and MSH-2 stay."""
    first = 2 if segment.startswith("MSH|") else 0
    if not isinstance(number, int) or not max(1, first + 1) <= number <= 100:
        raise MappingError(f"there is no field {number} to set")
    place = number - 1 if first else number
    fields = segment.split("|")
    fields += [""] * (place + 1 - len(fields))
    fields[place] = "^".join(escaped(one) for one in components)
    return Segment("|".join(fields).rstrip("|"))


def escaped(value: object) -> str:
    r"""Text for one component; line breaks become \.br\, other control characters spaces."""
    if isinstance(value, Er7):
        return str(value)
    lines = _BREAKS.split("" if value is None else str(value))
    plain = ("".join(one if one.isprintable() else " " for one in line).translate(_ESCAPES) for line in lines)
    return "\\.br\\".join(plain)


_environment = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined, finalize=escaped, autoescape=False, trim_blocks=True, lstrip_blocks=True
)
_environment.filters["field"] = with_field


@lru_cache(maxsize=64)
def _compiled(template: str) -> Any:
    return _environment.from_string(template)


def check_template(template: str) -> None:
    """Raise a MappingError, with its line, if a template cannot be read."""
    try:
        _compiled(template)
    except TemplateError as error:
        raise MappingError(_said(error)) from error


def mapped(template: str, standard: str, facts: Mapping[str, object]) -> str:
    r"""The message as a template writes it over the standard one, which it may not contradict.

    NTE-1 and OBX-1 are numbered anew; empty lines are left out.

    Args:
        standard: our message, segments ended by \r.
        facts: values that the template may print, beside the segments of the standard message: MSH, PID, PV1, ORC, OBR,
            TQ1 ("" where there is none), and the lists NTE and OBX.

    Raises:
        MappingError: the template fails, or its message is against `broken_rule`.
    """
    segments = [Segment(line) for line in standard.split("\r") if line]
    single = {name: Segment("") for name in ("MSH", "PID", "PV1", "ORC", "OBR", "TQ1")}
    single |= {one.name: one for one in segments if one.name in single}
    lists = {name: [one for one in segments if one.name == name] for name in ("NTE", "OBX")}
    try:
        text = _compiled(template).render({**facts, **single, **lists})
    except TemplateError as error:
        raise MappingError(_said(error)) from error
    except MappingError:
        raise
    except Exception as error:
        # A division by zero, a missing index: whatever a template does.
        raise MappingError(f"it stumbles: {type(error).__name__}") from error
    if len(text) > LONGEST:
        raise MappingError(f"the message has more than {LONGEST} characters")
    if re.search(r"[\x00-\x09\x0b\x0c\x0e-\x1f]", text):
        raise MappingError("the template writes a control character")
    counts = {"NTE": 0, "OBX": 0}
    lines = []
    for line in _BREAKS.split(text):
        name = line.split("|", 1)[0].strip()
        if not line.strip():
            continue
        if name in counts:
            counts[name] += 1
            fields = line.split("|")
            line = "|".join([name, str(counts[name]), *fields[2:]])
        lines.append(line.strip())
    message = "".join(line + "\r" for line in lines)
    if why := broken_rule(message, standard):
        raise MappingError(why)
    return message


def broken_rule(message: str, standard: str) -> str:
    """What a message says that it may not, or leaves out that it must say; "" if nothing.

    The type, control id, processing id (so that a test stays one), version, acknowledgement and character set are
    those of the standard message, and so are the patient's identifiers. Every result is preliminary. Every note is
    there: that it is triage only, the package's notice, and what an earlier alert is now. The study and the kind of
    message stand in an observation. An alert flags a finding, a message that takes it back does not.
    """
    ours, theirs = _split(standard), _split(message)
    if [one[0] for one in theirs].count("MSH") != 1 or theirs[0][0] != "MSH":
        return "the message does not begin with its one MSH segment"
    for number, what in _FIXED.items():
        # MSH-1 is the separator itself.
        if _at(theirs[0], number - 1) != _at(ours[0], number - 1):
            return f"MSH-{number} ({what}) is not {_at(ours[0], number - 1) or 'empty'}"
    identifiers = next(_at(one, 3) for one in ours if one[0] == "PID")
    if [_at(one, 3) for one in theirs if one[0] == "PID"] != [identifiers]:
        return "PID-3 does not hold the patient's identifiers as they are in the images"
    statuses = [("OBR-25", _at(one, 25)) for one in theirs if one[0] == "OBR"]
    if not statuses:
        return "there is no OBR segment"
    statuses += [("OBX-11", _at(one, 11)) for one in theirs if one[0] == "OBX"]
    for place, status in statuses:
        if status != "P":
            return f"{place} is {status or 'empty'}: every result is preliminary (P)"
    notes = {_at(one, 3) for one in theirs if one[0] == "NTE"}
    for note in (_at(one, 3) for one in ours if one[0] == "NTE"):
        if note not in notes:
            # Its beginning only: what follows a colon may be of the patient, and this is logged.
            return f"a note is missing: {note.partition(':')[0][:80]!r}"
    said = [(_at(one, 3).split("^")[0], _at(one, 5)) for one in theirs if one[0] == "OBX"]
    for one in ours:
        code = _at(one, 3).split("^")[0]
        if one[0] == "OBX" and code in ("113014", "MESSAGE-KIND") and (code, _at(one, 5)) not in said:
            return f"the observation {_at(one, 3)} is missing or says something else"
    flagged = any(_at(one, 8) for one in ours if one[0] == "OBX")
    if not flagged and any(_at(one, 8) for one in theirs if one[0] == "OBX"):
        return "OBX-8 flags a finding where there is none"
    if flagged and not any(_at(one, 8) for one in theirs if one[0] == "OBX"):
        return "no OBX-8 flags the finding"
    return ""


def _split(message: str) -> list[list[str]]:
    return [line.split("|") for line in message.split("\r") if line] or [[""]]


def _at(fields: list[str], number: int) -> str:
    return fields[number] if number < len(fields) else ""


def _field(segment: str, number: int) -> str:
    return _at(segment.split("|"), number)


def _said(error: TemplateError) -> str:
    line = getattr(error, "lineno", None)
    return f"line {line}: {error.message}" if line else str(error.message)
