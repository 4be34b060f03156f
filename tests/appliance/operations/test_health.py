"""Signs of life to systemd, over a real datagram socket as sd_notify(3) describes it."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.operations import health
from appliance.operations.health import Watchdog, notify


class Manager:
    """systemd's end of the socket."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)

    def heard(self) -> list[str]:
        said = []
        while True:
            try:
                said.append(self._socket.recv(4096).decode())
            except BlockingIOError:
                return said

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@scanside-{secrets.token_hex(8)}"
    one = Manager(address)
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    yield one
    one.close()


def test_what_is_said_arrives_as_one_datagram(manager: Manager) -> None:
    notify("READY=1", "STATUS=listens on 104 – bereit")
    assert manager.heard() == ["READY=1\nSTATUS=listens on 104 – bereit"]


def test_nothing_is_said_where_systemd_did_not_start_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")


def test_a_manager_that_is_gone_ends_nobody(
    manager: Manager, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", os.environ["NOTIFY_SOCKET"] + "-gone")
    notify("READY=1")
    assert "does not hear" in caplog.text


def test_a_ping_is_sent_by_a_loop_that_turns_and_by_nothing_else(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "8000000")
    now = 0.0
    turn = Watchdog(lambda: now).loop("one", 60)
    assert manager.heard() == ["WATCHDOG=1"]
    turn()
    assert manager.heard() == []  # a quarter of the time is not over
    now = 2.0
    turn()
    assert manager.heard() == ["WATCHDOG=1"]


@pytest.mark.parametrize("variables", [{}, {"WATCHDOG_USEC": "8000000", "WATCHDOG_PID": "1"}])
def test_nobody_is_pinged_who_did_not_ask(
    manager: Manager, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    Watchdog().loop("one", 60)()
    assert manager.heard() == []


def test_a_loop_that_hangs_silences_the_others_until_it_turns_again(
    manager: Manager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "4000000")
    now = 0.0
    watchdog = Watchdog(lambda: now)
    well, hangs = watchdog.loop("well", 10), watchdog.loop("hangs", 20)
    for second in range(60):
        now = float(second)
        well()
        assert bool(manager.heard()) == (second <= 20), second
    assert caplog.text.count("hangs has not turned for too long") == 1
    hangs()
    assert manager.heard() == ["WATCHDOG=1"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 10)), max_size=40))
def test_a_ping_means_that_every_loop_turned_within_its_time(turns: list[tuple[str, float]]) -> None:
    limits = {"a": 5.0, "b": 15.0, "c": 40.0}
    pings: list[float] = []
    now = 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WATCHDOG_USEC", "4000000")
        patch.setattr(health, "notify", lambda *_: pings.append(now))
        watchdog = Watchdog(lambda: now)
        sign = {name: watchdog.loop(name, seconds) for name, seconds in limits.items()}
        signed = dict.fromkeys(limits, 0.0)
        for name, pause in turns:
            now += pause
            before = len(pings)
            last = pings[-1]
            signed[name] = now
            sign[name]()
            well = all(now - signed[one] <= limit for one, limit in limits.items())
            assert len(pings) - before == (well and now - last >= 1.0)
