"""A key slab's outline and text as a viewer draws them: a Grayscale Softcopy Presentation State (PS3.3 A.33.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from highdicom.color import CIELabColor
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import GrayscaleSoftcopyPresentationStateStorage
from pydicom.valuerep import format_number_as_ds

from dicom_io.objects.capture import OUTLINE_COLOR, WINDOW_CENTER, WINDOW_WIDTH
from dicom_io.objects.common import Device, ImageReference, Place, begin, fit, item, keep_body_part, reference_item

LAYER = "AI_FINDING"
_MARGIN = 0.01  # of the displayed area
_TEXT_WIDTH = 0.3
_LINE = 0.025
_RIM_OF_TEXT = 0.002  # of the displayed area
_RIM_OF_LINE = 1.0  # pixels of the image
_CORNERS = (("LEFT", False), ("RIGHT", False), ("LEFT", True), ("RIGHT", True))


def build_presentation(
    hu: NDArray[np.floating],
    outlines: Sequence[Sequence[tuple[float, float]]],
    text: Sequence[str],
    source: Dataset,
    image: ImageReference,
    *,
    spacing_mm: tuple[float, float],
    rescale: tuple[float, float],
    label: str,
    device: Device,
    place: Place,
) -> Dataset:
    """How to show one image: whole, in the brain window, with outlines, and text in its darkest corner.

    The text stands where the image is darkest: on air, where it covers nothing and can be read. Text and outlines have
    a black rim besides, so that they can be told from bone, in viewers that know the styles of PS3.3 C.10.5.

    Args:
        hu: of that image, (rows, columns).
        outlines: closed polygons of (column, row), pixel centres at integers.
        text: short lines; the first is what it is about.
        source: header of the image that `image` refers to.
        spacing_mm: of its pixels, between rows, between columns.
        rescale: slope and intercept that make HU of its stored values. A presentation state replaces the image's own.
        label: what it is called in a list.

    Returns: a data set with file meta, ready to be written; the same for the same arguments.
    """
    made = begin(GrayscaleSoftcopyPresentationStateStorage, "PR", source, device, place)
    made.PresentationCreationDate, made.PresentationCreationTime = made.ContentDate, made.ContentTime
    del made.ContentDate, made.ContentTime
    keep_body_part(source, made)
    made.ContentLabel = LAYER
    made.ContentDescription = fit(made, label, 64)
    made.ContentCreatorName = ""
    made.ReferencedSeriesSequence = DicomSequence(
        [
            item(
                SeriesInstanceUID=source.SeriesInstanceUID,
                ReferencedImageSequence=DicomSequence([reference_item(image)]),
            )
        ]
    )
    made.RescaleSlope, made.RescaleIntercept = (format_number_as_ds(float(value)) for value in rescale)
    made.RescaleType = "HU"
    made.SoftcopyVOILUTSequence = DicomSequence(
        [item(WindowCenter=WINDOW_CENTER, WindowWidth=WINDOW_WIDTH, WindowCenterWidthExplanation="Brain")]
    )
    made.PresentationLUTShape = "IDENTITY"
    rows, columns = hu.shape
    made.DisplayedAreaSelectionSequence = DicomSequence(
        [
            item(
                DisplayedAreaTopLeftHandCorner=[1, 1],
                DisplayedAreaBottomRightHandCorner=[columns, rows],
                PresentationSizeMode="SCALE TO FIT",
                PresentationPixelSpacing=[format_number_as_ds(float(value)) for value in spacing_mm],
            )
        ]
    )
    made.GraphicLayerSequence = DicomSequence(
        [
            item(
                GraphicLayer=LAYER,
                GraphicLayerOrder=1,
                GraphicLayerRecommendedDisplayGrayscaleValue=0xFFFF,
                GraphicLayerRecommendedDisplayCIELabValue=list(CIELabColor.from_rgb(*OUTLINE_COLOR).value),
            )
        ]
    )
    annotation = item(
        ReferencedImageSequence=DicomSequence([reference_item(image)]),
        GraphicLayer=LAYER,
        TextObjectSequence=DicomSequence([_text(made, hu, text)]),
    )
    if outlines:
        annotation.GraphicObjectSequence = DicomSequence([_polyline(outline) for outline in outlines])
    made.GraphicAnnotationSequence = DicomSequence([annotation])
    return made


def text_box(hu: NDArray[np.floating], lines: int) -> tuple[tuple[float, float, float, float], str]:
    """The corner of an image that is darkest in the brain window.

    Returns: left, top, right and bottom as fractions of the image, and the side that the text is flush with.
    """
    height = min(lines * _LINE, 0.5)
    best: tuple[float, tuple[float, float, float, float], str] | None = None
    for side, low in _CORNERS:
        left = _MARGIN if side == "LEFT" else 1 - _MARGIN - _TEXT_WIDTH
        top = 1 - _MARGIN - height if low else _MARGIN
        box = (left, top, left + _TEXT_WIDTH, top + height)
        part = hu[
            round(top * len(hu)) : round(box[3] * len(hu)), round(left * hu.shape[1]) : round(box[2] * hu.shape[1])
        ]
        shown = np.clip(part, WINDOW_CENTER - WINDOW_WIDTH / 2, WINDOW_CENTER + WINDOW_WIDTH / 2)
        brightness = float(shown.mean())
        if best is None or brightness < best[0]:
            best = brightness, box, side
    assert best is not None
    return best[1], best[2]


def _rim(width: float) -> dict[str, Any]:
    """A black rim around text or line, which are white or coloured (PS3.3 Tables C.10-5a and C.10-5b)."""
    return {
        "ShadowStyle": "OUTLINED",
        "ShadowOffsetX": width,
        "ShadowOffsetY": 0.0,
        "ShadowColorCIELabValue": list(CIELabColor.from_rgb(0, 0, 0).value),
        "ShadowOpacity": 1.0,
    }


def _text(made: Dataset, hu: NDArray[np.floating], text: Sequence[str]) -> Dataset:
    (left, top, right, bottom), side = text_box(hu, len(text))
    return item(
        BoundingBoxAnnotationUnits="DISPLAY",
        UnformattedTextValue="\r\n".join(fit(made, line) for line in text)[:1024],
        BoundingBoxTopLeftHandCorner=[left, top],
        BoundingBoxBottomRightHandCorner=[right, bottom],
        BoundingBoxTextHorizontalJustification=side,
        # Not drawn; the style's offsets are in its units.
        AnchorPointAnnotationUnits="DISPLAY",
        AnchorPoint=[left if side == "LEFT" else right, top],
        AnchorPointVisibility="N",
        TextStyleSequence=DicomSequence(
            [
                item(
                    CSSFontName="sans-serif",
                    TextColorCIELabValue=list(CIELabColor.from_rgb(255, 255, 255).value),
                    Underlined="N",
                    Bold="N",
                    Italic="N",
                    **_rim(_RIM_OF_TEXT),
                )
            ]
        ),
    )


def _polyline(outline: Sequence[tuple[float, float]]) -> Dataset:
    # The corner of the first pixel is 0\0 and its centre 0.5\0.5 (PS3.3 C.10.5.1.2); a closed line repeats its start.
    points = np.array([*outline, outline[0]], dtype=np.float32) + np.float32(0.5)
    return item(
        GraphicAnnotationUnits="PIXEL",
        GraphicDimensions=2,
        NumberOfGraphicPoints=len(points),
        GraphicData=[float(value) for value in points.ravel()],
        GraphicType="POLYLINE",
        GraphicFilled="N",
        LineStyleSequence=DicomSequence(
            [
                item(
                    PatternOnColorCIELabValue=list(CIELabColor.from_rgb(*OUTLINE_COLOR).value),
                    PatternOnOpacity=1.0,
                    LineThickness=1.0,
                    LineDashingStyle="SOLID",
                    **_rim(_RIM_OF_LINE),
                )
            ]
        ),
    )
