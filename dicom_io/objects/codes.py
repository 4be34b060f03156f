"""The one table of coded concepts, each with the list that holds it.

A code stands here only if an authoritative list holds it; the list is named beside it. Where none is verified the
concept is private (`PRIVATE_SCHEME`), and an object that uses it declares the scheme (PS3.3 C.12.1.1.7). Public code is
full of wrong SNOMED CT codes for haemorrhage subtypes, so a guess is worse than a private code.
"""

from __future__ import annotations

from dataclasses import dataclass

PRIVATE_SCHEME = "99SCANSIDE"
PRIVATE_SCHEME_NAME = "scanside private codes"
PRIVATE_SCHEME_ORGANIZATION = "scanside"

PS3_16_DCM = "PS3.16 Annex D, DICOM Controlled Terminology"
PS3_16_SCT = "PS3.16 SNOMED CT concepts (pydicom.sr, SCT dictionary)"
OWN = "none verified: private"


@dataclass(frozen=True, slots=True)
class Concept:
    """A coded concept (PS3.3 8.8): value, coding scheme designator, meaning, and the list that holds it."""

    value: str
    scheme: str
    meaning: str
    source: str


# What was done
CT_HEAD = Concept("303653007", "SCT", "Computed tomography of head", PS3_16_SCT)
CT_HEAD_LOINC = Concept("24725-4", "LN", "CT Head", "PS3.16 CID 646 and CID 7000 (LOINC 24725-4)")
CT_MODALITY = Concept("CT", "DCM", "Computed Tomography", "PS3.16 CID 29 Acquisition Modality")

# What was found
# CID 3413 and 3754 print 1386000 beside "Occlusion of artery", a slip of the standard: SNOMED CT means the haemorrhage.
INTRACRANIAL_HEMORRHAGE = Concept("1386000", "SCT", "Intracranial hemorrhage", PS3_16_SCT)
SUBTYPES: dict[str, Concept] = {
    "epidural": Concept("ICH-EPIDURAL", PRIVATE_SCHEME, "Epidural hemorrhage", OWN),
    "intraparenchymal": Concept(
        "274100004", "SCT", "Cerebral hemorrhage", "SNOMED CT, display in published stroke value sets"
    ),
    "intraventricular": Concept("ICH-INTRAVENTRIC", PRIVATE_SCHEME, "Intraventricular hemorrhage", OWN),
    "subarachnoid": Concept(
        "21454007",
        "SCT",
        "Subarachnoid intracranial hemorrhage",
        "SNOMED CT, display in published stroke value sets",
    ),
    "subdural": Concept("ICH-SUBDURAL", PRIVATE_SCHEME, "Subdural hemorrhage", OWN),
}
FINDING = Concept("121071", "DCM", "Finding", PS3_16_DCM)
ACTIONABLE_1 = Concept(
    "RID49480",
    "RADLEX",
    "ACR Category 1 Actionable Finding",
    "PS3.16 CID 7035 Actionable Finding Classification",
)
ACTIONABILITY = Concept("ACTIONABILITY", PRIVATE_SCHEME, "Actionable finding category", OWN)
PROCEDURE_FINDINGS = Concept("59776-5", "LN", "Procedure Findings", "PS3.16 CID 6052 and CID 7001 (LOINC 59776-5)")

# The triage result. PS3.16 CID 240 has Present and Absent; a triage that found nothing must not say "Absent".
TRIAGE_RESULT = Concept("TRIAGE-RESULT", PRIVATE_SCHEME, "Triage result", OWN)
SUSPECTED = Concept("TRIAGE-SUSPECTED", PRIVATE_SCHEME, "Hemorrhage suspected, unverified", OWN)
NONE_FOUND = Concept("TRIAGE-NONEFOUND", PRIVATE_SCHEME, "No hemorrhage found, triage only", OWN)
NOT_ANALYSED = Concept("NOT-ANALYSED", PRIVATE_SCHEME, "Study not analysed", OWN)
SUSPECTED_TYPE = Concept("HEMORRHAGE-TYPE", PRIVATE_SCHEME, "Suspected type of hemorrhage", OWN)
LIMITATION = Concept("LIMITATION", PRIVATE_SCHEME, "Limitation of the analysis", OWN)
REVISION = Concept("REVISION", PRIVATE_SCHEME, "Revision of the verdict", OWN)
MESSAGE_KIND = Concept(
    "MESSAGE-KIND", PRIVATE_SCHEME, "Provisional, alert, confirmation, correction or withdrawal", OWN
)
FIRST_MESSAGE = Concept("FIRST-MESSAGE", PRIVATE_SCHEME, "Message control id of the first message on this study", OWN)
STUDY_LINK = Concept("STUDY-LINK", PRIVATE_SCHEME, "Address of the study in a viewer", OWN)

# How it is shown
ARTIFICIAL_INTELLIGENCE = Concept(
    "123110", "DCM", "Artificial Intelligence", "PS3.16 CID 7162 Surface Processing Algorithm Family"
)
MORPHOLOGICALLY_ABNORMAL = Concept(
    "49755003", "SCT", "Morphologically Abnormal Structure", "PS3.16 CID 7150 Segmentation Property Category"
)
SEGMENTATION = Concept("113076", "DCM", "Segmentation", "PS3.16 CID 7203 Image Derivation")
KEY_OBJECT_DESCRIPTION = Concept("113012", "DCM", "Key Object Description", PS3_16_DCM)
OF_INTEREST = Concept("113000", "DCM", "Of Interest", "PS3.16 CID 7010 Key Object Selection Document Title")

# Numbers and their units
PROBABILITY = Concept("122157", "DCM", "Probability", PS3_16_DCM)
PROBABILITY_ANY = Concept("P-ANY", PRIVATE_SCHEME, "Probability of intracranial hemorrhage", OWN)
PROBABILITIES: dict[str, Concept] = {
    label: Concept(f"P-{label.upper()[:14]}", PRIVATE_SCHEME, f"Probability of {label} hemorrhage", OWN)
    for label in SUBTYPES
}
THRESHOLD = Concept("THRESHOLD", PRIVATE_SCHEME, "Operating threshold of the probability", OWN)
VOLUME = Concept("118565006", "SCT", "Volume", "PS3.16 CID 7469 Generic Intensity and Size Measurement")
NO_UNITS = Concept("1", "UCUM", "no units", "PS3.16 CID 7181 Abstract Multi-dimensional Image Model Component Unit")
MILLILITER = Concept("mL", "UCUM", "milliliter", "UCUM, metric prefix m on the unit L")

# Words around them
IMPRESSION = Concept("121073", "DCM", "Impression", PS3_16_DCM)
COMMENT = Concept("121106", "DCM", "Comment", PS3_16_DCM)
ALGORITHM_NAME = Concept("111001", "DCM", "Algorithm Name", PS3_16_DCM)
ALGORITHM_VERSION = Concept("111003", "DCM", "Algorithm Version", PS3_16_DCM)
UDI = Concept("128739", "DCM", "UDI", PS3_16_DCM)
DICOM_STUDY = Concept("113014", "DCM", "DICOM Study", "PS3.16 CID 7012 and CID 10000 (113014 Study)")
DEVICE = Concept("121007", "DCM", "Device", "PS3.16 CID 270 Observer Type")
MODALITY = Concept("121139", "DCM", "Modality", PS3_16_DCM)
FRAME_OF_REFERENCE = Concept("112227", "DCM", "Frame of Reference UID", PS3_16_DCM)
IMAGE_LIBRARY = Concept("111028", "DCM", "Image Library", PS3_16_DCM)
IMAGE_LIBRARY_GROUP = Concept("126200", "DCM", "Image Library Group", PS3_16_DCM)
SOURCE = Concept("260753009", "SCT", "Source", "PS3.16 TID 1601 Image Library Entry")
SOURCE_FOR_PROCESSING = Concept(
    "121322",
    "DCM",
    "Source image for image processing operation",
    "PS3.16 CID 7202 Source Image Purpose of Reference",
)
