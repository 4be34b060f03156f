"""Making a bundle out of a source tree. The same tree, wheels and options make the same bundle, bit for bit."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bundle import (
    FORMAT,
    GPU_EXTRAS,
    GPU_REQUIREMENTS,
    GPU_WHEELS,
    MANIFEST,
    sha256_of,
    trusted_comment,
    write_tar,
)
from .errors import ReleaseError
from .minisign import SUFFIX, SecretKey, sign
from .sbom import SBOM, wheel_component, write_sbom

MOMENT = 1_580_601_600
"""The time of every file, unless SOURCE_DATE_EPOCH says another: hatchling's own, 2020-02-02."""
_ON_THE_BOX = ("errors", "minisign", "bundle", "box", "installer")
_ENVIRONMENTS = (("wheels", "appliance.txt"), ("wheels-triton", "triton.txt"), ("wheels-install", "install.txt"))
_BOOTSTRAP = ("cryptography", "cffi", "pycparser")
_NOT_SOURCE = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")

Step = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Made:
    """What was made."""

    bundle: Path
    signature: Path
    version: str
    files: int
    size: int


def create(
    source: Path,
    out: Path,
    key: SecretKey,
    *,
    schema: str,
    version: str = "",
    channel: str = "stable",
    minimum: str = "",
    wheels: Sequence[Path] = (),
    models: Sequence[Path] = (),
    images: Sequence[Path] = (),
    gpu: bool = False,
    gpu_wheels: Sequence[Path] = (),
    on_step: Step = lambda _: None,
) -> Made:
    """Make ``scanside-VERSION.tar`` and its signature.

    Args:
        source: the source tree.
        out: folder to write to; made if absent.
        schema: the ledger's schema of that source.
        version: other than the source's own.
        minimum: the oldest version that may be updated with it; '': this version itself has no need of an older one.
        wheels: folders that have all wheels; empty: pip fetches them.
        models: further model packages; those of the source are always in it.
        images: archives of container images.
        gpu: whether it is for boxes with a GPU, whose environment has the extra `gpu` too.
        gpu_wheels: what such a box has besides, as the TensorRT of its Triton. No list of the source can state their
            hashes, so the bundle's own does.

    Raises:
        ReleaseError: something is missing, or a wheel has none of the hashes of the requirements.
    """
    if gpu_wheels and not gpu:
        raise ReleaseError("a bundle has it only if it is for boxes with a GPU", str(gpu_wheels[0]), "add --gpu")
    own = _version_of(source)
    version, minimum = version or own, minimum or "0.0"
    comment = trusted_comment(version, channel, minimum)
    seconds = int(os.environ.get("SOURCE_DATE_EPOCH", MOMENT))
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"scanside-{version}.tar"
    with tempfile.TemporaryDirectory(prefix="scanside-bundle-", dir=out) as name:
        work = Path(name)
        files: dict[str, Path | bytes] = {}
        components: list[dict[str, Any]] = []
        on_step("building the wheel of scanside")
        built = _wheel(source, work, own, version, seconds)
        files[f"wheels/{built.name}"] = built
        digest, _ = sha256_of(built)
        components.append(wheel_component(built, digest, "wheels"))
        files["requirements/scanside.txt"] = f"scanside=={version} --hash=sha256:{digest}\n".encode()
        for folder, requirements in _ENVIRONMENTS:
            on_step(f"fetching {folder}")
            for wheel in _fetched(source / "requirements" / requirements, work / folder, wheels):
                files[f"{folder}/{wheel.name}"] = wheel
                components.append(wheel_component(wheel, sha256_of(wheel)[0], folder))
            files[f"requirements/{requirements}"] = source / "requirements" / requirements
        if gpu:
            on_step(f"fetching {GPU_WHEELS}")
            lists = {GPU_REQUIREMENTS: source / "requirements" / GPU_REQUIREMENTS}
            fetched = _fetched(lists[GPU_REQUIREMENTS], work / GPU_WHEELS, wheels)
            if gpu_wheels:
                lists[GPU_EXTRAS] = work / GPU_EXTRAS
                lists[GPU_EXTRAS].write_text("".join(_stated(one) for one in gpu_wheels), encoding="utf-8")
                fetched += _fetched(lists[GPU_EXTRAS], work / "own", sorted({one.parent for one in gpu_wheels}))
            for wheel in fetched:
                if f"wheels/{wheel.name}" not in files:
                    files[f"{GPU_WHEELS}/{wheel.name}"] = wheel
                    components.append(wheel_component(wheel, sha256_of(wheel)[0], GPU_WHEELS))
            files |= {f"requirements/{name}": path for name, path in lists.items()}
        files |= _rest(source, models, images)
        on_step("writing the bundle")
        running = {name: sha256_of(one)[0] for name, one in files.items() if name.startswith(("models/", "images/"))}
        files[SBOM] = write_sbom(version, components, running, seconds)
        stated = {name: dict(zip(("sha256", "size"), sha256_of(one), strict=True)) for name, one in files.items()}
        manifest = {
            "format": FORMAT,
            "version": version,
            "channel": channel,
            "minimum": minimum,
            "schema": schema,
            "python": f"{sys.version_info.major}.{sys.version_info.minor}",
            "platform": f"linux_{platform.machine()}",
            "gpu": gpu,
            "files": {name: stated[name] for name in sorted(stated)},
        }
        files[MANIFEST] = (json.dumps(manifest, indent=1) + "\n").encode()
        part = work / target.name
        write_tar(part, files, seconds)
        on_step("signing")
        signature = target.with_name(target.name + SUFFIX)
        (work / signature.name).write_text(sign(part, key, comment), encoding="utf-8")
        # The old signature does not fit the new file: a moment with neither, rather than with the wrong one.
        signature.unlink(missing_ok=True)
        part.replace(target)
        (work / signature.name).replace(signature)
    return Made(target, signature, version, len(stated), target.stat().st_size)


def _version_of(source: Path) -> str:
    try:
        found = re.search(
            r'^version = "([^"]+)"$', (source / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
        )
    except OSError as error:
        raise ReleaseError("there is no source tree", str(source), "name scanside's, with --source") from error
    if found is None:
        raise ReleaseError("it states no version", str(source / "pyproject.toml"), "name scanside's source tree")
    return found[1]


def _wheel(source: Path, work: Path, own: str, version: str, seconds: int) -> Path:
    """Build scanside's own wheel from a clean copy, as any version."""
    tree = work / "source"
    tree.mkdir()
    for name in ("appliance", "dicom_io", "triton_models"):
        shutil.copytree(source / name, tree / name, ignore=_NOT_SOURCE)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(source / name, tree / name)
    for name, before in (("pyproject.toml", f'version = "{own}"'), ("appliance/__init__.py", f'__version__ = "{own}"')):
        text = (tree / name).read_text(encoding="utf-8")
        if text.count(before) != 1:
            raise ReleaseError(f"it does not say {before} once", str(source / name), "mend the source tree")
        (tree / name).write_text(text.replace(before, before.replace(own, version)), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(work / "built")],
        cwd=tree,
        env={**os.environ, "SOURCE_DATE_EPOCH": str(seconds)},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise ReleaseError(f"the wheel cannot be built: {done.stderr.strip()[-500:]}", str(source), "install hatchling")
    (wheel,) = (work / "built").glob("*.whl")
    return wheel


def _fetched(requirements: Path, folder: Path, wheels: Sequence[Path]) -> list[Path]:
    """The wheels of a list of requirements, each with a hash of that list."""
    if not requirements.exists():
        raise ReleaseError("it is missing", str(requirements), "name scanside's source tree")
    folder.mkdir()
    local = [word for one in wheels for word in ("--find-links", str(one))]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download", "--require-hashes",
         "--no-deps", "--only-binary", ":all:", "--dest", str(folder), *(["--no-index", *local] if local else []),
         "--requirement", str(requirements)],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        where = f"{requirements} ({', '.join(map(str, wheels)) or 'from the registry'})"
        raise ReleaseError(said, where, "add the wheel, or renew the requirements with `make lock`")
    return sorted(folder.glob("*.whl"))


def _stated(wheel: Path) -> str:
    """The line of requirements that only this wheel meets."""
    digest, _ = sha256_of(wheel)
    said = wheel_component(wheel, digest, GPU_WHEELS)
    return f"{said['name']}=={said['version']} --hash=sha256:{digest}\n"


def _rest(source: Path, models: Sequence[Path], images: Sequence[Path]) -> dict[str, Path]:
    """Everything that is no wheel: name in the bundle → file."""
    files: dict[str, Path] = {}
    packages = [one.parent for one in sorted((source / "triton_models").glob("*/package.toml"))]
    for package in (*packages, *models):
        if not (package / "package.toml").exists():
            raise ReleaseError("there is no package.toml", str(package), "name the folder of a model package")
        files |= {f"models/{package.name}/{name}": path for name, path in _below(package)}
    files |= {f"models/keys/{name}": path for name, path in _below(source / "triton_models/keys")}
    files |= {f"systemd/{name}": path for name, path in _below(source / "systemd")}
    files |= {f"docs/{path.name}": path for path in sorted((source / "docs").glob("*.md"))}
    files |= {f"images/{image.name}": image for image in images}
    inside = source / "appliance/release"
    files["install/scanside_install.py"] = inside / "scanside_install.py"
    files["install/scanside_release/__init__.py"] = inside / "__init__.py"
    files |= {f"install/scanside_release/{name}.py": inside / f"{name}.py" for name in _ON_THE_BOX}
    for name, path in files.items():
        if not path.is_file():
            raise ReleaseError("it is missing", f"{path} ({name})", "name scanside's source tree, or the right file")
    return files


def _below(folder: Path) -> list[tuple[str, Path]]:
    found = [one for one in sorted(folder.rglob("*")) if one.is_file() and "__pycache__" not in one.parts]
    return [(str(one.relative_to(folder)), one) for one in found]


def is_bootstrap(name: str) -> bool:
    """Whether a file of the bundle is a wheel that the installer needs on a box without the library `cryptography`."""
    folder, _, wheel = name.partition("/")
    return folder == "wheels" and wheel.split("-")[0].lower() in _BOOTSTRAP
