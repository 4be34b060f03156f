"""`scanside gate`: what the gate would say of a folder, and what it said of a scanner's studies."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from appliance.console import Json, emit, err, guard, out, read_settings
from appliance.settings import Settings
from dicom_io.errors import ScansideError

if TYPE_CHECKING:
    from appliance.governance.board import Board
    from appliance.governance.package import Package

app = typer.Typer(
    help="The indication gate: which studies a package may see, and which it was not let see.", no_args_is_help=True
)

REPORTED_DAYS = 30


@app.command()
@guard
def test(
    directory: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder, searched below too.")],
    as_json: Json = False,
) -> None:
    """Judge the studies of a folder by every package; nothing is stored, sent or asked of a model."""
    from appliance import show
    from appliance.governance.board import integrity
    from appliance.governance.indication import Admission
    from appliance.services.dry_run import judge, read_folder

    settings, _ = read_settings()
    (packages, broken), board = _packages(settings), _board(settings)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    found: list[tuple[str, str, str, Admission]] = []
    with Progress(*bar, console=err, transient=True) as progress:
        reading = progress.add_task("headers", total=len(files))
        folder = read_folder(files, lambda: progress.advance(reading))
        judging = progress.add_task("studies", total=len(folder.studies))
        for uid, study in folder.studies.items():
            for package, admission in judge(packages, study, board.exceptions):
                approval, _ = board.judge(package)
                found.append(
                    (
                        uid,
                        package.name,
                        package.version,
                        Admission((*admission.criteria, approval, integrity(package, ""))),
                    )
                )
            for name, problem in broken.items():
                found.append((uid, name, "", Admission((integrity(None, problem),))))
            progress.advance(judging)
    if not found:
        raise ScansideError("there is no DICOM instance", str(directory), "name a folder that has some")
    if folder.skipped:
        err.print(f"{len(folder.skipped)} files are no DICOM instances", highlight=False)
    if as_json:
        emit(
            [
                {
                    "study": uid,
                    "package": name,
                    "decision": "admitted" if admission.admitted else "refused",
                    "criteria": [criterion.row() for criterion in admission.criteria],
                }
                for uid, name, _, admission in found
            ]
        )
        return
    for uid, name, version, admission in found:
        decision = "[green]admitted[/]" if admission.admitted else "[yellow]refused[/]"
        out.print(f"study {escape(uid)}", highlight=False, soft_wrap=True)
        out.print(f"by {escape(f'{name} {version}'.strip())}: {decision}", highlight=False)
        out.print(show.admission_table(admission.to_json()))


@dataclass(slots=True)
class _Kind:
    """The studies of one scanner, by one package."""

    scanner: str
    package: str
    admitted: int = 0
    refused: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    @property
    def misconfigured(self) -> bool:
        """Whether no study of it was ever let in."""
        return self.refused > 0 and not self.admitted

    def row(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "scanner": self.scanner,
            "package": self.package,
            "admitted": self.admitted,
            "refused": self.refused,
            "reasons": [
                {"criterion": name, "studies": count, "example": self.examples[name]}
                for name, count in self.reasons.most_common()
            ],
            "every_study_refused": self.misconfigured,
        }


@app.command()
@guard
def report(
    from_: Annotated[
        datetime | None,
        typer.Option("--from", formats=["%Y-%m-%d"], help=f"First day (UTC); {REPORTED_DAYS} days ago if omitted."),
    ] = None,
    to: Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Last day (UTC); today if omitted.")] = None,
    as_json: Json = False,
) -> None:
    """Say how many studies of each scanner were refused, and why; warn of one whose every study was."""
    last = to.date() if to else datetime.now(UTC).date()
    first = from_.date() if from_ else last - timedelta(REPORTED_DAYS)
    if first > last:
        raise typer.BadParameter(f"{first} is after {last}", param_hint="--from")
    kinds = _kinds(read_settings()[0], first, last)
    if as_json:
        emit({"from": str(first), "to": str(last), "scanners": [one.row() for one in kinds]})
        return
    if not kinds:
        out.print(f"no study was decided on from {first} to {last}", highlight=False)
        return
    table = Table("scanner", "package", "admitted", "refused", "why", box=None)
    for one in kinds:
        why = "\n".join(f"{count} × {escape(one.examples[name])}" for name, count in one.reasons.most_common())
        refused = f"[bold red]{one.refused}[/]" if one.misconfigured else str(one.refused)
        table.add_row(escape(one.scanner), escape(one.package), str(one.admitted), refused, why or "–")
    out.print(table)
    for one in kinds:
        if one.misconfigured:
            out.print(
                f"[bold red]warning:[/] every study of {escape(one.scanner)} was refused by {escape(one.package)} "
                f"({one.refused} of {one.refused}): the scanner's headers or the site's limits want looking at",
                soft_wrap=True,
                highlight=False,
            )


def _kinds(settings: Settings, first: date, last: date) -> list[_Kind]:
    """What was decided on the studies that were complete within those days, most refused first."""
    from appliance.governance.indication import Criterion
    from appliance.ledger.store import Ledger
    from appliance.ledger.views import decisions

    if not settings.ledger_path.exists():
        raise ScansideError("there is no ledger yet", str(settings.ledger_path), "start scanside first")
    kinds: dict[tuple[str, str], _Kind] = {}
    ledger = Ledger(settings.ledger_path)
    try:
        rows = decisions(ledger, first, last)
    finally:
        ledger.close()
    for row in rows:
        criteria = [Criterion(**one) for one in row["admission"]]
        who = next((one.value for one in criteria if one.criterion == "scanner"), "") or "a scanner that is not known"
        kind = kinds.setdefault((who, row["package"]), _Kind(who, row["package"]))
        if row["state"] != "refused":
            kind.admitted += 1
            continue
        kind.refused += 1
        for one in criteria:
            if not one.met:
                kind.reasons[one.criterion] += 1
                kind.examples.setdefault(one.criterion, str(one))
    return sorted(kinds.values(), key=lambda one: (-one.refused, one.scanner, one.package))


def _packages(settings: Settings) -> tuple[list[Package], dict[str, str]]:
    """What runs here, and whatever else of the repository can be loaded; what should run and cannot be, and why."""
    from appliance.governance.integrity import load_sound
    from appliance.governance.package import load_configured

    sound, broken = load_sound(settings)
    packages = list(sound)
    there = {path.parent.name for path in settings.model_repository.glob("*/package.toml")}
    for name in sorted(there - set(settings.models.packages)):
        try:
            packages += load_configured(settings, [name])
        except ScansideError as error:
            err.print(f"[yellow]left out:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
    return packages, broken


def _board(settings: Settings) -> Board:
    """What the board decided, as far as its records can be trusted; nothing, where no ledger is yet."""
    from appliance.governance.board import Board, read_board
    from appliance.ledger.store import Ledger
    from appliance.operations.audit import standing

    if not settings.ledger_path.exists():
        return Board()
    ledger = Ledger(settings.ledger_path)
    try:
        return read_board(ledger, standing(ledger, settings.head_path)[1])
    finally:
        ledger.close()
