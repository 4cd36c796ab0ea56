"""
θ* read slice by slice: from the base model's own files, or, for a fold of Fishers with different bases, from the files that lie
beside its F.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from ..errors import FisherMismatchError
from .base import BaseModel, weight_files
from .files import Index, Reader, TensorFiles, reader_of, sha256_file
from .manifest import Manifest
from .records import ShardRecord

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


class FoldedAnchor:
    """
    The anchor θ̄ of a folded Fisher, which is no model's weights; read like [`AnchorTensors`], in float32.

    Args:
        read (`Callable`): name and slices → values.
        sha (`str`): fingerprint; that of the Fisher, which covers its anchor.
    """

    def __init__(self, read: Reader, sha: str) -> None:
        self._read, self.sha = read, sha

    def read(self, name: str, index: Index | None = None) -> Tensor:
        """Return θ̄ of parameter `name`, or of its part `index`, as float32 and in memory of its own."""
        return self._read(name, index)


def write_anchor(manifest: Manifest, read: Reader, folder: Path, plan: list[list[str]]) -> Manifest:
    """
    Write θ̄ of a folded Fisher beside its F. The names of the files are such that no library takes them for a model.

    Args:
        plan (`list[list[str]]`): the parameters of each file.

    Returns:
        [`Manifest`]: the same with the files' hashes.
    """
    assert manifest.fold is not None
    files = {}
    for number, names in enumerate(plan, start=1):
        path = folder / f"anchor-{number:05d}-of-{len(plan):05d}.safetensors"
        save_file({name: read(name, None).contiguous() for name in names}, path, metadata={"format": "hf_ewc.anchor"})
        files[path.name] = ShardRecord(sha256=sha256_file(path), size=path.stat().st_size)
    return replace(manifest, fold=replace(manifest.fold, anchor=files))


def anchor_files(folder: Path, manifest: Manifest) -> TensorFiles | None:
    """The stored anchor of a Fisher folder; `None` where the base model's weights are the anchor."""
    if manifest.fold is None or manifest.fold.anchor is None:
        return None
    return TensorFiles(folder / name for name in manifest.fold.anchor)


def anchor_problems(folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the tensors of a stored anchor, whose files are whole and have the recorded hashes."""
    try:
        files = anchor_files(folder, manifest)
    except SafetensorError as error:
        return [str(error)]
    if files is None:
        return []
    found = [
        f"{key} is in {files.home[key].name} but not in the manifest" for key in files.headers.keys() - manifest.parameters
    ]
    for name, shape in manifest.parameters.items():
        stored = files.headers.get(name)
        if stored is None:
            found.append(f"the anchor of {name} {shape} is in no file")
        elif stored != ("F32", shape):
            found.append(f"the anchor of {name} is {stored[0]} {stored[1]}, recorded is F32 {shape}")
        elif bad := int((~files.read(name).isfinite()).sum()):
            found.append(f"the anchor of {name} has {bad} values that are NaN or infinite")
    return found
