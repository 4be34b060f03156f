"""Machines with systemd for tests: Debian booted by systemd-nspawn, each in a network namespace of its own.

What it needs: root, systemd-nspawn, mmdebstrap and Debian's packages.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.peers import CACHE, program

ROOT = Path(__file__).resolve().parents[2]
UNITS = ROOT / "systemd"
SUITE = "bookworm"
PACKAGES = "systemd,systemd-sysv,dbus,python3,libpython3.11,libstdc++6,libgomp1,iproute2,openssh-server,nftables"
PYTHON = (3, 11)
"""What is in a machine, and the Python of its suite."""
ASKED_TO_REBOOT = 133
"""How systemd-nspawn ends then."""

_INIT = """#!/bin/sh
# Where the host has cgroup v1, its controllers come in read-only, and no limit would hold.
for controller in memory pids cpu cpuacct blkio devices freezer; do
    mount -o remount,rw,bind /sys/fs/cgroup/$controller 2>/dev/null
done
exec /sbin/init
"""


def debian(suite: str = SUITE, packages: str = PACKAGES) -> Path:
    """A folder with Debian, made once (a minute or four) and never written to; skips where it cannot be made."""
    if os.geteuid() != 0:
        pytest.skip("only root can boot a machine")
    made = CACHE / f"{suite}-{zlib.crc32(packages.encode()):08x}"
    CACHE.mkdir(exist_ok=True)
    with (CACHE / f"{suite}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one test process makes it for all
        if not made.exists():
            part = CACHE / f"{suite}.part"
            shutil.rmtree(part, ignore_errors=True)
            options = ["--variant=minbase", f"--include={packages}", "--mode=root", "--dpkgopt=force-unsafe-io"]
            done = subprocess.run([program("mmdebstrap"), *options, suite, str(part)], capture_output=True, text=True)
            if done.returncode != 0:
                shutil.rmtree(part, ignore_errors=True)
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
    """A machine whose root folder is there, in a network namespace that is there; it runs once it was started."""

    def __init__(self, root: Path, namespace: str, log: Path, options: Sequence[str] = ()) -> None:
        self.root = root
        self.namespace = namespace
        self.log = log
        self._options = list(options)
        self._process: subprocess.Popen[bytes] | None = None
        self._groups = _control_groups(namespace)
        (root / "sbin/test-init").write_text(_INIT)
        (root / "sbin/test-init").chmod(0o755)
        (root / "etc/resolv.conf").write_text("")
        (root / "etc/machine-id").write_text(secrets.token_hex(16) + "\n")

    def start(self) -> None:
        """Boot; returns once systemd answers. Skips where it cannot be booted."""
        groups = self._groups
        for one in groups:
            one.mkdir(exist_ok=True)

        def join() -> None:
            for one in groups:
                (one / "cgroup.procs").write_text(str(os.getpid()))

        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{self.namespace}", "--", program("systemd-nspawn"),
                 f"--directory={self.root}", f"--machine={self.namespace}", "--register=no", "--keep-unit",
                 "--kill-signal=SIGRTMIN+3", "--console=pipe", "--system-call-filter=bpf", "--link-journal=no",
                 "--capability=CAP_BPF,CAP_NET_ADMIN", *self._options, "/sbin/test-init"],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=join,
            )  # fmt: skip
        deadline = time.monotonic() + 60
        # "starting" until the services of scanside are up, which the tests wait for.
        while not self._first or self.run("systemctl", "is-system-running", check=False).strip() not in (
            "starting", "running", "degraded",
        ):  # fmt: skip
            if self._process.poll() is not None or time.monotonic() > deadline:
                pytest.skip(f"systemd does not boot here: {self.log.read_text()[-500:]}")
            time.sleep(0.2)

    @property
    def _first(self) -> int | None:
        """Its process 1, as this machine numbers it."""
        if self._process is None or self._process.poll() is not None:
            return None
        path = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        children = path.read_text().split() if path.exists() else []
        return int(children[0]) if children else None

    def cut_power(self) -> None:
        """End everything in it at once. What was written and not synced survives here, as it would not there."""
        if self._first:
            os.kill(self._first, signal.SIGKILL)
        if self._process is not None:
            self._process.wait(60)

    def reboot(self) -> None:
        """Let it shut down in good order, and boot it again."""
        self.run("systemctl", "reboot", check=False)
        assert self._process is not None
        assert self._process.wait(120) == ASKED_TO_REBOOT, self.log.read_text()[-2000:]
        self.start()

    def remove(self) -> None:
        """End it, however it is, with what the host keeps of it."""
        try:
            self.cut_power()
        finally:
            for one in self._groups:
                if one.exists():
                    _remove(one)

    def beside(self, *command: str | Path) -> list[str]:
        """That command as one of another machine on the same network."""
        return ["nsenter", f"--net=/run/netns/{self.namespace}", "--", *map(str, command)]

    def inside(self, *command: str) -> list[str]:
        """That command as one of root in the machine."""
        first = self._first
        if first is None:
            pytest.fail(f"the machine does not run: {self.log.read_text()[-2000:]}")
        clean = ["env", "-i", "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"]
        return ["nsenter", "-t", str(first), "-m", "-p", "-u", "-i", "-n", "-C", "--", *clean, *command]

    def run(self, *command: str, check: bool = True, seconds: float = 60) -> str:
        """Run a command as root in the machine; what it said."""
        done = subprocess.run(self.inside(*command), capture_output=True, text=True, timeout=seconds)
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


def layered(stack: ExitStack, folder: Path, base: Path | None = None) -> Path:
    """Debian with a layer of its own in that folder, to be written to; unmounted with the stack."""
    upper, work, root = (folder / name for name in ("upper", "work", "root"))
    for one in (upper, work, root):
        one.mkdir(parents=True)
    layers = f"lowerdir={base or debian()},upperdir={upper},workdir={work}"
    change(stack, "mount", "-t", "overlay", "overlay", "-o", layers, root, undo=("umount", root))
    return root


def network(stack: ExitStack, name: str) -> None:
    """A network namespace that reaches nothing but itself; gone with the stack."""
    change(stack, "ip", "netns", "add", name, undo=("ip", "netns", "del", name))
    subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)


def change(stack: ExitStack, *command: str | Path, undo: tuple[str | Path, ...]) -> None:
    """Change this host, and undo it with the stack; skips where it may not be changed."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no machine can be booted here: {command[0]}: {done.stderr.strip()}")
    stack.callback(subprocess.run, undo, capture_output=True)


@contextmanager
def booted(folder: Path, settings: str, triton: Path) -> Iterator[Machine]:
    """Boot a machine on which scanside is installed and enabled, with the test's own environments, read-only."""
    if sys.version_info[:2] != PYTHON:
        pytest.skip(f"the machine has Python {PYTHON[0]}.{PYTHON[1]}, this is another")
    name = f"scanside{secrets.token_hex(3)}"
    with ExitStack() as stack:
        root = layered(stack, folder)
        network(stack, name)
        install(root, settings)
        subprocess.run(["systemd-sysusers", f"--root={root}"], check=True, capture_output=True)
        subprocess.run(["systemctl", f"--root={root}", "enable", "scanside.target"], check=True, capture_output=True)
        options = [
            _environment(folder, "venv", Path(sys.prefix)),
            _environment(folder, "venv-triton", triton),
            *(f"--bind-ro={ROOT / one}:/opt/scanside/src/{one}" for one in ("appliance", "dicom_io", "triton_models")),
        ]
        machine = Machine(root, name, folder / "machine.log", options)
        stack.callback(machine.remove)
        machine.start()
        yield machine


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
