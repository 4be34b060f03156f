"""`scanside deliver`: bring what is due to where it belongs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack

from appliance.delivery.dicom import store
from appliance.delivery.hl7 import MllpClient, outcome
from appliance.delivery.outbox import POLL_SECONDS, Result, Worker
from appliance.ledger.database import Row
from appliance.ledger.doorbell import Doorbell
from appliance.ledger.store import Ledger
from appliance.services.process import STOP_SECONDS, service
from appliance.settings import DicomDestination, Hl7Destination, Settings
from dicom_io.scu import Peer

log = logging.getLogger(__name__)


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
                budget_seconds=settings.budget.seconds,
            )
            worker.start()
            workers.append(worker)
        names = ", ".join(one.name for one in settings.destination) or "nobody: no destination is configured"
        log.info("delivery: to %s (%d deliveries taken up again)", names, parked)
        while not stopping.is_set():
            _report_overdue(settings, ledger)
            if bell.wait(POLL_SECONDS):
                for worker in workers:
                    worker.wake()
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.join(STOP_SECONDS / 2 / max(len(workers), 1))


def _report_overdue(settings: Settings, ledger: Ledger) -> None:
    """Hold every stage against its deadline; here, because a stage that hangs cannot do it itself."""
    limits = settings.budget
    try:
        overdue = ledger.mark_overdue(
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
