"""A verdict becomes messages, objects and deliveries; one that does not hold is taken back."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pydicom

from appliance.events import Event
from appliance.findings.render import (
    CAPTURE,
    KINDS,
    REPORT,
    REPORT_2D,
    SUMMARY,
    Revision,
    kind_of,
    object_uid,
    objects_for,
    package_device,
    render,
    render_refusal,
    series_uid,
)
from appliance.governance.board import APPROVAL, INTEGRITY
from appliance.governance.indication import Admission
from appliance.governance.ordered import accessions, match_orders
from appliance.governance.package import Package
from appliance.inference.decode import decode_verified, verified
from appliance.inference.verdict import EVALUATION
from appliance.intake.spool import path_of
from appliance.ledger.database import Row, now, seconds_between
from appliance.ledger.doorbell import ring
from appliance.ledger.orders import Order
from appliance.ledger.records import ALERT_STANDS, ANOTHER_PATIENT, Verdict
from appliance.ledger.store import Inputs, Ledger, NewFinding, Notice, StoredInstance
from appliance.services.routing import forms_not_analysed, needs_2d, needs_summary, routed
from appliance.services.selftest import selftest_settings
from appliance.services.telling import Issued, Known, Message, marks, message, messages, recipients
from appliance.settings import Hl7Destination, ImageDestination, Settings
from dicom_io.errors import ScansideError
from dicom_io.header import Header
from dicom_io.identity import identifying_header
from dicom_io.objects.common import part10

log = logging.getLogger(__name__)

URGENCY = {kind: 10 * place for place, kind in enumerate(("alert", *KINDS))}
SHADOW = "shadow"
"""The mode in which verdicts and findings are made and nobody is told."""
_NO_WORD = "the package was put in shadow, so no answer of it is told; what the provisional alert said is not disproved"
_OUR_FAULT = (APPROVAL, INTEGRITY, "gate")
"""Criteria whose failure is the box's affair, not the study's. That files are gone is not: whoever sent a part of an
old study anew must hear that nobody reads it."""
WORKLIST_URGENCY = 5
"""That of a change of the worklist: behind the alert, before the objects."""
OTHER_URGENCY = 20
"""That of a refusal."""
_ALWAYS = (REPORT, CAPTURE)
"""Kinds of objects that are made also where no destination takes them: somebody may look at the box itself."""


class Issuer:
    """Writes verdicts down with all that comes of them, and makes the files of the findings. Threads may share it.

    Attributes:
        issued: set whenever there are findings to render.
    """

    def __init__(self, settings: Settings, ledger: Ledger, packages: Sequence[Package]) -> None:
        self._settings = settings
        self._ledger = ledger
        self._packages = {package.name: package for package in packages}
        self.issued = threading.Event()
        self._held_until = 0.0
        self._began: float | None = None

    def hold(self, wanted: bool) -> None:
        """Draw nothing while an analysis needs the processor more, but not for ever: people read the pictures."""
        if not wanted:
            self._held_until = 0.0
        elif not self._held_until:
            self._held_until = time.monotonic() + self._settings.budget.analysis_seconds

    def _told(self, study_id: int) -> Settings:
        """The settings with the destinations that hear of a study: the site's, or a self-test's own."""
        test = self._ledger.selftest(study_id)
        return self._settings if test is None else selftest_settings(self._settings, test)

    def spooled(self, instance: StoredInstance) -> Path:
        """The file of an instance."""
        return path_of(self._settings.spool_directory, instance.digest)

    def _identity(self, instance: StoredInstance) -> pydicom.Dataset:
        """The header of an instance; what the ledger keeps of it where the file cannot be read."""
        try:
            return identifying_header(self.spooled(instance))
        except Exception:  # whatever it holds: no alert waits for it
            log.exception("the header of an image cannot be read; what is told of its study has less of the patient")
        known, header = instance.header, pydicom.Dataset()
        header.SpecificCharacterSet = "ISO_IR 192"
        header.StudyInstanceUID, header.PatientID = known.study_instance_uid, known.patient_id
        header.IssuerOfPatientID, header.AccessionNumber = known.issuer_of_patient_id, known.accession_number
        header.PatientBirthDate, header.StudyDate = known.patient_birth_date, known.study_date
        return header

    def files(self, study_id: int, inputs: Inputs) -> dict[str, StoredInstance]:
        """The instances that an analysis was admitted on, by UID.

        Raises:
            ScansideError: some are gone.
        """
        found = {one.sop_instance_uid: one for one in self._ledger.inputs(study_id, inputs)}
        if len(found) != len(inputs):
            raise ScansideError("instances that were admitted are gone", f"study {study_id}", "report this fault")
        return found

    def issue(
        self,
        row: Row,
        verdict: Verdict,
        admission: Admission,
        source: StoredInstance,
        board: int | None = None,
        *,
        stands: bool = False,
    ) -> None:
        """Write the alerts' files, then verdict, findings and deliveries in one transaction.

        First is taken back what was told under another Patient ID, or, before a verdict in shadow, by a provisional
        alert: nobody will hear its word on the whole study. Killed between the two, the next try finds it done.

        Args:
            board: the newest decision of the board that the admission rests on.
            stands: an alert stands that this negative verdict does not disprove: nobody is told that it is withdrawn.

        Raises:
            BoardMoved: the board has decided something since then; nothing was written down.
        """
        settings = self._told(row["study_id"])
        test = settings is not self._settings
        shadow = verdict.mode == SHADOW and not test
        for one in self._ledger.verdicts(row["id"])[-1:] if shadow else ():
            if one["positive"] and one["result"].get("provisional") and one["result"].get("mode") != SHADOW:
                self.take_back(one, source, _NO_WORD)
        if not shadow and (moved := self.of_another_patient(row["study_id"], row["id"], source)) is not None:
            self.take_back(moved, source, ANOTHER_PATIENT)
        revision = len(self._ledger.verdicts(row["id"])) + 1
        issued_at = now()
        this = Revision(verdict, revision, datetime.fromisoformat(issued_at))
        findings = []
        if not (stands or shadow):
            issued = Issued(row["study_id"], verdict, revision, issued_at, self._identity(source))
            findings = self._alerts(settings, row["id"], issued)
        archives = [one for one in settings.destination if isinstance(one, ImageDestination)]
        pictured = self._pictured(row["id"], verdict, revision)
        routes = {one.name: routed(one, verdict, pictured=pictured) for one in archives}
        spare_2d = any(map(needs_2d, archives))
        for name in objects_for(verdict):
            kind = kind_of(name)
            takers = {one: urgencies[name] for one, urgencies in routes.items() if name in urgencies}
            if takers or (spare_2d if name == REPORT_2D else kind in _ALWAYS):
                uid = object_uid(self._settings.box.uid_root, this, name)
                names = () if shadow else tuple(takers)
                findings.append(NewFinding(name, uid, None, names, URGENCY[kind], urgencies=takers))
        last = self._ledger.last_instance_at(row["study_id"])
        nobody = verdict.positive and not shadow and not test and not settings.alert_destinations
        untold = "no destination of alerts is configured" if nobody else ""
        self._ledger.issue_verdict(
            row["id"],
            revision,
            verdict,
            issued_at,
            findings,
            admission=admission.to_json(),
            late=not test and seconds_between(last, issued_at) > settings.budget.seconds,
            untold=untold,
            board=board,
        )
        ring(self._settings.run_directory, "delivery")
        self.issued.set()
        answer = "positive" if verdict.positive else "negative"
        told = "a self-test: " if test else "in shadow, nobody is told: " if shadow else ""
        log.info("study %d: %s%s (%.2f), revision %d", row["study_id"], told, answer, verdict.probability, revision)
        if untold:
            log.error("study %d: nobody is alerted: %s", row["study_id"], untold)

    def of_another_patient(self, study_id: int, analysis_id: int, source: StoredInstance) -> Row | None:
        """The verdict under whose Patient ID was told what was told of a study, if the images now have another one.

        Images that name no patient say nothing of that, now or before, unless none ever did.

        Args:
            source: one of the images.
        """
        told = []
        for one in reversed(self._ledger.verdicts(analysis_id)):
            read = next(iter(self._ledger.inputs(study_id, one["inputs"])), None)
            if one["result"].get("mode") != SHADOW and read is not None:
                told.append((one, read.header))
        newest = next((known for known in told if known[1].patient_id.strip()), next(iter(told), None))
        return newest[0] if newest is not None and _differ(newest[1], source.header) else None

    def take_back(self, standing: Row, source: StoredInstance | None, reason: str) -> None:
        """What becomes of a verdict on a study that was refused in the end.

        A provisional alert is withdrawn, and an archive that has a report gets one that says that the study was not
        analysed. An alert on a whole study stands: nobody knows better. So does one that the verdict itself left
        standing, and the report says that again. What was told under another Patient ID does not stand once its images
        were read under this one: whose they are, is known better.

        Args:
            source: an instance of the study that patient and order are taken from where none of those is left that the
                verdict rests on: what takes it back must reach the same patient's record.
        """
        study_id, verdict = self._ledger.study_of(standing["analysis_id"]), Verdict.from_json(standing["result"])
        moved = reason == ANOTHER_PATIENT
        # With that, all ends that this patient was told; what was withdrawn before did not say so.
        if verdict.withdrawn and not (moved and verdict.withdrawn != reason):
            return
        if verdict.positive and not verdict.provisional and not moved:
            log.error("study %d: an alert stands that a later look at the study could not confirm", study_id)
            return
        # One in shadow may be newer.
        revision, issued_at = len(self._ledger.verdicts(standing["analysis_id"])) + 1, now()
        stands = tuple(one for one in verdict.limitations if one == ALERT_STANDS)
        withdrawn = replace(
            verdict, positive=False, provisional=False, withdrawn=reason, slabs=(), key_slabs=(), limitations=stands
        )
        source = next(iter(self._ledger.inputs(study_id, standing["inputs"])), source)
        if source is None:
            log.error("study %d: all of it is gone: what was said of it could not be withdrawn, and stands", study_id)
            return
        settings = self._told(study_id)
        package = self._packages.get(verdict.package)
        archives = [one for one in settings.destination if isinstance(one, ImageDestination)]
        findings = []
        if verdict.mode != SHADOW or settings is not self._settings:
            issued = Issued(study_id, withdrawn, revision, issued_at, self._identity(source))
            findings = [] if stands else self._alerts(settings, standing["analysis_id"], issued)
            if package and archives and REPORT in objects_for(verdict):
                findings += self._not_analysed(package, issued, archives, standing)
        if not (verdict.positive or findings or moved):
            return  # nobody was told of it
        self._ledger.withdraw_verdict(
            standing["analysis_id"], revision, withdrawn, issued_at, findings, inputs=standing["inputs"]
        )
        ring(self._settings.run_directory, "delivery")
        said = "the negative report is taken back"
        if verdict.positive:
            said = f"the {'provisional ' if verdict.provisional else ''}alert is withdrawn"
        log.warning("study %d: %s: %s", study_id, said, reason)

    def _alerts(self, settings: Settings, analysis_id: int, issued: Issued) -> list[NewFinding]:
        """Write the message to each destination that a verdict tells something new; what to deliver."""
        made = messages(settings, self._ledger.told_of_patient(analysis_id), issued)
        findings = [self._kept(issued, one) for one in made]
        return [*findings, *self._marks(settings, analysis_id, issued)]

    def _marks(self, settings: Settings, analysis_id: int, issued: Issued) -> list[NewFinding]:
        """Write the change of each worklist that a verdict tells something new; what to deliver."""
        told = self._ledger.told_of_patient(analysis_id, "worklist.")
        since = seconds_between(self._ledger.last_instance_at(issued.study_id), issued.at)
        late = since if since > settings.budget.seconds else None
        findings = []
        known = Known(late, lambda: self._orders(issued.study_id), lambda: self._ledger.positive_elsewhere(analysis_id))
        for one in marks(settings, told, issued, known):
            path = _folder(issued.study_id, issued.verdict.package, issued.revision) / one.file
            _write_durably(self._settings.findings_directory / path, one.content)
            if one.fault:
                log.error("study %d: %s is never told: %s", issued.study_id, one.destination.name, one.fault)
            name, failed = f"worklist.{one.destination.name}", one.fault and f"it is never sent: {one.fault}"
            findings.append(
                NewFinding(name, one.id, str(path), (one.destination.name,), WORKLIST_URGENCY, failed=failed)
            )
        return findings

    def owes(self, standing: Row, mode: str) -> bool:
        """Whether somebody whose alert the board had withdrawn would be told if a standing verdict were issued anew.

        Args:
            mode: in which its package runs now.
        """
        analysis_id = standing["analysis_id"]
        settings = self._told(self._ledger.study_of(analysis_id))
        if not standing["positive"] or (mode == SHADOW and settings is self._settings):
            return False
        withdrawn = self._ledger.withdrawn_alerts(analysis_id)
        if not withdrawn:
            return False
        verdict = replace(Verdict.from_json(standing["result"]), mode=mode)
        due = recipients(settings, self._ledger.told_of_patient(analysis_id), verdict)
        return any(destination.name in withdrawn for destination, _, _ in due)

    def _orders(self, study_id: int) -> Sequence[Order]:
        """The orders of a study and its patient that the box has heard of."""
        headers = [one.header for one in self._ledger.instances(study_id)]
        uid, first = self._ledger.begun(study_id)
        candidates, _ = self._ledger.orders_for(accessions(headers), uid)
        return match_orders(headers, candidates, self._ledger.names, self._settings.intake.authority, first).orders

    def refusal(
        self, study_id: int, package: Package, mode: str, admission: Admission, source: StoredInstance
    ) -> Notice | None:
        """Write the message to each HL7 destination that wants to hear of what was not analysed, and the report for the
        archives that do; None if none does.

        Nothing is told in shadow, nor where the box itself, not the study, is why, nor a second time.

        Args:
            source: an instance of the study; patient and order are its.
        """
        settings = self._told(study_id)
        wanted = [one for one in settings.destination if isinstance(one, Hl7Destination) and one.refusals]
        archives = [one for one in settings.destination if isinstance(one, ImageDestination) and one.refusals]
        ours = any(not one.met and one.criterion in _OUR_FAULT for one in admission.criteria)
        if mode == SHADOW or ours or not (wanted or archives) or self._ledger.has_spoken(study_id, package.name):
            return None
        verdict = Verdict(
            source.header.study_instance_uid, "", package.name, package.version,
            package.notice if mode == "clinical" else f"{EVALUATION} {package.notice}",
            positive=False, probability=0.0, threshold=package.operating_point.threshold, subtypes={}, volume_ml=0.0,
            slabs=(), key_slabs=(), codecs=(), limitations=(), withdrawn=admission.said, mode=mode,
            udi=package.udi,
        )  # fmt: skip
        issued = Issued(study_id, verdict, 1, now(), self._identity(source))
        made = [message(self._settings, one, issued, "refusal") for one in wanted]
        findings = [self._kept(issued, one) for one in made]
        findings += self._not_analysed(package, issued, archives)
        return Notice(verdict, issued.at, findings)

    def _not_analysed(
        self,
        package: Package,
        issued: Issued,
        archives: Sequence[ImageDestination],
        standing: Row | None = None,
    ) -> list[NewFinding]:
        """Write the report in each form in which an archive can take it; what to deliver.

        Args:
            standing: the verdict that does not stand any more.
        """
        analysis_id = standing["analysis_id"] if standing else None
        pictured = analysis_id is not None and self._pictured(analysis_id, issued.verdict, issued.revision)
        spare = {REPORT_2D: any(map(needs_2d, archives)), SUMMARY: any(map(needs_summary, archives))}
        findings = []
        for name in (REPORT, REPORT_2D, SUMMARY):
            takers = tuple(one.name for one in archives if name in forms_not_analysed(one, pictured=pictured))
            if takers or spare.get(name):
                findings.append(self._refused(name, package, issued, takers, analysis_id))
        return findings

    def _pictured(self, analysis_id: int, verdict: Verdict, revision: int) -> bool:
        """Whether pictures of a bleed may be there that a verdict denies.

        By all that came before it: those may be there, too, that an earlier negative one was to take back which never
        left.
        """
        if verdict.positive or ALERT_STANDS in verdict.limitations:
            return False
        return self._ledger.was_positive(analysis_id, revision)

    def _refused(
        self,
        name: str,
        package: Package,
        issued: Issued,
        archives: tuple[str, ...],
        analysis_id: int | None,
    ) -> NewFinding:
        """Write the report of a study that was not analysed; what to deliver, or why it never will be."""
        box, verdict = self._settings.box, issued.verdict
        this = Revision(verdict, issued.revision, datetime.fromisoformat(issued.at))
        uid = object_uid(box.uid_root, this, name)
        try:
            made = render_refusal(
                name,
                this,
                issued.header,
                uid_root=box.uid_root,
                device=package_device(
                    verdict, uid_root=box.uid_root, station=box.name, manufacturer=package.manufacturer
                ),
                predecessor=None if analysis_id is None else self._predecessor(analysis_id, name, this.number),
            )
            path = _folder(issued.study_id, issued.verdict.package, issued.revision) / f"{name}.dcm"
            _write_durably(self._settings.findings_directory / path, part10(made))
        except OSError:
            raise
        except Exception as error:  # a header that no report can be made of must not keep others from being told
            log.exception("study %d: the report that it was not analysed could not be made", issued.study_id)
            return NewFinding(name, uid, None, archives, OTHER_URGENCY, failed=f"{type(error).__name__}: {error}")
        return NewFinding(name, uid, str(path), archives, OTHER_URGENCY)

    def _kept(self, issued: Issued, told: Message) -> NewFinding:
        """Write one message's file; what to deliver, or why it never will be."""
        path = _folder(issued.study_id, issued.verdict.package, issued.revision) / told.file
        _write_durably(self._settings.findings_directory / path, told.content)
        # One object a destination: what a receiver is told differs between them.
        refusal, study_id, where = told.kind == "refusal", issued.study_id, told.destination.name
        name = f"{'refusal' if refusal else 'alert'}.{where}"
        if told.fault:
            log.error("study %d: the message to %s is invalid and never sent: %s", study_id, where, told.fault)
        if told.reduced:
            log.error("study %d: %s gets a reduced message, the whole one failed: %s", study_id, where, told.reduced)
            self._ledger.log(Event.ALERT_REDUCED, study=study_id, destination=where, reason=told.reduced)
        if told.unmapped:
            log.error("study %d: %s gets the standard message, its template failed: %s", study_id, where, told.unmapped)
            self._ledger.log(Event.MAPPING_FAILED, study=study_id, destination=where, reason=told.unmapped)
        return NewFinding(
            name,
            told.id,
            str(path),
            (where,),
            OTHER_URGENCY if refusal else URGENCY["alert"],
            told.held_seconds,
            told.fault and f"the message is invalid and never sent: {told.fault}",
        )

    def rendering_seconds(self) -> float:
        """For how long the finding that is being made has been; 0 while there is none."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def render(self) -> None:
        """Make the file of every finding that has none yet, the most urgent first, also of those that come meanwhile.

        One that cannot be made is tried again at the next call.
        """
        attempts = self._settings.models.attempts
        failed: list[int] = []
        # One by one: however many wait, one verdict with its outlines is in memory.
        while (row := self._ledger.unrendered_finding(attempts, failed)) is not None:
            if time.monotonic() < self._held_until:
                return
            self._ledger.start_rendering(row["id"])
            self._began = time.monotonic()
            try:
                self._render_one(row)
            except Exception as error:
                log.exception("study %d: %s could not be rendered", row["study_id"], row["object"])
                failed.append(row["id"])
                self._ledger.render_failed(row["id"], row["study_id"], f"{type(error).__name__}: {error}")
            finally:
                self._began = None
        self._ledger.abandon_findings(attempts)

    def _predecessor(self, analysis_id: int, name: str, revision: int) -> tuple[str, str] | None:
        """SOP Instance UID and Series Instance UID of the report that one of that revision follows, if there is one.

        Nobody has that of a verdict in shadow, and what was told under another Patient ID is of no concern to this one.
        """
        row = self._ledger.earlier_finding(analysis_id, name, revision)
        if row is None:
            return None
        earlier = Revision(Verdict.from_json(row["result"]), row["revision"], datetime.fromisoformat(row["issued_at"]))
        return row["uid"], series_uid(self._settings.box.uid_root, earlier, name, row["uid"])

    def _render_one(self, row: Row) -> None:
        verdict = Verdict.from_json(row["result"])
        instances = self.files(row["study_id"], row["inputs"])
        dataset = render(
            row["object"],
            Revision(verdict, row["revision"], datetime.fromisoformat(row["issued_at"])),
            sop_instance_uid=row["uid"],
            sources=lambda uid: verified(self.spooled(instances[uid]), instances[uid].digest),
            hu_of=lambda uid, frame: decode_verified(self.spooled(instances[uid]), instances[uid].digest).hu[frame],
            analysed=tuple(instances),
            uid_root=self._settings.box.uid_root,
            device=package_device(
                verdict,
                uid_root=self._settings.box.uid_root,
                station=self._settings.box.name,
                manufacturer=self._packages[row["package"]].manufacturer,
            ),
            predecessor=self._predecessor(row["analysis_id"], row["object"], row["revision"])
            if kind_of(row["object"]) == REPORT
            else None,
        )
        path = _folder(row["study_id"], verdict.package, row["revision"]) / f"{row['object']}.dcm"
        _write_durably(self._settings.findings_directory / path, part10(dataset))
        self._ledger.rendered(row["id"], row["study_id"], str(path))
        ring(self._settings.run_directory, "delivery")


def _differ(before: Header, after: Header) -> bool:
    """Whether images came again under another Patient ID. Where it got lost they did not; an issuer may be added."""
    if before.patient_id.strip() != after.patient_id.strip():
        return bool(after.patient_id.strip())
    issuers = {before.issuer_of_patient_id.strip(), after.issuer_of_patient_id.strip()}
    return len(issuers - {""}) > 1


def _folder(study_id: int, package: str, revision: int) -> Path:
    """Where the findings of a verdict lie, below the findings folder."""
    return Path(f"{study_id:06d}-{package}-{revision}")


def _write_durably(path: Path, content: bytes) -> None:
    """Write a file so that it is either whole and synced under its name, or not there."""
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)
    for folder in (path.parent, path.parent.parent):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
