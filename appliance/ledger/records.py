"""The typed records that stages hand to one another through the ledger."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

Outline = tuple[tuple[float, float], ...]
"""A closed polygon in the pixel coordinates of its source image: (column, row), pixel centres at integers."""
ALERT_STANDS = "An earlier alert on this study STANDS: it rests on images that were removed since and not read again."
"""The limitation of a negative verdict that disproves no alert that was given before it."""

ANOTHER_PATIENT = "its images came again under another Patient ID; what was said of them is not disproved"
"""Why a verdict was withdrawn with which all ends that was told of a study under one Patient ID."""


@dataclass(frozen=True, slots=True)
class SlabResult:
    """What a package said of one slab.

    Attributes:
        index: position of the slab, 0 nearest the feet.
        offset_mm: centre of the slab along the volume's normal.
        thickness_mm: extent along the normal that this slab answers for.
        sop_instance_uid: the source image nearest the slab's centre; outlines are drawn on it.
        frame: 0-based frame of that image.
        probabilities: label → probability in 0..1; holds "any" and the subtypes.
        outlines: where the lesion map exceeds its threshold; empty where it nowhere does.
        volume_ml: area above that threshold times ``thickness_mm``.
    """

    index: int
    offset_mm: float
    thickness_mm: float
    sop_instance_uid: str
    frame: int
    probabilities: dict[str, float]
    outlines: tuple[Outline, ...]
    volume_ml: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one package says of one study.

    Attributes:
        probability: study-level probability of any haemorrhage, 0..1.
        threshold: the operating point; ``positive`` is ``probability >= threshold``.
        subtypes: subtype → study-level probability.
        key_slabs: indices into ``slabs`` of those to show, most important first; empty if negative.
        codecs: the decoders that produced the pixels, sorted, each once.
        limitations: what was not analysed or is doubtful, in sentences.
        notice: the package's regulatory notice, to be shown wherever the verdict is.
        provisional: it is about what had arrived of a study that was still arriving.
        withdrawn: why an earlier verdict is taken back although nothing was read in its place, or why there never was
            one (of no series); "" where one stands.
        mode: in which the package ran: clinical, shadow (nobody is told) or evaluation; "" where that was not recorded.
        udi: unique device identifier of the package; "" where it has none.
        incomplete: nothing but a silence said that all of the study had come.
    """

    study_instance_uid: str
    series_instance_uid: str
    package: str
    package_version: str
    notice: str
    positive: bool
    probability: float
    threshold: float
    subtypes: dict[str, float]
    volume_ml: float
    slabs: tuple[SlabResult, ...]
    key_slabs: tuple[int, ...]
    codecs: tuple[str, ...]
    limitations: tuple[str, ...]
    provisional: bool = False
    withdrawn: str = ""
    mode: str = ""
    udi: str = ""
    incomplete: bool = False

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary that `from_json` turns back into an equal record."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Verdict:
        """The record that `to_json` wrote; what a later version of it knows besides is left out."""
        known = {field.name for field in fields(cls)}
        slabs = tuple(
            SlabResult(
                **{
                    **slab,
                    "outlines": tuple(tuple((float(c), float(r)) for c, r in line) for line in slab["outlines"]),
                }
            )
            for slab in data["slabs"]
        )
        return cls(
            **{
                **{name: value for name, value in data.items() if name in known},
                "slabs": slabs,
                "key_slabs": tuple(data["key_slabs"]),
                "codecs": tuple(data["codecs"]),
                "limitations": tuple(data["limitations"]),
            }
        )
