"""`hf-ewc fisher import`: make a Fisher from the Adam state of a checkpoint, as an approximation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..artifact import FisherInformation

HELP = """\
Usage: hf-ewc fisher import --model CHECKPOINT --optimizer_state FILE --tokens_per_batch N --output_dir FOLDER

Make a Fisher from the second moments (exp_avg_sq) that Adam left beside a checkpoint. It needs no data and no
backward pass, and it is an APPROXIMATION: F ≈ N · v̂ holds where the training gradient is zero on average, nothing
was clipped and the weights stood still. It protects what was trained on last, whatever that was. Where you have
examples of what is to be kept, measure with `hf-ewc fisher` instead.

  --model ID|FOLDER        the checkpoint that the state was saved with; its weights become the anchor  [--revision]
  --optimizer_state FILE   its optimizer.pt (Trainer, torch or bitsandbytes Adam; read with torch's restricted
                           unpickler: name only files that you trust), or a safetensors file with keys
                           PARAMETER.exp_avg_sq
  --tokens_per_batch N     scored tokens of one optimizer step, all devices and accumulation steps together:
                           length × batch × accumulation × devices. F is proportional to it
  --beta2 B  --step T      only for files that do not say them
  --codec bfloat16|float32|log8      --overwrite (replaces a Fisher in the folder)

Examples:
  hf-ewc fisher import --model runs/base/checkpoint-9000 --optimizer_state runs/base/checkpoint-9000/optimizer.pt \\
    --tokens_per_batch 32768 --output_dir runs/fisher-adam
"""


@dataclass
class ImportScript:
    """What `hf-ewc fisher import` needs."""

    model: str = field(metadata={"help": "Checkpoint that the state was saved with: a folder or an id on the Hub."})
    optimizer_state: str = field(metadata={"help": "Its optimizer.pt, or a safetensors file of exp_avg_sq."})
    tokens_per_batch: int = field(metadata={"help": "Scored tokens of one optimizer step, over all devices."})
    output_dir: str = field(metadata={"help": "Where the Fisher goes."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    beta2: float | None = field(default=None, metadata={"help": "Adam's beta2, for files that do not say it."})
    step: int | None = field(default=None, metadata={"help": "Optimizer steps, for files that do not say them."})
    codec: str = field(default="bfloat16", metadata={"help": "Storage of the values: float32, bfloat16 or log8."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a Fisher that lies in output_dir."})

    def problems(self) -> list[str]:
        from ..config import checks, fisher

        known = checks.choice("codec", self.codec, fisher.CODECS)
        return [*known, *checks.at_least("tokens_per_batch", self.tokens_per_batch, 1)]


def run(argv: list[str]) -> int:
    from .options import parse
    from .output import claim, refuse_same_folder

    (script,) = parse("fisher import", argv, ImportScript)
    out = Path(script.output_dir)
    refuse_same_folder(out, model=script.model)
    claim(out, ("fisher_config.json",), (), resume=None, overwrite=script.overwrite)

    from ..artifact import FisherInformation
    from ..fisher import adam

    fisher = adam.import_adam_state(
        script.model,
        script.optimizer_state,
        script.tokens_per_batch,
        revision=script.revision,
        beta2=script.beta2,
        step=script.step,
    )
    fisher.save_pretrained(out, codec=script.codec, overwrite=script.overwrite)
    print(summary(script.model, FisherInformation.from_pretrained(out), out))
    return 0


def summary(model: str, stored: FisherInformation, out: Path) -> str:
    """What was made, what it is not, and what to type next."""
    manifest = stored.manifest
    (record,) = manifest.probes
    squares, tokens = record.examples, record.scored_tokens // record.examples
    noise = 100 * (2 / squares) ** 0.5
    return (
        f"APPROXIMATION: F = {tokens:,} tokens per batch × Adam's v̂, an average of about {squares:,} squared gradients of\n"
        f"batches, so each value is uncertain by about ±{noise:.0f} % from that alone. The scale is right\n"
        "only where the mean gradient was zero and nothing was clipped. It protects what was trained on last; no probe\n"
        "was measured.\n"
        f"Trace {manifest.totals.trace:.4g} per token over {manifest.totals.num_parameters:,} parameters.\n"
        f"The Fisher is in {out}\n"
        f"Next: hf-ewc train --model {model} --fisher {out} --dataset NEW.jsonl --output_dir OUT"
    )
