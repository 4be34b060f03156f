"""The replay sender and the sink: what they say on the wire is what pynetdicom says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pynetdicom import AE, evt
from pynetdicom.sop_class import CTImageStorage

from appliance.bench.contestants import CONTESTANTS, Receiver
from appliance.bench.senders import shares
from appliance.bench.slices import PIXEL_BYTES, Slice, make
from dicom_io.header import read_header
from dicom_io.scu import send

EXPLICIT = "1.2.840.10008.1.2.1"


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> list[Slice]:
    return make(tmp_path_factory.mktemp("slices"), 5)


@pytest.fixture
def sink(tmp_path: Path) -> Iterator[Receiver]:
    (contestant,) = [one for one in CONTESTANTS if one.name == "sink"]
    receiver = contestant.start(tmp_path)
    yield receiver
    receiver.process.stop()


def replay(port: int, called: str, lists: list[Path]) -> dict[str, Any]:
    command = [sys.executable, "-m", "appliance.bench.replay", "127.0.0.1", str(port), "BENCH", called, *lists]
    done = subprocess.run(command, input="go\n", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    ready, told = done.stdout.splitlines()
    assert ready == "ready"
    return json.loads(told)  # type: ignore[no-any-return]


def listed(folder: Path, share: list[Slice]) -> Path:
    path = folder / f"{share[0].uid}.txt"
    path.write_text("\n".join(str(one.path) for one in share))
    return path


def test_slices_are_distinct_ct_images_of_one_series(slices: list[Slice]) -> None:
    headers = [read_header(one.path) for one in slices]
    assert [header.sop_instance_uid for header in headers] == [one.uid for one in slices]
    assert len({header.sop_instance_uid for header in headers}) == 5
    assert len({header.series_instance_uid for header in headers}) == 1
    assert headers[0].problems == ()
    assert len({one.pixels() for one in slices}) == 5
    one = dcmread(slices[0].path)
    assert slices[0].pixels() == one.PixelData
    assert (one.pixel_array.shape, len(one.PixelData)) == ((512, 512), PIXEL_BYTES)


def test_every_slice_is_in_one_share(slices: list[Slice]) -> None:
    dealt = shares(slices, 2)
    assert [len(share) for share in dealt] == [3, 2]
    assert {one.uid for share in dealt for one in share} == {one.uid for one in slices}
    assert len(shares(slices, 16)) == 5


@pytest.mark.parametrize("longest", [16_382, 4_096, 131_072, 0])
def test_pynetdicom_receives_exactly_what_replay_sends(slices: list[Slice], tmp_path: Path, longest: int) -> None:
    received: dict[str, bytes] = {}

    def store(event: Any) -> int:
        received[str(event.request.AffectedSOPInstanceUID)] = event.request.DataSet.getvalue()
        return 0x0000

    ae = AE("PLAIN")
    ae.maximum_pdu_size = longest
    ae.add_supported_context(CTImageStorage, EXPLICIT)
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, store)])
    try:
        lists = [listed(tmp_path, list(share)) for share in shares(slices, 2)]
        told = replay(server.server_address[1], "PLAIN", lists)
    finally:
        server.shutdown()
    assert told["error"] == ""
    assert len(told["responses_ms"]) == 5
    assert 0 < max(told["responses_ms"]) / 1000 <= told["seconds"]
    for one in slices:
        content = one.path.read_bytes()
        assert content.endswith(received[one.uid])
        assert len(content) - len(received[one.uid]) < 500


@pytest.mark.parametrize("status", [0xA700, 0xC000])
def test_replay_reports_an_image_that_was_refused(slices: list[Slice], tmp_path: Path, status: int) -> None:
    ae = AE("PLAIN")
    ae.add_supported_context(CTImageStorage, EXPLICIT)
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, lambda _: status)])
    try:
        told = replay(server.server_address[1], "PLAIN", [listed(tmp_path, slices)])
    finally:
        server.shutdown()
    assert f"0x{status:04X}" in told["error"]


def test_replay_reports_a_class_that_is_not_taken(slices: list[Slice], tmp_path: Path) -> None:
    ae = AE("PLAIN")
    ae.add_supported_context("1.2.840.10008.1.1")
    server = ae.start_server(("127.0.0.1", 0), block=False)
    try:
        told = replay(server.server_address[1], "PLAIN", [listed(tmp_path, slices)])
    finally:
        server.shutdown()
    assert "not accepted" in told["error"]


def test_the_sink_answers_a_sender_of_pynetdicom_and_names_what_it_answered(
    slices: list[Slice], sink: Receiver
) -> None:
    results = send([one.path for one in slices], sink.peer, "BENCH")
    assert [result.error for result in results] == [""] * 5
    assert set(sink.kept()) == {one.uid for one in slices}


def test_replay_sends_no_image_sooner_than_so_long_after_the_one_before(
    slices: list[Slice], sink: Receiver, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "appliance.bench.replay", "--every", "0.25", "127.0.0.1", str(sink.peer.port)]
    command += ["BENCH", sink.peer.ae_title, str(listed(tmp_path, slices))]
    done = subprocess.run(command, input="go\n", capture_output=True, text=True, timeout=60)
    told = json.loads(done.stdout.splitlines()[1])
    assert (told["error"], len(told["responses_ms"])) == ("", 5)
    assert set(sink.kept()) == {one.uid for one in slices}
    # The fifth image is not due before four pauses have passed, however fast or slow this machine is; and a response
    # time leaves the pause out, so that it cannot be as long as all of them together.
    assert told["seconds"] >= 4 * 0.25
    assert sum(told["responses_ms"]) / 1000 <= told["seconds"]
