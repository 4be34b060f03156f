"""TLS for the storage provider, by the secure transport connection profiles of PS3.15 annex B."""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Literal, cast

from cryptography import x509

from dicom_io.errors import ScansideError

log = logging.getLogger(__name__)

Profile = Literal["bcp195-rfc8996-9325", "modified-bcp195-rfc8996-9325"]

DEFAULT_PORT: Final = 2762
"""dicom-tls, the port that PS3.15 B.12 recommends."""

SOON: Final = timedelta(days=30)
"""A certificate that expires within this time is complained of, once a day."""

_GCM = (
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
)

CIPHERS: Final[dict[Profile, tuple[str, ...]]] = {
    # PS3.15 B.12: TLS 1.2 by the four suites of RFC 9325 section 4.2, TLS 1.3 preferred. The profiles of B.9, B.10 and
    # B.11 are no longer offered; a peer that follows one of them has these suites too.
    "bcp195-rfc8996-9325": _GCM,
    # PS3.15 B.13 permits these suites and, of what is not here, Camellia's (OpenSSL has none in GCM), CCM in TLS 1.3
    # (Python's ssl cannot switch it on) and CCM with a tag of 64 bits (below the security level): a peer that offers
    # only those is refused, and full conformance to B.13 is not claimed.
    "modified-bcp195-rfc8996-9325": (
        *_GCM,
        "ECDHE-ECDSA-CHACHA20-POLY1305",
        "ECDHE-RSA-CHACHA20-POLY1305",
        "ECDHE-ECDSA-AES256-CCM",
        "ECDHE-ECDSA-AES128-CCM",
    ),
}
"""Suites of TLS 1.2 under OpenSSL's names, the preferred first; those of TLS 1.3 are OpenSSL's three with AEAD."""

_Stamps = tuple[tuple[int, int, int] | None, ...]


class ServerCertificates:
    """A server's certificate, its key and whom it trusts; read again when one of the files has changed.

    Args:
        certificate: PEM file: the server's certificate first, then the chain up to the authority, if any.
        key: PEM file of its private key, without a passphrase.
        client_authorities: PEM file of the authorities whose client certificates are accepted; with it a client
            without such a certificate is refused, without it none is asked for one.
        profile: see `CIPHERS`.
        clock: tells the time; for tests.

    Raises:
        ScansideError: no context can be made of the files.
    """

    def __init__(
        self,
        certificate: Path,
        key: Path,
        client_authorities: Path | None = None,
        profile: Profile = "bcp195-rfc8996-9325",
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._certificate = certificate
        self._key = key
        self._authorities = client_authorities
        self._profile: Profile = profile
        self._clock = clock
        self._lock = threading.Lock()
        self._warned_at: datetime | None = None
        self._seen = self._stamps()
        self._context, self._expires_at = self._load()
        self._warn()

    def renewing_context(self) -> ssl.SSLContext:
        """For a listener that takes one context for good: each of its connections gets that of `context`."""
        kept = self.context()

        def renew(connection: ssl.SSLSocket | ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
            connection.context = self.context()

        kept.sni_callback = renew
        return kept

    @property
    def expires_at(self) -> datetime:
        """When the certificate that is in use expires, in UTC."""
        return self._expires_at

    def context(self) -> ssl.SSLContext:
        """The context for the next connection; connections made with an earlier one are not touched.

        When a file has changed it is read again. If that fails the old context stays in use, an error names the file,
        and the next change is the next try.
        """
        with self._lock:
            # Taken before the files are read: a change in between is seen by the next connection.
            stamps = self._stamps()
            if stamps != self._seen:
                self._seen = stamps
                try:
                    self._context, self._expires_at = self._load()
                except ScansideError as error:
                    log.error("the renewed certificate cannot be used, the old one stays in use: %s", error)
                else:
                    self._warned_at = None
                    log.info("the certificate was read again; it expires on %s", self._expires_at.date())
            self._warn()
            return self._context

    def _stamps(self) -> _Stamps:
        return tuple(_stamp(path) for path in (self._certificate, self._key, self._authorities) if path is not None)

    def _load(self) -> tuple[ssl.SSLContext, datetime]:
        leaf = _first_certificate(self._certificate)
        if b"ENCRYPTED" in _read(self._key):
            raise ScansideError("the key has a passphrase", str(self._key), "store it without one, for us only to read")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # RFC 8996: nothing below TLS 1.2. RFC 9325 4.5: at least 112 bits, that is RSA of 2048, which is OpenSSL's
        # security level 2 and holds for the certificates of clients, too.
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(":".join((*CIPHERS[self._profile], "@SECLEVEL=2")))
        # RFC 9325 3.3 and 3.5: no compression, no renegotiation.
        context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE | ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
        try:
            # Without a password OpenSSL would ask for one on the terminal and hang.
            context.load_cert_chain(self._certificate, self._key, password=lambda: "")
        except ssl.SSLError as error:
            # The certificate was parsed above: only a weak one is not the key's fault.
            weak = any(word in (error.reason or "") for word in ("TOO_SMALL", "TOO_WEAK"))
            raise _unusable(self._certificate if weak else self._key, error) from error
        if self._authorities is not None:
            _first_certificate(self._authorities)
            try:
                context.load_verify_locations(self._authorities)
            except ssl.SSLError as error:
                raise _unusable(self._authorities, error) from error
            context.verify_mode = ssl.CERT_REQUIRED
        return context, leaf.not_valid_after_utc

    def _warn(self) -> None:
        at = self._clock()
        left = self._expires_at - at
        if left > SOON or (self._warned_at is not None and at - self._warned_at < timedelta(days=1)):
            return
        self._warned_at = at
        if left <= timedelta(0):
            log.error("%s: the certificate expired on %s; renew it", self._certificate, self._expires_at.date())
        else:
            log.warning("%s: the certificate expires in %d days; renew it", self._certificate, left.days)


def client_subject(connection: ssl.SSLSocket) -> str:
    """The subject of the client's certificate as RFC 4514 writes it; '' if it showed none."""
    data = connection.getpeercert(binary_form=True)
    return x509.load_der_x509_certificate(data).subject.rfc4514_string() if data else ""


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ino, stat.st_size


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        remedy = "name a PEM file that this user may read"
        raise ScansideError(error.strerror or str(error), str(path), remedy) from error


def _first_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificates(_read(path))[0]
    except ValueError as error:
        raise ScansideError("this holds no certificate in PEM", str(path), "put the certificate there") from error


def _unusable(path: Path, error: ssl.SSLError) -> ScansideError:
    reason = cast(str | None, error.reason) or ""
    if reason == "KEY_VALUES_MISMATCH":
        return ScansideError("the key is not the certificate's", str(path), "put both of one pair there")
    said = reason.lower().replace("_", " ") or "OpenSSL cannot read it"
    return ScansideError(f"this cannot be used: {said}", str(path), "put PEM files there, RSA of at least 2048 bits")
