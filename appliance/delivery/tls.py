"""TLS for what the box sends to HL7 listeners, mail servers and webhooks."""

from __future__ import annotations

import ssl
from pathlib import Path

from dicom_io.errors import ScansideError
from dicom_io.tls import CIPHERS


def client_context(
    authorities: Path | None = None, certificate: Path | None = None, key: Path | None = None
) -> ssl.SSLContext:
    """A context for connections that we open: TLS 1.2 or 1.3 and suites as for intake (RFC 8996, RFC 9325).

    The peer's certificate must be of one of the authorities and for the name or address that we call.

    Args:
        authorities: PEM file; None: those that this machine trusts.
        certificate: PEM file of our own certificate and its chain, for a peer that asks for one.
        key: PEM file of its private key, without a passphrase.

    Raises:
        ScansideError: a file cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(":".join((*CIPHERS["bcp195-rfc8996-9325"], "@SECLEVEL=2")))
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    where = authorities
    try:
        if authorities is None:
            context.load_default_certs()
        else:
            context.load_verify_locations(authorities)
        if certificate is not None:
            where = certificate
            # Without a password OpenSSL would ask for one on the terminal and hang.
            context.load_cert_chain(certificate, key, password=lambda: "")
    except OSError as error:  # an ssl.SSLError is one, too
        said = getattr(error, "reason", None) or error.strerror or str(error)
        remedy = "name PEM files that this user may read, the key without a passphrase and that of the certificate"
        raise ScansideError(f"this cannot be used for TLS: {said}", str(where or "authorities"), remedy) from error
    return context
