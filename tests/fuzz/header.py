"""Fuzz `read_header`: python tests/fuzz/header.py --seconds N [corpus folder]

With atheris (in an environment that has it and pydicom) it is guided by coverage; without, a plain loop mutates the
seeds. An input that breaks a promise is written to the working directory and ends the run with exit code 1 (77 by
atheris). Beside the corpus lie the files that atheris finds; a corpus can be given again to go on from it.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
import tempfile
import time
import zlib
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

try:
    import atheris
except ImportError:
    atheris = None

if atheris is None:
    from dicom_io.errors import HeaderCutOff, HeaderError
    from dicom_io.header import Header, read_header
else:
    with atheris.instrument_imports(include=["dicom_io"]):
        from dicom_io.errors import HeaderCutOff, HeaderError
        from dicom_io.header import Header, read_header

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

SECONDS_A_MEGABYTE = 5.0  # no input may take longer (and none less than one second); far above what is usual

# What a mutation puts in: delimiters, lengths and VRs that lead somewhere, numbers and text that are none.
WORDS = (
    b"\xfe\xff\x00\xe0", b"\xfe\xff\x0d\xe0", b"\xfe\xff\xdd\xe0", b"\xff\xfe\xe0\x00", b"\xff\xfe\xe0\xdd",
    b"\xff\xff\xff\xff", b"\xff\xff", b"\0\0\0\0", b"\0\0", b"\x08\0\0\0", b"\0\0\0\x80", b"SQ\0\0\xff\xff\xff\xff",
    b"UN\0\0\xff\xff\xff\xff", b"SQ\0\0", b"UN\0\0", b"OB\0\0", b"UT\0\0", b"FD", b"FL", b"US", b"DS", b"zz", b"ZZ",
    b"\x08\0\x05\0CS", b"ISO_IR 192", b"ISO 2022 IR 87", b"\\ISO 2022 IR 58", b"\x1b$B", b"\x1b(B", b"\x1b",
    b"punycode", b"\xe0\x7f\x10\0", b"\x7f\xe0\0\x10", b"\x20\0\x13\x91", b"\x00\x52\x30\x92", b"\x00\x52\x29\x92",
    b"1.2.840.10008.1.2", b"1.2.840.10008.1.2.1", b"1.2.840.10008.1.2.2", b"1.2.840.10008.1.2.1.99", b"\\", b"nan",
    b"1e999", b"-0", b"..", b"\xff", b"\x80", b"\x28\0\x10\0",
)  # fmt: skip


def check(data: bytes) -> None:
    """AssertionError if `read_header` breaks a promise on these bytes."""
    started = time.process_time()  # not the clock, which also counts what other processes take
    try:
        header = read_header(data)
    except HeaderError as error:
        # `reading` hides what nobody foresaw in a HeaderError; only zlib's own error is foreseen.
        assert error.__cause__ is None or isinstance(error.__cause__, zlib.error), repr(error.__cause__)
        header = None
    else:
        assert Header.from_json(json.loads(json.dumps(header.to_json()))) == header
    taken = time.process_time() - started
    assert taken < 1 + SECONDS_A_MEGABYTE * len(data) / 1e6, f"{taken:.1f} s for {len(data)} bytes"
    for part in (data, data[: len(data) * 2 // 3]):
        try:
            assert read_header(memoryview(part), complete=False) == header, "a part of it has another header"
        except HeaderCutOff:
            pass
        except HeaderError:
            assert header is None, "a part of it is refused, the whole is not"


def seeds() -> list[bytes]:
    """Small instances in every encoding: an image, one with functional groups, both kinds of length."""
    found = []
    for enhanced in (False, True):
        for syntax in (
            ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian,
        ):  # fmt: skip
            for undefined in (False, True):
                stream = io.BytesIO()
                _instance(syntax, enhanced, undefined).save_as(stream, enforce_file_format=True)
                found.append(stream.getvalue())
    return found


def _instance(syntax: str, enhanced: bool, undefined: bool) -> Dataset:
    def sequence(*items: Dataset) -> Sequence:
        for item in items:
            item.is_undefined_length_sequence_item = undefined
        return Sequence(items)

    def item(**attributes: object) -> Dataset:
        one = Dataset()
        for keyword, value in attributes.items():
            setattr(one, keyword, value)
        return one

    dataset = item(
        SpecificCharacterSet="ISO_IR 100", ImageType=["ORIGINAL", "PRIMARY"], SOPClassUID=CTImageStorage,
        SOPInstanceUID="1.2.3", Modality="CT", StudyDescription="Tête", PatientName="A^B", PatientID="1",
        StudyInstanceUID="1.2", SeriesInstanceUID="1.2.4", InstanceNumber=1, SamplesPerPixel=1, Rows=1, Columns=1,
        PhotometricInterpretation="MONOCHROME2", BitsAllocated=16, BitsStored=16, HighBit=15, PixelRepresentation=0,
    )  # fmt: skip
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.add_new(0x00090010, "LO", "PRIVATE")
    dataset.add_new(0x00091001, "SQ", sequence(item(PatientID="x", ConceptNameCodeSequence=sequence(item()))))
    dataset.add_new(0x00091002, "UN", b"\xfe\xff\x00\xe0\0\0\0\0")
    dataset.AnatomicRegionSequence = sequence(item(CodeValue="1", CodeMeaning="Head"))
    if enhanced:
        position = sequence(item(ImagePositionPatient=[1, 2, 3]))
        shared = item(
            PlaneOrientationSequence=sequence(item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])),
            PixelMeasuresSequence=sequence(item(PixelSpacing=[0.5, 0.5], SliceThickness=5)),
            CTXRayDetailsSequence=sequence(item(KVP=120)),
            UnassignedSharedConvertedAttributesSequence=sequence(item(ConvolutionKernel="H31s")),
        )
        dataset.NumberOfFrames = 2
        dataset.SharedFunctionalGroupsSequence = sequence(shared)
        dataset.PerFrameFunctionalGroupsSequence = sequence(*(item(PlanePositionSequence=position) for _ in range(2)))
    else:
        dataset.ImagePositionPatient, dataset.ImageOrientationPatient = [1, 2, 3], [1, 0, 0, 0, 1, 0]
        dataset.PixelSpacing, dataset.SliceThickness, dataset.KVP = [0.5, 0.5], 5, 120
    for element in dataset.iterall():
        if element.VR == "SQ":
            element.is_undefined_length = undefined
    dataset.add_new(0x7FE00010, "OW", b"\1\0")
    return dataset


def mutate(data: bytes, corpus: list[bytes], chance: random.Random) -> bytes:
    """The bytes with one to eight changes."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 3, 8))):
        at = chance.randrange(len(changed) + 1)
        size = chance.choice((1, 2, 4, 8, 16, 64, 512))
        match chance.randrange(7):
            case 0:
                changed[at : at + 1] = bytes((chance.randrange(256),))
            case 1:
                word = chance.choice(WORDS)
                changed[at : at + len(word)] = word
            case 2:
                changed[at:at] = chance.choice(WORDS)
            case 3:
                del changed[at : at + size]
            case 4:
                changed[at:at] = changed[at : at + size] * chance.choice((1, 1, 2, 100))
            case 5:
                other = chance.choice(corpus)
                begin = chance.randrange(len(other))
                changed[at:at] = other[begin : begin + size]
            case _:
                if chance.random() < 0.1:
                    del changed[at:]
    return bytes(changed[: 1 << 16])


def _loop(corpus: list[bytes], seconds: float) -> int:
    seed = time.time_ns()
    chance = random.Random(seed)
    print(f"no atheris: plain mutations of {len(corpus)} inputs, seed {seed}", flush=True)
    count, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        data = mutate(chance.choice(corpus), corpus, chance)
        count += 1
        try:
            check(data)
        except Exception:
            path = Path(f"crash-{sha256(data).hexdigest()[:16]}")
            path.write_bytes(data)
            print(f"input {count} breaks a promise: {path}", flush=True)
            raise
    print(f"{count} inputs, none breaks a promise", flush=True)
    return 0


def _guided(folder: Path, seconds: float) -> None:
    words = folder.parent / f"{folder.name}.dict"
    words.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in WORDS))
    options = [f"-max_total_time={int(seconds)}", "-max_len=65536", "-timeout=20", "-rss_limit_mb=2048"]
    atheris.Setup([sys.argv[0], str(folder), f"-dict={words}", *options, "-print_final_stats=1"], check)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("corpus", type=Path, nargs="?")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.corpus or Path(temporary) / "corpus"
        folder.mkdir(parents=True, exist_ok=True)
        for data in seeds():
            (folder / sha256(data).hexdigest()[:16]).write_bytes(data)
        if atheris is not None:
            _guided(folder, options.seconds)
        return _loop([path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()], options.seconds)


if __name__ == "__main__":
    sys.exit(main())
