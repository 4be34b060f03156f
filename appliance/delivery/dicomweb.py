"""One try at storing a finding in an archive by STOW-RS."""

from __future__ import annotations

import base64
from pathlib import Path

from appliance.delivery.dicom import DUPLICATE, PASSING
from appliance.delivery.outbox import Result
from dicom_io.errors import ScansideError
from dicom_io.web import Archive, store

_PASSING = (401, 403, 408, 425, 429)
"""Statuses of HTTP below 500 that are worth another try: a login that is being mended, and what passes by itself."""
UNSUPPORTED = (0x0122, 0xC122)
"""SOP Class, or transfer syntax, not supported (PS3.18 I.2)."""


def store_web(path: Path, uid: str, archive: Archive) -> Result:
    """STOW-RS one file (PS3.18 10.5). It is stored if the answer names it as stored, or is a 200 that names no failure.

    A reason that says that it was there before counts as stored: our UIDs are derived from what they name. Lack of
    resources (0xA7xx), a processing failure, and an answer from 500 on are worth another try; so is a 202 that does
    not say what became of the instance.

    Raises:
        PeerError: no connection or no answer.
    """
    answer = store(archive, path, uid)
    said = f"HTTP {answer.status} {answer.said}".strip()
    if answer.failure is not None:
        reason = f"{said}, failure 0x{answer.failure:04X}"
        if answer.failure == DUPLICATE:
            return "acknowledge", f"it was stored before ({reason})"
        if answer.failure & 0xFF00 == 0xA700 or answer.failure in PASSING:
            return "retry", reason
        return ("decline" if answer.failure in UNSUPPORTED else "reject"), reason
    if answer.referenced and 200 <= answer.status < 300:
        return "acknowledge", "" if answer.warning is None else f"{said}, warning 0x{answer.warning:04X}"
    if answer.status == 200:
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
