"""[`run_demo`]: pretrain, measure, continue on Lithuanian for several λ, and show what was kept and what was learned."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import transformers
from datasets import Dataset
from transformers import AutoTokenizer

from ..artifact import FisherInformation
from ..config import MODES, EvaluationConfig, EWCConfig, FisherConfig, raise_problems
from ..errors import ConfigError
from ..evaluation import table_text
from ..experiment import plan_runs, run_sweep
from ..files import write_text_atomically
from ..fisher import estimate_fisher
from .base import CONTEXT, SIZES, common_arguments, pretrain, train_tokenizer
from .world import World, fitting, make_world, text_rows

DEFAULT_RUNS = {"proximal": (1.0, 10.0, 100.0), "loss": (1.0, 10.0), "decoupled": (1e4,)}
"""λ per mode. `decoupled` lacks Adam's 1/√v̂, so its λ lives on another scale."""


@dataclass
class DemoConfig:
    """
    Settings of [`run_demo`].

    Args:
        output_dir (`str`): folder of everything that is made.
        data_en, data_lt, questions (`str`, *optional*):
            Own files instead of the shipped world: `.jsonl` with `text` (what is to be kept; what is to be learned), and questions in
            MMLU's form (`question`, `choices`, `answer`).
        size (`str`): `tiny` (0.2 M parameters), `small` (1 M) or `medium` (5 M).
        pretrain_steps (`int`): optimizer steps that make the base model.
        steps (`int`): optimizer steps of each run on the new text.
        lambdas, modes (`list`, *optional*): every λ in every mode, instead of the built-in choice.
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
    world = make_world(config.data_en, config.data_lt, config.questions, folder / "data", config.seed)
    base = _make_base(config, world, folder, say)
    tokenizer = AutoTokenizer.from_pretrained(base)
    fisher = _make_fisher(config, world, base, folder / "fisher", say)

    def make_args(mode: str, ewc_lambda: float, out: Path) -> EWCConfig:
        return EWCConfig(
            output_dir=str(out),
            ewc_lambda=ewc_lambda,
            ewc_mode="proximal" if mode == "sft" else mode,
            fisher=str(fisher),
            learning_rate=2e-3,
            max_steps=config.steps,
            **{**common_arguments(config.seed), "per_device_train_batch_size": 8},
        )

    results = run_sweep(
        base=str(base),
        runs=config.runs(),
        make_args=make_args,
        train_dataset=Dataset.from_list(text_rows(world.lithuanian, tokenizer, CONTEXT)),
        evaluation=EvaluationConfig(
            texts={name: str(world.files[name]) for name in ("english", "lithuanian")},
            questions={"questions": str(world.files["questions"])},
            window=CONTEXT,
            batch_size=32,
            device="cpu",
        ),
        output_dir=folder,
        old="english",
        new="lithuanian",
        settings={"data": "the project's own little world" if config.data_en is None else Path(config.data_en).name, "size": config.size},
        progress=say,
    )
    print("\n" + table_text(results))
    say(f"done; open {folder / 'report.html'} (picture: {folder / 'retention.png'}, numbers: {folder / 'results.json'})")
    return results


def _make_base(config: DemoConfig, world: World, folder: Path, say: _Clock) -> Path:
    base, recipe = folder / "base", folder / "base.json"
    made_of = repr({key: value for key, value in asdict(config).items() if key in ("data_en", "data_lt", "questions", "size", "pretrain_steps", "seed")})
    if base.is_dir() and recipe.is_file():
        if recipe.read_text(encoding="utf-8") != made_of:
            raise ConfigError(f"'{base}' was made with other settings than the present ones. Add `--overwrite`, or name another folder.")
        say("the base model is there already")
        return base
    tokenizer = train_tokenizer(world, SIZES[config.size]["vocab_size"])
    kept = fitting(world.questions, tokenizer, 2 * CONTEXT)
    if len(kept) < len(world.questions):
        say(f"{len(world.questions) - len(kept)} of {len(world.questions)} questions exceed {2 * CONTEXT} tokens and are left out")
        world.questions = kept
    say(f"pretraining a {config.size} Gemma-2 on {len(world.english)} English documents and {len(world.questions)} questions")
    pretrain(world, tokenizer, config.size, config.pretrain_steps, config.seed, base)
    write_text_atomically(recipe, made_of)
    return base


def _make_fisher(config: DemoConfig, world: World, base: Path, folder: Path, say: _Clock) -> Path:
    if folder.is_dir():
        say("the Fisher is there already")
        return folder
    say("measuring which weights carry the English: Fisher from half of the questions and from text")
    shared: dict[str, Any] = dict(device="cpu", seed=config.seed)
    asked = estimate_fisher(
        base, FisherConfig(probe="mmlu", dataset=str(world.files["questions_probe"]), max_length=2 * CONTEXT, **shared), progress=False
    )
    text = estimate_fisher(
        base,
        FisherConfig(probe="text", dataset=str(world.files["english_probe"]), max_length=CONTEXT, max_examples=200, **shared),
        progress=False,
    )
    return FisherInformation.mix([asked, text]).save_pretrained(folder)


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
    logging.getLogger("hf_ewc").setLevel(logging.WARNING)
