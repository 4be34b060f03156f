"""An MLLP listener: takes blocks off connections, hands them on one at a time, writes the answers back.

A connection has a thread. Blocks of one connection are handled in the order in which they came, and each is answered
before the next is looked at. Nothing that a peer sends ends the listener.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, ip_address

from appliance.mllp import Deframer, FramingError, frame
from dicom_io.errors import ScansideError
from dicom_io.tls import ServerCertificates

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""A thread looks so often whether it is to stop."""
MAXIMUM_JUNK = 64 * 1024
"""Bytes outside any block after which a connection is closed: its peer speaks something else."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a listener bears.

    Attributes:
        addresses: networks that may connect; none means any.
        connections, connections_per_address: more are closed at once.
        message_bytes: a longer message is refused and its connection closed.
        message_seconds: from the first byte of a message to its last, for a TLS handshake, and for a peer to take an
            answer; slower ones are closed.
        idle_seconds: a connection without a message for so long is closed; 0: never.
    """

    addresses: tuple[IPv4Network | IPv6Network, ...] = ()
    connections: int = 32
    connections_per_address: int = 16
    message_bytes: int = 1 << 20
    message_seconds: float = 30.0
    idle_seconds: float = 0.0


@dataclass(slots=True)
class Port:
    """An address to listen on; with certificates it speaks TLS only.

    Attributes:
        inherited: a socket that listens there already, and is not ours to end.
        turn: called by the thread that accepts, at least every `POLL_SECONDS`.
    """

    host: str
    port: int
    certificates: ServerCertificates | None = None
    inherited: socket.socket | None = None
    turn: Callable[[], None] = lambda: None


@dataclass
class Listener:
    """A running listener, after `start`.

    Args:
        take: called with a block and the peer's address; returns what is answered, one message after the other.
        unreadable: called with the peer's address and what came of it that was no message; returns what is answered to
            a message that is too long, "" for anything else.
    """

    ports: Sequence[Port]
    limits: Limits
    take: Callable[[bytes, str], Sequence[str]]
    unreadable: Callable[[str, str, bool], str]
    _open: dict[socket.socket, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _servers: list[tuple[socket.socket, Port]] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Closing the one ends the acceptors' wait on the other.
        self._woken, self._wake = socket.socketpair()

    def start(self) -> tuple[int, ...]:
        """Listen on every port; returns their numbers.

        Raises:
            ScansideError: a port cannot be had.
        """
        for port in self.ports:
            try:
                server = port.inherited or socket.create_server(
                    (port.host, port.port), family=socket.AF_INET6 if ":" in port.host else socket.AF_INET, backlog=64
                )
            except OSError as error:
                self.stop(0)
                where = f"{port.host}:{port.port}"
                raise ScansideError(error.strerror or str(error), where, "free the port or take another") from error
            server.setblocking(False)
            self._servers.append((server, port))
        for server, port in self._servers:
            number = server.getsockname()[1]
            thread = threading.Thread(target=self._accept, args=(server, port), name=f"hl7 {number}", daemon=True)
            thread.start()
            self._threads.append(thread)
        return tuple(int(server.getsockname()[1]) for server, _ in self._servers)

    def stop(self, seconds: float) -> None:
        """Take no more; what is being handled is answered first, if that takes no longer."""
        self._stopping.set()
        self._wake.close()
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(POLL_SECONDS + 0.5)
        with self._lock:
            for connection in self._open:
                _hang_up(connection, socket.SHUT_RD)
        for server, port in self._servers:
            if port.inherited is None:
                server.close()
        while self._open and time.monotonic() < deadline:
            time.sleep(0.02)
        with self._lock:
            for connection in list(self._open):
                _hang_up(connection, socket.SHUT_RDWR)

    def _accept(self, server: socket.socket, port: Port) -> None:
        while not self._stopping.is_set():
            port.turn()
            if server not in select.select([server, self._woken], [], [], POLL_SECONDS)[0]:
                continue
            try:
                connection, address = server.accept()
            except (TimeoutError, BlockingIOError):
                continue
            except OSError as error:
                # Too many open files, or a peer that is gone already: the next one may do better.
                log.warning("hl7: a connection could not be taken (%s)", error.strerror or error)
                time.sleep(0.1)
                continue
            peer = str(address[0])
            if why := self._refused(peer):
                log.warning("hl7: a connection from %s is closed: %s", peer, why)
                connection.close()
                continue
            with self._lock:
                self._open[connection] = peer
            try:
                threading.Thread(
                    target=self._serve, args=(connection, peer, port), name=f"hl7 from {peer}", daemon=True
                ).start()
            except RuntimeError as error:  # no more threads: this one is turned away, and the next may do better
                log.error("hl7: a connection from %s cannot be served (%s)", peer, error)
                with self._lock:
                    self._open.pop(connection, None)
                connection.close()

    def _refused(self, peer: str) -> str:
        address = ip_address(peer.partition("%")[0])
        mapped = getattr(address, "ipv4_mapped", None) or address
        if self.limits.addresses and not any(mapped in network for network in self.limits.addresses):
            return "its address is not accepted"
        with self._lock:
            here = Counter(self._open.values())
        if here.total() >= self.limits.connections:
            return f"there are {here.total()} connections"
        if here[peer] >= self.limits.connections_per_address:
            return f"there are {here[peer]} connections from there"
        return ""

    def _serve(self, connection: socket.socket, peer: str, port: Port) -> None:
        plain = connection
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.settimeout(self.limits.message_seconds)
            if port.certificates is not None:
                connection = port.certificates.context().wrap_socket(connection, server_side=True)
                with self._lock:
                    self._open[connection] = self._open.pop(plain)
            self._talk(connection, peer)
        except ssl.SSLError as error:
            log.warning("hl7: the TLS connection from %s failed (%s)", peer, error.reason or error)
        except OSError as error:
            log.info("hl7: the connection from %s broke (%s)", peer, error.strerror or error)
        except Exception:
            log.exception("hl7: a connection failed in a way nobody foresaw; others go on")
        finally:
            with self._lock:
                self._open.pop(connection, None)
                self._open.pop(plain, None)
            _hang_up(connection, socket.SHUT_RDWR)
            connection.close()

    def _talk(self, connection: socket.socket, peer: str) -> None:
        deframer = Deframer(self.limits.message_bytes)
        began = quiet = time.monotonic()
        said = ""
        while not self._stopping.is_set():
            connection.settimeout(POLL_SECONDS)
            try:
                data = connection.recv(65536)
            except TimeoutError:
                data = None
            now = time.monotonic()
            if data:
                quiet = now
                began = now if not deframer.begun else began
                try:
                    blocks = deframer.feed(data)
                except FramingError as error:
                    if answer := self.unreadable(peer, str(error), True):
                        connection.settimeout(self.limits.message_seconds)
                        connection.sendall(frame(answer))
                        _drain(connection)
                    return
                for block in blocks:
                    for answer in self.take(block, peer):
                        connection.settimeout(self.limits.message_seconds)
                        connection.sendall(frame(answer))
                if blocks:
                    began = quiet = time.monotonic()
            if deframer.begun and now - began > self.limits.message_seconds:
                said = f"a message that was not whole after {self.limits.message_seconds:g} s"
            elif data == b"":
                said = "a message that was cut off" if deframer.begun else ""
                break
            elif deframer.skipped > MAXIMUM_JUNK:
                said = "something that is not MLLP"
            elif 0 < self.limits.idle_seconds < now - quiet:
                log.info("hl7: the idle connection from %s is closed", peer)
                break
            if said:
                break
        if deframer.skipped:
            said = f"{said + '; ' if said else ''}{deframer.skipped} bytes outside messages"
        if said:
            self.unreadable(peer, said, False)


def _hang_up(connection: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):
        # The socket's own: that of an SSLSocket would wait for the peer.
        socket.socket.shutdown(connection, how)


def _drain(connection: socket.socket) -> None:
    """Read on for a moment, so that a peer that is still writing gets the answer and not a reset."""
    deadline = time.monotonic() + POLL_SECONDS
    connection.settimeout(0.1)
    with contextlib.suppress(OSError):
        while time.monotonic() < deadline and connection.recv(65536):
            pass
