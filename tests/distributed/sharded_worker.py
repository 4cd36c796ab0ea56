"""What two or three processes do for `test_sharded_fisher.py`: all its cases in one start, with the results in one folder.

`torchrun --nproc_per_node 2 sharded_worker.py FOLDER CASE …` leaves `CASE.safetensors` (whole sums, from rank 0) per case and
`RANK.json` (what each rank saw). The models, examples and losses in here are also what the test gives to one process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_ewc.cli.main import end_process
from hf_ewc.errors import ConfigError
from hf_ewc.fisher import Example, collate, prepared
from hf_ewc.fisher.sharded import ShardedSquares, shard, summed_loss

BAD = 90  # the examples with this token are the broken ones in the cases about NaN


class Twice(nn.Module):
    """Runs one layer twice in a pass; with reentrant checkpoints, each of the two has a backward pass of its own."""

    def __init__(self, layer: nn.Module, checkpoints: bool) -> None:
        super().__init__()
        self.layer, self.checkpoints = layer, checkpoints

    def forward(self, states, **kwargs):
        for _ in range(2):
            again = partial(self.layer, **kwargs)
            states = checkpoint(again, states, use_reentrant=True) if self.checkpoints else again(states)
        return states


def llama() -> PreTrainedModel:
    """Untied, grouped-query, with sizes that two processes cannot halve (321 words, 33 inner units)."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        sizes = dict(vocab_size=321, hidden_size=32, intermediate_size=33, num_hidden_layers=3)
        heads = dict(num_attention_heads=4, num_key_value_heads=2, attention_bias=True, max_position_embeddings=64)
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False)).eval()


def checkpointed() -> PreTrainedModel:
    model = tiny.make_model()
    model.activation_checkpointing_enable()
    return model


def loss_in_parts(model, rows):
    """Two backward passes, the first of them in here, as a loss that saves memory does: FSDP2 adds up the two gradients."""
    parts = []
    for keep in (slice(None, 4), slice(4, None)):
        labels = torch.full_like(rows["labels"], -100)
        labels[:, keep] = rows["labels"][:, keep]
        parts.append(summed_loss(model, {**rows, "labels": labels}))
        if len(parts) == 1:
            parts[0].backward()
    return parts[1]


def layer_twice(checkpoints: bool) -> PreTrainedModel:
    model = tiny.make_model()
    model.model.layers[0] = Twice(model.model.layers[0], checkpoints)
    return model


def shared_weight() -> PreTrainedModel:
    """Two layers with one matrix between them."""
    model = tiny.make_model(num_hidden_layers=3)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return model


def poisoned() -> PreTrainedModel:
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[BAD] = torch.nan
    return model


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "tied": tiny.make_model,
    "untied": llama,
    "checkpointed": checkpointed,
    "bfloat16": lambda: tiny.make_model().to(torch.bfloat16),
    "twice": lambda: layer_twice(checkpoints=False),
    "in_parts": lambda: layer_twice(checkpoints=True),
    "shared_weight": shared_weight,
    "poisoned": poisoned,
}


def examples(count: int = 7) -> list[Example]:
    """Of 5 to 11 tokens from a small vocabulary (so that examples share words), the first ones not scored."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for number in range(count):
        ids = torch.randint(3, 60, (5 + number,), generator=generator).tolist()
        prompt = 1 + number % 3
        found.append(Example(ids, [-100] * prompt + ids[prompt:]))
    return found


def with_bad(*numbers: int) -> list[Example]:
    """The examples, with `BAD` as the first, unscored word of some."""
    found = examples()
    for number in numbers:
        found[number] = Example([BAD, *found[number].input_ids[1:]], found[number].labels)
    return found


def weighted(example: Example) -> dict[str, torch.Tensor]:
    return {**collate([example]), "weights": torch.tensor([1 / len(example.input_ids)])}


def sampled(example: Example) -> dict[str, torch.Tensor]:
    """With the numbers by which labels are drawn from the model."""
    size, generator = len(example.input_ids), torch.Generator().manual_seed(len(example.input_ids))
    return {**collate([example]), "uniforms": torch.rand(1, size, generator=generator)}


def loss_with_nan_gradient(model, rows):
    """Finite for all rows, but NaN in the gradient of those with `BAD`: the slope of √x at 0, times 0."""
    loss = summed_loss(model, rows)
    return loss + (0 * loss).sqrt() if bool((rows["input_ids"] == BAD).any()) else loss


@contextmanager
def ready(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """`prepared`, but with gradient checkpointing switched on where the model has it: it works in training mode only."""
    with prepared(model) as sums:
        model.train(model.is_activation_checkpointing)
        yield sums


def each_its_own(squares: ShardedSquares, mine: list[Example | None]) -> list[list[bool]]:
    return [squares.accumulate(None if example is None else collate([example])) for example in mine]


def share(of: list[Example]) -> list[Example | None]:
    """This rank's examples, one per step; `None` where it has run out."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return [of[n + rank] if n + rank < len(of) else None for n in range(0, len(of), world)]


def lopsided(of: list[Example]) -> list[Example | None]:
    """The last rank gets one example, the first ones all the others."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    return [of[-1], *[None] * (len(of) - 2)] if rank == last else [e if rank == 0 else None for e in of[:-1]]


def squared_behind(squares: ShardedSquares, model: PreTrainedModel, mine: list[Example | None]) -> None:
    """The naive way: each rank its own example, and the square of what FSDP2 leaves in `.grad`."""
    for example in mine:
        loss = summed_loss(model, collate([example or examples(1)[0]])) * float(example is not None)
        loss.backward()
        for name, parameter in model.named_parameters():
            squares.sums[name] += (parameter.grad.to_local() * dist.get_world_size()) ** 2  # FSDP2 leaves the mean
            parameter.grad = None


def run(case: str, folder: Path) -> dict:
    """One case on all ranks; returns what this rank saw."""
    name, _, how = case.partition("-")
    model = MODELS[name]()
    whole = {name: parameter.numel() for name, parameter in model.named_parameters()}
    if how == "coarse":
        fully_shard(model)  # as somebody else might, with gradients reduced in the dtype of the weights
    else:
        shard(model)
    with ready(model):
        forwards: list[int] = []
        model.model.layers[-1].mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
        mode = {"same": "same_example", "nansame": "same_example", "batchsame": "same_example"}.get(how)
        loss = {"nangrad": loss_with_nan_gradient, "parts": loss_in_parts}.get(how, summed_loss)
        try:
            squares = ShardedSquares(model, loss, mode)
        except ConfigError as error:
            return {"error": str(error)}
        forwards.clear()
        counted: list[list[bool]] = []
        if how in ("", "same", "parts"):
            counted = each_its_own(squares, share(examples()))
        elif how == "lopsided":
            counted = each_its_own(squares, lopsided(examples()))
        elif how.startswith("nan"):
            counted = each_its_own(squares, share(with_bad(0, 4, 5)))
        elif how.startswith("batch"):  # two global batches: 3 + 1 rows, then 2 + none
            parts = [[slice(0, 3), slice(4, 6)], [slice(3, 4), None]][dist.get_rank()]
            counted = [squares.accumulate_batch(None if p is None else collate(examples()[p])) for p in parts]
        elif how == "weighted":
            counted = [squares.accumulate(None if e is None else weighted(e)) for e in share(examples())]
        elif how == "sampled":
            counted = [squares.accumulate(None if e is None else sampled(e)) for e in share(examples())]
        elif how == "resumed":
            each_its_own(squares, share(examples())[:2])
            saved = {name: total.clone() for name, total in squares.sums.items()}
            squares = ShardedSquares(model)
            for name, total in squares.sums.items():
                total.copy_(saved[name])
            counted = each_its_own(squares, share(examples())[2:])
        elif how == "behind":
            squared_behind(squares, model, share(examples()))
        full = {name: squares.full(name).contiguous() for name in squares.sums}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    if dist.get_rank() == 0:
        save_file(full, folder / f"{case}.safetensors")
    return {
        "mode": squares.mode,
        "self_check": squares.self_check,
        "counted": counted,
        "forwards": len(forwards),
        "numbers": {name: total.numel() for name, total in squares.sums.items()},
        "whole": whole,
        "dtypes": sorted({str(total.dtype) for total in squares.sums.values()}),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    target = Path(sys.argv[1])
    seen = {case: run(case, target) for case in sys.argv[2:]}
    (target / f"{dist.get_rank()}.json").write_text(json.dumps(seen))
    end_process(0)
