"""Success means safe; everything else is a definite status, a row and nothing left behind."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
from sqlalchemy.exc import OperationalError

from appliance.intake.commitment import CommitmentProvider
from appliance.intake.receiver import (
    CANNOT_UNDERSTAND,
    DOES_NOT_MATCH_SOP_CLASS,
    OUT_OF_RESOURCES,
    Receiver,
)
from appliance.intake.spool import Spool, Swept, path_of
from appliance.ledger.store import Ledger
from appliance.ledger.views import event_counts, find_study, verify_events
from dicom_io.handlers import Answer, Refusal, Session, StoreRequest
from dicom_io.header import read_header
from dicom_io.performed import NewStep

SUCCESS = 0x0000


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
        self.shortage = ""
        self.refusals: list[str] = []
        commitments = CommitmentProvider(
            self.ledger,
            self.spool_directory,
            {},
            attempts=1,
            first_retry_seconds=1.0,
            longest_retry_seconds=1.0,
        )
        self.receiver = Receiver(self.ledger, self.spool, self._ring, self._ring, commitments, lambda: self.shortage)
        self.session = Session(1, "SCANNER", "SCANSIDE", "127.0.0.1")
        self.receiver.opened(self.session)

    def _ring(self) -> None:
        self.rings += 1

    def store(
        self,
        content: bytes,
        sop_class: str = "",
        sop_instance: str = "",
        piece: int = 1 << 20,
        session: int = 1,
        look: int = 0,
    ) -> int:
        """Hand an instance over as the protocol layer does; the status that its sender would get.

        Args:
            look: bytes that can be looked at together before the piece is whole; 0 is none.
        """
        if not sop_class:
            header = read_header(content)
            sop_class, sop_instance = header.sop_class_uid, header.sop_instance_uid
        who = Session(session, "SCANNER", "SCANSIDE", "127.0.0.1")
        sink = self.receiver.receive(who, StoreRequest(sop_class, sop_instance, "1.2.840.10008.1.2.1"))
        if isinstance(sink, Answer):
            self.receiver.refused(who, sink, len(content))
            return sink.status
        written = False
        try:
            for start in range(0, len(content), piece):
                data = memoryview(content)[start : start + piece]
                for at in range(0, len(data) // look * look if look else 0, look or 1):
                    sink.arrived(data[at : at + look])
                sink.write(data)
            written = True
            sink.commit()
        except Refusal as refusal:
            if not written:
                sink.discard()
            self.receiver.refused(who, refusal.answer, len(content))
            self.refusals.append(refusal.answer.comment)
            return refusal.answer.status
        return SUCCESS

    def leave_behind(self, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        """An instance that was named and has no row, as a crash between the two leaves it."""

        def locked(*_: object) -> NoReturn:
            raise OperationalError("insert", {}, Exception("database is locked"))

        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "record_instances", locked)
            assert self.store(content) == OUT_OF_RESOURCES

    def sweep(self) -> Swept:
        """As the start of intake does."""
        return self.spool.sweep(self.ledger.digests(), self.ledger.removed_among)

    def in_lanes(self) -> list[Path]:
        """The files in lanes, without those that are names only, made ahead."""
        return [path for path in (self.spool_directory / "incoming").glob("*/*") if path.stat().st_size]

    def files(self) -> list[Path]:
        """The files under their own names; one that waits in its lane has the same bytes."""
        named = [path for path in self.spool_directory.glob("??/*") if path.is_file()]
        waiting = self.in_lanes()
        assert all(any(path.samefile(one) for one in named) for path in waiting if path.stat().st_nlink > 1)
        return named + [path for path in waiting if path.stat().st_nlink == 1]

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


@pytest.mark.parametrize("look", [0, 100, 3000], ids=["unseen", "its header seen in pieces", "seen in pieces"])
@pytest.mark.parametrize("piece", [1 << 20, 4096, 1000], ids=["whole", "in pieces", "its header in pieces"])
def test_a_stored_instance_lies_in_the_spool_under_its_digest(
    bench: Bench, slice_: bytes, piece: int, look: int
) -> None:
    assert bench.store(slice_, piece=piece, look=look) == SUCCESS
    digest = hashlib.sha256(slice_).hexdigest()
    assert bench.files() == [path_of(bench.spool_directory, digest)]
    assert bench.files()[0].read_bytes() == slice_
    assert bench.ledger.digests() == {digest}
    assert bench.rings == 1


def test_the_same_bytes_twice_are_one(bench: Bench, slice_: bytes) -> None:
    assert (bench.store(slice_), bench.store(slice_)) == (SUCCESS, SUCCESS)
    assert len(list(bench.spool_directory.glob("??/*"))) == len(bench.ledger.digests()) == 1
    assert bench.events()["instance.duplicate"] == 1
    assert bench.rings == 1


def test_other_bytes_under_one_uid_are_both_kept(bench: Bench, slice_: bytes) -> None:
    bench.store(slice_)
    assert bench.store(slice_[:-1] + bytes([slice_[-1] ^ 1])) == SUCCESS
    assert len(bench.files()) == len(bench.ledger.digests()) == 2
    study = find_study(bench.ledger, read_header(slice_).study_instance_uid)
    assert study is not None
    assert len(bench.ledger.instances(study)) == 1


@pytest.mark.parametrize("look", [0, 200])
@pytest.mark.parametrize("piece", [1 << 20, 100])
def test_what_cannot_be_read_is_refused_and_written_down(bench: Bench, piece: int, look: int) -> None:
    status = bench.store(b"\0" * 500, "1.2.840.10008.5.1.4.1.1.2", "1.2.3", piece, look=look)
    assert status == CANNOT_UNDERSTAND
    assert bench.files() == []
    assert bench.events()["instance.refused"] == 1
    assert bench.rings == 0


@pytest.mark.parametrize("look", [0, 3000])
@pytest.mark.parametrize("piece", [1 << 20, 1000])
def test_a_command_that_lies_about_the_data_set_is_refused(bench: Bench, slice_: bytes, piece: int, look: int) -> None:
    sop_class = read_header(slice_).sop_class_uid
    assert bench.store(slice_, sop_class, "1.2.3.4", piece, look=look) == DOES_NOT_MATCH_SOP_CLASS
    assert bench.store(slice_, "1.2.840.10008.5.1.4.1.1.7", "1.2.3.4", piece) == DOES_NOT_MATCH_SOP_CLASS
    assert bench.files() == []


@pytest.mark.parametrize("call", ["fdatasync", "fsync", "write"])
def test_a_full_disk_is_out_of_resources_and_leaves_nothing(
    bench: Bench, slice_: bytes, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    assert bench.store(slice_) == OUT_OF_RESOURCES
    assert bench.files() == []
    monkeypatch.undo()
    assert bench.store(slice_) == SUCCESS


def test_below_the_reserve_nothing_new_is_taken_and_nothing_accepted_is_touched(bench: Bench, slice_: bytes) -> None:
    assert bench.store(slice_) == SUCCESS
    kept = bench.files()
    bench.shortage = "the disk's reserve is reached"
    assert bench.store(slice_[:-1] + bytes([slice_[-1] ^ 1])) == OUT_OF_RESOURCES
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
    bench.leave_behind(slice_, monkeypatch)
    # The file lies there, since a row that was half written might come to light; the next start sweeps it.
    assert len(bench.files()) == 1
    assert bench.sweep() == Swept(removed=1)
    assert bench.files() == []


def test_what_fails_again_and_again_lies_there_once(
    bench: Bench, slice_: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.leave_behind(slice_, monkeypatch)
    bench.leave_behind(slice_, monkeypatch)
    assert len({path.stat().st_ino for path in (*bench.files(), *bench.in_lanes())}) == 1
    assert bench.store(slice_) == SUCCESS
    bench.spool.settle()
    assert len(bench.files()) == 1
    bench.sweep()
    assert [path.read_bytes() for path in bench.files()] == [slice_]


def test_the_sweep_removes_only_what_was_never_acknowledged(
    bench: Bench, slice_: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.store(slice_)
    bench.leave_behind(slice_ + b"orphan", monkeypatch)
    bench.spool.settle()  # which leaves the name in the lane of what has no row
    (bench.spool_directory / "incoming" / "000" / "99").write_bytes(b"half")
    assert bench.sweep() == Swept(removed=2)
    assert [path.read_bytes() for path in bench.files()] == [slice_]


def test_what_the_ledger_forgot_is_set_aside_and_comes_back_with_the_ledger(
    bench: Bench, slice_: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ledger that is new, or older than the spool, must not cost an image that was answered with Success."""
    for number in range(3):
        bench.store(slice_ + bytes([number]))
    bench.spool.settle()
    bench.store(slice_ + b"\3")  # moments before the end
    bench.leave_behind(slice_ + b"\4", monkeypatch)
    (bench.spool_directory / "incoming" / "000" / "99").write_bytes(b"half")
    other = Ledger(tmp_path / "other.sqlite")
    spool = Spool(bench.spool_directory)
    assert spool.sweep(other.digests(), other.removed_among) == Swept(aside=6)
    aside = {path.stem: path.read_bytes() for path in (bench.spool_directory / "unknown").iterdir()}
    assert set(aside.values()) == {*(slice_ + bytes([number]) for number in range(5)), b"half"}
    assert all(hashlib.sha256(content).hexdigest() == digest for digest, content in aside.items())
    assert spool.sweep(other.digests(), other.removed_among) == Swept()
    other.close()
    assert bench.spool.recover(bench.ledger.digests()) == 4
    bench.sweep()
    assert {path.read_bytes() for path in bench.spool_directory.glob("??/*")} == {
        slice_ + bytes([number]) for number in range(4)
    }
    left = {path.read_bytes() for path in (bench.spool_directory / "unknown").iterdir()}
    assert left == {slice_ + b"\4", b"half"}


def test_a_setting_aside_that_is_killed_goes_on_at_the_next_start(
    bench: Bench, slice_: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        bench.store(slice_ + bytes([number]))
    bench.spool.settle()
    bench.store(slice_ + b"\2")
    replace, left = Path.replace, 0

    def fused(path: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fused)
        for kills in (0, 1, 1):
            left = kills
            with suppress(KeyboardInterrupt):
                bench.spool.sweep(set())
    bench.spool.sweep(set())
    aside = {path.read_bytes() for path in (bench.spool_directory / "unknown").iterdir()}
    assert aside == {slice_ + bytes([number]) for number in range(3)}


def test_where_the_ledger_is_doubted_nothing_is_removed(
    bench: Bench, slice_: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end may be cut off: what looks like never acknowledged may have been."""
    bench.store(slice_)
    bench.leave_behind(slice_ + b"orphan", monkeypatch)
    assert bench.spool.sweep(bench.ledger.digests(), doubted=True) == Swept(aside=1)
    assert [path.read_bytes() for path in bench.spool_directory.glob("??/*")] == [slice_]
    assert [path.read_bytes() for path in (bench.spool_directory / "unknown").iterdir()] == [slice_ + b"orphan"]


def test_a_sweep_that_is_killed_goes_on_at_the_next_start(
    bench: Bench, slice_: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink
    for number, kills in enumerate(range(4)):
        bench.leave_behind(slice_ + bytes([number]), monkeypatch)
        left = kills

        def fused(path: Path, missing_ok: bool = False) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            unlink(path, missing_ok)

        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(Path, "unlink", fused)
            bench.sweep()
        bench.sweep()
        assert not (bench.spool_directory / "unknown").exists()
        assert bench.files() == []


def test_a_name_that_a_power_cut_took_back_is_given_again(bench: Bench, slice_: bytes) -> None:
    """A file's own name is not synced at once, so it may be lost although the sender has its answer."""
    bench.store(slice_)
    (named,) = bench.files()
    named.unlink()
    assert bench.spool.recover(set()) == 0
    assert bench.spool.recover(bench.ledger.digests()) == 1
    assert bench.files() == [named]
    assert bench.sweep() == Swept()
    assert named.read_bytes() == slice_


def test_a_damaged_file_whose_replacement_a_power_cut_took_back_is_replaced_again(bench: Bench, slice_: bytes) -> None:
    bench.store(slice_)
    bench.spool.settle()
    (path,) = bench.files()
    path.write_bytes(slice_[:-1] + b"?")
    bench.store(slice_)
    path.unlink()  # the name leads to the damaged file again
    path.write_bytes(slice_[:-1] + b"?")
    assert bench.spool.recover(bench.ledger.digests()) == 1
    assert path.read_bytes() == slice_
    assert bench.sweep() == Swept()
    assert path.read_bytes() == slice_ and bench.files() == [path]


def test_a_name_in_the_lane_goes_once_the_other_is_durable(
    bench: Bench, slice_: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real(descriptor)

    for number in range(6):
        assert bench.store(slice_ + bytes([number])) == SUCCESS
    assert len(bench.in_lanes()) == 6
    monkeypatch.setattr(os, "fsync", noted)
    bench.spool.settle()
    assert set(synced) == {path.parent.name for path in bench.files()}
    assert bench.in_lanes() == []
    assert len(bench.files()) == 6
    made_ahead = list((bench.spool_directory / "incoming" / "000").iterdir())
    assert made_ahead != []
    bench.receiver.closed(bench.session, "released", 6)
    synced.clear()
    bench.spool.settle()
    assert synced == []
    assert not any(path.exists() for path in made_ahead)


def test_names_that_cannot_be_synced_are_tried_again(
    bench: Bench, slice_: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: int) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error")

    bench.store(slice_)
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input"):
        bench.spool.settle()
    assert len(bench.in_lanes()) == 1
    monkeypatch.undo()
    bench.spool.settle()
    assert bench.in_lanes() == []


def test_names_are_settled_from_time_to_time(bench: Bench, slice_: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.intake.spool.SETTLE_AFTER", 3)
    stopping = threading.Event()
    thread = threading.Thread(target=bench.spool.settle_until, args=(stopping,))
    for number in range(3):
        bench.store(slice_ + bytes([number]))
    assert len(bench.in_lanes()) == 3
    monkeypatch.setattr("appliance.intake.spool.SETTLE_SECONDS", 600.0)  # so it is their number that counts
    thread.start()
    deadline = time.monotonic() + 30
    while bench.in_lanes() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert bench.in_lanes() == []
    stopping.set()
    bench.store(slice_ + b"a")
    for number in range(3):
        bench.store(slice_ + b"b" + bytes([number]))
    thread.join(30)
    assert not thread.is_alive()


def test_a_damaged_file_is_replaced_when_the_instance_comes_again(bench: Bench, slice_: bytes) -> None:
    bench.store(slice_)
    bench.spool.settle()
    (path,) = bench.files()
    path.write_bytes(slice_[:-1] + b"?")
    assert bench.store(slice_) == SUCCESS
    assert path.read_bytes() == slice_
    assert bench.events()["instance.duplicate"] == 1
    bench.spool.settle()
    assert bench.in_lanes() == []
    assert bench.files() == [path]


def spoil(path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a disk does to a file of the spool."""
    if how == "lost":
        path.unlink()
    elif how == "damaged":
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    elif how == "unreadable":
        real, number = Path.open, path.stat().st_ino

        def failing(one: Path, *arguments: Any, **named: Any) -> Any:
            if one.stat().st_ino == number:
                raise OSError(errno.EIO, "Input/output error")
            return real(one, *arguments, **named)

        monkeypatch.setattr(Path, "open", failing)


def set_aside(bench: Bench) -> None:
    """Bring the study that arrives to an analysis that has failed for good."""
    (arriving,) = bench.ledger.arriving_studies()
    bench.ledger.complete_study(arriving.id, arriving.last_instance_at, {"by": "test", "confidence": "high"})
    bench.ledger.decide(arriving.id, "pkg", "1", admitted=True, reason="", admission=[], selection=[], inputs=[])
    row = bench.ledger.take_analysis(["pkg"])
    assert row is not None
    assert bench.ledger.fail_analysis(row["id"], "the file is gone", attempts=1, pause=0.0)
    assert bench.ledger.take_analysis(["pkg"]) is None


@pytest.mark.parametrize("how", ["lost", "damaged", "unreadable"])
def test_what_failed_is_analysed_again_once_its_file_is_mended(
    bench: Bench, slice_: bytes, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    bench.store(slice_)
    bench.store(slice_ + b"\0")
    bench.spool.settle()
    set_aside(bench)
    path = path_of(bench.spool_directory, hashlib.sha256(slice_ + b"\0").hexdigest())
    spoil(path, how, monkeypatch)
    rings = bench.rings
    assert bench.store(slice_ + b"\0") == SUCCESS
    monkeypatch.undo()
    assert path.read_bytes() == slice_ + b"\0"
    events = bench.events()
    assert (events["instance.duplicate"], events["instance.restored"], events["analysis.requeued"]) == (1, 1, 1)
    assert bench.rings == rings + 1
    assert bench.ledger.take_analysis(["pkg"]) is not None
    assert verify_events(bench.ledger) is None


def test_what_failed_stays_so_when_nothing_was_mended(bench: Bench, slice_: bytes) -> None:
    bench.store(slice_)
    set_aside(bench)
    rings = bench.rings
    assert bench.store(slice_) == SUCCESS
    assert bench.rings == rings
    assert bench.ledger.take_analysis(["pkg"]) is None
    assert "instance.restored" not in bench.events()


def test_a_mended_file_counts_although_its_sender_had_to_send_it_twice(
    bench: Bench, slice_: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.store(slice_)
    bench.spool.settle()
    set_aside(bench)
    (path,) = bench.files()
    path.unlink()
    bench.leave_behind(slice_, monkeypatch)
    assert bench.ledger.take_analysis(["pkg"]) is None
    assert bench.store(slice_) == SUCCESS
    assert bench.ledger.take_analysis(["pkg"]) is not None
    assert bench.store(slice_) == SUCCESS
    assert bench.events()["instance.restored"] == 1


def test_a_file_that_was_mended_when_intake_ended_counts_at_the_next_start(
    bench: Bench, slice_: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.store(slice_)
    bench.spool.settle()
    set_aside(bench)
    (path,) = bench.files()
    path.unlink()
    bench.leave_behind(slice_, monkeypatch)
    swept = bench.sweep()
    assert bench.ledger.requeue_restored(swept.named) == 1
    assert bench.ledger.take_analysis(["pkg"]) is not None
    assert bench.ledger.requeue_restored(bench.sweep().named) == 0


@pytest.mark.parametrize("size", [4096, 4097, 8192, 100_000, 1 << 20])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("direct", [True, False])
def test_what_is_written_past_the_page_cache_is_what_came(
    tmp_path: Path, size: int, aligned: bool, direct: bool
) -> None:
    """In pieces, from a buffer that begins at a page or amid one, on a disk that allows it or does not."""
    spool = Spool(tmp_path)
    lane = spool.take_lane()
    lane.direct = direct
    content = random.Random(size).randbytes(3 * size)
    memory = memoryview(mmap.mmap(-1, size + 1))
    buffer = memory[:size] if aligned else memory[1:]
    incoming = spool.open(lane)
    for part in (content[:size], content[size : 2 * size], content[2 * size : -7]):
        buffer[: len(part)] = part
        incoming.write(buffer[: len(part)])
    assert incoming.sync() == hashlib.sha256(content[:-7]).hexdigest()
    spool.publish(incoming)
    assert path_of(tmp_path, incoming.digest).read_bytes() == content[:-7]


def test_durable_before_success(bench: Bench, slice_: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order on disk: name in the lane synced, then content, its own name, and only then the row."""
    steps: list[str] = []

    def noted(owner: Any, name: str) -> None:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: (steps.append(name), real(*a, **k))[1])

    for owner, name in ((os, "write"), (os, "fdatasync"), (os, "fsync"), (os, "link")):
        noted(owner, name)
    noted(Ledger, "record_instances")
    assert bench.store(slice_) == SUCCESS
    assert [one for one in steps if one != "write"] == ["fsync", "fdatasync", "link", "record_instances"]
    assert "write" in steps[steps.index("fsync") : steps.index("fdatasync")]
    assert steps.index("link") > max(at for at, one in enumerate(steps) if one == "write")


def test_an_instance_that_never_becomes_whole_leaves_nothing(bench: Bench, slice_: bytes) -> None:
    header = read_header(slice_)
    request = StoreRequest(header.sop_class_uid, header.sop_instance_uid, header.transfer_syntax_uid)
    sink = bench.receiver.receive(bench.session, request)
    assert not isinstance(sink, Answer)
    sink.write(memoryview(slice_)[:5000])
    sink.discard()
    assert bench.files() == []
    assert bench.store(slice_) == SUCCESS


def test_a_lane_is_used_again_after_its_association(bench: Bench, slice_: bytes) -> None:
    for number in range(2, 6):
        session = Session(number, "SCANNER", "SCANSIDE", "127.0.0.1")
        bench.receiver.opened(session)
        assert bench.store(slice_, session=number) == SUCCESS
        bench.receiver.closed(session, "released", 1)
    assert sorted(path.name for path in (bench.spool_directory / "incoming").iterdir()) == ["000", "001"]


def test_many_at_once_are_all_safe_and_one_that_fails_takes_no_other_with_it(
    bench: Bench, slice_: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Associations that commit together: each gets its own answer."""
    record = Ledger.record_instances
    poison = hashlib.sha256(slice_ + b"\5").hexdigest()

    def some(self: Ledger, arrived: Any) -> Any:
        if any(one.digest == poison for one in arrived):
            raise OperationalError("insert", {}, Exception("it cannot be"))
        return record(self, arrived)

    monkeypatch.setattr(Ledger, "record_instances", some)
    answers: dict[int, int] = {}
    start = threading.Barrier(8)

    def send(number: int) -> None:
        session = Session(number, "SCANNER", "SCANSIDE", "127.0.0.1")
        bench.receiver.opened(session)
        start.wait(10)
        answers[number] = bench.store(slice_ + bytes([number]), session=number)
        bench.receiver.closed(session, "released", 1)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(2, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == {number: OUT_OF_RESOURCES if number == 5 else SUCCESS for number in range(2, 10)}
    safe = {hashlib.sha256(slice_ + bytes([number])).hexdigest() for number in range(2, 10)} - {poison}
    assert bench.ledger.digests() == safe
    assert {path.stem for path in bench.files()} - {poison} == safe


def test_nothing_is_committed_while_the_committer_is_paused(bench: Bench, slice_: bytes) -> None:
    answers: list[int] = []
    sender = threading.Thread(target=lambda: answers.append(bench.store(slice_)))
    with bench.receiver.committer.paused():
        sender.start()
        sender.join(0.2)
        assert answers == []
        assert bench.ledger.digests() == set()
    sender.join(10)
    assert answers == [SUCCESS]


def test_the_end_of_an_association_is_written_down(bench: Bench) -> None:
    bench.receiver.closed(bench.session, "broken", 0)
    with suppress(KeyError):
        bench.receiver.closed(bench.session, "broken", 0)
    assert bench.events() == {"association.opened": 1, "association.closed": 1}
    assert bench.rings == 1


def test_who_is_turned_away_is_written_down_and_a_flood_once_a_minute(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(50):
        bench.receiver.rejected("10.0.0.9", f"STRANGER{number}", "calling AE title not recognized")
    bench.receiver.rejected("10.0.0.9", "SCANNER", "local limit exceeded")
    bench.receiver.rejected("10.0.0.8", "SCANNER", "local limit exceeded")
    assert bench.events()["association.rejected"] == 3
    monkeypatch.setattr("appliance.intake.receiver.REPEAT_SECONDS", 0.0)
    bench.receiver.rejected("10.0.0.9", "STRANGER", "calling AE title not recognized")
    with bench.ledger.read() as connection:
        rows = connection.exec_driver_sql("SELECT detail FROM event WHERE name = 'association.rejected' ORDER BY id")
        times = [json.loads(detail)["times"] for (detail,) in rows]
    assert times == [1, 1, 1, 50]


def test_a_sender_is_told_no_path_of_ours(bench: Bench, slice_: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error", str(bench.spool_directory))

    monkeypatch.setattr(os, "fdatasync", broken)
    assert bench.store(slice_) == OUT_OF_RESOURCES
    assert bench.refusals == ["cannot store: Input/output error"]


def test_what_was_performed_is_written_down_and_wakes_the_engine(bench: Bench) -> None:
    assert bench.receiver.performed(bench.session, NewStep("1.7", "1.2.3", {})).status == SUCCESS
    assert bench.rings == 1
    bench.receiver.performed_refused(bench.session, Answer(0x0120, "StudyInstanceUID is missing"))
    bench.shortage = "the disk is nearly full"
    assert bench.receiver.performed(bench.session, NewStep("1.8", "1.2.3", {})).status == 0x0213
    assert bench.rings == 1
    events = bench.events()
    assert (events["step.created"], events["performed.refused"]) == (1, 2)
