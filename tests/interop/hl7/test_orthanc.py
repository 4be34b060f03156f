"""The demo's PACS: a real Orthanc, seen by DCMTK and over REST."""

from __future__ import annotations

import http.client
import http.server
import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom import dcmread
from pynetdicom import AE, evt
from pynetdicom.sop_class import CTImageStorage

from appliance.demo.orthanc import Orthanc, find_orthanc, free_port, start_orthanc
from dicom_io.errors import PeerError
from dicom_io.scu import Peer

pytestmark = pytest.mark.interop

CT = "1.2.840.10008.5.1.4.1.1.2"


def storescu(calling: str, called: str, host: str, port: int, *files: Path) -> int:
    program = shutil.which("storescu")
    if program is None:
        pytest.skip("DCMTK's storescu is not installed")
    command = [program, "-aet", calling, "-aec", called, host, str(port), *map(str, files)]
    return subprocess.run(command, capture_output=True, timeout=60).returncode


@pytest.fixture(scope="module")
def box_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory, box_port: int) -> Iterator[Orthanc]:
    program = find_orthanc()
    if program is None:
        pytest.skip("Orthanc is not installed")
    started = start_orthanc(
        program, tmp_path_factory.mktemp("orthanc"), {"scanside": Peer("SCANSIDE", "127.0.0.1", box_port)}
    )
    yield started
    started.stop()
    assert not started.running


def test_what_storescu_sends_is_found_and_can_be_deleted(orthanc: Orthanc, ge_head: Path) -> None:
    orthanc.reset()
    files = sorted(ge_head.rglob("*.dcm"))[:3]
    assert storescu("SCANSIDE", "ORTHANC", "127.0.0.1", orthanc.port, *files) == 0
    sent = [dcmread(file) for file in files]
    study = str(sent[0].StudyInstanceUID)
    assert orthanc.studies() == [study]
    assert orthanc.holds(study) == sorted((CT, str(dataset.SOPInstanceUID)) for dataset in sent)
    for instance in orthanc.instances(study):
        assert instance.modality == "CT"
        assert instance.series_description == str(sent[0].get("SeriesDescription", ""))
    assert orthanc.holds("1.2.3") == []
    kept = orthanc.instances(study)[0]
    whole = orthanc.file(kept.orthanc_id)
    assert whole[128:132] == b"DICM"
    assert kept.sop_instance_uid.encode() in whole
    orthanc.reset()
    assert orthanc.studies() == []
    assert orthanc.holds(study) == []


def test_only_the_known_box_on_this_machine_may_send(orthanc: Orthanc, ge_head: Path) -> None:
    orthanc.reset()
    file = min(ge_head.rglob("*.dcm"))
    assert storescu("STRANGER", "ORTHANC", "127.0.0.1", orthanc.port, file) != 0
    assert storescu("SCANSIDE", "WRONG", "127.0.0.1", orthanc.port, file) != 0
    # A caller with another address stands for another machine.
    ae = AE(ae_title="SCANSIDE")
    ae.add_requested_context(CTImageStorage)
    for address, accepted in (("127.0.0.1", True), ("127.0.0.2", False)):
        association = ae.associate("127.0.0.1", orthanc.port, ae_title="ORTHANC", bind_address=(address, 0))
        assert association.is_established is accepted
        association.release()
        connection = http.client.HTTPConnection("127.0.0.1", orthanc.http_port, source_address=(address, 0))
        connection.request("GET", "/studies")
        assert (connection.getresponse().status == 200) is accepted
        connection.close()
    assert orthanc.studies() == []


def test_orthanc_sends_to_the_box(orthanc: Orthanc, box_port: int, ge_head: Path) -> None:
    orthanc.reset()
    files = sorted(ge_head.rglob("*.dcm"))[:2]
    assert storescu("SCANSIDE", "ORTHANC", "127.0.0.1", orthanc.port, *files) == 0
    [study] = orthanc.studies()
    identifiers = [instance.orthanc_id for instance in orthanc.instances(study)]
    with pytest.raises(PeerError, match="Orthanc refused"):
        orthanc.store_to("scanside", identifiers)
    with pytest.raises(PeerError, match="nobody"):
        orthanc.store_to("nobody", identifiers)

    received: list[str] = []

    def keep(event: evt.Event) -> int:
        received.append(str(event.request.AffectedSOPInstanceUID))
        return 0

    ae = AE(ae_title="SCANSIDE")
    ae.add_supported_context(CTImageStorage)
    server = ae.start_server(("127.0.0.1", box_port), block=False, evt_handlers=[(evt.EVT_C_STORE, keep)])
    try:
        orthanc.store_to("scanside", identifiers)
    finally:
        server.shutdown()
    assert sorted(received) == sorted(str(dcmread(file).SOPInstanceUID) for file in files)


def test_a_port_in_use_is_an_error_that_names_the_log(tmp_path: Path) -> None:
    program = find_orthanc()
    if program is None:
        pytest.skip("Orthanc is not installed")
    with (
        socket.create_server(("0.0.0.0", 0)) as taken,
        pytest.raises(PeerError, match="Orthanc ended at once") as caught,
    ):
        start_orthanc(program, tmp_path, {}, http_port=taken.getsockname()[1], port=free_port())
    assert caught.value.where == str(tmp_path / "orthanc.log")


def test_another_server_on_the_port_is_not_taken_for_ours(tmp_path: Path) -> None:
    """As when a second demo starts on the ports of the first."""

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"DicomPort": 1, "DicomAet": "ORTHANC", "Version": "0"}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    program = find_orthanc()
    if program is None:
        pytest.skip("Orthanc is not installed")
    server = http.server.ThreadingHTTPServer(("0.0.0.0", 0), Other)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(PeerError, match="Orthanc ended at once"):
            start_orthanc(program, tmp_path, {}, http_port=server.server_port, port=free_port())
    finally:
        server.shutdown()
        server.server_close()
