"""Figures in the Hub's two forms: `.eval_results/*.yaml` for registered benchmarks, `model-index` for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from .. import __version__
from ..artifact import card
from ..errors import ConfigError

# Dataset on the Hub → its `task_id` there. Entries for any other dataset are refused by the Hub, which keeps the list.
REGISTERED = {
    "openai/gsm8k": "gsm8k",
    "TIGER-Lab/MMLU-Pro": "mmlu_pro",
    "Idavidrein/gpqa": "diamond",
    "cais/hle": "hle",
}


def eval_result_files(results: dict, run: dict, source_url: str | None = None) -> dict[str, str]:
    """
    Path in the model's repository → content, for the question sets that are a benchmark which the Hub registers.

    A set counts only if its dataset was recorded (`dataset` of its figures, or `settings.questions`), and never by its name:
    anybody may call a file "gsm8k". Usually there is none, and then nothing is claimed.

    Args:
        results (`dict`): of `results.json`.
        run (`dict`): the checkpoint's own run in it, see [`pick_run`].
        source_url (`str`, *optional*): page that tells how it was measured.
    """
    files = {}
    for name, score in run["metrics"].get("questions", {}).items():
        dataset, revision = _dataset(results, name, score)
        if dataset not in REGISTERED or score.get("accuracy") is None or score.get("limit"):  # a part is no benchmark
            continue
        entry = EvalResultEntry(
            dataset_id=dataset,
            task_id=REGISTERED[dataset],
            value=round(100 * score["accuracy"], 2),
            dataset_revision=revision,
            source_url=source_url,
            notes=f"{score['n']} questions, lm-evaluation-harness through hf_ewc {__version__}",
        )
        slug = dataset.rpartition("/")[2].lower()
        files[f".eval_results/{slug}.yaml"] = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
    return files


def model_index(results: dict, run: dict) -> list[EvalResult]:
    """
    The other figures of a checkpoint as `model-index` entries: bits per byte of each text, forgetting, learning, and the
    accuracy on each question set that is no registered benchmark. What is not finite is left out.

    Args:
        results (`dict`): of `results.json`.
        run (`dict`): the checkpoint's own run in it, see [`pick_run`].
    """
    old, new = results["settings"]["old"], results["settings"]["new"]
    figures: list[tuple[str, str, str, float | None, str | None]] = []
    for name, score in run["metrics"]["texts"].items():
        figures.append((name, "bits_per_byte", "bits per byte (less is better)", score["bits_per_byte"], None))
        before = results["before"]["texts"].get(name, {}).get("bits_per_byte")
        change = None if before is None or score["bits_per_byte"] is None else score["bits_per_byte"] - before
        if name == old:
            figures.append((name, "forgetting", "forgetting (bits per byte above the base)", change, None))
        if name == new:
            learned = None if change is None else -change
            figures.append((name, "learning", "learning (bits per byte below the base)", learned, None))
    for name, score in run["metrics"].get("questions", {}).items():
        dataset, revision = _dataset(results, name, score)
        if dataset not in REGISTERED:
            figures.append((name, "accuracy", "accuracy", score["accuracy"], revision))
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name=name,
            dataset_revision=revision,
            metric_type=kind,
            metric_name=title,
            metric_value=round(value, 6),
        )
        for name, kind, title, value, revision in figures
        if value is not None
    ]


def pick_run(results: dict, state: Mapping[str, Any], name: str = "", fingerprint: str | None = None) -> dict:
    """
    The run of a sweep or an evaluation that is this checkpoint, never a guess: the weights that were measured must be its own,
    by their hash. Where a hash is missing λ must be equal, and if several runs have it, the mode or the folder's name must
    tell them apart.

    Args:
        results (`dict`): of `results.json`.
        state (`dict`): of `ewc_state.json`.
        name (`str`, *optional*): folder or repository of the model; `hf-ewc evaluate` calls its runs by it.
        fingerprint (`str`, *optional*): of its weights, see [`BaseModel`].

    Raises:
        [`ConfigError`]: no such run, several, or figures of other weights or of another base.
    """
    recorded, anchor = results.get("base", {}).get("fingerprint"), (state.get("anchor") or {}).get("fingerprint")
    if recorded and anchor and recorded != anchor:
        raise ConfigError(
            f"these results are of runs from another base model: its weights are sha256 {recorded}, this checkpoint's base "
            f"has {anchor}. Name the results of this checkpoint. Nothing was rendered."
        )
    runs = results["runs"]
    if fingerprint and any(map(measured, runs)):
        if tied := [run for run in runs if measured(run) == fingerprint]:
            return tied[0]  # several are the same weights
        others = "\n".join(f"    {_run(run)}: sha256 {measured(run) or 'not recorded'}" for run in runs)
        runs = [run for run in runs if not measured(run)]  # of a sweep that an older version began
        if not runs:
            raise ConfigError(
                f"these results are of other weights than this checkpoint's, whose card would show another model's figures:\n"
                f"    this checkpoint: sha256 {fingerprint}\n{others}\nMeasure this one: `hf-ewc evaluate --model … --base … "
                "--output results.json`, and name that file. Nothing was rendered."
            )
    strength, mode = state.get("ewc_lambda"), state.get("ewc_mode")
    same = [run for run in runs if strength is None or float(run["ewc_lambda"]) == float(strength)]
    called = card.last_part(name)
    by_mode = [run for run in same if run["mode"] == mode or (run["mode"] == "sft" and not strength)]
    by_name = [run for run in same if called in (run["mode"], run["metrics"].get("model", {}).get("name"))]
    for found in (by_mode, by_name, same):
        if len(found) == 1:
            return found[0]
    listed = "\n".join(f"    {_run(run)}" for run in results["runs"]) or "    none"
    raise ConfigError(
        f"the results hold {len(same) or 'no'} runs that could be this checkpoint (mode {mode}, λ = {strength}, '{name}'):\n"
        f"{listed}\nName the `results.json` in which this model was measured. Nothing was rendered."
    )


def measured(run: dict) -> str | None:
    """Fingerprint of the weights that a run's figures are of; older files do not have it."""
    return (run["metrics"].get("model") or {}).get("fingerprint")


def _run(run: dict) -> str:
    return f"{run['mode']}, λ = {run['ewc_lambda']:g}"


def _dataset(results: dict, name: str, score: dict) -> tuple[str | None, str | None]:
    """Id and commit of the dataset on the Hub that a question set is, as far as they were recorded."""
    recorded: Any = score.get("dataset")
    if recorded is None:
        known = results["settings"].get("questions")
        recorded = known.get(name) if isinstance(known, dict) else None
    if not isinstance(recorded, str) or not card.hub_dataset(recorded, score.get("dataset_revision")):
        return None, None
    return recorded, score.get("dataset_revision")
