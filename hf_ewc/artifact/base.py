"""Which model θ* is: an id, a commit, and the hashes of its weight files."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer

from ..errors import DataError, FisherMismatchError, HubError
from ..hub import fetch, is_repo_id, pin
from .files import TensorFiles, sha256_file

logger = logging.getLogger(__name__)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab.*", "merges.txt")
_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def tokenizer_sha256(tokenizer: Any) -> str:
    """
    Hash of what a tokenizer does to text, the same before and after `save_pretrained`.

    A fast tokenizer is hashed as its `tokenizers` JSON without `padding` and `truncation`, which every call with
    `padding=True` rewrites; a slow one as its sorted vocabulary. Roles such as `pad_token` are not part of it: TRL
    sets `pad_token = eos_token` when there is none, and that changes no token id.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): fast or slow tokenizer.

    Returns:
        `str`: 64 hexadecimal digits.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = sorted(tokenizer.get_vocab().items())
    else:
        content = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class BaseModel:
    """
    A base model, pinned: the θ* that a Fisher was measured at and that a penalty pulls back to.

    Two are equal when their weights are: `id`, `revision` and `folder` only say where they were found.

    Args:
        id (`str`): Hub id, or the local folder as the user gave it.
        revision (`str`, *optional*): 40-digit commit of a Hub model, `None` for a local folder.
        fingerprint (`str`): sha256 over the sorted lines `"{file name} {sha256}"` of the weight files.
        architecture (`str`): class name in `config.json`, for example `"Gemma2ForCausalLM"`.
        num_parameters (`int`): numbers in the weight files; a tied table counts once.
        vocab_size (`int`): rows of the embedding according to the config.
        dtype (`str`): dtype of most of the numbers, for example `"bfloat16"`.
        tokenizer_sha256 (`str`, *optional*): see [`tokenizer_sha256`]; `None` when no tokenizer lies beside the
            weights.
        files_sha256 (`dict[str, str]`): hash of each weight file.
        folder (`Path`, *optional*): where the files lie on this machine. Not part of the JSON; `None` until
            [`BaseModel.located`] after a round trip through it.
    """

    id: str = field(compare=False)
    revision: str | None = field(compare=False)
    fingerprint: str
    architecture: str
    num_parameters: int
    vocab_size: int
    dtype: str
    tokenizer_sha256: str | None
    files_sha256: dict[str, str] = field(hash=False)
    folder: Path | None = field(default=None, compare=False, repr=False)

    @classmethod
    def resolve(cls, model_id: str | Path, revision: str | None = None) -> BaseModel:
        """
        Find a model, hash its weight files, and read the rest from headers and config. The model itself is not loaded.

        A Hub id is pinned to a commit *first*, then downloaded (or taken from the cache when offline): asking for the
        commit after loading could name a newer one than was loaded. In the Hub's cache, a weight file is a link to a
        blob that is named by its sha256, so nothing needs to be hashed again.

        Args:
            model_id (`str` or `Path`): local folder, or id on the Hub.
            revision (`str`, *optional*): branch, tag or commit on the Hub.

        Raises:
            [`DataError`]: when there is no such model, or no safetensors weights in it.
        """
        name, local = str(model_id), Path(model_id).expanduser()
        if local.is_dir():
            if revision is not None:
                logger.warning("revision '%s' is ignored: '%s' is a local folder, not a model on the Hub.", revision, name)
            folder, commit = local, None
        elif local.exists():
            raise DataError(f"the base model '{name}' is a file. Name the folder that holds config.json and the weights.")
        else:
            folder, commit = _pull(name, revision)
        weights = weight_files(folder)
        try:
            headers = TensorFiles(weights).headers.values()
        except SafetensorError as error:
            raise DataError(f"the base model '{name}' is damaged: {error}. Copy or download it again.") from None
        sizes: Counter[str] = Counter()
        for kind, shape in headers:
            sizes[kind] += prod(shape)
        try:
            config = AutoConfig.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise DataError(f"the base model '{name}' has no config.json that transformers can read: {error}") from None
        hashes = {path.name: _blob_sha256(path) for path in weights}
        main_dtype = sizes.most_common(1)[0][0]
        return cls(
            id=name,
            revision=commit,
            fingerprint=fingerprint(hashes),
            architecture=(config.architectures or [type(config).__name__])[0],
            num_parameters=sum(sizes.values()),
            vocab_size=config.get_text_config().vocab_size,
            dtype=_DTYPES.get(main_dtype, main_dtype),
            tokenizer_sha256=_folder_tokenizer(folder),
            files_sha256=hashes,
            folder=folder,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BaseModel:
        """Inverse of [`BaseModel.to_dict`]; `folder` stays unknown."""
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        del data["folder"]
        return data

    @property
    def label(self) -> str:
        """How messages and cards name it: `google/gemma-2-2b@4f1c2d0`, or the folder."""
        return f"{self.id}@{self.revision[:7]}" if self.revision else self.id

    def same_weights(self, other: BaseModel) -> bool:
        """Whether both are the same weight files, byte for byte, wherever they lie."""
        return self.fingerprint == other.fingerprint

    def located(self) -> BaseModel:
        """
        This model with its `folder` on this machine, found again by id and revision and checked by fingerprint.

        Raises:
            [`FisherMismatchError`]: when other weights lie there by now.
        """
        if self.folder is not None:
            return self
        found = BaseModel.resolve(self.id, self.revision)
        if not self.same_weights(found):
            raise FisherMismatchError(
                f"the weights of '{self.label}' are no longer the ones that were recorded.\n"
                f"    recorded sha256 {self.fingerprint}\n    found    sha256 {found.fingerprint}\n"
                "Bring back the recorded weights, or estimate the Fisher again on the present ones. Nothing was trained."
            )
        return found


def fingerprint(files_sha256: dict[str, str]) -> str:
    """One hash for a set of weight files, from the sorted lines `"{file name} {sha256}"`."""
    lines = sorted(f"{name} {digest}" for name, digest in files_sha256.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would load from `folder`: one, or all that the index names."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if (folder / INDEX).exists():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise DataError(f"{INDEX} in '{folder}' is not a weight index ({error!r}). Copy or download it again.") from None
        if missing := [name for name in names if not (folder / name).exists()]:
            raise DataError(
                f"'{folder}' lacks {len(missing)} of {len(names)} weight files that its index names: {', '.join(missing)}. "
                "Copy or download it again."
            )
        return [folder / name for name in names]
    if (folder / "adapter_config.json").exists():
        raise DataError(
            f"'{folder}' holds a PEFT adapter, not a model: in a frozen base there is nothing to protect. Merge it "
            "(`model.merge_and_unload()`), save the result with `model.save_pretrained(...)` and name that folder."
        )
    if pickles := pickles_in(folder):
        raise DataError(
            f"'{folder}' holds its weights as pickles only ({', '.join(pickles)}). Unpickling can run any code, so only "
            "safetensors are read. Load the model once where you trust it, write it with `model.save_pretrained(...)`, and "
            "name that folder."
        )
    raise DataError(
        f"'{folder}' holds no {SINGLE} and no {INDEX}, so it is not a model folder. Name a Hub id or a folder that was written "
        "with `model.save_pretrained(...)`."
    )


def pickles_in(folder: Path) -> list[str]:
    """Names of the files that only unpickling could read."""
    return pickles_among(path.name for path in folder.iterdir()) if folder.is_dir() else []


def pickles_among(names: Iterable[str]) -> list[str]:
    """As [`pickles_in`], for names that are not on this machine."""
    return sorted(name for name in names if any(fnmatch(name, pattern) for pattern in _PICKLES))


def _pull(name: str, revision: str | None) -> tuple[Path, str]:
    patterns = ["model*.safetensors", "*.json", "*.jinja", *_TOKENIZER_FILES]
    if not is_repo_id(name) and "/" in name:
        raise DataError(f"the base model '{name}' is neither a folder on this machine nor an id on the Hub (`owner/name`).")
    try:
        commit = pin(name, "model", revision)
        return fetch(name, "model", commit, patterns), commit
    except HubError as error:
        raise DataError(
            f"the base model '{name}' is no folder on this machine, and it could not be had from the Hub: {error}"
        ) from None


def _blob_sha256(path: Path) -> str:
    # In the Hub's cache `snapshots/<commit>/<file>` links to `blobs/<sha256>`; hashing 5 GB again would tell nothing new. Only
    # the first link counts: with Xet that blob is a link in turn, to a file that is named by another hash.
    link = Path(os.readlink(path)) if path.is_symlink() else path
    if link.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", link.name):
        return link.name
    return sha256_file(path)


def _folder_tokenizer(folder: Path) -> str | None:
    if not any(next(folder.glob(pattern), None) for pattern in _TOKENIZER_FILES):
        return None
    try:
        return tokenizer_sha256(AutoTokenizer.from_pretrained(folder))
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"the tokenizer in '{folder}' cannot be loaded: {error}") from error
