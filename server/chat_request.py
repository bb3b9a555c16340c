"""Chat completions made of the requests of other APIs."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from bezel.engine.errors import InvalidRequest
from bezel.server.schemas import ChatCompletionRequest


def as_chat_request(fields: Mapping[str, Any], stop: tuple[str, ...] = ()) -> ChatCompletionRequest:
    """Check the fields as those of any chat completion; `stop` may be longer than OpenAI's four.

    Raises:
        InvalidRequest: one of them isn't right.
    """
    try:
        request = ChatCompletionRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        param = str(first["loc"][0]) if first["loc"] else None
        message = first["msg"].removeprefix("Value error, ")
        raise InvalidRequest(f"{param}: {message}.", param) from error
    return request.model_copy(update={"stop": stop}) if stop else request
