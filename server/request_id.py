"""The id of the HTTP request being served: in its response's header, in errors, in log lines."""

import logging
import re
import uuid
from contextvars import ContextVar

_PRINTABLE = re.compile(r"[!-~]{1,128}")

# Tasks that a request starts inherit it; "-" is what lines outside any request say.
request_id: ContextVar[str] = ContextVar("request_id", default="-")


def set_request_id(given: str) -> str:
    """Take the client's own id if it is one that logs and headers can carry, else a new one."""
    chosen = given if _PRINTABLE.fullmatch(given) else uuid.uuid4().hex
    request_id.set(chosen)
    return chosen


class RequestIdFilter(logging.Filter):
    """Gives every log record the field `request_id`."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get()
        return True
