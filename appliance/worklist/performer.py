"""Takes AI tasks from somebody else's worklist (IHE AIW-I, pull workflow): finds, claims and ends its steps.

A step is claimed once its study is here: what this box cannot do it leaves to others. A claim that somebody else made
first is theirs.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime

from pydicom.uid import generate_uid
from sqlalchemy.exc import SQLAlchemyError

from appliance.ledger.store import Ledger
from appliance.ledger.tasks import Task
from appliance.ledger.worklist import date_time
from dicom_io.errors import PeerError, ScansideError
from dicom_io.scu import Peer
from dicom_io.ups_user import CLAIMED_ALREADY, ENDED, GONE, NOT_OURS, Pull, is_done, pulling, said
from dicom_io.workitem import (
    CANCELED,
    COMPLETED,
    IN_PROGRESS,
    Step,
    code,
    put,
    text,
    values,
)

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 2.0, 60.0
MOST_TASKS = 50
"""Tasks that are claimed at once."""
LONGEST_REASON = 1000
DISCONTINUED = code("110513", "DCM", "Discontinued for unspecified reason")


@dataclass(frozen=True, slots=True)
class Output:
    """Objects of one series that came of a task, and where they are.

    Attributes:
        instances: (SOP Class UID, SOP Instance UID) …
        ae_title, url: of the archive that keeps them, by DICOM or as WADO-RS; "" for the other.
    """

    study_instance_uid: str
    series_instance_uid: str
    instances: tuple[tuple[str, str], ...]
    ae_title: str = ""
    url: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a task ends: with what came of it, or with the reason why nothing does.

    Attributes:
        by: what performed it, for people.
    """

    completed: bool
    by: str = ""
    reason: str = ""
    outputs: tuple[Output, ...] = ()


def is_ours(step: Step, station: Step) -> bool:
    """Whether a step is for this station, or for any."""
    stations = [_key(one) for one in values(step, "ScheduledStationNameCodeSequence")]
    return text(step, "InputReadinessState") == "READY" and (not stations or _key(station) in stations)


def subject_of(step: Step) -> str:
    """The Study Instance UID that a step asks to have analysed; "" if it does not say which of several.

    Its input may have earlier studies of the patient beside; then it is the one that was requested.
    """
    inputs = dict.fromkeys(text(one, "StudyInstanceUID") for one in values(step, "InputInformationSequence"))
    inputs.pop("", None)
    requested = [text(one, "StudyInstanceUID") for one in values(step, "ReferencedRequestSequence")]
    requested = [uid for uid in dict.fromkeys([*requested, text(step, "StudyInstanceUID")]) if uid]
    found = [uid for uid in requested if uid in inputs] if inputs and requested else [*inputs, *requested]
    return found[0] if len(found) == 1 else ""


def _key(item: Step) -> tuple[str, str]:
    return text(item, "CodeValue"), text(item, "CodingSchemeDesignator")


def final_step(task: Task, station: Step, outcome: Outcome) -> Step:
    """What a step must say before it is COMPLETED or CANCELED (PS3.4 Table CC.2.5-3), and what came of it."""
    changes: Step = {}
    progress: Step = {}
    if not outcome.completed:
        put(progress, "ProcedureStepCancellationDateTime", "DT", date_time())
        put(progress, "ReasonForCancellation", "LT", outcome.reason[:LONGEST_REASON])
        put(progress, "ProcedureStepDiscontinuationReasonCodeSequence", "SQ", DISCONTINUED)
        put(changes, "ProcedureStepProgressInformationSequence", "SQ", progress)
        return changes
    put(progress, "ProcedureStepProgress", "DS", 100)
    put(changes, "ProcedureStepProgressInformationSequence", "SQ", progress)
    begun = datetime.fromisoformat(task.claimed_at).strftime("%Y%m%d%H%M%S.%f+0000")
    done: Step = {}
    put(done, "PerformedStationNameCodeSequence", "SQ", station)
    put(done, "PerformedProcedureStepStartDateTime", "DT", begun)
    put(done, "PerformedProcedureStepDescription", "LO", outcome.by[:64])
    put(done, "PerformedWorkitemCodeSequence", "SQ", task.code)
    put(done, "PerformedProcedureStepEndDateTime", "DT", date_time())
    put(done, "OutputInformationSequence", "SQ", *map(_reference, outcome.outputs))
    put(changes, "UnifiedProcedureStepPerformedProcedureSequence", "SQ", done)
    return changes


def _reference(output: Output) -> Step:
    """An item of the Referenced Instances and Access macro (PS3.3 Table 10-3b)."""
    item: Step = {}
    put(item, "TypeOfInstances", "CS", "DICOM")
    put(item, "StudyInstanceUID", "UI", output.study_instance_uid)
    put(item, "SeriesInstanceUID", "UI", output.series_instance_uid)
    references = []
    for sop_class, instance in output.instances:
        reference: Step = {}
        put(reference, "ReferencedSOPClassUID", "UI", sop_class)
        put(reference, "ReferencedSOPInstanceUID", "UI", instance)
        references.append(reference)
    put(item, "ReferencedSOPSequence", "SQ", *references)
    place: Step = {}
    if output.ae_title:
        put(place, "RetrieveAETitle", "AE", output.ae_title)
        put(item, "DICOMRetrievalSequence", "SQ", place)
    else:
        put(place, "RetrieveURL", "UR", output.url)
        put(item, "WADORSRetrievalSequence", "SQ", place)
    return item


class Performer(threading.Thread):
    """Does the work of one worklist, until it is stopped.

    Args:
        peer: makes the peer anew for each association: files for TLS may have changed.
        codes: Scheduled Workitem Codes of what we do, items of a code sequence.
        station: our code among Scheduled Station Names.
        study: the number of a study that is here and is the patient's of the step; None if there is none.
        outcome: how a claimed task ends; None: it is not known yet.
        turn: called at every turn of the loop.
    """

    def __init__(
        self,
        ledger: Ledger,
        peer: Callable[[], Peer],
        calling_ae: str,
        codes: Collection[Step],
        station: Step,
        study: Callable[[Step, str], int | None],
        outcome: Callable[[Task], Outcome | None],
        *,
        poll_seconds: float,
        answer_seconds: float,
        turn: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(name="performer", daemon=True)
        self._ledger = ledger
        self._peer = peer
        self._calling = calling_ae
        self._codes = codes
        self._station = station
        self._study = study
        self._outcome = outcome
        self._poll = poll_seconds
        self._answer = answer_seconds
        self._turn = turn
        self._stopping = threading.Event()
        self._pause = 0.0
        self._odd: set[str] = set()

    def stop(self) -> None:
        """Begin no further association."""
        self._stopping.set()

    def run(self) -> None:
        """The thread's loop."""
        while not self._stopping.is_set():
            self._turn()
            try:
                self.step()
                self._pause = 0.0
            except ScansideError as error:
                if not self._pause:
                    log.error("performer: %s; tasks wait", error)
                self._pause = min(LONGEST_PAUSE, max(FIRST_PAUSE, 2 * self._pause))
            except (OSError, SQLAlchemyError):
                log.exception("performer: the ledger or a file failed; it goes on")
                self._pause = LONGEST_PAUSE
            except Exception:
                log.exception("performer: stumbled over something that nobody foresaw; it goes on")
                self._pause = LONGEST_PAUSE
            self._stopping.wait(self._pause or self._poll)

    def step(self) -> None:
        """Bring every task further as far as it goes just now, and look for new ones.

        Raises:
            PeerError: the worklist cannot be reached, or does not answer.
        """
        tasks = self._ledger.open_tasks()
        waiting = deque(tasks)
        while not self._stopping.is_set():
            with pulling(self._peer(), self._calling, self._answer) as worklist:
                # Where an answer is missing the next one on this association could be that.
                if self._advance_all(worklist, waiting):
                    self._claim_new(worklist, MOST_TASKS - len(tasks))
                    return

    def _advance_all(self, worklist: Pull, waiting: deque[Task]) -> bool:
        """Bring those tasks further, whatever becomes of any one of them; False where the association has failed."""
        while waiting:
            self._turn()
            task = waiting.popleft()
            try:
                self._advance(worklist, task)
            except SQLAlchemyError:
                raise
            except PeerError as error:
                self._complain(task, str(error))
                return False
            except Exception as error:
                # Without its words, which may be a patient's.
                self._complain(task, type(error).__name__)
        return True

    def _claim_new(self, worklist: Pull, room: int) -> None:
        for wanted in self._codes if room > 0 else ():
            self._turn()
            for step in worklist.scheduled(wanted):
                if self._stopping.is_set() or room <= 0:
                    return
                self._turn()
                if (new := self._looked_at(step, wanted)) is not None:
                    self._claim(worklist, new, asked_before=False)
                    room -= 1

    def _looked_at(self, step: Step, wanted: Step) -> Task | None:
        """As `_taken`; a step that cannot be looked at is left to others."""
        try:
            return self._taken(step, wanted)
        except (OSError, SQLAlchemyError):
            raise
        except Exception:
            if (uid := text(step, "SOPInstanceUID")) not in self._odd:
                self._odd.add(uid)
                log.exception("performer: a step of the worklist cannot be looked at, and is left")
            return None

    def _taken(self, step: Step, wanted: Step) -> Task | None:
        """The task of a step that we are about to claim; written down."""
        uid = text(step, "SOPInstanceUID")
        if not uid or not is_ours(step, self._station) or self._ledger.task(uid) is not None:
            return None
        subject = subject_of(step)
        study = self._study(step, subject) if subject else None
        if study is None:
            return None
        # Drawn, not derived: a second box with our settings must not take our lock for its own.
        task = self._ledger.begin_task(uid, study, str(generate_uid(prefix=None)), wanted)
        log.info("study %d: claims its task of the worklist", study)
        return task

    def _advance(self, worklist: Pull, task: Task) -> None:
        if task.state == "claiming":
            self._claim(worklist, task, asked_before=True)
        elif task.state == "claimed":
            if (outcome := self._outcome(task)) is not None:
                final = COMPLETED if outcome.completed else CANCELED
                self._ledger.finish_task(task, final, final_step(task, self._station, outcome), outcome.reason)
                decided = self._ledger.task(task.uid)
                assert decided is not None
                self._finish(worklist, decided)
        else:
            self._finish(worklist, task)

    def _claim(self, worklist: Pull, task: Task, *, asked_before: bool) -> None:
        status = worklist.change_state(task.uid, IN_PROGRESS, task.transaction_uid)
        if status == CLAIMED_ALREADY:
            # By us before a death, or by somebody else: only whoever has the lock may change it. A claim that was never
            # asked for before cannot be ours, even where a worklist looks at no lock.
            status = worklist.set(task.uid, _begun(), task.transaction_uid) if asked_before else NOT_OURS
        if is_done(status):
            self._ledger.task_claimed(task)
        elif status == NOT_OURS:
            self._lose(task, "somebody else has claimed it")
        elif status in ENDED:
            self._lose(task, "it has ended already")
        elif status in GONE:
            self._lose(task, "the worklist does not have it any more")
        else:
            self._complain(task, f"the claim was answered with {said(status)}")

    def _finish(self, worklist: Pull, task: Task) -> None:
        status = worklist.set(task.uid, task.changes, task.transaction_uid)
        if is_done(status):
            status = worklist.change_state(task.uid, task.final, task.transaction_uid)
        if status in ENDED:
            # It ended at an earlier try of ours, whose answer we did not hear; or otherwise than we wanted.
            state = text(worklist.get(task.uid)[1], "ProcedureStepState")
            if state != task.final:
                self._lose(task, f"it is {state or 'gone'} there, and not {task.final}")
                return
        elif status == NOT_OURS:
            self._lose(task, "the worklist does not know our claim any more")
            return
        elif status in GONE:
            self._lose(task, "the worklist does not have it any more")
            return
        elif not is_done(status):
            self._complain(task, f"{task.final} was answered with {said(status)}")
            return
        self._ledger.task_ended(task)
        log.info("study %d: its task of the worklist is %s", task.study_id, task.final)

    def _lose(self, task: Task, reason: str) -> None:
        self._ledger.lose_task(task, reason)
        log.log(
            logging.INFO if task.state == "claiming" else logging.ERROR,
            "study %d: its task of the worklist is not ours: %s", task.study_id, reason,
        )  # fmt: skip

    def _complain(self, task: Task, reason: str) -> None:
        if self._ledger.note_task(task, reason):
            log.error("study %d: its task of the worklist is stuck: %s; it is tried again", task.study_id, reason)


def _begun() -> Step:
    progress: Step = {}
    put(progress, "ProcedureStepProgress", "DS", 0)
    changes: Step = {}
    put(changes, "ProcedureStepProgressInformationSequence", "SQ", progress)
    return changes
