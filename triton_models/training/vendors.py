"""How the makers of CT scanners write the same head: their habits, as far as they matter to whoever reads it.

The makers' names are theirs; no file here is a copy of one that a scanner wrote. "" is the plain phantom.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Vendor:
    """One maker's habits.

    Attributes:
        manufacturer, models: Manufacturer (0008,0070) and what its scanners call themselves.
        kernels: what it calls a kernel of `scanner.KERNELS`; the ones that it has.
        signed: whether pixels are two's complement.
        intercept: RescaleIntercept.
        bits_stored: 12 or 16.
        padding: stored value outside the circle of the field, where it pads.
        head_first: whether instance numbers count from the crown.
        image_type: ImageType.
        body_parts: what BodyPartExamined may be; "" leaves it out.
        studies, series: descriptions to choose from; ``{mm}`` and ``{kernel}`` are filled in.
        protocols: ProtocolName to choose from.
        says_age, says_birth: whether PatientAge and PatientBirthDate are there.
        says_tilt: whether GantryDetectorTilt is.
        character_set: SpecificCharacterSet.
        implicit: whether it writes Implicit VR Little Endian; else Explicit.
        private: of one private element in group 0019: creator, element, VR, value.
        unseen: kept for evaluation; training never draws it.
    """

    manufacturer: str
    models: tuple[str, ...]
    kernels: dict[str, str]
    signed: bool
    intercept: int
    bits_stored: int
    padding: int | None
    head_first: bool
    image_type: tuple[str, ...]
    body_parts: tuple[str, ...]
    studies: tuple[str, ...]
    series: tuple[str, ...]
    protocols: tuple[str, ...]
    says_age: bool
    says_birth: bool
    says_tilt: bool
    character_set: str
    implicit: bool = False
    private: tuple[str, int, str, str] | None = None
    unseen: bool = False


VENDORS = {
    "": Vendor(
        "scanside", ("phantom generator",), {"soft": "SOFT", "standard": "STANDARD", "sharp": "SHARP"},
        False, -1024, 12, None, False, ("ORIGINAL", "PRIMARY", "AXIAL"), ("HEAD",),
        ("CT HEAD WITHOUT CONTRAST",), ("AXIAL HEAD {mm} MM",), ("HEAD ROUTINE",), True, True, True, "ISO_IR 100",
    ),
    "ge": Vendor(
        "GE MEDICAL SYSTEMS", ("LightSpeed VCT", "Revolution EVO", "Optima CT660"),
        {"soft": "SOFT", "standard": "STANDARD", "sharp": "BONE"},
        True, -1024, 16, -2000, False, ("ORIGINAL", "PRIMARY", "AXIAL"), ("HEAD",),
        ("CT HEAD W/O CONTRAST", "HEAD"), ("AXIAL {mm}mm", "5.1 Head Routine {mm}"), ("5.1 Routine Head",),
        True, False, True, "ISO_IR 100", private=("GEMS_ACQU_01", 0x23, "DS", "+0.0"),
    ),
    "siemens": Vendor(
        "SIEMENS", ("SOMATOM Definition AS+", "SOMATOM Force", "Sensation 64"),
        {"soft": "H20s", "standard": "H31s", "sharp": "H60s"},
        False, -1024, 12, None, True, ("ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 SPI"), ("HEAD", "BRAIN"),
        ("Neuro^Schädel_Nativ (Erwachsener)", "Head^HeadRoutine (Adult)"),
        ("Head {mm} {kernel}", "Schädel  {mm}  {kernel}"),
        ("HeadRoutine", "Schädel_Nativ"), True, True, True, "ISO_IR 100",
        private=("SIEMENS CT VA0  COAD", 0xB0, "IS", "1"),
    ),
    "philips": Vendor(
        "Philips", ("Brilliance 64", "iCT 256", "Ingenuity CT"), {"soft": "UA", "standard": "UB", "sharp": "D"},
        False, -1024, 12, None, False, ("ORIGINAL", "PRIMARY", "AXIAL", "HELIX"), ("HEAD", ""),
        ("CT BRAIN", "Head C-"), ("HEAD {mm}mm", "Brain {mm}"), ("Brain Helical", "HEAD_ROUTINE/HEAD"),
        False, True, True, "ISO_IR 192", implicit=True,
    ),
    "canon": Vendor(
        "TOSHIBA", ("Aquilion ONE", "Aquilion PRIME"), {"soft": "FC21", "standard": "FC26", "sharp": "FC30"},
        True, 0, 16, -2048, True, ("ORIGINAL", "PRIMARY", "AXIAL"), ("HEAD", "BRAIN"),
        ("Head CT", "BRAIN PLAIN"), ("Head {mm} {kernel}", "Brain {mm}.0"), ("Head Routine",),
        True, True, True, "ISO_IR 100",
    ),
    "neusoft": Vendor(
        "Neusoft Medical Systems", ("NeuViz 128",), {"iterative": "F20", "edge": "F45"},
        False, -8192, 16, 0, False, ("ORIGINAL", "PRIMARY", "AXIAL"), ("", "SKULL"),
        ("Brain",), ("Head Helical {mm}mm ClearView",), ("Head Helical",), True, False, False, "ISO_IR 192",
        implicit=True, unseen=True,
    ),
}  # fmt: skip


def names(*, unseen: bool) -> tuple[str, ...]:
    """The vendors that training draws, or those that it never does."""
    return tuple(name for name, vendor in VENDORS.items() if name and vendor.unseen == unseen)


@dataclass(frozen=True, slots=True)
class Words:
    """What one study of a vendor calls itself."""

    model: str
    body_part: str
    study: str
    series: str
    protocol: str


def words(rng: np.random.Generator, name: str, thickness_mm: float, kernel: str) -> Words:
    """Choose among a vendor's words.

    Args:
        name: of the vendor.
        thickness_mm: of a slice.
        kernel: the vendor's own name for it.
    """
    vendor = VENDORS[name]
    picked = [str(rng.choice(choices)) for choices in (
        vendor.models, vendor.body_parts, vendor.studies, vendor.series, vendor.protocols)]  # fmt: skip
    picked[3] = picked[3].format(mm=f"{thickness_mm:g}", kernel=kernel)
    return Words(*picked)
