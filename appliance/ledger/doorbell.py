"""A datagram that wakes the next stage at once. A lost ring costs a poll interval, never a study."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_RETRY_SECONDS = 0.2
_NEWS, _MORE = b"!", b"."


@contextlib.contextmanager
def _short_path(directory: Path, name: str) -> Iterator[str]:
    """A path to the socket that fits the 107 bytes of sun_path, however deep the folder lies."""
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}.bell"
    finally:
        os.close(descriptor)


class Doorbell:
    """The listening end; one a service.

    Args:
        directory: folder of the sockets, made if absent.
        name: name of the service that listens.
    """

    def __init__(self, directory: Path, name: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / f"{name}.bell"
        self._path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        with _short_path(directory, name) as path:
            self._socket.bind(path)

    def wait(self, seconds: float, more: float = 0.0) -> bool:
        """Wait for a ring, at most that long; several rings count as one. True if it rang.

        Args:
            more: whoever rings with `Ringer.more` alone is heard after so many seconds, anybody else at once.
        """
        began = time.monotonic()
        end = began + seconds
        rang = False
        while True:
            self._socket.settimeout(max(end - time.monotonic(), 0.001))
            try:
                heard = {self._socket.recv(1)}
            except TimeoutError:
                return rang
            self._socket.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    heard.add(self._socket.recv(1))
            rang = True
            end = min(end, began + more)
            if heard != {_MORE} or time.monotonic() >= end:
                return True

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()
        self._path.unlink(missing_ok=True)


class Ringer:
    """Wakes a service again and again, through a socket that is kept. It is no error if nobody listens: who does polls
    as well.

    Args:
        directory: as of the `Doorbell`; it may come later.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self._directory, self._name = directory, name
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._lock = threading.Lock()
        self._connected = False
        self._silent_until = 0.0  # nobody listened: not tried again before that

    def __call__(self) -> None:
        self._ring(_NEWS)

    def more(self) -> None:
        """Ring for more of what the service hears of all the time: it need not wake for each."""
        self._ring(_MORE)

    def _ring(self, kind: bytes) -> None:
        with self._lock:
            if time.monotonic() < self._silent_until:
                return
            if not (self._connected and self._sent(kind)):
                # Nobody has listened yet, or who did is another process now.
                self._connected = self._connect() and self._sent(kind)
                if not self._connected:
                    self._silent_until = time.monotonic() + _RETRY_SECONDS

    def _connect(self) -> bool:
        with contextlib.suppress(OSError), _short_path(self._directory, self._name) as path:
            self._socket.connect(path)
            return True
        return False

    def _sent(self, kind: bytes) -> bool:
        try:
            self._socket.send(kind)
        except BlockingIOError:
            return True  # it has not even heard the earlier ones
        except OSError:
            return False
        return True


def ring(directory: Path, name: str) -> None:
    """Wake that service once, see `Ringer`."""
    with contextlib.suppress(OSError), _short_path(directory, name) as path:
        bell = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            bell.sendto(_NEWS, path)
        finally:
            bell.close()
