"""The JSON of /v1/messages, whole and as events.

A stream is: `message_start`; for each block `content_block_start`, deltas, `content_block_stop`;
`message_delta` with the reason and the usage; `message_stop`.
"""

import json
from collections.abc import Iterator
from typing import Any

from bezel.engine.messages import FinishReason
from bezel.server.blocks import Block, BlockBuilder, BlockEvent, BlockKind, Step
from bezel.server.errors import Problem
from bezel.server.events import sse_event
from bezel.server.generation import Delta, TextRequest

Json = dict[str, Any]


class MessageAnswer:
    """One answer on its way out."""

    def __init__(self, id_: str, model: str, request: TextRequest) -> None:
        self.id = id_
        self._model = model
        self._request = request
        self._builder = BlockBuilder()
        self._num_output_tokens = 0
        self._num_cached_tokens = 0
        self._finish_reason: FinishReason | None = None

    def begin(self) -> Iterator[bytes]:
        yield _event("message_start", message=self._message())

    def events(self, delta: Delta) -> Iterator[bytes]:
        for event in self._add(delta):
            yield _block_event(event)

    def end(self) -> Iterator[bytes]:
        yield _event("message_delta", delta=self._ending(), usage=self._usage())
        yield _event("message_stop")

    def failed(self, problem: Problem) -> bytes:
        return sse_event(problem.as_object("/v1/messages"), "error")

    def add(self, delta: Delta) -> None:
        """Take in a piece of an answer that goes out whole."""
        for _ in self._add(delta):
            pass

    def whole(self) -> Json:
        return self._message()

    def _add(self, delta: Delta) -> Iterator[BlockEvent]:
        self._num_output_tokens += len(delta.token_ids)
        self._num_cached_tokens += delta.num_cached_tokens
        yield from self._builder.add(delta.parsed)
        if delta.finish_reason is not None:
            self._finish_reason = delta.finish_reason
            yield from self._builder.close()

    def _message(self) -> Json:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [_whole_block(block) for block in self._builder.blocks],
            **self._ending(),
            "usage": self._usage(),
        }

    def _ending(self) -> Json:
        """Why it ended; nulls while it goes on."""
        stop = self._request.parser.matched_stop
        reason: str | None
        if self._finish_reason is None:
            reason = None
        elif self._finish_reason is FinishReason.LENGTH:
            reason = "max_tokens"
        elif stop is not None:
            reason = "stop_sequence"
        else:
            called = any(block.kind is BlockKind.CALL for block in self._builder.blocks)
            reason = "tool_use" if called else "end_turn"
        return {"stop_reason": reason, "stop_sequence": stop}

    def _usage(self) -> Json:
        return {
            "input_tokens": len(self._request.prompt_ids) - self._num_cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self._num_cached_tokens,
            "output_tokens": self._num_output_tokens,
        }


def _event(type_: str, **fields: Any) -> bytes:
    return sse_event({"type": type_, **fields}, type_)


def _block_event(event: BlockEvent) -> bytes:
    index = event.block.index
    if event.step is Step.OPENED:
        return _event("content_block_start", index=index, content_block=_empty_block(event.block))
    if event.step is Step.ADDED:
        return _event("content_block_delta", index=index, delta=_block_delta(event))
    return _event("content_block_stop", index=index)


def _empty_block(block: Block) -> Json:
    if block.kind is BlockKind.TEXT:
        return {"type": "text", "text": ""}
    if block.kind is BlockKind.REASONING:
        # Nothing is signed here; clients want the field all the same, and send it back.
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": {}}


def _block_delta(event: BlockEvent) -> Json:
    if event.block.kind is BlockKind.TEXT:
        return {"type": "text_delta", "text": event.text}
    if event.block.kind is BlockKind.REASONING:
        return {"type": "thinking_delta", "thinking": event.text}
    return {"type": "input_json_delta", "partial_json": event.text}


def _whole_block(block: Block) -> Json:
    whole = _empty_block(block)
    if block.kind is BlockKind.TEXT:
        whole["text"] = block.text
    elif block.kind is BlockKind.REASONING:
        whole["thinking"] = block.text
    else:
        whole["input"] = _arguments(block.text)
    return whole


def _arguments(text: str) -> Json:
    """The input of a call; one that was cut off can't be told as an object, and is empty."""
    try:
        arguments = json.loads(text or "{}")
    except ValueError:
        return {}
    return arguments if isinstance(arguments, dict) else {}
