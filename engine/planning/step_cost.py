"""What a step of the engine must read and compute, part by part, and how long that takes a device.

Keys and values, and the FLOPs of attention, are counted as the kernels' benchmarks count them: each
layer that looks at keys reads them, also where layers share them. Products of T rows with n
parameters are n weights read and 2·n·T FLOPs; of experts, as many are read as tokens choose that
know no favourites. An H100 computes 295 FLOPs while it reads a byte, so up to 295 rows of bfloat16
take no longer than one.

    floor    = Σ max(bytes / bandwidth, FLOPs / peak)        over the parts of a step
    estimate = the same with the shares that kernels reach, and what a step costs beside its kernels
"""

from dataclasses import dataclass

from bezel.engine.model_config import AttentionConfig, ModelConfig
from bezel.engine.planning.device import Device
from bezel.engine.planning.model import PlannedModel


class Load:
    """The sequences of a step, as totals: tokens, rows of logits, and for both attention kinds the
    keys that one layer reads and the pairs of a query with a key that it sees."""

    __slots__ = (
        "global_keys",
        "global_pairs",
        "local_keys",
        "local_pairs",
        "num_logits",
        "num_tokens",
        "window",
    )

    def __init__(self, window: int) -> None:
        self.window = window
        self.num_tokens = self.num_logits = 0
        self.local_keys = self.local_pairs = 0
        self.global_keys = self.global_pairs = 0

    def add(self, start: int, end: int, is_sampled: bool) -> None:
        """Positions [start, end) of one sequence; if `is_sampled`, logits of the last one."""
        window, num_tokens = self.window, end - start
        self.num_tokens += num_tokens
        self.num_logits += is_sampled
        self.global_keys += end
        self.local_keys += min(end, window + num_tokens - 1)
        self.global_pairs += _pairs(end) - _pairs(start)
        inside = min(end, window)
        if start >= window:
            self.local_pairs += num_tokens * window
        else:
            self.local_pairs += _pairs(inside) - _pairs(start) + (end - inside) * window


@dataclass(frozen=True, slots=True)
class Part:
    """`activation_bytes` are those of the rows that products and attention take in and put out;
    they may stay in a cache and don't count. Seconds are those of bytes and of FLOPs alone, at the
    device's peak."""

    name: str
    num_bytes: float
    num_flops: float
    activation_bytes: float
    memory_s: float
    compute_s: float

    @property
    def floor_s(self) -> float:
        return max(self.memory_s, self.compute_s)

    @property
    def is_compute_bound(self) -> bool:
        return self.compute_s > self.memory_s

    @property
    def kind(self) -> str:
        """What its bytes are: "weights", "experts" or "KV"."""
        if self.name.endswith("attention"):
            return "KV"
        return "experts" if self.name == "experts" else "weights"


@dataclass(frozen=True, slots=True)
class _Attention:
    """Bytes and FLOPs of all layers of one kind, those that read a donor's keys included."""

    name: str
    bytes_per_key: int
    bytes_per_query: int
    flops_per_pair: int

    @classmethod
    def of(
        cls, name: str, shape: AttentionConfig, num_layers: int, model: PlannedModel
    ) -> "_Attention":
        turned = 2 * shape.rotary.num_frequencies if shape.key_is_value else 0
        # A query as wide as a stored key, and an output as wide as a value.
        ends = num_layers * shape.num_heads * (2 * shape.head_dim + turned)
        return cls(
            name,
            bytes_per_key=num_layers * shape.kv_values_per_token * model.kv_value_bytes,
            bytes_per_query=ends * model.value_bytes,
            flops_per_pair=2 * ends,
        )


class StepCost:
    """Of any step of one model on one device. Fast enough to be asked millions of times."""

    def __init__(self, model: PlannedModel, device: Device) -> None:
        self.model = model
        self.device = device
        config = model.config
        self._moe = config.moe
        self._products = [
            (name, model.weights[name].num_bytes, 2 * model.weights[name].num_products)
            for name in ("projections", "MLP", "rest")
        ]
        self._head = model.weights["head"]
        width = config.hidden_size + len(config.layers) * config.per_layer_input_size
        self._embedding_bytes = width * model.value_bytes
        self._local = _Attention.of("local attention", config.local, _layers(config, True), model)
        self._global = _Attention.of(
            "global attention", config.global_, _layers(config, False), model
        )

    def load(self) -> Load:
        """A step without sequences yet."""
        window = self.model.config.local.window
        assert window is not None
        return Load(window)

    def parts(self, load: Load) -> list[Part]:
        """Products, experts, output head, embeddings, attention of both kinds, over all layers."""
        device = self.device
        return [
            Part(
                name,
                num_bytes,
                num_flops,
                self._activation_bytes(name, load),
                num_bytes / device.bytes_per_s,
                num_flops / device.flops_per_s,
            )
            for name, num_bytes, num_flops in self._sizes(load)
        ]

    def floor_seconds(self, load: Load) -> float:
        """At the device's peak, nothing else to do: no step can be shorter."""
        return self._sum(load, self.device.bytes_per_s, self.device.flops_per_s)

    def seconds(self, load: Load) -> float:
        """An estimate of what a step takes."""
        device = self.device
        bytes_per_s = device.bytes_per_s * device.memory_efficiency
        flops_per_s = device.flops_per_s * device.compute_efficiency
        return device.step_overhead_s + self._sum(load, bytes_per_s, flops_per_s)

    def _sum(self, load: Load, bytes_per_s: float, flops_per_s: float) -> float:
        return sum(
            max(num_bytes / bytes_per_s, num_flops / flops_per_s)
            for _, num_bytes, num_flops in self._sizes(load)
        )

    def _sizes(self, load: Load) -> list[tuple[str, float, float]]:
        """Name, bytes and FLOPs of each part."""
        num_tokens, weights = load.num_tokens, self.model.weights
        sizes: list[tuple[str, float, float]] = [
            (name, num_bytes, num_flops * num_tokens)
            for name, num_bytes, num_flops in self._products
        ]
        if self._moe is not None:
            experts, num, top_k = weights["experts"], self._moe.num_experts, self._moe.top_k
            share = distinct_experts(num, top_k, num_tokens) / num
            flops = 2 * experts.num_products * (num_tokens * top_k / num)
            sizes.append(("experts", experts.num_bytes * share, flops))
        if load.num_logits:
            flops = 2 * self._head.num_products * load.num_logits
            sizes.append(("head", self._head.num_bytes, flops))
        local, global_ = self._local, self._global
        sizes += [
            ("embedding rows", num_tokens * self._embedding_bytes, 0),
            (
                local.name,
                local.bytes_per_key * load.local_keys,
                local.flops_per_pair * load.local_pairs,
            ),
            (
                global_.name,
                global_.bytes_per_key * load.global_keys,
                global_.flops_per_pair * load.global_pairs,
            ),
        ]
        return sizes

    def _activation_bytes(self, name: str, load: Load) -> float:
        for attention in (self._local, self._global):
            if attention.name == name:
                return attention.bytes_per_query * load.num_tokens
        if name == "embedding rows":
            return 0
        rows = load.num_logits if name == "head" else load.num_tokens
        if name == "experts":
            assert self._moe is not None
            rows *= self._moe.top_k
        return self.model.weights[name].num_ends * rows * self.model.value_bytes


def distinct_experts(num_experts: int, top_k: int, num_tokens: int) -> float:
    """Expected number that some token chooses, if each chooses `top_k` with equal chances.

    One expert is left out by a token with probability 1 - k/E, by all with the T-th power of it.
    """
    return num_experts * (1 - (1 - top_k / num_experts) ** num_tokens)


def _layers(config: ModelConfig, is_local: bool) -> int:
    return sum(layer.is_local == is_local for layer in config.layers)


def _pairs(length: int) -> int:
    """Of each of the first `length` queries with each key up to its own."""
    return length * (length + 1) // 2
