"""The page: base against adapted model, side by side. A face: what it shows is computed in `hf_ewc.compare`.

On a Space this file is the program, and `space.yaml` beside it (or variables `HF_EWC_BASE`, `HF_EWC_ADAPTED`, …) says what to
compare. Elsewhere `hf-ewc compare` starts it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from typing import Any

import gradio as gr
from layout import FOLDER, Page

from hf_ewc.compare import CompareConfig, CompareService, Tally, VoteStore
from hf_ewc.config import SPACE_FILE, raise_problems
from hf_ewc.errors import ConfigError, HubError

QUEUE = 64  # requests that wait; Gradio tells more of them that the page is busy


def serve(service: CompareService, **options: Any) -> gr.Blocks:
    """Build the page and launch it; `options` are those of [`gradio.Blocks.launch`]."""
    blocks = Page(service).build().queue(max_size=QUEUE, default_concurrency_limit=None)
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]  # of the visitor: nothing to fetch
    theme = gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=fonts, font_mono=["ui-monospace", "monospace"])
    theme.set(  # Gradio's own are too light to read on white: less than 4.5 to 1
        body_text_color_subdued="*neutral_600",
        block_info_text_color="*neutral_600",
        color_accent="*primary_600",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    settings = dict(
        theme=theme,
        css_paths=FOLDER / "style.css",
        head=f"<script>{script}</script>",
        footer_links=["api"],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        max_file_size="1kb",  # nothing is uploaded
        state_session_capacity=500,  # of what was written and measured, for another language
        quiet=True,
        share=False,
    )
    blocks.launch(**{**settings, **options})
    return blocks


def main() -> None:
    """On a Space."""
    logging.basicConfig(level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request
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
    tally = Tally()
    if config.votes_repo:  # not before the page: a Hub that does not answer takes its time
        threading.Thread(target=_store, args=(tally, config.votes_repo), daemon=True).start()
    service = CompareService(config, tally=tally, on_device=on_device)
    if os.environ.get("SPACES_ZERO_GPU"):
        service.wait()  # it takes only the tensors that are on the device when the page starts
    # A Space is ended by SIGTERM, at which Python would skip what is left to do at its exit: to store the last votes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    serve(service)


def _store(tally: Tally, repo_id: str) -> None:
    try:
        tally.store(VoteStore(repo_id).add)
    except HubError as error:
        logging.error("Votes are only counted: %s", error)


def _as_it_is(function: Any) -> Any:
    return function


if __name__ == "__main__":
    main()
