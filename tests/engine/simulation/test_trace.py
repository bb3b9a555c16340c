"""Lines of a trace: what they mean, what is refused, and which prompts begin alike."""

from pathlib import Path

import pytest

from bezel.engine.errors import ConfigError
from bezel.engine.simulation.trace import TraceRequest, read_trace, tokens_of, write_trace


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    requests = [
        TraceRequest(id="a", prompt=[("rules", 400), ("hi", 9)], num_output_tokens=80),
        TraceRequest(arrival_s=1.25, prompt_tokens=512, num_output_tokens=64, deadline_s=3.5),
        TraceRequest(after="a", think_s=9.5, prompt_token_ids=[7, 300_000], num_output_tokens=1),
        TraceRequest(prompt_tokens=1, num_output_tokens=1, priority=-3, tenant="x", cache_salt="y"),
    ]
    path = tmp_path / "trace.jsonl"
    assert list(write_trace(path, requests)) == requests
    assert list(read_trace(path)) == requests
    assert path.read_text().count("\n") == 4


def test_a_text_is_known_by_its_name_and_begins_alike_at_any_length() -> None:
    assert tokens_of("a", 100)[:40] == tokens_of("a", 40)
    assert len(tokens_of("a", 100)) == 100
    assert tokens_of("a", 64) != tokens_of("b", 64)


def test_prompts_are_their_texts_in_a_row() -> None:
    first = TraceRequest(id="a", prompt=[("rules", 50), ("hi", 10)], num_output_tokens=20)
    texts = [("rules", 50), ("hi", 10), ("output:a", 20), ("more", 5)]
    second = TraceRequest(prompt=texts, num_output_tokens=1)
    said = first.prompt_ids(0) + list(first.output_ids(0))
    assert second.prompt_ids(1)[:80] == said
    assert second.num_prompt_tokens == len(second.prompt_ids(1)) == 85


def test_prompts_of_unnamed_text_have_nothing_in_common() -> None:
    request = TraceRequest(prompt_tokens=64, num_output_tokens=64)
    texts = [request.prompt_ids(0), request.prompt_ids(1)]
    texts += [list(request.output_ids(0)), list(request.output_ids(1))]
    assert len({tuple(text) for text in texts}) == 4
    assert request.prompt_ids(0) == request.prompt_ids(0)


def test_token_ids_are_taken_as_they_are() -> None:
    request = TraceRequest(prompt_token_ids=[5, 262_143], num_output_tokens=1)
    assert (request.prompt_ids(0), request.num_prompt_tokens) == ([5, 262_143], 2)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt_tokens": 5}', "Object missing required field `num_output_tokens`"),
        ('{"prompt_tokens": 0, "num_output_tokens": 1}', "prompt_tokens: Expected `int` >= 1"),
        ('{"prompt_tokens": "5", "num_output_tokens": 1}', "prompt_tokens: Expected `int | null`"),
        ('{"prompt": [["a", 0]], "num_output_tokens": 1}', "prompt[0][1]: Expected `int` >= 1"),
        ('{"prompt": [], "num_output_tokens": 1}', "prompt: Expected `array` of length >= 1"),
        ('{"num_output_tokens": 1}', "prompt: give one of prompt, prompt_tokens, prompt_token_ids"),
        (
            '{"prompt_tokens": 1, "prompt_token_ids": [1], "num_output_tokens": 1}',
            "prompt: give one of prompt, prompt_tokens, prompt_token_ids",
        ),
        ('{"arrival": 1}', "Object contains unknown field `arrival`"),
        ('{"arrival_s": -1, "num_output_tokens": 1}', "arrival_s: Expected `float` >= 0.0"),
        ("prompt", "JSON is malformed"),
        ("", "Input data was truncated"),
    ],
)
def test_a_wrong_line_is_named_with_its_field(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"prompt_tokens": 5, "num_output_tokens": 1}\n' + line + "\n")
    requests = read_trace(path)
    next(requests)
    with pytest.raises(ConfigError) as caught:
        next(requests)
    assert caught.value.message.startswith(f"line 2 of the trace: {problem}")


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none" / "trace.jsonl"
    with pytest.raises(ConfigError, match=r"none/trace\.jsonl: No such file"):
        next(read_trace(path))
    with pytest.raises(ConfigError, match=r"none/trace\.jsonl: No such file"):
        list(write_trace(path, []))
