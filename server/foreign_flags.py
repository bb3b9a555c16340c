"""Flags of vLLM, SGLang and llama-server that Bezel doesn't have, so that their commands can be
pasted: those without need are taken with a warning, others are told under their names here.

What would change an answer, or promises what isn't there, is refused with a reason.
"""

import argparse
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from bezel.engine.errors import ConfigError

# The attribute of the namespace in which warnings are gathered.
WARNINGS = "foreign_flags"

RENAMED: Mapping[str, str] = MappingProxyType(
    {
        "-a": "--served-model-name",
        "--alias": "--served-model-name",
        "-b": "--max-num-batched-tokens",
        "--batch-size": "--max-num-batched-tokens",
        "-ub": "--max-num-batched-tokens",
        "--ubatch-size": "--max-num-batched-tokens",
        "--chunked-prefill-size": "--max-num-batched-tokens",
        "-c": "--max-model-len",
        "--ctx-size": "--max-model-len",
        "--context-length": "--max-model-len",
        "-m": "--model",
        "--model-path": "--model",
        "--max-queued-requests": "--max-num-queued-reqs",
        "--max-running-requests": "--max-num-seqs",
        "-np": "--max-num-seqs",
        "--parallel": "--max-num-seqs",
        "--mem-fraction-static": "--gpu-memory-utilization",
        "--num-gpu-blocks-override": "--kv-cache-memory-bytes",
        "--page-size": "--block-size",
        "-q": "--quantization",
        "--disable-radix-cache": "--no-enable-prefix-caching",
        "--disable-log-requests": "--no-enable-log-requests",
        "--uvicorn-log-level": "--log-level",
    }
)


@dataclass(frozen=True, slots=True)
class ForeignFlag:
    """Flags that are answered by the same reason. `nargs` is argparse's.

    `accepts` matches the values with which nothing is lost; None refuses all.
    """

    names: str
    reason: str
    nargs: int | str = 1
    accepts: str | None = ".*"

    @property
    def flags(self) -> list[str]:
        return self.names.split()

    def judge(self, name: str, value: str) -> str:
        """A warning that the flag does nothing.

        Raises:
            ConfigError: it would have to do something.
        """
        if self.accepts is None or not re.fullmatch(self.accepts, value, re.DOTALL):
            raise ConfigError(f"{name} isn't supported: {self.reason}")
        return f"{name} isn't needed: {self.reason}"


_TOKENS = "thoughts and calls are told by Gemma's own tokens"
_TEXT = "only text is served"
_DEVICE = "one process serves one model on one device"
_PROXY = "put a proxy that speaks TLS in front"

FOREIGN: tuple[ForeignFlag, ...] = (
    ForeignFlag("--enable-auto-tool-choice --enable-reasoning", _TOKENS, 0),
    ForeignFlag("--tool-call-parser --reasoning-parser", _TOKENS),
    ForeignFlag(
        "--chat-template",
        "the checkpoint's own template is used; put yours into its directory as "
        "chat_template.jinja",
        accepts=r"(.*/)?tool_chat_template_gemma\w*\.jinja",
    ),
    ForeignFlag("--chat-template-content-format", "contents become what the template reads"),
    ForeignFlag("--jinja", "the checkpoint's chat template is always used", 0),
    ForeignFlag("--trust-remote-code", "no code of a checkpoint is ever run", 0),
    ForeignFlag("--load-format", "the format is known by the files", accepts="auto|safetensors"),
    ForeignFlag(
        "--enable-chunked-prefill --no-enable-chunked-prefill",
        "prompts are always computed in chunks",
        0,
    ),
    ForeignFlag("--async-scheduling --no-async-scheduling", "scheduling is Bezel's own", 0),
    ForeignFlag("--cont-batching", "requests are always batched as they come", 0),
    ForeignFlag(
        "--scheduling-policy --schedule-policy",
        "requests go by their priority, and among equals in turns of their keys",
    ),
    ForeignFlag("--attention-backend --distributed-executor-backend", "there is one only"),
    ForeignFlag("--flash-attn -fa", "attention is always fused", "?", "on|off|auto|[01]|"),
    ForeignFlag(
        "--compilation-config -O --max-cudagraph-capture-size",
        "decode steps are recorded by themselves; --enforce-eager turns it off",
    ),
    ForeignFlag(
        "--cudagraph-capture-sizes",
        "decode steps are recorded by themselves; --enforce-eager turns it off",
        "+",
    ),
    ForeignFlag(
        "--limit-mm-per-prompt --mm-processor-kwargs --media-io-kwargs --mm-processor-cache-gb "
        "--allowed-local-media-path --mm-encoder-tp-mode",
        _TEXT,
    ),
    ForeignFlag("--language-model-only --skip-mm-profiling", _TEXT, 0),
    ForeignFlag("--task --runner", "Bezel generates text", accepts="auto|generate"),
    ForeignFlag(
        "--guided-decoding-backend --structured-outputs-config", "grammars have one engine"
    ),
    ForeignFlag("--generation-config", "defaults are the checkpoint's", accepts="auto"),
    ForeignFlag("--speculative-config", "there is no speculation yet; answers are the same"),
    ForeignFlag("--enable-prompt-tokens-details", "the usage always tells them", 0),
    ForeignFlag("--enable-request-id-headers", "every answer has x-request-id", 0),
    ForeignFlag("--enable-metrics --metrics", "/metrics is always there", 0),
    ForeignFlag("--disable-log-stats", "statistics are in /metrics, not in the log", 0),
    ForeignFlag("--disable-uvicorn-access-log", "there is none but the lines of requests", 0),
    ForeignFlag(
        "--tensor-parallel-size -tp --tp-size --pipeline-parallel-size -pp --data-parallel-size "
        "-dp",
        _DEVICE,
        accepts="1",
    ),
    ForeignFlag("--enable-expert-parallel", _DEVICE, 0),
    ForeignFlag("-ngl --n-gpu-layers --gpu-layers", "the whole model is on --device"),
    ForeignFlag("-t --threads", "there are as many threads as cores to run on"),
    ForeignFlag("--mlock --no-mmap", "weights are packed when they are loaded", 0),
    ForeignFlag("--swap-space --cpu-offload-gb", "nothing is moved out", accepts=r"0(\.0*)?"),
    ForeignFlag("--kv-cache-dtype", "pages have the format of --dtype", accepts="auto"),
    ForeignFlag("--enable-lora", "adapters aren't served yet", 0, None),
    ForeignFlag("--lora-modules", "adapters aren't served yet", "+", None),
    ForeignFlag("-hf --hf-repo", "name the repository as MODEL", accepts=None),
    ForeignFlag("--tokenizer", "the checkpoint's own is used", accepts=None),
    ForeignFlag("--revision", "download it and name its directory", accepts=None),
    ForeignFlag("--hf-token", "set HF_TOKEN instead", accepts=None),
    ForeignFlag("--download-dir", "set HF_HOME instead", accepts=None),
    ForeignFlag(
        "--enable-force-include-usage",
        "a request asks for it by stream_options.include_usage",
        0,
        None,
    ),
    ForeignFlag("--ssl-keyfile --ssl-certfile --ssl-ca-certs", _PROXY, accepts=None),
)


def add_foreign_flags(parser: argparse.ArgumentParser, own: Iterable[str]) -> None:
    """Make a parser take all of them but `own`, unseen in its help."""
    taken = set(own)
    for foreign in FOREIGN:
        for flag in foreign.flags:
            if flag not in taken:
                parser.add_argument(
                    flag,
                    action=_Judge,
                    foreign=foreign,
                    nargs=foreign.nargs,
                    dest=WARNINGS,
                    default=argparse.SUPPRESS,
                    help=argparse.SUPPRESS,
                )


def is_foreign(flag: str) -> bool:
    """Whether it is one of them, whoever has it too."""
    return any(flag in foreign.flags for foreign in FOREIGN)


def foreign_setting(name: str, value: Any) -> str | None:
    """A warning for a key of a config file that is one of these flags; None for any other.

    Raises:
        ConfigError: it isn't supported, or is called otherwise here.
    """
    flag = "--" + name.replace("_", "-")
    if flag in RENAMED:
        raise ConfigError(f"{name} is called {RENAMED[flag].removeprefix('--')} here")
    for foreign in FOREIGN:
        if flag in foreign.flags:
            if value is None or value is False:
                return f"{name} isn't needed: {foreign.reason}"
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            return foreign.judge(name, text)
    return None


class _Judge(argparse.Action):
    """Gathers the warning of a flag in the namespace."""

    def __init__(self, *, foreign: ForeignFlag, **more: Any) -> None:
        super().__init__(**more)
        self._foreign = foreign

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        # Of `nargs="?"` it is one text or None, of the others a list.
        words = [values] if isinstance(values, str) else values or []
        assert option_string is not None
        warning = self._foreign.judge(option_string, " ".join(words))
        setattr(namespace, WARNINGS, [*getattr(namespace, WARNINGS, []), warning])
