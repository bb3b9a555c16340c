"""The JSON of /v1/chat/completions: content, reasoning and tool calls as OpenAI has them."""

from collections.abc import Iterator, Sequence

from bezel.engine.messages import FinishReason, TokenLogprobs
from bezel.engine.tokenizer import Tokenizer
from bezel.server.answers import Answer, Json
from bezel.server.generation import Choice
from bezel.server.logprobs import chat_logprobs
from bezel.server.parsing.parser import Parsed, ToolCallDelta
from bezel.server.schemas import ChatCompletionRequest


class ChatAnswer(Answer):
    """Answers of /v1/chat/completions."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(
        self,
        answer_id: str,
        body: ChatCompletionRequest,
        tokenizer: Tokenizer,
        prompts: Sequence[list[int]],
    ) -> None:
        super().__init__(answer_id, body, tokenizer, prompts)
        self._include_reasoning = body.include_reasoning is not False
        self._have_called: set[int] = set()

    def whole(self, choices: Sequence[Choice]) -> Json:
        self._have_called |= {i for i, choice in enumerate(choices) if choice.tool_calls}
        return super().whole(choices) | self._prompt_fields(0, choices[0].prompt_logprobs)

    def _opening(self, index: int, entries: list[TokenLogprobs]) -> Json:
        opening = self._chunk(index, {"delta": {"role": "assistant", "content": ""}})
        # All choices have the same prompt: once is enough.
        return opening | (self._prompt_fields(0, entries) if index == 0 else {})

    def _parts(self, index: int, parsed: Parsed) -> Iterator[Json]:
        if parsed.reasoning and self._include_reasoning:
            yield {"delta": _reasoning(parsed.reasoning)}
        if parsed.content:
            yield {"delta": {"content": parsed.content}}
        for call in parsed.tool_calls:
            self._have_called.add(index)
            for piece in _call_pieces(call):
                yield {"delta": {"tool_calls": [{"index": call.index} | piece]}}

    def _empty_part(self) -> Json:
        return {"delta": {}}

    def _logprobs(
        self, index: int, token_ids: list[int], entries: list[TokenLogprobs]
    ) -> Json | None:
        if self._num_logprobs is None:
            return None
        return {"content": chat_logprobs(self._tokenizer, token_ids, entries), "refusal": None}

    def _finish_reason(self, index: int, reason: FinishReason) -> str:
        called = reason is FinishReason.STOP and index in self._have_called
        return "tool_calls" if called else reason.value

    def _whole_choice(self, index: int, choice: Choice) -> Json:
        content = None if choice.tool_calls and not choice.content else choice.content
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        if choice.reasoning and self._include_reasoning:
            message |= _reasoning(choice.reasoning)
        if choice.tool_calls:
            message["tool_calls"] = [
                _call(call.id, call.name, call.arguments) for call in choice.tool_calls
            ]
        logprobs = self._logprobs(index, choice.token_ids, choice.logprobs)
        return {"message": message, "logprobs": logprobs}


def _reasoning(text: str) -> Json:
    """Under both names that clients look for."""
    return {"reasoning_content": text, "reasoning": text}


def _call(id_: str, name: str, arguments: str) -> Json:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def _call_pieces(call: ToolCallDelta) -> Iterator[Json]:
    """Who is called, then with which arguments."""
    if call.id is not None:
        yield _call(call.id, call.name or "", "")
    if call.arguments:
        yield {"function": {"arguments": call.arguments}}
