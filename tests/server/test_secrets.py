"""API keys are told to nobody: not by mistakes of the operator, not by what prints settings."""

from pathlib import Path

import pytest

from bezel.engine.errors import ConfigError
from bezel.server.auth import read_api_keys
from bezel.server.cli import main
from bezel.server.config import ServerConfig

KEY = "sk-SECRET"


@pytest.mark.parametrize(
    "flags",
    [
        ["--api-keyy", KEY],
        ["--api-key", KEY, "--port", "x"],
        ["--api-key", KEY, "--port", "70000"],
        ["--api-key", KEY, "--api-key", ""],
        ["--api-key", KEY, "--print-config"],
        ["--config", "half.yaml"],
        ["--config", "wrong.yaml"],
        ["--config", "unknown.yaml"],
        ["--config", "right.yaml", "--print-config"],
    ],
    ids=" ".join,
)
def test_the_command_line_says_nothing_of_keys(
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    files = {
        "half": f"api_key: [{KEY}\nport: 1\n",
        "wrong": f"api_key: {{{KEY}: 1}}\n",
        "unknown": f"api_kee: {KEY}\n",
        "right": f"api_key: [{KEY}]\n",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BEZEL_API_KEE", KEY)
    code = main(["serve", *flags])
    captured = capfd.readouterr()
    assert code == (0 if "--print-config" in flags else 2)
    assert captured.out + captured.err
    assert KEY not in captured.out + captured.err


def test_a_config_does_not_show_keys() -> None:
    assert KEY not in repr(ServerConfig(api_key=(KEY,)))


def test_a_file_of_keys_that_can_not_be_read_is_not_quoted(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(KEY.encode() + b"\xff\n")
    with pytest.raises(ConfigError) as caught:
        read_api_keys(ServerConfig(api_key_file=str(path)))
    assert KEY not in caught.value.message
