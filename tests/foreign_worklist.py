"""A worklist of Unified Procedure Steps that shares no code with the box: pynetdicom's AE, and PS3.4 CC by hand.

It stands for a real one, of which none could be had.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.sop_class import UnifiedProcedureStepPull, UnifiedProcedureStepPush


def code(value: str, scheme: str = "DCM") -> Dataset:
    made = Dataset()
    made.CodeValue, made.CodingSchemeDesignator, made.CodeMeaning = value, scheme, value
    return made


def ai_task(uid: str, study: str = "1.1", patient: str = "P1", **changes: Any) -> Dataset:
    """A step that asks for computer-aided detection on a study."""
    task = Dataset()
    task.SOPClassUID, task.SOPInstanceUID = UnifiedProcedureStepPush, uid
    task.ProcedureStepState, task.ScheduledProcedureStepPriority = "SCHEDULED", "HIGH"
    task.ScheduledProcedureStepStartDateTime = "20261130120000"
    task.ProcedureStepLabel, task.InputReadinessState = "Look for bleeding", "READY"
    task.PatientID, task.IssuerOfPatientID, task.PatientName = patient, "HOSP", "Some^Body"
    task.ScheduledWorkitemCodeSequence = [code("110004")]
    task.ScheduledStationNameCodeSequence = []
    source, request = Dataset(), Dataset()
    source.TypeOfInstances, source.StudyInstanceUID, source.SeriesInstanceUID = "DICOM", study, f"{study}.1"
    request.StudyInstanceUID, request.AccessionNumber = study, "A1"
    task.InputInformationSequence, task.ReferencedRequestSequence = [source], [request]
    for keyword, value in changes.items():
        setattr(task, keyword, value)
    return task


class ForeignWorklist:
    """The worklist, at `port`.

    Attributes:
        steps, locks: by SOP Instance UID.
        claims: every change to IN PROGRESS that was granted: (item, lock).
        told: every change of state that was granted.
        answer: what a request is answered with instead of being done, by its name.
    """

    def __init__(self, *steps: Dataset) -> None:
        self.steps = {str(one.SOPInstanceUID): one for one in steps}
        self.locks: dict[str, str] = {}
        self.claims: list[tuple[str, str]] = []
        self.told: list[tuple[str, str]] = []
        self.answer: dict[str, int] = {}
        self.after_find: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._stopped = False
        ae = AE(ae_title="MANAGER")
        ae.add_supported_context(UnifiedProcedureStepPull)
        self._server = ae.start_server(
            ("127.0.0.1", 0),
            block=False,
            evt_handlers=[
                (evt.EVT_C_FIND, self._find), (evt.EVT_N_GET, self._get),
                (evt.EVT_N_SET, self._set), (evt.EVT_N_ACTION, self._action),
            ],
        )  # fmt: skip
        self.port = int(self._server.server_address[1])

    def stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            self._server.shutdown()

    def state(self, uid: str) -> str:
        return str(self.steps[uid].ProcedureStepState)

    def _find(self, event: Any) -> Iterator[tuple[int, Dataset | None]]:
        asked = event.identifier
        wanted = {(one.CodeValue, one.CodingSchemeDesignator) for one in asked.ScheduledWorkitemCodeSequence}
        studies = {str(one.StudyInstanceUID) for one in asked.ReferencedRequestSequence}
        for step in list(self.steps.values()):
            codes = {(one.CodeValue, one.CodingSchemeDesignator) for one in step.ScheduledWorkitemCodeSequence}
            if asked.ProcedureStepState and step.ProcedureStepState != asked.ProcedureStepState:
                continue
            if wanted and not wanted & codes:
                continue
            if studies and not studies & {str(one.StudyInstanceUID) for one in step.ReferencedRequestSequence}:
                continue
            found = Dataset()
            for element in asked:
                found[element.tag] = step[element.tag] if element.tag in step else element  # noqa: SIM401
            yield 0xFF00, found
        self.after_find()

    def _get(self, event: Any) -> tuple[int, Dataset | None]:
        step = self.steps.get(str(event.request.RequestedSOPInstanceUID))
        return (0xC307, None) if step is None else (0x0000, step)

    def _set(self, event: Any) -> tuple[int, Dataset | None]:
        uid, given = str(event.request.RequestedSOPInstanceUID), event.modification_list
        if "N-SET" in self.answer:
            return self.answer["N-SET"], None
        with self._lock:
            if (step := self.steps.get(uid)) is None:
                return 0xC307, None
            if step.ProcedureStepState in ("COMPLETED", "CANCELED"):
                return 0xC300, None
            if step.ProcedureStepState == "IN PROGRESS" and given.get("TransactionUID") != self.locks[uid]:
                return 0xC301, None
            for element in given:
                if element.keyword not in ("TransactionUID", "SpecificCharacterSet"):
                    step[element.tag] = element
            return 0x0000, given

    def _action(self, event: Any) -> tuple[int, Dataset | None]:
        uid, said = str(event.request.RequestedSOPInstanceUID), event.action_information
        state, lock = str(said.ProcedureStepState), str(said.TransactionUID)
        assert event.action_type == 1 and event.request.RequestedSOPClassUID == UnifiedProcedureStepPush
        if state in self.answer:
            return self.answer[state], None
        with self._lock:
            if (step := self.steps.get(uid)) is None:
                return 0xC307, None
            now = str(step.ProcedureStepState)
            if state == "IN PROGRESS":
                if now != "SCHEDULED":
                    return (0xC302 if now == "IN PROGRESS" else 0xC300), None
                self.locks[uid] = lock
                self.claims.append((uid, lock))
            else:
                if now == "SCHEDULED":
                    return 0xC310, None
                if lock != self.locks.get(uid):
                    return 0xC301, None
                if now == state:
                    return (0xB306 if state == "COMPLETED" else 0xB304), None
                if now in ("COMPLETED", "CANCELED"):
                    return 0xC300, None
                if not _may_end(step, state):
                    return 0xC304, None
            step.ProcedureStepState = state
            self.told.append((uid, state))
            return 0x0000, None


def _may_end(step: Dataset, state: str) -> bool:
    """The attributes that Table CC.2.5-3 requires at the end (R)."""
    try:
        if state == "CANCELED":
            (progress,) = step.ProcedureStepProgressInformationSequence
            return bool(progress.ProcedureStepCancellationDateTime)
        (done,) = step.UnifiedProcedureStepPerformedProcedureSequence
        return bool(
            done.PerformedStationNameCodeSequence[0].CodeValue
            and done.PerformedWorkitemCodeSequence[0].CodeValue
            and done.PerformedProcedureStepStartDateTime <= done.PerformedProcedureStepEndDateTime
            and "OutputInformationSequence" in done
        )
    except (AttributeError, IndexError, ValueError):
        return False
