"""The embedding kernels, interpreted: their values, every byte they move, and bugs put in."""

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator.mutation import mutated
from simulator.watch import KernelBug, watched
from torch import Tensor

from bezel.kernels import embedding as module
from bezel.kernels.embedding import scaled_embedding_reference
from bezel.kernels.jit import triton_on_cpu
from bezel.kernels.rms_norm import rms_norm_reference

EPS = 1e-6
MODEL_WIDTHS = [5376, 3840, 2816, 2560, 1536, 640]
VOCABULARY = 50
token_ids = st.lists(st.integers(0, VOCABULARY - 1), max_size=7).map(
    lambda ids: torch.tensor(ids, dtype=torch.int64)
)
widths = st.sampled_from([1, 2, 12, 24, 64, 100, 1000, 1024, 1025, 1536])
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])

# What one rounding may change: half a unit in the last place, and float32's own errors.
HALF_UNIT = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def table(width: int, dtype: torch.dtype, gap: int = 0) -> Tensor:
    """A random weight_VD with NaN between its rows."""
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.full((VOCABULARY, width + gap), torch.nan, dtype=dtype)[:, :width]
    return weight_VD.copy_(torch.randn(VOCABULARY, width, generator=generator) * 0.1)


def scale_of(width: int, dtype: torch.dtype) -> float:
    return torch.tensor(width**0.5, dtype=dtype).item()


def check_scaled_embedding(
    embedding: ModuleType, token_ids_T: Tensor, weight_VD: Tensor, scale: float
) -> None:
    """One product and one rounding: equal to the reference bit by bit."""
    with watched() as watch, triton_on_cpu():
        x_TD = embedding.scaled_embedding(token_ids_T, weight_VD, scale)
    assert watch.unwritten(x_TD) == 0
    assert torch.equal(x_TD, scaled_embedding_reference(token_ids_T, weight_VD, scale))
    assert x_TD.dtype == weight_VD.dtype


def check_embed_and_norm(
    embedding: ModuleType, token_ids_T: Tensor, weight_VD: Tensor, scale: float
) -> None:
    width, dtype = weight_VD.shape[1], weight_VD.dtype
    norm_weight_D = torch.rand(width, generator=torch.Generator().manual_seed(1)) * 2 - 0.5
    with watched() as watch, triton_on_cpu():
        x_TD, z_TD = embedding.embed_and_norm(token_ids_T, weight_VD, scale, norm_weight_D, EPS)
    assert watch.unwritten(x_TD) == watch.unwritten(z_TD) == 0
    assert torch.equal(x_TD, scaled_embedding_reference(token_ids_T, weight_VD, scale))
    expected_TD = rms_norm_reference(x_TD.float(), norm_weight_D, EPS)
    assert x_TD.dtype == z_TD.dtype == dtype
    torch.testing.assert_close(z_TD.float(), expected_TD, rtol=HALF_UNIT[dtype] + 1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(token_ids, widths, dtypes, st.sampled_from([0, 3, 16]))
def test_scaled_embedding(token_ids_T: Tensor, width: int, dtype: torch.dtype, gap: int) -> None:
    weight_VD = table(width, dtype, gap)
    check_scaled_embedding(module, token_ids_T, weight_VD, scale_of(width, dtype))


@settings(max_examples=30, deadline=None)
@given(token_ids, widths, dtypes, st.sampled_from([0, 3, 16]))
def test_embed_and_norm(token_ids_T: Tensor, width: int, dtype: torch.dtype, gap: int) -> None:
    weight_VD = table(width, dtype, gap)
    check_embed_and_norm(module, token_ids_T, weight_VD, scale_of(width, dtype))


@pytest.mark.parametrize("width", MODEL_WIDTHS)
def test_widths_of_models(width: int) -> None:
    token_ids_T, weight_VD = torch.tensor([49, 0]), table(width, torch.bfloat16)
    scale = scale_of(width, torch.bfloat16)
    check_scaled_embedding(module, token_ids_T, weight_VD, scale)
    check_embed_and_norm(module, token_ids_T, weight_VD, scale)


def test_each_byte_moves_once() -> None:
    """A row is read anew for each token that has it."""
    token_ids_T = torch.tensor([3, 49, 3, 0, 7])
    weight_VD, row_bytes = table(1100, torch.bfloat16), 2200
    with watched({"ids": token_ids_T}) as watch, triton_on_cpu():
        module.scaled_embedding(token_ids_T, weight_VD, 2.0)
    assert watch.by_name["weight"].loaded == 5 * row_bytes
    assert watch.by_name["ids"].loaded == 2 * token_ids_T.nbytes  # by each of two blocks
    assert watch.bytes_stored == 5 * row_bytes

    with watched({"ids": token_ids_T}) as watch, triton_on_cpu():
        module.embed_and_norm(token_ids_T, weight_VD, 2.0, torch.ones(1100), EPS)
    assert watch.by_name["ids"].loaded == token_ids_T.nbytes
    assert watch.by_name["weight"].loaded == 5 * row_bytes
    assert watch.by_name["norm_weight"].loaded == 5 * 4400
    assert watch.bytes_stored == 2 * 5 * row_bytes

    with watched() as watch, triton_on_cpu():
        module.embed_and_norm(token_ids_T[:1], weight_VD, 2.0, torch.ones(1100), EPS)
    assert watch.traffic_ratio == 1


def check_big_tables(embedding: ModuleType) -> None:
    """Per-layer embeddings of a whole model, of which only the rows written take up memory."""
    weight_VD = torch.empty(262_144, 10_752, dtype=torch.bfloat16)
    token_ids_T = torch.tensor([262_143, 199_729, 0])
    weight_VD[token_ids_T] = table(10_752, torch.bfloat16)[:3]
    check_scaled_embedding(embedding, token_ids_T, weight_VD, 16.0)
    check_embed_and_norm(embedding, token_ids_T, weight_VD, 16.0)


def test_tables_beyond_32_bit_offsets() -> None:
    check_big_tables(module)


def check_all(embedding: ModuleType) -> None:
    token_ids_T, weight_VD = torch.tensor([3, 49, 3]), table(1100, torch.bfloat16, gap=4)
    check_scaled_embedding(embedding, token_ids_T, weight_VD, 5.03125)
    check_embed_and_norm(embedding, token_ids_T, weight_VD, 5.03125)
    check_big_tables(embedding)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("i_t).to(tl.int64)", "i_t).to(tl.int32)", id="32-bit offsets"),
        pytest.param("i_v * stride_wv", "i_t * stride_wv", id="no look-up"),
        pytest.param("i_v * stride_wv", "i_v * D", id="row stride"),
        pytest.param("b_x * scale, mask", "b_x, mask", id="no scale"),
        pytest.param("(b_x * scale).to", "(b_x + 0.0).to", id="no scale before the norm"),
        pytest.param(".to(x_ptr.dtype.element_ty)", "", id="z of the unrounded x"),
        pytest.param("D, eps) * b_weight", "D, eps)", id="no norm weight"),
        pytest.param("tl.program_id(1) * BLOCK_D", "0", id="first block for all"),
        pytest.param('cdiv(width, tile["BLOCK_D"])', "cdiv(width, 2048)", id="last block left out"),
        pytest.param(
            "weight_ptr + i_v * stride_wv + o_d, mask=m_d, other=0.0",
            "weight_ptr + i_v * stride_wv + o_d, mask=m_d",
            id="no other",
        ),
        pytest.param("m_d = o_d < D", "m_d = o_d < 4 * D", id="no mask"),
        pytest.param("z_ptr + i_t * D + o_d, b_z", "x_ptr + i_t * D + o_d, b_z", id="z over x"),
    ],
)
def test_bugs_are_noticed(old: str, new: str) -> None:
    check_all(module)
    with mutated(module, old, new, count=0) as mutant:
        with pytest.raises((AssertionError, KernelBug)):
            check_all(mutant)
