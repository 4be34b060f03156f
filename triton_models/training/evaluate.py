"""Measure a model package on simulated studies that it never saw, and write its model card.

    python -m triton_models.training.evaluate --out docs/model

Every study is simulated and written as CT Image Storage first, which takes most of the time and needs no package
(``--only simulate``); some 17 GB of them stay in the work folder for the next package. Then each is read as the
appliance reads one: headers, choice of the series, the gate, decoder, slabs, a real Triton server that serves the
package, and the verdict. Each outcome is a line of a file in the work folder: a run that was cut short goes on from
there. Another simulator begins anew; another package has the same studies read again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from appliance import inference
from appliance.bench.model import serving
from appliance.governance.indication import BoardException, admit, admit_pixels
from appliance.governance.package import ANY, Package, load
from appliance.governance.signature import read_keyring
from appliance.inference.preprocess import to_field
from appliance.inference.slabs import plan_slabs, slab_hu
from appliance.inference.stream import Pipeline, read_volume, verdict_on
from appliance.inference.triton import TritonClient, TritonError
from appliance.ledger.records import Verdict
from appliance.settings import Settings
from appliance.study.grouping import group
from appliance.study.selection import select
from dicom_io.errors import ScansideError
from dicom_io.header import read_header
from dicom_io.plausible import ImplausibleImage

from . import card, measures
from .haemorrhage import SUBTYPES
from .lookalikes import KINDS
from .measures import Outcome
from .phantom import Family, Phantom, simulate, study, write_study
from .progress import Bar, say
from .samples import KERNELS_READ, REFUSED_KINDS, cut
from .scanner import Scan
from .vendors import names

FIRST_SEED = {"unseen": 53_000_000, "training": 60_000_000, "look-alike": 70_000_000}
"""Of each family, and of studies for one look-alike; training and calibration draw theirs far below. Once the figures
of one network have been used to make a better one, the unseen studies are seen: they begin with another number then."""
SIZE = 512
TRIES = 5
"""A long run outlives a server or a process that dies under it, as the server's Python backend now and then does."""
SHOWN = 5
"""Pictures in each row of the card."""
_NO_MATTER = {"calibrate", "card", "charts", "evaluate", "export", "inherit", "measures", "network", "progress",
              "quantise", "samples", "train"}  # fmt: skip
"""Modules beside this one that have no part in an outcome: the network is in the package, the rest is the simulator."""


@dataclass(frozen=True, slots=True)
class Read:
    """What the appliance made of the files of one study.

    Attributes:
        refused: the gate's reason, or "".
        verdict: None where it was refused.
        members: of each of the verdict's slabs the files (by their place in the list) that it is averaged from.
        spacing_mm: between rows, between columns.
    """

    refused: str
    verdict: Verdict | None = None
    members: tuple[tuple[int, ...], ...] = ()
    spacing_mm: tuple[float, float] = (1.0, 1.0)


class Reader:
    """One process's way from files to a verdict.

    Args:
        url: of a server that serves the package.
    """

    def __init__(self, package: Package, url: str) -> None:
        self.package = package
        self._client = TritonClient(url, timeout=120)
        self._pipeline = Pipeline(self._client, workers=1)
        self._count = 0

    def close(self) -> None:
        """Disconnect."""
        self._pipeline.close()
        self._client.close()

    def read(self, paths: Sequence[Path], *, excused: Sequence[str] = ()) -> Read:
        """Read a study.

        Args:
            paths: its files.
            excused: criteria of the gate that may be unknown.

        Raises:
            ScansideError: the server gives no answer, or a file cannot be read.
        """
        package = self.package
        self._count += 1
        headers = [read_header(path) for path in paths]
        selection = select(group(headers))
        if selection.series is None or selection.volume is None:
            return Read("; ".join(f"series: {one.reason}" for one in selection.considered))
        volume = selection.volume
        plans = plan_slabs(volume, package.preprocessing.slab_mm)
        today = date.today()
        exceptions = [BoardException(package.name, criterion, "evaluation", "nobody", today) for criterion in excused]
        admission = admit(package, selection.series.headers, volume, len(plans), exceptions, today)
        if not admission.admitted:
            return Read(admission.reason)
        files = {
            header.sop_instance_uid: (path, hashlib.sha256(path.read_bytes()).hexdigest(), header.number_of_frames)
            for header, path in zip(headers, paths, strict=True)
        }
        try:
            reading = read_volume(self._pipeline, package, admission, volume, files, owner=self._count)
        except ImplausibleImage as error:
            return Read(f"pixels: {error.what}")
        brain = reading.brain_ml
        admission = admit_pixels(package, admission, brain.seen, brain.unseen)
        if not admission.admitted:
            return Read(admission.reason)
        uids = (selection.series.first.study_instance_uid, selection.series.series_instance_uid)
        verdict = verdict_on(package, volume, reading, study_uid=uids[0], series_uid=uids[1])
        places = {header.sop_instance_uid: place for place, header in enumerate(headers)}
        members = tuple(
            tuple(places[volume.planes[member].sop_instance_uid] for member in plan.members) for plan in reading.plans
        )
        return Read("", verdict, members, volume.planes[0].geometry.spacing)


def drawn(family: str, seed: int) -> Phantom:
    """The study; arguments as of `evaluated`."""
    if family in KINDS:
        return simulate(seed, look_alikes=(family,), vendor=names(unseen=True)[0], size=SIZE)
    scanners: Family = "unseen" if family == "unseen" else "training"
    # A head stands once among those without blood and once among those with it.
    person, positive = seed - seed % 2, bool(seed % 2)
    return study(seed, person=person, positive=positive, family=scanners, size=SIZE, kernels=KERNELS_READ)


def prepared(studies: Path, family: str, seed: int) -> Path:
    """A study's folder: its files, and ``facts.json``, an `Outcome` that nobody has read yet. Made if it is not there.

    Args:
        studies: where all of them lie, those of one simulator.
        family: "unseen" or "training", where every odd seed bleeds, in the head of the even one before it; or a
            look-alike, which is then all there is.
        seed: of the phantom.
    """
    folder = studies / f"{family}-{seed}"
    if folder.exists():
        return folder
    began = time.perf_counter()
    phantom = drawn(family, seed)
    staged = studies / f"{folder.name}.part"
    if staged.exists():
        shutil.rmtree(staged)
    write_study(phantom, staged)
    facts = Outcome(
        seed=seed,
        family=family,
        volumes_ml={name: round(volume, 4) for name, volume in phantom.volume_ml.items()},
        blood_hu=_mean_hu(phantom) if phantom.bleeds else 0.0,
        signal_to_noise=_clearest(phantom) if phantom.volume_ml else 0.0,
        thickness_mm=phantom.thickness_mm,
        kernel=phantom.kernel,
        vendor=phantom.vendor,
        kvp=phantom.kvp,
        tilt_deg=phantom.tilt_deg,
        look_alikes=tuple(phantom.look_alikes),
        age=phantom.age,
        refused="",
        probability=0.0,
        called_ml=0.0,
        subtypes={},
        points_at_blood=False,
        seconds=round(time.perf_counter() - began, 2),
    )
    (staged / "facts.json").write_text(json.dumps(asdict(facts)), encoding="utf-8")
    staged.rename(folder)
    return folder


def evaluated(reader: Reader, studies: Path, family: str, seed: int) -> tuple[Outcome, NDArray[np.uint8], Read]:
    """Have the appliance's code read a study; arguments as of `prepared`.

    Returns:
        What came of it, the mask of its blood (slices, rows, columns), and the reading.
    """
    folder = prepared(studies, family, seed)
    began = time.perf_counter()
    facts = _outcome_of(json.loads((folder / "facts.json").read_text("utf-8")))
    read = reader.read(sorted(folder.glob("*.dcm")))
    with np.load(folder / "truth.npz") as truth:
        mask = truth["mask"]
    verdict = read.verdict
    outcome = replace(
        facts,
        refused=read.refused,
        probability=round(verdict.probability, 6) if verdict else 0.0,
        called_ml=round(verdict.volume_ml, 4) if verdict else 0.0,
        subtypes={name: round(one, 6) for name, one in verdict.subtypes.items()} if verdict else {},
        points_at_blood=verdict is not None and any(mask[list(read.members[slab])].any() for slab in verdict.key_slabs),
        seconds=round(facts.seconds + time.perf_counter() - began, 2),
    )
    return outcome, mask, read


def _mean_hu(phantom: Phantom) -> float:
    """Of all blood that counts."""
    return round(sum(b.hu * b.volume_ml for b in phantom.bleeds) / sum(b.volume_ml for b in phantom.bleeds), 1)


def _clearest(phantom: Phantom) -> float:
    """The signal to noise of the slab in which the blood stands out most."""
    scan = Scan(phantom.hu, phantom.mask, phantom.volume_ml, phantom.positions, phantom.orientation)
    best = 0.0
    for _, field, planes in cut(scan, phantom.spacing_mm, phantom.thickness_mm):
        share = (phantom.mask[planes] > 0).mean(axis=0, dtype=np.float32)
        if share.any():
            best = max(best, signal_to_noise(field, to_field(share, phantom.spacing_mm, fill=0.0)))
    return round(best, 2)


def signal_to_noise(field: NDArray[np.float32], share: NDArray[np.float32]) -> float:
    """How far blood stands out from what lies around it in a slab, in the sense of Rose (J Opt Soc Am 1948; 38:196):
    contrast times the root of the number of independent samples over their spread. Below 5, he found, nothing can be
    told from noise with certainty.

    The contrast is the median where blood covers at least two fifths of a pixel, bone left out, less that of the ring
    of brain and fluid 2 to 10 mm around; the spread, from the median absolute deviation of that ring, so that anatomy
    counts as noise. Four of the field's pixels are taken for one sample, as noise and edges reach over some two of
    them.

    Args:
        field: (256, 256) HU, pixels of 1 mm.
        share: (256, 256), how much of each pixel blood covers, 0..1.

    Returns:
        0 or more; 0 too where no pixel is covered so far, or nothing is around it.
    """
    inside = field[(share >= 0.4) & (field < 100)]
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (17, 17))
    edge = cv2.dilate((share > 0.02).astype(np.uint8), np.ones((5, 5), dtype=np.uint8))
    around = field[(cv2.dilate(edge, disc) > edge) & (field > 0) & (field < 80)]
    if not len(inside) or len(around) < 20:
        return 0.0
    level = float(np.median(around))
    spread = 1.4826 * float(np.median(np.abs(around - level)))
    contrast = float(np.median(inside)) - level
    return max(0.0, contrast * math.sqrt(float(share.sum()) / 4) / max(spread, 1.0))


def example(reader: Reader, studies: Path, family: str, seed: int) -> tuple[Outcome, NDArray[np.uint8]]:
    """A study again, and its picture: its first key slab, or where none is positive the one with the most blood."""
    outcome, mask, read = evaluated(reader, studies, family, seed)
    assert read.verdict is not None
    blood = [int((mask[list(members)] > 0).sum()) for members in read.members]
    slab = read.verdict.key_slabs[0] if read.verdict.key_slabs else int(np.argmax(blood))
    members = list(read.members[slab])
    hu = slab_hu(drawn(family, seed).hu[members], f"seed {seed}")
    truth = (mask[members] > 0).mean(axis=0) >= 0.5
    return outcome, card.tile(hu, truth, read.verdict.slabs[slab].outlines, read.spacing_mm)


def examples(outcomes: Sequence[Outcome], threshold: float) -> dict[str, list[int]]:
    """The seeds that the card shows, by a rule and not by choice.

    Hits: of each subtype, where it is most of the blood, that of the median volume among those found. Misses: the
    largest. False alarms: the most probable.
    """
    seen = [one for one in outcomes if not one.unjudged]
    hits = []
    for name in SUBTYPES:
        found = [one for one in seen if one.mostly == name and one.probability >= threshold]
        found.sort(key=lambda one: (one.volume_ml, one.seed))
        hits += [one.seed for one in found[len(found) // 2 : len(found) // 2 + 1]]
    missed = sorted((one for one in seen if one.bleeds and one.probability < threshold), key=lambda o: -o.volume_ml)
    alarms = sorted((one for one in seen if not one.bleeds and one.probability >= threshold),
                    key=lambda one: -one.probability)  # fmt: skip
    return {
        "hits": hits,
        "misses": [one.seed for one in missed[:SHOWN]],
        "false_alarms": [one.seed for one in alarms[:SHOWN]],
    }


def real_head(reader: Reader, folder: Path) -> dict[str, Any]:
    """What the package says of a real head without haemorrhage; the reason in ``skipped`` where there is none.

    The files were de-identified and give no age, so that the gate would refuse them: that one criterion is excused.
    """
    paths = sorted(folder.glob("*.dcm"))
    if not paths:
        return {"skipped": f"{folder.name}: the data is absent"}
    refused = reader.read(paths).refused
    read = reader.read(paths, excused=("age",))
    if read.verdict is None:
        return {"skipped": f"{folder.name}: the gate refuses it even if age is excused: {read.refused}"}
    return {
        "name": folder.name,
        "gate": refused,
        "positive": read.verdict.positive,
        "probability": round(read.verdict.probability, 4),
        "threshold": read.verdict.threshold,
        "slabs": [round(slab.probabilities[ANY], 4) for slab in read.verdict.slabs],
    }


def simulator() -> str:
    """Tells simulators apart: studies of another one are not those that the present code would make."""
    here = Path(__file__).parent
    return _digest(path for path in (*here.glob("*.py"), *here.glob("*.npz")) if path.stem not in _NO_MATTER)


def fingerprint(package: Package) -> str:
    """Tells apart what outcomes may stand together: by the package, and by the code that simulates and reads."""
    read = _digest([package.folder / "package.toml", *Path(inference.__file__).parent.glob("*.py")])
    return hashlib.sha256(f"{simulator()} {read}".encode()).hexdigest()[:16]


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


_reader: Reader | None = None
_studies = Path()


def _begin(studies: Path, package: Package | None, url: str) -> None:
    """In each process of the pool; without a package it only simulates."""
    global _reader, _studies
    cv2.setNumThreads(1)
    _studies = studies
    _reader = Reader(package, url) if package else None


def _prepare(family: str, seeds: Sequence[int]) -> None:
    for seed in seeds:
        prepared(_studies, family, seed)


def _outcome(family: str, seed: int) -> Outcome:
    assert _reader is not None
    return evaluated(_reader, _studies, family, seed)[0]


def _example(family: str, seed: int) -> tuple[Outcome, NDArray[np.uint8]]:
    assert _reader is not None
    return example(_reader, _studies, family, seed)


def _outcome_of(fields: dict[str, Any]) -> Outcome:
    return Outcome(**{**fields, "look_alikes": tuple(fields["look_alikes"])})


def stored(path: Path) -> list[Outcome]:
    """The outcomes that a file holds; a line that was cut short is left out."""
    found = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            fields = json.loads(line)
        except ValueError:
            continue
        found.append(_outcome_of(fields))
    return found


def more_alike(outcomes: Sequence[Outcome], least: int) -> dict[str, range]:
    """How many studies, and of which seeds, each look-alike lacks to stand in ``least`` studies without blood."""
    wanted = {}
    for place, kind in enumerate(KINDS):
        there = sum(kind in one.look_alikes and not one.bleeds and not one.unjudged for one in outcomes)
        if kind not in REFUSED_KINDS and there < least:
            first = FIRST_SEED["look-alike"] + 1000 * place
            wanted[kind] = range(first, first + least - there)
    return wanted


def simulate_all(pool: Executor, studies: Path, wanted: dict[str, range]) -> None:
    """Make the studies of the wanted seeds that are not there yet."""
    # The two studies of a head one after the other, in one process.
    pairs = [(family, these[n : n + 2]) for family, these in wanted.items() for n in range(0, len(these), 2)]
    missing = [(family, two) for family, two in pairs if not all((studies / f"{family}-{n}").exists() for n in two)]
    bar = Bar("simulating heads", len(pairs), len(pairs) - len(missing))
    futures = [pool.submit(_prepare, family, two) for family, two in missing]
    try:
        for done, future in enumerate(as_completed(futures), len(pairs) - len(missing) + 1):
            future.result()
            bar.show(done)
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def run(pool: Executor, path: Path, wanted: dict[str, range], what: str) -> list[Outcome]:
    """The outcomes of the wanted seeds of each family, from the file and, where it has none, from the pool."""
    known = {(one.family, one.seed): one for one in stored(path)}
    seeds = [(family, seed) for family, these in wanted.items() for seed in these]
    done = sum(key in known for key in seeds)
    bar = Bar(what, len(seeds), done)
    with path.open("a", encoding="utf-8") as file:
        if path.stat().st_size:
            file.write("\n")  # whatever a line before may have been cut in
        futures = [pool.submit(_outcome, *key) for key in seeds if key not in known]
        try:
            for future in as_completed(futures):
                one = future.result()
                known[one.family, one.seed] = one
                file.write(json.dumps(asdict(one)) + "\n")
                file.flush()
                done += 1
                bar.show(done)
        except BaseException:
            for future in futures:
                future.cancel()
            raise
    return [known[key] for key in seeds]


def versions(environment: Path) -> dict[str, str]:
    """Of Python and the libraries that the figures depend on, those of the server's environment too."""
    names = ("numpy", "scipy", "opencv-python-headless", "pydicom", "tritonclient")
    found = {"python": sys.version.split()[0], **{name: metadata.version(name) for name in names}}
    for name in ("nvidia-pytriton", "onnxruntime", "numpy"):
        site = next(environment.glob(f"lib/python*/site-packages/{name.replace('-', '_')}-*.dist-info"), None)
        found[f"server: {name}"] = site.name.removesuffix(".dist-info").rpartition("-")[2] if site else "?"
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, default=Path("triton_models/ich_reference"))
    parser.add_argument("--out", type=Path, default=Path("docs/model"), help="folder of the model card")
    parser.add_argument("--work", type=Path, default=Path("build/evaluate"), help="outcomes so far")
    parser.add_argument("--studies", type=int, default=640, help="of the unseen family; a twelfth as many of the other")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", choices=("simulate",), help="stop after that; it needs neither package nor server")
    parser.add_argument("--environment", type=Path, default=Path(".venv-triton"), help="Triton's")
    parser.add_argument("--real", type=Path, default=_data() / "ge_head_28", help="a real head without haemorrhage")
    arguments = parser.parse_args()
    if arguments.studies < 10:
        parser.error("--studies: at least 10")
    for left in reversed(range(TRIES)):
        try:
            return _evaluate(arguments)
        except (TritonError, BrokenProcessPool) as error:
            say(f"failed: {error}")
            if not left:
                sys.exit("failed too often; the same command goes on from there")
            say("going on from there")
        except ScansideError as error:
            sys.exit(f"failed: {error}")
    return None


def _evaluate(arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    # Inherited by the pool, whose processes start anew: two of them share two cores with the server.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    counts = {"unseen": arguments.studies, "training": arguments.studies // 24 * 2}
    wanted = {family: range(FIRST_SEED[family], FIRST_SEED[family] + n) for family, n in counts.items()}
    studies = arguments.work / f"studies-{simulator()}"
    studies.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
    with ProcessPoolExecutor(arguments.processes, context, initializer=_begin, initargs=(studies, None, "")) as pool:
        simulate_all(pool, studies, wanted)
    if arguments.only == "simulate":
        return
    keys = read_keyring(Settings().trusted_keys)
    package = load(arguments.package, trusted=keys, allow_unsigned=True)
    threshold = package.operating_point.threshold
    path = arguments.work / f"{package.name}-{fingerprint(package)}.jsonl"
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scanside-evaluate-")))
        url = stack.enter_context(serving(package, arguments.environment, home))
        pool = stack.enter_context(
            ProcessPoolExecutor(arguments.processes, context, initializer=_begin, initargs=(studies, package, url))
        )
        outcomes = run(pool, path, wanted, "studies")
        unseen = [one for one in outcomes if one.family == "unseen"]
        alike = run(pool, path, more_alike(unseen, max(2, arguments.studies // 50)), "look-alikes")
        pictures: dict[str, list[tuple[Outcome, NDArray[np.uint8]]]] = {}
        chosen = examples(unseen, threshold)
        say(f"making {sum(map(len, chosen.values()))} pictures")
        for name, seeds in chosen.items():
            pictures[name] = [made.result() for made in [pool.submit(_example, "unseen", seed) for seed in seeds]]
        reader = Reader(package, url)
        stack.callback(reader.close)
        real = {**real_head(reader, arguments.real), **_calibrated(package)}
    figures = {
        **measures.summary(unseen, threshold, alike),
        "training_family": measures.summary([one for one in outcomes if one.family == "training"], threshold),
        "real": real,
        "threshold": threshold,
        "stated": _stated(package),
        "package": {name: getattr(package, name) for name in ("name", "version", "title", "clearance", "notice")}
        | {"model_onnx": package.files["model.onnx"]},
        "seeds": {family: [these[0], these[-1]] for family, these in wanted.items()},
        "studies_by_family": {family: len(these) for family, these in wanted.items()},
        "studies_for_look_alikes": len(alike),
        "refused_because": _reasons(unseen),
        "versions": versions(arguments.environment),
        "command": f'make evaluate EVALUATE="--studies {arguments.studies}"',
        "cores": len(os.sched_getaffinity(0)),
        "seconds": round(sum(one.seconds for one in [*outcomes, *alike])),
        "seconds_of_this_run": round(time.monotonic() - began),
    }
    card.write(arguments.out, figures, outcomes, pictures)
    if "skipped" in real:
        say(f"skipped the real head: {real['skipped']}")
    say(f"wrote {arguments.out}")


def _calibrated(package: Package) -> dict[str, float]:
    """The threshold that the calibration studies alone would have set, where the package's training tells it."""
    path = package.folder / "metrics.json"
    told = json.loads(path.read_text("utf-8")).get("calibration", {}) if path.exists() else {}
    name = "threshold_of_these_studies"
    return {"threshold_of_calibration": told[name]} if name in told else {}


def _stated(package: Package) -> dict[str, Any]:
    """The package's operating point as its package.toml states it."""
    point = package.operating_point
    stated = {name: getattr(point, name) for name in ("threshold", "lesion_threshold", "sensitivity", "specificity",
                                                     "studies")}  # fmt: skip
    return {name: value for name, value in stated.items() if value is not None}


def _reasons(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How often the gate refused for which criterion."""
    counts: dict[str, int] = {}
    for one in outcomes:
        if one.refused:
            name = one.refused.split(":")[0]
            counts[name] = counts.get(name, 0) + 1
    return counts


def _data() -> Path:
    """The folder of data that lies beside the repository."""
    return Path(os.environ.get("SCANSIDE_TEST_DATA", Path("..") / "shared" / "data"))


if __name__ == "__main__":
    main()
