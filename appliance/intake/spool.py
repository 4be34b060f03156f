"""The folder of received Part 10 files, named by their SHA-256."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger(__name__)

BLOCK = 4096
"""What is written past the page cache begins and ends at multiples of this: no disk has larger sectors."""

NAMES_AHEAD = 32
"""So many names at most are made, and synced, before a lane needs them."""

SETTLE_SECONDS, SETTLE_AFTER = 5.0, 2048
"""Files that have their own names wait so long, or until they are so many, for the folders of these to be synced. After
a kill the next start reads what waits: a second or two."""


@dataclass(frozen=True, slots=True)
class Swept:
    """What a start of intake found in the spool that the ledger does not know.

    Attributes:
        removed: files that were never acknowledged; they are deleted.
        aside: files that may have been; they lie in `unknown/`.
        named: digests that it does know, of files that were on their way when the last run ended, or were lately.
    """

    removed: int = 0
    aside: int = 0
    named: frozenset[str] = field(default=frozenset(), compare=False)


class Lane:
    """A folder in which one association after another makes its files durable, one at a time.

    The names are made ahead: to sync a folder costs as much as to sync a file, and so one sync serves many.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._numbers = itertools.count()
        self._ready: list[str] = []
        self._ahead = 1
        self.direct = hasattr(os, "O_DIRECT")  # whether the file system lets files be written past its page cache

    def take(self) -> str:
        """The path of an empty file whose name is durable.

        Raises:
            OSError: the disk is full or broken.
        """
        if not self._ready:
            # Few for who sends one image, many for who sends a series.
            paths: list[str] = []
            while len(paths) < self._ahead:
                path = f"{self._folder}/{next(self._numbers)}"
                # One that an earlier process left, which nobody swept, is not ours to write.
                with contextlib.suppress(FileExistsError):
                    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640))
                    paths.append(path)
            sync_folder(self._folder)
            self._ready = paths[::-1]
            self._ahead = min(2 * self._ahead, NAMES_AHEAD)
        return self._ready.pop()

    def clear(self) -> None:
        """Take away the names that were made ahead; while no association has the lane.

        Raises:
            OSError: the disk is broken.
        """
        while self._ready:
            Path(self._ready[-1]).unlink(missing_ok=True)
            self._ready.pop()
        self._ahead = 1


class Incoming:
    """A file on its way into the spool: in its lane, where nothing reads it, until `Spool.publish`.

    Its whole blocks go to the disk past the page cache: to copy them there costs more than all else that is done with
    the file. It is for the caller's buffer to begin at a page; one that does not is written the other way.
    """

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.path = lane.take()
        self._file, self._direct = _open(self.path, lane)
        self._hash = hashlib.sha256()
        self._hashed = 0  # bytes of the next `write`
        self.size = 0
        self.digest = ""
        self.published = False

    def hash_ahead(self, data: memoryview) -> None:
        """Hash the first bytes, or the next ones, of what `write` is given next."""
        self._hash.update(data)
        self._hashed += len(data)

    def write(self, data: memoryview) -> None:
        """Append bytes.

        Raises:
            OSError: the disk is full or broken.
        """
        rest = self._write_blocks(data) if self._direct else data
        while rest:
            rest = rest[os.write(self._file, rest) :]
        self._hash.update(data[self._hashed :])
        self._hashed = 0
        self.size += len(data)

    def _write_blocks(self, data: memoryview) -> memoryview:
        """Append its whole blocks; what is left of it. If that is anything, the file goes on in the page cache."""
        whole, written = len(data) - len(data) % BLOCK, 0
        if whole:
            try:
                written = os.write(self._file, data[:whole])
            except OSError as error:
                if error.errno != errno.EINVAL:  # of a buffer or a disk that is aligned otherwise
                    raise
        if written < len(data):
            fcntl.fcntl(self._file, fcntl.F_SETFL, 0)
            self._direct = False
        return data[written:]

    def sync(self) -> str:
        """Make the content durable, as its name is already; returns the digest (64 hexadecimal digits). The file is
        closed then.

        Raises:
            OSError: as `write`; the content may be lost.
        """
        try:
            os.fdatasync(self._file)
        finally:
            self._close()
        self.digest = self._hash.hexdigest()
        return self.digest

    def discard(self) -> None:
        """Remove it. One that was published stays, with both names, even if its row failed: a row that was half
        written may yet come to light after a crash, and needs its file. Without one the next start sweeps it."""
        self._close()
        if not self.published:
            Path(self.path).unlink(missing_ok=True)

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _open(path: str, lane: Lane) -> tuple[int, bool]:
    if lane.direct:
        try:
            return os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            lane.direct = False
    return os.open(path, os.O_WRONLY | os.O_CLOEXEC), False


class Spool:
    """A content-addressed folder; a file in it is whole, synced, and never changed.

    A file is made durable in its lane, a folder that no other association touches, so that syncing the folder waits
    for nobody. It gets its own name as a second one, which is not synced at once: where a power cut takes that back,
    `recover` gives it again, and the name in the lane goes only once the other is durable and its row is (`settle`).
    So what has no row and no name in a lane was acknowledged to a ledger that does not know it any more.

    Args:
        directory: made if absent.
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._names = directory, str(directory)
        self._incoming = directory / "incoming"
        self._unknown = directory / "unknown"
        self._incoming.mkdir(parents=True, exist_ok=True)
        self._lanes = itertools.count()
        self._free: queue.SimpleQueue[Lane] = queue.SimpleQueue()
        self._named: deque[tuple[str, str]] = deque()  # names in lanes, and own names that are not synced yet
        self._many = threading.Event()
        self._settling = threading.Lock()
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
        """An association has ended."""
        self._free.put(lane)

    def open(self, lane: Lane) -> Incoming:
        """A new file to receive an instance; one at a time in a lane.

        Raises:
            OSError: the disk is full or broken.
        """
        return Incoming(lane)

    def publish(self, incoming: Incoming) -> None:
        """Give a synced file the name of its digest, if no whole file has it (`Incoming.published` says so then).

        Raises:
            OSError: the disk is broken.
        """
        name = self._name(incoming)
        try:
            os.link(incoming.path, name)
        except FileExistsError:  # the same bytes came before
            if _is_whole(name, incoming.digest):
                return
            log.error("%s was damaged; it is replaced by the same instance, which came again", name)
            _put_in_place_of(name, incoming.path)
        incoming.published = True

    def recorded(self, incoming: Incoming) -> None:
        """The row of a file that was published is durable: its name in the lane may go once its own one is."""
        self._named.append((incoming.path, self._name(incoming)))
        if len(self._named) >= SETTLE_AFTER:
            self._many.set()

    def _name(self, incoming: Incoming) -> str:
        return f"{self._names}/{incoming.digest[:2]}/{incoming.digest}.dcm"  # `path_of`, which takes its time

    def settle(self) -> None:
        """Make the names of what was recorded so far durable, and take those in the lanes away that need not stay.

        Raises:
            OSError: the disk is broken; they will be tried again.
        """
        with self._settling:
            self._many.clear()
            named = [self._named.popleft() for _ in range(len(self._named))]
            try:
                for folder in {name.rpartition("/")[0] for _, name in named}:
                    sync_folder(folder)
                while named:
                    Path(named[-1][0]).unlink(missing_ok=True)
                    named.pop()
            finally:
                self._named.extend(named)
            for _ in range(self._free.qsize()):
                with contextlib.suppress(queue.Empty):
                    lane = self._free.get_nowait()
                    try:
                        lane.clear()
                    finally:
                        self._free.put(lane)

    def settle_until(self, stopping: threading.Event) -> None:
        """`settle` from time to time, in a thread of its own. Once more when it stops is for the caller to do."""
        while not stopping.is_set():
            self._many.wait(SETTLE_SECONDS)
            try:
                self.settle()
            except OSError:
                log.exception("the names of received files could not be synced; they are tried again")
                stopping.wait(SETTLE_SECONDS)

    def recover(self, known: Container[str]) -> int:
        """Name again what a power cut took the name from, or what was set aside and whose ledger is back; returns how
        many files.

        For the start of every service that reads the spool. What has a row and no name of its own is of an earlier
        run, because a file is named before its row is written.
        """
        return self._recover(known)[0]

    def _recover(self, known: Container[str]) -> tuple[int, dict[str, Path]]:
        """As `recover`; also what lies in the lanes, by its digest."""
        named, folders, lanes = 0, set(), {}
        aside = (path for path in self._unknown.glob("*.dcm") if path.stem in known)
        for path in itertools.chain(self._incoming.glob("*/*"), aside):
            with contextlib.suppress(FileNotFoundError, FileExistsError):  # another, or an association, was faster
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                if path.parent != self._unknown and path.stat().st_size:  # not a name that was made ahead
                    lanes[digest] = path
                name = path_of(self._directory, digest)
                if digest not in known:
                    continue
                # Also where the name is there: it may be of a process that was killed before it was synced.
                folders.add(name.parent)
                if not name.exists():
                    os.link(path, name)
                    named += 1
                elif not _is_whole(name, digest):  # what replaced a damaged file was not yet durable
                    _put_in_place_of(name, path)
                    named += 1
        for folder in folders:
            sync_folder(folder)
        return named, lanes

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

    def set_aside(self) -> tuple[Path, int]:
        """The folder of what no ledger knew, and how many files lie there."""
        return self._unknown, sum(1 for _ in self._unknown.glob("*.dcm"))

    def sweep(
        self,
        known: Iterable[str],
        removed: Callable[[Collection[str]], Collection[str]] = lambda _: (),
        *,
        doubted: bool = False,
    ) -> Swept:
        """After `recover`, delete what was never acknowledged: half-written files, and whole ones without a row.

        Nothing is deleted that may have been acknowledged. A file without a row that has no name in a lane was: the
        ledger is another, or an older one. All that it does not know is then moved to `unknown/`, from where `recover`
        takes it once a ledger knows it. For the start of intake, before it listens.

        Args:
            known: the digests that the ledger has rows of.
            removed: those of some digests that it has marked as removed, whose files go.
            doubted: the ledger is known to lack something, so also what looks like never acknowledged may have been.

        Raises:
            OSError: the disk is full or broken.
        """
        keep = set(known)
        _, in_lanes = self._recover(keep)
        lanes = [path for path in self._incoming.rglob("*") if path.is_file()]
        stray = [path for path in self._directory.glob("??/*.dcm") if path.stem not in keep]
        again = [path for path in self._unknown.glob("*.dcm") if path_of(self._directory, path.stem).exists()]
        settled = {path.stem for path in stray} - in_lanes.keys()
        aside = 0
        if doubted or settled.difference(removed(settled)):
            # Also what lies only in a lane: a power cut may have taken its name. What tells that the ledger forgot goes
            # last: after a kill the next start must still see it.
            stray.sort(key=lambda path: path.stem in settled)
            forgotten = {digest: path for digest, path in in_lanes.items() if digest not in keep}
            aside, stray = self._set_aside(forgotten | {path.stem: path for path in stray}), []
        # Those in the lanes last: after a sweep that was killed the others would look like acknowledged.
        gone = 0
        for paths in (stray, lanes, again):
            for path in paths:
                with contextlib.suppress(FileNotFoundError):  # it was set aside
                    file = path.stat()
                    gone += file.st_nlink == 1 and file.st_size > 0  # not a second name, or one that was made ahead
                    path.unlink()
            for folder in {path.parent for path in paths}:
                sync_folder(folder)
        return Swept(gone, aside, frozenset(keep & in_lanes.keys()))

    def _set_aside(self, forgotten: Mapping[str, Path]) -> int:
        """Move files to `unknown/`, in that order, under their digests; returns how many."""
        if forgotten:
            self._unknown.mkdir(exist_ok=True)
            sync_folder(self._directory)
            for digest, path in forgotten.items():
                path.replace(self._unknown / f"{digest}.dcm")
            sync_folder(self._unknown)
        return len(forgotten)


def path_of(directory: Path, digest: str) -> Path:
    """Where the file with that digest lies in a spool."""
    return directory / f"{digest[:2]}/{digest}.dcm"


def _put_in_place_of(name: Path | str, path: Path | str) -> None:
    """Give a damaged file's name to a whole one, which keeps its own."""
    whole = Path(f"{path}.whole")
    whole.unlink(missing_ok=True)
    whole.hardlink_to(path)
    whole.replace(name)


def _is_whole(name: Path | str, digest: str) -> bool:
    """As `is_intact`; a file that cannot be read is damaged. Where the whole disk is, replacing it fails as well."""
    try:
        return is_intact(name, digest)
    except OSError:
        return False


def is_intact(path: Path | str, digest: str) -> bool:
    """Whether a file still has the content that it is named by.

    Raises:
        OSError: it is gone, or cannot be read.
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == digest


def sync_folder(directory: Path | str) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
