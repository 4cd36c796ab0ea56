"""Cards of what was not run yet: the settings of a recipe, and an explicit mark in the place of every figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..artifact import card
from ..hub import Licence, page
from .checkpoint_card import NOT_RUN, SETTINGS


def render_planned_fisher(recipe: Mapping[str, Any], *, repo_id: str, licence: Licence | None = None) -> str:
    """
    The dataset card of a Fisher that nobody estimated yet.

    Args:
        recipe (`dict`): settings of `hf-ewc fisher`.
        repo_id (`str`): dataset repository that it is meant for.
        licence ([`Licence`], *optional*): of the base model.
    """
    model, revision, data = recipe["model"], recipe.get("revision"), recipe.get("dataset")
    link = f"[`{revision}`]({page(model, commit=revision)})" if revision else NOT_RUN
    rows = [(key, recipe[key]) for key in ("labels", "max_examples", "max_length", "dtype", "codec") if key in recipe]
    parts = " · ".join(str(recipe[key]) for key in ("dataset_config", "dataset_split") if recipe.get(key))
    lineage = [{"what": "base model", "id": model, "revision": revision}, {"what": "probe", "id": data}]
    lineage = [{key: value for key, value in link.items() if value is not None} for link in lineage]
    return f"""---
{card.front_matter(model, model, licence, [data] if data else [], lineage)}
---

# Diagonal Fisher information of {model}

{NOT_RUN}: this is a template, with the settings of a recipe and a mark in the place of every figure.

For each weight of the base model: how much the probabilities of the probe's tokens depend on it. Elastic Weight
Consolidation uses it to let a model learn something new while the weights that carry the probed knowledge hold.

| | |
|---|---|
| base model | [{model}]({page(model)}) at {link} |
| weights | {NOT_RUN} |
| tokenizer | {NOT_RUN} |
| parameters | {NOT_RUN} |
| this Fisher | {NOT_RUN} |

## What is to be measured

| setting | value |
|---|---|
| probe | `{recipe.get("probe")}` on [{data}]({page(str(data), "dataset")}){f" · {parts}" if parts else ""} |
{chr(10).join(f"| `{key}` | {value} |" for key, value in rows)}

| examples | scored tokens | dropped | trace per scored token | exact zeros |
|---|---|---|---|---|
| {" | ".join([NOT_RUN] * 5)} |

## Use

Once it is there:

```python
from hf_ewc import EWCConfig, EWCTrainer

args = EWCConfig("out", ewc_lambda=1.0, fisher="{repo_id}", model_init_kwargs={{"revision": "{revision}"}})
trainer = EWCTrainer("{model}", args, train_dataset=corpus)
trainer.train()
```
{card.PIN}
{card.LIMITS}
## Licence

{card.licence_text(model, licence)}
"""


def state_of_recipe(recipe: Mapping[str, Any], fisher_repo: str | None) -> dict[str, Any]:
    """
    What `ewc_state.json` will say as far as the settings of `hf-ewc train` decide it. What only a run can tell is absent.

    Args:
        recipe (`dict`): settings of `hf-ewc train`.
        fisher_repo (`str`, *optional*): dataset repository that the recipe's Fisher is meant for.
    """
    data = {key: recipe.get(f"dataset_{key}") for key in ("config", "split", "revision")}
    return {
        "ewc_lambda": float(recipe["ewc_lambda"]) if "ewc_lambda" in recipe else None,
        "ewc_mode": recipe.get("ewc_mode"),
        "fisher": {"source": recipe.get("fisher"), "repo_id": fisher_repo},
        "anchor": {"id": recipe["model"], "revision": recipe.get("revision")},
        "data": {"dataset": recipe.get("dataset"), **data},
        "training": {key: _number(recipe[key]) for key in SETTINGS if key in recipe},
    }


def _number(value: Any) -> Any:
    """YAML 1.1 reads `2e-4` as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
