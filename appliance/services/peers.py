"""How the box connects to others, by the settings."""

from __future__ import annotations

import ssl

from appliance.delivery.tls import client_context
from appliance.settings import ClientTls, DicomDestination, ModalityWorklist, Performing, UpsDestination
from dicom_io.scu import Peer


def peer_of(section: DicomDestination | ModalityWorklist | Performing | UpsDestination) -> Peer:
    """The DICOM peer of a section; files for TLS are read anew.

    Raises:
        ScansideError: one of them cannot be used.
    """
    return Peer(section.ae_title, section.host, section.port, context_of(section.tls) if section.tls else None)


def context_of(tls: ClientTls | None) -> ssl.SSLContext:
    """The context for connections to a peer, with TLS.

    Raises:
        ScansideError: a file cannot be used.
    """
    return client_context(tls.authorities, tls.certificate, tls.key) if tls else client_context()
