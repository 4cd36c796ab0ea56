r"""Which targets are differentiated: the data's own, draws from the model, or every answer option.

| `labels` | Σ over | square of ∂ log p of | weight |
|---|---|---|---|
| `empirical` | examples | the data's targets | 1 |
| `sampled` | examples, draws | targets drawn from the model at the scored positions, the data's text before them | 1/draws |
| `options` | examples, options | one whole answer option | p(option), renormalised over the options |

`sampled` gives, in expectation, the Fisher information in the strict sense (Kunstner et al., arXiv 1905.12558); `options` is
that expectation carried out, where only the options can be answers. All count the same scored tokens, those of the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .examples import Example
from .per_example import Batch, collate


def rows_per_example(examples: Sequence[Example], labels: str, draws: int) -> int:
    """Rows of a batch that one example becomes, at most."""
    if labels == "options":
        return max(len(example.options) for example in examples)
    return draws if labels == "sampled" else 1


def labelled(
    examples: Sequence[Example],
    indices: Sequence[int],
    labels: str,
    draws: int,
    seed: int,
    losses: Callable[[Batch], Tensor],
) -> dict[str, Tensor]:
    """
    Collate examples as [`labels`] asks for.

    Args:
        examples (`Sequence[Example]`): of one batch.
        indices (`Sequence[int]`): their numbers in the probe. With `seed`, they decide what is drawn, so that neither the batch
            size nor the number of processes does.
        labels (`str`): `"empirical"`, `"sampled"` or `"options"`.
        draws (`int`): for `sampled`.
        seed (`int`): for `sampled`.
        losses (`Callable`): −Σ log p of each row of a batch, (B) float32; the model's word on the options.

    Returns:
        `dict[str, Tensor]`: see `Batch`.
    """
    if labels == "options":
        batch = collate([option for example in examples for option in example.options])
        logs = -losses(batch).cpu()
        parts = logs.split([len(example.options) for example in examples])
        return {**batch, "weights": torch.cat([part.softmax(0) for part in parts])}
    if labels == "empirical":
        return collate(examples)
    batch = collate([example for example in examples for _ in range(draws)])
    uniforms = torch.zeros(batch["input_ids"].shape)
    for row, (index, draw) in enumerate((index, draw) for index in indices for draw in range(draws)):
        length = int(batch["attention_mask"][row].sum())
        uniforms[row, :length] = torch.rand(length, generator=_generator(seed, index, draw))
    return {**batch, "weights": torch.full((len(uniforms),), 1 / draws), "uniforms": uniforms}


def _generator(*numbers: int) -> torch.Generator:
    digest = hashlib.sha256(repr(numbers).encode()).digest()  # nearby seeds must not give nearby streams
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
