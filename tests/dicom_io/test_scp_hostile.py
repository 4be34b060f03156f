"""The storage provider against peers that send whatever they like, as slowly as they like.

FUZZ_EXAMPLES=n tries n streams of mutated PDUs.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom.dsutils import encode as write_data_set
from pynetdicom.sop_class import CTImageStorage

from dicom_io._association import Association
from dicom_io._dimse import Command, Field, decode, encode
from dicom_io._upper_layer import abort, p_data
from dicom_io.commitment import CommitmentReport, Reference
from dicom_io.scp import PENDING_CONNECTIONS, StorageServer
from tests.dicom_io.support import Recorder, ct, data_set, head, save, serving
from tests.dicom_io.test_scp import _Peer, association_request, is_closed, store

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "150"))
RELEASE = struct.pack(">BxI4x", 5, 4)
PER_ADDRESS = PENDING_CONNECTIONS // 4


@pytest.fixture(scope="module")
def slice_(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(ct(head(12, False), 12), tmp_path_factory.mktemp("slice") / "one.dcm")


def message(path: Path, fragment: int = 16_000, uid: str = "1.2.3") -> bytes:
    """A C-STORE request with its data set, in fragments of that size."""
    data = p_data(1, data_set(path.read_bytes()), command=False, maximum=fragment + 6)
    return store_command(fragment, uid) + data


def store_command(fragment: int = 16_000, uid: str = "1.2.3") -> bytes:
    command = Command(Field.C_STORE_RQ, 1, data_set_type=1, affected_class=CTImageStorage, affected_instance=uid)
    return p_data(1, encode(command), command=True, maximum=fragment + 6)


@contextmanager
def raw(server: StorageServer, request: bytes | None = None, source: str = "127.0.0.1") -> Iterator[socket.socket]:
    """A connection, with an association unless the request is empty."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10, source_address=(source, 0))
    with connection:
        if request != b"":
            connection.sendall(association_request() if request is None else request)
            assert read_pdu(connection)[0] == 2
        yield connection


def read_exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise ConnectionError
        data += more
    return data


def read_pdu(connection: socket.socket) -> tuple[int, bytes]:
    kind, length = struct.unpack(">BxI", read_exactly(connection, 6))
    return kind, read_exactly(connection, length)


def read_status(connection: socket.socket) -> int | None:
    """The status of the next response, which may come in many fragments."""
    command = b""
    while True:
        kind, body = read_pdu(connection)
        assert kind == 4
        command += body[6:]
        if body[5] & 2:
            return decode(command).status


def serves_well(server: StorageServer, recorder: Recorder, slice_: Path) -> None:
    before = len(recorder.received)
    with _Peer(server.port, calling="GOOD") as peer:
        assert store(peer, slice_) == 0x0000
    recorder.wait(received=before + 1)


@pytest.mark.parametrize("fragment", [1, 2, 7, 1000])
def test_fragments_of_any_size(slice_: Path, fragment: int) -> None:
    recorder = Recorder()
    with serving(recorder) as server, raw(server) as connection:
        connection.sendall(message(slice_, fragment))
        assert read_status(connection) == 0
    assert data_set(recorder.received[0].part10) == data_set(slice_.read_bytes())


@pytest.mark.parametrize("piece", [1, 5, 11, 13])
def test_segments_of_any_size(slice_: Path, piece: int) -> None:
    """Whatever the network makes of it: headers are cut anywhere."""
    recorder = Recorder()
    stream = message(slice_, 500)
    with serving(recorder) as server, raw(server) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, 3000, piece):
            connection.sendall(stream[start : min(start + piece, 3000)])
        connection.sendall(stream[3000:])
        assert read_status(connection) == 0
    assert data_set(recorder.received[0].part10) == data_set(slice_.read_bytes())


def test_several_messages_in_one_pdu_and_one_peer_that_takes_little(slice_: Path) -> None:
    echo = encode(Command(Field.C_ECHO_RQ, 5, affected_class="1.2.840.10008.1.1"))
    item = struct.pack(">IBB", len(echo) + 2, 1, 3) + echo
    request = association_request().replace(struct.pack(">BxHI", 0x51, 4, 16384), struct.pack(">BxHI", 0x51, 4, 16))
    with serving(Recorder()) as server, raw(server, request) as connection:
        connection.sendall(struct.pack(">BxI", 4, 3 * len(item)) + 3 * item)
        assert [read_status(connection) for _ in range(3)] == [0, 0, 0]


def test_a_half_closed_connection_still_gets_its_answer(slice_: Path) -> None:
    recorder = Recorder()
    with serving(recorder) as server, raw(server) as connection:
        connection.sendall(message(slice_))
        connection.shutdown(socket.SHUT_WR)
        assert read_status(connection) == 0
        recorder.wait(closed=1)
    assert recorder.closed_calls[0].outcome == "broken"


def test_an_abort_amid_an_image_discards_it(slice_: Path) -> None:
    recorder = Recorder()
    with serving(recorder) as server, raw(server) as connection:
        whole = message(slice_, 100)
        at = 0
        while at < 2000:
            at += 6 + int.from_bytes(whole[at + 2 : at + 6], "big")
        connection.sendall(whole[:at] + abort())
        recorder.wait(closed=1)
    assert (recorder.discarded, recorder.received) == (1, [])
    assert (recorder.closed_calls[0].outcome, recorder.closed_calls[0].stores) == ("aborted", 0)


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4, 5, 6, 7, 8, 0x42, 0xFF])
@pytest.mark.parametrize("length", [0, 1, 4, 5, (1 << 20) + 1, 0xFFFFFFFF])
def test_a_pdu_of_any_type_and_length(slice_: Path, kind: int, length: int, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    with serving(recorder, idle_seconds=1.0, artim_seconds=0.1) as server:
        with raw(server) as connection, suppress(ConnectionError):
            connection.sendall(struct.pack(">BxI", kind, length) + bytes(min(length, 100)))
            recorder.wait(closed=1)
        assert len(recorder.closed_calls) == 1
        serves_well(server, recorder, slice_)
    assert "nobody foresaw" not in caplog.text


@pytest.mark.parametrize(
    ("stream", "ends"),
    [
        (p_data(3, b"x", command=True, maximum=0), "aborted"),  # a context that was not accepted
        (p_data(1, b"x", command=False, maximum=0), "aborted"),  # data without a command
        (p_data(1, b"\0" * 20_000, command=True, maximum=9000), "aborted"),  # a command set without end
        (p_data(1, encode(Command(0x8001, responded_to=1)), command=True, maximum=0), "aborted"),  # nobody asked
        (struct.pack(">BxIIBB", 4, 6, 2, 1, 3), "aborted"),  # an empty command
        (p_data(1, encode(Command(0x0FFF, responded_to=1)), command=True, maximum=0) + RELEASE, "released"),
    ],
    ids=["context", "data first", "endless command", "a response", "empty", "a cancel"],
)
def test_messages_that_break_the_rules(stream: bytes, ends: str) -> None:
    recorder = Recorder()
    with serving(recorder) as server, raw(server) as connection:
        connection.sendall(stream)
        read_pdu(connection)
        connection.close()
        recorder.wait(closed=1)
    assert recorder.closed_calls[0].outcome == ends


def test_an_operation_that_nobody_knows_is_answered() -> None:
    with serving(Recorder()) as server, raw(server) as connection:
        connection.sendall(p_data(1, encode(Command(0x0020, 4)), command=True, maximum=0))
        assert read_status(connection) == 0x0211


def test_mutated_streams(slice_: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever came, each association that began has its end, nothing unforeseen happens, and a good peer is served."""
    recorder = Recorder()
    seed = message(slice_, 700) + RELEASE
    with serving(recorder, idle_seconds=0.2, artim_seconds=0.2) as server:
        for number in range(EXAMPLES):
            chance = random.Random(number)
            stream = bytearray(chance.choice((seed, association_request() + seed)))
            for _ in range(chance.randint(1, 8)):
                at = chance.randrange(min(len(stream), chance.choice((200, 5000))))
                match chance.randrange(4):
                    case 0:
                        stream[at] = chance.randrange(256)
                    case 1:
                        del stream[at : at + chance.randint(1, 50)]
                    case 2:
                        stream[at:at] = chance.randbytes(chance.randint(1, 50))
                    case _:
                        stream[at : at + 4] = struct.pack(">I", chance.choice((0, 1, 0xFFFF, 1 << 20, 0xFFFFFFFF)))
            opening = None if chance.random() < 0.7 else b""
            with suppress(ConnectionError, TimeoutError), raw(server, opening) as connection:
                connection.sendall(stream)
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(0.5)
                while connection.recv(65536):
                    pass
        recorder.wait(closed=len(recorder.opened_calls))
        assert sorted(one.association for one in recorder.closed_calls) == sorted(
            one.number for one in recorder.opened_calls
        )
        serves_well(server, recorder, slice_)
    assert "nobody foresaw" not in caplog.text
    assert len(recorder.opened_calls) > EXAMPLES // 3


# Slow and many


def test_a_request_that_trickles_is_given_up() -> None:
    """Its bytes never stop for long, and yet it is not waited for: the whole of it would be accepted."""
    recorder = Recorder()
    with serving(recorder, artim_seconds=0.5) as server, raw(server, b"") as connection:
        with suppress(OSError):
            for byte in association_request():
                connection.sendall(bytes([byte]))
                time.sleep(0.05)
        assert is_closed(connection, 5)
    assert recorder.opened_calls == []


def test_a_message_that_trickles_is_aborted(slice_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dicom_io._association.SLOW_AFTER_SECONDS", 0.3)
    recorder = Recorder()
    with serving(recorder, minimum_bytes_per_second=10_000, artim_seconds=0.3) as server, raw(server) as connection:
        stream = message(slice_, 10)
        with suppress(OSError):
            for start in range(0, len(stream), 20):
                connection.sendall(stream[start : start + 20])
                time.sleep(0.02)
        recorder.wait(closed=1)
    assert (recorder.closed_calls[0].outcome, recorder.received) == ("aborted", [])


@pytest.mark.parametrize("command", [False, True], ids=["data set", "command set"])
def test_a_fragment_that_trickles_is_aborted_before_its_end(monkeypatch: pytest.MonkeyPatch, command: bool) -> None:
    """What was announced and did not come does not count."""
    monkeypatch.setattr("dicom_io._association.SLOW_AFTER_SECONDS", 0.3)
    recorder = Recorder()
    size = 10_000 if command else 60_000
    fragment = struct.pack(">BxIIBB", 4, size + 6, size + 2, 1, int(command))
    opening = b"" if command else store_command()
    with serving(recorder, minimum_bytes_per_second=1000) as server, raw(server) as connection:
        connection.sendall(opening + fragment)
        sent = 0
        with suppress(OSError):
            while sent < 500 and not recorder.closed_calls:
                connection.sendall(b"\0")
                sent += 1
                time.sleep(0.02)
        recorder.wait(closed=1)
    assert sent < 500 and recorder.closed_calls[0].outcome == "aborted"
    assert recorder.discarded == (not command)


def test_peers_that_hang_cannot_shut_out_another(slice_: Path) -> None:
    recorder = Recorder()
    with serving(recorder, maximum_associations=8, maximum_associations_per_address=4, artim_seconds=30) as server:
        held: list[Any] = []
        for _ in range(40):  # connections that ask for nothing
            held.append(socket.create_connection(("127.0.0.1", server.port), source_address=("127.0.0.3", 0)))
        for _ in range(4):
            held.append(_Peer(server.port).association)
        assert _Peer(server.port).association.is_rejected
        with raw(server, source="127.0.0.2") as connection:
            connection.sendall(message(slice_))
            assert read_status(connection) == 0
        for one in held:
            one.close() if isinstance(one, socket.socket) else one.abort()
        recorder.wait(closed=5)
    assert {reason for _, _, reason in recorder.rejected_calls} == {
        "local limit exceeded",
        "too many connections without an association",
    }


def test_what_waits_for_the_close_of_a_hostile_peer_is_bounded(slice_: Path) -> None:
    """It breaks the protocol with the first PDU, closes nothing and goes on to send: few such connections are kept."""
    recorder = Recorder()
    with serving(recorder, artim_seconds=60) as server, ExitStack() as stack:
        held = []
        for _ in range(3 * PER_ADDRESS):
            connection = stack.enter_context(raw(server, b"", source="127.0.0.3"))
            connection.sendall(struct.pack(">BxI", 0x47, 4))
            held.append(connection)
        until(lambda: sum(map(still_open, held)) <= PER_ADDRESS)
        with raw(server, source="127.0.0.3"):  # nobody is refused for it
            serves_well(server, recorder, slice_)


def still_open(connection: socket.socket) -> bool:
    """Send a byte more and drop what came; whether the peer has not closed the connection."""
    connection.setblocking(False)
    try:
        connection.send(b"\0")
        while connection.recv(4096):
            pass
    except BlockingIOError:
        return True
    except ConnectionError:
        return False
    return False


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_address_that_is_not_accepted_is_hung_up_on() -> None:
    import ipaddress

    recorder = Recorder()
    networks = (ipaddress.ip_network("127.0.0.2/32"),)
    with serving(recorder, accepted_addresses=networks) as server:
        with raw(server, b"") as connection:
            assert is_closed(connection, 5)
        with raw(server, source="127.0.0.2"):
            recorder.wait(opened=1)
    assert recorder.rejected_calls == [("127.0.0.1", "", "its address is not accepted")]


def test_a_slow_line_is_not_an_idle_one(slice_: Path) -> None:
    recorder = Recorder()
    stream = message(slice_, 4000)
    options = {"idle_seconds": 0.3, "minimum_bytes_per_second": 1000}
    with serving(recorder, **options) as server, raw(server) as connection:
        for start in range(0, len(stream), 400):
            connection.sendall(stream[start : start + 400])
            time.sleep(0.08)
        assert read_status(connection) == 0


def test_a_thread_that_cannot_start_locks_nobody_out(slice_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    recorder = Recorder()
    with serving(recorder) as server:
        with monkeypatch.context() as patch:
            patch.setattr("dicom_io._association.Association.start", exhausted)
            for _ in range(20):
                with raw(server, b"") as connection:
                    assert is_closed(connection, 5)
        serves_well(server, recorder, slice_)


def test_nobody_is_accepted_once_it_stops() -> None:
    recorder = Recorder()
    with serving(recorder) as server:
        held = _Peer(server.port)  # so that the stop waits
        with raw(server, b"") as connection:
            time.sleep(0.1)
            stopper = threading.Thread(target=server.stop, args=(1.0,))
            stopper.start()
            time.sleep(0.3)
            connection.sendall(association_request())
            assert read_pdu(connection)[0] == 3
        stopper.join(10)
        held.association.abort()
    assert len(recorder.opened_calls) == len(recorder.closed_calls) == 1


def test_an_association_counts_no_longer_once_it_is_released(slice_: Path) -> None:
    """Even if the peer forgets to close the connection."""
    recorder = Recorder()
    with serving(recorder, maximum_associations=1) as server, raw(server) as connection:
        connection.sendall(RELEASE)
        assert read_pdu(connection)[0] == 6
        recorder.wait(closed=1, seconds=2)
        serves_well(server, recorder, slice_)


# Association requests


def request(*contexts: tuple[int, str], version: int = 1, application: str = "1.2.840.10008.3.1.1.1") -> bytes:
    """An A-ASSOCIATE-RQ whose contexts are in Explicit VR Little Endian (PS3.8 9.3.2)."""

    def item(kind: int, body: bytes) -> bytes:
        return struct.pack(">BxH", kind, len(body)) + body

    presentations = b"".join(
        item(0x20, bytes((number, 0, 0, 0)) + item(0x30, uid.encode()) + item(0x40, ExplicitVRLittleEndian.encode()))
        for number, uid in contexts
    )
    user = item(0x51, struct.pack(">I", 16384)) + item(0x52, b"1.2.3")
    body = (
        struct.pack(">HH", version, 0) + b"SCANSIDE".ljust(16) + b"RAW".ljust(16) + bytes(32)
        + item(0x10, application.encode()) + presentations + item(0x50, user)
    )  # fmt: skip
    return struct.pack(">BxI", 1, len(body)) + body


def answer_to(opening: bytes) -> tuple[int, bytes, Recorder]:
    recorder = Recorder()
    with serving(recorder) as server, raw(server, b"") as connection:
        connection.sendall(opening)
        kind, body = read_pdu(connection)
    return kind, body, recorder


def test_a_protocol_version_or_application_context_that_nobody_speaks_is_rejected() -> None:
    ct_image = (1, str(CTImageStorage))
    assert answer_to(request(ct_image))[0] == 2
    for opening, reason in (
        (request(ct_image, version=2), 0x010202),
        (request(ct_image, application="1.2.3"), 0x010102),
    ):
        kind, body, recorder = answer_to(opening)
        assert (kind, int.from_bytes(body[1:4], "big")) == (3, reason)
        assert (recorder.opened_calls, len(recorder.rejected_calls)) == ([], 1)


def test_two_contexts_of_one_number_are_no_request() -> None:
    kind, _, recorder = answer_to(request((1, CTImageStorage), (1, PUSH_MODEL)))
    assert (kind, recorder.opened_calls) == (7, [])


def test_as_many_contexts_as_there_are_numbers(slice_: Path) -> None:
    recorder = Recorder()
    opening = request(*((number, CTImageStorage) for number in range(1, 256, 2)))
    with serving(recorder) as server, raw(server, opening) as connection:
        connection.sendall(message(slice_))
        assert read_status(connection) == 0


def test_a_message_that_changes_its_context_is_aborted(slice_: Path) -> None:
    recorder = Recorder()
    whole = bytearray(message(slice_, 100))
    with serving(recorder) as server, raw(server, request((1, CTImageStorage), (3, CTImageStorage))) as connection:
        first = 6 + int.from_bytes(whole[2:6], "big")
        assert whole[first + 10] == 1
        whole[first + 10] = 3  # the context of the second fragment
        connection.sendall(whole)
        assert read_pdu(connection)[0] == 7
        recorder.wait(closed=1)
    assert recorder.received == []


# Storage commitment

PUSH_MODEL = "1.2.840.10008.1.20.1"


def n_action(instance: str = f"{PUSH_MODEL}.1", action: int = 1, transaction: str = "1.2.9") -> bytes:
    """A request for the commitment of one instance."""
    asked, item = Dataset(), Dataset()
    asked.TransactionUID = transaction
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = CTImageStorage, "1.2.3"
    asked.ReferencedSOPSequence = [item]
    data = write_data_set(asked, False, True)
    assert data
    command = Command(
        Field.N_ACTION_RQ, 7, data_set_type=1, requested_class=PUSH_MODEL, requested_instance=instance,
        action_type=action,
    )  # fmt: skip
    return p_data(1, encode(command), command=True, maximum=0) + p_data(1, data, command=False, maximum=0)


REPORT = CommitmentReport("1.2.9", (Reference(CTImageStorage, "1.2.3"),), ())


@pytest.mark.parametrize(
    ("stream", "status"),
    [
        (n_action(), 0x0000),
        (n_action(instance="1.2.3"), 0x0112),
        (n_action(action=2), 0x0123),
        (n_action(transaction="not.a.uid"), 0x0115),
    ],
)
def test_a_request_for_commitment_is_answered(stream: bytes, status: int) -> None:
    recorder = Recorder()
    with serving(recorder) as server, raw(server, request((1, PUSH_MODEL))) as connection:
        connection.sendall(stream)
        assert read_status(connection) == status
    assert [one.transaction_uid for one in recorder.requests] == (["1.2.9"] if status == 0 else [])


@pytest.mark.parametrize("status", [0x0000, 0x0110, None])
def test_a_report_goes_back_on_the_association_and_its_answer_is_told(status: int | None) -> None:
    recorder = Recorder()
    recorder.reports.append(REPORT)
    with serving(recorder) as server, raw(server, request((1, PUSH_MODEL))) as connection:
        connection.sendall(n_action())
        assert read_status(connection) == 0
        _, body = read_pdu(connection)
        asked = decode(body[6:])
        assert (asked.field, asked.event_type) == (Field.N_EVENT_REPORT_RQ, 1)
        read_pdu(connection)
        if status is not None:
            answer = Command(Field.N_EVENT_REPORT_RSP, responded_to=asked.message_id, status=status)
            connection.sendall(p_data(1, encode(answer), command=True, maximum=0))
        connection.sendall(RELEASE)
        recorder.wait(closed=1)
    assert recorder.reported_calls == [("1.2.9", status)]


def test_a_peer_that_is_gone_before_its_report(caplog: pytest.LogCaptureFixture) -> None:
    gone = threading.Event()

    class Late(Recorder):
        def report(self, session: Any) -> CommitmentReport | None:
            assert gone.wait(10)
            time.sleep(0.1)  # until the reset has arrived
            return super().report(session)

    recorder = Late()
    recorder.reports.append(REPORT)
    with serving(recorder) as server:
        with raw(server, request((1, PUSH_MODEL))) as connection:
            connection.sendall(n_action())
            assert read_status(connection) == 0
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gone.set()
        recorder.wait(closed=1)
    assert recorder.reported_calls == [("1.2.9", None)]
    assert recorder.closed_calls[0].outcome == "broken"
    assert "nobody foresaw" not in caplog.text


def test_who_waits_for_a_report_is_idle_no_longer_than_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its idle time is spent looking for reports, and not once more reading from it."""
    reads: list[int] = []
    real = Association._read

    def noted(self: Association, view: memoryview, deadline: float = 0.0) -> None:
        reads.append(len(view))
        real(self, view, deadline)

    recorder = Recorder()
    with serving(recorder, idle_seconds=1, artim_seconds=0.2) as server:
        with raw(server, request((1, PUSH_MODEL))) as connection:
            connection.sendall(n_action())
            assert read_status(connection) == 0
            monkeypatch.setattr(Association, "_read", noted)
            assert read_pdu(connection)[0] == 7  # A-ABORT
        recorder.wait(closed=1)
    assert recorder.closed_calls[0].outcome == "aborted"
    assert reads == []
