"""A real Triton server for the tests, and packages to serve."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest

import triton_models
from appliance.governance.package import Package, load_configured
from appliance.inference.server import Launch, prepare
from appliance.inference.triton import TritonClient
from appliance.settings import Settings

REFERENCE = Path(triton_models.__file__).parent / "ich_reference"


@dataclass
class Server:
    """A server of one package, to be started, killed and started again on the same ports."""

    package: Package
    launch: Launch
    port: int
    log: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *self.launch.command],
                env=self.launch.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        with TritonClient(self.url) as client:
            client.wait_ready(60, [self.package])

    @property
    def running(self) -> subprocess.Popen[bytes]:
        assert self.process is not None
        return self.process

    def end(self, how: signal.Signals = signal.SIGKILL) -> int:
        """The exit status."""
        self.running.send_signal(how)
        return self.running.wait(15)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nothing listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def seeing(package: Package, neighbours: Literal[0, 1]) -> Package:
    """The package, with a model that sees so many neighbours of a slab on either side."""
    seen = replace(package.preprocessing, neighbours=neighbours)
    shape = ((2 * neighbours + 1) * len(seen.windows), seen.size, seen.size)
    model = replace(package.model, input=replace(package.model.input, shape=shape))
    return replace(package, preprocessing=seen, model=model)


@pytest.fixture(scope="session")
def reference() -> Package:
    """The package that scanside ships."""
    return load_configured(Settings())[0]


@pytest.fixture(scope="session")
def triton_environment() -> Path:
    """The virtual environment that holds nvidia-pytriton."""
    default = Path(triton_models.__file__).parent.parent / ".venv-triton"
    folder = Path(os.environ.get("SCANSIDE_TRITON_ENVIRONMENT", default))
    if not (folder / "bin" / "python3").exists():
        pytest.skip(f"there is no Triton environment {folder} (set SCANSIDE_TRITON_ENVIRONMENT)")
    return folder


@pytest.fixture(scope="session")
def new_server(
    triton_environment: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Package], Server]]:
    """Makes servers, not yet started; all that still run are killed at the end."""
    made: list[Server] = []

    def make(package: Package) -> Server:
        home = tmp_path_factory.mktemp("triton")
        grpc, http, metrics = free_ports(3)
        launch = prepare(
            triton_environment, home, [package], "cpu", grpc_port=grpc, http_port=http, metrics_port=metrics
        )
        made.append(Server(package, launch, grpc, home / "log"))
        return made[-1]

    yield make
    for server in made:
        if server.process is not None and server.process.poll() is None:
            os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()
        for part in server.launch.command:
            if "shm-region-prefix-name=" in part:
                for left in Path("/dev/shm").glob(f"{part.rsplit('=', 1)[1]}*"):
                    left.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def triton_server(new_server: Callable[[Package], Server], reference: Package) -> Server:
    """A running server of the reference package; a test that harms its server takes one of its own."""
    server = new_server(reference)
    server.start()
    return server


@pytest.fixture
def own_server(new_server: Callable[[Package], Server], reference: Package) -> Server:
    """A running server of the reference package for one test alone."""
    server = new_server(reference)
    server.start()
    return server
