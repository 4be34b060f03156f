"""The services under what systemd gives them: a socket to report to, and ports that it keeps open."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_network
from pathlib import Path
from typing import Any, cast

import pytest

from appliance import init
from appliance.delivery.outbox import Result, Worker
from appliance.demo.orthanc import free_ports
from appliance.services.process import inherited_sockets
from dicom_io.errors import ScansideError
from dicom_io.handlers import Handlers
from dicom_io.scp import Listener, ServerOptions, start_server
from dicom_io.scu import Peer, echo
from tests.dicom_io.support import Recorder

pytestmark = pytest.mark.slow

SECONDS = 60.0
"""Longest wait for a service to say something."""

SILENCE = 3.0
"""A service that should ping every 0.1 s and does not for so long is silent."""

ORDINARY = "from appliance.cli import main; main()"


class Manager:
    """Stands for systemd, with the same sockets: it starts a service, hears it, and keeps its port open."""

    def __init__(self, folder: Path) -> None:
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._path = folder / "notify"
        self._notify.bind(str(self._path))
        self.config = init.write(folder / "box", {"intake": {"reserve_percent": 0.0, "reserve_bytes": 0}})
        self.log = folder / "log"

    @contextmanager
    def service(
        self, name: str, *, port: socket.socket | None = None, code: str = ORDINARY, **settings: str
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Run a service, with a port that listens already; it is killed in the end if it still runs."""

        environment = os.environ | {"NOTIFY_SOCKET": str(self._path), "WATCHDOG_USEC": "400000"} | settings
        passed = () if port is None else (port.fileno(),)
        if port is not None:
            environment |= {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "dicom"}
            code = f"import os; os.dup2({port.fileno()}, 3); os.environ['LISTEN_PID'] = str(os.getpid()); {code}"
        command = [sys.executable, "-c", code, "--config", str(self.config), name]
        with self.log.open("ab") as log:
            process = subprocess.Popen(command, env=environment, stderr=log, pass_fds=passed)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def hears(self, what: str) -> None:
        """Wait until the service says that."""
        self._notify.settimeout(SECONDS)
        try:
            while what not in self._notify.recv(4096).decode():
                pass
        except TimeoutError:
            pytest.fail(f"no {what}: {self.log.read_text()[-3000:]}")

    def hears_no_ping(self) -> None:
        """After what is on its way, nothing comes any more."""
        self._notify.settimeout(SILENCE)
        heard = 0
        try:
            while True:
                assert "WATCHDOG=1" in self._notify.recv(4096).decode()
                heard += 1
                assert heard < 20, "it goes on"
        except TimeoutError:
            return

    def close(self) -> None:
        self._notify.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    one = Manager(tmp_path)
    yield one
    one.close()


@pytest.mark.parametrize("name", ["intake", "engine", "deliver"])
def test_a_service_says_that_it_is_ready_lives_and_stops(manager: Manager, name: str) -> None:
    with manager.service(name, SCANSIDE_INTAKE__PORT=str(free_ports(1)[0])) as process:
        manager.hears("READY=1")
        for _ in range(3):
            manager.hears("WATCHDOG=1")
        process.send_signal(signal.SIGSTOP)
        manager.hears_no_ping()
        process.send_signal(signal.SIGCONT)
        manager.hears("WATCHDOG=1")
        process.terminate()
        manager.hears("STOPPING=1")
        assert process.wait(SECONDS) == 0


HANGS = {
    "engine": "import time; from appliance.services import engine; engine.Engine.step = lambda _: time.sleep(999); ",
    "deliver": "import time; from appliance.services import delivery; delivery.TURN_SECONDS = 0.5; "
    "delivery._report_overdue = lambda *_: time.sleep(999); ",  # its other loops turn, and sign, meanwhile
}
"""Service → what makes its loop hang while the rest of the process lives."""


@pytest.mark.parametrize("name", HANGS)
def test_a_service_whose_loop_hangs_is_silent(manager: Manager, name: str) -> None:
    with manager.service(name, code=HANGS[name] + ORDINARY) as process:
        manager.hears("READY=1")
        manager.hears_no_ping()
        assert process.poll() is None


def test_a_listener_that_hangs_does_not_sign() -> None:
    signed = threading.Semaphore(0)
    go_on = threading.Event()

    class Hangs(Recorder):
        def rejected(self, address: str, calling_ae: str, reason: str) -> None:
            go_on.wait()

    handlers: Handlers = Hangs()
    options = ServerOptions("BOX", accepted_addresses=(ip_network("192.0.2.0/24"),))
    server = start_server(options, [Listener("127.0.0.1", 0, turn=signed.release)], handlers)
    try:
        for _ in range(3):
            assert signed.acquire(timeout=SECONDS)  # it turns although nobody comes
        socket.create_connection(("127.0.0.1", server.port)).close()
        while signed.acquire(timeout=SILENCE):
            pass
        go_on.set()
        assert signed.acquire(timeout=SECONDS)
    finally:
        go_on.set()
        server.stop(0.2)


def test_a_delivery_that_hangs_does_not_sign() -> None:
    """The ledger is one that has always this delivery to make, and can be told nothing."""
    signed, go_on = threading.Semaphore(0), threading.Event()

    class Always:
        def take_delivery(self, *_: object) -> dict[str, Any]:
            return {"id": 1, "study_id": 1, "object": "report", "attempts": 0}

        def settle_delivery(self, *_: object, **__: object) -> None:
            raise OSError("the disk is full")

    def deliver(_: Any) -> Result:
        go_on.wait()
        return "acknowledge", ""

    worker = Worker(
        cast(Any, Always()), "pacs", deliver, attempts=1, first_retry_seconds=1, longest_retry_seconds=1,
        budget_seconds=1, turn=signed.release,
    )  # fmt: skip
    worker.start()
    try:
        assert signed.acquire(timeout=SECONDS)
        assert not signed.acquire(timeout=SILENCE)
        go_on.set()
        for _ in range(3):  # it waits for the ledger, which is no reason to end it and send the same again
            assert signed.acquire(timeout=SECONDS)
    finally:
        go_on.set()
        worker.stop()
        worker.join(SECONDS)


def test_a_restart_refuses_no_scanner(manager: Manager) -> None:
    with socket.create_server(("127.0.0.1", 0)) as port:
        number = port.getsockname()[1]
        peer = Peer("SCANSIDE", "127.0.0.1", number)
        for end in (signal.SIGTERM, signal.SIGKILL):
            with manager.service("intake", port=port, SCANSIDE_INTAKE__PORT=str(number)) as process:
                manager.hears("READY=1")
                echo(peer, "CT1")
                process.send_signal(end)
                process.wait(SECONDS)
            answered: list[str] = []

            def ask(answered: list[str] = answered) -> None:
                echo(peer, "CT1", timeout=SECONDS)
                answered.append("yes")

            scanner = threading.Thread(target=ask)
            scanner.start()  # nobody is there who could accept it
            with manager.service("intake", port=port, SCANSIDE_INTAKE__PORT=str(number)):
                manager.hears("READY=1")
                scanner.join(SECONDS)
            assert answered == ["yes"]


def test_intake_refuses_a_port_that_it_would_never_answer(manager: Manager) -> None:
    with socket.create_server(("127.0.0.1", 0)) as port:
        number = port.getsockname()[1]
        with manager.service("intake", port=port, SCANSIDE_INTAKE__PORT=str(free_ports(1)[0])) as process:
            assert process.wait(SECONDS) == 2
    assert f"systemd listens on port {number}, which intake does not serve" in manager.log.read_text()


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])  # the second does not listen
def test_what_is_passed_must_be_a_listening_tcp_socket(kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_INET, kind) as wrong:
        wrong.bind(("127.0.0.1", 0))
        monkeypatch.setattr("appliance.services.process._FIRST_PASSED", os.dup(wrong.fileno()))
        monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
        monkeypatch.setenv("LISTEN_FDS", "1")
        monkeypatch.setenv("LISTEN_FDNAMES", "syslog")
        with pytest.raises(ScansideError, match="no listening TCP socket"):
            inherited_sockets()
    assert inherited_sockets() == {}  # asked once


def test_sockets_for_another_process_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert inherited_sockets() == {}
