"""The page: base against adapted model, side by side. A face: what it shows is computed in `hf_ewc.compare`.

On a Space this file is the program, and `space.yaml` beside it (or variables `HF_EWC_BASE`, `HF_EWC_ADAPTED`, …) says what to
compare. Elsewhere `hf-ewc compare` starts it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import Any

import gradio as gr
from layout import FOLDER, Page

from hf_ewc.compare import CompareConfig, CompareService, Tally, VoteStore
from hf_ewc.config import SPACE_FILE, raise_problems
from hf_ewc.errors import ConfigError

QUEUE = 64  # requests that wait; more are told that the page is busy


def serve(service: CompareService, **options: Any) -> gr.Blocks:
    """Build the page and launch it; `options` are those of [`gradio.Blocks.launch`]."""
    blocks = Page(service).build().queue(max_size=QUEUE, default_concurrency_limit=None)
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]  # of the visitor: nothing to fetch
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    settings = dict(
        theme=gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=fonts, font_mono=["ui-monospace", "monospace"]),
        css_paths=FOLDER / "style.css",
        head=f"<script>{script}</script>",
        footer_links=["api"],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        max_file_size="1kb",  # nothing is uploaded
        quiet=True,
        share=False,
    )
    blocks.launch(**{**settings, **options})
    return blocks


def main() -> None:
    """On a Space."""
    logging.basicConfig(level=logging.INFO)
    config = CompareConfig.of_space(FOLDER)
    if not config.base and not config.adapted:
        raise ConfigError(
            f"this Space does not say what to compare: set `base` and `adapted` in {SPACE_FILE}, or the variables HF_EWC_BASE "
            "and HF_EWC_ADAPTED in its settings. `hf-ewc push space` does so."
        )
    raise_problems("The Space cannot start", config.problems())
    if config.results:
        config.results = str(FOLDER / config.results)  # it was committed beside this file
    try:
        import spaces  # of ZeroGPU: a device that is lent for each call

        on_device = spaces.GPU(duration=60)
    except ImportError:
        on_device = _as_it_is
    tally = Tally(sink=VoteStore(config.votes_repo).add) if config.votes_repo else Tally()
    service = CompareService(config, tally=tally, on_device=on_device)
    if os.environ.get("SPACES_ZERO_GPU"):
        service.wait()  # it takes only the tensors that are on the device when the page starts
    # A Space is ended by SIGTERM, at which Python would skip what is left to do at its exit: to store the last votes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    serve(service)


def _as_it_is(function: Any) -> Any:
    return function


if __name__ == "__main__":
    main()
