"""A scanner in another network namespace: sends a folder, stops in the middle until told to go on, and never gives up.

Run it as ``python -m tests.deploy.scanner FOLDER HOST PORT``. It prints "half" and waits for a line on standard input.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from dicom_io.errors import PeerError
from dicom_io.scu import Peer, SendResult, send


def main(folder: Path, host: str, port: int) -> None:
    """Send every file; what was not acknowledged is sent again, as a scanner does."""
    peer = Peer("SCANSIDE", host, port)
    files = sorted(folder.rglob("*.dcm"))
    sent = 0
    deadline = time.monotonic() + 200

    def pause(_: SendResult) -> None:
        nonlocal sent, deadline
        sent += 1
        if sent == len(files) // 2:
            print("half", flush=True)
            sys.stdin.readline()
            deadline = time.monotonic() + 200

    missing = files
    while missing and time.monotonic() < deadline:
        try:
            missing = [one.path for one in send(missing, peer, "CT1", on_sent=pause, timeout=10.0) if one.error]
        except PeerError as error:
            print(error, flush=True)
            time.sleep(0.5)
    sys.exit(f"{len(missing)} images were not taken" if missing else 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
