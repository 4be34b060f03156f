"""One try at showing a verdict on a worklist."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from appliance.delivery.outbox import Result
from appliance.ledger.marks import Mark
from dicom_io.workitem import WorkitemError


def read_mark(path: Path) -> Mark:
    """The change that a verdict's finding asks for."""
    said = json.loads(path.read_bytes())
    return Mark(
        uid=said["uid"],
        study_instance_uid=said["study_instance_uid"],
        package=said["package"],
        mode=said["mode"],
        standing=said["standing"],
        text=said["text"],
        step=said["step"],
        moved=said.get("moved", False),  # not in what an earlier release wrote
    )


def show(path: Path, carry_out: Callable[[Mark], str]) -> Result:
    """Carry a change out on our own worklist, which is once however often it is tried."""
    try:
        return "acknowledge", carry_out(read_mark(path))
    except WorkitemError as error:
        return "reject", error.what
