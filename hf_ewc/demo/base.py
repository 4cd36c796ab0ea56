"""The demo's base model: a small Gemma-2 that is pretrained, here and now, on the English world and on nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
    set_seed,
)

from ..config import EWCConfig
from ..experiment import Progress, ProgressLines
from ..trainer import EWCTrainer
from .world import World, answer, interleaved, prompt, question_rows, text_rows

CONTEXT = 128
"""Tokens per training piece and per evaluation window."""

SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(vocab_size=1024, hidden_size=64, num_hidden_layers=2),  # 0.2 M parameters: for tests
    "small": dict(vocab_size=2048, hidden_size=128, num_hidden_layers=4),  # 1.0 M: the default
    "medium": dict(vocab_size=4096, hidden_size=256, num_hidden_layers=6),  # 5.3 M: minutes instead of seconds per run
}


def train_tokenizer(world: World, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE on both languages (as Gemma's tokenizer knows both), with Gemma's special tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    asked = [prompt(row) + answer(row) for row in world.questions]
    core.train_from_iterator([*world.english, *world.lithuanian, *asked], trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", core.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        model_max_length=2 * CONTEXT,
    )


def new_model(size: str, tokenizer: PreTrainedTokenizerBase) -> Gemma2ForCausalLM:
    """A randomly initialised Gemma-2: tied embedding, grouped-query attention, soft-capping, sliding windows."""
    shape = SIZES[size]
    head = shape["hidden_size"] // 4
    settings: dict[str, Any] = dict(
        vocab_size=len(tokenizer),
        hidden_size=shape["hidden_size"],
        intermediate_size=3 * shape["hidden_size"],
        num_hidden_layers=shape["num_hidden_layers"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head,
        query_pre_attn_scalar=head,
        max_position_embeddings=2 * CONTEXT,
        sliding_window=CONTEXT,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        attn_implementation="eager",
    )
    return Gemma2ForCausalLM(Gemma2Config(**settings))


def common_arguments(seed: int) -> dict[str, Any]:
    """Training arguments that pretraining and continued training share: quiet, on the CPU, float32."""
    return dict(
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        max_length=CONTEXT * 2,
        per_device_train_batch_size=16,
        max_grad_norm=1.0,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=seed,
    )


def pretrain(
    world: World, tokenizer: PreTrainedTokenizerBase, size: str, steps: int, seed: int, folder: Path, progress: Progress
) -> None:
    """
    Make the base model in two stages, as real ones are made, and save it to `folder`, whole or not at all.

    Two fifths of the steps read English text and the questions with their answers, every token scored. The rest alternate two
    batches of questions, of which only the answer's letter is scored, with one of text. Batches alternate because a letter is
    one token among a hundred: in a mixed batch its gradient would drown.
    """
    set_seed(seed)
    reading = steps * 2 // 5
    told = [prompt(row) + answer(row) for row in world.questions]
    text = text_rows([*world.english, *told], tokenizer, CONTEXT)
    asked = question_rows(world.questions, tokenizer)
    partial = folder.with_name(f"{folder.name}.partial")
    model = new_model(size, tokenizer)
    for stage, batch, learning_rate, parts in (
        (reading, 16, 6e-3, [text]),
        (steps - reading, 24, 4e-3, [asked, asked, text]),
    ):
        arguments = EWCConfig(
            output_dir=str(partial),
            ewc_lambda=0.0,
            optim="adamw_torch",
            learning_rate=learning_rate,
            adam_beta2=0.95,
            max_steps=max(stage, 1),
            train_sampling_strategy="sequential",
            **{**common_arguments(seed), "per_device_train_batch_size": batch, "logging_steps": max(stage // 4, 1)},
        )
        rows = interleaved(parts, batch, max(stage, 1), seed)
        trainer = EWCTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)  # prints raw dicts
        trainer.add_callback(ProgressLines(progress))
        trainer.train()
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
