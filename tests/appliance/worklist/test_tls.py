"""Both ports of the worklist over TLS: who has no certificate of ours is not let in, and a renewed one is used."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from pynetdicom import AE
from pynetdicom.sop_class import UnifiedProcedureStepPush, Verification
from websockets.sync.client import connect

from appliance.delivery.tls import client_context
from appliance.ledger.store import Ledger
from appliance.settings import Settings
from appliance.supervisor import services_of
from appliance.worklist.dimse import Provider
from appliance.worklist.refusals import Refusals
from dicom_io.tls import ServerCertificates
from dicom_io.ups import UpsServer
from dicom_io.workitem import to_dataset
from tests.appliance.worklist.support import serving
from tests.dicom_io.certificates import Authority, Pair
from tests.workitems import READING, workitem


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "hospital")


@pytest.fixture
def own(authority: Authority) -> Pair:
    return authority.issue("box")


@pytest.fixture
def certificates(authority: Authority, own: Pair) -> ServerCertificates:
    return ServerCertificates(own.certificate, own.key, authority.certificate)


def calling(authority: Authority, pair: Pair | None) -> ssl.SSLContext:
    return client_context(authority.certificate, pair and pair.certificate, pair and pair.key)


def serial(address: tuple[str, int], context: ssl.SSLContext) -> str:
    with (
        socket.create_connection(address, timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secured,
    ):
        return str((secured.getpeercert() or {})["serialNumber"])


def test_the_web_is_for_those_with_a_certificate(
    tmp_path: Path, authority: Authority, own: Pair, certificates: ServerCertificates
) -> None:
    client = authority.issue("reader", client=True)
    with serving(tmp_path, certificates=certificates) as served:
        address = ("127.0.0.1", served.server.port)
        right = calling(authority, client)
        with httpx.Client(verify=right, trust_env=False) as http:
            assert http.get(f"https://{served.address}/workitems").status_code == 204
        with connect(f"wss://{served.address}/subscribers/PACS", ssl=right, proxy=None):
            pass
        with (
            pytest.raises(httpx.TransportError),
            httpx.Client(verify=calling(authority, None), trust_env=False) as http,
        ):
            http.get(f"https://{served.address}/workitems")
        with pytest.raises(httpx.TransportError):
            served.http.get("workitems")  # without TLS
        before = serial(address, right)
        authority.issue("renewed").copy_to(own.certificate, own.key)
        assert serial(address, right) != before


@pytest.fixture
def dimse(tmp_path: Path, certificates: ServerCertificates) -> Iterator[UpsServer]:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    owner = Provider(ledger, Refusals(ledger), READING, {}, lambda: None)
    server = UpsServer("BOX", "127.0.0.1", 0, owner, context=certificates.renewing_context())
    yield server
    server.stop()
    ledger.close()


def test_the_dicom_port_is_for_those_with_a_certificate(dimse: UpsServer, authority: Authority, own: Pair) -> None:
    ae = AE("RIS")
    ae.connection_timeout = ae.acse_timeout = 5
    ae.add_requested_context(UnifiedProcedureStepPush)
    ae.add_requested_context(Verification)
    client = authority.issue("ris", client=True)
    tls = (calling(authority, client), "127.0.0.1")
    association = ae.associate("127.0.0.1", dimse.port, tls_args=tls)
    assert association.is_established
    assert association.send_n_create(to_dataset(workitem()), UnifiedProcedureStepPush, "1.1")[0].Status == 0
    association.release()
    for wrong in ((calling(authority, None), "127.0.0.1"), None):
        assert not ae.associate("127.0.0.1", dimse.port, tls_args=wrong).is_established
    before = serial(("127.0.0.1", dimse.port), tls[0])
    authority.issue("renewed").copy_to(own.certificate, own.key)
    assert serial(("127.0.0.1", dimse.port), tls[0]) != before


def test_scanside_run_has_the_worklist_only_where_there_is_one() -> None:
    assert "worklist" not in services_of(Settings())
    assert services_of(Settings(worklist={"web_port": 1}))[-1] == "worklist"  # type: ignore[arg-type]
