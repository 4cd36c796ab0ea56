"""Small files that are either the old version or the new one, never half of each."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

STATE_FILE = "ewc_state.json"  # beside a trained model: λ, mode, and which Fisher and anchor it was trained against


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
