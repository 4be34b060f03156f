"""The bundle: one tar file with its detached signature, and how it is checked before anything in it is used.

The signature covers every byte of the file. The manifest, the first member, states size and SHA-256 of every other one;
what is unpacked is held against it, so that what lies on the box afterwards is what was signed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from .errors import ReleaseError
from .minisign import SUFFIX, Progress, PublicKey, read_signature, verify

MANIFEST = "manifest.json"
FORMAT = 1
GPU_WHEELS, GPU_REQUIREMENTS, GPU_EXTRAS = "wheels-gpu", "gpu.txt", "gpu-extras.txt"
"""What a bundle for boxes with a GPU has besides: a folder, and the lists of what they install."""
_CHUNK = 1 << 20
_LARGEST_MANIFEST = 16 << 20
_VERSION = re.compile(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){1,3}((a|b|rc)(0|[1-9]\d*))?")
_CHANNEL = re.compile(r"[a-z][a-z0-9-]{0,31}")
_COMMENT = re.compile(r"scanside version=(\S+) channel=(\S+) minimum=(\S+)")
_FETCH = "fetch the bundle again; do not use this one"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle that a trusted key signed.

    Attributes:
        minimum: the oldest version that may be updated with it.
        key: id of the key that signed it.
        digest: BLAKE2b-512 of the file, in hexadecimal; tells bundles apart.
    """

    version: str
    channel: str
    minimum: str
    key: str
    digest: str


def version_key(version: str) -> tuple[tuple[int, ...], int, int]:
    """What versions are compared by: 1.2 = 1.2.0 < 1.3a1 < 1.3b1 < 1.3rc1 < 1.3.

    Raises:
        ReleaseError: it is no version of this form.
    """
    if not _VERSION.fullmatch(version):
        raise ReleaseError("this is no version such as 1.2.3 or 1.3.0rc1", version, "name one of that form")
    number, stage, count = re.fullmatch(r"([\d.]+)(?:(a|b|rc)(\d+))?", version).groups()  # type: ignore[union-attr]
    parts = [int(one) for one in number.split(".")]
    return tuple(parts + [0] * (4 - len(parts))), ("a", "b", "rc", None).index(stage), int(count or 0)


def trusted_comment(version: str, channel: str, minimum: str) -> str:
    """What the signature says of the bundle.

    Raises:
        ReleaseError: one of them has not its form.
    """
    for one in (version, minimum):
        version_key(one)
    if not _CHANNEL.fullmatch(channel):
        raise ReleaseError("a channel is a short word in lower case", channel, "name one such as stable")
    if version_key(minimum) > version_key(version):
        raise ReleaseError("the minimum version is above the version itself", f"{minimum} > {version}", "lower it")
    return f"scanside version={version} channel={channel} minimum={minimum}"


def write_tar(path: Path, files: Mapping[str, Path | bytes], seconds: int) -> None:
    """Write files as a tar that depends on nothing but their names and contents.

    Args:
        files: name → file or content; the manifest comes first, the others in their order.
        seconds: the time of all of them, since 1970.
    """
    with path.open("wb") as raw, tarfile.open(fileobj=raw, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name in sorted(files, key=lambda one: (one != MANIFEST, one)):
            source = files[name]
            member = tarfile.TarInfo(name)
            member.mtime, member.mode = seconds, 0o644
            if isinstance(source, bytes):
                member.size = len(source)
                tar.addfile(member, io.BytesIO(source))
            else:
                member.size = source.stat().st_size
                with source.open("rb") as file:
                    tar.addfile(member, file)
        raw.flush()
    with path.open("rb") as written:
        os.fsync(written.fileno())


def sha256_of(source: Path | bytes) -> tuple[str, int]:
    """SHA-256 in hexadecimal, and size in bytes."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest(), len(source)
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), source.stat().st_size


def signed(path: Path, keys: Sequence[PublicKey], progress: Progress | None = None) -> Bundle:
    """Check a bundle's signature; what it says of the bundle. What is inside is for `read_bundle`.

    Args:
        keys: whose signatures count.
        progress: told of bytes read.

    Raises:
        ReleaseError: naming the file that is wrong, and nothing of the bundle may be used.
    """
    signature = read_signature(path.with_name(path.name + SUFFIX))
    try:
        with path.open("rb") as file:
            comment, key, digest = verify(file, path, signature, keys, progress)
    except OSError as error:
        raise ReleaseError(error.strerror or str(error), str(path), "make it readable for this user") from error
    said = _COMMENT.fullmatch(comment)
    if said is None:
        raise ReleaseError("its trusted comment is none of a bundle", f"{path}{SUFFIX}", _FETCH)
    version, channel, minimum = said.groups()
    trusted_comment(version, channel, minimum)
    return Bundle(version, channel, minimum, key, digest.hex())


def read_bundle(
    path: Path, bundle: Bundle, into: Path | None = None, only: Sequence[str] = (), progress: Progress | None = None
) -> dict[str, Any]:
    """Check every file of a bundle against its manifest, and unpack it at the same time; the manifest.

    Args:
        bundle: what `signed` said of it; a file that was changed since then is refused.
        into: an empty folder to unpack into; None: it is only checked.
        only: prefixes of the names to unpack; empty: all.
        progress: told of bytes read.

    Raises:
        ReleaseError: naming the file that is wrong, and nothing of what was unpacked may be used.
    """
    try:
        with path.open("rb") as file:
            again = _Hashing(file, progress)
            manifest = _read_members(cast(BinaryIO, again), path, into, tuple(only))
            digest = again.finish().hex()
    except OSError as error:
        where = str(error.filename or path)
        raise ReleaseError(error.strerror or str(error), where, "make it readable, or make room") from error
    if digest != bundle.digest:
        raise ReleaseError("it was changed while it was read", str(path), "copy it to a place of your own")
    if (bundle.version, bundle.channel, bundle.minimum) != tuple(
        manifest.get(one) for one in ("version", "channel", "minimum")
    ):
        raise ReleaseError("its signature speaks of another version than its manifest", f"{path}{SUFFIX}", _FETCH)
    return manifest


def _read_members(file: BinaryIO, path: Path, into: Path | None, only: tuple[str, ...]) -> dict[str, Any]:
    """Hold every member against the manifest; the manifest."""
    try:
        with tarfile.open(fileobj=file, mode="r|") as tar:
            first = tar.next()
            if first is None or first.name != MANIFEST or not first.isreg() or first.size > _LARGEST_MANIFEST:
                raise ReleaseError(f"{MANIFEST} does not come first", str(path), _FETCH)
            content = cast(BinaryIO, tar.extractfile(first)).read()
            manifest = _parse(content, path)
            wanted: dict[str, dict[str, Any]] = dict(manifest["files"])
            if into is not None and not only:
                _write(into, MANIFEST, io.BytesIO(content))
            while member := tar.next():
                where = f"{path}: {member.name}"
                stated = wanted.pop(member.name, None)
                if stated is None:
                    raise ReleaseError("the manifest does not name this file", where, _FETCH)
                if not member.isreg() or not _is_safe(member.name):
                    raise ReleaseError("this is no plain file below the bundle's folder", where, _FETCH)
                source = cast(BinaryIO, tar.extractfile(member))
                target = into if not only or member.name.startswith(only) else None
                got = _write(target, member.name, source)
                if got != (stated["sha256"], stated["size"]):
                    raise ReleaseError("its SHA-256 or size is not the manifest's", where, _FETCH)
    except tarfile.TarError as error:
        raise ReleaseError(f"this is no tar file: {error}", str(path), _FETCH) from error
    if wanted:
        raise ReleaseError("a file of the manifest is missing", f"{path}: {min(wanted)}", _FETCH)
    return manifest


def _parse(content: bytes, path: Path) -> dict[str, Any]:
    where = f"{path}: {MANIFEST}"
    try:
        manifest = json.loads(content)
        files = manifest["files"]
        sound = all(
            isinstance(name, str) and isinstance(one["sha256"], str) and isinstance(one["size"], int)
            for name, one in files.items()
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ReleaseError("this is no manifest of a bundle", where, _FETCH) from error
    if not sound:
        raise ReleaseError("this is no manifest of a bundle", where, _FETCH)
    if manifest.get("format") != FORMAT:
        raise ReleaseError(
            f"the bundle has format {manifest.get('format')}, known is {FORMAT}", where, "update in smaller steps"
        )
    return cast(dict[str, Any], manifest)


def _is_safe(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and str(PurePosixPath(name)) == name


def _write(into: Path | None, name: str, source: BinaryIO) -> tuple[str, int]:
    """Copy to that folder, synced, or nowhere; SHA-256 and size."""
    total, size = hashlib.sha256(), 0
    target = None
    if into is not None:
        path = into / name
        path.parent.mkdir(parents=True, exist_ok=True)
        target = path.open("xb")
    try:
        while chunk := source.read(_CHUNK):
            total.update(chunk)
            size += len(chunk)
            if target is not None:
                target.write(chunk)
        if target is not None:
            target.flush()
            os.fsync(target.fileno())
    finally:
        if target is not None:
            target.close()
    return total.hexdigest(), size


class _Hashing:
    """A file that is hashed as it is read, so that nobody can change it between two readings."""

    def __init__(self, file: BinaryIO, progress: Progress | None) -> None:
        self._file = file
        self._progress = progress
        self._total = hashlib.blake2b()

    def read(self, size: int = -1) -> bytes:
        """As of a file."""
        chunk = self._file.read(size)
        self._total.update(chunk)
        if self._progress is not None:
            self._progress(len(chunk))
        return chunk

    def finish(self) -> bytes:
        """Read what is left; the BLAKE2b-512 of the whole."""
        while self.read(_CHUNK):
            pass
        return self._total.digest()
