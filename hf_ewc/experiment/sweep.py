"""One training run per (mode, λ), measured and reported together: `hf-ewc sweep` and the demo, which merges as well.

A sweep is a folder that can be killed at any moment and started again:

    before.json                     the base's measurements
    runs/proximal-1/run.json        the run's settings, and its training log once it is trained
    runs/proximal-1/result.json     its measurements; a run that has it is finished
    runs/merge-10/result.json       the λ = 0 run, taken part of the way back to the base, and measured
    results.json, table.md, retention.png, report.html
"""

from __future__ import annotations

import gc
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset

from ..artifact import BaseModel, FisherInformation, Manifest
from ..config import EvaluationConfig, EWCConfig
from ..errors import ConfigError
from ..evaluation import evaluate_model, metrics_text, write_report
from ..trainer import last_complete_checkpoint
from .merges import plan_merges
from .records import check_recorded, content_of, describe, read_json, versions, write_json
from .training import Progress, Rows, check_fisher, train_model

# Training arguments that may change between the start and the end of a sweep without changing what is measured.
_FREE = re.compile(
    "output_dir|fisher(_decay|_streaming)?|run_name|project|disable_tqdm|report_to|ddp_timeout|push_to_hub|(log|save_|hub_|dataloader_|trackio_).*"
)
_SHOWN = re.compile(
    "learning_rate|lr_scheduler_type|warmup_steps|max_steps|num_train_epochs|per_device_train_batch_size|"
    "gradient_accumulation_steps|max_length|packing|optim|weight_decay|bf16|seed"
)


def plan_runs(modes: Sequence[str], lambdas: Sequence[float]) -> list[tuple[str, float]]:
    """(mode, λ) of every run of a sweep. λ = 0 is plain fine-tuning in any mode, so it runs once, first, as mode `"sft"`."""
    strengths = sorted({float(value) for value in lambdas})
    plain = [("sft", 0.0)] if 0.0 in strengths else []
    return plain + [(mode, value) for mode in dict.fromkeys(modes) for value in strengths if value]


def run_sweep(
    *,
    base: str,
    runs: Sequence[tuple[str, float]],
    make_args: Callable[[str, float, Path], EWCConfig],
    train_dataset: Rows | Callable[[], Rows],
    evaluation: EvaluationConfig,
    output_dir: str | Path,
    old: str,
    new: str,
    settings: dict[str, Any] | None = None,
    merges: Sequence[tuple[str, float]] = (),
    keep_checkpoints: bool = False,
    progress: Progress = print,
) -> dict:
    """
    Train and evaluate one model per (mode, λ), and write the table, the picture and the report.

    What is finished is not done again, what was interrupted goes on from its last complete checkpoint, and what was begun with
    other settings, another Fisher or another base is refused. Runs may be added to a finished sweep.

    Args:
        base (`str`): id or folder of the base model.
        runs (sequence of `(str, float)`): mode and λ, see [`plan_runs`].
        make_args (`Callable`): mode, λ and the run's folder → its [`EWCConfig`].
        train_dataset (`Dataset`, `IterableDataset`, or a function that loads one, once the Fisher is checked).
        evaluation ([`EvaluationConfig`]): what is measured on the base and on every run.
        output_dir (`str` or `Path`): the sweep's folder.
        old, new (`str`): names of the evaluation's texts that are to be kept and to be learned.
        settings (`dict`, *optional*): what else identifies the sweep, such as the dataset's name; recorded and compared.
        merges (sequence of `(str, float)`, *optional*): `("merge", λ)` or `("interpolate", share)`: models made after training
            from the λ = 0 run and the base by [`merge_models`], with the Fisher of the runs, and measured like these. Without
            a λ = 0 run there is nothing to merge, and they are left out.
        keep_checkpoints (`bool`, *optional*, defaults to `False`): keep each run's `checkpoint-*` besides its model.
        progress (`Callable`, *optional*): receives one line at a time.

    Returns:
        `dict`: the content of `results.json`, see `evaluation/results.py`.
    """
    if unknown := [name for name in (old, new) if name not in (evaluation.texts or {})]:
        known = ", ".join(evaluation.texts or ())
        raise ConfigError(f"`old` and `new` must name `texts`, and {', '.join(unknown)} is none of {known}.")
    if not runs:
        raise ConfigError("there is nothing to run: `lambdas` is empty.")
    folder = Path(output_dir)
    outs = [folder / "runs" / f"{mode}-{strength:g}" for mode, strength in runs]
    plan = [make_args(mode, strength, out) for (mode, strength), out in zip(runs, outs, strict=True)]

    # every check comes before any work
    fishers: dict[Any, FisherInformation | None] = {}
    for args in plan:
        args.check()
        if _source(args) not in fishers:
            model, fisher = check_fisher(base, args)
            fishers[_source(args)] = fisher
            for line in probe_overlaps(fisher.manifest, evaluation) if fisher else ():
                progress(f"warning: {line}")
    rows = train_dataset if isinstance(train_dataset, (Dataset, IterableDataset)) else train_dataset()
    measured = {"base": model.fingerprint, "evaluation": content_of(evaluation)}
    records = [
        {
            **measured,
            "fisher": getattr(fishers[_source(args)], "sha256", None),
            "data": {**(settings or {}), "fingerprint": getattr(rows, "_fingerprint", None)},
            "training": {k: v for k, v in args.to_dict().items() if not _FREE.fullmatch(k)},
        }
        for args in plan
    ]
    for out, record in zip(outs, records, strict=True):
        check_recorded(out / "run.json", record)
    merged = []
    if merges and (plain := next((i for i, (_, strength) in enumerate(runs) if strength == 0), None)) is not None:
        pull = next(filter(None, fishers.values()), None) or check_fisher(base, make_args("proximal", 1.0, outs[plain]))[1]
        merged = plan_merges(merges, outs[plain], model, pull, records[plain])
    total = len(runs) + len(merged)

    before = _base_metrics(base, model, evaluation, measured, folder / "before.json", progress)
    finished = []
    for number, ((mode, strength), out, args, record) in enumerate(zip(runs, outs, plan, records, strict=True), 1):
        title = f"[{number}/{total}] {mode}, λ = {strength:g}"
        if (out / "result.json").is_file():
            progress(f"{title}: finished before")
        else:
            _one_run(title, base, args, fishers[_source(args)], rows, evaluation, record, progress)
        for checkpoint in () if keep_checkpoints else out.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        finished.append({"mode": mode, "ewc_lambda": strength, **read_json(out / "result.json")})
    for number, merge in enumerate(merged, len(runs) + 1):
        title = f"[{number}/{total}] {merge.title}"
        if not merge.possible():
            progress(f"{title}: left out, as the loss of the λ = 0 run is not finite")
            continue
        if merge.finished():
            progress(f"{title}: finished before")
        else:
            _measure(title, merge.out, merge.make(), evaluation, progress)
        finished.append(merge.row())
    shown = {name: value for name, value in plan[0].to_dict().items() if _SHOWN.fullmatch(name)}
    results = {
        "schema": 1,
        "base": describe(model),
        "before": before,
        "runs": finished,
        "settings": {"old": old, "new": new, **(settings or {}), **shown},
        "versions": versions(),
    }
    write_report(results, folder)
    return results


def _one_run(
    title: str,
    base: str,
    args: EWCConfig,
    fisher: FisherInformation | None,
    rows: Rows,
    evaluation: EvaluationConfig,
    record: dict,
    progress: Progress,
) -> None:
    """Train (unless that was done), measure the model as it lies on the disk, and write `result.json`."""
    out = Path(args.output_dir or "")
    run = read_json(out / "run.json") if (out / "run.json").is_file() else {"settings": record}
    if "log" not in run:
        progress(f"{title}: training")
        resume = last_complete_checkpoint(out) is not None
        write_json(out / "run.json", run)
        started = time.monotonic()
        run["log"] = train_model(
            base, args, rows, fisher=fisher, resume=resume, progress=lambda line: progress(f"{title}: {line}")
        )
        run["seconds"] = time.monotonic() - started  # of the part that ran last
        _free_memory()
        write_json(out / "run.json", run)
    _measure(title, out, {"log": run["log"], "seconds": run["seconds"]}, evaluation, progress)


def _measure(title: str, out: Path, made: dict[str, Any], evaluation: EvaluationConfig, progress: Progress) -> None:
    """Measure a model as it lies on the disk, and write its `result.json`, which says that it is finished."""
    progress(f"{title}: measuring")
    metrics = evaluate_model(str(out), replace(evaluation, revision=None))
    _free_memory()
    write_json(out / "result.json", {"metrics": metrics, **made})
    progress(metrics_text(metrics))


def _base_metrics(
    base: str, model: BaseModel, evaluation: EvaluationConfig, record: dict, path: Path, progress: Progress
) -> dict:
    if not check_recorded(path, record):
        progress("measuring the base model")
        metrics = evaluate_model(base, replace(evaluation, revision=model.revision))
        _free_memory()
        write_json(path, {"settings": record, "metrics": metrics})
        progress(metrics_text(metrics))
    return read_json(path)["metrics"]


def probe_overlaps(manifest: Manifest, evaluation: EvaluationConfig) -> list[str]:
    """
    One sentence for each evaluation set that looks like what the Fisher was measured on. Keeping what was probed is what
    EWC is for; how well it keeps the *rest* is what a report should show.
    """
    found = []
    sets = {**(evaluation.texts or {}), **(evaluation.questions or {})}  # type: ignore[dict-item]
    for name, source in sets.items():
        local = Path(source).is_file()
        for probe in manifest.probes:
            same = probe.dataset == Path(source).name if local else (probe.dataset, probe.split) == (source, evaluation.split)
            if same:
                what = f"the file {probe.dataset}" if local else f"split {probe.split} of {probe.dataset}"
                found.append(
                    f"'{name}' is {what}, on which the Fisher was measured: its score says little about what else was kept."
                )
    return found


def _source(args: EWCConfig) -> Any:
    return (str(args.fisher), args.fisher_revision, args.fisher_decay) if args.ewc_lambda else None


def _free_memory() -> None:
    gc.collect()  # a Trainer and its callbacks refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
