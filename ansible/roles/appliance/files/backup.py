"""Write one tar of what a box cannot get again: ledger, noted head, the board's evidence, findings, configuration.

As root on the box: python3 backup.py TARGET. Services may run. Images are not in it: the archive has them.
"""

import sqlite3
import sys
import tarfile
import tempfile
from pathlib import Path

STATE, CONFIG = Path("/var/lib/scanside"), Path("/etc/scanside")


def main(target: Path) -> None:
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
        part = target.with_suffix(".part")
        with tarfile.open(part, "w:gz", compresslevel=1) as tar:
            for one in folder.iterdir():
                tar.add(one, f"state/{one.name}")
            for sub in ("evidence", "findings"):
                if (STATE / sub).is_dir():
                    tar.add(STATE / sub, f"state/{sub}")
            tar.add(CONFIG, "config")
        part.chmod(0o600)
        part.rename(target)


main(Path(sys.argv[1]))
