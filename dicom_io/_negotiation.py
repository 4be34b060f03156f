"""What an association request asks for, and the answer that accepts it (PS3.8 9.3.2 and 9.3.3, PS3.7 Annex D).

pynetdicom reads the request, chooses the presentation contexts, and writes the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydicom.uid import UID
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    AsynchronousOperationsWindowNegotiation,
    ImplementationClassUIDNotification,
    ImplementationVersionNameNotification,
    MaximumLengthNotification,
    SCP_SCU_RoleSelectionNegotiation,
)
from pynetdicom.presentation import PresentationContext, negotiate_as_acceptor

from dicom_io._part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from dicom_io._upper_layer import MAXIMUM_PDU


@dataclass(frozen=True, slots=True)
class Negotiated:
    """An association request, understood.

    Attributes:
        is_version_1: whether it speaks the one protocol version that there is.
        contexts: ID → abstract and transfer syntax of each presentation context that is accepted.
        peer_maximum: the longest PDU value that the peer takes, bytes; 0 is any.
        acceptance: the A-ASSOCIATE-AC PDU.
    """

    calling_ae: str
    called_ae: str
    application_context: str
    is_version_1: bool
    contexts: dict[int, tuple[str, str]]
    peer_maximum: int
    acceptance: bytes


def negotiate(request: bytes, supported: list[PresentationContext]) -> Negotiated:
    """Read an A-ASSOCIATE-RQ PDU and choose among what it proposes.

    Extended negotiation that is not looked at here is left unanswered, which declines it: SOP class extended and
    common extended negotiation, and a user identity (PS3.7 D.3.3).

    Raises:
        Exception: whatever pynetdicom raises on hostile bytes; or two presentation contexts have one ID, or one lacks
            its syntaxes.
    """
    pdu = A_ASSOCIATE_RQ()
    pdu.decode(request)
    asked: Any = pdu.to_primitive()
    proposed = list(asked.presentation_context_definition_list)
    for context in proposed:
        # An abstract syntax without a transfer syntax cannot be answered (PS3.8 9.3.2.2).
        if context.abstract_syntax is None or not context.transfer_syntax or context.context_id is None:
            raise ValueError("a presentation context lacks its syntaxes")
    if len({context.context_id for context in proposed}) != len(proposed):
        raise ValueError("two presentation contexts have the same ID")
    roles, peer_maximum = {}, 0
    for item in asked.user_information:
        if isinstance(item, SCP_SCU_RoleSelectionNegotiation) and item.sop_class_uid is not None:
            roles[UID(item.sop_class_uid)] = (item.scu_role, item.scp_role)
        elif isinstance(item, MaximumLengthNotification):
            peer_maximum = int(item.maximum_length_received or 0)
    results, accepted_roles = negotiate_as_acceptor(proposed, supported, roles or None)
    return Negotiated(
        calling_ae=str(asked.calling_ae_title).strip(),
        called_ae=str(asked.called_ae_title).strip(),
        application_context=str(asked.application_context_name or ""),
        is_version_1=bool(pdu.protocol_version & 1),
        contexts={
            int(context.context_id or 0): (str(context.abstract_syntax), str(context.transfer_syntax[0]))
            for context in results
            if context.result == 0
        },
        peer_maximum=peer_maximum,
        acceptance=_acceptance(asked, results, accepted_roles),
    )


def _acceptance(asked: Any, results: list[PresentationContext], roles: list[Any]) -> bytes:
    answer = A_ASSOCIATE()
    answer.application_context_name = asked.application_context_name
    answer.calling_ae_title = asked.calling_ae_title
    answer.called_ae_title = asked.called_ae_title
    answer.result, answer.result_source = 0, 1
    answer.presentation_context_definition_results_list = results
    length, uid, version = (
        MaximumLengthNotification(),
        ImplementationClassUIDNotification(),
        ImplementationVersionNameNotification(),
    )
    length.maximum_length_received = MAXIMUM_PDU
    uid.implementation_class_uid = UID(IMPLEMENTATION_CLASS_UID)
    version.implementation_version_name = IMPLEMENTATION_VERSION_NAME
    answer.user_information = [length, uid, version, *roles]
    if any(isinstance(item, AsynchronousOperationsWindowNegotiation) for item in asked.user_information):
        window = AsynchronousOperationsWindowNegotiation()
        window.maximum_number_operations_invoked = window.maximum_number_operations_performed = 1
        answer.user_information.append(window)
    pdu = A_ASSOCIATE_AC()
    pdu.from_primitive(answer)
    return bytes(pdu.encode())
