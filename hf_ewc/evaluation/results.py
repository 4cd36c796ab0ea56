"""`results.json`: what a sweep measured, and how it is read.

Figures, tables and pages are views of this one file, so each of them can be made again without a GPU:

```python
{"schema": 1,
 "base": {...},                                   # which model, with the `fingerprint` of its weights
 "before": metrics,                               # `evaluate_model` of the base
 "runs": [{"mode": "proximal", "ewc_lambda": 1.0, "metrics": metrics, "log": {...}, "seconds": 61.0},
          # made after training: the λ = 0 run, taken part of the way back to the base
          {"mode": "merge", "ewc_lambda": 0.0, "merge_lambda": 10.0, ...},
          {"mode": "interpolate", "ewc_lambda": 0.0, "interpolate": 0.5, ...}],
 "settings": {"old": "english", "new": "lithuanian", ...},   # names of the texts that are to be kept and learned
 "versions": {...}}
```

`ewc_lambda` is always the λ of training, as in `ewc_state.json`, so that a merge of the λ = 0 run has 0 there, and how far it
went back in a field of its own. A reader that does not know these fields shows such rows under their mode with λ = 0, and
draws no line through them.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import write_atomically

SCHEMA = 1


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers, its standard error, and what guessing would get; `None` where it is unknown."""

    value: float | None
    stderr: float | None
    chance: float | None


@dataclass(frozen=True)
class Row:
    """
    One model of the sweep in the figures that are reported.

    Parameters:
        mode (`str`): Where the penalty acts; `"base"` for the model before training.
        ewc_lambda (`float`, *optional*): Strength λ in training, `None` for the base.
        old, new (`float`, *optional*): Bits per byte of the old (kept) and the new (learned) texts; `None` if not finite.
        forgetting (`float`, *optional*): `old` minus the base's `old`.
        learning (`float`, *optional*): The base's `new` minus `new`.
        questions (`dict[str, Accuracy]`): Question set → accuracy.
        merge_lambda (`float`, *optional*): λ of a merge with the base after training.
        interpolate (`float`, *optional*): In its place, the share of the way back to the base, the same for all weights.
    """

    mode: str
    ewc_lambda: float | None
    old: float | None
    new: float | None
    forgetting: float | None
    learning: float | None
    questions: dict[str, Accuracy]
    merge_lambda: float | None = None
    interpolate: float | None = None

    @property
    def merged(self) -> bool:
        """Whether the model was made after training."""
        return self.merge_lambda is not None or self.interpolate is not None

    @property
    def strength(self) -> float | None:
        """What orders the rows of a mode: λ, that of the merge, or the share of the way back; `None` for the base."""
        return next((value for value in (self.merge_lambda, self.interpolate) if value is not None), self.ewc_lambda)

    @property
    def label(self) -> str:
        """The strength as it is shown: `10`, or `50 %` of the way back, which is no λ."""
        if self.interpolate is not None:
            return f"{100 * self.interpolate:g} %"
        return "–" if self.strength is None else f"{self.strength:g}"


def domains(results: dict) -> tuple[str, str]:
    """Names of the old and the new texts."""
    settings = results["settings"]
    return settings["old"], settings["new"]


def domain_titles(results: dict) -> tuple[str, str]:
    """Names of the old and the new texts as they are shown."""
    old, new = domains(results)
    return old[:1].upper() + old[1:], new[:1].upper() + new[1:]


def rows(results: dict) -> list[Row]:
    """The base, then the runs: modes in the order of their first run, λ (or share) ascending within a mode."""
    check_results(results)
    base = _row({"mode": "base", "ewc_lambda": None, "metrics": results["before"]}, domains(results))
    modes = list(dict.fromkeys(run["mode"] for run in results["runs"]))
    runs = [_row(run, domains(results), base) for run in results["runs"]]
    return [base, *sorted(runs, key=lambda row: (modes.index(row.mode), row.strength))]


def fronts(table: list[Row]) -> dict[str, list[Row]]:
    """
    Mode → its rows from λ = 0 upwards, for the lines of a figure.

    λ = 0 is plain fine-tuning in every mode, so one such run opens the line of all modes that have none of their own; that of
    a merge, too, which starts from this very model.
    """
    runs = table[1:]
    plain = [row for row in runs if row.strength == 0]
    lines: dict[str, list[Row]] = {}
    for mode in dict.fromkeys(row.mode for row in runs if row.strength):
        own = [row for row in runs if row.mode == mode]
        lines[mode] = own if own[0].strength == 0 else plain[:1] + own
    if not lines and plain:
        lines[plain[0].mode] = plain[:1]
    return lines


def check_results(results: Any, source: str = "these results") -> None:
    """Raise a [`DataError`] if `results` is not a sweep of this schema with both domains measured on every model."""
    if not isinstance(results, dict) or "schema" not in results:
        raise DataError(f"{source} is no results.json of `hf-ewc evaluate --base … --output` or of a sweep. Name one.")
    if results["schema"] != SCHEMA:
        raise DataError(
            f"{source}: schema {results['schema']!r}, but this version of hf_ewc reads schema {SCHEMA}. Name the "
            "`results.json` of a sweep, or install the version that wrote it."
        )
    missing = [key for key in ("before", "runs", "settings") if key not in results]
    missing += [f"settings.{key}" for key in ("old", "new") if key not in results.get("settings", {})]
    if missing:
        raise DataError(f"{source}: {', '.join(missing)} missing; the file is incomplete. Run the sweep again.")
    models = {"before": results["before"]}
    models |= {f"runs[{i}]": run["metrics"] for i, run in enumerate(results["runs"])}
    for name in domains(results):
        for model, metrics in models.items():
            if name not in metrics["texts"]:
                raise DataError(
                    f"{source}: `{model}` was not measured on {name!r}, only on {', '.join(metrics['texts']) or 'nothing'}. "
                    "`settings.old` and `settings.new` must name texts of the evaluation."
                )


def save_results(results: dict, path: str | Path) -> Path:
    """
    Write `results.json`. The file is there in full or not at all, also after a crash.

    Numbers that are not finite (a diverged run) become `null`: JSON has no NaN.
    """
    check_results(results)
    text = json.dumps(_finite_only(results), ensure_ascii=False, indent=1, allow_nan=False)
    return write_atomically(path, text + "\n")


def load_results(path: str | Path) -> dict:
    """Read and check a `results.json`; [`DataError`] if it is missing, damaged or of another schema."""
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read results from {path}: {error}. Name the `results.json` that a sweep wrote.") from error
    check_results(results, str(path))
    return results


def _row(run: dict, names: tuple[str, str], base: Row | None = None) -> Row:
    metrics = run["metrics"]
    old, new = (_finite(metrics["texts"][name]["bits_per_byte"]) for name in names)
    questions = {
        name: Accuracy(_finite(score["accuracy"]), _finite(score.get("stderr")), _finite(score.get("chance")))
        for name, score in metrics.get("questions", {}).items()
    }
    forgetting = _difference(old, base.old) if base else None
    learning = _difference(base.new, new) if base else None
    how = {name: run.get(name) for name in ("merge_lambda", "interpolate")}
    return Row(run["mode"], run["ewc_lambda"], old, new, forgetting, learning, questions, **how)


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _finite_only(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite_only(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite_only(item) for item in value]
    return _finite(value) if isinstance(value, float) else value
