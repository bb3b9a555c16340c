"""How much of chats that take turns is found again: `python benchmarks/round_robin.py [--json]`.

Tokens of prompts that the prefix cache finds, divided by what one finds that forgets nothing, with
the layers and windows of Gemma 4 31B in bfloat16. *Use* is the working set divided by the pool: the
bytes of all that turns still to come will want again, at their most. Over 100 % not all of it fits.
Each policy keeps keys and values in its own way and so has a working set of its own.

    Bezel         the engine's scheduler, page pool and prefix cache, without a model
    vLLM dense    as in vllm-project/vllm#48435; vLLM sparse is its later default
    SGLang        with its default split of the pool
    clairvoyant   Bezel's pages and knowledge of the future

The two others are re-implementations of what their source does; see `cache_policies/`, and
`cache_policies/trace.py` for the traces. One request runs at a time. All is computed, no GPU is
involved, and the same command prints the same numbers.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from cache_policies import bezel, clairvoyant, sglang, vllm
from cache_policies.trace import Load, TooSmall, Turn, agents, chats, loads, round_robin

from bezel.engine.model_config import ModelConfig
from bezel.engine.planning.published import PUBLISHED

MODEL = "gemma-4-31B"
USES = [0.10, 0.25, 0.50, 0.75, 0.95, 1.00, 1.25, 1.50, 2.00]
FEW_USES = [0.50, 0.95, 1.25, 2.00]


@dataclass(frozen=True)
class Policy:
    """`serve_all` gives the tokens found with a pool of so many bytes."""

    name: str
    working_set: Callable[[ModelConfig, Load], int]
    serve_all: Callable[[ModelConfig, int, list[Turn]], int]


def _vllm(retention: int | None) -> Callable[[ModelConfig, int, list[Turn]], int]:
    def serve_all(model: ModelConfig, num_bytes: int, turns: list[Turn]) -> int:
        policy = vllm.Vllm(vllm.Layout.of(model), num_bytes, retention)
        return sum(map(policy.serve, turns))

    return serve_all


POLICIES = [
    Policy("Bezel", bezel.working_set, lambda m, n, ts: sum(map(bezel.Bezel(m, n).serve, ts))),
    Policy("vLLM dense", vllm.working_set, _vllm(None)),
    Policy("vLLM sparse", vllm.working_set, _vllm(0)),
    Policy(
        "SGLang", sglang.working_set, lambda m, n, ts: sum(map(sglang.Sglang.of(m, n).serve, ts))
    ),
    Policy("clairvoyant", bezel.working_set, clairvoyant.serve_all),
]


@dataclass(frozen=True)
class Row:
    """`found` by policy is a share of the ideal, None where the pool can't hold one request."""

    trace: str
    is_same_bytes: bool
    use: float
    pool_gb: dict[str, float]
    found: dict[str, float | None]


def rows_of(name: str, turns: list[Turn], uses: list[float]) -> Iterator[Row]:
    """First each policy at that use of its own pool, then all with Bezel's bytes."""
    model = ModelConfig.from_hf(PUBLISHED[MODEL])
    moments = list(loads(turns))
    most = {p.name: max(p.working_set(model, load) for load in moments) for p in POLICIES}
    ideal = sum(turn.num_known for turn in turns)
    known: dict[tuple[str, int], float | None] = {}
    for is_same_bytes in (False, True):
        for use in uses:
            pools = {
                p.name: int(most["Bezel" if is_same_bytes else p.name] / use) for p in POLICIES
            }
            for policy in POLICIES:
                key = (policy.name, pools[policy.name])
                if key not in known:
                    known[key] = _found(policy, model, pools[policy.name], turns, ideal)
            found = {p.name: known[p.name, pools[p.name]] for p in POLICIES}
            gigabytes = {policy: num / 1e9 for policy, num in pools.items()}
            yield Row(name, is_same_bytes, use, gigabytes, found)


def _found(
    policy: Policy, model: ModelConfig, num_bytes: int, turns: list[Turn], ideal: int
) -> float | None:
    try:
        return policy.serve_all(model, num_bytes, turns) / ideal
    except TooSmall:
        return None


def print_tables(rows: list[Row]) -> None:
    headers = [policy.name for policy in POLICIES]
    previous: tuple[str, bool] | None = None
    for row in rows:
        if (row.trace, row.is_same_bytes) != previous:
            previous = (row.trace, row.is_same_bytes)
            whose = "of Bezel's working set" if row.is_same_bytes else "of its own working set"
            print(f"\n{row.trace}: {'all with the same bytes' if row.is_same_bytes else 'each'}\n")
            print(f"| Use {whose} | " + " | ".join(headers) + " |")
            print("| --- |" + " --- |" * len(headers))
        cells = ["too small" if found is None else f"{found:.3f}" for found in row.found.values()]
        print(f"| {row.use:.0%} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=int, default=16, help="chats that take turns")
    parser.add_argument("--turns", type=int, default=8, help="turns of each of them")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    traces = {
        "Round robin": (round_robin(arguments.sessions, arguments.turns), USES),
        "Chats that come and go": (chats(), FEW_USES),
        "Agents with tools": (agents(), FEW_USES),
    }
    rows = [row for name, (turns, uses) in traces.items() for row in rows_of(name, turns, uses)]
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print_tables(rows)


if __name__ == "__main__":
    main()
