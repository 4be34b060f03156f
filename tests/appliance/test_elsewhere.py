"""An application acknowledgement that comes as a message of its own (2.9.3) ends the delivery that waits for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from appliance.bench.alerts import DESTINATION, prepare
from appliance.delivery.hl7 import MllpClient
from appliance.delivery.outbox import Said
from appliance.intake.hl7_message import Rules
from appliance.intake.hl7_receiver import OrderReceiver
from appliance.ledger.store import Ledger
from appliance.services.delivery import _hl7_sender
from appliance.settings import Hl7Destination, Settings
from dicom_io.errors import PeerError
from tests.appliance.delivery.test_hl7 import Peer, after_message, answer, enhanced, polite, talking

ER = {"kind": "hl7", "name": DESTINATION, "host": "127.0.0.1", "acknowledgement": "application",
      "application_elsewhere": True}  # fmt: skip


class Alert:
    """One alert that waits to be delivered, and what its receiver says elsewhere."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ledger = Ledger(folder / "ledger.sqlite")
        (self.uid,) = prepare(self.ledger, folder, 1)
        # As a destination in enhanced mode has it.
        path = folder / f"{self.uid}.hl7"
        text = path.read_text(encoding="utf-8").replace("|2.5.1||||||UNICODE", "|2.5.1|||AL|AL||UNICODE", 1)
        assert "|AL|AL|" in text
        path.write_text(text, encoding="utf-8", newline="")
        self.receiver = OrderReceiver(self.ledger, Rules(), "BOX", 1 << 20, lambda: None, lambda: "", [DESTINATION])

    def take(self) -> Any:
        row = self.ledger.take_delivery(DESTINATION)
        assert row is not None
        return row

    def hear(self, code: str = "AA", uid: str = "", asks: str = "AL") -> list[str]:
        said = f"MSH|^~\\&|ER|H|BOX|B|20260101||ACK^R01|E1|P|2.5.1|||{asks}|NE\rMSA|{code}|{uid or self.uid}\r"
        return self.receiver.take(said.encode(), "127.0.0.1")


@pytest.fixture
def alert(tmp_path: Path) -> Iterator[Alert]:
    one = Alert(tmp_path)
    yield one
    one.ledger.close()


@pytest.mark.parametrize("closes", [False, True], ids=["the connection stays", "it is closed after the CA"])
@pytest.mark.parametrize(("code", "result"), [("AA", "acknowledge"), ("AE", "retry"), ("AR", "reject")])
def test_it_ends_the_delivery(alert: Alert, code: str, result: str, closes: bool) -> None:
    said: list[list[str]] = []
    timers: list[threading.Timer] = []

    def then_elsewhere(connection: Any, _: Peer) -> None:
        connection.sendall(answer("CA", alert.uid))
        if closes:
            connection.close()
        later = threading.Timer(0.3, lambda: said.append(alert.hear(code)))
        timers.append(later)
        later.start()

    peer = Peer(after_message(then_elsewhere))
    with ExitStack() as stack:
        destination = Hl7Destination(**ER, port=peer.port)  # type: ignore[arg-type]
        send = _hl7_sender(alert.folder, destination, stack, alert.ledger)
        assert send(alert.take())[0] == result
    timers[0].join(30)
    peer.close()
    ((accepted,),) = said
    assert "MSA|CA|E1" in accepted
    assert alert.ledger.answer_to(alert.uid) is None, "it is read once"


def test_the_words_of_an_answer_are_known_from_its_code(alert: Alert) -> None:
    def refuse(connection: Any, _: Peer) -> None:
        connection.sendall(answer("AR", alert.uid, "|4711 DOE^JANE is not known"))

    peer = Peer(after_message(refuse))
    with ExitStack() as stack:
        destination = Hl7Destination(**ER, port=peer.port)  # type: ignore[arg-type]
        result, said = _hl7_sender(alert.folder, destination, stack, alert.ledger)(alert.take())
    peer.close()
    assert (result, said) == ("reject", "AR 4711 DOE^JANE is not known")
    assert isinstance(said, Said) and said.condition == "AR"


def test_one_that_came_after_a_try_had_given_up_saves_the_next(alert: Alert) -> None:
    peer = Peer(after_message(lambda connection, _: connection.sendall(answer("CA", alert.uid))))
    with ExitStack() as stack:
        destination = Hl7Destination(**ER, port=peer.port, application_seconds=0.3)  # type: ignore[arg-type]
        send = _hl7_sender(alert.folder, destination, stack, alert.ledger)
        row = alert.take()
        with pytest.raises(PeerError, match="no application acknowledgement"):
            send(row)
        alert.ledger.settle_delivery(row, "retry", "no answer")
        assert alert.hear() != []
        assert send(alert.take())[0] == "acknowledge"
    assert len(peer.received) == 1
    peer.close()


@pytest.mark.parametrize(
    ("code", "uid"), [("AA", "SOMEBODYELSES"), ("CA", ""), ("XX", "")], ids=["unknown", "no application's", "no code"]
)
def test_what_nobody_waits_for_is_ignored(alert: Alert, code: str, uid: str) -> None:
    alert.take()
    assert alert.hear(code, uid) == [] and alert.ledger.answer_to(uid or alert.uid) is None


def test_what_has_ended_takes_no_more_answers(alert: Alert) -> None:
    row = alert.take()
    assert alert.hear("AE", asks="NE") == [] and alert.ledger.answer_to(alert.uid) is not None
    alert.ledger.settle_delivery(row, "acknowledge")
    assert alert.hear() == [] and alert.ledger.answer_to(alert.uid) is None


def test_a_destination_that_answers_on_its_connection_takes_none_elsewhere(alert: Alert) -> None:
    alert.take()
    alert.receiver = OrderReceiver(alert.ledger, Rules(), "BOX", 1 << 20, lambda: None, lambda: "", ["another"])
    assert alert.hear() == [] and alert.ledger.answer_to(alert.uid) is None


def test_an_answer_on_the_connection_still_counts() -> None:
    both = after_message(lambda connection, _: connection.sendall(answer("CA", "MSG1") + answer("AA", "MSG1")))
    with talking(both, polite) as (client, _):
        client.elsewhere = lambda _: None
        assert client.send(enhanced()).code == "AA"


def test_a_connection_that_ends_is_told_when_the_time_is_over() -> None:
    def hang_up(connection: Any, _: Peer) -> None:
        connection.sendall(answer("CA", "MSG1"))
        connection.close()

    with talking(after_message(hang_up), polite) as (client, _):
        client: MllpClient
        client.elsewhere, client.application_timeout = lambda _: None, 0.5
        with pytest.raises(PeerError, match="closed the connection"):
            client.send(enhanced())
        assert client.send(enhanced()).code == "AA"


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"acknowledgement": "accept"}, "needs acknowledgement"), ({}, "there is no .intake.hl7.")],
)
def test_settings_that_cannot_be(changes: dict[str, str], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Settings(destination=[{**ER, "port": 1, **changes}])  # type: ignore[list-item]
