"""`scanside run` and a Triton that runs and does not work; a real one that hangs is in tests/interop/test_kill.py."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from appliance import supervisor
from appliance.inference.server import Launch
from appliance.settings import Settings
from dicom_io.errors import ScansideError


class Client:
    """Stands for the client of a server that is what the test says."""

    proofs = 0

    @staticmethod
    def said() -> str:
        raise NotImplementedError

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def problem(self, package: Any, *, prove: bool) -> str:
        type(self).proofs += prove
        return type(self).said()


@contextmanager
def heeded(monkeypatch: pytest.MonkeyPatch, said: Callable[[], str], start: float) -> Iterator[supervisor._Child]:
    monkeypatch.setattr(supervisor, "TritonClient", Client)
    monkeypatch.setattr(supervisor, "load_sound", lambda _: ([object()], {}))
    monkeypatch.setattr(supervisor, "PROBE_PAUSE", 0.01)
    monkeypatch.setattr(supervisor, "SILENT_SECONDS", 0.3)
    monkeypatch.setattr(supervisor, "START_SECONDS", start)
    monkeypatch.setattr(Client, "said", staticmethod(said))
    monkeypatch.setattr(Client, "proofs", 0)
    child = supervisor._Child("triton", [])
    child.process = subprocess.Popen(["sleep", "100"], start_new_session=True)
    stopping = threading.Event()
    thread = threading.Thread(target=supervisor._heed, args=(Settings(), child, stopping))
    thread.start()
    try:
        yield child
    finally:
        stopping.set()
        thread.join(10)
        child.process.kill()
        child.process.wait()
    assert not thread.is_alive()


def ended(child: supervisor._Child, seconds: float) -> bool:
    assert child.process is not None
    try:
        child.process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def test_one_that_works_is_left_alone_and_has_to_prove_it_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    with heeded(monkeypatch, lambda: "", 0.3) as child:
        assert not ended(child, 1.0)
    assert Client.proofs == 1, "a slab each few seconds, not at each look"


@pytest.mark.parametrize("raises", [False, True])
def test_one_that_was_well_is_killed_when_it_is_not_for_long(monkeypatch: pytest.MonkeyPatch, raises: bool) -> None:
    began = time.monotonic()

    def said() -> str:
        if time.monotonic() - began < 0.5:
            return ""
        if raises:
            raise RuntimeError("nobody foresaw this")
        return "it does not answer"

    with heeded(monkeypatch, said, 1000.0) as child:
        assert ended(child, 30)
    assert time.monotonic() - began > 0.7


def test_one_that_starts_has_more_time_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    with heeded(monkeypatch, lambda: "it does not answer", 1000.0) as child:
        assert not ended(child, 1.0)
    with heeded(monkeypatch, lambda: "it does not answer", 0.5) as child:
        assert ended(child, 30)


@pytest.mark.parametrize("taken", ["grpc_port", "http_port", "metrics_port"])
def test_a_second_server_leaves_the_files_of_the_one_that_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, taken: str
) -> None:
    monkeypatch.setattr(supervisor, "load_sound", lambda _: ([object()], {}))
    prepared: list[object] = []

    def prepare(*words: object, **_: object) -> Launch:
        prepared.append(words)
        raise ScansideError("as far as that", "here", "nothing")

    monkeypatch.setattr(supervisor, "prepare", prepare)
    with socket.create_server(("127.0.0.1", 0)) as running:
        port = running.getsockname()[1]
        ports = {"grpc_port": 0, "http_port": 0, "metrics_port": 0, taken: port}
        for name in ports.keys() - {taken}:
            with socket.create_server(("127.0.0.1", 0)) as some:
                ports[name] = some.getsockname()[1]
        settings = Settings.model_validate({"box": {"state_directory": tmp_path}, "triton": ports})
        with pytest.raises(ScansideError, match=f"port {port} cannot be had") as error:
            supervisor.run_triton(settings)
        assert error.value.where == f"triton.{taken}" and not prepared
        # On a GPU the server is NVIDIA's: it runs, and its repository is written.
        on_gpu = settings.model_copy(update={"box": settings.box.model_copy(update={"device": "gpu"})})
        with pytest.raises(ScansideError, match="as far as that"):
            supervisor.run_triton(on_gpu)
        assert len(prepared) == 1
    with pytest.raises(ScansideError, match="as far as that"):
        supervisor.run_triton(settings)
    assert len(prepared) == 2
