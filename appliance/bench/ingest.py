"""The benchmark of the intake: interleaved rounds of every contestant, every sender and every number of associations.

What is measured, and what it means, is written in docs/benchmarks.md.
"""

from __future__ import annotations

import itertools
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from appliance.bench import slices as simulated
from appliance.bench.contestants import CONTESTANTS, OURS, Contestant, Kept
from appliance.bench.processes import cpu_seconds_below, file_system
from appliance.bench.report import Round, Series, document
from appliance.bench.senders import SENDERS, Sender
from appliance.bench.slices import Slice
from dicom_io.errors import PeerError, ScansideError


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure."""

    images: int
    rounds: int
    associations: Sequence[int]
    contestants: Sequence[Contestant]
    senders: Sequence[Sender] = SENDERS


def plan(
    images: int, rounds: int, associations: Sequence[int], contestants: Sequence[str], senders: Sequence[str]
) -> Plan:
    """The plan for contestants and senders by name; no name means all.

    Raises:
        ScansideError: there is none of that name.
    """
    for kind, known, names in (
        ("contestant", [one.name for one in CONTESTANTS], contestants),
        ("sender", [one.name for one in SENDERS], senders),
    ):
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ScansideError(f"there is no such {kind}", unknown[0], f"there are {', '.join(known)}")
    return Plan(
        images,
        rounds,
        sorted(set(associations)),
        [one for one in CONTESTANTS if not contestants or one.name in contestants],
        [one for one in SENDERS if not senders or one.name in senders],
    )


def measure(
    wanted: Plan,
    directory: Path | None = None,
    *,
    on_total: Callable[[int], None] = lambda _: None,
    on_step: Callable[[str], None] = lambda _: None,
    on_done: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Run the benchmark; the document that `scanside bench ingest --json` prints.

    Args:
        directory: where images and whatever the receivers keep lie meanwhile; None is the system's temporary folder.
        on_total: told once how many steps there are.
        on_step: told what is done now, ``on_done`` after each step.

    Raises:
        PeerError: a contestant does not start, does not take the images, or does not have them afterwards.
    """
    missing = [(one.name, one.missing()) for one in wanted.contestants]
    missing += [(one.name, one.missing()) for one in wanted.senders]
    left_out = [{"name": name, "reason": reason} for name, reason in missing if reason]
    gone = {one["name"] for one in left_out}
    contestants = [one for one in wanted.contestants if one.name not in gone]
    senders = [one for one in wanted.senders if one.name not in gone]
    table = {
        (contestant.name, sender.name, count): Series(contestant.name, sender.name, count, [])
        for sender in senders
        for count in wanted.associations
        for contestant in contestants
    }
    on_total(wanted.images + wanted.rounds * len(table))
    runs = itertools.count(1)
    with TemporaryDirectory(prefix="scanside-bench-", dir=directory) as folder:
        home = Path(folder)
        _has_room(home, wanted.images * (wanted.rounds * len(table) + 1))
        (home / "images").mkdir()
        on_step("simulating slices")
        made = simulated.make(home / "images", wanted.images, on_done)
        for number in range(wanted.rounds):
            for count in wanted.associations:
                for sender in senders:
                    # Nobody always comes after the same one.
                    turn = number % max(1, len(contestants))
                    for one in (*contestants[turn:], *contestants[:turn]):
                        on_step(f"round {number + 1}: {one.name}, {sender.name}, {count} associations")
                        try:
                            took = _one(one, sender, made, count, home / str(next(runs)))
                        except PeerError as error:
                            where = f"{one.name} with {sender.name}, {count} associations"
                            raise PeerError(str(error), where, "nothing of this run counts") from error
                        table[one.name, sender.name, count].rounds.append(took)
                        on_done()
        machine = {
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            "file_system": file_system(home),
        }
    return document(wanted.images, wanted.rounds, machine, list(table.values()), left_out, ours=OURS)


def _has_room(folder: Path, images: int) -> None:
    needed, free = int(images * simulated.PIXEL_BYTES * 1.2), shutil.disk_usage(folder).free
    if needed > free:
        what = f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
        raise ScansideError(
            what, str(folder), "measure fewer images, rounds or contestants, or name another --directory"
        )


def _one(contestant: Contestant, sender: Sender, made: Sequence[Slice], associations: int, folder: Path) -> Round:
    """One measurement, with a receiver started for it and an empty folder.

    The folder stays until all is measured: for minutes after files were deleted ext4 looks at each of their inodes
    before it gives a new file one, which costs whoever comes next 0.6 ms an image.
    """
    folder.mkdir()
    receiver = contestant.start(folder)
    try:
        before = cpu_seconds_below(receiver.process.keeper_pid)
        sent = sender.send(receiver.peer, made, associations, folder)
        used = cpu_seconds_below(receiver.process.keeper_pid) - before
        try:
            verify(contestant.name, made, receiver.kept())
        except PeerError as error:
            # dcmsend ends well even where each of its images was refused: only the receiver can say why.
            raise PeerError(error.what, error.where, f"its last words: {receiver.process.tail(2) or 'none'}") from error
    finally:
        receiver.process.stop()
    # What this one left to be written must not be written in the time of the next.
    os.sync()
    percentiles = np.percentile(sent.responses_ms, (50, 99)) if sent.responses_ms else (None, None)
    return Round(
        images_per_s=len(made) / sent.seconds,
        cpu_s_per_1000=used * 1000 / len(made),
        p50_ms=None if percentiles[0] is None else float(percentiles[0]),
        p99_ms=None if percentiles[1] is None else float(percentiles[1]),
    )


def verify(name: str, made: Sequence[Slice], kept: Kept) -> None:
    """See that a receiver has what was sent and nothing else; where it keeps files, with the right pixels.

    Raises:
        PeerError: it has not.
    """
    lost = [one for one in made if one.uid not in kept]
    if lost:
        raise PeerError(f"{name} lost {len(lost)} of {len(made)} images", lost[0].uid)
    if len(kept) != len(made):
        raise PeerError(f"{name} has {len(kept)} images where {len(made)} were sent")
    for one in made:
        path = kept[one.uid]
        if path is not None and (not path.is_file() or simulated.tail(path) != one.pixels()):
            raise PeerError(f"{name} has an image without its pixels", str(path))
