"""The storage provider against DCMTK's senders, and against peers that do not behave."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import threading
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage
from pynetdicom import AE, evt
from pynetdicom.pdu import A_ASSOCIATE_RJ
from pynetdicom.sop_class import CTImageStorage, Verification
from pynetdicom.sop_class import MRImageStorage as MR

from dicom_io.errors import ScansideError
from dicom_io.handlers import Answer, Refusal, Session, Sink, StoreRequest
from dicom_io.header import read_header
from dicom_io.scp import Listener, ServerOptions, start_server
from dicom_io.sop_classes import PLAIN_SYNTAXES, STORAGE_CLASSES, TRANSFER_SYNTAXES
from tests.dicom_io.support import Received, Recorder, Tap, ct, data_set, head, run, save, serving
from tests.peers import program as tool

interop = pytest.mark.interop


@pytest.fixture
def slices(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "slices"
    folder.mkdir()
    return [
        save(ct(head(12, False, seed=n), 12, position=(0, 0, 5.0 * n), instance_number=n), folder / f"{n:03}.dcm")
        for n in range(1, 21)
    ]


def storescu(server: Any, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run(tool("storescu"), "-aet", "SCANNER", "-aec", "SCANSIDE", "127.0.0.1", server.port, *arguments)


# DCMTK, syntax by syntax

ENCODED = {
    "explicit": (["dcmconv", "+te"], ["-xe"]),
    "implicit": (["dcmconv", "+ti"], ["-xi"]),
    "big endian": (["dcmconv", "+tb"], ["-xb"]),
    "deflated": (["dcmconv", "+td"], ["-xd"]),
    "rle": (["dcmcrle"], ["-xr"]),
    "jpeg lossless": (["dcmcjpeg", "+e1"], ["-xs"]),
    "jpeg-ls": (["dcmcjpls", "+el"], ["-xt"]),
}


@interop
@pytest.mark.parametrize("name", ENCODED)
def test_storescu_in_each_syntax(tmp_path: Path, slices: list[Path], name: str) -> None:
    encode, option = ENCODED[name]
    source = tmp_path / "source.dcm"
    run(tool(encode[0]), *encode[1:], slices[0], source)
    recorder = Recorder()
    with serving(recorder) as server:
        tap = Tap(server.port)
        run(tool("storescu"), "-aet", "SCANNER", "-aec", "SCANSIDE", *option, "127.0.0.1", tap.port, source)
        recorder.wait(received=1, closed=1)

    (received,) = recorder.received
    expected = dcmread(source)
    assert received.transfer_syntax_uid == expected.file_meta.TransferSyntaxUID
    assert (received.sop_class_uid, received.sop_instance_uid) == (expected.SOPClassUID, expected.SOPInstanceUID)
    assert (received.calling_ae, received.called_ae, received.address) == ("SCANNER", "SCANSIDE", "127.0.0.1")
    assert [data_set(received.part10)] == tap.data_sets()  # the bytes on the wire, bit for bit
    stored = dcmread(BytesIO(received.part10))
    assert stored.PixelData == expected.PixelData
    assert stored.file_meta.MediaStorageSOPInstanceUID == expected.SOPInstanceUID
    assert read_header(received.part10).sop_instance_uid == expected.SOPInstanceUID
    assert recorder.closed_calls[0].outcome == "released"


@interop
def test_what_is_kept_is_a_valid_part_10_file(tmp_path: Path, slices: list[Path]) -> None:
    recorder = Recorder()
    with serving(recorder) as server:
        storescu(server, slices[0])
        storescu(server, slices[0])
    first, second = recorder.received
    assert first.part10 == second.part10
    assert first.association != second.association
    (tmp_path / "kept.dcm").write_bytes(first.part10)
    dump = run(tool("dcmdump"), "-q", tmp_path / "kept.dcm").stdout
    assert "[SCANSIDE_0_1]" in dump
    run(tool("dcmftest"), tmp_path / "kept.dcm")


@interop
def test_dcmsend_sends_a_whole_folder(philips_phantom: Path) -> None:
    """Scout, thick and thin series, captures; the directory files among them are no business of ours."""
    recorder = Recorder()
    with serving(recorder) as server:
        folders = [philips_phantom / name for name in ("S1000", "S2010", "S4010")]
        run(tool("dcmsend"), "-aec", "SCANSIDE", "+sd", "+sp", "I*", "127.0.0.1", server.port, *folders)
        recorder.wait(closed=1)
    assert len({r.sop_instance_uid for r in recorder.received}) == len(recorder.received) == 35


@interop
def test_echoscu(tmp_path: Path) -> None:
    recorder = Recorder()
    with serving(recorder) as server:
        run(tool("echoscu"), "-aec", "SCANSIDE", "127.0.0.1", server.port)
        recorder.wait(closed=1)
    assert recorder.received == []
    assert len(recorder.opened_calls) == 1


@interop
def test_many_senders_at_once(slices: list[Path]) -> None:
    recorder = Recorder()
    with serving(recorder) as server:
        command = [tool("storescu"), "-aec", "SCANSIDE", "--repeat", "3", "127.0.0.1", str(server.port)]
        senders = [subprocess.Popen([*command, *map(str, slices)]) for _ in range(4)]
        assert [sender.wait(60) for sender in senders] == [0] * 4
        recorder.wait(received=4 * 3 * 20, closed=4)
    assert len(recorder.received) == 240
    assert [c.outcome for c in recorder.closed_calls] == ["released"] * 4
    assert sorted(c.association for c in recorder.closed_calls) == sorted(o.number for o in recorder.opened_calls)


@interop
def test_an_association_that_the_sender_aborts(slices: list[Path]) -> None:
    recorder = Recorder()
    with serving(recorder) as server:
        subprocess.run(
            [tool("storescu"), "--abort", "-aec", "SCANSIDE", "127.0.0.1", str(server.port), *map(str, slices[:3])],
            capture_output=True,
            timeout=30,
        )
        recorder.wait(received=3, closed=1)
    assert [c.outcome for c in recorder.closed_calls] == ["aborted"]


@interop
def test_a_sender_that_is_killed_amid_its_transfer(slices: list[Path]) -> None:
    recorder = Recorder()
    with serving(recorder) as server:
        command = [tool("storescu"), "-aec", "SCANSIDE", "--repeat", "1000", "127.0.0.1", str(server.port)]
        sender = subprocess.Popen([*command, *map(str, slices)])
        recorder.wait(received=5)
        os.kill(sender.pid, signal.SIGKILL)
        sender.wait(10)
        recorder.wait(closed=len(recorder.opened_calls))
    assert [c.outcome for c in recorder.closed_calls][-1] == "broken"
    assert len(recorder.closed_calls) == len(recorder.opened_calls)


@interop
def test_the_status_of_the_handler_reaches_the_sender(slices: list[Path]) -> None:
    with serving(Recorder(status=0xA700)) as server:
        done = subprocess.run(
            [tool("storescu"), "-v", "-aec", "SCANSIDE", "127.0.0.1", str(server.port), str(slices[0])],
            capture_output=True,
            text=True,
            timeout=30,
        )
    assert "OutOfResources" in done.stdout + done.stderr


# pynetdicom as the peer, where the peer must do what no honest tool does


class _Peer:
    """An association to a server."""

    def __init__(self, port: int, *contexts: tuple[str, list[str]], calling: str = "PEER", called: str = "SCANSIDE"):
        ae = AE(ae_title=calling)
        ae.acse_timeout = ae.dimse_timeout = 5
        for uid, syntaxes in contexts or ((CTImageStorage, [ExplicitVRLittleEndian]),):
            ae.add_requested_context(uid, syntaxes)
        rejections: list[Any] = []
        handlers = [
            (evt.EVT_PDU_RECV, lambda e: rejections.append(e.pdu) if isinstance(e.pdu, A_ASSOCIATE_RJ) else None)
        ]
        self.association = ae.associate("127.0.0.1", port, ae_title=called, evt_handlers=handlers)
        if rejections:  # pynetdicom takes a peer that rejects at once for one that could not be reached
            self.association.is_rejected = True
            self.association.acceptor.primitive = rejections[0].to_primitive()

    def __enter__(self) -> Any:
        return self.association

    def __exit__(self, *_: object) -> None:
        self.association.release()


def store(association: Any, path: Path) -> int | None:
    status = association.send_c_store(dcmread(path)).get("Status")
    return None if status is None else int(status)


def test_every_class_and_syntax_is_accepted_and_no_other() -> None:
    with serving(Recorder()) as server:
        for uid in STORAGE_CLASSES:
            with _Peer(server.port, *((uid, [syntax]) for syntax in TRANSFER_SYNTAXES)) as peer:
                assert len(peer.accepted_contexts) == len(TRANSFER_SYNTAXES)
        contexts = (Verification, ["1.2.840.10008.1.2"]), (MR, [ExplicitVRLittleEndian]), (CTImageStorage, ["1.2.3.4"])
        with _Peer(server.port, *contexts) as peer:
            assert [(cx.abstract_syntax, cx.result) for cx in peer.rejected_contexts] == [(MR, 3), (CTImageStorage, 4)]


def test_a_site_may_take_more_classes(slices: list[Path]) -> None:
    with (
        serving(Recorder(), storage_classes=(*STORAGE_CLASSES, str(MR))) as server,
        _Peer(server.port, (MR, [ExplicitVRLittleEndian])) as peer,
    ):
        assert [str(cx.abstract_syntax) for cx in peer.accepted_contexts] == [str(MR)]


def test_explicit_is_chosen_before_implicit_and_before_compression() -> None:
    with serving(Recorder()) as server:
        for proposed in (TRANSFER_SYNTAXES, tuple(reversed(TRANSFER_SYNTAXES))):
            with _Peer(server.port, (CTImageStorage, list(proposed))) as peer:
                assert peer.accepted_contexts[0].transfer_syntax == [ExplicitVRLittleEndian]
        assert PLAIN_SYNTAXES[:2] == (ExplicitVRLittleEndian, "1.2.840.10008.1.2")


def test_success_is_answered_only_after_the_handler_returns(slices: list[Path]) -> None:
    release = threading.Event()

    class Slow(Recorder):
        def stored(self, received: Received) -> int:
            assert release.wait(10)
            return super().stored(received)

    recorder = Slow()
    with serving(recorder) as server, _Peer(server.port) as peer:
        answers: list[int | None] = []
        sender = threading.Thread(target=lambda: answers.append(store(peer, slices[0])))
        sender.start()
        time.sleep(0.3)
        assert answers == []
        release.set()
        sender.join(10)
        assert answers == [0x0000]


def test_a_sink_sees_what_comes_before_all_of_it_came(tmp_path: Path) -> None:
    dataset = ct(head(12, False), 12)
    dataset.private_block(0x0029, "TEST", create=True).add_new(1, "OB", bytes(range(256)) * 12_000)
    large = save(dataset, tmp_path / "large.dcm")
    recorder = Recorder()
    with serving(recorder) as server, _Peer(server.port) as peer:
        assert store(peer, large) == 0x0000
    assert data_set(recorder.received[0].part10) == data_set(large.read_bytes())
    assert recorder.looked_at > 2_000_000


def test_a_sink_that_refuses_what_it_looks_at_is_heard(slices: list[Path], tmp_path: Path) -> None:
    class Keen:
        def arrived(self, data: memoryview) -> None:
            raise Refusal(0xA900, "not this one")

        def write(self, data: memoryview) -> None:
            raise AssertionError("it was given away")

        def commit(self) -> None:
            raise AssertionError("it was given away")

        def discard(self) -> None:
            recorder.discarded += 1

    class Picky(Recorder):
        def receive(self, session: Session, request: StoreRequest) -> Sink | Answer:
            return Keen() if request.sop_instance_uid == dataset.SOPInstanceUID else super().receive(session, request)

    dataset = ct(head(12, False), 12)
    dataset.private_block(0x0029, "TEST", create=True).add_new(1, "OB", bytes(3_000_000))
    large = save(dataset, tmp_path / "large.dcm")
    recorder = Picky()
    with serving(recorder) as server, _Peer(server.port) as peer:
        assert [store(peer, path) for path in (large, slices[0])] == [0xA900, 0x0000]
    assert [status for status, _ in recorder.refused_calls] == [0xA900]
    assert recorder.discarded == 1


def test_a_handler_that_fails_fails_the_instance_only(slices: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Recorder):
        def stored(self, received: Received) -> int:
            super().stored(received)
            if len(self.received) == 2:
                raise OSError("disk full")
            return 0x0000

        def closed(self, session: Any, outcome: Any, stores: int) -> None:
            super().closed(session, outcome, stores)
            raise RuntimeError("cannot say so")

    recorder = Failing()
    with serving(recorder) as server:
        with _Peer(server.port) as peer:
            assert [store(peer, path) for path in slices[:3]] == [0x0000, 0xC000, 0x0000]
        with _Peer(server.port) as peer:
            assert store(peer, slices[3]) == 0x0000
        recorder.wait(closed=2)
    assert [status for status, _ in recorder.refused_calls] == [0xC000]
    assert sorted(one.stores for one in recorder.closed_calls) == [1, 3]
    assert "disk full" in caplog.text and "cannot say so" in caplog.text


def test_an_association_that_cannot_be_recorded_is_rejected_for_now() -> None:
    class Refusing(Recorder):
        def opened(self, session: Any) -> None:
            super().opened(session)
            raise OSError("no ledger")

    recorder = Refusing()
    with serving(recorder) as server:
        peer = _Peer(server.port).association
        assert peer.is_rejected
        assert peer.acceptor.primitive.result == 0x02  # transient
    assert (recorder.received, recorder.closed_calls) == ([], [])
    assert recorder.rejected_calls == [("127.0.0.1", "PEER", "temporary congestion")]


def test_a_command_that_belies_its_context_or_names_no_uid(slices: list[Path]) -> None:
    recorder = Recorder()
    with serving(recorder) as server, _Peer(server.port) as peer:
        for class_uid, instance_uid, expected in (
            (MRImageStorage, "1.2.3", 0x0122),
            (CTImageStorage, "1.2.../x", 0x0117),
            (CTImageStorage, "1.2.3", 0x0000),
        ):
            assert low_level_store(peer, class_uid, instance_uid, data_set_of(slices[0])) == expected
    assert [r.sop_instance_uid for r in recorder.received] == ["1.2.3"]
    size = len(data_set_of(slices[0]))
    assert recorder.refused_calls == [(0x0122, size), (0x0117, size)]


def data_set_of(path: Path) -> bytes:
    return data_set(path.read_bytes())


def low_level_store(association: Any, class_uid: str, instance_uid: str, data: bytes) -> int:
    from pynetdicom.dimse_primitives import C_STORE

    request = C_STORE()
    request.MessageID, request.Priority = 7, 2
    request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = class_uid, instance_uid
    request.DataSet = BytesIO(data)
    association._reactor_checkpoint.clear()
    time.sleep(0.05)
    association.dimse.send_msg(request, 1)
    _, answer = association.dimse.get_msg(block=True)
    association._reactor_checkpoint.set()
    return int(answer.Status)


def test_who_may_call(slices: list[Path]) -> None:
    with serving(Recorder(), accepted_calling=("SCANNER", "OTHER"), require_called=True) as server:
        for calling, called, accepted in (
            ("SCANNER", "SCANSIDE", True),
            ("OTHER", "SCANSIDE", True),
            ("STRANGER", "SCANSIDE", False),
            ("SCANNER", "ANY", False),
        ):
            peer = _Peer(server.port, calling=calling, called=called).association
            assert (peer.is_established, peer.is_rejected) == (accepted, not accepted)
            peer.release()


def test_one_association_too_many_is_rejected_for_now(slices: list[Path]) -> None:
    recorder = Recorder()
    with serving(recorder, maximum_associations=2) as server:
        first, second = _Peer(server.port), _Peer(server.port)
        third = _Peer(server.port).association
        assert third.is_rejected
        assert third.acceptor.primitive.result == 0x02  # transient
        first.association.release()
        recorder.wait(closed=1)
        with _Peer(server.port) as peer:
            assert store(peer, slices[0]) == 0x0000
        second.association.release()
        recorder.wait(closed=3)


def test_a_silent_peer_is_aborted() -> None:
    recorder = Recorder()
    with serving(recorder, idle_seconds=0.5) as server:
        peer = _Peer(server.port)
        recorder.wait(closed=1, seconds=5)
        if peer.association.is_alive():
            peer.association.join(5)
        assert peer.association.is_aborted
    assert recorder.closed_calls[0].outcome == "aborted"


# Peers by hand


def association_request(calling: bytes = b"RAW", context: bytes = CTImageStorage.encode()) -> bytes:
    """An A-ASSOCIATE-RQ with one presentation context in Explicit VR Little Endian (PS3.8 9.3.2)."""

    def item(kind: int, body: bytes) -> bytes:
        return struct.pack(">BxH", kind, len(body)) + body

    presentation = b"\1\0\0\0" + item(0x30, context) + item(0x40, ExplicitVRLittleEndian.encode())
    user = item(0x51, struct.pack(">I", 16384)) + item(0x52, b"1.2.3")
    body = (
        struct.pack(">HH", 1, 0) + b"SCANSIDE".ljust(16) + calling.ljust(16) + bytes(32)
        + item(0x10, b"1.2.840.10008.3.1.1.1") + item(0x20, presentation) + item(0x50, user)
    )  # fmt: skip
    return struct.pack(">BxI", 1, len(body)) + body


def connected(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=5)
    connection.sendall(association_request())
    assert connection.recv(1) == b"\2"  # A-ASSOCIATE-AC
    return connection


def is_closed(connection: socket.socket, seconds: float) -> bool:
    connection.settimeout(seconds)
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize(
    "junk",
    [b"GET / HTTP/1.1\r\n\r\n", bytes(100), b"\x01\0\xff\xff\xff\xff" + bytes(100), b"\x04\0\0\0\0\x04\0\0\0\x02\1\3"],
    ids=["http", "zeros", "an endless request", "data before a request"],
)
def test_what_is_no_association_request_is_hung_up_on(junk: bytes, slices: list[Path]) -> None:
    recorder = Recorder()
    with serving(recorder, maximum_associations=1, idle_seconds=0.5) as server:
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(junk)
        assert is_closed(connection, 5)
        deadline = time.monotonic() + 2  # it no longer counts as an association
        while not (peer := _Peer(server.port).association).is_established:
            assert time.monotonic() < deadline
        assert store(peer, slices[0]) == 0x0000
        peer.release()
    assert len(recorder.opened_calls) == 1


def test_a_pdu_of_absurd_length_ends_its_association() -> None:
    recorder = Recorder()
    with serving(recorder) as server:
        connection = connected(server.port)
        connection.sendall(b"\x04\0\xf0\0\0\0" + bytes(1000))
        assert is_closed(connection, 5)
        recorder.wait(closed=1)
    assert recorder.closed_calls[0].outcome == "aborted"


def test_an_instance_of_absurd_length_ends_its_association(slices: list[Path], tmp_path: Path) -> None:
    large = save(ct(head(12, False, frames=4)[:1].repeat(4, axis=1), 12), tmp_path / "large.dcm")
    recorder = Recorder()
    with serving(recorder, maximum_instance_bytes=8_000) as server, _Peer(server.port) as peer:
        assert [store(peer, path) for path in [*slices[:5], large]] == [0x0000] * 5 + [None]
        recorder.wait(closed=1)
    assert recorder.closed_calls[0].outcome == "aborted"


def test_an_abort_that_comes_while_the_association_is_recorded_is_an_abort() -> None:
    class Slow(Recorder):
        def opened(self, *arguments: Any) -> None:
            time.sleep(0.5)
            super().opened(*arguments)

    recorder = Slow()
    with serving(recorder) as server:
        _Peer(server.port).association.abort()
        recorder.wait(opened=1, closed=1)
    assert recorder.closed_calls[0].outcome == "aborted"


def test_a_peer_that_stops_amid_a_pdu_is_given_up() -> None:
    recorder = Recorder()
    with serving(recorder, idle_seconds=0.5) as server:
        connection = connected(server.port)
        connection.sendall(b"\x04\0\0\0\x10\0" + bytes(100))
        recorder.wait(closed=1, seconds=5)
        connection.close()
    assert recorder.closed_calls[0].outcome == "aborted"


def test_a_connection_that_breaks(slices: list[Path]) -> None:
    recorder = Recorder()
    with serving(recorder) as server:
        connected(server.port).close()
        recorder.wait(closed=1)
    assert recorder.closed_calls[0].outcome == "broken"


# Stopping


def test_a_stop_waits_for_transfers_and_reports_every_end(slices: list[Path]) -> None:
    class Slow(Recorder):
        def stored(self, received: Received) -> int:
            time.sleep(0.3)
            return super().stored(received)

    recorder = Slow()
    server = start_server(ServerOptions("SCANSIDE"), [Listener("127.0.0.1", 0)], recorder)
    peer = _Peer(server.port)
    answers: list[int | None] = []

    def send() -> None:
        answers.append(store(peer.association, slices[0]))
        peer.association.release()

    sender = threading.Thread(target=send)
    sender.start()
    time.sleep(0.1)
    server.stop(5)
    sender.join(5)
    assert answers == [0x0000]
    assert [c.outcome for c in recorder.closed_calls] == ["released"]


def test_a_stop_aborts_what_does_not_end() -> None:
    before = set(threading.enumerate())  # peers of other tests may end meanwhile
    recorder = Recorder()
    server = start_server(ServerOptions("SCANSIDE"), [Listener("127.0.0.1", 0)], recorder)
    idle = _Peer(server.port)
    stuck = connected(server.port)
    stuck.sendall(b"\x04\0\0\0\x10\0" + bytes(100))
    recorder.wait(opened=2)
    started = time.monotonic()
    server.stop(0.3)
    assert time.monotonic() - started < 4
    assert len(recorder.closed_calls) == 2  # at the return of stop, not some time later
    assert sorted(c.outcome for c in recorder.closed_calls) == ["aborted", "aborted"]
    ours = [one for one in set(threading.enumerate()) - before if one.name.startswith(("accept", "association-"))]
    assert not ours
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", server.port), timeout=1)
    stuck.close()
    idle.association.abort()


def test_an_address_in_use_says_so() -> None:
    with serving(Recorder()) as server, pytest.raises(ScansideError, match="cannot listen") as caught:
        start_server(ServerOptions("SCANSIDE"), [Listener("127.0.0.1", server.port)], Recorder())
    assert caught.value.where == f"127.0.0.1:{server.port}"


@pytest.mark.parametrize("title", ["", "SEVENTEEN-LETTERS", "Ä", "A\\B"])
def test_what_is_no_ae_title(title: str) -> None:
    with pytest.raises(ScansideError, match=r"AE title"):
        start_server(ServerOptions(title), [Listener("127.0.0.1", 0)], Recorder())
