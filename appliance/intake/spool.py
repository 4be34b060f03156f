"""The folder of received Part 10 files, named by their SHA-256."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable
from pathlib import Path


class Spool:
    """A content-addressed folder; a file in it is whole, synced, and never changed.

    Args:
        directory: made if absent.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._incoming = directory / "incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)

    def put(self, content: bytes) -> str:
        """Write a file, sync it and its folder, and return its digest (64 hexadecimal digits).

        Until it is whole it lies in ``incoming/`` under a name that nothing else reads.

        Raises:
            OSError: the disk is full or broken; nothing is left behind under the digest's name.
        """
        digest = hashlib.sha256(content).hexdigest()
        final = path_of(self._directory, digest)
        part = self._incoming / f"{digest}.{os.getpid()}.{threading.get_ident()}"
        final.parent.mkdir(exist_ok=True)
        try:
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fdatasync(file.fileno())
            part.replace(final)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        _sync_directory(final.parent)
        _sync_directory(self._directory)
        return digest

    def shortage(self, reserve_percent: float, reserve_bytes: int) -> str:
        """Why the disk should take no more, in a sentence without its full stop; '' if it may.

        The reserve is for what was already accepted: the ledger, findings and messages still have to be written.

        Args:
            reserve_percent: least share of the file system, and of its inodes where it counts them, to leave free.
            reserve_bytes: least number of bytes to leave free.
        """
        disk = os.statvfs(self._directory)
        free = disk.f_bavail * disk.f_frsize
        share = 100 * disk.f_bavail / disk.f_blocks if disk.f_blocks else 100.0
        inodes = 100 * disk.f_favail / disk.f_files if disk.f_files else 100.0
        if free < reserve_bytes or share < reserve_percent:
            return f"the disk's reserve is reached ({free / 1e9:.1f} GB, {share:.1f} % free)"
        if inodes < reserve_percent:
            return f"the disk's reserve of inodes is reached ({inodes:.1f} % free)"
        return ""

    def sweep(self, known: Iterable[str]) -> int:
        """Delete what was never acknowledged: half-written files, and whole ones that no row speaks of.

        For the start of intake, before it listens. Returns how many files went.
        """
        keep = set(known)
        gone = [path for path in self._incoming.iterdir() if path.is_file()]
        gone += [path for path in self._directory.glob("??/*.dcm") if path.stem not in keep]
        for path in gone:
            path.unlink()
        return len(gone)


def path_of(directory: Path, digest: str) -> Path:
    """Where the file with that digest lies in a spool."""
    return directory / digest[:2] / f"{digest}.dcm"


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
