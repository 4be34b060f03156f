"""Provider of storage, verification, storage commitment, and of what modalities and archives say that there is (PS3.4
Annexes B, A, J, F and R).

It receives, and hands on the bytes as they were sent: it neither parses a data set nor keeps anything. Each connection
has a thread (`_association`); pynetdicom reads and answers association requests, the rest of the way of an instance is
made for speed and by hand.
"""

from __future__ import annotations

import ipaddress
import itertools
import logging
import select
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

from pynetdicom import build_context
from pynetdicom.presentation import PresentationContext

from dicom_io._association import NO_TLS, Association
from dicom_io._upper_layer import Rejection
from dicom_io.errors import ScansideError
from dicom_io.handlers import Handlers
from dicom_io.sop_classes import (
    OTHER_CLASSES,
    OTHER_SYNTAXES,
    STORAGE_CLASSES,
    STORAGE_COMMITMENT,
    TRANSFER_SYNTAXES,
)

logger = logging.getLogger(__name__)

APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"
PENDING_CONNECTIONS = 64
"""Connections at most without an association yet, and as many whose peer has still to close them; a quarter of either
from one address. ``artim_seconds`` ends each."""

_TURN_SECONDS = 1.0

_NOT_ACCEPTED = "its address is not accepted"
_TOO_MANY = "too many connections without an association"

REJECTIONS: tuple[str, ...] = (*(one.words for one in Rejection), _NOT_ACCEPTED, _TOO_MANY, NO_TLS)
"""Every reason for which an association or a connection is not accepted."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Certificates(Protocol):
    """Where a listener's TLS comes from; see `dicom_io.tls.ServerCertificates`."""

    def context(self) -> ssl.SSLContext:
        """For the next connection: renewed certificates are in it, present associations go on with theirs."""


@dataclass(frozen=True, slots=True)
class Listener:
    """An address to listen on: "" is every one, port 0 a free one. With certificates it speaks TLS only.

    Attributes:
        inherited: a socket that listens there already. It is not ours to end: who connects after `StorageServer.stop`
            waits for whoever listens on it next.
        turn: called by the thread that accepts, after each connection and at least once a second.
    """

    host: str
    port: int
    certificates: Certificates | None = None
    inherited: socket.socket | None = None
    turn: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What a server accepts.

    Attributes:
        storage_classes: SOP Class UIDs accepted for storage, each in every one of `TRANSFER_SYNTAXES`.
        accepted_calling: AE titles that may call; none means any.
        accepted_addresses: networks that may connect; none means any.
        require_called: whether a peer must call us by our AE title.
        maximum_associations: one more is rejected (transient, local limit exceeded).
        maximum_associations_per_address: likewise, so that one peer that hangs cannot shut out the others.
        artim_seconds: from the connection to the whole association request, and for a peer to close (PS3.8 9.1.4).
        idle_seconds: without a byte from the peer, after which its association is aborted.
        minimum_bytes_per_second: average of a message that takes longer than half a minute; slower ones are aborted.
        maximum_instance_bytes: longer messages are aborted.
    """

    ae_title: str
    storage_classes: tuple[str, ...] = STORAGE_CLASSES
    accepted_calling: tuple[str, ...] = ()
    accepted_addresses: tuple[Network, ...] = ()
    require_called: bool = False
    maximum_associations: int = 64
    maximum_associations_per_address: int = 32
    artim_seconds: float = 10.0
    idle_seconds: float = 60.0
    minimum_bytes_per_second: int = 1000
    maximum_instance_bytes: int = 4 << 30


class StorageServer:
    """A running server; made by `start_server`."""

    def __init__(self, options: ServerOptions, handlers: Handlers) -> None:
        self.options = options
        self.handlers = handlers
        self.contexts = _contexts(options)
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._connections: set[Association] = set()
        self._admitted: set[Association] = set()
        self._closing: set[Association] = set()
        self._stopping = False
        self._sockets: list[socket.socket] = []
        self._woken, self._wake = socket.socketpair()  # closing the one ends the acceptors' wait on the other
        self._ports: tuple[int, ...] = ()
        self._acceptors: list[threading.Thread] = []

    @property
    def ports(self) -> tuple[int, ...]:
        """The TCP ports that are listened on, in the order of the listeners."""
        return self._ports

    @property
    def port(self) -> int:
        """The TCP port of the first listener."""
        return self.ports[0]

    def _start(self, listeners: Sequence[Listener]) -> None:
        try:
            for listener in listeners:
                self._sockets.append(listener.inherited or _listen(listener))
        except ScansideError:
            for bound in (*self._sockets, self._woken, self._wake):
                bound.close()
            raise
        self._ports = tuple(int(one.getsockname()[1]) for one in self._sockets)
        for bound, listener in zip(self._sockets, listeners, strict=True):
            thread = threading.Thread(target=self._accept, args=(bound, listener), name="accept", daemon=True)
            self._acceptors.append(thread)
            thread.start()

    def stop(self, grace: float = 5.0) -> None:
        """Accept no more associations, let the present ones end within ``grace`` seconds, then abort them.

        When it returns every `Handlers.closed` has been called, unless a handler itself does not return within
        some seconds more. A second call does nothing.
        """
        deadline = time.monotonic() + grace
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
        self._wake.close()
        _join(self._acceptors, 1.0)
        for bound in (*self._sockets, self._woken):
            bound.close()
        while self._admitted and time.monotonic() < deadline:
            time.sleep(0.02)
        with self._lock:
            remaining = list(self._connections)
        for association in remaining:
            association.stop()
        _join(remaining, 5.0)

    # --- for the acceptor threads -------------------------------------------------------------------------

    def _accept(self, bound: socket.socket, listener: Listener) -> None:
        bound.setblocking(False)
        ready = select.poll()
        ready.register(bound, select.POLLIN)
        ready.register(self._woken, select.POLLIN)
        while not self._stopping:
            listener.turn()
            ready.poll(_TURN_SECONDS * 1000)
            if self._stopping:
                return
            try:
                connection, peer = bound.accept()
            except BlockingIOError:  # nobody came, or is gone again
                continue
            except OSError as error:
                # Out of file descriptors, or a peer that was gone at once: it gets better by waiting.
                logger.error("a connection could not be accepted: %s", error)
                time.sleep(0.1)
                continue
            try:
                self._connected(connection, _plain(peer[0]), listener)
            except Exception:
                logger.exception("a connection from %s could not be served", peer[0])
                connection.close()

    def _connected(self, connection: socket.socket, address: str, listener: Listener) -> None:
        reason = self._unwelcome(address)
        if reason:
            connection.close()
            logger.warning("connection from %s closed: %s", address, reason)
            self.rejected(address, "", reason)
            return
        context = listener.certificates.context() if listener.certificates else None
        association = Association(self, next(self._numbers), connection, address, context)
        with self._lock:
            self._connections.add(association)
        try:
            association.start()
        except BaseException:  # no more threads
            self.forget(association)
            raise

    def _unwelcome(self, address: str) -> str:
        """Why a connection is closed before a word is said; '' if it is not."""
        allowed = self.options.accepted_addresses
        if allowed and not any(ipaddress.ip_address(address) in network for network in allowed):
            return _NOT_ACCEPTED
        with self._lock:
            full = _is_full(self._connections - self._admitted - self._closing, address)
        return _TOO_MANY if full else ""

    # --- for the associations ---------------------------------------------------------------------------

    def admit(self, association: Association, calling: str, called: str, application_context: str) -> Rejection | None:
        """Why this association is rejected; None if it is accepted, and counts from now on."""
        options = self.options
        if application_context != APPLICATION_CONTEXT:
            return Rejection.APPLICATION_CONTEXT
        if options.accepted_calling and calling not in options.accepted_calling:
            return Rejection.CALLING_AE
        if options.require_called and called != options.ae_title:
            return Rejection.CALLED_AE
        with self._lock:
            if self._stopping:
                return Rejection.TOO_MANY
            of_address = Counter(one.address for one in self._admitted)[association.address]
            if len(self._admitted) >= options.maximum_associations:
                return Rejection.TOO_MANY
            if of_address >= options.maximum_associations_per_address:
                return Rejection.TOO_MANY
            self._admitted.add(association)
        return None

    def rejected(self, address: str, calling_ae: str, reason: str) -> None:
        """Tell the owner."""
        try:
            self.handlers.rejected(address, calling_ae, reason)
        except Exception:
            logger.exception("a rejected association could not be recorded")

    def ended(self, association: Association) -> bool:
        """It counts no longer; whether its connection may wait for the peer to close it, or too many do already."""
        with self._lock:
            self._admitted.discard(association)
            may_wait = not _is_full(self._closing, association.address)
            if may_wait:
                self._closing.add(association)
        return may_wait

    def forget(self, association: Association) -> None:
        """Nothing is left of it."""
        with self._lock:
            for kept in (self._connections, self._admitted, self._closing):
                kept.discard(association)


def start_server(options: ServerOptions, listeners: Sequence[Listener], handlers: Handlers) -> StorageServer:
    """Listen for associations and serve the classes of this module, each association in its own thread.

    Raises:
        ScansideError: an address cannot be bound, or the AE title is not one (PS3.5 6.2: 1 to 16 characters).
    """
    title = options.ae_title
    if not title.strip() or len(title) > 16 or not title.isascii() or not title.isprintable() or "\\" in title:
        raise ScansideError("this is no AE title", f"AE title {title!r}", "use 1 to 16 plain characters")
    server = StorageServer(options, handlers)
    server._start(listeners)
    return server


def _contexts(options: ServerOptions) -> list[PresentationContext]:
    contexts = [build_context(uid, list(TRANSFER_SYNTAXES)) for uid in options.storage_classes]
    contexts += [build_context(uid, list(OTHER_SYNTAXES)) for uid in OTHER_CLASSES]
    for context in contexts:
        if context.abstract_syntax == STORAGE_COMMITMENT:
            # A peer that reports on what we asked it to keep is the provider on an association that it requests.
            context.scu_role = context.scp_role = True
    return contexts


def _listen(listener: Listener) -> socket.socket:
    try:
        infos = socket.getaddrinfo(
            listener.host or None, listener.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        # "" is every IPv4 address; "::" is every one of both kinds.
        family, _, _, _, address = sorted(infos, key=lambda info: info[0] != socket.AF_INET)[0]
        dual = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        return socket.create_server(address[:2], family=family, backlog=128, dualstack_ipv6=dual)
    except OSError as error:
        where = f"{listener.host or '*'}:{listener.port}"
        what = f"cannot listen ({error.strerror or error})"
        raise ScansideError(what, where, "choose another address or port") from error


def _is_full(connections: Set[Association], address: str) -> bool:
    """Whether one more from this address is too much."""
    mine = sum(one.address == address for one in connections)
    return len(connections) >= PENDING_CONNECTIONS or mine >= PENDING_CONNECTIONS // 4


def _plain(address: str) -> str:
    """An IPv4 address as such where an IPv6 socket gives it (RFC 4291 2.5.5.2); without a zone."""
    return address.partition("%")[0].removeprefix("::ffff:")


def _join(threads: Sequence[threading.Thread], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
