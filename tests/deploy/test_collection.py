"""The collection as Ansible's own judge and Ansible itself see it; nothing is changed anywhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from appliance.settings import load_settings
from tests.deploy.fleet import ansible
from tests.deploy.machine import ROOT, UNITS

COLLECTION = ROOT / "ansible"
ROLES = sorted(path.name for path in (COLLECTION / "roles").iterdir())
OURS = re.compile(r"^ansible\.(builtin|posix)\.")
WORDS = {"name", "when", "vars", "block", "rescue", "always", "register", "notify", "listen", "loop", "loop_control",
         "until", "retries", "delay", "changed_when", "failed_when", "check_mode", "delegate_to", "run_once", "become",
         "no_log", "ignore_unreachable", "diff"}  # fmt: skip


def run(program: str, *arguments: str | Path, folder: Path, where: Path) -> subprocess.CompletedProcess[str]:
    """Run a program of the controller with the collection installed in a folder."""
    environment = {
        "PATH": f"{ansible(program).parent}:{os.environ['PATH']}", "HOME": str(folder), "LANG": "C.UTF-8",
        "ANSIBLE_COLLECTIONS_PATH": str(folder), "ANSIBLE_NOCOLOR": "True",
    }  # fmt: skip
    return subprocess.run(
        [ansible(program), *map(str, arguments)],
        cwd=where,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The collection, where Ansible looks for it."""
    target = tmp_path / "ansible_collections/scanside/fleet"
    shutil.copytree(COLLECTION, target)
    return target


@pytest.mark.deploy
@pytest.mark.timeout(900)
def test_ansible_lint_finds_nothing_at_its_strictest(installed: Path, tmp_path: Path) -> None:
    done = run("ansible-lint", "-c", ".ansible-lint.yml", "--offline", "--nocolor", folder=tmp_path, where=installed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Profile 'production' was required, and it passed" in done.stdout + done.stderr


@pytest.mark.deploy
@pytest.mark.timeout(900)
def test_what_the_template_makes_of_an_inventory_is_a_configuration(installed: Path, tmp_path: Path) -> None:
    target = tmp_path / "scanside.toml"
    values = {
        "scanside_box_name": 'CT "1"', "scanside_device": "gpu", "scanside_tls_certificate": "a.pem",
        "scanside_tls_client_authorities": "b.pem", "scanside_commitment_peers": [],
        "scanside_settings": {"intake": {"ae_title": "BOX1", "metrics_port": 9200, "plain": True, "host": None,
                                         "accepted_addresses": ["10.77.0.0/24"]},
                              "box": {"log_level": "DEBUG"}},
        "scanside_destinations": [{"kind": "hl7", "name": "er", "host": "h", "port": 2575,
                                   "tls": {"authorities": "ca.pem"}}],
        "scanside_limits": [{"package": "ich_reference", "minimum_age": "18Y"}],
    }  # fmt: skip
    render(installed / "roles/appliance/templates/scanside.toml.j2", target, values, tmp_path)
    settings = load_settings(target)
    assert (settings.box.name, settings.box.device, settings.box.log_level) == ('CT "1"', "gpu", "DEBUG")
    assert (settings.intake.ae_title, settings.intake.metrics_port) == ("BOX1", 9200)
    assert settings.intake.tls is not None and settings.intake.tls.client_authorities == tmp_path / "tls-clients.pem"
    assert settings.triton.managed is False
    (destination,) = settings.destination
    assert destination.tls is not None and destination.tls.authorities == tmp_path / "ca.pem"  # type: ignore[union-attr]
    assert settings.limit[0].keys == {"minimum_age": "18Y"}


SETTINGS = {"intake": {"port": 104, "tls": {"port": 2763}, "metrics_port": 9200}}


@pytest.mark.deploy
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("values", "dicom", "metrics"),
    [
        ({}, "11112, 2762", None),
        ({"scanside_settings": {"intake": {"ae_title": "BOX1"}}}, "11112, 2762", None),
        ({"scanside_settings": SETTINGS, "scanside_other_ports": [2575, 104]}, "104, 2763, 2575", "9200"),
        ({"scanside_settings": SETTINGS, "scanside_dicom_port": 105, "scanside_metrics_port": 0}, "105, 2763", None),
    ],
)
def test_the_firewall_opens_the_ports_of_the_settings_or_those_that_are_named(
    tmp_path: Path, values: dict[str, object], dicom: str, metrics: str | None
) -> None:
    role, target = COLLECTION / "roles/host", tmp_path / "nftables.conf"
    defaults = yaml.safe_load((role / "defaults/main.yml").read_text(encoding="utf-8"))
    render(role / "templates/nftables.conf.j2", target, defaults | values, tmp_path)
    ports = re.findall(r"tcp dport (?:\{ )?([\d, ]*\d)(?: \})? accept", target.read_text())
    assert ports == ["22", dicom, *([metrics] if metrics else [])]


def test_what_is_no_program_of_scanside_gets_none_of_its_hardening() -> None:
    """systemd lays scanside-.service.d over every unit whose name begins so."""
    switch = yaml.safe_load((COLLECTION / "roles/appliance/vars/main.yml").read_text())["scanside_in_a_unit"]
    container = next((COLLECTION / "roles/triton/templates").glob("*.container.j2")).name
    names = [container, *(word.removeprefix("--unit=") for word in switch if word.startswith("--unit="))]
    assert len(names) == 2
    assert not [one for one in names if one.startswith("scanside-")]


def render(template: Path, target: Path, values: dict[str, object], folder: Path) -> None:
    """Let Ansible write a template."""
    task = {"src": str(template), "dest": str(target), "mode": "0644"}
    play = {"hosts": "localhost", "connection": "local", "gather_facts": False, "vars": values,
            "tasks": [{"ansible.builtin.template": task}]}  # fmt: skip
    (folder / "play.yml").write_text(yaml.safe_dump([play]), encoding="utf-8")
    python = f"ansible_python_interpreter={sys.executable}"
    done = run("ansible-playbook", "--extra-vars", python, folder / "play.yml", folder=folder, where=folder)
    assert done.returncode == 0, done.stdout + done.stderr


def tasks(path: Path) -> list[dict[str, object]]:
    """Every task of a file, those in blocks too."""
    found: list[dict[str, object]] = []

    def walk(items: object) -> None:
        for item in items if isinstance(items, list) else []:
            nested = [
                item.get(key) for key in ("block", "rescue", "always", "tasks", "pre_tasks", "post_tasks", "roles")
            ]
            if not any(nested) and "role" not in item and "hosts" not in item:
                found.append(item)
            for inner in nested:
                walk(inner)

    walk(yaml.safe_load(path.read_text(encoding="utf-8")))
    return found


def test_only_what_ansible_itself_brings_is_used() -> None:
    files = [*COLLECTION.glob("roles/*/tasks/*.yml"), *COLLECTION.glob("roles/*/handlers/*.yml"),
             *COLLECTION.glob("playbooks/*.yml")]  # fmt: skip
    seen = 0
    for path in files:
        for task in tasks(path):
            modules = set(task) - WORDS
            assert len(modules) == 1, (path, task)
            assert OURS.match(modules.pop()), (path, task)
            seen += 1
    assert seen > 80


@pytest.mark.parametrize("role", ROLES)
def test_every_variable_of_a_role_is_documented(role: str) -> None:
    folder = COLLECTION / "roles" / role
    defaults = yaml.safe_load((folder / "defaults/main.yml").read_text(encoding="utf-8")) or {}
    specs = yaml.safe_load((folder / "meta/argument_specs.yml").read_text(encoding="utf-8"))["argument_specs"]
    for spec in specs.values():
        assert set(defaults) == set(spec["options"]), role
        assert all(option["description"] for option in spec["options"].values())


def test_users_are_those_of_the_units() -> None:
    (task,) = [one for one in tasks(COLLECTION / "roles/host/tasks/main.yml") if "ansible.builtin.user" in one]
    made = re.findall(r"^u scanside-(\S+)", (UNITS / "sysusers.conf").read_text(), re.MULTILINE)
    assert task["loop"] == made


def test_a_file_that_another_program_reads_is_validated_before_it_replaces_one() -> None:
    wanted = {"/etc/nftables.conf", "/etc/scanside/scanside.toml"}
    for path in COLLECTION.glob("roles/*/tasks/*.yml"):
        for task in tasks(path):
            for module in ("ansible.builtin.template", "ansible.builtin.copy"):
                options = task.get(module)
                if isinstance(options, dict) and options["dest"] in wanted:
                    assert "%s" in options["validate"], options["dest"]
                    wanted.remove(options["dest"])
    assert not wanted
