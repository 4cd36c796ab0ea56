"""Runs the cases of `tests/hub/cases/` against the test Hub, through LFS or (with `--xet`) through Xet.

    python tests/hub/leg.py -q                                  # every case, through LFS
    python tests/hub/leg.py --xet -q tests/hub/cases/case_protocol.py -k gated

huggingface_hub reads its settings when it is imported, and one of them chooses between LFS and Xet: hence a process per leg,
whose environment is set before anything of Hugging Face's is imported.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

CASES = Path(__file__).parent / "cases"


def legs_of(case: Path) -> tuple[str, ...]:
    """The legs that a case is for: both, unless the file says `LEGS = ("lfs",)`. Read without importing it."""
    line = re.search(r"^LEGS\s*=(.*)$", case.read_text(encoding="utf-8"), re.MULTILINE)
    return tuple(leg for leg in ("lfs", "xet") if line is None or f'"{leg}"' in line[1])


def main(arguments: list[str]) -> int:
    leg = "xet" if "--xet" in arguments else "lfs"
    arguments = [argument for argument in arguments if argument != "--xet"]
    if not any(".py" in argument or Path(argument).is_dir() for argument in arguments):
        arguments += [str(case) for case in sorted(CASES.glob("case_*.py")) if leg in legs_of(case)]
    # errors ignored: hf-xet may still write its log while the folder is removed
    with tempfile.TemporaryDirectory(prefix="hub-", ignore_cleanup_errors=True) as folder:
        import server  # imports nothing of Hugging Face's

        hub = server.Hub(Path(folder, "root"), xet=leg == "xet")
        for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))]:
            del os.environ[name]  # the developer's token, caches and mirrors
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(Path(folder, "home")), "HF_TOKEN": "hf_owner"}
        os.environ |= {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_EVALUATE_OFFLINE": "1"}
        os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
        os.environ |= {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
        os.environ |= {"HF_HUB_DISABLE_XET": "0" if leg == "xet" else "1"}

        import pytest

        class Leg:
            """Hands the server to `cases/conftest.py`."""

            @staticmethod
            def pytest_configure(config):
                config.hub = hub

        hub.start()
        try:
            settings = ["-o", "python_files=case_*.py", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
            return pytest.main([*settings, *arguments], plugins=[Leg()])
        finally:
            hub.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
