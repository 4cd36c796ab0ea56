"""`hf-ewc bench`: measure on this machine what the README claims."""

from __future__ import annotations

HELP = """\
Usage: hf-ewc bench fisher [--key value …]
       hf-ewc bench estimators --model ID|FOLDER --dataset FILE [--key value …]

fisher: time and memory of the exact per-example Fisher against an ordinary forward and backward pass of the same batch,
the one-by-one path, and the squared gradient of the batch (which is not the Fisher). All four take turns in one run, on
random weights; nothing is downloaded.
  --sizes 1M 30M 100M   Gemma-2 models of about so many parameters (30M and 100M)
  --batch_size 8  --length 128  --rounds 5  --threads N  --scratch_mb 256
  --no-sweep            leave out the table in which batch and length grow

estimators: what the other estimators measure beside the exact one: squares of batches, of positions, sampled labels.
  --probe mmlu|completion|text  --text_column text  --max_examples N  --max_length 512

Both print a table; --output FILE.md writes it as well.

Examples:
  hf-ewc bench fisher --sizes 1M --rounds 2
  hf-ewc bench estimators --model demo-out/base --dataset questions.jsonl
"""


def run(argv: list[str]) -> int:
    from ..bench import EstimatorBench, FisherBench, bench_estimators, bench_fisher
    from ..errors import ConfigError
    from ..files import write_atomically
    from .options import parse

    what, *rest = argv or ["nothing"]
    if what == "fisher":
        (config,) = parse("bench fisher", rest, FisherBench)
        report = bench_fisher(config)
    elif what == "estimators":
        (config,) = parse("bench estimators", rest, EstimatorBench)
        report = bench_estimators(config)
    else:
        raise ConfigError(f"`hf-ewc bench` measures `fisher` or `estimators`, got `{what}`. See `hf-ewc bench --help`.")
    print()
    print(report, end="")
    if config.output:
        write_atomically(config.output, report)
    return 0
