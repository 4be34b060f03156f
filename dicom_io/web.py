"""DICOMweb, as far as the box needs it: storing instances in an archive by STOW-RS (PS3.18 10.5)."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from dicom_io.errors import PeerError

PROCESSING_FAILURE = 0x0110
"""Failure Reason of an instance that failed for a reason that is not given (PS3.18 I.2)."""
MAXIMUM_ANSWER = 4 << 20
"""Bytes of an answer that are read; a longer one is none."""

_REFERENCED, _FAILED = "00081199", "00081198"
_INSTANCE, _FAILURE, _WARNING = "00081155", "00081197", "00081196"


@dataclass(frozen=True, slots=True)
class Archive:
    """Where an archive's DICOMweb is, and how it is called.

    Attributes:
        url: of the service, without a slash at its end: its `studies` resource lies below.
        context: for https.
        authorization: value of the Authorization header; '' for none.
        timeout: seconds that the connection, and each piece of the answer, may take.
    """

    url: str
    context: ssl.SSLContext | None = field(default=None, compare=False, repr=False)
    authorization: str = field(default="", repr=False)
    timeout: float = 30.0

    def __str__(self) -> str:
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


@dataclass(frozen=True, slots=True)
class Stored:
    """What an archive answered to one instance.

    Attributes:
        status: of HTTP.
        said: its reason phrase.
        referenced: whether its answer names the instance as stored.
        failure: Failure Reason (0008,1197; PS3.18 10.5.3) of the instance, None if it names none.
        warning: Warning Reason (0008,1196) of the instance, None if it names none.
        told: whether it holds a data set at all.
    """

    status: int
    said: str
    referenced: bool
    failure: int | None
    warning: int | None
    told: bool


def store(archive: Archive, path: Path, sop_instance_uid: str) -> Stored:
    """Send one Part 10 file, as it is, in a request of its own.

    The media type does not name the transfer syntax, which the file does: Orthanc's DICOMweb 1.7 leaves out a part that
    has a parameter, and answers 200.

    Raises:
        PeerError: no connection, or no answer; the archive may have the instance.
    """
    boundary = uuid4().hex
    head = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
    tail = f"\r\n--{boundary}--\r\n".encode()
    headers = {
        "Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}',
        "Accept": "application/dicom+json",
    }
    with _asking(archive, "POST", "/studies", head + path.read_bytes() + tail, headers) as (status, said, content):
        answer = _told(content)
        kept, failed = _item(answer, _REFERENCED, sop_instance_uid), _item(answer, _FAILED, sop_instance_uid)
        return Stored(
            status,
            said,
            referenced=kept is not None,
            failure=None if failed is None else _number(failed, _FAILURE, PROCESSING_FAILURE),
            warning=None if kept is None else _number(kept, _WARNING, None),
            told=bool(answer),
        )


def reach(archive: Archive) -> None:
    """Ask the archive for a study that nobody has (QIDO-RS, PS3.18 10.6).

    Raises:
        PeerError: no connection, no answer, or one that is no success.
    """
    headers = {"Accept": "application/dicom+json"}
    with _asking(archive, "GET", "/studies?StudyInstanceUID=2.25.0&limit=1", None, headers) as (status, said, _):
        if status not in (200, 204):
            raise PeerError(f"it answered {status} {said}".strip(), str(archive), "check its address and our login")


@contextmanager
def _asking(
    archive: Archive, method: str, resource: str, body: bytes | None, headers: Mapping[str, str]
) -> Iterator[tuple[int, str, bytes]]:
    """One request on a connection of its own: status, reason phrase and content of the answer. Redirections are not
    followed: who we are, and a patient's images, are for this address only."""
    parts = urlsplit(archive.url)
    host, port = parts.hostname or "", parts.port
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(host, port, timeout=archive.timeout, context=archive.context)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=archive.timeout)
    login = {"Authorization": archive.authorization} if archive.authorization else {}
    try:
        try:
            connection.connect()
        except OSError as error:
            said = getattr(error, "verify_message", "") or error.strerror or str(error)
            remedy = "check the address, the network and the certificate"
            raise PeerError(f"it cannot be reached ({said})", str(archive), remedy) from error
        try:
            connection.request(method, parts.path + resource, body, {"User-Agent": "scanside", **login, **headers})
            answer = connection.getresponse()
            content = answer.read(MAXIMUM_ANSWER)
        except (OSError, http.client.HTTPException) as error:
            # An HTTPException may quote what came, and that a patient.
            said = "" if isinstance(error, http.client.HTTPException) else str(error)
            what = f"it did not answer ({said or type(error).__name__})"
            raise PeerError(what, str(archive), "the same request will be sent again") from error
        yield answer.status, answer.reason or "", content
    finally:
        connection.close()


def _told(content: bytes) -> Mapping[str, Any]:
    """The answer as a DICOM JSON object (PS3.18 F.2); an empty one if it is none."""
    try:
        told = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    if isinstance(told, list) and len(told) == 1:
        told = told[0]
    return told if isinstance(told, dict) else {}


def _item(told: Mapping[str, Any], sequence: str, sop_instance_uid: str) -> Mapping[str, Any] | None:
    """The item of a sequence that names the instance."""
    element = told.get(sequence)
    items = element.get("Value") if isinstance(element, dict) else None
    for item in items if isinstance(items, list) else ():
        if isinstance(item, dict) and _value(item, _INSTANCE) == sop_instance_uid:
            return item
    return None


def _number(item: Mapping[str, Any], tag: str, otherwise: int | None) -> int | None:
    value = _value(item, tag)
    return value if isinstance(value, int) else otherwise


def _value(item: Mapping[str, Any], tag: str) -> Any:
    element = item.get(tag)
    values = element.get("Value") if isinstance(element, dict) else None
    return values[0] if isinstance(values, list) and values else None
