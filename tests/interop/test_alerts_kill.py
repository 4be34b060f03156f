"""1,000 alerts to a listener that fails at random, by a delivery that is killed with -9 again and again."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from appliance import init
from appliance.bench.alerts import DESTINATION, Listener, count, prepare
from appliance.ledger.store import Ledger
from appliance.ledger.views import state_counts, verify_events
from appliance.settings import load_settings

pytestmark = [pytest.mark.interop, pytest.mark.slow]

ALERTS, KILLS = 1000, 8


@pytest.mark.timeout(900)
def test_each_alert_arrives_once_and_in_order_whenever_delivery_is_killed(tmp_path: Path) -> None:
    chance = random.Random(20261124)
    listener = Listener(0.15, late_seconds=0.4)
    destination = {"kind": "hl7", "name": DESTINATION, "host": "127.0.0.1", "port": listener.port}
    delivery = {"first_retry_seconds": 0.01, "longest_retry_seconds": 0.05, "attempts": 1000, "order_seconds": 300.0}
    config = init.write(tmp_path, {"delivery": delivery}, [{**destination, "acknowledge_seconds": 0.25}])
    settings = load_settings(config)
    ledger = Ledger(settings.ledger_path)
    sent = prepare(ledger, settings.findings_directory, ALERTS)
    command = [sys.executable, "-m", "appliance.cli", "--config", str(config), "deliver"]
    log = (tmp_path / "deliver.log").open("w")

    def acknowledged() -> int:
        return state_counts(ledger)["delivery"].get("acknowledged", 0)

    process = subprocess.Popen(command, stderr=log)
    try:
        for number in range(KILLS):
            # Spread over the whole, so that each kill meets it at work.
            target = ALERTS * (number + 1) // (KILLS + 1)
            deadline = time.monotonic() + 120.0
            while acknowledged() < target:
                assert process.poll() is None, "delivery ended by itself"
                assert time.monotonic() < deadline, f"{acknowledged()} of {target}"
                time.sleep(0.05)
            time.sleep(chance.uniform(0.0, 0.3))
            process.kill()
            process.wait()
            process = subprocess.Popen(command, stderr=log)
        deadline = time.monotonic() + 180.0
        while acknowledged() < ALERTS:
            assert process.poll() is None, "delivery ended by itself"
            assert time.monotonic() < deadline, f"{acknowledged()} of {ALERTS}"
            time.sleep(0.2)
    finally:
        process.kill()
        process.wait()
        log.close()
        listener.close()
    told = count(sent, listener.arrived)
    assert (told["sent"], told["lost"], told["doubled"], told["reordered"]) == (ALERTS, 0, 0, 0)
    assert told["copies"] > 0, "no fault made the box send anything again"
    assert sum(listener.faults.values()) > KILLS
    assert verify_events(ledger) is None
    ledger.close()
