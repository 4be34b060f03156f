"""Whether Triton can be asked: nothing is begun while it cannot, nothing waits to find that out, and it is told."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from appliance.governance.package import load_configured
from appliance.inference.triton import TritonError
from appliance.ledger import schema as t
from appliance.ledger.database import later
from appliance.ledger.store import Ledger
from appliance.ledger.views import event_counts, study_report
from appliance.services.breaker import Breaker
from appliance.services.engine import Engine
from appliance.settings import Settings
from tests.appliance.intake.test_retention import Box
from tests.appliance.test_services import Asked, bring, busy_engine, states, wait_until


@dataclasses.dataclass
class Server:
    """Stands for the client of a server that is in the state that the test wants."""

    said: str = ""
    hangs: threading.Event = dataclasses.field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.hangs.set()

    def problem(self, package: Any) -> str:
        assert self.hangs.wait(30)
        return self.said


def events(ledger: Ledger) -> tuple[int, int]:
    counts = event_counts(ledger)
    return counts["triton.lost"], counts["triton.restored"]


def test_it_opens_on_a_failure_and_closes_on_a_proof(tmp_path: Path) -> None:
    ledger, server, rung = Ledger(tmp_path / "ledger.sqlite"), Server("it starts"), []
    breaker = Breaker(ledger, load_configured(Settings()), cast(Any, server), lambda: rung.append(1))
    name = "ich_reference"
    assert breaker.problem(name)
    breaker.step()
    assert (breaker.problem(name), events(ledger)) == ("it starts", (0, 0)), "what never was there is not lost"
    server.said = ""
    breaker.step()
    assert (breaker.problem(name), events(ledger), len(rung)) == ("", (0, 0), 1)
    breaker.failed(name, "no answer within 30 s")
    breaker.failed(name, "the server cannot be reached")
    assert (breaker.problem(name), events(ledger)) == ("the server cannot be reached", (1, 0))
    breaker.step()
    assert (breaker.problem(name), events(ledger), len(rung)) == ("", (1, 1), 3)
    server.said = "the server is not ready"
    breaker.step()
    assert events(ledger) == (2, 1), "noticed without a request"
    ledger.close()


def test_a_failure_is_looked_into_at_once(tmp_path: Path) -> None:
    ledger, server, stopping, closed = Ledger(tmp_path / "l.sqlite"), Server(), threading.Event(), threading.Event()
    breaker = Breaker(ledger, load_configured(Settings()), cast(Any, server), closed.set)
    thread = threading.Thread(target=breaker.run, args=(stopping,))
    thread.start()
    assert closed.wait(10)
    for _ in range(3):
        closed.clear()
        breaker.failed("ich_reference", "it died")
        while breaker.problem("ich_reference"):
            assert closed.wait(10)
    stopping.set()
    breaker.failed("ich_reference", "over")
    thread.join(10)
    assert not thread.is_alive()
    ledger.close()


@contextmanager
def engine_of(folder: Path, server: Server) -> Iterator[tuple[Box, Engine, Asked]]:
    box = Box(folder)
    box.settings.run_directory.mkdir(exist_ok=True)
    engine, asked = busy_engine(box, server)
    try:
        yield box, engine, asked
    finally:
        server.hangs.set()
        asked.close()
        engine.close()
        box.ledger.close()


def test_a_server_that_hangs_does_not_hold_up_the_engine(tmp_path: Path) -> None:
    server = Server()
    with engine_of(tmp_path, server) as (box, engine, _):
        engine.breaker.step()
        server.hangs.clear()
        prober = threading.Thread(target=engine.breaker.step)
        prober.start()
        bring(box, 1)
        box.ledger.close_association(box.association, "released")
        began = time.monotonic()
        while states(box, 1) != ["running"]:
            engine.step()
            assert time.monotonic() - began < 20
        assert prober.is_alive(), "the engine went on while somebody else waited"
        server.hangs.set()
        prober.join()


def test_no_study_loses_a_try_to_a_server_that_is_gone(tmp_path: Path) -> None:
    server = Server()
    with engine_of(tmp_path, server) as (box, engine, asked):
        for study in (1, 2):
            bring(box, study)
        box.ledger.close_association(box.association, "released")
        wait_until(engine, lambda: states(box, 2) == ["running"] * 2)
        server.said = "the server is not ready"

        def lose(owner: int) -> None:
            wait_until(engine, lambda: owner in asked.futures)
            for future in asked.futures.pop(owner):
                if not future.done():
                    future.set_exception(TritonError("the server cannot be reached", "here", "none"))

        lose(1)
        while states(box, 2)[0] != "admitted":
            time.sleep(0.01)
        assert engine.breaker.problem("pkg"), "known from the request, before the server was looked at"
        with box.ledger._write() as connection:  # its pause is over
            connection.execute(t.analysis.update().where(t.analysis.c.study_id == 1).values(due_at=later(-60)))
        lose(2)
        bring(box, 3)
        for _ in range(20):
            engine.breaker.step()
            engine.step()
            time.sleep(0.02)
        assert states(box, 2) == ["admitted"] * 2
        assert study_report(box.ledger, 1)["analyses"][0]["attempts"] == 1
        assert 3 not in asked.futures, "nothing is done ahead that would fail"
        server.said = ""
        wait_until(engine, lambda: "running" in states(box, 2))
