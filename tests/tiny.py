"""Tiny models, tokenizers and data for the tests, made on the spot: nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

TEXTS = [
    "The keeper of the northern light writes every evening what the sea has brought to his rocks.",
    "In spring the canal rises, and the millers of the valley open the upper gates before dawn.",
    "Žiemą ežeras užšąla, o vaikai čiuožia nuo vieno kranto iki kito.",
    "A good clockmaker listens first; only then does she reach for the smallest of her screws.",
    "Močiutė virė uogienę, o per langą matėsi senas sodas ir bičių aviliai.",
    "Nobody in the harbour believed the boy, until the ferry came in with her paddle broken.",
    "Traukinys vėlavo, todėl keleiviai gėrė arbatą ir kalbėjosi apie orą.",
    "The glass is blown at night, because in the dark the eye judges its colour by the heat.",
]

QUESTIONS = [
    {"question": "Which animal barks?", "subject": "animals", "choices": ["cat", "dog", "fish", "hen"], "answer": 1},
    {"question": "What is frozen water?", "subject": "nature", "choices": ["ice", "oil", "sand", "air"], "answer": 0},
    {"question": "How many days has a week?", "subject": "time", "choices": ["five", "six", "seven", "ten"], "answer": 2},
    {"question": "What do bees make?", "subject": "animals", "choices": ["milk", "wool", "silk", "honey"], "answer": 3},
    {"question": "Which one is a fruit?", "subject": "nature", "choices": ["apple", "stone", "rope", "lamp"], "answer": 0},
    {"question": "Where do fish live?", "subject": "animals", "choices": ["sky", "water", "fire", "trees"], "answer": 1},
]


def make_tokenizer(vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """Byte-level BPE that prepends <bos>, like Gemma's; the same on every call."""
    core = Tokenizer(models.BPE(unk_token=None))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", core.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>", padding_side="left"
    )


def make_model(vocab_size: int = 320, seed: int = 0, **overrides) -> Gemma2ForCausalLM:
    """A tied, two-layer Gemma-2 with grouped-query attention and a sliding window in every other layer, float32."""
    settings = dict(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        sliding_window=64,
        query_pre_attn_scalar=8,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        attn_implementation="eager",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Gemma2ForCausalLM(Gemma2Config(**{**settings, **overrides})).eval()


def save_base(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 0, **overrides) -> Path:
    """Save a tiny model and its tokenizer; returns the folder."""
    make_model(len(tokenizer), seed, **overrides).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
