"""The benchmark of how many studies an hour a whole box takes from several scanners, and what each costs it.

What is measured, and what it means, is written in docs/performance.md.
"""

from __future__ import annotations

import os
import platform
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, overload

from rich.console import Group
from rich.table import Table

from appliance.bench.box import SCANNER, Box, running_box
from appliance.bench.latency import WARM_UP, said, spread
from appliance.bench.processes import file_system, is_below, processes
from appliance.bench.replay import Association, Image, load
from appliance.bench.slices import PIXEL_BYTES
from appliance.bench.studies import Study, copies, original
from appliance.demo.orthanc import LOOPBACK
from appliance.events import Event
from appliance.ledger.views import events_since, timeline, waiting_destinations
from appliance.settings import Settings
from dicom_io.errors import PeerError, ScansideError

SERVICES = ("intake", "engine", "deliver", "triton")
SILENT_SECONDS = 120.0
"""A box in which nothing happens for so long has stopped; longer than the last resort of completeness."""


@dataclass(frozen=True, slots=True)
class Used:
    """What a service has used: its process, CPU seconds so far, and peak resident memory in MB, both with children.

    Memory that processes share counts in each of them.
    """

    pid: int
    cpu_s: float
    peak_mb: float


@dataclass(frozen=True, slots=True)
class Run:
    """One measurement: a fresh box, and so many scanners.

    Attributes:
        seconds: from the first byte to the last acknowledged alert.
        cpu_s: service → CPU seconds of all studies.
        quarter_mb, peak_mb: service → peak resident memory when a quarter of the studies had its verdict, and at the
            end.
        last_instance_to_ack_s: of each study.
        answers: what the verdict on each study says.
        reopened: studies that were judged more than once.
    """

    seconds: float
    cpu_s: dict[str, float]
    quarter_mb: dict[str, float]
    peak_mb: dict[str, float]
    last_instance_to_ack_s: list[float]
    answers: list[Any]
    reopened: int


def measure(
    scanners: Sequence[int],
    studies: int,
    slices: int,
    rounds: int,
    environment: Path,
    directory: Path | None = None,
    *,
    on_total: Callable[[int], None] = lambda _: None,
    on_step: Callable[[str], None] = lambda _: None,
    on_done: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Run the benchmark; the document that `scanside bench throughput --json` prints.

    Args:
        scanners: numbers of scanners that send at once.
        studies: of each scanner.
        slices: of each study, about; 16 to 500.
        rounds: how often each number of scanners is measured.
        environment: the virtual environment of Triton.
        directory: where everything lies meanwhile; None is the system's temporary folder.
        on_total: told once how many steps there are; ``on_step`` what is done now, ``on_done`` after each.

    Raises:
        PeerError: the box does not start, refuses an image, loses a service, or gives a study no alert.
        ScansideError: the disk is too small.
    """
    counts = sorted(set(scanners))
    most = counts[-1] * studies
    runs: dict[int, list[Run]] = {count: [] for count in counts}
    on_total(most + rounds * sum(counts) * studies)
    with TemporaryDirectory(dir=directory, prefix="scanside-bench-") as name:
        folder = Path(name)
        _has_room(folder, slices * (most + rounds * sum(counts) * studies))
        on_step("simulating heads")
        head = original(folder / "original", slices)
        known = original(folder / "warm-up", 28)
        warm_up = [copies(folder / "studies" / f"warm-{number}", [known], -1 - number) for number in range(WARM_UP)]
        made = []
        for number in range(most):
            made.append(copies(folder / "studies" / f"{number}", [head], number))
            on_done()
        kind = file_system(folder)
        archive = ""
        for turn in range(rounds):
            for count in counts:
                on_step(f"round {turn + 1}, {count} scanners: starting a box")
                # What a box kept stays until the end, as in `bench ingest`: deleting slows down whoever comes next.
                with running_box(folder / f"box-{turn}-{count}", environment, {}) as box:
                    archive = box.hospital.pacs.name
                    _send(box, [warm_up])
                    on_step(f"round {turn + 1}, {count} scanners")
                    shares = [made[place * studies : (place + 1) * studies] for place in range(count)]
                    runs[count].append(_run(box, shares, on_done))
                os.sync()  # so that nothing of this box is written in the time of the next
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "file_system": kind,
        "pacs": archive,
    }
    return {"machine": machine, "slices": len(head.paths), "studies_per_scanner": studies, **document(runs)}


def _has_room(folder: Path, images: int) -> None:
    needed, free = int(images * PIXEL_BYTES * 1.2), shutil.disk_usage(folder).free
    if needed > free:
        what = f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
        raise ScansideError(what, str(folder), "measure fewer studies or rounds, or name another --directory")


class _Images(Sequence[Image]):
    """The images of a study, each loaded when it is its turn, so that thousands of files are not open at once."""

    def __init__(self, study: Study) -> None:
        self._paths = study.paths

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, place: int) -> Image: ...
    @overload
    def __getitem__(self, place: slice) -> list[Image]: ...
    def __getitem__(self, place: int | slice) -> Image | list[Image]:
        return [load(path) for path in self._paths[place]] if isinstance(place, slice) else load(self._paths[place])


class _Scanner(threading.Thread):
    """Sends its studies one after the other, an association each, as fast as they are taken."""

    def __init__(self, settings: Settings, studies: Sequence[Study], start: threading.Event) -> None:
        super().__init__(daemon=True)
        self._settings = settings
        self._studies = studies
        self._go = start
        self.error = ""

    def run(self) -> None:
        intake = self._settings.intake
        for study in self._studies:
            one = Association((LOOPBACK, intake.port), (SCANNER, intake.ae_title), _Images(study))
            one.run(self._go)
            if one.error:
                self.error = f"{study.uid} could not be sent: {one.error}"
                return


def _run(box: Box, shares: Sequence[Sequence[Study]], on_study: Callable[[], None]) -> Run:
    """Measure one box; ``shares`` holds the studies of each scanner."""
    sent = [study for share in shares for study in share]
    before = used(box.process.keeper_pid)
    quarter: dict[str, Used] = {}

    def judged(number: int) -> None:
        if 4 * number >= len(sent) and not quarter:
            quarter.update(used(box.process.keeper_pid))
        if number <= len(sent):
            on_study()

    began = _send(box, shares, judged)
    after = used(box.process.keeper_pid)
    for name in SERVICES:
        if before[name].pid != after[name].pid:
            raise PeerError(f"{name} ended and was started again", str(box.process.log), box.process.tail(3))
    reports = [report for study in sent if (report := box.report(study.uid))]
    ends = [
        event["monotonic_ns"]
        for report in reports
        for event in report["events"]
        if event["name"] == Event.DELIVERY_ACKNOWLEDGED and str(event["detail"].get("object", "")).startswith("alert.")
    ]
    return Run(
        seconds=(max(ends) - began) / 1e9,
        cpu_s={name: after[name].cpu_s - before[name].cpu_s for name in SERVICES},
        quarter_mb={name: quarter[name].peak_mb for name in SERVICES},
        peak_mb={name: after[name].peak_mb for name in SERVICES},
        last_instance_to_ack_s=[taken for report in reports if (taken := _acknowledged(report)) is not None],
        answers=[said(report["verdicts"][-1]["result"]) for report in reports],
        reopened=sum(len(report["verdicts"]) > 1 for report in reports),
    )


def _send(box: Box, shares: Sequence[Sequence[Study]], on_judged: Callable[[int], None] = lambda _: None) -> int:
    """Send, and wait until each alert is acknowledged and nothing is left to deliver.

    Args:
        on_judged: told the number of each verdict, from 1, soon after it was issued.

    Returns:
        When it began, on the monotonic clock in nanoseconds.

    Raises:
        PeerError: an image is refused, the box ends, or a study gets no alert.
    """
    studies = [study for share in shares for study in share]
    start = threading.Event()
    scanners = [_Scanner(box.settings, share, start) for share in shares]
    for scanner in scanners:
        scanner.start()
    _, last = events_since(box.ledger, 0)
    verdicts = 0
    began = time.monotonic_ns()
    start.set()
    stirred = time.monotonic()
    while True:
        if error := next((one.error for one in scanners if one.error), ""):
            raise PeerError(error, "scanside intake", box.process.tail(3))
        counted, newest = events_since(box.ledger, last)
        stirred = time.monotonic() if newest > last else stirred
        last = newest
        for _ in range(counted.get(Event.VERDICT_ISSUED, 0)):
            verdicts += 1
            on_judged(verdicts)
        if verdicts >= len(studies) and not any(one.is_alive() for one in scanners):
            reports = [box.report(study.uid) for study in studies]
            if all(one and _acknowledged(one) is not None for one in reports) and not waiting_destinations(box.ledger):
                return began
        if time.monotonic() - stirred > SILENT_SECONDS or not box.process.running:
            without = [one.uid for one in studies if not (told := box.report(one.uid)) or _acknowledged(told) is None]
            what = (
                f"{len(without)} of {len(studies)} studies got no alert" if without else "findings were not delivered"
            )
            raise PeerError(what, without[0] if without else "pacs", f"see {box.process.log}: {box.process.tail(3)}")
        time.sleep(0.1)


def _acknowledged(report: dict[str, Any]) -> float | None:
    """Seconds from the last instance to the acknowledged alert; None while there is none."""
    step = timeline(report)["alert_acknowledged"]
    return None if step is None else float(step["seconds"])


def used(keeper: int) -> dict[str, Used]:
    """What each service has used, as Linux's /proc tells it (proc(5)).

    Args:
        keeper: the process whose only child is `scanside run`, whose children are the services.
    """
    parents, seconds = processes()
    found: dict[str, Used] = {}
    for pid, parent in parents.items():
        if parents.get(parent) == keeper and (name := _service(pid)):
            family = [one for one in parents if one == pid or is_below(one, pid, parents)]
            found[name] = Used(pid, sum(seconds[one] for one in family), sum(map(_peak_mb, family)))
    if missing := [name for name in SERVICES if name not in found]:
        raise PeerError(f"{missing[0]} does not run", "scanside run", "see its log")
    return found


def _service(pid: int) -> str:
    """Which service a child of `scanside run` is; "" if none."""
    words = _read(pid, "cmdline").split("\0")
    name = "triton" if Path(words[0]).name == "tritonserver" else "".join(words[-2:-1])
    return name if name in SERVICES else ""


def _peak_mb(pid: int) -> float:
    lines = [line for line in _read(pid, "status").splitlines() if line.startswith("VmHWM:")]
    return sum(int(line.split()[1]) * 1024 / 1e6 for line in lines)


def _read(pid: int, name: str) -> str:
    try:
        return (Path("/proc") / str(pid) / name).read_text("utf-8", errors="replace")
    except OSError:
        return ""  # it ended meanwhile


def document(runs: dict[int, list[Run]]) -> dict[str, Any]:
    """The figures of all runs: number of scanners → its rounds.

    A figure is the median of the rounds; percentiles are over the studies of all rounds. In ``ratios`` each number of
    scanners stands over the least one of the same round, and of those the median.
    """
    first = next(iter(runs.values()))[0].answers[0]
    scanners: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    fewest, *_ = runs
    for count, rounds in runs.items():
        scanners[str(count)] = {
            "studies": len(rounds[0].answers),
            "rounds": len(rounds),
            "studies_per_h": round(median(_per_hour(one) for one in rounds), 1),
            "cpu_s_per_study": {
                name: round(median(one.cpu_s[name] / len(one.answers) for one in rounds), 3) for name in SERVICES
            },
            "peak_mb": {name: round(median(one.peak_mb[name] for one in rounds), 1) for name in SERVICES},
            "peak_mb_after_a_quarter": {
                name: round(median(one.quarter_mb[name] for one in rounds), 1) for name in SERVICES
            },
            "last_instance_to_ack_s": spread([value for one in rounds for value in one.last_instance_to_ack_s]),
            "verdicts_that_differ": sum(answer != first for one in rounds for answer in one.answers),
            "studies_reopened": sum(one.reopened for one in rounds),
        }
        grown = [sum(one.peak_mb.values()) / sum(one.quarter_mb.values()) for one in rounds]
        ratios[f"peak_mb_end_over_quarter_{count}"] = round(median(grown), 3)
        if count != fewest:
            pairs = list(zip(rounds, runs[fewest], strict=True))
            for name, figure in (("scanners", _per_hour), ("cpu_s_per_study", _cpu), ("peak_mb", _peak)):
                each = [figure(more) / figure(few) for more, few in pairs if figure(few)]
                if each:
                    ratios[f"{name}_{count}_over_{fewest}"] = round(median(each), 3)
    return {"scanners": scanners, "ratios": ratios}


def _per_hour(one: Run) -> float:
    return len(one.answers) * 3600 / one.seconds


def _cpu(one: Run) -> float:
    return sum(one.cpu_s.values()) / len(one.answers)


def _peak(one: Run) -> float:
    return sum(one.peak_mb.values())


def tables(told: dict[str, Any]) -> Group:
    """The figures for people."""
    machine = told["machine"]
    title = f"studies of {told['slices']} slices; {machine['cores']} cores, {machine['file_system']}, {machine['pacs']}"
    pace = Table(title=title, title_justify="left", box=None)
    for column in ("scanners", "studies", "studies/h", "ack p50 s", "p95 s", "verdicts that differ", "reopened"):
        pace.add_column(column, justify="right")
    cost = Table(title="CPU seconds a study; peak MB after a quarter of the studies → at the end", box=None)
    cost.title_justify = "left"
    cost.add_column("scanners", justify="right")
    for name in SERVICES:
        cost.add_column(name, justify="right")
    for count, one in told["scanners"].items():
        ack = one["last_instance_to_ack_s"]
        pace.add_row(
            count, str(one["studies"]), f"{one['studies_per_h']:.0f}", f"{ack['p50']:.3f}", f"{ack['p95']:.3f}",
            str(one["verdicts_that_differ"]), str(one["studies_reopened"]),
        )  # fmt: skip
        cost.add_row(
            count,
            *(
                f"{one['cpu_s_per_study'][name]:.2f}; "
                f"{one['peak_mb_after_a_quarter'][name]:.0f} → {one['peak_mb'][name]:.0f}"
                for name in SERVICES
            ),
        )
    return Group(pace, cost)
