"""The schema's versions: which one a ledger has, the way forward, and the way back with all that it holds."""

from __future__ import annotations

import fcntl
import sqlite3
from contextlib import closing
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from appliance.ledger.database import LedgerError

_OURS = Path(__file__).parent / "migrations"


def _config(folder: Path = _OURS) -> Config:
    config = Config()
    config.set_main_option("script_location", str(folder))
    return config


def head(folder: Path = _OURS) -> str:
    """The newest schema that a folder of migrations leads to; by default, that this scanside knows."""
    return ScriptDirectory.from_config(_config(folder)).get_current_head() or ""


def revisions() -> list[str]:
    """All schemas that this scanside knows, the oldest first."""
    return [one.revision for one in ScriptDirectory.from_config(_config()).walk_revisions()][::-1]


def revision(path: Path) -> str:
    """The schema of a ledger; '' if there is nothing in it yet.

    Raises:
        LedgerError: it cannot be read.
    """
    if not path.exists() or path.stat().st_size == 0:
        return ""
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)) as connection:
            named = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone()
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone() if named else None
    except sqlite3.Error as error:
        raise LedgerError(str(error), str(path), "check the folder and the disk") from error
    return str(row[0]) if row else ""


def downgrade(path: Path, to: str) -> str:
    """Take a ledger back to an older schema, so that the scanside of that time can go on with it; its schema before.

    It is one transaction: whatever happens, the ledger has the one schema or the other. Nothing that an older schema
    can hold is lost; see each migration for what it cannot.

    Raises:
        LedgerError: this scanside does not know one of the two schemas, or it failed.
    """
    known = revisions()
    before = revision(path)
    if to not in known:
        raise LedgerError(f"there is no schema {to}", str(path), f"name one of {', '.join(known)}")
    if not before or before == to:
        return before
    if before not in known or known.index(before) < known.index(to):
        raise LedgerError(f"schema {before} is not newer than {to}", str(path), "the newer release has to do it")
    with (path.parent / "ledger.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": 30})
        sa.event.listen(engine, "connect", _autocommit)
        sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
        config = _config()
        try:
            with engine.connect() as connection:
                if MigrationContext.configure(connection).get_current_revision() != before:
                    raise LedgerError("its schema changed meanwhile", str(path), "stop the services, try again")
                config.attributes["connection"] = connection
                command.downgrade(config, to)
                connection.commit()
        except sa.exc.SQLAlchemyError as error:
            raise LedgerError(str(error).splitlines()[0], str(path), "it is as it was; report this fault") from error
        finally:
            engine.dispose()
    return before


def _autocommit(connection: sqlite3.Connection, _record: object) -> None:
    """Transactions are begun by us; foreign keys are off, because tables are copied and renamed."""
    connection.isolation_level = None
    connection.execute("PRAGMA synchronous=FULL")
