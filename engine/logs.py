"""Log lines: two formats, and a handler that nobody has to wait for.

    2026-11-25 00:58:01,123 INFO server [4f0c…] POST /v1/chat/completions status=200 …
    {"time": "2026-11-25T00:58:01.123+00:00", "level": "INFO", "process": "server", …}

A record is one line, whatever is in it: what could begin another line or steer a terminal is
escaped. Only a traceback takes more lines, in the first format, and those are indented. A record's
`fields`, given as `extra={"fields": {…}}`, come after its message as `name=value`, or as members of
the object.
"""

import json
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from logging.handlers import MemoryHandler
from queue import SimpleQueue
from typing import Any

logger = logging.getLogger("bezel")

# So many lines may wait for a slow disk or pipe; some megabytes.
MAX_WAITING_LINES = 10_000
# How long the end of the process may wait for them.
CLOSE_TIMEOUT_S = 2.0

_MAX_HELD = 1000
_PLAIN_VALUE = re.compile(r"[!#-<>-~]+")  # printable ASCII without space, quote and =


@dataclass(frozen=True, slots=True)
class LogSettings:
    """`format` is "text" or "json"; `level` is the least level that is logged, in lower case."""

    format: str = "text"
    level: str = "info"


class TextFormatter(logging.Formatter):
    """Lines for people."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        words = [one_line(record.getMessage())]
        words += [f"{name}={_as_word(value)}" for name, value in _fields(record).items()]
        request_id = one_line(str(getattr(record, "request_id", "-")))
        head = f"{self.formatTime(record)} {record.levelname} {self._process} [{request_id}]"
        return f"{head} {' '.join(words)}{self._indented_traceback(record)}"

    def _indented_traceback(self, record: logging.LogRecord) -> str:
        lines = _traceback(self, record).split("\n")
        return "".join(f"\n    {one_line(line)}" for line in lines if line)


class JsonFormatter(logging.Formatter):
    """An object on each line."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC)
        told = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "process": self._process,
            "logger": record.name,
            "request_id": getattr(record, "request_id", "-"),
            "trace_id": getattr(record, "trace_id", ""),
            "message": record.getMessage(),
            **_fields(record),
            "exception": _traceback(self, record),
        }
        # ASCII: what JSON escapes can neither end a line nor fail to be encoded.
        return json.dumps({k: v for k, v in told.items() if v not in ("", "-")}, default=str)


class LineHandler(logging.Handler):
    """Writes each record to a file descriptor, from a thread of its own.

    Whoever logs waits for no disk and no pipe, and learns of no error: lines that can't be written,
    or that come while too many wait, are dropped and counted, and the next line that can be written
    is preceded by one that says how many.
    """

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        # Unlike a `Queue` it may be used by a signal handler that interrupts its own use.
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        self._num_refused = 0  # counted by those who log, and the others by the thread
        self._num_failed = 0
        self._num_told = 0
        self._is_torn = False
        self._writer = threading.Thread(target=self._write_all, name="log-writer", daemon=True)
        self._writer.start()

    @property
    def num_dropped(self) -> int:
        """Lines that were not written, and won't be."""
        return self._num_refused + self._num_failed

    def emit(self, record: logging.LogRecord) -> None:
        if self._lines.qsize() >= MAX_WAITING_LINES:
            self._num_refused += 1
            return
        try:
            line = self.format(record)
        except Exception:
            # The arguments don't fit the message: our mistake, and still a line worth reading.
            record.msg, record.args = str(record.msg), ()
            line = self.format(record)
        self._lines.put(line)

    def close(self) -> None:
        """Wait for the lines that are under way, but not for ever."""
        self._lines.put(None)
        self._writer.join(CLOSE_TIMEOUT_S)
        super().close()

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            self._write(line)

    def _write(self, line: str) -> None:
        num_dropped = self.num_dropped
        if num_dropped > self._num_told:
            line = f"{self._notice(num_dropped - self._num_told)}\n{line}"
        data = f"{line}\n".encode("utf-8", "backslashreplace")
        if self._is_torn:
            data = b"\n" + data
        num_written = 0
        try:
            while num_written < len(data):
                num_written += os.write(self._fd, data[num_written:])
        except OSError:
            self._num_failed += 1
            self._is_torn = self._is_torn or num_written > 0
        else:
            self._num_told, self._is_torn = num_dropped, False

    def _notice(self, num_lines: int) -> str:
        told = {"msg": "%d log lines before this one could not be written", "args": (num_lines,)}
        level = {"levelno": logging.WARNING, "levelname": "WARNING", "name": logger.name}
        return self.format(logging.makeLogRecord(told | level))


def hold_lines() -> MemoryHandler:
    """Keep what is logged until `start_logging` knows how to write it."""
    held = MemoryHandler(_MAX_HELD, flushLevel=logging.CRITICAL + 1)
    logging.getLogger().addHandler(held)
    logging.captureWarnings(True)
    return held


def start_logging(
    process: str,
    settings: LogSettings,
    log_filter: logging.Filter | None = None,
    held: MemoryHandler | None = None,
) -> None:
    """Send what this process logs, its warnings too, to standard error.

    Does nothing where a program around it has set up logging. `log_filter` sees every record.
    """
    root = logging.getLogger()
    if held is not None:
        root.removeHandler(held)
    if root.handlers:
        return
    handler = LineHandler(_standard_error())
    handler.setFormatter((JsonFormatter if settings.format == "json" else TextFormatter)(process))
    if log_filter is not None:
        handler.addFilter(log_filter)
    root.addHandler(handler)
    logging.captureWarnings(True)
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    logger.setLevel(level)
    # Others' lines say little at INFO, and of downloads the whole signed address.
    root.setLevel(logging.INFO if level == logging.DEBUG else max(level, logging.WARNING))
    if held is not None:
        held.setTarget(handler)
        held.close()


def num_dropped_lines() -> int:
    """Lines of this process that were not written since `start_logging`, and won't be."""
    handlers = logging.getLogger().handlers
    return sum(handler.num_dropped for handler in handlers if isinstance(handler, LineHandler))


@contextmanager
def last_words() -> Iterator[None]:
    """Log what ends this process, in its own format, and end it with exit code 1."""
    try:
        yield
    except Exception:
        logger.exception("unexpected error; this process ends")
        sys.exit(1)


def one_line(text: str) -> str:
    """Text with everything escaped that isn't printed as itself: line ends, controls, marks that
    turn the direction of writing."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def _as_word(value: Any) -> str:
    """A value that ends where the next space is, unless it begins with a quote."""
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if _PLAIN_VALUE.fullmatch(text) else json.dumps(text)


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = getattr(record, "fields", {})
    return fields


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    return formatter.formatException(record.exc_info) if record.exc_info else ""


def _standard_error() -> int:
    """Its descriptor. If it is closed, one that takes everything: the next file or socket to be
    opened would get the number, and be written to by whoever knows no better."""
    if sys.stderr is not None:
        return sys.stderr.fileno()
    fd = os.open(os.devnull, os.O_WRONLY)
    try:
        os.fstat(2)
    except OSError:
        os.dup2(fd, 2)
    return fd
