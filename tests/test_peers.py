"""`benchmarks/peers_cpu.py`: prompts of exact lengths, the order of a run, and ratios by hand."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from calm import until
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import peers_cpu
from peers import machine, pairs, ratios, servers
from peers.cells import CELLS, MEMORY_AFTER, Cell, prompts_of
from peers.drive import CellResult
from peers.prompts import Writer, lone, sentences, sharing
from peers.ratios import Value

BOS = 0
# What a server has to do for this benchmark; it tells words for tokens, and <bos>.
FAKE = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["temperature"] == 0 and body["ignore_eos"] and body["model"] == "m"
        self.send_response(200)
        self.end_headers()
        for _ in range(body["max_tokens"]):
            self.event({"choices": [{"text": "x"}]})
        prompt_tokens = len(body["prompt"].split()) + 1 + EXTRA
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": body["max_tokens"]}
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\\n\\n")
    def event(self, content):
        self.wfile.write(b"data: " + json.dumps(content).encode() + b"\\n\\n")
    def log_message(self, *_):
        pass
ThreadingHTTPServer.request_queue_size = 64
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


class Pieces:
    """A tokenizer of pieces of up to three letters; spaces belong to the piece after them."""

    def __init__(self, pattern: str = r" ?\w{1,3}| ?[^\w ]| ") -> None:
        self.pattern = re.compile(pattern)
        self.ids: dict[str, int] = {"<bos>": BOS}

    def encode(self, text: str) -> list[int]:
        pieces = self.pattern.findall(text)
        return [BOS, *(self.ids.setdefault(piece, len(self.ids)) for piece in pieces)]

    def decode(self, ids: Sequence[int]) -> str:
        texts = {i: piece for piece, i in self.ids.items()}
        return "".join(texts[i] for i in ids if i != BOS)


def writer(tokenizer: Pieces, seed: int = 0) -> Writer:
    return Writer(tokenizer.encode, tokenizer.decode, Random(seed), sentences())


@given(st.integers(2, 300), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_a_prompt_has_exactly_so_many_tokens(num_tokens: int, seed: int) -> None:
    tokenizer = Pieces()
    text = writer(tokenizer, seed).write(num_tokens)
    assert len(tokenizer.encode(text)) == num_tokens


@given(st.integers(2, 100), st.integers(1, 30))
@settings(max_examples=15, deadline=None)
def test_prompts_share_their_prefix_and_no_more(prefix: int, own: int) -> None:
    tokenizer = Pieces()
    prompts = [tokenizer.encode(p) for p in sharing(writer(tokenizer), 4, prefix, own + 4)]
    assert {len(ids) for ids in prompts} == {prefix + own + 4}
    assert len({tuple(ids[:prefix]) for ids in prompts}) == 1
    assert len({tuple(ids) for ids in prompts}) > 1


def test_a_text_that_does_not_encode_to_itself_is_no_prompt() -> None:
    tokenizer = Pieces()
    broken = Writer(tokenizer.encode, lambda ids: tokenizer.decode(ids)[1:], Random(0), ["abcd e"])
    with pytest.raises(AssertionError, match="encodes to itself"):
        lone(broken, 1, 5)


def test_cells_are_what_was_agreed() -> None:
    shapes = {c.name: (c.concurrency, c.input_len, c.shared_len, c.output_len) for c in CELLS}
    assert shapes == {
        "short × 1": (1, 32, 0, 128),
        "short × 8": (8, 32, 0, 128),
        "short × 32": (32, 32, 0, 128),
        "long × 1": (1, 1500, 0, 16),
        "shared × 16": (16, 1024, 1000, 64),
    }
    assert all(c.num_requests >= 2 * c.concurrency for c in CELLS if not c.shared_len)
    assert set(MEMORY_AFTER) <= set(shapes)
    assert all(c.input_len + c.output_len <= 2048 for c in CELLS), "a slot of llama.cpp"


def test_prompts_of_a_pair_are_the_same_for_both_and_new_in_the_next() -> None:
    tokenizer = Pieces()
    first, again, other = (
        prompts_of(CELLS[1], pair, tokenizer.encode, tokenizer.decode) for pair in (0, 0, 1)
    )
    assert first == again and len(set(first)) == CELLS[1].num_requests
    assert not set(first) & set(other)


def test_a_warm_up_has_the_batch_and_not_the_prefix() -> None:
    warm_up = CELLS[-1].warm_up()
    assert (warm_up.num_requests, warm_up.concurrency) == (16, 16)
    assert (warm_up.input_len, warm_up.shared_len, warm_up.figures) == (24, 0, ())


def test_the_median_is_of_ratios_and_pairs_must_be_whole() -> None:
    ours, theirs = [2.0, 30.0, 400.0, 1.0], [1.0, 10.0, 500.0]
    values = [Value("f", "s", "Bezel", pair, value) for pair, value in enumerate(ours)]
    values += [Value("f", "s", "peer", pair, value) for pair, value in enumerate(theirs)]
    values += [Value("g", "s", "peer", 0, 1.0)]
    (row,) = ratios.rows(values, "Bezel", "peer")
    assert (row.ratio, row.lowest, row.highest) == (2.0, 0.8, 3.0)  # 30 ÷ 10 would be of medians
    assert (row.bezel, row.peer, row.num_pairs, row.num_disturbed) == (30.0, 10.0, 3, 0)


def test_pairs_that_others_disturbed_are_told() -> None:
    values = [
        *(Value("f", "s", "Bezel", pair, 1.0, foreign=0.02) for pair in range(4)),
        Value("f", "s", "peer", 0, 2.0, foreign=0.03),
        Value("f", "s", "peer", 1, 2.0, foreign=0.30),
        Value("f", "s", "peer", 2, 2.0, idle=0.50),
        Value("f", "s", "peer", 3, 2.0),
    ]
    rows = ratios.rows(values, "Bezel", "peer")
    assert (rows[0].num_disturbed, rows[0].foreign, rows[0].idle) == (2, 0.30, 0.50)
    line = ratios.table(rows, "Bezel", "peer").splitlines()[-1]
    assert line == "| f, s | 2 | 1 | 0.5 × | 0.5 to 0.5 | 4, 2 disturbed | 0.30 |"


def test_figures_of_a_cell() -> None:
    result = CellResult(
        server="Bezel",
        cell="long × 1",
        pair=3,
        ttft_s=0.5,
        tpot_s=0.01,
        output_tokens_per_s=80.0,
        prompt_tokens=6000,
        output_tokens=64,
        cached_tokens=0,
        wall_s=2.6,
        cpu={"foreign": 0.2, "idle": 0.1, "server": 1.9, "client": 0.0},
    )
    prefill, first = ratios.values_of(CELLS[3], result)
    assert prefill == Value("long × 1: prefill", "tokens/s", "Bezel", 3, 3000.0, 0.2, 0.1)
    assert (first.figure, first.unit, first.value) == ("long × 1: first token", "ms", 500.0)
    output, between = ratios.values_of(CELLS[0], result)
    assert (output.value, between.value) == (80.0, 10.0)


def test_what_is_nobodys_is_foreign() -> None:
    before = machine.CpuTimes(all_s=100.0, server_s=10.0, idle_s=5.0, client_s=1.0)
    after = machine.CpuTimes(all_s=110.0, server_s=16.0, idle_s=5.5, client_s=1.5)
    assert before.shares(after, 4.0) == {
        "server": 1.5,
        "idle": 0.125,
        "client": 0.125,
        "foreign": 0.75,
    }


def test_cpu_time_and_memory_are_of_the_whole_tree() -> None:
    child = "import time; x = b'x' * 60_000_000\nwhile time.process_time() < 0.2: pass\n"
    child += "print(flush=True); input()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        found = machine.tree(process.pid)
        assert len(found) == 2 and found[0] == process.pid
        assert machine.tree_cpu_s(process.pid) >= 0.19
        assert machine.resident_bytes(process.pid) >= 60_000_000
        assert process.stdin is not None
        process.stdin.write(b"\n")
    assert machine.tree(process.pid) == []
    assert machine.resident_bytes(process.pid) == 0


def fake(name: str, extra: int = 0) -> servers.Recipe:
    source = FAKE.replace("EXTRA", str(extra))
    return servers.Recipe(name, [sys.executable, "-c", source, "{port}"])


def plan(folder: Path, *recipes: servers.Recipe) -> pairs.Plan:
    words = Pieces(r" ?[^ ]+")
    cells = [
        replace(CELLS[0], input_len=9, output_len=3, num_requests=2),
        replace(CELLS[-1], input_len=14, shared_len=6, output_len=2, num_requests=3),
    ]
    return pairs.Plan(
        recipes=(recipes[0], recipes[1]),
        folder=folder,
        num_pairs=3,
        num_starts=2,
        limit_s=60.0,
        request_timeout_s=10.0,
        start_timeout_s=20.0,
        encode=words.encode,
        decode=words.decode,
        cells=cells,
    )


def test_a_run_goes_a_b_a_b_and_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pairs.Run(plan(tmp_path, fake("Bezel"), fake("peer")), lambda line: None)
    run.run()
    order = [(result.pair, result.cell, result.server) for result in run.results]
    assert order == [
        (pair, cell, server)
        for pair in range(3)
        for cell in ("short × 1", "shared × 16")
        for server in ("Bezel", "peer")
    ]
    assert {result.output_tokens for result in run.results} == {2 * 3, 3 * 2}
    assert len(list(tmp_path.glob("*.log"))) == 4, "two starts of two servers"
    peers_cpu.report(run, tmp_path / "all.json")
    rows = {row["figure"]: row for row in json.loads((tmp_path / "all.json").read_text())["rows"]}
    assert rows["short × 1: output"]["num_pairs"] == 3
    assert rows[pairs.FIRST_START]["num_pairs"] == rows[pairs.LATER_START]["num_pairs"] == 1
    assert rows["resident after shared × 16"]["num_pairs"] == 2
    assert "| short × 1: output, tokens/s |" in capsys.readouterr().out
    ports = [path.stem.rpartition("-")[2] for path in tmp_path.glob("*.log")]
    assert not any(port in arguments_of(pid) for port in ports for pid in machine.tree(1))


def arguments_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return []


def test_a_paused_server_stands_still_and_goes_on(tmp_path: Path) -> None:
    def is_stopped(pid: int) -> bool:
        return "\nState:\tT" in Path(f"/proc/{pid}/status").read_text()

    with servers.running(fake("peer"), tmp_path) as server:
        with server.paused():
            until(lambda: is_stopped(server.pid))
        until(lambda: not is_stopped(server.pid))


def test_a_server_that_counts_otherwise_ends_the_run(tmp_path: Path) -> None:
    run = pairs.Run(plan(tmp_path, fake("Bezel"), fake("peer", extra=1)), lambda line: None)
    with pytest.raises(SystemExit, match=r"peer, short × 1, warm-up: \(10, 3\) tokens instead of"):
        run.run()
    assert [result.server for result in run.results] == ["Bezel"]


def test_a_server_that_ends_is_named_with_its_last_words(tmp_path: Path) -> None:
    dying = servers.Recipe("peer", [sys.executable, "-c", "raise OSError('no model {port}')"])
    run = pairs.Run(plan(tmp_path, fake("Bezel"), dying), lambda line: None)
    with pytest.raises(SystemExit, match=r"peer ended with 1:\n[\s\S]*no model \d+"):
        run.run()


def test_no_pair_begins_after_the_limit(tmp_path: Path) -> None:
    said: list[str] = []
    late = replace(plan(tmp_path, fake("Bezel"), fake("peer")), limit_s=-1.0)
    pairs.Run(late, said.append).run()
    assert said == ["stopped: -1 s are over"]
    assert list(tmp_path.glob("*.log")) == []


@pytest.mark.parametrize(
    "recipe",
    [
        servers.bezel("default", ["--dtype", "bfloat16"]),
        servers.llama("/bin/llama-server", "m.gguf"),
        servers.vllm("/bin/python", "folder"),
        servers.any_other("serve 'a b' {port}", ["A=b=c"]),
    ],
    ids=lambda recipe: recipe.name,
)
def test_recipes_have_a_place_for_the_port(recipe: servers.Recipe) -> None:
    assert [word for word in recipe.command if "{port}" in word] == ["{port}"]
    assert recipe.name != "serve" or (list(recipe.command)[1], recipe.variables) == (
        "a b",
        {"A": "b=c"},
    )


def test_cells_are_asked_in_tokens_of_the_model() -> None:
    """A cell's own prompts, of words, have the lengths it asks for."""
    words = Pieces(r" ?[^ ]+")
    cell = Cell(name="c", figures=(), concurrency=1, num_requests=3, input_len=40, output_len=1)
    prompts = prompts_of(cell, 0, words.encode, words.decode)
    assert [len(prompt.split()) for prompt in prompts] == [39, 39, 39]
