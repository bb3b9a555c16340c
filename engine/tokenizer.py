"""Text ↔ token ids, and messages → prompt ids.

Runs on the `tokenizers` library and Jinja alone: neither torch nor transformers is imported, so the
API process stays small. Two promises hold for every prompt:

- it has exactly one <bos> in front, whatever the template or the checkpoint's settings say: no
  Gemma was trained without it;
- control tokens spelled out in a message ("<end_of_turn>") are the text they look like: nobody
  ends a turn from within one. Only the template makes control tokens.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import tokenizers

from bezel.engine.chat_template import (
    PLAIN_GEMMA3_TEMPLATE,
    PLAIN_GEMMA4_TEMPLATE,
    ChatTemplate,
)
from bezel.engine.checkpoint import Checkpoint
from bezel.engine.errors import InvalidRequest
from bezel.engine.tokenizer_files import load_tokenizer_files

logger = logging.getLogger("bezel")

# Put inside a spelled-out control token, and cut out before tokenizing: a code point that Unicode
# reserves for such uses and that no text may contain.
_BREAK = "\ufdd0"
# A bracket and what it may open. Only the bracket is taken, so that brackets around a control token
# don't hide it.
_CONTROL_LIKE = re.compile(r"(?=(<[^<>\s]+>|\[[^\[\]\s]+\]))[<\[]")


class Tokenizer:
    """A checkpoint's vocabulary and chat template.

    `special_token_ids` are the control tokens, `byte_token_ids` the 256 tokens that stand for
    single bytes of characters the vocabulary lacks.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        chat_template: str | None = None,
    ) -> None:
        """`special_tokens` are those a template may name; without a template a plain one is used.

        Raises:
            CheckpointError: the template is broken.
        """
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self.vocab_size: int = backend.get_vocab_size()
        self.special_token_ids = frozenset(i for i, token in added.items() if token.special)
        self._control_tokens = frozenset(added[i].content for i in self.special_token_ids)
        byte_ids = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        self.byte_token_ids = frozenset(i for i in byte_ids if i is not None)
        names = {"bos_token": "<bos>", **special_tokens}
        self.bos_token_id: int | None = backend.token_to_id(names["bos_token"])
        self._template = ChatTemplate(chat_template or self._plain_template(), names)

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> "Tokenizer":
        """The tokenizer of a checkpoint; a GGUF file's is converted once and cached.

        Raises:
            CheckpointError: there is none, or it can't be read.
        """
        files = load_tokenizer_files(checkpoint)
        return cls(files.backend, files.special_tokens, files.chat_template)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text in which control tokens count as such.

        `add_special_tokens` puts <bos> in front, unless the text starts with it.

        Raises:
            InvalidRequest: the text isn't valid Unicode.
        """
        ids = self._encode(text, "prompt")
        return self._with_one_bos(ids) if add_special_tokens else ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no valid UTF-8 become U+FFFD."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[int]:
        """The prompt for a conversation. `template_kwargs` are further names the template sees.

        Raises:
            InvalidRequest: the template refuses the messages or fails on them, or their text isn't
                valid Unicode.
        """
        plain = [self._defuse(message) for message in messages]
        text = self._template.render(plain, add_generation_prompt, self._defuse(template_kwargs))
        ids = [i for piece in text.split(_BREAK) for i in self._encode(piece, "messages")]
        return self._with_one_bos(ids)

    def _plain_template(self) -> str:
        logger.info("The checkpoint has no chat template: using a plain one in Gemma's format")
        is_gemma4 = self._backend.token_to_id("<|turn>") is not None
        return PLAIN_GEMMA4_TEMPLATE if is_gemma4 else PLAIN_GEMMA3_TEMPLATE

    def _encode(self, text: str, param: str) -> list[int]:
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except TypeError as error:  # what tokenizers makes of it
            # Half of a surrogate pair: JSON can spell it, text can't hold it.
            raise InvalidRequest(f"{param} isn't valid Unicode text.", param) from error

    def _with_one_bos(self, ids: list[int]) -> list[int]:
        if self.bos_token_id is None:
            return ids
        start = 0
        while start < len(ids) and ids[start] == self.bos_token_id:
            start += 1
        return [self.bos_token_id, *ids[start:]]

    def _defuse(self, value: Any) -> Any:
        """Break every control token spelled out in the strings of `value`."""
        if isinstance(value, str):
            return _CONTROL_LIKE.sub(self._break, value)
        if isinstance(value, Mapping):
            return {key: self._defuse(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._defuse(item) for item in value]
        return value

    def _break(self, match: re.Match[str]) -> str:
        return match[0] + _BREAK if match[1] in self._control_tokens else match[0]
