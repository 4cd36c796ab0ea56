r"""The innermost sum of the batched path: squared per-example weight gradients of one linear layer.

Example u's gradient of y = x Wᵀ is $G_u = \sum_t g_{ut} x_{ut}^\top$ (g = ∂loss/∂y), an ordinary matrix product that a normal
backward pass computes once for the whole batch. Here each G_u is squared before the sum over u:
U products of T terms instead of one of U·T terms, hence the same FLOPs, and scratch for one block of G_u instead of all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import triton_kernel

# A block of G_u is written by the product and read by the square: it should still lie in the cache by then, and be large enough
# for the product. Of 1 to 64 MiB, 8 and 16 were the fastest for matrices from 768 × 768 to 32768 × 768 (two cores of a Xeon).
CPU_BLOCK = 8 << 20


def add_squared_products(
    x: Tensor,  # (U, T, I)
    g: Tensor,  # (U, T, O)
    total: Tensor,  # (O, I) float32
    lengths: Sequence[int] | None = None,  # (U) positions that are not padding; None: all
    scratch: int = 256 << 20,  # bytes
) -> None:
    """
    `total[o, i] += Σ_u (Σ_t g[u, t, o] · x[u, t, i])²`, in float32 whatever the inputs' dtype.

    On a GPU, the Triton kernel keeps G_u in registers; see `triton_kernel`. Here a block of its rows at a time is in `scratch`.
    """
    units, positions, width = x.shape
    if units == 0 or positions == 0:
        return
    if x.device.type == "cuda" and triton_kernel.available():
        triton_kernel.add_squared_products(x, g, total, lengths)
        return
    x, g = x.float(), g.float()
    if positions == 1:  # G_u has rank one: (g xᵀ)² = g² (x²)ᵀ, one product for all units
        total.addmm_(g[:, 0].square().t(), x[:, 0].square())
        return
    limit = min(scratch, CPU_BLOCK) if x.device.type == "cpu" else scratch
    rows = max(1, min(total.shape[0], limit // (4 * width)))
    block = torch.empty(rows, width, device=x.device)
    spans = [positions] * units if lengths is None else lengths
    for start in range(0, total.shape[0], rows):
        target = total[start : start + rows]
        part = block[: len(target)]
        for u, span in enumerate(spans):
            torch.mm(g[u, :span, start : start + rows].t(), x[u, :span], out=part)
            target.addcmul_(part, part)


def add_squared_products_reference(x: Tensor, g: Tensor, total: Tensor) -> None:
    """The definition, with every G_u in memory at once."""
    total += torch.einsum("uto,uti->uoi", g.float(), x.float()).square().sum(0)
