"""What a PACS answers to C-STORE, and what becomes of the delivery."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.uid import SegmentationStorage

from appliance.delivery.dicom import store
from appliance.delivery.tls import client_context
from appliance.demo.orthanc import free_port
from appliance.operations.leash import Leashed
from dicom_io.errors import PeerError
from dicom_io.scu import Peer, echo
from dicom_io.tls import ServerCertificates
from tests.dicom_io.certificates import Authority, Pair
from tests.dicom_io.support import Recorder, ct, head, save, serving
from tests.peers import program


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (0x0000, "acknowledge"),
        (0xB000, "acknowledge"),
        (0x0111, "acknowledge"),
        (0xA700, "retry"),
        (0x0110, "retry"),
        (0x0213, "retry"),
        (0xA900, "decline"),
        (0xC000, "decline"),
        (0x0122, "decline"),
        (0x0124, "reject"),
    ],
)
def test_each_status_has_its_outcome(tmp_path: Path, status: int, outcome: str) -> None:
    path = save(ct(head(12, False), 12), tmp_path / "finding.dcm")
    with serving(Recorder(status)) as server:
        found, said = store(path, Peer("SCANSIDE", "127.0.0.1", server.port), "SCANSIDE")
    assert found == outcome
    assert (said == "") == (status == 0)


def test_what_is_to_be_committed_to_is_only_stored(tmp_path: Path) -> None:
    path = save(ct(head(12, False), 12), tmp_path / "finding.dcm")
    for status in (0x0000, 0xB000, 0x0111):
        with serving(Recorder(status)) as server:
            found, _ = store(path, Peer("SCANSIDE", "127.0.0.1", server.port), "SCANSIDE", commitment=True)
        assert found == "store"


def test_it_goes_over_tls_to_whom_the_authority_vouches_for(tmp_path: Path) -> None:
    path = save(ct(head(12, False), 12), tmp_path / "finding.dcm")
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    pair, ours = authority.issue("pacs"), authority.issue("box", client=True)
    recorder = Recorder()
    certificates = ServerCertificates(pair.certificate, pair.key, authority.certificate)
    with serving(recorder, certificates) as server:

        def peer(trusted: Authority, shown: Pair | None) -> Peer:
            own = (shown.certificate, shown.key) if shown else ()
            return Peer("SCANSIDE", "127.0.0.1", server.port, client_context(trusted.certificate, *own))

        assert store(path, peer(authority, ours), "SCANSIDE") == ("acknowledge", "")
        assert [one.tls for one in recorder.opened_calls] == [True]
        for trusted, shown in ((other, ours), (authority, None)):
            with pytest.raises(PeerError):
                store(path, peer(trusted, shown), "SCANSIDE")
        with pytest.raises(PeerError):
            store(path, Peer("SCANSIDE", "127.0.0.1", server.port), "SCANSIDE")
        echo(peer(authority, ours), "SCANSIDE")
    assert len(recorder.received) == 1


def test_dcmtk_takes_it_over_tls(tmp_path: Path) -> None:
    path = save(ct(head(12, False), 12), tmp_path / "finding.dcm")
    authority = Authority(tmp_path)
    pair, port, kept = authority.issue("pacs", rsa_bits=2048), free_port(), tmp_path / "kept"
    kept.mkdir()
    command = [program("storescp"), "+tls", pair.key, pair.certificate, "+cf", authority.certificate, "-ic"]
    pacs = Leashed([*command, "-od", kept, str(port)], log=tmp_path / "storescp.log", grace=2.0)
    peer = Peer("SCANSIDE", "127.0.0.1", port, client_context(authority.certificate))
    try:
        for _ in range(100):
            try:
                assert store(path, peer, "SCANSIDE") == ("acknowledge", "")
                break
            except PeerError as error:
                said = error
                time.sleep(0.1)
        else:
            pytest.fail(f"{said}\n{pacs.tail(10)}")
    finally:
        pacs.stop()
    (one,) = kept.iterdir()
    assert dcmread(one).SOPInstanceUID == dcmread(path).SOPInstanceUID


def test_nobody_there_is_worth_another_try(tmp_path: Path) -> None:
    path = save(ct(head(12, False), 12), tmp_path / "finding.dcm")
    with pytest.raises(PeerError):
        store(path, Peer("SCANSIDE", "127.0.0.1", free_port()), "SCANSIDE")


def test_a_class_that_the_peer_does_not_take_is_final_and_says_so(tmp_path: Path) -> None:
    path = save(ct(head(12, False), 12, SOPClassUID=SegmentationStorage), tmp_path / "finding.dcm")
    with serving(Recorder()) as server:
        outcome, said = store(path, Peer("SCANSIDE", "127.0.0.1", server.port), "SCANSIDE")
    assert outcome == "decline"
    assert "accepts none of what was proposed (Segmentation Storage)" in said
