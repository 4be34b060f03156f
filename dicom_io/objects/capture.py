"""Key slabs as pictures: Secondary Capture images that any viewer shows (PS3.3 A.8.1)."""

from __future__ import annotations

import io
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import SecondaryCaptureImageStorage

from dicom_io.objects.common import Device, ImageReference, Place, begin, fit, keep_body_part, keep_lossy, source_item

WINDOW_CENTER = 40.0
WINDOW_WIDTH = 80.0
OUTLINE_COLOR = (255, 210, 0)
_OUTLINE = 3  # pixels of the picture, with two of black on either side so that it shows on bright bone
_TEXT_COLOR = (255, 255, 255)
_STRIP_COLOR = (24, 24, 24)
_WANTED_COLUMNS = 1024
_MARGIN = 16
_TEXT_SIZE = 26
_LINE = 34


def zoom(columns: int) -> int:
    """How many times an image of this many columns is enlarged in its picture."""
    return max(1, round(_WANTED_COLUMNS / columns))


def key_image(
    hu: NDArray[np.floating], outlines: Sequence[Sequence[tuple[float, float]]], banner: Sequence[str]
) -> NDArray[np.uint8]:
    """One slab as a picture: brain window, outlines, and a banner below the image, over none of it.

    Args:
        hu: Hounsfield units, (rows, columns).
        outlines: closed polygons of (column, row) in pixels of `hu`, pixel centres at integers.
        banner: lines of text, none for no strip; a line too long for the picture is broken between words. The first
            stands out.

    Returns: RGB, (rows × zoom + banner, columns × zoom, 3), zoom = `zoom(columns)`.
    """
    # The linear VOI function (PS3.3 C.11.2.1.2.1), clipped to eight bits.
    gray = ((hu.astype(np.float32) - (WINDOW_CENTER - 0.5)) / (WINDOW_WIDTH - 1) + 0.5) * 255
    gray = np.clip(gray, 0, 255)
    factor = zoom(gray.shape[1])
    size = (gray.shape[1] * factor, gray.shape[0] * factor)
    enlarged = cv2.resize(gray, size, interpolation=cv2.INTER_LINEAR)
    picture = np.repeat(np.rint(enlarged).astype(np.uint8)[:, :, None], 3, axis=2)
    bits = 4  # of a pixel's fraction
    for outline in outlines:
        points = (np.asarray(outline, dtype=np.float64) + 0.5) * factor - 0.5
        fixed = np.rint(points * 2**bits).astype(np.int32)[:, None, :]
        cv2.polylines(picture, [fixed], True, (0, 0, 0), _OUTLINE + 4, cv2.LINE_AA, bits)
        cv2.polylines(picture, [fixed], True, OUTLINE_COLOR, _OUTLINE, cv2.LINE_AA, bits)
    return np.vstack([picture, _strip(banner, size[0])]) if banner else picture


def summary(pictures: Sequence[NDArray[np.uint8]], lines: Sequence[str]) -> NDArray[np.uint8]:
    """What was found, in words below small pictures of where.

    Args:
        pictures: from `key_image`, of the same size; none, or up to three.
        lines: as the banner of `key_image`.

    Returns: RGB, (rows, 1024, 3).
    """
    strip = _strip(lines, _WANTED_COLUMNS)
    if not pictures:
        return strip
    width = _WANTED_COLUMNS // max(3, len(pictures))
    small = [
        cv2.resize(one, (width, round(width * one.shape[0] / one.shape[1])), interpolation=cv2.INTER_AREA)
        for one in pictures
    ]
    row = np.full((max(len(one) for one in small), _WANTED_COLUMNS, 3), _STRIP_COLOR, np.uint8)
    for place, one in enumerate(small):
        row[: len(one), place * width : (place + 1) * width] = one
    return np.vstack([row, strip])


def png(picture: NDArray[np.uint8]) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def build_capture(
    picture: NDArray[np.uint8],
    source: Dataset,
    images: Sequence[ImageReference],
    *,
    description: str,
    comment: str,
    device: Device,
    place: Place,
) -> Dataset:
    """A single-frame RGB Secondary Capture of one key image.

    It claims no frame of reference: it has no geometry. Its pixels hold no patient identity.

    Args:
        picture: from `key_image`, (rows, columns, 3).
        source: header of an image of the series that was drawn on.
        images: what was drawn on.
        description: how the picture was derived.
        comment: the notice, repeated where a viewer shows Image Comments.

    Returns: a data set with file meta, ready to be written; the same for the same arguments.
    """
    made = begin(SecondaryCaptureImageStorage, "OT", source, device, place)
    made.ImageType = ["DERIVED", "SECONDARY"]
    made.ConversionType = "WSD"
    made.SecondaryCaptureDeviceManufacturer = made.Manufacturer
    made.SecondaryCaptureDeviceManufacturerModelName = made.ManufacturerModelName
    made.SecondaryCaptureDeviceSoftwareVersions = made.SoftwareVersions
    made.DateOfSecondaryCapture = made.ContentDate
    made.TimeOfSecondaryCapture = made.ContentTime
    made.BurnedInAnnotation = "NO"
    made.DerivationDescription = fit(made, description, 1024)
    made.ImageComments = fit(made, comment, 10240)
    made.PatientOrientation = _orientation(source) if len(images) == 1 else ""
    keep_body_part(source, made)
    keep_lossy(source, made)
    if images:
        made.SourceImageSequence = DicomSequence([source_item(image) for image in images])

    made.SamplesPerPixel = 3
    made.PhotometricInterpretation = "RGB"
    made.PlanarConfiguration = 0
    made.Rows, made.Columns = picture.shape[:2]
    made.BitsAllocated = made.BitsStored = 8
    made.HighBit = 7
    made.PixelRepresentation = 0
    pixels = np.ascontiguousarray(picture, dtype=np.uint8).tobytes()
    made.PixelData = pixels + b"\0" * (len(pixels) % 2)
    made["PixelData"].VR = "OB"
    return made


def _strip(banner: Sequence[str], width: int) -> NDArray[np.uint8]:
    size = max(10, min(_TEXT_SIZE, width // 24))
    step = round(size * _LINE / _TEXT_SIZE)
    font = ImageFont.load_default(size)  # the typeface inside Pillow: the same on every box
    lines: list[tuple[str, tuple[int, int, int]]] = []
    for index, text in enumerate(banner):
        color = OUTLINE_COLOR if index == 0 else _TEXT_COLOR
        line = ""
        for word in text.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width - 2 * _MARGIN:
                lines.append((line, color))
                longer = word
            line = longer
        lines.append((line, color))
    strip = Image.new("RGB", (width, 2 * _MARGIN + step * len(lines)), _STRIP_COLOR)
    draw = ImageDraw.Draw(strip)
    for index, (line, color) in enumerate(lines):
        draw.text((_MARGIN, _MARGIN + index * step), line, fill=color, font=font)
    return np.asarray(strip)


def _orientation(source: Dataset) -> list[str] | str:
    """Patient Orientation (PS3.3 C.7.6.1.1.1): main directions of row and column; '' if unknown."""
    cosines = source.get("ImageOrientationPatient")
    if cosines is None or len(cosines) != 6:
        return ""
    letters = []
    for direction in (cosines[:3], cosines[3:]):
        axis = max(range(3), key=lambda i: abs(float(direction[i])))
        letters.append(("LPH" if float(direction[axis]) > 0 else "RAF")[axis])
    return letters
