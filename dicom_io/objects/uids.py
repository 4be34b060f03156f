"""Unique identifiers that a retry finds again."""

from __future__ import annotations

import hashlib
import re
import uuid

from dicom_io.errors import ScansideError

_MAXIMUM = 64
_FEWEST_DIGITS = 24
_ROOT = re.compile(r"[012](\.(0|[1-9][0-9]*))+")
_NAMESPACE = uuid.UUID("6f0a2a5e-8a0b-5d55-9c53-0d5f3ad6a5c1")


def derived_uid(root: str, *parts: str) -> str:
    """The UID that these parts always have under this root.

    With root "2.25" the UID is a version 5 UUID (PS3.5 B.2); under an organisation's own root it is that root and
    decimal digits of a SHA-256 over the parts.

    Returns: a UID of at most 64 characters (PS3.5 9.1).
    Raises: ScansideError if the root is no UID, or leaves fewer than 24 digits.
    """
    name = "".join(f"{len(part)}:{part}" for part in parts)  # ("ab", "c") and ("a", "bc") differ
    if root == "2.25":
        return f"2.25.{uuid.uuid5(_NAMESPACE, name).int}"
    digits = _MAXIMUM - len(root) - 1
    if not _ROOT.fullmatch(root) or digits < _FEWEST_DIGITS:
        raise ScansideError(
            "not usable as the root of UIDs",
            f"UID root {root!r}",
            f"give 2.25 or an organisation's root of at most {_MAXIMUM - 1 - _FEWEST_DIGITS} characters",
        )
    number = int.from_bytes(hashlib.sha256(name.encode()).digest(), "big")
    # The leading 1 keeps the component from starting with 0 and every UID of a root equally long.
    return f"{root}.1{number % 10 ** (digits - 1):0{digits - 1}d}"
