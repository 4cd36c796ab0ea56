"""Files: the names beside a model's weights, small ones written whole or not at all, and a disk that is full."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

STATE_FILE = "ewc_state.json"  # beside a trained model: λ, mode, and which Fisher and anchor it was trained against

BESIDE_WEIGHTS = (  # what `save_pretrained` of a model and of a tokenizer writes, but for weights, config.json and card
    *("generation_config.json", "*processor_config.json", "LICENSE*", "NOTICE*"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.*", "merges.txt", "*.model"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.*", "additional_chat_templates/*.jinja"),
)


def write_atomically(path: str | Path, content: str | bytes) -> Path:
    """Write (text as UTF-8) beside `path`, flush it to the disk, and rename it into place; a missing folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")
    try:
        with open(fresh, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    return path


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that a disk or a quota is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # safetensors and torch.save report it in words only: SafetensorError("… No space left on device (os error 28)"),
        # RuntimeError("[enforce fail at inline_container.cc:664] … unexpected pos …")
        if "No space left on device" in str(error) or "inline_container.cc" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
