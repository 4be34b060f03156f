"""Command sets (PS3.7 6.3, Annex E): Implicit VR Little Endian, a dozen elements, made and read by hand.

A response built through a data set class costs ten times the sync of a small file's directory entry; see
docs/decisions/.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from dicom_io.errors import ScansideError

NO_DATA_SET = 0x0101
MAXIMUM_COMMAND = 16_384
"""Bytes of a command set; the longest of the standard are some hundred."""


class Field(IntEnum):
    """Command Field (0000,0100), PS3.7 E.1."""

    C_STORE_RQ = 0x0001
    C_ECHO_RQ = 0x0030
    C_CANCEL_RQ = 0x0FFF
    N_EVENT_REPORT_RQ = 0x0100
    N_SET_RQ = 0x0120
    N_ACTION_RQ = 0x0130
    N_CREATE_RQ = 0x0140
    N_EVENT_REPORT_RSP = 0x8100


class CommandError(ScansideError):
    """A command set that cannot be read."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command set. Numbers are None and UIDs '' where the element is absent."""

    field: int
    message_id: int | None = None
    responded_to: int | None = None
    data_set_type: int = NO_DATA_SET
    status: int | None = None
    affected_class: str = ""
    affected_instance: str = ""
    requested_class: str = ""
    requested_instance: str = ""
    event_type: int | None = None
    action_type: int | None = None
    comment: str = ""
    error_id: int | None = None

    @property
    def has_data_set(self) -> bool:
        """Whether a data set follows (PS3.7 E.1: any value but 0101H)."""
        return self.data_set_type != NO_DATA_SET


# In order of their tags, as the encoding demands: element, attribute of `Command`, whether a number.
_ELEMENTS = (
    (0x0002, "affected_class", "UI"),
    (0x0003, "requested_class", "UI"),
    (0x0100, "field", "US"),
    (0x0110, "message_id", "US"),
    (0x0120, "responded_to", "US"),
    (0x0800, "data_set_type", "US"),
    (0x0900, "status", "US"),
    (0x0902, "comment", "LO"),
    (0x0903, "error_id", "US"),
    (0x1000, "affected_instance", "UI"),
    (0x1001, "requested_instance", "UI"),
    (0x1002, "event_type", "US"),
    (0x1008, "action_type", "US"),
)
_BY_ELEMENT = {element: (name, vr) for element, name, vr in _ELEMENTS}
_HEAD = struct.Struct("<HHI")


def decode(data: bytes | bytearray) -> Command:
    """Read a command set. Elements that no `Command` has a place for are skipped.

    Raises:
        CommandError: an element is cut off, is not of group 0000, comes twice, or has a value of the wrong kind; or
            the Command Field is missing.
    """
    values: dict[str, int | str] = {}
    at = 0
    while at < len(data):
        if len(data) - at < 8:
            raise CommandError("the command set is cut off")
        group, element, length = _HEAD.unpack_from(data, at)
        at += 8
        if group != 0:
            raise CommandError(f"({group:04X},{element:04X}) has no place in the command set")
        if length > len(data) - at:
            raise CommandError(f"the command set is cut off in (0000,{element:04X})")
        if place := _BY_ELEMENT.get(element):
            name, vr = place
            if name in values:
                raise CommandError(f"(0000,{element:04X}) comes twice")
            raw = bytes(data[at : at + length])
            if vr != "US":
                values[name] = raw.decode("latin-1").strip(" \0")
            elif length == 2:
                values[name] = raw[0] | raw[1] << 8
            elif length:
                raise CommandError(f"(0000,{element:04X}) has {length} bytes where a number has 2")
        at += length
    if "field" not in values:
        raise CommandError("the command set has no Command Field (0000,0100)")
    return Command(**values)  # type: ignore[arg-type]


def encode(command: Command) -> bytes:
    """A command set with its group length. '' and None leave an element out."""
    parts = []
    for element, name, vr in _ELEMENTS:
        value = getattr(command, name)
        if vr == "US":
            if value is not None:
                parts.append(struct.pack("<HHIH", 0, element, 2, value))
        elif value:
            text = value.encode("ascii", "replace")
            text += (b"\0" if vr == "UI" else b" ") * (len(text) % 2)
            parts.append(_HEAD.pack(0, element, len(text)) + text)
    body = b"".join(parts)
    return struct.pack("<HHII", 0, 0, 4, len(body)) + body


def response(request: Command, status: int, comment: str = "", error_id: int | None = None) -> bytes:
    """The encoded response without a data set (PS3.7 9.3, 10.3): what the request named, and the status.

    Args:
        comment: Error Comment (0000,0902); cut to the 64 characters of its VR.
        error_id: Error ID (0000,0903).
    """
    return encode(
        Command(
            field=request.field | 0x8000,
            responded_to=request.message_id or 0,
            status=status,
            affected_class=request.affected_class or request.requested_class,
            affected_instance=request.affected_instance or request.requested_instance,
            event_type=request.event_type,
            action_type=request.action_type,
            comment=comment[:64],
            error_id=error_id,
        )
    )
