"""Signatures and keys in the formats of minisign (https://jedisct1.github.io/minisign/).

A signature file has four lines: an untrusted comment, the signature, a trusted comment, and a signature of both. What
is signed is the file's BLAKE2b-512 (algorithm ``ED``); the older kind (``Ed``), over the file itself, is read, too.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import mmap
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from .errors import ReleaseError

SUFFIX = ".minisig"
PREHASHED, LEGACY = b"ED", b"Ed"
_KEY, _SCRYPT, _NO_KDF, _BLAKE2B = b"Ed", b"Sc", b"\0\0", b"B2"
_UNTRUSTED, _TRUSTED = "untrusted comment: ", "trusted comment: "
_CHUNK = 1 << 20
# libsodium's "sensitive" limits of scrypt, which minisign uses: N = 2**20, r = 8, p = 1, a gibibyte of memory.
_OPERATIONS, _MEMORY = 33_554_432, 1_073_741_824
_LARGEST_MEMORY = 1 << 31

Progress = Callable[[int], object]
"""Told how many more bytes are done."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key that signatures are checked with.

    Attributes:
        number: 8 bytes that name it.
        value: 32 bytes (RFC 8032).
        where: the file it is from.
    """

    number: bytes
    value: bytes
    where: str

    @property
    def id(self) -> str:
        """Its number as minisign prints it."""
        return key_id(self.number)

    def encode(self) -> str:
        """The content of its file."""
        blob = base64.b64encode(_KEY + self.number + self.value).decode("ascii")
        return f"{_UNTRUSTED}minisign public key {self.id}\n{blob}\n"


@dataclass(frozen=True, slots=True)
class SecretKey:
    """A key that signatures are made with."""

    number: bytes
    seed: bytes

    @property
    def public(self) -> PublicKey:
        """What its signatures are checked with."""
        return PublicKey(self.number, self._key().public_key().public_bytes_raw(), "")

    def sign(self, content: bytes) -> bytes:
        """64 bytes."""
        return self._key().sign(content)

    def _key(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self.seed)

    def encode(self, password: str = "") -> str:
        """The content of its file; without a password the key in it is not encrypted."""
        pair = self.seed + self.public.value
        secret = self.number + pair + _checksum(self.number, pair)
        if password:
            salt, operations, memory, kdf = secrets.token_bytes(32), _OPERATIONS, _MEMORY, _SCRYPT
            secret = _crypt(secret, password, salt, operations, memory)
        else:
            salt, operations, memory, kdf = bytes(32), 0, 0, _NO_KDF
        limits = operations.to_bytes(8, "little") + memory.to_bytes(8, "little")
        blob = base64.b64encode(_KEY + kdf + _BLAKE2B + salt + limits + secret).decode("ascii")
        kind = "encrypted secret key" if password else "secret key"
        return f"{_UNTRUSTED}minisign {kind} {self.public.id}\n{blob}\n"


@dataclass(frozen=True, slots=True)
class Signature:
    """A signature file, read and not checked yet."""

    algorithm: bytes
    number: bytes
    value: bytes
    comment: str
    comment_signature: bytes


def key_id(number: bytes) -> str:
    """How minisign prints the number of a key: as a little-endian integer in hexadecimal."""
    return f"{int.from_bytes(number, 'little'):016X}"


def new_key() -> SecretKey:
    """A new key with a number drawn at random."""
    return SecretKey(secrets.token_bytes(8), secrets.token_bytes(32))


def read_public_key(path: Path) -> PublicKey:
    """Read a public key's file.

    Raises:
        ReleaseError: it cannot be read, or is none.
    """
    blob = _decode(_lines(path, "public key")[1], 42)
    if blob is None or blob[:2] != _KEY:
        raise ReleaseError("this is no public key of minisign", str(path), "name the .pub file of the release key")
    return PublicKey(blob[2:10], blob[10:], str(path))


def read_secret_key(path: Path, password: Callable[[], str] | None = None) -> SecretKey:
    """Read a secret key's file, encrypted or not.

    Args:
        password: asked for the password of an encrypted one.

    Raises:
        ReleaseError: it cannot be read, is none, or the password is wrong.
    """
    blob = _decode(_lines(path, "secret key")[1], 158)
    if blob is None or blob[:2] != _KEY or blob[4:6] != _BLAKE2B or blob[2:4] not in (_SCRYPT, _NO_KDF):
        raise ReleaseError("this is no secret key of minisign", str(path), "name the file that keygen wrote")
    secret = blob[54:]
    if blob[2:4] == _SCRYPT:
        if password is None:
            raise ReleaseError("this key is encrypted", str(path), "name the file of its password")
        operations, memory = (int.from_bytes(blob[at : at + 8], "little") for at in (38, 46))
        secret = _crypt(secret, password(), blob[6:38], operations, memory)
    number, pair, checksum = secret[:8], secret[8:72], secret[72:]
    # minisign leaves the checksum of a key that is not encrypted empty.
    unset = blob[2:4] == _NO_KDF and checksum == bytes(32)
    if not unset and not hmac.compare_digest(_checksum(number, pair), checksum):
        raise ReleaseError("the password is wrong, or the key is damaged", str(path), "give the right one")
    key = SecretKey(number, pair[:32])
    if key.public.value != pair[32:]:
        raise ReleaseError("the two halves of this key do not match", str(path), "restore it from its backup")
    return key


def sign(path: Path, key: SecretKey, comment: str, untrusted: str = "signature from scanside") -> str:
    """The content of a file's signature file.

    Args:
        comment: the trusted comment, one line, which is signed, too.
    """
    value = key.sign(digest_of(path))
    first = base64.b64encode(PREHASHED + key.number + value).decode("ascii")
    second = base64.b64encode(key.sign(value + comment.encode("utf-8"))).decode("ascii")
    return f"{_UNTRUSTED}{untrusted}\n{first}\n{_TRUSTED}{comment}\n{second}\n"


def read_signature(path: Path) -> Signature:
    """Read a signature file.

    Raises:
        ReleaseError: it is not there, cannot be read, or is none.
    """
    if not path.exists():
        raise ReleaseError("there is no signature", str(path), "fetch it from where the bundle came; do not go on")
    lines = _lines(path, "signature", 4)
    first, second = _decode(lines[1], 74), _decode(lines[3], 64)
    known = first is not None and first[:2] in (PREHASHED, LEGACY)
    if first is None or second is None or not known or not lines[2].startswith(_TRUSTED):
        raise ReleaseError("this is no signature of minisign", str(path), "fetch it from where the bundle came")
    return Signature(first[:2], first[2:10], first[10:], lines[2].removeprefix(_TRUSTED), second)


def verify(
    file: BinaryIO, where: Path, signature: Signature, keys: Sequence[PublicKey], progress: Progress | None = None
) -> tuple[str, str, bytes]:
    """Check that one of these keys signed that open file.

    Args:
        file: is read from its beginning to its end.
        where: the file's name, for errors.

    Returns:
        The trusted comment, the id of the key, and the BLAKE2b-512 of the file.

    Raises:
        ReleaseError: nobody who is trusted signed exactly this.
    """
    key = next((one for one in keys if one.number == signature.number), None)
    if key is None:
        trusted = ", ".join(one.id for one in keys) or "no key"
        raise ReleaseError(
            f"it is signed by key {key_id(signature.number)}, which is not trusted ({trusted} is)",
            f"{where}{SUFFIX}",
            "do not use it, unless you expected a new key; then get its public key by a way you trust",
        )
    digest = _digest(file, progress)
    public = Ed25519PublicKey.from_public_bytes(key.value)
    try:
        if signature.algorithm == PREHASHED:
            public.verify(signature.value, digest)
        else:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                public.verify(signature.value, content)  # type: ignore[arg-type]  # any buffer is taken
    except InvalidSignature:
        raise ReleaseError(
            f"it is not what key {key.id} signed: it was changed, or not copied whole", str(where), "fetch it again"
        ) from None
    try:
        public.verify(signature.comment_signature, signature.value + signature.comment.encode("utf-8"))
    except InvalidSignature:
        raise ReleaseError("its trusted comment was changed", f"{where}{SUFFIX}", "fetch it again") from None
    return signature.comment, key.id, digest


def digest_of(path: Path, progress: Progress | None = None) -> bytes:
    """The BLAKE2b-512 of a file."""
    with path.open("rb") as file:
        return _digest(file, progress)


def _digest(file: BinaryIO, progress: Progress | None) -> bytes:
    file.seek(0, os.SEEK_SET)
    total = hashlib.blake2b()
    while chunk := file.read(_CHUNK):
        total.update(chunk)
        if progress is not None:
            progress(len(chunk))
    return total.digest()


def _checksum(number: bytes, pair: bytes) -> bytes:
    return hashlib.blake2b(_KEY + number + pair, digest_size=32).digest()


def _crypt(secret: bytes, password: str, salt: bytes, operations: int, memory: int) -> bytes:
    """Exclusive or with scrypt's output, whose parameters follow from the limits as in libsodium (pickparams)."""
    if not 0 < memory <= _LARGEST_MEMORY:
        raise ReleaseError("this key asks for more memory than scrypt may have", f"{memory} bytes", "make another key")
    r, operations = 8, max(operations, 32768)
    parallel = 1
    largest = operations // (4 * r) if operations < memory // 32 else memory // (128 * r)
    log_n = next(one for one in range(1, 64) if 2**one > largest // 2)
    if operations >= memory // 32:
        parallel = max(min((operations // 4) // 2**log_n, 0x3FFFFFFF) // r, 1)
    stream = hashlib.scrypt(
        password.encode("utf-8"), salt=salt, n=2**log_n, r=r, p=parallel, dklen=len(secret),
        maxmem=min(128 * r * (2**log_n + parallel + 8), _LARGEST_MEMORY - 1),
    )  # fmt: skip
    return bytes(one ^ other for one, other in zip(secret, stream, strict=True))


def _lines(path: Path, what: str, count: int = 2) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        lines = []
    except OSError as error:
        raise ReleaseError(error.strerror or str(error), str(path), "make it readable for this user") from error
    if len(lines) != count or not lines[0].startswith(_UNTRUSTED):
        raise ReleaseError(f"this is no {what} of minisign", str(path), "name the right file")
    return lines


def _decode(text: str, length: int) -> bytes | None:
    try:
        blob = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return blob if len(blob) == length else None
