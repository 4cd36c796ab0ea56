"""[`FisherInformation`]: read, write, slice and mix the diagonal Fisher of a base model."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import Tensor

from .. import __version__
from ..errors import EWCError, FisherFormatError
from . import fit
from .base import BaseModel
from .codec import CODECS
from .files import Index, Reader, reader_of
from .manifest import EstimatorRecord, Manifest, ProbeRecord, Storage, Totals
from .mix import mixture
from .summary import range_problem, sum_and_zeros
from .verify import MANIFEST, open_verified
from .write import write_folder

logger = logging.getLogger(__name__)


class FisherInformation:
    r"""
    The diagonal Fisher information of a base model: one tensor ≥ 0 per parameter, and the record of what it was
    measured on.

    It holds the *sums* of squared per-example gradients, and T, the scored tokens that they are sums over. A penalty
    takes [`FisherInformation.per_token`], $F_i = S_i / T$, so that ½ Σᵢ Fᵢ (θᵢ − θ*ᵢ)² reads as nats per probe token.
    Values come lazily, tensor by tensor or slice by slice: a 2 B-parameter Fisher never needs to be in memory as a
    whole.

    Example:

    ```py
    >>> fisher = estimate_fisher("google/gemma-2-2b", FisherConfig(probe="mmlu"))
    >>> fisher.save_pretrained("gemma-2-2b-fisher-mmlu")
    >>> fisher = FisherInformation.from_pretrained("gemma-2-2b-fisher-mmlu")
    >>> fisher.per_token("model.norm.weight", (slice(0, 4),))
    ```

    Attributes:
        manifest ([`Manifest`]): base model, probes, estimator, storage, totals.
        source (`str`): folder it was loaded from, or `"<memory>"`.
    """

    def __init__(self, manifest: Manifest, read: Reader, source: str) -> None:
        self.manifest, self.source, self._read = manifest, source, read

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        *,
        base: BaseModel,
        probes: Sequence[ProbeRecord],
        estimator: EstimatorRecord,
    ) -> FisherInformation:
        """
        Wrap sums of squares in memory. The tensors are not copied: leave them alone from here on.

        Args:
            tensors (`Mapping[str, torch.Tensor]`): float32 sums of squares by `named_parameters()` name, tied weights
                once.
            base ([`BaseModel`]): the model they were measured at.
            probes (`Sequence[ProbeRecord]`): what it was measured on.
            estimator ([`EstimatorRecord`]): how, with the `normalizer`.

        Raises:
            [`FisherFormatError`]: for tensors that are no sums of squares: not float32, NaN, infinite, negative.
        """
        held = dict(tensors)
        problems = []
        for name, tensor in held.items():
            problem = range_problem(tensor)
            if tensor.dtype != torch.float32:
                problem = f"is {tensor.dtype}, not torch.float32, in which small squares vanish or sums stop growing"
            if problem:
                problems.append(f"{name} {problem}")
        manifest = Manifest(
            base_model=base,
            probes=list(probes),
            estimator=estimator,
            storage=Storage(codec="float32", shards={}),
            parameters={name: tuple(tensor.shape) for name, tensor in held.items()},
            totals=Totals(num_parameters=0, trace=0.0, zeros=0),
            versions=_versions(),
        )
        problems += manifest.problems()
        if problems:
            listed = "\n".join(f"  - {problem}" for problem in problems)
            raise FisherFormatError(f"these tensors are not a Fisher:\n{listed}\nNothing was written.")
        return cls(_with_totals(manifest, reader_of(held)), reader_of(held), "<memory>")

    @classmethod
    def from_pretrained(cls, folder_or_id: str | os.PathLike[str], revision: str | None = None) -> FisherInformation:
        """
        Open a folder that [`FisherInformation.save_pretrained`] wrote, after checking all of it.

        Args:
            folder_or_id (`str` or `PathLike`): the folder. Hub ids come with a later version.
            revision (`str`, *optional*): for Hub ids.

        Raises:
            [`FisherFormatError`]: when anything in it is damaged, missing, edited, or of a newer format.
            [`EWCError`]: when there is no such folder.
        """
        source = os.fspath(folder_or_id)
        manifest, files = open_verified(locate(source, revision), source)
        codec = CODECS[manifest.storage.codec]
        return cls(manifest, lambda name, index: codec.decode(name, files.read, index), source)

    @classmethod
    def mix(cls, fishers: Sequence[FisherInformation], weights: Sequence[float] | None = None) -> FisherInformation:
        """
        One Fisher for several probes of the same base, Σₖ wₖ Sₖ / Tₖ with the weights scaled to sum 1.

        Each is first divided by its own tokens, so a probe with many tokens does not drown a small one. The mixture
        is lazy: it reads its parts when it is read, so keep their folders until it is saved.

        Args:
            fishers (`Sequence[FisherInformation]`): of the same base weights and tokenizer, and the same kind.
            weights (`Sequence[float]`, *optional*): one per Fisher, ≥ 0. Equal by default.

        Raises:
            [`FisherMismatchError`]: when they do not belong together.
        """
        manifest, read = mixture(list(fishers), weights)
        return cls(_with_totals(manifest, read), read, "<memory>")

    @property
    def names(self) -> list[str]:
        """Parameters in the order of `named_parameters()`."""
        return list(self.manifest.parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.manifest.parameters[name]

    def __contains__(self, name: object) -> bool:
        return name in self.manifest.parameters

    def __len__(self) -> int:
        return len(self.manifest.parameters)

    def __repr__(self) -> str:
        probes = ", ".join(probe.kind for probe in self.manifest.probes)
        base = self.manifest.base_model.label
        return (
            f"FisherInformation({self.source!r}, base={base!r}, probes={probes!r}, tensors={len(self)}, trace={self.trace:.4g})"
        )

    @property
    def normalizer(self) -> float:
        """Scored tokens T that the stored values are sums over; 1.0 for a mixture."""
        return self.manifest.estimator.normalizer

    @property
    def trace(self) -> float:
        """Σᵢ Fᵢ, per scored token."""
        return self.manifest.totals.trace

    @property
    def sha256(self) -> str:
        """The manifest's digest. It covers the hashes of the files, so it identifies a *stored* artifact down to the bit."""
        return self.manifest.digest

    def read(self, name: str, index: Index | None = None) -> Tensor:
        """
        Stored values (sums of squares) of parameter `name` as float32, in memory of their own.

        Args:
            name (`str`): as in `named_parameters()`.
            index (`tuple[slice, ...]`, *optional*): slices of the leading dimensions; only these are read from disk.
        """
        return self._read(name, index)

    def per_token(self, name: str, index: Index | None = None) -> Tensor:
        """F of the penalty: [`FisherInformation.read`] divided by `normalizer`."""
        return self.read(name, index).div_(self.normalizer)

    def check_base(self, base: BaseModel, tokenizer: Any = None) -> None:
        """
        Refuse a model that this was not measured on. Equal shapes prove nothing: all fine-tunes of one model share
        them.

        Args:
            base ([`BaseModel`]): the model that is to be trained, or its anchor.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): the one that training uses. Defaults to the one beside
                the weights.

        Raises:
            [`FisherMismatchError`]: names weights, architecture, vocabulary and tokenizer where they differ, with
            both values.
        """
        fit.check_base(self.manifest, self.source, base, tokenizer)

    def check_parameters(self, shapes: Mapping[str, tuple[int, ...]], missing: str = "error") -> list[str]:
        """
        Compare the parameters with those of a model.

        Args:
            shapes (`Mapping[str, tuple[int, ...]]`): of all the model's parameters by name.
            missing (`str`, *optional*, defaults to `"error"`): `"ignore"` permits parameters that the Fisher lacks or
                holds in another shape. Tensors that the *model* lacks are always an error: what they protect could
                not be protected.

        Returns:
            `list[str]`: names that the Fisher does not cover; empty unless `missing="ignore"`.

        Raises:
            [`FisherMismatchError`]: lists each tensor with both shapes.
        """
        return fit.check_parameters(self.manifest, self.source, shapes, missing)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        codec: str = "bfloat16",
        max_shard_size: int | str = "5GB",
        overwrite: bool = False,
    ) -> Path:
        """
        Write the artifact: safetensors shards, index, manifest, summary and card. All of it appears at once or not at
        all.

        Saving a loaded Fisher with another `codec` recodes it; one tensor and one shard are in memory at a time.

        Args:
            folder (`str` or `PathLike`): where to. New or empty, unless `overwrite`.
            codec (`str`, *optional*, defaults to `"bfloat16"`): `"bfloat16"` (relative error at most 2⁻⁹) or
                `"float32"` (exact).
            max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): bytes of tensors per file; a larger
                tensor gets its own.
            overwrite (`bool`, *optional*, defaults to `False`): replace a Fisher that lies there. Other files are
                never deleted.

        Returns:
            `Path`: the folder.

        Raises:
            [`EWCError`]: when the folder holds something. The old state stays.
        """
        target = Path(folder).expanduser()
        write_folder(self.manifest, self._read, target, codec, max_shard_size, overwrite)
        return target


def locate(folder_or_id: str, revision: str | None = None) -> Path:
    """Folder of a Fisher on this machine. The one place that will learn to pull from the Hub."""
    path = Path(folder_or_id).expanduser()
    if path.is_dir():
        if revision is not None:
            logger.warning("revision '%s' is ignored: '%s' is a local folder.", revision, folder_or_id)
        return path
    if path.is_file():
        raise FisherFormatError(f"'{folder_or_id}' is a file. Name the folder that holds {MANIFEST}; pickles are not read.")
    try:
        validate_repo_id(folder_or_id)
        is_id = "/" in folder_or_id
    except HFValidationError:
        is_id = False
    if not is_id:
        raise EWCError(
            f"there is no folder '{folder_or_id}'. Estimate a Fisher first: `hf-ewc fisher … --output_dir {folder_or_id}`."
        )
    pinned = f", revision={revision!r}" if revision else ""
    raise EWCError(
        f"there is no folder '{folder_or_id}'. If it is a dataset on the Hub: this version reads local folders only, "
        "pulling comes with a later one. Download it first, in Python, and name the folder that this returns:\n"
        f'    huggingface_hub.snapshot_download({folder_or_id!r}, repo_type="dataset"{pinned})'
    )


def _with_totals(manifest: Manifest, read: Reader) -> Manifest:
    counted = [sum_and_zeros(read(name, None)) for name in manifest.parameters]
    totals = Totals(
        num_parameters=sum(prod(shape) for shape in manifest.parameters.values()),
        trace=math.fsum(total for total, _ in counted) / manifest.estimator.normalizer,
        zeros=sum(zeros for _, zeros in counted),
    )
    return replace(manifest, totals=totals)


def _versions() -> dict[str, str]:
    libraries = ("torch", "transformers", "datasets", "safetensors", "tokenizers")
    return {"hf_ewc": __version__, **{name: version(name) for name in libraries}}
