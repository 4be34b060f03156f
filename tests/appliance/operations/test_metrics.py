"""What Prometheus is told, held against what real peers did to a real intake."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import signal
import socket
import ssl
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn
from urllib.error import HTTPError

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from pydicom.uid import CTImageStorage, MRImageStorage
from sqlalchemy.exc import OperationalError

from appliance import init
from appliance.demo.orthanc import free_ports
from appliance.events import Event
from appliance.intake.commitment import CommitmentProvider
from appliance.intake.receiver import Receiver
from appliance.intake.spool import Spool
from appliance.ledger.store import Ledger
from appliance.ledger.views import event_counts
from appliance.operations import metrics as module
from appliance.operations.health import LedgerMetrics, metrics_text
from appliance.operations.leash import Leashed
from appliance.operations.metrics import REFUSALS, Exporter, IntakeMetrics, SpoolMetrics, serve_metrics
from appliance.settings import SettingsError, load_settings
from dicom_io._dimse import Command, Field, encode
from dicom_io._upper_layer import abort, p_data
from dicom_io.errors import PeerError
from dicom_io.scp import REJECTIONS, Listener, ServerOptions, StorageServer, start_server
from dicom_io.scu import Peer, echo
from dicom_io.tls import ServerCertificates
from tests.dicom_io.certificates import Authority
from tests.dicom_io.support import ct, data_set, head, save
from tests.dicom_io.test_scp import _Peer, low_level_store, store
from tests.dicom_io.test_scp_hostile import PUSH_MODEL, message, n_action, raw, read_pdu, read_status, request

ROOT = Path(__file__).resolve().parent.parent.parent.parent
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")

Figures = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        return str(answer.read().decode())


def parsed(text: str) -> Figures:
    """Every sample, by its name and its sorted labels; each family and each sample only once."""
    families = list(text_string_to_metric_families(text))
    assert len({one.name for one in families}) == len(families)
    assert all(one.documentation and one.type in ("counter", "gauge", "histogram") for one in families)
    samples = [sample for one in families for sample in one.samples]
    figures = {(one.name, tuple(sorted(one.labels.items()))): one.value for one in samples}
    assert len(figures) == len(samples)
    return figures


class Intake:
    """A receiver behind a server, as `run_intake` puts them together, and what is told of it."""

    def __init__(self, folder: Path, *listeners: Listener, **options: Any) -> None:
        self.ledger = Ledger(folder / "ledger.sqlite")
        self.shortage = ""
        self.directory = folder / "spool"
        spool = Spool(self.directory)
        commitments = CommitmentProvider(
            self.ledger, self.directory, {}, attempts=1, first_retry_seconds=1.0, longest_retry_seconds=1.0
        )
        metrics = IntakeMetrics()
        receiver = Receiver(self.ledger, spool, lambda: None, lambda: None, commitments, lambda: self.shortage, metrics)
        self.server: StorageServer = start_server(
            ServerOptions(ae_title="SCANSIDE", **options), listeners or [Listener("127.0.0.1", 0)], receiver
        )
        parts = (metrics.registry, SpoolMetrics(self.directory, lambda: self.shortage), LedgerMetrics(self.ledger))
        self.exporter = serve_metrics("127.0.0.1", 0, parts)
        self.port = self.server.port

    def stop(self) -> None:
        self.server.stop(0.2)
        self.exporter.stop()
        self.ledger.close()

    def text(self) -> str:
        return scrape(self.exporter.port)

    def __call__(self, name: str, **labels: str) -> float:
        return parsed(self.text())[f"scanside_{name}", tuple(sorted(labels.items()))]

    def counted(self, name: str) -> dict[str, float]:
        """Value of the only label → the figure, without those that are 0."""
        figures = parsed(self.text())
        return {
            labels[0][1]: value for (known, labels), value in figures.items() if known == f"scanside_{name}" and value
        }

    def wait(self, name: str, value: float, **labels: str) -> None:
        """A peer may be gone before what it did is counted."""
        deadline = time.monotonic() + 10
        while (found := self(name, **labels)) != value:
            assert time.monotonic() < deadline, (name, labels, found)
            time.sleep(0.02)


@contextmanager
def running(folder: Path, *listeners: Listener, **options: Any) -> Iterator[Intake]:
    one = Intake(folder, *listeners, **options)
    try:
        yield one
    finally:
        one.stop()


@pytest.fixture
def intake(tmp_path: Path) -> Iterator[Intake]:
    with running(tmp_path / "box") as one:
        yield one


@pytest.fixture
def slices(tmp_path: Path) -> list[Path]:
    return [save(ct(head(12, False, seed=n), 12, instance_number=n), tmp_path / f"{n}.dcm") for n in range(4)]


# --- instances --------------------------------------------------------------------------------------------


def test_everything_is_there_from_the_beginning_as_0(intake: Intake) -> None:
    figures = parsed(intake.text())
    for name, label, values in (
        ("associations_closed_total", "outcome", ("released", "aborted", "broken")),
        ("associations_rejected_total", "reason", (*REJECTIONS, "other")),
        ("instances_received_total", "outcome", ("stored", "duplicate", "conflict", "refused", "incomplete")),
        ("events_total", "event", tuple(Event)),
    ):
        assert {figures[f"scanside_{name}", ((label, str(value)),)] for value in values} == {0}


def test_what_is_stored_there_already_and_in_conflict(intake: Intake, slices: list[Path]) -> None:
    content = data_set(slices[0].read_bytes())
    uid = "1.2.3"
    other = save(ct(head(12, False, seed=9), 12, SOPInstanceUID=uid), slices[0].parent / "other.dcm")
    began = time.monotonic()
    again = save(ct(head(12, False, seed=8), 12, SOPInstanceUID=uid), slices[0].parent / "again.dcm")
    with _Peer(intake.port) as peer:
        for path in (*slices, slices[0], slices[1], other, again):
            assert store(peer, path) == 0
        # Before the association ends.
        assert intake.counted("instances_received_total") == {"stored": 5, "duplicate": 2, "conflict": 1}
    sizes = [path.stat().st_size for path in intake.directory.glob("??/*.dcm")]
    assert len(sizes) == 6
    received = intake.counted("instances_received_bytes_total")
    assert received["stored"] + received["conflict"] == sum(sizes)
    assert received["duplicate"] > 2 * len(content)
    assert intake("commit_instances_sum") == intake("store_response_seconds_count") == 8
    assert intake("commit_seconds_count") == intake("commit_instances_count") == 8  # one peer: nobody to wait for
    assert intake("commit_instances_bucket", le="1.0") == 8
    # One after another, so that neither can be longer than all of it was.
    assert 0 < intake("commit_seconds_sum") < intake("store_response_seconds_sum") < time.monotonic() - began


def test_the_ledger_tells_the_same(intake: Intake, slices: list[Path]) -> None:
    with _Peer(intake.port) as peer:
        for path in (*slices, slices[0]):
            store(peer, path)
    intake.wait("events_total", 1, event="association.closed")
    assert intake.counted("events_total") == {
        "association.opened": 1,
        "association.closed": 1,
        "instance.stored": 4,
        "instance.duplicate": 1,
    }
    assert intake("study_state", state="receiving") == 1
    assert parsed(metrics_text(intake.ledger)).items() <= parsed(intake.text()).items()


def test_those_that_wait_are_one_commit() -> None:
    counted = IntakeMetrics()
    with serving(counted.registry) as exporter:
        counted.committed([("stored", 10), ("duplicate", 20), ("stored", 30)], 0.015)
        figures = parsed(scrape(exporter.port))
    assert figures["scanside_instances_received_bytes_total", (("outcome", "stored"),)] == 40
    assert figures["scanside_commit_instances_bucket", (("le", "2.0"),)] == 0
    assert figures["scanside_commit_instances_bucket", (("le", "4.0"),)] == 1
    assert figures["scanside_commit_seconds_bucket", (("le", "0.01"),)] == 0
    assert figures["scanside_commit_seconds_bucket", (("le", "0.02"),)] == 1


def test_many_peers_at_once_are_all_counted(intake: Intake, slices: list[Path]) -> None:
    def send(number: int) -> None:
        with _Peer(intake.port) as peer:
            for seed in range(5):
                low_level_store(peer, CTImageStorage, f"1.2.{number}.{seed}", data_set(content(number, seed)))

    def content(number: int, seed: int) -> bytes:
        path = slices[0].parent / f"{number}.{seed}"
        return save(ct(head(12, False), 12, SOPInstanceUID=f"1.2.{number}.{seed}"), path).read_bytes()

    threads = [threading.Thread(target=send, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert intake("instances_received_total", outcome="stored") == intake("commit_instances_sum") == 20
    assert intake("store_response_seconds_count") == 20
    assert intake("commit_seconds_count") == intake("commit_instances_count") <= 20
    intake.wait("associations_closed_total", 4, outcome="released")
    assert (intake("associations_opened_total"), intake("associations_open")) == (4, 0)


# --- refusals ---------------------------------------------------------------------------------------------

Refusing = Callable[[Any, Path, Intake, pytest.MonkeyPatch], int]


def _garbage(peer: Any, path: Path, *_: Any) -> int:
    return low_level_store(peer, CTImageStorage, "1.2.3", b"\xff" * 500)


def _mismatch(peer: Any, path: Path, *_: Any) -> int:
    return low_level_store(peer, CTImageStorage, "1.2.3", data_set(path.read_bytes()))


def _wrong_class(peer: Any, path: Path, *_: Any) -> int:
    return low_level_store(peer, MRImageStorage, "1.2.3", data_set(path.read_bytes()))


def _invalid_uid(peer: Any, path: Path, *_: Any) -> int:
    return low_level_store(peer, CTImageStorage, "1.2.../x", data_set(path.read_bytes()))


def _no_data_set(peer: Any, path: Path, intake: Intake, *_: Any) -> int:
    with raw(intake.server) as connection:
        command = Command(Field.C_STORE_RQ, 1, affected_class=CTImageStorage, affected_instance="1.2.3")
        connection.sendall(p_data(1, encode(command), command=True, maximum=0))
        return read_status(connection) or 0


def _reserve(peer: Any, path: Path, intake: Intake, patch: pytest.MonkeyPatch) -> int:
    intake.shortage = "the disk's reserve is reached (1.0 GB, 1.0 % free)"
    return store(peer, path) or 0


def _failing(owner: Any, name: str, error: Exception) -> Refusing:
    def refuse(peer: Any, path: Path, intake: Intake, patch: pytest.MonkeyPatch) -> int:
        def fail(*_: object) -> NoReturn:
            raise error

        patch.setattr(owner, name, fail)
        return store(peer, path) or 0

    return refuse


REFUSED: list[tuple[str, int, Refusing]] = [
    ("wrong class", 0x0122, _wrong_class),
    ("invalid UID", 0x0117, _invalid_uid),
    ("no data set", 0xC000, _no_data_set),
    ("unreadable", 0xC000, _garbage),
    ("mismatch", 0xA900, _mismatch),
    ("disk reserve", 0xA700, _reserve),
    ("disk full", 0xA700, _failing(os, "fdatasync", OSError(errno.ENOSPC, "No space left on device"))),
    ("not stored", 0xA700, _failing(os, "fdatasync", OSError(errno.EIO, "Input/output error"))),
    ("not stored", 0xA700, _failing(Ledger, "record_instances", OperationalError("insert", {}, Exception("locked")))),
    ("not stored", 0xA700, _failing(Spool, "open", OSError(errno.EMFILE, "Too many open files"))),
    ("unforeseen", 0xC000, _failing(Spool, "open", ZeroDivisionError())),
    ("unforeseen", 0xC000, _failing(Spool, "publish", ZeroDivisionError())),
]


@pytest.mark.parametrize(("reason", "status", "refuse"), REFUSED, ids=[str(one[0]) for one in REFUSED])
def test_a_refusal_is_counted_by_its_kind_and_status(
    intake: Intake, slices: list[Path], monkeypatch: pytest.MonkeyPatch, reason: str, status: int, refuse: Refusing
) -> None:
    with _Peer(intake.port) as peer:
        with monkeypatch.context() as patch:
            assert refuse(peer, slices[0], intake, patch) == status
        assert intake("instances_refused_total", reason=reason, status=f"0x{status:04X}") == 1
        assert intake.text().count("\nscanside_instances_refused_total{") == 1
        assert intake.counted("instances_received_total") == {"refused": 1}
        assert intake.counted("instances_received_bytes_total").get("refused", 0) == (
            0 if reason == "no data set" else 500 if reason == "unreadable" else len(data_set(slices[0].read_bytes()))
        )
        assert intake("commit_seconds_count") == 0
        assert intake("spool_reserve_reached") == (reason == "disk reserve")


def test_one_that_proves_unreadable_only_once_it_is_whole(intake: Intake, tmp_path: Path) -> None:
    dataset = ct(head(12, False), 12, StudyInstanceUID=None)
    dataset.private_block(0x0009, "TEST", create=True).add_new(1, "OB", bytes(3_000_000))
    with _Peer(intake.port) as peer:
        assert store(peer, save(dataset, tmp_path / "large.dcm")) == 0xC000
    assert intake("instances_refused_total", reason="unreadable", status="0xC000") == 1
    assert intake.counted("instances_received_total") == {"refused": 1}
    assert intake("store_response_seconds_count") == 1


def test_every_kind_of_refusal_was_met() -> None:
    assert {reason for reason, *_ in REFUSED} | {"other"} == set(REFUSALS)


def test_what_a_peer_makes_up_is_no_label() -> None:
    counted = IntakeMetrics()
    counted.refused(0xC000, 'x"} 1\nevil 1', 5)
    counted.rejected('x"} 1\nevil 1')
    with serving(counted.registry) as exporter:
        figures = parsed(scrape(exporter.port))
    assert figures["scanside_instances_refused_total", (("reason", "other"), ("status", "0xC000"))] == 1
    assert figures["scanside_associations_rejected_total", (("reason", "other"),)] == 1


# --- associations -----------------------------------------------------------------------------------------


def test_how_associations_end(intake: Intake, slices: list[Path]) -> None:
    with _Peer(intake.port):
        assert (intake("associations_open"), intake("associations_opened_total")) == (1, 1)
    intake.wait("associations_closed_total", 1, outcome="released")
    _Peer(intake.port).association.abort()
    intake.wait("associations_closed_total", 1, outcome="aborted")
    with raw(intake.server):
        assert intake("associations_open") == 1
    intake.wait("associations_closed_total", 1, outcome="broken")
    assert (intake("associations_open"), intake("associations_opened_total")) == (0, 3)


@pytest.mark.parametrize(("ending", "outcome"), [(abort(), "aborted"), (b"", "broken")])
def test_an_image_that_never_becomes_whole(intake: Intake, slices: list[Path], ending: bytes, outcome: str) -> None:
    whole = message(slices[0], 100)
    at = 0
    while at < 2000:
        at += 6 + int.from_bytes(whole[at + 2 : at + 6], "big")
    with raw(intake.server) as connection:
        connection.sendall(whole[:at] + ending)
        connection.shutdown(socket.SHUT_WR)
        intake.wait("associations_closed_total", 1, outcome=outcome)
    assert intake.counted("instances_received_total") == {"incomplete": 1}
    assert intake("store_response_seconds_count") == 0


def test_one_that_was_refused_before_its_end_is_not_counted_twice(intake: Intake, tmp_path: Path) -> None:
    """Its header is refused with the first piece; the rest of two more is dropped."""
    dataset = ct(head(12, False), 12)
    dataset.private_block(0x0029, "TEST", create=True).add_new(1, "OB", bytes(3_000_000))
    with _Peer(intake.port) as peer:
        assert _mismatch(peer, save(dataset, tmp_path / "large.dcm")) == 0xA900
    assert intake.counted("instances_received_total") == {"refused": 1}


def test_nobody_learns_who_sends(intake: Intake, slices: list[Path]) -> None:
    with _Peer(intake.port, calling='EVIL"} 1', called="WHOEVER") as peer:
        assert store(peer, slices[0]) == 0
    text = intake.text()
    for secret in ("EVIL", "WHOEVER", "127.0.0.1", "Phantom", "T1", "2.25.1"):
        assert secret not in text


def _answer(opening: bytes) -> Callable[[Intake], object]:
    def ask(intake: Intake) -> None:
        with raw(intake.server, b"") as connection:
            connection.sendall(opening)
            assert read_pdu(connection)[0] == 3

    return ask


def _closed_at_once(intake: Intake) -> None:
    with raw(intake.server, b"") as connection, suppress(ConnectionError):
        assert connection.recv(1) == b""


def _many(intake: Intake) -> None:
    with ExitStack() as stack:
        for _ in range(16):
            stack.enter_context(raw(intake.server, b""))
        intake_is_busy = stack.enter_context(raw(intake.server, b""))
        with suppress(ConnectionError):
            assert intake_is_busy.recv(1) == b""


def _one_more(intake: Intake) -> None:
    with _Peer(intake.port):
        assert _Peer(intake.port).association.is_rejected
        assert intake.counted("associations_rejected_total") == {"local limit exceeded": 1}


REJECTED: list[tuple[str, Callable[[Intake], object], dict[str, Any]]] = [
    ("application context name not supported", _answer(request((1, CTImageStorage), application="1.2.3")), {}),
    ("protocol version not supported", _answer(request((1, CTImageStorage), version=2)), {}),
    ("calling AE title not recognized", lambda one: _Peer(one.port), {"accepted_calling": ("SCANNER",)}),
    ("called AE title not recognized", lambda one: _Peer(one.port, called="ANY"), {"require_called": True}),
    ("local limit exceeded", _one_more, {"maximum_associations": 1}),
    ("its address is not accepted", _closed_at_once, {"accepted_addresses": (ipaddress.ip_network("127.0.0.2/32"),)}),
    ("too many connections without an association", _many, {}),
]


@pytest.mark.parametrize(("reason", "ask", "options"), REJECTED, ids=[one[0] for one in REJECTED])
def test_who_is_turned_away(
    tmp_path: Path, reason: str, ask: Callable[[Intake], object], options: dict[str, Any]
) -> None:
    with running(tmp_path, **options) as intake:
        ask(intake)
        assert intake.counted("associations_rejected_total") == {reason: 1}
        assert intake("events_total", event="association.rejected") == 1


def test_without_a_ledger_nobody_is_accepted(intake: Intake, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(*_: object) -> NoReturn:
        raise OperationalError("insert", {}, Exception("database is locked"))

    monkeypatch.setattr(Ledger, "open_association", locked)
    assert _Peer(intake.port).association.is_rejected
    assert intake.counted("associations_rejected_total") == {"temporary congestion": 1}
    assert (intake("associations_opened_total"), intake("associations_open")) == (0, 0)


def test_a_handshake_that_fails_is_counted_and_a_peer_that_goes_away_is_not(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("box")
    listener = Listener("127.0.0.1", 0, ServerCertificates(pair.certificate, pair.key))
    (tmp_path / "strangers").mkdir()
    stranger = ssl.create_default_context(cafile=str(Authority(tmp_path / "strangers", "others").certificate))
    with running(tmp_path / "box", listener) as intake:
        with socket.create_connection(("127.0.0.1", intake.port), timeout=10):
            pass  # a probe of the port
        with (
            socket.create_connection(("127.0.0.1", intake.port), timeout=10) as plain,
            pytest.raises(ssl.SSLCertVerificationError),
        ):
            stranger.wrap_socket(plain, server_hostname="127.0.0.1")
        intake.wait("associations_rejected_total", 1, reason="TLS handshake failed")
        with raw(intake.server, b"") as connection:  # DICOM without TLS
            connection.sendall(request((1, CTImageStorage)))
            intake.wait("associations_rejected_total", 2, reason="TLS handshake failed")
        assert intake.counted("associations_rejected_total") == {"TLS handshake failed": 2}


def test_every_reason_was_met() -> None:
    met = {reason for reason, *_ in REJECTED} | {"temporary congestion", "TLS handshake failed"}
    assert met == set(REJECTIONS)


# --- commitment, retention and the ledger -----------------------------------------------------------------


def test_requests_for_commitment_that_wait(intake: Intake) -> None:
    with raw(intake.server, request((1, PUSH_MODEL))) as connection:
        connection.sendall(n_action())
        assert read_status(connection) == 0
        assert intake("events_total", event="commitment.requested") == 1
        states = intake.counted("commitment_state")
        assert sum(states.values()) == 1 and states.keys() <= {"requested", "reporting"}
    intake.wait("events_total", 1, event="commitment.dead")  # nobody said where to send it
    assert intake.counted("commitment_state") == {"dead": 1}


def test_events_are_counted_once_however_often_they_are_asked_for(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.log(Event.SERVICE_STARTED)
    with serving(LedgerMetrics(ledger)) as exporter:
        for number in range(4):
            for _ in range(number):
                ledger.log(Event.RETENTION_REMOVED)
                ledger.log(Event.SERVICE_STARTED)
            figures = parsed(scrape(exporter.port))
            told = {str(name): int(figures["scanside_events_total", (("event", str(name)),)]) for name in Event}
            assert told == event_counts(ledger)
    assert (told["retention.removed"], told["service.started"]) == (6, 7)
    ledger.close()


def test_a_new_intake_counts_from_0_and_the_ledger_goes_on(tmp_path: Path, slices: list[Path]) -> None:
    for number in (1, 2):
        with running(tmp_path / "box") as intake, _Peer(intake.port) as peer:
            assert store(peer, slices[number]) == 0
            assert intake("instances_received_total", outcome="stored") == 1
            assert intake("associations_opened_total") == 1
            assert intake("events_total", event="instance.stored") == number


def test_the_disk_of_the_spool(intake: Intake, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = os.statvfs(intake.directory)
    assert intake("spool_size_bytes") == disk.f_blocks * disk.f_frsize
    values = (4096, 4096, 1000, 700, 600, 50, 40, 30, 0, 255)  # root may have more than this user
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(values))
    assert (intake("spool_size_bytes"), intake("spool_free_bytes")) == (4_096_000, 600 * 4096)
    assert (intake("spool_inodes"), intake("spool_free_inodes")) == (50, 30)
    assert intake("spool_reserve_reached") == 0
    intake.shortage = "the disk's reserve is reached"
    assert intake("spool_reserve_reached") == 1


# --- the exporter -----------------------------------------------------------------------------------------


class Broken(Collector):
    def collect(self) -> Iterable[Metric]:
        raise OperationalError("select", {}, Exception("disk I/O error"))


@contextmanager
def serving(*parts: Collector) -> Iterator[Exporter]:
    exporter = serve_metrics("127.0.0.1", 0, parts)
    try:
        yield exporter
    finally:
        exporter.stop()


def test_a_part_that_fails_is_left_out_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with serving(Broken(), IntakeMetrics().registry) as exporter:
        assert "scanside_associations_open 0.0" in scrape(exporter.port)
    assert "Broken cannot be told" in caplog.text


@pytest.mark.parametrize("path", ["/", "/metrics/x", "/../etc/passwd"])
def test_there_is_nothing_else(path: str) -> None:
    with serving() as exporter, pytest.raises(HTTPError, match="404") as caught:
        urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}{path}", timeout=10)
    assert "Python" not in str(caught.value.headers)


def test_a_port_in_use_says_so_with_its_key() -> None:
    with serving() as exporter, pytest.raises(SettingsError, match=rf"intake\.metrics_port.*:{exporter.port} "):
        serve_metrics("127.0.0.1", exporter.port, ())


def test_after_its_stop_the_port_is_free() -> None:
    with serving() as exporter:
        port = exporter.port
    again = serve_metrics("127.0.0.1", port, ())
    assert again.port == port
    again.stop()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=5)


@pytest.mark.parametrize("bait", [b"", b"GET /metrics HTTP/1.1\r\n", b"\xff\r\n\r\n", b"GET " + b"x" * 100_000])
def test_whoever_asks_slowly_or_nonsense_is_hung_up_on_and_the_next_one_served(
    monkeypatch: pytest.MonkeyPatch, bait: bytes
) -> None:
    monkeypatch.setattr(module, "REQUEST_SECONDS", 0.5)
    with serving(IntakeMetrics().registry) as exporter:
        before = threading.active_count()
        with ExitStack() as stack:
            slow = [
                stack.enter_context(socket.create_connection(("127.0.0.1", exporter.port), timeout=10))
                for _ in range(3)
            ]
            for one in slow:
                one.sendall(bait)
            assert threading.active_count() <= before + 1  # the clock of the one that is served
            assert "scanside_associations_open" in scrape(exporter.port)
            for one in slow:
                with suppress(ConnectionError):
                    while one.recv(65536):
                        pass


def test_a_request_that_trickles_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REQUEST_SECONDS", 0.3)
    with (
        serving(IntakeMetrics().registry) as exporter,
        socket.create_connection(("127.0.0.1", exporter.port), timeout=10) as slow,
        pytest.raises(ConnectionError),
    ):
        for _ in range(1000):
            slow.sendall(b"x")
            time.sleep(0.02)


# --- the process ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_intake_shows_its_figures_and_counts_from_0_after_kill_9(tmp_path: Path, slices: list[Path]) -> None:
    port, metrics_port = free_ports(2)
    sections = {
        "intake": {"host": "127.0.0.1", "port": port, "metrics_port": metrics_port, "reserve_percent": 0.0,
                   "reserve_bytes": 0},
    }  # fmt: skip
    config = init.write(tmp_path / "box", sections)
    peer = Peer(load_settings(config).intake.ae_title, "127.0.0.1", port)
    command = [sys.executable, "-m", "appliance.cli", "--config", str(config), "intake"]
    for number in (1, 2):
        process = Leashed(command, log=tmp_path / "intake.log", grace=10.0)
        try:
            _answers(peer, process)
            with _Peer(port) as association:
                assert store(association, slices[number]) == 0
                figures = parsed(scrape(metrics_port))
                assert figures["scanside_instances_received_total", (("outcome", "stored"),)] == 1
                assert figures["scanside_associations_open", ()] >= 1
                assert figures["scanside_events_total", (("event", "instance.stored"),)] == number
                assert figures["scanside_events_total", (("event", "service.started"),)] == number
                assert figures["scanside_spool_free_bytes", ()] > 0
                children = Path(f"/proc/{process.keeper_pid}/task/{process.keeper_pid}/children").read_text()
                for child in children.split():
                    os.kill(int(child), signal.SIGKILL)
        finally:
            process.stop()


@pytest.mark.slow
def test_intake_does_not_start_without_the_port_that_it_should_show_them_on(tmp_path: Path) -> None:
    with serving() as exporter:
        intake = {"host": "127.0.0.1", "port": free_ports(1)[0], "metrics_port": exporter.port}
        config = init.write(tmp_path / "box", {"intake": intake})
        command = [sys.executable, "-m", "appliance.cli", "--config", str(config), "intake"]
        process = Leashed(command, log=tmp_path / "intake.log", grace=10.0)
        deadline = time.monotonic() + 30
        while process.running:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert "intake.metrics_port: cannot listen on 127.0.0.1" in process.tail(5)


def _answers(peer: Peer, process: Leashed) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            echo(peer, "TEST", timeout=2)
            return
        except PeerError:
            assert time.monotonic() < deadline, process.tail(20)
            time.sleep(0.05)


# --- the page ---------------------------------------------------------------------------------------------


def families(intake: Intake) -> list[Metric]:
    return list(text_string_to_metric_families(intake.text()))


def test_the_page_tells_of_every_figure(intake: Intake, slices: list[Path]) -> None:
    ledger_states = {"study", "analysis", "delivery", "commitment", "performed", "workitem"}
    rows = []
    for one in families(intake):
        table = one.name.removeprefix("scanside_").removesuffix("_state")
        name = one.name + ("_total" if one.type == "counter" else "")
        labels = ", ".join(sorted({label for sample in one.samples for label in sample.labels} - {"le"}))
        if table in ledger_states:
            continue
        if name == "scanside_instances_refused_total":
            labels = "reason, status"  # none yet
        if name.startswith("scanside_selftest_"):
            labels = "expected"  # none yet
        rows.append(f"| `{name}` | {one.type} | {labels} | {one.documentation} |")
    for table in sorted(ledger_states):
        rows.append(f"| `scanside_{table}_state` | gauge | state | How many are in each state. |")
    missing = [row for row in rows if row not in OPERATIONS]
    assert not missing, "\n".join(missing)
    told = set(re.findall(r"^\| `(scanside_\w+)` \|", OPERATIONS, re.MULTILINE))
    assert told == {row.split("`")[1] for row in rows}


def test_the_page_names_every_reason() -> None:
    for reason in (*REJECTIONS, *REFUSALS):
        assert re.search(rf"\| {re.escape(reason)} \|", OPERATIONS), reason


def test_the_rules_of_the_page_ask_for_figures_that_exist(intake: Intake, slices: list[Path]) -> None:
    with _Peer(intake.port) as peer:
        _wrong_class(peer, slices[0])
        store(peer, slices[0])
    found = list(families(intake))
    names = {sample.name for one in found for sample in one.samples}
    names |= {one.name for one in found if not one.samples}  # of what has not happened yet
    asked = set(re.findall(r"scanside_\w+", "".join(re.findall(r"expr: (.*)", OPERATIONS))))
    assert len(asked) > 5
    assert asked <= names
