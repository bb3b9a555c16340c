"""Compiles grammars in a process of its own, to see whether they can be.

A grammar comes from a client, and some take llguidance minutes or all memory there is. No thread
can be stopped, but a process can. It makes do with a vocabulary of single bytes and the control
tokens, which takes no time to set up: what a grammar may say doesn't depend on the other tokens.
"""

import contextlib
import re
import signal
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

# The engine compiles it again, between two steps of everybody's.
_MAX_COMPILE_S = 0.5
_NUM_STEPS = 8
_ALLOWED = 200  # llguidance's bias of tokens that may come next
_MAX_MEMORY_BYTES = 2 << 30
_MAX_ERROR_CHARS = 300
_EXCERPT = re.compile(r"\n *[0-9]+ \| ")  # of the grammar, after most messages


def run_worker(connection: Connection, names: Mapping[int, str], vocab_size: int) -> None:
    """Entry point: answers each grammar with what is wrong with it, "" if nothing is.

    `names` are the control tokens'. The first message says no more than that it has started.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(ImportError, ValueError, OSError):  # not everywhere is there a limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))
    vocabulary = ByteVocabulary(names, vocab_size)
    tokenizer = LLTokenizer(TokenizerWrapper(vocabulary), eos_token=vocabulary.eos_token_id)
    connection.send("")  # it has started
    with contextlib.suppress(EOFError):  # the parent is gone
        while True:
            connection.send(_flaw(connection.recv(), tokenizer))


class ByteVocabulary:
    """Control tokens, one for each byte, and an end; as `TokenizerWrapper` wants them."""

    bos_token_id = None

    def __init__(self, names: Mapping[int, str], vocab_size: int) -> None:
        self.tokens = [names[i].encode() if i in names else b"" for i in range(vocab_size)]
        free = [i for i in range(vocab_size) if i not in names][-256:]
        self._ids = free + list(range(vocab_size, vocab_size + 256 - len(free)))
        self.tokens += [b""] * (256 - len(free)) + [b"<end>"]
        for byte, token_id in enumerate(self._ids):
            self.tokens[token_id] = bytes([byte])
        self.eos_token_id = len(self.tokens) - 1
        self.special_token_ids = [*names, self.eos_token_id]

    def __call__(self, text: bytes) -> Sequence[int]:
        return [self._ids[byte] for byte in text]


def _flaw(grammar: str, tokenizer: LLTokenizer) -> str:
    before_s = time.process_time()
    limits = LLParserLimits(verbose_errors=False)
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    compile_s = time.process_time() - before_s
    if compile_s > _MAX_COMPILE_S:
        return f"it takes {compile_s:.1f} s to compile, which is too long"
    # Some limits only show when tokens are looked for.
    for _ in range(_NUM_STEPS):
        allowed = matcher.compute_logit_bias()
        if matcher.is_error() or matcher.is_stopped():
            break
        # Bytes have the highest ids, so this leads out of a thought.
        matcher.consume_token(allowed.index(_ALLOWED))
    return _readable(matcher.get_error())


def _readable(error: str) -> str:
    """Without the grammar's text, which isn't what the client wrote, and lists of tokens."""
    if error.startswith("NoExtension"):
        return "nothing matches it"
    flaw = _EXCERPT.split(error, 1)[0].rpartition("failed to compile JSON schema: ")[2]
    flaw = flaw.split("; following special", 1)[0].removesuffix("<non-verbose/>")
    return " ".join(flaw.split())[:_MAX_ERROR_CHARS]
