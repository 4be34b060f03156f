"""An alert that is not acknowledged goes on to mail and webhook, though delivery is killed meanwhile."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from email import message_from_bytes, policy
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from typer.testing import CliRunner

from appliance import init
from appliance.cli import app
from appliance.events import Event
from appliance.ledger.views import study_report
from tests.appliance.delivery.test_mail import Postbox, free_port
from tests.appliance.delivery.test_webhook import SECRET, Receiver
from tests.appliance.test_telling import ER, HOOK, MAIL, Issued

pytestmark = [pytest.mark.interop, pytest.mark.slow]


def until(what: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_alert_goes_from_step_to_step_and_a_kill_changes_nothing(tmp_path: Path) -> None:
    postbox, receiver = Postbox(), Receiver()
    postbox.answers[""] = "451 not now"
    server = Controller(postbox, hostname="127.0.0.1", port=free_port())
    server.start()
    deaf = socket.create_server(("127.0.0.1", 0))  # takes connections and never answers
    (tmp_path / "secret").write_text(SECRET)
    destinations: list[dict[str, Any]] = [
        {**ER, "host": "127.0.0.1", "port": deaf.getsockname()[1], "acknowledge_seconds": 1.0},
        {**MAIL, "host": "127.0.0.1", "port": server.port, "security": "none", "after_seconds": 2.0},
        {**HOOK, "url": f"http://127.0.0.1:{receiver.server_address[1]}/", "after_seconds": 6.0},
    ]
    config = init.write(tmp_path, {"delivery": {"longest_retry_seconds": 1.0, "alarm_seconds": 9.0}}, destinations)
    receiver.status = 503
    issued = Issued(tmp_path, destinations)
    command = [sys.executable, "-m", "appliance.cli", "--config", str(config), "deliver"]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(command, stderr=log)

    def events(name: Event) -> int:
        return sum(one["name"] == name for one in study_report(issued.ledger, issued.study)["events"])

    def alarms() -> dict[str, Any]:
        done = CliRunner().invoke(app, ["--config", str(config), "check", "--json"])
        (found,) = [one for one in json.loads(done.stdout)["checks"] if one["check"] == "alerts"]
        return dict(found)

    try:
        issued.issue(mode="clinical")
        until(lambda: events(Event.DELIVERY_ESCALATED) == 1)
        process.kill()
        process.wait()
        assert issued.alerts()["hook"] == ("held", 1)
        process = subprocess.Popen(command, stderr=log)
        until(lambda: len(receiver.requests) > 0)
        until(lambda: events(Event.ALERT_UNREACHED) == 1)
        alarm = alarms()
        assert not alarm["ok"] and "NOBODY WAS REACHED" in alarm["detail"]
        postbox.answers.clear()
        until(lambda: issued.alerts()["mail"][0] == "acknowledged")
        assert alarms()["ok"]
        assert events(Event.DELIVERY_ESCALATED) == 2
        assert events(Event.ALERT_UNREACHED) == 1
    finally:
        process.kill()
        process.wait()
        log.close()
        server.stop()
        receiver.shutdown()
        deaf.close()
    ((_, content, _),) = postbox.mails
    mail = message_from_bytes(content, policy=policy.default)
    (finding,) = [one for one in study_report(issued.ledger, issued.study)["findings"] if one["object"] == "alert.mail"]
    assert mail["Message-ID"] == f"<{finding['uid']}@site.example>"
    assert len({headers["webhook-id"] for _, headers, _ in receiver.requests}) == 1
    told = (tmp_path / "log").read_text()
    assert "goes to mail, too" in told and "goes to hook, too" in told and "NOBODY WAS REACHED" in told
    for secret in ("PID-7", "ACC-1"):
        assert secret not in told
    issued.ledger.close()
