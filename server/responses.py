"""The JSON of answers, whole and in chunks, exactly as OpenAI has it.

Both routes differ only in these shapes. A stream is, per choice: an opening chunk (chat
only), chunks of text, one empty chunk with the finish reason; then, if asked for, one chunk
with the usage and no choices. `return_token_ids` adds vLLM's fields with token ids.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from bezel.engine.messages import FinishReason
from bezel.server.generation import Delta
from bezel.server.version import SYSTEM_FINGERPRINT


@dataclass(slots=True)
class Choice:
    """The whole text of one sequence."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.finish_reason = delta.finish_reason


@dataclass(kw_only=True)
class Answer(ABC):
    """One answer on its way out; it counts the tokens that it has been given."""

    id: str
    created: int
    model: str
    prompts: Sequence[list[int]]
    include_usage: bool
    return_token_ids: bool
    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __post_init__(self) -> None:
        self._num_completion_tokens = 0
        self._opened: set[int] = set()

    @abstractmethod
    def _opening(self, index: int) -> dict[str, Any] | None:
        """The choice of the first chunk, which carries no text."""

    @abstractmethod
    def _piece(self, index: int, text: str | None, token_ids: list[int]) -> dict[str, Any]:
        """The choice of a chunk; text None in the one that only ends the sequence."""

    @abstractmethod
    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """The choice of a whole answer."""

    def chunks(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """The chunks that tell of a delta, none if there is nothing to tell yet."""
        index = delta.index
        self._num_completion_tokens += len(delta.token_ids)
        if index not in self._opened:
            self._opened.add(index)
            if opening := self._opening(index):
                yield self._chunk(opening)
        if delta.text or (self.return_token_ids and delta.token_ids):
            yield self._chunk(self._piece(index, delta.text, delta.token_ids))
        if delta.finish_reason is not None:
            last = self._piece(index, None, []) | {"finish_reason": delta.finish_reason}
            yield self._chunk(last)

    def usage_chunk(self) -> dict[str, Any]:
        """The chunk after the last, for those who asked for the usage."""
        return self._head(self.chunk_object) | {"choices": [], "usage": self._usage()}

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer in one piece."""
        self._num_completion_tokens = sum(len(choice.token_ids) for choice in choices)
        return self._head(self.whole_object) | {
            "choices": [self._choice(index, choice) for index, choice in enumerate(choices)],
            "usage": self._usage(),
        }

    def _head(self, object_: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": object_,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": SYSTEM_FINGERPRINT,
        }

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = self._head(self.chunk_object) | {"choices": [choice]}
        if self.include_usage:
            chunk["usage"] = None
        return chunk

    def _usage(self) -> dict[str, Any]:
        num_prompt_tokens = sum(map(len, self.prompts))
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": self._num_completion_tokens,
            "total_tokens": num_prompt_tokens + self._num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": 0},
        }

    def _with_token_ids(self, choice: dict[str, Any], token_ids: list[int]) -> dict[str, Any]:
        return choice | {"token_ids": token_ids} if self.return_token_ids else choice


class ChatAnswer(Answer):
    """Answers of /v1/chat/completions."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        whole = super().whole(choices)
        return whole | self._prompt_token_ids()

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = super()._chunk(choice)
        return chunk | self._prompt_token_ids() if "role" in choice["delta"] else chunk

    def _prompt_token_ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": self.prompts[0]} if self.return_token_ids else {}

    def _opening(self, index: int) -> dict[str, Any]:
        return self._delta(index, {"role": "assistant", "content": ""}, [])

    def _piece(self, index: int, text: str | None, token_ids: list[int]) -> dict[str, Any]:
        return self._delta(index, {} if text is None else {"content": text}, token_ids)

    def _delta(self, index: int, delta: dict[str, Any], token_ids: list[int]) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._with_token_ids(choice, token_ids)

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        whole = {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": None,
            "finish_reason": choice.finish_reason,
        }
        return self._with_token_ids(whole, choice.token_ids)


class CompletionAnswer(Answer):
    """Answers of /v1/completions; with several prompts, each prompt has its choice."""

    id_prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def _opening(self, index: int) -> dict[str, Any] | None:
        if not self.return_token_ids:
            return None
        return self._piece(index, "", []) | {"prompt_token_ids": self.prompts[index]}

    def _piece(self, index: int, text: str | None, token_ids: list[int]) -> dict[str, Any]:
        choice = {"index": index, "text": text or "", "logprobs": None, "finish_reason": None}
        return self._with_token_ids(choice, token_ids)

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        whole = {
            "index": index,
            "text": choice.text,
            "logprobs": None,
            "finish_reason": choice.finish_reason,
        }
        if self.return_token_ids:
            whole["prompt_token_ids"] = self.prompts[index]
        return self._with_token_ids(whole, choice.token_ids)
