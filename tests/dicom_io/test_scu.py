"""The storage user against DCMTK's receiver and our own, and against peers that fail it."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, MRImageStorage
from pynetdicom import AE, AllStoragePresentationContexts, evt
from pynetdicom.acse import ACSE
from pynetdicom.association import Association

from dicom_io.errors import NotAccepted, PeerError
from dicom_io.scu import Peer, SendResult, echo, instances_in, send
from tests.dicom_io.support import Received, Recorder, ct, data_set, head, run, save, serving
from tests.peers import program as tool

interop = pytest.mark.interop


@pytest.fixture
def slices(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "slices"
    folder.mkdir()
    return [
        save(ct(head(12, False, seed=n), 12, position=(0, 0, 5.0 * n), instance_number=n), folder / f"{n:03}.dcm")
        for n in range(1, 13)
    ]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def ours(port: int) -> Peer:
    return Peer("SCANSIDE", "127.0.0.1", port)


@contextmanager
def storescp(folder: Path, *options: str) -> Iterator[Peer]:
    """DCMTK's receiver, which keeps what it gets bit for bit."""
    folder.mkdir()
    port = free_port()
    command = [tool("storescp"), "-aet", "PACS", "+B", "-od", str(folder), *options, str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peer = Peer("PACS", "127.0.0.1", port)
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                echo(peer, "TEST", timeout=2)
                break
            except PeerError:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.05)
        yield peer
    finally:
        process.kill()
        process.wait()


@contextmanager
def pynetdicom_scp(handler: Any, contexts: list[Any]) -> Iterator[Peer]:
    ae = AE(ae_title="PACS")
    ae.supported_contexts = contexts
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, handler)])
    try:
        yield Peer("PACS", "127.0.0.1", server.server_address[1])
    finally:
        for association in server.active_associations:
            association.abort()
        server.shutdown()


def outcomes(results: list[SendResult]) -> list[tuple[int | None, str]]:
    return [(result.status, result.error) for result in results]


@interop
@pytest.mark.parametrize(
    "encode",
    [["dcmconv", "+te"], ["dcmconv", "+ti"], ["dcmconv", "+tb"], ["dcmconv", "+td"], ["dcmcrle"],
     ["dcmcjpeg", "+e1"], ["dcmcjpls", "+el"]],
    ids=" ".join,
)  # fmt: skip
def test_storescp_gets_the_bytes_as_they_are(tmp_path: Path, slices: list[Path], encode: list[str]) -> None:
    source = tmp_path / "source.dcm"
    run(tool(encode[0]), *encode[1:], slices[0], source)
    whole = source.read_bytes()
    padding = bytes(len(whole) % 2)  # dcmconv leaves a deflated data set odd; it is padded on its way (PS3.5 A.5)
    with storescp(tmp_path / "got", "+xa") as peer:
        (result,) = send([source], peer, "SENDER")
        assert (result.status, result.error) == (0, "")
        assert result.sop_instance_uid == dcmread(source).SOPInstanceUID
    (got,) = (tmp_path / "got").iterdir()
    assert dcmread(got).file_meta.TransferSyntaxUID == dcmread(source).file_meta.TransferSyntaxUID
    assert data_set(got.read_bytes()) == data_set(whole) + padding


@interop
def test_a_peer_that_knows_only_the_default_syntax(tmp_path: Path, slices: list[Path]) -> None:
    """What is not compressed is converted; what is compressed stays here, and the result says why."""
    compressed = tmp_path / "compressed.dcm"
    run(tool("dcmcjpls"), "+el", slices[1], compressed)
    with storescp(tmp_path / "got", "+xi") as peer:
        results = send([slices[0], compressed], peer, "SENDER")
    assert outcomes(results) == [
        (0, ""),
        (None, "the peer does not accept CT Image Storage in JPEG-LS Lossless Image Compression"),
    ]
    (got,) = (tmp_path / "got").iterdir()
    assert dcmread(got).file_meta.TransferSyntaxUID == ImplicitVRLittleEndian
    assert dcmread(got).PixelData == dcmread(slices[0]).PixelData


@interop
def test_the_whole_phantom_arrives(tmp_path: Path, philips_phantom: Path) -> None:
    files, skipped = instances_in(philips_phantom)
    assert len(files) == 175
    assert [path.name for path, _ in skipped] == ["DIRFILE"] * 5
    recorder = Recorder()
    sent: list[SendResult] = []
    with serving(recorder) as server:
        results = send(files, ours(server.port), "SENDER", on_sent=sent.append)
    assert results == sent
    assert set(outcomes(results)) == {(0, "")}
    assert [r.sop_instance_uid for r in recorder.received] == [r.sop_instance_uid for r in results]
    assert len({r.association for r in recorder.received}) == 1
    for received, path in zip(recorder.received, files, strict=True):
        assert data_set(received.part10) == data_set(path.read_bytes())


def test_echo() -> None:
    recorder = Recorder()
    with serving(recorder) as server:
        echo(ours(server.port), "SENDER")
        recorder.wait(closed=1)
    assert [session.calling_ae for session in recorder.opened_calls] == ["SENDER"]
    assert [closed.outcome for closed in recorder.closed_calls] == ["released"]
    assert recorder.received == []


def test_what_is_no_instance_is_skipped_with_its_reason(tmp_path: Path, slices: list[Path]) -> None:
    (slices[0].parent / "deeper").mkdir()
    shutil.copy(slices[0], slices[0].parent / "deeper" / "000")
    (slices[0].parent / "README.txt").write_text("not an image")
    (slices[0].parent / "empty").touch()
    slices[2].write_bytes(slices[2].read_bytes() + b"x")
    mislabelled = dcmread(slices[1])
    mislabelled.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    mislabelled.save_as(slices[1])

    found, skipped = instances_in(slices[0].parent)

    assert found == [slices[0], *slices[3:], slices[0].parent / "deeper" / "000"]
    reasons = {path.name: reason for path, reason in skipped}
    assert reasons.keys() == {"README.txt", "empty", "002.dcm", "003.dcm"}
    assert "not a DICOM Part 10 file" in reasons["README.txt"]
    assert "names another instance" in reasons["002.dcm"]
    assert "odd number of bytes" in reasons["003.dcm"]


def test_results_come_in_the_order_of_the_files(tmp_path: Path, slices: list[Path]) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("no DICOM")
    files = [slices[0], notes, slices[1], tmp_path / "absent.dcm"]
    with serving(Recorder()) as server:
        results = send(iter(files), ours(server.port), "SENDER")
    assert [r.path for r in results] == files
    assert [r.status for r in results] == [0, None, 0, None]
    assert [bool(r.error) for r in results] == [False, True, False, True]
    assert [bool(r.sop_instance_uid) for r in results] == [True, False, True, False]


def test_nothing_to_send_needs_no_peer(tmp_path: Path) -> None:
    assert send([], Peer("NOBODY", "127.0.0.1", free_port()), "SENDER") == []


def test_statuses_are_told_apart(slices: list[Path]) -> None:
    answers = iter([0x0000, 0xB007, 0xA700, 0xC123])
    with pynetdicom_scp(lambda _: next(answers), AllStoragePresentationContexts) as peer:
        results = send(slices[:4], peer, "SENDER")
    assert [r.status for r in results] == [0x0000, 0xB007, 0xA700, 0xC123]
    assert [r.error for r in results] == [
        "",
        "",
        "the peer answered 0xA700 (Failure)",
        "the peer answered 0xC123 (Failure)",
    ]


def test_a_class_that_the_peer_does_not_take(tmp_path: Path, slices: list[Path]) -> None:
    mr = save(ct(head(12, False), 12, SOPClassUID=MRImageStorage), tmp_path / "mr.dcm")
    with serving(Recorder()) as server:
        results = send([mr, slices[0]], ours(server.port), "SENDER")
        assert outcomes(results) == [
            (None, "the peer does not accept MR Image Storage in Explicit VR Little Endian"),
            (0, ""),
        ]
        with pytest.raises(NotAccepted, match="accepts none of what was proposed"):
            send([mr], ours(server.port), "SENDER")


def test_more_contexts_than_one_association_has_room_for(tmp_path: Path) -> None:
    classes = [cx.abstract_syntax for cx in AllStoragePresentationContexts[:100]]
    files = [save(ct(head(12, False), 12, SOPClassUID=uid), tmp_path / f"{n}.dcm") for n, uid in enumerate(classes)]
    seen: set[Any] = set()

    def stored(event: Any) -> int:
        seen.add(event.assoc)
        return 0x0000

    contexts = AllStoragePresentationContexts
    for context in contexts:
        context.transfer_syntax = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]
    with pynetdicom_scp(stored, contexts) as peer:
        assert set(outcomes(send(files, peer, "SENDER"))) == {(0, "")}
    assert len(seen) == 2


def test_a_rejection_that_comes_at_once_is_a_rejection(monkeypatch: pytest.MonkeyPatch) -> None:
    """pynetdicom looks whether it is connected after it has sent its request; by then it may not be any more."""
    send_request = ACSE.send_request

    def slowly(self: Any) -> None:
        send_request(self)
        time.sleep(0.5)

    monkeypatch.setattr(ACSE, "send_request", slowly)
    with (
        serving(Recorder(), accepted_calling=["SCANNER"]) as server,
        pytest.raises(PeerError, match=r"rejected the association.*[Cc]alling"),
    ):
        echo(ours(server.port), "SENDER")


@pytest.mark.parametrize("action", [echo, lambda *a, **k: send([k.pop("file")], *a, **k)], ids=["echo", "send"])
def test_peers_that_cannot_be_had(slices: list[Path], action: Any) -> None:
    extra = {} if action is echo else {"file": slices[0]}
    with pytest.raises(PeerError, match="cannot be reached") as caught:
        action(Peer("NOBODY", "127.0.0.1", free_port()), "SENDER", **extra)
    assert caught.value.where.startswith("NOBODY@127.0.0.1:")
    with pytest.raises(PeerError, match="no association"):
        action(Peer("NOBODY", "nowhere.invalid", 104), "SENDER", **extra)
    rejected = pytest.raises(PeerError, match=r"rejected the association.*[Cc]alling")
    with serving(Recorder(), accepted_calling=["SCANNER"]) as server, rejected:
        action(ours(server.port), "SENDER", **extra)
    # One that accepts the connection and says nothing:
    with socket.create_server(("127.0.0.1", 0)) as mute, pytest.raises(PeerError, match="did not answer"):
        action(Peer("MUTE", "127.0.0.1", mute.getsockname()[1]), "SENDER", timeout=0.5, **extra)


class _Moody(Recorder):
    """Answers the given calls, counted from 0, too late or with an abort."""

    def __init__(self, late: set[int]) -> None:
        super().__init__()
        self.late = late
        self.calls = 0

    def stored(self, received: Received) -> int:
        call, self.calls = self.calls, self.calls + 1
        if call in self.late:
            time.sleep(1.5)
        return super().stored(received)


def test_a_lost_answer_is_followed_by_one_more_try(slices: list[Path]) -> None:
    recorder = _Moody({1})
    with serving(recorder) as server:
        results = send(slices[:4], ours(server.port), "SENDER", timeout=0.7)
        recorder.wait(closed=2)
    assert set(outcomes(results)) == {(0, "")}
    assert len({r.association for r in recorder.received}) == 2
    assert sorted(c.outcome for c in recorder.closed_calls) == ["aborted", "released"]


def test_a_peer_that_no_longer_answers_is_left_alone(slices: list[Path]) -> None:
    recorder = _Moody({1, 2, 3, 4})
    started = time.monotonic()
    with serving(recorder) as server:
        peer = ours(server.port)
        results = send(slices[:5], peer, "SENDER", timeout=0.5)
        assert time.monotonic() - started < 4
    lost = f"no answer from {peer} within 0.5 s, twice"
    assert outcomes(results) == [(0, ""), (None, lost)] + [(None, f"not tried: {lost}")] * 3


def test_a_peer_that_aborts_is_tried_again(slices: list[Path]) -> None:
    calls: list[Any] = []

    def stored(event: Any) -> int:
        calls.append(event.assoc)
        if len(calls) == 2:
            event.assoc.abort()
        return 0x0000

    with pynetdicom_scp(stored, AllStoragePresentationContexts) as peer:
        assert set(outcomes(send(slices[:4], peer, "SENDER", timeout=5))) == {(0, "")}
    assert len(calls) == 5


def test_an_instance_that_a_peer_always_aborts_on_does_not_hold_up_the_others(slices: list[Path]) -> None:
    poison = dcmread(slices[1]).SOPInstanceUID

    def stored(event: Any) -> int:
        if event.request.AffectedSOPInstanceUID == poison:
            event.assoc.abort()
        return 0x0000

    with pynetdicom_scp(stored, AllStoragePresentationContexts) as peer:
        results = send(slices[:4], peer, "SENDER", timeout=5)
    ended = f"{peer} ended the association instead of an answer, twice"
    assert outcomes(results) == [(0, ""), (None, ended), (0, ""), (0, "")]


def test_a_peer_that_goes_away_is_a_result_not_an_exception(slices: list[Path]) -> None:
    with serving(Recorder()) as server:
        peer = ours(server.port)

        def stop(result: SendResult) -> None:
            if result.path == slices[1]:
                server.stop(0)

        results = send(slices[:4], peer, "SENDER", on_sent=stop, timeout=5)
    assert [r.status for r in results] == [0, 0, None, None]
    assert "cannot be reached" in results[2].error
    assert results[3].error.startswith("not tried: ")


def test_answers_are_not_lost_to_the_reactor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pynetdicom's reactor thread takes an answer in some thousands; here it never pauses, so it takes most."""
    original = Association.__init__

    def restless(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        self._reactor_checkpoint.clear = lambda: None

    small = save(ct(head(12, False)[:, :4, :4], 12), tmp_path / "small.dcm")
    with serving(Recorder()) as server:
        monkeypatch.setattr(Association, "__init__", restless)
        monkeypatch.setattr(Association, "_is_paused", property(lambda _: True, lambda *_: None), raising=False)
        started = time.monotonic()
        results = send([small] * 40, ours(server.port), "SENDER", timeout=5)
    assert set(outcomes(results)) == {(0, "")}
    assert time.monotonic() - started < 5


@interop
def test_small_messages_do_not_wait_for_delayed_acknowledgements(tmp_path: Path) -> None:
    """DCMTK sends an answer in two pieces and the second only after the first is acknowledged."""
    small = save(ct(head(12, False)[:, :4, :4], 12), tmp_path / "small.dcm")
    with storescp(tmp_path / "got", "--ignore") as peer:
        started = time.monotonic()
        assert set(outcomes(send([small] * 50, peer, "SENDER"))) == {(0, "")}
        assert time.monotonic() - started < 1.9  # over 2 s if each waits its 40 ms


@pytest.mark.slow
def test_a_peer_that_stops_reading_does_not_hold_the_sender_for_ever(tmp_path: Path) -> None:
    large = ct(head(12, False), 12)
    large.PixelData = bytes(24 << 20)
    path = save(large, tmp_path / "large.dcm")
    done: list[list[SendResult]] = []

    def turn_deaf(event: Any) -> None:
        event.assoc.dul._is_transport_event = lambda: False

    ae = AE()
    ae.supported_contexts = AllStoragePresentationContexts
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_ESTABLISHED, turn_deaf)])
    try:
        peer = Peer("DEAF", "127.0.0.1", server.server_address[1])
        sender = threading.Thread(target=lambda: done.append(send([path], peer, "SENDER", timeout=1.0)), daemon=True)
        sender.start()
        sender.join(30)
        assert not sender.is_alive()
    finally:
        for association in server.active_associations:
            association.dul.socket.close()
        server.shutdown()
    (results,) = done
    assert results[0].error
