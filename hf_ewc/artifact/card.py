"""`README.md` of a Fisher: rendered from the manifest, so that it says nothing that was not measured."""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING

from huggingface_hub import DatasetCardData

from .manifest import ADAM_PATH

if TYPE_CHECKING:
    from .manifest import Manifest, ProbeRecord

_SQUARED = {
    "example": "one square per example n",
    "token": "one square per position of the input (as if each had weights of its own)",
    "batch": "one square per batch",
}
_LABELS = {
    "empirical": "the data's own targets",
    "sampled": "targets drawn from the model",
    "options": "all answer options, weighted by the model's probabilities",
}
_TARGETS = {
    "adam": "whatever the model was trained on last",
    "lm_eval": "the gold continuation, as lm-evaluation-harness scores it",
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
    base, totals = manifest.base_model, manifest.totals
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

{_method(manifest)}

| probe | scored | data | examples | scored tokens (T) | dropped | weight |
|---|---|---|---|---|---|---|
{chr(10).join(_probe_row(probe) for probe in manifest.probes)}
{_fold(manifest)}
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
{_codec(manifest)}
## Limits

- It belongs to exactly these base weights and this tokenizer. Any other model is refused, a fine-tuned or
  quantised copy too.
- It keeps what was probed for. What the probe does not touch is free to be forgotten.
- It is a diagonal, local approximation: the further the weights move, the less it says.
- These are not weights: no model can be loaded from this repository.

## Licence

Derived from the base model and subject to its terms; see the base model's own page.
"""


def _codec(manifest: Manifest) -> str:
    """How to read values that are not plain numbers; empty for those that are."""
    if manifest.storage.codec != "log8":
        return ""
    return f"""
In `log8` a parameter is a tensor of bytes q. For each {manifest.storage.block} values of its last axis, `NAME::scale` holds the
maximum and `NAME::span` the binary orders from there down to the least. q = 0 is exactly 0, else
F = scale · 2^((q − 255) / 254 · span), with a relative error of at most 2^(span / 508) − 1.
"""


def _fold(manifest: Manifest) -> str:
    """The section of a folded Fisher; empty for any other."""
    fold = manifest.fold
    if fold is None:
        return ""
    rows = []
    for pair in fold.pairs:
        name = f"{pair.base_id}@{pair.base_revision[:7]}" if pair.base_revision else PurePath(pair.base_id).name
        numbers = f"{pair.coefficient:.6g} | {pair.trace:.6g}"
        rows.append(f"| `{pair.fisher_sha256[:12]}` | `{name}` | `{pair.base_sha256[:12]}` | {numbers} |")
    anchor = (
        "All were measured at the same weights, which are the anchor."
        if fold.anchor is None
        else "They were measured at different weights θₖ. The penalty pulls to θ̄ = Σ cₖFₖθₖ / F, which lies in\n"
        "`anchor-*.safetensors` (float32) and is no model; where F is 0, it is the newest θₖ."
    )
    return f"""
## Folded

For all θ, Σₖ cₖ/2 · Σᵢ Fₖᵢ (θᵢ − θₖᵢ)² = ½ Σᵢ Fᵢ (θᵢ − θ̄ᵢ)² + {fold.constant:.6g} nats per token: {len(fold.pairs)} Fishers
became one, oldest first, cₖ = {fold.decay:g} to the number of later ones. Training goes on from the newest model.

| Fisher | base model (θₖ) | weights | cₖ | trace |
|---|---|---|---|---|
{chr(10).join(rows)}

{anchor}
"""


def _method(manifest: Manifest) -> str:
    """How it was measured, in words that fit no other way of measuring."""
    estimator = manifest.estimator
    if estimator.path == ADAM_PATH:
        return (
            "**This is an APPROXIMATION, not a measurement:** F = N · v̂ from Adam's second moments, N scored tokens per "
            "optimizer step. It is right in scale only where the mean training gradient was zero and unclipped and the weights "
            "stood still, and it speaks of whatever the model was trained on last."
        )
    squared = _SQUARED.get(estimator.granularity, f"one square per {estimator.granularity}")
    if estimator.granularity == "batch":
        squared += f" of {estimator.batch_size}" + (
            ", unbiased as the labels were drawn from the model" if estimator.labels == "sampled" else ", which is biased"
        )
    labels = _LABELS.get(estimator.labels, estimator.labels)
    check = "" if estimator.self_check is None else f" (checked: off the one-by-one path by at most {estimator.self_check:.1e})"
    lines = [
        f"F_i = 1/T · Σ_n (Σ_t ∂ log p(y_nt | x_n) / ∂θ_i)², {squared}; {labels}; gradients of a {estimator.model_dtype} "
        f"model, summed in {estimator.accumulation_dtype}, path `{estimator.path}`{check}. {_reduction(manifest)}",
        "With it, ½ Σ_i F_i (θ_i − θ*_i)² reads as nats of divergence from the base per probe token.",
    ]
    for figures in {figures.probe: figures for figures in estimator.stability}.values():  # the last of each probe
        lines.append(
            f"Two halves of the {figures.examples:,} examples{f' of {figures.probe}' if figures.probe else ''} have "
            f"log F correlated by {figures.correlation:.3f} and {figures.overlap:.0%} of their top 1 % of weights in common."
        )
    return "\n".join(lines)


def _reduction(manifest: Manifest) -> str:
    estimator = manifest.estimator
    if manifest.fold is not None:
        return "The files hold F = Σₖ cₖFₖ of several Fishers, each per scored token; see below."
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
    kind = f"{probe.kind}:{probe.task}" if probe.task else probe.kind
    if probe.kind == "adam":  # of an average over steps, not of examples
        numbers = f"{probe.examples:,} batches | about {probe.scored_tokens:,} | – | {probe.weight:.3g}"
    return f"| {f'{probe.name} ({kind})' if probe.name else kind} | {target} | {data} | {numbers} |"
