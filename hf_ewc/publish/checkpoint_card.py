"""`README.md` of an adapted model: rendered from what training and evaluation wrote down, and from nothing else."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

from ..artifact import card
from ..errors import ConfigError
from ..evaluation import table_markdown
from ..hub import Licence, count, is_repo_id, page, scrubbed
from .eval_results import measured, model_index, pick_run
from .origins import UNKNOWN, Origin, base_of, data_of, fisher_of, parts_of

NOT_RUN = "**Not yet run**"
NO_DATA = "data that was not recorded (`push_to_hub(dataset_name=…)` names it)"
NOT_TIED = "These figures were not tied to these weights by their hash."
NO_FIGURES = (
    "Not measured yet. `hf-ewc evaluate --model … --base … --output results.json`, then push again with it (`--results`)."
)

# The settings of a run that a reader compares: only these leave the machine, so no path and no token can.
SETTINGS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "num_train_epochs", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "world_size", "max_length", "packing", "packing_strategy", "optim", "weight_decay"),
    *("max_grad_norm", "dtype", "bf16", "seed"),
)

CITATIONS = """\
```bibtex
@article{kirkpatrick2017overcoming,
  title   = {Overcoming catastrophic forgetting in neural networks},
  author  = {Kirkpatrick, James and Pascanu, Razvan and Rabinowitz, Neil and Veness, Joel and Desjardins, Guillaume and
             Rusu, Andrei A. and Milan, Kieran and Quan, John and Ramalho, Tiago and Grabska-Barwinska, Agnieszka and
             Hassabis, Demis and Clopath, Claudia and Kumaran, Dharshan and Hadsell, Raia},
  journal = {Proceedings of the National Academy of Sciences},
  volume  = {114}, number = {13}, pages = {3521--3526}, year = {2017},
  eprint  = {1612.00796}, archivePrefix = {arXiv}
}

@misc{sliogeris2025elastic,
  title  = {Elastic Weight Consolidation for Full-Parameter Continual Pre-Training of Gemma2},
  author = {Šliogeris, Vytenis and Daniušis, Povilas and Nakvosas, Artūras},
  year   = {2025}, eprint = {2505.05946}, archivePrefix = {arXiv},
  note   = {Version 2: Full-Parameter Continual Pretraining of Gemma2: Insights into Fluency and Domain Knowledge}
}
```"""


def render_checkpoint_card(
    state: Mapping[str, Any],
    *,
    repo_id: str | None,
    results: dict | None = None,
    licence: Licence | None = None,
    language: str | Sequence[str] | None = None,
    planned: bool = False,
    name: str | None = None,
    fingerprint: str | None = None,
) -> str:
    """
    The model card of an adapted checkpoint: lineage, what it kept and learned, use, limits, citations.

    Args:
        state (`dict`): of `ewc_state.json`. Fields that are absent read "not recorded".
        repo_id (`str`, *optional*): model repository that it will lie in.
        results (`dict`, *optional*): of `results.json`; the checkpoint's run is found by [`pick_run`].
        licence ([`Licence`], *optional*): of the base model, which an adapted model inherits.
        language (`str` or list of them, *optional*): codes for the front matter, such as `["en", "lt"]`.
        planned (`bool`, *optional*, defaults to `False`): nothing was run yet. The settings are shown, and a mark in the place
            of every figure.
        name (`str`, *optional*): folder of the model, by which its run may be called in `results`.
        fingerprint (`str`, *optional*): of the checkpoint's weights, see [`BaseModel`]: `results` must be of these.

    Raises:
        [`ConfigError`]: figures for a model that was not run, or `results` that do not hold exactly one run of this model.
    """
    if planned and results is not None:
        raise ConfigError("this card is `planned: true` and has results: one of them is wrong. Nothing was rendered.")
    title = repo_id or name or "Adapted model"
    here = repo_id if repo_id and is_repo_id(repo_id) else "path/to/this/folder"
    run = pick_run(results, state, name or repo_id or "", fingerprint) if results is not None else None
    base, fishers, data = base_of(state), [fisher_of(part) for part in parts_of(state)], data_of(state)
    mark = NOT_RUN if planned else UNKNOWN
    notice = f"{NOT_RUN}: this is a template, with the settings of a recipe and a mark in the place of every figure.\n\n"
    return scrubbed(f"""---
{_front_matter(title, base, fishers, data, licence, language, model_index(results, run) if results and run else None)}
---

# {title}

{notice if planned else ""}All weights of {base.markdown() if base.source else f"a base model that was {UNKNOWN}"}, \
{"to be " if planned else ""}trained further on {data.markdown() if data.source else NO_DATA}.
{_method(state, fishers, planned)}
It is an ordinary `transformers` model: nothing of EWC is needed to use it.
{card.made_with(state.get("hf_ewc"))}
## Where it comes from

| | |
|---|---|
{chr(10).join(_origin_rows(state, base, fishers, data, mark))}

`hf-ewc card --lineage {here}` follows these links and compares the hashes.

## What it kept, what it learned

{_figures(results, run, state, planned)}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{here}")
model = AutoModelForCausalLM.from_pretrained("{here}")
{_inputs(language)}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))
```

## How to train it again

{_settings(state)}

```bash
{_command(state, base, fishers, data)}
```

## Limits

- It keeps what its Fisher was probed for; what was not probed was free to be forgotten.
{"- The figures are of one training run. Another seed gives other figures." + chr(10) if run else ""}\
- It continues text. Nothing was done to make it follow instructions, or safe, beyond what its base model was.
- The base model's own limits hold here too.

## Licence

{card.licence_text(base.id if base.on_hub else None, licence)}

## Citation

{CITATIONS}
""")


def _front_matter(
    title: str,
    base: Origin,
    fishers: list[Origin],
    data: Origin,
    licence: Licence | None,
    language: str | Sequence[str] | None,
    eval_results: list | None,
) -> str:
    """`base_model` and `datasets` draw the edges of the Hub's graph; `lineage` has the commits and hashes, for programs."""
    terms = {key: getattr(licence, key) for key in ("license", "license_name", "license_link")} if licence else {}
    datasets = dict.fromkeys(str(origin.id) for origin in (data, *fishers) if origin.on_hub)
    return (
        ModelCardData(
            language=language if isinstance(language, str) or language is None else list(language),
            **terms,
            library_name="transformers",
            pipeline_tag="text-generation",
            base_model=base.id if base.on_hub else None,
            base_model_relation="finetune" if base.on_hub else None,
            datasets=list(datasets) or None,
            tags=["ewc", "continual-learning", "trl", "sft"],
            model_name=title if eval_results else None,
            eval_results=eval_results,
            lineage=[origin.record() for origin in (*fishers, base, data) if origin.source] or None,
        )
        .to_yaml()
        .strip()
    )


def _method(state: Mapping[str, Any], fishers: list[Origin], planned: bool) -> str:
    return _held(state, fishers, planned) + _merged(state.get("merge"))


def _merged(merge: Mapping[str, Any] | None) -> str:
    """For a model that `hf-ewc merge` took back towards its base."""
    if not merge:
        return ""
    if merge.get("interpolate") is not None:
        return f"\nAfterwards all weights alike went {merge['interpolate']:.0%} of the way back to the base (interpolation)."
    strength = merge["merge_lambda"]
    shown = strength if isinstance(strength, str) else f"{strength:g}"
    return f"\nAfterwards each weight went part of the way back to the base by its importance (post-hoc EWC, λ = {shown})."


def _held(state: Mapping[str, Any], fishers: list[Origin], planned: bool) -> str:
    if state.get("ewc_lambda") == 0:
        return "This was plain fine-tuning (λ = 0): nothing held what it knew."
    names = " and ".join(fisher.markdown() for fisher in fishers) or f"a Fisher information that was {UNKNOWN}"
    held = "is to hold" if planned else "held"
    return f"Meanwhile Elastic Weight Consolidation {held} the weights that matter according to {names}."


def _origin_rows(state: Mapping[str, Any], base: Origin, fishers: list[Origin], data: Origin, mark: str) -> list[str]:
    rows = [f"| base model | {_origin(base, mark)}, weights {_hash(base, mark)} |"]
    for fisher in fishers:
        weight = f", coefficient {fisher.coefficient:.6g}" if fisher.coefficient is not None else ""
        rows.append(f"| Fisher | {_origin(fisher, mark)}, {_hash(fisher, mark)}{weight} |")
    if not fishers:
        rows.append(f"| Fisher | {'none' if state.get('ewc_lambda') == 0 else mark} |")
    parts = [part for part in (data.config, data.split) if part]
    strength, step, held = (state.get(key) for key in ("ewc_lambda", "global_step", "protected_tensors"))
    free = len(state.get("unprotected") or [])
    return [
        *rows,
        f"| training data | {' · '.join([_origin(data, mark), *parts])} |",
        f"| λ | {mark if strength is None else f'{strength:g}'} |",
        f"| mode | {state.get('ewc_mode') or mark} |",
        f"| optimizer steps | {mark if step is None else f'{step:,}'} |",
        f"| tensors held | {mark if held is None else f'{held:,}, {free:,} left free'} |",
    ]


def _origin(origin: Origin, mark: str) -> str:
    if origin.source is None:
        return mark
    if not origin.on_hub:
        return f"{origin.markdown()} (local)"
    commit = f"[`{origin.revision}`]({page(origin.source, origin.repo_type, origin.revision)})" if origin.revision else mark
    return f"[{origin.id}]({page(origin.source, origin.repo_type)}) at {commit}"


def _hash(origin: Origin, mark: str) -> str:
    return f"sha256 {f'`{origin.sha256}`' if origin.sha256 else mark}"


def _figures(results: dict | None, run: dict | None, state: Mapping[str, Any], planned: bool) -> str:
    strength = state.get("ewc_lambda")
    if planned:
        shown = UNKNOWN if strength is None else f"{strength:g}"
        return (
            "| mode | λ | old texts (bits/byte) | forgetting (bits/byte) | new texts (bits/byte) | learning (bits/byte) |\n"
            f"| :-- | --: | --: | --: | --: | --: |\n| base | – | {NOT_RUN} | – | {NOT_RUN} | – |\n"
            f"| {state.get('ewc_mode') or UNKNOWN} | {shown} | {' | '.join([NOT_RUN] * 4)} |"
        )
    if results is None or run is None:
        return NO_FIGURES
    mode = "sft" if run["mode"] == "sft" and not strength else state.get("ewc_mode") or run["mode"]
    shown_run = {**run, "mode": mode, "ewc_lambda": run["ewc_lambda"] if strength is None else strength}
    metrics, digest = run["metrics"], measured(run)
    tie = f"The model's figures are of weights with sha256 `{digest}`." if digest else NOT_TIED
    texts, questions = metrics["texts"].items(), metrics.get("questions", {}).items()
    sizes = [f"{name}: {count(score['documents'], 'document')}, {count(score['bytes'], 'byte')}" for name, score in texts]
    sizes += [f"{name}: {count(score['n'], 'question')}" for name, score in questions]
    model = metrics.get("model", {})
    how = "".join(f"; {key} {model[key]}" for key in ("window", "dtype") if model.get(key))
    return f"""{table_markdown({**results, "runs": [shown_run]})}

Bits per byte: less is better, and comparable between tokenizers and languages. Forgetting and learning are differences from the
base; ± is one standard error over the questions. Measured on {"; ".join(sizes)}{how}.
{tie}"""


def _inputs(language: str | Sequence[str] | None) -> str:
    """The example's prompt: English where the model's languages are unknown or have it, and the reader's own otherwise."""
    languages = [language] if isinstance(language, str) else list(language or ["en"])
    english = any(code.partition("-")[0] == "en" for code in languages)
    prompt, remark = ("Once upon a time", "") if english else ("", "  # your text")
    return f'inputs = tokenizer("{prompt}", return_tensors="pt"){remark}'


def _settings(state: Mapping[str, Any]) -> str:
    known = _training(state)
    if not known:
        return f"The training settings were {UNKNOWN}."
    return "\n".join(["| setting | value |", "|---|---|", *(f"| `{key}` | {_word(known[key])} |" for key in known)])


def _training(state: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded settings of the run, in a fixed order, without a length that another one overrides."""
    training = state.get("training") or {}
    unused = "num_train_epochs" if (training.get("max_steps") or -1) > 0 else "max_steps"
    return {key: training[key] for key in SETTINGS if training.get(key) is not None and key != unused}


def _command(state: Mapping[str, Any], base: Origin, fishers: list[Origin], data: Origin) -> str:
    """The `hf-ewc train` that the recorded settings amount to; what was not recorded stands in capitals."""
    settings: dict[str, Any] = {"model": base.id, "revision": base.revision, "fisher": [f.id or "FISHER" for f in fishers]}
    if len(fishers) == 1:
        settings["fisher_revision"] = fishers[0].revision
    settings["dataset"] = data.id
    settings |= {f"dataset_{key}": getattr(data, key) for key in ("config", "split", "revision") if data.on_hub}
    settings |= {key: state.get(key) for key in ("ewc_lambda", "ewc_mode")}
    settings |= {key: value for key, value in _training(state).items() if key != "world_size"}
    lines = ["hf-ewc train"]
    for key, value in {**settings, "output_dir": "OUT"}.items():
        if not value and value != 0 and value is not False and key not in ("model", "dataset"):
            continue
        values = value if isinstance(value, list) else [key.upper() if value is None else value]
        word = f"--{key} {' '.join(shlex.quote(_word(item)) for item in values)}"
        if len(lines[-1]) + len(word) > 100:
            lines.append(" ")
        lines[-1] += f" {word}"
    return " \\\n".join(lines)


def _word(value: Any) -> str:
    """As YAML and the command line write it."""
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
