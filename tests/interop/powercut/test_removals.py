"""A power cut while retention removes: no row that counts loses its file, and the next start finishes the rest."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.appliance.intake.test_retention import Box
from tests.interop.powercut.invariants import LEDGER, SPOOL, violations
from tests.interop.powercut.recorded import ROOT, Recording, replayed
from tests.interop.powercut.replay import MODES, Disk, lay_out, lying_in, read_trace
from tests.interop.powercut.test_cuts import ROUNDS, cut_points, fingerprint

pytestmark = [pytest.mark.interop, pytest.mark.slow, pytest.mark.xdist_group("powercut")]

FINISHED = 3
CUTS = 50 * ROUNDS


def removal(shim: Path, folder: Path, ignore: str = "") -> Recording:
    """What one round does that removes the finished studies of a box."""
    state = folder / "state"
    state.mkdir()
    box = Box(state)
    for study in range(1, FINISHED + 1):
        box.receive(study)
        box.finish(study, age_hours=1000.0 - study)
    box.receive(FINISHED + 1)
    box.ledger.close()
    before = Disk.of(state)
    environment = {
        **os.environ,
        "LD_PRELOAD": str(shim),
        "POWERCUT_ROOT": str(state.resolve()),
        "POWERCUT_TRACE": str(folder / "trace"),
        "POWERCUT_IGNORE": ignore,
    }
    command = [sys.executable, "-m", "tests.interop.powercut.remover", str(state)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(FINISHED)), done.stderr
    return Recording(before, read_trace(folder / "trace", state), (), lying_in(state))


def found_by_cutting(recording: Recording, folder: Path) -> list[str]:
    """What does not hold after cuts; a state is looked at once."""
    found = []
    seen = set()
    for number, disk in replayed(recording, cut_points(recording, CUTS, seed=3)):
        for mode in MODES:
            state = disk.after_cut(mode, random.Random(f"{number} {mode}"))
            if (key := fingerprint(state)) in seen:
                continue
            seen.add(key)
            place = folder / f"{number}-{mode}"
            place.mkdir()
            lay_out(state, place)
            behind = recording.operations[number - 1] if number else None
            where = f"cut {number} ({mode}) behind {behind and (behind.kind.name, behind.path)}"
            wrong = violations(place / LEDGER, place / SPOOL, (), start=False, cut=True)
            found += [f"{where}: {one}" for one in wrong]
            if not wrong:
                found += [f"{where}: {one}" for one in started(place)]
            shutil.rmtree(place)
    return found


def started(place: Path) -> list[str]:
    """What does not hold once intake has started there: a row and a file go together, of images and of findings."""
    box = Box(place)
    try:
        box.retention.resume()
        box.studies()
    except AssertionError as error:
        return [f"after the start: {str(error).splitlines()[0]}"]
    finally:
        box.ledger.close()
    return []


@pytest.fixture(scope="module")
def recording(shim: Path, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return removal(shim, tmp_path_factory.mktemp("removal"))


def test_the_recording_is_the_whole_truth(recording: Recording) -> None:
    ((_, disk),) = replayed(recording, [len(recording.operations)])
    assert disk.now() == recording.after
    gone = [path for path in recording.before.now() if path not in recording.after]
    assert len([path for path in gone if path.startswith(SPOOL)]) == 3 * FINISHED
    assert len([path for path in gone if path.startswith("findings")]) == 2 * FINISHED


@pytest.mark.timeout(120 * ROUNDS + 60)
def test_no_cut_takes_a_file_whose_row_still_counts(recording: Recording, quick: Path) -> None:
    found = found_by_cutting(recording, quick)
    assert found[:20] == []


def test_a_missing_sync_of_the_ledger_is_found(shim: Path, tmp_path: Path, quick: Path) -> None:
    found = found_by_cutting(removal(shim, tmp_path, ignore="ledgersync"), quick)
    assert any("has no file" in one for one in found)
