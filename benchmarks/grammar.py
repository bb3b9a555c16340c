"""What grammars cost: `python benchmarks/grammar.py [MODEL]`.

    vocabulary    once for each engine: seconds, and memory it keeps
    first         grammar of an engine, while another sequence decodes: how long that one pauses at
                  most, and how long the first token takes
    compile       of a grammar that is new, and of one that was seen before
    mask          of one token: time to find what may come next, and to move on by the token
    apply         of a mask to a row of logits, on the CPU

Masks are those of the outputs below, token by token as the tokenizer writes them, with a cold
lexer first and once more when all its states are known. The ids of control tokens are Gemma 4's,
which in other vocabularies are unused, so any Gemma will do.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bezel.engine.checkpoint import resolve_checkpoint
from bezel.engine.config import EngineConfig
from bezel.engine.core import Engine
from bezel.engine.grammar import GrammarCompiler
from bezel.engine.messages import AddSequence
from bezel.engine.sampling_params import SamplingParams
from bezel.engine.tokenizer import Tokenizer
from bezel.kernels.token_mask import apply_token_mask
from bezel.server.chat import Thinking
from bezel.server.control_tokens import ControlTokens
from bezel.server.grammars.structured_output import output_grammar
from bezel.server.schemas import ChatCompletionRequest

VOCAB_SIZE = 262_144
EOS_TOKEN_IDS = frozenset({1, 106, 50})
NUM_RUNS = 20
MARKERS = {"⟨call⟩": 48, "⟨/call⟩": 49, "⟨quote⟩": 52, "⟨thought⟩": 100, "⟨/thought⟩": 101}
CONTROL = ControlTokens(
    eos=1, tool_open=46, tool_close=47, tool_call_open=48, tool_call_close=49,
    tool_response_open=50, tool_response_close=51, quote=52, think=98, channel_open=100,
    channel_close=101, turn_open=105, turn_close=106,
)  # fmt: skip

TEXT, NUMBER = {"type": "string"}, {"type": "number"}
PERSON = {
    "type": "object",
    "properties": {
        "name": TEXT,
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": TEXT},
    },
    "required": ["name", "age"],
}
ITEM = {
    "type": "object",
    "properties": {
        "sku": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
        "title": {"type": "string", "maxLength": 80},
        "price": {"type": "number", "minimum": 0},
        "colour": {"enum": ["red", "green", "blue", None]},
    },
    "required": ["sku", "title", "price", "colour"],
}
INVOICE = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "format": "uuid"},
        "date": {"type": "string", "format": "date"},
        "customer": {"anyOf": [PERSON, {"type": "null"}]},
        "items": {"type": "array", "items": ITEM, "minItems": 1},
        "note": {"anyOf": [TEXT, {"type": "null"}]},
    },
    "required": ["id", "date", "customer", "items", "note"],
}
WEATHER = {
    "type": "object",
    "properties": {"city": TEXT, "days": {"type": "integer"}, "unit": {"enum": ["C", "F"]}},
    "required": ["city"],
}
PROSE = (
    "The user wants to know how the weather in Zürich will be. I should look it up first; "
    "then I can say whether an umbrella 🌂 is needed. Let me think about the format, too:\n\n"
    "- the city is a string,\n- the number of days is optional.\n"
)
CITIES = [f"City number {i}" for i in range(2000)]


class Case(NamedTuple):
    """A request's fields, and an output for it."""

    name: str
    fields: dict[str, Any]
    output: str


def _function(name: str, parameters: Any) -> dict[str, Any]:
    described = {"name": name, "parameters": parameters, "strict": True}
    return {"type": "function", "function": described}


PERSON_JSON = json.dumps(
    {"name": "Ada Lovelace", "age": 36, "email": "ada@example.com", "tags": ["maths", "poetry"]}
)
INVOICE_JSON = json.dumps(
    {
        "id": "123e4567-e89b-12d3-a456-426614174000",
        "date": "2026-11-24",
        "customer": {"name": "Grüße & Söhne", "age": 44, "tags": []},
        "items": [
            {"sku": "AB-1234", "title": "A red lamp", "price": 19.99, "colour": "red"},
            {"sku": "CD-0001", "title": "Cable, 2 m", "price": 4.5, "colour": None},
        ],
        "note": None,
    },
    ensure_ascii=False,
)
CALL = "⟨call⟩call:weather{city:⟨quote⟩Zürich⟨quote⟩,days:3,unit:⟨quote⟩C⟨quote⟩}⟨/call⟩"
TOOLS = [_function("weather", WEATHER), _function("invoice", INVOICE), _function("find", PERSON)]
JSON = {"type": "json_schema", "json_schema": {"name": "answer"}}
CASES = [
    Case("schema, small", {"guided_json": PERSON}, PERSON_JSON),
    Case("schema, nested", {"guided_json": INVOICE}, INVOICE_JSON),
    Case("json_object", {"response_format": {"type": "json_object"}}, INVOICE_JSON),
    Case("thought, then schema", {"guided_json": PERSON},
         f"⟨thought⟩thought\n{PROSE * 3}⟨/thought⟩{PERSON_JSON}"),
    Case("forced call", {"tools": TOOLS, "tool_choice": "required"}, CALL),
    Case("text, then call", {"tools": TOOLS}, PROSE + CALL + CALL),
    Case("thought, then call", {"tools": TOOLS, "tool_choice": "required"},
         f"⟨thought⟩thought\n{PROSE * 3}⟨/thought⟩{CALL}"),
    Case("30 tools", {"tools": [_function(f"tool_{i}", INVOICE) for i in range(29)] + TOOLS[:1],
                      "tool_choice": "required"}, CALL),
    Case("choice of 2,000", {"guided_choice": CITIES}, CITIES[1234]),
    Case("regex", {"guided_regex": r"(\w+ ){3,8}in [0-9]{4}-[0-9]{2}\."},
         "the first release of it in 2026-11."),
]  # fmt: skip


def _memory_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def _encode(tokenizer: Tokenizer, text: str) -> Iterator[int]:
    for marker, token_id in MARKERS.items():
        text = text.replace(marker, f"\0{token_id}\0")
    for i, part in enumerate(text.split("\0")):
        yield from [int(part)] if i % 2 else tokenizer.encode(part, add_special_tokens=False)


def _ms(function: Callable[[], Any]) -> float:
    before = time.perf_counter()
    function()
    return (time.perf_counter() - before) * 1e3


def _mask_times(compiler: GrammarCompiler, grammar: str, ids: list[int]) -> list[float]:
    state = compiler.compile(grammar)
    mask_W = np.zeros(VOCAB_SIZE // 32, dtype=np.int32)
    times = []
    for token_id in ids:
        elapsed = _ms(lambda: state.fill_mask(mask_W))
        assert mask_W.view(np.uint32)[token_id // 32] >> token_id % 32 & 1, "not in the grammar"
        times.append(elapsed + _ms(lambda i=token_id: state.accept(i)))  # type: ignore[misc]
    return times


def _run(case: Case, compiler: GrammarCompiler, tokenizer: Tokenizer) -> list[float]:
    messages = [{"role": "user", "content": "?"}]
    request = ChatCompletionRequest(model="m", messages=messages, **case.fields)
    thinking = Thinking.ON if "⟨thought⟩" in case.output else Thinking.OFF
    grammar = output_grammar(request, CONTROL, thinking)
    assert grammar is not None
    new = _ms(lambda: compiler.compile(grammar))
    seen = statistics.median(_ms(lambda: compiler.compile(grammar)) for _ in range(NUM_RUNS))
    ids = list(_encode(tokenizer, case.output))
    cold = _mask_times(compiler, grammar, ids)
    warm = [t for _ in range(NUM_RUNS) for t in _mask_times(compiler, grammar, ids)]
    cells = [f"{new:.1f}", f"{seen:.2f}", str(len(ids))]
    cells += [f"{np.percentile(t, q):.3f}" for t in (cold, warm) for q in (50, 99)]
    print(f"| {case.name} | {' | '.join(cells)} |")
    return warm


def _first_grammar(model: str) -> tuple[float, float, float]:
    """Seconds: the usual time between two tokens of a stream, the longest after the first grammar
    of the engine has come, and until that one's first token."""
    engine = Engine(EngineConfig(model=model))
    endless = SamplingParams(max_tokens=2000, temperature=0.0, ignore_eos=True)
    engine.add(AddSequence("stream", [2, 107], endless))
    usual = statistics.median(_ms(engine.step) for _ in range(30)) / 1e3
    started = last = time.perf_counter()
    bound = SamplingParams(max_tokens=8, grammar="start: /[a-z ]{20,}/")
    engine.add(AddSequence("bound", [2, 107], bound))
    longest = 0.0
    while True:
        outputs, now = engine.step().outputs, time.perf_counter()
        longest, last = max(longest, now - last), now
        if any(output.request_id == "bound" and output.token_ids for output in outputs):
            return usual, longest, now - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="default")
    model = parser.parse_args().model
    usual, longest, first = _first_grammar(model)
    print(
        f"first grammar: a stream of a token every {usual:.3f} s pauses for {longest:.2f} s at most"
    )
    print(f"first grammar: its own first token after {first:.1f} s")
    checkpoint = resolve_checkpoint(model)
    tokenizer = Tokenizer.load(checkpoint)
    torch.set_num_threads(1)
    before_bytes, started = _memory_bytes(), time.perf_counter()
    compiler = GrammarCompiler(checkpoint, VOCAB_SIZE, EOS_TOKEN_IDS)
    seconds, grown = time.perf_counter() - started, _memory_bytes() - before_bytes
    print(f"vocabulary: {seconds:.1f} s, {grown / 2**20:.0f} MiB\n")
    print("| ms | compile, new | seen | tokens | mask p50, cold | p99 | warm p50 | p99 |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    times = [t for case in CASES for t in _run(case, compiler, tokenizer)]
    print(f"\nmask, all of them: p50 {np.median(times):.3f} ms, p99 {np.percentile(times, 99):.3f}")
    for num_rows in (1, 8, 32):
        logits_NV = torch.randn(num_rows, VOCAB_SIZE)
        rows_M = torch.arange(num_rows)
        mask_MW = torch.randint(-(2**31), 2**31, (num_rows, VOCAB_SIZE // 32)).to(torch.int32)
        applied = [_ms(lambda: apply_token_mask(logits_NV, rows_M, mask_MW)) for _ in range(50)]  # noqa: B023
        print(f"apply to {num_rows} rows: {statistics.median(applied) / num_rows:.3f} ms a row")


if __name__ == "__main__":
    main()
