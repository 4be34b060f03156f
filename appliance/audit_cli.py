"""`scanside audit`: whether the record of what this box did is whole."""

from __future__ import annotations

import re
from dataclasses import asdict
from operator import attrgetter
from typing import Annotated

import typer
from rich.markup import escape

from appliance.console import Json, emit, guard, out, read_settings
from dicom_io.errors import ScansideError

app = typer.Typer(help="The chain of events: whether all that this box wrote down is there, unchanged.",
                  no_args_is_help=True)  # fmt: skip


@app.callback()
def _only_a_group() -> None:
    """One command so far, called by its name all the same."""


@app.command()
@guard
def verify(
    head: Annotated[
        str | None, typer.Option(help="A head NUMBER:HASH that was noted elsewhere, as the log of the engine has it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Walk the whole chain of events and read the board's evidence; name the first event that is wrong."""
    from appliance.ledger.chain import Fault, Head, walk_all
    from appliance.ledger.store import Ledger
    from appliance.operations.audit import lost_evidence, read_head

    settings, _ = read_settings()
    if head is not None and not re.fullmatch(r"[1-9][0-9]{0,17}:[0-9a-f]{64}", head):
        raise typer.BadParameter(f"{head!r} is not NUMBER:HASH", param_hint="--head")
    if not settings.ledger_path.exists():
        raise ScansideError("there is no ledger yet", str(settings.ledger_path), "start scanside first")
    number, _, digest = (head or "").partition(":")
    given = [Head(int(number), digest)] if head else []
    noted, fault = None, None
    try:
        noted = read_head(settings.head_path)
    except ScansideError as error:
        fault = Fault(0, "", f"{error.where}: {error.what}")
    ledger = Ledger(settings.ledger_path)
    try:
        last, wrong = walk_all(ledger, [*given, *([noted] if noted else [])])
        lost = lost_evidence(ledger, settings.evidence_directory)
    finally:
        ledger.close()
    fault = min((one for one in (wrong, lost) if one), key=attrgetter("event"), default=fault)
    if as_json:
        emit(
            {
                "ok": fault is None,
                "events": last.event,
                "head": f"{last.event}:{last.hash}",
                "noted": f"{noted.event}:{noted.hash}" if noted else None,
                "fault": asdict(fault) if fault else None,
            }
        )
    elif fault:
        out.print(f"[bold red]NOT whole:[/] {escape(str(fault))}", highlight=False, soft_wrap=True)
        out.print(f"{last.event} events follow from one another", highlight=False)
    else:
        out.print(f"[green]whole[/]: {last.event} events", highlight=False)
        out.print(f"head {last.event}:{last.hash} (note it elsewhere)", highlight=False, soft_wrap=True)
        held = f"event {noted.event}, as {settings.head_path} notes it" if noted else "no earlier head: none is noted"
        out.print(f"it was held against {held}", highlight=False, soft_wrap=True)
    if fault:
        raise typer.Exit(1)
