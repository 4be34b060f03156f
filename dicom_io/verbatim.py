"""Writing a data set so that text which nobody decoded keeps the bytes that it has.

pydicom decodes all of it and encodes it again where the data set is not one that it read in the same encoding. What
comes of that reads the same, mostly: the end of a name with an empty last component is lost.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import pydicom
from pydicom.dataset import Dataset
from pydicom.filewriter import correct_ambiguous_vr
from pydicom.uid import UID


def write_verbatim(target: Path | BinaryIO, made: Dataset) -> None:
    """Write a Part 10 file in the little endian transfer syntax that its File Meta Information names.

    Args:
        made: its raw elements know their representation (VR), and their values mean the same in each of these syntaxes.
    """
    correct_ambiguous_vr(made, True)
    _as_if_read(made, UID(made.file_meta.TransferSyntaxUID).is_implicit_VR)
    pydicom.dcmwrite(target, made, enforce_file_format=True)


def _as_if_read(made: Dataset, implicit: bool) -> None:
    for tag in list(made.keys()):
        if made.get_item(tag).VR == "SQ":
            for item in made[tag].value:
                _as_if_read(item, implicit)
    made.set_original_encoding(implicit, True, made._character_set)
