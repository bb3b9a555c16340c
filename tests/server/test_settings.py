"""Where settings come from: flags, variables, a config file; and how that is told."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from bezel.engine.config import EngineConfig
from bezel.engine.errors import ConfigError
from bezel.server.cli import build_parser, main
from bezel.server.config import ServerConfig
from bezel.server.options import Option
from bezel.server.settings import Settings, all_options, parse_config

# A value for each setting that isn't its default, as a variable has it.
SAMPLES = {bool: "{not_default}", int: "70", float: "0.5", str: "x", tuple: "x,y"}


def given(*argv: str) -> dict[str, Any]:
    return vars(build_parser().parse_args(["serve", *argv]))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "bezel.yaml"


def test_flag_over_variable_over_file_over_default(file: Path) -> None:
    file.write_text("port: 1\nhost: ::1\nmodel: a\nmax-num-seqs: 3\n")
    config = given("--config", str(file), "--port", "3")
    read = parse_config(config, {"BEZEL_PORT": "2", "BEZEL_HOST": "::2"})
    assert (read.port, read.host, read.engine.model) == (3, "::2", "a")
    assert (read.engine.max_num_seqs, read.engine.seed) == (3, EngineConfig().seed)


def test_the_file_may_be_named_by_a_variable(file: Path, tmp_path: Path) -> None:
    file.write_text("port: 1\n")
    other = tmp_path / "other.yaml"
    other.write_text("port: 2\n")
    environ = {"BEZEL_CONFIG": str(file)}
    assert parse_config({}, environ).port == 1
    assert parse_config(given("--config", str(other)), environ).port == 2


def test_a_file_has_yamls_own_values(file: Path) -> None:
    file.write_text(
        "max-model-len: 8_192\n"
        "kv_cache_memory_bytes: 2G\n"
        "max-body-bytes: 1000\n"
        "served-model-name: [gemma, '4']\n"
        "api-key: one\n"
        "gpu-memory-utilization: 0.5\n"
        "enable-prefix-caching: no\n"
        "enforce_eager: 'true'\n"
        "default-chat-template-kwargs: {enable_thinking: true, note: [1, x]}\n"
        "seed: null\n"
    )
    read = parse_config({"config": str(file)}, {})
    engine = EngineConfig(
        max_model_len=8192,
        kv_cache_memory_bytes=2 * 2**30,
        gpu_memory_utilization=0.5,
        enable_prefix_caching=False,
        enforce_eager=True,
    )
    assert read == ServerConfig(
        engine=engine,
        max_body_bytes=1000,
        served_model_name=("gemma", "4"),
        api_key=("one",),
        default_chat_template_kwargs={"enable_thinking": True, "note": [1, "x"]},
    )


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}"])
def test_an_empty_file_sets_nothing(text: str, file: Path) -> None:
    file.write_text(text)
    assert parse_config({"config": str(file)}, {}) == ServerConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-model-length: 1", "unknown setting max-model-length; did you mean max_model_len?"),
        ("zzz: 1", "unknown setting zzz"),
        ("1: 1", "unknown setting 1"),
        ("config: x.yaml", "unknown setting config"),
        ("ctx-size: 1", "ctx-size is called max-model-len here"),
        ("tensor_parallel_size: 2", "tensor_parallel_size isn't supported: one process serves"),
        ("port: many", "port: 'many' is not a whole number"),
        ("port: [1]", "port: not [1]"),
        ("port: 1.5", "port: '1.5' is not a whole number"),
        ("port: yes", "port: not True"),
        ("enforce-eager: 2", "enforce-eager: '2' is not one of 1, 0, true, false"),
        ("dtype: float16", "dtype: 'float16' is not one of auto, float32, bfloat16"),
        ("api_key: 0123", "api_key: it must be text; put it in quotes"),
        ("host: no", "host: False is no text; put it in quotes"),
        ("served_model_name: [[a]]", "served_model_name: ['a'] is no text; put it in quotes"),
        ("default_chat_template_kwargs: [1]", "default_chat_template_kwargs: not [1]"),
        ("default_chat_template_kwargs: {a: 2026-01-01}", "default_chat_template_kwargs: holds"),
        ("port: 1\nmax-num-seqs: 1\nmax_num_seqs: 2", "max_num_seqs: is there twice"),
        ("[1]", "settings must be a mapping, such as `port: 8000`"),
        ("port: 1\na: b: c", "not YAML in line 2: mapping values are not allowed here"),
        ("a: !!python/object:os.system x", "not YAML in line 1: could not determine a constr"),
        ("\udc80", "not YAML in UTF-8"),
        ("[" * 2000, "not YAML"),
    ],
    ids=lambda text: str(text)[:30].encode("ascii", "replace").decode(),
)
def test_mistakes_in_the_file_are_named(text: str, message: str, file: Path) -> None:
    file.write_text(text, errors="surrogateescape")
    with pytest.raises(ConfigError) as error:
        Settings.of({"config": str(file)}, {})
    assert error.value.message.startswith(f"{file}: {message}")
    assert "\n" not in error.value.message


def test_no_such_file() -> None:
    with pytest.raises(ConfigError, match=r"^none\.yaml: No such file or directory$"):
        Settings.of({"config": "none.yaml"}, {})


def test_a_value_out_of_range_is_told_with_its_source(file: Path) -> None:
    file.write_text("port: 70000\n")
    with pytest.raises(ConfigError) as error:
        parse_config({"config": str(file)}, {})
    assert error.value.message.endswith(f"at most 65535, got 70000 (from {file})")
    with pytest.raises(ConfigError, match=r"got 0 \(from BEZEL_MAX_NUM_SEQS\)$"):
        parse_config({}, {"BEZEL_MAX_NUM_SEQS": "0"})
    with pytest.raises(ConfigError, match=r"got 70000$"):
        parse_config({"port": 70000}, {})


def sample(option: Option) -> str:
    if option.choices:
        return str(next(choice for choice in option.choices if choice != option.default))
    if option.type not in SAMPLES:
        return '{"a": 1}'
    return SAMPLES[option.type].format(not_default=str(not option.default).lower())


@pytest.mark.parametrize("option", all_options(), ids=lambda option: option.name)
def test_every_setting_has_all_three_ways(option: Option, file: Path) -> None:
    """Flag, variable and key of the file say the same."""
    text = sample(option)
    by_variable = Settings.of({}, {option.variable: text})
    found = {s.option.name: (s.value, s.source) for s in by_variable.settings}
    value, source = found[option.name]
    assert source == option.variable and value != option.default
    flags = text.split(",") if option.type is tuple else [text]
    argv = [f"{option.flag}={flag}" for flag in flags]
    if option.type is bool:
        argv = [option.flag if text == "true" else option.flag_off]
    for arguments, source in (
        (given(*argv), option.flag),
        ({"config": str(file)}, str(file)),
    ):
        plain = list(value) if isinstance(value, tuple) else value
        file.write_text(yaml.safe_dump({option.flag.removeprefix("--"): plain}))
        settings = Settings.of(arguments, {}).settings
        found = {s.option.name: (s.value, s.source) for s in settings if s.source}
        assert found == {option.name: (value, source)}


def test_defaults_are_printed_too(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" # default\n") == len(all_options())
    file.write_text(printed)
    assert parse_config({"config": str(file)}, {}) == ServerConfig()


def test_what_is_printed_is_a_config_file(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("served_model_name: ['#1', 'a: b']\nkv-cache-memory-bytes: 2G\n")
    monkeypatch.setenv("BEZEL_API_KEY", "hush,secret")
    monkeypatch.setenv("BEZEL_DEFAULT_CHAT_TEMPLATE_KWARGS", '{"enable_thinking": true}')
    flags = ["--config", str(file), "--print-config", "--port", "9", "--no-enable-prefix-caching"]
    assert main(["serve", "google/gemma", *flags]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "hush" not in captured.out and "secret" not in captured.out
    sources = {}
    for line in captured.out.splitlines():
        setting, source = re.split(r" +# (?=\S+$)", line)
        sources[setting.split(":")[0]] = source
    assert sources.pop("# api_key") == "BEZEL_API_KEY"
    assert {name: source for name, source in sources.items() if source != "default"} == {
        "model": "--model",
        "port": "--port",
        "served_model_name": str(file),
        "kv_cache_memory_bytes": str(file),
        "default_chat_template_kwargs": "BEZEL_DEFAULT_CHAT_TEMPLATE_KWARGS",
        "enable_prefix_caching": "--enable-prefix-caching",
    }
    printed = file.with_name("printed.yaml")
    printed.write_text(captured.out)
    monkeypatch.setenv("BEZEL_CONFIG", str(file))
    wanted = parse_config(
        given("google/gemma", *flags),
        {"BEZEL_DEFAULT_CHAT_TEMPLATE_KWARGS": '{"enable_thinking": true}'},
    )
    assert parse_config({"config": str(printed)}, {}) == wanted


def test_unknown_variables_are_warned_of() -> None:
    environ = {
        **{"BEZEL_MAX_MODEL_LENGTH": "1", "BEZEL_ZZZ": "1", "BEZEL_URL": "x", "BEZEL_MODEL": "x"},
        **{"BEZEL_SERVICE_HOST": "10.0.0.1", "BEZEL_SERVICE_PORT_HTTP": "80", "OTHER": "x"},
        **{"BEZEL_PORT_80_TCP_ADDR": "10.0.0.1", "BEZEL_UI_PORT_80_TCP": "tcp://10.0.0.1:80"},
    }
    assert Settings.of({}, environ).warnings == (
        "unknown variable BEZEL_MAX_MODEL_LENGTH; did you mean BEZEL_MAX_MODEL_LEN?",
        "unknown variable BEZEL_ZZZ",
    )
