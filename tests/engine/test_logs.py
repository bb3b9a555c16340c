"""Log lines: formats that can't be forged, and a handler that never waits and never fails."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bezel.engine import logs
from bezel.engine.logs import JsonFormatter, LineHandler, TextFormatter, one_line

FORGED = "x\n2026-11-25 00:58:01,123 ERROR server [-] all is lost\r\x1b[2J\u2028\u202e\x85\ud800"


def record(message: str, *args: Any, **more: Any) -> logging.LogRecord:
    made = logging.LogRecord("bezel", logging.INFO, __file__, 1, message, args, None)
    made.__dict__.update(more)
    return made


def failing() -> Any:
    try:
        raise ValueError(FORGED)
    except ValueError:
        return sys.exc_info()


def test_text_line() -> None:
    fields = {"status": 200, "finish": ["stop", "length"], "ttft_s": 0.25, "name": 'a "b"=c'}
    made = record("request of %s", "a client", request_id="abc", fields=fields)
    line = TextFormatter("server").format(made)
    time = logging.Formatter().formatTime(made)
    assert line == (
        f"{time} INFO server [abc] request of a client status=200 finish=stop,length "
        'ttft_s=0.25 name="a \\"b\\"=c"'
    )


def test_json_line() -> None:
    made = record("request of %s", "a client", request_id="-", trace_id="0a", fields={"n": 2})
    made.created = 1.5
    assert json.loads(JsonFormatter("engine").format(made)) == {
        "time": "1970-01-01T00:00:01.500+00:00",
        "level": "INFO",
        "process": "engine",
        "logger": "bezel",
        "trace_id": "0a",
        "message": "request of a client",
        "n": 2,
    }


def test_text_can_not_be_forged() -> None:
    more: dict[str, Any] = {"request_id": FORGED, "fields": {"f": FORGED}, "exc_info": failing()}
    first, *rest = TextFormatter("server").format(record("%s", FORGED, **more)).split("\n")
    assert first.count("all is lost") == 3
    assert any("all is lost" in line for line in rest)
    assert all(line.startswith("    ") for line in rest)
    assert all(line.isprintable() for line in (first, *rest))


def test_json_can_not_be_forged() -> None:
    more: dict[str, Any] = {"request_id": FORGED, "fields": {"f": FORGED}, "exc_info": failing()}
    line = JsonFormatter("server").format(record("%s", FORGED, **more))
    assert line.isascii() and line.isprintable()
    told = json.loads(line)
    assert told["message"] == told["request_id"] == told["f"] == FORGED
    assert told["exception"].startswith("Traceback")


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("plain — 日本 é", "plain — 日本 é"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\u202eabc", "\\u202eabc"),
        ("\ud800", "\\ud800"),
    ],
)
def test_escapes(text: str, escaped: str) -> None:
    assert one_line(text) == escaped


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def handler_of(fd: int) -> LineHandler:
    handler = LineHandler(fd)
    handler.setFormatter(TextFormatter("server"))
    return handler


def words_of(data: bytes) -> list[str]:
    """The last word of each line."""
    return [line.rsplit(" ", 1)[1] for line in data.decode().splitlines()]


def test_lines_come_in_order(pipe: tuple[int, int]) -> None:
    handler = handler_of(pipe[1])
    for number in range(100):
        handler.handle(record("line %d", number))
    handler.close()
    assert words_of(os.read(pipe[0], 1 << 16)) == [str(number) for number in range(100)]
    assert handler.num_dropped == 0


def test_a_mistake_in_the_arguments_is_still_a_line(pipe: tuple[int, int]) -> None:
    handler = handler_of(pipe[1])
    handler.handle(record("%d", "no number"))
    handler.close()
    assert os.read(pipe[0], 1 << 16).endswith(b"[-] %d\n")


def test_a_full_disk_costs_lines_and_nothing_else() -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        handler = handler_of(full.fileno())
        for number in range(20):
            handler.handle(record("line %d", number))
        handler.close()
        assert handler.num_dropped == 20


def test_the_lines_that_a_process_has_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        handlers = [handler_of(full.fileno()) for _ in range(2)]
        for handler in handlers:
            handler.handle(record("line"))
            handler.close()
        others = [logging.NullHandler()]
        monkeypatch.setattr(logging.getLogger(), "handlers", [*others, handlers[0]])
        assert logs.num_dropped_lines() == 1
        monkeypatch.setattr(logging.getLogger(), "handlers", others)
        assert logs.num_dropped_lines() == 0


def test_a_reader_that_stopped_holds_nobody_up(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "MAX_WAITING_LINES", 5)
    monkeypatch.setattr(logs, "CLOSE_TIMEOUT_S", 20)
    handler = handler_of(pipe[1])
    # More than a pipe holds: the writing thread is stuck, and of all the rest five may wait.
    for number in range(200):
        handler.handle(record("%s %d", "x" * 4000, number))
    num_dropped = handler.num_dropped
    assert 100 < num_dropped < 200
    data = b""
    while handler._lines.qsize():
        data += os.read(pipe[0], 1 << 16)
    handler.handle(record("the %s", "end"))
    while not data.endswith(b" end\n"):
        data += os.read(pipe[0], 1 << 16)
    handler.close()
    notice = f"{num_dropped} log lines before this one could not be written"
    lines = data.decode().splitlines()
    assert sum(line.endswith(notice) for line in lines) == 1
    assert len(lines) == 200 - num_dropped + 2


def test_a_torn_line_ends_before_the_next(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = handler_of(pipe[1])
    write, num_calls = os.write, 0

    def tear(fd: int, data: bytes) -> int:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:
            raise OSError(28, "No space left on device")
        return write(fd, data[:20] if num_calls == 1 else data)

    monkeypatch.setattr(logs.os, "write", tear)
    for word in ("one", "two", "three"):
        handler.handle(record("word %s", word))
    handler.close()
    torn, *lines = os.read(pipe[0], 1 << 16).decode().splitlines()
    assert len(torn) == 20
    assert lines[0].endswith("1 log lines before this one could not be written")
    assert [line.rsplit(" ", 1)[1] for line in lines[1:]] == ["two", "three"]


def run(code: str, **more: Any) -> "subprocess.CompletedProcess[str]":
    head = "import logging, os, sys, warnings\nfrom bezel.engine.logs import *\n"
    command = [sys.executable, "-c", head + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, **more)


def test_what_comes_before_the_format_is_known_is_held() -> None:
    done = run(
        "held = hold_lines()\n"
        "warnings.warn('too early')\n"
        "logging.getLogger('other').warning('early too')\n"
        "start_logging('engine', LogSettings('json', 'warning'), held=held)\n"
        "warnings.warn('in time')\n"
        "logging.getLogger('bezel').info('not said')\n"
    )
    told = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["process"] for line in told] == ["engine"] * 3
    assert [line["logger"] for line in told] == ["py.warnings", "other", "py.warnings"]
    assert "UserWarning: too early" in told[0]["message"]


@pytest.mark.parametrize(("level", "heard"), [("debug", "dIiWe"), ("info", "iWe"), ("error", "e")])
def test_levels(level: str, heard: str) -> None:
    """Others (in capitals) are heard at INFO only if all is asked for."""
    done = run(
        f"start_logging('engine', LogSettings('text', {level!r}))\n"
        "ours, others = logging.getLogger('bezel'), logging.getLogger('httpx')\n"
        "ours.debug('d'); others.info('I'); ours.info('i'); others.warning('W'); ours.error('e')\n"
    )
    words = "".join(line.rsplit(" ", 1)[1] for line in done.stderr.splitlines())
    assert words == heard


def test_last_words_are_a_line() -> None:
    done = run(
        "start_logging('engine', LogSettings('json'))\n"
        "with last_words(): raise ValueError('no\\nmore')\n"
    )
    (line,) = done.stderr.splitlines()
    told = json.loads(line)
    assert (done.returncode, told["level"]) == (1, "ERROR")
    assert told["exception"].endswith("ValueError: no\nmore")


@pytest.mark.parametrize("fds", [(2,), (1, 2), (0, 1, 2)], ids=str)
def test_nothing_is_written_to_what_took_the_place_of_a_closed_stderr(
    tmp_path: Path, fds: tuple[int, ...]
) -> None:
    """The lowest free number goes to whatever is opened next."""
    done = run(
        "start_logging('server', LogSettings())\n"
        "file = open(sys.argv[1], 'wb', buffering=0)\n"
        "logging.getLogger('bezel').error('lost')\n"
        "logging.shutdown()\n"
        "os.write(file.fileno(), b'done')\n".replace("sys.argv[1]", repr(str(tmp_path / "f"))),
        preexec_fn=lambda: [os.close(fd) for fd in fds],
    )
    assert done.returncode == 0
    assert (tmp_path / "f").read_bytes() == b"done"
