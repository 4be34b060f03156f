"""The hospital around the box, from outside: over its ports, its folders and its processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE
from pynetdicom.sop_class import (
    Comprehensive3DSRStorage,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
    Verification,
)

from appliance.delivery.hl7 import MllpClient
from appliance.demo import hospital as module
from appliance.demo.hospital import PACS_AE, Hospital, start_hospital
from appliance.demo.orthanc import configuration, find_orthanc
from appliance.demo.plain_pacs import FallbackPacs
from dicom_io.errors import PeerError

pytestmark = pytest.mark.slow

MESSAGE = "MSH|^~\\&|SCANSIDE|BOX|RIS|HOSP|20260102030405||ORU^R01^ORU_R01|{}|P|2.5.1\rOBX|1|TX|1||Blutung ö\r"


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def small_object(sop_class: str, study: str) -> Dataset:
    dataset = Dataset()
    dataset.SOPClassUID = sop_class
    dataset.SOPInstanceUID = generate_uid()
    dataset.StudyInstanceUID = study
    dataset.SeriesInstanceUID = generate_uid()
    dataset.PatientID = "P1"
    dataset.PatientName = "Müller^Jürgen"
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.Modality = "SR"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return dataset


def store(dataset: Dataset, port: int, *, called: str = PACS_AE, calling: str = "SCANSIDE") -> int | None:
    """C-STORE's status; None where the association was not accepted."""
    ae = AE(ae_title=calling)
    ae.add_requested_context(dataset.SOPClassUID, ExplicitVRLittleEndian)
    association = ae.associate("127.0.0.1", port, ae_title=called)
    if not association.is_established:
        return None
    try:
        return int(association.send_c_store(dataset).Status)
    finally:
        association.release()


@pytest.fixture(params=["orthanc", "plain"])
def hospital(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hospital:
    if request.param == "plain":
        monkeypatch.setattr(module, "find_orthanc", lambda: None)
    elif find_orthanc() is None:
        pytest.skip("Orthanc is not installed")
    started = start_hospital(tmp_path, scanside_port=11112)
    request.addfinalizer(started.stop)
    return started


def test_the_hospital_takes_objects_and_messages(hospital: Hospital) -> None:
    study = generate_uid()
    objects = [
        small_object(uid, study)
        for uid in (Comprehensive3DSRStorage, SecondaryCaptureImageStorage, SegmentationStorage)
    ]
    assert hospital.pacs.holds(study) == []
    assert [store(dataset, hospital.pacs.port) for dataset in objects] == [0, 0, 0]
    assert store(small_object(SecondaryCaptureImageStorage, generate_uid()), hospital.pacs.port) == 0
    assert store(small_object(SecondaryCaptureImageStorage, generate_uid()), hospital.pacs.port, called="X") is None
    assert hospital.pacs.holds(study) == sorted((str(d.SOPClassUID), str(d.SOPInstanceUID)) for d in objects)

    with MllpClient(hospital.hl7_host, hospital.hl7_port, connect_timeout=5, ack_timeout=5) as client:
        assert client.send(MESSAGE.format("M2")).code == "AA"
        assert client.send(MESSAGE.format("M1")).code == "AA"
        assert client.send(MESSAGE.format("M2")).code == "AA"
    assert [path.name for path in hospital.messages()] == ["M2.hl7", "M1.hl7"]
    assert hospital.messages()[0].read_bytes() == MESSAGE.format("M2").encode()
    assert [line["state"] for line in hospital.heard()] == ["listening", "stored", "stored", "duplicate"]

    # Stopping leaves nothing that listens, and stopping again is harmless.
    assert listens(hospital.pacs.port)
    assert listens(hospital.hl7_port)
    hospital.stop()
    assert not listens(hospital.pacs.port)
    assert not listens(hospital.hl7_port)
    hospital.stop()


def test_a_listener_that_rejects_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_orthanc", lambda: None)
    with (
        start_hospital(tmp_path, scanside_port=11112, answer="AR") as hospital,
        MllpClient(hospital.hl7_host, hospital.hl7_port, connect_timeout=5, ack_timeout=5) as client,
    ):
        assert client.send(MESSAGE.format("M1")).code == "AR"
        assert hospital.messages() == []


def test_a_pacs_that_does_not_start_leaves_no_listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_orthanc", lambda: Path("/bin/false"))
    with pytest.raises(PeerError, match="Orthanc ended at once"):
        start_hospital(tmp_path, scanside_port=11112)
    log = (tmp_path / "hl7" / "listener.log").read_text()
    for line in log.splitlines():
        assert not listens(json.loads(line)["port"])


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_when_the_parent_is_killed(tmp_path: Path, end: signal.Signals) -> None:
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from appliance.demo.hospital import start_hospital\n"
            "hospital = start_hospital(Path(sys.argv[1]), scanside_port=11112)\n"
            "print(hospital.pacs.port, hospital.hl7_port, flush=True); time.sleep(60)",
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert parent.stdout is not None
        ports = [int(port) for port in parent.stdout.readline().split()]
        assert len(ports) == 2
        assert all(listens(port) for port in ports)
        parent.send_signal(end)
        parent.wait(10)
        assert eventually(lambda: not any(listens(port) for port in ports))
    finally:
        parent.kill()
        parent.communicate()


def test_the_plain_pacs_answers_echo_keeps_bytes_and_survives_a_restart(tmp_path: Path) -> None:
    study = generate_uid()
    dataset = small_object(SecondaryCaptureImageStorage, study)
    pacs = FallbackPacs(tmp_path)
    try:
        ae = AE()
        ae.add_requested_context(Verification)
        association = ae.associate("127.0.0.1", pacs.port, ae_title="PACS")
        assert association.send_c_echo().Status == 0
        association.release()
        assert store(dataset, pacs.port) == 0
        [file] = tmp_path.rglob("*.dcm")
        assert dcmread(file).PatientName == "Müller^Jürgen"
        broken = small_object(SecondaryCaptureImageStorage, "")
        assert store(broken, pacs.port) == 0x0117
        with pytest.raises(PeerError, match="cannot listen"):
            FallbackPacs(tmp_path, port=pacs.port)
    finally:
        pacs.stop()
    again = FallbackPacs(tmp_path)
    try:
        assert again.holds(study) == [(str(dataset.SOPClassUID), str(dataset.SOPInstanceUID))]
        assert again.holds("../x") == []
    finally:
        again.stop()


def test_orthancs_configuration_lets_only_known_peers_of_this_machine_in(tmp_path: Path) -> None:
    settings = configuration(tmp_path, "PACS", 8042, 4242, {})
    assert settings["RemoteAccessAllowed"] is False
    assert settings["DicomAlwaysAllowStore"] is False
    assert settings["DicomCheckModalityHost"] is True
