"""`hf-ewc fisher fold`: several Fishers with their anchors become one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..artifact import FisherInformation

HELP = """\
Usage: hf-ewc fisher fold FISHER FISHER [FISHER …] --output_dir FOLDER [--key value …]

A model that learned one task after another has a Fisher for each: measured on the old task, at the weights that the
model had then. This folds them into one, exactly: F = Σ cₖFₖ, anchor Σ cₖFₖθₖ / F. One penalty then protects all tasks,
at the price of one. Where the base models differ, the anchor (4 bytes per parameter) is stored beside F.

  the Fishers  from oldest to newest; training goes on from the base model of the last one (--fishers in a YAML file)
  --decay 1.0         each Fisher is multiplied by this once per later one; below 1, old tasks fade
  --bases FOLDER …    where base models lie by now, if not where the Fishers say
  --codec bfloat16    or float32 (exact), log8; of F. The anchor is always float32
  --overwrite         replaces a Fisher in OUTPUT_DIR

`hf-ewc train --fisher FISHER FISHER …` does the same by itself, anew in each run.

Examples:
  hf-ewc fisher fold runs/fisher-english runs/fisher-lithuanian --output_dir runs/fisher-both
  hf-ewc fisher fold runs/fisher-{1,2,3} --decay 0.9 --codec float32 --output_dir runs/fisher-all
"""


@dataclass
class FoldScript:
    """What `hf-ewc fisher fold` needs."""

    fishers: list[str] = field(metadata={"help": "The Fishers, from oldest to newest: folders."})
    output_dir: str = field(metadata={"help": "Where the folded Fisher goes."})
    decay: float = field(default=1.0, metadata={"help": "Weakens each Fisher once per later one."})
    bases: list[str] | None = field(default=None, metadata={"help": "Where base models lie by now."})
    codec: str = field(default="bfloat16", metadata={"help": "float32, bfloat16 or log8."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a Fisher that lies in output_dir."})

    def problems(self) -> list[str]:
        from ..artifact import codec

        found = []
        if self.fishers is not None and len(self.fishers) < 2:
            found.append("`fishers` names one Fisher, and folding needs at least two.")
        found += [
            f"`fishers` names '{name}' twice." for name in sorted({f for f in self.fishers or () if self.fishers.count(f) > 1})
        ]
        if not 0 < self.decay <= 1:
            found.append(
                f"`decay: {self.decay}` must be above 0 and at most 1: each Fisher is multiplied by it once per later one."
            )
        if self.codec not in codec.CODECS:
            found.append(f"`codec: {self.codec}` is not one of {', '.join(codec.CODECS)}.")
        return found


def run(argv: list[str]) -> int:
    from .options import parse
    from .output import claim, refuse_same_folder

    bare = next((n for n, word in enumerate(argv) if word.startswith("--")), len(argv))
    (script,) = parse("fisher fold", ["--fishers", *argv] if bare else argv, FoldScript)
    out = Path(script.output_dir)
    refuse_same_folder(out, fishers=script.fishers, bases=script.bases)
    claim(out, ("fisher_config.json",), (), resume=None, overwrite=script.overwrite)

    from ..artifact import BaseModel, FisherInformation

    parts = [FisherInformation.from_pretrained(name) for name in script.fishers]
    fold = FisherInformation.fold(parts, script.decay, [BaseModel.resolve(base) for base in script.bases or ()])
    fold.save_pretrained(out, codec=script.codec, overwrite=script.overwrite)
    print(summary(fold, FisherInformation.from_pretrained(out), out))
    return 0


def summary(fold: FisherInformation, stored: FisherInformation, out: Path) -> str:
    """What became of what, and what to type next; the totals as they lie in the files."""
    manifest = stored.manifest
    record = manifest.fold
    assert record is not None
    lines = [f"Folded {len(record.pairs)} Fishers, oldest first:"]
    for part, pair in zip(fold.parts, record.pairs, strict=True):
        base = part.manifest.base_model.label
        lines.append(f"  {part.source}: trace {pair.trace:.4g} × {pair.coefficient:.4g}, measured at {base}")
    lines.append(f"Trace {manifest.totals.trace:.4g} per token over {manifest.totals.num_parameters:,} parameters.")
    if record.anchor is None:
        lines.append("All were measured at the same weights, so these are the anchor, and the fold is their sum.")
    else:
        size = sum(file.size for file in record.anchor.values())
        lines.append(f"The anchor lies between their bases and is stored, too ({size:,} bytes).")
    lines.append(
        f"Constant {record.constant:.4g} nats per token: by so much the penalties side by side exceed the one, everywhere."
    )
    lines.append(f"The Fisher is in {out}")
    lines.append(f"Next: hf-ewc train --model {manifest.base_model.id} --fisher {out} --dataset NEW.jsonl --output_dir OUT")
    return "\n".join(lines)
