"""A rollout over twenty boxes: the playbook itself, by Ansible itself, with a folder of this machine for each box.

What a box does in a rollout (tests/deploy/test_fleet.py has it on real ones) is stood in for: its release is a
file, its gate a word in the inventory. Looked at is who was touched, in which wave, and what each box has in the end.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.fleet import ansible
from tests.deploy.machine import ROOT
from tests.peers import program

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(900)]

OLD, NEW = "1.0.0", "1.1.0"
BOXES = [f"ct{number:02}" for number in range(1, 21)]
CANARY = "ct07"
"""Not the first by name: it goes first because the inventory says so."""
IN_ORDER = [CANARY, *(box for box in BOXES if box != CANARY)]
NOBODY = {"ansible_connection": "ssh", "ansible_host": "127.0.0.1", "ansible_port": 1}
"""A box that cannot be reached."""
STAND_INS = {
    "stage": """
- name: Stand in for a release that is put there
  ansible.builtin.command: cat {{ box }}/current
  register: here
  changed_when: false
- name: Stand in for what the box says of itself
  ansible.builtin.set_fact:
    scanside_version: "{{ new }}"
    scanside_installed: {current: "{{ here.stdout }}", previous: null, floor: "{{ here.stdout }}", installed: []}
""",
    "before": """
- name: Stand in for what is noted
  ansible.builtin.set_fact: {scanside_before: {version: "{{ scanside_installed.current }}"}}
""",
    "switch": """
- name: Stand in for the switch
  ansible.builtin.shell: echo {{ scanside_version }} > {{ box }}/current
""",
    "gate": """
- name: Go away
  when: goes_away | default(false)
  ansible.builtin.set_fact: {ansible_connection: ssh, ansible_host: 127.0.0.1, ansible_port: 1}
- name: Ask the box
  ansible.builtin.command: cat {{ box }}/current
  register: here
  changed_when: false
- name: Stand in for the gate
  ansible.builtin.assert:
    that: [here.stdout == scanside_version, not sick | default(false)]
    fail_msg: this box is sick
""",
    "back": """
- name: Stand in for the way back
  ansible.builtin.shell: echo {{ scanside_back_to }} > {{ box }}/current
""",
}


@dataclass(frozen=True)
class Rollout:
    """What came of one."""

    code: int
    said: str
    waves: list[list[str]]
    """The boxes of each wave that was begun, by name."""
    runs: dict[str, str]
    """Box → its release in the end."""


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    """The collection, with stand-ins for what is done on a box."""
    if os.geteuid() != 0:
        pytest.skip("the boxes' files are root's")
    program("ssh")
    target = tmp_path / "ansible_collections/scanside/fleet"
    shutil.copytree(ROOT / "ansible", target)
    for name, text in STAND_INS.items():
        (target / f"roles/appliance/tasks/{name}.yml").write_text(f"---{text}", encoding="utf-8")
    playbook = target / "playbooks/update.yml"
    text = playbook.read_text(encoding="utf-8")
    assert "/var/cache/scanside" in text
    playbook.write_text(text.replace("/var/cache/scanside", "{{ box }}"), encoding="utf-8")
    for box in BOXES:
        (tmp_path / "boxes" / box).mkdir(parents=True)
        (tmp_path / "boxes" / box / "current").write_text(f"{OLD}\n")
    return tmp_path


def roll_out(folder: Path, **of: dict[str, Any]) -> Rollout:
    """Update the boxes, of some of which the inventory says more."""
    values = {"ansible_connection": "local", "ansible_become": False, "ansible_python_interpreter": sys.executable,
            "box": f"{folder}/boxes/{{{{ inventory_hostname }}}}", "new": NEW, "scanside_soak_seconds": 0}  # fmt: skip
    inventory = {
        "scanside": {"hosts": {box: of.get(box, {}) for box in BOXES}, "vars": values},
        "scanside_canary": {"hosts": {CANARY: None}},
    }
    (folder / "inventory.json").write_text(json.dumps({"all": {"children": inventory}}), encoding="utf-8")
    playbook = ansible("ansible-playbook")
    environment = {
        "PATH": f"{playbook.parent}:{os.environ['PATH']}", "HOME": str(folder), "LANG": "C.UTF-8",
        "ANSIBLE_COLLECTIONS_PATH": str(folder), "ANSIBLE_NOCOLOR": "True", "ANSIBLE_SSH_RETRIES": "0",
    }  # fmt: skip
    done = subprocess.run(
        [playbook, "--inventory", folder / "inventory.json", "scanside.fleet.update"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    plays = done.stdout.split("PLAY RECAP")[0].split("PLAY [Roll a release out]")[1:]
    waves = [sorted(set(re.findall(r"^(?:ok|changed|fatal): \[(ct\d\d)\]", one, re.MULTILINE))) for one in plays]
    runs = {box: (folder / "boxes" / box / "current").read_text().strip() for box in BOXES}
    return Rollout(done.returncode, done.stdout + done.stderr, waves, runs)


def test_twenty_boxes_are_the_canary_then_ten_percent_then_half_then_all(collection: Path) -> None:
    done = roll_out(collection)
    assert done.code == 0, done.said
    assert done.waves == [[CANARY], IN_ORDER[1:3], sorted(IN_ORDER[3:13]), IN_ORDER[13:]]
    assert done.runs == dict.fromkeys(BOXES, NEW)


@pytest.mark.parametrize(
    ("wrong", "stays"),
    [
        pytest.param({"sick": True}, OLD, id="does not pass the gate"),
        pytest.param(NOBODY, OLD, id="cannot be reached"),
        pytest.param({"goes_away": True}, NEW, id="goes away after the switch"),
    ],
)
def test_one_box_of_the_second_wave_stops_the_later_ones(collection: Path, wrong: dict[str, Any], stays: str) -> None:
    bad, other = IN_ORDER[1:3]
    done = roll_out(collection, **{bad: wrong})
    assert done.code != 0, done.said
    assert done.waves == [[CANARY], [bad, other]], done.said
    # What cannot be reached cannot be taken back; everything else of its wave is.
    assert done.runs == {**dict.fromkeys(BOXES, OLD), CANARY: NEW, bad: stays}, done.said
    assert bad in done.said
