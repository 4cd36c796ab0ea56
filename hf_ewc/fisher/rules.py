"""How each kind of module gives up per-example gradients during one ordinary backward pass; see `batched`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from .head import Embedded
from .products import add_squared_products


@dataclass
class Pass:
    """
    What the rules know of the batch that is running.

    Attributes:
        rows, positions (`int`): B and T of the padded batch.
        lengths (`Sequence[int]`): (B) positions that are not padding; they come first.
        tokenwise (`bool`): every position is a unit of its own (granularity `token`), else every row is.
        sums (`Mapping[str, Tensor]`): running sums, float32.
        scratch (`int`): bytes of working memory.
        failed (`set[str]`): parameters whose module was called in a way that hides which row its input belongs to.
    """

    rows: int
    positions: int
    lengths: Sequence[int]
    tokenwise: bool
    sums: Any
    scratch: int
    failed: set[str] = field(default_factory=set)

    def fits(self, x: Tensor) -> bool:
        """Whether x (B, …) or, tokenwise, (B, T, …) keeps its units apart."""
        wanted = (self.rows, self.positions) if self.tokenwise else (self.rows,)
        return x.dim() > 2 and x.shape[: len(wanted)] == wanted  # (n, D) may be any n tokens, by chance as many as rows

    def units(self, x: Tensor) -> Tensor:
        """(B, …, D) → (U, positions of a unit, D)."""
        return x.reshape(self.rows * (self.positions if self.tokenwise else 1), -1, x.shape[-1])

    def spans(self, x: Tensor) -> Sequence[int] | None:
        """How many of `units(x)`'s positions count; padding lies behind them, with gradients that are exactly 0."""
        return self.lengths if not self.tokenwise and x.dim() == 3 and x.shape[1] == self.positions else None


class Rule:
    """One module under observation for one batch: `install`, forward and backward pass, `finish`, `remove`."""

    names: set[str]

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.now: Pass | None = None  # set while a batch runs

    def install(self) -> None:
        self.module.forward = self.forward  # on the instance: the class stays as it is

    def remove(self) -> None:
        """Leave the module as it was, whatever has happened in between."""
        del self.module.forward
        self.forget()
        self.now = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """In place of the module's own."""
        assert self.now is not None
        found = self.observe(args[0]) if len(args) == 1 and not kwargs else None
        if found is None:  # called in a way of its own
            self.now.failed |= self.names
            return self.original(*args, **kwargs)
        return found

    def observe(self, x: Tensor) -> Tensor | None:
        """The module's output, in a form that lets per-example gradients be had; `None` when `x` hides the examples."""
        raise NotImplementedError

    def finish(self) -> None:
        """After a backward pass: add to the sums what has been observed, if that has not happened during it."""

    def forget(self) -> None:
        """Drop what has been observed."""
        raise NotImplementedError

    def original(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)


class LinearRule(Rule):
    """`nn.Linear` (weight (O, I)) and GPT-2's `Conv1D` (weight (I, O)), with or without bias."""

    def __init__(self, module: nn.Linear | Conv1D, weight: str, bias: str | None) -> None:
        super().__init__(module)
        self.weight, self.bias, self.transposed = weight, bias, isinstance(module, Conv1D)
        self.names = {weight} if bias is None else {weight, bias}
        self._uses = 0

    def observe(self, x: Tensor) -> Tensor | None:
        assert self.now is not None
        if not self.now.fits(x):
            return None
        if not x.requires_grad and torch.is_grad_enabled():
            x = x.detach().requires_grad_()  # or the function below would not be called back
        return LinearSquares.apply(x, self.module.weight, self.module.bias, self)

    def square(self, x: Tensor, g: Tensor) -> None:
        """x (B, …, I) and the gradient g (B, …, O) of the output have met."""
        now = self.now
        assert now is not None
        self._uses += 1
        if self._uses > 1:  # shared between layers: its gradients would have to meet before they are squared
            now.failed |= self.names
            return
        left, right = now.units(x), now.units(g)
        if self.transposed:
            left, right = right, left
        add_squared_products(left, right, now.sums[self.weight], now.spans(x), now.scratch)
        if self.bias is not None:
            now.sums[self.bias] += now.units(g).sum(1, dtype=torch.float32).square_().sum(0)

    def forget(self) -> None:
        self._uses = 0


class LinearSquares(torch.autograd.Function):
    """
    y = x Wᵀ + b, whose backward pass squares instead of adding up.

    An autograd function and not a pair of hooks: under gradient checkpointing the forward pass runs twice, but backward once,
    with the tensors that were saved for it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rule: LinearRule) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rule = rule
        return functional.linear(x, weight.t() if rule.transposed else weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight = ctx.saved_tensors
        ctx.rule.square(x, g)
        return g @ (weight.t() if ctx.rule.transposed else weight), None, None, None


class NormRule(Rule):
    """
    A module whose parameters are vectors that it multiplies with or adds to its input, element by element.

    For the pass, each parameter is replaced by one copy per unit, (B, 1, D), which broadcasts to the same output; the gradient
    of the copies is what the unit contributes, whatever the module does with it (Gemma's `1 + weight`, casts).
    """

    def __init__(self, module: nn.Module, names: dict[str, str]) -> None:
        super().__init__(module)
        self.attributes, self.names = names, set(names.values())
        self._found: dict[str, nn.Parameter] = {}
        self._copies: dict[str, Tensor] = {}
        self._axis: int | None = None  # where the positions are, for granularity "token"; known from the first batch

    def observe(self, x: Tensor) -> Tensor | None:
        if not self._copies and not self._copy(x):
            return None
        if not isinstance(self.module, (nn.LayerNorm, nn.RMSNorm)):
            return self.original(x)
        # torch's own functions insist on weights of shape (D)
        shape = self.module.normalized_shape
        if isinstance(self.module, nn.LayerNorm):
            y = functional.layer_norm(x, shape, eps=self.module.eps)
        else:
            y = functional.rms_norm(x, shape, eps=self.module.eps)
        for attribute, copies in self._copies.items():
            y = y * copies if attribute == "weight" else y + copies
        return y

    def _copy(self, x: Tensor) -> bool:
        now = self.now
        assert now is not None
        vectors = {attribute: self.module._parameters[attribute] for attribute in self.attributes}
        if x.dim() < 3 or x.shape[0] != now.rows or any(v is None or v.shape != x.shape[-1:] for v in vectors.values()):
            return False
        shape = [now.rows] + [1] * (x.dim() - 2) + [x.shape[-1]]
        if now.tokenwise:
            axes = [axis for axis in range(1, x.dim() - 1) if x.shape[axis] == now.positions]
            # q_norm and k_norm see (B, T, heads, D) or (B, heads, T, D), which look alike when there are T heads
            if self._axis is None and len(axes) == 1:
                self._axis = axes[0]
            if self._axis not in axes:
                return False
            shape[self._axis] = now.positions
        for attribute, vector in vectors.items():
            assert vector is not None
            self._found[attribute] = vector
            self._copies[attribute] = vector.detach().expand(shape).requires_grad_()
            self.module._parameters[attribute] = self._copies[attribute]  # type: ignore[assignment]
        return True

    def finish(self) -> None:
        assert self.now is not None
        for attribute, copies in self._copies.items():
            if copies.grad is not None:
                self.now.sums[self.attributes[attribute]] += copies.grad.float().square_().flatten(0, -2).sum(0)

    def forget(self) -> None:
        self.module._parameters.update(self._found)
        self._copies.clear()
        self._found.clear()


class EmbeddingRule(Rule):
    """
    A table of rows that are looked up, and perhaps scaled, inside its module.

    For the pass, the module works on one copy of a row per position and looks up copy 0, 1, 2 …; the gradient of the copies is
    that of the rows, whatever the module multiplies them with.
    """

    def __init__(self, module: nn.Embedding, name: str) -> None:
        super().__init__(module)
        self.name, self.names = name, {name}
        self._uses: list[tuple[Tensor, Tensor]] = []

    def observe(self, ids: Tensor) -> Tensor | None:
        now, table = self.now, self.module
        assert now is not None
        assert isinstance(table, nn.Embedding)
        if tuple(ids.shape) != (now.rows, now.positions):
            return None
        weight, padding = table.weight, table.padding_idx
        copies = weight.detach()[ids.reshape(-1)].requires_grad_()
        table._parameters["weight"] = copies  # type: ignore[assignment]  # a tensor serves as well
        table.padding_idx = None
        try:
            found = self.original(torch.arange(ids.numel(), device=ids.device).view_as(ids))
        finally:
            table._parameters["weight"] = weight  # type: ignore[assignment]
            table.padding_idx = padding
        self._uses.append((ids, copies))
        return found

    def collect(self) -> Embedded:
        """The gradients of this pass by unit and token."""
        now, table = self.now, self.module
        assert now is not None
        assert isinstance(table, nn.Embedding)
        size = table.num_embeddings
        keys, gradients = [], []
        for ids, copies in self._uses:
            if copies.grad is None:
                continue
            position = torch.arange(ids.numel(), device=ids.device)
            unit = position if now.tokenwise else position // now.positions
            real = position % now.positions < torch.tensor(now.lengths, device=ids.device)[position // now.positions]
            if table.padding_idx is not None:  # autograd gives this row no gradient either
                real &= ids.reshape(-1) != table.padding_idx
            keys.append((unit * size + ids.reshape(-1))[real])
            gradients.append(copies.grad.float()[real])
        if not keys:
            none = torch.empty(0, dtype=torch.long, device=table.weight.device)
            return Embedded(none, none, torch.empty(0, table.embedding_dim, device=table.weight.device))
        key, place = torch.cat(keys).unique(return_inverse=True)
        gradient = torch.cat(gradients)
        return Embedded(key // size, key % size, gradient.new_zeros(len(key), gradient.shape[1]).index_add_(0, place, gradient))

    def finish(self) -> None:
        assert self.now is not None
        found = self.collect()
        self.now.sums[self.name].index_add_(0, found.token, found.gradient.square_())

    def forget(self) -> None:
        self._uses.clear()
