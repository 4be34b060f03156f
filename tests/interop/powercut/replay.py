"""What a disk may hold after a power cut, from a trace of shim.c.

The model is harsher than any journalling file system:

- **A file's bytes** are those of its last finished fsync or fdatasync. Of every later write an arbitrary part has
  reached the disk: nothing, all, or some of its sectors; its size has grown with or without its bytes (zeros then).
- **A name** (create, rename, link, unlink, mkdir) is safe once its own directory was synced. fdatasync of a file does
  not make its name safe, and a rename is two entries, in two directories if need be, of which either may be lost.
- Of the names that are not safe a cut keeps none (``bare``), the first few of each directory (``prefix``, what a
  journal does) or any (``subset``).
- A sync is safe when it has ended, and only for what had been written when it began.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Literal

from tests.interop.powercut.scanner import C_STORE_RSP, Answers

Mode = Literal["bare", "prefix", "subset"]
MODES: tuple[Mode, ...] = ("bare", "prefix", "subset")

SECTORS = (512, 4096)
UNNEEDED = "-shm"
"""SQLite's index of its WAL lives in memory that is mapped; who opens the database first builds it anew from the WAL
(https://sqlite.org/walformat.html, 2.5), so a cut may take it away altogether. Files with this ending are left out."""

_RECORD = struct.Struct("<IBBHHHIIQqQ")
_MAGIC = 0x54554350


class Kind(IntEnum):
    """The operations of shim.c."""

    CREATE = 1
    WRITE = 2
    TRUNCATE = 3
    RENAME = 4
    LINK = 5
    UNLINK = 6
    MKDIR = 7
    RMDIR = 8
    SYNC_BEGIN = 9
    SYNC_END = 10
    SEND = 11
    ESCAPE = 12
    ALLOCATE = 13


class Unmodelled(Exception):
    """The process did something that this model does not understand; nothing is proved until it does."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One record: ``path`` and ``target`` are relative to the watched folder; "" is the folder itself, or no name."""

    kind: Kind
    thread: int
    inode: int
    offset: int
    length: int
    path: str
    target: str
    data: bytes


def read_trace(trace: Path, root: Path) -> list[Operation]:
    """The operations of a trace, in order.

    Raises:
        Unmodelled: a call that changes files in a way that is not recorded.
    """
    content = trace.read_bytes()
    start = str(root.resolve())
    found = []
    at = 0
    while at < len(content):
        magic, kind, _, path_length, target_length, _, size, thread, inode, offset, length = _RECORD.unpack_from(
            content, at
        )
        if magic != _MAGIC:
            raise Unmodelled(f"the trace is broken at byte {at}")
        at += _RECORD.size
        path, at = content[at : at + path_length].decode(), at + path_length
        target, at = content[at : at + target_length].decode(), at + target_length
        data, at = content[at : at + size], at + size
        if kind == Kind.ESCAPE:
            raise Unmodelled(path)
        if kind == Kind.SEND and length != size:
            raise Unmodelled(f"{length} bytes were sent at once; too many to read an answer in them")
        relative = [one.removesuffix(" (deleted)").removeprefix(start).lstrip("/") for one in (path, target)]
        found.append(Operation(Kind(kind), thread, inode, offset, length, relative[0], relative[1], data))
    return found


def answered(operations: Iterable[Operation], field: int = C_STORE_RSP) -> list[tuple[int, int]]:
    """(number of operations after which it counts as sent, message ID) of every Success with that Command Field."""
    streams: dict[tuple[int, int], Answers] = {}
    found = []
    for number, one in enumerate(operations, 1):
        if one.kind == Kind.SEND:
            stream = streams.setdefault((one.inode, one.offset), Answers(field))
            found += [(number, message) for message in stream.feed(one.data)]
    return found


# --- the disk ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Change:
    """Of a file's bytes: ``data`` at ``offset``; or, with no data, its size becomes ``size``, or at least that."""

    offset: int = 0
    data: bytes = b""
    size: int | None = None
    grow: bool = False

    def apply(self, content: bytearray) -> None:
        """Make the whole change."""
        end = self.offset + len(self.data) if self.size is None else self.size
        if len(content) < end:
            content.extend(bytes(end - len(content)))
        elif self.size is not None and not self.grow:
            del content[end:]
        if self.data:
            content[self.offset : end] = self.data

    def tear(self, content: bytearray, chance: random.Random) -> None:
        """Make an arbitrary part of it, in whole sectors of the device."""
        if not self.data:
            if chance.random() < 0.5:
                self.apply(content)
            return
        sector = chance.choice(SECTORS)
        at, end = self.offset, self.offset + len(self.data)
        if chance.random() < 0.3:
            Change(size=end, grow=True).apply(content)
        while at < end:
            following = min(end, (at // sector + 1) * sector)
            if chance.random() < 0.5:
                Change(at, self.data[at - self.offset : following - self.offset]).apply(content)
            at = following


class File:
    """An inode: the bytes that are safe, and the changes after them."""

    def __init__(self, content: bytes = b"") -> None:
        self.safe = bytearray(content)
        self.pending: list[Change] = []
        self.settled = 0

    @property
    def changes(self) -> int:
        """How many changes it has seen."""
        return self.settled + len(self.pending)

    def settle(self, changes: int) -> None:
        """The first so many changes are safe."""
        while self.settled < changes:
            self.pending.pop(0).apply(self.safe)
            self.settled += 1

    def now(self) -> bytes:
        """The bytes with every change."""
        content = bytearray(self.safe)
        for change in self.pending:
            change.apply(content)
        return bytes(content)

    def after_cut(self, mode: Mode, chance: random.Random) -> bytes:
        """Bytes that it may have after a cut."""
        fate = "nothing" if mode == "bare" else chance.choice(("nothing", "all", "some", "some"))
        if fate == "nothing" or not self.pending:
            return bytes(self.safe)
        if fate == "all":
            return self.now()
        content = bytearray(self.safe)
        for change in self.pending:
            match chance.choice(("lost", "whole", "torn")):
                case "whole":
                    change.apply(content)
                case "torn":
                    change.tear(content, chance)
        return bytes(content)


class Directory:
    """A directory: the entries that are safe, and the changes after them (a node, or None where a name went)."""

    def __init__(self) -> None:
        self.safe: dict[str, Node] = {}
        self.pending: list[tuple[str, Node | None]] = []
        self.settled = 0

    @property
    def changes(self) -> int:
        """How many changes it has seen."""
        return self.settled + len(self.pending)

    def settle(self, changes: int) -> None:
        """The first so many changes are safe."""
        count = max(0, changes - self.settled)
        self.safe = _entries(self.safe, self.pending[:count])
        del self.pending[:count]
        self.settled += count

    def now(self) -> dict[str, Node]:
        """The entries with every change."""
        return _entries(self.safe, self.pending)

    def after_cut(self, mode: Mode, chance: random.Random) -> dict[str, Node]:
        """Entries that it may have after a cut."""
        if mode == "bare":
            return self.safe
        if mode == "prefix":
            count = chance.choice((0, len(self.pending), chance.randint(0, len(self.pending))))
            return _entries(self.safe, self.pending[:count])
        return _entries(self.safe, [change for change in self.pending if chance.random() < 0.5])


Node = File | Directory


def _entries(safe: Mapping[str, Node], changes: Iterable[tuple[str, Node | None]]) -> dict[str, Node]:
    entries = dict(safe)
    for name, node in changes:
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node
    return entries


@dataclass(slots=True)
class Disk:
    """Everything below the watched folder but its sockets; the folder itself is safe."""

    root: Directory = field(default_factory=Directory)
    _inodes: dict[int, Node] = field(default_factory=dict)
    _begun: dict[tuple[int, int], int] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> Disk:
        """A disk on which everything that lies in a folder now is safe."""
        disk = cls()
        disk._inodes[folder.stat().st_ino] = disk.root

        def enter(place: Path, directory: Directory) -> None:
            for path in place.iterdir():
                node: Node
                if path.is_dir():
                    node = Directory()
                    enter(path, node)
                elif path.is_file():
                    node = File(path.read_bytes())
                else:
                    continue
                directory.safe[path.name] = node
                disk._inodes[path.stat().st_ino] = node

        enter(folder, disk.root)
        return disk

    def apply(self, one: Operation) -> None:
        """Do what a record says.

        Raises:
            Unmodelled: it speaks of a file or folder that was never seen.
        """
        match one.kind:
            case Kind.CREATE:
                self._inodes[one.inode] = made = File()
                if one.path:
                    self._enter(one.path, made)
            case Kind.MKDIR:
                self._inodes[one.inode] = folder = Directory()
                self._enter(one.path, folder)
            case Kind.WRITE:
                self._file(one).pending.append(Change(one.offset, one.data))
            case Kind.TRUNCATE:
                self._file(one).pending.append(Change(size=one.length))
            case Kind.ALLOCATE:
                self._file(one).pending.append(Change(size=one.offset + one.length, grow=True))
            case Kind.RENAME:
                node = self._file(one)
                self._enter(one.path, None)
                self._enter(one.target, node)
            case Kind.LINK:
                self._enter(one.path, self._file(one))
            case Kind.UNLINK | Kind.RMDIR:
                self._enter(one.path, None)
            case Kind.SYNC_BEGIN:
                self._begun[one.thread, one.inode] = self._node(one).changes
            case Kind.SYNC_END:
                self._node(one).settle(self._begun.pop((one.thread, one.inode)))

    def _node(self, one: Operation) -> Node:
        if one.inode not in self._inodes:
            raise Unmodelled(f"{one.kind.name} of {one.path or one.inode}, which nobody created")
        return self._inodes[one.inode]

    def _file(self, one: Operation) -> File:
        node = self._node(one)
        if not isinstance(node, File):
            raise Unmodelled(f"{one.kind.name} of the folder {one.path}")
        return node

    def _enter(self, path: str, node: Node | None) -> None:
        directory: Node = self.root
        *folders, name = path.split("/")
        for folder in folders:
            found = directory.now().get(folder) if isinstance(directory, Directory) else None
            if found is None:
                raise Unmodelled(f"something below {folder} in {path}, which nobody created")
            directory = found
        assert isinstance(directory, Directory)
        directory.pending.append((name, node))

    def now(self) -> dict[str, bytes]:
        """What a look at the running machine shows: path → bytes of every file."""
        return dict(_walk(self.root, lambda one: one.now(), lambda one: one.now()))

    def after_cut(self, mode: Mode, chance: random.Random) -> dict[str, bytes]:
        """What may be there when the power is back: path → bytes of every file, and folders as ``path/``."""
        contents: dict[int, bytes] = {}

        def bytes_of(one: File) -> bytes:
            # A file that has two names is still one file.
            if id(one) not in contents:
                contents[id(one)] = one.after_cut(mode, chance)
            return contents[id(one)]

        return dict(_walk(self.root, lambda one: one.after_cut(mode, chance), bytes_of, folders=True))


def _walk(
    directory: Directory,
    entries: Callable[[Directory], Mapping[str, Node]],
    content: Callable[[File], bytes],
    prefix: str = "",
    folders: bool = False,
) -> Iterator[tuple[str, bytes]]:
    for name, node in sorted(entries(directory).items()):
        if isinstance(node, Directory):
            if folders:
                yield f"{prefix}{name}/", b""
            yield from _walk(node, entries, content, f"{prefix}{name}/", folders)
        elif not name.endswith(UNNEEDED):
            yield f"{prefix}{name}", content(node)


def lay_out(state: Mapping[str, bytes], folder: Path, *, empty_folders: bool = True) -> None:
    """Make that state of a disk in an empty folder."""
    made = set()
    for path, content in state.items():
        parent, _, name = path.rpartition("/")
        if parent not in made and (name or empty_folders):
            (folder / parent).mkdir(parents=True, exist_ok=True)
            made.add(parent)
        if name:
            (folder / path).write_bytes(content)


def lying_in(folder: Path) -> dict[str, bytes]:
    """What really lies in a folder: path → bytes of every file that the model speaks of."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(UNNEEDED)
    }
