"""Whether a message is HL7 v2.5.1: judged by hl7apy, which did not write it."""

from __future__ import annotations

from hl7apy.consts import VALIDATION_LEVEL
from hl7apy.exceptions import HL7apyException
from hl7apy.parser import parse_message


def fault(message: str) -> str:
    r"""What is wrong with a message (ER7, segments ended by \r), or '' if nothing is.

    Structure, data types and lengths of v2.5.1 as hl7apy knows them, at its strict level; and that it reads what we
    wrote, segment for segment. It knows no tables: a code that is none, such as a wrong OBX-2, passes.
    """
    text = message.rstrip("\r")
    try:
        parsed = parse_message(text, validation_level=VALIDATION_LEVEL.STRICT, find_groups=True)
        parsed.validate()
        read = parsed.to_er7().rstrip("\r").split("\r")
    except (HL7apyException, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    for ours, theirs in zip(text.split("\r"), read, strict=False):
        if ours != theirs:
            return f"segment {ours[:3]} is read otherwise than it was written"
    return "" if len(read) == text.count("\r") + 1 else "it is read with another number of segments"
