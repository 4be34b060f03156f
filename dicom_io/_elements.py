"""The elements of a data set that anybody may have sent, as plain Python values.

`_scan` finds the elements; their values are converted here. A value that is not what its attribute holds becomes a
line in ``problems`` and an absent value.
"""

from __future__ import annotations

import codecs
import math
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from itertools import islice
from typing import BinaryIO, NamedTuple

from pydicom import config
from pydicom.charset import convert_encodings, decode_bytes, python_encoding
from pydicom.datadict import tag_for_keyword
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian

from dicom_io._scan import ITEM_ENDS, STOP, ActionOf, Buffer, Name, Overrun, Raw, items, looks_implicit, number, scan
from dicom_io.errors import HeaderCutOff, HeaderError, ScansideError

# Values are checked here; pydicom's own checks only warn, once for each place in the code, on standard error.
config.settings.reading_validation_mode = config.IGNORE

MAXIMUM_DEFLATED_HEADER = 64 << 20
"""Bytes to inflate at most in search of the pixel data: deflate can claim 1,000 times what was sent."""

MAXIMUM_ITEMS = 100_000
"""Items of one sequence at most: an empty item has 8 bytes, an object for it many more."""

FIRST_READ = 256 << 10
"""Bytes of a file that are read at first: the header of nearly every instance."""

# Its codecs by the names that Python gives them, with "-" for "_".
_PYTHON_NAMES = {codecs.lookup(name).name.replace("_", "-"): name for name in python_encoding.values()}
_UID = re.compile(r"[0-9]++(?:\.[0-9]++)*+")
_ONE_NUMERIC = b"0123456789+-.eE "
_NUMERIC = _ONE_NUMERIC + b"\\"
_INFINITE = frozenset((math.inf, -math.inf))
_BINARY = {b"FD": "d", b"FL": "f"}
_PIXEL_DATA = (0x7FE00008, 0x7FE00009, 0x7FE00010)  # Float, Double Float and Pixel Data
_DEFLATED, _BIG_ENDIAN = str(DeflatedExplicitVRLittleEndian), str(ExplicitVRBigEndian)
_CHARACTER_SET = 0x00080005
_ITEM_END = 0xFFFEE00D
_SHOWN = 40  # characters of an unreadable value that a problem quotes
_LONGEST_NUMBERS = 1024  # bytes; nothing here has more than six numbers, of 16 bytes at most
_LONGEST_ESCAPED, _MOST_ESCAPES = 2048, 64  # bytes and code extensions; a person's name has fewer by far
_MOST_CHARACTER_SETS = 16


def is_uid(text: str) -> bool:
    """Whether the text may stand where a UID is meant: 1 to 64 digits and dots (PS3.5 9.1).

    A component that begins with a needless 0 is let through: some devices write them, and it does no harm.
    """
    return len(text) <= 64 and _UID.fullmatch(text) is not None


class reading:
    """A context that turns whatever goes wrong while an untrusted file is read into one error that names the file."""

    def __init__(self, where: str, error_class: type[ScansideError] = HeaderError) -> None:
        self._where = where
        self._error_class = error_class

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is None or not isinstance(error, Exception):
            return
        kind = self._error_class
        if isinstance(error, ScansideError):
            kind = type(error) if isinstance(error, kind) else kind
            raise kind(error.what, self._where) from error.__cause__
        if isinstance(error, OSError):
            raise kind(f"it cannot be read ({error.strerror or error})", self._where) from error
        # whatever a hostile file may still find
        raise kind(f"it cannot be read as DICOM ({type(error).__name__})", self._where) from error


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one kind of reader looks for: keywords or tags, and the scanner's actions in both byte orders (big first).

    The data set is scanned up to its pixel data, an item (whose icon may have pixel data) to its end.
    """

    names: frozenset[Name]
    data_set: tuple[ActionOf, ActionOf]
    item: tuple[ActionOf, ActionOf]


@cache
def wanted(keywords: tuple[str, ...], tags: tuple[int, ...] = ()) -> Wanted:
    """The elements with these keywords or tags, of the data set and of the items in its sequences."""
    tags_of: dict[Name, int] = {tag: tag for tag in tags} | {"SpecificCharacterSet": _CHARACTER_SET}
    for keyword in keywords:
        tag = tag_for_keyword(keyword)
        if tag is None:
            raise KeyError(keyword)
        tags_of[keyword] = tag

    def actions(little: bool, stops: tuple[int, ...]) -> ActionOf:
        found = {number(tag, little): name for name, tag in tags_of.items()}
        stop = {number(tag, little): STOP for tag in stops}
        return (found | stop | {number(_ITEM_END, little): ITEM_ENDS}).get

    data_set = actions(False, _PIXEL_DATA), actions(True, _PIXEL_DATA)
    return Wanted(frozenset(tags_of), data_set, (actions(False, ()), actions(True, ())))


_META = wanted(("MediaStorageSOPClassUID", "MediaStorageSOPInstanceUID", "TransferSyntaxUID"))
_IN_META = _META.item[True]


def _action_in_meta(tag: int) -> Name | None:
    """File Meta Information ends with its group, whatever its Group Length says."""
    return _IN_META(tag) if tag & 0xFFFF == 0x0002 else STOP


def _encodings(value: bytes) -> list[str]:
    """Python's names for the values of Specific Character Set (PS3.3 C.12.1.1.2).

    Known terms only, and the names that Python itself gives their codecs ("utf-8" is seen): any other codec of
    Python's, some of which are slow on purpose of the sender, is the default as an unknown term is.
    """
    terms = []
    for part in value.decode("latin-1").split("\\")[:_MOST_CHARACTER_SETS]:
        term = part.strip(" \0")
        if re.match("ISO[^_]IR", term):
            term = "ISO_IR" + term[6:]
        elif re.match("ISO.2022.IR.", term):
            term = "ISO 2022 IR " + term[12:]
        known = term if term in python_encoding else _PYTHON_NAMES.get(term.lower().replace("_", "-"), "")
        terms.append(known)
    return convert_encodings(terms)


class Elements:
    """Elements of one data set or sequence item, by keyword.

    Attributes:
        encoding: (implicit VR, little endian): how they are really encoded, which may belie the transfer syntax.
        problems: what was present and could not be read; shared with the items of its sequences.

    A keyword that the reader did not ask for is a KeyError, lest it pass for absent.
    """

    __slots__ = ("_character_sets", "_data", "_first", "_found", "_items", "_parent", "_wanted", "encoding", "problems")

    def __init__(
        self,
        data: bytes,
        found: dict[Name, Raw],
        wanted: Wanted,
        encoding: tuple[bool, bool],
        problems: list[str],
        parent: Elements | None = None,
    ) -> None:
        self._data = data
        self._found = found
        self._wanted = wanted
        self._parent = parent
        self._items: dict[str, Sequence[Elements]] = {}
        self._first: dict[str, Elements | None] = {}
        self._character_sets: list[str] | None = None
        self.encoding = encoding
        self.problems = problems

    def _absent(self, name: Name) -> Raw:
        if name not in self._wanted.names:
            raise KeyError(name)
        return b"", 0, 0

    def __contains__(self, keyword: str) -> bool:
        return keyword in self._found or bool(self._absent(keyword)[2])

    def raw_bytes(self, keyword: str) -> bytes | None:
        """The encoded value, None if the element is absent, empty or a sequence."""
        vr, start, end = self._found.get(keyword) or self._absent(keyword)
        return None if vr == b"SQ" else self._data[start:end] or None

    def _decode(self, value: bytes) -> str:
        """Text in the character sets of this data set or item, which inherits them (PS3.5 7.5.3)."""
        names = self._python_encodings()
        if b"\x1b" in value and len(value) <= _LONGEST_ESCAPED and value.count(b"\x1b") <= _MOST_ESCAPES:
            return decode_bytes(value, names, set(b"\\\r\n\t\f"))
        return value.decode(names[0], "replace")

    def _python_encodings(self) -> list[str]:
        if self._character_sets is None:
            raw = self._found.get("SpecificCharacterSet")
            if raw is not None:
                self._character_sets = _encodings(self._data[raw[1] : raw[2]])
            else:
                self._character_sets = self._parent._python_encodings() if self._parent else _encodings(b"")
        return self._character_sets

    def problem(self, keyword: Name, value: object, expected: str) -> None:
        """Note that the value of an attribute is not what is expected."""
        shown = value if isinstance(value, str) else repr(value)
        shown = shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "…"
        name = keyword if isinstance(keyword, str) else f"({keyword >> 16:04X},{keyword & 0xFFFF:04X})"
        self.problems.append(f"{name}: {shown!r} is not {expected}")

    def text(self, keyword: str) -> str:
        """The text without padding, '' if absent. Undecodable bytes become U+FFFD."""
        vr, start, end = self._found.get(keyword) or self._absent(keyword)
        if vr == b"SQ":
            self.problem(keyword, "a sequence", "text")
            return ""
        try:
            return self._data[start:end].decode("ascii").strip(" \0")
        except UnicodeDecodeError:
            return self._decode(self._data[start:end]).strip(" \0")

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
        vr, start, end = self._found.get(keyword) or self._absent(keyword)
        if start == end:
            return None
        if end - start > _LONGEST_NUMBERS:
            self.problem(keyword, f"{end - start} bytes", "numbers")
            return None
        value = self._data[start:end]
        if vr in _BINARY:
            return self._binary(keyword, value, _BINARY[vr])
        if b"\0" in value:
            value = value.replace(b"\0", b" ")
        try:
            # Python's float would also take "1_0", "nan" and a line feed.
            values = () if value.translate(None, _NUMERIC) else tuple(map(float, value.split(b"\\")))
        except ValueError:
            values = ()
        if values and _INFINITE.isdisjoint(values):
            return values
        if parts := self.texts(keyword):
            self.problem(keyword, "\\".join(parts), "a number" if len(parts) == 1 else "numbers")
        return None

    def _binary(self, keyword: str, value: bytes, code: str) -> tuple[float, ...] | None:
        size = struct.calcsize(code)
        if len(value) % size:
            self.problem(keyword, value, "a number")
            return None
        values = struct.unpack(f"{'<' if self.encoding[1] else '>'}{len(value) // size}{code}", value)
        if not all(map(math.isfinite, values)):
            self.problem(keyword, str(values), "finite")
            return None
        return values

    def number(self, keyword: str) -> float | None:
        """The one number, None if absent or unreadable."""
        vr, start, end = self._found.get(keyword) or self._absent(keyword)
        if start == end:
            return None
        value = self._data[start:end]
        if len(value) <= 16 and not value.translate(None, _ONE_NUMERIC) and vr not in _BINARY:
            try:
                single = float(value)
            except ValueError:
                single = math.inf
            if single not in _INFINITE:
                return single
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

    def short(self, keyword: Name) -> int | None:
        """The one 16-bit value of US (or of SS, as its bits), None if absent or unreadable.

        Args:
            keyword: or a tag, where a repeating group (60xx) has no keyword of its own.
        """
        vr, start, end = self._found.get(keyword) or self._absent(keyword)
        if start == end:
            return None
        if vr == b"SQ" or end - start != 2:
            shown = "a sequence" if vr == b"SQ" else self._data[start : min(end, start + _SHOWN)]
            self.problem(keyword, shown, "one 16-bit number")
            return None
        return int.from_bytes(self._data[start:end], "little" if self.encoding[1] else "big")

    def items(self, keyword: str) -> Sequence[Elements]:
        """The items of a sequence, () if it is absent or no sequence.

        Raises:
            HeaderError: it is damaged, or has more than `MAXIMUM_ITEMS`.
        """
        read = self._items.get(keyword)
        if read is None:
            read = self._items[keyword] = list(islice(self._each(keyword), MAXIMUM_ITEMS + 1))
        if len(read) > MAXIMUM_ITEMS:
            raise HeaderError(f"{keyword} has more than {MAXIMUM_ITEMS} items")
        return read

    def first(self, keyword: str) -> Elements | None:
        """The first item of a sequence, None if there is none. The others are not looked at.

        Raises:
            HeaderError: it is damaged.
        """
        if keyword not in self._first:
            self._first[keyword] = next(self._each(keyword), None)
        return self._first[keyword]  # kept: each frame of an enhanced object asks for the shared groups again

    def _each(self, keyword: str) -> Iterator[Elements]:
        vr, start, end = self._found.get(keyword) or self._absent(keyword)
        if start == end:
            return
        if vr not in (b"SQ", b"UN", b""):
            self.problem(keyword, self._data[start : min(end, start + _SHOWN)], "a sequence")
            return
        implicit, little = self.encoding
        try:
            for item_implicit, found in items(self._data, start, end, implicit, little, self._wanted.item[little]):
                yield Elements(self._data, found, self._wanted, (item_implicit, little), self.problems, self)
        except Overrun:
            raise HeaderError(f"{keyword} is damaged: something in it is longer than what it is in") from None


def _scan_meta(data: Buffer) -> tuple[Elements, int]:
    if data[128:132] != b"DICM":
        raise HeaderError("it is not a DICOM Part 10 file: 'DICM' does not follow a preamble of 128 bytes")
    implicit = looks_implicit(data, 132)
    found, position, _ = scan(data, 132, len(data), implicit, True, _action_in_meta)
    return Elements(bytes(data[:position]), found, _META, (implicit, True), []), position


def inflate(data: Buffer, maximum: int) -> bytes:
    """The first ``maximum`` bytes of a deflated data set (PS3.5 A.5: no zlib header).

    Raises:
        HeaderCutOff: it is cut off. (A deflated data set that is damaged is a `zlib.error`.)
    """
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = inflater.decompress(data, maximum)
    if not inflater.eof and len(inflated) < maximum:
        raise HeaderCutOff("its deflated data set is cut off")
    return inflated


class Parsed(NamedTuple):
    """The header of an instance.

    Attributes:
        syntax: its Transfer Syntax UID, '' if missing or no UID.
        elements: what was asked for and found before the pixel data.
        inflated: the whole data set if it is deflated.
        position: where the pixel data, or whatever ended the header, begins: in ``inflated`` or in the instance.
    """

    syntax: str
    elements: Elements
    inflated: bytes | None
    position: int


def parse_buffer(data: Buffer, wanted: Wanted, complete: bool = True) -> Parsed:
    """Find what is wanted of a Part 10 instance, up to its pixel data.

    Args:
        data: the instance, or (if not ``complete``) its first bytes. Of a view the header is copied.

    Raises:
        HeaderCutOff: the bytes end within an element, or (if not ``complete``) before the pixel data.
        HeaderError: it is no Part 10 file, or damaged.
    """
    inflated = None
    if not complete and len(data) < 132:
        raise HeaderCutOff("it is cut off within its preamble")
    try:
        meta, position = _scan_meta(data)
        syntax = meta.uid("TransferSyntaxUID")
        if syntax == _DEFLATED:
            if not complete:
                raise HeaderCutOff("its deflated data set is cut off")
            data = inflated = inflate(data[position:], MAXIMUM_DEFLATED_HEADER)
            position = 0
        little = syntax != _BIG_ENDIAN
        implicit = looks_implicit(data, position)
        found, position, stopped = scan(data, position, len(data), implicit, little, wanted.data_set[little])
    except Overrun:
        raise HeaderCutOff("it is cut off within its header") from None
    if not (complete or stopped):
        raise HeaderCutOff("it is cut off before its pixel data")
    header = data if isinstance(data, bytes) else bytes(data[:position])
    return Parsed(syntax, Elements(header, found, wanted, (implicit, little), meta.problems), inflated, position)


def parse_file(stream: BinaryIO, wanted: Wanted, complete: bool = True) -> Parsed:
    """`parse_buffer` of a stream that stands at the start of an instance; reads no more than the header needs."""
    data = stream.read(FIRST_READ)
    try:
        return parse_buffer(data, wanted, complete=False)
    except HeaderCutOff:
        data += stream.read()
    return parse_buffer(data, wanted, complete)


def parse(stream: BinaryIO, keywords: Sequence[str], tags: Sequence[int] = ()) -> tuple[str, Elements, BinaryIO]:
    """`parse_file` for who goes on to the pixel data.

    Returns:
        the Transfer Syntax UID ('' if missing or no UID), the elements, and the stream that stands where pixel
        data begins (another than ``stream`` if the data set is deflated).
    """
    begin = stream.tell()
    parsed = parse_file(stream, wanted(tuple(keywords), tuple(tags)))
    if parsed.inflated is not None:
        stream, begin = BytesIO(parsed.inflated), 0
    stream.seek(begin + parsed.position)
    return parsed.syntax, parsed.elements, stream


def parse_meta(stream: BinaryIO) -> Elements:
    """Read preamble and File Meta Information; leaves the stream at the data set.

    Raises:
        HeaderError: no ``DICM`` after the preamble (PS3.10 7.1), or it is cut off.
    """
    begin = stream.tell()
    data = stream.read(FIRST_READ)
    try:
        try:
            meta, position = _scan_meta(data)
        except Overrun:
            data += stream.read()
            meta, position = _scan_meta(data)
    except Overrun:
        raise HeaderCutOff("it is cut off within its File Meta Information") from None
    stream.seek(begin + position)
    return meta
