"""One try at a webhook: a JSON body over HTTPS, signed as the Standard Webhooks specification 1.0.0 says.

``webhook-signature`` is ``v1,`` and the base64 of HMAC-SHA256 over ``id.timestamp.body``; the receiver must refuse a
wrong signature and an old timestamp, and tells repeated tries by ``webhook-id``, which is the same at each.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import http.client
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from appliance.delivery.outbox import Result, Said
from dicom_io.errors import PeerError, ScansideError

_PASSING = (400, 401, 403, 404, 408, 425, 429)
"""Statuses of the 4xx class that another try may mend (RFC 9110, RFC 8470, RFC 6585): a receiver that refuses a secret
that is being changed, or a timestamp because one of both clocks is wrong; one that is being put in place."""
_PREFIX = "whsec_"


@dataclass(frozen=True, slots=True)
class Webhook:
    """Where a webhook is, and how it is called.

    Attributes:
        secret: key of the signature.
        context: for https.
        timeout: seconds that the connection, and each piece of the answer, may take.
    """

    url: str
    secret: bytes
    context: ssl.SSLContext | None
    timeout: float

    @property
    def where(self) -> str:
        """Scheme, host and port; paths of webhooks are often secrets."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"

    def connection(self) -> http.client.HTTPConnection:
        """A connection that is open.

        Raises:
            PeerError: it cannot be had.
        """
        parts = urlsplit(self.url)
        host = parts.hostname or ""
        if parts.scheme == "https":
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, parts.port, timeout=self.timeout, context=self.context
            )
        else:
            connection = http.client.HTTPConnection(host, parts.port, timeout=self.timeout)
        try:
            connection.connect()
        except OSError as error:
            connection.close()
            said = getattr(error, "verify_message", "") or error.strerror or str(error)
            remedy = "check the address, the network and the certificate"
            raise PeerError(f"the webhook cannot be reached ({said})", self.where, remedy) from error
        return connection


def read_secret(path: Path) -> bytes:
    """The key of the signature, from a file with ``whsec_`` and base64.

    Raises:
        ScansideError: there is none, or it is shorter than 24 bytes or longer than 64.
    """
    try:
        text = path.read_text(encoding="ascii").strip()
        secret = base64.b64decode(text.removeprefix(_PREFIX), validate=True) if text.startswith(_PREFIX) else b""
    except (OSError, UnicodeDecodeError, binascii.Error) as error:
        raise ScansideError(f"the key cannot be read: {error}", str(path), "see webhook.secret_file") from error
    if not 24 <= len(secret) <= 64:
        remedy = f'make one: echo "{_PREFIX}$(openssl rand -base64 32)" > {path.name}'
        raise ScansideError("this is no key of 24 to 64 bytes", str(path), remedy)
    return secret


def sign(secret: bytes, identity: str, timestamp: int, body: bytes) -> str:
    """The value of ``webhook-signature``."""
    digest = hmac.new(secret, f"{identity}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode()


def post(webhook: Webhook, identity: str, body: bytes) -> Result:
    """Post one body. 2xx is an acknowledgement; a redirection is not followed.

    3xx and 4xx say that the request is wrong here and stay so, but for 408, 425 and 429; all else is worth another try.

    Raises:
        PeerError: no connection, or no answer; the receiver may have the body.
    """
    timestamp = int(time.time())
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "scanside",
        "webhook-id": identity,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": sign(webhook.secret, identity, timestamp, body),
    }
    return exchange(webhook, "POST", body, headers)


def exchange(webhook: Webhook, method: str, body: bytes, headers: Mapping[str, str]) -> Result:
    """Send one request and judge its answer, as `post` says.

    Raises:
        PeerError: no connection, or no answer; the receiver may have the body.
    """
    parts = urlsplit(webhook.url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    connection = webhook.connection()
    try:
        connection.request(method, target, body, dict(headers))
        answer = connection.getresponse()
    except (OSError, http.client.HTTPException) as error:
        # An HTTPException may quote what came, and that a patient.
        said = "" if isinstance(error, http.client.HTTPException) else str(error)
        what = f"the webhook did not answer ({said or type(error).__name__})"
        raise PeerError(what, webhook.where, "the same request will be sent again") from error
    finally:
        connection.close()
    words = Said(f"HTTP {answer.status} {answer.reason}".strip(), f"HTTP {answer.status}")
    if 200 <= answer.status < 300:
        return "acknowledge", words
    return ("reject" if 300 <= answer.status < 500 and answer.status not in _PASSING else "retry"), words
