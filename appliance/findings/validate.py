"""Whether a message is HL7 v2.5.1: judged by hl7apy, which did not write it."""

from __future__ import annotations

import re

from hl7apy.consts import VALIDATION_LEVEL
from hl7apy.exceptions import HL7apyException, MaxLengthReached
from hl7apy.parser import parse_message, parse_segment

_LONGEST_TEXT = 65536
"""Characters of a TX or FT value (HL7 v2.5.1, 2.A.31 and 2.A.78)."""
_TEXT = re.compile(r"(?:\\(?:[FSTREHN]|\.[a-z]{2}[+-]?\d*|X(?:[0-9A-Fa-f]{2})+)\\|[^\\^~&])*")
"""Text whose delimiters are escaped, with the escapes of 2.7."""


def fault(message: str) -> str:
    r"""What is wrong with a message (ER7, segments ended by \r), or '' if nothing is.

    Structure, data types and lengths of v2.5.1 as hl7apy knows them, at its strict level; and that it reads what we
    wrote, segment for segment. It knows no tables: a code that is none, such as a wrong OBX-2, passes. The answer
    holds no value of the message: it is logged, and a value may name a patient.
    """
    text = message.rstrip("\r")
    for segment in text.split("\r"):
        if what := _wrong_text(segment):
            return what
    text = "\r".join(map(_without_text, text.split("\r")))
    try:
        parsed = parse_message(text, validation_level=VALIDATION_LEVEL.STRICT, find_groups=True)
        parsed.validate()
        read = parsed.to_er7().rstrip("\r").split("\r")
    except (HL7apyException, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        return _said(error)
    for ours, theirs in zip(text.split("\r"), read, strict=False):
        if ours != theirs:
            return f"segment {ours[:3]} is read otherwise than it was written"
    return "" if len(read) == text.count("\r") + 1 else "it is read with another number of segments"


def segments_fault(message: str) -> str:
    r"""As `fault`, segment by segment, for a message whose structure hl7apy cannot judge.

    That is ORM^O01: of its order detail, which is one segment or another, hl7apy asks for all of them.
    """
    for segment in message.rstrip("\r").split("\r"):
        if what := _wrong_text(segment):
            return what
        plain = _without_text(segment)
        try:
            parsed = parse_segment(plain, version="2.5.1", validation_level=VALIDATION_LEVEL.STRICT)
            parsed.validate()
            read = parsed.to_er7().rstrip("|")
        except (HL7apyException, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
            return f"{segment[:3]}: {_said(error)}"
        if read != plain:
            return f"segment {segment[:3]} is read otherwise than it was written"
    return ""


def _text_at(segment: str) -> tuple[int, list[str]]:
    """Which field of a segment holds text (TX or FT), and its repetitions; (0, []) if none does.

    hl7apy takes every OBX-5 for ST, of no more than 199 characters, and escapes the line breaks of OBX-5 and NTE-3 (FT)
    once more: it is not asked about either.
    """
    fields = segment.split("|")
    if fields[0] == "OBX" and len(fields) > 5 and fields[2] in ("TX", "FT"):
        return 5, [fields[5]]
    if fields[0] == "NTE" and len(fields) > 3:
        return 3, fields[3].split("~")
    return 0, []


def _wrong_text(segment: str) -> str:
    for value in _text_at(segment)[1]:
        where = "|".join(segment.split("|")[:2])
        if len(value) > _LONGEST_TEXT:
            return f"the text of segment {where} is longer than {_LONGEST_TEXT} characters"
        if not _TEXT.fullmatch(value):
            return f"the text of segment {where} holds a delimiter or an escape that is none"
    return ""


def _without_text(segment: str) -> str:
    place, values = _text_at(segment)
    fields = segment.split("|")
    return "|".join([*fields[:place], "text", *fields[place + 1 :]]) if any(values) else segment


def _said(error: Exception) -> str:
    if isinstance(error, MaxLengthReached):
        return f"{type(error).__name__}: a value of more than {error.limit} characters"
    # A ValueError quotes the value.
    return f"{type(error).__name__}: {error}" if isinstance(error, HL7apyException) else type(error).__name__
