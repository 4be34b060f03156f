"""Child processes that never outlive the process that started them, however that one ends.

`Leashed` starts a command under a small keeper: this file, run as a program. The keeper holds the read end of a pipe
whose write end only the starting process has. When that process ends, even by ``kill -9``, the kernel closes the
pipe, the keeper sees its end and stops the command. (Linux's parent-death signal alone would not do: it fires when
the *thread* that started the child ends.) The keeper needs nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from_parent = 0  # the keeper's standard input


class Leashed:
    """A command that runs until `stop`, or until this process is gone.

    It runs in a session of its own, so that Ctrl-C in the terminal reaches only the process that stops things in
    order.

    Args:
        command: the program and its arguments.
        log: file that receives its standard output and error, appended.
        grace: seconds between SIGTERM and SIGKILL.
    """

    def __init__(self, command: Sequence[str | Path], *, log: Path, grace: float = 5.0) -> None:
        self.command = [str(part) for part in command]
        self.log = log
        self.grace = grace
        keeper = [sys.executable, "-I", "-S", str(Path(__file__)), str(grace), *self.command]
        with log.open("ab") as output:
            self._keeper = subprocess.Popen(
                keeper, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True
            )

    @property
    def keeper_pid(self) -> int:
        """The process of the keeper; the command is its only child."""
        return self._keeper.pid

    @property
    def running(self) -> bool:
        """Whether the command still runs."""
        return self._keeper.poll() is None

    @property
    def exit_code(self) -> int | None:
        """The command's exit code (negative: the signal that ended it); None while it runs."""
        code = self._keeper.poll()
        return 128 - code if code is not None and code > 128 else code

    def tail(self, lines: int = 5) -> str:
        """The last lines that the command wrote."""
        return "\n".join(self.log.read_text("utf-8", errors="replace").splitlines()[-lines:])

    def release(self) -> None:
        """Begin to stop the command without waiting for it."""
        if self._keeper.stdin is not None:
            with contextlib.suppress(OSError):  # the keeper is gone already
                self._keeper.stdin.close()

    def stop(self) -> None:
        """Stop the command and wait until it is gone: SIGTERM, and SIGKILL after the grace."""
        self.release()
        try:
            self._keeper.wait(self.grace + 2.0)
        except subprocess.TimeoutExpired:
            os.killpg(self._keeper.pid, signal.SIGKILL)
            self._keeper.wait()


def _die_with_keeper() -> None:
    """Let the kernel end the command when the keeper itself is killed (prctl PR_SET_PDEATHSIG).

    Safe here, unlike in `Leashed`: the keeper has one thread.
    """
    with contextlib.suppress(OSError, AttributeError):  # not Linux: the pipe alone must do
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _keep(grace: float, command: list[str]) -> int:
    """Run the command until it ends, the pipe closes or a signal comes. The command's code, as a shell gives it."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_keeper)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    kill_at: float | None = None
    while child.poll() is None:
        remaining = None if kill_at is None else max(0.0, kill_at - time.monotonic())
        readable, _, _ = select.select([woken] if kill_at is not None else [woken, from_parent], [], [], remaining)
        received = os.read(woken, 64) if woken in readable else b""
        asked = from_parent in readable or any(n in received for n in (signal.SIGTERM, signal.SIGINT))
        if asked and kill_at is None:
            kill_at = time.monotonic() + grace
            child.terminate()
        elif kill_at is not None and time.monotonic() >= kill_at:
            child.kill()
            child.wait()
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


if __name__ == "__main__":
    sys.exit(_keep(float(sys.argv[1]), sys.argv[2:]))
