"""The JSON of /v1/completions: text, behind the prompt if that is to be echoed."""

from collections.abc import Iterator, Sequence

from bezel.engine.messages import FinishReason, TokenLogprobs
from bezel.engine.tokenizer import Tokenizer
from bezel.server.answers import Answer, Json
from bezel.server.generation import Choice
from bezel.server.logprobs import CompletionLogprobs, prompt_text
from bezel.server.parsing.parser import Parsed
from bezel.server.schemas import CompletionRequest


class CompletionAnswer(Answer):
    """Answers of /v1/completions."""

    id_prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(
        self,
        answer_id: str,
        body: CompletionRequest,
        tokenizer: Tokenizer,
        prompts: Sequence[list[int]],
    ) -> None:
        super().__init__(answer_id, body, tokenizer, prompts)
        self._echo = bool(body.echo)
        self._skip_special_tokens = body.skip_special_tokens is not False
        self._lists_by_choice: dict[int, CompletionLogprobs] = {}

    def _opening(self, index: int, entries: list[TokenLogprobs]) -> Json | None:
        fields = self._prompt_fields(index, entries)
        if not (self._echo or fields):
            return None
        part = {"text": self._echoed(index)} | fields
        return self._chunk(index, part, logprobs=self._echoed_logprobs(index, entries))

    def _parts(self, index: int, parsed: Parsed) -> Iterator[Json]:
        if parsed.content:
            yield {"text": parsed.content}

    def _empty_part(self) -> Json:
        return {"text": ""}

    def _logprobs(
        self, index: int, token_ids: list[int], entries: list[TokenLogprobs]
    ) -> Json | None:
        lists = self._lists(index)
        return None if lists is None else lists.of_output(token_ids, entries)

    def _finish_reason(self, index: int, reason: FinishReason) -> str:
        return reason.value

    def _whole_choice(self, index: int, choice: Choice) -> Json:
        echoed = self._echoed_logprobs(index, choice.prompt_logprobs) or {}
        logprobs = self._logprobs(index, choice.token_ids, choice.logprobs)
        if logprobs is not None:
            logprobs = {name: echoed.get(name, []) + values for name, values in logprobs.items()}
        whole = {"text": self._echoed(index) + choice.content, "logprobs": logprobs}
        return whole | self._prompt_fields(index, choice.prompt_logprobs)

    def _echoed(self, index: int) -> str:
        return prompt_text(self._tokenizer, self._prompt(index)) if self._echo else ""

    def _echoed_logprobs(self, index: int, entries: list[TokenLogprobs]) -> Json | None:
        lists = self._lists(index)
        if lists is None or not self._echo:
            return None
        return lists.of_prompt(self._prompt(index), entries)

    def _lists(self, index: int) -> CompletionLogprobs | None:
        if self._num_logprobs is None:
            return None
        if index not in self._lists_by_choice:
            self._lists_by_choice[index] = CompletionLogprobs(
                self._tokenizer, self._num_logprobs, self._skip_special_tokens
            )
        return self._lists_by_choice[index]
