"""Starts the real intake again and again, quickly: it is imported once, and every start is a fork of that.

Run under shim.c (LD_PRELOAD). Each line on standard input starts `run_intake` on a folder with a scanside.toml: what
`scanside intake` runs, in a process of its own; the number in the line is the operation at which shim.c kills it
(0: never). It answers with the process's number, and with its exit status as os.waitstatus_to_exitcode gives it once
it has ended. When standard input ends, so does everything.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
from pathlib import Path

from appliance.services.intake import run_intake
from appliance.services.process import log_as
from appliance.settings import Settings, load_settings


def _intake(settings: Settings, kill_at: int) -> int:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the runner
    ctypes.CDLL(None).powercut_arm(ctypes.c_long(kill_at))
    run_intake(settings)
    return 0


def _wait(child: int) -> int:
    """Wait for the child, or for the end of standard input, which ends the child, too."""
    ended = os.pidfd_open(child)
    try:
        ready, _, _ = select.select([ended, sys.stdin.fileno()], [], [])
        if ended not in ready:
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(ended)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    """Serve until standard input ends."""
    log_as("ERROR")
    with os.fdopen(os.dup(sys.stdin.fileno()), "rb", buffering=0) as orders:
        while line := orders.readline():
            folder, kill_at = line.decode().rstrip("\n").rsplit(" ", 1)
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    code = _intake(load_settings(Path(folder) / "scanside.toml"), int(kill_at))
                except BaseException as error:
                    print(f"intake failed: {error!r}", file=sys.stderr, flush=True)
                finally:
                    os._exit(code)
            print(child, flush=True)
            print(_wait(child), flush=True)


if __name__ == "__main__":
    main()
