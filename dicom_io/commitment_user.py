"""Storage Commitment Push Model as its user (PS3.4 Annex J): asking a peer to keep what it was sent."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from typing import Any

from pydicom.dataset import Dataset
from pynetdicom.dimse_primitives import N_EVENT_REPORT

from dicom_io.commitment import (
    INVALID_ARGUMENT,
    PUSH_MODEL,
    PUSH_MODEL_INSTANCE,
    REQUEST_ACTION,
    TRANSFER_SYNTAXES,
    CommitmentError,
    CommitmentReport,
    CommitmentRequest,
    decode_report,
    reference_items,
)
from dicom_io.errors import PeerError
from dicom_io.scu import Peer, association_with


def ask(
    peer: Peer,
    our_ae: str,
    request: CommitmentRequest,
    *,
    timeout: float = 30.0,
    wait_seconds: float = 2.0,
    arrived: Callable[[], bool] = lambda: False,
) -> CommitmentReport | None:
    """Ask for storage commitment by N-ACTION (PS3.4 J.3.2), and wait a moment for the report on the same association.

    Args:
        timeout: seconds for each step: connection, association, answer.
        wait_seconds: how long the association is held for the report after the answer.
        arrived: whether the report has come another way meanwhile; then it is held no longer.

    Returns:
        the report, if it came so soon; None: it will come later, on an association that the peer opens.

    Raises:
        NotAccepted: the peer offers no storage commitment.
        PeerError: no association, no answer, or a refusal of the request.
    """
    reports: queue.Queue[tuple[Any, int]] = queue.Queue()
    contexts = {(PUSH_MODEL, syntax) for syntax in TRANSFER_SYNTAXES[:2]}
    with association_with(peer, our_ae, contexts, timeout) as association:
        answers = association._serve_request

        def serve(message: Any, context: int) -> None:
            # pynetdicom hands a request of the peer to us here, and so does the association an answer.
            if isinstance(message, N_EVENT_REPORT) and message.is_valid_request:
                reports.put((message, context))
            else:
                answers(message, context)

        association._serve_request = serve
        try:
            answer, _ = association.send_n_action(_data_set(request), REQUEST_ACTION, PUSH_MODEL, PUSH_MODEL_INSTANCE)
        except (RuntimeError, ValueError) as error:
            raise PeerError(f"it cannot be asked for storage commitment ({error})", str(peer), "see its log") from error
        status = answer.get("Status")
        if status is None:
            raise PeerError(f"it did not answer N-ACTION within {timeout:g} s", str(peer), "see its log")
        if status != 0x0000:
            raise PeerError(f"it refused storage commitment with 0x{status:04X}", str(peer), "see its log")
        until = time.monotonic() + wait_seconds
        while association.is_established and time.monotonic() < until and not arrived():
            try:
                message, context = reports.get(timeout=0.1)
            except queue.Empty:
                continue
            report = _answered(association, message, context, request.transaction_uid)
            if report is not None:
                return report
        return None


def _answered(association: Any, message: Any, context: int, transaction: str) -> CommitmentReport | None:
    """The report on that transaction; None if it is none, or of another. It is answered in any case."""
    syntax = next(one.transfer_syntax[0] for one in association.accepted_contexts if one.context_id == context)
    report: CommitmentReport | None = None
    status = 0x0000
    try:
        report = decode_report(message.EventInformation.getvalue() if message.EventInformation else b"", syntax)
        if report.transaction_uid != transaction:
            report, status = None, INVALID_ARGUMENT
    except CommitmentError as error:
        status = error.status
    said = N_EVENT_REPORT()
    said.MessageIDBeingRespondedTo = message.MessageID
    said.AffectedSOPClassUID, said.AffectedSOPInstanceUID = PUSH_MODEL, PUSH_MODEL_INSTANCE
    said.EventTypeID = message.EventTypeID
    said.Status = status
    association.dimse.send_msg(said, context)
    return report


def _data_set(request: CommitmentRequest) -> Dataset:
    made = Dataset()
    made.TransactionUID = request.transaction_uid
    made.ReferencedSOPSequence = reference_items(request.references)
    return made
