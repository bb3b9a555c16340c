"""Conversations that a prefix cache meets, one turn after the other, with Gemma-like lengths.

Every turn sends all that was said before and something new. Texts are invented: two have tokens in
common exactly where they begin with the same pieces. Nothing but the order of turns tells time.

    round robin   chats take turns, none ends: the worst order for a cache that drops the oldest
    chats         people think for a while, leave for good, and others come; few system prompts
    agents        quick loops of tool calls, pauses between tasks, all with the same instructions
"""

import heapq
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count

PAGE = 16  # the smallest page of any policy: texts are compared in steps of it
ANSWER = 64


class TooSmall(Exception):
    """The pool can't hold one turn, with nothing else in it."""


@dataclass(frozen=True, slots=True)
class Turn:
    """`text` is a prompt of `num_prompt` tokens and the answer. `names[i]` stands for its first
    `PAGE * (i + 1)` tokens: texts that begin alike have the same names. The first `num_preamble`
    tokens are instructions. `num_known` tokens of the prompt came before, in whole pages: what a
    cache finds that forgets nothing.
    """

    chat: int
    text: list[int]
    num_prompt: int
    names: list[int]
    num_preamble: int
    num_known: int


@dataclass(frozen=True, slots=True)
class Load:
    """What has to be kept between two turns: of chats that come back, how many there are, and
    tokens of their texts, those that several begin with once."""

    num_tokens: int
    num_chats: int


@dataclass
class _Chat:
    number: int
    text: list[int]
    num_preamble: int
    names: list[int] = field(default_factory=list)


class Writer:
    """Invents texts, and remembers which beginnings there were."""

    def __init__(self) -> None:
        self._names: dict[tuple[int, ...], int] = {}
        self._pieces = count()
        self._chats = count()
        self.turns: list[Turn] = []

    def piece(self, num_tokens: int) -> list[int]:
        """Text that nobody else has."""
        start = next(self._pieces) << 20
        return list(range(start, start + num_tokens))

    def begin(self, preamble: list[int]) -> _Chat:
        return _Chat(next(self._chats), list(preamble), len(preamble))

    def turn(self, chat: _Chat, num_new: int, num_answer: int = ANSWER) -> None:
        """The chat sends all it has and `num_new` tokens more, and is answered."""
        chat.text = chat.text + self.piece(num_new)
        num_prompt = len(chat.text)
        chat.text = chat.text + self.piece(num_answer)
        num_known = self._name(chat)
        num_known = min(num_known, (num_prompt - 1) // PAGE * PAGE)
        self.turns.append(
            Turn(chat.number, chat.text, num_prompt, chat.names, chat.num_preamble, num_known)
        )

    def _name(self, chat: _Chat) -> int:
        names = list(chat.names)
        num_old = len(self._names)
        num_known = len(names) * PAGE
        for start in range(num_known, len(chat.text) - PAGE + 1, PAGE):
            above = names[-1] if names else -1
            key = (above, *chat.text[start : start + PAGE])
            names.append(self._names.setdefault(key, len(self._names)))
            num_known += PAGE * (names[-1] < num_old)
        chat.names = names
        return num_known


def round_robin(num_chats: int = 16, num_turns: int = 8) -> list[Turn]:
    """The trace of vllm-project/vllm#48435: chats of 8K to 24K tokens, one after the other, each
    with a short new message when its turn comes again."""
    writer = Writer()
    chats = [writer.begin([]) for _ in range(num_chats)]
    for turn in range(num_turns):
        for i, chat in enumerate(chats):
            # Short and long ones alternate.
            first = 8192 + 16_384 * (i * 7 % num_chats) // max(1, num_chats - 1)
            writer.turn(chat, 300 if turn else first)
    return writer.turns


def chats(num_turns: int = 240, num_people: int = 16, seed: int = 0) -> list[Turn]:
    """People with one of three system prompts and a document; five turns each on average."""
    writer, rng = Writer(), random.Random(seed)
    preambles = [writer.piece(n) for n in (800, 2000, 3200)]

    def person() -> Iterator[float]:
        while True:
            chat = writer.begin(rng.choice(preambles))
            num_new = min(32_000, int(rng.lognormvariate(8.5, 0.9)))
            while True:
                writer.turn(chat, num_new)
                yield rng.lognormvariate(0, 1.2)
                if rng.random() < 0.2:
                    break
                num_new = rng.randint(30, 600)

    return _interleave(writer, num_turns, num_people, rng, person)


def agents(num_turns: int = 280, num_agents: int = 10, seed: int = 0) -> list[Turn]:
    """Agents with 6K tokens of instructions and tools: loops of tool calls, then either a long
    pause and the next task, or the end."""
    writer, rng = Writer(), random.Random(seed)
    instructions = writer.piece(6000)

    def agent() -> Iterator[float]:
        while True:
            chat = writer.begin(instructions)
            while True:
                writer.turn(chat, rng.randint(300, 3000))
                for _ in range(rng.randint(3, 20)):
                    yield rng.expovariate(1)
                    writer.turn(chat, min(8000, int(rng.lognormvariate(6.3, 1.0))))
                yield rng.expovariate(1 / 30)
                if rng.random() < 0.5:
                    break

    return _interleave(writer, num_turns, num_agents, rng, agent)


def _interleave(
    writer: Writer,
    num_turns: int,
    num_actors: int,
    rng: random.Random,
    actor: Callable[[], Iterator[float]],
) -> list[Turn]:
    """Let actors act by the clock: each takes a turn and says how long it then waits."""
    order = count()
    clock = [(rng.random() * num_actors / 4, next(order), actor()) for _ in range(num_actors)]
    heapq.heapify(clock)
    while len(writer.turns) < num_turns:
        now, _, moves = heapq.heappop(clock)
        heapq.heappush(clock, (now + next(moves), next(order), moves))
    return writer.turns


def loads(turns: list[Turn]) -> Iterator[Load]:
    """After each turn, what the turns still to come will want again."""
    last = {turn.chat: i for i, turn in enumerate(turns)}
    held: Counter[int] = Counter()
    live: dict[int, list[int]] = {}
    for i, turn in enumerate(turns):
        for name in live.pop(turn.chat, ()):
            held[name] -= 1
            if not held[name]:
                del held[name]
        if last[turn.chat] > i:
            live[turn.chat] = turn.names
            held.update(turn.names)
        yield Load(len(held) * PAGE, len(live))
