"""`bezel chat` and `bezel complete` as a user meets them: answers, errors, a terminal's keys."""

import asyncio
import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from served import served

from bezel.engine.errors import Overloaded
from bezel.engine.messages import FinishReason
from bezel.server.chatting.chat import Chat
from bezel.server.chatting.connection import Connection
from bezel.server.chatting.conversation import Conversation
from bezel.server.chatting.display import Display
from bezel.server.chatting.settings import ChatSettings
from bezel.server.cli import main

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = '<|tool_call>call:get_weather{city:<|"|>Rome<|"|>}<tool_call|>'


@pytest.fixture
def url(gemma4_app: FastAPI) -> Iterator[str]:
    with served(gemma4_app) as address:
        yield address


@pytest.fixture
def tools(tmp_path: Path) -> str:
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([WEATHER]))
    return str(path)


def prompt_of(engine: Any, number: int = -1) -> str:
    """The text that the engine was given; the template is `role:content` in lines."""
    return bytes(i for i in engine.requests[number][0] if i < 256).decode()


def test_a_question_on_the_command_line(
    url: str, say: Any, engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    say("<|channel>thought\nLet me see.<channel|>It is \x1b[31m4.")
    argv = ["--url", f"{url}/v1/", "--system", "Be brief", "--temperature", "0.5", "--top-k", "7"]
    assert main(["chat", *argv, "--max-tokens", "60", "--seed", "3", "2+2?"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "It is \x1b[31m4.\n", "a pipe gets what was said, as it was said"
    assert captured.err == "[thinking]\nLet me see.\n"
    assert prompt_of(engine) == "system:Be brief\nuser:2+2?\nassistant:"
    params = engine.requests[0][1]
    assert (params.temperature, params.top_k, params.max_tokens, params.seed) == (0.5, 7, 60, 3)


@pytest.mark.parametrize(("flag", "kwargs"), [("--think", True), ("--no-think", False)])
def test_thinking_is_asked_for(
    flag: str, kwargs: bool, url: str, say: Any, gemma4_tokenizer: Any
) -> None:
    say("yes")
    assert main(["chat", "--url", url, flag, "hi"]) == 0
    assert gemma4_tokenizer.template_kwargs["enable_thinking"] is kwargs


def test_calls_are_shown(
    url: str, say: Any, tools: str, capsys: pytest.CaptureFixture[str]
) -> None:
    say(f"Let me look.{CALL}{CALL}")
    assert main(["chat", "--url", url, "--tools", tools, "warm?"]) == 0
    call = '→ get_weather({"city":"Rome"})\n'
    assert capsys.readouterr().out == "Let me look.\n" + call + call


def test_a_question_from_a_pipe(
    url: str,
    say: Any,
    engine: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    say("Paris.")
    monkeypatch.setenv("BEZEL_URL", url)
    monkeypatch.setattr(sys, "stdin", io.StringIO(" Where?\n"))
    assert main(["chat"]) == 0
    assert prompt_of(engine) == "user: Where?\nassistant:"
    assert capsys.readouterr().out == "Paris.\n"


def test_completions_are_raw(
    url: str, say: Any, engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    say("\n is blue", FinishReason.LENGTH)
    assert main(["complete", "--url", url, "--max-tokens", "50", "The sky"]) == 0
    assert capsys.readouterr().out == "\n is blue\n"
    assert prompt_of(engine) == "The sky"
    assert engine.requests[0][1].max_tokens == 50


def test_an_answer_that_was_cut_off_says_so(
    url: str, say: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    say("Once", FinishReason.LENGTH)
    assert main(["chat", "--url", url, "hi"]) == 0
    assert capsys.readouterr() == ("Once\n", "[cut off: no tokens left]\n")


def test_errors_of_the_server_are_one_line(
    url: str, say: Any, engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.refusal = Overloaded("The queue\nis full.", 7)
    assert main(["chat", "--url", url, "hi"]) == 1
    assert capsys.readouterr().err == (
        "bezel: error: HTTP 429: The queue is full. (try again in 7 s)\n"
    )
    engine.refusal = None
    engine.script = [[104, 105], RuntimeError("broken")]
    assert main(["chat", "--url", url, "hi"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "hi\n"
    assert captured.err.startswith("bezel: error: The server made a mistake; its log has more")
    assert captured.err.count("\n") == 1


def test_what_is_not_unicode_is_the_servers_to_refuse(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "--url", url, "caf\udce9"]) == 1
    assert capsys.readouterr().err.startswith("bezel: error: HTTP 400: ")


def test_letters_that_the_terminal_lacks(url: str, say: Any) -> None:
    say("café →")
    command = [sys.executable, "-m", "bezel.server.cli", "chat", "--url", url, "hi"]
    done = subprocess.run(
        command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "latin-1:strict"}
    )
    assert (done.returncode, done.stdout) == (0, "café ?\n".encode("latin-1"))


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--url", "127.0.0.1:8000"], 2, "--url 127.0.0.1:8000 doesn't begin with http://"),
        (["--url", "http://"], 2, "--url http:// names no host"),
        (["--url", "http://127.0.0.1:9"], 1, "can't reach http://127.0.0.1:9: "),
        (["--tools", "none.json"], 2, "--tools none.json: No such file or directory"),
        (["--api-key", "schlüssel\n"], 2, "the API key has characters"),
        (["--temprature", "1"], 2, "unknown flag --temprature; did you mean --temperature?"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(
    argv: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", *argv, "hi"]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"bezel: error: {message}")
    assert captured.err.count("\n") == 1


def test_nothing_to_ask(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert main(["chat"]) == 2
    assert capsys.readouterr().err == "bezel: error: the prompt is empty\n"


class Talk:
    """A chat in which these lines are typed, and what was shown."""

    def __init__(self, url: str, *lines: str | type[BaseException], **settings: Any) -> None:
        self.out = io.StringIO()
        self._lines = list(lines)
        self.signs: list[str] = []
        chat_settings = ChatSettings(url=url, **settings)
        self.conversation = Conversation(chat_settings)
        display = Display(self.out, self.out, is_terminal=True, is_styled=True)
        with Connection(chat_settings) as connection:
            self.outcome = Chat(connection, self.conversation, display, self.read_line).talk()

    def read_line(self, sign: str) -> str:
        self.signs.append(sign)
        line = self._lines.pop(0) if self._lines else EOFError
        if isinstance(line, str):
            return line
        raise line


def test_thoughts_are_dim_and_control_nothing(url: str, say: Any) -> None:
    say("<|channel>thought\nHm\x1b[0m.<channel|>\n\nIt \x9b1mis.")
    talk = Talk(url, "why?")
    assert talk.out.getvalue() == "\x1b[2mHm\ufffd[0m.\x1b[0m\n\nIt \ufffd1mis.\n"
    assert talk.outcome == 0


def test_turns_are_remembered_until_they_are_reset(url: str, say: Any, engine: Any) -> None:
    say("<|channel>thought\nHm.<channel|>Yes.")
    talk = Talk(url, "one", "", "/system Be brief", "two", "/reset", "three", "/exit", "four")
    assert [prompt_of(engine, i) for i in range(3)] == [
        "user:one\nassistant:",
        "system:Be brief\nuser:one\nassistant:Yes.\nuser:two\nassistant:",
        "system:Be brief\nuser:three\nassistant:",
    ]
    assert len(engine.requests) == 3 and talk.outcome == 0


def test_commands(
    url: str, say: Any, engine: Any, gemma4_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    say("Yes.")
    Talk(url, "/system", "/rest", "/what", "/think", "hi", "/no-think", "ho", KeyboardInterrupt)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "there is none",
        "unknown command /rest; did you mean /reset?",
        "unknown command /what; /help lists them",
        "",
        "Ctrl-D or /exit leaves",
        "",
    ]
    assert len(engine.requests) == 2
    assert gemma4_tokenizer.template_kwargs["enable_thinking"] is False


def test_a_question_without_an_answer_is_forgotten(
    url: str, say: Any, engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    say("Yes.")
    engine.scripts = [[RuntimeError("broken")]]
    talk = Talk(url, "one", "two")
    assert "bezel: error: The server made a mistake" in capsys.readouterr().err
    assert prompt_of(engine) == "user:two\nassistant:"
    assert talk.conversation.messages[-1] == {"role": "assistant", "content": "Yes."}


def test_the_user_answers_calls(url: str, engine: Any, gemma4_tokenizer: Any, tools: str) -> None:
    stop = ([gemma4_tokenizer.token_id("<|tool_response>")], FinishReason.STOP)
    thought = gemma4_tokenizer.ids(f"<|channel>thought\nHm.<channel|>{CALL}")
    engine.scripts = [[thought, stop], [gemma4_tokenizer.ids("Warm."), FinishReason.STOP]]
    talk = Talk(url, "warm in Rome?", "25 degrees", tools=tools)
    assert talk.signs[1] == "get_weather returns: "
    assert '\x1b[36m→ get_weather({"city":"Rome"})\x1b[0m\nWarm.\n' in talk.out.getvalue()
    _, called, result, last = talk.conversation.messages
    assert called["reasoning_content"] == "Hm."
    assert result["tool_call_id"] == called["tool_calls"][0]["id"]
    assert result["content"] == "25 degrees" and last["content"] == "Warm."


def test_a_call_without_an_answer_is_forgotten(url: str, say: Any, engine: Any, tools: str) -> None:
    say(CALL)
    talk = Talk(url, "warm?", EOFError, tools=tools)
    assert talk.conversation.messages == []


class Keyboard:
    """A command on a terminal of its own."""

    def __init__(self, *argv: str, **environ: str) -> None:
        self._terminal, slave = pty.openpty()
        # Opened by its leader, a terminal becomes that of a session: only then Ctrl-C signals.
        command = ["sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(slave)]
        command += [sys.executable, "-m", "bezel.server.cli", *argv]
        env = {**os.environ, "TERM": "xterm", **environ}
        self.process = subprocess.Popen(command, env=env, start_new_session=True)
        self._slave = slave  # until its end, or the last output might be lost
        self.screen = ""

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def wait_for(self, text: str, after: str = "") -> None:
        """Until the screen has it, or the test gives up."""
        deadline = time.monotonic() + 8
        while text not in self.screen[self.screen.find(after) :]:
            assert time.monotonic() < deadline, repr(self.screen)
            if select.select([self._terminal], [], [], 0.1)[0]:
                self.screen += os.read(self._terminal, 4096).decode()

    def end(self) -> int:
        code = self.process.wait(10)
        os.close(self._slave)
        os.close(self._terminal)
        return code


def test_ctrl_c_stops_the_answer_and_not_the_program(
    url: str, say: Any, engine: Any, gemma4_tokenizer: Any
) -> None:
    say("Fine.")
    engine.scripts = [[gemma4_tokenizer.ids("<|channel>thought\nHm"), asyncio.Event()]]
    keyboard = Keyboard("chat", "--url", url)
    keyboard.wait_for("> ")
    keyboard.type("one\n")
    keyboard.wait_for("\x1b[2mHm")
    keyboard.type("\x03")
    keyboard.wait_for("\x1b[0m\r\n\x1b[2m[stopped]\x1b[0m\r\n")
    keyboard.wait_for("> ", after="[stopped]")
    keyboard.type("two\n")
    keyboard.wait_for("Fine.\r\n")
    keyboard.wait_for("> ", after="Fine.")
    keyboard.type("\x04")
    assert keyboard.end() == 0
    assert list(engine.ended.values()) == [FinishReason.ABORT, FinishReason.STOP]
    assert prompt_of(engine) == "user:two\nassistant:"


def test_no_color(url: str, say: Any) -> None:
    say("<|channel>thought\nHm.<channel|>Yes.")
    keyboard = Keyboard("chat", "--url", url, "hi", NO_COLOR="1")
    keyboard.wait_for("[thinking]\r\nHm.\r\n[answer]\r\nYes.\r\n")
    assert keyboard.end() == 0
    assert "\x1b" not in keyboard.screen
