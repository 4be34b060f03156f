"""`scanside bench`: this box beside its peers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from appliance.console import Json, emit, err, guard, out
from dicom_io.errors import ScansideError

app = typer.Typer(help="Measure this box beside its peers.", no_args_is_help=True)

MOST_ASSOCIATIONS = 64
MOST_SCANNERS = 16
"""An intake takes no more than 32 associations from one address, and one that was released may not have ended yet."""


def _file_to_be(path: Path | None) -> Path | None:
    """Complain before the measurement, which takes minutes, and not after it."""
    if path and not path.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.parent}")
    return path


Plot = Annotated[
    Path | None, typer.Option("--plot", dir_okay=False, callback=_file_to_be, help="SVG file for a picture.")
]
Triton = Annotated[Path, typer.Option(help="The virtual environment of Triton.")]
Directory = Annotated[
    Path | None,
    typer.Option(exists=True, file_okay=False, help="Folder for the files meanwhile, on the disk to measure."),
]


@app.command()
@guard
def ingest(
    images: Annotated[int, typer.Option(min=1, help="CT slices of 0.53 MB to send each time.")] = 300,
    rounds: Annotated[int, typer.Option(min=1, help="How often each combination is measured.")] = 3,
    associations: Annotated[str, typer.Option(help="Numbers of associations, with commas between.")] = "1,4,16",
    contestants: Annotated[
        str,
        typer.Option(help="Receivers, with commas between: scanside, storescp, dcmrecv, orthanc, pynetdicom, sink."),
    ] = "",
    senders: Annotated[
        str, typer.Option(help="Senders, with commas between: dcmsend, dcmsend-nodelay, replay.")
    ] = "dcmsend,replay",
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Measure the intake beside other DICOM receivers (docs/benchmarks.md)."""
    from appliance.bench.ingest import measure, plan
    from appliance.bench.report import tables

    counts = _counts("--associations", associations, MOST_ASSOCIATIONS)
    wanted = plan(images, rounds, counts, _names(contestants), _names(senders))
    with _bar() as (on_total, on_step, on_done):
        told = measure(
            wanted,
            directory,
            on_total=on_total,
            on_step=on_step,
            on_done=on_done,
        )
    if as_json:
        emit(told)
    else:
        out.print(tables(told))


@app.command()
@guard
def decode(
    images: Annotated[int, typer.Option(min=1, help="CT slices of each kind.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="How often each decoder is measured.")] = 3,
    kinds: Annotated[str, typer.Option(help="Kinds of pixel data, with commas between, such as jpeg2000,htj2k.")] = "",
    directory: Directory = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Measure the decoders beside other libraries, and compare every bit (docs/benchmarks.md)."""
    from appliance.bench import plots
    from appliance.bench.decode import lines, measure

    with err.status("starting") as status:
        told = measure(images, rounds, _names(kinds), directory, on_step=lambda what: status.update(escape(what)))
    if plot:
        plot.write_text(plots.decode(told), encoding="utf-8")
    if as_json:
        emit(told)
    else:
        for line in lines(told):
            out.print(escape(line), highlight=False, soft_wrap=True)


@app.command()
@guard
def preprocess(
    slabs: Annotated[int, typer.Option(min=1, help="Slabs of 512 x 512 in one batch.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="How often each implementation does the batch.")] = 5,
    spacing: Annotated[float, typer.Option(help="Between the slabs' pixels, in mm; at most 0.5.")] = 0.5,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Measure preprocessing on every device there is, beside plain OpenCV and NumPy (docs/performance.md)."""
    from appliance.bench import plots
    from appliance.bench.preprocess import lines, measure

    told = measure(slabs, rounds, spacing)
    if plot:
        plot.write_text(plots.preprocess([told]), encoding="utf-8")
    if as_json:
        emit(told)
    else:
        out.print(lines(told), markup=False, highlight=False, soft_wrap=True)


@app.command()
@guard
def model(
    package: Annotated[
        Path | None,
        typer.Argument(file_okay=False, exists=True, help="Folder of a model package; else the shipped one."),
    ] = None,
    slabs: Annotated[int, typer.Option(min=1, max=1000, help="Slabs of one study.")] = 40,
    rounds: Annotated[int, typer.Option(min=1, help="How often each does the study.")] = 9,
    triton: Triton = Path(".venv-triton"),
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Measure a model on a study's slabs through Triton, beside ONNX Runtime alone (docs/performance.md)."""
    from appliance.bench.model import lines, measure
    from appliance.governance.package import load, trusted_keys
    from appliance.settings import Settings

    settings = Settings()
    # No image of a patient is read here: a package that the site is still trying needs no signature.
    folder = package or settings.model_repository / settings.models.packages[0]
    found = load(folder, trusted=trusted_keys(settings), allow_unsigned=True)
    with err.status("starting") as status:
        told = measure(found, triton, slabs, rounds, directory, on_step=lambda what: status.update(escape(what)))
    if as_json:
        emit(told)
    else:
        out.print(lines(told), markup=False, highlight=False, soft_wrap=True)


@app.command()
@guard
def latency(
    studies: Annotated[int, typer.Option(min=1, help="Studies of each scenario.")] = 10,
    scenarios: Annotated[str, typer.Option(help="Scenarios, with commas between, such as thin_300_paced.")] = "",
    waiting: Annotated[
        str, typer.Option(help="Quiet times in seconds of the mode that waits before it infers.")
    ] = "5,60",
    triton: Triton = Path(".venv-triton"),
    directory: Directory = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Measure the way from the last image to the acknowledged alert, through a whole box (docs/performance.md)."""
    from appliance.bench import plots
    from appliance.bench.latency import measure, plan, table

    try:
        quiet = [float(word) for word in _names(waiting)]
    except ValueError as error:
        raise typer.BadParameter(f"--waiting {waiting!r} is not a list of seconds, such as 5,60") from error
    with _bar() as (on_total, on_step, on_done):
        told = measure(
            plan(_names(scenarios)),
            studies,
            triton,
            directory,
            waiting=quiet,
            on_total=on_total,
            on_step=on_step,
            on_done=on_done,
        )
    if plot:
        plot.write_text(plots.latency(told), encoding="utf-8")
    if as_json:
        emit(told)
    else:
        out.print(table(told))


@app.command()
@guard
def throughput(
    scanners: Annotated[str, typer.Option(help="Numbers of scanners at once, with commas between.")] = "1,2,4,8",
    studies: Annotated[int, typer.Option(min=1, help="Studies of each scanner, one after another.")] = 16,
    slices: Annotated[int, typer.Option(min=16, max=500, help="Slices of a study, such as 28 thick, 300 thin.")] = 28,
    rounds: Annotated[int, typer.Option(min=1, help="How often each number of scanners is measured.")] = 1,
    triton: Triton = Path(".venv-triton"),
    directory: Directory = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Measure how many studies an hour a whole box takes, and what each costs it (docs/performance.md)."""
    from appliance.bench import plots
    from appliance.bench.throughput import measure, tables

    counts = _counts("--scanners", scanners, MOST_SCANNERS)
    with _bar() as (on_total, on_step, on_done):
        told = measure(
            counts,
            studies,
            slices,
            rounds,
            triton,
            directory,
            on_total=on_total,
            on_step=on_step,
            on_done=on_done,
        )
    if plot:
        plot.write_text(plots.throughput(told), encoding="utf-8")
    if as_json:
        emit(told)
    else:
        out.print(tables(told))
    if differ := sum(one["verdicts_that_differ"] for one in told["scanners"].values()):
        raise ScansideError(f"the same images were judged differently in {differ} studies", "scanside engine")


@app.command()
@guard
def alerts(
    number: Annotated[int, typer.Option("--alerts", min=2, help="Alerts of each round.")] = 200,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is measured.")] = 3,
    faults: Annotated[bool, typer.Option("--faults", help="Also against a listener that fails at random.")] = False,
    chance: Annotated[float, typer.Option(min=0.0, max=0.9, help="Of a fault, for each message.")] = 0.3,
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Measure alerts from the outbox to their acknowledgement, beside a bare socket."""
    from appliance.bench.alerts import lines, measure

    with err.status("starting") as status, _silent("appliance.delivery"):  # its listener's faults are counted, not told
        told = measure(
            number,
            rounds,
            directory,
            faults=chance if faults else 0.0,
            on_step=lambda what: status.update(escape(what)),
        )
    if as_json:
        emit(told)
    else:
        for line in lines(told):
            out.print(escape(line), highlight=False, soft_wrap=True)
    found = told.get("faults", {})
    if wrong := [f"{found[name]} {name}" for name in ("lost", "doubled", "reordered") if found.get(name)]:
        raise ScansideError(f"of {found['sent']} alerts {', '.join(wrong)}", "the outbox", "report this fault")


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """Without what a package logs below its worst."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _bar() -> Iterator[tuple[Callable[[int], None], Callable[[str], None], Callable[[], None]]]:
    """A progress bar, as what `measure` tells it: how many steps there are, what is done now, that a step is done."""
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=err
    ) as progress:
        task = progress.add_task("starting", total=None)
        yield (
            lambda total: progress.update(task, total=total),
            lambda what: progress.update(task, description=escape(what)),
            lambda: progress.advance(task),
        )


def _counts(option: str, text: str, most: int) -> list[int]:
    counts = [int(word) if word.strip().isdecimal() else 0 for word in text.split(",")]
    if min(counts) < 1 or max(counts) > most:
        raise typer.BadParameter(f"{option} {text!r} is not a list of numbers from 1 to {most}, such as 1,4,16")
    return counts


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
