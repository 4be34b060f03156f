"""One try at storing a finding in an archive by STOW-RS."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from pydicom.uid import UID, ExplicitVRLittleEndian

from appliance.delivery.dicom import DUPLICATE, PASSING, unusable
from appliance.delivery.outbox import Result, Said
from dicom_io.errors import ScansideError
from dicom_io.transcode import fitting, transcoded
from dicom_io.web import Archive, Stored, store

_PASSING = (401, 403, 408, 425, 429)
"""Statuses of HTTP below 500 that are worth another try: a login that is being mended, and what passes by itself."""
SYNTAX = 0xC122
"""Transfer syntax not supported (PS3.18 I.2)."""


def store_web(path: Path, uid: str, archive: Archive, syntaxes: Sequence[str] = ()) -> Result:
    """STOW-RS one file, in the first of some transfer syntaxes that the archive takes.

    There is no negotiation: if it answers that it does not support one (0xC122, 415) the next is tried at once.

    Args:
        syntaxes: of `dicom_io.transcode.SYNTAXES`, the best first; after them comes Explicit VR Little Endian, which
            our files have.

    Raises:
        PeerError: no connection or no answer.
    """
    wanted = dict.fromkeys((*(fitting(path, syntaxes) if syntaxes else ()), str(ExplicitVRLittleEndian)))
    refused = ""
    for syntax in wanted:
        with TemporaryDirectory() as folder:
            written = path
            if syntax != ExplicitVRLittleEndian:
                written = Path(folder) / "transcoded.dcm"
                transcoded(path, written, syntax)
            answer = store(archive, written, uid)
        outcome, said = _judged(answer)
        _, condition = _judged(replace(answer, said=""))
        if answer.failure != SYNTAX and not (answer.failure is None and answer.status == 415):
            break
        refused = refused or UID(syntax).name
    if refused and outcome == "acknowledge":
        note = f"in {UID(syntax).name}: it does not accept {refused}"
        said, condition = (", ".join(filter(None, (one, note))) for one in (said, condition))
    return outcome, Said(said, condition)


def _judged(answer: Stored) -> Result:
    """What an answer means (PS3.18 10.5): stored, if it names the instance as stored or is a 200 without a data set.

    A reason that says that it was there before counts as stored: our UIDs are derived from what they name. Lack of
    resources (0xA7xx), a processing failure, and an answer from 500 on are worth another try; so is one that does
    not say what became of the instance. "decline" is a verdict on all such objects.
    """
    said = f"HTTP {answer.status} {answer.said}".strip()
    if answer.failure is not None:
        reason = f"{said}, failure 0x{answer.failure:04X}"
        if answer.failure == DUPLICATE:
            return "acknowledge", f"it was stored before ({reason})"
        if answer.failure & 0xFF00 == 0xA700 or answer.failure in PASSING:
            return "retry", reason
        return ("decline" if unusable(answer.failure) else "reject"), reason
    if answer.referenced and 200 <= answer.status < 300:
        return "acknowledge", "" if answer.warning is None else f"{said}, warning 0x{answer.warning:04X}"
    if answer.status == 200 and not answer.told:
        return "acknowledge", said
    if 200 <= answer.status < 300:
        return "retry", f"{said}, and it does not say whether the instance is stored"
    if answer.status >= 500 or answer.status in _PASSING:
        return "retry", said
    return ("decline" if answer.status == 415 else "reject"), said


def authorization(username: str, password_file: Path | None, token_file: Path | None) -> str:
    """The value of an Authorization header: Basic (RFC 7617) or Bearer (RFC 6750); '' for neither.

    Raises:
        ScansideError: a file cannot be read.
    """
    if token_file is not None:
        return f"Bearer {_secret(token_file)}"
    if password_file is not None:
        return "Basic " + base64.b64encode(f"{username}:{_secret(password_file)}".encode()).decode("ascii")
    return ""


def _secret(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ScansideError(f"the login cannot be read: {error}", str(path), "make it readable for us") from error
