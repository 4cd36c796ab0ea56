"""`hf-ewc train`, and the same as `accelerate launch -m hf_ewc.cli.train` on several GPUs."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from ..config import EWCConfig

HELP = """\
Usage: hf-ewc train [--config FILE.yaml] [--key value …]

Continue to pretrain all weights of a model on new text, while the weights that its Fisher names hold still.

  what            --model ID|FOLDER  --dataset FILE|ID  --output_dir FOLDER
  the penalty     --fisher FOLDER|USER/NAME[@REVISION] …  (several: old tasks, oldest first)  --fisher_decay 1.0  (less: fade)
                  --fisher_revision  (on the Hub; pinned and recorded)  --fisher_streaming  (read from the Hub without the disk)
                  --ewc_lambda 1.0  (the one dial: raise it to keep more; 0 is plain fine-tuning)
                  --ewc_mode proximal|loss|decoupled  --ewc_missing error|ignore  --anchor ID|FOLDER
  the data        --dataset_text_field text  --dataset_config  --dataset_split train  --dataset_revision  --streaming
                  --max_length 1024  --packing  --packing_strategy bfd_split  (keeps what exceeds max_length)
  the model       --revision  --dtype float32|bfloat16  --attn_implementation eager|sdpa|flash_attention_2
  the run         --learning_rate 2e-5  --lr_scheduler_type cosine  --warmup_steps 0.05  --max_steps  --num_train_epochs 3
                  --per_device_train_batch_size 8  --gradient_accumulation_steps 1  --optim paged_adamw_8bit  --bf16  --seed 42
                  --logging_steps 10  --save_steps 500  --save_total_limit  --report_to
  the folder      --resume (from the last complete checkpoint)  --overwrite (deletes what an earlier run wrote there)

Everything else in TRL's SFTConfig is a setting, too: https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig

Examples:
  hf-ewc train --config recipes/tiny-cpu/train.yaml
  hf-ewc train --config recipes/tiny-cpu/train.yaml --ewc_lambda 10 --output_dir runs/lambda-10
  hf-ewc train --config recipes/tiny-cpu/train.yaml --resume
  accelerate launch --config_file recipes/accelerate_configs/multi_gpu.yaml -m hf_ewc.cli.train --config FILE.yaml
"""


@dataclass
class TrainScript:
    """What `hf-ewc train` needs besides [`EWCConfig`]: which model and which rows."""

    model: str = field(metadata={"help": "Base model: a folder or an id on the Hub."})
    dataset: str = field(metadata={"help": "Text to learn: a local file, a folder of `save_to_disk`, or an id on the Hub."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    dtype: str = field(default="float32", metadata={"help": "Dtype of the weights: float32 or bfloat16."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, flex_attention."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset on the Hub."})
    dataset_split: str | None = field(default=None, metadata={"help": "Split to train on; default train."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the dataset."})
    streaming: bool = field(default=False, metadata={"help": "Read while training instead of before."})
    resume: bool = field(default=False, metadata={"help": "Continue from the last complete checkpoint in output_dir."})
    overwrite: bool = field(default=False, metadata={"help": "Delete what an earlier run wrote to output_dir."})

    def problems(self) -> list[str]:
        from ..config import DTYPES

        found = []
        if self.dtype not in DTYPES:
            found.append(
                f"`dtype: {self.dtype}` is not one of {', '.join(DTYPES)}; float16 loses small updates and is refused."
            )
        if self.resume and self.overwrite:
            found.append("`resume` continues what is in `output_dir` and `overwrite` deletes it: give one of them.")
        return found

    def into(self, args: EWCConfig) -> EWCConfig:
        """`args` with this model's revision, dtype and attention in `model_init_kwargs` (what is set there already wins)."""
        wanted = {"revision": self.revision, "dtype": self.dtype, "attn_implementation": self.attn_implementation}
        args.model_init_kwargs = {**{k: v for k, v in wanted.items() if v is not None}, **(args.model_init_kwargs or {})}  # type: ignore[dict-item]
        return args

    def data(self) -> dict[str, Any]:
        """What is trained on, for the record: a file by its name, a dataset on the Hub by its commit."""
        if Path(self.dataset).exists():
            return {"dataset": Path(self.dataset).name}
        from ..data import resolve_dataset_revision

        self.dataset_revision = resolve_dataset_revision(self.dataset, self.dataset_revision)
        source = {"config": self.dataset_config, "split": self.dataset_split or "train", "revision": self.dataset_revision}
        return {"dataset": self.dataset, **source}

    def rows(self, args: EWCConfig) -> Dataset | IterableDataset:
        from ..data import load_rows

        return load_rows(
            self.dataset,
            config=self.dataset_config,
            split=self.dataset_split,
            revision=self.dataset_revision,
            streaming=self.streaming,
            columns=(),
        )


def parse_training(command: str, argv: list[str], script: type[TrainScript]) -> tuple[Any, EWCConfig]:
    """(script, [`EWCConfig`]) from file and flags; shared with `hf-ewc sweep`."""
    from ..config import EWCConfig, raise_problems
    from .options import parse

    parsed, args = parse(command, argv, script, EWCConfig, required=("output_dir",))
    found = []
    if parsed.streaming and args.max_steps <= 0:
        found.append("`streaming: true` needs `max_steps`: a stream has no length to count epochs in.")
    if args.eval_strategy != "no":
        found.append("`eval_strategy` needs a second dataset, which is not loaded here; use `hf-ewc evaluate` afterwards.")
    raise_problems("these settings cannot run; nothing was started", found)
    return parsed, parsed.into(args)


def run(argv: list[str]) -> int:
    launched = "WORLD_SIZE" in os.environ or any(name.startswith("ACCELERATE_") for name in os.environ)
    if not launched:
        print(f"The same as: accelerate launch -m hf_ewc.cli.train {shlex.join(argv)}", flush=True)
    script, args = parse_training("train", argv, TrainScript)

    from accelerate import PartialState

    from ..errors import ConfigError
    from ..experiment import check_fisher, train_model
    from ..files import STATE_FILE
    from .output import MODEL_FILES, claim, refuse_same_folder

    state = PartialState()
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if wanted != state.num_processes:
        raise ConfigError(
            f"WORLD_SIZE says {wanted} processes, but accelerate sees {state.num_processes}: each would train alone on the "
            "same rows. Launch with `accelerate launch --multi_gpu --num_processes N` or `torchrun --nproc_per_node N`. "
            "Nothing was trained."
        )

    def say(line: str) -> None:
        if state.is_main_process:
            print(line, flush=True)

    out = str(args.output_dir)
    refuse_same_folder(out, model=script.model, fisher=args.fisher, anchor=args.anchor)
    base, fisher = check_fisher(script.model, args)
    if state.is_main_process:
        marks = (STATE_FILE, f"checkpoint-*/{STATE_FILE}")
        claim(out, marks, MODEL_FILES, resume=script.resume, overwrite=script.overwrite)
    state.wait_for_everyone()
    say(f"{base.label}: {base.num_parameters:,} parameters, {state.num_processes} process(es), λ = {args.ewc_lambda:g}")
    data = script.data()  # first, as it pins the dataset's revision
    rows = script.rows(args)
    log = train_model(script.model, args, rows, fisher=fisher, data=data, resume=script.resume, progress=say)
    say(summary(script.model, args, log))
    return 0


def summary(model: str, args: EWCConfig, log: dict[str, Any]) -> str:
    """What was trained, where it is, and what to type next."""
    lines = [f"\nTrained {log['steps']} steps; loss {log.get('loss', log.get('train_loss', float('nan'))):.4f} at the end."]
    if "ewc/kl_nats" in log:
        lines.append(f"Estimated divergence from the base on old text: {log['ewc/kl_nats']:.4g} nats per token (ewc/kl_nats).")
    out = args.output_dir
    lines.append(f"The model is in {out}")
    lines.append(f"Next: hf-ewc evaluate --model {out} --base {model} --texts old=OLD.jsonl new=NEW.jsonl")
    return "\n".join(lines)


if __name__ == "__main__":
    from hf_ewc.cli.main import main

    sys.exit(main(["train", *sys.argv[1:]]))
