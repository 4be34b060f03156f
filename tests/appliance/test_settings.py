"""A site's mistakes in its configuration are one clear line each."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance import init
from appliance.settings import SettingsError, find_settings, load_settings

WEB = '[[destination]]\nkind = "dicomweb"\nname = "archive"\n'
PAIR = '\ncertificate = "c.pem"\nkey = "k.pem"\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "scanside.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[intake]\nprot = 104", "intake.prot: there is no such key"),
        ("[intaek]\nport = 104", "intaek: there is no such key"),
        ("[intake]\nport = 70000", "intake.port: input should be less than or equal to 65535"),
        ('[intake]\nport = "dicom"', "intake.port: input should be a valid integer"),
        ('[intake]\nae_title = "WAY TOO LONG A TITLE"', "intake.ae_title: string should have at most 16 characters"),
        ('[box]\ndevice = "tpu"', "box.device: input should be 'cpu' or 'gpu'"),
        ('[[destination]]\nkind = "dicom"\nname = "pacs"', "destination.0.ae_title: field required"),
        ('[[destination]]\nkind = "fax"\nname = "x"', "destination.0"),
        (2 * '[[destination]]\nkind="hl7"\nname="a"\nhost="h"\nport=1\n', "two destinations are named 'a'"),
        (2 * '[[commitment_peer]]\nae_title="CT1"\nhost="h"\nport=1\n', "two devices have the AE title 'CT1'"),
        ("[triton]\ngrpc_port = 9000\nhttp_port = 9000", "both 9000"),
        ("[intake]\nmetrics_port = 11112", "intake.metrics_port are both 11112"),
        ("[intake]\nmetrics_port = 8002", "intake.metrics_port"),
        ("[intake]\nplain = false", "intake: plain is false and there is no [intake.tls]"),
        ('[intake.tls]\nkey = "k"', "intake.tls.certificate: field required"),
        (f'[intake.tls]\nport = 11112{PAIR}', "intake.tls.port are both 11112"),
        (f'[intake.tls]\nprofile = "ssl3"{PAIR}', "intake.tls.profile: input should be 'bcp195-rfc8996-9325'"),
        (WEB + 'url = "http://archive/dicom-web"', "destination.0.url: string should match pattern"),
        (WEB + 'url = "https://a/w"\ntoken_file = "t"\nusername = "u"\npassword_file = "p"', "do not go together"),
        (WEB + 'url = "https://a/w"\nusername = "u"', "username and password_file go together"),
        (WEB + 'url = "https://a/w"\nobjects = ["film"]', "destination.0.objects.0: input should be 'report'"),
        ("[intake\n", "this is not TOML"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_key(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        load_settings(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_relative_paths_start_at_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    settings = load_settings(written(tmp_path, '[box]\nstate_directory = "state"'))
    assert settings.ledger_path == tmp_path / "state" / "ledger.sqlite"
    assert settings.triton.environment == tmp_path / ".venv-triton"


def test_tls_is_optional_and_may_be_all_that_listens(tmp_path: Path) -> None:
    assert load_settings(written(tmp_path, "")).intake.tls is None
    settings = load_settings(written(tmp_path, f"[intake]\nplain = false\n[intake.tls]\nport = 11112{PAIR}"))
    assert settings.intake.tls is not None
    assert (settings.intake.plain, settings.intake.tls.port) == (False, 11112)
    assert settings.intake.tls.certificate == tmp_path / "c.pem"
    assert settings.intake.tls.key == tmp_path / "k.pem"
    assert settings.intake.tls.client_authorities is None
    text = f'[intake.tls]\nclient_authorities = "ca/clients.pem"{PAIR}'
    settings = load_settings(written(tmp_path, text))
    assert settings.intake.tls is not None
    assert (settings.intake.tls.port, settings.intake.tls.client_authorities) == (2762, tmp_path / "ca/clients.pem")


def test_init_writes_tls_behind_a_hash_and_in_full_where_it_is_wanted(tmp_path: Path) -> None:
    path = init.write(tmp_path / "a", {})
    for name in ("intake.tls", "intake.hl7", "intake.hl7.tls"):
        before, heading, rest = path.read_text(encoding="utf-8").partition(f"#[{name}]\n")
        section, following, rest = rest.partition("\n\n") if heading else ("", "", "")
        assert "#port = " in section
        section = section.replace("#port", "port")
        for key in ("certificate", "key"):
            section = section.replace(f"#{key} =", f'{key} = "x.pem"')
        path.write_text(f"{before}[{name}]\n{section}{following}{rest}", encoding="utf-8")
    intake = load_settings(path).intake
    assert intake.tls is not None and intake.hl7 is not None and intake.hl7.tls is not None
    wanted = {"certificate": "c.pem", "key": "k.pem", "port": 2763}
    section = load_settings(init.write(tmp_path / "b", {"intake": {"tls": wanted}})).intake.tls
    assert section is not None
    assert (section.port, section.key) == (2763, tmp_path / "b" / "k.pem")


def test_the_environment_overrides_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCANSIDE_INTAKE__PORT", "104")
    assert load_settings(written(tmp_path, "[intake]\nport = 11112")).intake.port == 104


def test_the_file_that_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SCANSIDE_CONFIG", raising=False)
    with pytest.raises(SettingsError, match="init"):
        find_settings(None)
    here = written(tmp_path, "")
    assert find_settings(None).resolve() == here
    (tmp_path / "other").mkdir()
    other = written(tmp_path / "other", "")
    monkeypatch.setenv("SCANSIDE_CONFIG", str(other))
    assert find_settings(None) == other
    assert find_settings(here) == here


def test_init_writes_every_key_and_a_file_that_loads(tmp_path: Path) -> None:
    path = init.write(
        tmp_path / "box",
        {"intake": {"port": 104}},
        [
            {"kind": "dicom", "name": "pacs", "ae_title": "PACS", "host": "10.0.0.5", "port": 104},
            {"kind": "hl7", "name": "er", "host": "10.0.0.6", "port": 2575},
        ],
    )
    settings = load_settings(path)
    assert settings.intake.port == 104
    assert [one.name for one in settings.destination] == ["pacs", "er"]
    assert settings.spool_directory.is_dir()
    # with every "#" before a key removed it is still the same configuration
    text = path.read_text(encoding="utf-8")
    lines = [line.removeprefix("# ") if " = " in line else line for line in text.splitlines()]
    everything = "\n".join(line for line in lines if "SCANSIDE_INTAKE" not in line)
    assert load_settings(written(tmp_path, everything)).destination == settings.destination
    with pytest.raises(SettingsError, match="already"):
        init.write(tmp_path / "box", {})


def test_init_leaves_nothing_that_does_not_load(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"intake\.port"):
        init.write(tmp_path, {"intake": {"port": 0}})
    assert not (tmp_path / "scanside.toml").exists()


def test_init_writes_a_worklist_behind_a_hash_and_in_full_where_it_is_wanted(tmp_path: Path) -> None:
    text = init.write(tmp_path / "a", {}).read_text(encoding="utf-8")
    assert "#[worklist]\n" in text and "#[worklist.tls]\n" in text
    wanted = {"web_port": 8080, "host": "10.0.0.1", "token_file": "t", "tls": {"certificate": "c", "key": "k"}}
    section = load_settings(init.write(tmp_path / "b", {"worklist": wanted})).worklist
    assert section is not None and section.tls is not None
    assert (section.web_port, section.tls.key) == (8080, tmp_path / "b" / "k")
