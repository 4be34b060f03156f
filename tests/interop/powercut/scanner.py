"""A scanner in a few lines: small CT images, and an association that sends them one after another.

It knows the wire by itself (PS3.8 9.3, PS3.7 9.3.1), so that nothing of the receiver's own code is on both sides.
Each transmission has a message ID of its own: an answer in a trace says by it which bytes were answered.
"""

from __future__ import annotations

import itertools
import random
import socket
import struct
from dataclasses import dataclass

CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"
SUCCESS = 0x0000
C_STORE_RSP = 0x8001

_P_DATA = 0x04
_RECEIVE_SECONDS = 20.0


class NotAnswered(Exception):
    """The connection ended, or was never made."""


@dataclass(frozen=True, slots=True)
class Image:
    """One instance as a scanner has it: ``data_set`` is Explicit VR Little Endian (PS3.5 A.2)."""

    uid: str
    data_set: bytes


def image(uid: str, study: str, number: int, *, seed: int = 0) -> Image:
    """A CT slice of 16×16 pixels; another seed makes other pixels under the same UID."""
    pixels = random.Random(f"{uid} {seed}").randbytes(16 * 16 * 2)
    elements = [
        _element(0x0008, 0x0008, "CS", rb"ORIGINAL\PRIMARY\AXIAL"),
        _element(0x0008, 0x0016, "UI", CT.encode()),
        _element(0x0008, 0x0018, "UI", uid.encode()),
        _element(0x0008, 0x0060, "CS", b"CT"),
        _element(0x0010, 0x0010, "PN", b"Cut^Power"),
        _element(0x0020, 0x000D, "UI", study.encode()),
        _element(0x0020, 0x000E, "UI", f"{study}.1".encode()),
        _element(0x0020, 0x0013, "IS", str(number).encode()),
        _element(0x0020, 0x0032, "DS", rf"-8\-8\{number}".encode()),
        _element(0x0020, 0x0037, "DS", rb"1\0\0\0\1\0"),
        _element(0x0028, 0x0002, "US", struct.pack("<H", 1)),
        _element(0x0028, 0x0004, "CS", b"MONOCHROME2"),
        _element(0x0028, 0x0010, "US", struct.pack("<H", 16)),
        _element(0x0028, 0x0011, "US", struct.pack("<H", 16)),
        _element(0x0028, 0x0030, "DS", rb"1\1"),
        _element(0x0028, 0x0100, "US", struct.pack("<H", 16)),
        _element(0x0028, 0x0101, "US", struct.pack("<H", 16)),
        _element(0x0028, 0x0102, "US", struct.pack("<H", 15)),
        _element(0x0028, 0x0103, "US", struct.pack("<H", 1)),
        _element(0x7FE0, 0x0010, "OW", pixels),
    ]
    return Image(uid, b"".join(elements))


def _element(group: int, element: int, vr: str, value: bytes) -> bytes:
    value += (b"\0" if vr == "UI" else b" ") * (len(value) % 2)
    head = struct.pack("<HH2s", group, element, vr.encode())
    return head + (struct.pack("<HI", 0, len(value)) if vr == "OW" else struct.pack("<H", len(value))) + value


class Sent:
    """Every transmission by its message ID, across all associations of a test; safe to share between threads."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self.by_message: dict[int, Image] = {}

    def enter(self, one: Image) -> int:
        """The message ID of another transmission of that image."""
        number = next(self._numbers)
        if number > 0xFFFF:
            raise OverflowError("more transmissions than message IDs")
        self.by_message[number] = one
        return number


class Association:
    """An association that proposes CT in Explicit VR Little Endian.

    Raises:
        NotAnswered: nobody listens, or it was not accepted.
    """

    def __init__(self, port: int, sent: Sent, calling: str = "SCANNER", called: str = "SCANSIDE") -> None:
        self._sent = sent
        try:
            self._socket = socket.create_connection(("127.0.0.1", port), _RECEIVE_SECONDS)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.sendall(_associate(calling, called))
        except OSError as error:
            raise NotAnswered(str(error)) from error
        kind, body = self._read()
        # PS3.8 9.3.3.2: the result of the presentation context is the third byte of its item.
        at = 68
        while kind == 0x02 and at + 4 <= len(body):
            item, length = struct.unpack_from(">BxH", body, at)
            if item == 0x21 and body[at + 6] == 0:
                return
            at += 4 + length
        self.abort()
        raise NotAnswered(f"the association was not accepted (PDU type {kind})")

    def store(self, one: Image) -> int:
        """Send one image; the status of its answer.

        Raises:
            NotAnswered: the connection ended before its answer was there.
        """
        number = self._sent.enter(one)
        command = _command(
            (0x0002, CT.encode()),
            (0x0100, struct.pack("<H", 0x0001)),
            (0x0110, struct.pack("<H", number)),
            (0x0700, struct.pack("<H", 0)),
            (0x0800, struct.pack("<H", 1)),
            (0x1000, one.uid.encode()),
        )
        try:
            self._socket.sendall(_p_data(0x03, command) + _p_data(0x02, one.data_set))
        except OSError as error:
            raise NotAnswered(str(error)) from error
        kind, body = self._read()
        if kind != _P_DATA:
            raise NotAnswered(f"PDU type {kind} instead of an answer")
        answer = elements_of(bytes(body[6:]))
        responded = int.from_bytes(answer[0x0120], "little")
        if responded != number:
            raise AssertionError(f"message {number} was answered as {responded}")
        return int.from_bytes(answer[0x0900], "little")

    def release(self) -> None:
        """End it in order."""
        try:
            self._socket.sendall(struct.pack(">BxI4x", 0x05, 4))
            self._read()
        except (OSError, NotAnswered):
            pass
        self.abort()

    def abort(self) -> None:
        """Close the connection, whatever is under way."""
        self._socket.close()

    def _read(self) -> tuple[int, bytes]:
        try:
            kind, length = struct.unpack(">BxI", self._exactly(6))
            return kind, self._exactly(length)
        except OSError as error:
            raise NotAnswered(str(error)) from error

    def _exactly(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            more = self._socket.recv(count - len(found))
            if not more:
                raise NotAnswered("the connection was closed")
            found += more
        return found


def elements_of(command: bytes) -> dict[int, bytes]:
    """The elements of a command set (PS3.7 6.3.1): element number → value."""
    found: dict[int, bytes] = {}
    at = 0
    while at + 8 <= len(command):
        _, element, length = struct.unpack_from("<HHI", command, at)
        found[element] = command[at + 8 : at + 8 + length]
        at += 8 + length
    return found


class Answers:
    """Reads the answers out of what a provider sent on one connection, piece by piece.

    Args:
        field: the Command Field of those that count (PS3.7 E.1).
    """

    def __init__(self, field: int = C_STORE_RSP) -> None:
        self._field = field
        self._bytes = b""
        self._command = b""

    def feed(self, data: bytes) -> list[int]:
        """The message IDs whose answer with Success is whole with these bytes."""
        self._bytes += data
        found = []
        while len(self._bytes) >= 6:
            kind, length = struct.unpack_from(">BxI", self._bytes)
            if len(self._bytes) < 6 + length:
                break
            body, self._bytes = self._bytes[6 : 6 + length], self._bytes[6 + length :]
            while kind == _P_DATA and body:
                size, _, control = struct.unpack_from(">IBB", body)
                fragment, body = body[6 : 4 + size], body[4 + size :]
                if not control & 0x01:
                    continue
                self._command += fragment
                if control & 0x02:
                    found += _success(elements_of(self._command), self._field)
                    self._command = b""
        return found


def _success(command: dict[int, bytes], wanted: int) -> list[int]:
    field, status = (int.from_bytes(command.get(key, b"\xff\xff"), "little") for key in (0x0100, 0x0900))
    return [int.from_bytes(command[0x0120], "little")] if (field, status) == (wanted, SUCCESS) else []


def _command(*elements: tuple[int, bytes]) -> bytes:
    body = b""
    for number, given in elements:
        value = given + b"\0" * (len(given) % 2)
        body += struct.pack("<HHI", 0, number, len(value)) + value
    return struct.pack("<HHII", 0, 0, 4, len(body)) + body


def _p_data(control: int, value: bytes) -> bytes:
    return struct.pack(">BxIIBB", _P_DATA, len(value) + 6, len(value) + 2, 1, control) + value


def _item(kind: int, value: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(value)) + value


def _associate(calling: str, called: str) -> bytes:
    """An A-ASSOCIATE-RQ (PS3.8 9.3.2)."""
    context = b"\x01\0\0\0" + _item(0x30, CT.encode()) + _item(0x40, EXPLICIT.encode())
    user = _item(0x51, struct.pack(">I", 16384)) + _item(0x52, b"1.2.276.0.7230010.3.0.3.6.7")
    body = b"".join(
        (
            struct.pack(">HH16s16s32x", 1, 0, called.ljust(16).encode(), calling.ljust(16).encode()),
            _item(0x10, b"1.2.840.10008.3.1.1.1"),
            _item(0x20, context),
            _item(0x50, user),
        )
    )
    return struct.pack(">BxI", 0x01, len(body)) + body


__all__ = ["Answers", "Association", "Image", "NotAnswered", "Sent", "elements_of", "image"]
