"""[`EWCConfig`]: TRL's `SFTConfig`, and what Elastic Weight Consolidation adds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig

from .checks import choice, raise_problems

MODES = ("loss", "proximal", "decoupled")


@dataclass
class EWCConfig(SFTConfig):
    r"""
    Configuration of [`EWCTrainer`]: all of TRL's [`~trl.SFTConfig`], and what Elastic Weight Consolidation adds.

    The one dial is `ewc_lambda`. As the Fisher is normalised per scored token, λ = 1 means: one nat of (approximate) divergence
    from the base per token of old text costs as much as one nat of loss per token of new text.

    Parameters:
        > Parameters that control the penalty λ/2 · Σᵢ Fᵢ (θᵢ − θ*ᵢ)²

        ewc_lambda (`float`, *optional*, defaults to `1.0`):
            Strength λ ≥ 0. 0 is exactly `SFTTrainer`. Raise it to keep more, lower it to learn more.
        fisher (`str` or `list[str]`, *optional*):
            Folder written by [`FisherInformation.save_pretrained`], or dataset repository on the Hub (`user/name`, or
            `user/name@revision`). Required when λ > 0. Several of them, oldest task first, protect all of these tasks: each
            pulls to the base that it was measured at, and training goes on from the base of the last. They are folded into one,
            exactly ([`FisherInformation.fold`]); with large models and several runs, do that once with `hf-ewc fisher fold`.
        fisher_revision (`str`, *optional*):
            Branch, tag or commit of the Fisher on the Hub; for a single one only.
        fisher_streaming (`bool`, *optional*, defaults to `False`):
            Read a Fisher of the Hub straight into memory, by HTTP ranges and without the disk. Each process reads for itself.
        fisher_decay (`float`, *optional*, defaults to `1.0`):
            γ in (0, 1]: each Fisher of a list is multiplied by it once per later one, so that old tasks fade.
        ewc_mode (`str`, *optional*, defaults to `"proximal"`):
            Where the penalty acts. `"loss"`: its gradient joins the task's before clipping, the paper's form; unstable once
            lr · λ · F exceeds 2. `"proximal"`: an implicit step after the optimizer's, in Adam's metric: same fixed point as
            `loss`, stable for every λ, and clipping never sees the penalty. `"decoupled"`: the implicit step in the identity
            metric, for any optimizer (relates to `loss` as AdamW to L2).
        anchor (`str`, *optional*):
            Model id or folder of θ*. Defaults to the base model that is being trained. It is read from its files, never from
            the weights in memory, so that resuming does not move it.
        anchor_revision (`str`, *optional*):
            Branch, tag or commit of the anchor.
        ewc_missing (`str`, *optional*, defaults to `"error"`):
            What to do with trainable parameters that the Fisher does not hold (or holds in another shape): `"error"`, or
            `"ignore"` to leave them unpenalised.

        > Defaults that differ from SFTConfig

        optim (`str`, *optional*, defaults to `"paged_adamw_8bit"`):
            bitsandbytes' 8-bit Adam with paged state; on a CPU the same without paging.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Weight decay pulls to 0 while EWC pulls to the anchor: keep it 0 unless you mean it.
        bf16 (`bool`, *optional*):
            Mixed precision; where it is not set, on if the accelerator has it (TRL turns it on everywhere).
    """

    ewc_lambda: float = field(default=1.0, metadata={"help": "Strength λ of the penalty; 0 is plain SFT."})
    # in this order: transformers' argument parser takes the second of a union for the type of a word
    fisher: list[str] | str | None = field(
        default=None, metadata={"help": "Folder or Hub dataset repo of the Fisher; or several, oldest first."}
    )
    fisher_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the Fisher."})
    fisher_streaming: bool = field(default=False, metadata={"help": "Read the Fisher from the Hub without the disk."})
    fisher_decay: float = field(default=1.0, metadata={"help": "Weakens each Fisher of a list once per later one."})
    ewc_mode: str = field(default="proximal", metadata={"help": "Where the penalty acts.", "choices": list(MODES)})
    anchor: str | None = field(default=None, metadata={"help": "Model id or folder of θ*; default: the base model."})
    anchor_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the anchor."})
    ewc_missing: str = field(
        default="error",
        metadata={"help": "Trainable parameters without Fisher: error or ignore.", "choices": ["error", "ignore"]},
    )
    optim: str = field(default="paged_adamw_8bit", metadata={"help": "Optimizer; 8-bit paged Adam by default."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay; it pulls to 0, EWC to the anchor."})

    def __post_init__(self) -> None:
        # TRL turns bf16 on wherever it is not mentioned, and then fails on machines that cannot do it
        if self.bf16 is None and not self.fp16:
            self.bf16 = not self.use_cpu and is_torch_bf16_gpu_available()
        super().__post_init__()

    def problems(self, loaded: bool = False) -> list[str]:
        """Everything that is wrong; with `loaded`, the Fisher was handed over as an object and needs no name here."""
        fishers = (self.fisher, self.fisher_revision, self.fisher_decay)
        found = penalty_problems(self.ewc_lambda, self.ewc_mode, self.ewc_missing, *fishers)
        if self.ewc_lambda > 0 and self.fisher is None and not loaded:
            found.append(
                "`fisher` is missing: EWC with λ > 0 needs the Fisher information of the base model. Estimate it "
                "(`hf-ewc fisher …`) and name its folder, or set `ewc_lambda: 0` for plain fine-tuning."
            )
        strategy = str(getattr(self.hub_strategy, "value", self.hub_strategy))
        if self.push_to_hub and "checkpoint" in strategy:
            found.append(
                f"`hub_strategy: {strategy}` publishes optimizer states and pickles, one of which holds your token. Use "
                "`every_save` or `end`."
            )
        return found + training_problems(self)

    def check(self, loaded: bool = False) -> None:
        raise_problems("This EWC configuration cannot run", self.problems(loaded))


def penalty_problems(
    ewc_lambda: float, mode: str, missing: str, fisher: Any = None, revision: str | None = None, decay: float = 1.0
) -> list[str]:
    """Problems of the penalty's own settings, shared by [`EWCConfig`] and [`EWCCallback`]."""
    found = []
    if not isinstance(ewc_lambda, (int, float)) or math.isnan(ewc_lambda) or ewc_lambda < 0 or math.isinf(ewc_lambda):
        found.append(
            f"`ewc_lambda` must be a finite number ≥ 0, got {ewc_lambda}: a negative λ would push the weights away from the "
            "base. Usual values lie between 0.1 and 1000."
        )
    found += choice("ewc_mode", mode, MODES)
    found += choice("ewc_missing", missing, ("error", "ignore"))
    return found + _fisher_problems(fisher, revision, decay)


def _fisher_problems(fisher: Any, revision: str | None, decay: float) -> list[str]:
    """Problems of one Fisher or a list of them."""
    found = []
    several = len(fisher) if isinstance(fisher, (list, tuple)) else 1
    if several == 0:
        found.append("`fisher: []` names no Fisher. Name one or more, or set `ewc_lambda: 0` for plain fine-tuning.")
    if several > 1:
        names = [str(each) for each in fisher if isinstance(each, (str, Path))]
        twice = sorted({name for name in names if names.count(name) > 1})
        found += [f"`fisher` names '{name}' twice, and its penalty would count twice. Remove one." for name in twice]
        if revision is not None:
            found.append(
                f"`fisher_revision: {revision}` belongs to a single Fisher, and `fisher` names {several}. Write the "
                "revision behind the one that it belongs to: `USER/NAME@REVISION`."
            )
    if not 0 < decay <= 1:
        found.append(
            f"`fisher_decay: {decay}` must be above 0 and at most 1: each Fisher of a list is multiplied by it once per later "
            "one."
        )
    elif decay != 1 and fisher is not None and several == 1:
        found.append(
            f"`fisher_decay: {decay}` weakens the older Fishers of a list, and there is one. Lower `ewc_lambda` instead."
        )
    return found


def training_problems(args: Any) -> list[str]:
    """Settings of any `TrainingArguments` under which the penalty would be silently wrong."""
    found = []
    optim = str(getattr(args.optim, "value", args.optim))
    if args.fp16:
        found.append("`fp16: true` scales gradients and skips steps behind the penalty's back; use `bf16: true` or neither.")
    if "lomo" in optim or optim.endswith("_layerwise") or getattr(args, "galore_layerwise", False):
        found.append(
            f"`optim: {optim}` updates each layer inside the backward pass, so there is no moment at which the penalty could "
            "act. Use `paged_adamw_8bit` or `adamw_torch`."
        )
    if getattr(args, "deepspeed", None):
        found.append(
            "DeepSpeed steps inside `backward`, where this version's penalty would be a silent no-op. Remove `deepspeed`; "
            "single process and DDP are supported."
        )
    if getattr(args, "fsdp", None):
        found.append("FSDP shards the parameters, which this version does not support yet. Remove `fsdp`; DDP is supported.")
    return found
