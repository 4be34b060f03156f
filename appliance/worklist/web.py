"""The worklist over DICOMweb: UPS-RS, PS3.18 section 11, as an ASGI application.

Requests look at the ledger in threads; what they ask for is done, or refused with a status and a Warning that say why.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from appliance.ledger.store import Ledger
from appliance.ledger.subscriptions import WELL_KNOWN
from appliance.settings import AE_TITLE
from appliance.worklist.channel import Channels
from appliance.worklist.refusals import Refusals
from dicom_io.matching import read_query, selected
from dicom_io.workitem import (
    FILTERED,
    MAXIMUM_BYTES,
    MEANINGS,
    Step,
    WorkitemError,
    is_uid,
    read_json,
    text,
)

log = logging.getLogger(__name__)

ROOT = "/ups-rs"
JSON = "application/dicom+json"
BODY_SECONDS = 30.0
"""Longest that the body of a request may take."""
MOST_RESULTS = 1000
"""A search answers with no more; the rest is asked for with offset."""
_TYPES = (JSON, "application/json")
_HTTP = {0xC307: 404, 0x0111: 409, 0xC302: 409, 0xC303: 409, 0xC304: 409, 0xC310: 409, 0xC311: 409, 0xC312: 409,
         0x0213: 503, 0x0110: 503}  # fmt: skip
"""DIMSE status → status of HTTP (PS3.18 Tables 11.4.3-1 to 11.12.3-1); of all others it is 400."""


class HttpError(Exception):
    """A request that is refused before it reaches the worklist."""

    def __init__(self, status: int, what: str, **headers: str) -> None:
        super().__init__(what)
        self.status, self.what, self.headers = status, what, headers


@dataclass(frozen=True, slots=True)
class Service:
    """What requests work with.

    Attributes:
        reading: codes of work that is the reading of a study.
        token_file: the bearer token, read at each request so that it can be renewed; None: none is asked for.
        changed: called when somebody may have something to hear.
    """

    ledger: Ledger
    refusals: Refusals
    channels: Channels
    reading: frozenset[str]
    token_file: Path | None
    changed: Callable[[], None]


def application(service: Service) -> Starlette:
    """The ASGI application, below `ROOT`."""
    item = f"{ROOT}/workitems/{{uid}}"
    subscriber = f"{item}/subscribers/{{ae_title}}"

    def route(path: str, **methods: Callable[[Service, Request, bytes], Response]) -> Route:
        async def answer(request: Request) -> Response:
            return await _answer(service, request, methods[request.method.lower()])

        return Route(path, answer, methods=[name.upper() for name in methods])

    async def listen(socket: WebSocket) -> None:
        await _listen(service, socket)

    return Starlette(
        routes=[
            route(f"{ROOT}/workitems", get=_search, post=_create),
            route(item, get=_retrieve, post=_update),
            route(f"{item}/state", put=_change_state),
            route(f"{item}/state/{{requester}}", put=_change_state),
            route(f"{item}/cancelrequest", post=_request_cancel),
            route(f"{item}/cancelrequest/{{requester}}", post=_request_cancel),
            route(subscriber, post=_subscribe, delete=_unsubscribe),
            route(f"{subscriber}/suspend", post=_suspend),
            WebSocketRoute(f"{ROOT}/subscribers/{{ae_title}}", listen),
            WebSocketRoute(f"{ROOT}/ws/subscribers/{{ae_title}}", listen),
        ]
    )


async def _answer(service: Service, request: Request, work: Callable[[Service, Request, bytes], Response]) -> Response:
    what = f"{request.method} {request.scope['route'].path.removeprefix(ROOT)}"
    status: int | None = None
    try:
        await run_in_threadpool(_authorise, service, request)
        body = await _body(request)
        return await run_in_threadpool(work, service, request, body)
    except HttpError as error:
        code, said, headers = error.status, error.what, error.headers
    except WorkitemError as error:
        code, said, headers, status = _HTTP.get(error.status, 400), error.what, {}, error.status
        if status == 0xC300 and request.method == "PUT":
            code = 409
    except SQLAlchemyError as error:
        log.exception("worklist: %s could not be written down", what)
        code, said, headers = 503, f"it could not be written down: {type(error).__name__}", {}
    except Exception as error:
        log.exception("worklist: %s failed in a way nobody foresaw", what)
        code, said, headers = 500, type(error).__name__, {}
    answer = f"HTTP {code}" if status is None else f"HTTP {code}, 0x{status:04X}"
    await run_in_threadpool(service.refusals.note, _by(request), what, answer, said)
    report = {"what": said} if status is None else {"status": f"0x{status:04X}", "what": said}
    return Response(
        json.dumps(report, ensure_ascii=False).encode(), code, {**_warning(said), **headers}, "application/json"
    )


def _warning(said: str) -> dict[str, str]:
    """The header that tells more (RFC 7234 5.5; PS3.18 11.4.3.2 and others)."""
    plain = said.encode("ascii", "replace").decode().replace("\r", " ").replace("\n", " ")
    return {"Warning": f"299 scanside: {plain[:200]}"}


def _by(connection: HTTPConnection) -> str:
    return f"UPS-RS {connection.client.host}" if connection.client else "UPS-RS"


def _authorise(service: Service, connection: HTTPConnection) -> None:
    """Whoever calls has the token, if there is one; and a page of another site in somebody's browser is nobody.

    Raises:
        HttpError: it may not.
    """
    origin = connection.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != connection.headers.get("host"):
        raise HttpError(403, "pages of other sites may not call")
    if service.token_file is None:
        return
    try:
        token = read_token(service.token_file)
    except OSError as error:
        raise HttpError(503, f"the token cannot be read: {error.strerror}") from error
    scheme, _, given = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token):
        raise HttpError(401, "the bearer token is missing or wrong", **{"WWW-Authenticate": "Bearer"})


def read_token(path: Path) -> bytes:
    """The bearer token in that file.

    Raises:
        OSError: it cannot be read, or is shorter than 16 characters.
    """
    token = path.read_bytes().strip()
    if len(token) < 16:
        raise OSError(0, "it is shorter than 16 characters", str(path))
    return token


async def _body(request: Request) -> bytes:
    """The body, bounded in bytes and in time.

    Raises:
        HttpError: it is too long, too slow, or of another media type.
    """
    pieces, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                size += len(piece)
                if size > MAXIMUM_BYTES:
                    raise HttpError(413, f"the body is longer than {MAXIMUM_BYTES} bytes", Connection="close")
                pieces.append(piece)
    except TimeoutError:
        raise HttpError(408, "the body did not come in time", Connection="close") from None
    if size:
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media not in _TYPES:
            raise HttpError(415, f"the body is {media or 'of no media type'}, not {JSON}")
        if request.headers.get("content-encoding", "identity") != "identity":
            raise HttpError(415, "the body is compressed")
    return b"".join(pieces)


def _uid(request: Request) -> str:
    uid = str(request.path_params["uid"])
    if not is_uid(uid):
        raise WorkitemError(0x0115, "the UID in the address is none")
    return uid


def _ae_title(connection: HTTPConnection, name: str = "ae_title") -> str:
    title = str(connection.path_params[name]).strip()
    if not AE_TITLE.fullmatch(title):
        raise WorkitemError(0x0115, "the AE title in the address is none")
    return title


def _bare(request: Request, *names: str) -> str:
    """The UID of a query that is nothing but a UID, as PS3.18 writes it, or one of these parameters; '' if neither."""
    raw = request.url.query
    if raw and "=" not in raw and "&" not in raw:
        return raw
    return next((value for name, value in request.query_params.multi_items() if name.lower() in names), "")


def _acceptable(request: Request) -> None:
    """PS3.18 8.4.1: JSON is what we have.

    Raises:
        HttpError: it is not what is accepted.
    """
    accepted = request.headers.get("accept", "*/*") + "," + request.query_params.get("accept", "")
    kinds = {one.partition(";")[0].strip().lower() for one in accepted.split(",")}
    if not kinds & {*_TYPES, "*/*", "application/*"}:
        raise HttpError(406, f"the answer would be {JSON}")


def _steps(found: list[Step], **headers: str) -> Response:
    body = json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode()
    return Response(body, 200, headers, JSON)


def _done(service: Service, status: int, code: int = 200, **headers: str) -> Response:
    service.changed()
    return Response(status_code=code, headers={**(_warning(MEANINGS[status]) if status else {}), **headers})


# --- the transactions -------------------------------------------------------------------------------------


def _create(service: Service, request: Request, body: bytes) -> Response:
    step = read_json(body)
    asked = _bare(request, "workitem", "affectedsopinstanceuid")
    uid = asked or text(step, "SOPInstanceUID")
    step.pop("00080016", None), step.pop("00080018", None)
    status = service.ledger.create_workitem(uid, step, _by(request), service.reading)
    return _done(service, status, 201, Location=f"{_base(request)}/workitems/{uid}")


def _base(request: Request) -> str:
    return f"{request.url.scheme}://{request.url.netloc}{ROOT}"


def _retrieve(service: Service, request: Request, _: bytes) -> Response:
    _acceptable(request)
    return _steps([service.ledger.workitem(_uid(request))["step"]], **{"Cache-Control": "no-cache"})


def _search(service: Service, request: Request, _: bytes) -> Response:
    _acceptable(request)
    asked = read_query([one for one in request.query_params.multi_items() if one[0] != "accept"])
    limit = min(asked.limit if asked.limit is not None else MOST_RESULTS, MOST_RESULTS)
    found = service.ledger.find_workitems(asked.keys, limit + 1, asked.offset)
    headers = {"Cache-Control": "no-cache"}
    if len(found) > limit:
        headers |= _warning("There are additional results that can be requested")
    steps = found[:limit]
    if not steps:
        return Response(status_code=204, headers=headers)
    if asked.include is not None:
        steps = [selected(step, asked.include) for step in steps]
    return _steps(steps, **headers)


def _update(service: Service, request: Request, body: bytes) -> Response:
    changes = read_json(body)
    lock = _bare(request, "transaction-uid", "transactionuid", "transaction") or text(changes, "TransactionUID")
    return _done(service, service.ledger.update_workitem(_uid(request), changes, lock, _by(request), service.reading))


def _change_state(service: Service, request: Request, body: bytes) -> Response:
    said = read_json(body)
    state, lock = text(said, "ProcedureStepState"), text(said, "TransactionUID")
    return _done(service, service.ledger.change_state(_uid(request), state, lock, _by(request)))


def _request_cancel(service: Service, request: Request, body: bytes) -> Response:
    who = _ae_title(request, "requester") if "requester" in request.path_params else "UPS-RS"
    said = read_json(body) if body else {}
    return _done(service, service.ledger.request_cancel(_uid(request), said, who), 202)


def _subscribe(service: Service, request: Request, _: bytes) -> Response:
    uid, title = _uid(request), _ae_title(request)
    lock = request.query_params.get("deletionlock", "false").lower()
    if lock not in ("true", "false"):
        raise WorkitemError(0x0106, "deletionlock is true or false")
    others = [one for one in request.query_params.multi_items() if one[0] not in ("deletionlock", "filter")]
    # PS3.18 11.10.1.2 gives the keys as parameters; filter=key=value,key=value is how older editions wrote them.
    for one in request.query_params.getlist("filter"):
        others += [(name, value) for name, _, value in (pair.partition("=") for pair in one.split(","))]
    keys = read_query(others).keys if uid == FILTERED else {}
    service.ledger.subscribe(title, uid, locked=lock == "true", keys=keys)
    channel = _base(request).replace("http", "ws", 1) + f"/subscribers/{title}"
    return _done(service, 0, 201, **{"Content-Location": channel})


def _unsubscribe(service: Service, request: Request, _: bytes) -> Response:
    uid, title = _uid(request), _ae_title(request)
    if uid not in WELL_KNOWN and not any(one["uid"] == uid for one in service.ledger.subscriptions(title)):
        raise WorkitemError(0xC307, "there is no such subscription")
    service.ledger.unsubscribe(title, uid)
    return _done(service, 0)


def _suspend(service: Service, request: Request, _: bytes) -> Response:
    service.ledger.suspend(_ae_title(request), _uid(request))
    return _done(service, 0)


async def _listen(service: Service, socket: WebSocket) -> None:
    """The channel of a subscriber (PS3.18 8.10.4)."""
    try:
        await run_in_threadpool(_authorise, service, socket)
        title = _ae_title(socket)
    except (HttpError, WorkitemError) as error:
        code = error.status if isinstance(error, HttpError) else 400
        await run_in_threadpool(
            service.refusals.note, _by(socket), "WebSocket /subscribers", f"HTTP {code}", str(error)
        )
        await socket.send_denial_response(Response(status_code=code))
        return
    await service.channels.serve(title, socket)
