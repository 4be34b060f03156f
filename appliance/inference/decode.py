"""The frames of a volume, decoded once each, several at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dicom_io.errors import DecodeError
from dicom_io.pixels import Decoded, decode
from dicom_io.volume import Volume


@dataclass(frozen=True, slots=True)
class DecodedVolume:
    """The planes of a volume in HU.

    Attributes:
        hu: one float32 array (rows, columns) a plane, in the order of ``volume.planes``.
        codecs: the decoders that produced them, sorted, each once.
    """

    hu: tuple[NDArray[np.float32], ...]
    codecs: tuple[str, ...]

    def plane(self, index: int) -> NDArray[np.float32]:
        """The plane with that index, in HU."""
        return self.hu[index]


def decode_volume(volume: Volume, files: Mapping[str, tuple[Path, str]]) -> DecodedVolume:
    """Decode every plane of a volume; codecs release the interpreter's lock, so a thread a core is busy.

    Args:
        files: SOP Instance UID → Part 10 file, and the SHA-256 that it must have.

    Raises:
        DecodeError: a frame that cannot be trusted, or a file that is no longer what was received; nothing is
            returned in its place.
    """
    uids = list(dict.fromkeys(plane.sop_instance_uid for plane in volume.planes))
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        decoded = dict(zip(uids, pool.map(lambda uid: decode_verified(*files[uid]), uids), strict=True))
    planes = []
    for plane in volume.planes:
        frames = decoded[plane.sop_instance_uid].hu
        if plane.frame >= len(frames):
            raise DecodeError(
                f"the header speaks of frame {plane.frame + 1}, the pixel data holds {len(frames)}",
                plane.sop_instance_uid,
                "send the instance again",
            )
        planes.append(frames[plane.frame])
    return DecodedVolume(tuple(planes), tuple(sorted({one.codec for one in decoded.values()})))


def decode_verified(path: Path, digest: str) -> Decoded:
    """Decode a file of the spool that is still what was received.

    Raises:
        DecodeError: its SHA-256 is not that digest, or its pixels cannot be trusted.
    """
    return decode(verified(path, digest))


def verified(path: Path, digest: str) -> Path:
    """The path, if the file's SHA-256 is that digest.

    Raises:
        DecodeError: it is not, or there is no such file.
    """
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        # Unlike a disk that cannot be read for a moment, this does not pass.
        raise DecodeError("the file is gone", str(path), "restore the spool, or send it again") from error
    if found != digest:
        raise DecodeError("the file changed since it was received", str(path), "check the disk; send it again")
    return path
