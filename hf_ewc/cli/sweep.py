"""`hf-ewc sweep`: one run per λ, one table, one picture."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .train import TrainScript

if TYPE_CHECKING:
    from ..config import EWCConfig

HELP = """\
Usage: hf-ewc sweep [--config FILE.yaml] [--key value …]

Train and evaluate one model per λ, and write results.json, table.md, retention.png and report.html. Finished runs
are kept, an interrupted one goes on: start the same command again. More λ can be added later; other settings need
another --output_dir.

  the sweep     --lambdas 0 1 10 100  (0 is plain fine-tuning and runs once)  --modes proximal [loss decoupled]
  what          as in `hf-ewc train --help`: --model --dataset --fisher --output_dir, learning rate, steps, …
  evaluation    --texts english=en.jsonl lithuanian=lt.jsonl  --old english  --new lithuanian
                --questions facts=questions.jsonl  --max_documents N  --window N  --eval_text_column text
  the folder    --keep_checkpoints  --overwrite (deletes all runs of an earlier sweep there)

Examples:
  hf-ewc sweep --config recipes/tiny-cpu/sweep.yaml
  hf-ewc sweep --config recipes/tiny-cpu/sweep.yaml --lambdas 0 1 10 100 1000
"""


@dataclass(kw_only=True)
class SweepScript(TrainScript):
    """What `hf-ewc sweep` needs besides [`EWCConfig`]."""

    lambdas: list[float] = field(metadata={"help": "Strengths λ, such as 0 1 10."})
    old: str = field(metadata={"help": "Name in `texts` of what is to be kept."})
    new: str = field(metadata={"help": "Name in `texts` of what is to be learned."})
    texts: dict[str, str] | str = field(metadata={"help": "Name → file of texts to measure, such as english=en.jsonl."})
    questions: dict[str, str] | str | None = field(default=None, metadata={"help": "Name → file of questions."})
    modes: list[str] = field(default_factory=lambda: ["proximal"], metadata={"help": "Modes of the penalty."})
    max_documents: int | None = field(default=None, metadata={"help": "Measure only the first documents and questions."})
    window: int | None = field(default=None, metadata={"help": "Window of the evaluation in tokens."})
    eval_text_column: str = field(default="text", metadata={"help": "Column of the texts that are measured."})
    keep_checkpoints: bool = field(default=False, metadata={"help": "Keep the checkpoints of finished runs."})

    def problems(self) -> list[str]:
        from ..config import MODES

        found = super().problems()
        found += [f"`modes: {mode}` is not one of {', '.join(MODES)}." for mode in self.modes or () if mode not in MODES]
        found += [
            f"`lambdas` must be numbers ≥ 0, got {value:g}." for value in self.lambdas or () if not 0 <= value < float("inf")
        ]
        return found


def run(argv: list[str]) -> int:
    from ..config import EvaluationConfig, raise_problems
    from .output import claim, refuse_same_folder
    from .train import parse_training

    script, args = parse_training("sweep", argv, SweepScript)
    problems = []
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        problems.append("a sweep runs in one process; on several GPUs, launch `hf-ewc train` once per λ.")
    if args.ewc_lambda != 1.0 or args.ewc_mode != "proximal":
        problems.append("`ewc_lambda` and `ewc_mode` are what a sweep varies: give `lambdas` and `modes` instead.")
    raise_problems("these settings cannot run; nothing was started", problems)
    out = Path(str(args.output_dir))
    refuse_same_folder(out, model=script.model, fisher=args.fisher, anchor=args.anchor)
    ours = ("runs", "before.json", "results.json", "table.md", "retention.png", "report.html")
    claim(out, ("before.json",), ours, resume=(out / "before.json").is_file(), overwrite=script.overwrite)

    from ..evaluation import table_text
    from ..experiment import plan_runs, run_sweep

    def make_args(mode: str, strength: float, folder: Path) -> EWCConfig:
        return replace(args, output_dir=str(folder), ewc_lambda=strength, ewc_mode=args.ewc_mode if mode == "sft" else mode)

    results = run_sweep(
        base=script.model,
        runs=plan_runs(script.modes, script.lambdas),
        make_args=make_args,
        train_dataset=lambda: script.rows(args),
        evaluation=EvaluationConfig(
            texts=script.texts,
            questions=script.questions,
            text_column=script.eval_text_column,
            max_documents=script.max_documents,
            window=script.window,
            dtype=script.dtype,
        ),
        output_dir=out,
        old=script.old,
        new=script.new,
        settings={name: getattr(script, name) for name in ("dataset", "dataset_config", "dataset_split", "dataset_revision")},
        keep_checkpoints=script.keep_checkpoints,
        progress=lambda line: print(line, flush=True),
    )
    print(f"\n{table_text(results)}\n\nReport: {out / 'report.html'}\nPicture: {out / 'retention.png'}")
    return 0
