"""The services, and the only place that wires the stages together."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pydicom

from appliance import __version__
from appliance.delivery.dicom import store
from appliance.delivery.hl7 import MllpClient, outcome
from appliance.delivery.outbox import POLL_SECONDS, Result, Worker
from appliance.events import Event
from appliance.findings.alert import Kind, message_control_id, render_alert
from appliance.findings.render import object_uid, objects_for, package_device, render
from appliance.governance.indication import Admission, Criterion, admit, admit_pixels
from appliance.governance.package import Package, load_all
from appliance.inference.brain import brain_volume_ml
from appliance.inference.decode import decode_volume
from appliance.inference.slabs import plan_slabs
from appliance.inference.stream import analyse
from appliance.inference.triton import TritonClient, TritonError
from appliance.intake.receiver import Receiver
from appliance.intake.spool import Spool, path_of
from appliance.ledger.database import now, seconds_between
from appliance.ledger.doorbell import Doorbell, ring
from appliance.ledger.records import Verdict
from appliance.ledger.store import Ledger, NewFinding, Row
from appliance.settings import DicomDestination, Hl7Destination, Settings
from appliance.study.completeness import weigh
from appliance.study.grouping import group
from appliance.study.selection import Selection, considered, select
from dicom_io.errors import DecodeError, ScansideError
from dicom_io.objects.common import part10
from dicom_io.pixels import decode
from dicom_io.scp import start_server
from dicom_io.scu import Peer

log = logging.getLogger(__name__)

STOP_SECONDS = 8.0
"""A service asked to stop finishes or parks what it does within this time; systemd is told 10 s."""

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
def _service(settings: Settings, name: str) -> Iterator[tuple[Ledger, threading.Event]]:
    """What every service does at both ends: the ledger opened, the signals caught, start and stop written down."""
    with stop_signal() as stopping:
        ledger = Ledger(settings.ledger_path)
        try:
            ledger.log(Event.SERVICE_STARTED, service=name, version=__version__, pid=os.getpid())
            yield ledger, stopping
            ledger.log(Event.SERVICE_STOPPED, service=name, pid=os.getpid())
        finally:
            ledger.close()


# --- intake ---------------------------------------------------------------------------------------------


def run_intake(settings: Settings) -> None:
    """Receive instances until told to stop; then let associations end, for a moment.

    Raises:
        ScansideError: the port cannot be had, the ledger or the spool cannot be used.
    """
    with _service(settings, "intake") as (ledger, stopping):
        lost = ledger.abandon_associations()
        spool = Spool(settings.spool_directory)
        swept = spool.sweep(ledger.digests())
        receiver = Receiver(ledger, spool, partial(ring, settings.run_directory, "engine"))
        server = start_server(
            settings.intake.ae_title,
            settings.intake.host,
            settings.intake.port,
            receiver,
            maximum_associations=settings.intake.maximum_associations,
            accepted_calling=settings.intake.accepted_calling_ae_titles,
            require_called=settings.intake.require_called_ae_title,
        )
        log.info(
            "intake: %s listens on %s:%d (%d associations lost, %d unacknowledged files removed since the last run)",
            settings.intake.ae_title,
            settings.intake.host,
            server.port,
            lost,
            swept,
        )
        stopping.wait()
        server.stop(STOP_SECONDS)


# --- engine ---------------------------------------------------------------------------------------------


def run_engine(settings: Settings) -> None:
    """Complete, admit, analyse and render studies until told to stop.

    Raises:
        ScansideError: a model package is not what it says, or the ledger cannot be used.
    """
    packages = load_all(settings.model_repository, settings.models.packages)
    with _service(settings, "engine") as (ledger, stopping), ExitStack() as stack:
        bell = Doorbell(settings.run_directory, "engine")
        stack.callback(bell.close)
        client = TritonClient(
            f"{settings.triton.host}:{settings.triton.grpc_port}", timeout=settings.triton.request_seconds
        )
        stack.callback(client.close)
        engine = Engine(settings, ledger, packages, client)
        parked = ledger.park_analyses()
        log.info("engine: runs %s (%d analyses taken up again)", ", ".join(map(str, settings.models.packages)), parked)
        while not stopping.is_set():
            try:
                wait = engine.step()
            except Exception:
                log.exception("the engine stumbled; it goes on")
                wait = POLL_SECONDS
            if wait > 0:
                bell.wait(min(wait, POLL_SECONDS))


class Engine:
    """Takes work from the ledger and writes its outcome back, one study at a time."""

    def __init__(self, settings: Settings, ledger: Ledger, packages: Sequence[Package], client: TritonClient) -> None:
        self._settings = settings
        self._ledger = ledger
        self._packages = {package.name: package for package in packages}
        self._client = client
        self._triton_problem: str | None = None

    def step(self) -> float:
        """Do what there is to do; returns the seconds until there may be more (0: at once)."""
        wait = self._complete_studies()
        for study_id, name in self._ledger.undecided_studies(list(self._packages)):
            self._decide(study_id, self._packages[name])
        worked = self._analyse_next()
        self._render_findings()
        return 0.0 if worked else wait

    def _select(self, study_id: int) -> Selection:
        series = group(instance.header for instance in self._ledger.instances(study_id))
        try:
            return select(series)
        except Exception as error:
            # A header that nobody foresaw must not hold up other studies: this one is refused, with the reason.
            log.exception("study %d: the selection failed in a way nobody foresaw", study_id)
            reason = f"the selection failed: {type(error).__name__}: {error}"
            return Selection(None, None, tuple(considered(one, chosen=False, reason=reason) for one in series))

    def _complete_studies(self) -> float:
        """Declare complete what is; returns the seconds until the next study may be."""
        study = self._settings.study
        soonest = POLL_SECONDS
        for arriving in self._ledger.arriving_studies():
            if arriving.open_associations and (seconds_between(arriving.last_instance_at, now()) < study.quiet_seconds):
                # Images still come; weighing them all again for each would be quadratic.
                continue
            decision = weigh(
                arriving,
                self._select(arriving.id),
                now(),
                settle_seconds=study.settle_seconds,
                quiet_seconds=study.quiet_seconds,
            )
            if not decision.complete:
                soonest = min(soonest, decision.wait_seconds)
            elif self._ledger.complete_study(arriving.id, arriving.last_instance_at, decision.evidence):
                log.info("study %d: complete, %s", arriving.id, decision.evidence["by"])
        return soonest

    def _decide(self, study_id: int, package: Package) -> None:
        """Ask the gate about one complete study."""
        selection = self._select(study_id)
        if selection.series is None or selection.volume is None:
            reasons = "; ".join(
                f"series {one.series_number if one.series_number is not None else '?'}: {one.reason}"
                for one in selection.considered
            )
            admission = Admission(
                (Criterion("series", "series of the study", reasons, "an axial original head CT series", "violated"),)
            )
        else:
            slabs = plan_slabs(selection.volume, package.preprocessing.slab_mm)
            admission = admit(package, selection.series.first, selection.volume, len(slabs), self._settings.exception)
        self._ledger.decide(
            study_id,
            package.name,
            package.version,
            admitted=admission.admitted,
            reason=admission.reason,
            admission=admission.to_json(),
            selection=selection.to_json(),
            series_instance_uid=selection.series.series_instance_uid if selection.series else None,
        )
        log.info(
            "study %d: %s by %s%s",
            study_id,
            "admitted" if admission.admitted else "refused",
            package.name,
            "" if admission.admitted else f" ({admission.reason})",
        )

    def _analyse_next(self) -> bool:
        """Work on the oldest admitted analysis; False if there is none or Triton is not there."""
        if not self._triton_ready():
            return False
        row = self._ledger.take_analysis()
        if row is None:
            return False
        package = self._packages.get(row["package"])
        try:
            if package is None:
                raise ScansideError("the package is no longer configured", row["package"], "configure it again")
            self._analyse(row, package)
        except TritonError as error:
            if self._triton_ready():
                self._failed(row, str(error))
            else:
                # The server's fault, not the study's: it waits without losing a try.
                self._ledger.park_analysis(row["id"])
        except DecodeError as error:
            self._failed(row, str(error))
        except Exception as error:
            log.exception("study %d: the analysis failed in a way nobody foresaw", row["study_id"])
            self._failed(row, f"{type(error).__name__}: {error}")
        return True

    def _triton_ready(self) -> bool:
        problems = [problem for one in self._packages.values() if (problem := self._client.problem(one))]
        said = "; ".join(problems)
        if said != self._triton_problem:
            self._triton_problem = said
            log.log(logging.WARNING if said else logging.INFO, "Triton: %s", said or "ready")
        return not problems

    def _failed(self, row: Row, reason: str) -> None:
        final = self._ledger.fail_analysis(row["id"], reason, self._settings.models.attempts)
        log.error("study %d: %s (%s)", row["study_id"], "set aside" if final else "will be tried again", reason)

    def _analyse(self, row: Row, package: Package) -> None:
        study_id = row["study_id"]
        instances = {one.sop_instance_uid: one for one in self._ledger.instances(study_id)}
        selection = self._select(study_id)
        if (
            selection.volume is None
            or selection.series is None
            or (selection.series.series_instance_uid != row["series_instance_uid"])
        ):
            # An instance came since the gate decided; the study is reopened and will be judged again.
            raise ScansideError("the study changed since it was admitted", f"study {study_id}", "it is judged again")
        volume = selection.volume

        def file_of(sop_instance_uid: str) -> Path:
            return path_of(self._settings.spool_directory, instances[sop_instance_uid].digest)

        decoded = decode_volume(volume, file_of)
        admission = admit_pixels(
            package,
            Admission(tuple(Criterion(**criterion) for criterion in row["admission"])),
            brain_volume_ml(decoded.plane, volume),
        )
        if not admission.admitted:
            self._ledger.withhold(row["id"], admission.reason, admission.to_json())
            log.info("study %d: refused by %s (%s)", study_id, package.name, admission.reason)
            return
        verdict = analyse(
            package,
            self._client,
            volume,
            decoded.plane,
            study_uid=row["study_instance_uid"],
            series_uid=selection.series.series_instance_uid,
            codecs=decoded.codecs,
            limitations=_limitations(selection),
        )
        self._issue(row, verdict, admission, file_of(volume.planes[0].sop_instance_uid))

    def _issue(self, row: Row, verdict: Verdict, admission: Admission, source: Path) -> None:
        """Write the alert's file, then verdict, findings and deliveries in one transaction."""
        before = self._ledger.last_verdict(row["id"])
        revision = before["revision"] + 1 if before else 1
        kind = alert_kind([before["positive"]] if before else [], verdict.positive)
        issued_at = now()
        key = (row["study_instance_uid"], verdict.package, verdict.package_version, str(revision))
        folder = Path(f"{row['study_id']:06d}") / f"{verdict.package}-{revision}"
        findings: list[NewFinding] = []
        hl7 = [one for one in self._settings.destination if isinstance(one, Hl7Destination)]
        if kind is not None and not hl7:
            log.error("study %d: nobody is told (%s): no HL7 destination is configured", row["study_id"], kind)
        if kind is not None and hl7:
            header = pydicom.dcmread(source, stop_before_pixels=True)
            for destination in hl7:
                message = message_control_id(*key, kind, destination.name)
                text = render_alert(
                    verdict,
                    header,
                    control_id=message,
                    kind=kind,
                    revision=revision,
                    issued_at=datetime.fromisoformat(issued_at),
                    processing_id=destination.processing_id,
                    sending_application=self._settings.box.name,
                    sending_facility=destination.sending_facility,
                    receiving_application=destination.receiving_application,
                    receiving_facility=destination.receiving_facility,
                )
                path = folder / f"{message}.hl7"
                _write_durably(self._settings.findings_directory / path, text.encode("utf-8"))
                name = f"alert.{destination.name}"  # MSH-5, MSH-6 and MSH-11 differ between destinations
                findings.append(NewFinding(name, message, str(path), (destination.name,), URGENCY["alert"]))
        for name in objects_for(verdict):
            wanted = tuple(
                one.name
                for one in self._settings.destination
                if isinstance(one, DicomDestination) and name.split(".")[0] in one.objects
            )
            uid = object_uid(self._settings.box.uid_root, *key[:3], revision, name)
            findings.append(NewFinding(name, uid, None, wanted, URGENCY.get(name, OTHER_URGENCY)))
        last = self._ledger.last_instance_at(row["study_id"])
        late = seconds_between(last, issued_at) > self._settings.budget_seconds
        self._ledger.issue_verdict(
            row["id"], revision, verdict, issued_at, findings, admission=admission.to_json(), late=late
        )
        ring(self._settings.run_directory, "delivery")
        log.info(
            "study %d: %s (%.2f), revision %d%s",
            row["study_id"],
            "positive" if verdict.positive else "negative",
            verdict.probability,
            revision,
            f", {kind}" if kind else "",
        )

    def _render_findings(self) -> None:
        """Make the file of every finding that has none yet, most urgent first."""
        for row in self._ledger.unrendered_findings(self._settings.models.attempts):
            try:
                self._render_one(row)
            except Exception as error:
                log.exception("study %d: %s could not be rendered", row["study_id"], row["object"])
                reason = f"{type(error).__name__}: {error}"
                self._ledger.render_failed(row["id"], row["study_id"], reason, self._settings.models.attempts)

    def _render_one(self, row: Row) -> None:
        verdict = Verdict.from_json(row["result"])
        instances = {one.sop_instance_uid: one for one in self._ledger.instances(row["study_id"])}
        selection = self._select(row["study_id"])
        series = next(
            one
            for one in group(instance.header for instance in instances.values())
            if one.series_instance_uid == verdict.series_instance_uid
        )
        order = (
            [plane.sop_instance_uid for plane in selection.volume.planes]
            if selection.volume and selection.series == series
            else [header.sop_instance_uid for header in series.headers]
        )

        def file_of(sop_instance_uid: str) -> Path:
            return path_of(self._settings.spool_directory, instances[sop_instance_uid].digest)

        dataset = render(
            row["object"],
            verdict,
            revision=row["revision"],
            issued_at=datetime.fromisoformat(row["issued_at"]),
            sources=file_of,
            hu_of=lambda uid, frame: decode(file_of(uid)).hu[frame],
            analysed=tuple(dict.fromkeys(order)),
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
        path = Path(f"{row['study_id']:06d}") / f"{verdict.package}-{row['revision']}" / f"{row['object']}.dcm"
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


def _limitations(selection: Selection) -> tuple[str, ...]:
    """What a reader must know about what was not analysed."""
    return tuple(
        f"Series {one.series_number if one.series_number is not None else '?'} was not analysed: {one.reason}."
        for one in selection.considered
        if not one.chosen
    )


def _write_durably(path: Path, content: bytes) -> None:
    """Write a file so that it is either whole and synced under its name, or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
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
        parked = ledger.park_deliveries()
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
            worker.join(STOP_SECONDS / max(len(workers), 1))


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
