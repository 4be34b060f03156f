"""`scanside models approve`, `suspend`, `retire`, `except`, `revoke`, `history`: what the site's board decides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from appliance.console import Json, emit, guard, out, read_settings
from appliance.models_cli import app, load_named
from appliance.settings import Settings
from dicom_io.errors import ScansideError

if TYPE_CHECKING:
    from appliance.governance.board import Decision
    from appliance.governance.package import Package
    from appliance.ledger.store import Ledger

__all__ = ["app"]

Name = Annotated[str, typer.Argument(help="A package of the repository.")]
Who = Annotated[str, typer.Option(help="Who answers for it.")]
Why = Annotated[str, typer.Option(help="The reason.")]
Until = Annotated[datetime, typer.Option(formats=["%Y-%m-%d"], help="The last day on which it holds.")]
Evidence = Annotated[
    Path | None, typer.Option(exists=True, dir_okay=False, help="A file that it rests on; a copy of it is kept.")
]


class RunAs(StrEnum):
    """The modes that the board can approve."""

    CLINICAL = "clinical"
    SHADOW = "shadow"
    EVALUATION = "evaluation"


@contextmanager
def _board(settings: Settings) -> Iterator[Ledger]:
    """The ledger to decide in; a running box hears of it at once."""
    from appliance.ledger.doorbell import ring
    from appliance.ledger.store import Ledger

    ledger = Ledger(settings.ledger_path)
    try:
        yield ledger
    finally:
        ledger.close()
    for service in ("engine", "delivery"):
        ring(settings.run_directory, service)


@app.command()
@guard
def approve(
    name: Annotated[str, typer.Argument(help="A package of the repository, or the folder of one that is to come.")],
    mode: Annotated[RunAs, typer.Option(help="clinical alerts; shadow tells nobody; evaluation is stamped as such.")],
    who: Who,
    why: Why,
    until: Until,
    evidence: Evidence = None,
    as_json: Json = False,
) -> None:
    """Let a version of a package run on this box: the one that lies there, or the one in a folder that is to come."""
    from appliance.governance import board

    settings, _ = read_settings()
    package = load_named(settings, name)  # a folder is a release that is installed and does not run yet
    with _board(settings) as ledger:
        decision = board.approve(
            ledger, settings.evidence_directory, package, mode.value, who=who, why=why, until=until.date(),
            evidence=evidence,
        )  # fmt: skip
    _tell(decision, as_json=as_json)


@app.command()
@guard
def suspend(
    name: Name,
    who: Who,
    why: Why,
    version: Annotated[
        str | None, typer.Option(help="Only this version, whether it lies there or comes back; others run on.")
    ] = None,
    evidence: Evidence = None,
    as_json: Json = False,
) -> None:
    """Stop a package at once, in every version or in one, and withdraw what waits to be sent of it."""
    from appliance.governance import board

    settings, _ = read_settings()
    if version is not None:
        with _board(settings) as ledger:
            decision = board.suspend_version(
                ledger, settings.evidence_directory, name, version, who=who, why=why, evidence=evidence
            )
        _tell(decision, as_json=as_json)
        return
    there: Package | None = None
    try:
        there = _package(settings, name)
    except ScansideError:  # what is broken must be stopped all the same, but not what nobody knows
        there_at_all = "/" not in name and (settings.model_repository / name / "package.toml").exists()
        if name not in settings.models.packages and not there_at_all:
            raise
    with _board(settings) as ledger:
        decision = board.suspend(ledger, settings.evidence_directory, name, there, who=who, why=why, evidence=evidence)
    _tell(decision, as_json=as_json)


@app.command()
@guard
def retire(name: Name, who: Who, why: Why, evidence: Evidence = None, as_json: Json = False) -> None:
    """Stop the version of a package that lies there for good."""
    from appliance.governance import board

    settings, _ = read_settings()
    package = _package(settings, name)
    with _board(settings) as ledger:
        decision = board.retire(ledger, settings.evidence_directory, package, who=who, why=why, evidence=evidence)
    _tell(decision, as_json=as_json)


@app.command("except")
@guard
def except_(
    name: Name,
    criterion: Annotated[str, typer.Argument(help="A criterion of its label, as `scanside study` shows it.")],
    who: Who,
    why: Why,
    until: Until,
    evidence: Evidence = None,
    as_json: Json = False,
) -> None:
    """Let studies pass of which a criterion is unknown; what contradicts the label is refused all the same."""
    from appliance.governance import board

    settings, _ = read_settings()
    package = _package(settings, name)
    with _board(settings) as ledger:
        decision = board.make_exception(
            ledger, settings.evidence_directory, package, criterion, who=who, why=why, until=until.date(),
            evidence=evidence,
        )  # fmt: skip
    _tell(decision, as_json=as_json)


@app.command()
@guard
def revoke(
    record: Annotated[int, typer.Argument(help="Number of the exception's record.")],
    who: Who,
    why: Why,
    evidence: Evidence = None,
    as_json: Json = False,
) -> None:
    """Take an exception back."""
    from appliance.governance import board

    settings, _ = read_settings()
    with _board(settings) as ledger:
        decision = board.revoke(ledger, settings.evidence_directory, record, who=who, why=why, evidence=evidence)
    _tell(decision, as_json=as_json)


@app.command()
@guard
def history(
    name: Annotated[str | None, typer.Argument(help="A package; all if omitted.")] = None, as_json: Json = False
) -> None:
    """List what the board decided, and what of it holds."""
    from appliance.governance.board import read_board
    from appliance.ledger.store import Ledger

    settings, _ = read_settings()
    if not settings.ledger_path.exists():
        raise ScansideError("there is no ledger yet", str(settings.ledger_path), "start scanside first")
    ledger = Ledger(settings.ledger_path)
    try:
        board = read_board(ledger)
    finally:
        ledger.close()
    wanted = [one for one in board.decisions if name in (None, one.package)]
    if as_json:
        emit([{**one.row(), "holds": board.holds(one.record, date.today())} for one in wanted])
        return
    table = Table("record", "at (UTC)", "package", "decision", "who", "why", "holds", box=None)
    for one in wanted:
        holds = "[green]yes[/]" if board.holds(one.record, date.today()) else "no"
        table.add_row(
            str(one.record),
            one.at[:16].replace("T", " "),
            escape(f"{one.package} {one.version}"),
            escape(one.said),
            escape(one.who),
            escape(one.why) + (f" [{escape(one.evidence)}]" if one.evidence else ""),
            holds,
        )
    out.print(table if wanted else "the board has decided nothing yet")
    if board.fault:
        raise ScansideError(board.fault, str(settings.ledger_path), "`scanside audit verify` says more")


def _package(settings: Settings, name: str) -> Package:
    if "/" in name:
        raise ScansideError("that is a folder", name, "name a package of the repository: that is what runs")
    return load_named(settings, name)


def _tell(decision: Decision, *, as_json: bool) -> None:
    if as_json:
        emit(decision.row())
        return
    said = f"record {decision.record}: {decision.package} {decision.version} {decision.said}, by {decision.who}"
    out.print(said, highlight=False, soft_wrap=True, markup=False)
