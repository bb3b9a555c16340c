"""What `bezel chat` and `bezel complete` can be told; a flag for each field."""

from dataclasses import dataclass
from typing import Any

from bezel.engine.config import option


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings:
    """Whom to ask, and how answers are drawn; the server checks their ranges."""

    url: str = option("http://127.0.0.1:8000", "The server, with or without /v1")
    model: str | None = option(None, "Model to ask [default: the first of /v1/models]")
    api_key: str | None = option(
        None, "Key to send; better given as BEZEL_API_KEY, which others can't see", secret=True
    )
    max_tokens: int | None = option(None, "Most tokens of an answer [default: what fits]")
    temperature: float | None = option(None, "0 always takes the likeliest token")
    top_p: float | None = option(None, "Draw from the likeliest tokens of this probability in all")
    top_k: int | None = option(None, "Draw from so many of the likeliest tokens")
    seed: int | None = option(None, "Makes the draws repeatable")

    @property
    def root_url(self) -> str:
        """Without what the paths of requests begin with."""
        return self.url.rstrip("/").removesuffix("/v1")

    @property
    def sampling(self) -> dict[str, Any]:
        """The fields of a request that were given."""
        names = ("max_tokens", "temperature", "top_p", "top_k", "seed")
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSettings(ClientSettings):
    """Of a chat besides."""

    system: str | None = option(None, "The system's turn")
    think: bool | None = option(None, "Whether to think first [default: the model's own]")
    tools: str | None = option(
        None, "JSON file with the tools to declare, a list as OpenAI has it; you answer the calls"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CompleteSettings(ClientSettings):
    """Of completions: a text has no end of its own."""

    max_tokens: int | None = option(128, "Most tokens of a completion")
