"""`hf-ewc fisher`: measure which weights carry what the model must keep."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..artifact import FisherInformation
    from ..config import FisherConfig

HELP = """\
Usage: hf-ewc fisher [--config FILE.yaml] [--key value …]
       hf-ewc fisher convert | fold | import …   (each has its own --help)

Measure which weights carry what the model must keep: the diagonal Fisher information, from examples of that
knowledge. The probe decides what is kept. One square per example, so the result does not depend on --batch_size.

  what         --model ID|FOLDER  --output_dir FOLDER
  the probe    --probe mmlu        questions; the letter of the right answer (columns question, choices, answer)
               --probe completion  prompts and scored completions (columns prompt, completion)
               --probe text        running text (--text_column text)
               --probe lm_eval:TASK   any task of lm-evaluation-harness (--task_folder for tasks of your own)
               --dataset FILE|ID  --dataset_config  --dataset_split  --dataset_revision  --allow_test_split
               --max_examples N  --max_length 512  --seed 0
  or several   --probes '{"facts": {"dataset": "q.jsonl", "weight": 2}, "english": {"probe": "text", "dataset": …}}'
  the estimate --labels empirical|sampled|options  --draws 1  --granularity example|token|batch
               --until_stable 0.95 (stop when two halves agree)  --report (draw how well they agree)
  the run      --batch_size 8  --scratch_mb 256  --path auto|one_by_one  --dtype float32|bfloat16  --device
               --max_dropped 0.01  --revision
  processes    torchrun --nproc_per_node N -m hf_ewc.cli.main fisher … --num_processes N
               --sharding replicate (each the whole model) | fsdp2 (each a part of it)
  the folder   --codec bfloat16|float32|log8  --overwrite (replaces a Fisher there)
               --resume (continues a killed run: its sums lie in OUTPUT_DIR.partial or in --work_dir, written
               every --save_every 256 examples)

All settings with their reasons: python -c "import hf_ewc; help(hf_ewc.FisherConfig)"

Examples:
  hf-ewc fisher --config recipes/tiny-cpu/fisher.yaml
  hf-ewc fisher --model google/gemma-2-2b --probe mmlu --max_examples 2000 --output_dir gemma-2-2b-fisher-mmlu
  hf-ewc fisher --model demo-out/base --probe text --dataset old.jsonl --output_dir runs/fisher-text
"""

# what `fisher/state.py` writes, and its folders of several processes and of the probes of a mixture
SUMS = ("estimate.json", "sums-*", ".tmp-*", "process-*-of-*", "[0-9][0-9]-*")


@dataclass
class FisherScript:
    """What `hf-ewc fisher` needs besides [`FisherConfig`]."""

    model: str = field(metadata={"help": "Base model: a folder or an id on the Hub."})
    output_dir: str = field(metadata={"help": "Where the Fisher goes."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a Fisher that lies in output_dir."})
    report: bool = field(default=False, metadata={"help": "Draw how well the halves of the examples agree."})


def beside_output(given: dict[str, Any]) -> dict[str, Any]:
    """The default of `work_dir`: an estimate is resumable without asking."""
    return {"work_dir": f"{Path(given['output_dir'])}.partial"} if given.get("output_dir") else {}


def run(argv: list[str]) -> int:
    from ..config import FisherConfig
    from ..errors import ConfigError
    from ..fisher import Replicas, estimate_fisher
    from .options import parse
    from .output import claim, refuse_same_folder

    script, config = parse("fisher", argv, FisherScript, FisherConfig, defaults=beside_output)
    out = Path(script.output_dir)
    partial = Path(config.work_dir or f"{out}.partial")  # `work_dir: null` asks for an estimate that cannot be resumed
    refuse_same_folder(out, model=script.model)
    processes = Replicas.joined(config.num_processes, config.device)
    begun = any(partial.rglob("estimate.json"))
    if config.resume and (out / "fisher_config.json").is_file() and not (begun and script.overwrite):
        if begun:
            raise ConfigError(
                f"{out} holds a finished Fisher, and {partial} the sums of a later estimate. To continue that one and replace "
                "the Fisher by it, use `--resume --overwrite`. Nothing was started."
            )
        if processes.rank == 0:
            print(f"Nothing to resume: {out} holds a finished Fisher. To estimate it again, use `--overwrite`.")
        return 0
    # an old Fisher stays until the new one takes its place; only the sums of an interrupted run go at once
    if processes.rank == 0:
        claim(out, ("fisher_config.json",), (), resume=config.resume, overwrite=script.overwrite)
        again = script.overwrite and not config.resume
        claim(partial, SUMS, SUMS, resume=config.resume, overwrite=again, setting="work_dir")
    processes.gather(None)  # the others wait, lest they find what is being deleted

    fisher = estimate_fisher(script.model, config)
    processes.gather(None)  # all have read what lies in `partial`
    if processes.rank == 0:
        _finish(script, config, fisher, partial)
    processes.gather(None)  # no process ends while another still works: a launcher might take that for a failure
    return 0


def _finish(script: FisherScript, config: FisherConfig, fisher: FisherInformation, partial: Path) -> None:
    """Write the Fisher, clear the running sums away, and say what was measured."""
    from .output import claim

    out = Path(script.output_dir)
    fisher.save_pretrained(out, codec=config.codec, overwrite=script.overwrite)
    if partial == Path(f"{out}.partial"):
        claim(partial, SUMS, SUMS, resume=False, overwrite=True, setting="work_dir")
        with suppress(OSError):  # something else lies in it
            partial.rmdir()
    print(summary(script.model, out, config.until_stable, Path(f"{out}.stability.png") if script.report else None))


def summary(model: str, out: Path, threshold: float | None, picture: Path | None) -> str:
    """What was measured, read from the files as they lie there, and what to type next."""
    import pyarrow.parquet as pq

    from ..artifact import FisherInformation
    from ..fisher import stability_figure, stability_table

    manifest = FisherInformation.from_pretrained(out).manifest
    estimator = manifest.estimator
    lines = [stability_table(estimator.stability)] if estimator.stability else []
    if threshold is not None and estimator.stability:
        last = {figures.probe: figures for figures in estimator.stability}.values()
        reached = all(figures.correlation >= threshold for figures in last)
        lines.append(f"`until_stable: {threshold}` was {'reached' if reached else 'not reached: all examples were used'}")
    if picture is not None:
        stability_figure(estimator.stability, picture, threshold)
        lines.append(f"The picture of it is {picture}")
    how = f"{estimator.labels} labels, one square per {estimator.granularity}, {estimator.path.replace('_', ' ')}"
    if estimator.self_check is not None:
        how += f" (off the one-by-one path by at most {estimator.self_check:.1e} on a first batch)"
    lines.append(how)
    if estimator.fallback:
        lines.append(f"{len(estimator.fallback)} tensors went one by one: {', '.join(estimator.fallback[:5])} …")
    if estimator.trace_stderr is not None:
        lines.append(f"The trace is known to ± {100 * estimator.trace_stderr:.1f} % (from the scatter of the batches)")
    for probe in manifest.probes:
        dropped = f", {probe.dropped} dropped" if probe.dropped else ""
        kind = f"{probe.kind}:{probe.task}" if probe.task else probe.kind
        title = f"{probe.name} ({kind})" if probe.name else kind
        lines.append(f"{title}: {probe.examples} examples, {probe.scored_tokens} scored tokens{dropped}")
    lines.append(
        f"Trace {manifest.totals.trace:.4g} per token over {manifest.totals.num_parameters:,} parameters, most of it in:"
    )
    traces: dict[str, float] = {}
    for row in pq.read_table(out / "summary" / "params.parquet", columns=["name", "layer", "trace"]).to_pylist():
        part = row["name"] if row["layer"] is None else f"layer {row['layer']}"
        traces[part] = traces.get(part, 0.0) + row["trace"]
    total = sum(traces.values()) or 1.0
    for part in sorted(traces, key=lambda name: -traces[name])[:5]:
        lines.append(f"  {100 * traces[part] / total:5.1f} %  {part}")
    lines.append(f"The Fisher is in {out}")
    lines.append(f"Next: hf-ewc train --model {model} --fisher {out} --dataset NEW.jsonl --output_dir OUT")
    return "\n".join(lines)
