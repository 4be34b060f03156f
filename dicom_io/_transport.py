"""TCP settings for request-and-answer traffic, on the sockets below pynetdicom's associations."""

from __future__ import annotations

import socket
from typing import Any


def send_at_once(event: Any) -> None:
    """For EVT_CONN_OPEN: do not hold back a PDU until the peer has acknowledged the one before (40 ms)."""
    event.assoc.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def acknowledge_at_once(event: Any) -> None:
    """For EVT_PDU_SENT and EVT_PDU_RECV: do not delay the acknowledgement that a peer may be waiting for.

    DCMTK, and so Orthanc and many a device, leaves its PDUs to Nagle's algorithm: it sends the second of two small
    ones only after that acknowledgement. Linux forgets this setting as it goes, so it is set for each PDU.
    """
    connection = event.assoc.dul.socket.socket
    if connection is not None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        except OSError:
            return  # closed in the meantime; whoever reads next will see it
