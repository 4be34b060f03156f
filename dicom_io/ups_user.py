"""Unified Procedure Step Pull as user (PS3.4 CC.3.1): find work on somebody else's worklist, claim it, end it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pydicom.dataset import Dataset

from dicom_io.errors import PeerError
from dicom_io.scu import Peer, association_with
from dicom_io.ups import SYNTAXES
from dicom_io.workitem import CHANGE_STATE, MEANINGS, PULL, PUSH, SCHEDULED, Step, from_dataset, put, text, to_dataset

PENDING = (0xFF00, 0xFF01)
LONGEST_ANSWER = 6
"""So many times the time limit of one answer all answers to a query may take."""
MOST_STEPS = 1000
"""More answers to one query are not waited for."""

NOT_OURS, CLAIMED_ALREADY = 0xC301, 0xC302
ENDED = (0xC300, 0xC311, 0xB304, 0xB306)
"""Statuses that say that a step is COMPLETED or CANCELED."""
GONE = (0xC307, 0x0112)
LOCKED = (NOT_OURS, *ENDED)

_RETURNED = (
    "SOPInstanceUID", "ScheduledProcedureStepPriority", "InputReadinessState", "PatientID", "IssuerOfPatientID",
    "StudyInstanceUID",
)  # fmt: skip
_SEQUENCES = ("ScheduledStationNameCodeSequence", "ReferencedRequestSequence", "InputInformationSequence")


class Pull:
    """Requests to one provider, on one association; `pulling` makes it.

    Every method raises `PeerError` where there is no answer in time, or one that cannot be read.
    """

    def __init__(self, association: Any, peer: Peer, timeout: float) -> None:
        self._association = association
        self._peer = peer
        self._timeout = timeout

    def scheduled(self, wanted: Step) -> list[Step]:
        """The steps that are SCHEDULED and have one code among their Scheduled Workitem Codes.

        Args:
            wanted: that code, an item of a code sequence.

        Raises:
            PeerError: also where the query fails.
        """
        asked = _empty_keys()
        asked.ProcedureStepState = SCHEDULED
        code = Dataset()
        code.CodeValue, code.CodingSchemeDesignator = text(wanted, "CodeValue"), text(wanted, "CodingSchemeDesignator")
        code.CodeMeaning = ""
        asked.ScheduledWorkitemCodeSequence = [code]
        return self._find(asked)

    def _find(self, asked: Dataset) -> list[Step]:
        found: list[Step] = []
        deadline = time.monotonic() + LONGEST_ANSWER * self._timeout
        try:
            for status, answer in self._association.send_c_find(asked, PULL):
                number = self._status(status, "C-FIND")
                if number not in PENDING:
                    if number:
                        raise PeerError(f"it answered C-FIND with {said(number)}", str(self._peer), "see its log")
                    break
                if len(found) >= MOST_STEPS or time.monotonic() > deadline:
                    self._association.abort()
                    what = "it does not come to an end with its answers to one C-FIND"
                    raise PeerError(what, str(self._peer), "see how many steps its worklist has")
                if answer is not None:
                    found.append(from_dataset(answer))
        except PeerError:
            raise
        except Exception as error:  # pydicom stumbles in its own ways over what strangers send
            raise PeerError(f"its worklist cannot be read ({error})", str(self._peer), "see its log") from error
        return found

    def of_study(self, study_instance_uid: str) -> list[Step]:
        """The steps whose request names a study, in whatever state; the provider may answer with others, too.

        Raises:
            PeerError: also where the query fails.
        """
        asked = _empty_keys()
        request = Dataset()
        request.StudyInstanceUID = study_instance_uid
        asked.ReferencedRequestSequence = [request]
        asked.ScheduledWorkitemCodeSequence = []
        asked.ProcedureStepState = ""
        return self._find(asked)

    def get(self, uid: str) -> tuple[int, Step]:
        """N-GET of a whole step: the status, and the step; {} where there is none."""
        status, step = self._request("N-GET", lambda: self._association.send_n_get([], PUSH, uid, meta_uid=PULL))
        try:
            return status, {} if step is None else from_dataset(step)
        except Exception as error:
            raise PeerError(f"a step of it cannot be read ({error})", str(self._peer), "see its log") from error

    def set(self, uid: str, changes: Mapping[str, Any], lock: str) -> int:
        """N-SET (PS3.4 CC.2.6) by whoever holds the lock; the status.

        Args:
            lock: the Transaction UID; "" while nobody has claimed it.
        """
        given: Step = {**changes}
        if lock:
            put(given, "TransactionUID", "UI", lock)
        data = to_dataset(given)
        return self._request("N-SET", lambda: self._association.send_n_set(data, PUSH, uid, meta_uid=PULL))[0]

    def change_state(self, uid: str, state: str, lock: str) -> int:
        """N-ACTION Change UPS State (PS3.4 CC.2.1); the status."""
        asked: Step = {}
        put(asked, "ProcedureStepState", "CS", state)
        put(asked, "TransactionUID", "UI", lock)
        data = to_dataset(asked)
        return self._request(
            "N-ACTION", lambda: self._association.send_n_action(data, CHANGE_STATE, PUSH, uid, meta_uid=PULL)
        )[0]

    def _request(self, name: str, send: Callable[[], tuple[Dataset, Dataset | None]]) -> tuple[int, Dataset | None]:
        try:
            status, answer = send()
        except (RuntimeError, ValueError, AttributeError) as error:
            raise PeerError(f"it cannot be asked by {name} ({error})", str(self._peer), "see its log") from error
        return self._status(status, name), answer

    def _status(self, status: Dataset, name: str) -> int:
        code = status.get("Status")
        if code is None:
            raise PeerError(f"it did not answer {name} within {self._timeout:g} s", str(self._peer), "see its log")
        return int(code)


def is_done(status: int) -> bool:
    """Success, or one of the warnings of N-SET and N-ACTION (PS3.7 Annex C)."""
    return status in (0x0000, 0x0001, 0x0107, 0x0116) or (status & 0xF000 == 0xB000 and status not in ENDED)


def _empty_keys() -> Dataset:
    asked = Dataset()
    for keyword in _RETURNED:
        setattr(asked, keyword, "")
    for keyword in _SEQUENCES:
        setattr(asked, keyword, [])
    return asked


def said(status: int) -> str:
    """A status in words, for people."""
    return f"status 0x{status:04X}" + (f" ({MEANINGS[status]})" if status in MEANINGS else "")


@contextmanager
def pulling(peer: Peer, calling_ae: str, timeout: float = 10.0) -> Iterator[Pull]:
    """An association for work on a worklist.

    Args:
        timeout: seconds for each step.

    Raises:
        PeerError: there is none, with the reason.
    """
    with association_with(peer, calling_ae, {(PULL, str(syntax)) for syntax in SYNTAXES}, timeout) as association:
        yield Pull(association, peer, timeout)
