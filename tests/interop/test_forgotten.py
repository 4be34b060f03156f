"""An intake that starts with a ledger that does not know the spool's images."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.intake.spool import path_of
from appliance.ledger.views import event_counts
from dicom_io.scu import send
from tests.interop.intake import as_other_study, running_intake

pytestmark = [pytest.mark.interop, pytest.mark.slow]


@pytest.mark.parametrize("state", ["lost", "older"])
def test_a_ledger_that_was_lost_costs_no_image(tmp_path: Path, ge_head: Path, state: str) -> None:
    old, new = (as_other_study([ge_head / "01.dcm", ge_head / "02.dcm"], tmp_path / name) for name in ("old", "new"))
    box = tmp_path / "box"
    with running_intake(box) as intake:
        assert [one.error for one in send(old, intake.peer, "SCANNER")] == ["", ""]
        path, spool = intake.settings.ledger_path, intake.spool
    copy = path.read_bytes()
    (box / "scanside.toml").unlink()
    with running_intake(box) as intake:
        assert [one.error for one in send(new, intake.peer, "SCANNER")] == ["", ""]
        digests = intake.ledger.digests()
    for name in ("ledger.sqlite-wal", "ledger.sqlite-shm", "ledger.sqlite"):
        (path.parent / name).unlink(missing_ok=True)
    if state == "older":
        path.write_bytes(copy)
    (box / "scanside.toml").unlink()
    with running_intake(box) as intake:
        known = intake.ledger.digests()
        assert event_counts(intake.ledger).get("spool.set_aside") == 1
        said = intake.process.tail(30)
    assert len(known) == (2 if state == "older" else 0)
    assert "set aside" in said and str(spool / "unknown") in said
    kept = {digest: path_of(spool, digest) for digest in known}
    kept |= {digest: spool / "unknown" / f"{digest}.dcm" for digest in digests - known}
    assert len(kept) == 4
    assert all(one.is_file() for one in kept.values())
