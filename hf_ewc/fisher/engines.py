"""Three ways to add a batch's squares, behind one face, and the choice between them.

| engine | one backward pass per | used for |
|---|---|---|
| [`OneByOne`] | example | the reference; any architecture |
| `BatchedSquares` | batch | granularity `example` and `token`, where it agrees with the reference |
| [`SummedGradient`] | batch | granularity `batch` |
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..config import FisherConfig
from ..errors import DataError
from .batched import BatchedSquares, LeftOver, Unsupported
from .examples import IGNORED
from .per_example import Batch, accumulate_squares, negative_log_likelihood
from .processes import summed_loss

logger = logging.getLogger(__name__)

# How far the batched path may be from the one-by-one path, in ‖√S − √S′‖ / ‖√S′‖ of a parameter. Measured: up to 3e-6 in
# float32 and 0.04 in bfloat16, where both round activations and gradients to 8 bits, each in its own order.
TOLERANCE, TOLERANCE_16_BIT = 1e-4, 0.15
SAMPLE = 1 << 16  # coordinates of a parameter that are compared


class Engine(Protocol):
    """`add` returns whether the losses were finite; what is not finite in the gradients shows in `sums`."""

    @property
    def path(self) -> str: ...

    def add(self, batch: Batch, sums: Mapping[str, Tensor]) -> bool: ...

    def losses(self, batch: Batch) -> Tensor: ...


class OneByOne:
    """One forward and one backward pass per row; see `accumulate_squares`."""

    path = "one_by_one"

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def add(self, batch: Batch, sums: Mapping[str, Tensor]) -> bool:
        return all(accumulate_squares(self.model, batch, sums))

    def losses(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            rows = zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True)
            return torch.stack([negative_log_likelihood(self.model, ids[real], labels[real]) for ids, real, labels in rows])


class SummedGradient(OneByOne):
    r"""
    Granularity `batch`: $S \leftarrow S + (\sum_n g_n)^2$, the square of what an ordinary backward pass leaves in `.grad`.

    With labels drawn from the model, independently and with $E[g_n] = 0$, the cross terms vanish in expectation, and this is an
    unbiased estimate of $\sum_n E[g_n^2]$ (Gauss–Newton–Bartlett; Liu et al., Sophia, arXiv 2305.14342, where it is written
    B · ĝ² for the mean ĝ). With the data's own labels it is not: then it is what most code calls the Fisher.

    Each draw of `labels: sampled` is a batch of its own, for only within one are the labels independent of each other.
    """

    path = "summed_gradient"

    def __init__(self, model: PreTrainedModel, scratch: int, draws: int = 1) -> None:
        super().__init__(model)
        self.scratch, self.draws = scratch, draws
        self.traces: list[float] = []  # per example, of each batch since the estimator last looked: for the standard error

    def add(self, batch: Batch, sums: Mapping[str, Tensor]) -> bool:
        finite = True
        for number in range(self.draws):
            rows = {name: values[number :: self.draws] for name, values in batch.items() if name != "weights"}
            finite &= self._backward(rows)
            trace = 0.0
            for name, parameter in self.model.named_parameters():
                if parameter.grad is not None:
                    gradient = parameter.grad.float()
                    sums[name].addcmul_(gradient, gradient, value=1 / self.draws)
                    trace += float(torch.linalg.vector_norm(gradient)) ** 2
                    parameter.grad = None
            self.traces.append(trace / len(rows["input_ids"]))
        return finite

    def _backward(self, rows: Batch) -> bool:
        """Leave the gradient of −Σ log p of all rows in `.grad`; as many rows at a time as have logits that fit the scratch."""
        columns = int((rows["labels"][:, 1:] != IGNORED).any(0).sum())
        step = max(1, self.scratch // (columns * self.model.config.get_text_config().vocab_size * 4 * 3))
        finite = True
        for start in range(0, len(rows["labels"]), step):
            loss = summed_loss(self.model, {name: values[start : start + step] for name, values in rows.items()})
            loss.backward()
            finite &= bool(loss.isfinite())
        return finite


def choose_engine(
    model: PreTrainedModel, config: FisherConfig, first: Batch, sums: Mapping[str, Tensor]
) -> tuple[Engine, float | None, list[str]]:
    """
    The fastest engine that agrees with the one-by-one path on the batch `first`, parameter by parameter.

    Args:
        sums (`Mapping[str, Tensor]`): used as working memory and left at zero.

    Returns:
        `tuple`: the engine; the largest disagreement among the parameters that it was accepted for; the names of those that are
        left to the one-by-one path.

    Raises:
        [`DataError`]: granularity `token` is asked of a model that the batched path does not understand completely.
    """
    if config.granularity == "batch":
        if config.labels == "empirical":
            logger.warning(
                "`granularity: batch` with the data's own labels is not the Fisher: gradients of different examples cancel "
                "before they are squared. It is there for comparison; for an unbiased estimate set `labels: sampled`."
            )
        return SummedGradient(model, config.scratch_mb << 20, config.draws), None, []
    if config.path == "one_by_one":
        return OneByOne(model), None, []
    tokenwise = config.granularity == "token"
    reason, left = "", set[str]()
    finite = torch.tensor(accumulate_squares(model, first, None))
    first = {name: rows[finite] for name, rows in first.items()}  # an example that is NaN agrees with nothing
    if not finite.any():
        if tokenwise:
            raise DataError(
                f"the loss or gradient of {len(finite)} examples out of {len(finite)} is NaN or infinite, so that the path of "
                "`granularity: token` could not be checked. Look at the data and at the model's own loss."
            )
        return OneByOne(model), None, []  # the run itself says what is wrong
    try:
        engine = BatchedSquares(model, config.scratch_mb << 20)
        disagreement = self_check(engine, model, first, sums)
        tolerance = TOLERANCE_16_BIT if model.dtype in (torch.bfloat16, torch.float16) else TOLERANCE
        engine.leave({name for name, value in disagreement.items() if not value <= tolerance})
        left = set(engine.leftover)
        parameters = dict(model.named_parameters())
        if sum(parameters[name].numel() for name in left) > 0.5 * sum(p.numel() for p in parameters.values()):
            reason = f"more than half of the weights disagree with it or are of no known kind ({_some(engine.leftover)})"
    except Unsupported as error:
        reason = str(error)
    except Exception as error:  # whatever a module of somebody's own making raises when its parts are replaced
        reason = f"{type(error).__name__}: {error}"
    if tokenwise and (reason or left):
        raise DataError(
            "`granularity: token` squares at each position, which needs to be known for every weight. Here "
            f"{reason or 'these are of no known kind: ' + _some(engine.leftover)}. Use `granularity: example`."
        )
    if reason:
        logger.warning("The batched path cannot be used: %s. Every example gets a backward pass of its own.", reason)
        return OneByOne(model), None, []
    if left:
        logger.warning(
            "These go through the one-by-one path beside the batched one, which is slower: %s.", _some(engine.leftover)
        )
    engine.tokenwise = tokenwise
    worst = max((value for name, value in disagreement.items() if name not in left), default=None)
    return engine, worst, engine.leftover


def self_check(engine: BatchedSquares, model: PreTrainedModel, batch: Batch, sums: Mapping[str, Tensor]) -> dict[str, float]:
    """‖√S − √S′‖ / ‖√S′‖ of each parameter, batched against one by one, on at most `SAMPLE` coordinates. Leaves `sums` at 0."""

    def run(add: object) -> dict[str, Tensor]:
        for total in sums.values():
            total.zero_()
        add(batch, sums)  # type: ignore[operator]
        return {name: total.flatten()[:: -(-total.numel() // SAMPLE)].sqrt() for name, total in sums.items()}

    while True:
        try:
            fast = run(engine.add)
            break
        except LeftOver:  # now the engine knows of one module more
            continue
    slow = run(OneByOne(model).add)
    for total in sums.values():
        total.zero_()
    count = sum(values.numel() for values in slow.values())
    scale = float(torch.stack([values.square().sum() for values in slow.values()]).sum() / count) ** 0.5
    found = {}
    for name, values in slow.items():
        # Where a gradient is 0 in exact arithmetic (the bias of keys, for one), there is only rounding to compare.
        floor = 1e-4 * scale * values.numel() ** 0.5
        found[name] = float((fast[name] - values).norm() / values.norm().clamp(min=floor)) if values.numel() else 0.0
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
