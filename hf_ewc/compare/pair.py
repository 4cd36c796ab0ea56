"""The two models of a page, loaded and checked, and the prompts that they can take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..artifact import BaseModel, tokenizer_sha256
from ..devices import usable_device
from ..errors import ConfigError, DataError
from .problems import CompareError


@dataclass(frozen=True)
class Side:
    """
    One of the two models.

    Parameters:
        role (`str`): `"base"` or `"adapted"`; `"between"` for a model that [`Between`] made of both.
        label (`str`): How the page names it: `google/gemma-2-2b@4f1c2d0`, or a folder's own name without where it lies.
        model ([`~transformers.PreTrainedModel`]): In eval mode, on its device.
        chat_template (`str`, *optional*): Its own; `None` for a model that only continues text.
        commit (`str`, *optional*): All 40 digits, for a link; `None` for a local folder.
    """

    role: str
    label: str
    model: PreTrainedModel
    chat_template: str | None = None
    commit: str | None = None

    @property
    def context(self) -> int | None:
        """Longest text the model was built for, in tokens; `None` if its configuration does not say."""
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


class ModelPair:
    """
    Base and adapted model with the tokenizer that both share. Everything on the page takes one of these.

    Nothing in it changes after loading, so any number of threads may use it at once.

    Parameters:
        base ([`Side`]), adapted ([`Side`]): The models.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of both.

    Attributes:
        context (`int`, *optional*): The shorter context of the two, in tokens.
        chat (`bool`): Whether prompts go through the chat templates: only if both models have one.

    Example:

    ```python
    >>> pair = ModelPair.load("google/gemma-2-2b", "ona/gemma-2-2b-lt", adapted_revision="4f1c2d0")
    >>> pair.base.label, pair.context, pair.chat
    ('google/gemma-2-2b@c5ebcd4', 8192, False)
    ```
    """

    def __init__(self, base: Side, adapted: Side, tokenizer: PreTrainedTokenizerBase):
        self.base = base
        self.adapted = adapted
        self.tokenizer = tokenizer
        self.context = min((side.context for side in self.sides if side.context), default=None)
        self.chat = all(side.chat_template for side in self.sides)
        for side in self.sides:
            side.model.eval()

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.base, self.adapted

    @classmethod
    def of(
        cls,
        base: PreTrainedModel,
        adapted: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        labels: tuple[str, str] = ("base", "adapted"),
    ) -> ModelPair:
        """A pair of models that are in memory already, with one tokenizer (and its chat template, if it has one)."""
        template = tokenizer.chat_template
        return cls(Side("base", labels[0], base, template), Side("adapted", labels[1], adapted, template), tokenizer)

    @classmethod
    def load(
        cls,
        base: str | Path,
        adapted: str | Path,
        base_revision: str | None = None,
        adapted_revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: str = "float32",
        progress: Callable[[str], None] | None = None,
    ) -> ModelPair:
        """
        Load both models. Everything that can be wrong without reading weights is found before any are read.

        Args:
            base (`str` or `Path`), adapted (`str` or `Path`): Local folders, or ids on the Hub.
            base_revision (`str`, *optional*), adapted_revision (`str`, *optional*): Branch, tag or commit on the Hub.
            device (`str`, *optional*): Defaults to the accelerator if there is one, else the CPU.
            dtype (`str`, *optional*, defaults to `"float32"`): Of the weights in memory, a floating point type of torch.
            progress (`Callable[[str], None]`, *optional*): Told each step as it begins: one of [`loading.STEPS`].

        Raises:
            ConfigError: An unknown `dtype` or `device`.
            DataError: No such model, no access, no safetensors; or the two do not share a tokenizer. On a page, show it with
                [`public_message`].
        """
        tell = progress or (lambda step: None)
        kind, place = _dtype(dtype), usable_device(device)
        tell("find_base")
        base_files = _resolve("base", base, base_revision)
        tell("find_adapted")
        adapted_files = _resolve("adapted", adapted, adapted_revision)
        tokenizer, templates = _shared_tokenizer(base_files, adapted_files)
        sides = []
        for role, files, template in zip(("base", "adapted"), (base_files, adapted_files), templates, strict=True):
            tell(f"load_{role}")
            sides.append(_load_side(role, files, kind, place, template))
        return cls(sides[0], sides[1], tokenizer)

    def beside(
        self, adapted: str | Path, revision: str | None = None, progress: Callable[[str], None] | None = None
    ) -> ModelPair:
        """A pair of the same base, which is not loaded again, and another adapted model; errors as of [`ModelPair.load`]."""
        tell = progress or (lambda step: None)
        tell("find_plain")
        files = _resolve("adapted", adapted, revision)
        mine = tokenizer_sha256(self.tokenizer)
        if files.tokenizer_sha256 not in (None, mine):
            raise CompareError(
                "tokenizer",
                f"'{shown_name(files)}' and '{self.base.label}' do not share a tokenizer: sha256 {files.tokenizer_sha256} and "
                f"{mine}. Token by token, their texts cannot be compared. Name a model that was trained from this base.",
                base=mine,
                adapted=files.tokenizer_sha256,
            )
        tell("load_plain")
        weights = self.base.model
        return ModelPair(
            self.base,
            _load_side("adapted", files, weights.dtype, weights.device, self.adapted.chat_template),
            self.tokenizer,
        )

    def encode(self, side: Side, prompt: str) -> dict[str, torch.Tensor]:
        """The prompt as a side's `generate` takes it: as it is with the tokenizer's own BOS, or as one turn of a chat."""
        tokenizer: Any = self.tokenizer
        if self.chat:
            turn = [{"role": "user", "content": prompt}]
            encoded = tokenizer.apply_chat_template(
                turn, chat_template=side.chat_template, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        else:
            encoded = tokenizer(prompt, return_tensors="pt", verbose=False)
        # Some tokenizers add `token_type_ids`, which `generate` refuses for models that do not take them.
        return {name: encoded[name].to(side.model.device) for name in ("input_ids", "attention_mask")}


def shown_name(files: BaseModel) -> str:
    """`id@commit` of a model on the Hub, a folder's own name otherwise: where it lies on this machine is nobody's business."""
    return files.label if files.revision else Path(files.id).expanduser().resolve().name


def _resolve(role: str, source: str | Path, revision: str | None) -> BaseModel:
    try:
        return BaseModel.resolve(source, revision)
    except DataError as error:
        raise DataError(str(error).replace("the base model", f"the {role} model")) from None


def _shared_tokenizer(base: BaseModel, adapted: BaseModel) -> tuple[PreTrainedTokenizerBase, list[str | None]]:
    """The tokenizer of both, and the chat template of each; an adapted model that was saved without one has its base's."""
    names = f"'{shown_name(base)}' (base) and '{shown_name(adapted)}' (adapted)"
    if base.tokenizer_sha256 is None and adapted.tokenizer_sha256 is None:
        raise DataError(
            f"neither of {names} has a tokenizer beside its weights, so there is nothing to read a prompt with. Save it into "
            "the folders with `tokenizer.save_pretrained(...)`."
        )
    if None not in (base.tokenizer_sha256, adapted.tokenizer_sha256) and base.tokenizer_sha256 != adapted.tokenizer_sha256:
        raise CompareError(
            "tokenizer",
            f"{names} do not share a tokenizer: sha256 {base.tokenizer_sha256} and {adapted.tokenizer_sha256}. Token by token, "
            "their texts cannot be compared. Name the base model that the adapted one was trained from.",
            base=base.tokenizer_sha256,
            adapted=adapted.tokenizer_sha256,
        )
    if base.vocab_size != adapted.vocab_size and None in (base.tokenizer_sha256, adapted.tokenizer_sha256):
        raise CompareError(
            "tokenizer",
            f"of {names}, one was saved without its tokenizer, and the other's does not fit it: their vocabularies have "
            f"{base.vocab_size} and {adapted.vocab_size} entries. Save the right one into its folder with "
            "`tokenizer.save_pretrained(...)`.",
            base=base.vocab_size,
            adapted=adapted.vocab_size,
        )
    own: list[Any] = [
        AutoTokenizer.from_pretrained(files.folder) if files.tokenizer_sha256 is not None else None for files in (base, adapted)
    ]
    tokenizer = own[0] or own[1]
    return tokenizer, [one.chat_template if one else None for one in own]


def _load_side(role: str, files: BaseModel, dtype: torch.dtype, device: torch.device, template: str | None) -> Side:
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(str(files.folder), dtype=dtype)
    except (OSError, ValueError) as error:
        said = str(error).replace(str(files.folder), shown_name(files))
        raise DataError(f"the {role} model '{shown_name(files)}' cannot be loaded: {said}") from error
    return Side(role, shown_name(files), model.to(device).eval(), template, files.revision)


def _dtype(name: str) -> torch.dtype:
    kind = getattr(torch, name, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ConfigError(f"`dtype: {name}` is no floating point type of torch. Use float32, bfloat16 or float16.")
    return kind
