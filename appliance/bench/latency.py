"""The benchmark of the way from the last image to the acknowledged alert, through a whole box.

What is measured, and what it means, is written in docs/performance.md.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.table import Table

from appliance.bench.box import Box, Sending, running_box
from appliance.bench.contestants import CONTESTANTS, OURS
from appliance.bench.senders import SENDERS
from appliance.bench.slices import Slice
from appliance.bench.studies import SYNTAXES, Study, copies, original
from appliance.governance.package import load_configured
from appliance.inference.triton import TritonClient
from appliance.ledger.views import timeline
from dicom_io.errors import PeerError, ScansideError

EVERY = 0.05
"""A scanner that reconstructs 20 slices a second."""
WARM_UP = 5
"""Studies that a box must know of a sender before it trusts its habit."""
WAITING = (5.0, 60.0)
"""The quiet times of systems that wait, in seconds."""
WITH_BARE = "thin_300_fast"
"""The scenario after each study of which the bare transfer and the bare inference are measured."""
STAGES = ("complete", "inferred", "alert_sent", "alert_acknowledged")


@dataclass(frozen=True, slots=True)
class Scenario:
    """Studies of one kind: their series as (slices, syntax), and whether they come as a scanner makes them."""

    series: tuple[tuple[int, str], ...]
    paced: bool


SCENARIOS = {
    "thick_28_paced": Scenario(((28, "explicit"),), True),
    "thin_300_paced": Scenario(((300, "explicit"),), True),
    "mixed_paced": Scenario(((28, "explicit"), (300, "explicit")), True),
    "thick_28_fast": Scenario(((28, "explicit"),), False),
    "thin_300_fast": Scenario(((300, "explicit"),), False),
    **{f"thin_300_{syntax}_paced": Scenario(((300, syntax),), True) for syntax in SYNTAXES if syntax != "explicit"},
}


@dataclass(frozen=True, slots=True)
class Measured:
    """One study: seconds of each stage after its last instance, and from its first one to the acknowledged alert."""

    stages: dict[str, float]
    whole: float
    answer: dict[str, Any]


def plan(names: Sequence[str]) -> dict[str, Scenario]:
    """The scenarios of these names; no name means all.

    Raises:
        ScansideError: there is none of that name.
    """
    if unknown := [name for name in names if name not in SCENARIOS]:
        raise ScansideError("there is no such scenario", unknown[0], f"there are {', '.join(SCENARIOS)}")
    return {name: one for name, one in SCENARIOS.items() if not names or name in names}


def measure(
    scenarios: dict[str, Scenario],
    studies: int,
    environment: Path,
    directory: Path | None = None,
    *,
    waiting: Sequence[float] = WAITING,
    on_total: Callable[[int], None] = lambda _: None,
    on_step: Callable[[str], None] = lambda _: None,
    on_done: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Run the benchmark; the document that `scanside bench latency --json` prints.

    Args:
        studies: of each scenario; in the modes that wait, one.
        environment: the virtual environment of Triton.
        directory: where everything lies meanwhile; None is the system's temporary folder.
        waiting: quiet times in seconds of the modes that wait before they infer.
        on_total: told once how many steps there are; ``on_step`` what is done now, ``on_done`` after each.

    Raises:
        PeerError: the box does not start, or a study gets no alert.
    """
    on_total(len(scenarios) * (1 + len(waiting)) + 1)
    with TemporaryDirectory(dir=directory, prefix="scanside-bench-") as name:
        folder = Path(name)
        on_step("simulating heads")
        originals = {
            series: original(folder / f"original-{series[0]}-{series[1]}", *series)
            for scenario in scenarios.values()
            for series in scenario.series
        }

        def study(scenario: Scenario, number: int) -> Study:
            return copies(folder / "studies" / f"{number}", [originals[one] for one in scenario.series], number)

        warm_up = original(folder / "warm-up", 28)
        on_done()
        streamed: dict[str, list[Measured]] = {}
        bare: list[dict[str, float]] = []
        with running_box(folder / "streaming", environment, {}) as box:
            on_step("five studies to get to know the sender")
            for number in range(WARM_UP):
                one = copies(folder / "studies" / f"warm-{number}", [warm_up], 10_000 + number)
                _send(box, [one], 0.0, folder)
                _alert(box, one)
            number = 0
            for name, scenario in scenarios.items():
                on_step(name)
                streamed[name] = []
                for _ in range(studies):
                    number += 1
                    one = study(scenario, number)
                    _send(box, [one], EVERY if scenario.paced else 0.0, folder)
                    streamed[name].append(_alert(box, one))
                    if name == WITH_BARE:  # in turns, as the machine is not always equally quick
                        bare.append(_bare(box, folder / f"bare-{number}", originals[scenario.series[0]]))
                on_done()
        waited: dict[float, dict[str, Measured]] = {}
        for quiet in waiting:
            settings = {"quiet_seconds": quiet, "wait_then_infer": True}
            with running_box(folder / f"waiting-{quiet:g}", environment, settings) as box:
                waited[quiet] = {}
                # The first study of each scenario again, all of one mode under way at once: they mostly wait.
                sent: dict[str, Study] = {}
                for place, (name, scenario) in enumerate(scenarios.items()):
                    on_step(f"{name}, waiting {quiet:g} s")
                    sent[name] = study(scenario, place * studies + 1)
                    _send(box, [sent[name]], EVERY if scenario.paced else 0.0, folder)
                for name, one in sent.items():
                    waited[quiet][name] = _alert(box, one)
                    on_done()
    return document(streamed, waited, bare)


def _send(box: Box, studies: Sequence[Study], every: float, folder: Path) -> None:
    sending = Sending(box.settings, [one.paths for one in studies], every, folder)
    sending.start()
    told = json.loads(sending.wait())
    if told["error"]:
        raise PeerError(f"a study could not be sent: {told['error']}", "scanside intake", "see its log")


def _alert(box: Box, study: Study, seconds: float = 180.0) -> Measured:
    """Wait until everything of a study is delivered, so that nothing of it disturbs the next; what it took."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        report = box.report(study.uid)
        steps = timeline(report) if report else {}
        if report and steps.get("alert_acknowledged") and steps.get("findings_stored"):
            taken = {stage: float(steps[stage]["seconds"]) for stage in STAGES}  # type: ignore[index]
            first = float(steps["first_instance"]["seconds"])  # type: ignore[index]
            answer = {**report["verdicts"][-1]["result"]}
            return Measured(taken, taken["alert_acknowledged"] - first, answer)
        time.sleep(0.2)
    raise PeerError("a study got no alert", study.uid, f"see {box.process.log}: {box.process.tail(3)}")


def _bare(box: Box, folder: Path, one: Study) -> dict[str, float]:
    """The same study to an intake that nothing stands behind and to a socket, and its slabs to the model: seconds."""
    package = load_configured(box.settings)[0]
    slabs = np.random.default_rng(1).random((32, *package.model.input.shape), np.float32)
    with TritonClient(f"{box.settings.triton.host}:{box.settings.triton.grpc_port}") as client:
        client.infer(package, slabs[:1])  # its shared memory is there
        began = time.perf_counter()
        client.infer(package, slabs)
        inference = time.perf_counter() - began
    return {"inference_s": inference, **_transfers(folder, one)}


def _transfers(folder: Path, one: Study) -> dict[str, float]:
    (replay,) = [sender for sender in SENDERS if sender.name == "replay"]
    images = [Slice(path, path.stem) for path in one.paths]
    found: dict[str, float] = {}
    for contestant in CONTESTANTS:
        if contestant.name not in (OURS, "sink"):
            continue
        place = folder / contestant.name
        place.mkdir(parents=True)
        receiver = contestant.start(place)
        try:
            found[f"transfer_{contestant.name}_s"] = replay.send(receiver.peer, images, 1, place).seconds
        finally:
            receiver.process.stop()
    return found


def document(
    streamed: dict[str, list[Measured]], waited: dict[float, dict[str, Measured]], bare: Sequence[dict[str, float]]
) -> dict[str, Any]:
    """The one JSON object of a run.

    Args:
        streamed: the studies of each scenario.
        waited: quiet time in seconds → the first study of each scenario again, in the mode that waits.
        bare: seconds of the transfers and of the inference alone after each study of `WITH_BARE`; empty if that is no
            scenario.
    """
    scenarios: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for name, found in streamed.items():
        slowest = {quiet: each[name] for quiet, each in waited.items()}
        scenarios[name] = {
            "last_instance_to_ack_s": spread([one.stages["alert_acknowledged"] for one in found]),
            "first_instance_to_ack_s": spread([one.whole for one in found]),
            "stages_s": {stage: spread([one.stages[stage] for one in found]) for stage in STAGES},
            "wait_then_infer": {
                f"{quiet:g}_s": {"last_instance_to_ack_s": one.stages["alert_acknowledged"]}
                for quiet, one in slowest.items()
            },
            "verdicts_that_differ": sum(said(one.answer) != said(found[0].answer) for one in slowest.values()),
        }
        for quiet, one in slowest.items():
            mine = scenarios[name]["last_instance_to_ack_s"]["p50"]
            ratios[f"{name}_over_waiting_{quiet:g}_s"] = round(mine / one.stages["alert_acknowledged"], 4)
    for said_of, transfer in (("bare", "transfer_scanside_s"), ("sink", "transfer_sink_s")) if bare else ():
        each = [
            study.whole / max(one[transfer], one["inference_s"])
            for study, one in zip(streamed[WITH_BARE], bare, strict=True)
        ]
        ratios[f"{WITH_BARE}_over_{said_of}"] = round(statistics.median(each), 3)
    medians = {name: round(statistics.median(one[name] for one in bare), 4) for name in (bare[0] if bare else ())}
    return {"scenarios": scenarios, "bare": medians, "ratios": ratios}


def said(answer: Any) -> Any:
    """What a verdict says, without the UIDs, by which copies of one study differ."""
    if isinstance(answer, dict):
        return {key: said(value) for key, value in answer.items() if not key.endswith("_uid")}
    return [said(one) for one in answer] if isinstance(answer, list) else answer


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """The median and the upper percentiles; of a few values the 99th is the largest."""
    p50, p95, p99 = (float(np.percentile(values, share, method="higher")) for share in (50, 95, 99))
    return {"p50": round(p50, 3), "p95": round(p95, 3), "p99": round(p99, 3), "n": len(values)}


def table(told: dict[str, Any]) -> Table:
    """The figures for people."""
    shown = Table(title="last image to acknowledged alert, seconds")
    for column in ("scenario", "studies", "p50", "p95", "p99", "complete p50", "inferred p50"):
        shown.add_column(column, justify="left" if column == "scenario" else "right")
    waits = next(iter(told["scenarios"].values()))["wait_then_infer"]
    for quiet in waits:
        shown.add_column(f"waiting {quiet.replace('_', ' ')}", justify="right")
    for name, one in told["scenarios"].items():
        spread = one["last_instance_to_ack_s"]
        shown.add_row(
            name,
            str(spread["n"]),
            *(f"{spread[share]:.3f}" for share in ("p50", "p95", "p99")),
            *(f"{one['stages_s'][stage]['p50']:.3f}" for stage in ("complete", "inferred")),
            *(f"{each['last_instance_to_ack_s']:.1f}" for each in one["wait_then_infer"].values()),
        )
    return shown
