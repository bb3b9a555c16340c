"""The kernel between projection and attention, interpreted: against its reference in float32, every
byte it moves, and bugs put in."""

from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator.mutation import mutated
from simulator.watch import KernelBug, Watch, watched
from torch import Tensor

from bezel.kernels import qkv as module
from bezel.kernels.jit import triton_on_cpu
from bezel.kernels.kv_pages import NO_SLOT
from bezel.kernels.qkv import QKVShape
from bezel.kernels.rotary import rotary_frequencies, rotary_table

EPS = 1e-6
# What one rounding may change: half a unit in the last place, and float32's own errors.
HALF_UNIT = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclass(frozen=True)
class Step:
    """One call: a layer's shape, and which tokens go to which slots. A global layer stores all."""

    shape: QKVShape
    num_pairs: int
    slots: tuple[int, ...]
    num_stored: int | None = None  # None: a global layer
    owns_kv: bool = True
    page_size: int = 4
    num_pages: int = 4
    dtype: torch.dtype = torch.float32
    gap: int = 16  # between rows of the projection

    @property
    def row_width(self) -> int:
        turned = 2 * self.num_pairs if self.shape.key_is_value else 0
        return self.shape.head_dim + turned

    @property
    def num_rows(self) -> int:
        kinds = (1 if self.shape.key_is_value else 2) if self.owns_kv else 0
        return self.shape.num_heads + kinds * self.shape.num_kv_heads


def projection(step: Step) -> Tensor:
    """qkv_TNK in the step's dtype, NaN between its rows. In the smallest heads eps counts."""
    shape = (len(step.slots), step.num_rows, step.shape.head_dim)
    x_TNK = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x_TNK *= torch.logspace(-3, 1, shape[1])[:, None]
    rows = torch.full((shape[0], shape[1] * shape[2] + step.gap), torch.nan, dtype=step.dtype)
    qkv_TNK = rows[:, : shape[1] * shape[2]].unflatten(1, shape[1:])
    return qkv_TNK.copy_(x_TNK)


def arena(step: Step, dtype: torch.dtype) -> Tensor:
    """[page][layer][K, V][token][head][value], all NaN; the caches are those of layer 1."""
    shape = step.shape
    parts = 1 if shape.key_is_value else 2
    pages = (step.num_pages, 3, parts, step.page_size, shape.num_kv_heads, step.row_width)
    return torch.full(pages, torch.nan, dtype=dtype)


def call(qkv: ModuleType, step: Step, qkv_TNK: Tensor, pages: Tensor) -> list[Tensor]:
    shape, generator = step.shape, torch.Generator().manual_seed(1)
    q_weight_K, k_weight_K = torch.rand(2, shape.head_dim, generator=generator) * 2 - 0.5
    frequencies = rotary_frequencies(1e4, shape.head_dim, step.num_pairs, 1.0)
    cos_sin = rotary_table(torch.arange(len(step.slots)) * 7 + 1, frequencies)
    slots_T = torch.tensor(step.slots, dtype=torch.int64)
    caches = (pages[:, 1, 0], None if shape.key_is_value else pages[:, 1, 1])
    inputs = (qkv_TNK, shape, EPS, q_weight_K)
    if step.num_stored is None:
        outputs = (*cos_sin, *caches, slots_T, step.owns_kv)
        return [qkv.rotate_and_store_global(*inputs, k_weight_K, *outputs)]
    outputs = (*cos_sin, *caches, slots_T, step.num_stored)
    if step.owns_kv:
        return list(qkv.rotate_and_store_local(*inputs, k_weight_K, *outputs))
    q_THK, k_TGK, v_TGK = qkv.rotate_and_store_local(*inputs, None, *outputs)
    assert k_TGK is None and v_TGK is None
    return [q_THK]


def check(qkv: ModuleType, step: Step) -> Watch:
    """The kernel rounds once, so that it is compared with the reference in float32."""
    qkv_TNK = projection(step)
    expected_pages, pages = arena(step, torch.float32), arena(step, step.dtype)
    expected = [*call(module, step, qkv_TNK.float(), expected_pages), expected_pages]
    with watched() as watch, triton_on_cpu():
        results = call(qkv, step, qkv_TNK, pages)
    for x, expected_x in zip([*results, pages], expected, strict=True):
        assert x.dtype == step.dtype and x.shape == expected_x.shape
        rtol = HALF_UNIT[step.dtype] + 1e-5
        torch.testing.assert_close(x.float(), expected_x, rtol=rtol, atol=1e-5, equal_nan=True)
    assert all(watch.unwritten(x) == 0 for x in results if x.numel())
    return watch


@st.composite
def steps(draw: st.DrawFn) -> Step:
    head_dim = draw(st.sampled_from([2, 16, 24, 32, 64]))
    is_local = draw(st.booleans())
    is_packed = not is_local and draw(st.booleans())
    half = head_dim // 2
    num_pairs = half if is_local else draw(st.sampled_from([1, half // 4 or 1, half]))
    page_size = draw(st.sampled_from([1, 4, 16]))
    num_slots = 4 * page_size
    slots = draw(st.lists(st.integers(0, num_slots - 1), unique=True, max_size=7))
    padded = [slot if draw(st.integers(0, 3)) else NO_SLOT for slot in slots]
    return Step(
        QKVShape(
            num_heads=draw(st.sampled_from([1, 2, 3, 4, 8, 12])),
            num_kv_heads=draw(st.sampled_from([1, 2, 3, 9])),
            head_dim=head_dim,
            has_value_norm=is_packed or draw(st.booleans()),
            key_is_value=is_packed,
        ),
        num_pairs,
        tuple(padded),
        num_stored=draw(st.integers(0, len(slots))) if is_local else None,
        owns_kv=draw(st.booleans()),
        page_size=page_size,
        dtype=draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        gap=draw(st.sampled_from([0, 1, 16])),
    )


@settings(max_examples=60, deadline=None)
@given(steps())
def test_any_step(step: Step) -> None:
    check(module, step)


LOCAL = Step(
    QKVShape(3, 2, 16, has_value_norm=True, key_is_value=False),
    num_pairs=8,
    slots=(9, NO_SLOT, 0, 15, 4, NO_SLOT),
    num_stored=4,
)
GEMMA3 = replace(
    LOCAL, shape=QKVShape(2, 1, 32, has_value_norm=False, key_is_value=False), num_pairs=16
)
GLOBAL = Step(
    QKVShape(4, 3, 32, has_value_norm=True, key_is_value=False), 4, (7, 3, NO_SLOT, 12, 0)
)
PACKED = replace(GLOBAL, shape=QKVShape(3, 2, 32, has_value_norm=True, key_is_value=True))
STANDARD = {"local": LOCAL, "gemma-3": GEMMA3, "global": GLOBAL, "packed": PACKED}


@pytest.mark.parametrize("step", STANDARD.values(), ids=STANDARD)
@pytest.mark.parametrize("dtype", HALF_UNIT)
def test_standard_steps(step: Step, dtype: torch.dtype) -> None:
    check(module, replace(step, dtype=dtype))
    check(module, replace(step, dtype=dtype, owns_kv=False))


@pytest.mark.parametrize("num_stored", range(7))
def test_decodes_before_chunks(num_stored: int) -> None:
    check(module, replace(LOCAL, num_stored=num_stored))


@pytest.mark.parametrize("step", STANDARD.values(), ids=STANDARD)
def test_few_tokens(step: Step) -> None:
    num_stored = None if step.num_stored is None else 0
    check(module, replace(step, slots=(), num_stored=num_stored))
    for slot in (5, NO_SLOT):
        check(module, replace(step, slots=(slot,), num_stored=num_stored))
        check(module, replace(step, slots=(slot,), num_stored=num_stored and 1))


def gemma(
    num_heads: int, num_kv_heads: int, head_dim: int, num_pairs: int, packed: bool = False
) -> tuple[QKVShape, int]:
    return QKVShape(num_heads, num_kv_heads, head_dim, True, packed), num_pairs


MODELS = {
    "E2B-local": gemma(8, 1, 256, 128),
    "E2B-global": gemma(8, 1, 512, 64),
    "E4B-local": gemma(8, 2, 256, 128),
    "E4B-global": gemma(8, 2, 512, 64),
    "12B-local": gemma(16, 8, 256, 128),
    "12B-global": gemma(16, 1, 512, 64, packed=True),
    "26B-global": gemma(16, 2, 512, 64, packed=True),
    "31B-local": gemma(32, 16, 256, 128),
    "31B-global": gemma(32, 4, 512, 64, packed=True),
    "gemma-3-270m": (QKVShape(4, 1, 256, False, False), 128),
    "gemma-3-27b": (QKVShape(32, 16, 128, False, False), 64),
}


@pytest.mark.parametrize("model", MODELS)
def test_shapes_of_models(model: str) -> None:
    shape, num_pairs = MODELS[model]
    is_local = num_pairs == shape.head_dim // 2
    step = Step(
        shape,
        num_pairs,
        slots=(17, NO_SLOT, 100),
        num_stored=2 if is_local else None,
        page_size=16 if is_local else 64,
        num_pages=7,
        dtype=torch.bfloat16,
    )
    check(module, step)
    check(module, replace(step, owns_kv=False))


@pytest.mark.parametrize("step", STANDARD.values(), ids=STANDARD)
def test_activations_move_once(step: Step) -> None:
    """Padded tokens are computed too, but not stored."""
    watch, num_heads = check(module, step), step.shape.num_heads
    assert watch.num_launches == 1
    assert watch.by_name["qkv"].loaded == projection(step).nbytes
    assert watch.by_name["q"].stored == len(step.slots) * num_heads * step.row_width * 4
    stored = [slot for slot in step.slots[: step.num_stored] if slot != NO_SLOT]
    row_bytes = step.shape.num_kv_heads * step.row_width * 4
    assert watch.by_name["k_cache"].stored == len(stored) * row_bytes
    if not step.shape.key_is_value:
        assert watch.by_name["v_cache"].stored == len(stored) * row_bytes
    if step.num_stored is not None:
        num_new = len(step.slots) - step.num_stored
        assert watch.by_name["k"].stored == watch.by_name["v"].stored == num_new * row_bytes


def test_rows_do_not_depend_on_their_neighbours() -> None:
    step = replace(LOCAL, dtype=torch.bfloat16)
    qkv_TNK, pages = projection(step), arena(step, step.dtype)
    with watched(), triton_on_cpu():
        q_THK, *_ = call(module, step, qkv_TNK, pages)
        qkv_TNK[1:] = torch.inf
        again_THK, *_ = call(module, step, qkv_TNK, pages)
    assert torch.equal(again_THK[0], q_THK[0])


def test_offsets_beyond_two_to_the_31() -> None:
    """Pages of the 31B model, of which only those written take up memory."""
    shape, num_pairs = MODELS["31B-local"]
    pages = torch.empty(410, 50, 2, 16, 16, 256, dtype=torch.bfloat16)
    slot = 409 * 16 + 3
    assert pages[409].storage_offset() > 2**31
    step = Step(shape, num_pairs, (slot,), num_stored=1, page_size=16, dtype=torch.bfloat16)
    with watched(), triton_on_cpu():
        call(module, step, projection(step), pages)
    small = replace(step, slots=(3,), num_pages=1)
    expected = arena(small, torch.float32)
    call(module, small, projection(small).float(), expected)
    stored, expected_stored = pages[409, 1, :, 3].float(), expected[0, 1, :, 3]
    torch.testing.assert_close(stored, expected_stored, rtol=2.0**-8, atol=1e-5)


BUGS = {
    "no eps": ("b_squares / HEAD_DIM + eps", "b_squares / HEAD_DIM"),
    "sum for mean": ("b_squares / HEAD_DIM", "b_squares"),
    "norm of the first half": ("b_first * b_first + b_second * b_second", "b_first * b_first"),
    "no query weight": ("b_first *= b_w_first", "b_first *= 1.0"),
    "no key weight": ("b_first * b_w_first, b_second", "b_first, b_second"),
    "values weighted": (
        "_store_halves(v_cache_ptr + o_stored, b_first,",
        "_store_halves(v_cache_ptr + o_stored, b_first * tl.load(k_weight_ptr + o_j, m_j, 0.0),",
    ),
    "packed values weighted": (
        "_store_halves(y_ptr, b_first, b_second, m_stored, HALF)",
        "_store_halves(y_ptr, b_first * b_w_first, b_second, m_stored, HALF)",
    ),
    "values always normed": ("if HAS_VALUE_NORM:", "if True:"),
    "values never normed": ("if HAS_VALUE_NORM:", "if False:"),
    "turned backwards": ("b_cos - b_second", "b_cos + b_second"),
    "other pairs turned": ("mask=m_turned, other=1.0", "mask=m_turned, other=0.0"),
    "halves one place off": ("x_ptr + HALF", "x_ptr + HALF - 1"),
    "turned pairs kept": ("tl.where(m_turned, 0.0, b_first * b_w_first)", "b_first * b_w_first"),
    "query not folded": ("0.0, b_second * b_w_second", "0.0, b_second"),
    "turned pairs too far apart": ("m_q & m_turned, NUM_PAIRS", "m_q & m_turned, HALF"),
    "unturned pairs stored": ("m_stored = m_stored & m_turned", "m_stored = m_stored"),
    "no slot": ("m_stored = m_kv & (i_slot >= 0)", "m_stored = m_kv"),
    "slot of one token too many": ("mask=i_t < num_stored", "mask=i_t <= num_stored"),
    "one new row missing": ("i_new >= 0", "i_new > 0"),
    "pages too close": ("= k_cache_PBGC.stride(0)", "= k_cache_PBGC.stride(0) // 3"),
    "heads beyond the last": ("(o_h < NUM_HEADS) & m_j", "m_j"),
    "kv heads beyond the last": ("(o_g < NUM_KV_HEADS) & m_j", "m_j"),
    "no programs for values": ("num_groups += kinds", "num_groups += 1"),
    "keys for values": ("(NUM_HEADS + NUM_KV_HEADS + o_g)", "(NUM_HEADS + o_g)"),
    "rows without a gap": ("qkv_TNK.stride(0)", "num_rows * head_dim"),
}


@pytest.mark.parametrize(("old", "new"), BUGS.values(), ids=BUGS)
def test_bugs_are_noticed(old: str, new: str) -> None:
    with mutated(module, old, new) as mutant, pytest.raises((KernelBug, AssertionError)):
        for step in STANDARD.values():
            check(mutant, step)
