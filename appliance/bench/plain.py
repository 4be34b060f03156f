"""A storage provider as pynetdicom's documentation shows it: its defaults, and a file for each instance.

Of the two handlers that the "Storage SCP" example shows this is the faster one, which writes what was sent without
decoding it (https://pydicom.github.io/pynetdicom/stable/examples/storage.html). One default is changed: more than ten
associations are allowed, because the benchmark opens sixteen.

Run it as ``python -m appliance.bench.plain PORT FOLDER``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pynetdicom import AE, AllStoragePresentationContexts, evt
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined, unused-ignore]


def main() -> None:
    """The program; it runs until it is stopped."""
    folder = Path(sys.argv[2])

    def store(event: Any) -> int:
        (folder / f"{event.request.AffectedSOPInstanceUID}.dcm").write_bytes(event.encoded_dataset())
        return 0x0000

    ae = AE(ae_title="PLAIN")
    ae.maximum_associations = 100
    ae.supported_contexts = AllStoragePresentationContexts
    ae.add_supported_context(Verification)
    ae.start_server(("127.0.0.1", int(sys.argv[1])), block=True, evt_handlers=[(evt.EVT_C_STORE, store)])


if __name__ == "__main__":
    main()
