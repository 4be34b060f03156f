"""The MLLP framing and client, against peers made of plain sockets that behave and misbehave."""

from __future__ import annotations

import contextlib
import itertools
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.delivery.hl7 import (
    OUTCOMES,
    Acknowledgement,
    CodeError,
    MllpClient,
    control_id_of,
    outcome,
    parse_acknowledgement,
)
from appliance.delivery.tls import client_context
from appliance.mllp import Deframer, FramingError, frame
from dicom_io.errors import PeerError, ScansideError
from tests.dicom_io.certificates import Authority, Pair


def message(control_id: str = "MSG1", extra: str = "") -> str:
    return (
        f"MSH|^~\\&|SCANSIDE|BOX|RIS|HOSP|20260102030405||ORU^R01^ORU_R01|{control_id}|P|2.5.1|||||||UNICODE UTF-8\r"
        f"OBX|1|TX|59776-5^Procedure Findings^LN||Blutung möglich{extra}||||||P\r"
    )


def answer(code: str, control_id: str, rest: str = "") -> bytes:
    text = f"MSH|^~\\&|RIS|HOSP|SCANSIDE|BOX|20260102030406||ACK|A1|P|2.5.1\rMSA|{code}|{control_id}{rest}\r"
    return b"\x0b" + text.encode() + b"\x1c\r"


# Framing

contents = st.binary(max_size=300).map(lambda data: data.translate(None, b"\x0b\x1c"))


@settings(deadline=None)
@given(
    blocks=st.lists(contents, max_size=6),
    junk=st.lists(contents, min_size=7, max_size=7),
    cuts=st.lists(st.integers(0, 3000), max_size=40),
)
def test_deframer_finds_every_block_however_the_bytes_arrive(
    blocks: list[bytes], junk: list[bytes], cuts: list[int]
) -> None:
    stream = b"".join(j + b"\x0b" + b + b"\x1c\r" for j, b in zip(junk, blocks, strict=False)) + junk[-1]
    deframer = Deframer(10**6)
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    found = [b for start, end in itertools.pairwise(edges) for b in deframer.feed(stream[start:end])]
    assert found == blocks
    between = b"".join(j for j, _ in zip(junk, blocks, strict=False)) + junk[-1]
    assert deframer.skipped == len(between.translate(None, b"\r\n"))


@settings(deadline=None)
@given(st.text(alphabet=st.characters(exclude_characters="\x0b\x1c", exclude_categories=["Cs"])))
def test_a_framed_message_comes_back_as_it_was(text: str) -> None:
    assert Deframer(10**6).feed(frame(text)) == [text.encode("utf-8")]


@settings(deadline=None)
@given(st.binary(max_size=400), st.integers(0, 50))
def test_deframer_holds_no_more_than_its_maximum_and_never_crashes(data: bytes, maximum: int) -> None:
    deframer = Deframer(maximum)
    try:
        for block in deframer.feed(data):
            assert len(block) <= maximum
            assert not set(block) & {0x0B, 0x1C}
    except FramingError:
        assert len(data) > maximum


@pytest.mark.parametrize(
    ("stream", "blocks"),
    [
        pytest.param(b"\x0bone\x1c\x0btwo\x1c", [b"one", b"two"], id="no carriage return"),
        pytest.param(b"\x0bhalf\x0bwhole\x1c\r", [b"whole"], id="begun anew"),
        pytest.param(b"\x1c\r\x0bone\x1c\r\x1c\r", [b"one"], id="stray ends"),
        pytest.param(b"\x0b\x1c\r", [b""], id="empty"),
        pytest.param(b"no block at all", [], id="no block"),
    ],
)
def test_deframer_is_lenient_with_careless_peers(stream: bytes, blocks: list[bytes]) -> None:
    assert Deframer(10**6).feed(stream) == blocks
    one_at_a_time = Deframer(10**6)
    assert [b for byte in stream for b in one_at_a_time.feed(bytes([byte]))] == blocks


@pytest.mark.parametrize("text", ["a\x0bb", "a\x1cb", "\ud800"])
def test_a_message_that_would_break_the_framing_is_refused(text: str) -> None:
    with pytest.raises(FramingError):
        frame(text)


# Reading messages


def test_control_id_follows_the_messages_own_separator() -> None:
    assert control_id_of(message("M-7")) == "M-7"
    assert control_id_of("MSH#^~\\&#a#b#c#d#t##ORU^R01#X|9#P#2.5.1\r") == "X|9"


@pytest.mark.parametrize("text", ["", "PID|1", "MSH|^~\\&|a", message(""), "MSH", "\r\r"])
def test_a_message_without_control_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="MSH-10"):
        control_id_of(text)


@pytest.mark.parametrize(
    ("rest", "text"),
    [
        ("", ""),
        ("|Patient unknown", "Patient unknown"),
        ("\rERR||PID^1^3|204^Unknown key^HL70357|E|||trace|No such patient", "No such patient"),
        ("\rERR||PID^1^3|204^Unknown key^HL70357|E|||trace", "trace"),
        ("\rERR||PID^1^3|204^Unknown key^HL70357|E", "204^Unknown key^HL70357"),
        ("\rERR|", ""),
    ],
)
def test_the_words_of_an_acknowledgement_are_found(rest: str, text: str) -> None:
    [block] = Deframer(10**6).feed(answer("AE", "MSG1", rest))
    read = parse_acknowledgement(block)
    assert read == Acknowledgement("AE", text, "MSG1", block.decode())


def test_line_feeds_between_segments_are_read() -> None:
    read = parse_acknowledgement(b"MSH|^~\\&|R||S||1||ACK|A1|P|2.5.1\r\nMSA|CA|MSG1\r\n")
    assert read is not None
    assert (read.code, read.control_id) == ("CA", "MSG1")


@pytest.mark.parametrize("block", [b"", b"hello", b"MSH|^~\\&|R", b"MSA|AA|MSG1", b"\xff\xfe\x00", b"\r\n"])
def test_what_is_no_acknowledgement_is_none(block: bytes) -> None:
    assert parse_acknowledgement(block) is None


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_no_block_crashes_the_reader(block: bytes) -> None:
    for content in (block, b"MSH|^~\\&\rMSA" + block):
        with contextlib.suppress(CodeError):
            read = parse_acknowledgement(content)
            assert read is None or read.code in OUTCOMES


def test_every_code_has_one_outcome() -> None:
    assert {code: outcome(Acknowledgement(code, "", "1", "")) for code in OUTCOMES} == {
        "AA": "acknowledged",
        "CA": "acknowledged",
        "AE": "retry",
        "CE": "retry",
        "AR": "rejected",
        "CR": "rejected",
    }


# The client

Script = Callable[[socket.socket, "Peer"], None]


class Peer:
    """A listener whose n-th connection is served by the n-th script (the last one serves all others)."""

    def __init__(self, *scripts: Script, context: ssl.SSLContext | None = None) -> None:
        self.scripts = scripts
        self.context = context
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)  # so that a deaf peer is soon full
        self.port = int(self.server.getsockname()[1])
        self.connections: list[socket.socket] = []
        self.accepted = 0
        self.received: list[bytes] = []
        self.done = threading.Event()
        self.faults: list[BaseException] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            script = self.scripts[min(self.accepted, len(self.scripts) - 1)]
            self.accepted += 1
            self.connections.append(connection)
            threading.Thread(target=self._serve, args=(script, connection), daemon=True).start()

    def _serve(self, script: Script, connection: socket.socket) -> None:
        try:
            if self.context is not None:
                connection = self.context.wrap_socket(connection, server_side=True)
                self.connections.append(connection)
            script(connection, self)
        except OSError as error:
            if not self.done.is_set():
                self.faults.append(error)

    def read(self, connection: socket.socket) -> bytes:
        """One whole message, by a plain split; also kept in `received`."""
        data = b""
        while not data.endswith(b"\x1c\r"):
            piece = connection.recv(65536)
            if not piece:
                raise ConnectionError("closed")
            data += piece
        assert data.startswith(b"\x0b")
        self.received.append(data[1:-2])
        return data[1:-2]

    def close(self) -> None:
        self.done.set()
        self.server.close()
        for connection in self.connections:
            connection.close()


@contextmanager
def talking(*scripts: Script, ack_timeout: float = 5.0) -> Iterator[tuple[MllpClient, Peer]]:
    peer = Peer(*scripts)
    try:
        with MllpClient("127.0.0.1", peer.port, connect_timeout=5.0, ack_timeout=ack_timeout) as client:
            yield client, peer
    finally:
        peer.close()


def polite(connection: socket.socket, peer: Peer) -> None:
    while True:
        control_id = peer.read(connection).split(b"|")[9].decode()
        connection.sendall(answer("AA", control_id))


def after_message(reply: Callable[[socket.socket, Peer], None]) -> Script:
    """Read one message, then do ``reply``, then keep the connection open until the test ends."""

    def script(connection: socket.socket, peer: Peer) -> None:
        peer.read(connection)
        reply(connection, peer)
        peer.done.wait(30)

    return script


def sends(*pieces: bytes, pause: float = 0.0) -> Script:
    def reply(connection: socket.socket, peer: Peer) -> None:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(pause)

    return after_message(reply)


def reset(connection: socket.socket, peer: Peer) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_messages_follow_one_another_on_one_connection() -> None:
    with talking(polite) as (client, peer):
        for number in range(20):
            read = client.send(message(f"M{number}"))
            assert (read.code, read.control_id) == ("AA", f"M{number}")
        assert len(peer.connections) == 1
        assert peer.received == [message(f"M{number}").encode() for number in range(20)]


@pytest.mark.parametrize("code", ["AA", "AE", "AR", "CA", "CE", "CR"])
def test_every_answer_is_returned_with_its_words(code: str) -> None:
    with talking(sends(answer(code, "MSG1", "|weil"))) as (client, _):
        read = client.send(message())
        assert (read.code, read.text, read.control_id) == (code, "weil", "MSG1")
        assert read.raw.startswith("MSH|")


def test_a_large_message_and_a_trickling_answer_pass() -> None:
    pieces = [bytes([byte]) for byte in answer("AA", "MSG1")]
    with talking(sends(*pieces, pause=0.001)) as (client, peer):
        large = message(extra="ö" * 400_000)
        assert client.send(large).code == "AA"
        assert peer.received == [large.encode()]


def test_junk_and_foreign_answers_before_ours_are_ignored(caplog: pytest.LogCaptureFixture) -> None:
    packet = b"Welcome!\r\n" + answer("AR", "OTHER") + b"\x0bPING\x1c\r" + answer("XX", "OTHER2") + answer("AA", "MSG1")
    with talking(sends(packet)) as (client, _):
        assert client.send(message()).code == "AA"
    assert "OTHER " in caplog.text
    assert "OTHER2" in caplog.text
    assert "no acknowledgement" in caplog.text


def test_only_foreign_answers_end_in_a_timeout_that_says_so() -> None:
    with talking(sends(b"junk", answer("AA", "OTHER")), ack_timeout=0.3) as (client, peer):
        with pytest.raises(PeerError, match=r"no acknowledgement of message MSG1 within 0\.3 s; 1 answers") as caught:
            client.send(message())
        assert caught.value.where == f"127.0.0.1:{peer.port}"
        assert "4 bytes were no MLLP" in caught.value.what
        assert caught.value.remedy


def test_a_late_answer_is_never_taken_for_that_of_the_next_message() -> None:
    late = threading.Event()

    def tardy(connection: socket.socket, peer: Peer) -> None:
        peer.read(connection)
        late.wait(10)
        with contextlib.suppress(OSError):
            connection.sendall(answer("AA", "M1") + answer("AA", "M2"))
        peer.done.wait(10)

    def refusing(connection: socket.socket, peer: Peer) -> None:
        peer.read(connection)
        late.set()
        time.sleep(0.1)
        connection.sendall(answer("AR", "M2"))
        peer.done.wait(10)

    with talking(tardy, refusing) as (client, peer):
        client.ack_timeout = 0.2
        with pytest.raises(PeerError, match="no acknowledgement of message M1"):
            client.send(message("M1"))
        client.ack_timeout = 5.0
        assert client.send(message("M2")).code == "AR"
        assert len(peer.connections) == 2


def test_an_answer_that_comes_twice_does_not_answer_the_next_message() -> None:
    def stammering(connection: socket.socket, peer: Peer) -> None:
        peer.read(connection)
        connection.sendall(answer("CA", "M1"))
        time.sleep(0.05)
        connection.sendall(answer("AA", "M1"))  # enhanced mode: the application's own answer comes later
        peer.read(connection)
        connection.sendall(answer("AE", "M2"))
        peer.done.wait(10)

    with talking(stammering) as (client, peer):
        assert client.send(message("M1")).code == "CA"
        time.sleep(0.15)
        assert client.send(message("M2")).code == "AE"
        assert len(peer.connections) == 1


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        pytest.param(lambda c, p: c.close(), "closed the connection before it acknowledged", id="close"),
        pytest.param(reset, "broke before message MSG1 was acknowledged", id="reset"),
        pytest.param(lambda c, p: (c.sendall(answer("AA", "MSG1")[:-9]), c.close()), "closed the", id="half an answer"),
        pytest.param(lambda c, p: c.sendall(answer("ZZ", "MSG1")), "'ZZ' is not one of AA", id="unknown code"),
        pytest.param(lambda c, p: c.sendall(b"\x0b" + b"x" * 300_000), "more than 262144 bytes", id="oversize"),
    ],
)
def test_a_broken_answer_is_an_error_and_the_next_message_goes_on_a_new_connection(reply: Script, words: str) -> None:
    with talking(after_message(reply), polite) as (client, peer):
        with pytest.raises(PeerError, match=words):
            client.send(message())
        assert client.send(message()).code == "AA"
        assert len(peer.connections) == 2
        assert peer.received == [message().encode()] * 2


@pytest.mark.parametrize("hang_up", [lambda c, p: c.close(), reset], ids=["close", "reset"])
def test_a_connection_closed_while_idle_costs_neither_an_error_nor_a_second_copy(hang_up: Script) -> None:
    closed = threading.Event()

    def once(connection: socket.socket, peer: Peer) -> None:
        peer.read(connection)
        connection.sendall(answer("AA", "M1"))
        time.sleep(0.05)
        hang_up(connection, peer)
        closed.set()

    with talking(once, polite) as (client, peer):
        assert client.send(message("M1")).code == "AA"
        assert closed.wait(5)
        time.sleep(0.05)
        assert client.send(message("M2")).code == "AA"
        assert peer.received == [message("M1").encode(), message("M2").encode()]


def test_a_connection_closed_just_before_the_write_costs_nothing_either(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = threading.Event()

    def once(connection: socket.socket, peer: Peer) -> None:
        peer.read(connection)
        connection.sendall(answer("AA", "M1"))
        time.sleep(0.05)
        reset(connection, peer)
        closed.set()

    with talking(once, polite) as (client, peer):
        assert client.send(message("M1")).code == "AA"
        assert closed.wait(5)
        time.sleep(0.05)
        monkeypatch.setattr(client, "_still_open", lambda: True)  # as if the peer closed only after the look
        assert client.send(message("M2")).code == "AA"
        assert peer.received == [message("M1").encode(), message("M2").encode()]


def test_the_halves_of_two_connections_make_no_answer() -> None:
    def first_half(connection: socket.socket, peer: Peer) -> None:
        connection.sendall(answer("AA", "MSG1")[:-12])
        connection.close()

    def second_half(connection: socket.socket, peer: Peer) -> None:
        connection.sendall(answer("AA", "MSG1")[-12:] + answer("AR", "MSG1"))

    with talking(after_message(first_half), after_message(second_half)) as (client, _):
        with pytest.raises(PeerError):
            client.send(message())
        assert client.send(message()).code == "AR"


def test_a_message_that_may_have_arrived_is_not_sent_again_by_the_client_itself() -> None:
    def once(connection: socket.socket, peer: Peer) -> None:
        peer.read(connection)
        connection.sendall(answer("AA", "M1"))
        peer.read(connection)
        connection.close()

    with talking(once, polite) as (client, peer):
        client.send(message("M1"))
        with pytest.raises(PeerError):
            client.send(message("M2"))
        assert len(peer.connections) == 1
        assert len(peer.received) == 2


def test_a_refused_connection_is_an_error_with_a_remedy_and_later_works() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    client = MllpClient("127.0.0.1", port, connect_timeout=1.0, ack_timeout=1.0)
    for attempt in (client.connect, lambda: client.send(message())):
        with pytest.raises(PeerError, match="cannot be reached") as caught:
            attempt()
        assert caught.value.where == f"127.0.0.1:{port}"
        assert "running" in caught.value.remedy


def test_a_peer_that_never_reads_is_given_up_in_time() -> None:
    def deaf(connection: socket.socket, peer: Peer) -> None:
        peer.done.wait(30)

    with talking(deaf, ack_timeout=0.3) as (client, _):
        begun = time.monotonic()
        with pytest.raises(PeerError, match=r"did not take the message within 0\.3 s"):
            client.send(message(extra="x" * 12_000_000))
        assert time.monotonic() - begun < 8


def test_a_peer_that_trickles_junk_is_given_up_in_time() -> None:
    def babbling(connection: socket.socket, peer: Peer) -> None:
        peer.read(connection)
        with contextlib.suppress(OSError):
            while not peer.done.wait(0.02):
                connection.sendall(b"x")

    with talking(babbling, ack_timeout=0.3) as (client, _):
        begun = time.monotonic()
        with pytest.raises(PeerError, match="no acknowledgement"):
            client.send(message())
        assert time.monotonic() - begun < 8


def test_close_from_another_thread_ends_a_wait_at_once() -> None:
    with talking(after_message(lambda c, p: None), ack_timeout=30) as (client, _):
        threading.Timer(0.1, client.close).start()
        begun = time.monotonic()
        with pytest.raises(PeerError):
            client.send(message())
        assert time.monotonic() - begun < 8


def test_a_message_that_cannot_be_sent_never_reaches_the_peer() -> None:
    with talking(polite) as (client, peer):
        for bad in (message(extra="\x1c"), message(""), "PID|1"):
            with pytest.raises(ValueError):
                client.send(bad)
        assert client.send(message()).code == "AA"
        assert peer.received == [message().encode()]


# Enhanced mode (2.9.3)


def enhanced(control_id: str = "MSG1", application: str = "AL") -> str:
    return message(control_id).replace("|P|2.5.1|||||||", f"|P|2.5.1|||AL|{application}|||", 1)


def test_the_accept_acknowledgement_alone_ends_it_where_the_application_is_not_asked() -> None:
    with talking(sends(answer("CA", "MSG1"))) as (client, _):
        assert client.send(enhanced(application="NE")).code == "CA"


@pytest.mark.parametrize("code", ["AA", "AE", "AR"])
@pytest.mark.parametrize("pause", [0.0, 0.1], ids=["one packet", "one after the other"])
def test_the_applications_answer_ends_it_where_both_are_asked(code: str, pause: float) -> None:
    pieces = [answer("CA", "MSG1"), answer("AA", "OTHER") + answer("CA", "MSG1") + answer(code, "MSG1", "|so")]
    with talking(sends(*(pieces if pause else [b"".join(pieces)]), pause=pause)) as (client, _):
        read = client.send(enhanced())
        assert (read.code, read.text) == (code, "so")


@pytest.mark.parametrize("code", ["CE", "CR", "AA", "AE", "AR"])
def test_what_says_that_no_more_comes_ends_it_at_once(code: str) -> None:
    with talking(sends(answer(code, "MSG1"))) as (client, _):
        assert client.send(enhanced()).code == code


@pytest.mark.parametrize(
    ("script", "words"),
    [
        pytest.param(sends(answer("CA", "MSG1")), r"no application acknowledgement .* committed it \(CA\)", id="none"),
        pytest.param(
            after_message(lambda c, p: (c.sendall(answer("CA", "MSG1")), c.close())),
            "closed the connection",
            id="close",
        ),
    ],
)
def test_a_committed_message_without_the_applications_answer_is_not_acknowledged(script: Script, words: str) -> None:
    with talking(script, polite) as (client, peer):
        client.application_timeout = 0.3
        with pytest.raises(PeerError, match=words):
            client.send(enhanced())
        assert client.send(enhanced()).code == "AA"
        assert peer.received == [enhanced().encode()] * 2


def test_an_application_acknowledgement_that_asks_for_one_is_acknowledged() -> None:
    def script(connection: socket.socket, peer: Peer) -> None:
        deframer = Deframer(10**6)
        while len(peer.received) < 4:  # our acknowledgement and the next message may come in one packet
            for block in deframer.feed(connection.recv(65536)):
                peer.received.append(block)
                if b"ORU" in block:
                    asks = answer("AA", block.split(b"|")[9].decode())
                    asks = asks.replace(b"|ACK|A1|P|2.5.1", b"|ACK^R01|A77|P|2.5.1|||AL|NE")
                    connection.sendall(asks.replace(b"MSA|AA", b"MSA|CA") + asks)
        peer.done.set()

    with talking(script) as (client, peer):
        assert client.send(enhanced("M1")).code == "AA"
        assert client.send(enhanced("M2")).code == "AA"
        assert peer.done.wait(10)
        assert peer.accepted == 1
        for thanks in peer.received[1::2]:
            header, msa = thanks.decode().rstrip("\r").split("\r")
            assert msa == "MSA|CA|A77"
            assert header.split("|")[8] == "ACK"
            assert header.split("|")[2:4] == ["SCANSIDE", "BOX"]
            assert len(header.split("|")) == 12  # it asks for no answer itself


# TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def server(authority: Authority) -> Pair:
    return authority.issue("listener")


def secured(server: Pair, clients: Authority | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.certificate, server.key)
    if clients is not None:
        context.load_verify_locations(clients.certificate)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


@contextmanager
def talking_tls(
    script: Script, listening: ssl.SSLContext, calling: ssl.SSLContext, *, ack_timeout: float = 5.0
) -> Iterator[tuple[MllpClient, Peer]]:
    peer = Peer(script, context=listening)
    client = MllpClient("127.0.0.1", peer.port, connect_timeout=5.0, ack_timeout=ack_timeout, context=calling)
    try:
        with client:
            yield client, peer
    finally:
        peer.close()


def test_messages_follow_one_another_over_tls_with_client_certificates(authority: Authority, server: Pair) -> None:
    ours = authority.issue("box", client=True)
    calling = client_context(authority.certificate, ours.certificate, ours.key)
    with talking_tls(polite, secured(server, authority), calling) as (client, peer):
        for number in range(5):
            assert client.send(message(f"M{number}")).code == "AA"
            time.sleep(0.01)
        large = message("L", extra="ö" * 200_000)
        assert client.send(large).code == "AA"
        assert peer.accepted == 1
        assert peer.received[-1] == large.encode()
        assert isinstance(peer.connections[-1], ssl.SSLSocket)
        assert peer.connections[-1].getpeercert()


def test_a_listener_that_asks_for_a_certificate_gets_nothing_without_one(authority: Authority, server: Pair) -> None:
    calling = client_context(authority.certificate)
    with talking_tls(polite, secured(server, authority), calling) as (client, peer):
        with pytest.raises(PeerError):
            client.send(message())
        assert peer.received == []


def test_a_listener_with_a_certificate_of_somebody_else_gets_nothing(
    authority: Authority, server: Pair, tmp_path: Path
) -> None:
    calling = client_context(Authority(tmp_path, "stranger").certificate)
    with talking_tls(polite, secured(server), calling) as (client, peer):
        with pytest.raises(PeerError, match="certificate is not accepted") as caught:
            client.send(message())
        assert "authorities" in caught.value.remedy
        assert peer.received == []


def test_a_listener_under_another_name_gets_nothing(authority: Authority, server: Pair) -> None:
    with talking_tls(polite, secured(server), client_context(authority.certificate)) as (client, peer):
        client.host = "127.0.0.2"  # Linux answers there, too; the certificate is for 127.0.0.1
        peer.server.close()
        peer.server = socket.create_server(("127.0.0.2", peer.port))
        threading.Thread(target=peer._accept, daemon=True).start()
        with pytest.raises(PeerError, match="certificate is not accepted"):
            client.send(message())
        assert peer.received == []


def test_a_listener_without_tls_is_an_error_that_says_so(authority: Authority) -> None:
    with talking(sends(answer("AA", "MSG1"))) as (client, _):
        client.context = client_context(authority.certificate)
        client.connect_timeout = 0.5
        with pytest.raises(PeerError, match="TLS handshake"):
            client.send(message())


def test_a_tls_connection_closed_while_idle_costs_nothing(authority: Authority, server: Pair) -> None:
    def once(connection: socket.socket, peer: Peer) -> None:
        peer.read(connection)
        connection.sendall(answer("AA", "M1"))
        connection.close()

    with talking_tls(once, secured(server), client_context(authority.certificate)) as (client, peer):
        assert client.send(message("M1")).code == "AA"
        peer.scripts = (polite,)
        time.sleep(0.1)
        assert client.send(message("M2")).code == "AA"
        assert peer.received == [message("M1").encode(), message("M2").encode()]


def test_close_from_another_thread_ends_a_wait_over_tls_at_once(authority: Authority, server: Pair) -> None:
    silent = after_message(lambda c, p: None)
    calling = client_context(authority.certificate)
    with talking_tls(silent, secured(server), calling, ack_timeout=30) as (client, _):
        threading.Timer(0.2, client.close).start()
        begun = time.monotonic()
        with pytest.raises(PeerError):
            client.send(message())
        assert time.monotonic() - begun < 8


def test_files_that_cannot_be_used_are_named(authority: Authority, server: Pair, tmp_path: Path) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("no certificate")
    other = authority.issue("other")
    for files in ((junk,), (tmp_path / "none.pem",), (None, junk, junk), (None, server.certificate, other.key)):
        with pytest.raises(ScansideError) as caught:
            client_context(*files)
        assert caught.value.where in {str(file) for file in files}
