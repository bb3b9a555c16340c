"""Which tokens may come next, when the output has to keep to a grammar.

llguidance does the work: it walks the vocabulary's trie along a parser's state. A grammar is its
dialect of Lark, in which `%json {…}` is a JSON schema and `<[48]>` the token 48. Control tokens
are never text, so no string and no regular expression lets one through.

    allowed tokens    32 to a word, the lowest bit first
    mask_W   [ 0b…0100 | 0b…0000 | … ]     bit 2 of word 0: token 2

W words of 32 tokens, int32.
"""

from collections import OrderedDict

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits

from bezel.engine.checkpoint import Checkpoint
from bezel.engine.errors import GrammarError
from bezel.engine.grammar_vocabulary import GrammarVocabulary
from bezel.engine.tokenizer_files import load_tokenizer_files

Mask = npt.NDArray[np.int32]

_MAX_CACHED = 64


class GrammarCompiler:
    """Compiles grammars for one vocabulary.

    `vocab_size` is the model's: ids beyond the tokenizer's, of padding, are never allowed, nor are
    those that the tokenizer alone knows. Any of `eos_token_ids` ends an output, where the grammar
    may end. Making one takes two seconds, in pieces of half a second or more in which no other
    Python code of the process runs.
    """

    def __init__(
        self, checkpoint: Checkpoint, vocab_size: int, eos_token_ids: frozenset[int]
    ) -> None:
        """
        Raises:
            CheckpointError: there is no tokenizer, or it can't be read.
        """
        backend = load_tokenizer_files(checkpoint).backend
        known = backend.get_vocab_size()
        eos = sorted(i for i in eos_token_ids if i < min(known, vocab_size))
        # llguidance won't do without an end token; without any of ours it is masked out below.
        self._tokenizer = GrammarVocabulary(backend, eos).prepare()
        self._limits = LLParserLimits(verbose_errors=False)
        self._eos_token_ids = frozenset(eos)
        self._never = _words_of(self._tokenizer.vocab_size)
        unpacked = np.zeros(32 * len(self._never), dtype=bool)
        unpacked[min(known, vocab_size) :] = True
        unpacked[[i for i in self._tokenizer.eos_tokens if i not in eos]] = True
        self._never[:] = np.packbits(unpacked, bitorder="little").view(np.int32)
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def compile(self, grammar: str) -> "GrammarState":
        """The state before the first token.

        Raises:
            GrammarError: llguidance doesn't understand it, or it is too large.
        """
        if grammar not in self._compiled:
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
            if matcher.is_error():
                raise GrammarError(matcher.get_error())
            self._compiled[grammar] = matcher
            if len(self._compiled) > _MAX_CACHED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        matcher = self._compiled[grammar].deep_copy()
        return GrammarState(matcher, self._never, self._eos_token_ids)


class GrammarState:
    """How far one sequence's output has come in its grammar."""

    def __init__(self, matcher: LLMatcher, never_W: Mask, eos_token_ids: frozenset[int]) -> None:
        """`never_W`: tokens that no grammar allows; as wide as llguidance's vocabulary."""
        self._matcher = matcher
        self._never_W = never_W
        self._eos_token_ids = eos_token_ids
        self._has_ended = False

    @property
    def is_finished(self) -> bool:
        """Nothing may follow but a token that ends the output."""
        return self._has_ended or self._matcher.is_stopped()

    def fill_mask(self, mask_W: Mask) -> None:
        """Write the tokens that may come next: a bit for each, ⌈vocabulary / 32⌉ words.

        Without end tokens the mask of a finished output is empty.

        Raises:
            GrammarError: a limit of llguidance was hit; the output can't go on.
        """
        allowed_W = _words_of(32 * len(self._never_W))
        self._matcher.unsafe_compute_mask_ptr(allowed_W.ctypes.data, allowed_W.nbytes)
        if self._matcher.is_error():
            raise GrammarError(self._matcher.get_error())
        width = min(len(mask_W), len(allowed_W))
        mask_W[width:] = 0
        np.bitwise_and(allowed_W[:width], ~self._never_W[:width], out=mask_W[:width])

    def accept(self, token_id: int) -> None:
        """Go on by the token that was drawn, which the mask must have allowed.

        Raises:
            GrammarError: a limit of llguidance was hit.
        """
        if token_id in self._eos_token_ids:
            assert self._has_ended or self._matcher.is_accepting(), f"{token_id} ended too early"
            self._has_ended = True
            return
        assert not self._has_ended, f"{token_id} follows the end"
        if not self._matcher.consume_token(token_id):
            error = self._matcher.get_error()
            assert "doesn't satisfy the grammar" not in error, f"{token_id} isn't allowed"
            raise GrammarError(error)


def _words_of(num_tokens: int) -> Mask:
    return np.zeros(-(-num_tokens // 32), dtype=np.int32)
