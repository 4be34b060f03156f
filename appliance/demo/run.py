"""`scanside demo`: the appliance and a hospital around it on this machine, and a patient scanned."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import pydicom
from PIL import Image
from pydicom.uid import UID
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from appliance import init
from appliance.demo.hospital import SCANNER_AE, Hospital, start_hospital
from appliance.demo.orthanc import LOOPBACK, free_ports
from appliance.findings.render import SUMMARY
from appliance.governance.board import make_exception
from appliance.governance.package import load_configured
from appliance.inference.triton import TritonClient
from appliance.ledger.store import Ledger
from appliance.ledger.views import STEPS, find_study, study_report, timeline
from appliance.operations.leash import Leashed
from appliance.settings import Settings, load_settings
from dicom_io.errors import PeerError, ScansideError
from dicom_io.header import read_header
from dicom_io.scu import Peer, echo, instances_in, send
from dicom_io.sop_classes import STORAGE_CLASSES
from triton_models.training.phantom import simulate, write_study

BOX_AE = "SCANSIDE"
START_SECONDS = 90.0
STUDY_SECONDS = 180.0
MARKER = "MADE-BY-DEMO"
BLEED, BLEED_SEED, NORMAL_SEED = "intraparenchymal", 7, 19

Expected = Literal["positive", "negative"] | None


@dataclass(slots=True)
class Scan:
    """One study that the demo's scanner sends."""

    label: str
    files: list[Path]
    expected: Expected
    study_instance_uids: list[str]
    errors: list[str] = field(default_factory=list)
    sent: bool = False


def run_demo(directory: Path, study_folder: Path | None, *, as_json: bool) -> int:
    """Run the demo; 0 if all that it promises happened.

    Raises:
        ScansideError: the folder is somebody else's, or something does not start.
    """
    console = Console(stderr=as_json)
    signal.signal(signal.SIGTERM, _interrupt)
    directory = directory.resolve()
    _empty(directory)
    with ExitStack() as stack:
        try:
            return _run(directory, study_folder, console, stack, as_json=as_json)
        except KeyboardInterrupt:
            console.print("\nstopping …")
            return 130


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _empty(directory: Path) -> None:
    """Remove what an earlier demo left, and nothing else."""
    if directory.exists() and any(directory.iterdir()):
        if not (directory / MARKER).exists():
            raise ScansideError("this folder was not made by a demo", str(directory), "choose another --directory")
        for entry in directory.iterdir():  # the marker last: an interrupted run leaves a folder that is still ours
            if entry.name != MARKER:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MARKER).write_text(
        "Everything here was made by `scanside demo`, which empties it when it runs again.\n"
    )


def _run(directory: Path, study_folder: Path | None, console: Console, stack: ExitStack, *, as_json: bool) -> int:
    began = time.monotonic()
    console.rule("scanside demo · research use, not cleared")
    ports = free_ports(4)
    with console.status("starting the hospital: PACS and HL7 listener"):
        hospital = start_hospital(directory / "hospital", scanside_port=ports[0], scanside_ae=BOX_AE)
        stack.callback(hospital.stop)  # for a box that does not start
    console.print(
        f"PACS: {hospital.pacs.name}, AE {hospital.pacs.ae_title}, port {hospital.pacs.port}", highlight=False
    )
    settings = load_settings(_configure(directory, hospital, ports))
    if study_folder is not None:
        _except_age(settings)
    box = Leashed(
        [sys.executable, "-m", "appliance.cli", "--config", directory / "scanside.toml", "run"],
        log=directory / "scanside.log",
        grace=12.0,
    )
    stack.callback(_stop, box, hospital)
    with console.status("starting the appliance: intake, engine, Triton, delivery"):
        scans = [_own(study_folder, console)] if study_folder else _phantoms(directory / "scanner")
        _wait_until_ready(settings, box)
    console.print(
        f"appliance: ready after {time.monotonic() - began:.1f} s (log: {escape(str(directory / 'scanside.log'))})",
        soft_wrap=True,
    )
    ledger = Ledger(settings.ledger_path)
    stack.callback(ledger.close)
    for scan in scans:
        _to_pacs(scan, hospital, console)
        _scan(scan, settings, ledger, box, console)
    results = [result for scan in scans for result in _results(scan, settings, ledger, hospital, directory)]
    for result in results:
        _tell(result, directory, console)
    ok = bool(results) and all(result["ok"] for result in results)
    summary = {
        "ok": ok,
        "device": settings.box.device,
        "pacs": hospital.pacs.name,
        "ready_seconds": round(time.monotonic() - began, 1),
        "studies": results,
    }
    (directory / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False), encoding="utf-8")
    if as_json:
        sys.stdout.write(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    console.rule("[green]everything that was promised happened[/]" if ok else "[bold red]not all went as promised[/]")
    closer = f"look closer: scanside --config {directory / 'scanside.toml'} study 1"
    console.print(escape(f"all of it lies in {directory}; {closer}"), highlight=False, soft_wrap=True)
    return 0 if ok else 1


def _stop(box: Leashed, hospital: Hospital) -> None:
    """Stop both, each while the other does."""
    box.release()
    hospital.stop()
    box.stop()


def _configure(directory: Path, hospital: Hospital, ports: list[int]) -> Path:
    """Write the demo's configuration: this hospital, free ports, loopback only."""
    environment = os.environ.get("SCANSIDE_TRITON_ENVIRONMENT", ".venv-triton")
    return init.write(
        directory,
        {
            "box": {"name": "scanside-demo"},
            # The demo may run on a full disk as long as its few megabytes fit.
            "intake": {
                "ae_title": BOX_AE,
                "host": LOOPBACK,
                "port": ports[0],
                "reserve_percent": 0.0,
                "reserve_bytes": 200_000_000,
            },
            "study": {"quiet_seconds": 5.0},
            "triton": {
                "environment": str(Path(environment).resolve()),
                "grpc_port": ports[1],
                "http_port": ports[2],
                "metrics_port": ports[3],
            },
        },
        [
            {
                "kind": "dicom",
                "name": "pacs",
                "ae_title": hospital.pacs.ae_title,
                "host": hospital.pacs.host,
                "port": hospital.pacs.port,
            },
            {
                "kind": "hl7",
                "name": "emergency",
                "host": hospital.hl7_host,
                "port": hospital.hl7_port,
                "processing_id": "T",
            },
        ],
    )


def _except_age(settings: Settings) -> None:
    """Have the board of this hospital let studies pass that carry no age, as de-identified ones often do."""
    ledger = Ledger(settings.ledger_path)
    try:
        for package in load_configured(settings):
            make_exception(
                ledger,
                settings.evidence_directory,
                package,
                "age",
                who="whoever started the demo",
                why="demonstration on de-identified studies, which often carry no age; nobody is treated on it",
                until=date.today() + timedelta(days=1),
            )
    finally:
        ledger.close()


def _phantoms(directory: Path) -> list[Scan]:
    """A simulated patient with a haemorrhage, and one without."""
    wanted: list[tuple[str, str | None, int, Expected]] = [
        ("haemorrhage", BLEED, BLEED_SEED, "positive"),
        ("normal", None, NORMAL_SEED, "negative"),
    ]
    scans = []
    for label, bleed, seed, expected in wanted:
        files = write_study(simulate(seed, bleed=bleed), directory / label)
        scans.append(Scan(label, files, expected, [read_header(files[0]).study_instance_uid]))
    return scans


def _own(folder: Path, console: Console) -> Scan:
    """The user's own folder; what is no DICOM instance, or of no class that intake takes, is left out and said."""
    files, skipped = instances_in(folder)
    taken: list[Path] = []
    uids: dict[str, None] = {}
    for path in files:
        try:
            header = read_header(path)
        except ScansideError as error:
            skipped.append((path, error.what))
            continue
        if header.sop_class_uid not in STORAGE_CLASSES:
            skipped.append((path, f"intake does not take {UID(header.sop_class_uid).name}"))
            continue
        taken.append(path)
        uids[header.study_instance_uid] = None
    for reason, count in Counter(reason for _, reason in skipped).most_common():
        console.print(f"{count} files are left out: {escape(reason)}", highlight=False)
    if not taken:
        raise ScansideError("there is no DICOM instance that intake takes", str(folder), "name a folder that has some")
    return Scan(folder.resolve().name, taken, None, list(uids))


def _wait_until_ready(settings: Settings, box: Leashed) -> None:
    packages = load_configured(settings)
    client = TritonClient(f"{settings.triton.host}:{settings.triton.grpc_port}", timeout=5.0)
    deadline = time.monotonic() + START_SECONDS
    waiting = "the appliance"
    try:
        while time.monotonic() < deadline:
            if not box.running:
                raise ScansideError("the appliance ended", str(box.log), box.tail(3))
            if not all(client.ready(package) for package in packages):
                waiting = "Triton"
            else:
                try:
                    echo(Peer(BOX_AE, LOOPBACK, settings.intake.port), SCANNER_AE, timeout=2.0)
                    return
                except PeerError:
                    waiting = "the intake"
            time.sleep(0.1)
    finally:
        client.close()
    raise ScansideError(f"{waiting} was not ready in {START_SECONDS:g} s", str(box.log), box.tail(3))


def _progress(target: str, scan: Scan, console: Console | None = None) -> tuple[Progress, TaskID]:
    progress = Progress(
        TextColumn("scanner → {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    return progress, progress.add_task(f"{target}: {escape(scan.label)}", total=len(scan.files))


def _to_pacs(scan: Scan, hospital: Hospital, console: Console) -> None:
    """Scanners send to the PACS too; the findings shall meet the images there."""
    peer = Peer(hospital.pacs.ae_title, hospital.pacs.host, hospital.pacs.port)
    progress, task = _progress("PACS", scan, console)
    with progress:
        send(scan.files, peer, SCANNER_AE, on_sent=lambda _: progress.advance(task))


def _scan(scan: Scan, settings: Settings, ledger: Ledger, box: Leashed, console: Console) -> None:
    """Send one study over a real association and follow it until nothing more will happen."""
    progress, task = _progress("scanside", scan)

    def play() -> None:
        try:
            results = send(
                scan.files,
                Peer(BOX_AE, LOOPBACK, settings.intake.port),
                SCANNER_AE,
                on_sent=lambda _: progress.advance(task),
            )
            scan.errors += [f"{result.path.name}: {result.error}" for result in results if result.error]
        except ScansideError as error:
            scan.errors.append(str(error))
        scan.sent = True

    player = threading.Thread(target=play, daemon=True)
    player.start()
    deadline = time.monotonic() + STUDY_SECONDS
    with Live(console=console, refresh_per_second=8) as live:
        while True:
            reports = _reports(scan, ledger)
            live.update(Group(progress, *(_timeline(report) for report in reports)))
            finished = scan.sent and len(reports) == len(scan.study_instance_uids) and all(map(_finished, reports))
            if (
                finished
                or time.monotonic() > deadline
                or not box.running
                or (scan.sent and scan.errors and not reports)
            ):
                break
            time.sleep(0.1)
    for error in scan.errors:
        console.print(f"[red]not stored:[/] {escape(error)}", soft_wrap=True)


def _reports(scan: Scan, ledger: Ledger) -> list[dict[str, Any]]:
    keys = [find_study(ledger, uid) for uid in scan.study_instance_uids]
    return [study_report(ledger, key) for key in keys if key is not None]


def _finished(report: dict[str, Any]) -> bool:
    """Nothing more will happen to this study by itself."""
    if report["state"] != "complete" or not report["analyses"]:
        return False
    if any(analysis["state"] in ("admitted", "running") for analysis in report["analyses"]):
        return False
    if any(finding["path"] is None for finding in report["findings"]):
        return False
    return all(one["state"] not in ("pending", "sending", "stored", "asked") for one in report["deliveries"])


def _timeline(report: dict[str, Any]) -> RenderableType:
    table = Table(title=f"study {report['id']}", title_justify="left", box=None, show_header=False)
    moments = timeline(report)
    verdict = report["verdicts"][-1] if report["verdicts"] else None
    for step in STEPS:
        moment = moments[step]
        if step.startswith("alert") and verdict is not None and not verdict["positive"]:
            text = "none: negative"
        elif moment is None:
            text = "–" if _finished(report) else "…"
        else:
            text = f"{moment['seconds']:+7.2f} s"
        table.add_row(f"  {step.replace('_', ' ')}", text)
    return table


def _results(
    scan: Scan, settings: Settings, ledger: Ledger, hospital: Hospital, directory: Path
) -> list[dict[str, Any]]:
    """What came of each study of a scan, and whether it is what the demo promises."""
    results = []
    reports = _reports(scan, ledger)
    for report in reports:
        uid = report["study_instance_uid"]
        held = {instance for _, instance in hospital.pacs.holds(uid)}
        objects = [one for one in report["deliveries"] if not one["object"].startswith("alert.")]
        alerts = [one for one in report["deliveries"] if one["object"].startswith("alert.")]
        stored = bool(objects) and all(one["state"] == "acknowledged" and one["uid"] in held for one in objects)
        received = [path for path in hospital.messages() if path.stem in {one["uid"] for one in alerts}]
        verdict = report["verdicts"][-1] if report["verdicts"] else None
        answer = None if verdict is None else "positive" if verdict["positive"] else "negative"
        alerted = (
            bool(alerts) and all(one["state"] == "acknowledged" for one in alerts) and len(received) == len(alerts)
        )
        if verdict is None:
            ok = scan.expected is None and all(one["state"] == "refused" for one in report["analyses"])
        else:
            ok = answer == (scan.expected or answer) and stored and (alerted if verdict["positive"] else not alerts)
        results.append(
            {
                "label": scan.label,
                "study_instance_uid": uid,
                "expected": scan.expected,
                "ok": ok and not scan.errors and _finished(report),
                "state": report["state"],
                "verdict": answer,
                "probability": verdict["probability"] if verdict else None,
                "volume_ml": verdict["result"]["volume_ml"] if verdict else None,
                "reasons": [one["reason"] for one in report["analyses"] if one["reason"]],
                "series": [one for analysis in report["analyses"] for one in analysis["selection"]],
                "timeline": timeline(report),
                "late": any(one["late"] for one in report["verdicts"]),
                "deliveries": [
                    {key: one[key] for key in ("object", "destination", "state", "attempts", "uid")}
                    for one in report["deliveries"]
                ],
                "pacs_holds_findings": stored,
                "messages": [str(path.relative_to(directory)) for path in received],
                "pictures": [str(path.relative_to(directory)) for path in _pictures(scan, report, settings, directory)],
                "errors": scan.errors,
            }
        )
    if not reports:
        results.append(
            {"label": scan.label, "ok": False, "verdict": None, "errors": scan.errors or ["nothing arrived"]}
        )
    return results


def _pictures(scan: Scan, report: dict[str, Any], settings: Settings, directory: Path) -> list[Path]:
    """The captures of key slabs as the PACS got them, as PNG files."""
    paths = []
    for finding in report["findings"]:
        if finding["object"].startswith("capture.") and finding["object"] != SUMMARY and finding["path"]:
            pixels = pydicom.dcmread(settings.findings_directory / finding["path"]).pixel_array
            name = f"{scan.label}-{report['id']}-{finding['object'].replace('.', '-')}.png"
            path = directory / "pictures" / name
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(path)
            paths.append(path)
    return paths


def _tell(result: dict[str, Any], directory: Path, console: Console) -> None:
    """The verdict, the message and the picture of one study."""
    answer = result["verdict"]
    colour = {"positive": "bold red", "negative": "green"}.get(answer or "", "yellow")
    probability = f", probability {result['probability']:.3f}" if answer else ""
    told = answer or "; ".join(["not analysed", *result.get("reasons", []), *result["errors"]])
    mark = "[green]as promised[/]" if result["ok"] else "[bold red]NOT as promised[/]"
    console.print(
        f"\n[bold]{escape(result['label'])}[/]: [{colour}]{escape(told)}[/]{probability} – {mark}", soft_wrap=True
    )
    for one in result.get("series", []):
        chosen = "selected" if one["chosen"] else "left alone"
        number = one["series_number"] if one["series_number"] is not None else "without number"
        console.print(f"  series {number} ({one['instances']} images): {chosen}, {escape(one['reason'])}",
                      highlight=False, soft_wrap=True)  # fmt: skip
    deliveries = [f"{one['object']} → {one['destination']}: {one['state']}" for one in result.get("deliveries", [])]
    if deliveries:
        console.print("  " + escape("; ".join(deliveries)), highlight=False, soft_wrap=True)
    for message in result.get("messages", []):
        console.print(f"  HL7 message that was sent ({message}):", highlight=False)
        for line in (directory / message).read_text(encoding="utf-8").replace("\r", "\n").strip().split("\n"):
            console.print(f"    {escape(line)}", highlight=False, soft_wrap=True)
    for picture in result.get("pictures", [])[:1]:
        console.print(
            f"  key slab with the finding drawn: {escape(str(directory / picture))}", highlight=False, soft_wrap=True
        )
