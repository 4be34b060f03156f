"""One try at showing a verdict on somebody else's worklist: the priority and the comments of the study's reading there.

It raises only, and takes back only what it raised, unless somebody has set a priority since. A step that somebody has
claimed is theirs, and one that names another patient than the images is not touched.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from appliance.delivery.outbox import Result
from appliance.delivery.worklist import read_mark
from appliance.ledger.marks import MAXIMUM_COMMENT, RAISED, Mark
from dicom_io.scu import Peer
from dicom_io.ups_user import GONE, LOCKED, Pull, is_done, pulling, said
from dicom_io.workitem import FINAL, SCHEDULED, Step, of_patient, put, studies_of, text, values

COMMENT = "CommentsOnTheScheduledProcedureStep"
PRIORITY = "ScheduledProcedureStepPriority"


class Memory(Protocol):
    """What is remembered of the steps that were raised on one worklist."""

    def raised(self, uid: str, package: str) -> tuple[str, str] | None:
        """The priority before, and the mark that raised it; None if it was not."""

    def raised_by_others(self, uid: str, package: str) -> str:
        """The priority from which another package has raised it; "" if none has."""

    def remember(self, uid: str, package: str, before: str, mark: str) -> None:
        """Write down that it is about to be raised."""

    def forget(self, uid: str, package: str) -> None:
        """It is raised no more."""


def show_there(
    path: Path, peer: Peer, calling_ae: str, reading: Collection[str], memory: Memory, timeout: float
) -> Result:
    """Carry a change out on a worklist of others; once more it changes nothing.

    Args:
        reading: codes, as "110005^DCM", of the work that is the reading of a study; a step without any counts, too.

    Raises:
        PeerError: the worklist cannot be reached, or does not answer.
    """
    mark = read_mark(path)
    with pulling(peer, calling_ae, timeout) as there:
        found = [one for one in there.of_study(mark.study_instance_uid) if _is_reading(one, mark, reading)]
        done = []
        for one in found:
            outcome, words = _show(there, text(one, "SOPInstanceUID"), mark, memory)
            if outcome == "retry":
                return "retry", words
            done += [words] if words else []
        if not done:
            nothing = f"it has no reading of this study{' for this patient' if found else ''}"
            # The order of an emergency, and so its reading, is often entered later.
            return ("retry", f"{nothing} yet") if mark.standing else ("acknowledge", nothing)
        return "acknowledge", "; ".join(done)


def _is_reading(step: Step, mark: Mark, reading: Collection[str]) -> bool:
    items = values(step, "ScheduledWorkitemCodeSequence")
    codes = [f"{text(item, 'CodeValue')}^{text(item, 'CodingSchemeDesignator')}" for item in items]
    return mark.study_instance_uid in studies_of(step) and (not codes or any(one in reading for one in codes))


def _show(there: Pull, uid: str, mark: Mark, memory: Memory) -> Result:
    """What became of one step, in words; "" where it names another patient."""
    status, step = there.get(uid)
    if status in GONE:
        return "acknowledge", "a step is gone"
    if not step:
        return "retry", f"N-GET was answered with {said(status)}"
    if not of_patient(step, *mark.patient):
        return "acknowledge", ""
    state, priority = text(step, "ProcedureStepState"), text(step, PRIORITY)
    if state != SCHEDULED:
        return "acknowledge", "it has ended and stays as it is" if state in FINAL else "somebody has claimed it"
    changes: Step = {}
    comment = _commented(text(step, COMMENT), mark)
    if comment != text(step, COMMENT):
        put(changes, COMMENT, "LT", *([comment] if comment else []))
    wanted, words = _priority(uid, priority, mark, memory)
    if wanted != priority:
        put(changes, PRIORITY, "CS", wanted)
    if changes:
        # SCHEDULED: nobody holds the lock (PS3.4 CC.2.6.3).
        status = there.set(uid, changes, "")
        if status in LOCKED:
            return "acknowledge", "somebody has claimed or ended it meanwhile"
        if not is_done(status):
            return "retry", f"N-SET was answered with {said(status)}"
    if not mark.standing:
        memory.forget(uid, mark.package)
    return "acknowledge", words if changes else "nothing to change"


def _priority(uid: str, priority: str, mark: Mark, memory: Memory) -> tuple[str, str]:
    """The priority that a step is to have, and what that is in words; remembered before it is asked for."""
    known, others = memory.raised(uid, mark.package), memory.raised_by_others(uid, mark.package)
    if mark.standing:
        if mark.mode == "reprioritise" and priority == RAISED and others and not known:
            memory.remember(uid, mark.package, others, mark.uid)  # it stays up while this one stands
        # Raised before, and lower now: somebody had the last word; but not over a try that died before it asked.
        if mark.mode != "reprioritise" or priority == RAISED or (known and known[1] != mark.uid):
            return priority, "marked"
        memory.remember(uid, mark.package, priority, mark.uid)
        return RAISED, f"raised from {priority} to {RAISED}"
    if known and priority == RAISED and not others:
        return known[0], f"back from {RAISED} to {known[0]}"
    return priority, "marked"


def _commented(comment: str, mark: Mark) -> str:
    """The comments with this package's line before what others wrote, in place of its earlier one."""
    prefix = f"[scanside {mark.package}] "
    theirs = [line for line in comment.splitlines() if not line.startswith(prefix)]
    return "\r\n".join([f"{prefix}{mark.text}", *theirs])[:MAXIMUM_COMMENT]
