"""`ServeBenchmark`: what `bezel bench serve` asks, of whom, and how fast; a flag for each field."""

import math
from dataclasses import dataclass

from bezel.engine.config import option
from bezel.engine.errors import ConfigError

WORKLOADS = ("random", "shared-prefix", "chats")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeBenchmark:
    """One run of the load generator. Lengths are in tokens, and a prompt's is approximate: a word
    is taken for a token, and what the server counted is reported."""

    base_url: str = option("http://127.0.0.1:8000", "The server, with or without /v1")
    model: str | None = option(None, "Model to ask for [default: the first of /v1/models]")
    api_key: str | None = option(None, "Sent as bearer token")
    endpoint: str = option(
        "chat", "Route: /v1/chat/completions or /v1/completions", choices=("chat", "completions")
    )
    workload: str = option(
        "random",
        "Lone prompts, lone prompts that begin alike, or chats that resend what was said",
        choices=WORKLOADS,
    )
    num_prompts: int = option(100, "Requests in all; a turn of a chat is one")
    input_len: int = option(512, "New words in a prompt, about a token each")
    output_len: int = option(128, "Most tokens of an answer")
    prefix_len: int = option(1000, "Words that all prompts of `shared-prefix` begin with")
    turns: int = option(4, "Turns of one of the `chats`")
    ignore_eos: bool = option(False, "Ask for answers of full length; most servers know how")
    max_concurrency: int = option(8, "Most requests at once")
    request_rate: float | None = option(
        None,
        "Lone requests or chats that begin in a second, as a Poisson process "
        "[default: the next as soon as one ends]",
    )
    num_warmups: int = option(2, "Requests before those that count")
    timeout: float = option(600.0, "Seconds after which a request is given up")
    slo_ttft: float | None = option(None, "Goodput: wanted seconds to the first token")
    slo_itl: float | None = option(None, "Goodput: wanted mean seconds between tokens")
    seed: int = option(0, "Seed of words and arrivals")

    def __post_init__(self) -> None:
        """Check every range.

        Raises:
            ConfigError: naming the value that is out of range.
        """
        for name in ("num_prompts", "input_len", "output_len", "turns", "max_concurrency"):
            self._check_at_least(name, 1)
        for name in ("prefix_len", "num_warmups"):
            self._check_at_least(name, 0)
        for name in ("request_rate", "timeout", "slo_ttft", "slo_itl"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{_flag(name)} must be above 0, got {value}")

    def _check_at_least(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if value < low:
            raise ConfigError(f"{_flag(name)} must be at least {low}, got {value}")

    @property
    def root_url(self) -> str:
        """Without what the paths of requests begin with."""
        return self.base_url.rstrip("/").removesuffix("/v1")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
