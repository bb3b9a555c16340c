"""How an answer begins: what the prompt leaves open, and names that are no text.

Where a model answers, it may first write a name that belongs to a marker it left out, or to one it
shouldn't have written:

    thought⏎Let me see.<channel|>     a thought without `<|channel>`
    thought⏎<channel|>Hello           the empty one that stands for not thinking
    <|turn>model⏎Hello                its own turn once more

The tokens that spell such a name are kept until it is clear whether it is one.
"""

from collections.abc import Sequence
from enum import Enum

from bezel.engine.tokenizer import Tokenizer
from bezel.server.control_tokens import ControlTokens

CHANNEL = "thought\n"
TURN = "model\n"
# More tokens than it takes to spell a name in any way.
_MAX_NAME_TOKENS = 12


class State(Enum):
    """What the tokens between two markers are."""

    CONTENT = "content"
    THOUGHT = "thought"
    CALL = "call"
    MADE_UP = "made up"


class ChannelName:
    """Takes the channel's name off the beginning of a thought that comes in pieces.

    `prompt` is the beginning that the prompt has already.
    """

    def __init__(self, prompt: str = "") -> None:
        self._left = CHANNEL[len(prompt) :] if CHANNEL.startswith(prompt) else ""
        self._held = ""

    def strip(self, text: str) -> str:
        """Further text of the thought, without what is of the name."""
        if not self._left:
            return text
        self._held += text
        if self._left.startswith(self._held):
            return ""
        text, self._held = self._held.removeprefix(self._left), ""
        self._left = ""
        return text


class Opening:
    """The tokens kept at the beginning of an answer, or of a turn within it.

    `is_over`: nothing is kept, and nothing will be until the next turn.
    """

    def __init__(self, tokenizer: Tokenizer, may_think: bool) -> None:
        self._decode = tokenizer.decode
        self._may_think = may_think
        self._name = ""
        self._kept: list[int] = []

    @property
    def is_over(self) -> bool:
        return not self._name

    def expect(self, name: str) -> None:
        """Keep what may be `name` from here on."""
        self._name = name

    def add(self, token_ids: Sequence[int]) -> tuple[list[int], bool]:
        """Add tokens; those that are no name after all, and whether a thought begins with them."""
        for position, token_id in enumerate(token_ids):
            self._kept.append(token_id)
            text = self._decode(self._kept, True)
            rest = token_ids[position + 1 :]
            if text == TURN == self._name:
                self._kept = []
                self._name = CHANNEL
            elif self._may_think and self._name == CHANNEL and text.startswith(CHANNEL):
                return [*self.release(), *rest], True
            elif len(self._kept) > _MAX_NAME_TOKENS or not self._may_be_name(text):
                return [*self.release(), *rest], False
        return [], False

    def release(self) -> list[int]:
        """The tokens kept: they are text."""
        kept, self._kept = self._kept, []
        self._name = ""
        return kept

    def end(self, closes_channel: bool) -> list[int]:
        """The same, where a marker or the end follows: a whole name before it isn't text."""
        text = self._decode(self._kept, True).strip()
        is_name = text == self._name.strip() and (closes_channel or self._name == TURN)
        kept = self.release()
        return [] if is_name else kept

    def _may_be_name(self, text: str) -> bool:
        return self._name.startswith(text) or text.strip() == self._name.strip()


def state_after(
    prompt_ids: Sequence[int], control: ControlTokens, tokenizer: Tokenizer
) -> tuple[State, ChannelName, bool]:
    """What a prompt leaves open.

    Returns the state in which the answer begins, the rest of the channel's name if it's a thought,
    and whether the model has written nothing of its turn yet.
    """
    markers = {
        *(control.turn_open, control.turn_close, control.eos),
        *(control.channel_open, control.channel_close),
        *(control.tool_response_open, control.tool_response_close),
    }
    start = len(prompt_ids)
    while start > 0 and prompt_ids[start - 1] not in markers:
        start -= 1
    marker = prompt_ids[start - 1] if start else -1
    tail = tokenizer.decode(prompt_ids[start : start + _MAX_NAME_TOKENS])
    if marker == control.channel_open:
        return State.THOUGHT, ChannelName(tail), False
    if marker == control.tool_response_open:
        return State.MADE_UP, ChannelName(), False
    new = {control.turn_open: TURN, control.channel_close: "", control.tool_response_close: ""}
    return State.CONTENT, ChannelName(), new.get(marker) == tail
