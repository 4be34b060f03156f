"""What Triton serves, held against what a package renders: the configuration that it answers with, and its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

from appliance.governance.package import Package
from appliance.inference.server import BACKENDS, Device, render_config
from appliance.inference.triton import VERSION, TritonClient

FILLED = {
    "platform",
    "runtime",
    "optimization",
    "instance_group.name",
    "instance_group.gpus",
    "dynamic_batching.preferred_batch_size",
}
"""Keys that Triton adds to a configuration that does not have them."""


def repository_problem(home: Path, package: Package) -> str:
    """The first file in Triton's home that is not what `prepare` puts there for this package on a CPU; '' if all are.

    Args:
        home: as of `prepare`.
    """
    backend, name, _ = BACKENDS["cpu"]
    model = home / "repository" / package.model.triton_name
    code = files("triton_models").joinpath("backends", "onnxruntime", "model.py").read_bytes()
    expected = {
        model / "config.pbtxt": _sha256(render_config(package, "cpu").encode()),
        model / VERSION / name: package.files[name],
        home / "backends" / backend / "model.py": _sha256(code),
    }
    for path, digest in expected.items():
        try:
            found = _sha256(path.read_bytes())
        except OSError as error:
            return f"{path}: {error.strerror or error}"
        if found != digest:
            return f"{path}: its digest is {found}, the package's is {digest}"
    for path in sorted(model.rglob("*")):
        if path not in expected and path != model / VERSION:
            return f"{path}: the package has no such file"
    return ""


def served_problem(client: TritonClient, package: Package, device: Device) -> str:
    """How the model that Triton serves differs from what the package renders; '' if it does not.

    Raises:
        TritonError: Triton does not answer.
    """
    versions, config = client.served(package)
    where = f"Triton's {package.model.triton_name}"
    if list(versions) != [VERSION]:
        return f"{where}: it serves version {', '.join(versions) or 'none'}, the package has version {VERSION}"
    wanted = text_format.Parse(render_config(package, device), model_config_pb2.ModelConfig())
    difference = _difference(_plain(wanted), _plain(config))
    return f"{where}: {difference}" if difference else ""


def _plain(config: Any) -> Any:
    return json_format.MessageToDict(config, preserving_proto_field_name=True)


def _difference(wanted: Any, served: Any, path: str = "") -> str:
    """The first key whose values differ, and both; list places are not part of a key."""
    if isinstance(wanted, dict) and isinstance(served, dict):
        for key in sorted({*wanted, *served}):
            name = f"{path}.{key}" if path else key
            if key not in wanted and name in FILLED:
                continue
            if found := _difference(wanted.get(key), served.get(key), name):
                return found
        return ""
    if isinstance(wanted, list) and isinstance(served, list) and len(wanted) == len(served):
        differences: Sequence[str] = [_difference(a, b, path) for a, b in zip(wanted, served, strict=True)]
        return next(filter(None, differences), "")
    if wanted == served:
        return ""
    return f"its {path} is {json.dumps(served)}, the package's is {json.dumps(wanted)}"


def _sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
