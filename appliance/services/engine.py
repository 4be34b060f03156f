"""The engine: watch what arrives, decide, answer. `running` has its threads, `issuing` what comes of an answer."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from sqlalchemy.exc import OperationalError

from appliance.delivery.outbox import POLL_SECONDS
from appliance.governance.board import APPROVAL, INTEGRITY, Board, Mode, integrity, read_board
from appliance.governance.indication import Admission, Criterion, admit, admit_pixels, still_excepted
from appliance.governance.package import ANY, Package
from appliance.inference.slabs import Context, foreseen_slabs, in_context, plan_slabs
from appliance.inference.stream import (
    ARRIVING,
    COMPLETE,
    PREPARED,
    STAT,
    Closed,
    Pipeline,
    Reading,
    SlabAnswer,
    ask_for,
    read_volume,
    verdict_on,
)
from appliance.inference.triton import TritonClient, TritonError
from appliance.inference.verdict import left_out
from appliance.ledger.board import BoardMoved
from appliance.ledger.database import Row, now, seconds_between, waited
from appliance.ledger.doorbell import ring
from appliance.ledger.records import ALERT_STANDS
from appliance.ledger.selftest import SELFTEST_AE
from appliance.ledger.store import LONGEST_PAUSE, Arriving, Inputs, Ledger, Notice, StoredInstance
from appliance.ledger.views import unconfirmed
from appliance.services.breaker import Breaker
from appliance.services.guard import Guard
from appliance.services.heeding import Heeded
from appliance.services.issuing import Issuer
from appliance.settings import Settings
from appliance.study.arrival import Arrival, Arrivals
from appliance.study.completeness import HABIT_MEMORY, habit_of, weigh
from appliance.study.selection import Selection, first_admitted, not_analysed, only_of, unselected
from dicom_io.errors import ScansideError
from dicom_io.pixels import NATIVE_SYNTAXES
from dicom_io.plausible import ImplausibleImage
from dicom_io.volume import Volume, assemble, planes_of

log = logging.getLogger(__name__)

ANALYSES = 4
"""Complete studies whose answer is worked out at a time: one that waits for the model does not hold up the others."""

URGENT_ANALYSES = 2
"""So many more at a time if they are urgent."""

RETRY_PATIENCE_SECONDS, RETRY_LIMIT_SECONDS, RETRY_ANYWAY_SECONDS = 5.0, 15.0, 45.0
"""So long a study that failed lets others go first. Then only what is urgent is still begun until it had its turn, then
nothing; and in the end, as what is under way may hang, it no longer waits to be alone."""

HURRY_SHARE = 0.4
"""When this part of its time has passed, an analysis is about to miss its deadline."""

HURRY_LIMIT = 2
"""After so many times its time, it no longer has others wait."""

HURRY = "it goes before others; no work ahead for studies that are not urgent; no pictures drawn"
"""What is done then. Two things are left out always: pictures until after the alert, and the thin series where a thick
one came."""

HURRY_LOOK_SECONDS = 0.5

_DAMAGED = (errno.EIO, errno.EUCLEAN, errno.EBADMSG)
"""What a disk says of a file that it cannot read any more. All else passes: it is full, or there are too many files."""

LOOK_SECONDS = 0.1
"""While images come, the engine looks for more, and at a study, no more often; that costs some milliseconds for each
300 of them."""


class Engine:
    """Takes work from the ledger and writes its outcome back.

    One thread watches and decides; a study that it found complete is answered by one of `ANALYSES` others. Nothing
    else decides on a study while it is being answered.

    Args:
        broken: packages that are to run here and could not be loaded, and why; they refuse every study.

    Attributes:
        guard: knows whether packages and records are what they must be; somebody has to have it step.
        breaker: knows whether Triton answers; somebody has to have it step.
    """

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        packages: Sequence[Package],
        client: TritonClient,
        pipeline: Pipeline,
        issuer: Issuer,
        broken: Mapping[str, str] | None = None,
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._packages = {package.name: package for package in packages}
        self._broken = dict(broken or {})
        self.guard = Guard(settings, ledger, packages, client, self._broken)
        self.breaker = Breaker(ledger, packages, client, partial(ring, settings.run_directory, "engine"))
        self._board = read_board(ledger)
        self._pipeline = pipeline
        self._issuer = issuer
        self._answering = ThreadPoolExecutor(ANALYSES + URGENT_ANALYSES, "answer")
        self._working: dict[int, tuple[int, Future[None]]] = {}
        hears = settings.intake.hears_orders
        self._arrivals = Arrivals(ledger, settings.intake.authority if hears else None)
        self._heeded = Heeded(ledger, hears)
        self._looked: dict[int, tuple[Arriving, float, float]] = {}
        self._ahead: dict[int, dict[_Name, Future[SlabAnswer]]] = {}
        # Work ahead costs no try. What was arriving when an engine ended may be what ended it: it waits for its
        # analysis, which does.
        self._not_ahead = {one.id for one in ledger.arriving_studies()}
        self._suspicious: set[int] = set()
        self._tests: set[int] = set()
        self._begun: dict[int, set[str]] = {}
        self._undecided: set[int] | None = None
        self._asked = 0  # the newest event by which somebody asked for a study to be decided anew
        self._alone = 0
        self._complaints: dict[int, str] = {}
        self._hurried: set[int] = set()
        self._hurry_at = 0.0
        # One that was set aside may have a provisional alert, also when an engine ended in between.
        self._unconfirmed = threading.Event()
        self._unconfirmed.set()

    def close(self) -> None:
        """End what is under way; it is taken up at the next start."""
        self._pipeline.close()
        self._answering.shutdown()

    def step(self) -> float:
        """Do what there is to do; returns the seconds until there may be more."""
        self._settle()
        if self._unconfirmed.is_set():
            self._take_back_unconfirmed()
        self._hurry()
        self._decide_all()
        self._answer()
        wait = self._watch_studies()
        self._decide_all()
        self._answer()
        return wait

    def _decide_all(self) -> None:
        versions = {package.name: package.version for package in self._packages.values()}
        versions |= dict.fromkeys(self._broken, "")
        busy = {study_id for study_id, _ in self._working.values()}
        asked, newest = self._ledger.asked_since(self._asked)
        self._look_again(asked)
        self._asked = newest
        self._look_again(self._heeded.late())
        # Only these, and what this engine completes, can come to be undecided after its first look at all of them.
        undecided = self._ledger.undecided_studies(versions, self._undecided)
        self._undecided = {study_id for study_id, _ in undecided}
        for study_id, name in undecided:
            if study_id not in busy:
                with self._isolated(study_id):
                    if package := self._packages.get(name):
                        self._decide(study_id, package)
                    else:
                        self._refuse(study_id, name, self._broken[name])

    def _look_again(self, studies: set[int]) -> None:
        if self._undecided is not None:
            self._undecided |= studies

    @contextmanager
    def _isolated(self, study_id: int) -> Iterator[None]:
        """Let no study hold up another: what nobody foresaw is written down once, and tried again."""
        try:
            yield
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            if self._complaints.get(study_id) != said:
                self._complaints[study_id] = said
                log.exception("study %d: a step failed in a way nobody foresaw; other studies go on", study_id)

    def _watch_studies(self) -> float:
        """Work ahead on what arrives, declare complete what is; returns the seconds until something may be due."""
        soonest = POLL_SECONDS
        arriving_studies = self._ledger.arriving_studies()
        here = {arriving.id for arriving in arriving_studies}
        self._looked = {study_id: at for study_id, at in self._looked.items() if study_id in here}
        if self._settings.study.wait_then_infer:
            silent = [one for one in arriving_studies if self._silence(one) <= 0]
            soonest = min([soonest, *(self._silence(one) for one in arriving_studies if one not in silent)])
            arriving_studies = silent
        # The most urgent first: they are also the first in the decoders' queue.
        for arriving in sorted(arriving_studies, key=lambda one: (not self._is_stat(one.id, one.calling_ae), one.id)):
            at = time.monotonic()
            if before := self._looked.get(arriving.id):
                known, looked, due = before
                if known != arriving:
                    due = looked + LOOK_SECONDS if arriving.open_associations else at
                if at < due:
                    soonest = min(soonest, due - at)
                    continue
            self._looked[arriving.id] = arriving, at, at
            with self._isolated(arriving.id):
                wait = self._watch(arriving)
                self._looked[arriving.id] = arriving, at, at + wait
                soonest = min(soonest, wait)
        return soonest

    def _watch(self, arriving: Arriving) -> float:
        # No patient waits for a self-test.
        if arriving.calling_ae == SELFTEST_AE and self._ledger.selftest(arriving.id) is not None:
            self._tests.add(arriving.id)
        else:
            self._tests.discard(arriving.id)
        arrival = self._arrivals.look(arriving.id)
        self._heeded.note(arriving.id, arrival)
        decision = weigh(
            arriving,
            arrival.selection,
            arrival.series,
            habit_of(self._ledger.earlier_evidence(arriving.calling_ae, HABIT_MEMORY)),
            self._ledger.said_of(arriving.id),
            now(),
            settle_seconds=self._settings.study.settle_seconds,
            quiet_seconds=self._settings.study.quiet_seconds,
        )
        if not decision.complete:
            self._work_ahead(arriving, arrival, whole=False)
            early = self._settings.provisional.alerts and arriving.open_associations
            return min(decision.wait_seconds, POLL_SECONDS if early else decision.wait_seconds)
        if self._ledger.complete_study(arriving.id, arriving.last_instance_at, decision.evidence):
            log.info("study %d: complete, %s", arriving.id, decision.evidence["by"])
            self._look_again({arriving.id})
            self._work_ahead(arriving, arrival, whole=True)
            self._ahead.pop(arriving.id, None)
            self._begun.pop(arriving.id, None)
            self._not_ahead.discard(arriving.id)
        return POLL_SECONDS

    def _silence(self, arriving: Arriving) -> float:
        """Seconds until a study has been silent for so long that nothing more is waited for."""
        silent = seconds_between(arriving.last_instance_at, now())
        return self._settings.study.quiet_seconds - silent if silent >= 0 else 0.0

    def _is_stat(self, study_id: int, calling_ae: str) -> bool:
        if calling_ae == SELFTEST_AE:
            return False  # where it is none, it only waits for its turn
        urgent = study_id in self._suspicious | self._hurried or study_id in self._heeded.urgent
        return urgent or calling_ae in self._settings.study.stat_calling_ae_titles

    def _work_ahead(self, arriving: Arriving, arrival: Arrival, *, whole: bool) -> None:
        """Put through the model what most likely are slabs of the study, once what is known of it lets the package.

        Args:
            whole: it is complete; then that is every slab.
        """
        selection = arrival.selection
        if selection.series is None or selection.volume is None or arriving.id in self._not_ahead:
            return
        urgency = STAT if self._is_stat(arriving.id, arriving.calling_ae) else ARRIVING
        if self._hurried and urgency != STAT:
            return
        asked = self._ahead.setdefault(arriving.id, {})
        covered: set[int] | None = None
        for package in self._packages.values():
            if self.breaker.problem(package.name):
                continue  # it would fail, and nothing more would be done ahead for this study
            slab_mm = package.preprocessing.slab_mm
            if whole:
                foreseen = [plan.members for plan in plan_slabs(selection.volume, slab_mm)]
            else:
                foreseen = foreseen_slabs(selection.volume, slab_mm)
            contexts = in_context(selection.volume, foreseen, package.preprocessing.neighbours, whole=whole)
            if not whole:
                members = {member for context in contexts for slab in context for member in slab}
                covered = members if covered is None else covered & members
            named = {_name(package, selection.volume, context): context for context in contexts}
            new = {name: context for name, context in named.items() if name not in asked}
            if not new:
                continue
            admission = self._admission(package, arrival, selection, len(foreseen))
            if not admission.promising:
                continue
            planes = selection.volume.planes
            uids = {planes[member].sop_instance_uid for context in new.values() for slab in context for member in slab}
            files = self._spool_files({uid: arrival.instances[uid] for uid in uids})
            threshold = package.operating_point.threshold
            any_place = package.labels.index(ANY)
            futures = ask_for(
                self._pipeline,
                package,
                admission,
                selection.volume,
                list(new.values()),
                files,
                owner=arriving.id,
                urgency=urgency,
            )
            asked.update(zip(new, futures, strict=True))
            for future in futures:
                future.add_done_callback(partial(self._ahead_done, arriving.id, any_place, threshold))
        if covered is not None and asked:
            self._prepare_slices(arriving.id, arrival, covered, urgency)
        if self._settings.provisional.alerts and arriving.open_associations and not whole:
            for package in self._packages.values():
                self._alert_early(arriving.id, arrival, package)

    def _prepare_slices(self, study_id: int, arrival: Arrival, covered: set[int], urgency: int) -> None:
        """Decode slices whose slab is not there yet, where decoding takes long; else all of it comes at the end."""
        volume = arrival.selection.volume
        assert volume is not None
        begun = self._begun.setdefault(study_id, set())
        files = []
        for place, plane in enumerate(volume.planes):
            one = arrival.instances[plane.sop_instance_uid]
            syntax = one.header.transfer_syntax_uid
            if place not in covered and one.digest not in begun and one.header.number_of_frames == 1:
                begun.add(one.digest)
                if syntax not in NATIVE_SYNTAXES and self._settings.box.device == "cpu":
                    files.append((self._issuer.spooled(one), one.digest))
        # Of what arrives in no order, most is forgotten before it is needed.
        self._pipeline.prepare(files[:PREPARED], urgency=urgency)

    def _admission(self, package: Package, arrival: Arrival, selection: Selection, slabs: int) -> Admission:
        """What the gate and the board say of what is there of a study's selected series."""
        series, volume = selection.series, selection.volume
        assert series is not None and volume is not None
        study = [one.header for one in arrival.instances.values()]
        admission = admit(package, series.headers, volume, slabs, ordered=arrival.ordered, study=study)
        return self._cleared(package, admission)[0]

    def _judge(self, study_id: int, package: Package, arrival: Arrival, selection: Selection, gone: int) -> Admission:
        """What gate and board say of a complete study, of which retention removed so many instances."""
        chosen = selection.series.series_instance_uid if selection.series else None
        if gone and (chosen is None or self._ledger.removed_instances(study_id, chosen)):
            # A series of which all is here is judged, whatever is gone of others: the patient was scanned again.
            said = f"{gone} instances were removed by retention"
            log.error("study %d: it cannot be judged, %s; it must be sent again as a whole", study_id, said)
            return Admission(
                (Criterion("files", "instances of the study", said, "all of them, sent again", "violated"),)
            )
        if selection.series is None or selection.volume is None:
            return unselected(package, arrival.series, selection)
        try:
            slabs = len(plan_slabs(selection.volume, package.preprocessing.slab_mm))
            return self._admission(package, arrival, selection, slabs)
        except Exception as error:
            # What nobody can judge is refused, where everybody sees it, and not tried for ever.
            log.exception("study %d: the gate failed in a way nobody foresaw", study_id)
            said = f"it failed: {type(error).__name__}: {error}"
            return Admission((Criterion("gate", "the gate itself", said, "a decision", "unknown"),))

    def _board_now(self) -> Board:
        """The board with its newest decision."""
        # That there are fewer than before is no decision: the guard says what is gone, and what was known holds.
        if self._ledger.last_decision() > self._board.last:
            self._board = read_board(self._ledger)
        fault = self.guard.fault
        return self._board.distrust(fault) if fault and not self._board.fault else self._board

    def _cleared(self, package: Package, admission: Admission) -> tuple[Admission, Mode, int]:
        """The admission with what board and guard say now; the mode, and the decision up to which that was heard."""
        board = self._board_now()
        criterion, mode = board.judge(package)
        admission = still_excepted(package, admission, board.exceptions(package))
        label = [one for one in admission.criteria if one.criterion not in (APPROVAL, INTEGRITY)]
        return Admission((*label, criterion, self.guard.integrity(package))), mode, board.last

    def _alert_early(self, study_id: int, arrival: Arrival, package: Package) -> None:
        """Answer on what is there, once enough slabs next to one another leave no doubt."""
        wanted, volume = self._settings.provisional, arrival.selection.volume
        assert volume is not None
        known = {name: future for name, future in self._ahead[study_id].items() if name[0] == package.name}
        answers: dict[tuple[int, ...], SlabAnswer] = {}
        plans = plan_slabs(volume, package.preprocessing.slab_mm)
        members = [plan.members for plan in plans]
        for context in in_context(volume, members, package.preprocessing.neighbours, whole=False):
            future = known.get(_name(package, volume, context))
            if future and future.done() and not future.exception():
                answers[context[len(context) // 2]] = future.result()
        any_place = package.labels.index(ANY)
        certain = [one for one in sorted(answers) if answers[one].probabilities[any_place] >= wanted.threshold]
        if longest_run(certain, {gap.after for gap in volume.gaps}) < wanted.slabs:
            return
        read = [plan for plan in plans if plan.members in answers]
        brain = Reading(tuple(read), tuple(answers[plan.members] for plan in read)).brain_ml
        admission = self._admission(package, arrival, arrival.selection, len(plans))
        if not (admission.admitted and admit_pixels(package, admission, brain.seen, brain.unseen).admitted):
            return
        uids = dict.fromkeys(plane.sop_instance_uid for plane in volume.planes)
        row = self._ledger.begin_early(
            study_id,
            package.name,
            package.version,
            admission=admission.to_json(),
            selection=arrival.selection.to_json(),
            inputs=[[uid, arrival.instances[uid].digest] for uid in uids],
        )
        if row is not None:
            log.info("study %d: %d slabs side by side leave no doubt; a provisional alert", study_id, wanted.slabs)
            self._begin(row, early=True)

    def _ahead_done(self, study_id: int, any_place: int, threshold: float, future: Future[SlabAnswer]) -> None:
        """A slab that looks positive makes its study urgent; one that failed leaves it to the complete study."""
        if error := future.exception():
            if not isinstance(error, Closed) and study_id not in self._not_ahead:
                self._not_ahead.add(study_id)
                log.warning("study %d: nothing more is done ahead: %s", study_id, error)
        elif future.result().probabilities[any_place] >= threshold:
            if study_id not in self._suspicious and study_id not in self._tests:
                self._suspicious.add(study_id)
                log.info("study %d: a slab looks positive; the study goes first", study_id)
            if self._settings.provisional.alerts:
                ring(self._settings.run_directory, "engine")  # it may be enough for one

    def _decide(self, study_id: int, package: Package) -> None:
        """Ask the gate about one complete study."""
        arrival = self._arrivals.look(study_id)
        self._heeded.decide(study_id, arrival)
        newest = self._ledger.newest_verdict(study_id, package.name)
        alerted = self._alerted(study_id, newest)
        gone = self._ledger.removed_instances(study_id)
        standing = self._ledger.standing_verdict(study_id, package.name)
        selection = self._arrivals.selection(study_id, alerted, {})
        spokesman = _spokesman(arrival, selection)
        if (
            gone
            and standing is not None
            and not _unread(arrival, selection, standing["inputs"])
            and not (spokesman and self._issuer.of_another_patient(study_id, standing["analysis_id"], spokesman))
        ):
            # Something of an old study came again, a dose report or one of our own captures; its images did not.
            self._ledger.keep_verdict(study_id, package.name, selection.to_json())
            log.warning("study %d: retention removed %d of its images, the verdict stands", study_id, gone)
            return

        def choose(alerted: str) -> tuple[Selection, Admission]:
            return first_admitted(
                lambda refused: self._arrivals.selection(study_id, alerted, refused),
                lambda selection: self._judge(study_id, package, arrival, selection, gone),
                alerted,
            )

        selection, admission = choose("")
        if alerted and (selection.series is None or selection.series.series_instance_uid != alerted):
            selection, admission = choose(alerted)
            whole = not self._ledger.removed_instances(study_id, alerted)
            if whole and (only := only_of(selection, alerted)) is not selection:
                selection, admission = only, self._judge(study_id, package, arrival, only, 0)
        inputs: list[list[str]] = []
        if selection.volume is not None:
            uids = dict.fromkeys(plane.sop_instance_uid for plane in selection.volume.planes)
            inputs = [[uid, arrival.instances[uid].digest] for uid in uids]
        admission, mode, _ = self._cleared(package, admission)
        if (
            admission.admitted
            and standing is not None
            and not standing["result"].get("provisional")
            and not standing["result"].get("withdrawn")
            and standing["inputs"] == inputs
            # Whoever was told that it is a test may have to be told more by now.
            and not self._ledger.was_registered(study_id)
            and standing["result"]["package_version"] == package.version
            and (standing["result"].get("mode") or mode) == mode
            # A repeated scan that is not read: whoever has the answer must know that it says nothing of that.
            and not Counter(not_analysed(selection.to_json(), alike=True)) - Counter(standing["result"]["limitations"])
            # Who asks does so because the answer may be wrong though nothing that went into it is another.
            and not self._ledger.asked_again(study_id, package.name)
            # The board stopped the package before all were alerted, and has let it alert again since.
            and not self._issuer.owes(standing, mode)
        ):
            # A dose report or one of our own captures came back from the PACS: no new revision of the same answer.
            self._ledger.keep_verdict(study_id, package.name, selection.to_json())
            log.info("study %d: nothing that was analysed changed, the verdict stands", study_id)
            return
        if not admission.admitted and newest is not None:
            # First, so that a death between the two leaves it to be done again, and done once. Also of an analysis that
            # waited: what the hospital was told before then is no longer followed by an answer.
            self._issuer.take_back(newest, _spokesman(arrival, selection), admission.reason)
        self._ledger.decide(
            study_id,
            package.name,
            package.version,
            admitted=admission.admitted,
            reason=admission.reason,
            admission=admission.to_json(),
            selection=selection.to_json(),
            inputs=inputs,
            notice=self._notice(study_id, package, mode, admission, _spokesman(arrival, selection)),
        )
        verb = "admitted" if admission.admitted else "refused"
        why = "" if admission.admitted else f" ({admission.reason})"
        log.info("study %d: %s by %s%s", study_id, verb, package.name, why)

    def _alerted(self, study_id: int, newest: Row | None) -> str:
        """The series that an alert rests on, which no other may overturn; "" if there is none.

        Also of one that a negative verdict left standing because its images were gone, once all of them are here again.
        """
        stood = newest is not None and ALERT_STANDS in newest["result"]["limitations"]
        if newest is not None and stood:
            verdicts = reversed(self._ledger.verdicts(newest["analysis_id"]))
            newest = next((one for one in verdicts if ALERT_STANDS not in one["result"]["limitations"]), None)
        if newest is None or not newest["positive"]:
            return ""
        series = str(newest["result"]["series_instance_uid"])
        return "" if stood and self._ledger.removed_instances(study_id, series) else series

    def _refuse(self, study_id: int, name: str, problem: str) -> None:
        """Refuse a complete study on behalf of a package that could not be loaded."""
        admission = Admission((integrity(None, problem),))
        if (told := self._ledger.newest_verdict(study_id, name)) is not None:
            self._issuer.take_back(told, _spokesman(self._arrivals.look(study_id)), admission.reason)
        self._ledger.decide(
            study_id,
            name,
            "",
            admitted=False,
            reason=admission.reason,
            admission=admission.to_json(),
            selection=[],
            inputs=[],
        )
        log.error("study %d: refused, because %s could not be loaded: %s", study_id, name, problem)

    def _answer(self) -> None:
        """Begin to answer what waits and whose package Triton serves, the most urgent first.

        What was tried before is answered alone: if it ends the engine, it must not take others with it.
        """
        while len(self._working) < ANALYSES + URGENT_ANALYSES and self._alone not in self._working:
            waiting = self._ledger.waiting_packages()
            ready = [name for name in sorted(waiting & set(self._packages)) if not self.breaker.problem(name)]
            if not ready:
                return
            waited = self._ledger.retry_waited(ready)
            anyway = waited >= RETRY_ANYWAY_SECONDS
            if self._working and waited >= RETRY_LIMIT_SECONDS and not anyway:
                return
            waits = waited >= RETRY_PATIENCE_SECONDS
            row = self._ledger.take_analysis(
                ready,
                tuple(self._suspicious | self._hurried | self._heeded.urgent),
                self._settings.study.stat_calling_ae_titles,
                only_urgent=not anyway and (len(self._working) >= ANALYSES or (waits and bool(self._working))),
                tried=True if anyway else False if self._working else True if waits else None,
            )
            if row is None:
                return
            self._arrivals.forget(row["study_id"])
            self._alone = row["id"] if row["attempts"] else 0
            self._begin(row)

    def _hurry(self) -> None:
        """Leave out what can wait while an analysis is about to miss its deadline."""
        if time.monotonic() < self._hurry_at:
            return
        self._hurry_at = time.monotonic() + HURRY_LOOK_SECONDS
        limit, at = self._settings.budget.analysis_seconds, now()
        found, new = self._ledger.mark_degraded(limit * HURRY_SHARE, HURRY)
        # What nobody can bring to an end now, or is late beyond remedy, must not slow down all others for ever.
        self._hurried = {
            one.study_id
            for one in found
            if one.subject in self._packages
            and not self.breaker.problem(one.subject)
            and waited(one.since, at) < HURRY_LIMIT * limit
        }
        self._issuer.hold(bool(self._hurried))
        for one in new:
            log.warning("study %d: %s (%s) may miss its deadline: %s", one.study_id, one.stage, one.subject, HURRY)
            self._pipeline.urge(one.study_id)

    def _begin(self, row: Row, *, early: bool = False) -> None:
        future = self._answering.submit(self._answer_one, row, early)
        # Not from within: the engine would be awake before it is done.
        future.add_done_callback(lambda _: ring(self._settings.run_directory, "engine"))
        self._working[row["id"]] = row["study_id"], future

    def _settle(self) -> None:
        """Take leave of what was answered; what could not even be written down as failed is taken up again."""
        for key, (study_id, future) in list(self._working.items()):
            if not future.done():
                continue
            if error := future.exception():
                log.error("study %d: its outcome could not be written down: %s", study_id, error)
                others = [one for one in self._working if one != key]
                self._ledger.park_analyses(self._settings.models.attempts, others)
                self._unconfirmed.set()
            del self._working[key]

    def _answer_one(self, row: Row, early: bool) -> None:
        package = self._packages[row["package"]]
        attempt = row["attempts"] + 1
        try:
            self._analyse(row, package, early)
        except Closed as error:
            self._ledger.park_analysis(row["id"], error.what, 0)
        except (OSError, OperationalError) as error:
            if isinstance(error, OSError) and error.errno in _DAMAGED:
                log.exception("study %d: the disk cannot read what it holds", row["study_id"])
                self._failed(row, f"the disk failed: {error.strerror}", attempt)
            else:
                # Not the study's fault (OperationalError: the ledger is full or locked): it loses no try by it.
                log.exception("study %d: the disk or the ledger failed; it is tried again", row["study_id"])
                self._ledger.park_analysis(row["id"], str(error).splitlines()[0], _pause(attempt))
        except ImplausibleImage as error:
            # It would be the same the next time.
            self._ledger.quarantine(row["id"], str(error))
            self._unconfirmed.set()
            log.error("study %d: set aside, its images cannot be what was scanned: %s", row["study_id"], error)
        except ScansideError as error:
            if isinstance(error, TritonError):
                self.breaker.failed(package.name, error.what)
            self._failed(row, str(error), attempt)
        except Exception as error:
            log.exception("study %d: the analysis failed in a way nobody foresaw", row["study_id"])
            self._failed(row, f"{type(error).__name__}: {error}", attempt)
        else:
            if not early:
                self._suspicious.discard(row["study_id"])
                self._heeded.urgent.discard(row["study_id"])

    def _failed(self, row: Row, reason: str, attempt: int) -> None:
        final = self._ledger.fail_analysis(row["id"], reason, self._settings.models.attempts, _pause(attempt))
        log.error("study %d: %s (%s)", row["study_id"], "set aside" if final else "will be tried again", reason)
        if final:
            self._unconfirmed.set()

    def _take_back_unconfirmed(self) -> None:
        """Withdraw provisional alerts on studies that were set aside: nobody must wait for the word on the whole study.

        The withdrawal says why, and that nothing is said of haemorrhage; so somebody looks without waiting for us.
        """
        self._unconfirmed.clear()
        left = True  # what fails is tried again with the next step
        try:
            standing_alerts = unconfirmed(self._ledger)
            left = False
            for study_id, reason, standing in standing_alerts:
                taken_back = False
                with self._isolated(study_id):
                    source = _spokesman(self._arrivals.look(study_id))
                    self._issuer.take_back(
                        standing, source, f"{reason}; what the provisional alert said is not disproved"
                    )
                    taken_back = True
                left = left or not taken_back
        finally:
            if left:
                self._unconfirmed.set()

    def _analyse(self, row: Row, package: Package, early: bool) -> None:
        """Run a package on exactly what the gate admitted, whatever arrived since."""
        study_id = row["study_id"]
        instances = self._issuer.files(study_id, row["inputs"])
        volume = assemble([plane for one in instances.values() for plane in planes_of(one.header)])
        admission, mode, _ = self._cleared(
            package, Admission(tuple(Criterion(**criterion) for criterion in row["admission"]))
        )
        if not admission.admitted:
            self._withhold(row, package, mode, instances, admission)
            return
        evidence = row["evidence"] or {}
        stat = self._is_stat(study_id, evidence.get("calling_ae", ""))
        reading = read_volume(
            self._pipeline,
            package,
            admission,
            volume,
            self._spool_files(instances),
            owner=study_id,
            urgency=STAT if stat else ARRIVING if study_id in self._tests else COMPLETE,
        )
        brain = reading.brain_ml
        judged = admit_pixels(package, admission, brain.seen, brain.unseen)
        admission, mode, board = self._cleared(package, judged)
        if not admission.admitted:
            self._withhold(row, package, mode, instances, admission)
            return
        first = next(iter(instances.values()))
        incomplete = not early and evidence.get("confidence") == "low"
        limitations = [f"The study was still arriving: {len(volume.planes)} slices were read."] if early else []
        if incomplete:
            limitations.append(
                f"The study may be INCOMPLETE: {evidence['by']}. Nothing is known of what may lie beyond the "
                f"{len(volume.planes)} slices that came."
            )
        twice = sum(one.get("left_out", 0) for one in row["selection"] if one["chosen"]) - len(volume.duplicates)
        if twice > 0:
            limitations.append(left_out(twice))
        verdict = verdict_on(
            package if mode == "clinical" else replace(package, mode="evaluation"),
            volume,
            reading,
            study_uid=row["study_instance_uid"],
            series_uid=first.header.series_instance_uid,
            limitations=limitations + not_analysed(row["selection"]),
        )
        verdict = replace(verdict, provisional=early, mode=mode, incomplete=incomplete)
        stands = not verdict.positive and self._alert_stands(row)
        if stands:
            verdict = replace(verdict, limitations=(*verdict.limitations, ALERT_STANDS))
        try:
            self._issuer.issue(row, verdict, admission, first, board, stands=stands)
        except BoardMoved:
            self._analyse(row, package, early)  # what was read is remembered

    def _alert_stands(self, row: Row) -> bool:
        """Whether the hospital was alerted of images of the study that retention has removed.

        What was scanned since is no second look at them. An alert of another patient, as the Patient ID says now, is no
        reason to leave one of this patient.
        """
        since = self._ledger.patient_since(row["id"])
        verdicts = [one for one in self._ledger.verdicts(row["id"]) if one["revision"] > since]
        if not any(one["positive"] for one in verdicts):
            return False
        for one in reversed(verdicts):
            left = self._ledger.inputs(row["study_id"], one["inputs"])
            if len(left) < len(one["inputs"]) and ALERT_STANDS not in one["result"]["limitations"]:
                return bool(one["positive"])
        return False

    def _withhold(
        self, row: Row, package: Package, mode: Mode, instances: Mapping[str, StoredInstance], admission: Admission
    ) -> None:
        """Refuse a study although it was begun."""
        source = next(iter(instances.values()), None)
        for one in self._ledger.verdicts(row["id"])[-1:]:
            self._issuer.take_back(one, source, admission.reason)
        notice = self._notice(row["study_id"], package, mode, admission, source)
        self._ledger.withhold(row["id"], admission.reason, admission.to_json(), notice)
        log.info("study %d: refused by %s (%s)", row["study_id"], row["package"], admission.reason)

    def _notice(
        self, study_id: int, package: Package, mode: Mode, admission: Admission, source: StoredInstance | None
    ) -> Notice | None:
        """What the hospital is told of a refusal, where it wants to hear of it; patient and order are the source's."""
        if admission.admitted or source is None:
            return None
        try:
            return self._issuer.refusal(study_id, package, mode, admission, source)
        except OSError:
            raise
        except Exception:  # that nobody can be told must not keep the study undecided
            log.exception("study %d: nobody is told that it was not analysed", study_id)
            return None

    def _spool_files(self, instances: Mapping[str, StoredInstance]) -> dict[str, tuple[Path, str, int]]:
        return {
            uid: (self._issuer.spooled(one), one.digest, one.header.number_of_frames) for uid, one in instances.items()
        }


def _spokesman(arrival: Arrival, selection: Selection | None = None) -> StoredInstance | None:
    """An image that patient and order are taken from: of the chosen series, else of the one with most images.

    Not of what came first: that may be a scout under the name of whoever was scanned before.
    """
    series = (selection or arrival.selection).series or max(
        arrival.series, key=lambda one: len(one.headers), default=None
    )
    return None if series is None else arrival.instances[series.first.sop_instance_uid]


def _unread(arrival: Arrival, selection: Selection, read: Inputs) -> bool:
    """Whether images are here that a verdict does not rest on, of the chosen series or of one like it."""
    known = {uid for uid, _ in read}
    wanted = {one.series_instance_uid for one in selection.considered if one.chosen or one.alike}
    return any(
        header.sop_instance_uid not in known
        for series in arrival.series
        if series.series_instance_uid in wanted
        for header in series.headers
    )


_Name = tuple[str, tuple[tuple[str, ...], ...]]
"""A package and, for a slab and each neighbour that it is seen with, the SOP Instance UIDs of its planes."""


def _name(package: Package, volume: Volume, context: Context) -> _Name:
    planes = volume.planes
    return package.name, tuple(tuple(planes[member].sop_instance_uid for member in slab) for slab in context)


def longest_run(slabs: Sequence[tuple[int, ...]], gaps: Container[int]) -> int:
    """How many slabs of a volume lie next to one another, at most.

    Args:
        slabs: their planes, sorted.
        gaps: planes after which cover is missing.
    """
    longest = run = 0
    for number, slab in enumerate(slabs):
        below = slabs[number - 1][-1] if number else -2
        run = run + 1 if slab[0] == below + 1 and below not in gaps else 1
        longest = max(longest, run)
    return longest


def _pause(attempt: int) -> float:
    """Seconds before the next try, doubling with each."""
    return min(LONGEST_PAUSE, 2.0**attempt)
