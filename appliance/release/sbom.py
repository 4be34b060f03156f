"""The bundle's bill of materials, as CycloneDX 1.6 JSON (ECMA-424)."""

from __future__ import annotations

import email.parser
import json
import re
import uuid
import zipfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .errors import ReleaseError

SBOM = "sbom.cdx.json"
_SPACE = uuid.UUID("5d0f4c0c-7d1c-5b0e-8a77-0c7f6a2f5f10")


def wheel_component(wheel: Path, digest: str, environment: str) -> dict[str, Any]:
    """What is known of one wheel, by its own metadata.

    Args:
        digest: its SHA-256.
        environment: the folder of the bundle that it lies in.

    Raises:
        ReleaseError: it is no wheel.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [one for one in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", one)]
            said = email.parser.BytesHeaderParser().parsebytes(archive.read(name))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ReleaseError(f"this is no wheel: {error}", str(wheel), "fetch it again") from error
    project, version = str(said["Name"]), str(said["Version"])
    purl = f"pkg:pypi/{re.sub(r'[-_.]+', '-', project).lower()}@{version}"
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": f"{environment}/{wheel.name}",
        "name": project,
        "version": version,
        "purl": purl,
        "hashes": [{"alg": "SHA-256", "content": digest}],
    }
    # An expression has to be one (PEP 639); what older metadata says of its licence is any text.
    if said["License-Expression"]:
        component["licenses"] = [{"expression": str(said["License-Expression"])}]
    elif said["License"] and "\n" not in str(said["License"]).strip() and len(str(said["License"])) < 100:
        component["licenses"] = [{"license": {"name": str(said["License"]).strip()}}]
    else:
        named = [
            str(one).split(" :: ")[-1] for one in said.get_all("Classifier", []) if str(one).startswith("License ::")
        ]
        if named:
            component["licenses"] = [{"license": {"name": one}} for one in named]
    return component


def write_sbom(version: str, components: list[dict[str, Any]], files: Mapping[str, str], seconds: int) -> bytes:
    """The whole document.

    Args:
        components: of the wheels.
        files: name → SHA-256 of everything else that runs: models and images.
        seconds: the time of the build, since 1970.
    """
    others = [
        {
            "type": "machine-learning-model" if name.startswith("models/") else "container",
            "bom-ref": name,
            "name": name,
            "hashes": [{"alg": "SHA-256", "content": digest}],
        }
        for name, digest in sorted(files.items())
    ]
    listed = sorted(components, key=lambda one: str(one["bom-ref"])) + others
    # Of the content: the same bundle has the same number.
    number = uuid.uuid5(_SPACE, json.dumps([version, listed], sort_keys=True))
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{number}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "component": {"type": "application", "bom-ref": "scanside", "name": "scanside", "version": version},
        },
        "components": listed,
        "dependencies": [{"ref": "scanside", "dependsOn": [one["bom-ref"] for one in listed]}],
    }
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
