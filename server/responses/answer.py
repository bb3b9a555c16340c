"""The JSON of /v1/responses, whole and as events.

A stream is `response.created`, `response.in_progress`; for each item `response.output_item.added`,
its parts and deltas, `response.output_item.done`; then `response.completed`, or `.incomplete` where
the limit of tokens ended it. Every event is numbered.
"""

import time
from collections.abc import Iterator
from typing import Any

from bezel.engine.messages import FinishReason
from bezel.server.blocks import Block, BlockBuilder, BlockEvent, BlockKind, Step
from bezel.server.errors import Problem
from bezel.server.events import sse_event
from bezel.server.generation import Delta, TextRequest
from bezel.server.responses.schemas import ResponsesRequest

Json = dict[str, Any]

_PREFIXES = {BlockKind.REASONING: "rs", BlockKind.TEXT: "msg", BlockKind.CALL: "fc"}


class ResponseAnswer:
    """One answer on its way out."""

    def __init__(self, id_: str, body: ResponsesRequest, request: TextRequest) -> None:
        self.id = id_
        self._body = body
        self._request = request
        self._created = int(time.time())
        self._builder = BlockBuilder()
        self._num_events = 0
        self._num_output_tokens = 0
        self._num_reasoning_tokens = 0
        self._num_cached_tokens = 0
        self._finish_reason: FinishReason | None = None

    def begin(self) -> Iterator[bytes]:
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))

    def events(self, delta: Delta) -> Iterator[bytes]:
        for event in self._add(delta):
            yield from self._block_events(event)

    def end(self) -> Iterator[bytes]:
        status = self._status()
        yield self._event(f"response.{status}", response=self._response(status))

    def failed(self, problem: Problem) -> bytes:
        error = problem.as_object()["error"]
        code = error["code"] or error["type"]
        return self._event("error", code=code, message=error["message"], param=error["param"])

    def add(self, delta: Delta) -> None:
        """Take in a piece of an answer that goes out whole."""
        for _ in self._add(delta):
            pass

    def whole(self) -> Json:
        return self._response(self._status())

    def _add(self, delta: Delta) -> Iterator[BlockEvent]:
        self._num_output_tokens += len(delta.token_ids)
        self._num_reasoning_tokens += delta.num_reasoning_tokens
        self._num_cached_tokens += delta.num_cached_tokens
        yield from self._builder.add(delta.parsed)
        if delta.finish_reason is not None:
            self._finish_reason = delta.finish_reason
            yield from self._builder.close()

    def _status(self) -> str:
        return "incomplete" if self._finish_reason is FinishReason.LENGTH else "completed"

    def _response(self, status: str) -> Json:
        body = self._body
        reasoning = body.reasoning
        is_over = status != "in_progress"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"}
            if status == "incomplete"
            else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": [self._item(block, is_open=False) for block in self._builder.blocks],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {
                "effort": reasoning.effort if reasoning else None,
                "summary": None,
            },
            "store": False,
            "temperature": self._request.params.temperature,
            "text": {"format": (body.text and body.text.format) or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": self._request.params.top_p,
            "truncation": body.truncation or "disabled",
            "usage": self._usage() if is_over else None,
            "user": body.user,
        }

    def _usage(self) -> Json:
        num_input = len(self._request.prompt_ids)
        return {
            "input_tokens": num_input,
            "input_tokens_details": {"cached_tokens": self._num_cached_tokens},
            "output_tokens": self._num_output_tokens,
            "output_tokens_details": {"reasoning_tokens": self._num_reasoning_tokens},
            "total_tokens": num_input + self._num_output_tokens,
        }

    def _event(self, type_: str, **fields: Any) -> bytes:
        event = sse_event({"type": type_, "sequence_number": self._num_events, **fields}, type_)
        self._num_events += 1
        return event

    def _item_id(self, block: Block) -> str:
        return f"{_PREFIXES[block.kind]}_{self.id.removeprefix('resp_')}_{block.index}"

    def _item(self, block: Block, is_open: bool) -> Json:
        item: Json = {"id": self._item_id(block), "status": "in_progress"}
        if not is_open:
            is_cut = self._status() == "incomplete" and block is self._builder.blocks[-1]
            item["status"] = "incomplete" if is_cut else "completed"
        if block.kind is BlockKind.CALL:
            call = {"call_id": block.call_id, "name": block.name, "arguments": block.text}
            return item | {"type": "function_call", **call}
        content = [] if is_open else [_part(block)]
        if block.kind is BlockKind.REASONING:
            return item | {"type": "reasoning", "summary": [], "content": content}
        return item | {"type": "message", "role": "assistant", "content": content}

    def _block_events(self, event: BlockEvent) -> Iterator[bytes]:
        block = event.block
        if event.step is Step.OPENED:
            item = self._item(block, is_open=True)
            yield self._event("response.output_item.added", output_index=block.index, item=item)
            if block.kind is not BlockKind.CALL:
                yield self._part_event("response.content_part.added", block, part=_part(block))
        elif event.step is Step.ADDED:
            yield self._text_event(block, "delta", delta=event.text)
        else:
            yield from self._closing_events(block)

    def _closing_events(self, block: Block) -> Iterator[bytes]:
        if block.kind is BlockKind.CALL:
            yield self._text_event(block, "done", arguments=block.text, name=block.name)
        else:
            yield self._text_event(block, "done", text=block.text)
            yield self._part_event("response.content_part.done", block, part=_part(block))
        item = self._item(block, is_open=False)
        yield self._event("response.output_item.done", output_index=block.index, item=item)

    def _text_event(self, block: Block, step: str, **fields: Any) -> bytes:
        if block.kind is BlockKind.CALL:
            place = {"item_id": self._item_id(block), "output_index": block.index}
            return self._event(f"response.function_call_arguments.{step}", **place, **fields)
        if block.kind is BlockKind.REASONING:
            return self._part_event(f"response.reasoning_text.{step}", block, **fields)
        return self._part_event(f"response.output_text.{step}", block, **fields, logprobs=[])

    def _part_event(self, type_: str, block: Block, **fields: Any) -> bytes:
        place = {
            "item_id": self._item_id(block),
            "output_index": block.index,
            "content_index": 0,
        }
        return self._event(type_, **place, **fields)


def _part(block: Block) -> Json:
    if block.kind is BlockKind.REASONING:
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}
