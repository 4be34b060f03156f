"""Rings wake; lost rings harm nobody."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from appliance.ledger.doorbell import Doorbell, Ringer, ring


def test_a_ring_wakes_at_once(tmp_path: Path) -> None:
    bell = Doorbell(tmp_path, "engine")
    threading.Timer(0.05, ring, (tmp_path, "engine")).start()
    began = time.monotonic()
    assert bell.wait(30.0)
    assert time.monotonic() - began < 20.0
    bell.close()


def test_many_rings_count_as_one(tmp_path: Path) -> None:
    bell = Doorbell(tmp_path, "engine")
    for _ in range(1000):
        ring(tmp_path, "engine")
    assert bell.wait(1.0)
    assert not bell.wait(0.01)
    bell.close()


def test_nobody_listens(tmp_path: Path) -> None:
    ring(tmp_path, "engine")
    ring(tmp_path / "absent", "engine")
    Doorbell(tmp_path, "engine").close()
    ring(tmp_path, "engine")
    assert not list(tmp_path.glob("*.bell"))


def test_a_socket_left_by_a_dead_service_is_replaced(tmp_path: Path) -> None:
    Doorbell(tmp_path, "engine")  # never closed, as after kill -9
    bell = Doorbell(tmp_path, "engine")
    ring(tmp_path, "engine")
    assert bell.wait(1.0)
    bell.close()


def test_folders_may_be_deeper_than_a_socket_address(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    bell = Doorbell(deep, "engine")
    ring(deep, "engine")
    assert bell.wait(1.0)
    bell.close()


def test_a_ringer_finds_whoever_listens_now(tmp_path: Path) -> None:
    """Before there is a listener, after it, and after the next one took its place."""
    ringer = Ringer(tmp_path / "run", "engine")
    ringer()
    for _ in range(2):
        bell = Doorbell(tmp_path / "run", "engine")
        deadline = time.monotonic() + 30
        while not bell.wait(0.05):  # one that found nobody does not look again at once
            assert time.monotonic() < deadline
            ringer()
        for _ in range(1000):
            ringer()
        assert bell.wait(1.0)
        bell.close()
        ringer()


def test_more_of_the_same_is_heard_once_its_time_has_come(tmp_path: Path) -> None:
    bell, ringer = Doorbell(tmp_path, "engine"), Ringer(tmp_path, "engine")
    ringer.more()
    began = time.monotonic()
    assert bell.wait(30.0, 0.2)
    assert 0.19 < time.monotonic() - began < 20.0
    ringer.more()
    assert bell.wait(30.0, -1.0)  # its time was over before
    assert time.monotonic() - began < 20.0
    assert not bell.wait(0.01, 0.005)
    bell.close()


def test_news_are_heard_at_once_among_more_of_the_same(tmp_path: Path) -> None:
    bell, ringer = Doorbell(tmp_path, "engine"), Ringer(tmp_path, "engine")
    ringer.more()
    threading.Timer(0.05, ringer).start()
    began = time.monotonic()
    assert bell.wait(60.0, 60.0)
    assert time.monotonic() - began < 30.0
    ringer.more()
    ringer()
    assert bell.wait(60.0, 60.0)
    assert time.monotonic() - began < 30.0
    bell.close()
