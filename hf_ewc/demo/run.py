"""
[`run_demo`]: pretrain, measure, continue on Lithuanian for several λ, merge, and show what was kept and what was learned.
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import transformers
from datasets import Dataset
from transformers import AutoTokenizer

from ..config import MODES, EvaluationConfig, EWCConfig, FisherConfig, raise_problems
from ..errors import ConfigError
from ..evaluation import table_text
from ..experiment import plan_runs, run_sweep
from ..files import write_atomically
from ..fisher import estimate_fisher
from .base import CONTEXT, SIZES, common_arguments, pretrain, train_tokenizer
from .world import fitting, make_world, text_rows

DEFAULT_RUNS = {"proximal": (10.0, 100.0, 1000.0), "loss": (10.0, 100.0), "decoupled": (1e5,)}
"""λ per mode. `decoupled` lacks Adam's 1/√v̂, so its λ lives on another scale."""

MERGES = [*(("merge", value) for value in (1.0, 3.0, 10.0)), *(("interpolate", share) for share in (0.45, 0.58, 0.72))]
"""What is made of the λ = 0 run after training: merges by the Fisher, and the plain interpolations that forget as much."""

RECIPE = "base.json"
"""What the base was made of, written when it is whole."""


@dataclass
class DemoConfig:
    """
    Settings of [`run_demo`].

    Args:
        output_dir (`str`): folder of everything that is made.
        data_en, data_lt, questions (`str`, *optional*):
            Own files instead of the shipped world: `.jsonl` with `text` (what is to be kept; what is to be learned), and
            questions in MMLU's form (`question`, `choices`, `answer`).
        size (`str`): `tiny` (0.2 M parameters), `small` (1 M) or `medium` (5 M).
        pretrain_steps (`int`): optimizer steps that make the base model.
        steps (`int`): optimizer steps of each run on the new text.
        lambdas, modes (`list`, *optional*): every λ in every mode, instead of the built-in choice. With λ = 0 among them, its
            model is also merged with the base after training, in a few strengths.
        seed (`int`): of data splits, weights and batches.
        resume, overwrite (`bool`): continue in, or clear, an `output_dir` that is not empty.
    """

    output_dir: str = field(default="demo-out", metadata={"help": "Folder of everything that is made."})
    data_en: str | None = field(default=None, metadata={"help": "Text to keep: .jsonl with `text`."})
    data_lt: str | None = field(default=None, metadata={"help": "Text to learn: .jsonl with `text`."})
    questions: str | None = field(default=None, metadata={"help": "Questions in MMLU's form: .jsonl."})
    size: str = field(default="small", metadata={"help": "tiny, small or medium."})
    pretrain_steps: int = field(default=300, metadata={"help": "Optimizer steps that make the base model."})
    steps: int = field(default=60, metadata={"help": "Optimizer steps of each run on the new text."})
    lambdas: list[float] | None = field(default=None, metadata={"help": "λ of the runs, e.g. 0 1 10."})
    modes: list[str] | None = field(default=None, metadata={"help": "Modes of the runs, e.g. proximal loss."})
    seed: int = field(default=0, metadata={"help": "Of data splits, weights and batches."})
    resume: bool = field(default=False, metadata={"help": "Continue in an output_dir that is not empty."})
    overwrite: bool = field(default=False, metadata={"help": "Clear an output_dir that a demo has written."})

    def problems(self) -> list[str]:
        found = [] if self.size in SIZES else [f"`size: {self.size}` is not one of {', '.join(SIZES)}."]
        for name in ("pretrain_steps", "steps"):
            if getattr(self, name) < 1:
                found.append(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        found += [f"`modes: {mode}` is not one of {', '.join(MODES)}." for mode in self.modes or () if mode not in MODES]
        found += [f"`lambdas` must be finite numbers ≥ 0, got {x}." for x in self.lambdas or () if not 0 <= x < float("inf")]
        return found

    def runs(self) -> list[tuple[str, float]]:
        """(mode, λ) of each run: the built-in choice, or every λ in every mode."""
        if self.lambdas is None and self.modes is None:
            return [("sft", 0.0), *((mode, value) for mode, values in DEFAULT_RUNS.items() for value in values)]
        lambdas = [0.0, 1.0, 10.0, 100.0] if self.lambdas is None else self.lambdas
        return plan_runs(self.modes or ["proximal"], lambdas)


def run_demo(config: DemoConfig | None = None) -> dict[str, Any]:
    """
    Run the demo and print its progress and its table.

    Returns:
        `dict`: the content of `results.json`.

    Raises:
        [`ConfigError`], [`DataError`]: before anything is trained.
    """
    config = config or DemoConfig()
    raise_problems("The demo cannot run", config.problems())
    _quiet()
    say = _Clock()
    folder = Path(config.output_dir)
    base = folder / "base"
    world = make_world(config.data_en, config.data_lt, config.questions, config.seed)
    there = _is_there(base, config)
    tokenizer = AutoTokenizer.from_pretrained(base) if there else train_tokenizer(world, SIZES[config.size]["vocab_size"])
    asked = len(world.questions)
    world.questions = fitting(world.questions, tokenizer, 2 * CONTEXT)
    if len(world.questions) < asked:
        say(f"{asked - len(world.questions)} of {asked} questions exceed {2 * CONTEXT} tokens and are left out")
    files = world.write(folder / "data")
    if there:
        say("the base model is there already")
    else:
        count = f"{len(world.english)} English documents and {len(world.questions)} questions"
        say(f"pretraining a {config.size} Gemma-2 on {count}")
        pretrain(world, tokenizer, config.size, config.pretrain_steps, config.seed, base, say)
        write_atomically(folder / RECIPE, _recipe(config))
    fisher = _make_fisher(config, files, base, folder / "fisher", say)

    def make_args(mode: str, ewc_lambda: float, out: Path) -> EWCConfig:
        return EWCConfig(
            output_dir=str(out),
            ewc_lambda=ewc_lambda,
            ewc_mode="proximal" if mode == "sft" else mode,
            fisher=str(fisher),
            learning_rate=2e-3,
            max_steps=config.steps,
            **{**common_arguments(config.seed), "per_device_train_batch_size": 8, "logging_steps": 30},
        )

    results = run_sweep(
        base=str(base),
        runs=config.runs(),
        make_args=make_args,
        train_dataset=Dataset.from_list(text_rows(world.lithuanian, tokenizer, CONTEXT)),
        evaluation=EvaluationConfig(
            texts={name: str(files[name]) for name in ("english", "lithuanian")},
            questions={"facts": str(files["questions"])},
            window=CONTEXT,
            batch_size=32,
            device="cpu",
        ),
        output_dir=folder,
        old="english",
        new="lithuanian",
        merges=MERGES,
        settings={
            "data": "the project's own little world" if config.data_en is None else Path(config.data_en).name,
            "size": config.size,
        },
        progress=say,
    )
    print("\n" + table_text(results))
    say(f"done; open {folder / 'report.html'} (picture: {folder / 'retention.png'}, numbers: {folder / 'results.json'})")
    return results


def _recipe(config: DemoConfig) -> str:
    made_of = ("data_en", "data_lt", "questions", "size", "pretrain_steps", "seed")
    return json.dumps({name: getattr(config, name) for name in made_of}, indent=1) + "\n"


def _is_there(base: Path, config: DemoConfig) -> bool:
    """Whether an earlier demo finished this base; [`ConfigError`] if it was made with other settings."""
    recipe = base.with_name(RECIPE)
    if not (base.is_dir() and recipe.is_file()):
        return False
    if recipe.read_text(encoding="utf-8") != _recipe(config):
        raise ConfigError(
            f"'{base}' was made with other settings than the present ones:\n{recipe.read_text(encoding='utf-8')}"
            "Repeat those, add `--overwrite`, or name another `--output_dir`."
        )
    return True


def _make_fisher(config: DemoConfig, files: dict[str, Path], base: Path, folder: Path, say: _Clock) -> Path:
    if folder.is_dir():
        say("the Fisher is there already")
        return folder
    say("measuring which weights carry the English: Fisher from half of the questions and from text")
    probes = {
        "facts": {"probe": "mmlu", "dataset": str(files["questions_probe"]), "max_length": 2 * CONTEXT},
        "english": {"probe": "text", "dataset": str(files["english_probe"]), "max_length": CONTEXT, "max_examples": 200},
    }
    settings = FisherConfig(probes=probes, device="cpu", seed=config.seed)
    return estimate_fisher(base, settings, progress=False).save_pretrained(folder)


class _Clock:
    """Prints a line with the seconds since the start."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def __call__(self, line: str) -> None:
        print(f"[{time.monotonic() - self.start:5.0f} s] {line}", flush=True)


def _quiet() -> None:
    """The demo prints its own progress; warnings and errors of the libraries stay."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a missing extra kernel for 4-bit weights
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
