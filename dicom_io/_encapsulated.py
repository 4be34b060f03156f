"""Encapsulated Pixel Data (PS3.5 A.4): items of a sequence → the bytes of each frame."""

from __future__ import annotations

import struct

from dicom_io.errors import DecodeError

_ITEM = b"\xfe\xff\x00\xe0"
_END = b"\xfe\xff\xdd\xe0"


def frames_of(data: bytes, number_of_frames: int, extended: tuple[bytes, bytes] | None) -> list[bytes]:
    """Split the value of an encapsulated Pixel Data element into its frames.

    Where an offset table is given it must fit the fragments exactly; without one there must be one fragment for
    each frame, or one frame.

    Args:
        data: from the first item (the Basic Offset Table) on; what follows the sequence's delimiter is ignored.
        extended: values of Extended Offset Table and Extended Offset Table Lengths, where they are present.

    Raises:
        DecodeError: the items are cut off or damaged, or do not give ``number_of_frames`` frames.
    """
    table, *fragments = _items(data)
    starts = []  # of each fragment's item, counted from the first one
    position = 0
    for fragment in fragments:
        starts.append(position)
        position += 8 + len(fragment)

    if extended is not None:
        offsets = _numbers(extended[0], "Q", "Extended Offset Table")
        lengths = _numbers(extended[1], "Q", "Extended Offset Table Lengths")
        if offsets != starts or len(lengths) != len(fragments):
            raise DecodeError("the Extended Offset Table does not fit the fragments")
        if any(not len(f) - 1 <= length <= len(f) for f, length in zip(fragments, lengths, strict=True)):
            raise DecodeError("the Extended Offset Table Lengths do not fit the fragments")
        frames = [fragment[:length] for fragment, length in zip(fragments, lengths, strict=True)]
    elif table:
        offsets = _numbers(table, "I", "Basic Offset Table")
        if offsets[0] != 0 or sorted(set(offsets)) != offsets or not set(offsets) <= set(starts):
            raise DecodeError("the Basic Offset Table does not fit the fragments")
        firsts = [starts.index(offset) for offset in offsets]
        frames = [b"".join(fragments[a:b]) for a, b in zip(firsts, [*firsts[1:], len(fragments)], strict=True)]
    elif number_of_frames == 1 and fragments:
        frames = [b"".join(fragments)]
    else:
        frames = fragments
    if len(frames) != number_of_frames:
        raise DecodeError(f"there are {len(frames)} compressed frames, the header says {number_of_frames}")
    return frames


def _items(data: bytes) -> list[bytes]:
    """The values of all items up to the delimiter, the offset table's first."""
    items = []
    position = 0
    while (tag := data[position : position + 4]) == _ITEM:
        (length,) = struct.unpack("<I", data[position + 4 : position + 8].ljust(4, b"\xff"))
        if length > len(data) - position - 8:
            raise DecodeError("the compressed pixel data is cut off")
        items.append(data[position + 8 : position + 8 + length])
        position += 8 + length
    if tag != _END or len(data) < position + 8:
        raise DecodeError("the compressed pixel data is cut off or damaged: an item or its end must follow")
    if not items:
        raise DecodeError("the compressed pixel data has no offset table")
    return items


def _numbers(data: bytes, code: str, name: str) -> list[int]:
    if not data or len(data) % struct.calcsize(code):
        raise DecodeError(f"the {name} has a length of {len(data)} bytes")
    return list(struct.unpack(f"<{len(data) // struct.calcsize(code)}{code}", data))
