"""`scanside deliver`: bring what is due to where it belongs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from appliance.delivery.commitment import Asker
from appliance.delivery.dicom import store
from appliance.delivery.dicomweb import authorization, store_web
from appliance.delivery.hl7 import MllpClient, outcome, parse_acknowledgement
from appliance.delivery.mail import MailServer, send_mail
from appliance.delivery.outbox import POLL_SECONDS, Result, Said, Worker
from appliance.delivery.rest import send_request
from appliance.delivery.steps import show_there
from appliance.delivery.webhook import Webhook, post, read_secret
from appliance.delivery.worklist import show
from appliance.ledger.database import Row
from appliance.ledger.doorbell import Doorbell, ring
from appliance.ledger.selftest import SELFTEST_ALERTS, SELFTEST_DESTINATIONS
from appliance.ledger.store import Ledger
from appliance.operations.health import Watchdog, notify
from appliance.services.lateness import mark_late
from appliance.services.peers import context_of, peer_of
from appliance.services.performing import perform_tasks
from appliance.services.process import STOP_SECONDS, service
from appliance.services.routing import in_place_of
from appliance.services.selftest import alerts_of, objects_of
from appliance.settings import (
    Destination,
    DicomDestination,
    DicomwebDestination,
    Hl7Destination,
    ImageDestination,
    MailDestination,
    OrderDestination,
    RestDestination,
    Settings,
    UpsDestination,
    WebhookDestination,
    WorklistDestination,
)
from dicom_io.errors import ScansideError
from dicom_io.transcode import SYNTAXES
from dicom_io.web import Archive

log = logging.getLogger(__name__)

TURN_SECONDS = 60.0
"""Longest that a look at the deadlines may take, or systemd starts delivery again."""

TRY_SECONDS = 900.0
"""Likewise one try: an acknowledgement may be waited for for 300 s, and PACS and network have time limits, too."""


def run_delivery(settings: Settings) -> None:
    """Deliver what is due until told to stop.

    Raises:
        ScansideError: the ledger cannot be used.
    """
    with service(settings, "delivery") as (ledger, stopping), ExitStack() as stack:
        bell = Doorbell(settings.run_directory, "delivery")
        stack.callback(bell.close)
        settings.findings_directory.mkdir(parents=True, exist_ok=True)
        parked = ledger.park_deliveries()
        lost = ledger.abandon_deliveries([*(one.name for one in settings.destination), *SELFTEST_DESTINATIONS])
        if lost:
            log.error("delivery: %d deliveries are dead letters: their destination is no longer configured", lost)
        watchdog = Watchdog()
        workers = []
        for destination in settings.destination:
            worker = Worker(
                ledger,
                destination.name,
                _deliverer(settings, ledger, destination, stack),
                attempts=settings.delivery.attempts,
                first_retry_seconds=settings.delivery.first_retry_seconds,
                longest_retry_seconds=settings.delivery.longest_retry_seconds,
                budget_seconds=settings.budget.seconds,
                steps=settings.escalation,
                order_seconds=settings.delivery.order_seconds,
                turn=watchdog.loop(f"delivery to {destination.name}", TRY_SECONDS),
                ask=_asker(settings, ledger, destination),
                instead=_instead(destination),
            )
            worker.start()
            workers.append(worker)
        for name in SELFTEST_DESTINATIONS:
            worker = Worker(
                ledger,
                name,
                _selftest_deliverer(settings, ledger, name),
                attempts=settings.delivery.attempts,
                first_retry_seconds=1.0,
                longest_retry_seconds=5.0,
                budget_seconds=math.inf,
                turn=watchdog.loop(f"delivery to {name}", TRY_SECONDS),
            )
            worker.start()
            workers.append(worker)
        performer = perform_tasks(settings, ledger, watchdog)
        names = ", ".join(one.name for one in settings.destination) or "nobody: no destination is configured"
        log.info("delivery: to %s (%d deliveries taken up again)", names, parked)
        turn = watchdog.loop("the doorbell", TURN_SECONDS)
        notify("READY=1", f"STATUS=delivers to {names}")
        while not stopping.is_set():
            turn()
            _report_overdue(settings, ledger)
            _mark_late(settings, ledger)
            _sweep_selftests(ledger)
            if _escalate(settings, ledger):
                for worker in workers:
                    worker.wake()
            if bell.wait(POLL_SECONDS):
                for worker in workers:
                    worker.wake()
        if performer is not None:
            performer.stop()
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.join(STOP_SECONDS / 2 / max(len(workers), 1))


def _report_overdue(settings: Settings, ledger: Ledger) -> None:
    """Hold every stage against its deadline; here, because a stage that hangs cannot do it itself."""
    limits = settings.budget
    try:
        overdue = ledger.mark_overdue(
            settings.models.packages,
            [one.name for one in settings.destination],
            completion=limits.completion_seconds,
            analysis=limits.analysis_seconds,
            alert=limits.alert_seconds,
        )
    except Exception:
        log.exception("deadlines could not be looked at")
        return
    for one in overdue:
        subject = f" ({one.subject})" if one.subject else ""
        log.error("study %d: %s%s is past its deadline; begun at %s", one.study_id, one.stage, subject, one.since)


def _mark_late(settings: Settings, ledger: Ledger) -> None:
    try:
        if mark_late(settings, ledger):
            ring(settings.run_directory, "worklist")
    except Exception:
        log.exception("studies past their budget could not be marked on the worklist")


def _escalate(settings: Settings, ledger: Ledger) -> bool:
    """Take the steps whose time has come; whether there were any. Complain of each and of alerts that nobody has."""
    told = settings.alert_destinations
    longest = max((one.after_seconds for one in told), default=0.0)
    try:
        done = ledger.escalate([one.name for one in told], longest, settings.delivery.alarm_seconds)
    except Exception:
        log.exception("escalation stumbled; it goes on")
        return False
    for study_id, name, reason in done.steps:
        log.error("study %d: its alert is not acknowledged and goes to %s, too (%s)", study_id, name, reason)
    for study_id in done.unreached:
        log.error("study %d: NOBODY WAS REACHED by its alert", study_id)
    return bool(done.steps)


def _sweep_selftests(ledger: Ledger) -> None:
    try:
        ledger.sweep_selftests()
    except Exception:
        log.exception("self-tests could not be looked at")


def _selftest_deliverer(settings: Settings, ledger: Ledger, name: str) -> Callable[[Row], Result]:
    """One try at one delivery of a self-test: to the loopback, whatever the site's destinations are."""

    def deliver(row: Row) -> Result:
        test = ledger.selftest(row["study_id"])
        if test is None or test.ended_at is not None:
            return "retry", "the self-test has ended"  # and is swept soon
        with ExitStack() as stack:
            destination = alerts_of(test) if name == SELFTEST_ALERTS else objects_of(test, [])
            return _deliverer(settings, ledger, destination, stack)(row)

    return deliver


def archive(destination: DicomwebDestination) -> Archive:
    """The archive of a DICOMweb destination; its files are read anew.

    Raises:
        ScansideError: one of them cannot be used.
    """
    context = context_of(destination.tls) if destination.url.startswith("https:") else None
    login = authorization(destination.username, destination.password_file, destination.token_file)
    return Archive(destination.url.rstrip("/"), context, login, destination.answer_seconds)


def _instead(destination: Destination) -> Callable[[str], Sequence[str]]:
    """What goes to a destination in place of an object that it declines."""
    if not isinstance(destination, ImageDestination):
        return lambda _: ()
    return lambda name: in_place_of(destination, name)


def _asker(settings: Settings, ledger: Ledger, destination: Destination) -> Callable[[], bool]:
    """What asks a destination for storage commitment; of another kind than DICOM there is nothing to ask."""
    if not isinstance(destination, DicomDestination):
        return lambda: False
    return Asker(
        ledger,
        destination.name,
        settings.findings_directory,
        lambda: peer_of(destination),
        settings.intake.ae_title,
        destination.commitment,
        destination.commitment_seconds,
        settings.delivery.attempts,
        settings.delivery.first_retry_seconds,
        settings.delivery.longest_retry_seconds,
    )


def mllp_client(destination: Hl7Destination | OrderDestination) -> MllpClient:
    """The client of an HL7 destination.

    Raises:
        ScansideError: a file for TLS cannot be used.
    """
    return MllpClient(
        destination.host,
        destination.port,
        connect_timeout=5.0,
        ack_timeout=destination.acknowledge_seconds,
        application_timeout=getattr(destination, "application_seconds", 30.0),
        context=context_of(destination.tls) if destination.tls else None,
    )


def mail_server(destination: MailDestination) -> MailServer:
    """The mail server of a destination.

    Raises:
        ScansideError: the password or a file for TLS cannot be read.
    """
    password = ""
    if destination.password_file is not None:
        try:
            password = destination.password_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            where = str(destination.password_file)
            raise ScansideError(f"the password cannot be read: {error}", where, "make it readable for us") from error
    return MailServer(
        destination.host,
        destination.port,
        destination.security,
        None if destination.security == "none" else context_of(destination.tls),
        destination.acknowledge_seconds,
        destination.username,
        password,
    )


def webhook(destination: WebhookDestination) -> Webhook:
    """The webhook of a destination.

    Raises:
        ScansideError: the secret or a file for TLS cannot be used.
    """
    context = context_of(destination.tls) if destination.url.startswith("https:") else None
    return Webhook(destination.url, read_secret(destination.secret_file), context, destination.acknowledge_seconds)


def rest(destination: RestDestination) -> Webhook:
    """How to connect to a vendor's worklist.

    Raises:
        ScansideError: a file for TLS cannot be used.
    """
    context = context_of(destination.tls) if destination.url.startswith("https:") else None
    return Webhook(destination.url, b"", context, destination.acknowledge_seconds)


def _deliverer(
    settings: Settings, ledger: Ledger, destination: Destination, stack: ExitStack
) -> Callable[[Row], Result]:
    """One try at one delivery, for that destination."""
    folder = settings.findings_directory
    match destination:
        case DicomDestination():
            promised = destination.commitment != "no"
            wanted = syntaxes_of(destination)
            return lambda row: store(
                folder / row["path"],
                peer_of(destination),
                settings.intake.ae_title,
                commitment=promised,
                syntaxes=wanted,
            )
        case DicomwebDestination():
            wanted = syntaxes_of(destination)
            return lambda row: store_web(folder / row["path"], row["uid"], archive(destination), wanted)
        case Hl7Destination():
            return _hl7_sender(folder, destination, stack, ledger)
        case MailDestination():
            # Read at each try: what is renewed or mended needs no restart.
            return lambda row: send_mail(
                mail_server(destination),
                destination.sender,
                destination.recipients,
                (folder / row["path"]).read_bytes(),
            )
        case WebhookDestination():
            return lambda row: post(webhook(destination), row["uid"], (folder / row["path"]).read_bytes())
        case WorklistDestination():
            return lambda row: _show(settings, ledger, folder / row["path"])
        case UpsDestination():
            return lambda row: _show_there(settings, ledger, destination, folder / row["path"])
        case OrderDestination():
            return _hl7_sender(folder, destination, stack, ledger)
        case RestDestination():
            return lambda row: send_request(
                folder / row["path"], row["uid"], rest(destination), destination.header, destination.secret_file
            )


def syntaxes_of(destination: ImageDestination) -> tuple[str, ...]:
    """UIDs of the transfer syntaxes that a destination wants, the best first."""
    return tuple(str(one) for keyword in destination.transfer_syntaxes for one in SYNTAXES if one.keyword == keyword)


@dataclass(frozen=True, slots=True)
class _Raised:
    """What the ledger remembers of the steps that were raised at one destination."""

    ledger: Ledger
    destination: str

    def raised(self, uid: str, package: str) -> tuple[str, str] | None:
        return self.ledger.raised_step(self.destination, uid, package)

    def raised_by_others(self, uid: str, package: str) -> str:
        return self.ledger.raised_by_others(self.destination, uid, package)

    def remember(self, uid: str, package: str, before: str, mark: str) -> None:
        self.ledger.remember_raised(self.destination, uid, package, before, mark)

    def forget(self, uid: str, package: str) -> None:
        self.ledger.forget_raised(self.destination, uid, package)


def _show_there(settings: Settings, ledger: Ledger, destination: UpsDestination, path: Path) -> Result:
    return show_there(
        path,
        peer_of(destination),
        settings.intake.ae_title,
        frozenset(destination.reading_codes),
        _Raised(ledger, destination.name),
        destination.answer_seconds,
    )


def _show(settings: Settings, ledger: Ledger, path: Path) -> Result:
    assert settings.worklist is not None  # the settings hold it
    reading = frozenset(settings.worklist.reading_codes)
    result = show(path, lambda mark: ledger.mark_study(mark, reading))
    ring(settings.run_directory, "worklist")
    return result


def _hl7_sender(
    folder: Path, destination: Hl7Destination | OrderDestination, stack: ExitStack, ledger: Ledger
) -> Callable[[Row], Result]:
    client = mllp_client(destination.model_copy(update={"tls": None}))
    stack.callback(client.close)
    if isinstance(destination, Hl7Destination) and destination.application_elsewhere:
        client.elsewhere = ledger.answer_to

    def send(row: Row) -> Result:
        if destination.tls is not None:
            # At each try, for the next connection: a file that is missing costs the other destinations nothing.
            client.context = context_of(destination.tls)
        # It may have come after an earlier try had given up: then there is nothing to send again.
        came = client.elsewhere(row["uid"]) if client.elsewhere else None
        try:
            answer = parse_acknowledgement(came) if came else None
            answer = answer or client.send((folder / row["path"]).read_bytes().decode("utf-8"))
        except ValueError as error:
            # The message itself cannot be framed: it would not get better by sending it again.
            return "reject", str(error)
        said = Said(f"{answer.code} {answer.text}".strip(), answer.code)
        match outcome(answer):
            case "acknowledged":
                return "acknowledge", said
            case "rejected":
                return "reject", said
            case "retry":
                return "retry", said

    return send
