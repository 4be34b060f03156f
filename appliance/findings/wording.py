"""The sentences that every finding and alert shares, so that no two of them disagree."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from appliance.ledger.records import SlabResult, Verdict

TRIAGE_ONLY = "Triage only, unverified: a radiologist must read this study."
LIKELY = 0.5
"""A subtype is named from this probability on; below it the kind of haemorrhage is left open."""


_SHORT = 28
"""Characters in a line of a label."""


def likely_subtypes(probabilities: Mapping[str, float]) -> tuple[str, ...]:
    """The subtypes that are at least likely, most probable first; "any" is no subtype."""
    ranked = sorted(probabilities.items(), key=lambda item: (-item[1], item[0]))
    return tuple(label for label, probability in ranked if label != "any" and probability >= LIKELY)


def kinds(probabilities: Mapping[str, float]) -> str:
    """The likely subtypes for a reader: "subdural, subarachnoid", or "type open"."""
    return ", ".join(likely_subtypes(probabilities)) or "type open"


def judged_by(verdict: Verdict) -> str:
    """Who says so: package, version, probability and threshold."""
    return (
        f"{verdict.package} {verdict.package_version}: "
        f"probability {verdict.probability:.3f}, threshold {verdict.threshold:.3f}"
    )


def impression(verdict: Verdict) -> str:
    """What the package says of the study, in one sentence or two."""
    if verdict.withdrawn:
        return f"The complete study was not analysed: {verdict.withdrawn}. Nothing is said of haemorrhage."
    if verdict.positive:
        return (
            f"Intracranial haemorrhage suspected ({kinds(verdict.subtypes)}), "
            f"about {verdict.volume_ml:.1f} mL ({judged_by(verdict)})."
        )
    return f"No haemorrhage found ({judged_by(verdict)}). Triage only: this does not exclude haemorrhage."


def not_analysed(verdict: Verdict) -> str:
    """That a package says nothing of a study that it refused."""
    who = f"{verdict.package} {verdict.package_version}"
    return f"Not analysed by {who}: {verdict.withdrawn}. Nothing is said of haemorrhage."


def banner(verdict: Verdict, slab: SlabResult) -> tuple[str, ...]:
    """What stands below the picture of one key slab; no word of it identifies the patient."""
    return (
        f"Haemorrhage suspected: {kinds(slab.probabilities)}",
        f"{judged_by(verdict)}, volume {verdict.volume_ml:.1f} mL",
        f"Slab {slab.index + 1} of {len(verdict.slabs)}: probability {slab.probabilities['any']:.3f}",
        TRIAGE_ONLY,
        verdict.notice,
    )


def summary(verdict: Verdict) -> tuple[str, ...]:
    """What stands in the picture that sums up a verdict; no word of it identifies the patient."""
    found = f"Haemorrhage suspected: {kinds(verdict.subtypes)}" if verdict.positive else "No haemorrhage found"
    slabs = ", ".join(str(verdict.slabs[index].index + 1) for index in verdict.key_slabs)
    return (
        found,
        impression(verdict),
        *(f"{name}: {probability:.3f}" for name, probability in sorted(verdict.subtypes.items())),
        *((f"Key slabs of {len(verdict.slabs)}: {slabs}",) if slabs else ()),
        *(f"Limitation: {one}" for one in verdict.limitations),
        TRIAGE_ONLY,
        verdict.notice,
    )


def label(verdict: Verdict, slab: SlabResult) -> tuple[str, ...]:
    """What stands beside one key slab in a viewer, in short lines."""
    sentences = (
        "Haemorrhage suspected",
        *(likely_subtypes(slab.probabilities) or ("type open",)),
        f"probability {slab.probabilities['any']:.3f}",
        f"{verdict.package} {verdict.package_version}",
        "triage only, unverified",
        verdict.notice,
    )
    return tuple(line for sentence in sentences for line in textwrap.wrap(sentence, _SHORT))
