"""STOW-RS: what an archive answers and what becomes of the delivery; a real Orthanc; logins, TLS, and who hangs up."""

from __future__ import annotations

import base64
import json
import ssl
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from email.parser import BytesParser
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from appliance.delivery.dicomweb import authorization, store_web
from appliance.delivery.outbox import Said
from appliance.delivery.tls import client_context
from appliance.demo.orthanc import DICOMWEB, find_orthanc, free_port, start_orthanc
from dicom_io.errors import PeerError, ScansideError
from dicom_io.objects.common import part10
from dicom_io.web import Archive, reach
from tests.dicom_io.certificates import Authority
from tests.findings_support import ct_series, rendered, verdict_on

UID = "2.25.1"


class Service(ThreadingHTTPServer):
    """An archive of ours that answers as told, and keeps what it was sent."""

    def __init__(self, status: int, content: bytes, context: ssl.SSLContext | None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.content = status, content
        self.refuses: Collection[str] = ()  # transfer syntaxes, with 415
        self.heard: list[tuple[str, str, dict[str, str], bytes]] = []
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_side=True)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def archive(self, **options: Any) -> Archive:
        scheme = "https" if options.get("context") else "http"
        return Archive(f"{scheme}://127.0.0.1:{self.server_address[1]}/dicom-web", **options)


class Handler(BaseHTTPRequestHandler):
    """Answers every request as its service is told; 0 hangs up."""

    server: Service

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.heard.append((self.command, self.path, dict(self.headers), body))
        if self.server.status == 0:
            return
        refused = any(f"UI{chr(len(one))}\0{one}".encode() in body for one in map(padded, self.server.refuses))
        self.send_response(415 if refused else self.server.status)
        self.send_header("Content-Length", str(len(self.server.content)))
        if 300 <= self.server.status < 400:
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_address[1]}/elsewhere")
        self.end_headers()
        self.wfile.write(self.server.content)

    do_GET = do_POST

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""


def padded(uid: str) -> str:
    return uid + "\0" * (len(uid) % 2)


@contextmanager
def service(status: int = 200, content: Any = b"", context: ssl.SSLContext | None = None) -> Iterator[Service]:
    one = Service(status, content if isinstance(content, bytes) else json.dumps(content).encode(), context)
    try:
        yield one
    finally:
        one.shutdown()
        one.server_close()


@pytest.fixture
def finding(tmp_path: Path) -> Path:
    path = tmp_path / "finding.dcm"
    path.write_bytes(bytes(range(256)) * 40)
    return path


def sequence(tag: str, uid: str = UID, **reasons: int) -> dict[str, Any]:
    item: dict[str, Any] = {"00081155": {"vr": "UI", "Value": [uid]}}
    item |= {name.removeprefix("t"): {"vr": "US", "Value": [value]} for name, value in reasons.items()}
    return {tag: {"vr": "SQ", "Value": [item]}}


KEPT, FAILED = "00081199", "00081198"


@pytest.mark.parametrize(
    ("status", "content", "outcome"),
    [
        (200, sequence(KEPT), "acknowledge"),
        (200, [sequence(KEPT)], "acknowledge"),
        (200, b"", "acknowledge"),
        (200, {KEPT: {"vr": "SQ"}, FAILED: {"vr": "SQ"}}, "retry"),
        (200, sequence(KEPT, uid="2.25.2"), "retry"),
        (200, b"<NativeDicomModel/>", "acknowledge"),
        (200, sequence(FAILED, t00081197=0xA700), "retry"),
        (202, sequence(KEPT, t00081196=0xB000), "acknowledge"),
        (202, sequence(FAILED, t00081197=0xA700), "retry"),
        (202, sequence(FAILED, t00081197=0x0110), "retry"),
        (202, sequence(FAILED), "retry"),
        (202, sequence(FAILED, t00081197=0x0122), "decline"),
        (202, sequence(FAILED, t00081197=0xC000), "decline"),
        (409, sequence(FAILED, t00081197=0xA900), "decline"),
        (409, sequence(FAILED, t00081197=0x0124), "reject"),
        (409, sequence(FAILED, t00081197=0x0111), "acknowledge"),
        (202, sequence(KEPT, uid="2.25.2"), "retry"),
        (202, b"", "retry"),
        (202, {"00081199": {"Value": [None, 7, {"00081155": 3}]}}, "retry"),
        (202, b"[" * 100_000, "retry"),
        (409, b"", "reject"),
        (400, b"", "reject"),
        (401, b"", "retry"),
        (413, b"", "reject"),
        (415, b"", "decline"),
        (429, b"", "retry"),
        (500, b"", "retry"),
        (503, b"", "retry"),
        (302, b"", "reject"),
    ],
)
def test_each_answer_has_its_outcome(status: int, content: Any, outcome: str, finding: Path) -> None:
    with service(status, content) as there:
        found, said = store_web(finding, UID, there.archive())
    assert found == outcome
    assert said or outcome == "acknowledge"
    assert isinstance(said, Said) and (not said or str(status) in said.condition or outcome == "acknowledge")
    assert HTTPStatus(status).phrase not in said.condition
    assert len(there.heard) == 1  # no redirection is followed


def test_the_request_is_one_part_that_holds_the_file(finding: Path) -> None:
    with service() as there:
        store_web(finding, UID, there.archive(authorization="Bearer abc"))
    ((method, path, headers, body),) = there.heard
    assert (method, path) == ("POST", "/dicom-web/studies")
    assert (headers["Accept"], headers["Authorization"]) == ("application/dicom+json", "Bearer abc")
    message = BytesParser().parsebytes(f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode() + body)
    assert message.get_content_type() == "multipart/related" and message.get_param("type") == "application/dicom"
    (part,) = message.get_payload()
    assert part.get_content_type() == "application/dicom"  # type: ignore[union-attr]
    assert body.split(b"\r\n\r\n", 1)[1].rsplit(b"\r\n--", 1)[0] == finding.read_bytes()


@pytest.mark.parametrize(
    ("refused", "sent", "outcome"),
    [
        ([], [JPEG2000Lossless], "acknowledge"),
        ([JPEG2000Lossless], [JPEG2000Lossless, DeflatedExplicitVRLittleEndian], "acknowledge"),
        (
            [JPEG2000Lossless, DeflatedExplicitVRLittleEndian],
            [JPEG2000Lossless, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian],
            "acknowledge",
        ),
        (
            [JPEG2000Lossless, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian],
            [JPEG2000Lossless, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian],
            "decline",
        ),
    ],
)
def test_the_next_transfer_syntax_is_tried_at_once(
    refused: list[str], sent: list[str], outcome: str, tmp_path: Path
) -> None:
    series = ct_series(tmp_path)
    path = tmp_path / "segmentation.object"
    path.write_bytes(part10(rendered(series, verdict_on(series), "segmentation")))
    uid = str(dcmread(path).SOPInstanceUID)
    with service(content=sequence(KEPT, uid=uid)) as there:
        there.refuses = [str(one) for one in refused]
        # Run lengths are not for single bits: they are left out.
        wanted = [str(one) for one in (RLELossless, JPEG2000Lossless, DeflatedExplicitVRLittleEndian)]
        found, said = store_web(path, uid, there.archive(), wanted)
    assert found == outcome
    parts = [body.split(b"\r\n\r\n", 1)[1].rsplit(b"\r\n--", 1)[0] for _, _, _, body in there.heard]
    files = [dcmread(BytesIO(part)) for part in parts]
    assert [one.file_meta.TransferSyntaxUID for one in files] == sent
    assert all((one.pixel_array == dcmread(path).pixel_array).all() for one in files)
    assert ("it does not accept JPEG 2000" in said) == (bool(refused) and outcome == "acknowledge")


def test_nobody_there_and_one_who_hangs_up_are_worth_another_try(finding: Path) -> None:
    with pytest.raises(PeerError, match="cannot be reached"):
        store_web(finding, UID, Archive(f"http://127.0.0.1:{free_port()}/x"))
    with service(0) as there, pytest.raises(PeerError, match="did not answer"):
        store_web(finding, UID, there.archive())


def test_over_tls_only_to_whom_the_authority_vouches_for(tmp_path: Path, finding: Path) -> None:
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    pair = authority.issue("archive")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    with service(context=context) as there:
        assert store_web(finding, UID, there.archive(context=client_context(authority.certificate)))[0] == "acknowledge"
        with pytest.raises(PeerError, match="cannot be reached"):
            store_web(finding, UID, there.archive(context=client_context(other.certificate)))
    assert len(there.heard) == 1


def test_logins_are_read_from_files(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("pässword\n", encoding="utf-8")
    basic = authorization("box", secret, None)
    assert base64.b64decode(basic.removeprefix("Basic ")).decode() == "box:pässword"
    assert authorization("", None, secret) == "Bearer pässword"
    assert authorization("", None, None) == ""
    with pytest.raises(ScansideError, match="login cannot be read"):
        authorization("", None, tmp_path / "absent")


@pytest.mark.interop
def test_orthanc_keeps_what_it_is_sent_and_says_so_twice(tmp_path: Path) -> None:
    program = find_orthanc()
    if program is None or not any(path.is_file() for path in DICOMWEB):
        pytest.skip("Orthanc or its DICOMweb is not installed")
    series = ct_series(tmp_path)
    verdict = verdict_on(series)
    orthanc = start_orthanc(program, tmp_path / "orthanc", {})
    try:
        archive = Archive(f"{orthanc.url}/dicom-web")
        reach(archive)
        sent = {}
        for name in ("report", "capture.summary", "segmentation", "presentation.1", "selection"):
            path = tmp_path / f"{name}.object"
            path.write_bytes(part10(rendered(series, verdict, name)))
            sent[str(dcmread(path).SOPInstanceUID)] = path
        for uid, path in [*sent.items(), *sent.items()]:
            assert store_web(path, uid, archive)[0] == "acknowledge"
        assert orthanc.instance_uids() == set(sent)
        kept = {one.sop_instance_uid: orthanc.file(one.orthanc_id) for one in orthanc.instances(series.study_uid)}
        for uid, path in sent.items():
            assert kept[uid] == path.read_bytes()
        broken = tmp_path / "broken.object"
        broken.write_bytes(b"no DICOM")
        assert store_web(broken, "2.25.9", archive)[0] in ("reject", "decline", "retry")
    finally:
        orthanc.stop()
