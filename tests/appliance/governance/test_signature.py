"""Nothing that was changed after it was signed loads, nor what nobody trusted signed; the error names the file."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

import triton_models
from appliance.governance.package import PackageError, load, load_configured, seal
from appliance.governance.signature import (
    Signature,
    SignatureError,
    check,
    key_id,
    public_path,
    read_keyring,
    read_private,
    sign,
    write_keys,
)
from appliance.settings import Models, Settings, SettingsError

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
TRUSTED = {key_id(KEY.public_key()): KEY.public_key()}
MODEL = b"stands for a model, which nothing here runs"
SECOND = b"another file of the package"


def fill(folder: Path) -> Path:
    """A small package of three listed files, one of them in a folder, signed by `KEY`."""
    folder.mkdir()
    (folder / "extra").mkdir()
    manifest = (Path(triton_models.__file__).parent / "ich_reference" / "package.toml").read_text("utf-8")
    manifest = manifest[: manifest.index("[parity]")] + "[files]\n"
    for name, content in (("model.onnx", MODEL), ("extra/second.bin", SECOND), ("third.bin", b"3")):
        (folder / name).write_bytes(content)
        manifest += f'"{name}" = "sha256:{hashlib.sha256(content).hexdigest()}"\n'
    (folder / "package.toml").write_text(manifest, encoding="utf-8")
    seal(folder, KEY)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path / "ich_reference")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that hypothesis changes and restores, some hundred times."""
    return fill(tmp_path_factory.mktemp("signed") / "ich_reference")


def flip(path: Path, at: int = -1, by: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= by
    path.write_bytes(content)


def spell(path: Path, change: Callable[[dict[str, str]], None], **style: int) -> None:
    """Write the signature file anew with something changed."""
    data = json.loads(path.read_bytes())
    change(data)
    path.write_text(json.dumps(data, **({"indent": 2} | style)) + "\n")  # type: ignore[arg-type]


def swap_keys(folder: Path) -> None:
    """The other key's signature under the trusted key's name."""
    value = OTHER.sign((folder / "package.toml").read_bytes())
    (folder / "package.sig").write_bytes(Signature(next(iter(TRUSTED)), value).encode())


def second_key(folder: Path) -> None:
    path = folder / "package.sig"
    path.write_bytes(path.read_bytes().replace(b"{\n", b'{\n  "key": "0",\n', 1))


def spare_bits(folder: Path) -> None:
    """64 bytes leave four bits of base64's last digit unused; with one of them set it decodes to the same bytes."""

    def change(data: dict[str, str]) -> None:
        was = base64.b64decode(data["signature"])
        digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
        last = digits[digits.index(data["signature"][-3]) | 1]
        data["signature"] = data["signature"][:-3] + last + "=="
        assert base64.b64decode(data["signature"]) == was

    spell(folder / "package.sig", change)


def test_a_signed_package_loads_and_says_by_whom(folder: Path) -> None:
    for name in ("README.md", "metrics.json"):
        (folder / name).write_text("whatever; nothing that runs reads it")
    (folder / "empty").mkdir()
    assert load(folder, trusted=TRUSTED).signed_by == key_id(KEY.public_key())
    assert load(folder, trusted=TRUSTED | {key_id(OTHER.public_key()): OTHER.public_key()}).files


@pytest.mark.parametrize(
    ("tamper", "file", "says"),
    [
        (lambda f: flip(f / "package.toml"), "package.sig", "one of the two was changed"),
        (lambda f: (f / "package.toml").write_bytes(b""), "package.sig", "one of the two was changed"),
        (lambda f: (f / "package.toml").write_bytes(b"\xff = ["), "package.sig", "one of the two was changed"),
        (lambda f: (f / "package.toml").unlink(), "package.toml", "No such file"),
        (lambda f: flip(f / "model.onnx"), "model.onnx", "its digest is"),
        (lambda f: (f / "model.onnx").write_bytes(MODEL + b"\0"), "model.onnx", "its digest is"),
        (lambda f: (f / "model.onnx").unlink(), "model.onnx", "No such file"),
        (lambda f: flip(f / "extra" / "second.bin", 0), "extra/second.bin", "its digest is"),
        (lambda f: (f / "package.sig").unlink(), "package.sig", "the package is not signed"),
        (lambda f: (f / "package.sig").write_bytes(b""), "package.sig", "no signature that scanside makes"),
        (lambda f: (f / "package.sig").write_bytes(b"[" * 99999), "package.sig", "no signature that scanside makes"),
        (lambda f: (f / "package.sig").write_bytes(b"[]"), "package.sig", "no signature that scanside makes"),
        (lambda f: (f / "package.sig").write_bytes(b"\xff"), "package.sig", "no signature that scanside makes"),
        (
            lambda f: (f / "package.sig").write_bytes((f / "package.sig").read_bytes()[:-9]),
            "package.sig",
            "no signature that scanside makes",
        ),
        (
            lambda f: spell(f / "package.sig", lambda d: d.update(signature=d["signature"][:-4])),
            "package.sig",
            "no signature that scanside makes",
        ),
        (
            lambda f: spell(f / "package.sig", lambda d: d.update(algorithm="none")),
            "package.sig",
            "no signature that scanside makes",
        ),
        (lambda f: spell(f / "package.sig", lambda d: None, indent=3), "package.sig", "no signature that scanside"),
        (
            lambda f: spell(f / "package.sig", lambda d: d.update(key=["x"])),
            "package.sig",
            "no signature that scanside",
        ),
        (second_key, "package.sig", "no signature that scanside makes"),
        (spare_bits, "package.sig", "no signature that scanside makes"),
        (swap_keys, "package.sig", "one of the two was changed"),
        (lambda f: seal(f, OTHER), "package.sig", f"by key {key_id(OTHER.public_key())}, which is not trusted"),
        (lambda f: (f / "notes.txt").write_text(""), "notes.txt", "does not list it"),
        (lambda f: (f / ".hidden").write_text(""), ".hidden", "does not list it"),
        (lambda f: (f / "extra" / "README.md").write_text(""), "extra/README.md", "does not list it"),
        (lambda f: (f / "link").symlink_to("extra"), "link", "does not list it"),
        (lambda f: (f / "dangling").symlink_to("nowhere"), "dangling", "does not list it"),
    ],
)
def test_what_was_changed_is_named(folder: Path, tamper: Callable[[Path], object], file: str, says: str) -> None:
    assert load(folder, trusted=TRUSTED)
    tamper(folder)
    for allow_unsigned in (False, True) if "not signed" not in says else (False,):
        with pytest.raises((PackageError, SignatureError), match=says) as caught:
            load(folder, trusted=TRUSTED, allow_unsigned=allow_unsigned)
        assert caught.value.where == str(folder / file)
        assert "\n" not in str(caught.value)
        assert caught.value.remedy


@given(st.sampled_from(["package.toml", "package.sig", "model.onnx", "extra/second.bin"]), st.data())
def test_no_byte_can_be_changed(kept: Path, name: str, data: st.DataObject) -> None:
    path = kept / name
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    try:
        flip(path, at, data.draw(st.integers(1, 255)))
        with pytest.raises((PackageError, SignatureError)):
            load(kept, trusted=TRUSTED, allow_unsigned=True)
    finally:
        path.write_bytes(content)
    assert load(kept, trusted=TRUSTED)


@given(st.binary(max_size=300))
def test_a_signature_file_of_any_bytes_is_a_clear_error(content: bytes) -> None:
    with pytest.raises(SignatureError, match="no signature that scanside makes"):
        Signature.decode(content, Path("package.sig"))


def test_nobody_is_trusted_unless_named(folder: Path) -> None:
    with pytest.raises(SignatureError, match=r"not trusted \(no key is\)"):
        load(folder)


def test_an_unsigned_package_loads_only_where_that_is_allowed(folder: Path) -> None:
    (folder / "package.sig").unlink()
    with pytest.raises(SignatureError, match="not signed"):
        load(folder, trusted=TRUSTED)
    assert load(folder, trusted=TRUSTED, allow_unsigned=True).signed_by == ""
    flip(folder / "model.onnx")
    with pytest.raises(PackageError, match="digest"):
        load(folder, allow_unsigned=True)


def test_what_is_wrong_is_not_signed(folder: Path) -> None:
    before = (folder / "package.sig").read_bytes()
    flip(folder / "model.onnx")
    with pytest.raises(PackageError, match="digest"):
        seal(folder, OTHER)
    assert (folder / "package.sig").read_bytes() == before


def test_another_packages_signature_does_not_fit(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "package.toml").write_bytes((folder / "package.toml").read_bytes() + b"# 2\n")
    shutil.copy(folder / "package.sig", tmp_path)
    with pytest.raises(SignatureError, match="one of the two was changed"):
        load(tmp_path, trusted=TRUSTED)


def test_the_signature_is_that_of_rfc_8032() -> None:
    """RFC 8032 7.1, TEST 3."""
    key = Ed25519PrivateKey.from_private_bytes(
        bytes.fromhex("c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7")
    )
    assert sign(bytes.fromhex("af82"), key).value == bytes.fromhex(
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
        "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a"
    )


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_makes_keys_for_us_and_checks_our_signature(folder: Path, tmp_path: Path) -> None:
    private, public, value = tmp_path / "key.pem", tmp_path / "public.pem", tmp_path / "value"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    package = seal(folder, read_private(private))
    assert load(folder, trusted=read_keyring([public])).signed_by == package.signed_by
    value.write_bytes(base64.b64decode(json.loads((folder / "package.sig").read_bytes())["signature"]))
    command = ["openssl", "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", public, "-sigfile", value, "-in"]
    assert subprocess.run([*command, folder / "package.toml"], capture_output=True).returncode == 0
    assert subprocess.run([*command, folder / "model.onnx"], capture_output=True).returncode != 0


def test_a_new_key_is_its_owners_alone_and_replaces_none(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    made = write_keys(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_private(path).public_key() == made
    assert read_keyring([public_path(path)]) == {key_id(made): made}
    assert public_path(path).name == "key.pub.pem"
    before = path.read_bytes()
    with pytest.raises(SignatureError, match="already"):
        write_keys(path)
    public_path(path).unlink()
    with pytest.raises(SignatureError, match="already") as caught:
        write_keys(path)
    assert caught.value.where == str(path)
    assert path.read_bytes() == before
    link = tmp_path / "link.pem"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SignatureError, match="already"):
        write_keys(link)
    assert not (tmp_path / "elsewhere").exists()


def test_what_is_no_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    ec = generate_private_key(SECP256R1())
    public = ec.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    plain = ec.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    locked = KEY.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    for content, says in ((b"", "no private key"), (plain, "no Ed25519 key"), (locked, "has a password")):
        path.write_bytes(content)
        with pytest.raises(SignatureError, match=says) as caught:
            read_private(path)
        assert caught.value.where == str(path)
    for content, says in ((b"", "no public key"), (public, "no Ed25519 key"), (plain, "this is a private key")):
        path.write_bytes(content)
        with pytest.raises(SignatureError, match=says) as caught:
            read_keyring([path])
        assert caught.value.where == str(path)
        with pytest.raises(SettingsError, match=r"models\.trusted_keys: ") as wrong:
            load_configured(Settings(models=Models(trusted_keys=[path])))
        assert wrong.value.where == str(path)


def test_an_absent_signature_is_the_callers_to_judge(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        check(b"", tmp_path / "package.sig", TRUSTED)
    (tmp_path / "package.sig").mkdir()
    with pytest.raises(SignatureError) as caught:
        check(b"", tmp_path / "package.sig", TRUSTED)
    assert caught.value.where == str(tmp_path / "package.sig")
