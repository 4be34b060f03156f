"""One try at storing a finding in a PACS."""

from __future__ import annotations

from pathlib import Path

from appliance.delivery.outbox import Result
from dicom_io.scu import Peer, send


def store(path: Path, peer: Peer, calling_ae: str) -> Result:
    """C-STORE one file (PS3.4 Annex B). Success and warnings count as stored.

    A refusal for lack of resources (0xA7xx), and no answer at all, are worth another try; another failure status
    is the peer's verdict on the object and stays so.

    Raises:
        PeerError: no association.
    """
    (result,) = send([path], peer, calling_ae)
    if not result.error:
        return "acknowledge", "" if result.status == 0 else f"warning 0x{result.status:04X}"
    retry = result.status is None or result.status & 0xFF00 == 0xA700
    return ("retry" if retry else "reject"), result.error
