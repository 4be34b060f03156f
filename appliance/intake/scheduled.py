"""What the hospital's modality worklist says of a study's order: read, and asked for as soon as the study arrives.

The answer is stored and matched as an order that came over HL7 is. Nothing waits for it: an answer that comes after the
gate's decision has the gate asked again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import datetime

from sqlalchemy.exc import SQLAlchemyError

from appliance.governance.ordered import accessions
from appliance.ledger.orders import QUERIED, Identifier, NewMessage, NewOrder, Scheduled
from appliance.ledger.queries import LONGEST_PAUSE, Unasked
from appliance.ledger.store import Ledger
from dicom_io.errors import ScansideError
from dicom_io.mwl import Query, asking
from dicom_io.scu import Peer
from dicom_io.workitem import Step, text, values

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
FIRST_PAUSE = 1.0
AGAIN_SECONDS = 30.0
"""After an answer that has nothing of the study: the order of an emergency is often entered while it is scanned."""
MOST_ACCESSIONS = 5
LONGEST_NUMBER, LONGEST_TEXT = 64, 2000
PRIORITIES = {"STAT": "S", "HIGH": "A", "ROUTINE": "R", "MEDIUM": "R", "LOW": "R"}
"""Requested Procedure Priority (0040,1003) → HL7 table 0485, in which orders have it."""


def is_about(item: Step, numbers: Collection[str], study_instance_uid: str) -> bool:
    """Whether an item of the worklist is the order of a study: by accession number, or by the study itself."""
    return _said(item, "AccessionNumber") in numbers or _said(item, "StudyInstanceUID") == study_instance_uid


def orders_in(items: Iterable[Step], urgent: Collection[str], authority: str) -> tuple[NewOrder, ...]:
    """The orders that items of a worklist are of. Several steps of one order are one.

    Args:
        urgent: Requested Procedure Priorities whose study goes before all others.
        authority: who assigns patient IDs where an item does not say.
    """
    found: dict[tuple[str, str, Identifier], list[Step]] = {}
    for item in items:
        qualifiers = (values(item, "IssuerOfPatientIDQualifiersSequence") or [{}])[0]
        issuer = _said(item, "IssuerOfPatientID") or authority
        patient = Identifier(_said(item, "PatientID"), issuer, _said(qualifiers, "UniversalEntityID"))
        key = _said(item, "AccessionNumber"), _said(item, "StudyInstanceUID"), patient
        if patient.value and max(len(key[0]), len(key[1])) <= LONGEST_NUMBER:
            found.setdefault(key, []).append(item)
    return tuple(_order(*key, steps, urgent) for key, steps in found.items())


def _order(
    accession: str, study_instance_uid: str, patient: Identifier, items: Sequence[Step], urgent: Collection[str]
) -> NewOrder:
    said = [_said(item, "RequestedProcedurePriority").upper() for item in items]
    wanted = {one.upper() for one in urgent}
    priority = next((one for one in said if one in wanted), next(filter(None, said), ""))
    return NewOrder(
        accession=accession,
        study_instance_uid=study_instance_uid,
        placer=next(filter(None, (_said(one, "PlacerOrderNumberImagingServiceRequest") for one in items)), ""),
        cancelled=False,
        patient=(patient,),
        birth_date=next(filter(None, map(_birth_date, items)), ""),
        priority=PRIORITIES.get(priority, ""),
        urgent=priority in wanted,
        reason="; ".join(dict.fromkeys(one for item in items for one in _reasons(item)))[:LONGEST_TEXT],
    )


def _said(item: Step, keyword: str) -> str:
    return text(item, keyword).strip()


def _birth_date(item: Step) -> str:
    said = _said(item, "PatientBirthDate")
    try:
        return datetime.strptime(said, "%Y%m%d").strftime("%Y%m%d") if len(said) == 8 else ""
    except ValueError:
        return ""


def _reasons(item: Step) -> list[str]:
    """Why the study is asked for: as text, as codes, and what the request and the admission say."""
    codes = (_said(one, "CodeMeaning") for one in values(item, "ReasonForRequestedProcedureCodeSequence")[:20])
    places = ("ReasonForTheRequestedProcedure", "ReasonForTheImagingServiceRequest", "AdmittingDiagnosesDescription")
    return [one for one in (_said(item, places[0]), *codes, *(_said(item, place) for place in places[1:])) if one]


class Asker(threading.Thread):
    """Asks about one study after another, until it is stopped.

    Args:
        peer: makes the peer anew for each association: files for TLS may have changed.
        ring: wakes the engine; called after each answer that changed something.
        give_up_seconds: so long after the first image a study is asked about.
        turn: called at every turn of the loop.
    """

    def __init__(
        self,
        ledger: Ledger,
        peer: Callable[[], Peer],
        calling_ae: str,
        urgent: Collection[str],
        authority: str,
        ring: Callable[[], None],
        *,
        answer_seconds: float,
        give_up_seconds: float,
        turn: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(name="modality worklist", daemon=True)
        self._ledger = ledger
        self._peer = peer
        self._calling = calling_ae
        self._urgent = urgent
        self._authority = authority
        self._ring = ring
        self._answer_seconds = answer_seconds
        self._give_up = give_up_seconds
        self._turn = turn
        self._stopping = threading.Event()
        self._pause = 0.0
        self._since = 0

    def stop(self) -> None:
        """Begin no further association."""
        self._stopping.set()

    def run(self) -> None:
        """The thread's loop."""
        while not self._stopping.is_set():
            self._turn()
            try:
                self._step()
            except (OSError, SQLAlchemyError):
                log.exception("modality worklist: the ledger failed; it goes on")
                self._pause = LONGEST_PAUSE
            self._stopping.wait(self._pause or POLL_SECONDS)

    def _step(self) -> None:
        for one in self._ledger.give_up_asking(self._give_up):
            log.error("study %d: the modality worklist says nothing of its order: %s", one.study_id, one.reason)
        self._since = self._ledger.too_old_to_ask(self._since, self._give_up)
        waiting = self._ledger.unasked_studies(self._since, self._give_up)
        if not waiting:
            self._pause = 0.0
            return
        left = list(waiting)
        try:
            peer = self._peer()
            with asking(peer, self._calling, self._answer_seconds) as query:
                for one in waiting:
                    self._turn()
                    self._ask(one, query, peer)
                    left.remove(one)
                    self._pause = 0.0
                    if self._stopping.is_set():
                        return
        except ScansideError as error:
            # The peer's fault, which every study shares: nothing is asked before the pause is over.
            if not self._pause:
                log.error("modality worklist: %s; studies go on without their orders", error)
            self._pause = min(LONGEST_PAUSE, max(FIRST_PAUSE, 2 * self._pause))
            self._ledger.asked_in_vain([one.study_id for one in left], str(error), self._pause)

    def _ask(self, one: Unasked, query: Query, peer: Peer) -> None:
        headers = [instance.header for instance in self._ledger.instances(one.study_id)]
        numbers = accessions(headers)[:MOST_ACCESSIONS]
        patients = dict.fromkeys(header.patient_id.strip() for header in headers)
        keys = [("AccessionNumber", number) for number in numbers]
        keys += [("StudyInstanceUID", one.study_instance_uid)]
        # By which alone every provider must match.
        keys += [("PatientID", patient) for patient in list(patients)[:MOST_ACCESSIONS] if patient]
        for keyword, value in keys:
            self._turn()
            items, _ = query.find(keyword, value)
            found = [item for item in items if is_about(item, numbers, one.study_instance_uid)]
            if orders := orders_in(found, self._urgent, self._authority):
                self._ledger.take_scheduled(one.study_id, _message(found, orders, peer))
                log.info("study %d: the modality worklist has its order", one.study_id)
                self._ring()
                return
        self._ledger.asked_in_vain([one.study_id], "it has nothing of this study", AGAIN_SECONDS, answered=True)


def _message(items: Sequence[Step], orders: Sequence[NewOrder], peer: Peer) -> NewMessage:
    content = json.dumps(list(items), ensure_ascii=False, indent=1).encode()
    return NewMessage(
        peer=peer.host,
        sender=peer.ae_title,
        control_id="",
        kind=QUERIED,
        digest=hashlib.sha256(content).hexdigest(),
        content=content,
        code="AA",
        reason="",
        changes=tuple(Scheduled(one) for one in orders),
    )
