"""What the training tests share: a random Fisher artifact, a data set, and a one-call run of a trainer on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from hf_ewc import BaseModel, EWCConfig, EWCTrainer, FisherInformation
from hf_ewc.artifact import EstimatorRecord, ProbeRecord

TOKENS = 50.0  # scored tokens of the made-up probe: everything must be divided by it


def make_fisher(base: Path, *, scale: float = 1.0, seed: int = 1, drop: str | None = None) -> FisherInformation:
    """Random positive sums of squares over several decades, for every parameter of `base` (but `drop`)."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    sums = {
        name: scale * TOKENS * torch.exp(2 * torch.randn(param.shape, generator=generator))
        for name, param in model.named_parameters()
        if name != drop
    }
    probe = ProbeRecord(kind="text", dataset=None, ids_sha256="0" * 64, examples=10, scored_tokens=int(TOKENS))
    return FisherInformation.from_tensors(
        sums, base=BaseModel.resolve(base), probes=[probe], estimator=EstimatorRecord(normalizer=TOKENS)
    )


def make_rows(n: int = 64) -> Dataset:
    """Short texts of about the same length, each one different."""
    return Dataset.from_list([{"text": f"{tiny.TEXTS[i % len(tiny.TEXTS)][:40]} {i}"} for i in range(n)])


def settings(output_dir: Path, **overrides: Any) -> dict[str, Any]:
    """Small, deterministic, quiet; warm-up and decay, so that the learning rate changes at every step."""
    return {
        **dict(
            output_dir=str(output_dir),
            per_device_train_batch_size=4,
            max_steps=6,
            learning_rate=1e-2,
            lr_scheduler_type="linear",
            max_length=32,
            optim="adamw_torch",
            max_grad_norm=1.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            activation_checkpointing=False,
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
            seed=3,
        ),
        **overrides,
    }


def ewc_trainer(
    base: Path, output_dir: Path, *, rows: Dataset | None = None, model: Any = None, **overrides: Any
) -> EWCTrainer:
    """An [`EWCTrainer`] of the tiny base on `rows`; nothing has been trained yet."""
    return EWCTrainer(
        str(base) if model is None else model,
        EWCConfig(**settings(output_dir, **overrides)),
        train_dataset=make_rows() if rows is None else rows,
    )


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)
