"""`hf-ewc evaluate`: what was learned, what was forgotten."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

HELP = """\
Usage: hf-ewc evaluate [--config FILE.yaml] [--key value …]

Measure models on texts (bits per byte: comparable between tokenizers and languages) and on multiple-choice
questions (accuracy). With --base, the table also says what each model forgot of the old texts and learned of the new.

  what        --model ID|FOLDER [ID|FOLDER …]  --base ID|FOLDER
  texts       --texts english=en.jsonl lithuanian=lt.jsonl   (--text_column text)
  questions   --questions facts=questions.jsonl              (columns question, choices, answer)
  compare     --old NAME  --new NAME   (which texts are to be kept, and to be learned; default: the first and the last)
  the run     --max_documents N  --window N  --batch_size 8  --dtype float32|bfloat16  --device  --split test  --revision
  output      --output results.json

All settings with their reasons: python -c "import hf_ewc; help(hf_ewc.EvaluationConfig)"

Examples:
  hf-ewc evaluate --model demo-out/base --texts english=old.jsonl
  hf-ewc evaluate --model runs/lt --base demo-out/base --texts english=old.jsonl lithuanian=new.jsonl --output results.json
  hf-ewc evaluate --config recipes/tiny-cpu/evaluate.yaml --max_documents 10
"""


@dataclass
class EvaluateScript:
    """What `hf-ewc evaluate` needs besides [`EvaluationConfig`]."""

    model: list[str] = field(metadata={"help": "Models to measure: folders or ids on the Hub."})
    base: str | None = field(default=None, metadata={"help": "Model to compare with: the one before training."})
    old: str | None = field(default=None, metadata={"help": "Name of the texts that are to be kept; default: the first."})
    new: str | None = field(default=None, metadata={"help": "Name of the texts that are to be learned; default: the last."})
    output: str | None = field(default=None, metadata={"help": "Write what was measured to this JSON file."})


def run(argv: list[str]) -> int:
    from ..config import EvaluationConfig, raise_problems
    from .options import parse

    script, config = parse("evaluate", argv, EvaluateScript, EvaluationConfig)
    names = list(config.texts)
    old, new = (script.old or names[0], script.new or names[-1]) if names else (None, None)
    if script.base is not None:
        unknown = [name for name in (old, new) if name not in names]
        problems = [f"`{name}` is no name in `texts` ({', '.join(names)})." for name in unknown if name]
        if not names:
            problems.append("`base` compares losses on `texts`, and there are none.")
        raise_problems("these settings cannot run; nothing was started", problems)

    from ..evaluation import evaluate_model, metrics_text, save_results, table_text
    from ..experiment import versions
    from ..files import write_atomically

    for line in overlaps(script.model, config):
        print(f"warning: {line}", file=sys.stderr)
    metrics = {}
    for model in dict.fromkeys([*([script.base] if script.base else []), *script.model]):
        print(f"measuring {model}", file=sys.stderr, flush=True)
        metrics[model] = evaluate_model(model, replace(config, revision=None if Path(model).is_dir() else config.revision))

    if script.base is not None:
        results = {
            "schema": 1,
            "base": metrics[script.base]["model"],
            "before": metrics[script.base],
            "runs": [_as_run(model, metrics[model]) for model in script.model],
            "settings": {"old": old, "new": new},
            "versions": versions(),
        }
        print(table_text(results))
        if script.output:
            save_results(results, script.output)
    else:
        for model in script.model:
            print(f"{model}\n{metrics_text(metrics[model])}")
        if script.output:
            write_atomically(script.output, json.dumps({"models": metrics, "versions": versions()}, indent=1) + "\n")
    if script.output:
        print(f"Written to {script.output}")
    return 0


def _as_run(model: str, metrics: dict) -> dict[str, Any]:
    """A row of the table, by the model's name; a model that `hf-ewc train` did not write counts as λ = 0."""
    from .output import read_state

    strength = float(read_state(model).get("ewc_lambda", 0.0))
    return {"mode": Path(model).name, "ewc_lambda": strength, "metrics": metrics, "log": {}, "seconds": None}


def overlaps(models: list[str], config: Any) -> list[str]:
    """Warnings about evaluation sets that a model's Fisher was measured on, as far as that Fisher can still be found."""
    from ..artifact import Manifest
    from ..experiment import probe_overlaps
    from .output import read_state

    found: dict[str, None] = {}
    for model in models:
        fisher = read_state(model).get("fisher") or {}
        for source in [part["source"] for part in fisher.get("fold", [fisher]) if part.get("source")]:
            manifest = Path(source) / "fisher_config.json"
            if manifest.is_file():
                lines = probe_overlaps(Manifest.from_json(manifest.read_text(encoding="utf-8"), source), config)
                found |= dict.fromkeys(lines)
    return list(found)
