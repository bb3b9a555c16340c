"""Outputs as blocks."""

from hypothesis import given
from hypothesis import strategies as st

from bezel.server.blocks import Block, BlockBuilder, BlockEvent, BlockKind, Step
from bezel.server.parsing.parser import Parsed, ToolCallDelta


def test_blocks_follow_the_output() -> None:
    builder = BlockBuilder()
    outputs = [
        Parsed(reasoning="Hm"),
        Parsed(reasoning="m.", content="Let"),
        Parsed(content=" me"),
        Parsed(tool_calls=(ToolCallDelta(0, "c0", "f", "{"),)),
        Parsed(tool_calls=(ToolCallDelta(0, None, None, "}"), ToolCallDelta(1, "c1", "g", "{}"))),
        Parsed(content="?"),
    ]
    events = [event for output in outputs for event in builder.add(output)]
    events += builder.close()
    assert [(e.step, e.block.index, e.text) for e in events] == [
        (Step.OPENED, 0, ""),
        (Step.ADDED, 0, "Hm"),
        (Step.ADDED, 0, "m."),
        (Step.CLOSED, 0, ""),
        (Step.OPENED, 1, ""),
        (Step.ADDED, 1, "Let"),
        (Step.ADDED, 1, " me"),
        (Step.CLOSED, 1, ""),
        (Step.OPENED, 2, ""),
        (Step.ADDED, 2, "{"),
        (Step.ADDED, 2, "}"),
        (Step.CLOSED, 2, ""),
        (Step.OPENED, 3, ""),
        (Step.ADDED, 3, "{}"),
        (Step.CLOSED, 3, ""),
        (Step.OPENED, 4, ""),
        (Step.ADDED, 4, "?"),
        (Step.CLOSED, 4, ""),
    ]
    assert builder.blocks == [
        Block(0, BlockKind.REASONING, "Hmm."),
        Block(1, BlockKind.TEXT, "Let me"),
        Block(2, BlockKind.CALL, "{}", "c0", "f"),
        Block(3, BlockKind.CALL, "{}", "c1", "g"),
        Block(4, BlockKind.TEXT, "?"),
    ]
    assert list(builder.close()) == []


PARSED = st.builds(Parsed, content=st.text(max_size=2), reasoning=st.text(max_size=2))


@given(st.lists(PARSED))
def test_events_add_up_to_the_blocks(outputs: list[Parsed]) -> None:
    builder = BlockBuilder()
    events: list[BlockEvent] = [e for output in outputs for e in builder.add(output)]
    events += builder.close()
    for block in builder.blocks:
        own = [event for event in events if event.block is block]
        assert [own[0].step, own[-1].step] == [Step.OPENED, Step.CLOSED]
        assert "".join(event.text for event in own) == block.text
        assert all(event.step is Step.ADDED for event in own[1:-1])
    for kind, whole in (
        (BlockKind.TEXT, "".join(output.content for output in outputs)),
        (BlockKind.REASONING, "".join(output.reasoning for output in outputs)),
    ):
        assert "".join(b.text for b in builder.blocks if b.kind is kind) == whole
