"""Text ↔ token ids, and messages → prompt ids.

Runs on the `tokenizers` library and Jinja alone: neither torch nor transformers is imported, so the
API process stays small. Two promises hold for every prompt:

- it has exactly one <bos> in front, whatever the template or the checkpoint's settings say: no
  Gemma was trained without it;
- control tokens spelled out in a message ("<end_of_turn>") are the text they look like, in names
  and keys too: nobody ends a turn from within one. Only the template makes control tokens.
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
from bezel.engine.template_repair import BREAK, MARKS, continued
from bezel.engine.tokenizer_files import load_tokenizer_files

logger = logging.getLogger("bezel")

# A bracket and what it may open. Only the bracket is taken, so that brackets around a control token
# don't hide it.
_CONTROL_LIKE = re.compile(r"(?=(<[^<>\s]+>|\[[^\[\]\s]+\]))[<\[]")
# A bracket and what follows it to the end: a template may put the rest of a control token there.
_UNFINISHED = re.compile(r"(?=([<\[][^<>\[\]\s]*)\s*\Z)[<\[]")


class Tokenizer:
    """A checkpoint's vocabulary and chat template.

    `special_token_ids` are the control tokens. `byte_tokens` are the 256 tokens that stand for
    single bytes of characters the vocabulary lacks, and those bytes; `byte_token_ids` are its keys.
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
        byte_ids = ((backend.token_to_id(f"<0x{byte:02X}>"), byte) for byte in range(256))
        self.byte_tokens = {i: byte for i, byte in byte_ids if i is not None}
        self.byte_token_ids = frozenset(self.byte_tokens)
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

    def token_id(self, text: str) -> int | None:
        """The id of the token spelled exactly so, or None."""
        return self._backend.token_to_id(text)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no valid UTF-8 become U+FFFD."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    @property
    def renders_tools(self) -> bool:
        """Whether the chat template tells the model of tools."""
        return self._template.renders_tools

    def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[int]:
        """The prompt for a conversation. `template_kwargs` are further names the template sees.

        With `continue_final_message` the last message is the beginning of the model's answer.

        Raises:
            InvalidRequest: the template refuses the messages or fails on them, or their text isn't
                valid Unicode.
        """
        plain, kwargs = self._defuse(list(messages)), self._defuse(template_kwargs)
        last = plain.pop() if continue_final_message else None
        adds_prompt = add_generation_prompt or last is not None
        text = self._template.render(plain, adds_prompt, kwargs, self._defuse(tools))
        if last is not None:
            text = continued(text, last.get("reasoning_content") or "", last["content"])
        ids = [i for piece in text.split(BREAK) for i in self._encode(piece, "messages")]
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
        """Break every control token spelled out in the strings of `value`, keys among them."""
        if isinstance(value, str):
            text = _CONTROL_LIKE.sub(self._break_token, MARKS.sub("", value))
            return _UNFINISHED.sub(self._break_beginning, text)
        if isinstance(value, Mapping):
            return {self._defuse(key): self._defuse(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._defuse(item) for item in value]
        return value

    def _break_token(self, match: re.Match[str]) -> str:
        return match[0] + BREAK if match[1] in self._control_tokens else match[0]

    def _break_beginning(self, match: re.Match[str]) -> str:
        begins = any(token.startswith(match[1]) for token in self._control_tokens)
        return match[0] + BREAK if begins else match[0]
