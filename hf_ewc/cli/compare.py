"""`hf-ewc compare`: base and adapted model side by side, on a page of this machine."""

from __future__ import annotations

import importlib
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

    from ..compare import CompareConfig

HELP = """\
Usage: hf-ewc compare [--base ID|FOLDER --adapted ID|FOLDER] [--key value …]

Open a page on this machine: both models write on from one prompt, token by token at the same pace; which of them finds a text
natural; the models between them (λ slider); what was kept and learned; blind votes. Without --base and --adapted it compares
the models of `hf-ewc demo`, and makes them first if they are not there (under three minutes).

  what      --base ID|FOLDER  --adapted ID|FOLDER  (--base_revision, --adapted_revision on the Hub)
            --plain ID|FOLDER  (the same training without EWC, to show what EWC spared)
            --fisher ID|FOLDER  (for the λ slider; default: what the adapted model's ewc_state.json names)
            --results results.json  (of `hf-ewc evaluate --base … --output` or a sweep: the table)
            --examples FILE.json  (prompts to offer; as in space_app/examples.json)
  how       --dtype float32|bfloat16  --device cpu|cuda|mps  --slots 2  (visitors at once)
  the page  --port 7860  (default: the first free one from there)  --open  (in the browser)
            --votes_repo USER/NAME  (a dataset repository that stores blind votes; without it they are only counted)

The page is seen from this machine only. Ctrl-C ends it. `hf-ewc push space` puts it on the Hub.

Examples:
  hf-ewc compare
  hf-ewc compare --base google/gemma-2-2b --adapted me/gemma-2-2b-lt --dtype bfloat16
  hf-ewc compare --base demo-out/base --adapted runs/lt --results runs/results.json --fisher runs/fisher
"""


@dataclass
class PageScript:
    """What `hf-ewc compare` needs besides the settings of the comparison."""

    port: int | None = field(default=None, metadata={"help": "Port on 127.0.0.1; default: the first free one from 7860."})
    open: bool = field(default=False, metadata={"help": "Open the page in the browser."})
    output_dir: str = field(default="demo-out", metadata={"help": "Where the demo is, or goes, without --base and --adapted."})

    def problems(self) -> list[str]:
        wrong = self.port is not None and not 0 < self.port < 65536
        return [f"`port: {self.port}` is no port. Use one from 1 to 65535."] if wrong else []


def run(argv: list[str]) -> int:
    from ..compare import CompareConfig, CompareService, Limits, Tally, VoteStore
    from ..config import raise_problems
    from ..errors import ConfigError
    from .options import parse

    config, page = parse("compare", argv, CompareConfig, PageScript)
    raise_problems("these are not there; nothing was started", _absent(config))
    app = _app()
    if config.base is None:
        _use_demo(config, Path(page.output_dir))
    tally = Tally(sink=VoteStore(config.votes_repo).add) if config.votes_repo else Tally()
    service = CompareService(config, Limits(per_minute=600, burst=100), tally)  # the only visitor is whoever started it
    print("Loading the models; the page is up meanwhile.", file=sys.stderr, flush=True)
    here = dict(server_name="127.0.0.1", server_port=page.port, inbrowser=page.open)
    try:
        blocks = app.serve(service, **here, prevent_thread_lock=True)
    except OSError as error:  # Gradio's, with no number of the system's
        at = f"port {page.port} is" if page.port else "all ports from 7860 to 7959 are"
        raise ConfigError(f"{at} taken ({error}). Name a free one: --port 7861") from None
    print(f"Open {blocks.local_url} (Ctrl-C ends it)", flush=True)
    try:
        service.wait(math.inf)  # whoever started it is told here, too, that the models cannot be loaded
        blocks.block_thread()
    finally:
        blocks.close(verbose=False)
    return 0


def _absent(config: CompareConfig) -> list[str]:
    """Files and folders that are not there. What may be an id on the Hub is looked for when the models load."""
    from ..hub import is_repo_id

    given = {name: value for name, value in vars(config).items() if value}
    found = [
        f"`{name}: {given[name]}`: there is no such file."
        for name in ("results", "examples")
        if name in given and not Path(given[name]).expanduser().is_file()
    ]
    return found + [
        f"`{name}: {given[name]}`: there is no such folder, and it is no id on the Hub (`user/name`)."
        for name in ("base", "adapted", "plain", "fisher")
        if name in given and not Path(given[name]).expanduser().is_dir() and not is_repo_id(given[name])
    ]


def _app() -> ModuleType:
    """`space_app/app.py`, whose folder is also the root of the Space."""
    from ..compare import app_folder
    from ..errors import ConfigError

    try:
        importlib.import_module("gradio")
    except ImportError:
        raise ConfigError("the page needs gradio, which is not installed: pip install 'gradio>=6.31'") from None
    sys.path.insert(0, str(app_folder()))
    return importlib.import_module("app")


def _use_demo(config: CompareConfig, folder: Path) -> None:
    """The demo's base, its model with the largest λ of `proximal`, and the one without EWC."""
    from ..compare import app_folder
    from .demo import run as run_demo

    adapted, plain = folder / "runs/proximal-1000", folder / "runs/sft-0"
    if not all((path / "result.json").is_file() for path in (adapted, plain)) or not (folder / "results.json").is_file():
        print("No models were named, so the demo makes some (under three minutes); next time they are there.", flush=True)
        run_demo(["--output_dir", str(folder), "--resume"])
    config.base, config.adapted, config.plain = str(folder / "base"), str(adapted), config.plain or str(plain)
    config.fisher = config.fisher or str(folder / "fisher")
    config.results = config.results or str(folder / "results.json")
    config.examples = config.examples or str(app_folder() / "examples_demo.json")
