"""Mail to a server of other people (aiosmtpd), with STARTTLS and a login, and its refusals."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator
from dataclasses import replace
from email import message_from_bytes, policy
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

from appliance.delivery.mail import MailServer, send_mail
from appliance.delivery.outbox import Said
from appliance.delivery.tls import client_context
from dicom_io.errors import PeerError
from tests.dicom_io.certificates import Authority

MAIL = (
    b"Message-ID: <M1@box>\r\nSubject: t\xc3\xa4st\r\nContent-Type: text/plain; charset=utf-8\r\n\r\nline\r\n.dot\r\n"
)


class Postbox:
    """What the server does with mails: `answers` maps a recipient, or "" for the mail, to what is answered."""

    def __init__(self) -> None:
        self.mails: list[tuple[list[str], bytes, bool]] = []
        self.answers: dict[str, str] = {}
        self.drop = False

    async def handle_RCPT(
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        answer = self.answers.get(address, "250 OK")
        if answer.startswith("250"):
            envelope.rcpt_tos.append(address)
        return answer

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        if self.drop:
            server.transport.close()
            return "421 gone"
        answer = self.answers.get("", "250 taken")
        if answer.startswith("250"):
            assert isinstance(envelope.content, bytes)
            self.mails.append((list(envelope.rcpt_tos), envelope.content, session.ssl is not None))
        return answer


def free_port() -> int:
    """aiosmtpd looks whether it is there at the port that it was given."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


def authenticate(server: Any, session: Any, envelope: Any, mechanism: str, data: Any) -> AuthResult:
    assert isinstance(data, LoginPassword)
    return AuthResult(success=(data.login, data.password) == (b"box", b"secret"))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def postbox() -> Postbox:
    return Postbox()


@pytest.fixture
def server(authority: Authority, postbox: Postbox) -> Iterator[MailServer]:
    pair = authority.issue("mail")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    controller = Controller(
        postbox, hostname="127.0.0.1", port=free_port(), tls_context=context, require_starttls=True,
        authenticator=authenticate, auth_required=True,
    )  # fmt: skip
    controller.start()
    port = controller.port
    try:
        yield MailServer("127.0.0.1", port, "starttls", client_context(authority.certificate), 5.0, "box", "secret")
    finally:
        controller.stop()


def test_a_mail_is_taken_over_tls_as_it_was_written(server: MailServer, postbox: Postbox) -> None:
    assert send_mail(server, "box@site", ["a@site", "b@site"], MAIL) == ("acknowledge", "taken")
    ((recipients, content, secured),) = postbox.mails
    assert recipients == ["a@site", "b@site"]
    assert secured
    read = message_from_bytes(content, policy=policy.default)
    assert read["Message-ID"] == "<M1@box>"
    assert read.get_payload(decode=True) == b"line\r\n.dot\r\n"


@pytest.mark.parametrize(
    ("answers", "outcome", "said"),
    [
        ({"": "451 try later"}, "retry", "451"),
        ({"": "554 never"}, "reject", "554 never"),
        ({"a@site": "550 who", "b@site": "550 who"}, "reject", "no recipient"),
        ({"a@site": "550 who", "b@site": "450 busy"}, "retry", "no recipient"),
        ({"a@site": "550 who"}, "acknowledge", "not for a@site"),
    ],
)
def test_each_answer_has_its_outcome_and_its_words_are_known_from_its_codes(
    server: MailServer, postbox: Postbox, answers: dict[str, str], outcome: str, said: str
) -> None:
    postbox.answers = answers
    result, reason = send_mail(server, "box@site", ["a@site", "b@site"], MAIL)
    assert result == outcome
    assert said in reason
    assert isinstance(reason, Said)
    assert re.search("[0-9]{3}", reason.condition) and not re.search("try|never|who|busy", reason.condition)
    assert len(postbox.mails) == (outcome == "acknowledge")


def test_a_connection_that_breaks_before_the_answer_is_tried_again(server: MailServer, postbox: Postbox) -> None:
    postbox.drop = True
    with pytest.raises(PeerError):
        send_mail(server, "box@site", ["a@site"], MAIL)


@pytest.mark.slow
def test_nothing_is_sent_where_tls_or_login_is_not_as_it_has_to_be(
    server: MailServer, postbox: Postbox, tmp_path: Path
) -> None:
    stranger = client_context(Authority(tmp_path, "stranger").certificate)
    for other in (
        replace(server, password="wrong"),
        replace(server, context=stranger),
        replace(server, security="none", context=None),
        replace(server, port=1),
    ):
        with pytest.raises(PeerError) as caught:
            send_mail(other, "box@site", ["a@site"], MAIL)
        assert caught.value.where == other.where
        assert "wrong" not in str(caught.value)
    assert postbox.mails == []


def test_a_server_without_starttls_gets_nothing(server: MailServer, postbox: Postbox) -> None:
    controller = Controller(postbox, hostname="127.0.0.1", port=free_port())
    controller.start()
    try:
        port = controller.port
        with pytest.raises(PeerError, match="STARTTLS"):
            send_mail(replace(server, port=port, username=""), "box@site", ["a@site"], MAIL)
    finally:
        controller.stop()
    assert postbox.mails == []
