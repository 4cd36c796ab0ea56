"""
`log8`: 8.4 bits per value, with a scale of its own for every 128 of them.

A Fisher spans 11 to 22 decades as a whole, but seldom more than ten within a block of 128 neighbours. So each block of the
last axis keeps its maximum M exactly (float32) and its span s = log₂(M / least positive value) (float16), and each value one
byte q: q = 0 is exactly 0, else

    F = M · 2^((q − 255) / 254 · s),        q = 255 − round(254 / s · log₂(M / F)).

Neighbouring codes stand in the ratio 2^(s/254), so that no relative error exceeds 2^(s/508) − 1: 3.5 % where a block spans 25
binary orders, 15 % at 100. Nothing positive becomes zero, and nothing zero positive. Rounding to the nearest code in the
logarithm is biased by h²/24, h = s·ln 2/254 being the step: upwards in the mean of F′/F (whitened drift), downwards in
ΣF′ ÷ ΣF (equal drift). The two pull in opposite directions, so that no other rounding lowers both; at s = 25 each is 2e-4.

Blocks never cross rows: any slice of leading dimensions is decoded from its own bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 128
STEPS = 254  # from code 1 to code 255
MAX_SPAN = 278.0  # float32 spans 277 binary orders, from 2⁻¹⁴⁹ to just below 2¹²⁸
CHUNK = 1 << 17
"""Values per pass: 1 MiB of float64 scratch, whatever the tensor's size. A multiple of `BLOCK`."""

_SLACK = 2.0**-20  # less than this is float32's own rounding; without it, storing a stored Fisher again would widen its spans


def num_blocks(columns: int) -> int:
    return -(-columns // BLOCK)


def encode(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    Codes, block maxima and block spans of a tensor.

    Args:
        values (`torch.Tensor`): float32 of shape (…, n), finite and ≥ 0. A scalar counts as n = 1.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: uint8 (…, n), and float32 and float16, both (…, ⌈n/128⌉).
    """
    rows = _as_rows(values)
    columns = rows.shape[1]
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=values.device)
    scale = torch.empty((len(rows), num_blocks(columns)), device=values.device)
    span = torch.empty_like(scale, dtype=torch.float16)
    for row, column, block in _windows(*rows.shape):
        part = _as_blocks(rows[row, column])  # (r, b, 128)
        top = part.amax(-1)
        least = torch.where(part > 0, part, torch.inf).amin(-1).minimum(top)  # a block of zeros: 0
        # float64, as the ratio of two float32 can be below what float32 holds
        orders = torch.where(top > 0, top.double().log2() - least.double().log2(), 0.0)
        scale[row, block], span[row, block] = top, (half := _half_at_least(orders))
        per_order = torch.where(half > 0, STEPS / half.double(), 0.0)
        down = top.double().log2()[..., None] - part.double().log2_()  # inf or nan where the value is 0
        down.mul_(per_order[..., None]).round_().clamp_(max=STEPS)
        coded = down.neg_().add_(255).masked_fill_(part == 0, 0)
        codes[row, column] = coded.flatten(1)[:, : column.stop - column.start].to(torch.uint8)
    blocks = (*values.shape[:-1], scale.shape[1])
    return codes.view(values.shape), scale.view(blocks), span.view(blocks)


def decode(codes: Tensor, scale: Tensor, span: Tensor) -> Tensor:
    """
    Values (float32, as `codes` in shape) of what [`encode`] returned, or of the same rows and whole blocks of all three.

    In float64, which holds M · 2^(−s) for every M and s, and in which `exp2`'s last bit, that may differ between the vectorised
    and the plain loop of a kernel, does not show after rounding to float32: a slice equals that part of the whole.
    """
    rows = _as_rows(codes)
    out = torch.empty(rows.shape, device=codes.device)
    scale, span = (each.reshape(len(rows), num_blocks(rows.shape[1])) for each in (scale, span))
    for row, column, block in _windows(*rows.shape):
        part = _as_blocks(rows[row, column])
        value = part.double().sub_(255).mul_(span[row, block, None].double() / STEPS)
        value = value.exp2_().mul_(scale[row, block, None]).masked_fill_(part == 0, 0)
        out[row, column] = value.flatten(1)[:, : column.stop - column.start]
    return out.view(codes.shape)


def reference(block: list[float]) -> tuple[list[int], float, float, list[float]]:
    """Codes, maximum, span and decoded values (not yet rounded to float32) of one block, by the definition."""
    top, positive = max(block), [value for value in block if value > 0]
    orders = math.log2(top) - math.log2(min(positive)) if positive else 0.0
    bits, half = struct.pack("<e", orders), struct.unpack("<e", struct.pack("<e", orders))[0]
    if half < orders - _SLACK:  # the next larger float16
        half = struct.unpack("<e", struct.pack("<H", struct.unpack("<H", bits)[0] + 1))[0]
    steps = STEPS / half if half else 0.0
    codes = [255 - min(STEPS, round(steps * (math.log2(top) - math.log2(v)))) if v else 0 for v in block]
    return codes, top, half, [top * 2.0 ** ((q - 255) / STEPS * half) if q else 0.0 for q in codes]


def _half_at_least(orders: Tensor) -> Tensor:
    """The least float16 that is not below `orders` (float64, 0 to 277)."""
    half = orders.half()
    short = half.double() < orders - _SLACK
    return torch.where(short, (half.view(torch.int16) + 1).view(torch.float16), half)


def _as_rows(tensor: Tensor) -> Tensor:
    columns = tensor.shape[-1] if tensor.ndim else 1
    return tensor.reshape(math.prod(tensor.shape[:-1]), columns)


def _as_blocks(part: Tensor) -> Tensor:
    """(r, c) → (r, blocks, 128), the last block filled up with zeros; a single shorter block stays as it is."""
    missing = -part.shape[1] % BLOCK if part.shape[1] > BLOCK else 0
    return (pad(part, (0, missing)) if missing else part).unflatten(1, (num_blocks(part.shape[1]), -1))


def _windows(rows: int, columns: int) -> Iterator[tuple[slice, slice, slice]]:
    """Rows, columns and blocks of pieces of at most [`CHUNK`] values; a row longer than that is cut between two blocks."""
    width = min(columns, CHUNK)
    height = max(1, CHUNK // max(1, width))
    for top in range(0, rows, height):
        for left in range(0, columns, CHUNK):
            right = min(left + CHUNK, columns)
            yield slice(top, min(top + height, rows)), slice(left, right), slice(left // BLOCK, num_blocks(right))
