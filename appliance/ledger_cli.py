"""`scanside ledger`: the ledger's schema, forward and back."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape

from appliance.console import Json, emit, guard, out, read_settings

app = typer.Typer(help="The ledger's schema.", no_args_is_help=True)


def _show(answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        emit(answer)
    else:
        for key, value in answer.items():
            out.print(f"{key.replace('_', ' ')}: {escape(str(value))}", highlight=False)


@app.command()
@guard
def schema(as_json: Json = False) -> None:
    """Show the ledger's schema, and the newest that this scanside knows."""
    from appliance.ledger import migration

    path = read_settings()[0].ledger_path
    _show({"revision": migration.revision(path), "head": migration.head()}, as_json)


@app.command()
@guard
def upgrade(as_json: Json = False) -> None:
    """Bring the ledger to this scanside's schema; every service does so by itself when it starts."""
    from appliance.ledger import migration
    from appliance.ledger.store import Ledger

    path = read_settings()[0].ledger_path
    before = migration.revision(path)
    Ledger(path).close()
    _show({"before": before, "revision": migration.revision(path)}, as_json)


@app.command()
@guard
def downgrade(
    to: Annotated[str, typer.Argument(help="The schema of the older scanside, such as 0006.")], as_json: Json = False
) -> None:
    """Take the ledger back to an older schema with all that it holds; for going back to an older scanside.

    Stop the services first: the next one that starts takes it forward again.
    """
    from appliance.ledger import migration

    path = read_settings()[0].ledger_path
    before = migration.downgrade(path, to)
    _show({"before": before, "revision": migration.revision(path)}, as_json)
