"""[`FisherConfig`]: what to protect, and how to estimate the Fisher of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..errors import ConfigError
from .checks import DTYPES, at_least, choice, raise_problems

PROBES = ("mmlu", "completion", "text")
LM_EVAL = "lm_eval:"  # followed by the name of a task
CODECS = ("float32", "bfloat16", "log8")
LABELS = ("empirical", "sampled", "options")
GRANULARITIES = ("example", "token", "batch")
PATHS = ("auto", "one_by_one")
SHARDINGS = ("replicate", "fsdp2")

# What a probe of a mixture may set for itself; everything else is one setting for all, since only Fishers of one kind add up.
OF_A_PROBE = (
    *("probe", "dataset", "dataset_config", "dataset_split", "dataset_revision", "allow_test_split", "text_column"),
    *("task_folder", "max_examples", "max_length", "seed"),
)
TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("max_examples", "max_length", "seed"), (int,)),
    "allow_test_split": (bool,),
    **dict.fromkeys(("probe", "dataset", "dataset_config", "dataset_split", "dataset_revision"), (str,)),
    **dict.fromkeys(("text_column", "task_folder"), (str,)),
}


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
            `"text"`: every token of running text. `"lm_eval:<task>"`: contexts and gold continuations of a task of
            lm-evaluation-harness, with as many worked examples in front as the task says (set `max_length` for them): the right
            choice of multiple choice, the target of generation (of several right ones the first), or the text itself. The
            probe decides what EWC keeps.
        probes (`dict[str, dict]`, *optional*):
            A mixture instead of one probe: name → its settings (`weight`, defaults to 1, and any of `probe`, `dataset`,
            `dataset_config`, `dataset_split`, `dataset_revision`, `allow_test_split`, `text_column`, `task_folder`,
            `max_examples`, `max_length`, `seed`; what is left out is taken from here). Each is normalised per scored token
            before the weighted sum, so that a probe with many tokens does not drown a small one.
        dataset (`str`, *optional*):
            A local `.json`/`.jsonl`/`.csv`/`.parquet`/`.txt` file, a folder written by `datasets.Dataset.save_to_disk`, or a
            dataset id on the Hub. Defaults to `cais/mmlu` for the `mmlu` probe; an `lm_eval:` task brings its own.
        dataset_config (`str`, *optional*):
            Name of the dataset's configuration on the Hub (`all` for `cais/mmlu`).
        dataset_split (`str`, *optional*):
            Split to read. Defaults to `auxiliary_train` for `cais/mmlu` and `train` otherwise: a Fisher from the test split of
            a benchmark that is then reported would flatter the result. Of an `lm_eval:` task: a split of its dataset, or what
            the task uses as `train`, `validation` or `test`; by default its training split, else its validation split.
        dataset_revision (`str`, *optional*):
            Branch, tag or commit of the dataset.
        allow_test_split (`bool`, *optional*, defaults to `False`):
            Permit a split whose name contains `test`, or that an `lm_eval:` task uses as its test split.
        text_column (`str`, *optional*, defaults to `"text"`):
            Column of the `text` probe.
        task_folder (`str`, *optional*):
            Folder with lm-evaluation-harness tasks of your own (YAML files), beside those that it brings.
        max_examples (`int`, *optional*):
            Use this many examples, drawn with `seed`. `None` uses all.
        max_length (`int`, *optional*, defaults to `512`):
            Longest example in tokens. Longer `text` is cut into pieces of this length; longer questions or completions are an
            error, as their answer would fall outside.

        > Parameters that control the estimate

        granularity (`str`, *optional*, defaults to `"example"`):
            What is squared. `"example"`: the gradient of one example's summed log-likelihood. `"token"`: the gradient at each
            position, as if every position had weights of its own; cheaper, and another quantity. `"batch"`: the summed
            gradient of `batch_size` examples; with sampled labels an unbiased estimate of the same Fisher at the price of
            ordinary training steps (Gauss–Newton–Bartlett), with the data's own labels a biased one, for comparison only.
        labels (`str`, *optional*, defaults to `"empirical"`):
            Which targets. `"empirical"`: the ones in the data. `"sampled"`: drawn from the model, which gives the true Fisher
            in expectation. `"options"`: all answer options of multiple choice, weighted by the model's renormalised
            probabilities: the exact expectation, where there are options: for `mmlu` the letters of the choices, for
            multiple-choice `lm_eval:` tasks the choices, for `completion` a column `options` (at least two strings, all
            different, one of them the completion, letter for letter).
        draws (`int`, *optional*, defaults to `1`):
            Draws per example for `labels: sampled`; their squares are averaged.
        batch_size (`int`, *optional*, defaults to `8`):
            Examples per forward and backward pass. Changes the result for `granularity: batch` only.
        path (`str`, *optional*, defaults to `"auto"`):
            `"auto"`: whole batches at once where the first batch agrees with the one-by-one path, parameter by parameter.
            `"one_by_one"`: one backward pass per example, the reference.
        scratch_mb (`int`, *optional*, defaults to `256`):
            Working memory of the batched path in MiB, beside weights, running sums and the activations of a batch.
        until_stable (`float`, *optional*):
            Stop where two halves of the examples agree this well (correlation of log F, below 1; 0.95 is a sensible choice) at
            two doublings of their number in a row. `None` uses all examples.
        max_dropped (`float`, *optional*, defaults to `0.01`):
            Share of examples that may be dropped for NaN or infinite gradients before the run fails.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw of examples and of sampled labels.

        > Parameters that control the model and the run

        revision (`str`, *optional*):
            Branch, tag or commit of the model.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Dtype in which the model is loaded. The squares are summed in float32 in any case.
        device (`str`, *optional*):
            Device to run on. Defaults to the accelerator if there is one, else the CPU.
        sharding (`str`, *optional*, defaults to `"replicate"`):
            With several processes (`torchrun`, `accelerate launch`): `"replicate"` gives each a whole model and a share of the
            examples; `"fsdp2"` shards the model, for models that one device cannot hold.
        num_processes (`int`, *optional*):
            How many processes there must be. Some launchers silently start one; with this set, that is an error.
        codec (`str`, *optional*, defaults to `"bfloat16"`):
            How the values are stored. `"float32"`: exactly. `"bfloat16"`: in half the space, relative error at most 0.4 %.
            `"log8"`: in about a quarter (8.4 bits), with a median error of 0.3 to 0.5 % on Fishers of small models; nothing
            becomes zero. It saves disk and download, not memory: while training, its values are held in float32, those of
            bfloat16 in bfloat16. See `hf-ewc fisher convert`.
        work_dir (`str`, *optional*):
            Folder that receives the running sums, so that a killed run resumes bitwise where it stood. `None`: not resumable.
        save_every (`int`, *optional*, defaults to `256`):
            Write the running sums after this many examples.
        resume (`bool`, *optional*, defaults to `False`):
            Continue from `work_dir`. A changed model, dataset or setting is refused.
    """

    probe: str = field(default="mmlu", metadata={"help": "What to protect: mmlu, completion, text or lm_eval:<task>."})
    probes: dict[str, Any] | str | None = field(default=None, metadata={"help": "A mixture: name → settings and weight."})
    dataset: str | None = field(default=None, metadata={"help": "Local file or dataset id on the Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset on the Hub."})
    dataset_split: str | None = field(default=None, metadata={"help": "Split to read; never silently a test split."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the dataset."})
    allow_test_split: bool = field(default=False, metadata={"help": "Permit a test split as probe."})
    text_column: str = field(default="text", metadata={"help": "Column of the text probe."})
    task_folder: str | None = field(default=None, metadata={"help": "Folder with lm-eval tasks of your own."})
    max_examples: int | None = field(default=None, metadata={"help": "Use this many examples, drawn with the seed."})
    max_length: int = field(default=512, metadata={"help": "Longest example in tokens."})
    granularity: str = field(default="example", metadata={"help": "What is squared: example, token or batch."})
    labels: str = field(default="empirical", metadata={"help": "Which targets: empirical, sampled or options."})
    draws: int = field(default=1, metadata={"help": "Draws per example for sampled labels."})
    batch_size: int = field(default=8, metadata={"help": "Examples per pass; changes only granularity batch."})
    path: str = field(default="auto", metadata={"help": "auto (batched where it agrees) or one_by_one."})
    scratch_mb: int = field(default=256, metadata={"help": "Working memory of the batched path, MiB."})
    until_stable: float | None = field(default=None, metadata={"help": "Stop when two halves agree this well."})
    max_dropped: float = field(default=0.01, metadata={"help": "Share of non-finite examples before the run fails."})
    seed: int = field(default=0, metadata={"help": "Seed of the draw of examples and labels."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    dtype: str = field(default="float32", metadata={"help": "Dtype in which the model is loaded."})
    device: str | None = field(default=None, metadata={"help": "Device; the accelerator if there is one."})
    sharding: str = field(default="replicate", metadata={"help": "Several processes: replicate or fsdp2."})
    num_processes: int | None = field(default=None, metadata={"help": "How many processes there must be."})
    codec: str = field(default="bfloat16", metadata={"help": "Storage of the values: float32, bfloat16 or log8."})
    work_dir: str | None = field(default=None, metadata={"help": "Folder of the running sums (resumable)."})
    save_every: int = field(default=256, metadata={"help": "Write the running sums after this many examples."})
    resume: bool = field(default=False, metadata={"help": "Continue from work_dir."})

    def __post_init__(self) -> None:
        if isinstance(self.probes, str):  # a flag on the command line arrives as a JSON string
            try:
                self.probes = json.loads(self.probes)
            except json.JSONDecodeError:
                example = '{"facts": {"probe": "mmlu", "dataset": "q.jsonl", "weight": 2}}'
                raise ConfigError(
                    f"`probes` must map names to settings, e.g. --probes '{example}'; got {self.probes!r}."
                ) from None

    @property
    def task(self) -> str | None:
        """The task of an `lm_eval:<task>` probe, else `None`."""
        return self.probe.removeprefix(LM_EVAL) if self.probe.startswith(LM_EVAL) else None

    def mixture(self) -> dict[str, tuple[FisherConfig, float]]:
        """The probes of a mixture by name: the configuration of each alone, and its weight. Call after `check()`."""
        assert isinstance(self.probes, dict)
        found = {}
        for name, own in self.probes.items():
            settings = {key: value for key, value in own.items() if key != "weight"}
            found[name] = (replace(self, probes=None, **settings), float(own.get("weight", 1.0)))
        return found

    def problems(self) -> list[str]:
        found = self._probe_problems()
        found += choice("codec", self.codec, CODECS)
        found += choice("labels", self.labels, LABELS)
        found += choice("granularity", self.granularity, GRANULARITIES)
        found += choice("path", self.path, PATHS)
        found += choice("sharding", self.sharding, SHARDINGS)
        found += choice("dtype", self.dtype, DTYPES, " float16 loses gradients below 6e-8 and is refused.")
        for name in ("batch_size", "save_every", "draws", "scratch_mb", "num_processes"):
            found += at_least(name, getattr(self, name), 1)
        if not 0 <= self.max_dropped < 1:
            found.append(f"`max_dropped` is a share from 0 to below 1, got {self.max_dropped}.")
        if self.until_stable is not None and not 0 < self.until_stable < 1:
            found.append(f"`until_stable` is a correlation between 0 and 1, got {self.until_stable}. Take 0.95, for one.")
        if self.draws > 1 and self.labels != "sampled":
            found.append(f"`draws: {self.draws}` applies to `labels: sampled` only; `labels` is {self.labels}.")
        if self.granularity == "batch" and self.labels == "options":
            found.append(
                "`granularity: batch` adds gradients before it squares, and those of a question's options are not independent. "
                "Use `labels: sampled`, or `granularity: example`."
            )
        if self.granularity == "token" and self.sharding == "fsdp2":
            found.append("`granularity: token` is built for `sharding: replicate` only.")
        if self.granularity == "token" and self.path == "one_by_one":
            found.append("`granularity: token` squares inside the batched pass and has no one-by-one path. Remove `path`.")
        if self.resume and self.work_dir is None:
            found.append("`resume` needs `work_dir`, the folder of the run that is to be continued.")
        return found

    def _probe_problems(self) -> list[str]:
        if self.probes is not None:
            return self._mixture_problems()
        found = []
        if not isinstance(self.probe, str):
            return [f"`probe` must be a name, got {self.probe!r}: {', '.join(PROBES)} or {LM_EVAL}<task>."]
        if self.task is None:
            found += choice("probe", self.probe, (*PROBES, f"{LM_EVAL}<task>"))
            if self.probe in PROBES[1:] and self.dataset is None:
                found.append(f"the `{self.probe}` probe needs `dataset`: a local file or a dataset id on the Hub.")
        elif not self.task:
            found.append(f"`probe: {self.probe}` names no task; write `probe: {LM_EVAL}arc_easy`, for one.")
        else:
            for name in ("dataset", "dataset_config", "dataset_revision"):
                if (value := getattr(self, name)) is not None:
                    found.append(f"`{self.probe}` brings its own dataset; remove `{name}: {value}`, or use another probe.")
        if self.probe == "text" and self.labels == "options":
            found.append("`labels: options` needs multiple choice; running text has no options. Use `sampled` or `empirical`.")
        found += at_least("max_examples", self.max_examples, 1)
        found += at_least("max_length", self.max_length, 2)
        return found

    def _mixture_problems(self) -> list[str]:
        if not isinstance(self.probes, dict) or not self.probes or not all(isinstance(v, dict) for v in self.probes.values()):
            return [f"`probes` must map names to settings (`facts: {{probe: mmlu, dataset: q.jsonl}}`), got {self.probes!r}."]
        found = []
        types = {f.name for f in fields(self)}
        for name, own in self.probes.items():
            strangers = [key for key in own if key not in (*OF_A_PROBE, "weight")]
            for key in strangers:
                why = "is one setting for the whole mixture" if key in types else "is not a setting"
                found.append(f"`probes.{name}.{key}` {why}; a probe sets {', '.join(OF_A_PROBE)} and weight.")
            weight = own.get("weight", 1.0)
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
                found.append(f"`probes.{name}.weight` must be a finite number above 0, got {weight!r}.")
            wrong = [key for key in own if key in TYPES and own[key] is not None and type(own[key]) not in TYPES[key]]
            for key in wrong:
                found.append(
                    f"`probes.{name}.{key}: {own[key]!r}` must be a {TYPES[key][0].__name__}, not a {type(own[key]).__name__}."
                )
            if not strangers and not wrong:
                alone = replace(self, probes=None, **{key: value for key, value in own.items() if key != "weight"})
                found += [f"`probes.{name}`: {problem}" for problem in alone._probe_problems()]
        return found

    def check(self) -> None:
        raise_problems("This Fisher configuration cannot run", self.problems())
