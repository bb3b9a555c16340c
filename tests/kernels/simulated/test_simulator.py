"""Every check of the simulator, by a kernel with that bug and a twin without it."""

import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from simulator.mutation import mutated
from simulator.watch import KernelBug, watched
from torch import Tensor

from bezel.kernels.jit import tl, triton


@triton.jit
def copy_kernel(x_ptr, y_ptr, num_loaded, num_stored, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o, mask=o < num_loaded, other=0)
    tl.store(y_ptr + o, x, mask=o < num_stored)


def copy(x: Tensor, y: Tensor, num_loaded: int, num_stored: int, programs: int = 2) -> None:
    copy_kernel[(programs,)](x, y, num_loaded, num_stored, BLOCK=16)


class TestMemory:
    def test_bounds(self) -> None:
        x, y = torch.randn(20), torch.zeros(20)
        with watched():
            copy(x, y, 20, 20)
        assert torch.equal(x, y)
        with watched(), pytest.raises(KernelBug, match=r"out of bounds.* of x "):
            copy(x, y, 21, 20)
        with watched(), pytest.raises(KernelBug, match=r"out of bounds.* of y "):
            copy(x, y, 20, 21)

    def test_bounds_are_those_of_the_view(self) -> None:
        arena = torch.randn(3, 20)
        with watched(), pytest.raises(KernelBug, match="out of bounds"):
            copy(arena[1], torch.zeros(32), 21, 21)
        with watched():  # a view's gaps are within its bounds: only NaN in them tells
            copy(arena[:, :4], torch.zeros(44), 44, 44, programs=3)

    def test_below_the_first_element(self) -> None:
        @triton.jit
        def shifted(x_ptr, y_ptr, shift):
            o = tl.arange(0, 16)
            tl.store(y_ptr + o, tl.load(x_ptr + o - shift))

        x = torch.randn(32)
        with watched():
            shifted[(1,)](x[16:], torch.zeros(16), 0)
        with watched(), pytest.raises(KernelBug, match="elements -1 to"):
            shifted[(1,)](x[16:], torch.zeros(16), 1)

    def test_error_names_the_program_and_the_line(self) -> None:
        with watched(shuffle=False), pytest.raises(KernelBug) as caught:
            copy(torch.randn(20), torch.zeros(20), 20, 32)
        assert caught.value.__notes__ == ["in program (1, 0, 0) of copy_kernel[2, 1, 1]"]
        lines = [str(entry.statement).strip() for entry in caught.traceback]
        assert "tl.store(y_ptr + o, x, mask=o < num_stored)" in lines

    def test_uninitialised_read(self) -> None:
        x = torch.zeros(32)
        with watched({"x": x}, uninitialised=[x]) as watch:
            assert x.isnan().all()
            copy(torch.randn(16), x, 16, 16, programs=1)
            assert watch.unwritten(x) == 16
            copy(x, torch.empty(16), 16, 16, programs=1)
            with pytest.raises(KernelBug, match="uninitialised read of x"):
                copy(x, torch.empty(32), 17, 16)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
    def test_empty_tensors_are_uninitialised(self, dtype: torch.dtype) -> None:
        example = torch.zeros(16, dtype=dtype)
        with watched():
            for x in (
                torch.empty(16, dtype=dtype),
                torch.empty_like(example),
                example.new_empty(16),
            ):
                assert not (x == 0).any()
                with pytest.raises(KernelBug, match="uninitialised"):
                    copy(x, torch.zeros(16, dtype=dtype), 16, 16, programs=1)
            x = torch.empty(16, dtype=dtype)
            x[:] = 1  # torch may fill it too
            copy(x, torch.empty(16, dtype=dtype), 16, 16, programs=1)

    def test_masked_load_without_other(self) -> None:
        @triton.jit
        def load(x_ptr, y_ptr, n, WITH_OTHER: tl.constexpr):
            o = tl.arange(0, 16)
            if WITH_OTHER:
                x = tl.load(x_ptr + o, mask=o < n, other=0)
            else:
                x = tl.load(x_ptr + o, mask=o < n)
            tl.store(y_ptr + o, x)

        for x in (torch.randn(10), torch.randn(10).bfloat16(), torch.arange(10)):
            with watched():
                with_other, without = x.new_empty(16), x.new_empty(16)
                load[(1,)](x, with_other, 10, WITH_OTHER=True)
                load[(1,)](x, without, 10, WITH_OTHER=False)
            assert torch.equal(with_other[:10], x) and torch.equal(without[:10], x)
            assert not with_other[10:].any()
            assert (without[10:].isnan() | (without[10:] > 1e9)).all()

    def test_lost_store(self) -> None:
        x = torch.randn(32)
        with watched() as watch:
            y = torch.empty(32)
            copy(x, y, 32, 31)
            assert watch.unwritten(y) == 1 and y[31].isnan()
            copy(x, y, 32, 32)
            assert watch.unwritten(y) == 0

    def test_views_of_one_storage_share_what_is_known(self) -> None:
        arena = torch.zeros(2, 64, dtype=torch.uint8)
        k, v = arena[0].view(torch.float32), arena[1].view(torch.bfloat16)
        with watched(uninitialised=[arena]) as watch:
            copy(torch.randn(16), k, 16, 16, programs=1)
            copy(torch.randn(32).bfloat16(), v, 31, 31)
            assert watch.unwritten(arena) == 2
            copy(arena[0].view(torch.int16), torch.empty(32, dtype=torch.int16), 32, 32)
            with pytest.raises(KernelBug, match="uninitialised"):
                copy(arena[1], torch.empty(64, dtype=torch.uint8), 64, 64, programs=4)

    def test_cells_get_narrower(self) -> None:
        x = torch.zeros(16)
        with watched() as watch:
            copy(torch.randn(16), x, 16, 12, programs=1)
            copy(x.view(torch.int16), torch.empty(32, dtype=torch.int16), 20, 20)
            assert watch.unwritten(x) == 4 and watch.unwritten(x.view(torch.int8)) == 16
        assert watch.minimum_bytes == 64 + 8 + 40  # in; 2 floats of x that nobody read; out

    def test_alignment(self) -> None:
        @triton.jit
        def load_word(x_ptr, y_ptr, first):
            tl.store(y_ptr, tl.load((x_ptr + first).to(tl.pointer_type(tl.int32))))

        x, y = torch.arange(16, dtype=torch.int8), torch.zeros(1, dtype=torch.int32)
        with watched():
            load_word[(1,)](x, y, 12)
            assert y.item() == 0x0F0E0D0C
            with pytest.raises(KernelBug, match="misaligned access to x"):
                load_word[(1,)](x, y, 11)
            with pytest.raises(KernelBug, match="out of bounds"):
                load_word[(1,)](x, y, 16)

    def test_large_tensors_are_bounded_only(self) -> None:
        with watched() as watch:
            x = torch.empty((1 << 27) + 1, dtype=torch.int8)
            copy(x[-16:], torch.empty(16, dtype=torch.int8), 16, 16, programs=1)
            assert watch.by_name["x"].loaded == 16
            with pytest.raises(KernelBug, match="out of bounds"):
                copy(x[-16:], torch.empty(17, dtype=torch.int8), 17, 17)

    def test_pointer_from_nowhere(self) -> None:
        @triton.jit
        def follow(address, y_ptr):
            tl.store(y_ptr, tl.load(address.to(tl.pointer_type(tl.float32))))

        with watched(), pytest.raises(KernelBug, match="not made from a tensor"):
            follow[(1,)](torch.zeros(1).data_ptr(), torch.zeros(1))


class TestRaces:
    def test_two_programs_write(self) -> None:
        @triton.jit
        def write(y_ptr, stride):
            tl.store(y_ptr + tl.program_id(0) * stride + tl.arange(0, 16), 1.0)

        with watched():
            write[(2,)](torch.zeros(32), 16)
        with watched(), pytest.raises(KernelBug, match="two programs write"):
            write[(2,)](torch.zeros(32), 15)  # as a wrong stride of splits does

    def test_two_launches_may_write(self) -> None:
        x, y = torch.randn(32), torch.zeros(32)
        with watched():
            copy(x, y, 32, 32)
            copy(x, y, 32, 32)
            copy(y, x, 32, 32)

    def test_one_program_reads_what_another_writes(self) -> None:
        @triton.jit
        def pass_on(x_ptr, source):
            i_program = tl.program_id(0)
            x = tl.load(x_ptr + (i_program + source) % 2)
            tl.store(x_ptr + i_program, x + 1)

        for seed in range(4):  # whichever comes first
            with watched(seed=seed):
                pass_on[(2,)](torch.zeros(2), 0)
            with watched(seed=seed), pytest.raises(KernelBug, match="race: x is"):
                pass_on[(2,)](torch.zeros(2), 1)

    @pytest.mark.parametrize(
        ("i_writer", "error"), [(0, "is read where another"), (1, "is written where another")]
    )
    def test_either_order_is_noticed(self, i_writer: int, error: str) -> None:
        @triton.jit
        def exchange(x_ptr, y_ptr, i_writer):
            if tl.program_id(0) == i_writer:
                tl.store(x_ptr, 1.0)
            else:
                tl.store(y_ptr, tl.load(x_ptr))

        with watched(shuffle=False), pytest.raises(KernelBug, match=error):
            exchange[(2,)](torch.zeros(1), torch.zeros(1), i_writer)

    def test_duplicates_in_one_store(self) -> None:
        @triton.jit
        def scatter(slots_ptr, y_ptr):
            o = tl.arange(0, 16)
            tl.store(y_ptr + tl.load(slots_ptr + o), o.to(tl.float32))

        slots = torch.randperm(16, generator=torch.Generator().manual_seed(0))
        with watched():
            scatter[(1,)](slots, torch.zeros(16))
        slots[3] = slots[5]
        with watched(), pytest.raises(KernelBug, match="writes an element of y twice"):
            scatter[(1,)](slots, torch.zeros(16))

    def test_store_read_back(self) -> None:
        @triton.jit
        def transpose(x_ptr, y_ptr, BARRIER: tl.constexpr):
            o = tl.arange(0, 16)
            tl.store(x_ptr + o, o)
            if BARRIER:
                tl.debug_barrier()
            tl.store(y_ptr + o, tl.load(x_ptr + 15 - o))

        x, y = torch.zeros(16, dtype=torch.int32), torch.zeros(16, dtype=torch.int32)
        with watched():
            transpose[(1,)](x, y, BARRIER=True)
        assert y.tolist() == list(range(15, -1, -1))
        with watched(), pytest.raises(KernelBug, match="read back"):
            transpose[(1,)](x, y, BARRIER=False)

    def test_atomics(self) -> None:
        @triton.jit
        def add(x_ptr):
            tl.atomic_add(x_ptr, 1.0)

        with watched(), pytest.raises(KernelBug, match="atomics"):
            add[(1,)](torch.zeros(1))

    def test_programs_run_in_any_order(self) -> None:
        @triton.jit
        def count(order_ptr, next_ptr):
            i_next = tl.load(next_ptr)
            tl.store(order_ptr + i_next, tl.program_id(0))
            tl.store(next_ptr, i_next + 1)

        orders = []
        for seed in range(2):
            order, following = torch.zeros(8, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
            with watched(seed=seed) as watch, pytest.raises(KernelBug):
                count[(8,)](order, following)
            orders.append(int(order[0]))
            assert watch.num_launches == 1 and watch.num_programs == 8
        assert orders != [0, 0]


class TestNumerics:
    @staticmethod
    def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
        y = torch.zeros(x.shape, dtype=dtype)
        copy(x, y, x.numel(), x.numel(), programs=triton.cdiv(x.numel(), 16))
        return y

    def test_rounding_to_bfloat16(self) -> None:
        generator = torch.Generator().manual_seed(0)
        bits = torch.randint(-(2**31), 2**31, (4096,), generator=generator, dtype=torch.int64)
        ties = torch.tensor([0x3F808000, 0x3F818000, 0x00008000, 0x00018000, 0x7F7FFFFF])
        x = torch.cat([bits, ties]).to(torch.int32).view(torch.float32)
        specials = [math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-40, -1e-40, 1e-45]
        x = torch.cat([x, torch.tensor(specials)])
        y = self.cast(x, torch.bfloat16)
        assert torch.equal(y.isnan(), x.isnan())
        finite = ~x.isnan()
        assert torch.equal(y[finite].view(torch.int16), x[finite].bfloat16().view(torch.int16))
        assert torch.equal(self.cast(y, torch.float32)[finite], y[finite].float())

    def test_stock_interpreter_cannot_be_launched(self) -> None:
        # It cuts off where it should round: 1 + 3/256 lies between 1 + 2/256 and 1 + 4/256.
        assert self.cast(torch.tensor([1 + 3 / 256]), torch.bfloat16).item() == 1 + 4 / 256

    @pytest.mark.parametrize(
        ("dtype", "most"), [(torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)]
    )
    def test_rounding_to_fp8(self, dtype: torch.dtype, most: float) -> None:
        x = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 20
        large = torch.tensor([most * 4, -most * 4, most * 1.01, math.inf, math.nan])
        y = self.cast(torch.cat([x, large]), dtype).float()
        assert torch.equal(y[:500], x.to(dtype).float())
        assert y[500:504].tolist() == [most, -most, most, most] and y[504].isnan()

    @pytest.mark.parametrize(
        "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn]
    )
    def test_dot(self, dtype: torch.dtype) -> None:
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
        w = torch.randn(32, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
        y = torch.zeros(16, 16)
        with watched() as watch:
            dot_kernel[(1,)](x, w, y, N=16, K=32, PRECISION="ieee")
        torch.testing.assert_close(y.double(), x.double() @ w.double(), atol=1e-5, rtol=1e-6)
        assert watch.dot_flops == 2 * 16 * 32 * 16

    def test_dot_of_float32_is_tf32_by_default(self) -> None:
        x = torch.full((16, 32), 1 + 2**-11)
        w = torch.eye(32)[:, :16].contiguous()
        for precision, expected in (("ieee", 1 + 2**-11), (None, 1.0)):
            y = torch.zeros(16, 16)
            dot_kernel[(1,)](x, w, y, N=16, K=32, PRECISION=precision)
            assert (y == expected).all()

    def test_dot_needs_16_columns(self) -> None:
        x, y = torch.zeros(16, 8), torch.zeros(16, 16)
        with pytest.raises(AssertionError, match="K >= 16"):
            dot_kernel[(1,)](x, x, y, N=16, K=8, PRECISION="ieee")

    @pytest.mark.parametrize("operation", ["add", "sum", "negate", "multiply by a number"])
    def test_bfloat16_is_for_storage(self, operation: str) -> None:
        @triton.jit
        def compute(x_ptr, y_ptr, OPERATION: tl.constexpr, CAST: tl.constexpr):
            o = tl.arange(0, 16)
            x = tl.load(x_ptr + o)
            if CAST:
                x = x.to(tl.float32)
            if OPERATION == "add":
                y = x + x
            elif OPERATION == "sum":
                y = tl.sum(x, 0)
            elif OPERATION == "negate":
                y = -x
            else:
                y = x * 2.0
            tl.store(y_ptr + o, y)

        x, y = torch.ones(16).bfloat16(), torch.zeros(16).bfloat16()
        compute[(1,)](x, y, OPERATION=operation, CAST=True)
        assert y[0] == {"add": 2, "sum": 16, "negate": -1, "multiply by a number": 2}[operation]
        with pytest.raises(KernelBug, match="cast to float32 first"):
            compute[(1,)](x, y, OPERATION=operation, CAST=False)

    def test_comparing_and_choosing_bfloat16(self) -> None:
        @triton.jit
        def clamp(x_ptr, y_ptr):
            o = tl.arange(0, 16)
            x = tl.load(x_ptr + o)
            tl.store(y_ptr + o, tl.where(x > tl.load(x_ptr), tl.maximum(x, tl.load(x_ptr + 3)), x))

        x, y = torch.randn(16).bfloat16(), torch.zeros(16).bfloat16()
        clamp[(1,)](x, y)
        assert torch.equal(y, torch.where(x > x[0], x.maximum(x[3]), x))

    def test_maximum_passes_over_nan(self) -> None:
        @triton.jit
        def largest(x_ptr, y_ptr):
            x = tl.load(x_ptr + tl.arange(0, 16))
            tl.store(y_ptr, tl.max(x, 0))
            tl.store(y_ptr + 1, tl.sum(tl.maximum(x, -9.0), 0))

        x, y = torch.full((16,), torch.nan), torch.zeros(2)
        x[3] = -7.0
        largest[(1,)](x, y)
        assert y.tolist() == [-7, -7 - 15 * 9]


@triton.jit
def dot_kernel(x_ptr, w_ptr, y_ptr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    o_m, o_n, o_k = tl.arange(0, 16), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(x_ptr + o_m[:, None] * K + o_k[None, :])
    w = tl.load(w_ptr + o_k[:, None] * N + o_n[None, :])
    y = tl.dot(x, w, input_precision=PRECISION)
    tl.store(y_ptr + o_m[:, None] * N + o_n[None, :], y)


@triton.jit
def _compose(scale_a, shift_a, scale_b, shift_b):
    return scale_a * scale_b, shift_a * scale_b + shift_b


@triton.jit
def _multiply(a, b):
    return a * b


class TestLanguage:
    def test_reductions_and_scans(self) -> None:
        @triton.jit
        def reduce(x_ptr, rows_ptr, scan_ptr, sorted_ptr):
            o_m, o_n = tl.arange(0, 8), tl.arange(0, 16)
            o = o_m[:, None] * 16 + o_n[None, :]
            x = tl.load(x_ptr + o)
            tl.store(rows_ptr + o_m, tl.sum(x, 1))
            tl.store(rows_ptr + 8 + o_m, tl.min(x, 1))
            tl.store(rows_ptr + 16 + o_m, tl.argmax(x, 1).to(tl.float32))
            tl.store(rows_ptr + 24 + o_m, tl.reduce(x, 1, _multiply))
            _, largest = tl.max(x, 1, return_indices=True)
            tl.store(rows_ptr + 32 + o_m, largest.to(tl.float32))
            _, total = tl.reduce((x, x), 1, _compose)
            tl.store(rows_ptr + 40 + o_m, total)
            _, composed = tl.associative_scan((x, x), 1, _compose)
            tl.store(scan_ptr + o, composed)
            tl.store(scan_ptr + 128 + o, tl.cumsum(x, 1))
            tl.store(scan_ptr + 256 + o, tl.associative_scan(x, 0, _multiply, reverse=True))
            tl.store(sorted_ptr + o, tl.sort(x, 1, descending=True))

        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
        rows, scans, in_order = torch.zeros(6, 8), torch.zeros(3, 8, 16), torch.zeros(8, 16)
        with watched():
            reduce[(1,)](x, rows, scans, in_order)
        composed = torch.zeros(8, 16)
        for n in range(16):
            composed[:, n] = x[:, n] * (1 + composed[:, n - 1])
        places = x.argmax(1).float()
        expected = [x.sum(1), x.amin(1), places, x.prod(1), places, composed[:, -1]]
        torch.testing.assert_close(rows, torch.stack(expected))
        torch.testing.assert_close(scans[0], composed)
        torch.testing.assert_close(scans[1], x.cumsum(1))
        torch.testing.assert_close(scans[2], x.flip(0).cumprod(0).flip(0))
        assert torch.equal(in_order, x.sort(1, descending=True).values)

    def test_histogram_and_gather(self) -> None:
        @triton.jit
        def count(x_ptr, counts_ptr, picked_ptr):
            o = tl.arange(0, 16)
            x = tl.load(x_ptr + o)
            tl.store(counts_ptr + tl.arange(0, 8), tl.histogram(x, 8, mask=o < 14))
            tl.store(picked_ptr + o, tl.gather(x, 15 - o, 0))

        x = torch.randint(0, 12, (16,), dtype=torch.int32)
        counts, picked = torch.zeros(8, dtype=torch.int32), torch.zeros(16, dtype=torch.int32)
        with watched():
            count[(1,)](x, counts, picked)
        assert counts.tolist() == [(x[:14] == i).sum().item() for i in range(8)]
        assert torch.equal(picked, x.flip(0))

    def test_int32_overflow(self) -> None:
        @triton.jit
        def far(x_ptr, y_ptr, i_page, stride, WIDE: tl.constexpr):
            if WIDE:
                i_page = i_page.to(tl.int64)
            o_page = i_page * stride
            tl.store(y_ptr, o_page)

        y = torch.zeros(1, dtype=torch.int64)
        with watched(int_overflow=True):
            far[(1,)](y, y, 1 << 20, 1 << 12, WIDE=True)
            assert y.item() == 1 << 32
            with pytest.raises(KernelBug, match="int32 overflow detected for operation mul"):
                far[(1,)](y, y, 1 << 20, 1 << 12, WIDE=False)
        with watched():
            far[(1,)](y, y, 1 << 20, 1 << 12, WIDE=False)
            assert y.item() == 0

    def test_loop_variables_are_32_bits_wide(self) -> None:
        @triton.jit
        def walk(y_ptr, n, WIDE: tl.constexpr):
            for i in range(n, n + 1):
                if WIDE:
                    o = i.to(tl.int64) * 65536
                else:
                    o = i * 65536
                tl.store(y_ptr, o)

        y = torch.zeros(1, dtype=torch.int64)
        with watched(int_overflow=True):
            walk[(1,)](y, 65536, WIDE=True)
            assert y.item() == 1 << 32
            with pytest.raises(KernelBug, match="overflow"):
                walk[(1,)](y, 65536, WIDE=False)

    def test_range_elsewhere_is_untouched(self) -> None:
        assert list(range(3)) == [0, 1, 2] and "np" not in globals()

    @pytest.mark.parametrize(
        ("promise", "first", "is_kept"),
        [
            ("multiple", 32, True),
            ("multiple", 8, False),
            ("contiguous", 8, True),
            ("contiguous", 32, True),
            ("contiguous", 40, False),
        ],
    )
    def test_promises(self, promise: str, first: int, is_kept: bool) -> None:
        @triton.jit
        def promising(x_ptr, first, PROMISE: tl.constexpr):
            o = (first + tl.arange(0, 32)) % 48
            if PROMISE == "multiple":
                o = tl.multiple_of(o, 16)
            else:
                o = tl.max_contiguous(o, 16)
            tl.store(x_ptr + o, 0.0)

        if is_kept:
            promising[(1,)](torch.zeros(48), first, PROMISE=promise)
        else:
            with pytest.raises(KernelBug, match="does not hold"):
                promising[(1,)](torch.zeros(48), first, PROMISE=promise)

    def test_numbers_are_scalars_of_a_gpu(self) -> None:
        @triton.jit
        def fill(y_ptr, factor, is_negative):
            y = factor.to(tl.float32) * 3.0
            tl.store(y_ptr, tl.where(is_negative, -y, y))

        y = torch.zeros(1, dtype=torch.float64)
        with watched():
            fill[(1,)](y, 0.1, True)
        assert y.item() == -(torch.tensor(0.1) * 3.0).item()

    def test_launch_arguments(self) -> None:
        x = torch.zeros(16)
        with pytest.raises(KernelBug, match="no GPU takes a grid"):
            copy_kernel[(1, 65536)](x, x, 16, 16, BLOCK=16)
        with pytest.raises(KernelBug, match="num_warp"):
            copy_kernel[(1,)](x, x, 16, 16, BLOCK=16, num_warp=4)
        copy_kernel[lambda meta: (16 // meta["BLOCK"],)](x, x, 16, 16, BLOCK=16, num_warps=4)


class TestTraffic:
    def test_bytes(self) -> None:
        x = torch.randn(100).bfloat16()
        with watched({"the input": x}) as watch:
            y, z = torch.empty(100), torch.empty(100)
            copy(x, y, 100, 100, programs=7)
            copy(y, z, 100, 100, programs=7)
        assert watch.by_name["the input"].loaded == 200
        assert (watch.by_name["y"].loaded, watch.by_name["y"].stored) == (400, 400)
        assert [launch.bytes_loaded for launch in watch.launches] == [200, 400]
        assert [launch.grid for launch in watch.launches] == [(7, 1, 1)] * 2
        assert (watch.bytes_loaded, watch.bytes_stored) == (600, 800)
        assert watch.minimum_bytes == 200 + 400  # x once, z once; y is only passed on
        assert watch.traffic_ratio == 1400 / 600

    def test_update_in_place(self) -> None:
        x = torch.randn(32)
        with watched() as watch:
            copy(x, x, 32, 32)
        assert watch.minimum_bytes == 2 * 128

    def test_same_names_are_told_apart(self) -> None:
        with watched() as watch:
            copy(torch.zeros(16), torch.zeros(16), 16, 16, programs=1)
            copy(torch.zeros(16), torch.zeros(16), 8, 8, programs=1)
        assert watch.by_name["x"].loaded == 64 and watch.by_name["x_2"].loaded == 32

    def test_blocks_read_again_and_again(self) -> None:
        x, w = torch.randn(16, 64), torch.randn(64, 32)
        with watched({"x": x, "w": w}) as watch:
            y = torch.empty(16, 32)
            matmul_kernel[(2,)](x, w, y, N=32, K=64, BLOCK_N=16, BLOCK_K=16)
        torch.testing.assert_close(y, x @ w)
        assert watch.by_name["x"].loaded == 2 * x.nbytes  # once for each block of columns
        assert watch.by_name["w"].loaded == w.nbytes
        assert watch.dot_flops == 2 * 16 * 64 * 32


@triton.jit
def matmul_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    o_m = tl.arange(0, 16)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.zeros((16, BLOCK_N), tl.float32)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + o_m[:, None] * K + o_k[None, :])
        w = tl.load(w_ptr + o_k[:, None] * N + o_n[None, :])
        y = tl.dot(x, w, y, input_precision="ieee")
    tl.store(y_ptr + o_m[:, None] * N + o_n[None, :], y)


class TestMutation:
    @staticmethod
    def matmul(module: ModuleType | Any) -> Tensor:
        x, w = torch.ones(16, 32), torch.ones(32, 32)
        with watched():
            y = torch.empty(16, 32)
            module.matmul_kernel[(2,)](x, w, y, N=32, K=32, BLOCK_N=16, BLOCK_K=16)
        return y

    def test_only_the_mutant_has_the_bug(self) -> None:
        this = sys.modules[__name__]
        with mutated(this, "tl.zeros((16, BLOCK_N)", "1 + tl.zeros((16, BLOCK_N)") as mutant:
            assert (self.matmul(mutant) == 33).all()
            assert (self.matmul(this) == 32).all()
        with (
            mutated(this, "tl.program_id(0) * BLOCK_N", "tl.program_id(0)") as mutant,
            pytest.raises(KernelBug, match="two programs write"),
        ):
            self.matmul(mutant)

    def test_what_is_replaced_must_be_there(self) -> None:
        with pytest.raises(AssertionError), mutated(sys.modules[__name__], "not" + " here", ""):
            pass
