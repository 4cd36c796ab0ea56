r"""Squared per-example weight gradients on a GPU: the square in the epilogue of the matrix product.

For a linear layer, $\sum_u \big(\sum_t g_{ut} x_{ut}^\top\big)^2$ needs each example's product $G_u$ (O, I) only long enough to
square it. `products.py` writes every $G_u$ to memory and reads it back. Here one program owns a tile of the weight, keeps $G_u$
of that tile and the running sum of squares in registers, and touches the weight's sum once, whatever the number of examples.

Costs, for U examples of T positions and a weight of O × I, inputs of s bytes per number:

| | FLOP on tensor cores | bytes of main memory |
|---|---|---|
| plain backward, x and g once | 2 U T O I | s U T (O + I) + s O I |
| this kernel | the same | s U T (O + I) + 8 O I: the sum is read and written once, fp32 |
| $G_u$ and the sum in memory | the same | s U T (O + I) + 16 U O I: both are written and read for every u |

On an H200 (989 TFLOP/s dense bf16, 4.8 TB/s: 206 FLOP per byte) and O = I = D in bf16 that is U T D / (2 U T + 4 D) FLOP per
byte, above 206 from U T ≈ 1000 positions on for D = 2304: eight examples of 126 tokens are bound by arithmetic. Through
memory each weight moves 16 bytes per 2 T FLOP, and T must reach 1650 (inputs not counted) before that stops mattering, whatever
U. The square costs 2 fp32 FLOP per weight and example beside 2 T on tensor cores; at 67 TFLOP/s it adds 15 / T to the time
where nothing hides it (3 % at T = 512, 12 % at T = 128). All of this is arithmetic from datasheets: **this kernel has NOT YET
RUN ON A GPU**, and neither its speed nor the choice of tiles was measured. Its results are tested through Triton's interpreter
(`tests/unit/test_fisher_triton.py`), and it is compiled for compute capability 9.0.

Two fp32 tiles live in registers where a plain product has one, so a tile holds at most 128 × 128 weights: compiled by Triton
3.7.1, 188 to 206 of 255 registers at 256 threads. The 128 × 256 of the fastest plain products spills, with 256 threads and with
512. Smaller tiles read x and g more often from the L2 cache (64 FLOP per byte), which may be what limits the kernel in the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform; nothing else needs it
    triton = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def available() -> bool:
    """Whether there is a CUDA device (ROCm's not: the tiles are Hopper's) and Triton to compile for it."""
    return triton is not None and torch.version.cuda is not None and torch.cuda.is_available()


def add_squared_products(
    x: Tensor,  # (U, T, I) float32, bfloat16 or float16, any strides
    g: Tensor,  # (U, T, O) likewise
    out: Tensor,  # (O, I) float32
    lengths: Tensor | Sequence[int] | None = None,  # (U) positions that are not padding, the first ones of each row
) -> None:
    r"""
    `out[o, i] += Σ_u (Σ_t g[u, t, o] · x[u, t, i])²` in one pass, without scratch. The definition is
    [`~hf_ewc.fisher.products.add_squared_products_reference`].

    Products of 16-bit inputs are exact and summed in float32; float32 inputs are multiplied in full precision, not TF32. With
    T = 1 (granularity `token`) each $G_u$ has rank one, $(g x^\top)^2 = g^2 (x^2)^\top$, and all units become one product of
    squares, in float32. The first call for a shape tries several tile sizes (`CONFIGS`) and needs a copy of `out` for that; the
    last bits of the result may depend on the winner.

    Args:
        lengths (`Tensor` or sequence of `int`, *optional*):
            Positions from `lengths[u]` on are not read, so they cost nothing and may hold anything. A tensor on the device of
            `x` spares a copy per call.

    Raises:
        `ValueError`, `TypeError`: shapes, dtypes or devices that do not belong together; `out` is untouched.
        `RuntimeError`: there is no Triton.
    """
    if triton is None:
        raise RuntimeError("Triton is not installed; `pip install triton`, or use `products.add_squared_products`.")
    _check(x, g, out)
    units, positions, width = x.shape
    if lengths is not None:
        lengths = torch.as_tensor(lengths, dtype=torch.int32, device=x.device).contiguous()
        if lengths.shape != (units,):
            raise ValueError(f"lengths must be ({units},), one per row of x, not {tuple(lengths.shape)}.")
    if x.numel() == 0 or g.numel() == 0:
        return
    if x.dtype != g.dtype:
        x, g = (tensor.to(torch.promote_types(x.dtype, g.dtype)) for tensor in (x, g))
    rank_one = positions == 1
    if rank_one:  # the units become the positions of one product
        x, g = x.transpose(0, 1), g.transpose(0, 1)
    launch, extra = _launcher(x.dtype)
    heights = g.shape[2]
    with torch.cuda.device_of(out):  # Triton launches on the current device
        launch[lambda meta: (triton.cdiv(heights, meta["BLOCK_O"]) * triton.cdiv(width, meta["BLOCK_I"]),)](
            *(x, g, out, x if lengths is None else lengths),
            *(x.shape[0], x.shape[1], heights, width),
            *(*x.stride(), *g.stride(), *out.stride()),
            HAS_LENGTHS=lengths is not None,
            RANK_ONE=rank_one,
            **extra,
        )


def _check(x: Tensor, g: Tensor, out: Tensor) -> None:
    if x.dim() != 3 or g.dim() != 3 or x.shape[:2] != g.shape[:2]:
        raise ValueError(f"x (U, T, I) and g (U, T, O) must share U and T; they are {tuple(x.shape)} and {tuple(g.shape)}.")
    if out.shape != (g.shape[2], x.shape[2]):
        raise ValueError(f"out must be (O, I) = {(g.shape[2], x.shape[2])}, not {tuple(out.shape)}.")
    if out.dtype != torch.float32:
        raise TypeError(f"out must be float32, in which small squares and long sums survive, not {out.dtype}.")
    if strangers := {tensor.dtype for tensor in (x, g)} - set(DTYPES):
        raise TypeError(f"x and g must be float32, bfloat16 or float16, not {', '.join(map(str, strangers))}.")
    if not x.device == g.device == out.device:
        raise ValueError(f"x, g and out must lie on one device; they are on {x.device}, {g.device} and {out.device}.")


def _launcher(dtype: torch.dtype) -> tuple[Any, dict[str, int]]:
    """The autotuned kernel; under Triton's interpreter, which cannot time anything, the plain one with the smallest tiles."""
    if isinstance(squared_products_kernel, triton.runtime.JITFunction):
        return _tuned, {"WIDEN": False}
    # The interpreter multiplies the bit patterns of bfloat16 (triton-lang/triton#11584, Triton 3.7): until that is mended, it
    # gets float32 operands, which hold the same numbers.
    smallest = {"BLOCK_O": 16, "BLOCK_I": 16, "BLOCK_T": 16, "GROUP_O": 2}
    return squared_products_kernel, {"WIDEN": dtype == torch.bfloat16, **smallest}


if triton is not None:

    @triton.jit(do_not_specialize=["units", "positions"])  # they change with every batch, and must not compile it anew
    def squared_products_kernel(
        x,
        g,
        out,
        lengths,
        units,
        positions,
        heights,  # O
        widths,  # I
        x_u,  # strides, in elements
        x_t,
        x_i,
        g_u,
        g_t,
        g_o,
        out_o,
        out_i,
        HAS_LENGTHS: tl.constexpr,
        RANK_ONE: tl.constexpr,
        WIDEN: tl.constexpr,
        BLOCK_O: tl.constexpr,
        BLOCK_I: tl.constexpr,
        BLOCK_T: tl.constexpr,
        GROUP_O: tl.constexpr,
    ):
        # programs that run at the same time share rows of g and columns of x in the L2 cache: GROUP_O tiles down, then right
        tiles_o, tiles_i = tl.cdiv(heights, BLOCK_O), tl.cdiv(widths, BLOCK_I)
        program = tl.program_id(0)
        first = program // (GROUP_O * tiles_i) * GROUP_O
        group = tl.minimum(tiles_o - first, GROUP_O)
        tile_o = first + program % (GROUP_O * tiles_i) % group
        tile_i = program % (GROUP_O * tiles_i) // group

        rows = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
        columns = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
        t = tl.arange(0, BLOCK_T)
        # Beyond the edge the first rows and columns are read again, which needs no mask, and nothing of it is written. Offsets
        # are int64, as a head of 262,144 words × 8,192 passes 2³¹.
        g_tile = g + (rows % heights).to(tl.int64)[:, None] * g_o + t[None, :] * g_t  # (BLOCK_O, BLOCK_T)
        x_tile = x + t[:, None] * x_t + (columns % widths).to(tl.int64)[None, :] * x_i  # (BLOCK_T, BLOCK_I)

        total = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
        for u in range(0, units):
            length = positions
            if HAS_LENGTHS and not RANK_ONE:
                length = tl.minimum(tl.load(lengths + u), positions)
            product = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)  # G_u, this tile of it
            g_part, x_part = g_tile, x_tile
            for start in range(0, length, BLOCK_T):
                inside = start + t < length
                if HAS_LENGTHS and RANK_ONE:
                    inside = inside & (tl.load(lengths + start + t, mask=inside, other=0) > 0)
                left = tl.load(g_part, mask=inside[None, :], other=0.0)
                right = tl.load(x_part, mask=inside[:, None], other=0.0)
                if RANK_ONE or WIDEN:
                    left, right = left.to(tl.float32), right.to(tl.float32)
                if RANK_ONE:
                    left, right = left * left, right * right
                product = tl.dot(left, right, product, input_precision="ieee")
                g_part += BLOCK_T * g_t
                x_part += BLOCK_T * x_t
            if RANK_ONE:
                total += product
            else:
                total += product * product
            g_tile += g_u
            x_tile += x_u

        where = out + rows.to(tl.int64)[:, None] * out_o + columns.to(tl.int64)[None, :] * out_i
        inside = (rows < heights)[:, None] & (columns < widths)[None, :]
        tl.store(where, tl.load(where, mask=inside, other=0.0) + total, mask=inside)

    # For an H100 or H200 and 16-bit inputs: the largest tiles that leave room for both accumulators, one program or several
    # per multiprocessor (a second one can hide the squares of the first). Compiled for compute capability 9.0, none spills for
    # 16-bit inputs; float32, which runs on the plain cores, wants BLOCK_T = 32. NOT YET RUN ON A GPU by us.
    CONFIGS = [
        triton.Config({"BLOCK_O": o, "BLOCK_I": i, "BLOCK_T": t, "GROUP_O": 8}, num_warps=warps, num_stages=stages)
        for o, i, t, warps, stages in (
            (128, 128, 64, 8, 4),
            (128, 128, 64, 8, 3),
            (128, 128, 32, 8, 4),
            (128, 64, 64, 4, 4),
            (64, 128, 64, 4, 4),
            (128, 64, 32, 4, 3),
            (64, 64, 64, 4, 4),
            (64, 64, 32, 4, 3),
        )
    ]
    # tuning runs the kernel many times over: `out` must be as before afterwards. The dtypes are part of the key by themselves.
    _tuned = triton.autotune(configs=CONFIGS, key=["heights", "widths", "RANK_ONE"], restore_value=["out"])(
        squared_products_kernel
    )
