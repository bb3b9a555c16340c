"""What llguidance needs of a tokenizer: the bytes of each token, and the tokens of a text.

It could read a `tokenizer.json` by itself, but takes three times as long, all in one piece.
"""

import re

import tokenizers
from llguidance import LLTokenizer, TokenizerWrapper

from bezel.engine.allocator import release_freed_memory

_TAG = re.compile(r"</?[a-z][a-z0-9]*>")


class GrammarVocabulary:
    """A tokenizer, under the names that `TokenizerWrapper` wants.

    Tags of HTML are text, though Gemma has added tokens for them; all others in angle brackets are
    control tokens.
    """

    bos_token_id = None

    def __init__(self, backend: tokenizers.Tokenizer, eos_token_ids: list[int]) -> None:
        self._backend = backend
        # Control tokens that are spelled out in a text are text.
        backend.encode_special_tokens = True
        self.tokens = [b""] * backend.get_vocab_size()
        self.special_token_ids = [
            token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token_id < len(self.tokens) and (token.special or _is_control(token.content))
        ]
        special = frozenset(self.special_token_ids)
        for token_id in range(len(self.tokens)):
            # One by one, which takes as long as all at once but stops no other thread.
            name = backend.id_to_token(token_id) or ""
            self.tokens[token_id] = name.encode() if token_id in special else _bytes_of(name)
        # llguidance adds an end token if there is none.
        self.eos_token_id = eos_token_ids[0] if eos_token_ids else None
        self._eos_token_ids = eos_token_ids or None

    def __call__(self, text: bytes) -> list[int]:
        """The tokens that a text has of itself, for where the grammar leaves no choice."""
        ids: list[int] = self._backend.encode(text.decode(), add_special_tokens=False).ids
        return ids

    def prepare(self) -> LLTokenizer:
        """The vocabulary's trie, and those of its slices.

        Each of the two takes half a second in which no other Python code of the process runs.
        """
        wrapper = TokenizerWrapper(self)
        whole = LLTokenizer(wrapper, eos_token=self._eos_token_ids, slices=[])
        sliced = whole.with_slices(LLTokenizer.general_slices())
        self.tokens = wrapper.tokens = []  # the trie has them, and keeps both of these
        release_freed_memory()
        return sliced


def _is_control(name: str) -> bool:
    return name.startswith("<") and name.endswith(">") and not _TAG.fullmatch(name)


def _bytes_of(name: str) -> bytes:
    if len(name) == 6 and name.startswith("<0x"):
        return bytes([int(name[3:5], 16)])
    return name.replace("▁", " ").encode()
