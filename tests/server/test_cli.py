"""The command line as a user meets it: precedence, one-line errors, exit codes."""

import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest

from bezel.engine.config import EngineConfig
from bezel.server.cli import build_parser, main
from bezel.server.command_line import canonical
from bezel.server.config import ServerConfig
from bezel.server.settings import parse_config
from bezel.server.version import VERSION


def config_of(*argv: str, **environ: str) -> ServerConfig:
    return parse_config(vars(build_parser().parse_args(canonical(["serve", *argv]))), environ)


def test_defaults_are_the_dataclasses() -> None:
    assert config_of() == ServerConfig()


def test_every_setting_has_its_place() -> None:
    config = config_of(
        *("google/gemma", "--port", "1", "--api-key", "a", "--api-key", "b"),
        *("--served-model-name", "x", "y", "--max-model-len", "64"),
        *("--kv-cache-memory-bytes", "2G", "--no-enable-prefix-caching", "--dtype=float32"),
    )
    engine = EngineConfig(
        model="google/gemma",
        max_model_len=64,
        kv_cache_memory_bytes=2 * 2**30,
        enable_prefix_caching=False,
        dtype="float32",
    )
    assert config == ServerConfig(
        engine=engine, port=1, api_key=("a", "b"), served_model_name=("x", "y")
    )


def test_flags_may_be_spelled_with_underscores() -> None:
    config = config_of("--max_model_len=64", "--no-enable_prefix_caching", "--api_key", "a_b")
    assert (config.engine.max_model_len, config.engine.enable_prefix_caching) == (64, False)
    assert config.api_key == ("a_b",), "values are left alone"


def test_names_of_settings_are_unique() -> None:
    names = [spec.name for cls in (ServerConfig, EngineConfig) for spec in fields(cls)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("argv", "environ", "port"),
    [
        ([], {}, 8000),
        ([], {"BEZEL_PORT": "1"}, 1),
        (["--port", "2"], {}, 2),
        (["--port", "2"], {"BEZEL_PORT": "1"}, 2),
        (["--port", "8000"], {"BEZEL_PORT": "1"}, 8000),
    ],
)
def test_flag_over_variable_over_default(
    argv: list[str], environ: dict[str, str], port: int
) -> None:
    assert config_of(*argv, **environ).port == port


def test_precedence_of_the_model_and_of_switches() -> None:
    environ = {"BEZEL_MODEL": "a", "BEZEL_ENABLE_PREFIX_CACHING": "0", "BEZEL_API_KEY": "x,y"}
    config = config_of(**environ)
    assert (config.engine.model, config.engine.enable_prefix_caching) == ("a", False)
    assert config.api_key == ("x", "y")
    config = config_of("b", "--enable-prefix-caching", "--api-key", "z", **environ)
    assert (config.engine.model, config.engine.enable_prefix_caching) == ("b", True)
    assert config.api_key == ("z",)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["serve", "--port", "x"], "argument --port: 'x' is not a whole number"),
        (["serve", "--port", "70000"], "port must be at least 0 and at most 65535, got 70000"),
        (["serve", "--prot", "1"], "unknown flag --prot; did you mean --port?\n"),
        (["serve", "--api-key", ""], "api_key must not be empty"),
        (["serve", "--max-model"], "unknown flag --max-model; did you mean --max-model-len?\n"),
        (["serve", "--zzz"], "unknown flag --zzz\n"),
        (["plan", "x", "--max-seqs=1"], "unknown flag --max-seqs; did you mean --max-num-seqs?\n"),
        (["bench", "serve", "--base-ur", "x"], "unknown flag --base-ur; did you mean --base-url?"),
        (["simulate", "--generat", "x"], "unknown flag --generat; did you mean --generate?\n"),
        (["doctor", "--ur", "x"], "unknown flag --ur; did you mean --url?\n"),
        (["collect-env", "--jsn"], "unknown flag --jsn; did you mean --json?\n"),
        (["serve", "a", "b"], "unrecognized arguments: b\n"),
        ([], "the following arguments are required: COMMAND"),
        (["serve", "--host", "192.0.2.1"], "can't listen on 192.0.2.1:8000"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"bezel: error: {message}")
    assert captured.err.count("\n") == 1


def test_malformed_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BEZEL_MAX_NUM_SEQS", "many")
    assert main(["serve"]) == 2
    error = "bezel: error: BEZEL_MAX_NUM_SEQS: 'many' is not a whole number\n"
    assert capsys.readouterr().err == error


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"{VERSION}\n"


def test_output_that_nobody_reads_is_no_error() -> None:
    command = [sys.executable, "-m", "bezel.server.cli", "serve", "--print-config"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(30) == 1


def test_a_command_does_without_the_modules_of_others() -> None:
    code = (
        "import sys; from bezel.server.cli import main\n"
        "main(['serve', '--print-config'])\n"
        "found = {n for n in sys.modules if n.startswith('bezel.') and n.endswith('_command')}\n"
        "sys.exit(str(found - {'bezel.server.serve_command', 'bezel.server.plan_command'}))"
    )
    done: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "set()\n"


def test_the_help_tells_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    names = ["serve", "chat", "complete", "plan", "simulate", "bench", "doctor", "collect-env"]
    assert all(f"\n    {name}" in printed for name in names)


def test_help_is_quick_because_it_imports_little() -> None:
    code = (
        "import sys; from bezel.server.cli import main\n"
        "try: main(['serve', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'fastapi', 'uvicorn', 'tokenizers', 'prometheus_client',\n"
        "         'httpx'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--max-model-len" in done.stdout
