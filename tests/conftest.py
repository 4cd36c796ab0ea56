"""Offline, and the tiny model and Fisher that every test uses (see `tests/tiny.py` and `tests/training.py`)."""

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


@pytest.fixture(scope="session")
def fisher(base_folder):
    """A random Fisher of `base_folder`, in memory."""
    import training  # here, so that tests without training do not wait for trl

    return training.make_fisher(base_folder)


@pytest.fixture(scope="session")
def fisher_folder(fisher, tmp_path_factory):
    """The same as an artifact, in float32; its path as a `str`, as settings have it."""
    return str(fisher.save_pretrained(tmp_path_factory.mktemp("fisher") / "random", codec="float32"))
