"""The studies that are measured are the same images in each syntax."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from appliance.bench.studies import SYNTAXES, copies, original
from dicom_io.header import read_header
from dicom_io.pixels import decode

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("syntax", [one for one in SYNTAXES if one != "explicit"])
def test_a_compressed_study_holds_the_same_images(tmp_path: Path, syntax: str) -> None:
    plain = original(tmp_path / "plain", 16)
    (sent,) = [copies(tmp_path / "copy", [original(tmp_path / "original", 16, syntax)], 1)]
    for before, after in list(zip(plain.paths, sent.paths, strict=True))[::8]:
        assert read_header(after).transfer_syntax_uid == SYNTAXES[syntax]
        assert np.array_equal(decode(after).hu, decode(before).hu)
