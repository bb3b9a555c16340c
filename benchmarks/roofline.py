"""What an H100 could do at best, computed and never measured: `python benchmarks/roofline.py`.

For each Gemma 4 model the bytes that a step must read from memory and the FLOPs that it must
compute, and how long a GPU takes for them that does nothing else. A step consists of parts: each
takes the time of its bytes or that of its products, whichever is longer, and one follows the other.

    floor = Σ max(bytes / bandwidth, FLOPs / peak)        over the parts of a step

Weights are read once a step; of experts, as many as tokens choose that know no favourites. Keys and
values are read once by each layer that looks at them, also where layers share them. What kernels
hand on to each other (*activations*: what products and attention take in and put out) may stay in
the L2 cache, so it is listed but not in the floor. Launches, norms, sampling and the host cost
nothing. *Held* are weights and KV pages. `--json` prints every part; how they are counted stands in
engine/planning/step_cost.py.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from aot.launches import CONFIGS

from bezel.engine.config import EngineConfig
from bezel.engine.model_config import ModelConfig
from bezel.engine.planning.device import PRESETS
from bezel.engine.planning.model import PlannedModel
from bezel.engine.planning.step_cost import Part, StepCost

DEVICE = PRESETS["h100"]
BATCHES = [1, 8, 64, 512]
CONTEXT, LONG_CONTEXT = 8192, 65_536
CHUNKS = [EngineConfig().max_num_batched_tokens, CONTEXT]


@dataclass(frozen=True)
class Row:
    """Some steps of a model, one after the other; `num_tokens` is what they are asked for."""

    model: str
    context: int
    size: int  # sequences of a decode step, tokens of a prefill chunk
    num_tokens: int
    parts: list[Part]
    held_bytes: int

    @property
    def fits(self) -> bool:
        return self.held_bytes <= DEVICE.memory_bytes

    @property
    def seconds(self) -> float:
        return sum(part.floor_s for part in self.parts)

    @property
    def num_bytes(self) -> float:
        return sum(part.num_bytes for part in self.parts)

    @property
    def num_flops(self) -> float:
        return sum(part.num_flops for part in self.parts)

    @property
    def compute_share(self) -> float:
        """Of the time, that of parts which products bound."""
        return sum(part.floor_s for part in self.parts if part.is_compute_bound) / self.seconds

    @property
    def bytes_by_kind(self) -> dict[str, float]:
        kinds = {"weights": 0.0, "experts": 0.0, "keys and values": 0.0}
        for part in self.parts:
            kinds["keys and values" if part.kind == "KV" else part.kind] += part.num_bytes
        return kinds

    @property
    def activation_bytes(self) -> float:
        return sum(part.activation_bytes for part in self.parts)

    @property
    def tokens_per_s(self) -> float:
        """At most."""
        return self.num_tokens / self.seconds

    def as_json(self) -> dict[str, object]:
        names = ("name", "num_bytes", "num_flops", "activation_bytes", "floor_s")
        parts = [{name: getattr(part, name) for name in names} for part in self.parts]
        return asdict(self) | {
            "bytes": self.bytes_by_kind,
            "activation_bytes": self.activation_bytes,
            "num_flops": self.num_flops,
            "floor_s": self.seconds,
            "compute_bound_share_of_floor": self.compute_share,
            "tokens_per_s_at_most": self.tokens_per_s,
            "fits": self.fits,
            "parts": parts,
        }


def held_bytes(model: PlannedModel, num_seqs: int, context: int) -> int:
    """Weights and the pages of sequences; not what steps compute with."""
    layout = model.layout
    return model.weight_bytes + num_seqs * layout.num_bytes(layout.pages(context))


def most_sequences(model: PlannedModel, context: int) -> int:
    """That fit into the device's memory beside the weights."""
    pages = held_bytes(model, 1, context) - model.weight_bytes
    return (DEVICE.memory_bytes - model.weight_bytes) // pages


def parts_of(model: PlannedModel, sequences: Iterable[tuple[int, int, bool]]) -> list[Part]:
    """Of a step that computes positions [start, end) of each sequence, with logits or without."""
    cost = StepCost(model, DEVICE)
    load = cost.load()
    for start, end, is_sampled in sequences:
        load.add(start, end, is_sampled)
    return cost.parts(load)


def decode_row(model: PlannedModel, context: int, batch: int) -> Row:
    parts = parts_of(model, [(context - 1, context, True)] * batch)
    return Row(model.name, context, batch, batch, parts, held_bytes(model, batch, context))


def prefill_row(model: PlannedModel, context: int, chunk: int) -> Row:
    """A prompt of `context` tokens, in chunks; the last gives logits of the last token."""
    ends = [*range(chunk, context, chunk), context]
    parts = [
        part
        for start, end in zip([0, *ends], ends, strict=False)
        for part in parts_of(model, [(start, end, end == context)])
    ]
    return Row(model.name, context, chunk, context, parts, held_bytes(model, 1, context))


def gemma4_models() -> list[PlannedModel]:
    configs = {name: ModelConfig.from_hf(config) for name, config in CONFIGS.items()}
    return [
        PlannedModel.of(name, config)
        for name, config in configs.items()
        if config.family == "gemma4"
    ]


def decode_rows(models: Sequence[PlannedModel], context: int) -> list[Row]:
    return [decode_row(model, context, batch) for model in models for batch in BATCHES]


def prefill_rows(models: Sequence[PlannedModel]) -> list[Row]:
    return [prefill_row(model, CONTEXT, chunk) for model in models for chunk in CHUNKS]


def what_fits(models: Sequence[PlannedModel], context: int) -> str:
    most = ", ".join(f"{model.name} {most_sequences(model, context):,}" for model in models)
    return f"Sequences of {context:,} tokens that fit beside the weights: {most}."


def table(size_name: str, rows: Sequence[Row]) -> str:
    """In Markdown; bytes with their share of what is read, the bound with that of the floor."""
    columns = [
        *("Model", size_name, "Weights, GB", "Experts, GB", "KV, GB", "Activations, GB", "TFLOP"),
        *("Floor, ms", "Bound", "Tokens/s at most", "Held, GB", "Fits"),
    ]
    rules = ["---" if name in ("Model", "Bound", "Fits") else "---:" for name in columns]
    lines = [columns, rules]
    for row in rows:
        read = [
            f"{num / 1e9:,.2f} ({num / row.num_bytes:.0%})" if num else "-"
            for num in row.bytes_by_kind.values()
        ]
        share = row.compute_share
        bound = f"compute {share:.0%}" if share > 0.5 else f"memory {1 - share:.0%}"
        made = [f"{row.activation_bytes / 1e9:,.2f}", f"{row.num_flops / 1e12:,.2f}"]
        floor = [f"{row.seconds * 1e3:,.2f}", bound, f"{row.tokens_per_s:,.0f}"]
        held = [f"{row.held_bytes / 1e9:,.1f}", "yes" if row.fits else "**no**"]
        lines.append([row.model, f"{row.size:,}", *read, *made, *floor, *held])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What an H100 could do at best, computed.")
    parser.add_argument("--json", action="store_true", help="every part of every row")
    wants_json = parser.parse_args(arguments).json
    models = gemma4_models()
    decodes = {context: decode_rows(models, context) for context in (CONTEXT, LONG_CONTEXT)}
    prefills = prefill_rows(models)
    if wants_json:
        rows = {
            "decode": [row.as_json() for found in decodes.values() for row in found],
            "prefill": [row.as_json() for row in prefills],
        }
        print(json.dumps({"device": DEVICE.name, "is_measured": False} | rows, indent=1))
        return
    print(f"Computed for one {DEVICE.name}, not measured.")
    for context, found in decodes.items():
        print(f"\nA decode step, {context:,} tokens of context\n\n{table('Sequences', found)}")
        print(f"\n{what_fits(models, context)}")
    print(f"\nPrefill of {CONTEXT:,} tokens\n\n{table('Chunk', prefills)}")


if __name__ == "__main__":
    main()
