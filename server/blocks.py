"""One output as blocks: thought, text and tool calls in the order in which the model made them.

OpenAI's responses and Anthropic's messages are both lists of such blocks. Whole answers are made of
what streams announce, so that the two can't differ.

    Parsed, Parsed, …  ─▶  opened 0   added 0 "Let me"   added 0 " see."   closed 0   opened 1 …
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from bezel.server.parsing.parser import Parsed, ToolCallDelta


class BlockKind(Enum):
    """What a block is."""

    REASONING = "reasoning"
    TEXT = "text"
    CALL = "call"


@dataclass(slots=True)
class Block:
    """`text` is the arguments' JSON in calls, which alone have `call_id` and `name`."""

    index: int
    kind: BlockKind
    text: str = ""
    call_id: str = ""
    name: str = ""


class Step(Enum):
    """What happened to a block."""

    OPENED = "opened"
    ADDED = "added"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """`text` is what was added."""

    step: Step
    block: Block
    text: str = ""


class BlockBuilder:
    """Only the last block can still grow."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._open: Block | None = None
        self._call_index = -1

    def add(self, parsed: Parsed) -> Iterator[BlockEvent]:
        """What further output does."""
        if parsed.reasoning:
            yield from self._add_text(BlockKind.REASONING, parsed.reasoning)
        if parsed.content:
            yield from self._add_text(BlockKind.TEXT, parsed.content)
        for call in parsed.tool_calls:
            yield from self._add_call(call)

    def close(self) -> Iterator[BlockEvent]:
        """What the end of the output does."""
        if self._open is not None:
            yield BlockEvent(Step.CLOSED, self._open)
            self._open = None

    def _add_text(self, kind: BlockKind, text: str) -> Iterator[BlockEvent]:
        if self._open is None or self._open.kind is not kind:
            yield from self._begin(Block(len(self.blocks), kind))
        yield self._grow(text)

    def _add_call(self, call: ToolCallDelta) -> Iterator[BlockEvent]:
        if call.index != self._call_index:
            self._call_index = call.index
            block = Block(len(self.blocks), BlockKind.CALL)
            block.call_id, block.name = call.id or "", call.name or ""
            yield from self._begin(block)
        if call.arguments:
            yield self._grow(call.arguments)

    def _begin(self, block: Block) -> Iterator[BlockEvent]:
        yield from self.close()
        self._open = block
        self.blocks.append(block)
        yield BlockEvent(Step.OPENED, block)

    def _grow(self, text: str) -> BlockEvent:
        assert self._open is not None
        self._open.text += text
        return BlockEvent(Step.ADDED, self._open, text)
