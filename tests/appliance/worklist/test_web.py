"""UPS-RS as a client sees it: what it may do, what it is told, and what it cannot break."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from appliance.events import Event
from appliance.ledger.views import event_counts
from appliance.worklist import server as server_module
from appliance.worklist import web
from appliance.worklist.refusals import A_MINUTE
from dicom_io.workitem import MAXIMUM_BYTES, Step, put, text
from tests.appliance.worklist.support import JSON, Served, serving
from tests.workitems import abandoned, performed, workitem

GLOBAL = "1.2.840.10008.5.1.4.34.5"
FILTERED = "1.2.840.10008.5.1.4.34.5.1"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path) as one:
        yield one


def test_a_life_from_creation_to_completion(served: Served) -> None:
    made = served.create("1.1")
    assert made.status_code == 201
    assert made.headers["location"] == f"http://{served.address}/workitems/1.1"
    assert served.create("1.1").status_code == 409
    (step,) = served.http.get(made.headers["location"]).json()
    assert (text(step, "ProcedureStepState"), text(step, "PatientName")) == ("SCHEDULED", "Müller^Eva")
    assert served.state("1.1", "IN PROGRESS", "1.9").status_code == 200
    other = served.state("1.1", "IN PROGRESS", "1.8")
    assert (other.status_code, other.json()["status"]) == (409, "0xC302")
    (step,) = served.http.get("workitems/1.1").json()
    assert "00081195" not in step
    assert served.post("workitems/1.1?1.8", [performed()]).status_code == 400
    assert served.post("workitems/1.1", [performed()]).status_code == 400
    lacking = served.state("1.1", "COMPLETED", "1.9")
    assert (lacking.status_code, lacking.json()["status"]) == (409, "0xC304")
    assert served.post("workitems/1.1?1.9", [performed()]).status_code == 200
    assert served.state("1.1", "COMPLETED", "1.9").status_code == 200
    again = served.state("1.1", "COMPLETED", "1.9")
    assert (again.status_code, again.headers["warning"]) == (
        200, "299 scanside: The UPS is already in the requested state of COMPLETED.",
    )  # fmt: skip
    assert served.post("workitems/1.1?1.9", [abandoned()]).status_code == 400
    assert served.http.post("workitems/1.1/cancelrequest").status_code == 409


@pytest.mark.parametrize("query", ["transaction-uid=1.9", "transaction=1.9", "1.9"])
def test_the_lock_may_be_written_as_editions_write_it(served: Served, query: str) -> None:
    step = workitem()
    put(step, "SOPInstanceUID", "UI", "1.1")
    assert served.post("workitems", step).status_code == 201
    served.state("1.1", "IN PROGRESS", "1.9")
    assert served.post(f"workitems/1.1?{query}", performed()).status_code == 200


def test_an_item_that_was_completed_by_us_says_so(served: Served) -> None:
    step = workitem()
    del step["00100030"]
    made = served.create("1.1", step)
    assert (made.status_code, "with modifications" in made.headers["warning"]) == (201, True)


def test_a_cancel_request(served: Served) -> None:
    served.create("1.1")
    said: Step = {}
    put(said, "ReasonForCancellation", "LT", "double")
    assert served.post("workitems/1.1/cancelrequest", [said]).status_code == 202
    assert text(served.http.get("workitems/1.1").json()[0], "ProcedureStepState") == "CANCELED"
    again = served.http.post("workitems/1.1/cancelrequest/RIS")
    assert (again.status_code, "already" in again.headers["warning"]) == (202, True)


def test_a_search(served: Served) -> None:
    for number, (priority, label) in enumerate((("LOW", "NEURO"), ("HIGH", "CHEST"), ("MEDIUM", "NEURO")), start=1):
        served.create(f"1.{number}", workitem(f"1.2.{number}", priority, WorklistLabel=label))

    def found(**parameters: str) -> list[str]:
        answer = served.http.get("workitems", params=parameters)
        assert answer.status_code in (200, 204)
        return [text(one, "SOPInstanceUID") for one in answer.json()] if answer.status_code == 200 else []

    assert found() == ["1.2", "1.3", "1.1"]
    assert found(WorklistLabel="NEU*") == ["1.3", "1.1"]
    assert found(ScheduledProcedureStepPriority="LOW") == ["1.1"]
    assert found(**{"ReferencedRequestSequence.StudyInstanceUID": "1.2.2"}) == ["1.2"]
    assert found(**{"00404005": "20261129-20261130", "limit": "1", "offset": "1"}) == ["1.3"]
    assert found(PatientName="nobody") == []
    assert found(PatientName="müller*") == ["1.2", "1.3", "1.1"]
    more = served.http.get("workitems", params={"limit": "2"})
    assert "additional results" in more.headers["warning"]
    (whole,) = served.http.get("workitems", params={"limit": "1", "includefield": "all"}).json()
    (usual,) = served.http.get("workitems", params={"limit": "1"}).json()
    assert "00380010" in whole and "00380010" not in usual
    assert served.http.get("workitems", headers={"Accept": "application/dicom+xml"}).status_code == 406


def hear(channel: Any, seconds: float = 10.0) -> tuple[str, int, str]:
    step = json.loads(channel.recv(timeout=seconds))
    assert text(step, "AffectedSOPClassUID") == "1.2.840.10008.5.1.4.34.6.4"
    return text(step, "AffectedSOPInstanceUID"), int(text(step, "EventTypeID")), text(step, "ProcedureStepState")


def test_a_subscriber_hears_over_the_web_socket_what_happens_and_what_happened(served: Served) -> None:
    served.create("1.1")
    answer = served.http.post(f"workitems/{GLOBAL}/subscribers/PACS?deletionlock=true")
    assert (answer.status_code, answer.headers["content-location"]) == (201, f"ws://{served.address}/subscribers/PACS")
    with connect(answer.headers["content-location"], proxy=None) as channel:
        assert hear(channel) == ("1.1", 1, "SCHEDULED")
        served.state("1.1", "IN PROGRESS", "1.9")
        assert hear(channel) == ("1.1", 1, "IN PROGRESS")
    served.create("1.2")
    served.http.post("workitems/1.1/cancelrequest/RIS")
    with connect(answer.headers["content-location"], proxy=None) as channel:
        assert hear(channel) == ("1.2", 1, "SCHEDULED")
        assert hear(channel) == ("1.1", 2, "")
    assert served.http.post(f"workitems/{GLOBAL}/subscribers/PACS/suspend").status_code == 200
    assert served.http.post("workitems/1.1/subscribers/PACS/suspend").status_code == 400
    assert served.http.delete(f"workitems/{GLOBAL}/subscribers/PACS").status_code == 200
    assert served.http.delete("workitems/1.1/subscribers/PACS").status_code == 404


def test_a_filtered_subscription(served: Served) -> None:
    served.http.post(f"workitems/{FILTERED}/subscribers/PACS?ScheduledProcedureStepPriority=HIGH")
    served.create("1.1")
    served.create("1.2", workitem(priority="HIGH"))
    with connect(f"ws://{served.address}/subscribers/PACS", proxy=None) as channel:
        assert hear(channel)[0] == "1.2"


def test_a_second_channel_takes_the_place_of_the_first(served: Served) -> None:
    address = f"ws://{served.address}/subscribers/PACS"
    with connect(address, proxy=None) as first, connect(address, proxy=None) as second:
        with pytest.raises(ConnectionClosed):
            first.recv(timeout=10)
        served.http.post(f"workitems/{GLOBAL}/subscribers/PACS")
        served.create("1.1")
        assert hear(second) == ("1.1", 1, "SCHEDULED")


def test_only_whoever_has_the_token(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef\n")
    with serving(tmp_path, token) as served:
        wrong = [{}, {"Authorization": "Bearer nonsense"}, {"Authorization": "Basic 0123456789abcdef"}]
        for headers in wrong:
            answer = served.http.get("workitems", headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        right = {"Authorization": "Bearer 0123456789abcdef"}
        assert served.http.get("workitems", headers=right).status_code == 204
        with pytest.raises(InvalidStatus):
            connect(f"ws://{served.address}/subscribers/PACS", proxy=None)
        with connect(f"ws://{served.address}/subscribers/PACS", additional_headers=right, proxy=None):
            pass
        token.write_text("another-one-of-16")
        assert served.http.get("workitems", headers=right).status_code == 401
        token.write_text("short")
        assert served.http.get("workitems", headers=right).status_code == 503


def test_a_page_of_another_site_may_not_call(served: Served) -> None:
    evil = {"Origin": "https://evil.example"}
    assert served.http.get("workitems", headers=evil).status_code == 403
    with pytest.raises(InvalidStatus):
        connect(f"ws://{served.address}/subscribers/PACS", additional_headers=evil, proxy=None)
    assert served.http.get("workitems", headers={"Origin": f"http://127.0.0.1:{served.server.port}"}).status_code == 204


@pytest.mark.parametrize(
    ("method", "path", "body", "media", "status"),
    [
        ("POST", "workitems?1.1", b"{", None, 400), ("POST", "workitems?1.1", b"[" * 100_000, None, 400),
        ("POST", "workitems?1.1", b"{}", None, 400), ("POST", "workitems?1.1", b"", None, 400),
        ("POST", "workitems?1.1", b"{}", "text/plain", 415), ("POST", "workitems?1.02", b"[{}]", None, 400),
        ("POST", "workitems?1.1", b" " * (MAXIMUM_BYTES + 1), None, 413),
        ("GET", "workitems?NoSuchAttribute=1", None, None, 400), ("GET", "workitems?limit=-1", None, None, 400),
        ("GET", "workitems/1.1", None, None, 404), ("GET", "workitems/x..y", None, None, 400),
        ("PUT", "workitems/1.1/state", b"{}", None, 400), ("PUT", "workitems/1.1", b"{}", None, 405),
        ("POST", "workitems/1.1/cancelrequest", b"", None, 404), ("GET", "studies", None, None, 404),
        ("POST", "workitems/1.1/subscribers/PACS", b"", None, 404),
        ("POST", "workitems/1.1/subscribers/PACS%5CX", b"", None, 400),
        ("POST", "workitems/1.1/subscribers/" + "A" * 17, b"", None, 400),
        ("POST", f"workitems/{GLOBAL}/subscribers/PACS?deletionlock=perhaps", b"", None, 400),
        ("DELETE", "workitems/1.1/subscribers/PACS", None, None, 404),
    ],
)  # fmt: skip
def test_what_cannot_be_is_answered_with_why(
    served: Served, method: str, path: str, body: bytes | None, media: str | None, status: int
) -> None:
    headers = {"Content-Type": media} if media else JSON
    answer = served.http.request(method, path, content=body, headers=headers)
    assert answer.status_code == status
    refused = event_counts(served.ledger)[Event.WORKLIST_REFUSED]
    if status != 405 and "studies" not in path:
        assert answer.json()["what"]
        assert refused == 1
    assert served.http.get("workitems").status_code == 204


@pytest.mark.slow
def test_a_flood_of_refusals_writes_few_rows(served: Served) -> None:
    for _ in range(A_MINUTE + 20):
        assert served.http.get("workitems/1.1").status_code == 404
    assert event_counts(served.ledger)[Event.WORKLIST_REFUSED] <= 2 * A_MINUTE


def raw(served: Served, data: bytes, seconds: float) -> bytes:
    """What the server says to these bytes until it closes."""
    with socket.create_connection(("127.0.0.1", served.server.port), timeout=seconds) as connection:
        connection.sendall(data)
        said = b""
        while piece := connection.recv(65_536):
            said += piece
        return said


def test_a_peer_that_does_not_finish_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HEADER_SECONDS", 0.3)
    monkeypatch.setattr(web, "BODY_SECONDS", 0.3)
    with serving(tmp_path) as served:
        assert raw(served, b"GET /ups-rs/workitems HTTP/1.1\r\nHost: a\r\n", 10) == b""
        slow = b"POST /ups-rs/workitems?1.1 HTTP/1.1\r\nHost: a\r\nContent-Type: application/dicom+json\r\n"
        assert b" 408 " in raw(served, slow + b"Content-Length: 100\r\n\r\n{", 10).splitlines()[0]
        assert b" 400 " in raw(served, b"\x00\x01\x02\r\n\r\n", 10).splitlines()[0]
        assert served.http.get("workitems").status_code == 204


def test_many_claim_and_one_gets_it(served: Served) -> None:
    served.create("1.1")
    answers: list[int] = []

    def claim(number: int) -> None:
        with httpx.Client(base_url=f"http://{served.address}/", trust_env=False, timeout=30) as http:
            said: Step = {}
            put(said, "ProcedureStepState", "CS", "IN PROGRESS")
            put(said, "TransactionUID", "UI", f"1.9.{number}")
            answers.append(http.put("workitems/1.1/state", content=json.dumps(said), headers=JSON).status_code)

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [200] + [409] * 7
