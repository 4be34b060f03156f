"""The ledger's reports as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table

from appliance.events import Event
from appliance.ledger.retention import KeptStudy
from appliance.ledger.views import is_late, timeline


def summary(report: dict[str, Any], budget_seconds: float) -> dict[str, Any]:
    """One study in a line's worth of fields, JSON-ready."""
    newest = report["verdicts"][-1] if report["verdicts"] else None
    if newest and newest["result"].get("withdrawn"):
        newest = None
    steps = timeline(report)
    acknowledged = steps["alert_acknowledged"]
    states = [delivery["state"] for delivery in report["deliveries"]]
    return {
        "study": report["id"],
        "study_instance_uid": report["study_instance_uid"],
        "state": report["state"],
        "instances": report["instances"],
        "series": report["series"],
        "analyses": [
            {"package": one["package"], "state": one["state"], "reason": one["reason"]} for one in report["analyses"]
        ],
        # Of a verdict that was withdrawn nothing is left: the complete study was not analysed.
        "positive": newest["positive"] if newest else None,
        "probability": newest["probability"] if newest else None,
        "provisional": bool(newest and newest["result"].get("provisional")),
        "mode": (newest["result"].get("mode") or None) if newest else None,
        "selftest": bool(report["selftest"]),
        "late": not report["selftest"] and is_late(report, budget_seconds),
        "alert_seconds": acknowledged["seconds"] if acknowledged else None,
        "deliveries": {state: states.count(state) for state in sorted(set(states))},
        "last_instance_at": report["last_instance_at"],
    }


def studies_table(
    reports: list[dict[str, Any]], troubles: dict[str, list[dict[str, Any]]], budget_seconds: float
) -> RenderableType:
    """All studies, and below them what needs somebody."""
    if not reports:
        return "no study yet"
    table = Table("no.", "last instance (UTC)", "images", "state", "verdict", "alert after", "deliveries", box=None)
    for report in reports:
        one = summary(report, budget_seconds)
        alert = f"{one['alert_seconds']:.1f} s" if one["alert_seconds"] is not None else "–"
        deliveries = ", ".join(f"{count} {_coloured(state)}" for state, count in one["deliveries"].items()) or "–"
        table.add_row(
            str(one["study"]),
            one["last_instance_at"][:19].replace("T", " "),
            str(one["instances"]),
            one["state"] + (" (self-test)" if one["selftest"] else ""),
            _verdict(one),
            alert + (" [bold red]late[/]" if one["late"] else ""),
            deliveries,
        )
    parts: list[RenderableType] = [table]
    if troubles["deliveries"]:
        letters = Table("delivery", "study", "object", "to", "state", "why", box=None, title_justify="left")
        letters.title = "Dead letters (scanside retry NUMBER)"
        for one in troubles["deliveries"]:
            letters.add_row(
                str(one["id"]), str(one["study_id"]), one["object"], one["destination"], _coloured(one["state"]),
                escape(one["reason"]),
            )  # fmt: skip
        parts += ["", letters]
    if troubles["analyses"]:
        failed = Table("study", "package", "why", box=None, title_justify="left")
        failed.title = "Analyses set aside (scanside retry --study NUMBER)"
        for one in troubles["analyses"]:
            failed.add_row(str(one["study_id"]), one["package"], escape(one["reason"]))
        parts += ["", failed]
    return Group(*parts)


def retention_view(
    low: bool, free: int, goes: Sequence[KeptStudy], may_go: Sequence[KeptStudy], held: Sequence[KeptStudy]
) -> RenderableType:
    """Every study that has files on the disk, and whether and why they go or stay."""
    heading = f"{free / 1e9:.1f} GB free" + (": the disk is [bold red]low[/]" if low else "")
    if not (goes or may_go or held):
        return f"{heading}; no study has files"
    table = Table("study", "completed (UTC)", "images", "MB", "files", box=None)
    for said, studies in (("[yellow]go now[/]", goes), ("may go; there is room", may_go), ("", held)):
        for one in studies:
            table.add_row(
                str(one.study_id),
                (one.completed_at or "–")[:19].replace("T", " "),
                str(one.instances),
                f"{one.size / 1e6:.1f}",
                said or escape("; ".join(one.holds)),
            )
    return Group(heading, table)


def study_view(report: dict[str, Any]) -> RenderableType:
    """Everything on one study."""
    evidence = report["evidence"] or {}
    head = Table(box=None, show_header=False)
    head.add_row("study", f"{report['id']}  {report['study_instance_uid']}")
    if report["selftest"]:
        head.add_row("self-test", "simulated; no patient's, and nobody but the box itself was told")
    head.add_row("state", f"{report['state']}, {report['instances']} images in {report['series']} series")
    if evidence:
        head.add_row("complete by", f"{evidence['by']} (confidence {evidence['confidence']})")
    overdue = [one["detail"] for one in report["events"] if one["name"] == Event.STAGE_OVERDUE]
    for one in overdue:
        subject = f" ({escape(one['subject'])})" if one["subject"] else ""
        head.add_row("[bold red]deadline missed[/]", f"{one['stage']}{subject}, begun at {one['since'][:19]} UTC")
    for one in (one["detail"] for one in report["events"] if one["name"] == Event.STAGE_DEGRADED):
        head.add_row("[yellow]deadline near[/]", f"{one['stage']} ({escape(one['subject'])}): {one['plan']}")
    for label, value in _said(report.get("said", {})):
        head.add_row(label, escape(value))
    parts: list[RenderableType] = [head, "", timeline_table(report)]
    for analysis in report["analyses"]:
        parts += ["", _analysis(analysis, [v for v in report["verdicts"] if v["analysis_id"] == analysis["id"]])]
    if report["deliveries"]:
        table = Table(
            "no.", "object", "to", "state", "tries", "answer", title="Deliveries", title_justify="left", box=None
        )
        for one in report["deliveries"]:
            table.add_row(
                str(one["id"]), one["object"], one["destination"], _coloured(one["state"]), str(one["attempts"]),
                escape(one["reason"]),
            )  # fmt: skip
        parts += ["", table]
    return Group(*parts)


_ASKED = {
    "waiting": "asked again soon",
    "found": "it has the order",
    "none": "it has no order of this study",
    "failed": "it was asked in vain",
}


def _said(said: dict[str, list[dict[str, Any]]]) -> list[tuple[str, str]]:
    """What the hospital says of the study over HL7, in lines."""
    lines = []
    for one in said.get("orders", []):
        urgent = ", goes first" if one["urgent"] else ""
        facts = (
            f"priority {one['priority']}{urgent}" if one["priority"] else "", one["reason"],
            f"onset {one['onset']}" if one["onset"] else "",
        )  # fmt: skip
        lines.append((f"order {one['id']}", ", ".join((one["accession"], *filter(None, facts)))))
    for one in said.get("others", []):
        lines.append((f"[bold red]order {one['id']}[/]", f"{one['accession']}, of another patient"))
    for one in said.get("asked", []):
        label = "[bold red]modality worklist[/]" if one["state"] in ("none", "failed") else "modality worklist"
        lines.append((label, ": ".join(filter(None, (_ASKED[one["state"]], one["reason"])))))
    for one in said.get("tasks", []):
        label = "[bold red]task[/]" if one["state"] == "lost" else "task"
        lines.append((label, ": ".join(filter(None, (one["state"], one["reason"])))))
    for one in said.get("reports", []):
        words = " ".join(one["text"].split())
        lines.append((f"report {escape(one['status'])}", words if len(words) <= 200 else f"{words[:200]}…"))
    return lines


def timeline_table(report: dict[str, Any]) -> Table:
    """The milestones, in seconds from the last instance."""
    table = Table("step", "at (UTC)", "seconds", title="Timeline", title_justify="left", box=None)
    for step, moment in timeline(report).items():
        at = moment["at"][11:23] if moment else "–"
        table.add_row(step.replace("_", " "), at, f"{moment['seconds']:+.2f}" if moment else "–")
    return table


def _analysis(analysis: dict[str, Any], verdicts: list[dict[str, Any]]) -> RenderableType:
    parts: list[RenderableType] = [
        f"[bold]{escape(analysis['package'])} {escape(analysis['package_version'])}[/]: {_coloured(analysis['state'])}"
        + (f", {escape(analysis['reason'])}" if analysis["reason"] else "")
    ]
    table = Table("series", "images", "description", "", title="Series", title_justify="left", box=None)
    for one in analysis["selection"]:
        mark = "[green]selected:[/] " if one["chosen"] else ""
        table.add_row(
            _or_dash(one["series_number"]),
            str(one["instances"]),
            escape(one["description"]),
            mark + escape(one["reason"]),
        )
    parts += [table]
    parts += ["", admission_table(analysis["admission"])]
    for one in verdicts:
        result = one["result"]
        if result.get("withdrawn") and not result["series_instance_uid"]:
            parts += ["", f"Told: not analysed: {escape(result['withdrawn'])}"]
            continue
        if result.get("withdrawn"):
            parts += ["", f"Verdict, revision {one['revision']}: [yellow]withdrawn[/], {escape(result['withdrawn'])}"]
            parts += [f"  {escape(line)}" for line in result["limitations"]]
            continue
        told = "[bold red]positive[/]" if one["positive"] else "[green]negative[/]"
        told += ", [yellow]provisional[/]" if result.get("provisional") else ""
        told += ", [yellow]in shadow: nobody was told[/]" if result.get("mode") == "shadow" else ""
        late = " [bold red]late[/]" if one["late"] else ""
        subtypes = ", ".join(f"{name} {value:.2f}" for name, value in result["subtypes"].items())
        parts += [
            "",
            f"Verdict, revision {one['revision']}: {told}{late}, probability {one['probability']:.3f} "
            f"(threshold {result['threshold']:g}), {result['volume_ml']:.1f} mL",
            f"  {subtypes}",
            f"  [italic]{escape(result['notice'])}[/]",
        ]
        parts += [f"  {escape(line)}" for line in result["limitations"]]
    return Group(*parts)


def admission_table(criteria: list[dict[str, Any]]) -> Table:
    """What the gate read, what it asks for and where the label says so, criterion by criterion."""
    read = Column("read", overflow="fold")
    table = Table("criterion", read, "rule", "where it stands", "", title="Admission", title_justify="left", box=None)
    for one in criteria:
        passed = one["outcome"] in ("met", "excepted")
        outcome = _coloured(one["outcome"]) + (f" ({escape(one['note'])})" if one["note"] else "")
        source = "" if passed else f" [dim]({escape(one['attribute'])})[/]"
        clause = escape(one.get("clause", ""))  # older admissions have none
        table.add_row(
            one["criterion"], (escape(one["value"]) or "absent") + source, escape(one["rule"]), clause, outcome
        )
    return table


def _or_dash(value: object) -> str:
    return "–" if value is None else str(value)


def _verdict(one: dict[str, Any]) -> str:
    if one["positive"] is not None:
        colour, word = ("bold red", "positive") if one["positive"] else ("green", "negative")
        word = f"provisional: {word}" if one["provisional"] else word
        word = f"shadow: {word}" if one["mode"] == "shadow" else word
        since = [a["state"] for a in one["analyses"] if a["state"] != "issued"]
        then = f", then {_coloured(since[0])}" if since else ""
        return f"[{colour}]{word}[/] {one['probability']:.2f}{then}"
    return ", ".join(_coloured(a["state"]) for a in one["analyses"]) or "–"


def _coloured(state: str) -> str:
    colours = {
        "acknowledged": "green", "issued": "green", "met": "green", "excepted": "yellow", "dead": "bold red",
        "rejected": "bold red", "withdrawn": "yellow", "failed": "bold red", "refused": "yellow", "violated": "red",
        "unknown": "red", "replaced": "yellow",
    }  # fmt: skip
    return f"[{colours[state]}]{state}[/]" if state in colours else state
