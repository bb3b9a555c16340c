"""The ids of the HTTP request being served: in its response's header, in errors, in log lines."""

import logging
import re
import uuid
from contextvars import ContextVar

_PRINTABLE = re.compile(r"[!-~]{1,128}")
# https://www.w3.org/TR/trace-context-1/#traceparent-header; no id is all zeros.
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)

# Tasks that a request starts inherit it; "-" is what lines outside any request say.
request_id: ContextVar[str] = ContextVar("request_id", default="-")
# Of the trace that the request belongs to, in hexadecimal; empty if it belongs to none.
trace_id: ContextVar[str] = ContextVar("trace_id", default="")


def set_request_id(given: str) -> str:
    """Take the client's own id if it is one that logs and headers can carry, else a new one."""
    chosen = given if _PRINTABLE.fullmatch(given) else uuid.uuid4().hex
    request_id.set(chosen)
    return chosen


def set_trace_id(traceparent: str) -> None:
    """Take the trace's id from a `traceparent` header, if it is a valid one."""
    found = _TRACEPARENT.fullmatch(traceparent)
    trace_id.set(found[1] if found else "")


class RequestIdFilter(logging.Filter):
    """Gives every log record the fields `request_id` and `trace_id`."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get()
        record.trace_id = trace_id.get()
        return True
