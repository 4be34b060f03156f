"""What a receiver's processes have used, and whether it listens, as Linux's /proc tells it (proc(5))."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")
_LISTEN = "0A"


def cpu_seconds_below(pid: int) -> float:
    """User and system time of every descendant of a process, those included that ended and were waited for.

    A child that ended and was not waited for yet is a zombie, which /proc still lists with its time.
    """
    parents, seconds = processes()
    return sum(seconds[key] for key in parents if is_below(key, pid, parents))


def processes() -> tuple[dict[int, int], dict[int, float]]:
    """Of every process its parent, and the user and system time of it and of the children that it waited for."""
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for entry in _PROC.glob("[0-9]*/stat"):
        try:
            # The name in parentheses may hold anything, blanks and parentheses too.
            fields = entry.read_text("utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        key = int(entry.parent.name)
        parents[key] = int(fields[1])
        seconds[key] = sum(map(int, fields[11:15])) / _TICKS  # utime, stime, cutime, cstime
    return parents, seconds


def is_below(key: int, ancestor: int, parents: Mapping[int, int]) -> bool:
    """Whether one process comes from another."""
    while (key := parents.get(key, 0)) > 1:
        if key == ancestor:
            return True
    return False


def listens(port: int) -> bool:
    """Whether something listens on that TCP port over IPv4, found without connecting to it."""
    wanted = f":{port:04X}"
    for line in (_PROC / "net" / "tcp").read_text("ascii").splitlines()[1:]:
        _, local, _, state, *_ = line.split()
        if state == _LISTEN and local.endswith(wanted):
            return True
    return False


def file_system(path: Path) -> str:
    """The type of the file system that holds a folder, such as ext4; "" where it cannot be told."""
    real = path.resolve()
    best = (0, "")
    for line in (_PROC / "self" / "mountinfo").read_text("utf-8", errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        point = Path(before.split()[4])
        if real.is_relative_to(point):
            best = max(best, (len(point.parts), after.split()[0]))
    return best[1]
