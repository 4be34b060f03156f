"""`scanside status`: one look at the box, for people and for whoever updates many of them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from appliance.console import Json, emit, guard, out, read_settings
from dicom_io.errors import ScansideError


@guard
def status(
    since: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%dT%H:%M:%S"], help="Count from then (UTC); else 24 hours back.")
    ] = None,
    idle: Annotated[bool, typer.Option("--idle", help="Exit with 1 while something is under way.")] = False,
    as_json: Json = False,
) -> None:
    """Say what runs here, what is under way, what waits, how it went of late, and which certificates end when."""
    from appliance.status import status as look

    settings, _ = read_settings()
    if not settings.ledger_path.exists():
        raise ScansideError("there is no ledger yet", str(settings.ledger_path), "start scanside first")
    told = look(settings, since=since.replace(tzinfo=UTC) if since else None)
    if as_json:
        emit(told)
    else:
        figures, busy = told["figures"], told["in_flight"]
        table = Table("", "", box=None, show_header=False)
        table.add_row("version", f"{told['version']} on {told['device']}")
        table.add_row("under way", ", ".join(f"{n} {kind}" for kind, n in busy.items() if n and kind != "total") or "–")
        table.add_row("waiting", ", ".join(f"{n} for {escape(to)}" for to, n in told["waiting"].items()) or "–")
        errors = ", ".join(f"{n} {name}" for name, n in figures["errors"].items()) or "none"
        table.add_row(f"errors since {figures['since']}", errors)
        if figures["verdicts"]:
            said = f"{figures['seconds_to_verdict']:.1f} s after the last image (median of {figures['verdicts']})"
            table.add_row("verdicts", said)
        for one in told["models"]:
            mark = f"runs as {one['mode']}" if one["runs"] else "[bold red]does not run[/]"
            table.add_row(f"model {escape(one['name'])}", f"{one['version'] or '?'}: {mark}; {escape(one['said'])}")
        for one in told["certificates"]:
            ends = one["problem"] or f"ends on {one['until']}, in {one['days']} days"
            table.add_row(f"certificate of {escape(one['what'])}", escape(ends))
        out.print(table)
    if idle and told["in_flight"]["total"]:
        raise typer.Exit(1)
