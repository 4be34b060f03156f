"""Files of the spool that are still what was received, decoded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dicom_io.errors import DecodeError
from dicom_io.pixels import Decoded, FrameDecoder, decode, decode_many


def decode_verified_many(files: Sequence[tuple[Path, str]], decoder: FrameDecoder | None = None) -> list[Decoded]:
    """Decode files of the spool that are still what was received, as `dicom_io.pixels.decode_many` does.

    Args:
        files: Part 10 files in the order of the volume, with the SHA-256 that each must have.

    Raises:
        DecodeError: a file has another SHA-256, or its pixels cannot be trusted.
        ImplausibleImage: the decoder and the reference disagree.
    """
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        paths = list(pool.map(lambda file: verified(*file), files))
    return decode_many(paths, decoder)


def decode_each(files: Sequence[tuple[Path, str]]) -> list[Decoded]:
    """The same by the reference decoders, one after the other on this thread: its caller has a thread a core."""
    return [decode_verified(*file) for file in files]


def decode_verified(path: Path, digest: str) -> Decoded:
    """Decode a file of the spool that is still what was received.

    Raises:
        DecodeError: its SHA-256 is not that digest, or its pixels cannot be trusted.
    """
    content = _read(path)
    _check(path, hashlib.sha256(content).hexdigest(), digest)
    return decode(path, content)


def verified(path: Path, digest: str) -> Path:
    """The path, if the file's SHA-256 is that digest.

    Raises:
        DecodeError: it is not, or there is no such file.
    """
    _check(path, hashlib.sha256(_read(path)).hexdigest(), digest)
    return path


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        # Unlike a disk that cannot be read for a moment, this does not pass.
        raise DecodeError("the file is gone", str(path), "restore the spool, or send it again") from error


def _check(path: Path, found: str, digest: str) -> None:
    if found != digest:
        raise DecodeError("the file changed since it was received", str(path), "check the disk; send it again")
