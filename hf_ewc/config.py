"""What a user can set, one dataclass per job: [`FisherConfig`], [`EWCConfig`], [`EvaluationConfig`].

Each class lists its own problems in `problems()` (all of them, in words that end in an action); `check()` raises them together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig

from .errors import ConfigError

MODES = ("loss", "proximal", "decoupled")
PROBES = ("mmlu", "completion", "text")
CODECS = ("float32", "bfloat16")
LABELS = ("empirical",)
GRANULARITIES = ("example",)
DTYPES = ("float32", "bfloat16")


def raise_problems(title: str, problems: list[str]) -> None:
    """Raise one [`ConfigError`] that lists every problem, or return when there is none."""
    if problems:
        raise ConfigError(f"{title}:\n" + "\n".join(f"  - {problem}" for problem in problems))


def _choice(name: str, value: Any, allowed: tuple[str, ...], later: str = "") -> list[str]:
    if value in allowed:
        return []
    return [f"`{name}: {value}` is not one of {', '.join(allowed)}.{later}"]


def _at_least(name: str, value: float | None, least: float) -> list[str]:
    if value is None or value >= least:
        return []
    return [f"`{name}` must be at least {least}, got {value}."]


@dataclass
class FisherConfig:
    r"""
    How to estimate the diagonal Fisher information of a causal language model,

    $$F_i = \frac{1}{T} \sum_n
    \Big( \sum_{t \in \text{scored}(n)} \partial \log p(y_{nt} \mid x_n) / \partial \theta_i \Big)^2,$$

    with one square *per example* n (never per batch) and T the number of scored tokens of all examples, so that
    ½ Σᵢ Fᵢ (θᵢ − θ*ᵢ)² reads as nats of KL from the base per probe token.

    Parameters:
        > Parameters that control what is protected

        probe (`str`, *optional*, defaults to `"mmlu"`):
            `"mmlu"`: the letter of the right answer, given question and choices (the paper's probe; columns `question`,
            `choices`, `answer`). `"completion"`: the completion, given the prompt (columns `prompt`, `completion`).
            `"text"`: every token of running text. The probe decides what EWC keeps.
        dataset (`str`, *optional*):
            A local `.json`/`.jsonl`/`.csv`/`.parquet`/`.txt` file, a folder written by `datasets.Dataset.save_to_disk`, or a
            dataset id on the Hub. Defaults to `cais/mmlu` for the `mmlu` probe.
        dataset_config (`str`, *optional*):
            Name of the dataset's configuration on the Hub (`all` for `cais/mmlu`).
        dataset_split (`str`, *optional*):
            Split to read. Defaults to `auxiliary_train` for `cais/mmlu` and `train` otherwise: a Fisher from the test split of
            a benchmark that is then reported would flatter the result.
        dataset_revision (`str`, *optional*):
            Branch, tag or commit of the dataset.
        allow_test_split (`bool`, *optional*, defaults to `False`):
            Permit a split whose name contains `test`.
        text_column (`str`, *optional*, defaults to `"text"`):
            Column of the `text` probe.
        max_examples (`int`, *optional*):
            Use this many examples, drawn with `seed`. `None` uses all.
        max_length (`int`, *optional*, defaults to `512`):
            Longest example in tokens. Longer `text` is cut into pieces of this length; longer questions or completions are an
            error, as their answer would fall outside.

        > Parameters that control the estimate

        granularity (`str`, *optional*, defaults to `"example"`):
            What is squared: the gradient of one example's summed log-likelihood.
        labels (`str`, *optional*, defaults to `"empirical"`):
            Which targets: the ones in the data.
        batch_size (`int`, *optional*, defaults to `8`):
            Examples that are collated together. Never changes the result.
        max_dropped (`float`, *optional*, defaults to `0.01`):
            Share of examples that may be dropped for NaN or infinite gradients before the run fails.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw of examples.

        > Parameters that control the model and the run

        revision (`str`, *optional*):
            Branch, tag or commit of the model.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Dtype in which the model is loaded. The squares are summed in float32 in any case.
        device (`str`, *optional*):
            Device to run on. Defaults to the accelerator if there is one, else the CPU.
        codec (`str`, *optional*, defaults to `"bfloat16"`):
            How `save_pretrained` stores the values: `float32` or `bfloat16`.
        work_dir (`str`, *optional*):
            Folder that receives the running sums, so that a killed run resumes bitwise where it stood. `None`: not resumable.
        save_every (`int`, *optional*, defaults to `256`):
            Write the running sums after this many examples.
        resume (`bool`, *optional*, defaults to `False`):
            Continue from `work_dir`. A changed model, dataset or setting is refused.
    """

    probe: str = field(default="mmlu", metadata={"help": "What to protect: mmlu, completion or text."})
    dataset: str | None = field(default=None, metadata={"help": "Local file or dataset id on the Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset on the Hub."})
    dataset_split: str | None = field(default=None, metadata={"help": "Split to read; never silently a test split."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the dataset."})
    allow_test_split: bool = field(default=False, metadata={"help": "Permit a test split as probe."})
    text_column: str = field(default="text", metadata={"help": "Column of the text probe."})
    max_examples: int | None = field(default=None, metadata={"help": "Use this many examples, drawn with the seed."})
    max_length: int = field(default=512, metadata={"help": "Longest example in tokens."})
    granularity: str = field(default="example", metadata={"help": "What is squared: example."})
    labels: str = field(default="empirical", metadata={"help": "Which targets: empirical."})
    batch_size: int = field(default=8, metadata={"help": "Examples collated together; never changes the result."})
    max_dropped: float = field(default=0.01, metadata={"help": "Share of non-finite examples before the run fails."})
    seed: int = field(default=0, metadata={"help": "Seed of the draw of examples."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    dtype: str = field(default="float32", metadata={"help": "Dtype in which the model is loaded."})
    device: str | None = field(default=None, metadata={"help": "Device; the accelerator if there is one."})
    codec: str = field(default="bfloat16", metadata={"help": "Storage of the values: float32 or bfloat16."})
    work_dir: str | None = field(default=None, metadata={"help": "Folder of the running sums (resumable)."})
    save_every: int = field(default=256, metadata={"help": "Write the running sums after this many examples."})
    resume: bool = field(default=False, metadata={"help": "Continue from work_dir."})

    def problems(self) -> list[str]:
        found = _choice("probe", self.probe, PROBES)
        found += _choice("codec", self.codec, CODECS)
        found += _choice("labels", self.labels, LABELS, " Other label kinds are not built yet.")
        found += _choice("granularity", self.granularity, GRANULARITIES, " Other granularities are not built yet.")
        found += _choice("dtype", self.dtype, DTYPES, " float16 loses gradients below 6e-8 and is refused.")
        for name in ("max_examples", "batch_size", "save_every"):
            found += _at_least(name, getattr(self, name), 1)
        found += _at_least("max_length", self.max_length, 2)
        if not 0 <= self.max_dropped < 1:
            found.append(f"`max_dropped` is a share from 0 to below 1, got {self.max_dropped}.")
        if self.probe != "mmlu" and self.dataset is None:
            found.append(f"the `{self.probe}` probe needs `dataset`: a local file or a dataset id on the Hub.")
        if self.resume and self.work_dir is None:
            found.append("`resume` needs `work_dir`, the folder of the run that is to be continued.")
        return found

    def check(self) -> None:
        raise_problems("This Fisher configuration cannot run", self.problems())


@dataclass
class EvaluationConfig:
    """
    What to measure on a model: bits per byte of texts, and accuracy on multiple-choice questions.

    Parameters:
        texts (`dict[str, str]`, *optional*):
            Name → local file or dataset id with a text column, for example `{"english": "en.jsonl"}`. Each gives
            `bits_per_byte` (comparable between tokenizers and languages) and `token_perplexity`.
        questions (`dict[str, str]`, *optional*):
            Name → local `.jsonl` file in MMLU's form (`question`, `choices`, `answer`). Each gives `accuracy` and its standard
            error through lm-evaluation-harness.
        text_column (`str`, *optional*, defaults to `"text"`):
            Column of the texts.
        split (`str`, *optional*, defaults to `"test"`):
            Split of datasets on the Hub; a local file is one split.
        max_documents (`int`, *optional*):
            Score only the first documents and questions.
        window (`int`, *optional*):
            Window in tokens, the leading BOS included. Defaults to the model's context, at most 2048.
        batch_size (`int`, *optional*, defaults to `8`):
            Windows (and questions) per forward pass. Never changes the result beyond rounding.
        dtype, device, revision:
            As in [`FisherConfig`].
    """

    texts: dict[str, str] | str | None = field(
        default=None, metadata={"help": 'Name → file of texts, e.g. {"english": "en.jsonl"}.'}
    )
    questions: dict[str, str] | str | None = field(
        default=None, metadata={"help": 'Name → file of questions, e.g. {"facts": "questions.jsonl"}.'}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    split: str = field(default="test", metadata={"help": "Split of datasets on the Hub."})
    max_documents: int | None = field(default=None, metadata={"help": "Score only the first documents and questions."})
    window: int | None = field(default=None, metadata={"help": "Window in tokens, BOS included."})
    batch_size: int = field(default=8, metadata={"help": "Windows per forward pass."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    dtype: str = field(default="float32", metadata={"help": "Dtype in which the model is loaded."})
    device: str | None = field(default=None, metadata={"help": "Device; the accelerator if there is one."})

    def __post_init__(self) -> None:
        import json

        for name in ("texts", "questions"):  # a flag on the command line arrives as a JSON string
            value = getattr(self, name)
            if isinstance(value, str):
                try:
                    value = json.loads(value)
                except json.JSONDecodeError:
                    raise ConfigError(
                        f'`{name}` must map names to files, e.g. --{name} \'{{"english": "en.jsonl"}}\'; got {value!r}.'
                    ) from None
            setattr(self, name, dict(value or {}))

    def problems(self) -> list[str]:
        found = _choice("dtype", self.dtype, DTYPES)
        if not self.texts and not self.questions:
            found.append("there is nothing to evaluate: give `texts` or `questions`.")
        for name in ("max_documents", "batch_size"):
            found += _at_least(name, getattr(self, name), 1)
        found += _at_least("window", self.window, 2)
        return found

    def check(self) -> None:
        raise_problems("This evaluation cannot run", self.problems())


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
        fisher (`str`, *optional*):
            Folder (or, later, Hub dataset repo) written by [`FisherInformation.save_pretrained`]. Required when λ > 0.
        fisher_revision (`str`, *optional*):
            Branch, tag or commit of the Fisher on the Hub.
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
    fisher: str | None = field(default=None, metadata={"help": "Folder or Hub dataset repo of the Fisher."})
    fisher_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the Fisher."})
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

    def problems(self) -> list[str]:
        found = penalty_problems(self.ewc_lambda, self.ewc_mode, self.ewc_missing)
        if self.ewc_lambda > 0 and self.fisher is None:
            found.append(
                "`fisher` is missing: EWC with λ > 0 needs the Fisher information of the base model. Estimate it "
                "(`hf-ewc fisher …`) and name its folder, or set `ewc_lambda: 0` for plain fine-tuning."
            )
        return found + training_problems(self)

    def check(self) -> None:
        raise_problems("This EWC configuration cannot run", self.problems())


def penalty_problems(ewc_lambda: float, mode: str, missing: str) -> list[str]:
    """Problems of the penalty's own settings, shared by [`EWCConfig`] and [`EWCCallback`]."""
    found = []
    if not isinstance(ewc_lambda, (int, float)) or math.isnan(ewc_lambda) or ewc_lambda < 0 or math.isinf(ewc_lambda):
        found.append(
            f"`ewc_lambda` must be a finite number ≥ 0, got {ewc_lambda}: a negative λ would push the weights away from the "
            "base. Usual values lie between 0.1 and 1000."
        )
    found += _choice("ewc_mode", mode, MODES)
    found += _choice("ewc_missing", missing, ("error", "ignore"))
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
