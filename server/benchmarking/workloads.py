"""What is asked, and when: conversations of words from a list, arrivals of a Poisson process.

A conversation is what its user says, turn by turn. Words are short and common, so that most
tokenizers make one token of each, and drawn one by one, so that no two texts begin alike for long.
"""

from random import Random

from bezel.server.benchmarking.settings import ServeBenchmark

_WORDS = """
time year people way day man thing woman life child world school state family student group
country problem hand part place case week company system program question work government number
night point home water room mother area money story fact month lot right study book eye job word
business issue side kind head house service friend father power hour game line end member law car
city community name president team minute idea kid body information back parent face others level
office door health person art war history party result change morning reason research girl guy
moment air teacher force education
""".split()


def conversations(benchmark: ServeBenchmark) -> list[list[str]]:
    """`num_prompts` texts in conversations of one turn, or of up to `turns` in `chats`."""
    random = Random(benchmark.seed)
    texts = [_text(benchmark.input_len, random) for _ in range(benchmark.num_prompts)]
    if benchmark.workload == "chats":
        return [texts[i : i + benchmark.turns] for i in range(0, len(texts), benchmark.turns)]
    if benchmark.workload == "shared-prefix" and benchmark.prefix_len:
        prefix = _text(benchmark.prefix_len, random)
        texts = [f"{prefix} {text}" for text in texts]
    return [[text] for text in texts]


def warm_ups(benchmark: ServeBenchmark) -> list[list[str]]:
    """Lone prompts that have nothing in common with those that count, so that no cache gains."""
    random = Random(f"warm-ups {benchmark.seed}")
    return [[_text(benchmark.input_len, random)] for _ in range(benchmark.num_warmups)]


def arrivals(benchmark: ServeBenchmark, num: int) -> list[float]:
    """Seconds from the start at which each of `num` conversations begins, the first at 0."""
    if benchmark.request_rate is None:
        return [0.0] * num
    random = Random(f"arrivals {benchmark.seed}")
    due_s = [0.0]
    while len(due_s) < num:
        due_s.append(due_s[-1] + random.expovariate(benchmark.request_rate))
    return due_s


def _text(num_words: int, random: Random) -> str:
    return " ".join(random.choices(_WORDS, k=num_words))
