"""The elements of a data set that anybody may have sent, as plain Python values.

pydicom splits the bytes into elements; their values are converted here. A value that is not what its attribute
holds becomes a line in ``problems`` and an absent value.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any, BinaryIO

from pydicom import config
from pydicom.charset import decode_bytes
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.tag import BaseTag
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

from dicom_io.errors import HeaderError, ScansideError

# Values are checked here; pydicom's own checks only warn, once for each place in the code, on standard error.
config.settings.reading_validation_mode = config.IGNORE

MAXIMUM_DEFLATED_HEADER = 64 << 20
"""Bytes to inflate at most in search of the pixel data: deflate can claim 1,000 times what was sent."""

_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_PIXEL_DATA = frozenset((0x7FE00008, 0x7FE00009, 0x7FE00010))  # Float, Double Float and Pixel Data
_SHOWN = 40  # characters of an unreadable value that a problem quotes


def is_uid(text: str) -> bool:
    """Whether the text may stand where a UID is meant: 1 to 64 digits and dots (PS3.5 9.1).

    A component that begins with a needless 0 is let through: some devices write them, and it does no harm.
    """
    return len(text) <= 64 and _UID.fullmatch(text) is not None


@contextmanager
def reading(where: str, error_class: type[ScansideError] = HeaderError) -> Iterator[None]:
    """Turn whatever goes wrong while an untrusted file is read into one error that names the file."""
    try:
        yield
    except ScansideError as error:
        raise error_class(error.what, where) from error.__cause__
    except RecursionError:
        raise error_class("its sequences are nested too deeply", where) from None
    except OSError as error:
        raise error_class(f"it cannot be read ({error.strerror or error})", where) from error
    except Exception as error:  # pydicom raises whatever a hostile file makes it raise
        raise error_class(f"it cannot be read as DICOM ({type(error).__name__})", where) from error


class Elements:
    """Elements of one data set or sequence item, by keyword.

    Attributes:
        problems: what was present and could not be read; shared with the items of its sequences.
    """

    def __init__(self, dataset: Dataset, problems: list[str]) -> None:
        self._dataset = dataset
        self.problems = problems

    def _item(self, keyword: str | int) -> Any:
        """pydicom's RawDataElement (its value is bytes), or a DataElement where it had to parse; None if absent."""
        return self._dataset.get_item(keyword) if keyword in self._dataset else None

    def _raw(self, keyword: str | int) -> object:
        item = self._item(keyword)
        return None if item is None else item.value

    def __contains__(self, keyword: str) -> bool:
        return keyword in self._dataset

    def raw_bytes(self, keyword: str) -> bytes | None:
        """The encoded value, None if the element is absent, empty or a sequence."""
        value = self._raw(keyword)
        return value if isinstance(value, bytes) else None

    @property
    def encoding(self) -> tuple[bool, bool]:
        """(implicit VR, little endian): how the elements are really encoded, which may belie the transfer syntax."""
        implicit, little = self._dataset.original_encoding
        return bool(implicit), bool(little)

    def problem(self, keyword: str | int, value: object, expected: str) -> None:
        """Note that the value of an attribute is not what is expected."""
        shown = value if isinstance(value, str) else repr(value)
        shown = shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "…"
        name = keyword if isinstance(keyword, str) else f"({keyword >> 16:04X},{keyword & 0xFFFF:04X})"
        self.problems.append(f"{name}: {shown!r} is not {expected}")

    def text(self, keyword: str) -> str:
        """The text without padding, '' if absent. Undecodable bytes become U+FFFD."""
        value = self._raw(keyword)
        if value is None:
            return ""
        if not isinstance(value, bytes):
            if isinstance(value, str):
                return value.strip(" \0")
            self.problem(keyword, value, "text")
            return ""
        try:
            decoded = value.decode("ascii")
        except UnicodeDecodeError:
            encodings = self._dataset.original_character_set
            names = [encodings] if isinstance(encodings, str) else list(encodings)
            decoded = decode_bytes(value, names, set(b"\\\r\n\t\f"))
        return decoded.strip(" \0")

    def texts(self, keyword: str) -> tuple[str, ...]:
        """The values of a multi-valued text, () if absent."""
        text = self.text(keyword)
        return tuple(part.strip(" \0") for part in text.split("\\")) if text else ()

    def uid(self, keyword: str) -> str:
        """The UID, '' if it is absent or (with a problem) not a UID."""
        text = self.text(keyword)
        if text and not is_uid(text):
            self.problem(keyword, text, "a UID")
            return ""
        return text

    def numbers(self, keyword: str) -> tuple[float, ...] | None:
        """The finite numbers of a decimal or integer string, or of FD and FL; None if absent or unreadable."""
        item = self._item(keyword)
        if item is None or not item.value:
            return None
        if item.VR in ("FD", "FL") and isinstance(item.value, bytes):
            return self._binary(keyword, item.value, "d" if item.VR == "FD" else "f", item.is_little_endian)
        parts = self.texts(keyword)
        if not parts:
            return None
        values = [float(part) if _NUMBER.fullmatch(part) else math.nan for part in parts]
        if not all(map(math.isfinite, values)):
            self.problem(keyword, "\\".join(parts), "a number" if len(parts) == 1 else "numbers")
            return None
        return tuple(values)

    def _binary(self, keyword: str, value: bytes, code: str, little: bool) -> tuple[float, ...] | None:
        size = struct.calcsize(code)
        if len(value) % size:
            self.problem(keyword, value, "a number")
            return None
        values = struct.unpack(f"{'<' if little else '>'}{len(value) // size}{code}", value)
        if not all(map(math.isfinite, values)):
            self.problem(keyword, str(values), "finite")
            return None
        return values

    def number(self, keyword: str) -> float | None:
        """The one number, None if absent or unreadable."""
        values = self.numbers(keyword)
        if values is None:
            return None
        if len(values) != 1:
            self.problem(keyword, str(values), "one number")
            return None
        return values[0]

    def integer(self, keyword: str) -> int | None:
        """The integer string (IS, PS3.5 6.2: within 32 bits), None if absent or unreadable."""
        value = self.number(keyword)
        if value is None:
            return None
        if not value.is_integer() or abs(value) >= 2**31:
            self.problem(keyword, f"{value:g}", "an integer of 32 bits")
            return None
        return int(value)

    def short(self, keyword: str | int) -> int | None:
        """The one 16-bit value of US (or of SS, as its bits), None if absent or unreadable.

        Args:
            keyword: or a tag, where a repeating group (60xx) has no keyword of its own.
        """
        value = self._raw(keyword)
        if value is None or value == b"":
            return None
        if not isinstance(value, bytes) or len(value) != 2:
            self.problem(keyword, value, "one 16-bit number")
            return None
        return int.from_bytes(value, "little" if self._item(keyword).is_little_endian else "big")

    def items(self, keyword: str) -> Sequence[Elements]:
        """The items of a sequence, () if it is absent or no sequence."""
        if keyword not in self._dataset:
            return ()
        value = self._dataset[keyword].value
        if not isinstance(value, DicomSequence):
            if value:
                self.problem(keyword, value, "a sequence")
            return ()
        return [Elements(item, self.problems) for item in value]

    def first(self, keyword: str) -> Elements | None:
        """The first item of a sequence, None if there is none."""
        items = self.items(keyword)
        return items[0] if items else None


def _after_meta(tag: BaseTag, vr: str | None, length: int) -> bool:
    return tag >> 16 != 0x0002


def _at_pixel_data(tag: BaseTag, vr: str | None, length: int) -> bool:
    return tag in _PIXEL_DATA


def parse_meta(stream: BinaryIO) -> Elements:
    """Read preamble and File Meta Information; leaves the stream at the data set.

    Raises:
        HeaderError: no ``DICM`` after the preamble (PS3.10 7.1).
    """
    if stream.read(132)[128:] != b"DICM":
        raise HeaderError("it is not a DICOM Part 10 file: 'DICM' does not follow a preamble of 128 bytes")
    meta = read_dataset(stream, is_implicit_VR=False, is_little_endian=True, stop_when=_after_meta)
    return Elements(meta, [])


def inflate(stream: BinaryIO, maximum: int) -> bytes:
    """The first ``maximum`` bytes of a deflated data set (PS3.5 A.5: no zlib header).

    Raises:
        HeaderError: it is cut off. (A deflated data set that is damaged is a `zlib.error`.)
    """
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    data = inflater.decompress(stream.read(), maximum)
    if not inflater.eof and len(data) < maximum:
        raise HeaderError("its deflated data set is cut off")
    return data


def parse(stream: BinaryIO, keywords: Sequence[str], tags: Sequence[int] = ()) -> tuple[str, Elements, BinaryIO]:
    """Read the elements with these keywords or tags of a Part 10 instance, up to its pixel data.

    Returns:
        the Transfer Syntax UID ('' if missing or no UID), the elements, and the stream that stands where pixel
        data begins (another than ``stream`` if the data set is deflated).
    """
    meta = parse_meta(stream)
    syntax = meta.uid("TransferSyntaxUID")
    if syntax == DeflatedExplicitVRLittleEndian:
        stream = BytesIO(inflate(stream, MAXIMUM_DEFLATED_HEADER))
    dataset = read_dataset(
        stream,
        is_implicit_VR=syntax == ImplicitVRLittleEndian,
        is_little_endian=syntax != ExplicitVRBigEndian,
        stop_when=_at_pixel_data,
        specific_tags=[*tags, *(tag for keyword in keywords if (tag := tag_for_keyword(keyword)) is not None)],
    )
    return syntax, Elements(dataset, meta.problems), stream
