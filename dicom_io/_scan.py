"""Where the elements of an untrusted data set lie in its bytes, without reading their values.

A header is read before an instance is answered, so this is both fast and safe: one step for an element, no recursion,
and no memory but for the elements asked for. Time is linear in the bytes whatever they say, because each step moves
forward and nothing is searched for or looked at twice.

What the bytes are decides over what the transfer syntax promises, as in other readers: the first element of a data set
tells implicit from explicit VR, and each item of a sequence is looked at again, because a sequence of VR UN has
implicit items (PS3.5 6.2.2).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from pydicom.datadict import dictionary_VR

from dicom_io.errors import HeaderError

UNDEFINED = 0xFFFFFFFF
"""The length of a value that ends at its delimiter."""

STOP, ITEM_ENDS = "", "item"
"""Actions of a scan in place of a name: end before the element, or behind it."""

_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_IMPLICIT = b""
_SEQUENCES = (b"SQ", b"UN")
# PS3.5 7.1.2. A VR that no edition knows is taken to have a length of 16 bits, as pydicom does.
_LENGTH_32 = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
_LENGTH_16 = frozenset(
    (b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL", b"SS",
     b"ST", b"TM", b"UI", b"UL", b"US")
)  # fmt: skip
_EXPLICIT = struct.Struct(">I2sH").unpack_from, struct.Struct("<I2sH").unpack_from
_LONG = struct.Struct(">I").unpack_from, struct.Struct("<I").unpack_from
_PLAIN = struct.Struct(">II").unpack_from, struct.Struct("<II").unpack_from

Buffer = bytes | memoryview
Name = str | int  # a keyword, or the tag of what has none
ActionOf = Callable[[int], Name | None]


class Overrun(Exception):
    """The bytes end within an element, an item or a sequence."""


Raw = tuple[bytes, int, int]
"""One element: its VR (b"" where it is implicit), and where its value begins and ends.

The value of a sequence of undefined length includes its delimiter.
"""


def number(tag: int, little: bool) -> int:
    """The 32-bit number that the four bytes of a tag are in a byte order: (group, element) are two 16-bit numbers."""
    return (tag & 0xFFFF) << 16 | tag >> 16 if little else tag


def looks_implicit(data: Buffer, position: int) -> bool:
    """Whether the element there has no VR: two capital letters would be a length of 16 kB at least."""
    return len(data) < position + 6 or not (0x40 < data[position + 4] < 0x5B and 0x40 < data[position + 5] < 0x5B)


def scan(
    data: Buffer, position: int, end: int, implicit: bool, little: bool, action_of: ActionOf
) -> tuple[dict[Name, Raw], int, bool]:
    """Find elements of the data set or item at a position.

    Args:
        data: the bytes; positions count from their start.
        end: where the data set or item ends at the latest.
        action_of: for the `number` of a tag: a name to find it by, or `STOP` or `ITEM_ENDS`, or None. Of a repeated
            element the last is found.

    Returns:
        the elements found by their names, where the scan ended, and whether by an action (otherwise because the
        bytes end).

    Raises:
        Overrun: an element does not end before ``end``. (Up to 7 bytes at the end are ignored.)
        HeaderError: what has an undefined length consists of no items.
    """
    found: dict[Name, Raw] = {}
    explicit_at, plain_at, long_at = _EXPLICIT[little], _PLAIN[little], _LONG[little]
    short = frozenset() if implicit else _LENGTH_16
    long = frozenset() if implicit else _LENGTH_32
    last = end - 8
    while position <= last:  # what a header costs
        tag, vr, length = explicit_at(data, position)
        start = position + 8
        if vr in short:
            action = action_of(tag)
            if action is None:
                position = start + length
                continue
        else:
            if vr in long:
                start += 4
                if start > end:
                    raise Overrun
                (length,) = long_at(data, position + 8)
            elif implicit or not b"AA" <= vr <= b"ZZ":  # some writers switch to implicit VR
                tag, length = plain_at(data, position)
                vr = _IMPLICIT
            action = action_of(tag)
        if action is STOP:
            return found, position, True
        if action is ITEM_ENDS:
            return found, start, True
        if length == UNDEFINED:
            position = _behind_undefined(data, start, end, vr, number(tag, little), implicit, little)
        else:
            position = start + length
        if action is not None:
            found[action] = vr, start, position
    if position > end:
        raise Overrun
    return found, end, False


def items(
    data: Buffer, position: int, end: int, implicit: bool, little: bool, action_of: ActionOf
) -> Iterator[tuple[bool, dict[Name, Raw]]]:
    """The items of a sequence value: whether each is implicit, and what was found in it.

    Raises:
        Overrun: an item does not end before ``end``, or an element before its item's end.
        HeaderError: it holds something that is no item.
    """
    plain_at = _PLAIN[little]
    item, item_end, sequence_end = (number(tag, little) for tag in (_ITEM, _ITEM_END, _SEQUENCE_END))
    while position < end:
        if position + 8 > end:
            raise Overrun
        tag, length = plain_at(data, position)
        position += 8
        if tag == sequence_end:
            return
        if tag not in (item, item_end):
            raise HeaderError("its sequences hold something that is no item")
        item_implicit = implicit or looks_implicit(data, position)
        limit = end if length == UNDEFINED else position + length
        if limit > end:
            raise Overrun
        found, behind, stopped = scan(data, position, limit, item_implicit, little, action_of)
        if length == UNDEFINED and not stopped:
            raise Overrun
        position = behind if length == UNDEFINED else limit
        yield item_implicit, found


def _behind_undefined(data: Buffer, position: int, end: int, vr: bytes, tag: int, implicit: bool, little: bool) -> int:
    """The position behind a value of undefined length: the items of a sequence, or fragments (PS3.5 A.4).

    What has a defined length inside is passed over; the rest is walked with the encoding of each open item on a stack.
    """
    plain_at = _PLAIN[little]
    if not _is_sequence(data, position, end, vr, tag, little):
        return _behind_fragments(data, position, end, little)
    enclosing = bytearray()  # for each open item: whether the one around it is implicit
    in_item = False
    while True:
        if position + 8 > end:
            raise Overrun
        if in_item:
            element, vr, length, position = _element(data, position, end, implicit, little)
            if element == _ITEM_END:
                implicit, in_item = bool(enclosing.pop()), False
            elif length != UNDEFINED:
                position += length
            elif _is_sequence(data, position, end, vr, element, little):
                in_item = False
            else:
                position = _behind_fragments(data, position, end, little)
        else:
            raw, length = plain_at(data, position)
            tag, position = number(raw, little), position + 8
            if tag == _SEQUENCE_END:
                if not enclosing:
                    return position
                in_item = True
            elif tag not in (_ITEM, _ITEM_END):
                raise HeaderError("its sequences hold something that is no item")
            elif length != UNDEFINED:
                position += length
            else:
                enclosing.append(implicit)
                implicit, in_item = implicit or looks_implicit(data, position), True


def _element(data: Buffer, position: int, end: int, implicit: bool, little: bool) -> tuple[int, bytes, int, int]:
    """Tag, VR, length and where the value begins, of the element at a position with at least 8 bytes before ``end``."""
    raw, vr, length = _EXPLICIT[little](data, position)
    if not implicit and vr in _LENGTH_32:
        if position + 12 > end:
            raise Overrun
        return number(raw, little), vr, _LONG[little](data, position + 8)[0], position + 12
    if implicit or not (vr in _LENGTH_16 or b"AA" <= vr <= b"ZZ"):
        return number(raw, little), _IMPLICIT, _LONG[little](data, position + 4)[0], position + 8
    return number(raw, little), vr, length, position + 8


def _is_sequence(data: Buffer, position: int, end: int, vr: bytes, tag: int, little: bool) -> bool:
    """Whether a value of undefined length is a sequence; of a tag that no dictionary knows, whether it has an item."""
    if vr != _IMPLICIT:
        return vr in _SEQUENCES
    try:
        return dictionary_VR(tag) == "SQ"
    except KeyError:
        if position + 4 > end:
            raise Overrun from None
        return number(_LONG[little](data, position)[0], little) == _ITEM


def _behind_fragments(data: Buffer, position: int, end: int, little: bool) -> int:
    while position + 8 <= end:
        raw, length = _PLAIN[little](data, position)
        tag, position = number(raw, little), position + 8
        if tag == _SEQUENCE_END:
            return position
        if tag != _ITEM or length == UNDEFINED:
            raise HeaderError("a value of undefined length consists of no fragments")
        position += length
    raise Overrun
