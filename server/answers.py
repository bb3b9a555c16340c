"""What the answers of both generating routes have in common, whole and in chunks.

The JSON is exactly OpenAI's. A stream is, per choice: an opening chunk (chat: the role;
completions: the echoed prompt, if wanted), chunks of what is new, one empty chunk with the finish
reason; then, if asked for, one chunk with the usage and no choices. `return_token_ids` and
`prompt_logprobs` add vLLM's fields.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from bezel.engine.messages import FinishReason, TokenLogprobs
from bezel.engine.tokenizer import Tokenizer
from bezel.server.errors import Problem
from bezel.server.events import sse_event
from bezel.server.generation import Choice, Delta
from bezel.server.logprobs import prompt_logprobs
from bezel.server.parsing.parser import Parsed
from bezel.server.schemas import GenerationRequest
from bezel.server.version import SYSTEM_FINGERPRINT

Json = dict[str, Any]

_DONE = b"data: [DONE]\n\n"


class Answer(ABC):
    """One answer on its way out; it counts the tokens that it has been given.

    Each prompt has `n` choices in a row.
    """

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(
        self,
        answer_id: str,
        body: GenerationRequest,
        tokenizer: Tokenizer,
        prompts: Sequence[list[int]],
    ) -> None:
        options = body.stream_options
        self._id = answer_id
        self._include_usage = bool(options and options.include_usage)
        self._continuous_usage = bool(options and options.continuous_usage_stats)
        self._created = int(time.time())
        self._model = body.model
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._n = body.n or 1
        self._num_logprobs = body.num_logprobs
        self._num_prompt_logprobs = body.prompt_logprobs
        self._return_token_ids = bool(body.return_token_ids)
        self._num_completion_tokens = 0
        self._num_reasoning_tokens = 0
        # For each prompt, that of the first of its choices: the others find what that one left.
        self._num_cached_tokens: dict[int, int] = {}
        self._opened: set[int] = set()
        # Of choices that aren't opened yet.
        self._prompt_logprobs: dict[int, list[TokenLogprobs]] = {}

    @abstractmethod
    def _opening(self, index: int, entries: list[TokenLogprobs]) -> Json | None:
        """The first chunk, which carries nothing new; `entries` are the prompt's logprobs."""

    @abstractmethod
    def _parts(self, index: int, parsed: Parsed) -> Iterator[Json]:
        """What is new in a choice, each part for a chunk of its own."""

    @abstractmethod
    def _empty_part(self) -> Json:
        """What a chunk without text has in its place."""

    @abstractmethod
    def _logprobs(
        self, index: int, token_ids: list[int], entries: list[TokenLogprobs]
    ) -> Json | None:
        """The field `logprobs` for further tokens of a choice."""

    @abstractmethod
    def _finish_reason(self, index: int, reason: FinishReason) -> str:
        """The reason in OpenAI's words."""

    @abstractmethod
    def _whole_choice(self, index: int, choice: Choice) -> Json:
        """A choice of a whole answer, but for what all have."""

    def begin(self) -> Iterator[bytes]:
        """Nothing: each choice has an opening chunk of its own, with its first token."""
        yield from ()

    def events(self, delta: Delta) -> Iterator[bytes]:
        """`chunks` as events."""
        return map(sse_event, self.chunks(delta))

    def end(self) -> Iterator[bytes]:
        """The usage, for those who asked for it, and what all streams end with."""
        if self._include_usage:
            yield sse_event(self.usage_chunk())
        yield _DONE

    def failed(self, problem: Problem) -> bytes:
        """OpenAI's error object; nothing comes after it."""
        return sse_event(problem.as_object())

    def chunks(self, delta: Delta) -> Iterator[Json]:
        """The chunks that tell of a delta, none if there is nothing to tell yet."""
        index, token_ids, reason = delta.index, delta.token_ids, delta.finish_reason
        self._num_completion_tokens += len(token_ids)
        self._num_reasoning_tokens += delta.num_reasoning_tokens
        self._note_cached_tokens(index, delta.num_cached_tokens)
        if index not in self._opened:
            entries = self._prompt_logprobs.setdefault(index, [])
            entries += delta.prompt_logprobs
            if not token_ids and reason is None:
                return
            self._opened.add(index)
            if opening := self._opening(index, self._prompt_logprobs.pop(index)):
                yield opening
        logprobs = self._logprobs(index, token_ids, delta.logprobs) if token_ids else None
        parts = list(self._parts(index, delta.parsed))
        if not parts and token_ids and (self._return_token_ids or logprobs):
            parts = [self._empty_part()]
        for part in parts:
            yield self._chunk(index, part, token_ids, logprobs)
            token_ids, logprobs = [], None
        if reason is not None:
            last = {"finish_reason": self._finish_reason(index, reason)}
            yield self._chunk(index, self._empty_part() | last)

    def usage_chunk(self) -> Json:
        """The chunk after the last, for those who asked for the usage."""
        return self._head(self.chunk_object) | {"choices": [], "usage": self._usage()}

    def whole(self, choices: Sequence[Choice]) -> Json:
        """The answer in one piece."""
        self._num_completion_tokens = sum(len(choice.token_ids) for choice in choices)
        self._num_reasoning_tokens = sum(choice.num_reasoning_tokens for choice in choices)
        shaped = []
        for index, choice in enumerate(choices):
            assert choice.finish_reason is not None
            self._note_cached_tokens(index, choice.num_cached_tokens)
            whole = self._whole_choice(index, choice)
            whole["finish_reason"] = self._finish_reason(index, choice.finish_reason)
            shaped.append({"index": index} | self._with_token_ids(whole, choice.token_ids))
        return self._head(self.whole_object) | {"choices": shaped, "usage": self._usage()}

    def _head(self, object_: str) -> Json:
        return {
            "id": self._id,
            "object": object_,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": SYSTEM_FINGERPRINT,
        }

    def _chunk(
        self, index: int, part: Json, token_ids: Sequence[int] = (), logprobs: Json | None = None
    ) -> Json:
        choice = {"index": index, "logprobs": logprobs, "finish_reason": None} | part
        choices = [self._with_token_ids(choice, list(token_ids))]
        chunk = self._head(self.chunk_object) | {"choices": choices}
        if self._include_usage:
            chunk["usage"] = self._usage() if self._continuous_usage else None
        return chunk

    def _usage(self) -> Json:
        num_prompt_tokens = sum(map(len, self._prompts))
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": self._num_completion_tokens,
            "total_tokens": num_prompt_tokens + self._num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._num_cached_tokens.values())},
            "completion_tokens_details": {"reasoning_tokens": self._num_reasoning_tokens},
        }

    def _note_cached_tokens(self, index: int, num_tokens: int) -> None:
        if index % self._n == 0 and num_tokens:
            self._num_cached_tokens[index // self._n] = num_tokens

    def _prompt(self, index: int) -> list[int]:
        return self._prompts[index // self._n]

    def _with_token_ids(self, choice: Json, token_ids: list[int]) -> Json:
        return choice | {"token_ids": token_ids} if self._return_token_ids else choice

    def _prompt_fields(self, index: int, entries: list[TokenLogprobs]) -> Json:
        """vLLM's fields about the prompt."""
        fields: Json = {}
        prompt_ids = self._prompt(index)
        if self._return_token_ids:
            fields["prompt_token_ids"] = prompt_ids
        if (num_top := self._num_prompt_logprobs) is not None:
            fields["prompt_logprobs"] = prompt_logprobs(
                self._tokenizer, prompt_ids, entries, num_top
            )
        return fields
