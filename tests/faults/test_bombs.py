"""What is small to send and large to compile: refused, or served, while others' streams go on."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from calm import CHAT, MODEL, Watch, body
from raw_http import events_in
from server_process import Server


def repeated(depth: int, times: int) -> dict[str, Any]:
    """Arrays in arrays, each of so many items at least: times^depth values."""
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "minItems": times, "maxItems": times, "items": schema}
    return schema


def doubling(num: int) -> dict[str, Any]:
    """Each definition uses the next one twice: 2^num values."""
    twice = [
        {"type": "object", "properties": {k: {"$ref": f"#/$defs/d{i + 1}"} for k in "ab"}}
        for i in range(num)
    ]
    definitions = {f"d{i}": one | {"required": ["a", "b"]} for i, one in enumerate(twice)}
    return {"$ref": "#/$defs/d0", "$defs": definitions | {f"d{num}": {"type": "integer"}}}


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    named = {"name": "bomb", "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def regex(pattern: str) -> dict[str, Any]:
    return {"structured_outputs": {"regex": pattern}}


def ebnf(grammar: str) -> dict[str, Any]:
    return {"structured_outputs": {"grammar": grammar}}


BOMBS: dict[str, dict[str, Any]] = {
    "arrays in arrays": schema_format(repeated(12, 1000)),
    "definitions that double": schema_format(doubling(60)),
    "anyOf of anyOf": schema_format(
        {"anyOf": [{"anyOf": [{"const": f"{i} {j}"} for j in range(100)]} for i in range(100)]}
    ),
    "allOf of everything": schema_format(
        {"allOf": [{"properties": {f"p{i}": {"minLength": i}}} for i in range(2000)]}
    ),
    "a million characters": schema_format({"type": "string", "minLength": 10**6}),
    "ten million digits": schema_format({"type": "integer", "multipleOf": 0.0000001}),
    "a pattern of patterns": schema_format(
        {"type": "string", "pattern": "^((a{1,99}){1,99}){1,99}$"}
    ),
    "schemas in schemas": schema_format(json.loads('{"not": ' * 90 + "{}" + "}" * 90)),
    "a regex of repetitions": regex("(((a|b){0,999}){0,999}){0,999}"),
    "a regex that backtracks": regex("(a*)*(a*)*(a*)*b" * 50),
    "a large regex": regex("|".join("ab" * i for i in range(1500))),
    "an EBNF of repetitions": ebnf("root ::= ((([a-z]{1,999}){1,999}){1,999}){1,999}"),
    "an EBNF that is left recursive": ebnf('root ::= root root | root "a" | ""'),
    "an EBNF of 10,000 rules": ebnf(
        "root ::= r0\n"
        + "\n".join(f"r{i} ::= r{i + 1} r{i + 1} | [a-z]" for i in range(10_000))
        + "\nr10000 ::= [0-9]"
    ),
    "100,000 choices": {"structured_outputs": {"choice": [f"c{i}" for i in range(100_000)]}},
}


def test_grammar_bombs(server: Server, watch: Watch) -> None:
    # The engine reads its vocabulary for grammars when the first one comes, which takes seconds.
    first = schema_format({"enum": ["a"]})
    assert httpx.post(server.url + CHAT, json=body() | first, timeout=60).status_code == 200
    with ThreadPoolExecutor(len(BOMBS) + 4) as pool:

        def explode(bomb: dict[str, Any]) -> httpx.Response:
            asked = body(max_tokens=8) | bomb
            return httpx.post(server.url + CHAT, json=asked, timeout=300)

        def stream() -> list[str]:
            asked = {"model": MODEL, "prompt": "a", "max_tokens": 900, "ignore_eos": True}
            answer = httpx.post(
                server.url + "/v1/completions", json=asked | {"stream": True}, timeout=300
            )
            return events_in(answer.content)

        going_on = [pool.submit(stream) for _ in range(4)]
        asking = {name: pool.submit(explode, bomb) for name, bomb in BOMBS.items()}
        answers = {name: future.result() for name, future in asking.items()}
        streams = [future.result() for future in going_on]
    statuses = {name: answer.status_code for name, answer in answers.items()}
    unexpected = {name: answers[name].text for name, n in statuses.items() if n not in (200, 400)}
    assert unexpected == {}
    assert sum(status == 400 for status in statuses.values()) >= 4, statuses
    for events in streams:
        assert events[-1] == "[DONE]"
        assert not any('"error"' in event for event in events)
    watch.assert_calm(r"WARNING engine \[\S+\] the grammar can't go on$")
    assert watch.grown_kib() < 262_144
