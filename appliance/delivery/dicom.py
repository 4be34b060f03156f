"""One try at storing a finding in a PACS."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from appliance.delivery.outbox import Result
from dicom_io.errors import NotAccepted
from dicom_io.scu import Peer, send

DUPLICATE = 0x0111
"""Duplicate SOP Instance (PS3.7 C.5.6). Our UIDs are derived from what they name: the peer holds this very object, from
a try whose answer was lost."""
PASSING = (0x0110, 0x0213)
"""Processing failure and Resource limitation (PS3.7 C.5.12, C.5.15)."""
UNSUPPORTED = 0x0122
"""SOP Class not supported (PS3.7 C.5.21)."""


def unusable(status: int) -> bool:
    """Whether a failure says that the peer can do nothing with such an object, so that another one may fare better.

    Its class is not supported, it does not match its class (0xA9xx), or it is not understood (0xCxxx; PS3.4 B.2.3).
    """
    return status == UNSUPPORTED or status & 0xFF00 == 0xA900 or status & 0xF000 == 0xC000


def store(path: Path, peer: Peer, calling_ae: str, *, commitment: bool = False, syntaxes: Sequence[str] = ()) -> Result:
    """C-STORE one file (PS3.4 Annex B). Success and warnings count as stored, and so does "I have it already".

    A refusal for lack of resources (0xA7xx, 0x0213), a processing failure (0x0110, what many answer while their
    database is away), and no answer at all are worth another try; another failure status is the peer's verdict on
    the object and stays so, and so does a class that it does not take: other findings go their way all the same.
    "decline" is a verdict on all such objects (`unusable`).

    Args:
        commitment: what is stored is still to be committed to.
        syntaxes: transfer syntaxes that the peer is offered, the best first; see `dicom_io.scu.send`.

    Raises:
        PeerError: no association.
    """
    stored: Literal["acknowledge", "store"] = "store" if commitment else "acknowledge"
    try:
        (result,) = send([path], peer, calling_ae, syntaxes=syntaxes)
    except NotAccepted as refusal:
        return "decline", str(refusal)
    if not result.error:
        warning = "" if result.status == 0 else f"warning 0x{result.status:04X}"
        return stored, ", ".join(filter(None, (warning, result.note)))
    if result.status == DUPLICATE:
        return stored, "it was stored before (0x0111)"
    retry = result.status is None or result.status & 0xFF00 == 0xA700 or result.status in PASSING
    if retry:
        return "retry", result.error
    return ("decline" if unusable(result.status or 0) else "reject"), result.error
