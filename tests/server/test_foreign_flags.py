"""Command lines of other servers, pasted."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from bezel.engine.errors import ConfigError
from bezel.server.cli import build_parser, main
from bezel.server.command_line import canonical
from bezel.server.config import ServerConfig
from bezel.server.foreign_flags import FOREIGN, RENAMED, foreign_setting
from bezel.server.settings import all_options, parse_config

# As Gemma 4 is started with vLLM, by its own flags for it and others that are common.
VLLM = """
google/gemma-4-31B-it --tensor-parallel-size 1 --max-model-len 32768
--gpu-memory-utilization 0.90 --enable-auto-tool-choice --tool-call-parser gemma4
--reasoning-parser gemma4 --chat-template examples/tool_chat_template_gemma4.jinja
--limit-mm-per-prompt '{"image": 4, "audio": 1}' --limit_mm_per_prompt.video 0
--async-scheduling --trust-remote-code --enable-chunked-prefill --max_num_seqs=16 -tp 1
--host 0.0.0.0 --port 9000
"""


def test_vllms_command_for_gemma_is_understood() -> None:
    arguments = build_parser().parse_args(canonical(["serve", *shlex.split(VLLM)]))
    config = parse_config(vars(arguments), {})
    assert config.engine.model == "google/gemma-4-31B-it"
    assert (config.engine.max_model_len, config.engine.max_num_seqs) == (32768, 16)
    assert (config.host, config.port) == ("0.0.0.0", 9000)
    assert len(arguments.foreign_flags) == 11


def test_what_is_not_needed_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--tool-call-parser", "gemma4", "x", "-fa", "on", "--print-config"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("model: x ")
    assert captured.err == (
        "bezel: warning: --tool-call-parser isn't needed: thoughts and calls are told by Gemma's "
        "own tokens\nbezel: warning: -fa isn't needed: attention is always fused\n"
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--tensor-parallel-size 2", "--tensor-parallel-size isn't supported: one process serves"),
        ("--chat-template mine.jinja", "--chat-template isn't supported: the checkpoint's own"),
        ("--hf-token hf_secret", "--hf-token isn't supported: set HF_TOKEN instead\n"),
        ("--enable-lora", "--enable-lora isn't supported: adapters aren't served yet\n"),
        ("--lora-modules a b", "--lora-modules isn't supported: adapters aren't served yet\n"),
        ("-c 8192", "-c is called --max-model-len here\n"),
        ("-hf google/gemma", "-hf isn't supported: name the repository as MODEL\n"),
        ("-m model.gguf", "-m is called --model here\n"),
        ("--context_length 1", "--context-length is called --max-model-len here\n"),
        ("--np=4", "unknown flag --np\n"),
    ],
)
def test_what_would_be_missed_is_refused(
    argv: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *argv.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bezel: error: {message}") and error.count("\n") == 1
    assert "secret" not in error


@pytest.mark.parametrize("flag", RENAMED)
def test_other_names_lead_to_flags_that_are_there(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = all_options()
    assert RENAMED[flag] in {name for o in options for name in (o.flag, o.flag_off)}
    assert main(["serve", flag, "1"]) == 2
    assert capsys.readouterr().err == f"bezel: error: {flag} is called {RENAMED[flag]} here\n"


def test_no_flag_is_there_twice() -> None:
    flags = [flag for foreign in FOREIGN for flag in foreign.flags] + list(RENAMED)
    assert len(flags) == len(set(flags))


def test_they_are_not_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    printed = capsys.readouterr().out
    assert "--max-model-len" in printed and "--tool-call-parser" not in printed


@pytest.mark.parametrize(
    ("name", "value", "warning"),
    [
        ("tool-call-parser", "gemma4", "tool-call-parser isn't needed: thoughts and calls"),
        ("tensor_parallel_size", 1, "tensor_parallel_size isn't needed: one process"),
        ("limit-mm-per-prompt", {"image": 4}, "limit-mm-per-prompt isn't needed: only text"),
        ("enable_lora", False, "enable_lora isn't needed: adapters"),
        ("trust-remote-code", True, "trust-remote-code isn't needed: no code"),
    ],
)
def test_in_a_config_file(name: str, value: Any, warning: str, tmp_path: Path) -> None:
    said = foreign_setting(name, value)
    assert said is not None and said.startswith(warning)


def test_what_nobody_has_is_unknown_in_a_file() -> None:
    assert foreign_setting("zzz", 1) is None
    with pytest.raises(ConfigError, match=r"^enable-lora isn't supported"):
        foreign_setting("enable-lora", True)


def test_after_two_dashes_all_are_values() -> None:
    assert canonical(["chat", "--top_p=1", "--", "--top_p"]) == [
        "chat",
        "--top-p=1",
        "--",
        "--top_p",
    ]
    assert canonical(["--port.x_y=a_b", "a_b", "--a_b c"]) == ["--port.x_y=a_b", "a_b", "--a_b c"]


def test_nothing_is_changed_by_them() -> None:
    arguments = build_parser().parse_args(["serve", "--jinja", "-ngl", "99", "--flash-attn"])
    assert parse_config(vars(arguments), {}) == ServerConfig()
