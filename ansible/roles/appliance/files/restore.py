"""Put the state of a backup into a box whose services are stopped; what is there is kept beside it.

As root on the box: python3 restore.py SOURCE. The configuration of the backup is left alone: it is the inventory's.
Images that the box still has and the backup knows stay. The others, which the start of intake would set aside, are kept
beside it, too, to be sent again.
"""

import shutil
import sqlite3
import sys
import tarfile
import tempfile
import time
from pathlib import Path

STATE = Path("/var/lib/scanside")
REPLACED = ("ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm", "ledger.head", "evidence", "findings", "spool")
MODES = {"ledger.sqlite": 0o660, "ledger.head": 0o660}


def main(source: Path) -> None:
    with tempfile.TemporaryDirectory(dir=STATE) as name:
        with tarfile.open(source) as tar:
            tar.extractall(name, filter="data") if hasattr(tarfile, "data_filter") else tar.extractall(name)
        found = Path(name, "state")
        if not (found / "ledger.sqlite").is_file():
            sys.exit(f"{source}: there is no ledger in it")
        # Immutable: SQLite leaves no files of its own beside it, which would be root's.
        copy = sqlite3.connect(f"file:{found / 'ledger.sqlite'}?immutable=1", uri=True)
        known = [digest for (digest,) in copy.execute("SELECT digest FROM instance")]
        copy.close()
        kept = STATE / f"before-restore-{int(time.time())}"
        kept.mkdir(mode=0o700)
        for one in REPLACED:
            if (STATE / one).exists():
                shutil.move(STATE / one, kept / one)
        for one in found.iterdir():
            shutil.move(one, STATE / one.name)
    shutil.chown(STATE / "ledger.sqlite", "root", "scanside")
    (STATE / "spool").mkdir(exist_ok=True)
    for digest in known:
        name = Path("spool", digest[:2], f"{digest}.dcm")
        if (kept / name).exists():
            (STATE / name).parent.mkdir(exist_ok=True)
            (kept / name).rename(STATE / name)
    for one, mode in MODES.items():
        if (STATE / one).exists():
            shutil.chown(STATE / one, "root" if one == "ledger.sqlite" else "scanside-engine", "scanside")
            (STATE / one).chmod(mode)
    for top, owner in (("evidence", "root"), ("findings", "scanside-engine"), ("spool", "scanside-intake")):
        for path in [STATE / top, *(STATE / top).rglob("*")] if (STATE / top).exists() else []:
            shutil.chown(path, owner, "scanside")
            path.chmod(0o2770 if path.is_dir() else 0o660)
    print(kept)


main(Path(sys.argv[1]))
