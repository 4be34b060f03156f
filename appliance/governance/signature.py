"""Detached Ed25519 signatures (RFC 8032) of model packages, and the keys that make and check them.

What is signed is the exact bytes of ``package.toml``; that file states the SHA-256 of every other file, so one
signature covers the package. It lies beside it as ``package.sig``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from dicom_io.errors import ScansideError

SIGNATURE = "package.sig"
ALGORITHM = "Ed25519"
SIGNATURE_BYTES = 64
"""RFC 8032 5.1.6: R and S of 32 bytes each."""

Keyring: TypeAlias = Mapping[str, Ed25519PublicKey]
"""Trusted public keys by their `key_id`."""

_KEY_ID = re.compile(r"[0-9a-f]{16}")
_RESTORE = "restore the package as it was published; do not use it"


class SignatureError(ScansideError):
    """A signature that is absent, broken or by nobody who is trusted, or a key that cannot be used."""


@dataclass(frozen=True, slots=True)
class Signature:
    """One signature file.

    Attributes:
        key: the `key_id` of the key that made it.
        value: the signature, 64 bytes.
    """

    key: str
    value: bytes

    def encode(self) -> bytes:
        """The file's content; there is only one for each signature."""
        text = base64.b64encode(self.value).decode("ascii")
        return (json.dumps({"algorithm": ALGORITHM, "key": self.key, "signature": text}, indent=2) + "\n").encode()

    @staticmethod
    def decode(content: bytes, where: Path) -> Signature:
        """Read a signature file.

        Args:
            where: the file, for the error.

        Raises:
            SignatureError: it is not byte for byte what `encode` makes.
        """
        try:
            data = json.loads(content)
            signature = Signature(data["key"], base64.b64decode(data["signature"], validate=True))
            # Another spelling of the same signature (blanks, a key twice, base64's spare bits) is nobody's that signs.
            sound = (
                _KEY_ID.fullmatch(signature.key) is not None
                and len(signature.value) == SIGNATURE_BYTES
                and signature.encode() == content
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise SignatureError("this is no signature that scanside makes", str(where), _RESTORE) from error
        if not sound:
            raise SignatureError("this is no signature that scanside makes", str(where), _RESTORE)
        return signature


def key_id(key: Ed25519PublicKey) -> str:
    """What a key is called: the first 16 hexadecimal digits of the SHA-256 of its 32 bytes."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


def sign(content: bytes, key: Ed25519PrivateKey) -> Signature:
    """The signature of a package.toml."""
    return Signature(key_id(key.public_key()), key.sign(content))


def check(content: bytes, where: Path, trusted: Keyring) -> str:
    """Check that a trusted key signed this.

    Args:
        content: the bytes of package.toml.
        where: its signature file.
        trusted: whose signatures count.

    Returns:
        The id of the key that signed it.

    Raises:
        SignatureError: naming the signature file: it cannot be read or is none, its key is not trusted, or it is not
            the signature of this content.
        FileNotFoundError: there is no signature file.
    """
    try:
        signature = Signature.decode(where.read_bytes(), where)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise SignatureError(error.strerror or str(error), str(where), "make it readable for this user") from error
    key = trusted.get(signature.key)
    if key is None:
        raise SignatureError(
            f"it is signed by key {signature.key}, which is not trusted ({', '.join(sorted(trusted)) or 'no key'} is)",
            str(where),
            "if you trust its maker, get the public key from there and add it to models.trusted_keys",
        )
    try:
        key.verify(signature.value, content)
    except InvalidSignature as error:
        raise SignatureError(
            f"it is not key {signature.key}'s signature of the package.toml beside it; one of the two was changed",
            str(where),
            _RESTORE,
        ) from error
    return signature.key


def read_keyring(paths: Sequence[Path]) -> dict[str, Ed25519PublicKey]:
    """Trusted keys from PEM files (RFC 8410), one in each.

    Raises:
        SignatureError: naming the file that cannot be read or holds no public Ed25519 key.
    """
    keys = [_read_public(path) for path in paths]
    return {key_id(key): key for key in keys}


def read_private(path: Path) -> Ed25519PrivateKey:
    """The key to sign with, from a PEM file without a password (PKCS #8).

    Raises:
        SignatureError: naming the file that cannot be read or holds no private Ed25519 key.
    """
    content = _read(path)
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except TypeError as error:  # what the library says of a password
        raise SignatureError("this key has a password", str(path), "write it to a file without one") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SignatureError(
            "this is no private key in PEM", str(path), "name the file that `scanside models keygen` wrote"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise SignatureError("this is no Ed25519 key", str(path), "make one with `scanside models keygen`")
    return key


def public_path(private: Path) -> Path:
    """Where `write_keys` puts the public half: key.pem → key.pub.pem."""
    return private.with_name(private.name.removesuffix(".pem") + ".pub.pem")


def write_keys(path: Path) -> Ed25519PublicKey:
    """Make a key; write its private half to a file that only its owner can read, the public half beside it.

    Args:
        path: for the private half, PEM PKCS #8; `public_path` says where the other goes.

    Raises:
        SignatureError: one of the two files is there already.
    """
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    if public_path(path).exists():
        raise SignatureError("there is a key already", str(public_path(path)), "choose another name")
    _write_new(path, private, 0o600)
    _write_new(public_path(path), public, 0o644)
    return key.public_key()


def _write_new(path: Path, content: bytes, mode: int) -> None:
    # The mode is the file's from its first moment on, and O_EXCL follows no link to somebody else's file.
    try:
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError as error:
        raise SignatureError("there is a file already", str(path), "choose another name") from error
    with os.fdopen(number, "wb") as file:
        file.write(content)


def _read_public(path: Path) -> Ed25519PublicKey:
    content = _read(path)
    if b"PRIVATE KEY" in content:
        raise SignatureError("this is a private key", str(path), "name its public half, and keep this file off the box")
    try:
        key = serialization.load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SignatureError("this is no public key in PEM", str(path), "name a public Ed25519 key") from error
    if not isinstance(key, Ed25519PublicKey):
        raise SignatureError("this is no Ed25519 key", str(path), "name a public Ed25519 key")
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SignatureError(error.strerror or str(error), str(path), "name a key file that you can read") from error
