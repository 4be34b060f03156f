"""`scanside worklist`: serve the worklist over UPS-RS and DIMSE."""

from __future__ import annotations

import logging
import socket
import time
from contextlib import ExitStack

from appliance.ledger.database import later
from appliance.ledger.doorbell import Doorbell, ring
from appliance.ledger.store import Ledger
from appliance.operations.health import Watchdog, notify
from appliance.services.process import STOP_SECONDS, service
from appliance.settings import Settings, SettingsError, Worklist
from appliance.worklist.channel import Channels
from appliance.worklist.dimse import EventSender, Provider
from appliance.worklist.refusals import Refusals
from appliance.worklist.server import WebServer
from appliance.worklist.web import Service, read_token
from dicom_io.errors import ScansideError
from dicom_io.scu import Peer
from dicom_io.tls import ServerCertificates
from dicom_io.ups import UpsServer

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
TURN_SECONDS = 30.0
"""Longest that a turn of a loop may take, or systemd starts the worklist again."""
SENDER_SECONDS = 600.0
"""Likewise for reports to a subscriber: a pause, and answers that do not come."""
CLEANUP_SECONDS = 3600.0


def run_worklist(settings: Settings) -> None:
    """Serve until told to stop.

    Raises:
        ScansideError: there is no [worklist], a port cannot be had, or a file cannot be used.
    """
    section = settings.worklist
    if section is None:
        raise SettingsError("there is no [worklist]", "the settings", "write one, or do not run this service")
    with service(settings, "worklist") as (ledger, stopping), ExitStack() as stack:
        bell = Doorbell(settings.run_directory, "worklist")
        stack.callback(bell.close)
        watchdog = Watchdog()
        refusals, reading = Refusals(ledger), frozenset(section.reading_codes)
        peers = {one.ae_title: Peer(one.ae_title, one.host, one.port) for one in section.subscriber}

        def changed() -> None:
            ring(settings.run_directory, "worklist")

        certificates = None
        if section.tls is not None:
            tls = section.tls
            certificates = ServerCertificates(tls.certificate, tls.key, tls.client_authorities, tls.profile)
        ledger.announce_start()
        senders = [
            EventSender(ledger, peer, section.ae_title, watchdog.loop(f"reports to {peer.ae_title}", SENDER_SECONDS))
            for peer in peers.values()
        ]
        for sender in senders:
            sender.start()
            stack.callback(sender.stop)
        web, said = None, []
        if section.web_port is not None:
            told = Service(ledger, refusals, Channels(ledger), reading, section.token_file, changed)
            web = _web(section, told, certificates, watchdog)
            stack.callback(web.stop, STOP_SECONDS / 2)
            said.append(f"UPS-RS on {section.host}:{web.port}")
        if section.port is not None:
            dimse = UpsServer(
                section.ae_title,
                section.host,
                section.port,
                Provider(ledger, refusals, reading, peers, changed),
                context=certificates.renewing_context() if certificates else None,
                accepted_calling=section.accepted_calling_ae_titles,
            )
            stack.callback(dimse.stop)
            said.append(f"{section.ae_title} on {section.host}:{dimse.port}")
        log.info("worklist: %s", " and ".join(said))
        notify("READY=1", f"STATUS=serves {' and '.join(said)}")
        turn = watchdog.loop("the doorbell", TURN_SECONDS)
        cleaned = float("-inf")
        while not stopping.is_set():
            turn()
            if web is not None and not web.running:
                raise ScansideError("the web server ended by itself", f"port {web.port}", "its log says why")
            if time.monotonic() - cleaned > CLEANUP_SECONDS:
                cleaned = time.monotonic()
                _clean(ledger, section.keep_days)
            if bell.wait(POLL_SECONDS):
                for sender in senders:
                    sender.wake()
                if web is not None:
                    web.wake()


def _web(section: Worklist, told: Service, certificates: ServerCertificates | None, watchdog: Watchdog) -> WebServer:
    assert section.web_port is not None
    where = f"{section.host}:{section.web_port}"
    if section.token_file is not None:
        try:
            read_token(section.token_file)
        except OSError as error:
            remedy = f"make one: openssl rand -hex 24 > {section.token_file.name}"
            raise ScansideError(
                f"the token cannot be read: {error.strerror}", str(section.token_file), remedy
            ) from error
    try:
        family = socket.AF_INET6 if ":" in section.host else socket.AF_INET
        bound = socket.create_server((section.host, section.web_port), family=family, backlog=128)
    except OSError as error:
        what = f"cannot listen ({error.strerror or error})"
        raise ScansideError(what, where, "choose another address or port") from error
    return WebServer(told, bound, certificates, watchdog.loop("the web server", TURN_SECONDS))


def _clean(ledger: Ledger, days: float) -> None:
    try:
        while gone := ledger.remove_ended(later(-days * 86_400)):
            log.info("worklist: %d items that ended long ago are removed", gone)
    except Exception:
        log.exception("worklist: what ended long ago could not be removed; it is tried again")
