"""Invented traces: single requests, chats and agents, which arrive at random.

Conversations begin as a Poisson process. Each has one of a few system prompts and a number of turns
that is geometrically distributed; a turn says again all that was said, and something new. Lengths
are log-normal, pauses between turns exponential. A request alone is a conversation of one turn; an
agent's new text is what its tools return, its pauses the time they take.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from types import MappingProxyType

from bezel.engine.config import option
from bezel.engine.errors import ConfigError
from bezel.engine.simulation.trace import TraceRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is asked, and how often. Lengths are in tokens; a sigma is the standard deviation of a
    length's logarithm, 0 for always the same length."""

    rate: float = option(1.0, "Conversations that begin in a second; a lone request is one too")
    num_requests: int = option(1000, "Requests in all")
    seed: int = option(0, "Seed of everything drawn")
    prompt_mean: float = option(
        500.0, "Mean tokens of new text in a turn [default: 500, of chats 120, of agents 700]"
    )
    prompt_sigma: float = option(0.6, "Log-normal spread of that")
    output_mean: float = option(
        100.0, "Mean tokens of an answer [default: 100, of chats 250, of agents 120]"
    )
    output_sigma: float = option(0.6, "Log-normal spread of that")
    turns_mean: float = option(
        1.0, "Mean turns of a conversation [default: 1, of chats 5, of agents 12]"
    )
    think_mean_s: float = option(
        0.0,
        "Mean seconds from an answer to the next turn [default: 0, of chats 20, of agents 1.5]",
    )
    num_system_prompts: int = option(
        1, "System prompts, of which each conversation has one [default: 1, of chats 4]"
    )
    system_prompt_tokens: int = option(
        0, "Tokens of a system prompt [default: 0, of chats 400, of agents 4000]"
    )

    def __post_init__(self) -> None:
        """Check every range.

        Raises:
            ConfigError: naming the value that is out of range.
        """
        for name in (
            "num_requests",
            "num_system_prompts",
            "prompt_mean",
            "output_mean",
            "turns_mean",
        ):
            self._check(name, 1)
        for name in ("prompt_sigma", "output_sigma", "think_mean_s", "system_prompt_tokens"):
            self._check(name, 0)
        if not 0 < self.rate < math.inf:
            raise ConfigError(f"--rate must be above 0, got {self.rate}")

    def _check(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if not low <= value < math.inf:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} must be at least {low}, got {value}")


WORKLOADS: Mapping[str, Workload] = MappingProxyType(
    {
        "poisson": Workload(),
        "chats": Workload(
            prompt_mean=120,
            output_mean=250,
            turns_mean=5,
            think_mean_s=20,
            num_system_prompts=4,
            system_prompt_tokens=400,
        ),
        "agents": Workload(
            prompt_mean=700,
            output_mean=120,
            turns_mean=12,
            think_mean_s=1.5,
            system_prompt_tokens=4000,
        ),
    }
)


def generate(workload: Workload) -> Iterator[TraceRequest]:
    """The requests of a workload, conversation by conversation; the same for the same seed."""
    random = Random(workload.seed)
    num_made = num_conversations = 0
    arrival_s = 0.0
    while num_made < workload.num_requests:
        arrival_s += random.expovariate(workload.rate)
        num_turns = min(_num_turns(workload, random), workload.num_requests - num_made)
        yield from _conversation(workload, num_conversations, num_turns, arrival_s, random)
        num_conversations += 1
        num_made += num_turns


def _conversation(
    workload: Workload, number: int, num_turns: int, arrival_s: float, random: Random
) -> Iterator[TraceRequest]:
    system = f"system {random.randrange(workload.num_system_prompts)}"
    said = [(system, workload.system_prompt_tokens)] if workload.system_prompt_tokens else []
    for turn in range(num_turns):
        name = f"{number}.{turn}"
        said.append((f"input:{name}", _length(workload.prompt_mean, workload.prompt_sigma, random)))
        num_output_tokens = _length(workload.output_mean, workload.output_sigma, random)
        yield TraceRequest(
            id=name,
            arrival_s=arrival_s if turn == 0 else None,
            after=f"{number}.{turn - 1}" if turn else None,
            think_s=random.expovariate(1 / workload.think_mean_s)
            if turn and workload.think_mean_s
            else 0.0,
            prompt=list(said),
            num_output_tokens=num_output_tokens,
            num_preamble_tokens=workload.system_prompt_tokens,
        )
        said.append((f"output:{name}", num_output_tokens))


def _num_turns(workload: Workload, random: Random) -> int:
    """At least one; each is the last with the same probability."""
    if workload.turns_mean == 1:
        return 1
    go_on = 1 - 1 / workload.turns_mean
    return 1 + int(math.log(1 - random.random()) / math.log(go_on))


def _length(mean: float, sigma: float, random: Random) -> int:
    return max(1, round(random.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)))
