"""`scanside run`: the services of one machine as children of one process, as systemd runs them on a box."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from appliance.governance.integrity import load_sound
from appliance.governance.package import Package
from appliance.inference.server import Launch, prepare
from appliance.inference.triton import TritonClient
from appliance.operations.health import Watchdog, notify
from appliance.services.process import only_one, stop_signal
from appliance.settings import Settings
from dicom_io.errors import ScansideError

log = logging.getLogger(__name__)

SERVICES = ("intake", "engine", "deliver")
STOP_SECONDS = 10.0
LONGEST_PAUSE = 30.0
PROBE_PAUSE = 1.0
PROBE_SECONDS = 10.0
PROVE_SECONDS = 5.0
"""So often Triton has to run a slab of zeros, because it calls itself ready also where the process that runs a model
hangs."""
SILENT_SECONDS = 15.0
"""A Triton that was well and for so long is not is killed, and started again: a third of what the analysis may take."""
START_SECONDS = 120.0
"""The same for one that was not well yet."""
STEADY_SECONDS = 60.0
"""A child that ran for this long was well; its next end counts as the first again."""


@dataclass(slots=True)
class _Child:
    name: str
    command: list[str]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    ends: int = 0
    due: float = field(default_factory=time.monotonic)


def services_of(settings: Settings) -> tuple[str, ...]:
    """The services that these settings ask for, by the names of their commands."""
    triton = ("triton",) if settings.triton.managed else ()
    return (*triton, *SERVICES, *(("worklist",) if settings.worklist is not None else ()))


def run_all(settings: Settings, config: Path, *, json_log: bool = False) -> None:
    """Run every service, restart one that ends (after a pause that doubles), until told to stop.

    On SIGTERM or SIGINT the children have 10 s to finish or park their work; then they are killed. If this
    process is killed, the kernel ends them.

    Raises:
        ScansideError: it runs already.
    """
    names = services_of(settings)
    command = [sys.executable, "-m", "appliance.cli", "--config", str(config.resolve())]
    command += ["--json-log"] if json_log else []
    children = [_Child(name, [*command, name]) for name in names]
    with only_one(settings, "run"), stop_signal() as stopping:
        if settings.triton.managed:
            threading.Thread(target=_heed, args=(settings, children[0], stopping), name="heed", daemon=True).start()
        try:
            while not stopping.is_set():
                for child in children:
                    _tend(child)
                stopping.wait(0.2)
        finally:
            _stop(children)


def run_triton(settings: Settings) -> None:
    """Put Triton's command, backends and model repository together and become the server.

    Under systemd the server is a child, and this process tells systemd whether it answers: see `_watch`.

    Raises:
        ScansideError: the environment, a model package or its TensorRT plan is not what it must be, or a server that is
            watched ended by itself, or one runs already.
    """
    packages, broken = load_sound(settings)
    for name, problem in broken.items():
        log.error("triton: %s is not served: %s", name, problem)
    if not packages:
        raise ScansideError("there is no package to serve", "; ".join(broken.values()), "`scanside models verify`")
    if settings.box.device != "gpu":
        _require_free(settings)
    launch = prepare(
        settings.triton.environment,
        settings.triton_directory,
        packages,
        settings.box.device,
        plans=settings.plans_directory,
        grpc_port=settings.triton.grpc_port,
        http_port=settings.triton.http_port,
        metrics_port=settings.triton.metrics_port,
    )
    if os.environ.get("NOTIFY_SOCKET"):
        _watch(settings, launch, packages)
    else:
        os.execve(launch.command[0], launch.command, launch.env)


def _require_free(settings: Settings) -> None:
    """Look whether a server has the ports before its backends and repository are written anew under it."""
    for name in ("grpc_port", "http_port", "metrics_port"):
        port: int = getattr(settings.triton, name)
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("127.0.0.1", port))
            except OSError as error:
                raise ScansideError(
                    f"port {port} cannot be had ({error.strerror})",
                    f"triton.{name}",
                    "stop the Triton that runs already, or choose another port",
                ) from error


class _Pulse:
    """Whether Triton can run the packages: a look each time, and a slab of zeros through each model now and then."""

    def __init__(self, client: TritonClient, packages: Sequence[Package]) -> None:
        self._client = client
        self._packages = packages
        self._proven = -PROVE_SECONDS

    def problem(self) -> str:
        """Why it cannot; "" if it can."""
        prove = time.monotonic() - self._proven >= PROVE_SECONDS
        said = next(filter(None, (self._client.problem(package, prove=prove) for package in self._packages)), "")
        if prove and not said:
            self._proven = time.monotonic()
        return said


def _heed(settings: Settings, child: _Child, stopping: threading.Event) -> None:
    """Kill a Triton that runs and does not work, so that it is started again; systemd does the same by its watchdog."""
    packages, _ = load_sound(settings)
    url = f"{settings.triton.host}:{settings.triton.grpc_port}"
    with TritonClient(url, shared_memory=False, timeout=PROBE_SECONDS) as client:
        pulse, process, well, patience = _Pulse(client, packages), None, 0.0, START_SECONDS
        while not stopping.wait(PROBE_PAUSE):
            if child.process is not process:
                process, well, patience = child.process, time.monotonic(), START_SECONDS
            if process is None:
                continue
            try:
                said = pulse.problem()
            except Exception as error:  # that it cannot be asked is no sign of life
                said = f"{type(error).__name__}: {error}"
            if not said:
                well, patience = time.monotonic(), SILENT_SECONDS
            elif time.monotonic() - well > patience and process is child.process:
                log.error("Triton is killed and started again, because for %g s: %s", patience, said)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # also the processes that run its models
                well = time.monotonic()


def _watch(settings: Settings, launch: Launch, packages: Sequence[Package]) -> None:
    """Run the server until told to stop; systemd hears when it can run every package, and then as long as it can."""
    url = f"127.0.0.1:{settings.triton.grpc_port}"
    with stop_signal() as stopping, TritonClient(url, shared_memory=False, timeout=PROBE_SECONDS) as client:
        server = subprocess.Popen(launch.command, env=launch.env)
        pulse = _Pulse(client, packages)
        turn = None
        while server.poll() is None and not stopping.is_set():
            if not pulse.problem():
                if turn is None:
                    notify("READY=1", f"STATUS=serves {', '.join(one.name for one in packages)}")
                    turn = Watchdog().loop("triton", PROBE_SECONDS)
                turn()
            stopping.wait(PROBE_PAUSE)
        if server.poll() is not None:
            raise ScansideError(f"the server ended with code {server.returncode}", url, "its log says why")
        notify("STOPPING=1")
        server.terminate()
        try:
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            log.error("the server did not stop in %g s and is killed", STOP_SECONDS)
            server.kill()
            server.wait()


def _tend(child: _Child) -> None:
    """Start a child that is due; notice one that ended."""
    if child.process is not None:
        code = child.process.poll()
        if code is None:
            return
        child.process = None
        if time.monotonic() - child.started > STEADY_SECONDS:
            child.ends = 0
        pause = 0.0 if child.ends == 0 else min(LONGEST_PAUSE, 0.5 * 2.0**child.ends)
        child.ends += 1
        child.due = time.monotonic() + pause
        log.error("%s ended with code %d; it starts again in %g s", child.name, code, pause)
    if time.monotonic() >= child.due:
        child.started = time.monotonic()
        # A session of its own: Ctrl-C in the terminal reaches only this process, which stops the others in order.
        # setpriv asks the kernel for a SIGTERM to the child when this process ends, however it ends.
        child.process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", "--", *child.command], start_new_session=True
        )


def _stop(children: list[_Child]) -> None:
    running = [child.process for child in children if child.process is not None]
    for process in running:
        process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    for process in running:
        if process.poll() is None:
            log.error("process %d did not stop in %g s and is killed", process.pid, STOP_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
