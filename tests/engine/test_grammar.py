"""Masks of a grammar over Gemma's vocabulary: what may come next, and nothing else."""

from pathlib import Path

import pytest
from grammar_walks import (
    EOS_TOKEN_IDS,
    allowed_ids,
    bytes_of,
    compiler,
    encode,
    follows,
    matches,
    text_of,
    walk,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from bezel.engine.checkpoint import Checkpoint
from bezel.engine.errors import GrammarError, InvalidRequest
from bezel.engine.grammar import GrammarCompiler

ANY_TEXT = "start: TEXT\nTEXT: /(?s:.*)/"
TEXTS = [
    "a",
    " leading and trailing ",
    "\n\nnew\n\n\nlines\n",
    "  many   spaces    \t tabs",
    "emoji 🦄 and rare 🪿 in bytes",
    "日本語 und Ümläute, العربية",
    "1234567890 3.14e-5",
    "<div><b>tags</b> are text</div>, <| so is this |> and [that]",
    "\x00\x01 control characters \x7f",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_matched_in_the_tokens_that_the_tokenizer_makes_of_it(text: str) -> None:
    assert text_of(encode(text)) == text
    assert matches(ANY_TEXT, text)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_any_text_is_text(text: str) -> None:
    ids = encode(text)
    assert follows(compiler().compile(ANY_TEXT), ids)


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("ab \n🦄"), max_size=12), st.text(st.sampled_from("ab \n🦄")))
def test_a_literal_matches_itself_alone(literal: str, other: str) -> None:
    grammar = f"start: {_quoted(literal)}"
    assert matches(grammar, literal)
    assert matches(grammar, other) == (other == literal)


def _quoted(text: str) -> str:
    return '"' + text.replace("\n", "\\n") + '"'


def test_characters_that_the_vocabulary_lacks_come_byte_by_byte() -> None:
    ids = encode("🪿")
    assert len(ids) == 4 and b"".join(map(bytes_of, ids)).decode() == "🪿"
    state = compiler().compile('start: "🪿"')
    for token_id in ids:
        assert allowed_ids(state).tolist() == [token_id]
        state.accept(token_id)
    assert state.is_finished


def test_control_tokens_are_no_text() -> None:
    allowed = set(allowed_ids(compiler().compile(ANY_TEXT)).tolist())
    assert not allowed & {0, 2, 3, 4, 46, 48, 49, 51, 52, 98, 100, 101, 105, 255_999, 262_143}
    assert {107, 108, 224, 45_518} <= allowed  # line ends, "<div>", "thought"
    assert EOS_TOKEN_IDS <= allowed  # an empty text may end at once


def test_what_a_grammar_forces_comes_in_the_tokens_that_the_tokenizer_makes_of_it() -> None:
    text = "hello there, <div>🪿</div> world"
    state = compiler().compile(f'start: "{text}"')
    forced = []
    while not state.is_finished:
        forced.append(int(allowed_ids(state)[0]))
        state.accept(forced[-1])
    assert forced == encode(text)


def test_a_control_token_that_a_grammar_spells_out_is_text() -> None:
    state = compiler().compile('start: "<|tool_call>x"')
    ids = []
    while not state.is_finished:
        ids.append(int(allowed_ids(state)[0]))
        state.accept(ids[-1])
    assert text_of(ids) == "<|tool_call>x" and not {48, 49} & {*ids}


def test_control_tokens_are_themselves() -> None:
    state = compiler().compile('start: <[48]> "x" <[49]>')
    assert follows(state, [48, encode("x")[0], 49]) and state.is_finished
    assert not matches('start: <[48]> "x" <[49]>', "<|tool_call|>x")


@pytest.mark.parametrize("eos", sorted(EOS_TOKEN_IDS))
def test_every_end_token_ends_where_the_grammar_may_end(eos: int) -> None:
    state = compiler().compile('start: "a" "b"?')
    assert not set(allowed_ids(state)) & EOS_TOKEN_IDS
    state.accept(encode("a")[0])
    assert set(allowed_ids(state)) >= EOS_TOKEN_IDS and not state.is_finished
    state.accept(eos)
    assert state.is_finished


def test_where_nothing_may_follow_only_end_tokens_are_allowed() -> None:
    state = compiler().compile('start: "a"')
    state.accept(encode("a")[0])
    assert state.is_finished
    assert set(allowed_ids(state)) == EOS_TOKEN_IDS


def test_what_the_mask_forbids_is_our_mistake() -> None:
    state = compiler().compile('start: "a" "b"')
    with pytest.raises(AssertionError):
        state.accept(1)
    with pytest.raises(AssertionError):
        state.accept(encode("b")[0])


def small_checkpoint(directory: Path) -> Checkpoint:
    """A vocabulary of bytes and some letters, as Gemma's is built; 300 tokens."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [chr(code) for code in range(0x4E00, 0x4E00 + 300 - len(names))]
    vocabulary = {name: i for i, name in enumerate(names)}
    model = models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.add_special_tokens(names[:4])
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.save(str(directory / "tokenizer.json"))
    return Checkpoint(directory, "safetensors", "small", {}, {})


@pytest.mark.parametrize("vocab_size", [290, 300, 301, 352, 1000])
def test_ids_without_a_token_are_never_allowed(tmp_path: Path, vocab_size: int) -> None:
    """Padding of the model's vocabulary, and tokens that only the tokenizer has."""
    compiled = GrammarCompiler(small_checkpoint(tmp_path), vocab_size, frozenset({1}))
    state = compiled.compile("start: <[*]>")
    assert allowed_ids(state, vocab_size).tolist() == list(range(min(vocab_size, 300)))


def test_without_end_tokens_nothing_may_follow_the_end(tmp_path: Path) -> None:
    compiled = GrammarCompiler(small_checkpoint(tmp_path), 300, frozenset({5000}))
    state = compiled.compile('start: "a"')
    assert allowed_ids(state, 300).tolist() == [4 + ord("a")]
    state.accept(4 + ord("a"))
    assert state.is_finished and len(allowed_ids(state, 300)) == 0


def test_a_mask_overwrites_all_that_was_in_it() -> None:
    assert len(allowed_ids(compiler().compile('start: "a"'))) < 10


def test_states_of_one_grammar_go_their_own_ways() -> None:
    first, second = (compiler().compile('start: "ab" | "cd"') for _ in range(2))
    first.accept(encode("ab")[0])
    assert encode("cd")[0] in allowed_ids(second)
    assert first.is_finished and not second.is_finished


@pytest.mark.parametrize("grammar", ["", "start: x", "nonsense", "start: /(/", "{}"])
def test_nonsense_is_the_clients_mistake(grammar: str) -> None:
    with pytest.raises(GrammarError) as caught:
        compiler().compile(grammar)
    assert isinstance(caught.value, InvalidRequest) and caught.value.message


def test_a_grammar_that_costs_too_much_ends_in_an_error_and_not_in_a_wait() -> None:
    state = compiler().compile('start: (("a"{1000}){1000}){1000}')
    token_id = int(allowed_ids(state)[0])
    with pytest.raises(GrammarError):
        state.accept(token_id)


def test_where_no_token_leads_on_there_is_no_mask() -> None:
    with pytest.raises(GrammarError):
        allowed_ids(compiler().compile("start: start"))


def test_a_thought_may_come_first() -> None:
    grammar = 'start: (<[100]> TEXT <[101]>)? ("yes" | "no")\nTEXT: /(?s:.*)/'
    for seed in range(10):
        output = walk(grammar, seed)
        end = output.index(101) if 100 in output else -1
        assert text_of(output[end + 1 :]) in ("yes", "no")
        assert end == -1 or output[0] == 100
