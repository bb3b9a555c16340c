"""The README's snippets, run as they stand but for the address and the model's name."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from server_process import Server

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
CURLS = [
    command.strip()
    for language, block in BLOCKS
    if language == "sh"
    for command in re.findall(r"^curl .*?(?=^curl |\Z)", block, re.MULTILINE | re.DOTALL)
]
PYTHON = [block for language, block in BLOCKS if language == "python"]
MODELS = ("gemma-3-270m", "gemma-4-E2B-it")

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl isn't installed")


def run(server: Server, command: list[str]) -> str:
    text = [part.replace("http://127.0.0.1:8000", server.url) for part in command]
    for name in MODELS:
        text = [part.replace(f'"{name}"', '"tiny-gemma-4"') for part in text]
    done = subprocess.run(text, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def answer_of(server: Server, mark: str) -> str:
    """What the one snippet that has this in it prints."""
    (snippet,) = (curl for curl in CURLS if mark in curl)
    return run(server, ["sh", "-c", snippet])


def test_every_curl_is_tested_here() -> None:
    assert len(CURLS) == 5
    assert all(re.search(rf'"model": "({"|".join(MODELS)})"', curl) for curl in CURLS)


@needs_curl
def test_completion(gemma4_server: Server) -> None:
    answer = json.loads(answer_of(gemma4_server, "The capital of France is"))
    assert answer["object"] == "text_completion"
    assert answer["usage"]["completion_tokens"] == 16


@needs_curl
def test_schema(gemma4_server: Server) -> None:
    (choice,) = json.loads(answer_of(gemma4_server, "json_schema"))["choices"]
    place = json.loads(choice["message"]["content"])
    assert place.keys() == {"city", "continent"}
    assert place["continent"] in ("Africa", "America", "Asia", "Europe")


@needs_curl
def test_tool(gemma4_server: Server) -> None:
    (choice,) = json.loads(answer_of(gemma4_server, "get_weather"))["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]).keys() == {"city"}


@needs_curl
def test_stream(gemma4_server: Server) -> None:
    events: list[Any] = answer_of(gemma4_server, '"stream": true').split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


@needs_curl
def test_message(gemma4_server: Server) -> None:
    answer = json.loads(answer_of(gemma4_server, "/v1/messages"))
    assert (answer["type"], answer["usage"]["output_tokens"]) == ("message", 16)


def test_python(gemma4_server: Server) -> None:
    (snippet,) = PYTHON
    assert run(gemma4_server, [sys.executable, "-c", snippet]).strip()
