"""`scanside status`: what whoever looks after many boxes asks each of them; nothing in it names a patient."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

from cryptography import x509

from appliance import __version__
from appliance.governance.board import Board, read_board
from appliance.governance.package import load_configured
from appliance.ledger.standing import errors_since, in_flight, verdict_seconds, waiting
from appliance.ledger.store import Ledger
from appliance.settings import Settings
from dicom_io.errors import ScansideError


def status(settings: Settings, *, since: datetime | None = None, now: datetime | None = None) -> dict[str, Any]:
    """What runs on this box and how it does, JSON-ready.

    Args:
        since: errors and times to the verdict are counted from then on; the last 24 hours if omitted.
        now: the time in UTC; asked if omitted.

    Returns:
        ``version``; ``in_flight``: what an update would interrupt, by kind, and their ``total``; ``waiting``:
        destination → deliveries that are not acknowledged; ``figures`` of the time since: ``errors`` by event,
        ``errors_per_hour``, ``verdicts``, ``seconds_to_verdict`` (median, from the last instance; None without one);
        ``models``; ``certificates``.

    Raises:
        LedgerError: there is no ledger that can be read.
    """
    now = now or datetime.now(UTC)
    since = since or now - timedelta(hours=24)
    # At least a minute: right after an update one error would be thousands an hour.
    hours = max((now - since).total_seconds(), 60.0) / 3600
    ledger = Ledger(settings.ledger_path)
    try:
        board = read_board(ledger)
        busy = in_flight(ledger, settings.models.packages)
        errors = errors_since(ledger, since)
        seconds = verdict_seconds(ledger, since)
        held = waiting(ledger)
    finally:
        ledger.close()
    return {
        "version": __version__,
        "box": settings.box.name,
        "device": settings.box.device,
        "in_flight": {**busy, "total": sum(busy.values())},
        "waiting": held,
        "figures": {
            "since": since.isoformat(timespec="seconds"),
            "errors": errors,
            "errors_per_hour": round(sum(errors.values()) / hours, 3),
            "verdicts": len(seconds),
            "seconds_to_verdict": round(median(seconds), 3) if seconds else None,
        },
        "models": [_model(settings, board, name) for name in settings.models.packages],
        "certificates": [_certificate(what, path, now) for what, path in _certificates(settings)],
    }


def _model(settings: Settings, board: Board, name: str) -> dict[str, Any]:
    """A package as it lies there, and what the board says of this very version."""
    try:
        (package,) = load_configured(settings, [name])
    except ScansideError as error:
        return {"name": name, "version": None, "digest": None, "runs": False, "mode": None, "until": None,
                "said": str(error)}  # fmt: skip
    criterion, mode = board.judge(package)
    held = board.approval(package)
    return {
        "name": name,
        "version": package.version,
        "digest": package.digest,
        "runs": criterion.met,
        "mode": mode if criterion.met else None,
        "until": held.until.isoformat() if held is not None and held.until is not None and criterion.met else None,
        "said": criterion.value,
    }


def _certificates(settings: Settings) -> Iterator[tuple[str, Path]]:
    """What this box shows to others, and whom it trusts."""
    intake, worklist, performer = settings.intake, settings.worklist, settings.performer
    for what, served in (
        ("intake", intake.tls),
        ("HL7 intake", intake.hl7.tls if intake.hl7 is not None else None),
        ("worklist", worklist.tls if worklist is not None else None),
    ):
        if served is not None:
            yield what, served.certificate
            if served.client_authorities is not None:
                yield f"{what}, authorities", served.client_authorities
    for what, called in (
        ("modality worklist", intake.modality_worklist.tls if intake.modality_worklist is not None else None),
        ("performer", performer.tls if performer is not None else None),
        *((f"destination {one.name}", getattr(one, "tls", None)) for one in settings.destination),
    ):
        if called is not None and called.certificate is not None:
            yield what, called.certificate
        if called is not None and called.authorities is not None:
            yield f"{what}, authorities", called.authorities


def _certificate(what: str, path: Path, now: datetime) -> dict[str, Any]:
    """The first certificate of a file to expire."""
    try:
        until = min(one.not_valid_after_utc for one in x509.load_pem_x509_certificates(path.read_bytes()))
    except (OSError, ValueError) as error:
        return {"what": what, "path": str(path), "until": None, "days": None, "problem": str(error)}
    return {"what": what, "path": str(path), "until": until.date().isoformat(), "days": (until - now).days,
            "problem": None}  # fmt: skip
