"""The client, our backend and a real Triton server together."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from appliance.governance.package import Package
from appliance.inference.triton import TritonClient, TritonError

from .conftest import Server

pytestmark = pytest.mark.interop

DIRECT = """
import os, sys
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
names = ["probabilities", "lesion_map"]
answers = session.run(names, {"slabs": np.load(sys.argv[2])})
np.savez(sys.argv[3], **dict(zip(names, answers)))
"""

Answers = tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]


@pytest.fixture(scope="module")
def direct(triton_environment: Path, reference: Package, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Forty slabs, and what ONNX Runtime says of them when nothing stands between."""
    folder = tmp_path_factory.mktemp("direct")
    slabs = np.random.default_rng(3).random((40, *reference.model.input.shape), np.float32)
    slabs *= np.linspace(0, 1, 40, dtype=np.float32)[:, None, None, None]
    np.save(folder / "slabs.npy", slabs)
    subprocess.run(
        [
            triton_environment / "bin" / "python3",
            "-c",
            DIRECT,
            reference.folder / "model.onnx",
            folder / "slabs.npy",
            folder / "answers.npz",
        ],
        check=True,
    )
    answers = dict(np.load(folder / "answers.npz"))
    return slabs, answers


def assert_same(output: Any, direct: dict[str, NDArray[np.float32]], rows: slice = slice(None)) -> None:
    np.testing.assert_allclose(output.probabilities, direct["probabilities"][rows], atol=1e-5)
    np.testing.assert_allclose(output.lesion_map, direct["lesion_map"][rows, 0], atol=1e-5)


@pytest.mark.parametrize("shared_memory", [True, False])
def test_the_answers_are_those_of_onnx_runtime(
    triton_server: Server, reference: Package, direct: Answers, shared_memory: bool
) -> None:
    slabs, answers = direct
    assert np.ptp(answers["probabilities"]) > 1e-4, "an oracle that says the same of every slab proves nothing"
    with TritonClient(triton_server.url, shared_memory=shared_memory) as client:
        assert client.ready(reference)
        assert_same(client.infer(reference, slabs), answers)


def test_clients_in_parallel_get_their_own_answers(triton_server: Server, reference: Package, direct: Answers) -> None:
    slabs, answers = direct
    parts = [slice(start, start + 1 + start % 5) for start in range(0, 35, 3)]
    with TritonClient(triton_server.url) as one, TritonClient(triton_server.url) as other:

        def ask(number: int) -> Any:
            return (one, other)[number % 2].infer(reference, slabs[parts[number]])

        with ThreadPoolExecutor(6) as threads:
            outputs = list(threads.map(ask, range(len(parts))))
    for part, output in zip(parts, outputs, strict=True):
        assert_same(output, answers, part)


def test_nothing_is_left_on_the_server(triton_server: Server, reference: Package) -> None:
    raw = grpcclient.InferenceServerClient(triton_server.url)
    others = set(raw.get_system_shared_memory_status().regions)  # that earlier tests' server may not have let go of
    with TritonClient(triton_server.url) as client:
        client.infer(reference, np.zeros((1, *reference.model.input.shape), np.float32))
        assert set(raw.get_system_shared_memory_status().regions) - others
    assert not set(raw.get_system_shared_memory_status().regions) - others


@pytest.mark.parametrize(
    ("count", "columns", "datatype", "says"),
    [(1, 255, "FP32", "unexpected shape"), (17, 256, "FP32", "must be <= 16"), (1, 256, "INT32", "data-type")],
)
def test_a_wrong_request_is_refused_and_the_server_stays(
    triton_server: Server, reference: Package, count: int, columns: int, datatype: str, says: str
) -> None:
    shape = (count, *reference.model.input.shape[:2], columns)
    raw = grpcclient.InferenceServerClient(triton_server.url)
    tensor = grpcclient.InferInput("slabs", shape, datatype)
    tensor.set_data_from_numpy(np.zeros(shape, np.float32 if datatype == "FP32" else np.int32))
    with pytest.raises(InferenceServerException, match=says):
        raw.infer("ich_reference", [tensor])
    with TritonClient(triton_server.url) as client:
        assert client.problem(reference) == ""


def test_a_request_that_takes_too_long_is_an_error_and_the_next_one_works(
    triton_server: Server, reference: Package, direct: Answers
) -> None:
    slabs, answers = direct
    with TritonClient(triton_server.url, timeout=0.005) as client:
        with pytest.raises(TritonError, match="no answer within"):
            client.infer(reference, slabs)
        client._timeout = 30.0
        assert_same(client.infer(reference, slabs), answers)


def test_it_listens_to_this_machine_alone(triton_server: Server) -> None:
    """What the kernel says of the server's sockets, not what its command line does."""
    inodes = {name[len("socket:[") : -1] for name in opened(triton_server.running.pid) if name.startswith("socket:[")}
    listening = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                listening.add(fields[1].rsplit(":", 1)[0])
    assert listening
    assert listening <= {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, and the same as IPv6 writes it


def test_onnx_runtime_reports_nothing(triton_server: Server) -> None:
    """It keeps a database of what it would send; without one it sends nothing."""
    for stub in children(triton_server.running.pid):
        assert not [name for name in opened(stub) if name.endswith(".db")]


def test_a_killed_server_that_is_started_again_is_found_again(
    own_server: Server, reference: Package, direct: Answers
) -> None:
    slabs, answers = direct
    with TritonClient(own_server.url, timeout=10) as client:
        client.infer(reference, slabs[:3])
        own_server.end(signal.SIGKILL)
        with pytest.raises(TritonError, match="cannot be reached"):
            client.infer(reference, slabs[:3])
        assert not client.ready(reference)
        own_server.start()
        client.wait_ready(10, [reference])
        assert_same(client.infer(reference, slabs[:3]), answers, slice(3))
        own_server.end(signal.SIGKILL)  # and once more, with nobody looking
        own_server.start()
        assert_same(client.infer(reference, slabs[:3]), answers, slice(3))


def test_a_server_killed_at_work_leaves_no_process_behind(
    own_server: Server, reference: Package, direct: Answers
) -> None:
    family = descendants(own_server.running.pid)
    assert len(family) >= 2, "the stub and its guard"
    stop = threading.Event()

    def work() -> None:
        with TritonClient(own_server.url) as client:
            while not stop.is_set():
                try:
                    client.infer(reference, direct[0][:16])
                except TritonError:
                    return

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    time.sleep(0.5)
    own_server.end(signal.SIGKILL)
    stop.set()
    assert wait_until(lambda: not any(alive(pid) for pid in family), 8), "processes outlive their server"
    for worker in workers:
        worker.join()


def test_a_server_whose_model_process_died_ends_and_is_not_called_ready(own_server: Server, reference: Package) -> None:
    zeros = np.zeros((1, *reference.model.input.shape), np.float32)
    with TritonClient(own_server.url, timeout=10) as client:
        client.infer(reference, zeros)
        (stub,) = children(own_server.running.pid)
        os.kill(stub, signal.SIGKILL)
        with pytest.raises(TritonError):
            client.infer(reference, zeros)
        assert not client.ready(reference)
    own_server.running.wait(10)


def test_a_server_whose_model_process_hangs_is_found_out_only_by_a_slab(own_server: Server, reference: Package) -> None:
    with TritonClient(own_server.url, timeout=2.0, shared_memory=False) as client:
        assert client.problem(reference, prove=True) == ""
        (stub,) = children(own_server.running.pid)
        os.kill(stub, signal.SIGSTOP)
        assert client.problem(reference) == ""
        # Which of the two: the server finds it out by itself only when it is asked.
        said = client.problem(reference, prove=True)
        assert "no answer within 2 s" in said or "is not healthy" in said
        os.kill(stub, signal.SIGCONT)


def test_a_stop_is_quick_and_clean(own_server: Server) -> None:
    family = descendants(own_server.running.pid)
    start = time.monotonic()
    assert own_server.end(signal.SIGTERM) == 0
    assert time.monotonic() - start < 8
    assert wait_until(lambda: not any(alive(pid) for pid in family), 2)


def opened(pid: int) -> list[str]:
    """What a process has open."""
    names = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it was closed meanwhile
            names.append(str(path.readlink()))
    return names


def children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def descendants(pid: int) -> set[int]:
    found = set(children(pid))
    for child in tuple(found):
        found |= descendants(child)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(holds: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
