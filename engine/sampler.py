"""From logits to one token per sequence: penalties, biases and bans first, then the draw.

N sampled sequences   V vocabulary
"""

import torch
from torch import Tensor

from bezel.engine.sequence import Sequence
from bezel.kernels.sampling import sample


class Sampler:
    """`suppressed` tokens, named by the checkpoint, are never drawn."""

    def __init__(self, suppressed: list[int], vocab_size: int) -> None:
        self._suppressed = [token_id for token_id in suppressed if token_id < vocab_size]

    def sample(self, logits_NV: Tensor, sequences: list[Sequence]) -> list[int]:
        """One token id per row; `logits_NV` (float32) is changed in place."""
        for logits_V, sequence in zip(logits_NV, sequences, strict=True):
            _adjust(logits_V, sequence)
        logits_NV[:, self._suppressed] = -torch.inf
        params = [sequence.params for sequence in sequences]
        if all(p.is_greedy for p in params):
            greedy: list[int] = logits_NV.argmax(-1).tolist()
            return greedy

        def column(values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=logits_NV.device)

        token_ids: list[int] = sample(
            logits_NV,
            temperature_S=column(
                [0.0 if p.is_greedy else p.temperature for p in params], torch.float32
            ),
            top_k_S=column([p.top_k for p in params], torch.int64),
            top_p_S=column([p.top_p for p in params], torch.float32),
            min_p_S=column([p.min_p for p in params], torch.float32),
            seed_S=column([sequence.seed for sequence in sequences], torch.int64),
            position_S=column([sequence.num_tokens for sequence in sequences], torch.int64),
        ).tolist()
        return token_ids


def _adjust(logits_V: Tensor, sequence: Sequence) -> None:
    """Penalties as OpenAI and vLLM define them, then the bias, then `min_tokens`."""
    params = sequence.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.token_ids)), device=logits_V.device)
        values = logits_V[seen]
        penalty = params.repetition_penalty
        logits_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if (params.presence_penalty or params.frequency_penalty) and sequence.output_counts:
        ids = torch.tensor(list(sequence.output_counts), device=logits_V.device)
        counts = torch.tensor(list(sequence.output_counts.values()), device=logits_V.device)
        logits_V[ids] -= params.presence_penalty + params.frequency_penalty * counts
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits_V.device)
        logits_V[ids] += torch.tensor(list(params.logit_bias.values()), device=logits_V.device)
    if sequence.num_output_tokens < params.min_tokens and sequence.stop_token_ids:
        logits_V[list(sequence.stop_token_ids)] = -torch.inf
