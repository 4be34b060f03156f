"""Bytes to elements: the same as pydicom finds in what is well formed, and an error that is foreseen in what is not."""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from dicom_io._elements import FIRST_READ, MAXIMUM_ITEMS, Elements, parse_buffer, parse_file, wanted
from dicom_io.errors import HeaderCutOff, HeaderError
from dicom_io.header import Header, read_header
from tests.fuzz.header import check, mutate, seeds

SYNTAXES = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
SEEDS = seeds()

TEXTS = ("StudyDescription", "PatientID", "Modality", "StudyInstanceUID")
NUMBERS = ("ImagePositionPatient", "SliceThickness", "RevolutionTime", "InstanceNumber")
SEQUENCES = ("SharedFunctionalGroupsSequence", "AnatomicRegionSequence", "PerFrameFunctionalGroupsSequence")
WANTED = wanted((*TEXTS, *NUMBERS, *SEQUENCES, "Rows"))


def raw(tag: int, vr: str, value: bytes, length: int | None = None) -> bytes:
    """An element of explicit VR little endian, whatever its value is."""
    size = len(value) if length is None else length
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr.encode()
    long = vr in ("SQ", "UN", "OB", "OW", "UT")
    return head + (struct.pack("<HI", 0, size) if long else struct.pack("<H", size)) + value


def plain(tag: int, value: bytes, length: int | None = None) -> bytes:
    """An element of implicit VR little endian, an item or a delimiter."""
    return struct.pack("<HHI", tag >> 16, tag & 0xFFFF, len(value) if length is None else length) + value


UNDEFINED = 0xFFFFFFFF
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
IDENTITY = (
    raw(0x00080016, "UI", CTImageStorage.encode() + b"\0")
    + raw(0x00080018, "UI", b"1.2.30")
    + raw(0x00080060, "CS", b"CT")
)
SERIES = raw(0x0020000D, "UI", b"1.22") + raw(0x0020000E, "UI", b"1.24") + raw(0x00280010, "US", b"\x30\0")
PIXELS = raw(0x7FE00010, "OW", b"\1\0")


def instance(data_set: bytes, syntax: str = ExplicitVRLittleEndian) -> bytes:
    uid = syntax.encode() + b"\0" * (len(syntax) % 2)
    return bytes(128) + b"DICM" + raw(0x00020010, "UI", uid) + data_set


def header_with(middle: bytes) -> Header:
    """The header of an instance with these bytes before those of its series."""
    header = read_header(instance(IDENTITY + middle + SERIES + PIXELS))
    assert header.series_instance_uid == "1.24" and header.rows == 48, "what follows is misread"
    return header


# Against pydicom


@st.composite
def data_sets(draw: st.DrawFn, depth: int = 3) -> Dataset:
    """Elements that are wanted and others, public and private, in sequences of both kinds of length."""
    dataset = Dataset()
    if depth == 3 and draw(st.booleans()):
        dataset.SpecificCharacterSet = draw(st.sampled_from(["ISO_IR 100", "ISO_IR 192"]))
    text = st.text(st.characters(codec="latin-1", categories=["L", "N"]), max_size=20)
    ascii_text = st.text(st.characters(codec="ascii", categories=["L", "N"]), max_size=20)
    latin = text if depth == 3 and "SpecificCharacterSet" in dataset else ascii_text
    number = st.integers(-(10**6), 10**6)
    values: dict[str, st.SearchStrategy[Any]] = {
        "StudyDescription": latin, "PatientID": ascii_text, "Modality": st.sampled_from(["CT", "MR"]),
        "StudyInstanceUID": st.sampled_from(["1.2", "1.23"]), "SeriesDescription": latin,
        "ImagePositionPatient": st.tuples(number, number, number).map(list), "InstanceNumber": number,
        "SliceThickness": number, "RevolutionTime": number.map(float), "Rows": st.integers(0, 65535),
        "RedPaletteColorLookupTableData": st.binary(max_size=8).map(lambda value: value * 2),
        "PixelPaddingValue": st.integers(0, 65535),
    }  # fmt: skip
    for keyword in draw(st.sets(st.sampled_from(sorted(values)))):
        setattr(dataset, keyword, draw(values[keyword]))
    if depth == 3:
        dataset.PixelRepresentation = 0
    if depth:
        tags = ("SharedFunctionalGroupsSequence", "AnatomicRegionSequence", "ReferencedImageSequence", 0x00091001)
        for tag in draw(st.sets(st.sampled_from(tags))):
            items = draw(st.lists(data_sets(depth - 1), max_size=3))
            for item in items:
                item.is_undefined_length_sequence_item = draw(st.booleans())
            if isinstance(tag, int):
                dataset.add_new(0x00090010, "LO", "PRIVATE")
                dataset.add_new(tag, "SQ", Sequence(items))
                dataset[tag].is_undefined_length = draw(st.booleans())
            else:
                setattr(dataset, tag, Sequence(items))
                dataset[tag].is_undefined_length = draw(st.booleans())
    return dataset


def agree(elements: Elements, dataset: Dataset) -> None:
    for keyword in TEXTS:
        assert elements.text(keyword) == str(dataset.get(keyword) or ""), keyword
    for keyword in NUMBERS:
        value = dataset.get(keyword)
        if value is None and elements.encoding[0] and keyword == "RevolutionTime":
            continue
        expected = None if value is None else tuple(value) if keyword == "ImagePositionPatient" else (value,)
        if keyword != "RevolutionTime" or not elements.encoding[0]:  # implicit FD is not told from text; none is read
            assert elements.numbers(keyword) == expected, keyword
    assert elements.short("Rows") == dataset.get("Rows")
    for keyword in SEQUENCES:
        assert (keyword in elements) == (keyword in dataset)
        items = elements.items(keyword)
        assert len(items) == len(dataset.get(keyword, ()))
        assert (elements.first(keyword) is None) == (not items)
        for item, expected_item in zip(items, dataset.get(keyword, ()), strict=True):
            agree(item, expected_item)


@pytest.mark.slow
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(dataset=data_sets(), syntax=st.sampled_from(SYNTAXES), pixels=st.booleans())
def test_what_pydicom_writes_reads_as_it_reads_it(dataset: Dataset, syntax: str, pixels: bool) -> None:
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID, dataset.file_meta.MediaStorageSOPInstanceUID = "1.2", "1.3"
    if pixels:
        dataset.add_new(0x7FE00010, "OW", b"\1\0" * 50)
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    stream.seek(0)
    expected = dcmread(stream)

    parsed = parse_buffer(stream.getvalue(), WANTED)

    assert parsed.syntax == syntax
    assert parsed.elements.problems == []
    agree(parsed.elements, expected)
    if len(expected):
        assert parsed.elements.encoding == (syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian)
    rest = (parsed.inflated or stream.getvalue())[parsed.position :]
    assert rest[:4] == (
        b"" if not pixels else b"\x7f\xe0\0\x10" if syntax == ExplicitVRBigEndian else b"\xe0\x7f\x10\0"
    )


# What the first part of an instance says


@pytest.mark.parametrize("whole", SEEDS[:6] + SEEDS[8:14])
def test_a_part_says_that_it_is_too_short_or_has_the_same_header(whole: bytes) -> None:
    header = read_header(whole)
    outcomes = []
    for cut in range(len(whole) + 1):
        try:
            assert read_header(memoryview(whole)[:cut], complete=False) == header
            outcomes.append(True)
        except HeaderCutOff:
            outcomes.append(False)
    pixels = max(whole.rfind(b"\xe0\x7f\x10\0"), whole.rfind(b"\x7f\xe0\0\x10"))
    head = 8 if whole[pixels + 4 : pixels + 6] != b"OW" else 12
    assert outcomes == [cut >= pixels + head for cut in range(len(whole) + 1)]


@pytest.mark.parametrize("deflated", [SEEDS[6], SEEDS[14]])
def test_a_deflated_part_is_always_too_short(deflated: bytes) -> None:
    assert read_header(deflated).sop_instance_uid == "1.2.3"
    for part in (deflated, deflated[:-1], deflated[:400]):
        with pytest.raises(HeaderCutOff):
            read_header(part, complete=False)
    with pytest.raises(HeaderCutOff):
        read_header(deflated[:-1])


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_an_instance_without_pixels_is_whole_or_not_as_the_caller_says(syntax: str) -> None:
    seed = dcmread(io.BytesIO(SEEDS[0]))
    dataset = Dataset()  # of no encoding yet: pydicom does not turn one byte order into the other
    dataset.file_meta = seed.file_meta
    for element in seed:
        if element.keyword != "PixelData":
            dataset.add(element)
    stream = io.BytesIO()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(stream, enforce_file_format=True)
    assert read_header(stream.getvalue()).rows == 1
    with pytest.raises(HeaderCutOff):
        read_header(stream.getvalue(), complete=False)


def test_what_is_cut_off_within_an_element_is_refused() -> None:
    """pydicom takes the rest for the value: a UID, a shorter one. Fewer bytes than an element has are padding."""
    whole = instance(IDENTITY + SERIES)
    for tail in (raw(0x00400254, "LO", b"abcd", 5), raw(0x00091001, "UN", b"", 2), raw(0x00200011, "IS", b"", 2)):
        with pytest.raises(HeaderCutOff, match="cut off within its header"):
            read_header(whole + tail)
    with pytest.raises(HeaderCutOff):
        read_header(instance(IDENTITY + SERIES[:-11]))
    assert read_header(whole + bytes(7)) == read_header(whole)
    assert issubclass(HeaderCutOff, HeaderError)


@pytest.mark.parametrize("size", [10, FIRST_READ - 800, FIRST_READ, 3 * FIRST_READ])
def test_a_file_is_read_as_far_as_its_header_goes(tmp_path: Path, size: int) -> None:
    path = tmp_path / "long.dcm"
    private = raw(0x00091001, "UN", bytes(size))
    content = instance(IDENTITY + private + SERIES + PIXELS + bytes(4 * FIRST_READ))
    path.write_bytes(content)
    assert read_header(path) == read_header(content) == read_header(io.BytesIO(content))
    with path.open("rb") as file:
        parsed = parse_file(file, WANTED)
        assert content[parsed.position :].startswith(PIXELS)
        assert (file.tell() == len(content)) == (size > FIRST_READ - 800)
    with pytest.raises(HeaderCutOff) as caught:
        path.write_bytes(content[: content.index(private) + size])
        read_header(path)
    assert caught.value.where == str(path)


def test_a_view_is_neither_kept_nor_copied(ge_head: Path) -> None:
    content = bytearray((ge_head / "14.dcm").read_bytes())
    content += bytes(32 << 20)
    view = memoryview(content)
    tracemalloc.start()
    header = read_header(view)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    view.release()
    content += b"x"  # a BufferError if anything still held on to it
    assert header == read_header(ge_head / "14.dcm")


# Encodings that belie what was promised


@pytest.mark.parametrize("declared", SYNTAXES[:2])
@pytest.mark.parametrize("real", SYNTAXES[:2])
def test_the_bytes_decide_over_the_transfer_syntax(declared: str, real: str) -> None:
    whole = SEEDS[SYNTAXES.index(real) * 2 + 8]
    header = read_header(whole)
    changed = bytearray(whole)
    at = whole.index(real.encode())
    uid = declared.encode().ljust(20, b"\0")
    length = int.from_bytes(whole[at - 2 : at], "little")
    changed[at - 2 : at + length] = (20).to_bytes(2, "little") + uid
    belied = read_header(bytes(changed)).to_json()
    assert belied.pop("transfer_syntax_uid") == declared
    assert belied.items() <= header.to_json().items()
    assert len(header.frames) == 2


@pytest.mark.parametrize("undefined", [True, False])
def test_a_sequence_of_unknown_vr_has_implicit_items(undefined: bool) -> None:
    """PS3.5 6.2.2: also one of more than 64 kB, which pydicom leaves unread."""
    for size in (6, 70_000):
        item = plain(ITEM, plain(0x00080104, b"Head") + plain(0x00091001, bytes(size)))
        value = item + plain(SEQUENCE_END, b"") if undefined else item
        header = header_with(raw(0x00082218, "UN", value, UNDEFINED if undefined else None))
        assert header.body_part_examined == "HEAD" and header.problems == ()


@pytest.mark.parametrize("undefined", [True, False])
def test_an_implicit_item_is_implicit_to_its_end(undefined: bool) -> None:
    """Also where a length looks like a VR ("LO" is 20,300): only the first element of an item is judged."""
    long = plain(0x00080115, bytes(int.from_bytes(b"LO", "little")))
    elements = plain(0x00080100, b"ab") + long + plain(0x00080104, b"Head")
    open_item = plain(ITEM, b"", UNDEFINED)
    item = open_item + elements + plain(ITEM_END, b"") if undefined else plain(ITEM, elements)
    for tag, text in ((0x00082218, "HEAD"), (0x00091001, "")):
        sequence = raw(tag, "UN", item + plain(SEQUENCE_END, b""), UNDEFINED)
        assert header_with(sequence).body_part_examined == text


def test_a_delimiter_too_many_is_an_empty_item() -> None:
    """As pydicom has it."""
    value = plain(ITEM, raw(0x00280010, "US", b"\x07\0")) + plain(ITEM_END, b"")
    for tail, length in ((b"", None), (plain(SEQUENCE_END, b""), UNDEFINED)):
        parsed = parse_buffer(instance(IDENTITY + raw(0x00082218, "SQ", value + tail, length) + PIXELS), WANTED)
        assert [item.short("Rows") for item in parsed.elements.items("AnatomicRegionSequence")] == [7, None]


def test_undefined_lengths_are_walked_however_they_are_written() -> None:
    end, item_end = plain(SEQUENCE_END, b""), plain(ITEM_END, b"")
    explicit = raw(0x00080104, "LO", b"Head")
    open_item = plain(ITEM, b"", UNDEFINED)
    for value in (
        plain(ITEM, explicit),
        open_item + explicit + item_end,
        plain(ITEM, explicit) + item_end,  # a delimiter too many is passed over
        open_item + raw(0x00089215, "SQ", open_item + item_end + end, UNDEFINED) + explicit + item_end,
        open_item + raw(0x00091001, "UN", open_item + plain(0x00091002, b"ab") + item_end + end, UNDEFINED) + explicit
        + item_end,
        open_item + raw(0x00091001, "OB", plain(ITEM, b"") + plain(ITEM, b"abcd") + end, UNDEFINED) + explicit
        + item_end,
        open_item + explicit + item_end + open_item + item_end,
    ):  # fmt: skip
        for wanted_tag in (0x00082218, 0x00091001):
            header = header_with(raw(wanted_tag, "SQ", value + end, UNDEFINED))
            assert header.body_part_examined == ("HEAD" if wanted_tag == 0x00082218 else "")


def test_implicit_undefined_lengths_are_told_by_the_dictionary_or_the_first_item() -> None:
    end = plain(SEQUENCE_END, b"")
    item = plain(ITEM, b"", UNDEFINED) + plain(0x00080104, b"Head") + plain(ITEM_END, b"")
    identity = plain(0x00080016, CTImageStorage.encode()) + plain(0x00080018, b"1.2.30")
    series = plain(0x0020000D, b"1.22") + plain(0x0020000E, b"1.24")
    for middle in (
        plain(0x00082218, item + end, UNDEFINED),
        plain(0x00091001, item + end, UNDEFINED),
        plain(0x00091001, end, UNDEFINED),
        plain(0x00082218, plain(ITEM, plain(0x00091001, item + end, UNDEFINED)) + end, UNDEFINED),
    ):
        header = read_header(instance(identity + middle + series + plain(0x7FE00010, b"\1\0"), ImplicitVRLittleEndian))
        assert header.series_instance_uid == "1.24"


@pytest.mark.parametrize(
    "value",
    [
        plain(0x00080104, b"Head"),
        plain(ITEM, b"", UNDEFINED) + plain(ITEM_END, b"") + b"no items",
        plain(ITEM, b"", UNDEFINED) + raw(0x00091001, "OB", b"not fragments", UNDEFINED),
        plain(ITEM, b"", UNDEFINED) + raw(0x00091001, "OB", plain(ITEM, b"", UNDEFINED), UNDEFINED),
    ],
)
def test_what_is_no_item_is_refused(value: bytes) -> None:
    for tag in (0x00082218, 0x00091001):
        with pytest.raises(HeaderError, match=r"no item|no fragments"):
            header_with(raw(tag, "SQ", value + plain(SEQUENCE_END, b""), UNDEFINED))


def test_what_is_longer_than_what_it_is_in_is_refused() -> None:
    region = raw(0x00080104, "LO", b"Head")
    for item in (
        plain(ITEM, raw(0x00080104, "LO", b"Head", 6)),
        plain(ITEM, region, len(region) + 2),
        plain(ITEM, region, UNDEFINED),
        plain(ITEM, b"")[:7],
    ):
        with pytest.raises(HeaderError, match="AnatomicRegionSequence is damaged") as caught:
            header_with(raw(0x00082218, "SQ", item))
        assert not isinstance(caught.value, HeaderCutOff), "more of the instance would not help"


# Quirks


def test_elements_out_of_order_repeated_or_of_a_length_nobody_may_send() -> None:
    header = header_with(
        raw(0x00280011, "US", b"\x20\0")
        + raw(0x00080000, "UL", b"\1\2\3\4")  # a group length, and wrong
        + raw(0x00081030, "LO", b"first")
        + raw(0x00081030, "LO", b"the last")
        + raw(0x0008103E, "LO", b"odd")
        + raw(0x00400254, "ZZ", b"a VR of a later edition")
        + plain(0x00181030, b"implicit among explicit")
    )
    assert (header.columns, header.study_description, header.series_description) == (32, "the last", "odd")
    assert header.protocol_name == "implicit among explicit"
    assert header.problems == ()


def test_a_sequence_where_a_value_belongs_is_no_value() -> None:
    for undefined in (False, True):
        value = plain(ITEM, b"", 0) + (plain(SEQUENCE_END, b"") if undefined else b"")
        length = UNDEFINED if undefined else None
        header = header_with(raw(0x00081030, "SQ", value, length) + raw(0x00280011, "SQ", value, length))
        assert header.study_description == "" and header.columns == 0
        assert [problem.split(":")[0] for problem in header.problems] == ["Columns", "StudyDescription"]


def test_a_sequence_of_two_bytes_is_no_number() -> None:
    header = header_with(raw(0x00280011, "SQ", b"\1\0"))
    assert header.columns == 0 and header.problems == ("Columns: 'a sequence' is not one 16-bit number",)


def test_a_value_where_a_sequence_belongs_is_no_sequence() -> None:
    header = header_with(raw(0x00082218, "LO", b"Head"))
    assert header.body_part_examined == ""
    assert header.problems == ("AnatomicRegionSequence: \"b'Head'\" is not a sequence",)


def test_items_inherit_the_character_set_or_have_their_own() -> None:
    item = raw(0x00080104, "LO", "Tête".encode())
    for own, outer, text in ((b"", b"ISO_IR 192", "TÊTE"), (b"ISO_IR 192", b"ISO_IR 100", "TÊTE"), (b"", b"", "TÃªTE")):
        own_element = raw(0x00080005, "CS", own) if own else b""
        outer_element = raw(0x00080005, "CS", outer) if outer else b""
        header = header_with(outer_element + raw(0x00082218, "SQ", plain(ITEM, own_element + item)))
        assert header.body_part_examined == text.upper()


@pytest.mark.parametrize(
    ("terms", "value", "text"),
    [
        (b"ISO_IR 100", "Tête".encode("latin-1"), "Tête"),
        (b"ISO-IR 100", "Tête".encode("latin-1"), "Tête"),
        (b"utf-8", "Tête".encode(), "Tête"),
        (b"GB18030", "头".encode("gb18030"), "头"),
        (b"\\ISO 2022 IR 149", b"\x1b$)C\xb1\xe8 A", "김 A"),
        (b"punycode", b"T\xeate-x", "Tête-x"),  # slow for the square of its length
        (b"undefined", b"T\xeate", "Tête"),
        (b"ISO_IR 192", b"T\xeate", "T\ufffdte"),
        (b"ISO_IR 192\\" * 50, "Tête".encode(), "Tête"),
        (b"", b"\xea" + b"\x1b" * 5000, "ê" + "\x1b" * 5000),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_character_sets(terms: bytes, value: bytes, text: str) -> None:
    header = header_with(raw(0x00080005, "CS", terms) + raw(0x00081030, "LO", value))
    assert header.study_description == text


# Hostile


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("vr", ["SQ", "UN"])
@pytest.mark.parametrize("tag", [0x00400275, 0x00082218, 0x52009229], ids=["not wanted", "wanted", "functional groups"])
def test_a_hundred_thousand_levels(tag: int, vr: str) -> None:
    opening = raw(tag, vr, b"", UNDEFINED) + plain(ITEM, b"", UNDEFINED)
    closing = plain(ITEM_END, b"") + plain(SEQUENCE_END, b"")

    def see(levels: int) -> None:
        nested = instance(IDENTITY + SERIES + opening * levels + closing * levels + PIXELS)
        assert read_header(nested).series_instance_uid == "1.24"
        with pytest.raises(HeaderCutOff):
            read_header(instance(IDENTITY + SERIES + opening * levels))

    see(100_000)
    tracemalloc.start()  # makes everything slow
    see(5_000)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.timeout(60)
def test_a_hundred_thousand_levels_of_implicit_vr() -> None:
    opening = plain(0x00400275, b"", UNDEFINED) + plain(ITEM, b"", UNDEFINED)
    identity = plain(0x00080016, CTImageStorage.encode()) + plain(0x00080018, b"1.2.30")
    closing = plain(ITEM_END, b"") + plain(SEQUENCE_END, b"")
    series = plain(0x0020000D, b"1.22") + plain(0x0020000E, b"1.24")
    data_set = identity + opening * 100_000 + closing * 100_000 + series
    assert read_header(instance(data_set, ImplicitVRLittleEndian)).series_instance_uid == "1.24"


@pytest.mark.parametrize("vr", ["UN", "OB", "SQ"])
@pytest.mark.parametrize("length", [0xFFFFFFFE, 0x80000000, 1 << 20])
def test_a_length_bomb_takes_no_memory(vr: str, length: int) -> None:
    bomb = instance(IDENTITY + SERIES + raw(0x00091001, vr, b"abcd", length))
    inner = instance(IDENTITY + SERIES + raw(0x00091001, "SQ", plain(ITEM, b"", length), UNDEFINED))
    tracemalloc.start()
    for source in (bomb, inner):
        with pytest.raises(HeaderCutOff):
            read_header(source)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


@pytest.mark.slow
def test_more_items_than_any_scanner_makes() -> None:
    most = raw(0x52009230, "SQ", plain(ITEM, b"") * MAXIMUM_ITEMS)
    assert header_with(most).frames == ()
    with pytest.raises(HeaderError, match=f"more than {MAXIMUM_ITEMS} items"):
        header_with(most + raw(0x52009230, "SQ", plain(ITEM, b"") * (MAXIMUM_ITEMS + 1)))


def frames(count: int, shared: bytes, frame: bytes = b"") -> bytes:
    number = str(count).encode()
    groups = raw(0x52009229, "SQ", plain(ITEM, shared)) + raw(0x52009230, "SQ", plain(ITEM, frame) * count)
    return raw(0x00280008, "IS", number + b" " * (len(number) % 2)) + groups


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "junk", [b"1 " * 500_000, b"\xff" * 1_000_000, b"\x1b" * 1_000_000], ids=["1 ", "ff", "escape"]
)
@pytest.mark.parametrize("where", ["thickness", "character set", "other items"])
def test_what_all_frames_share_is_not_read_again_for_each(junk: bytes, where: str) -> None:
    """A shared value of 1 MB and 50,000 frames of 8 bytes would be 50 GB."""
    thickness = raw(0x00180050, "UT", junk) if where == "thickness" else raw(0x00180050, "DS", b"\xff\xff")
    terms = raw(0x00080005, "UT", junk) if where == "character set" else b""
    others = plain(ITEM, b"") * (len(junk) // 8) if where == "other items" else b""
    measures = plain(ITEM, terms + thickness + raw(0x00280030, "DS", b"1\\1 ")) + others
    shared = (
        raw(0x00209113, "SQ", plain(ITEM, raw(0x00200032, "DS", b"1\\2\\3 ")))
        + raw(0x00209116, "SQ", plain(ITEM, raw(0x00200037, "DS", b"1\\0\\0\\0\\1\\0 ")))
        + raw(0x00289110, "SQ", measures)
    )
    header = header_with(frames(50_000, shared))
    assert len(header.frames) == 50_000 and header.frames[-1].thickness is None
    assert all(len(problem) < 200 for problem in header.problems)


@pytest.mark.timeout(60)
def test_values_of_undefined_length_are_not_searched_again_and_again() -> None:
    """Each would run through the same 100,000 fragments before it fails, in a reader that tries and then searches."""
    chain = plain(ITEM, b"") * 100_000
    jump = b"".join(raw(0x00091001, "OB", plain(ITEM, b"", 28 * (20_000 - n)), UNDEFINED) for n in range(20_000))
    with pytest.raises(HeaderError):
        read_header(instance(IDENTITY + SERIES + jump + chain))


@settings(max_examples=500, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_mutated_instances_keep_every_promise(seed: int) -> None:
    chance = random.Random(seed)
    check(mutate(chance.choice(SEEDS), SEEDS, chance))


@settings(max_examples=300, deadline=None)
@given(data_set=st.binary(max_size=200), syntax=st.sampled_from(SYNTAXES))
def test_random_bytes_keep_every_promise(data_set: bytes, syntax: str) -> None:
    check(data_set)
    check(instance(data_set, syntax))
    check(instance(IDENTITY + SERIES + data_set, syntax))
