"""The chain of events: what was changed, removed, cut off or made anew is found and named."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner, Result

from appliance.cli import app
from appliance.events import Event
from appliance.governance.board import suspend
from appliance.ledger.chain import Fault, Head, Walk, walk_all
from appliance.ledger.database import event_hash
from appliance.ledger.store import Ledger
from appliance.ledger.views import event_counts
from appliance.operations import audit
from appliance.operations.audit import Auditor, lost_evidence, read_head, standing, write_head
from dicom_io.errors import ScansideError

EVENTS = 12
DECISION = 5


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    """A chain of `EVENTS`, of which `DECISION` is the board's."""
    one = Ledger(path)
    for number in range(1, EVENTS + 1):
        if number == DECISION:
            minutes = path.with_name("minutes.pdf")
            minutes.write_text("we agree")
            suspend(one, path.parent / "evidence", "pkg", None, who="Dr A", why="a test", evidence=minutes)
        else:
            one.log(Event.SERVICE_STARTED, number=number)
    yield one
    one.close()


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every ledger were too large for one step."""
    monkeypatch.setattr(audit, "CHUNK", 3)
    monkeypatch.setattr(Walk.advance, "__defaults__", (3,))


@pytest.fixture
def head(path: Path) -> Path:
    return path.with_name("ledger.head")


def change(path: Path, sql: str, *values: object) -> None:
    raw = sqlite3.connect(path)
    raw.execute("PRAGMA foreign_keys=OFF")
    with raw:
        raw.execute(sql, values)
    raw.close()


def rewrite(path: Path, first: int, detail: str) -> None:
    """Change an event, and make its hash and all after it anew, as somebody would who knows how."""
    raw = sqlite3.connect(path)
    raw.row_factory = sqlite3.Row
    with raw:
        raw.execute("update event set detail = ? where id = ?", (detail, first))
        previous = raw.execute("select hash from event where id = ?", (first - 1,)).fetchone()[0]
        for row in raw.execute("select * from event where id >= ? order by id", (first,)).fetchall():
            body = {key: row[key] for key in row.keys() if key not in ("id", "hash")}  # noqa: SIM118
            previous = event_hash(previous, body | {"detail": json.loads(body["detail"])})
            raw.execute("update event set hash = ? where id = ?", (previous, row["id"]))
    raw.close()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def settle(auditor: Auditor) -> None:
    """Step until there is nothing more to look at."""
    for _ in range(50):
        if not auditor.step():
            return
    raise AssertionError("it never comes to an end")


TAMPERED: list[tuple[str, int, str]] = [
    ("update event set detail = '{\"number\": 8}' where id = 7", 7, "what it says was changed"),
    ("update event set detail = '{' where id = 7", 7, "cannot be read"),
    ("update event set at = '2020-01-01T00:00:00.000000+00:00' where id = 7", 7, "what it says was changed"),
    ("update event set name = 'service.stopped' where id = 7", 7, "what it says was changed"),
    ("update event set boot = '' where id = 7", 7, "what it says was changed"),
    ("update event set monotonic_ns = monotonic_ns + 1 where id = 7", 7, "what it says was changed"),
    ("update event set study_id = 1 where id = 7", 7, "what it says was changed"),
    (f"update event set hash = '{'0' * 64}' where id = 7", 7, "its hash was changed"),
    ("delete from event where id = 7", 7, "it is gone; event 8 is the next"),
    ("delete from event where id = 1", 1, "it is gone; event 2 is the next"),
    ("update event set id = 99 where id = 12", 12, "it is gone; event 99 is the next"),
    ("insert into event select -1, at, monotonic_ns, boot, name, study_id, detail, hash from event where id = 3", 1,
     "there cannot be such an event"),
    ("insert into event select (select max(id) + 1 from event), at, monotonic_ns, boot, name, study_id, detail, hash"
     " from event where id = 3", 13, "does not follow from event 12"),
    ("update event set detail = replace(detail, 'Dr A', 'Dr B') where id = 5", 5, "what it says was changed"),
]  # fmt: skip


def swap(path: Path, one: int, other: int) -> None:
    """Exchange all but the numbers of two events."""
    raw = sqlite3.connect(path)
    raw.execute("PRAGMA foreign_keys=OFF")
    with raw:
        for before, after in ((one, -99), (other, one), (-99, other)):
            raw.execute("update event set id = ? where id = ?", (after, before))
    raw.close()


@pytest.mark.parametrize(("sql", "event", "says"), TAMPERED)
def test_the_first_wrong_event_is_named(ledger: Ledger, path: Path, sql: str, event: int, says: str) -> None:
    last, fault = walk_all(ledger)
    assert (last.event, fault) == (EVENTS, None)
    change(path, sql)
    last, fault = walk_all(ledger)
    assert fault is not None
    assert (fault.event, says in fault.what) == (event, True), fault
    assert last.event == event - 1
    assert f"event {event}" in str(fault)


@pytest.mark.parametrize(("sql", "event", "says"), TAMPERED)
def test_it_is_found_while_the_box_runs_and_said_once(
    ledger: Ledger, path: Path, head: Path, sql: str, event: int, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    auditor = Auditor(ledger, head, clock)
    settle(auditor)
    assert auditor.fault == ""
    change(path, sql)
    clock.now += audit.PATROL_SECONDS
    with caplog.at_level(logging.ERROR):
        settle(auditor)
        settle(auditor)
    assert auditor.fault in caplog.text
    assert event_counts(ledger)["audit.broken"] == 1
    clock.now += audit.BROKEN_SECONDS
    settle(auditor)
    # Then it has looked at all again. The beginning of the audit is an event too, which the chain did not have before.
    assert f"event {event + (event > EVENTS)}" in auditor.fault
    assert event_counts(ledger)["audit.broken"] <= 2
    assert standing(ledger, head)[1]


@pytest.mark.usefixtures("small_pieces")
def test_a_large_ledger_is_walked_in_pieces(ledger: Ledger, path: Path, head: Path) -> None:
    clock = Clock()
    change(path, "update event set boot = '' where id = 10")
    auditor = Auditor(ledger, head, clock)
    assert [auditor.step() for _ in range(3)] == [True, True, True]
    assert auditor.fault == ""
    assert not auditor.step()
    assert auditor.fault.startswith("event 10 (service.started)")


@pytest.mark.parametrize("sql", ["delete from event where id = 5", TAMPERED[-1][0]])
@pytest.mark.usefixtures("small_pieces")
def test_a_decision_that_was_touched_is_found_at_the_very_start(
    ledger: Ledger, path: Path, head: Path, sql: str
) -> None:
    change(path, sql)
    assert Auditor(ledger, head, Clock()).fault


@pytest.mark.parametrize("sql", ["delete from event where id = 5", TAMPERED[-1][0]])
def test_a_decision_that_was_touched_is_found_at_the_next_step(
    ledger: Ledger, path: Path, head: Path, sql: str
) -> None:
    auditor = Auditor(ledger, head, Clock())
    settle(auditor)
    change(path, sql)
    auditor.step()
    assert "event 5" in auditor.fault


def test_an_end_that_was_cut_off_is_found_at_once(ledger: Ledger, path: Path, head: Path) -> None:
    auditor = Auditor(ledger, head, Clock())
    settle(auditor)
    change(path, "delete from event where id > 10")
    assert walk_all(ledger)[1] is None, "the chain alone does not show it"
    auditor.step()
    assert f"event {EVENTS + 1}" in auditor.fault


def test_an_end_that_was_cut_off_is_found_at_the_start(ledger: Ledger, path: Path, head: Path) -> None:
    settle(Auditor(ledger, head, Clock()))
    noted = read_head(head)
    assert noted is not None
    change(path, "delete from event where id > 10")
    auditor = Auditor(ledger, head, Clock())
    assert f"event {noted.event}: it was noted elsewhere, and is gone" in auditor.fault
    last, fault = walk_all(ledger, [noted])
    assert fault is not None
    assert (last.event, fault.event, "the end was cut off" in fault.what) == (11, 12, True)
    # What is written since does not hide it.
    for number in range(10):
        ledger.log(Event.SERVICE_STARTED, number=number)
    assert "its hash is" in Auditor(ledger, head, Clock()).fault


def test_a_chain_made_anew_is_found_by_its_head(ledger: Ledger, path: Path, head: Path) -> None:
    settle(Auditor(ledger, head, Clock()))
    rewrite(path, 7, '{"number": 70}')
    assert walk_all(ledger)[1] is None, "the chain alone does not show it"
    assert "noted elsewhere" in Auditor(ledger, head, Clock()).fault
    # An older head, of before what was changed, shows nothing: it did not change.
    with sqlite3.connect(path) as raw:
        ((old,),) = raw.execute("select hash from event where id = 6").fetchall()
    assert walk_all(ledger, [Head(6, old)])[1] is None


def test_the_head_is_noted_as_the_chain_grows(ledger: Ledger, head: Path) -> None:
    clock = Clock()
    auditor = Auditor(ledger, head, clock)
    assert event_counts(ledger)["audit.begun"] == 1
    settle(auditor)
    first = read_head(head)
    assert first is not None and first.event == EVENTS + 1
    ledger.log(Event.SERVICE_STOPPED)
    settle(auditor)
    assert read_head(head) == first
    clock.now += audit.NOTE_SECONDS
    settle(auditor)
    second = read_head(head)
    assert second is not None and second.event == EVENTS + 2
    Auditor(ledger, head, clock)
    assert event_counts(ledger)["audit.begun"] == 1


def test_a_broken_chain_does_not_move_the_head(ledger: Ledger, path: Path, head: Path) -> None:
    clock = Clock()
    auditor = Auditor(ledger, head, clock)
    settle(auditor)
    before = head.read_bytes()
    change(path, "delete from event where id = 7")
    for _ in range(3):
        clock.now += audit.PATROL_SECONDS
        settle(auditor)
    assert (auditor.fault != "", head.read_bytes()) == (True, before)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"event": "x", "hash": ""}', b"\xff"])
def test_a_head_that_cannot_be_read_is_a_fault(ledger: Ledger, head: Path, content: bytes) -> None:
    head.write_bytes(content)
    assert "cannot be read" in Auditor(ledger, head, Clock()).fault
    with pytest.raises(ScansideError, match="cannot be read"):
        read_head(head)


def test_what_was_mended_is_trusted_again(ledger: Ledger, path: Path, head: Path) -> None:
    clock = Clock()
    auditor = Auditor(ledger, head, clock)
    settle(auditor)
    with sqlite3.connect(path) as raw:
        ((before,),) = raw.execute("select detail from event where id = 5").fetchall()
    change(path, "update event set detail = '{}' where id = 5")
    settle(auditor)
    assert auditor.fault
    change(path, "update event set detail = ? where id = 5", before)
    settle(auditor)
    assert auditor.fault, "not yet"
    clock.now += audit.BROKEN_SECONDS
    settle(auditor)
    assert auditor.fault == ""
    assert event_counts(ledger)["audit.restored"] == 1
    assert standing(ledger, head)[1] == ""
    ledger.log(Event.SERVICE_STOPPED)
    settle(auditor)
    assert auditor.fault == ""


def damage(ledger: Ledger, path: Path, marker: str) -> None:
    """Spoil the page of the file that holds these words, as a failing disk does."""
    ledger.close()  # what it read before is not read again from memory
    raw = sqlite3.connect(path)
    raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    raw.close()
    content = bytearray(path.read_bytes())
    page = content.index(marker.encode()) // 4096 * 4096
    content[page : page + 8] = b"\xff" * 8
    path.write_bytes(content)


def test_a_ledger_that_can_be_read_no_longer_is_broken(
    ledger: Ledger, path: Path, head: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(40):
        ledger.log(Event.SERVICE_STARTED, number=f"word-{number}-", filler="x" * 1000)
    clock = Clock()
    auditor = Auditor(ledger, head, clock)
    settle(auditor)
    damage(ledger, path, "word-10-")
    clock.now += audit.PATROL_SECONDS
    auditor.step()
    assert "cannot be read" in auditor.fault
    assert "malformed" in auditor.fault
    assert caplog.text.count("TAMPERED WITH OR DAMAGED") == 1
    clock.now += audit.BROKEN_SECONDS
    auditor.step()
    assert "cannot be read" in auditor.fault
    assert "cannot be read" in standing(ledger, head)[1]
    raw = sqlite3.connect(path)
    assert raw.execute("select count(*) from event where name = 'audit.broken'").fetchone() == (1,)
    raw.close()


@pytest.mark.parametrize(
    ("code", "broken"),
    [
        (sqlite3.SQLITE_IOERR_CORRUPTFS, True),  # what SQLite makes of EIO
        (sqlite3.SQLITE_IOERR_READ, True),
        (sqlite3.SQLITE_IOERR_SHMSIZE, False),  # a full disk: that passes
        (sqlite3.SQLITE_BUSY, False),
    ],
)
def test_a_disk_that_cannot_read_breaks_the_chain_and_one_that_is_full_does_not(
    ledger: Ledger, head: Path, monkeypatch: pytest.MonkeyPatch, code: int, broken: bool
) -> None:
    auditor = Auditor(ledger, head)
    settle(auditor)
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = code

    def fail(*_: object) -> None:
        raise sa.exc.OperationalError("", None, error)

    monkeypatch.setattr(Walk, "advance", fail)
    with nullcontext() if broken else pytest.raises(sa.exc.OperationalError):
        auditor.step()
    assert bool(auditor.fault) is broken


def test_the_command_says_of_a_damaged_ledger_that_it_is_not_whole(tmp_path: Path, ledger: Ledger, path: Path) -> None:
    for number in range(40):
        ledger.log(Event.SERVICE_STARTED, number=f"word-{number}-", filler="x" * 1000)
    damage(ledger, path, "word-10-")
    (tmp_path / "scanside.toml").write_text(f'[box]\nstate_directory = "{tmp_path}"\n')
    result = CliRunner().invoke(app, ["--config", str(tmp_path / "scanside.toml"), "audit", "verify"])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "malformed" in result.output


@pytest.mark.parametrize("pair", [(7, 8), (3, 11), (1, 2), (11, 12), (4, 5)])
def test_swapped_events_are_found_at_the_first(ledger: Ledger, path: Path, head: Path, pair: tuple[int, int]) -> None:
    clock = Clock()
    auditor = Auditor(ledger, head, clock)
    settle(auditor)
    swap(path, *pair)
    last, fault = walk_all(ledger)
    assert fault is not None
    assert (last.event, fault.event, "does not follow" in fault.what) == (pair[0] - 1, pair[0], True)
    clock.now += audit.PATROL_SECONDS
    settle(auditor)
    assert f"event {pair[0]} " in auditor.fault


def test_the_first_of_several_wrong_events_is_named(ledger: Ledger, path: Path) -> None:
    change(path, "delete from event where id = 9")
    change(path, "update event set detail = '{}' where id = 6")
    swap(path, 11, 12)
    _, fault = walk_all(ledger)
    assert fault is not None
    assert fault.event == 6


def test_the_evidence_of_the_board_is_part_of_it(tmp_path: Path, ledger: Ledger) -> None:
    folder = tmp_path / "evidence"
    records = []
    for name in ("protocol.pdf", "letter.pdf"):
        (tmp_path / name).write_text(name)
        decision = suspend(ledger, folder, "pkg", None, who="Dr A", why="a test", evidence=tmp_path / name)
        records.append((decision.record, folder / decision.evidence_digest.removeprefix("sha256:")))
    assert lost_evidence(ledger, folder) is None
    (first, protocol), (second, letter) = records
    letter.chmod(0o644)
    letter.write_text("letter.PDF")
    fault = lost_evidence(ledger, folder)
    assert fault is not None
    assert (fault.event, fault.name, "letter.pdf" in fault.what) == (second, "board.suspended", True)
    assert (str(letter) in fault.what, "was changed" in fault.what) == (True, True)
    protocol.unlink()
    fault = lost_evidence(ledger, folder)
    assert fault is not None
    assert (fault.event, "protocol.pdf" in fault.what, "No such file" in fault.what) == (first, True, True)


def test_a_head_is_noted_at_once_with_a_decision(tmp_path: Path, ledger: Ledger, path: Path, head: Path) -> None:
    """Else who is quick cuts a suspension off, and starts the box again."""
    auditor = Auditor(ledger, head, Clock())
    settle(auditor)
    record = suspend(ledger, tmp_path / "evidence", "pkg", None, who="Dr A", why="a test").record
    settle(auditor)
    assert read_head(head) == Head(record, walk_all(ledger)[0].hash)
    change(path, "delete from event where id = ?", record)
    assert Auditor(ledger, head, Clock()).fault


def test_a_fault_says_where_and_what() -> None:
    assert str(Fault(7, "board.approved", "it is gone")) == "event 7 (board.approved): it is gone"
    assert str(Fault(7, "", "it is gone")) == "event 7: it is gone"


def test_a_walk_goes_on_where_it_stood(ledger: Ledger) -> None:
    walk = Walk(ledger)
    assert walk.advance() == (EVENTS, None)
    assert walk.advance() == (0, None)
    ledger.log(Event.SERVICE_STOPPED)
    assert walk.advance() == (1, None)
    assert walk.head.event == EVENTS + 1


def test_a_walk_sees_what_became_of_the_event_where_it_stood(ledger: Ledger, path: Path) -> None:
    regrown, gone = Walk(ledger), Walk(ledger)
    regrown.advance()
    change(path, "delete from event where id > 10")
    for number in (11, 12):
        ledger.log(Event.SERVICE_STARTED, number=-number)
    _, fault = regrown.advance()
    assert fault is not None
    assert (fault.event, "another than the one that was here" in fault.what) == (EVENTS, True)
    gone.advance()
    ledger.log(Event.SERVICE_STOPPED)
    change(path, "delete from event where id = ?", EVENTS)
    _, fault = gone.advance()
    assert fault is not None
    assert (fault.event, "is gone" in fault.what) == (EVENTS, True)


@pytest.mark.parametrize(
    ("sql", "event"),
    [
        ("delete from event where id = 7", 7),
        ("update event set detail = replace(detail, 'Dr A', 'Dr B') where id = 5", 5),
        ("update event set name = 'board.revoked' where id = 5", 5),
    ],
)
def test_a_check_knows_at_once_what_no_engine_has_found_yet(
    ledger: Ledger, path: Path, head: Path, sql: str, event: int
) -> None:
    assert standing(ledger, head) == (EVENTS, "")
    change(path, sql)
    assert f"event {event}" in standing(ledger, head)[1]


def test_the_command(tmp_path: Path, ledger: Ledger, path: Path, head: Path) -> None:
    config = tmp_path / "scanside.toml"
    config.write_text('[box]\nstate_directory = "."\n')

    def told(*arguments: str, code: int = 0) -> dict[str, object]:
        result = CliRunner().invoke(app, ["--config", str(config), "audit", "verify", *arguments, "--json"])
        assert result.exit_code == code, result.output
        found: dict[str, object] = json.loads(result.stdout)
        return found

    answer = told()
    assert (answer["ok"], answer["events"], answer["fault"], answer["noted"]) == (True, EVENTS, None, None)
    early = str(answer["head"])
    number, _, digest = early.partition(":")
    write_head(head, Head(int(number), digest))
    assert told()["noted"] == early
    rewrite(path, 9, '{"number": 90}')
    for arguments in ([], ["--head", early]):
        fault = told(*arguments, code=1)["fault"]
        assert isinstance(fault, dict) and fault["event"] == EVENTS
    head.unlink()
    assert told()["ok"], "nobody knows better without a head"
    assert told("--head", early, code=1)["ok"] is False
    change(path, "update event set detail = '{}' where id = 5")
    text = CliRunner().invoke(app, ["--config", str(config), "audit", "verify"])
    assert (text.exit_code, "event 5 (board.suspended)" in text.stdout) == (1, True)
    head.write_text("nothing")
    assert told(code=1)["ok"] is False
    wrong = CliRunner().invoke(app, ["--config", str(config), "audit", "verify", "--head", "12"])
    assert wrong.exit_code == 2


def to_each(kind: str, tmp_path: Path, path: Path, head: Path) -> int:
    """Do this to a ledger; returns the first event that is wrong then."""
    match kind:
        case "edited":
            change(path, "update event set detail = '{\"number\": 8}' where id = 7")
        case "removed":
            change(path, "delete from event where id = 7")
        case "cut off":
            change(path, "delete from event where id >= 7")
        case "swapped":
            swap(path, 7, 8)
        case "approval":
            change(path, "update event set detail = replace(detail, 'Dr A', 'Dr B') where id = ?", DECISION)
            return DECISION
        case "made anew":
            # Only the head shows it, so that is as far as the first that is wrong can be told.
            rewrite(path, 7, '{"number": 70}')
            return EVENTS
        case "evidence":
            (kept,) = (tmp_path / "evidence").iterdir()
            kept.chmod(0o644)
            kept.write_text("another")
            return DECISION
        case "evidence gone":
            (kept,) = (tmp_path / "evidence").iterdir()
            kept.unlink()
            return DECISION
    return 7


KINDS = ["edited", "removed", "cut off", "swapped", "approval", "made anew", "evidence", "evidence gone"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_names_the_first_wrong_event(
    tmp_path: Path, ledger: Ledger, path: Path, head: Path, kind: str
) -> None:
    config = tmp_path / "scanside.toml"
    config.write_text('[box]\nstate_directory = "."\n')

    def verify(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["--config", str(config), "audit", "verify", *arguments])

    last, _ = walk_all(ledger)
    write_head(head, last)
    assert (verify().exit_code, json.loads(verify("--json").stdout)["fault"]) == (0, None)
    event = to_each(kind, tmp_path, path, head)
    told = json.loads(verify("--json").stdout)
    assert (told["ok"], told["fault"]["event"], bool(told["fault"]["what"])) == (False, event, True)
    shown = verify()
    assert (shown.exit_code, f"event {event}" in shown.stdout) == (1, True)
    if "evidence" in kind:
        assert "minutes.pdf" in shown.stdout
        assert told["events"] == EVENTS
