"""The noise of a tile, interpreted: that of the reference, whatever the key."""

import torch
from simulator.watch import watched

from bezel.kernels import gumbel as module
from bezel.kernels.jit import tl, triton, triton_on_cpu


@triton.jit
def _noise_kernel(key_ptr, noise_ptr, first, BLOCK_V: tl.constexpr):
    i_s = tl.program_id(0)
    o_v = tl.arange(0, BLOCK_V)
    b_noise = module.gumbel_tile(tl.load(key_ptr + i_s), first + o_v)
    tl.store(noise_ptr + i_s * BLOCK_V + o_v, b_noise)


def test_noise_of_a_tile() -> None:
    """The last tokens of a vocabulary; keys with all kinds of halves."""
    seed_S = torch.tensor([0, 1, -1, 2**62, -(2**63), 2**63 - 1, 1 << 31, 12345])
    key_S = module.noise_key(seed_S, torch.tensor([0, 1, 7, 131_071, 5, 262_143, 0, 1 << 31]))
    key_S = torch.cat((key_S, torch.tensor([0, -1, 1 << 31, 1 << 32, 0xFFFFFFFF])))
    token_ids_V = torch.arange(262_144 - 4096, 262_144)
    expected_SV = module.gumbel(key_S, token_ids_V.expand(len(key_S), -1))
    noise_SV = torch.empty(len(key_S), 4096)
    with watched(), triton_on_cpu():
        _noise_kernel[(len(key_S),)](key_S, noise_SV, 262_144 - 4096, BLOCK_V=4096)
    torch.testing.assert_close(noise_SV, expected_SV, rtol=1e-5, atol=1e-5)
