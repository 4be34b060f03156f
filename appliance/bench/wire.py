"""The least of the DICOM upper layer that a benchmark needs at both ends of a bare socket.

PDUs and command sets are those of PS3.8 9.3 and PS3.7 E.1. What happens once an association is negotiated by
pynetdicom's own PDUs; what happens for each image is done by hand, so that its cost is not measured.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydicom.uid import PYDICOM_IMPLEMENTATION_UID, UID
from pynetdicom import build_context
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import A_ASSOCIATE, ImplementationClassUIDNotification, MaximumLengthNotification
from pynetdicom.presentation import PresentationContext, negotiate_as_acceptor

APPLICATION_CONTEXT = UID("1.2.840.10008.3.1.1.1")
MAXIMUM_PDU = 131_072

ASSOCIATE_RQ, ASSOCIATE_AC, P_DATA, RELEASE_RQ, RELEASE_RP = 0x01, 0x02, 0x04, 0x05, 0x06
C_STORE_RQ, C_STORE_RSP, C_ECHO_RQ = 0x0001, 0x8001, 0x0030
NO_DATA_SET, DATA_SET = 0x0101, 0x0001
COMMAND_FIELD, MESSAGE_ID, RESPONDED_TO, STATUS = 0x0100, 0x0110, 0x0120, 0x0900
AFFECTED_CLASS, AFFECTED_INSTANCE = 0x0002, 0x1000

_HEADER = struct.Struct(">BxI")  # PDU type, length
_PDV = struct.Struct(">IBB")  # PS3.8 9.3.5.1: length, presentation context, message control header
IS_COMMAND, IS_LAST = 0x01, 0x02


class Broken(Exception):
    """The other side closed the connection or sent what no benchmark expects."""


def pdu(kind: int, body: bytes) -> bytes:
    """A PDU around its body."""
    return _HEADER.pack(kind, len(body)) + body


RELEASE_REQUEST, RELEASE_RESPONSE = pdu(RELEASE_RQ, bytes(4)), pdu(RELEASE_RP, bytes(4))


class Reader:
    """Reads whole PDUs from a connection into one buffer, which the next PDU overwrites."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._header = bytearray(_HEADER.size)
        self._body = bytearray(MAXIMUM_PDU)

    def read(self, quick: bool = False) -> tuple[int, memoryview]:
        """The next PDU: its type and its body.

        Args:
            quick: acknowledge at once what arrives. Without it a sender that leaves its PDUs to Nagle's algorithm
                waits 40 ms for each acknowledgement; Linux forgets the setting as it goes.

        Raises:
            Broken: the connection ended, or a PDU is too long.
        """
        if quick:
            self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        self._fill(memoryview(self._header))
        kind, length = _HEADER.unpack(self._header)
        if length > len(self._body):
            if length > 1 << 20:
                raise Broken(f"a PDU of {length} bytes")
            self._body = bytearray(length)
        body = memoryview(self._body)[:length]
        self._fill(body)
        return int(kind), body

    def _fill(self, buffer: memoryview) -> None:
        while buffer:
            count = self._connection.recv_into(buffer)
            if not count:
                raise Broken("the connection was closed")
            buffer = buffer[count:]


def values(body: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """The presentation data values of a P-DATA-TF: context, message control header, fragment."""
    while body:
        length, context, control = _PDV.unpack_from(body)
        yield context, control, body[_PDV.size : 4 + length]
        body = body[4 + length :]


# --- negotiation ----------------------------------------------------------------------------------------


def _user_information() -> list[Any]:
    longest = MaximumLengthNotification()
    longest.maximum_length_received = MAXIMUM_PDU
    implementation = ImplementationClassUIDNotification()
    implementation.implementation_class_uid = PYDICOM_IMPLEMENTATION_UID
    return [longest, implementation]


def request(calling_ae: str, called_ae: str, sop_class: str, syntax: str) -> bytes:
    """An A-ASSOCIATE-RQ that proposes one class in one transfer syntax, as presentation context 1."""
    primitive = A_ASSOCIATE()
    primitive.application_context_name = APPLICATION_CONTEXT
    primitive.calling_ae_title, primitive.called_ae_title = calling_ae, called_ae
    context = build_context(sop_class, syntax)
    context.context_id = 1
    primitive.presentation_context_definition_list = [context]
    primitive.user_information = _user_information()
    return bytes(A_ASSOCIATE_RQ(primitive).encode())


def accepted(kind: int, body: memoryview) -> int:
    """The longest PDU that the acceptor of `request` takes.

    Raises:
        Broken: it did not accept.
    """
    if kind != ASSOCIATE_AC:
        raise Broken(f"the association was not accepted (PDU type {kind})")
    answer = A_ASSOCIATE_AC()
    answer.decode(pdu(kind, bytes(body)))
    primitive = answer.to_primitive()
    if [context.result for context in primitive.presentation_context_definition_results_list] != [0]:
        raise Broken("the presentation context was not accepted")
    return int(primitive.maximum_length_received) or MAXIMUM_PDU


def acceptance(body: memoryview, supported: Sequence[PresentationContext]) -> bytes:
    """The A-ASSOCIATE-AC that answers a request."""
    asked = A_ASSOCIATE_RQ()
    asked.decode(pdu(ASSOCIATE_RQ, bytes(body)))
    proposed = asked.to_primitive()
    results, _ = negotiate_as_acceptor(proposed.presentation_context_definition_list, list(supported))
    primitive = A_ASSOCIATE()
    primitive.application_context_name = APPLICATION_CONTEXT
    primitive.calling_ae_title, primitive.called_ae_title = proposed.calling_ae_title, proposed.called_ae_title
    primitive.result, primitive.result_source = 0x00, 0x01
    primitive.presentation_context_definition_results_list = results
    primitive.user_information = _user_information()
    return bytes(A_ASSOCIATE_AC(primitive).encode())


# --- messages -------------------------------------------------------------------------------------------


def _uid(element: int, value: str) -> bytes:
    encoded = value.encode("ascii")
    encoded += b"\0" * (len(encoded) % 2)
    return struct.pack("<HHI", 0x0000, element, len(encoded)) + encoded


def _short(element: int, value: int) -> bytes:
    return struct.pack("<HHIH", 0x0000, element, 2, value)


def command(elements: Iterable[bytes]) -> bytes:
    """A command set: Implicit VR Little Endian, with its group length first (PS3.7 6.3.1)."""
    body = b"".join(elements)
    return struct.pack("<HHII", 0x0000, 0x0000, 4, len(body)) + body


def command_pdu(context: int, command_set: bytes) -> bytes:
    """A whole command set in one PDU."""
    return pdu(P_DATA, _PDV.pack(len(command_set) + 2, context, IS_COMMAND | IS_LAST) + command_set)


def store_request(message_id: int, sop_class: str, sop_instance: str) -> bytes:
    """The PDU of a C-STORE-RQ (PS3.7 9.3.1.1); the data set follows."""
    elements = [
        _uid(AFFECTED_CLASS, sop_class),
        _short(COMMAND_FIELD, C_STORE_RQ),
        _short(MESSAGE_ID, message_id),
        _short(0x0700, 0x0000),  # priority: medium
        _short(0x0800, DATA_SET),
        _uid(AFFECTED_INSTANCE, sop_instance),
    ]
    return command_pdu(1, command(elements))


def data_pdus(data: memoryview, longest: int) -> list[memoryview]:
    """A data set as P-DATA PDUs for one gathering write: headers, and views of the data between them."""
    room = longest - _PDV.size
    parts: list[memoryview] = []
    for start in range(0, len(data), room):
        piece = data[start : start + room]
        control = IS_LAST if start + room >= len(data) else 0
        header = _HEADER.pack(P_DATA, len(piece) + _PDV.size) + _PDV.pack(len(piece) + 2, 1, control)
        parts += [memoryview(header), piece]
    return parts


def answer_to(context: int, asked: dict[int, bytes]) -> bytes:
    """The PDU that answers a C-STORE-RQ or C-ECHO-RQ with Success."""
    field = int.from_bytes(asked[COMMAND_FIELD], "little")
    elements = [
        _uid(AFFECTED_CLASS, text(asked[AFFECTED_CLASS])),
        _short(COMMAND_FIELD, field | 0x8000),
        _short(RESPONDED_TO, int.from_bytes(asked[MESSAGE_ID], "little")),
        _short(0x0800, NO_DATA_SET),
        _short(STATUS, 0x0000),
    ]
    if AFFECTED_INSTANCE in asked:
        elements.append(_uid(AFFECTED_INSTANCE, text(asked[AFFECTED_INSTANCE])))
    return command_pdu(context, command(elements))


def elements_of(command_set: bytes) -> dict[int, bytes]:
    """The elements of a command set: element number → value."""
    found: dict[int, bytes] = {}
    place = 0
    while place + 8 <= len(command_set):
        _, element, length = struct.unpack_from("<HHI", command_set, place)
        found[element] = command_set[place + 8 : place + 8 + length]
        place += 8 + length
    return found


def text(value: bytes) -> str:
    """A UID of a command set, without its padding."""
    return value.rstrip(b"\0 ").decode("ascii")
