"""POST /tokenize and /detokenize, with vLLM's fields: what a prompt is to the model."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from bezel.engine.errors import InvalidRequest
from bezel.server.chat_request import as_chat_request
from bezel.server.errors import json_response
from bezel.server.prompts import chat_prompt, check_token_ids, text_prompt
from bezel.server.state import ServedModel, state_of


class TokenizeRequest(BaseModel):
    """A text as `prompt`, or what a chat completion has: `messages`, `tools` and so on."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    model: str | None = None
    """A name of the served model; may be left out."""
    prompt: str | None = None
    """A text."""
    messages: list[Any] | None = None
    """A conversation, which is rendered with the chat template."""
    add_special_tokens: bool | None = None
    """Whether a text begins with `<bos>`; true if not given."""
    return_token_strs: bool | None = None
    """Whether to tell the text of each token."""


class DetokenizeRequest(BaseModel):
    """Token ids."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    model: str | None = None
    """A name of the served model; may be left out."""
    tokens: list[int] = Field(max_length=2**20)
    """Token ids, about a million at most."""


async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The token ids of a text, or of the prompt that messages become."""
    model = state_of(request).loaded_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("Give either prompt or messages.", "prompt")
    token_ids = await _token_ids(body, model)
    answer: dict[str, Any] = {
        "count": len(token_ids),
        "max_model_len": model.engine.info.max_model_len,
        "tokens": token_ids,
        "token_strs": None,
    }
    if body.return_token_strs:
        answer["token_strs"] = [model.tokenizer.decode([i], False) for i in token_ids]
    return json_response(answer)


async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of token ids, control tokens spelled out."""
    model = state_of(request).loaded_model(body.model)
    check_token_ids(body.tokens, model.engine.info.vocab_size, "tokens")
    return json_response({"prompt": model.tokenizer.decode(body.tokens, False)})


async def _token_ids(body: TokenizeRequest, model: ServedModel) -> list[int]:
    vocab_size = model.engine.info.vocab_size
    if body.prompt is not None:
        return await text_prompt(
            model.tokenizer, body.prompt, vocab_size, body.add_special_tokens is not False
        )
    fields = {"model": "", "messages": body.messages, **(body.model_extra or {})}
    chat = as_chat_request(fields)
    prompt = await chat_prompt(
        model.tokenizer, model.control, chat, vocab_size, model.template_kwargs
    )
    return prompt.token_ids
