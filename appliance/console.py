"""What every command of `scanside` shares: where it prints, which configuration it reads, how it fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer
from rich.console import Console
from rich.markup import escape

from appliance.settings import Settings, SettingsError, find_settings, load_settings
from dicom_io.errors import ScansideError

out = Console()
err = Console(stderr=True)

P = ParamSpec("P")
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


class State:
    """The options that stand before the command."""

    config: Path | None = None
    json_log: bool = False


def guard(command: Callable[P, None]) -> Callable[P, None]:
    """Turn our errors into one clear line and an exit code."""

    @wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except ScansideError as error:
            err.print(f"[bold red]scanside:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
            raise typer.Exit(2 if isinstance(error, SettingsError) else 1) from error
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            err.print(f"[bold red]scanside:[/] {escape(where)}{escape(error.strerror or str(error))}", soft_wrap=True)
            raise typer.Exit(1) from error
        except Exception as error:
            from sqlalchemy.exc import SQLAlchemyError  # most commands need no ledger, and it loads slowly

            if not isinstance(error, SQLAlchemyError):
                raise
            said = str(error).splitlines()[0]  # below it is the statement
            err.print(f"[bold red]scanside:[/] the ledger: {escape(said)}", soft_wrap=True, highlight=False)
            raise typer.Exit(1) from error

    return guarded


def read_settings() -> tuple[Settings, Path]:
    """The configuration that the command line or the environment names, and its file.

    Raises:
        SettingsError: there is none, or it is wrong.
    """
    path = find_settings(State.config)
    return load_settings(path), path


def emit(value: Any) -> None:
    """Print JSON for machines."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
