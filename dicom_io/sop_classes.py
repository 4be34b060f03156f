"""The SOP classes and transfer syntaxes that the provider knows (PS3.4 B.5, PS3.5 Annex A, PS3.6 Table A-1)."""

from __future__ import annotations

from pydicom._uid_dict import UID_dictionary
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from pynetdicom import sop_class as sop
from pynetdicom.presentation import AllStoragePresentationContexts

from dicom_io.errors import ScansideError

VERIFICATION = str(sop.Verification)
STORAGE_COMMITMENT = str(sop.StorageCommitmentPushModel)
PERFORMED_STEP = str(sop.ModalityPerformedProcedureStep)
AVAILABILITY = str(sop.InstanceAvailabilityNotification)

OTHER_CLASSES: tuple[str, ...] = (VERIFICATION, STORAGE_COMMITMENT, PERFORMED_STEP, AVAILABILITY)
"""What is accepted beside storage, in `OTHER_SYNTAXES`."""

STORAGE_CLASSES: tuple[str, ...] = (
    sop.CTImageStorage,
    sop.EnhancedCTImageStorage,
    sop.LegacyConvertedEnhancedCTImageStorage,
    sop.SecondaryCaptureImageStorage,
    sop.MultiFrameSingleBitSecondaryCaptureImageStorage,
    sop.MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    sop.MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    sop.MultiFrameTrueColorSecondaryCaptureImageStorage,
    sop.XRayRadiationDoseSRStorage,
    sop.EnhancedXRayRadiationDoseSRStorage,
    sop.BasicTextSRStorage,
    sop.EnhancedSRStorage,
    sop.ComprehensiveSRStorage,
    sop.KeyObjectSelectionDocumentStorage,
    sop.GrayscaleSoftcopyPresentationStateStorage,
    sop.ColorSoftcopyPresentationStateStorage,
    sop.EncapsulatedPDFStorage,
    sop.RawDataStorage,
)
"""What is accepted for storage unless a site says more: CT, and what else a CT scanner puts into a study."""

ALL_STORAGE_CLASSES: tuple[str, ...] = tuple(str(context.abstract_syntax) for context in AllStoragePresentationContexts)
"""Every storage class of the standard that pynetdicom knows."""

PLAIN_SYNTAXES: tuple[str, ...] = (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
)
_FASTEST_FIRST: tuple[str, ...] = (
    RLELossless,
    HTJ2KLosslessRPCL,
    HTJ2KLossless,
    JPEGLosslessSV1,
    JPEGLossless,
    JPEGLSLossless,
    JPEG2000Lossless,
)
# Real-time streams (PS3.22) and the encodings of mail and XML are no data sets that a C-STORE could carry.
_NOT_STORED = ("1.2.840.10008.1.2.7.", "1.2.840.10008.1.2.6.", "1.2.840.10008.1.20")

TRANSFER_SYNTAXES: tuple[str, ...] = (
    *PLAIN_SYNTAXES,
    *_FASTEST_FIRST,
    *sorted(
        uid
        for uid, entry in UID_dictionary.items()
        if entry[1] == "Transfer Syntax"
        and not uid.startswith(_NOT_STORED)
        and uid not in PLAIN_SYNTAXES
        and uid not in _FASTEST_FIRST
    ),
)
"""Every transfer syntax of the standard that a C-STORE may carry, in order of preference: plain ones first (senders
encode anew for what they find first), then lossless ones by how fast they decode, then the rest, which is kept as
it came; whether it can be decoded is for a later stage to say."""

OTHER_SYNTAXES = PLAIN_SYNTAXES[:3]


def storage_classes(names: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """`STORAGE_CLASSES` and those that a site adds.

    Args:
        names: keywords of PS3.6 (``MRImageStorage``), UIDs (also private ones), or ``all`` for every class known.

    Raises:
        ScansideError: a name is neither.
    """
    from dicom_io._elements import is_uid

    keywords = {entry[4]: uid for uid, entry in UID_dictionary.items() if entry[1] == "SOP Class" and entry[4]}
    chosen = list(STORAGE_CLASSES)
    for name in names:
        if name == "all":
            chosen += ALL_STORAGE_CLASSES
        elif name in keywords:
            chosen.append(keywords[name])
        elif is_uid(name):
            chosen.append(name)
        else:
            raise ScansideError(
                f"{name!r} is no storage class",
                "intake.storage_classes",
                "write a keyword of PS3.6 such as MRImageStorage, a UID, or all",
            )
    return tuple(dict.fromkeys(chosen))
