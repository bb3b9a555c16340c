"""Token ids of an answer → content, reasoning and tool calls, as they come.

One state machine over token ids: only a marker's own token is a marker, never text that looks like
one. Markers don't appear in what comes out.

                 <|channel>               <|tool_call>              <|tool_response>
    content ────────────────▶ thought ───────────────────▶ call ─────────────────────▶ made up
       ▲        <channel|>       │       <tool_call|>       │      <tool_response|>       │
       ╰─────────────────────────┴──────────────────────────┴─────────────────────────────╯
                        also by <turn|>, <|turn> and <eos>, from everywhere

Opening markers lead to their state from every other one; the end of what is left may be missing.
Closing markers that close nothing are dropped, but a call is ended by any marker.

- The first state is what the prompt leaves open.
- `thought⏎` is the name of the channel and not part of the thought. A model that is to think may
  leave out `<|channel>` at the beginning; one that isn't may leave an empty thought behind.
- A call is what `gemma_call` understands; what it doesn't is content. A call cut off by a limit
  keeps the arguments it has, which then aren't JSON. One that the model itself ended is closed.
- Without tools a call is content: there is nobody to call, and the text may be what was wanted.
- What a model makes up as the answer of a tool is dropped.
- The quote token outside of calls is the `"` for which models mistake it.
- Stop strings count in content only. A thought or call between ends what may become one.
"""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Protocol

from bezel.engine.detokenizer import IncrementalDetokenizer
from bezel.engine.tokenizer import Tokenizer
from bezel.server.control_tokens import ControlTokens
from bezel.server.parsing.gemma_call import CallPiece, CallReader
from bezel.server.parsing.opening import CHANNEL, TURN, ChannelName, Opening, State, state_after


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of the tool call `index`: `id` and `name` come with its first piece only.

    The `arguments` of all pieces together are one JSON object.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class Parsed:
    """What some tokens add to an answer; each part may be empty."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


_NOTHING = Parsed()


class OutputParser(Protocol):
    """Takes the tokens of one sequence; how they are cut into pushes makes no difference."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found in content; nothing comes after it."""

    @property
    def matched_stop(self) -> str | None:
        """That stop string."""

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens of thoughts so far, with the channel's name and without markers."""

    def push(self, token_ids: Sequence[int]) -> Parsed:
        """Add tokens; returns what has become certain."""

    def flush(self, is_cut: bool = True) -> Parsed:
        """The rest, at the end of the sequence: by a limit, or else by the model itself."""


class TextParser:
    """All is content: completions, and models without markers."""

    num_reasoning_tokens = 0

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._content = IncrementalDetokenizer(
            tokenizer, stop, include_stop=include_stop, skip_special_tokens=skip_special_tokens
        )

    @property
    def stopped(self) -> bool:
        return self._content.stopped

    @property
    def matched_stop(self) -> str | None:
        return self._content.matched_stop

    def push(self, token_ids: Sequence[int]) -> Parsed:
        text = self._content.push(token_ids)
        return Parsed(text) if text else _NOTHING

    def flush(self, is_cut: bool = True) -> Parsed:
        return Parsed(self._content.flush())


class ChatParser:
    """Gemma 4's answers to chats.

    The first state follows from `prompt_ids`. `new_call_id` gives every call its id.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        control: ControlTokens,
        prompt_ids: Sequence[int],
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        parse_tools: bool,
        new_call_id: Callable[[], str],
    ) -> None:
        self._control = control
        self._new_call_id = new_call_id
        self._begins = {
            control.channel_open: State.THOUGHT,
            control.tool_call_open: State.CALL if parse_tools else State.CONTENT,
            control.tool_response_open: State.MADE_UP,
            control.turn_open: State.CONTENT,
            control.turn_close: State.CONTENT,
            control.eos: State.CONTENT,
        }
        self._closes = {
            control.channel_close: State.THOUGHT,
            control.tool_call_close: State.CALL,
            control.tool_response_close: State.MADE_UP,
        }
        self._markers = frozenset(astuple(control))
        self._content = IncrementalDetokenizer(
            tokenizer, stop, include_stop=include_stop, skip_special_tokens=skip_special_tokens
        )
        self._thought = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._call_text = IncrementalDetokenizer(tokenizer)
        self._call = CallReader()
        self._num_calls = 0
        self._state, self._channel_name, is_new = state_after(prompt_ids, control, tokenizer)
        self._opening = Opening(tokenizer, may_think=control.think in prompt_ids)
        if is_new:
            self._opening.expect(CHANNEL)
        self.num_reasoning_tokens = 0
        self._new_content = ""
        self._new_reasoning = ""
        self._new_calls: list[ToolCallDelta] = []

    @property
    def stopped(self) -> bool:
        return self._content.stopped

    @property
    def matched_stop(self) -> str | None:
        return self._content.matched_stop

    def push(self, token_ids: Sequence[int]) -> Parsed:
        run: list[int] = []
        for token_id in token_ids:
            if token_id in self._markers:
                self._read(run)
                self._mark(token_id)
                run = []
            else:
                run.append(token_id)
        self._read(run)
        return self._take()

    def flush(self, is_cut: bool = True) -> Parsed:
        self._add(self._opening.end(closes_channel=False))
        self._leave(is_cut)
        return self._take()

    def _take(self) -> Parsed:
        if not (self._new_content or self._new_reasoning or self._new_calls):
            return _NOTHING
        parsed = Parsed(self._new_content, self._new_reasoning, tuple(self._new_calls))
        self._new_content = self._new_reasoning = ""
        self._new_calls.clear()
        return parsed

    def _read(self, token_ids: Sequence[int]) -> None:
        """Tokens between markers."""
        if self.stopped or not token_ids:
            return
        if not self._opening.is_over:
            token_ids, begins_thought = self._opening.add(token_ids)
            if begins_thought:
                self._enter(State.THOUGHT)
        self._add(token_ids)

    def _add(self, token_ids: Sequence[int]) -> None:
        if not token_ids:
            return
        if self._state is State.CONTENT:
            self._new_content += self._content.push(token_ids)
        elif self._state is State.THOUGHT:
            self.num_reasoning_tokens += len(token_ids)
            self._new_reasoning += self._channel_name.strip(self._thought.push(token_ids))
        elif self._state is State.CALL:
            self._add_to_call(token_ids)

    def _add_to_call(self, token_ids: Sequence[int]) -> None:
        # One by one: where the text turns out to be no call, the other tokens are content.
        for position, token_id in enumerate(token_ids):
            self._add_pieces(self._call.read(self._call_text.push([token_id])))
            if self._state is not State.CALL:
                self._add(token_ids[position + 1 :])
                return

    def _mark(self, token_id: int) -> None:
        """A marker."""
        if self.stopped:
            return
        if not self._opening.is_over:
            closes_channel = token_id == self._control.channel_close
            self._add(self._opening.end(closes_channel))
        if token_id == self._control.quote:
            self._quote()
            return
        state = self._begins.get(token_id)
        if state is None:
            # No other marker but the quote is a part of a call.
            if self._state is not self._closes.get(token_id) and self._state is not State.CALL:
                return
            state = State.CONTENT
        if state is not State.CONTENT or self._state is not State.CONTENT:
            self._leave(is_cut=False)
            self._enter(state)
        if token_id == self._control.turn_open:
            self._opening.expect(TURN)

    def _quote(self) -> None:
        if self._state is State.CONTENT:
            self._new_content += self._content.push_text('"')
        elif self._state is State.THOUGHT:
            self.num_reasoning_tokens += 1
            self._new_reasoning += self._channel_name.strip(self._thought.push_text('"'))
        elif self._state is State.CALL:
            self._add_pieces(self._call.read(self._call_text.flush()))
            if self._state is State.CALL:
                self._add_pieces(self._call.quote())
            else:
                self._quote()

    def _enter(self, state: State) -> None:
        self._state = state
        self._channel_name = ChannelName()
        self._call = CallReader()

    def _leave(self, is_cut: bool) -> None:
        """The end of what stood between two markers."""
        if self._state is State.CALL:
            self._add_pieces(self._call.read(self._call_text.flush()))
        if self._state is State.CALL:
            self._add_pieces(self._call.cut() if is_cut else self._call.close())
        if self._state is State.THOUGHT:
            self._new_reasoning += self._channel_name.strip(self._thought.flush())
        if self._state is State.CONTENT:
            self._new_content += self._content.flush()

    def _add_pieces(self, pieces: Sequence[CallPiece]) -> None:
        for piece in pieces:
            call_id = None
            if piece.name is not None:
                call_id = self._new_call_id()
                self._num_calls += 1
            index = self._num_calls - 1
            self._new_calls.append(ToolCallDelta(index, call_id, piece.name, piece.arguments))
        if rejected := self._call.rejected:
            self._enter(State.CONTENT)
            self._new_content += self._content.push_text(rejected)
