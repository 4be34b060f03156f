"""What the network learns from: the slabs of simulated studies on the model's field, with the truth on its map.

A head is drawn once and scanned several times, each time in another pose by another scanner, with other look-alikes and
other bleeds or none. All slabs of a scan are kept, so that each has its neighbours; what of them is looked at, and how
often, training decides.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from appliance.inference.preprocess import SIZE, to_field, window
from appliance.inference.slabs import SlabPlan, plan_slabs, slab_hu
from dicom_io.header import FramePlane
from dicom_io.volume import Plane, assemble

from . import anatomy, haemorrhage, lookalikes, scanner, vendors
from .anatomy import Head
from .haemorrhage import SUBTYPES
from .masses import NoRoom
from .progress import Bar

MAP_SIZE = 64
MAP_PIXEL_MM2 = (SIZE / MAP_SIZE) ** 2
SLAB_MM = 5.0
NEIGHBOURS = 1
CROP = (192, 160)
"""Rows and columns that training looks at, around the middle of the skull: the brain fits, and half of the field, air
and scalp, is saved."""


@dataclass(frozen=True, slots=True)
class Slabs:
    """The slabs of one scan, foot to head.

    Attributes:
        fields: (n, 256, 256) int16, HU on the model's field.
        covered: (n, 5, 64, 64) uint8, share of each map pixel that a subtype covers, times 255.
        thickness_mm: of each slab, as `SlabPlan` has it.
    """

    fields: NDArray[np.int16]
    covered: NDArray[np.uint8]
    thickness_mm: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Study:
    """A scan of a head, and what is in it.

    Attributes:
        scan: its slices.
        spacing_mm: between rows, between columns.
        thickness_mm: of a slice.
        look_alikes: names in `lookalikes.KINDS`.
    """

    scan: scanner.Scan
    spacing_mm: tuple[float, float]
    thickness_mm: float
    look_alikes: tuple[str, ...]


def cut(
    scan: scanner.Scan, spacing_mm: tuple[float, float], thickness_mm: float
) -> Iterator[tuple[SlabPlan, NDArray[np.float32], list[int]]]:
    """Slices cut into slabs exactly as the appliance does it, foot to head: what it plans, HU on the model's field
    (256, 256), and which slices it is averaged from."""
    volume = assemble(
        [
            Plane(f"2.25.{n + 1}", 0, FramePlane(position, scan.orientation, spacing_mm, thickness_mm), n + 1)
            for n, position in enumerate(scan.positions)
        ]
    )
    order = [(plane.instance_number or 0) - 1 for plane in volume.planes]
    for plan in plan_slabs(volume, SLAB_MM):
        planes = [order[member] for member in plan.members]
        yield plan, to_field(slab_hu((scan.hu[plane] for plane in planes), str(plan.index)), spacing_mm), planes


def slabs_of(study: Study) -> Slabs:
    """What training keeps of a study."""
    scan = study.scan
    fields, covered, thickness_mm = [], [], []
    for plan, field, planes in cut(scan, study.spacing_mm, study.thickness_mm):
        fields.append(np.rint(np.clip(field, -1024, 4000)).astype(np.int16))
        layers = np.zeros((len(SUBTYPES), MAP_SIZE, MAP_SIZE), dtype=np.uint8)
        mask = scan.mask[planes]
        for kind in np.unique(mask[mask > 0]):
            blood = (mask == kind).mean(axis=0, dtype=np.float32)
            layers[kind - 1] = np.rint(255 * shrink(to_field(blood, study.spacing_mm, fill=0.0)))
        covered.append(layers)
        thickness_mm.append(plan.thickness_mm)
    return Slabs(np.stack(fields), np.stack(covered), tuple(thickness_mm))


def shrink(field: NDArray[np.float32]) -> NDArray[np.float32]:
    """A quantity on the field to its mean in each pixel of the map."""
    return np.asarray(cv2.resize(field, (MAP_SIZE, MAP_SIZE), interpolation=cv2.INTER_AREA), dtype=np.float32)


def neighbours(index: int, count: int) -> list[int]:
    """The slabs that the network sees beside one of a run: at its ends, itself stands in for what is not there."""
    return [max(index - 1, 0), index, min(index + 1, count - 1)]


def network_input(fields: NDArray[Any]) -> NDArray[np.float32]:
    """Slabs between their neighbours as the network wants them.

    Args:
        fields: (..., 3, h, w) HU, foot to head.

    Returns:
        (..., 9, h, w) float32 in 0..1: the windows of the first slab, then the second's, then the third's.
    """
    channels = np.moveaxis(window(np.asarray(fields, dtype=np.float32)), 0, -3)
    return np.ascontiguousarray(channels.reshape(*fields.shape[:-3], -1, *fields.shape[-2:]))


def run_input(fields: NDArray[Any]) -> NDArray[np.float32]:
    """The input (n, 9, 256, 256) for each slab of a run of neighbours (n, 256, 256) HU, foot to head."""
    return network_input(np.stack([fields[neighbours(n, len(fields))] for n in range(len(fields))]))


@dataclass(frozen=True, slots=True)
class Kind:
    """One use of simulated heads; each draws from seeds of its own.

    Attributes:
        name: of its folder.
        first_seed: of its heads; they count on from it.
        stories: what each scan of a head shows: "clean", a bleed as studies have it ("bleeds"), or one lesion or two
            of any subtype and mostly small ("lesion"), which would be rare otherwise.
        misleading: whether there are more look-alikes than a hospital sees.
        read: whether only what the appliance would read is drawn: no contrast, and no series of a sharp kernel.
    """

    name: str
    first_seed: int
    stories: tuple[str, ...]
    misleading: bool
    read: bool


TRAIN = Kind("train", 10_000_000, ("clean", "bleeds", "bleeds", "lesion"), misleading=True, read=False)
CALIBRATION = Kind("calibration", 20_000_000, ("clean", "bleeds"), misleading=False, read=True)
KINDS = {kind.name: kind for kind in (TRAIN, CALIBRATION)}
KERNELS_READ = ("soft", "standard", "iterative")
"""A series of another kernel is none that the appliance chooses."""
REFUSED_KINDS = ("contrast",)
"""The gate refuses a study that says so."""
_RARE = ("tumour", "tumour", "dense sinus", "dense artery", "basal ganglia", "calcified falx", "fresh infarct",
         "old infarct", "drain", "clip", "coil", "craniotomy")  # fmt: skip
"""What misleads and is rare: one of them is added to most clean heads that are trained on."""
_THICKNESSES_MM = (0.6, 1.25, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0)
_HOW_OFTEN = (0.01, 0.03, 0.08, 0.08, 0.12, 0.5, 0.1, 0.08)
"""Thin slices cost the most and end as the same slabs: fewer of them than a hospital has."""


def _draw(kind: Kind, seed: int) -> Iterator[Study]:
    """The scans of one head."""
    rng = np.random.default_rng([seed, 0])
    plain = anatomy.draw(rng, int(rng.integers(20, 95)), str(rng.choice(("F", "M"))))
    for number, story in enumerate(kind.stories):
        yield _story(np.random.default_rng([seed, 1, number]), deepcopy(plain), story, kind)


def _story(rng: np.random.Generator, head: Head, story: str, use: Kind) -> Study:
    """What happens to a head, in place, and what a scanner sees of it."""
    wanted = set(lookalikes.draw_kinds(rng, head.age))
    if use.misleading and story == "clean":
        wanted.update(lookalikes.draw_kinds(rng, head.age))
    if use.misleading and rng.random() < (0.8 if story == "clean" else 0.3):
        wanted.add(_RARE[int(rng.integers(len(_RARE)))])
    if use.read:
        wanted -= set(REFUSED_KINDS)
    kinds = []
    for kind in sorted(wanted, key=lookalikes.KINDS.index):
        try:
            lookalikes.add(rng, head, kind)
            kinds.append(kind)
        except ValueError:  # this head has no place for it
            continue
    truth = np.zeros(head.hu.shape, dtype=np.uint8)
    if story == "bleeds":
        haemorrhage.draw_study(rng, head, truth)
    elif story == "lesion":
        for _ in range(int(rng.integers(1, 3))):
            with suppress(NoRoom):
                haemorrhage.bleed(rng, head, truth, SUBTYPES[int(rng.integers(len(SUBTYPES)))])
    vendor = str(rng.choice(vendors.names(unseen=False)))
    habits = vendors.VENDORS[vendor]
    protocol = scanner.draw(
        rng,
        kernels=tuple(name for name in habits.kernels if not use.read or name in KERNELS_READ),
        vendor=vendor,
        thickness_mm=float(rng.choice(_THICKNESSES_MM, p=_HOW_OFTEN)),
        size=SIZE,
        padded=habits.padding is not None,
    )
    made = scanner.scan(rng, head, truth, protocol)
    return Study(made, (protocol.pixel_mm, protocol.pixel_mm), protocol.thickness_mm, tuple(kinds))


def make_head(job: tuple[Path, Kind, int, int]) -> int:
    """Simulate the scans of one head and leave their slabs in the folder; returns the head's number.

    ``head-N.json`` is written last: a head without it is made again.
    """
    folder, kind, seed, number = job
    cv2.setNumThreads(1)
    scans, parts = [], []
    first = 0
    for study in _draw(kind, kind.first_seed + seed * 100_000 + number):
        slabs = slabs_of(study)
        parts.append(slabs)
        scans.append(
            {
                "first": first,
                "count": len(slabs.fields),
                "thickness_mm": slabs.thickness_mm,
                "slice_mm": study.thickness_mm,
                "volume_ml": study.scan.volume_ml,
                "look_alikes": list(study.look_alikes),
            }
        )
        first += len(slabs.fields)
    covered = np.concatenate([slabs.covered for slabs in parts])
    areas = covered.sum(axis=(2, 3), dtype=np.int64) * (MAP_PIXEL_MM2 / 255)
    _save(folder / f"fields-{number:05d}.npy", np.concatenate([slabs.fields for slabs in parts]))
    _save(folder / f"covered-{number:05d}.npy", covered)
    staged = folder / f"head-{number:05d}.part"
    staged.write_text(json.dumps({"scans": scans, "areas_mm2": np.round(areas, 2).tolist()}), encoding="utf-8")
    staged.replace(folder / f"head-{number:05d}.json")
    return number


def _save(path: Path, array: NDArray[Any]) -> None:
    staged = path.with_suffix(".part")
    with staged.open("wb") as file:
        np.save(file, array)
    staged.replace(path)


@dataclass(frozen=True, slots=True)
class Heads:
    """The first heads of one folder.

    Attributes:
        kind: what they were drawn for.
        seed: of the folder.
        count: how many.
    """

    kind: Kind
    seed: int
    count: int

    @staticmethod
    def parse(text: str) -> Heads:
        """From ``calibration-3:240``.

        Raises:
            ValueError: it is not of that form, or no such kind.
        """
        name, _, rest = text.partition("-")
        seed, _, count = rest.partition(":")
        if name not in KINDS or not (seed.isdecimal() and count.isdecimal()):
            raise ValueError(f"{text!r} is not KIND-SEED:COUNT with one of {', '.join(KINDS)}")
        return Heads(KINDS[name], int(seed), int(count))

    def __str__(self) -> str:
        return f"{self.kind.name}-{self.seed}:{self.count}"


def make(work: Path, heads: Heads, *, processes: int = 2) -> None:
    """Simulate the heads that are not in the work folder yet, on so many processes; each follows from its seed."""
    kind, seed, count = heads.kind, heads.seed, heads.count
    folder = work / f"{kind.name}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    missing = [n for n in range(count) if not (folder / f"head-{n:05d}.json").exists()]
    if not missing:
        return
    bar = Bar(f"simulating heads ({kind.name})", count, count - len(missing))
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=100) as pool:
        jobs = [(folder, kind, seed, number) for number in missing]
        for done, _ in enumerate(pool.imap_unordered(make_head, jobs), count - len(missing) + 1):
            bar.show(done)


class Store:
    """The slabs of simulated heads, mapped into memory; slabs are counted through.

    Attributes:
        areas_mm2: (slabs, 5) float32 of blood, by subtype.
        scans: (first slab, one past the last, what the head's file says of the scan).
    """

    def __init__(self, work: Path, groups: Sequence[Heads]) -> None:
        self._fields: list[NDArray[np.int16]] = []
        self._covered: list[NDArray[np.uint8]] = []
        self.scans: list[tuple[int, int, dict[str, Any]]] = []
        areas, place = [], []
        total = 0
        files = [
            (work / f"{heads.kind.name}-{heads.seed}", number) for heads in groups for number in range(heads.count)
        ]
        for head, (folder, number) in enumerate(files):
            told = json.loads((folder / f"head-{number:05d}.json").read_text(encoding="utf-8"))
            self._fields.append(np.load(folder / f"fields-{number:05d}.npy", mmap_mode="r"))
            self._covered.append(np.load(folder / f"covered-{number:05d}.npy", mmap_mode="r"))
            areas.append(np.asarray(told["areas_mm2"], dtype=np.float32).reshape(-1, len(SUBTYPES)))
            for scan in told["scans"]:
                place += [(head, scan["first"], scan["count"], n) for n in range(scan["count"])]
                self.scans.append((total, total + scan["count"], scan))
                total += scan["count"]
        self._place = np.asarray(place)
        self.areas_mm2 = np.concatenate(areas)

    def __len__(self) -> int:
        return len(self._place)

    def sample(self, slab: int) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
        """A slab between its neighbours (3, 256, 256) in HU, and its truth (5, 64, 64) times 255."""
        head, first, count, n = (int(value) for value in self._place[slab])
        fields = self._fields[head]
        return np.stack([fields[first + m] for m in neighbours(n, count)]), self._covered[head][first + n]

    def run(self, first: int, end: int) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
        """The slabs of one scan, (n, 256, 256) and (n, 5, 64, 64)."""
        head, _, _, n = (int(value) for value in self._place[first])
        start = int(self._place[first][1]) + n
        return self._fields[head][start : start + end - first], self._covered[head][start : start + end - first]


class Variety:
    """Ways to see one sample otherwise: mirrored, turned, moved, bent, upside down or alone, noisier, sharper,
    streaked, scarred, at another level or contrast, with bone of the next slab in it, or cut off at a window's ends.

    Real images differ from simulated ones in more ways than these; what the network is not shown here it takes for
    blood. Grain and slow fields are drawn once, from the seed; each use cuts another piece.
    """

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng([seed, 91])
        grains = []
        for n in range(24):
            white = rng.standard_normal((400, 400, 3), dtype=np.float32)
            if n % 2:  # sharp kernels take away what is slow
                grain = cv2.GaussianBlur(white, (0, 0), rng.uniform(0.35, 1.3))
                grain -= cv2.GaussianBlur(white, (0, 0), rng.uniform(1.8, 4))
                grains.append(grain / grain.std())
            else:  # iterative reconstructions leave grain as coarse as a small bleed, and less of it
                sigma = float(np.exp(rng.uniform(np.log(0.35), np.log(3.5))))
                grain = cv2.GaussianBlur(white, (0, 0), sigma)
                grains.append(grain / grain.std() * np.float32(min(1.0, 1.3 / sigma)))
        self._grain = np.stack(grains)
        self._slow = _fields(rng, 3, 9)
        self._gyri = _fields(rng, 8, 21)

    def __call__(
        self,
        rng: np.random.Generator,
        fields: NDArray[np.int16],
        covered: NDArray[np.uint8],
        crop: tuple[int, int] = CROP,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """One sample seen otherwise.

        Args:
            rng: decides how.
            fields: (3, 256, 256) HU, foot to head.
            covered: (5, 64, 64), share of the middle slab's map pixels that a subtype covers, times 255.
            crop: rows and columns to look at, multiples of 32.

        Returns:
            HU (rows, columns, 3), and the shares 0..1 (5, rows / 4, columns / 4).
        """
        rows, columns = crop
        picked = [0, 1, 2] if rng.random() < 0.5 else [2, 1, 0]
        alone = rng.random() < 0.06
        for end in (0, 2):
            if alone or rng.random() < 0.06:  # as at the end of a scan
                picked[end] = 1
        mirror = -1.0 if rng.random() < 0.5 else 1.0
        angle, scale = 0.0, 1.0
        if rng.random() < 0.6:
            angle, scale = np.deg2rad(rng.normal(0, 10)), float(rng.uniform(0.82, 1.15))
        down, across = 4 * rng.integers(-4, 5, 2)
        turned = scale * np.array([[mirror * np.cos(angle), -np.sin(angle)], [mirror * np.sin(angle), np.cos(angle)]])
        middle = np.array([columns / 2 + across - 0.5, rows / 2 + down - 0.5])
        bone = cv2.moments((fields[1] > 200).astype(np.uint8), binaryImage=True)
        centre = np.full(2, SIZE / 2 - 0.5)
        if crop != (SIZE, SIZE) and bone["m00"] > 400:
            away = np.array([bone["m10"], bone["m01"]]) / bone["m00"] - centre
            centre += 4 * np.rint(away / 4)  # whole pixels of the map, so that its edges stay where they are sharp
        move = np.column_stack([turned, middle - turned @ centre])
        layers = [fields[n] for n in picked]
        if rng.random() < 0.2:  # who moves between two slices lies a little elsewhere in the next
            for end in (0, 2):
                step = np.column_stack([np.eye(2), rng.uniform(-1.5, 1.5, 2)])
                layers[end] = cv2.warpAffine(layers[end], step, (SIZE, SIZE), borderValue=(-1024.0,) * 4)
        stack = cv2.merge(layers).astype(np.float32)
        bent = self._bend(rng) if rng.random() < 0.25 else None
        if bent is not None:
            stack = cv2.remap(stack, *bent, cv2.INTER_LINEAR, borderValue=(-1024.0,) * 4)
        hu = _moved(stack, move, crop, -1024.0)
        blood = np.zeros((len(covered), rows // 4, columns // 4), dtype=np.float32)
        # The same in the map's pixels, of which four by four of the field's make one.
        on_map = np.column_stack([turned, (turned @ np.full(2, 1.5) + move[:, 2] - 1.5) / 4])
        for layer, target in zip(covered, blood, strict=True):
            if layer.any():
                share = layer.astype(np.float32) / 255
                if bent is not None:
                    # As the field: the middle of a map's pixel lies 1.5 of the field's from its first.
                    at = [(cv2.resize(way, share.shape, interpolation=cv2.INTER_AREA) - 1.5) / 4 for way in bent]
                    share = np.asarray(cv2.remap(share, at[0], at[1], cv2.INTER_LINEAR), dtype=np.float32)
                target[:] = _moved(share, on_map, (rows // 4, columns // 4), 0.0)
        chance = rng.random(9)
        if chance[0] < 0.3:
            amount, sigma = np.float32(rng.uniform(-0.9, 1.3)), float(rng.uniform(0.6, 1.3))
            hu += amount * (hu - cv2.GaussianBlur(hu, (0, 0), sigma))
        if chance[1] < 0.4:
            grain = self._grain[rng.integers(len(self._grain))]
            y, x = rng.integers(0, grain.shape[0] - rows), rng.integers(0, grain.shape[1] - columns)
            hu += grain[y : y + rows, x : x + columns] * np.float32(rng.uniform(0, 7))
        if chance[2] < 0.2:
            slow = self._slow[rng.integers(len(self._slow)), :rows, :columns]
            hu += slow[:, :, None] * np.float32(rng.uniform(0, 4))
        if chance[3] < 0.12:
            hu += self._streaks(rng, rows, columns)[:, :, None] * np.float32(rng.uniform(1, 7))
        if chance[4] < 0.3:  # kernels and filters change how far grey stands from white matter
            hu += np.float32(rng.uniform(-0.2, 0.25)) * (np.clip(hu, 0, 80) - 34) * (hu > 0)
        if chance[6] < 0.6:
            slow, gyri = (some[rng.integers(len(some)), :rows, :columns] for some in (self._slow, self._gyri))
            _against_bone(rng, hu, slow, gyri)
        if chance[7] < 0.2:
            slow, gyri = (some[rng.integers(len(some)), :rows, :columns] for some in (self._slow, self._gyri))
            _darken(rng, hu, blood, slow, gyri)
        if chance[8] < 0.35:
            _bone_between(rng, hu)
        hu *= np.float32(rng.normal(1, 0.03))
        hu += np.float32(rng.normal(0, 4))
        if chance[5] < 0.05:  # an image that was stored through a window
            width = float(rng.uniform(80, 400))
            np.clip(hu, 40 - width / 2, 40 + width / 2, out=hu)
        return hu, blood

    def _bend(self, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Where each pixel of the field comes from, column and row, as in a head of another shape."""
        row, column = np.indices((SIZE, SIZE), dtype=np.float32)
        far = rng.uniform(1, 4)
        ways = self._slow[rng.integers(len(self._slow), size=2)] * np.float32(far)
        return column + ways[0], row + ways[1]

    def _streaks(self, rng: np.random.Generator, rows: int, columns: int) -> NDArray[np.float32]:
        """Bands of unit spread in one direction, near a line across the image."""
        angle = rng.normal(0, 0.25) if rng.random() < 0.7 else rng.uniform(0, np.pi)
        row, column = np.indices((rows, columns), dtype=np.float32)
        across = np.float32(np.cos(angle)) * (row - rows / 2) + np.float32(np.sin(angle)) * (column - columns / 2)
        bands = cv2.GaussianBlur(rng.standard_normal((2 * max(rows, columns), 1), dtype=np.float32), (0, 0), 2)
        place = np.clip(np.rint(across) + len(bands) / 2, 0, len(bands) - 1).astype(np.intp)
        near = np.exp(-(((across - rng.uniform(-60, 60)) / 30) ** 2))
        return np.asarray(bands[place, 0] / bands.std() * near, dtype=np.float32)


def _fields(rng: np.random.Generator, coarsest: int, finest: int) -> NDArray[np.float32]:
    """24 fields of unit spread, each smooth between so many random values along an edge, the last number excluded."""
    fields = [
        cv2.resize(rng.standard_normal((k, k), dtype=np.float32), (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
        for k in rng.integers(coarsest, finest, 24)
    ]
    return np.stack([field / field.std() for field in fields])


def _against_bone(
    rng: np.random.Generator, hu: NDArray[np.float32], slow: NDArray[np.float32], gyri: NDArray[np.float32]
) -> None:
    """Brain close to the skull without fluid between, and the brightness that bone lends to what lies beside it.

    Many simulated heads have more fluid there than a real one: a network that has seen little else takes a bright seam
    for a subdural bleed. In the one real head at hand the median is 55 HU 2 mm from the bone, 42 at 4 and 36 at 8; in
    eight simulated ones 33, 36 and 33.

    Args:
        rng: decides how much.
        hu: (rows, columns, 3), changed in place.
        slow: (rows, columns) of unit spread: the brightness is not the same all around.
        gyri: the same, as fine as gyri are: between two that touch the bone there may be fluid.
    """
    bone = np.asarray(np.clip((hu - 150) / 350, 0, 1), dtype=np.float32)
    soft = ((hu > -60) & (hu < 150)).astype(np.float32)
    near = _near(rng, bone, (1.5, 6))
    near *= soft
    if rng.random() < 0.8:
        # The level is lifted and the grain on it stays.
        level = cv2.GaussianBlur(np.clip(hu, -40, 60), (0, 0), 1.2)
        lifted = near * np.float32(rng.uniform(0.5, 1)) * np.minimum(level - np.float32(rng.uniform(26, 46)), 0)
        if rng.random() < 0.5:
            lifted *= np.clip(2.5 * (gyri + np.float32(rng.uniform(-0.3, 1))), 0, 1)[:, :, None]
        hu -= lifted
    if rng.random() < 0.5:  # the edge of the bone is as wide as the scanner's blur
        hu += _near(rng, bone, (0.6, 1.4)) * soft * np.float32(rng.uniform(0, 50))
    around = np.clip(1 + np.float32(rng.uniform(0, 0.7)) * slow, 0, 2)[:, :, None]
    far = near if rng.random() < 0.5 else _near(rng, bone, (3, 10)) * soft
    hu += far * around * np.float32(rng.uniform(-2, 26))
    if rng.random() < 0.4:  # a gyrus that touches the bone is bright here and not there, as a thin clot is
        pattern = slow[::-1, ::-1] if rng.random() < 0.4 else gyri
        places = np.clip(3 * (pattern - np.float32(rng.uniform(0.2, 1))), 0, 1)[:, :, None]
        hu += _near(rng, bone, (1, 4)) * soft * places * np.float32(rng.uniform(4, 24))


def _darken(
    rng: np.random.Generator,
    hu: NDArray[np.float32],
    blood: NDArray[np.float32],
    slow: NDArray[np.float32],
    gyri: NDArray[np.float32],
) -> None:
    """A scar of the brain: dark but for the dura, the vessels and what is left of the cortex, which look bright in it.

    Args:
        rng: decides where and how dark.
        hu: (rows, columns, 3), changed in place where there is no blood.
        blood: (5, rows / 4, columns / 4), shares 0..1.
        slow: (rows, columns) of unit spread: the outline.
        gyri: the same, as fine as gyri are: what is left of them.
    """
    rows, columns = hu.shape[:2]
    row, column = np.indices((rows, columns), dtype=np.float32)
    down, across = rng.uniform(0.25, 0.75, 2) * (rows, columns)
    if rng.random() < 0.4:  # beside the falx, which nothing looks more like blood than
        across = columns / 2 + rng.normal(0, 12)
    far = np.hypot(row - np.float32(down), column - np.float32(across)) / np.float32(rng.uniform(12, 35))
    place = np.clip(2.5 * (1 + 0.35 * slow - far), 0, 1)
    if rng.random() < 0.5:
        place *= np.clip(2 * (gyri + np.float32(rng.uniform(0, 1.2))), 0, 1)
    # A pixel of the map with any blood in it, and those about it, stay whole.
    whole = cv2.dilate((blood.sum(axis=0) > 0).astype(np.float32), np.ones((3, 3), dtype=np.uint8))
    place *= 1 - cv2.resize(whole, (columns, rows), interpolation=cv2.INTER_LINEAR)
    level = cv2.GaussianBlur(np.clip(hu, -100, 100), (0, 0), 1.0)
    brain = np.clip((level - 5) / 10, 0, 1) * np.clip((47 - level) / 6, 0, 1)
    hu -= (place * np.float32(rng.uniform(5, 24)))[:, :, None] * brain


def _bone_between(rng: np.random.Generator, hu: NDArray[np.float32]) -> None:
    """A share of the bone of the slabs beside it in each, as slices overlap that are wider than their distance.

    Each lends 48 HU at the most, about what makes blood at the skull count no more (`haemorrhage.bleed`).

    Args:
        rng: decides how much.
        hu: (rows, columns, 3), changed in place.
    """
    bone = np.clip(hu - 150, 0, 1200)
    share = np.float32(rng.uniform(0, 0.04))
    soft = (hu < 150) & (hu > -150)
    for layer, beside in ((0, (1,)), (1, (0, 2)), (2, (1,))):
        for other in beside:
            hu[..., layer] += share * bone[..., other] * soft[..., layer]


def _near(rng: np.random.Generator, bone: NDArray[np.float32], sigma: tuple[float, float]) -> NDArray[np.float32]:
    """How near each pixel is to bone, 0..1, fading over some of so many pixels."""
    blurred = cv2.GaussianBlur(bone, (0, 0), rng.uniform(*sigma))
    return np.asarray(np.clip(np.float32(rng.uniform(1.8, 3)) * blurred, 0, 1), dtype=np.float32)


def _moved(
    image: NDArray[np.float32], move: NDArray[np.float64], shape: Sequence[int], fill: float
) -> NDArray[np.float32]:
    moved = cv2.warpAffine(
        image, move, (shape[1], shape[0]), flags=cv2.INTER_LINEAR, borderValue=(fill, fill, fill, fill)
    )
    return np.asarray(moved, dtype=np.float32)
