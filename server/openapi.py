"""What the OpenAPI document says of answers: their media types, and the bodies of errors.

Requests are described by the schemas that check them. Any client error may be the answer of any
route, so errors are told as two ranges; `errors` has the table of the statuses there are.
"""

from typing import Any

from pydantic import BaseModel

Responses = dict[int | str, dict[str, Any]]


class ErrorObject(BaseModel):
    """What was wrong: `message` is for people, `code` for programs, `param` the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error, but for those of Anthropic's routes."""

    error: ErrorObject


class AnthropicErrorObject(BaseModel):
    """What was wrong, in Anthropic's words."""

    type: str
    message: str


class AnthropicErrorBody(BaseModel):
    """The body of every error of /v1/messages."""

    type: str
    error: AnthropicErrorObject
    request_id: str


def _errors(body: type[BaseModel]) -> Responses:
    # Of both ranges together FastAPI sees that its own 422 isn't used.
    return {
        "4XX": {"model": body, "description": "The request can't be served as it is"},
        "5XX": {"model": body, "description": "The server can't serve it now, or made a mistake"},
    }


def _sent_as(media_type: str) -> Responses:
    return {200: {"content": {media_type: {}}}}


PLAIN = _errors(ErrorBody)
NOT_THERE = PLAIN | {404: PLAIN["4XX"]}
TEXT = PLAIN | _sent_as("text/plain")
STREAMED = PLAIN | _sent_as("text/event-stream")
ANTHROPIC_PLAIN = _errors(AnthropicErrorBody)
ANTHROPIC_STREAMED = ANTHROPIC_PLAIN | _sent_as("text/event-stream")
