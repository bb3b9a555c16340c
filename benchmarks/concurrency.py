"""How many sequences fit beside a model's weights: Bezel, and what vLLM and SGLang reserve.

    python benchmarks/concurrency.py [--context 32768] [--device-memory 80e9] [--step-tokens 8192]
                                     [--json]

Computed, not measured: Bezel's figures by its own allocator (`KVLayout`), the peers' by the rules
that their source states, given below beside each. All three get the same weights in bfloat16, the
same share of the device's memory (--gpu-memory-utilization) and the same reserve for what steps
compute with (`activation_bytes`, for steps of so many tokens). Layers that share another's keys
and values keep none, with any of the three. The peers' rounding to pages is left out, to their
advantage; and so is the prefix cache, which takes only what nobody else needs.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from bezel.engine.config import EngineConfig
from bezel.engine.memory import DeviceMemory, activation_bytes, num_sequences
from bezel.engine.model_config import ModelConfig
from bezel.engine.planning.model import PlannedModel
from bezel.engine.planning.published import PUBLISHED

MODELS = ["gemma-4-31B", "gemma-4-26B-A4B", "gemma-4-12B", "gemma-4-E4B", "gemma-4-E2B"]
CONTEXT, DEVICE_MEMORY = 32_768, 80e9
STEP_TOKENS = 8192  # vLLM's default when it serves on a GPU of this size
VALUE_BYTES = 2


@dataclass(frozen=True, slots=True)
class KeysAndValues:
    """Bytes of a token in all layers that own KV, K and V in full; `window` in tokens."""

    local_bytes: int
    global_bytes: int
    window: int

    @classmethod
    def of(cls, model: ModelConfig) -> "KeysAndValues":
        assert model.local.window is not None
        local, global_ = (
            2 * len(layers) * attention.num_kv_heads * attention.head_dim * VALUE_BYTES
            for layers, attention in (
                (model.local_kv_layers, model.local),
                (model.global_kv_layers, model.global_),
            )
        )
        return cls(local, global_, model.local.window)

    def full_length(self, num_tokens: int) -> float:
        """A cache that knows no windows."""
        return num_tokens * (self.local_bytes + self.global_bytes)

    def windowed(self, num_tokens: int) -> float:
        """Of local layers the last `window` tokens only."""
        local = min(num_tokens, self.window)
        return local * self.local_bytes + num_tokens * self.global_bytes

    def vllm_admission(self, num_tokens: int, step_tokens: int) -> float:
        """What must be free before vLLM starts a prompt of so many tokens.

        vLLM 0.32, `SlidingWindowManager` in v1/core/single_type_kv_cache_manager.py: pages that
        left the window are freed when the steps in flight have been processed, so a local layer
        may hold window − 1 + max_in_flight_tokens tokens, and so many are asked for. With
        asynchronous scheduling two steps are in flight.
        """
        local = min(num_tokens, self.window - 1 + 2 * step_tokens)
        return local * self.local_bytes + num_tokens * self.global_bytes

    def sglang(self, num_tokens: int) -> float:
        """SGLang's share of memory for so many tokens.

        SGLang 0.5.23, `swa_full_tokens_ratio` = 0.8: memory is split once and for all between a
        pool of global layers and one of local layers that has 0.8 times as many tokens.
        """
        return num_tokens * (self.global_bytes + 0.8 * self.local_bytes)


@dataclass(frozen=True, slots=True)
class Row:
    """Of one model: bytes for pages, bytes of a sequence, and how many fit.

    vLLM's others hold their windows while one more prompt is admitted, or all come at once and are
    admitted before any has left its window.
    """

    model: str
    context: int
    pool_bytes: int
    full_length_bytes: float
    bezel_bytes: int
    bezel_sequences: int
    vllm_steady_bytes: float
    vllm_steady_sequences: int
    vllm_admission_bytes: float
    vllm_one_by_one_sequences: int
    vllm_at_once_sequences: int
    sglang_bytes: float
    sglang_sequences: int


def row_of(name: str, context: int, device_memory: float, step_tokens: int) -> Row:
    config = ModelConfig.from_hf(PUBLISHED[name])
    planned = PlannedModel.of(name, config)
    settings = EngineConfig(max_num_batched_tokens=step_tokens)
    memory = DeviceMemory(True, int(device_memory), int(device_memory))
    left = memory.with_weights(planned.weight_bytes).usable_bytes(settings)
    pool = max(0, left - activation_bytes(settings, config, VALUE_BYTES))
    peers = KeysAndValues.of(config)
    steady, admission = peers.windowed(context), peers.vllm_admission(context, step_tokens)
    pages = planned.layout.peak_pages(context)
    return Row(
        model=name,
        context=context,
        pool_bytes=pool,
        full_length_bytes=peers.full_length(context),
        bezel_bytes=planned.layout.num_bytes(pages),
        bezel_sequences=num_sequences(planned.layout, [context], pool),
        vllm_steady_bytes=steady,
        vllm_steady_sequences=int(pool // steady),
        vllm_admission_bytes=admission,
        vllm_one_by_one_sequences=1 + int((pool - admission) // steady) if pool >= admission else 0,
        vllm_at_once_sequences=int(pool // admission),
        sglang_bytes=peers.sglang(context),
        sglang_sequences=int(pool // peers.sglang(context)),
    )


def rows(
    context: int = CONTEXT, device_memory: float = DEVICE_MEMORY, step_tokens: int = STEP_TOKENS
) -> Iterator[Row]:
    """Of all models that go so far."""
    for name in MODELS:
        if context <= ModelConfig.from_hf(PUBLISHED[name]).max_position_embeddings:
            yield row_of(name, context, device_memory, step_tokens)


def tables(all_rows: list[Row]) -> str:
    """In Markdown: bytes of a sequence, then how many fit."""
    lines = [
        "| GB a sequence | Full length | Bezel | vLLM, running | vLLM, to be admitted | SGLang |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in all_rows:
        num_bytes = (
            *(row.full_length_bytes, row.bezel_bytes, row.vllm_steady_bytes),
            *(row.vllm_admission_bytes, row.sglang_bytes),
        )
        cells = [f"{num / 1e9:.2f}" for num in num_bytes]
        lines.append(f"| {row.model} | {' | '.join(cells)} |")
    lines += [
        "",
        "| Sequences | For pages, GB | Bezel | vLLM, running | vLLM, admitted one by one "
        "| vLLM, admitted at once | SGLang |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in all_rows:
        numbers = (
            *(row.bezel_sequences, row.vllm_steady_sequences, row.vllm_one_by_one_sequences),
            *(row.vllm_at_once_sequences, row.sglang_sequences),
        )
        cells = [f"{row.pool_bytes / 1e9:.1f}", *(f"{num:,}" for num in numbers)]
        lines.append(f"| {row.model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--context", type=int, default=CONTEXT, help="tokens of each sequence")
    parser.add_argument("--device-memory", type=float, default=DEVICE_MEMORY, help="bytes")
    parser.add_argument("--step-tokens", type=int, default=STEP_TOKENS, help="most in a step")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    all_rows = list(rows(arguments.context, arguments.device_memory, arguments.step_tokens))
    if arguments.json:
        print(json.dumps([asdict(row) for row in all_rows], indent=1))
    else:
        print(tables(all_rows))


if __name__ == "__main__":
    main()
