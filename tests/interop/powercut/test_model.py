"""The instruments themselves: shim.c records what a program does, and replay.py loses what was not synced."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.powercut.replay import MODES, Disk, Kind, Unmodelled, answered, lying_in, read_trace

pytestmark = [pytest.mark.interop, pytest.mark.xdist_group("powercut")]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The folder that is watched."""
    folder = tmp_path / "state"
    folder.mkdir()
    return folder


def run(shim: Path, state: Path, program: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run Python under the shim in the watched folder."""
    environment = {
        **os.environ,
        "LD_PRELOAD": str(shim),
        "POWERCUT_ROOT": str(state.resolve()),
        "POWERCUT_TRACE": str(state.parent / "trace"),
        **more,
    }
    text = "import ctypes, mmap, os, shutil, socket\n" + textwrap.dedent(program)
    return subprocess.run(
        [sys.executable, "-S", "-c", text], cwd=state, env=environment, capture_output=True, text=True, check=False
    )


def recorded(shim: Path, state: Path, program: str, **more: str) -> Disk:
    """The disk after a program, with what it left un-synced still pending."""
    disk = Disk.of(state)
    done = run(shim, state, program, **more)
    assert done.returncode == 0, done.stderr
    for one in read_trace(state.parent / "trace", state):
        disk.apply(one)
    return disk


def kept(disk: Disk, tries: int = 60) -> Iterator[dict[str, bytes]]:
    """States after a cut, of every mode and many seeds."""
    for mode in MODES:
        for seed in range(tries):
            yield disk.after_cut(mode, random.Random(seed))


WRITE_ALL_WAYS = """
    os.mkdir("a")
    os.mkdir("b")
    os.mkdir("gone")
    fd = os.open("a/plain", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    other = os.dup(fd)
    os.write(fd, b"0123456789")
    os.pwrite(other, b"xy", 3)
    os.pwritev(fd, [b"p", b"q", b"r"], 20)
    os.writev(other, [b"at", b"position"])
    os.ftruncate(fd, 22)
    os.posix_fallocate(fd, 0, 64)
    appending = os.open("a/plain", os.O_WRONLY | os.O_APPEND)
    os.write(appending, b"end")
    os.replace("a/plain", "b/renamed")
    nameless = os.open("a", os.O_TMPFILE | os.O_RDWR)
    os.write(nameless, b"came late")
    os.link(f"/proc/self/fd/{nameless}", "b/linked", src_dir_fd=nameless)  # linkat with AT_SYMLINK_FOLLOW
    os.link("b/linked", "a/second")
    with open("b/emptied", "wb") as file:
        file.write(b"much")
    with open("b/emptied", "wb") as file:
        file.write(b"m")
    folder = os.open("b", os.O_RDONLY)
    fd = os.open("relative", os.O_WRONLY | os.O_CREAT, dir_fd=folder)
    os.write(fd, b"by descriptor")
    os.rename("relative", "moved", src_dir_fd=folder, dst_dir_fd=folder)
    os.unlink("a/second")
    os.rmdir("gone")
    os.write(appending, b"!")
"""


def test_every_way_to_write_is_recorded(shim: Path, state: Path) -> None:
    (state / "before").write_bytes(b"old")
    disk = recorded(shim, state, WRITE_ALL_WAYS)
    assert disk.now() == lying_in(state)
    assert disk.now().keys() == {"before", "b/renamed", "b/linked", "b/emptied", "b/moved"}


@pytest.mark.parametrize(
    ("call", "program"),
    [
        ("mmap", "file = open('f', 'wb+'); file.truncate(9); mmap.mmap(file.fileno(), 9)[0] = 1"),
        ("copy_file_range", "os.copy_file_range(os.open('/etc/passwd', 0), os.open('f', os.O_CREAT | os.O_RDWR), 9)"),
        ("sendfile", "os.sendfile(os.open('f', os.O_CREAT | os.O_RDWR), os.open('/etc/passwd', 0), 0, 9)"),
        ("truncate", "open('f', 'wb'); os.truncate('f', 9)"),
        ("symlink", "os.symlink('there', 'here')"),
        ("sync", "os.sync()"),
        ("rename", "os.mkdir('folder'); os.rename('folder', 'other')"),
        ("rename", "open('f', 'wb'); os.rename('f', '../out')"),
    ],
)
def test_what_is_not_understood_is_an_error(shim: Path, state: Path, call: str, program: str) -> None:
    assert run(shim, state, program).returncode == 0
    with pytest.raises(Unmodelled, match=call):
        read_trace(state.parent / "trace", state)


def test_what_escapes_the_library_altogether_shows_in_the_end(shim: Path, state: Path) -> None:
    program = """
        os.write(os.open("f", os.O_CREAT | os.O_WRONLY), b"seen")
        ctypes.CDLL(None).syscall(18, os.open("f", os.O_WRONLY), b"unseen", 6, 0)  # pwrite64
    """
    if os.uname().machine != "x86_64":
        pytest.skip("the number of the system call is that of x86-64")
    assert recorded(shim, state, program).now() != lying_in(state)


def test_a_file_keeps_what_was_synced_and_may_lose_the_rest(shim: Path, state: Path) -> None:
    program = """
        fd = os.open("f", os.O_CREAT | os.O_WRONLY)
        os.fsync(os.open(".", os.O_RDONLY))
        os.write(fd, b"s" * 5000)
        os.fdatasync(fd)
        os.write(fd, b"u" * 9000)
    """
    found = {content["f"] for content in kept(recorded(shim, state, program))}
    assert all(content.startswith(b"s" * 5000) for content in found)
    assert {b"s" * 5000, b"s" * 5000 + b"u" * 9000} < found
    assert any(b"u\0" in content or b"\0u" in content for content in found), "no write was ever torn"


def test_a_name_is_safe_once_its_own_directory_was_synced(shim: Path, state: Path) -> None:
    program = """
        os.mkdir("in"); os.mkdir("out")
        sync = lambda path: os.fsync(os.open(path, os.O_RDONLY))
        sync(".")
        for name in ("one", "two"):
            fd = os.open(f"in/{name}", os.O_CREAT | os.O_WRONLY)
            os.write(fd, b"whole")
            os.fdatasync(fd)
            os.rename(f"in/{name}", f"out/{name}")
            if name == "one":
                sync("out")
    """
    found = [{path for path in content if not path.endswith("/")} for content in kept(recorded(shim, state, program))]
    assert all("out/one" in names for names in found)
    assert {"out/two" in names for names in found} == {True, False}
    assert {"in/one" in names for names in found} == {True, False}, "the old name is not safe to be gone"


def test_a_new_folder_is_lost_with_all_it_holds_until_its_parent_is_synced(shim: Path, state: Path) -> None:
    program = """
        os.mkdir("new")
        fd = os.open("new/f", os.O_CREAT | os.O_WRONLY)
        os.fsync(fd)
        os.fsync(os.open("new", os.O_RDONLY))
    """
    assert {} in list(kept(recorded(shim, state, program)))
    again = recorded(shim, state, "os.fsync(os.open('.', os.O_RDONLY))")
    assert all(content == {"new/": b"", "new/f": b""} for content in kept(again))


@pytest.mark.parametrize(("ignored", "lost"), [("dirsync", "name"), ("filesync", "bytes"), ("ledgersync", "ledger")])
def test_a_sync_that_is_ignored_makes_nothing_safe(shim: Path, state: Path, ignored: str, lost: str) -> None:
    program = """
        for name in ("f", "ledger.sqlite-wal"):
            fd = os.open(name, os.O_CREAT | os.O_WRONLY)
            os.write(fd, b"x")
            os.fsync(fd)
        os.fsync(os.open(".", os.O_RDONLY))
    """
    state_after = recorded(shim, state, program, POWERCUT_IGNORE=ignored).after_cut("bare", random.Random(1))
    assert state_after == {
        "name": {},
        "bytes": {"f": b"", "ledger.sqlite-wal": b"x"},
        "ledger": {"f": b"x", "ledger.sqlite-wal": b""},
    }[lost]  # fmt: skip


def test_an_answer_counts_once_its_last_byte_was_handed_over(shim: Path, state: Path) -> None:
    """A C-STORE-RSP with Success to message 7, in two pieces, and one with a failure to message 8."""
    program = """
        import struct
        def answer(message, status):
            elements = ((0x0100, 0x8001), (0x0120, message), (0x0900, status))
            command = b"".join(struct.pack("<HHIH", 0, element, 2, value) for element, value in elements)
            return struct.pack(">BxIIBB", 4, len(command) + 6, len(command) + 2, 1, 3) + command
        server = socket.create_server(("127.0.0.1", 0))
        client = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
        peer.sendall(answer(7, 0)[:20])
        os.write(os.open("f", os.O_CREAT | os.O_WRONLY), b"x")
        peer.sendmsg([answer(7, 0)[20:], answer(8, 0xA700)])
    """
    recorded(shim, state, program)
    operations = read_trace(state.parent / "trace", state)
    assert [one.kind for one in operations] == [Kind.SEND, Kind.CREATE, Kind.WRITE, Kind.SEND]
    assert answered(operations) == [(4, 7)]


def test_a_kill_comes_at_its_operation_and_leaves_a_write_half_done(shim: Path, state: Path) -> None:
    program = """
        ctypes.CDLL(None).powercut_arm(ctypes.c_long({}))
        fd = os.open("f", os.O_CREAT | os.O_WRONLY)
        os.write(fd, b"12345678")
        os.rename("f", "g")
    """
    for kill_at, left in enumerate(({}, {"f": b"1234"}, {"f": b"12345678"}), 1):
        for path in state.iterdir():
            path.unlink()
        assert run(shim, state, program.format(kill_at)).returncode == -signal.SIGKILL
        assert lying_in(state) == left
