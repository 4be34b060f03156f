"""`scanside hl7`: what the hospital is told of a study, and what it said."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from appliance.console import Json, emit, guard, out, read_settings
from dicom_io.errors import ScansideError

app = typer.Typer(
    help="The messages that tell the hospital of a verdict, and those that it sends.", no_args_is_help=True
)


@app.command()
@guard
def preview(
    study: Annotated[str, typer.Argument(help="Study Instance UID, or the study's number.")], as_json: Json = False
) -> None:
    """Show what a study's verdict tells each destination by the settings as they are now; nothing is sent.

    It exits with 1 if there is no verdict yet, a message is invalid and would not be sent, or a template failed.
    """
    from appliance.ledger.store import Ledger
    from appliance.ledger.views import find_study
    from appliance.services.telling import preview as show

    settings, _ = read_settings()
    if not settings.ledger_path.exists():
        raise ScansideError("there is no ledger yet", str(settings.ledger_path), "start scanside first")
    ledger = Ledger(settings.ledger_path)
    try:
        key = find_study(ledger, study)
        if key is None:
            raise ScansideError("there is no such study", study, "`scanside studies` lists them")
        found = show(settings, ledger, key)
    finally:
        ledger.close()
    if as_json:
        emit(
            [
                {
                    "study": key,
                    "package": one.package,
                    "revision": one.revision,
                    "positive": one.positive,
                    "said": one.said,
                    "messages": [
                        {
                            "destination": told.destination.name,
                            "channel": told.destination.kind,
                            "kind": told.kind,
                            "id": told.id,
                            "after_seconds": told.held_seconds,
                            "fault": told.fault,
                            "unmapped": told.unmapped,
                            "reduced": told.reduced,
                            "content": told.content.decode("utf-8"),
                        }
                        for told in one.messages
                    ],
                }
                for one in found
            ]
        )
    else:
        for one in found:
            answer = "positive" if one.positive else "not positive"
            said = f": {one.said}" if one.said else ""
            out.print(f"{escape(one.package)}, revision {one.revision}, {answer}{escape(said)}", highlight=False)
            for told in one.messages:
                when = f", after {told.held_seconds:g} s without an acknowledgement" if told.held_seconds else ""
                valid = f"  [bold red]invalid, never sent:[/] {escape(told.fault)}" if told.fault else ""
                name = escape(told.destination.name)
                out.print(f"\n[bold]{name}[/] ({told.destination.kind}, {told.kind}{when}){valid}", highlight=False)
                if told.reduced:
                    said = f"[bold red]a reduced message, as the whole one failed:[/] {escape(told.reduced)}"
                    out.print(said, highlight=False, soft_wrap=True)
                if told.unmapped:
                    said = f"[bold red]the standard message, as the template failed:[/] {escape(told.unmapped)}"
                    out.print(said, highlight=False, soft_wrap=True)
                text = told.content.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
                out.print(text, markup=False, highlight=False, soft_wrap=True)
    if any(told.fault or told.unmapped or told.reduced for one in found for told in one.messages):
        raise typer.Exit(1)


@app.command()
@guard
def received(
    number: Annotated[int | None, typer.Argument(help="Number of a message: shows it as it came.")] = None,
    refused: Annotated[bool, typer.Option("--refused", help="Only those that could not be used.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="So many, the newest first.")] = 20,
    as_json: Json = False,
) -> None:
    """List the HL7 messages that came, with what was answered and why; or show one of them."""
    from appliance.ledger.store import Ledger

    settings, _ = read_settings()
    if not settings.ledger_path.exists():
        raise ScansideError("there is no ledger yet", str(settings.ledger_path), "start scanside first")
    ledger = Ledger(settings.ledger_path)
    try:
        content = ledger.message_content(number) if number is not None else None
        rows = ledger.messages(limit, refused=refused) if number is None else []
    finally:
        ledger.close()
    if number is not None:
        if content is None:
            remedy = "`scanside hl7 received` lists them; their text goes after intake.hl7.keep_days"
            raise ScansideError("there is no such message, or its text was removed", str(number), remedy)
        text = content.decode("utf-8", "backslashreplace")
        if as_json:
            emit({"message": number, "content": text})
        else:
            out.print(text.replace("\r\n", "\n").replace("\r", "\n"), markup=False, highlight=False, soft_wrap=True)
    elif as_json:
        emit(rows)
    else:
        table = Table("no.", "came (UTC)", "from", "kind", "MSH-10", "answer", "why", box=None)
        for row in rows:
            code = row["code"] if row["code"] == "AA" else f"[bold red]{row['code']}[/]"
            table.add_row(
                str(row["id"]), row["received_at"][:19].replace("T", " "), row["peer"], escape(row["kind"]),
                escape(row["control_id"]), code, escape(row["reason"]),
            )  # fmt: skip
        out.print(table if rows else "no message came yet")
