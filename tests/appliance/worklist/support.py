"""A worklist over HTTP, and a client that knows its addresses."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from appliance.ledger.store import Ledger
from appliance.worklist.channel import Channels
from appliance.worklist.refusals import Refusals
from appliance.worklist.server import WebServer
from appliance.worklist.web import Service
from dicom_io.tls import ServerCertificates
from dicom_io.workitem import Step, put
from tests.workitems import READING, workitem

JSON = {"Content-Type": "application/dicom+json"}


class Served:
    """A ledger, the server on it, and a client."""

    def __init__(self, folder: Path, token_file: Path | None, certificates: ServerCertificates | None) -> None:
        self.ledger = Ledger(folder / "ledger.sqlite")
        bound = socket.create_server(("127.0.0.1", 0))
        service = Service(
            self.ledger, Refusals(self.ledger), Channels(self.ledger), READING, token_file, lambda: self.server.wake()
        )
        self.server = WebServer(service, bound, certificates)
        self.address = f"127.0.0.1:{self.server.port}/ups-rs"
        self.http = httpx.Client(base_url=f"http://{self.address}/", timeout=20, trust_env=False)

    def post(self, path: str, step: Any = None, **options: Any) -> httpx.Response:
        body = None if step is None else json.dumps(step).encode()
        return self.http.post(path, content=body, headers=JSON if body else {}, **options)

    def create(self, uid: str, step: Step | None = None) -> httpx.Response:
        return self.post(f"workitems?{uid}", [workitem() if step is None else step])

    def state(self, uid: str, state: str, lock: str) -> httpx.Response:
        said: Step = {}
        put(said, "ProcedureStepState", "CS", state)
        put(said, "TransactionUID", "UI", *([lock] if lock else []))
        return self.http.put(f"workitems/{uid}/state", content=json.dumps([said]).encode(), headers=JSON)


@contextmanager
def serving(
    folder: Path, token_file: Path | None = None, certificates: ServerCertificates | None = None
) -> Iterator[Served]:
    served = Served(folder, token_file, certificates)
    try:
        yield served
    finally:
        served.http.close()
        served.server.stop(5)
        served.ledger.close()
