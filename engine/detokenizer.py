"""Token ids → text piece by piece, with stop strings.

Text is given out as soon as later tokens can't change it. Two things can still change, and are held
back until a token settles them or the sequence ends:

    … <0xE2> <0x82>     a character spelled in bytes: it may go on, or turn out to be broken
    … "\\nUs"            with stop="\\nUser:": it may become the stop string

However the ids are cut into pushes, the pieces add up to the same text: that of `Tokenizer.decode`,
up to the stop string that starts first.
"""

from collections.abc import Sequence

from bezel.engine.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """The text of one sequence."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        assert all(stop), "an empty stop string would end every sequence"
        self._decode_ids = tokenizer.decode
        self._vocab_size = tokenizer.vocab_size
        self._byte_ids = tokenizer.byte_token_ids
        self._silent_ids: frozenset[int] = (
            tokenizer.special_token_ids if skip_special_tokens else frozenset()
        )
        # Of two that start together the shorter one is complete first, so it has to win.
        self._stop = sorted(stop, key=len)
        self._include_stop = include_stop
        self._skip_special_tokens = skip_special_tokens
        self._undecoded: list[int] = []
        self._held_text = ""
        self.matched_stop: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; no text comes after it."""
        return self.matched_stop is not None

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens, and return the text that has become certain."""
        if self.stopped:
            return ""
        return self._add(self._decode_certain(token_ids))

    def push_text(self, text: str) -> str:
        """Add text that no token stands for; a character spelled in bytes ends before it."""
        if self.stopped:
            return ""
        return self._add(self._decode_rest() + text)

    def flush(self) -> str:
        """The rest of the text, at the end of the sequence."""
        if self.stopped:
            return ""
        self._held_text += self._decode_rest()
        return self._release(at_end=True)

    def _add(self, text: str) -> str:
        if not self._stop:
            return text
        self._held_text += text
        return self._release(at_end=False)

    def _decode(self, token_ids: list[int]) -> str:
        return self._decode_ids(token_ids, self._skip_special_tokens) if token_ids else ""

    def _decode_rest(self) -> str:
        rest, self._undecoded = self._undecoded, []
        return self._decode(rest)

    def _decode_certain(self, token_ids: Sequence[int]) -> str:
        """Decode up to the last token that isn't a byte.

        A run of bytes is valid UTF-8 as a whole, or each of its bytes becomes U+FFFD.
        """
        # Tokens without text don't end a run: skipped ones, and the model's padding.
        ids = [i for i in token_ids if i < self._vocab_size and i not in self._silent_ids]
        end = len(ids)
        while end > 0 and ids[end - 1] in self._byte_ids:
            end -= 1
        if end == 0:
            self._undecoded += ids
            return ""
        certain = self._undecoded + ids[:end]
        self._undecoded = ids[end:]
        return self._decode(certain)

    def _release(self, at_end: bool) -> str:
        """Give out the held text, up to a stop string or what may become one."""
        text = self._held_text
        if not text:
            return ""
        match_start, match = self._find_stop(text)
        open_start = len(text) if at_end else self._find_open_stop(text)
        if match is not None and match_start <= open_start:
            self.matched_stop = match
            self._held_text = ""
            return text[:match_start] + (match if self._include_stop else "")
        self._held_text = text[open_start:]
        return text[:open_start]

    def _find_stop(self, text: str) -> tuple[int, str | None]:
        first, match = len(text), None
        for stop in self._stop:
            start = text.find(stop)
            if 0 <= start < first:
                first, match = start, stop
        return first, match

    def _find_open_stop(self, text: str) -> int:
        """Where the first stop string begins that the end of `text` cuts off."""
        first = len(text)
        for stop in self._stop:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while 0 <= start < first:
                if stop.startswith(text[start:]):
                    first = start
                start = text.find(stop[0], start + 1)
        return first
