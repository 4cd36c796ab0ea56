"""The only file that knows how a parameter is laid out: names without wrappers, and flat views of the local storage.

Supported now: one process, and DDP (every rank holds everything). Sharded layouts (FSDP, ZeRO) will be added here and nowhere
else.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..errors import ConfigError

_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")


def clean_name(name: str) -> str:
    """The parameter's name in the base model: DDP adds `module.`, `torch.compile` adds `_orig_mod.`, at any depth."""
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper).replace(f".{wrapper}", ".")
    return name


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(clean name, parameter) of all parameters that training moves; tied weights come once."""
    for name, param in model.named_parameters():
        if param.requires_grad:
            yield clean_name(name), param


def flat(tensor: Tensor) -> Tensor:
    """A one-dimensional view (never a copy) of a tensor's local storage, outside of autograd."""
    if type(tensor.data) is not Tensor:
        raise ConfigError(
            f"A parameter is a {type(tensor.data).__name__}, not a plain tensor: this version of the penalty supports one "
            "process and DDP. Turn FSDP, tensor parallelism or weight quantisation off."
        )
    data = tensor.detach()
    if not data.is_contiguous():
        raise ConfigError("A parameter is not contiguous in memory; call `.contiguous()` on it before training.")
    return data.view(-1)


def narrow(tensor: Tensor) -> Tensor:
    """The same values in bfloat16 when that loses nothing (half the memory and traffic), else unchanged."""
    if tensor.dtype != torch.float32:
        return tensor
    half = tensor.bfloat16()
    return half if torch.equal(half.float(), tensor) else tensor
