"""`scanside intake`: receive instances, and what else a modality says over DICOM."""

from __future__ import annotations

import gc
import ipaddress
import logging
import socket
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

from appliance.events import Event
from appliance.intake.commitment import CommitmentProvider, Reporter
from appliance.intake.receiver import Receiver
from appliance.intake.retention import Retention
from appliance.intake.spool import Spool, Swept
from appliance.ledger.doorbell import Ringer
from appliance.ledger.selftest import SELFTEST_AE
from appliance.ledger.store import Ledger
from appliance.operations.audit import standing
from appliance.operations.health import LedgerMetrics, Watchdog, notify
from appliance.operations.metrics import IntakeMetrics, SpoolMetrics, serve_metrics
from appliance.services.orders import ask_for_orders, hear_orders, hl7_ports, tidy_orders
from appliance.services.process import STOP_SECONDS, inherited_sockets, service
from appliance.services.selftest import LOOPBACK, listens_on_loopback, write_port
from appliance.settings import Intake, Settings, SettingsError
from dicom_io.errors import ScansideError
from dicom_io.scp import Listener, ServerOptions, start_server
from dicom_io.scu import Peer
from dicom_io.sop_classes import storage_classes
from dicom_io.tls import ServerCertificates

log = logging.getLogger(__name__)

ACCEPT_SECONDS = 15.0
"""Longest that a thread that accepts connections may be busy with one; it is milliseconds."""


_THIS_MACHINE = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))


def run_intake(settings: Settings) -> None:
    """Receive instances until told to stop; then let associations end, for a moment.

    Raises:
        ScansideError: a port cannot be had, the ledger or the spool cannot be used.
    """
    with service(settings, "intake") as (ledger, stopping), ExitStack() as stack:
        lost = ledger.abandon_associations()
        try:
            spool = Spool(settings.spool_directory)
            swept = _sweep(settings, ledger, spool)
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
        metrics = IntakeMetrics()
        if settings.intake.metrics_port is not None:
            parts = (metrics.registry, SpoolMetrics(settings.spool_directory, shortage), LedgerMetrics(ledger))
            exporter = serve_metrics(settings.intake.metrics_host, settings.intake.metrics_port, parts)
            stack.callback(exporter.stop)
        wake_engine = Ringer(settings.run_directory, "engine")
        receiver = Receiver(ledger, spool, wake_engine, wake_engine.more, commitments, shortage, metrics)
        watchdog, inherited = Watchdog(), inherited_sockets()
        listeners = _listeners(settings, watchdog, inherited)
        orders = hear_orders(settings, ledger, watchdog, inherited, wake_engine, shortage)
        tidy_orders(settings, ledger, stopping)
        asker = ask_for_orders(settings, ledger, watchdog, wake_engine)
        server = start_server(_server_options(settings.intake), listeners, receiver)
        write_port(settings, server.ports[-1])
        reporters += [Reporter(ledger, commitments, peer) for peer in peers.values()]
        for reporter in reporters:
            reporter.start()
        threading.Thread(target=spool.settle_until, args=(stopping,), name="settle", daemon=True).start()
        retention = Retention(ledger, settings, receiver.committer.paused)
        threading.Thread(target=retention.run, args=(stopping,), name="retention", daemon=True).start()
        log.info(
            "intake: %s listens on %s:%s (%d associations lost, %d unacknowledged files removed since the last run)",
            settings.intake.ae_title,
            settings.intake.host,
            " and ".join(map(str, server.ports)),
            lost,
            swept.removed,
        )
        # What a start leaves behind stays: the collector need not look at it again while senders wait.
        gc.collect()
        gc.freeze()
        notify("READY=1", f"STATUS=listens on {' and '.join(map(str, server.ports))}")
        # Not without a limit: a signal that the kernel hands to another thread, as it may after a SIGCONT, does not
        # wake this one, which alone hears it.
        while not stopping.wait(1.0):
            pass
        if asker is not None:
            asker.stop()
        for reporter in reporters:
            reporter.stop()
        server.stop(STOP_SECONDS / 2)
        if orders is not None:
            orders.stop(STOP_SECONDS / 4)
        spool.settle()


def _sweep(settings: Settings, ledger: Ledger, spool: Spool) -> Swept:
    """Delete what was never acknowledged, and set aside what a lost or older ledger has forgotten."""
    swept = spool.sweep(ledger.digests(), ledger.removed_among, doubted=bool(standing(ledger, settings.head_path)[1]))
    if swept.aside:
        log.error(
            "intake: THE LEDGER DOES NOT KNOW %d IMAGES OF THE SPOOL: it was lost, an older copy was put back, or its "
            "chain of events is broken; they are set aside in %s: put the right ledger back and start again, or send "
            "them again",
            swept.aside,
            spool.set_aside()[0],
        )
        ledger.log(Event.SPOOL_SET_ASIDE, files=swept.aside)
    # What a run that was killed had mended, and not yet written down.
    ledger.requeue_restored(swept.named)
    return swept


def _server_options(intake: Intake) -> ServerOptions:
    return ServerOptions(
        ae_title=intake.ae_title,
        storage_classes=storage_classes(intake.storage_classes),
        # The self-test comes by a title of its own, from this machine.
        accepted_calling=(*intake.accepted_calling_ae_titles, SELFTEST_AE) if intake.accepted_calling_ae_titles else (),
        accepted_addresses=(*intake.accepted_addresses, *_THIS_MACHINE) if intake.accepted_addresses else (),
        require_called=intake.require_called_ae_title,
        maximum_associations=intake.maximum_associations,
        maximum_associations_per_address=intake.maximum_associations_per_address,
        artim_seconds=intake.request_seconds,
        idle_seconds=intake.idle_seconds,
        minimum_bytes_per_second=intake.minimum_bytes_per_second,
        maximum_instance_bytes=intake.maximum_instance_bytes,
    )


def _listeners(settings: Settings, watchdog: Watchdog, inherited: Mapping[int, socket.socket]) -> list[Listener]:
    """One for each port of the settings, on the socket of that port where one was inherited; and one for the self-test
    where none of them would let it in."""
    intake = settings.intake

    def listener(port: int, certificates: ServerCertificates | None = None) -> Listener:
        turn = watchdog.loop(f"port {port}", ACCEPT_SECONDS)
        return Listener(intake.host, port, certificates, inherited.get(port), turn)

    listeners = [listener(intake.port)] if intake.plain else []
    if intake.tls is not None:
        tls = intake.tls
        certificates = ServerCertificates(tls.certificate, tls.key, tls.client_authorities, tls.profile)
        listeners.append(listener(tls.port, certificates))
    served = {one.port for one in listeners} | set(hl7_ports(intake))
    if unheard := sorted(set(inherited) - served):
        # A scanner would be connected there and never answered.
        raise SettingsError(
            f"systemd listens on port {', '.join(map(str, unheard))}, which intake does not serve",
            "intake.port, intake.tls.port, intake.hl7.port and intake.hl7.tls.port",
            "give the socket units (ListenStream=) the ports of the settings, and disable the one that is not needed",
        )
    if not listens_on_loopback(settings):
        listeners.append(Listener(LOOPBACK, 0, turn=watchdog.loop("the self-test's port", ACCEPT_SECONDS)))
    return listeners
