"""`hf-ewc demo`: the whole way in under three minutes, on a small model, without account or network."""

from __future__ import annotations

HELP = """\
Usage: hf-ewc demo [--key value …]

Pretrain a small model on a little English world, measure which weights carry it, teach the model Lithuanian with
several λ, and show what was kept and what was learned. The λ = 0 model is also taken part of the way back to its base
after training: each weight by its importance (as `hf-ewc merge` does), and all alike. Two CPU cores, under three minutes,
no account, no network.

  output     --output_dir demo-out  --resume  --overwrite
  size       --size tiny|small|medium  --pretrain_steps N  --steps N (of each run)  --seed 0
  the runs   --lambdas 0 1 10 …  --modes proximal loss …   (without λ = 0, nothing is merged)
  your data  --data-en FILE  --data-lt FILE  --questions FILE   (JSONL with `text`; questions in MMLU's form)

Examples:
  hf-ewc demo
  hf-ewc demo --lambdas 0 10 --steps 50 --output_dir look
  hf-ewc demo --data-en my_old_domain.jsonl --data-lt my_new_domain.jsonl --questions my_questions.jsonl
"""


MARKS = ("base.json", "data/english_probe.jsonl")
OURS = ("data", "base*", "fisher", "runs", "before.json", "results.json", "table.md", "retention.png", "report.html")


def run(argv: list[str]) -> int:
    from ..demo import DemoConfig, run_demo
    from .options import parse
    from .output import claim

    (config,) = parse("demo", argv, DemoConfig)
    claim(config.output_dir, MARKS, OURS, resume=config.resume, overwrite=config.overwrite)
    run_demo(config)
    return 0
