"""How values are written: `float32` exactly, `bfloat16` (the default) in half the space.

Not on offer: fp16 and 8-bit formats with one scale per tensor. A Fisher spans 11 to 22 decades, and they turn most of
it into zeros (fp16: 80 to 99 %), which unprotects those weights while every error norm still looks fine. bfloat16 has
float32's range.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ..errors import ConfigError
from .files import Index, Reader


class Codec:
    """
    One stored tensor per parameter, in one dtype.

    A codec that needs more (scales per block, say) overrides all three methods: `layout` announces what is stored for
    a parameter, `encode` makes it, and `decode` gets it back, whole or in part, through a function that reads any
    part of any stored tensor.

    Args:
        name (`str`): as in `fisher_config.json`.
        dtype (`torch.dtype`): of the stored tensor.
        code (`str`): the same in safetensors' words.
    """

    def __init__(self, name: str, dtype: torch.dtype, code: str) -> None:
        self.name, self.dtype, self.code = name, dtype, code

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
        if self.dtype == torch.float32:
            return {name: tensor.contiguous()}
        info = torch.finfo(self.dtype)
        inside = tensor.clamp(min=info.smallest_normal, max=info.max)
        return {name: inside.mul_(tensor > 0).to(self.dtype).contiguous()}

    def decode(self, name: str, read: Reader, index: Index | None = None) -> Tensor:
        """Values of `name` (or of its part `index`) as float32."""
        return read(name, index).float()


ITEM_BYTES = {"F32": 4, "BF16": 2}

CODECS = {
    "float32": Codec("float32", torch.float32, "F32"),
    "bfloat16": Codec("bfloat16", torch.bfloat16, "BF16"),
}


def get_codec(name: str) -> Codec:
    if name not in CODECS:
        raise ConfigError(
            f"`codec: {name}` is not one of {', '.join(CODECS)}. float16 and per-tensor 8-bit formats are left out on purpose: "
            "they store most of a Fisher as zeros."
        )
    return CODECS[name]
