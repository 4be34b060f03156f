"""Writes the configuration file that a new site starts from, with every key and what it means."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from appliance.settings import (
    DicomDestination,
    DicomwebDestination,
    Hl7Destination,
    MailDestination,
    ObjectKind,
    OrderDestination,
    RestDestination,
    Settings,
    SettingsError,
    UpsDestination,
    WebhookDestination,
    WorklistDestination,
    load_settings,
    section_of,
)

_HEAD = """\
# Configuration of scanside. A key behind "#" has the default that it shows; remove the "#" to change it.
# Environment variables override this file: SCANSIDE_INTAKE__PORT=104. Try it with `scanside check`.
"""


PRESETS: dict[str, dict[str, Any]] = {
    "pacs": {"kind": "dicom", "objects": ["report", "capture"], "commitment": "if_offered"},
    # Shows or at least keeps everything, also compressed, and reports to the modality of our AE title in its
    # DicomModalities.
    "orthanc": {
        "kind": "dicom",
        "objects": list(get_args(ObjectKind)),
        "transfer_syntaxes": ["JPEG2000Lossless", "ExplicitVRLittleEndian"],
        "commitment": "required",
    },
    "dicomweb": {"kind": "dicomweb", "objects": list(get_args(ObjectKind))},
}
"""What a destination of a kind is set up with."""


def write(
    directory: Path,
    sections: Mapping[str, Mapping[str, Any]],
    destinations: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write ``scanside.toml`` into a folder, make the folders it names, and return its path.

    Args:
        sections: section → key → value, for what differs from the defaults.

    Raises:
        SettingsError: there is one already, or the values are wrong.
    """
    path = directory / "scanside.toml"
    if path.exists():
        raise SettingsError("there is a configuration already", str(path), "remove it, or choose another folder")
    wanted = {**sections, "box": {"state_directory": ".", **sections.get("box", {})}}
    parts = [_HEAD]
    for name, field in Settings.model_fields.items():
        kind = field.annotation
        values = wanted.get(name, {})
        optional = _optional_section(kind)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            parts.append(f"[{name}]\n" + _keys(kind, values))
        elif optional is not None:
            kind = optional
            parts.append(_optional(name, optional, field.description or "", wanted.get(name)))
        else:
            continue
        parts += _optionals(name, kind, values)
    kinds: dict[str, type[BaseModel]] = {
        "dicom": DicomDestination,
        "dicomweb": DicomwebDestination,
        "hl7": Hl7Destination,
        "mail": MailDestination,
        "webhook": WebhookDestination,
        "worklist": WorklistDestination,
        "ups": UpsDestination,
        "hl7_order": OrderDestination,
        "rest": RestDestination,
    }
    for one in destinations:
        parts.append("[[destination]]\n" + _keys(kinds[one["kind"]], one))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(parts), encoding="utf-8")
    except OSError as error:
        raise SettingsError(error.strerror or str(error), str(path), "choose a folder that you may write to") from error
    try:
        settings = load_settings(path)
    except SettingsError:
        path.unlink()
        raise
    for folder in (settings.spool_directory, settings.findings_directory, settings.run_directory):
        folder.mkdir(parents=True, exist_ok=True)
    return path


def _optional_section(kind: Any) -> type[BaseModel] | None:
    """The section that a key may hold or lack."""
    return section_of(kind) if type(None) in get_args(kind) else None


def _optionals(name: str, kind: type[BaseModel], values: Mapping[str, Any]) -> list[str]:
    """The sections in a section that may be absent, and those in them."""
    parts = []
    for key, inner in kind.model_fields.items():
        if (section := _optional_section(inner.annotation)) is not None:
            parts.append(_optional(f"{name}.{key}", section, inner.description or "", values.get(key)))
            parts += _optionals(f"{name}.{key}", section, values.get(key) or {})
    return parts


def _optional(name: str, section: type[BaseModel], description: str, values: Mapping[str, Any] | None) -> str:
    """A section that may be absent: behind "#", its heading too, unless there are values for it."""
    if values is not None:
        return f"# {description}\n[{name}]\n" + _keys(section, values)
    lines = [line.replace("# ", "#", 1) if _is_key(line) else line for line in _keys(section, {}).splitlines()]
    return f'# {description} Remove the "#" of the heading, too.\n' + "\n".join([f"#[{name}]", *lines]) + "\n"


def _is_key(line: str) -> bool:
    return " =" in line and line.split(" =")[0].removeprefix("# ").isidentifier()


def _keys(model: type[BaseModel], values: Mapping[str, Any]) -> str:
    lines = []
    for name, field in model.model_fields.items():
        if _optional_section(field.annotation) is not None:
            continue
        if field.description:
            lines.append(f"# {field.description}")
        if name in values:
            lines.append(f"{name} = {_toml(values[name])}")
        else:
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            lines.append(f"# {name} = {_toml(default)}" if default is not None else f"# {name} =")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """A value in TOML; JSON's text is TOML's for strings, numbers, booleans and lists of them."""
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
