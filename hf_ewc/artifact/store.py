"""[`FisherInformation`]: read, write, slice, mix and fold the diagonal Fisher of a base model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet as pq
from huggingface_hub import constants
from torch import Tensor

from ..errors import FisherFormatError
from ..hub import Pushed, PushPlan
from . import fit
from .anchor import AnchorTensors, FoldedAnchor, anchor_files
from .base import BaseModel
from .card import render_card
from .codec import CODECS
from .files import Index, Reader, reader_of, replaced_folder
from .fold import folded
from .locate import Place, locate, pinned
from .manifest import EstimatorRecord, Manifest, ProbeRecord, digest_of
from .memory import described, with_totals
from .mix import mixture
from .push import push_folder
from .streamed import open_streamed
from .verify import CARD, INDEX, MANIFEST, SUMMARY, open_verified
from .write import check_target, write_folder


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
        source (`str`): folder or Hub id that it was loaded from, or `"<memory>"`.
        place ([`Place`], *optional*): the folder and, for one from the Hub, the repository and its commit; `None` for one that
            is in memory only.
        parts (`list[FisherInformation]`): what it was folded from, oldest first, if that was done in this process.
    """

    def __init__(self, manifest: Manifest, read: Reader, source: str, anchor: Reader | None = None) -> None:
        self.manifest, self.source, self._read, self._anchor = manifest, source, read, anchor
        self.parts: list[FisherInformation] = []
        self.place: Place | None = None

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
        manifest = described(held, base, probes, estimator)
        return cls(with_totals(manifest, reader_of(held)), reader_of(held), "<memory>")

    @classmethod
    def from_pretrained(
        cls,
        folder_or_id: str | os.PathLike[str],
        revision: str | None = None,
        *,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        streaming: bool = False,
    ) -> FisherInformation:
        """
        Open a Fisher from a folder or from the Hub, after checking all of it.

        Args:
            folder_or_id (`str` or `PathLike`): a folder that [`FisherInformation.save_pretrained`] wrote, or a dataset
                repository on the Hub: `"user/name"` or `"user/name@revision"`.
            revision (`str`, *optional*): branch, tag or commit on the Hub. It is pinned to a commit before anything is read.
            token (`str` or `bool`, *optional*): for the Hub; the stored one by default.
            cache_dir (`PathLike`, *optional*): of the Hub's client.
            streaming (`bool`, *optional*, defaults to `False`): leave the values on the Hub, and read by HTTP ranges what
                [`FisherInformation.read`] asks for: a process that needs a slice transfers a slice, and no disk is used. The
                files' hashes are compared with the Hub's own record of them, the values are checked as they come.

        Raises:
            [`FisherFormatError`]: when anything in it is damaged, missing, edited, or of a newer format.
            [`EWCError`], [`HubError`]: when there is no such folder and no such repository, or no access.
        """
        source = os.fspath(folder_or_id)
        if streaming and not Path(source).expanduser().is_dir() and not constants.is_offline_mode():  # then from the cache
            return cls._streamed(source, revision, token, cache_dir)
        place = locate(source, revision, token, None if cache_dir is None else Path(cache_dir))
        assert place.folder is not None
        try:
            manifest, files = open_verified(place.folder, place.label)
        except FisherFormatError as error:
            if place.repo_id is None:
                raise
            raise FisherFormatError(
                f"{error}\nIt is the copy of {place.label} in the Hub's cache. Delete that and run the same command again: "
                f"`hf cache rm dataset/{place.repo_id}` (repositories with the same file share one copy: delete those, too). "
                "If it is damaged then, too, it is so on the Hub."
            ) from None
        codec, anchor = CODECS[manifest.storage.codec], anchor_files(place.folder, manifest)
        fisher = cls(
            manifest, lambda name, index: codec.decode(name, files.read, index), source, anchor.read if anchor else None
        )
        fisher.place = place
        return fisher

    @classmethod
    def _streamed(
        cls, source: str, revision: str | None, token: str | bool | None, cache_dir: str | os.PathLike[str] | None
    ) -> FisherInformation:
        cache = None if cache_dir is None else Path(cache_dir)
        repo_id, commit = pinned(source, revision, token, cache)
        manifest, read, anchor = open_streamed(repo_id, commit, token, cache)
        fisher = cls(manifest, read, source, anchor)
        fisher.place = Place(None, repo_id, commit)
        return fisher

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
        return cls(with_totals(manifest, read), read, "<memory>")

    @classmethod
    def fold(
        cls, fishers: Sequence[FisherInformation], decay: float = 1.0, bases: Sequence[BaseModel] = ()
    ) -> FisherInformation:
        r"""
        Several (Fisher, anchor) pairs as one, exactly: for all θ,

        $$\sum_k \tfrac{c_k}{2} \sum_i F_{k,i} (\theta_i - \theta_{k,i})^2
        = \tfrac12 \sum_i F_i (\theta_i - \bar\theta_i)^2 + \text{const},$$

        with F = Σₖ cₖFₖ and θ̄ = Σₖ cₖFₖθₖ / F. So a model that learned one task after another holds on to all of them at the
        price of one; training goes on from the newest base. Fishers of the same base give their sum, with that base as the
        anchor; else [`FisherInformation.save_pretrained`] stores θ̄, too. Like a mixture it is lazy, but its totals and the
        constant take one pass over all Fishers and anchors.

        Args:
            fishers (`Sequence[FisherInformation]`): oldest first; of one architecture, vocabulary and tokenizer. Each one's
                anchor is its own base model, or for one that was folded, the one that it brings.
            decay (`float`, *optional*, defaults to 1.0): γ in (0, 1]; each Fisher counts cₖ = γ^(number of later ones), as in
                online EWC (Schwarz et al. 2018, https://arxiv.org/abs/1805.06370). Unlike there, older Fishers keep pulling
                to their own anchors instead of to the newest.
            bases (`Sequence[BaseModel]`, *optional*): base models whose folder is known, for manifests that name one that has
                moved. Recognised by their weights.

        Returns:
            [`FisherInformation`]: with `manifest.fold`; a single Fisher is returned as it is.

        Raises:
            [`ConfigError`], [`FisherMismatchError`], [`DataError`]: a senseless decay, Fishers that do not belong together, an
            anchor that is not to be found.
        """
        parts = list(fishers)
        manifest, read, anchor = folded(parts, decay, bases)
        if len(parts) == 1:
            return parts[0]
        fold = cls(manifest, read, " + ".join(part.source for part in parts), anchor)
        fold.parts = parts
        return fold

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
        fold = self.manifest.fold
        if fold is not None and self.parts:  # summed anew in each process, maybe to another last bit: its parts identify it
            return digest_of({"fold": [part.sha256 for part in self.parts], "decay": fold.decay})
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

    @property
    def has_own_anchor(self) -> bool:
        """Whether θ* is not the base model's weights: only after a fold of Fishers with different bases."""
        return self._anchor is not None

    def anchor(self, names: Iterable[str], base: BaseModel | None = None) -> AnchorTensors | FoldedAnchor:
        """
        The anchor θ* that the penalty pulls back to, with `read(name, index)` and `sha`.

        Args:
            names (`Iterable[str]`): the parameters that will be read.
            base ([`BaseModel`], *optional*): where the base model lies. Found by the manifest's id by default.

        Raises:
            [`DataError`], [`FisherMismatchError`]: when the base model is not to be found, or other weights lie in its place.
        """
        if self._anchor is not None:
            return FoldedAnchor(self._anchor, self.sha256)
        return AnchorTensors(base or self.manifest.base_model, names)

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
            codec (`str`, *optional*, defaults to `"bfloat16"`): `"bfloat16"` (relative error at most 2⁻⁸) or
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
        write_folder(self.manifest, self._read, target, codec, max_shard_size, overwrite, self._anchor)
        return target

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        revision: str | None = None,
        tag: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        token: str | bool | None = None,
        dry_run: bool = False,
    ) -> Pushed | PushPlan:
        """
        Publish the artifact as a dataset repository: files, card and a picture, in one commit. Who pulls meanwhile gets the
        whole old state or the whole new one. Broken off, it is repeated with the same call; what the Hub has is not sent again,
        and where all of it is there, no commit is made.

        A Fisher that is in memory only is first saved to a temporary folder, as [`FisherInformation.save_pretrained`] does it
        by default.

        Args:
            repo_id (`str`): `"user/name"`.
            private (`bool`, *optional*, defaults to `True`): of a repository that is created by this. One that exists stays as
                it is.
            revision (`str`, *optional*): branch to push to; made from `main` if it is new.
            tag (`str`, *optional*): for the commit, such as `"v1"`.
            commit_message (`str`, *optional*)
            create_pr (`bool`, *optional*, defaults to `False`): open a pull request instead.
            token (`str` or `bool`, *optional*): the stored one by default.
            dry_run (`bool`, *optional*, defaults to `False`): send nothing, and return the [`PushPlan`].

        Returns:
            [`Pushed`]: with the `commit` by which others pin it, and its `url`.

        Raises:
            [`HubError`]: no access, a tag that is taken, somebody pushed in between, a repository of something else.
            [`FisherFormatError`]: the files were damaged since they were written.
        """
        options: dict[str, Any] = dict(revision=revision, message=commit_message, tag=tag, token=token, dry_run=dry_run)
        if not dry_run:
            options |= dict(private=private, create_pr=create_pr)
        if self.place is not None and self.place.folder is not None:
            return push_folder(self.place.folder, repo_id, **options)
        codec = "bfloat16" if self.place is None else self.manifest.storage.codec  # what is streamed stays as it is
        with TemporaryDirectory(prefix="hf-ewc-") as scratch:
            return push_folder(self.save_pretrained(Path(scratch) / "fisher", codec=codec), repo_id, **options)

    def copy_to(self, folder: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Copy the stored files as they are, bit by bit; all of it appears at once or not at all. See `save_pretrained`."""
        if self.place is None or self.place.folder is None:
            return self.save_pretrained(folder, overwrite=overwrite)
        target = Path(folder).expanduser()
        check_target(target, overwrite)
        with replaced_folder(target) as fresh:
            for name in (MANIFEST, INDEX, SUMMARY, *self.manifest.files):
                (fresh / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(self.place.folder / name, fresh / name)
            rows = pq.read_table(fresh / SUMMARY).to_pylist()
            (fresh / CARD).write_text(render_card(self.manifest, rows=rows), encoding="utf-8")
        return target
