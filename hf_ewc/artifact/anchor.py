"""θ* read back from the base model's own files, slice by slice."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ..errors import FisherMismatchError
from .base import BaseModel, weight_files
from .files import Index, Reader, TensorFiles, reader_of

logger = logging.getLogger(__name__)


class AnchorTensors:
    """
    The weights θ* of a base model under their `named_parameters()` names, read from its safetensors files.

    From files, never from the live model: by the time a trainer starts, a resumed checkpoint has already replaced the
    weights in memory, and an anchor taken there would quietly move to wherever training had got to.

    Some checkpoints are renamed or restacked while transformers loads them (older Mixtral files, for one). Their keys
    are not parameter names; then the model is loaded once on the CPU, in the file's dtype, and its parameters are
    kept.

    Args:
        base ([`BaseModel`]): which model; found again by id and revision if it comes out of a manifest.
        names (`Iterable[str]`): the parameters that will be read.

    Raises:
        [`FisherMismatchError`]: when the base has no such parameters, or other weights lie in its place.
    """

    def __init__(self, base: BaseModel, names: Iterable[str]) -> None:
        self.base = base.located()
        assert self.base.folder is not None
        files = TensorFiles(weight_files(self.base.folder))
        self._read: Reader = files.read
        wanted = list(names)
        if all(name in files.headers for name in wanted):
            return
        logger.info("The files of '%s' use other names than its parameters; loading it once to read them.", base.label)
        model = AutoModelForCausalLM.from_pretrained(self.base.folder, dtype=getattr(torch, self.base.dtype))
        loaded = dict(model.named_parameters())
        if missing := [name for name in wanted if name not in loaded]:
            raise FisherMismatchError(
                f"the base model '{base.label}' ({self.base.architecture}) has no parameter {', '.join(missing[:5])}"
                f"{f' and {len(missing) - 5} more' if len(missing) > 5 else ''}, so there is no anchor to pull these back to. "
                "Name the model that the run starts from. Nothing was trained."
            )
        self._read = reader_of({name: loaded[name] for name in wanted})

    @property
    def sha(self) -> str:
        """Fingerprint of the weights that are read."""
        return self.base.fingerprint

    def read(self, name: str, index: Index | None = None) -> Tensor:
        """
        Return parameter `name`, or the part `index` of it, in the file's dtype and in memory of its own.

        Args:
            name (`str`): as in `named_parameters()`.
            index (`tuple[slice, ...]`, *optional*): slices of the leading dimensions; a shard of the parameter.
        """
        return self._read(name, index)
