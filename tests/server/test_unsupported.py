"""Fields that are accepted, refused or reported; none is ignored in silence."""

import logging
from typing import Any

import pytest

from bezel.engine.errors import InvalidRequest
from bezel.server.unsupported import check_extra_fields


@pytest.mark.parametrize(
    "fields",
    [
        {"metadata": {"a": "b"}, "store": True, "user": "u", "service_tier": "auto"},
        {"parallel_tool_calls": False, "safety_identifier": "s", "prompt_cache_key": "k"},
        {"n": 1, "best_of": 1, "echo": False, "logprobs": False, "top_logprobs": 0},
        {"tools": [], "tool_choice": "none", "functions": [], "modalities": ["text"]},
        {"response_format": {"type": "text"}, "suffix": "", "priority": 0},
        {"tools": None, "n": None, "response_format": None, "whatever": None},
    ],
    ids=["no influence", "no influence either", "neutral", "no tools", "text", "null"],
)
def test_accepted(fields: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    reported: set[str] = set()
    check_extra_fields(fields, reported)
    assert reported == set()
    assert caplog.records == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("n", True),
        ("best_of", 2),
        ("echo", True),
        ("logprobs", True),
        ("logprobs", 0),
        ("top_logprobs", 5),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", {"type": "function"}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", "text"),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy"}),
        ("suffix", "."),
        ("reasoning_effort", "high"),
        ("guided_json", {}),
        ("structured_outputs", {}),
    ],
)
def test_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{name} isn't supported yet\.$") as error:
        check_extra_fields({name: value}, set())
    assert error.value.param == name
    assert error.value.code == "unsupported_parameter"


def test_unknown_names_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    reported: set[str] = set()
    check_extra_fields({"tempreature": 1, "evil\nname": 2}, reported)
    check_extra_fields({"tempreature": 1, "third": 3}, reported)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3
    assert [record.getMessage().split()[-1] for record in caplog.records] == [
        "'tempreature'",
        r"'evil\nname'",
        "'third'",
    ]


def test_made_up_names_do_not_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    reported: set[str] = set()
    for i in range(1000):
        check_extra_fields({f"field{i}": i}, reported)
    assert len(reported) == len(caplog.records) == 100
