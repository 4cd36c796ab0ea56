"""Small files that are either the old version or the new one, never half of each."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_text_atomically(path: str | Path, text: str) -> Path:
    """Write UTF-8 `text` beside `path`, flush it to the disk, and rename it into place; the folder is made when it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")
    try:
        with open(fresh, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    return path
