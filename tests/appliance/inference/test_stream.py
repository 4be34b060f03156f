"""Slabs through decoders and model, in any order, of any study; and a study through the model of a real server."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from appliance.governance.indication import Admission, Criterion
from appliance.governance.package import OperatingPoint, Package
from appliance.inference.preprocess import model_input
from appliance.inference.slabs import foreseen_slabs, in_context, plan_slabs
from appliance.inference.stream import (
    ARRIVING,
    COMPLETE,
    PREPARED,
    SEEN,
    STAT,
    Closed,
    Frame,
    Pipeline,
    Reading,
    Slab,
    SlabAnswer,
    ask_for,
    read_volume,
    verdict_on,
)
from appliance.inference.triton import Output, TritonClient, TritonError
from dicom_io.errors import DecodeError
from dicom_io.header import FramePlane, read_header
from dicom_io.pixels import Decoded, decode
from dicom_io.plausible import ImplausibleImage
from dicom_io.volume import Plane, Volume, assemble, planes_of

from .conftest import Server, seeing

Decoder = Callable[[Sequence[tuple[Path, str]]], list[Decoded]]
ADMITTED = Admission((Criterion("modality", "Modality", "CT", "CT", "met"),))
SPACING = (0.5, 0.5)


@dataclass
class Model:
    """Stands for the client of a server whose model says the mean of a slab's middle, in every label and map; of its
    channels, and so of its neighbours, each counts more than the one before.

    A slab at or above ``deadly`` is one that the server dies of, with whatever was in its batch.
    """

    deadly: float = 2.0
    batches: list[list[float]] = field(default_factory=list)
    urgent: list[bool] = field(default_factory=list)
    waiting: int = 0
    waited: int = 0
    pause: float = 0.0
    gate: threading.Event = field(default_factory=threading.Event)

    def infer(
        self, package: Package, parts: Sequence[Sequence[NDArray[np.float32]]], *, urgent: bool = False
    ) -> Output:
        slabs = np.stack([np.concatenate(one) for one in parts])
        self.waiting += 1
        assert self.gate.wait(30)
        time.sleep(self.pause)
        means = seen_by_model(slabs)
        self.batches.append([float(mean) for mean in means])
        self.urgent.append(urgent)
        if means.max() >= self.deadly:
            raise TritonError("the server died", "here", "none")
        return Output(np.repeat(means[:, None], 6, axis=1), np.broadcast_to(means[:, None, None], (len(means), 64, 64)))

    def wait_ready(self, timeout: float, packages: Sequence[Package]) -> None:
        self.waited += 1

    @property
    def slabs(self) -> int:
        return sum(map(len, self.batches))


def seen_by_model(slabs: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, channels, size, size) to (n,)."""
    middle = slabs[:, :, 127:129, 127:129].mean(axis=(2, 3))
    return np.average(middle, axis=1, weights=np.arange(1, 1 + middle.shape[1])).astype(np.float32)


@dataclass
class Files:
    """Stands for the spool: a file's name is the HU of its frames."""

    decoded: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)

    def decode(self, files: Sequence[tuple[Path, str]]) -> list[Decoded]:
        return [self._one(path) for path, _ in files]

    def _one(self, path: Path) -> Decoded:
        self.decoded.append(path.name)
        if path.name in self.broken:
            raise DecodeError("it is broken", str(path), "send it again")
        frames = [np.full((8, 8), float(value), np.float32) for value in path.name.split("_")]
        hu = np.stack(frames)
        # A corner that no other file has: no two images of a CT are the same.
        hu[:, 0, 0] += np.frombuffer(hashlib.sha256(path.name.encode()).digest()[:1], np.uint8) / 100 + len(frames)
        return Decoded(hu.astype(np.int16), hu, "made up")


@contextmanager
def pipeline(model: Model, files: Files, *, workers: int = 2, running: bool = True) -> Iterator[Pipeline]:
    if running:
        model.gate.set()
    made = Pipeline(cast(TritonClient, model), decode=files.decode, workers=workers)
    try:
        yield made
    finally:
        model.gate.set()
        made.close()


def frame(hu: float | str, number: int = 0, frames: int = 1) -> Frame:
    return Frame(Path(str(hu)), f"digest of {hu}", number, frames)


def ask(
    made: Pipeline, package: Package, *frames: Frame, owner: int = 1, urgency: int = COMPLETE
) -> Future[SlabAnswer]:
    return made.ask(package, ADMITTED, [Slab(frames, SPACING)], owner=owner, urgency=urgency)


@pytest.fixture
def alone(reference: Package) -> Package:
    """A package whose model sees a slab alone."""
    return seeing(reference, 0)


def test_a_slab_is_answered_once_however_often_it_is_asked_for(alone: Package) -> None:
    model, files = Model(), Files()
    with pipeline(model, files) as made:
        first = ask(made, alone, frame(40), frame(60), urgency=ARRIVING).result(10)
        assert ask(made, alone, frame(40), frame(60), urgency=STAT).result(10) is first
        assert ask(made, alone, frame(60), frame(40)).result(10) is not first
    assert sorted(files.decoded) == ["40", "40", "60", "60"]
    assert model.slabs == 2
    assert first.shape == (8, 8)
    assert first.codecs == ("made up",)


def test_a_slab_that_waits_is_answered_once_when_it_becomes_more_urgent(alone: Package) -> None:
    model, files = Model(), Files()
    with pipeline(model, files, workers=1, running=False) as made:
        futures = [ask(made, alone, frame(value), urgency=ARRIVING) for value in range(100)]
        for value in range(100):
            ask(made, alone, frame(value), urgency=COMPLETE)
        model.gate.set()
        for future in futures:
            future.result(30)
    assert model.slabs == len(files.decoded) == 100


def test_a_decoder_that_does_not_come_back_is_seen(alone: Package) -> None:
    model, files, back = Model(), Files(), threading.Event()
    decode = files.decode

    def hanging(these: Sequence[tuple[Path, str]]) -> list[Decoded]:
        if these[0][0].name == "13":
            assert back.wait(30)
        return decode(these)

    files.decode = hanging  # type: ignore[method-assign]
    with pipeline(model, files) as made:
        assert made.longest_seconds() == 0
        hung = ask(made, alone, frame(13))
        for value in (40, 60):
            ask(made, alone, frame(value)).result(10)
        before = made.longest_seconds()
        assert 0 < before < made.longest_seconds()
        back.set()
        hung.result(10)
        made.prepare([(Path("5"), "digest of 5")], urgency=ARRIVING)
        ask(made, alone, frame(5)).result(10)
        assert made.longest_seconds() == 0


def test_the_most_urgent_study_goes_first(alone: Package) -> None:
    model, files = Model(), Files()
    with pipeline(model, files, workers=1, running=False) as made:
        routine = [ask(made, alone, frame(value), urgency=ARRIVING) for value in range(200)]
        stat = [ask(made, alone, frame(value), owner=2, urgency=STAT) for value in range(1000, 1010)]
        model.gate.set()
        for future in stat:
            future.result(30)
        unanswered = sum(not future.done() for future in routine)
        for future in routine:
            future.result(30)
    # What a decoder and the server had in hand, and at most two batches that lay ready before.
    assert unanswered >= 200 - 4 * alone.model.maximum_batch
    assert any(model.urgent) and not all(model.urgent)


def test_what_lies_ready_goes_first_when_it_becomes_urgent(alone: Package) -> None:
    model, files = Model(), Files()
    with pipeline(model, files, workers=1, running=False) as made:
        first = ask(made, alone, frame(10), urgency=ARRIVING)
        while not model.waiting:
            time.sleep(0.01)
        ready = {value: ask(made, alone, frame(value), urgency=ARRIVING) for value in range(20, 50)}
        while len(files.decoded) < 31:
            time.sleep(0.01)
        time.sleep(0.2)
        urgent = ask(made, alone, frame(49), urgency=STAT)
        model.gate.set()
        for future in (first, *ready.values()):
            future.result(10)
    assert urgent is ready[49]
    sizes = [len(batch) for batch in model.batches]
    assert sizes == [1, alone.model.maximum_batch, 30 - alone.model.maximum_batch]
    assert model.urgent == [False, True, False]
    assert max(model.batches[1]) == max(max(batch) for batch in model.batches)


def test_a_study_that_is_urged_goes_first_with_all_that_it_asked_for(alone: Package) -> None:
    model, files = Model(), Files()
    with pipeline(model, files, workers=1, running=False) as made:
        first = ask(made, alone, frame(10), urgency=COMPLETE)
        while not model.waiting:
            time.sleep(0.01)
        others = [ask(made, alone, frame(value), urgency=COMPLETE) for value in range(100, 300)]
        hurried = [ask(made, alone, frame(value), owner=2, urgency=COMPLETE) for value in range(20, 40)]
        made.urge(2)
        made.urge(3)
        model.gate.set()
        for future in hurried:
            future.result(30)
        unanswered = sum(not future.done() for future in others)
        for future in (first, *others):
            future.result(30)
    assert unanswered >= 200 - 4 * alone.model.maximum_batch
    assert model.slabs == len(files.decoded) == 221, "none is done twice"


def test_another_spacing_or_another_model_is_another_answer(alone: Package) -> None:
    model, files = Model(), Files()
    other = replace(alone, files={**alone.files, "model.onnx": f"sha256:{0:064x}"})
    with pipeline(model, files) as made:
        for package, spacing in ((alone, (0.5, 0.5)), (alone, (1.0, 0.5)), (other, (0.5, 0.5))) * 2:
            made.ask(package, ADMITTED, [Slab((frame(40),), spacing)], owner=1, urgency=COMPLETE).result(10)
    assert model.slabs == 3


def test_however_much_is_asked_for_little_lies_ready(alone: Package) -> None:
    model, files = Model(), Files()
    with pipeline(model, files, workers=2, running=False) as made:
        futures = [ask(made, alone, frame(value)) for value in range(300)]
        bound = 3 * alone.model.maximum_batch + 2
        seen = 0
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not (len(files.decoded) == seen and seen):
            seen = len(files.decoded)
            time.sleep(0.3)
        assert seen <= bound
        model.gate.set()
        for future in futures:
            future.result(30)


def test_a_failure_is_told_and_forgotten(alone: Package) -> None:
    model, files = Model(), Files(broken={"40"})
    with pipeline(model, files) as made:
        with pytest.raises(DecodeError, match="broken"):
            ask(made, alone, frame(40)).result(10)
        files.broken.clear()
        assert ask(made, alone, frame(40)).result(10).shape == (8, 8)
        with pytest.raises(DecodeError, match="frame 3"):
            ask(made, alone, frame("1_2", 2, 2)).result(10)


def test_what_the_server_dies_of_costs_no_other_study_anything(alone: Package) -> None:
    model, files = Model(deadly=0.9), Files()
    with pipeline(model, files, running=False) as made:
        # 10,000 HU is white in every window; 40 HU is far from it.
        mine = [ask(made, alone, frame(value), owner=1) for value in range(30, 40)]
        deadly = ask(made, alone, frame(10_000), owner=2)
        others = [ask(made, alone, frame(value), owner=3) for value in range(40, 50)]
        time.sleep(1.5)  # until all are decoded, so that the deadly one shares a batch
        model.gate.set()
        with pytest.raises(TritonError, match="died"):
            deadly.result(10)
        assert all(future.result(10).shape == (8, 8) for future in (*mine, *others))
    assert model.waited >= 1, "a server that died needs time to come back"


def test_a_study_that_harms_the_server_gives_up_what_it_still_asks_for(alone: Package) -> None:
    model, files = Model(deadly=0.9), Files()
    with pipeline(model, files) as made:
        deadly = [ask(made, alone, frame(9_000 + value), owner=2) for value in range(100)]
        for future in deadly:
            with pytest.raises(TritonError, match="died"):
                future.result(10)
        harmed = len(model.batches)
        assert ask(made, alone, frame(40), owner=1).result(10).shape == (8, 8)
    # One batch was on its way; what a decoder had in hand may have made another.
    assert harmed <= 3
    assert model.waited == harmed, "after each failure the server is given time before the next batch"


def test_a_model_that_fails_fails_no_other_packages_slabs_of_the_study(alone: Package) -> None:
    class Half(Model):
        def infer(
            self, package: Package, parts: Sequence[Sequence[NDArray[np.float32]]], *, urgent: bool = False
        ) -> Output:
            output = super().infer(package, parts, urgent=urgent)
            if package.name == "broken":
                raise TritonError("this model fails", "here", "none")
            return output

    with pipeline(model := Half(), Files(), running=False) as made:
        failing = ask(made, replace(alone, name="broken"), frame(10))
        while not model.waiting:
            time.sleep(0.01)
        sound = ask(made, alone, frame(20))
        model.gate.set()
        assert isinstance(failing.exception(30), TritonError)
        assert sound.exception(30) is None


def test_a_package_is_not_held_up_by_what_lies_ready_for_another(alone: Package) -> None:
    """Its model takes one slab at a time; of the other's, two batches of 16 lie ready."""
    small = replace(alone, name="small", model=replace(alone.model, maximum_batch=1))
    model, files = Model(pause=0.1), Files()  # slower than the decoders, so that there is always something ready
    with pipeline(model, files, workers=2, running=False) as made:
        many = [ask(made, alone, frame(value), urgency=ARRIVING) for value in range(200)]
        while len(files.decoded) < 30:
            time.sleep(0.01)
        urgent = ask(made, small, frame(200), owner=2, urgency=STAT)
        model.gate.set()
        urgent.result(10)
        answered = sum(future.done() for future in many)
        for future in many:
            future.result(10)
    assert answered <= 3 * alone.model.maximum_batch, "it waited until nothing else lay ready"


def test_slices_that_were_prepared_are_decoded_once(alone: Package) -> None:
    model, files = Model(), Files()
    with pipeline(model, files) as made:
        plain = ask(made, alone, *(frame(value) for value in range(30, 36))).result(10)
        files.decoded.clear()
        made.prepare([(frame(value).path, frame(value).digest) for value in range(40, 45)], urgency=ARRIVING)
        while len(files.decoded) < 5:
            time.sleep(0.01)
        prepared = ask(made, alone, *(frame(value) for value in range(40, 46))).result(10)
        assert sorted(files.decoded) == [str(value) for value in range(40, 46)]
        made.prepare([(frame(value).path, frame(value).digest) for value in range(30, 34)], urgency=ARRIVING)
        again = ask(made, alone, *(frame(value) for value in range(30, 37)))
        assert again.result(10).probabilities[0] > plain.probabilities[0]
    assert prepared.probabilities[0] > plain.probabilities[0]


def test_a_slice_that_could_not_be_prepared_fails_its_slab_once(alone: Package) -> None:
    model, files = Model(), Files(broken={"41"})
    with pipeline(model, files) as made:
        made.prepare([(frame(41).path, frame(41).digest)], urgency=ARRIVING)
        while not files.decoded:
            time.sleep(0.01)
        with pytest.raises(DecodeError, match="broken"):
            ask(made, alone, frame(40), frame(41)).result(10)
        files.broken.clear()
        assert ask(made, alone, frame(40), frame(41)).result(10).shape == (8, 8)


def test_of_many_prepared_slices_the_oldest_are_forgotten(alone: Package) -> None:
    model, files = Model(), Files()
    with pipeline(model, files, workers=1) as made:
        many = [(frame(value).path, frame(value).digest) for value in range(3 * PREPARED)]
        made.prepare(many, urgency=ARRIVING)
        slabs = [ask(made, alone, frame(value)) for value in range(3 * PREPARED)]
        for slab in slabs:
            slab.result(30)
        assert len(made._slices) <= PREPARED
    assert set(files.decoded) == {str(value) for value in range(3 * PREPARED)}
    assert len(files.decoded) == 3 * PREPARED


def test_a_multi_frame_file_is_decoded_once(alone: Package) -> None:
    model, files = Model(), Files()
    name = "_".join(map(str, range(40)))
    with pipeline(model, files, workers=4) as made:
        futures = [ask(made, alone, frame(name, number, 40), frame(name, number + 1, 40)) for number in range(39)]
        answers = [future.result(30) for future in futures]
    assert files.decoded == [name]
    values = [float(answer.probabilities[0]) for answer in answers]
    assert values == sorted(values) and values[0] < values[-1]


def test_no_study_passes_that_the_gate_did_not_let_in(alone: Package) -> None:
    refused = Admission((Criterion("age", "PatientAge", "009Y", "18 years or older", "violated"),))
    growing = Admission((*ADMITTED.criteria, Criterion("slabs", "slabs", "3", "10 or more", "violated")))
    model, files = Model(), Files()
    with pipeline(model, files) as made:
        for no in (refused, Admission(())):
            with pytest.raises(ValueError, match="not admitted"):
                made.ask(alone, no, [Slab((frame(40),), SPACING)], owner=1, urgency=STAT)
        made.ask(alone, growing, [Slab((frame(40),), SPACING)], owner=1, urgency=ARRIVING).result(10)
    assert files.decoded == ["40"]


def test_who_waits_when_it_is_closed_is_told(alone: Package) -> None:
    model, files = Model(), Files()
    with pipeline(model, files, running=False) as made:
        futures = [ask(made, alone, frame(value)) for value in range(60)]
        threading.Timer(0.2, model.gate.set).start()
        made.close()
        assert sum(isinstance(future.exception(5), Closed) for future in futures) > 0
        with pytest.raises(Closed):
            ask(made, alone, frame(99))


# --- equal whatever the order of arrival --------------------------------------------------------------------


@st.composite
def arriving(draw: st.DrawFn) -> tuple[list[Plane], list[list[Plane]]]:
    """A head's planes, and the parts in which they arrive, in any order."""
    count = draw(st.integers(5, 80))
    step = draw(st.sampled_from([0.5, 0.625, 1.0, 1.25, 2.5, 5.0]))
    down = draw(st.booleans())
    planes = [
        Plane(
            f"1.2.{index}",
            0,
            FramePlane((0.0, 0.0, index * step), (1, 0, 0, 0, 1, 0), SPACING, step),
            count - index if down else index + 1,
        )
        for index in range(count)
    ]
    order = draw(st.sampled_from(["up", "down", "mixed"]))
    came = list(planes) if order == "up" else planes[::-1] if order == "down" else draw(st.permutations(planes))
    cuts = sorted(draw(st.sets(st.integers(1, count - 1), max_size=8)))
    return planes, [came[a:b] for a, b in zip([0, *cuts], [*cuts, count], strict=True)]


def files_of(planes: Sequence[Plane]) -> dict[str, tuple[Path, str, int]]:
    return {plane.sop_instance_uid: (Path(uid := plane.sop_instance_uid.rsplit(".")[-1]), uid, 1) for plane in planes}


def same(one: Reading, other: Reading) -> bool:
    return one.plans == other.plans and all(
        np.array_equal(a.probabilities, b.probabilities)
        and np.array_equal(a.lesion_map, b.lesion_map)
        and a.brain_mm2 == b.brain_mm2
        for a, b in zip(one.answers, other.answers, strict=True)
    )


def ahead(made: Pipeline, package: Package, here: Sequence[Plane]) -> list[Future[SlabAnswer]]:
    """Ask for what can be asked for while more is to come."""
    volume = assemble(here)
    slabs = foreseen_slabs(volume, package.preprocessing.slab_mm)
    contexts = in_context(volume, slabs, package.preprocessing.neighbours, whole=False)
    return ask_for(made, package, ADMITTED, volume, contexts, files_of(here), owner=1, urgency=ARRIVING)


@pytest.mark.slow
@pytest.mark.parametrize("neighbours", [0, 1])
@settings(deadline=None, max_examples=40)
@given(study=arriving())
def test_the_reading_is_the_same_whatever_the_order(
    reference: Package, neighbours: Literal[0, 1], study: tuple[list[Plane], list[list[Plane]]]
) -> None:
    planes, parts = study
    package = seeing(reference, neighbours)
    with pipeline(Model(), Files()) as made:
        whole = read_volume(made, package, ADMITTED, assemble(planes), files_of(planes), owner=1)
    with pipeline(Model(), Files()) as made:
        here: list[Plane] = []
        for part in parts:
            here += part
            ahead(made, package, here)
        streamed = read_volume(made, package, ADMITTED, assemble(here), files_of(here), owner=1)
    assert same(whole, streamed)


def head_of(count: int, missing: Sequence[int] = ()) -> list[Plane]:
    """Slices of 5 mm from the feet upwards, but for some."""
    return [
        Plane(f"1.2.{n}", 0, FramePlane((0.0, 0.0, 5.0 * n), (1, 0, 0, 0, 1, 0), SPACING, 5.0), n + 1)
        for n in range(count)
        if n not in missing
    ]


def test_a_slab_is_seen_between_its_neighbours(reference: Package) -> None:
    """At an end and beside a gap it stands in for the one that is not there; no slice is decoded more than once."""
    model, files = Model(), Files()
    planes = head_of(9, missing=[5])
    with pipeline(model, files) as made:
        reading = read_volume(made, seeing(reference, 1), ADMITTED, assemble(planes), files_of(planes), owner=1)
    alone = [model_input(files.decode([(Path(str(n)), "")])[0].hu[0], SPACING) for n in range(9)]
    seen = [(0, 0, 1), (0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 4), (6, 6, 7), (6, 7, 8), (7, 8, 8)]
    expected = seen_by_model(np.stack([np.concatenate([alone[n] for n in one]) for one in seen]))
    assert [answer.probabilities[0] for answer in reading.answers] == pytest.approx(expected, abs=1e-6)
    assert sorted(files.decoded[: len(planes)]) == sorted(str(plane.sop_instance_uid[4:]) for plane in planes)


def test_what_is_known_of_a_slab_but_for_the_models_answer_is_its_own(reference: Package) -> None:
    planes, decoded = head_of(4), made_up()
    volume, known = assemble(planes), []
    for package in (seeing(reference, 0), seeing(reference, 1)):
        model = Model()
        model.gate.set()
        made = Pipeline(cast(TritonClient, model), decode=decoded)
        try:
            reading = read_volume(made, package, ADMITTED, volume, files_of(planes), owner=1)
        finally:
            made.close()
        known.append([(one.brain_mm2, one.shape, one.codecs, one.looks) for one in reading.answers])
    assert known[0] == known[1]
    assert len({repr(one) for one in known[0]}) == len(planes)


def test_a_slab_waits_for_its_neighbours_but_its_slices_do_not(reference: Package) -> None:
    model, files = Model(), Files()
    package = seeing(reference, 1)
    with pipeline(model, files) as made:
        for future in ahead(made, package, head_of(6)):
            future.result(10)
        assert model.slabs == 5, "all but the last, which nobody knows to be the last"
        assert len(files.decoded) == 6
        whole = head_of(6)
        read_volume(made, package, ADMITTED, assemble(whole), files_of(whole), owner=1)
    assert model.slabs == 6
    assert len(files.decoded) == 6


def context(*slabs: float) -> list[Slab]:
    """A slab of one slice each."""
    return [Slab((frame(hu),), SPACING) for hu in slabs]


def test_a_decoder_makes_what_it_can_before_it_waits_for_another(reference: Package) -> None:
    model, files = Model(), Files()
    begun, beside = threading.Event(), threading.Event()

    def decode(many: Sequence[tuple[Path, str]]) -> list[Decoded]:
        if many[0][0].name == "40":
            begun.set()
            assert beside.wait(10), "nobody decoded the third slab meanwhile"
        if many[0][0].name == "42":
            beside.set()
        return files.decode(many)

    package = seeing(reference, 1)
    model.gate.set()
    made = Pipeline(cast(TritonClient, model), decode=decode, workers=2)
    try:
        first = made.ask(package, ADMITTED, context(40, 40, 41), owner=1, urgency=COMPLETE)
        assert begun.wait(10)
        second = made.ask(package, ADMITTED, context(40, 41, 42), owner=1, urgency=COMPLETE)
        assert first.result(10).probabilities[0] < second.result(10).probabilities[0]
    finally:
        made.close()
    assert sorted(files.decoded) == ["40", "41", "42"]


def test_what_is_wrong_with_a_neighbour_is_told_and_forgotten(reference: Package) -> None:
    model, files = Model(), Files(broken={"42"})
    package = seeing(reference, 1)
    with pipeline(model, files) as made:
        for _ in range(2):
            with pytest.raises(DecodeError, match="broken"):
                made.ask(package, ADMITTED, context(40, 41, 42), owner=1, urgency=COMPLETE).result(10)
        made.ask(package, ADMITTED, context(40, 40, 41), owner=1, urgency=COMPLETE).result(10)
        files.broken.clear()
        made.ask(package, ADMITTED, context(40, 41, 42), owner=1, urgency=COMPLETE).result(10)
    assert sorted(files.decoded) == ["40", "41", "42", "42", "42"]


def test_of_pixels_only_so_many_are_kept(reference: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    package, planes = seeing(reference, 1), head_of(40)
    readings = []
    for kept in (SEEN, 1):
        monkeypatch.setattr("appliance.inference.stream.SEEN", kept)
        with pipeline(Model(), Files()) as made:
            readings.append(read_volume(made, package, ADMITTED, assemble(planes), files_of(planes), owner=1))
            assert len(made._seen) <= kept
    assert same(*readings)


def test_a_slab_is_not_taken_without_the_neighbours_that_its_package_wants(reference: Package) -> None:
    with pipeline(Model(), Files()) as made, pytest.raises(ValueError, match="sees 3 slabs, not 1"):
        ask(made, seeing(reference, 1), frame(40))


def made_up(blank: int | None = None, twice: tuple[int, int] | None = None) -> Decoder:
    """Files of discs with noise, of which one is blank, or one the same as another."""

    def one(number: int) -> Decoded:
        number = twice[0] if twice and number == twice[1] else number
        rows, columns = np.mgrid[:64, :64] - 31.5
        hu = np.where(np.hypot(rows, columns) < 28, 40.0, -1000.0).astype(np.float32)[None]
        hu += np.random.default_rng(number).normal(0, 5, hu.shape).astype(np.float32)
        if number == blank:
            hu[:] = 0.0
        return Decoded(hu.astype(np.int16), hu, "made up")

    return lambda files: [one(int(path.name)) for path, _ in files]


@pytest.mark.parametrize(
    ("decoder", "said"),
    [(made_up(), ""), (made_up(blank=7), "the one value 0 HU"), (made_up(twice=(3, 17)), "the same pixels")],
)
def test_nothing_comes_of_images_that_cannot_be_a_ct(alone: Package, decoder: Decoder, said: str) -> None:
    """Also if the two that are the same went through the model in slabs of their own, long before the end."""
    planes = [
        Plane(f"1.2.{n}", 0, FramePlane((0.0, 0.0, float(n)), (1, 0, 0, 0, 1, 0), (3.0, 3.0), 1.0), n)
        for n in range(20)
    ]
    model = Model()
    model.gate.set()
    made = Pipeline(cast(TritonClient, model), decode=decoder)
    try:
        for count in (10, 20):
            for future in ahead(made, alone, planes[:count]):
                future.result(10)
        volume = assemble(planes)
        if said:
            with pytest.raises(ImplausibleImage, match=said):
                read_volume(made, alone, ADMITTED, volume, files_of(planes), owner=1)
        else:
            assert len(read_volume(made, alone, ADMITTED, volume, files_of(planes), owner=1).answers) == 4
    finally:
        made.close()


# --- a real server ------------------------------------------------------------------------------------------


def real(folder: Path) -> tuple[Volume, dict[str, tuple[Path, str, int]], Decoder]:
    headers = {path: read_header(path) for path in sorted(folder.glob("*.dcm"))}
    volume = assemble([plane for header in headers.values() for plane in planes_of(header)])
    files = {header.sop_instance_uid: (path, path.name, 1) for path, header in headers.items()}
    return volume, files, lambda many: [decode(path) for path, _ in many]


@pytest.mark.interop
def test_a_real_head_gets_the_same_verdict_in_any_order(
    triton_server: Server, reference: Package, ge_head: Path
) -> None:
    volume, files, decoder = real(ge_head)
    verdicts = []
    with TritonClient(triton_server.url) as client:
        for seed in (None, 1, 2):
            made = Pipeline(client, decode=decoder)
            if seed is not None:
                order = np.random.default_rng(seed).permutation(len(volume.planes))
                slabs = [plan.members for plan in plan_slabs(volume, reference.preprocessing.slab_mm)]
                contexts = in_context(volume, slabs, reference.preprocessing.neighbours, whole=True)
                for place in order:
                    (future,) = ask_for(
                        made, reference, ADMITTED, volume, [contexts[place]], files, owner=1, urgency=ARRIVING
                    )
                    future.result(30)
            reading = read_volume(made, reference, ADMITTED, volume, files, owner=1)
            verdicts.append(verdict_on(reference, volume, reading, study_uid="1.2.3", series_uid="1.2.3.4"))
            made.close()
    verdict = verdicts[0]
    assert verdicts == [verdict] * 3
    assert len(verdict.slabs) == 28
    assert verdict.codecs == (decode(next(iter(files.values()))[0]).codec,)
    assert verdict.limitations == ()
    assert [slab.sop_instance_uid for slab in verdict.slabs] == [plane.sop_instance_uid for plane in volume.planes]
    assert verdict.probability == max(slab.probabilities["any"] for slab in verdict.slabs)
    assert 1000 < reading.brain_ml.seen < 1700 and reading.brain_ml.unseen == 0


@pytest.mark.interop
def test_outlines_come_out_on_images_that_are_there(triton_server: Server, reference: Package) -> None:
    """Thin slices of a bright disc."""
    planes = [
        Plane(f"1.2.{n}", 0, FramePlane((0.0, 0.0, float(n)), (1, 0, 0, 0, 1, 0), (0.5, 0.5), 1.0), n)
        for n in range(100)
    ]
    rows, columns = np.mgrid[:512, :512] - 255.5
    disc = np.where(np.hypot(rows, columns) < 140, 60.0, -1000.0).astype(np.float32)[None]

    def drawn(files: Sequence[tuple[Path, str]]) -> list[Decoded]:
        noisy = [disc + np.random.default_rng(int(path.name)).normal(0, 0.01, disc.shape) for path, _ in files]
        return [Decoded(one.astype(np.int16), one.astype(np.float32), "none") for one in noisy]

    everything = replace(reference, operating_point=OperatingPoint(0.0, 0.0))
    volume = assemble(planes)
    with TritonClient(triton_server.url) as client:
        made = Pipeline(client, decode=drawn)
        reading = read_volume(made, everything, ADMITTED, volume, files_of(planes), owner=1)
        made.close()
    verdict = verdict_on(everything, volume, reading, study_uid="1", series_uid="2")
    assert len(verdict.slabs) == 20
    assert verdict.positive
    assert len(verdict.key_slabs) == 3
    assert verdict.volume_ml == pytest.approx(256 * 256 * 100 / 1000, rel=0.01)
    uids = {plane.sop_instance_uid for plane in planes}
    assert all(slab.sop_instance_uid in uids and len(slab.outlines) == 1 for slab in verdict.slabs)
