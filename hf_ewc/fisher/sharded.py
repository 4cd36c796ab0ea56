r"""The Fisher of a model that one device cannot hold: weights and sums sharded by FSDP2, and still exact per example.

FSDP2 gathers the weights of one layer after another, lets autograd compute the layer's whole gradient on every rank (each of an
example of its own), and then sums the ranks' gradients while it hands every rank its shard of the sum: the reduce-scatter.
Behind it the examples have met, and squaring is too late: that is the square of a sum. So the square is taken inside:

$$S \leftarrow S + \text{reduce-scatter}_r(g_r \odot g_r) \qquad\text{and not}\qquad (\text{reduce-scatter}_r\, g_r)^2$$

FSDP2 lets its users bring a reduce-scatter of their own (`set_custom_reduce_scatter`). Its input is the finished gradient of
the example for all parameters of a layer, already in the float32 in which it will be summed; ours squares that buffer in place.
Nothing of full size is added to what FSDP2 holds, both ends of a tied embedding have met, and nothing more is communicated.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from ..errors import ConfigError
from .examples import IGNORED
from .per_example import Batch
from .processes import SquaringReduceScatter, check_world, shard, summed_loss

__all__ = ["ShardedSquares", "check_world", "shard", "summed_loss"]

logger = logging.getLogger(__name__)

Mode = Literal["unsharded_gradient", "same_example"]
Shards = dict[str, Tensor]  # name → this rank's rows of the parameter, of its gradient or of its squares; fp32


class ShardedSquares:
    r"""
    Sums of squared gradients of single examples, each process with its shard of them.

    At the start two made-up examples are squared in both of the ways below. Where the results differ, the second is taken: a
    loss that runs backward by itself, chunk by chunk, leaves a gradient in parts, which must not be squared apart.

    - `"unsharded_gradient"`: each process has an example of its own and squares inside the reduce-scatter, see above.
    - `"same_example"`: all processes differentiate the same example, one after another. The plain reduce-scatter then averages
      equal gradients, and squaring behind it is right. `world` times slower, and right for whatever FSDP2 trains.

    Memory per process, for N parameters of b bytes on `world` processes: N (b + 8) / world for weights, sums and the squares of
    one step, and beside it FSDP2's whole weights and gradients of the largest unit. **All processes make the same calls**; one
    that has run out of examples passes `None`.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            After [`shard`], ready for differentiation (see [`prepared`]): eval mode, `requires_grad`, no `.grad`.
        loss (`Callable`, *optional*, defaults to [`summed_loss`]):
            Of a model and a batch, () float32, with as many forward passes for one batch as for another.
        mode (`str`, *optional*): take this way, without the test.

    Attributes:
        sums (`dict[str, Tensor]`):
            This process's rows of each parameter's sum, float32, by the names of `named_parameters()`; 0 rows where a parameter
            has fewer than there are processes. To resume, copy into them what was saved.
        mode (`str`): the way that was taken.
        self_check (`float`, *optional*):
            Largest difference between both ways over all parameters, ‖√S − √S′‖ / ‖√S′‖; `None` without a test.

    Raises:
        [`ConfigError`]: the model is not sharded, or not by rows over one mesh dimension; or FSDP2 loses gradients of it.

    Example:

    ```python
    >>> shard(model)
    >>> with prepared(model):
    ...     squares = ShardedSquares(model)
    ...     for start in range(0, len(examples), world):
    ...         mine = examples[start + rank : start + rank + 1]
    ...         squares.accumulate(collate(mine) if mine else None)
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        loss: Callable[[PreTrainedModel, Batch], Tensor] = summed_loss,
        mode: Mode | None = None,
    ) -> None:
        self._model, self._loss = model, loss
        self._parameters: dict[str, DTensor] = {}
        for name, parameter in model.named_parameters():
            if not isinstance(parameter, DTensor) or parameter.placements != (Shard(0),):
                found = parameter.placements if isinstance(parameter, DTensor) else "not sharded"
                raise ConfigError(
                    f"`{name}` is {found}, and must be (Shard(dim=0),), cut into rows over one mesh dimension: a process could "
                    "not tell which part of the sums is its own. Call `hf_ewc.fisher.sharded.shard(model)` on the loaded model."
                )
            self._parameters[name] = parameter
        first = next(iter(self._parameters.values()))
        mesh, self._device = first.device_mesh, first.to_local().device
        self._group, self._rank, self._world = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        self.sums: Shards = {
            name: torch.zeros_like(parameter.to_local(), dtype=torch.float32, requires_grad=False)
            for name, parameter in self._parameters.items()
        }
        self._units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for unit in self._units:
            unit.set_force_sum_reduction_for_comms(True)  # of squares, the sum is wanted; and gloo has no premultiplied sums
            # a process whose example passes by an expert sends zeros instead of nothing, for which the others would wait
            unit.set_reduce_scatter_unused_params(True, recurse=False)
        # the same tokens in two orders: different examples, which meet in every row of the embedding that they touch
        vocabulary = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
        tokens = torch.randint(vocabulary, (8,), generator=torch.Generator().manual_seed(0))
        self._made_up = (_row(tokens), _row(tokens.flip(0)))
        self._reduce_scatter = SquaringReduceScatter()
        self._clear()
        self.self_check: float | None = None
        self.mode: Mode = mode or "same_example"
        if mode is None and self._world > 1:  # one process alone has nothing to scatter
            self._choose(1e-3 if first.dtype == torch.float32 else 1e-2)  # wrong ways are off by 0.3 and more
        elif mode == "unsharded_gradient":
            self._install()

    def accumulate(self, row: Batch | None) -> list[bool]:  # (world)
        """
        Add the squared gradient of each process's own example.

        Args:
            row (`Mapping[str, Tensor]`, *optional*): this process's example, a batch of one row (see [`collate`]); or none.

        Returns:
            `list[bool]`: for every rank, whether its example was finite. One that is not is left out, and only that one.
        """
        if row is not None and len(row["input_ids"]) != 1:
            raise ValueError(f"one example per process and call; this batch has {len(row['input_ids'])} rows.")
        step, counted = self._step(row, together=False)
        for name, squares in step.items():
            self.sums[name].add_(squares)
        return counted

    def accumulate_batch(self, rows: Batch | None) -> list[bool]:  # (world)
        """
        Add the square of the gradient of *all* processes' rows together, one global batch (`granularity: batch`).

        Args:
            rows (`Mapping[str, Tensor]`, *optional*): this process's part of the batch, any number of rows; or none.

        Returns:
            `list[bool]`: for every rank, whether its part was finite. One that is not is left out of the batch.
        """
        step, counted = self._step(rows, together=True)
        for name, gradient in step.items():
            self.sums[name].addcmul_(gradient, gradient)
        return counted

    def full(self, name: str) -> Tensor:
        """The whole sum of one parameter, float32, on every process; all of them must ask for it."""
        like, own = self._parameters[name], self.sums[name]
        return DTensor.from_local(
            own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        ).full_tensor()

    def _choose(self, tolerance: float) -> None:
        """Square two made-up examples in both ways; take the fast one if they agree on every parameter."""
        expected = {name: torch.zeros_like(total) for name, total in self.sums.items()}
        for row in self._made_up:  # before ours is installed: with nothing but FSDP2 itself
            for name, gradient in self._same_example(row)[0].items():
                expected[name].addcmul_(gradient, gradient)
        self._install()
        found, _ = self._own_examples(self._made_up[self._rank] if self._rank < 2 else None, together=False)
        differences = [(found.get(name, 0 * square).sqrt() - square.sqrt()).square().sum() for name, square in expected.items()]
        norms = torch.stack([torch.stack(differences), torch.stack([square.sum() for square in expected.values()])])  # (2, P)
        dist.all_reduce(norms, group=self._group)
        apart = {}
        for name, (difference, scale) in zip(expected, norms.T.tolist(), strict=True):
            ratio = (difference / scale) ** 0.5 if scale else float(difference != 0)
            apart[name] = float("inf") if ratio != ratio else ratio  # NaN agrees with nothing
        worst = max(apart, key=apart.__getitem__)
        self.self_check = apart[worst]
        if self.self_check <= tolerance:
            self.mode = "unsharded_gradient"
            return
        logger.warning(
            "Squaring inside FSDP2's reduce-scatter is not right for %s: `%s` is off by %.2g. All processes will differentiate "
            "the same example instead, one after another: exact as well, and %d times slower.",
            *(type(self._model).__name__, worst, self.self_check, self._world),
        )

    def _install(self) -> None:
        for unit in self._units:
            unit.set_custom_reduce_scatter(self._reduce_scatter)  # type: ignore[arg-type]  # its base class is not public

    def _step(self, rows: Batch | None, together: bool) -> tuple[Shards, list[bool]]:
        """Σ over ranks of gradients (`together`) or of their squares; and which ranks' rows are in it."""
        take = self._own_examples if self.mode == "unsharded_gradient" else self._one_after_another
        return take(rows, together)

    def _own_examples(self, rows: Batch | None, together: bool) -> tuple[Shards, list[bool]]:
        counted = [True] * self._world
        while True:
            step, finite = self._scatter(rows if counted[self._rank] else None, square=not together)
            flags = torch.zeros(self._world, device=self._device)
            flags[self._rank] = float(finite)
            dist.all_reduce(flags, group=self._group)
            if all(flags.tolist()):
                return step, counted
            # What is not finite has spread over all shards of the step. It is in no sum yet: once more, without those examples.
            counted = [was and bool(now) for was, now in zip(counted, flags.tolist(), strict=True)]

    def _scatter(self, rows: Batch | None, square: bool) -> tuple[Shards, bool]:
        """One backward pass through our reduce-scatter: its shards, and whether what this rank put in is finite."""
        self._reduce_scatter.start("silence" if rows is None else "squares" if square else "gradients")
        step: Shards = {}

        def taker(name: str) -> Callable[[Tensor], None]:
            def take(parameter: Tensor) -> None:
                # FSDP2 has cut `.grad` from `reduced`, rounded to the weights' dtype. The same place, before rounding:
                rounded, reduced = cast(DTensor, parameter.grad).to_local(), cast(Tensor, self._reduce_scatter.reduced)
                place = rounded.storage_offset()
                exact = reduced[place : place + rounded.numel()].view(rounded.shape)
                step[name] = step[name] + exact if name in step else exact
                parameter.grad = None

            return take

        hooks = [parameter.register_post_accumulate_grad_hook(taker(name)) for name, parameter in self._parameters.items()]
        try:
            for unit in self._units:
                unit.set_gradient_divide_factor(1.0)
            loss = self._backward(self._made_up[0] if rows is None else rows)
            finite = rows is None or bool(torch.stack([loss, *self._reduce_scatter.own]).isfinite().all())
        finally:
            for handle in hooks:
                handle.remove()
            self._clear()
        return step, finite

    def _one_after_another(self, rows: Batch | None, together: bool) -> tuple[Shards, list[bool]]:
        step = {name: torch.zeros_like(total) for name, total in self.sums.items()}
        counted = []
        for rank in range(self._world):
            parcel = [rows]
            dist.broadcast_object_list(parcel, group=self._group, group_src=rank)
            gradients, finite = ({}, True) if parcel[0] is None else self._same_example(parcel[0])
            counted.append(finite)
            for name, gradient in gradients.items() if finite else ():
                step[name].add_(gradient if together else gradient.square())
        return step, counted

    def _same_example(self, rows: Batch) -> tuple[Shards, bool]:
        """One backward pass of all ranks over the same rows: the shards of their gradient, and whether all of it is finite."""
        try:
            loss = self._backward(rows)
            gradients = {
                name: cast(DTensor, parameter.grad).to_local().float()
                for name, parameter in self._parameters.items()
                if parameter.grad is not None
            }
        finally:
            self._clear()
        looks = torch.stack([loss, *(gradient.square().sum() for gradient in gradients.values())])
        dist.all_reduce(looks, group=self._group)  # what is not finite on one rank is not finite in the sum
        return gradients, bool(looks.isfinite().all())

    def _backward(self, rows: Batch) -> Tensor:
        loss = self._loss(self._model, rows)
        loss.backward()
        if unfinished := [n for n, parameter in self._model.named_parameters() if parameter is not self._parameters[n]]:
            raise ConfigError(
                f"FSDP2 has not reduced the gradient of {len(unfinished)} parameters (`{unfinished[0]}`, …) after a backward "
                "pass, so it would be wrong. Reentrant gradient checkpointing does that; use `use_reentrant=False`, or set "
                "`sharding: replicate`. Nothing was added."
            )
        return loss.detach().float()

    def _clear(self) -> None:
        """Plain FSDP2 again, which averages over processes, and no gradient left."""
        self._reduce_scatter.start(None)
        for unit in self._units:
            unit.set_gradient_divide_factor(float(self._world))
        for parameter in self._parameters.values():
            parameter.grad = None


def _row(tokens: Tensor) -> dict[str, Tensor]:
    """Tokens (T) as a batch of one row, all but the first of them scored."""
    labels = tokens.clone()
    labels[0] = IGNORED
    return {"input_ids": tokens[None], "attention_mask": torch.ones_like(tokens)[None], "labels": labels[None]}
