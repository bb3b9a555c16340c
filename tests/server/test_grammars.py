"""The check of grammars before they reach the engine, with a real worker process."""

import asyncio
from collections.abc import Iterator

import pytest
from grammar_bytes import NAMES

from bezel.engine.errors import GrammarError
from bezel.server.grammars.checker import GrammarChecker


class Vocabulary:
    """As much of a tokenizer as the checker asks for."""

    vocab_size = 1000
    special_token_ids = frozenset(NAMES)

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        assert not skip_special_tokens
        return NAMES[token_ids[0]]


# Intersects patterns for minutes.
BOMB = 'start: %json {"allOf": [' + ", ".join(
    f'{{"type": "string", "pattern": "a.{{{i}}}b"}}' for i in range(1, 60)
) + "]}"  # fmt: skip


@pytest.fixture(scope="module")
def checker() -> Iterator[GrammarChecker]:
    checker = GrammarChecker(Vocabulary())  # type: ignore[arg-type]
    yield checker
    checker.close()


async def flaw_of(checker: GrammarChecker, grammar: str) -> str:
    try:
        await checker.check(grammar)
    except GrammarError as error:
        return error.message
    return ""


def flaw(checker: GrammarChecker, grammar: str) -> str:
    return asyncio.run(flaw_of(checker, grammar))


@pytest.mark.parametrize(
    "grammar",
    [
        'start: "a"',
        "start: (<[100]> TEXT <[101]>)? (<|tool_call> /[a-z]+/ <[49]>)+\nTEXT: /(?s:.*)/",
        'start: %json {"type": "object"}',
        'start: %json {"enum": ["' + '", "'.join(map(str, range(5000))) + '"]}',
        '{"grammars": [{"lark_grammar": "start: @user"}, '
        '{"name": "user", "lark_grammar": "start: /x+/"}]}',
    ],
)
def test_what_can_be_enforced_passes(checker: GrammarChecker, grammar: str) -> None:
    assert flaw(checker, grammar) == ""


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ("start: x", "x"),
        ("", "Empty grammar"),
        ("start: <|nothing>", 'unknown special token: "<|nothing>".'),
        ("start: /(?=a)b/", "look-around"),
        ('start: %json {"not": {}}', 'Unimplemented keys: ["not"]'),
        ('start: %json {"minimum": 3, "maximum": 2, "type": "integer"}', "minimum (3) is greater"),
        ('start: %json {"oneOf": [{"type": "integer"}, {"type": "number"}]}', "oneOf"),
        ("start: start", "nothing matches it"),
        ("start: " + " | ".join(f'"choice {i}"' for i in range(5000)), "max is 2000"),
        ('start: TEXT <[101]> x\nTEXT: /(?s:.*)/\nx: ("a"{1000}){1000}', "Too many items"),
    ],
)
def test_what_can_not_be_enforced_is_refused_with_the_reason(
    checker: GrammarChecker, grammar: str, reason: str
) -> None:
    message = flaw(checker, grammar)
    assert message.startswith("What the output must be can't be enforced: ")
    assert reason in message and len(message) < 400 and "available" not in message
    assert flaw(checker, grammar) == message


@pytest.fixture
def impatient() -> Iterator[GrammarChecker]:
    checker = GrammarChecker(Vocabulary(), timeout_s=0.5)  # type: ignore[arg-type]
    yield checker
    checker.close()


def test_who_has_no_time_gets_no_verdict() -> None:
    checker = GrammarChecker(Vocabulary(), timeout_s=0)  # type: ignore[arg-type]
    values = ", ".join(f'"{i}"' for i in range(20_000))
    assert "more than 0 s" in flaw(checker, f'start: %json {{"enum": [{values}]}}')
    checker.close()


def test_a_bomb_ends_its_worker_and_nobody_else_waits(impatient: GrammarChecker) -> None:
    async def tick_meanwhile() -> tuple[str, int]:
        bombed, ticks = asyncio.create_task(flaw_of(impatient, BOMB)), 0
        while not bombed.done():
            await asyncio.sleep(0.001)
            ticks += 1
        return bombed.result(), ticks

    message, ticks = asyncio.run(tick_meanwhile())
    assert "more than 0.5 s" in message
    assert ticks > 20  # the loop went on
    assert flaw(impatient, 'start: "a"') == ""  # with the next worker
    assert flaw(impatient, BOMB) == message
    assert impatient._worker is not None and impatient._worker[0].is_alive()  # told from memory


def test_a_worker_that_was_ended_is_replaced(checker: GrammarChecker) -> None:
    assert flaw(checker, 'start: "x"') == ""
    assert checker._worker is not None
    checker._worker[0].kill()
    checker._worker[0].join()
    assert flaw(checker, 'start: "y"') == ""


def test_a_grammar_that_its_worker_dies_of_is_refused(checker: GrammarChecker) -> None:
    assert flaw(checker, 'start: "z"') == ""
    assert checker._worker is not None
    process, connection = checker._worker

    class Fatal:
        """A connection through which only death comes."""

        def send(self, grammar: str) -> None:
            process.kill()
            process.join()
            connection.send(grammar)

        def poll(self, timeout_s: float) -> bool:
            return connection.poll(timeout_s)

        def recv(self) -> str:
            return str(connection.recv())

        def close(self) -> None:
            connection.close()

    checker._worker = process, Fatal()  # type: ignore[assignment]
    assert "too much for the compiler" in flaw(checker, 'start: "fatal"')
    assert flaw(checker, 'start: "c"') == ""


def test_requests_that_are_given_up_leave_the_others_their_answers(
    checker: GrammarChecker,
) -> None:
    grammars = [f'start: "{i}"' if i % 2 else f"start: x{i}" for i in range(20)]

    async def give_up_some() -> list[str]:
        tasks = [asyncio.create_task(flaw_of(checker, grammar)) for grammar in grammars]
        await asyncio.sleep(0)
        for task in tasks[::3]:
            task.cancel()
        return [await task for i, task in enumerate(tasks) if i % 3]

    messages = asyncio.run(give_up_some())
    kept = [i for i in range(20) if i % 3]
    for i, message in zip(kept, messages, strict=True):
        assert message == "" if i % 2 else f"x{i}" in message
