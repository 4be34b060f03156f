"""The playbooks against boxes of a mount namespace each: what is refused, noted, restored and left behind."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import stat
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from appliance.release.minisign import new_key
from appliance.settings import load_settings
from tests.deploy.machine import ROOT
from tests.deploy.rooms import CHECKED, GOOD, Rooms
from tests.release_support import a_wheel, small_bundle, small_source

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(900)]

OLD, NEW = "1.0.0", "1.1.0"


def staged(rooms: Rooms, box: str = "a", **answers: Any) -> None:
    """A box that runs the old release, with the new one beside it."""
    rooms.install(box, OLD)
    rooms.install(box, NEW, **answers)
    rooms.run(box, OLD)
    (rooms.boxes[box] / "etc/scanside/scanside.toml").write_text("a = 1\n")


def notes(rooms: Rooms, box: str = "a") -> set[str]:
    """What the box has noted for rollouts."""
    return {one.name for one in (rooms.boxes[box] / "var/cache/scanside").glob("*.json")}


# --- installing ---------------------------------------------------------------------------------------------


def test_an_installer_that_lies_beside_the_bundle_is_not_used(tmp_path: Path) -> None:
    """Only what was verified goes to a box, and to each that lacks it, whatever the first box has."""
    made = tmp_path / "made"
    made.mkdir()
    source, wheels = small_source(made)
    library = a_wheel(wheels, "cryptography", "1.0", {"cryptography.py": ""})
    with (source / "requirements/appliance.txt").open("a") as file:
        file.write(f"cryptography==1.0 --hash=sha256:{hashlib.sha256(library.read_bytes()).hexdigest()}\n")
    key = new_key()
    bundle = small_bundle(made, made / "out", key, "0.9.0").bundle
    (made / "release.pub").write_text(key.public.encode())
    planted = Path(f"{bundle}.installer")
    planted.mkdir()
    (planted / "scanside_install.py").write_text("planted\n")
    rooms = Rooms(tmp_path / "rooms", "a", "b")
    rooms.install("a", OLD)
    rooms.run("a", OLD)
    play = tmp_path / "play.yml"
    play.write_text(json.dumps([{
        "hosts": "scanside", "become": True, "gather_facts": False, "tasks": [
            {"ansible.builtin.include_role": {"name": "scanside.fleet.appliance", "tasks_from": one, "public": True}}
            for one in ("bundle", "state", "bootstrap")],
    }]))  # fmt: skip
    real = [sys.executable, "-m", "appliance.cli"]
    rooms.play(play, scanside_bundle=str(bundle), scanside_release_keys=[str(made / "release.pub")],
               scanside_controller_command=real)  # fmt: skip
    there = rooms.boxes["b"] / "var/cache/scanside/installer"
    assert "planted" not in (there / "scanside_install.py").read_text()
    assert list((there / "wheels").iterdir())
    assert not (rooms.boxes["a"] / "var/cache/scanside/installer").exists()


def test_install_refuses_what_is_an_update_and_leaves_the_other_boxes_alone(tmp_path: Path) -> None:
    rooms = Rooms(tmp_path, "a", "b")
    for box in rooms.boxes:
        staged(rooms, box)
    said = rooms.play("install", ok=False)
    assert f"a runs {OLD}" in said and "scanside.fleet.update" in said
    for box in rooms.boxes:
        assert rooms.current(box) == OLD
        assert (rooms.boxes[box] / "etc/scanside/scanside.toml").read_text() == "a = 1\n"
        assert not [one for one in rooms.noted(box, "systemctl") if one.startswith(("restart", "stop"))]


# --- updating, and going back -------------------------------------------------------------------------------


def test_an_update_passes_its_gate_and_keeps_what_the_way_back_needs(tmp_path: Path) -> None:
    rooms = Rooms(tmp_path, "a")
    staged(rooms)
    rooms.play("update")
    assert rooms.current("a") == NEW
    assert notes(rooms) == {f"before-{NEW}.json", f"passed-{NEW}.json"}
    assert (rooms.boxes["a"] / f"etc/scanside/scanside-{OLD}.toml").read_text() == "a = 1\n"


def test_a_release_that_a_destination_no_longer_lets_in_is_taken_back(tmp_path: Path) -> None:
    """Its self-test passes, because that speaks to itself."""
    full = {"check": "outbox", "ok": False, "detail": "x"}
    rooms = Rooms(tmp_path, "a", "b")
    for box in rooms.boxes:
        staged(rooms, box)
        # What failed before is no fault of the release.
        rooms.says(box, OLD, "check", {"checks": [*CHECKED["checks"], full]}, 1)
    wrong = [{"check": "destination er", "ok": False, "detail": "certificate unknown"}, full]
    rooms.says("a", NEW, "check", {"checks": wrong}, 1)
    said = rooms.play("update", ok=False)
    assert "destination er: certificate unknown" in said
    assert {box: rooms.current(box) for box in rooms.boxes} == {"a": OLD, "b": OLD}
    assert f"This wave went back to {OLD}" in said
    assert not rooms.noted("b", "installer")
    assert [one for one in rooms.noted("a", "asked") if " retry --since " in one and one.endswith(" --decided")]
    assert notes(rooms) == set(), "nobody may pass by what was noted of a release that was left"
    rooms.says("a", NEW, "check", {"checks": wrong[1:]}, 1)
    rooms.says("b", NEW, "check", {"checks": wrong[1:]}, 1)
    rooms.play("update")
    assert {box: rooms.current(box) for box in rooms.boxes} == {"a": NEW, "b": NEW}


def test_a_release_that_cannot_read_the_configuration_is_not_activated(tmp_path: Path) -> None:
    rooms = Rooms(tmp_path, "a")
    rooms.install("a", OLD, keys="new_key")
    rooms.install("a", NEW)
    rooms.run("a", OLD)
    (rooms.boxes["a"] / "etc/scanside/scanside.toml").write_text("new_key = 1\n")
    assert "no such key" in rooms.play("update", ok=False)
    assert not [one for one in rooms.noted("a", "installer") if one.startswith("activate")]


def test_a_release_gets_its_own_configuration_back_where_it_cannot_read_the_later_one(tmp_path: Path) -> None:
    rooms = Rooms(tmp_path, "a")
    staged(rooms, keys="new_key")
    rooms.play("update")
    settings = rooms.boxes["a"] / "etc/scanside/scanside.toml"
    settings.write_text("a = 2\n")
    rooms.play("rollback", scanside_to=OLD)
    assert settings.read_text() == "a = 2\n", "it can read that"
    rooms.play("update")
    settings.write_text("new_key = 1\n")
    rooms.play("rollback", scanside_to=OLD)
    assert (rooms.current("a"), settings.read_text()) == (OLD, "a = 2\n")


def test_a_release_that_was_left_is_gated_anew(tmp_path: Path) -> None:
    """By the playbook, which forgets what was noted; and by hand, where what was noted is old."""
    rooms = Rooms(tmp_path, "a")
    staged(rooms)
    rooms.play("update")
    rooms.play("rollback", scanside_to=OLD)
    assert notes(rooms) == set()
    rooms.play("update")
    rooms.inside("a", "/usr/bin/python3", "/opt/scanside/current/install/scanside_install.py", "rollback", OLD)
    said = rooms.play("update")
    assert "skipping" not in said.split("Let it run for a while")[1].split("TASK")[0]
    before = rooms.boxes["a"] / f"var/cache/scanside/before-{NEW}.json"
    noted = json.loads(before.read_text())
    assert noted["version"] == OLD
    # One of a release that is neither the one that runs nor the one that comes says nothing of this box.
    rooms.play("rollback", scanside_to=OLD)
    before.write_text(json.dumps(noted | {"version": "0.5.0"}))
    rooms.play("update")
    assert json.loads(before.read_text())["version"] == OLD


def test_a_box_that_was_stopped_on_the_way_is_started(tmp_path: Path) -> None:
    rooms = Rooms(tmp_path, "a")
    staged(rooms)
    services = ("scanside-engine.service", "scanside-intake.service")
    rooms.inside("a", "systemctl", "stop", *services)
    rooms.play("rollback", scanside_to=OLD)
    assert rooms.inside("a", "systemctl", "is-active", *services).split() == ["active", "active"]


def test_what_cannot_be_taken_up_again_fails(tmp_path: Path) -> None:
    rooms = Rooms(tmp_path, "a")
    staged(rooms)
    rooms.says(
        "a",
        NEW,
        "selftest",
        {"studies": [{"expected": "positive", "ok": False, "reason": "no alert", "seconds": 1}]},
        1,
    )
    rooms.says("a", OLD, "retry", {}, 1)
    said = rooms.play("update", ok=False)
    assert rooms.current("a") == OLD
    assert "Decide anew" in said and "FAILED" in said.split("Decide anew")[1].split("TASK")[0]


def test_what_the_board_said_of_a_release_is_entered_before_it_runs(tmp_path: Path) -> None:
    rooms = Rooms(tmp_path, "a")
    staged(rooms)
    about = 'name = "m"\nversion = "2"\n'
    package = rooms.boxes["a"] / "opt/scanside/releases" / NEW / "models/m/package.toml"
    package.parent.mkdir(parents=True)
    package.write_text(about)
    digest = f"sha256:{hashlib.sha256(about.encode()).hexdigest()}"
    signed = {"who": "Dr A", "why": "minutes 7"}
    approval = signed | {"package": "m", "digest": digest, "mode": "clinical", "until": "2030-01-01"}
    other = approval | {"digest": "sha256:of another"}
    absent = approval | {"package": "absent"}

    def approved(history: list[dict[str, str]]) -> list[str]:
        for version in (OLD, NEW):
            rooms.says("a", version, "models", history)
        (rooms.boxes["a"] / "var/lib/order").unlink(missing_ok=True)
        rooms.play("update", scanside_approvals=[other, absent, approval])
        told = [one for one in rooms.noted("a", "order") if " models approve " in one or one.startswith("activate ")]
        rooms.play("rollback")
        return told

    recalled = signed | {"package": "m", "what": "suspended", "version": "2"}
    assert [one.split()[0] for one in approved([recalled])] == ["activate"], "what was recalled is not taken back"
    assert [one.split()[0] for one in approved([recalled | {"digest": digest, "what": "retired"}])] == ["activate"]
    entered, activated = approved([recalled | {"version": "1"}])
    assert f"models approve /opt/scanside/releases/{NEW}/models/m --mode clinical --until 2030-01-01" in entered
    assert entered.startswith(OLD), "by the release that runs and knows the ledger's schema"
    assert activated.startswith(f"activate {NEW}")


def test_nothing_is_approved_where_the_board_of_the_box_cannot_be_asked(tmp_path: Path) -> None:
    """It may have been suspended, or recalled: an approval would take that back."""
    rooms = Rooms(tmp_path, "a")
    staged(rooms)
    model = {"name": "m", "version": "2", "digest": "sha256:a", "runs": False, "said": ""}
    rooms.says("a", OLD, "status", {"models": [model]})
    approval = {"package": "m", "digest": "sha256:a", "mode": "clinical", "until": "2030-01-01", "who": "A", "why": "B"}
    play = tmp_path / "models.yml"
    roles = [{"ansible.builtin.include_role": {"name": f"scanside.fleet.{name}", **options, "public": True}}
             for name, options in (("appliance", {"tasks_from": "nothing"}), ("models", {}))]  # fmt: skip
    play.write_text(json.dumps([{"hosts": "scanside", "become": True, "gather_facts": False, "tasks": roles}]))

    def approved(answer: Any, rc: int) -> bool:
        rooms.says("a", OLD, "models", answer, rc)
        rooms.play(play, ok=rc == 0, scanside_approvals=[approval])
        return any(" models approve " in one for one in rooms.noted("a", "order"))

    assert not approved({"error": "database is locked"}, 1)
    assert approved([], 0)


# --- the configuration --------------------------------------------------------------------------------------


def configured(rooms: Rooms, *, ok: bool = True, bundle: str = OLD, **values: Any) -> str:
    """Write the configuration of the release that runs, and what goes with it."""
    play = rooms.folder / "configure.yml"
    role = "scanside.fleet.appliance"
    play.write_text(json.dumps([{
        "hosts": "scanside", "become": True, "gather_facts": False,
        "tasks": [{"ansible.builtin.include_role": {"name": role, "public": True}}],
    }]))  # fmt: skip
    return rooms.play(play, ok=ok, bundle=bundle, **values)


def test_every_port_that_is_configured_is_systemds(tmp_path: Path) -> None:
    rooms = Rooms(tmp_path, "a")
    staged(rooms)
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).write_text("pretended")
    tls = {"scanside_tls_certificate": str(tmp_path / "cert.pem"), "scanside_tls_key": str(tmp_path / "key.pem")}
    names = [f"scanside-{one}.socket" for one in ("intake", "intake-tls", "hl7", "hl7-tls")]

    def listens() -> list[str]:
        return rooms.inside("a", "sh", "-c", f"systemctl is-active {' '.join(names)} || :").split()

    units = rooms.boxes["a"] / "etc/systemd/system"
    settings: dict[str, Any] = {"intake": {"tls": {"port": 2763}, "hl7": {"port": 2577}}}
    configured(rooms, scanside_settings=settings, **tls)
    assert listens() == ["active", "active", "active", "inactive"]
    for name, port in zip(names, (11112, 2763, 2577), strict=False):
        assert f"ListenStream=\nListenStream={port}\n" in (units / f"{name}.d/50-port.conf").read_text()
    order = rooms.noted("a", "order")
    opened = order.index("start scanside-intake.socket scanside-intake-tls.socket scanside-hl7.socket")
    assert order[opened - 1] == "stop scanside-intake.service scanside-hl7-tls.socket"
    assert "start scanside-intake.service" in order[opened:]
    (rooms.boxes["a"] / "var/lib/order").unlink()
    configured(rooms, scanside_settings=settings, **tls)
    assert not [one for one in rooms.noted("a", "order") if ".socket" in one or one.startswith("stop ")]
    settings["intake"]["plain"] = False
    configured(rooms, scanside_settings=settings, **tls)
    assert listens() == ["inactive", "active", "active", "inactive"]
    closed = rooms.boxes["a"] / "etc/scanside/no-plain-intake"
    assert closed.exists()
    (rooms.boxes["a"] / "var/lib/order").unlink()
    configured(rooms, scanside_settings=settings, **tls)
    assert not [one for one in rooms.noted("a", "order") if ".socket" in one or one.startswith("stop ")]
    configured(rooms)
    assert listens() == ["active", "inactive", "inactive", "inactive"]
    assert not closed.exists()
    # A certificate that the settings name themselves, brought as a secret.
    own = {"intake": {"tls": {"certificate": "/etc/scanside/c.pem", "key": "/etc/scanside/k.pem"}}}
    configured(rooms, scanside_settings=own)
    assert listens() == ["active", "active", "inactive", "inactive"]


def test_with_a_worklist_its_service_runs_and_reads_its_token(tmp_path: Path) -> None:
    rooms = Rooms(tmp_path, "a")
    staged(rooms)
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    secrets = [{"name": "reading.token", "src": str(token), "service": "worklist"},
               {"name": "er.password", "src": str(token)}]  # fmt: skip
    worklist = {"web_port": 8080, "token_file": "reading.token",
                "subscriber": [{"ae_title": "READER", "host": "h", "port": 104}]}  # fmt: skip
    configured(rooms, scanside_settings={"worklist": worklist}, scanside_secrets=secrets)
    unit = "scanside-worklist.service"
    assert rooms.inside("a", "systemctl", "is-active", unit).strip() == "active"
    assert rooms.inside("a", "systemctl", "is-enabled", unit).strip() == "enabled"
    owners = rooms.inside("a", "stat", "-c", "%n %G %a", "/etc/scanside/reading.token", "/etc/scanside/er.password")
    assert owners.splitlines() == ["/etc/scanside/reading.token scanside-worklist 640",
                                   "/etc/scanside/er.password scanside-delivery 640"]  # fmt: skip
    settings = load_settings(rooms.boxes["a"] / "etc/scanside/scanside.toml")
    assert settings.worklist is not None and [one.ae_title for one in settings.worklist.subscriber] == ["READER"]
    configured(rooms)
    assert rooms.inside("a", "sh", "-c", f"systemctl is-active {unit} || true").strip() == "inactive"


def test_a_configuration_that_changes_waits_for_studies_and_one_that_does_not_restarts_nothing(tmp_path: Path) -> None:
    rooms = Rooms(tmp_path, "a")
    staged(rooms)
    rooms.says("a", OLD, "status", GOOD | {"version": OLD, "in_flight": {"total": 1}})
    said = configured(rooms, ok=False)
    assert "Wait until no study is under way" in said
    assert (rooms.boxes["a"] / "etc/scanside/scanside.toml").read_text() == "a = 1\n"
    rooms.says("a", OLD, "status", GOOD | {"version": OLD})
    configured(rooms)
    assert "restart scanside-engine.service" in rooms.noted("a", "systemctl")
    (rooms.boxes["a"] / "var/lib/systemctl").unlink()
    rooms.says("a", OLD, "status", GOOD | {"version": OLD, "in_flight": {"total": 1}})
    configured(rooms)
    assert not [one for one in rooms.noted("a", "systemctl") if one.startswith(("restart", "stop"))]


# --- backup -------------------------------------------------------------------------------------------------


def backed_up(rooms: Rooms, **options: Any) -> list[Path]:
    """Back the box up; what lies on the controller then."""
    folder = rooms.folder / "backups"
    rooms.play("backup", scanside_backups=str(folder), **options)
    assert not (rooms.boxes["a"] / "var/cache/scanside-backup").exists()
    return sorted(folder.iterdir()) if folder.exists() else []


def test_a_backup_is_for_its_keeper_alone_and_leaves_nothing_on_the_box(tmp_path: Path) -> None:
    rooms = Rooms(tmp_path, "a")
    staged(rooms)
    state = rooms.boxes["a"] / "var/lib/scanside"
    with sqlite3.connect(state / "ledger.sqlite") as ledger:
        ledger.execute("CREATE TABLE event (n)")
    (state / "findings").mkdir()
    (state / "findings/one").write_bytes(os.urandom(1_000_000))
    (kept,) = backed_up(rooms)
    assert (kept.name, stat.S_IMODE(kept.stat().st_mode)) == ("a.tar.gz", 0o600)
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    with tarfile.open(kept) as tar:
        assert {"state/ledger.sqlite", "state/findings/one", "config/scanside.toml"} <= set(tar.getnames())
    before = kept.read_bytes()
    (state / "ledger.sqlite").write_bytes(b"damaged")
    (kept,) = backed_up(rooms, ok=False)
    assert kept.read_bytes() == before


# --- a GPU --------------------------------------------------------------------------------------------------


def test_a_gpu_box_has_plans_before_its_release_runs_and_a_server_that_reads_them_after(tmp_path: Path) -> None:
    """The order only: Podman, TensorRT and the GPU are pretended."""
    rooms = Rooms(tmp_path, "a")
    staged(rooms)
    unit = "triton-for-scanside.service"
    rooms.program("a", "podman", "#!/bin/sh\necho 4.9.3\n")
    rooms.inside("a", "useradd", "-M", "--gid", "scanside-triton", "scanside-triton")
    (rooms.boxes["a"] / "etc/systemd/system" / unit).touch()  # Podman's generator would make it
    rooms.says("a", NEW, "triton", {}, 1)
    gpu = {"scanside_device": "gpu", "scanside_triton_digest": f"sha256:{'a' * 64}"}
    assert "is for boxes without" in configured(rooms, ok=False, **gpu)
    assert not [one for one in rooms.noted("a", "order") if "activate" in one or "models build" in one]
    rooms.gpu_bundle = True
    configured(rooms, **gpu)
    assert (rooms.boxes["a"] / "etc/scanside/no-triton").exists()
    reaches_gpu = rooms.boxes["a"] / "etc/systemd/system/scanside-engine.service.d/50-gpu.conf"
    assert "PrivateDevices=no" in reaches_gpu.read_text()
    rooms.play("update", scanside_selftest=False, **gpu)
    order = rooms.noted("a", "order")
    (built,) = [n for n, one in enumerate(order) if one.startswith(NEW) and one.endswith("models build --json")]
    (activated,) = [n for n, one in enumerate(order) if one.startswith("activate")]
    (served,) = [n for n, one in enumerate(order) if one.startswith(NEW) and one.endswith(" triton")]
    assert built < activated < served < order.index(f"restart {unit}", served)
    configured(rooms, bundle=NEW)
    assert not (rooms.boxes["a"] / "etc/scanside/no-triton").exists()
    assert not reaches_gpu.exists()


@pytest.mark.parametrize("elsewhere", [True, False])
def test_the_installer_waits_for_no_triton_where_another_serves(tmp_path: Path, elsewhere: bool) -> None:
    rooms = Rooms(tmp_path, "a")
    if elsewhere:
        (rooms.boxes["a"] / "etc/scanside/no-triton").touch()
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; " \
        "from appliance.release.box import Box; print(*Box(Path('/')).start(5.0))"  # fmt: skip
    started = rooms.inside("a", sys.executable, "-c", code).split()
    assert "scanside-engine" in started
    assert ("scanside-triton" in started) is not elsewhere


@pytest.mark.parametrize("role", ["appliance", "models"])
def test_a_command_on_a_box_reads_the_keys_that_it_tries_destinations_with(tmp_path: Path, role: str) -> None:
    """With a group alone runuser gives a user none of the others that it is in."""
    rooms = Rooms(tmp_path, "a")
    rooms.inside("a", "useradd", "-N", "-M", "-G", "scanside-intake,scanside-delivery", "scanside-check")
    for group in ("scanside-intake", "scanside-delivery"):
        key = rooms.boxes["a"] / "etc/scanside" / f"{group}.key"
        key.write_text(group)
        key.chmod(0o640)
        rooms.inside("a", "chgrp", group, f"/etc/scanside/{key.name}")
        said = yaml.safe_load((ROOT / f"ansible/roles/{role}/vars/main.yml").read_text())["scanside_box_command"]
        who = said[1 : said.index("--") + 1]
        assert rooms.inside("a", "/usr/sbin/runuser", *who, "cat", f"/etc/scanside/{key.name}") == group
