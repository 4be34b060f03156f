"""What every service does at both ends, whatever it does between: one process only, signals, the ledger, the log."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from types import FrameType
from typing import Any

from appliance import __version__
from appliance.events import Event
from appliance.ledger.store import Ledger
from appliance.operations.health import notify
from appliance.settings import Settings, SettingsError
from dicom_io.errors import ScansideError

log = logging.getLogger(__name__)

STOP_SECONDS = 8.0
"""A service that was told to stop finishes what it does within this time, or leaves it to the next start."""

_READABLE = "%(asctime)s %(levelname)s %(message)s"
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_FIRST_PASSED = 3  # SD_LISTEN_FDS_START of sd_listen_fds(3)


@contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set; for the main thread."""
    stopping = threading.Event()

    def ask(_number: int, _frame: FrameType | None) -> None:
        stopping.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def only_one(settings: Settings, name: str) -> Iterator[None]:
    """Hold the lock of a service: two intakes on one spool would sweep each other's files away.

    Raises:
        ScansideError: another process holds it.
    """
    path = settings.run_directory / f"{name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        where = f"box.state_directory ({settings.box.state_directory})"
        raise SettingsError(error.strerror or str(error), where, "make it a folder that this user can write") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            remedy = "stop the other one first, or give this one another state_directory"
            raise ScansideError(f"{name} runs already", str(settings.box.state_directory), remedy) from None
        yield


@contextmanager
def service(settings: Settings, name: str) -> Iterator[tuple[Ledger, threading.Event]]:
    """What every service does at both ends: one process only, the ledger opened, the signals caught."""
    with only_one(settings, name), stop_signal() as stopping:
        ledger = Ledger(settings.ledger_path)
        threading.Thread(target=_end_in_time, args=(stopping, name), daemon=True).start()
        try:
            ledger.log(Event.SERVICE_STARTED, service=name, version=__version__, pid=os.getpid())
            yield ledger, stopping
            ledger.log(Event.SERVICE_STOPPED, service=name, pid=os.getpid())
        finally:
            ledger.close()


def inherited_sockets() -> dict[int, socket.socket]:
    """The listening TCP sockets that systemd opened for this service, by their port: sd_listen_fds(3).

    They stay open when this process ends, so that whoever connects meanwhile waits for the next one. To be asked once;
    a child process does not find them again.

    Raises:
        ScansideError: what was passed is something else.
    """
    count = os.environ.pop("LISTEN_FDS", "0")
    names = os.environ.pop("LISTEN_FDNAMES", "")
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()):
        return {}
    found: dict[int, socket.socket] = {}
    for number in range(_FIRST_PASSED, _FIRST_PASSED + int(count)):
        one = socket.socket(fileno=number)
        one.set_inheritable(False)
        inet = one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM
        if not inet or not one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ScansideError(
                "systemd passed something that is no listening TCP socket", names, "correct the socket unit"
            )
        found[one.getsockname()[1]] = one
    return found


def _end_in_time(stopping: threading.Event, name: str) -> None:
    """End the process when it was told to stop and a peer, a codec or Triton holds it up.

    Nothing is lost by it: what is under way is in the ledger, and the next start takes it up.
    """
    stopping.wait()
    notify("STOPPING=1")
    time.sleep(STOP_SECONDS)
    log.warning("%s: something holds it up; what is under way is taken up at the next start", name)
    logging.shutdown()
    os._exit(0)


def log_as(level: str, *, machine: bool = False) -> None:
    """Log lines to standard error: readable, or one JSON object each. They name studies by number only."""
    handler = logging.StreamHandler()
    readable = _JournalFormatter("%(message)s") if _is_journal() else logging.Formatter(_READABLE)
    handler.setFormatter(_JsonFormatter() if machine else readable)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("pynetdicom", "pydicom", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _is_journal() -> bool:
    """Whether standard error goes to systemd's journal, which has the time and the service itself: systemd.exec(5)."""
    error = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{error.st_dev}:{error.st_ino}"


class _JournalFormatter(logging.Formatter):
    """Each line begins with its priority, so that ``journalctl -p`` finds it: sd-daemon(3)."""

    def format(self, record: logging.LogRecord) -> str:
        priority = next((number for level, number in _PRIORITIES if record.levelno >= level), 7)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)
