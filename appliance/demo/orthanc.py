"""The hospital's PACS for the demo and the tests: Orthanc as a child process, or a plain storage SCP without it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from appliance.operations.leash import Leashed
from dicom_io.errors import PeerError
from dicom_io.scu import Peer

LOOPBACK = "127.0.0.1"
PLACES = (Path("/usr/sbin/Orthanc"), Path("/usr/local/sbin/Orthanc"), Path("/usr/local/bin/Orthanc"))
DICOMWEB = (
    Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so"),
    Path("/usr/local/share/orthanc/plugins/libOrthancDicomWeb.so"),
)
START_TIMEOUT = 20.0
STOP_GRACE = 8.0
"""Seconds; Orthanc 1.10 takes 2.5 to 4 s to stop."""


class Pacs(Protocol):
    """What the demo needs of an archive."""

    @property
    def name(self) -> str: ...
    @property
    def ae_title(self) -> str: ...
    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...

    def holds(self, study_uid: str) -> list[tuple[str, str]]:
        """(SOPClassUID, SOPInstanceUID) of every instance of the study that it keeps; sorted."""

    def stop(self) -> None:
        """Stop it and wait until it is gone."""


@dataclass(frozen=True, slots=True)
class StoredInstance:
    """One instance that Orthanc keeps, with its Orthanc identifier."""

    orthanc_id: str
    sop_class_uid: str
    sop_instance_uid: str
    modality: str
    series_description: str


def find_orthanc() -> Path | None:
    """The Orthanc program, from PATH or where packages put it; None where it is not installed."""
    found = shutil.which("Orthanc")
    return Path(found) if found else next((path for path in PLACES if os.access(path, os.X_OK)), None)


def free_ports(count: int) -> list[int]:
    """Different TCP ports of the loopback interface that nothing used a moment ago.

    They lie below the range from which Linux gives ports to outgoing connections, so that none takes one of them
    between now and its use.
    """
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        while len(ports) < count:
            with contextlib.suppress(OSError):
                server = held.enter_context(socket.create_server((LOOPBACK, random.randint(15000, 32000))))
                ports.append(int(server.getsockname()[1]))
        return ports


def free_port() -> int:
    """One of `free_ports`."""
    return free_ports(1)[0]


def configuration(
    folder: Path,
    ae_title: str,
    http_port: int,
    dicom_port: int,
    modalities: Mapping[str, Peer],
    *,
    synced: bool = False,
) -> dict[str, Any]:
    """Orthanc's configuration for a PACS that only this machine can use.

    Orthanc 1.10 binds both ports to every interface and has no setting for it. So the rest of the network is turned
    away instead: by HTTP with ``RemoteAccessAllowed``, by DICOM because only the modalities named here are accepted,
    and only from their own address. ``HttpBindAddresses`` narrows the HTTP port itself in versions that know it.

    Args:
        modalities: name → peer that may send to this PACS and that `Orthanc.store_to` can send to.
        synced: whether each file is synced to disk before its sender is answered; Orthanc's own default is yes.
    """
    plugin = next((path for path in DICOMWEB if path.is_file()), None)
    return {
        "Name": "Demo PACS",
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "Plugins": [str(plugin)] if plugin else [],
        "HttpPort": http_port,
        "HttpBindAddresses": [LOOPBACK],
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomAet": ae_title,
        "DicomPort": dicom_port,
        "DicomCheckCalledAet": True,
        "DicomCheckModalityHost": True,
        "DicomAlwaysAllowEcho": False,
        "DicomAlwaysAllowStore": False,
        "DicomModalities": {
            name: {"AET": peer.ae_title, "Host": peer.host, "Port": peer.port, "AllowTranscoding": False}
            for name, peer in modalities.items()
        },
        "OverwriteInstances": False,
        "UnknownSopClassAccepted": True,
        "StableAge": 1,
        "SaveJobs": False,
        "SyncStorageArea": synced,
        "CheckRevisions": False,
        # Stopping waits for idle HTTP connections.
        "KeepAlive": False,
    }


class Orthanc:
    """A running Orthanc; `start_orthanc` makes one.

    Every method raises `PeerError` when Orthanc does not answer or answers with an error.
    """

    name = "Orthanc"
    host = LOOPBACK

    def __init__(self, process: Leashed, ae_title: str, port: int, http_port: int) -> None:
        self.ae_title = ae_title
        self.port = port
        self.http_port = http_port
        self._process = process
        self._known: dict[str, StoredInstance] = {}

    @property
    def url(self) -> str:
        """Where its REST interface answers, without a trailing slash."""
        return f"http://{LOOPBACK}:{self.http_port}"

    @property
    def version(self) -> str:
        return str(self._ask("/system")["Version"])

    @property
    def running(self) -> bool:
        return self._process.running

    @property
    def process(self) -> Leashed:
        return self._process

    def instance_uids(self) -> set[str]:
        """SOPInstanceUID of everything it keeps."""
        return {str(one["MainDicomTags"]["SOPInstanceUID"]) for one in self._ask("/instances?expand")}

    def studies(self) -> list[str]:
        """StudyInstanceUID of every study, sorted."""
        return sorted(str(study["MainDicomTags"]["StudyInstanceUID"]) for study in self._ask("/studies?expand"))

    def instances(self, study_uid: str) -> list[StoredInstance]:
        """The instances of one study, by series description and SOPInstanceUID; empty where it keeps none."""
        found: list[StoredInstance] = []
        for match in self._ask("/tools/lookup", study_uid.encode()):
            if match["Type"] != "Study":
                continue
            for series in self._ask(f"/studies/{match['ID']}/series"):
                found.extend(self._instance(identifier, series) for identifier in series["Instances"])
        return sorted(found, key=lambda instance: (instance.series_description, instance.sop_instance_uid))

    def _instance(self, identifier: str, series: Mapping[str, Any]) -> StoredInstance:
        """One instance by its Orthanc identifier; asked once, since what is stored does not change."""
        if identifier not in self._known:
            tags = series["MainDicomTags"]
            self._known[identifier] = StoredInstance(
                orthanc_id=identifier,
                sop_class_uid=self._text(f"/instances/{identifier}/metadata/SopClassUid"),
                sop_instance_uid=str(self._ask(f"/instances/{identifier}")["MainDicomTags"]["SOPInstanceUID"]),
                modality=str(tags.get("Modality", "")),
                series_description=str(tags.get("SeriesDescription", "")),
            )
        return self._known[identifier]

    def holds(self, study_uid: str) -> list[tuple[str, str]]:
        """See `Pacs.holds`."""
        return sorted((i.sop_class_uid, i.sop_instance_uid) for i in self.instances(study_uid))

    def file(self, orthanc_id: str) -> bytes:
        """One instance as a Part 10 file."""
        return self._fetch(f"/instances/{orthanc_id}/file")

    def store_to(self, modality: str, orthanc_ids: Iterable[str]) -> None:
        """Send instances, series or studies to a modality of the configuration by C-STORE; waits for the end.

        Raises:
            PeerError: the modality did not take all of them.
        """
        order = {"Resources": list(orthanc_ids), "Synchronous": True}
        self._fetch(f"/modalities/{modality}/store", json.dumps(order).encode(), timeout=300.0)

    def reset(self) -> None:
        """Delete everything it keeps."""
        for patient in self._ask("/patients"):
            self._fetch(f"/patients/{patient}", method="DELETE")
        self._known.clear()

    def wait_until_ready(self, seconds: float) -> None:
        """Wait until this Orthanc, and not another one on its port, answers.

        Raises:
            PeerError: it ended, or does not answer in time.
        """
        log = str(self._process.log)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not self.running:
                raise PeerError(f"Orthanc ended at once: {self._process.tail(1)}", log, "read its log")
            try:
                # Whatever else listens on this port may take a request and never answer it.
                system = json.loads(self._fetch("/system", timeout=1.0))
            except PeerError:
                time.sleep(0.02)
                continue
            if system["DicomPort"] == self.port and system["DicomAet"] == self.ae_title:
                return
            time.sleep(0.05)
        raise PeerError(f"Orthanc did not answer within {seconds:g} s", log, "read its log")

    def stop(self) -> None:
        """See `Pacs.stop`."""
        self._process.stop()

    def release(self) -> None:
        """Begin to stop it without waiting; `stop` then waits."""
        self._process.release()

    def _ask(self, path: str, body: bytes | None = None) -> Any:
        return json.loads(self._fetch(path, body))

    def _text(self, path: str) -> str:
        return self._fetch(path).decode("ascii")

    def _fetch(
        self, path: str, body: bytes | None = None, *, method: str | None = None, timeout: float = 30.0
    ) -> bytes:
        request = urllib.request.Request(self.url + path, data=body, method=method)
        try:
            # A proxy that the environment names must not come between.
            with _DIRECT.open(request, timeout=timeout) as response:
                return bytes(response.read())
        except urllib.error.HTTPError as error:
            reason = error.read().decode("utf-8", errors="replace")
            with_detail = _detail(reason) or error.reason
            raise PeerError(f"Orthanc refused {path}: {with_detail}", self.url, "see its log") from error
        except (OSError, ValueError) as error:
            raise PeerError(f"Orthanc does not answer: {error}", self.url, "see its log") from error


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _detail(answer: str) -> str:
    """What Orthanc says in words when it refuses."""
    try:
        told = json.loads(answer)
    except ValueError:
        return answer.strip()
    return str(told.get("Details") or told.get("Message") or "") if isinstance(told, dict) else ""


def start_orthanc(
    program: Path,
    folder: Path,
    modalities: Mapping[str, Peer],
    *,
    ae_title: str = "ORTHANC",
    port: int = 0,
    http_port: int = 0,
    synced: bool = False,
    no_delay: bool = False,
) -> Orthanc:
    """Start Orthanc with its storage and log in ``folder`` and wait until it answers.

    Args:
        port: DICOM port, http_port: REST port; 0 takes a free one.
        synced: see `configuration`.
        no_delay: switch Nagle's algorithm off in its DICOM server, as far as DCMTK's TCP_NODELAY does.

    Raises:
        PeerError: it does not start, or not within 20 s.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "orthanc.json"
    # Another program can take a free port before Orthanc binds it; then others are tried.
    attempts = 1 if port and http_port else 3
    while True:
        attempts -= 1
        chosen_http, chosen_dicom = http_port or free_port(), port or free_port()
        chosen = configuration(folder, ae_title, chosen_http, chosen_dicom, modalities, synced=synced)
        settings.write_text(json.dumps(chosen, indent=2) + "\n")
        prefix = ["env", "TCP_NODELAY=1"] if no_delay else []
        process = Leashed([*prefix, program, settings], log=folder / "orthanc.log", grace=STOP_GRACE)
        orthanc = Orthanc(process, ae_title, chosen_dicom, chosen_http)
        try:
            orthanc.wait_until_ready(START_TIMEOUT)
            return orthanc
        except BaseException as error:
            orthanc.stop()
            if attempts <= 0 or not isinstance(error, PeerError):
                raise
