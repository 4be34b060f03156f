"""The acceptor's half of the DICOM upper layer: its state table (PS3.8 9.2) and its PDUs (PS3.8 9.3).

Only what a provider of associations needs: it answers requests and never asks for an association or its release.
A-ASSOCIATE PDUs are pynetdicom's; the others are so small that they are made here.
"""

from __future__ import annotations

import struct
from enum import Enum, IntEnum, StrEnum

MAXIMUM_PDU = 131_072
"""What peers are offered (PS3.8 D.1)."""

LONGEST_PDU = 1 << 20
"""What is read of one PDU other than P-DATA, and the longest P-DATA that is let through although less was offered."""


class PduType(IntEnum):
    """PS3.8 9.3.1."""

    ASSOCIATE_RQ = 1
    ASSOCIATE_AC = 2
    ASSOCIATE_RJ = 3
    P_DATA = 4
    RELEASE_RQ = 5
    RELEASE_RP = 6
    ABORT = 7


class State(StrEnum):
    """PS3.8 9.2.1, Tables 9-1 to 9-5."""

    IDLE = "Sta1"
    AWAITING_REQUEST = "Sta2"
    AWAITING_DECISION = "Sta3"
    ESTABLISHED = "Sta6"
    AWAITING_RELEASE_ANSWER = "Sta8"
    AWAITING_CLOSE = "Sta13"


class Event(StrEnum):
    """PS3.8 Table 9-10: what the peer sent, what this side wants, what the transport and the ARTIM timer do."""

    ASSOCIATE_AC = "Evt3"
    ASSOCIATE_RJ = "Evt4"
    CONNECTED = "Evt5"
    ASSOCIATE_RQ = "Evt6"
    ACCEPT = "Evt7"
    REJECT = "Evt8"
    SEND = "Evt9"
    P_DATA = "Evt10"
    RELEASE_RQ = "Evt12"
    RELEASE_RP = "Evt13"
    RELEASE_ANSWER = "Evt14"
    ABORT_REQUEST = "Evt15"
    ABORT = "Evt16"
    CLOSED = "Evt17"
    ARTIM_EXPIRED = "Evt18"
    INVALID = "Evt19"


class Action(Enum):
    """PS3.8 Tables 9-6 to 9-9, named by the standard; several that differ for other roles only are one here."""

    AWAIT_REQUEST = "AE-5"
    ASK = "AE-6"
    SEND_ACCEPT = "AE-7"
    SEND_REJECT = "AE-8"
    SEND_DATA = "DT-1"
    TAKE_DATA = "DT-2"
    TAKE_RELEASE = "AR-2"
    SEND_RELEASE = "AR-4"
    END = "AR-5"
    SEND_LATE_DATA = "AR-7"
    ABORT_AS_USER = "AA-1"
    CLOSE = "AA-2"
    TAKE_ABORT = "AA-3"
    TAKE_BREAK = "AA-4"
    FORGET = "AA-5"
    IGNORE = "AA-6"
    ABORT_AGAIN = "AA-7"
    ABORT_AS_PROVIDER = "AA-8"


def _table() -> dict[tuple[State, Event], tuple[Action, State]]:
    s, e, a = State, Event, Action
    table = {
        (s.IDLE, e.CONNECTED): (a.AWAIT_REQUEST, s.AWAITING_REQUEST),
        (s.AWAITING_REQUEST, e.ASSOCIATE_RQ): (a.ASK, s.AWAITING_DECISION),
        (s.AWAITING_REQUEST, e.ABORT): (a.CLOSE, s.IDLE),
        (s.AWAITING_REQUEST, e.CLOSED): (a.FORGET, s.IDLE),
        (s.AWAITING_REQUEST, e.ARTIM_EXPIRED): (a.CLOSE, s.IDLE),
        (s.AWAITING_DECISION, e.ACCEPT): (a.SEND_ACCEPT, s.ESTABLISHED),
        (s.AWAITING_DECISION, e.REJECT): (a.SEND_REJECT, s.AWAITING_CLOSE),
        (s.ESTABLISHED, e.SEND): (a.SEND_DATA, s.ESTABLISHED),
        (s.ESTABLISHED, e.P_DATA): (a.TAKE_DATA, s.ESTABLISHED),
        (s.ESTABLISHED, e.RELEASE_RQ): (a.TAKE_RELEASE, s.AWAITING_RELEASE_ANSWER),
        (s.AWAITING_RELEASE_ANSWER, e.SEND): (a.SEND_LATE_DATA, s.AWAITING_RELEASE_ANSWER),
        (s.AWAITING_RELEASE_ANSWER, e.RELEASE_ANSWER): (a.SEND_RELEASE, s.AWAITING_CLOSE),
        (s.AWAITING_CLOSE, e.ASSOCIATE_RQ): (a.ABORT_AGAIN, s.AWAITING_CLOSE),
        (s.AWAITING_CLOSE, e.INVALID): (a.ABORT_AGAIN, s.AWAITING_CLOSE),
        (s.AWAITING_CLOSE, e.ABORT): (a.CLOSE, s.IDLE),
        (s.AWAITING_CLOSE, e.CLOSED): (a.END, s.IDLE),
        (s.AWAITING_CLOSE, e.ARTIM_EXPIRED): (a.CLOSE, s.IDLE),
    }
    pdus = (e.ASSOCIATE_AC, e.ASSOCIATE_RJ, e.ASSOCIATE_RQ, e.P_DATA, e.RELEASE_RQ, e.RELEASE_RP, e.INVALID)
    for event in pdus:
        table.setdefault((s.AWAITING_REQUEST, event), (a.ABORT_AS_USER, s.AWAITING_CLOSE))
        table.setdefault((s.AWAITING_CLOSE, event), (a.IGNORE, s.AWAITING_CLOSE))
        for state in (s.AWAITING_DECISION, s.ESTABLISHED, s.AWAITING_RELEASE_ANSWER):
            table.setdefault((state, event), (a.ABORT_AS_PROVIDER, s.AWAITING_CLOSE))
    for state in (s.AWAITING_DECISION, s.ESTABLISHED, s.AWAITING_RELEASE_ANSWER):
        table[state, e.ABORT_REQUEST] = (a.ABORT_AS_USER, s.AWAITING_CLOSE)
        table[state, e.ABORT] = (a.TAKE_ABORT, s.IDLE)
        table[state, e.CLOSED] = (a.TAKE_BREAK, s.IDLE)
    return table


TABLE = _table()
"""(state, event) → (action, next state): PS3.8 Table 9-10, the columns of an acceptor."""

EVENT_OF = {
    PduType.ASSOCIATE_RQ: Event.ASSOCIATE_RQ,
    PduType.ASSOCIATE_AC: Event.ASSOCIATE_AC,
    PduType.ASSOCIATE_RJ: Event.ASSOCIATE_RJ,
    PduType.P_DATA: Event.P_DATA,
    PduType.RELEASE_RQ: Event.RELEASE_RQ,
    PduType.RELEASE_RP: Event.RELEASE_RP,
    PduType.ABORT: Event.ABORT,
}

RELEASE_RP = struct.pack(">BxI4x", PduType.RELEASE_RP, 4)


class AbortReason(IntEnum):
    """PS3.8 Table 9-26, reasons of a service provider."""

    NOT_SPECIFIED = 0
    UNRECOGNIZED_PDU = 1
    UNEXPECTED_PDU = 2
    INVALID_PARAMETER = 6


def abort(reason: AbortReason | None = None) -> bytes:
    """An A-ABORT PDU (PS3.8 9.3.8): of the service user, or of the provider with its reason."""
    source = 0 if reason is None else 2
    return struct.pack(">BxIxxBB", PduType.ABORT, 4, source, reason or 0)


class Rejection(Enum):
    """Why an association is not accepted: (result, source, reason) of PS3.8 Table 9-21, and in words."""

    APPLICATION_CONTEXT = (1, 1, 2, "application context name not supported")
    CALLING_AE = (1, 1, 3, "calling AE title not recognized")
    CALLED_AE = (1, 1, 7, "called AE title not recognized")
    PROTOCOL_VERSION = (1, 2, 2, "protocol version not supported")
    TOO_MANY = (2, 3, 2, "local limit exceeded")
    NO_LEDGER = (2, 3, 1, "temporary congestion")

    @property
    def pdu(self) -> bytes:
        """The A-ASSOCIATE-RJ PDU (PS3.8 9.3.4)."""
        result, source, reason, _ = self.value
        return struct.pack(">BxIxBBB", PduType.ASSOCIATE_RJ, 4, result, source, reason)

    @property
    def words(self) -> str:
        """The reason as the standard words it."""
        return self.value[3]


def p_data(context_id: int, message: bytes, *, command: bool, maximum: int) -> bytes:
    """P-DATA-TF PDUs with one fragment each (PS3.8 9.3.5, Annex E).

    Args:
        maximum: the longest PDU value that the peer takes, bytes; 0 is any.
    """
    room = max(maximum - 6, 1) if maximum else len(message)
    pdus = []
    for start in range(0, len(message), room):
        fragment = message[start : start + room]
        control = command | (start + room >= len(message)) << 1
        pdus.append(
            struct.pack(">BxIIBB", PduType.P_DATA, len(fragment) + 6, len(fragment) + 2, context_id, control) + fragment
        )
    return b"".join(pdus)
