"""`scanside intake` as a process of its own, and what it kept, for tests with senders that nobody here wrote."""

from __future__ import annotations

import hashlib
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom
import sqlalchemy as sa
from pydicom.dataset import FileDataset
from pydicom.uid import generate_uid

from appliance import init
from appliance.demo.orthanc import LOOPBACK, free_ports
from appliance.intake.spool import path_of
from appliance.ledger import schema as t
from appliance.ledger.store import Ledger
from appliance.operations.leash import Leashed
from appliance.settings import load_settings
from dicom_io.scu import Peer
from tests.dicom_io.support import Tap, data_set
from tests.interop.box import wait_for

AE_TITLE = "SCANSIDE"


@dataclass(frozen=True, slots=True)
class Kept:
    """A row of the ledger, and the association that brought it."""

    path: Path
    calling_ae: str
    association: int
    outcome: str | None

    @property
    def dataset(self) -> FileDataset:
        return pydicom.dcmread(self.path)

    @property
    def data_set(self) -> bytes:
        """The bytes behind the File Meta Information."""
        return data_set(self.path.read_bytes())


class Intake:
    """A running intake."""

    def __init__(self, folder: Path) -> None:
        (self.port,) = free_ports(1)
        section = {"host": LOOPBACK, "port": self.port, "reserve_percent": 0.0, "reserve_bytes": 0}
        config = init.write(folder, {"intake": {"ae_title": AE_TITLE, **section}})
        self.settings = load_settings(config)
        self.peer = Peer(AE_TITLE, LOOPBACK, self.port)
        self.process = Leashed(
            [sys.executable, "-m", "appliance.cli", "--config", config, "intake"], log=folder / "intake.log", grace=10.0
        )

        def listening() -> bool | None:
            assert self.process.running, self.process.tail(30)
            with socket.socket() as probe:
                return True if probe.connect_ex((LOOPBACK, self.port)) == 0 else None

        wait_for(listening, 30.0, lambda: f"the intake does not listen\n{self.process.tail(30)}")
        self.ledger = Ledger(self.settings.ledger_path)

    @property
    def spool(self) -> Path:
        return self.settings.spool_directory

    def stop(self) -> None:
        self.ledger.close()
        self.process.stop()

    def tap(self) -> Tap:
        """A port before the intake that keeps what one association sends."""
        return Tap(self.port)

    def all_kept(self, sop_instance_uid: str) -> list[Kept]:
        """The rows of an instance, oldest first; each has its file, of that SHA-256 and size."""
        i, a = t.instance.c, t.association.c
        query = sa.select(i.digest, i.size, a.id, a.calling_ae, a.outcome).join_from(t.instance, t.association)
        with self.ledger.read() as connection:
            rows = connection.execute(query.where(i.sop_instance_uid == sop_instance_uid).order_by(i.id)).all()
        found = []
        for row in rows:
            path = path_of(self.spool, row.digest)
            content = path.read_bytes()
            assert (hashlib.sha256(content).hexdigest(), len(content)) == (row.digest, row.size)
            found.append(Kept(path, row.calling_ae, row.id, row.outcome))
        return found

    def kept(self, sop_instance_uid: str) -> Kept:
        """The one row of an instance."""
        (one,) = self.all_kept(sop_instance_uid)
        return one

    def ended(self, sop_instance_uid: str) -> str:
        """How the association that brought an instance ended; waits for that."""
        return wait_for(lambda: self.kept(sop_instance_uid).outcome, 10.0, lambda: self.process.tail(30))


@contextmanager
def running_intake(folder: Path) -> Iterator[Intake]:
    """Start an intake in a folder; stop it."""
    folder.mkdir(parents=True, exist_ok=True)
    intake = Intake(folder)
    try:
        yield intake
    finally:
        intake.stop()


def as_other_study(files: list[Path], folder: Path, **attributes: Any) -> list[Path]:
    """The same images under the same names, with UIDs of their own and other attributes on demand."""
    folder.mkdir(parents=True, exist_ok=True)
    study, series = generate_uid(None), generate_uid(None)
    made = []
    for path in files:
        dataset = pydicom.dcmread(path)
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study, series
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid(None)
        for keyword, value in attributes.items():
            setattr(dataset, keyword, value)
        dataset.save_as(folder / path.name)
        made.append(folder / path.name)
    return made
