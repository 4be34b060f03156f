"""`scanside check`: what must work before a patient is scanned."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import partial

from pydicom import uid
from pydicom.uid import ImplicitVRLittleEndian
from sqlalchemy.exc import SQLAlchemyError

from appliance.governance.board import read_board
from appliance.governance.package import Package, load_configured
from appliance.inference.served import served_problem
from appliance.inference.triton import TritonClient
from appliance.intake.spool import Spool
from appliance.ledger.store import Ledger
from appliance.ledger.views import unreached_alerts, waiting_destinations
from appliance.operations.audit import standing
from appliance.services.delivery import (
    archive,
    mail_server,
    mllp_client,
    rest,
    syntaxes_of,
    webhook,
)
from appliance.services.peers import peer_of
from appliance.services.performing import code_of
from appliance.services.routing import classes_of
from appliance.services.telling import try_template
from appliance.settings import (
    Destination,
    DicomDestination,
    DicomwebDestination,
    Hl7Destination,
    Hl7Tls,
    MailDestination,
    ModalityWorklist,
    OrderDestination,
    Performing,
    RestDestination,
    Settings,
    Tls,
    UpsDestination,
    WebhookDestination,
    Worklist,
    WorklistDestination,
)
from dicom_io.errors import ScansideError
from dicom_io.mwl import asking
from dicom_io.scu import Peer, accepted, echo
from dicom_io.tls import ServerCertificates
from dicom_io.ups_user import pulling
from dicom_io.web import reach

SOON_DAYS = 30
"""An approval or exception that ends within so many days is told."""


@dataclass(frozen=True, slots=True)
class Check:
    """One check and what came of it."""

    check: str
    ok: bool
    detail: str


def run_checks(settings: Settings) -> list[Check]:
    """Folders, ledger, model packages, intake, Triton and every destination; one result each."""
    title = settings.intake.ae_title
    packages: list[Package] = []

    def folders() -> str:
        for folder in (settings.spool_directory, settings.findings_directory, settings.run_directory):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                probe = folder / ".probe"
                probe.write_bytes(b"")
                probe.unlink()
            except OSError as error:
                raise ScansideError(error.strerror or str(error), str(folder), "make it writable") from error
        intake = settings.intake
        spool = Spool(settings.spool_directory)
        if shortage := spool.shortage(intake.reserve_percent, intake.reserve_bytes):
            raise ScansideError(shortage, str(settings.spool_directory), "make room, or lower intake.reserve_…")
        unknown, aside = spool.set_aside()
        if aside:
            remedy = "put the right ledger back, or send them again and remove the folder"
            raise ScansideError(f"{aside} images lie there that the ledger does not know", str(unknown), remedy)
        return str(settings.box.state_directory)

    def ledger() -> str:
        Ledger(settings.ledger_path).close()
        return str(settings.ledger_path)

    def models() -> str:
        packages.extend(load_configured(settings))
        return ", ".join(
            f"{one.name} {one.version} ({one.notice}; {f'signed by {one.signed_by}' if one.signed_by else 'unsigned'})"
            for one in packages
        )

    host = "127.0.0.1" if settings.intake.host in ("0.0.0.0", "") else settings.intake.host

    def intake() -> str:
        peer = Peer(title, host, settings.intake.port)
        echo(peer, title)
        return f"{peer} answers"

    def triton() -> str:
        url = f"{settings.triton.host}:{settings.triton.grpc_port}"
        client = TritonClient(url, timeout=5.0)
        try:
            problems = [
                problem
                for package in packages
                if (problem := client.problem(package) or served_problem(client, package, settings.box.device))
            ]
        finally:
            client.close()
        if problems or not packages:
            raise ScansideError(
                "; ".join(problems) or "there is no package to serve", url, "start it: `scanside triton`"
            )
        return f"{url} serves {', '.join(package.name for package in packages)}"

    asked, tasks = settings.intake.modality_worklist, settings.performer
    checks = [
        _check("folders", folders),
        _check("ledger", ledger),
        _check("models", models),
        *([_check("intake", intake)] if settings.intake.plain else []),
        *([_check("intake TLS", partial(_tls, settings.intake.tls, host))] if settings.intake.tls is not None else []),
        *_orders(settings, host),
        *([_check("modality worklist", partial(_modality_worklist, asked, title))] if asked is not None else []),
        *([_check("performer", partial(_performer, tasks, title))] if tasks is not None else []),
        _check("triton", triton),
        *([_check("worklist", partial(_worklist, settings.worklist))] if settings.worklist is not None else []),
    ]
    for destination in settings.destination:
        reach = partial(_reach, destination, title)
        checks.append(_check(f"destination {destination.name}", reach))
        if isinstance(destination, Hl7Destination) and destination.template is not None:
            checks.append(_check(f"template of {destination.name}", partial(_template, settings, destination)))
    checks.append(_check("board", lambda: _board(settings, packages)))
    checks.append(_check("audit", lambda: _audit(settings)))
    checks.append(_check("alerts", lambda: _alerts(settings)))
    checks.append(_check("outbox", lambda: _outbox(settings)))
    return checks


def _reach(destination: Destination, title: str) -> str:
    """Something takes connections there, and lets us in; nothing is sent."""
    match destination:
        case DicomDestination():
            peer = peer_of(destination)
            echo(peer, title)
            return f"{peer} answers; {_taken(destination, peer, title)}"
        case DicomwebDestination():
            there = archive(destination)
            reach(there)
            return f"{there} answers"
        case Hl7Destination() | OrderDestination():
            with mllp_client(destination) as client:
                client.connect()
            return f"{client.where} takes connections"
        case MailDestination():
            server = mail_server(destination)
            server.open().close()
            return f"{server.where} lets us in"
        case WebhookDestination() | RestDestination():
            hook = rest(destination) if isinstance(destination, RestDestination) else webhook(destination)
            hook.connection().close()
            return f"{hook.where} takes connections"
        case UpsDestination():
            peer = peer_of(destination)
            with pulling(peer, title, destination.answer_seconds) as worklist:
                worklist.of_study("2.25.1")
            return f"{peer} answers"
        case WorklistDestination():
            return f"it is our own; a positive study is {'moved' if destination.mode == 'reprioritise' else 'marked'}"


def _taken(destination: DicomDestination, peer: Peer, title: str) -> str:
    """What of the objects that it is to get it accepts in the negotiation, and in which class and transfer syntax."""
    syntaxes = [*syntaxes_of(destination), ImplicitVRLittleEndian]
    classes = {kind: [getattr(uid, keyword) for keyword in found] for kind, found in classes_of(destination).items()}
    proposed = {(str(one), str(syntax)) for found in classes.values() for one in found for syntax in syntaxes}
    taken = accepted(peer, title, proposed) if proposed else frozenset()
    said, missing = [], []
    for kind, found in classes.items():
        ways = [(one, syntax) for one in found for syntax in syntaxes if (str(one), str(syntax)) in taken]
        if ways:
            said.append(f"{kind} as {uid.UID(ways[0][0]).name}")
        else:
            missing.append(kind)
    if not said:
        raise ScansideError(
            f"it accepts none of {', '.join(missing)}",
            str(peer),
            "see what it is set to accept, and objects and sop_classes here",
        )
    but = f"; it does NOT accept {', '.join(missing)}" if missing else ""
    return f"takes {', '.join(said)}{but}"


def _orders(settings: Settings, host: str) -> list[Check]:
    """Somebody listens for HL7, where the settings say so."""
    hl7 = settings.intake.hl7
    if hl7 is None:
        return []
    checks = [_check("HL7 intake", partial(_port, host, hl7.port))] if hl7.plain else []
    return [*checks, *([_check("HL7 intake TLS", partial(_tls, hl7.tls, host))] if hl7.tls is not None else [])]


def _modality_worklist(section: ModalityWorklist, title: str) -> str:
    """It takes a question; of an accession number that nobody has."""
    peer = peer_of(section)
    with asking(peer, section.calling_ae_title or title, section.answer_seconds) as query:
        query.find("AccessionNumber", "SCANSIDE-CHECK")
    return f"{peer} answers"


def _performer(section: Performing, title: str) -> str:
    """It lets itself be asked for tasks."""
    peer = peer_of(section)
    with pulling(peer, section.calling_ae_title or title, section.answer_seconds) as worklist:
        waiting = sum(len(worklist.scheduled(code_of(one))) for one in section.workitem_codes)
    return f"{peer} answers; {waiting} tasks are scheduled there"


def _template(settings: Settings, destination: Hl7Destination) -> str:
    if wrong := try_template(settings, destination):
        said = "; ".join(f"{kind}: {why}" for kind, why in wrong.items())
        raise ScansideError(said, str(destination.template), "correct it; until then the standard message is sent")
    return f"{destination.template} writes every kind of message"


def _port(host: str, port: int) -> str:
    try:
        socket.create_connection((host, port), timeout=5.0).close()
    except OSError as error:
        raise ScansideError(error.strerror or str(error), f"{host}:{port}", "start it: `scanside intake`") from error
    return f"{host}:{port} takes connections"


def _tls(section: Tls | Hl7Tls, host: str) -> str:
    """The certificate can be used and has not expired, and somebody listens; no client certificate is at hand here."""
    certificates = ServerCertificates(section.certificate, section.key, section.client_authorities, section.profile)
    until = certificates.expires_at
    if until <= datetime.now(UTC):
        raise ScansideError(f"the certificate expired on {until.date()}", str(section.certificate), "renew it")
    return f"{_port(host, section.port)}; the certificate is good until {until.date()}"


def _worklist(section: Worklist) -> str:
    """Somebody listens on its ports."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(section.host, section.host)
    ports = [port for port in (section.web_port, section.port) if port is not None]
    for port in ports:
        try:
            socket.create_connection((host, port), timeout=5.0).close()
        except OSError as error:
            where = f"{host}:{port}"
            raise ScansideError(error.strerror or str(error), where, "start it: `scanside worklist`") from error
    return f"{host} takes connections on port {' and '.join(map(str, ports))}"


def _board(settings: Settings, packages: Sequence[Package]) -> str:
    """Every package may run today, and what of that ends soon."""
    ledger = Ledger(settings.ledger_path)
    try:
        board = read_board(ledger)
    finally:
        ledger.close()
    judged = [(one, *board.judge(one)) for one in packages]
    if refused := [f"{package.name}: {criterion.value}" for package, criterion, _ in judged if not criterion.met]:
        remedy = "`scanside models history` shows what was decided; `scanside models approve` lets a version run"
        raise ScansideError("; ".join(refused), "the board", remedy)
    said = [
        f"{package.name} {package.version} runs as {mode} ({criterion.value})" for package, criterion, mode in judged
    ]
    soon = date.today() + timedelta(days=SOON_DAYS)
    said += [
        f"record {one.record} ends SOON, on {one.until}: {one.package} {one.said}"
        for one in board.decisions
        if one.until and one.until <= soon and board.holds(one.record, date.today())
    ]
    return "; ".join(said)


def _audit(settings: Settings) -> str:
    ledger = Ledger(settings.ledger_path)
    try:
        events, fault = standing(ledger, settings.head_path)
    finally:
        ledger.close()
    if fault:
        raise ScansideError(fault, str(settings.ledger_path), "`scanside audit verify` walks the whole chain")
    return f"{events} events, none is gone; `scanside audit verify` walks the whole chain"


def _alerts(settings: Settings) -> str:
    told = settings.alert_destinations
    if not told:
        raise ScansideError(
            "no destination of alerts is configured: an alert would reach nobody",
            "",
            "add a [[destination]] of kind hl7, mail or webhook",
        )
    ledger = Ledger(settings.ledger_path)
    try:
        unreached = unreached_alerts(ledger)
    finally:
        ledger.close()
    if unreached:
        said = "; ".join(f"study {one['study_id']} since {one['at'][:19]}: {one['reason']}" for one in unreached)
        remedy = "look at these studies; `scanside retry` sends again, `scanside retention --release` says it was seen"
        raise ScansideError(f"NOBODY WAS REACHED by the alert of {said}", str(settings.ledger_path), remedy)
    steps = [f"then {one.name} after {one.after_seconds:g} s" for one in told if one.after_seconds]
    return ", ".join([f"go to {', '.join(one.name for one in told if not one.after_seconds)}", *steps])


def _outbox(settings: Settings) -> str:
    ledger = Ledger(settings.ledger_path)
    try:
        waiting = waiting_destinations(ledger)
    finally:
        ledger.close()
    orphans = sorted(set(waiting) - {one.name for one in settings.destination})
    if orphans:
        raise ScansideError(
            f"{sum(waiting[name] for name in orphans)} deliveries wait for a destination that is not configured",
            ", ".join(orphans),
            "configure it again under that name",
        )
    return f"{sum(waiting.values())} deliveries wait"


def _check(name: str, action: Callable[[], str]) -> Check:
    try:
        return Check(name, True, action())
    except (ScansideError, OSError, ValueError) as error:
        return Check(name, False, str(error))
    except SQLAlchemyError as error:  # a damaged ledger; below its first line is the statement
        return Check(name, False, str(error).splitlines()[0])
