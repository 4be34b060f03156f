"""The acknowledgement of a message that came: original and enhanced mode, with what is wrong in ERR segments.

HL7 v2.5.1 chapter 2, sections 2.9.2 (original), 2.9.3 (enhanced), 2.15.5 (ERR), 2.15.8 (MSA).
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from datetime import datetime

from appliance.intake.hl7_message import CODES, Fault, Message

_ESCAPES = str.maketrans({"\\": "\\E\\", "|": "\\F\\", "^": "\\S\\", "&": "\\T\\", "~": "\\R\\"})
_VERSIONS = ("2.1", "2.2", "2.3", "2.3.1", "2.4", "2.5", "2.5.1", "2.6", "2.7", "2.7.1", "2.8", "2.8.1", "2.8.2")
_NEWEST = "2.5.1"
_SHORT = 80  # characters of MSA-3 in v2.5.1
_MODES = {"AL": (True, True), "NE": (False, False), "ER": (False, True), "SU": (True, False)}
"""MSH-15 and MSH-16 (table 0155) → whether success, and whether an error, is to be answered."""


def answers(message: Message, box: str, *, unkept: str = "") -> list[str]:
    """What is answered to a message, one acknowledgement after the other; nothing to an acknowledgement.

    In enhanced mode CA says that the message is kept, also where it cannot be used: the application's answer says that.
    Where the sender wants none, CE does.

    Args:
        box: MSH-3.
        unkept: why the message could not be written down; "" if it was.
    """
    if message.is_answer:
        return []
    faults = (Fault("", 0, 0, "207", unkept),) if unkept else message.faults
    code = "AE" if unkept else message.code
    accept, application = message.header[15].upper(), message.header[16].upper()
    if not (accept or application):
        return [_acknowledgement(message, code, faults, box)]
    said = []
    wanted = _wants(application, not faults)
    first = "CR" if code == "AR" else "CE" if unkept or (faults and not wanted) else "CA"
    if _wants(accept, first == "CA"):
        said.append(_acknowledgement(message, first, () if first == "CA" else faults, box))
        wanted = wanted and first == "CA"
    if wanted:
        said.append(_acknowledgement(message, code, faults, box))
    return said


def accepted(message: Message, box: str) -> list[str]:
    """What is answered to an application acknowledgement that is kept: a CA, where it asks for one (MSH-15)."""
    wanted = _wants(message.header[15].upper(), True)
    return [_acknowledgement(message, "CA", (), box)] if wanted else []


def too_long(maximum: int, box: str) -> str:
    """The answer to a block that is longer than may be; nothing of it was read."""
    unread = Message(("MSH", "|", "^~\\&", *[""] * 18), "", "")
    return _acknowledgement(unread, "AR", (Fault("", 0, 0, "207", f"the message is longer than {maximum} bytes"),), box)


def _wants(mode: str, good: bool) -> bool:
    success, error = _MODES.get(mode, (False, False))
    return success if good else error


def _acknowledgement(message: Message, code: str, faults: Sequence[Fault], box: str) -> str:
    theirs = message.header
    version = re.split(r"[^\d.]", theirs[12], maxsplit=1)[0]
    version = version if version in _VERSIONS else _NEWEST
    event = message.kind.partition("^")[2]
    kind = f"ACK^{_text(event)}^ACK" if event and _VERSIONS.index(version) >= _VERSIONS.index("2.4") else "ACK"
    at = datetime.now().astimezone().strftime("%Y%m%d%H%M%S%z")
    processing = theirs[11][:1] if theirs[11][:1] in ("P", "T", "D") else "P"
    # Fields are repeated as they came; those of a peer with other separators as plain text.
    standard = (theirs[1], theirs[2][:4]) == ("|", "^~\\&")
    sender, place, receiver, receiver_place, control_id = (
        one if standard else _text(one) for one in (*theirs[3:7], theirs[10])
    )
    lines = [
        ["MSH", "^~\\&", receiver or _text(box), receiver_place, sender, place, at, "", kind, secrets.token_hex(10),
         processing, version, "", "", "", "", "", "UNICODE UTF-8"],
        ["MSA", code, control_id, _text(faults[0].text[:_SHORT]) if faults else ""],
    ]  # fmt: skip
    if faults and _VERSIONS.index(version) < _VERSIONS.index("2.5"):
        lines.append(["ERR", "~".join(_located(one, f"{one.code}&{CODES[one.code]}&HL70357") for one in faults)])
    elif faults:
        lines += [
            ["ERR", "", _located(one), f"{one.code}^{CODES[one.code]}^HL70357", "E", "", "", "", _text(one.text)]
            for one in faults
        ]
    return "".join("|".join(line).rstrip("|") + "\r" for line in lines)


def _located(fault: Fault, code: str = "") -> str:
    """ERL, or with a code ELD of earlier versions."""
    places = (fault.segment, str(fault.number or ""), str(fault.field or "")) if fault.segment else ("", "", "")
    return "^".join((*places, code)).rstrip("^")


def _text(value: str) -> str:
    """Text for one component, its delimiters escaped (2.7)."""
    return "".join(one if one.isprintable() else " " for one in value).translate(_ESCAPES)
