"""Small synthetic CT instances, and the tools that judge them."""

from __future__ import annotations

import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import UID, CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

from dicom_io.commitment import CommitmentReport, CommitmentRequest
from dicom_io.handlers import Answer, Handlers, Outcome, Refusal, Session, Sink, StoreRequest
from dicom_io.performed import Request
from dicom_io.scp import Listener, ServerOptions, StorageServer, start_server

ROWS, COLUMNS = 48, 40  # not square, so that an exchange of the two shows


def run(*command: object, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a tool that must succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done


def head(bits: int, signed: bool, frames: int = 1, seed: int = 0) -> NDArray[Any]:
    """(frames, ROWS, COLUMNS) of smooth anatomy with noise that also holds the extreme values of its range."""
    random = np.random.default_rng(seed)
    least, most = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    z, y, x = np.mgrid[:frames, :ROWS, :COLUMNS]
    smooth = np.sin(x / 7 + z) * np.cos(y / 9) / 2.5 + 0.5
    values = least + smooth * (most - least) + random.normal(0, 5, smooth.shape)
    image = values.clip(least, most).astype(np.int16 if signed else np.uint16)
    image[:, 0, 0], image[:, -1, -1] = least, most
    return image


def ct(
    pixels: NDArray[Any],
    bits: int,
    *,
    position: tuple[float, float, float] = (-100.0, -120.0, 50.0),
    instance_number: int = 1,
    study: str = "2.25.1",
    series: str = "2.25.2",
    **attributes: Any,
) -> Dataset:
    """A CT image (Enhanced CT if it has several frames) of stored values; attributes of value None are removed."""
    frames = pixels.shape[0]
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.SOPClassUID = CTImageStorage if frames == 1 else EnhancedCTImageStorage
    dataset.SOPInstanceUID = generate_uid(None)
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study, series
    dataset.FrameOfReferenceUID = "2.25.3"
    dataset.Modality, dataset.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.PatientName, dataset.PatientID = "Phantom^Test", "T1"
    dataset.PatientBirthDate, dataset.PatientSex, dataset.PatientAge = "19500102", "O", "074Y"
    dataset.StudyDate, dataset.StudyTime, dataset.AccessionNumber = "20240101", "101500", "A1"
    dataset.InstanceNumber, dataset.SeriesNumber = instance_number, 2
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = pixels.shape[1:]
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    rescale = {"RescaleSlope": "1", "RescaleIntercept": "0" if pixels.dtype.kind == "i" else "-1024"}
    if frames == 1:
        place(dataset, dataset, dataset, position)
        dataset.KVP, dataset.GantryDetectorTilt, dataset.ConvolutionKernel = "120", "0", "H31s"
        dataset.BodyPartExamined = "HEAD"
        attributes = rescale | attributes
    else:
        dataset.NumberOfFrames = frames
        dataset.PerFrameFunctionalGroupsSequence = [
            enhanced_group(rescale, (position[0], position[1], position[2] + 5.0 * frame)) for frame in range(frames)
        ]
        dataset.SharedFunctionalGroupsSequence = [Dataset()]
    dataset.PixelData = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    dataset["PixelData"].VR = "OW"
    for keyword, value in attributes.items():
        if value is None:
            dataset.pop(keyword, None)
        else:
            setattr(dataset, keyword, value)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return dataset


def place(
    where: Dataset, turned: Dataset, measured: Dataset, position: tuple[float, float, float], thickness: str = "5"
) -> None:
    where.ImagePositionPatient = list(position)
    turned.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    measured.PixelSpacing, measured.SliceThickness = ["0.5", "0.4"], thickness


def enhanced_group(rescale: dict[str, str], position: tuple[float, float, float]) -> Dataset:
    """Functional groups of one frame."""
    where, turned, measured, transformed, group = (Dataset() for _ in range(5))
    place(where, turned, measured, position)
    for keyword, value in rescale.items():
        setattr(transformed, keyword, value)
    transformed.RescaleType = "HU"
    group.PlanePositionSequence = Sequence([where])
    group.PlaneOrientationSequence = Sequence([turned])
    group.PixelMeasuresSequence = Sequence([measured])
    group.PixelValueTransformationSequence = Sequence([transformed])
    return group


def save(dataset: Dataset, path: Path) -> Path:
    """Write in the transfer syntax that its file meta names."""
    syntax = UID(dataset.file_meta.TransferSyntaxUID)
    dataset.save_as(path, enforce_file_format=True, implicit_vr=syntax.is_implicit_VR, little_endian=True)
    return path


@dataclass(frozen=True)
class Received:
    """One instance that came whole: its command, its association, and the Part 10 file."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    calling_ae: str
    called_ae: str
    address: str
    association: int
    part10: bytes


@dataclass(frozen=True)
class Closed:
    association: int
    outcome: Outcome
    stores: int


class _Keeper:
    """A sink that gathers one instance for a `Recorder`."""

    def __init__(self, recorder: Recorder, session: Session, request: StoreRequest) -> None:
        self._recorder, self._session, self._request = recorder, session, request
        self._content = bytearray()
        self._ahead = bytearray()

    def arrived(self, data: memoryview) -> None:
        self._ahead += data
        self._recorder.looked_at += len(data)

    def write(self, data: memoryview) -> None:
        assert data[: len(self._ahead)] == self._ahead
        self._ahead.clear()
        self._content += data

    def commit(self) -> None:
        session, request = self._session, self._request
        received = Received(
            request.sop_class_uid, request.sop_instance_uid, request.transfer_syntax_uid,
            session.calling_ae, session.called_ae, session.address, session.number, bytes(self._content),
        )  # fmt: skip
        status = self._recorder.stored(received)
        if status:
            raise Refusal(status, "as the test wants it")

    def discard(self) -> None:
        self._recorder.discarded += 1


class Recorder:
    """Handlers that keep what they are told."""

    def __init__(self, status: int = 0x0000) -> None:
        self.status = status
        self.opened_calls: list[Session] = []
        self.rejected_calls: list[tuple[str, str, str]] = []
        self.received: list[Received] = []
        self.refused_calls: list[tuple[int, int]] = []
        self.closed_calls: list[Closed] = []
        self.requests: list[CommitmentRequest] = []
        self.reports: list[CommitmentReport] = []
        self.committed_calls: list[CommitmentReport] = []
        self.reported_calls: list[tuple[str, int | None]] = []
        self.performed_calls: list[Request] = []
        self.performed_refusals: list[Answer] = []
        self.discarded = 0
        self.looked_at = 0  # bytes that a sink could look at before they were written
        self._changed = threading.Condition()

    def opened(self, session: Session) -> None:
        with self._changed:
            self.opened_calls.append(session)
            self._changed.notify_all()

    def rejected(self, address: str, calling_ae: str, reason: str) -> None:
        with self._changed:
            self.rejected_calls.append((address, calling_ae, reason))
            self._changed.notify_all()

    def receive(self, session: Session, request: StoreRequest) -> Sink | Answer:
        return _Keeper(self, session, request)

    def stored(self, received: Received) -> int:
        with self._changed:
            self.received.append(received)
            self._changed.notify_all()
        return self.status

    def refused(self, session: Session, answer: Answer, size: int) -> None:
        assert answer.comment
        with self._changed:
            self.refused_calls.append((answer.status, size))
            self._changed.notify_all()

    def commitment(self, session: Session, request: CommitmentRequest) -> int:
        self.requests.append(request)
        return 0x0000

    def report(self, session: Session) -> CommitmentReport | None:
        return self.reports.pop(0) if self.reports else None

    def reported(self, session: Session, transaction_uid: str, status: int | None) -> None:
        self.reported_calls.append((transaction_uid, status))

    def committed(self, session: Session, report: CommitmentReport) -> Answer:
        self.committed_calls.append(report)
        return Answer(self.status)

    def performed(self, session: Session, request: Request) -> Answer:
        self.performed_calls.append(request)
        return Answer(self.status)

    def performed_refused(self, session: Session, answer: Answer) -> None:
        assert answer.comment
        self.performed_refusals.append(answer)

    def closed(self, session: Session, outcome: Outcome, stores: int) -> None:
        with self._changed:
            self.closed_calls.append(Closed(session.number, outcome, stores))
            self._changed.notify_all()

    def wait(self, *, received: int = 0, closed: int = 0, opened: int = 0, seconds: float = 10) -> None:
        """Wait until at least so much has happened."""
        with self._changed:
            assert self._changed.wait_for(
                lambda: (
                    len(self.received) >= received
                    and len(self.closed_calls) >= closed
                    and len(self.opened_calls) >= opened
                ),
                seconds,
            ), f"{len(self.received)} received, {len(self.closed_calls)} closed, {len(self.opened_calls)} opened"


@contextmanager
def serving(handlers: Handlers, certificates: Any = None, **options: Any) -> Iterator[StorageServer]:
    server = start_server(
        ServerOptions(ae_title="SCANSIDE", **options), [Listener("127.0.0.1", 0, certificates)], handlers
    )
    try:
        yield server
    finally:
        server.stop(0.2)


def data_set(part10: bytes) -> bytes:
    """The bytes behind the File Meta Information of a Part 10 file, found by its group length (PS3.10 7.1)."""
    assert part10[:132] == bytes(128) + b"DICM" and part10[132:140] == b"\x02\0\0\0UL\x04\0"
    (length,) = struct.unpack("<I", part10[140:144])
    return part10[144 + length :]


class Tap:
    """A TCP relay that keeps what the client sends, to say from the bytes on the wire what a peer sent."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.sent = bytearray()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        server = socket.create_connection(("127.0.0.1", self._target))
        threading.Thread(target=self._relay, args=(server, client, None), daemon=True).start()
        self._relay(client, server, self.sent)

    @staticmethod
    def _relay(source: socket.socket, target: socket.socket, copy: bytearray | None) -> None:
        while data := source.recv(65536):
            if copy is not None:
                copy += data
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)

    def data_sets(self) -> list[bytes]:
        """The data set of each message: fragments without the command bit, up to the last one (PS3.8 E.2)."""
        found, current, at = [], b"", 0
        while at < len(self.sent):
            kind, length = struct.unpack(">BxI", self.sent[at : at + 6])
            item, end = at + 6, at + 6 + length
            while kind == 4 and item < end:
                size, _context, control = struct.unpack(">IBB", self.sent[item : item + 6])
                if not control & 1:
                    current += bytes(self.sent[item + 6 : item + 4 + size])
                    if control & 2:
                        found.append(current)
                        current = b""
                item += 4 + size
            at = end
        return found
