"""One round of retention on a state folder, as intake runs it while the disk is low."""

from __future__ import annotations

import sys
from pathlib import Path

from appliance.intake.retention import Retention
from appliance.ledger.store import Ledger
from tests.appliance.intake.test_retention import LOW, made_settings


def main() -> None:
    """Remove what may go; print how many studies went."""
    settings = made_settings(Path(sys.argv[1]))
    ledger = Ledger(settings.ledger_path)
    retention = Retention(ledger, settings, room=lambda: LOW)
    retention.resume()
    print(retention.step())
    ledger.close()


if __name__ == "__main__":
    main()
