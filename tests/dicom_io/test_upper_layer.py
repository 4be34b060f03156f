"""The acceptor's state table and PDUs against pynetdicom's, which are the standard's (PS3.8 9.2 and 9.3)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pynetdicom.fsm import TRANSITION_TABLE
from pynetdicom.pdu import A_ABORT_RQ, A_ASSOCIATE_RJ, A_RELEASE_RP, P_DATA_TF

from dicom_io._upper_layer import RELEASE_RP, TABLE, AbortReason, Event, Rejection, State, abort, p_data

# What an acceptor never wants: to ask for an association or its release, or to speak before one is there.
NEVER = {"Evt1", "Evt2", "Evt11"}
# One side may want to abort, send or answer at any time; ours does so in the states in which it can.
OWN = {Event.SEND, Event.ABORT_REQUEST, Event.ACCEPT, Event.REJECT, Event.RELEASE_ANSWER}


def test_every_entry_is_the_standards() -> None:
    assert TABLE
    for (state, event), (action, _) in TABLE.items():
        assert TRANSITION_TABLE[event.value, state.value] == action.value, (state, event)


def test_nothing_that_can_happen_is_missing() -> None:
    ours = {(event.value, state.value) for state, event in TABLE}
    states = {state.value for state in State}
    standard = {key for key in TRANSITION_TABLE if key[1] in states and key[0] not in NEVER}
    assert standard == ours


@pytest.mark.parametrize("state", [state for state in State if state is not State.IDLE])
def test_whatever_a_peer_does_has_an_entry(state: State) -> None:
    for event in set(Event) - OWN - {Event.CONNECTED}:
        if event is Event.ARTIM_EXPIRED and state not in (State.AWAITING_REQUEST, State.AWAITING_CLOSE):
            continue  # the timer runs in those two only
        assert (state, event) in TABLE


@pytest.mark.parametrize("reason", [None, *AbortReason])
def test_an_abort_reads_as_one(reason: AbortReason | None) -> None:
    pdu = A_ABORT_RQ()
    pdu.decode(abort(reason))
    assert (pdu.source, pdu.reason_diagnostic) == ((0, 0) if reason is None else (2, reason))


@pytest.mark.parametrize("rejection", Rejection)
def test_a_rejection_reads_as_one(rejection: Rejection) -> None:
    pdu = A_ASSOCIATE_RJ()
    pdu.decode(rejection.pdu)
    assert (pdu.result, pdu.source, pdu.reason_diagnostic) == rejection.value[:3]
    assert pdu.reason_str.lower().replace("recognised", "recognized").replace("-", " ") == rejection.words.lower()


def test_a_release_answer_reads_as_one() -> None:
    pdu = A_RELEASE_RP()
    pdu.decode(RELEASE_RP)
    assert pdu.encode() == RELEASE_RP


@given(
    message=st.binary(min_size=1, max_size=300),
    maximum=st.sampled_from([0, 1, 7, 16, 128, 16_384]),
    command=st.booleans(),
)
def test_fragments_read_as_the_message_in_pdus_no_longer_than_the_peer_takes(
    message: bytes, maximum: int, command: bool
) -> None:
    encoded = p_data(3, message, command=command, maximum=maximum)
    read, last, at = b"", False, 0
    while at < len(encoded):
        length = int.from_bytes(encoded[at + 2 : at + 6], "big")
        assert not last
        assert not maximum or length <= max(maximum, 7)  # one byte needs seven
        pdu = P_DATA_TF()
        pdu.decode(encoded[at : at + 6 + length])
        (item,) = pdu.presentation_data_value_items
        control = item.presentation_data_value[0]
        assert (item.context_id, control & 1) == (3, command)
        read += item.presentation_data_value[1:]
        last = bool(control & 2)
        at += 6 + length
    assert (read, last) == (message, True)
