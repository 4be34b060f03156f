"""The webhook against an HTTP server, its signature judged by the library of the specification's authors."""

from __future__ import annotations

import base64
import ssl
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from standardwebhooks.webhooks import Webhook as Verifier
from standardwebhooks.webhooks import WebhookVerificationError

from appliance.delivery.outbox import Said
from appliance.delivery.tls import client_context
from appliance.delivery.webhook import Webhook, post, read_secret
from dicom_io.errors import PeerError, ScansideError
from tests.dicom_io.certificates import Authority

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
BODY = '{"id": "M1", "text": ["Blutung möglich"]}'.encode()


class Receiver(ThreadingHTTPServer):
    """Keeps each request and answers with one status; 0 hangs up instead."""

    daemon_threads = True

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = 204
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_side=True)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None:
        """A handshake that fails is what some tests want."""


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, dict(self.headers), body))
        if self.server.status == 0:
            self.close_connection = True
            return
        self.send_response(self.server.status)
        self.send_header("Location", "http://127.0.0.1:1/")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    one = Receiver()
    yield one
    one.shutdown()
    one.server_close()


@pytest.fixture
def hook(receiver: Receiver, tmp_path: Path) -> Webhook:
    (tmp_path / "secret").write_text(SECRET + "\n")
    url = f"http://127.0.0.1:{receiver.server_address[1]}/in/box?one=1"
    return Webhook(url, read_secret(tmp_path / "secret"), None, 5.0)


def test_the_signature_is_what_the_specification_says(receiver: Receiver, hook: Webhook) -> None:
    result, said = post(hook, "M1", BODY)
    assert (result, said) == ("acknowledge", "HTTP 204 No Content")
    assert isinstance(said, Said) and said.condition == "HTTP 204"
    ((path, headers, body),) = receiver.requests
    assert (path, body) == ("/in/box?one=1", BODY)
    lower = {name.lower(): value for name, value in headers.items()}
    assert lower["webhook-id"] == "M1"
    assert lower["content-type"] == "application/json"
    assert Verifier(SECRET).verify(body, lower)["id"] == "M1"
    with pytest.raises(WebhookVerificationError):
        Verifier(SECRET).verify(body.replace(b"M1", b"M2"), lower)
    with pytest.raises(WebhookVerificationError):
        Verifier(SECRET).verify(body, {**lower, "webhook-id": "M2"})
    with pytest.raises(WebhookVerificationError):
        Verifier(SECRET).verify(body, {**lower, "webhook-timestamp": str(int(lower["webhook-timestamp"]) + 1)})


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (200, "acknowledge"), (202, "acknowledge"), (301, "reject"), (308, "reject"), (400, "retry"), (401, "retry"),
        (403, "retry"), (404, "retry"), (405, "reject"), (410, "reject"), (413, "reject"),
        (408, "retry"), (425, "retry"), (429, "retry"), (500, "retry"),
        (503, "retry"),
    ],
)  # fmt: skip
def test_each_status_has_its_outcome(receiver: Receiver, hook: Webhook, status: int, outcome: str) -> None:
    receiver.status = status
    result, said = post(hook, "M1", BODY)
    assert (result, str(status) in said) == (outcome, True)
    assert len(receiver.requests) == 1


def test_no_answer_is_an_error_and_the_next_try_has_the_same_id(receiver: Receiver, hook: Webhook) -> None:
    receiver.status = 0
    with pytest.raises(PeerError, match="did not answer"):
        post(hook, "M1", BODY)
    receiver.status = 200
    assert post(hook, "M1", BODY)[0] == "acknowledge"
    assert [headers["webhook-id"] for _, headers, _ in receiver.requests] == ["M1", "M1"]
    with pytest.raises(PeerError, match="cannot be reached") as caught:
        post(replace(hook, url="http://127.0.0.1:1/hidden"), "M1", BODY)
    assert "hidden" not in str(caught.value)


def test_over_tls_with_a_certificate_of_ours_and_to_nobody_else(hook: Webhook, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair, ours = authority.issue("hook"), authority.issue("box", client=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    context.load_verify_locations(authority.certificate)
    context.verify_mode = ssl.CERT_REQUIRED
    receiver = Receiver(context)
    url = f"https://127.0.0.1:{receiver.server_address[1]}/"
    try:
        good = replace(hook, url=url, context=client_context(authority.certificate, ours.certificate, ours.key))
        assert post(good, "M1", BODY)[0] == "acknowledge"
        for wrong in (client_context(authority.certificate), client_context(Authority(tmp_path, "no").certificate)):
            with pytest.raises(PeerError):
                post(replace(good, context=wrong), "M2", BODY)
        assert [headers["webhook-id"] for _, headers, _ in receiver.requests] == ["M1"]
    finally:
        receiver.shutdown()
        receiver.server_close()


@pytest.mark.parametrize("text", ["", "secret", "whsec_", "whsec_!!", "whsec_" + base64.b64encode(b"short").decode()])
def test_a_secret_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "secret"
    path.write_text(text)
    with pytest.raises(ScansideError) as caught:
        read_secret(path)
    assert caught.value.where == str(path)
    with pytest.raises(ScansideError):
        read_secret(tmp_path / "none")
