"""Offline, single-threaded where it matters, and the tiny models that every test uses (see `tests/tiny.py`)."""

import os

for _name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402  (huggingface_hub reads the variables when it is imported, so they are set first)
import tiny  # noqa: E402


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer with Gemma's special tokens (<pad>, <eos>, <bos>, <unk>), trained on the spot."""
    return tiny.make_tokenizer()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory, tokenizer):
    """Folder of a tied, two-layer Gemma-2 with its tokenizer, as `save_pretrained` writes it."""
    return tiny.save_base(tmp_path_factory.mktemp("base"), tokenizer)
