"""`hf-ewc fisher convert`: store a Fisher with another codec, and see what that costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..artifact import FisherInformation, accuracy

HELP = """\
Usage: hf-ewc fisher convert --fisher FOLDER --codec CODEC --output_dir FOLDER [--overwrite] [--report]

Store a Fisher with another codec. One tensor is in memory at a time. Afterwards the files are compared with the
original: relative errors of the values, and of the penalty ½ Σ F δ² under three drifts δ of the weights.

  --codec float32    exact, 4 bytes per value
  --codec bfloat16   2 bytes; relative error at most 0.4 %
  --codec log8       1.05 bytes; about 0.5 % in the median, more where 128 neighbours differ widely; no value becomes zero
  --report           one line per tensor, too
  --overwrite        replaces a Fisher in OUTPUT_DIR

A codec cannot bring back what an earlier one rounded away: from bfloat16, float32 keeps the bfloat16 values.

Examples:
  hf-ewc fisher convert --fisher gemma-2-2b-fisher-mmlu --codec log8 --output_dir gemma-2-2b-fisher-mmlu-log8
  hf-ewc fisher convert --fisher runs/fisher --codec log8 --output_dir runs/fisher-log8 --report
"""

DRIFTS = """\
median, p99, worst: relative error of the values. new 0: positive values that became zero. top 1 %: share that stays in the
top 1 %, and rank correlation within it. iid, EWC-like, whitened: error of the penalty for weights that drifted by z (a standard
normal number), by z / (1 + F / mean F), and by 1/√F (each weight costs the same: this shows what small values lost)."""


@dataclass
class ConvertScript:
    """What `hf-ewc fisher convert` needs."""

    fisher: str = field(metadata={"help": "The Fisher to convert: a folder."})
    codec: str = field(metadata={"help": "float32, bfloat16 or log8."})
    output_dir: str = field(metadata={"help": "Where the converted Fisher goes."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a Fisher that lies in output_dir."})
    report: bool = field(default=False, metadata={"help": "One line per tensor in the table."})

    def problems(self) -> list[str]:
        from ..artifact import codec

        known = (None, *codec.CODECS)  # `None`: missing, which has been said
        return [] if self.codec in known else [f"`codec: {self.codec}` is not one of {', '.join(codec.CODECS)}."]


def run(argv: list[str]) -> int:
    from .options import parse
    from .output import claim, refuse_same_folder

    (script,) = parse("fisher convert", argv, ConvertScript)
    out = Path(script.output_dir)
    refuse_same_folder(out, fisher=script.fisher)
    claim(out, ("fisher_config.json",), (), resume=None, overwrite=script.overwrite)

    from ..artifact import FisherInformation, accuracy, codec
    from ..errors import ConfigError

    fisher = FisherInformation.from_pretrained(script.fisher)
    source = fisher.manifest.storage.codec
    if source == script.codec:
        raise ConfigError(
            f"the Fisher '{script.fisher}' is stored as {source} already, so there is nothing to convert. Copy the folder, or "
            "name another `codec`. Nothing was written."
        )
    fisher.save_pretrained(out, codec=script.codec, overwrite=script.overwrite)
    stored = FisherInformation.from_pretrained(out)
    report = accuracy.stored_accuracy(fisher, stored)
    print(sizes_text(fisher, stored))
    print(f"\n{accuracy_text([report.total, *(report.tensors if script.report else [])])}\n\n{DRIFTS}\n")
    if not codec.CODECS[source].exact:
        print(
            f"These errors are against '{script.fisher}', which is {source}: what that rounded away is not in them, and\n"
            f"{script.codec} cannot bring it back. To avoid it, convert from float32, or estimate again.\n"
        )
    print(f"The Fisher is in {out}")
    return 0


def sizes_text(before: FisherInformation, after: FisherInformation) -> str:
    """Bytes, trace and zeros of both, below each other."""
    lines = [f"{'':8}{'codec':10}{'bytes':>17}{'per value':>11}{'trace':>13}{'zeros':>15}"]
    for label, fisher in (("before", before), ("after", after)):
        storage, totals = fisher.manifest.storage, fisher.manifest.totals
        size = sum(shard.size for shard in storage.shards.values())
        lines.append(
            f"{label:8}{storage.codec:10}{size:>17,}{size / max(1, totals.num_parameters):>11.3f}"
            f"{totals.trace:>13.6g}{totals.zeros:>15,}"
        )
    return "\n".join(lines)


def accuracy_text(rows: list[accuracy.Accuracy]) -> str:
    """One line for each [`Accuracy`]."""
    width = max(len(row.name) for row in rows) + 2
    columns = ("bytes/value", "median", "p99", "worst", "new 0", "top 1 % kept", "in order", "iid", "EWC-like", "whitened")
    widths = [max(len(column) + 2, 10) for column in columns]
    lines = ["".join([" " * width, *(f"{column:>{w}}" for column, w in zip(columns, widths, strict=True))])]
    for row in rows:
        cells = [f"{row.bytes / max(1, row.values):.3f}"]
        cells += [f"{error:.2%}" for error in (row.median, row.p99, row.worst)]
        cells += [f"{row.new_zeros:,}", f"{row.top_kept:.4f}", f"{row.top_order:.4f}"]
        cells += [f"{error:+.1e}" for error in (row.iid, row.ewc_like, row.whitened)]
        lines.append("".join([f"{row.name:<{width}}", *(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True))]))
    return "\n".join(lines)
