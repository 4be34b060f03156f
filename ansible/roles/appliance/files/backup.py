"""Write one tar of what a box cannot get again: ledger, noted head, the board's evidence, findings, configuration.

As root on the box: python3 backup.py TARGET. Services may run. Images are not in it: the archive has them.
"""

import os
import sqlite3
import sys
import tarfile
import tempfile
from pathlib import Path

STATE, CONFIG = Path("/var/lib/scanside"), Path("/etc/scanside")


def add_findings(tar: tarfile.TarFile) -> None:
    """One by one: retention may remove some meanwhile, which are then no loss. Each is written whole under its name."""
    for folder, _, names in os.walk(STATE / "findings"):
        for path in (Path(folder), *(Path(folder, name) for name in sorted(names))):
            try:
                tar.add(path, f"state/{path.relative_to(STATE)}", recursive=False)
            except FileNotFoundError:
                continue


def main(target: Path) -> None:
    os.umask(0o077)  # keys, passwords and patients are in it
    part = target.with_suffix(".part")
    try:
        write(part)
        part.rename(target)
    finally:
        part.unlink(missing_ok=True)


def write(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        folder = Path(name)
        # The head first: one that is newer than the ledger would say that events are gone.
        head = STATE / "ledger.head"
        if head.exists():
            (folder / "ledger.head").write_bytes(head.read_bytes())
        source = sqlite3.connect(f"file:{STATE / 'ledger.sqlite'}?mode=ro", uri=True)
        copy = sqlite3.connect(folder / "ledger.sqlite")
        with copy:
            source.backup(copy)
        if copy.execute("PRAGMA integrity_check").fetchone() != ("ok",):
            sys.exit(f"{STATE / 'ledger.sqlite'}: the ledger is damaged: see `scanside audit verify`")
        copy.close()
        source.close()
        with tarfile.open(target, "w:gz", compresslevel=1) as tar:
            for one in folder.iterdir():
                tar.add(one, f"state/{one.name}")
            if (STATE / "evidence").is_dir():
                tar.add(STATE / "evidence", "state/evidence")
            add_findings(tar)
            tar.add(CONFIG, "config")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
