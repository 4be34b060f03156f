"""NVIDIA's Triton as a container: the role itself, on a booted machine with Podman and its Quadlet.

What cannot be had is pretended, and says so: the GPU (a device file of another name) and the image (a program that
tells what it is given). No model is served here.
"""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.fleet import ansible
from tests.deploy.machine import ROOT, UNITS, Machine, debian, layered, network

pytestmark = [pytest.mark.deploy, pytest.mark.xdist_group("container"), pytest.mark.timeout(900)]

# The first Debian whose Podman knows Quadlets.
SUITE, PACKAGES = "trixie", "systemd,systemd-sysv,dbus,python3,podman,crun,netavark,busybox-static"
UNIT = "triton-for-scanside.service"
IMAGE = "localhost/scanside-triton"
STORAGE = '[storage]\ndriver = "vfs"\nrunroot = "/run/containers/storage"\ngraphroot = "/var/lib/containers/storage"\n'
"""An overlay upon the machine's own overlay is refused."""
# Where the host has cgroup v1, Podman cannot split the unit's; everything else is as on a box.
DROP_IN = "[Container]\nPodmanArgs=--cgroups=disabled\n"
GPU = {
    "cdiVersion": "0.5.0",
    "kind": "nvidia.com/gpu",
    "devices": [
        {"name": "all", "containerEdits": {"deviceNodes": [{"path": "/dev/nvidia0", "hostPath": "/dev/null"}]}}
    ],
}
SERVER = """#!/bin/sh
echo "told: $*"
echo "user: $(id -u):$(id -g)"
grep -E 'CapBnd|NoNewPrivs' /proc/self/status
for place in / /models /dev/shm /tmp; do touch $place/written 2>/dev/null && echo "writes: $place"; done
echo "models: $(ls /models)"
[ -c /dev/nvidia0 ] && echo "has a GPU"
trap 'exit 0' TERM
while :; do sleep 0.2; done
"""
SSH = """#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do case "$1" in -[oiplEFS]) shift ;; esac; shift; done
shift
exec nsenter -t {first} -m -p -u -i -n -C -- env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 /bin/sh -c "$*"
"""


def image(busybox: Path) -> bytes:
    """The files of the stand-in for NVIDIA's image, as a tar."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as tar:
        for name, mode in (("models", 0o755), ("tmp", 0o1777), ("run", 0o755), ("var", 0o755), ("var/tmp", 0o1777)):
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, mode
            tar.addfile(folder)
        for name, content in (("bin/busybox", busybox.read_bytes()), ("bin/tritonserver", SERVER.encode())):
            file = tarfile.TarInfo(name)
            file.size, file.mode = len(content), 0o755
            tar.addfile(file, io.BytesIO(content))
        for name in ("sh", "id", "grep", "ls", "touch", "sleep", "echo"):
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    return written.getvalue()


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    ansible("ansible-playbook")
    folder = tmp_path_factory.mktemp("container")
    name = f"podman{secrets.token_hex(3)}"
    with ExitStack() as stack:
        root = layered(stack, folder, debian(SUITE, PACKAGES))
        network(stack, name)
        for path, text in (
            ("etc/containers/storage.conf", STORAGE),
            (f"etc/containers/systemd/{UNIT.removesuffix('.service')}.container.d/10-here.conf", DROP_IN),
            ("etc/cdi/nvidia.yaml", json.dumps(GPU)),
            ("usr/lib/sysusers.d/scanside.conf", (UNITS / "sysusers.conf").read_text()),
        ):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
        for unit in ("scanside.target", "scanside.slice", "scanside-alarm@.service", "scanside-again@.service"):
            (root / "etc/systemd/system" / unit).write_bytes((UNITS / unit).read_bytes())
        (root / "root/image.tar").write_bytes(image(root / "usr/bin/busybox"))
        privileged = ["--capability=all", "--system-call-filter=@keyring @mount @privileged", "--bind=/dev/fuse"]
        one = Machine(root, name, folder / "machine.log", privileged)
        stack.callback(one.remove)
        one.start()
        one.run("systemd-sysusers")
        one.run("mkdir", "-p", "/etc/scanside", "/var/lib/scanside/triton/repository/m")
        one.run("podman", "import", "/root/image.tar", f"{IMAGE}:latest")
        one.run("podman", "save", "--format", "oci-archive", "--output", "/root/triton.tar", f"{IMAGE}:latest")
        one.run("podman", "image", "rm", "--all", "--force")
        yield one


@pytest.fixture
def digest(machine: Machine) -> str:
    """The digest of the archive, which is not that of the image before it was saved."""
    with tarfile.open(machine.root / "root/triton.tar") as tar:
        index = tar.extractfile("index.json")
        assert index is not None
        (manifest,) = json.load(index)["manifests"]
    return str(manifest["digest"])


def play(machine: Machine, folder: Path, digest: str, *, ok: bool = True) -> str:
    """Run the role on the machine as on a box with a GPU; what Ansible said."""
    collections = folder / "ansible_collections/scanside"
    if not collections.exists():
        collections.mkdir(parents=True)
        (collections / "fleet").symlink_to(ROOT / "ansible")
    (first,) = re.findall(r"-t (\d+)", " ".join(machine.inside("true")))
    ssh = folder / "ssh"
    ssh.write_text(SSH.format(first=first))
    ssh.chmod(0o755)
    values: dict[str, Any] = {
        "ansible_user": "root", "ansible_python_interpreter": "/usr/bin/python3", "ansible_ssh_executable": str(ssh),
        "ansible_ssh_transfer_method": "piped", "ansible_ssh_args": "-o ControlMaster=no", "scanside_device": "gpu",
        "scanside_triton_digest": digest, "scanside_triton_archive": "/root/triton.tar",
    }  # fmt: skip
    inventory = {"all": {"hosts": {"box": values}}}
    tasks = [{"ansible.builtin.include_role": {"name": "scanside.fleet.triton"}}]
    for name, content in (
        ("inventory.json", inventory),
        ("play.yml", [{"hosts": "box", "gather_facts": False, "tasks": tasks}]),
    ):
        (folder / name).write_text(json.dumps(content))
    program = ansible("ansible-playbook")
    environment = {
        "PATH": f"{program.parent}:{os.environ['PATH']}", "HOME": str(folder), "LANG": "C.UTF-8",
        "ANSIBLE_COLLECTIONS_PATH": str(folder), "ANSIBLE_NOCOLOR": "True", "ANSIBLE_PIPELINING": "True",
    }  # fmt: skip
    done = subprocess.run(
        [program, "--inventory", folder / "inventory.json", folder / "play.yml"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert (done.returncode == 0) is ok, said[-4000:]
    return said


def test_an_archive_of_another_image_is_refused(machine: Machine, tmp_path: Path) -> None:
    said = play(machine, tmp_path, f"sha256:{'a' * 64}", ok=False)
    assert "/root/triton.tar holds no image localhost/scanside-triton@sha256:aaaa" in said
    assert not (machine.root / "etc/scanside/no-triton").exists()


def test_the_container_runs_as_a_unit_with_nothing_but_gpu_and_models(
    machine: Machine, tmp_path: Path, digest: str
) -> None:
    play(machine, tmp_path, digest)
    machine.wait(lambda: "has a GPU" in machine.journal("-o", "cat", "-u", UNIT), 60, "a container that runs")
    said = machine.journal("-o", "cat", "-u", UNIT)
    user = machine.run("id", "-u", "scanside-triton").strip()
    group = machine.run("stat", "-c", "%g", "/var/lib/scanside/triton").strip()
    assert f"user: {user}:{group}" in said
    assert re.search(r"CapBnd:\s*0+$", said, re.MULTILINE) and re.search(r"NoNewPrivs:\s*1$", said, re.MULTILINE)
    assert re.findall(r"^writes: (.*)$", said, re.MULTILINE) == ["/dev/shm", "/tmp"]
    assert "models: m" in said
    assert "--model-repository=/models" in said and "--grpc-address=127.0.0.1" in said
    assert machine.show(UNIT, "ControlGroup") == f"/scanside.slice/{UNIT}"
    assert (machine.root / "etc/scanside/no-triton").exists()
    machine.run("systemctl", "restart", UNIT)
    machine.run("systemctl", "stop", "scanside.target")
    machine.wait(lambda: machine.show(UNIT, "ActiveState") == "inactive", 30, "the target's end")
    assert machine.show(UNIT, "Result") == "success"


def test_a_second_run_changes_nothing(machine: Machine, tmp_path: Path, digest: str) -> None:
    assert "changed=0" in play(machine, tmp_path, digest)
