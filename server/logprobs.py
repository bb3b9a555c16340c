"""The JSON of log-probabilities, in the three shapes that clients know.

    chat            [{"token", "logprob", "bytes", "top_logprobs": [{"token", "logprob", "bytes"}]}]
    completions     {"tokens", "token_logprobs", "top_logprobs", "text_offset"}: lists side by side
    prompt_logprobs [null, {"<token id>": {"logprob", "rank", "decoded_token"}}]   (vLLM's)

There is an entry for every token that counts as a completion token, with the one that ended the
sequence and with control tokens. −∞ can't be told in JSON: it is −9999.0, as OpenAI has it.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from bezel.engine.detokenizer import IncrementalDetokenizer
from bezel.engine.messages import TokenLogprobs
from bezel.engine.tokenizer import Tokenizer

_UNLIKELY = -9999.0


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token by itself. One that is a part of a character only is spelled "<0xE2>"."""
    byte = tokenizer.byte_tokens.get(token_id)
    if byte is not None and byte >= 128:
        return f"<0x{byte:02X}>"
    return tokenizer.decode([token_id], skip_special_tokens=False)


def token_bytes(tokenizer: Tokenizer, token_id: int, text: str) -> list[int] | None:
    """What the token, which is `text` by itself, adds to the UTF-8 of an answer.

    None for control tokens, which are no text.
    """
    if token_id in tokenizer.special_token_ids:
        return None
    byte = tokenizer.byte_tokens.get(token_id)
    return list(text.encode()) if byte is None else [byte]


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], entries: Sequence[TokenLogprobs]
) -> list[dict[str, Any]]:
    """Entries for tokens of a chat's answer."""

    def shape(token_id: int, logprob: float) -> dict[str, Any]:
        text = token_text(tokenizer, token_id)
        return {
            "token": text,
            "logprob": max(logprob, _UNLIKELY),
            "bytes": token_bytes(tokenizer, token_id, text),
        }

    return [
        shape(token_id, entry.logprob)
        | {"top_logprobs": [shape(*top) for top in _tops(entry, len(entry.top_ids))]}
        for token_id, entry in zip(token_ids, entries, strict=True)
    ]


class CompletionLogprobs:
    """Lists for the tokens of one completion; several pieces add up to those of the whole.

    `text_offset` tells where in the choice's text a token begins. The parts of a character that
    has no token of its own all begin where it does.
    """

    def __init__(self, tokenizer: Tokenizer, num_top: int, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._offset = 0
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, skip_special_tokens=skip_special_tokens
        )

    def of_prompt(
        self, prompt_ids: Sequence[int], entries: Sequence[TokenLogprobs]
    ) -> dict[str, list[Any]]:
        """Lists for an echoed prompt, which comes first; nothing predicts its first token."""
        detokenizer = IncrementalDetokenizer(self._tokenizer, skip_special_tokens=False)
        echoed = _without_bos(self._tokenizer, prompt_ids)
        offsets = [0] * (len(prompt_ids) - len(echoed))
        for token_id in echoed:
            offsets.append(self._offset)
            self._offset += len(detokenizer.push([token_id]))
        self._offset += len(detokenizer.flush())
        return self._lists(prompt_ids, [None, *entries], offsets)

    def of_output(
        self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs]
    ) -> dict[str, list[Any]]:
        """Lists for further tokens of the output."""
        offsets = []
        for token_id in token_ids:
            offsets.append(self._offset)
            self._offset += len(self._detokenizer.push([token_id]))
        return self._lists(token_ids, entries, offsets)

    def _lists(
        self,
        token_ids: Sequence[int],
        entries: Sequence[TokenLogprobs | None],
        offsets: list[int],
    ) -> dict[str, list[Any]]:
        pairs = list(zip(token_ids, entries, strict=True))
        return {
            "tokens": [token_text(self._tokenizer, token_id) for token_id in token_ids],
            "token_logprobs": [entry and max(entry.logprob, _UNLIKELY) for entry in entries],
            "top_logprobs": [entry and self._top(token_id, entry) for token_id, entry in pairs],
            "text_offset": offsets,
        }

    def _top(self, token_id: int, entry: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens, and the one that was drawn."""
        tops = [*_tops(entry, self._num_top), (token_id, entry.logprob)]
        return {
            token_text(self._tokenizer, top_id): max(logprob, _UNLIKELY) for top_id, logprob in tops
        }


def prompt_logprobs(
    tokenizer: Tokenizer, prompt_ids: Sequence[int], entries: Sequence[TokenLogprobs], num_top: int
) -> list[dict[str, Any] | None]:
    """vLLM's field: the likeliest tokens and the prompt's own, by id; its rank if it is known."""

    def shape(token_id: int, entry: TokenLogprobs) -> dict[str, Any]:
        tops = list(_tops(entry, num_top))
        ranks = {top_id: rank for rank, (top_id, _) in enumerate(tops, start=1)}
        return {
            str(top_id): {
                "logprob": max(logprob, _UNLIKELY),
                "rank": ranks.get(top_id),
                "decoded_token": token_text(tokenizer, top_id),
            }
            for top_id, logprob in [*tops, (token_id, entry.logprob)]
        }

    return [None, *map(shape, prompt_ids[1:], entries)]


def prompt_text(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> str:
    """What is echoed of a prompt: all but the <bos> in front."""
    return tokenizer.decode(_without_bos(tokenizer, prompt_ids), skip_special_tokens=False)


def _without_bos(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> Sequence[int]:
    return prompt_ids[1:] if prompt_ids[0] == tokenizer.bos_token_id else prompt_ids


def _tops(entry: TokenLogprobs, number: int) -> Iterable[tuple[int, float]]:
    return zip(entry.top_ids[:number], entry.top_logprobs[:number], strict=True)
