"""Model packages: a folder with a model's files and ``package.toml``, which says what the model is and may be used on.

A package is only ever handed on after its signature was checked and the digests of its files were compared with the
ones that the signed ``package.toml`` states.
"""

from __future__ import annotations

import hashlib
import json
import os
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import field, replace
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Annotated, Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from appliance.governance.label import Indication, narrowed
from appliance.governance.signature import SIGNATURE, Keyring, SignatureError, check, read_keyring, sign
from appliance.settings import Settings, SettingsError
from dicom_io.errors import ScansideError

MANIFEST = "package.toml"
UNLISTED = frozenset({MANIFEST, SIGNATURE, "README.md", "metrics.json"})
"""What may lie at the top of a package without a digest; nothing that runs reads the last two."""
PARITY = "parity.npz"
"""Slabs and the published model's answers to them, listed like any other file of a package."""
ANY = "any"
"""The label whose probability is the study's."""

_CONFIG = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
"""Also a Python module's, a Triton model's and a folder's name."""
Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]


class PackageError(ScansideError):
    """A model package that is incomplete, inconsistent or not what it says it is."""


@dataclass(frozen=True, slots=True, config=_CONFIG)
class Window:
    """A linear window in HU: ``center`` and ``width`` as in PS3.3 C.11.2.1.2."""

    center: float
    width: Positive


@dataclass(frozen=True, slots=True, config=_CONFIG)
class Preprocessing:
    """How a slab becomes the model's input: ``size`` pixels of ``spacing_mm``, one channel for each window.

    With one neighbour, the model sees the channels of the slab below, of the slab and of the slab above, foot to head.
    """

    slab_mm: Positive
    size: Count
    spacing_mm: Positive
    windows: Annotated[tuple[Window, ...], Field(min_length=1)]
    neighbours: Literal[0, 1] = 0


@dataclass(frozen=True, slots=True, config=_CONFIG)
class Tensor:
    """One input or output of the model, without the batch."""

    name: Text
    datatype: Literal["FP32"]
    shape: Annotated[tuple[Count, ...], Field(min_length=1)]


@dataclass(frozen=True, slots=True, config=_CONFIG)
class Model:
    """The model as Triton serves it."""

    triton_name: Name
    maximum_batch: Count
    input: Tensor
    outputs: tuple[Tensor, ...]

    @model_validator(mode="after")
    def _outputs_known(self) -> Model:
        names = sorted(tensor.name for tensor in self.outputs)
        if names != ["lesion_map", "probabilities"]:
            raise ValueError(f"the outputs must be probabilities and lesion_map, not {', '.join(names) or 'none'}")
        shape = self.output("lesion_map").shape
        if len(shape) != 3 or shape[0] != 1 or shape[1] != shape[2]:
            raise ValueError(f"lesion_map must be square with one channel, [1, n, n], not {list(shape)}")
        return self

    def output(self, name: str) -> Tensor:
        """The output of that name. Raises KeyError where there is none."""
        return {tensor.name: tensor for tensor in self.outputs}[name]


@dataclass(frozen=True, slots=True, config=_CONFIG)
class OperatingPoint:
    """Where a study is positive, and where a pixel of the lesion map is drawn.

    Attributes:
        threshold: on the study's probability.
        lesion_threshold: on the lesion map.
        sensitivity, specificity: what was measured at the threshold; None where the package does not say.
        studies: on how many.
    """

    threshold: Probability
    lesion_threshold: Probability
    sensitivity: Probability | None = None
    specificity: Probability | None = None
    studies: Count | None = None

    @model_validator(mode="after")
    def _measured(self) -> OperatingPoint:
        if len({figure is None for figure in (self.sensitivity, self.specificity, self.studies)}) > 1:
            raise ValueError("sensitivity, specificity and studies go together")
        return self


@dataclass(frozen=True, slots=True, config=_CONFIG)
class Parity:
    """How far the answers of a model that serves the package may be from those in `PARITY`, which are in 0..1."""

    tolerance: Annotated[float, Field(gt=0, le=0.2)]


@dataclass(frozen=True, slots=True, config=_CONFIG)
class Package:
    """One model package, as its ``package.toml`` states it.

    Attributes:
        notice: the regulatory notice, shown wherever a verdict of this package is.
        mode: "evaluation" marks every alert as no basis for care.
        data: what data it was trained and tested on, and what of that is missing; "" where it does not say.
        udi: its unique device identifier, as its label has it; "" where it has none.
        labels: what the entries of ``probabilities`` stand for; holds "any".
        files: path within the package → "sha256:…" of its content.
        folder: where the package lies; not part of package.toml.
        signed_by: id of the trusted key that signed it, empty if it is unsigned; not part of package.toml.
        digest: "sha256:…" of package.toml, and so of all that it states; not part of it.
    """

    name: Name
    version: Annotated[str, StringConstraints(pattern=r"^\d+\.\d+\.\d+([-+.][0-9A-Za-z.]+)?$")]
    title: Text
    manufacturer: Text
    clearance: Text
    notice: Text
    mode: Literal["evaluation", "clinical"]
    intended_use: Literal["triage", "detection"]
    labels: Annotated[tuple[Name, ...], Field(min_length=1)]
    indication: Indication
    preprocessing: Preprocessing
    model: Model
    operating_point: OperatingPoint
    files: Annotated[dict[str, Digest], Field(min_length=1)]
    data: str = ""
    udi: Annotated[str, StringConstraints(pattern=r"^[!-~]{0,100}$")] = ""
    parity: Parity | None = None
    folder: Annotated[Path, Field(strict=False)] = field(default=Path(), compare=False)
    signed_by: str = field(default="", compare=False)
    digest: str = field(default="", compare=False)

    @model_validator(mode="after")
    def _agrees(self) -> Package:
        seen = self.preprocessing
        expected = ((2 * seen.neighbours + 1) * len(seen.windows), seen.size, seen.size)
        if self.model.input.shape != expected:
            raise ValueError(f"model.input is {list(self.model.input.shape)}, preprocessing makes {list(expected)}")
        if self.model.output("probabilities").shape != (len(self.labels),):
            raise ValueError(f"probabilities has another length than the {len(self.labels)} labels")
        if ANY not in self.labels or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels must hold {ANY!r} and differ from one another")
        if "model.onnx" not in self.files:
            raise ValueError("files must list model.onnx")
        if (self.parity is None) != (PARITY not in self.files):
            raise ValueError(f"[parity] and {PARITY} among the files go together")
        for path in self.files:
            if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                raise ValueError(f"files.{path!r} lies outside the package")
            if str(PurePosixPath(path)) != path or path in (MANIFEST, SIGNATURE):
                raise ValueError(f"files.{path!r} cannot be listed under that name")
        return self


_SCHEMA = TypeAdapter(Package)


def load(folder: Path, *, trusted: Keyring = MappingProxyType({}), allow_unsigned: bool = False) -> Package:
    """Read a package after checking its signature, and check every file it lists against its digest.

    Args:
        folder: holds package.toml, its signature and the files.
        trusted: whose signatures count; by default nobody's.
        allow_unsigned: take a package without package.sig too. A signature that is there must be right all the same.

    Raises:
        SignatureError: naming the signature file that is absent, wrong, or by a key that is not trusted.
        PackageError: naming the file and the key that is wrong, the file whose content is not the stated one, or the
            file that package.toml does not list.
    """
    content = _manifest(folder)
    # Before a byte of it is interpreted; and these bytes, not the file again, are what is read then.
    return _read(content, folder, _signer(content, folder / SIGNATURE, trusted, allow_unsigned))


def seal(folder: Path, key: Ed25519PrivateKey) -> Package:
    """Sign a package, in place of the signature it may have. It must be what its package.toml says.

    Raises:
        PackageError: as `load`; nothing is signed then.
    """
    content = _manifest(folder)
    signature = sign(content, key)
    package = _read(content, folder, signature.key)
    (folder / SIGNATURE).write_bytes(signature.encode())
    return package


def _manifest(folder: Path) -> bytes:
    path = folder / MANIFEST
    try:
        return path.read_bytes()
    except OSError as error:
        raise PackageError(
            error.strerror or str(error), str(path), "put a model package there, or correct its name in the settings"
        ) from error


def _read(content: bytes, folder: Path, signed_by: str) -> Package:
    """The package that these bytes state, after comparing the folder with them."""
    path = folder / MANIFEST
    try:
        data = tomllib.loads(content.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PackageError(f"this is not TOML: {error}", str(path), "restore the file as it was published") from error
    for key in ("folder", "signed_by", "digest"):
        if key in data:
            raise PackageError(f"{key}: there is no such key", str(path), "remove it")
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    found = {**data, "folder": str(folder), "signed_by": signed_by, "digest": digest}
    try:
        # By way of JSON, because strict mode takes JSON's arrays for tuples, but nothing else for something else.
        package = _SCHEMA.validate_json(json.dumps(found, default=str))
    except ValidationError as error:
        lines = "; ".join(_sentence(entry) for entry in error.errors())
        raise PackageError(lines, str(path), "restore the file as it was published") from error
    for name in _contents(folder):
        if name not in package.files and name not in UNLISTED:
            raise PackageError(
                f"{MANIFEST} does not list it", str(folder / name), "remove it, or have it listed and signed"
            )
    for name in package.files:
        verify(package, name)
    return package


def _signer(content: bytes, path: Path, trusted: Keyring, allow_unsigned: bool) -> str:
    """The id of the key that signed the package, or an empty text for an unsigned one that is allowed."""
    try:
        return check(content, path, trusted)
    except FileNotFoundError as error:
        if allow_unsigned:
            return ""
        raise SignatureError(
            "the package is not signed",
            str(path),
            "get the signed package, or sign it with `scanside models sign` and trust that key",
        ) from error


def _contents(folder: Path) -> Iterator[str]:
    """Every file below a folder, as package.toml would list it; a link to a folder counts as a file.

    Raises:
        PackageError: a folder in it cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise PackageError(
            error.strerror or str(error), str(error.filename), "make it readable for this user"
        ) from error

    for here, folders, files in os.walk(folder, onerror=refuse):
        linked = [name for name in folders if Path(here, name).is_symlink()]
        for name in sorted([*files, *linked]):
            yield Path(here, name).relative_to(folder).as_posix()


def verify(package: Package, name: str) -> bytes:
    """The content of one of the package's files, after comparing it with its digest.

    Raises:
        PackageError: the file cannot be read or is not the one that the package states.
    """
    path = package.folder / name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PackageError(
            error.strerror or str(error), str(path), "restore the package as it was published"
        ) from error
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    if digest != package.files[name]:
        raise PackageError(
            f"its digest is {digest}, {MANIFEST} states {package.files[name]}",
            str(path),
            "restore the package as it was published; do not use it",
        )
    return content


def load_all(
    repository: Path, names: Sequence[str], *, trusted: Keyring = MappingProxyType({}), allow_unsigned: bool = False
) -> tuple[Package, ...]:
    """The named packages of a folder of packages, in that order; `load` says what the other arguments mean.

    Raises:
        SignatureError: one is not signed as it must be.
        PackageError: one cannot be loaded, calls itself something else, or two serve one Triton model.
    """
    packages: list[Package] = []
    for name in names:
        package = load(repository / name, trusted=trusted, allow_unsigned=allow_unsigned)
        where = str(repository / name / MANIFEST)
        if package.name != name:
            raise PackageError(f"name: it is {package.name!r} in a folder {name!r}", where, "make them the same")
        if any(package.model.triton_name == other.model.triton_name for other in packages):
            raise PackageError(
                f"model.triton_name: {package.model.triton_name!r} is another package's",
                where,
                "name each package once",
            )
        packages.append(package)
    return tuple(packages)


def load_configured(settings: Settings, names: Sequence[str] | None = None) -> tuple[Package, ...]:
    """The packages that the settings name, or those of these names, under the keys that the settings trust.

    Raises:
        SettingsError: a key that is to be trusted cannot be read, or a site's limit is none of a label, or none at all.
        SignatureError: a package is not signed as it must be.
        PackageError: a package cannot be loaded.
    """
    packages = load_all(
        settings.model_repository,
        settings.models.packages if names is None else names,
        trusted=trusted_keys(settings),
        allow_unsigned=settings.models.allow_unsigned,
    )
    for limit in settings.limit:
        if names is None and limit.package not in settings.models.packages:
            said = f"limit.package: {limit.package!r} does not run here"
            raise SettingsError(said, "", "name one of models.packages")
        packages = tuple(
            replace(one, indication=narrowed(one.indication, limit.keys)) if one.name == limit.package else one
            for one in packages
        )
    return packages


def trusted_keys(settings: Settings) -> Keyring:
    """The keys that the settings trust.

    Raises:
        SettingsError: naming the file that is no public Ed25519 key.
    """
    try:
        return read_keyring(settings.trusted_keys)
    except SignatureError as error:
        raise SettingsError(f"models.trusted_keys: {error.what}", error.where, error.remedy) from error


def as_json(package: Package) -> dict[str, Any]:
    """The package as its package.toml states it, with ``folder`` and ``signed_by``, JSON-ready."""
    stated: dict[str, Any] = _SCHEMA.dump_python(package, mode="json")
    return stated


def _sentence(error: Any) -> str:
    """One validation error as "key: what is wrong with it"."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{key}: there is no such key"
    if error["type"] in ("missing", "missing_argument"):
        return f"{key}: it is missing"
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{key}: {message}" if key else message
