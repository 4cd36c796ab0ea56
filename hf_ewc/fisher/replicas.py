"""Several processes that estimate one Fisher: each a whole model and a share of the examples, one sum at the end."""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError
from .processes import check_world


@dataclass(frozen=True)
class Replicas:
    """This process among those of the run: `rank` of `size`. For `size` 1, nothing is communicated."""

    rank: int = 0
    size: int = 1

    @classmethod
    def joined(cls, expected: int | None = None, device: str | None = None) -> Replicas:
        """
        Join the other processes that the launcher started, if it started any.

        Args:
            expected (`int`, *optional*): `num_processes` of the configuration.
            device (`str`, *optional*): where the model will be, if that was chosen: NCCL exchanges no tensors of the CPU.

        Raises:
            [`ConfigError`]: another number of processes is there.
        """
        size = check_world(expected)
        if size > 1 and not dist.is_initialized():
            cuda = torch.cuda.is_available() and (device is None or torch.device(device).type == "cuda")
            if cuda:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group("nccl" if cuda else "gloo")
            atexit.register(_leave)
        return cls(dist.get_rank(), size) if dist.is_initialized() else cls()

    @property
    def device(self) -> torch.device:
        """The accelerator of this process, or the CPU."""
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is None:
            return torch.device("cpu")
        return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0"))) if self.size > 1 else accelerator

    def add_up(self, sums: Mapping[str, Tensor]) -> None:
        """Replace each tensor, in place, by its sum over all processes."""
        if self.size > 1:
            for total in sums.values():
                dist.all_reduce(total)

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, in the order of ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def check_same(self, identity: Mapping[str, Any]) -> None:
        """Raise a [`ConfigError`] unless all processes estimate the same thing."""
        for rank, other in enumerate(self.gather(dict(identity))):
            if different := [key for key in identity if other.get(key) != identity[key]]:
                key = different[0]
                raise ConfigError(
                    f"process {self.rank} and process {rank} do not estimate the same Fisher: `{key}` is {identity[key]} "
                    f"here and {other.get(key)} there. Give all the same model, data and settings. Nothing was estimated."
                )


def _leave() -> None:
    if dist.is_initialized():  # gloo's threads abort the process (exit code −6) if they still run when it ends
        dist.destroy_process_group()
