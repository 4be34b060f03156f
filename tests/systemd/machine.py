"""A machine with systemd for tests: Debian booted by systemd-nspawn, in a network namespace of its own.

What it needs: root, systemd-nspawn, mmdebstrap and Debian's packages. The test's own environments lie in it at
/opt/scanside, read-only, so Debian's Python must be of their version.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.peers import CACHE, program

ROOT = Path(__file__).resolve().parents[2]
UNITS = ROOT / "systemd"
SUITE = "bookworm"
PACKAGES = "systemd,systemd-sysv,dbus,python3,libpython3.11,libstdc++6,libgomp1,iproute2"
PYTHON = (3, 11)
"""What is in the machine, and the Python of its suite."""

_INIT = """#!/bin/sh
# Where the host has cgroup v1, its controllers come in read-only, and no limit would hold.
for controller in memory pids cpu blkio; do mount -o remount,rw /sys/fs/cgroup/$controller 2>/dev/null; done
exec /sbin/init
"""


def archive() -> Path:
    """Debian as a tar file, made once (a minute or four); skips where it cannot be made."""
    made = CACHE / f"{SUITE}.tar"
    if not made.exists():
        part = CACHE / f"{SUITE}.{os.getpid()}.tar"
        CACHE.mkdir(exist_ok=True)
        command = [program("mmdebstrap"), "--variant=minbase", f"--include={PACKAGES}", "--mode=root", SUITE, str(part)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            part.unlink(missing_ok=True)
            pytest.skip(f"mmdebstrap failed: {done.stderr.strip().splitlines()[-1:]}")
        part.rename(made)
    return made


def install(root: Path, settings: str) -> None:
    """Put the units and what they need where docs/operations.md says, below a root folder."""
    units = root / "etc/systemd/system"
    units.mkdir(parents=True, exist_ok=True)
    for one in UNITS.glob("scanside*"):
        if one.is_dir():
            shutil.copytree(one, units / one.name)
        else:
            shutil.copy(one, units)
    for name in ("sysusers", "tmpfiles"):
        folder = root / f"usr/lib/{name}.d"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(UNITS / f"{name}.conf", folder / "scanside.conf")
    (root / "etc/scanside").mkdir(parents=True, exist_ok=True)
    (root / "etc/scanside/scanside.toml").write_text(settings, encoding="utf-8")


def _environment(folder: Path, name: str, source: Path) -> str:
    """What is laid over an environment of the host so that Debian's Python runs it; the option for nspawn."""
    top = folder / f"over-{name}"
    (top / "bin").mkdir(parents=True)
    for link in ("python", "python3", f"python{PYTHON[0]}.{PYTHON[1]}"):
        (top / "bin" / link).symlink_to(f"/usr/bin/python{PYTHON[0]}.{PYTHON[1]}")
    (top / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    if name == "venv":
        command = top / "bin" / "scanside"
        command.write_text(
            "#!/opt/scanside/venv/bin/python\nimport sys\nfrom appliance.cli import main\nsys.exit(main())\n"
        )
        command.chmod(0o755)
        site = f"lib/python{PYTHON[0]}.{PYTHON[1]}/site-packages"
        (editable,) = (source / site).glob("_editable*scanside*.pth")
        (top / site).mkdir(parents=True)
        (top / site / editable.name).write_text("/opt/scanside/src\n")
    return f"--overlay-ro={source}:{top}:/opt/scanside/{name}"


class Machine:
    """A booted machine."""

    def __init__(self, root: Path, namespace: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.root = root
        self._namespace = namespace
        self._process = process
        self._log = log

    def beside(self, *command: str | Path) -> list[str]:
        """That command as one of another machine on the same network."""
        return ["nsenter", f"--net=/run/netns/{self._namespace}", "--", *map(str, command)]

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command as root in the machine; what it said."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        if not children:
            pytest.fail(f"the machine does not run: {self._log.read_text()[-2000:]}")
        inside = ["nsenter", "-t", children[0], "-m", "-p", "-u", "-i", "-n", "-C", "--", *command]
        environment = {"PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
        done = subprocess.run(inside, capture_output=True, text=True, env=environment, timeout=60)
        if check and done.returncode != 0:
            pytest.fail(f"{command}: {done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def show(self, unit: str, key: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--value", "-p", key, unit).strip()

    def journal(self, *options: str) -> str:
        """What the journal says."""
        return self.run("journalctl", "--no-pager", "-o", "short-precise", *options)

    def wait(self, look: Callable[[], bool], seconds: float, what: str) -> None:
        """Poll until it is so."""
        deadline = time.monotonic() + seconds
        while not look():
            if time.monotonic() > deadline:
                states = self.run("systemctl", "list-units", "--all", "--no-pager", "scanside*", check=False)
                pytest.fail(
                    f"{what}: not within {seconds:g} s\n{states}\n{self.journal('-n', '80', '-u', 'scanside*')}"
                )
            time.sleep(0.2)


@contextmanager
def booted(folder: Path, settings: str, triton: Path) -> Iterator[Machine]:
    """Boot a machine on which scanside is installed and enabled; its disk is a layer in that folder."""
    if os.geteuid() != 0:
        pytest.skip("only root can boot a machine")
    if sys.version_info[:2] != PYTHON:
        pytest.skip(f"the machine has Python {PYTHON[0]}.{PYTHON[1]}, this is another")
    nspawn = program("systemd-nspawn")
    base, upper, work, root = (folder / name for name in ("base", "upper", "work", "root"))
    for one in (base, upper, work, root):
        one.mkdir()
    subprocess.run(["tar", "-xf", archive(), "-C", base], check=True)
    name = f"scanside{secrets.token_hex(3)}"
    with ExitStack() as stack:

        def also(*command: str | Path, undo: tuple[str | Path, ...]) -> None:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                pytest.skip(f"no machine can be booted here: {command[0]}: {done.stderr.strip()}")
            stack.callback(subprocess.run, undo, capture_output=True)

        layers = f"lowerdir={base},upperdir={upper},workdir={work}"
        also("mount", "-t", "overlay", "overlay", "-o", layers, root, undo=("umount", root))
        also("ip", "netns", "add", name, undo=("ip", "netns", "del", name))
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        install(root, settings)
        (root / "sbin/test-init").write_text(_INIT)
        (root / "sbin/test-init").chmod(0o755)
        (root / "etc/resolv.conf").write_text("")
        (root / "etc/machine-id").write_text(secrets.token_hex(16) + "\n")
        subprocess.run(["systemd-sysusers", f"--root={root}"], check=True, capture_output=True)
        subprocess.run(["systemctl", f"--root={root}", "enable", "scanside.target"], check=True, capture_output=True)
        options = [
            _environment(folder, "venv", Path(sys.prefix)),
            _environment(folder, "venv-triton", triton),
            *(f"--bind-ro={ROOT / one}:/opt/scanside/src/{one}" for one in ("appliance", "dicom_io", "triton_models")),
        ]
        groups = _control_groups(name)
        for one in groups:
            one.mkdir()
            stack.callback(_remove, one)

        def join() -> None:
            for one in groups:
                (one / "cgroup.procs").write_text(str(os.getpid()))

        log = folder / "machine.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{name}", "--", nspawn, f"--directory={root}", f"--machine={name}",
                 "--register=no", "--keep-unit", "--kill-signal=SIGRTMIN+3", "--console=pipe", *options,
                 "/sbin/test-init"],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=join,
            )  # fmt: skip
        try:
            machine = Machine(root, name, process, log)
            deadline = time.monotonic() + 30
            # "starting" until the services of scanside are up, which the tests wait for.
            while _state(machine, process).strip() not in ("starting", "running", "degraded"):
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.skip(f"systemd does not boot here: {log.read_text()[-500:]}")
                time.sleep(0.2)
            yield machine
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _control_groups(name: str) -> list[Path]:
    """The groups to put a machine into: one, or of cgroup v1 one for each controller that takes processes at once."""
    top = Path("/sys/fs/cgroup")
    if (top / "cgroup.controllers").exists():
        return [top / name]
    tops = [one for one in top.iterdir() if (one / "cgroup.procs").exists() and not one.is_symlink()]
    return [one / name for one in tops if one.name != "cpuset"]


def _remove(group: Path) -> None:
    """Remove an empty control group and those below it."""
    for one in sorted(group.rglob("*"), reverse=True):
        if one.is_dir():
            one.rmdir()
    group.rmdir()


def _state(machine: Machine, process: subprocess.Popen[bytes]) -> str:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if process.poll() is not None or not children.exists() or not children.read_text().split():
        return ""
    return machine.run("systemctl", "is-system-running", check=False)
