"""The frame of a Part 10 file around an encoded data set (PS3.10 7.1)."""

from __future__ import annotations

import struct

IMPLEMENTATION_CLASS_UID = "2.25.120320609197329295374534060474213462367"
IMPLEMENTATION_VERSION_NAME = "SCANSIDE_0_1"


def part10_head(sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str) -> bytes:
    """What stands before the data set in a Part 10 file: preamble and File Meta Information.

    Nothing in the File Meta Information depends on sender or time.
    """
    elements = b"".join(
        (
            struct.pack("<HH2sHI", 0x0002, 0x0001, b"OB", 0, 2) + b"\0\1",  # File Meta Information Version
            _short(0x0002, b"UI", sop_class_uid, b"\0"),
            _short(0x0003, b"UI", sop_instance_uid, b"\0"),
            _short(0x0010, b"UI", transfer_syntax_uid, b"\0"),
            _short(0x0012, b"UI", IMPLEMENTATION_CLASS_UID, b"\0"),
            _short(0x0013, b"SH", IMPLEMENTATION_VERSION_NAME, b" "),
        )
    )
    length = struct.pack("<HH2sHI", 0x0002, 0x0000, b"UL", 4, len(elements))
    return b"".join((bytes(128), b"DICM", length, elements))


def _short(element: int, vr: bytes, value: str, padding: bytes) -> bytes:
    encoded = value.encode("ascii")
    encoded += padding * (len(encoded) % 2)
    return struct.pack("<HH2sH", 0x0002, element, vr, len(encoded)) + encoded
