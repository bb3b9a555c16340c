"""Outputs drawn at random from a grammar's masks, as a model without any sense would write them."""

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gemma4_chat import gemma4_backend, write_tokenizer

from bezel.engine.checkpoint import Checkpoint
from bezel.engine.grammar import GrammarCompiler, GrammarState

VOCAB_SIZE = 262_144
EOS_TOKEN_IDS = frozenset({1, 106, 50})
QUOTE, CALL_OPEN, CALL_CLOSE, CHANNEL_OPEN, CHANNEL_CLOSE = 52, 48, 49, 100, 101
_CLOSING = ('"', "}", "]", '"}', '"]', '",', "}}", "},", "]}")
_SHORT = (":", ",", "0", "1", "7", "true", "null", "a", "e", "@", ".", "-")


@functools.cache
def compiler() -> GrammarCompiler:
    with tempfile.TemporaryDirectory() as directory:
        write_tokenizer(Path(directory))
        checkpoint = Checkpoint(Path(directory), "safetensors", "test", {}, {})
        return GrammarCompiler(checkpoint, VOCAB_SIZE, EOS_TOKEN_IDS)


def encode(text: str) -> list[int]:
    """Control tokens spelled out in `text` become such."""
    ids: list[int] = gemma4_backend().encode(text, add_special_tokens=False).ids
    return ids


def _is_allowed(state: GrammarState, vocab_size: int) -> npt.NDArray[np.bool_]:
    mask_W = np.full(-(-vocab_size // 32), -1, dtype=np.int32)
    state.fill_mask(mask_W)
    return np.unpackbits(mask_W.view(np.uint8), bitorder="little").view(np.bool_)


def allowed_ids(state: GrammarState, vocab_size: int = VOCAB_SIZE) -> npt.NDArray[np.int64]:
    return np.flatnonzero(_is_allowed(state, vocab_size))


def follows(state: GrammarState, ids: Sequence[int]) -> bool:
    """Whether each token is allowed by the mask before it; the state moves along."""
    for token_id in ids:
        if token_id not in allowed_ids(state):
            return False
        state.accept(token_id)
    return True


def matches(grammar: str, text: str) -> bool:
    """Whether the output may be `text`, in the tokens that the tokenizer makes of it."""
    state = compiler().compile(grammar)
    return follows(state, encode(text)) and set(allowed_ids(state)) >= EOS_TOKEN_IDS


@functools.cache
def _ids_of(tokens: tuple[str, ...]) -> npt.NDArray[np.int64]:
    return np.array([i for text in tokens for i in encode(text)])


def walk(grammar: str, seed: int, max_tokens: int = 2000) -> list[int]:
    """A whole output without its end token, drawn from the masks.

    Most draws are among tokens that close something, where there are any, and of the rest among
    short ones: outputs would go on for ever else. The others are any that the mask has.
    """
    closing = np.array([*_ids_of(_CLOSING), QUOTE, CALL_CLOSE, CHANNEL_CLOSE, *EOS_TOKEN_IDS])
    random = np.random.default_rng(seed)
    state = compiler().compile(grammar)
    output: list[int] = []
    while not state.is_finished:
        assert len(output) < max_tokens, "this output doesn't end"
        is_allowed = _is_allowed(state, VOCAB_SIZE)
        ids = np.flatnonzero(is_allowed)
        for likely in (closing, _ids_of(_SHORT)):
            if is_allowed[likely].any() and random.random() < 0.7:
                ids = likely[is_allowed[likely]]
                break
        assert len(ids) > 0, f"nothing may follow {output[-20:]}"
        token_id = int(random.choice(ids))
        state.accept(token_id)
        if token_id in EOS_TOKEN_IDS:
            break
        output.append(token_id)
    return output


def bytes_of(token_id: int) -> bytes:
    """What a token that isn't a control token stands for."""
    token = gemma4_backend().id_to_token(token_id)
    if len(token) == 6 and token.startswith("<0x"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def text_of(ids: Sequence[int]) -> str:
    """The text of ordinary tokens; whatever isn't UTF-8 is an error."""
    return b"".join(map(bytes_of, ids)).decode()
