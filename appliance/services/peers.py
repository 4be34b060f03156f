"""How the box connects to others, by the settings."""

from __future__ import annotations

import ssl

from appliance.delivery.tls import client_context
from appliance.settings import ClientTls


def context_of(tls: ClientTls | None) -> ssl.SSLContext:
    """The context for connections to a peer, with TLS.

    Raises:
        ScansideError: a file cannot be used.
    """
    return client_context(tls.authorities, tls.certificate, tls.key) if tls else client_context()
