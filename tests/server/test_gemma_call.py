"""Gemma's syntax of calls becomes JSON, however it is cut and whatever is wrong with it."""

import json
import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bezel.server.parsing.gemma_call import CallReader

QUOTE = '<|"|>'
LONG = "f" * 65

TEXT = st.text(max_size=12) | st.text("{}[]():,=\"'\\ \n\t0a", max_size=12)
STRINGS = TEXT.filter(lambda text: QUOTE not in text)
# What the template can render and a reader tell apart: keys stand there without quotes.
KEYS = (
    st.text(st.characters(codec="utf-8", exclude_characters=":,{}[]\"'"), max_size=8)
    .map(str.strip)
    .filter(bool)
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | STRINGS
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)
ARGUMENTS = st.dictionaries(KEYS, VALUES, max_size=4)
# Anything that has to do with the syntax.
SOUP_PARTS = (
    *(QUOTE, "call:", "call", "f", "{", "}", "[", "]", "(", ")", ":", ",", "=", " ", "\n"),
    *('"', "'", "\\", "é", "\\ud83d", "true", "None", "10", "8.5", "name", "arguments"),
)
SOUP = st.lists(st.sampled_from(SOUP_PARTS), max_size=30).map("".join)


def gemma(value: Any) -> str:
    """A value as the chat template renders it."""
    if isinstance(value, str):
        return QUOTE + value + QUOTE
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{gemma(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(gemma, value)) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else str(value)


class Reading:
    """A reader, and what its pieces add up to."""

    def __init__(self) -> None:
        self.reader = CallReader()
        self.calls: list[tuple[str, str]] = []

    def add(self, pieces: Any) -> None:
        for piece in pieces:
            if piece.name is not None:
                self.calls.append((piece.name, ""))
            name, arguments = self.calls[-1]
            self.calls[-1] = (name, arguments + piece.arguments)

    def read(self, text: str) -> None:
        """Read text in which quote tokens are spelled out."""
        for i, part in enumerate(text.split(QUOTE)):
            if i and self.reader.rejected is None:
                self.add(self.reader.quote())
            elif i:
                self.reader.rejected += '"'
            if self.reader.rejected is None:
                self.add(self.reader.read(part))
            else:
                self.reader.rejected += part

    def end(self, is_cut: bool = False) -> "Reading":
        if self.reader.rejected is None:
            self.add(self.reader.cut() if is_cut else self.reader.close())
        return self

    @property
    def result(self) -> tuple[list[tuple[str, str]], str]:
        return self.calls, self.reader.rejected or ""


def read(text: str, is_cut: bool = False) -> tuple[list[tuple[str, str]], str]:
    reading = Reading()
    reading.read(text)
    return reading.end(is_cut).result


def characters(text: str) -> list[str]:
    """Its characters, with quote tokens in one piece."""
    return re.findall(re.escape(QUOTE) + "|.", text, re.DOTALL)


@settings(deadline=None, max_examples=400)
@given(arguments=ARGUMENTS)
def test_what_the_template_writes_is_read_as_it_was(arguments: dict[str, Any]) -> None:
    [(name, text)], rejected = read(f"call:f{gemma(arguments)}")
    assert (name, rejected) == ("f", "")
    assert json.loads(text) == arguments


@settings(deadline=None, max_examples=400)
@given(text=ARGUMENTS.map(lambda arguments: f"call:f{gemma(arguments)}") | SOUP, data=st.data())
def test_cuts_make_no_difference(text: str, data: st.DataObject) -> None:
    tokens = characters(text)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=6)))
    is_cut = data.draw(st.booleans())
    for edges in ([0, *cuts, len(tokens)], range(len(tokens) + 1)):
        reading = Reading()
        for start, end in pairwise(edges):
            reading.read("".join(tokens[start:end]))
        assert reading.end(is_cut).result == read(text, is_cut)


@settings(deadline=None, max_examples=800)
@given(text=SOUP | SOUP.map(lambda soup: f"call:f{{{soup}") | SOUP.map(lambda soup: f"f({soup}"))
def test_arguments_are_objects_whatever_comes(text: str) -> None:
    calls, rejected = read(text)
    for name, arguments in calls:
        assert re.fullmatch("[A-Za-z0-9_-]{1,64}", name)
        assert isinstance(json.loads(arguments), dict)
        arguments.encode()
    assert rejected in text.replace(QUOTE, '"')


@settings(deadline=None, max_examples=200)
@given(text=ARGUMENTS.map(lambda arguments: f"call:f{gemma(arguments)}") | SOUP)
def test_a_call_cut_off_is_the_beginning_of_the_whole(text: str) -> None:
    whole, _ = read(text)
    tokens = characters(text)
    for length in range(len(tokens)):
        calls, _ = read("".join(tokens[:length]), is_cut=True)
        assert len(calls) <= len(whole)
        for (name, arguments), (whole_name, whole_arguments) in zip(calls, whole, strict=False):
            assert name == whole_name
            assert whole_arguments.startswith(arguments)


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("call:f{}", [("f", "{}")]),
        ("call:get_a-B2{}", [("get_a-B2", "{}")]),
        ('call:f{k:<|"|>v<|"|>,n:42,b:true}', [("f", '{"k":"v","n":42,"b":true}')]),
        ("call:f{o:{a:1},l:[1,2],z:null}", [("f", '{"o":{"a":1},"l":[1,2],"z":null}')]),
        ("call:f{o:{},l:[],m:[[],{}]}", [("f", '{"o":{},"l":[],"m":[[],{}]}')]),
        ('call:f{k:<|"|><|"|>}', [("f", '{"k":""}')]),
        ('call:f{k:<|"|>a"}],\\\n<|"|>}', [("f", '{"k":"a\\"}],\\\\\\n"}')]),
        ('call:f{k:<|"|>é日🦄<|"|>}', [("f", '{"k":"é日🦄"}')]),
        ("call:f{n:-1.5e-07,m:0,l:[1E+22]}", [("f", '{"n":-1.5e-07,"m":0,"l":[1E+22]}')]),
        ("call:f{ a : 1 ,\n b : [ 1 , 2 ] }", [("f", '{"a":1,"b":[1,2]}')]),
        ('call:f{<|"|>a b:c<|"|>:1}', [("f", '{"a b:c":1}')]),
        ('call:f{"a:b":"c\\nd\\u00e9","e":[true]}', [("f", '{"a:b":"c\\ndé","e":[true]}')]),
        ("call:f{'a': 'it\\'s \"x\"'}", [("f", '{"a":"it\'s \\"x\\""}')]),
        ('call:f{a:"say \\"hi\\" \\\\"}', [("f", '{"a":"say \\"hi\\" \\\\"}')]),
        ('call:f{a:"two\nlines\\t"}', [("f", '{"a":"two\\nlines\\t"}')]),
        ('call:f{a:"wrong \\q"}', [("f", '{"a":"wrong \\\\q"}')]),
        ('call:f{a:"half \\ud83d"}', [("f", '{"a":"half \\\\ud83d"}')]),
        ("call:f{a:True,b:False,c:None}", [("f", '{"a":true,"b":false,"c":null}')]),
        ("call:f{t:10:30,u:http://x/y}", [("f", '{"t":"10:30","u":"http://x/y"}')]),
        ("call:f{z:007,v:1.2.3,n:NaN,x:1.}", [("f", '{"z":"007","v":"1.2.3","n":"NaN","x":"1."}')]),
        ("call:f{d:٣}", [("f", '{"d":"٣"}')]),
        (":f{a:1}", [("f", '{"a":1}')]),
        ("f{a:1}", [("f", '{"a":1}')]),
        ("call f{a:1}", [("f", '{"a":1}')]),
        ("call : f {a:1}", [("f", '{"a":1}')]),
        ('call:<|"|>f<|"|>{a:1}', [("f", '{"a":1}')]),
        ("call{a:1}", [("call", '{"a":1}')]),
        ("call:call{a:1}", [("call", '{"a":1}')]),
        ("call:f", [("f", "{}")]),
        ('call:f({"a":"b"})', [("f", '{"a":"b"}')]),
        ("call:f(a=1, b='x')", [("f", '{"a":1,"b":"x"}')]),
        ('call:f(a:<|"|>x=y<|"|>)', [("f", '{"a":"x=y"}')]),
        ("call:f()", [("f", "{}")]),
        ("call:f{a=1:2}", [("f", '{"a=1":2}')]),
        ('call:f{{"a":{"b":1},"c":2}}', [("f", '{"a":{"b":1},"c":2}')]),
        ("call:f{o:{{a:1}},b:2}", [("f", '{"o":{"a":1},"b":2}')]),
        ("call:f{{a:1},b:2}", [("f", '{"a":1,"b":2}')]),
        ("call:f{a:1,{b:2},c:3}", [("f", '{"a":1,"b":2,"c":3}')]),
        ('{"name":"f","arguments":{"a":[1,"x"]}}', [("f", '{"a":[1,"x"]}')]),
        ('{"name": "f", "parameters": {}}', [("f", "{}")]),
        ('{"name":"f","arguments":"{\\"a\\":1}"}', [("f", '{"a":1}')]),
        ('{"name":"f","arguments":{}}call:g{a:1}', [("f", "{}"), ("g", '{"a":1}')]),
        ('{name:<|"|>f<|"|>,arguments:{a:1}}', [("f", '{"a":1}')]),
        ('call:f{a:<|"|>x<|"|>b:1}', [("f", '{"a":"x","b":1}')]),
        ('call:f{l:[<|"|>x<|"|><|"|>y<|"|>]}', [("f", '{"l":["x","y"]}')]),
        ("call:f{o:{a:1}b:2}", [("f", '{"o":{"a":1},"b":2}')]),
        ("call:f{a:1,}", [("f", '{"a":1}')]),
        ("call:f{,a:1,,b:[1,,2,]}", [("f", '{"a":1,"b":[1,2]}')]),
        ("call:f{a}", [("f", '{"a":null}')]),
        ("call:f{a:,b:}", [("f", '{"a":null,"b":null}')]),
        ('call:f{<|"|><|"|>,b:1}', [("f", '{"":null,"b":1}')]),
        ('call:f{<|"|>a<|"|>,b:1}', [("f", '{"a":null,"b":1}')]),
        ('call:f{<|"|>a<|"|><|"|>b<|"|>}', [("f", '{"a":"b"}')]),
        ('call:f{a:Paris<|"|>,b:1}', [("f", '{"a":"Paris","b":1}')]),
        ('call:f{a:"Paris<|"|>,b:1}', [("f", '{"a":"Paris","b":1}')]),
        ('call:f{a<|"|>:1}', [("f", '{"a":1}')]),
        ("call:f{l:[1,2}", [("f", '{"l":[1,2]}')]),
        ("call:f{a:1]}", [("f", '{"a":"1]"}')]),
        ("call:f{o:{a:1}],b:2}", [("f", '{"o":{"a":1},"b":2}')]),
        ('call:f{a:<|"|>Pa', [("f", '{"a":"Pa"}')]),
        ('call:f{a:"Pa', [("f", '{"a":"Pa"}')]),
        ("call:f{a:{b:[tru", [("f", '{"a":{"b":["tru"]}}')]),
        ("call:f{a:", [("f", '{"a":null}')]),
        ("call:f{a:1}}})]", [("f", '{"a":1}')]),
        ("call:f{a:1},\ncall:g{b:2};h{}", [("f", '{"a":1}'), ("g", '{"b":2}'), ("h", "{}")]),
        ("", []),
        (" \n", []),
    ],
    ids=str,
)
def test_read_as(text: str, calls: list[tuple[str, str]]) -> None:
    assert read(text) == (calls, "")


@pytest.mark.parametrize(
    ("text", "num_calls", "rejected"),
    [
        ("Sorry, I can't.", 0, "Sorry, I can't."),
        ("f", 0, "f"),
        ("call:", 0, "call:"),
        ("call:{a:1}", 0, "call:{a:1}"),
        ('call:a.b{c:<|"|>d<|"|>}', 0, 'call:a.b{c:"d"}'),
        ("call:é{}", 0, "call:é{}"),
        (f"call:{LONG}{{}}", 0, f"call:{LONG}{{}}"),
        ('<|"|>f{}', 0, '"f{}'),
        ("[1]", 0, "[1]"),
        ("({})", 0, "({})"),
        ('{"a":1}', 0, '{"a":1}'),
        ('{"name":"a.b","arguments":{}} x', 0, '{"name":"a.b","arguments":{}} x'),
        (f'{{"name":"{LONG}","arguments":{{}}}}', 0, f'{{"name":"{LONG}","arguments":{{}}}}'),
        ('{"name":"f","arguments":[<|"|>x<|"|>]}', 0, '{"name":"f","arguments":["x"]}'),
        ('{"name":"f","arguments":{"a":1e999}}', 0, '{"name":"f","arguments":{"a":1e999}}'),
        ('{"name":"f","arguments":"{\\"a\\":\\"\\\\ud83d\\"}"}', 0, None),
        ("\n" * 50, 0, "\n" * 50),
        ("call:f{a:1}) Here you are.", 1, "Here you are."),
        ("call:f{a:1}Done", 1, "Done"),
        ("call:f{a:1}{b:2}", 1, "{b:2}"),
    ],
    ids=str,
)
def test_no_call(text: str, num_calls: int, rejected: str | None) -> None:
    calls, text_left = read(text)
    assert len(calls) == num_calls
    assert text_left == (text if rejected is None else rejected)


def test_what_can_t_become_a_call_isn_t_withheld() -> None:
    for text in (LONG, "call me maybe"[:9], "\n" * 28):
        reading = Reading()
        reading.read(text)
        assert reading.reader.rejected == text


def test_nothing_is_withheld_without_need() -> None:
    reading = Reading()
    grown = []
    for part in ["call:", "f", "{", "ci", "ty:", QUOTE, "Pa", '"r', "is", QUOTE, ",n:", "10", "8."]:
        reading.read(part)
        grown.append(reading.calls[0][1] if reading.calls else None)
    assert grown == [
        *(None, None, "{", "{", '{"city":', '{"city":"', '{"city":"Pa', '{"city":"Pa\\"r'),
        *('{"city":"Pa\\"ris', '{"city":"Pa\\"ris"', '{"city":"Pa\\"ris","n":'),
        *('{"city":"Pa\\"ris","n":', '{"city":"Pa\\"ris","n":'),
    ]
    reading.read("5,")
    assert reading.calls == [("f", '{"city":"Pa\\"ris","n":108.5')]


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ('call:f{a:<|"|>Pa', ([("f", '{"a":"Pa')], "")),
        ("call:f{a:1,b:tru", ([("f", '{"a":1,"b":')], "")),
        ("call:f{a:[10", ([("f", '{"a":[')], "")),
        ("call:f{a:1}", ([("f", '{"a":1}')], "")),
        ("call:get_wea", ([], "")),
        ("cal", ([], "")),
        ('{"name":"f","arg', ([], "")),
        ("call:f{}cal", ([("f", "{}")], "cal")),
        ("call:f{}call:g", ([("f", "{}")], "")),
        ("call:f{}Her", ([("f", "{}")], "Her")),
    ],
    ids=str,
)
def test_cut_off(text: str, result: tuple[list[tuple[str, str]], str]) -> None:
    assert read(text, is_cut=True) == result


def test_deep_nesting() -> None:
    [(_, arguments)], _ = read("call:f{a:" + "[" * 5000)
    assert arguments == '{"a":' + "[" * 5000 + "]" * 5000 + "}"
    assert read('{"name":"f","arguments":{a:' + "[" * 100_000)[0] == []
