"""`hf-ewc merge`: a trained model goes part of the way back to its base, each weight by its importance."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..merge import Merged

HELP = """\
Usage: hf-ewc merge --adapted ID|FOLDER --output_dir FOLDER [--key value …]

EWC after training: each weight of a trained model goes back towards the base by its importance F for what the base knew,
  base + (adapted − base) / (1 + λ · F / mean F)
λ = 0 is the adapted model, bit by bit. λ = inf is the base, but for weights with F = 0, which stay adapted. At λ = 1 a weight
of mean importance goes half of the way; this λ is another one than that of training. Needs no graphics card: some pieces of a
tensor are in memory at a time.

  --adapted ID|FOLDER      the trained model (--adapted_revision on the Hub)
  --base ID|FOLDER         the model before training (--revision); default: what the adapted model's ewc_state.json names
  --fisher ID|FOLDER       measured at that base (--fisher_revision); default: what the adapted model's ewc_state.json names
  --merge_lambda 1.0       λ, from 0 to inf
  --interpolate 0.5        instead: base + (1 − 0.5) · (adapted − base), all weights alike, without a Fisher; to compare with
  --ewc_missing error      or ignore: parameters that the Fisher does not hold stay adapted
  --dtype float32          or bfloat16; default: what the adapted model has
  --overwrite              replaces an earlier merge in OUTPUT_DIR

Examples:
  hf-ewc merge --adapted runs/lt --merge_lambda 1 --output_dir runs/lt-merged
  hf-ewc merge --adapted me/gemma-lt --base google/gemma-2-2b --fisher me/gemma-2-2b-fisher-mmlu --output_dir merged
  hf-ewc merge --adapted runs/lt --interpolate 0.5 --output_dir runs/lt-half
"""


@dataclass
class MergeScript:
    """What `hf-ewc merge` needs."""

    adapted: str = field(metadata={"help": "The trained model: a folder or an id on the Hub."})
    output_dir: str = field(metadata={"help": "Where the merged model goes."})
    base: str | None = field(default=None, metadata={"help": "The model before training."})
    fisher: str | None = field(default=None, metadata={"help": "The Fisher that was measured at the base."})
    merge_lambda: float | None = field(default=None, metadata={"help": "λ, from 0 to inf; 1 by default."})
    interpolate: float | None = field(default=None, metadata={"help": "Instead of λ: the same share for all weights."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the base on the Hub."})
    adapted_revision: str | None = field(default=None, metadata={"help": "The same for the adapted model."})
    fisher_revision: str | None = field(default=None, metadata={"help": "The same for the Fisher."})
    ewc_missing: str = field(default="error", metadata={"help": "ignore: what the Fisher does not hold stays adapted."})
    dtype: str | None = field(default=None, metadata={"help": "float32 or bfloat16; the adapted model's by default."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an earlier merge in output_dir."})

    def problems(self) -> list[str]:
        from ..merge import setting_problems

        if self.merge_lambda is None and self.interpolate is None:
            self.merge_lambda = 1.0
        return setting_problems(self.merge_lambda, self.interpolate, self.ewc_missing, self.dtype)


def run(argv: list[str]) -> int:
    from ..files import STATE_FILE
    from .options import parse
    from .output import claim, refuse_same_folder

    (script,) = parse("merge", argv, MergeScript)
    refuse_same_folder(script.output_dir, adapted=script.adapted, base=script.base, fisher=script.fisher)
    claim(script.output_dir, (STATE_FILE,), (), resume=None, overwrite=script.overwrite)

    from ..merge import merge_models

    print(f"merging into {script.output_dir}", file=sys.stderr, flush=True)
    merged = merge_models(
        script.base,
        script.adapted,
        script.fisher,
        script.merge_lambda,
        script.output_dir,
        interpolate=script.interpolate,
        revision=script.revision,
        adapted_revision=script.adapted_revision,
        fisher_revision=script.fisher_revision,
        ewc_missing=script.ewc_missing,
        dtype=script.dtype,
        overwrite=script.overwrite,
    )
    print(summary(merged, script))
    return 0


def summary(merged: Merged, script: MergeScript) -> str:
    """How far which tensors went, and what to type next."""
    fisher, total = merged.fisher, merged.groups["all"]
    lines = [f"Merged '{merged.adapted.label}' with its base '{merged.base.label}'"]
    if fisher is None:
        lines[0] += f": {script.interpolate:.4g} of the way back, for all {total.weights:,} weights."
    else:
        mean = fisher.trace / fisher.manifest.totals.num_parameters
        lines[0] += f", λ = {script.merge_lambda:.4g}, mean F {mean:.4g} per token."
        lines.append(f"{'':12}{'weights':>16}{'way back':>11}{'weighted by F':>16}{'½ Σ F δ² before':>18}{'after':>11}")
        for group, share in merged.groups.items():
            lines.append(
                f"{group:12}{share.weights:>16,}{share.way:>11.1%}{share.way_by_fisher:>16.1%}"
                f"{share.kl_before:>18.4g}{share.kl_after:>11.4g}"
            )
        lines.append("½ Σ F δ², with δ the difference from the base: the KL from it that F predicts, in nats per probe token.")
    lines.append(f"The model is in {merged.folder}")
    models = shlex.join([str(merged.folder), script.adapted])
    lines.append(
        f"Next: hf-ewc evaluate --model {models} --base {shlex.quote(merged.base.id)} --texts old=OLD.jsonl new=NEW.jsonl"
    )
    return "\n".join(lines)
