"""Several processes: are they as many as were asked for, how FSDP2 spreads a model over them, and what they exchange."""

from __future__ import annotations

import inspect
import logging
import os
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional
from transformers import PreTrainedModel

from ..errors import ConfigError
from .examples import IGNORED
from .head import draw
from .per_example import Batch, packed_right

logger = logging.getLogger(__name__)


def check_world(expected: int | None) -> int:
    """
    The number of processes, after a look that it is the `expected` one (`None`: any).

    Raises:
        [`ConfigError`]: another number of processes was started. Each would do all of the work, or wait for the others forever.
    """
    started = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if expected is not None and started != expected:
        raise ConfigError(
            f"`num_processes: {expected}` was asked for, but the launcher started {started}. `accelerate launch` "
            "with `use_cpu` or without `--multi_gpu` silently starts one process, and so does plain `python`. Start it with "
            f"`torchrun --nproc_per_node {expected} …` or `accelerate launch --multi_gpu --num_processes {expected} …`, or set "
            f"`num_processes: {started}`. Nothing was estimated."
        )
    return started


def shard(model: PreTrainedModel, mesh: DeviceMesh | None = None) -> None:
    """
    Spread a model's weights over all processes with FSDP2, in place: every decoder layer is one unit, the rest is another.

    All processes call it with equal weights; those on the CPU move to the mesh's device unit by unit, so that a device never
    holds the whole model. A weight with two homes (a tied embedding and head) has to be in one unit, so that its gradient is
    complete before it is squared: a layer that shares a weight with anything outside stays with the rest.

    Args:
        model ([`~transformers.PreTrainedModel`]): one floating dtype throughout.
        mesh ([`~torch.distributed.device_mesh.DeviceMesh`], *optional*):
            One-dimensional. Defaults to all processes on the accelerator if there is one, else on the CPU (gloo).
    """
    if mesh is None:
        accelerator = torch.accelerator.current_accelerator()
        mesh = init_device_mesh("cpu" if accelerator is None else accelerator.type, (check_world(None),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    kinds = set(model._no_split_modules or ())  # the class names of the decoder layers
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    homes = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
    for layer in layers:
        inside = Counter(parameter for _, parameter in layer.named_parameters(remove_duplicate=False))
        if all(homes[parameter] == count for parameter, count in inside.items()):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
    if not layers:
        logger.warning(
            "%s does not name its layers (`_no_split_modules`), so all of it is one unit: each process holds the whole weights "
            "and the whole gradient during a pass. The result is the same.",
            type(model).__name__,
        )
    fully_shard(model, mesh=mesh, mp_policy=policy)


class SquaringReduceScatter:
    """
    FSDP2's reduce-scatter (its `ReduceScatter` interface), which may square what it gets before it sums over ranks.

    Attributes:
        own (`list[Tensor]`): () for each unit of the model; not finite where this rank's own gradient, or its square, is not.
        reduced (`Tensor`, *optional*): (numbers of a unit on this rank) float32: what came out last.
    """

    def __init__(self) -> None:
        self.start(None)

    def start(self, send: Literal["squares", "gradients", "silence"] | None) -> None:
        """What this rank sends in the next pass: `"silence"` is exact zeros, whatever was computed; `None` is plain FSDP2."""
        self._send = send
        self.own: list[Tensor] = []
        self.reduced: Tensor | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: dist.ReduceOp, async_op: bool = False
    ) -> dist.Work | None:
        if self._send is not None:
            if input_tensor.dtype != torch.float32:
                raise ConfigError(
                    f"this model was sharded with gradients reduced in {input_tensor.dtype}, where squares lose their digits. "
                    "Shard it with `MixedPrecisionPolicy(reduce_dtype=torch.float32)`, as `hf_ewc.fisher.sharded.shard` does."
                )
            if self._send == "silence":
                input_tensor.zero_()
            elif self._send == "squares":
                self.own.append(input_tensor.square_().sum())
            else:
                self.own.append(torch.linalg.vector_norm(input_tensor))
            self.reduced = output_tensor
        return dist.reduce_scatter_single(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


def summed_loss(model: PreTrainedModel, rows: Batch) -> Tensor:
    """
    Σ over rows of √w · (−Σ log p of its scored tokens), () float32: so the square of a single row has weight w.

    One forward pass, however many rows there are: each pass gathers the weights from all processes, which have to be as many.
    """
    packed = packed_right(rows, model.device)
    scored = packed.labels[:, 1:] != IGNORED  # (B, T - 1)
    columns = scored.any(0).nonzero()[:, 0]
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    extra = {"logits_to_keep": columns} if keeps else {}
    logits = model(input_ids=packed.ids, attention_mask=packed.mask.long(), use_cache=False, **extra).logits
    logits = (logits if keeps else logits[:, columns])[scored[:, columns]].float()  # (S, V)
    targets = packed.labels[:, 1:][scored]
    if packed.uniforms is not None:
        targets = draw(logits.detach(), packed.uniforms[:, 1:][scored])
    losses = functional.cross_entropy(logits, targets, reduction="none")
    if "weights" in rows:
        losses = losses * rows["weights"].to(losses.device).sqrt()[scored.nonzero()[:, 0]]
    return losses.sum()
