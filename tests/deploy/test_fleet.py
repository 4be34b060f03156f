"""A fleet in a lab: installed from a signed bundle without a network, and broken.

Each test looks at what came out at the other end: the messages that the listener kept, the objects that the PACS has.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.deploy.fleet import FIRST, Site
from tests.deploy.lab import Lab, lab

pytestmark = [pytest.mark.deploy, pytest.mark.xdist_group("lab"), pytest.mark.timeout(1800)]

CANARY, OTHER = "box1", "box2"


class Fleet:
    """The lab, its controller, and the studies that must have had one alert in the end."""

    def __init__(self, hospital: Lab) -> None:
        self.lab = hospital
        self.site = Site(hospital)
        self.alerted: list[str] = []

    def one_alert(self, uid: str) -> None:
        """Wait for the alert on a study; the last test looks whether another followed."""
        self.lab.alerted(uid, 240)
        self.alerted.append(uid)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with lab(tmp_path_factory.mktemp("lab"), [CANARY, OTHER]) as hospital:
        yield Fleet(hospital)


def test_a_bare_machine_becomes_a_box_that_alerts(fleet: Fleet) -> None:
    fleet.site.play("install", scanside_bundle=str(fleet.site.release(FIRST)))
    for box in fleet.lab.boxes:
        assert fleet.lab.version(box) == FIRST
        uid, files = fleet.lab.study("intraparenchymal", f"NEW{box.upper()}")
        fleet.lab.send(box, files)
        fleet.one_alert(uid)
        fleet.lab.wait(lambda uid=uid: len(fleet.lab.archived(uid)) > 1, 60, "the findings in the PACS")  # type: ignore[misc]


@pytest.mark.parametrize("how", ["reboot", "power"])
def test_a_box_that_goes_down_in_the_middle_of_a_study_alerts_once(fleet: Fleet, how: str) -> None:
    uid, files = fleet.lab.study("intraparenchymal", f"DOWN{how.upper()}")
    machine = fleet.lab.boxes[OTHER]
    with fleet.lab.scanning(OTHER, files):
        if how == "reboot":
            machine.reboot()
        else:
            machine.cut_power()
            machine.start()
    fleet.one_alert(uid)


def test_a_cable_of_the_pacs_that_is_pulled_delays_what_it_gets_and_no_alert(fleet: Fleet) -> None:
    fleet.lab.pull("pacs")
    try:
        uid, files = fleet.lab.study("intraparenchymal", "PULLED")
        fleet.lab.send(OTHER, files)
        fleet.one_alert(uid)
        fleet.lab.wait(lambda: fleet.lab.status(OTHER)["waiting"].get("pacs", 0) > 0, 60, "what waits for the PACS")
    finally:
        fleet.lab.plug("pacs")
    fleet.lab.wait(lambda: len(fleet.lab.archived(uid)) > 1, 120, "the findings in the PACS")
    fleet.lab.wait(lambda: not fleet.lab.status(OTHER)["waiting"], 120, "that nothing waits")


def test_in_the_end_each_study_had_one_alert(fleet: Fleet) -> None:
    assert fleet.alerted
    assert {uid: len(fleet.lab.alerts(uid)) for uid in fleet.alerted} == dict.fromkeys(fleet.alerted, 1)
