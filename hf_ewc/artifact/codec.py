"""How values are written: `float32` exactly, `bfloat16` (the default) in half the space, `log8` in about a quarter.

Not on offer: fp16 and 8-bit formats with one scale per tensor. A Fisher spans 11 to 22 decades, and they turn most of
it into zeros (fp16: 80 to 99 %), which unprotects those weights while every error norm still looks fine. bfloat16 has
float32's range, and log8 a scale for every 128 values.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ..errors import ConfigError
from . import log8
from .files import Index, Reader
from .summary import range_problem


class Codec:
    """
    One stored tensor per parameter, in one dtype.

    A codec that needs more ([`Log8`]) overrides all four methods: `layout` announces what is stored for a parameter,
    `encode` makes it, `decode` gets it back, whole or in part, through a function that reads any part of any stored
    tensor, and `problem` tells what keeps stored values from being a Fisher.

    Args:
        name (`str`): as in `fisher_config.json`.
        dtype (`torch.dtype`): of the stored tensor.
        code (`str`): the same in safetensors' words.
    """

    block: int | None = None
    """Values that share a scale."""

    def __init__(self, name: str, dtype: torch.dtype, code: str) -> None:
        self.name, self.dtype, self.code = name, dtype, code

    @property
    def exact(self) -> bool:
        return self.dtype == torch.float32

    def layout(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What is stored for parameter `name`: key → (safetensors dtype, shape)."""
        return {name: (self.code, shape)}

    def size(self, name: str, shape: tuple[int, ...]) -> int:
        """Bytes that parameter `name` takes on disk."""
        return sum(ITEM_BYTES[code] * prod(stored) for code, stored in self.layout(name, shape).values())

    def encode(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """
        Tensors to store for `tensor` (float32, finite, ≥ 0).

        A positive value never becomes zero and a finite one never infinite: both would change what is protected, not
        just how much.
        """
        if self.exact:
            return {name: tensor.contiguous()}
        info = torch.finfo(self.dtype)
        inside = tensor.clamp(min=info.smallest_normal, max=info.max)
        return {name: inside.mul_(tensor > 0).to(self.dtype).contiguous()}

    def decode(self, name: str, read: Reader, index: Index | None = None) -> Tensor:
        """Values of `name` (or of its part `index`) as float32."""
        return read(name, index).float()

    def problem(self, name: str, read: Reader) -> str | None:
        """What keeps the stored values of `name` from being a Fisher (finite, ≥ 0), or `None`."""
        found = range_problem(read(name, None))  # as stored: bfloat16 holds what float32 would
        return f"{name} {found}" if found else None


class Log8(Codec):
    """One byte per value, beside the maximum and the span of every 128 of them; see [`log8`]."""

    block = log8.BLOCK

    def __init__(self) -> None:
        super().__init__("log8", torch.uint8, "U8")

    @staticmethod
    def keys(name: str) -> tuple[str, str, str]:
        """Where codes, block maxima and block spans of parameter `name` are stored."""
        return name, f"{name}::scale", f"{name}::span"

    def layout(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        blocks = (*shape[:-1], log8.num_blocks(shape[-1] if shape else 1))
        codes, scale, span = self.keys(name)
        return {codes: (self.code, shape), scale: ("F32", blocks), span: ("F16", blocks)}

    def encode(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.keys(name), log8.encode(tensor), strict=True))

    def decode(self, name: str, read: Reader, index: Index | None = None) -> Tensor:
        if index:
            # nothing is read but a shape: the parameter's number of dimensions, and the length of the last
            empty = read(name, (slice(0, 0),) * max(1, len(index) - 1))
            if empty.ndim == len(index):
                return self._decode_columns(name, read, index, empty.shape[-1])
        return log8.decode(*(read(key, index) for key in self.keys(name)))

    def _decode_columns(self, name: str, read: Reader, index: Index, columns: int) -> Tensor:
        """A slice of the last axis is decoded from the blocks that it touches."""
        lead, last = index[:-1], index[-1]
        if not lead:  # a vector: its length is not known, and it is small
            return self.decode(name, read)[last].contiguous()
        start, stop, step = last.indices(columns)
        stop = max(start, stop)  # reversed bounds select nothing
        first, end = start // log8.BLOCK, log8.num_blocks(stop)
        inside = slice(first * log8.BLOCK, min(end * log8.BLOCK, columns))
        codes, scale, span = self.keys(name)
        blocks = (*lead, slice(first, end))
        values = log8.decode(read(codes, (*lead, inside)), read(scale, blocks), read(span, blocks))
        return values[..., start - inside.start : stop - inside.start : step].contiguous()

    def problem(self, name: str, read: Reader) -> str | None:
        """Every code has a meaning, so maxima and spans decide."""
        _, scale, span = self.keys(name)
        if found := range_problem(read(scale, None)):
            return f"{scale} {found}"
        spans = read(span, None)
        wrong = int((~((spans >= 0) & (spans <= log8.MAX_SPAN))).sum())  # NaN is wrong, too
        if wrong:
            return f"{span} has {wrong} of {spans.numel()} values outside 0 to {log8.MAX_SPAN:g}, all that float32 spans"
        return None


ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1}

CODECS = {
    "float32": Codec("float32", torch.float32, "F32"),
    "bfloat16": Codec("bfloat16", torch.bfloat16, "BF16"),
    "log8": Log8(),
}


def get_codec(name: str) -> Codec:
    if name not in CODECS:
        raise ConfigError(
            f"`codec: {name}` is not one of {', '.join(CODECS)}. float16 and per-tensor 8-bit formats are left out on purpose: "
            "they store most of a Fisher as zeros."
        )
    return CODECS[name]
