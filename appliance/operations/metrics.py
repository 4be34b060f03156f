"""What the running intake counts, and the thread that tells it to Prometheus.

The names go with those of the ledger (`appliance.operations.health`). Counters begin at 0 with each start of intake;
those of the ledger do not. No label comes from a peer: who may send could fill the memory of this box, and of whoever
scrapes it, with AE titles.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from appliance.ledger.ingest import Stored
from appliance.settings import SettingsError
from dicom_io.handlers import Outcome
from dicom_io.scp import REJECTIONS

log = logging.getLogger(__name__)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, that nobody reads

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

REFUSALS = (
    "wrong class",
    "invalid UID",
    "no data set",
    "unreadable",
    "mismatch",
    "disk reserve",
    "disk full",
    "not stored",
    "unforeseen",
    "other",
)
"""The kinds of refusal that are told apart, see `dicom_io.handlers.Answer`."""

REQUEST_SECONDS = 3.0
"""So long one scrape may take; the next one waits for it."""

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class IntakeMetrics:
    """What the receiver counts. All may be called from several threads at once; none raises.

    Attributes:
        registry: what is told of it.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, help_: str, *labels: str) -> Counter:
            return Counter(f"scanside_{name}", help_, labels, registry=self.registry)

        def histogram(name: str, help_: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"scanside_{name}", help_, buckets=buckets, registry=self.registry)

        self._open = Gauge("scanside_associations_open", "Associations that are open now.", registry=self.registry)
        self._opened = counter("associations_opened", "Associations that were accepted.")
        closed = counter("associations_closed", "Associations that ended, by how.", "outcome")
        rejected = counter("associations_rejected", "Associations and connections not accepted, by why.", "reason")
        instances = counter("instances_received", "Instances that came, by what became of them.", "outcome")
        size = counter(
            "instances_received_bytes",
            "Their bytes: of the file as far as it was written, for a refused one of the data set.",
            "outcome",
        )
        self._refused = counter(
            "instances_refused", "Instances answered with a failure, by kind and DIMSE status.", "reason", "status"
        )
        self._response = histogram(
            "store_response_seconds", "From the last bytes of an instance to its answer.", _SECONDS
        )
        self._commit = histogram(
            "commit_seconds", "Of a group commit: from its beginning until names and rows are durable.", _SECONDS
        )
        self._batch = histogram(
            "commit_instances", "Instances that became durable in one group commit.", (1, 2, 4, 8, 16, 32, 64)
        )
        # Each is there from the beginning, as 0: a rise from nothing is none to Prometheus.
        ends: tuple[Outcome, ...] = ("released", "aborted", "broken")
        self._closed = {one: closed.labels(one) for one in ends}
        self._rejected = {one: rejected.labels(one) for one in (*REJECTIONS, "other")}
        kinds: tuple[Stored, ...] = ("stored", "duplicate", "conflict")
        outcomes = (*kinds, "refused", "incomplete")
        self._received = {one: (instances.labels(one), size.labels(one)) for one in outcomes}

    def opened(self) -> None:
        """An association was accepted."""
        self._opened.inc()
        self._open.inc()

    def closed(self, outcome: Outcome) -> None:
        """An accepted association ended."""
        self._open.dec()
        self._closed[outcome].inc()

    def rejected(self, reason: str) -> None:
        """One was not accepted; a reason that is none of `dicom_io.scp.REJECTIONS` is "other"."""
        self._rejected.get(reason, self._rejected["other"]).inc()

    def committed(self, instances: Iterable[tuple[Stored, int]], seconds: float) -> None:
        """A group commit made these durable: outcome and bytes of each."""
        number = 0
        for outcome, size in instances:
            self._add(outcome, size)
            number += 1
        self._commit.observe(seconds)
        self._batch.observe(number)

    def refused(self, status: int, reason: str, size: int) -> None:
        """An instance was answered with that failure; a reason that is none of `REFUSALS` is "other"."""
        self._add("refused", size)
        self._refused.labels(reason if reason in REFUSALS else "other", f"0x{status:04X}").inc()

    def incomplete(self, size: int) -> None:
        """The association ended before an instance was whole."""
        self._add("incomplete", size)

    def responded(self, seconds: float) -> None:
        """An instance that came whole was answered, so long after its last bytes."""
        self._response.observe(seconds)

    def _add(self, outcome: str, size: int) -> None:
        number, total = self._received[outcome]
        number.inc()
        total.inc(size)


class SpoolMetrics(Collector):
    """The disk below the spool, looked at when it is asked for.

    Args:
        shortage: why the disk should take no more; '' if it may.
    """

    def __init__(self, directory: Path, shortage: Callable[[], str]) -> None:
        self._directory = directory
        self._shortage = shortage

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Bytes and inodes of the file system.

        Raises:
            OSError: it cannot be looked at.
        """
        disk = os.statvfs(self._directory)
        figures = {
            "free_bytes": ("Bytes of the spool's file system that are free for this user.", disk.f_bavail),
            "size_bytes": ("Bytes of the spool's file system.", disk.f_blocks),
        }
        yield from (
            GaugeMetricFamily(f"scanside_spool_{name}", help_, float(blocks * disk.f_frsize))
            for name, (help_, blocks) in figures.items()
        )
        yield GaugeMetricFamily("scanside_spool_free_inodes", "Inodes of it that are free.", float(disk.f_favail))
        yield GaugeMetricFamily("scanside_spool_inodes", "Inodes of it; 0 if it counts none.", float(disk.f_files))
        yield GaugeMetricFamily(
            "scanside_spool_reserve_reached",
            "1 while every instance is refused because the disk's reserve is reached, else 0.",
            float(bool(self._shortage())),
        )


class Exporter:
    """Answers ``GET /metrics`` over HTTP from one thread, one request after another; made by `serve_metrics`."""

    def __init__(self, server: _Server) -> None:
        self._server = server
        self._thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The TCP port that is listened on."""
        return int(self._server.server_address[1])

    def stop(self) -> None:
        """Answer no more, and leave the port."""
        self._server.shutdown()
        self._server.server_close()


def serve_metrics(host: str, port: int, parts: Sequence[Collector]) -> Exporter:
    """Serve what the parts collect. One that fails is left out, with an error in the log; the others are told.

    Args:
        port: 0 is a free one.

    Raises:
        SettingsError: the address cannot be had.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return Exporter(_Server(family, address[:2], parts))
    except OSError as error:
        what = f"cannot listen on {host}:{port} ({error.strerror or error})"
        raise SettingsError(what, "intake.metrics_port", "choose another address or port, or unset it") from error


class _Server(socketserver.TCPServer):
    """One request at a time: whoever asks too often waits, and costs intake a file descriptor at most."""

    allow_reuse_address = True

    def __init__(self, family: socket.AddressFamily, address: Any, parts: Sequence[Collector]) -> None:
        self.address_family = family
        self._parts = parts
        super().__init__(address, _Handler)

    def text(self) -> bytes:
        text = []
        for part in self._parts:
            try:
                text.append(generate_latest(part))
            except Exception:
                log.exception("metrics: %s cannot be told", type(part).__name__)
        return b"".join(text)

    def get_request(self) -> Any:
        try:
            return super().get_request()
        except OSError:
            time.sleep(0.1)  # out of file descriptors: without this the loop would spin
            raise

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("metrics: a request was not served", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "scanside", ""

    def handle(self) -> None:
        # A timeout of the socket bounds one read; this bounds all of them.
        end = threading.Timer(REQUEST_SECONDS, self._end)
        end.daemon = True
        end.start()
        try:
            super().handle()
        finally:
            end.cancel()
            end.join()  # or its thread may outlive this request while the next one has one of its own

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404)
            return
        text = self.server.text()
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of what is asked every few seconds."""
