"""Modality worklist user (PS3.4 Annex K): ask what is scheduled, on pynetdicom."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom.sop_class import ModalityWorklistInformationFind

from dicom_io.errors import PeerError
from dicom_io.scu import Peer, association_with
from dicom_io.workitem import Step, from_dataset

log = logging.getLogger(__name__)

SYNTAXES = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
PENDING = (0xFF00, 0xFF01)
LONGEST_ANSWER = 6
"""So many times the time limit of one answer all answers to a question may take."""
MOST_ITEMS = 200
"""More answers are not waited for: the provider ignores the key that it was asked by, as PS3.4 lets it."""

_ASKED = (
    "PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "AdmittingDiagnosesDescription",
    "AccessionNumber", "StudyInstanceUID", "RequestedProcedureID", "RequestedProcedurePriority",
    "RequestedProcedureDescription", "ReasonForTheRequestedProcedure", "ReasonForTheImagingServiceRequest",
    "PlacerOrderNumberImagingServiceRequest",
)  # fmt: skip
"""Return keys, and no more: an order has much about a patient that this box has no use for."""
_QUALIFIERS = ("UniversalEntityID", "UniversalEntityIDType")
_CODE = ("CodeValue", "CodingSchemeDesignator", "CodeMeaning")
_SCHEDULED = (
    "Modality", "ScheduledStationAETitle", "ScheduledProcedureStepStartDate", "ScheduledProcedureStepStartTime",
    "ScheduledProcedureStepID", "ScheduledProcedureStepDescription",
)  # fmt: skip


class Query:
    """Questions to one provider, on one association; `asking` makes it."""

    def __init__(self, association: Any, peer: Peer, timeout: float) -> None:
        self._association = association
        self._peer = peer
        self._timeout = timeout

    def find(self, keyword: str, value: str) -> tuple[list[Step], bool]:
        """What is scheduled with that value in one attribute of the first level, whatever the step's modality or date.

        The provider need not match by it (of these attributes only Patient ID is required, PS3.4 Table K.6-1), so an
        answer may be about something else.

        Returns:
            items in the DICOM JSON model, and whether that is all there is.

        Raises:
            PeerError: a failure, no answer in time, or answers without end.
        """
        found: list[Step] = []
        deadline = time.monotonic() + LONGEST_ANSWER * self._timeout
        unreadable = 0
        cancelled = False
        try:
            for number, (status, answer) in enumerate(
                self._association.send_c_find(_identifier(keyword, value), ModalityWorklistInformationFind)
            ):
                code = status.get("Status")
                if code is None:
                    what = f"it did not answer C-FIND within {self._timeout:g} s"
                    raise PeerError(what, str(self._peer), "see its log")
                if code not in PENDING:
                    # 0xFE00: it heeded our cancel.
                    if code and not (cancelled and code == 0xFE00):
                        # Its ErrorComment may name a patient and stays out of our log.
                        raise PeerError(f"it answered C-FIND with status 0x{code:04X}", str(self._peer), "see its log")
                    break
                if number >= 10 * MOST_ITEMS or time.monotonic() > deadline:
                    self._association.abort()
                    what = "it does not come to an end with its answers to one C-FIND"
                    raise PeerError(what, str(self._peer), "see how many items its worklist has")
                if number >= MOST_ITEMS:
                    if not cancelled:
                        cancelled = True
                        self._association.send_c_cancel(1, query_model=ModalityWorklistInformationFind)
                    continue
                item = _readable(answer)
                if item is None:
                    unreadable += 1
                else:
                    found.append(item)
        except (RuntimeError, ValueError) as error:
            raise PeerError(f"it cannot be asked ({error})", str(self._peer), "see its log") from error
        if unreadable:
            log.warning("%s: %d items of its worklist cannot be read and are left out", self._peer, unreadable)
        return found, not cancelled


@contextmanager
def asking(peer: Peer, calling_ae: str, timeout: float = 10.0) -> Iterator[Query]:
    """An association for questions.

    Args:
        timeout: seconds for each step, and between two answers.

    Raises:
        PeerError: there is none, with the reason.
    """
    contexts = {(str(ModalityWorklistInformationFind), str(syntax)) for syntax in SYNTAXES}
    with association_with(peer, calling_ae, contexts, timeout) as association:
        yield Query(association, peer, timeout)


def _identifier(keyword: str, value: str) -> Dataset:
    """Every return key empty, which matches all, but for one."""
    asked = _empty(_ASKED)
    asked.IssuerOfPatientIDQualifiersSequence = [_empty(_QUALIFIERS)]
    asked.ReasonForRequestedProcedureCodeSequence = [_empty(_CODE)]
    asked.ScheduledProcedureStepSequence = [_empty(_SCHEDULED)]
    setattr(asked, keyword, value)
    if not value.isascii():
        asked.SpecificCharacterSet = "ISO_IR 192"
    return asked


def _empty(keywords: Sequence[str]) -> Dataset:
    made = Dataset()
    for keyword in keywords:
        setattr(made, keyword, "")
    return made


def _readable(answer: Dataset | None) -> Step | None:
    try:
        return None if answer is None else from_dataset(answer)
    except Exception as error:  # pydicom stumbles in its own ways over what strangers send
        log.debug("an item of a worklist cannot be read: %s", type(error).__name__)
        return None
