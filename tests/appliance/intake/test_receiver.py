"""Success means safe; everything else is a definite status, a row and nothing left behind."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest
from sqlalchemy.exc import OperationalError

from appliance.intake.receiver import (
    CANNOT_UNDERSTAND,
    DOES_NOT_MATCH_SOP_CLASS,
    OUT_OF_RESOURCES,
    SUCCESS,
    Receiver,
)
from appliance.intake.spool import Spool, path_of
from appliance.ledger.store import Ledger
from appliance.ledger.views import event_counts, find_study
from dicom_io.header import read_header
from dicom_io.scp import AssociationClosed, Received


@dataclass
class Disk:
    """What os.statvfs tells: blocks of f_frsize bytes, and inodes."""

    f_frsize: int
    f_blocks: int
    f_bavail: int
    f_files: int
    f_favail: int


class Bench:
    """A receiver with one open association."""

    def __init__(self, folder: Path) -> None:
        self.ledger = Ledger(folder / "ledger.sqlite")
        self.spool_directory = folder / "spool"
        self.spool = Spool(self.spool_directory)
        self.rings = 0
        self.receiver = Receiver(self.ledger, self.spool, self._ring)
        self.receiver.opened(1, "SCANNER", "SCANSIDE", "127.0.0.1")

    def _ring(self) -> None:
        self.rings += 1

    def store(self, content: bytes, sop_class: str = "", sop_instance: str = "") -> int:
        if not sop_class:
            header = read_header(content)
            sop_class, sop_instance = header.sop_class_uid, header.sop_instance_uid
        received = Received(
            sop_class, sop_instance, "1.2.840.10008.1.2.1", "SCANNER", "SCANSIDE", "127.0.0.1", 1, content
        )
        return self.receiver.stored(received)

    def files(self) -> list[Path]:
        return [path for path in self.spool_directory.rglob("*") if path.is_file()]

    def events(self) -> dict[str, int]:
        return {name: count for name, count in event_counts(self.ledger).items() if count}


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    one = Bench(tmp_path)
    yield one
    one.ledger.close()


@pytest.fixture
def slice_(ge_head: Path) -> bytes:
    return (ge_head / "01.dcm").read_bytes()


def test_a_stored_instance_lies_in_the_spool_under_its_digest(bench: Bench, slice_: bytes) -> None:
    assert bench.store(slice_) == SUCCESS
    digest = hashlib.sha256(slice_).hexdigest()
    assert bench.files() == [path_of(bench.spool_directory, digest)]
    assert bench.files()[0].read_bytes() == slice_
    assert bench.ledger.digests() == {digest}
    assert bench.rings == 1


def test_the_same_bytes_twice_are_one(bench: Bench, slice_: bytes) -> None:
    assert (bench.store(slice_), bench.store(slice_)) == (SUCCESS, SUCCESS)
    assert len(bench.files()) == len(bench.ledger.digests()) == 1
    assert bench.events()["instance.duplicate"] == 1


def test_other_bytes_under_one_uid_are_both_kept(bench: Bench, slice_: bytes) -> None:
    bench.store(slice_)
    assert bench.store(slice_[:-1] + bytes([slice_[-1] ^ 1])) == SUCCESS
    assert len(bench.files()) == len(bench.ledger.digests()) == 2
    study = find_study(bench.ledger, read_header(slice_).study_instance_uid)
    assert study is not None
    assert len(bench.ledger.instances(study)) == 1


def test_what_cannot_be_read_is_refused_and_written_down(bench: Bench) -> None:
    assert bench.store(b"\0" * 500, "1.2.840.10008.5.1.4.1.1.2", "1.2.3") == CANNOT_UNDERSTAND
    assert bench.files() == []
    assert bench.events()["instance.refused"] == 1
    assert bench.rings == 0


def test_what_the_protocol_layer_refuses_is_written_down(bench: Bench) -> None:
    bench.receiver.refused(1, 0x0117, "no UID", 10)
    assert bench.events()["instance.refused"] == 1


def test_a_command_that_lies_about_the_data_set_is_refused(bench: Bench, slice_: bytes) -> None:
    sop_class = read_header(slice_).sop_class_uid
    assert bench.store(slice_, sop_class, "1.2.3.4") == DOES_NOT_MATCH_SOP_CLASS
    assert bench.store(slice_, "1.2.840.10008.5.1.4.1.1.7", "1.2.3.4") == DOES_NOT_MATCH_SOP_CLASS
    assert bench.files() == []


def test_a_full_disk_is_out_of_resources_and_leaves_nothing(
    bench: Bench, slice_: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fdatasync", full)
    assert bench.store(slice_) == OUT_OF_RESOURCES
    assert bench.files() == []
    monkeypatch.undo()
    assert bench.store(slice_) == SUCCESS


def test_below_the_reserve_nothing_new_is_taken_and_nothing_accepted_is_touched(
    bench: Bench, slice_: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench.store(slice_) == SUCCESS
    kept = bench.files()
    monkeypatch.setattr(bench, "receiver", Receiver(bench.ledger, bench.spool, bench._ring, reserve_bytes=10**18))
    bench.receiver.opened(1, "SCANNER", "SCANSIDE", "127.0.0.1")
    other = slice_[:-1] + bytes([slice_[-1] ^ 1])
    assert bench.store(other) == OUT_OF_RESOURCES
    assert bench.files() == kept
    assert bench.events()["instance.refused"] == 1


@pytest.mark.parametrize(
    ("free", "free_inodes", "said"),
    [(60, 60, ""), (4, 60, "disk's reserve is reached"), (60, 4, "inodes"), (19, 60, "disk's reserve is reached")],
)
def test_the_reserve_counts_share_bytes_and_inodes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, free: int, free_inodes: int, said: str
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: Disk(1000, 100, free, 100, free_inodes))
    shortage = bench.spool.shortage(5.0, 20_000)
    assert said in shortage
    assert bool(shortage) == bool(said)


def test_no_success_without_a_row(bench: Bench, slice_: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(*_: object) -> NoReturn:
        raise OperationalError("insert", {}, Exception("database is locked"))

    monkeypatch.setattr(Ledger, "record_instance", locked)
    assert bench.store(slice_) == OUT_OF_RESOURCES
    monkeypatch.undo()
    # The file may lie there; nobody was told that it is safe, and the next start sweeps it.
    assert bench.spool.sweep(bench.ledger.digests()) == 1
    assert bench.files() == []


def test_the_sweep_removes_only_what_was_never_acknowledged(bench: Bench, slice_: bytes) -> None:
    bench.store(slice_)
    bench.spool.put(b"orphan")
    (bench.spool_directory / "incoming" / "half").write_bytes(b"half")
    assert bench.spool.sweep(bench.ledger.digests()) == 2
    assert [path.read_bytes() for path in bench.files()] == [slice_]


def test_durable_before_success(bench: Bench, slice_: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order on disk: file synced, renamed, folder synced, and only then the row."""
    steps: list[str] = []
    for name in ("fdatasync", "fsync"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda fd, name=name, real=real: (steps.append(name), real(fd))[1])
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: (steps.append("replace"), replace(self, target))[1])
    record = Ledger.record_instance
    monkeypatch.setattr(Ledger, "record_instance", lambda *a: (steps.append("row"), record(*a))[1])
    assert bench.store(slice_) == SUCCESS
    assert steps == ["fdatasync", "replace", "fsync", "fsync", "row"]


def test_the_end_of_an_association_is_written_down_once(bench: Bench) -> None:
    closed = AssociationClosed(1, "SCANNER", "SCANSIDE", "127.0.0.1", "broken")
    bench.receiver.closed(closed)
    bench.receiver.closed(closed)
    assert bench.events() == {"association.opened": 1, "association.closed": 1}
    assert bench.rings == 1
