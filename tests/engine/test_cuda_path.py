"""What the engine does on a GPU, on tensors that are there in name only.

Shows that no operation mixes host and device tensors, that nothing in a step waits for a value or a
shape from the device before its tokens are fetched, with log-probabilities and masks or without,
and that what attends, norms and routes are kernels of our own.
"""

from dataclasses import replace
from typing import Any, cast

import msgspec
import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from simulator.fake_cuda import fake_cuda

from bezel.engine.batch import Batch
from bezel.engine.config import EngineConfig
from bezel.engine.decode_graphs import DecodeGraphs
from bezel.engine.grammar import GrammarState
from bezel.engine.kv_cache import KVCache
from bezel.engine.kv_layout import KVLayout
from bezel.engine.logprobs import DeviceLogprobs, PromptLogprobs
from bezel.engine.model_config import ModelConfig
from bezel.engine.models.registry import FAMILIES
from bezel.engine.page_pool import PagePool
from bezel.engine.page_tables import PageTables
from bezel.engine.sampler import Draws, Sampler
from bezel.engine.sampling_params import SamplingParams, ThinkingBudget
from bezel.engine.scheduler import Scheduler
from bezel.engine.sequence import Sequence

MODELS = ["E2B", "E4B", "12B", "26B-A4B", "31B"]
CUDA = torch.device("cuda")
ARENA_BYTES = 8 << 30


class Model:
    """A published shape on a device that isn't there, and a scheduler that feeds it."""

    def __init__(self, config: ModelConfig) -> None:
        self.layout = KVLayout.for_model(config, 2, 16)
        with torch.device("meta"):
            self.model = FAMILIES[config.family](config, torch.bfloat16)
        for module in self.model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                weight = torch.empty(parameter.shape, dtype=parameter.dtype, device=CUDA)
                setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))
        self.model.after_loading()
        self.kv_cache = KVCache(config, self.layout, ARENA_BYTES, torch.bfloat16, CUDA)
        self.scheduler = Scheduler(EngineConfig(), PagePool(self.layout, ARENA_BYTES))
        self.sampler = Sampler([5], config.vocab_size)

    def add(
        self, num_tokens: int, params: SamplingParams, grammar: GrammarState | None = None
    ) -> None:
        name, pages = f"request-{len(self.scheduler._by_id)}", PageTables(self.layout)
        self.scheduler.add(
            Sequence(name, [9] * num_tokens, params, 1, frozenset({1}), pages, grammar)
        )

    def forward(self, batch: Batch) -> torch.Tensor:
        hidden_TD: torch.Tensor = self.model(batch, self.kv_cache)
        return hidden_TD

    def step(self, graphs: DecodeGraphs | None = None) -> tuple[Draws, PromptLogprobs | None]:
        """Compute one step up to the drawn tokens, which stay on the device."""
        step = self.scheduler.schedule()
        prompt_logprobs = None
        if graphs is not None:
            assert graphs.takes(step)
            hidden_ND = graphs.run(step)
        else:
            batch = Batch.build(step, self.layout, CUDA)
            hidden_ND = self.forward(batch)
            prompt_logprobs = PromptLogprobs.compute(step, hidden_ND, self.model.compute_logits)
            if batch.sampled_rows_N is not None:
                hidden_ND = hidden_ND[batch.sampled_rows_N]
        draws = self.sampler.draw(self.model.compute_logits(hidden_ND), step.sampled)
        assert draws.token_ids_N.is_cuda and draws.token_ids_N.shape == (len(step.sampled),)
        self.scheduler.commit(step, [9] * len(step.sampled))
        return draws, prompt_logprobs


class Anything:
    """A grammar that allows every token and never ends."""

    is_finished = False

    def fill_mask(self, mask_W: np.ndarray) -> None:
        mask_W[:] = -1

    def accept(self, token_id: int) -> None:
        pass


@pytest.fixture(params=MODELS)
def config(request: pytest.FixtureRequest, real_configs: dict[str, Any]) -> ModelConfig:
    """A published shape; where layers repeat without sharing KV, two rounds of them."""
    found = ModelConfig.from_hf(real_configs[request.param])
    return found if found.per_layer_input_size else replace(found, layers=found.layers[:12])


SAMPLED = SamplingParams(max_tokens=50, temperature=1.0, top_k=64, top_p=0.95)
PENALISED = SamplingParams(max_tokens=50, temperature=0.7, presence_penalty=1.0, min_tokens=9)
GREEDY = SamplingParams(max_tokens=50, temperature=0.0)
UNCUT = SamplingParams(max_tokens=50, temperature=1.0, min_p=0.1, logit_bias={7: 1.5})


def test_chunks_and_decodes_wait_for_nothing(config: ModelConfig) -> None:
    """A prompt, then a step of decodes beside another prompt's chunk, then decodes alone."""
    with fake_cuda() as launches, torch.inference_mode():
        model = Model(config)
        model.add(70, SAMPLED)
        model.step()
        for params in (GREEDY, PENALISED, UNCUT):
            model.add(2000, params)
        for _ in range(6):
            model.step()
    assert launches
    for launch in launches:
        assert all(tensor.is_cuda for tensor in launch.tensors), launch.name
        assert 0 not in launch.grid, f"{launch.name} would launch nothing"


def test_log_probabilities_and_masks_wait_for_nothing(config: ModelConfig) -> None:
    """All kinds of rows in one step, then decodes of them."""
    budget = ThinkingBudget(num_tokens=0, open_id=7, close_id=8, is_open=True)
    with fake_cuda() as launches, torch.inference_mode():
        model = Model(config)
        model.add(70, changed(SAMPLED, logprobs=20, prompt_logprobs=3))
        model.add(1000, changed(PENALISED, logprobs=0))
        model.add(3, GREEDY)
        model.add(5, changed(UNCUT, logprobs=5), cast(GrammarState, Anything()))
        model.add(6, changed(GREEDY, thinking_budget=budget))
        draws, prompt_logprobs = model.step()
        assert prompt_logprobs is not None and prompt_logprobs.lengths == {"request-0": 69}
        tensors = prompt_logprobs.logprobs
        assert [tuple(t.shape) for t in device_tensors(tensors)] == [(69,), (69, 3), (69, 3)]
        assert all(tensor.is_cuda for tensor in device_tensors(tensors))
        for _ in range(2):
            draws, prompt_logprobs = model.step()
            assert draws.rows == [0, 1, 3] and draws.logprobs is not None
            shapes = [tuple(tensor.shape) for tensor in device_tensors(draws.logprobs)]
            assert prompt_logprobs is None and shapes == [(3,), (3, 20), (3, 20)]
            assert all(tensor.is_cuda for tensor in device_tensors(draws.logprobs))
    names = [launch.name for launch in launches]
    assert names.count("_token_mask_kernel") == 3
    assert names.count("_logprobs_kernel") == 3 + 2  # 69 rows of a prompt are two blocks
    for launch in launches:
        assert all(tensor.is_cuda for tensor in launch.tensors), launch.name


def changed(params: SamplingParams, **changes: Any) -> SamplingParams:
    found: SamplingParams = msgspec.structs.replace(params, **changes)
    return found


def device_tensors(found: DeviceLogprobs) -> list[torch.Tensor]:
    return [found.logprobs_R, found.top_logprobs_RM, found.top_ids_RM]


def test_a_recorded_step_launches_the_same_kernels_whatever_the_sequences(
    config: ModelConfig,
) -> None:
    """Same kernels, same grids, same tensors' shapes: what a graph has recorded stays right."""
    recorded: list[list[Any]] = []
    with fake_cuda() as launches, torch.inference_mode():
        model = Model(config)

        def forward(batch: Batch) -> torch.Tensor:
            launches.clear()
            hidden_TD = model.forward(batch)
            recorded.append([(x.name, x.grid, [t.shape for t in x.tensors]) for x in launches])
            return hidden_TD

        graphs = DecodeGraphs(
            forward, model.layout, [4], 5000, CUDA, capture=lambda compute: compute
        )
        for num_tokens in (1, 3000, 17):
            model.add(num_tokens, GREEDY)
            model.step()
            while any(s.is_prefilling for s in model.scheduler.running):
                model.step()
            model.step(graphs)
    assert len(recorded) == 3
    assert recorded[0] == recorded[1] == recorded[2]
    names = [name for name, _, _ in recorded[0]]
    assert len(names) > 4 * len(config.layers)
