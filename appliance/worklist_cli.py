"""`scanside worklist` serves the worklist, `scanside workitems` shows it."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from appliance.console import Json, State, emit, guard, out, read_settings
from dicom_io.errors import ScansideError


@guard
def worklist() -> None:
    """Run the worklist that the settings speak of: work items over UPS-RS and DIMSE."""
    from appliance.services.process import log_as
    from appliance.services.worklist import run_worklist

    settings, _ = read_settings()
    log_as(settings.box.log_level, machine=State.json_log)
    run_worklist(settings)


@guard
def workitems(
    everything: Annotated[bool, typer.Option("--all", help="Also those that have ended.")] = False,
    as_json: Json = False,
) -> None:
    """Show the work items of this box, the most urgent first, and what the box says of each."""
    from appliance.ledger.store import Ledger
    from dicom_io.workitem import FINAL, Step, studies_of, text

    settings, _ = read_settings()
    if not settings.ledger_path.exists():
        raise ScansideError("there is no ledger yet", str(settings.ledger_path), "start scanside first")
    ledger = Ledger(settings.ledger_path)
    try:
        found: list[Step] = ledger.find_workitems({}, 100_000)
    finally:
        ledger.close()
    shown = [one for one in found if everything or text(one, "ProcedureStepState") not in FINAL]
    if as_json:
        emit(shown)
        return
    if not shown:
        out.print("no work item" if everything else "no open work item")
        return
    table = Table("priority", "state", "label", "study", "comments", box=None)
    for one in shown:
        priority = text(one, "ScheduledProcedureStepPriority")
        table.add_row(
            f"[bold red]{priority}[/]" if priority == "HIGH" else priority,
            text(one, "ProcedureStepState"),
            escape(text(one, "ProcedureStepLabel")),
            escape(", ".join(studies_of(one)) or "–"),
            escape(text(one, "CommentsOnTheScheduledProcedureStep")),
        )
    out.print(table)
