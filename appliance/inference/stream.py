"""Slabs on their way through the decoders and the model, of all studies at once, while the studies still arrive.

What a slab's answer is depends on nothing but its slices, those of its neighbours where the package wants them, and the
package. So it can be asked for as soon as those slices are there, and asked for again when the study is complete: an
answer that is known is not computed a second time, and one that was foreseen wrongly is never used. The verdict is the
same whatever was done ahead.
"""

from __future__ import annotations

import heapq
import itertools
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.governance.indication import Admission
from appliance.governance.package import Package, Preprocessing
from appliance.ledger.records import Verdict
from dicom_io.errors import DecodeError, GeometryError, ScansideError
from dicom_io.pixels import Decoded
from dicom_io.plausible import Look, check_plausible, look_at
from dicom_io.volume import Volume

from .brain import Brain, brain_area_mm2
from .decode import decode_each
from .preprocess import model_input
from .slabs import Context, SlabPlan, in_context, plan_slabs, slab_hu
from .triton import Output, TritonClient
from .verdict import aggregate

STAT, COMPLETE, ARRIVING = 0, 1, 2
"""Urgencies, the most urgent first: a study that cannot wait, one whose answer is due, and work ahead."""

REMEMBERED = 4096
"""Answers kept, some 20 KB each: of a hundred studies of 40 slabs."""

WHOLE_FILES = 2
"""Decoded multi-frame instances that are kept while their slabs are worked on."""

PREPARED = 64
"""Decoded slices that are kept until their slab is there, 1.5 MB each at 512 x 512."""

SEEN = 96
"""Slabs whose pixels are kept for their neighbours' sake, 0.8 MB each."""

RECOVERY_SECONDS = 30.0
"""Longest wait for a server that died under a batch, before every study of it loses a try."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One plane's pixels: a frame of a file of the spool, which must have that SHA-256."""

    path: Path
    digest: str
    number: int
    frames: int


@dataclass(frozen=True, slots=True)
class Slab:
    """The planes that are averaged into one slab, in their order, and the spacing between rows, between columns."""

    frames: tuple[Frame, ...]
    spacing_mm: tuple[float, float]

    @property
    def key(self) -> _SlabKey:
        """What its pixels follow from."""
        return tuple((frame.digest, frame.number) for frame in self.frames), self.spacing_mm


@dataclass(frozen=True, slots=True)
class SlabAnswer:
    """What is known of one slab.

    Attributes:
        probabilities: (labels,) in 0..1.
        lesion_map: (map, map) in 0..1.
        brain_mm2: soft tissue within the skull, mm².
        shape: (rows, columns) of its images.
        codecs: the decoders that produced its pixels.
        looks: what is kept of each of its planes, to judge whether the volume can be a CT.
    """

    probabilities: NDArray[np.float32]
    lesion_map: NDArray[np.float32]
    brain_mm2: Brain
    shape: tuple[int, int]
    codecs: tuple[str, ...]
    looks: tuple[Look, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """A volume that has gone through the model: its slabs, and what is known of each."""

    plans: tuple[SlabPlan, ...]
    answers: tuple[SlabAnswer, ...]

    @property
    def brain_ml(self) -> Brain:
        """Soft tissue within the skull; an adult head gives about 1000 to 1600."""
        parts = [(a.brain_mm2, p.thickness_mm / 1000) for a, p in zip(self.answers, self.plans, strict=True)]
        return Brain(sum(area.seen * ml for area, ml in parts), sum(area.unseen * ml for area, ml in parts))


_SlabKey = tuple[tuple[tuple[str, int], ...], tuple[float, float]]
_Key = tuple[str, str, tuple[_SlabKey, ...]]


@dataclass(frozen=True, slots=True)
class _Seen:
    """A slab's pixels as the model wants them, (channels, size, size), and what else was seen in them.

    The pixels may lie in a GPU's memory.
    """

    channels: Any
    brain_mm2: Brain
    shape: tuple[int, int]
    codecs: tuple[str, ...]
    looks: tuple[Look, ...]


@dataclass(slots=True)
class _Job:
    key: _Key
    package: Package
    owner: int
    slabs: tuple[Slab, ...]
    urgency: int
    future: Future[SlabAnswer] = field(default_factory=Future)
    taken: bool = False
    seen: tuple[_Seen, ...] = ()


@dataclass(slots=True)
class _Slice:
    """A file of one frame that is decoded before its slab is there."""

    path: Path
    digest: str
    future: Future[Decoded] = field(default_factory=Future)
    taken: bool = False


class Closed(ScansideError):
    """The pipeline was closed before the answer came."""


class Pipeline:
    """Decoders, one a core, and one sender that fills the model's batches across studies.

    Its memory is bounded: decoders wait while two batches are ready, and answers beyond `REMEMBERED` and pixels beyond
    `SEEN` slabs are forgotten, the longest unused first. Threads may share it.

    Args:
        decode: files, each with its SHA-256 → their frames in HU.
        prepare: a slab in HU → the model's input, as `model_input` does it.
        workers: decoding threads; every core if omitted.
    """

    def __init__(
        self,
        client: TritonClient,
        *,
        decode: Callable[[Sequence[tuple[Path, str]]], Sequence[Decoded]] = decode_each,
        prepare: Callable[..., Any] = model_input,
        workers: int | None = None,
    ) -> None:
        self._client = client
        self._decode = decode
        self._prepare = prepare
        self._order = itertools.count()
        self._lock = threading.Condition()
        self._known: OrderedDict[_Key, _Job] = OrderedDict()
        self._waiting: list[tuple[int, int, _Job | _Slice]] = []
        self._slices: OrderedDict[str, _Slice] = OrderedDict()
        self._ready: list[tuple[int, int, _Job]] = []
        self._seen: OrderedDict[tuple[Preprocessing, _SlabKey], Future[_Seen]] = OrderedDict()
        self._whole: OrderedDict[str, Decoded] = OrderedDict()
        self._whole_locks: dict[str, threading.Lock] = {}
        self._closed = False
        self._begun: dict[str, float] = {}  # decoding thread → when it began what it is at, on the monotonic clock
        names = [f"decoder-{number}" for number in range(workers or os.cpu_count() or 1)]
        self._threads = [threading.Thread(target=self._decoder, name=name, daemon=True) for name in names]
        self._threads.append(threading.Thread(target=self._sender, name="sender", daemon=True))
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End its threads after what they are doing; whoever still waits for an answer gets `Closed`."""
        with self._lock:
            self._closed = True
            left = [job for job in self._known.values() if not job.future.done()]
            self._lock.notify_all()
        for job in left:
            self._fail(job, Closed("the engine is stopping", "inference", "it goes on at the next start"))
        for thread in self._threads:
            thread.join(5)

    def ask(
        self,
        package: Package,
        admission: Admission,
        slabs: Sequence[Slab],
        *,
        owner: int,
        urgency: int,
    ) -> Future[SlabAnswer]:
        """The answer of one slab, now or later. Asking again costs nothing, and may make it more urgent.

        Args:
            admission: what the gate said so far of the study that the slab belongs to.
            slabs: the slab, between its neighbours as `in_context` gives them where the package wants any.
            owner: the study; one study's failure is not another's.
            urgency: `STAT`, `COMPLETE` or `ARRIVING`.

        Returns:
            A future that holds the answer, or `TritonError`, `DecodeError`, `GeometryError` or `OSError`. A failure
            is forgotten at once, so that asking again tries again.

        Raises:
            ValueError: the gate did not let the package see the study, or it wants another number of slabs.
        """
        if not admission.promising:
            raise ValueError(f"study {owner} was not admitted: {admission.reason}")
        if len(slabs) != 2 * package.preprocessing.neighbours + 1:
            raise ValueError(f"{package.name} sees {2 * package.preprocessing.neighbours + 1} slabs, not {len(slabs)}")
        key = (package.name, package.files["model.onnx"], tuple(slab.key for slab in slabs))
        with self._lock:
            if self._closed:
                raise Closed("the engine is stopping", "inference", "it goes on at the next start")
            job = self._known.get(key)
            if job is None:
                job = self._known[key] = _Job(key, package, owner, tuple(slabs), urgency)
                self._forget()
            else:
                self._known.move_to_end(key)
                if job.taken or job.future.done() or urgency >= job.urgency:
                    if job.taken and urgency < job.urgency:
                        job.urgency = urgency
                        self._promote(job)
                    return job.future
                job.urgency = urgency
            heapq.heappush(self._waiting, (urgency, next(self._order), job))
            self._lock.notify_all()
            return job.future

    def prepare(self, files: Sequence[tuple[Path, str]], *, urgency: int) -> None:
        """Decode files of one frame whose slab is not there yet, where decoding takes long.

        What is not asked for soon is forgotten, beyond `PREPARED` files the oldest first.
        """
        with self._lock:
            for path, digest in files:
                one = self._slices[digest] = _Slice(path, digest)
                heapq.heappush(self._waiting, (urgency, next(self._order), one))
            while len(self._slices) > PREPARED:
                self._slices.popitem(last=False)[1].taken = True
            self._lock.notify_all()

    def urge(self, owner: int) -> None:
        """What is asked for of a study goes first from now on."""
        with self._lock:
            for job in self._known.values():
                if job.owner != owner or job.future.done() or job.urgency == STAT:
                    continue
                job.urgency = STAT
                if job.taken:
                    self._promote(job)
                else:
                    heapq.heappush(self._waiting, (STAT, next(self._order), job))
            self._lock.notify_all()

    def longest_seconds(self) -> float:
        """How long the decoder that has been at one slab for the longest time is at it; 0 if none is at any."""
        begun = list(self._begun.values())
        return time.monotonic() - min(begun) if begun else 0.0

    def _promote(self, job: _Job) -> None:
        for place, (_, number, one) in enumerate(self._ready):
            if one is job:
                self._ready[place] = (job.urgency, number, job)
                heapq.heapify(self._ready)

    def _forget(self) -> None:
        for key in list(itertools.islice(self._known, max(0, len(self._known) - REMEMBERED))):
            if self._known[key].future.done():
                del self._known[key]

    # --- decoding ---------------------------------------------------------------------------------------

    def _decoder(self) -> None:
        mine = threading.current_thread().name
        while (job := self._next_job()) is not None:
            self._begun[mine] = time.monotonic()
            try:
                if isinstance(job, _Slice):
                    job.future.set_result(self._decode([(job.path, job.digest)])[0])
                    continue
                job.seen = self._see(job)
            except Exception as error:
                if isinstance(job, _Slice):
                    job.future.set_exception(error)
                else:
                    self._fail(job, error)
                continue
            finally:
                del self._begun[mine]
            with self._lock:
                # However much is asked for, no more than two batches of a package lie ready, and a decoder holds one
                # slab more.
                limit = 2 * job.package.model.maximum_batch
                self._lock.wait_for(lambda: self._closed or self._ready_of(job.package) < limit)  # noqa: B023
                if not job.future.done():
                    heapq.heappush(self._ready, (job.urgency, next(self._order), job))
                    self._lock.notify_all()

    def _ready_of(self, package: Package) -> int:
        return sum(job.package is package for _, _, job in self._ready)

    def _next_job(self) -> _Job | _Slice | None:
        with self._lock:
            while True:
                self._lock.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    return None
                job = heapq.heappop(self._waiting)[2]
                if not job.taken and not job.future.done():
                    job.taken = True
                    return job

    def _see(self, job: _Job) -> tuple[_Seen, ...]:
        """The pixels of a job's slabs; those that other jobs want too are made once, while they are remembered."""
        preprocessing, where = job.package.preprocessing, f"study {job.owner}"
        if not preprocessing.neighbours:
            return tuple(self._look_at(preprocessing, slab, where) for slab in job.slabs)
        keys = [(preprocessing, slab.key) for slab in job.slabs]
        mine: dict[int, Future[_Seen]] = {}
        with self._lock:
            for place, key in enumerate(keys):
                if key not in self._seen:
                    mine[place] = self._seen[key] = Future()
                self._seen.move_to_end(key)
            wanted = [self._seen[key] for key in keys]
            while len(self._seen) > SEEN:
                self._seen.popitem(last=False)
        # Its own before it waits for another decoder's: so no two wait for one another, and all have something to do.
        for place, future in mine.items():
            try:
                future.set_result(self._look_at(preprocessing, job.slabs[place], where))
            except Exception as error:
                with self._lock:
                    if self._seen.get(keys[place]) is future:
                        del self._seen[keys[place]]
                future.set_exception(error)
        return tuple(future.result() for future in wanted)

    def _look_at(self, preprocessing: Preprocessing, slab: Slab, where: str) -> _Seen:
        decoded = self._decoded(slab.frames)
        planes = []
        for frame, one in zip(slab.frames, decoded, strict=True):
            if frame.number >= len(one.hu):
                raise DecodeError(
                    f"the header speaks of frame {frame.number + 1}, the pixel data holds {len(one.hu)}",
                    str(frame.path),
                    "send the instance again",
                )
            planes.append(one.hu[frame.number])
        hu = slab_hu(planes, where)
        channels = self._prepare(
            hu,
            slab.spacing_mm,
            windows=[(window.center, window.width) for window in preprocessing.windows],
            size=preprocessing.size,
            pixel_mm=preprocessing.spacing_mm,
        )
        return _Seen(
            channels,
            brain_area_mm2(hu, slab.spacing_mm, preprocessing.size * preprocessing.spacing_mm),
            (hu.shape[0], hu.shape[1]),
            tuple(sorted({one.codec for one in decoded})),
            tuple(look_at(plane, slab.spacing_mm) for plane in planes),
        )

    def _decoded(self, frames: Sequence[Frame]) -> Sequence[Decoded]:
        """The file of each frame; one of several frames is decoded once for all slabs that want some of it."""
        if any(frame.frames != 1 for frame in frames):
            return [self._whole_file(frame) for frame in frames]
        begun: dict[str, _Slice] = {}
        with self._lock:
            for frame in frames:
                one = self._slices.pop(frame.digest, None)
                if one is not None and one.taken:
                    begun[frame.digest] = one
                elif one is not None:
                    one.taken = True  # nobody needs to any more
        rest = [(frame.path, frame.digest) for frame in frames if frame.digest not in begun]
        decoded = dict(zip((digest for _, digest in rest), self._decode(rest), strict=True)) if rest else {}
        return [
            begun[frame.digest].future.result() if frame.digest in begun else decoded[frame.digest] for frame in frames
        ]

    def _whole_file(self, frame: Frame) -> Decoded:
        with self._lock:
            lock = self._whole_locks.setdefault(frame.digest, threading.Lock())
        with lock:
            with self._lock:
                known = self._whole.get(frame.digest)
            if known is None:
                (known,) = self._decode([(frame.path, frame.digest)])
            with self._lock:
                self._whole[frame.digest] = known
                self._whole.move_to_end(frame.digest)
                while len(self._whole) > WHOLE_FILES:
                    self._whole.popitem(last=False)
                if len(self._whole_locks) > 64:
                    self._whole_locks = {digest: self._whole_locks[digest] for digest in self._whole}
        return known

    # --- the model --------------------------------------------------------------------------------------

    def _sender(self) -> None:
        doubtful = False
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._closed or self._ready)
                if self._closed:
                    return
                batch = self._next_batch()
                self._lock.notify_all()
            try:
                if doubtful:
                    # It may be starting again after what the batch before did to it.
                    self._client.wait_ready(RECOVERY_SECONDS, [batch[0].package])
                doubtful = False
                self._run(batch)
            except Exception as error:
                doubtful = True
                self._run_apart(batch, error)

    def _next_batch(self) -> list[_Job]:
        """The most urgent slab, and as many of the same package as go with it, the most urgent first."""
        ordered = sorted(self._ready)
        package = ordered[0][2].package
        batch = [entry for entry in ordered if entry[2].package is package][: package.model.maximum_batch]
        self._ready = [entry for entry in ordered if entry not in batch]  # sorted is a heap
        return [job for _, _, job in batch]

    def _run(self, batch: Sequence[_Job]) -> None:
        with self._lock:
            # Whoever was failed meanwhile has no pixels any more; the others must not get one another's answers.
            there = [(job, job.seen) for job in batch if job.seen and not job.future.done()]
        if not there:
            return
        urgent = any(job.urgency == STAT for job, _ in there)
        package = batch[0].package
        slabs = [[one.channels for one in seen] for _, seen in there]
        output = self._client.infer(package, slabs, urgent=urgent)
        for (job, seen), probabilities, lesion_map in zip(there, output.probabilities, output.lesion_map, strict=True):
            own = seen[len(seen) // 2]
            answer = SlabAnswer(probabilities, lesion_map, own.brain_mm2, own.shape, own.codecs, own.looks)
            with self._lock:
                job.seen = ()
                if not job.future.done():
                    job.future.set_result(answer)

    def _run_apart(self, batch: Sequence[_Job], error: Exception) -> None:
        """After a failure, each study by itself: what harms the server must cost no other study a try."""
        owners, package = list(dict.fromkeys(job.owner for job in batch)), batch[0].package
        if len(owners) == 1:
            self._fail_study(owners[0], package, error)
            return
        for place, owner in enumerate(owners):
            try:
                self._client.wait_ready(RECOVERY_SECONDS, [package])
            except Exception as gone:
                for left in owners[place:]:
                    self._fail_study(left, package, gone)
                return
            try:
                self._run([job for job in batch if job.owner == owner])
            except Exception as own:
                self._fail_study(owner, package, own)

    def _fail_study(self, owner: int, package: Package, error: Exception) -> None:
        """Whoever asked gives the study up for now: its other slabs must not harm the server as well.

        Those of another package are of another model, which may be well.
        """

        def gives_up(job: _Job) -> bool:
            return job.owner == owner and job.package.name == package.name

        with self._lock:
            left = [job for job in self._known.values() if gives_up(job) and not job.future.done()]
            self._ready = [entry for entry in self._ready if not gives_up(entry[2])]
            heapq.heapify(self._ready)
            self._lock.notify_all()
        for job in left:
            self._fail(job, error)

    def _fail(self, job: _Job, error: Exception) -> None:
        with self._lock:
            job.seen = ()
            if self._known.get(job.key) is job:
                del self._known[job.key]
            if not job.future.done():
                job.future.set_exception(error)


def ask_for(
    pipeline: Pipeline,
    package: Package,
    admission: Admission,
    volume: Volume,
    slabs: Sequence[Context],
    files: Mapping[str, tuple[Path, str, int]],
    *,
    owner: int,
    urgency: int,
) -> list[Future[SlabAnswer]]:
    """Ask for slabs of a volume, given by their planes.

    Args:
        slabs: each between its neighbours, as `in_context` gives them.
        files: SOP Instance UID → Part 10 file, the SHA-256 that it must have, and its number of frames.
    """

    def slab(members: Sequence[int]) -> Slab:
        planes = [volume.planes[member] for member in members]
        frames = [Frame(path, digest, plane.frame, count) for plane in planes
                  for path, digest, count in (files[plane.sop_instance_uid],)]  # fmt: skip
        return Slab(tuple(frames), planes[len(planes) // 2].geometry.spacing)

    return [
        pipeline.ask(package, admission, [slab(members) for members in context], owner=owner, urgency=urgency)
        for context in slabs
    ]


def read_volume(
    pipeline: Pipeline,
    package: Package,
    admission: Admission,
    volume: Volume,
    files: Mapping[str, tuple[Path, str, int]],
    *,
    owner: int,
    urgency: int = COMPLETE,
) -> Reading:
    """Put a whole volume through a package's model; what was foreseen right is known already.

    Args:
        files: as for `ask_for`.

    Raises:
        TritonError: the model gave no answer that can be used.
        GeometryError: the planes differ in size.
        DecodeError: a frame that cannot be trusted, or a file that is no longer what was received.
        ImplausibleImage: what was decoded without an error can be no CT.
    """
    plans = plan_slabs(volume, package.preprocessing.slab_mm)
    slabs = in_context(volume, [plan.members for plan in plans], package.preprocessing.neighbours, whole=True)
    asked = ask_for(pipeline, package, admission, volume, slabs, files, owner=owner, urgency=urgency)
    reading = Reading(plans, tuple(future.result() for future in asked))
    looks = {
        member: look
        for plan, answer in zip(plans, reading.answers, strict=True)
        for member, look in zip(plan.members, answer.looks, strict=True)
    }
    check_plausible(volume, [looks[member] for member in range(len(volume.planes))])
    if len({answer.shape for answer in reading.answers}) > 1:
        raise GeometryError("its slabs have different sizes", f"study {owner}", "analyse them as separate series")
    return reading


def verdict_on(
    package: Package,
    volume: Volume,
    reading: Reading,
    *,
    study_uid: str,
    series_uid: str,
    limitations: Sequence[str] = (),
) -> Verdict:
    """The verdict that a reading of a volume gives.

    Args:
        limitations: sentences that it carries.
    """
    answers = reading.answers
    return aggregate(
        package,
        volume,
        reading.plans,
        Output(np.stack([a.probabilities for a in answers]), np.stack([a.lesion_map for a in answers])),
        study_uid=study_uid,
        series_uid=series_uid,
        shape=answers[0].shape,
        codecs=sorted({codec for answer in answers for codec in answer.codecs}),
        limitations=limitations,
    )
