"""`scanside retry`: once more what came to no good end, because somebody asks for it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from appliance.console import err, guard, out, read_settings
from dicom_io.errors import ScansideError

if TYPE_CHECKING:
    from appliance.ledger.store import Ledger


@guard
def retry(
    delivery: Annotated[
        int | None, typer.Argument(help="Number of a dead, rejected, withdrawn or replaced delivery.")
    ] = None,
    study_number: Annotated[
        str | None, typer.Option("--study", help="A study whose analysis was set aside: UID or number.")
    ] = None,
    since: Annotated[
        datetime | None,
        typer.Option(
            formats=["%Y-%m-%dT%H:%M:%S"],
            help="All that was set aside, dead, rejected or withdrawn from then on (UTC), unless it is stopped still.",
        ),
    ] = None,
    decided: Annotated[
        bool,
        typer.Option("--decided", help="With --since: decide anew on every study that was decided from then on."),
    ] = False,
) -> None:
    """Send a dead, rejected, withdrawn or replaced delivery once more, or analyse a study that was set aside."""
    from appliance.ledger.doorbell import ring
    from appliance.ledger.store import Ledger
    from appliance.ledger.views import find_study

    if sum(one is not None for one in (delivery, study_number, since)) != 1:
        raise typer.BadParameter("name a delivery, a study with --study, or a time with --since")
    if decided and since is None:
        raise typer.BadParameter("--decided goes with --since")
    settings, _ = read_settings()
    if not settings.ledger_path.exists():
        raise ScansideError("there is no ledger yet", str(settings.ledger_path), "start scanside first")
    destinations = [one.name for one in settings.destination]
    ledger = Ledger(settings.ledger_path)
    try:
        if study_number is not None:
            key = find_study(ledger, study_number)
            if key is None or not ledger.requeue_analyses(key):
                raise ScansideError("nothing of it was set aside", study_number, "`scanside studies` lists what was")
            out.print(f"study {key} is analysed again", highlight=False)
        elif delivery is not None:
            ledger.requeue_delivery(delivery, destinations)
            out.print(f"delivery {delivery} is pending again", highlight=False)
        elif since is not None:
            _all_since(ledger, since.replace(tzinfo=UTC), destinations, decided=decided)
    finally:
        ledger.close()
    ring(settings.run_directory, "engine")  # the object of a delivery may have to be made first
    ring(settings.run_directory, "delivery")


def _all_since(ledger: Ledger, since: datetime, destinations: list[str], *, decided: bool) -> None:
    """What cannot be tried again is said, and keeps nothing else from it."""
    from appliance.ledger.standing import decided_since, set_aside_since

    again = decided_since(ledger, since) if decided else []
    studies, deliveries = set_aside_since(ledger, since)
    for study in again:
        if ledger.reconsider(study, asked="retry"):
            out.print(f"study {study} is decided again", highlight=False)
    for study in studies:
        try:
            ledger.requeue_analyses(study)
            out.print(f"study {study} is analysed again", highlight=False)
        except ScansideError as error:
            err.print(f"[bold red]scanside:[/] study {study}: {escape(str(error))}", soft_wrap=True, highlight=False)
    for number in deliveries:
        try:
            ledger.requeue_delivery(number, destinations)
            out.print(f"delivery {number} is pending again", highlight=False)
        except ScansideError as error:
            err.print(f"[bold red]scanside:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
    if not again and not studies and not deliveries:
        out.print(
            "nothing was decided or set aside since" if decided else "nothing was set aside since", highlight=False
        )
