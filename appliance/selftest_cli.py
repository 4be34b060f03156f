"""`scanside selftest`: whether the whole way from a scanner to the alert works."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from appliance.console import Json, emit, err, guard, out, read_settings


@guard
def selftest(
    seconds: Annotated[
        float | None, typer.Option(min=1.0, help="Longest from the last image to the alert; else the sum of [budget].")
    ] = None,
    as_json: Json = False,
) -> None:
    """Send a simulated bleed and a simulated normal head through the running box, to itself alone.

    It exits with 1 unless the one comes out positive with an alert and the other negative without, both in time. The
    hospital is told nothing, and patients go first.
    """
    from appliance.selftest import run_selftest

    settings, _ = read_settings()
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=err, transient=True
    ) as progress:
        task = progress.add_task("", total=None)
        limit = settings.budget.seconds if seconds is None else seconds
        results = run_selftest(settings, limit, lambda text: progress.update(task, description=text))
    passed = all(one.passed for one in results)
    if as_json:
        emit({"ok": passed, "studies": [{**asdict(one), "ok": one.passed} for one in results]})
    else:
        table = Table("expected", "study", "verdict", "seconds", "alert", "objects", "", box=None)
        for one in results:
            verdict = "–" if one.positive is None else "positive" if one.positive else "negative"
            table.add_row(
                one.expected,
                str(one.study or "–"),
                verdict if one.probability is None else f"{verdict} ({one.probability:.2f})",
                "–" if one.seconds is None else f"{one.seconds:.1f}",
                "yes" if one.alert else "no",
                str(one.objects),
                "[green]passed[/]" if one.passed else f"[bold red]failed:[/] {escape(one.reason)}",
            )
        out.print(table)
    if not passed:
        raise typer.Exit(1)
