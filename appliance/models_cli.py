"""`scanside models`: the model packages of this box, and the keys and signatures they run under."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from appliance.console import Json, emit, guard, out, read_settings
from appliance.settings import Settings, SettingsError
from dicom_io.errors import ScansideError

if TYPE_CHECKING:
    from appliance.governance.package import OperatingPoint, Package
    from appliance.inference.parity import Parity

app = typer.Typer(
    help="The model packages: which there are, whether they may run, who signed them.", no_args_is_help=True
)


@dataclass(frozen=True, slots=True)
class _Found:
    """One package folder and what came of loading it: the package, or what is wrong."""

    folder: Path
    package: Package | None
    problem: str = ""

    def row(self) -> dict[str, Any]:
        """JSON-ready."""
        package = self.package
        return {
            "name": self.folder.name,
            "folder": str(self.folder),
            "ok": package is not None,
            "version": package.version if package else None,
            "clearance": package.clearance if package else None,
            "signed_by": (package.signed_by or None) if package else None,
            "problem": self.problem or None,
        }


@app.command("list")
@guard
def list_(as_json: Json = False) -> None:
    """List the packages of the repository: version, signature, and whether they run on this box."""
    settings, _ = read_settings()
    repository = settings.model_repository
    there = {path.parent.name for path in repository.glob("*/package.toml")}
    found = [_try(settings, name) for name in sorted(there | set(settings.models.packages))]
    if as_json:
        rows = [{**one.row(), "runs": _runs(settings, one)} for one in found]
        emit({"repository": str(repository), "packages": rows})
        return
    table = Table("name", "version", "clearance", "signed by", "runs here", "", box=None)
    for one in found:
        table.add_row(*_cells(one), "yes" if _runs(settings, one) else "no", _mark(one))
    _print(table, found)


@app.command()
@guard
def show(
    name: Annotated[str, typer.Argument(help="A package of the repository, or a folder with a / in it.")],
    as_json: Json = False,
) -> None:
    """Show what a package is, what it may be used on, and who signed it."""
    from appliance.governance.indication import rules
    from appliance.governance.package import as_json as stated

    settings, _ = read_settings()
    package = load_named(settings, name)
    if as_json:
        emit(stated(package))
        return
    point, asked = package.operating_point, rules(package)
    table = Table("", Column(overflow="fold"), box=None, show_header=False)
    rows = {
        "name": f"{package.name} {package.version}",
        "title": package.title,
        "manufacturer": package.manufacturer,
        "clearance": package.clearance,
        "notice": package.notice,
        "mode": package.mode,
        "data": package.data or "not stated",
        "labels": ", ".join(package.labels),
        **{name: f"{rule} ({clause})" for name, (rule, clause) in asked.items()},
        **{f"limitation {n}": f"{one.text} ({one.clause})" for n, one in enumerate(package.indication.limitations, 1)},
        "positive from": f"{point.threshold:g} (lesion map {point.lesion_threshold:g}){_measured(point)}",
        "folder": str(package.folder),
        "signed by": package.signed_by or "nobody (models.allow_unsigned)",
        **dict(sorted(package.files.items())),
    }
    for key, value in rows.items():
        table.add_row(escape(key), escape(value))
    out.print(table)


def _measured(point: OperatingPoint) -> str:
    if point.sensitivity is None:
        return ""
    return f"; sensitivity {point.sensitivity:g} and specificity {point.specificity:g} of {point.studies} studies"


@app.command()
@guard
def verify(
    name: Annotated[
        str | None,
        typer.Argument(help="A package of the repository, or a folder with a / in it; all that run if omitted."),
    ] = None,
    parity: Annotated[
        bool, typer.Option("--parity", help="Also ask the running Triton for the slabs whose answers were published.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check signature and digests as a service does at its start."""
    settings, _ = read_settings()
    found = _configured(settings) if name is None else [_try(settings, name)]
    served = {one.folder: _parity(settings, one.package) for one in found if parity and one.package}
    if as_json:
        said = {folder: asdict(one) | {"holds": one.holds} for folder, one in served.items()}
        rows = [one.row() | ({"parity": said.get(one.folder)} if parity else {}) for one in found]
        emit({"packages": rows})
    else:
        table = Table("name", "version", "clearance", "signed by", "", box=None)
        for one in found:
            table.add_row(*_cells(one), _mark(one))
        _print(table, found)
        for folder, compared in served.items():
            mark = "[green]the model[/]" if compared.holds else "[red]not the model[/]"
            line = f"{escape(folder.name)}: Triton serves {mark} that was published: {escape(str(compared))}"
            out.print(line, highlight=False, soft_wrap=True)
    if not all(one.package for one in found) or not all(one.holds for one in served.values()):
        raise typer.Exit(1)


def _parity(settings: Settings, package: Package) -> Parity:
    from appliance.inference.parity import check_parity
    from appliance.inference.triton import TritonClient

    with TritonClient(f"{settings.triton.host}:{settings.triton.grpc_port}", shared_memory=False) as client:
        return check_parity(package, lambda slabs: client.infer(package, slabs))


@app.command()
@guard
def build(
    name: Annotated[
        str | None,
        typer.Argument(help="A package of the repository, or a folder with a / in it; all that run if omitted."),
    ] = None,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="Let TensorRT also use half precision, where its version still can.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Build the TensorRT plan for this box's GPU, and keep it if it answers as the published model does."""
    from appliance.governance.package import load_configured
    from appliance.inference import plan

    settings, _ = read_settings()
    packages = load_configured(settings) if name is None else (load_named(settings, name),)
    gpu, built = plan.this_gpu(), []
    for package in packages:
        record = plan.build(settings.plans_directory, package, gpu, fp16=fp16)
        path = plan.plan_path(settings.plans_directory, package, gpu)
        built.append(asdict(record) | {"path": str(path)})
        if not as_json:
            made = f"{path}: TensorRT {gpu.tensorrt}, sm{gpu.capability}, {record.precision}: {record.parity}"
            out.print(f"built {escape(made)}", highlight=False, soft_wrap=True)
    if as_json:
        emit({"plans": built})


@app.command()
@guard
def sign(
    folder: Annotated[Path, typer.Argument(help="The package's folder; a signature that is there is replaced.")],
    key: Annotated[Path, typer.Option(help="Private key, as `scanside models keygen` writes it.")],
    as_json: Json = False,
) -> None:
    """Sign a package whose files are what its package.toml states."""
    from appliance.governance.package import seal
    from appliance.governance.signature import read_private

    package = seal(folder, read_private(key))
    if as_json:
        emit({"name": package.name, "version": package.version, "signed_by": package.signed_by})
    else:
        out.print(f"signed {package.name} {escape(package.version)} with key {package.signed_by}", highlight=False)


@app.command()
@guard
def keygen(
    out_: Annotated[Path, typer.Option("--out", help="File for the private key; the public one goes beside it.")],
    as_json: Json = False,
) -> None:
    """Make a key to sign packages with."""
    from appliance.governance.signature import key_id, public_path, write_keys

    name = key_id(write_keys(out_))
    if as_json:
        emit({"key": name, "private": str(out_), "public": str(public_path(out_))})
    else:
        public = escape(str(public_path(out_)))
        out.print(f"key {name}", highlight=False)
        out.print(f"private: {escape(str(out_))} (keep it off the box)", highlight=False, soft_wrap=True)
        out.print(f"public: {public} (name it in models.trusted_keys)", highlight=False, soft_wrap=True)


def load_named(settings: Settings, name: str) -> Package:
    """A package under the settings' keys. A bare name never means a folder: it would be checked in another's stead."""
    from appliance.governance.package import load, load_configured, trusted_keys

    if "/" in name:
        return load(Path(name), trusted=trusted_keys(settings), allow_unsigned=settings.models.allow_unsigned)
    if not (settings.model_repository / name).is_dir():
        raise ScansideError(
            "there is no such package", name, f"`scanside models list` lists them; for a folder say ./{name}"
        )
    (package,) = load_configured(settings, [name])
    return package


def _try(settings: Settings, name: str) -> _Found:
    folder = Path(name).resolve() if "/" in name else settings.model_repository / name
    try:
        return _Found(folder, load_named(settings, name))
    except SettingsError:  # says nothing about this package
        raise
    except ScansideError as error:
        return _Found(folder, None, str(error))


def _configured(settings: Settings) -> list[_Found]:
    """What runs, each by itself; if only together they cannot run, each says so."""
    from appliance.governance.package import load_configured

    found = [_try(settings, name) for name in settings.models.packages]
    if not all(one.package for one in found):
        return found
    try:
        load_configured(settings)
    except ScansideError as error:
        return [_Found(one.folder, None, str(error)) for one in found]
    return found


def _runs(settings: Settings, found: _Found) -> bool:
    return found.package is not None and found.folder.name in settings.models.packages


def _cells(found: _Found) -> tuple[str, str, str, str]:
    package = found.package
    if package is None:
        return escape(found.folder.name), "–", "–", "–"
    by = package.signed_by or "[yellow]nobody[/]"
    return escape(found.folder.name), escape(package.version), escape(package.clearance), by


def _mark(found: _Found) -> str:
    return "[green]ok[/]" if found.package else "[bold red]failed[/]"


def _print(table: Table, found: list[_Found]) -> None:
    """The table, and below it what is wrong: whole lines, because a path that a narrow cell breaks cannot be copied."""
    out.print(table)
    for problem in dict.fromkeys(one.problem for one in found if one.problem):
        out.print(f"[red]failed:[/] {escape(problem)}", soft_wrap=True, highlight=False)
