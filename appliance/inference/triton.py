"""The client of the inference server: slabs in, probabilities and lesion maps out, through shared memory.

Every answer is checked, and one that cannot be right is an error: wrong shapes, values that are not numbers or lie
outside 0..1, another model than the package's. Regions of shared memory are reused between calls; one that an
error left in doubt is given up, because the server may still write to it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol

import numpy as np
import tritonclient.grpc as grpcclient
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from appliance.governance.package import Package
from dicom_io.errors import ScansideError

SHARED_MEMORY = Path("/dev/shm")
VERSION = "1"
"""The only version of a model in the repository; the package's own version is part of its digest."""
DIGEST_PARAMETER = "scanside_model_digest"
"""Parameter of a model's configuration that holds the digest of the package's model.onnx."""

URGENT, ROUTINE = 1, 2
"""Priority levels of a model's queue in the server; the lower goes first."""

_PREFIX = "scanside-tensors-"
_HEALTH_SECONDS = 2.0
_LET_GO_SECONDS = 1.0
_TOO_LATE = "StatusCode.DEADLINE_EXCEEDED"
_UNREACHABLE = "StatusCode.UNAVAILABLE"
_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Without these a restarted server is found again only after minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A hospital's http_proxy must not be asked for the server beside us.
    ("grpc.enable_http_proxy", 0),
]


class TritonError(ScansideError):
    """The inference server did not give an answer that can be used."""


@dataclass(frozen=True, slots=True)
class Output:
    """What a package's model says of n slabs.

    Attributes:
        probabilities: (n, labels) float32 in 0..1, in the order of the package's labels.
        lesion_map: (n, map, map) float32 in 0..1.
    """

    probabilities: NDArray[np.float32]
    lesion_map: NDArray[np.float32]


class Region(Protocol):
    """A piece of memory that the server reads and writes, too.

    Attributes:
        name: unique among all processes and times.
        size: in bytes.
        floats: the same as a flat array of float32, NumPy's or CuPy's.
    """

    name: str
    size: int
    floats: Any

    def register(self, grpc: Any, timeout: float) -> None:
        """Make it known to the server."""

    def write(self, place: Any, part: Any) -> None:
        """Copy an array of the host's or the device's memory to a place in ``floats``."""

    def finish(self) -> None:
        """Return when the server would read what was written."""

    def isfinite(self, values: Any) -> bool:
        """Whether all values of an array of this memory are finite."""

    def host(self, values: Any) -> NDArray[np.float32]:
        """A copy of an array of this memory in the host's."""

    def unlink(self) -> None:
        """Leave it to those who have it open; nobody else can open it from now on."""

    def free(self) -> None:
        """Give it back; the server has let go of it."""


class Memory(Protocol):
    """A kind of memory that is shared with the server."""

    def region(self, size: int) -> Region:
        """Make a region of so many bytes.

        Raises:
            TritonError: there is no room.
        """

    def unregister(self, grpc: Any, name: str, timeout: float) -> None:
        """Have the server let go of a region, or of one that it does not know."""

    def sweep(self, grpc: Any, timeout: float) -> list[str]:
        """Remove what clients that were killed left; returns the regions of theirs that the server still has open."""


class TritonClient:
    """A connection to one inference server. Threads may share it.

    Args:
        url: "host:port" of the server's gRPC service.
        shared_memory: false where the server is another machine or another user: tensors go through gRPC then.
        memory: which memory is shared; the host's unless told otherwise.
        timeout: longest wait for the answer to one batch, in seconds.
    """

    def __init__(
        self, url: str, *, shared_memory: bool = True, memory: Memory | None = None, timeout: float = 30.0
    ) -> None:
        self.url = url
        self._shared_memory = shared_memory
        self._memory: Memory = memory or SystemMemory()
        self._timeout = timeout
        self._grpc = grpcclient.InferenceServerClient(url, channel_args=_CHANNEL)
        self._lock = threading.Lock()
        self._free: list[Region] = []
        self._swept = self._closed = False
        self._given_up: list[tuple[str, Region | None]] = []
        self._proven: set[str] = set()

    def __enter__(self) -> TritonClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back all shared memory and disconnect. Calls still under way in other threads fail."""
        with self._lock:
            regions, self._free, self._closed = self._free, [], True
        for region in regions:
            self._give_up(region)
        # For some milliseconds after an answer the server still calls a region in use.
        deadline = time.monotonic() + _LET_GO_SECONDS
        self._unregister()
        while self._given_up and time.monotonic() < deadline:
            time.sleep(0.02)
            self._unregister()
        self._grpc.close()

    def problem(self, package: Package, *, prove: bool = False) -> str:
        """Why the server cannot run this package now, in a sentence without its full stop; '' if it can.

        Unless the last request went well, it runs one slab of zeros: for some seconds after the process that runs a
        model has died, and for as long as that process hangs, the server still calls the model ready.

        Args:
            prove: run that slab whatever the last request did.
        """
        try:
            if not self._grpc.is_server_ready(client_timeout=_HEALTH_SECONDS):
                return "the server is not ready"
            if not self._grpc.is_model_ready(package.model.triton_name, VERSION, client_timeout=_HEALTH_SECONDS):
                return f"the server does not serve {package.model.triton_name}"
            if prove or package.name not in self._proven:
                self.infer(package, np.zeros((1, *package.model.input.shape), np.float32), urgent=True)
        except InferenceServerException as error:
            return f"the server does not answer: {_said(error)}"
        except TritonError as error:
            return error.what
        return ""

    def ready(self, package: Package) -> bool:
        """Whether the server answers, and serves this very package."""
        return not self.problem(package)

    def served(self, package: Package) -> tuple[Sequence[str], Any]:
        """The versions that the server has of the package's model, and its configuration (a ModelConfig message).

        Raises:
            TritonError: the server does not answer, or does not serve it.
        """
        name = package.model.triton_name
        try:
            versions = self._grpc.get_model_metadata(name, client_timeout=_HEALTH_SECONDS).versions
            return versions, self._grpc.get_model_config(name, VERSION, client_timeout=_HEALTH_SECONDS).config
        except InferenceServerException as error:
            self._fail(error, package)

    def wait_ready(self, timeout: float, packages: Sequence[Package]) -> None:
        """Return once the server can run all packages.

        Args:
            timeout: longest wait in seconds.

        Raises:
            TritonError: it cannot within that time; says why.
        """
        end = time.monotonic() + timeout
        for package in packages:
            while problem := self.problem(package):
                if time.monotonic() >= end:
                    raise TritonError(problem, self.url, "see the server's log; `scanside check` tries again")
                time.sleep(0.05)

    def infer(
        self, package: Package, slabs: NDArray[np.float32] | Sequence[Sequence[Any]], *, urgent: bool = False
    ) -> Output:
        """Run the package's model.

        A server that was restarted since the last call is no error.

        Args:
            slabs: (n, channels, size, size) float32, finite; or of each slab the parts, each (some channels, size,
                size), in the memory of the host or in that which is shared, so that they are copied only once. More
                than the model's maximum batch goes in several requests, one after the other.
            urgent: goes ahead of what waits in the server, also of other clients, and is not.

        Raises:
            ValueError: the slabs have another shape or type than the package's input, or are not all finite.
            TritonError: no answer in time, a refusal, or an answer that cannot be right.
        """
        _check_slabs(package, slabs)
        labels, (_, *field) = package.model.output("probabilities").shape, package.model.output("lesion_map").shape
        probabilities = np.empty((len(slabs), *labels), np.float32)
        lesion_map = np.empty((len(slabs), *field), np.float32)
        step = package.model.maximum_batch
        for start in range(0, len(slabs), step):
            answers = self._batch(package, slabs[start : start + step], urgent)
            probabilities[start : start + step] = answers["probabilities"]
            lesion_map[start : start + step] = answers["lesion_map"][:, 0]
        return Output(probabilities, lesion_map)

    def _batch(self, package: Package, slabs: _Slabs, urgent: bool) -> dict[str, NDArray[np.float32]]:
        """One batch; a failure that a restart of the server explains is tried once more on fresh ground."""
        for last in (False, True):
            try:
                if package.name not in self._proven:
                    self._verify(package)
                if not self._shared_memory:
                    answers = self._by_message(package, slabs, urgent)
                else:
                    with self._region(package, fresh=last) as region:
                        answers = self._by_region(package, slabs, region, urgent)
                _check(answers, self.url)
            except InferenceServerException as error:
                self._proven.discard(package.name)
                if last or error.status() == _TOO_LATE:
                    self._fail(error, package)
            except TritonError:
                self._proven.discard(package.name)
                raise
            else:
                self._proven.add(package.name)
                return answers
        raise AssertionError("the second try returns or raises")

    def _by_message(self, package: Package, slabs: _Slabs, urgent: bool) -> dict[str, NDArray[np.float32]]:
        shape = (len(slabs), *package.model.input.shape)
        values = np.empty(shape, np.float32)
        _fill(values, slabs, _to_host)
        _check_finite(bool(np.isfinite(values).all()))
        tensor = grpcclient.InferInput(package.model.input.name, shape, package.model.input.datatype)
        tensor.set_data_from_numpy(values)
        outputs = [grpcclient.InferRequestedOutput(output.name) for output in package.model.outputs]
        result = self._infer(package, [tensor], outputs, len(slabs), urgent)
        return {output.name: result.as_numpy(output.name) for output in package.model.outputs}

    def _by_region(
        self, package: Package, slabs: _Slabs, region: Region, urgent: bool
    ) -> dict[str, NDArray[np.float32]]:
        model = package.model
        given = (len(slabs), *model.input.shape)
        tensor = grpcclient.InferInput(model.input.name, given, model.input.datatype)
        at = int(np.prod(given))
        values = region.floats[:at].reshape(given)
        _fill(values, slabs, region.write)
        _check_finite(region.isfinite(values))
        tensor.set_shared_memory(region.name, 4 * at, 0)
        outputs, places = [], {}
        for output in model.outputs:
            shape = (len(slabs), *output.shape)
            place = region.floats[at : at + int(np.prod(shape))].reshape(shape)
            place.fill(np.nan)  # an answer that was never written does not pass for one
            requested = grpcclient.InferRequestedOutput(output.name)
            requested.set_shared_memory(region.name, place.nbytes, at * 4)
            outputs.append(requested)
            places[output.name] = place
            at += place.size
        region.finish()
        self._infer(package, [tensor], outputs, len(slabs), urgent)
        return {name: region.host(place) for name, place in places.items()}

    def _infer(self, package: Package, inputs: list[Any], outputs: list[Any], count: int, urgent: bool) -> Any:
        """One request; checks what its answer says of itself."""
        result = self._grpc.infer(
            package.model.triton_name,
            inputs,
            model_version=VERSION,
            outputs=outputs,
            priority=URGENT if urgent else ROUTINE,
            client_timeout=self._timeout,
        )
        for output in package.model.outputs:
            answer = result.get_output(output.name)
            shape = [count, *output.shape]
            if answer is None or answer.datatype != output.datatype or list(answer.shape) != shape:
                said = "nothing" if answer is None else f"{answer.datatype} {list(answer.shape)}"
                raise TritonError(
                    f"{output.name} should be {output.datatype} {shape}, the server answered {said}",
                    f"{self.url}, model {package.model.triton_name}",
                    "serve the model of this package",
                )
        return result

    def _verify(self, package: Package) -> None:
        """Hold the digest in the served model's configuration against the package's."""
        name, digest = package.model.triton_name, package.files["model.onnx"]
        config = self._grpc.get_model_config(name, VERSION, client_timeout=self._timeout).config
        served = (
            config.parameters[DIGEST_PARAMETER].string_value if DIGEST_PARAMETER in config.parameters else "no digest"
        )
        if served != digest:
            raise TritonError(
                f"the server's {name} is {served}, the package's model is {digest}",
                self.url,
                "restart the server with this package",
            )

    def _fail(self, error: InferenceServerException, package: Package) -> NoReturn:
        if error.status() == _TOO_LATE:
            what, remedy = f"no answer within {self._timeout:g} s", "see the server's load and log, or raise the limit"
        elif error.status() == _UNREACHABLE:
            what, remedy = f"the server cannot be reached: {_said(error)}", "start it, or see its log"
        else:
            what, remedy = f"the server refused: {_said(error)}", "see the server's log"
        raise TritonError(what, f"{self.url}, model {package.model.triton_name}", remedy) from error

    @contextmanager
    def _region(self, package: Package, *, fresh: bool) -> Iterator[Region]:
        """A registered region that holds one batch and its outputs; back to the pool only after a good answer."""
        model = package.model
        one = sum(int(np.prod(tensor.shape)) for tensor in (model.input, *model.outputs))
        size = 4 * model.maximum_batch * one
        with self._lock:
            found = next((region for region in self._free if region.size >= size), None) if not fresh else None
            if found:
                self._free.remove(found)
        region = found or self._register(size)
        try:
            yield region
        except BaseException:
            self._give_up(region)
            raise
        with self._lock:
            if not self._closed:
                self._free.append(region)
                return
        self._give_up(region)

    def _register(self, size: int) -> Region:
        with self._lock:
            if not self._swept:
                left = self._memory.sweep(self._grpc, _HEALTH_SECONDS)
                self._given_up += [(name, None) for name in left]
                self._swept = True
        self._unregister()
        region = self._memory.region(size)
        try:
            region.register(self._grpc, self._timeout)
        except InferenceServerException as error:
            self._give_up(region)
            if error.status() in (_TOO_LATE, _UNREACHABLE):
                raise
            raise TritonError(
                f"the server cannot use shared memory: {_said(error)}",
                self.url,
                "run it on this machine as this user, or turn shared memory off",
            ) from error
        return region

    def _give_up(self, region: Region) -> None:
        region.unlink()
        with self._lock:
            self._given_up.append((region.name, region))

    def _unregister(self) -> None:
        """Have the server forget given-up regions. One that it still uses stays on the list for the next time."""
        with self._lock:
            left, self._given_up = self._given_up, []
        for name, region in left:
            try:
                self._memory.unregister(self._grpc, name, _HEALTH_SECONDS)
            except InferenceServerException:
                with self._lock:
                    self._given_up.append((name, region))
                continue
            if region is not None:
                region.free()


class SystemMemory:
    """The host's shared memory (POSIX)."""

    def region(self, size: int) -> Region:
        return _SystemRegion(size)

    def unregister(self, grpc: Any, name: str, timeout: float) -> None:
        grpc.unregister_system_shared_memory(name, client_timeout=timeout)

    def sweep(self, grpc: Any, timeout: float) -> list[str]:
        """The files of killed clients go; the server may still map them."""
        for path in SHARED_MEMORY.glob(f"{_PREFIX}*"):
            with suppress(FileNotFoundError, PermissionError, BlockingIOError), path.open("rb") as left:
                fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its owner lives
                path.unlink()
        mapped = grpc.get_system_shared_memory_status(client_timeout=timeout).regions
        return [name for name in mapped if name.startswith(_PREFIX) and not (SHARED_MEMORY / name).exists()]


class _SystemRegion:
    """A piece of system shared memory. Its file is locked while this process lives: so others see that it is in use."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.name = f"{_PREFIX}{os.getpid()}-{secrets.token_hex(6)}"
        # Locked before it has a name, and its memory taken now: a full file system shows here and not as SIGBUS.
        try:
            self._file = os.open(SHARED_MEMORY, os.O_TMPFILE | os.O_RDWR, 0o660)
            try:
                os.fchmod(self._file, 0o660)  # whatever the umask: the server may run as another user of our group
                fcntl.flock(self._file, fcntl.LOCK_EX)
                os.posix_fallocate(self._file, 0, size)
                self.floats: NDArray[np.float32] = np.frombuffer(mmap.mmap(self._file, size), np.float32)
                # Only with a folder's number does Python make the system call that follows the link of /proc.
                os.link(f"/proc/self/fd/{self._file}", SHARED_MEMORY / self.name, src_dir_fd=self._file)
            except BaseException:
                os.close(self._file)
                raise
        except OSError as error:
            raise TritonError(
                f"there is no shared memory: {error.strerror}", str(SHARED_MEMORY), "make room there, or turn it off"
            ) from error

    def register(self, grpc: Any, timeout: float) -> None:
        grpc.register_system_shared_memory(self.name, f"/{self.name}", self.size, client_timeout=timeout)

    def write(self, place: Any, part: Any) -> None:
        _to_host(place, part)

    def finish(self) -> None:
        """What is written is there."""

    def isfinite(self, values: Any) -> bool:
        return bool(np.isfinite(values).all())

    def host(self, values: Any) -> NDArray[np.float32]:
        return np.array(values, np.float32)

    def unlink(self) -> None:
        """Remove its name. The memory itself goes when the server has let go of it too."""
        (SHARED_MEMORY / self.name).unlink(missing_ok=True)
        os.close(self._file)

    def free(self) -> None:
        """It went with the last who had it open."""


_Slabs = NDArray[np.float32] | Sequence[Sequence[Any]]


def _check_slabs(package: Package, slabs: _Slabs) -> None:
    channels, *field = package.model.input.shape
    for parts in slabs:
        each = [parts] if isinstance(parts, np.ndarray) else parts
        right = all(part.dtype == np.float32 and [*part.shape[1:]] == field for part in each)
        if not right or sum(len(part) for part in each) != channels:
            found = " + ".join(f"{part.dtype} {part.shape}" for part in each)
            raise ValueError(f"each slab must be float32 ({channels}, {field[0]}, {field[1]}), not {found}")


def _fill(values: Any, slabs: _Slabs, write: Callable[[Any, Any], None]) -> None:
    """Write slabs, or the parts of each, into an array of the model's input."""
    for place, parts in zip(values, slabs, strict=True):
        at = 0
        for part in [parts] if isinstance(parts, np.ndarray) else parts:
            write(place[at : at + len(part)], part)
            at += len(part)


def _to_host(place: NDArray[np.float32], part: Any) -> None:
    place[...] = part if isinstance(part, np.ndarray) else part.get()  # CuPy never copies to the host unasked


def _check_finite(finite: bool) -> None:
    if not finite:
        raise ValueError("slabs hold values that are not finite")


def _check(answers: dict[str, NDArray[np.float32]], where: str) -> None:
    for name, values in answers.items():
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise TritonError(
                f"{name} holds values that are no probabilities", where, "do not use this model; see the server's log"
            )


def _said(error: InferenceServerException) -> str:
    return " ".join(str(error.message()).split()) or str(error.status())
