"""`README.md` of a Fisher: rendered from the manifest, so that it says nothing that was not measured."""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING

from huggingface_hub import DatasetCardData

if TYPE_CHECKING:
    from .manifest import Manifest, ProbeRecord

_TARGETS = {
    "mmlu": "the letter of the right answer, given question and choices",
    "completion": "the completion, given the prompt",
    "text": "every token of running text",
}


def render_card(manifest: Manifest) -> str:
    """
    The dataset card: what it measures, of which base at which revision, how to use it, limits.

    The front matter's `configs:` block is not decoration: without it `load_dataset` takes the JSON files for data and
    crashes. The licence is left to the base model, whose terms a derivative inherits.
    """
    base, estimator, totals = manifest.base_model, manifest.estimator, manifest.totals
    model = base.id if base.revision else PurePath(base.id).name  # a path on somebody's disk is nobody else's business
    metadata = DatasetCardData(
        pretty_name=f"Diagonal Fisher information of {model}",
        tags=["fisher-information", "ewc", "continual-learning", "safetensors", "tabular"],
        size_categories=["n<1K"],
        configs=[
            {"config_name": "summary", "default": True, "data_files": [{"split": "params", "path": "summary/params.parquet"}]}
        ],
        base_model=base.id if base.revision else None,
    ).to_yaml()
    at = f"revision `{base.revision}`" if base.revision else "a local folder"
    zeros = totals.zeros / max(1, totals.num_parameters)
    return f"""---
{metadata.strip()}
---

# Diagonal Fisher information of {model}

For each weight of the base model: how much the probabilities of the probe's tokens depend on it. Elastic Weight
Consolidation uses it to let a model learn something new while the weights that carry the probed knowledge hold.

| base model | |
|---|---|
| model | `{model}` ({base.architecture}), {at} |
| weights | sha256 `{base.fingerprint}` over the weight files |
| tokenizer | {f"sha256 `{base.tokenizer_sha256}`" if base.tokenizer_sha256 else "not recorded"} |
| parameters | {totals.num_parameters:,} in {len(manifest.parameters)} tensors |

## What was measured

F_i = 1/T · Σ_n (Σ_t ∂ log p(y_nt | x_n) / ∂θ_i)², one square per {estimator.granularity} n, {estimator.labels} labels,
gradients of a {estimator.model_dtype} model, summed in {estimator.accumulation_dtype}. {_reduction(manifest)}
With it, ½ Σ_i F_i (θ_i − θ*_i)² reads as nats of divergence from the base per probe token.

| probe | scored | data | examples | scored tokens (T) | dropped | weight |
|---|---|---|---|---|---|---|
{chr(10).join(_probe_row(probe) for probe in manifest.probes)}

Trace {totals.trace:.6g} per scored token; {zeros:.2%} of the values are exactly zero.

## Use

```python
from hf_ewc import EWCConfig, EWCTrainer

args = EWCConfig("out", ewc_lambda=1.0, fisher="path/to/this/folder")
trainer = EWCTrainer("{model}", args, train_dataset=corpus)
trainer.train()
```

`datasets.load_dataset("path/to/this/folder")` gives the summary, one row per tensor (F per scored token; quantiles of
tensors above 4 M entries are those of a random sample). The values themselves lie in the safetensors files, codec
`{manifest.storage.codec}`, under the names of `named_parameters()`. `FisherInformation.from_pretrained` checks the files,
the trainer that they belong to its base model and tokenizer.

## Limits

- It belongs to exactly these base weights and this tokenizer. Any other model is refused, a fine-tuned or
  quantised copy too.
- It keeps what was probed for. What the probe does not touch is free to be forgotten.
- It is a diagonal, local approximation: the further the weights move, the less it says.
- These are not weights: no model can be loaded from this repository.

## Licence

Derived from the base model and subject to its terms; see the base model's own page.
"""


def _reduction(manifest: Manifest) -> str:
    estimator = manifest.estimator
    if estimator.reduction == "sum":
        return f"The files hold the sums of squares: divide by T = {estimator.normalizer:g}."
    return "The files hold the mean per scored token, a weighted mixture of the probes below."


def _probe_row(probe: ProbeRecord) -> str:
    target = _TARGETS.get(probe.kind, "")
    # A path on somebody's disk is told apart from a Hub id by its being absolute or having an extension.
    name = probe.dataset or "in memory"
    path = PurePath(name)
    shown = path.name if path.is_absolute() or path.suffix or len(path.parts) > 2 else name
    data = " · ".join(part for part in (shown, probe.config, probe.split, probe.revision and probe.revision[:7]) if part)
    numbers = f"{probe.examples:,} | {probe.scored_tokens:,} | {probe.dropped:,} | {probe.weight:.3g}"
    return f"| {probe.kind} | {target} | {data} | {numbers} |"
