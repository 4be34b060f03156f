"""The services, and the only place that wires the stages together."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pydicom
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from appliance import __version__
from appliance.delivery.dicom import store
from appliance.delivery.hl7 import MllpClient, outcome
from appliance.delivery.outbox import POLL_SECONDS, Result, Worker
from appliance.events import Event
from appliance.findings.alert import Kind, message_control_id, render_alert
from appliance.findings.render import object_uid, objects_for, package_device, render
from appliance.governance.indication import Admission, Criterion, admit, admit_pixels
from appliance.governance.package import Package, load_configured
from appliance.inference.brain import brain_volume_ml
from appliance.inference.decode import decode_verified, decode_volume, verified
from appliance.inference.slabs import plan_slabs
from appliance.inference.stream import analyse
from appliance.inference.triton import TritonClient
from appliance.intake.commitment import CommitmentProvider, Reporter
from appliance.intake.receiver import Receiver
from appliance.intake.retention import Retention
from appliance.intake.spool import Spool, path_of
from appliance.ledger.database import Row, now, seconds_between
from appliance.ledger.doorbell import Doorbell, ring
from appliance.ledger.records import Verdict
from appliance.ledger.store import LONGEST_PAUSE, Inputs, Ledger, NewFinding, StoredInstance
from appliance.settings import DicomDestination, Hl7Destination, Intake, Settings, SettingsError
from appliance.study.completeness import weigh
from appliance.study.grouping import group
from appliance.study.selection import Considered, Selection, considered, select
from dicom_io.errors import ScansideError
from dicom_io.objects.common import part10
from dicom_io.scp import Listener, ServerOptions, start_server
from dicom_io.scu import Peer
from dicom_io.sop_classes import storage_classes
from dicom_io.tls import ServerCertificates
from dicom_io.volume import assemble, planes_of

log = logging.getLogger(__name__)

STOP_SECONDS = 8.0
"""A service that was told to stop finishes what it does within this time, or leaves it to the next start."""

URGENCY = {"alert": 0, "report": 10}
OTHER_URGENCY = 20
"""Captures come after the report: larger, and of use only once somebody looks."""


@contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set; for the main thread."""
    stopping = threading.Event()

    def ask(_number: int, _frame: FrameType | None) -> None:
        stopping.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def only_one(settings: Settings, name: str) -> Iterator[None]:
    """Hold the lock of a service: two intakes on one spool would sweep each other's files away.

    Raises:
        ScansideError: another process holds it.
    """
    path = settings.run_directory / f"{name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        where = f"box.state_directory ({settings.box.state_directory})"
        raise SettingsError(error.strerror or str(error), where, "make it a folder that this user can write") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            remedy = "stop the other one first, or give this one another state_directory"
            raise ScansideError(f"{name} runs already", str(settings.box.state_directory), remedy) from None
        yield


@contextmanager
def _service(settings: Settings, name: str) -> Iterator[tuple[Ledger, threading.Event]]:
    """What every service does at both ends: one process only, the ledger opened, the signals caught."""
    with only_one(settings, name), stop_signal() as stopping:
        ledger = Ledger(settings.ledger_path)
        threading.Thread(target=_end_in_time, args=(stopping, name), daemon=True).start()
        try:
            ledger.log(Event.SERVICE_STARTED, service=name, version=__version__, pid=os.getpid())
            yield ledger, stopping
            ledger.log(Event.SERVICE_STOPPED, service=name, pid=os.getpid())
        finally:
            ledger.close()


def _end_in_time(stopping: threading.Event, name: str) -> None:
    """End the process when it was told to stop and a peer, a codec or Triton holds it up.

    Nothing is lost by it: what is under way is in the ledger, and the next start takes it up.
    """
    stopping.wait()
    time.sleep(STOP_SECONDS)
    log.warning("%s: something holds it up; what is under way is taken up at the next start", name)
    logging.shutdown()
    os._exit(0)


# --- intake ---------------------------------------------------------------------------------------------


def run_intake(settings: Settings) -> None:
    """Receive instances until told to stop; then let associations end, for a moment.

    Raises:
        ScansideError: the port cannot be had, the ledger or the spool cannot be used.
    """
    with _service(settings, "intake") as (ledger, stopping):
        lost = ledger.abandon_associations()
        try:
            spool = Spool(settings.spool_directory)
            swept = spool.sweep(ledger.digests())
        except OSError as error:
            where = f"box.state_directory ({settings.spool_directory})"
            raise ScansideError(error.strerror or str(error), where, "make the folder writable") from error
        shortage = partial(spool.shortage, settings.intake.reserve_percent, settings.intake.reserve_bytes)
        if reason := shortage():
            log.error("intake: %s; every instance is refused until there is room", reason)
        peers = {one.ae_title: Peer(one.ae_title, one.host, one.port) for one in settings.commitment_peer}
        reporters: list[Reporter] = []

        def wake_reporters() -> None:
            for reporter in reporters:
                reporter.wake()

        commitments = CommitmentProvider(
            ledger,
            settings.spool_directory,
            peers,
            attempts=settings.delivery.attempts,
            first_retry_seconds=settings.delivery.first_retry_seconds,
            longest_retry_seconds=settings.delivery.longest_retry_seconds,
            shortage=shortage,
            due=wake_reporters,
        )
        ledger.park_commitments(peers)
        receiver = Receiver(ledger, spool, partial(ring, settings.run_directory, "engine"), commitments, shortage)
        server = start_server(_server_options(settings.intake), _listeners(settings.intake), receiver)
        reporters += [Reporter(ledger, commitments, peer) for peer in peers.values()]
        for reporter in reporters:
            reporter.start()
        retention = Retention(ledger, settings, receiver.committer.paused)
        threading.Thread(target=retention.run, args=(stopping,), name="retention", daemon=True).start()
        log.info(
            "intake: %s listens on %s:%s (%d associations lost, %d unacknowledged files removed since the last run)",
            settings.intake.ae_title,
            settings.intake.host,
            " and ".join(map(str, server.ports)),
            lost,
            swept,
        )
        stopping.wait()
        for reporter in reporters:
            reporter.stop()
        server.stop(STOP_SECONDS / 2)


def _server_options(intake: Intake) -> ServerOptions:
    return ServerOptions(
        ae_title=intake.ae_title,
        storage_classes=storage_classes(intake.storage_classes),
        accepted_calling=tuple(intake.accepted_calling_ae_titles),
        accepted_addresses=tuple(intake.accepted_addresses),
        require_called=intake.require_called_ae_title,
        maximum_associations=intake.maximum_associations,
        maximum_associations_per_address=intake.maximum_associations_per_address,
        artim_seconds=intake.request_seconds,
        idle_seconds=intake.idle_seconds,
        minimum_bytes_per_second=intake.minimum_bytes_per_second,
        maximum_instance_bytes=intake.maximum_instance_bytes,
    )


def _listeners(intake: Intake) -> list[Listener]:
    listeners = [Listener(intake.host, intake.port)] if intake.plain else []
    if intake.tls is not None:
        tls = intake.tls
        certificates = ServerCertificates(tls.certificate, tls.key, tls.client_authorities, tls.profile)
        listeners.append(Listener(intake.host, tls.port, certificates))
    return listeners


# --- engine ---------------------------------------------------------------------------------------------


def run_engine(settings: Settings) -> None:
    """Complete, admit, analyse and render studies until told to stop.

    Raises:
        ScansideError: a model package is not what it says, or the ledger cannot be used.
    """
    packages = load_configured(settings)
    with _service(settings, "engine") as (ledger, stopping), ExitStack() as stack:
        settings.findings_directory.mkdir(parents=True, exist_ok=True)
        Spool(settings.spool_directory).recover(ledger.digests())  # intake does so as well, but may start later
        bell = Doorbell(settings.run_directory, "engine")
        stack.callback(bell.close)
        client = TritonClient(
            f"{settings.triton.host}:{settings.triton.grpc_port}", timeout=settings.triton.request_seconds
        )
        stack.callback(client.close)
        engine = Engine(settings, ledger, packages, client)
        parked = ledger.park_analyses(settings.models.attempts)
        log.info("engine: runs %s (%d analyses taken up again)", ", ".join(settings.models.packages), parked)
        for package in packages:
            if not package.signed_by:
                log.warning("engine: nobody signed %s; it runs because of models.allow_unsigned", package.name)
        while not stopping.is_set():
            try:
                wait = engine.step()
            except Exception:
                log.exception("the engine stumbled; it goes on")
                wait = POLL_SECONDS
                with contextlib.suppress(SQLAlchemyError):
                    ledger.park_analyses(settings.models.attempts)
            if wait > 0:
                bell.wait(min(wait, POLL_SECONDS))


class Engine:
    """Takes work from the ledger and writes its outcome back, one study at a time."""

    def __init__(self, settings: Settings, ledger: Ledger, packages: Sequence[Package], client: TritonClient) -> None:
        self._settings = settings
        self._ledger = ledger
        self._packages = {package.name: package for package in packages}
        self._client = client
        self._problems: dict[str, str] = {}
        self._complaints: dict[int, str] = {}

    def step(self) -> float:
        """Do what there is to do; returns the seconds until there may be more (0: at once)."""
        wait = self._complete_studies()
        versions = {package.name: package.version for package in self._packages.values()}
        for study_id, name in self._ledger.undecided_studies(versions):
            with self._isolated(study_id):
                self._decide(study_id, self._packages[name])
        worked = self._analyse_next()
        self._render_findings()
        return 0.0 if worked else wait

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

    def _complete_studies(self) -> float:
        """Declare complete what is; returns the seconds until the next study may be."""
        quiet, settle = self._settings.study.quiet_seconds, self._settings.study.settle_seconds
        soonest = POLL_SECONDS
        for arriving in self._ledger.arriving_studies():
            if arriving.open_associations and 0 <= seconds_between(arriving.last_instance_at, now()) < quiet:
                # Images still come; weighing them all again for each would be quadratic.
                continue
            with self._isolated(arriving.id):
                selection = self._select(arriving.id)
                decision = weigh(arriving, selection, now(), settle_seconds=settle, quiet_seconds=quiet)
                if not decision.complete:
                    soonest = min(soonest, decision.wait_seconds)
                elif self._ledger.complete_study(arriving.id, arriving.last_instance_at, decision.evidence):
                    log.info("study %d: complete, %s", arriving.id, decision.evidence["by"])
        return soonest

    def _select(self, study_id: int) -> Selection:
        series = group(instance.header for instance in self._ledger.instances(study_id))
        try:
            return select(series)
        except Exception as error:
            # A geometry that nobody foresaw: the study is refused with the reason, and stuck nowhere.
            log.exception("study %d: the selection failed in a way nobody foresaw", study_id)
            reason = f"the selection failed: {type(error).__name__}: {error}"
            return Selection(None, None, tuple(considered(one, chosen=False, reason=reason) for one in series))

    def _decide(self, study_id: int, package: Package) -> None:
        """Ask the gate about one complete study."""
        instances = self._ledger.instances(study_id)
        digests = {one.sop_instance_uid: one.digest for one in instances}
        selection = self._select(study_id)
        inputs: list[list[str]] = []
        gone = self._ledger.removed_instances(study_id)
        if gone and self._ledger.standing_verdict(study_id, package.name) is not None:
            # Something of an old study came again, a dose report or one of our own captures; its images did not.
            self._ledger.keep_verdict(study_id, package.name, selection.to_json())
            log.warning("study %d: retention removed %d of its images, the verdict stands", study_id, gone)
            return
        if gone:
            said = f"{gone} instances were removed by retention"
            criterion = Criterion("files", "instances of the study", said, "all of them, sent again", "violated")
            admission = Admission((criterion,))
        elif selection.series is None or selection.volume is None:
            reasons = "; ".join(f"series {_number(one)}: {one.reason}" for one in selection.considered)
            rule = "an axial original head CT series"
            admission = Admission((Criterion("series", "series of the study", reasons, rule, "violated"),))
        else:
            try:
                slabs = len(plan_slabs(selection.volume, package.preprocessing.slab_mm))
                admission = admit(package, selection.series.headers, selection.volume, slabs, self._settings.exception)
            except Exception as error:
                # What nobody can judge is refused, where everybody sees it, and not tried for ever.
                log.exception("study %d: the gate failed in a way nobody foresaw", study_id)
                said = f"it failed: {type(error).__name__}: {error}"
                admission = Admission((Criterion("gate", "the gate itself", said, "a decision", "unknown"),))
            uids = dict.fromkeys(plane.sop_instance_uid for plane in selection.volume.planes)
            inputs = [[uid, digests[uid]] for uid in uids]
        standing = self._ledger.standing_verdict(study_id, package.name)
        if (
            admission.admitted
            and standing is not None
            and standing["inputs"] == inputs
            and standing["result"]["package_version"] == package.version
        ):
            # A dose report or one of our own captures came back from the PACS: no new revision of the same answer.
            self._ledger.keep_verdict(study_id, package.name, selection.to_json())
            log.info("study %d: nothing that was analysed changed, the verdict stands", study_id)
            return
        self._ledger.decide(
            study_id,
            package.name,
            package.version,
            admitted=admission.admitted,
            reason=admission.reason,
            admission=admission.to_json(),
            selection=selection.to_json(),
            inputs=inputs,
        )
        verb = "admitted" if admission.admitted else "refused"
        why = "" if admission.admitted else f" ({admission.reason})"
        log.info("study %d: %s by %s%s", study_id, verb, package.name, why)
        if not admission.admitted and standing is not None and standing["positive"]:
            log.error("study %d: an alert stands that a later look at the study could not confirm", study_id)

    def _analyse_next(self) -> bool:
        """Work on the next analysis whose package Triton serves; False if there is none."""
        waiting = self._ledger.waiting_packages()
        ready = [name for name in sorted(waiting & set(self._packages)) if self._ready(self._packages[name])]
        row = self._ledger.take_analysis(ready) if ready else None
        if row is None:
            return False
        package = self._packages[row["package"]]
        attempt = row["attempts"] + 1
        try:
            self._analyse(row, package)
        except (OSError, OperationalError) as error:
            # The disk's fault, not the study's (OperationalError: the ledger is full or locked): it loses no try by it.
            log.exception("study %d: the disk or the ledger failed; it is tried again", row["study_id"])
            self._ledger.park_analysis(row["id"], str(error).splitlines()[0], _pause(attempt))
        except ScansideError as error:
            self._failed(row, str(error), attempt)
        except Exception as error:
            log.exception("study %d: the analysis failed in a way nobody foresaw", row["study_id"])
            self._failed(row, f"{type(error).__name__}: {error}", attempt)
        return True

    def _ready(self, package: Package) -> bool:
        said = self._client.problem(package)
        if said != self._problems.get(package.name):
            self._problems[package.name] = said
            level = logging.WARNING if said else logging.INFO
            log.log(level, "Triton, for %s: %s", package.name, said or "ready")
        return not said

    def _failed(self, row: Row, reason: str, attempt: int) -> None:
        final = self._ledger.fail_analysis(row["id"], reason, self._settings.models.attempts, _pause(attempt))
        log.error("study %d: %s (%s)", row["study_id"], "set aside" if final else "will be tried again", reason)

    def _files(self, study_id: int, inputs: Inputs) -> dict[str, StoredInstance]:
        found = {one.sop_instance_uid: one for one in self._ledger.inputs(study_id, inputs)}
        if len(found) != len(inputs):
            raise ScansideError("instances that were admitted are gone", f"study {study_id}", "report this fault")
        return found

    def _analyse(self, row: Row, package: Package) -> None:
        """Run a package on exactly what the gate admitted, whatever arrived since."""
        study_id = row["study_id"]
        instances = self._files(study_id, row["inputs"])
        volume = assemble([plane for one in instances.values() for plane in planes_of(one.header)])
        decoded = decode_volume(volume, {uid: (self._spooled(one), one.digest) for uid, one in instances.items()})
        admission = admit_pixels(
            package,
            Admission(tuple(Criterion(**criterion) for criterion in row["admission"])),
            brain_volume_ml(decoded.plane, volume),
        )
        if not admission.admitted:
            self._ledger.withhold(row["id"], admission.reason, admission.to_json())
            log.info("study %d: refused by %s (%s)", study_id, package.name, admission.reason)
            if any(one["positive"] for one in self._ledger.verdicts(row["id"])[-1:]):
                log.error("study %d: an alert stands that a later look at the study could not confirm", study_id)
            return
        first = next(iter(instances.values()))
        verdict = analyse(
            package,
            self._client,
            volume,
            decoded.plane,
            study_uid=row["study_instance_uid"],
            series_uid=first.header.series_instance_uid,
            codecs=decoded.codecs,
            limitations=[
                f"Series {one['series_number'] if one['series_number'] is not None else 'without number'} "
                f"was not analysed: {one['reason']}."
                for one in row["selection"]
                if not one["chosen"]
            ],
        )
        self._issue(row, verdict, admission, self._spooled(first))

    def _spooled(self, instance: StoredInstance) -> Path:
        return path_of(self._settings.spool_directory, instance.digest)

    def _issue(self, row: Row, verdict: Verdict, admission: Admission, source: Path) -> None:
        """Write the alerts' files, then verdict, findings and deliveries in one transaction."""
        revision = len(self._ledger.verdicts(row["id"])) + 1
        issued_at = now()
        key = (row["study_instance_uid"], verdict.package, verdict.package_version)
        folder = _folder(row["study_id"], verdict.package, revision)
        findings: list[NewFinding] = []
        told = self._ledger.told(row["id"])
        hl7 = [one for one in self._settings.destination if isinstance(one, Hl7Destination)]
        header = pydicom.dcmread(source, stop_before_pixels=True)
        for destination in hl7:
            kind = alert_kind(told.get(destination.name, []), verdict.positive)
            if kind is None:
                continue
            message = message_control_id(*key, str(revision), kind, destination.name)
            text = render_alert(
                verdict,
                header,
                control_id=message,
                kind=kind,
                revision=revision,
                issued_at=datetime.fromisoformat(issued_at),
                # What is only evaluated must not look like the real thing to an interface engine.
                processing_id=destination.processing_id if self._packages[verdict.package].mode == "clinical" else "T",
                sending_application=self._settings.box.name,
                sending_facility=destination.sending_facility,
                receiving_application=destination.receiving_application,
                receiving_facility=destination.receiving_facility,
            )
            path = folder / f"{message}.hl7"
            _write_durably(self._settings.findings_directory / path, text.encode("utf-8"))
            # One object a destination: MSH-5, MSH-6 and MSH-11 differ between them.
            name = f"alert.{destination.name}"
            findings.append(NewFinding(name, message, str(path), (destination.name,), URGENCY["alert"]))
        for name in objects_for(verdict):
            wanted = tuple(
                one.name
                for one in self._settings.destination
                if isinstance(one, DicomDestination) and name.split(".")[0] in one.objects
            )
            uid = object_uid(self._settings.box.uid_root, *key, revision, name)
            findings.append(NewFinding(name, uid, None, wanted, URGENCY.get(name, OTHER_URGENCY)))
        last = self._ledger.last_instance_at(row["study_id"])
        untold = "no HL7 destination is configured" if verdict.positive and not hl7 else ""
        self._ledger.issue_verdict(
            row["id"],
            revision,
            verdict,
            issued_at,
            findings,
            admission=admission.to_json(),
            late=seconds_between(last, issued_at) > self._settings.budget_seconds,
            untold=untold,
        )
        ring(self._settings.run_directory, "delivery")
        answer = "positive" if verdict.positive else "negative"
        log.info("study %d: %s (%.2f), revision %d", row["study_id"], answer, verdict.probability, revision)
        if untold:
            log.error("study %d: nobody is alerted: %s", row["study_id"], untold)

    def _render_findings(self) -> None:
        """Make the file of every finding that has none yet, most urgent first."""
        attempts = self._settings.models.attempts
        for row in self._ledger.unrendered_findings(attempts):
            self._ledger.start_rendering(row["id"])
            try:
                self._render_one(row)
            except Exception as error:
                log.exception("study %d: %s could not be rendered", row["study_id"], row["object"])
                self._ledger.render_failed(row["id"], row["study_id"], f"{type(error).__name__}: {error}")
        self._ledger.abandon_findings(attempts)

    def _render_one(self, row: Row) -> None:
        verdict = Verdict.from_json(row["result"])
        instances = self._files(row["study_id"], row["inputs"])
        dataset = render(
            row["object"],
            verdict,
            revision=row["revision"],
            issued_at=datetime.fromisoformat(row["issued_at"]),
            sources=lambda uid: verified(self._spooled(instances[uid]), instances[uid].digest),
            hu_of=lambda uid, frame: decode_verified(self._spooled(instances[uid]), instances[uid].digest).hu[frame],
            analysed=tuple(instances),
            uid_root=self._settings.box.uid_root,
            device=package_device(
                verdict,
                uid_root=self._settings.box.uid_root,
                station=self._settings.box.name,
                manufacturer=self._packages[row["package"]].manufacturer,
            ),
        )
        if dataset.SOPInstanceUID != row["uid"]:
            raise ScansideError("the rendered object has another UID than its row", row["object"], "report this fault")
        path = _folder(row["study_id"], verdict.package, row["revision"]) / f"{row['object']}.dcm"
        _write_durably(self._settings.findings_directory / path, part10(dataset))
        self._ledger.rendered(row["id"], row["study_id"], str(path))
        ring(self._settings.run_directory, "delivery")


def alert_kind(positive_before: Sequence[bool], positive: bool) -> Kind | None:
    """What a verdict tells the hospital: an alert once, and a withdrawal or correction when the answer changed.

    Args:
        positive_before: the answers of the earlier revisions, oldest first.
    """
    if positive_before and positive_before[-1]:
        return None if positive else "withdrawal"
    if not positive:
        return None
    return "correction" if any(positive_before) else "alert"


def _number(series: Considered) -> str:
    return str(series.series_number) if series.series_number is not None else "without number"


def _pause(attempt: int) -> float:
    """Seconds before the next try, doubling with each."""
    return min(LONGEST_PAUSE, 2.0**attempt)


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


# --- delivery -------------------------------------------------------------------------------------------


def run_delivery(settings: Settings) -> None:
    """Deliver what is due until told to stop.

    Raises:
        ScansideError: the ledger cannot be used.
    """
    with _service(settings, "delivery") as (ledger, stopping), ExitStack() as stack:
        bell = Doorbell(settings.run_directory, "delivery")
        stack.callback(bell.close)
        settings.findings_directory.mkdir(parents=True, exist_ok=True)
        parked = ledger.park_deliveries()
        lost = ledger.abandon_deliveries([one.name for one in settings.destination])
        if lost:
            log.error("delivery: %d deliveries are dead letters: their destination is no longer configured", lost)
        workers = []
        for destination in settings.destination:
            worker = Worker(
                ledger,
                destination.name,
                _deliverer(settings, destination, stack),
                attempts=settings.delivery.attempts,
                first_retry_seconds=settings.delivery.first_retry_seconds,
                longest_retry_seconds=settings.delivery.longest_retry_seconds,
                budget_seconds=settings.budget_seconds,
            )
            worker.start()
            workers.append(worker)
        names = ", ".join(one.name for one in settings.destination) or "nobody: no destination is configured"
        log.info("delivery: to %s (%d deliveries taken up again)", names, parked)
        while not stopping.is_set():
            if bell.wait(POLL_SECONDS):
                for worker in workers:
                    worker.wake()
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.join(STOP_SECONDS / 2 / max(len(workers), 1))


def _deliverer(
    settings: Settings, destination: DicomDestination | Hl7Destination, stack: ExitStack
) -> Callable[[Row], Result]:
    """One try at one delivery, for that destination."""
    folder = settings.findings_directory
    if isinstance(destination, DicomDestination):
        peer = Peer(destination.ae_title, destination.host, destination.port)
        return lambda row: store(folder / row["path"], peer, settings.intake.ae_title)
    client = MllpClient(
        destination.host, destination.port, connect_timeout=5.0, ack_timeout=destination.acknowledge_seconds
    )
    stack.callback(client.close)

    def send(row: Row) -> Result:
        try:
            answer = client.send((folder / row["path"]).read_bytes().decode("utf-8"))
        except ValueError as error:
            # The message itself cannot be framed: it would not get better by sending it again.
            return "reject", str(error)
        said = f"{answer.code} {answer.text}".strip()
        match outcome(answer):
            case "acknowledged":
                return "acknowledge", said
            case "rejected":
                return "reject", said
            case "retry":
                return "retry", said

    return send


def log_as(level: str, *, machine: bool = False) -> None:
    """Log lines to standard error: readable, or one JSON object each. They name studies by number only."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter() if machine else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("pynetdicom", "pydicom", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)
