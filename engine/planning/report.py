"""A plan as text: the table for people, and five lines for the log."""

from collections.abc import Iterable, Sequence

from bezel.engine.planning.capacity import ContextPlan
from bezel.engine.planning.device import Device
from bezel.engine.planning.plan import LayerPlan, Plan
from bezel.engine.planning.steps import SPREAD, StepPlan


def table(plan: Plan) -> str:
    """All of it that fits on a screen; GB are 10⁹ bytes."""
    sections = [
        [*_head(plan)],
        [*_columns("Layers", _layer_rows(plan.layers)), *_borrowing(plan.layers)],
        _columns("Memory, GB", _memory_rows(plan)),
        _columns("Sequence of", _context_rows(plan.contexts)),
        [*_sharing(plan)],
    ]
    if plan.device is not None:
        sections.append(_columns("Step", _step_rows([*plan.decoding, *plan.prompts])))
        sections.append([_estimates(plan.device)])
    sections.append([*_end(plan)])
    return "\n\n".join("\n".join(lines) for lines in sections)


def gist(plan: Plan) -> list[str]:
    """Five lines: model, weights, KV pages, concurrency, and what is in the way first."""
    memory, first, last = plan.memory, plan.contexts[0], plan.contexts[-1]
    return [
        f"plan: {plan.model}, {plan.num_parameters / 1e6:,.0f} million parameters "
        f"in {_formats(plan)}, sequences of up to {plan.max_model_len:,} tokens",
        f"plan: weights {_gb(memory.weight_bytes)} GB: {_components(plan)}",
        f"plan: KV pages {_gb(memory.kv_bytes)} GB; a sequence takes "
        f"{_bytes(first.bytes_per_sequence)} at {first.num_tokens:,} tokens and "
        f"{_bytes(last.bytes_per_sequence)} at {last.num_tokens:,}",
        f"plan: {_at_once(last)}, {_at_once(first)}",
        f"plan: {_checkpoint(plan)}; first limit: {plan.first_limit.text} "
        f"({plan.first_limit.moved_by})",
    ]


def _head(plan: Plan) -> Iterable[str]:
    speed = "" if plan.device is None else f" and the speed of {plan.device.name}"
    yield (
        f"{plan.model}: {plan.num_parameters / 1e9:,.2f} billion parameters in {_formats(plan)}, "
        f"KV pages in {plan.kv_dtype}"
    )
    yield (
        f"On a {'GPU' if plan.memory.is_gpu else 'CPU'} with {_gb(plan.memory.total_bytes)} GB "
        f"of memory{speed}"
    )
    if not plan.memory.fits:
        yield f"DOES NOT FIT: {plan.first_limit.text}."
    elif not plan.max_model_len:
        yield f"WOULD NOT START: {plan.first_limit.text}."


def _formats(plan: Plan) -> str:
    """`bfloat16`, or `int8 (63 %) and int4 (37 %), else bfloat16`."""
    if not plan.num_packed:
        return plan.dtype
    shares = (
        f"{name} ({count / plan.num_parameters:.0%})" for name, count in plan.num_packed.items()
    )
    return f"{' and '.join(shares)}, else {plan.dtype}"


def _layer_rows(layers: Sequence[LayerPlan]) -> list[list[str]]:
    rows = [["own KV", "window", "heads", "a token keeps, per layer", "KB/token", "page"]]
    for layer in layers:
        kept = f"{layer.num_kv_heads} × {layer.values_per_token // layer.num_kv_heads:,} values"
        extra = layer.values_per_token // layer.num_kv_heads - layer.head_dim
        kept += (
            f" (V {layer.head_dim} + {extra} of K)" if layer.packs_keys_into_values else " (K, V)"
        )
        rows.append(
            [
                f"{layer.num_layers} {layer.kind}",
                str(len(layer.kv_layers)),
                "none" if layer.window is None else f"{layer.window:,}",
                f"{layer.num_heads}:{layer.num_kv_heads}",
                kept,
                f"{layer.bytes_per_token / 1e3:,.1f}",
                f"{layer.page_tokens} tokens, {_bytes(layer.page_bytes)}",
            ]
        )
    return rows


def _borrowing(layers: Sequence[LayerPlan]) -> Iterable[str]:
    """Which layers read the keys and values of others."""
    lent = [f"{layer.donors[0]} ({layer.kind})" for layer in layers if layer.donors]
    if lent:
        first = max(layer.kv_layers[-1] for layer in layers) + 1
        yield f"Layers from {first} on read the keys and values of {' and '.join(lent)}."


def _memory_rows(plan: Plan) -> list[list[str]]:
    memory = plan.memory
    sectors = (
        f"{memory.num_sectors:,} sectors of {_bytes(memory.sector_bytes)}, lent to either kind"
    )
    rows = [["", ""], ["weights", _gb(memory.weight_bytes), _components(plan)]]
    if memory.is_gpu:
        rows.append(["a step", _gb(memory.activation_bytes), "activations, logits, workspaces"])
    rows.append(["KV pages", _gb(memory.kv_bytes), sectors])
    if memory.is_gpu:
        left = memory.total_bytes - memory.usable_bytes
        rows.append(["left alone", _gb(left), "--gpu-memory-utilization, other programs"])
    taken = memory.weight_bytes + memory.activation_bytes + memory.kv_bytes
    if memory.usable_bytes - taken > memory.sector_bytes:
        why = "--max-num-seqs sequences of the longest need no more"
        if not memory.is_gpu:
            why = "other programs, and what steps compute"
        rows.append(["unused", _gb(memory.usable_bytes - taken), why])
    return rows


def _context_rows(contexts: Sequence[ContextPlan]) -> list[list[str]]:
    rows = [["takes", "full length", "factor", "at once", "stopped by"]]
    for context in contexts:
        factor = context.full_length_bytes / context.bytes_per_sequence
        rows.append(
            [
                f"{context.num_tokens:,}",
                _bytes(context.bytes_per_sequence),
                _bytes(context.full_length_bytes),
                f"{factor:,.1f}",
                f"{context.num_at_once:,}",
                context.stopped_by
                + (f" (pages hold {context.num_fit:,})" if context.stopped_by[0] == "-" else ""),
            ]
        )
    return rows


def _sharing(plan: Plan) -> Iterable[str]:
    if plan.workload is not None:
        mix = plan.workload
        yield (
            f"Workload: pages hold {mix.num_p50_fit:,} sequences of {mix.p50_tokens:,} tokens, "
            f"{mix.num_p95_fit:,} of {mix.p95_tokens:,}, {mix.num_mixed_fit:,} mixed;"
        )
        yield f"of the mix {mix.num_at_once:,} run at once, stopped by {mix.stopped_by}."
    yield f"Prefix cache: {_checkpoint(plan)}."


def _checkpoint(plan: Plan) -> str:
    page = plan.layers[1]
    window = plan.contexts[-1].window_bytes
    return (
        f"a checkpoint keeps {_bytes(window)} of window and {_bytes(page.page_bytes)} "
        f"for each {page.page_tokens} tokens"
    )


def _step_rows(steps: Sequence[StepPlan]) -> list[list[str]]:
    rows = [["floor", "bound by", "tokens/s at most", "estimated"]]
    for step in steps:
        what = f"prompt of {step.num_tokens:,}"
        if step.phase == "decode":
            what = f"decode {step.num_seqs:,} at {step.num_tokens:,}"
        low, high = step.estimated_s
        rows.append(
            [
                what,
                _time(step.floor_s),
                f"{step.bound} {step.bound_share:.0%}",
                f"{step.tokens_per_s_at_most:,.0f}",
                f"{_time(low)} – {_time(high)}",
            ]
        )
    return rows


def _estimates(device: Device) -> str:
    return (
        f"Floor: {device.bytes_per_s / 1e12:,.4g} TB/s and {device.flops_per_s / 1e12:,.4g} "
        f"TFLOP/s, nothing lost; computed, not measured.\n"
        f"Estimated: {device.memory_efficiency:.0%} and {device.compute_efficiency:.0%} of these "
        f"and {device.step_overhead_s * 1e3:.0f} ms a step, give or take a factor of {SPREAD}."
    )


def _end(plan: Plan) -> Iterable[str]:
    limit = plan.first_limit
    if plan.memory.fits and plan.max_model_len:
        longest = f"{plan.max_model_len:,} of the model's {plan.max_position_embeddings:,} tokens"
        yield f"Longest sequence: {longest}."
        yield f"First limit: {limit.text}."
    yield f"What moves it: {limit.moved_by}."
    yield from plan.notes


def _components(plan: Plan) -> str:
    parts = sorted(plan.weights.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {_gb(num_bytes)}" for name, num_bytes in parts)


def _at_once(context: ContextPlan) -> str:
    return (
        f"{context.num_at_once:,} sequences of {context.num_tokens:,} tokens at once "
        f"({context.stopped_by})"
    )


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f}"


def _time(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 10 else f"{seconds * 1e3:,.1f} ms"


def _bytes(num_bytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.{2 if unit == 'GB' else 1}f} {unit}"
    return f"{num_bytes:,.0f} B"


def _columns(title: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned, the first row as head; the last column and the first lie to the left."""
    lines = [[title, *rows[0]], *rows[1:]]
    width = max(map(len, lines))
    lines = [[*line, *[""] * (width - len(line))] for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(width)]
    return [
        "  ".join(
            cell.ljust(widths[i]) if i in (0, width - 1) else cell.rjust(widths[i])
            for i, cell in enumerate(line)
        ).rstrip()
        for line in lines
    ]
