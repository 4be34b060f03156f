"""The folder of received Part 10 files, named by their SHA-256."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import os
import queue
from collections.abc import Container, Iterable
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_START_WRITING = 2  # SYNC_FILE_RANGE_WRITE of sync_file_range(2)

SETTLE_AFTER = 32
"""So many files of a lane may wait for the folders of their own names to be synced."""


class Lane:
    """A folder in which one association after another makes its files durable, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.numbers = itertools.count()
        self.named: list[tuple[Path, Path]] = []  # each file that has its own name, and that name, not synced yet


class Incoming:
    """A file on its way into the spool: in its lane, where nothing reads it, until `Spool.publish`."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.path = lane.folder / f"{next(lane.numbers)}"
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
        self._hash = hashlib.sha256()
        self.size = 0
        self.digest = ""
        self.published = False

    def write(self, data: memoryview) -> None:
        """Append bytes.

        Raises:
            OSError: the disk is full or broken.
        """
        rest = data
        while rest:
            rest = rest[os.write(self._file, rest) :]
        # The disk works while the digest is computed. A failure shows in `sync`.
        _LIBC.sync_file_range(self._file, ctypes.c_int64(self.size), ctypes.c_int64(len(data)), _START_WRITING)
        self._hash.update(data)
        self.size += len(data)

    def sync(self) -> str:
        """Make content and name durable; returns the digest (64 hexadecimal digits). The file is closed then.

        Raises:
            OSError: as `write`; the content may be lost.
        """
        try:
            os.fdatasync(self._file)
        finally:
            self._close()
        sync_folder(self.path.parent)
        self.digest = self._hash.hexdigest()
        return self.digest

    def discard(self) -> None:
        """Remove it. One that was published stays, even if its row failed: a row that was half written may yet come
        to light after a crash, and needs its file. Without one the next start sweeps it."""
        self._close()
        if not self.published:
            self.path.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class Spool:
    """A content-addressed folder; a file in it is whole, synced, and never changed.

    A file is made durable in its lane, a folder that no other association touches, so that syncing the folder waits
    for nobody. It gets its own name as a second one, which is not synced at once: where a power cut takes that back,
    `recover` gives it again, and the name in the lane goes only once the other is durable.

    Args:
        directory: made if absent.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._incoming = directory / "incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)
        self._lanes = itertools.count()
        self._free: queue.SimpleQueue[Lane] = queue.SimpleQueue()
        for number in range(256):
            (directory / f"{number:02x}").mkdir(exist_ok=True)
        for folder in (directory, directory.parent, self._incoming):
            sync_folder(folder)

    def take_lane(self) -> Lane:
        """A lane for an association, to be given back.

        Raises:
            OSError: the disk is full or broken.
        """
        try:
            return self._free.get_nowait()
        except queue.Empty:
            folder = self._incoming / f"{next(self._lanes):03d}"
            folder.mkdir(exist_ok=True)
            sync_folder(self._incoming)
            return Lane(folder)

    def give_back(self, lane: Lane) -> None:
        """An association has ended.

        Raises:
            OSError: the disk is broken; the lane is not used again.
        """
        self._settle(lane)
        self._free.put(lane)

    def open(self, lane: Lane) -> Incoming:
        """A new file to receive an instance; one at a time in a lane.

        Raises:
            OSError: the disk is full or broken.
        """
        if len(lane.named) >= SETTLE_AFTER:
            self._settle(lane)
        return Incoming(lane)

    def publish(self, incoming: Incoming) -> None:
        """Give a synced file the name of its digest.

        Raises:
            OSError: the disk is broken.
        """
        name = path_of(self._directory, incoming.digest)
        with contextlib.suppress(FileExistsError):  # the same bytes came before
            os.link(incoming.path, name)
        incoming.published = True
        incoming.lane.named.append((incoming.path, name))

    def _settle(self, lane: Lane) -> None:
        """Make the names of a lane's files durable, and take them out of the lane."""
        for folder in {name.parent for _, name in lane.named}:
            sync_folder(folder)
        for path, _ in lane.named:
            path.unlink(missing_ok=True)
        lane.named.clear()

    def recover(self, known: Container[str]) -> int:
        """Name again what a power cut took the name from; returns how many files.

        For the start of every service that reads the spool. What has a row and no name of its own is of an earlier
        run, because a file is named before its row is written.
        """
        named = 0
        for path in self._incoming.glob("*/*"):
            with contextlib.suppress(FileNotFoundError, FileExistsError):  # another, or an association, was faster
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                name = path_of(self._directory, digest)
                if digest not in known:
                    continue
                if not name.exists():
                    os.link(path, name)
                    named += 1
                # Also where the name is there: it may be of a process that was killed before it was synced.
                sync_folder(name.parent)
        return named

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
        """After `recover`, delete what was never acknowledged: half-written files, and whole ones without a row.

        For the start of intake, before it listens. Returns how many files went.
        """
        keep = set(known)
        self.recover(keep)
        gone = [path for path in self._incoming.rglob("*") if path.is_file()]
        gone += [path for path in self._directory.glob("??/*.dcm") if path.stem not in keep]
        for path in gone:
            path.unlink()
        return len(gone)


def path_of(directory: Path, digest: str) -> Path:
    """Where the file with that digest lies in a spool."""
    return directory / digest[:2] / f"{digest}.dcm"


def sync_folder(directory: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
