"""`scanside bench`: this box beside its peers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from appliance.console import Json, emit, err, guard, out

app = typer.Typer(help="Measure this box beside its peers.", no_args_is_help=True)

MOST_ASSOCIATIONS = 64


@app.callback()
def _group() -> None:
    """Keep the name of the one command there is."""


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
    directory: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Folder on the disk to measure on.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure the intake beside other DICOM receivers (docs/benchmarks.md)."""
    from appliance.bench.ingest import measure, plan
    from appliance.bench.report import tables

    counts = [int(word) if word.strip().isdecimal() else 0 for word in associations.split(",")]
    if min(counts) < 1 or max(counts) > MOST_ASSOCIATIONS:
        wanted_form = f"a list of numbers from 1 to {MOST_ASSOCIATIONS}, such as 1,4,16"
        raise typer.BadParameter(f"--associations {associations!r} is not {wanted_form}")
    wanted = plan(images, rounds, counts, _names(contestants), _names(senders))
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=err
    ) as progress:
        task = progress.add_task("starting", total=None)
        told = measure(
            wanted,
            directory,
            on_total=lambda total: progress.update(task, total=total),
            on_step=lambda what: progress.update(task, description=escape(what)),
            on_done=lambda: progress.advance(task),
        )
    if as_json:
        emit(told)
    else:
        out.print(tables(told))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
