r"""The batched path: squared per-example gradients, summed, from one forward and one backward pass of the whole batch.

For most weights of a language model an example's gradient can be had from what passes through the weight's module: its input x
and the gradient g of its output, of which a batch has one row per example.

| module | an example's gradient | how it is had (`rules`) |
|---|---|---|
| `nn.Linear`, `Conv1D` | Σ_t g_t x_tᵀ, bias Σ_t g_t | an autograd function whose backward squares instead of adding up |
| norms | Σ_t g_t ⊙ x̂_t, or what the module makes of it | one copy of the weight per example |
| `nn.Embedding` | the rows of its tokens, times what the module scales them with | one copy of a row per position |
| head, tied or not | Σ_s change_s h_sᵀ, plus the embedding's rows | `head`, in parts of the vocabulary |

Whatever else holds parameters (experts in one 3-D tensor, a module that is called twice, one of somebody's own making) is left
to the one-by-one path, parameter by parameter. Nothing is trusted: `engines` compares a first batch with the one-by-one path.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .examples import IGNORED
from .head import Embedded, Head
from .per_example import Batch, accumulate_squares, packed_right
from .rules import EmbeddingRule, LinearRule, NormRule, Pass, Rule


class Unsupported(Exception):
    """The batched path cannot run on this model; the message says why."""


class LeftOver(Exception):
    """
    A module turned out to hide which example its input belongs to. Its parameters are left to the one-by-one path from now on,
    but `sums` of this batch are spoilt: go back, and run it again.
    """


class BatchedSquares:
    """
    Squares of whole batches. The model is under observation only while a batch runs; in between it is as it was.

    Args:
        model ([`~transformers.PreTrainedModel`]): a causal LM in eval mode, on one device.
        scratch (`int`): bytes of working memory.
        tokenwise (`bool`, *optional*, defaults to `False`):
            Granularity `token`: Σ over examples *and positions* of (g_t x_tᵀ)², as if every position had weights of its own.

    Attributes:
        leftover (`list[str]`): parameters that go through the one-by-one path.

    Raises:
        [`Unsupported`]: there is no backbone followed by one linear head.
    """

    def __init__(self, model: PreTrainedModel, scratch: int, tokenwise: bool = False) -> None:
        self.model, self.scratch, self.tokenwise = model, scratch, tokenwise
        self.backbone = model.base_model
        head, table = model.get_output_embeddings(), model.get_input_embeddings()
        if self.backbone is model or not isinstance(head, nn.Linear) or not isinstance(table, nn.Embedding):
            raise Unsupported(f"{type(model).__name__} is not a backbone with an embedding table and one linear head")
        self.head = Head(head, model.config.get_text_config(), scratch)
        names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        self._head_name = names[head.weight]
        self._head_bias = names[head.bias] if head.bias is not None else None
        self._rules = _rules(model, head, names)
        rules = [rule for rule in self._rules if rule.module is table and isinstance(rule, EmbeddingRule)]
        if not rules:
            raise Unsupported(f"the embedding table {type(table).__name__} works in a way of its own")
        self._table, self._tied = rules[0], table.weight is head.weight
        if not self._tied and any(self._head_name in rule.names for rule in self._rules):
            raise Unsupported("the head shares its weight with something other than the embedding table")
        self._names = list(names.values())
        covered = {name for rule in self._rules for name in rule.names} | {self._head_name, self._head_bias}
        self._leftover = set(self._names) - covered
        self._positions = "position_ids" in inspect.signature(self.backbone.forward).parameters

    @property
    def leftover(self) -> list[str]:
        return [name for name in self._names if name in self._leftover]

    def leave(self, names: set[str]) -> None:
        """Give these parameters, and those of the same modules, to the one-by-one path from now on."""
        head = {name for name in (self._head_name, self._head_bias) if name is not None}
        names = names | head if names & head else names
        for rule in [rule for rule in self._rules if rule.names & names]:
            self._leftover |= rule.names
            if rule is not self._table:  # without which no gradient would flow
                self._rules.remove(rule)
        self._leftover |= names

    @property
    def path(self) -> str:
        return "batched"

    def losses(self, batch: Batch) -> Tensor:  # (B) float32
        """−Σ log p of each example's scored tokens, without gradients."""
        packed = packed_right(batch, self.model.device)
        ids, labels = packed.ids, packed.labels
        row, position = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        with torch.no_grad():
            hidden = self._hidden(ids)[row, position]
            found = self.head.losses(hidden, labels[row, position + 1])
        return torch.zeros(len(ids), device=ids.device).index_add_(0, row, found)

    def add(self, batch: Batch, sums: Mapping[str, Tensor]) -> bool:
        """
        Add the batch's squares to `sums`, in place.

        Args:
            batch (`Mapping[str, Tensor]`): see `Batch`; padded on either side.
            sums (`Mapping[str, Tensor]`): running sums, float32, on the model's device.

        Returns:
            `bool`: whether all losses are finite. Gradients that are not show in `sums`.
        """
        packed = packed_right(batch, self.model.device)
        ids, labels, uniforms = packed.ids, packed.labels, packed.uniforms
        weights = batch.get("weights")
        scales = torch.ones(len(ids), device=ids.device) if weights is None else weights.to(ids.device).sqrt()
        row, position = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)  # (N): the position predicts its successor
        now = Pass(len(ids), ids.shape[1], packed.lengths, self.tokenwise, sums, self.scratch)
        with self._observed(now):
            hidden = self._hidden(ids)  # (B, T, D)
            losses, gradient, scored = self.head.forward_backward(
                hidden.detach()[row, position],
                labels[row, position + 1],
                scales[row],
                None if uniforms is None else uniforms[row, position + 1],
            )
            hidden.backward(torch.zeros_like(hidden).index_put_((row, position), gradient))
            embedded = self._table.collect() if self._tied else None
            if self.tokenwise:
                units = [slice(n, n + 1) for n in range(len(row))]
                embedded = _on_scored(embedded, row * now.positions + position, sums[self._head_name])
            else:
                ends = row.bincount(minlength=len(ids)).cumsum(0).tolist()
                units = [slice(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]
            if self._head_name not in self._leftover:
                bias = None if self._head_bias is None else sums[self._head_bias]
                self.head.square(scored, units, sums[self._head_name], bias, embedded)
            for rule in self._rules:
                if rule is not self._table or not (self._tied or rule.names & self._leftover):
                    rule.finish()
        if failed := now.failed - self._leftover:  # the table stays under observation when it is left, and fails again
            self.leave(failed)
            raise LeftOver(", ".join(sorted(failed)))
        if self._leftover:
            accumulate_squares(self.model, batch, sums, only=self._leftover)
        return bool(losses.isfinite().all())

    def _hidden(self, ids: Tensor) -> Tensor:
        # Padding lies behind, where causal attention never looks: no mask is needed, and gradients there are exactly 0.
        extra = {}
        if self._positions:  # one row per example, or a table of positions would add up what belongs to different ones
            extra["position_ids"] = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)
        return self.backbone(input_ids=ids, use_cache=False, **extra).last_hidden_state

    @contextmanager
    def _observed(self, now: Pass) -> Iterator[None]:
        """With the rules installed, and no parameter asking for a gradient of its own."""
        wanted = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        installed: list[Rule] = []
        try:
            for parameter in wanted:
                parameter.requires_grad_(False)
            for rule in self._rules:
                rule.now = now
                rule.install()
                installed.append(rule)
            yield
        finally:
            for rule in installed:
                rule.remove()
            for parameter in wanted:
                parameter.requires_grad_(True)


def _rules(model: PreTrainedModel, head: nn.Linear, names: Mapping[Tensor, str]) -> list[Rule]:
    """One rule per module whose parameters are its alone (but for the head's) and whose `forward` is a known one."""
    owners: dict[Tensor, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and module is not head:
                owners[parameter] = owners.get(parameter, 0) + 1
    found: list[Rule] = []
    for module in model.modules():
        own = {attribute: names[p] for attribute, p in module._parameters.items() if p is not None}
        shared = any(owners[p] > 1 for p in module._parameters.values() if p is not None and module is not head)
        if module is head or not own or shared or "forward" in module.__dict__:  # the last: somebody else's hook is there
            continue
        if isinstance(module, nn.Embedding) and module.max_norm is None and not module.scale_grad_by_freq:
            found.append(EmbeddingRule(module, own["weight"]))
        elif isinstance(module, (nn.Linear, Conv1D)) and type(module) in (nn.Linear, Conv1D):
            found.append(LinearRule(module, own["weight"], own.get("bias")))
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and type(module) not in (nn.LayerNorm, nn.RMSNorm):
            continue  # torch's functions take no copies of the weight, and what this one does with it is not known (Nemotron)
        elif "norm" in type(module).__name__.lower() and not any(module.children()) and set(own) <= {"weight", "bias"}:
            found.append(NormRule(module, own))
    return found


def _on_scored(embedded: Embedded | None, scored: Tensor, total: Tensor) -> Embedded | None:
    """For granularity `token`: rows at scored positions, by the number among these; the others stand alone and are squared."""
    if embedded is None:
        return None
    place = torch.searchsorted(scored, embedded.unit).clamp_(max=len(scored) - 1)
    meets = scored[place] == embedded.unit
    total.index_add_(0, embedded.token[~meets], embedded.gradient[~meets].square())
    return Embedded(place[meets], embedded.token[meets], embedded.gradient[meets])
