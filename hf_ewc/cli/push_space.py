"""`hf-ewc push space`: a page on the Hub that shows a model beside its base."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from .push import PushTarget

HELP = """\
Usage: hf-ewc push space --adapted USER/NAME --repo_id USER/NAME [--key value …]

Publish a Space in which people give one prompt to the base and to the adapted model. It holds the page of `hf-ewc compare`, the
code that it runs with, and `space.yaml`, which names both models and their Fisher by their commits. Models and Fisher are read
from the Hub: push them first.

  what          --adapted USER/NAME[@REVISION]
                --base USER/NAME[@REVISION]  --fisher USER/NAME[@REVISION]  (default: what the model's ewc_state.json names)
                --plain USER/NAME[@REVISION]  (the same training without EWC: the page then shows what EWC spared)
                --adapted_revision  --base_revision  --fisher_revision  --plain_revision  (the commit of each is recorded)
                --results results.json  (of `hf-ewc evaluate --base … --output` or of a sweep: the page's table)
                --examples FILE.json  (prompts to offer, in the place of those of space_app/examples.json)
  the page      --title TEXT  --dtype float32|bfloat16  (of the weights in memory)
                --votes_repo USER/NAME  (dataset that stores blind votes; without it they are only counted)
                --hardware zero-a10g  (suggested to who duplicates it; choose your own in its settings)
  where         --repo_id USER/NAME  --revision BRANCH  --tag v1  --private true|false  (of a new Space; default true)
  how           --commit_message TEXT  --create_pr  (propose it instead)  --dry_run  (list files and bytes, send nothing)

A Space of private or gated models needs a secret HF_TOKEN, which you add in its settings: it is never part of a push.

Examples:
  hf-ewc push space --adapted me/tiny-lt --repo_id me/tiny-lt-space --dry_run
  hf-ewc push space --adapted me/tiny-lt@v1 --results runs/tiny-cpu/results.json --repo_id me/tiny-lt-space --private false
"""


@dataclass(kw_only=True)
class PushSpace(PushTarget):
    """What `hf-ewc push space` needs."""

    adapted: str = field(metadata={"help": "The model after training: an id on the Hub."})
    base: str | None = field(default=None, metadata={"help": "The model before training; default: what the model names."})
    base_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the base."})
    adapted_revision: str | None = field(default=None, metadata={"help": "The same for the adapted model."})
    fisher: str | None = field(default=None, metadata={"help": "Dataset of the Fisher; default: what the model names."})
    fisher_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the Fisher."})
    plain: str | None = field(default=None, metadata={"help": "The same training without EWC: an id on the Hub."})
    plain_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of it."})
    results: str | None = field(default=None, metadata={"help": "results.json with the model's row."})
    examples: str | None = field(default=None, metadata={"help": "JSON of the prompts that are offered."})
    dtype: str = field(default="float32", metadata={"help": "Of the weights in memory: float32 or bfloat16."})
    votes_repo: str | None = field(default=None, metadata={"help": "Dataset repository that stores blind votes."})
    title: str | None = field(default=None, metadata={"help": "Title of the Space; default: the models' names."})
    hardware: str | None = field(default=None, metadata={"help": "Suggested hardware, such as zero-a10g."})


def run(argv: list[str]) -> int:
    from .options import parse

    (script,) = parse("push space", argv, PushSpace)

    from ..hub import Pushed
    from ..publish import push_space

    shared = {f.name for f in fields(PushTarget)}
    shown = {f.name: getattr(script, f.name) for f in fields(PushSpace) if f.name not in shared}
    done = push_space(script.repo_id, **shown, **script.options())
    print(done.text() if isinstance(done, Pushed) else f"{done.text()}\nNothing was sent (--dry_run).")
    return 0
