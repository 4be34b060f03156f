"""The HL7 listener over real sockets: what it answers, what it has written down by then, and what it bears."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import shutil
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from ipaddress import ip_network
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import OperationalError

from appliance.intake.hl7_listener import Limits, Listener, Port
from appliance.intake.hl7_message import Rules
from appliance.intake.hl7_receiver import OrderReceiver
from appliance.ledger.store import Ledger
from appliance.ledger.views import event_counts
from appliance.mllp import Deframer, frame
from dicom_io.errors import ScansideError
from dicom_io.tls import ServerCertificates
from tests.dicom_io.certificates import Authority
from tests.hl7_support import msh, orm

LIMITS = Limits(message_bytes=20_000, message_seconds=5.0)


@cache
def empty_ledger() -> Path:
    """A ledger that was made once, because that takes longer than any of these tests."""
    path = Path(tempfile.mkdtemp(prefix="scanside-")) / "ledger.sqlite"
    atexit.register(shutil.rmtree, path.parent, ignore_errors=True)
    Ledger(path).close()
    return path


class Box:
    """A listener with its ledger."""

    def __init__(self, folder: Path, limits: Limits = LIMITS, certificates: ServerCertificates | None = None) -> None:
        shutil.copy(empty_ledger(), folder / "ledger.sqlite")
        self.ledger = Ledger(folder / "ledger.sqlite")
        self.rung: list[int] = []
        self.shortage = ""
        receiver = OrderReceiver(
            self.ledger, Rules(), "BOX", limits.message_bytes, lambda: self.rung.append(1), lambda: self.shortage
        )
        self.listener = Listener([Port("127.0.0.1", 0, certificates)], limits, receiver.take, receiver.unreadable)
        (self.port,) = self.listener.start()

    def stop(self) -> None:
        self.listener.stop(2.0)
        self.ledger.close()

    def orders(self, accession: str = "A1") -> list[bool]:
        """Whether each order with that number is urgent."""
        return [one.urgent for one in self.ledger.orders_for([accession], "")[0]]

    def kept(self) -> list[tuple[str, str]]:
        """MSH-10 and answer of each message, oldest first."""
        return [(one["control_id"], one["code"]) for one in reversed(self.ledger.messages(1000))]

    def counted(self, name: str) -> int:
        return event_counts(self.ledger)[name]


@contextmanager
def running(folder: Path, limits: Limits = LIMITS, certificates: ServerCertificates | None = None) -> Iterator[Box]:
    box = Box(folder, limits, certificates)
    try:
        yield box
    finally:
        box.stop()


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    with running(tmp_path) as one:
        yield one


class Engine:
    """One connection of an interface engine."""

    def __init__(self, port: int, context: ssl.SSLContext | None = None) -> None:
        self.socket: socket.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_hostname="localhost")
        self._deframer = Deframer(1 << 20)
        self._waiting: list[str] = []

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.socket.sendall(piece)

    def hear(self) -> str:
        """The next answer: code and control id; "" at the end of the connection."""
        while not self._waiting:
            data = self.socket.recv(65536)
            if not data:
                return ""
            self._waiting += [block.decode() for block in self._deframer.feed(data)]
        fields = self._waiting.pop(0).split("\r")[1].split("|")
        return " ".join(fields[1:3]).strip()

    def ask(self, message: str) -> str:
        self.send(frame(message))
        return self.hear()

    def ended(self) -> bool:
        try:
            while self.socket.recv(65536):
                pass
            return True
        except ConnectionError:
            return True

    def close(self) -> None:
        self.socket.close()


@contextmanager
def engine(box: Box, context: ssl.SSLContext | None = None) -> Iterator[Engine]:
    one = Engine(box.port, context)
    try:
        yield one
    finally:
        one.close()


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# What is answered is in the ledger


def test_an_order_is_written_down_before_it_is_acknowledged(box: Box) -> None:
    with engine(box) as peer:
        assert peer.ask(orm("M1", priority="S")) == "AA M1"
        assert (box.orders(), box.kept(), box.rung) == ([True], [("M1", "AA")], [1])
        assert box.ledger.message_content(1) == orm("M1", priority="S").encode()
        assert peer.ask(orm("M2", accession="A2")) == "AA M2"
        assert box.orders("A2") == [False]


def test_the_same_message_twice_has_one_effect(box: Box) -> None:
    with engine(box) as peer:
        assert peer.ask(orm("M1", priority="S")) == "AA M1"
        assert peer.ask(orm("M2", priority="R")) == "AA M2"
        # It comes again, late, and must not make the order what it was before.
        assert peer.ask(orm("M1", priority="S")) == "AA M1"
        assert (box.orders(), box.kept()) == ([False], [("M1", "AA"), ("M2", "AA")])
        assert box.counted("message.duplicate") == 1
        again = orm("M1", priority="S").replace("20260601103000", "20260601113000")
        assert peer.ask(again) == "AA M1", "MSH-7 may be the time of sending"
        assert box.orders() == [False]


def test_what_was_accepted_stays_so_although_the_site_takes_it_no_longer(box: Box) -> None:
    with engine(box) as peer:
        assert peer.ask(orm("M1")) == "AA M1"
        strict = OrderReceiver(box.ledger, Rules(processing_ids=("D",)), "BOX", 1000, lambda: None, lambda: "")
        (again,) = strict.take(orm("M1").encode(), "127.0.0.1")
        assert "MSA|AA|M1" in again and "\rERR|" not in again
        (other,) = strict.take(orm("M2").encode(), "127.0.0.1")
        assert "MSA|AR|M2" in other


def test_another_message_under_a_used_control_id_is_refused_and_kept(box: Box) -> None:
    with engine(box) as peer:
        assert peer.ask(orm("M1")) == "AA M1"
        assert peer.ask(orm("M1", accession="A2")) == "AE M1"
        assert (box.orders("A2"), box.kept()) == ([], [("M1", "AA"), ("M1", "AE")])
        other = orm("M1", accession="A2").replace("|RIS|", "|EPR|", 1)
        assert peer.ask(other) == "AA M1", "another sender counts for itself"


def test_what_was_refused_may_come_again_mended_under_its_control_id(box: Box) -> None:
    with engine(box) as peer:
        assert peer.ask(orm("M1", control="ZZ")) == "AE M1"
        assert peer.ask(orm("M1")) == "AA M1"
        assert (box.orders(), box.kept()) == ([False], [("M1", "AE"), ("M1", "AA")])


@pytest.mark.parametrize(
    ("content", "code"),
    [("", "AE"), ("garbage", "AE"), (msh("ADT^A01", "M1"), "AR M1"), (orm("M1", patient=""), "AE M1")],
)
def test_what_cannot_be_used_is_answered_and_kept_and_the_next_is_taken(box: Box, content: str, code: str) -> None:
    with engine(box) as peer:
        assert peer.ask(content) == code
        assert [one[1] for one in box.kept()] == [code[:2]]
        assert box.ledger.message_content(1) == content.encode()
        assert box.ledger.messages(1, refused=True)[0]["reason"]
        assert (box.counted("message.refused"), box.rung) == (1, [])
        assert peer.ask(orm("M2")) == "AA M2"


def test_what_cannot_be_written_down_is_not_acknowledged(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OperationalError("insert", None, Exception("database or disk is full"))

    with engine(box) as peer:
        with monkeypatch.context() as patch:
            patch.setattr(box.ledger, "take_message", full)
            assert peer.ask(orm("M1")) == "AE M1"
            assert peer.ask(orm("M1", modes="||AL|NE")) == "CE M1"
        box.shortage = "1 % of the disk is free"
        assert peer.ask(orm("M1")) == "AE M1"
        box.shortage = ""
        assert (box.kept(), box.rung) == ([], [])
        assert peer.ask(orm("M1")) == "AA M1"


def test_enhanced_mode_gets_both_answers_on_its_connection(box: Box) -> None:
    with engine(box) as peer:
        peer.send(frame(orm("M1", modes="||AL|AL")))
        assert [peer.hear(), peer.hear()] == ["CA M1", "AA M1"]
        peer.send(frame(orm("M2", modes="||AL|AL", control="ZZ")))
        assert [peer.hear(), peer.hear()] == ["CA M2", "AE M2"]


def test_an_acknowledgement_is_not_answered(box: Box) -> None:
    with engine(box) as peer:
        peer.send(frame(f"{msh('ACK^R01^ACK', 'M1')}MSA|AA|X\r"))
        assert peer.ask(orm("M2")) == "AA M2"


def test_what_this_box_sent_itself_changes_nothing(box: Box, caplog: pytest.LogCaptureFixture) -> None:
    with engine(box) as peer:
        assert peer.ask(orm("M1", priority="S").replace("|RIS|", "|BOX|", 1)) == "AA M1"
    assert (box.orders(), box.rung, box.kept()) == ([], [], [("M1", "AA")])
    assert "a message of this box came back" in caplog.text


# How it comes


@pytest.fixture(scope="module")
def lasting_box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    with running(tmp_path_factory.mktemp("lasting")) as one:
        yield one


@settings(deadline=None, max_examples=25)
@given(cuts=st.lists(st.integers(0, 1500), max_size=12), count=st.integers(1, 4))
def test_fragments_and_several_in_one_packet(lasting_box: Box, cuts: list[int], count: int) -> None:
    first = len(lasting_box.kept())
    names = [f"M{first + number}" for number in range(count)]
    stream = b"".join(frame(orm(name)) for name in names)
    with engine(lasting_box) as peer:
        edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
        for start, end in itertools.pairwise(edges):
            peer.send(stream[start:end])
        assert [peer.hear() for _ in names] == [f"AA {name}" for name in names]
        assert [one for one, _ in lasting_box.kept()[first:]] == names


@pytest.mark.parametrize(
    "framed",
    [
        pytest.param(b"\x0b%s\x1c", id="no carriage return"),
        pytest.param(b"\r\n\x0b%s\x1c\r\n", id="line ends between"),
        pytest.param(b"junk\x0b%s\x1c\r", id="bytes before it"),
        pytest.param(b"\x0bMSH|half of an order\x0b%s\x1c\r", id="begun anew"),
        pytest.param(b"\x1c\r\x1c\r\x0b%s\x1c\r", id="stray ends"),
    ],
)
def test_careless_framing_is_borne(box: Box, framed: bytes) -> None:
    with engine(box) as peer:
        for number in range(2):
            peer.send(framed % orm(f"M{number}").encode())
            assert peer.hear() == f"AA M{number}"
    assert len(box.kept()) == 2


def test_a_message_that_is_cut_off_is_nothing_and_noted(box: Box) -> None:
    with engine(box) as peer:
        peer.send(frame(orm("M1"))[:-30])
    until(lambda: box.counted("message.unreadable") == 1)
    assert (box.kept(), box.orders()) == ([], [])


def test_a_message_that_is_too_long_is_refused_and_its_connection_closed(box: Box) -> None:
    with engine(box) as peer:
        peer.send(frame(orm("M1", extra=f"NTE|1||{'x' * 30_000}\r")))
        assert peer.hear() == "AR"
        assert peer.ended()
    assert (box.counted("message.unreadable"), box.kept()) == (1, [])
    with engine(box) as peer:
        assert peer.ask(orm("M2")) == "AA M2"


def test_what_is_no_mllp_at_all_is_hung_up_on_and_noted(box: Box) -> None:
    with engine(box) as peer:
        with contextlib.suppress(ConnectionError):
            for _ in range(20):
                peer.send(b"GET / HTTP/1.1\r\n" * 1000)
        assert peer.ended()
    until(lambda: box.counted("message.unreadable") == 1)
    assert box.kept() == []


def test_who_trickles_or_hangs_is_closed_and_holds_up_nobody(tmp_path: Path) -> None:
    with running(tmp_path, Limits(message_seconds=1.0)) as box, engine(box) as slow, engine(box) as peer:
        slow.send(frame(orm("M1"))[:50])
        assert peer.ask(orm("M2")) == "AA M2"
        assert slow.ended()
        until(lambda: box.counted("message.unreadable") == 1)
        assert peer.ask(orm("M3")) == "AA M3", "who is only silent stays"


def test_an_idle_connection_is_closed_if_the_site_wants_that(tmp_path: Path) -> None:
    with running(tmp_path, Limits(idle_seconds=0.5)) as box, engine(box) as peer:
        assert peer.ask(orm("M1")) == "AA M1"
        assert peer.ended()


def test_no_peer_can_shut_out_the_others(tmp_path: Path) -> None:
    limits = Limits(connections=4, connections_per_address=2)
    with running(tmp_path, limits) as box, engine(box) as one, engine(box) as two:
        assert [one.ask(orm("M1")), two.ask(orm("M2"))] == ["AA M1", "AA M2"]
        with engine(box) as three:
            assert three.ended()
        one.close()
        until(lambda: len(box.listener._open) == 1)
        with engine(box) as three:
            assert three.ask(orm("M3")) == "AA M3"


def test_a_box_without_threads_turns_a_peer_away_and_takes_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tmp_path) as box:
        start = threading.Thread.start

        def no_more(thread: threading.Thread) -> None:
            if thread.name.startswith("hl7 from"):
                monkeypatch.setattr(threading.Thread, "start", start)
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", no_more)
        with engine(box) as peer:
            assert peer.ended()
        with engine(box) as peer:
            assert peer.ask(orm("M1")) == "AA M1"
        until(lambda: not box.listener._open)


def test_only_accepted_addresses_are_let_in(tmp_path: Path) -> None:
    with running(tmp_path, Limits(addresses=(ip_network("10.0.0.0/8"),))) as box, engine(box) as peer:
        assert peer.ended()
    (tmp_path / "other").mkdir()
    with running(tmp_path / "other", Limits(addresses=(ip_network("127.0.0.0/8"),))) as box, engine(box) as peer:
        assert peer.ask(orm("M1")) == "AA M1"


def test_messages_from_many_connections_are_all_kept(box: Box) -> None:
    heard: list[str] = []

    def talk(number: int) -> None:
        with engine(box) as peer:
            for count in range(10):
                heard.append(peer.ask(orm(f"M{number}.{count}", accession=f"A{number}")))

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(6)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(30)
    assert sorted(heard) == sorted(f"AA M{number}.{count}" for number in range(6) for count in range(10))
    assert len(box.kept()) == 60
    assert all(len(box.orders(f"A{number}")) == 1 for number in range(6))


def test_a_port_that_is_taken_is_an_error_that_names_it(box: Box) -> None:
    other = Listener([Port("127.0.0.1", box.port)], LIMITS, lambda *_: [], lambda *_: "")
    with pytest.raises(ScansideError, match=f"127.0.0.1:{box.port}"):
        other.start()


def test_what_is_under_way_is_answered_before_it_stops(tmp_path: Path) -> None:
    box = Box(tmp_path)
    with engine(box) as peer:
        assert peer.ask(orm("M1")) == "AA M1"
        box.stop()
        assert peer.ended()
    with pytest.raises(ConnectionRefusedError):
        Engine(box.port)


# TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def client(authority: Authority, *, shows: bool) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority.certificate))
    if shows:
        pair = authority.issue("ris", client=True)
        context.load_cert_chain(pair.certificate, pair.key)
    return context


def test_orders_come_over_tls_from_who_shows_a_certificate(
    tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    pair = authority.issue("box")
    certificates = ServerCertificates(pair.certificate, pair.key, authority.certificate)
    with running(tmp_path, LIMITS, certificates) as box:
        with engine(box, client(authority, shows=True)) as peer:
            assert peer.ask(orm("M1")) == "AA M1"
            assert peer.ask(orm("M2")) == "AA M2"
        with contextlib.suppress(OSError), engine(box, client(authority, shows=False)) as peer:
            assert peer.ask(orm("M3")) == ""
        with engine(box) as peer:
            peer.send(frame(orm("M4")))
            assert peer.ended(), "TLS or nothing"
        assert [one for one, _ in box.kept()] == ["M1", "M2"]
    assert "the TLS connection from 127.0.0.1 failed" in caplog.text
