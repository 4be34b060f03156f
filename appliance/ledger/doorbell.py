"""A datagram that wakes the next stage at once. A lost ring costs a poll interval, never a study."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path


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

    def wait(self, seconds: float) -> bool:
        """Wait for a ring, at most that long; several rings count as one. True if it rang."""
        self._socket.settimeout(max(seconds, 0.001))
        try:
            self._socket.recv(1)
        except TimeoutError:
            return False
        self._socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._socket.recv(1)
        return True

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()
        self._path.unlink(missing_ok=True)


def ring(directory: Path, name: str) -> None:
    """Wake that service if it listens; it is no error if it does not, for it polls as well."""
    with contextlib.suppress(OSError), _short_path(directory, name) as path:
        bell = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            bell.sendto(b"!", path)
        finally:
            bell.close()
