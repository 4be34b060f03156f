"""The part of `scanside intake` that hears of orders: over HL7, and from the modality worklist."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from appliance.governance.ordered import accessions, match_orders, patient_of
from appliance.intake.hl7_listener import POLL_SECONDS, Limits, Listener, Port
from appliance.intake.hl7_message import Rules
from appliance.intake.hl7_receiver import OrderReceiver
from appliance.intake.scheduled import Asker
from appliance.ledger.database import later
from appliance.ledger.orders import Identifier
from appliance.ledger.queries import LONGEST_PAUSE
from appliance.ledger.store import Ledger
from appliance.operations.health import Watchdog
from appliance.services.peers import peer_of
from appliance.settings import Hl7Destination, Hl7Intake, Intake, Settings
from dicom_io.tls import ServerCertificates

log = logging.getLogger(__name__)

TIDY_SECONDS = 3600.0
"""So often the text of old messages is removed."""


def hl7_ports(intake: Intake) -> tuple[int, ...]:
    """The ports of the settings that HL7 is listened for on."""
    hl7 = intake.hl7
    if hl7 is None:
        return ()
    return (*((hl7.port,) if hl7.plain else ()), *((hl7.tls.port,) if hl7.tls else ()))


def rules_of(hl7: Hl7Intake) -> Rules:
    """What the settings say of reading messages."""
    return Rules(tuple(hl7.processing_ids), tuple(hl7.urgent_priorities), tuple(hl7.onset_codes), hl7.authority)


def hear_orders(
    settings: Settings,
    ledger: Ledger,
    watchdog: Watchdog,
    inherited: Mapping[int, socket.socket],
    ring: Callable[[], None],
    shortage: Callable[[], str],
) -> Listener | None:
    """Listen for HL7, where the settings say so.

    Raises:
        ScansideError: a port cannot be had, or a certificate not be used.
    """
    hl7 = settings.intake.hl7
    if hl7 is None:
        return None

    def port(number: int, certificates: ServerCertificates | None = None) -> Port:
        turn = watchdog.loop(f"HL7 port {number}", 15 * POLL_SECONDS)
        return Port(settings.intake.host, number, certificates, inherited.get(number), turn)

    ports = [port(hl7.port)] if hl7.plain else []
    if hl7.tls is not None:
        tls = hl7.tls
        ports.append(port(tls.port, ServerCertificates(tls.certificate, tls.key, tls.client_authorities, tls.profile)))
    limits = Limits(
        addresses=tuple(hl7.accepted_addresses),
        connections=hl7.maximum_connections,
        connections_per_address=hl7.maximum_connections_per_address,
        message_bytes=hl7.maximum_message_bytes,
        message_seconds=hl7.message_seconds,
        idle_seconds=hl7.idle_seconds,
    )
    told = settings.alert_destinations
    answering = [one.name for one in told if isinstance(one, Hl7Destination) and one.application_elsewhere]
    receiver = OrderReceiver(
        ledger, rules_of(hl7), settings.box.name, hl7.maximum_message_bytes, ring, shortage, answering
    )
    listener = Listener(ports, limits, receiver.take, receiver.unreadable)
    numbers = listener.start()
    log.info("intake: hears HL7 on %s:%s", settings.intake.host, " and ".join(map(str, numbers)))
    return listener


def tidy_orders(settings: Settings, ledger: Ledger, stopping: threading.Event) -> None:
    """Remove the text of old messages, and of what the modality worklist answered, from time to time."""
    if settings.intake.hears_orders:
        days = (settings.intake.hl7 or Hl7Intake()).keep_days
        threading.Thread(target=_tidy, args=(ledger, days, stopping), name="hl7 tidy", daemon=True).start()


def ask_for_orders(settings: Settings, ledger: Ledger, watchdog: Watchdog, ring: Callable[[], None]) -> Asker | None:
    """Ask the modality worklist about every study that arrives, where the settings name one."""
    section = settings.intake.modality_worklist
    if section is None:
        return None
    asker = Asker(
        ledger,
        lambda: peer_of(section),
        section.calling_ae_title or settings.intake.ae_title,
        section.urgent_priorities,
        settings.intake.authority,
        ring,
        answer_seconds=section.answer_seconds,
        give_up_seconds=section.give_up_seconds,
        turn=watchdog.loop("the modality worklist", LONGEST_PAUSE + 10 * section.answer_seconds + 60.0),
    )
    asker.start()
    log.info("intake: asks %s@%s:%d about orders", section.ae_title, section.host, section.port)
    return asker


def said_of(settings: Settings, ledger: Ledger, study_id: int) -> dict[str, list[dict[str, Any]]]:
    """What the hospital says of a study, JSON-ready: ``orders``, ``others``, ``reports``, ``asked``, ``tasks``.

    ``others`` has the orders with the study's number that are of another patient, ``asked`` what came of asking the
    modality worklist, ``tasks`` what the box has claimed of somebody else's worklist.
    """
    authority = settings.intake.authority
    headers = [one.header for one in ledger.instances(study_id)]
    uid, first = ledger.begun(study_id)
    numbers = accessions(headers)
    found = match_orders(headers, ledger.orders_for(numbers, uid)[0], ledger.names, authority, first)
    patient = ledger.names(patient_of(headers, authority))
    reports = [
        {name: row[name] for name in ("id", "status", "reported_at", "received_at", "text")}
        for row in ledger.report_rows(numbers, uid)
        if any(one.names(Identifier(**other)) for one in patient for other in row["patient"])
    ]
    return {
        "orders": [asdict(one) for one in found.orders],
        "others": [asdict(one) for one in found.others],
        "reports": reports,
        "asked": [{"state": asked[0], "reason": asked[1]}] if (asked := ledger.query_state(study_id)) else [],
        "tasks": [{"uid": one.uid, "state": one.state, "reason": one.reason} for one in ledger.tasks_of(study_id)],
    }


def _tidy(ledger: Ledger, keep_days: float, stopping: threading.Event) -> None:
    while not stopping.is_set():
        try:
            if emptied := ledger.empty_messages(later(-86400 * keep_days)):
                log.info("intake: the text of %d HL7 messages was removed: older than %g days", emptied, keep_days)
        except (OSError, SQLAlchemyError):
            log.exception("old HL7 messages could not be tidied up; it is tried again")
        stopping.wait(TIDY_SECONDS)
