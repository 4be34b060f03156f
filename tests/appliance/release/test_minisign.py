"""Signatures and keys: ours are minisign's and minisign's are ours, and nothing that was changed passes."""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.release.errors import ReleaseError
from appliance.release.minisign import (
    SUFFIX,
    PublicKey,
    SecretKey,
    new_key,
    read_public_key,
    read_secret_key,
    read_signature,
    sign,
    verify,
)
from tests.peers import program

COMMENT = "scanside version=1.0.0 channel=stable minimum=0.9.0"


def minisign(*words: object, said: str = "") -> subprocess.CompletedProcess[str]:
    """The program itself."""
    return subprocess.run(
        [program("minisign"), *map(str, words)], input=said, capture_output=True, text=True, timeout=60
    )


def checked(path: Path, *keys: PublicKey) -> tuple[str, str]:
    with path.open("rb") as file:
        return verify(file, path, read_signature(Path(f"{path}{SUFFIX}")), keys)[:2]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A key of ours, as files."""
    key = new_key()
    (tmp_path / "ours.key").write_text(key.encode())
    (tmp_path / "ours.pub").write_text(key.public.encode())
    return tmp_path / "ours.key", tmp_path / "ours.pub"


@pytest.fixture
def message(tmp_path: Path) -> Path:
    path = tmp_path / "bundle.tar"
    path.write_bytes(bytes(range(256)) * 9000)
    return path


def test_minisign_verifies_ours(pair: tuple[Path, Path], message: Path) -> None:
    Path(f"{message}{SUFFIX}").write_text(sign(message, read_secret_key(pair[0]), COMMENT))
    done = minisign("-V", "-m", message, "-p", pair[1])
    assert done.returncode == 0, done.stderr
    assert f"Trusted comment: {COMMENT}" in done.stdout
    message.write_bytes(message.read_bytes() + b"x")
    assert minisign("-V", "-m", message, "-p", pair[1]).returncode != 0


def test_minisign_signs_with_our_key(pair: tuple[Path, Path], message: Path) -> None:
    done = minisign("-S", "-s", pair[0], "-m", message, "-t", COMMENT)
    assert done.returncode == 0, done.stderr
    key = read_public_key(pair[1])
    assert checked(message, key) == (COMMENT, key.id)


@pytest.mark.parametrize("kind", [[], ["-l"]], ids=["prehashed", "legacy"])
def test_we_verify_minisigns(tmp_path: Path, message: Path, kind: list[str]) -> None:
    public, secret = tmp_path / "m.pub", tmp_path / "m.key"
    assert minisign("-G", "-W", "-p", public, "-s", secret).returncode == 0
    done = minisign("-S", *kind, "-s", secret, "-m", message, "-t", COMMENT)
    assert done.returncode == 0, done.stderr
    algorithm = base64.b64decode(Path(f"{message}{SUFFIX}").read_text().splitlines()[1])[:2]
    assert algorithm == (b"Ed" if kind else b"ED")
    key = read_public_key(public)
    assert key.id.lstrip("0") in public.read_text()  # minisign leaves zeros in front out
    assert checked(message, key) == (COMMENT, key.id)
    assert read_secret_key(secret).public.value == key.value
    message.write_bytes(message.read_bytes()[:-1])
    with pytest.raises(ReleaseError, match="it is not what key"):
        checked(message, key)


def test_an_encrypted_key(tmp_path: Path, message: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The limits stand in the file; minisign's own default takes a gibibyte and seconds.
    for limit in ((1 << 18, 1 << 23), (1 << 20, 1 << 20)):
        monkeypatch.setattr("appliance.release.minisign._OPERATIONS", limit[0])
        monkeypatch.setattr("appliance.release.minisign._MEMORY", limit[1])
        key, path = new_key(), tmp_path / "ours.key"
        path.write_text(key.encode("secret"))
        assert read_secret_key(path, lambda: "secret") == key
        with pytest.raises(ReleaseError, match="the password is wrong"):
            read_secret_key(path, lambda: "Secret")
        with pytest.raises(ReleaseError, match="this key is encrypted"):
            read_secret_key(path)
        done = minisign("-S", "-s", path, "-m", message, "-t", COMMENT, said="secret\n")
        assert done.returncode == 0, done.stderr
        assert checked(message, key.public) == (COMMENT, key.public.id)


def test_two_keys_while_one_is_replaced(tmp_path: Path, message: Path) -> None:
    old, new, other = new_key(), new_key(), new_key()
    for key in (old, new):
        Path(f"{message}{SUFFIX}").write_text(sign(message, key, COMMENT))
        assert checked(message, old.public, new.public) == (COMMENT, key.public.id)
    with pytest.raises(ReleaseError, match=f"signed by key {new.public.id}, which is not trusted"):
        checked(message, old.public, other.public)
    with pytest.raises(ReleaseError, match="no key is"):
        checked(message)


def test_a_key_under_another_ones_number_does_not_pass(message: Path) -> None:
    trusted, other = new_key(), new_key()
    forged = SecretKey(trusted.number, other.seed)
    Path(f"{message}{SUFFIX}").write_text(sign(message, forged, COMMENT))
    with pytest.raises(ReleaseError, match="it is not what key"):
        checked(message, trusted.public)


def test_a_comment_that_was_changed_does_not_pass(message: Path) -> None:
    key = new_key()
    said = sign(message, key, COMMENT)
    Path(f"{message}{SUFFIX}").write_text(said.replace("version=1.0.0", "version=9.0.0"))
    with pytest.raises(ReleaseError, match="trusted comment was changed"):
        checked(message, key.public)


def test_unsigned(message: Path) -> None:
    with pytest.raises(ReleaseError, match=r"there is no signature .*bundle\.tar\.minisig"):
        read_signature(Path(f"{message}{SUFFIX}"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0), byte=st.integers(0, 255))
def test_no_byte_of_what_counts_can_be_changed(tmp_path: Path, place: int, byte: int) -> None:
    path = tmp_path / "small"
    path.write_bytes(b"what was signed")
    key = SecretKey(b"12345678", bytes(32))
    said = sign(path, key, COMMENT)
    # The untrusted comment does not count, and nobody reads it.
    start = said.index("\n") + 1
    content = bytearray(said.encode())
    at = start + place % (len(content) - start)
    if content[at] == byte or (at == len(content) - 1 and byte in b"\n\r\x0b\x0c\x1c\x1d\x1e"):
        return
    content[at] = byte
    Path(f"{path}{SUFFIX}").write_bytes(content)
    try:
        comment, _ = checked(path, key.public)
    except ReleaseError:
        return
    # Base64 has spare bits, and lines end in several ways: another spelling of the same signature, and nothing else.
    assert comment == COMMENT


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400))
def test_whatever_lies_there_is_refused_and_nothing_breaks(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any"
    path.write_bytes(content)
    for read in (read_signature, read_public_key, read_secret_key):
        with pytest.raises(ReleaseError):
            read(path)
