"""The `scanside` command.

Exit codes: 0 it worked; 1 it did not (a check failed, an instance was refused, no such study); 2 the command line or
the configuration is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from appliance import (
    __version__,
    audit_cli,
    bench_cli,
    board_cli,
    bundle_cli,
    gate_cli,
    hl7_cli,
    init,
    ledger_cli,
    retry_cli,
    selftest_cli,
    status_cli,
    worklist_cli,
)
from appliance.console import Json, State, emit, err, guard, out, read_settings
from appliance.settings import Settings
from dicom_io.errors import ScansideError

if TYPE_CHECKING:
    from appliance.ledger.store import Ledger
    from dicom_io.scu import Peer

app = typer.Typer(
    help="The box beside the CT scanner: DICOM in, haemorrhage triage, alert and findings out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(board_cli.app, name="models")
app.add_typer(gate_cli.app, name="gate")
app.add_typer(audit_cli.app, name="audit")
app.add_typer(bench_cli.app, name="bench")
app.add_typer(hl7_cli.app, name="hl7")
app.add_typer(ledger_cli.app, name="ledger")
app.add_typer(bundle_cli.app, name="bundle")
app.command("status")(status_cli.status)
app.command("retry")(retry_cli.retry)
app.command("worklist")(worklist_cli.worklist)
app.command("workitems")(worklist_cli.workitems)
app.command("selftest")(selftest_cli.selftest)


class Bleed(StrEnum):
    """The subtypes that a phantom can have."""

    EPIDURAL = "epidural"
    INTRAPARENCHYMAL = "intraparenchymal"
    INTRAVENTRICULAR = "intraventricular"
    SUBARACHNOID = "subarachnoid"
    SUBDURAL = "subdural"


@contextmanager
def _ledger() -> Iterator[Ledger]:
    from appliance.ledger.store import Ledger

    settings, _ = read_settings()
    if not settings.ledger_path.exists():
        raise ScansideError("there is no ledger yet", str(settings.ledger_path), "start scanside first")
    ledger = Ledger(settings.ledger_path)
    try:
        yield ledger
    finally:
        ledger.close()


def _peer(text: str) -> Peer:
    from dicom_io.scu import Peer

    title, _, address = text.partition("@")
    host, _, port = address.rpartition(":")
    if not (0 < len(title) <= 16 and host and port.isdecimal() and 0 < int(port) < 65536):
        raise typer.BadParameter(f"{text!r} is not AE@host:port, for example SCANSIDE@127.0.0.1:11112")
    return Peer(title, host, int(port))


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"scanside {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    config: Annotated[
        Path | None,
        typer.Option(help="Configuration file; else SCANSIDE_CONFIG, ./scanside.toml, /etc/scanside/scanside.toml."),
    ] = None,
    json_log: Annotated[bool, typer.Option("--json-log", help="Log one JSON object a line.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    State.config = config
    State.json_log = json_log


# --- setting up -----------------------------------------------------------------------------------------


@app.command("init")
@guard
def init_(
    directory: Annotated[Path, typer.Argument(help="Folder for the configuration and all data.")],
    pacs: Annotated[str | None, typer.Option(help="PACS that receives findings, as AE@host:port.")] = None,
    orthanc: Annotated[str | None, typer.Option(help="Orthanc that receives findings, as AE@host:port.")] = None,
    dicomweb: Annotated[str | None, typer.Option(help="DICOMweb archive that receives findings, as a URL.")] = None,
    hl7: Annotated[str | None, typer.Option(help="Interface engine that receives alerts, as host:port.")] = None,
    port: Annotated[int, typer.Option(help="DICOM port to listen on.")] = 11112,
    ae_title: Annotated[str, typer.Option(help="Our application entity title.")] = "SCANSIDE",
) -> None:
    """Write a working configuration and make its folders."""
    destinations: list[dict[str, Any]] = []
    for name, asked in (("pacs", pacs), ("orthanc", orthanc)):
        if asked:
            peer = _peer(asked)
            address = {"ae_title": peer.ae_title, "host": peer.host, "port": peer.port}
            destinations.append({"name": name, **init.PRESETS[name], **address})
    if dicomweb:
        destinations.append({"name": "dicomweb", **init.PRESETS["dicomweb"], "url": dicomweb})
    if hl7:
        host, _, number = hl7.rpartition(":")
        if not host or not number.isdecimal():
            raise typer.BadParameter(f"{hl7!r} is not host:port")
        destinations.append({"kind": "hl7", "name": "hl7", "host": host, "port": int(number)})
    path = init.write(directory, {"intake": {"port": port, "ae_title": ae_title}}, destinations)
    out.print(f"wrote {escape(str(path))}", highlight=False, soft_wrap=True)
    if not destinations:
        out.print("It names no destination yet: add a [[destination]], or run init with --pacs and --hl7.")
    out.print(f"next: scanside --config {escape(str(path))} check", highlight=False, soft_wrap=True)


@app.command()
@guard
def check(
    settings_only: Annotated[
        bool, typer.Option("--settings-only", help="Only validate the configuration file; exit with 2 if it is wrong.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Validate the configuration, reach every destination, ask Triton whether the models are ready."""
    from appliance.checks import run_checks

    settings, path = read_settings()
    if settings_only:
        return
    results = run_checks(settings)
    if as_json:
        emit({"config": str(path), "checks": [{"check": r.check, "ok": r.ok, "detail": r.detail} for r in results]})
    else:
        table = Table("check", "", "detail", box=None)
        for result in results:
            mark = "[green]ok[/]" if result.ok else "[bold red]failed[/]"
            table.add_row(escape(result.check), mark, escape(result.detail))
        out.print(table)
    if not all(result.ok for result in results):
        raise typer.Exit(1)


# --- services -------------------------------------------------------------------------------------------


def _serve(service: Callable[[Settings], None]) -> None:
    from appliance.services.process import log_as

    settings, _ = read_settings()
    log_as(settings.box.log_level, machine=State.json_log)
    service(settings)


@app.command()
@guard
def run() -> None:
    """Run every service in the foreground, for one machine."""
    from appliance.supervisor import run_all

    settings, path = read_settings()
    _serve(lambda _: run_all(settings, path, json_log=State.json_log))


@app.command()
@guard
def intake() -> None:
    """Run the DICOM intake."""
    from appliance.services.intake import run_intake

    _serve(run_intake)


@app.command()
@guard
def engine() -> None:
    """Run the engine: completeness, admission, inference, findings."""
    from appliance.services.running import run_engine

    _serve(run_engine)


@app.command()
@guard
def deliver() -> None:
    """Run the delivery of alerts and findings."""
    from appliance.services.delivery import run_delivery

    _serve(run_delivery)


@app.command()
@guard
def triton() -> None:
    """Run the Triton server with the configured model packages."""
    from appliance.supervisor import run_triton

    _serve(run_triton)


@app.command()
@guard
def alarm(
    unit: Annotated[str, typer.Argument(help="What failed, such as scanside-engine.service.")],
    result: Annotated[str, typer.Option(help="How, in systemd's word, such as watchdog or exit-code.")] = "",
) -> None:
    """Write into the ledger that a unit of systemd failed; for OnFailure=."""
    from appliance.events import Event

    with _ledger() as ledger:
        ledger.log(Event.SERVICE_FAILED, unit=unit, result=result)


# --- DICOM tools ----------------------------------------------------------------------------------------


@app.command()
@guard
def echo(
    to: Annotated[str, typer.Argument(help="AE@host:port.")],
    calling: Annotated[str, typer.Option(help="AE title to call with.")] = "SCANSIDE",
) -> None:
    """Ask a DICOM node whether it answers (C-ECHO)."""
    from dicom_io.scu import echo as ask

    ask(_peer(to), calling)
    out.print(f"{escape(to)} answers", highlight=False)


@app.command()
@guard
def send(
    directory: Annotated[Path, typer.Argument(exists=True, help="Folder of DICOM files, searched below too.")],
    to: Annotated[str, typer.Option(help="AE@host:port.")],
    calling: Annotated[str, typer.Option(help="AE title to call with.")] = "SCANSIDE",
    as_json: Json = False,
) -> None:
    """Send the DICOM instances of a folder to a node (C-STORE)."""
    from dicom_io.scu import instances_in
    from dicom_io.scu import send as store

    peer = _peer(to)
    files, skipped = instances_in(directory)
    if not files:
        raise ScansideError("there is no DICOM instance", str(directory), "name a folder that has some")
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=err
    ) as progress:
        task = progress.add_task(f"to {escape(to)}", total=len(files))
        results = store(files, peer, calling, on_sent=lambda _: progress.advance(task))
    failed = [result for result in results if result.error]
    if as_json:
        emit(
            {
                "sent": len(results) - len(failed),
                "failed": [{"path": str(r.path), "status": r.status, "error": r.error} for r in failed],
                "skipped": [{"path": str(path), "reason": reason} for path, reason in skipped],
            }
        )
    else:
        for result in failed:
            err.print(f"[red]not stored:[/] {escape(str(result.path))}: {escape(result.error)}", soft_wrap=True)
        said = f"{len(results) - len(failed)} stored, {len(failed)} failed"
        out.print(said + (f", {len(skipped)} files are no DICOM instances" if skipped else ""), highlight=False)
    if failed:
        raise typer.Exit(1)


@app.command()
@guard
def phantom(
    out_: Annotated[Path, typer.Option("--out", help="Folder to write the study to.")],
    bleed: Annotated[list[Bleed] | None, typer.Option(help="Subtype of haemorrhage, once for each.")] = None,
    volume: Annotated[float | None, typer.Option(min=0.03, max=150.0, help="Of each bleed, in mL.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same study, bit for bit.")] = 1,
    thickness: Annotated[float | None, typer.Option(min=0.5, max=10.0, help="Slice thickness in mm.")] = None,
    look_alike: Annotated[
        list[str] | None, typer.Option(help="What is bright or dark and no blood, once for each; `list` names them.")
    ] = None,
    vendor: Annotated[str, typer.Option(help="Whose scanner writes it; `list` names them.")] = "",
    tilt: Annotated[
        float, typer.Option(min=-30.0, max=30.0, help="Of the gantry, degrees; above 0: the front nearer the crown.")
    ] = 0.0,
    random: Annotated[
        bool, typer.Option("--random", help="Draw bleeds, look-alikes, scanner and all from the seed instead.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a simulated head CT: DICOM files, and the truth beside them."""
    from triton_models.training import phantom as simulator
    from triton_models.training.lookalikes import KINDS
    from triton_models.training.vendors import VENDORS

    vendors = [name for name in VENDORS if name]
    for option, given, there in (
        ("--look-alike", look_alike or [], KINDS),
        ("--vendor", [vendor] if vendor else [], vendors),
    ):
        for one in given:
            if one not in there:
                raise typer.BadParameter(f"there are {', '.join(there)}", param_hint=option)
    if random and (bleed or volume or look_alike or vendor or tilt):
        raise typer.BadParameter("it draws what the other options would say", param_hint="--random")
    with Progress(console=err, transient=True) as progress:
        task = progress.add_task("simulating a head", total=None)
        if random:
            made = simulator.study(seed, size=512, thickness_mm=thickness)
        else:
            try:
                made = simulator.simulate(
                    seed,
                    bleed=[one.value for one in bleed or []],
                    volume_ml=volume,
                    thickness_mm=5.0 if thickness is None else thickness,
                    look_alikes=look_alike or (),
                    vendor=vendor,
                    tilt_deg=tilt,
                )
            except ValueError as error:  # this very head has no place for it
                raise ScansideError(str(error), f"seed {seed}", "take another seed") from error
        progress.update(task, description="writing instances", total=len(made.hu), completed=0)
        files = simulator.write_study(made, out_, on_written=lambda: progress.advance(task))
    if as_json:
        emit(
            {
                "directory": str(out_),
                "instances": len(files),
                "volume_ml": made.volume_ml,
                "look_alikes": list(made.look_alikes),
                "vendor": made.vendor or None,
                "kernel": made.kernel,
                "thickness_mm": made.thickness_mm,
                "tilt_deg": made.tilt_deg,
            }
        )
    else:
        truth = ", ".join(f"{name} {volume:.1f} mL" for name, volume in made.volume_ml.items()) or "no bleed"
        beside = f"; {', '.join(made.look_alikes)}" if made.look_alikes else ""
        said = f"wrote {len(files)} instances to {escape(str(out_))} ({truth}{beside})"
        out.print(said, highlight=False, soft_wrap=True)


# --- looking --------------------------------------------------------------------------------------------


@app.command()
@guard
def studies(
    limit: Annotated[int, typer.Option(min=1, help="At most this many, the newest first.")] = 50,
    as_json: Json = False,
) -> None:
    """List the studies: state, verdict, seconds to the alert, open and dead deliveries."""
    from appliance import show
    from appliance.ledger import views

    budget = read_settings()[0].budget.seconds
    with _ledger() as ledger:
        reports = views.studies(ledger, limit)
        troubles = views.troubles(ledger)
    if as_json:
        emit([show.summary(report, budget) for report in reports])
    else:
        out.print(show.studies_table(reports, troubles, budget))


@app.command()
@guard
def study(
    uid: Annotated[str, typer.Argument(help="Study Instance UID, or the number that `scanside studies` shows.")],
    as_json: Json = False,
) -> None:
    """Show one study: order, timeline, series, admission, verdict, deliveries."""
    from appliance import show
    from appliance.ledger import views
    from appliance.services.orders import said_of

    with _ledger() as ledger:
        key = views.find_study(ledger, uid)
        if key is None:
            raise ScansideError("there is no such study", uid, "`scanside studies` lists them")
        report = {**views.study_report(ledger, key), "said": said_of(read_settings()[0], ledger, key)}
    if as_json:
        emit({**report, "timeline": views.timeline(report)})
    else:
        out.print(show.study_view(report))


@app.command()
@guard
def accounting(
    day: Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Day in UTC; today if omitted.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Also compare every file with its digest.")] = False,
    as_json: Json = False,
) -> None:
    """Prove for a day that what was received is kept, belongs to a study, and has an outcome."""
    from dataclasses import asdict

    from appliance.accounting import account

    settings, _ = read_settings()
    wanted = (day or datetime.now(UTC)).date()
    with _ledger() as ledger, Progress(console=err, transient=True) as progress:
        task = progress.add_task("looking at files")
        told = account(
            ledger,
            settings.spool_directory,
            wanted,
            verify=verify,
            on_file=lambda done, of: progress.update(task, completed=done, total=of),
        )
    if as_json:
        emit({**asdict(told), "day": told.day.isoformat(), "balanced": told.balanced})
    else:
        table = Table("", "", box=None, show_header=False)
        table.add_row(f"received on {told.day} (UTC)", str(told.received))
        table.add_row("  counted from the network, of associations that have ended", str(told.counted))
        if told.uncounted:
            table.add_row("  associations that nobody counted, as intake was killed", str(told.uncounted))
        for association, counted, recorded in told.differences:
            table.add_row(
                f"  [bold red]association {association} brought {counted}, of which the ledger has[/]", str(recorded)
            )
        for reason, count in told.refused.items():
            table.add_row(f"  refused: {escape(reason)}", str(count))
        table.add_row("  there already, the same bytes", str(told.duplicates))
        table.add_row("kept, different instances", str(told.kept))
        if told.removed:
            table.add_row("  of them removed since by retention", str(told.removed))
        for outcome, count in told.outcomes.items():
            table.add_row(f"  {escape(outcome)}", str(count))
        for digest in told.missing_rows:
            table.add_row(f"  [bold red]no row in the ledger:[/] {digest}", "1")
        for digest in told.missing_files:
            table.add_row(f"  [bold red]no such file in the spool, or changed:[/] {digest}", "1")
        for digest in told.stray_files:
            table.add_row(f"  [bold red]in the spool without a row:[/] {digest}", "1")
        out.print(table)
        out.print("[green]balanced[/]" if told.balanced else "[bold red]NOT balanced[/]")
    if not told.balanced:
        raise typer.Exit(1)


@app.command()
@guard
def retention(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Remove nothing; show what would go, and why not.")
    ] = False,
    release: Annotated[
        str | None, typer.Option(help="A study (UID or number) whose failures need not hold its files any longer.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Remove the files of finished studies as the running intake does by itself, and say what holds the others."""
    from dataclasses import asdict

    from appliance import show
    from appliance.intake.retention import Retention
    from appliance.ledger.views import find_study
    from appliance.services.process import only_one

    settings, _ = read_settings()
    with _ledger() as ledger:
        if release is not None:
            key = find_study(ledger, release)
            if key is None:
                raise ScansideError("there is no such study", release, "`scanside studies` lists them")
            ledger.release_study(key)
            if not as_json:
                out.print(f"study {key} is held by its failures no longer", highlight=False)
        keeper = Retention(ledger, settings)
        plan = keeper.plan()
        removed = 0
        if not dry_run and release is None:
            # Two of them, or one beside an intake that knows nothing of it, could delete what just comes again.
            with only_one(settings, "intake"):
                keeper.resume()
                removed = keeper.step()
    if as_json:
        emit({**asdict(plan), "dry_run": dry_run or release is not None, "removed": removed})
    else:
        out.print(show.retention_view(plan.low, plan.room.free, plan.goes, plan.may_go, plan.held))
        if not dry_run and release is None:
            out.print(f"{removed} studies removed", highlight=False)


@app.command()
@guard
def metrics() -> None:
    """Print the counters and gauges of this box (Prometheus text format)."""
    from appliance.operations.health import metrics_text

    with _ledger() as ledger:
        sys.stdout.write(metrics_text(ledger))


@app.command()
@guard
def demo(
    study_folder: Annotated[
        Path | None, typer.Option("--study", exists=True, help="Your own DICOM folder instead of two phantoms.")
    ] = None,
    directory: Annotated[Path, typer.Option(help="Folder for everything the demo makes; emptied first.")] = Path(
        "demo"
    ),
    as_json: Json = False,
) -> None:
    """Start the appliance and a hospital around it, scan patients, show the alert."""
    from appliance.demo.run import run_demo

    raise typer.Exit(run_demo(directory, study_folder, as_json=as_json))


def main() -> None:
    """The entry point."""
    app()


if __name__ == "__main__":
    main()
