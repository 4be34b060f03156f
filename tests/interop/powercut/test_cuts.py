"""A power cut at any moment: what was answered with Success is on disk, whole and in the ledger.

The real intake runs once under shim.c, which writes down every operation on its state folder and every answer that
it sends. Then replay.py makes what a disk may hold after a cut behind any of these operations, and the box's own code
looks at it. POWERCUT_ROUNDS=n tries n times as many cuts, with longer recordings.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.powercut.invariants import LEDGER, SPOOL, violations
from tests.interop.powercut.recorded import Recording, record, replayed
from tests.interop.powercut.replay import MODES, Kind, lay_out

pytestmark = [pytest.mark.interop, pytest.mark.slow, pytest.mark.xdist_group("powercut")]

ROUNDS = int(os.environ.get("POWERCUT_ROUNDS", "1"))
CUTS = 400 * ROUNDS
TELLING = (Kind.SEND, Kind.RENAME, Kind.LINK, Kind.SYNC_END, Kind.MKDIR, Kind.UNLINK, Kind.TRUNCATE)


@pytest.fixture(scope="module")
def recording(shim: Path, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """Two runs of intake on a new box, each with four associations; the first is killed when all is answered."""
    return record(shim, tmp_path_factory.mktemp("recording"), images=30 * ROUNDS, killed=True)


def cut_points(recording: Recording, count: int, seed: int) -> list[int]:
    """Numbers of operations after which to cut: half of them beside a telling operation, the others anywhere."""
    chance = random.Random(seed)
    everywhere = range(len(recording.operations) + 1)
    beside = {
        near
        for number, one in enumerate(recording.operations, 1)
        if one.kind in TELLING
        for near in (number - 1, number, number + 1)
        if near in everywhere
    }
    chosen = set(chance.sample(sorted(beside), min(count // 2, len(beside))))
    rest = sorted(set(everywhere) - chosen)
    return sorted(chosen | set(chance.sample(rest, min(count - len(chosen), len(rest)))))


def found_by_cutting(recording: Recording, cuts: list[int], folder: Path, seed: int) -> Iterator[str]:
    """What does not hold after each of these cuts. A state is looked at once for the same answers.

    Both modes that keep some of what was not synced are tried at every cut, the one that keeps nothing at every third,
    because it changes with syncs only.
    """
    seen: dict[bytes, int] = {}
    for number, disk in replayed(recording, cuts):
        answered = [one for after, one in recording.answers if after <= number]
        for mode in MODES if number % 3 == 0 else MODES[1:]:
            state = disk.after_cut(mode, random.Random(f"{seed} {number} {mode}"))
            key = fingerprint(state)
            if seen.get(key) == len(answered):
                continue
            seen[key] = len(answered)
            # Some in turn also start, which costs more than all the looking. The others share one folder, whose
            # folders stay: the box makes hundreds of them where they are missing, and an empty one says nothing.
            start = mode == (MODES[1 + number // 4 % 2] if number % 4 == 0 else None)
            place = folder / ("alone" if start else "shared")
            place.mkdir(exist_ok=True)
            lay_out(state, place, empty_folders=start)
            for one in violations(place / LEDGER, place / SPOOL, answered, start=start, cut=True):
                behind = recording.operations[number - 1] if number else None
                yield f"cut {number} ({mode}) behind {behind and (behind.kind.name, behind.path)}: {one}"
            if start:
                shutil.rmtree(place)
            else:
                _empty(place)


def _empty(folder: Path) -> None:
    for entry in os.scandir(folder):
        if entry.is_dir():
            _empty(Path(entry.path))
        else:
            Path(entry.path).unlink()


def fingerprint(state: dict[str, bytes]) -> bytes:
    """The same for the same state of a disk."""
    total = hashlib.sha256()
    for path, content in sorted(state.items()):
        total.update(f"{path}\0{len(content)}\0".encode())
        total.update(content)
    return total.digest()


def test_the_recording_is_the_whole_truth(recording: Recording) -> None:
    """Nothing that intake does to its folder escapes: replayed without a cut it is, byte for byte, what lies there."""
    ((_, disk),) = replayed(recording, [len(recording.operations)])
    assert disk.now().keys() == recording.after.keys()
    assert [path for path, content in disk.now().items() if content != recording.after[path]] == []
    kinds = Counter(one.kind for one in recording.operations)
    assert kinds[Kind.SYNC_BEGIN] == kinds[Kind.SYNC_END] > 0
    assert len(recording.answers) >= 60


@pytest.mark.timeout(120 * ROUNDS + 60)
def test_no_cut_loses_what_was_answered(recording: Recording, quick: Path) -> None:
    cuts = cut_points(recording, CUTS, seed=1)
    assert len(cuts) >= min(CUTS, len(recording.operations))
    found = list(itertools.islice(found_by_cutting(recording, cuts, quick, seed=1), 20))
    assert found == [], "\n".join(["what does not hold, at most twenty of it:", *found])


@pytest.mark.parametrize("missing", ["dirsync", "filesync", "ledgersync"])
def test_a_missing_sync_is_found(shim: Path, tmp_path: Path, quick: Path, missing: str) -> None:
    """The same search finds the fault in an intake whose syncs of one kind do nothing."""
    faulty = record(shim, tmp_path, ignore=missing, rounds=1, images=8)
    first = faulty.answers[0][0]
    cuts = [number for number in cut_points(faulty, 200, seed=2) if number >= first]
    found = found_by_cutting(faulty, cuts, quick, seed=2)
    assert "is lost" in next((one for one in found if "answered with Success" in one), "nothing was found")
