"""One typed TOML file holds everything a site decides; every key is described here and nowhere else."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, IPvAnyNetwork, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from dicom_io import tls
from dicom_io.errors import ScansideError
from dicom_io.sop_classes import storage_classes

AE_TITLE = re.compile(r"[!-\[\]-~]([ -\[\]-~]{0,14}[!-\[\]-~])?")
AeTitle = Annotated[str, Field(min_length=1, max_length=16, pattern=f"^{AE_TITLE.pattern}$")]
"""PS3.5 6.2: at most 16 characters of the default repertoire, no backslash, no blank at either end."""

CODE = r"^[^\^]{1,16}\^[^\^]{1,16}(\^[^\^]{1,64})?$"
"""A code of a coding scheme, with its meaning or without."""

Port = Annotated[int, Field(ge=1, le=65535)]

SEARCH_PATH = (Path("scanside.toml"), Path("/etc/scanside/scanside.toml"))


class SettingsError(ScansideError):
    """A configuration file that cannot be used, with the key that is wrong."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Box(_Section):
    """What this box is."""

    name: str = Field("scanside", description="Name of this box, shown in findings and messages.")
    state_directory: Path = Field(
        Path("/var/lib/scanside"),
        description="Ledger, spool, findings and Triton's files. A relative path starts at this file.",
    )
    device: Literal["cpu", "gpu"] = Field("cpu", description="What models and decoders run on.")
    uid_root: str = Field(
        "2.25",
        pattern=r"^[0-2](\.(0|[1-9]\d*))+$",
        max_length=24,
        description="Root of the UIDs of findings; 2.25 derives them from UUIDs (PS3.5 B.2).",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="Least severe log line that is written to standard error."
    )


class Tls(_Section):
    """Intake over TLS, by the secure transport connection profiles of PS3.15 annex B."""

    port: Port = Field(tls.DEFAULT_PORT, description="DICOM port to listen on with TLS.")
    certificate: Path = Field(
        description="PEM file of our certificate, then its chain; read again when it changes. "
        "A relative path starts at this file."
    )
    key: Path = Field(description="PEM file of its private key, without a passphrase.")
    client_authorities: Path | None = Field(
        None, description="PEM file of the authorities that sign our senders' certificates; unset: none is asked for."
    )
    profile: tls.Profile = Field(
        "bcp195-rfc8996-9325", description="Profile of PS3.15 B.12, or of B.13 (modified-bcp195-rfc8996-9325)."
    )


class Hl7Tls(_Section):
    """HL7 over TLS, with the suites of PS3.15 annex B."""

    port: Port = Field(2576, description="MLLP port to listen on with TLS.")
    certificate: Path = Field(
        description="PEM file of our certificate, then its chain; read again when it changes. "
        "A relative path starts at this file."
    )
    key: Path = Field(description="PEM file of its private key, without a passphrase.")
    client_authorities: Path | None = Field(
        None, description="PEM file of the authorities that sign our senders' certificates; unset: none is asked for."
    )
    profile: tls.Profile = Field(
        "bcp195-rfc8996-9325", description="Profile of PS3.15 B.12, or of B.13 (modified-bcp195-rfc8996-9325)."
    )


class Hl7Intake(_Section):
    """How orders, patients' data and reports come in over HL7."""

    port: Port = Field(2575, description="MLLP port to listen on.")
    plain: bool = Field(
        True, description="Listen on that port, without encryption; false: only [intake.hl7.tls] listens."
    )
    maximum_connections: int = Field(32, ge=1, le=1000, description="More are closed at once.")
    maximum_connections_per_address: int = Field(16, ge=1, le=1000, description="So many of them from one address.")
    maximum_message_bytes: int = Field(
        1 << 20, ge=1024, le=64 << 20, description="A longer message is refused and its connection closed."
    )
    message_seconds: float = Field(
        30.0, gt=0, le=600, description="From the first byte of a message to its last, or its connection is closed."
    )
    idle_seconds: float = Field(
        0.0, ge=0, description="A connection without a message for so long is closed; 0: never."
    )
    accepted_addresses: list[IPvAnyNetwork] = Field(
        default_factory=list, description="Networks that may connect, such as 10.1.0.0/16; empty: every one."
    )
    processing_ids: list[Literal["P", "T", "D"]] = Field(
        default_factory=lambda: ["P"],  # type: ignore[arg-type]
        min_length=1,
        description="MSH-11 of what is taken: production, training, debugging.",
    )
    urgent_priorities: list[str] = Field(
        default_factory=lambda: ["S", "STAT"],
        description="Priorities of an order (TQ1-9, or ORC-7.6, OBR-27.6, OBR-5) whose study goes before all others.",
    )
    authority: str = Field(
        "",
        description="Who assigns patient IDs where a message or an image does not say (CX-4.1, IssuerOfPatientID).",
    )
    onset_codes: list[str] = Field(
        default_factory=lambda: ["11368-8"],
        description="Codes (OBX-3.1) of an order's observation that tells when it began, as a time or in hours ago; "
        "by default LOINC's Illness or injury onset date and time.",
    )
    keep_days: float = Field(
        30.0, gt=0, description="The text of a message goes after so many days; what it said of an order stays."
    )
    tls: Hl7Tls | None = Field(None, description="Listen with TLS, too.")

    @model_validator(mode="after")
    def _something_listens(self) -> Hl7Intake:
        if not self.plain and self.tls is None:
            raise ValueError("plain is false and there is no [intake.hl7.tls]: nothing would listen")
        return self


class Intake(_Section):
    """How instances come in."""

    ae_title: AeTitle = Field("SCANSIDE", description="Our application entity title.")
    host: str = Field("0.0.0.0", description="Address to listen on.")
    port: Port = Field(11112, description="DICOM port to listen on.")
    plain: bool = Field(
        True,
        description="Listen on that port, without encryption; false: only [intake.tls] listens, and a port of the "
        "loopback for the self-test.",
    )
    storage_classes: list[str] = Field(
        default_factory=list,
        description="SOP classes taken beside those of a CT study: keywords such as MRImageStorage, UIDs, or all.",
    )
    maximum_associations: int = Field(64, ge=1, le=1000, description="More are refused for the moment.")
    maximum_associations_per_address: int = Field(
        32, ge=1, le=1000, description="So many of them from one address: a peer that hangs cannot shut out the others."
    )
    idle_seconds: float = Field(60.0, gt=0, le=3600, description="An association that is silent for so long is ended.")
    request_seconds: float = Field(
        10.0, gt=0, le=600, description="From a connection to its association request, or it is closed (ARTIM)."
    )
    minimum_bytes_per_second: int = Field(
        1000, ge=0, description="A message that takes longer than half a minute and is slower than this is aborted."
    )
    maximum_instance_bytes: int = Field(4 << 30, ge=1 << 20, description="A longer instance is aborted.")
    accepted_addresses: list[IPvAnyNetwork] = Field(
        default_factory=list, description="Networks that may connect, such as 10.1.0.0/16; empty: every one."
    )
    accepted_calling_ae_titles: list[AeTitle] = Field(
        default_factory=list, description="Who may send; empty: everybody."
    )
    require_called_ae_title: bool = Field(
        False, description="Refuse an association that does not call us by our own title."
    )
    reserve_percent: float = Field(
        5.0, ge=0, le=90, description="Below this share of free disk (or inodes) new instances are refused (0xA700)."
    )
    reserve_bytes: int = Field(
        2_000_000_000, ge=0, description="Below this much free disk new instances are refused, whatever its share."
    )
    metrics_port: Port | None = Field(
        None, description="Port that shows intake's figures to Prometheus (HTTP, /metrics); unset: none."
    )
    metrics_host: str = Field(
        "127.0.0.1", description="Address that it listens on: no password and no encryption guards it."
    )
    tls: Tls | None = Field(None, description="Listen with TLS, too.")
    hl7: Hl7Intake | None = Field(None, description="Listen for HL7 messages, too.")
    modality_worklist: ModalityWorklist | None = Field(
        None, description="The hospital's modality worklist, which is asked what the order of each study says."
    )

    @property
    def hears_orders(self) -> bool:
        """Whether orders come to this box at all."""
        return self.hl7 is not None or self.modality_worklist is not None

    @property
    def authority(self) -> str:
        """Who assigns patient IDs where neither a message nor an image says; "" if that is not known."""
        return self.hl7.authority if self.hl7 else ""

    @field_validator("storage_classes")
    @classmethod
    def _are_classes(cls, value: list[str]) -> list[str]:
        try:
            storage_classes(value)
        except ScansideError as error:
            raise ValueError(f"{error.what}; {error.remedy}") from error
        return value

    @model_validator(mode="after")
    def _something_listens(self) -> Intake:
        if not self.plain and self.tls is None:
            raise ValueError("plain is false and there is no [intake.tls]: nothing would listen")
        return self


class Study(_Section):
    """When a study counts as complete."""

    quiet_seconds: float = Field(
        20.0,
        gt=0,
        le=600,
        description="Last resort: complete when nothing came for this long and no better evidence did.",
    )
    settle_seconds: float = Field(
        1.0,
        ge=0,
        le=60,
        description="After the last association of a sender whose habit is not known yet (fewer than five studies), "
        "wait this long for a further one.",
    )
    wait_then_infer: bool = Field(
        False,
        description="Only to compare with systems that work so: nothing is done, and no evidence counts, before a "
        "study has been silent for quiet_seconds.",
    )
    stat_calling_ae_titles: list[AeTitle] = Field(
        default_factory=list, description="Studies from these senders go before all others."
    )


class Provisional(_Section):
    """Alerts on a study that is still arriving; the whole study confirms or withdraws them."""

    alerts: bool = Field(False, description="Whether such alerts are sent.")
    threshold: float = Field(0.95, gt=0, lt=1, description="Probability of haemorrhage that each slab must reach.")
    slabs: int = Field(3, ge=1, le=20, description="How many slabs next to one another must reach it.")


class Retention(_Section):
    """When the files of finished studies go. What is not finished, or went wrong, stays; see docs/operations.md."""

    start_percent: float = Field(
        15.0, ge=0, le=90, description="Below this share of free disk (or inodes) the oldest finished studies go …"
    )
    stop_percent: float = Field(20.0, ge=0, le=95, description="… until this share is free.")
    keep_hours: float = Field(
        72.0, ge=0, description="No study goes sooner after its completion, however full the disk is."
    )
    keep_days: float | None = Field(
        None, gt=0, description="A finished study goes after so many days even if there is room; unset: it stays."
    )
    troubled_days: float | None = Field(
        None,
        gt=0,
        description="A study with a dead or rejected delivery, or a failed analysis, counts as finished after so many "
        "days; unset: only once somebody retried or released it.",
    )

    @model_validator(mode="after")
    def _in_order(self) -> Retention:
        if self.stop_percent < self.start_percent:
            raise ValueError("stop_percent is below start_percent")
        for name, days in (("keep_days", self.keep_days), ("troubled_days", self.troubled_days)):
            if days is not None and days * 24 < self.keep_hours:
                raise ValueError(f"{name} is shorter than keep_hours")
        return self


class Triton(_Section):
    """The inference server."""

    managed: bool = Field(True, description="`scanside run` starts Triton itself; false: something else runs it.")
    environment: Path = Field(
        Path(".venv-triton"), description="Virtual environment that holds nvidia-pytriton (managed only)."
    )
    host: str = Field("127.0.0.1", description="Where Triton answers.")
    grpc_port: Port = Field(8001, description="Triton's gRPC port.")
    http_port: Port = Field(8000, description="Triton's HTTP port.")
    metrics_port: Port = Field(8002, description="Triton's metrics port.")
    request_seconds: float = Field(30.0, gt=0, le=600, description="Longest wait for one inference request.")
    cuda_memory: bool = Field(
        True,
        description="On a GPU, hand slabs to Triton in the GPU's memory; false: in the host's, for a Triton that "
        "cannot open memory of another process (a container needs --ipc=host).",
    )


class Models(_Section):
    """Which model packages run."""

    repository: Path | None = Field(
        None, description="Folder of model packages; unset: the packages that scanside ships."
    )
    trusted_keys: list[Path] | None = Field(
        None,
        description="Public keys (Ed25519, PEM files) whose packages run; unset: the one key that scanside ships.",
    )
    allow_unsigned: bool = Field(
        False,
        description="For development, never for patients: also run packages that nobody signed.",
    )
    packages: list[str] = Field(
        default_factory=lambda: ["ich_reference"], min_length=1, description="Names of the packages to run."
    )
    attempts: int = Field(3, ge=1, le=20, description="Tries of one analysis before it is set aside as failed.")


class Limit(_Section):
    """What this site asks beyond a package's label; it can only narrow the label."""

    model_config = ConfigDict(extra="allow", frozen=True)

    package: str = Field(description="Name of the model package; any key of its [indication] may stand beside it.")

    @property
    def keys(self) -> dict[str, Any]:
        """The label's keys with this site's values."""
        return dict(self.model_extra or {})


class ClientTls(_Section):
    """TLS for what we send: the peer's certificate must be of these authorities, and for the name that we call."""

    authorities: Path | None = Field(
        None, description="PEM file of the authorities that sign the peer's certificate; unset: those of this machine."
    )
    certificate: Path | None = Field(
        None, description="PEM file of our certificate, then its chain, for a peer that asks for one."
    )
    key: Path | None = Field(None, description="PEM file of its private key, without a passphrase.")

    @model_validator(mode="after")
    def _a_pair(self) -> ClientTls:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together")
        return self


class ModalityWorklist(_Section):
    """The hospital's modality worklist (C-FIND), which is asked what the order of a study says. Absent: none is."""

    ae_title: AeTitle = Field(description="Its application entity title.")
    host: str = Field(description="Its address.")
    port: Port = Field(description="Its DICOM port.")
    calling_ae_title: AeTitle | None = Field(None, description="What we call ourselves there; unset: as intake does.")
    answer_seconds: float = Field(10.0, gt=0, le=120, description="Longest wait for it, at each step.")
    give_up_seconds: float = Field(
        600.0, gt=0, le=86400, description="So long after its first image a study is asked about, until it is found."
    )
    urgent_priorities: list[str] = Field(
        default_factory=lambda: ["STAT"],
        description="Requested Procedure Priorities (0040,1003) whose study goes before all others.",
    )
    tls: ClientTls | None = Field(None, description="Speak DICOM over TLS (PS3.15 B.12).")


ObjectKind = Literal["report", "capture", "segmentation", "presentation", "selection"]
_PLAIN: tuple[ObjectKind, ...] = ("report", "capture")
_EVERYTHING: tuple[ObjectKind, ...] = get_args(ObjectKind)
SopClass = Literal[
    "Comprehensive3DSRStorage",
    "ComprehensiveSRStorage",
    "SecondaryCaptureImageStorage",
    "SegmentationStorage",
    "GrayscaleSoftcopyPresentationStateStorage",
    "KeyObjectSelectionDocumentStorage",
]
_CLASSES = (
    "SOP classes that it takes; nothing of another one is sent there. A report goes there as the first of "
    "Comprehensive3DSRStorage and ComprehensiveSRStorage that is named and that it does not decline, else the summary."
)
TransferSyntax = Literal[
    "ExplicitVRLittleEndian",
    "ImplicitVRLittleEndian",
    "DeflatedExplicitVRLittleEndian",
    "RLELossless",
    "JPEG2000Lossless",
]
_UNCOMPRESSED: tuple[TransferSyntax, ...] = ("ExplicitVRLittleEndian",)
_SYNTAXES = (
    "Transfer syntaxes to store in, the best first: an object goes in the first that it can have and that is accepted. "
    "RLELossless is for captures, JPEG2000Lossless for captures and segmentations. "
)
_OBJECTS = (
    "Which objects it receives, the first first: report (SR), capture (pictures: a summary and each key slab), "
    "segmentation (SEG), presentation (GSPS of each key slab), selection (key object selection). Where it takes no "
    "report, the summary goes there instead."
)


class DicomDestination(_Section):
    """A PACS or archive that findings are stored to."""

    kind: Literal["dicom"]
    name: str = Field(min_length=1, max_length=40, description="Name of the destination in the ledger.")
    ae_title: AeTitle = Field(description="Its application entity title.")
    host: str = Field(description="Its address.")
    port: Port = Field(description="Its DICOM port.")
    objects: list[ObjectKind] = Field(default_factory=lambda: list(_PLAIN), description=_OBJECTS)
    sop_classes: list[SopClass] = Field(default_factory=lambda: list(get_args(SopClass)), description=_CLASSES)
    transfer_syntaxes: list[TransferSyntax] = Field(
        default_factory=lambda: list(_UNCOMPRESSED),
        description=_SYNTAXES + "Implicit VR Little Endian is always offered, as the last.",
    )
    commitment: Literal["if_offered", "required", "no"] = Field(
        "if_offered",
        description="Storage commitment: a delivery is done once the peer has committed itself to keep it; if_offered: "
        "where it offers that, else once it is stored. Its report comes to intake, so it must know our address.",
    )
    commitment_seconds: float = Field(
        600.0, gt=0, le=86400, description="A report that takes longer is asked for anew."
    )
    refusals: bool = Field(
        False, description="Also store, once, a report of a study that was not analysed: that, and why."
    )
    tls: ClientTls | None = Field(None, description="Speak DICOM over TLS (PS3.15 B.12).")


class DicomwebDestination(_Section):
    """An archive that findings are stored to by STOW-RS."""

    kind: Literal["dicomweb"]
    name: str = Field(min_length=1, max_length=40, description="Name of the destination in the ledger.")
    url: str = Field(
        pattern=r"^(https://[^\s/]+(/\S*)?|http://(127\.0\.0\.1|localhost)(:\d+)?(/\S*)?)$",
        description="Its DICOMweb service, such as https://archive/dicom-web: https, or http to this machine.",
    )
    objects: list[ObjectKind] = Field(default_factory=lambda: list(_EVERYTHING), description=_OBJECTS)
    sop_classes: list[SopClass] = Field(default_factory=lambda: list(get_args(SopClass)), description=_CLASSES)
    transfer_syntaxes: list[TransferSyntax] = Field(
        default_factory=lambda: list(_UNCOMPRESSED),
        description=_SYNTAXES + "Explicit VR Little Endian is always tried, as the last.",
    )
    username: str = Field("", description="Name to log in with (Basic); empty: no such login.")
    password_file: Path | None = Field(None, description="File that holds the password, and nothing else.")
    token_file: Path | None = Field(None, description="File that holds a bearer token, and nothing else.")
    answer_seconds: float = Field(30.0, gt=0, le=300, description="Longest wait for each piece of the answer.")
    refusals: bool = Field(
        False, description="Also store, once, a report of a study that was not analysed: that, and why."
    )
    tls: ClientTls | None = Field(None, description="Whom we trust, and our own certificate.")

    @model_validator(mode="after")
    def _one_login(self) -> DicomwebDestination:
        if self.token_file is not None and (self.username or self.password_file is not None):
            raise ValueError("token_file and username do not go together")
        if bool(self.username) != (self.password_file is not None):
            raise ValueError("username and password_file go together")
        return self


_AFTER = Field(
    ge=0,
    le=86400,
    description="0: told at once. Else a step of the escalation: told of an alert only if it is not acknowledged so "
    "many seconds after the verdict.",
)
Identifier = Literal["accession", "study_uid", "patient_id", "patient_name", "birth_date"]
_INCLUDE = Field(
    description="What of the study is named beside its number on this box: accession, study_uid, patient_id, "
    "patient_name, birth_date.",
)


WorklistMode = Literal["reprioritise", "suggest"]
_MODE = (
    "reprioritise: a positive study goes to HIGH; suggest: it is only marked, in the comments, and a person moves it. "
    "A package that is not in clinical mode only suggests."
)


class Hl7Destination(_Section):
    """An interface engine that receives alerts."""

    kind: Literal["hl7"]
    name: str = Field(min_length=1, max_length=40, description="Name of the destination in the ledger.")
    after_seconds: Annotated[float, _AFTER] = 0.0
    host: str = Field(description="Its address.")
    port: Port = Field(description="Its MLLP port.")
    receiving_application: str = Field("", description="MSH-5.")
    receiving_facility: str = Field("", description="MSH-6.")
    sending_facility: str = Field("", description="MSH-4.")
    processing_id: Literal["P", "T", "D"] = Field(
        "P", description="MSH-11: production, training, debugging. Always T for a package not in clinical mode."
    )
    acknowledgement: Literal["original", "accept", "application"] = Field(
        "original",
        description="Original mode; or enhanced mode (MSH-15 AL), ended by the accept acknowledgement (MSH-16 NE) or "
        "by the application's, which follows it on the same connection (MSH-16 AL).",
    )
    acknowledge_seconds: float = Field(10.0, gt=0, le=300, description="Longest wait for the acknowledgement.")
    application_seconds: float = Field(
        30.0, gt=0, le=300, description="Longest wait for the application's acknowledgement after the accept one."
    )
    application_elsewhere: bool = Field(
        False, description="The application's acknowledgement may also come as a message of its own, to intake.hl7."
    )
    template: Path | None = Field(
        None,
        description="Jinja2 template that writes the message in this site's own form; unset: the standard one. "
        "A relative path starts at this file.",
    )
    study_link: str = Field(
        "",
        pattern=r"^(https?://([^\s{}]|\{(study_uid|accession|patient_id)\})+)?$",
        max_length=500,
        description="Address of the study in your viewer, such as https://viewer/?StudyInstanceUIDs={study_uid}; "
        "{accession} and {patient_id} stand for theirs; empty: none is sent.",
    )
    refusals: bool = Field(
        False, description="Also tell it, once and without an alert, of a study that was not analysed, and why."
    )
    tls: ClientTls | None = Field(None, description="Speak MLLP over TLS.")


class MailDestination(_Section):
    """A mail server that passes alerts on to people."""

    kind: Literal["mail"]
    name: str = Field(min_length=1, max_length=40, description="Name of the destination in the ledger.")
    after_seconds: Annotated[float, _AFTER] = 0.0
    host: str = Field(description="The server's address.")
    port: Port = Field(587, description="Its SMTP port.")
    security: Literal["starttls", "tls", "none"] = Field(
        "starttls", description="STARTTLS or nothing is sent; tls: TLS from the first byte; none: never over a network."
    )
    sender: str = Field(pattern=r"^[!-~]+@[!-~]+$", description="Address that the mail is from.")
    recipients: list[Annotated[str, Field(pattern=r"^[!-~]+@[!-~]+$")]] = Field(
        min_length=1, description="Addresses that it goes to."
    )
    username: str = Field("", description="Name to log in with; empty: no login.")
    password_file: Path | None = Field(None, description="File that holds the password, and nothing else.")
    include: Annotated[list[Identifier], _INCLUDE] = ["accession"]
    acknowledge_seconds: float = Field(20.0, gt=0, le=300, description="Longest wait for each answer of the server.")
    tls: ClientTls | None = Field(None, description="Whom we trust, and our own certificate.")


class WebhookDestination(_Section):
    """A service that takes alerts as signed JSON."""

    kind: Literal["webhook"]
    name: str = Field(min_length=1, max_length=40, description="Name of the destination in the ledger.")
    after_seconds: Annotated[float, _AFTER] = 0.0
    url: str = Field(
        pattern=r"^(https://[^\s/]+(/\S*)?|http://(127\.0\.0\.1|localhost)(:\d+)?(/\S*)?)$",
        description="Where alerts are posted: https, or http to this machine.",
    )
    secret_file: Path = Field(
        description="File that holds the key of the signature: whsec_ and 24 to 64 bytes in base64."
    )
    include: Annotated[list[Identifier], _INCLUDE] = ["accession"]
    acknowledge_seconds: float = Field(10.0, gt=0, le=300, description="Longest wait for the answer.")
    tls: ClientTls | None = Field(None, description="Whom we trust, and our own certificate.")


class WorklistDestination(_Section):
    """This box's own worklist, of [worklist]: each verdict marks the reading of its study there."""

    kind: Literal["worklist"]
    name: str = Field(min_length=1, max_length=40, description="Name of the destination in the ledger.")
    mode: WorklistMode = Field(description=_MODE)


class UpsDestination(_Section):
    """Somebody else's worklist (UPS over DIMSE): each verdict marks the reading of its study there."""

    kind: Literal["ups"]
    name: str = Field(min_length=1, max_length=40, description="Name of the destination in the ledger.")
    mode: WorklistMode = Field(description=_MODE)
    ae_title: AeTitle = Field(description="Its application entity title.")
    host: str = Field(description="Its address.")
    port: Port = Field(description="Its DICOM port.")
    reading_codes: list[Annotated[str, Field(pattern=CODE)]] = Field(
        default_factory=lambda: ["110005^DCM"],
        description="Codes of steps that are the reading of a study; a step without any code counts, too.",
    )
    answer_seconds: float = Field(10.0, gt=0, le=120, description="Longest wait for it, at each request.")
    tls: ClientTls | None = Field(None, description="Speak DICOM over TLS (PS3.15 B.12).")


class OrderDestination(_Section):
    """A RIS without UPS: it is told by HL7 (ORM^O01) that a study's order has another priority."""

    kind: Literal["hl7_order"]
    name: str = Field(min_length=1, max_length=40, description="Name of the destination in the ledger.")
    host: str = Field(description="Its address.")
    port: Port = Field(description="Its MLLP port.")
    receiving_application: str = Field("", description="MSH-5.")
    receiving_facility: str = Field("", description="MSH-6.")
    sending_facility: str = Field("", description="MSH-4.")
    processing_id: Literal["P", "T", "D"] = Field("P", description="MSH-11: production, training, debugging.")
    priority: Annotated[str, Field(pattern=r"^[A-Z]{1,4}$")] = Field(
        "S", description="Priority of a positive study's order (ORC-7.6, HL7 table 0485)."
    )
    usual_priority: Annotated[str, Field(pattern=r"^[A-Z]{0,4}$")] = Field(
        "", description="What a withdrawal puts back if no order told the box that; empty: nothing is sent then."
    )
    acknowledge_seconds: float = Field(10.0, gt=0, le=300, description="Longest wait for the acknowledgement.")
    tls: ClientTls | None = Field(None, description="Speak MLLP over TLS.")


class RestDestination(_Section):
    """A vendor's worklist with an interface of its own: a request over HTTPS, from templates.

    In url and body, ${name} stands for a value; docs/operations.md lists the names.
    """

    kind: Literal["rest"]
    name: str = Field(min_length=1, max_length=40, description="Name of the destination in the ledger.")
    mode: WorklistMode = Field(description=_MODE + " A request that moves somebody is reprioritise.")
    url: str = Field(
        pattern=r"^(https://[^\s/${}]+(/\S*)?|http://(127\.0\.0\.1|localhost)(:\d+)?(/\S*)?)$",
        description="Where requests go, such as https://list.example/${accession}: https, or http to this machine.",
    )
    method: Literal["POST", "PUT", "PATCH"] = Field("POST", description="Of the request.")
    body: str = Field(description="JSON of a request about a positive study.")
    withdraw_body: str = Field("", description="JSON where that is taken back; empty: nothing is sent then.")
    header: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]+$")] = Field(
        "Authorization", description="Header that carries what is in secret_file."
    )
    secret_file: Path | None = Field(
        None, description='File that holds the value of that header, such as "Bearer …", and nothing else.'
    )
    acknowledge_seconds: float = Field(10.0, gt=0, le=300, description="Longest wait for the answer.")
    tls: ClientTls | None = Field(None, description="Whom we trust, and our own certificate.")

    @model_validator(mode="after")
    def _templates_give_json(self) -> RestDestination:
        example = dict.fromkeys(REST_NAMES, "1")
        fill(self.url, example, "url")
        for key, template in (("body", self.body), ("withdraw_body", self.withdraw_body)):
            try:
                json.loads(fill(template, example, key) or "{}")
            except json.JSONDecodeError as error:
                raise ValueError(f"{key} is no JSON: {error}") from error
        return self


REST_NAMES = ("id", "kind", "study", "study_uid", "accession", "patient_id", "probability", "package",
              "package_version", "revision", "issued_at", "text")  # fmt: skip
"""What templates of a rest destination may name."""


def fill(template: str, values: Mapping[str, str], key: str) -> str:
    """A template with its values, as they stand in a JSON string or, for the key "url", in an address.

    Raises:
        ValueError: it names something else.
    """

    def value(found: re.Match[str]) -> str:
        if found[1] not in values:
            raise ValueError(f"{key} names ${{{found[1]}}}; there are {', '.join(values)}")
        text = values[found[1]]
        return quote(text, safe="") if key == "url" else json.dumps(text, ensure_ascii=False)[1:-1]

    return re.sub(r"\$\{([^}]*)\}", value, template)


WorklistTarget = WorklistDestination | UpsDestination | OrderDestination | RestDestination
"""What shows a verdict on a worklist."""
AlertDestination = Hl7Destination | MailDestination | WebhookDestination
"""What tells people or systems of an alert."""
ImageDestination = DicomDestination | DicomwebDestination
"""What stores objects."""
Destination = Annotated[
    DicomDestination
    | DicomwebDestination
    | Hl7Destination
    | MailDestination
    | WebhookDestination
    | WorklistDestination
    | UpsDestination
    | OrderDestination
    | RestDestination,
    Field(discriminator="kind"),
]


class WorklistTls(_Section):
    """The worklist over TLS, both ways."""

    certificate: Path = Field(description="PEM file of our certificate, then its chain; read again when it changes.")
    key: Path = Field(description="PEM file of its private key, without a passphrase.")
    client_authorities: Path | None = Field(
        None, description="PEM file of the authorities that sign our peers' certificates; unset: none is asked for."
    )
    profile: tls.Profile = Field("bcp195-rfc8996-9325", description="Profile of PS3.15 B.12 or B.13.")


class Subscriber(_Section):
    """A DICOM node that is told of work items by N-EVENT-REPORT, on an association that we open to it."""

    ae_title: AeTitle = Field(description="The Receiving AE that it subscribes as, and listens under.")
    host: str = Field(description="Its address.")
    port: Port = Field(description="Its DICOM port.")


class Worklist(_Section):
    """The worklist that this box serves: Unified Procedure Steps, over DICOMweb (UPS-RS) and DIMSE. Absent: none."""

    ae_title: AeTitle = Field("SCANSIDE", description="Our application entity title there.")
    host: str = Field("127.0.0.1", description="Address to listen on. Beyond this machine it must know who calls.")
    web_port: Port | None = Field(None, description="Port of UPS-RS, below /ups-rs; unset: none.")
    port: Port | None = Field(None, description="DICOM port of UPS; unset: none.")
    token_file: Path | None = Field(
        None, description="File with the bearer token that UPS-RS asks for, at least 16 characters; unset: none."
    )
    accepted_calling_ae_titles: list[AeTitle] = Field(
        default_factory=list, description="Who may call the DICOM port; empty: everybody on this machine."
    )
    reading_codes: list[Annotated[str, Field(pattern=r"^[^\^]+\^[^\^]+$")]] = Field(
        default_factory=lambda: ["110005^DCM"],
        description="Codes of work items that are the reading of a study; an item without any code counts, too.",
    )
    keep_days: float = Field(7.0, gt=0, description="An item that has ended goes after so many days.")
    subscriber: list[Subscriber] = Field(
        default_factory=list, description="Whom we can call; [[worklist.subscriber]] once for each."
    )
    tls: WorklistTls | None = Field(None, description="Both ports speak TLS only.")

    @model_validator(mode="after")
    def _knows_who_calls(self) -> Worklist:
        if self.port is None and self.web_port is None:
            raise ValueError("neither web_port nor port is set: nothing would listen")
        if self.host in ("127.0.0.1", "::1", "localhost"):
            return self
        certified = self.tls is not None and self.tls.client_authorities is not None
        if self.web_port is not None and (self.tls is None or not (certified or self.token_file)):
            raise ValueError("beyond this machine web_port needs tls, and token_file or tls.client_authorities")
        if self.port is not None and not (certified or self.accepted_calling_ae_titles):
            raise ValueError("beyond this machine port needs accepted_calling_ae_titles or tls.client_authorities")
        return self


class Performing(_Section):
    """Somebody else's worklist (UPS over DIMSE) from which this box takes tasks, and tells it how they ended."""

    ae_title: AeTitle = Field(description="Its application entity title.")
    host: str = Field(description="Its address.")
    port: Port = Field(description="Its DICOM port.")
    calling_ae_title: AeTitle | None = Field(None, description="What we call ourselves there; unset: as intake does.")
    workitem_codes: list[Annotated[str, Field(pattern=CODE)]] = Field(
        min_length=1, description="Scheduled Workitem Codes of what we do, as value^scheme or value^scheme^meaning."
    )
    station: Annotated[str, Field(pattern=CODE)] = Field(
        "SCANSIDE^99SCANSIDE",
        description="Our code among Scheduled Station Names; a step for another station is left alone, one for none "
        "is anybody's.",
    )
    package: str | None = Field(None, description="Whose verdict is the result; unset: the first of models.packages.")
    poll_seconds: float = Field(5.0, gt=0, le=600, description="So often it is asked for new tasks.")
    answer_seconds: float = Field(10.0, gt=0, le=120, description="Longest wait for it, at each step.")
    tls: ClientTls | None = Field(None, description="Speak DICOM over TLS (PS3.15 B.12).")


class CommitmentPeer(_Section):
    """A device that asks for storage commitment and takes the answer on an association that we open to it."""

    ae_title: AeTitle = Field(description="The application entity title that it calls us with, and listens under.")
    host: str = Field(description="Its address.")
    port: Port = Field(description="Its DICOM port.")


class Delivery(_Section):
    """How stubborn delivery is."""

    attempts: int = Field(50, ge=1, description="Tries before a delivery is a dead letter.")
    first_retry_seconds: float = Field(1.0, gt=0, description="Wait after the first failure; doubles each time.")
    longest_retry_seconds: float = Field(300.0, gt=0, description="Upper bound of that wait.")
    order_seconds: float = Field(
        10.0, ge=0, description="So long after its first try an alert that failed is not overtaken by later ones."
    )
    alarm_seconds: float = Field(
        300.0,
        gt=0,
        description="An alert that nothing and nobody has acknowledged so long after the verdict is an alarm.",
    )


class Budget(_Section):
    """Deadlines. A stage past its own is reported while it still lasts; a study past their sum is late."""

    completion_seconds: float = Field(
        25.0, gt=0, le=3600, description="From the last instance until the study counts as complete."
    )
    analysis_seconds: float = Field(25.0, gt=0, le=3600, description="From there until the verdict.")
    alert_seconds: float = Field(
        10.0, gt=0, le=3600, description="From the verdict until each destination has acknowledged the alert."
    )

    @property
    def seconds(self) -> float:
        """From the last instance to the acknowledged alert."""
        return self.completion_seconds + self.analysis_seconds + self.alert_seconds


class Settings(BaseSettings):
    """Everything a site decides. Environment variables such as SCANSIDE_INTAKE__PORT override the file."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, env_prefix="SCANSIDE_", env_nested_delimiter="__")

    box: Box = Box()
    intake: Intake = Intake()
    study: Study = Study()
    provisional: Provisional = Provisional()
    retention: Retention = Retention()
    triton: Triton = Triton()
    models: Models = Models()
    delivery: Delivery = Delivery()
    budget: Budget = Budget()
    destination: list[Destination] = Field(
        default_factory=list, description="Where findings go; [[destination]] once for each."
    )
    commitment_peer: list[CommitmentPeer] = Field(
        default_factory=list,
        description="Where answers to requests for storage commitment go; [[commitment_peer]] once for each device. "
        "A device that is not named gets its answer on the association that it asked on, or not at all.",
    )
    worklist: Worklist | None = Field(None, description="The worklist that this box serves.")
    performer: Performing | None = Field(None, description="The worklist of others that this box takes tasks from.")
    limit: list[Limit] = Field(
        default_factory=list,
        description="This site's own limits, within a package's label; [[limit]] once for each package.",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment above the file."""
        return env_settings, init_settings

    @field_validator("destination")
    @classmethod
    def _names_differ(cls, value: list[Destination]) -> list[Destination]:
        names = [destination.name for destination in value]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two destinations are named {sorted(twice)[0]!r}")
        if ours := [name for name in names if name.startswith("selftest")]:
            raise ValueError(f"{ours[0]!r}: names that begin with selftest are of the box's own tests")
        return value

    @model_validator(mode="after")
    def _escalation_begins(self) -> Settings:
        steps = [one for one in self.alert_destinations if one.after_seconds]
        if steps and len(steps) == len(self.alert_destinations):
            raise ValueError("every destination of alerts has after_seconds: one must be told at once")
        for one in steps:
            if one.after_seconds >= self.delivery.alarm_seconds:
                raise ValueError(f"{one.name}.after_seconds is not below delivery.alarm_seconds")
        return self

    @model_validator(mode="after")
    def _hears_answers(self) -> Settings:
        for one in self.destination:
            if isinstance(one, Hl7Destination) and one.application_elsewhere:
                if one.acknowledgement != "application":
                    raise ValueError(f'{one.name}.application_elsewhere needs acknowledgement = "application"')
                if self.intake.hl7 is None:
                    raise ValueError(f"{one.name}.application_elsewhere: there is no [intake.hl7] to hear it")
        return self

    @model_validator(mode="after")
    def _performs_what_runs(self) -> Settings:
        if self.performer and self.performer.package not in (None, *self.models.packages):
            raise ValueError(f"performer.package {self.performer.package!r} is not among models.packages")
        return self

    @model_validator(mode="after")
    def _one_worklist(self) -> Settings:
        names = [one.name for one in self.destination if isinstance(one, WorklistDestination)]
        if names and self.worklist is None:
            raise ValueError(f"{names[0]} is this box's own worklist, and there is no [worklist]")
        if len(names) > 1:
            raise ValueError(f"{' and '.join(names)} are both this box's own worklist")
        return self

    @property
    def worklist_destinations(self) -> tuple[WorklistTarget, ...]:
        """The worklists that verdicts show on."""
        return tuple(one for one in self.destination if isinstance(one, WorklistTarget))

    @field_validator("commitment_peer")
    @classmethod
    def _titles_differ(cls, value: list[CommitmentPeer]) -> list[CommitmentPeer]:
        titles = [peer.ae_title for peer in value]
        twice = {title for title in titles if titles.count(title) > 1}
        if twice:
            raise ValueError(f"two devices have the AE title {sorted(twice)[0]!r}")
        return value

    @model_validator(mode="after")
    def _ports_differ(self) -> Settings:
        ports = {"intake.port": self.intake.port} if self.intake.plain else {}
        if self.intake.tls is not None:
            ports["intake.tls.port"] = self.intake.tls.port
        if self.intake.hl7 is not None:
            ports |= {"intake.hl7.port": self.intake.hl7.port} if self.intake.hl7.plain else {}
            ports |= {"intake.hl7.tls.port": self.intake.hl7.tls.port} if self.intake.hl7.tls else {}
        if self.intake.metrics_port is not None:
            ports["intake.metrics_port"] = self.intake.metrics_port
        if self.worklist is not None:
            numbers = {"worklist.port": self.worklist.port, "worklist.web_port": self.worklist.web_port}
            ports |= {key: port for key, port in numbers.items() if port is not None}
        if self.triton.managed:
            ports |= {f"triton.{key}": getattr(self.triton, key) for key in ("grpc_port", "http_port", "metrics_port")}
        for key, port in ports.items():
            clash = [other for other, number in ports.items() if number == port and other != key]
            if clash:
                raise ValueError(f"{key} and {clash[0]} are both {port}")
        return self

    @property
    def alert_destinations(self) -> tuple[AlertDestination, ...]:
        """Who is told of alerts: those told at once first, then the steps of the escalation in their order."""
        told = [one for one in self.destination if isinstance(one, AlertDestination)]
        return tuple(sorted(told, key=lambda one: one.after_seconds))

    @property
    def escalation(self) -> frozenset[str]:
        """The names of the destinations that are steps of the escalation."""
        return frozenset(one.name for one in self.alert_destinations if one.after_seconds)

    @property
    def ledger_path(self) -> Path:
        """The database file."""
        return self.box.state_directory / "ledger.sqlite"

    @property
    def spool_directory(self) -> Path:
        """The folder of received Part 10 files."""
        return self.box.state_directory / "spool"

    @property
    def findings_directory(self) -> Path:
        """The folder of rendered findings."""
        return self.box.state_directory / "findings"

    @property
    def triton_directory(self) -> Path:
        """The folder that Triton's command, backends and model repository are put together in."""
        return self.box.state_directory / "triton"

    @property
    def plans_directory(self) -> Path:
        """The folder of TensorRT plans that were built on this box."""
        return self.box.state_directory / "plans"

    @property
    def evidence_directory(self) -> Path:
        """The folder of what the board decided upon, each file under its SHA-256."""
        return self.box.state_directory / "evidence"

    @property
    def head_path(self) -> Path:
        """The file that notes how far the chain of events was."""
        return self.box.state_directory / "ledger.head"

    @property
    def run_directory(self) -> Path:
        """Doorbells and locks; safe to delete when nothing runs."""
        return self.box.state_directory / "run"

    @property
    def model_repository(self) -> Path:
        """The folder of model packages."""
        import triton_models

        return self.models.repository or Path(triton_models.__file__).parent

    @property
    def trusted_keys(self) -> tuple[Path, ...]:
        """The files of the keys whose model packages run."""
        import triton_models

        if self.models.trusted_keys is None:
            return (Path(triton_models.__file__).parent / "keys" / "scanside.pem",)
        return tuple(self.models.trusted_keys)


def find_settings(path: Path | None) -> Path:
    """The configuration file to use: the one asked for, SCANSIDE_CONFIG, or the first of `SEARCH_PATH`.

    Raises:
        SettingsError: there is none.
    """
    asked = path or (Path(os.environ["SCANSIDE_CONFIG"]) if os.environ.get("SCANSIDE_CONFIG") else None)
    for candidate in [asked] if asked else SEARCH_PATH:
        if candidate.is_file():
            return candidate
    looked = str(asked) if asked else " or ".join(map(str, SEARCH_PATH))
    raise SettingsError("there is no configuration file", looked, "run `scanside init DIR`, or name one with --config")


_LocatedT = TypeVar("_LocatedT", bound=_Section)


def load_settings(path: Path) -> Settings:
    """Read and check one configuration file. Relative paths in it start at its own folder.

    Raises:
        SettingsError: with the file and the key that is wrong; one line for each key.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(error.strerror or str(error), str(path), "make it readable for this user") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"this is not TOML: {error}", str(path), "correct that line") from error
    try:
        settings = Settings(**data)
    except ValidationError as error:
        raise SettingsError("; ".join(map(_sentence, error.errors())), str(path), "correct it") from error
    except Exception as error:  # pydantic-settings wraps what an environment variable holds
        raise SettingsError(str(error), "environment SCANSIDE_*", "correct or unset it") from error
    base = path.resolve().parent
    return settings.model_copy(
        update={
            "box": settings.box.model_copy(update={"state_directory": base / settings.box.state_directory}),
            "intake": _located(settings.intake, base),
            "worklist": settings.worklist and _located(settings.worklist, base),
            "performer": settings.performer and _located(settings.performer, base),
            "destination": [_located(one, base) for one in settings.destination],
            "triton": settings.triton.model_copy(update={"environment": base / settings.triton.environment}),
            "models": settings.models.model_copy(
                update={
                    "repository": settings.models.repository and base / settings.models.repository,
                    "trusted_keys": settings.models.trusted_keys
                    and [base / path for path in settings.models.trusted_keys],
                }
            ),
        }
    )


def _located(section: _LocatedT, base: Path) -> _LocatedT:
    """The section with its paths, and those of the sections in it, starting at that folder."""
    values = {name: getattr(section, name) for name in type(section).model_fields}
    found = {name: base / value for name, value in values.items() if isinstance(value, Path)}
    inner = {name: _located(value, base) for name, value in values.items() if isinstance(value, _Section)}
    return section.model_copy(update=found | inner)


def section_of(kind: Any) -> type[BaseModel] | None:
    """The section that a field holds, also where it may be absent; None for a plain key."""
    for one in (kind, *get_args(kind)):
        if isinstance(one, type) and issubclass(one, BaseModel):
            return one
    return None


def _sentence(error: Any) -> str:
    """One validation error as "key: what is wrong with it"."""
    # Of a destination, the third part is its kind.
    named = [str(part) for place, part in enumerate(error["loc"]) if (place, error["loc"][0]) != (2, "destination")]
    key = ".".join(named) or "settings"
    if error["type"] == "extra_forbidden":
        return f"{key}: there is no such key"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message[0].lower()}{message[1:]}"


def document(model: type[BaseModel] = Settings, prefix: str = "") -> list[tuple[str, str, str]]:
    """Every key as (name, default, description), for the generated file and the manual."""
    rows: list[tuple[str, str, str]] = []
    for name, field in model.model_fields.items():
        lists = ("destination", "commitment_peer", "limit", "subscriber")
        kind = None if name in lists else section_of(field.annotation)
        if kind is not None:
            rows += document(kind, f"{prefix}{name}.")
        else:
            default = "" if field.is_required() else field.get_default(call_default_factory=True)
            rows.append((f"{prefix}{name}", str(default), field.description or ""))
    return rows


__all__ = [
    "AlertDestination",
    "DicomDestination",
    "DicomwebDestination",
    "Hl7Destination",
    "InitSettingsSource",
    "MailDestination",
    "Settings",
    "SettingsError",
    "WebhookDestination",
]
