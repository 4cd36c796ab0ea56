"""Making a model ready to be differentiated, and leaving it as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def prepared(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """
    Make a model [`ready`], and yield the running sums: one float32 zero tensor per parameter, in the order of
    `named_parameters()`, where tied ones appear once.
    """
    with ready(model):
        yield {
            name: torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format)
            for name, parameter in model.named_parameters()
        }


@contextmanager
def ready(model: PreTrainedModel) -> Iterator[None]:
    """
    Make a model ready for `accumulate_squares`, and leave it as it was found, also after an error.

    Within: eval mode (no dropout), all parameters require a gradient, and no `.grad` is set.

    Gradient checkpointing, where it is enabled, stays at work: transformers does it in training mode only, so the layers (but
    nothing inside them) are set to that, unless the model has dropout, which a layer might then apply.
    """
    training = {module: module.training for module in model.modules()}
    found = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    try:
        model.eval()
        if not any("drop" in name and value for name, value in model.config.get_text_config().to_dict().items()):
            for module in training:
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = True  # the attribute of this module; `train()` would reach its children
        for parameter in found:
            parameter.requires_grad_(True)
            parameter.grad = None
        # the caller's autocast would round gradients to 16 bits, and the record would say float32
        with torch.enable_grad(), torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        for parameter, (needed, gradient) in found.items():
            parameter.requires_grad_(needed)
            parameter.grad = gradient
        for module, mode in training.items():
            module.training = mode
