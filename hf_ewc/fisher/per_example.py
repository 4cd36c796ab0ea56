r"""The squared gradients of single examples, added up: the reference that everything faster is compared with.

$$S_i \leftarrow S_i + \sum_n w_n \Big(\sum_{t\in\text{scored}(n)} \partial\log p(y_{nt} \mid x_n) / \partial\theta_i\Big)^2$$

Why not square the gradient of a whole batch, which is one `backward()`? Because the gradients of different examples point in
different directions and cancel before they are squared: with batches of 16 only 0.065 of the Fisher is left, and which weights
look important changes too. The square has to be taken per example.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from .examples import IGNORED, Example
from .head import draw

# input_ids, attention_mask, labels: (B, T) int64. Optional: weights (B) float32 ≥ 0, the w of the formula, default 1; uniforms
# (B, T) float32 in [0, 1), with which the targets at scored positions are drawn from the model instead of taken from labels.
Batch = Mapping[str, Tensor]


def collate(examples: Sequence[Example], pad_id: int = 0, padding_side: str = "right") -> dict[str, Tensor]:
    """Pad examples to one batch: `input_ids`, `attention_mask`, `labels`, each (B, T) int64."""
    longest = max(len(example.input_ids) for example in examples)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for example in examples:
        gap = longest - len(example.input_ids)
        left, right = (gap, 0) if padding_side == "left" else (0, gap)
        batch["input_ids"].append([pad_id] * left + example.input_ids + [pad_id] * right)
        batch["attention_mask"].append([0] * left + [1] * len(example.input_ids) + [0] * right)
        batch["labels"].append([IGNORED] * left + example.labels + [IGNORED] * right)
    return {name: torch.tensor(rows) for name, rows in batch.items()}


@dataclass(frozen=True)
class Packed:
    """A batch on the model's device with all padding on the right: ids, labels, mask (B, T); uniforms (B, T) or `None`."""

    ids: Tensor
    labels: Tensor
    mask: Tensor
    lengths: list[int]
    uniforms: Tensor | None


def packed_right(batch: Batch, device: torch.device) -> Packed:
    """Move the padding of each row, wherever it is, behind its tokens."""
    real = batch["attention_mask"].bool()
    lengths = real.sum(1)
    order = real.int().argsort(dim=1, descending=True, stable=True)[:, : int(lengths.max())]
    uniforms = batch.get("uniforms")
    return Packed(
        ids=batch["input_ids"].gather(1, order).to(device),
        labels=batch["labels"].masked_fill(~real, IGNORED).gather(1, order).to(device),
        mask=real.gather(1, order).to(device),
        lengths=lengths.tolist(),
        uniforms=None if uniforms is None else uniforms.gather(1, order).to(device),
    )


def accumulate_squares(
    model: PreTrainedModel,
    batch: Batch,
    sums: Mapping[str, Tensor] | None,  # name → fp32, the parameter's shape
    only: Collection[str] | None = None,
) -> list[bool]:  # (B)
    """
    Add each example's squared gradient to `sums`, in place, one example at a time.

    This is exact for every architecture: whatever contributes to a parameter (both ends of a tied embedding, a scale inside a
    module, a fused head) has met in `.grad` before it is squared. Alive at once are the weights, `sums` and one parameter's
    gradient.

    Args:
        model ([`~transformers.PreTrainedModel`]): With `.grad` of every parameter `None`, in eval mode (see `prepared`).
        batch (`Mapping[str, Tensor]`):
            See `Batch` and [`collate`]. Rows may be padded on either side; the padding is cut off before the forward pass.
        sums (`Mapping[str, Tensor]`, *optional*):
            Running sums, float32 whatever the model's dtype, since bfloat16 sums stop growing at 256 terms and float16 squares
            lose all gradients below 2e-4. `None`: look only, which tells whether the examples are finite.
        only (`Collection[str]`, *optional*): differentiate these parameters and no others.

    Returns:
        `list[bool]`: for every example whether its loss and the squares of its gradient are finite. **Where one is not, `sums`
        are spoilt**: the caller rolls back (see `estimator`), which spares the normal case a second copy of the gradient.
    """
    if sums is not None and (narrow := [name for name, total in sums.items() if total.dtype != torch.float32]):
        raise TypeError(f"running sums must be float32; {narrow[0]} is {sums[narrow[0]].dtype}.")
    norms: list[Tensor] = []

    def square(total: Tensor | None) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = parameter.grad.float()
            parameter.grad = None
            norms.append(torch.linalg.vector_norm(gradient))  # infinite also when only the squares overflow
            if total is not None:
                total.addcmul_(gradient, gradient)

        return hook

    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    left_out = [parameter for name, parameter in parameters.items() if only is not None and name not in only]
    hooks = [
        parameter.register_post_accumulate_grad_hook(square(None if sums is None else sums[name]))
        for name, parameter in parameters.items()
    ]
    weights, uniforms = batch.get("weights"), batch.get("uniforms")
    finite = []
    try:
        for parameter in left_out:
            parameter.requires_grad_(False)
        for row, (ids, mask, labels) in enumerate(
            zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
        ):
            real = mask.bool()
            loss = negative_log_likelihood(
                model, ids[real], labels[real], None if uniforms is None else uniforms[row][real.to(uniforms.device)]
            )
            if weights is not None:
                loss = loss * weights[row].to(loss.device).sqrt()
            if loss.requires_grad:  # with `only`, a row may pass by all of these parameters (an expert, say)
                loss.backward()
            finite.append(bool(torch.stack([norm.to(loss.device) for norm in (*norms, loss.detach())]).isfinite().all()))
            norms.clear()
    finally:
        for handle in hooks:
            handle.remove()
        for parameter in left_out:
            parameter.requires_grad_(True)
        for parameter in parameters.values():
            parameter.grad = None  # also after an interrupt in the middle of a backward pass
    return finite


def negative_log_likelihood(model: PreTrainedModel, ids: Tensor, labels: Tensor, uniforms: Tensor | None = None) -> Tensor:
    """
    −Σ log p of one unpadded example's scored tokens, () float32.

    Args:
        ids (`Tensor` of int64): (T) tokens.
        labels (`Tensor` of int64): (T) targets *at* each position, or -100.
        uniforms (`Tensor`, *optional*): (T) in [0, 1); draws the targets of scored positions from the model instead.
    """
    scored = (labels[1:] != IGNORED).nonzero().squeeze(-1)  # (S): position s predicts the token at s + 1
    inputs = ids.to(model.device)[None]
    where = scored.to(model.device)
    # A head of 256,000 words over 512 positions is half a gigabyte of logits; only the scored ones are asked for.
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    extra = {"logits_to_keep": where} if keeps else {}
    logits = model(input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False, **extra).logits[0]
    logits = (logits if keeps else logits[where.to(logits.device)]).float()  # log-softmax in float32
    if uniforms is None:
        targets = labels[1:][scored].to(logits.device)
    else:
        targets = draw(logits.detach(), uniforms[1:][scored.to(uniforms.device)].to(logits.device))
    return functional.cross_entropy(logits, targets, reduction="sum")
