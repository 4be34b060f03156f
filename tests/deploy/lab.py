"""A hospital of real machines: boxes booted by systemd-nspawn, a PACS, an HL7 listener and a controller on one bridge.

The bridge lies in a network namespace that leads nowhere; each machine has a cable to it that can be pulled. The PACS
(Orthanc) and the listener are processes in namespaces of their own; the controller works in the bridge's.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from appliance.demo.orthanc import configuration, find_orthanc
from dicom_io.scu import Peer
from tests.deploy.machine import ROOT, Machine, change, layered, network
from tests.interop.box import study
from tests.peers import program

NETWORK = "10.77.0"
PACS, HL7 = f"{NETWORK}.2", f"{NETWORK}.3"
PACS_PORT, PACS_HTTP, HL7_PORT, DICOM_PORT, METRICS_PORT = 104, 8042, 2575, 11112, 9200
FIRST_BOX = 11
DISK = 3_000_000_000
"""Bytes of the disk that a box keeps its state on."""
SCANSIDE = "/opt/scanside/venv/bin/scanside"
AS_CHECK = (
    "runuser",
    "-u",
    "scanside-check",
    "-g",
    "scanside",
    "-G",
    "scanside-intake",
    "-G",
    "scanside-delivery",
    "--",
)


class Lab:
    """The boxes and what is around them; `lab` makes one."""

    def __init__(self, folder: Path, name: str, boxes: Mapping[str, Machine]) -> None:
        self.folder = folder
        self.name = name
        self.boxes = dict(boxes)
        self.address = {box: f"{NETWORK}.{FIRST_BOX + n}" for n, box in enumerate(boxes)}
        self.received = folder / "hl7"
        self.key = folder / "id"

    # --- the network ------------------------------------------------------------------------------------

    def at_controller(self, *command: str | Path) -> list[str]:
        """That command as one of the controller's."""
        return ["nsenter", f"--net=/run/netns/{self.name}", "--", *map(str, command)]

    def pull(self, node: str) -> None:
        """Pull the cable of a box, of ``pacs`` or of ``hl7``."""
        self._cable(node, "down")

    def plug(self, node: str) -> None:
        """Plug it in again."""
        self._cable(node, "up")

    def _cable(self, node: str, state: str) -> None:
        subprocess.run(["ip", "-n", self.name, "link", "set", f"v-{node}", state], check=True)

    # --- the hospital -----------------------------------------------------------------------------------

    def study(self, bleed: str | None, name: str) -> tuple[str, list[Path]]:
        """A study with identifiers of its own: its UID and its files."""
        return study(self.folder / "studies", bleed, name)

    def scan(self, box: str, files: Sequence[Path]) -> subprocess.Popen[str]:
        """Begin to send a study from the scanner, which stops in the middle and sends again what was not taken."""
        command = self.at_controller(
            sys.executable, "-m", "tests.deploy.scanner", files[0].parent, self.address[box], str(DICOM_PORT)
        )
        return subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def scanned(self, scanner: subprocess.Popen[str]) -> None:
        """Let the scanner go on, to its end."""
        try:
            # It may have lost its association meanwhile and come past the middle once more.
            said, _ = scanner.communicate("\n" * 50, timeout=240)
        finally:
            scanner.kill()
        assert scanner.returncode == 0, said

    def send(self, box: str, files: Sequence[Path]) -> None:
        """Send a study."""
        self.scanned(self.scan(box, files))

    @contextmanager
    def scanning(self, box: str, files: Sequence[Path]) -> Iterator[None]:
        """Send the first half of a study; the second follows on return."""
        with self.scan(box, files) as scanner:
            try:
                assert scanner.stdout is not None
                assert (said := scanner.stdout.readline()) == "half\n", said
                yield
                self.scanned(scanner)
            finally:
                scanner.kill()

    def alerts(self, uid: str) -> list[str]:
        """The distinct messages that the listener received on a study."""
        return [text for one in self.received.glob("*.hl7") if uid in (text := one.read_text(encoding="utf-8"))]

    def alerted(self, uid: str, seconds: float = 120) -> None:
        """Wait for the one alert on a study."""
        self.wait(lambda: bool(self.alerts(uid)), seconds, f"the alert on {uid}")
        (alert,) = self.alerts(uid)
        assert "haemorrhage suspected" in alert

    def archived(self, uid: str) -> list[str]:
        """The SOP classes of what the PACS has of a study."""
        code = (
            "import json, sys, urllib.request as r\n"
            f"at = 'http://127.0.0.1:{PACS_HTTP}'\n"
            "ask = lambda path, data=None: json.load(r.urlopen(r.Request(at + path, data)))\n"
            "query = {'Level': 'Instance', 'Query': {'StudyInstanceUID': sys.argv[1]}}\n"
            "for one in ask('/tools/find', json.dumps(query).encode()):\n"
            "    print(ask('/instances/' + one + '/simplified-tags')['SOPClassUID'])\n"
        )
        command = ["nsenter", f"--net=/run/netns/{self.name}-pacs", "--", sys.executable, "-c", code, uid]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    @contextmanager
    def full(self, box: str) -> Iterator[None]:
        """Fill the disk of a box to its last byte, for so long."""
        disk = self.boxes[box].root / "var/lib/scanside"
        filler = disk / "filler"
        size = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size - 2_000_000)
            with suppress(OSError):
                while True:
                    os.write(file.fileno(), bytes(4096))
        try:
            yield
        finally:
            filler.unlink()

    # --- the boxes --------------------------------------------------------------------------------------

    def scanside(self, box: str, *arguments: str, check: bool = True) -> str:
        """Run a command of scanside on a box, as docs/operations.md says."""
        return self.boxes[box].run(*AS_CHECK, SCANSIDE, *arguments, check=check, seconds=120)

    def status(self, box: str) -> dict[str, Any]:
        """What a box says of itself."""
        told: dict[str, Any] = json.loads(self.scanside(box, "status", "--json"))
        return told

    def figures(self, box: str) -> str:
        """What a box tells Prometheus; nothing while it does not."""
        code = (
            f"import urllib.request as r; print(r.urlopen('http://127.0.0.1:{METRICS_PORT}/metrics').read().decode())"
        )
        return self.boxes[box].run("python3", "-c", code, check=False)

    def version(self, box: str) -> str:
        """The release that is active on a box."""
        return (self.boxes[box].root / "opt/scanside/current").readlink().name

    def wait(self, look: Callable[[], bool], seconds: float, what: str) -> None:
        """Poll until it is so."""
        deadline = time.monotonic() + seconds
        while not look():
            if time.monotonic() > deadline:
                pytest.fail(f"{what}: not within {seconds:g} s\n{self.journals()}")
            time.sleep(0.3)

    def journals(self) -> str:
        """The last lines of each box."""
        return "\n".join(
            f"--- {name}\n{box.journal('-n', '40', '-u', 'scanside*')}" for name, box in self.boxes.items()
        )


@contextmanager
def lab(folder: Path, names: Sequence[str]) -> Iterator[Lab]:
    """Boot those boxes, with nothing of scanside on them, and the hospital around them."""
    orthanc = find_orthanc()
    if orthanc is None:
        pytest.skip("Orthanc is not installed")
    for one in ("ssh-keygen", "ssh"):
        program(one)
    name = f"lab{secrets.token_hex(2)}"
    with ExitStack() as stack:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "id"], check=True)
        network(stack, name)
        for command in (
            ("link", "add", "br0", "type", "bridge"),
            ("addr", "add", f"{NETWORK}.1/24", "dev", "br0"),
            ("link", "set", "br0", "up"),
        ):
            subprocess.run(["ip", "-n", name, *command], check=True)
        for node, address in (("pacs", PACS), ("hl7", HL7)):
            _cabled(stack, name, node, address)
        boxes: dict[str, Machine] = {}
        for n, box in enumerate(names):
            root = layered(stack, folder / box)
            _disk(stack, folder / f"{box}.disk", root / "var/lib/scanside")
            _cabled(stack, name, box, f"{NETWORK}.{FIRST_BOX + n}")
            (root / "root/.ssh").mkdir(mode=0o700, exist_ok=True)
            shutil.copy(folder / "id.pub", root / "root/.ssh/authorized_keys")
            (root / "etc/hostname").write_text(f"{box}\n")
            boxes[box] = Machine(root, f"{name}-{box}", folder / f"{box}.log")
            stack.callback(boxes[box].remove)
        made = Lab(folder, name, boxes)
        _start_pacs(stack, made, orthanc)
        _start_listener(stack, made)
        for machine in boxes.values():
            machine.start()
        yield made


def _disk(stack: ExitStack, image: Path, target: Path) -> None:
    """A disk of a box: a file system of its own, that can be filled."""
    with image.open("wb") as file:
        file.truncate(DISK)
    subprocess.run([program("mkfs.ext4"), "-q", "-m", "0", image], check=True)
    target.mkdir(parents=True)
    change(stack, "mount", "-o", "loop", image, target, undo=("umount", target))


def _cabled(stack: ExitStack, name: str, node: str, address: str) -> None:
    """A network namespace for a machine, with a cable to the bridge."""
    space = f"{name}-{node}"
    network(stack, space)
    change(
        stack, "ip", "-n", name, "link", "add", f"v-{node}", "type", "veth", "peer", "name", "host0", "netns", space,
        undo=("ip", "-n", name, "link", "del", f"v-{node}"),
    )  # fmt: skip
    for where, command in (
        (name, ("link", "set", f"v-{node}", "master", "br0", "up")),
        (space, ("addr", "add", f"{address}/24", "dev", "host0")),
        (space, ("link", "set", "host0", "up")),
    ):
        subprocess.run(["ip", "-n", where, *command], check=True)


def _start_pacs(stack: ExitStack, lab: Lab, orthanc: Path) -> None:
    folder = lab.folder / "pacs"
    folder.mkdir()
    peers = {box: Peer(box.upper(), address, DICOM_PORT) for box, address in lab.address.items()}
    settings = configuration(folder, "PACS", PACS_HTTP, PACS_PORT, peers)
    (folder / "orthanc.json").write_text(json.dumps(settings), encoding="utf-8")
    _start(stack, lab, "pacs", [str(orthanc), str(folder / "orthanc.json")])


def _start_listener(stack: ExitStack, lab: Lab) -> None:
    lab.received.mkdir()
    module = [sys.executable, "-m", "appliance.demo.listener", "--host", HL7, "--port", str(HL7_PORT)]
    _start(stack, lab, "hl7", [*module, "--out", str(lab.received)])


def _start(stack: ExitStack, lab: Lab, node: str, command: Sequence[str]) -> None:
    """A process of the hospital, ended with the stack."""
    with (lab.folder / f"{node}.log").open("wb") as output:
        process = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{lab.name}-{node}", "--", *command],
            cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip

    def end() -> None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    stack.callback(end)
