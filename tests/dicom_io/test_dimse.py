"""Command sets against pynetdicom's, and against whatever a peer may send (PS3.7 6.3, Annex E)."""

from __future__ import annotations

from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pynetdicom.dimse_messages import C_STORE_RQ
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.dsutils import decode as read_data_set
from pynetdicom.dsutils import encode as write_data_set

from dicom_io._dimse import Command, CommandError, Field, decode, encode, response

NUMBERS = st.none() | st.integers(0, 0xFFFF)
UIDS = st.from_regex(r"[0-9]+(\.[0-9]+){0,10}", fullmatch=True)


def commands() -> st.SearchStrategy[Command]:
    return st.builds(
        Command,
        field=st.integers(0, 0xFFFF),
        message_id=NUMBERS,
        responded_to=NUMBERS,
        data_set_type=st.integers(0, 0xFFFF),
        status=NUMBERS,
        affected_class=UIDS,
        affected_instance=UIDS,
        requested_class=UIDS,
        requested_instance=UIDS,
        event_type=NUMBERS,
        action_type=NUMBERS,
        comment=st.text("abc ?", max_size=64).map(str.strip),
    )


@given(command=commands())
def test_what_is_written_is_read(command: Command) -> None:
    assert decode(encode(command)) == command


@given(command=commands())
def test_what_is_written_is_a_command_set(command: Command) -> None:
    encoded = encode(command)
    read = read_data_set(BytesIO(encoded), True, True)
    assert (read.CommandGroupLength, read.CommandField) == (len(encoded) - 12, command.field)
    assert [int(element.tag) for element in read] == sorted(int(element.tag) for element in read)
    assert read.get("AffectedSOPInstanceUID", "") == command.affected_instance
    assert read.get("Status") == command.status


def test_a_request_of_pynetdicom_is_read() -> None:
    request = C_STORE()
    request.MessageID, request.Priority = 77, 2
    request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", "1.2.3"
    request.DataSet = BytesIO(b"xx")
    message = C_STORE_RQ()
    message.primitive_to_message(request)
    encoded = write_data_set(message.command_set, True, True)
    assert encoded
    command = decode(encoded)
    assert (command.field, command.message_id, command.has_data_set) == (Field.C_STORE_RQ, 77, True)
    assert (command.affected_class, command.affected_instance) == ("1.2.840.10008.5.1.4.1.1.2", "1.2.3")


def test_a_response_names_what_was_asked() -> None:
    request = Command(Field.C_STORE_RQ, message_id=9, data_set_type=1, affected_class="1.2", affected_instance="1.3")
    read: Dataset = read_data_set(BytesIO(response(request, 0xA700, "x" * 99)), True, True)
    assert (read.CommandField, read.MessageIDBeingRespondedTo, read.Status) == (0x8001, 9, 0xA700)
    assert (read.AffectedSOPClassUID, read.AffectedSOPInstanceUID, read.CommandDataSetType) == ("1.2", "1.3", 0x0101)
    assert read.ErrorComment == "x" * 64


@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_command_or_one_error(data: bytes) -> None:
    try:
        assert isinstance(decode(data).field, int)
    except CommandError as error:
        assert error.what


@given(command=commands(), at=st.integers(0, 400), byte=st.integers(0, 255), cut=st.integers(0, 400))
def test_a_damaged_command_is_a_command_or_one_error(command: Command, at: int, byte: int, cut: int) -> None:
    encoded = bytearray(encode(command))
    encoded[at % len(encoded)] = byte
    try:
        assert isinstance(decode(encoded[: cut or None]).field, int)
    except CommandError as error:
        assert error.what


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no Command Field"),
        (bytes(7), "cut off"),
        (b"\0\0\0\1\x02\0\0\0\1", "cut off in"),
        (b"\0\0\0\1\x04\0\0\0\1\0\0\0", "4 bytes where a number has 2"),
        (b"\x08\0\0\1\x02\0\0\0\1\0", "no place"),
        (b"\0\0\0\1\x02\0\0\0\1\0" * 2, "comes twice"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, said: str) -> None:
    with pytest.raises(CommandError, match=said):
        decode(data)
