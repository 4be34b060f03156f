"""The database below the ledger: connections, transactions, migrations and the chain of events."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.dialects import sqlite

from appliance.events import Event
from appliance.ledger import schema as t
from dicom_io.errors import ScansideError

Row = sa.RowMapping


class LedgerError(ScansideError):
    """The database cannot be used."""


@cache
def boot() -> str:
    """Tells boots of this machine apart: monotonic clocks compare only within one."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def now() -> str:
    """The time in UTC, in ISO 8601 with microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def later(seconds: float) -> str:
    """`now`, plus some seconds."""
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat(timespec="microseconds")


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode


def event_hash(previous: str, row: dict[str, Any]) -> str:
    """The link of the chain of events: SHA-256 over the hash before it and the row as canonical JSON."""
    return hashlib.sha256(f"{previous}\n{_CANONICAL(row)}".encode()).hexdigest()


def seconds_between(earlier: str, after: str) -> float:
    """Seconds from one of the ledger's times to another."""
    return (datetime.fromisoformat(after) - datetime.fromisoformat(earlier)).total_seconds()


AHEAD_SECONDS = 60.0
"""What was written down as past and lies further ahead is of a clock that was set back since, not only adjusted."""


def waited(since: str, at: str) -> float:
    """Seconds that something has waited; without end where the clock was set back since, so that it is due now and not
    when the clock has caught up."""
    seconds = seconds_between(since, at)
    return math.inf if seconds < -AHEAD_SECONDS else seconds


def has_waited(since: sa.ColumnElement[str], seconds: float) -> sa.ColumnElement[bool]:
    """The same as a condition: it has waited for so long."""
    return (since <= later(-seconds)) | (since > later(AHEAD_SECONDS))


class Statement:
    """A statement of the hot path: compiled once, run on SQLite's own cursor with the values as SQLite stores them.

    SQLAlchemy's way from a statement to its result costs ten times what SQLite does for an indexed row.
    """

    def __init__(self, clause: sa.Executable) -> None:
        compiled = clause.compile(dialect=sqlite.dialect())  # type: ignore[attr-defined]
        self._sql = str(compiled)
        self._names: tuple[str, ...] = tuple(compiled.positiontup or ())

    def run(self, connection: sqlite3.Connection, **values: Any) -> int:
        """Run it in the transaction of that connection; returns the number of the row that it inserted last."""
        return connection.execute(self._sql, [values[name] for name in self._names]).lastrowid or 0

    def all(self, connection: sqlite3.Connection, **values: Any) -> list[Any]:
        """Run it and return its rows."""
        return connection.execute(self._sql, [values[name] for name in self._names]).fetchall()


class Insert:
    """Rows of the hot path, in one statement: each gives the interpreter's lock away several times, and with many
    associations somebody takes it."""

    def __init__(self, table: sa.Table, names: Sequence[str]) -> None:
        self._names = tuple(table.c[name].name for name in names)
        self._head = f"INSERT INTO {table.name} ({', '.join(self._names)}) VALUES "
        self._row = f"({', '.join('?' * len(self._names))})"

    def run(self, connection: sqlite3.Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """Insert them in the transaction of that connection, with the values as SQLite stores them."""
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[start : start + _ROWS_AT_ONCE]
            values = [row[name] for row in some for name in self._names]
            connection.execute(self._head + ", ".join([self._row] * len(some)), values)


_ROWS_AT_ONCE = 32  # each number of them is a statement of its own, of which sqlite3 remembers 128

_LAST_HASH = Statement(
    sa.select(t.event.c.hash).where(t.event.c.id == sa.select(sa.func.max(t.event.c.id)).scalar_subquery())
)
_EVENT = tuple(column.name for column in t.event.c if column.name != "id")
_INSERT_EVENT = Statement(sa.insert(t.event).values({name: sa.bindparam(name) for name in _EVENT}))
_INSERT_EVENTS = Insert(t.event, _EVENT)


class Chain:
    """The events of one transaction, each appended to the chain that ends with the last one of the ledger."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        last = _LAST_HASH.all(connection)
        self._hash: str = last[0][0] if last else ""
        self._waiting: list[dict[str, Any]] = []

    def append(self, name: Event, study_id: int | None, detail: dict[str, Any]) -> int:
        """Append an event; returns its number."""
        self.flush()
        return _INSERT_EVENT.run(self._connection, **self._link(name, study_id, detail))

    def add(self, name: Event, study_id: int | None, detail: dict[str, Any]) -> None:
        """Append an event that need not be written before `flush`."""
        self._waiting.append(self._link(name, study_id, detail))

    def flush(self) -> None:
        """Write what was added."""
        _INSERT_EVENTS.run(self._connection, self._waiting)
        self._waiting = []

    def _link(self, name: Event, study_id: int | None, detail: dict[str, Any]) -> dict[str, Any]:
        row: dict[str, Any] = {
            "at": now(),
            "monotonic_ns": time.monotonic_ns(),
            "boot": boot(),
            "name": str(name),
            "study_id": study_id,
            "detail": detail,
        }
        self._hash = event_hash(self._hash, row)
        row["detail"], row["hash"] = json.dumps(detail), self._hash
        return row


class Database:
    """SQLite in WAL mode, synced at every commit; every change of state appends an event.

    Args:
        path: the database file; made, or migrated to the newest schema, if need be.

    Raises:
        LedgerError: it cannot be opened, or a newer scanside wrote it.
    """

    def __init__(self, path: Path) -> None:
        # SQLite's own waiting for a lock sleeps up to 0.1 s; threads of one process need not.
        self._turn = threading.Lock()
        self._kept: sa.PoolProxiedConnection | None = None
        self._engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": 30})
        sa.event.listen(self._engine, "connect", _configure)
        sa.event.listen(self._engine, "begin", _begin)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with (path.parent / "ledger.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._migrate()
        except (OSError, sa.exc.SQLAlchemyError) as error:
            raise LedgerError(str(error).splitlines()[0], str(path), "check the folder and the disk") from error

    def _migrate(self) -> None:
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        script = ScriptDirectory.from_config(config)
        with self._engine.connect() as connection:
            current = MigrationContext.configure(connection).get_current_revision()
            if current == script.get_current_head():
                return
            if current and current not in {revision.revision for revision in script.walk_revisions()}:
                raise LedgerError(
                    f"schema {current} is newer than this scanside",
                    str(self._engine.url.database),
                    "install the scanside that wrote it, or restore a backup",
                )
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            connection.commit()

    def close(self) -> None:
        """Close all connections."""
        if self._kept is not None:
            self._kept.close()
        self._engine.dispose()

    @contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        """A transaction that holds the write lock from its first line (BEGIN IMMEDIATE)."""
        with self._turn, self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _write_fast(self) -> Iterator[sqlite3.Connection]:
        """The same for `Statement`, on a connection that is kept."""
        with self._turn:
            try:
                if self._kept is None:
                    self._kept = self._engine.raw_connection()
                connection: sqlite3.Connection = self._kept.driver_connection  # type: ignore[assignment]
                connection.execute("BEGIN IMMEDIATE")
                try:
                    yield connection
                    connection.execute("COMMIT")
                except BaseException:
                    connection.rollback()
                    raise
            except sqlite3.Error as error:
                raise sa.exc.DBAPIError.instance("", None, error, sqlite3.Error) from error

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A transaction that sees one state of the ledger and cannot hold up a writer."""
        with self._engine.connect().execution_options(scanside_read=True) as connection:
            yield connection

    def _append(
        self, connection: sa.Connection | sqlite3.Connection, name: Event, study_id: int | None, **detail: Any
    ) -> int:
        """Append an event; returns its number."""
        raw: Any = connection.connection.driver_connection if isinstance(connection, sa.Connection) else connection
        return Chain(raw).append(name, study_id, detail)

    def log(self, name: Event, **detail: Any) -> None:
        """Append an event that changes no state."""
        with self._write() as connection:
            self._append(connection, name, None, **detail)


def _configure(connection: Any, _record: Any) -> None:
    """Once a connection: transactions are begun by us, the log is synced at every commit (design.md)."""
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin(connection: sa.Connection) -> None:
    read = connection.get_execution_options().get("scanside_read", False)
    connection.exec_driver_sql("BEGIN" if read else "BEGIN IMMEDIATE")
