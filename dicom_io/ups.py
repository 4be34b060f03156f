"""Unified Procedure Steps over DIMSE (PS3.4 Annex CC): the provider of UPS Push, Pull, Watch and Query on pynetdicom,
and the sender of UPS Event.

It keeps nothing: its owner does, and says by a `WorkitemError` what cannot be. Whatever else goes wrong is answered
with 0x0110 or, for a query, 0xC000.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, build_role, evt
from pynetdicom.sop_class import Verification

from dicom_io import workitem
from dicom_io._part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from dicom_io._transport import acknowledge_at_once, send_at_once
from dicom_io.errors import PeerError, ScansideError
from dicom_io.matching import selected
from dicom_io.scu import Peer, association_with
from dicom_io.workitem import (
    EVENT,
    FILTERED,
    PULL,
    PUSH,
    QUERY,
    WATCH,
    Step,
    WorkitemError,
    from_dataset,
    is_uid,
    text,
    to_dataset,
)

log = logging.getLogger(__name__)

SYNTAXES = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
MOST_MATCHES = 5000
"""A query is answered with no more; then with 0xA700, Out of resources."""
_COMMENT = 64  # of an LO


class Owner(Protocol):
    """Who keeps the work items. All may be called from several threads at once, and may raise `WorkitemError`.

    ``peer`` is the AE title that calls.
    """

    def create(self, peer: str, uid: str, step: Step) -> int:
        """N-CREATE; 0 or a warning."""

    def get(self, uid: str) -> Step:
        """N-GET: the whole item, without its lock."""

    def update(self, peer: str, uid: str, changes: Step, lock: str) -> int:
        """N-SET; 0 or a warning."""

    def change_state(self, peer: str, uid: str, state: str, lock: str) -> int:
        """N-ACTION Change UPS State; 0 or a warning."""

    def request_cancel(self, peer: str, uid: str, said: Step) -> int:
        """N-ACTION Request UPS Cancel; 0 or a warning."""

    def subscribe(self, ae_title: str, uid: str, locked: bool, keys: Step) -> int:
        """N-ACTION Subscribe; 0 or a warning."""

    def unsubscribe(self, ae_title: str, uid: str) -> int:
        """N-ACTION Unsubscribe; 0."""

    def suspend(self, ae_title: str, uid: str) -> int:
        """N-ACTION Suspend Global Subscription; 0."""

    def find(self, keys: Mapping[str, Any], limit: int) -> list[Step]:
        """C-FIND: what matches, at most so many."""

    def refused(self, peer: str, what: str, status: int, reason: str) -> None:
        """A request is answered with that failure."""


class UpsServer:
    """A running provider.

    Args:
        context: of TLS; None: none.
        accepted_calling: who may call; empty: everybody.

    Raises:
        ScansideError: the address cannot be had.
    """

    def __init__(
        self,
        ae_title: str,
        host: str,
        port: int,
        owner: Owner,
        *,
        context: ssl.SSLContext | None = None,
        accepted_calling: Sequence[str] = (),
    ) -> None:
        ae = AE(ae_title=ae_title)
        ae.implementation_class_uid = IMPLEMENTATION_CLASS_UID
        ae.implementation_version_name = IMPLEMENTATION_VERSION_NAME
        ae.require_calling_aet = list(accepted_calling)
        ae.maximum_associations = 20
        ae.acse_timeout = ae.dimse_timeout = 30.0
        ae.network_timeout = 60.0
        for uid in (PUSH, PULL, WATCH, QUERY, Verification):
            ae.add_supported_context(uid, list(SYNTAXES))
        serve = _Service(owner)
        handlers: list[Any] = [
            (evt.EVT_CONN_OPEN, send_at_once),
            (evt.EVT_PDU_SENT, acknowledge_at_once),
            (evt.EVT_N_CREATE, serve.create),
            (evt.EVT_N_GET, serve.get),
            (evt.EVT_N_SET, serve.set),
            (evt.EVT_N_ACTION, serve.action),
            (evt.EVT_C_FIND, serve.find),
        ]
        try:
            self._server = ae.start_server((host, port), block=False, evt_handlers=handlers, ssl_context=context)
        except OSError as error:
            what = f"cannot listen ({error.strerror or error})"
            raise ScansideError(what, f"{host}:{port}", "choose another address or port") from error

    @property
    def port(self) -> int:
        """The TCP port."""
        return int(self._server.server_address[1])

    def stop(self) -> None:
        """Accept no more, and end the associations."""
        self._server.shutdown()


class _Service:
    """Requests of pynetdicom, as the owner's words."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    def create(self, event: Any) -> tuple[Dataset, Dataset | None]:
        uid = str(event.request.AffectedSOPInstanceUID or "")
        return self._do(
            event, "N-CREATE", lambda peer: self._owner.create(peer, uid, from_dataset(event.attribute_list))
        )

    def get(self, event: Any) -> tuple[Dataset, Dataset | None]:
        found: list[Dataset] = []

        def work(_: str) -> int:
            step = self._owner.get(_requested(event))
            wanted = [f"{int(one):08X}" for one in event.attribute_identifiers or ()]
            found.append(to_dataset({key: step[key] for key in wanted if key in step} if wanted else step))
            return 0

        status, _ = self._do(event, "N-GET", work)
        return status, found[0] if found else None

    def set(self, event: Any) -> tuple[Dataset, Dataset | None]:
        def work(peer: str) -> int:
            changes = from_dataset(event.modification_list)
            return self._owner.update(peer, _requested(event), changes, text(changes, "TransactionUID"))

        return self._do(event, "N-SET", work)

    def action(self, event: Any) -> tuple[Dataset, Dataset | None]:
        return self._do(event, f"N-ACTION {event.action_type}", lambda peer: self._action(event, peer))

    def _action(self, event: Any, peer: str) -> int:
        uid = _requested(event)
        given = event.request.ActionInformation is not None
        said = from_dataset(event.action_information) if given else {}
        match event.action_type:
            case workitem.CHANGE_STATE:
                return self._owner.change_state(
                    peer, uid, text(said, "ProcedureStepState"), text(said, "TransactionUID")
                )
            case workitem.REQUEST_CANCEL:
                return self._owner.request_cancel(peer, uid, said)
        receiver = text(said, "ReceivingAE").strip()
        if not receiver:
            raise WorkitemError(0x0115, "ReceivingAE is missing")
        match event.action_type:
            case workitem.SUBSCRIBE:
                lock = text(said, "DeletionLock")
                if lock not in ("TRUE", "FALSE"):
                    raise WorkitemError(0x0115, "DeletionLock is neither TRUE nor FALSE")
                about = ("00741234", "00741230")
                keys = {key: one for key, one in said.items() if key not in about} if uid == FILTERED else {}
                return self._owner.subscribe(receiver, uid, lock == "TRUE", keys)
            case workitem.UNSUBSCRIBE:
                return self._owner.unsubscribe(receiver, uid)
            case workitem.SUSPEND:
                return self._owner.suspend(receiver, uid)
        raise WorkitemError(0x0123)

    def find(self, event: Any) -> Iterator[tuple[int | Dataset, Dataset | None]]:
        found: list[Step] = []
        keys: Step = {}

        def work(_: str) -> int:
            nonlocal keys
            keys = from_dataset(event.identifier)
            found.extend(self._owner.find(keys, MOST_MATCHES + 1))
            return 0

        status, _ = self._do(event, "C-FIND", work)
        if status.Status:
            # PS3.4 CC.2.8.4: an identifier that cannot be used is 0xA900.
            status.Status = 0xC000 if status.Status == 0x0110 else 0xA900
            yield status, None
            return
        for step in found[:MOST_MATCHES]:
            if event.is_cancelled:
                yield 0xFE00, None
                return
            yield 0xFF00, to_dataset(selected(step, keys))
        if len(found) > MOST_MATCHES:
            yield 0xA700, None

    def _do(self, event: Any, what: str, work: Callable[[str], int]) -> tuple[Dataset, Dataset | None]:
        """Do what a request asks for; the status to answer with, and why it is a failure."""
        peer = str(event.assoc.requestor.ae_title).strip()
        answer = Dataset()
        try:
            answer.Status = work(peer)
        except WorkitemError as error:
            answer.Status, answer.ErrorComment = error.status, error.what
        except Exception as error:  # a data set of a stranger, or a ledger that cannot be written
            log.exception("UPS: %s by %s failed", what, peer)
            answer.Status, answer.ErrorComment = 0x0110, f"it failed: {type(error).__name__}"
        if "ErrorComment" in answer:
            self._owner.refused(peer, what, answer.Status, answer.ErrorComment)
            answer.ErrorComment = answer.ErrorComment.encode("ascii", "replace").decode()[:_COMMENT]
        return answer, None


def _requested(event: Any) -> str:
    uid = str(event.request.RequestedSOPInstanceUID or "")
    if not is_uid(uid):
        raise WorkitemError(0xC307)
    return uid


def send_events(
    peer: Peer,
    calling_ae: str,
    events: Sequence[tuple[str, int, Step]],
    heard: Callable[[int], None],
    timeout: float = 30.0,
) -> None:
    """Report events by N-EVENT-REPORT on one association (PS3.4 CC.2.4).

    Args:
        events: UID of the item, Event Type ID and information of each.
        heard: called with the place of each that the peer answered, whatever its answer: it has it.

    Raises:
        PeerError: no association, or no answer to one of them.
    """
    contexts = {(EVENT, str(syntax)) for syntax in SYNTAXES}
    with association_with(peer, calling_ae, contexts, timeout, roles=[build_role(EVENT, scp_role=True)]) as association:
        for place, (uid, event_type, information) in enumerate(events):
            try:
                answer, _ = association.send_n_event_report(
                    to_dataset(information), event_type, PUSH, uid, meta_uid=EVENT
                )
            except (RuntimeError, ValueError) as error:
                raise PeerError(f"it cannot be told ({error})", str(peer), "see what it is set to accept") from error
            status = answer.get("Status")
            if status is None:
                raise PeerError(f"it did not answer N-EVENT-REPORT within {timeout:g} s", str(peer), "see its log")
            if status:
                log.warning("UPS: %s answered a report of type %d with 0x%04X", peer, event_type, status)
            heard(place)
