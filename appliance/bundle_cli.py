"""`scanside bundle`: make, sign and check what boxes without a network are installed and updated from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from appliance.console import Json, emit, err, guard, out
from appliance.release.errors import ReleaseError
from dicom_io.errors import ScansideError

if TYPE_CHECKING:
    from appliance.release.bundle import Bundle

app = typer.Typer(help="Signed bundles for boxes without a network.", no_args_is_help=True)

Keys = Annotated[
    list[Path],
    typer.Option("--key", exists=True, help="Public key that is trusted, once for each: two while one is replaced."),
]
File = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The .tar file; its .minisig lies beside it.")]
Password = Annotated[
    Path | None, typer.Option("--password-file", exists=True, help="File that holds the key's password.")
]


@contextmanager
def _told() -> Iterator[None]:
    """A release's errors are those of every command."""
    try:
        yield
    except ReleaseError as error:
        raise ScansideError(error.what, error.where, error.remedy) from error


def _password(path: Path | None) -> Callable[[], str]:
    def read() -> str:
        if path is not None:
            return path.read_text(encoding="utf-8").rstrip("\r\n")
        return str(typer.prompt("Password of the key", hide_input=True, err=True))

    return read


@app.command()
@guard
def keygen(
    out_: Annotated[
        Path, typer.Option("--out", help="File for the secret key; the public one lies beside it as .pub.")
    ],
    password_file: Password = None,
    as_json: Json = False,
) -> None:
    """Make a pair of keys in minisign's format. The secret one stays where bundles are made, and never on a box."""
    from appliance.release.minisign import new_key

    public = out_.with_suffix(".pub")
    for path in (out_, public):
        if path.exists():
            raise ScansideError("it is there already", str(path), "name another file; keys are not overwritten")
    key = new_key()
    content = key.encode(_password(password_file)() if password_file else "")
    out_.touch(mode=0o600, exist_ok=False)
    out_.write_text(content, encoding="utf-8")
    public.write_text(key.public.encode(), encoding="utf-8")
    if as_json:
        emit({"secret": str(out_), "public": str(public), "id": key.public.id, "encrypted": password_file is not None})
    else:
        out.print(f"wrote {escape(str(out_))} and {escape(str(public))} (key {key.public.id})", highlight=False)
        if password_file is None:
            out.print("The secret key is not encrypted: whoever can read the file can sign.")


@app.command()
@guard
def create(
    out_: Annotated[Path, typer.Option("--out", help="Folder to write the bundle to.")],
    key: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="Secret key to sign with.")],
    channel: Annotated[str, typer.Option(help="Whom it is for, such as stable or canary.")] = "stable",
    minimum: Annotated[str, typer.Option(help="Oldest version that may be updated with it; else any.")] = "",
    version: Annotated[str, typer.Option(help="Another version than the source states, for trials.")] = "",
    wheels: Annotated[
        list[Path] | None,
        typer.Option(exists=True, file_okay=False, help="Folder of wheels; without, pip fetches them."),
    ] = None,
    model: Annotated[
        list[Path] | None, typer.Option(exists=True, file_okay=False, help="A further model package's folder.")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(exists=True, dir_okay=False, help="Archive of a container image.")
    ] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="For boxes with a GPU: with the packages that they need.")] = False,
    gpu_wheel: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="A further wheel for them, as of their Triton's TensorRT."),
    ] = None,
    source: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Source tree; else the one that runs.")
    ] = None,
    password_file: Password = None,
    as_json: Json = False,
) -> None:
    """Make a signed bundle out of a source tree: wheels of both environments, models, units, installer, SBOM.

    The same tree and wheels make the same file, bit for bit.
    """
    from appliance.ledger import migration
    from appliance.release.create import create as make
    from appliance.release.minisign import read_secret_key

    tree = source or Path(__file__).resolve().parents[1]
    with _told():
        secret = read_secret_key(key, _password(password_file))
        with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=err) as progress:
            task = progress.add_task("", total=None)
            made = make(
                tree,
                out_,
                secret,
                schema=migration.head(tree / "appliance/ledger/migrations"),
                version=version,
                channel=channel,
                minimum=minimum,
                wheels=wheels or (),
                models=model or (),
                images=image or (),
                gpu=gpu,
                gpu_wheels=gpu_wheel or (),
                on_step=lambda text: progress.update(task, description=text),
            )
    if as_json:
        emit(
            {
                "bundle": str(made.bundle),
                "signature": str(made.signature),
                "version": made.version,
                "key": secret.public.id,
                "files": made.files,
                "size": made.size,
            }
        )
    else:
        size = f"{made.files} files, {made.size / 1e6:.0f} MB, signed by {secret.public.id}"
        out.print(f"wrote {escape(str(made.bundle))} ({size})", highlight=False, soft_wrap=True)


def _checked(path: Path, keys: Sequence[Path], into: Path | None = None) -> tuple[Bundle, dict[str, Any]]:
    from appliance.release.bundle import read_bundle, signed
    from appliance.release.create import is_bootstrap
    from appliance.release.minisign import read_public_key

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with _told(), Progress(*columns, console=err) as progress:
        trusted = [read_public_key(one) for one in keys]
        task = progress.add_task(escape(path.name), total=2 * path.stat().st_size)
        bundle = signed(path, trusted, lambda size: progress.advance(task, size))
        manifest = read_bundle(path, bundle, progress=lambda size: progress.advance(task, size))
        if into is not None:
            wanted = ("install/", *(name for name in manifest["files"] if is_bootstrap(name)))
            read_bundle(path, bundle, into=into, only=wanted)
    return bundle, manifest


@app.command()
@guard
def verify(file: File, key: Keys, as_json: Json = False) -> None:
    """Check a bundle: who signed it, and every file in it. It exits with 1 if anything is not as it was signed."""
    bundle, manifest = _checked(file, key)
    files, gpu = len(manifest["files"]), bool(manifest.get("gpu"))
    if as_json:
        emit(
            {
                "version": bundle.version,
                "channel": bundle.channel,
                "minimum": bundle.minimum,
                "key": bundle.key,
                "gpu": gpu,
                "files": files,
            }
        )
    else:
        boxes = "boxes with a GPU" if gpu else "boxes"
        said = f"version {bundle.version}, {bundle.channel}, for {boxes} from {bundle.minimum} on; {files} files"
        out.print(f"good: signed by {bundle.key}; {said}", highlight=False)


@app.command()
@guard
def installer(
    file: File,
    key: Keys,
    out_: Annotated[Path, typer.Option("--out", file_okay=False, help="Folder to write it to; made if absent.")],
    as_json: Json = False,
) -> None:
    """Check a bundle and take the installer out of it, for a box that has none yet: copy the whole folder there."""
    if out_.exists() and any(out_.iterdir()):
        raise ScansideError("it is not empty", str(out_), "name a new folder")
    part = out_.with_name(f".{out_.name}.part")
    part.mkdir(parents=True)
    bundle, _ = _checked(file, key, part)
    (part / "wheels").replace(part / "install" / "wheels")
    if out_.exists():
        out_.rmdir()
    (part / "install").replace(out_)
    part.rmdir()
    if as_json:
        emit({"version": bundle.version, "key": bundle.key, "directory": str(out_)})
    else:
        out.print(f"wrote the installer of {bundle.version} to {escape(str(out_))}", highlight=False, soft_wrap=True)
