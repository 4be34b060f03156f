"""HL7 messages as a hospital's interface engine writes them, for tests."""

from __future__ import annotations


def msh(kind: str, control_id: str = "M1", *, modes: str = "|||", version: str = "2.5.1", processing: str = "P") -> str:
    """MSH; ``modes`` is MSH-13 to MSH-16."""
    return (
        f"MSH|^~\\&|RIS|HOSP|SCANSIDE|BOX|20260601103000+0200||{kind}|{control_id}|{processing}|{version}|{modes}||"
        "UNICODE UTF-8\r"
    )


def pid(identifier: str = "P1^^^HOSP^MR", born: str = "19610101") -> str:
    """PID of one patient."""
    return f"PID|1||{identifier}||Müller^Jürgen||{born}|M\r"


def orm(
    control_id: str = "M1",
    *,
    control: str = "NW",
    accession: str = "A1",
    priority: str = "R",
    patient: str = "P1^^^HOSP^MR",
    born: str = "19610101",
    extra: str = "",
    **header: str,
) -> str:
    """An order as ORM^O01, with the priority in OBR-27.6, the accession number in OBR-18 and the reason in OBR-31."""
    return (
        f"{msh('ORM^O01^ORM_O01', control_id, **header)}{pid(patient, born)}PV1|1|E\r"
        f"ORC|{control}|PL-{accession}|F-{accession}\r"
        f"OBR|1|PL-{accession}|F-{accession}|CTH^CT head^L||||||||||||||{accession}|||||||||^^^^^{priority}|||"
        f"|^fell from a ladder\r{extra}"
    )


def omi(control_id: str = "M1", *, accession: str = "A1", priority: str = "S", uid: str = "1.1", born: str = "") -> str:
    """An order as OMI^O23: the priority in TQ1-9, accession number and study in IPC."""
    return (
        f"{msh('OMI^O23^OMI_O23', control_id)}{pid(born=born)}PV1|1|E\r"
        f"ORC|NW|PL-{accession}\rTQ1|1||||||||{priority}\rOBR|1|PL-{accession}||CTH^CT head^L\r"
        f"IPC|{accession}|RP1|{uid}|SPS1|CT\r"
    )


def a08(control_id: str = "M1", *, born: str, patient: str = "P1^^^HOSP^MR") -> str:
    """What is now said of a patient."""
    return f"{msh('ADT^A08^ADT_A01', control_id)}EVN|A08|20260601\r{pid(patient, born)}PV1|1|E\r"


def a40(control_id: str = "M1", *, survivor: str, prior: str) -> str:
    """Two patients are one."""
    return f"{msh('ADT^A40^ADT_A39', control_id)}EVN|A40|20260601\r{pid(survivor)}MRG|{prior}\r"


def oru(control_id: str = "M1", *, accession: str = "A1", status: str = "F", text: str = "No haemorrhage.") -> str:
    """A radiologist's report."""
    return (
        f"{msh('ORU^R01^ORU_R01', control_id)}{pid()}"
        f"OBR|1|PL-{accession}|F-{accession}|CTH^CT head^L||||||||||||||{accession}||||20260601110000+0200|||{status}\r"
        f"OBX|1|TX|18782-3^Study report^LN||{text}||||||{status}\r"
    )
