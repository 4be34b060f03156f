"""What is read of performed steps and notifications: against pydicom, hostile bytes, and a server's answers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from dicom_io._dimse import Command, Field, decode, encode
from dicom_io._upper_layer import p_data
from dicom_io.handlers import Answer, Session
from dicom_io.performed import (
    MAXIMUM_NAMED,
    Availability,
    Named,
    NewStep,
    PerformedError,
    Request,
    StepChange,
    read_availability,
    read_new_step,
    read_step_change,
)
from dicom_io.sop_classes import AVAILABILITY, PERFORMED_STEP
from tests.dicom_io.support import Recorder, serving
from tests.dicom_io.test_scp_hostile import RELEASE, raw, read_pdu, read_status, request

SYNTAXES = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian)
READERS: tuple[Callable[[str, bytes, str], Request], ...] = (read_new_step, read_step_change, read_availability)
STEP = "1.2.7"

uids = st.lists(st.integers(0, 10**12), min_size=2, max_size=4).map(lambda parts: "1." + ".".join(map(str, parts)))
named = st.dictionaries(uids, st.lists(uids, max_size=4, unique=True).map(tuple), max_size=3)
some_named = st.dictionaries(uids, st.lists(uids, min_size=1, max_size=4, unique=True).map(tuple), min_size=1)


def written(data_set: Dataset, syntax: str = ExplicitVRLittleEndian) -> bytes:
    stream = DicomBytesIO()
    stream.is_implicit_VR = syntax == ImplicitVRLittleEndian
    stream.is_little_endian = syntax != ExplicitVRBigEndian
    write_dataset(stream, data_set)
    return stream.getvalue()


def item(**attributes: Any) -> Dataset:
    one = Dataset()
    for keyword, value in attributes.items():
        setattr(one, keyword, value)
    return one


def references(instances: tuple[str, ...], **more: Any) -> list[Dataset]:
    return [item(ReferencedSOPClassUID=CTImageStorage, ReferencedSOPInstanceUID=uid, **more) for uid in instances]


def performed_series(series: Named) -> Sequence:
    """Half of the instances as images, half as something else."""
    return Sequence(
        item(
            PerformingPhysicianName="",
            SeriesDescription="HEAD",
            SeriesInstanceUID=uid,
            ProtocolName="HEAD",
            ReferencedImageSequence=references(instances[: len(instances) // 2]),
            ReferencedNonImageCompositeSOPInstanceSequence=references(instances[len(instances) // 2 :]),
        )
        for uid, instances in series.items()
    )


def new_step(study: str = "1.2.3", status: str = "IN PROGRESS", series: Named | None = None) -> Dataset:
    return item(
        PatientName="Nobody^At All",
        PerformedProcedureStepID="1",
        Modality="CT",
        ScheduledStepAttributesSequence=[item(StudyInstanceUID=study, AccessionNumber="")],
        PerformedProcedureStepStatus=status,
        PerformedSeriesSequence=performed_series(series or {}),
    )


def change(status: str | None = "COMPLETED", series: Named | None = None) -> Dataset:
    data_set = Dataset()
    if status is not None:
        data_set.PerformedProcedureStepStatus = status
    if series is not None:
        data_set.PerformedSeriesSequence = performed_series(series)
    return data_set


def notification(series: Named, study: str = "1.2.3", availability: str = "ONLINE") -> Dataset:
    more = {"InstanceAvailability": availability, "RetrieveAETitle": "PACS"}
    return item(
        StudyInstanceUID=study,
        ReferencedPerformedProcedureStepSequence=[],
        ReferencedSeriesSequence=[
            item(SeriesInstanceUID=uid, ReferencedSOPSequence=references(instances, **more))
            for uid, instances in series.items()
        ],
    )


def undefined(data_set: Dataset) -> Dataset:
    """With every sequence and item of undefined length."""
    for element in data_set:
        if element.VR == "SQ":
            element.is_undefined_length = True
            for one in element.value:
                one.is_undefined_length_sequence_item = True
                undefined(one)
    return data_set


# --- what is read -------------------------------------------------------------------------------------------


@given(study=uids, series=named, syntax=st.sampled_from(SYNTAXES), open_ended=st.booleans())
def test_a_new_step_is_what_pydicom_wrote(study: str, series: Named, syntax: str, open_ended: bool) -> None:
    data_set = new_step(study, series=series)
    data = written(undefined(data_set) if open_ended else data_set, syntax)
    assert read_new_step(STEP, data, syntax) == NewStep(STEP, study, series)


@given(
    status=st.sampled_from([None, "IN PROGRESS", "COMPLETED", "DISCONTINUED"]),
    series=st.none() | named,
    syntax=st.sampled_from(SYNTAXES),
    open_ended=st.booleans(),
)
def test_a_change_is_what_pydicom_wrote(
    status: str | None, series: Named | None, syntax: str, open_ended: bool
) -> None:
    data_set = change(status, series)
    data = written(undefined(data_set) if open_ended else data_set, syntax)
    assert read_step_change(STEP, data, syntax) == StepChange(STEP, status, series)


@given(study=uids, series=some_named, syntax=st.sampled_from(SYNTAXES), open_ended=st.booleans())
def test_a_notification_is_what_pydicom_wrote(study: str, series: Named, syntax: str, open_ended: bool) -> None:
    data_set = notification(series, study)
    data = written(undefined(data_set) if open_ended else data_set, syntax)
    assert read_availability(STEP, data, syntax) == Availability(STEP, study, series, 0)


@pytest.mark.parametrize(("availability", "exists"), [("NEARLINE", True), ("OFFLINE", True), ("UNAVAILABLE", False)])
def test_what_cannot_be_had_is_only_counted(availability: str, exists: bool) -> None:
    data = written(notification({"1.2": ("1.2.1", "1.2.2")}, availability=availability))
    read = read_availability(STEP, data, ExplicitVRLittleEndian)
    assert (read.series, read.unavailable) == (({"1.2": ("1.2.1", "1.2.2")}, 0) if exists else ({}, 2))


def test_a_series_that_is_named_twice_is_one() -> None:
    data_set = change(series={"1.2": ("1.2.1", "1.2.2")})
    data_set.PerformedSeriesSequence.extend(performed_series({"1.2": ("1.2.2", "1.2.3")}))
    read = read_step_change(STEP, written(data_set), ExplicitVRLittleEndian)
    assert read.series == {"1.2": ("1.2.1", "1.2.2", "1.2.3")}


def test_a_step_for_several_orders_of_one_study() -> None:
    data_set = new_step()
    data_set.ScheduledStepAttributesSequence.append(item(StudyInstanceUID="1.2.3", AccessionNumber="2"))
    assert read_new_step(STEP, written(data_set), ExplicitVRLittleEndian).study_instance_uid == "1.2.3"


# --- what is wrong ------------------------------------------------------------------------------------------


def without(data_set: Dataset, *path: str | int) -> Dataset:
    """Take away what the path leads to: keywords, and places in sequences."""
    inner: Any = data_set
    for part in path[:-1]:
        inner = inner[part] if isinstance(part, int) else getattr(inner, part)
    delattr(inner, str(path[-1]))
    return data_set


def two_studies() -> Dataset:
    data_set = new_step()
    data_set.ScheduledStepAttributesSequence.append(item(StudyInstanceUID="1.2.4"))
    return data_set


ONE = {"1.2": ("1.2.1",)}
STUDY, REFERENCE = "StudyInstanceUID", ("ReferencedSeriesSequence", 0, "ReferencedSOPSequence", 0)


@pytest.mark.parametrize(
    ("read", "data_set", "status", "complaint"),
    [
        (read_new_step, Dataset(), 0x0120, "ScheduledStepAttributesSequence is missing"),
        (read_new_step, item(ScheduledStepAttributesSequence=[]), 0x0121, "ScheduledStepAttributesSequence is empty"),
        (read_new_step, without(new_step(), "ScheduledStepAttributesSequence", 0, STUDY), 0x0120, f"{STUDY} is miss"),
        (read_new_step, new_step(""), 0x0121, f"{STUDY} is empty"),
        (read_new_step, new_step("1.2.x"), 0x0106, f"{STUDY}: '1.2.x' is not a UID"),
        (read_new_step, two_studies(), 0x0106, "2 studies in one step"),
        (read_new_step, without(new_step(), "PerformedProcedureStepStatus"), 0x0120, "StepStatus is missing"),
        (read_new_step, new_step(status=""), 0x0121, "PerformedProcedureStepStatus is empty"),
        (read_new_step, new_step(status="COMPLETED"), 0x0106, "'COMPLETED' is not IN PROGRESS"),
        (read_new_step, new_step(series={"1.2": ("x",)}), 0x0106, "ReferencedSOPInstanceUID: 'x' is not a UID"),
        (read_step_change, change("DONE"), 0x0106, "'DONE' is not IN PROGRESS or COMPLETED or DISCONTINUED"),
        (read_step_change, change(""), 0x0121, "PerformedProcedureStepStatus is empty"),
        (read_step_change, item(PerformedSeriesSequence=[Dataset()]), 0x0120, "SeriesInstanceUID is missing"),
        (read_step_change, change(series={"": ()}), 0x0121, "SeriesInstanceUID is empty"),
        (read_availability, without(notification(ONE), STUDY), 0x0120, f"{STUDY} is missing"),
        (read_availability, notification({}), 0x0121, "ReferencedSeriesSequence is empty"),
        (read_availability, notification({"1.2": ()}), 0x0121, "ReferencedSOPSequence is empty"),
        (read_availability, notification(ONE, availability="GONE"), 0x0106, "'GONE' is not ONLINE or NEARLINE"),
        (read_availability, without(notification(ONE), *REFERENCE, "InstanceAvailability"), 0x0120, "is missing"),
        (read_availability, without(notification(ONE), *REFERENCE, "ReferencedSOPInstanceUID"), 0x0120, "is missing"),
    ],
)
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_what_is_wrong_is_named(
    read: Callable[[str, bytes, str], Request], data_set: Dataset, status: int, complaint: str, syntax: str
) -> None:
    with pytest.raises(PerformedError, match=complaint) as error:
        read(STEP, written(data_set, syntax), syntax)
    assert error.value.status == status
    assert error.value.where and error.value.remedy


def test_a_sequence_that_is_none_is_named() -> None:
    data = written(change("IN PROGRESS")) + b"\x40\x00\x40\x03US\x02\x00\x07\x00"
    with pytest.raises(PerformedError, match=r"PerformedSeriesSequence: .* is not a sequence") as error:
        read_step_change(STEP, data, ExplicitVRLittleEndian)
    assert error.value.status == 0x0106


@pytest.mark.slow
def test_no_more_is_read_than_is_bounded() -> None:
    many = tuple(f"1.2.{number}" for number in range(MAXIMUM_NAMED))
    most = {"1.2": many[1:]}  # the series counts, too
    assert read_step_change(STEP, written(change(series=most)), ExplicitVRLittleEndian).series == most
    too_many = (
        (read_step_change, change(series={"1.2": many})),
        (read_step_change, change(series=dict.fromkeys(("1.2", *many), ()))),
        (read_availability, notification({"1.2": ("1.2", *many)}, availability="UNAVAILABLE")),
    )
    for read, data_set in too_many:
        with pytest.raises(PerformedError, match=f"more than {MAXIMUM_NAMED}") as error:
            read(STEP, written(data_set), ExplicitVRLittleEndian)
        assert error.value.status == 0x0213


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_change_that_is_cut_off_names_no_fewer_instances(syntax: str) -> None:
    status, series = written(change()), {"1.2": ("1.2.1", "1.2.2"), "1.3": ("1.3.1",)}
    whole = written(change(series=series), syntax)
    for length in range(1, len(whole)):
        if length == len(status):
            continue  # between two elements: a whole data set, and the series stay what they were
        with pytest.raises(PerformedError) as error:
            read_step_change(STEP, whole[:length], syntax)
        assert error.value.status == 0x0110


@pytest.mark.parametrize("tail", [b"\xfe\xff\x0d\xe0\0\0\0\0", b"\xfe\xff\x0d\xe0\0\0\0\0more", b"\0" * 7])
def test_what_follows_the_data_set_is_no_part_of_it(tail: bytes) -> None:
    with pytest.raises(PerformedError, match="damaged or cut off"):
        read_step_change(STEP, written(change()) + tail, ExplicitVRLittleEndian)


@given(data=st.binary(max_size=400), syntax=st.sampled_from(SYNTAXES), read=st.sampled_from(READERS))
def test_any_bytes_are_a_request_or_one_error(
    data: bytes, syntax: str, read: Callable[[str, bytes, str], Request]
) -> None:
    try:
        read(STEP, data, syntax)
    except PerformedError as error:
        assert error.what


@settings(max_examples=400)
@given(
    changes=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), min_size=1, max_size=6),
    syntax=st.sampled_from(SYNTAXES),
    which=st.integers(0, 2),
)
def test_a_damaged_request_is_one_of_uids_or_one_error(changes: list[tuple[int, int]], syntax: str, which: int) -> None:
    series = {"1.2": ("1.2.1", "1.2.2"), "1.3": ("1.3.1",)}
    data = bytearray(written((new_step(series=series), change(series=series), notification(series))[which], syntax))
    for place, value in changes:
        data[place % len(data)] = value
    try:
        found = READERS[which](STEP, bytes(data), syntax)
    except PerformedError as error:
        assert error.status in (0x0106, 0x0110, 0x0120, 0x0121)
        return
    for uid, instances in (found.series or {}).items():
        assert set("".join((uid, *instances))) <= set("0123456789.")


@pytest.mark.parametrize("depth", [30, 20_000])
@pytest.mark.parametrize("end", [b"", b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"])
def test_sequences_without_end_are_an_error(depth: int, end: bytes) -> None:
    nested = b"\x40\x00\x40\x03SQ\x00\x00\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * depth
    with pytest.raises(PerformedError) as error:
        read_step_change(STEP, written(change()) + nested + end * depth, ExplicitVRLittleEndian)
    assert error.value.remedy


# --- what a server answers ----------------------------------------------------------------------------------


def message(command: Command, data_set: Dataset | None) -> bytes:
    data = b"" if data_set is None else p_data(1, written(data_set, ImplicitVRLittleEndian), command=False, maximum=0)
    return p_data(1, encode(command), command=True, maximum=0) + data


def n_create(data_set: Dataset | None, sop_class: str = PERFORMED_STEP, uid: str = STEP) -> bytes:
    kind = 0x0101 if data_set is None else 1
    return message(
        Command(Field.N_CREATE_RQ, 7, data_set_type=kind, affected_class=sop_class, affected_instance=uid), data_set
    )


def n_set(data_set: Dataset, sop_class: str = PERFORMED_STEP, uid: str = STEP) -> bytes:
    return message(
        Command(Field.N_SET_RQ, 7, data_set_type=1, requested_class=sop_class, requested_instance=uid), data_set
    )


@pytest.mark.parametrize(
    ("context", "stream", "expected"),
    [
        (PERFORMED_STEP, n_create(new_step(series=ONE)), NewStep(STEP, "1.2.3", ONE)),
        (PERFORMED_STEP, n_set(change(series=ONE)), StepChange(STEP, "COMPLETED", ONE)),
        (AVAILABILITY, n_create(notification(ONE), AVAILABILITY), Availability(STEP, "1.2.3", ONE, 0)),
        (PERFORMED_STEP, n_create(None), 0x0120),
        (PERFORMED_STEP, n_create(new_step(status="COMPLETED")), 0x0106),
        (PERFORMED_STEP, n_create(new_step(), uid=""), 0x0117),
        (PERFORMED_STEP, n_set(change(), uid="x"), 0x0117),
        (PERFORMED_STEP, n_create(notification(ONE), AVAILABILITY), 0x0122),
        (AVAILABILITY, n_create(new_step()), 0x0122),
        (AVAILABILITY, n_set(change(), AVAILABILITY), 0x0211),
        (CTImageStorage, n_create(new_step()), 0x0122),
        (CTImageStorage, n_create(new_step(), CTImageStorage), 0x0122),
    ],
)
def test_a_request_is_handed_on_or_refused_and_told(context: str, stream: bytes, expected: Request | int) -> None:
    recorder = Recorder()
    with serving(recorder) as server, raw(server, request((1, context))) as connection:
        connection.sendall(stream)
        status = read_status(connection)
        connection.sendall(RELEASE)
        recorder.wait(closed=1)
    refused = [one.status for one in recorder.performed_refusals]
    if isinstance(expected, int):
        assert (status, refused, recorder.performed_calls) == (expected, [expected], [])
    else:
        assert (status, refused, recorder.performed_calls) == (0, [], [expected])


def test_an_image_is_not_stored_where_steps_are_told() -> None:
    recorder = Recorder()
    store = Command(Field.C_STORE_RQ, 7, data_set_type=1, affected_class=PERFORMED_STEP, affected_instance=STEP)
    with serving(recorder) as server, raw(server, request((1, PERFORMED_STEP))) as connection:
        connection.sendall(message(store, change()))
        assert read_status(connection) == 0x0122
    assert recorder.received == []


def answer_to(recorder: Recorder, stream: bytes) -> Command:
    with serving(recorder) as server, raw(server, request((1, PERFORMED_STEP))) as connection:
        connection.sendall(stream)
        _, body = read_pdu(connection)
        return decode(body[6:])


def test_an_error_id_goes_with_its_answer() -> None:
    class Ended(Recorder):
        def performed(self, session: Session, request: Request) -> Answer:
            return Answer(0x0110, "it has ended", error_id=0xA710)

    answer = answer_to(Ended(), n_set(change()))
    assert (answer.field, answer.status, answer.error_id) == (0x8120, 0x0110, 0xA710)
    assert (answer.affected_instance, answer.affected_class, answer.comment) == (STEP, PERFORMED_STEP, "it has ended")
    assert answer_to(Recorder(), n_set(change())).error_id is None


@pytest.mark.parametrize("method", ["performed", "performed_refused"])
def test_a_handler_that_fails_is_a_failure_to_the_peer(method: str) -> None:
    recorder = Recorder()

    def fail(*_: object) -> None:
        raise RuntimeError("the ledger is gone")

    setattr(recorder, method, fail)
    answer = answer_to(recorder, n_create(new_step() if method == "performed" else None))
    assert (answer.status, answer.comment) == (0x0110, "RuntimeError")


def test_a_request_that_does_not_end_is_cut_off() -> None:
    recorder = Recorder()
    command = Command(Field.N_SET_RQ, 7, data_set_type=1, requested_class=PERFORMED_STEP, requested_instance=STEP)
    piece = p_data(1, bytes(100_000), command=False, maximum=0)
    piece = piece[:11] + b"\x00" + piece[12:]  # not the last one
    with serving(recorder) as server, raw(server, request((1, PERFORMED_STEP))) as connection:
        connection.sendall(p_data(1, encode(command), command=True, maximum=0))
        with suppress(OSError):  # it is cut off while we send
            for _ in range(60):
                connection.sendall(piece)
        recorder.wait(closed=1)
    assert recorder.closed_calls[0].outcome == "aborted"
    assert recorder.performed_calls == []
