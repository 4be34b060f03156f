"""Boxes without a boot: each a mount namespace of this machine, entered by what Ansible takes for ssh.

Ansible's own ssh connection works in them, with `become`, as on a box: what is written below ROOMS lies in the box's
folder. systemd is a script that keeps in files which unit is active, and writes down what it was told; a release is a
folder with an installer that flips `current`, and a `scanside` that says what the test wants. What the real ones do is
tested elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.fleet import ENVIRONMENT, ansible
from tests.deploy.machine import ROOT, UNITS

ROOMS = ("etc", "opt", "run", "var/lib", "var/cache", "usr/local/sbin", "usr/lib/sysusers.d", "usr/lib/tmpfiles.d")
"""What each box has of its own."""
SERVICES = ("scanside.target", "scanside-intake.service", "scanside-engine.service", "scanside-delivery.service",
            "scanside-triton.service")  # fmt: skip
GOOD = {
    "version": None, "in_flight": {"total": 0}, "waiting": {}, "certificates": [],
    "models": [{"name": "m", "version": "1", "digest": "sha256:1", "runs": True, "mode": "clinical", "said": "runs"}],
    "figures": {"errors_per_hour": 0.0, "errors": {}, "seconds_to_verdict": None, "verdicts": 0},
}  # fmt: skip
TESTED = {"studies": [{"expected": one, "ok": True, "reason": "", "seconds": 1.0} for one in ("positive", "negative")]}
CHECKED = {"checks": [{"check": "destination er", "ok": True, "detail": ""}]}

_SSH = """#!/usr/bin/python3
import os, shlex, sys
rest = sys.argv[1:]
while rest[0].startswith("-"):
    rest = rest[2 if rest[0][1] in "oiplEFS" and len(rest[0]) == 2 else 1:]
host, command = rest[0], " ".join(rest[1:])
room = os.path.join({folder!r}, host)
with open(room + ".ssh", "a") as log:
    log.write(command[:300] + chr(10))
binds = "; ".join(f"mount --bind {{shlex.quote(os.path.join(room, one))}} /{{one}}" for one in {rooms!r})
os.environ["PATH"] = "/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
whole = f"set -e; {{binds}}; exec /bin/sh -c {{shlex.quote(command)}}"
os.execvp("unshare", ["unshare", "--mount", "--propagation", "private", "/bin/sh", "-c", whole])
"""

_SYSTEMCTL = r"""#!/usr/bin/python3
import pathlib, sys
state = pathlib.Path("/var/lib/units"); state.mkdir(exist_ok=True)
words = [one for one in sys.argv[1:] if not one.startswith("-")]
if not words:
    print("systemd 252"); sys.exit(0)
verb, units = words[0], words[1:]
if verb not in ("show", "is-active", "is-enabled", "is-system-running"):
    for name in ("systemctl", "order"):
        with open("/var/lib/" + name, "a") as log:
            log.write(" ".join(words) + "\n")
there = lambda unit: pathlib.Path("/etc/systemd/system", unit.replace("@scanside", "@.")).exists()
on, enabled = (lambda unit: state / unit), (lambda unit: state / (unit + ".enabled"))
if verb == "show" and "--value" in sys.argv:
    print("active" if on(units[1]).exists() else "inactive")
elif verb == "show":
    for unit in units:
        print(f"Id={unit}\nLoadState={'loaded' if there(unit) else 'not-found'}\n"
              f"ActiveState={'active' if on(unit).exists() else 'inactive'}")
elif verb == "is-active":
    states = ["active" if on(unit).exists() else "inactive" for unit in units]
    print("\n".join(states)); sys.exit(3 * ("inactive" in states))
elif verb == "is-enabled":
    print("enabled" if enabled(units[0]).exists() else "disabled"); sys.exit(not enabled(units[0]).exists())
elif verb == "is-system-running":
    print("running")
for unit in units if verb in ("start", "restart", "stop", "enable", "disable") else []:
    file = enabled(unit) if "able" in verb else on(unit)
    file.touch() if verb in ("start", "restart", "enable") else file.unlink(missing_ok=True)
"""

# `scanside` of a release: VERSION/answers/COMMAND.json is what it prints, COMMAND.rc how it ends.
_SCANSIDE = r"""#!/usr/bin/python3
import pathlib, sys
answers = pathlib.Path(__file__).resolve().parents[2] / "answers"
for name in ("asked", "order"):
    with open("/var/lib/" + name, "a") as log:
        log.write(" ".join([answers.parent.name, *sys.argv[1:]]) + "\n")
settings, *words = " ".join(sys.argv[1:]).replace("--config=", "").replace("--config ", "").split(" ")
if "--settings-only" in words:
    allowed = (answers / "keys").read_text().split()
    keys = [one for one in pathlib.Path(settings).read_text().split() if one.startswith("new_")]
    wrong = [one for one in keys if one not in allowed]
    sys.exit(f"no such key: {wrong}" if wrong else 0)
said = answers / f"{words[0]}.json"
if said.exists():
    print(said.read_text())
if words[0] == "triton":
    print("scanside: run NVIDIA's own Triton on it, which holds the plans for this GPU", file=sys.stderr)
rc = answers / f"{words[0]}.rc"
sys.exit(int(rc.read_text()) if rc.exists() else 0)
"""

_INSTALLER = r"""#!/usr/bin/python3
import json, pathlib, subprocess, sys
home = pathlib.Path("/opt/scanside")
link, notes = home / "current", home / "install.json"
current = link.readlink().name if link.is_symlink() else None
previous = json.loads(notes.read_text()) if notes.exists() else None
services = %r
command, version = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 and sys.argv[2][0] != "-" else None
for name in ("installer", "order"):
    with open("/var/lib/" + name, "a") as log:
        log.write(" ".join(sys.argv[1:]) + "\n")
def start():
    subprocess.run(["systemctl", "start", *services])
def flip(version):
    link.unlink(missing_ok=True)
    link.symlink_to("releases/" + version)
if command == "status":
    there = [{"version": one.name} for one in (home / "releases").iterdir()]
    print(json.dumps({"current": current, "previous": previous, "floor": None, "installed": there, "unfinished": None}))
    sys.exit(0)
changed = current != version
if changed:
    subprocess.run(["systemctl", "stop", *services[1:]])
    flip(version)
    (home / "venv").is_symlink() or (home / "venv").symlink_to("current/venv")
    notes.write_text(json.dumps(current if command == "activate" else None))
start()
print(json.dumps({"changed": changed}, indent=2))
"""


class Rooms:
    """The boxes and their controller."""

    def __init__(self, folder: Path, *names: str) -> None:
        if os.geteuid() != 0 or shutil.which("unshare") is None:
            pytest.skip("only root can make a mount namespace")
        ansible("ansible-playbook")
        self.folder = folder
        self.boxes = {name: folder / "boxes" / name for name in names}
        for box in self.boxes.values():
            for one in ROOMS:
                (box / one).mkdir(parents=True)
            shutil.copytree("/etc", box / "etc", symlinks=True, dirs_exist_ok=True,
                            ignore=shutil.ignore_patterns("scanside*", "ssl", "alternatives.bak"))  # fmt: skip
            for one in ("system", "system/scanside-.service.d"):
                (box / "etc/systemd" / one).mkdir(parents=True, exist_ok=True)
            for unit in UNITS.glob("scanside*.*"):
                if unit.is_file():
                    shutil.copy(unit, box / "etc/systemd/system")
            (box / "var/lib/scanside").mkdir()
            (box / "var/cache/scanside").mkdir(mode=0o700)
            (box / "etc/scanside/release-keys").mkdir(parents=True)
            for name, text in (
                ("systemctl", _SYSTEMCTL),
                ("runuser", '#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done; shift; exec "$@"\n'),
                ("systemd-run", '#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do shift; done; exec "$@"\n'),
            ):
                self.program(box.name, name, text)
            for group in ("", "-intake", "-engine", "-delivery", "-triton", "-worklist", "-check"):
                self.inside(box.name, "groupadd", "-f", f"scanside{group}")
        collections = folder / "ansible_collections/scanside"
        collections.mkdir(parents=True)
        shutil.copytree(ROOT / "ansible", collections / "fleet")
        self._program(folder / "ssh", _SSH.format(folder=str(folder / "boxes"), rooms=ROOMS))
        (folder / "release.pub").write_text("a key\n")
        (folder / "bundle.tar").write_text("a bundle\n")
        self.gpu_bundle = False
        (folder / "bundle.tar.minisig").write_text("its signature\n")

    def program(self, box: str, name: str, text: str) -> None:
        """Put a program on a box."""
        self._program(self.boxes[box] / "usr/local/sbin" / name, text)

    def _program(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)

    def inside(self, box: str, *command: str) -> str:
        """Run a command in a box."""
        mounts = "; ".join(f"mount --bind {self.boxes[box] / one} /{one}" for one in ROOMS)
        done = subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "sh", "-ec", f'{mounts}; exec "$@"', "sh", *command],
            capture_output=True, text=True, timeout=60, env={"PATH": "/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def install(self, box: str, version: str, keys: str = "", **answers: Any) -> Path:
        """Put a release on a box, beside what runs; what its `scanside` says of itself."""
        release = self.boxes[box] / "opt/scanside/releases" / version
        said = {"status": GOOD | {"version": version}, "selftest": TESTED, "check": CHECKED} | answers
        self._program(release / "venv/bin/scanside", _SCANSIDE)
        (release / "venv/bin/python").symlink_to("/usr/bin/python3")
        self._program(release / "install/scanside_install.py", _INSTALLER % (SERVICES,))
        (release / "answers").mkdir()
        (release / "answers/keys").write_text(keys)
        for name, answer in said.items():
            self.says(box, version, name, answer)
        return release

    def says(self, box: str, version: str, name: str, answer: Any, rc: int = 0) -> None:
        """What a command of a release prints from now on, and how it ends."""
        answers = self.boxes[box] / "opt/scanside/releases" / version / "answers"
        (answers / f"{name}.json").write_text(json.dumps(answer))
        (answers / f"{name}.rc").write_text(str(rc))

    def run(self, box: str, version: str) -> None:
        """Let an installed release run."""
        home = self.boxes[box] / "opt/scanside"
        (home / "current").symlink_to(f"releases/{version}")
        (home / "venv").symlink_to("current/venv")
        self.inside(box, "systemctl", "start", "scanside-intake.socket", *SERVICES)
        for file in ("systemctl", "installer"):
            (self.boxes[box] / "var/lib" / file).unlink(missing_ok=True)

    def current(self, box: str) -> str | None:
        """The release that runs on a box."""
        link = self.boxes[box] / "opt/scanside/current"
        return link.readlink().name if link.is_symlink() else None

    def noted(self, box: str, what: str) -> list[str]:
        """What ``systemctl``, ``installer`` or scanside (``asked``) was told on a box; ``order`` is all of it."""
        path = self.boxes[box] / "var/lib" / what
        return path.read_text().splitlines() if path.exists() else []

    def play(self, playbook: str | Path, *options: str, ok: bool = True, bundle: str = "1.1.0", **values: Any) -> str:
        """Run a playbook of the collection, or one of the test's own; what it said."""
        controller = self.folder / "controller"
        about = json.dumps({"version": bundle, "minimum": "0.1", "gpu": self.gpu_bundle})
        self._program(controller, f"#!/bin/sh\necho '{about}'\n")
        values = {
            "ansible_user": "root", "ansible_python_interpreter": "/usr/bin/python3", "scanside_soak_seconds": 1,
            "ansible_ssh_executable": str(self.folder / "ssh"), "ansible_ssh_transfer_method": "piped",
            "ansible_ssh_args": "-o ControlMaster=no",
            "scanside_bundle": str(self.folder / "bundle.tar"), "scanside_drain_seconds": 3,
            "scanside_release_keys": [str(self.folder / "release.pub")],
            "scanside_controller_command": [str(controller)],
            "scanside_firewall": False, "scanside_require_encryption": False, "scanside_require_time_sync": False,
            "scanside_minimum_free_gb": 0, "scanside_minimum_memory_gb": 0,
            "scanside_destinations": [],
        } | values  # fmt: skip
        inventory = self.folder / "inventory.json"
        first = next(iter(self.boxes))
        groups = {"scanside": {"hosts": dict.fromkeys(self.boxes), "vars": values},
                  "scanside_canary": {"hosts": {first: None}}}  # fmt: skip
        inventory.write_text(json.dumps({"all": {"children": groups}}), encoding="utf-8")
        name = playbook if isinstance(playbook, Path) else f"scanside.fleet.{playbook}"
        done = subprocess.run(
            [ansible("ansible-playbook"), "--inventory", inventory, str(name), *options],
            env={"PATH": f"{ENVIRONMENT / 'bin'}:{os.environ['PATH']}", "HOME": str(self.folder), "LANG": "C.UTF-8",
                 "ANSIBLE_COLLECTIONS_PATH": str(self.folder), "ANSIBLE_NOCOLOR": "True", "ANSIBLE_PIPELINING": "True",
                 "ANSIBLE_LOCAL_TEMP": str(self.folder / "tmp"), "ANSIBLE_REMOTE_TEMP": "/var/cache/ansible"},
            cwd=self.folder, capture_output=True, text=True, timeout=400,
        )  # fmt: skip
        said = done.stdout + done.stderr
        assert (done.returncode == 0) is ok, f"{playbook} ended with {done.returncode}\n{said[-6000:]}"
        return said
