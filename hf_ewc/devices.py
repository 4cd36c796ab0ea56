"""[`usable_device`]: where tensors go, checked before anything is loaded."""

from __future__ import annotations

import torch

from .errors import ConfigError


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device of a setting, or the accelerator if there is one, else the CPU; [`ConfigError`] if it cannot be used here."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return accelerator or torch.device("cpu")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = f"cpu and {accelerator.type}" if accelerator else "cpu"
        raise ConfigError(f"`device: {device}` cannot be used: {str(error).splitlines()[0]} Here there is {there}.") from None
    return torch.device(device)
